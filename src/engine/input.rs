//! What goes into the engine.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Unit;
use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{AbortRequest, Accepted, Caller, KillRequest, Place};
use crate::model::status::RunResult;
use crate::model::workflow::{Definition, Target};

/// When an input arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// µs since the epoch: for people.
    pub wall_us: u64,
    /// µs of CLOCK_BOOTTIME: for deadlines.
    pub boot_us: u64,
}

/// Stands for a client that waits for an [`Answer`].
pub type Ticket = u64;
/// Stands for one connection of a worker; never used twice.
pub type LinkId = u64;
/// Numbers the questions put to systemd: of two answers the one with the greater number is newer.
pub type ReadId = u64;

/// A workflow's definition in force, if there is one, and what is wrong with the newest file.
#[derive(Debug, Clone, Default)]
pub struct Known {
    pub definition: Option<Arc<Definition>>,
    pub fault: Option<String>,
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A client wants a run. `existing` is the run of its workflow that has its key already.
    Start {
        ticket: Ticket,
        run: RunId,
        accepted: Accepted,
        existing: Option<RunId>,
    },
    /// A client wants a run dead.
    Kill {
        ticket: Ticket,
        run: RunId,
        request: KillRequest,
    },
    /// A client wants a run to end at the next round boundary.
    Abort {
        ticket: Ticket,
        run: RunId,
        request: AbortRequest,
    },
    /// A client wants a workflow's worker replaced once its runs have ended; those that have not after `timeout_us`
    /// are ended.
    Drain {
        ticket: Ticket,
        workflow: WorkflowName,
        timeout_us: Option<u64>,
        by: Caller,
    },
    /// A client wants a workflow's deaths, block and stop forgotten.
    Reset {
        ticket: Ticket,
        workflow: WorkflowName,
        by: Caller,
    },
    /// A client wants nothing to leave a queue.
    Pause {
        ticket: Ticket,
        reason: Option<String>,
        by: Caller,
    },
    /// A client wants that no longer.
    Resume { ticket: Ticket, by: Caller },
    /// All workflows that have a file, and most runs at a time over all of them.
    Definitions {
        workflows: BTreeMap<WorkflowName, Known>,
        max_active: Option<u32>,
    },
    /// A worker that has been identified said `ready`.
    Ready {
        link: LinkId,
        workflow: WorkflowName,
        place: Place,
        /// When systemd was asked who it is.
        read: ReadId,
        /// The digest of the settings that its unit was started with.
        settings: Option<String>,
        held: Vec<RunId>,
    },
    /// A worker finished a round.
    Message {
        link: LinkId,
        run: RunId,
        round: u32,
        message: Message,
    },
    /// An attempt of a round failed, and its worker tries it again after the delay.
    Attempt {
        link: LinkId,
        run: RunId,
        round: u32,
        attempt: u32,
        message: Message,
        delay_us: u64,
    },
    /// A workflow's moderator said who speaks in a round.
    Routed {
        link: LinkId,
        run: RunId,
        round: u32,
        target: Target,
    },
    /// A worker finished a run; `is_empty`: its cgroup was seen to be empty.
    Ended {
        link: LinkId,
        run: RunId,
        result: RunResult,
        /// What more it has to say of that.
        detail: Option<String>,
        is_empty: bool,
    },
    /// A worker's connection is gone.
    LinkLost { link: LinkId },
    /// What systemd says of a worker unit.
    Unit { workflow: WorkflowName, unit: Unit },
    /// All worker units that systemd has; those that are not named do not exist.
    Units {
        units: BTreeMap<WorkflowName, Unit>,
        read: ReadId,
    },
    /// systemd cannot be heard: how the units are is unknown until the next [`Input::Units`].
    BusLost,
    /// systemd took the job to start a worker unit, or nobody knows: what it says of the unit counts again.
    StartTaken {
        workflow: WorkflowName,
        /// What systemd is asked from now on is newer than the job.
        read: ReadId,
    },
    /// systemd refused to start a worker unit.
    StartRefused {
        workflow: WorkflowName,
        error: String,
    },
    /// Whether a worker unit is started is unknown: to be tried again after a pause.
    StartFailed { workflow: WorkflowName },
    /// A run that was dispatched was sent to nobody: what it said so far cannot be read, and why.
    ThreadDamaged { run: RunId, detail: String },
    /// No process is left in the run's cgroup.
    Emptied { run: RunId },
    /// Whether the disk is so full that nothing may leave a queue.
    Scarce(bool),
    /// [`Engine::deadline`] has passed.
    Deadline,
}
