//! Denials on record: enough of them to see who tries what, and not so many that somebody could fill the disk by being
//! denied.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::manager::handle::Handle;
use crate::model::audit::{Audit, Verb};
use crate::model::run::Caller;
use crate::os::clock;

/// So many denials of one user are recorded at once…
const BURST: u32 = 10;
/// …and then one in so much time.
const PAUSE: Duration = Duration::from_secs(10);
/// Users that are told apart; all others share what one has.
const USERS: usize = 256;
/// Nobody's uid: the others'.
const OTHERS: u32 = u32::MAX;

/// Records denials.
#[derive(Debug)]
pub(super) struct Denials {
    handle: Handle,
    users: Mutex<HashMap<u32, Allowance>>,
}

/// What one user may still have recorded.
#[derive(Debug)]
struct Allowance {
    left: u32,
    /// When `left` was last right.
    since: Instant,
    /// Denials that were not recorded since the last one that was.
    omitted: u64,
}

impl Denials {
    /// On record with this manager.
    pub fn new(handle: Handle) -> Self {
        Self {
            handle,
            users: Mutex::default(),
        }
    }

    /// Records that this caller was denied a method, if not too many of his were; never waits.
    pub fn record(&self, caller: &Caller, method: &str, action: &str) {
        let Some(omitted) = self.admit(caller.uid, Instant::now()) else {
            return;
        };
        let uid = caller.uid;
        tracing::warn!(uid, action, omitted, "denied");
        let outcome = match omitted {
            0 => "not permitted".to_owned(),
            calls => format!("not permitted, nor were {calls} before it that are not on record"),
        };
        let audit = Audit {
            verb: Verb::Denied,
            subject: method.to_owned(),
            by: Some(caller.clone()),
            reason: None,
            outcome,
            at: clock::wall_us(),
        };
        if self.handle.audit_later(audit).is_err() {
            self.omit(uid, omitted + 1);
        }
    }

    /// How many were left out before this one; `None` when it is left out as well.
    fn admit(&self, uid: u32, now: Instant) -> Option<u64> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if !users.contains_key(&uid) && users.len() >= USERS {
            // Who has been quiet for long is as good as new.
            users.retain(|_, allowance| {
                allowance.refill(now);
                allowance.left < BURST || allowance.omitted > 0
            });
        }
        let uid = if users.contains_key(&uid) || users.len() < USERS {
            uid
        } else {
            OTHERS
        };
        let allowance = users.entry(uid).or_insert(Allowance {
            left: BURST,
            since: now,
            omitted: 0,
        });
        allowance.refill(now);
        if allowance.left == 0 {
            allowance.omitted += 1;
            return None;
        }
        allowance.left -= 1;
        Some(std::mem::take(&mut allowance.omitted))
    }

    /// So many could not be recorded after all.
    fn omit(&self, uid: u32, denials: u64) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(allowance) = users.get_mut(&uid) {
            allowance.omitted += denials;
        }
    }
}

impl Allowance {
    fn refill(&mut self, now: Instant) {
        let pauses = now.duration_since(self.since).as_secs() / PAUSE.as_secs();
        let pauses = u32::try_from(pauses).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(pauses).min(BURST);
        self.since = if self.left == BURST {
            now
        } else {
            self.since + PAUSE * pauses
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::service::tests::manager;
    use super::*;

    #[tokio::test]
    async fn ten_at_once_then_one_in_ten_seconds_with_the_number_of_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let denials = Denials::new(manager(directory.path()).handle);
        let begin = Instant::now();
        let after = |seconds| begin + Duration::from_secs(seconds);
        for _ in 0..BURST {
            assert_eq!(denials.admit(7, begin), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(denials.admit(7, after(9)), None);
        }
        assert_eq!(denials.admit(8, after(9)), Some(0));
        assert_eq!(denials.admit(7, after(19)), Some(5));
        assert_eq!(denials.admit(7, after(19)), None);
        assert_eq!(denials.admit(7, after(20)), Some(1));
        for left_out in [Some(0); BURST as usize].into_iter().chain([None]) {
            assert_eq!(denials.admit(7, after(1_000)), left_out);
        }
    }

    #[tokio::test]
    async fn of_very_many_users_those_that_come_last_share_one_allowance() {
        let directory = tempfile::tempdir().unwrap();
        let denials = Denials::new(manager(directory.path()).handle);
        let begin = Instant::now();
        let recorded = (0..10_000)
            .filter(|uid| denials.admit(*uid, begin).is_some())
            .count();
        assert_eq!(recorded, USERS + BURST as usize);
        assert!(denials.users.lock().unwrap().len() <= USERS + 1);
        // They are forgotten when they have been quiet.
        let later = begin + PAUSE * 2 * BURST;
        assert_eq!(denials.admit(20_000, later), Some(0));
        assert!(denials.users.lock().unwrap().len() <= 2);
    }
}
