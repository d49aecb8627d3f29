//! The driver: exactly one task changes state, in turns of five phases.
//!
//! 1. collect what came in since the last turn (bounded);
//! 2. check each input against the engine; what is illegal is stored nowhere;
//! 3. commit all events of the turn in one transaction;
//! 4. adopt: what the engine staged is now the state, nobody saw it before;
//! 5. perform the actions: answer, send, start, kill.
//!
//! Nothing is answered and nothing is done before its event is committed. When a commit fails the driver ends with an
//! error and nerved with it: what is on disk is found by recovery.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};

use super::handle::{Change, Event, Handle, INBOX, Overview};
use super::outbox::Outbox;
use crate::engine::{
    Action, Answer, Dispatch, Engine, Input, LinkId, Now, Order, Staged, Ticket, Turn,
};
use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Run, RunEvent};
use crate::model::status::Status;
use crate::model::workflow::WorkerSettings;
use crate::os::cgroup::Cgroup;
use crate::os::clock;
use crate::store::{self, Store};
use crate::systemd::{StartError, Systemd, WorkerUnit};
use crate::worker::protocol::{Assignment, ToWorker, VERSION};

/// Most inputs of one turn: a turn is one transaction, and its clients wait for all of it.
const TURN: usize = 256;
/// How often the driver shows that it is alive, and looks at the clock that goes on while the machine sleeps.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// `systemctl status` is told no more often.
const NEWS: Duration = Duration::from_millis(200);
/// When a killed cgroup is not empty by then, the log says which processes cannot die.
const STUBBORN: Duration = Duration::from_secs(5);

/// What the driver needs of the world.
#[derive(Debug)]
pub struct World {
    pub store: store::Handle,
    /// `None` while the bus is away.
    pub systemd: watch::Receiver<Option<Systemd>>,
    /// Runs whose status changed.
    pub changes: mpsc::UnboundedSender<(RunId, Status)>,
    /// `nerve-worker`'s path.
    pub worker: PathBuf,
    /// Where workers connect.
    pub socket: PathBuf,
}

/// The one owner of state.
#[derive(Debug)]
pub struct Driver {
    engine: Engine,
    world: World,
    handle: Handle,
    inbox: mpsc::Receiver<Event>,
    links: HashMap<LinkId, Outbox>,
    tickets: HashMap<Ticket, oneshot::Sender<Answer>>,
    next_ticket: Ticket,
    /// What `systemctl status` last showed, and when.
    shown: Option<((usize, usize), Instant)>,
}

impl Driver {
    /// A driver for this engine, and the handle to it.
    #[must_use]
    pub fn new(engine: Engine, world: World) -> (Self, Handle) {
        let (sender, inbox) = mpsc::channel(INBOX);
        let handle = Handle::new(sender);
        let driver = Self {
            engine,
            world,
            handle: handle.clone(),
            inbox,
            links: HashMap::new(),
            tickets: HashMap::new(),
            next_ticket: 0,
            shown: None,
        };
        (driver, handle)
    }

    /// Drives until `stop` or until a commit fails.
    ///
    /// # Errors
    /// When a commit failed; what is stored of it is unknown.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), store::Error> {
        let mut stop = std::pin::pin!(stop);
        let mut events = Vec::new();
        // What recovery decided comes before anything else.
        self.finish_turn().await?;
        loop {
            let until = |at: u64| Duration::from_micros(at.saturating_sub(clock::boot_us()));
            let pause = self
                .engine
                .deadline()
                .map_or(HEARTBEAT, until)
                .min(self.show());
            tokio::select! {
                _ = self.inbox.recv_many(&mut events, TURN) => {}
                () = sleep(pause) => {}
                () = &mut stop => return Ok(()),
            }
            let now = Now {
                wall_us: clock::wall_us(),
                boot_us: clock::boot_us(),
            };
            let mut observers = Vec::new();
            for event in events.drain(..) {
                let input = match event {
                    Event::Input(input) => input,
                    Event::Change(change, reply) => self.admit(change, reply),
                    Event::Overview(reply) => {
                        observers.push(reply);
                        continue;
                    }
                    Event::Ready(link, outbox, input) => {
                        self.links.insert(link, outbox);
                        input
                    }
                };
                self.check(input, now);
            }
            if self.engine.deadline().is_some_and(|at| at <= now.boot_us) {
                self.check(Input::Deadline, now);
            }
            self.finish_turn().await?;
            for observer in observers {
                let (running, queued) = self.engine.counts();
                // A client that went away needs no answer.
                let _ = observer.send(Overview {
                    running,
                    queued,
                    workflows: self.engine.status(),
                });
            }
        }
    }

    fn admit(&mut self, change: Change, reply: oneshot::Sender<Answer>) -> Input {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, reply);
        match change {
            Change::Start { run, accepted } => Input::Start {
                ticket,
                run,
                accepted,
            },
            Change::Kill { run, request } => Input::Kill {
                ticket,
                run,
                request,
            },
        }
    }

    fn check(&mut self, input: Input, now: Now) {
        if let Input::LinkLost { link } = &input {
            self.links.remove(link);
        }
        tracing::trace!(?input, "input");
        if let Err(illegal) = self.engine.step(input, now) {
            tracing::error!(%illegal, "refused an input");
        }
    }

    async fn finish_turn(&mut self) -> Result<(), store::Error> {
        let Turn {
            events,
            runs,
            actions,
        } = self.engine.take_turn();
        for staged in &events {
            tracing::debug!(run_id = %staged.run, event = staged.event.name(), "event");
        }
        let announced = news(&events, &runs);
        let dispatched: Vec<_> = actions.iter().filter_map(dispatched).collect();
        let mut threads = BTreeMap::new();
        if !events.is_empty() || !dispatched.is_empty() {
            // One way to the store and back, since every run of the turn waits for it.
            let turn = move |store: &mut Store| {
                if !events.is_empty() {
                    store.commit(&events, &runs)?;
                }
                read_threads(store, &dispatched)
            };
            threads = match self.world.store.call(turn).await {
                Ok(threads) => threads,
                Err(error) => {
                    if error.is_full() {
                        // Nothing of the turn is stored: for once a failed commit can be answered.
                        for (_, reply) in self.tickets.drain() {
                            let _ = reply.send(Answer::NoSpace);
                        }
                    }
                    return Err(error);
                }
            };
        }
        for change in announced {
            let _ = self.world.changes.send(change);
        }
        self.perform(actions, threads);
        Ok(())
    }

    fn perform(&mut self, actions: Vec<Action>, mut threads: BTreeMap<RunId, Vec<Message>>) {
        for action in actions {
            match action {
                Action::Answer { ticket, answer } => {
                    if let Some(reply) = self.tickets.remove(&ticket) {
                        let _ = reply.send(answer);
                    }
                }
                Action::StartUnit { workflow, settings } => self.start_unit(workflow, settings),
                Action::Dispatch { link, dispatch } => {
                    let thread = threads.remove(&dispatch.run).unwrap_or_default();
                    self.tell(link, &assignment(dispatch, thread));
                }
                Action::Tell { link, order } => {
                    let frame = self.frame(link, order);
                    self.tell(link, frame.as_slice());
                }
                Action::Refuse { link, error } => {
                    tracing::warn!(link, error, "refused a worker");
                    self.tell(link, &[ToWorker::Error { error }]);
                    self.links.remove(&link);
                }
                Action::Empty { run, cgroup } => self.empty(run, cgroup),
            }
        }
    }

    fn tell(&mut self, link: LinkId, frames: &[ToWorker]) {
        if let Some(outbox) = self.links.get_mut(&link) {
            outbox.send(frames);
        }
    }

    fn frame(&self, link: LinkId, order: Order) -> Vec<ToWorker> {
        let workflow = self.links.get(&link).map(|outbox| outbox.workflow.clone());
        vec![match (order, workflow) {
            (Order::Welcome, Some(workflow)) => ToWorker::Welcome {
                protocol: VERSION,
                workflow,
            },
            (Order::Welcome, None) => return Vec::new(),
            (Order::KillThread { run, grace_us }, _) => ToWorker::KillThread {
                run_id: run,
                grace_ms: grace_us / 1_000,
            },
            (Order::MessageAck { run, round }, _) => ToWorker::MessageAck { run_id: run, round },
            (Order::EventAck { run }, _) => ToWorker::EventAck { run_id: run },
            (Order::Shutdown, _) => ToWorker::Shutdown { timeout_ms: 0 },
        }]
    }

    fn start_unit(&self, workflow: WorkflowName, settings: WorkerSettings) {
        // While the bus is away nothing is started; when it is back, systemd's list of units says what is missing.
        let Some(systemd) = self.world.systemd.borrow().clone() else {
            return;
        };
        let (handle, executable, socket) = (
            self.handle.clone(),
            self.world.worker.clone(),
            self.world.socket.clone(),
        );
        tokio::spawn(async move {
            let unit = WorkerUnit {
                workflow: &workflow,
                executable: &executable,
                socket: &socket,
            };
            let started = systemd.start(&unit, &settings).await;
            match &started {
                Ok(()) => tracing::info!(workflow = %workflow, "starting {}", workflow.unit()),
                Err(StartError::Refused(error)) => {
                    tracing::error!(workflow = %workflow, error, "systemd refuses {}", workflow.unit());
                    let (workflow, error) = (workflow.clone(), error.clone());
                    return handle.report(Input::StartRefused { workflow, error }).await;
                }
                Err(StartError::Exists) => {}
                Err(StartError::Bus(error)) => {
                    tracing::warn!(workflow = %workflow, %error, "lost the bus while starting");
                }
            }
            let taken = Input::StartTaken {
                workflow: workflow.clone(),
            };
            handle.report(taken).await;
            if started.is_err()
                && let Ok(unit) = systemd.unit(&workflow).await
            {
                handle.report(Input::Unit { workflow, unit }).await;
            }
        });
    }

    fn empty(&self, run: RunId, path: String) {
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let cgroup = Cgroup::at(&path);
            let killed = blocking(&cgroup, Cgroup::kill).await;
            if let Err(error) = killed {
                tracing::error!(run_id = %run, %error, "failed to kill cgroup {path}");
            }
            let emptied = tokio::time::timeout(STUBBORN, cgroup.emptied()).await;
            let emptied = match emptied {
                Ok(emptied) => emptied,
                Err(_) => {
                    let pids: Vec<_> = cgroup
                        .processes()
                        .iter()
                        .map(|pid| pid.as_raw_nonzero().get())
                        .collect();
                    tracing::warn!(run_id = %run, "run {run} is killed but processes {pids:?} do not die");
                    cgroup.emptied().await
                }
            };
            match emptied {
                Ok(()) => {
                    // The worker does it too; it may be gone.
                    let _ = blocking(&cgroup, Cgroup::remove).await;
                    handle.report(Input::Emptied { run }).await;
                }
                Err(error) => {
                    tracing::error!(run_id = %run, %error, "failed to watch cgroup {path}")
                }
            }
        });
    }

    /// Tells systemd that the loop turns, and people what it is about; returns when to come again.
    fn show(&mut self) -> Duration {
        let counts = self.engine.counts();
        let (age, pause) = match self.shown {
            None => (HEARTBEAT, HEARTBEAT),
            Some((shown, at)) if shown == counts => (at.elapsed(), HEARTBEAT),
            Some((_, at)) => (at.elapsed(), NEWS),
        };
        if age < pause {
            return pause.saturating_sub(age);
        }
        let (running, queued) = counts;
        let status = format!("{running} runs active, {queued} queued");
        let _ = sd_notify::notify(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
        self.shown = Some((counts, Instant::now()));
        HEARTBEAT
    }
}

/// The runs whose status changed, as they now are; a round or a dispatch is nobody's news.
fn news(events: &[Staged], runs: &BTreeMap<RunId, Run>) -> Vec<(RunId, Status)> {
    let is_news = |staged: &&Staged| {
        !matches!(
            staged.event,
            RunEvent::Dispatched { .. }
                | RunEvent::ThreadWorkflowMessage { .. }
                | RunEvent::WorkerLost { .. }
        )
    };
    let changed: BTreeSet<_> = events
        .iter()
        .filter(is_news)
        .map(|staged| staged.run)
        .collect();
    let status = |id: &RunId| Some((*id, runs.get(id)?.status()));
    changed.iter().filter_map(status).collect()
}

fn dispatched(action: &Action) -> Option<RunId> {
    match action {
        Action::Dispatch { dispatch, .. } => Some(dispatch.run),
        _ => None,
    }
}

fn read_threads(
    store: &Store,
    runs: &[RunId],
) -> Result<BTreeMap<RunId, Vec<Message>>, store::Error> {
    let mut threads = BTreeMap::new();
    for run in runs {
        let thread = store.thread(*run, &store::ThreadRange::default())?;
        threads.insert(
            *run,
            thread.into_iter().map(|round| round.message).collect(),
        );
    }
    Ok(threads)
}

/// Does something with a cgroup that takes the longer the more a role made of it.
async fn blocking(cgroup: &Cgroup, action: fn(&Cgroup) -> io::Result<()>) -> io::Result<()> {
    let cgroup = cgroup.clone();
    let done = tokio::task::spawn_blocking(move || action(&cgroup)).await;
    done.unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// The frames that give a run to a worker: a start, or a resume with its rounds.
fn assignment(dispatch: Dispatch, thread: Vec<Message>) -> Vec<ToWorker> {
    let run_id = dispatch.run;
    let mut thread = thread.into_iter();
    let (prompt, created_at) = thread
        .next()
        .map(|start| (start.content, start.timestamp))
        .unwrap_or_default();
    let assignment = Assignment {
        run_id,
        attempt: dispatch.attempt,
        prompt,
        max_rounds: dispatch.max_rounds,
        dry_run: dispatch.dry_run,
        trigger: dispatch.trigger,
        created_at,
        timeout_ms: dispatch.timeout_us.map(|us| us / 1_000),
        workflow: dispatch.definition.source.clone(),
    };
    if dispatch.attempt == 1 && dispatch.rounds == 0 {
        return vec![ToWorker::StartThread(assignment)];
    }
    let message = |(round, message)| ToWorker::ThreadMessage {
        run_id,
        round,
        message,
    };
    std::iter::once(ToWorker::ResumeThread {
        assignment,
        messages: dispatch.rounds,
    })
    .chain((1..).zip(thread).map(message))
    .collect()
}
