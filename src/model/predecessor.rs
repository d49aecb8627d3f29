//! What the TypeScript predecessor kept (`@uncaged/nerve-store` 0.5.0 and before), and what it is in nerve. Its shapes
//! are never trusted: what does not fit is kept as it was, or left out where the predecessor left it out itself.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::message::Message;
use super::name::{RoleName, RunId};
use super::run::Imported;
use super::status::{RunResult, Status, UnknownWord};

/// A row of `logs`, or a line of the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    pub id: i64,
    pub source: String,
    #[serde(rename = "type")]
    pub row_type: String,
    pub ref_id: Option<String>,
    pub payload: Option<String>,
    /// ms since the epoch.
    pub timestamp: i64,
}

/// A row of `workflow_runs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OldRun {
    pub id: String,
    pub workflow: String,
    pub status: String,
    /// Of its newest change: ms since the epoch.
    pub timestamp: i64,
    /// Older databases have none.
    pub exit_code: Option<i64>,
}

/// One thing that is imported. A run comes before its rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Piece {
    Run(Imported),
    /// A row that is about a run.
    OfRun(Row),
    /// Any other row.
    Row(Row),
    /// The digest of a blob that was put before.
    Blob(String),
}

impl Piece {
    /// About how many bytes it is as JSON.
    #[must_use]
    pub fn weight(&self) -> usize {
        const FIELDS: usize = 128;
        FIELDS
            + match self {
                Self::Run(run) => run.prompt.len() + run.old_id.len(),
                Self::OfRun(row) | Self::Row(row) => row.payload.as_ref().map_or(0, String::len),
                Self::Blob(digest) => digest.len(),
            }
    }
}

/// The id that a run has in nerve: the first 32 hex digits of the sha256 of the one that it had.
#[must_use]
pub fn run_id(old_id: &str) -> RunId {
    let digest: [u8; 32] = Sha256::digest(old_id).into();
    let first = digest[..16].iter();
    RunId::from_bits(first.fold(0, |bits, byte| bits << 8 | u128::from(*byte)))
}

/// µs of the predecessor's ms; no time is before the epoch.
#[must_use]
pub fn microseconds(ms: i64) -> u64 {
    // The database has signed numbers.
    u64::try_from(ms.saturating_mul(1_000)).unwrap_or(0)
}

impl Row {
    /// What tells it from every other row.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(self.id.to_be_bytes());
        sha.update(self.timestamp.to_be_bytes());
        let (source, row_type) = (Some(&self.source), Some(&self.row_type));
        for text in [
            source,
            row_type,
            self.ref_id.as_ref(),
            self.payload.as_ref(),
        ] {
            // No text has this length, so that none at all is not an empty one.
            sha.update(
                text.map_or(u64::MAX, |text| text.len() as u64)
                    .to_be_bytes(),
            );
            sha.update(text.map_or("", String::as_str));
        }
        sha.finalize().into()
    }

    /// Its payload as JSON of one line: as it was if it was JSON, or else as a string.
    #[must_use]
    pub fn json(&self) -> String {
        let Some(payload) = &self.payload else {
            return Value::Null.to_string();
        };
        match serde_json::from_str::<Value>(payload) {
            Ok(_) if payload.contains(['\n', '\r']) => compact(payload),
            Ok(_) => payload.clone(),
            Err(_) => Value::from(payload.as_str()).to_string(),
        }
    }

    fn record(&self) -> Option<Map<String, Value>> {
        serde_json::from_str(self.payload.as_ref()?).ok()
    }

    fn is_of_workflow(&self, row_type: &str) -> bool {
        self.source == "workflow" && self.row_type == row_type
    }

    /// What is or could be a message, of either generation, and whether it is of the newer one.
    fn said(&self) -> Option<(Map<String, Value>, bool)> {
        let is_newer = self.is_of_workflow("thread_workflow_message");
        let is_one = is_newer || self.is_of_workflow("thread_command_event");
        Some((self.record().filter(|_| is_one)?, is_newer))
    }

    /// The message that it is, if it is one; the start is none.
    #[must_use]
    pub fn message(&self) -> Option<Message> {
        let (said, is_newer) = self.said().filter(|(said, _)| !is_start(said))?;
        let text = |key| Some(said.get(key)?.as_str()?.to_owned());
        if let (Some(role), Some(content)) = (text("role"), text("content")) {
            let time = said.get("timestamp").and_then(whole);
            return Some(Message {
                role,
                content,
                meta: match said.get("meta") {
                    Some(Value::Object(meta)) => meta.clone(),
                    None | Some(Value::Null) => Map::new(),
                    Some(other) => Map::from_iter([("meta".to_owned(), other.clone())]),
                },
                timestamp: time.map_or(0, microseconds),
            });
        }
        // The newer generation always has both.
        let event_type = text("type").filter(|_| !is_newer)?;
        Some(Message {
            role: text("role").unwrap_or(event_type),
            content: text("content")
                .or_else(|| self.payload.as_deref().map(compact))
                .unwrap_or_default(),
            meta: said,
            timestamp: microseconds(self.timestamp),
        })
    }
}

/// JSON without the blanks between its words, as JavaScript writes it.
fn compact(json: &str) -> String {
    let (mut is_string, mut is_escaped) = (false, false);
    let stays = |c: &char| {
        if !is_string {
            is_string = *c == '"';
            return !matches!(c, ' ' | '\t' | '\n' | '\r');
        }
        is_string = *c != '"' || is_escaped;
        is_escaped = *c == '\\' && !is_escaped;
        true
    };
    json.chars().filter(stays).collect()
}

/// Its thread's beginning is no round.
fn is_start(said: &Map<String, Value>) -> bool {
    let is = |key, word: &str| said.get(key).is_some_and(|value| value == word);
    is("type", "thread_start") || is("role", RoleName::START)
}

/// JavaScript's numbers are floating, and what is meant is an integer.
fn whole(value: &Value) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "it saturates")]
    let rounded = |number: f64| number as i64;
    value.as_i64().or_else(|| value.as_f64().map(rounded))
}

/// What a run was started with, as far as it can be read.
#[derive(Debug, Default)]
struct Launch {
    prompt: Option<String>,
    max_rounds: Option<u32>,
    dry_run: bool,
}

impl Launch {
    /// Flat, if that is complete, or under `triggerPayload`.
    fn of(record: &Map<String, Value>) -> Self {
        let flat = Self::flat(record);
        let is_complete = flat.prompt.is_some() && flat.max_rounds.is_some();
        match record.get("triggerPayload") {
            Some(Value::Object(inner)) if !is_complete => Self::flat(inner),
            _ => flat,
        }
    }

    fn flat(record: &Map<String, Value>) -> Self {
        let of = |key| record.get(key);
        Self {
            prompt: of("prompt").and_then(Value::as_str).map(str::to_owned),
            max_rounds: of("maxRounds")
                .and_then(whole)
                .and_then(|rounds| u32::try_from(rounds).ok()),
            dry_run: of("dryRun").and_then(Value::as_bool).unwrap_or(false),
        }
    }
}

/// What the rows of a run, in order, say about it.
#[derive(Debug, Default)]
pub struct Survey {
    created: Option<i64>,
    newest: i64,
    started: Option<(i64, Launch)>,
    start_message: Option<String>,
    rounds: u32,
}

impl Survey {
    /// Takes the next row in.
    pub fn see(&mut self, row: &Row) {
        self.created.get_or_insert(row.timestamp);
        self.newest = self.newest.max(row.timestamp);
        if self.started.is_none() && row.is_of_workflow("started") {
            let launch = row.record().as_ref().map(Launch::of);
            self.started = Some((row.timestamp, launch.unwrap_or_default()));
        }
        if let Some((said, _)) = row.said() {
            if is_start(&said) {
                let content = said.get("content").and_then(Value::as_str);
                self.start_message = self.start_message.take().or(content.map(str::to_owned));
            } else if row.message().is_some() {
                self.rounds += 1;
            }
        }
    }

    /// The run, once all of its rows were seen.
    ///
    /// # Errors
    /// When its status is none that the predecessor had.
    pub fn conclude(self, run: OldRun) -> Result<Imported, UnknownWord> {
        let (status, exit_code, result) = end(&run)?;
        let ended = match result {
            Some(RunResult::Imported) => self.newest.max(run.timestamp),
            _ => run.timestamp,
        };
        let (started, launch) = self.started.unzip();
        let launch = launch.unwrap_or_default();
        Ok(Imported {
            workflow: run.workflow,
            prompt: launch.prompt.or(self.start_message).unwrap_or_default(),
            max_rounds: launch.max_rounds,
            dry_run: launch.dry_run,
            status,
            exit_code,
            result,
            rounds: self.rounds,
            created_at: microseconds(self.created.unwrap_or(run.timestamp)),
            started_at: started.map(microseconds),
            ended_at: microseconds(ended),
            old_id: run.id,
            old_status: run.status,
        })
    }
}

/// How a run ended: what had not is interrupted, a code that was not kept is its status's, and why is said where status
/// and code leave no doubt.
fn end(run: &OldRun) -> Result<(Status, u8, Option<RunResult>), UnknownWord> {
    let kept = run.exit_code.and_then(|code| u8::try_from(code).ok());
    let because = |result: RunResult| {
        let (status, code) = result.end();
        (status, kept.unwrap_or(code), Some(result))
    };
    Ok(match run.status.parse()? {
        Status::Queued | Status::Started => {
            let (status, code) = RunResult::Imported.end();
            (status, code, Some(RunResult::Imported))
        }
        Status::Completed => because(RunResult::Success),
        Status::Failed if kept == Some(2) => because(RunResult::MaxRounds),
        Status::Failed if kept == Some(124) => because(RunResult::Timeout),
        Status::Failed => (Status::Failed, kept.unwrap_or(1), None),
        Status::Killed => because(RunResult::Killed),
        Status::Crashed => because(RunResult::WorkerDied),
        Status::Interrupted => (Status::Interrupted, kept.unwrap_or(130), None),
        Status::Dropped => (Status::Dropped, kept.unwrap_or(75), None),
        Status::Suspended | Status::Aborted => return Err(UnknownWord::status(&run.status)),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn row(row_type: &str, payload: Option<&str>) -> Row {
        Row {
            id: 1,
            source: "workflow".to_owned(),
            row_type: row_type.to_owned(),
            ref_id: Some("r".to_owned()),
            payload: payload.map(str::to_owned),
            timestamp: 7,
        }
    }

    fn run(status: &str, exit_code: Option<i64>) -> OldRun {
        OldRun {
            id: "r".to_owned(),
            workflow: "w".to_owned(),
            status: status.to_owned(),
            timestamp: 9,
            exit_code,
        }
    }

    fn survey(rows: &[Row]) -> Imported {
        let mut survey = Survey::default();
        for row in rows {
            survey.see(row);
        }
        survey.conclude(run("completed", None)).unwrap()
    }

    #[test]
    fn the_new_id_is_the_beginning_of_a_digest() {
        // sha256sum of "abc".
        assert_eq!(
            run_id("abc").to_string(),
            "ba7816bf8f01cfea414140de5dae2223"
        );
    }

    #[test]
    // Parity 108.
    fn a_run_was_started_with_what_its_first_started_row_says_flat_or_below() {
        let flat = r#"{"prompt": "p", "maxRounds": 3, "dryRun": true}"#;
        let nested = format!(r#"{{"triggerPayload": {flat}, "prompt": 1}}"#);
        let other = row("started", Some(r#"{"prompt": "other", "maxRounds": 1}"#));
        for payload in [flat, &nested] {
            let found = survey(&[
                row("queued", None),
                row("started", Some(payload)),
                other.clone(),
            ]);
            let Imported {
                prompt,
                max_rounds,
                dry_run,
                ..
            } = found;
            assert_eq!(
                (prompt.as_str(), max_rounds, dry_run),
                ("p", Some(3), true),
                "{payload}"
            );
        }
        for payload in [
            None,
            Some("{"),
            Some("[]"),
            Some(r#"{"maxRounds": -1}"#),
            Some(r#"{"triggerPayload": 1}"#),
        ] {
            let found = survey(&[row("started", payload), other.clone()]);
            let Imported {
                prompt,
                max_rounds,
                dry_run,
                ..
            } = found;
            assert_eq!(
                (prompt.as_str(), max_rounds, dry_run),
                ("", None, false),
                "{payload:?}"
            );
        }
        let start = r#"{"role": "__start__", "content": "said"}"#;
        let found = survey(&[
            row("thread_workflow_message", Some(start)),
            row("started", None),
        ]);
        assert_eq!((found.prompt.as_str(), found.rounds), ("said", 0));
    }

    #[test]
    // Parity 109.
    fn what_is_no_message_is_skipped_and_a_missing_time_is_zero() {
        let say = |payload| row("thread_workflow_message", Some(payload)).message();
        let message =
            say(r#"{"role": "a", "content": "c", "meta": {"status": "ok"}, "timestamp": 5}"#)
                .unwrap();
        assert_eq!(
            (
                message.role.as_str(),
                message.content.as_str(),
                message.timestamp
            ),
            ("a", "c", 5_000)
        );
        assert_eq!(Value::Object(message.meta), json!({"status": "ok"}));
        let message = say(r#"{"role": "a", "content": "c", "meta": [1]}"#).unwrap();
        assert_eq!(
            (Value::Object(message.meta), message.timestamp),
            (json!({"meta": [1]}), 0)
        );
        for none in [
            "",
            "{",
            "[1]",
            "null",
            r#"{"role": "a"}"#,
            r#"{"role": 1, "content": "c"}"#,
            r#"{"type": "a"}"#,
        ] {
            assert_eq!(say(none), None, "{none}");
        }
        assert_eq!(row("thread_workflow_message", None).message(), None);
        let elsewhere = Row {
            source: "sense".to_owned(),
            ..row(
                "thread_workflow_message",
                Some(r#"{"role": "a", "content": "c"}"#),
            )
        };
        assert_eq!(elsewhere.message(), None);
    }

    #[test]
    // Parity 110, 111.
    fn rounds_count_both_generations_and_no_start() {
        let act = |payload| row("thread_command_event", Some(payload));
        let message = act("{\n \"type\": \"a \\\" b\", \"n\": [1, 2]\n}")
            .message()
            .unwrap();
        assert_eq!(message.role, "a \" b");
        assert_eq!(message.content, r#"{"type":"a \" b","n":[1,2]}"#);
        assert_eq!(message.timestamp, 7_000);
        assert_eq!(
            Value::Object(message.meta),
            json!({"type": "a \" b", "n": [1, 2]})
        );
        let message = act(r#"{"type": "a", "role": "b", "content": "c"}"#)
            .message()
            .unwrap();
        assert_eq!(
            (message.role.as_str(), message.content.as_str()),
            ("b", "c")
        );
        let rows = [
            act(r#"{"type": "thread_start"}"#),
            act(r#"{"type": "a"}"#),
            row(
                "thread_workflow_message",
                Some(r#"{"role": "__start__", "content": ""}"#),
            ),
            row(
                "thread_workflow_message",
                Some(r#"{"role": "a", "content": ""}"#),
            ),
            row("thread_workflow_message", Some("broken")),
            row("completed", Some(r#"{"role": "a", "content": ""}"#)),
        ];
        let rounds: Vec<_> = rows.iter().map(|row| row.message().is_some()).collect();
        assert_eq!(rounds, [false, true, false, true, false, false]);
        assert_eq!(survey(&rows).rounds, 2);
    }

    #[test]
    fn every_status_has_its_code_and_what_had_not_ended_is_interrupted() {
        for (status, kept, expected) in [
            ("queued", None, (Status::Interrupted, 130, Some("imported"))),
            (
                "started",
                Some(5),
                (Status::Interrupted, 130, Some("imported")),
            ),
            ("completed", None, (Status::Completed, 0, Some("success"))),
            ("failed", None, (Status::Failed, 1, None)),
            ("failed", Some(2), (Status::Failed, 2, Some("max-rounds"))),
            ("failed", Some(124), (Status::Failed, 124, Some("timeout"))),
            ("failed", Some(77), (Status::Failed, 77, None)),
            ("crashed", None, (Status::Crashed, 255, Some("worker-died"))),
            ("dropped", None, (Status::Dropped, 75, None)),
            ("interrupted", None, (Status::Interrupted, 130, None)),
            ("killed", Some(-1), (Status::Killed, 137, Some("killed"))),
        ] {
            let found = Survey::default().conclude(run(status, kept)).unwrap();
            let result = found.result.map(|result| result.to_string());
            assert_eq!(
                (found.status, found.exit_code, result.as_deref()),
                expected,
                "{status} {kept:?}"
            );
            assert_eq!((found.created_at, found.ended_at), (9_000, 9_000));
        }
        for unknown in ["", "aborted", "suspended", "Completed"] {
            assert!(
                Survey::default().conclude(run(unknown, None)).is_err(),
                "{unknown}"
            );
        }
    }

    #[test]
    fn a_payload_stays_what_it_was_and_becomes_json_on_one_line() {
        for (payload, json) in [
            (None, "null"),
            (Some(""), "\"\""),
            (Some("no json"), "\"no json\""),
            (Some("{\"b\": 1, \"a\": 2}"), "{\"b\": 1, \"a\": 2}"),
            (Some("{\n\"a\" :\r\n\"x y\"}\n"), "{\"a\":\"x y\"}"),
            (Some("a\nb\0"), r#""a\nb\u0000""#),
        ] {
            assert_eq!(row("t", payload).json(), json);
        }
        let deep = "[".repeat(200) + &"]".repeat(200);
        assert!(row("t", Some(&deep)).json().starts_with('"'));
    }

    #[test]
    fn every_field_tells_rows_apart() {
        let first = row("t", Some("p"));
        let others = [
            Row {
                id: 2,
                ..first.clone()
            },
            Row {
                source: "system".to_owned(),
                ..first.clone()
            },
            Row {
                row_type: "tp".to_owned(),
                payload: Some(String::new()),
                ..first.clone()
            },
            Row {
                ref_id: None,
                ..first.clone()
            },
            Row {
                ref_id: Some(String::new()),
                ..first.clone()
            },
            Row {
                payload: None,
                ..first.clone()
            },
            Row {
                timestamp: 8,
                ..first.clone()
            },
        ];
        let digests: std::collections::BTreeSet<_> =
            others.iter().chain([&first]).map(Row::digest).collect();
        assert_eq!(digests.len(), others.len() + 1);
        let line =
            r#"{"id":1,"source":"workflow","type":"t","refId":"r","payload":"p","timestamp":7}"#;
        assert_eq!(serde_json::from_str::<Row>(line).unwrap(), first);
    }
}
