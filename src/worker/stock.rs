//! The stock worker: the main process of `nerve-wf@NAME.service`. It holds the connection to nerved and one task per
//! run, and comes back to nerved for ever: what is not acknowledged is sent again.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sd_notify::NotifyState;
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::home::Home;
use super::protocol::{self, Assignment, Held, ToManager, ToWorker, VERSION};
use super::role::Order;
use super::run::{End, Report, Run, event_type, grace};
use crate::config::definition;
use crate::model::limits;
use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::status::RunResult;

/// A run this worker has.
#[derive(Debug)]
struct Running {
    orders: mpsc::UnboundedSender<Order>,
    abort: Arc<AtomicBool>,
    attempt: u32,
    round: u32,
    /// What nerved has not acknowledged: a round, an end, or both.
    unacknowledged: Vec<ToManager>,
    ended: bool,
    /// nerved wants to hear no more of it.
    forgotten: bool,
}

#[derive(Debug)]
struct Stock {
    home: Arc<Home>,
    runs: HashMap<RunId, Running>,
    reports: mpsc::UnboundedSender<(RunId, Report)>,
    /// Bytes for nerved, while connected and welcome.
    outbox: Option<mpsc::UnboundedSender<Vec<u8>>>,
    /// A run whose rounds are still being received.
    incoming: Option<(Assignment, Vec<Message>, u32)>,
}

/// What an exchange with nerved led to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    GoOn,
    Disconnect,
    Exit,
    /// It cannot do what it is there for.
    Fail(String),
}

/// Runs the worker until it is told to shut down.
///
/// # Errors
/// When it is not started the way nerved starts it.
pub async fn run(workflow: WorkflowName) -> io::Result<()> {
    let socket = std::env::var_os("NERVE_SOCKET").ok_or_else(|| {
        io::Error::other("NERVE_SOCKET is not set: nerve-worker is started by nerved, not by hand")
    })?;
    let home = Arc::new(Home::move_in(workflow)?);
    // Ready before connected: a nerved that is away is no reason for systemd to call this start failed.
    sd_notify::notify(&[
        NotifyState::Ready,
        NotifyState::Status("waiting for nerved"),
    ])?;
    let mut watchdog = tokio::time::interval(limits::WORKER_WATCHDOG / 3);
    let (reports, mut inbox) = mpsc::unbounded_channel();
    let mut stock = Stock {
        home,
        runs: HashMap::new(),
        reports,
        outbox: None,
        incoming: None,
    };
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut frames: Option<mpsc::Receiver<ToWorker>> = None;
    let (first, longest) = limits::RECONNECT;
    let mut pause = first;
    let mut connect_at = Instant::now();
    loop {
        let connected = frames.is_some();
        tokio::select! {
            _ = watchdog.tick() => { let _ = sd_notify::notify(&[NotifyState::Watchdog]); }
            // systemd kills what is left in the cgroup; nerved sends the runs to the next worker.
            _ = terminate.recv() => return Ok(()),
            Some((run, report)) = inbox.recv() => stock.report(run, report),
            () = sleep_until(connect_at), if !connected => match UnixStream::connect(&socket).await {
                Ok(stream) => frames = Some(stock.connect(stream)),
                Err(error) => {
                    tracing::debug!(%error, "nerved is away");
                    pause = (pause * 2).min(longest);
                    connect_at = Instant::now() + pause;
                }
            },
            frame = receive(&mut frames), if connected => {
                let outcome = match frame {
                    Some(frame) => { pause = first; stock.obey(frame) }
                    None => Outcome::Disconnect,
                };
                match outcome {
                    Outcome::GoOn => {}
                    Outcome::Exit => return Ok(()),
                    Outcome::Fail(why) => return Err(io::Error::other(why)),
                    Outcome::Disconnect => {
                        frames = None;
                        stock.outbox = None;
                        stock.incoming = None;
                        pause = (pause * 2).min(longest);
                        connect_at = Instant::now() + pause;
                    }
                }
            }
        }
    }
}

async fn receive(frames: &mut Option<mpsc::Receiver<ToWorker>>) -> Option<ToWorker> {
    frames.as_mut()?.recv().await
}

/// Reads what nerved says until the connection ends.
async fn read(stream: OwnedReadHalf, frames: mpsc::Sender<ToWorker>) {
    let (mut reader, mut line) = (BufReader::new(stream), Vec::new());
    loop {
        match protocol::read(&mut reader, &mut line).await {
            Ok(Some(frame)) => {
                if frames.send(frame).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => return tracing::error!(%error, "failed to read from nerved"),
        }
    }
}

impl Stock {
    /// Begins a conversation: a task reads, a task writes, and the worker speaks first.
    fn connect(&mut self, stream: UnixStream) -> mpsc::Receiver<ToWorker> {
        let (read_half, mut write_half) = stream.into_split();
        let (frame, frames) = mpsc::channel(64);
        // Unbounded, but every run has at most a round and its end to say until they are acknowledged.
        let (outbox, mut lines) = mpsc::unbounded_channel::<Vec<u8>>();
        tokio::spawn(read(read_half, frame));
        tokio::spawn(async move {
            while let Some(mut bytes) = lines.recv().await {
                while let Ok(more) = lines.try_recv() {
                    bytes.extend(more);
                }
                if write_half.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        });
        let runs = self.runs.iter().filter(|(_, running)| !running.forgotten);
        let held = |(id, running): (&RunId, &Running)| Held {
            run_id: *id,
            round: running.round,
            attempt: running.attempt,
            ended: running.ended,
        };
        let ready = ToManager::Ready {
            protocol: VERSION,
            workflow: self.home.workflow.clone(),
            runs: runs.map(held).collect(),
        };
        self.outbox = Some(outbox);
        self.send(&ready);
        frames
    }

    fn send(&self, message: &ToManager) {
        if let Some(outbox) = &self.outbox {
            let mut line = Vec::new();
            protocol::append(&mut line, message);
            // A connection that broke ends by its reader.
            let _ = outbox.send(line);
        }
    }

    fn report(&mut self, id: RunId, report: Report) {
        let Some(running) = self.runs.get_mut(&id) else {
            return;
        };
        let message = match report {
            Report::Round { round, message } => {
                running.round = round;
                ToManager::ThreadWorkflowMessage {
                    run_id: id,
                    round,
                    message,
                }
            }
            Report::Attempt {
                round,
                attempt,
                message,
                delay,
            } => ToManager::ThreadAttempt {
                run_id: id,
                round,
                attempt,
                message,
                delay_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
            },
            Report::Route { round, target } => ToManager::ThreadRoute {
                run_id: id,
                round,
                target,
            },
            Report::End(_) if running.forgotten => {
                self.runs.remove(&id);
                return;
            }
            Report::End(End { result, detail }) => {
                running.ended = true;
                let (event_type, (_, exit_code)) = (event_type(&result), result.end());
                ToManager::ThreadEvent {
                    run_id: id,
                    event_type,
                    exit_code,
                    result,
                    detail,
                }
            }
        };
        running.unacknowledged.push(message.clone());
        self.send(&message);
    }

    fn obey(&mut self, frame: ToWorker) -> Outcome {
        match frame {
            ToWorker::Welcome { .. } => {
                let _ = sd_notify::notify(&[NotifyState::Status("connected")]);
                for message in self
                    .runs
                    .values()
                    .flat_map(|running| &running.unacknowledged)
                {
                    self.send(message);
                }
            }
            ToWorker::Error { error } => {
                tracing::error!("nerved refuses this worker: {error}");
                return Outcome::Disconnect;
            }
            ToWorker::StartThread(assignment)
            | ToWorker::ResumeThread {
                assignment,
                messages: 0,
            } => return self.start(assignment, Vec::new()),
            ToWorker::ResumeThread {
                assignment,
                messages,
            } => self.incoming = Some((assignment, Vec::new(), messages)),
            ToWorker::ThreadMessage { message, .. } => {
                if let Some((assignment, mut rounds, expected)) = self.incoming.take() {
                    rounds.push(message);
                    if rounds.len() == expected as usize {
                        return self.start(assignment, rounds);
                    }
                    self.incoming = Some((assignment, rounds, expected));
                }
            }
            ToWorker::KillThread { run_id, grace_ms } => match self.runs.get(&run_id) {
                Some(running) => drop(running.orders.send(Order::Kill {
                    grace: grace(grace_ms),
                })),
                None => {
                    let (result, event_type) = (RunResult::Killed, event_type(&RunResult::Killed));
                    self.send(&ToManager::ThreadEvent {
                        run_id,
                        event_type,
                        exit_code: result.end().1,
                        result,
                        detail: None,
                    });
                }
            },
            ToWorker::AbortThread { run_id, .. } => {
                if let Some(running) = self.runs.get(&run_id) {
                    running.abort.store(true, Ordering::Relaxed);
                    let _ = running.orders.send(Order::Abort);
                }
            }
            ToWorker::MessageAck { run_id, round } => {
                self.acknowledged(run_id, Order::MessageAck(round), |message| {
                    matches!(message, ToManager::ThreadWorkflowMessage { round: said, .. } if *said == round)
                });
            }
            ToWorker::AttemptAck {
                run_id,
                round,
                attempt,
            } => {
                let order = Order::AttemptAck { round, attempt };
                self.acknowledged(run_id, order, |message| {
                    matches!(message, ToManager::ThreadAttempt { round: said, attempt: of, .. }
                        if (*said, *of) == (round, attempt))
                });
            }
            ToWorker::RouteAck { run_id, round } => {
                self.acknowledged(run_id, Order::RouteAck(round), |message| {
                    matches!(message, ToManager::ThreadRoute { round: said, .. } if *said == round)
                });
            }
            ToWorker::EventAck { run_id } => {
                if let Some(running) = self.runs.get_mut(&run_id) {
                    running.forgotten = true;
                    running.unacknowledged.clear();
                    if running.ended {
                        self.runs.remove(&run_id);
                    }
                }
            }
            ToWorker::Shutdown { timeout_ms } => {
                tracing::debug!(timeout_ms, "told to shut down");
                self.home.clear();
                return Outcome::Exit;
            }
        }
        Outcome::GoOn
    }

    /// What is durable is said no more, and its run goes on.
    fn acknowledged(&mut self, run: RunId, order: Order, is_it: impl Fn(&ToManager) -> bool) {
        if let Some(running) = self.runs.get_mut(&run) {
            running.unacknowledged.retain(|message| !is_it(message));
            let _ = running.orders.send(order);
        }
    }

    fn start(&mut self, assignment: Assignment, rounds: Vec<Message>) -> Outcome {
        let id = assignment.run_id;
        if self.runs.contains_key(&id) {
            return Outcome::GoOn;
        }
        let workflow = match definition::from_json(&assignment.workflow) {
            Ok(workflow) => workflow,
            // It is of a newer nerve than this worker, perhaps; its successor is of that one.
            Err(error) => {
                let why = format!("run {id} has a definition that cannot be used: {error}");
                return Outcome::Fail(why);
            }
        };
        let (orders, inbox) = mpsc::unbounded_channel();
        let round = u32::try_from(rounds.len()).unwrap_or(u32::MAX);
        let attempt = assignment.attempt;
        let abort = Arc::new(AtomicBool::new(false));
        let home = self.home.clone();
        let reports = self.reports.clone();
        let run = Run::new(home, workflow, assignment, rounds, abort.clone(), reports);
        tokio::spawn(run.drive(inbox));
        let running = Running {
            orders,
            abort,
            attempt,
            round,
            unacknowledged: Vec::new(),
            ended: false,
            forgotten: false,
        };
        self.runs.insert(id, running);
        Outcome::GoOn
    }
}
