//! What the interface answers, made from what it found: dictionaries, and refusals that say when and who.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::error::Error;
use super::words::{Event, ListFilter, Pause, Run, WorkflowStatus};
use crate::engine::{self, Answer};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Caller, RunEvent};
use crate::model::status::{RunResult, UnknownWord};
use crate::model::time::utc;
use crate::model::worker;
use crate::model::workflow::{OnFull, Overflow};
use crate::os::log::whole;
use crate::store::{self, EventRow, RunFilter, RunRow};
use crate::systemd::Systemd;

/// So long systemd may take to say who the workers are; a status without their pids is better than none.
const PATIENCE: Duration = Duration::from_secs(2);

pub(super) fn invalid(error: impl std::fmt::Display) -> Error {
    Error::InvalidArgument(error.to_string())
}

#[expect(clippy::needless_pass_by_value, reason = "called by map_err")]
pub(super) fn unreadable(error: store::Error) -> Error {
    let why = whole(&error);
    tracing::error!("failed to read the store: {why}");
    if error.is_damage() {
        return Error::Damaged(format!(
            "{why}; `nervectl store check` tells what else is wrong"
        ));
    }
    Error::Internal(why)
}

pub(super) fn no_space(why: &str, what: &str) -> Error {
    Error::NoSpace(format!("{why}; {what}"))
}

pub(super) fn unknown_workflow(workflow: &WorkflowName) -> Error {
    Error::UnknownWorkflow(format!(
        "no workflow is called {workflow}; `nervectl status` lists those that there are"
    ))
}

/// A change that is done or not, of this workflow or of nerve itself.
pub(super) fn done(answer: Answer, workflow: Option<&WorkflowName>) -> Result<(), Error> {
    match (answer, workflow) {
        (Answer::UnknownWorkflow, Some(workflow)) => Err(unknown_workflow(workflow)),
        (Answer::NoSpace(why), _) => Err(no_space(&why, "nothing has changed")),
        _ => Ok(()),
    }
}

/// What a person gave as a reason, if it is one.
pub(super) fn reason(text: String) -> Result<Option<String>, Error> {
    if text.len() > limits::REASON_BYTES {
        let most = limits::REASON_BYTES;
        return Err(Error::InvalidArgument(format!(
            "the reason is longer than {most} bytes"
        )));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// Who started a run.
pub(super) fn trigger(caller: &Caller) -> Value {
    let mut trigger = json!(caller);
    trigger["type"] = "client".into();
    trigger
}

pub(super) fn started(
    run: RunId,
    dropped: Option<(RunResult, String)>,
    fault: Option<String>,
) -> (String, String, String) {
    let run = run.to_string();
    match (dropped, fault) {
        (Some((result, detail)), _) => (run, result.to_string(), detail),
        (None, Some(fault)) => {
            let detail = format!(
                "the last good definition is in force, since the newest is broken: {fault}"
            );
            (run, String::new(), detail)
        }
        (None, None) => (run, String::new(), String::new()),
    }
}

/// What the end of a run came with.
pub(super) fn detail(events: &[EventRow]) -> String {
    let end = events
        .iter()
        .rfind(|event| event.event_type == RunEvent::ENDED);
    let detail = end.and_then(|end| Some(payload(end).get("detail")?.as_str()?.to_owned()));
    detail.unwrap_or_default()
}

fn payload(event: &EventRow) -> Value {
    serde_json::from_str(&event.payload).unwrap_or_default()
}

/// Why a run can be ended no more: what ended it or is ending it, when, and by whom.
pub(super) fn refusal(run: RunId, row: &RunRow, events: &[EventRow]) -> Error {
    let run = run.short();
    // A kill overrides an abort, and of several kills the newest counts.
    let request = |kind: &str| events.iter().rfind(|event| event.event_type == kind);
    let (asked, doing) = match (request(RunEvent::KILL), request(RunEvent::ABORT)) {
        (Some(kill), _) => (Some(kill), "killed"),
        (None, abort) => (abort, "aborted"),
    };
    let asked = asked.map(|event| {
        let by = serde_json::from_value::<Caller>(payload(event)["by"].clone());
        let by = by.map_or_else(|_| String::new(), |by| format!(" by {by}"));
        format!("asked {}{by}", utc(event.timestamp))
    });
    let Some(ended_at) = row.ended_at else {
        let asked = asked.map_or_else(String::new, |asked| format!(": {asked}"));
        return Error::AlreadyEnding(format!("run {run} is being {doing} already{asked}"));
    };
    let asked = asked.map_or_else(String::new, |asked| format!(", {asked}"));
    let (status, at) = (row.status, utc(ended_at));
    let result = row.result.as_ref();
    let result = result.map_or_else(String::new, |result| format!(" ({result})"));
    Error::AlreadyEnded(format!(
        "run {run} had already ended: {status}{result} at {at}{asked}"
    ))
}

pub(super) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// What the store is asked for, where `before` was found to be this run.
pub(super) fn run_filter(filter: ListFilter, before: Option<RunId>) -> Result<RunFilter, Error> {
    let workflow = filter.workflow.map(|name| name.parse()).transpose();
    let statuses = filter.statuses.unwrap_or_default();
    let statuses = statuses.iter().map(|status| status.parse()).collect();
    Ok(RunFilter {
        workflow: workflow.map_err(invalid)?,
        statuses: Result::map_err(statuses, |error: UnknownWord| invalid(error))?,
        exit_code: filter.exit_code,
        active: filter.active.unwrap_or(false),
        since: filter.since,
        until: filter.until,
        before,
        limit: filter
            .limit
            .unwrap_or(limits::LIST_ROWS)
            .min(limits::LIST_ROWS),
    })
}

pub(super) fn summarised(row: RunRow) -> Run {
    Run {
        run: row.run,
        workflow: row.workflow,
        status: row.status.to_string(),
        killing: row.killing,
        aborting: row.aborting,
        exit_code: row.exit_code.map(i32::from),
        result: row.result,
        reason: row.reason,
        rounds: row.rounds,
        created_at: row.created_at,
        started_at: row.started_at,
        ended_at: row.ended_at,
        dry_run: Some(row.dry_run),
        ..Run::default()
    }
}

pub(super) fn event(row: EventRow) -> Event {
    Event {
        seq: row.seq,
        kind: row.event_type,
        timestamp: row.timestamp,
        payload: row.payload,
    }
}

pub(super) fn pause(pause: worker::Pause) -> Pause {
    Pause {
        reason: pause.reason,
        since: pause.at,
        by: json!(pause.by).to_string(),
    }
}

/// The processes of the workers that there are, as far as systemd says so in time.
pub(super) async fn main_pids(
    systemd: Option<&Systemd>,
    workflows: &[engine::WorkflowStatus],
) -> HashMap<WorkflowName, u32> {
    let mut pids = HashMap::new();
    let Some(systemd) = systemd else {
        return pids;
    };
    let deadline = Instant::now() + PATIENCE;
    for workflow in workflows.iter().filter(|known| known.worker != "absent") {
        match timeout_at(deadline, systemd.identity(&workflow.name)).await {
            Ok(Ok(Some(identity))) if identity.main_pid != 0 => {
                pids.insert(workflow.name.clone(), identity.main_pid);
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    pids
}

pub(super) fn workflow(
    workflow: engine::WorkflowStatus,
    path: Option<&PathBuf>,
    main_pid: Option<u32>,
) -> WorkflowStatus {
    let definition = workflow.definition.as_ref();
    let limits = definition.map(|definition| &definition.workflow);
    let (since, obstacle) = workflow
        .obstacle
        .map_or((None, None), |(since, text)| (since, Some(text)));
    WorkflowStatus {
        worker: workflow.worker.to_owned(),
        invocation: workflow.invocation,
        obstacle,
        since,
        running: count(workflow.running),
        queued: count(workflow.queued),
        concurrency: limits.map_or(0, |limits| limits.concurrency),
        overflow: limits.map(|limits| overflow(limits.overflow).to_owned()),
        max_queue: limits.map_or(0, |limits| limits.max_queue),
        on_full: limits.map(|limits| on_full(limits.on_full).to_owned()),
        error: workflow.fault,
        path: path.map_or_else(String::new, |path| path.display().to_string()),
        unit: workflow.name.unit(),
        main_pid,
        name: workflow.name.into(),
    }
}

fn overflow(overflow: Overflow) -> &'static str {
    match overflow {
        Overflow::Queue => "queue",
        Overflow::Drop => "drop",
        Overflow::Latest => "latest",
    }
}

fn on_full(on_full: OnFull) -> &'static str {
    match on_full {
        OnFull::Evict => "evict",
        OnFull::Refuse => "refuse",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::status::Status;

    /// 2026-11-20 10:36:22 UTC
    const AT: u64 = 1_795_170_982_000_000;

    fn row(status: Status, result: Option<&str>) -> RunRow {
        RunRow {
            run: RunId::from_bits(0x3fa9_c1d2).to_string(),
            workflow: "a".to_owned(),
            status,
            killing: false,
            aborting: result.is_none(),
            exit_code: None,
            result: result.map(str::to_owned),
            reason: None,
            rounds: 0,
            max_rounds: None,
            dry_run: false,
            trigger: String::new(),
            definition: None,
            created_at: 0,
            started_at: None,
            ended_at: result.map(|_| AT + 2_000_000),
            old_id: None,
        }
    }

    fn asked(kind: &str, by: &str, timestamp: u64) -> EventRow {
        EventRow {
            seq: 1,
            event_type: kind.to_owned(),
            payload: format!(r#"{{"reason":null{by}}}"#),
            timestamp,
        }
    }

    #[test]
    fn a_refusal_says_what_when_and_who() {
        let by = r#","by":{"uid":0,"pid":4711,"comm":"nervectl"}"#;
        let abort = asked(RunEvent::ABORT, by, AT);
        let kill = asked(RunEvent::KILL, r#","by":{"uid":7}"#, AT + 1_000_000);
        // As nerved of before wrote it.
        let nameless = asked(RunEvent::KILL, "", AT);
        let text = |row: &RunRow, events: &[EventRow]| {
            let error = refusal(RunId::from_bits(0x3fa9_c1d2), row, events);
            assert_eq!(error.exit_status(), 68);
            error.to_string()
        };
        let ending = row(Status::Started, None);
        assert_eq!(
            text(&ending, std::slice::from_ref(&abort)),
            "run 3fa9c1d2 is being aborted already: asked 2026-11-20 10:36:22 UTC by uid 0 (nervectl, pid 4711)"
        );
        assert_eq!(
            text(&ending, &[abort.clone(), kill.clone()]),
            "run 3fa9c1d2 is being killed already: asked 2026-11-20 10:36:23 UTC by uid 7"
        );
        assert_eq!(
            text(&row(Status::Completed, Some("success")), &[]),
            "run 3fa9c1d2 had already ended: completed (success) at 2026-11-20 10:36:24 UTC"
        );
        assert_eq!(
            text(&row(Status::Aborted, Some("aborted")), &[abort]),
            "run 3fa9c1d2 had already ended: aborted (aborted) at 2026-11-20 10:36:24 UTC, \
             asked 2026-11-20 10:36:22 UTC by uid 0 (nervectl, pid 4711)"
        );
        assert_eq!(
            text(&row(Status::Killed, Some("killed")), &[nameless]),
            "run 3fa9c1d2 had already ended: killed (killed) at 2026-11-20 10:36:24 UTC, asked 2026-11-20 10:36:22 UTC"
        );
    }

    #[test]
    fn a_trigger_says_who_and_leaves_out_what_is_not_known() {
        let caller = |pid, comm: Option<&str>| Caller {
            uid: 0,
            pid,
            comm: comm.map(str::to_owned),
            unit: None,
        };
        assert_eq!(
            trigger(&caller(Some(7), Some("nervectl"))),
            json!({"type": "client", "uid": 0, "pid": 7, "comm": "nervectl"})
        );
        assert_eq!(
            trigger(&caller(None, None)),
            json!({"type": "client", "uid": 0})
        );
    }

    #[test]
    fn a_change_of_what_is_not_there_is_refused() {
        let workflow: WorkflowName = "a".parse().unwrap();
        let status = |answer, workflow| done(answer, workflow).map_err(|error| error.exit_status());
        assert_eq!(status(Answer::Done, Some(&workflow)), Ok(()));
        assert_eq!(status(Answer::UnknownWorkflow, Some(&workflow)), Err(66));
        assert_eq!(status(Answer::NoSpace("full".to_owned()), None), Err(70));
    }
}
