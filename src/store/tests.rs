//! The store: what is committed is there, what is there never changes, and the rows are what the events add up to.

use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::engine::{Event, Staged, Turn};
use crate::model::audit::{Audit, Verb};
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::run::{Accepted, BootInstant, KillRequest, Place, Run, RunEvent};
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
    go_on(store, id, None, events)
}

fn go_on(store: &mut Store, id: RunId, mut run: Option<Run>, events: &[RunEvent]) -> Run {
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
        // Who asked for it is beside the run's own events, and never taken for one.
        let audit = Audit {
            verb: Verb::Kill,
            subject: id.to_string(),
            by: None,
            reason: None,
            outcome: Audit::DONE.to_owned(),
            at,
        };
        store.commit(&turn, &[audit]).unwrap();
        run = Some(next);
    }
    run.unwrap()
}

#[test]
fn what_is_put_aside_is_enough_for_two_hundred_kills_and_ends() {
    let (_directory, mut store) = store();
    let (before, after) = (&life()[..7], &life()[7..]);
    let mut runs = Vec::new();
    for number in 0..20 {
        runs.push((id(number), commit(&mut store, id(number), before)));
    }
    assert_eq!(store.move_log().unwrap().used, 0);
    for (id, run) in runs {
        go_on(&mut store, id, Some(run), after);
    }
    // A kill and an end, each a turn of its own.
    let used = store.log().unwrap().used;
    assert!(used > 0 && used * 200 / 20 < RESERVE / 2, "{used}");
}

#[test]
fn who_asked_for_a_run_is_no_event_of_its_life() {
    let (_directory, mut store) = store();
    let run = commit(&mut store, id(1), &life()[..3]);
    let audit = crate::model::audit::Audit {
        verb: crate::model::audit::Verb::Start,
        subject: id(1).to_string(),
        by: None,
        reason: None,
        outcome: "done".to_owned(),
        at: 9,
    };
    store.commit(&Turn::default(), &[audit]).unwrap();
    assert_eq!(store.open_runs().unwrap(), [run]);
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
            ..ThreadRange::default()
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
    let newer = |limit, before, after| -> Vec<u32> {
        let range = ThreadRange {
            limit,
            before,
            after: Some(after),
            bytes: None,
        };
        let thread = store.thread(id(1), &range).unwrap();
        thread.iter().map(|round| round.round).collect()
    };
    assert_eq!(newer(None, None, 0), [1, 2]);
    assert_eq!(newer(None, None, 1), [2]);
    assert_eq!(newer(None, Some(2), 0), [1]);
    assert_eq!(newer(Some(1), None, 0), [2]);
    assert!(newer(None, None, 2).is_empty() && newer(None, Some(1), 9).is_empty());
    let start = store.thread(id(1), &ThreadRange::default()).unwrap()[0]
        .clone()
        .into_message()
        .unwrap();
    assert_eq!(
        (start.role.as_str(), start.content.as_str()),
        ("__start__", "do it")
    );
    assert_eq!(start.meta["maxRounds"], 7);
    let said = r#"{"type":"thread-workflow-message","round":3,"message":{"role":"a","content":"","meta":[],"timestamp":1}}"#;
    store
        .connection
        .execute(
            "INSERT INTO events SELECT 1 + max(seq), source, ?1, ref, ?2, NULL, at, hash FROM events",
            [RunEvent::MESSAGE, said],
        )
        .unwrap();
    let damaged = store.thread(id(1), &ThreadRange::default()).unwrap_err();
    let Error::Event { seq: 20, source } = damaged else {
        panic!("{damaged}");
    };
    assert_eq!(source.to_string(), "its meta is no object");
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
    // However far apart they were accepted.
    let apart = "UPDATE workflow_runs SET seq = seq + 20000 WHERE run = ?1";
    store
        .connection
        .execute(apart, [id(0x2a).to_string()])
        .unwrap();
    assert_eq!(find("2a"), Found::One(id(0x2a)));
    assert_eq!(find("1a"), Found::One(id(0x1a)));
    assert_eq!(find("a"), Found::Several);
    assert_eq!(find("c"), Found::None);
    store
        .connection
        .execute("DELETE FROM workflow_runs", [])
        .unwrap();
    assert_eq!(find("a"), Found::None);
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
                ..RunFilter::default()
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
fn long_texts_are_blobs_and_the_thread_has_them() {
    let (_directory, mut store) = store();
    let long = "ü".repeat(100_000);
    let mut life = life();
    life[0] = accepted(&long);
    let RunEvent::ThreadWorkflowMessage { message, .. } = &mut life[3] else {
        panic!("round 1");
    };
    message.content.clone_from(&long);
    commit(&mut store, id(1), &life);
    let thread = store.thread(id(1), &ThreadRange::default()).unwrap();
    assert_eq!(thread[0].content, long);
    assert_eq!(thread[1].content, long);
    assert_eq!(thread[2].content, "b said");
    let count = |sql: &str| -> u32 {
        store
            .connection
            .query_row(sql, [], |row| row.get(0))
            .unwrap()
    };
    assert_eq!(count("SELECT count(DISTINCT blob) FROM events"), 1);
    assert!(count("SELECT max(length(payload)) FROM events") < 1_000);
    let digest = Digest::of(long.as_bytes());
    std::fs::write(store.blobs().path(&digest), b"else").unwrap();
    assert!(matches!(
        store.thread(id(1), &ThreadRange::default()),
        Err(Error::BlobDamaged { .. })
    ));
    std::fs::remove_file(store.blobs().path(&digest)).unwrap();
    assert!(matches!(
        store.thread(id(1), &ThreadRange::default()),
        Err(Error::BlobMissing(missing)) if missing == digest
    ));
}

#[test]
fn a_database_that_was_there_is_missed_and_never_made_anew() {
    let (directory, store) = store();
    drop(store);
    let file = directory.path().join("nerve.db");
    std::fs::write(&file, b"").unwrap();
    for _ in 0..2 {
        let error = Store::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("restore a backup"), "{error}");
    }
    std::fs::remove_file(&file).unwrap();
    assert!(matches!(
        Store::open(directory.path()),
        Err(Error::Missing(_, "missing", _))
    ));
    assert!(!file.exists());
}

#[test]
fn a_first_start_that_was_cut_off_is_made_good_and_a_beginning_that_was_wiped_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("nerve.db");
    let torn = [vec![0; 512], vec![7; 3_584]].concat();
    std::fs::write(&file, &torn).unwrap();
    drop(Store::open(directory.path()).unwrap());
    std::fs::write(&file, &torn).unwrap();
    let error = Store::open(directory.path()).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), torn);
}

#[test]
fn a_foreign_database_is_refused_untouched() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("nerve.db");
    for statements in [
        "CREATE TABLE logs (id INTEGER)",
        "PRAGMA application_id = 7; CREATE TABLE events (a); CREATE TABLE workflow_runs (a)",
    ] {
        let foreign = rusqlite::Connection::open(&file).unwrap();
        foreign.execute_batch(statements).unwrap();
        drop(foreign);
        let before = std::fs::read(&file).unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), before);
        std::fs::remove_file(&file).unwrap();
    }
}

#[test]
fn a_database_without_one_of_its_objects_is_damaged_and_refused_untouched() {
    let (directory, store) = store();
    let objects = "SELECT type, name FROM sqlite_schema WHERE sql IS NOT NULL";
    let objects: Vec<(String, String)> = store
        .connection
        .prepare(objects)
        .unwrap()
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    drop(store);
    assert!(objects.len() > 20);
    let file = directory.path().join("nerve.db");
    let whole = std::fs::read(&file).unwrap();
    for (kind, name) in objects {
        let other = rusqlite::Connection::open(&file).unwrap();
        let drop_it = format!("PRAGMA foreign_keys = OFF; DROP {kind} {name};");
        other.execute_batch(&drop_it).unwrap();
        drop(other);
        let before = std::fs::read(&file).unwrap();
        let error = Store::open(directory.path()).unwrap_err();
        assert!(matches!(error, Error::Damaged(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("it has no {kind} ")), "{text}");
        assert_eq!(std::fs::read(&file).unwrap(), before);
        let log = directory.path().join("nerve.db-wal");
        assert!(!log.exists() || log.metadata().unwrap().len() == 0);
        std::fs::write(&file, &whole).unwrap();
    }
    Store::open(directory.path()).unwrap();
}

#[test]
fn whatever_is_refused_as_no_database_names_check_and_restore() {
    let (directory, store) = store();
    drop(store);
    let file = directory.path().join("nerve.db");
    let whole = std::fs::read(&file).unwrap();
    let elf = [b"\x7fELF".as_slice(), &whole[4..]].concat();
    for bytes in [
        b"".as_slice(),
        &whole[..50],
        &whole[..5_000],
        &[0; 4_096],
        &elf,
    ] {
        std::fs::write(&file, bytes).unwrap();
        let text = Store::open(directory.path()).unwrap_err().to_string();
        for word in ["nerved --check", "nerve-store(7)"] {
            assert!(text.contains(word), "{text}");
        }
    }
}

#[test]
fn no_other_program_reads_or_holds_the_database() {
    let (directory, store) = store();
    let file = directory.path().join("nerve.db");
    let other = rusqlite::Connection::open(&file).unwrap();
    let read: rusqlite::Result<u32> =
        other.query_row("SELECT count(*) FROM events", [], |row| row.get(0));
    let error = read.unwrap_err();
    assert_eq!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseBusy)
    );
    drop(store);
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
