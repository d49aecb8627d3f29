//! The store: what is committed is there, what is there never changes, and the rows are what the events add up to.

use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::engine::Staged;
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::run::{Accepted, BootInstant, KillRequest, Place, Run};
use crate::model::status::{RunResult, Status};
use crate::model::worker::{Cause, Death};

fn id(number: u128) -> RunId {
    RunId::from_bits(0x0193_0000_0000_7000_8000_0000_0000_0000 + number)
}

fn accepted(prompt: &str) -> RunEvent {
    RunEvent::Queued(Accepted {
        workflow: "w".parse().unwrap(),
        prompt: prompt.to_owned(),
        max_rounds: Some(7),
        dry_run: false,
        trigger: json!({"type": "client", "uid": 0}),
        key: None,
    })
}

fn life() -> Vec<RunEvent> {
    let message = |role: &str| Message {
        role: role.to_owned(),
        content: format!("{role} said"),
        meta: json!({"status": "ok", "stderr": "noise"})
            .as_object()
            .unwrap()
            .clone(),
        timestamp: 5,
    };
    vec![
        accepted("do it"),
        RunEvent::Started {
            definition: "d".to_owned(),
            max_rounds: 7,
            since: BootInstant {
                boot_id: "b".to_owned(),
                boot_us: 1,
            },
        },
        RunEvent::Dispatched {
            place: Place {
                invocation: "i".to_owned(),
                cgroup: "/c".to_owned(),
            },
            attempt: 1,
            boot_id: "b".to_owned(),
        },
        RunEvent::ThreadWorkflowMessage {
            round: 1,
            message: message("a"),
        },
        RunEvent::WorkerLost {
            invocation: "i".to_owned(),
            attempt: 1,
            death: Death::of(Cause::Signal),
        },
        RunEvent::Dispatched {
            place: Place {
                invocation: "j".to_owned(),
                cgroup: "/c".to_owned(),
            },
            attempt: 2,
            boot_id: "b".to_owned(),
        },
        RunEvent::ThreadWorkflowMessage {
            round: 2,
            message: message("b"),
        },
        RunEvent::KillRequested(KillRequest {
            reason: Some("why".to_owned()),
            grace_us: 1,
            by: None,
        }),
        RunEvent::Ended {
            result: RunResult::Killed,
            detail: None,
        },
    ]
}

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let mut store = Store::open(directory.path()).unwrap();
    let definition = crate::config::definition::parse(
        "w.yaml",
        None,
        b"version: 1\nname: w\nroles: {a: {exec: [a]}}\ngraph: {$START: a, a: {ok: $END}}\n",
    );
    let mut definition = definition.definition.unwrap();
    definition.digest = "d".to_owned();
    store.put_definition(&definition, b"bytes").unwrap();
    (directory, store)
}

/// Commits events one turn each; returns the run as they add up to.
fn commit(store: &mut Store, id: RunId, events: &[RunEvent]) -> Run {
    let mut run: Option<Run> = None;
    for (at, event) in (1..).zip(events) {
        let next = match (&run, event) {
            (None, RunEvent::Queued(accepted)) => Run::accept(id, at, accepted),
            (Some(run), event) => run.after(event, at).unwrap(),
            _ => panic!("begins with {event:?}"),
        };
        let event = Event::Run(id, event.clone());
        let turn = Turn {
            events: vec![Staged { event, at }],
            runs: BTreeMap::from([(id, next.clone())]),
            ..Turn::default()
        };
        store.commit(&turn).unwrap();
        run = Some(next);
    }
    run.unwrap()
}

#[test]
fn open_runs_are_rebuilt_from_their_events_at_every_point_of_a_life() {
    let life = life();
    for length in 1..=life.len() {
        let (directory, mut store) = store();
        let run = commit(&mut store, id(1), &life[..length]);
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        let open = store.open_runs().unwrap();
        assert_eq!(
            open,
            if run.status().is_terminal() {
                vec![]
            } else {
                vec![run.clone()]
            }
        );
        let row = store.run(id(1)).unwrap().unwrap();
        assert_eq!(
            (row.status, row.killing, row.rounds),
            (run.status(), run.is_killing(), run.position().rounds)
        );
        assert_eq!(row.exit_code, run.ended().map(|(result, _)| result.end().1));
        assert_eq!(store.events(id(1)).unwrap().len(), length);
    }
}

#[test]
fn what_was_said_and_how_a_run_ended_cannot_be_changed() {
    let (_directory, mut store) = store();
    commit(&mut store, id(1), &life());
    for statement in [
        "UPDATE events SET payload = '{}' WHERE seq = 1",
        "UPDATE workflow_runs SET exit_code = 0",
        "UPDATE workflow_runs SET status = 'completed'",
    ] {
        assert!(
            store.connection.execute(statement, []).is_err(),
            "{statement}"
        );
    }
    assert_eq!(store.run(id(1)).unwrap().unwrap().status, Status::Killed);
}

#[test]
fn a_thread_is_read_whole_by_its_end_and_in_pieces() {
    let (_directory, mut store) = store();
    commit(&mut store, id(1), &life());
    let rounds = |limit, before, bytes| -> Vec<u32> {
        let range = ThreadRange {
            limit,
            before,
            bytes,
        };
        store
            .thread(id(1), &range)
            .unwrap()
            .iter()
            .map(|round| round.round)
            .collect()
    };
    assert_eq!(rounds(None, None, None), [0, 1, 2]);
    assert_eq!(rounds(Some(2), None, None), [1, 2]);
    assert_eq!(rounds(Some(9), None, None), [1, 2]);
    assert!(rounds(Some(0), None, None).is_empty());
    assert_eq!(rounds(None, Some(2), None), [0, 1]);
    assert_eq!(rounds(Some(1), Some(2), None), [1]);
    assert_eq!(rounds(None, Some(1), None), [0]);
    assert_eq!(rounds(None, Some(99), None), [0, 1, 2]);
    assert_eq!(rounds(None, None, Some(1)), [2]);
    assert_eq!(rounds(None, None, Some(300)), [1, 2]);
    let start = &store.thread(id(1), &ThreadRange::default()).unwrap()[0].message;
    assert_eq!(
        (start.role.as_str(), start.content.as_str()),
        ("__start__", "do it")
    );
    assert_eq!(start.meta["maxRounds"], 7);
}

#[test]
fn events_leave_out_what_is_large_and_said_elsewhere() {
    let (_directory, mut store) = store();
    commit(&mut store, id(1), &life());
    let all: String = store
        .events(id(1))
        .unwrap()
        .iter()
        .map(|event| event.payload.clone())
        .collect();
    assert!(all.contains("\"round\":1") && all.contains("\"cause\":\"signal\""));
    for large in ["do it", "a said", "noise"] {
        assert!(!all.contains(large), "{large}");
    }
}

#[test]
fn a_tail_finds_one_run_none_or_several() {
    let (_directory, mut store) = store();
    for number in [0x1a, 0x2a, 0x1b] {
        commit(&mut store, id(number), &[accepted("")]);
    }
    let find = |tail: &str| store.find(&tail.parse().unwrap()).unwrap();
    assert_eq!(find("1a"), Found::One(id(0x1a)));
    assert_eq!(find(&id(0x2a).to_string()), Found::One(id(0x2a)));
    assert_eq!(find("a"), Found::Several);
    assert_eq!(find("c"), Found::None);
    assert_eq!(find("F"), Found::None);
}

#[test]
fn runs_are_listed_newest_first() {
    let (_directory, mut store) = store();
    for number in 1..=3 {
        commit(&mut store, id(number), &[accepted("")]);
    }
    commit(&mut store, id(4), &life());
    let list = |workflow: Option<&str>, active, limit| -> Vec<String> {
        let workflow = workflow.map(|name| name.parse().unwrap());
        let rows = store
            .runs(&RunFilter {
                workflow,
                active,
                limit,
            })
            .unwrap();
        rows.into_iter().map(|row| row.run).collect()
    };
    let ids = |numbers: &[u128]| -> Vec<String> {
        numbers
            .iter()
            .map(|number| id(*number).to_string())
            .collect()
    };
    assert_eq!(list(None, false, 2), ids(&[4, 3]));
    assert_eq!(list(Some("w"), true, 9), ids(&[3, 2, 1]));
    assert_eq!(list(Some("v"), false, 9), ids(&[]));
}

#[test]
fn a_second_nerved_a_newer_schema_and_a_damaged_file_are_refused_untouched() {
    let (directory, store) = store();
    assert!(matches!(
        Store::open(directory.path()),
        Err(Error::InUse(_))
    ));
    store
        .connection
        .pragma_update(None, "user_version", 999)
        .unwrap();
    drop(store);
    assert!(matches!(
        Store::open(directory.path()),
        Err(Error::TooNew { found: 999, .. })
    ));
    let file = directory.path().join("nerve.db");
    std::fs::write(&file, b"this is no database, however long it is made to be").unwrap();
    assert!(Store::open(directory.path()).is_err());
    assert!(
        std::fs::read(&file)
            .unwrap()
            .starts_with(b"this is no database")
    );
}

#[test]
fn a_definition_stays_under_its_digest_and_the_last_one_is_known() {
    let (_directory, store) = store();
    assert_eq!(store.definition("d").unwrap(), b"bytes");
    assert_eq!(
        store
            .last_definition(&"w".parse().unwrap())
            .unwrap()
            .as_deref(),
        Some("d")
    );
    assert_eq!(store.last_definition(&"v".parse().unwrap()).unwrap(), None);
}

#[test]
// Parity 017.
fn migrating_is_done_once() {
    let (directory, store) = store();
    drop(store);
    for _ in 0..2 {
        drop(Store::open(directory.path()).unwrap());
    }
}
