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
use crate::model::status::Status;

const SECOND: u64 = 1_000_000;

struct World {
    engine: Engine,
    now: Now,
    actions: Vec<Action>,
    events: Vec<Staged>,
    runs: BTreeMap<RunId, Run>,
    next: u128,
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

fn name() -> WorkflowName {
    "w".parse().unwrap()
}

fn place(invocation: &str) -> Place {
    Place {
        invocation: invocation.to_owned(),
        cgroup: "/nerve-wf@w.service".to_owned(),
    }
}

fn unit(state: UnitState, exit: Option<Exit>) -> Input {
    let detail = "nerve-wf@w.service: exit-code".to_owned();
    Input::Unit {
        workflow: name(),
        unit: Unit {
            state,
            exit,
            detail,
        },
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
        Self::recover(vec![], workflow(text), HashMap::new())
    }

    fn recover(
        runs: Vec<Run>,
        definition: Arc<Definition>,
        pinned: HashMap<String, Arc<Definition>>,
    ) -> Self {
        let now = Now {
            wall_us: 1_000 * SECOND,
            boot_us: 100 * SECOND,
        };
        let recovered = Recovered {
            boot_id: "boot".to_owned(),
            workflows: [(name(), (Some(definition), None))].into(),
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
        let mut world = Self::recover(open.collect(), definition.clone(), pinned);
        world.next = self.next;
        world
    }

    fn turn(&mut self) {
        let turn = self.engine.take_turn();
        self.events.extend(turn.events);
        self.runs.extend(turn.runs);
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

    fn start(&mut self) -> RunId {
        let run = RunId::from_bits(self.next);
        self.next += 1;
        let accepted = Accepted {
            workflow: name(),
            prompt: "p".to_owned(),
            max_rounds: None,
            dry_run: false,
            trigger: serde_json::json!({}),
        };
        self.step(Input::Start {
            ticket: 1,
            run,
            accepted,
        });
        run
    }

    fn kill(&mut self, run: RunId) -> &[Action] {
        let request = KillRequest {
            reason: Some("r".to_owned()),
            grace_us: 5 * SECOND,
        };
        self.step(Input::Kill {
            ticket: 2,
            run,
            request,
        })
    }

    fn ready(&mut self, link: LinkId, invocation: &str, held: &[RunId]) -> &[Action] {
        let (place, held) = (place(invocation), held.to_vec());
        self.step(Input::Ready {
            link,
            workflow: name(),
            place,
            held,
        })
    }

    /// A world with a worker that has one run.
    fn working(text: &str) -> (Self, RunId) {
        let mut world = Self::new(text);
        world.step(Input::Units(BTreeMap::new()));
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
            let run = match (&staged.event, replayed.get(&staged.run)) {
                (RunEvent::Queued(accepted), None) => Run::accept(staged.run, staged.at, accepted),
                (event, Some(run)) => run.after(event, staged.at).unwrap(),
                (_, None) => continue,
            };
            replayed.insert(staged.run, run);
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
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::Success,
        is_empty: true,
    });
    assert_eq!(world.orders(), [Order::EventAck { run }]);
    assert_eq!(
        (world.status(run), world.result(run)),
        (Status::Completed, Some("success".into()))
    );
}

#[test]
fn nothing_of_a_worker_starts_before_systemd_was_asked() {
    let mut world = World::new("");
    world.start();
    assert!(!world.starts_unit());
    world.step(Input::Units(BTreeMap::new()));
    assert!(world.starts_unit());
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
    world.engine.workflow(&"broken".parse().unwrap()).fault = Some("broken.yaml:1:1".to_owned());
    for (workflow, answer) in [
        ("nobody", Answer::UnknownWorkflow),
        (
            "broken",
            Answer::BadDefinition("broken.yaml:1:1".to_owned()),
        ),
    ] {
        let accepted = Accepted {
            workflow: workflow.parse().unwrap(),
            prompt: String::new(),
            max_rounds: None,
            dry_run: false,
            trigger: serde_json::json!({}),
        };
        world.step(Input::Start {
            ticket: 7,
            run: RunId::from_bits(99),
            accepted,
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
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::Killed,
        is_empty: false,
    });
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
        (world.orders(), world.runs[&run].position.rounds),
        (vec![], 1)
    );
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::Success,
        is_empty: true,
    });
    assert_eq!(world.status(run), Status::Killed);
}

#[test]
fn an_end_that_was_first_stays() {
    let (mut world, run) = World::working("");
    world.said(1, run, 1, reply("a", "error"));
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::ExitCode(3),
        is_empty: true,
    });
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
    world.step(unit(UnitState::Failed, Some(Exit::Signal(9))));
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
        world.step(Input::Ended {
            link: 1,
            run,
            result,
            is_empty: true,
        });
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
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::MaxRounds,
        is_empty: true,
    });
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
    world.step(unit(UnitState::Starting, Some(Exit::Signal(11))));
    world.ready(2, "i2", &[]);
    assert_eq!((world.dispatched(), world.emptied()), (vec![], vec![run]));
    // What the dead one still says is nobody's word.
    world.said(1, run, 2, reply("b", "ok"));
    assert_eq!(world.runs[&run].position.rounds, 1);
    world.step(Input::Emptied { run });
    assert_eq!(world.dispatched(), [(run, 2)]);
    let lost = world.events.iter().find_map(|staged| match &staged.event {
        RunEvent::WorkerLost {
            invocation,
            attempt,
            cause,
        } => Some((invocation.as_str(), *attempt, cause.as_str())),
        _ => None,
    });
    assert_eq!(lost, Some(("i1", 1, "signal SIGSEGV")));
}

#[test]
fn three_resumes_without_a_round_are_enough() {
    let (mut world, run) = World::working("");
    for (link, attempt) in [(2, 2), (3, 3), (4, 4)] {
        world.step(Input::LinkLost { link: link - 1 });
        world.ready(link, &format!("i{link}"), &[]);
        world.step(Input::Emptied { run });
        assert_eq!(world.dispatched(), [(run, attempt)]);
    }
    world.step(Input::LinkLost { link: 4 });
    world.step(unit(UnitState::Starting, Some(Exit::Code(3))));
    world.ready(5, "i5", &[]);
    world.step(Input::Emptied { run });
    assert_eq!(
        (world.status(run), world.result(run)),
        (Status::Crashed, Some("worker-exit:3".into()))
    );
}

#[test]
fn a_round_in_between_makes_the_count_begin_anew() {
    let (mut world, run) = World::working("");
    let mut round = 0;
    for link in 2..12 {
        world.step(Input::LinkLost { link: link - 1 });
        world.ready(link, &format!("i{link}"), &[]);
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
fn a_unit_that_failed_or_was_refused_ends_what_waits_for_it_and_the_next_start_tries_again() {
    let mut world = World::new("");
    world.step(Input::Units(BTreeMap::new()));
    let (first, second) = (world.start(), world.start());
    world.step(unit(UnitState::Failed, Some(Exit::Code(217))));
    assert_eq!(world.result(first), Some("worker-exit:217".into()));
    assert!(world.starts_unit(), "the next run gets its chance");
    world.step(Input::StartRefused {
        workflow: name(),
        error: "no".to_owned(),
    });
    assert_eq!(world.result(second), Some("unit-refused".into()));
    let third = world.start();
    assert!(world.starts_unit());
    world.step(unit(UnitState::Failed, None));
    assert_eq!(world.result(third), Some("start-limit-hit".into()));
}

#[test]
fn a_worker_that_ends_before_it_is_ready_is_not_started_for_ever() {
    let mut world = World::new("");
    world.step(Input::Units(BTreeMap::new()));
    let run = world.start();
    let mut starts = 1;
    while world.status(run) == Status::Started {
        world.step(Input::StartTaken { workflow: name() });
        world.step(unit(UnitState::Absent, Some(Exit::Code(0))));
        starts += u32::from(world.starts_unit());
    }
    assert_eq!((starts, world.result(run)), (4, Some("worker-died".into())));
}

#[test]
fn while_systemd_is_asked_to_start_a_unit_that_there_is_none_is_no_news() {
    let mut world = World::new("");
    world.step(Input::Units(BTreeMap::new()));
    let run = world.start();
    for _ in 0..9 {
        world.step(unit(UnitState::Absent, None));
        assert!(!world.starts_unit());
    }
    world.step(Input::StartTaken { workflow: name() });
    world.step(unit(UnitState::Absent, None));
    assert!(world.starts_unit());
    assert_eq!(world.status(run), Status::Started);
}

#[test]
fn a_restart_of_nerved_adopts_what_the_worker_has_and_sends_what_it_lacks() {
    let definition = workflow("concurrency: 2");
    let (mut world, first) = World::working("concurrency: 2");
    let second = world.start();
    assert_eq!(world.dispatched(), [(second, 1)]);
    world.said(1, first, 1, reply("a", "ok"));
    let mut world = world.restart(&definition);
    world.step(Input::Units(
        [(
            name(),
            Unit {
                state: UnitState::Active,
                exit: None,
                detail: String::new(),
            },
        )]
        .into(),
    ));
    assert!(!world.starts_unit());
    // The frame of the second never left.
    world.ready(1, "i1", &[first]);
    assert_eq!(world.dispatched(), [(second, 1)]);
    world.said(1, first, 2, reply("b", "ok"));
    world.step(Input::Ended {
        link: 1,
        run: first,
        result: RunResult::Success,
        is_empty: true,
    });
    assert_eq!(world.status(first), Status::Completed);
}

#[test]
fn a_restart_of_nerved_finishes_a_kill() {
    let definition = workflow("");
    let (mut world, run) = World::working("");
    world.kill(run);
    let mut world = world.restart(&definition);
    world.step(Input::Units(BTreeMap::new()));
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
        exit: Some(Exit::Code(1)),
        detail: String::new(),
    };
    world.step(Input::Units([(name(), failed)].into()));
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
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::Killed,
        is_empty: true,
    });
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
    assert_eq!(world.emptied(), []);
    world.advance(Duration::from_secs(1));
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(
        world.runs[&run].ended().unwrap().0.end(),
        (Status::Failed, 124)
    );
}

#[test]
fn time_in_the_queue_does_not_count() {
    let (mut world, first) = World::working("timeout: 10s");
    let second = world.start();
    world.advance(Duration::from_secs(9));
    world.kill(first);
    world.step(Input::Ended {
        link: 1,
        run: first,
        result: RunResult::Killed,
        is_empty: true,
    });
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
    world.step(Input::Ended {
        link: 1,
        run,
        result: RunResult::Killed,
        is_empty: true,
    });
    world.advance(limits::WORKER_IDLE.saturating_sub(Duration::from_micros(1)));
    assert_eq!(world.orders(), []);
    world.advance(Duration::from_micros(1));
    assert_eq!(world.orders(), [Order::Shutdown]);
    // Too late for this worker.
    let next = world.start();
    assert!(!world.starts_unit() && world.dispatched().is_empty());
    world.step(Input::LinkLost { link: 1 });
    world.step(unit(UnitState::Absent, Some(Exit::Code(0))));
    assert!(world.starts_unit());
    world.ready(2, "i2", &[]);
    assert_eq!(world.dispatched(), [(next, 1)]);
}

#[test]
fn a_run_whose_definition_cannot_be_read_any_more_ends_and_harms_nobody() {
    let (world, run) = World::working("");
    let runs: Vec<_> = world.runs.values().cloned().collect();
    let mut world = World::recover(runs, workflow(""), HashMap::new());
    assert_eq!(world.emptied(), [run]);
    world.step(Input::Emptied { run });
    assert_eq!(world.result(run), Some("unit-refused".into()));
}
