//! What people read: tables and blocks of text, made purely from what the bus answered.

use std::fmt::Write;

use serde_json::Value;

use super::json::decode;
use super::text::{ago, block, line, span, table, time};
use crate::bus::client::{ManagerStatus, Round, Run, WorkflowStatus};
use crate::model::message::OK;
use crate::model::name::RoleName;

/// How many of an id's last digits people see.
const SHORT: usize = 8;

/// The last digits of an id.
pub(super) fn short(id: &str) -> &str {
    id.char_indices()
        .rev()
        .nth(SHORT - 1)
        .map_or(id, |(start, _)| &id[start..])
}

/// `workflow list`: a table, header included; `now` in µs since the epoch.
pub(super) fn list(runs: &[Run], now: u64) -> String {
    const HEADER: [&str; 8] = [
        "RUN", "WORKFLOW", "STATUS", "EXIT", "RESULT", "ROUNDS", "CREATED", "TIME",
    ];
    let row = |run: &Run| {
        vec![
            line(short(&run.run)).into_owned(),
            line(&run.workflow).into_owned(),
            status_word(run),
            run.exit_code
                .map_or("-".to_owned(), |code| code.to_string()),
            line(run.result.as_deref().unwrap_or("-")).into_owned(),
            run.rounds.to_string(),
            ago(run.created_at, now),
            duration(run, now).unwrap_or_else(|| "-".to_owned()),
        ]
    };
    table(
        &HEADER,
        &["EXIT", "ROUNDS"],
        &runs.iter().map(row).collect::<Vec<_>>(),
    )
}

fn status_word(run: &Run) -> String {
    let killing = if run.killing { " (killing)" } else { "" };
    format!("{}{killing}", line(&run.status))
}

/// How long it took, or has taken so far; the queue does not count.
fn duration(run: &Run, now: u64) -> Option<String> {
    Some(span(
        run.ended_at.unwrap_or(now).saturating_sub(run.started_at?),
    ))
}

/// The line that says how a run ended: `run 3fa9c1d2 failed (2, max-rounds)`, and what nerve or a person has to say of it.
pub(super) fn end(run: &Run) -> String {
    let mut text = format!(
        "run {} {} ({})",
        line(short(&run.run)),
        line(&run.status),
        facts(run)
    );
    if let Some(more) = run.reason.clone().or_else(|| detail(run)) {
        let _ = write!(text, ": {}", line(&more));
    }
    text
}

/// systemd's words, or whatever else the end of the run came with.
fn detail(run: &Run) -> Option<String> {
    let end = run
        .events
        .as_ref()?
        .iter()
        .rfind(|event| event.kind == "ended")?;
    let payload: Value = serde_json::from_str(&end.payload).ok()?;
    Some(payload.get("detail")?.as_str()?.to_owned())
}

/// What a kill that came too late says.
pub(super) fn already_ended(run: &Run, now: u64) -> String {
    let when = run
        .ended_at
        .map_or(String::new(), |at| format!(", {}", ago(at, now)));
    format!(
        "run {} had already ended: {} ({}){when}",
        line(short(&run.run)),
        line(&run.status),
        facts(run)
    )
}

fn facts(run: &Run) -> String {
    let code = run.exit_code.map(|code| code.to_string());
    let result = run
        .result
        .as_deref()
        .map(|result| line(result).into_owned());
    code.into_iter()
        .chain(result)
        .collect::<Vec<_>>()
        .join(", ")
}

/// `workflow show`: an aligned block, then the prompt, then the events.
pub(super) fn show(run: &Run, now: u64) -> String {
    let mut fields = vec![("Run", run.run.clone()), ("Workflow", run.workflow.clone())];
    fields.push((
        "Status",
        if run.exit_code.is_some() {
            format!("{} ({})", run.status, facts(run))
        } else {
            status_word(run)
        },
    ));
    let instant = |at: u64| format!("{}; {}", time(at), ago(at, now));
    let rounds = match run.max_rounds {
        Some(max) => format!("{} of at most {max}", run.rounds),
        None => run.rounds.to_string(),
    };
    let optional = [
        ("Reason", run.reason.clone()),
        ("Rounds", Some(rounds)),
        ("Created", Some(instant(run.created_at))),
        ("Started", run.started_at.map(instant)),
        ("Ended", run.ended_at.map(instant)),
        ("Time", duration(run, now)),
        ("Unit", run.unit.clone()),
        (
            "Definition",
            run.definition
                .as_ref()
                .map(|digest| format!("sha256:{digest}")),
        ),
        ("Trigger", run.trigger.clone()),
        (
            "Dry run",
            run.dry_run.filter(|dry| *dry).map(|_| "yes".to_owned()),
        ),
    ];
    fields.extend(
        optional
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for (name, value) in fields {
        let _ = writeln!(text, "{name:>width$}: {}", line(&value));
    }
    if let Some(prompt) = run.prompt.as_deref().filter(|prompt| !prompt.is_empty()) {
        let _ = write!(text, "\nPrompt:\n{}", indented(prompt));
    }
    if let Some(events) = run.events.as_ref().filter(|events| !events.is_empty()) {
        let rows: Vec<Vec<String>> = events
            .iter()
            .map(|event| {
                vec![
                    time(event.timestamp),
                    line(&event.kind).into_owned(),
                    summary(&decode(&event.payload)),
                ]
            })
            .collect();
        let _ = write!(
            text,
            "\nEvents:\n{}",
            indented(&table(&["TIME", "EVENT", "WHAT"], &[], &rows))
        );
    }
    text
}

/// The facts of a payload, `key=value` each; what is long is in the JSON, but for the reason that the run ended.
fn summary(payload: &Value) -> String {
    const LONGEST: usize = 80;
    let mut parts = Vec::new();
    collect(payload, &mut parts, &mut |key, value| {
        key == "detail" || value.chars().count() <= LONGEST
    });
    parts.join(" ")
}

fn collect(value: &Value, parts: &mut Vec<String>, fits: &mut impl FnMut(&str, &str) -> bool) {
    for (key, value) in value.as_object().into_iter().flatten() {
        let text = match value {
            Value::Null => continue,
            Value::Object(_) => {
                collect(value, parts, fits);
                continue;
            }
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if key != "type" && fits(key, &text) {
            parts.push(format!("{}={}", line(key), line(&text)));
        }
    }
}

fn indented(text: &str) -> String {
    let mut shown = String::new();
    for line in block(text).lines() {
        let _ = writeln!(shown, "{}", format!("  {line}").trim_end());
    }
    shown
}

/// `thread`: each message under a line that says whose it is; of a round that failed also why, and its stderr's tail.
pub(super) fn thread(rounds: &[Round]) -> String {
    let mut text = String::new();
    for round in rounds {
        if !text.is_empty() {
            text.push('\n');
        }
        let meta = decode(&round.meta);
        let said = |key: &str| meta.get(key).and_then(Value::as_str);
        let (status, result) = (said("status"), said("result"));
        let facts: Vec<&str> = status.into_iter().chain(result).collect();
        let facts = if facts.is_empty() {
            String::new()
        } else {
            format!(" ({})", line(&facts.join(", ")))
        };
        let who = if round.role == RoleName::START {
            "start"
        } else {
            &round.role
        };
        let _ = writeln!(
            text,
            "--- round {}: {}{facts}, {}",
            round.round,
            line(who),
            time(round.timestamp)
        );
        push_lines(&mut text, "", &round.content);
        if let Some(stderr) = said("stderr").filter(|_| status.is_some_and(|status| status != OK)) {
            push_lines(&mut text, "stderr: ", stderr);
        }
    }
    text
}

fn push_lines(text: &mut String, prefix: &str, content: &str) {
    for line in block(content).lines() {
        let _ = writeln!(text, "{}", format!("{prefix}{line}").trim_end());
    }
}

/// `status`: nerve, its workflows, and what is wrong with their definitions.
pub(super) fn status(status: &ManagerStatus, now: u64) -> String {
    const HEADER: [&str; 6] = [
        "WORKFLOW",
        "WORKER",
        "RUNNING",
        "QUEUED",
        "PID",
        "DEFINITION",
    ];
    let mut text = format!(
        "nerve {}, started {}; {}\n{} running, {} queued\n",
        line(&status.version),
        time(status.started_at),
        ago(status.started_at, now),
        status.running,
        status.queued
    );
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
        text.push_str(&table(&HEADER, &["RUNNING", "QUEUED", "PID"], &rows));
    }
    let mut errors = status
        .workflows
        .iter()
        .filter_map(|workflow| workflow.error.as_deref())
        .peekable();
    if errors.peek().is_some() {
        text.push('\n');
    }
    for error in errors {
        text.push_str(block(error).trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bus::client::Event;

    /// 2026-11-20 10:36:22 UTC
    const CREATED: u64 = 1_795_170_982_000_000;
    const NOW: u64 = CREATED + 300_000_000;

    pub(in crate::ctl) fn queued() -> Run {
        Run {
            run: "01930000000070008000000077e0b454".to_owned(),
            workflow: "check-host".to_owned(),
            status: "queued".to_owned(),
            created_at: NOW - 2_000_000,
            ..Run::default()
        }
    }

    pub(in crate::ctl) fn ended() -> Run {
        Run {
            run: "0193000000007000800000003fa9c1d2".to_owned(),
            workflow: "fix-failing-test".to_owned(),
            status: "failed".to_owned(),
            exit_code: Some(2),
            result: Some("max-rounds".to_owned()),
            rounds: 12,
            created_at: CREATED,
            started_at: Some(CREATED + 1_000_000),
            ended_at: Some(CREATED + 63_500_000),
            prompt: Some("Repair\n\u{1b}[2Jit".to_owned()),
            max_rounds: Some(12),
            dry_run: Some(false),
            trigger: Some(r#"{"type":"client","uid":0}"#.to_owned()),
            definition: Some("ab12".to_owned()),
            unit: Some("nerve-wf@fix-failing-test.service".to_owned()),
            events: Some(vec![Event {
                seq: 7,
                kind: "queued".to_owned(),
                timestamp: CREATED,
                payload: r#"{"workflow":"fix-failing-test"}"#.to_owned(),
            }]),
            ..Run::default()
        }
    }

    #[test]
    fn a_list_is_a_table() {
        let killing = Run {
            status: "started".to_owned(),
            killing: true,
            started_at: Some(NOW - 1_500_000),
            ..queued()
        };
        assert_eq!(
            list(&[queued(), killing, ended()], NOW),
            "\
RUN       WORKFLOW          STATUS             EXIT  RESULT      ROUNDS  CREATED   TIME
77e0b454  check-host        queued                -  -                0  2s ago    -
77e0b454  check-host        started (killing)     -  -                0  2s ago    1.5s
3fa9c1d2  fix-failing-test  failed                2  max-rounds      12  5min ago  1min 2s
"
        );
        assert_eq!(list(&[], NOW).lines().count(), 1);
    }

    #[test]
    fn an_end_is_one_line() {
        assert_eq!(end(&ended()), "run 3fa9c1d2 failed (2, max-rounds)");
        let run = Run {
            reason: Some("too\nslow".to_owned()),
            ..ended()
        };
        assert_eq!(end(&run), r"run 3fa9c1d2 failed (2, max-rounds): too\nslow");
        let end_event = Event {
            seq: 9,
            kind: "ended".to_owned(),
            timestamp: 0,
            payload: r#"{"result":"unit-refused","detail":"it is masked"}"#.to_owned(),
        };
        let refused = Run {
            events: Some(vec![end_event]),
            ..ended()
        };
        assert_eq!(
            end(&refused),
            "run 3fa9c1d2 failed (2, max-rounds): it is masked"
        );
        assert_eq!(
            already_ended(&ended(), NOW),
            "run 3fa9c1d2 had already ended: failed (2, max-rounds), 3min 56s ago"
        );
    }

    #[test]
    fn show_is_a_block_then_prompt_then_events() {
        assert_eq!(
            show(&ended(), NOW),
            "       Run: 0193000000007000800000003fa9c1d2
  Workflow: fix-failing-test
    Status: failed (2, max-rounds)
    Rounds: 12 of at most 12
   Created: 2026-11-20 10:36:22 UTC; 5min ago
   Started: 2026-11-20 10:36:23 UTC; 4min 59s ago
     Ended: 2026-11-20 10:37:25 UTC; 3min 56s ago
      Time: 1min 2s
      Unit: nerve-wf@fix-failing-test.service
Definition: sha256:ab12
   Trigger: {\"type\":\"client\",\"uid\":0}

Prompt:
  Repair
  \\u{1b}[2Jit

Events:
  TIME                     EVENT   WHAT
  2026-11-20 10:36:22 UTC  queued  workflow=fix-failing-test
"
        );
    }

    #[test]
    fn a_thread_says_who_spoke_and_why_a_round_failed() {
        let round = |round, role: &str, content: &str, meta: &str| Round {
            round,
            role: role.to_owned(),
            content: content.to_owned(),
            meta: meta.to_owned(),
            timestamp: CREATED,
        };
        let rounds = [
            round(0, "__start__", "Repair it", r#"{"runId":"x"}"#),
            round(
                1,
                "coder",
                "done\u{202e}",
                r#"{"status":"ok","exitCode":0,"stderr":"noise"}"#,
            ),
            round(
                2,
                "tester",
                "",
                r#"{"status":"error","result":"exit-code:2","stderr":"1 failed\n"}"#,
            ),
        ];
        assert_eq!(
            thread(&rounds),
            "--- round 0: start, 2026-11-20 10:36:22 UTC
Repair it

--- round 1: coder (ok), 2026-11-20 10:36:22 UTC
done\\u{202e}

--- round 2: tester (error, exit-code:2), 2026-11-20 10:36:22 UTC
stderr: 1 failed
"
        );
    }

    #[test]
    fn status_lists_workflows_and_what_is_wrong_with_them() {
        let workflow = |name: &str, error: Option<&str>| WorkflowStatus {
            name: name.to_owned(),
            worker: "absent".to_owned(),
            concurrency: 1,
            max_queue: 100,
            error: error.map(str::to_owned),
            path: format!("/etc/nerve/workflows/{name}.yaml"),
            ..WorkflowStatus::default()
        };
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
            workflows: vec![
                ready,
                workflow(
                    "broken",
                    Some("/etc/nerve/workflows/broken.yaml:3:1: error: unknown key `x`\n"),
                ),
            ],
        };
        assert_eq!(
            status(&answer, NOW),
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
    fn the_short_form_of_what_is_no_id_is_harmless() {
        assert_eq!(short("0193000000007000800000003fa9c1d2"), "3fa9c1d2");
        assert_eq!(short("abc"), "abc");
        assert_eq!(short("äöüäöüäöü"), "öüäöüäöü");
    }
}
