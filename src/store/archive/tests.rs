//! Archiving: nothing is lost and nothing is there twice, wherever it is cut off; what is archived is read as before.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde_json::json;

use super::{Listed, Plan, Step, Work, archive, restore};
use crate::engine::{Event, Staged, Turn};
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::retention::{Policy, Retention};
use crate::model::run::{Accepted, BootInstant, Run, RunEvent};
use crate::model::status::RunResult;
use crate::model::time::{DAY_US, day, day_start};
use crate::os::clock;
use crate::store::collect::collect;
use crate::store::log::{Head, Logged};
use crate::store::retention::forget;
use crate::store::upkeep::{Orders, upkeep};
use crate::store::vacuum::{self, vacuum};
use crate::store::{Digest, Error, EventRow, Handle, Round, Store, ThreadRange, cold};

/// The first day of this history.
const FIRST: &str = "2026-02-27";
const HOUR: u64 = DAY_US / 24;

fn id(number: u128) -> RunId {
    RunId::from_bits(0x0193_0000_0000_7000_8000_0000_0000_0000 + number)
}

/// A moment of that day of this history.
fn at(day: u64, hour: u64) -> u64 {
    day_start(FIRST).unwrap() + day * DAY_US + hour * HOUR
}

fn name(number: u64) -> String {
    day(at(number, 0))
}

fn said(round: u32, text: &str) -> RunEvent {
    RunEvent::ThreadWorkflowMessage {
        round,
        message: Message {
            role: "a".to_owned(),
            content: text.to_owned(),
            meta: json!({"status": "ok"}).as_object().unwrap().clone(),
            timestamp: 5,
        },
    }
}

/// Commits what happened to a run of workflow `w`, in one turn: events and when they were.
fn commit(store: &mut Store, id: RunId, events: Vec<(RunEvent, u64)>) {
    let mut turn = Turn::default();
    for (event, at) in events {
        let next = match (turn.runs.get(&id), &event) {
            (None, RunEvent::Queued(accepted)) => Run::accept(id, at, accepted),
            (Some(run), event) => run.after(event, at).unwrap(),
            _ => panic!("begins with {event:?}"),
        };
        let event = Event::Run(id, event);
        turn.events.push(Staged { event, at });
        turn.runs.insert(id, next);
    }
    store.commit(&turn, &[]).unwrap();
}

/// Closes the store and opens it again.
fn again(store: Handle, directory: &Path) -> Store {
    drop(store);
    // Its thread holds the lock as long as it has the database.
    let lock = fs::File::open(directory.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    drop(lock);
    Store::open(directory).unwrap()
}

fn queued(prompt: &str) -> RunEvent {
    RunEvent::Queued(Accepted {
        workflow: "w".parse().unwrap(),
        prompt: prompt.to_owned(),
        max_rounds: None,
        dry_run: false,
        trigger: json!({}),
        key: None,
    })
}

fn life(prompt: &str, begins: u64, rounds: u32, ends: u64) -> Vec<(RunEvent, u64)> {
    let boot_id = "b".to_owned();
    let since = BootInstant {
        boot_id: boot_id.clone(),
        boot_us: 1,
    };
    let started = RunEvent::Started {
        definition: "d".to_owned(),
        max_rounds: 99,
        since,
    };
    let place = crate::model::run::Place {
        invocation: "i".to_owned(),
        cgroup: "/c".to_owned(),
    };
    let mut life = vec![
        (queued(prompt), begins),
        (started, begins),
        (
            RunEvent::Dispatched {
                place,
                attempt: 1,
                boot_id,
            },
            begins,
        ),
    ];
    life.extend((1..=rounds).map(|round| (said(round, &format!("{prompt} {round}")), begins)));
    let ended = RunEvent::Ended {
        result: RunResult::Success,
        detail: None,
    };
    life.push((ended, ends));
    life
}

fn open(directory: &Path) -> Store {
    let mut store = Store::open(directory).unwrap();
    let parsed = crate::config::definition::parse(
        "w.yaml",
        None,
        b"version: 1\nname: w\nroles: {a: {exec: [a]}}\ngraph: {$START: a, a: {ok: $END}}\n",
    );
    let mut definition = parsed.definition.unwrap();
    definition.digest = "d".to_owned();
    store.put_definition(&definition, b"bytes").unwrap();
    store
}

/// Four runs: one of the first day, one that lasts till the third, one with a long text, one that has not ended.
fn history(directory: &Path) {
    let mut store = open(directory);
    commit(&mut store, id(1), life("one", at(0, 1), 3, at(0, 2)));
    commit(&mut store, id(2), life("two", at(0, 3), 2, at(2, 1)));
    commit(
        &mut store,
        id(3),
        life(&"long".repeat(20_000), at(1, 4), 1, at(1, 5)),
    );
    let mut open = life("open", at(1, 6), 2, 0);
    open.pop();
    commit(&mut store, id(4), open);
}

const EVERYTHING: Plan = Plan {
    ended_by: u64::MAX / 4,
    max_days: None,
    compressed: false,
    dry_run: false,
};

/// Days of this history, not what the store itself did today.
fn plan(days: u64) -> Plan {
    Plan {
        ended_by: at(days, 0),
        ..EVERYTHING
    }
}

fn live(store: &Handle) -> Vec<Logged> {
    let all = |store: &mut Store| {
        let sql = format!("SELECT {} FROM events ORDER BY seq", Logged::COLUMNS);
        let mut select = store.connection.prepare(&sql)?;
        Ok(select
            .query_map([], Logged::of)?
            .collect::<Result<_, _>>()?)
    };
    store.call_and_wait(all).unwrap()
}

fn listed(store: &Handle) -> Vec<Listed> {
    store.call_and_wait(|store| store.archived()).unwrap()
}

/// All files of the archive on disk.
fn files(directory: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(cold::folder(directory)) else {
        return BTreeSet::new();
    };
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// The whole log, wherever it is, is one chain from the first event on, and nothing is there twice; says how many
/// events, leaving out those of types that the store writes about itself.
fn whole(store: &Handle, directory: &Path) -> usize {
    let mut all = live(store);
    for file in listed(store) {
        let events = cold::read(&cold::folder(directory).join(&file.file)).unwrap();
        let events: Vec<_> = events.expecting(&file.digest).map(Result::unwrap).collect();
        assert_eq!(events.len() as u64, file.rows);
        assert_eq!(
            (events[0].seq, events.last().unwrap().seq),
            (file.first, file.last)
        );
        assert!(events.iter().all(|event| day(event.at) == file.day));
        all.extend(events);
    }
    all.sort_by_key(|event| event.seq);
    let mut head = Head::default();
    for event in &all {
        assert_eq!(event.seq, head.seq + 1, "missing or twice");
        head = head.after(&event.entry());
        assert_eq!(head, event.head());
    }
    assert_eq!(head, store.call_and_wait(|store| Ok(store.head)).unwrap());
    let own = ["archived", "restored", "forgotten"];
    all.iter()
        .filter(|event| !own.contains(&&*event.event_type))
        .count()
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
}

/// What can be read of every run.
fn readable(store: &Handle) -> Vec<(Vec<Round>, Vec<EventRow>)> {
    let runtime = runtime();
    (1..=4)
        .map(|number| {
            let thread = store.thread(id(number), ThreadRange::default());
            let thread = runtime.block_on(thread).unwrap();
            (thread, runtime.block_on(store.events(id(number))).unwrap())
        })
        .collect()
}

#[test]
// Parity 113, 114, 115, 116.
fn whole_days_go_and_what_belongs_to_open_runs_stays() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    let before = whole(&store, directory.path());
    let readable_before = readable(&store);
    let dry = archive(
        &store,
        &Plan {
            dry_run: true,
            ..plan(2)
        },
    )
    .unwrap();
    assert!(listed(&store).is_empty() && files(directory.path()).is_empty());
    let done = archive(&store, &plan(2)).unwrap();
    assert_eq!(done, dry);
    let days: Vec<_> = done
        .iter()
        .map(|done| (done.day.clone(), done.rows))
        .collect();
    assert_eq!(days, [(name(0), 12), (name(1), 5)]);
    assert_eq!(
        files(directory.path()),
        [name(0), name(1)].map(|day| format!("{day}.jsonl")).into()
    );
    assert!(listed(&store).iter().all(|file| file.cleared == file.last));
    assert_eq!(whole(&store, directory.path()), before);
    assert_eq!(readable(&store), readable_before);
    // The open run's five, the end on the third day, the definition, and that it was archived, twice.
    assert_eq!(live(&store).len(), 9);
    assert!(archive(&store, &plan(2)).unwrap().is_empty());
}

#[test]
// Parity 117.
fn what_stayed_goes_into_a_further_file() {
    for compressed in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        history(directory.path());
        let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
        let before = whole(&store, directory.path());
        let plan = Plan {
            compressed,
            ..plan(9)
        };
        archive(&store, &plan).unwrap();
        let first: BTreeMap<_, _> = files(directory.path())
            .into_iter()
            .map(|file| {
                (
                    file.clone(),
                    fs::read(cold::folder(directory.path()).join(file)).unwrap(),
                )
            })
            .collect();
        let mut store = again(store, directory.path());
        let event = RunEvent::Ended {
            result: RunResult::Success,
            detail: None,
        };
        let open = store.open_runs().unwrap().remove(0);
        let turn = Turn {
            events: vec![Staged {
                event: Event::Run(id(4), event.clone()),
                at: at(3, 0),
            }],
            runs: BTreeMap::from([(id(4), open.after(&event, at(3, 0)).unwrap())]),
            ..Turn::default()
        };
        store.commit(&turn, &[]).unwrap();
        let store = Handle::spawn(store).unwrap();
        let readable_before = readable(&store);
        archive(&store, &plan).unwrap();
        let further = if compressed { "2.jsonl.zst" } else { "2.jsonl" };
        assert!(files(directory.path()).contains(&format!("{}.{further}", name(1))));
        for (file, bytes) in first {
            assert_eq!(
                fs::read(cold::folder(directory.path()).join(file)).unwrap(),
                bytes
            );
        }
        assert_eq!(whole(&store, directory.path()), before + 1);
        assert_eq!(readable(&store), readable_before);
    }
}

#[test]
// Parity 118.
fn so_many_days_go_and_no_more_the_oldest_first() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    for expected in [name(0), name(1), name(2)] {
        let plan = Plan {
            max_days: Some(1),
            ..plan(9)
        };
        let done = archive(&store, &plan).unwrap();
        assert_eq!(
            done.into_iter().map(|done| done.day).collect::<Vec<_>>(),
            [expected]
        );
    }
    // A day that has not ended by then stays.
    assert!(archive(&store, &plan(9)).unwrap().is_empty());
}

#[test]
fn the_newest_event_of_all_is_always_in_the_database() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    let before = whole(&store, directory.path());
    archive(&store, &EVERYTHING).unwrap();
    assert_eq!(live(&store).last().unwrap().event_type, "archived");
    assert_eq!(whole(&store, directory.path()), before);
    let store = Handle::spawn(again(store, directory.path())).unwrap();
    assert_eq!(whole(&store, directory.path()), before);
}

/// A hook that stops at the `number`th moment, and what that was.
fn stop_at(number: u32, stopped: &Cell<Option<Step>>) -> impl Fn(Step) -> Result<(), Error> {
    let count = Cell::new(0);
    move |step| {
        count.set(count.get() + 1);
        if count.get() == number {
            stopped.set(Some(step));
            return Err(Error::Damaged("stopped".to_owned()));
        }
        Ok(())
    }
}

#[test]
// Parity 114, 117.
fn a_crash_between_any_two_steps_loses_nothing_and_repeats_nothing() {
    let mut steps = BTreeSet::new();
    for number in 1.. {
        let directory = tempfile::tempdir().unwrap();
        history(directory.path());
        // More than one batch.
        let mut store = open(directory.path());
        commit(&mut store, id(5), life("five", at(0, 5), 600, at(0, 6)));
        let store = Handle::spawn(store).unwrap();
        let before = whole(&store, directory.path());
        let readable_before = readable(&store);
        let stopped = Cell::new(None);
        let hook = stop_at(number, &stopped);
        let cut = Work::new(&store, &hook).unwrap().archive(&plan(9));
        assert_eq!(cut.is_err(), stopped.get().is_some(), "{cut:?}");
        let store = Handle::spawn(again(store, directory.path())).unwrap();
        // As it was left, and once more archived.
        assert_eq!(readable(&store), readable_before);
        archive(&store, &plan(9)).unwrap();
        assert_eq!(whole(&store, directory.path()), before);
        assert_eq!(readable(&store), readable_before);
        let expected = listed(&store).into_iter().map(|file| file.file).collect();
        assert_eq!(files(directory.path()), expected);
        assert_eq!(expected.len(), 3);
        match stopped.get() {
            Some(step) => steps.insert(format!("{step:?}")),
            None => break,
        };
    }
    assert_eq!(
        steps,
        ["Written", "Renamed", "Verified", "Listed", "Cleared"]
            .map(str::to_owned)
            .into()
    );
}

#[test]
fn a_day_comes_back_whatever_happens_meanwhile() {
    let mut steps = BTreeSet::new();
    for number in 1.. {
        let directory = tempfile::tempdir().unwrap();
        history(directory.path());
        let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
        let before = whole(&store, directory.path());
        let readable_before = readable(&store);
        archive(&store, &plan(9)).unwrap();
        let stopped = Cell::new(None);
        let hook = stop_at(number, &stopped);
        let cut = Work::new(&store, &hook).unwrap().restore(&name(0));
        assert_eq!(cut.is_err(), stopped.get().is_some(), "{cut:?}");
        let store = Handle::spawn(again(store, directory.path())).unwrap();
        assert_eq!(readable(&store), readable_before);
        if stopped.get().is_some_and(|step| step != Step::Unlisted) {
            assert_eq!(restore(&store, &name(0)).unwrap(), Some(12));
        }
        assert_eq!(whole(&store, directory.path()), before);
        assert_eq!(readable(&store), readable_before);
        assert_eq!(listed(&store).len(), 2);
        // And the day can be archived again.
        archive(&store, &plan(9)).unwrap();
        assert_eq!(whole(&store, directory.path()), before);
        assert_eq!(readable(&store), readable_before);
        let expected: BTreeSet<_> = listed(&store).into_iter().map(|file| file.file).collect();
        assert_eq!(files(directory.path()), expected);
        assert_eq!(expected.len(), 3);
        match stopped.get() {
            Some(step) => steps.insert(format!("{step:?}")),
            None => break,
        };
    }
    assert_eq!(
        steps,
        ["Reopened", "Returned", "Unlisted"]
            .map(str::to_owned)
            .into()
    );
    let directory = tempfile::tempdir().unwrap();
    let store = Handle::spawn(open(directory.path())).unwrap();
    assert_eq!(restore(&store, &name(0)).unwrap(), None);
}

#[test]
fn a_restore_that_was_cut_off_is_undone_by_the_next_archiving() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    let before = whole(&store, directory.path());
    archive(&store, &plan(9)).unwrap();
    let live_before = live(&store).len();
    let stopped = Cell::new(None);
    let hook = stop_at(2, &stopped);
    assert!(Work::new(&store, &hook).unwrap().restore(&name(0)).is_err());
    assert_eq!(live(&store).len(), live_before + 12);
    assert!(archive(&store, &plan(9)).unwrap().is_empty());
    assert_eq!(live(&store).len(), live_before);
    assert_eq!(whole(&store, directory.path()), before);
}

#[test]
fn a_damaged_or_missing_file_is_named_and_nothing_is_deleted_or_served() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    archive(&store, &plan(9)).unwrap();
    let file = format!("{}.jsonl", name(0));
    let path = cold::folder(directory.path()).join(&file);
    let good = fs::read_to_string(&path).unwrap();
    let live_before = live(&store);
    let runtime = runtime();
    let fails = || {
        let thread = runtime.block_on(store.thread(id(1), ThreadRange::default()));
        let events = runtime.block_on(store.events(id(1)));
        let errors = [
            thread.unwrap_err(),
            events.unwrap_err(),
            restore(&store, &name(0)).unwrap_err(),
        ];
        for error in errors {
            assert!(error.to_string().contains(&file), "{error}");
        }
        assert_eq!(live(&store), live_before);
        // The runs of other days are as they were.
        assert!(
            runtime
                .block_on(store.thread(id(3), ThreadRange::default()))
                .is_ok()
        );
    };
    fs::write(&path, good.replace("one 2", "one 3")).unwrap();
    fails();
    fs::remove_file(&path).unwrap();
    fails();
}

#[test]
fn a_file_that_nobody_lists_and_that_has_more_than_the_database_stays() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    archive(&store, &plan(1)).unwrap();
    let folder = cold::folder(directory.path());
    let first = format!("{}.jsonl", name(0));
    // Of the first day, which is gone from the database, under the second day's name.
    let foreign = format!("{}.jsonl", name(1));
    fs::copy(folder.join(&first), folder.join(&foreign)).unwrap();
    let unfinished = format!("{}.3.jsonl.zst.new", name(1));
    for other in ["notes.txt", &unfinished] {
        fs::write(folder.join(other), "x").unwrap();
    }
    archive(&store, &plan(9)).unwrap();
    let expected = [
        first.clone(),
        foreign.clone(),
        format!("{}.2.jsonl", name(1)),
        format!("{}.jsonl", name(2)),
        "notes.txt".to_owned(),
    ];
    assert_eq!(files(directory.path()), expected.into());
    assert_eq!(
        fs::read(folder.join(first)).unwrap(),
        fs::read(folder.join(foreign)).unwrap()
    );
}

#[test]
// Parity 120.
fn parts_of_an_archived_thread_are_those_of_a_live_one() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    let runtime = runtime();
    let all = || {
        let mut all = Vec::new();
        for number in [1, 2, 3] {
            for limit in [None, Some(0), Some(1), Some(2), Some(9)] {
                for before in [None, Some(1), Some(2), Some(3), Some(9)] {
                    for bytes in [None, Some(1), Some(400), Some(100_000)] {
                        for after in [None, Some(0), Some(1), Some(u32::MAX)] {
                            let range = ThreadRange {
                                limit,
                                before,
                                after,
                                bytes,
                            };
                            all.push(runtime.block_on(store.thread(id(number), range)).unwrap());
                        }
                    }
                }
            }
        }
        all
    };
    let live = all();
    archive(&store, &plan(9)).unwrap();
    assert_eq!(all(), live);
}

#[test]
fn a_run_whose_clock_was_set_back_is_read_whole() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    let mut life = life("back", at(3, 1), 3, at(3, 2));
    life[4].1 = at(1, 0);
    commit(&mut store, id(1), life);
    let store = Handle::spawn(store).unwrap();
    let runtime = runtime();
    let thread = || {
        runtime
            .block_on(store.thread(id(1), ThreadRange::default()))
            .unwrap()
    };
    let before = thread();
    assert_eq!(archive(&store, &plan(9)).unwrap().len(), 2);
    assert_eq!((thread(), before.len()), (before.clone(), 4));
}

#[test]
fn blobs_stay_as_long_as_anything_refers_to_them() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let mut store = Store::open(directory.path()).unwrap();
    let put = |text: &str| store.blobs().put(text.as_bytes()).unwrap().0;
    let (named, named_old, nobodys) = (put("named"), put("named long ago"), put("nobody's"));
    commit(
        &mut store,
        id(6),
        life(&format!("see {named}!"), at(3, 1), 1, at(3, 2)),
    );
    commit(
        &mut store,
        id(7),
        life(&format!("see {named_old}"), at(0, 7), 1, at(0, 8)),
    );
    let text = Digest::of("long".repeat(20_000).as_bytes());
    let blobs = store.blobs().clone();
    let store = Handle::spawn(store).unwrap();
    let now = clock::wall_us() + HOUR;
    // They are younger than that.
    assert_eq!(collect(&store, now - DAY_US).unwrap(), 0);
    archive(&store, &plan(2)).unwrap();
    assert_eq!(collect(&store, now).unwrap(), 1);
    let is_there = |digest: &Digest| blobs.get(digest).unwrap().is_some();
    assert!(is_there(&named) && is_there(&named_old) && is_there(&text) && !is_there(&nobodys));
    restore(&store, &name(1)).unwrap();
    assert_eq!(collect(&store, now).unwrap(), 0);
    assert!(is_there(&text));
}

#[test]
fn ended_runs_are_forgotten_once_all_of_them_is_archived() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    let known = || -> Vec<u128> {
        let is_known = |number: &u128| {
            let run = id(*number);
            store
                .call_and_wait(move |store| store.run(run))
                .unwrap()
                .is_some()
        };
        (1..=4).filter(is_known).collect()
    };
    let policy = |days, runs| Policy {
        retention: Retention { days, runs },
        ..Policy::default()
    };
    let now = at(9, 0);
    let strict = policy(Some(0), Some(0));
    assert_eq!(forget(&store, &strict, now).unwrap(), 0);
    archive(&store, &plan(2)).unwrap();
    // The second ended on a day that is not archived, the fourth has not ended.
    let before = whole(&store, directory.path());
    assert_eq!(forget(&store, &Policy::default(), now).unwrap(), 0);
    assert_eq!(forget(&store, &policy(Some(9), Some(3)), now).unwrap(), 0);
    let spared = Policy {
        of_workflows: [(
            "w".to_owned(),
            Retention {
                days: Some(99),
                runs: Some(99),
            },
        )]
        .into(),
        ..strict.clone()
    };
    assert_eq!(forget(&store, &spared, now).unwrap(), 0);
    assert_eq!(known(), [1, 2, 3, 4]);
    assert_eq!(forget(&store, &policy(None, Some(2)), now).unwrap(), 1);
    assert_eq!(known(), [2, 3, 4]);
    assert_eq!(forget(&store, &policy(Some(8), None), now).unwrap(), 0);
    assert_eq!(forget(&store, &policy(Some(7), None), now).unwrap(), 1);
    assert_eq!(known(), [2, 4]);
    archive(&store, &plan(9)).unwrap();
    assert_eq!(forget(&store, &strict, now).unwrap(), 1);
    assert_eq!(known(), [4]);
    assert_eq!(whole(&store, directory.path()), before);
    let forgotten: Vec<_> = live(&store)
        .into_iter()
        .filter(|event| event.event_type == "forgotten")
        .collect();
    let runs: Vec<_> = forgotten
        .iter()
        .map(|event| event.reference.clone())
        .collect();
    assert_eq!(runs, [1, 3, 2].map(|number| id(number).to_string()));
    assert_eq!(forgotten[0].payload, r#"{"workflow":"w"}"#);
}

#[test]
fn what_would_be_done_is_what_is_done() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Handle::spawn(Store::open(directory.path()).unwrap()).unwrap();
    let policy = Policy {
        retention: Retention {
            days: Some(0),
            runs: Some(0),
        },
        ..Policy::default()
    };
    let now = at(9, 0);
    let mut forgotten = 0;
    for max_days in [Some(1), Some(1), None, None] {
        let orders = |dry_run| Orders {
            older_than: 0,
            max_days,
            vacuum: false,
            dry_run,
        };
        let before = live(&store);
        let planned = upkeep(&store, &orders(true), &policy, now).unwrap();
        assert_eq!(live(&store), before);
        let done = upkeep(&store, &orders(false), &policy, now).unwrap();
        assert_eq!(planned, done);
        forgotten += done.forgotten;
    }
    // The fourth has not ended.
    assert_eq!(forgotten, 3);
}

#[test]
fn the_newest_of_very_many_runs_stay() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store
        .connection
        .execute_batch(
            "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 10000)
             INSERT INTO workflow_runs (run, tail, workflow, status, killing, rounds, dry_run, trigger, created_at, ended_at)
             SELECT 'r' || n, n, 'w' || (n % 2), 'completed', 0, 0, 0, '{}', n / 10, n FROM n",
        )
        .unwrap();
    let store = Handle::spawn(store).unwrap();
    let policy = Policy {
        retention: Retention {
            days: None,
            runs: Some(4_500),
        },
        ..Policy::default()
    };
    assert_eq!(forget(&store, &policy, 0).unwrap(), 1_000);
    let left = |store: &mut Store| {
        let sql = "SELECT count(*), min(ended_at) FROM workflow_runs";
        Ok(store
            .connection
            .query_row(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
    };
    let left: (u32, u32) = store.call_and_wait(left).unwrap();
    assert_eq!(left, (9_000, 1_001));
    assert_eq!(forget(&store, &policy, 0).unwrap(), 0);
}

#[test]
// Parity 118.
fn space_goes_back_to_the_filesystem() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    for number in 1..=20 {
        commit(
            &mut store,
            id(number),
            life(&"x".repeat(60_000), at(0, 1), 1, at(0, 2)),
        );
    }
    let store = Handle::spawn(store).unwrap();
    let size = || {
        fs::metadata(directory.path().join("nerve.db"))
            .unwrap()
            .len()
    };
    vacuum(&store).unwrap();
    let before = size();
    archive(&store, &plan(9)).unwrap();
    assert!(vacuum(&store).unwrap() > 1_000_000);
    assert!(size() < before - 1_000_000, "{before} {}", size());
    assert_eq!(vacuum(&store).unwrap(), 0);
    assert_eq!(whole(&store, directory.path()), 20 * 5 + 1);
}

#[test]
fn a_database_that_cannot_give_space_back_is_made_to() {
    let directory = tempfile::tempdir().unwrap();
    history(directory.path());
    let store = Store::open(directory.path()).unwrap();
    let mode = |store: &Store| -> u32 {
        let pragma = "PRAGMA auto_vacuum";
        store
            .connection
            .query_row(pragma, [], |row| row.get(0))
            .unwrap()
    };
    assert_eq!(mode(&store), 2);
    store
        .connection
        .execute_batch("PRAGMA auto_vacuum = NONE; VACUUM")
        .unwrap();
    assert_eq!(mode(&store), 0);
    vacuum::install(&store.connection).unwrap();
    assert_eq!(mode(&store), 2);
    let store = Handle::spawn(store).unwrap();
    whole(&store, directory.path());
}
