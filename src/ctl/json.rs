//! What programs read: the documented keys in the documented order, all of them, null where there is nothing yet.
//! D-Bus has no null, so there the keys are absent; and it has no objects of free shape, so there they are JSON text.

use serde::Serialize;
use serde_json::Value;

use crate::bus::client::{Event, ManagerStatus, Round, Run, WorkflowStatus};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct RunObject<'a> {
    run: &'a str,
    workflow: &'a str,
    status: &'a str,
    killing: bool,
    aborting: bool,
    exit_code: Option<i32>,
    result: Option<&'a str>,
    reason: Option<&'a str>,
    rounds: u32,
    created_at: u64,
    started_at: Option<u64>,
    ended_at: Option<u64>,
    dry_run: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct DetailObject<'a> {
    #[serde(flatten)]
    run: RunObject<'a>,
    prompt: Option<&'a str>,
    max_rounds: Option<u32>,
    trigger: Value,
    definition: Option<&'a str>,
    unit: Option<&'a str>,
    /// Why it is not executed, when something is in its way.
    waits: Option<String>,
    events: Vec<EventObject<'a>>,
}

#[derive(Serialize)]
struct EventObject<'a> {
    seq: u64,
    #[serde(rename = "type")]
    kind: &'a str,
    timestamp: u64,
    payload: Value,
}

#[derive(Serialize)]
struct RoundObject<'a> {
    round: u32,
    role: &'a str,
    content: &'a str,
    meta: Value,
    timestamp: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StatusObject<'a> {
    version: &'a str,
    started_at: u64,
    running: u32,
    queued: u32,
    max_active: Option<u32>,
    paused: Option<PauseObject<'a>>,
    disk_full: Option<&'a str>,
    workflows: Vec<WorkflowObject<'a>>,
}

#[derive(Serialize)]
struct PauseObject<'a> {
    reason: Option<&'a str>,
    since: u64,
    by: Value,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct WorkflowObject<'a> {
    name: &'a str,
    worker: &'a str,
    invocation: Option<&'a str>,
    obstacle: Option<&'a str>,
    since: Option<u64>,
    running: u32,
    queued: u32,
    concurrency: u32,
    overflow: Option<&'a str>,
    max_queue: u32,
    on_full: Option<&'a str>,
    error: Option<&'a str>,
    path: &'a str,
    unit: &'a str,
    main_pid: Option<u32>,
}

impl<'a> From<&'a ManagerStatus> for StatusObject<'a> {
    fn from(status: &'a ManagerStatus) -> Self {
        Self {
            version: &status.version,
            started_at: status.started_at,
            running: status.running,
            queued: status.queued,
            max_active: status.max_active,
            paused: status.paused.as_ref().map(|pause| PauseObject {
                reason: pause.reason.as_deref(),
                since: pause.since,
                by: decode(&pause.by),
            }),
            disk_full: status.disk_full.as_deref(),
            workflows: status.workflows.iter().map(WorkflowObject::from).collect(),
        }
    }
}

impl<'a> From<&'a WorkflowStatus> for WorkflowObject<'a> {
    fn from(workflow: &'a WorkflowStatus) -> Self {
        Self {
            name: &workflow.name,
            worker: &workflow.worker,
            invocation: workflow.invocation.as_deref(),
            obstacle: workflow.obstacle.as_deref(),
            since: workflow.since,
            running: workflow.running,
            queued: workflow.queued,
            concurrency: workflow.concurrency,
            overflow: workflow.overflow.as_deref(),
            max_queue: workflow.max_queue,
            on_full: workflow.on_full.as_deref(),
            error: workflow.error.as_deref(),
            path: &workflow.path,
            unit: &workflow.unit,
            main_pid: workflow.main_pid,
        }
    }
}

impl<'a> From<&'a Run> for RunObject<'a> {
    fn from(run: &'a Run) -> Self {
        Self {
            run: &run.run,
            workflow: &run.workflow,
            status: &run.status,
            killing: run.killing,
            aborting: run.aborting,
            exit_code: run.exit_code,
            result: run.result.as_deref(),
            reason: run.reason.as_deref(),
            rounds: run.rounds,
            created_at: run.created_at,
            started_at: run.started_at,
            ended_at: run.ended_at,
            dry_run: run.dry_run.unwrap_or(false),
        }
    }
}

impl<'a> From<&'a Run> for DetailObject<'a> {
    fn from(run: &'a Run) -> Self {
        Self {
            run: run.into(),
            prompt: run.prompt.as_deref(),
            max_rounds: run.max_rounds,
            trigger: run.trigger.as_deref().map_or(Value::Null, decode),
            definition: run.definition.as_deref(),
            unit: run.unit.as_deref(),
            waits: None,
            events: run.events.iter().flatten().map(EventObject::from).collect(),
        }
    }
}

impl<'a> From<&'a Event> for EventObject<'a> {
    fn from(event: &'a Event) -> Self {
        let Event {
            seq,
            kind,
            timestamp,
            payload,
        } = event;
        Self {
            seq: *seq,
            kind,
            timestamp: *timestamp,
            payload: decode(payload),
        }
    }
}

impl<'a> From<&'a Round> for RoundObject<'a> {
    fn from(round: &'a Round) -> Self {
        let Round {
            round,
            role,
            content,
            meta,
            timestamp,
        } = round;
        Self {
            round: *round,
            role,
            content,
            meta: decode(meta),
            timestamp: *timestamp,
        }
    }
}

/// JSON text; what is none is kept as a string rather than lost.
pub(super) fn decode(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// `workflow list -o json`
pub(super) fn list(runs: &[Run]) -> String {
    array(&runs.iter().map(RunObject::from).collect::<Vec<_>>())
}

/// `workflow show -o json`
pub(super) fn show(run: &Run, waits: Option<String>) -> String {
    let mut detail = DetailObject::from(run);
    detail.waits = waits;
    array(&[detail])
}

/// `status -o json`
pub(super) fn status(status: &ManagerStatus) -> String {
    array(&[StatusObject::from(status)])
}

/// `thread -o json`
pub(super) fn thread(rounds: &[Round]) -> String {
    array(&rounds.iter().map(RoundObject::from).collect::<Vec<_>>())
}

pub(super) fn array<T: Serialize>(items: &[T]) -> String {
    // Strings, numbers and maps with string keys: there is nothing in it that JSON cannot say.
    let mut text = serde_json::to_string_pretty(items).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::render::tests::{ended, queued};

    #[test]
    fn a_run_has_all_its_keys_in_the_documented_order() {
        let text = list(&[queued()]);
        let keys: Vec<&str> = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix('"')?.split('"').next())
            .collect();
        assert_eq!(
            keys,
            [
                "run",
                "workflow",
                "status",
                "killing",
                "aborting",
                "exitCode",
                "result",
                "reason",
                "rounds",
                "createdAt",
                "startedAt",
                "endedAt",
                "dryRun"
            ]
        );
        assert!(
            text.contains("\"exitCode\": null") && text.contains("\"endedAt\": null"),
            "{text}"
        );
        assert_eq!(list(&[]), "[]\n");
    }

    #[test]
    fn show_decodes_what_the_bus_carries_as_text() {
        let value: Value = serde_json::from_str(&show(&ended(), None)).unwrap();
        assert_eq!(value.as_array().map(Vec::len), Some(1));
        assert_eq!(value[0]["exitCode"], 2);
        assert_eq!(
            value[0]["trigger"],
            serde_json::json!({"type": "client", "uid": 0})
        );
        assert_eq!(
            value[0]["events"][0]["payload"],
            serde_json::json!({"workflow": "fix-failing-test"})
        );
        assert_eq!(value[0]["events"][0]["type"], "queued");
        let text = show(&ended(), None);
        let place = |key: &str| text.find(&format!("\"{key}\"")).unwrap();
        let order = [
            "endedAt",
            "dryRun",
            "prompt",
            "maxRounds",
            "trigger",
            "definition",
            "unit",
            "events",
        ];
        assert!(
            order.windows(2).all(|pair| place(pair[0]) < place(pair[1])),
            "{text}"
        );
    }

    #[test]
    fn status_has_all_its_keys() {
        let pause = crate::bus::client::Pause {
            reason: None,
            since: 5,
            by: r#"{"uid":0}"#.to_owned(),
        };
        let answer = ManagerStatus {
            version: "0.1.0".to_owned(),
            paused: Some(pause),
            workflows: vec![WorkflowStatus {
                name: "a".to_owned(),
                worker: "blocked".to_owned(),
                obstacle: Some("why".to_owned()),
                overflow: Some("queue".to_owned()),
                ..WorkflowStatus::default()
            }],
            ..ManagerStatus::default()
        };
        let value: Value = serde_json::from_str(&status(&answer)).unwrap();
        assert_eq!(
            value,
            serde_json::json!([{
                "version": "0.1.0", "startedAt": 0, "running": 0, "queued": 0, "maxActive": null,
                "paused": {"reason": null, "since": 5, "by": {"uid": 0}},
                "diskFull": null,
                "workflows": [{
                    "name": "a", "worker": "blocked", "invocation": null, "obstacle": "why", "since": null,
                    "running": 0, "queued": 0, "concurrency": 0, "overflow": "queue", "maxQueue": 0, "onFull": null,
                    "error": null, "path": "", "unit": "", "mainPid": null
                }]
            }])
        );
    }

    #[test]
    fn a_round_is_five_keys_and_its_meta_an_object() {
        let round = Round {
            round: 1,
            role: "coder".to_owned(),
            content: "done\u{1b}".to_owned(),
            meta: r#"{"status":"ok"}"#.to_owned(),
            timestamp: 5,
        };
        let value: Value = serde_json::from_str(&thread(&[round])).unwrap();
        assert_eq!(
            value,
            serde_json::json!([{"round": 1, "role": "coder", "content": "done\u{1b}", "meta": {"status": "ok"}, "timestamp": 5}])
        );
    }
}
