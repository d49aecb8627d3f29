//! `org.nerve1.Manager`, the answering half. No method waits for a run.
//!
//! A change is answered when it is durable; a read sees only what is durable.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, interface};

use super::answers::{self, invalid, unreadable};
use super::authorize::Authority;
use super::error::Error;
use super::upkeep::Upkeep;
use super::words::{ListFilter, ManagerStatus, Round, Run, StartOptions, ThreadOptions, check_key};
use crate::engine::{self, Answer};
use crate::manager::definitions::{self, Definitions};
use crate::manager::handle::{Change, Gone, Handle};
use crate::model::limits;
use crate::model::name::{RunId, RunTail, WorkflowName};
use crate::model::run::{AbortRequest, Accepted, KillRequest};
use crate::model::status::{RunResult, Status};
use crate::store::{self, Found, RunRow, Store, ThreadRange};
use crate::systemd::Systemd;

/// What an answer of messages may hold: the bus takes 32 MiB at most.
const ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// What the interface answers from.
#[derive(Debug, Clone)]
pub struct Manager {
    pub handle: Handle,
    pub store: store::Handle,
    pub systemd: watch::Receiver<Option<Systemd>>,
    pub definitions: Definitions,
    /// What takes long, one at a time.
    pub upkeep: Upkeep,
    /// When nerved started: µs since the epoch.
    pub started_at: u64,
    /// Of the one connection that this is served on.
    pub authority: Arc<Authority>,
}

#[interface(name = "org.nerve1.Manager")]
impl Manager {
    #[zbus(out_args("run", "result", "detail"))]
    async fn start_run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        workflow: &str,
        prompt: &str,
        options: StartOptions,
    ) -> Result<(String, String, String), Error> {
        crate::os::failpoint!("F01");
        let caller = self.authority.authorize(connection, &header).await?;
        crate::os::failpoint!("F02");
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
        if let Some(key) = &options.key {
            check_key(key).map_err(Error::InvalidArgument)?;
        }
        let accepted = Accepted {
            workflow: workflow.clone(),
            prompt: prompt.to_owned(),
            max_rounds: options.max_rounds,
            dry_run: options.dry_run.unwrap_or(false),
            trigger: answers::trigger(&caller),
            key: options.key.clone(),
        };
        match self.handle.start(accepted).await? {
            Answer::Started {
                run,
                dropped,
                fault,
            } => Ok(answers::started(run, dropped, fault)),
            Answer::Existing(run) => self.existing(run, prompt, &options).await,
            Answer::BadDefinition(faults) => Err(Error::BadDefinition(format!(
                "workflow {workflow} cannot be used: {faults}"
            ))),
            Answer::NoSpace(why) => Err(answers::no_space(&why, "nothing was started")),
            _ => Err(answers::unknown_workflow(&workflow)),
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
        let caller = self.authority.authorize(connection, &header).await?;
        crate::os::failpoint!("F21");
        let reason = answers::reason(reason)?;
        if u128::from(grace_usec) > limits::MAX_GRACE.as_micros() {
            return Err(Error::InvalidArgument(format!(
                "the grace is longer than {} s",
                limits::MAX_GRACE.as_secs()
            )));
        }
        let id = self.find(&run).await?;
        let request = KillRequest {
            reason,
            grace_us: grace_usec,
            by: Some(caller),
        };
        match self
            .handle
            .change(Change::Kill { run: id, request })
            .await?
        {
            Answer::NotOpen => {}
            Answer::NoSpace(why) => {
                return Err(answers::no_space(&why, "the kill is not in force"));
            }
            _ => return Ok(()),
        }
        if self.row(id).await?.status == Status::Killed {
            return Ok(());
        }
        Err(self.refusal(id).await?)
    }

    async fn abort_run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: String,
        reason: String,
    ) -> Result<(), Error> {
        let by = self.authority.authorize(connection, &header).await?;
        let reason = answers::reason(reason)?;
        let id = self.find(&run).await?;
        let request = AbortRequest { reason, by };
        match self
            .handle
            .change(Change::Abort { run: id, request })
            .await?
        {
            Answer::NotOpen | Answer::Ending => Err(self.refusal(id).await?),
            Answer::NoSpace(why) => Err(answers::no_space(&why, "the abort is not in force")),
            _ => Ok(()),
        }
    }

    async fn drain_workflow(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        workflow: &str,
        timeout_usec: u64,
    ) -> Result<(), Error> {
        let by = self.authority.authorize(connection, &header).await?;
        let workflow: WorkflowName = workflow.parse().map_err(invalid)?;
        let timeout = (timeout_usec != u64::MAX).then(|| Duration::from_micros(timeout_usec));
        let change = Change::Drain {
            workflow: workflow.clone(),
            timeout,
            by,
        };
        answers::done(self.handle.change(change).await?, Some(&workflow))
    }

    async fn reset_workflow(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        workflow: &str,
    ) -> Result<(), Error> {
        let by = self.authority.authorize(connection, &header).await?;
        let workflow: WorkflowName = workflow.parse().map_err(invalid)?;
        let change = Change::Reset {
            workflow: workflow.clone(),
            by,
        };
        answers::done(self.handle.change(change).await?, Some(&workflow))
    }

    async fn pause(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        reason: String,
    ) -> Result<(), Error> {
        let by = self.authority.authorize(connection, &header).await?;
        let reason = answers::reason(reason)?;
        let change = Change::Pause { reason, by };
        answers::done(self.handle.change(change).await?, None)
    }

    async fn resume(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<(), Error> {
        let by = self.authority.authorize(connection, &header).await?;
        answers::done(self.handle.change(Change::Resume { by }).await?, None)
    }

    async fn reload(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<String>, Error> {
        let by = self.authority.authorize(connection, &header).await?;
        let errors = self.definitions.reload().await;
        self.handle.audit(definitions::reloaded(Some(by))).await?;
        Ok(errors)
    }

    async fn get_run(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        run: String,
    ) -> Result<Run, Error> {
        self.authority.authorize(connection, &header).await?;
        // Who asks about a run was answered when it was started.
        crate::os::failpoint!("F05");
        let id = self.find(&run).await?;
        let row = self.row(id).await?;
        let events = self.store.events(id).await.map_err(unreadable)?;
        // Whatever became of its prompt, people have to see how the run ended.
        let prompt = match self.prompt(id).await {
            Err(Error::Damaged(why)) => Some(format!("({why})")),
            prompt => prompt?,
        };
        let unit = row
            .workflow
            .parse::<WorkflowName>()
            .ok()
            .map(|workflow| workflow.unit());
        Ok(Run {
            prompt: prompt.as_deref().map(without_nul),
            max_rounds: row.max_rounds,
            trigger: Some(row.trigger.clone()),
            definition: row.definition.clone(),
            unit,
            events: Some(events.into_iter().map(answers::event).collect()),
            ..answers::summarised(row)
        })
    }

    async fn list_runs(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        filter: ListFilter,
    ) -> Result<Vec<Run>, Error> {
        self.authority.authorize(connection, &header).await?;
        let before = match &filter.before {
            Some(run) => Some(self.find(run).await?),
            None => None,
        };
        let filter = answers::run_filter(filter, before)?;
        let rows = self
            .store
            .call(move |store| store.runs(&filter))
            .await
            .map_err(unreadable)?;
        Ok(rows.into_iter().map(answers::summarised).collect())
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
            after: options.after,
            bytes: Some(ANSWER_BYTES),
        };
        let thread = self.store.thread(id, range).await.map_err(unreadable)?;
        let round = |round: store::Round| Round {
            round: round.round,
            role: without_nul(&round.role),
            content: without_nul(&round.content),
            meta: round.meta,
            timestamp: round.timestamp,
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
        let mut pids = answers::main_pids(systemd.as_ref(), &overview.workflows).await;
        let files = self.definitions.files();
        let workflow = |workflow: engine::WorkflowStatus| {
            let path = files.get(&workflow.name);
            let main_pid = pids.remove(&workflow.name);
            answers::workflow(workflow, path, main_pid)
        };
        Ok(ManagerStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            running: answers::count(overview.running),
            queued: answers::count(overview.queued),
            started_at: self.started_at,
            paused: overview.pause.map(answers::pause),
            disk_full: overview.scarcity,
            max_active: overview.max_active,
            workflows: overview.workflows.into_iter().map(workflow).collect(),
        })
    }

    #[zbus(signal)]
    pub(super) async fn run_changed(
        emitter: &SignalEmitter<'_>,
        run: &str,
        status: &str,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    pub(super) async fn workflow_changed(
        emitter: &SignalEmitter<'_>,
        workflow: &str,
    ) -> zbus::Result<()>;
}

/// D-Bus has no NUL; a worker that sends one must not cost us the connection.
fn without_nul(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

impl Manager {
    pub(super) async fn find(&self, tail: &str) -> Result<RunId, Error> {
        let parsed = tail.parse::<RunTail>();
        let (old_id, by_tail) = (tail.to_owned(), parsed.clone().ok());
        let look = move |store: &mut Store| {
            let by_tail = by_tail.map_or(Ok(Found::None), |tail| store.find(&tail))?;
            Ok((store.find_imported(&old_id)?, by_tail))
        };
        let (imported, by_tail) = self.store.call(look).await.map_err(unreadable)?;
        let by_tail = match (imported, by_tail) {
            (Some(id), Found::None) => Found::One(id),
            // A whole id is nobody else's.
            (Some(_), Found::One(id)) if tail.len() == 32 => Found::One(id),
            (Some(old), Found::One(id)) if old != id => Found::Several,
            (Some(_), Found::Several) => Found::Several,
            (_, found) => found,
        };
        if by_tail == Found::None {
            parsed.map_err(invalid)?;
        }
        match by_tail {
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

    /// Content of round 0.
    async fn prompt(&self, id: RunId) -> Result<Option<String>, Error> {
        let only_start = ThreadRange {
            before: Some(1),
            ..ThreadRange::default()
        };
        let start = self.store.thread(id, only_start);
        let start = start.await.map_err(unreadable)?.into_iter().next();
        Ok(start.map(|start| start.content))
    }

    /// The run that has the key already is the answer if it was started with the same.
    async fn existing(
        &self,
        id: RunId,
        prompt: &str,
        options: &StartOptions,
    ) -> Result<(String, String, String), Error> {
        let row = self.row(id).await?;
        let other = if self.prompt(id).await?.as_deref() != Some(prompt) {
            "another prompt"
        } else if options.max_rounds.is_some() && options.max_rounds != row.max_rounds {
            "another limit of rounds"
        } else if options.dry_run.unwrap_or(false) != row.dry_run {
            if row.dry_run {
                "--dry-run"
            } else {
                "no --dry-run"
            }
        } else {
            let result = row.result.as_deref().map(str::parse::<RunResult>);
            let dropped = result.and_then(Result::ok);
            let dropped = dropped.filter(|result| result.end().0 == Status::Dropped);
            let Some(result) = dropped else {
                return Ok(answers::started(id, None, None));
            };
            let events = self.store.events(id).await;
            let detail = answers::detail(&events.map_err(unreadable)?);
            return Ok(answers::started(id, Some((result, detail)), None));
        };
        Err(Error::KeyConflict(format!(
            "key {} is taken by run {}, which was started with {other}; take another key, or start it as before",
            options.key.as_deref().unwrap_or_default(),
            id.short()
        )))
    }

    /// Why a run can be ended no more: what ended it or is ending it, when, and by whom.
    async fn refusal(&self, id: RunId) -> Result<Error, Error> {
        let row = self.row(id).await?;
        let events = self.store.events(id).await;
        Ok(answers::refusal(id, &row, &events.map_err(unreadable)?))
    }
}

impl From<Gone> for Error {
    fn from(gone: Gone) -> Self {
        Self::Unknown(format!(
            "{gone}, and whether the change is stored is unknown; look again when it is back"
        ))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::future::pending;
    use std::path::PathBuf;

    use tokio::sync::mpsc;
    use zbus::object_server::Interface as _;

    use super::super::authorize::ACTIONS;
    use super::super::storage::Storage;
    use super::*;
    use crate::config::definition;
    use crate::config::directory::Trust;
    use crate::engine::{Engine, Known, Now, Recovered};
    use crate::manager::definitions::{Keeper, Places};
    use crate::manager::driver::Driver;
    use crate::manager::hands::World;
    use crate::manager::room::Room;

    /// What answers, with nobody behind it.
    pub(in crate::bus) fn manager(directory: &std::path::Path) -> Manager {
        let (manager, _) = with_driver(directory, BTreeMap::new());
        manager
    }

    fn with_driver(
        directory: &std::path::Path,
        workflows: BTreeMap<WorkflowName, Known>,
    ) -> (Manager, Driver) {
        let mut store = Store::open(directory).unwrap();
        let places = Places {
            workflows: vec![],
            settings: crate::config::settings::Places {
                vendor: directory.join("vendor"),
                file: directory.join("nerve.yaml"),
            },
            trust: Trust::Anyone,
        };
        let (_, definitions) = Keeper::load(places, &mut store).unwrap();
        let store = store::Handle::spawn(store).unwrap();
        let recovered = Recovered {
            boot_id: "b".into(),
            workflows,
            max_active: None,
            workers: BTreeMap::new(),
            pause: None,
            pinned: HashMap::new(),
            runs: vec![],
        };
        let now = Now {
            wall_us: 0,
            boot_us: 0,
        };
        let (_, systemd) = watch::channel(None);
        let world = World {
            systemd: systemd.clone(),
            worker: PathBuf::new(),
            socket: PathBuf::new(),
            tools: watch::channel(Arc::default()).1,
        };
        let room = Room::new(PathBuf::from("/"), store::Log::default());
        let (driver, handle) = Driver::new(
            Engine::recover(recovered, now).unwrap(),
            store.clone(),
            room,
            world,
            mpsc::unbounded_channel().0,
        );
        let manager = Manager {
            authority: Arc::new(Authority::on_bus(handle.clone())),
            handle,
            store,
            systemd,
            definitions,
            upkeep: Upkeep::default(),
            started_at: 0,
        };
        (manager, driver)
    }

    #[tokio::test]
    async fn a_key_leads_to_its_run_only_for_who_starts_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let text = "version: 1\nname: a\nroles:\n  a:\n    exec: [/bin/true]\ngraph:\n  $START: a\n  a: { ok: $END }\n";
        let definition = definition::parse("a", None, text.as_bytes())
            .definition
            .unwrap();
        let known = Known {
            definition: Some(Arc::new(definition.clone())),
            fault: None,
        };
        let workflows = BTreeMap::from([("a".parse().unwrap(), known)]);
        let (manager, driver) = with_driver(directory.path(), workflows);
        let put = manager
            .store
            .call(move |store| store.put_definition(&definition, text.as_bytes()));
        put.await.unwrap();
        tokio::spawn(driver.run(pending()));
        let accepted = Accepted {
            workflow: "a".parse().unwrap(),
            prompt: "once".to_owned(),
            max_rounds: Some(3),
            dry_run: false,
            trigger: serde_json::Value::Null,
            key: Some("k".to_owned()),
        };
        let started = manager.handle.start(accepted).await.unwrap();
        let Answer::Started { run, .. } = started else {
            panic!("{started:?}");
        };
        let options = |max_rounds| StartOptions {
            max_rounds,
            dry_run: None,
            key: Some("k".to_owned()),
        };
        for same in [None, Some(3)] {
            let answer = manager.existing(run, "once", &options(same)).await;
            let nothing = String::new;
            assert_eq!(answer.unwrap(), (run.to_string(), nothing(), nothing()));
        }
        for (prompt, rounds, what) in [
            ("again", None, "another prompt"),
            ("once", Some(4), "another limit of rounds"),
        ] {
            let error = manager.existing(run, prompt, &options(rounds)).await;
            let error = error.unwrap_err();
            assert_eq!(error.exit_status(), 65);
            let said = format!(
                "key k is taken by run {}, which was started with {what}",
                run.short()
            );
            assert!(error.to_string().starts_with(&said), "{error}");
        }
    }

    #[tokio::test]
    async fn every_method_of_the_interface_has_an_action_and_every_action_a_method() {
        let directory = tempfile::tempdir().unwrap();
        let mut xml = String::new();
        let manager = manager(directory.path());
        Storage(manager.clone()).introspect_to_writer(&mut xml, 0);
        manager.introspect_to_writer(&mut xml, 0);
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
