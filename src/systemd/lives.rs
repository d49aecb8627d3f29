//! What systemd's signals tell that a read cannot: who stopped a unit, and how an invocation ended that is gone.
//!
//! A unit that was stopped, or whose worker exited with 0, is unloaded at once, and one that crashed is soon up again.
//! But a job that stops or restarts a unit shows in the signals: the unit is `deactivating` while it has a job that is
//! not the one it was started by. A worker that ends by itself, or that somebody kills, has no such job.

use std::collections::BTreeMap;
use std::mem;

use crate::engine::{Stop, Unit, UnitState};
use crate::model::name::WorkflowName;
use crate::model::worker::Death;

/// Where a unit stands, by systemd's ActiveState and SubState.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Starting,
    Active,
    Stopping,
    /// It died, and systemd will start it again.
    Restarting,
    Failed,
    Dead,
}

impl Phase {
    pub(super) fn of(active: &str, sub: &str) -> Self {
        match active {
            // `failed-before-auto-restart`, `auto-restart-queued`, …: since systemd 254.
            _ if sub.contains("auto-restart") => Self::Restarting,
            "active" | "reloading" | "refreshing" => Self::Active,
            "deactivating" => Self::Stopping,
            "failed" => Self::Failed,
            "inactive" => Self::Dead,
            _ => Self::Starting,
        }
    }
}

/// A unit as one signal shows it.
#[derive(Debug)]
pub(super) struct Glimpse {
    pub(super) phase: Phase,
    /// 0: none.
    pub(super) job: u32,
    /// 32 hex digits; empty when it never had one.
    pub(super) invocation: String,
}

impl Glimpse {
    /// The job that the invocation was started by, when this is the first glimpse of it; 0: it is gone already.
    /// `None` when the job, if there is one, is for the next invocation.
    pub(super) fn start_job(&self) -> Option<u32> {
        match self.phase {
            Phase::Restarting => None,
            Phase::Active | Phase::Stopping => Some(0),
            // The first signal of an invocation still has the state of the one before.
            Phase::Starting | Phase::Dead | Phase::Failed => Some(self.job),
        }
    }
}

/// Whether a job stops an invocation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stopped {
    #[default]
    No,
    /// Yes; whose wish it is has not been asked yet.
    Unclear,
    By(Stop),
}

/// One invocation of a worker unit.
#[derive(Debug, Default)]
struct Life {
    invocation: String,
    /// The job that it was started by, once it is known; 0: long gone. It is still there when the start fails.
    start_job: Option<u32>,
    is_restarting: bool,
    stopped: Stopped,
    death: Option<Death>,
    /// Its death has been told, with this reason.
    told: Option<Stop>,
    /// That the unit is gone has been told.
    is_gone_told: bool,
}

impl Life {
    fn see(&mut self, glimpse: &Glimpse) {
        let is_restarting = mem::take(&mut self.is_restarting);
        let is_stopped = match glimpse.phase {
            Phase::Stopping => glimpse.job != 0 && Some(glimpse.job) != self.start_job,
            Phase::Restarting => {
                self.is_restarting = true;
                false
            }
            // What was to be restarted stays down: only a stop does that. With a job it is not settled yet.
            Phase::Dead => {
                self.is_restarting = is_restarting && glimpse.job != 0;
                is_restarting && glimpse.job == 0
            }
            Phase::Starting => {
                self.start_job.get_or_insert(glimpse.job);
                false
            }
            Phase::Active | Phase::Failed => false,
        };
        if is_stopped {
            self.stop();
        }
    }

    fn stop(&mut self) {
        if self.stopped == Stopped::No {
            self.stopped = Stopped::Unclear;
        }
    }

    fn stop_by(&self) -> Stop {
        match self.stopped {
            Stopped::No => Stop::Nobody,
            Stopped::Unclear => Stop::Operator,
            Stopped::By(stop) => stop,
        }
    }

    /// Whether it ended, and that, or why, has not been told.
    fn is_news(&self) -> bool {
        let has_ended = self.death.is_some() || self.stopped != Stopped::No;
        has_ended && !self.is_gone_told && self.told != Some(self.stop_by())
    }
}

/// The invocations of one unit that have not been told to their end.
#[derive(Debug, Default)]
struct Lived {
    newest: Life,
    earlier: Vec<Life>,
    /// What the latest signal about the main process said. The signal that says whose it was comes right after it.
    death: Option<Death>,
    /// The unit was not ours when it was read last, and what has been heard of it since is not either.
    is_foreign: bool,
}

impl Lived {
    /// Makes this invocation the newest one; whether it was not already.
    fn meet(&mut self, invocation: &str, start_job: Option<u32>) -> bool {
        if invocation.is_empty() || self.newest.invocation == invocation {
            return false;
        }
        let next = Life {
            invocation: invocation.to_owned(),
            start_job,
            ..Life::default()
        };
        let mut last = mem::replace(&mut self.newest, next);
        // A restart while it was starting takes over the job of the start.
        if start_job.is_some_and(|job| job != 0) && start_job == last.start_job {
            last.stop();
        }
        if last.is_news() {
            self.earlier.push(last);
        }
        true
    }
}

/// What the signals said of all worker units.
#[derive(Debug, Default)]
pub(super) struct Lives(BTreeMap<WorkflowName, Lived>);

impl Lives {
    /// A signal about a unit's main process: how it ended, if it did.
    pub(super) fn main_process(&mut self, workflow: &WorkflowName, death: Option<Death>) {
        self.0.entry(workflow.clone()).or_default().death = death;
    }

    /// A signal about a unit.
    pub(super) fn see(&mut self, workflow: &WorkflowName, glimpse: &Glimpse) {
        let lived = self.0.entry(workflow.clone()).or_default();
        let death = lived.death.take();
        let is_new = lived.meet(&glimpse.invocation, glimpse.start_job());
        if !is_new || glimpse.phase == Phase::Stopping {
            lived.newest.see(glimpse);
        }
        if !matches!(glimpse.phase, Phase::Starting | Phase::Active) && death.is_some() {
            lived.newest.death = death;
        }
    }

    /// An invocation that was read; `start_job` as [`Glimpse::start_job`].
    pub(super) fn meet(
        &mut self,
        workflow: &WorkflowName,
        invocation: &str,
        start_job: Option<u32>,
    ) {
        let lived = self.0.entry(workflow.clone()).or_default();
        lived.meet(invocation, start_job);
    }

    /// The newest invocation was read while a job stopped it.
    pub(super) fn stop(&mut self, workflow: &WorkflowName) {
        let lived = self.0.entry(workflow.clone()).or_default();
        lived.newest.stop();
    }

    /// Whether somebody has to be asked whose wish a stop of this unit was.
    pub(super) fn is_unclear(&self, workflow: &WorkflowName) -> bool {
        self.0.get(workflow).is_some_and(|lived| {
            let mut lives = lived.earlier.iter().chain([&lived.newest]);
            lives.any(|life| life.stopped == Stopped::Unclear)
        })
    }

    /// And the answer.
    pub(super) fn settle(&mut self, workflow: &WorkflowName, by: Stop) {
        if let Some(lived) = self.0.get_mut(workflow) {
            for life in lived.earlier.iter_mut().chain([&mut lived.newest]) {
                if life.stopped == Stopped::Unclear {
                    life.stopped = Stopped::By(by);
                }
            }
        }
    }

    /// All that there is something to tell of.
    pub(super) fn workflows(&self) -> impl Iterator<Item = &WorkflowName> {
        self.0.keys()
    }

    /// What is to be told of a unit that was read and that no signal has come about since; the newest comes last. The
    /// end of each invocation is told, and that a unit is gone is told with its reason once.
    pub(super) fn tell(&mut self, workflow: &WorkflowName, read: Unit) -> Vec<Unit> {
        let Some(lived) = self.0.get_mut(workflow) else {
            return vec![read];
        };
        let number = read.read;
        let is_foreign = read.state == UnitState::Foreign;
        if mem::replace(&mut lived.is_foreign, is_foreign) {
            // Who stopped that, and how it ended, says nothing of a worker.
            *lived = Lived {
                is_foreign,
                ..Lived::default()
            };
        }
        let mut told: Vec<_> = mem::take(&mut lived.earlier)
            .into_iter()
            .map(|life| Unit {
                state: UnitState::Starting,
                stop: life.stop_by(),
                invocation: life.invocation,
                death: life.death,
                detail: workflow.unit(),
                ..Unit::absent(number)
            })
            .collect();
        let life = &mut lived.newest;
        let is_loaded = !read.invocation.is_empty();
        let mut unit = read;
        unit.stop = life.stop_by();
        // Its end did not look good, but it is what somebody wanted: systemd did not give up.
        if unit.state == UnitState::Failed && unit.stop != Stop::Nobody {
            unit.state = UnitState::Absent;
        }
        if unit.state == UnitState::Absent {
            unit.invocation.clear();
            unit.death = unit.death.or_else(|| life.death.clone());
            if mem::replace(&mut life.is_gone_told, true) {
                unit = Unit::absent(number);
            }
        } else {
            // While it is stopping, what comes next decides whether it was a stop or a restart: to be told again then.
            let is_end = unit.death.is_some() && unit.state != UnitState::Stopping;
            life.told = is_end.then_some(unit.stop);
        }
        if unit.state == UnitState::Absent && !is_loaded {
            self.0.remove(workflow);
        }
        told.push(unit);
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::exit::Exit;
    use crate::model::worker::Cause;

    fn workflow() -> WorkflowName {
        "fix".parse().unwrap()
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a unit has it")]
    fn killed() -> Option<Death> {
        Some(Death::new(Cause::Signal, Some(Exit::Signal(9))))
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a unit has it")]
    fn exited() -> Option<Death> {
        Some(Death::new(Cause::ExitCode, Some(Exit::Code(0))))
    }

    /// What was seen of real units: ActiveState/SubState, job, invocation, how the main process ended.
    fn heard(signals: &[(&str, u32, &str, Option<Death>)]) -> Lives {
        let mut lives = Lives::default();
        for (state, job, invocation, death) in signals {
            let (active, sub) = state.split_once('/').unwrap();
            lives.main_process(&workflow(), death.clone());
            lives.see(
                &workflow(),
                &Glimpse {
                    phase: Phase::of(active, sub),
                    job: *job,
                    invocation: (*invocation).to_owned(),
                },
            );
        }
        lives
    }

    fn read(state: UnitState, invocation: &str) -> Unit {
        Unit {
            state,
            invocation: invocation.to_owned(),
            ..Unit::absent(0)
        }
    }

    /// State, invocation, stop and death of what is told.
    fn told(lives: &mut Lives, read: Unit) -> Vec<(UnitState, String, Stop, Option<Death>)> {
        let units = lives.tell(&workflow(), read).into_iter();
        units
            .map(|unit| (unit.state, unit.invocation, unit.stop, unit.death))
            .collect()
    }

    const UP: [(&str, u32, &str, Option<Death>); 4] = [
        ("inactive/dead", 9, "a", None),
        ("activating/start", 9, "a", None),
        ("active/running", 9, "a", None),
        ("active/running", 0, "a", None),
    ];

    fn after_up(signals: &[(&str, u32, &str, Option<Death>)]) -> Lives {
        heard(&[&UP, signals].concat())
    }

    #[test]
    fn a_stop_is_told_with_the_unit_that_is_gone_and_just_once() {
        let mut lives = after_up(&[
            ("active/running", 10, "a", None),
            ("deactivating/stop-sigterm", 10, "a", None),
            ("inactive/dead", 10, "a", exited()),
            ("inactive/dead", 0, "a", exited()),
        ]);
        assert!(lives.is_unclear(&workflow()));
        lives.settle(&workflow(), Stop::GoingDown);
        assert!(!lives.is_unclear(&workflow()));
        let gone = (UnitState::Absent, String::new(), Stop::GoingDown, exited());
        assert_eq!(told(&mut lives, Unit::absent(0)), [gone]);
        let bare = (UnitState::Absent, String::new(), Stop::Nobody, None);
        assert_eq!(told(&mut lives, Unit::absent(0)), [bare]);
    }

    #[test]
    fn who_ends_by_itself_was_stopped_by_nobody() {
        let mut lives = after_up(&[
            ("deactivating/stop-sigkill", 0, "a", exited()),
            ("inactive/dead", 0, "a", exited()),
        ]);
        let gone = (UnitState::Absent, String::new(), Stop::Nobody, exited());
        assert_eq!(told(&mut lives, Unit::absent(0)), [gone]);
    }

    #[test]
    fn a_restart_ends_the_old_invocation_while_the_unit_is_there() {
        let mut lives = after_up(&[
            ("deactivating/stop-sigterm", 10, "a", None),
            ("inactive/dead", 10, "a", exited()),
            ("inactive/dead", 10, "b", None),
            ("activating/start", 10, "b", None),
            ("active/running", 0, "b", None),
        ]);
        lives.settle(&workflow(), Stop::Operator);
        let old = (UnitState::Starting, "a".into(), Stop::Operator, exited());
        let new = (UnitState::Active, "b".into(), Stop::Nobody, None);
        let unit = read(UnitState::Active, "b");
        assert_eq!(told(&mut lives, unit.clone()), [old, new.clone()]);
        assert_eq!(told(&mut lives, unit), [new]);
    }

    #[test]
    fn a_crash_that_no_read_saw_is_told_too() {
        let old_systemd = [
            ("deactivating/stop-sigkill", 0, "a", killed()),
            ("failed/failed", 0, "a", killed()),
            ("activating/auto-restart", 0, "a", killed()),
            ("activating/auto-restart", 10, "a", killed()),
            ("inactive/dead", 10, "b", None),
            ("activating/start", 10, "b", None),
        ];
        let new_systemd = [
            ("failed/failed-before-auto-restart", 0, "a", killed()),
            ("activating/auto-restart", 0, "a", killed()),
            ("activating/auto-restart-queued", 10, "a", killed()),
            ("activating/auto-restart-queued", 10, "b", None),
            ("activating/start", 10, "b", None),
        ];
        for signals in [&old_systemd[..], &new_systemd[..]] {
            let mut lives = after_up(signals);
            let old = (UnitState::Starting, "a".into(), Stop::Nobody, killed());
            let new = (UnitState::Starting, "b".into(), Stop::Nobody, None);
            let unit = read(UnitState::Starting, "b");
            assert_eq!(told(&mut lives, unit), [old, new]);
        }
    }

    #[test]
    fn a_stop_is_told_although_the_death_before_it_was() {
        let mut lives = after_up(&[("activating/auto-restart", 0, "a", killed())]);
        let unit = Unit {
            death: killed(),
            ..read(UnitState::Starting, "a")
        };
        let dead = (UnitState::Starting, "a".into(), Stop::Nobody, killed());
        assert_eq!(told(&mut lives, unit), [dead]);
        let stopped = Glimpse {
            phase: Phase::Dead,
            job: 0,
            invocation: "a".into(),
        };
        lives.see(&workflow(), &stopped);
        let gone = (UnitState::Absent, String::new(), Stop::Operator, killed());
        assert_eq!(told(&mut lives, Unit::absent(0)), [gone]);
    }

    #[test]
    fn a_stop_between_two_starts_is_a_stop() {
        let mut lives = after_up(&[
            ("activating/auto-restart", 0, "a", killed()),
            ("activating/auto-restart", 10, "a", killed()),
            ("inactive/dead", 10, "a", killed()),
            ("inactive/dead", 0, "a", killed()),
        ]);
        let gone = (UnitState::Absent, String::new(), Stop::Operator, killed());
        assert_eq!(told(&mut lives, Unit::absent(0)), [gone]);
    }

    #[test]
    fn the_first_signal_of_a_new_invocation_is_none_of_a_restart() {
        let mut lives = after_up(&[
            ("activating/auto-restart-queued", 10, "b", None),
            ("inactive/dead", 0, "b", exited()),
        ]);
        let gone = (UnitState::Absent, String::new(), Stop::Nobody, exited());
        assert_eq!(told(&mut lives, Unit::absent(0)), [gone]);
    }

    #[test]
    fn a_start_that_fails_is_no_stop() {
        let lives = heard(&[
            ("inactive/dead", 9, "a", None),
            ("activating/start", 9, "a", None),
            ("deactivating/final-sigterm", 9, "a", None),
        ]);
        assert!(!lives.is_unclear(&workflow()));
    }

    #[test]
    fn a_stop_during_the_start_is_one() {
        let lives = heard(&[
            ("inactive/dead", 9, "a", None),
            ("activating/start", 9, "a", None),
            ("activating/start", 10, "a", None),
            ("deactivating/stop-sigterm", 10, "a", None),
        ]);
        assert!(lives.is_unclear(&workflow()));
    }

    #[test]
    fn a_restart_during_the_start_keeps_the_job() {
        let lives = heard(&[
            ("activating/start", 9, "a", None),
            ("deactivating/stop-sigterm", 9, "a", None),
            ("inactive/dead", 9, "a", killed()),
            ("inactive/dead", 9, "b", None),
        ]);
        assert!(lives.is_unclear(&workflow()));
    }

    #[test]
    fn who_comes_in_the_middle_of_a_crash_sees_no_stop() {
        for first in ["activating/auto-restart", "activating/auto-restart-queued"] {
            let lives = heard(&[
                (first, 10, "a", killed()),
                (first, 10, "b", None),
                ("activating/start", 10, "b", None),
                ("deactivating/final-sigterm", 10, "b", killed()),
            ]);
            assert!(!lives.is_unclear(&workflow()));
        }
    }

    #[test]
    fn who_comes_in_the_middle_of_a_stop_sees_it() {
        let lives = heard(&[("deactivating/stop-sigterm", 10, "a", None)]);
        assert!(lives.is_unclear(&workflow()));
        let mut lives = Lives::default();
        lives.meet(&workflow(), "a", Some(0));
        lives.stop(&workflow());
        assert!(lives.is_unclear(&workflow()));
    }

    #[test]
    fn a_stop_that_ends_badly_is_no_giving_up() {
        let mut lives = after_up(&[
            ("deactivating/stop-sigterm", 10, "a", None),
            ("failed/failed", 0, "a", killed()),
        ]);
        let failed = Unit {
            death: killed(),
            ..read(UnitState::Failed, "a")
        };
        let gone = (UnitState::Absent, String::new(), Stop::Operator, killed());
        assert_eq!(told(&mut lives, failed.clone()), [gone]);
        let bare = (UnitState::Absent, String::new(), Stop::Nobody, None);
        assert_eq!(told(&mut lives, failed), [bare]);
    }

    #[test]
    fn giving_up_is_told_as_often_as_it_is_read() {
        let mut lives = after_up(&[("failed/failed", 0, "a", killed())]);
        for _ in 0..2 {
            let failed = Unit {
                death: killed(),
                ..read(UnitState::Failed, "a")
            };
            let gave_up = (UnitState::Failed, "a".into(), Stop::Nobody, killed());
            assert_eq!(told(&mut lives, failed), [gave_up]);
        }
    }

    #[test]
    fn a_stop_of_what_is_not_ours_is_no_stop_of_a_worker() {
        let foreign = Unit {
            state: UnitState::Foreign,
            ..Unit::absent(0)
        };
        let mut lives = heard(&UP);
        told(&mut lives, foreign);
        for (state, job) in [("deactivating/stop-sigterm", 11), ("inactive/dead", 0)] {
            let (active, sub) = state.split_once('/').unwrap();
            lives.main_process(&workflow(), killed());
            let glimpse = Glimpse {
                phase: Phase::of(active, sub),
                job,
                invocation: "a".to_owned(),
            };
            lives.see(&workflow(), &glimpse);
        }
        assert!(lives.is_unclear(&workflow()));
        assert_eq!(
            told(&mut lives, Unit::absent(0)),
            [(UnitState::Absent, String::new(), Stop::Nobody, None)]
        );
        assert_eq!(lives.workflows().count(), 0);
    }
}
