//! The policy of nerve, pure: inputs in, events and actions out. No I/O, no clock, no async.
//!
//! The manager's driver owns the one [`Engine`], feeds it everything that happens ([`Input`]), commits the events of a
//! [`Turn`] and only then performs its actions. When a commit fails the engine is thrown away with the process: what
//! it staged was seen by nobody. A simulation can do the same with a model of the world instead of a world.
//!
//! - `admission`: starts, the queue, slots
//! - `worker`: units, links, dispatch, deaths, idleness
//! - `ending`: ends, kills, time-outs: everything that goes through an empty cgroup
//! - `recovery`: the engine that a store's open runs add up to

mod admission;
mod ending;
mod recovery;
#[cfg(test)]
mod tests;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Accepted, BootInstant, Illegal, KillRequest, Place, Run, RunEvent};
use crate::model::status::RunResult;
use crate::model::workflow::{Definition, WorkerSettings};

pub use recovery::Recovered;
pub use worker::{Unit, UnitState};

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

/// Something that happened.
#[derive(Debug, Clone)]
pub enum Input {
    /// A client wants a run.
    Start {
        ticket: Ticket,
        run: RunId,
        accepted: Accepted,
    },
    /// A client wants a run dead.
    Kill {
        ticket: Ticket,
        run: RunId,
        request: KillRequest,
    },
    /// A worker that has been identified said `ready`.
    Ready {
        link: LinkId,
        workflow: WorkflowName,
        place: Place,
        held: Vec<RunId>,
    },
    /// A worker finished a round.
    Message {
        link: LinkId,
        run: RunId,
        round: u32,
        message: Message,
    },
    /// A worker finished a run; `is_empty`: its cgroup was seen to be empty.
    Ended {
        link: LinkId,
        run: RunId,
        result: RunResult,
        is_empty: bool,
    },
    /// A worker's connection is gone.
    LinkLost { link: LinkId },
    /// What systemd says of a worker unit.
    Unit { workflow: WorkflowName, unit: Unit },
    /// All worker units that systemd has; those that are not named do not exist.
    Units(BTreeMap<WorkflowName, Unit>),
    /// systemd took the job to start a worker unit, or nobody knows: what it says of the unit counts again.
    StartTaken { workflow: WorkflowName },
    /// systemd refused to start a worker unit.
    StartRefused {
        workflow: WorkflowName,
        error: String,
    },
    /// No process is left in the run's cgroup.
    Emptied { run: RunId },
    /// [`Engine::deadline`] has passed.
    Deadline,
}

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
    /// Send a run to a worker: with its thread when it is resumed.
    Dispatch { link: LinkId, dispatch: Dispatch },
    /// Send a worker one order.
    Tell { link: LinkId, order: Order },
    /// Close a worker's connection, saying why.
    Refuse { link: LinkId, error: String },
    /// Kill what is left in this cgroup and report [`Input::Emptied`] once it is empty.
    Empty { run: RunId, cgroup: String },
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The run exists, or the kill is in force.
    Done,
    /// No such workflow.
    UnknownWorkflow,
    /// The workflow's definition cannot be used; why.
    BadDefinition(String),
    /// The run is not open: it has ended, or never was.
    NotOpen,
    /// The disk is full and nothing was stored. Said by the driver, never by the engine.
    NoSpace,
}

/// An order to a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    Welcome,
    KillThread { run: RunId, grace_us: u64 },
    MessageAck { run: RunId, round: u32 },
    EventAck { run: RunId },
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
    pub trigger: serde_json::Value,
    /// What is left of the run's time-out.
    pub timeout_us: Option<u64>,
    pub definition: Arc<Definition>,
}

/// What a turn adds up to.
#[derive(Debug, Default)]
pub struct Turn {
    /// To be committed, in this order, together with the runs.
    pub events: Vec<Staged>,
    /// Every run that changed, as it now is.
    pub runs: BTreeMap<RunId, Run>,
    /// To be performed after the commit, in this order.
    pub actions: Vec<Action>,
}

/// An event to be committed.
#[derive(Debug, Clone, PartialEq)]
pub struct Staged {
    pub run: RunId,
    pub event: RunEvent,
    pub at: u64,
}

/// How a workflow stands, for people.
#[derive(Debug, Clone)]
pub struct WorkflowStatus {
    pub name: WorkflowName,
    pub worker: &'static str,
    pub running: usize,
    pub queued: usize,
    /// The definition in force and what is wrong with the newest one.
    pub definition: Option<Arc<Definition>>,
    pub fault: Option<String>,
}

/// All open runs and all workflows.
#[derive(Debug)]
pub struct Engine {
    boot_id: String,
    now: Now,
    workflows: BTreeMap<WorkflowName, Workflow>,
    open: HashMap<RunId, Open>,
    links: HashMap<LinkId, WorkflowName>,
    /// Order of acceptance of the next run.
    next_order: u64,
    turn: Turn,
}

#[derive(Debug, Default)]
struct Workflow {
    definition: Option<Arc<Definition>>,
    fault: Option<String>,
    /// By order of acceptance.
    queue: BTreeMap<u64, RunId>,
    /// Runs that have a slot, by order of acceptance.
    live: BTreeMap<u64, RunId>,
    worker: worker::Worker,
}

/// A run that has not ended.
#[derive(Debug)]
struct Open {
    run: Run,
    order: u64,
    /// The definition it is pinned to, once it left the queue.
    definition: Option<Arc<Definition>>,
    /// Whether the worker that is connected has it.
    held: Held,
    /// What is known of its cgroup.
    cgroup: Cgroup,
    /// How it ends, as soon as its cgroup is empty.
    ending: Option<(RunResult, Option<String>)>,
    /// When nerved kills the cgroup itself.
    kill_at: Option<u64>,
    /// When nerved enforces the run's time-out.
    timeout_at: Option<u64>,
}

/// Whether the worker that is connected has a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Held {
    No,
    /// It works on it.
    Works,
    /// It reported the end, and waits for the acknowledgement.
    Reported,
}

/// What is known of a run's cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cgroup {
    /// There may be processes in it.
    Unknown,
    /// It is being emptied.
    Emptying,
    /// It was seen to be empty, and the run was not dispatched since.
    Empty,
}

impl Open {
    fn new(run: Run, order: u64) -> Self {
        Self {
            run,
            order,
            definition: None,
            held: Held::No,
            cgroup: Cgroup::Unknown,
            ending: None,
            kill_at: None,
            timeout_at: None,
        }
    }

    fn place(&self) -> Option<&Place> {
        self.run.started()?.place.as_ref()
    }

    /// It waits for nothing but its end.
    fn is_finishing(&self) -> bool {
        self.ending.is_some() || self.run.is_killing()
    }
}

impl Engine {
    /// Takes one input. What it leads to is in the next [`Engine::take_turn`].
    ///
    /// # Errors
    /// [`Illegal`] when the input asks for a transition that its run does not allow; nothing of that is staged.
    pub fn step(&mut self, input: Input, now: Now) -> Result<(), Illegal> {
        self.now = now;
        let touched = match input {
            Input::Start {
                ticket,
                run,
                accepted,
            } => Some(self.start(ticket, run, &accepted)),
            Input::Kill {
                ticket,
                run,
                request,
            } => self.kill(ticket, run, request)?,
            Input::Ready {
                link,
                workflow,
                place,
                held,
            } => {
                self.ready(link, &workflow, &place, &held)?;
                Some(workflow)
            }
            Input::Message {
                link,
                run,
                round,
                message,
            } => self.message(link, run, round, message)?,
            Input::Ended {
                link,
                run,
                result,
                is_empty,
            } => self.worker_ended(link, run, result, is_empty)?,
            Input::LinkLost { link } => self.link_lost(link),
            Input::Unit { workflow, unit } => {
                self.unit(&workflow, &unit)?;
                Some(workflow)
            }
            Input::Units(units) => {
                self.units(&units)?;
                None
            }
            Input::StartTaken { workflow } => {
                self.workflow(&workflow).worker.start_pending = false;
                Some(workflow)
            }
            Input::StartRefused { workflow, error } => {
                self.start_refused(&workflow, &error)?;
                Some(workflow)
            }
            Input::Emptied { run } => self.emptied(run)?,
            Input::Deadline => {
                self.deadlines()?;
                None
            }
        };
        match touched {
            Some(workflow) => self.settle(&workflow),
            None => self.settle_all(),
        }
    }

    /// What the inputs since the last call add up to.
    pub fn take_turn(&mut self) -> Turn {
        std::mem::take(&mut self.turn)
    }

    /// When [`Input::Deadline`] is wanted next, in µs of CLOCK_BOOTTIME.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let live = self
            .workflows
            .values()
            .flat_map(|workflow| workflow.live.values());
        let of_runs = live.filter_map(|id| {
            let open = self.open.get(id)?;
            [open.kill_at, open.timeout_at].into_iter().flatten().min()
        });
        let of_workers = self
            .workflows
            .values()
            .filter_map(|workflow| workflow.worker.shutdown_at());
        of_runs.chain(of_workers).min()
    }

    /// How every workflow stands.
    #[must_use]
    pub fn status(&self) -> Vec<WorkflowStatus> {
        let status = |(name, workflow): (&WorkflowName, &Workflow)| WorkflowStatus {
            name: name.clone(),
            worker: workflow.worker.word(),
            running: workflow.live.len(),
            queued: workflow.queue.len(),
            definition: workflow.definition.clone(),
            fault: workflow.fault.clone(),
        };
        self.workflows.iter().map(status).collect()
    }

    /// Runs that have a slot, and runs that wait.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let running: usize = self
            .workflows
            .values()
            .map(|workflow| workflow.live.len())
            .sum();
        (running, self.open.len() - running)
    }

    /// Brings a workflow to rest: fills its slots, sends its runs to its worker, sees that there is one.
    fn settle(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        self.admit(name)?;
        self.dispatch(name)?;
        self.ensure_worker(name)
    }

    fn settle_all(&mut self) -> Result<(), Illegal> {
        let names: Vec<_> = self.workflows.keys().cloned().collect();
        names.iter().try_for_each(|name| self.settle(name))
    }

    /// Stages an event of an open run.
    fn record(&mut self, id: RunId, event: RunEvent) -> Result<(), Illegal> {
        let Some(open) = self.open.get_mut(&id) else {
            return Ok(());
        };
        let at = self.now.wall_us;
        open.run = open.run.after(&event, at)?;
        self.turn.runs.insert(id, open.run.clone());
        self.turn.events.push(Staged { run: id, event, at });
        Ok(())
    }

    fn act(&mut self, action: Action) {
        self.turn.actions.push(action);
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) {
        self.act(Action::Answer { ticket, answer });
    }

    fn tell(&mut self, link: LinkId, order: Order) {
        self.act(Action::Tell { link, order });
    }

    fn workflow(&mut self, name: &WorkflowName) -> &mut Workflow {
        self.workflows.entry(name.clone()).or_default()
    }

    /// Runs that have a slot in this workflow, in their order.
    fn live(&self, name: &WorkflowName) -> Vec<RunId> {
        self.workflows.get(name).map_or_else(Vec::new, |workflow| {
            workflow.live.values().copied().collect()
        })
    }

    fn instant(&self) -> BootInstant {
        BootInstant {
            boot_id: self.boot_id.clone(),
            boot_us: self.now.boot_us,
        }
    }
}
