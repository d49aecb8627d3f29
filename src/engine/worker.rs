//! Units and links: who is there.
//!
//! A unit is known by what systemd says of it; a worker is ready when its link says so. A run belongs to the
//! invocation it was dispatched to. An invocation is gone when systemd says so, or when another one is there: of two
//! answers of systemd the newer one counts, so that nothing is believed that is late.

use std::collections::{BTreeMap, BTreeSet};

use super::admission::micros;
use super::unit::{Current, Patience, Peer};
use super::{Action, Engine, Held, LinkId, Order, ReadId, Stop, Touched, Unit, UnitState};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Illegal, Place};
use crate::model::worker::WorkerEvent;

impl Engine {
    /// A worker is there. Brings together the runs it has and the runs it should have.
    pub(super) fn ready(&mut self, name: &WorkflowName, peer: Peer) {
        let worker = &self.workflow(name).worker;
        let is_known = worker.invocation() == Some(&peer.place.invocation);
        if is_known && worker.unit == Some(UnitState::Stopping) {
            let error = "its unit is being stopped".to_owned();
            let link = peer.link;
            return self.act(Action::Refuse { link, error });
        }
        if !is_known {
            let is_old = peer.read < worker.read;
            if is_old && (worker.current.is_some() || worker.is_down()) {
                let (link, invocation) = (peer.link, peer.place.invocation);
                let error = format!("invocation {invocation} is not the current one");
                self.act(Action::Fence { link, error });
                return;
            }
            let others = self.others(name, Some(&peer.place.invocation));
            if is_old || !others.is_empty() {
                self.wait_for_systemd(name, peer);
                return;
            }
            self.appeared(name, peer.read, Current::new(&peer.place, peer.settings));
        }
        let Peer {
            link, place, held, ..
        } = peer;
        if self.workflow(name).record.stopped.is_some() {
            self.note(name, WorkerEvent::WorkerBack);
        }
        let worker = &mut self.workflow(name).worker;
        worker.unit = Some(UnitState::Active);
        worker.forget_retries();
        let Some(current) = worker.current.as_mut() else {
            return;
        };
        current.ready_by = None;
        current.cgroup.clone_from(&place.cgroup);
        if let Some(old) = current.link.replace(link) {
            self.replaced(old);
        }
        self.links.insert(link, name.clone());
        self.tell(link, Order::Welcome);
        let live = self.live(name);
        for id in held.iter().filter(|id| !live.contains(id)) {
            self.disown(link, *id);
        }
        for id in live {
            self.reunite(id, link, &place, held.contains(&id));
        }
    }

    /// How those before it ended is systemd's to say: who was stopped is not to be blamed.
    fn wait_for_systemd(&mut self, name: &WorkflowName, peer: Peer) {
        self.links.insert(peer.link, name.clone());
        if let Some(before) = self.workflow(name).worker.waiting.replace(peer) {
            self.replaced(before.link);
        }
        let workflow = name.clone();
        self.act(Action::ReadUnit { workflow });
    }

    /// Its worker has made another connection.
    fn replaced(&mut self, link: LinkId) {
        self.links.remove(&link);
        let error = "another connection of this worker replaced this one".to_owned();
        self.act(Action::Refuse { link, error });
    }

    /// A run and the worker that is ready, when it is or was that worker's.
    fn reunite(&mut self, id: RunId, link: LinkId, place: &Place, is_held: bool) {
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        if !open.is_with(&place.invocation) {
            // Its process has a run that it was never given, or that was taken from it.
            if is_held {
                self.disown(link, id);
            }
            return;
        }
        open.held = if is_held { Held::Works } else { Held::No };
        let kill = open.run.kill.as_ref().map(|kill| kill.grace_us);
        let abort = open.run.abort.as_ref().map(|abort| abort.reason.clone());
        let is_ending = open.ending.is_some();
        match (kill, abort) {
            (Some(_), _) | (None, Some(_)) if !is_held => self.empty(id),
            (Some(grace_us), _) => self.start_kill(id, grace_us),
            (None, _) if is_ending && is_held => self.tell(
                link,
                Order::KillThread {
                    run: id,
                    grace_us: 0,
                },
            ),
            (None, Some(reason)) => self.tell(link, Order::AbortThread { run: id, reason }),
            (None, None) => {}
        }
    }

    pub(super) fn link_lost(&mut self, link: LinkId) -> Touched {
        let Some(name) = self.links.remove(&link) else {
            return Touched::Nothing;
        };
        if let Some(current) = &mut self.workflow(&name).worker.current
            && current.link == Some(link)
        {
            current.link = None;
            self.release(&name);
            // It may be dead, and systemd's signal may be lost.
            let workflow = name.clone();
            self.act(Action::ReadUnit { workflow });
        }
        let waiting = &mut self.workflow(&name).worker.waiting;
        waiting.take_if(|waiting| waiting.link == link);
        Touched::Workflow(name)
    }

    /// Nobody is connected who has the workflow's runs.
    pub(super) fn release(&mut self, name: &WorkflowName) {
        for id in self.live(name) {
            if let Some(open) = self.open.get_mut(&id) {
                open.held = Held::No;
            }
        }
    }

    pub(super) fn units(
        &mut self,
        units: &BTreeMap<WorkflowName, Unit>,
        read: ReadId,
    ) -> Result<(), Illegal> {
        let absent = Unit::absent(read);
        let names: BTreeSet<_> = self.workflows.keys().chain(units.keys()).cloned().collect();
        for name in names {
            self.unit(&name, units.get(&name).unwrap_or(&absent))?;
        }
        self.units_known = true;
        Ok(())
    }

    pub(super) fn unit(&mut self, name: &WorkflowName, unit: &Unit) -> Result<(), Illegal> {
        if unit.read < self.workflow(name).worker.read {
            return Ok(());
        }
        if unit.stop == Stop::GoingDown {
            self.going_down_until = Some(self.now.boot_us + micros(limits::GOING_DOWN));
        }
        let now = self.now.boot_us;
        let worker = &mut self.workflow(name).worker;
        worker.read = unit.read;
        let is_down = matches!(unit.state, UnitState::Absent | UnitState::Failed);
        if worker.start_pending && is_down {
            return Ok(());
        }
        let is_earlier = |current: &Current| {
            let is_other = current.invocation != unit.invocation && !unit.invocation.is_empty();
            is_other && unit.settings.is_none() && unit.death.is_some()
        };
        if worker.current.as_ref().is_some_and(is_earlier) {
            // The end of one that came before the one that is there.
            return if worker.buried.contains(&unit.invocation) {
                Ok(())
            } else {
                self.died(name, &unit.invocation, unit)
            };
        }
        let is_returning = unit.state == UnitState::Starting && !unit.invocation.is_empty();
        let before = worker.unit.replace(unit.state);
        worker.start_pending = false;
        worker.detail.clone_from(&unit.detail);
        worker.returning = unit.settings.clone().filter(|_| is_returning);
        worker.heard_by =
            (is_returning && unit.has_ended()).then(|| now + micros(limits::READY_TIMEOUT));
        if unit.has_ended() {
            self.bury(name, None, unit)?;
        } else {
            self.lives(name, unit)?;
        }
        if before == Some(UnitState::Foreign) {
            // Whoever stopped that did not mean ours.
        } else if is_down && unit.stop == Stop::Operator {
            if self.workflow(name).record.stopped.is_none() {
                self.note(name, WorkerEvent::WorkerStopped);
            }
        } else if unit.state == UnitState::Failed && before != Some(UnitState::Failed) {
            let detail = format!("systemd gave up on {}", unit.detail);
            self.block(name, &detail, unit.death.as_ref())?;
        }
        let worker = &mut self.workflow(name).worker;
        let is_clear = worker.current.is_some() || worker.is_down();
        if let Some(peer) = worker.waiting.take_if(|_| is_clear) {
            self.links.remove(&peer.link);
            self.ready(name, peer);
        }
        Ok(())
    }

    /// The unit's newest invocation lives, whether it was known or not.
    fn lives(&mut self, name: &WorkflowName, unit: &Unit) -> Result<(), Illegal> {
        let now = self.now.boot_us;
        let current = &mut self.workflow(name).worker.current;
        let known = current
            .as_mut()
            .filter(|current| current.invocation == unit.invocation);
        if let Some(current) = known {
            current.settings.clone_from(&unit.settings);
            if !unit.cgroup.is_empty() {
                current.cgroup.clone_from(&unit.cgroup);
            }
            if current.link.is_none() && current.ready_by.is_none() {
                current.ready_by = Some(Patience::with_known(now));
            }
            return Ok(());
        }
        self.bury(name, Some(&unit.invocation), unit)?;
        let place = Place {
            invocation: unit.invocation.clone(),
            cgroup: unit.cgroup.clone(),
        };
        self.appeared(name, unit.read, Current::new(&place, unit.settings.clone()));
        Ok(())
    }

    /// An invocation is there that was not known before; all others are gone.
    fn appeared(&mut self, name: &WorkflowName, read: ReadId, current: Current) {
        let now = self.now.boot_us;
        let patience = if self.units_known {
            Patience::with_new(now)
        } else {
            Patience::with_known(now)
        };
        let worker = &mut self.workflow(name).worker;
        worker.read = worker.read.max(read);
        worker.start_pending = false;
        worker.heard_by = None;
        worker.current = Some(Current {
            ready_by: Some(patience),
            ..current
        });
    }

    /// Every invocation but the one that lives is gone: the one that was known, and those that runs were with.
    fn bury(
        &mut self,
        name: &WorkflowName,
        alive: Option<&str>,
        unit: &Unit,
    ) -> Result<(), Illegal> {
        let mut gone = self.others(name, alive);
        // It came and went between two looks.
        let is_brief = unit.state == UnitState::Starting && unit.death.is_some();
        if is_brief
            && !gone.contains(&unit.invocation)
            && !self.workflow(name).worker.buried.contains(&unit.invocation)
        {
            gone.push(unit.invocation.clone());
        }
        for invocation in gone {
            self.died(name, &invocation, unit)?;
        }
        Ok(())
    }

    /// The invocations but this one that are not known to be gone: the one that was known, and those that runs are
    /// with.
    fn others(&self, name: &WorkflowName, alive: Option<&str>) -> Vec<String> {
        let live = self.live(name);
        let mut gone: Vec<String> = Vec::new();
        let places = live.iter().filter_map(|id| {
            let started = self.open.get(id)?.run.started()?;
            let place = started.place.as_ref().filter(|_| !started.is_lost)?;
            Some(place.invocation.clone())
        });
        let known = self
            .workflows
            .get(name)
            .and_then(|workflow| workflow.worker.invocation());
        for invocation in known.map(ToOwned::to_owned).into_iter().chain(places) {
            if alive != Some(invocation.as_str()) && !gone.contains(&invocation) {
                gone.push(invocation);
            }
        }
        gone
    }
}
