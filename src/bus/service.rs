//! `org.nerve1.Manager`, the answering half. No method waits for a run.
//!
//! A change is answered when it is durable; a read sees only what is durable.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, interface};

use super::authorize::Authority;
use super::client::{
    Event, ListFilter, ManagerStatus, Round, Run, StartOptions, ThreadOptions, WorkflowStatus,
};
use super::error::Error;
use crate::engine::Answer;
use crate::manager::handle::{Gone, Handle};
use crate::model::limits;
use crate::model::name::{RunId, RunTail, WorkflowName};
use crate::model::run::{Accepted, KillRequest};
use crate::model::status::Status;
use crate::store::{self, EventRow, Found, RunFilter, RunRow, ThreadRange};
use crate::systemd::Systemd;

/// What an answer of messages may hold: the bus takes 32 MiB at most.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// What the interface answers from.
#[derive(Debug, Clone)]
pub struct Manager {
    pub handle: Handle,
    pub store: store::Handle,
    pub systemd: watch::Receiver<Option<Systemd>>,
    /// Where each workflow's file is.
    pub files: Arc<BTreeMap<WorkflowName, PathBuf>>,
    /// When nerved started: µs since the epoch.
    pub started_at: u64,
    pub authority: Arc<Authority>,
}

#[interface(name = "org.nerve1.Manager")]
impl Manager {
    async fn start_run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        workflow: &str,
        prompt: &str,
        options: StartOptions,
    ) -> Result<String, Error> {
        let uid = self.authority.authorize(connection, &header).await?;
        let workflow: WorkflowName = workflow.parse().map_err(invalid)?;
        if prompt.len() > limits::PROMPT_BYTES {
            return Err(Error::InvalidArgument(format!(
                "the prompt is {} bytes, the limit is {}; put it into a file that the role reads",
                prompt.len(),
                limits::PROMPT_BYTES
            )));
        }
        if let Some(rounds) = options
            .max_rounds
            .filter(|rounds| !(1..=limits::MAX_ROUNDS).contains(rounds))
        {
            return Err(Error::InvalidArgument(format!(
                "maxRounds is {rounds}; it is 1 to {}",
                limits::MAX_ROUNDS
            )));
        }
        let accepted = Accepted {
            workflow: workflow.clone(),
            prompt: prompt.to_owned(),
            max_rounds: options.max_rounds,
            dry_run: false,
            trigger: serde_json::json!({"type": "client", "uid": uid}),
        };
        match self.handle.start(accepted).await? {
            (run, Answer::Done) => Ok(run.to_string()),
            (_, Answer::BadDefinition(faults)) => Err(Error::BadDefinition(format!(
                "workflow {workflow} cannot be used: {faults}"
            ))),
            (_, Answer::NoSpace) => Err(Error::NoSpace(
                "no space is left for the database in /var/lib/nerve; nothing was started"
                    .to_owned(),
            )),
            (_, Answer::UnknownWorkflow | Answer::NotOpen) => Err(Error::UnknownWorkflow(format!(
                "no workflow is called {workflow}; `nervectl status` lists those that nerved read when it started"
            ))),
        }
    }

    async fn kill_run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: String,
        reason: String,
        grace_usec: u64,
    ) -> Result<(), Error> {
        self.authority.authorize(connection, &header).await?;
        if reason.len() > limits::REASON_BYTES {
            return Err(Error::InvalidArgument(format!(
                "the reason is longer than {} bytes",
                limits::REASON_BYTES
            )));
        }
        if u128::from(grace_usec) > limits::MAX_GRACE.as_micros() {
            return Err(Error::InvalidArgument(format!(
                "the grace is longer than {} s",
                limits::MAX_GRACE.as_secs()
            )));
        }
        let id = self.find(&run).await?;
        let request = KillRequest {
            reason: Some(reason).filter(|reason| !reason.is_empty()),
            grace_us: grace_usec,
        };
        match self.handle.kill(id, request).await? {
            Answer::NotOpen => {}
            Answer::NoSpace => {
                return Err(Error::NoSpace(
                    "no space is left for the database; the kill is not in force".to_owned(),
                ));
            }
            _ => return Ok(()),
        }
        let row = self.row(id).await?;
        if row.status == Status::Killed {
            return Ok(());
        }
        let result = row.result.unwrap_or_default();
        Err(Error::AlreadyEnded(format!(
            "run {} had already ended: {} ({result})",
            id.short(),
            row.status
        )))
    }

    async fn get_run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: String,
    ) -> Result<Run, Error> {
        self.authority.authorize(connection, &header).await?;
        let id = self.find(&run).await?;
        let row = self.row(id).await?;
        let events = self
            .store
            .call(move |store| store.events(id))
            .await
            .map_err(unreadable)?;
        let only_start = ThreadRange {
            before: Some(1),
            ..ThreadRange::default()
        };
        let start = self.store.call(move |store| store.thread(id, &only_start));
        let start = start.await.map_err(unreadable)?.into_iter().next();
        let unit = row
            .workflow
            .parse::<WorkflowName>()
            .ok()
            .map(|workflow| workflow.unit());
        Ok(Run {
            prompt: start.map(|start| start.message.content),
            max_rounds: row.max_rounds,
            dry_run: Some(row.dry_run),
            trigger: Some(row.trigger.clone()),
            definition: row.definition.clone(),
            unit,
            events: Some(events.into_iter().map(event).collect()),
            ..summarised(row)
        })
    }

    async fn list_runs(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        filter: ListFilter,
    ) -> Result<Vec<Run>, Error> {
        self.authority.authorize(connection, &header).await?;
        let filter = RunFilter {
            workflow: filter
                .workflow
                .map(|name| name.parse())
                .transpose()
                .map_err(invalid)?,
            active: filter.active.unwrap_or(false),
            limit: filter
                .limit
                .unwrap_or(limits::LIST_ROWS)
                .min(limits::LIST_ROWS),
        };
        let rows = self
            .store
            .call(move |store| store.runs(&filter))
            .await
            .map_err(unreadable)?;
        Ok(rows.into_iter().map(summarised).collect())
    }

    async fn get_thread(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: String,
        options: ThreadOptions,
    ) -> Result<Vec<Round>, Error> {
        self.authority.authorize(connection, &header).await?;
        let id = self.find(&run).await?;
        let range = ThreadRange {
            limit: options.limit,
            before: options.before.filter(|before| *before > 0),
            bytes: Some(ANSWER_BYTES),
        };
        let thread = self
            .store
            .call(move |store| store.thread(id, &range))
            .await
            .map_err(unreadable)?;
        let round = |round: store::Round| Round {
            round: round.round,
            role: round.message.role,
            // D-Bus has no NUL; a worker that sends one must not cost us the connection.
            content: round.message.content.replace('\0', "\u{fffd}"),
            meta: serde_json::Value::Object(round.message.meta).to_string(),
            timestamp: round.message.timestamp,
        };
        Ok(thread.into_iter().map(round).collect())
    }

    async fn get_status(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<ManagerStatus, Error> {
        self.authority.authorize(connection, &header).await?;
        let overview = self.handle.overview().await?;
        let systemd = self.systemd.borrow().clone();
        let mut workflows = Vec::new();
        for workflow in overview.workflows {
            let identity = match &systemd {
                Some(systemd) if workflow.worker != "absent" => {
                    systemd.identity(&workflow.name).await.ok().flatten()
                }
                _ => None,
            };
            let limits = workflow
                .definition
                .as_ref()
                .map(|definition| &definition.workflow);
            workflows.push(WorkflowStatus {
                worker: workflow.worker.to_owned(),
                running: count(workflow.running),
                queued: count(workflow.queued),
                concurrency: limits.map_or(0, |limits| limits.concurrency),
                max_queue: limits.map_or(0, |limits| limits.max_queue),
                error: workflow.fault,
                path: self
                    .files
                    .get(&workflow.name)
                    .map_or_else(String::new, |path| path.display().to_string()),
                unit: workflow.name.unit(),
                main_pid: identity
                    .map(|identity| identity.main_pid)
                    .filter(|pid| *pid != 0),
                name: workflow.name.into(),
            });
        }
        Ok(ManagerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            running: count(overview.running),
            queued: count(overview.queued),
            started_at: self.started_at,
            workflows,
        })
    }

    #[zbus(signal)]
    pub(super) async fn run_changed(
        emitter: &SignalEmitter<'_>,
        run: &str,
        status: &str,
    ) -> zbus::Result<()>;
}

impl Manager {
    async fn find(&self, tail: &str) -> Result<RunId, Error> {
        let parsed: RunTail = tail.parse().map_err(invalid)?;
        match self
            .store
            .call(move |store| store.find(&parsed))
            .await
            .map_err(unreadable)?
        {
            Found::One(id) => Ok(id),
            Found::None => Err(Error::UnknownRun(format!(
                "no run's id ends in {tail}; `nervectl workflow list` lists runs"
            ))),
            Found::Several => Err(Error::AmbiguousRun(format!(
                "several runs' ids end in {tail}; give more digits"
            ))),
        }
    }

    async fn row(&self, id: RunId) -> Result<RunRow, Error> {
        let row = self
            .store
            .call(move |store| store.run(id))
            .await
            .map_err(unreadable)?;
        row.ok_or_else(|| Error::UnknownRun(format!("run {id} is gone")))
    }
}

impl From<Gone> for Error {
    fn from(gone: Gone) -> Self {
        Self::Unknown(format!(
            "{gone}, and whether the change is stored is unknown; look again when it is back"
        ))
    }
}

fn invalid(error: impl std::fmt::Display) -> Error {
    Error::InvalidArgument(error.to_string())
}

#[expect(clippy::needless_pass_by_value, reason = "called by map_err")]
fn unreadable(error: store::Error) -> Error {
    tracing::error!(%error, "failed to read the store");
    Error::Internal(error.to_string())
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn summarised(row: RunRow) -> Run {
    Run {
        run: row.run,
        workflow: row.workflow,
        status: row.status.to_string(),
        killing: row.killing,
        exit_code: row.exit_code.map(i32::from),
        result: row.result,
        reason: row.reason,
        rounds: row.rounds,
        created_at: row.created_at,
        started_at: row.started_at,
        ended_at: row.ended_at,
        ..Run::default()
    }
}

fn event(row: EventRow) -> Event {
    Event {
        seq: row.seq,
        kind: row.event_type,
        timestamp: row.timestamp,
        payload: row.payload,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tokio::sync::mpsc;
    use zbus::object_server::Interface as _;

    use super::super::authorize::ACTIONS;
    use super::*;
    use crate::engine::{Engine, Now, Recovered};
    use crate::manager::driver::{Driver, World};
    use crate::store::Store;

    fn manager(directory: &std::path::Path) -> Manager {
        let store = store::Handle::spawn(Store::open(directory).unwrap()).unwrap();
        let recovered = Recovered {
            boot_id: "b".into(),
            workflows: BTreeMap::new(),
            pinned: HashMap::new(),
            runs: vec![],
        };
        let now = Now {
            wall_us: 0,
            boot_us: 0,
        };
        let (_, systemd) = watch::channel(None);
        let world = World {
            store: store.clone(),
            systemd: systemd.clone(),
            changes: mpsc::unbounded_channel().0,
            worker: PathBuf::new(),
            socket: PathBuf::new(),
        };
        let (_, handle) = Driver::new(Engine::recover(recovered, now).unwrap(), world);
        Manager {
            handle,
            store,
            systemd,
            files: Arc::default(),
            started_at: 0,
            authority: Arc::default(),
        }
    }

    #[test]
    fn every_method_of_the_interface_has_an_action_and_every_action_a_method() {
        let directory = tempfile::tempdir().unwrap();
        let mut xml = String::new();
        manager(directory.path()).introspect_to_writer(&mut xml, 0);
        let method = |line: &str| {
            Some(
                line.trim()
                    .strip_prefix("<method name=\"")?
                    .split('"')
                    .next()?
                    .to_owned(),
            )
        };
        let mut methods: Vec<_> = xml.lines().filter_map(method).collect();
        let mut known: Vec<_> = ACTIONS
            .iter()
            .map(|(method, _)| (*method).to_owned())
            .collect();
        methods.sort();
        known.sort();
        assert_eq!(methods, known);
        assert!(
            !xml.contains("<property"),
            "a property would be readable by everybody"
        );
    }
}
