//! One run inside the stock worker: moderate, execute a round, wait until it is durable, and so on to the end.

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::home::Home;
use super::protocol::{Assignment, EventType};
use super::role::{Order, Round, RoundEnd, failure};
use crate::config::template;
use crate::model::limits;
use crate::model::message::{Message, Position};
use crate::model::moderator::{self, Next};
use crate::model::name::{RoleName, RunId};
use crate::model::role::Work;
use crate::model::run::Accepted;
use crate::model::status::{RunResult, Status};
use crate::model::workflow::Workflow;
use crate::os::cgroup::Cgroup;

/// What a run reports.
#[derive(Debug)]
pub(super) enum Report {
    /// A round is done; the next one waits for its acknowledgement, an end does not.
    Round { round: u32, message: Message },
    /// The run ended; nothing of it is left.
    End(RunResult),
}

/// A run that is being executed.
#[derive(Debug)]
pub(super) struct Run {
    home: Arc<Home>,
    id: RunId,
    attempt: u32,
    max_rounds: u32,
    workflow: Workflow,
    /// The start, then the rounds.
    thread: Vec<Message>,
    position: Position,
    /// The newest round that is durable.
    acknowledged: u32,
    deadline: Option<Instant>,
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
        Self {
            cgroup: home.cgroup.child(&id.cgroup()),
            directory: home.state.join("runs").join(id.to_string()),
            thread_file: home.state.join("threads").join(format!("{id}.jsonl")),
            home,
            id,
            attempt: assignment.attempt,
            max_rounds: assignment.max_rounds,
            workflow,
            thread: std::iter::once(start).chain(rounds).collect(),
            acknowledged: position.as_ref().map_or(0, |position| position.rounds),
            position: position.unwrap_or_default(),
            abort,
            deadline: assignment
                .timeout_ms
                .map(|ms| Instant::now() + Duration::from_millis(ms)),
        }
    }

    /// Drives the run to its end.
    pub(super) async fn drive(
        mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        reports: mpsc::UnboundedSender<(RunId, Report)>,
    ) {
        let result = self.rounds(&mut orders, &reports).await;
        if let Err(error) = self.clean_up().await {
            tracing::warn!(run_id = %self.id, %error, "failed to clean up behind a run");
        }
        // The receiver lives as long as the worker.
        let _ = reports.send((self.id, Report::End(result)));
    }

    async fn rounds(
        &mut self,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        reports: &mpsc::UnboundedSender<(RunId, Report)>,
    ) -> RunResult {
        loop {
            if self.abort.load(Ordering::Relaxed) {
                return RunResult::Aborted;
            }
            let role = match moderator::next(&self.workflow, self.max_rounds, &self.position) {
                Next::End(result) => return result,
                Next::Role(role) => role,
            };
            // No round before the last one is durable. An end need not wait: it is made durable together with it.
            while self.acknowledged < self.position.rounds {
                match orders.recv().await {
                    Some(Order::MessageAck(round)) => {
                        self.acknowledged = self.acknowledged.max(round)
                    }
                    Some(Order::Abort) => return RunResult::Aborted,
                    Some(Order::Kill { .. }) | None => return RunResult::Killed,
                }
            }
            if self
                .deadline
                .is_some_and(|deadline| deadline <= Instant::now())
            {
                return RunResult::Timeout;
            }
            let round = self.position.rounds + 1;
            let message = match self.round(&role, round, orders).await {
                RoundEnd::Said(message) => message,
                RoundEnd::Killed => return RunResult::Killed,
                RoundEnd::TimedOut => return RunResult::Timeout,
            };
            let report = Report::Round {
                round,
                message: message.clone(),
            };
            let _ = reports.send((self.id, report));
            self.position = self.position.after(&message).unwrap_or_default();
            self.thread.push(message);
        }
    }

    async fn round(
        &mut self,
        name: &RoleName,
        number: u32,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> RoundEnd {
        let Some(role) = self.workflow.roles.get(name) else {
            return RoundEnd::Said(failure(
                name,
                &RunResult::ExecFailed,
                "there is no such role",
            ));
        };
        let rendered = role.prompt.as_deref().map(|prompt| {
            let context = template::context(&self.thread, number, self.id);
            template::render(prompt, context)
        });
        let prompt = match rendered.transpose() {
            Ok(prompt) => prompt,
            Err(error) => return RoundEnd::Said(failure(name, &RunResult::TemplateError, &error)),
        };
        if let Err(error) = self.prepare() {
            let why = format!("cannot prepare the run's directory and cgroup: {error}");
            return RoundEnd::Said(failure(name, &RunResult::ExecFailed, &why));
        }
        let mut environment = self.home.environment.clone();
        environment.extend(
            [
                ("NERVE_RUN_ID", self.id.to_string()),
                ("NERVE_ROLE", name.to_string()),
                ("NERVE_ROUND", number.to_string()),
                ("NERVE_ATTEMPT", self.attempt.to_string()),
                ("NERVE_THREAD", self.thread_file.display().to_string()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let Work::Exec(argv) = &role.work else {
            let why = "this worker executes commands only";
            return RoundEnd::Said(failure(name, &RunResult::ExecFailed, why));
        };
        let round = Round {
            home: &self.home,
            argv,
            run: self.id,
            cgroup: &self.cgroup,
            name,
            role,
            directory: role
                .cwd
                .as_ref()
                .map_or(&self.directory, |cwd| cwd.as_ref()),
            prompt,
            environment,
            number,
            run_deadline: self.deadline,
        };
        round.execute(orders).await
    }

    /// Sees that the run has its cgroup, its directory, and the thread so far as a file.
    fn prepare(&self) -> io::Result<()> {
        self.cgroup.create_anew()?;
        match std::fs::create_dir(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut lines = Vec::new();
        for (round, message) in self.thread.iter().enumerate() {
            let line = serde_json::json!({
                "round": round, "role": message.role, "content": message.content, "meta": message.meta,
                "timestamp": message.timestamp,
            });
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
