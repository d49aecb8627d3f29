//! A run: its statuses, its end, and the one table of legal transitions, [`Run::after`].
//!
//! A run is what its events add up to. The same events in the same order give the same run, live or replayed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::limits;
use super::message::{Message, Position};
use super::name::{RunId, WorkflowName};

/// Where a run stands. The names are what people, the store and the bus see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Accepted and durable, waits for a slot.
    Queued,
    /// A worker has it, or is being started for it.
    Started,
    /// Waits for a person or an event.
    Suspended,
    /// The moderator reached the end.
    Completed,
    /// A round failed, or a limit was used up.
    Failed,
    /// Its worker was drained with a time-out that passed.
    Interrupted,
    /// Somebody asked for it, and no process of it is left.
    Killed,
    /// Ended at a round boundary because somebody asked for it.
    Aborted,
    /// Refused or evicted; never started.
    Dropped,
    /// Its worker went down under it too often, or cannot be started.
    Crashed,
}

impl Status {
    /// Every status.
    pub const ALL: [Self; 10] = [
        Self::Queued,
        Self::Started,
        Self::Suspended,
        Self::Completed,
        Self::Failed,
        Self::Interrupted,
        Self::Killed,
        Self::Aborted,
        Self::Dropped,
        Self::Crashed,
    ];

    /// Its name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Started => "started",
            Self::Suspended => "suspended",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::Killed => "killed",
            Self::Aborted => "aborted",
            Self::Dropped => "dropped",
            Self::Crashed => "crashed",
        }
    }

    /// Whether a run that stands there never changes again.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::Started | Self::Suspended)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Status {
    type Err = UnknownWord;
    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        Self::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| UnknownWord("status", text.to_owned()))
    }
}

/// A word that this version does not know where it knows all of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {0} {1:?}")]
pub struct UnknownWord(&'static str, String);

/// Why a run ended. It determines the terminal status and the exit code: see [`RunResult::end`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum RunResult {
    /// The moderator reached the end.
    Success,
    /// A role exited with this code.
    ExitCode(i32),
    /// A role died of this signal (`SIGSEGV`).
    Signal(String),
    /// A role could not be executed.
    ExecFailed,
    /// A role took longer than its time-out.
    RoleTimeout,
    /// A role was killed for want of memory.
    OomKill,
    /// A role said more than a reply may hold.
    ReplyTooLarge,
    /// A role's prompt could not be rendered.
    TemplateError,
    /// A round ended with a status that no route handles.
    NoRoute(String),
    /// `max_rounds` used up.
    MaxRounds,
    /// The run's time-out passed.
    Timeout,
    /// Its worker was drained.
    Drained,
    /// Killed.
    Killed,
    /// Aborted.
    Aborted,
    /// The queue was full.
    QueueFull,
    /// The workflow is blocked.
    Blocked,
    /// The workflow was removed.
    Removed,
    /// Its worker died too often.
    WorkerDied,
    /// Its worker exited with this code.
    WorkerExit(i32),
    /// systemd starts the worker no more.
    StartLimitHit,
    /// systemd refused the worker unit.
    UnitRefused,
}

impl RunResult {
    /// The one table of terminal statuses and exit codes.
    #[must_use]
    pub fn end(&self) -> (Status, u8) {
        match self {
            Self::Success => (Status::Completed, 0),
            Self::ExitCode(_)
            | Self::Signal(_)
            | Self::ExecFailed
            | Self::RoleTimeout
            | Self::OomKill
            | Self::ReplyTooLarge
            | Self::TemplateError
            | Self::NoRoute(_) => (Status::Failed, 1),
            Self::MaxRounds => (Status::Failed, 2),
            Self::Timeout => (Status::Failed, 124),
            Self::Drained => (Status::Interrupted, 130),
            Self::Killed => (Status::Killed, 137),
            Self::Aborted => (Status::Aborted, 143),
            Self::QueueFull | Self::Blocked | Self::Removed => (Status::Dropped, 75),
            Self::WorkerDied | Self::WorkerExit(_) | Self::StartLimitHit | Self::UnitRefused => {
                (Status::Crashed, 255)
            }
        }
    }

    /// The results that are one word.
    const WORDS: [(&str, Self); 17] = [
        ("success", Self::Success),
        ("exec-failed", Self::ExecFailed),
        ("role-timeout", Self::RoleTimeout),
        ("oom-kill", Self::OomKill),
        ("reply-too-large", Self::ReplyTooLarge),
        ("template-error", Self::TemplateError),
        ("max-rounds", Self::MaxRounds),
        ("timeout", Self::Timeout),
        ("drained", Self::Drained),
        ("killed", Self::Killed),
        ("aborted", Self::Aborted),
        ("queue-full", Self::QueueFull),
        ("blocked", Self::Blocked),
        ("removed", Self::Removed),
        ("worker-died", Self::WorkerDied),
        ("start-limit-hit", Self::StartLimitHit),
        ("unit-refused", Self::UnitRefused),
    ];
}

impl fmt::Display for RunResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExitCode(code) => write!(f, "exit-code:{code}"),
            Self::Signal(name) => write!(f, "signal:{name}"),
            Self::NoRoute(status) => write!(f, "no-route:{status}"),
            Self::WorkerExit(code) => write!(f, "worker-exit:{code}"),
            word => {
                let named = Self::WORDS.iter().find(|(_, result)| result == word);
                f.write_str(named.map_or("", |(name, _)| name))
            }
        }
    }
}

impl FromStr for RunResult {
    type Err = UnknownWord;
    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        let unknown = || UnknownWord("result", text.chars().take(80).collect());
        let code = |code: &str| code.parse().map_err(|_| unknown());
        match text.split_once(':') {
            Some(("exit-code", rest)) => code(rest).map(Self::ExitCode),
            Some(("worker-exit", rest)) => code(rest).map(Self::WorkerExit),
            Some(("signal", rest)) => Ok(Self::Signal(rest.to_owned())),
            Some(("no-route", rest)) => Ok(Self::NoRoute(rest.to_owned())),
            _ => Self::WORDS
                .into_iter()
                .find(|(name, _)| *name == text)
                .map(|(_, result)| result)
                .ok_or_else(unknown),
        }
    }
}

impl TryFrom<String> for RunResult {
    type Error = UnknownWord;
    fn try_from(text: String) -> Result<Self, UnknownWord> {
        text.parse()
    }
}

impl From<RunResult> for String {
    fn from(result: RunResult) -> String {
        result.to_string()
    }
}

/// The sha256 of a definition's bytes, as 64 hex digits.
pub type Digest = String;

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
    /// Reserved for rehearsals; `false` in this version.
    pub dry_run: bool,
    /// Who or what started it.
    pub trigger: Value,
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
    },
    /// A round is done.
    ThreadWorkflowMessage {
        /// Numbered from 1.
        round: u32,
        /// What it produced.
        message: Message,
    },
    /// Its worker died under it.
    WorkerLost {
        /// Which invocation.
        invocation: String,
        /// The attempt that was lost.
        attempt: u32,
        /// What systemd says: `exit-code 3`, `signal 9`.
        cause: String,
    },
    /// Somebody wants it dead. Repeated, it counts anew.
    KillRequested(KillRequest),
    /// It ended.
    Ended {
        /// Why.
        result: RunResult,
        /// What more there is to say: systemd's words, a path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
}

/// A wish to kill a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KillRequest {
    /// What the person said.
    pub reason: Option<String>,
    /// Between SIGTERM and SIGKILL, in µs.
    pub grace_us: u64,
}

impl RunEvent {
    /// The event's type in the log.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Queued(_) => "queued",
            Self::Started { .. } => "started",
            Self::Dispatched { .. } => "dispatched",
            Self::ThreadWorkflowMessage { .. } => Self::MESSAGE,
            Self::WorkerLost { .. } => "worker-lost",
            Self::KillRequested(_) => "kill-requested",
            Self::Ended { .. } => "ended",
        }
    }

    /// Type of the events that make up the thread.
    pub const MESSAGE: &str = "thread-workflow-message";
    /// Type of a run's first event, which holds the prompt.
    pub const QUEUED: &str = "queued";
}

/// A run as its events add up to. The prompt and the messages' content stay in the events.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its id.
    pub id: RunId,
    /// Its workflow.
    pub workflow: WorkflowName,
    /// µs since the epoch.
    pub created_at: u64,
    /// Asked for by whoever started it, then fixed when it leaves the queue.
    pub max_rounds: Option<u32>,
    /// Whether it is a rehearsal.
    pub dry_run: bool,
    /// Who or what started it.
    pub trigger: Value,
    /// Where its thread stands.
    pub position: Position,
    /// A kill in progress, or that ended it.
    pub kill: Option<KillRequest>,
    state: State,
}

/// What varies with the status.
#[derive(Debug, Clone, PartialEq)]
enum State {
    Queued,
    Started(Started),
    Ended {
        started: Option<Started>,
        at: u64,
        result: RunResult,
    },
}

/// What is known of a run since it left the queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Started {
    /// µs since the epoch.
    pub at: u64,
    /// The same instant on a clock that never jumps.
    pub since: BootInstant,
    /// The definition it runs.
    pub definition: Digest,
    /// Where it is executed, once a worker has it.
    pub place: Option<Place>,
    /// How often it was dispatched.
    pub attempt: u32,
    /// The worker of the newest attempt died.
    pub is_lost: bool,
    /// How often a worker died under it since the newest round.
    pub losses: u32,
}

/// An event that a run in this status does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("run {run} is {status}: event {event} is illegal")]
pub struct Illegal {
    run: RunId,
    status: Status,
    event: &'static str,
}

impl Run {
    /// The run that its first event makes.
    #[must_use]
    pub fn accept(id: RunId, at: u64, accepted: &Accepted) -> Self {
        Self {
            id,
            workflow: accepted.workflow.clone(),
            created_at: at,
            max_rounds: accepted.max_rounds,
            dry_run: accepted.dry_run,
            trigger: accepted.trigger.clone(),
            position: Position::default(),
            kill: None,
            state: State::Queued,
        }
    }

    /// The run after one more event: the one table of legal transitions.
    ///
    /// # Errors
    /// [`Illegal`] when the run's status does not allow the event; it must then be stored nowhere.
    pub fn after(&self, event: &RunEvent, at: u64) -> Result<Self, Illegal> {
        let mut run = self.clone();
        match (&mut run.state, event) {
            (
                State::Queued,
                RunEvent::Started {
                    definition,
                    max_rounds,
                    since,
                },
            ) => {
                run.max_rounds = Some(*max_rounds);
                run.state = State::Started(Started {
                    at,
                    since: since.clone(),
                    definition: definition.clone(),
                    place: None,
                    attempt: 0,
                    is_lost: false,
                    losses: 0,
                });
            }
            (State::Started(started), RunEvent::Dispatched { place, attempt })
                if *attempt == started.attempt + 1 && self.kill.is_none() =>
            {
                started.place = Some(place.clone());
                started.attempt = *attempt;
                started.is_lost = false;
            }
            (State::Started(started), RunEvent::ThreadWorkflowMessage { round, message })
                if *round == self.position.rounds + 1
                    && started.place.is_some()
                    && !started.is_lost
                    && self.kill.is_none() =>
            {
                started.losses = 0;
                run.position = self
                    .position
                    .after(message)
                    .ok_or_else(|| self.illegal(event))?;
            }
            (State::Started(started), RunEvent::WorkerLost { attempt, .. })
                if *attempt == started.attempt && started.place.is_some() && !started.is_lost =>
            {
                started.is_lost = true;
                started.losses += 1;
            }
            (State::Queued | State::Started(_), RunEvent::KillRequested(request)) => {
                run.kill = Some(KillRequest {
                    reason: request
                        .reason
                        .clone()
                        .or_else(|| self.kill.as_ref()?.reason.clone()),
                    ..request.clone()
                });
            }
            (state @ (State::Queued | State::Started(_)), RunEvent::Ended { result, .. })
                if self.may_end_so(result) =>
            {
                let started = match state {
                    State::Started(started) => Some(started.clone()),
                    _ => None,
                };
                run.state = State::Ended {
                    started,
                    at,
                    result: result.clone(),
                };
            }
            _ => return Err(self.illegal(event)),
        }
        Ok(run)
    }

    /// 137 means asked for, and what was asked for ends in nothing else; a run in the queue can only be killed or
    /// dropped.
    fn may_end_so(&self, result: &RunResult) -> bool {
        let killed = *result == RunResult::Killed;
        let dropped = result.end().0 == Status::Dropped;
        killed == self.kill.is_some() && (killed || dropped == (self.status() == Status::Queued))
    }

    fn illegal(&self, event: &RunEvent) -> Illegal {
        Illegal {
            run: self.id,
            status: self.status(),
            event: event.name(),
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> Status {
        match &self.state {
            State::Queued => Status::Queued,
            State::Started(_) => Status::Started,
            State::Ended { result, .. } => result.end().0,
        }
    }

    /// A kill was asked for and is not done.
    #[must_use]
    pub fn is_killing(&self) -> bool {
        self.kill.is_some() && !self.status().is_terminal()
    }

    /// What is known since it left the queue, if it did.
    #[must_use]
    pub fn started(&self) -> Option<&Started> {
        match &self.state {
            State::Queued => None,
            State::Started(started) => Some(started),
            State::Ended { started, .. } => started.as_ref(),
        }
    }

    /// Why and when it ended (µs since the epoch), if it did.
    #[must_use]
    pub fn ended(&self) -> Option<(&RunResult, u64)> {
        match &self.state {
            State::Ended { result, at, .. } => Some((result, *at)),
            _ => None,
        }
    }

    /// The limit of rounds that holds for it.
    #[must_use]
    pub fn round_limit(&self) -> u32 {
        self.max_rounds.unwrap_or(limits::DEFAULT_MAX_ROUNDS)
    }
}
