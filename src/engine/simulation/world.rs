//! One schedule: nerved with its five phases, its clients, its store, and everything that goes wrong, in an order that
//! the seed decides.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::super::{Engine, Event, Input, Known, LinkId, ReadId, Turn, UnitState};
use super::clients::caller;
use super::coverage::{Coverage, Fault};
use super::definitions::{WORKFLOWS, name};
use super::machine::Machine;
use super::oracle::Oracle;
use super::random::Random;
use super::worker::{Down, Up};
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Run, RunEvent};
use crate::model::worker::{Pause, WorkerRecord};
use crate::model::workflow::Definition;

pub(super) struct World {
    pub(super) random: Random,
    pub(super) machine: Machine,
    pub(super) nerved: Option<Nerved>,
    pub(super) oracle: Oracle,
    pub(super) coverage: Coverage,
    pub(super) store: Store,
    pub(super) history: Option<Vec<String>>,
    pub(super) is_bus_up: bool,
    /// Faults still happen.
    pub(super) is_chaos: bool,
    pub(super) next_link: LinkId,
    pub(super) next_content: u64,
    pub(super) next_ticket: u64,
    pub(super) next_run: u128,
    pub(super) next_definition: u32,
    pub(super) disk: BTreeMap<WorkflowName, Known>,
    pub(super) max_active: Option<u32>,
    pub(super) pinned: HashMap<String, Arc<Definition>>,
    /// Where nerved crashes next.
    pub(super) armed: Option<Fault>,
    /// What becomes of the next start of a unit.
    pub(super) next_start: Option<Fault>,
    pub(super) is_going_down: bool,
    pub(super) faults: u64,
}

/// nerved's memory: what a crash loses.
pub(super) struct Nerved {
    pub(super) engine: Engine,
    pub(super) inbox: VecDeque<Input>,
    /// Requests that are not authorised yet.
    pub(super) calls: VecDeque<Input>,
    /// Units of which systemd said that they changed.
    pub(super) signals: VecDeque<usize>,
    /// What systemd answered, on its way to the inbox.
    pub(super) bus: VecDeque<Input>,
    /// Cgroups that are waited for.
    pub(super) empties: Vec<RunId>,
    pub(super) links: BTreeMap<LinkId, Link>,
}

/// A connection of a worker.
pub(super) struct Link {
    pub(super) workflow: usize,
    pub(super) invocation: u64,
    pub(super) up: VecDeque<Up>,
    pub(super) down: VecDeque<Down>,
    /// The worker's `ready` was read.
    pub(super) is_ready: bool,
    /// nerved's end is open.
    pub(super) is_heard: bool,
    /// The worker's end is closed.
    pub(super) is_cut: bool,
    /// When systemd was asked whose it is.
    pub(super) read: ReadId,
}

/// What is committed.
#[derive(Default)]
pub(super) struct Store {
    pub(super) runs: BTreeMap<RunId, Run>,
    pub(super) order: Vec<RunId>,
    pub(super) keys: HashMap<(WorkflowName, String), RunId>,
    pub(super) workers: BTreeMap<WorkflowName, WorkerRecord>,
    pub(super) pause: Option<Pause>,
}

/// One input of a turn and what the engine made of it.
pub(super) struct Step {
    /// Without one it is the recovery.
    pub(super) input: Option<Input>,
    pub(super) events: Range<usize>,
    pub(super) actions: Range<usize>,
}

impl Link {
    pub(super) fn new(workflow: usize, invocation: u64, read: ReadId, ready: Up) -> Self {
        Self {
            workflow,
            invocation,
            up: [ready].into(),
            down: VecDeque::new(),
            is_ready: false,
            is_heard: true,
            is_cut: false,
            read,
        }
    }
}

impl Store {
    /// Takes a turn, and sees that runs and records are what their events add up to.
    pub(super) fn commit(&mut self, turn: &Turn, coverage: &mut Coverage) {
        for staged in &turn.events {
            let at = staged.at;
            match &staged.event {
                Event::Run(id, RunEvent::Queued(accepted)) => {
                    self.runs.insert(*id, Run::accept(*id, at, accepted));
                    self.order.push(*id);
                    if let Some(key) = &accepted.key {
                        self.keys
                            .insert((accepted.workflow.clone(), key.clone()), *id);
                    }
                }
                Event::Run(id, event) => {
                    let run = self
                        .runs
                        .get_mut(id)
                        .unwrap_or_else(|| panic!("{id:?} is not in the store"));
                    coverage.pair(run.status(), event);
                    *run = run.after(event, at).unwrap();
                    if run.status().is_terminal() {
                        *coverage.ends.entry(run.status().as_str()).or_default() += 1;
                    }
                }
                Event::Worker(name, event) => {
                    let record = self.workers.entry(name.clone()).or_default();
                    *record = record.after(event, at);
                }
                Event::Manager(event) => self.pause = event.pause(at),
            }
        }
        for (id, run) in &turn.runs {
            assert_eq!(
                self.runs.get(id),
                Some(run),
                "I10: a run is not what its events add up to"
            );
        }
        for (name, record) in &turn.workers {
            assert_eq!(
                self.workers.get(name),
                Some(record),
                "I10: a record is not what its events add up to"
            );
        }
        if let Some(pause) = &turn.pause {
            assert_eq!(
                &self.pause, pause,
                "I10: the pause is not what its events add up to"
            );
        }
    }

    pub(super) fn open(&self) -> Vec<Run> {
        let runs = self.order.iter().map(|id| &self.runs[id]);
        runs.filter(|run| !run.status().is_terminal())
            .cloned()
            .collect()
    }
}

impl World {
    pub(super) fn new(seed: u64, history: Option<Vec<String>>) -> Self {
        let mut world = Self {
            random: Random::new(seed),
            machine: Machine::new(),
            nerved: None,
            oracle: Oracle::default(),
            coverage: Coverage::default(),
            store: Store::default(),
            history,
            is_bus_up: true,
            is_chaos: true,
            next_link: 0,
            next_content: 0,
            next_ticket: 0,
            next_run: 0,
            next_definition: 0,
            disk: BTreeMap::new(),
            max_active: None,
            pinned: HashMap::new(),
            armed: None,
            next_start: None,
            is_going_down: false,
            faults: 0,
        };
        (0..WORKFLOWS).for_each(|workflow| world.edit(workflow));
        world.recover();
        world
    }

    pub(super) fn log(&mut self, line: impl FnOnce() -> String) {
        const ENOUGH: usize = 360;
        if let Some(history) = &mut self.history {
            let line = line().replace("WorkflowName(\"", "").replace("\")", "");
            history.push(line.chars().take(ENOUGH).collect());
        }
    }

    pub(super) fn link(&mut self, link: Option<LinkId>) -> Option<&mut Link> {
        self.nerved.as_mut()?.links.get_mut(&link?)
    }

    /// Faults and everything else, then only everything else, until all is at rest.
    pub(super) fn run(&mut self) {
        let least = 50 + self.random.below(100);
        while self.coverage.inputs < least || self.faults < 3 {
            self.tick();
        }
        self.quiesce();
    }

    pub(super) fn tick(&mut self) {
        let us = self.random.below(50_000);
        self.machine.pass(us);
        match self.random.below(100) {
            0..12 => self.request(),
            12..18 => self.fail(),
            18..20 => self.fabricate(),
            20..22 => drop(self.await_deadline()),
            _ => {
                if !self.advance() && !self.await_deadline() {
                    self.request();
                }
            }
        }
    }

    /// The next deadline passes, if there is one.
    pub(super) fn await_deadline(&mut self) -> bool {
        let now = self.machine.now.boot_us;
        let workers = self
            .machine
            .services
            .iter()
            .filter_map(|service| service.worker.as_ref());
        let tasks = workers.flat_map(|worker| worker.tasks.values());
        let wakes_at = tasks.filter_map(|task| task.wakes_at(now)).min();
        let deadline = self
            .nerved
            .as_ref()
            .and_then(|nerved| nerved.engine.deadline());
        let Some(at) = deadline.into_iter().chain(wakes_at).min() else {
            return false;
        };
        let wait = at.saturating_sub(self.machine.now.boot_us);
        self.machine.pass(wait);
        self.log(|| format!("{wait} µs pass"));
        // What nerved has not found empty yet it kills again.
        let empties = self.nerved.as_ref().map(|nerved| nerved.empties.clone());
        for run in empties.into_iter().flatten() {
            let executed_by = self.oracle.runs[&run].invocation;
            self.machine.kill(run, executed_by);
        }
        true
    }

    /// Somebody or something does the next thing it has to do; `false`: all is at rest.
    pub(super) fn advance(&mut self) -> bool {
        const PARTS: u64 = 8 + 3 * WORKFLOWS as u64;
        let first = self.random.below(PARTS);
        (first..first + PARTS).any(|part| {
            let part = usize::try_from(part % PARTS).unwrap();
            let is_busy = match part {
                0 | 1 => self.turn(),
                2 => self.restart(),
                3 => self.hear_systemd(),
                4 => self.watch_cgroups(),
                5 => {
                    let patience = if self.is_chaos { 10 } else { 100 };
                    self.machine.reap(patience, &mut self.random)
                }
                6 => self.read_links(),
                7 => self.authorise(),
                part if part % 3 == 0 => self.machine.advance((part - 8) / 3, &mut self.random),
                part => self.work((part - 8) / 3),
            };
            if is_busy {
                self.sever();
            }
            is_busy
        })
    }

    /// Tells of units that changed; connections without a worker break.
    pub(super) fn sever(&mut self) {
        let changed = std::mem::take(&mut self.machine.changed);
        let Some(nerved) = &mut self.nerved else {
            return;
        };
        if self.is_bus_up {
            nerved.signals.extend(changed);
        }
        for (id, link) in &mut nerved.links {
            let service = &self.machine.services[link.workflow];
            let mut workers = service.worker.iter().chain(&service.stray);
            link.is_cut |= !workers.any(|worker| worker.link == Some(*id));
        }
    }

    pub(super) fn quiesce(&mut self) {
        self.log(|| "the faults stop".to_owned());
        self.is_chaos = false;
        (self.armed, self.next_start) = (None, None);
        if self.is_going_down {
            self.crash();
        }
        for service in &mut self.machine.services {
            service.stray = None;
            if service.state == UnitState::Foreign {
                service.state = UnitState::Absent;
            }
            if let Some(worker) = &mut service.worker {
                // One that never was ready is nerved's to kill.
                worker.is_stuck &= worker.link.is_none();
                // One that does not heed its time-out is too.
                worker
                    .tasks
                    .values_mut()
                    .for_each(|task| task.is_hung &= task.has_deadline());
            }
        }
        for workflow in 0..WORKFLOWS {
            let is_broken = |known: &Known| known.definition.is_none();
            if self.disk.get(&name(workflow)).is_some_and(is_broken) {
                self.edit(workflow);
            }
        }
        self.report_definitions();
        self.machine.changed.extend(0..WORKFLOWS);
        self.sever();
        for _ in 0..20_000 {
            self.machine.pass(1_000);
            if self.advance() || self.heal() || self.await_deadline() {
                continue;
            }
            return self.check_rest();
        }
        panic!("I9: no rest after 20,000 steps");
    }

    /// People look after what waits for them.
    pub(super) fn heal(&mut self) -> bool {
        // One that has been removed and has nothing left to do is nobody's concern.
        let open = self.store.open();
        let waits = |(name, record): &(&WorkflowName, &WorkerRecord)| {
            (record.blocked.is_some() || record.stopped.is_some())
                && open.iter().any(|run| run.workflow == **name)
        };
        let waiting = self.store.workers.iter().find(waits);
        if let Some(workflow) = waiting.map(|(name, _)| name.clone()) {
            self.call(|ticket| Input::Reset {
                ticket,
                workflow,
                by: caller(),
            });
            return true;
        }
        if self.store.pause.is_some() {
            self.call(|ticket| Input::Resume {
                ticket,
                by: caller(),
            });
            return true;
        }
        false
    }

    pub(super) fn check_rest(&mut self) {
        let open: Vec<_> = self.store.open().iter().map(|run| run.id).collect();
        assert!(open.is_empty(), "I9: {open:?} never end");
        assert_eq!(
            self.nerved.as_ref().unwrap().engine.counts(),
            (0, 0),
            "I12: slots are left"
        );
        let processes = self.machine.cgroups.values().flatten().next();
        assert!(processes.is_none(), "I12: a process is left: {processes:?}");
        for (workflow, service) in self.machine.services.iter().enumerate() {
            let is_gone = matches!(service.state, UnitState::Absent | UnitState::Failed);
            assert!(is_gone, "I12: unit {workflow} is left: {:?}", service.state);
        }
        for run in self.store.order.clone() {
            (0..2).for_each(|_| self.offer(run));
        }
    }
}
