//! The store, beside the predecessor's under Node 22: on the same disk, in the same run, with every commit synced before
//! it is answered (`synchronous=FULL`, which the predecessor's SQLite has by default; its script makes sure).

use std::collections::{BTreeMap, HashMap};
use std::future::pending;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nerve::config::definition;
use nerve::engine::{Answer, Engine, Event, Known, Now, Recovered, Staged, Turn};
use nerve::manager::driver::Driver;
use nerve::manager::handle::{Change, Handle};
use nerve::manager::hands::World;
use nerve::manager::room::Room;
use nerve::model::name::RunId;
use nerve::model::predecessor::{OldRun, Piece, Row, Survey, run_id};
use nerve::model::run::{Accepted, BootInstant, KillRequest, Run, RunEvent};
use nerve::model::status::{RunResult, Status};
use nerve::model::workflow::Definition;
use nerve::os::clock;
use nerve::store::archive::{Plan, archive};
use nerve::store::import::slices;
use nerve::store::{self, Log, RunFilter, Store, ThreadRange};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::{Figure, Outcome, per_second};

/// On the repository's disk: the machine's own is in memory.
const DIRECTORY: &str = "target/bench-store";
const NODE: &str = "target/predecessor/node";
const PACKAGE: &str = "target/predecessor/node_modules/@uncaged/nerve-store/dist/index.js";
const CALLERS: u32 = 64;
const TIME: Duration = Duration::from_secs(5);
const MILLION: u32 = 1_000_000;
const WORKFLOW: &str = "version: 1
name: bench
max_queue: 1000
roles: { role: { exec: [/bin/true] } }
graph: { $START: role, role: { ok: $END } }
";

pub(super) async fn measure() -> Outcome<Vec<Figure>> {
    // What an interrupted run may have left.
    let _ = std::fs::remove_dir_all(DIRECTORY);
    let theirs = predecessor()?;
    let their = |name: &str| theirs[name].as_f64().ok_or(format!("no {name}"));
    let (archived, peak) = archive_million(&fresh("archive")?).await?;
    let figures = vec![
        Figure {
            name: "archive_rows_per_second",
            value: archived,
            unit: "1/s",
            floor: their("archive_rows_per_second")?,
            note: "1,000,000 events, beside nerve-store 0.5.0".to_owned(),
        },
        Figure {
            name: "archive_peak_kib",
            value: peak,
            unit: "KiB",
            floor: their("archive_peak_kib")?,
            note: "all of the process meanwhile; goal: under 65,536".to_owned(),
        },
        Figure {
            name: "transitions_per_second",
            value: transitions_per_second(&fresh("transitions")?).await?,
            unit: "1/s",
            floor: their("transitions_per_second")?,
            note: "beside nerve-store 0.5.0; goal: ratio 10 or more".to_owned(),
        },
        Figure {
            name: "requests_per_second",
            value: requests_per_second(&fresh("requests")?).await?,
            unit: "1/s",
            floor: their("transitions_per_second")?,
            note: "all of the manager: 2.5 events each, with who asked; beside the same".to_owned(),
        },
        Figure {
            name: "thread_100_us",
            value: thread_100(&fresh("thread")?).await?,
            unit: "µs",
            floor: their("thread_100_us")?,
            note: "beside nerve-store 0.5.0; goal: ratio 0.05 or less".to_owned(),
        },
        Figure {
            name: "page_of_million_us",
            value: page_of_million(&fresh("million")?).await?,
            unit: "µs",
            floor: their("page_of_million_us")?,
            note: "beside nerve-store 0.5.0; goal: under 1,000".to_owned(),
        },
    ];
    std::fs::remove_dir_all(DIRECTORY)?;
    Ok(figures)
}

/// A directory for a store of its own.
fn fresh(name: &str) -> Outcome<PathBuf> {
    let directory = Path::new(DIRECTORY).join(name);
    std::fs::create_dir_all(&directory)?;
    Ok(directory)
}

fn predecessor() -> Outcome<Value> {
    let output = Command::new(NODE)
        .args(["tests/bench/predecessor.mjs", PACKAGE])
        .arg(fresh("predecessor")?)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!("the predecessor's side: {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Callers of the store alone. What they want while one transaction is written is the next one, as in the driver.
async fn transitions_per_second(directory: &Path) -> Outcome<f64> {
    let mut store = Store::open(directory)?;
    let definition = bench_definition()?;
    store.put_definition(&definition, WORKFLOW.as_bytes())?;
    let store = store::Handle::spawn(store)?;
    let (wishes, mut inbox) = mpsc::channel::<Wish>(256);
    let writer = tokio::spawn(async move {
        let mut collected = Vec::new();
        while inbox.recv_many(&mut collected, 256).await > 0 {
            let (mut turn, mut replies) = (Turn::default(), Vec::new());
            for Wish { run, staged, reply } in collected.drain(..) {
                turn.events.push(staged);
                turn.runs.insert(run.id, run);
                replies.push(reply);
            }
            store.call(move |store| store.commit(&turn, &[])).await?;
            for reply in replies {
                let _ = reply.send(());
            }
        }
        Ok::<_, store::Error>(())
    });
    let begin = Instant::now();
    let digest = definition.digest;
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| tokio::spawn(transitions(wishes.clone(), digest.clone(), begin + TIME)))
        .collect();
    drop(wishes);
    let mut transitions = 0;
    for caller in callers {
        transitions += caller.await??;
    }
    let value = per_second(transitions, begin.elapsed());
    writer.await??;
    Ok(value)
}

/// A run's next event, the run after it, and who waits until both are durable.
struct Wish {
    run: Run,
    staged: Staged,
    reply: oneshot::Sender<()>,
}

/// Takes runs from queued through started to completed; how many such transitions were durable.
async fn transitions(
    wishes: mpsc::Sender<Wish>,
    definition: String,
    until: Instant,
) -> Result<usize, String> {
    let wish = async |run: Run, event: RunEvent, at| {
        let (reply, answer) = oneshot::channel();
        let event = Event::Run(run.id, event);
        let staged = Staged { event, at };
        let sent = wishes.send(Wish { run, staged, reply }).await;
        sent.map_err(|_| "nobody writes")?;
        answer.await.map_err(|error| error.to_string())
    };
    let mut transitions = 0;
    while Instant::now() < until {
        let accepted = accepted()?;
        let mut run = Run::accept(
            RunId::from_bits(Uuid::now_v7().as_u128()),
            clock::wall_us(),
            &accepted,
        );
        wish(run.clone(), RunEvent::Queued(accepted), run.created_at).await?;
        let started = RunEvent::Started {
            definition: definition.clone(),
            max_rounds: 50,
            since: BootInstant {
                boot_id: "bench".to_owned(),
                boot_us: clock::boot_us(),
            },
        };
        let ended = RunEvent::Ended {
            result: RunResult::Success,
            detail: None,
        };
        for event in [started, ended] {
            let at = clock::wall_us();
            run = run.after(&event, at).map_err(|error| error.to_string())?;
            wish(run.clone(), event, at).await?;
        }
        transitions += 3;
    }
    Ok(transitions)
}

fn bench_definition() -> Outcome<Definition> {
    let parsed = definition::parse("bench", None, WORKFLOW.as_bytes());
    Ok(parsed.definition.ok_or("the definition is broken")?)
}

fn accepted() -> Result<Accepted, String> {
    Ok(Accepted {
        workflow: "bench".parse().map_err(|_| "bench is a name")?,
        prompt: "go".to_owned(),
        max_rounds: Some(50),
        dry_run: false,
        trigger: json!({"type": "client", "uid": 0}),
        key: None,
    })
}

/// The real manager with a real store. It has no systemd, so that runs are queued and killed, and nothing is executed.
async fn requests_per_second(directory: &Path) -> Outcome<f64> {
    let mut store = Store::open(directory)?;
    let definition = bench_definition()?;
    store.put_definition(&definition, WORKFLOW.as_bytes())?;
    let known = Known {
        definition: Some(Arc::new(definition)),
        fault: None,
    };
    let recovered = Recovered {
        boot_id: "bench".to_owned(),
        workflows: BTreeMap::from([("bench".parse()?, known)]),
        max_active: None,
        workers: BTreeMap::new(),
        pause: None,
        pinned: HashMap::new(),
        runs: Vec::new(),
    };
    let now = Now {
        wall_us: clock::wall_us(),
        boot_us: clock::boot_us(),
    };
    let (_systemd, systemd) = watch::channel(None);
    let world = World {
        systemd,
        worker: PathBuf::new(),
        socket: PathBuf::new(),
        tools: watch::channel(Arc::default()).1,
    };
    let (news, mut heard) = mpsc::unbounded_channel();
    let store = store::Handle::spawn(store)?;
    let room = Room::new(directory.to_owned(), Log::default());
    let engine = Engine::recover(recovered, now)?;
    let (driver, handle) = Driver::new(engine, store, room, world, news);
    let driver = tokio::spawn(driver.run(pending()));
    let listener = tokio::spawn(async move { while heard.recv().await.is_some() {} });
    let by = serde_json::from_value(json!({ "uid": 0 }))?;
    let pause = Change::Pause { reason: None, by };
    handle.change(pause).await?;
    let begin = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| tokio::spawn(caller(handle.clone(), begin + TIME)))
        .collect();
    let mut requests = 0;
    for caller in callers {
        requests += caller.await??;
    }
    let value = per_second(requests, begin.elapsed());
    driver.abort();
    listener.abort();
    Ok(value)
}

/// Asks for runs and for their end; how many such requests were answered, and durable before.
async fn caller(handle: Handle, until: Instant) -> Result<usize, String> {
    let mut requests = 0;
    while Instant::now() < until {
        let started = handle.start(accepted()?).await;
        let Ok(Answer::Started { run, .. }) = started else {
            return Err(format!("start: {started:?}"));
        };
        let request = KillRequest {
            reason: None,
            grace_us: 0,
            by: None,
        };
        let killed = handle.change(Change::Kill { run, request }).await;
        if killed != Ok(Answer::Done) {
            return Err(format!("kill: {killed:?}"));
        }
        requests += 2;
    }
    Ok(requests)
}

/// The newest 100 of 1,000 rounds, as nerved asks for them: from another thread than the store's.
async fn thread_100(directory: &Path) -> Outcome<f64> {
    let said = json!({"role": "coder", "content": "x".repeat(1024), "meta": {"status": "ok"}, "timestamp": 1});
    let rows: Vec<_> = (1..=1_000)
        .map(|id| {
            row(
                id,
                "workflow",
                "thread_workflow_message",
                "run",
                &said.to_string(),
            )
        })
        .collect();
    let mut survey = Survey::default();
    for row in &rows {
        survey.see(row);
    }
    let run = Piece::Run(survey.conclude(old_run("run", "bench", "completed", 1))?);
    let pieces = std::iter::once(run).chain(rows.into_iter().map(Piece::OfRun));
    let store = filled(directory, pieces)?;
    let mut times = Vec::new();
    for _ in 0..500 {
        let range = ThreadRange {
            limit: Some(100),
            ..ThreadRange::default()
        };
        let begin = Instant::now();
        let thread = store.call(move |store| store.thread(run_id("run"), &range));
        let thread = thread.await?;
        times.push(begin.elapsed());
        if thread.len() != 100 {
            return Err(format!("{} rounds", thread.len()).into());
        }
    }
    Ok(median_us(times))
}

async fn page_of_million(directory: &Path) -> Outcome<f64> {
    let runs = (0..MILLION).map(|number| {
        let status = if number % 3 == 0 {
            "failed"
        } else {
            "completed"
        };
        let (id, workflow) = (format!("run-{number}"), format!("workflow-{}", number % 10));
        let run = old_run(
            &id,
            &workflow,
            status,
            1_700_000_000_000 + i64::from(number),
        );
        Piece::Run(Survey::default().conclude(run).unwrap())
    });
    let store = filled(directory, runs)?;
    let mut times = Vec::new();
    for _ in 0..500 {
        let filter = RunFilter {
            workflow: Some("workflow-3".parse()?),
            statuses: vec![Status::Failed],
            limit: 50,
            ..RunFilter::default()
        };
        let begin = Instant::now();
        let page = store.call(move |store| store.runs(&filter)).await?;
        times.push(begin.elapsed());
        if page.len() != 50 {
            return Err(format!("{} runs", page.len()).into());
        }
    }
    Ok(median_us(times))
}

/// Moves a million events of ten days into files; events a second, and the peak memory of all of this process.
async fn archive_million(directory: &Path) -> Outcome<(f64, f64)> {
    let rows = (0..MILLION).map(|number| {
        let payload = json!({"value": number, "text": "x".repeat(100)}).to_string();
        let at = 1_700_000_000_000 + i64::from(number / (MILLION / 10)) * 86_400_000;
        Piece::Row(Row {
            timestamp: at,
            ..row(i64::from(number), "sense", "observed", "disk", &payload)
        })
    });
    let store = filled(directory, rows)?;
    // The peak begins anew: proc_pid_clear_refs(5).
    std::fs::write("/proc/self/clear_refs", "5")?;
    let plan = Plan {
        ended_by: 1_702_000_000_000_000,
        max_days: None,
        compressed: false,
        dry_run: false,
    };
    let begin = Instant::now();
    let days = tokio::task::spawn_blocking(move || archive(&store, &plan)).await??;
    let rows: u64 = days.iter().map(|day| day.rows).sum();
    if rows != u64::from(MILLION) {
        return Err(format!("{rows} events archived").into());
    }
    let value = per_second(usize::try_from(rows)?, begin.elapsed());
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let peak = peak.and_then(|line| line.split_whitespace().next());
    Ok((value, peak.ok_or("no VmHWM")?.parse()?))
}

/// A store with an imported history: the quickest way to a large one.
fn filled(directory: &Path, pieces: impl Iterator<Item = Piece>) -> Outcome<store::Handle> {
    let mut store = Store::open(directory)?;
    let mut pieces = pieces.peekable();
    while pieces.peek().is_some() {
        for slice in slices(pieces.by_ref().take(10_000).collect()) {
            store.import(&slice)?;
        }
    }
    Ok(store::Handle::spawn(store)?)
}

fn row(id: i64, source: &str, row_type: &str, reference: &str, payload: &str) -> Row {
    Row {
        id,
        source: source.to_owned(),
        row_type: row_type.to_owned(),
        ref_id: Some(reference.to_owned()),
        payload: Some(payload.to_owned()),
        timestamp: id,
    }
}

fn old_run(id: &str, workflow: &str, status: &str, timestamp: i64) -> OldRun {
    OldRun {
        id: id.to_owned(),
        workflow: workflow.to_owned(),
        status: status.to_owned(),
        timestamp,
        exit_code: None,
    }
}

fn median_us(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}
