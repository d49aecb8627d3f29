//! What archiving has the store do. Each job is short, so that no run waits for it.

use rusqlite::{OptionalExtension as _, params};

use super::{ARCHIVED, RESTORED, SLICE_BYTES};
use crate::model::time::DAY_US;
use crate::os::clock;
use crate::os::descriptor::open_file;
use crate::store::log::{Entry, Head, Logged, SYSTEM};
use crate::store::{Error, Store, sql, unsigned};

/// One job looks at so many rows at most.
const WINDOW: u64 = 2_048;
/// Entries of an index are short.
const INDEX_WINDOW: u32 = 16_384;

/// A listed file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub day: String,
    /// Its name in [`cold::folder`].
    pub file: String,
    pub rows: u64,
    pub first: u64,
    pub last: u64,
    pub digest: String,
    /// The database has none of its events up to this number.
    pub cleared: u64,
}

impl Store {
    /// The files of the archive, by day and part.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn archived(&self) -> Result<Vec<Listed>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT day, file, rows, first, last, digest, cleared FROM archive ORDER BY day, part",
        )?;
        let row = |row: &rusqlite::Row<'_>| {
            Ok(Listed {
                day: row.get("day")?,
                file: row.get("file")?,
                rows: unsigned(row, "rows")?,
                first: unsigned(row, "first")?,
                last: unsigned(row, "last")?,
                digest: row.get("digest")?,
                cleared: unsigned(row, "cleared")?,
            })
        };
        Ok(select.query_map([], row)?.collect::<Result<_, _>>()?)
    }

    /// A file of the archive, open; none when no file is listed by that name.
    ///
    /// # Errors
    /// When the database or the file cannot be read.
    pub fn open_archived(&self, file: &str) -> Result<Option<std::fs::File>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT 1 FROM archive WHERE file = ?1")?;
        if !select.exists([file])? {
            return Ok(None);
        }
        let path = super::super::cold::folder(self.directory()).join(file);
        let opened = open_file(&path);
        opened.map(Some).map_err(|error| Error::Cold {
            path,
            why: error.to_string(),
        })
    }
}

/// An event that is in a file and can go from the database.
pub(super) struct Gone {
    pub seq: u64,
    pub hash: [u8; 32],
    /// The blobs that have to stay for it.
    pub blobs: Vec<String>,
}

/// The first and the last number of some events.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Span(pub Option<(u64, u64)>);

impl Span {
    pub fn with(self, other: Self) -> Self {
        Self(match (self.0, other.0) {
            (Some((first, last)), Some((other_first, other_last))) => {
                Some((first.min(other_first), last.max(other_last)))
            }
            (one, other) => one.or(other),
        })
    }
}

impl Store {
    /// When the oldest day began that has events from `from` on, if it had ended by `ended_by`.
    pub(super) fn next_day(&self, from: u64, ended_by: u64) -> Result<Option<u64>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT at FROM events WHERE at >= ?1 ORDER BY at LIMIT 1")?;
        let at = select
            .query_row([sql(from)], |row| unsigned(row, "at"))
            .optional()?;
        let start = at.map(|at| at - at % DAY_US);
        Ok(start.filter(|start| start + DAY_US <= ended_by))
    }

    pub(super) fn archived_parts(
        day: &str,
    ) -> impl FnOnce(&mut Self) -> Result<u32, Error> + use<> {
        let day = day.to_owned();
        move |store| {
            let mut select = store
                .connection
                .prepare_cached("SELECT coalesce(max(part), 0) FROM archive WHERE day = ?1")?;
            Ok(select.query_row([day], |row| row.get(0))?)
        }
    }

    /// The numbers of events from this time and number on, and where to go on.
    pub(super) fn span(
        &self,
        from: (u64, u64),
        until: u64,
    ) -> Result<(Span, Option<(u64, u64)>), Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT at, seq FROM events WHERE (at, seq) > (?1, ?2) AND at < ?3 ORDER BY at, seq LIMIT ?4",
        )?;
        let mut rows = select.query(params![sql(from.0), sql(from.1), sql(until), INDEX_WINDOW])?;
        let (mut span, mut count, mut next) = (Span::default(), 0, from);
        while let Some(row) = rows.next()? {
            next = (unsigned(row, "at")?, unsigned(row, "seq")?);
            span = span.with(Span(Some((next.1, next.1))));
            count += 1;
        }
        Ok((span, (count == INDEX_WINDOW).then_some(next)))
    }

    /// Those of the next events of a day that can go, and up to where that is all.
    pub(super) fn slice(
        &self,
        start: u64,
        after: u64,
        last: u64,
    ) -> Result<(Vec<Logged>, u64), Error> {
        let last = last.min(after + WINDOW);
        let mut select = self.connection.prepare_cached(&format!(
            "SELECT {} FROM events WHERE seq > ?1 AND seq <= ?2 AND +at >= ?3 AND +at < ?4 AND NOT EXISTS
                 (SELECT 1 FROM workflow_runs WHERE run = ref AND ended_at IS NULL) ORDER BY seq",
            Logged::COLUMNS
        ))?;
        let mut rows = select.query(params![
            sql(after),
            sql(last),
            sql(start),
            sql(start + DAY_US)
        ])?;
        let (mut events, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.next()? {
            let event = Logged::of(row)?;
            bytes += event.payload.len();
            let seq = event.seq;
            events.push(event);
            if bytes > SLICE_BYTES {
                return Ok((events, seq));
            }
        }
        Ok((events, last))
    }

    /// A file is one of the archive from now on. The event that says so is the newest of all, so that the newest of all
    /// is always in the database.
    pub(super) fn list(&mut self, file: &Listed, part: u32) -> Result<(), Error> {
        let payload = serde_json::json!({
            "file": file.file,
            "rows": file.rows,
            "first": file.first,
            "last": file.last,
            "digest": file.digest,
        });
        self.write(|transaction, head| {
        transaction.execute(
            "INSERT INTO archive (day, part, file, rows, first, last, digest, cleared) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0)",
            params![file.day, part, file.file, sql(file.rows), sql(file.first), sql(file.last), file.digest],
        )?;
        let entry = Entry {
            source: SYSTEM,
            event_type: ARCHIVED,
            reference: &file.day,
            payload: &payload.to_string(),
            blob: None,
            at: clock::wall_us(),
        };
        head.append(transaction, &entry)?;
            Ok(())
        })
    }

    pub(super) fn clear(&mut self, file: &str, gone: &[Gone]) -> Result<(), Error> {
        let Some(last) = gone.last() else {
            return Ok(());
        };
        self.write(|transaction, _| {
            {
                let mut delete = transaction
                    .prepare_cached("DELETE FROM events WHERE seq = ?1 AND hash = ?2")?;
                let mut keep = transaction.prepare_cached(
                    "INSERT OR IGNORE INTO archived_blobs (blob, file) VALUES (?1, ?2)",
                )?;
                for event in gone {
                    delete.execute(params![sql(event.seq), event.hash])?;
                    for blob in &event.blobs {
                        keep.execute(params![blob, file])?;
                    }
                }
                let mut mark = transaction
                    .prepare_cached("UPDATE archive SET cleared = ?2 WHERE file = ?1")?;
                mark.execute(params![file, sql(last.seq)])?;
            }
            Ok(())
        })
    }

    pub(super) fn has_all(&self, heads: &[Head]) -> Result<bool, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT 1 FROM events WHERE seq = ?1 AND hash = ?2")?;
        for head in heads {
            if !select.exists(params![sql(head.seq), head.hash])? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn reopen(&mut self, day: &str) -> Result<(), Error> {
        self.write(|transaction, _| {
            transaction.execute("UPDATE archive SET cleared = 0 WHERE day = ?1", [day])?;
            Ok(())
        })
    }

    pub(super) fn put_back(&mut self, events: &[Logged]) -> Result<(), Error> {
        self.must_have_room(0)?;
        self.write(|transaction, _| {
            for event in events {
                let seq = sql(event.seq);
                let known: Option<[u8; 32]> = transaction
                    .prepare_cached("SELECT hash FROM events WHERE seq = ?1")?
                    .query_row([seq], |row| row.get(0))
                    .optional()?;
                match known {
                    None => event.entry().insert(transaction, &event.head())?,
                    Some(hash) if hash == event.hash => {}
                    Some(_) => {
                        return Err(Error::Damaged(format!(
                            "event {seq} is not the one that was archived"
                        )));
                    }
                }
            }
            Ok(())
        })
    }

    pub(super) fn unlist(&mut self, day: &str, rows: u64) -> Result<(), Error> {
        self.write(|transaction, head| {
            transaction.execute(
            "DELETE FROM archived_blobs WHERE file IN (SELECT file FROM archive WHERE day = ?1)",
            [day],
        )?;
            transaction.execute("DELETE FROM archive WHERE day = ?1", [day])?;
            let entry = Entry {
                source: SYSTEM,
                event_type: RESTORED,
                reference: day,
                payload: &serde_json::json!({ "rows": rows }).to_string(),
                blob: None,
                at: clock::wall_us(),
            };
            head.append(transaction, &entry)?;
            Ok(())
        })
    }
}
