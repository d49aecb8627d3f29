//! Threads: the rounds that the events of a run are, wherever those are kept.

use rusqlite::{Row, params};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::blob::{Blobs, Digest};
use super::log::Logged;
use super::read::{RunRow, parsed};
use super::{Error, Store};
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::run::RunEvent;

/// A message as it was written, and its place in the thread.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    pub round: u32,
    pub role: String,
    pub content: String,
    /// A JSON object, as text: most who read it hand it on.
    pub meta: String,
    /// µs since the epoch.
    pub timestamp: u64,
}

impl Round {
    fn of(round: u32, message: Message) -> Self {
        Self {
            round,
            role: message.role,
            content: message.content,
            meta: Value::Object(message.meta).to_string(),
            timestamp: message.timestamp,
        }
    }

    /// The message, to be looked into.
    ///
    /// # Errors
    /// When its meta is no JSON object.
    pub fn into_message(self) -> Result<Message, Error> {
        Ok(Message {
            role: self.role,
            meta: parsed(0, &self.meta)?,
            content: self.content,
            timestamp: self.timestamp,
        })
    }
}

/// Which part of a thread; by default all of it.
#[derive(Debug, Clone, Default)]
pub struct ThreadRange {
    /// The newest so many rounds, without the start.
    pub limit: Option<u32>,
    /// Only what is older than this round.
    pub before: Option<u32>,
    /// Only what is newer than this round.
    pub after: Option<u32>,
    /// Fewer, when as JSON they would be more than this; at least one.
    pub bytes: Option<usize>,
}

/// A message as its event has it: read at once, and not by way of everything that an event can be.
#[derive(Deserialize)]
struct Said {
    round: u32,
    message: Spoken,
}

#[derive(Deserialize)]
struct Spoken {
    role: String,
    content: String,
    meta: Box<RawValue>,
    timestamp: u64,
}

/// The round of a message.
pub(super) fn round_of(event: &Logged) -> Result<u32, Error> {
    Ok(parsed::<Said>(event.seq, &event.payload)?.round)
}

/// What of an event a thread is made of, where it stands: what is in it need not be copied before it is read.
#[derive(Clone, Copy)]
pub(super) struct Line<'a> {
    seq: u64,
    event_type: &'a str,
    payload: &'a str,
    blob: Option<&'a str>,
    at: u64,
}

impl<'a> Line<'a> {
    const COLUMNS: &'static str = "seq, type, payload, blob, at";

    fn of(row: &'a Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            seq: row.get::<_, i64>(0)?.unsigned_abs(),
            event_type: row.get_ref(1)?.as_str()?,
            payload: row.get_ref(2)?.as_str()?,
            blob: row.get_ref(3)?.as_str_or_null()?,
            at: row.get::<_, i64>(4)?.unsigned_abs(),
        })
    }
}

impl<'a> From<&'a Logged> for Line<'a> {
    fn from(event: &'a Logged) -> Self {
        Self {
            seq: event.seq,
            event_type: &event.event_type,
            payload: &event.payload,
            blob: event.blob.as_deref(),
            at: event.at,
        }
    }
}

/// The rounds that some events of a run are: the newest of them, as long as they have no more than so many bytes, and at
/// least one.
pub(super) struct Rounds<'a> {
    id: RunId,
    /// The run's limit, which its start says.
    limit: Option<u32>,
    most: Option<usize>,
    blobs: &'a Blobs,
    bytes: usize,
    newest_first: Vec<Round>,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(row: &RunRow, id: RunId, most: Option<usize>, blobs: &'a Blobs) -> Self {
        Self {
            id,
            limit: row.max_rounds,
            most,
            blobs,
            bytes: 0,
            newest_first: Vec::new(),
        }
    }

    /// Takes the event before the one that it took last, and says whether there is room for it.
    pub(super) fn add(&mut self, line: Line<'_>) -> Result<bool, Error> {
        let text = line.blob.map(|digest| text_of(self.blobs, digest));
        let text = text.transpose()?;
        self.bytes += line.payload.len() + text.as_ref().map_or(0, String::len);
        let round = if line.event_type == RunEvent::MESSAGE {
            let Said { round, message } = parsed(line.seq, line.payload)?;
            if !message.meta.get().starts_with('{') {
                let source = serde::de::Error::custom("its meta is no object");
                let seq = super::sql(line.seq);
                return Err(Error::Event { seq, source });
            }
            Round {
                round,
                role: message.role,
                content: text.unwrap_or(message.content),
                meta: Box::<str>::from(message.meta).into(),
                timestamp: message.timestamp,
            }
        } else {
            let mut event = parsed::<RunEvent>(line.seq, line.payload)?;
            if let Some((place, text)) = event.text_mut().zip(text) {
                *place = text;
            }
            match event {
                RunEvent::Queued(accepted) => {
                    Round::of(0, accepted.start_message(self.id, self.limit, line.at))
                }
                RunEvent::Imported(imported) => Round::of(0, imported.start_message(self.id)),
                _ => return Ok(true),
            }
        };
        let has_room = self.most.is_none_or(|most| self.bytes <= most);
        if has_room || self.newest_first.is_empty() {
            self.newest_first.push(round);
        }
        Ok(has_room)
    }

    /// Oldest first.
    pub(super) fn finish(mut self) -> Vec<Round> {
        self.newest_first.reverse();
        self.newest_first
    }
}

/// The text that an event has left to a blob.
fn text_of(blobs: &Blobs, digest: &str) -> Result<String, Error> {
    let digest =
        Digest::parse(digest).ok_or_else(|| Error::Damaged(format!("{digest:?} is no digest")))?;
    let bytes = blobs.get(&digest)?;
    let bytes = bytes.ok_or(Error::BlobMissing(digest))?;
    // It was a text, and it is what it was.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Store {
    /// Part of a thread, oldest first, as far as the database has it: [`super::Handle::thread`] knows the archive too.
    ///
    /// # Errors
    /// When the database or a blob cannot be read.
    pub fn thread(&self, id: RunId, range: &ThreadRange) -> Result<Vec<Round>, Error> {
        let Some(row) = self.run(id)? else {
            return Ok(Vec::new());
        };
        // Rounds are dense, so that the newest rows can be skipped by number.
        let skipped = range
            .before
            .map_or(0, |before| (row.rounds + 1).saturating_sub(before));
        let mut select = self.connection.prepare_cached(&format!(
            "SELECT {} FROM events WHERE ref = ?1 AND type IN (?2, ?3) ORDER BY seq DESC LIMIT ?4 OFFSET ?5",
            Line::COLUMNS
        ))?;
        let newer = range
            .after
            .map(|after| row.rounds.saturating_sub(after).saturating_sub(skipped));
        let limit = range.limit.into_iter().chain(newer).min();
        let limit = limit.map_or(i64::MAX, i64::from);
        // Who counts rounds does not mean the start.
        let start = if range.limit.is_none() && range.after.is_none() {
            row.start_event()
        } else {
            RunEvent::MESSAGE
        };
        let mut rows = select.query(params![
            id.to_string(),
            RunEvent::MESSAGE,
            start,
            limit,
            skipped
        ])?;
        let mut rounds = Rounds::new(&row, id, range.bytes, self.blobs());
        while let Some(row) = rows.next()? {
            if !rounds.add(Line::of(row)?)? {
                break;
            }
        }
        Ok(rounds.finish())
    }
}
