//! What is put through trouble: a store that lives through the whole lives of many runs, and says what it acknowledged.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use nerve::engine::{Event, Staged, Turn};
use nerve::model::audit::{Audit, Verb};
use nerve::model::message::Message;
use nerve::model::name::RunId;
use nerve::model::run::{Accepted, BootInstant, KillRequest, Place, Run, RunEvent};
use nerve::model::status::RunResult;
use nerve::model::worker::{Cause, Death};
use nerve::store::{self, Store};
use serde_json::json;

const DEFINITION: &[u8] =
    b"version: 1\nname: w\nroles: {a: {exec: [a]}}\ngraph: {$START: a, a: {ok: $END}}\n";
/// The log is made so long: at first what is behind the last commit is there and is no commit, later it grows.
const RESERVE: u64 = 1 << 20;
const LONG: usize = 70_000;

/// The file in which it says which events are acknowledged, a line each: the number of the last one, `full` and that number
/// when it was told that the disk is full.
pub const ACKNOWLEDGED: &str = "acknowledged";

struct Writer {
    store: Store,
    told: File,
    /// The last event's number.
    seq: u64,
    runs: BTreeMap<RunId, Run>,
}

/// Lives through so many runs, `together` of them at a time, and starts anew twice.
pub fn write(directory: &Path, runs: u128, together: u128) -> Result<(), store::Error> {
    let mut writer = Writer::open(directory)?;
    let mut begun = 0;
    for part in 0..3 {
        while begun < runs * (part + 1) / 3 {
            let all: Vec<u128> = (begun..(begun + together).min(runs)).collect();
            begun += together;
            writer.lives(&all)?;
        }
        if part < 2 {
            writer = writer.again(directory)?;
        }
    }
    Ok(())
}

impl Writer {
    fn open(directory: &Path) -> Result<Self, store::Error> {
        let mut store = Store::open(directory)?;
        store.reserve(RESERVE)?;
        let told = File::options()
            .append(true)
            .create(true)
            .open(directory.join(ACKNOWLEDGED))
            .unwrap();
        let parsed = nerve::config::definition::parse("w.yaml", None, DEFINITION);
        store.put_definition(&parsed.definition.unwrap(), DEFINITION)?;
        let mut writer = Self {
            store,
            told,
            seq: 1,
            runs: BTreeMap::new(),
        };
        writer.tell("");
        Ok(writer)
    }

    /// As after a clean stop.
    fn again(self, directory: &Path) -> Result<Self, store::Error> {
        let Self { store, seq, .. } = self;
        drop(store);
        let writer = Self::open(directory)?;
        Ok(Self { seq, ..writer })
    }

    fn tell(&mut self, what: &str) {
        // One call: it is one mark in the record.
        let line = format!("{what}{}\n", self.seq);
        self.told.write_all(line.as_bytes()).unwrap();
    }

    /// Several runs, each turn an event of each.
    fn lives(&mut self, numbers: &[u128]) -> Result<(), store::Error> {
        let lives: Vec<_> = numbers
            .iter()
            .map(|number| (*number, life(*number)))
            .collect();
        let longest = lives.iter().map(|(_, life)| life.len()).max().unwrap_or(0);
        for step in 0..longest {
            let events = lives
                .iter()
                .filter_map(|(number, life)| Some((id(*number), life.get(step)?.clone())));
            self.turn(events.collect())?;
        }
        Ok(())
    }

    fn turn(&mut self, events: Vec<(RunId, RunEvent)>) -> Result<(), store::Error> {
        let mut turn = Turn::default();
        let mut audits = Vec::new();
        for (id, event) in events {
            let at = self.seq * 1_000;
            let next = match (self.runs.get(&id), &event) {
                (None, RunEvent::Queued(accepted)) => Run::accept(id, at, accepted),
                (run, event) => run.unwrap().after(event, at).unwrap(),
            };
            if let RunEvent::Queued(_) | RunEvent::KillRequested(_) = event {
                audits.push(Audit {
                    verb: Verb::Start,
                    subject: id.to_string(),
                    by: None,
                    reason: None,
                    outcome: "done".to_owned(),
                    at,
                });
            }
            turn.runs.insert(id, next.clone());
            self.runs.insert(id, next);
            let event = Event::Run(id, event);
            turn.events.push(Staged { event, at });
        }
        let count = turn.events.len() + audits.len();
        match self.store.commit(&turn, &audits) {
            Ok(()) => {
                self.seq += count as u64;
                self.tell("");
                Ok(())
            }
            Err(error) => {
                if error.is_full() {
                    self.tell("full ");
                }
                Err(error)
            }
        }
    }
}

fn id(number: u128) -> RunId {
    RunId::from_bits(0x0193_0000_0000_7000_8000_0000_0000_0000 + number)
}

/// Starts, rounds, now and then a long one, a loss, a kill or an end.
fn life(number: u128) -> Vec<RunEvent> {
    let message = |round: u32| {
        let length = if number.is_multiple_of(9) && round == 1 {
            LONG
        } else {
            100 + usize::try_from(number % 7).unwrap() * 300
        };
        RunEvent::ThreadWorkflowMessage {
            round,
            message: Message {
                role: "a".to_owned(),
                content: format!("{number} said {round} ").repeat(length / 8),
                meta: json!({"status": "ok"}).as_object().unwrap().clone(),
                timestamp: 5,
            },
        }
    };
    let dispatched = |attempt: u32| RunEvent::Dispatched {
        place: Place {
            invocation: format!("i{attempt}"),
            cgroup: "/c".to_owned(),
        },
        attempt,
        boot_id: "b".to_owned(),
    };
    let mut life = vec![
        RunEvent::Queued(Accepted {
            workflow: "w".parse().unwrap(),
            prompt: format!("do {number}"),
            max_rounds: Some(7),
            dry_run: false,
            trigger: json!({"type": "client", "uid": 0}),
            key: Some(format!("key-{number}")),
        }),
        RunEvent::Started {
            definition: nerve::config::definition::digest(DEFINITION),
            max_rounds: 7,
            since: BootInstant {
                boot_id: "b".to_owned(),
                boot_us: 1,
            },
        },
        dispatched(1),
        message(1),
    ];
    if number.is_multiple_of(2) {
        life.push(RunEvent::WorkerLost {
            invocation: "i1".to_owned(),
            attempt: 1,
            death: Death::of(Cause::Signal),
        });
        life.push(dispatched(2));
        life.push(message(2));
    }
    let result = if number.is_multiple_of(3) {
        life.push(RunEvent::KillRequested(KillRequest {
            reason: None,
            grace_us: 1,
            by: None,
        }));
        RunResult::Killed
    } else {
        RunResult::Success
    };
    let detail = None;
    life.push(RunEvent::Ended { result, detail });
    life
}
