//! Whether what happened to a run or a queue was right.

use std::sync::Arc;

use super::super::{Input, Stop, UnitState};
use super::definitions::{Next, index, name};
use super::machine::{Machine, SECOND, number};
use super::oracle::{Desk, Oracle, READY_US, SLACK_US, row};
use crate::model::name::RunId;
use crate::model::run::{BootInstant, Place};
use crate::model::status::RunResult;
use crate::model::worker::{Cause, Death};
use crate::model::workflow::{Definition, OnFull, Overflow};

impl Oracle {
    pub(super) fn check_start(
        &self,
        id: RunId,
        digest: &str,
        since: &BootInstant,
        machine: &Machine,
    ) -> Arc<Definition> {
        let run = &self.runs[&id];
        let desk = &self.desks[run.workflow];
        let oldest = desk.queue.values().next();
        assert_eq!(
            oldest,
            Some(&id),
            "I8: {id:?} is not the one that waited longest"
        );
        assert!(!self.is_paused, "{id:?} leaves the queue during a pause");
        assert!(!desk.is_closed(), "{id:?} leaves a closed queue: {desk:?}");
        let definition = self
            .definition(run.workflow)
            .expect("a run of what is not defined leaves the queue");
        assert_eq!(
            definition.digest, digest,
            "{id:?} does not run what is in force"
        );
        assert_eq!(*since, machine.instant());
        assert!(
            self.has_free_slot(run.workflow, definition),
            "I12: {id:?} has no slot"
        );
        assert!(
            desk.is_outdated(definition) != Some(true),
            "{id:?} starts though its worker is to be replaced"
        );
        definition.clone()
    }

    pub(super) fn check_dispatch(&self, id: RunId, place: &Place, machine: &Machine) {
        let run = &self.runs[&id];
        let desk = &self.desks[run.workflow];
        let invocation = number(&place.invocation);
        assert!(
            run.invocation == 0 || run.is_lost,
            "I6: {id:?} is resumed while a worker has it"
        );
        assert!(run.blame < 3, "{id:?} is resumed after 3 deaths");
        let is_doomed = run.is_doomed && !run.is_pardoned;
        assert!(
            !desk.is_blocked && !is_doomed,
            "{id:?} is resumed though its workflow was blocked"
        );
        assert_eq!(
            desk.accepted.map(|(_, accepted)| accepted),
            Some(invocation),
            "I5: {id:?} goes nowhere"
        );
        assert!(
            desk.draining != Some(invocation),
            "{id:?} goes to a worker that is drained"
        );
        assert!(
            machine.is_empty(id),
            "I6: {id:?} is resumed before its old cgroup is empty"
        );
        let others = desk
            .started
            .iter()
            .filter(|other| **other != id)
            .map(|other| &self.runs[other]);
        for other in others.filter(|other| other.is_placed() && other.invocation == invocation) {
            let is_ending = other.killed
                || other.aborted.is_some()
                || !other.reported.is_empty()
                || other.is_late(machine);
            let is_alone = run.blame >= 2 || other.blame >= 2;
            assert!(
                is_ending || !is_alone,
                "a suspect is not alone: {run:?} and {other:?}"
            );
        }
    }

    /// A death that nerved speaks of is one, and it is told as it was.
    pub(super) fn check_death(
        &self,
        workflow: usize,
        invocation: u64,
        death: &Death,
        machine: &Machine,
    ) {
        let life = &machine.lives[&invocation];
        let is_rebooted = life.boot != machine.boot;
        let is_blocked = self.desks[workflow].is_blocked;
        match death.cause {
            Cause::Reboot => assert!(is_rebooted, "there was no reboot"),
            Cause::NotReady => {
                let seen = self.desks[workflow].first_seen.get(&invocation);
                let is_late = seen.is_some_and(|seen| machine.now.boot_us >= seen + READY_US);
                assert!(
                    is_late || is_blocked,
                    "worker {invocation} was not given its time"
                );
            }
            Cause::Unseen => assert!(
                !machine.is_alive(invocation),
                "worker {invocation} is alive"
            ),
            _ => {
                assert!(
                    !machine.is_alive(invocation),
                    "worker {invocation} is alive"
                );
                assert!(!is_rebooted, "a reboot is no death of a worker");
                let service = &machine.services[workflow];
                let is_newest = service.invocation == invocation;
                let is_stop = life.stop != Stop::Nobody;
                if death.cause == Cause::Stopped {
                    // A unit may be stopped that waited for its restart.
                    let told = self.desks[workflow].told.as_ref();
                    let is_unit_stopped = told.is_some_and(|told| told.stop != Stop::Nobody);
                    assert!(
                        is_stop || is_unit_stopped || self.desks[workflow].forced == invocation,
                        "nobody stopped worker {invocation}"
                    );
                } else if death.cause != Cause::Unknown {
                    assert_eq!(Some(death), life.death.as_ref(), "another death");
                    assert!(!is_stop, "worker {invocation} was stopped");
                } else {
                    let told = self.desks[workflow].told.as_ref();
                    let is_told = told.is_some_and(|told| {
                        told.death.is_some() && number(&told.invocation) == invocation
                    });
                    assert!(
                        !is_told || !is_newest,
                        "nerved was told how {invocation} died"
                    );
                }
            }
        }
    }

    /// A run that never started is dropped as its workflow says.
    pub(super) fn check_drop(&self, id: RunId, result: &RunResult, input: Option<&Input>) {
        let run = &self.runs[&id];
        let desk = &self.desks[run.workflow];
        let is_new = matches!(input, Some(Input::Start { run, .. }) if *run == id);
        let Some(definition) = self.definition(run.workflow) else {
            let is_gone = !self.definitions.contains_key(&name(run.workflow));
            return assert!(
                is_gone && *result == RunResult::Removed,
                "{id:?} is dropped: {result}"
            );
        };
        let workflow = &definition.workflow;
        let (waiting, most) = (desk.queue.len(), workflow.max_queue as usize);
        let is_oldest = desk.queue.values().next() == Some(&id);
        let changed = matches!(input, None | Some(Input::Definitions { .. }));
        let is_right = match (result, workflow.overflow) {
            (RunResult::Blocked, Overflow::Drop) => {
                let is_foreign = desk
                    .told
                    .as_ref()
                    .is_some_and(|told| told.state == UnitState::Foreign);
                (is_new || changed)
                    && (self.is_paused || desk.is_blocked || desk.is_stopped || is_foreign)
            }
            (RunResult::QueueFull, Overflow::Drop) if is_new => {
                !self.has_free_slot(run.workflow, definition)
                    || !self.is_of_one_kind(desk, definition)
                    || self.down_until != 0
                    || !self.is_listed
                    || desk.told.is_none()
                    || desk.is_closed()
                    || desk.draining == Some(desk.newest)
                    || desk
                        .told
                        .as_ref()
                        .is_some_and(|told| told.state == UnitState::Stopping)
                    || desk
                        .told
                        .as_ref()
                        .and_then(|told| told.settings.as_ref())
                        .is_some_and(|settings| *settings != definition.workflow.worker.digest())
                    || desk
                        .connected
                        .as_ref()
                        .is_some_and(|settings| *settings != definition.workflow.worker.digest())
            }
            (RunResult::QueueFull, Overflow::Drop) => changed,
            (RunResult::QueueFull, Overflow::Latest) => is_oldest && waiting > 1 || most == 0,
            (RunResult::QueueFull, Overflow::Queue) => match workflow.on_full {
                OnFull::Evict => (is_oldest || most == 0) && waiting > most,
                OnFull::Refuse => (is_new || changed) && waiting > most,
            },
            _ => false,
        };
        assert!(
            is_right,
            "I8: {id:?} is dropped, {result}: {workflow:?} {desk:?}"
        );
    }

    /// A run that started, or that was asked to end, ends for a reason.
    pub(super) fn check_end(&self, id: RunId, result: &RunResult, machine: &Machine) {
        let run = &self.runs[&id];
        let desk = &self.desks[run.workflow];
        let passed = |at: &BootInstant, us: u64| {
            at.boot_id != machine.boot_id() || machine.now.boot_us >= at.boot_us + us
        };
        let is_right = match result {
            RunResult::Killed => run.killed,
            RunResult::Aborted => run.aborted.is_some() && !run.killed,
            RunResult::Timeout => {
                let timeout = run
                    .definition
                    .as_ref()
                    .and_then(|definition| definition.workflow.timeout);
                let slack = if run.reported.contains(&RunResult::Timeout) {
                    0
                } else {
                    SLACK_US
                };
                timeout.is_some_and(|timeout| {
                    passed(
                        run.since.as_ref().unwrap(),
                        u64::try_from(timeout.as_micros()).unwrap() + slack,
                    )
                })
            }
            RunResult::Drained => {
                let mut drains = desk
                    .drains
                    .iter()
                    .filter(|(invocation, _)| *invocation == run.invocation);
                drains.any(|(_, until)| until.boot_id == machine.boot_id() && passed(until, 0))
            }
            RunResult::WorkerDied | RunResult::WorkerExit(_) => {
                let code = run
                    .last_death
                    .as_ref()
                    .and_then(|death| death.code)
                    .filter(|code| *code != 0);
                let named = code.map_or(RunResult::WorkerDied, RunResult::WorkerExit);
                let is_doom = run.doom.map(RunResult::WorkerExit).as_ref() == Some(result);
                run.blame >= 3 && named == *result || run.is_doomed && is_doom
            }
            RunResult::StartLimitHit => run.is_doomed,
            RunResult::UnitRefused => desk.is_refused,
            natural => {
                let may_be = match run.thread.next(run.max_rounds) {
                    Next::End(next) => next == *natural,
                    Next::Ask => *natural == RunResult::BadRoute,
                    Next::Any => [0, 1, 2].contains(&row(natural).1),
                    Next::Role(_) => false,
                };
                run.reported.contains(natural) && may_be
            }
        };
        assert!(is_right, "I3: {id:?} ends {result}: {run:?}");
    }

    /// Who has a slot wants the worker that is wanted now.
    fn is_of_one_kind(&self, desk: &Desk, definition: &Definition) -> bool {
        let exec = |definition: &Definition| definition.workflow.worker.exec.len();
        let mut started = desk.started.iter().map(|id| &self.runs[id]);
        started.all(|run| run.definition.as_deref().map(exec) == Some(exec(definition)))
    }

    /// Nothing keeps a run of this workflow in the queue but that there may be no slot, for all that is surely known.
    pub(super) fn may_leave(&self, workflow: usize) -> bool {
        let desk = &self.desks[workflow];
        let known = self.definition(workflow).zip(desk.told.as_ref());
        known.is_some_and(|(definition, told)| {
            use UnitState::{Absent, Active, Starting};
            let digest = definition.workflow.worker.digest();
            let is_ours = matches!(told.state, Absent | Starting | Active);
            self.is_listed
                && !self.is_paused
                && self.down_until == 0
                && !desk.is_closed()
                && desk.draining != Some(desk.newest)
                && self.is_of_one_kind(desk, definition)
                && (is_ours && told.stop == Stop::Nobody && told.read == desk.read)
                && told
                    .settings
                    .as_ref()
                    .is_none_or(|settings| *settings == digest)
        })
    }

    /// After a step nothing waits that need not, and no more waits than may.
    pub(super) fn check_queues(&self, input: Option<&Input>, started: &[RunId]) {
        for (workflow, desk) in self.desks.iter().enumerate() {
            let mut runs = desk.started.iter().map(|id| &self.runs[id]);
            let is_left = runs.any(|run| run.is_placed() && desk.drained.contains(&run.invocation));
            assert!(!is_left, "a worker is drained and has a run: {desk:?}");
            let Some(definition) = self.definition(workflow) else {
                continue;
            };
            let settings = &definition.workflow;
            let is_over = desk.deaths.last().is_some_and(|(_, last)| {
                let (interval, burst) = settings.worker.start_limit();
                desk.recent(interval.as_secs() * SECOND, last) >= burst as usize
            });
            let is_calm = desk.is_blocked || desk.is_stopped || !desk.has_died;
            assert!(is_calm || !is_over, "not blocked: {desk:?}");
            if let Some((order, first)) = desk.queue.first_key_value()
                && self.may_leave(workflow)
            {
                let is_free = self.has_free_slot(workflow, definition);
                assert!(!is_free, "I12: {first:?} waits for nothing: {desk:?}");
                let is_short = self
                    .max_active
                    .is_some_and(|most| self.active() == most as usize);
                let has_room = desk.started.len() < settings.concurrency as usize;
                let mut started = started.iter().map(|id| &self.runs[id]);
                let younger = started.find(|run| is_short && has_room && run.order > *order);
                assert!(
                    younger.is_none(),
                    "I8: {first:?} waits longer than {younger:?}"
                );
            }
            let new = match input {
                Some(Input::Start { run, accepted, .. })
                    if index(&accepted.workflow) == workflow =>
                {
                    Some(run)
                }
                _ => None,
            };
            let (waiting, most) = (desk.queue.len(), settings.max_queue as usize);
            let is_right = match settings.overflow {
                Overflow::Queue => waiting <= most,
                Overflow::Latest => new.is_none() || waiting <= 1,
                Overflow::Drop => desk.queue.values().all(|id| Some(id) != new),
            };
            assert!(is_right, "I8: too many wait: {desk:?}");
        }
    }
}
