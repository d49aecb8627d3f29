//! Workers: their units, their links, what they are sent, and what their death means for the runs they had.
//!
//! A unit is known by what systemd says of it; a worker is ready when its link says so. A run belongs to the
//! invocation it was dispatched to: when another invocation is ready, the first one is dead.

use std::collections::BTreeMap;

use super::admission::micros;
use super::{Action, Cgroup, Dispatch, Engine, Held, LinkId, Order};
use crate::model::exit::Exit;
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Illegal, Place, RunEvent};
use crate::model::status::RunResult;

/// A worker unit, as systemd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Where it stands.
    pub state: UnitState,
    /// How its last main process ended, if one did.
    pub exit: Option<Exit>,
    /// systemd's own words for people.
    pub detail: String,
}

/// Where a unit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitState {
    /// Not loaded, or stopped.
    Absent,
    /// On its way up, or about to be restarted.
    Starting,
    /// Up.
    Active,
    /// On its way down.
    Stopping,
    /// systemd gave up.
    Failed,
}

/// What the engine knows of a workflow's worker.
#[derive(Debug, Default)]
pub(super) struct Worker {
    /// `None`: systemd has not been asked yet.
    pub(super) unit: Option<UnitState>,
    link: Option<Link>,
    last_exit: Option<Exit>,
    /// Since when it has nothing to do, in µs of CLOCK_BOOTTIME.
    idle_since: Option<u64>,
    told_to_stop: bool,
    /// systemd was asked to start the unit and has not answered: that there is none is no news.
    pub(super) start_pending: bool,
    /// Starts since the last `ready`.
    barren_starts: u32,
}

#[derive(Debug)]
struct Link {
    id: LinkId,
    place: Place,
}

impl Worker {
    pub(super) fn link_id(&self) -> Option<LinkId> {
        self.link.as_ref().map(|link| link.id)
    }

    pub(super) fn shutdown_at(&self) -> Option<u64> {
        Some(self.idle_since?.saturating_add(micros(limits::WORKER_IDLE)))
    }

    pub(super) fn word(&self) -> &'static str {
        match (&self.link, self.unit) {
            _ if self.told_to_stop => "stopping",
            (Some(_), _) => "ready",
            (None, None) => "unknown",
            (None, Some(UnitState::Absent)) => "absent",
            (None, Some(UnitState::Starting | UnitState::Active)) => "starting",
            (None, Some(UnitState::Stopping)) => "stopping",
            (None, Some(UnitState::Failed)) => "failed",
        }
    }
}

impl Engine {
    /// A worker is there. Brings together the runs it has and the runs it should have.
    pub(super) fn ready(
        &mut self,
        link: LinkId,
        name: &WorkflowName,
        place: &Place,
        held: &[RunId],
    ) -> Result<(), Illegal> {
        let worker = &mut self.workflow(name).worker;
        let old = worker.link.replace(Link {
            id: link,
            place: place.clone(),
        });
        worker.unit = Some(UnitState::Active);
        worker.told_to_stop = false;
        worker.start_pending = false;
        worker.barren_starts = 0;
        self.links.insert(link, name.clone());
        if let Some(old) = old {
            self.links.remove(&old.id);
            self.act(Action::Refuse {
                link: old.id,
                error: "another connection of this worker replaced this one".into(),
            });
        }
        self.tell(link, Order::Welcome);
        let live = self.live(name);
        for id in held.iter().filter(|id| !live.contains(id)) {
            self.disown(link, *id);
        }
        for id in live {
            let Some(open) = self.open.get_mut(&id) else {
                continue;
            };
            let same = open
                .place()
                .is_some_and(|old| old.invocation == place.invocation);
            open.held = if same && held.contains(&id) {
                Held::Works
            } else {
                Held::No
            };
            if open.place().is_some() && !same {
                self.lost(id)?;
            } else if open.held == Held::Works {
                match (&open.run.kill, &open.ending) {
                    (Some(kill), _) => {
                        let grace_us = kill.grace_us;
                        self.start_kill(id, grace_us);
                    }
                    (None, Some(_)) => self.tell(
                        link,
                        Order::KillThread {
                            run: id,
                            grace_us: 0,
                        },
                    ),
                    (None, None) => {}
                }
            } else if open.run.is_killing() {
                self.empty(id);
            }
        }
        Ok(())
    }

    /// The invocation that had this run is gone.
    fn lost(&mut self, id: RunId) -> Result<(), Illegal> {
        let Some(open) = self.open.get(&id) else {
            return Ok(());
        };
        let exit = self
            .workflows
            .get(&open.run.workflow)
            .and_then(|workflow| workflow.worker.last_exit);
        let Some((place, started)) = open.place().cloned().zip(open.run.started()) else {
            return Ok(());
        };
        if !started.is_lost {
            let cause = exit
                .as_ref()
                .map_or_else(|| "unknown".to_owned(), ToString::to_string);
            let event = RunEvent::WorkerLost {
                invocation: place.invocation,
                attempt: started.attempt,
                cause,
            };
            self.record(id, event)?;
        }
        let losses = self
            .open
            .get(&id)
            .and_then(|open| Some(open.run.started()?.losses))
            .unwrap_or_default();
        if losses > limits::RESUMES_WITHOUT_PROGRESS {
            let result = match exit {
                Some(Exit::Code(code)) if code != 0 => RunResult::WorkerExit(code),
                _ => RunResult::WorkerDied,
            };
            return self.end(id, result, None);
        }
        if self
            .open
            .get(&id)
            .is_some_and(|open| open.is_finishing() || open.cgroup != Cgroup::Empty)
        {
            self.empty(id);
        }
        Ok(())
    }

    pub(super) fn link_lost(&mut self, link: LinkId) -> Option<WorkflowName> {
        let name = self.links.remove(&link)?;
        self.workflow(&name).worker.link = None;
        for id in self.live(&name) {
            if let Some(open) = self.open.get_mut(&id) {
                open.held = Held::No;
            }
        }
        Some(name)
    }

    /// Sends the worker every run that it should have and has not. A run that an earlier invocation had waits until
    /// that one's processes are gone.
    pub(super) fn dispatch(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let Some(worker) = self.workflows.get(name).map(|workflow| &workflow.worker) else {
            return Ok(());
        };
        let Some(link) = worker.link.as_ref().filter(|_| !worker.told_to_stop) else {
            return Ok(());
        };
        let (link, place) = (link.id, link.place.clone());
        for id in self.live(name) {
            let Some(open) = self.open.get(&id) else {
                continue;
            };
            let is_elsewhere = open.place().is_some_and(|old| *old != place);
            if open.held != Held::No
                || open.is_finishing()
                || is_elsewhere && open.cgroup != Cgroup::Empty
            {
                continue;
            }
            if open.place() != Some(&place) {
                let attempt = open.run.started().map_or(0, |started| started.attempt) + 1;
                self.record(
                    id,
                    RunEvent::Dispatched {
                        place: place.clone(),
                        attempt,
                    },
                )?;
            }
            self.send(id, link);
        }
        Ok(())
    }

    fn send(&mut self, id: RunId, link: LinkId) {
        let now = self.now.boot_us;
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        let Some((started, definition)) = open.run.started().zip(open.definition.clone()) else {
            return;
        };
        let slack = micros(limits::TIMEOUT_SLACK);
        let dispatch = Dispatch {
            run: id,
            attempt: started.attempt,
            rounds: open.run.position.rounds,
            max_rounds: open.run.round_limit(),
            dry_run: open.run.dry_run,
            trigger: open.run.trigger.clone(),
            timeout_us: open
                .timeout_at
                .map(|at| at.saturating_sub(slack).saturating_sub(now)),
            definition,
        };
        open.held = Held::Works;
        open.cgroup = Cgroup::Unknown;
        self.act(Action::Dispatch { link, dispatch });
    }

    /// Sees that a workflow with something to do has a worker, and notes since when one has nothing to do.
    pub(super) fn ensure_worker(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let waiting: Vec<_> = self
            .live(name)
            .into_iter()
            .filter(|id| self.open.get(id).is_some_and(|open| !open.is_finishing()))
            .collect();
        let now = self.now.boot_us;
        let Some(workflow) = self.workflows.get_mut(name) else {
            return Ok(());
        };
        let worker = &mut workflow.worker;
        let is_idle = worker.link.is_some() && workflow.live.is_empty() && !worker.told_to_stop;
        worker.idle_since = is_idle.then(|| worker.idle_since.unwrap_or(now));
        let startable = matches!(worker.unit, Some(UnitState::Absent | UnitState::Failed));
        let Some(first) = waiting
            .first()
            .filter(|_| startable && worker.link.is_none())
        else {
            return Ok(());
        };
        let Some(definition) = self
            .open
            .get(first)
            .and_then(|open| open.definition.clone())
        else {
            return Ok(());
        };
        worker.barren_starts += 1;
        if worker.barren_starts > limits::RESUMES_WITHOUT_PROGRESS + 1 {
            self.give_up(
                name,
                &RunResult::WorkerDied,
                "its worker ends before it is ready",
            )?;
            return self.settle(name);
        }
        worker.unit = Some(UnitState::Starting);
        worker.start_pending = true;
        self.act(Action::StartUnit {
            workflow: name.clone(),
            settings: definition.workflow.worker.clone(),
        });
        Ok(())
    }

    pub(super) fn shut_down_if_idle(&mut self, name: &WorkflowName) {
        let now = self.now.boot_us;
        let worker = &mut self.workflow(name).worker;
        if worker.shutdown_at().is_some_and(|at| at <= now)
            && let Some(link) = worker.link_id()
        {
            worker.told_to_stop = true;
            worker.idle_since = None;
            self.tell(link, Order::Shutdown);
        }
    }

    pub(super) fn unit(&mut self, name: &WorkflowName, unit: &Unit) -> Result<(), Illegal> {
        let worker = &mut self.workflow(name).worker;
        if worker.start_pending && unit.state == UnitState::Absent {
            return Ok(());
        }
        worker.start_pending = false;
        worker.unit = Some(unit.state);
        if unit.exit.is_some() {
            worker.last_exit = unit.exit;
        }
        if matches!(unit.state, UnitState::Absent | UnitState::Failed) {
            worker.told_to_stop = false;
            if let Some(link) = worker.link_id() {
                self.link_lost(link);
            }
            self.finish_kills(name);
        }
        if unit.state == UnitState::Failed {
            let result = match unit.exit {
                Some(Exit::Code(code)) if code != 0 => RunResult::WorkerExit(code),
                _ => RunResult::StartLimitHit,
            };
            self.give_up(name, &result, &unit.detail)?;
        }
        Ok(())
    }

    /// No worker is left that could kill: nerved does it at once.
    fn finish_kills(&mut self, name: &WorkflowName) {
        for id in self.live(name) {
            if self.open.get(&id).is_some_and(|open| open.run.is_killing()) {
                self.empty(id);
            }
        }
    }

    pub(super) fn units(&mut self, units: &BTreeMap<WorkflowName, Unit>) -> Result<(), Illegal> {
        let absent = Unit {
            state: UnitState::Absent,
            exit: None,
            detail: String::new(),
        };
        let names: Vec<_> = self.workflows.keys().cloned().collect();
        for name in names {
            self.workflow(&name).worker.start_pending = false;
            self.unit(&name, units.get(&name).unwrap_or(&absent))?;
        }
        Ok(())
    }

    pub(super) fn start_refused(
        &mut self,
        name: &WorkflowName,
        error: &str,
    ) -> Result<(), Illegal> {
        let worker = &mut self.workflow(name).worker;
        worker.start_pending = false;
        worker.unit = Some(UnitState::Absent);
        self.give_up(name, &RunResult::UnitRefused, error)
    }

    /// There is no worker and there will be none: ends what waits for one.
    fn give_up(
        &mut self,
        name: &WorkflowName,
        result: &RunResult,
        detail: &str,
    ) -> Result<(), Illegal> {
        self.workflow(name).worker.barren_starts = 0;
        for id in self.live(name) {
            self.end(id, result.clone(), Some(detail.to_owned()))?;
        }
        Ok(())
    }
}
