//! The one way to write. A write that the disk did not take may be there all the same: nobody knows before the database is
//! opened anew, so nothing is written after it, and nerved ends.

use rusqlite::{ErrorCode, Transaction, TransactionBehavior};

use super::log::Head;
use super::{Error, Store};

impl Store {
    /// Makes what `job` writes durable, all of it or nothing; with it the head of the log moves.
    ///
    /// # Errors
    /// What the job says. [`Error::Unknown`] after a write of which nobody knows whether it is there.
    pub(super) fn write<T>(
        &mut self,
        job: impl FnOnce(&Transaction<'_>, &mut Head) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if self.is_unknown {
            return Err(Error::Unknown);
        }
        let mut head = self.head;
        let begun = self
            .connection
            .transaction_with_behavior(TransactionBehavior::Immediate);
        let written = begun.map_err(Error::from).and_then(|transaction| {
            let done = job(&transaction, &mut head)?;
            transaction.commit()?;
            Ok(done)
        });
        match &written {
            Ok(_) => self.head = head,
            Err(error) => self.is_unknown = error.is_of_disk(),
        }
        written
    }
}

impl Error {
    /// The disk, and not what was asked for, is why SQLite failed; a full disk is no such case, since then nothing is there.
    fn is_of_disk(&self) -> bool {
        let Self::Sqlite(error) = self else {
            return false;
        };
        let code = error.sqlite_error_code();
        !matches!(
            code,
            None | Some(
                ErrorCode::DiskFull | ErrorCode::ConstraintViolation | ErrorCode::DatabaseBusy
            )
        )
    }
}
