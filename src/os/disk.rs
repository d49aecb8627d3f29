//! Room on a filesystem.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate, statvfs};

/// What everybody may use of the filesystem that has this path, in bytes.
///
/// # Errors
/// When it cannot be asked.
pub fn available(path: &Path) -> io::Result<u64> {
    let found = statvfs(path)?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Gives the first `bytes` of a file blocks of their own, so that writing there needs no room any more; what the file
/// holds stays.
///
/// # Errors
/// When the filesystem has no room, or cannot do that.
pub fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    Ok(fallocate(file, FallocateFlags::empty(), 0, bytes)?)
}
