//! A turn of the manager becomes durable: its events, chained, and what they add up to, in one transaction.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use rusqlite::types::Value;
use rusqlite::{Transaction, params, params_from_iter};

use super::blob::Blobs;
use super::log::{AUDIT, Entry, Head, SYSTEM, WORKFLOW};
use super::moments::Moments;
use super::{Error, Store, sql};
use crate::engine::{Event, Staged, Turn};
use crate::model::audit::Audit;
use crate::model::limits;
use crate::model::run::{Accepted, Run, RunEvent};

impl Store {
    /// Makes one turn durable, with who asked for what in it.
    ///
    /// # Errors
    /// When it may or may not be stored: the caller must treat the outcome as unknown, except for
    /// [`Error::is_full`].
    pub fn commit(&mut self, turn: &Turn, audits: &[Audit]) -> Result<(), Error> {
        let blobs = self.blobs.clone();
        self.write(|transaction, head| {
            let mut changed: BTreeMap<_, _> = turn.runs.iter().collect();
            let mut began = BTreeSet::new();
            for staged in &turn.events {
                append(transaction, head, &blobs, staged)?;
                match &staged.event {
                    // In the order of acceptance, and at once as it is when the turn is over.
                    Event::Run(id, RunEvent::Queued(accepted)) => match changed.remove(id) {
                        Some(run) => insert(transaction, run, accepted)?,
                        None => insert(
                            transaction,
                            &Run::accept(*id, staged.at, accepted),
                            accepted,
                        )?,
                    },
                    Event::Run(id, RunEvent::Started { .. }) => drop(began.insert(id)),
                    _ => {}
                }
            }
            for audit in audits {
                let entry = Entry {
                    source: AUDIT,
                    event_type: audit.verb.as_str(),
                    reference: &audit.subject,
                    payload: &json(audit)?,
                    blob: None,
                    at: audit.at,
                };
                head.append(transaction, &entry)?;
            }
            for run in changed.into_values() {
                update(transaction, run, began.contains(&run.id))?;
            }
            for (workflow, record) in &turn.workers {
                transaction
                    .prepare_cached(
                        "INSERT INTO workers (workflow, record) VALUES (?1, ?2)
                     ON CONFLICT (workflow) DO UPDATE SET record = ?2",
                    )?
                    .execute(params![workflow.as_str(), json(record)?])?;
            }
            match &turn.pause {
                Some(Some(pause)) => {
                    transaction.execute(
                        "INSERT INTO manager (name, value) VALUES ('pause', ?1)
                     ON CONFLICT (name) DO UPDATE SET value = ?1",
                        [json(pause)?],
                    )?;
                }
                Some(None) => {
                    transaction.execute("DELETE FROM manager WHERE name = 'pause'", [])?;
                }
                None => {}
            }
            Moments::of(turn).before_commit();
            Ok(())
        })
    }
}

pub(super) fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|source| Error::Event { seq: 0, source })
}

fn append(
    transaction: &Transaction<'_>,
    head: &mut Head,
    blobs: &Blobs,
    staged: &Staged,
) -> Result<(), Error> {
    let mut blob = None;
    let (source, event_type, reference, payload) = match &staged.event {
        Event::Run(run, event) => {
            let (short, long) = without_long_text(event);
            if let Some(text) = long {
                blob = Some(blobs.put(text.as_bytes())?.0);
            }
            (
                WORKFLOW,
                event.name(),
                Cow::from(run.to_string()),
                json(&*short)?,
            )
        }
        Event::Worker(name, event) => (
            WORKFLOW,
            event.name(),
            Cow::from(name.as_str()),
            json(event)?,
        ),
        Event::Manager(event) => (SYSTEM, event.name(), Cow::from("nerve"), json(event)?),
    };
    let entry = Entry {
        source,
        event_type,
        reference: &reference,
        payload: &payload,
        blob: blob.as_ref().map(super::Digest::as_str),
        at: staged.at,
    };
    head.append(transaction, &entry)
}

/// The event as its payload has it, and the text that is left out of that for its length.
pub(super) fn without_long_text(event: &RunEvent) -> (Cow<'_, RunEvent>, Option<String>) {
    let is_long = event
        .text()
        .is_some_and(|text| text.len() > limits::INLINE_BYTES);
    if !is_long {
        return (Cow::Borrowed(event), None);
    }
    let mut short = event.clone();
    let text = short.text_mut().map(std::mem::take);
    (Cow::Owned(short), text)
}

/// The row of a run that is new.
fn insert(transaction: &Transaction<'_>, run: &Run, accepted: &Accepted) -> Result<(), Error> {
    let mut insert = transaction.prepare_cached(
        "INSERT INTO workflow_runs (run, status, killing, aborting, reason, rounds, max_rounds, definition, started_at,
             exit_code, result, ended_at, tail, workflow, dry_run, trigger, key, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)",
    )?;
    let tail: String = run.id.to_string().chars().rev().collect();
    let accepted: [Value; 6] = [
        tail.into(),
        accepted.workflow.to_string().into(),
        accepted.dry_run.into(),
        accepted.trigger.to_string().into(),
        accepted.key.clone().into(),
        sql(run.created_at).into(),
    ];
    insert.execute(params_from_iter(state(run).into_iter().chain(accepted)))?;
    Ok(())
}

/// What changes at the beginning and at the end alone is written only then: it is in most of the indexes, or refers to
/// another table.
fn update(transaction: &Transaction<'_>, run: &Run, began: bool) -> Result<(), Error> {
    let (fixed, parameters) = if began {
        (", max_rounds = ?7, definition = ?8, started_at = ?9", 9)
    } else {
        ("", 6)
    };
    let (end, parameters) = match run.ended() {
        Some(_) => (", exit_code = ?10, result = ?11, ended_at = ?12", 12),
        None => ("", parameters),
    };
    let mut update = transaction.prepare_cached(&format!(
        "UPDATE OR FAIL workflow_runs SET status = ?2, killing = ?3, aborting = ?4, reason = ?5, rounds = ?6{fixed}{end}
         WHERE run = ?1",
    ))?;
    update.execute(params_from_iter(&state(run)[..parameters]))?;
    Ok(())
}

/// A run's id, what of it changes, from the seventh on what its beginning fixes, and from the tenth on its end.
fn state(run: &Run) -> [Value; 12] {
    let (started, ended) = (run.started(), run.ended());
    [
        run.id.to_string().into(),
        run.status().to_string().into(),
        run.is_killing().into(),
        run.is_aborting().into(),
        run.reason().map(str::to_owned).into(),
        run.position().rounds.into(),
        run.max_rounds.into(),
        started.map(|started| started.definition.clone()).into(),
        started.map(|started| sql(started.at)).into(),
        ended.map(|(result, _)| result.end().1).into(),
        ended.map(|(result, _)| result.to_string()).into(),
        ended.map(|(_, at)| sql(at)).into(),
    ]
}
