//! The policy of nerve, pure: inputs in, events and actions out. No I/O, no clock, no async.
//!
//! The manager's driver owns the one [`Engine`], feeds it everything that happens ([`Input`]), commits the events of a
//! [`Turn`] and only then performs its actions. When a commit fails the engine is thrown away with the process: what
//! it staged was seen by nobody. A simulation can do the same with a model of the world instead of a world.
//!
//! - `input`, `turn`: what goes in and what comes out
//! - `admission`: starts, the queue, slots, the pause
//! - `unit`: a worker unit, as systemd and the engine know it
//! - `worker`: units and links: who is there
//! - `death`: who died, and what that means
//! - `dispatch`: which runs a worker is sent, and whether there has to be one
//! - `drain`: workers that are to be replaced, definitions that change
//! - `rounds`: what workers say of the rounds of their runs
//! - `ending`: ends, kills, aborts, time-outs: everything that goes through an empty cgroup
//! - `recovery`: the engine that a store's open runs add up to

mod admission;
mod death;
mod dispatch;
mod drain;
mod ending;
mod input;
mod recovery;
mod rounds;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
mod turn;
mod unit;
mod worker;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{BootInstant, Illegal, Place, Run, RunEvent, Started};
use crate::model::status::RunResult;
use crate::model::worker::{ManagerEvent, Pause, WorkerEvent, WorkerRecord};
use crate::model::workflow::Definition;
use unit::Peer;

pub use input::{Input, Known, LinkId, Now, ReadId, Ticket};
pub use recovery::Recovered;
pub use turn::{Action, Answer, Dispatch, Event, Order, Staged, Turn};
pub use unit::{Stop, Unit, UnitState};

/// How a workflow stands, for people.
#[derive(Debug, Clone)]
pub struct WorkflowStatus {
    pub name: WorkflowName,
    /// One word for its worker.
    pub worker: &'static str,
    /// The worker's invocation, if it has one.
    pub invocation: Option<String>,
    /// Why nothing is started, and what to do about it; since when, in µs since the epoch.
    pub obstacle: Option<(Option<u64>, String)>,
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
    max_active: Option<u32>,
    pause: Option<Pause>,
    /// The disk is nearly full: what is left is for the runs that are under way.
    is_scarce: bool,
    /// systemd has said which units there are; before that nobody knows what a worker was started with.
    units_known: bool,
    /// nerve or the machine goes down: until then nothing is started.
    going_down_until: Option<u64>,
    /// Order of acceptance of the next run.
    next_order: u64,
    /// Starts of this step that are to be answered once it is clear what became of them.
    unanswered: Vec<(Ticket, RunId)>,
    /// Keys of this turn's starts: the store does not know them yet.
    keys: HashMap<(WorkflowName, String), RunId>,
    turn: Turn,
}

#[derive(Debug, Default)]
struct Workflow {
    /// Without a definition and without a fault it has been removed, or never was.
    known: Known,
    /// By order of acceptance.
    queue: BTreeMap<u64, RunId>,
    /// Runs that have a slot, by order of acceptance.
    live: BTreeMap<u64, RunId>,
    worker: unit::Worker,
    record: WorkerRecord,
}

impl Workflow {
    fn exists(&self) -> bool {
        self.known.definition.is_some() || self.known.fault.is_some()
    }
}

/// What an input may have changed.
enum Touched {
    Nothing,
    Workflow(WorkflowName),
    Everything,
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
    /// An earlier nerved handed it over, and may have told the worker what nobody remembers.
    is_inherited: bool,
    /// How it ends, as soon as its cgroup is empty.
    ending: Option<Box<(RunResult, Option<String>)>>,
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
            is_inherited: false,
            ending: None,
            kill_at: None,
            timeout_at: None,
        }
    }

    fn place(&self) -> Option<&Place> {
        self.run.started()?.place.as_ref()
    }

    /// Its worker is a program of the user's own.
    fn has_own_worker(&self) -> bool {
        let definition = self.definition.as_ref();
        definition.is_some_and(|definition| !definition.workflow.worker.exec.is_empty())
    }

    /// Whether it wants another program for a worker than the one that was started with settings of this digest.
    fn wants_other_than(&self, settings: Option<&String>) -> bool {
        let definition = self.definition.as_ref();
        definition
            .zip(settings)
            .is_some_and(|(definition, settings)| {
                !definition.workflow.worker.has_program_of(settings)
            })
    }

    /// It waits for nothing but its end.
    fn is_finishing(&self) -> bool {
        self.ending.is_some() || self.run.is_killing()
    }

    /// It is with this invocation, as far as anybody knows.
    fn is_with(&self, invocation: &str) -> bool {
        self.run.started().is_some_and(|started| {
            !started.is_lost
                && started
                    .place
                    .as_ref()
                    .is_some_and(|place| place.invocation == invocation)
        })
    }

    /// No worker has it, and none that had it can still come back.
    fn is_nowhere(&self) -> bool {
        let is_lost = |started: &Started| started.place.is_none() || started.is_lost;
        self.held == Held::No && self.run.started().is_none_or(is_lost)
    }
}

impl Engine {
    /// Takes one input. What it leads to is in the next [`Engine::take_turn`].
    ///
    /// # Errors
    /// [`Illegal`] when the input asks for a transition that its run does not allow; nothing of that is staged.
    pub fn step(&mut self, input: Input, now: Now) -> Result<(), Illegal> {
        self.now = now;
        let touched = self.take(input)?;
        match touched {
            Touched::Nothing => {}
            Touched::Workflow(workflow) => self.settle(&workflow)?,
            Touched::Everything => self.settle_all()?,
        }
        for (ticket, run) in std::mem::take(&mut self.unanswered) {
            let answer = self.started(run);
            self.answer(ticket, answer);
        }
        Ok(())
    }

    fn take(&mut self, input: Input) -> Result<Touched, Illegal> {
        match input {
            Input::Start {
                ticket,
                run,
                accepted,
                existing,
            } => Ok(self.start(ticket, run, accepted, existing)),
            Input::Kill {
                ticket,
                run,
                request,
            } => self.kill(ticket, run, request),
            Input::Abort {
                ticket,
                run,
                request,
            } => self.abort(ticket, run, request),
            Input::Drain {
                ticket,
                workflow,
                timeout_us,
                by,
            } => Ok(self.drain(ticket, workflow, timeout_us, by)),
            Input::Reset {
                ticket,
                workflow,
                by,
            } => Ok(self.reset(ticket, workflow, by)),
            Input::Pause { ticket, reason, by } => {
                Ok(self.set_pause(ticket, ManagerEvent::Paused { reason, by }))
            }
            Input::Resume { ticket, by } => {
                Ok(self.set_pause(ticket, ManagerEvent::Resumed { by }))
            }
            Input::Definitions {
                workflows,
                max_active,
            } => self.definitions(workflows, max_active),
            Input::Ready {
                link,
                workflow,
                place,
                read,
                settings,
                held,
            } => {
                let peer = Peer {
                    link,
                    place,
                    read,
                    settings,
                    held,
                };
                self.ready(&workflow, peer);
                Ok(Touched::Workflow(workflow))
            }
            Input::Message {
                link,
                run,
                round,
                message,
            } => self.message(link, run, round, message),
            Input::Attempt {
                link,
                run,
                round,
                attempt,
                message,
                delay_us,
            } => self.attempt_failed(link, run, round, attempt, message, delay_us),
            Input::Routed {
                link,
                run,
                round,
                target,
            } => self.routed(link, run, round, target),
            Input::Ended {
                link,
                run,
                result,
                detail,
                is_empty,
            } => self.worker_ended(link, run, (result, detail), is_empty),
            Input::LinkLost { link } => Ok(self.link_lost(link)),
            Input::Unit { workflow, unit } => {
                self.unit(&workflow, &unit)?;
                Ok(Touched::Workflow(workflow))
            }
            Input::Units { units, read } => {
                self.units(&units, read)?;
                Ok(Touched::Everything)
            }
            Input::BusLost => {
                for workflow in self.workflows.values_mut() {
                    workflow.worker.forget_unit();
                }
                Ok(Touched::Nothing)
            }
            Input::StartTaken { workflow, read } => {
                self.start_taken(&workflow, read);
                Ok(Touched::Workflow(workflow))
            }
            Input::StartRefused { workflow, error } => {
                self.start_refused(&workflow, &error)?;
                Ok(Touched::Workflow(workflow))
            }
            Input::StartFailed { workflow } => {
                self.start_failed(&workflow);
                Ok(Touched::Nothing)
            }
            Input::ThreadDamaged { run, detail } => Ok(self.thread_damaged(run, detail)),
            Input::Emptied { run } => self.emptied(run),
            Input::Scarce(is_scarce) => {
                self.is_scarce = is_scarce;
                Ok(Touched::Everything)
            }
            Input::Deadline => {
                self.deadlines()?;
                Ok(Touched::Everything)
            }
        }
    }

    /// What the inputs since the last call add up to.
    pub fn take_turn(&mut self) -> Turn {
        self.keys.clear();
        std::mem::take(&mut self.turn)
    }

    /// When [`Input::Deadline`] is wanted next, in µs of CLOCK_BOOTTIME.
    #[must_use]
    pub fn deadline(&self) -> Option<u64> {
        let of_runs = |workflow: &Workflow| {
            let of_run = |id| {
                let open: &Open = self.open.get(id)?;
                [open.kill_at, open.timeout_at].into_iter().flatten().min()
            };
            workflow.live.values().filter_map(of_run).min()
        };
        let all = self.workflows.values().flat_map(|workflow| {
            let drain_at = self.drain_until(workflow);
            [of_runs(workflow), workflow.worker.deadline(), drain_at]
        });
        all.chain([self.going_down_until]).flatten().min()
    }

    /// Most runs at a time over all workflows.
    #[must_use]
    pub fn max_active(&self) -> Option<u32> {
        self.max_active
    }

    /// The pause, if there is one.
    #[must_use]
    pub fn pause(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// How every workflow stands that has a file, or something left to do.
    #[must_use]
    pub fn status(&self) -> Vec<WorkflowStatus> {
        let status = |(name, workflow): (&WorkflowName, &Workflow)| WorkflowStatus {
            name: name.clone(),
            worker: workflow.word(),
            invocation: workflow.worker.invocation().map(ToOwned::to_owned),
            obstacle: workflow.obstacle(name),
            running: workflow.live.len(),
            queued: workflow.queue.len(),
            definition: workflow.known.definition.clone(),
            fault: workflow.known.fault.clone(),
        };
        let matters = |(_, workflow): &(&WorkflowName, &Workflow)| {
            workflow.exists() || !workflow.live.is_empty() || workflow.worker.invocation().is_some()
        };
        self.workflows.iter().filter(matters).map(status).collect()
    }

    /// Runs that have a slot, and runs that wait.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let running = self.running();
        (running, self.open.len() - running)
    }

    fn running(&self) -> usize {
        self.workflows
            .values()
            .map(|workflow| workflow.live.len())
            .sum()
    }

    /// Brings a workflow to rest: fills its slots, sends its runs to its worker, sees that there is one.
    fn settle(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        self.admit(name)?;
        self.settle_worker(name)
    }

    fn settle_worker(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        self.dispatch(name)?;
        self.retire(name);
        self.ensure_worker(name);
        Ok(())
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
        self.turn.events.push(Staged {
            event: Event::Run(id, event),
            at,
        });
        Ok(())
    }

    /// Stages an event of a workflow's worker.
    fn note(&mut self, name: &WorkflowName, event: WorkerEvent) {
        let at = self.now.wall_us;
        let workflow = self.workflow(name);
        workflow.record = workflow.record.after(&event, at);
        let record = workflow.record.clone();
        self.turn.workers.insert(name.clone(), record);
        let event = Event::Worker(name.clone(), event);
        self.turn.events.push(Staged { event, at });
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
