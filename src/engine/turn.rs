//! What comes out of the engine: events to be committed, then actions to be performed.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{LinkId, Ticket};
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Run, RunEvent};
use crate::model::status::RunResult;
use crate::model::worker::{ManagerEvent, Pause, WorkerEvent, WorkerRecord};
use crate::model::workflow::{Definition, Target, WorkerSettings};

/// Something to do, once the turn is committed. Doing it twice is harmless.
#[derive(Debug, Clone)]
pub enum Action {
    /// Tell a client.
    Answer { ticket: Ticket, answer: Answer },
    /// Start the worker unit.
    StartUnit {
        workflow: WorkflowName,
        settings: WorkerSettings,
    },
    /// Have systemd forget that a worker unit failed.
    ResetUnit { workflow: WorkflowName },
    /// Ask systemd how a worker unit is and report [`Input::Unit`].
    ReadUnit { workflow: WorkflowName },
    /// Kill all processes of a worker unit; systemd starts it anew.
    KillUnit {
        workflow: WorkflowName,
        cgroup: String,
    },
    /// Send a run to a worker: with its thread when it is resumed.
    Dispatch { link: LinkId, dispatch: Dispatch },
    /// Send a worker one order.
    Tell { link: LinkId, order: Order },
    /// Close a worker's connection, saying why.
    Refuse { link: LinkId, error: String },
    /// Likewise, and kill all processes of its unit when the worker at the other end is still alive.
    Fence { link: LinkId, error: String },
    /// Kill what is left in this cgroup and report [`Input::Emptied`] once it is empty.
    Empty { run: RunId, cgroup: String },
    /// Kill all processes of a worker unit, and report [`Input::Emptied`] of this run once they are gone; systemd starts
    /// the unit anew.
    EmptyUnit {
        run: RunId,
        workflow: WorkflowName,
        cgroup: String,
    },
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is so, durably.
    Done,
    /// The run exists; when it was dropped at once: why, and in words. And what is wrong with the newest definition,
    /// when an older one is in force.
    Started {
        run: RunId,
        dropped: Option<(RunResult, String)>,
        fault: Option<String>,
    },
    /// This run has the key already.
    Existing(RunId),
    /// No such workflow.
    UnknownWorkflow,
    /// The workflow's definition cannot be used; why.
    BadDefinition(String),
    /// The run is not open: it has ended, or never was.
    NotOpen,
    /// The run is being ended already, by a kill or an abort.
    Ending,
    /// The disk is full and nothing was stored: where, and how full. Said by the driver, never by the engine.
    NoSpace(String),
}

/// An order to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    Welcome,
    KillThread {
        run: RunId,
        grace_us: u64,
    },
    AbortThread {
        run: RunId,
        reason: Option<String>,
    },
    MessageAck {
        run: RunId,
        round: u32,
    },
    AttemptAck {
        run: RunId,
        round: u32,
        attempt: u32,
    },
    RouteAck {
        run: RunId,
        round: u32,
    },
    EventAck {
        run: RunId,
    },
    Shutdown,
}

/// A run on its way to a worker.
#[derive(Debug, Clone)]
pub struct Dispatch {
    pub run: RunId,
    pub attempt: u32,
    /// Rounds that are done already.
    pub rounds: u32,
    pub max_rounds: u32,
    pub dry_run: bool,
    /// What is left of the run's time-out.
    pub timeout_us: Option<u64>,
    /// How many attempts of the next round failed, and what is left of the pause before the next one.
    pub failed: Option<(u32, u64)>,
    /// What the moderator said of the next round.
    pub route: Option<Target>,
    pub definition: Arc<Definition>,
}

/// What a turn adds up to.
#[derive(Debug, Default)]
pub struct Turn {
    /// To be committed, in this order, together with the runs.
    pub events: Vec<Staged>,
    /// Every run that changed, as it now is.
    pub runs: BTreeMap<RunId, Run>,
    /// Every worker's record that changed, as it now is.
    pub workers: BTreeMap<WorkflowName, WorkerRecord>,
    /// The pause, when that changed.
    pub pause: Option<Option<Pause>>,
    /// To be performed after the commit, in this order.
    pub actions: Vec<Action>,
}

/// An event to be committed.
#[derive(Debug, Clone, PartialEq)]
pub struct Staged {
    pub event: Event,
    /// µs since the epoch.
    pub at: u64,
}

/// What happened, and to whom.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Run(RunId, RunEvent),
    Worker(WorkflowName, WorkerEvent),
    Manager(ManagerEvent),
}
