//! Checkpoints: what the log holds is moved into the database. As SQLite's own `wal_autocheckpoint` does it, which this
//! replaces, so that a test can have nerved die on either side of it.

use rusqlite::hooks::Wal;
use rusqlite::{Connection, Result};

use crate::os::failpoint;

/// The log is moved when it has grown to so many pages, and keeps that size.
const WAL_PAGES: i32 = 1_000;

/// Has every commit of this connection look whether it is time.
pub(super) fn install(connection: &mut Connection) -> Result<()> {
    connection.wal_hook(Some(after_commit))
}

/// What cannot be moved, because somebody reads it or because the disk does not take it, is moved next time: the commit
/// holds in any case.
#[expect(clippy::unnecessary_wraps, reason = "SQLite wants to be told")]
fn after_commit(wal: &mut Wal, pages: i32) -> Result<()> {
    if pages >= WAL_PAGES {
        failpoint!("F29");
        let _ = wal.checkpoint();
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
