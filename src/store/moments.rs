//! What a turn holds that a failpoint waits for; without failpoints, nothing.

use std::collections::BTreeSet;

use crate::engine::{Event, Turn};
use crate::model::run::RunEvent;
use crate::model::status::RunResult;
use crate::os::failpoint;

/// The events that failpoints tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Queued,
    Started,
    Message,
    Ended,
    KillRequested,
    Killed,
}

/// The moments that a turn passes on its way to the disk and back.
#[derive(Debug)]
pub struct Moments(BTreeSet<Kind>);

impl Moments {
    /// Those of this turn.
    #[must_use]
    pub fn of(turn: &Turn) -> Self {
        let mut kinds = BTreeSet::new();
        if cfg!(feature = "failpoints") {
            for staged in &turn.events {
                let Event::Run(_, event) = &staged.event else {
                    continue;
                };
                kinds.extend(match event {
                    RunEvent::Queued(_) => Some(Kind::Queued),
                    RunEvent::Started { .. } => Some(Kind::Started),
                    RunEvent::ThreadWorkflowMessage { .. } => Some(Kind::Message),
                    RunEvent::KillRequested(_) => Some(Kind::KillRequested),
                    RunEvent::Ended { result, .. } if *result == RunResult::Killed => {
                        Some(Kind::Killed)
                    }
                    RunEvent::Ended { .. } => Some(Kind::Ended),
                    RunEvent::Dispatched { .. }
                    | RunEvent::AttemptFailed { .. }
                    | RunEvent::Routed { .. }
                    | RunEvent::WorkerLost { .. }
                    | RunEvent::AbortRequested(_)
                    | RunEvent::Imported(_) => None,
                });
            }
        }
        Self(kinds)
    }

    fn has(&self, kind: Kind) -> bool {
        self.0.contains(&kind)
    }

    /// All is written, and the COMMIT is next.
    pub(super) fn before_commit(&self) {
        failpoint!("F03", self.has(Kind::Queued));
        failpoint!("F06", self.has(Kind::Started));
        failpoint!("F20", self.has(Kind::Ended) && self.has(Kind::Started));
        failpoint!("F24", self.has(Kind::Killed));
    }

    /// It is durable, and nobody was told.
    pub fn after_commit(&self) {
        failpoint!("F04", self.has(Kind::Queued));
        failpoint!("F07", self.has(Kind::Started));
        failpoint!("F14", self.has(Kind::Message));
        failpoint!("F17", self.has(Kind::Ended));
        failpoint!("F22", self.has(Kind::KillRequested));
        failpoint!("F25", self.has(Kind::Killed));
    }
}
