//! Room on a filesystem, and files that are there whole or not at all.

use std::fs::{self, File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
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

/// Replaces a file, or makes it, such that there is never a part of it: also not after a power cut. Who owns it and its
/// mode are ours and 0644, whatever they were.
///
/// # Errors
/// When the directory, or what it is on, does not take it.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (directory, name) = match (path.parent(), path.file_name()) {
        (Some(directory), Some(name)) => (directory, name.to_string_lossy()),
        _ => return Err(io::ErrorKind::InvalidInput.into()),
    };
    // Hidden, and no `.yaml`: nobody takes it for what it is to become.
    let draft = directory.join(format!(".{name}.new"));
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::create_new(&draft)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    sync(directory)
}

/// Removes a file for good, also should the power fail now.
///
/// # Errors
/// As unlink(2) and fsync(2); a file that is not there is removed.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    path.parent().map_or(Ok(()), sync)
}

fn sync(directory: &Path) -> io::Result<()> {
    let directory = if directory.as_os_str().is_empty() {
        Path::new(".")
    } else {
        directory
    };
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, symlink};

    #[test]
    fn a_file_is_replaced_and_nothing_is_written_through_links() {
        let directory = tempfile::tempdir().unwrap();
        let [path, other, draft] =
            ["a.yaml", "other", ".a.yaml.new"].map(|name| directory.path().join(name));
        fs::write(&other, "other").unwrap();
        symlink(&other, &path).unwrap();
        symlink(&other, &draft).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read(&other).unwrap(), b"other");
        let metadata = fs::symlink_metadata(&path).unwrap();
        assert!(metadata.is_file() && metadata.mode() & 0o7777 == 0o644);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
