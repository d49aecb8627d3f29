//! What people read: tables and blocks of text, made purely from what the bus answered.

use std::fmt::Write;

use serde_json::Value;

use super::json::decode;
use super::paper::Paper;
use super::render_status;
use super::text::{ago, block, line, span, table};
use crate::bus::client::{Dropped, ManagerStatus, Round, Run};
use crate::model::message::ERROR;
use crate::model::name::{RoleName, RunId};
use crate::model::run::{Caller, RunEvent};
use crate::model::status::Status;
use crate::model::time::utc as time;
use crate::model::worker::Death;

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
pub(super) fn list(runs: &[Run], now: u64, paper: Paper) -> String {
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
        paper,
    )
}

/// `started (killing, dry run)`
pub(super) fn status_word(run: &Run) -> String {
    let ending = match (run.killing, run.aborting) {
        (true, _) => Some("killing"),
        (false, true) => Some("aborting"),
        (false, false) => None,
    };
    let rehearsal = (run.dry_run == Some(true)).then_some("dry run");
    let more: Vec<&str> = ending.into_iter().chain(rehearsal).collect();
    let status = line(&run.status);
    if more.is_empty() {
        status.into_owned()
    } else {
        format!("{status} ({})", more.join(", "))
    }
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

/// The line that says that a run was dropped at once, and why.
pub(super) fn dropped(run: RunId, dropped: &Dropped) -> String {
    let (result, run) = (line(&dropped.result), run.short());
    let mut text = format!("run {run} {} (75, {result})", Status::Dropped);
    if !dropped.detail.is_empty() {
        let _ = write!(text, ": {}", line(&dropped.detail));
    }
    text
}

/// The line that says why a run in the queue does not start, when something is in its way.
pub(super) fn waits(run: &Run, status: &ManagerStatus, now: u64) -> Option<String> {
    let is_queued = run.status == Status::Queued.as_str();
    let why = match status.paused.as_ref().filter(|_| is_queued) {
        Some(pause) => format!("nerve is {}", render_status::pause(pause, now)),
        None if is_queued && status.disk_full.is_some() => {
            format!("the disk is full: {}", line(status.disk_full.as_deref()?))
        }
        None => {
            let mut all = status.workflows.iter();
            let workflow = all.find(|workflow| workflow.name == run.workflow)?;
            render_status::obstacle(workflow, now)?
        }
    };
    Some(why)
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
pub(super) fn show(run: &Run, waits: Option<String>, now: u64, paper: Paper) -> String {
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
        ("Waits", waits),
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
        let value = line(&value);
        let value = match name {
            "Status" => paper.tint(&value),
            _ => value.into_owned(),
        };
        let _ = writeln!(text, "{name:>width$}: {value}");
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
                    what(&event.kind, &decode(&event.payload)),
                ]
            })
            .collect();
        let _ = write!(
            text,
            "\nEvents:\n{}",
            indented(&table(&["TIME", "EVENT", "WHAT"], &[], &rows, Paper::PLAIN))
        );
    }
    text
}

/// What an event has to say.
pub(super) fn what(kind: &str, payload: &Value) -> String {
    let text = match kind {
        "worker-lost" => worker_lost(payload),
        "attempt-failed" => attempt_failed(payload),
        RunEvent::KILL | RunEvent::ABORT => Some(request(payload)),
        _ => None,
    };
    text.unwrap_or_else(|| summary(payload))
}

/// `signal, SIGSEGV; attempt 2, invocation 0f3a…`
fn worker_lost(payload: &Value) -> Option<String> {
    let death: Death = serde_json::from_value(payload.clone()).ok()?;
    let invocation = payload.get("invocation")?.as_str()?;
    let attempt = payload.get("attempt")?.as_u64()?;
    let text = format!("{death}; attempt {attempt}, invocation {invocation}");
    Some(line(&text).into_owned())
}

/// `exit-code:75; attempt 2 of round 1 by coder, again after 1s`
fn attempt_failed(payload: &Value) -> Option<String> {
    let message = &payload["message"];
    let (role, result) = (
        message["role"].as_str()?,
        message["meta"]["result"].as_str(),
    );
    let (round, attempt) = (payload["round"].as_u64()?, payload["attempt"].as_u64()?);
    let (result, delay) = (
        result.unwrap_or("no result"),
        span(payload["delayUs"].as_u64()?),
    );
    let text =
        format!("{result}; attempt {attempt} of round {round} by {role}, again after {delay}");
    Some(line(&text).into_owned())
}

/// `by uid 0 (nervectl, pid 4711), grace 5s: too slow`
fn request(payload: &Value) -> String {
    let by = serde_json::from_value::<Caller>(payload["by"].clone());
    let by = by.ok().map(|by| format!("by {by}"));
    let grace = payload["graceUs"].as_u64();
    let grace = grace.map(|us| format!("grace {}", span(us)));
    let facts: Vec<String> = by.into_iter().chain(grace).collect();
    let reason = payload["reason"].as_str();
    let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    line(&format!("{}{reason}", facts.join(", "))).into_owned()
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

/// `thread`: each message under a line that says whose it is; of a round that failed also why, and its stderr's tail; of
/// one that was rehearsed its prompt.
pub(super) fn thread(
    rounds: &[Round],
    mut when: impl FnMut(&Round) -> String,
    paper: Paper,
) -> String {
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
            format!(" ({})", paper.tint(&line(&facts.join(", "))))
        };
        let who = if round.role == RoleName::START {
            "start"
        } else {
            &round.role
        };
        let (number, who, when) = (round.round, line(who), when(round));
        let _ = writeln!(text, "--- round {number}: {who}{facts}, {when}");
        push_lines(&mut text, "", &round.content);
        let is_dry = meta.get("dryRun") == Some(&Value::Bool(true));
        if let Some(prompt) = said("prompt").filter(|_| is_dry) {
            push_lines(&mut text, "prompt: ", prompt);
        }
        if let Some(stderr) = said("stderr").filter(|_| status == Some(ERROR)) {
            push_lines(&mut text, "stderr: ", stderr);
        }
    }
    text
}

/// When a message was said.
pub(super) fn moment(round: &Round) -> String {
    time(round.timestamp)
}

fn push_lines(text: &mut String, prefix: &str, content: &str) {
    for line in block(content).lines() {
        let _ = writeln!(text, "{}", format!("{prefix}{line}").trim_end());
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bus::client::{Event, Pause, WorkflowStatus};

    /// 2026-11-20 10:36:22 UTC
    pub(in crate::ctl) const CREATED: u64 = 1_795_170_982_000_000;
    pub(in crate::ctl) const NOW: u64 = CREATED + 300_000_000;

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
        let aborting = Run {
            killing: false,
            aborting: true,
            ..killing.clone()
        };
        let rehearsal = Run {
            dry_run: Some(true),
            ..aborting.clone()
        };
        assert_eq!(
            list(
                &[queued(), killing, aborting, rehearsal, ended()],
                NOW,
                Paper::PLAIN
            ),
            "\
RUN       WORKFLOW          STATUS                       EXIT  RESULT      ROUNDS  CREATED   TIME
77e0b454  check-host        queued                          -  -                0  2s ago    -
77e0b454  check-host        started (killing)               -  -                0  2s ago    1.5s
77e0b454  check-host        started (aborting)              -  -                0  2s ago    1.5s
77e0b454  check-host        started (aborting, dry run)     -  -                0  2s ago    1.5s
3fa9c1d2  fix-failing-test  failed                          2  max-rounds      12  5min ago  1min 2s
"
        );
        assert_eq!(list(&[], NOW, Paper::PLAIN).lines().count(), 1);
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
            show(&ended(), None, NOW, Paper::PLAIN),
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
    fn events_say_who_wanted_what_and_how_a_worker_died() {
        let by = r#""by":{"uid":0,"pid":4711,"comm":"nervectl"}"#;
        let lost = r#""invocation":"0f3a","attempt":2,"cause""#;
        for (kind, payload, text) in [
            (
                "worker-lost",
                format!(r#"{{{lost}:"signal","signal":"SIGSEGV"}}"#),
                "signal, SIGSEGV; attempt 2, invocation 0f3a",
            ),
            (
                "worker-lost",
                format!(r#"{{{lost}:"of-a-later-version"}}"#),
                "unknown; attempt 2, invocation 0f3a",
            ),
            (
                "abort-requested",
                format!(r#"{{"reason":"too\nslow",{by}}}"#),
                r"by uid 0 (nervectl, pid 4711): too\nslow",
            ),
            (
                "kill-requested",
                format!(r#"{{"reason":null,"graceUs":5000000,{by}}}"#),
                "by uid 0 (nervectl, pid 4711), grace 5s",
            ),
            // As nerved of before wrote it.
            (
                "kill-requested",
                r#"{"reason":"r","graceUs":0}"#.to_owned(),
                "grace 0s: r",
            ),
            (
                "ended",
                r#"{"result":"killed"}"#.to_owned(),
                "result=killed",
            ),
        ] {
            assert_eq!(what(kind, &decode(&payload)), text);
        }
    }

    #[test]
    fn what_was_dropped_and_what_waits_says_why() {
        let id: RunId = ended().run.parse().unwrap();
        let refused = |detail: &str| Dropped {
            result: "queue-full".to_owned(),
            detail: detail.to_owned(),
        };
        assert_eq!(
            dropped(id, &refused("all slots\nare taken")),
            r"run 3fa9c1d2 dropped (75, queue-full): all slots\nare taken"
        );
        assert_eq!(
            dropped(id, &refused("")),
            "run 3fa9c1d2 dropped (75, queue-full)"
        );
        let mut status = ManagerStatus {
            workflows: vec![WorkflowStatus {
                name: "check-host".to_owned(),
                ..WorkflowStatus::default()
            }],
            ..ManagerStatus::default()
        };
        assert_eq!(waits(&queued(), &status, NOW), None);
        status.workflows[0].obstacle = Some("it is on fire".to_owned());
        assert_eq!(
            waits(&queued(), &status, NOW).as_deref(),
            Some("it is on fire")
        );
        status.disk_full = Some("no space left on device".to_owned());
        assert_eq!(
            waits(&queued(), &status, NOW).as_deref(),
            Some("the disk is full: no space left on device")
        );
        status.paused = Some(Pause {
            since: CREATED,
            by: r#"{"uid":0}"#.to_owned(),
            reason: None,
        });
        let why = waits(&queued(), &status, NOW).unwrap();
        assert!(why.starts_with("nerve is paused since "), "{why}");
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
            round(
                3,
                "critic",
                "",
                r#"{"status":"done","stderr":"noise","dryRun":true,"prompt":"Judge it.\nBe brief."}"#,
            ),
        ];
        assert_eq!(
            thread(&rounds, moment, Paper::PLAIN),
            "--- round 0: start, 2026-11-20 10:36:22 UTC
Repair it

--- round 1: coder (ok), 2026-11-20 10:36:22 UTC
done\\u{202e}

--- round 2: tester (error, exit-code:2), 2026-11-20 10:36:22 UTC
stderr: 1 failed

--- round 3: critic (done), 2026-11-20 10:36:22 UTC
prompt: Judge it.
prompt: Be brief.
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
