//! Runs that ended long ago are forgotten: their rows go, once all their events are in the archive, where they stay. An
//! event says of each that it went.
//!
//! Runs on a thread of its own and has the store do many short jobs.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::log::{Entry, SYSTEM};
use super::{Error, Handle, Store, maybe_unsigned, sql, unsigned};
use crate::model::retention::Policy;
use crate::model::time::DAY_US;
use crate::os::clock;

/// The event that says that a run's row is gone; its reference is the run.
pub const FORGOTTEN: &str = "forgotten";

/// One job of the store looks at so many rows.
const ROWS: u32 = 256;
/// Entries of an index are short.
const INDEX_ROWS: u32 = 4_096;

/// A place among the runs of a workflow: when it was accepted, and its row.
type Position = (u64, u64);

/// Some runs of a workflow.
#[derive(Debug, Clone)]
struct Doomed {
    workflow: String,
    /// Those that ended before this time, …
    ended_before: u64,
    /// …and those that are not above this place.
    beyond: Option<Position>,
}

/// The next of them, row and id, and where to go on.
struct Found {
    runs: Vec<(u64, String)>,
    next: Option<Position>,
}

/// Forgets the runs that the policy keeps no longer; says how many.
///
/// # Errors
/// When the database does not take it.
pub fn forget(store: &Handle, policy: &Policy, now: u64) -> Result<u64, Error> {
    each(store, policy, now, Store::forget)
}

/// How many runs would be forgotten if the archive had all events before a time.
///
/// # Errors
/// When the database cannot be read.
pub fn would_forget(
    store: &Handle,
    policy: &Policy,
    now: u64,
    archived_before: u64,
) -> Result<u64, Error> {
    each(store, policy, now, move |store, doomed, from| {
        let Found { runs, next } = found(&store.connection, doomed, from, archived_before)?;
        Ok((runs.len() as u64, next))
    })
}

/// Does a job with the runs that the policy keeps no longer, some at a time; the sum of what it says.
fn each(
    store: &Handle,
    policy: &Policy,
    now: u64,
    job: impl Fn(&mut Store, &Doomed, Position) -> Result<(u64, Option<Position>), Error>
    + Copy
    + Send
    + 'static,
) -> Result<u64, Error> {
    let mut sum = 0;
    let mut workflow = String::new();
    loop {
        let before = workflow.clone();
        let Some(next) = store.call_and_wait(move |store| store.workflow_after(&before))? else {
            return Ok(sum);
        };
        workflow = next;
        let (days, runs) = policy.of(&workflow).limits();
        let ended_before = days.map_or(0, |days| now.saturating_sub(u64::from(days) * DAY_US));
        let beyond = match runs {
            Some(runs) => beyond(store, &workflow, runs)?,
            None => None,
        };
        if days.is_none() && beyond.is_none() {
            continue;
        }
        let doomed = Doomed {
            workflow: workflow.clone(),
            ended_before,
            beyond,
        };
        let mut from = (0, 0);
        loop {
            let doomed = doomed.clone();
            let (count, next) = store.call_and_wait(move |store| job(store, &doomed, from))?;
            sum += count;
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
    }
}

/// The newest of the ended runs that are more than so many.
fn beyond(store: &Handle, workflow: &str, runs: u32) -> Result<Option<Position>, Error> {
    let mut left = runs;
    // Above all that there are.
    let mut place = (sql(u64::MAX).unsigned_abs(), sql(u64::MAX).unsigned_abs());
    loop {
        let skip = left.min(INDEX_ROWS);
        let name = workflow.to_owned();
        let next = store.call_and_wait(move |store| store.ended_below(&name, place, skip))?;
        match next {
            None => return Ok(None),
            Some(next) if left == skip => return Ok(Some(next)),
            Some(next) => {
                // It is the first that was not skipped.
                place = next;
                left -= skip + 1;
            }
        }
    }
}

impl Store {
    fn workflow_after(&self, workflow: &str) -> Result<Option<String>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT workflow FROM workflow_runs WHERE workflow > ?1 ORDER BY workflow LIMIT 1",
        )?;
        Ok(select.query_row([workflow], |row| row.get(0)).optional()?)
    }

    /// Among the ended runs of a workflow that are older than a place, newest first, the one after so many.
    fn ended_below(
        &self,
        workflow: &str,
        place: Position,
        skip: u32,
    ) -> Result<Option<Position>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT created_at, seq FROM workflow_runs
             WHERE workflow = ?1 AND (created_at, seq) < (?2, ?3) AND ended_at IS NOT NULL
             ORDER BY created_at DESC, seq DESC LIMIT 1 OFFSET ?4",
        )?;
        let row =
            |row: &rusqlite::Row<'_>| Ok((unsigned(row, "created_at")?, unsigned(row, "seq")?));
        let place = params![workflow, sql(place.0), sql(place.1), skip];
        Ok(select.query_row(place, row).optional()?)
    }

    /// Forgets those of the next of these runs of which the database has no event; returns how many, and where to go on.
    fn forget(
        &mut self,
        doomed: &Doomed,
        from: Position,
    ) -> Result<(u64, Option<Position>), Error> {
        self.must_have_room(0)?;
        self.write(|transaction, head| {
            let Found { runs, next } = found(transaction, doomed, from, 0)?;
            let mut delete =
                transaction.prepare_cached("DELETE FROM workflow_runs WHERE seq = ?1")?;
            let payload = serde_json::json!({ "workflow": doomed.workflow }).to_string();
            let at = clock::wall_us();
            for (seq, run) in &runs {
                delete.execute([sql(*seq)])?;
                let entry = Entry {
                    source: SYSTEM,
                    event_type: FORGOTTEN,
                    reference: run,
                    payload: &payload,
                    blob: None,
                    at,
                };
                head.append(transaction, &entry)?;
            }
            Ok((runs.len() as u64, next))
        })
    }
}

/// Those of the next of these runs of which the database has no event from a time on.
fn found(
    connection: &Connection,
    doomed: &Doomed,
    from: Position,
    archived_before: u64,
) -> Result<Found, Error> {
    let Doomed {
        workflow,
        ended_before,
        beyond,
    } = doomed;
    let newest = beyond.map_or(0, |(created_at, _)| created_at);
    let newest = newest.max(*ended_before);
    let mut select = connection.prepare_cached(
        "SELECT run, created_at, seq, ended_at, NOT EXISTS (SELECT 1 FROM events WHERE ref = run AND at >= ?6) AS archived
         FROM workflow_runs WHERE workflow = ?1 AND (created_at, seq) > (?2, ?3) AND created_at <= ?4
         ORDER BY created_at, seq LIMIT ?5",
    )?;
    let mut rows = select.query(params![
        workflow,
        sql(from.0),
        sql(from.1),
        sql(newest),
        ROWS,
        sql(archived_before)
    ])?;
    let (mut seen, mut next, mut runs) = (0, None, Vec::new());
    while let Some(row) = rows.next()? {
        let place = (unsigned(row, "created_at")?, unsigned(row, "seq")?);
        seen += 1;
        next = Some(place);
        let ended_at = maybe_unsigned(row, "ended_at")?;
        let is_old = ended_at.is_some_and(|at| at < *ended_before);
        let is_beyond = beyond.is_some_and(|beyond| place <= beyond);
        if ended_at.is_some() && (is_old || is_beyond) && row.get("archived")? {
            runs.push((place.1, row.get("run")?));
        }
    }
    Ok(Found {
        runs,
        next: next.filter(|_| seen == ROWS),
    })
}
