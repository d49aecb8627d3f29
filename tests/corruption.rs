//! Damage to database, archive and blobs: never a panic, and each damage that changes what is read is found by the check.
//!
//! `make corruption` does 200,000 cases; NERVE_CORRUPTIONS and NERVE_SEED say how many, and from which on.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use nerve::config::definition;
use nerve::engine::{Event, Staged, Turn};
use nerve::model::message::Message;
use nerve::model::name::{RunId, WorkflowName};
use nerve::model::report::Report;
use nerve::model::run::{Accepted, BootInstant, Caller, KillRequest, Place, Run, RunEvent};
use nerve::model::status::RunResult;
use nerve::model::worker::{Cause, Death, ManagerEvent, WorkerEvent, WorkerRecord};
use nerve::store::check::offline::offline;
use nerve::store::log::{Entry, Head, Logged, SYSTEM};
use nerve::store::{Blobs, Digest, RunFilter, Store, ThreadRange, cold};
use rusqlite::types::Value;
use rusqlite::{Connection, params};
use serde_json::json;

const DAY: &str = "2026-11-20";
const DEFINITION: &[u8] =
    b"version: 1\nname: w\nroles: {a: {exec: [a]}}\ngraph: {$START: a, a: {ok: $END}}\n";

fn id(number: u128) -> RunId {
    RunId::from_bits(0x0193_0000_0000_7000_8000_0000_0000_0000 + number)
}

fn workflow() -> WorkflowName {
    "w".parse().unwrap()
}

/// A run's events: those of one that ends, of which the first so many happen.
fn life(number: u128, prompt: &str) -> Vec<RunEvent> {
    let message = |content: String| Message {
        role: "a".to_owned(),
        content,
        meta: json!({"status": "ok"}).as_object().unwrap().clone(),
        timestamp: 5,
    };
    let since = BootInstant {
        boot_id: "b".to_owned(),
        boot_us: 1,
    };
    let place = Place {
        invocation: "i".to_owned(),
        cgroup: "/c".to_owned(),
    };
    vec![
        RunEvent::Queued(Accepted {
            workflow: workflow(),
            prompt: prompt.to_owned(),
            max_rounds: Some(7),
            dry_run: false,
            trigger: json!({"type": "client", "uid": 0}),
            key: Some(format!("key-{number}")),
        }),
        RunEvent::Started {
            definition: Digest::of(DEFINITION).to_string(),
            max_rounds: 7,
            since,
        },
        RunEvent::Dispatched {
            place,
            attempt: 1,
            boot_id: "b".to_owned(),
        },
        RunEvent::ThreadWorkflowMessage {
            round: 1,
            message: message(format!("round of {number}")),
        },
        RunEvent::WorkerLost {
            invocation: "i".to_owned(),
            attempt: 1,
            death: Death::of(Cause::Signal),
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

fn commit(store: &mut Store, number: u128, prompt: &str, length: usize) {
    let mut run: Option<Run> = None;
    for (at, event) in (1..).zip(life(number, prompt).into_iter().take(length)) {
        let next = match (&run, &event) {
            (None, RunEvent::Queued(accepted)) => Run::accept(id(number), at, accepted),
            (Some(run), event) => run.after(event, at).unwrap(),
            (None, event) => panic!("begins with {event:?}"),
        };
        let turn = Turn {
            events: vec![Staged {
                event: Event::Run(id(number), event),
                at,
            }],
            runs: BTreeMap::from([(id(number), next.clone())]),
            ..Turn::default()
        };
        store.commit(&turn, &[]).unwrap();
        run = Some(next);
    }
}

/// A small store that has something of everything.
fn build(directory: &Path) {
    let mut store = Store::open(directory).unwrap();
    let definition = definition::parse("w.yaml", None, DEFINITION);
    let mut definition = definition.definition.unwrap();
    definition.digest = Digest::of(DEFINITION).to_string();
    store.put_definition(&definition, DEFINITION).unwrap();
    let long = "a long prompt, ".repeat(4_400);
    for number in 1..=14 {
        let prompt = if number % 7 == 0 {
            format!("{long}{number}")
        } else {
            "do it ".repeat(40)
        };
        let length = if number < 8 { 7 } else { 1 + number % 7 };
        commit(&mut store, u128::try_from(number).unwrap(), &prompt, length);
    }
    let by = Caller {
        uid: 0,
        pid: None,
        comm: None,
        unit: None,
    };
    let died = WorkerEvent::WorkerDied {
        invocation: "i".to_owned(),
        death: Death::of(Cause::Signal),
        since: BootInstant {
            boot_id: "b".to_owned(),
            boot_us: 9,
        },
    };
    let paused = ManagerEvent::Paused {
        reason: Some("why".to_owned()),
        by,
    };
    let record = WorkerRecord::default().after(&died, 50);
    let turn = Turn {
        pause: Some(paused.pause(50)),
        workers: BTreeMap::from([(workflow(), record)]),
        events: vec![
            Staged {
                event: Event::Worker(workflow(), died),
                at: 50,
            },
            Staged {
                event: Event::Manager(paused),
                at: 50,
            },
        ],
        ..Turn::default()
    };
    store.commit(&turn, &[]).unwrap();
    drop(store);
    archive(directory, &format!("{DAY}.jsonl"), 1, 20);
    archive(directory, &format!("{DAY}.2.jsonl.zst"), 2, 36);
    let database = Connection::open(directory.join("nerve.db")).unwrap();
    let forgotten = id(2).to_string();
    let sql = "DELETE FROM workflow_runs WHERE run = ?1";
    assert_eq!(database.execute(sql, [&forgotten]).unwrap(), 1);
    append(&database, "forgotten", &forgotten, "{}");
}

fn logged(database: &Connection) -> Vec<Logged> {
    let mut select = database
        .prepare("SELECT seq, source, type, ref, payload, blob, at, hash FROM events ORDER BY seq")
        .unwrap();
    let row = |row: &rusqlite::Row<'_>| {
        Ok(Logged {
            seq: row.get::<_, i64>(0)?.unsigned_abs(),
            source: row.get(1)?,
            event_type: row.get(2)?,
            reference: row.get(3)?,
            payload: row.get(4)?,
            blob: row.get(5)?,
            at: row.get::<_, i64>(6)?.unsigned_abs(),
            hash: row.get(7)?,
        })
    };
    let rows = select.query_map([], row).unwrap();
    rows.map(Result::unwrap).collect()
}

fn append(database: &Connection, event_type: &str, reference: &str, payload: &str) {
    let head = logged(database).last().map(Logged::head);
    let entry = Entry {
        source: SYSTEM,
        event_type,
        reference,
        payload,
        blob: None,
        at: 60,
    };
    let Head { seq, hash } = head.unwrap().after(&entry);
    let insert = "INSERT INTO events (seq, source, type, ref, payload, at, hash) VALUES (?1, ?2, ?3, ?4, ?5, 60, ?6)";
    let seq = i64::try_from(seq).unwrap();
    database
        .execute(
            insert,
            params![seq, SYSTEM, event_type, reference, payload, hash],
        )
        .unwrap();
}

/// Has every event up to this one go to a file, but for every fifth, which stays for the next file.
fn archive(directory: &Path, name: &str, part: i64, up_to: u64) {
    let database = Connection::open(directory.join("nerve.db")).unwrap();
    let mut events = logged(&database);
    events.retain(|event| event.seq <= up_to && (part > 1 || event.seq % 5 > 0));
    let mut lines = Vec::new();
    for event in &events {
        cold::write_line(&mut lines, event).unwrap();
    }
    if part > 1 {
        lines = zstd::encode_all(&lines[..], 3).unwrap();
    }
    let folder = cold::folder(directory);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name), &lines).unwrap();
    let (rows, digest) = (events.len(), Digest::of(&lines).to_string());
    let (first, last) = (events[0].seq, events[rows - 1].seq);
    let payload =
        json!({"file": name, "rows": rows, "first": first, "last": last, "digest": digest});
    append(&database, "archived", DAY, &payload.to_string());
    let number = |number: u64| i64::try_from(number).unwrap();
    let insert = "INSERT INTO archive (day, part, file, rows, first, last, digest, cleared) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?6)";
    let listed = params![
        DAY,
        part,
        name,
        number(rows as u64),
        number(first),
        number(last),
        digest
    ];
    database.execute(insert, listed).unwrap();
    for event in events {
        let delete = "DELETE FROM events WHERE seq = ?1";
        database.execute(delete, [number(event.seq)]).unwrap();
        if let Some(blob) = event.blob {
            let insert = "INSERT INTO archived_blobs (blob, file) VALUES (?1, ?2)";
            database.execute(insert, [&*blob, name]).unwrap();
        }
    }
}

/// All that can be read, or that it is refused.
fn dump(directory: &Path, known: &Known) -> Result<Vec<String>, String> {
    let store = Store::open(directory).map_err(|error| error.to_string())?;
    let mut all = Vec::new();
    let mut say = |text: String| all.push(text);
    let filter = RunFilter {
        limit: 1_000,
        ..RunFilter::default()
    };
    say(format!("{:?}", store.runs(&filter)));
    say(format!("{:?}", store.open_runs()));
    say(format!("{:?} {:?}", store.workers(), store.pause()));
    say(format!("{:?}", store.last_definition(&workflow())));
    say(format!(
        "{:?}",
        store.definition(Digest::of(DEFINITION).as_str())
    ));
    for number in 1..=14 {
        let key = format!("key-{number}");
        let run = id(number);
        let tail = run.short().parse().unwrap();
        say(format!("{:?} {:?}", store.run(run), store.find(&tail)));
        say(format!("{:?}", store.run_by_key(&workflow(), &key)));
        say(format!("{:?}", store.events(run)));
        say(format!("{:?}", store.thread(run, &ThreadRange::default())));
    }
    say(format!("{:?}", store.blobs().list(None, usize::MAX)));
    for blob in &known.blobs {
        say(format!("{:?}", store.blobs().get(blob)));
    }
    drop(store);
    for file in &known.archive {
        let read = cold::read(&cold::folder(directory).join(file));
        say(format!("{:?}", read.map(Iterator::collect::<Vec<_>>)));
    }
    let database = Connection::open(directory.join("nerve.db")).unwrap();
    // Of these two nobody reads the text: what it says is above.
    let is_text = |table: &str| ["workers", "manager"].contains(&table);
    for (table, columns) in known.tables.iter().filter(|(table, _)| !is_text(table)) {
        let rows = database
            .prepare(&format!("SELECT {columns} FROM {table} ORDER BY 1, 2"))
            .and_then(|mut select| {
                let count = select.column_count();
                let row = |row: &rusqlite::Row<'_>| {
                    (0..count)
                        .map(|index| row.get(index))
                        .collect::<rusqlite::Result<Vec<Value>>>()
                };
                select
                    .query_map([], row)?
                    .collect::<rusqlite::Result<Vec<_>>>()
            });
        say(format!("{table}: {rows:?}"));
    }
    Ok(all)
}

/// What of the whole store is asked for.
struct Known {
    blobs: Vec<Digest>,
    archive: Vec<String>,
    tables: Vec<(String, String)>,
}

impl Known {
    fn of(directory: &Path) -> Self {
        let blobs = Blobs::new(directory.join("blobs")).list(None, usize::MAX);
        let database = Connection::open(directory.join("nerve.db")).unwrap();
        let texts = |sql: &str| -> Vec<String> {
            let mut select = database.prepare(sql).unwrap();
            let rows = select.query_map([], |row| row.get(0)).unwrap();
            rows.map(Result::unwrap).collect()
        };
        let tables = texts(
            "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'",
        );
        let columns = |table: &String| {
            // Up to where a file's events are cleared is nobody's to know: the next archiving looks.
            let columns = texts(&format!(
                "SELECT name FROM pragma_table_info('{table}') WHERE name <> 'cleared'"
            ));
            (table.clone(), columns.join(", "))
        };
        Self {
            blobs: blobs
                .unwrap()
                .into_iter()
                .map(|(digest, _)| digest)
                .collect(),
            archive: texts("SELECT file FROM archive ORDER BY file"),
            tables: tables.iter().map(columns).collect(),
        }
    }
}

fn check(directory: &Path) -> Result<Report, String> {
    let scratch = directory.parent().unwrap();
    offline(directory, scratch).map_err(|error| error.to_string())
}

fn is_found(report: &Result<Report, String>) -> bool {
    report.as_ref().map_or(true, |report| !report.is_clean())
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound.max(1) as u64)).unwrap()
    }
}

type Files = BTreeMap<PathBuf, Vec<u8>>;

fn files(root: &Path, directory: &Path, found: &mut Files) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(root, &path, found);
        } else {
            let name = path.strip_prefix(root).unwrap().to_owned();
            found.insert(name, fs::read(&path).unwrap());
        }
    }
}

/// Damages one file; says how.
fn damage(files: &mut Files, random: &mut Random) -> String {
    let lock = Path::new("lock");
    let names: Vec<_> = files.keys().filter(|name| *name != lock).cloned().collect();
    let name = match random.below(2) {
        0 => PathBuf::from("nerve.db"),
        _ => names[random.below(names.len())].clone(),
    };
    let shown = name.display().to_string();
    let other = files[&names[random.below(names.len())]].clone();
    let bytes = files.get_mut(&name).unwrap();
    let length = bytes.len();
    let at = random.below(length);
    let unit = [1, 16, 512, 4_096][random.below(4)];
    let range = at / unit * unit..(at / unit * unit + unit).min(length);
    let from = random.below(length) / unit * unit;
    let how = match random.below(11) {
        0..=2 => {
            let flips = 1 + random.below(4);
            for _ in 0..flips {
                let at = random.below(length);
                bytes[at] ^= 1 << random.below(8);
            }
            format!("{flips} bits flipped, at or about {at}")
        }
        3 => {
            bytes[range.clone()].fill(0);
            format!("{range:?} zeroed")
        }
        4 => {
            bytes.truncate(at);
            format!("cut off at {at}")
        }
        5 => {
            let end = (from + unit).min(length);
            let copy = bytes[from..end].to_vec();
            let space = &mut bytes[range.start..];
            let count = copy.len().min(space.len());
            space[..count].copy_from_slice(&copy[..count]);
            format!("{from}..{end} again at {}", range.start)
        }
        6 => {
            let count = unit.min(length - from.max(range.start));
            for index in 0..count {
                bytes.swap(from + index, range.start + index);
            }
            format!("{count} bytes at {from} and {} swapped", range.start)
        }
        7 => {
            // What is text changes into another text.
            let is_word = |byte: &u8| byte.is_ascii_alphanumeric();
            let at = (at..length).find(|at| is_word(&bytes[*at])).unwrap_or(at);
            bytes[at] = b"0123456789abcdefz"[random.below(17)];
            format!("another character at {at}")
        }
        8 => {
            let mut lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
            let (one, two) = (random.below(lines.len()), random.below(lines.len()));
            let how = match random.below(3) {
                0 => {
                    lines.swap(one, two);
                    format!("lines {one} and {two} swapped")
                }
                1 => {
                    lines.insert(one, lines[two]);
                    format!("line {two} again at {one}")
                }
                _ => {
                    lines.remove(one);
                    format!("line {one} removed")
                }
            };
            *bytes = lines.concat();
            how
        }
        9 => {
            *bytes = other;
            "another file's content".to_owned()
        }
        _ => {
            files.remove(&name);
            "removed".to_owned()
        }
    };
    format!("{shown}: {how}")
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Where nothing has to reach a disk, if there is such a place.
fn scratch() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::tempdir_in(memory);
    made.or_else(|_| tempfile::tempdir()).unwrap()
}

fn write_all(directory: &Path, files: &Files) {
    if directory.exists() {
        fs::remove_dir_all(directory).unwrap();
    }
    for (name, bytes) in files {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// A store at rest and what is read of it.
fn sound(directory: &Path) -> (Known, Files, Vec<String>) {
    build(directory);
    let known = Known::of(directory);
    let read = dump(directory, &known).unwrap();
    let report = check(directory).unwrap();
    assert!(report.is_clean(), "{:#?}", report.faults);
    assert!(
        report.events > 60 && report.runs == 13 && report.blobs == 2,
        "{report:?}"
    );
    let mut all = Files::new();
    files(directory, directory, &mut all);
    (known, all, read)
}

#[test]
fn damage_that_changes_what_is_read_is_found() {
    let count = setting("NERVE_CORRUPTIONS").unwrap_or(2_000);
    let first = setting("NERVE_SEED").unwrap_or_else(|| {
        let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        u64::from(since.subsec_nanos()) << 20
    });
    eprintln!("seeds {first} to {}", first + count - 1);
    let scratch = scratch();
    let directory = scratch.path().join("store");
    fs::create_dir(&directory).unwrap();
    let (known, whole, read) = sound(&directory);
    let (mut found, mut changed, mut refused) = (0, 0, 0);
    for seed in first..first + count {
        let mut files = whole.clone();
        let how = damage(&mut files, &mut Random(seed));
        write_all(&directory, &files);
        let outcome = std::panic::catch_unwind(|| {
            let report = check(&directory);
            (report, dump(&directory, &known))
        });
        let Ok((report, now)) = outcome else {
            panic!("seed {seed}: {how}: panicked");
        };
        found += u64::from(is_found(&report));
        let Ok(now) = now else {
            refused += 1;
            continue;
        };
        if now != read {
            changed += 1;
            let differs = read.iter().zip(&now).find(|(before, now)| before != now);
            assert!(
                is_found(&report),
                "seed {seed}: {how}: not found: {differs:#?}"
            );
        }
    }
    eprintln!(
        "{count} damages: {found} found, {changed} changed what is read, {refused} refused at the start"
    );
    // Otherwise it was no damage.
    assert!(found > count / 2 && changed > count / 10 && refused > count / 100);
}

/// Not at random: each value of each row of each table.
#[test]
fn each_changed_value_is_found() {
    let scratch = scratch();
    let directory = scratch.path().join("store");
    fs::create_dir(&directory).unwrap();
    let (known, whole, _) = sound(&directory);
    let mut unnoticed = Vec::new();
    let mut tried = 0;
    for (table, columns) in &known.tables {
        for column in columns.split(", ") {
            write_all(&directory, &whole);
            let rows: u32 = {
                let database = Connection::open(directory.join("nerve.db")).unwrap();
                let count = format!("SELECT count(*) FROM {table}");
                database.query_row(&count, [], |row| row.get(0)).unwrap()
            };
            for row in 0..rows.min(6) {
                write_all(&directory, &whole);
                if !tamper(&directory, table, column, row) {
                    continue;
                }
                tried += 1;
                if !is_found(&check(&directory)) {
                    unnoticed.push(format!("{table}.{column} of row {row}"));
                }
            }
        }
    }
    assert_eq!(unnoticed, Vec::<String>::new());
    assert!(tried > 150, "{tried}");
}

/// Changes a value as somebody could who knows SQL; whether the database took it.
fn tamper(directory: &Path, table: &str, column: &str, row: u32) -> bool {
    let database = Connection::open(directory.join("nerve.db")).unwrap();
    let triggers: Vec<(String, String)> = {
        let mut select = database
            .prepare("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
            .unwrap();
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)));
        rows.unwrap().map(Result::unwrap).collect()
    };
    for (name, _) in &triggers {
        database
            .execute_batch(&format!("DROP TRIGGER {name}"))
            .unwrap();
    }
    let key = database
        .query_row(
            "SELECT group_concat(name, ' || ''/'' || ') FROM pragma_table_info(?1) WHERE pk > 0",
            [table],
            |row| row.get::<_, String>(0),
        )
        .unwrap();
    let update = format!(
        "UPDATE {table} SET {column} = CASE typeof({column}) WHEN 'integer' THEN {column} + 1000
             WHEN 'blob' THEN CAST({column} || 'x' AS BLOB) WHEN 'null' THEN 7 ELSE {column} || '0' END
         WHERE {key} = (SELECT {key} FROM {table} ORDER BY 1 LIMIT 1 OFFSET {row})"
    );
    let is_changed = database.execute(&update, []).is_ok_and(|count| count > 0);
    for (_, sql) in &triggers {
        database.execute_batch(sql).unwrap();
    }
    is_changed
}

/// Where somebody adds or takes away a row.
#[test]
fn each_missing_or_added_row_is_found() {
    let scratch = scratch();
    let directory = scratch.path().join("store");
    fs::create_dir(&directory).unwrap();
    let (known, whole, _) = sound(&directory);
    let mut unnoticed = Vec::new();
    for (table, _) in &known.tables {
        let last = format!("DELETE FROM {table} WHERE rowid = (SELECT max(rowid) FROM {table})");
        let one = match table.as_str() {
            "events" | "workflow_runs" => last,
            _ => format!("DELETE FROM {table}"),
        };
        write_all(&directory, &whole);
        let database = Connection::open(directory.join("nerve.db")).unwrap();
        database.pragma_update(None, "foreign_keys", false).unwrap();
        if database.execute(&one, []).unwrap() == 0 {
            continue;
        }
        drop(database);
        // The newest event's end is nobody's to know: that is what the head is printed for.
        if !is_found(&check(&directory)) && table != "events" {
            unnoticed.push(one);
        }
    }
    for statement in [
        "INSERT INTO workflow_runs SELECT 99, 'x', 'x', workflow, status, killing, exit_code, result, reason, rounds, max_rounds, dry_run,
             trigger, definition, created_at, started_at, ended_at, aborting, 'k', old_id FROM workflow_runs LIMIT 1",
        "INSERT INTO workers VALUES ('v', '{}')",
        "INSERT INTO manager VALUES ('x', '{}')",
        "INSERT INTO definitions VALUES ('d', x'00')",
        "INSERT INTO workflows SELECT 'v', definition FROM workflows",
        "INSERT INTO archive SELECT day, 9, 'x', rows, first, last, digest, cleared FROM archive LIMIT 1",
        "INSERT INTO archived_blobs SELECT 'x', file FROM archive LIMIT 1",
        "INSERT INTO imported (digest, seq) VALUES (x'00', 99999)",
        "CREATE TABLE x (y)",
        "DROP TRIGGER runs_end_once",
        "PRAGMA application_id = 0",
    ] {
        write_all(&directory, &whole);
        let database = Connection::open(directory.join("nerve.db")).unwrap();
        database.pragma_update(None, "foreign_keys", false).unwrap();
        database.execute_batch(statement).unwrap();
        drop(database);
        if !is_found(&check(&directory)) {
            unnoticed.push(statement.to_owned());
        }
    }
    let mut file = fs::File::options()
        .append(true)
        .open(cold::folder(&directory).join(&known.archive[0]))
        .unwrap();
    file.write_all(b"\n").unwrap();
    if !is_found(&check(&directory)) {
        unnoticed.push("a line".to_owned());
    }
    assert_eq!(unnoticed, Vec::<String>::new());
}
