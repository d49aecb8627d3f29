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
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use super::handle::{Change, Event, Handle, INBOX, News, Overview};
use super::hands::{Hands, World};
use super::outbox::Outbox;
use crate::engine::{
    self, Action, Answer, Dispatch, Engine, Input, LinkId, Now, Order, Staged, Ticket, Turn,
};
use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Run, RunEvent};
use crate::os::clock;
use crate::store::{self, Store};
use crate::worker::protocol::{Assignment, ToWorker, VERSION};

/// Most inputs of one turn: a turn is one transaction, and its clients wait for all of it.
const TURN: usize = 256;
/// How often the driver shows that it is alive, and looks at the clock that goes on while the machine sleeps.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// `systemctl status` is told no more often.
const NEWS: Duration = Duration::from_millis(200);
/// Runs by workflow and key.
type Keys = HashMap<(WorkflowName, String), RunId>;

/// The one owner of state.
#[derive(Debug)]
pub struct Driver {
    engine: Engine,
    hands: Hands,
    store: store::Handle,
    news: mpsc::UnboundedSender<News>,
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
    pub fn new(
        engine: Engine,
        store: store::Handle,
        world: World,
        news: mpsc::UnboundedSender<News>,
    ) -> (Self, Handle) {
        let (sender, inbox) = mpsc::channel(INBOX);
        let handle = Handle::new(sender);
        let driver = Self {
            engine,
            hands: Hands::new(world, handle.clone()),
            store,
            news,
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
            let keys = self.keys(&events).await?;
            let mut observers = Vec::new();
            for event in events.drain(..) {
                let input = match event {
                    Event::Input(input) => input,
                    Event::Change(change, reply) => self.admit(change, reply, &keys),
                    Event::Overview(reply) => {
                        observers.push(reply);
                        continue;
                    }
                    Event::Breach(link, error) => {
                        self.tell(link, &[ToWorker::Error { error }]);
                        self.links.remove(&link);
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
                // A client that went away needs no answer.
                let _ = observer.send(self.overview());
            }
        }
    }

    fn overview(&self) -> Overview {
        let (running, queued) = self.engine.counts();
        Overview {
            running,
            queued,
            max_active: self.engine.max_active(),
            pause: self.engine.pause().cloned(),
            workflows: self.engine.status(),
        }
    }

    /// The runs that have the keys which these events ask for. Nobody else writes, so that stays true for the turn.
    async fn keys(&self, events: &[Event]) -> Result<Keys, store::Error> {
        let asked = |event: &Event| match event {
            Event::Change(Change::Start { accepted, .. }, _) => {
                Some((accepted.workflow.clone(), accepted.key.clone()?))
            }
            _ => None,
        };
        let asked: Vec<_> = events.iter().filter_map(asked).collect();
        if asked.is_empty() {
            return Ok(Keys::new());
        }
        let look = move |store: &mut Store| {
            let mut known = Keys::new();
            for (workflow, key) in asked {
                if let Some(run) = store.run_by_key(&workflow, &key)? {
                    known.insert((workflow, key), run);
                }
            }
            Ok(known)
        };
        self.store.call(look).await
    }

    fn admit(&mut self, change: Change, reply: oneshot::Sender<Answer>, keys: &Keys) -> Input {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, reply);
        match change {
            Change::Start { run, accepted } => Input::Start {
                ticket,
                run,
                existing: accepted
                    .key
                    .as_ref()
                    .and_then(|key| keys.get(&(accepted.workflow.clone(), key.clone())).copied()),
                accepted,
            },
            Change::Kill { run, request } => Input::Kill {
                ticket,
                run,
                request,
            },
            Change::Abort { run, request } => Input::Abort {
                ticket,
                run,
                request,
            },
            Change::Drain {
                workflow,
                timeout,
                by,
            } => Input::Drain {
                ticket,
                workflow,
                timeout_us: timeout
                    .map(|timeout| u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX)),
                by,
            },
            Change::Reset { workflow, by } => Input::Reset {
                ticket,
                workflow,
                by,
            },
            Change::Pause { reason, by } => Input::Pause { ticket, reason, by },
            Change::Resume { by } => Input::Resume { ticket, by },
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
        let mut turn = self.engine.take_turn();
        let actions = std::mem::take(&mut turn.actions);
        let news = news(&turn);
        for staged in &turn.events {
            tracing::debug!(event = ?staged.event, "event");
        }
        Hands::tell_of_deaths(&turn.events);
        let dispatched: Vec<_> = actions.iter().filter_map(dispatched).collect();
        let mut threads = BTreeMap::new();
        let moments = store::Moments::of(&turn);
        if !turn.events.is_empty() || !dispatched.is_empty() {
            // One way to the store and back, since every run of the turn waits for it.
            let work = move |store: &mut Store| {
                if !turn.events.is_empty() {
                    store.commit(&turn)?;
                }
                read_threads(store, &dispatched)
            };
            threads = match self.store.call(work).await {
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
        moments.after_commit();
        for one in news {
            let _ = self.news.send(one);
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
                Action::StartUnit { workflow, settings } => {
                    self.hands.start_unit(workflow, settings);
                }
                Action::ResetUnit { workflow } => self.hands.reset_unit(workflow),
                Action::ReadUnit { workflow } => self.hands.read_unit(workflow),
                Action::KillUnit { workflow, cgroup } => Hands::kill_unit(&workflow, cgroup),
                Action::Dispatch { link, dispatch } => {
                    let thread = threads.remove(&dispatch.run).unwrap_or_default();
                    crate::os::failpoint!("F12");
                    self.tell(link, &assignment(&dispatch, thread));
                }
                Action::Tell { link, order } => {
                    let frame = self.frame(link, order);
                    self.tell(link, frame.as_slice());
                }
                Action::Refuse { link, error } => {
                    self.refuse(link, error);
                }
                Action::Fence { link, error } => {
                    if let Some(outbox) = self.refuse(link, error)
                        && outbox.peer.is_alive()
                    {
                        let cgroup = outbox.place.cgroup.clone();
                        Hands::kill_unit(&outbox.workflow, cgroup);
                    }
                }
                Action::Empty { run, cgroup } => self.hands.empty(run, cgroup),
            }
        }
    }

    fn refuse(&mut self, link: LinkId, error: String) -> Option<Outbox> {
        tracing::warn!(link, error, "refused a worker");
        self.tell(link, &[ToWorker::Error { error }]);
        self.links.remove(&link)
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
            (Order::AbortThread { run, reason }, _) => ToWorker::AbortThread {
                run_id: run,
                reason,
            },
            (Order::MessageAck { run, round }, _) => ToWorker::MessageAck { run_id: run, round },
            (Order::EventAck { run }, _) => ToWorker::EventAck { run_id: run },
            (Order::Shutdown, _) => ToWorker::Shutdown { timeout_ms: 0 },
        }]
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
        let paused = self.engine.pause().map_or("", |_| "; paused");
        let status = format!("{running} runs active, {queued} queued{paused}");
        let _ = sd_notify::notify(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
        self.shown = Some((counts, Instant::now()));
        HEARTBEAT
    }
}

/// What the turn changed that others want to hear of; a round or a dispatch is nobody's news.
fn news(turn: &Turn) -> Vec<News> {
    let mut runs = BTreeSet::new();
    for Staged { event, .. } in &turn.events {
        match event {
            engine::Event::Run(
                _,
                RunEvent::Dispatched { .. }
                | RunEvent::ThreadWorkflowMessage { .. }
                | RunEvent::WorkerLost { .. },
            )
            | engine::Event::Worker(..)
            | engine::Event::Manager(_) => {}
            engine::Event::Run(run, _) => drop(runs.insert(*run)),
        }
    }
    let run = |run: &Run| {
        runs.contains(&run.id)
            .then(|| News::Run(run.id, run.status()))
    };
    let runs = turn.runs.values().filter_map(run);
    runs.chain(turn.workers.keys().cloned().map(News::Workflow))
        .collect()
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

/// The frames that give a run to a worker: a start, or a resume with its rounds.
fn assignment(dispatch: &Dispatch, thread: Vec<Message>) -> Vec<ToWorker> {
    let run_id = dispatch.run;
    let mut thread = thread.into_iter();
    let Some(mut start) = thread.next() else {
        tracing::error!(run_id = %run_id, "run {run_id} has no start");
        return Vec::new();
    };
    let assignment = Assignment {
        run_id,
        attempt: dispatch.attempt,
        prompt: start.content,
        max_rounds: dispatch.max_rounds,
        dry_run: dispatch.dry_run,
        trigger: start.meta.remove("trigger").unwrap_or_default(),
        created_at: start.timestamp,
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
