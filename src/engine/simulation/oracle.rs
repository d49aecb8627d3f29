//! What must be true after each step, said again, from outside: it shares no code with the engine, reads DESIGN.md's
//! table its own way, and knows what really happened.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::super::{
    Action, Event, Input, Known, LinkId, Order, ReadId, Stop, Turn, Unit, UnitState,
};
use super::clients::caller;
use super::definitions::{Kind, Next, Thread, WORKFLOWS, index, name, spoken};
use super::machine::{Machine, SECOND, number, place};
use super::random::Random;
use super::world::Step;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{AbortRequest, Accepted, BootInstant, KillRequest, RunEvent};
use crate::model::status::{RunResult, Status};
use crate::model::worker::{Cause, Death, ManagerEvent, WorkerEvent};
use crate::model::workflow::{Definition, Target};

/// Between a time-out and nerved's own end of the run.
pub(super) const SLACK_US: u64 = 5 * SECOND;
/// A worker is ready in this time.
pub(super) const READY_US: u64 = 5 * SECOND;
/// A stop of nerve as a whole takes no longer.
const GOING_DOWN_US: u64 = 120 * SECOND;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Phase {
    Queued,
    Started,
    Ended,
}

/// A run, as its committed events add up to by our own reckoning.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) workflow: usize,
    pub(super) phase: Phase,
    pub(super) order: usize,
    pub(super) key: Option<String>,
    pub(super) asked_rounds: Option<u32>,
    pub(super) killed: bool,
    /// How many rounds were done when an abort was accepted.
    pub(super) aborted: Option<u32>,
    pub(super) definition: Option<Arc<Definition>>,
    pub(super) max_rounds: u32,
    pub(super) since: Option<BootInstant>,
    pub(super) invocation: u64,
    pub(super) attempt: u32,
    pub(super) is_lost: bool,
    /// Deaths under it that it can be blamed for, since its newest message.
    pub(super) blame: u32,
    pub(super) last_death: Option<Death>,
    pub(super) thread: Thread,
    /// The pause before the next attempt of the next round.
    pub(super) backoff: Option<Backoff>,
    /// Its workflow was blocked under it.
    pub(super) is_doomed: bool,
    /// What the worker exited with then.
    pub(super) doom: Option<i32>,
    /// Somebody had that forgotten.
    pub(super) is_pardoned: bool,
    /// What its worker says it ended in; not all of it may be true.
    pub(super) reported: Vec<RunResult>,
    pub(super) result: Option<RunResult>,
}

/// A pause between two attempts.
#[derive(Debug)]
pub(super) struct Backoff {
    since: BootInstant,
    wall_us: u64,
    delay_us: u64,
    /// When the attempt really failed, in µs of that boot.
    failed_us: u64,
}

impl Backoff {
    pub(super) fn left(&self, machine: &Machine) -> u64 {
        let waited = if self.since.boot_id == machine.boot_id() {
            machine.now.boot_us - self.since.boot_us
        } else {
            machine.now.wall_us.saturating_sub(self.wall_us)
        };
        self.delay_us.saturating_sub(waited)
    }
}

/// A workflow, by our own reckoning.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Debug, Default)]
pub(super) struct Desk {
    pub(super) queue: BTreeMap<usize, RunId>,
    pub(super) started: BTreeSet<RunId>,
    /// What nerved was told last of its unit; nothing since it started or lost the bus.
    pub(super) told: Option<Unit>,
    /// What the worker was started with that said `ready` last.
    pub(super) connected: Option<String>,
    /// The newest invocation that nerved knows.
    pub(super) newest: u64,
    /// The newest invocation whose unit nerved killed.
    pub(super) killed: u64,
    /// Likewise, because it had not ended a run.
    pub(super) forced: u64,
    /// Answers of systemd older than this are late.
    pub(super) read: ReadId,
    /// When nerved first heard of the newest invocation, in µs of this boot.
    pub(super) first_seen: BTreeMap<u64, u64>,
    /// The worker that nerved welcomed last.
    pub(super) accepted: Option<(LinkId, u64)>,
    pub(super) deaths: Vec<(u64, BootInstant)>,
    /// What the worker that died last exited with.
    pub(super) last_code: Option<i32>,
    /// In this step.
    pub(super) has_died: bool,
    pub(super) is_blocked: bool,
    pub(super) is_stopped: bool,
    pub(super) draining: Option<u64>,
    /// Drains with a time-out.
    pub(super) drains: Vec<(u64, BootInstant)>,
    /// Drains that are done.
    pub(super) drained: Vec<u64>,
    pub(super) is_refused: bool,
}

#[derive(Debug, Default)]
pub(super) struct Oracle {
    pub(super) runs: BTreeMap<RunId, Ledger>,
    pub(super) desks: [Desk; WORKFLOWS],
    pub(super) definitions: BTreeMap<WorkflowName, Known>,
    pub(super) max_active: Option<u32>,
    pub(super) keys: HashMap<(usize, String), RunId>,
    pub(super) is_paused: bool,
    /// nerved was told of all units since it started.
    pub(super) is_listed: bool,
    /// Until then nothing is started, in µs of this boot.
    pub(super) down_until: u64,
    pub(super) links: HashMap<LinkId, (usize, u64)>,
    /// Runs that were sent over a connection and are not taken back.
    pub(super) sent: HashSet<(LinkId, RunId)>,
}

impl Ledger {
    fn new(accepted: &Accepted, order: usize) -> Self {
        Self {
            workflow: index(&accepted.workflow),
            phase: Phase::Queued,
            order,
            key: accepted.key.clone(),
            asked_rounds: accepted.max_rounds,
            killed: false,
            aborted: None,
            definition: None,
            max_rounds: 0,
            since: None,
            invocation: 0,
            attempt: 0,
            is_lost: false,
            blame: 0,
            last_death: None,
            is_doomed: false,
            doom: None,
            is_pardoned: false,
            thread: Thread::default(),
            backoff: None,
            reported: Vec::new(),
            result: None,
        }
    }

    /// A worker that lives, for all we were told, has it.
    pub(super) fn is_placed(&self) -> bool {
        self.phase == Phase::Started && self.invocation != 0 && !self.is_lost
    }

    /// nerved ends it, because its time-out has passed.
    pub(super) fn is_late(&self, machine: &Machine) -> bool {
        let timeout = self
            .definition
            .as_ref()
            .and_then(|definition| definition.workflow.timeout);
        timeout
            .zip(self.since.as_ref())
            .is_some_and(|(timeout, since)| {
                let passed = u64::try_from(timeout.as_micros()).unwrap() + SLACK_US;
                since.boot_id != machine.boot_id() || machine.now.boot_us >= since.boot_us + passed
            })
    }

    /// Whether some event of this kind is legal in this status.
    pub(super) fn could_allow(&self, event: &RunEvent) -> bool {
        match event {
            RunEvent::Queued(_) | RunEvent::Imported(_) => false,
            RunEvent::Started { .. } => self.phase == Phase::Queued,
            RunEvent::Dispatched { .. }
            | RunEvent::ThreadWorkflowMessage { .. }
            | RunEvent::AttemptFailed { .. }
            | RunEvent::Routed { .. }
            | RunEvent::WorkerLost { .. } => self.phase == Phase::Started,
            RunEvent::KillRequested(_) | RunEvent::AbortRequested(_) | RunEvent::Ended { .. } => {
                self.phase != Phase::Ended
            }
        }
    }

    /// The table of legal transitions.
    pub(super) fn allows(&self, event: &RunEvent) -> bool {
        let is_asked = self.killed || self.aborted.is_some();
        self.could_allow(event)
            && match event {
                RunEvent::Dispatched { attempt, .. } => *attempt == self.attempt + 1 && !is_asked,
                RunEvent::ThreadWorkflowMessage { round, .. } => {
                    *round == self.thread.rounds + 1 && self.is_placed() && !self.killed
                }
                RunEvent::AttemptFailed { round, attempt, .. } => {
                    (*round, *attempt) == (self.thread.rounds + 1, self.thread.failed + 1)
                        && self.is_placed()
                        && !self.killed
                }
                RunEvent::Routed { round, .. } => {
                    *round == self.thread.rounds + 1
                        && self.thread.route.is_none()
                        && self.is_placed()
                        && !self.killed
                }
                RunEvent::WorkerLost { attempt, .. } => {
                    *attempt == self.attempt && self.is_placed()
                }
                RunEvent::AbortRequested(_) => !is_asked,
                RunEvent::Ended { result, .. } if self.killed => *result == RunResult::Killed,
                RunEvent::Ended { result, .. } if is_asked => *result == RunResult::Aborted,
                RunEvent::Ended { result, .. } => match row(result).0 {
                    Status::Killed | Status::Aborted => false,
                    Status::Dropped => self.phase == Phase::Queued,
                    _ => self.phase == Phase::Started,
                },
                _ => true,
            }
    }

    /// Some event that could be of this run, or nearly so.
    pub(super) fn any_event(&self, id: RunId, random: &mut Random) -> RunEvent {
        let near =
            |number: u32, random: &mut Random| (number + random.pick(&[0, 1, 1, 2])).max(1) - 1;
        let results = [
            RunResult::Success,
            RunResult::Killed,
            RunResult::Aborted,
            RunResult::QueueFull,
            RunResult::Drained,
            RunResult::WorkerDied,
        ];
        match random.below(10) {
            0 => RunEvent::Queued(Accepted {
                workflow: name(self.workflow),
                prompt: String::new(),
                max_rounds: None,
                dry_run: false,
                trigger: serde_json::Value::Null,
                key: None,
            }),
            1 => RunEvent::Started {
                definition: "digest".to_owned(),
                max_rounds: 1,
                since: BootInstant {
                    boot_id: String::new(),
                    boot_us: 0,
                },
            },
            2 => RunEvent::Dispatched {
                place: place(self.workflow, 1),
                attempt: near(self.attempt + 1, random),
                boot_id: String::new(),
            },
            3 => RunEvent::ThreadWorkflowMessage {
                round: near(self.thread.rounds + 1, random),
                message: super::worker::message("a", "ok", "", 0),
            },
            8 => RunEvent::AttemptFailed {
                round: near(self.thread.rounds + 1, random),
                attempt: near(self.thread.failed + 1, random),
                message: super::worker::message("a", "error", "exit-code:3", 0),
                delay_us: 0,
                since: BootInstant {
                    boot_id: String::new(),
                    boot_us: 0,
                },
            },
            9 => RunEvent::Routed {
                round: near(self.thread.rounds + 1, random),
                target: Target::End,
            },
            4 => RunEvent::WorkerLost {
                invocation: id.to_string(),
                attempt: near(self.attempt, random),
                death: Death::of(Cause::Signal),
            },
            5 => RunEvent::KillRequested(KillRequest {
                reason: None,
                grace_us: 0,
                by: None,
            }),
            6 => RunEvent::AbortRequested(AbortRequest {
                reason: None,
                by: caller(),
            }),
            _ => RunEvent::Ended {
                result: random.pick(&results),
                detail: None,
            },
        }
    }
}

/// DESIGN.md, section 3.
pub(super) fn row(result: &RunResult) -> (Status, u8) {
    let text = result.to_string();
    match text.split(':').next().unwrap() {
        "success" => (Status::Completed, 0),
        "exit-code" | "signal" | "exec-failed" | "role-timeout" | "oom-kill"
        | "reply-too-large" | "template-error" | "no-route" | "bad-route" => (Status::Failed, 1),
        "max-rounds" => (Status::Failed, 2),
        "timeout" => (Status::Failed, 124),
        "drained" => (Status::Interrupted, 130),
        "killed" => (Status::Killed, 137),
        "aborted" => (Status::Aborted, 143),
        "queue-full" | "blocked" | "removed" => (Status::Dropped, 75),
        "worker-died" | "worker-exit" | "start-limit-hit" | "unit-refused" | "thread-damaged" => {
            (Status::Crashed, 255)
        }
        _ => panic!("I3: {text:?} is no result"),
    }
}

pub(super) fn is_blameless(death: &Death) -> bool {
    [Cause::Stopped, Cause::Reboot, Cause::Unseen].contains(&death.cause)
}

impl Desk {
    /// Whether nothing may leave the queue, for all that is surely known.
    pub(super) fn is_closed(&self) -> bool {
        let is_up = self.told.as_ref().is_some_and(|told| {
            told.state == UnitState::Active && number(&told.invocation) == self.newest
        });
        let is_draining = self.draining == Some(self.newest) && (is_up || self.accepted.is_some());
        self.is_blocked || self.is_stopped || is_draining
    }

    /// The invocation that nerved was told is up with settings other than these.
    pub(super) fn is_outdated(&self, definition: &Definition) -> Option<bool> {
        let is_accepted = |told: &&Unit| {
            self.accepted
                .is_some_and(|(_, accepted)| accepted == number(&told.invocation))
        };
        let told = self
            .told
            .as_ref()
            .filter(|told| told.state == UnitState::Active || is_accepted(told))?;
        let is_outdated = *told.settings.as_ref()? != definition.workflow.worker.digest();
        Some(is_outdated && number(&told.invocation) == self.newest)
    }
}

impl Oracle {
    /// nerved starts: what it was only told is forgotten.
    pub(super) fn restart(
        &mut self,
        definitions: &BTreeMap<WorkflowName, Known>,
        max_active: Option<u32>,
    ) {
        self.definitions.clone_from(definitions);
        self.max_active = max_active;
        (self.down_until, self.is_listed) = (0, false);
        self.links.clear();
        self.sent.clear();
        for desk in &mut self.desks {
            (desk.told, desk.accepted, desk.is_refused) = (None, None, false);
            (desk.read, desk.newest) = (0, 0);
            desk.first_seen.clear();
        }
        self.runs.values_mut().for_each(|run| run.reported.clear());
    }

    pub(super) fn is_own(&self, id: RunId) -> bool {
        self.runs[&id].thread.is_own
    }

    /// A worker begins to execute an attempt of a round, after so many that failed.
    pub(super) fn executes(
        &self,
        id: RunId,
        (round, failed): (u32, u32),
        invocation: u64,
        machine: &Machine,
    ) {
        let run = &self.runs[&id];
        let is_due = run.backoff.as_ref().is_none_or(|backoff| {
            backoff.since.boot_id != machine.boot_id()
                || machine.now.boot_us >= backoff.failed_us + backoff.delay_us
        });
        assert!(
            failed == run.thread.failed && is_due,
            "{failed} attempts of {id:?} failed, and the next one comes too early: {run:?}"
        );
        assert!(
            run.phase != Phase::Ended || machine.may_be_late(id, invocation),
            "I4: a role of {id:?} is executed after its end"
        );
        assert!(
            round > run.thread.rounds,
            "I6: round {round} of {id:?} is executed again"
        );
        assert!(
            !machine.is_left_by_another(id, invocation),
            "I6: {id:?} is executed twice at a time"
        );
        let is_late = run.aborted.is_some_and(|done| round > done + 1);
        assert!(
            !is_late,
            "I7: round {round} of {id:?} is executed after its abort"
        );
    }

    /// A turn was committed.
    pub(super) fn turn(&mut self, steps: &[Step], turn: &Turn, machine: &Machine) {
        for step in steps {
            self.desks.iter_mut().for_each(|desk| desk.has_died = false);
            if let Some(input) = &step.input {
                self.learn(input, machine);
            }
            let before = match &step.input {
                Some(Input::Kill { run, .. } | Input::Abort { run, .. }) => {
                    let asked = |run: &Ledger| (run.phase, run.killed || run.aborted.is_some());
                    self.runs.get(run).map(asked)
                }
                _ => None,
            };
            // Actions come after events, but to whom a run is handed has been welcomed before.
            for action in &turn.actions[step.actions.clone()] {
                if let Action::Tell {
                    link,
                    order: Order::Welcome,
                } = action
                {
                    self.welcome(*link);
                }
            }
            let (mut started, mut ended) = (Vec::new(), Vec::new());
            for staged in &turn.events[step.events.clone()] {
                match &staged.event {
                    Event::Run(id, event) => {
                        self.run_event(*id, event, step.input.as_ref(), machine);
                        if matches!(event, RunEvent::Started { .. }) {
                            started.push(*id);
                        }
                        if let RunEvent::Ended { result, .. } = event {
                            assert_eq!(
                                turn_status(turn, *id),
                                row(result).0,
                                "I3: status of {id:?}"
                            );
                            assert_eq!(result.end(), row(result), "I3: {result}");
                            ended.push((*id, result.clone()));
                        }
                    }
                    Event::Worker(name, event) => self.worker_event(index(name), event, machine),
                    Event::Manager(ManagerEvent::Paused { .. }) => {
                        assert!(
                            matches!(step.input, Some(Input::Pause { .. })),
                            "a pause nobody wants"
                        );
                        self.is_paused = true;
                    }
                    Event::Manager(ManagerEvent::Resumed { .. }) => {
                        assert!(
                            matches!(step.input, Some(Input::Resume { .. })),
                            "an end of the pause nobody wants"
                        );
                        self.is_paused = false;
                    }
                }
            }
            self.check_queues(step.input.as_ref(), &started);
            let mut answers = BTreeMap::new();
            for action in &turn.actions[step.actions.clone()] {
                if let Action::Answer { ticket, answer } = action {
                    assert!(
                        answers.insert(*ticket, answer).is_none(),
                        "two answers to one call"
                    );
                } else {
                    self.action(action, machine);
                }
            }
            self.check_answers(step.input.as_ref(), before, &answers, &ended);
        }
    }

    /// What nerved knows from now on.
    pub(super) fn learn(&mut self, input: &Input, machine: &Machine) {
        match input {
            Input::Unit { workflow, unit } => self.tell(index(workflow), unit, machine),
            Input::Units { units, read } => {
                self.is_listed = true;
                for workflow in 0..WORKFLOWS {
                    let unit = units.get(&name(workflow));
                    self.tell(workflow, unit.unwrap_or(&Unit::absent(*read)), machine);
                }
            }
            Input::StartTaken { workflow, read } => {
                let newest = &mut self.desks[index(workflow)].read;
                *newest = (*newest).max(*read);
            }
            Input::BusLost => self.desks.iter_mut().for_each(|desk| desk.told = None),
            Input::Ready {
                link,
                workflow,
                place,
                read,
                settings,
                ..
            } => {
                self.desks[index(workflow)].connected.clone_from(settings);
                let (workflow, invocation) = (index(workflow), number(&place.invocation));
                self.links.insert(*link, (workflow, invocation));
                if invocation >= self.desks[workflow].newest {
                    let newest = &mut self.desks[workflow].read;
                    *newest = (*newest).max(*read);
                }
                let seen = &mut self.desks[workflow].first_seen;
                seen.entry(invocation).or_insert(machine.now.boot_us);
            }
            Input::LinkLost { link } => self.lose(*link),
            Input::Deadline if self.down_until <= machine.now.boot_us => self.down_until = 0,
            Input::StartRefused { workflow, .. } => self.desks[index(workflow)].is_refused = true,
            Input::Definitions {
                workflows,
                max_active,
            } => {
                (self.definitions, self.max_active) = (workflows.clone(), *max_active);
            }
            Input::Ended {
                link, run, result, ..
            } => {
                if let Some((workflow, invocation)) = self.links.get(link)
                    && self.desks[*workflow].accepted == Some((*link, *invocation))
                    && let Some(run) = self.runs.get_mut(run)
                    && run.invocation == *invocation
                {
                    run.reported.push(result.clone());
                }
            }
            _ => {}
        }
    }

    pub(super) fn tell(&mut self, workflow: usize, unit: &Unit, machine: &Machine) {
        let desk = &mut self.desks[workflow];
        // A late answer still says what nobody else has said of the invocation that is there.
        let is_news = number(&unit.invocation) == desk.newest
            && desk.told.as_ref().is_none_or(|told| told.read < unit.read);
        if unit.read < desk.read && !is_news {
            return;
        }
        if unit.stop == Stop::GoingDown {
            self.down_until = machine.now.boot_us + GOING_DOWN_US;
        }
        desk.read = desk.read.max(unit.read);
        desk.newest = desk.newest.max(number(&unit.invocation));
        let is_gone = matches!(
            unit.state,
            UnitState::Absent | UnitState::Failed | UnitState::Foreign
        ) || unit.state == UnitState::Starting && unit.death.is_some();
        desk.accepted = desk
            .accepted
            .filter(|(_, accepted)| !is_gone && *accepted >= number(&unit.invocation));
        if unit.death.is_none() && unit.state != UnitState::Absent {
            desk.first_seen
                .entry(number(&unit.invocation))
                .or_insert(machine.now.boot_us);
        }
        desk.told = Some(unit.clone());
    }

    pub(super) fn lose(&mut self, link: LinkId) {
        if let Some((workflow, invocation)) = self.links.remove(&link)
            && self.desks[workflow].accepted == Some((link, invocation))
        {
            self.desks[workflow].accepted = None;
        }
        self.sent.retain(|(sent, _)| *sent != link);
    }

    pub(super) fn welcome(&mut self, link: LinkId) {
        let (workflow, invocation) = *self.links.get(&link).expect("a stranger is welcomed");
        let is_stale = self.is_stale(workflow, invocation);
        assert!(!is_stale, "I5: the stale worker {invocation} is welcomed");
        let desk = &mut self.desks[workflow];
        (desk.accepted, desk.newest) = (Some((link, invocation)), invocation);
    }

    /// nerved knows that this invocation has no business any more.
    pub(super) fn is_stale(&self, workflow: usize, invocation: u64) -> bool {
        let desk = &self.desks[workflow];
        self.is_superseded(workflow, invocation)
            || desk
                .told
                .as_ref()
                .is_some_and(|told| told.death.is_some() && number(&told.invocation) == invocation)
    }

    /// Likewise, and what it said last does not count either.
    pub(super) fn is_superseded(&self, workflow: usize, invocation: u64) -> bool {
        let desk = &self.desks[workflow];
        desk.newest > invocation || desk.deaths.iter().any(|(died, _)| *died == invocation)
    }

    pub(super) fn definition(&self, workflow: usize) -> Option<&Arc<Definition>> {
        self.definitions.get(&name(workflow))?.definition.as_ref()
    }

    pub(super) fn active(&self) -> usize {
        self.desks.iter().map(|desk| desk.started.len()).sum()
    }

    pub(super) fn has_free_slot(&self, workflow: usize, definition: &Definition) -> bool {
        self.desks[workflow].started.len() < definition.workflow.concurrency as usize
            && self
                .max_active
                .is_none_or(|most| self.active() < most as usize)
    }

    pub(super) fn run_event(
        &mut self,
        id: RunId,
        event: &RunEvent,
        input: Option<&Input>,
        machine: &Machine,
    ) {
        if let RunEvent::Queued(accepted) = event {
            return self.queued(id, accepted, input);
        }
        let run = self
            .runs
            .get(&id)
            .unwrap_or_else(|| panic!("{id:?} was never accepted"));
        assert!(run.allows(event), "I2: {event:?} is illegal for {run:?}");
        let workflow = run.workflow;
        match event {
            RunEvent::Started {
                definition,
                max_rounds,
                since,
            } => {
                let current = self.check_start(id, definition, since, machine);
                let desk = &mut self.desks[workflow];
                desk.queue.remove(&self.runs[&id].order);
                desk.started.insert(id);
                let run = self.runs.get_mut(&id).unwrap();
                run.max_rounds = run
                    .asked_rounds
                    .or(current.workflow.max_rounds)
                    .unwrap_or(50);
                assert_eq!(run.max_rounds, *max_rounds, "the limit of rounds of {id:?}");
                run.thread.kind = Kind::of(&current);
                run.thread.is_own = !current.workflow.worker.exec.is_empty();
                (run.phase, run.since, run.definition) =
                    (Phase::Started, Some(since.clone()), Some(current));
            }
            RunEvent::Dispatched { place, boot_id, .. } => {
                assert_eq!(*boot_id, machine.boot_id());
                self.check_dispatch(id, place, machine);
                let run = self.runs.get_mut(&id).unwrap();
                (run.invocation, run.is_lost) = (number(&place.invocation), false);
                run.attempt += 1;
                run.reported.clear();
            }
            RunEvent::ThreadWorkflowMessage { round, message } => {
                let Some(Input::Message {
                    link,
                    run: of,
                    round: said,
                    message: words,
                }) = input
                else {
                    panic!("I6: a message of {id:?} that nobody said")
                };
                assert!(
                    (*of, said, words) == (id, round, message),
                    "I6: {id:?} did not say {message:?}"
                );
                self.check_speaker(id, *link, &message.role);
                let run = self.runs.get_mut(&id).unwrap();
                run.thread.push(message.clone());
                (run.blame, run.backoff) = (0, None);
            }
            RunEvent::AttemptFailed {
                round,
                attempt,
                message,
                delay_us,
                since,
            } => {
                let Some(Input::Attempt { link, run: of, .. }) = input else {
                    panic!("an attempt of {id:?} that nobody made")
                };
                let said = Input::Attempt {
                    link: *link,
                    run: id,
                    round: *round,
                    attempt: *attempt,
                    message: message.clone(),
                    delay_us: *delay_us,
                };
                let is_said = input.map(|input| format!("{input:?}")) == Some(format!("{said:?}"));
                assert!(*of == id && is_said, "{id:?} did not fail so: {event:?}");
                assert_eq!(*since, machine.instant());
                self.check_speaker(id, *link, &message.role);
                let run = self.runs.get_mut(&id).unwrap();
                run.thread.failed += 1;
                run.backoff = Some(Backoff {
                    since: since.clone(),
                    wall_us: machine.now.wall_us,
                    delay_us: *delay_us,
                    failed_us: message.timestamp,
                });
            }
            RunEvent::Routed { round, target } => {
                let Some(Input::Routed {
                    link,
                    run: of,
                    round: said,
                    target: answer,
                }) = input
                else {
                    panic!("a route of {id:?} that nobody said")
                };
                assert!((*of, said, answer) == (id, round, target), "not so routed");
                self.check_peer(id, *link);
                assert_eq!(run.thread.next(run.max_rounds), Next::Ask);
                self.runs.get_mut(&id).unwrap().thread.route = Some(target.clone());
            }
            RunEvent::WorkerLost {
                invocation, death, ..
            } => {
                assert_eq!(
                    number(invocation),
                    run.invocation,
                    "{id:?} was lost by another worker"
                );
                // A worker may have killed a run for an earlier nerved that did not live to say why.
                let is_given_up =
                    death.cause == Cause::Unseen && run.reported.contains(&RunResult::Killed);
                if !is_given_up {
                    self.check_death(workflow, run.invocation, death, machine);
                }
                let run = self.runs.get_mut(&id).unwrap();
                run.is_lost = true;
                run.blame += u32::from(!is_blameless(death));
                run.last_death = Some(death.clone());
            }
            RunEvent::KillRequested(_) => {
                assert!(
                    matches!(input, Some(Input::Kill { run, .. }) if *run == id),
                    "I7: a kill nobody wants"
                );
                self.runs.get_mut(&id).unwrap().killed = true;
            }
            RunEvent::AbortRequested(_) => {
                assert!(
                    matches!(input, Some(Input::Abort { run, .. }) if *run == id),
                    "I7: an abort nobody wants"
                );
                let run = self.runs.get_mut(&id).unwrap();
                run.aborted = Some(run.thread.rounds);
            }
            RunEvent::Ended { result, .. } => {
                assert!(
                    machine.is_settled(id),
                    "I4: {id:?} ends {result} with a process left"
                );
                if row(result).0 == Status::Dropped {
                    self.check_drop(id, result, input);
                } else {
                    self.check_end(id, result, machine);
                }
                let run = self.runs.get_mut(&id).unwrap();
                (run.phase, run.result) = (Phase::Ended, Some(result.clone()));
                let desk = &mut self.desks[workflow];
                desk.queue.remove(&run.order);
                desk.started.remove(&id);
            }
            RunEvent::Queued(_) | RunEvent::Imported(_) => {}
        }
    }

    /// Only who has the run may speak of it.
    fn check_peer(&self, id: RunId, link: LinkId) {
        let run = &self.runs[&id];
        let accepted = self.desks[run.workflow].accepted;
        assert_eq!(
            accepted,
            Some((link, run.invocation)),
            "I5: a stale worker's message"
        );
        assert!(
            !self.is_superseded(run.workflow, run.invocation),
            "I5: a stale worker's message"
        );
    }

    fn check_speaker(&self, id: RunId, link: LinkId, role: &str) {
        self.check_peer(id, link);
        let run = &self.runs[&id];
        let is_role = match run.thread.next(run.max_rounds) {
            Next::Any => run.thread.rounds < run.max_rounds,
            next => next == Next::Role(spoken(role)),
        };
        assert!(is_role, "{id:?} is not {role}'s to speak in");
    }

    pub(super) fn queued(&mut self, id: RunId, accepted: &Accepted, input: Option<&Input>) {
        assert!(
            matches!(input, Some(Input::Start { run, .. }) if *run == id),
            "I1: a run that nobody wants"
        );
        let order = self.runs.len();
        let run = Ledger::new(accepted, order);
        assert!(
            self.definition(run.workflow).is_some(),
            "a run of what is not defined"
        );
        if let Some(key) = &run.key {
            let other = self.keys.insert((run.workflow, key.clone()), id);
            assert!(other.is_none(), "I1: two runs have the key {key}");
        }
        self.desks[run.workflow].queue.insert(order, id);
        assert!(
            self.runs.insert(id, run).is_none(),
            "I2: {id:?} is accepted twice"
        );
    }

    pub(super) fn worker_event(&mut self, workflow: usize, event: &WorkerEvent, machine: &Machine) {
        let definition = self.definition(workflow).cloned();
        match event {
            WorkerEvent::WorkerDied {
                invocation,
                death,
                since,
            } => {
                let invocation = number(invocation);
                self.check_death(workflow, invocation, death, machine);
                let life = &machine.lives[&invocation];
                assert!(!life.was_told, "worker {invocation} was told to exit");
                assert!(!is_blameless(death), "nobody is to blame for {death:?}");
                let deaths = &mut self.desks[workflow].deaths;
                assert!(
                    deaths.iter().all(|(died, _)| *died != invocation),
                    "{invocation} dies twice"
                );
                deaths.push((invocation, since.clone()));
                (
                    self.desks[workflow].has_died,
                    self.desks[workflow].last_code,
                ) = (true, death.code);
            }
            WorkerEvent::WorkflowBlocked { .. } => {
                let desk = &mut self.desks[workflow];
                let has_failed = desk
                    .told
                    .as_ref()
                    .is_some_and(|told| told.state == UnitState::Failed);
                let limit = definition.map(|definition| definition.workflow.worker.start_limit());
                let is_over = limit.is_none_or(|(interval, burst)| {
                    desk.recent(interval.as_secs() * SECOND, &machine.instant()) >= burst as usize
                });
                assert!(has_failed || is_over, "blocked too early: {desk:?}");
                if let Some(death) = desk
                    .told
                    .as_ref()
                    .filter(|_| has_failed)
                    .and_then(|told| told.death.as_ref())
                {
                    desk.last_code = death.code;
                }
                desk.is_blocked = true;
                for id in &desk.started {
                    let run = self.runs.get_mut(id).unwrap();
                    (run.is_doomed, run.doom) = (true, desk.last_code);
                }
            }
            WorkerEvent::WorkerStopped => {
                let desk = &mut self.desks[workflow];
                let is_told = desk
                    .told
                    .as_ref()
                    .is_some_and(|told| told.stop == Stop::Operator);
                assert!(is_told, "no operator stopped it");
                desk.is_stopped = true;
            }
            WorkerEvent::WorkerBack => self.desks[workflow].is_stopped = false,
            WorkerEvent::WorkflowReset { .. } => {
                let desk = &mut self.desks[workflow];
                desk.deaths.clear();
                (desk.is_blocked, desk.is_stopped) = (false, false);
                for id in &desk.started {
                    self.runs.get_mut(id).unwrap().is_pardoned = true;
                }
            }
            WorkerEvent::WorkerDraining {
                invocation, until, ..
            } => {
                let desk = &mut self.desks[workflow];
                desk.draining = Some(number(invocation));
                desk.drains
                    .extend(until.clone().map(|until| (number(invocation), until)));
            }
            WorkerEvent::WorkerDrained => {
                let invocation = self.desks[workflow]
                    .draining
                    .take()
                    .expect("nothing was drained");
                self.desks[workflow].drained.push(invocation);
            }
        }
    }
}

impl Desk {
    pub(super) fn recent(&self, interval_us: u64, now: &BootInstant) -> usize {
        let is_recent = |(_, at): &&(u64, BootInstant)| {
            at.boot_id == now.boot_id && now.boot_us - at.boot_us < interval_us
        };
        self.deaths.iter().filter(is_recent).count()
    }
}

fn turn_status(turn: &Turn, run: RunId) -> Status {
    turn.runs[&run].status()
}
