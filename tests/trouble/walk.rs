//! Calls that fail: each write, truncation, sync, creation and rename of the writer's life in turn, once and from then on,
//! for want of space and for a broken disk, and writes that are cut short. Whatever somebody was told of is there
//! afterwards, what the full disk refused is not, and all of it is whole.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use super::check;
use super::record::Dice;
use super::{ACKNOWLEDGED, run_writer, scratch, setting};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;
/// A write of which only the first half is done; the rest finds no space.
const SHORT: i32 = 0;

/// One in so many; `make crash-states` takes each.
const STRIDE: u64 = 12;
/// Runs, and how many at a time.
const WORK: (u32, u32) = (10, 2);

/// What the writer said: the last event that is acknowledged, and whether the disk was full then.
fn told(directory: &Path) -> (u64, bool) {
    let text = std::fs::read_to_string(directory.join(ACKNOWLEDGED)).unwrap_or_default();
    let last = text.lines().next_back().unwrap_or("0");
    let (is_full, number) = match last.strip_prefix("full ") {
        Some(number) => (true, number),
        None => (false, last),
    };
    (number.parse().unwrap(), is_full)
}

/// How many calls there are that can fail.
fn calls() -> u64 {
    let directory = scratch();
    let work = directory.path().join("work");
    std::fs::create_dir(&work).unwrap();
    let count = directory.path().join("count");
    let wrote = run_writer(
        &work,
        WORK,
        &[("NERVE_SHIM_COUNT", count.to_str().unwrap())],
    );
    assert!(wrote.success());
    let text = std::fs::read_to_string(count).unwrap();
    text.trim().parse().unwrap()
}

/// One life with one fault; returns whether the writer noticed.
fn live(call: u64, times: u64, error: i32) -> Result<bool, String> {
    let directory = scratch();
    let fault = format!("{call} {times} {error}");
    let wrote = run_writer(directory.path(), WORK, &[("NERVE_SHIM_FAIL", &fault)]);
    let (acknowledged, was_full) = told(directory.path());
    let what = format!("call {call}, {times} times error {error}, {acknowledged} acknowledged");
    let path = directory.path().join("nerve.db");
    if !path.exists() {
        return if acknowledged == 0 {
            Ok(true)
        } else {
            Err(format!("{what}: there is no database"))
        };
    }
    // As the next nerved finds it.
    let store = nerve::store::Store::open(directory.path());
    drop(store.map_err(|error| format!("{what}: {error}"))?);
    let connection = check::open(&path).unwrap();
    let number = |sql: &str| -> u64 {
        let found: i64 = connection.query_row(sql, [], |row| row.get(0)).unwrap();
        found.unsigned_abs()
    };
    let newest = number("SELECT coalesce(max(seq), 0) FROM events");
    if newest < acknowledged {
        return Err(format!("{what}: {newest} is the newest"));
    }
    if was_full && newest != acknowledged {
        return Err(format!(
            "{what}: {newest} is there, though the disk was full"
        ));
    }
    if number("SELECT count(*) FROM events") != newest {
        return Err(format!("{what}: events are missing"));
    }
    let torn = number(
        "SELECT count(*) FROM workflow_runs r WHERE (ended_at IS NOT NULL) <>
         (SELECT count(*) FROM events WHERE ref = r.run AND type = 'ended')",
    );
    if torn > 0 {
        return Err(format!("{what}: {torn} runs are half stored"));
    }
    let blobs = check::blobs(directory.path());
    let mut select = connection
        .prepare("SELECT DISTINCT blob FROM events WHERE blob IS NOT NULL")
        .unwrap();
    let mut rows = select.query([]).unwrap();
    while let Some(row) = rows.next().unwrap() {
        let blob: String = row.get(0).unwrap();
        if !blobs.contains_key(&format!("blobs/{}/{}", &blob[..2], &blob[2..])) {
            return Err(format!("{what}: blob {blob} is missing"));
        }
    }
    Ok(!wrote.success())
}

#[test]
fn no_call_that_fails_loses_what_was_acknowledged() {
    let stride = setting("NERVE_WALK_STRIDE", STRIDE);
    let seed = setting("NERVE_SEED", 1);
    let calls = calls();
    assert!(calls > 500, "{calls}");
    let mut dice = Dice::new(seed);
    let mut lives = Vec::new();
    for call in 1..=calls {
        for (times, error) in [(1, EIO), (0, EIO), (1, ENOSPC), (0, ENOSPC), (1, SHORT)] {
            if dice.next().is_multiple_of(stride) {
                lives.push((call, times, error));
            }
        }
    }
    let (next, noticed) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let faults: Vec<String> = std::thread::scope(|scope| {
        let walk = || {
            let mut faults = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(call, times, error)) = lives.get(usize::try_from(index).unwrap()) else {
                    return faults;
                };
                match live(call, times, error) {
                    Ok(is_noticed) => drop(noticed.fetch_add(is_noticed.into(), Ordering::Relaxed)),
                    Err(fault) => faults.push(fault),
                }
            }
        };
        let walkers: Vec<_> = (0..threads).map(|_| scope.spawn(walk)).collect();
        walkers
            .into_iter()
            .flat_map(|walker| walker.join().unwrap())
            .collect()
    });
    let noticed = noticed.into_inner();
    eprintln!(
        "seed {seed}: {} faults in {calls} calls, {noticed} of which ended the writer: {} lost or damaged something",
        lives.len(),
        faults.len()
    );
    assert_eq!(faults, Vec::<String>::new());
    // Most calls are ones that a commit hangs on.
    assert!(
        noticed > lives.len() as u64 / 2,
        "{noticed} of {}",
        lives.len()
    );
}
