//! How long runs that have ended are kept in the database, once all that happened to them is in the archive.

use std::collections::BTreeMap;

/// Without any limit.
pub const INFINITY: u32 = u32::MAX;

/// The limits of one place; what it does not say is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    /// Runs that ended longer ago are forgotten.
    pub days: Option<u32>,
    /// The newest so many of a workflow stay.
    pub runs: Option<u32>,
}

impl Retention {
    /// These limits, and those of `other` where these are silent.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            days: self.days.or(other.days),
            runs: self.runs.or(other.runs),
        }
    }

    /// The limits that there are.
    #[must_use]
    pub fn limits(self) -> (Option<u32>, Option<u32>) {
        let limit = |limit: Option<u32>| limit.filter(|limit| *limit != INFINITY);
        (limit(self.days), limit(self.runs))
    }
}

/// What is kept of which workflow, and how the archive writes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// Whether the archive's files are compressed.
    pub compressed: bool,
    /// Of all workflows.
    pub retention: Retention,
    /// Of those that say something themselves.
    pub of_workflows: BTreeMap<String, Retention>,
}

impl Policy {
    /// The limits of a workflow, which may have gone.
    #[must_use]
    pub fn of(&self, workflow: &str) -> Retention {
        let own = self.of_workflows.get(workflow).copied();
        own.unwrap_or_default().or(self.retention)
    }
}
