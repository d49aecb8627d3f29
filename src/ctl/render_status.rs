//! What `nervectl status` shows people: nerve, its workflows, and what keeps their runs from starting.

use std::fmt::Write;

use super::json::decode;
use super::paper::Paper;
use super::text::{ago, block, line, table};
use crate::bus::client::{ManagerStatus, Pause, WorkflowStatus};
use crate::model::run::Caller;
use crate::model::time::utc as time;

/// `status`: nerve, its workflows, and what is wrong with their definitions.
pub(super) fn status(status: &ManagerStatus, now: u64, paper: Paper) -> String {
    const HEADER: [&str; 6] = [
        "WORKFLOW",
        "WORKER",
        "RUNNING",
        "QUEUED",
        "PID",
        "DEFINITION",
    ];
    let mut text = format!(
        "nerve {}, started {}; {}\n{} running{}, {} queued\n",
        line(&status.version),
        time(status.started_at),
        ago(status.started_at, now),
        status.running,
        status
            .max_active
            .map_or_else(String::new, |most| format!(" of at most {most}")),
        status.queued
    );
    if let Some(paused) = &status.paused {
        let _ = writeln!(text, "{}", pause(paused, now));
    }
    if let Some(why) = &status.disk_full {
        let _ = writeln!(text, "disk full: {}", line(why));
    }
    let row = |workflow: &WorkflowStatus| {
        let mark = if workflow.error.is_some() {
            " (broken)"
        } else {
            ""
        };
        vec![
            line(&workflow.name).into_owned(),
            line(&workflow.worker).into_owned(),
            format!("{}/{}", workflow.running, workflow.concurrency),
            format!("{}/{}", workflow.queued, workflow.max_queue),
            workflow
                .main_pid
                .map_or("-".to_owned(), |pid| pid.to_string()),
            format!("{}{mark}", line(&workflow.path)),
        ]
    };
    if !status.workflows.is_empty() {
        text.push('\n');
        let rows: Vec<Vec<String>> = status.workflows.iter().map(row).collect();
        text.push_str(&table(&HEADER, &["RUNNING", "QUEUED", "PID"], &rows, paper));
    }
    let obstacles = status.workflows.iter().filter_map(|workflow| {
        let why = obstacle(workflow, now)?;
        Some(format!("{}: {why}", line(&workflow.name)))
    });
    push_block(&mut text, obstacles);
    let errors = status
        .workflows
        .iter()
        .filter_map(|workflow| Some(block(workflow.error.as_deref()?).trim_end().to_owned()));
    push_block(&mut text, errors);
    text
}

/// Texts below an empty line, if there are any.
fn push_block(text: &mut String, lines: impl Iterator<Item = String>) {
    let mut lines = lines.peekable();
    if lines.peek().is_some() {
        text.push('\n');
    }
    for line in lines {
        let _ = writeln!(text, "{line}");
    }
}

/// That, since when, by whom and why nerve is paused, and what ends it.
pub(super) fn pause(pause: &Pause, now: u64) -> String {
    let by = serde_json::from_value::<Caller>(decode(&pause.by));
    let by = by.map_or_else(|_| pause.by.clone(), |by| by.to_string());
    let reason = pause.reason.as_deref();
    let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    let text = format!("paused since {} by {by}{reason}", since(pause.since, now));
    format!("{}; `nervectl resume` ends that", line(&text))
}

/// What keeps the runs of a workflow from starting, since when, and what helps.
pub(super) fn obstacle(workflow: &WorkflowStatus, now: u64) -> Option<String> {
    const RESET: &str = "nervectl workflow reset";
    let obstacle = line(workflow.obstacle.as_deref()?);
    let mut text = match workflow.since {
        Some(at) => format!("since {}: {obstacle}", since(at, now)),
        None => obstacle.into_owned(),
    };
    let is_for_a_person = matches!(workflow.worker.as_str(), "blocked" | "stopped");
    if is_for_a_person && !text.contains(RESET) {
        let _ = write!(
            text,
            "; `{RESET} {}` lets its runs start again",
            line(&workflow.name)
        );
    }
    Some(text)
}

fn since(at: u64, now: u64) -> String {
    format!("{} ({})", time(at), ago(at, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::render::tests::{CREATED, NOW};

    fn workflow(name: &str, error: Option<&str>) -> WorkflowStatus {
        WorkflowStatus {
            name: name.to_owned(),
            worker: "absent".to_owned(),
            concurrency: 1,
            max_queue: 100,
            error: error.map(str::to_owned),
            path: format!("/etc/nerve/workflows/{name}.yaml"),
            ..WorkflowStatus::default()
        }
    }

    #[test]
    fn status_lists_workflows_and_what_is_wrong_with_them() {
        let ready = WorkflowStatus {
            worker: "ready".to_owned(),
            running: 1,
            main_pid: Some(42),
            ..workflow("a", None)
        };
        let answer = ManagerStatus {
            version: "0.1.0".to_owned(),
            running: 1,
            queued: 0,
            started_at: CREATED,
            paused: None,
            disk_full: None,
            max_active: None,
            workflows: vec![
                ready,
                workflow(
                    "broken",
                    Some("/etc/nerve/workflows/broken.yaml:3:1: error: unknown key `x`\n"),
                ),
            ],
        };
        assert_eq!(
            status(&answer, NOW, Paper::PLAIN),
            "nerve 0.1.0, started 2026-11-20 10:36:22 UTC; 5min ago
1 running, 0 queued

WORKFLOW  WORKER  RUNNING  QUEUED  PID  DEFINITION
a         ready       1/1   0/100   42  /etc/nerve/workflows/a.yaml
broken    absent      0/1   0/100    -  /etc/nerve/workflows/broken.yaml (broken)

/etc/nerve/workflows/broken.yaml:3:1: error: unknown key `x`
"
        );
    }

    #[test]
    fn status_says_what_keeps_runs_from_starting() {
        let blocked = WorkflowStatus {
            worker: "blocked".to_owned(),
            obstacle: Some("its worker died 6 times in 60 s".to_owned()),
            since: Some(CREATED),
            queued: 3,
            ..workflow("a", None)
        };
        let told = WorkflowStatus {
            obstacle: Some("stopped; `nervectl workflow reset b` starts it".to_owned()),
            since: None,
            ..blocked.clone()
        };
        let answer = ManagerStatus {
            version: "0.1.0".to_owned(),
            running: 0,
            queued: 3,
            started_at: CREATED,
            max_active: Some(8),
            paused: Some(Pause {
                reason: Some("disk\nfull".to_owned()),
                since: CREATED,
                by: r#"{"uid":0,"pid":4711,"comm":"nervectl"}"#.to_owned(),
            }),
            disk_full: Some("no space left on device".to_owned()),
            workflows: vec![blocked],
        };
        assert_eq!(
            status(&answer, NOW, Paper::PLAIN),
            "nerve 0.1.0, started 2026-11-20 10:36:22 UTC; 5min ago
0 running of at most 8, 3 queued
paused since 2026-11-20 10:36:22 UTC (5min ago) by uid 0 (nervectl, pid 4711): disk\\nfull; `nervectl resume` ends that
disk full: no space left on device

WORKFLOW  WORKER   RUNNING  QUEUED  PID  DEFINITION
a         blocked      0/1   3/100    -  /etc/nerve/workflows/a.yaml

a: since 2026-11-20 10:36:22 UTC (5min ago): its worker died 6 times in 60 s; `nervectl workflow reset a` lets its runs start again
"
        );
        assert_eq!(
            obstacle(&told, NOW).as_deref(),
            Some("stopped; `nervectl workflow reset b` starts it")
        );
    }
}
