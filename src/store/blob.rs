//! Bytes under their sha256: `blobs/ab/cdef…`, each content once.
//!
//! Written to a temporary file, synced, renamed, and the directory synced, so that a blob is whole or absent; verified
//! whenever it is read, so that damaged content is never served.

use std::fs::{self, File};
use std::io::{self, Read, Seek as _, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::Error;
use crate::model::hex::hex;
use crate::os::descriptor::open_file;

/// A sha256 as 64 lower-case hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(String);

impl Digest {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(hex(&Sha256::digest(bytes)))
    }

    /// A digest in any case and with blanks around it; anything but 64 hex digits is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        (text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
            .then(|| Self(text.to_ascii_lowercase()))
    }

    /// Its 64 digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What came of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// It is new.
    Written,
    /// It was there.
    Known,
    /// A damaged file was in its place; now it is there.
    Repaired,
}

impl Put {
    /// As the bus says it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Known => "known",
            Self::Repaired => "repaired",
        }
    }
}

/// The folder of blobs.
#[derive(Debug, Clone)]
pub struct Blobs {
    root: PathBuf,
}

/// What a file is called until it is whole.
const UNFINISHED: &str = "new";
/// Tells apart what is being written at the same time.
static NEXT: AtomicU64 = AtomicU64::new(0);

impl Blobs {
    /// Those below this directory, which need not be there yet.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where a blob is, if it is.
    #[must_use]
    pub fn path(&self, digest: &Digest) -> PathBuf {
        let (first, rest) = digest.0.split_at(2);
        self.root.join(first).join(rest)
    }

    /// Keeps these bytes; returns when they are durable.
    ///
    /// # Errors
    /// When a file or a directory cannot be written; then nothing is there that was not there before.
    pub fn put(&self, bytes: &[u8]) -> Result<(Digest, Put), Error> {
        let digest = Digest::of(bytes);
        let put = self.found(&digest)?;
        if put == Put::Known {
            return Ok((digest, put));
        }
        let mut draft = Draft::new(&self.root)?;
        let written = draft.file.write_all(bytes);
        written.map_err(|source| draft.failed(source))?;
        self.keep(draft, &digest)?;
        Ok((digest, put))
    }

    /// Keeps what a file holds, however long it is; returns when it is durable.
    ///
    /// # Errors
    /// [`Error::TooLong`] when there are more than `most` bytes; and as [`Blobs::put`].
    pub fn put_from(&self, source: &mut impl Read, most: u64) -> Result<(Digest, Put), Error> {
        let mut draft = Draft::new(&self.root)?;
        let mut source = source.take(most.saturating_add(1));
        let hashed = copy_hashed(&mut source, &mut draft.file);
        let (digest, length) = hashed.map_err(|source| draft.failed(source))?;
        if length > most {
            return Err(Error::TooLong { most });
        }
        let put = self.found(&digest)?;
        if put != Put::Known {
            self.keep(draft, &digest)?;
        }
        Ok((digest, put))
    }

    /// What a put of this content comes to. Content that is there is young again, so that it is not collected before
    /// whoever put it has said what for.
    fn found(&self, digest: &Digest) -> Result<Put, Error> {
        match self.open(digest) {
            Ok(Some(_)) => {
                let path = self.path(digest);
                let touched = File::options()
                    .append(true)
                    .open(&path)
                    .and_then(|file| file.set_modified(SystemTime::now()));
                match touched {
                    // It was collected just now.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Put::Written),
                    Err(source) => Err(Error::File { path, source }),
                    // Who put it may have died before that was durable.
                    Ok(()) => self.sync(&path).map(|()| Put::Known),
                }
            }
            Ok(None) => Ok(Put::Written),
            Err(Error::BlobDamaged { .. }) => Ok(Put::Repaired),
            Err(error) => Err(error),
        }
    }

    fn keep(&self, mut draft: Draft, digest: &Digest) -> Result<(), Error> {
        let path = self.path(digest);
        let directory = path.parent().unwrap_or(&self.root);
        let kept = draft
            .file
            .sync_all()
            .and_then(|()| make_directory(directory, &self.root))
            .and_then(|()| fs::rename(&draft.path, &path));
        kept.map_err(|source| draft.failed(source))?;
        draft.is_kept = true;
        self.sync(&path)
    }

    /// Where a blob is stays so.
    fn sync(&self, path: &Path) -> Result<(), Error> {
        let directory = path.parent().unwrap_or(&self.root);
        sync_directory(directory)
            .and_then(|()| sync_directory(&self.root))
            .map_err(|source| Error::File {
                path: path.to_owned(),
                source,
            })
    }

    /// The bytes, or that there are none.
    ///
    /// # Errors
    /// [`Error::BlobDamaged`] when the file holds something else; and when it cannot be read.
    pub fn get(&self, digest: &Digest) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path(digest);
        let mut bytes = Vec::new();
        let read = open_file(&path).and_then(|mut file| file.read_to_end(&mut bytes));
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::File { path, source }),
            Ok(_) => {}
        }
        self.same(digest, Digest::of(&bytes))?;
        Ok(Some(bytes))
    }

    /// The blob's file, found to be whole and open for reading from its beginning; or that there is none.
    ///
    /// # Errors
    /// As [`Blobs::get`].
    pub fn open(&self, digest: &Digest) -> Result<Option<File>, Error> {
        let path = self.path(digest);
        let read = open_file(&path).and_then(|mut file| {
            let (found, _) = copy_hashed(&mut file, &mut io::sink())?;
            file.rewind()?;
            Ok((file, found))
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { path, source }),
            Ok((file, found)) => self.same(digest, found).map(|()| Some(file)),
        }
    }

    fn same(&self, digest: &Digest, found: Digest) -> Result<(), Error> {
        if found == *digest {
            return Ok(());
        }
        Err(Error::BlobDamaged {
            path: self.path(digest),
            expected: digest.clone(),
            found,
        })
    }

    /// Whether there is a file for it; nobody looks what it holds.
    #[must_use]
    pub fn exists(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// The blobs that there are and their sizes, by digest, from the one after `after` on: at least `most` of them, if
    /// there are so many. What is not called like a blob is none.
    ///
    /// # Errors
    /// When a directory cannot be read.
    pub fn list(&self, after: Option<&Digest>, most: usize) -> Result<Vec<(Digest, u64)>, Error> {
        let first = after.and_then(|after| u8::from_str_radix(&after.0[..2], 16).ok());
        let mut listed = Vec::new();
        for prefix in first.unwrap_or(0)..=u8::MAX {
            let path = self.root.join(format!("{prefix:02x}"));
            let mut found = match in_directory(&path, prefix) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                found => found.map_err(|source| Error::File { path, source })?,
            };
            found.retain(|(digest, _)| Some(digest) > after);
            found.sort();
            listed.append(&mut found);
            if listed.len() >= most {
                break;
            }
        }
        Ok(listed)
    }

    /// Removes what a crash has left half-written. Nobody may be writing.
    pub(super) fn remove_unfinished(&self) -> Result<(), Error> {
        let failed = |source| Error::File {
            path: self.root.clone(),
            source,
        };
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|word| word == UNFINISHED) {
                fs::remove_file(path).map_err(failed)?;
            }
        }
        Ok(())
    }
}

/// A file that is no blob yet; it goes unless it becomes one.
struct Draft {
    path: PathBuf,
    file: File,
    is_kept: bool,
}

impl Draft {
    fn new(root: &Path) -> Result<Self, Error> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("{number}.{UNFINISHED}"));
        let made = make_directory(root, root.parent().unwrap_or(root))
            .and_then(|()| File::options().write(true).create_new(true).open(&path));
        match made {
            Ok(file) => Ok(Self {
                path,
                file,
                is_kept: false,
            }),
            Err(source) => Err(Error::File { path, source }),
        }
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::File {
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_kept {
            // The next start of nerved removes what cannot be removed now.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes it, durably, if it is not there.
fn make_directory(path: &Path, parent: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| sync_directory(parent)),
    }
}

fn in_directory(path: &Path, prefix: u8) -> io::Result<Vec<(Digest, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let digest = name.to_str().map(|rest| format!("{prefix:02x}{rest}"));
        // Only what has the very name of a blob's file is found again under its digest.
        let is_one = |digest: &Digest| digest.as_str().get(2..) == name.to_str();
        if let Some(digest) = digest.and_then(|text| Digest::parse(&text)).filter(is_one) {
            let metadata = entry.metadata()?;
            if !metadata.is_dir() {
                found.push((digest, metadata.len()));
            }
        }
    }
    Ok(found)
}

/// Copies all that there is; its digest and its length.
pub(super) fn copy_hashed(from: &mut impl Read, to: &mut impl Write) -> io::Result<(Digest, u64)> {
    let (mut sha, mut length) = (Sha256::new(), 0);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = match from.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else {
            return Ok((Digest(hex(&sha.finalize())), length));
        };
        sha.update(bytes);
        to.write_all(bytes)?;
        length += read as u64;
    }
}

/// What was made, renamed or removed in a directory stays so.
pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blobs() -> (tempfile::TempDir, Blobs) {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(directory.path().join("blobs"));
        (directory, blobs)
    }

    #[test]
    // Parity 121.
    fn a_content_is_there_once_under_its_digest() {
        let (directory, blobs) = blobs();
        let (digest, put) = blobs.put(b"abc").unwrap();
        assert_eq!(put, Put::Written);
        assert_eq!(
            digest.as_str(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let path = directory
            .path()
            .join("blobs/ba")
            .join(&digest.as_str()[2..]);
        assert_eq!(blobs.path(&digest), path);
        assert_eq!(blobs.put(b"abc").unwrap(), (digest.clone(), Put::Known));
        assert_eq!(blobs.get(&digest).unwrap().as_deref(), Some(&b"abc"[..]));
        assert_eq!(
            fs::read_dir(directory.path().join("blobs/ba"))
                .unwrap()
                .count(),
            1
        );
    }

    #[test]
    // Parity 121, 122.
    fn damaged_content_is_never_served_and_a_put_replaces_it() {
        let (_directory, blobs) = blobs();
        let (digest, _) = blobs.put(b"abc").unwrap();
        fs::write(blobs.path(&digest), b"abd").unwrap();
        let error = blobs.get(&digest).unwrap_err().to_string();
        let other = Digest::of(b"abd");
        assert!(
            error.contains(digest.as_str()) && error.contains(other.as_str()),
            "{error}"
        );
        assert_eq!(blobs.put(b"abc").unwrap().1, Put::Repaired);
        assert_eq!(blobs.get(&digest).unwrap().as_deref(), Some(&b"abc"[..]));
    }

    #[test]
    // Parity 122.
    fn a_digest_is_taken_in_any_case_and_with_blanks_around_it() {
        let (_directory, blobs) = blobs();
        let (digest, _) = blobs.put(b"abc").unwrap();
        let shouted = format!(" \t{}\n", digest.as_str().to_uppercase());
        assert_eq!(Digest::parse(&shouted), Some(digest.clone()));
        for none in [
            "",
            "abc",
            &digest.as_str()[1..],
            &format!("{digest}0"),
            &"g".repeat(64),
        ] {
            assert_eq!(Digest::parse(none), None, "{none}");
        }
        assert_eq!(blobs.get(&Digest::of(b"")).unwrap(), None);
    }

    #[test]
    // Parity 121, 123.
    fn a_file_of_any_length_is_taken_and_listed() {
        let (directory, blobs) = blobs();
        let long = vec![7; 300_000];
        let (digest, put) = blobs.put_from(&mut &long[..], 300_000).unwrap();
        assert_eq!((&digest, put), (&Digest::of(&long), Put::Written));
        assert!(blobs.exists(&digest) && !blobs.exists(&Digest::of(b"")));
        assert_eq!(
            blobs.put_from(&mut &long[..], 300_000).unwrap().1,
            Put::Known
        );
        assert!(matches!(
            blobs.put_from(&mut &long[..], 299_999),
            Err(Error::TooLong { most: 299_999 })
        ));
        let mut read = Vec::new();
        let mut file = blobs.open(&digest).unwrap().unwrap();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, long);
        fs::write(blobs.path(&digest), b"else").unwrap();
        assert!(matches!(
            blobs.open(&digest),
            Err(Error::BlobDamaged { .. })
        ));
        let put = blobs.put_from(&mut &long[..], 300_000).unwrap().1;
        assert_eq!(put, Put::Repaired);
        // Nothing unfinished is left by any of that, and what a crash leaves goes.
        let root = directory.path().join("blobs");
        let names = || fs::read_dir(&root).unwrap().count();
        assert_eq!(names(), 1);
        fs::write(root.join("7.new"), b"half").unwrap();
        blobs.remove_unfinished().unwrap();
        assert_eq!(names(), 1);
        let mut all = vec![(digest, 300_000)];
        for number in 0..50_u8 {
            all.push((blobs.put(&[number]).unwrap().0, 1));
        }
        all.sort();
        fs::write(root.join(&all[0].0.as_str()[..2]).join("note"), b"").unwrap();
        fs::create_dir_all(blobs.path(&Digest::of(b"a directory"))).unwrap();
        assert_eq!(blobs.list(None, usize::MAX).unwrap(), all);
        let some = blobs.list(Some(&all[20].0), 5).unwrap();
        assert!(some.len() >= 5);
        assert_eq!(some, all[21..21 + some.len()]);
    }
}
