//! Who waits for an answer of the engine, and what will be on record about what he asked for. The driver's own.

use std::collections::HashMap;

use serde::Deserialize as _;
use tokio::sync::oneshot;

use super::handle::Change;
use crate::engine::{Action, Answer, Ticket};
use crate::model::audit::{Audit, Verb};
use crate::model::run::Caller;

/// The clients that have not been answered yet.
#[derive(Debug, Default)]
pub(super) struct Tickets {
    waiting: HashMap<Ticket, Waiting>,
    next: Ticket,
}

#[derive(Debug)]
struct Waiting {
    reply: oneshot::Sender<Answer>,
    asked: Asked,
}

/// What was asked for, of whom, by whom and why.
#[derive(Debug, Clone)]
struct Asked {
    verb: Verb,
    subject: String,
    by: Option<Caller>,
    reason: Option<String>,
}

impl Tickets {
    /// Stands for this client from now on.
    pub fn take(&mut self, change: &Change, reply: oneshot::Sender<Answer>) -> Ticket {
        let ticket = self.next;
        self.next += 1;
        let asked = Asked::of(change);
        self.waiting.insert(ticket, Waiting { reply, asked });
        ticket
    }

    /// What goes on record with the answers among these actions.
    pub fn audits(&self, actions: &[Action], at: u64) -> Vec<Audit> {
        let audit = |action: &Action| match action {
            Action::Answer { ticket, answer } => {
                let waiting = self.waiting.get(ticket)?;
                Some(waiting.asked.clone().answered(answer, at))
            }
            _ => None,
        };
        actions.iter().filter_map(audit).collect()
    }

    /// Tells a client. One that went away needs no answer.
    pub fn answer(&mut self, ticket: Ticket, answer: Answer) {
        if let Some(waiting) = self.waiting.remove(&ticket) {
            let _ = waiting.reply.send(answer);
        }
    }

    /// Tells everybody the same.
    pub fn answer_all(&mut self, answer: &Answer) {
        for (_, waiting) in self.waiting.drain() {
            let _ = waiting.reply.send(answer.clone());
        }
    }
}

impl Asked {
    fn of(change: &Change) -> Self {
        let of = |verb, subject, by: &Caller| Self {
            verb,
            subject,
            by: Some(by.clone()),
            reason: None,
        };
        match change {
            Change::Start { accepted, .. } => Self {
                verb: Verb::Start,
                subject: accepted.workflow.to_string(),
                by: Caller::deserialize(&accepted.trigger).ok(),
                reason: None,
            },
            Change::Kill { run, request } => Self {
                verb: Verb::Kill,
                subject: run.to_string(),
                by: request.by.clone(),
                reason: request.reason.clone(),
            },
            Change::Abort { run, request } => Self {
                reason: request.reason.clone(),
                ..of(Verb::Abort, run.to_string(), &request.by)
            },
            Change::Drain { workflow, by, .. } => of(Verb::Drain, workflow.to_string(), by),
            Change::Reset { workflow, by } => of(Verb::Reset, workflow.to_string(), by),
            Change::Pause { reason, by } => Self {
                reason: reason.clone(),
                ..of(Verb::Pause, Audit::NERVE.to_owned(), by)
            },
            Change::Resume { by } => of(Verb::Resume, Audit::NERVE.to_owned(), by),
        }
    }

    /// The entry. A start that led to a run is that run's.
    fn answered(self, answer: &Answer, at: u64) -> Audit {
        let (run, outcome) = match answer {
            Answer::Done => (None, Audit::DONE.to_owned()),
            Answer::Started { run, dropped, .. } => (
                Some(run),
                match dropped {
                    Some((result, _)) => format!("dropped: {result}"),
                    None => Audit::DONE.to_owned(),
                },
            ),
            Answer::Existing(run) => (Some(run), "existing".to_owned()),
            Answer::UnknownWorkflow => (None, "unknown-workflow".to_owned()),
            Answer::BadDefinition(_) => (None, "bad-definition".to_owned()),
            Answer::NotOpen => (None, "not-open".to_owned()),
            Answer::Ending => (None, "ending".to_owned()),
            Answer::NoSpace(_) => (None, "no-space".to_owned()),
        };
        Audit {
            verb: self.verb,
            subject: run.map_or(self.subject, ToString::to_string),
            by: self.by,
            reason: self.reason,
            outcome,
            at,
        }
    }
}
