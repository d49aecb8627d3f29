//! The client half of `org.nerve1.Manager`: the interface, the dictionaries it speaks in, and a [`Client`] whose errors
//! say what a caller can do about them. The interface half answers with the same dictionaries.
//!
//! No method waits for a run. Who wants its end subscribes ([`Client::changes`]), then asks ([`Client::run`]).

use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use zbus::proxy::CacheProperties;
use zbus::{
    Connection, DeserializeDict, MatchRule, MessageStream, SerializeDict, Type, connection,
};

use super::error::{CallError, Error};
use crate::model::name::RunId;

/// The name on the bus.
pub const NAME: &str = "org.nerve1";
/// The one object.
pub const PATH: &str = "/org/nerve1";
/// Its interface.
pub const INTERFACE: &str = "org.nerve1.Manager";

/// A call that is not answered within this time counts as lost. nerved's watchdog is as long.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The options of `StartRun`. One that nerved does not know is refused, never ignored.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct StartOptions {
    /// Its limit of rounds.
    pub max_rounds: Option<u32>,
}

/// The filter of `ListRuns`.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct ListFilter {
    /// Only runs of this workflow.
    pub workflow: Option<String>,
    /// Only runs that have not ended.
    pub active: Option<bool>,
    /// The newest so many.
    pub limit: Option<u32>,
}

/// The options of `GetThread`.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct ThreadOptions {
    /// The newest so many; the start (round 0) is the oldest of all.
    pub limit: Option<u32>,
    /// Only what is older than this round. An answer may leave out the oldest of what was asked for, since a message of
    /// the bus has a largest size: who wants more asks again from there.
    pub before: Option<u32>,
}

/// A run. What is null elsewhere is absent here; what follows `ended_at` comes with `GetRun` only.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Run {
    /// Its id, 32 hex digits.
    pub run: String,
    /// Its workflow.
    pub workflow: String,
    /// A name of [`crate::model::status::Status`].
    pub status: String,
    /// A kill is in progress.
    pub killing: bool,
    /// Present once it has ended.
    pub exit_code: Option<i32>,
    /// A [`crate::model::status::RunResult`], once it has ended.
    pub result: Option<String>,
    /// What a person gave.
    pub reason: Option<String>,
    /// Rounds done.
    pub rounds: u32,
    /// µs since the epoch.
    pub created_at: u64,
    /// When it left the queue.
    pub started_at: Option<u64>,
    /// When it ended.
    pub ended_at: Option<u64>,
    /// Content of round 0.
    pub prompt: Option<String>,
    /// Its limit of rounds, once that is fixed.
    pub max_rounds: Option<u32>,
    /// Whether it is a rehearsal.
    pub dry_run: Option<bool>,
    /// Who or what started it, as JSON.
    pub trigger: Option<String>,
    /// sha256 of the definition it runs.
    pub definition: Option<String>,
    /// Its worker's unit.
    pub unit: Option<String>,
    /// Its events, oldest first.
    pub events: Option<Vec<Event>>,
}

impl Run {
    /// The exit code, once the run has ended; a code that no process could exit with counts as 255.
    #[must_use]
    pub fn end(&self) -> Option<u8> {
        self.exit_code
            .map(|code| u8::try_from(code).unwrap_or(u8::MAX))
    }
}

/// An entry of a run's log. A message's content is left out: the thread has it.
#[derive(Debug, Clone, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Event {
    /// Its place in the log of all runs.
    pub seq: u64,
    /// What happened.
    #[zbus(rename = "type")]
    pub kind: String,
    /// µs since the epoch.
    pub timestamp: u64,
    /// A JSON object.
    pub payload: String,
}

/// A message of a thread.
#[derive(Debug, Clone, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct Round {
    /// 0 is the start.
    pub round: u32,
    /// Who spoke.
    pub role: String,
    /// What it said.
    pub content: String,
    /// A JSON object.
    pub meta: String,
    /// µs since the epoch.
    pub timestamp: u64,
}

/// What `GetStatus` answers.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct ManagerStatus {
    /// nerved's version.
    pub version: String,
    /// Runs that have started and not ended.
    pub running: u32,
    /// Runs that wait.
    pub queued: u32,
    /// When nerved started: µs since the epoch.
    pub started_at: u64,
    /// Every workflow, by name.
    pub workflows: Vec<WorkflowStatus>,
}

/// A workflow in what `GetStatus` answers. The numbers of a definition that was never right are 0.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct WorkflowStatus {
    /// Its name.
    pub name: String,
    /// `absent`, `starting`, `ready`, `stopping` or `failed`.
    pub worker: String,
    /// Runs that have started and not ended.
    pub running: u32,
    /// Runs that wait.
    pub queued: u32,
    /// Most runs at the same time.
    pub concurrency: u32,
    /// Most runs that wait.
    pub max_queue: u32,
    /// What is wrong with its definition: diagnostics, one a line.
    pub error: Option<String>,
    /// The file.
    pub path: String,
    /// Its worker's unit.
    pub unit: String,
    /// Its worker's process.
    pub main_pid: Option<u32>,
}

/// The interface. Flags such as no-autostart are left alone: zbus calls with flags have no time-out.
#[zbus::proxy(
    interface = "org.nerve1.Manager",
    default_service = "org.nerve1",
    default_path = "/org/nerve1"
)]
pub trait Manager {
    /// Starts a run; returns its id once it is durable.
    fn start_run(
        &self,
        workflow: &str,
        prompt: &str,
        options: StartOptions,
    ) -> Result<String, Error>;
    /// Ends a run; returns once the request is durable.
    fn kill_run(&self, run: &str, reason: &str, grace_usec: u64) -> Result<(), Error>;
    /// One run, with everything about it.
    fn get_run(&self, run: &str) -> Result<Run, Error>;
    /// Runs, newest first.
    fn list_runs(&self, filter: ListFilter) -> Result<Vec<Run>, Error>;
    /// The messages of a run, in order.
    fn get_thread(&self, run: &str, options: ThreadOptions) -> Result<Vec<Round>, Error>;
    /// The manager and its workflows.
    fn get_status(&self) -> Result<ManagerStatus, Error>;
    /// A run has another status.
    #[zbus(signal)]
    fn run_changed(&self, run: &str, status: &str) -> zbus::Result<()>;
}

/// A connection to nerve's manager.
#[derive(Debug, Clone)]
pub struct Client {
    manager: ManagerProxy<'static>,
}

impl Client {
    /// Connects to the bus at `address`, the system bus when there is none; nerve itself may be away.
    ///
    /// # Errors
    /// [`CallError::NoBus`], or [`CallError::Denied`] when the bus is there and not for us.
    pub async fn connect(address: Option<&str>) -> Result<Self, CallError> {
        let builder = match address {
            Some(address) => connection::Builder::address(address),
            None => connection::Builder::system(),
        };
        let connection = builder
            .method_timeout(CALL_TIMEOUT)
            .build()
            .await
            .map_err(|error| match &error {
                zbus::Error::Connection(cause, _)
                    if cause.kind() == io::ErrorKind::PermissionDenied =>
                {
                    CallError::Denied(error.to_string())
                }
                _ => CallError::NoBus(error),
            })?;
        let builder = ManagerProxy::builder(&connection).cache_properties(CacheProperties::No);
        Ok(Self {
            manager: builder.build().await?,
        })
    }

    /// Whether the connection is gone. A client never connects anew by itself.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.manager.inner().connection().is_closed()
    }

    /// Starts a run; returns its id once it is durable.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] the run may exist.
    pub async fn start(
        &self,
        workflow: &str,
        prompt: &str,
        options: StartOptions,
    ) -> Result<RunId, CallError> {
        let id = self.manager.start_run(workflow, prompt, options).await?;
        parse_id(&id)
    }

    /// Asks for the end of the run that `tail` names; returns once the request is durable. Asking twice is harmless.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] the kill may be in force.
    pub async fn kill(&self, tail: &str, reason: &str, grace: Duration) -> Result<(), CallError> {
        let grace_us = u64::try_from(grace.as_micros()).unwrap_or(u64::MAX);
        Ok(self.manager.kill_run(tail, reason, grace_us).await?)
    }

    /// The run that `tail` names.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn run(&self, tail: &str) -> Result<Run, CallError> {
        Ok(self.manager.get_run(tail).await?)
    }

    /// Runs, newest first.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn list(&self, filter: ListFilter) -> Result<Vec<Run>, CallError> {
        Ok(self.manager.list_runs(filter).await?)
    }

    /// The newest `limit` messages of a run, or all, in order; in as many calls as that takes.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn thread(&self, tail: &str, limit: Option<u32>) -> Result<Vec<Round>, CallError> {
        let mut thread: Vec<Round> = Vec::new();
        loop {
            let have = u32::try_from(thread.len()).unwrap_or(u32::MAX);
            let before = thread.first().map(|message| message.round);
            let wanted = limit.map(|limit| limit.saturating_sub(have));
            if wanted == Some(0) || before == Some(0) {
                return Ok(thread);
            }
            let mut older = self
                .manager
                .get_thread(
                    tail,
                    ThreadOptions {
                        limit: wanted,
                        before,
                    },
                )
                .await?;
            let Some(newest) = older.last() else {
                return Ok(thread);
            };
            if before.is_some_and(|before| newest.round >= before) {
                return Err(CallError::Misunderstood(zbus::Error::InvalidReply));
            }
            older.append(&mut thread);
            thread = older;
        }
    }

    /// The manager and its workflows.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn status(&self) -> Result<ManagerStatus, CallError> {
        Ok(self.manager.get_status().await?)
    }

    /// What happens to a run, and to nerve's presence on the bus, from now on.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn changes(&self, run: RunId) -> Result<Changes, CallError> {
        let connection = self.manager.inner().connection();
        let id = run.to_string();
        let run = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender(NAME)
            .path(PATH)
            .interface(INTERFACE)
            .member("RunChanged")
            .arg(0, id.as_str())
            .build()?;
        let owner = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, NAME)
            .build()?;
        Ok(Changes {
            run: stream(connection, run).await?,
            owner: stream(connection, owner).await?,
        })
    }
}

async fn stream(connection: &Connection, rule: MatchRule<'_>) -> zbus::Result<MessageStream> {
    MessageStream::for_match_rule(rule, connection, None).await
}

fn parse_id(text: &str) -> Result<RunId, CallError> {
    text.parse()
        .map_err(|_| CallError::Misunderstood(zbus::Error::InvalidReply))
}

/// What happens to one run.
#[derive(Debug)]
pub struct Changes {
    run: MessageStream,
    owner: MessageStream,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The run has this status.
    Run(String),
    /// nerve has come, or has come back: ask it again.
    Appeared,
    /// nerve is gone.
    Vanished,
    /// The bus is gone: connect again.
    Disconnected,
}

impl Changes {
    /// The next change. Nothing is lost between two calls; across [`Change::Appeared`] and [`Change::Disconnected`]
    /// anything may have happened.
    pub async fn next(&mut self) -> Change {
        loop {
            let change = tokio::select! {
                message = self.run.next() => run_change(message),
                message = self.owner.next() => owner_change(message),
            };
            if let Some(change) = change {
                return change;
            }
        }
    }
}

fn run_change(message: Option<zbus::Result<zbus::Message>>) -> Option<Change> {
    let Some(Ok(message)) = message else {
        return Some(Change::Disconnected);
    };
    let (_, status): (String, String) = message.body().deserialize().ok()?;
    Some(Change::Run(status))
}

fn owner_change(message: Option<zbus::Result<zbus::Message>>) -> Option<Change> {
    let Some(Ok(message)) = message else {
        return Some(Change::Disconnected);
    };
    let (_, _, owner): (String, String, String) = message.body().deserialize().ok()?;
    Some(if owner.is_empty() {
        Change::Vanished
    } else {
        Change::Appeared
    })
}
