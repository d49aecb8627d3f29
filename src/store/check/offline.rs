//! The check of a store that no nerved has open, most of all of one that nerved does not open since it is damaged.

use std::fs;
use std::path::{Path, PathBuf};

use super::{Copy, Report, check};
use crate::store::{Error, open};

/// Checks what is in this directory and changes nothing there: the database, with its log, is copied to `scratch` first.
///
/// # Errors
/// When a nerved has it open, when there is no database, or when the check cannot be made.
pub fn offline(directory: &Path, scratch: &Path) -> Result<Report, Error> {
    let failed = |path: &Path, source| Error::File {
        path: path.to_owned(),
        source,
    };
    // Not before it is known that there is something to lock.
    let database = directory.join("nerve.db");
    fs::metadata(&database).map_err(|source| failed(&database, source))?;
    let _lock = open::existing_lock(&directory.join("lock"))?;
    let name = format!("nerve-check.{}", std::process::id());
    let copy = Copy::new(scratch.join(name))?;
    fs::copy(&database, copy.database()).map_err(|source| failed(&database, source))?;
    let log = directory.join("nerve.db-wal");
    let target = PathBuf::from(format!("{}-wal", copy.database().display()));
    match fs::copy(&log, target) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(failed(&log, error)),
        _ => check(&copy, directory),
    }
}
