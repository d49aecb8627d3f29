//! Descriptors that others have passed: nothing is known of one before it was looked at.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};

/// What is to be done with a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// It is read.
    Read,
    /// It is written from its beginning, and empty until then.
    Fill,
}

/// The regular file that a descriptor is open for, if it is open for that.
///
/// # Errors
/// What it is instead, in a few words that follow "the descriptor".
pub fn regular_file(descriptor: OwnedFd, usage: Use) -> io::Result<File> {
    let stat = fstat(&descriptor)?;
    let flags = fcntl_getfl(&descriptor)?;
    let mode = flags & OFlags::RWMODE;
    let is_open = match usage {
        Use::Read => mode == OFlags::RDONLY || mode == OFlags::RDWR,
        Use::Fill => mode == OFlags::WRONLY || mode == OFlags::RDWR,
    };
    let wrong = |what| Err(io::Error::other(what));
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        wrong("is not open for a regular file")
    } else if flags.contains(OFlags::PATH) || !is_open {
        wrong("is not open for that")
    } else if usage == Use::Fill && stat.st_size != 0 {
        wrong("is open for a file that is not empty")
    } else {
        Ok(File::from(descriptor))
    }
}

/// Opens a file for reading, if it is one: on a pipe that somebody has put there nobody waits.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub fn open_file(path: &Path) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("is no regular file"))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use rustix::fs::{Mode, open};

    use super::*;

    #[test]
    // S-07.
    fn only_a_regular_file_that_is_open_for_it_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        File::create(&path).unwrap();
        let taken = |path: &std::path::Path, flags, usage| {
            let descriptor = open(path, flags, Mode::empty()).unwrap();
            regular_file(descriptor, usage).map_err(|error| error.to_string())
        };
        assert!(taken(&path, OFlags::RDONLY, Use::Read).is_ok());
        assert!(taken(&path, OFlags::RDWR, Use::Read).is_ok());
        for flags in [OFlags::PATH, OFlags::WRONLY] {
            assert_eq!(
                taken(&path, flags, Use::Read).unwrap_err(),
                "is not open for that"
            );
        }
        for flags in [OFlags::PATH, OFlags::RDONLY] {
            assert_eq!(
                taken(&path, flags, Use::Fill).unwrap_err(),
                "is not open for that"
            );
        }
        for other in [directory.path(), std::path::Path::new("/dev/null")] {
            let refused = taken(other, OFlags::RDONLY, Use::Read);
            assert_eq!(refused.unwrap_err(), "is not open for a regular file");
        }
        let mut file = taken(&path, OFlags::WRONLY, Use::Fill).unwrap();
        file.write_all(b"x").unwrap();
        let refused = taken(&path, OFlags::WRONLY, Use::Fill);
        assert_eq!(refused.unwrap_err(), "is open for a file that is not empty");
    }
}
