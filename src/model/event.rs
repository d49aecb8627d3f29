//! What can happen to a run, and what people and workers say when it does. Plain data; [`super::run::Run::after`] says when
//! which of it may happen.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::message::Message;
use super::name::{RoleName, RunId, WorkflowName};
use super::run::Digest;
use super::status::{RunResult, Status};
use super::worker::Death;
use super::workflow::Target;

/// What a start asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Accepted {
    /// The workflow.
    pub workflow: WorkflowName,
    /// Content of round 0.
    pub prompt: String,
    /// Asked for by whoever started it.
    pub max_rounds: Option<u32>,
    /// Whether it is a rehearsal.
    pub dry_run: bool,
    /// Who or what started it.
    pub trigger: Value,
    /// What makes the start idempotent: unique among all runs of the workflow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Accepted {
    /// Round 0 of the run's thread. `max_rounds` is its limit, once that is fixed.
    #[must_use]
    pub fn start_message(self, run: RunId, max_rounds: Option<u32>, timestamp: u64) -> Message {
        start_message(
            run,
            self.prompt,
            max_rounds,
            self.dry_run,
            self.trigger,
            timestamp,
        )
    }
}

fn start_message(
    run: RunId,
    content: String,
    max_rounds: Option<u32>,
    dry_run: bool,
    trigger: Value,
    timestamp: u64,
) -> Message {
    let mut meta = serde_json::Map::new();
    meta.insert("runId".into(), run.to_string().into());
    meta.insert("maxRounds".into(), max_rounds.into());
    meta.insert("dryRun".into(), dry_run.into());
    meta.insert("trigger".into(), trigger);
    Message {
        role: RoleName::START.into(),
        content,
        meta,
        timestamp,
    }
}

/// Who asked for something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// The user.
    pub uid: u32,
    /// The process, as the kernel told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The process's name, which it chooses itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comm: Option<String>,
    /// The unit that the process belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}", self.uid)?;
        match (&self.comm, self.pid) {
            (Some(comm), Some(pid)) => write!(f, " ({comm}, pid {pid})"),
            (None, Some(pid)) => write!(f, " (pid {pid})"),
            _ => Ok(()),
        }
    }
}

/// An instant that survives a restart of nerved, and says so when it did not survive a reboot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BootInstant {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// µs of CLOCK_BOOTTIME.
    pub boot_us: u64,
}

/// Where a run is executed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The worker's invocation: 32 hex digits.
    pub invocation: String,
    /// The worker unit's cgroup below the cgroup root, `/nerve.slice/…`.
    pub cgroup: String,
}

impl Place {
    /// The run's own cgroup below the cgroup root.
    #[must_use]
    pub fn of_run(&self, run: RunId) -> String {
        format!("{}/{}", self.cgroup, run.cgroup())
    }
}

/// What happened to a run. The serialised form is what the store keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum RunEvent {
    /// It was accepted.
    Queued(Accepted),
    /// It left the queue; its definition and limits are now fixed.
    Started {
        /// The definition it runs.
        definition: Digest,
        /// Its limit of rounds.
        max_rounds: u32,
        /// When, on a clock that never jumps.
        since: BootInstant,
    },
    /// It is handed to a worker.
    Dispatched {
        /// Which.
        place: Place,
        /// How often it was dispatched, this time included.
        attempt: u32,
        /// In which boot of the machine.
        #[serde(default)]
        boot_id: String,
    },
    /// A round is done.
    ThreadWorkflowMessage {
        /// Numbered from 1.
        round: u32,
        /// What it produced.
        message: Message,
    },
    /// An attempt of the next round failed, and another one follows; the thread does not know it.
    AttemptFailed {
        /// Of which round.
        round: u32,
        /// Numbered from 1.
        attempt: u32,
        /// What it produced.
        message: Message,
        /// How long the next attempt waits, in µs.
        delay_us: u64,
        /// From when on, on a clock that never jumps.
        since: BootInstant,
    },
    /// The workflow's moderator said what comes next.
    Routed {
        /// In which round.
        round: u32,
        /// Who speaks in it, or that there is none.
        target: Target,
    },
    /// Its worker died under it.
    WorkerLost {
        /// Which invocation.
        invocation: String,
        /// The attempt that was lost.
        attempt: u32,
        /// How the worker died.
        #[serde(flatten)]
        death: Death,
    },
    /// Somebody wants it dead. Repeated, it counts anew.
    KillRequested(KillRequest),
    /// Somebody wants it to end at the next round boundary.
    AbortRequested(AbortRequest),
    /// It ended.
    Ended {
        /// Why.
        result: RunResult,
        /// What more there is to say: systemd's words, a path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// It was, and had ended, where its history was imported from; the only event that its row comes from.
    Imported(Box<Imported>),
}

/// A run as it was elsewhere. Times are µs since the epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Imported {
    /// The id that it had.
    pub old_id: String,
    /// The status that it had.
    pub old_status: String,
    /// Its workflow; not every name that a workflow could have elsewhere is one here.
    pub workflow: String,
    /// Content of round 0.
    pub prompt: String,
    /// Its limit of rounds, where it is known.
    pub max_rounds: Option<u32>,
    /// Whether it was a rehearsal.
    pub dry_run: bool,
    /// The status that it has.
    pub status: Status,
    /// Its exit code.
    pub exit_code: u8,
    /// Why it ended, where it is known.
    pub result: Option<RunResult>,
    /// Its rounds.
    pub rounds: u32,
    pub created_at: u64,
    pub started_at: Option<u64>,
    pub ended_at: u64,
}

impl Imported {
    /// What started it.
    #[must_use]
    pub fn trigger(&self) -> Value {
        serde_json::json!({ "type": "import", "oldId": self.old_id })
    }

    /// Round 0 of its thread.
    #[must_use]
    pub fn start_message(self, run: RunId) -> Message {
        let trigger = self.trigger();
        start_message(
            run,
            self.prompt,
            self.max_rounds,
            self.dry_run,
            trigger,
            self.created_at,
        )
    }
}

/// A wish to kill a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KillRequest {
    /// What the person said.
    pub reason: Option<String>,
    /// Between SIGTERM and SIGKILL, in µs.
    pub grace_us: u64,
    /// Who.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<Caller>,
}

/// A wish to abort a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AbortRequest {
    /// What the person said.
    pub reason: Option<String>,
    /// Who.
    pub by: Caller,
}

impl RunEvent {
    /// The text that may be long: a prompt, or what a role said.
    #[must_use]
    pub fn text(&self) -> Option<&String> {
        match self {
            Self::Queued(accepted) => Some(&accepted.prompt),
            Self::Imported(imported) => Some(&imported.prompt),
            Self::ThreadWorkflowMessage { message, .. } | Self::AttemptFailed { message, .. } => {
                Some(&message.content)
            }
            _ => None,
        }
    }

    /// The same, to be taken out or put in.
    pub fn text_mut(&mut self) -> Option<&mut String> {
        match self {
            Self::Queued(accepted) => Some(&mut accepted.prompt),
            Self::Imported(imported) => Some(&mut imported.prompt),
            Self::ThreadWorkflowMessage { message, .. } | Self::AttemptFailed { message, .. } => {
                Some(&mut message.content)
            }
            _ => None,
        }
    }

    /// The event's type in the log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued(_) => Self::QUEUED,
            Self::Started { .. } => "started",
            Self::Dispatched { .. } => "dispatched",
            Self::ThreadWorkflowMessage { .. } => Self::MESSAGE,
            Self::AttemptFailed { .. } => "attempt-failed",
            Self::Routed { .. } => "routed",
            Self::WorkerLost { .. } => "worker-lost",
            Self::KillRequested(_) => Self::KILL,
            Self::AbortRequested(_) => Self::ABORT,
            Self::Ended { .. } => Self::ENDED,
            Self::Imported(_) => Self::IMPORTED,
        }
    }

    /// Type of the events that make up the thread.
    pub const MESSAGE: &str = "thread-workflow-message";
    /// Type of a run's first event, which holds the prompt.
    pub const QUEUED: &str = "queued";
    /// Type of the only event that is nerve's own of a run that was imported; it holds the prompt.
    pub const IMPORTED: &str = "imported";
    /// Type of a run's last event.
    pub const ENDED: &str = "ended";
    /// Type of the event that begins a kill.
    pub const KILL: &str = "kill-requested";
    /// Type of the event that begins an abort.
    pub const ABORT: &str = "abort-requested";
}
