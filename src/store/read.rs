//! What the store answers: rows as people see them, and the open runs that recovery starts from.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _, Row};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::blob::Digest;
use super::log::{Logged, WORKFLOW};
use super::{Error, Store, maybe_unsigned, unsigned};
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

/// What the event of this number says.
pub(super) fn parsed<T: DeserializeOwned>(seq: u64, payload: &str) -> Result<T, Error> {
    serde_json::from_str(payload).map_err(|source| Error::Event {
        seq: super::sql(seq),
        source,
    })
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
