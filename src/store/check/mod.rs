//! Whether a store is what it should be: nothing of the history was changed, and everything else is what the history
//! adds up to.
//!
//! A check reads a copy of the database, which nobody else has open, and beside it the archive and the blobs where they
//! are. It changes none of them. What it finds are faults, one sentence each; it goes on after each, as far as it can.
//! Memory is bounded by the runs that are open at one time.
//!
//! - `history`: all events, from the archive and the database, chained without a gap
//! - `rows`: the tables that the events add up to
//! - [`offline`]: the same for a store that no nerved has open

mod history;
pub mod offline;
mod rows;

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use rusqlite::Connection;
use rusqlite::config::DbConfig;

use super::log::Head;
use super::{Blobs, Digest, Error, Handle, backup, cold, schema};
use crate::model::hex::hex;
use crate::model::report::Report;

/// Where a check of a store that is at work has its copy.
const FOLDER: &str = "check";
/// Blobs that are listed at a time.
const BLOBS: usize = 1_000;

/// A part of the check that could not be done for the damage is a fault too. What is not damage is an error.
fn part(report: &mut Report, what: &str, done: Result<(), Error>) -> Result<(), Error> {
    match done {
        Err(Error::Sqlite(error)) => report.fault(format!("{what} cannot be read: {error}")),
        Err(Error::Damaged(error)) => report.fault(format!("{what}: {error}")),
        done => return done,
    }
    Ok(())
}

/// Where the parts of a store are.
#[derive(Debug)]
struct Place<'a> {
    blobs: &'a Blobs,
    /// The folder of the archive's files.
    archive: PathBuf,
}

/// Checks the store that this handle is of, and that is at work. To be called where one may wait.
///
/// # Errors
/// When the check cannot be made: there is no room for a copy, a file cannot be read.
pub fn online(store: &Handle) -> Result<Report, Error> {
    let directory = store.call_and_wait(|store| {
        let database = store.number("page_count")? * store.number("page_size")?;
        store.must_have_room(database)?;
        Ok(store.directory().to_owned())
    })?;
    let copy = Copy::new(directory.join(FOLDER))?;
    let path = copy.database();
    let file = File::create(&path).map_err(|source| Error::File { path, source })?;
    backup::backup(store, &file)?;
    check(&copy, &directory)
}

/// A copy of a database, in a folder of its own, which goes with it.
#[derive(Debug)]
struct Copy {
    directory: PathBuf,
}

impl Copy {
    /// Makes the folder; what an earlier check has left there goes.
    fn new(directory: PathBuf) -> Result<Self, Error> {
        let make = || DirBuilder::new().mode(0o700).create(&directory);
        match remove(&directory).and_then(|()| make()) {
            Ok(()) => Ok(Self { directory }),
            Err(source) => Err(Error::File {
                path: directory,
                source,
            }),
        }
    }

    fn database(&self) -> PathBuf {
        self.directory.join("nerve.db")
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // The next check removes what cannot be removed now.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Removes what is left of a check that did not come to its end.
pub(super) fn remove_unfinished(directory: &Path) -> Result<(), Error> {
    let path = directory.join(FOLDER);
    remove(&path).map_err(|source| Error::File { path, source })
}

fn remove(folder: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Checks a copy of the database, and the archive and the blobs in `directory`.
fn check(copy: &Copy, directory: &Path) -> Result<Report, Error> {
    let mut report = Report::default();
    let blobs = Blobs::new(directory.join("blobs"));
    let place = Place {
        blobs: &blobs,
        archive: cold::folder(directory),
    };
    match open(&copy.database()) {
        Ok(mut connection) => {
            let found = database(&mut connection, &mut report);
            part(&mut report, "the database", found)?;
            let found = history(&connection, &place, &mut report);
            part(&mut report, "the history", found)?;
            let found = definitions(&connection, &mut report);
            part(&mut report, "the definitions", found)?;
        }
        Err(error) => part(&mut report, "the database", Err(error))?,
    }
    each_blob(&blobs, &mut report)?;
    Ok(report)
}

fn open(path: &Path) -> Result<Connection, Error> {
    let connection = Connection::open(path)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    // Nothing has to last, and nobody else has it.
    connection.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA synchronous = OFF; PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON;",
    )?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// What SQLite itself can tell, and whether it is nerve's database.
fn database(connection: &mut Connection, report: &mut Report) -> Result<(), Error> {
    for pragma in ["integrity_check(100)", "foreign_key_check"] {
        let mut select = connection.prepare(&format!("PRAGMA {pragma}"))?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let text: String = if pragma == "foreign_key_check" {
                let (table, parent): (String, String) = (row.get(0)?, row.get(2)?);
                format!("a row of {table} refers to one of {parent} that is not there")
            } else {
                row.get(0)?
            };
            if text != "ok" {
                report.fault(format!("the database: {text}"));
            }
        }
    }
    let version = schema::refuse_newer(connection)?;
    if version == 0 {
        return Err(Error::Damaged("it is not nerve's".to_owned()));
    }
    // An older nerve's: what it will be when this one opens it is what has to be right.
    if version < schema::VERSION {
        schema::migrate(connection)?;
    }
    let expected = FRESH.as_ref().map_err(|why| Error::Damaged(why.clone()))?;
    let found = objects(connection)?;
    for (name, _) in expected.iter().filter(|object| !found.contains(object)) {
        report.fault(format!("the database: {name} is not as nerve makes it"));
    }
    for (name, _) in found.iter().filter(|object| !expected.contains(object)) {
        report.fault(format!("the database: {name} is not nerve's"));
    }
    Ok(())
}

/// The objects of a database as nerve makes it.
static FRESH: LazyLock<Result<Vec<(String, String)>, String>> = LazyLock::new(|| {
    let fresh = || {
        let mut connection = Connection::open_in_memory()?;
        schema::migrate(&mut connection)?;
        objects(&connection)
    };
    fresh().map_err(|error: Error| error.to_string())
});

/// Name and text of all that the schema has, and of the file's mark.
fn objects(connection: &Connection) -> Result<Vec<(String, String)>, Error> {
    let mut select = connection.prepare(
        "SELECT type || ' ' || name, tbl_name || ': ' || coalesce(sql, '') FROM sqlite_schema ORDER BY 1",
    )?;
    let objects = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let mut objects: Vec<(String, String)> = objects.collect::<Result<_, _>>()?;
    let mark = "PRAGMA application_id";
    let mark: i64 = connection.query_row(mark, [], |row| row.get(0))?;
    objects.push(("its application id".to_owned(), mark.to_string()));
    Ok(objects)
}

/// The events, and what they add up to.
fn history(connection: &Connection, place: &Place<'_>, report: &mut Report) -> Result<(), Error> {
    let mut tables = rows::Tables::new(connection)?;
    let head = history::walk(connection, place, report, &mut tables)?;
    let Head { seq, hash } = head;
    (report.seq, report.hash) = (seq, hex(&hash));
    tables.finish(report)
}

fn definitions(connection: &Connection, report: &mut Report) -> Result<(), Error> {
    let mut select = connection.prepare("SELECT digest, bytes FROM definitions")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (digest, bytes): (String, Vec<u8>) = (row.get(0)?, row.get(1)?);
        let found = Digest::of(&bytes);
        if found.as_str() != digest {
            report.fault(format!("definition {digest} has the digest {found}"));
        }
    }
    Ok(())
}

fn each_blob(blobs: &Blobs, report: &mut Report) -> Result<(), Error> {
    let mut after = None;
    loop {
        let some = blobs.list(after.as_ref(), BLOBS)?;
        for (digest, _) in &some {
            report.blobs += 1;
            match blobs.open(digest) {
                Err(error @ Error::BlobDamaged { .. }) => report.fault(error.to_string()),
                Err(Error::File { path, source }) => {
                    report.fault(format!("{}: {source}", path.display()));
                }
                // Nobody misses what was collected meanwhile; what is referred to is missed by its event.
                other => drop(other?),
            }
        }
        match some.last() {
            Some((last, _)) => after = Some(last.clone()),
            None => return Ok(()),
        }
    }
}
