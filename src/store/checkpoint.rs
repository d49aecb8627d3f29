//! Checkpoints: what the log holds is moved into the database. As SQLite's own `wal_autocheckpoint` does it, which this
//! replaces, so that a test can have nerved die on either side of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::hooks::Wal;
use rusqlite::{Connection, ErrorCode, Result};

use crate::os::failpoint;

/// The log is moved when it has grown to so many pages, and keeps that size.
pub(super) const WAL_PAGES: i32 = 1_000;

/// Or to so many, while the database's file is being copied; then the copy has failed. It is less than what is put aside
/// for a full disk.
const HELD_PAGES: i32 = 7_000;

/// Keeps the log from being moved, so that the database's file does not change while it is copied.
#[derive(Debug, Clone, Default)]
pub(super) struct Hold(Arc<AtomicBool>);

impl Hold {
    /// Begins; or says that somebody else has begun.
    pub(super) fn take(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }

    /// Ends; whether it lasted until now.
    pub(super) fn release(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }

    /// Whether it lasts.
    pub(super) fn holds(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Has every commit of this connection look whether it is time.
pub(super) fn install(connection: &mut Connection) -> Result<Hold> {
    let hold = Hold::default();
    let of_hook = hold.clone();
    connection.wal_hook(Some(move |wal: &mut Wal, pages: i32| {
        after_commit(wal, pages, &of_hook)
    }))?;
    Ok(hold)
}

/// What cannot be moved because the disk is full is moved next time: the commit holds in any case. On a disk that is broken
/// nothing is tried a second time.
fn after_commit(wal: &mut Wal, pages: i32, hold: &Hold) -> Result<()> {
    let most = if hold.holds() { HELD_PAGES } else { WAL_PAGES };
    if pages >= most {
        hold.release();
        failpoint!("F29");
        match wal.checkpoint() {
            Err(error) if error.sqlite_error_code() != Some(ErrorCode::DiskFull) => {
                return Err(error);
            }
            _ => {}
        }
        failpoint!("F30");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Store;

    #[test]
    fn the_log_does_not_grow_for_ever() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let page = "x".repeat(4_096);
        let log = directory.path().join("nerve.db-wal");
        let mut longest = 0;
        store
            .connection
            .execute_batch("CREATE TABLE pages (page TEXT)")
            .unwrap();
        for _ in 0..5_000 {
            let insert = "INSERT INTO pages VALUES (?1)";
            store.connection.execute(insert, [&page]).unwrap();
            longest = log.metadata().unwrap().len().max(longest);
        }
        // It was moved, and not before it was worth it.
        let expected = super::WAL_PAGES.unsigned_abs().into();
        assert!(
            (expected..expected + 64).contains(&(longest / 4_096)),
            "{longest}"
        );
    }
}
