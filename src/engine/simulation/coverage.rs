//! How often what happened: a campaign that never met a fault proves nothing about it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::super::{Action, Event, Input, Turn, UnitState};
use super::oracle::Phase;
use super::world::World;
use crate::model::run::RunEvent;
use crate::model::status::{RunResult, Status};

/// Each of what there is to meet is met so often in a campaign.
const ENOUGH: u64 = 100;

/// Statuses that a run can have in this version.
pub(super) const STATUSES: [Status; 9] = [
    Status::Queued,
    Status::Started,
    Status::Completed,
    Status::Failed,
    Status::Interrupted,
    Status::Killed,
    Status::Aborted,
    Status::Dropped,
    Status::Crashed,
];

/// Kinds of events of a run.
pub(super) const EVENTS: [&str; 10] = [
    "queued",
    "started",
    "dispatched",
    "thread-workflow-message",
    "attempt-failed",
    "routed",
    "worker-lost",
    "kill-requested",
    "abort-requested",
    "ended",
];

macro_rules! faults {
    ($($name:ident,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq)]
        pub(super) enum Fault {
            $($name,)*
        }

        impl Fault {
            pub(super) const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

faults! {
    CrashBeforeCommit,
    CrashAfterCommit,
    CrashAmidActions,
    CrashAfterTurn,
    CrashBetweenTurns,
    CrashInRecovery,
    DiskFull,
    SignalLost,
    SignalRepeated,
    SignalLate,
    BusLost,
    WorkerExits,
    WorkerExitsWithZero,
    WorkerDiesOfSignal,
    WorkerOutOfMemory,
    WorkerSticks,
    WorkerWakes,
    WatchdogKills,
    WorkerGoesStale,
    StaleWorkerSpeaks,
    LinkCut,
    WorkerLies,
    WorkerIgnoresOrders,
    RoleHangs,
    ProcessDiesSlowly,
    OperatorStops,
    OperatorRestarts,
    TargetStops,
    ForeignUnit,
    StartRefused,
    StartFailed,
    StartFailedLate,
    WallClockBack,
    WallClockForth,
    Suspend,
    Reboot,
}

#[derive(Debug)]
pub(super) struct Coverage {
    pub(super) inputs: u64,
    pub(super) pairs: [[u64; EVENTS.len()]; STATUSES.len()],
    /// How runs ended.
    pub(super) ends: BTreeMap<&'static str, u64>,
    pub(super) faults: [u64; Fault::ALL.len()],
    pub(super) failpoints: [u64; 30],
}

impl Default for Coverage {
    fn default() -> Self {
        Self {
            inputs: 0,
            pairs: [[0; EVENTS.len()]; STATUSES.len()],
            ends: BTreeMap::new(),
            faults: [0; Fault::ALL.len()],
            failpoints: [0; 30],
        }
    }
}

impl Coverage {
    pub(super) fn pair(&mut self, status: Status, event: &RunEvent) {
        let status = STATUSES.iter().position(|known| *known == status).unwrap();
        let event = EVENTS
            .iter()
            .position(|known| *known == event.name())
            .unwrap();
        self.pairs[status][event] += 1;
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        self.faults[fault as usize] += 1;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.inputs += other.inputs;
        let add = |to: &mut [u64], from: &[u64]| {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += from)
        };
        add(self.pairs.as_flattened_mut(), other.pairs.as_flattened());
        for (end, count) in &other.ends {
            *self.ends.entry(end).or_default() += count;
        }
        add(&mut self.faults, &other.faults);
        add(&mut self.failpoints, &other.failpoints);
    }

    /// For people, and what of it is too rare.
    pub(super) fn report(&self) -> (String, Vec<String>) {
        let (mut text, mut rare) = (String::new(), Vec::new());
        let mut line = |name: String, count: u64| {
            if count < ENOUGH {
                rare.push(format!("{name}: {count}"));
            }
            writeln!(text, "{count:>10}  {name}").unwrap();
        };
        for (status, counts) in STATUSES.iter().zip(&self.pairs) {
            EVENTS
                .iter()
                .zip(counts)
                .for_each(|(event, count)| line(format!("{status} × {event}"), *count));
        }
        Fault::ALL
            .iter()
            .zip(&self.faults)
            .for_each(|(fault, count)| line(format!("{fault:?}"), *count));
        (1..)
            .zip(&self.failpoints)
            .for_each(|(number, count)| line(format!("F{number:02}"), *count));
        (text, rare)
    }
}

/// Where in a turn nerved crashes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Moment {
    BeforeCommit,
    /// So many actions were performed.
    After(usize),
    BetweenTurns,
}

impl World {
    /// The failpoints of reference/reliability.md, as what is true when nerved crashes there.
    pub(super) fn note_failpoints(&mut self, moment: Moment, turn: &Turn) {
        let Some(nerved) = &self.nerved else { return };
        let done = if let Moment::After(done) = moment {
            done
        } else {
            0
        };
        let (is_before, is_after) = (
            moment == Moment::BeforeCommit,
            matches!(moment, Moment::After(_)),
        );
        let is_staged = |kind: fn(&RunEvent) -> bool| {
            turn.events
                .iter()
                .any(|staged| matches!(&staged.event, Event::Run(_, event) if kind(event)))
        };
        let (performed, waiting) = turn.actions.split_at(done);
        let did = |kind: fn(&Action) -> bool| performed.iter().any(kind);
        let waits = |kind: fn(&Action) -> bool| waiting.iter().any(kind);
        let comes = |kind: fn(&Input) -> bool| nerved.inbox.iter().chain(&nerved.bus).any(kind);
        let killing = || {
            self.oracle
                .runs
                .values()
                .filter(|run| run.killed && run.phase == Phase::Started)
        };
        let services = || self.machine.services.iter();
        let tell = |action: &Action| matches!(action, Action::Tell { .. });
        let ended = |event: &RunEvent| matches!(event, RunEvent::Ended { .. });
        let killed = |event: &RunEvent| {
            matches!(
                event,
                RunEvent::Ended {
                    result: RunResult::Killed,
                    ..
                }
            )
        };
        let queued = |event: &RunEvent| matches!(event, RunEvent::Queued(_));
        let answer = |action: &Action| matches!(action, Action::Answer { .. });
        let ack = |action: &Action| {
            matches!(
                action,
                Action::Tell {
                    order: super::super::Order::MessageAck { .. },
                    ..
                }
            )
        };
        let told_end = |action: &Action| {
            matches!(
                action,
                Action::Tell {
                    order: super::super::Order::EventAck { .. },
                    ..
                }
            )
        };
        let says = |event: &RunEvent| matches!(event, RunEvent::ThreadWorkflowMessage { .. });
        let kills = |event: &RunEvent| matches!(event, RunEvent::KillRequested(_));
        let met = [
            nerved
                .calls
                .iter()
                .any(|call| matches!(call, Input::Start { .. })),
            comes(|input| matches!(input, Input::Start { .. })),
            is_before && is_staged(queued),
            is_after && is_staged(queued) && waits(answer),
            is_after && is_staged(queued) && did(answer),
            is_before && is_staged(|event| matches!(event, RunEvent::Started { .. })),
            is_after && done == 0 && is_staged(|event| matches!(event, RunEvent::Started { .. })),
            comes(|input| matches!(input, Input::StartTaken { .. })),
            comes(
                |input| matches!(input, Input::Unit { unit, .. } if unit.state == UnitState::Active),
            ),
            services().any(|service| {
                service
                    .worker
                    .as_ref()
                    .is_some_and(|worker| worker.link.is_none())
            }),
            nerved.links.values().any(|link| !link.is_ready),
            is_after && waits(|action| matches!(action, Action::Dispatch { .. })),
            is_before && is_staged(says),
            is_after && is_staged(says) && waits(ack),
            is_after && is_staged(says) && did(ack),
            is_before && is_staged(ended),
            is_after && is_staged(ended) && done == 0,
            is_after && did(told_end),
            services().any(|service| service.invocation > 0 && service.worker.is_none()),
            is_before
                && services().any(|service| service.state == UnitState::Absent)
                && is_staged(ended),
            comes(|input| matches!(input, Input::Kill { .. })),
            is_after && is_staged(kills) && (waits(tell) || done == 0),
            killing().count() > 0
                && self
                    .machine
                    .cgroups
                    .values()
                    .any(|processes| !processes.is_empty()),
            is_before && is_staged(killed),
            is_after && is_staged(killed),
            // F26 to F28 are moments of a recovery, which knows them itself.
            false,
            false,
            false,
            moment == Moment::BetweenTurns && nerved.inbox.is_empty(),
            moment == Moment::BetweenTurns && !nerved.inbox.is_empty(),
        ];
        let met = met.iter().zip(&mut self.coverage.failpoints);
        met.filter(|(is_met, _)| **is_met)
            .for_each(|(_, count)| *count += 1);
    }
}
