//! The log: append-only, numbered without a gap, each event chained to the one before it by its hash.
//!
//! `hash = sha256(hash of the event before · seq · at · source · type · ref · payload · blob)`: numbers as 8 bytes, big
//! endian; each text as its length, likewise, and its bytes; `blob` is empty when there is none; the hash before the
//! first event is 32 zeros. So nobody changes, inserts or removes an event unseen, wherever it is kept: in the
//! database, in the archive, in a backup.

use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use sha2::{Digest as _, Sha256};

use super::Error;

/// Events of the engine: what happened to a run or to a workflow.
pub const WORKFLOW: &str = "workflow";
/// What happened to nerve as a whole, and to its store.
pub const SYSTEM: &str = "system";
/// Who did what, or was not allowed to.
pub const AUDIT: &str = "audit";
/// What a client brought along: an imported history.
pub const CLIENT: &str = "client";
/// What a sense observed.
pub const SENSE: &str = "sense";
/// Every source there is.
pub const SOURCES: [&str; 5] = [SYSTEM, WORKFLOW, SENSE, CLIENT, AUDIT];

/// An event that is to be written.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    /// One of [`SOURCES`].
    pub source: &'a str,
    /// What happened.
    pub event_type: &'a str,
    /// To whom: a run, a workflow, `nerve`.
    pub reference: &'a str,
    /// A JSON object.
    pub payload: &'a str,
    /// Digest of the text that the payload leaves out, for its length.
    pub blob: Option<&'a str>,
    /// µs since the epoch.
    pub at: u64,
}

/// The newest event's number and hash: where the chain goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head {
    pub seq: u64,
    pub hash: [u8; 32],
}

impl Head {
    /// The newest event of a database. The archive never takes that one.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(super) fn of(connection: &Connection) -> Result<Self, Error> {
        let newest = "SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1";
        let head = connection.query_row(newest, [], |row| {
            Ok(Self {
                seq: row.get::<_, i64>(0)?.unsigned_abs(),
                hash: row.get(1)?,
            })
        });
        Ok(head.optional()?.unwrap_or_default())
    }

    /// The head once this event has followed.
    #[must_use]
    pub fn after(&self, entry: &Entry<'_>) -> Self {
        let seq = self.seq + 1;
        let mut sha = Sha256::new();
        sha.update(self.hash);
        sha.update(seq.to_be_bytes());
        sha.update(entry.at.to_be_bytes());
        for text in [
            entry.source,
            entry.event_type,
            entry.reference,
            entry.payload,
            entry.blob.unwrap_or_default(),
        ] {
            sha.update((text.len() as u64).to_be_bytes());
            sha.update(text);
        }
        Self {
            seq,
            hash: sha.finalize().into(),
        }
    }

    /// Writes an event, and is the head then. The caller forgets this head when the transaction fails.
    pub(super) fn append(
        &mut self,
        transaction: &Transaction<'_>,
        entry: &Entry<'_>,
    ) -> Result<(), Error> {
        *self = self.after(entry);
        entry.insert(transaction, self)
    }
}

impl Entry<'_> {
    /// Writes it to its place in the log.
    pub(super) fn insert(&self, transaction: &Transaction<'_>, head: &Head) -> Result<(), Error> {
        let mut insert = transaction.prepare_cached(
            "INSERT INTO events (seq, source, type, ref, payload, blob, at, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?;
        insert.execute(params![
            super::sql(head.seq),
            self.source,
            self.event_type,
            self.reference,
            self.payload,
            self.blob,
            super::sql(self.at),
            head.hash,
        ])?;
        Ok(())
    }
}

/// An event as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logged {
    pub seq: u64,
    pub source: String,
    pub event_type: String,
    pub reference: String,
    pub payload: String,
    pub blob: Option<String>,
    /// µs since the epoch.
    pub at: u64,
    pub hash: [u8; 32],
}

impl Logged {
    /// The columns of `events` that [`Logged::of`] reads, by their place here: a name would be looked for in every row.
    pub(super) const COLUMNS: &str = "seq, source, type, ref, payload, blob, at, hash";

    pub(super) fn of(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            seq: row.get::<_, i64>(0)?.unsigned_abs(),
            source: row.get(1)?,
            event_type: row.get(2)?,
            reference: row.get(3)?,
            payload: row.get(4)?,
            blob: row.get(5)?,
            at: row.get::<_, i64>(6)?.unsigned_abs(),
            hash: row.get(7)?,
        })
    }

    /// What was written.
    #[must_use]
    pub fn entry(&self) -> Entry<'_> {
        Entry {
            source: &self.source,
            event_type: &self.event_type,
            reference: &self.reference,
            payload: &self.payload,
            blob: self.blob.as_deref(),
            at: self.at,
        }
    }

    /// The head that it was, if nobody touched it.
    #[must_use]
    pub fn head(&self) -> Head {
        Head {
            seq: self.seq,
            hash: self.hash,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: Entry<'static> = Entry {
        source: WORKFLOW,
        event_type: "queued",
        reference: "r",
        payload: "{}",
        blob: None,
        at: 5,
    };

    #[test]
    fn the_hash_is_the_documented_one() {
        let mut bytes = vec![0; 32];
        for number in [1_u64, 5] {
            bytes.extend(number.to_be_bytes());
        }
        for text in ["workflow", "queued", "r", "{}", ""] {
            bytes.extend((text.len() as u64).to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        let expected: [u8; 32] = Sha256::digest(bytes).into();
        let head = Head::default().after(&ENTRY);
        assert_eq!((head.seq, head.hash), (1, expected));
    }

    #[test]
    fn every_field_and_every_predecessor_counts() {
        let first = Head::default().after(&ENTRY);
        let others = [
            Entry {
                source: SYSTEM,
                ..ENTRY
            },
            Entry {
                event_type: "queuedr",
                reference: "",
                ..ENTRY
            },
            Entry {
                payload: "{ }",
                ..ENTRY
            },
            Entry {
                blob: Some("b"),
                ..ENTRY
            },
            Entry { at: 6, ..ENTRY },
        ];
        for other in others {
            assert_ne!(Head::default().after(&other).hash, first.hash, "{other:?}");
        }
        assert_ne!(first.after(&ENTRY).hash, first.hash);
    }
}
