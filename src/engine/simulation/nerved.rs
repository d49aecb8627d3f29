//! nerved around the engine: recovery, the five phases of a turn, its hands and its ears.

use std::collections::{BTreeMap, VecDeque};

use super::super::{Action, Engine, Input, Known, LinkId, Order, Recovered, Stop, UnitState};
use super::coverage::{Fault, Moment};
use super::definitions::{self, WORKFLOWS, name};
use super::machine::{self, Service};
use super::worker::{Down, Up};
use super::world::{Link, Nerved, Step, World};
use crate::model::name::WorkflowName;

impl World {
    pub(super) fn recover(&mut self) {
        let recovered = Recovered {
            boot_id: self.machine.boot_id(),
            workflows: self.disk.clone(),
            max_active: self.max_active,
            workers: self.store.workers.clone(),
            pause: self.store.pause.clone(),
            pinned: self.pinned.clone(),
            runs: self.store.open(),
        };
        self.log(|| "nerved starts".to_owned());
        self.forget();
        let engine = Engine::recover(recovered, self.machine.now).unwrap();
        self.nerved = Some(Nerved {
            engine,
            inbox: VecDeque::new(),
            calls: VecDeque::new(),
            signals: VecDeque::new(),
            bus: VecDeque::new(),
            empties: Vec::new(),
            links: BTreeMap::new(),
        });
        self.is_going_down = false;
        self.oracle.restart(&self.disk, self.max_active);
        let staged = &self.nerved.as_ref().unwrap().engine.turn;
        let step = Step {
            input: None,
            events: 0..staged.events.len(),
            actions: 0..staged.actions.len(),
        };
        let is_crashing = self.armed.is_some();
        self.finish_turn(&[step]);
        if self.nerved.is_none() && is_crashing {
            self.coverage.fault(Fault::CrashInRecovery);
            self.coverage.failpoints[27 - 1] += 1;
        }
        self.list_units();
    }

    pub(super) fn restart(&mut self) -> bool {
        // The workers go first, then nerved, and it comes back when all is down.
        let is_up = |service: &Service| {
            service.stop == Stop::GoingDown && service.state != UnitState::Absent
        };
        let is_down = !self.machine.services.iter().any(is_up);
        match (&self.nerved, self.is_going_down) {
            (Some(_), true) if is_down => {
                self.crash();
                return true;
            }
            (Some(_), _) => return false,
            (None, true) if !is_down => return false,
            (None, _) => {}
        }
        if self.is_chaos && self.random.chance(3) {
            self.coverage.failpoints[26 - 1] += 1;
            self.log(|| "nerved starts and crashes before it opens the store".to_owned());
        } else {
            self.recover();
        }
        true
    }

    pub(super) fn list_units(&mut self) {
        let Some(nerved) = self.nerved.as_mut().filter(|_| self.is_bus_up) else {
            return;
        };
        let known = |workflow: &usize| self.machine.services[*workflow].state != UnitState::Absent;
        let found: Vec<_> = (0..WORKFLOWS).filter(known).collect();
        let read = self.machine.ask();
        let units = found
            .into_iter()
            .map(|workflow| (name(workflow), self.machine.unit(workflow, read)));
        nerved.signals.clear();
        nerved.bus.push_back(Input::Units {
            units: units.collect(),
            read,
        });
    }

    pub(super) fn crash(&mut self) {
        self.log(|| "nerved is gone".to_owned());
        let links = self
            .nerved
            .take()
            .map(|nerved| nerved.links)
            .unwrap_or_default();
        for link in links.into_values() {
            let worker = &mut self.machine.services[link.workflow].worker;
            if let Some(worker) = worker
                .as_mut()
                .filter(|worker| worker.invocation == link.invocation)
            {
                worker.backlog.extend(link.down);
            }
        }
        self.machine
            .lives
            .values_mut()
            .for_each(|life| life.was_told = false);
    }

    /// What systemd said of a unit that is not there any more only nerved remembered.
    pub(super) fn forget(&mut self) {
        for service in &mut self.machine.services {
            if service.state == UnitState::Absent {
                (service.invocation, service.stop) = (0, Stop::Nobody);
            }
        }
    }

    /// Phases 1 and 2: collect and check.
    pub(super) fn turn(&mut self) -> bool {
        let now = self.machine.now;
        let Some(nerved) = &mut self.nerved else {
            return false;
        };
        let is_due = |engine: &Engine| engine.deadline().is_some_and(|at| at <= now.boot_us);
        if nerved.inbox.is_empty() && !is_due(&nerved.engine) {
            return false;
        }
        let count = nerved.inbox.len().min(1 + self.random.index(4));
        let mut inputs: Vec<_> = nerved.inbox.drain(..count).collect();
        for input in &mut inputs {
            if let Input::Start {
                existing, accepted, ..
            } = input
            {
                let key = accepted
                    .key
                    .clone()
                    .map(|key| (accepted.workflow.clone(), key));
                *existing = key.and_then(|key| self.store.keys.get(&key).copied());
            }
        }
        let mut steps: Vec<_> = inputs.into_iter().map(|input| self.check(input)).collect();
        if is_due(&self.nerved.as_ref().unwrap().engine) {
            steps.push(self.check(Input::Deadline));
        }
        self.finish_turn(&steps);
        true
    }

    pub(super) fn check(&mut self, input: Input) -> Step {
        self.log(|| match &input {
            Input::Definitions {
                workflows,
                max_active,
            } => {
                let digest = |(name, known): (&WorkflowName, &Known)| {
                    let digest = known
                        .definition
                        .as_ref()
                        .map(|definition| &definition.digest);
                    format!("{name} {digest:?} {:?}", known.fault)
                };
                format!(
                    "input Definitions {max_active:?} {:?}",
                    workflows.iter().map(digest).collect::<Vec<_>>()
                )
            }
            input => format!("input {input:?}"),
        });
        self.coverage.inputs += 1;
        let now = self.machine.now;
        let engine = &mut self.nerved.as_mut().unwrap().engine;
        let (events, actions) = (engine.turn.events.len(), engine.turn.actions.len());
        if let Err(illegal) = engine.step(input.clone(), now) {
            panic!("the engine asks for what its own table forbids: {illegal}");
        }
        let turn = &engine.turn;
        let (events, actions) = (events..turn.events.len(), actions..turn.actions.len());
        Step {
            input: Some(input),
            events,
            actions,
        }
    }

    /// Phases 3 to 5: commit, adopt, perform.
    pub(super) fn finish_turn(&mut self, steps: &[Step]) {
        let turn = self.nerved.as_mut().unwrap().engine.take_turn();
        for staged in &turn.events {
            self.log(|| format!("  event {:?}", staged.event));
        }
        let fault = self
            .armed
            .filter(|_| !turn.events.is_empty())
            .inspect(|_| self.armed = None);
        let k = match fault {
            Some(fault @ (Fault::CrashBeforeCommit | Fault::DiskFull)) => {
                self.met(fault);
                self.note_failpoints(Moment::BeforeCommit, &turn);
                return self.crash();
            }
            Some(Fault::CrashAfterCommit) => 0,
            Some(Fault::CrashAmidActions) => self.random.index(turn.actions.len() + 1),
            Some(_) => turn.actions.len(),
            None => usize::MAX,
        };
        self.store.commit(&turn, &mut self.coverage);
        self.oracle.turn(steps, &turn, &self.machine);
        let deadline = self.nerved.as_ref().unwrap().engine.deadline();
        self.oracle.check_time_outs(deadline, &self.machine);
        if matches!(
            steps.last(),
            Some(Step {
                input: Some(Input::Deadline),
                ..
            })
        ) {
            let is_past = deadline.is_some_and(|at| at <= self.machine.now.boot_us);
            assert!(
                !is_past,
                "the deadline passed and is wanted again at once: nerved would spin"
            );
        }
        for (done, action) in turn.actions.iter().enumerate().take(k) {
            self.log(|| format!("  action {done} {action:?}"));
            self.perform(action.clone());
        }
        if let Some(fault) = fault {
            self.met(fault);
            self.note_failpoints(Moment::After(k), &turn);
            if steps[0].input.is_none() || matches!(steps[0].input, Some(Input::Units { .. })) {
                self.coverage.failpoints[28 - 1] += 1;
            }
            self.crash();
        }
    }

    pub(super) fn perform(&mut self, action: Action) {
        let nerved = self.nerved.as_mut().unwrap();
        match action {
            Action::Answer { .. } => {}
            Action::StartUnit { workflow, settings } => {
                if !self.is_bus_up {
                    return;
                }
                let index = definitions::index(&workflow);
                let fault = self.next_start.take();
                if fault != Some(Fault::StartRefused) && fault != Some(Fault::StartFailed) {
                    self.machine.start(index, settings);
                }
                let read = self.machine.ask();
                let nerved = self.nerved.as_mut().unwrap();
                nerved.bus.push_back(match fault {
                    Some(Fault::StartRefused) => Input::StartRefused {
                        workflow,
                        error: "no".to_owned(),
                    },
                    Some(_) => Input::StartFailed { workflow },
                    None => Input::StartTaken { workflow, read },
                });
                match fault {
                    Some(fault) => self.met(fault),
                    None => nerved.signals.push_back(index),
                }
            }
            Action::ReadUnit { workflow } if self.is_bus_up => {
                let read = self.machine.ask();
                let unit = self.machine.unit(definitions::index(&workflow), read);
                nerved.bus.push_back(Input::Unit { workflow, unit });
            }
            Action::ReadUnit { .. } => {}
            Action::ResetUnit { workflow } => self.machine.reset(definitions::index(&workflow)),
            Action::KillUnit { workflow, .. } => {
                self.machine.kill_unit(definitions::index(&workflow))
            }
            Action::Dispatch { link, dispatch } => {
                let thread = self.oracle.runs[&dispatch.run].thread.clone();
                self.tell(link, Down::Assign(dispatch, thread));
            }
            Action::Tell { link, order } => {
                if let (Order::Shutdown, Some(link)) = (&order, nerved.links.get(&link)) {
                    self.machine
                        .lives
                        .get_mut(&link.invocation)
                        .unwrap()
                        .was_told = true;
                }
                self.tell(link, Down::Order(order));
            }
            Action::Refuse { link, .. } => drop(self.refuse(link)),
            Action::Fence { link, .. } => {
                if let Some((workflow, invocation)) = self.refuse(link) {
                    let service = &self.machine.services[workflow];
                    let mut workers = service.worker.iter().chain(&service.stray);
                    if workers.any(|worker| worker.invocation == invocation) {
                        self.machine.kill_unit(workflow);
                    }
                }
            }
            Action::Empty { run, .. } if self.oracle.is_own(run) => {
                nerved.inbox.push_back(Input::Emptied { run });
            }
            Action::EmptyUnit { run, workflow, .. } => {
                nerved.empties.push(run);
                self.machine.kill_unit(definitions::index(&workflow));
            }
            Action::Empty { run, .. } => {
                nerved.empties.push(run);
                let executed_by = self.oracle.runs[&run].invocation;
                self.machine.kill(run, executed_by);
            }
        }
        self.sever();
    }

    pub(super) fn tell(&mut self, link: LinkId, down: Down) {
        if let Some(link) = self
            .link(Some(link))
            .filter(|link| link.is_heard && !link.is_cut)
        {
            link.down.push_back(down);
        }
    }

    pub(super) fn refuse(&mut self, link: LinkId) -> Option<(usize, u64)> {
        let link = self.link(Some(link)).filter(|link| link.is_heard)?;
        link.is_heard = false;
        link.up.clear();
        Some((link.workflow, link.invocation))
    }

    pub(super) fn hear_systemd(&mut self) -> bool {
        let Some(nerved) = &mut self.nerved else {
            return false;
        };
        if !self.is_bus_up {
            if self.is_chaos && self.random.chance(80) {
                return false;
            }
            self.is_bus_up = true;
            self.log(|| "the bus is back".to_owned());
            self.list_units();
            return true;
        }
        if let Some(workflow) = nerved.signals.pop_front() {
            let read = self.machine.ask();
            let unit = self.machine.unit(workflow, read);
            nerved.bus.push_back(Input::Unit {
                workflow: name(workflow),
                unit,
            });
            return true;
        }
        if nerved.bus.is_empty() {
            return false;
        }
        // Answers may overtake each other.
        let which = if self.random.chance(80) {
            0
        } else {
            self.random.index(nerved.bus.len())
        };
        nerved.inbox.extend(nerved.bus.remove(which));
        true
    }

    pub(super) fn watch_cgroups(&mut self) -> bool {
        let Some(nerved) = &mut self.nerved else {
            return false;
        };
        let machine = &self.machine;
        let Some(found) = nerved.empties.iter().position(|run| machine.is_empty(*run)) else {
            return false;
        };
        let run = nerved.empties.remove(found);
        nerved.inbox.push_back(Input::Emptied { run });
        true
    }

    pub(super) fn read_links(&mut self) -> bool {
        let Some(nerved) = &mut self.nerved else {
            return false;
        };
        let readable = |link: &Link| !link.up.is_empty() || link.is_cut || !link.is_heard;
        let ids: Vec<_> = nerved
            .links
            .iter()
            .filter(|(_, link)| readable(link))
            .map(|(id, _)| *id)
            .collect();
        if ids.is_empty() {
            return false;
        }
        let id = self.random.pick(&ids);
        let link = nerved.links.get_mut(&id).unwrap();
        let place = machine::place(link.workflow, link.invocation);
        let input = match link.up.pop_front().filter(|_| link.is_heard) {
            Some(Up::Ready(held)) => {
                link.is_ready = true;
                let (workflow, read) = (name(link.workflow), link.read);
                let settings = self.machine.lives[&link.invocation].settings.clone();
                Input::Ready {
                    link: id,
                    workflow,
                    place,
                    read,
                    settings: Some(settings),
                    held,
                }
            }
            Some(Up::Message {
                run,
                round,
                message,
            }) => Input::Message {
                link: id,
                run,
                round,
                message,
            },
            Some(Up::Attempt {
                run,
                round,
                attempt,
                message,
                delay_us,
            }) => Input::Attempt {
                link: id,
                run,
                round,
                attempt,
                message,
                delay_us,
            },
            Some(Up::Routed { run, round, target }) => Input::Routed {
                link: id,
                run,
                round,
                target,
            },
            Some(Up::Ended { run, result }) => Input::Ended {
                link: id,
                run,
                result,
                detail: None,
                // Of a run of the user's own worker there is no cgroup.
                is_empty: self.oracle.is_own(run) || self.machine.is_empty(run),
            },
            None => {
                nerved.links.remove(&id);
                Input::LinkLost { link: id }
            }
        };
        nerved.inbox.push_back(input);
        true
    }

    pub(super) fn authorise(&mut self) -> bool {
        let Some(nerved) = &mut self.nerved else {
            return false;
        };
        let call = nerved.calls.pop_front();
        nerved.inbox.extend(call.clone());
        call.is_some()
    }
}
