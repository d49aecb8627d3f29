//! Workers: they execute runs as the protocol says, or as badly as a program can.

use std::collections::{BTreeMap, VecDeque};

use serde_json::Map;

use super::super::{Dispatch, LinkId, Order};
use super::definitions::{Kind, Next, Thread};
use super::machine::{Process, SECOND, exited};
use super::world::{Link, World};
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::status::RunResult;
use crate::model::workflow::Target;

/// A worker's main process.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) invocation: u64,
    pub(super) link: Option<LinkId>,
    /// What it can still read of a connection that nerved's crash closed.
    pub(super) backlog: Vec<Down>,
    pub(super) tasks: BTreeMap<RunId, Task>,
    /// It was stopped, or is stuck, and does nothing.
    pub(super) is_stuck: bool,
    /// It does not do what it is told, and leaves processes behind.
    pub(super) is_custom: bool,
}

/// A run that a worker has.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Debug)]
pub(super) struct Task {
    pub(super) thread: Thread,
    max_rounds: u32,
    acked: u32,
    /// What it waits for within a round.
    awaits: Option<Order>,
    /// When the next attempt may begin.
    attempt_at: u64,
    /// When it is to end 124, in µs of this boot.
    deadline: Option<u64>,
    pub(super) is_executing: bool,
    /// Its role hangs.
    pub(super) is_hung: bool,
    is_killing: bool,
    is_aborting: bool,
    is_ended: bool,
    is_forgotten: bool,
    /// What nerved has not acknowledged.
    pub(super) unacked: Vec<Up>,
}

/// What a worker says.
#[derive(Debug, Clone)]
pub(super) enum Up {
    Ready(Vec<RunId>),
    Message {
        run: RunId,
        round: u32,
        message: Message,
    },
    Attempt {
        run: RunId,
        round: u32,
        attempt: u32,
        message: Message,
        delay_us: u64,
    },
    Routed {
        run: RunId,
        round: u32,
        target: Target,
    },
    Ended {
        run: RunId,
        result: RunResult,
    },
}

/// What a worker is told.
#[derive(Debug)]
pub(super) enum Down {
    Order(Order),
    Assign(Dispatch, Thread),
}

impl Up {
    /// What lets the worker go on within a round.
    fn awaits(&self) -> Option<Order> {
        match *self {
            Self::Attempt {
                run,
                round,
                attempt,
                ..
            } => Some(Order::AttemptAck {
                run,
                round,
                attempt,
            }),
            Self::Routed { run, round, .. } => Some(Order::RouteAck { run, round }),
            Self::Ready(_) | Self::Message { .. } | Self::Ended { .. } => None,
        }
    }
}

pub(super) fn message(role: &str, status: &str, result: &str, content: u64) -> Message {
    let mut meta = Map::new();
    meta.insert("status".into(), status.into());
    meta.insert("result".into(), result.into());
    Message {
        role: role.to_owned(),
        content: content.to_string(),
        meta,
        timestamp: 0,
    }
}

impl Task {
    pub(super) fn has_deadline(&self) -> bool {
        self.deadline.is_some()
    }

    /// When it goes on by itself, if it waits for that.
    pub(super) fn wakes_at(&self, now: u64) -> Option<u64> {
        let at = self
            .deadline
            .map_or(self.attempt_at, |deadline| deadline.min(self.attempt_at));
        (at > now && self.awaits.is_none() && !self.is_executing && !self.is_ended).then_some(at)
    }
}

impl Worker {
    pub(super) fn new(invocation: u64, random: &mut super::random::Random) -> Self {
        Self {
            invocation,
            link: None,
            backlog: Vec::new(),
            tasks: BTreeMap::new(),
            is_stuck: false,
            is_custom: random.chance(15),
        }
    }

    /// Says something about a run, again and again until it is acknowledged.
    fn say(&mut self, run: RunId, up: Up, link: Option<&mut Link>) {
        self.tasks.get_mut(&run).unwrap().unacked.push(up.clone());
        if let Some(link) = link {
            link.up.push_back(up);
        }
    }

    /// Does what nerved says; whether it is to exit.
    fn obey(&mut self, down: Down, up: &mut VecDeque<Up>, now: u64) -> bool {
        match down {
            Down::Assign(dispatch, thread) => {
                let wait = dispatch.failed.map_or(0, |(_, wait)| wait);
                let task = Task {
                    max_rounds: dispatch.max_rounds,
                    acked: thread.rounds,
                    awaits: None,
                    attempt_at: now + wait,
                    thread,
                    deadline: dispatch.timeout_us.map(|left| now + left),
                    is_executing: false,
                    is_hung: false,
                    is_killing: false,
                    is_aborting: false,
                    is_ended: false,
                    is_forgotten: false,
                    unacked: Vec::new(),
                };
                self.tasks.entry(dispatch.run).or_insert(task);
            }
            Down::Order(Order::Welcome) => {
                up.extend(
                    self.tasks
                        .values()
                        .flat_map(|task| task.unacked.iter().cloned()),
                );
            }
            Down::Order(Order::KillThread { run, .. }) => match self.tasks.get_mut(&run) {
                Some(task) => task.is_killing = !self.is_custom,
                None => up.push_back(Up::Ended {
                    run,
                    result: RunResult::Killed,
                }),
            },
            Down::Order(Order::AbortThread { run, .. }) => {
                if let Some(task) = self.tasks.get_mut(&run) {
                    task.is_aborting = !self.is_custom;
                }
            }
            Down::Order(Order::MessageAck { run, round }) => {
                if let Some(task) = self.tasks.get_mut(&run) {
                    task.acked = task.acked.max(round);
                    task.unacked.retain(
                        |up| !matches!(up, Up::Message { round: said, .. } if *said == round),
                    );
                }
            }
            Down::Order(order @ (Order::AttemptAck { run, .. } | Order::RouteAck { run, .. })) => {
                if let Some(task) = self.tasks.get_mut(&run) {
                    task.awaits.take_if(|awaited| *awaited == order);
                    task.unacked.retain(|up| up.awaits() != Some(order.clone()));
                }
            }
            Down::Order(Order::EventAck { run }) => {
                if let Some(task) = self.tasks.get_mut(&run) {
                    task.unacked.clear();
                    (task.is_forgotten, task.is_killing) = (true, true);
                    if !task.is_executing {
                        self.tasks.remove(&run);
                    }
                }
            }
            Down::Order(Order::Shutdown) => return true,
        }
        false
    }
}

impl World {
    /// A worker does the next thing it has to do.
    pub(super) fn work(&mut self, workflow: usize) -> bool {
        let Some(mut worker) = self.machine.services[workflow].worker.take() else {
            return false;
        };
        let (mut is_busy, mut exits) = (false, false);
        if !worker.is_stuck {
            is_busy = worker.backlog.is_empty() && self.connect(workflow, &mut worker);
            // It reads what there is before it goes on: what was sent long before it looked counts.
            let mut orders = std::mem::take(&mut worker.backlog);
            orders.extend(
                self.link(worker.link)
                    .into_iter()
                    .flat_map(|link| link.down.drain(..)),
            );
            is_busy |= !orders.is_empty();
            let (mut up, now) = (VecDeque::new(), self.machine.now.boot_us);
            for order in orders {
                self.log(|| format!("  worker {} reads {order:?}", worker.invocation));
                exits |= worker.obey(order, &mut up, now);
            }
            if let Some(link) = self.link(worker.link) {
                link.up.append(&mut up);
            }
            let runs: Vec<_> = worker.tasks.keys().copied().collect();
            if !runs.is_empty() && !exits && !is_busy {
                let first = self.random.index(runs.len());
                let mut order = runs[first..].iter().chain(&runs[..first]);
                is_busy = order.any(|run| self.progress(&mut worker, *run));
            }
        }
        self.machine.services[workflow].worker = Some(worker);
        if exits {
            self.machine.die(workflow, exited(0));
        }
        is_busy
    }

    fn connect(&mut self, workflow: usize, worker: &mut Worker) -> bool {
        let is_up = self.is_bus_up;
        let Some(nerved) = &mut self.nerved else {
            worker.link = None;
            return false;
        };
        if let Some(link) = worker.link.and_then(|id| nerved.links.get(&id))
            && (link.is_heard || !link.down.is_empty())
        {
            return false;
        }
        worker.link = None;
        if !is_up {
            return false;
        }
        self.next_link += 1;
        let read = self.machine.ask();
        let held = worker.tasks.iter().filter(|(_, task)| !task.is_forgotten);
        let ready = Up::Ready(held.map(|(run, _)| *run).collect());
        nerved.links.insert(
            self.next_link,
            Link::new(workflow, worker.invocation, read, ready),
        );
        worker.link = Some(self.next_link);
        true
    }

    /// One step of one run.
    fn progress(&mut self, worker: &mut Worker, run: RunId) -> bool {
        let (invocation, custom) = (worker.invocation, worker.is_custom);
        let is_unheard = self.machine.may_be_late(run, invocation);
        let processes = self.machine.cgroups.entry(run).or_default();
        let own = processes
            .iter()
            .position(|process| process.invocation == invocation && !process.is_left);
        let task = worker.tasks.get_mut(&run).unwrap();
        if task.is_ended {
            return false;
        }
        let is_late = task
            .deadline
            .is_some_and(|at| at <= self.machine.now.boot_us);
        if let Some(own) = own {
            let process = &mut processes[own];
            if process.is_dying {
                return false;
            }
            if task.is_killing || is_late && !custom {
                process.is_dying = true;
                return true;
            }
            if task.is_hung {
                return false;
            }
            processes.remove(own);
            if custom && !task.thread.is_own && self.random.chance(30) {
                let invocation = worker.invocation;
                processes.push(Process {
                    invocation,
                    is_left: true,
                    is_dying: false,
                    is_slow: false,
                    is_late: is_unheard,
                });
            }
            let (status, result) = match self.random.below(8) {
                0 => ("error", "exit-code:3"),
                1 => ("error", "oom-kill"),
                2 => ("odd", ""),
                _ => ("ok", ""),
            };
            self.finish(worker, run, status, result);
            return true;
        }
        if task.is_forgotten {
            worker.tasks.remove(&run);
        } else if task.is_killing {
            self.end(worker, run, RunResult::Killed);
        } else if task.is_executing && is_late && !custom {
            self.end(worker, run, RunResult::Timeout);
        } else if task.is_executing {
            self.finish(worker, run, "error", "signal:SIGKILL");
        } else if task.is_aborting {
            self.end(worker, run, RunResult::Aborted);
        } else if let Next::End(result) = task.thread.next(task.max_rounds) {
            self.end(worker, run, result);
        } else if task.acked < task.thread.rounds || task.awaits.is_some() {
            return false;
        } else if is_late && !custom {
            self.end(worker, run, RunResult::Timeout);
        } else if task.attempt_at > self.machine.now.boot_us {
            return false;
        } else if task.thread.next(task.max_rounds) == Next::Ask {
            self.ask(worker, run);
        } else if task.thread.kind == Kind::Worker
            && (task.thread.rounds >= task.max_rounds || self.random.chance(30))
        {
            let results = [RunResult::Success, RunResult::ExitCode(3)];
            let result = self.random.pick(&results);
            self.end(worker, run, result);
        } else {
            task.is_executing = true;
            let is_slow = self.is_chaos && self.random.chance(5);
            let which = (task.thread.rounds + 1, task.thread.failed);
            self.oracle.executes(run, which, invocation, &self.machine);
            let process = Process {
                invocation,
                is_left: false,
                is_dying: false,
                is_slow,
                is_late: self.machine.may_be_late(run, invocation),
            };
            self.machine.cgroups.entry(run).or_default().push(process);
            self.log(|| format!("  worker {invocation} executes a round of {}", run.short()));
        }
        true
    }

    fn finish(&mut self, worker: &mut Worker, run: RunId, status: &str, result: &str) {
        self.next_content += 1;
        let task = worker.tasks.get_mut(&run).unwrap();
        task.is_executing = false;
        let role = match task.thread.next(task.max_rounds) {
            Next::Role(role) => role,
            Next::Any => "a",
            Next::Ask | Next::End(_) => return,
        };
        let mut message = message(role, status, result, self.next_content);
        message.timestamp = self.machine.now.boot_us;
        if status == "error" && task.thread.failed < 3 && self.random.chance(50) {
            let delay_us = self.random.pick(&[0, SECOND, 20 * SECOND]);
            task.thread.failed += 1;
            task.attempt_at = self.machine.now.boot_us + delay_us;
            let up = Up::Attempt {
                run,
                round: task.thread.rounds + 1,
                attempt: task.thread.failed,
                message,
                delay_us,
            };
            task.awaits = up.awaits();
            return worker.say(run, up, self.link(worker.link));
        }
        task.thread.push(message.clone());
        let round = task.thread.rounds;
        worker.say(
            run,
            Up::Message {
                run,
                round,
                message,
            },
            self.link(worker.link),
        );
    }

    /// The moderator is asked.
    fn ask(&mut self, worker: &mut Worker, run: RunId) {
        let role = |name: &str| Target::Role(name.parse().unwrap());
        let target = match self.random.below(8) {
            0..3 => role("a"),
            3..6 => role("b"),
            6 => Target::End,
            _ => return self.end(worker, run, RunResult::BadRoute),
        };
        let task = worker.tasks.get_mut(&run).unwrap();
        task.thread.route = Some(target.clone());
        let round = task.thread.rounds + 1;
        let up = Up::Routed { run, round, target };
        task.awaits = up.awaits();
        worker.say(run, up, self.link(worker.link));
    }

    fn end(&mut self, worker: &mut Worker, run: RunId, result: RunResult) {
        let task = worker.tasks.get_mut(&run).unwrap();
        (task.is_ended, task.is_executing) = (true, false);
        worker.say(run, Up::Ended { run, result }, self.link(worker.link));
    }
}
