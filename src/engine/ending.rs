//! Ends. Every end of a run that a worker ever had goes through an empty cgroup; an abort that was accepted before
//! the end was committed wins, and a kill wins over both.

use super::admission::micros;
use super::{Action, Answer, Cgroup, Engine, Held, LinkId, Order, Ticket, Touched};
use crate::model::limits;
use crate::model::moderator;
use crate::model::name::RunId;
use crate::model::run::{AbortRequest, Illegal, KillRequest, RunEvent};
use crate::model::status::RunResult;
use crate::model::worker::{Cause, Death};

impl Engine {
    /// Accepts a kill. A repeated one counts anew, so that somebody who is in a hurry can shorten the grace.
    pub(super) fn kill(
        &mut self,
        ticket: Ticket,
        id: RunId,
        request: KillRequest,
    ) -> Result<Touched, Illegal> {
        let Some(open) = self.open.get(&id) else {
            self.answer(ticket, Answer::NotOpen);
            return Ok(Touched::Nothing);
        };
        let name = open.run.workflow.clone();
        let is_placed = open.place().is_some();
        let grace_us = request.grace_us;
        self.record(id, RunEvent::KillRequested(request))?;
        self.answer(ticket, Answer::Done);
        if is_placed {
            self.start_kill(id, grace_us);
        } else {
            self.finish(id)?;
        }
        Ok(Touched::Workflow(name))
    }

    /// Accepts an abort: the end of the run at the next round boundary, and at once when no worker has it.
    pub(super) fn abort(
        &mut self,
        ticket: Ticket,
        id: RunId,
        request: AbortRequest,
    ) -> Result<Touched, Illegal> {
        let asked = self.open.get(&id).map(|open| open.run.asked().is_some());
        if asked != Some(false) {
            let answer = asked.map_or(Answer::NotOpen, |_| Answer::Ending);
            self.answer(ticket, answer);
            return Ok(Touched::Nothing);
        }
        let reason = request.reason.clone();
        self.record(id, RunEvent::AbortRequested(request))?;
        self.answer(ticket, Answer::Done);
        let Some(open) = self.open.get(&id) else {
            return Ok(Touched::Nothing);
        };
        let (name, held) = (open.run.workflow.clone(), open.held);
        let link = self.workflow(&name).worker.link();
        match (held, link) {
            (Held::Works, Some(link)) => self.tell(link, Order::AbortThread { run: id, reason }),
            _ => self.end_aborted(id)?,
        }
        Ok(Touched::Workflow(name))
    }

    /// Ends an aborted run that no worker has, or that has come to a boundary. One whose worker is only not connected
    /// waits for it.
    fn end_aborted(&mut self, id: RunId) -> Result<(), Illegal> {
        let Some(open) = self.open.get(&id).filter(|open| open.is_nowhere()) else {
            return Ok(());
        };
        if open.place().is_none() || open.cgroup == Cgroup::Empty {
            self.finish(id)
        } else {
            self.empty(id);
            Ok(())
        }
    }

    /// Begins the kill ladder: the worker first, nerved when it has not confirmed in time; nerved at once when there
    /// is no worker that has it.
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
        let (is_held, is_nowhere) = (open.is_held(), open.is_nowhere());
        let name = open.run.workflow.clone();
        let worker = &self.workflow(&name).worker;
        match worker.link() {
            Some(link) if is_held => self.tell(link, Order::KillThread { run: id, grace_us }),
            _ if is_nowhere || worker.is_down() => self.empty(id),
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

    /// Its worker has not confirmed its end in time, so nerved sees to it. One that is not nerve's own keeps the
    /// processes of its runs where it likes, so all of its unit is killed; its other runs are resumed.
    fn empty_by_force(&mut self, id: RunId) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        let place = open.place().cloned().filter(|_| !open.is_nowhere());
        let (Some(place), true) = (place, open.has_own_worker()) else {
            return self.empty(id);
        };
        open.kill_at = None;
        open.cgroup = Cgroup::Emptying;
        let workflow = open.run.workflow.clone();
        let current = &mut self.workflow(&workflow).worker.current;
        if let Some(current) = current
            .as_mut()
            .filter(|current| current.invocation == place.invocation)
        {
            // It is to blame for that, and its other runs are not.
            current.killed_for = Some(Cause::Stopped);
        }
        self.act(Action::EmptyUnit {
            run: id,
            workflow,
            cgroup: place.cgroup,
        });
    }

    /// The run will end so once its cgroup is empty. A worker that has it must begin no other round meanwhile, and so is
    /// told first.
    pub(super) fn end(
        &mut self,
        id: RunId,
        result: RunResult,
        detail: Option<String>,
    ) -> Result<(), Illegal> {
        let Some(open) = self.open.get_mut(&id) else {
            return Ok(());
        };
        open.ending
            .get_or_insert_with(|| Box::new((result, detail)));
        if open.place().is_some() {
            self.start_kill(id, 0);
            Ok(())
        } else {
            self.finish(id)
        }
    }

    /// No worker has it, whatever was meant to be sent, and none can go on with it.
    pub(super) fn thread_damaged(&mut self, id: RunId, detail: String) -> Touched {
        let Some(open) = self.open.get_mut(&id) else {
            return Touched::Nothing;
        };
        open.held = Held::No;
        open.ending
            .get_or_insert_with(|| Box::new((RunResult::ThreadDamaged, Some(detail))));
        let name = open.run.workflow.clone();
        self.empty(id);
        Touched::Workflow(name)
    }

    pub(super) fn emptied(&mut self, id: RunId) -> Result<Touched, Illegal> {
        let Some(open) = self.open.get_mut(&id) else {
            return Ok(Touched::Nothing);
        };
        // What was dispatched again since then may have processes again.
        if open.cgroup != Cgroup::Emptying {
            return Ok(Touched::Nothing);
        }
        open.cgroup = Cgroup::Empty;
        let name = open.run.workflow.clone();
        if open.is_finishing() || open.run.is_aborting() {
            self.finish(id)?;
        }
        Ok(Touched::Workflow(name))
    }

    /// The end itself. No process of the run is left.
    pub(super) fn finish(&mut self, id: RunId) -> Result<(), Illegal> {
        let Some(open) = self.open.get(&id) else {
            return Ok(());
        };
        let (result, detail) = match (open.run.asked(), &open.ending) {
            (Some(asked), _) => (asked, None),
            (None, Some(ending)) => (**ending).clone(),
            (None, None) => return Ok(()),
        };
        let (name, order, held) = (open.run.workflow.clone(), open.order, open.held);
        self.record(id, RunEvent::Ended { result, detail })?;
        self.open.remove(&id);
        let workflow = self.workflow(&name);
        workflow.live.remove(&order);
        workflow.queue.remove(&order);
        if let Some(link) = workflow.worker.link() {
            match held {
                Held::Reported => self.tell(link, Order::EventAck { run: id }),
                Held::Works => self.disown(link, id),
                Held::No => {}
            }
        }
        Ok(())
    }

    pub(super) fn worker_ended(
        &mut self,
        link: LinkId,
        id: RunId,
        (result, detail): (RunResult, Option<String>),
        is_empty: bool,
    ) -> Result<Touched, Illegal> {
        let Some(open) = self.held(link, id) else {
            // Nothing to kill: a worker that is told to, and has no such run, would report its end again.
            self.tell(link, Order::EventAck { run: id });
            return Ok(Touched::Nothing);
        };
        let name = open.run.workflow.clone();
        if open.run.asked().is_none() {
            let moderated = open.definition.as_ref().is_some_and(|definition| {
                let (workflow, position) = (&definition.workflow, open.run.position());
                moderator::may_end(workflow, open.run.round_limit(), position, &result)
            });
            let is_unasked = !moderated && open.ending.is_none();
            if is_unasked && open.is_inherited && result == RunResult::Killed {
                // An earlier nerved wanted that, and did not live to store why. The run goes on.
                self.tell(link, Order::EventAck { run: id });
                if let Some(open) = self.open.get_mut(&id) {
                    open.held = Held::No;
                }
                self.lost(id, &Death::of(Cause::Unseen))?;
                return Ok(Touched::Workflow(name));
            }
            if is_unasked {
                let error = format!("run {id} does not end {result} here");
                self.act(Action::Refuse { link, error });
                return Ok(Touched::Nothing);
            }
        }
        if let Some(open) = self.open.get_mut(&id) {
            open.held = Held::Reported;
            open.ending
                .get_or_insert_with(|| Box::new((result, detail)));
        }
        if is_empty {
            self.finish(id)?;
        } else {
            self.empty(id);
        }
        Ok(Touched::Workflow(name))
    }

    /// Has a worker end a run that is not its own, or no longer, and forget it.
    pub(super) fn disown(&mut self, link: LinkId, run: RunId) {
        self.tell(link, Order::KillThread { run, grace_us: 0 });
        self.tell(link, Order::EventAck { run });
    }

    /// The run, if this link's worker has it.
    pub(super) fn held(&self, link: LinkId, id: RunId) -> Option<&super::Open> {
        self.open.get(&id).filter(|open| {
            let workflow = self.workflows.get(&open.run.workflow);
            open.is_held() && workflow.and_then(|workflow| workflow.worker.link()) == Some(link)
        })
    }

    pub(super) fn deadlines(&mut self) -> Result<(), Illegal> {
        let now = self.now.boot_us;
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now);
        if due(self.going_down_until) {
            self.going_down_until = None;
        }
        let names: Vec<_> = self.workflows.keys().cloned().collect();
        for name in names {
            self.end_drain(&name);
            for id in self.live(&name) {
                let Some(open) = self.open.get_mut(&id) else {
                    continue;
                };
                let (kill, timeout) = (due(open.kill_at), due(open.timeout_at));
                if timeout {
                    open.timeout_at = None;
                    self.end(id, RunResult::Timeout, None)?;
                } else if kill {
                    self.empty_by_force(id);
                }
            }
            self.worker_deadlines(&name);
        }
        Ok(())
    }
}
