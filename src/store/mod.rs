//! What nerve remembers: one SQLite database, one writer, WAL, `synchronous=FULL`.
//!
//! Events and the runs they change are written in one transaction. Only the manager writes, turns by its driver and definitions by
//! who reads them; everybody reads what is committed, through the same thread ([`Handle`]), so that nobody is ever told something that the database
//! does not say.

pub mod archive;
pub mod backup;
pub mod blob;
pub mod check;
mod checkpoint;
pub mod cold;
pub mod collect;
mod commit;
mod events;
mod history;
pub mod import;
mod list;
pub mod log;
mod moments;
mod open;
mod read;
pub mod retention;
mod rounds;
mod schema;
mod space;
#[cfg(test)]
mod tests;
mod thread;
pub mod upkeep;
pub mod vacuum;
mod write;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, Row, params};

use crate::model::name::{RunTail, WorkflowName};
use crate::model::status::UnknownWord;
use crate::model::workflow::Definition;
use crate::os::clock;

pub use blob::{Blobs, Digest};
pub use events::{Begin, EventFilter, Slice};
pub use list::RunFilter;
use log::{Entry, Head, SYSTEM};
pub use moments::Moments;
pub use read::{EventRow, Found, RunRow};
pub use rounds::{Round, ThreadRange};
pub use space::{Log, RESERVE};
pub use thread::Handle;

/// Below this SQLite a database in WAL mode can be damaged by its own log reset.
const OLDEST_SQLITE: i32 = 3_051_003;

/// What is to be done when nerve does not start with its database.
const REMEDY: &str = "`/usr/libexec/nerve/nerved --check` says what is wrong, and nerve-store(7) how to restore a backup";

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
    /// Another nerved has the database.
    #[error("{} is in use by another nerved", .0.display())]
    InUse(PathBuf),
    /// Another program has it open.
    #[error("{} is open in another program{}; close it there", path.display(), named(*holder))]
    Held {
        /// The database.
        path: PathBuf,
        /// The process, where the kernel tells.
        holder: Option<u32>,
    },
    /// It was there and is not any more.
    #[error(
        "{0} is {1}, though nerve has kept runs there: {remedy}; or remove {2} to begin with an empty history", remedy = REMEDY
    )]
    Missing(PathBuf, &'static str, PathBuf),
    /// It is no database of nerve's.
    #[error("{} is {found}, not a database of nerve's; nothing of it was touched: {}", path.display(), REMEDY)]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// A blob's file holds something else.
    #[error("blob {expected} is damaged: {} has the digest {found}", path.display())]
    BlobDamaged {
        /// Its file.
        path: PathBuf,
        /// The digest that it should have.
        expected: Digest,
        /// The digest that it has.
        found: Digest,
    },
    /// What is to be a blob is longer than one may be.
    #[error("it is longer than {most} bytes, the most that a blob may have")]
    TooLong {
        /// Bytes.
        most: u64,
    },
    /// A file of the archive is not what it was, or not there.
    #[error("the archive's file {} cannot be read: {why}", path.display())]
    Cold {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// An event's text is nowhere.
    #[error("blob {0} is missing")]
    BlobMissing(Digest),
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
    /// There is another copy, or it takes too long for what is written meanwhile.
    #[error("{0}; nothing is wrong with the database: try again later")]
    NotCopied(&'static str),
    /// A setting that durability hangs on did not take.
    #[error("PRAGMA {0} is {1:?}")]
    Pragma(&'static str, String),
    /// The database is damaged.
    #[error("the database is damaged: {0}; nothing of it was touched: {remedy}", remedy = REMEDY)]
    Damaged(String),
    /// What is left of the disk is for the runs.
    #[error(
        "no space left on device (ENOSPC): {} MiB are available in {}, and {} are wanted", available >> 20, path.display(), wanted >> 20
    )]
    NoRoom {
        /// Bytes.
        available: u64,
        /// Bytes.
        wanted: u64,
        /// Where.
        path: PathBuf,
    },
    /// Nothing is written any more.
    #[error("an earlier write failed, and whether it is there is not known before the next start")]
    Unknown,
    /// What was to be imported is not what it should be.
    #[error("{0}; nothing of this part was imported")]
    Import(String),
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
    /// What damage comes to for who cannot start with it: whatever found it, a person needs to know what to do.
    #[must_use]
    pub fn at_start(self) -> Self {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match self {
            Self::Sqlite(error)
                if matches!(
                    error.sqlite_error_code(),
                    Some(DatabaseCorrupt | NotADatabase)
                ) =>
            {
                Self::Damaged(error.to_string())
            }
            Self::Event { seq, source } => {
                Self::Damaged(format!("event {seq} cannot be read: {source}"))
            }
            Self::Word(word) => Self::Damaged(word.to_string()),
            other => other,
        }
    }

    /// Whether something that was stored is not there any more as it was; asked again the store says the same.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        match self {
            Self::BlobDamaged { .. } | Self::BlobMissing(_) | Self::Cold { .. } => true,
            Self::Event { .. } => true,
            Self::File { source, .. } => {
                source.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
            }
            _ => false,
        }
    }

    /// Whether the disk, or what this process may use of it, is full; then nothing of the transaction is stored.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Sqlite(error) => error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull),
            Self::File { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ),
            Self::NoRoom { .. } => true,
            _ => false,
        }
    }
}

/// The type of the event that says which definition is in force for a workflow.
const DEFINED: &str = "defined";

/// Its payload.
fn defined(digest: &str) -> String {
    serde_json::json!({ "definition": digest }).to_string()
}

/// The database, which is this process's alone as long as it is open: no other program can read it meanwhile, so none
/// can hold up the log, and none of an older SQLite can damage it.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    /// The database's file, for backups. It is closed after the connection: closing it drops SQLite's own locks.
    image: Arc<File>,
    hold: checkpoint::Hold,
    head: Head,
    blobs: Blobs,
    directory: PathBuf,
    /// What the log may grow to without room on the disk.
    reserved: u64,
    /// What became of the last write is not known.
    is_unknown: bool,
    /// Keeps a second nerved away. Not the database file itself: closing a second descriptor of that would drop
    /// SQLite's own locks.
    _lock: File,
}

impl Store {
    /// Opens `nerve.db` in `directory`, making or migrating it as needed, and asserts every setting that durability
    /// hangs on.
    ///
    /// # Errors
    /// When it cannot be opened, is damaged, missing, in use, foreign, or of a newer nerve. Nothing is changed then.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        Self::opened(directory).map_err(Error::at_start)
    }

    fn opened(directory: &Path) -> Result<Self, Error> {
        if rusqlite::version_number() < OLDEST_SQLITE {
            return Err(Error::OldSqlite(rusqlite::version()));
        }
        let lock = open::lock(&directory.join("lock"))?;
        let mut connection = open::database(directory, &lock)?;
        vacuum::install(&connection)?;
        schema::migrate(&mut connection).map_err(|error| match error {
            Error::Sqlite(rusqlite::Error::SqliteFailure(error, Some(_)))
                if error.code == rusqlite::ErrorCode::Unknown =>
            {
                Error::Damaged("its tables are not those of its version".to_owned())
            }
            error => error,
        })?;
        let hold = checkpoint::install(&mut connection)?;
        open::keep_in_mind(directory, &lock)?;
        let blobs = Blobs::new(directory.join("blobs"));
        blobs.remove_unfinished()?;
        check::remove_unfinished(directory)?;
        let head = Head::of(&connection)?;
        let path = directory.join("nerve.db");
        let image = File::open(&path).map_err(|source| Error::File { path, source })?;
        Ok(Self {
            connection,
            image: Arc::new(image),
            hold,
            head,
            blobs,
            directory: directory.to_owned(),
            reserved: 0,
            is_unknown: false,
            _lock: lock,
        })
    }

    /// The folder of blobs.
    #[must_use]
    pub fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    /// Where all of it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Keeps a definition's bytes, and that it is the one in force for its workflow.
    ///
    /// # Errors
    /// When the database does not take it.
    pub fn put_definition(&mut self, definition: &Definition, bytes: &[u8]) -> Result<(), Error> {
        self.write(|transaction, head| {
            transaction.execute(
                "INSERT OR IGNORE INTO definitions (digest, bytes) VALUES (?1, ?2)",
                params![definition.digest, bytes],
            )?;
            let name = definition.workflow.name.as_str();
            let changed = transaction.execute(
                "INSERT INTO workflows (name, definition) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET definition = ?2 WHERE definition <> ?2",
                params![name, definition.digest],
            )?;
            if changed > 0 {
                let entry = Entry {
                    source: SYSTEM,
                    event_type: DEFINED,
                    reference: name,
                    payload: &defined(&definition.digest),
                    blob: None,
                    at: clock::wall_us(),
                };
                head.append(transaction, &entry)?;
            }
            Ok(())
        })
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

fn unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<u64> {
    Ok(row.get::<_, i64>(column)?.unsigned_abs())
}

fn maybe_unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<u64>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(i64::unsigned_abs))
}

fn named(holder: Option<u32>) -> String {
    holder.map_or_else(String::new, |pid| format!(" (pid {pid})"))
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
