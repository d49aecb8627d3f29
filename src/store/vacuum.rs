//! Space that the database does not need any more goes back to the filesystem, a few pages at a time: a VACUUM would
//! hold up every run until it had written all of the database anew.

use rusqlite::{Connection, ErrorCode};

use super::{Error, Handle, Store};

/// One job of the store moves so many pages.
const PAGES: u64 = 128;
/// https://www.sqlite.org/pragma.html#pragma_auto_vacuum
const INCREMENTAL: u32 = 2;

/// Has the database keep what it takes to move pages. One that does not yet, since it is new or of an earlier nerve, is
/// written anew for it, once; one that the disk has no room for is left as it is.
pub(super) fn install(connection: &Connection) -> rusqlite::Result<()> {
    let mode: u32 = connection.query_row("PRAGMA auto_vacuum", [], |row| row.get(0))?;
    if mode == INCREMENTAL {
        return Ok(());
    }
    match connection.execute_batch("PRAGMA auto_vacuum = INCREMENTAL; VACUUM") {
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::DiskFull) => Ok(()),
        done => done,
    }
}

/// Gives back what is free; says how many bytes that were.
///
/// # Errors
/// When the database does not take it.
pub fn vacuum(store: &Handle) -> Result<u64, Error> {
    let (free, page) = store
        .call_and_wait(|store| Ok((store.number("freelist_count")?, store.number("page_size")?)))?;
    let mut left = free;
    while left > 0 {
        let after = store.call_and_wait(Store::give_back)?;
        if after >= left {
            break;
        }
        left = after;
    }
    // The file gets shorter when the log is moved into it.
    store.call_and_wait(|store| store.number("wal_checkpoint(PASSIVE)"))?;
    Ok((free - left) * page)
}

impl Store {
    pub(super) fn number(&self, pragma: &str) -> Result<u64, Error> {
        let sql = format!("PRAGMA {pragma}");
        let number: i64 = self.connection.query_row(&sql, [], |row| row.get(0))?;
        Ok(number.unsigned_abs())
    }

    /// Gives a few pages back; returns how many are left.
    fn give_back(&mut self) -> Result<u64, Error> {
        let mut vacuum = self
            .connection
            .prepare(&format!("PRAGMA incremental_vacuum({PAGES})"))?;
        let mut steps = vacuum.query([])?;
        // Each step is a page.
        while steps.next()?.is_some() {}
        drop(steps);
        drop(vacuum);
        self.number("freelist_count")
    }
}
