//! A run, and the one table of legal transitions, [`Run::after`].
//!
//! A run is what its events add up to. The same events in the same order give the same run, live or replayed.

pub use super::event::{
    AbortRequest, Accepted, BootInstant, Caller, Imported, KillRequest, Place, RunEvent,
};
use super::limits;
use super::message::Position;
use super::name::{RunId, WorkflowName};
use super::status::{RunResult, Status};
use super::worker::Death;

/// The sha256 of a definition's bytes, as 64 hex digits.
pub type Digest = String;

/// A run as its events add up to. The prompt, the trigger and the messages' content stay in the events. What a run in
/// the queue has not is boxed: there may be a hundred thousand of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its id.
    pub id: RunId,
    /// Its workflow.
    pub workflow: WorkflowName,
    /// µs since the epoch.
    pub created_at: u64,
    /// Asked for by whoever started it, then fixed when it leaves the queue.
    pub max_rounds: Option<u32>,
    /// Whether it is a rehearsal.
    pub dry_run: bool,
    /// A kill in progress, or that ended it.
    pub kill: Option<Box<KillRequest>>,
    /// An abort in progress, or that ended it.
    pub abort: Option<Box<AbortRequest>>,
    state: State,
}

/// What varies with the status.
#[derive(Debug, Clone, PartialEq)]
enum State {
    Queued,
    Started(Box<Started>),
    Ended(Box<Ended>),
}

/// What is known of a run that ended.
#[derive(Debug, Clone, PartialEq)]
struct Ended {
    started: Option<Box<Started>>,
    at: u64,
    result: RunResult,
}

static AT_THE_START: Position = Position {
    rounds: 0,
    last: None,
    route: None,
};

/// What is known of a run since it left the queue.
#[derive(Debug, Clone, PartialEq)]
pub struct Started {
    /// µs since the epoch.
    pub at: u64,
    /// The same instant on a clock that never jumps.
    pub since: BootInstant,
    /// The definition it runs.
    pub definition: Digest,
    /// Where its thread stands.
    pub position: Position,
    /// The attempts of the next round that failed, if any did.
    pub failed: Option<Box<Failed>>,
    /// Where it is executed, once a worker has it.
    pub place: Option<Place>,
    /// In which boot of the machine it was dispatched.
    pub boot_id: String,
    /// How often it was dispatched.
    pub attempt: u32,
    /// The worker of the newest attempt died.
    pub is_lost: bool,
    /// How the worker died that was lost last.
    pub last_death: Option<Death>,
    /// How often a worker died under it since the newest round, and could be blamed.
    pub losses: u32,
}

impl Started {
    /// How many attempts of the next round failed.
    #[must_use]
    pub fn failed_attempts(&self) -> u32 {
        self.failed.as_ref().map_or(0, |failed| failed.attempts)
    }
}

/// What is known of the attempts of a round that failed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failed {
    /// How many.
    pub attempts: u32,
    at: u64,
    since: BootInstant,
    delay_us: u64,
}

impl Failed {
    /// How long the next attempt still waits, in µs. Within a boot the clock never jumped; across a reboot the wall
    /// clock is all there is.
    #[must_use]
    pub fn wait_us(&self, wall_us: u64, now: &BootInstant) -> u64 {
        let waited = if self.since.boot_id == now.boot_id {
            now.boot_us.saturating_sub(self.since.boot_us)
        } else {
            wall_us.saturating_sub(self.at)
        };
        self.delay_us.saturating_sub(waited)
    }
}

/// An event that a run in this status does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("run {run} is {status}: event {event} is illegal")]
pub struct Illegal {
    run: RunId,
    status: Status,
    event: &'static str,
}

impl Run {
    /// The run that its first event makes.
    #[must_use]
    pub fn accept(id: RunId, at: u64, accepted: &Accepted) -> Self {
        let workflow = accepted.workflow.clone();
        Self::queued(id, workflow, at, accepted.max_rounds, accepted.dry_run)
    }

    /// A run of which nothing is known but that it was accepted.
    #[must_use]
    pub fn queued(
        id: RunId,
        workflow: WorkflowName,
        created_at: u64,
        max_rounds: Option<u32>,
        dry_run: bool,
    ) -> Self {
        Self {
            id,
            workflow,
            created_at,
            max_rounds,
            dry_run,
            kill: None,
            abort: None,
            state: State::Queued,
        }
    }

    /// The run after one more event: the one table of legal transitions.
    ///
    /// # Errors
    /// [`Illegal`] when the run's status does not allow the event; it must then be stored nowhere.
    pub fn after(&self, event: &RunEvent, at: u64) -> Result<Self, Illegal> {
        let mut run = self.clone();
        match (&mut run.state, event) {
            (
                State::Queued,
                RunEvent::Started {
                    definition,
                    max_rounds,
                    since,
                },
            ) => {
                run.max_rounds = Some(*max_rounds);
                run.state = State::Started(Box::new(Started {
                    at,
                    since: since.clone(),
                    definition: definition.clone(),
                    position: Position::default(),
                    failed: None,
                    place: None,
                    boot_id: String::new(),
                    attempt: 0,
                    is_lost: false,
                    last_death: None,
                    losses: 0,
                }));
            }
            (
                State::Started(started),
                RunEvent::Dispatched {
                    place,
                    attempt,
                    boot_id,
                },
            ) if *attempt == started.attempt + 1 && self.kill.is_none() && self.abort.is_none() => {
                started.place = Some(place.clone());
                started.boot_id.clone_from(boot_id);
                started.attempt = *attempt;
                started.is_lost = false;
            }
            (State::Started(started), RunEvent::ThreadWorkflowMessage { round, message })
                if self.may_go_on(*round) =>
            {
                started.losses = 0;
                started.failed = None;
                started.position = started
                    .position
                    .after(message)
                    .ok_or_else(|| self.illegal(event))?;
            }
            (
                State::Started(started),
                RunEvent::AttemptFailed {
                    round,
                    attempt,
                    delay_us,
                    since,
                    ..
                },
            ) if self.may_go_on(*round)
                && *attempt == started.failed_attempts() + 1
                && *attempt <= limits::FAILED_ATTEMPTS =>
            {
                started.failed = Some(Box::new(Failed {
                    attempts: *attempt,
                    at,
                    since: since.clone(),
                    delay_us: *delay_us,
                }));
            }
            (State::Started(started), RunEvent::Routed { round, target })
                if self.may_go_on(*round) && started.position.route.is_none() =>
            {
                started.position.route = Some(target.clone());
            }
            (State::Started(started), RunEvent::WorkerLost { attempt, death, .. })
                if *attempt == started.attempt && started.place.is_some() && !started.is_lost =>
            {
                started.is_lost = true;
                started.losses += u32::from(!death.is_blameless());
                started.last_death = Some(death.clone());
            }
            (State::Queued | State::Started(_), RunEvent::KillRequested(request)) => {
                run.kill = Some(Box::new(KillRequest {
                    reason: request
                        .reason
                        .clone()
                        .or_else(|| self.kill.as_ref()?.reason.clone()),
                    ..request.clone()
                }));
            }
            (State::Queued | State::Started(_), RunEvent::AbortRequested(request))
                if self.kill.is_none() && self.abort.is_none() =>
            {
                run.abort = Some(Box::new(request.clone()));
            }
            (state @ (State::Queued | State::Started(_)), RunEvent::Ended { result, .. })
                if self.may_end_so(result) =>
            {
                let started = match state {
                    State::Started(started) => Some(started.clone()),
                    _ => None,
                };
                run.state = State::Ended(Box::new(Ended {
                    started,
                    at,
                    result: result.clone(),
                }));
            }
            _ => return Err(self.illegal(event)),
        }
        Ok(run)
    }

    /// Whether its worker may say something of this round: it is the next one, and nobody wants the run dead.
    fn may_go_on(&self, round: u32) -> bool {
        let is_next = |started: &Started| {
            round == started.position.rounds + 1 && started.place.is_some() && !started.is_lost
        };
        self.started().is_some_and(is_next) && self.kill.is_none()
    }

    /// 137 and 143 mean asked for, and what was asked for ends in nothing else, but that a kill overrides an abort; a
    /// run in the queue can otherwise only be dropped.
    fn may_end_so(&self, result: &RunResult) -> bool {
        match self.asked() {
            Some(asked) => *result == asked,
            None => {
                let dropped = result.end().0 == Status::Dropped;
                !matches!(result, RunResult::Killed | RunResult::Aborted)
                    && dropped == (self.status() == Status::Queued)
            }
        }
    }

    /// The end that somebody asked for, if anybody did.
    #[must_use]
    pub fn asked(&self) -> Option<RunResult> {
        match (&self.kill, &self.abort) {
            (Some(_), _) => Some(RunResult::Killed),
            (None, Some(_)) => Some(RunResult::Aborted),
            (None, None) => None,
        }
    }

    fn illegal(&self, event: &RunEvent) -> Illegal {
        Illegal {
            run: self.id,
            status: self.status(),
            event: event.name(),
        }
    }

    /// Where it stands.
    #[must_use]
    pub fn status(&self) -> Status {
        match &self.state {
            State::Queued => Status::Queued,
            State::Started(_) => Status::Started,
            State::Ended(ended) => ended.result.end().0,
        }
    }

    /// A kill was asked for and is not done.
    #[must_use]
    pub fn is_killing(&self) -> bool {
        self.kill.is_some() && !self.status().is_terminal()
    }

    /// An abort was asked for and is not done; a kill overrides it.
    #[must_use]
    pub fn is_aborting(&self) -> bool {
        self.asked() == Some(RunResult::Aborted) && !self.status().is_terminal()
    }

    /// What the person said who asked for its end.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match (&self.kill, &self.abort) {
            (Some(kill), _) => kill.reason.as_deref(),
            (None, Some(abort)) => abort.reason.as_deref(),
            (None, None) => None,
        }
    }

    /// Where its thread stands.
    #[must_use]
    pub fn position(&self) -> &Position {
        self.started()
            .map_or(&AT_THE_START, |started| &started.position)
    }

    /// What is known since it left the queue, if it did.
    #[must_use]
    pub fn started(&self) -> Option<&Started> {
        match &self.state {
            State::Queued => None,
            State::Started(started) => Some(started),
            State::Ended(ended) => ended.started.as_deref(),
        }
    }

    /// Why and when it ended (µs since the epoch), if it did.
    #[must_use]
    pub fn ended(&self) -> Option<(&RunResult, u64)> {
        match &self.state {
            State::Ended(ended) => Some((&ended.result, ended.at)),
            _ => None,
        }
    }

    /// The limit of rounds that holds for it.
    #[must_use]
    pub fn round_limit(&self) -> u32 {
        self.max_rounds.unwrap_or(limits::DEFAULT_MAX_ROUNDS)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::worker::Cause;
    use super::*;
    use crate::model::message::Message;

    fn any_event() -> impl Strategy<Value = RunEvent> {
        let place = |invocation: u8| Place {
            invocation: invocation.to_string(),
            cgroup: "/c".to_owned(),
        };
        let said = move |role| Message {
            role,
            content: String::new(),
            meta: serde_json::Map::new(),
            timestamp: 0,
        };
        let results = prop::sample::select(vec![
            RunResult::Success,
            RunResult::ExitCode(3),
            RunResult::Timeout,
            RunResult::Killed,
            RunResult::Aborted,
            RunResult::QueueFull,
            RunResult::WorkerDied,
        ]);
        prop_oneof![
            Just(RunEvent::Started {
                definition: "d".to_owned(),
                max_rounds: 9,
                since: BootInstant {
                    boot_id: "b".to_owned(),
                    boot_us: 0
                },
            }),
            (0..3_u8, 0..4_u32).prop_map(move |(invocation, attempt)| RunEvent::Dispatched {
                place: place(invocation),
                attempt,
                boot_id: "b".to_owned(),
            }),
            (0..4_u32, "[a-c]|__start__").prop_map(move |(round, role)| {
                RunEvent::ThreadWorkflowMessage {
                    round,
                    message: said(role),
                }
            }),
            (0..4_u32, 0..4_u32).prop_map(move |(round, attempt)| RunEvent::AttemptFailed {
                round,
                attempt,
                message: said("a".to_owned()),
                delay_us: 1,
                since: BootInstant {
                    boot_id: "b".to_owned(),
                    boot_us: 0
                },
            }),
            (0..4_u32, "a|[$]END").prop_map(|(round, target)| RunEvent::Routed {
                round,
                target: target.try_into().unwrap(),
            }),
            (0..4_u32).prop_map(|attempt| RunEvent::WorkerLost {
                invocation: "0".to_owned(),
                attempt,
                death: Death::of(Cause::Signal),
            }),
            (any::<bool>(), 0..9_u64).prop_map(|(reason, grace_us)| {
                RunEvent::KillRequested(KillRequest {
                    reason: reason.then(|| "r".to_owned()),
                    grace_us,
                    by: None,
                })
            }),
            Just(RunEvent::AbortRequested(AbortRequest {
                reason: None,
                by: Caller {
                    uid: 0,
                    pid: None,
                    comm: None,
                    unit: None,
                },
            })),
            results.prop_map(|result| RunEvent::Ended {
                result,
                detail: None
            }),
        ]
    }

    fn queued() -> Run {
        let accepted = Accepted {
            workflow: "w".parse().unwrap(),
            prompt: String::new(),
            max_rounds: None,
            dry_run: false,
            trigger: serde_json::Value::Null,
            key: None,
        };
        Run::accept(RunId::from_bits(1), 0, &accepted)
    }

    #[test]
    fn a_backoff_goes_on_over_a_restart_and_over_a_reboot() {
        let at = |boot_id: &str, boot_us| BootInstant {
            boot_id: boot_id.to_owned(),
            boot_us,
        };
        let failed = Failed {
            attempts: 1,
            at: 1_000,
            since: at("b", 50),
            delay_us: 30,
        };
        // Within the boot the wall clock may say what it likes.
        for (now, left) in [(50, 30), (60, 20), (80, 0), (900, 0)] {
            assert_eq!(failed.wait_us(7, &at("b", now)), left);
        }
        // Across a reboot nothing is waited for longer than it was meant to be.
        for (wall_us, left) in [(1_010, 20), (1_030, 0), (2_000, 0), (3, 30)] {
            assert_eq!(failed.wait_us(wall_us, &at("c", 1)), left);
        }
    }

    proptest! {
        #[test]
        fn in_any_order_of_events_what_must_hold_holds(events in prop::collection::vec(any_event(), 0..40)) {
            let mut run = queued();
            for event in events {
                let Ok(next) = run.after(&event, 1) else { continue };
                prop_assert!(!run.status().is_terminal(), "a run that ended changed by {event:?}");
                prop_assert!(next.position().rounds - run.position().rounds <= 1);
                prop_assert!(run.abort.is_none() || next.abort == run.abort);
                let failed = |run: &Run| run.started().map_or(0, Started::failed_attempts);
                if run.kill.is_some() {
                    prop_assert!(next.kill.is_some() && next.position() == run.position());
                    prop_assert_eq!(failed(&next), failed(&run));
                }
                if next.position().rounds > run.position().rounds {
                    prop_assert!(failed(&next) == 0 && next.position().route.is_none());
                } else {
                    prop_assert!(failed(&next) - failed(&run) <= 1);
                    prop_assert!(run.position().route.is_none() || next.position().route == run.position().route);
                }
                if let Some((result, _)) = next.ended() {
                    prop_assert_eq!(*result == RunResult::Killed, next.kill.is_some());
                    prop_assert_eq!(*result == RunResult::Aborted, next.kill.is_none() && next.abort.is_some());
                    let (status, _) = result.end();
                    prop_assert_eq!(status == Status::Dropped, next.started().is_none() && next.asked().is_none());
                }
                let stored: RunEvent = serde_json::from_str(&serde_json::to_string(&event).unwrap()).unwrap();
                prop_assert_eq!(stored, event);
                run = next;
            }
        }
    }
}
