//! Starts, the queue and the slots. A slot is a live run: there is no counter that could leak.

use std::time::Duration;

use super::{Answer, Engine, Open, Staged, Ticket};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Accepted, Illegal, Run, RunEvent};
use crate::model::status::RunResult;

impl Engine {
    pub(super) fn start(&mut self, ticket: Ticket, id: RunId, accepted: &Accepted) -> WorkflowName {
        let name = accepted.workflow.clone();
        let refusal = match self.workflows.get(&name) {
            None => Some(Answer::UnknownWorkflow),
            Some(workflow) if workflow.definition.is_none() => Some(match &workflow.fault {
                Some(fault) => Answer::BadDefinition(fault.clone()),
                None => Answer::UnknownWorkflow,
            }),
            Some(_) => None,
        };
        if let Some(answer) = refusal {
            self.answer(ticket, answer);
            return name;
        }
        let at = self.now.wall_us;
        let run = Run::accept(id, at, accepted);
        self.turn.runs.insert(id, run.clone());
        self.turn.events.push(Staged {
            run: id,
            event: RunEvent::Queued(accepted.clone()),
            at,
        });
        let order = self.next_order;
        self.next_order += 1;
        self.open.insert(id, Open::new(run, order));
        self.workflow(&name).queue.insert(order, id);
        self.answer(ticket, Answer::Done);
        name
    }

    /// Fills free slots from the queue, oldest first, then evicts what the queue may not hold, oldest first.
    pub(super) fn admit(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let Some(definition) = self
            .workflows
            .get(name)
            .and_then(|workflow| workflow.definition.clone())
        else {
            return Ok(());
        };
        let limits = &definition.workflow;
        let concurrency = usize::try_from(limits.concurrency).unwrap_or(usize::MAX);
        while self.workflow(name).live.len() < concurrency {
            let Some((order, id)) = self.workflow(name).queue.pop_first() else {
                break;
            };
            self.workflow(name).live.insert(order, id);
            let since = self.instant();
            let asked = self.open.get(&id).and_then(|open| open.run.max_rounds);
            let max_rounds = asked
                .or(limits.max_rounds)
                .unwrap_or(limits::DEFAULT_MAX_ROUNDS);
            let event = RunEvent::Started {
                definition: definition.digest.clone(),
                max_rounds,
                since,
            };
            self.record(id, event)?;
            let timeout_at = limits
                .timeout
                .map(|timeout| self.now.boot_us + micros(timeout + limits::TIMEOUT_SLACK));
            if let Some(open) = self.open.get_mut(&id) {
                open.definition = Some(definition.clone());
                open.timeout_at = timeout_at;
            }
        }
        let max_queue = usize::try_from(limits.max_queue).unwrap_or(usize::MAX);
        while self.workflow(name).queue.len() > max_queue {
            let Some((_, id)) = self.workflow(name).queue.pop_first() else {
                break;
            };
            self.record(
                id,
                RunEvent::Ended {
                    result: RunResult::QueueFull,
                    detail: None,
                },
            )?;
            self.open.remove(&id);
        }
        Ok(())
    }
}

/// A duration in µs; one too long for that never passes anyway.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
