//! What the store answers: rows as people see them, and the open runs that recovery starts from.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{Error, Store};
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
}

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    pub seq: u64,
    pub event_type: String,
    pub payload: String,
    pub timestamp: u64,
}

/// A message and its place in the thread.
#[derive(Debug, Clone, PartialEq)]
pub struct Round {
    pub round: u32,
    pub message: Message,
}

/// Which runs to list; newest first.
#[derive(Debug, Clone, Default)]
pub struct RunFilter {
    /// Of this workflow only.
    pub workflow: Option<WorkflowName>,
    /// Only those that have not ended.
    pub active: bool,
    /// At most so many.
    pub limit: u32,
}

/// Which part of a thread; by default all of it.
#[derive(Debug, Clone, Default)]
pub struct ThreadRange {
    /// The newest so many rounds, without the start.
    pub limit: Option<u32>,
    /// Only what is older than this round.
    pub before: Option<u32>,
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

const RUN_COLUMNS: &str = "run, workflow, status, killing, aborting, exit_code, result, reason, rounds, max_rounds, dry_run, \
                           trigger, definition, created_at, started_at, ended_at";

fn unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<u64> {
    Ok(row.get::<_, i64>(column)?.unsigned_abs())
}

fn maybe_unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<Option<u64>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(i64::unsigned_abs))
}

fn run_row(row: &Row<'_>) -> Result<RunRow, Error> {
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
    })
}

pub(super) fn find(connection: &Connection, tail: &RunTail) -> Result<Found, Error> {
    let prefix = tail.reversed();
    // 'g' is above every hex digit, so this bounds the prefix from above.
    let mut select = connection.prepare_cached(
        "SELECT run FROM workflow_runs WHERE tail >= ?1 AND tail < ?1 || 'g' LIMIT 2",
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
    let seq = row.get("seq")?;
    let event = serde_json::from_str(&payload).map_err(|source| Error::Event { seq, source })?;
    Ok((event, unsigned(row, "at")?))
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

    /// Rows, newest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn runs(&self, filter: &RunFilter) -> Result<Vec<RunRow>, Error> {
        let of_workflow = if filter.workflow.is_some() {
            "workflow = ?1"
        } else {
            "?1 IS NULL"
        };
        let active = if filter.active {
            "AND ended_at IS NULL"
        } else {
            ""
        };
        let mut select = self.connection.prepare_cached(&format!(
            "SELECT {RUN_COLUMNS} FROM workflow_runs WHERE {of_workflow} {active} ORDER BY seq DESC LIMIT ?2"
        ))?;
        let name = filter.workflow.as_ref().map(WorkflowName::as_str);
        let mut rows = select.query(params![name, filter.limit])?;
        let mut runs = Vec::new();
        while let Some(row) = rows.next()? {
            runs.push(run_row(row)?);
        }
        Ok(runs)
    }

    /// What happened to a run, oldest first, without what is large and said elsewhere: the prompt, and what messages
    /// hold.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn events(&self, id: RunId) -> Result<Vec<EventRow>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT seq, type, at, json_remove(payload, '$.type', '$.prompt', '$.message.content', '$.message.meta.stderr')
                 AS payload FROM events WHERE ref = ?1 ORDER BY seq",
        )?;
        let row = |row: &Row<'_>| {
            Ok(EventRow {
                seq: unsigned(row, "seq")?,
                event_type: row.get("type")?,
                payload: row.get("payload")?,
                timestamp: unsigned(row, "at")?,
            })
        };
        Ok(select
            .query_map([id.to_string()], row)?
            .collect::<Result<_, _>>()?)
    }

    /// Part of a thread, oldest first; the start is round 0.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn thread(&self, id: RunId, range: &ThreadRange) -> Result<Vec<Round>, Error> {
        let Some(row) = self.run(id)? else {
            return Ok(Vec::new());
        };
        // Rounds are dense, so that the newest rows can be skipped by number.
        let skipped = range
            .before
            .map_or(0, |before| (row.rounds + 1).saturating_sub(before));
        let mut select = self.connection.prepare_cached(
            "SELECT seq, payload, at FROM events WHERE ref = ?1 AND type IN (?2, ?3) ORDER BY seq DESC LIMIT ?4 OFFSET ?5",
        )?;
        let limit = range.limit.map_or(i64::MAX, i64::from);
        // Who counts rounds does not mean the start.
        let start = if range.limit.is_none() {
            RunEvent::QUEUED
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
        let (mut thread, mut bytes) = (Vec::new(), 0);
        while let Some(row_of_event) = rows.next()? {
            bytes += row_of_event
                .get_ref("payload")?
                .as_bytes()
                .map_or(0, <[u8]>::len);
            let (round, message) = match event(row_of_event)? {
                (RunEvent::ThreadWorkflowMessage { round, message }, _) => (round, message),
                (RunEvent::Queued(accepted), at) => {
                    (0, accepted.start_message(id, row.max_rounds, at))
                }
                _ => continue,
            };
            if range.bytes.is_some_and(|most| bytes > most) && !thread.is_empty() {
                break;
            }
            thread.push(Round { round, message });
        }
        thread.reverse();
        Ok(thread)
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

    fn replay(&self, id: RunId, text: &str) -> Result<Run, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT seq, payload, at FROM events WHERE ref = ?1 ORDER BY seq")?;
        let mut run: Option<Run> = None;
        let mut events = select.query([text])?;
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
            workers.insert(name, json(&record)?);
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
        value.as_deref().map(json).transpose()
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

fn json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|source| Error::Event { seq: 0, source })
}
