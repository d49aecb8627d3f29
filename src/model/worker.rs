//! What is remembered of a workflow's worker, and of the manager itself, across every crash: deaths, blocks, stops,
//! drains, the pause. Like a run, a [`WorkerRecord`] is what its events add up to.

use serde::{Deserialize, Serialize};

use super::exit::{Exit, signal_name};
use super::run::{BootInstant, Caller};
use super::status::RunResult;

/// Deaths that are remembered; no limit of deaths is higher.
pub const DEATHS: usize = 100;

/// How a worker went down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Death {
    /// In systemd's words, where it has one.
    pub cause: Cause,
    /// The exit status, when it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// The signal's name, when it died of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<String>,
}

/// Why a worker went down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// It exited, with whatever status, when nobody had told it to.
    ExitCode,
    /// A signal.
    Signal,
    /// A signal that dumps core.
    CoreDump,
    /// It did not show that it is alive.
    Watchdog,
    /// The kernel killed it for want of memory.
    OomKill,
    /// systemd lost patience with its start or stop.
    Timeout,
    /// It was not ready in time, and nerved killed it.
    NotReady,
    /// Somebody had systemd stop or restart it, or the machine went down.
    Stopped,
    /// The machine was restarted.
    Reboot,
    /// It was gone without a trace when nerved looked again: it was stopped, or it exited with 0. A crash leaves a trace,
    /// since systemd restarts what crashed.
    Unseen,
    /// It died, and nobody can tell how; or it is a word that this version does not know.
    #[serde(other)]
    Unknown,
}

impl Death {
    /// A death of which nothing but the cause is known.
    #[must_use]
    pub fn of(cause: Cause) -> Self {
        Self {
            cause,
            code: None,
            signal: None,
        }
    }

    /// A death with what the process left.
    #[must_use]
    pub fn new(cause: Cause, exit: Option<Exit>) -> Self {
        let (code, signal) = match exit {
            Some(Exit::Code(code)) => (Some(code), None),
            Some(Exit::Signal(number)) => (None, Some(signal_name(number))),
            None => (None, None),
        };
        Self {
            cause,
            code,
            signal,
        }
    }

    /// Neither the worker nor a run can be blamed for it.
    #[must_use]
    pub fn is_blameless(&self) -> bool {
        matches!(self.cause, Cause::Stopped | Cause::Reboot | Cause::Unseen)
    }
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = match self.cause {
            Cause::ExitCode => "exit",
            Cause::Signal => "signal",
            Cause::CoreDump => "core dump",
            Cause::Watchdog => "watchdog",
            Cause::OomKill => "out of memory",
            Cause::Timeout => "timeout",
            Cause::NotReady => "not ready in time",
            Cause::Stopped => "stopped",
            Cause::Reboot => "reboot",
            Cause::Unseen => "unseen",
            Cause::Unknown => "unknown",
        };
        match (&self.signal, self.code) {
            (Some(signal), _) => write!(f, "{word}, {signal}"),
            (None, Some(code)) => write!(f, "{word}, status {code}"),
            (None, None) => f.write_str(word),
        }
    }
}

/// What happened to a workflow's worker. The serialised form is what the store keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum WorkerEvent {
    /// An invocation ended that nobody had told to.
    WorkerDied {
        /// Which.
        invocation: String,
        /// How.
        #[serde(flatten)]
        death: Death,
        /// When, on a clock that never jumps.
        since: BootInstant,
    },
    /// It died too often: no more until a reset.
    WorkflowBlocked {
        /// What was the last straw.
        detail: String,
        /// What the runs end in that had a worker, or waited for one.
        result: RunResult,
    },
    /// An operator stopped the unit: none until a reset.
    WorkerStopped,
    /// It came up again although it had been stopped.
    WorkerBack,
    /// Somebody had it forget deaths, block and stop.
    WorkflowReset {
        /// Who.
        by: Caller,
    },
    /// Somebody wants this invocation replaced when its last run has ended.
    WorkerDraining {
        /// Which.
        invocation: String,
        /// When what is left is ended, if ever.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<BootInstant>,
        /// Who.
        by: Caller,
    },
    /// That is done.
    WorkerDrained,
}

impl WorkerEvent {
    /// The event's type in the log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::WorkerDied { .. } => "worker-died",
            Self::WorkflowBlocked { .. } => "workflow-blocked",
            Self::WorkerStopped => "worker-stopped",
            Self::WorkerBack => "worker-back",
            Self::WorkflowReset { .. } => "workflow-reset",
            Self::WorkerDraining { .. } => "worker-draining",
            Self::WorkerDrained => "worker-drained",
        }
    }
}

/// What holds for a workflow's worker until something else is said.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WorkerRecord {
    /// Invocations that died, oldest first, and when.
    deaths: Vec<(String, BootInstant)>,
    /// Nothing is started any more.
    pub blocked: Option<Block>,
    /// Since when (µs since the epoch) an operator wants it to be stopped.
    pub stopped: Option<u64>,
    /// Which invocation is to be replaced.
    pub draining: Option<Drain>,
}

/// A workflow that starts no worker any more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// Since when, in µs since the epoch.
    pub at: u64,
    /// Why.
    pub detail: String,
    /// What its started runs end in.
    pub result: RunResult,
}

/// A drain that somebody asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drain {
    /// Of this invocation.
    pub invocation: String,
    /// When what is left is ended.
    pub until: Option<BootInstant>,
    /// Since when, in µs since the epoch.
    pub at: u64,
}

impl WorkerRecord {
    /// The record after one more event.
    #[must_use]
    pub fn after(&self, event: &WorkerEvent, at: u64) -> Self {
        let mut record = self.clone();
        match event {
            WorkerEvent::WorkerDied {
                invocation, since, ..
            } => {
                let first = (record.deaths.len() + 1).saturating_sub(DEATHS);
                record.deaths.drain(..first);
                record.deaths.push((invocation.clone(), since.clone()));
            }
            WorkerEvent::WorkflowBlocked { detail, result } => {
                record.blocked = Some(Block {
                    at,
                    detail: detail.clone(),
                    result: result.clone(),
                });
            }
            WorkerEvent::WorkerStopped => record.stopped = Some(at),
            WorkerEvent::WorkerBack => record.stopped = None,
            WorkerEvent::WorkflowReset { .. } => {
                record.deaths.clear();
                record.blocked = None;
                record.stopped = None;
            }
            WorkerEvent::WorkerDraining {
                invocation, until, ..
            } => {
                record.draining = Some(Drain {
                    invocation: invocation.clone(),
                    until: until.clone(),
                    at,
                });
            }
            WorkerEvent::WorkerDrained => record.draining = None,
        }
        record
    }

    /// Whether this invocation is known to be dead.
    #[must_use]
    pub fn has_died(&self, invocation: &str) -> bool {
        self.deaths.iter().any(|(died, _)| died == invocation)
    }

    /// How many died in the time before `now`.
    #[must_use]
    pub fn deaths_within(&self, interval_us: u64, now: &BootInstant) -> usize {
        let is_recent = |since: &BootInstant| {
            since.boot_id == now.boot_id && now.boot_us.saturating_sub(since.boot_us) < interval_us
        };
        self.deaths
            .iter()
            .filter(|(_, since)| is_recent(since))
            .count()
    }
}

/// What happened to the manager itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum ManagerEvent {
    /// Somebody wants nothing to leave a queue.
    Paused {
        /// Why.
        reason: Option<String>,
        /// Who.
        by: Caller,
    },
    /// And no longer.
    Resumed {
        /// Who.
        by: Caller,
    },
}

impl ManagerEvent {
    /// The event's type in the log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Paused { .. } => "paused",
            Self::Resumed { .. } => "resumed",
        }
    }

    /// What holds after it.
    #[must_use]
    pub fn pause(&self, at: u64) -> Option<Pause> {
        match self {
            Self::Paused { reason, by } => Some(Pause {
                at,
                reason: reason.clone(),
                by: by.clone(),
            }),
            Self::Resumed { .. } => None,
        }
    }
}

/// Nothing leaves a queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    /// Since when, in µs since the epoch.
    pub at: u64,
    /// Why.
    pub reason: Option<String>,
    /// Who wanted it.
    pub by: Caller,
}
