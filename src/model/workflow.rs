//! A workflow that has been proved: every role is reachable, every status has a route, every route leads somewhere.
//! `config` makes workflows from files and gives out only what [`Workflow::check`] finds no fault with.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::hex::hex;
use super::limits;
use super::message::ERROR;
use super::name::{InvalidName, RoleName, WorkflowName};
use super::retention::Retention;
use super::role::{Moderator, Role};
use super::run::Digest;

/// A workflow together with the text it was read from: what a run pins.
#[derive(Debug, Clone, PartialEq)]
pub struct Definition {
    /// sha256 of the file's bytes.
    pub digest: Digest,
    /// What the file says.
    pub workflow: Workflow,
    /// The file as JSON, in the file's own shape: what a worker is sent.
    pub source: serde_json::Value,
}

/// A workflow: roles, a graph, limits.
#[derive(Debug, Clone, PartialEq)]
pub struct Workflow {
    /// Verb-first kebab-case; the file's stem.
    pub name: WorkflowName,
    /// One line for people.
    pub description: String,
    /// Rounds after which a run ends 2, unless whoever starts it says otherwise.
    pub max_rounds: Option<u32>,
    /// Runs at the same time.
    pub concurrency: u32,
    /// What happens to a start when all slots are taken.
    pub overflow: Overflow,
    /// Runs that may wait.
    pub max_queue: u32,
    /// What happens when more would wait.
    pub on_full: OnFull,
    /// A run that takes longer, its queue time not counted, ends 124.
    pub timeout: Option<Duration>,
    /// How long its runs are kept; what it does not say, nerve.yaml says.
    pub retention: Retention,
    /// The kinds of work.
    pub roles: BTreeMap<RoleName, Role>,
    /// Who says who comes after whom.
    pub routing: Routing,
    /// How the worker unit differs from the default.
    pub worker: WorkerSettings,
}

/// What happens to a start when all slots are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// It waits.
    Queue,
    /// It is dropped: nothing ever waits.
    Drop,
    /// It waits instead of the one that waited: only the newest does.
    Latest,
}

/// What happens to a start that has to wait when the queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFull {
    /// It waits, and the one that has waited longest is dropped.
    Evict,
    /// It is dropped.
    Refuse,
}

/// Where a status leads. As text it is the role's name, or `$END`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Target {
    /// To a role.
    Role(RoleName),
    /// To the end of the run.
    End,
}

impl Target {
    /// How the end of a run is written.
    pub const END: &str = "$END";
    /// Key of the route that a run begins with.
    pub const START: &str = "$START";
}

impl TryFrom<String> for Target {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        match text.as_str() {
            Self::END => Ok(Self::End),
            role => role.parse().map(Self::Role),
        }
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        match target {
            Target::Role(role) => role.to_string(),
            Target::End => Target::END.to_owned(),
        }
    }
}

/// Who says what comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Routing {
    /// A table.
    Graph(Graph),
    /// A command, after each round.
    Moderator(Moderator),
    /// The workflow's own worker, to nobody.
    Worker,
}

/// The routing table.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    /// Who speaks first.
    pub start: Target,
    /// Role, then status.
    pub routes: BTreeMap<RoleName, BTreeMap<String, Target>>,
}

impl Graph {
    /// Where `role` ending with `status` leads.
    #[must_use]
    pub fn route(&self, role: &RoleName, status: &str) -> Option<&Target> {
        self.routes.get(role)?.get(status)
    }
}

/// What a definition may say about its worker unit, in systemd's own terms.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct WorkerSettings {
    /// A static user; without one the unit has a dynamic user of its own.
    pub user: Option<String>,
    /// A static group.
    pub group: Option<String>,
    /// Further groups.
    pub supplementary_groups: Vec<String>,
    /// `NAME=VALUE` each.
    pub environment: Vec<String>,
    /// Bytes or a share of the machine's memory.
    pub memory_max: Option<Limit>,
    /// Tasks or a share of the machine's maximum.
    pub tasks_max: Option<Limit>,
    /// CPU time per second of wall time.
    pub cpu_quota: Option<Duration>,
    /// -20 to 19.
    pub nice: Option<i32>,
    /// Absolute paths; a leading `-` ignores one that does not exist.
    pub read_write_paths: Vec<String>,
    /// Likewise.
    pub read_only_paths: Vec<String>,
    /// No network but a loopback of its own.
    pub private_network: Option<bool>,
    /// In this time…
    pub start_limit_interval: Option<Duration>,
    /// …it may die so often before the workflow is blocked.
    pub start_limit_burst: Option<u32>,
    /// argv of the workflow's own worker, instead of the stock worker.
    pub exec: Vec<String>,
    /// The credentials that its roles need. A definition names them where it uses them, or its providers do.
    pub credentials: BTreeSet<String>,
}

impl WorkerSettings {
    /// Tells these settings from others: 32 hex digits, the first half of them for the program alone. An update of nerve
    /// may change it, and then workers are replaced by new ones.
    #[must_use]
    pub fn digest(&self) -> String {
        self.program() + &half(format!("{self:?}"))
    }

    /// The part of the digest that tells its program from others.
    fn program(&self) -> String {
        half(format!("{:?}", self.exec))
    }

    /// Whether a worker that was started with settings of this digest is the same program.
    #[must_use]
    pub fn has_program_of(&self, digest: &str) -> bool {
        digest.starts_with(&self.program())
    }

    /// Interval and burst of the crash limit, systemd's and nerved's.
    #[must_use]
    pub fn start_limit(&self) -> (Duration, u32) {
        let (interval, burst) = limits::START_LIMIT;
        (
            self.start_limit_interval.unwrap_or(interval),
            self.start_limit_burst.unwrap_or(burst),
        )
    }
}

/// 16 hex digits of a text's sha256.
fn half(text: String) -> String {
    hex(&Sha256::digest(text)[..8])
}

/// A limit in absolute terms or relative to what the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// `u64::MAX` is `infinity`.
    Absolute(u64),
    /// Hundredths of a percent.
    Permyriad(u32),
}

/// What is wrong with a graph; the place is told by which part it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// No way leads from `$START` to this role.
    Unreachable(RoleName),
    /// This role can end so and no route says what follows.
    MissingRoute(RoleName, String),
    /// This role never ends so.
    UnknownStatus(RoleName, String),
    /// A route names a role that does not exist; `None` is `$START`.
    UnknownTarget(Option<(RoleName, String)>, RoleName),
    /// The graph speaks of a role that does not exist.
    UnknownRole(RoleName),
    /// No way leads to `$END`: only `max_rounds` ends a run. A warning.
    Endless,
}

impl Workflow {
    /// Proves the graph; returns everything that is wrong with it. What routes otherwise can only be checked as it goes.
    #[must_use]
    pub fn check(&self) -> Vec<Fault> {
        let Routing::Graph(graph) = &self.routing else {
            return Vec::new();
        };
        let mut faults = Vec::new();
        let unknown = |target: &Target| match target {
            Target::Role(role) if !self.roles.contains_key(role) => Some(role.clone()),
            _ => None,
        };
        if let Some(role) = unknown(&graph.start) {
            faults.push(Fault::UnknownTarget(None, role));
        }
        for (name, routes) in &graph.routes {
            let Some(role) = self.roles.get(name) else {
                faults.push(Fault::UnknownRole(name.clone()));
                continue;
            };
            for (status, target) in routes {
                if status != ERROR && !role.statuses().any(|known| known == status) {
                    faults.push(Fault::UnknownStatus(name.clone(), status.clone()));
                }
                if let Some(missing) = unknown(target) {
                    faults.push(Fault::UnknownTarget(
                        Some((name.clone(), status.clone())),
                        missing,
                    ));
                }
            }
        }
        let (reachable, ends) = graph.reachable();
        for (name, role) in &self.roles {
            if !reachable.contains(name) {
                faults.push(Fault::Unreachable(name.clone()));
                continue;
            }
            let missing = role
                .statuses()
                .filter(|status| graph.route(name, status).is_none());
            faults.extend(missing.map(|status| Fault::MissingRoute(name.clone(), status.into())));
        }
        if !ends && faults.is_empty() {
            faults.push(Fault::Endless);
        }
        faults
    }
}

impl Graph {
    /// The roles that can be reached from the start, and whether `$END` can.
    fn reachable(&self) -> (BTreeSet<&RoleName>, bool) {
        let (mut seen, mut ends) = (BTreeSet::new(), false);
        let mut waiting = vec![&self.start];
        while let Some(target) = waiting.pop() {
            match target {
                Target::End => ends = true,
                Target::Role(role) if seen.insert(role) => {
                    let routes = self.routes.get(role).into_iter();
                    waiting.extend(routes.flat_map(BTreeMap::values));
                }
                Target::Role(_) => {}
            }
        }
        (seen, ends)
    }
}
