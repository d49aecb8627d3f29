//! What is done to the store once a day: old events go into files, runs are forgotten, blobs collected, space given back.
//! On a thread of its own.

use super::archive::{Archived, Plan, archive};
use super::{Error, Handle, collect, retention, vacuum};
use crate::model::retention::Policy;
use crate::model::time::{DAY_US, day_start};

/// What is wanted of it.
#[derive(Debug, Clone, Copy)]
pub struct Orders {
    /// Days that ended longer ago go; blobs that nothing refers to go when they are older. In µs.
    pub older_than: u64,
    /// The oldest so many days.
    pub max_days: Option<u32>,
    /// Whether free space goes back to the filesystem.
    pub vacuum: bool,
    /// Nothing is done; what would be is said.
    pub dry_run: bool,
}

/// What was done, or would be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    pub days: Vec<Archived>,
    /// Runs.
    pub forgotten: u64,
    /// Those that were removed.
    pub blobs: u64,
    /// Bytes.
    pub freed: Option<u64>,
}

/// Does it. `now` is in µs since the epoch.
///
/// # Errors
/// When something of it fails; what was done until then stays done, and the next time goes on from there.
pub fn upkeep(
    store: &Handle,
    orders: &Orders,
    policy: &Policy,
    now: u64,
) -> Result<Outcome, Error> {
    let before = now.saturating_sub(orders.older_than);
    let plan = Plan {
        ended_by: before,
        max_days: orders.max_days,
        compressed: policy.compressed,
        dry_run: orders.dry_run,
    };
    let days = archive(store, &plan)?;
    if orders.dry_run {
        let last = days.last().and_then(|last| day_start(&last.day));
        let archived_before = last.map_or(0, |start| start + DAY_US);
        return Ok(Outcome {
            days,
            forgotten: retention::would_forget(store, policy, now, archived_before)?,
            blobs: collect::would_collect(store, before)?,
            freed: None,
        });
    }
    Ok(Outcome {
        days,
        forgotten: retention::forget(store, policy, now)?,
        blobs: collect::collect(store, before)?,
        freed: if orders.vacuum {
            Some(vacuum::vacuum(store)?)
        } else {
            None
        },
    })
}
