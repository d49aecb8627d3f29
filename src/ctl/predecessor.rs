//! What the TypeScript predecessor kept: its database, the log beside that, and its archive. They are only read: not
//! even a file beside them is made.

use std::fmt::Display;
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

use super::Failure;
use crate::model::hex::hex;
use crate::model::predecessor::{OldRun, Row, Survey};
use crate::model::run::Imported;

/// The predecessor's database, and what its archive held.
pub(super) struct Old {
    connection: Connection,
    path: PathBuf,
    has_exit_codes: bool,
    /// Where it is a copy: removed in the end.
    _copy: Option<Copy>,
}

/// Rows in the order of their ids; one that is in the log and in the archive is one row.
const COLUMNS: &str = "id, source, type, ref_id, payload, timestamp";

impl Old {
    /// Opens a database, and makes sure that it is the predecessor's and whole.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let path = path.to_owned();
        let failed = |error: &dyn Display| unreadable(&path, error);
        fs::metadata(&path).map_err(|error| failed(&error))?;
        let (wal, index) = (beside(&path, "-wal"), beside(&path, "-shm"));
        let has_log = fs::metadata(wal).is_ok_and(|log| log.len() > 0);
        let mut copy = None;
        let uri = match (has_log, index.exists()) {
            (false, _) => uri(&path, "immutable=1"),
            (true, true) => uri(&path, "mode=ro&readonly_shm=1"),
            // Nobody has it open, or there were an index of its log; one of our own would be a file beside it.
            (true, false) => {
                let made = Copy::of(&path).map_err(|error| failed(&error))?;
                let uri = uri(&made.0.join("logs.db"), "mode=rw");
                copy = Some(made);
                uri
            }
        };
        let mut flags = OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        flags |= if copy.is_some() {
            OpenFlags::SQLITE_OPEN_READ_WRITE
        } else {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        };
        let opened = (|| {
            let connection = Connection::open_with_flags(uri, flags)?;
            connection.pragma_update(None, "trusted_schema", false)?;
            connection.execute_batch(
                "CREATE TEMP TABLE archived (id INTEGER, source TEXT, type TEXT, ref_id TEXT, payload TEXT,
                     timestamp INTEGER);
                 CREATE INDEX temp.archived_of ON archived (ref_id);",
            )?;
            let verdict: String =
                connection.query_row("PRAGMA main.quick_check(1)", [], |row| row.get(0))?;
            Ok((connection, verdict))
        })();
        let (connection, verdict) =
            opened.map_err(|error: rusqlite::Error| failed(&said(&error)))?;
        if verdict != "ok" {
            return Err(failed(&format!("it is damaged: {verdict}")));
        }
        let mut old = Self {
            connection,
            path,
            has_exit_codes: false,
            _copy: copy,
        };
        old.check_columns(
            "logs",
            &["id", "source", "type", "ref_id", "payload", "timestamp"],
        )?;
        let runs = ["run_id", "workflow", "status", "timestamp", "exit_code"];
        let found = old.check_columns("workflow_runs", &runs[..4])?;
        old.has_exit_codes = found.iter().any(|column| column == runs[4]);
        Ok(old)
    }

    /// Whether a table has what it should have, and nothing that is not known.
    fn check_columns(&self, table: &str, needed: &[&str]) -> Result<Vec<String>, Failure> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let mut select = self.connection.prepare(
                "SELECT column.name FROM main.sqlite_schema AS thing, pragma_table_info(thing.name, 'main') AS column
                 WHERE thing.type = 'table' AND thing.name = ?1",
            )?;
            select.query_map([table], |row| row.get(0))?.collect()
        };
        let found = read().map_err(|error| self.failed(&error))?;
        let path = self.path.display();
        let is_there = |column: &&str| found.iter().any(|name| name == column);
        if !needed.iter().all(is_there) {
            return Err(Failure::Input(format!(
                "{path} is no database of the predecessor: it has no table {table} with the columns {}",
                needed.join(", ")
            )));
        }
        let known = |column: &&String| needed.contains(&column.as_str()) || *column == "exit_code";
        match found.iter().find(|column| !known(column)) {
            Some(column) => Err(Failure::Input(format!(
                "{path} is newer than what can be imported: its table {table} has a column {column}"
            ))),
            None => Ok(found),
        }
    }

    /// Loads the archive: that which is given, or the one beside the database.
    pub(super) fn load_archive(&self, given: Option<&Path>) -> Result<(), Failure> {
        let usual = self.path.with_file_name("archive").join("logs");
        let directory = match given {
            Some(directory) => directory,
            None if usual.is_dir() => &usual,
            None => {
                return match self.archived_up_to()? {
                    Some(day) => Err(Failure::Input(format!(
                        "the log of {} up to {day} is in an archive, and there is none in {}; say where it is with --archive",
                        self.path.display(),
                        usual.display()
                    ))),
                    None => Ok(()),
                };
            }
        };
        let files = entries(directory)?;
        if let Some(day) = self.archived_up_to()?
            && !directory.join(format!("{day}.jsonl")).is_file()
        {
            return Err(Failure::Input(format!(
                "the log of {} up to {day} is in an archive, and {} has no {day}.jsonl; say where it is with --archive",
                self.path.display(),
                directory.display()
            )));
        }
        let is_day = |path: &&PathBuf| {
            path.extension()
                .is_some_and(|extension| extension == "jsonl")
        };
        for path in files.iter().filter(is_day) {
            self.load_day(path)?;
        }
        Ok(())
    }

    fn load_day(&self, path: &Path) -> Result<(), Failure> {
        let file = File::open(path).map_err(|error| unreadable(path, &error))?;
        let mut insert =
            self.prepare("INSERT INTO temp.archived VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
        for (number, line) in (1..).zip(BufReader::new(file).lines()) {
            let broken = |error: &dyn Display| {
                let path = path.display();
                Failure::Input(format!("{path}:{number} is no row of a log: {error}"))
            };
            let line = line.map_err(|error| broken(&error))?;
            let row: Row = serde_json::from_str(&line).map_err(|error| broken(&error))?;
            let (ref_id, payload) = (row.ref_id, row.payload);
            let row = params![
                row.id,
                row.source,
                row.row_type,
                ref_id,
                payload,
                row.timestamp
            ];
            insert.execute(row).map_err(|error| self.failed(&error))?;
        }
        Ok(())
    }

    fn archived_up_to(&self) -> Result<Option<String>, Failure> {
        let read = || -> rusqlite::Result<Option<String>> {
            if !self.connection.table_exists(Some("main"), "meta")? {
                return Ok(None);
            }
            let select = "SELECT value FROM main.meta WHERE key = 'archived_up_to'";
            let value = self.connection.query_row(select, [], |row| row.get(0));
            value.optional()
        };
        read().map_err(|error| self.failed(&error))
    }

    /// Every run, the oldest first; a status that nobody knows is found before the first one is sent.
    pub(super) fn runs(&self) -> Result<Runs, Failure> {
        let exit_code = if self.has_exit_codes {
            "exit_code"
        } else {
            "NULL"
        };
        let read = || -> rusqlite::Result<Vec<OldRun>> {
            let mut select = self.connection.prepare(&format!(
                "SELECT run_id, workflow, status, timestamp, {exit_code} FROM main.workflow_runs ORDER BY timestamp, run_id"
            ))?;
            let run = |row: &rusqlite::Row<'_>| {
                Ok(OldRun {
                    id: text(row.get_ref(0)?).unwrap_or_default(),
                    workflow: text(row.get_ref(1)?).unwrap_or_default(),
                    status: text(row.get_ref(2)?).unwrap_or_default(),
                    timestamp: whole(row.get_ref(3)?).unwrap_or_default(),
                    exit_code: whole(row.get_ref(4)?),
                })
            };
            select.query_map([], run)?.collect()
        };
        let runs = read().map_err(|error| self.failed(&error))?;
        for run in &runs {
            conclude(Survey::default(), run.clone())?;
        }
        Ok(Runs(runs.into_iter()))
    }

    pub(super) fn rows_of_run(&self) -> Result<rusqlite::CachedStatement<'_>, Failure> {
        self.prepare(&format!(
            "SELECT {COLUMNS} FROM main.logs WHERE ref_id = ?1
             UNION SELECT {COLUMNS} FROM temp.archived WHERE ref_id = ?1 ORDER BY id"
        ))
    }

    pub(super) fn other_rows(&self) -> Result<rusqlite::CachedStatement<'_>, Failure> {
        let of_none = "ref_id IS NULL OR ref_id NOT IN (SELECT run_id FROM main.workflow_runs WHERE run_id IS NOT NULL)";
        self.prepare(&format!(
            "SELECT {COLUMNS} FROM main.logs WHERE {of_none}
             UNION SELECT {COLUMNS} FROM temp.archived WHERE {of_none} ORDER BY id"
        ))
    }

    fn prepare(&self, sql: &str) -> Result<rusqlite::CachedStatement<'_>, Failure> {
        let prepared = self.connection.prepare_cached(sql);
        prepared.map_err(|error| self.failed(&error))
    }

    pub(super) fn next(&self, rows: &mut rusqlite::Rows<'_>) -> Result<Option<Row>, Failure> {
        let mut read = || -> rusqlite::Result<Option<Row>> {
            let Some(row) = rows.next()? else {
                return Ok(None);
            };
            Ok(Some(Row {
                id: whole(row.get_ref(0)?).unwrap_or_default(),
                source: text(row.get_ref(1)?).unwrap_or_default(),
                row_type: text(row.get_ref(2)?).unwrap_or_default(),
                ref_id: text(row.get_ref(3)?),
                payload: text(row.get_ref(4)?),
                timestamp: whole(row.get_ref(5)?).unwrap_or_default(),
            }))
        };
        read().map_err(|error| self.failed(&error))
    }

    pub(super) fn failed(&self, error: &rusqlite::Error) -> Failure {
        unreadable(&self.path, &said(error))
    }
}

/// The runs that are still to be sent.
pub(super) struct Runs(std::vec::IntoIter<OldRun>);

impl Runs {
    pub(super) fn next(&mut self, old: &Old) -> Result<Option<Imported>, Failure> {
        let Some(run) = self.0.next() else {
            return Ok(None);
        };
        let mut survey = Survey::default();
        let mut statement = old.rows_of_run()?;
        let mut rows = statement
            .query([&run.id])
            .map_err(|error| old.failed(&error))?;
        while let Some(row) = old.next(&mut rows)? {
            survey.see(&row);
        }
        conclude(survey, run).map(Some)
    }
}

fn conclude(survey: Survey, run: OldRun) -> Result<Imported, Failure> {
    let id = run.id.clone();
    let concluded = survey.conclude(run);
    concluded.map_err(|error| Failure::Input(format!("run {id:?}: {error}; nothing was imported")))
}

/// SQLite does not hold anybody to the types of columns.
fn text(value: ValueRef<'_>) -> Option<String> {
    match value {
        ValueRef::Null => None,
        ValueRef::Integer(number) => Some(number.to_string()),
        ValueRef::Real(number) => Some(number.to_string()),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            Some(String::from_utf8_lossy(bytes).into_owned())
        }
    }
}

fn whole(value: ValueRef<'_>) -> Option<i64> {
    match value {
        ValueRef::Integer(number) => Some(number),
        #[expect(clippy::cast_possible_truncation, reason = "it saturates")]
        ValueRef::Real(number) => Some(number as i64),
        _ => None,
    }
}

fn said(error: &rusqlite::Error) -> String {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => "it is no SQLite database".to_owned(),
        Some(rusqlite::ErrorCode::DatabaseCorrupt) => format!("it is damaged: {error}"),
        _ => error.to_string(),
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// sqlite.org/uri.html
fn uri(path: &Path, parameters: &str) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut uri = "file://".to_owned();
    for byte in absolute.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                uri.push(char::from(*byte))
            }
            byte => uri.extend(["%", &hex(&[*byte])]),
        }
    }
    uri + "?" + parameters
}

/// A database and its log, copied to where SQLite may work on them; removed when it is dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(path: &Path) -> io::Result<Self> {
        let directory =
            std::env::temp_dir().join(format!("nervectl-import-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&directory)?;
        let copy = Self(directory);
        fs::copy(path, copy.0.join("logs.db"))?;
        fs::copy(beside(path, "-wal"), copy.0.join("logs.db-wal"))?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left over is in nobody's way.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a directory holds, in order.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let read = fs::read_dir(directory).and_then(|entries| {
        let paths = entries.map(|entry| Ok(entry?.path()));
        paths.collect::<io::Result<Vec<_>>>()
    });
    let mut paths = read.map_err(|error| unreadable(directory, &error))?;
    paths.sort();
    Ok(paths)
}

pub(super) fn unreadable(path: &Path, error: &dyn Display) -> Failure {
    Failure::Input(format!("cannot read {}: {error}", path.display()))
}
