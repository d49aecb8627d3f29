//! Ends. Every end of a run that a worker ever had goes through an empty cgroup, and a kill that was accepted before
//! the end was committed wins.

use super::admission::micros;
use super::{Action, Answer, Cgroup, Engine, Held, LinkId, Order, Ticket, UnitState};
use crate::model::limits;
use crate::model::message::Message;
use crate::model::moderator::{self, Next};
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Illegal, KillRequest, RunEvent};
use crate::model::status::{RunResult, Status};

impl Engine {
    /// Accepts a kill. A repeated one counts anew, so that somebody who is in a hurry can shorten the grace.
    pub(super) fn kill(
        &mut self,
        ticket: Ticket,
        id: RunId,
        request: KillRequest,
    ) -> Result<Option<WorkflowName>, Illegal> {
        let Some(open) = self.open.get(&id) else {
            self.answer(ticket, Answer::NotOpen);
            return Ok(None);
        };
        let workflow = open.run.workflow.clone();
        let is_queued = open.run.status() == Status::Queued;
        let is_placed = open.place().is_some();
        let order = open.order;
        let grace_us = request.grace_us;
        self.record(id, RunEvent::KillRequested(request))?;
        self.answer(ticket, Answer::Done);
        if is_placed {
            self.start_kill(id, grace_us);
        } else {
            if is_queued {
                self.workflow(&workflow).queue.remove(&order);
            }
            self.finish(id)?;
        }
        Ok(Some(workflow))
    }

    /// Begins the kill ladder: the worker first, nerved when it has not confirmed in time; nerved at once when there
    /// is no worker.
    pub(super) fn start_kill(&mut self, id: RunId, grace_us: u64) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        open.kill_at = Some(
            self.now
                .boot_us
                .saturating_add(grace_us)
                .saturating_add(micros(limits::KILL_CONFIRM)),
        );
        let held = open.held != Held::No;
        let name = open.run.workflow.clone();
        let worker = &self.workflow(&name).worker;
        match worker.link_id() {
            Some(link) if held => self.tell(link, Order::KillThread { run: id, grace_us }),
            _ if matches!(worker.unit, Some(UnitState::Absent | UnitState::Failed)) => {
                self.empty(id)
            }
            _ => {}
        }
    }

    /// Has the run's cgroup emptied; what then happens is [`Engine::emptied`]'s.
    pub(super) fn empty(&mut self, id: RunId) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        open.kill_at = None;
        let Some(cgroup) = open.place().map(|place| place.of_run(id)) else {
            return;
        };
        if std::mem::replace(&mut open.cgroup, Cgroup::Emptying) != Cgroup::Emptying {
            self.act(Action::Empty { run: id, cgroup });
        }
    }

    /// The run will end so once its cgroup is empty.
    pub(super) fn end(
        &mut self,
        id: RunId,
        result: RunResult,
        detail: Option<String>,
    ) -> Result<(), Illegal> {
        let Some(open) = self.open.get_mut(&id) else {
            return Ok(());
        };
        open.ending.get_or_insert((result, detail));
        if open.place().is_some() {
            self.empty(id);
            Ok(())
        } else {
            self.finish(id)
        }
    }

    pub(super) fn emptied(&mut self, id: RunId) -> Result<Option<WorkflowName>, Illegal> {
        let Some(open) = self.open.get_mut(&id) else {
            return Ok(None);
        };
        open.cgroup = Cgroup::Empty;
        let workflow = open.run.workflow.clone();
        if open.is_finishing() {
            self.finish(id)?;
        }
        Ok(Some(workflow))
    }

    /// The end itself. No process of the run is left.
    fn finish(&mut self, id: RunId) -> Result<(), Illegal> {
        let Some(open) = self.open.get(&id) else {
            return Ok(());
        };
        let (result, detail) = match &open.ending {
            _ if open.run.is_killing() => (RunResult::Killed, None),
            Some((result, detail)) => (result.clone(), detail.clone()),
            None => return Ok(()),
        };
        let (name, order, held) = (open.run.workflow.clone(), open.order, open.held);
        self.record(id, RunEvent::Ended { result, detail })?;
        self.open.remove(&id);
        let workflow = self.workflow(&name);
        workflow.live.remove(&order);
        if let Some(link) = workflow.worker.link_id().filter(|_| held != Held::No) {
            match held {
                Held::Reported => self.tell(link, Order::EventAck { run: id }),
                Held::Works | Held::No => self.disown(link, id),
            }
        }
        Ok(())
    }

    pub(super) fn message(
        &mut self,
        link: LinkId,
        id: RunId,
        round: u32,
        message: Message,
    ) -> Result<Option<WorkflowName>, Illegal> {
        let Some(open) = self.held(link, id) else {
            return Ok(None);
        };
        if open.is_finishing() {
            return Ok(None);
        }
        let done = open.run.position.rounds;
        if round <= done {
            self.tell(link, Order::MessageAck { run: id, round });
            return Ok(None);
        }
        let expected = open.definition.as_ref().map(|definition| {
            moderator::next(
                &definition.workflow,
                open.run.round_limit(),
                &open.run.position,
            )
        });
        let speaks = matches!(&expected, Some(Next::Role(role)) if role.as_str() == message.role);
        if round != done + 1 || !speaks {
            let error = format!(
                "round {round} of run {id} by {:?} is not what comes next: {expected:?}",
                message.role
            );
            self.act(Action::Refuse { link, error });
            return Ok(None);
        }
        self.record(id, RunEvent::ThreadWorkflowMessage { round, message })?;
        self.tell(link, Order::MessageAck { run: id, round });
        Ok(None)
    }

    pub(super) fn worker_ended(
        &mut self,
        link: LinkId,
        id: RunId,
        result: RunResult,
        is_empty: bool,
    ) -> Result<Option<WorkflowName>, Illegal> {
        let Some(open) = self.held(link, id) else {
            return Ok(None);
        };
        let name = open.run.workflow.clone();
        if !open.run.is_killing() {
            let moderated = open.definition.as_ref().is_some_and(|definition| {
                let workflow = &definition.workflow;
                let next = moderator::next(workflow, open.run.round_limit(), &open.run.position);
                next == Next::End(result.clone())
                    || result == RunResult::Timeout && workflow.timeout.is_some()
            });
            if !moderated && open.ending.is_none() {
                let error = format!("run {id} does not end {result} here");
                self.act(Action::Refuse { link, error });
                return Ok(None);
            }
        }
        if let Some(open) = self.open.get_mut(&id) {
            open.held = Held::Reported;
            open.ending.get_or_insert((result, None));
        }
        if is_empty {
            self.finish(id)?;
        } else {
            self.empty(id);
        }
        Ok(Some(name))
    }

    /// Has a worker end a run that is not its own, or no longer, and forget it.
    pub(super) fn disown(&mut self, link: LinkId, run: RunId) {
        self.tell(link, Order::KillThread { run, grace_us: 0 });
        self.tell(link, Order::EventAck { run });
    }

    /// The run, if this link's worker has it. A worker that speaks of another run is told to forget it.
    fn held(&mut self, link: LinkId, id: RunId) -> Option<&super::Open> {
        let holds = self.open.get(&id).is_some_and(|open| {
            let worker = self
                .workflows
                .get(&open.run.workflow)
                .map(|workflow| &workflow.worker);
            open.held != Held::No && worker.and_then(super::worker::Worker::link_id) == Some(link)
        });
        if !holds {
            self.disown(link, id);
            return None;
        }
        self.open.get(&id)
    }

    pub(super) fn deadlines(&mut self) -> Result<(), Illegal> {
        let now = self.now.boot_us;
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now);
        let names: Vec<_> = self.workflows.keys().cloned().collect();
        for name in names {
            for id in self.live(&name) {
                let Some(open) = self.open.get_mut(&id) else {
                    continue;
                };
                let (kill, timeout) = (due(open.kill_at), due(open.timeout_at));
                if timeout {
                    open.timeout_at = None;
                    self.end(id, RunResult::Timeout, None)?;
                } else if kill {
                    self.empty(id);
                }
            }
            self.shut_down_if_idle(&name);
        }
        Ok(())
    }
}
