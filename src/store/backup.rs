//! A consistent copy of the database while it is at work.
//!
//! All that the log holds is moved into the file; from then on commits go to the log alone, and the file, which does not
//! change meanwhile, is copied off the store's thread. What was committed before the beginning is in the copy, and
//! nothing else.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use super::log::Head;
use super::{Error, Handle, Store};

/// Copied at a time.
const SLICE: usize = 1024 * 1024;

/// The file as it is while checkpoints are held off.
struct Image {
    file: Arc<File>,
    length: u64,
    head: Head,
}

impl Store {
    fn begin_backup(&mut self) -> Result<Image, Error> {
        if !self.hold.take() {
            return Err(Error::NotCopied("the database is being copied already"));
        }
        let image = self
            .moved()
            .map_err(|error| if error.is_full() { self.full() } else { error });
        if image.is_err() {
            self.hold.release();
        }
        image
    }

    /// The log cannot be moved into the database, whose disk is full, however much room there is for the copy.
    fn full(&self) -> Error {
        Error::File {
            path: self.directory.join("nerve.db"),
            source: rustix::io::Errno::NOSPC.into(),
        }
    }

    fn moved(&self) -> Result<Image, Error> {
        let checkpoint = "PRAGMA wal_checkpoint(PASSIVE)";
        let (busy, log, moved): (i64, i64, i64) =
            self.connection.query_row(checkpoint, [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })?;
        if busy != 0 || moved != log {
            return Err(Error::NotCopied(
                "the log could not be moved into the database",
            ));
        }
        let number = |pragma| {
            self.connection
                .query_row(pragma, [], |row| row.get::<_, i64>(0))
        };
        let length = number("PRAGMA page_count")? * number("PRAGMA page_size")?;
        Ok(Image {
            file: self.image.clone(),
            length: length.unsigned_abs(),
            head: self.head,
        })
    }
}

/// Copies the database to an empty file and syncs that; the newest event that the copy has. To be called where one may
/// wait.
///
/// # Errors
/// When the file does not take it, or so much is written meanwhile that the log would grow too long; then what the file
/// holds is nothing.
pub fn backup(store: &Handle, to: &File) -> Result<Head, Error> {
    let image = store.call_and_wait(Store::begin_backup)?;
    let copied = copy(&image, to);
    // Whatever became of the copy, the log is moved again from now on.
    let lasted = store.call_and_wait(|store| Ok(store.hold.release()))?;
    copied.map_err(|source| Error::File {
        path: PathBuf::from("the backup"),
        source,
    })?;
    if !lasted {
        return Err(Error::NotCopied(
            "more was written while the database was copied than its log can hold",
        ));
    }
    to.sync_all().map_err(|source| Error::File {
        path: PathBuf::from("the backup"),
        source,
    })?;
    Ok(image.head)
}

fn copy(image: &Image, mut to: &File) -> io::Result<()> {
    let mut buffer = vec![0; SLICE];
    let mut at = 0;
    while at < image.length {
        let left = usize::try_from(image.length - at).unwrap_or(SLICE);
        let slice = &mut buffer[..left.min(SLICE)];
        image.file.read_exact_at(slice, at)?;
        to.write_all(slice)?;
        at += slice.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn insert(store: &Store, text: &str) {
        let insert = "INSERT INTO numbers VALUES (?1)";
        store.connection.execute(insert, [text]).unwrap();
    }

    fn made() -> (tempfile::TempDir, Handle) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let table = "CREATE TABLE numbers (text TEXT)";
        store.connection.execute_batch(table).unwrap();
        (directory, Handle::spawn(store).unwrap())
    }

    #[test]
    fn a_copy_under_load_is_the_database_at_one_moment() {
        let (directory, store) = made();
        let fill = |store: &mut Store| {
            let text = "x".repeat(3_000);
            store.connection.execute_batch("BEGIN").unwrap();
            (0..2_000).for_each(|_| insert(store, &text));
            store.connection.execute_batch("COMMIT").unwrap();
            Ok(())
        };
        store.call_and_wait(fill).unwrap();
        let path = directory.path().join("copy.db");
        let to = File::create(&path).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let writer = {
            let (store, stop) = (store.clone(), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    // Always two at a time: a copy that has an odd number is torn.
                    let two = |store: &mut Store| {
                        let both = "INSERT INTO numbers VALUES ('a'), ('b')";
                        store.connection.execute_batch(both).unwrap();
                        Ok(())
                    };
                    store.call_and_wait(two).unwrap();
                }
            })
        };
        backup(&store, &to).unwrap();
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
        let copy = rusqlite::Connection::open(&path).unwrap();
        let verdict: String = copy
            .query_row("PRAGMA integrity_check", [], |row| row.get(0))
            .unwrap();
        assert_eq!(verdict, "ok");
        let count: i64 = copy
            .query_row("SELECT count(*) FROM numbers", [], |row| row.get(0))
            .unwrap();
        assert!(count >= 2_000 && count % 2 == 0, "{count}");
        // It was held off for that long only.
        assert!(store.call_and_wait(|store| Ok(store.hold.take())).unwrap());
    }

    #[test]
    fn a_copy_that_would_let_the_log_grow_fails_and_the_next_one_does_not() {
        let (directory, store) = made();
        let image = store.call_and_wait(Store::begin_backup).unwrap();
        let second = store.call_and_wait(Store::begin_backup);
        assert!(matches!(second, Err(Error::NotCopied(_))));
        let much = |store: &mut Store| {
            let text = "x".repeat(40_000);
            while store.hold.holds() {
                insert(store, &text);
            }
            Ok(())
        };
        store.call_and_wait(much).unwrap();
        let longest = directory
            .path()
            .join("nerve.db-wal")
            .metadata()
            .unwrap()
            .len();
        assert!(longest < 64 * 1024 * 1024, "{longest}");
        assert!(
            !store
                .call_and_wait(|store| Ok(store.hold.release()))
                .unwrap()
        );
        drop(image);
        let to = File::create(directory.path().join("copy.db")).unwrap();
        backup(&store, &to).unwrap();
    }
}
