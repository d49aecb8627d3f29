//! Workers that are to be replaced: because somebody asks for it, because their settings have changed, because their
//! workflow is gone, or because they have nothing to do. A replacement never interrupts a run, unless somebody set a
//! time-out.

use std::collections::BTreeMap;

use super::admission::micros;
use super::{Action, Answer, Engine, Known, Order, Ticket, Touched, UnitState, Workflow};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{BootInstant, Caller, Illegal};
use crate::model::status::RunResult;
use crate::model::worker::WorkerEvent;

impl Engine {
    pub(super) fn drain(
        &mut self,
        ticket: Ticket,
        name: WorkflowName,
        timeout_us: Option<u64>,
        by: Caller,
    ) -> Touched {
        let Some(workflow) = self.workflows.get(&name) else {
            self.answer(ticket, Answer::UnknownWorkflow);
            return Touched::Nothing;
        };
        let Some(invocation) = workflow.worker.invocation().map(ToOwned::to_owned) else {
            let answer = if workflow.exists() {
                Answer::Done
            } else {
                Answer::UnknownWorkflow
            };
            self.answer(ticket, answer);
            return Touched::Nothing;
        };
        let until = timeout_us.map(|timeout| BootInstant {
            boot_id: self.boot_id.clone(),
            boot_us: self.now.boot_us.saturating_add(timeout),
        });
        let event = WorkerEvent::WorkerDraining {
            invocation,
            until,
            by,
        };
        self.note(&name, event);
        self.answer(ticket, Answer::Done);
        Touched::Workflow(name)
    }

    pub(super) fn reset(&mut self, ticket: Ticket, name: WorkflowName, by: Caller) -> Touched {
        let matters = |workflow: &Workflow| workflow.exists() || !workflow.live.is_empty();
        if !self.workflows.get(&name).is_some_and(matters) {
            self.answer(ticket, Answer::UnknownWorkflow);
            return Touched::Nothing;
        }
        self.note(&name, WorkerEvent::WorkflowReset { by });
        let worker = &mut self.workflow(&name).worker;
        worker.forget_retries();
        if !matches!(
            worker.unit,
            None | Some(UnitState::Absent | UnitState::Foreign)
        ) {
            let workflow = name.clone();
            self.act(Action::ResetUnit { workflow });
        }
        self.answer(ticket, Answer::Done);
        Touched::Workflow(name)
    }

    /// Takes new definitions: what runs keeps its own, what waits takes the one that is current when its turn comes.
    pub(super) fn definitions(
        &mut self,
        mut definitions: BTreeMap<WorkflowName, Known>,
        max_active: Option<u32>,
    ) -> Result<Touched, Illegal> {
        self.max_active = max_active;
        let known: Vec<_> = self.workflows.keys().cloned().collect();
        for name in known {
            let definition = definitions.remove(&name).unwrap_or_default();
            self.workflow(&name).known = definition;
            if !self.workflow(&name).exists() {
                while let Some((_, id)) = self.workflow(&name).queue.pop_first() {
                    let detail = "its definition was removed".to_owned();
                    self.drop_queued(id, RunResult::Removed, detail)?;
                }
            }
        }
        for (name, definition) in definitions {
            self.workflow(&name).known = definition;
            // When systemd was asked about all units this one did not matter.
            self.act(Action::ReadUnit { workflow: name });
        }
        Ok(Touched::Everything)
    }

    /// When what is left on a worker that is being drained is ended.
    pub(super) fn drain_until(&self, workflow: &Workflow) -> Option<u64> {
        let drain = workflow.record.draining.as_ref()?;
        let until = drain.until.as_ref()?;
        let is_on = workflow.worker.invocation() == Some(&drain.invocation)
            && until.boot_id == self.boot_id
            && workflow.live.values().any(|id| {
                self.open
                    .get(id)
                    .is_some_and(|open| !open.is_finishing() && open.is_with(&drain.invocation))
            });
        is_on.then_some(until.boot_us)
    }

    /// Ends what is left when a drain has taken too long.
    pub(super) fn end_drain(&mut self, name: &WorkflowName) {
        let Some(workflow) = self.workflows.get(name) else {
            return;
        };
        let is_due = self
            .drain_until(workflow)
            .is_some_and(|at| at <= self.now.boot_us);
        let Some(drain) = workflow.record.draining.clone().filter(|_| is_due) else {
            return;
        };
        for id in self.live(name) {
            if let Some(open) = self.open.get_mut(&id)
                && open.is_with(&drain.invocation)
                && !open.is_finishing()
            {
                open.ending = Some(Box::new((RunResult::Drained, None)));
                self.start_kill(id, micros(limits::DEFAULT_GRACE));
            }
        }
    }

    /// Tells a worker to shut down that is to be replaced and has no run, or that has had nothing to do for long.
    pub(super) fn retire(&mut self, name: &WorkflowName) {
        let now = self.now.boot_us;
        let Some(workflow) = self.workflows.get(name) else {
            return;
        };
        let Some(current) = &workflow.worker.current else {
            return;
        };
        let Some(link) = current.link.filter(|_| current.gone_by.is_none()) else {
            if let Some(current) = &mut self.workflow(name).worker.current {
                current.idle_since = None;
            }
            return;
        };
        // Somebody who drains this worker wants it gone, though runs may wait for the next one.
        let is_asked = workflow.is_drained_by(&current.invocation);
        let wants_other = |id: &RunId| {
            let open = self.open.get(id);
            open.is_some_and(|open| {
                !open.is_with(&current.invocation)
                    && open.wants_other_than(current.settings.as_ref())
            })
        };
        let is_wrong = workflow.live.values().any(wants_other);
        let has_runs = if is_asked || is_wrong {
            let is_with = |id| {
                let open = self.open.get(id);
                open.is_some_and(|open| open.is_held() || open.is_with(&current.invocation))
            };
            workflow.live.values().any(is_with)
        } else {
            !workflow.live.is_empty()
        };
        let is_unwanted = is_wrong || workflow.is_draining() || !workflow.may_start();
        let idle_since = (!has_runs).then(|| current.idle_since.unwrap_or(now));
        let is_over = idle_since.is_some_and(|since| {
            is_unwanted || since.saturating_add(micros(limits::WORKER_IDLE)) <= now
        });
        if let Some(current) = &mut self.workflow(name).worker.current {
            current.idle_since = idle_since.filter(|_| !is_over);
            if is_over {
                current.gone_by = Some(now + micros(limits::SHUTDOWN));
                self.tell(link, Order::Shutdown);
            }
        }
    }
}

impl Workflow {
    /// Somebody asked that this invocation be replaced.
    pub(super) fn is_drained_by(&self, invocation: &str) -> bool {
        self.record
            .draining
            .as_ref()
            .is_some_and(|drain| drain.invocation == invocation)
    }

    /// Whether a worker is to be replaced, and so nothing leaves the queue for it.
    pub(super) fn is_draining(&self) -> bool {
        let is_outdated = match &self.known.definition {
            Some(definition) => self
                .worker
                .settings()
                .is_some_and(|settings| definition.workflow.worker.digest() != *settings),
            None => self.worker.is_there(),
        };
        let is_drained = |invocation| self.is_drained_by(invocation);
        is_outdated || self.worker.invocation().is_some_and(is_drained)
    }
}
