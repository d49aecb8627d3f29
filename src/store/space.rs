//! What is put aside for a full disk. SQLite's log, `nerve.db-wal`, is made longer than it has to be, with blocks of its
//! own, and SQLite writes into what is there. So what has to be stored can be, even when the disk has not a byte left:
//! what no checkpoint can move into the database stays in the log until there is room again.

use std::fs::File;

use rusqlite::ErrorCode;

use super::checkpoint::WAL_PAGES;
use super::{Error, Store, blob};
use crate::model::limits;
use crate::os::disk;

/// So much is put aside, but no more than a quarter of what is free.
pub const RESERVE: u64 = 32 << 20;
/// A page of the log, with its header.
const FRAME: u64 = 4_096 + 24;

/// How full the log is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Log {
    /// Bytes that the database does not have yet.
    pub used: u64,
    /// Bytes that it may grow to without room on the disk.
    pub reserved: u64,
}

impl Log {
    /// It has what should long be in the database.
    #[must_use]
    pub fn is_stuck(&self) -> bool {
        self.used > (u64::from(WAL_PAGES.unsigned_abs()) + 64) * FRAME
    }

    /// So much of it is used that the rest is for ends.
    #[must_use]
    pub fn is_half_used(&self) -> bool {
        self.is_stuck() && self.used > self.reserved / 2
    }
}

impl Store {
    /// Puts space aside, at most `wanted` bytes. A filesystem that has none to give is no error: then there is less.
    ///
    /// # Errors
    /// When the log cannot be reached or not be made durable.
    pub fn reserve(&mut self, wanted: u64) -> Result<Log, Error> {
        let path = self.directory.join("nerve.db-wal");
        let failed = |source| Error::File {
            path: path.clone(),
            source,
        };
        // SQLite's locks are on the database, and closing this drops none of them.
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let free = disk::available(&self.directory).map_err(failed)?;
        let bytes = wanted.min(length + free / 4).max(length);
        self.reserved = match disk::allocate(&file, bytes) {
            Ok(()) => bytes,
            Err(error) => {
                tracing::warn!(%error, "failed to put space aside for a full disk");
                length
            }
        };
        file.sync_all().map_err(failed)?;
        blob::sync_directory(&self.directory).map_err(failed)?;
        self.log()
    }

    /// Refuses what can wait, and what the runs would then lack: with `more` bytes gone the disk has to have room.
    ///
    /// # Errors
    /// [`Error::NoRoom`]
    pub(super) fn must_have_room(&self, more: u64) -> Result<(), Error> {
        // What cannot be told is no reason to refuse anything.
        let available = disk::available(&self.directory).unwrap_or(u64::MAX);
        let wanted = limits::ROOM_BYTES.saturating_add(more);
        if available >= wanted {
            return Ok(());
        }
        Err(Error::NoRoom {
            available,
            wanted,
            path: self.directory.clone(),
        })
    }

    /// How full the log is.
    ///
    /// # Errors
    /// When the database does not say.
    pub fn log(&self) -> Result<Log, Error> {
        let mut ask = self
            .connection
            .prepare_cached("PRAGMA wal_checkpoint(NOOP)")?;
        let (pages, moved): (i64, i64) = ask.query_row([], |row| Ok((row.get(1)?, row.get(2)?)))?;
        // That a copy is being made is no sign of a full disk.
        let used = if moved < pages && !self.hold.holds() {
            pages.unsigned_abs() * FRAME
        } else {
            0
        };
        Ok(Log {
            used,
            reserved: self.reserved,
        })
    }

    /// Tries again to move the log into the database; a disk that is full is no error.
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn move_log(&mut self) -> Result<Log, Error> {
        if self.hold.holds() {
            return self.log();
        }
        let moved = self
            .connection
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        match moved {
            Err(error) if error.sqlite_error_code() != Some(ErrorCode::DiskFull) => {
                Err(error.into())
            }
            _ => self.log(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(store: &Store, count: usize) {
        let page = "x".repeat(4_096);
        for _ in 0..count {
            let insert = "INSERT INTO pages VALUES (?1)";
            store.connection.execute(insert, [&page]).unwrap();
        }
    }

    #[test]
    fn the_log_is_written_into_what_was_put_aside_and_survives_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nerve.db-wal");
        let mut store = Store::open(directory.path()).unwrap();
        let log = store.reserve(RESERVE).unwrap();
        assert_eq!(log.reserved, path.metadata().unwrap().len());
        assert!(log.reserved > RESERVE / 4 && !log.is_stuck(), "{log:?}");
        store
            .connection
            .execute_batch("CREATE TABLE pages (page TEXT)")
            .unwrap();
        insert(&store, 3_000);
        // It was moved several times, and never shortened or made longer.
        let log = store.log().unwrap();
        assert!(!log.is_stuck() && log.used > 0, "{log:?}");
        assert_eq!(path.metadata().unwrap().len(), log.reserved);
        // As a nerved leaves it that was killed: what is behind the last commit is no commit.
        let copy = tempfile::tempdir().unwrap();
        for name in ["nerve.db", "nerve.db-wal", "lock"] {
            std::fs::copy(directory.path().join(name), copy.path().join(name)).unwrap();
        }
        let copied = Store::open(copy.path()).unwrap();
        let count = "SELECT count(*) FROM pages";
        let rows: u32 = copied
            .connection
            .query_row(count, [], |row| row.get(0))
            .unwrap();
        assert_eq!(rows, 3_000);
        assert_eq!(store.move_log().unwrap().used, 0);
    }

    #[test]
    fn a_log_that_nothing_moves_is_stuck_and_then_half_used() {
        let log = |used: u64| Log {
            used: used << 20,
            reserved: RESERVE,
        };
        let state = |used| (log(used).is_stuck(), log(used).is_half_used());
        assert_eq!(state(4), (false, false));
        assert_eq!(state(6), (true, false));
        assert_eq!(state(17), (true, true));
    }
}
