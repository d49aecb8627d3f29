//! `make bench`: what nerve costs, beside its floor, in the same machine and the same run. Run by `tests/bench/run` in
//! `tests/box`; prints a table and writes `target/bench.json`.
//!
//! | name | what | floor |
//! |---|---|---|
//! | `runs_per_second` | 2,000 runs of `/bin/true`, warm worker, 8 `StartRun` in flight, until all are terminal and durable | 8 threads of posix_spawn and waitpid |
//! | `start_to_exec_ms` | from sending `StartRun` to the role's first act, warm worker, p50 of 500 | the same program by posix_spawn |
//! | `llm_round_overhead_ms` | a round with an `llm` role, less a bare HTTP call of the same server, p50 | that call |
//! | `exec_round_overhead_ms` | from one round's first act to the next one's, 500 rounds of one run, p50, less the floor | the same program by posix_spawn, again and again |
//! | `nerved_idle_kib` | VmHWM of nerved 5 s after its start with an empty store | VmHWM of this machine's dbus-daemon |
//! | `transitions_per_second` | 64 callers of the store, who each take runs from queued through started to completed, each answered when durable | the same of the predecessor's store |
//! | `requests_per_second` | 64 callers of the manager, who each start runs and kill them, each answered when durable | the transitions of the predecessor's store |
//! | `thread_100_us` | the newest 100 rounds of 1,000, 1 KiB each, p50 | the same of the predecessor's store |
//! | `page_of_million_us` | the newest 50 failed runs of a workflow out of 1,000,000 runs of ten, p50 | the same of the predecessor's store |
//! | `archive_rows_per_second` | 1,000,000 events of ten days go into files | the same of the predecessor's store |
//! | `archive_peak_kib` | the peak memory of all of the process meanwhile | the same of the predecessor's store |

#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

mod rounds;
mod store;

use std::collections::HashSet;
use std::error::Error;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use nerve::bus::client::{
    Addresses, Client, ListFilter, ManagerProxy, RunChangedStream, StartOptions, ThreadOptions,
};
use nerve::model::status::Status;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

const RUNS: usize = 2_000;
const IN_FLIGHT: usize = 8;
const STARTS: usize = 500;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// One row of the table.
#[derive(Debug)]
struct Figure {
    name: &'static str,
    value: f64,
    unit: &'static str,
    floor: f64,
    note: String,
}

fn main() -> Outcome<()> {
    // As a role: say when, first of all.
    if std::env::args().nth(1).as_deref() == Some("clock") {
        println!("{}", monotonic_ns());
        return Ok(());
    }
    // What the store costs can be measured anywhere.
    let is_store_alone = std::env::args().nth(1).as_deref() == Some("store");
    if !is_store_alone && std::env::var_os("NERVE_BENCH").is_none() {
        println!("run it with `make bench`: it needs a machine with nerve in it");
        return Ok(());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let figures = runtime.block_on(async {
        let mut figures = Vec::new();
        if !is_store_alone {
            figures = measure().await?;
        }
        figures.extend(store::measure().await?);
        Outcome::Ok(figures)
    })?;
    println!(
        "{:<23} {:>12} {:<6} {:>12} {:>7}  note",
        "name", "value", "unit", "floor", "ratio"
    );
    for figure in &figures {
        let Figure {
            name,
            value,
            unit,
            floor,
            note,
        } = figure;
        println!(
            "{name:<23} {value:>12.3} {unit:<6} {floor:>12.3} {:>7.3}  {note}",
            value / floor
        );
    }
    let rows: Vec<_> = figures
        .iter()
        .map(|figure| {
            json!({"name": figure.name, "value": figure.value, "unit": figure.unit, "floor": figure.floor,
                "ratio": figure.value / figure.floor})
        })
        .collect();
    std::fs::write("target/bench.json", serde_json::to_string_pretty(&rows)?)?;
    Ok(())
}

async fn measure() -> Outcome<Vec<Figure>> {
    let idle = nerved_idle().await?;
    let connection = zbus::Connection::system().await?;
    let manager = ManagerProxy::new(&connection).await?;
    let throughput = runs_per_second(&manager).await?;
    let latency = start_to_exec(&manager).await?;
    let round = exec_round_overhead(&manager).await?;
    let asking = rounds::llm_overhead(&manager).await?;
    Ok(vec![throughput, latency, round, asking, idle])
}

async fn runs_per_second(manager: &ManagerProxy<'static>) -> Outcome<Figure> {
    // The first run starts the worker; what is measured is what comes after.
    let mut changes = manager.receive_run_changed().await?;
    run_to_end(manager, &mut changes, "bench-true").await?;
    // Floors on both sides of what is measured, so that a machine that slows down is seen.
    let before = spawns_per_second();
    let begin = Instant::now();
    let ended = async {
        let mut ended = HashSet::new();
        while ended.len() < RUNS {
            let Some(change) = changes.next().await else {
                break;
            };
            let arguments = change.args().unwrap();
            if arguments.status.parse::<Status>().unwrap().is_terminal() {
                ended.insert(arguments.run.to_owned());
            }
        }
        ended.len()
    };
    let left = Arc::new(AtomicUsize::new(RUNS));
    let clients: Vec<_> = (0..IN_FLIGHT)
        .map(|_| {
            let (manager, left) = (manager.clone(), left.clone());
            tokio::spawn(async move {
                let mut started = 0;
                while take_one(&left) {
                    let run = manager
                        .start_run("bench-true", "", StartOptions::default())
                        .await;
                    started += usize::from(run.is_ok());
                }
                started
            })
        })
        .collect();
    let started = async {
        let mut started = 0;
        for client in clients {
            started += client.await.unwrap();
        }
        started
    };
    let (ended, started) = tokio::join!(ended, started);
    let value = per_second(RUNS, begin.elapsed());
    let after = spawns_per_second();
    let filter = ListFilter {
        workflow: Some("bench-true".into()),
        ..ListFilter::default()
    };
    let client = Client::connect(&Addresses::default()).await?;
    let completed = client
        .list(filter)
        .await?
        .iter()
        .filter(|run| run.status == "completed")
        .count();
    if (started, ended, completed) != (RUNS, RUNS, RUNS + 1) {
        return Err(
            format!("{started} started, {ended} ended, {completed} completed of {RUNS}").into(),
        );
    }
    let floor = f64::midpoint(before, after);
    let note = format!("goal: ratio 0.5 or more; floor before {before:.0}, after {after:.0}");
    Ok(Figure {
        name: "runs_per_second",
        value,
        unit: "1/s",
        floor,
        note,
    })
}

/// 8 threads of posix_spawn and waitpid: std spawns so when nothing has to happen in the child.
fn spawns_per_second() -> f64 {
    let left = Arc::new(AtomicUsize::new(RUNS));
    let begin = Instant::now();
    let threads: Vec<_> = (0..IN_FLIGHT)
        .map(|_| {
            let left = left.clone();
            std::thread::spawn(move || {
                while take_one(&left) {
                    Command::new("/bin/true")
                        .stdin(Stdio::null())
                        .status()
                        .unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    per_second(RUNS, begin.elapsed())
}

fn take_one(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        left.checked_sub(1)
    })
    .is_ok()
}

/// Starts a run and waits for its end.
async fn run_to_end(
    manager: &ManagerProxy<'static>,
    changes: &mut RunChangedStream,
    workflow: &str,
) -> Outcome<String> {
    let (run, ..) = manager
        .start_run(workflow, "", StartOptions::default())
        .await?;
    while let Some(change) = changes.next().await {
        let arguments = change.args()?;
        if arguments.run == run && arguments.status.parse::<Status>()?.is_terminal() {
            break;
        }
    }
    Ok(run)
}

async fn start_to_exec(manager: &ManagerProxy<'static>) -> Outcome<Figure> {
    let mut changes = manager.receive_run_changed().await?;
    run_to_end(manager, &mut changes, "bench-clock").await?;
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let sent = monotonic_ns();
        let run = run_to_end(manager, &mut changes, "bench-clock").await?;
        let thread = manager
            .get_thread(
                &run,
                ThreadOptions {
                    limit: Some(1),
                    ..ThreadOptions::default()
                },
            )
            .await?;
        let acted: u64 = thread
            .first()
            .ok_or("a run without a round")?
            .content
            .trim()
            .parse()?;
        times.push(acted.saturating_sub(sent));
    }
    let program = std::env::var("NERVE_BENCH")?;
    let mut floors = Vec::new();
    for _ in 0..STARTS {
        let sent = monotonic_ns();
        let output = Command::new(&program).arg("clock").output()?;
        let acted: u64 = String::from_utf8(output.stdout)?.trim().parse()?;
        floors.push(acted.saturating_sub(sent));
    }
    times.sort_unstable();
    floors.sort_unstable();
    let note = format!(
        "goal: p50 under 5; p99 {:.3}",
        milliseconds(times[times.len() * 99 / 100])
    );
    Ok(Figure {
        name: "start_to_exec_ms",
        value: milliseconds(times[times.len() / 2]),
        unit: "ms",
        floor: milliseconds(floors[floors.len() / 2]),
        note,
    })
}

async fn exec_round_overhead(manager: &ManagerProxy<'static>) -> Outcome<Figure> {
    let mut changes = manager.receive_run_changed().await?;
    let run = run_to_end(manager, &mut changes, "bench-rounds").await?;
    let options = ThreadOptions {
        limit: Some(1_000),
        ..ThreadOptions::default()
    };
    let thread = manager.get_thread(&run, options).await?;
    let rounds = thread.iter().filter(|round| round.round > 0);
    let acted: Vec<u64> = rounds
        .map(|round| round.content.trim().parse())
        .collect::<Result<_, _>>()?;
    let program = std::env::var("NERVE_BENCH")?;
    let mut by_hand = Vec::new();
    for _ in 0..acted.len() {
        let output = Command::new(&program).arg("clock").output()?;
        by_hand.push(String::from_utf8(output.stdout)?.trim().parse()?);
    }
    let gaps = |mut times: Vec<u64>| {
        times.sort_unstable();
        let mut gaps: Vec<_> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        gaps.sort_unstable();
        gaps
    };
    let (gaps, floors) = (gaps(acted), gaps(by_hand));
    let (round, floor) = (gaps[gaps.len() / 2], floors[floors.len() / 2]);
    let note = format!(
        "goal: p50 under 1; {} rounds, each {:.3}, p99 {:.3}",
        thread.len(),
        milliseconds(round),
        milliseconds(gaps[gaps.len() * 99 / 100])
    );
    Ok(Figure {
        name: "exec_round_overhead_ms",
        value: milliseconds(round.saturating_sub(floor)),
        unit: "ms",
        floor: milliseconds(floor),
        note,
    })
}

async fn nerved_idle() -> Outcome<Figure> {
    let nerved = main_pid("nerve.service")?;
    let age = || -> Outcome<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{nerved}/stat"))?;
        let started: f64 = stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .nth(19)
            .unwrap_or("0")
            .parse()?;
        let uptime: f64 = std::fs::read_to_string("/proc/uptime")?
            .split(' ')
            .next()
            .unwrap_or("0")
            .parse()?;
        // USER_HZ is 100 on every Linux that systemd runs on.
        Ok(uptime - started / 100.0)
    };
    let left = 5.0 - age()?;
    if left > 0.0 {
        tokio::time::sleep(Duration::from_secs_f64(left)).await;
    }
    let value = peak_kib(nerved)?;
    let floor = peak_kib(main_pid("dbus.service")?)?;
    let note = "goal: under 16,384; floor: dbus-daemon".to_owned();
    Ok(Figure {
        name: "nerved_idle_kib",
        value,
        unit: "KiB",
        floor,
        note,
    })
}

fn main_pid(unit: &str) -> Outcome<u32> {
    let output = Command::new("systemctl")
        .args(["show", "-P", "MainPID", unit])
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

fn peak_kib(pid: u32) -> Outcome<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

fn monotonic_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn per_second(count: usize, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}
