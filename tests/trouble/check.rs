//! Whether a directory is what a nerved can go on with, and has all that somebody was told of.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nerve::store::{Digest, Store};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::record::State;

/// What there is to compare with: the database of the program as it was at its end.
#[derive(Debug)]
pub struct Oracle {
    pub database: PathBuf,
    /// Every blob that it ever wrote.
    pub blobs: BTreeMap<String, Vec<u8>>,
}

/// What can be wrong.
#[derive(Debug, PartialEq, Eq)]
pub enum Fault {
    /// Somebody was told of what is not there.
    Lost(String),
    /// It is not what was written.
    Corrupt(String),
}

/// Compares what is in `directory` with the oracle.
pub fn check(directory: &Path, state: &State, oracle: &Oracle) -> Result<(), Fault> {
    let corrupt = |error: rusqlite::Error| Fault::Corrupt(error.to_string());
    let connection = open(&directory.join("nerve.db")).map_err(corrupt)?;
    let tables: u32 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(corrupt)?;
    if tables == 0 {
        return if state.acknowledged == 0 {
            Ok(())
        } else {
            Err(Fault::Lost("the database is empty".to_owned()))
        };
    }
    let whole: String = connection
        .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
        .map_err(corrupt)?;
    if whole != "ok" {
        return Err(Fault::Corrupt(whole));
    }
    connection
        .execute("ATTACH ?1 AS oracle", [oracle.database.to_str().unwrap()])
        .map_err(corrupt)?;
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    let newest = number("SELECT coalesce(max(seq), 0) FROM main.events").map_err(corrupt)?;
    let ask = |what: &str, sql: &str| match number(sql).map_err(corrupt)? {
        0 => Ok(()),
        wrong => Err(Fault::Corrupt(format!("{wrong}: {what}"))),
    };
    // They are chained, so that is the chain as well.
    ask(
        "events missing or other than those that were written",
        "SELECT (SELECT coalesce(max(seq), 0) FROM main.events) -
            (SELECT count(*) FROM main.events e JOIN oracle.events o USING (seq)
             WHERE e.source = o.source AND e.type = o.type AND e.ref = o.ref AND e.payload = o.payload
             AND e.blob IS o.blob AND e.hash = o.hash)",
    )?;
    // A turn is there whole or not at all: its runs are what its events say.
    ask(
        "runs that are not what their events add up to",
        "SELECT (SELECT count(*) FROM main.workflow_runs r WHERE rounds <>
                (SELECT count(*) FROM main.events WHERE ref = r.run AND type = 'thread-workflow-message')
                OR (started_at IS NOT NULL) <>
                (SELECT count(*) FROM main.events WHERE ref = r.run AND type = 'started')
                OR (ended_at IS NOT NULL) <>
                (SELECT count(*) FROM main.events WHERE ref = r.run AND type = 'ended'))
            + abs((SELECT count(*) FROM main.workflow_runs) -
                (SELECT count(*) FROM main.events WHERE type = 'queued'))",
    )?;
    ask(
        "definitions that are not what the events say",
        "SELECT (SELECT count(*) FROM main.workflows) <> (SELECT count(*) FROM main.events WHERE type = 'defined')
            OR (SELECT count(*) FROM main.definitions) <> (SELECT count(*) FROM main.workflows)",
    )?;
    if newest.unsigned_abs() < state.acknowledged {
        return Err(Fault::Lost(format!(
            "events up to {} were acknowledged, and {newest} is the newest",
            state.acknowledged
        )));
    }
    let mut select = connection
        .prepare("SELECT DISTINCT blob FROM main.events WHERE blob IS NOT NULL")
        .map_err(corrupt)?;
    let blobs = select
        .query_map([], |row| row.get::<_, String>(0))
        .map_err(corrupt)?;
    for blob in blobs {
        let blob = blob.map_err(corrupt)?;
        let path = format!("blobs/{}/{}", &blob[..2], &blob[2..]);
        let found = state.files.get(&path);
        if found.is_none() || found != oracle.blobs.get(&path) {
            return Err(Fault::Lost(format!("blob {blob}")));
        }
    }
    Ok(())
}

/// Reads as nerved does, and leaves everything as it is.
pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.execute_batch("PRAGMA main.locking_mode = EXCLUSIVE")?;
    Ok(connection)
}

/// Has nerve's own store open it, read every event's blob, and go on.
pub fn reopen(directory: &Path) -> Result<(), Fault> {
    let corrupt = |error: nerve::store::Error| Fault::Corrupt(error.to_string());
    let mut store = Store::open(directory).map_err(corrupt)?;
    let definition =
        b"version: 1\nname: x\nroles: {a: {exec: [a]}}\ngraph: {$START: a, a: {ok: $END}}\n";
    let parsed = nerve::config::definition::parse("x.yaml", None, definition);
    store
        .put_definition(&parsed.definition.unwrap(), definition)
        .map_err(corrupt)?;
    for run in store.open_runs().map_err(corrupt)? {
        store
            .thread(run.id, &nerve::store::ThreadRange::default())
            .map_err(corrupt)?;
    }
    Ok(())
}

/// The blobs below a directory, by their paths in it.
pub fn blobs(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let Ok(folders) = std::fs::read_dir(directory.join("blobs")) else {
        return found;
    };
    for folder in folders {
        let folder = folder.unwrap();
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let file = file.unwrap();
            let (folder, name) = (folder.file_name(), file.file_name());
            // What a put left behind that could not even clear up.
            if Path::new(&name).extension().is_some() {
                continue;
            }
            let path = format!(
                "blobs/{}/{}",
                folder.to_str().unwrap(),
                name.to_str().unwrap()
            );
            let content = std::fs::read(file.path()).unwrap();
            let digest = format!("{}{}", folder.to_str().unwrap(), name.to_str().unwrap());
            assert_eq!(Digest::of(&content).as_str(), digest);
            found.insert(path, content);
        }
    }
    found
}
