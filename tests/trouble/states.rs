//! Power cuts: everything that the writer did is recorded, every state that a disk may be in at any moment of it is made,
//! and each is what a nerved can go on with and has all that was acknowledged.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::check::{self, Fault, Oracle};
use super::record::{self, Cut, Dice, Disk, Op};
use super::{run_writer, scratch, setting};

/// So many distinct states of so many runs, three at a time.
const SHORT: (u64, u32) = (1_500, 72);
/// Where `make crash-states` wants more, its runs fill the log several times.
const RUNS: u32 = 240;
/// One in so many is opened by nerve's own store as well.
const SAMPLE: u64 = 20;

/// What came of it.
#[derive(Debug, Default)]
struct Found {
    distinct: u64,
    lost: u64,
    corrupt: u64,
    /// Of the first ones: what, and after which step.
    faults: Vec<String>,
}

fn recorded(directory: &Path, runs: u32) -> (Vec<Op>, Oracle) {
    let work = directory.join("work");
    std::fs::create_dir(&work).unwrap();
    let record = directory.join("record");
    let wrote = run_writer(
        &work,
        (runs, 3),
        &[("NERVE_SHIM_RECORD", record.to_str().unwrap())],
    );
    assert!(wrote.success());
    let ops = record::read(&record, &work);
    // The record is all that happened.
    let mut disk = Disk::default();
    for op in &ops {
        disk.apply(op);
    }
    assert_eq!(
        disk.content("nerve.db"),
        std::fs::read(work.join("nerve.db")).unwrap()
    );
    let oracle = Oracle {
        database: work.join("nerve.db"),
        blobs: check::blobs(&work),
    };
    assert!(oracle.blobs.len() >= 5 && disk.acknowledged > 300);
    let syncs = ops.iter().filter(|op| matches!(op, Op::Sync(_))).count();
    let checkpoints = |op: &&Op| matches!(op, Op::Sync(path) if path == "nerve.db");
    eprintln!(
        "{} calls, {syncs} syncs, {} of them of checkpoints; {} events acknowledged",
        ops.len(),
        ops.iter().filter(checkpoints).count(),
        disk.acknowledged
    );
    (ops, oracle)
}

/// Goes over all that was done, again and again, until there are so many distinct states.
fn explore(ops: &[Op], oracle: &Oracle, wanted: u64, seed: u64) -> Found {
    let known = Mutex::new(HashSet::new());
    let found = Mutex::new(Found::default());
    let passes = AtomicU64::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let directory = scratch();
                loop {
                    let pass = passes.fetch_add(1, Ordering::Relaxed);
                    let dice = &mut Dice::new(seed + pass);
                    let mut disk = Disk::default();
                    // A short walk looks at some of the moments, a long one at each, several times.
                    let stride = (ops.len() as u64 / wanted.max(1) + 1) * 4;
                    for (step, op) in ops.iter().enumerate() {
                        disk.apply(op);
                        if found.lock().unwrap().distinct >= wanted {
                            return;
                        }
                        if !dice.next().is_multiple_of(stride) {
                            continue;
                        }
                        let cut = match dice.below(6) {
                            0 => Cut::Nothing,
                            1 => Cut::Everything,
                            kind => Cut::Any {
                                torn: kind % 2 == 0,
                            },
                        };
                        let state = disk.cut(cut, dice);
                        if !known.lock().unwrap().insert(state.hash()) {
                            continue;
                        }
                        state.write(directory.path(), false);
                        let mut verdict = check::check(directory.path(), &state, oracle);
                        // At the very beginning nerve's own look at what it finds counts most.
                        if verdict.is_ok()
                            && (state.acknowledged < 2 || dice.next().is_multiple_of(SAMPLE))
                        {
                            state.write(directory.path(), true);
                            verdict = check::reopen(directory.path());
                        }
                        let mut found = found.lock().unwrap();
                        found.distinct += 1;
                        let Err(fault) = verdict else { continue };
                        match fault {
                            Fault::Lost(_) => found.lost += 1,
                            Fault::Corrupt(_) => found.corrupt += 1,
                        }
                        if found.faults.len() < 5 {
                            let text =
                                format!("seed {seed}, pass {pass}, step {step} {cut:?}: {fault:?}");
                            found.faults.push(text);
                        }
                    }
                }
            });
        }
    });
    let found = found.into_inner().unwrap();
    eprintln!(
        "seed {seed}: {} distinct states in {} passes: {} lost, {} corrupt",
        found.distinct,
        passes.into_inner(),
        found.lost,
        found.corrupt
    );
    found
}

#[test]
fn no_power_cut_loses_what_was_acknowledged() {
    let wanted = setting("NERVE_CRASH_STATES", SHORT.0);
    let runs = if wanted > SHORT.0 { RUNS } else { SHORT.1 };
    let seed = setting("NERVE_SEED", 1);
    let directory = scratch();
    let (ops, oracle) = recorded(directory.path(), runs);
    let found = explore(&ops, &oracle, wanted, seed);
    assert_eq!((found.lost, found.corrupt), (0, 0), "{:#?}", found.faults);
    // With less care things are lost, and this finds it.
    let careless = record::without_syncs_of_commits(&ops);
    let found = explore(&careless, &oracle, wanted / 5, seed);
    assert!(found.lost > 0, "{found:#?}");
}
