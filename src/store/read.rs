//! What the store answers: rows as people see them, and the open runs that recovery starts from.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _, Row, params};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;

use super::blob::{Blobs, Digest};
use super::log::{Logged, WORKFLOW};
use super::{Error, Store, maybe_unsigned, unsigned};
use crate::model::message::Message;
use crate::model::name::{InvalidName, RunId, RunTail, WorkflowName};
use crate::model::run::{Run, RunEvent};
use crate::model::status::Status;
use crate::model::worker::{Pause, WorkerRecord};

/// A run as `workflow_runs` has it. Times are µs since the epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRow {
    pub run: String,
    pub workflow: String,
    pub status: Status,
    pub killing: bool,
    pub aborting: bool,
    pub exit_code: Option<u8>,
    pub result: Option<String>,
    pub reason: Option<String>,
    pub rounds: u32,
    pub max_rounds: Option<u32>,
    pub dry_run: bool,
    pub trigger: String,
    pub definition: Option<String>,
    pub created_at: u64,
    pub started_at: Option<u64>,
    pub ended_at: Option<u64>,
    /// The id that it had where it was imported from.
    pub old_id: Option<String>,
}

impl RunRow {
    /// The type of the event that is the start of its thread. An imported run may have old events of our names.
    pub(super) fn start_event(&self) -> &'static str {
        if self.old_id.is_some() {
            RunEvent::IMPORTED
        } else {
            RunEvent::QUEUED
        }
    }
}

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    pub seq: u64,
    pub event_type: String,
    pub payload: String,
    pub timestamp: u64,
}

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

/// What a tail of an id leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    None,
    One(RunId),
    Several,
}

pub(super) const RUN_COLUMNS: &str = "run, workflow, status, killing, aborting, exit_code, result, reason, rounds, max_rounds, dry_run, \
                           trigger, definition, created_at, started_at, ended_at, old_id";

pub(super) fn run_row(row: &Row<'_>) -> Result<RunRow, Error> {
    Ok(RunRow {
        run: row.get("run")?,
        workflow: row.get("workflow")?,
        status: row.get::<_, String>("status")?.parse()?,
        killing: row.get("killing")?,
        aborting: row.get("aborting")?,
        exit_code: row.get("exit_code")?,
        result: row.get("result")?,
        reason: row.get("reason")?,
        rounds: row.get("rounds")?,
        max_rounds: row.get("max_rounds")?,
        dry_run: row.get("dry_run")?,
        trigger: row.get("trigger")?,
        definition: row.get("definition")?,
        created_at: unsigned(row, "created_at")?,
        started_at: maybe_unsigned(row, "started_at")?,
        ended_at: maybe_unsigned(row, "ended_at")?,
        old_id: row.get("old_id")?,
    })
}

pub(super) fn find(connection: &Connection, tail: &RunTail) -> Result<Found, Error> {
    let prefix = tail.reversed();
    // Each part of the index is asked. 'g' is above every hex digit, so this bounds the prefix from above.
    let mut select = connection.prepare_cached(
        "WITH RECURSIVE parts (part) AS (
             SELECT min(seq) >> 12 FROM workflow_runs
             UNION ALL
             SELECT part + 1 FROM parts WHERE part < (SELECT max(seq) >> 12 FROM workflow_runs)
         )
         SELECT run FROM parts CROSS JOIN workflow_runs INDEXED BY runs_by_tail
         ON seq >> 12 = part AND tail >= ?1 AND tail < ?1 || 'g' LIMIT 2",
    )?;
    let found: Vec<String> = select
        .query_map([prefix], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    Ok(match found.as_slice() {
        [] => Found::None,
        [one] => one.parse().map_or(Found::None, Found::One),
        _ => Found::Several,
    })
}

fn event(row: &Row<'_>) -> Result<(RunEvent, u64), Error> {
    let payload: String = row.get("payload")?;
    Ok((
        parsed(unsigned(row, "seq")?, &payload)?,
        unsigned(row, "at")?,
    ))
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

/// What the event of this number says.
fn parsed<T: DeserializeOwned>(seq: u64, payload: &str) -> Result<T, Error> {
    serde_json::from_str(payload).map_err(|source| Error::Event {
        seq: super::sql(seq),
        source,
    })
}

/// The round of a message.
pub(super) fn round_of(event: &Logged) -> Result<u32, Error> {
    Ok(parsed::<Said>(event.seq, &event.payload)?.round)
}

/// What of a message's meta an event of its run says.
const SHOWN: [&str; 4] = ["status", "exitCode", "signal", "result"];

/// An event without what is large and said elsewhere: the prompt, and what messages hold.
pub(super) fn shortened(event: &Logged) -> EventRow {
    let mut payload: Result<Value, _> = serde_json::from_str(&event.payload);
    if let Ok(Value::Object(payload)) = &mut payload {
        payload.remove("type");
        payload.remove("prompt");
        if let Some(Value::Object(message)) = payload.get_mut("message") {
            message.remove("content");
            if let Some(Value::Object(meta)) = message.get_mut("meta") {
                meta.retain(|key, _| SHOWN.contains(&key.as_str()));
            }
        }
    }
    EventRow {
        seq: event.seq,
        event_type: event.event_type.clone(),
        payload: payload.map_or_else(|_| event.payload.clone(), |payload| payload.to_string()),
        timestamp: event.at,
    }
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
    /// One run's row.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn run(&self, id: RunId) -> Result<Option<RunRow>, Error> {
        let mut select = self.connection.prepare_cached(&format!(
            "SELECT {RUN_COLUMNS} FROM workflow_runs WHERE run = ?1"
        ))?;
        select
            .query_row([id.to_string()], |row| Ok(run_row(row)))
            .optional()?
            .transpose()
    }

    /// What happened to a run, oldest first, as far as the database has it: [`super::Handle::events`] knows the archive
    /// too. Who asked for what is not what happened to it.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn events(&self, id: RunId) -> Result<Vec<EventRow>, Error> {
        self.map_logged(id, |event| shortened(&event))
    }

    /// The same as they were written, each made something of.
    pub(super) fn map_logged<T>(
        &self,
        id: RunId,
        of: impl Fn(Logged) -> T,
    ) -> Result<Vec<T>, Error> {
        let mut select = self.connection.prepare_cached(&format!(
            "SELECT {} FROM events WHERE ref = ?1 AND source <> 'audit' ORDER BY seq",
            Logged::COLUMNS
        ))?;
        let events = select.query_map([id.to_string()], |row| Ok(of(Logged::of(row)?)))?;
        Ok(events.collect::<Result<_, _>>()?)
    }

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

    /// The runs that have not ended, in the order in which they were accepted: those in the queue as their rows say,
    /// the others rebuilt from their events.
    ///
    /// # Errors
    /// When the database cannot be read, or holds what this version does not understand.
    pub fn open_runs(&self) -> Result<Vec<Run>, Error> {
        let mut open = self.connection.prepare_cached(
            "SELECT run, workflow, status, max_rounds, dry_run, created_at FROM workflow_runs
             WHERE ended_at IS NULL ORDER BY seq",
        )?;
        // There may be very many: a vector that grows would for a moment be there twice.
        let count: u32 = self.connection.query_row(
            "SELECT count(*) FROM workflow_runs WHERE ended_at IS NULL",
            [],
            |row| row.get(0),
        )?;
        let mut runs = Vec::with_capacity(usize::try_from(count).unwrap_or_default());
        let mut rows = open.query([])?;
        while let Some(row) = rows.next()? {
            let (run, workflow): (String, String) = (row.get("run")?, row.get("workflow")?);
            let damaged = |error: InvalidName| Error::Damaged(error.to_string());
            let id: RunId = run.parse().map_err(damaged)?;
            runs.push(
                if row.get_ref("status")?.as_str() == Ok(Status::Queued.as_str()) {
                    let workflow = workflow.parse().map_err(damaged)?;
                    let at = unsigned(row, "created_at")?;
                    Run::queued(
                        id,
                        workflow,
                        at,
                        row.get("max_rounds")?,
                        row.get("dry_run")?,
                    )
                } else {
                    self.replay(id, &run)?
                },
            );
            crate::os::failpoint!("F28");
        }
        Ok(runs)
    }

    /// The same blobs, each with how many events refer to it, archived ones included once for each file.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn count_references(
        &self,
        blobs: Vec<(Digest, u64)>,
    ) -> Result<Vec<(Digest, u64, u64)>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT (SELECT count(*) FROM events WHERE blob = ?1) + (SELECT count(*) FROM archived_blobs WHERE blob = ?1) AS count",
        )?;
        let counted = blobs.into_iter().map(|(digest, size)| {
            let count = select.query_row([digest.as_str()], |row| unsigned(row, "count"))?;
            Ok((digest, size, count))
        });
        counted.collect()
    }

    /// A run from its events; texts that they have left to blobs are left out, as nothing hangs on them.
    fn replay(&self, id: RunId, text: &str) -> Result<Run, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT seq, payload, at FROM events WHERE ref = ?1 AND source = ?2 ORDER BY seq",
        )?;
        let mut run: Option<Run> = None;
        // Who asked for it is not what happened to it.
        let mut events = select.query([text, WORKFLOW])?;
        while let Some(row) = events.next()? {
            let (event, at) = event(row)?;
            run = Some(match (run, &event) {
                (None, RunEvent::Queued(accepted)) => Run::accept(id, at, accepted),
                (Some(run), event) => run
                    .after(event, at)
                    .map_err(|illegal| Error::Damaged(illegal.to_string()))?,
                (None, _) => {
                    return Err(Error::Damaged(format!(
                        "run {id} begins with {}",
                        event.name()
                    )));
                }
            });
        }
        run.ok_or_else(|| Error::Damaged(format!("run {id} has no events")))
    }

    /// What is remembered of workers.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn workers(&self) -> Result<BTreeMap<WorkflowName, WorkerRecord>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT workflow, record FROM workers")?;
        let mut rows = select.query([])?;
        let mut workers = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let (name, record): (String, String) = (row.get(0)?, row.get(1)?);
            let name: WorkflowName = name
                .parse()
                .map_err(|error: InvalidName| Error::Damaged(error.to_string()))?;
            workers.insert(name, parsed(0, &record)?);
        }
        Ok(workers)
    }

    /// The pause, if there is one.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn pause(&self) -> Result<Option<Pause>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT value FROM manager WHERE name = 'pause'")?;
        let value: Option<String> = select.query_row([], |row| row.get(0)).optional()?;
        value.map(|value| parsed(0, &value)).transpose()
    }

    /// The run of this workflow that has this key.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn run_by_key(&self, workflow: &WorkflowName, key: &str) -> Result<Option<RunId>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT run FROM workflow_runs WHERE workflow = ?1 AND key = ?2")?;
        let run: Option<String> = select
            .query_row([workflow.as_str(), key], |row| row.get(0))
            .optional()?;
        let parsed = run.map(|run| run.parse()).transpose();
        parsed.map_err(|error: InvalidName| Error::Damaged(error.to_string()))
    }
}
