//! The dictionaries of `org.nerve1.Manager`: what both halves of the interface speak in.

use zbus::{DeserializeDict, SerializeDict, Type};

use crate::model::hex::{hex, unhex};
use crate::model::limits;
use crate::store::log::Logged;
pub use crate::store::log::{AUDIT, SOURCES};

/// The options of `StartRun`. One that nerved does not know is refused, never ignored.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct StartOptions {
    /// Its limit of rounds.
    pub max_rounds: Option<u32>,
    /// Whether it is a rehearsal, in which no role is executed.
    pub dry_run: Option<bool>,
    /// Makes the start idempotent: the run of the workflow that has this key, if there is one, is the answer.
    pub key: Option<String>,
}

/// The filter of `ListRuns`.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct ListFilter {
    /// Only runs of this workflow.
    pub workflow: Option<String>,
    /// Only runs that have not ended.
    pub active: Option<bool>,
    /// Only runs that stand there: names of [`crate::model::status::Status`].
    pub statuses: Option<Vec<String>>,
    /// Only runs that ended with this code.
    pub exit_code: Option<u8>,
    /// Accepted then or later, µs since the epoch.
    pub since: Option<u64>,
    /// Accepted then or earlier.
    pub until: Option<u64>,
    /// Only what the list has after this run, which need not be in it.
    pub before: Option<String>,
    /// The newest so many. An answer holds no more than [`limits::LIST_ROWS`]: who wants more asks again, `before` its
    /// last.
    pub limit: Option<u32>,
}

/// The filter of `ListEvents`.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct EventFilter {
    /// Only events of this source.
    pub source: Option<String>,
    /// Only events of this type.
    #[zbus(rename = "type")]
    pub kind: Option<String>,
    /// Only events about this: a run's id or its last digits, a workflow, a day, `nerve`.
    #[zbus(rename = "ref")]
    pub reference: Option<String>,
    /// Then or later, µs since the epoch.
    pub since: Option<u64>,
    /// Then or earlier.
    pub until: Option<u64>,
    /// Events after this number, oldest first.
    pub after: Option<u64>,
    /// Events before this number, newest first; without either bound, the newest.
    pub before: Option<u64>,
    /// At most so many; an answer may hold fewer, and where to go on.
    pub limit: Option<u32>,
}

/// An event of the log, as it was written.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct LoggedEvent {
    /// Its place in the log.
    pub seq: u64,
    /// Who said it: `system`, `workflow`, `sense`, `client`, `audit`.
    pub source: String,
    /// What happened.
    #[zbus(rename = "type")]
    pub kind: String,
    /// To whom: a run, a workflow, a day, `nerve`.
    #[zbus(rename = "ref")]
    pub reference: String,
    /// A JSON object.
    pub payload: String,
    /// Digest of the text that the payload leaves out, for its length.
    pub blob: Option<String>,
    /// µs since the epoch.
    pub timestamp: u64,
    /// sha256, as 64 hex digits, of the hash of the event before and of all that this one says.
    pub hash: String,
}

impl LoggedEvent {
    /// An event as the bus has it.
    #[must_use]
    pub fn of(event: Logged) -> Self {
        Self {
            seq: event.seq,
            source: event.source,
            kind: event.event_type,
            reference: event.reference,
            payload: event.payload,
            blob: event.blob,
            timestamp: event.at,
            hash: hex(&event.hash),
        }
    }

    /// The event, if its hash is one.
    #[must_use]
    pub fn event(self) -> Option<Logged> {
        Some(Logged {
            hash: unhex(&self.hash)?,
            seq: self.seq,
            source: self.source,
            event_type: self.kind,
            reference: self.reference,
            payload: self.payload,
            blob: self.blob,
            at: self.timestamp,
        })
    }
}

/// The options of `GetThread`.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct ThreadOptions {
    /// The newest so many; the start (round 0) is the oldest of all.
    pub limit: Option<u32>,
    /// Only what is older than this round. An answer may leave out the oldest of what was asked for, since a message of
    /// the bus has a largest size: who wants more asks again from there.
    pub before: Option<u32>,
    /// Only what is newer than this round.
    pub after: Option<u32>,
}

/// A run. What is null elsewhere is absent here; what follows `dry_run` comes with `GetRun` only.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Run {
    /// Its id, 32 hex digits.
    pub run: String,
    /// Its workflow.
    pub workflow: String,
    /// A name of [`crate::model::status::Status`].
    pub status: String,
    /// A kill is in progress.
    pub killing: bool,
    /// An abort is in progress, and no kill.
    pub aborting: bool,
    /// Present once it has ended.
    pub exit_code: Option<i32>,
    /// A [`crate::model::status::RunResult`], once it has ended.
    pub result: Option<String>,
    /// What a person gave.
    pub reason: Option<String>,
    /// Rounds done.
    pub rounds: u32,
    /// µs since the epoch.
    pub created_at: u64,
    /// When it left the queue.
    pub started_at: Option<u64>,
    /// When it ended.
    pub ended_at: Option<u64>,
    /// Whether it is a rehearsal.
    pub dry_run: Option<bool>,
    /// Content of round 0.
    pub prompt: Option<String>,
    /// Its limit of rounds, once that is fixed.
    pub max_rounds: Option<u32>,
    /// Who or what started it, as JSON.
    pub trigger: Option<String>,
    /// sha256 of the definition it runs.
    pub definition: Option<String>,
    /// Its worker's unit.
    pub unit: Option<String>,
    /// Its events, oldest first.
    pub events: Option<Vec<Event>>,
}

impl Run {
    /// The exit code, once the run has ended; a code that no process could exit with counts as 255.
    #[must_use]
    pub fn end(&self) -> Option<u8> {
        self.exit_code
            .map(|code| u8::try_from(code).unwrap_or(u8::MAX))
    }
}

/// An entry of a run's log. A message's content is left out: the thread has it.
#[derive(Debug, Clone, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Event {
    /// Its place in the log of all runs.
    pub seq: u64,
    /// What happened.
    #[zbus(rename = "type")]
    pub kind: String,
    /// µs since the epoch.
    pub timestamp: u64,
    /// A JSON object.
    pub payload: String,
}

/// A message of a thread.
#[derive(Debug, Clone, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Round {
    /// 0 is the start.
    pub round: u32,
    /// Who spoke.
    pub role: String,
    /// What it said.
    pub content: String,
    /// A JSON object.
    pub meta: String,
    /// µs since the epoch.
    pub timestamp: u64,
}

/// What `GetStatus` answers.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct ManagerStatus {
    /// nerved's version.
    pub version: String,
    /// Runs that have started and not ended.
    pub running: u32,
    /// Runs that wait.
    pub queued: u32,
    /// When nerved started: µs since the epoch.
    pub started_at: u64,
    /// Present while nothing leaves a queue because somebody wants it so.
    pub paused: Option<Pause>,
    /// Present while the disk is too full for anything to begin: how full.
    pub disk_full: Option<String>,
    /// Most runs at the same time over all workflows.
    pub max_active: Option<u32>,
    /// Every workflow, by name.
    pub workflows: Vec<WorkflowStatus>,
}

/// A pause.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Pause {
    /// What the person said.
    pub reason: Option<String>,
    /// Since when: µs since the epoch.
    pub since: u64,
    /// Who: a JSON object.
    pub by: String,
}

/// A workflow in what `GetStatus` answers. The numbers of a definition that was never right are 0.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct WorkflowStatus {
    /// Its name.
    pub name: String,
    /// One word: `absent`, `starting`, `ready`, `draining`, `stopping`, `blocked`, `stopped`, `failed`, `obstructed` or
    /// `unknown`.
    pub worker: String,
    /// Its worker's invocation: 32 hex digits.
    pub invocation: Option<String>,
    /// Why nothing of it is started.
    pub obstacle: Option<String>,
    /// Since when there is that obstacle: µs since the epoch.
    pub since: Option<u64>,
    /// Runs that have started and not ended.
    pub running: u32,
    /// Runs that wait.
    pub queued: u32,
    /// Most runs at the same time.
    pub concurrency: u32,
    /// What happens to a start when all slots are taken: `queue`, `drop` or `latest`.
    pub overflow: Option<String>,
    /// Most runs that wait.
    pub max_queue: u32,
    /// What happens when more would wait: `evict` or `refuse`.
    pub on_full: Option<String>,
    /// What is wrong with its definition: diagnostics, one a line.
    pub error: Option<String>,
    /// The file.
    pub path: String,
    /// Its worker's unit.
    pub unit: String,
    /// Its worker's process.
    pub main_pid: Option<u32>,
}

/// Whether a text can be the key of a start.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_key(key: &str) -> Result<(), String> {
    let most = limits::KEY_BYTES;
    if key.is_empty() {
        return Err("the key is empty; leave it out to start a run of its own".to_owned());
    }
    if key.len() > most {
        let length = key.len();
        return Err(format!(
            "the key has {length} bytes; at most {most} are kept with a run"
        ));
    }
    match key.find(char::is_control) {
        Some(at) => Err(format!("the key has a control character at offset {at}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_short_line_of_text() {
        let longest = "k".repeat(limits::KEY_BYTES);
        for good in ["a", "ticket 4711/ü", &longest] {
            assert_eq!(check_key(good), Ok(()));
        }
        for (bad, why) in [
            ("", "empty"),
            (&*format!("{longest}k"), "129 bytes"),
            ("a\nb", "control character at offset 1"),
            ("a\u{7f}", "control character"),
        ] {
            assert!(check_key(bad).unwrap_err().contains(why), "{bad:?}");
        }
    }
}
