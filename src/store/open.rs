//! Opening: whose file it is and whether it is whole comes first, and what is not right is left as it is.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::config::DbConfig;
use rusqlite::types::Value;
use rusqlite::{Connection, ErrorCode, OpenFlags};
use rustix::fs::{FlockOperation, flock};

use super::{Error, schema};

/// Another program that has the database open is given so long to close it.
const PATIENCE: Duration = Duration::from_secs(5);
/// What the lock file says once there is a database beside it.
const MADE: &[u8] = b"nerve.db\n";

/// Takes the lock that keeps a second nerved away.
pub(super) fn lock(path: &Path) -> Result<File, Error> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let file = File::options()
        .read(true)
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

/// Likewise for who only looks, and makes no lock where there is none.
pub(super) fn existing_lock(path: &Path) -> Result<Option<File>, Error> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(failed)?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse(path.to_owned())),
        Err(error) => Err(failed(error.into())),
    }
}

/// The database of this directory, found to be whole and nerve's; an empty one when there was never one.
pub(super) fn database(directory: &Path, lock: &File) -> Result<Connection, Error> {
    let path = directory.join("nerve.db");
    let failed = |source| Error::File {
        path: path.clone(),
        source,
    };
    let found = match fs::symlink_metadata(&path) {
        Ok(found) if !found.is_file() => {
            return Err(Error::Foreign {
                path,
                found: "no regular file",
            });
        }
        Ok(found) if found.len() == 0 => Some("empty"),
        Ok(_) => None,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some("missing"),
        Err(error) => return Err(failed(error)),
    };
    match found {
        Some(state) if lock.metadata().map_err(failed)?.len() > 0 => {
            return Err(Error::Missing(path, state, directory.join("lock")));
        }
        Some(_) => {}
        None if examine(&path)? => {}
        // The power failed while the very first one was made, and only its beginning is missing.
        None if lock.metadata().map_err(failed)?.len() == 0 => {
            fs::remove_file(&path).map_err(failed)?;
        }
        None => {
            return Err(Error::Foreign {
                path,
                found: "no SQLite database",
            });
        }
    }
    let since = Instant::now();
    loop {
        match attempt(&path) {
            Err(Error::Sqlite(error))
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy) =>
            {
                if since.elapsed() >= PATIENCE {
                    let holder = holder(&path);
                    return Err(Error::Held { path, holder });
                }
                // There is nothing that would tell when it is closed.
                std::thread::sleep(Duration::from_millis(100));
            }
            opened => return opened,
        }
    }
}

/// Whether there is a beginning; it has to be SQLite's, and of an application that can be nerve. Nothing has the file open
/// yet, so that closing it drops no lock.
fn examine(path: &Path) -> Result<bool, Error> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let foreign = |found| {
        Err(Error::Foreign {
            path: path.to_owned(),
            found,
        })
    };
    let mut header = [0; 100];
    let read = File::open(path).and_then(|file| file.read_exact_at(&mut header, 0));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            return foreign("a file of less than 100 bytes");
        }
        read => read.map_err(failed)?,
    }
    if header == [0; 100] {
        return Ok(false);
    }
    // https://www.sqlite.org/fileformat2.html, "The Database Header"
    if !header.starts_with(b"SQLite format 3\0") {
        return foreign("no SQLite database");
    }
    let application = header[68..72]
        .iter()
        .fold(0, |number, byte| number << 8 | i32::from(*byte));
    if application == 0 || application == schema::APPLICATION_ID {
        Ok(true)
    } else {
        foreign("a database of another application")
    }
}

/// Who holds a lock on the file, as far as the kernel says.
fn holder(path: &Path) -> Option<u32> {
    use rustix::process::{Flock, FlockType, fcntl_getlk};
    let file = File::options().read(true).write(true).open(path).ok()?;
    let other = fcntl_getlk(&file, &Flock::from(FlockType::WriteLock)).ok()??;
    Some(other.pid?.as_raw_nonzero().get().unsigned_abs())
}

fn attempt(path: &Path) -> Result<Connection, Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_CREATE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    // Until it is known to be whole, closing it changes nothing either.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    // A statement is planned once, and not again for each limit that is bound to it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    set(&connection, "locking_mode", "EXCLUSIVE", "exclusive")?;
    set(&connection, "trusted_schema", "OFF", "0")?;
    set(&connection, "cell_size_check", "ON", "1")?;
    let tables: u32 = connection.query_row(
        "SELECT count(*) FROM sqlite_schema WHERE type = 'table'",
        [],
        |row| row.get(0),
    )?;
    let ours: u32 = connection.query_row(
        "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name IN ('events', 'workflow_runs')",
        [],
        |row| row.get(0),
    )?;
    let mark: i32 = connection.pragma_query_value(None, "application_id", |row| row.get(0))?;
    if tables > 0 && ours < 2 && mark != schema::APPLICATION_ID {
        return Err(Error::Foreign {
            path: path.to_owned(),
            found: "a database of another application",
        });
    }
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if verdict != "ok" {
        return Err(Error::Damaged(verdict));
    }
    let version = schema::refuse_newer(&connection)?;
    if let Some(name) = schema::missing(&connection, version)? {
        return Err(Error::Damaged(format!("it has no {name}")));
    }
    set(&connection, "journal_mode", "WAL", "wal")?;
    set(&connection, "synchronous", "FULL", "2")?;
    set(&connection, "foreign_keys", "ON", "1")?;
    // Our own hook does it.
    set(&connection, "wal_autocheckpoint", "0", "0")?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn set(
    connection: &Connection,
    name: &'static str,
    value: &str,
    expected: &str,
) -> Result<(), Error> {
    connection.execute_batch(&format!("PRAGMA {name} = {value}"))?;
    let word: Value = connection.pragma_query_value(None, name, |row| row.get(0))?;
    let word = match word {
        Value::Integer(number) => number.to_string(),
        Value::Text(text) => text,
        other => format!("{other:?}"),
    };
    if word == expected {
        Ok(())
    } else {
        Err(Error::Pragma(name, word))
    }
}

/// From now on a database that is missing is missed.
pub(super) fn keep_in_mind(directory: &Path, mut lock: &File) -> Result<(), Error> {
    let failed = |source| Error::File {
        path: directory.join("lock"),
        source,
    };
    if lock.metadata().map_err(failed)?.len() > 0 {
        return Ok(());
    }
    super::blob::sync_directory(directory).map_err(failed)?;
    lock.seek(SeekFrom::Start(0)).map_err(failed)?;
    lock.write_all(MADE).map_err(failed)?;
    lock.sync_all().map_err(failed)
}
