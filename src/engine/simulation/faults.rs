//! Everything that goes wrong.

use super::super::{Input, Stop, Turn, UnitState};
use super::coverage::{Fault, Moment};
use super::definitions::WORKFLOWS;
use super::machine::{SECOND, exited};
use super::worker::{Up, message};
use super::world::World;
use crate::model::name::RunId;
use crate::model::status::RunResult;
use crate::model::worker::{Cause, Death};
use crate::model::workflow::Target;

impl World {
    pub(super) fn met(&mut self, fault: Fault) {
        self.log(|| format!("fault {fault:?}"));
        self.coverage.fault(fault);
        self.faults += 1;
    }

    pub(super) fn fail(&mut self) {
        for _ in 0..4 {
            let fault = self.random.pick(Fault::ALL);
            if self.inflict(fault) {
                self.met(fault);
                break;
            }
        }
        self.sever();
    }

    /// `false`: it cannot happen now, or is to happen later.
    pub(super) fn inflict(&mut self, fault: Fault) -> bool {
        let workflow = self.random.index(WORKFLOWS);
        let death = match fault {
            Fault::WorkerExits => Some(exited(7)),
            Fault::WorkerExitsWithZero => Some(exited(0)),
            Fault::WorkerDiesOfSignal => Some(Death {
                signal: Some("SIGSEGV".to_owned()),
                ..Death::of(Cause::CoreDump)
            }),
            Fault::WorkerOutOfMemory => Some(Death::of(Cause::OomKill)),
            Fault::WatchdogKills | Fault::WorkerGoesStale => Some(Death::of(Cause::Watchdog)),
            _ => None,
        };
        let service = &mut self.machine.services[workflow];
        let is_stuck = service
            .worker
            .as_ref()
            .is_some_and(|worker| worker.is_stuck);
        match fault {
            Fault::CrashBeforeCommit
            | Fault::CrashAfterCommit
            | Fault::CrashAmidActions
            | Fault::CrashAfterTurn
            | Fault::DiskFull => {
                self.armed = Some(fault);
                return false;
            }
            Fault::CrashInRecovery => {
                let is_down = self.nerved.is_none();
                let moments = [
                    Fault::CrashBeforeCommit,
                    Fault::CrashAfterCommit,
                    Fault::CrashAmidActions,
                ];
                self.armed = self.armed.or(is_down.then(|| self.random.pick(&moments)));
                return false;
            }
            Fault::CrashBetweenTurns if self.nerved.is_some() => {
                self.note_failpoints(Moment::BetweenTurns, &Turn::default());
                self.crash();
            }
            Fault::SignalLost | Fault::SignalRepeated | Fault::SignalLate => {
                let Some(nerved) = &mut self.nerved else {
                    return false;
                };
                let Some(signal) = nerved.signals.pop_front() else {
                    return false;
                };
                let copies = match fault {
                    Fault::SignalLost => 0,
                    Fault::SignalRepeated => 2,
                    _ => 1,
                };
                nerved.signals.extend(std::iter::repeat_n(signal, copies));
            }
            Fault::BusLost if self.is_bus_up => {
                self.is_bus_up = false;
                if let Some(nerved) = &mut self.nerved {
                    nerved.signals.clear();
                    nerved.bus.clear();
                    nerved.inbox.push_back(Input::BusLost);
                }
            }
            Fault::WatchdogKills if !is_stuck => return false,
            Fault::WorkerGoesStale if service.worker.is_some() && service.stray.is_none() => {
                service.stray = service.worker.take();
                self.machine.die(workflow, death.unwrap());
            }
            _ if death.is_some() && service.worker.is_some() => {
                self.machine.die(workflow, death.unwrap())
            }
            Fault::WorkerSticks | Fault::WorkerWakes if service.worker.is_some() => {
                let is_stuck = fault == Fault::WorkerSticks;
                service.worker.as_mut().unwrap().is_stuck = is_stuck;
            }
            Fault::WorkerIgnoresOrders if service.worker.is_some() => {
                service.worker.as_mut().unwrap().is_custom = true;
            }
            Fault::StaleWorkerSpeaks => {
                return (0..WORKFLOWS).any(|workflow| self.speak_stale(workflow));
            }
            Fault::LinkCut => {
                let Some(worker) = service.worker.as_mut() else {
                    return false;
                };
                return worker.link.take().is_some();
            }
            Fault::WorkerLies => return self.lie(workflow),
            Fault::RoleHangs => {
                let mut tasks = service
                    .worker
                    .iter_mut()
                    .flat_map(|worker| worker.tasks.values_mut());
                let Some(task) = tasks.find(|task| task.is_executing) else {
                    return false;
                };
                task.is_hung = true;
            }
            Fault::ProcessDiesSlowly => {
                let mut processes = self.machine.cgroups.values_mut().flatten();
                let Some(process) = processes.next() else {
                    return false;
                };
                process.is_slow = true;
            }
            Fault::OperatorStops => return self.machine.stop(workflow, Stop::Operator, false),
            Fault::OperatorRestarts => return self.machine.stop(workflow, Stop::Operator, true),
            Fault::TargetStops => {
                self.is_going_down = true;
                for workflow in 0..WORKFLOWS {
                    self.machine.stop(workflow, Stop::GoingDown, false);
                }
            }
            Fault::ForeignUnit if service.state == UnitState::Foreign => {
                service.state = UnitState::Absent;
                self.machine.changed.push(workflow);
            }
            Fault::ForeignUnit
                if matches!(service.state, UnitState::Absent | UnitState::Failed) =>
            {
                (service.state, service.invocation) = (UnitState::Foreign, 0);
                service.stop = Stop::Nobody;
                self.machine.changed.push(workflow);
            }
            Fault::StartRefused | Fault::StartFailed | Fault::StartFailedLate => {
                self.next_start = Some(fault);
                return false;
            }
            Fault::WallClockBack => self.machine.now.wall_us -= 1_000 * SECOND,
            Fault::WallClockForth => self.machine.now.wall_us += 1_000 * SECOND,
            Fault::Suspend => {
                let seconds = self.random.pick(&[3, 40, 1_000]);
                self.machine.pass(seconds * SECOND);
            }
            Fault::Reboot if self.random.chance(50) => {
                self.crash();
                self.machine.reboot();
                self.is_bus_up = true;
            }
            _ => return false,
        }
        true
    }

    /// A worker that systemd took for dead says what it has to say.
    pub(super) fn speak_stale(&mut self, workflow: usize) -> bool {
        let Some(stray) = self.machine.services[workflow].stray.take() else {
            return false;
        };
        self.next_content += 1;
        let content = self.next_content;
        let mut is_heard = false;
        if let Some(link) = self.link(stray.link).filter(|link| link.is_heard) {
            for (run, task) in &stray.tasks {
                let round = task.thread.rounds + 1;
                let message = message("a", "ok", "", content);
                link.up.extend(task.unacked.iter().cloned());
                link.up.push_back(Up::Message {
                    run: *run,
                    round,
                    message,
                });
                // What the user's own worker says of an end has to be believed.
                if !task.thread.is_own {
                    link.up.push_back(Up::Ended {
                        run: *run,
                        result: RunResult::Success,
                    });
                }
                is_heard = true;
            }
        }
        self.machine.services[workflow].stray = Some(stray);
        is_heard
    }

    /// A worker says what it must not.
    pub(super) fn lie(&mut self, workflow: usize) -> bool {
        let Some(worker) = &self.machine.services[workflow].worker else {
            return false;
        };
        let (link, runs) = (
            worker.link,
            worker.tasks.keys().copied().collect::<Vec<_>>(),
        );
        if runs.is_empty() {
            return false;
        }
        let run = self.random.pick(&runs);
        let done = worker.tasks[&run].thread.rounds;
        let thread = &worker.tasks[&run].thread;
        let (failed, is_own) = (thread.failed, thread.is_own);
        // Its own worker may name any role that could be one.
        let (role, round) = self
            .random
            .pick(&[("No", done + 1), ("a", done + 3), ("b", done + 4)]);
        let results = [
            RunResult::Killed,
            RunResult::Aborted,
            RunResult::Success,
            RunResult::WorkerDied,
        ];
        let result = self.random.pick(&results);
        // Who says that it ended, and begins a round then, is beyond help.
        let is_end = worker.tasks[&run].is_executing && !is_own && self.random.chance(50);
        let lie = self.random.below(3);
        self.next_content += 1;
        let message = message(role, "ok", "", self.next_content);
        let Some(link) = self.link(link) else {
            return false;
        };
        link.up.push_back(if is_end {
            Up::Ended { run, result }
        } else if lie == 0 {
            Up::Attempt {
                run,
                round: done + 1,
                attempt: failed + 2,
                message,
                delay_us: 0,
            }
        } else if lie == 1 {
            Up::Routed {
                run,
                round: done + 2,
                target: Target::End,
            }
        } else {
            Up::Message {
                run,
                round,
                message,
            }
        });
        true
    }

    /// Offers a run an event that nobody had: the table of legal transitions must say what ours says.
    pub(super) fn fabricate(&mut self) {
        let Some(run) = (!self.store.order.is_empty()).then(|| self.random.pick(&self.store.order))
        else {
            return;
        };
        self.offer(run);
    }

    pub(super) fn offer(&mut self, id: RunId) {
        let run = &self.store.runs[&id];
        let ledger = &self.oracle.runs[&id];
        let event = ledger.any_event(id, &mut self.random);
        let (is_allowed, after) = (ledger.allows(&event), run.after(&event, 1));
        assert_eq!(
            after.is_ok(),
            is_allowed,
            "{} × {event:?} of {ledger:?}",
            run.status()
        );
        if !ledger.could_allow(&event) {
            self.coverage.pair(run.status(), &event);
        }
    }
}
