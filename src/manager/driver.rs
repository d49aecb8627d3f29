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

use super::frames;
use super::handle::{Change, Event, Handle, INBOX, News, Overview};
use super::hands::{Hands, World};
use super::outbox::Outbox;
use super::room::{Keys, Room};
use super::tickets::Tickets;
use crate::engine::{self, Action, Answer, Engine, Input, LinkId, Now, Staged, Turn};
use crate::model::audit::Audit;
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::run::{Run, RunEvent};
use crate::os::clock;
use crate::store::{self, Round, Store};
use crate::worker::protocol::ToWorker;

/// Most inputs of one turn: a turn is one transaction, and its clients wait for all of it.
const TURN: usize = 256;
/// How often the driver shows that it is alive, and looks at the clock that goes on while the machine sleeps.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// `systemctl status` is told no more often.
const NEWS: Duration = Duration::from_millis(200);
/// What runs have said so far, or why that cannot be read.
type Threads = BTreeMap<RunId, Result<Vec<Message>, String>>;

/// The one owner of state.
#[derive(Debug)]
pub struct Driver {
    engine: Engine,
    hands: Hands,
    store: store::Handle,
    news: mpsc::UnboundedSender<News>,
    inbox: mpsc::Receiver<Event>,
    links: HashMap<LinkId, Outbox>,
    tickets: Tickets,
    /// What goes on record with the next turn, beside what that turn answers.
    audits: Vec<Audit>,
    room: Room,
    /// What `systemctl status` last showed, and when.
    shown: Option<((usize, usize), bool, Instant)>,
}

impl Driver {
    /// A driver for this engine, and the handle to it.
    #[must_use]
    pub fn new(
        engine: Engine,
        store: store::Handle,
        room: Room,
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
            tickets: Tickets::default(),
            audits: Vec::new(),
            room,
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
        self.finish_turn(now()).await?;
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
            let now = now();
            self.look_for_room(now).await?;
            let keys = self.keys(&events).await?;
            let refused = self.room.keep_texts(&events, &self.store).await?;
            let (mut observers, mut recorded) = (Vec::new(), Vec::new());
            for (index, event) in events.drain(..).enumerate() {
                let Some(event) = self.room.let_in(event, refused.contains(&index), &keys) else {
                    continue;
                };
                let input = match event {
                    Event::Input(input) => input,
                    Event::Change(change, reply) => self.admit(change, reply, &keys),
                    Event::Overview(reply) => {
                        observers.push(reply);
                        continue;
                    }
                    Event::Audit(audit, reply) => {
                        self.audits.push(audit);
                        recorded.push(reply);
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
            self.finish_turn(now).await?;
            // A client that went away needs no answer.
            for observer in observers {
                let _ = observer.send(self.overview());
            }
            for reply in recorded {
                let _ = reply.send(());
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
            scarcity: self.room.scarcity().cloned(),
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

    /// Looks whether there is room for what is new, and has all go on when there is again.
    async fn look_for_room(&mut self, now: Now) -> Result<(), store::Error> {
        if self.room.may_move_log() {
            self.room.log = self.store.call(Store::move_log).await?;
        }
        let before = self.room.is_scarce();
        self.room.look();
        if self.room.is_scarce() == before {
            return Ok(());
        }
        self.check(Input::Scarce(!before), now);
        if let Some(why) = self.room.scarcity() {
            tracing::error!("nothing is started: {why}");
            return Ok(());
        }
        tracing::info!("there is room again: runs start");
        for link in self.room.held_back() {
            let error = "there is room again for what was not stored".to_owned();
            self.refuse(link, error);
        }
        Ok(())
    }

    fn admit(&mut self, change: Change, reply: oneshot::Sender<Answer>, keys: &Keys) -> Input {
        let ticket = self.tickets.take(&change, reply);
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

    /// Ends the turn, and with it those of its runs whose threads turned out to be damaged.
    async fn finish_turn(&mut self, now: Now) -> Result<(), store::Error> {
        loop {
            let damaged = self.commit_turn().await?;
            if damaged.is_empty() {
                return Ok(());
            }
            for (run, detail) in damaged {
                tracing::error!(NERVE_RUN_ID = %run, "run {run} cannot go on: {detail}");
                self.check(Input::ThreadDamaged { run, detail }, now);
            }
        }
    }

    /// The runs that could not be dispatched, and why.
    async fn commit_turn(&mut self) -> Result<Vec<(RunId, String)>, store::Error> {
        let mut turn = self.engine.take_turn();
        let actions = std::mem::take(&mut turn.actions);
        let news = news(&turn);
        for staged in &turn.events {
            tracing::debug!(event = ?staged.event, "event");
        }
        Hands::tell_of_deaths(&turn.events);
        let mut audits = std::mem::take(&mut self.audits);
        audits.extend(self.tickets.audits(&actions, clock::wall_us()));
        let dispatched: Vec<_> = actions.iter().filter_map(dispatched).collect();
        let mut threads = BTreeMap::new();
        let moments = store::Moments::of(&turn);
        let is_new = !turn.events.is_empty() || !audits.is_empty();
        if is_new || !dispatched.is_empty() {
            // One way to the store and back, since every run of the turn waits for it.
            let work = move |store: &mut Store| {
                if is_new {
                    store.commit(&turn, &audits)?;
                }
                Ok((read_threads(store, &dispatched)?, store.log()?))
            };
            (threads, self.room.log) = match self.store.call(work).await {
                Ok(done) => done,
                Err(error) => {
                    if error.is_full() {
                        // Nothing of the turn is stored: for once a failed commit can be answered.
                        self.tickets.answer_all(&Answer::NoSpace(error.to_string()));
                    }
                    return Err(error);
                }
            };
        }
        moments.after_commit();
        for one in news {
            let _ = self.news.send(one);
        }
        Ok(self.perform(actions, threads))
    }

    fn perform(&mut self, actions: Vec<Action>, mut threads: Threads) -> Vec<(RunId, String)> {
        let mut damaged = Vec::new();
        for action in actions {
            match action {
                Action::Answer { ticket, answer } => self.tickets.answer(ticket, answer),
                Action::StartUnit { workflow, settings } => {
                    self.hands.start_unit(workflow, settings);
                }
                Action::ResetUnit { workflow } => self.hands.reset_unit(workflow),
                Action::ReadUnit { workflow } => self.hands.read_unit(workflow),
                Action::KillUnit { workflow, cgroup } => Hands::kill_unit(&workflow, cgroup),
                Action::Dispatch { link, dispatch } => {
                    crate::os::failpoint!("F12");
                    match threads.remove(&dispatch.run) {
                        Some(Err(detail)) => damaged.push((dispatch.run, detail)),
                        thread => {
                            let thread = thread.and_then(Result::ok).unwrap_or_default();
                            let tools = self.hands.tools(&dispatch.definition.workflow);
                            self.tell(link, &frames::assignment(&dispatch, tools, thread));
                        }
                    }
                }
                Action::Tell { link, order } => {
                    let workflow = self.links.get(&link).map(|outbox| outbox.workflow.clone());
                    if let Some(workflow) = workflow {
                        self.tell(link, &[frames::order(order, workflow)]);
                    }
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
                Action::EmptyUnit {
                    run,
                    workflow,
                    cgroup,
                } => self.hands.empty_unit(run, &workflow, cgroup),
            }
        }
        damaged
    }

    fn refuse(&mut self, link: LinkId, error: String) -> Option<Outbox> {
        tracing::warn!(link, "refused a worker: {error}");
        self.tell(link, &[ToWorker::Error { error }]);
        self.links.remove(&link)
    }

    fn tell(&mut self, link: LinkId, frames: &[ToWorker]) {
        if let Some(outbox) = self.links.get_mut(&link) {
            outbox.send(frames);
        }
    }

    /// Tells systemd that the loop turns, and people what it is about; returns when to come again.
    fn show(&mut self) -> Duration {
        let counts = self.engine.counts();
        let is_scarce = self.room.is_scarce();
        let (age, pause) = match self.shown {
            None => (HEARTBEAT, HEARTBEAT),
            Some((shown, was_scarce, at)) if shown == counts && was_scarce == is_scarce => {
                (at.elapsed(), HEARTBEAT)
            }
            Some((.., at)) => (at.elapsed(), NEWS),
        };
        if age < pause {
            return pause.saturating_sub(age);
        }
        let (running, queued) = counts;
        let paused = self.engine.pause().map_or("", |_| "; paused");
        let full = self
            .room
            .scarcity()
            .map_or_else(String::new, |why| format!("; disk full: {why}"));
        let status = format!("{running} runs active, {queued} queued{paused}{full}");
        let _ = sd_notify::notify(&[NotifyState::Watchdog, NotifyState::Status(&status)]);
        self.shown = Some((counts, is_scarce, Instant::now()));
        HEARTBEAT
    }
}

fn now() -> Now {
    Now {
        wall_us: clock::wall_us(),
        boot_us: clock::boot_us(),
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
                | RunEvent::AttemptFailed { .. }
                | RunEvent::Routed { .. }
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

/// Reads what the runs have said so far. Damage is the end of the run that has it, and of no other.
fn read_threads(store: &Store, runs: &[RunId]) -> Result<Threads, store::Error> {
    let mut threads = Threads::new();
    for run in runs {
        let thread = store.thread(*run, &store::ThreadRange::default());
        let thread =
            thread.and_then(|thread| thread.into_iter().map(Round::into_message).collect());
        let thread = match thread {
            Ok(thread) => Ok(thread),
            Err(error) if error.is_damage() => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        threads.insert(*run, thread);
    }
    Ok(threads)
}
