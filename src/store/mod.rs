//! What nerve remembers: one SQLite database, one writer, WAL, `synchronous=FULL`.
//!
//! Events and the runs they change are written in one transaction. Only the manager's driver writes; everybody reads
//! what is committed, through the same thread ([`Handle`]), so that nobody is ever told something that the database
//! does not say.

mod read;
mod schema;
#[cfg(test)]
mod tests;
mod thread;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, params};

use crate::engine::Staged;
use crate::model::name::{RunId, RunTail, WorkflowName};
use crate::model::run::Run;
use crate::model::status::UnknownWord;
use crate::model::workflow::Definition;

pub use read::{EventRow, Found, Round, RunFilter, RunRow, ThreadRange};
pub use thread::Handle;

/// Below this SQLite a database in WAL mode can be damaged by its own log reset.
const OLDEST_SQLITE: i32 = 3_051_003;
/// The log is checkpointed when it has grown to so many pages, and keeps that size.
const WAL_PAGES: u32 = 1_000;

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
        Ok(Self {
            connection,
            _lock: lock,
        })
    }

    /// Makes one turn durable: its events and the runs as they are afterwards, in one transaction.
    ///
    /// # Errors
    /// When it may or may not be stored: the caller must treat the outcome as unknown, except for
    /// [`Error::is_full`].
    pub fn commit(&mut self, events: &[Staged], runs: &BTreeMap<RunId, Run>) -> Result<(), Error> {
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        {
            let mut insert = transaction
                .prepare_cached("INSERT INTO events (source, type, ref, payload, at) VALUES ('workflow', ?1, ?2, ?3, ?4)")?;
            for staged in events {
                let payload = serde_json::to_string(&staged.event)
                    .map_err(|source| Error::Event { seq: 0, source })?;
                insert.execute(params![
                    staged.event.name(),
                    staged.run.to_string(),
                    payload,
                    sql(staged.at)
                ])?;
            }
            let mut upsert = transaction.prepare_cached(
                "INSERT INTO workflow_runs (run, tail, workflow, status, killing, exit_code, result, reason, rounds,
                     max_rounds, dry_run, trigger, definition, created_at, started_at, ended_at)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
                 ON CONFLICT (run) DO UPDATE SET status = ?4, killing = ?5, exit_code = ?6, result = ?7, reason = ?8,
                     rounds = ?9, max_rounds = ?10, definition = ?13, started_at = ?15, ended_at = ?16",
            )?;
            for run in runs.values() {
                let id = run.id.to_string();
                let tail: String = id.chars().rev().collect();
                let (started, ended) = (run.started(), run.ended());
                upsert.execute(params![
                    id,
                    tail,
                    run.workflow.as_str(),
                    run.status().as_str(),
                    run.is_killing(),
                    ended.map(|(result, _)| result.end().1),
                    ended.map(|(result, _)| result.to_string()),
                    run.kill.as_ref().and_then(|kill| kill.reason.as_deref()),
                    run.position.rounds,
                    run.max_rounds,
                    run.dry_run,
                    run.trigger.to_string(),
                    started.map(|started| &started.definition),
                    sql(run.created_at),
                    started.map(|started| sql(started.at)),
                    ended.map(|(_, at)| sql(at)),
                ])?;
            }
        }
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
    set(
        "wal_autocheckpoint",
        &WAL_PAGES.to_string(),
        &WAL_PAGES.to_string(),
    )?;
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
