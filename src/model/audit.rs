//! Who asked nerve for what, and what came of it.

use serde::Serialize;

use super::run::Caller;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    Start,
    Kill,
    Abort,
    Drain,
    Reset,
    Pause,
    Resume,
    Reload,
    Archive,
    Restore,
    Backup,
    Check,
    Import,
    PutBlob,
    /// Whatever it was, it was not allowed; the subject is the method.
    Denied,
}

impl Verb {
    /// The event's type in the log.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Kill => "kill",
            Self::Abort => "abort",
            Self::Drain => "drain",
            Self::Reset => "reset",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reload => "reload",
            Self::Archive => "archive",
            Self::Restore => "restore",
            Self::Backup => "backup",
            Self::Check => "check",
            Self::Import => "import",
            Self::PutBlob => "put-blob",
            Self::Denied => "denied",
        }
    }
}

/// An entry of the audit trail.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Audit {
    /// What was asked for; the event's type.
    #[serde(skip)]
    pub verb: Verb,
    /// To whom it was to be done: a run, a workflow, `nerve`; the event's reference.
    #[serde(skip)]
    pub subject: String,
    /// Who asked; absent when it was a signal, which has no sender.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub by: Option<Caller>,
    /// What the person said why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// `done`, or in a few words why not.
    pub outcome: String,
    /// µs since the epoch.
    #[serde(skip)]
    pub at: u64,
}

impl Audit {
    /// The subject when it is nerve as a whole.
    pub const NERVE: &str = "nerve";
    /// The outcome of what was done.
    pub const DONE: &str = "done";
}
