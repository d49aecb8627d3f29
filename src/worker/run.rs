//! One run inside the stock worker: moderate, execute a round, wait until it is durable, and so on to the end.

mod ask;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::home::Home;
use super::protocol::{Assignment, EventType};
use super::role::Order;
use super::round::Round;
use super::said::failure;
use super::told::Told;
use crate::config::meta::Checker;
use crate::config::template;
use crate::model::limits;
use crate::model::message::{Message, Position};
use crate::model::moderator::{self, Next};
use crate::model::name::{RoleName, RunId};
use crate::model::role::{Rehearsal, Role};
use crate::model::run::Accepted;
use crate::model::status::{RunResult, Status};
use crate::model::tools::Tools;
use crate::model::workflow::{Target, Workflow};
use crate::os::cgroup::Cgroup;

/// What a run reports.
#[derive(Debug)]
pub(super) enum Report {
    /// A round is done; the next one waits for its acknowledgement, an end does not.
    Round { round: u32, message: Message },
    /// An attempt of a round failed; the next one waits for its acknowledgement, then for the delay.
    Attempt {
        round: u32,
        attempt: u32,
        message: Message,
        delay: Duration,
    },
    /// The moderator said who speaks next; it is not asked again.
    Route { round: u32, target: Target },
    /// The run ended; nothing of it is left.
    End(End),
}

/// How a run ended.
#[derive(Debug)]
pub(super) struct End {
    pub result: RunResult,
    /// What more there is to say.
    pub detail: Option<String>,
}

impl From<RunResult> for End {
    fn from(result: RunResult) -> Self {
        let detail = None;
        Self { result, detail }
    }
}

/// A run that is being executed.
#[derive(Debug)]
pub(super) struct Run {
    home: Arc<Home>,
    id: RunId,
    attempt: u32,
    max_rounds: u32,
    is_dry: bool,
    workflow: Arc<Workflow>,
    tools: Tools,
    /// For the roles whose replies have to say something of themselves.
    checkers: BTreeMap<RoleName, Result<Checker, String>>,
    /// The start, then the rounds.
    thread: Vec<Message>,
    position: Position,
    /// How many attempts of the next round failed.
    failed: u32,
    /// When the next attempt may begin.
    attempt_at: Instant,
    /// What it said last is not durable before this comes.
    awaited: Option<Order>,
    deadline: Option<Instant>,
    reports: mpsc::UnboundedSender<(RunId, Report)>,
    /// Set when it is to end at the next round boundary.
    abort: Arc<AtomicBool>,
    cgroup: Cgroup,
    directory: PathBuf,
    thread_file: PathBuf,
}

impl Run {
    pub(super) fn new(
        home: Arc<Home>,
        workflow: Workflow,
        assignment: Assignment,
        rounds: Vec<Message>,
        abort: Arc<AtomicBool>,
        reports: mpsc::UnboundedSender<(RunId, Report)>,
    ) -> Self {
        let id = assignment.run_id;
        let accepted = Accepted {
            workflow: workflow.name.clone(),
            prompt: assignment.prompt,
            max_rounds: Some(assignment.max_rounds),
            dry_run: assignment.dry_run,
            trigger: assignment.trigger,
            key: None,
        };
        let start = accepted.start_message(id, Some(assignment.max_rounds), assignment.created_at);
        // Positions of messages that nerved accepted exist; were one not to, the run would start over.
        let position = rounds
            .iter()
            .try_fold(Position::default(), |position, message| {
                position.after(message)
            });
        let mut position = position.unwrap_or_default();
        let next = position.rounds + 1;
        let route = assignment.route.filter(|route| route.round == next);
        position.route = route.map(|route| route.target);
        let failed = assignment.failed.filter(|failed| failed.round == next);
        let wait_ms = failed.as_ref().map_or(0, |failed| failed.wait_ms);
        let checker = |(name, role): (&RoleName, &Role)| {
            Some((name.clone(), Checker::new(&role.meta.as_ref()?.schema)))
        };
        Self {
            cgroup: home.cgroup.child(&id.cgroup()),
            directory: home.state.join("runs").join(id.to_string()),
            thread_file: home.state.join("threads").join(format!("{id}.jsonl")),
            home,
            id,
            attempt: assignment.attempt,
            max_rounds: assignment.max_rounds,
            is_dry: assignment.dry_run,
            tools: assignment.tools,
            checkers: workflow.roles.iter().filter_map(checker).collect(),
            workflow: Arc::new(workflow),
            thread: std::iter::once(start).chain(rounds).collect(),
            position,
            failed: failed.map_or(0, |failed| failed.attempts),
            attempt_at: Instant::now() + Duration::from_millis(wait_ms),
            awaited: None,
            reports,
            abort,
            deadline: assignment
                .timeout_ms
                .map(|ms| Instant::now() + Duration::from_millis(ms)),
        }
    }

    /// Drives the run to its end.
    pub(super) async fn drive(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let Err(end) = self.rounds(&mut orders).await;
        if let Err(error) = self.clean_up().await {
            tracing::warn!(run_id = %self.id, %error, "failed to clean up behind a run");
        }
        self.report(Report::End(end));
    }

    fn report(&self, report: Report) {
        // The receiver lives as long as the worker.
        let _ = self.reports.send((self.id, report));
    }

    async fn rounds(
        &mut self,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<Infallible, End> {
        loop {
            self.boundary()?;
            let next = moderator::next(&self.workflow, self.max_rounds, &self.position);
            if let Next::End(result) = next {
                return Err(result.into());
            }
            // No round before the last one is durable. An end need not wait: it is made durable together with it.
            self.acknowledged(orders).await?;
            self.pause(orders).await?;
            match next {
                Next::Role(role) => self.speak(&role, orders).await?,
                Next::Ask => self.ask(orders).await?,
                // Such a workflow has a worker of its own, and this is not it.
                Next::Any | Next::End(_) => return Err(RunResult::ExecFailed.into()),
            }
        }
    }

    /// Here it ends when somebody wants it to end at a boundary.
    fn boundary(&self) -> Result<(), End> {
        if self.abort.load(Ordering::Relaxed) {
            return Err(RunResult::Aborted.into());
        }
        Ok(())
    }

    /// Waits until what it said last is durable.
    async fn acknowledged(
        &mut self,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<(), End> {
        while let Some(awaited) = self.awaited {
            let order = orders.recv().await;
            if order == Some(awaited) {
                self.awaited = None;
            }
            heed(order)?;
        }
        Ok(())
    }

    /// Waits until the next attempt may begin.
    async fn pause(&mut self, orders: &mut mpsc::UnboundedReceiver<Order>) -> Result<(), End> {
        let until = self
            .deadline
            .map_or(self.attempt_at, |end| end.min(self.attempt_at));
        loop {
            tokio::select! {
                biased;
                order = orders.recv() => heed(order)?,
                () = reached(until) => break,
            }
        }
        match self.deadline {
            Some(deadline) if deadline <= Instant::now() => Err(RunResult::Timeout.into()),
            _ => Ok(()),
        }
    }

    /// One round.
    async fn speak(
        &mut self,
        role: &RoleName,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<(), End> {
        let round = self.position.rounds + 1;
        let mut message = self.last_word(role, round, orders).await?;
        if self.failed > 0 {
            let attempts = self.failed + 1;
            message.meta.insert("attempts".into(), attempts.into());
        }
        self.report(Report::Round {
            round,
            message: message.clone(),
        });
        self.awaited = Some(Order::MessageAck(round));
        self.failed = 0;
        self.position = self.position.after(&message).unwrap_or_default();
        self.thread.push(message);
        Ok(())
    }

    /// What a role says in the end: it is tried as often as it says, and corrected.
    async fn last_word(
        &mut self,
        name: &RoleName,
        round: u32,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<Message, End> {
        let workflow = self.workflow.clone();
        let Some(role) = workflow.roles.get(name) else {
            return Ok(failure(
                name,
                &RunResult::ExecFailed,
                "there is no such role",
            ));
        };
        let mut told = match self.told(name, role, round) {
            Ok(told) => told,
            Err((result, why)) => return Ok(failure(name, &result, &why)),
        };
        if let (true, Rehearsal::Say { content, meta }) = (self.is_dry, &role.rehearsal) {
            return Ok(self.stage(name, role, round).rehearse(&told, content, meta));
        }
        if let Err(error) = self.prepare() {
            let why = format!("cannot prepare the run's directory: {error}");
            return Ok(failure(name, &RunResult::ExecFailed, &why));
        }
        // What a resume knows are failed attempts; that some of them were corrections it does not.
        let (mut tries, mut corrections) = (self.failed + 1, 0);
        loop {
            let said = self.stage(name, role, round).attempt(&told, orders).await?;
            let delay = match (said.message.result(), said.correction) {
                (None, _) => None,
                _ if self.failed >= limits::FAILED_ATTEMPTS => None,
                (_, Some(correction)) if corrections < limits::CORRECTIONS => {
                    (corrections, told.correction) = (corrections + 1, Some(correction));
                    Some(Duration::ZERO)
                }
                (Some(result), _) if role.retry.allows(tries, &result) => {
                    let delay = role.retry.delay(tries, jitter()).max(said.wait);
                    (tries, corrections, told.correction) = (tries + 1, 0, None);
                    Some(delay)
                }
                _ => None,
            };
            let Some(delay) = delay else {
                return Ok(said.message);
            };
            self.attempt_failed(said.message, delay, orders).await?;
        }
    }

    /// Puts on record that an attempt of the next round failed, and waits until the next one may begin. `Err`: the run
    /// ends instead, as a backoff is a boundary, and its time-out goes on.
    async fn attempt_failed(
        &mut self,
        message: Message,
        delay: Duration,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Result<(), End> {
        let round = self.position.rounds + 1;
        self.failed += 1;
        self.report(Report::Attempt {
            round,
            attempt: self.failed,
            message,
            delay,
        });
        self.attempt_at = Instant::now() + delay;
        self.awaited = Some(Order::AttemptAck {
            round,
            attempt: self.failed,
        });
        self.boundary()?;
        self.acknowledged(orders).await?;
        self.pause(orders).await
    }

    /// What a role is told in this round, or with what the round fails.
    fn told(&self, name: &RoleName, role: &Role, round: u32) -> Result<Told, (RunResult, String)> {
        let checker = self.checkers.get(name).map(Result::as_ref).transpose();
        let checker = checker.map_err(|why| (RunResult::BadReply, why.clone()))?;
        let context = template::context(&self.thread, round, self.id);
        let render = |prompt: &str| template::render(prompt, context.clone());
        Told::new(role, checker, &self.thread[0], render)
            .map_err(|why| (RunResult::TemplateError, why))
    }

    /// All that an attempt of a round needs.
    fn stage<'a>(&'a self, name: &'a RoleName, role: &'a Role, number: u32) -> Round<'a> {
        let mut environment = self.home.environment.clone();
        environment.extend(
            [
                ("NERVE_RUN_ID", self.id.to_string()),
                ("NERVE_ROLE", name.to_string()),
                ("NERVE_ROUND", number.to_string()),
                ("NERVE_ATTEMPT", self.attempt.to_string()),
                ("NERVE_RETRY", self.failed.to_string()),
                ("NERVE_THREAD", self.thread_file.display().to_string()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        if self.is_dry {
            environment.push(("NERVE_DRY_RUN".to_owned(), "1".to_owned()));
        }
        let directory = role.cwd.as_ref();
        Round {
            home: &self.home,
            run: self.id,
            cgroup: &self.cgroup,
            name,
            role,
            tools: &self.tools,
            // A moderator may have the name of a role.
            checker: role
                .meta
                .as_ref()
                .and_then(|_| self.checkers.get(name)?.as_ref().ok()),
            directory: directory.map_or(&self.directory, |cwd| cwd.as_ref()),
            environment,
            number,
            deadline: role.timeout.map(|timeout| Instant::now() + timeout),
            run_deadline: self.deadline,
        }
    }

    /// The thread so far, a JSON object for each message.
    fn lines(&self) -> impl Iterator<Item = Value> {
        self.thread.iter().enumerate().map(|(round, message)| {
            serde_json::json!({
                "round": round, "role": message.role, "content": message.content, "meta": message.meta,
                "timestamp": message.timestamp,
            })
        })
    }

    /// Sees that the run has its directory, and the thread so far as a file.
    fn prepare(&self) -> io::Result<()> {
        match std::fs::create_dir(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut lines = Vec::new();
        for line in self.lines() {
            serde_json::to_writer(&mut lines, &line)?;
            lines.push(b'\n');
        }
        let mut file = std::fs::File::create(&self.thread_file)?;
        file.write_all(&lines)
    }

    /// Removes the run's cgroup and its files. No process of it is left.
    async fn clean_up(&self) -> io::Result<()> {
        self.cgroup.remove()?;
        let absent_is_fine = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        };
        absent_is_fine(std::fs::remove_file(&self.thread_file))?;
        if absent_is_fine(std::fs::remove_dir(&self.directory)).is_err() {
            // Not empty, so perhaps large: not on the loop that answers the watchdog.
            let directory = self.directory.clone();
            let removed =
                tokio::task::spawn_blocking(move || std::fs::remove_dir_all(directory)).await;
            absent_is_fine(removed.unwrap_or_else(|error| Err(io::Error::other(error))))?;
        }
        Ok(())
    }
}

/// An order while nothing is executed: it may be the end of the run.
fn heed(order: Option<Order>) -> Result<(), End> {
    match order {
        Some(Order::Kill { .. }) | None => Err(RunResult::Killed.into()),
        Some(Order::Abort) => Err(RunResult::Aborted.into()),
        Some(_) => Ok(()),
    }
}

/// What is reached already is not waited for: a timer takes a millisecond at least.
async fn reached(instant: Instant) {
    if instant > Instant::now() {
        sleep_until(instant).await;
    }
}

/// From 0 to 1, whatever it is.
fn jitter() -> f64 {
    let random = u32::try_from(RandomState::new().hash_one(()) >> 32);
    f64::from(random.unwrap_or(0)) / f64::from(u32::MAX)
}

/// How a result is said in the protocol.
pub(super) fn event_type(result: &RunResult) -> EventType {
    match result.end().0 {
        Status::Completed => EventType::Completed,
        Status::Killed => EventType::Killed,
        Status::Aborted => EventType::Aborted,
        _ => EventType::Failed,
    }
}

/// The grace of a kill order.
pub(super) fn grace(ms: u64) -> Duration {
    Duration::from_millis(ms).min(limits::MAX_GRACE)
}
