//! Blobs that nothing refers to any more are removed: neither an event's text, in the database or in the archive, nor
//! named, by its 64 hex digits, in a payload there.
//!
//! Runs on a thread of its own; a blob is removed by a job of the store that has looked once more, so that no event that
//! comes meanwhile loses its text.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{Digest, Error, Handle, Store, sql, unsigned};

/// One job of the store looks at so many events, or bytes of them, …
const WINDOW: u64 = 2_048;
const BYTES: usize = 4 * 1024 * 1024;
/// …and removes so many blobs.
const BATCH: usize = 64;

/// The digests that a text names: each word of exactly 64 hex digits, in any case.
pub(super) fn digests(text: &str) -> impl Iterator<Item = Digest> + '_ {
    text.as_bytes()
        .split(|byte| !byte.is_ascii_hexdigit())
        .filter(|word| word.len() == 64)
        .filter_map(|word| std::str::from_utf8(word).ok().and_then(Digest::parse))
}

/// Removes the blobs that nothing refers to, if they are older than `before` (µs since the epoch); says how many.
///
/// # Errors
/// When a directory cannot be read, a file cannot be removed, or the database cannot be read.
pub fn collect(store: &Handle, before: u64) -> Result<u64, Error> {
    let before = UNIX_EPOCH + Duration::from_micros(before);
    let (candidates, seen) = candidates(store, before)?;
    let mut removed = 0;
    for some in candidates.chunks(BATCH) {
        let some = some.to_vec();
        removed +=
            store.call_and_wait(move |store| store.remove_unreferenced(some, seen, before))?;
    }
    Ok(removed)
}

/// How many blobs would be removed.
///
/// # Errors
/// When a directory or the database cannot be read.
pub fn would_collect(store: &Handle, before: u64) -> Result<u64, Error> {
    let before = UNIX_EPOCH + Duration::from_micros(before);
    Ok(candidates(store, before)?.0.len() as u64)
}

/// The old blobs that nothing refers to, and the last event that was asked.
fn candidates(store: &Handle, before: SystemTime) -> Result<(Vec<Digest>, u64), Error> {
    let root = store.call_and_wait(|store| Ok(store.directory().join("blobs")))?;
    let mut candidates = HashSet::new();
    for directory in entries(&root)? {
        let of_directory = old_blobs(&directory, before)?;
        for some in of_directory.chunks(BATCH) {
            let some = some.to_vec();
            candidates.extend(store.call_and_wait(move |store| store.unreferenced(some))?);
        }
    }
    let mut after = 0;
    while !candidates.is_empty() {
        let (named, next) = store.call_and_wait(move |store| store.named_after(after))?;
        for digest in &named {
            candidates.remove(digest);
        }
        if next == after {
            break;
        }
        after = next;
    }
    Ok((candidates.into_iter().collect(), after))
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

/// The paths in a directory, which need not be there.
fn entries(directory: &Path) -> Result<Vec<std::path::PathBuf>, Error> {
    match fs::read_dir(directory) {
        Ok(entries) => {
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            paths.collect::<Result<_, _>>().map_err(failed(directory))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(directory)(error)),
    }
}

/// The blobs of a directory that are old enough.
fn old_blobs(directory: &Path, before: SystemTime) -> Result<Vec<Digest>, Error> {
    if !directory.is_dir() {
        return Ok(Vec::new());
    }
    let name = |path: &Path| {
        path.file_name()
            .and_then(|name| Some(name.to_str()?.to_owned()))
    };
    let first = name(directory).unwrap_or_default();
    let digest = |path: &Path| Digest::parse(&format!("{first}{}", name(path)?));
    let old = entries(directory)?
        .into_iter()
        .filter(|path| is_old(path, before));
    Ok(old.filter_map(|path| digest(&path)).collect())
}

fn is_old(path: &Path, before: SystemTime) -> bool {
    let found = fs::symlink_metadata(path).ok();
    let file = found.filter(|found| !found.is_dir());
    file.is_some_and(|file| file.modified().is_ok_and(|at| at < before))
}

impl Store {
    /// Those of these blobs that are no event's text and not kept for the archive.
    fn unreferenced(&self, mut blobs: Vec<Digest>) -> Result<Vec<Digest>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT 1 FROM events WHERE blob = ?1 UNION ALL SELECT 1 FROM archived_blobs WHERE blob = ?1",
        )?;
        let mut failure = None;
        blobs.retain(|blob| match select.exists([blob.as_str()]) {
            Ok(is_referenced) => !is_referenced,
            Err(error) => {
                failure = Some(error);
                false
            }
        });
        failure.map_or(Ok(blobs), |error| Err(error.into()))
    }

    /// What the next events name, and the last of them.
    fn named_after(&self, after: u64) -> Result<(HashSet<Digest>, u64), Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT seq, payload FROM events WHERE seq > ?1 ORDER BY seq LIMIT ?2",
        )?;
        let mut rows = select.query([sql(after), sql(WINDOW)])?;
        let (mut named, mut last, mut bytes) = (HashSet::new(), after, 0);
        while let Some(row) = rows.next()? {
            let payload = row
                .get_ref("payload")?
                .as_str()
                .map_err(rusqlite::Error::from)?;
            named.extend(digests(payload));
            last = unsigned(row, "seq")?;
            bytes += payload.len();
            if bytes > BYTES {
                break;
            }
        }
        Ok((named, last))
    }

    /// Removes those of these blobs to which nothing refers, nor any event after `seen`.
    fn remove_unreferenced(
        &self,
        blobs: Vec<Digest>,
        seen: u64,
        before: SystemTime,
    ) -> Result<u64, Error> {
        let (mut named, mut after) = (HashSet::new(), seen);
        loop {
            let (more, last) = self.named_after(after)?;
            named.extend(more);
            if last == after {
                break;
            }
            after = last;
        }
        let mut removed = 0;
        for blob in self.unreferenced(blobs)? {
            let path = self.blobs().path(&blob);
            // Somebody may have put it once more.
            if !named.contains(&blob) && is_old(&path, before) {
                fs::remove_file(&path).map_err(failed(&path))?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
