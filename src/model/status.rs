//! The one table of statuses, results and exit codes: the same in the store, on the bus, in nervectl and the man pages.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::limits;

/// Where a run stands. The names are what people, the store and the bus see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
    /// Its worker was drained with a time-out that passed, or it had not ended when its history was imported.
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
            .ok_or_else(|| UnknownWord::status(text))
    }
}

/// A word that this version does not know where it knows all of them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {0} {1:?}")]
pub struct UnknownWord(&'static str, String);

impl UnknownWord {
    pub(super) fn status(text: &str) -> Self {
        Self("status", text.chars().take(80).collect())
    }
}

/// Why an LLM gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LlmError {
    /// It does not know the key, or the key may not do this (401, 403).
    Unauthorized,
    /// There is no such address or model (404).
    NotFound,
    /// Too much was asked of it (429).
    RateLimited,
    /// It does not understand what it is asked (400, 422, and other refusals).
    BadRequest,
    /// It failed (5xx).
    ServerError,
    /// It took too long.
    TimeOut,
    /// No connection to it could be made.
    Unreachable,
    /// The connection broke in the middle of the answer.
    CutOff,
    /// What it said is no answer.
    Malformed,
    /// It said more than a reply may hold.
    TooLarge,
}

impl LlmError {
    /// Each of them.
    pub const ALL: [Self; 10] = [
        Self::Unauthorized,
        Self::NotFound,
        Self::RateLimited,
        Self::BadRequest,
        Self::ServerError,
        Self::TimeOut,
        Self::Unreachable,
        Self::CutOff,
        Self::Malformed,
        Self::TooLarge,
    ];

    /// As it is written after `llm-error:`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::NotFound => "not-found",
            Self::RateLimited => "rate-limited",
            Self::BadRequest => "bad-request",
            Self::ServerError => "server-error",
            Self::TimeOut => "time-out",
            Self::Unreachable => "unreachable",
            Self::CutOff => "cut-off",
            Self::Malformed => "malformed",
            Self::TooLarge => "too-large",
        }
    }
}

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
    /// A role said nothing for longer than it may.
    RoleStalled,
    /// A role's reply is not what its `meta` asks for.
    BadReply,
    /// The moderator failed, or named no role.
    BadRoute,
    /// An LLM did not answer, or not as it should.
    LlmError(LlmError),
    /// A round ended with a status that no route handles.
    NoRoute(String),
    /// `max_rounds` used up.
    MaxRounds,
    /// The run's time-out passed.
    Timeout,
    /// Its worker was drained.
    Drained,
    /// It had not ended when its history was imported.
    Imported,
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
    /// What it said so far cannot be read any more, so that no worker can go on with it.
    ThreadDamaged,
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
            | Self::RoleStalled
            | Self::BadReply
            | Self::BadRoute
            | Self::LlmError(_)
            | Self::NoRoute(_) => (Status::Failed, 1),
            Self::MaxRounds => (Status::Failed, 2),
            Self::Timeout => (Status::Failed, 124),
            Self::Drained | Self::Imported => (Status::Interrupted, 130),
            Self::Killed => (Status::Killed, 137),
            Self::Aborted => (Status::Aborted, 143),
            Self::QueueFull | Self::Blocked | Self::Removed => (Status::Dropped, 75),
            Self::WorkerDied
            | Self::WorkerExit(_)
            | Self::StartLimitHit
            | Self::UnitRefused
            | Self::ThreadDamaged => (Status::Crashed, 255),
        }
    }

    /// The results that are one word.
    const WORDS: [(&str, Self); 22] = [
        ("success", Self::Success),
        ("exec-failed", Self::ExecFailed),
        ("role-timeout", Self::RoleTimeout),
        ("oom-kill", Self::OomKill),
        ("reply-too-large", Self::ReplyTooLarge),
        ("template-error", Self::TemplateError),
        ("role-stalled", Self::RoleStalled),
        ("bad-reply", Self::BadReply),
        ("bad-route", Self::BadRoute),
        ("max-rounds", Self::MaxRounds),
        ("timeout", Self::Timeout),
        ("drained", Self::Drained),
        ("imported", Self::Imported),
        ("killed", Self::Killed),
        ("aborted", Self::Aborted),
        ("queue-full", Self::QueueFull),
        ("blocked", Self::Blocked),
        ("removed", Self::Removed),
        ("worker-died", Self::WorkerDied),
        ("start-limit-hit", Self::StartLimitHit),
        ("unit-refused", Self::UnitRefused),
        ("thread-damaged", Self::ThreadDamaged),
    ];
}

impl fmt::Display for RunResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExitCode(code) => write!(f, "exit-code:{code}"),
            Self::Signal(name) => write!(f, "signal:{name}"),
            Self::NoRoute(status) => write!(f, "no-route:{status}"),
            Self::WorkerExit(code) => write!(f, "worker-exit:{code}"),
            Self::LlmError(error) => write!(f, "llm-error:{}", error.as_str()),
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
        if text.chars().any(char::is_control) {
            return Err(unknown());
        }
        match text.split_once(':') {
            Some(("exit-code", rest)) => code(rest).map(Self::ExitCode),
            Some(("worker-exit", rest)) => code(rest).map(Self::WorkerExit),
            Some(("llm-error", rest)) => LlmError::ALL
                .into_iter()
                .find(|error| error.as_str() == rest)
                .map(Self::LlmError)
                .ok_or_else(unknown),
            Some((_, rest)) if rest.len() > limits::STATUS_BYTES => Err(unknown()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_result_has_a_row_of_the_table_and_comes_back_from_its_text() {
        let rows = [
            ("success", Status::Completed, 0),
            ("exit-code:42", Status::Failed, 1),
            ("signal:SIGSEGV", Status::Failed, 1),
            ("exec-failed", Status::Failed, 1),
            ("role-timeout", Status::Failed, 1),
            ("oom-kill", Status::Failed, 1),
            ("reply-too-large", Status::Failed, 1),
            ("template-error", Status::Failed, 1),
            ("role-stalled", Status::Failed, 1),
            ("bad-reply", Status::Failed, 1),
            ("bad-route", Status::Failed, 1),
            ("llm-error:rate-limited", Status::Failed, 1),
            ("no-route:done", Status::Failed, 1),
            ("max-rounds", Status::Failed, 2),
            ("timeout", Status::Failed, 124),
            ("drained", Status::Interrupted, 130),
            ("imported", Status::Interrupted, 130),
            ("killed", Status::Killed, 137),
            ("aborted", Status::Aborted, 143),
            ("queue-full", Status::Dropped, 75),
            ("blocked", Status::Dropped, 75),
            ("removed", Status::Dropped, 75),
            ("worker-died", Status::Crashed, 255),
            ("worker-exit:217", Status::Crashed, 255),
            ("start-limit-hit", Status::Crashed, 255),
            ("unit-refused", Status::Crashed, 255),
        ];
        for (text, status, code) in rows {
            let result: RunResult = text.parse().unwrap();
            assert_eq!(result.end(), (status, code), "{text}");
            assert_eq!(result.to_string(), text);
            assert!(status.is_terminal());
        }
        for bad in [
            "",
            "Success",
            "exit-code:",
            "exit-code:x",
            "worker-exit",
            "llm-error:odd",
            "oom",
            &format!("no-route:{}", "x".repeat(limits::STATUS_BYTES + 1)),
        ] {
            assert!(bad.parse::<RunResult>().is_err(), "{bad}");
        }
    }

    #[test]
    fn statuses_come_back_from_their_names_and_an_unknown_one_is_an_error() {
        for status in Status::ALL {
            assert_eq!(status.as_str().parse(), Ok(status));
        }
        assert!("running".parse::<Status>().is_err());
    }
}
