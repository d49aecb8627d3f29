//! The policy, decision by decision. A [`World`] stands for everything outside: it commits each turn, keeps what the
//! engine wants done, and replays all events at the end to see that live and replayed runs are the same.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Map;

use super::*;
use crate::config::definition;
use crate::model::exit::Exit;
use crate::model::limits;
use crate::model::message::Message;
use crate::model::run::{AbortRequest, Accepted, Caller, KillRequest};
use crate::model::status::Status;
use crate::model::worker::{Cause, Death};

const SECOND: u64 = 1_000_000;

struct World {
    engine: Engine,
    now: Now,
    actions: Vec<Action>,
    events: Vec<Staged>,
    runs: BTreeMap<RunId, Run>,
    next: u128,
    read: ReadId,
    records: BTreeMap<WorkflowName, WorkerRecord>,
}

fn workflow(text: &str) -> Arc<Definition> {
    let text = format!(
        "version: 1\nname: w\n{text}\nroles: {{a: {{exec: [a]}}, b: {{exec: [b]}}}}\n\
         graph: {{$START: a, a: {{ok: b}}, b: {{ok: $END, error: a}}}}\n"
    );
    let parsed = definition::parse("w.yaml", None, text.as_bytes());
    Arc::new(
        parsed
            .definition
            .unwrap_or_else(|| panic!("{:?}", parsed.diagnostics)),
    )
}

fn accepted(workflow: &str) -> Accepted {
    Accepted {
        workflow: workflow.parse().unwrap(),
        prompt: "p".to_owned(),
        max_rounds: None,
        dry_run: false,
        trigger: serde_json::json!({}),
        key: None,
    }
}

fn known(definition: Arc<Definition>) -> Known {
    Known {
        definition: Some(definition),
        fault: None,
    }
}

fn name() -> WorkflowName {
    "w".parse().unwrap()
}

fn place(invocation: &str) -> Place {
    Place {
        invocation: invocation.to_owned(),
        cgroup: "/nerve-wf@w.service".to_owned(),
    }
}

fn death(exit: Exit) -> Death {
    let cause = match exit {
        Exit::Code(_) => Cause::ExitCode,
        Exit::Signal(_) => Cause::Signal,
    };
    Death::new(cause, Some(exit))
}

fn by() -> Caller {
    Caller {
        uid: 0,
        pid: None,
        comm: None,
        unit: None,
    }
}

fn reply(role: &str, status: &str) -> Message {
    let mut meta = Map::new();
    meta.insert("status".into(), status.into());
    meta.insert("result".into(), "exit-code:3".into());
    Message {
        role: role.to_owned(),
        content: String::new(),
        meta,
        timestamp: 0,
    }
}

impl World {
    fn new(text: &str) -> Self {
        let mut world = Self::recover(vec![], workflow(text), HashMap::new(), BTreeMap::new());
        world.units(BTreeMap::new());
        world
    }

    fn recover(
        runs: Vec<Run>,
        definition: Arc<Definition>,
        pinned: HashMap<String, Arc<Definition>>,
        records: BTreeMap<WorkflowName, WorkerRecord>,
    ) -> Self {
        let now = Now {
            wall_us: 1_000 * SECOND,
            boot_us: 100 * SECOND,
        };
        let recovered = Recovered {
            boot_id: "boot".to_owned(),
            workflows: [(name(), known(definition))].into(),
            max_active: None,
            workers: records.clone(),
            pause: None,
            pinned,
            runs: runs.clone(),
        };
        let engine = Engine::recover(recovered, now).unwrap();
        let runs = runs.into_iter().map(|run| (run.id, run)).collect();
        let mut world = Self {
            engine,
            now,
            actions: vec![],
            events: vec![],
            runs,
            next: 1,
            read: 0,
            records,
        };
        world.turn();
        world
    }

    /// The same world after nerved was killed and came back.
    fn restart(self, definition: &Arc<Definition>) -> Self {
        let open = self
            .runs
            .values()
            .filter(|run| !run.status().is_terminal())
            .cloned();
        let pinned = [(definition.digest.clone(), definition.clone())].into();
        let records = self.records.clone();
        let mut world = Self::recover(open.collect(), definition.clone(), pinned, records);
        world.next = self.next;
        world.read = self.read;
        world
    }

    fn turn(&mut self) {
        let turn = self.engine.take_turn();
        self.events.extend(turn.events);
        self.runs.extend(turn.runs);
        self.records.extend(turn.workers);
        self.actions = turn.actions;
    }

    fn step(&mut self, input: Input) -> &[Action] {
        self.engine.step(input, self.now).unwrap();
        self.turn();
        &self.actions
    }

    fn advance(&mut self, time: Duration) -> &[Action] {
        self.now.boot_us += u64::try_from(time.as_micros()).unwrap();
        self.step(Input::Deadline)
    }

    fn unit(&mut self, state: UnitState, invocation: &str, death: Option<Death>) -> &[Action] {
        self.unit_stopped(state, invocation, death, Stop::Nobody)
    }

    fn unit_stopped(
        &mut self,
        state: UnitState,
        invocation: &str,
        death: Option<Death>,
        stop: Stop,
    ) -> &[Action] {
        self.read += 1;
        let unit = Unit {
            state,
            invocation: invocation.to_owned(),
            cgroup: "/nerve-wf@w.service".to_owned(),
            death,
            stop,
            detail: "nerve-wf@w.service: exit-code".to_owned(),
            ..Unit::absent(self.read)
        };
        let workflow = name();
        self.step(Input::Unit { workflow, unit })
    }

    fn units(&mut self, units: BTreeMap<WorkflowName, Unit>) -> &[Action] {
        self.read += 1;
        let read = self.read;
        self.step(Input::Units { units, read })
    }

    fn taken(&mut self) -> &[Action] {
        self.read += 1;
        let (workflow, read) = (name(), self.read);
        self.step(Input::StartTaken { workflow, read })
    }

    fn start(&mut self) -> RunId {
        self.start_with(None)
    }

    fn start_with(&mut self, key: Option<&str>) -> RunId {
        let run = RunId::from_bits(self.next);
        self.next += 1;
        let accepted = Accepted {
            key: key.map(ToOwned::to_owned),
            ..accepted("w")
        };
        self.step(Input::Start {
            ticket: 1,
            run,
            accepted,
            existing: None,
        });
        run
    }

    fn abort(&mut self, run: RunId) -> &[Action] {
        let request = AbortRequest {
            reason: Some("enough".to_owned()),
            by: by(),
        };
        self.step(Input::Abort {
            ticket: 4,
            run,
            request,
        })
    }

    fn drain(&mut self, timeout_us: Option<u64>) -> &[Action] {
        let (workflow, by) = (name(), by());
        self.step(Input::Drain {
            ticket: 5,
            workflow,
            timeout_us,
            by,
        })
    }

    fn reset(&mut self) -> &[Action] {
        let (workflow, by) = (name(), by());
        self.step(Input::Reset {
            ticket: 6,
            workflow,
            by,
        })
    }

    fn define(&mut self, definitions: &[(&str, Arc<Definition>)], max_active: Option<u32>) {
        let workflows = definitions
            .iter()
            .map(|(name, definition)| (name.parse().unwrap(), known(definition.clone())));
        self.step(Input::Definitions {
            workflows: workflows.collect(),
            max_active,
        });
    }

    /// The worker's invocation dies of a signal, systemd brings up the next one, and that is ready.
    fn replaced(&mut self, old: &str, link: LinkId, new: &str) -> &[Action] {
        self.unit(UnitState::Starting, old, Some(death(Exit::Signal(11))));
        self.unit(UnitState::Active, new, None);
        self.ready(link, new, &[])
    }

    fn worker(&self) -> &'static str {
        self.engine.status()[0].worker
    }

    fn kill(&mut self, run: RunId) -> &[Action] {
        let request = KillRequest {
            reason: Some("r".to_owned()),
            grace_us: 5 * SECOND,
            by: None,
        };
        self.step(Input::Kill {
            ticket: 2,
            run,
            request,
        })
    }

    fn ready(&mut self, link: LinkId, invocation: &str, held: &[RunId]) -> &[Action] {
        let (place, held) = (place(invocation), held.to_vec());
        self.read += 1;
        let read = self.read;
        self.step(Input::Ready {
            link,
            workflow: name(),
            place,
            read,
            settings: None,
            held,
        })
    }

    /// A world with a worker that has one run.
    fn working(text: &str) -> (Self, RunId) {
        let mut world = Self::new(text);
        let run = world.start();
        world.ready(1, "i1", &[]);
        assert_eq!(world.dispatched(), [(run, 1)]);
        (world, run)
    }

    fn said(&mut self, link: LinkId, run: RunId, round: u32, message: Message) -> &[Action] {
        self.step(Input::Message {
            link,
            run,
            round,
            message,
        })
    }

    fn ended(&mut self, link: LinkId, run: RunId, result: RunResult, is_empty: bool) -> &[Action] {
        self.step(Input::Ended {
            link,
            run,
            result,
            detail: None,
            is_empty,
        })
    }

    fn status(&self, run: RunId) -> Status {
        self.runs[&run].status()
    }

    fn result(&self, run: RunId) -> Option<String> {
        self.runs[&run]
            .ended()
            .map(|(result, _)| result.to_string())
    }

    fn dispatched(&self) -> Vec<(RunId, u32)> {
        let dispatch = |action: &Action| match action {
            Action::Dispatch { dispatch, .. } => Some((dispatch.run, dispatch.attempt)),
            _ => None,
        };
        self.actions.iter().filter_map(dispatch).collect()
    }

    fn orders(&self) -> Vec<Order> {
        let order = |action: &Action| match action {
            Action::Tell { order, .. } => Some(order.clone()),
            _ => None,
        };
        self.actions.iter().filter_map(order).collect()
    }

    fn emptied(&self) -> Vec<RunId> {
        let empty = |action: &Action| match action {
            Action::Empty { run, .. } => Some(*run),
            _ => None,
        };
        self.actions.iter().filter_map(empty).collect()
    }

    fn answers(&self) -> Vec<Answer> {
        let answer = |action: &Action| match action {
            Action::Answer { answer, .. } => Some(answer.clone()),
            _ => None,
        };
        self.actions.iter().filter_map(answer).collect()
    }

    fn starts_unit(&self) -> bool {
        self.actions
            .iter()
            .any(|action| matches!(action, Action::StartUnit { .. }))
    }

    fn refuses(&self) -> bool {
        self.actions
            .iter()
            .any(|action| matches!(action, Action::Refuse { .. }))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let mut replayed: BTreeMap<RunId, Run> = BTreeMap::new();
        for staged in &self.events {
            let Event::Run(id, event) = &staged.event else {
                continue;
            };
            let run = match (event, replayed.get(id)) {
                (RunEvent::Queued(accepted), None) => Run::accept(*id, staged.at, accepted),
                (event, Some(run)) => run.after(event, staged.at).unwrap(),
                (_, None) => continue,
            };
            replayed.insert(*id, run);
        }
        for (id, run) in replayed {
            assert_eq!(run, self.runs[&id], "replayed and live differ");
        }
    }
}

#[test]
fn a_run_goes_from_the_queue_over_its_rounds_to_its_end() {
    let (mut world, run) = World::working("");
    assert_eq!(world.status(run), Status::Started);
    world.said(1, run, 1, reply("a", "ok"));
    assert_eq!(world.orders(), [Order::MessageAck { run, round: 1 }]);
    world.said(1, run, 2, reply("b", "ok"));
    world.ended(1, run, RunResult::Success, true);
    assert_eq!(world.orders(), [Order::EventAck { run }]);
    assert_eq!(
        (world.status(run), world.result(run)),
        (Status::Completed, Some("success".into()))
    );
}

#[test]
fn nothing_of_a_worker_starts_before_systemd_was_asked() {
    let mut world = World::recover(vec![], workflow(""), HashMap::new(), BTreeMap::new());
    let run = world.start();
    assert!(!world.starts_unit() && world.status(run) == Status::Queued);
    world.units(BTreeMap::new());
    assert!(world.starts_unit() && world.status(run) == Status::Started);
}

#[test]
fn slots_are_filled_in_order_and_the_oldest_that_waits_is_evicted() {
    let mut world = World::new("concurrency: 2\nmax_queue: 2");
    let runs: Vec<_> = (0..5).map(|_| world.start()).collect();
    let statuses: Vec<_> = runs.iter().map(|run| world.status(*run)).collect();
    assert_eq!(
        statuses,
        [
            Status::Started,
            Status::Started,
            Status::Dropped,
            Status::Queued,
            Status::Queued
        ]
    );
    assert_eq!(world.result(runs[2]), Some("queue-full".into()));
    // A kill frees the slot for the one that has waited longest.
    world.kill(runs[0]);
    assert_eq!(
        (world.status(runs[0]), world.status(runs[3])),
        (Status::Killed, Status::Started)
    );
}

#[test]
fn a_queue_of_no_length_drops_what_finds_no_slot() {
    let mut world = World::new("max_queue: 0");
    let (first, second) = (world.start(), world.start());
    assert_eq!(
        (world.status(first), world.status(second)),
        (Status::Started, Status::Dropped)
    );
}

#[test]
fn an_unknown_workflow_and_a_broken_one_are_told_apart() {
    let mut world = World::new("");
    world
        .engine
        .workflow(&"broken".parse().unwrap())
        .known
        .fault = Some("broken.yaml:1:1".to_owned());
    for (workflow, answer) in [
        ("nobody", Answer::UnknownWorkflow),
        (
            "broken",
            Answer::BadDefinition("broken.yaml:1:1".to_owned()),
        ),
    ] {
        let accepted = accepted(workflow);
        world.step(Input::Start {
            ticket: 7,
            run: RunId::from_bits(99),
            accepted,
            existing: None,
        });
        assert_eq!(world.answers(), [answer]);
        assert!(world.events.is_empty());
    }
}

#[test]
fn a_kill_ends_at_once_what_no_worker_ever_had() {
    let mut world = World::new("");
    let (started, queued) = (world.start(), world.start());
    for run in [queued, started] {
        world.kill(run);
        assert_eq!(world.answers(), [Answer::Done]);
        assert_eq!(
            (world.status(run), world.result(run)),
            (Status::Killed, Some("killed".into()))
        );
    }
    world.kill(started);
    assert_eq!(world.answers(), [Answer::NotOpen]);
}

#[test]
fn a_kill_waits_for_the_empty_cgroup_whoever_confirms_it() {
    let (mut world, run) = World::working("");
    world.kill(run);
    assert_eq!(
        world.orders(),
        [Order::KillThread {
            run,
            grace_us: 5 * SECOND
        }]
    );
    assert!(world.runs[&run].is_killing());
    // The worker says killed, but processes were seen.
    world.ended(1, run, RunResult::Killed, false);
    assert_eq!(
        (world.emptied(), world.status(run)),
        (vec![run], Status::Started)
    );
    world.step(Input::Emptied { run });
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn nerved_kills_itself_when_the_worker_does_not_confirm() {
    let (mut world, run) = World::working("");
    world.kill(run);
    world.advance(Duration::from_secs(6));
    assert_eq!(world.emptied(), []);
    world.advance(Duration::from_secs(1));
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(world.status(run), Status::Killed);
    assert_eq!(
        world.orders(),
        [
            Order::KillThread { run, grace_us: 0 },
            Order::EventAck { run }
        ]
    );
}

#[test]
fn a_second_kill_may_be_in_more_of_a_hurry_and_keeps_the_reason() {
    let (mut world, run) = World::working("");
    world.kill(run);
    let request = KillRequest {
        reason: None,
        grace_us: 0,
        by: None,
    };
    world.step(Input::Kill {
        ticket: 3,
        run,
        request,
    });
    assert_eq!(world.orders(), [Order::KillThread { run, grace_us: 0 }]);
    assert_eq!(
        world.runs[&run].kill.as_ref().unwrap().reason.as_deref(),
        Some("r")
    );
    world.advance(Duration::from_secs(2));
    assert_eq!(world.emptied(), [run]);
}

#[test]
fn after_a_kill_no_message_counts_and_no_natural_end() {
    let (mut world, run) = World::working("");
    world.said(1, run, 1, reply("a", "ok"));
    world.kill(run);
    world.said(1, run, 2, reply("b", "ok"));
    assert_eq!(
        (world.orders(), world.runs[&run].position().rounds),
        (vec![], 1)
    );
    world.ended(1, run, RunResult::Success, true);
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn an_end_that_was_first_stays() {
    let (mut world, run) = World::working("");
    world.said(1, run, 1, reply("a", "error"));
    world.ended(1, run, RunResult::ExitCode(3), true);
    world.kill(run);
    assert_eq!(world.answers(), [Answer::NotOpen]);
    assert_eq!(world.result(run), Some("exit-code:3".into()));
}

#[test]
fn with_the_worker_gone_a_kill_needs_nobody_else() {
    let (mut world, run) = World::working("");
    world.step(Input::LinkLost { link: 1 });
    world.kill(run);
    assert_eq!(world.emptied(), []);
    world.unit(UnitState::Failed, "i1", Some(death(Exit::Signal(9))));
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn a_worker_that_speaks_out_of_turn_is_refused_and_nothing_is_stored() {
    let lies = [
        (1, reply("b", "ok")),
        (2, reply("a", "ok")),
        (1, reply("nobody", "ok")),
    ];
    for (round, message) in lies {
        let (mut world, run) = World::working("");
        let before = world.events.len();
        world.said(1, run, round, message);
        assert!(world.refuses());
        assert_eq!(world.events.len(), before);
    }
    for result in [
        "success",
        "killed",
        "aborted",
        "exit-code:3",
        "timeout",
        "max-rounds",
        "worker-died",
    ] {
        let (mut world, run) = World::working("");
        let result = result.parse().unwrap();
        world.ended(1, run, result, true);
        assert!(world.refuses());
        assert_eq!(world.status(run), Status::Started);
    }
}

#[test]
fn a_round_that_was_said_twice_is_acknowledged_twice_and_stored_once() {
    let (mut world, run) = World::working("");
    world.said(1, run, 1, reply("a", "ok"));
    let stored = world.events.len();
    world.said(1, run, 1, reply("a", "ok"));
    assert_eq!(world.orders(), [Order::MessageAck { run, round: 1 }]);
    assert_eq!(world.events.len(), stored);
}

#[test]
fn max_rounds_ends_a_loop() {
    let (mut world, run) = World::working("max_rounds: 3");
    for (round, role, status) in [(1, "a", "ok"), (2, "b", "error"), (3, "a", "ok")] {
        world.said(1, run, round, reply(role, status));
    }
    world.ended(1, run, RunResult::MaxRounds, true);
    assert_eq!(
        world.runs[&run].ended().unwrap().0.end(),
        (Status::Failed, 2)
    );
}

#[test]
fn a_dead_workers_runs_wait_for_their_empty_cgroup_and_then_resume() {
    let (mut world, run) = World::working("");
    world.said(1, run, 1, reply("a", "ok"));
    world.step(Input::LinkLost { link: 1 });
    world.unit(UnitState::Starting, "i1", Some(death(Exit::Signal(11))));
    assert_eq!(world.emptied(), [run]);
    world.ready(2, "i2", &[]);
    assert_eq!(world.dispatched(), []);
    // What the dead one still says is nobody's word.
    world.said(1, run, 2, reply("b", "ok"));
    assert_eq!(world.runs[&run].position().rounds, 1);
    world.step(Input::Emptied { run });
    assert_eq!(world.dispatched(), [(run, 2)]);
    let lost = world.events.iter().find_map(|staged| match &staged.event {
        Event::Run(
            _,
            RunEvent::WorkerLost {
                invocation,
                attempt,
                death,
            },
        ) => Some((invocation.as_str(), *attempt, death.signal.as_deref())),
        _ => None,
    });
    assert_eq!(lost, Some(("i1", 1, Some("SIGSEGV"))));
}

#[test]
fn three_deaths_without_a_round_are_enough() {
    let (mut world, run) = World::working("");
    for (old, attempt) in [(1, 2), (2, 3)] {
        let link = old + 1;
        world.replaced(&format!("i{old}"), link, &format!("i{link}"));
        world.step(Input::Emptied { run });
        assert_eq!(world.dispatched(), [(run, attempt)]);
    }
    world.unit(UnitState::Starting, "i3", Some(death(Exit::Code(3))));
    world.step(Input::Emptied { run });
    assert_eq!(
        (world.status(run), world.result(run)),
        (Status::Crashed, Some("worker-exit:3".into()))
    );
    assert_eq!(world.worker(), "starting", "one guilty run blocks nobody");
}

#[test]
fn a_round_in_between_makes_the_count_begin_anew() {
    let (mut world, run) = World::working("worker: {StartLimitBurst: 100}");
    let mut round = 0;
    for link in 2..12 {
        world.replaced(&format!("i{}", link - 1), link, &format!("i{link}"));
        world.step(Input::Emptied { run });
        round += 1;
        let (role, status) = if round % 2 == 1 {
            ("a", "ok")
        } else {
            ("b", "error")
        };
        world.said(link, run, round, reply(role, status));
    }
    assert_eq!(world.status(run), Status::Started);
}

#[test]
fn after_two_deaths_runs_are_resumed_one_at_a_time_until_the_guilty_one_is_found() {
    let (mut world, first) = World::working("concurrency: 3");
    let (guilty, third) = (world.start(), world.start());
    let all = [first, guilty, third];
    for (link, new) in [(2, "i2"), (3, "i3")] {
        world.replaced(&format!("i{}", link - 1), link, new);
        assert_eq!(world.dispatched(), []);
        for run in all {
            world.step(Input::Emptied { run });
            let expected = if link == 2 || run == first {
                vec![(run, u32::try_from(link).unwrap())]
            } else {
                vec![]
            };
            assert_eq!(world.dispatched(), expected);
        }
    }
    // The first proves that it is innocent; when it has ended it is the turn of the guilty one.
    world.said(3, first, 1, reply("a", "ok"));
    world.said(3, first, 2, reply("b", "ok"));
    assert_eq!(world.dispatched(), []);
    world.ended(3, first, RunResult::Success, true);
    assert_eq!(world.dispatched(), [(guilty, 3)]);
    world.replaced("i3", 4, "i4");
    assert_eq!(world.dispatched(), [(third, 3)]);
    world.step(Input::Emptied { run: guilty });
    assert_eq!(world.status(guilty), Status::Crashed);
}

#[test]
fn the_crash_limit_blocks_until_somebody_resets_it() {
    let (mut world, run) = World::working("worker: {StartLimitBurst: 2}");
    let queued = world.start();
    world.replaced("i1", 2, "i2");
    world.step(Input::Emptied { run });
    world.unit(UnitState::Starting, "i2", Some(death(Exit::Signal(9))));
    assert_eq!(world.worker(), "blocked");
    world.step(Input::Emptied { run });
    assert_eq!(world.result(run), Some("start-limit-hit".into()));
    assert_eq!(world.status(queued), Status::Queued);
    // systemd brings it up once more: it is sent home.
    world.unit(UnitState::Active, "i3", None);
    world.ready(3, "i3", &[]);
    assert_eq!(world.orders(), [Order::Welcome, Order::Shutdown]);
    world.unit(UnitState::Absent, "", None);
    assert!(!world.starts_unit());
    // Not even a new nerved forgets it.
    let definition = workflow("worker: {StartLimitBurst: 2}");
    let mut world = world.restart(&definition);
    world.units(BTreeMap::new());
    assert_eq!((world.worker(), world.starts_unit()), ("blocked", false));
    let (_, why) = world.engine.status()[0].obstacle.clone().unwrap();
    assert!(why.contains("nervectl workflow reset w"), "{why}");
    world.reset();
    assert!(world.starts_unit());
    assert_eq!(world.status(queued), Status::Started);
}

#[test]
fn a_run_whose_thread_is_damaged_ends_and_the_others_go_on() {
    let (mut world, run) = World::working("concurrency: 2");
    let other = world.start();
    let damaged = || Input::ThreadDamaged {
        run,
        detail: "blob".to_owned(),
    };
    world.step(damaged());
    assert_eq!(world.emptied(), [run]);
    assert_eq!(world.orders(), []);
    assert_eq!(world.status(run), Status::Started);
    world.step(Input::Emptied { run });
    assert_eq!(world.result(run), Some("thread-damaged".into()));
    assert_eq!(world.status(other), Status::Started);
    assert!(world.step(damaged()).is_empty());
    // A kill that was asked for meanwhile is what ends it.
    let (mut world, run) = World::working("");
    world.step(Input::ThreadDamaged {
        run,
        detail: "blob".to_owned(),
    });
    world.kill(run);
    world.step(Input::Emptied { run });
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn a_unit_that_failed_blocks_and_one_that_was_refused_does_not() {
    let mut world = World::new("");
    let first = world.start();
    world.step(Input::StartRefused {
        workflow: name(),
        error: "no".to_owned(),
    });
    assert_eq!(world.result(first), Some("unit-refused".into()));
    let second = world.start();
    assert!(world.starts_unit());
    world.taken();
    world.unit(UnitState::Failed, "i1", Some(death(Exit::Code(217))));
    assert_eq!(world.result(second), Some("worker-exit:217".into()));
    let third = world.start();
    assert_eq!(
        (world.status(third), world.worker()),
        (Status::Queued, "blocked")
    );
    world.reset();
    assert!(
        world
            .actions
            .iter()
            .any(|action| matches!(action, Action::ResetUnit { .. }))
    );
    assert_eq!(world.status(third), Status::Started);
}

#[test]
fn a_worker_that_is_not_ready_in_time_is_killed() {
    let mut world = World::new("");
    world.start();
    world.taken();
    world.unit(UnitState::Active, "i1", None);
    let acts = |world: &World| {
        let kills = |action: &Action| match action {
            Action::ReadUnit { .. } => Some("read"),
            Action::KillUnit { .. } => Some("kill"),
            _ => None,
        };
        world.actions.iter().filter_map(kills).collect::<Vec<_>>()
    };
    world.advance(Duration::from_secs(4));
    assert_eq!(acts(&world), ["read"]);
    world.advance(Duration::from_secs(1));
    assert_eq!(acts(&world), ["kill"]);
    world.unit(UnitState::Starting, "i1", Some(death(Exit::Signal(9))));
    let died = world.events.iter().any(|staged| {
        matches!(&staged.event, Event::Worker(_, WorkerEvent::WorkerDied { death, .. }) if death.cause == Cause::NotReady)
    });
    assert!(died);
}

#[test]
fn a_stale_worker_is_fenced_and_what_it_says_changes_nothing() {
    let (mut world, run) = World::working("");
    world.replaced("i1", 2, "i2");
    world.step(Input::Emptied { run });
    let (place, read) = (place("i1"), 0);
    world.step(Input::Ready {
        link: 3,
        workflow: name(),
        place,
        read,
        settings: None,
        held: vec![run],
    });
    assert!(matches!(world.actions[..], [Action::Fence { link: 3, .. }]));
    let stored = world.events.len();
    for link in [1, 3] {
        world.said(link, run, 1, reply("a", "ok"));
    }
    assert_eq!(world.events.len(), stored);
    world.said(2, run, 1, reply("a", "ok"));
    assert_eq!(world.runs[&run].position().rounds, 1);
}

#[test]
fn what_systemd_said_earlier_counts_no_more() {
    let (mut world, run) = World::working("");
    let late = Unit::absent(world.read - 1);
    world.step(Input::Unit {
        workflow: name(),
        unit: late,
    });
    world.said(1, run, 1, reply("a", "ok"));
    assert_eq!(world.orders(), [Order::MessageAck { run, round: 1 }]);
}

#[test]
fn what_an_operator_stopped_waits_for_a_reset() {
    let (mut world, run) = World::working("");
    let queued = world.start();
    world.unit_stopped(UnitState::Absent, "", None, Stop::Operator);
    world.step(Input::Emptied { run });
    assert_eq!((world.worker(), world.starts_unit()), ("stopped", false));
    assert_eq!(
        (world.status(run), world.status(queued)),
        (Status::Started, Status::Queued)
    );
    world.reset();
    assert!(world.starts_unit());
    world.ready(2, "i2", &[]);
    assert_eq!(world.dispatched(), [(run, 2)]);
    let blamed = world.runs[&run].started().unwrap().losses;
    assert_eq!(blamed, 0);
}

#[test]
fn an_operators_restart_is_no_death_and_no_stop() {
    let (mut world, run) = World::working("");
    world.unit_stopped(UnitState::Starting, "i1", None, Stop::Operator);
    world.unit(UnitState::Active, "i2", None);
    world.step(Input::Emptied { run });
    world.ready(2, "i2", &[]);
    assert_eq!(
        (world.dispatched(), world.worker()),
        (vec![(run, 2)], "ready")
    );
    assert_eq!(world.runs[&run].started().unwrap().losses, 0);
}

#[test]
fn when_everything_goes_down_nothing_is_started_any_more() {
    let (mut world, run) = World::working("");
    world.unit_stopped(UnitState::Absent, "", None, Stop::GoingDown);
    world.step(Input::Emptied { run });
    assert_eq!((world.worker(), world.starts_unit()), ("absent", false));
    let definition = workflow("");
    let mut world = world.restart(&definition);
    world.units(BTreeMap::new());
    assert!(world.starts_unit());
    assert_eq!(world.runs[&run].started().unwrap().losses, 0);
}

#[test]
fn a_drained_worker_gets_nothing_new_and_the_next_one_does() {
    let (mut world, first) = World::working("concurrency: 2");
    world.drain(None);
    assert_eq!(
        (world.answers(), world.worker()),
        (vec![Answer::Done], "draining")
    );
    let second = world.start();
    assert_eq!(world.status(second), Status::Queued);
    world.said(1, first, 1, reply("a", "ok"));
    world.said(1, first, 2, reply("b", "ok"));
    world.ended(1, first, RunResult::Success, true);
    assert_eq!(
        world.orders(),
        [Order::EventAck { run: first }, Order::Shutdown]
    );
    world.unit(UnitState::Absent, "", None);
    assert!(world.starts_unit());
    world.ready(2, "i2", &[]);
    assert_eq!(world.dispatched(), [(second, 1)]);
    let deaths = world.events.iter().filter(|staged| {
        matches!(
            staged.event,
            Event::Worker(_, WorkerEvent::WorkerDied { .. })
        )
    });
    assert_eq!(deaths.count(), 0);
}

#[test]
fn only_a_drain_with_a_time_out_ends_runs() {
    let (mut world, run) = World::working("");
    world.drain(Some(10 * SECOND));
    world.advance(Duration::from_secs(9));
    assert_eq!(world.orders(), []);
    world.advance(Duration::from_secs(1));
    assert_eq!(
        world.orders(),
        [Order::KillThread {
            run,
            grace_us: 5 * SECOND
        }]
    );
    world.ended(1, run, RunResult::Killed, true);
    assert_eq!(
        (world.status(run), world.result(run)),
        (Status::Interrupted, Some("drained".into()))
    );
}

#[test]
fn a_changed_worker_section_waits_for_the_last_run_and_never_interrupts_one() {
    let (mut world, run) = World::working("");
    let old = workflow("").workflow.worker.digest();
    world.read += 1;
    let unit = Unit {
        state: UnitState::Active,
        invocation: "i1".to_owned(),
        settings: Some(old),
        ..Unit::absent(world.read)
    };
    world.step(Input::Unit {
        workflow: name(),
        unit,
    });
    assert_eq!(world.worker(), "ready");
    world.define(&[("w", workflow("worker: {Nice: 5}"))], None);
    assert_eq!((world.worker(), world.orders()), ("draining", vec![]));
    let next = world.start();
    world.kill(run);
    world.ended(1, run, RunResult::Killed, true);
    assert_eq!(world.status(next), Status::Queued);
    assert_eq!(world.orders(), [Order::EventAck { run }, Order::Shutdown]);
    world.unit(UnitState::Absent, "", None);
    let settings = world.actions.iter().find_map(|action| match action {
        Action::StartUnit { settings, .. } => Some(settings.nice),
        _ => None,
    });
    assert_eq!(settings, Some(Some(5)));
}

#[test]
fn limits_are_read_live() {
    use Status::{Dropped, Queued, Started};
    let mut world = World::new("");
    let runs: Vec<_> = (0..4).map(|_| world.start()).collect();
    let statuses = |world: &World| {
        runs.iter()
            .map(|run| world.status(*run))
            .collect::<Vec<_>>()
    };
    world.define(&[("w", workflow("concurrency: 3"))], None);
    assert_eq!(statuses(&world), [Started, Started, Started, Queued]);
    world.define(&[("w", workflow("concurrency: 1\nmax_queue: 0"))], None);
    assert_eq!(statuses(&world), [Started, Started, Started, Dropped]);
    // Gone: what has a slot goes on, with what it is pinned to.
    world.define(&[], None);
    assert_eq!(statuses(&world), [Started, Started, Started, Dropped]);
    world.ready(1, "i1", &[]);
    assert_eq!(world.dispatched().len(), 3);
    let late = world.start();
    assert_eq!(world.answers(), [Answer::UnknownWorkflow]);
    assert!(!world.runs.contains_key(&late));
}

#[test]
fn each_overflow_has_its_own_way() {
    use Status::{Dropped, Queued, Started};
    let after_four = |text: &str| {
        let mut world = World::new(text);
        let runs: Vec<_> = (0..4).map(|_| world.start()).collect();
        let last = world.answers().remove(0);
        let is_dropped = matches!(
            last,
            Answer::Started {
                dropped: Some(_),
                ..
            }
        );
        let statuses = runs
            .iter()
            .map(|run| world.status(*run))
            .collect::<Vec<_>>();
        (statuses, is_dropped)
    };
    let table = [
        (
            "overflow: drop",
            vec![Started, Dropped, Dropped, Dropped],
            true,
        ),
        (
            "overflow: latest",
            vec![Started, Dropped, Dropped, Queued],
            false,
        ),
        (
            "max_queue: 1",
            vec![Started, Dropped, Dropped, Queued],
            false,
        ),
        (
            "max_queue: 1\non_full: refuse",
            vec![Started, Queued, Dropped, Dropped],
            true,
        ),
    ];
    for (text, statuses, is_dropped) in table {
        assert_eq!(after_four(text), (statuses, is_dropped), "{text}");
    }
}

#[test]
fn a_key_gives_one_run() {
    let mut world = World::new("");
    let first = world.start_with(Some("k"));
    let second = RunId::from_bits(77);
    let accepted = Accepted {
        key: Some("k".to_owned()),
        ..accepted("w")
    };
    // As the driver finds it in the store.
    let existing = Some(first);
    world.step(Input::Start {
        ticket: 9,
        run: second,
        accepted: accepted.clone(),
        existing,
    });
    assert_eq!(world.answers(), [Answer::Existing(first)]);
    // Both in one turn: the store knows neither.
    let mut fresh = World::new("");
    for (ticket, run) in [(1, first), (2, second)] {
        let start = Input::Start {
            ticket,
            run,
            accepted: accepted.clone(),
            existing: None,
        };
        fresh.engine.step(start, world.now).unwrap();
    }
    assert_eq!(fresh.engine.take_turn().runs.len(), 1);
}

#[test]
fn a_limit_over_all_workflows_gives_the_slot_to_whoever_waited_longest() {
    use Status::{Killed, Queued, Started};
    let mut world = World::new("");
    let other = |text: &str| Arc::new((*workflow(text)).clone());
    world.define(
        &[
            ("w", other("concurrency: 9")),
            ("v", other("concurrency: 9")),
        ],
        Some(2),
    );
    let mut start = |workflow: &str| {
        let run = RunId::from_bits(world.next);
        world.next += 1;
        let accepted = accepted(workflow);
        world.step(Input::Start {
            ticket: 1,
            run,
            accepted,
            existing: None,
        });
        run
    };
    let runs = [start("w"), start("w"), start("v"), start("w")];
    let statuses = |world: &World| runs.map(|run| world.status(run));
    assert_eq!(statuses(&world), [Started, Started, Queued, Queued]);
    world.kill(runs[0]);
    assert_eq!(statuses(&world), [Killed, Started, Started, Queued]);
}

#[test]
fn a_full_disk_keeps_everything_in_its_queue_and_lets_runs_end() {
    let mut world = World::new("concurrency: 2");
    let first = world.start();
    assert_eq!(world.status(first), Status::Started);
    world.step(Input::Scarce(true));
    let second = world.start();
    assert_eq!(world.status(second), Status::Queued);
    assert_eq!(world.status(first), Status::Started);
    world.step(Input::Scarce(false));
    assert_eq!(world.status(second), Status::Started);
}

#[test]
fn a_pause_keeps_everything_in_its_queue() {
    let mut world = World::new("overflow: drop");
    let pause = Input::Pause {
        ticket: 1,
        reason: Some("upgrade".to_owned()),
        by: by(),
    };
    world.step(pause);
    let run = world.start();
    let [
        Answer::Started {
            dropped: Some((RunResult::Blocked, why)),
            ..
        },
    ] = &world.answers()[..]
    else {
        panic!("{:?}", world.answers());
    };
    assert!(why.contains("upgrade"), "{why}");
    assert_eq!(world.status(run), Status::Dropped);
    world.define(&[("w", workflow(""))], None);
    let run = world.start();
    assert_eq!(world.status(run), Status::Queued);
    world.step(Input::Resume {
        ticket: 1,
        by: by(),
    });
    assert_eq!(world.status(run), Status::Started);
}

#[test]
fn an_abort_waits_for_the_round_and_for_nothing_else() {
    let (mut world, run) = World::working("");
    let queued = world.start();
    world.abort(queued);
    assert_eq!(world.status(queued), Status::Aborted);
    world.abort(run);
    let reason = Some("enough".to_owned());
    assert_eq!(world.orders(), [Order::AbortThread { run, reason }]);
    world.abort(run);
    assert_eq!(world.answers(), [Answer::Ending]);
    world.said(1, run, 1, reply("a", "ok"));
    assert_eq!(world.orders(), [Order::KillThread { run, grace_us: 0 }]);
    world.ended(1, run, RunResult::Aborted, true);
    assert_eq!(
        world.runs[&run].ended().unwrap().0.end(),
        (Status::Aborted, 143)
    );
    world.abort(run);
    assert_eq!(world.answers(), [Answer::NotOpen]);
}

#[test]
fn an_aborted_run_is_never_resumed() {
    let (mut world, run) = World::working("");
    world.abort(run);
    world.replaced("i1", 2, "i2");
    assert_eq!(world.dispatched(), []);
    world.step(Input::Emptied { run });
    assert_eq!(world.status(run), Status::Aborted);
}

#[test]
fn a_kill_overrides_an_abort() {
    let (mut world, run) = World::working("");
    world.abort(run);
    world.kill(run);
    world.ended(1, run, RunResult::Killed, true);
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn while_systemd_is_asked_to_start_a_unit_that_there_is_none_is_no_news() {
    let mut world = World::new("");
    let run = world.start();
    for _ in 0..9 {
        world.unit(UnitState::Absent, "", None);
        assert!(!world.starts_unit());
    }
    world.taken();
    world.unit(UnitState::Absent, "", None);
    assert!(world.starts_unit());
    assert_eq!(world.status(run), Status::Started);
}

#[test]
fn when_nobody_knows_whether_a_unit_was_started_it_is_tried_again_later_and_later() {
    let mut world = World::new("");
    world.start();
    for pause in [100, 200, 400] {
        world.step(Input::StartFailed { workflow: name() });
        world.advance(Duration::from_millis(pause - 1));
        assert!(!world.starts_unit());
        world.advance(Duration::from_millis(1));
        assert!(world.starts_unit());
    }
}

#[test]
fn what_is_in_the_way_is_waited_for() {
    let mut world = World::new("");
    let run = world.start();
    world.taken();
    world.unit(UnitState::Foreign, "", None);
    assert_eq!(
        (world.status(run), world.worker()),
        (Status::Started, "obstructed")
    );
    world.unit(UnitState::Absent, "", None);
    assert!(world.starts_unit());
}

#[test]
fn a_restart_of_nerved_adopts_what_the_worker_has_and_sends_what_it_lacks() {
    let definition = workflow("concurrency: 2");
    let (mut world, first) = World::working("concurrency: 2");
    let second = world.start();
    assert_eq!(world.dispatched(), [(second, 1)]);
    world.said(1, first, 1, reply("a", "ok"));
    let mut world = world.restart(&definition);
    let unit = Unit {
        state: UnitState::Active,
        invocation: "i1".to_owned(),
        ..Unit::absent(world.read)
    };
    world.units([(name(), unit)].into());
    assert!(!world.starts_unit());
    // The frame of the second never left.
    world.ready(1, "i1", &[first]);
    assert_eq!(world.dispatched(), [(second, 1)]);
    world.said(1, first, 2, reply("b", "ok"));
    world.ended(1, first, RunResult::Success, true);
    assert_eq!(world.status(first), Status::Completed);
}

#[test]
fn a_restart_of_nerved_finishes_a_kill() {
    let definition = workflow("");
    let (mut world, run) = World::working("");
    world.kill(run);
    let mut world = world.restart(&definition);
    world.units(BTreeMap::new());
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn a_restart_of_nerved_finds_a_worker_that_failed_meanwhile() {
    let definition = workflow("");
    let (world, run) = World::working("");
    let mut world = world.restart(&definition);
    let failed = Unit {
        state: UnitState::Failed,
        invocation: "i1".to_owned(),
        death: Some(death(Exit::Code(1))),
        ..Unit::absent(world.read)
    };
    world.units([(name(), failed)].into());
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(world.result(run), Some("worker-exit:1".into()));
}

#[test]
fn queued_runs_of_a_workflow_that_is_gone_are_dropped() {
    let mut world = World::new("");
    world.start();
    let queued = world.start();
    let mut runs: Vec<_> = world.runs.values().cloned().collect();
    runs.retain(|run| run.id == queued);
    let recovered = Recovered {
        boot_id: "b".into(),
        workflows: BTreeMap::new(),
        max_active: None,
        workers: BTreeMap::new(),
        pause: None,
        pinned: HashMap::new(),
        runs,
    };
    let mut engine = Engine::recover(recovered, world.now).unwrap();
    let turn = engine.take_turn();
    assert_eq!(turn.runs[&queued].ended().unwrap().0.to_string(), "removed");
}

#[test]
fn a_worker_that_has_a_run_that_ended_is_told_to_forget_it() {
    let (mut world, run) = World::working("");
    world.kill(run);
    world.ended(1, run, RunResult::Killed, true);
    world.ready(2, "i1", &[run]);
    let expected = [
        Order::Welcome,
        Order::KillThread { run, grace_us: 0 },
        Order::EventAck { run },
    ];
    assert_eq!(world.orders(), expected);
}

#[test]
fn nerved_enforces_the_time_out_when_the_worker_does_not() {
    let (mut world, run) = World::working("timeout: 10s");
    world.advance(Duration::from_secs(14));
    assert_eq!(world.orders(), []);
    world.advance(Duration::from_secs(1));
    assert_eq!(world.orders(), [Order::KillThread { run, grace_us: 0 }]);
    assert_eq!(world.emptied(), []);
    world.advance(Duration::from_secs(2));
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(
        world.runs[&run].ended().unwrap().0.end(),
        (Status::Failed, 124)
    );
}

#[test]
fn the_longest_time_out_there_is_never_passes() {
    let longest = "timeout: 18446744073709s";
    let (mut world, _) = World::working(longest);
    world.advance(Duration::from_secs(1_000_000_000));
    assert_eq!(world.orders(), []);
    world.restart(&workflow(longest));
}

#[test]
fn time_in_the_queue_does_not_count() {
    let (mut world, first) = World::working("timeout: 10s");
    let second = world.start();
    world.advance(Duration::from_secs(9));
    world.kill(first);
    world.ended(1, first, RunResult::Killed, true);
    let left = world.actions.iter().find_map(|action| match action {
        Action::Dispatch { dispatch, .. } if dispatch.run == second => dispatch.timeout_us,
        _ => None,
    });
    assert_eq!(left, Some(10 * SECOND));
}

#[test]
fn an_idle_worker_is_sent_home_and_called_back() {
    let (mut world, run) = World::working("");
    world.kill(run);
    world.ended(1, run, RunResult::Killed, true);
    world.advance(limits::WORKER_IDLE.saturating_sub(Duration::from_micros(1)));
    assert_eq!(world.orders(), []);
    world.advance(Duration::from_micros(1));
    assert_eq!(world.orders(), [Order::Shutdown]);
    // Too late for this worker.
    let next = world.start();
    assert!(!world.starts_unit() && world.dispatched().is_empty());
    world.step(Input::LinkLost { link: 1 });
    world.unit(UnitState::Absent, "i1", Some(death(Exit::Code(0))));
    assert!(world.starts_unit());
    world.ready(2, "i2", &[]);
    assert_eq!(world.dispatched(), [(next, 1)]);
}

#[test]
fn a_run_whose_definition_cannot_be_read_any_more_ends_and_harms_nobody() {
    let (world, run) = World::working("");
    let runs: Vec<_> = world.runs.values().cloned().collect();
    let mut world = World::recover(runs, workflow(""), HashMap::new(), BTreeMap::new());
    world.units(BTreeMap::new());
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(world.result(run), Some("unit-refused".into()));
}
