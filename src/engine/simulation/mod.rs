//! The engine in a world that goes wrong: one seed is one schedule, and every choice in it comes from that seed.
//!
//! - `machine`: the clocks, systemd and the processes as they really are
//! - `worker`: workers, good ones and bad ones
//! - `world`: one schedule; `nerved`: the five phases around the engine; `clients`, `faults`: who wants what of it
//! - `oracle`, `verdicts`, `actions`: what must be true after each step, said again from outside
//! - `coverage`: how often what happened
//!
//! `cargo test simulation` plays [`SCHEDULES`] of them; `NERVE_SIMULATION_SCHEDULES=N` more or fewer,
//! `NERVE_SIMULATION_BASE=N` others. A schedule that fails prints its seed and its history;
//! `NERVE_SIMULATION_SEED=N cargo test simulation` plays it again.

mod actions;
mod clients;
mod coverage;
mod definitions;
mod faults;
mod machine;
mod nerved;
mod oracle;
mod race;
mod random;
mod verdicts;
mod worker;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use coverage::Coverage;
use world::World;

const SCHEDULES: u64 = 20_000;
/// The seeds are the numbers from here on.
const BASE: u64 = 1_000_000;

fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text:?} is not a number")),
    )
}

/// Plays a schedule; one that fails is played again for its history.
fn play(seed: u64, schedule: fn(&mut World)) -> Coverage {
    let mut world = World::new(seed, None);
    if catch_unwind(AssertUnwindSafe(|| schedule(&mut world))).is_ok() {
        return world.coverage;
    }
    let mut world = World::new(seed, Some(Vec::new()));
    let failed = catch_unwind(AssertUnwindSafe(|| schedule(&mut world))).is_err();
    let history = world.history.unwrap_or_default().join("\n");
    assert!(
        failed,
        "seed {seed} fails, but not twice: something is not decided by the seed"
    );
    panic!(
        "{history}\nseed {seed} fails as said above; to play it again:\n\
         NERVE_SIMULATION_SEED={seed} cargo test simulation"
    );
}

/// Plays schedules on all processors.
fn play_all(schedules: u64, schedule: fn(&mut World)) -> Coverage {
    let (first, many) = match setting("NERVE_SIMULATION_SEED") {
        Some(seed) => (seed, 1),
        None => (
            setting("NERVE_SIMULATION_BASE").unwrap_or(BASE),
            setting("NERVE_SIMULATION_SCHEDULES").unwrap_or(schedules),
        ),
    };
    let next = AtomicU64::new(first);
    let player = || {
        let mut sum = Coverage::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + many {
                return sum;
            }
            match catch_unwind(|| play(seed, schedule)) {
                Ok(coverage) => sum.add(&coverage),
                Err(failure) => {
                    next.store(u64::MAX / 2, Ordering::Relaxed);
                    std::panic::resume_unwind(failure);
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let players: Vec<_> = (0..threads).map(|_| scope.spawn(player)).collect();
        let mut sum = Coverage::default();
        for player in players {
            sum.add(
                &player
                    .join()
                    .unwrap_or_else(|failure| std::panic::resume_unwind(failure)),
            );
        }
        sum
    })
}

#[test]
fn through_all_that_goes_wrong_what_must_be_true_is_true() {
    let coverage = play_all(SCHEDULES, World::run);
    let (report, rare) = coverage.report();
    eprintln!("{report}{:>10}  inputs", coverage.inputs);
    if setting("NERVE_SIMULATION_SEED").is_none() && setting("NERVE_SIMULATION_SCHEDULES").is_none()
    {
        assert!(
            rare.is_empty(),
            "what was met too rarely proves nothing: {rare:#?}"
        );
    }
}

#[test]
fn of_a_kill_an_abort_and_the_natural_end_one_wins() {
    let coverage = play_all(10_000, World::race);
    eprintln!("{:?}", coverage.ends);
    if setting("NERVE_SIMULATION_SEED").is_none() && setting("NERVE_SIMULATION_SCHEDULES").is_none()
    {
        let won = |status: &&str| coverage.ends.get(status) >= Some(&100);
        assert!(["killed", "aborted", "completed", "failed"].iter().all(won));
    }
}
