//! What nerve remembers: one SQLite database, one writer, WAL, `synchronous=FULL`.
//!
//! Events and the runs they change are written in one transaction. Only the manager writes, turns by its driver and definitions by
//! who reads them; everybody reads what is committed, through the same thread ([`Handle`]), so that nobody is ever told something that the database
//! does not say.

mod checkpoint;
mod moments;
mod read;
mod schema;
#[cfg(test)]
mod tests;
mod thread;

use std::io;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, params};

use crate::engine::{Event, Turn};
use crate::model::name::{RunTail, WorkflowName};
use crate::model::run::RunEvent;
use crate::model::status::UnknownWord;
use crate::model::workflow::Definition;

pub use moments::Moments;
pub use read::{EventRow, Found, Round, RunFilter, RunRow, ThreadRange};
pub use thread::Handle;

/// Below this SQLite a database in WAL mode can be damaged by its own log reset.
const OLDEST_SQLITE: i32 = 3_051_003;

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite says so.
    #[error("database: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file could not be reached.
    #[error("{}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else has the database.
    #[error("{} is in use by another nerved", .0.display())]
    InUse(PathBuf),
    /// A newer nerve wrote it.
    #[error(
        "the database has schema {found}, this nerve knows up to {known}: install the newer nerve again"
    )]
    TooNew {
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The SQLite library is too old to be trusted.
    #[error("SQLite {0} can corrupt a database in WAL mode; 3.51.3 or newer is needed")]
    OldSqlite(&'static str),
    /// A setting that durability hangs on did not take.
    #[error("PRAGMA {0} is {1:?}")]
    Pragma(&'static str, String),
    /// The database is damaged.
    #[error(
        "database is damaged: {0}; restore a backup or examine it with `sqlite3 FILE 'PRAGMA integrity_check'`"
    )]
    Damaged(String),
    /// A word in the database that this version does not know.
    #[error(transparent)]
    Word(#[from] UnknownWord),
    /// An event in the database that this version cannot read.
    #[error("event {seq} cannot be read")]
    Event {
        /// Its number.
        seq: i64,
        /// Why.
        source: serde_json::Error,
    },
}

impl Error {
    /// Whether the disk, or what this process may use of it, is full; then nothing of the transaction is stored.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Sqlite(error) if error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }
}

/// The database.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    /// Keeps a second nerved away. Not the database file itself: closing a second descriptor of that would drop
    /// SQLite's own locks.
    _lock: std::fs::File,
}

impl Store {
    /// Opens `nerve.db` in `directory`, making or migrating it as needed, and asserts every setting that durability
    /// hangs on.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, in use, or of a newer nerve. Nothing is changed then.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        if rusqlite::version_number() < OLDEST_SQLITE {
            return Err(Error::OldSqlite(rusqlite::version()));
        }
        let path = directory.join("nerve.db");
        let lock = lock(&directory.join("lock"))?;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(&path, flags)?;
        configure(&connection)?;
        let verdict: String =
            connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            return Err(Error::Damaged(verdict));
        }
        schema::migrate(&mut connection)?;
        checkpoint::install(&mut connection)?;
        Ok(Self {
            connection,
            _lock: lock,
        })
    }

    /// Makes one turn durable: its events and what they add up to, in one transaction.
    ///
    /// # Errors
    /// When it may or may not be stored: the caller must treat the outcome as unknown, except for
    /// [`Error::is_full`].
    pub fn commit(&mut self, turn: &Turn) -> Result<(), Error> {
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        {
            let mut append = transaction.prepare_cached(
                "INSERT INTO events (source, type, ref, payload, at) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?;
            let mut accept = transaction.prepare_cached(
                "INSERT INTO workflow_runs (run, tail, workflow, status, killing, rounds, dry_run, trigger, key, created_at)
                 VALUES (?1, ?2, ?3, 'queued', FALSE, 0, ?4, ?5, ?6, ?7)",
            )?;
            for staged in &turn.events {
                let (source, name, subject, payload) = match &staged.event {
                    Event::Run(run, event) => (
                        "workflow",
                        event.name(),
                        run.to_string(),
                        serde_json::to_string(event),
                    ),
                    Event::Worker(name, event) => (
                        "workflow",
                        event.name(),
                        name.to_string(),
                        serde_json::to_string(event),
                    ),
                    Event::Manager(event) => (
                        "system",
                        event.name(),
                        "nerve".to_owned(),
                        serde_json::to_string(event),
                    ),
                };
                let payload = payload.map_err(|source| Error::Event { seq: 0, source })?;
                append.execute(params![source, name, subject, payload, sql(staged.at)])?;
                if let Event::Run(run, RunEvent::Queued(accepted)) = &staged.event {
                    let id = run.to_string();
                    accept.execute(params![
                        id,
                        id.chars().rev().collect::<String>(),
                        accepted.workflow.as_str(),
                        accepted.dry_run,
                        accepted.trigger.to_string(),
                        accepted.key,
                        sql(staged.at),
                    ])?;
                }
            }
            let mut update = transaction.prepare_cached(
                "UPDATE workflow_runs SET status = ?2, killing = ?3, aborting = ?4, exit_code = ?5, result = ?6,
                     reason = ?7, rounds = ?8, max_rounds = ?9, definition = ?10, started_at = ?11, ended_at = ?12
                 WHERE run = ?1",
            )?;
            for run in turn.runs.values() {
                let (started, ended) = (run.started(), run.ended());
                update.execute(params![
                    run.id.to_string(),
                    run.status().as_str(),
                    run.is_killing(),
                    run.is_aborting(),
                    ended.map(|(result, _)| result.end().1),
                    ended.map(|(result, _)| result.to_string()),
                    run.reason(),
                    run.position().rounds,
                    run.max_rounds,
                    started.map(|started| &started.definition),
                    started.map(|started| sql(started.at)),
                    ended.map(|(_, at)| sql(at)),
                ])?;
            }
            for (workflow, record) in &turn.workers {
                let record = serde_json::to_string(record)
                    .map_err(|source| Error::Event { seq: 0, source })?;
                transaction.execute(
                    "INSERT INTO workers (workflow, record) VALUES (?1, ?2)
                     ON CONFLICT (workflow) DO UPDATE SET record = ?2",
                    params![workflow.as_str(), record],
                )?;
            }
            match &turn.pause {
                Some(Some(pause)) => {
                    let pause = serde_json::to_string(pause)
                        .map_err(|source| Error::Event { seq: 0, source })?;
                    transaction.execute(
                        "INSERT INTO manager (name, value) VALUES ('pause', ?1)
                         ON CONFLICT (name) DO UPDATE SET value = ?1",
                        [pause],
                    )?;
                }
                Some(None) => {
                    transaction.execute("DELETE FROM manager WHERE name = 'pause'", [])?;
                }
                None => {}
            }
        }
        Moments::of(turn).before_commit();
        transaction.commit()?;
        Ok(())
    }

    /// Keeps a definition's bytes, and that it is the one in force for its workflow.
    ///
    /// # Errors
    /// When the database does not take it.
    pub fn put_definition(&mut self, definition: &Definition, bytes: &[u8]) -> Result<(), Error> {
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        transaction.execute(
            "INSERT OR IGNORE INTO definitions (digest, bytes) VALUES (?1, ?2)",
            params![definition.digest, bytes],
        )?;
        transaction.execute(
            "INSERT INTO workflows (name, definition) VALUES (?1, ?2)
             ON CONFLICT (name) DO UPDATE SET definition = ?2 WHERE definition <> ?2",
            params![definition.workflow.name.as_str(), definition.digest],
        )?;
        transaction.commit()?;
        Ok(())
    }

    /// The digest of the definition that was last in force for a workflow.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn last_definition(&self, workflow: &WorkflowName) -> Result<Option<String>, Error> {
        use rusqlite::OptionalExtension as _;
        let mut select = self
            .connection
            .prepare_cached("SELECT definition FROM workflows WHERE name = ?1")?;
        Ok(select
            .query_row([workflow.as_str()], |row| row.get(0))
            .optional()?)
    }

    /// A definition's bytes.
    ///
    /// # Errors
    /// When the database cannot be read, or has none of this digest.
    pub fn definition(&self, digest: &str) -> Result<Vec<u8>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT bytes FROM definitions WHERE digest = ?1")?;
        Ok(select.query_row([digest], |row| row.get(0))?)
    }
}

/// SQLite's integers are signed; times and rounds never reach the sign.
fn sql(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn lock(path: &Path) -> Result<std::fs::File, Error> {
    use rustix::fs::{FlockOperation, flock};
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse(path.to_owned())),
        Err(error) => Err(failed(error.into())),
    }
}

fn configure(connection: &Connection) -> Result<(), Error> {
    let set = |name: &'static str, value: &str, expected: &str| -> Result<(), Error> {
        connection.execute_batch(&format!("PRAGMA {name} = {value}"))?;
        let word: rusqlite::types::Value =
            connection.pragma_query_value(None, name, |row| row.get(0))?;
        let word = match word {
            rusqlite::types::Value::Integer(number) => number.to_string(),
            rusqlite::types::Value::Text(text) => text,
            other => format!("{other:?}"),
        };
        if word == expected {
            Ok(())
        } else {
            Err(Error::Pragma(name, word))
        }
    };
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    set("journal_mode", "WAL", "wal")?;
    set("synchronous", "FULL", "2")?;
    set("foreign_keys", "ON", "1")?;
    set("trusted_schema", "OFF", "0")?;
    set("cell_size_check", "ON", "1")?;
    // Our own hook does it.
    set("wal_autocheckpoint", "0", "0")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(())
}

impl Store {
    /// The runs whose id ends so: none, one, or several.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn find(&self, tail: &RunTail) -> Result<Found, Error> {
        read::find(&self.connection, tail)
    }
}
