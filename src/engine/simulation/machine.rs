//! The machine below nerved: clocks, systemd's units, and the processes in the runs' cgroups. What is here is the
//! truth, which nerved only hears of.

use std::collections::BTreeMap;

use super::super::{Now, ReadId, Stop, Unit, UnitState};
use super::definitions::{WORKFLOWS, name};
use super::random::Random;
use super::worker::Worker;
use crate::model::name::RunId;
use crate::model::run::{BootInstant, Place};
use crate::model::worker::{Cause, Death};
use crate::model::workflow::WorkerSettings;

pub(super) const SECOND: u64 = 1_000_000;

pub(super) struct Machine {
    pub(super) now: Now,
    pub(super) boot: u64,
    pub(super) services: [Service; WORKFLOWS],
    pub(super) cgroups: BTreeMap<RunId, Vec<Process>>,
    /// Runs whose cgroup nerved emptied, and by whom they were executed then.
    pub(super) emptied: BTreeMap<RunId, u64>,
    /// Every invocation there ever was, by number.
    pub(super) lives: BTreeMap<u64, Life>,
    /// Units that changed, and nobody was told yet.
    pub(super) changed: Vec<usize>,
    /// How often systemd was asked something.
    questions: ReadId,
}

/// A worker unit.
pub(super) struct Service {
    pub(super) state: UnitState,
    /// The newest; 0 when it is not loaded.
    pub(super) invocation: u64,
    pub(super) worker: Option<Worker>,
    /// An earlier worker that systemd could not get rid of.
    pub(super) stray: Option<Worker>,
    pub(super) stop: Stop,
    pub(super) settings: WorkerSettings,
    next: After,
    /// When it was started, in µs of this boot.
    starts: Vec<u64>,
}

/// What follows when a unit is down.
#[derive(Debug, Clone, Copy, PartialEq)]
enum After {
    Nothing,
    /// Its job says start, or its `Restart=`.
    Start,
}

/// What becomes of one invocation.
pub(super) struct Life {
    pub(super) workflow: usize,
    /// Digest of what it was started with.
    pub(super) settings: String,
    pub(super) boot: u64,
    pub(super) death: Option<Death>,
    pub(super) stop: Stop,
    /// nerved told it to exit.
    pub(super) was_told: bool,
}

/// Something that a run started.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Debug)]
pub(super) struct Process {
    pub(super) invocation: u64,
    /// It was left behind by the round that started it.
    pub(super) is_left: bool,
    pub(super) is_dying: bool,
    /// It takes its time to die.
    pub(super) is_slow: bool,
    /// It was started when nerved had emptied the cgroup.
    pub(super) is_late: bool,
}

pub(super) fn hex(invocation: u64) -> String {
    if invocation == 0 {
        String::new()
    } else {
        format!("{invocation:032x}")
    }
}

pub(super) fn number(invocation: &str) -> u64 {
    u64::from_str_radix(invocation, 16).unwrap_or_default()
}

pub(super) fn place(workflow: usize, invocation: u64) -> Place {
    Place {
        invocation: hex(invocation),
        cgroup: format!("/{}", name(workflow).unit()),
    }
}

pub(super) fn exited(code: i32) -> Death {
    Death {
        code: Some(code),
        ..Death::of(Cause::ExitCode)
    }
}

impl Machine {
    pub(super) fn new() -> Self {
        let service = || Service {
            state: UnitState::Absent,
            invocation: 0,
            worker: None,
            stray: None,
            stop: Stop::Nobody,
            settings: WorkerSettings::default(),
            next: After::Nothing,
            starts: Vec::new(),
        };
        Self {
            now: Now {
                wall_us: 1_000_000 * SECOND,
                boot_us: 100 * SECOND,
            },
            boot: 1,
            services: std::array::from_fn(|_| service()),
            cgroups: BTreeMap::new(),
            emptied: BTreeMap::new(),
            lives: BTreeMap::new(),
            changed: Vec::new(),
            questions: 0,
        }
    }

    pub(super) fn pass(&mut self, us: u64) {
        self.now.boot_us += us;
        self.now.wall_us += us;
    }

    pub(super) fn boot_id(&self) -> String {
        format!("boot-{}", self.boot)
    }

    pub(super) fn instant(&self) -> BootInstant {
        BootInstant {
            boot_id: self.boot_id(),
            boot_us: self.now.boot_us,
        }
    }

    pub(super) fn is_empty(&self, run: RunId) -> bool {
        self.cgroups.get(&run).is_none_or(Vec::is_empty)
    }

    /// Whether nothing is left in a run's cgroup but what its worker started after nerved had emptied it: a worker that
    /// does not hear that its run is over may begin one round more, until it hears.
    pub(super) fn is_settled(&self, run: RunId) -> bool {
        let mut processes = self.cgroups.get(&run).into_iter().flatten();
        processes.all(|process| process.is_late)
    }

    pub(super) fn may_be_late(&self, run: RunId, invocation: u64) -> bool {
        self.emptied.get(&run) == Some(&invocation) && self.is_alive(invocation)
    }

    /// Whether an invocation other than this one left something of a run.
    pub(super) fn is_left_by_another(&self, run: RunId, invocation: u64) -> bool {
        let mut processes = self.cgroups.get(&run).into_iter().flatten();
        processes.any(|process| process.invocation != invocation)
    }

    /// Whether this invocation has a main process that systemd knows as such.
    pub(super) fn is_alive(&self, invocation: u64) -> bool {
        self.lives
            .get(&invocation)
            .is_some_and(|life| life.death.is_none() && life.boot == self.boot)
    }

    /// Numbers a question to systemd.
    pub(super) fn ask(&mut self) -> ReadId {
        self.questions += 1;
        self.questions
    }

    /// systemd's words for a unit, as of now.
    pub(super) fn unit(&self, workflow: usize, read: ReadId) -> Unit {
        let service = &self.services[workflow];
        if service.state == UnitState::Foreign {
            return Unit {
                state: UnitState::Foreign,
                ..Unit::absent(read)
            };
        }
        let death = self
            .lives
            .get(&service.invocation)
            .and_then(|life| life.death.clone());
        let is_up = matches!(service.state, UnitState::Active | UnitState::Stopping);
        Unit {
            read,
            state: service.state,
            invocation: hex(service.invocation),
            cgroup: if is_up {
                place(workflow, 0).cgroup
            } else {
                String::new()
            },
            death,
            stop: service.stop,
            settings: (service.invocation != 0).then(|| service.settings.digest()),
            detail: "systemd's words".to_owned(),
        }
    }

    /// Takes the job to start a unit, if there is none.
    pub(super) fn start(&mut self, workflow: usize, settings: WorkerSettings) -> bool {
        let service = &mut self.services[workflow];
        if !matches!(service.state, UnitState::Absent | UnitState::Failed) {
            return false;
        }
        service.settings = settings;
        service.starts.clear();
        self.begin(workflow);
        true
    }

    fn begin(&mut self, workflow: usize) {
        let invocation = self.lives.len() as u64 + 1;
        let life = Life {
            workflow,
            settings: self.services[workflow].settings.digest(),
            boot: self.boot,
            death: None,
            stop: Stop::Nobody,
            was_told: false,
        };
        self.lives.insert(invocation, life);
        let service = &mut self.services[workflow];
        service.invocation = invocation;
        service.stop = Stop::Nobody;
        service.state = UnitState::Starting;
        service.next = After::Nothing;
        service.starts.push(self.now.boot_us);
        self.changed.push(workflow);
    }

    /// The main process is gone; whatever it started goes with it.
    pub(super) fn die(&mut self, workflow: usize, death: Death) {
        let service = &mut self.services[workflow];
        service.next = if death.code == Some(0) {
            After::Nothing
        } else {
            After::Start
        };
        service.worker = None;
        service.state = UnitState::Stopping;
        let life = self.lives.get_mut(&service.invocation).unwrap();
        life.death = Some(death);
        self.kill_all(workflow);
        self.changed.push(workflow);
    }

    /// Somebody has systemd stop or restart a unit.
    pub(super) fn stop(&mut self, workflow: usize, stop: Stop, restarts: bool) -> bool {
        let service = &mut self.services[workflow];
        if !matches!(service.state, UnitState::Starting | UnitState::Active) {
            return false;
        }
        service.stop = stop;
        let invocation = service.invocation;
        if self.is_alive(invocation) {
            self.lives.get_mut(&invocation).unwrap().stop = stop;
            self.die(workflow, exited(0));
            self.services[workflow].next = if restarts {
                After::Start
            } else {
                After::Nothing
            };
        } else if restarts {
            // It waited for its restart anyway.
            self.begin(workflow);
        } else {
            self.services[workflow].state = UnitState::Absent;
            self.changed.push(workflow);
        }
        true
    }

    /// systemd forgets that a unit failed.
    pub(super) fn reset(&mut self, workflow: usize) {
        let service = &mut self.services[workflow];
        if service.state == UnitState::Failed {
            (service.state, service.invocation) = (UnitState::Absent, 0);
            self.changed.push(workflow);
        }
    }

    /// SIGKILL for every process of a unit.
    pub(super) fn kill_unit(&mut self, workflow: usize) {
        self.kill_all(workflow);
        self.services[workflow].stray = None;
        if self.services[workflow].worker.is_some() {
            let death = Death {
                signal: Some("SIGKILL".to_owned()),
                ..Death::of(Cause::Signal)
            };
            self.die(workflow, death);
        }
    }

    pub(super) fn kill(&mut self, run: RunId, invocation: u64) {
        self.emptied.insert(run, invocation);
        self.cgroups
            .entry(run)
            .or_default()
            .iter_mut()
            .for_each(|process| process.is_dying = true);
    }

    fn kill_all(&mut self, workflow: usize) {
        let lives = &self.lives;
        for process in self.cgroups.values_mut().flatten() {
            process.is_dying |= lives[&process.invocation].workflow == workflow;
        }
    }

    fn has_processes(&self, workflow: usize) -> bool {
        let mut processes = self.cgroups.values().flatten();
        processes.any(|process| self.lives[&process.invocation].workflow == workflow)
    }

    /// systemd does the next thing it has to do for this unit.
    pub(super) fn advance(&mut self, workflow: usize, random: &mut Random) -> bool {
        let is_empty = !self.has_processes(workflow);
        let service = &mut self.services[workflow];
        let is_own = !service.settings.exec.is_empty();
        match service.state {
            UnitState::Starting if service.next == After::Start => {
                let (interval, burst) = service.settings.start_limit();
                let since = self
                    .now
                    .boot_us
                    .saturating_sub(u64::try_from(interval.as_micros()).unwrap());
                service.starts.retain(|at| *at > since);
                if service.starts.len() < burst as usize {
                    self.begin(workflow);
                } else {
                    service.state = UnitState::Failed;
                }
            }
            UnitState::Starting => {
                service.state = UnitState::Active;
                service.worker = Some(Worker::new(service.invocation, random));
            }
            // It gives up on a process that does not die, and goes on beside it.
            UnitState::Stopping if is_empty || !is_own && random.chance(2) => match service.next {
                After::Start if service.stop == Stop::Operator => self.begin(workflow),
                After::Start => service.state = UnitState::Starting,
                After::Nothing => service.state = UnitState::Absent,
            },
            _ => return false,
        }
        self.changed.push(workflow);
        true
    }

    /// Processes that were killed die.
    pub(super) fn reap(&mut self, patience: u64, random: &mut Random) -> bool {
        let mut is_reaped = false;
        for processes in self.cgroups.values_mut() {
            processes.retain(|process| {
                let stays = !process.is_dying || process.is_slow && !random.chance(patience);
                is_reaped |= !stays;
                stays
            });
        }
        is_reaped
    }

    /// The machine goes down and comes up.
    pub(super) fn reboot(&mut self) {
        let Now { wall_us, .. } = self.now;
        let (lives, boot) = (std::mem::take(&mut self.lives), self.boot + 1);
        *self = Self {
            boot,
            lives,
            questions: self.questions,
            ..Self::new()
        };
        self.now = Now {
            wall_us: wall_us + 30 * SECOND,
            boot_us: 5 * SECOND,
        };
    }
}
