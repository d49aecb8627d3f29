//! The client half of `org.nerve1.Manager`: the interface and a [`Client`] whose errors say what a caller can do about
//! them. The same interface is spoken over a bus and over nerved's private socket, where there is nobody in between.
//!
//! No method waits for a run. Who wants its end subscribes ([`Client::changes`]), then asks ([`Client::run`]).

use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::net::UnixStream;
use tokio::time::timeout;
use zbus::proxy::CacheProperties;
use zbus::{Connection, MatchRule, MessageStream, connection};

use super::error::{CallError, Error};
pub use super::words::*;
use crate::model::name::{RunId, WorkflowName};

/// The name on the bus.
pub const NAME: &str = "org.nerve1";
/// The one object.
pub const PATH: &str = "/org/nerve1";
/// Its interface.
pub const INTERFACE: &str = "org.nerve1.Manager";

/// Where nerved listens for root alone, peer to peer.
pub const PRIVATE: &str = "/run/nerve/private";

/// A call that is not answered within this time counts as lost. nerved's watchdog is as long.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// The interface. Flags such as no-autostart are left alone: zbus calls with flags have no time-out.
#[zbus::proxy(
    interface = "org.nerve1.Manager",
    default_service = "org.nerve1",
    default_path = "/org/nerve1"
)]
pub trait Manager {
    /// Starts a run; returns its id once it is durable. When it was dropped at once: its result, and why in words.
    fn start_run(
        &self,
        workflow: &str,
        prompt: &str,
        options: StartOptions,
    ) -> Result<(String, String, String), Error>;
    /// Ends a run; returns once the request is durable.
    fn kill_run(&self, run: &str, reason: &str, grace_usec: u64) -> Result<(), Error>;
    /// Ends a run when its round is done; returns once the request is durable.
    fn abort_run(&self, run: &str, reason: &str) -> Result<(), Error>;
    /// Has a workflow's worker replaced when its runs have ended; after the time-out, `u64::MAX` for none, they are
    /// ended.
    fn drain_workflow(&self, workflow: &str, timeout_usec: u64) -> Result<(), Error>;
    /// Forgets a workflow's deaths, block and stop.
    fn reset_workflow(&self, workflow: &str) -> Result<(), Error>;
    /// Nothing leaves a queue any more.
    fn pause(&self, reason: &str) -> Result<(), Error>;
    /// And no longer.
    fn resume(&self) -> Result<(), Error>;
    /// Takes new definitions; returns what is wrong with those that could not be taken.
    fn reload(&self) -> Result<Vec<String>, Error>;
    /// One run, with everything about it.
    fn get_run(&self, run: &str) -> Result<Run, Error>;
    /// Runs, newest first.
    fn list_runs(&self, filter: ListFilter) -> Result<Vec<Run>, Error>;
    /// The messages of a run, in order.
    fn get_thread(&self, run: &str, options: ThreadOptions) -> Result<Vec<Round>, Error>;
    /// The manager and its workflows.
    fn get_status(&self) -> Result<ManagerStatus, Error>;
    /// A run has another status, or a kill or an abort of it began.
    #[zbus(signal)]
    fn run_changed(&self, run: &str, status: &str) -> zbus::Result<()>;
    /// Something about a workflow's worker has changed.
    #[zbus(signal)]
    fn workflow_changed(&self, workflow: &str) -> zbus::Result<()>;
}

/// Where nerve may be reached.
#[derive(Debug, Clone, Default)]
pub struct Addresses {
    /// nerved's private socket, to be tried first.
    pub private: Option<PathBuf>,
    /// The bus; without an address the system bus.
    pub bus: Option<String>,
}

/// A connection to nerve's manager.
#[derive(Debug, Clone)]
pub struct Client {
    manager: ManagerProxy<'static>,
}

/// A run that was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Its id.
    pub run: RunId,
    /// When it was dropped at once.
    pub dropped: Option<Dropped>,
    /// What whoever started it should know all the same.
    pub warning: Option<String>,
}

/// Why a run was dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dropped {
    /// `queue-full`, `blocked` or `removed`.
    pub result: String,
    /// In words.
    pub detail: String,
}

impl Client {
    /// Connects to nerved's private socket, if there is one to be tried, or else to the bus; there nerve itself may be
    /// away.
    ///
    /// # Errors
    /// [`CallError::NoBus`], or [`CallError::NoManager`] when there is neither a bus nor a nerved at its socket;
    /// [`CallError::Denied`] when the bus is there and not for us; [`CallError::Lost`] when nerved is there and hangs.
    pub async fn connect(addresses: &Addresses) -> Result<Self, CallError> {
        let bus = addresses.bus.as_deref();
        let Some(path) = &addresses.private else {
            return Self::over_bus(bus).await;
        };
        let private = match timeout(CALL_TIMEOUT, peer_to_peer(path)).await {
            Ok(Ok(connection)) => return Self::on(&connection).await,
            Ok(Err(error)) => error,
            // Nor would it answer on the bus.
            Err(_) => return Err(CallError::Lost(timed_out())),
        };
        match Self::over_bus(bus).await {
            Err(CallError::NoBus(_)) if nobody_listens(&private) => Err(CallError::NoManager),
            other => other,
        }
    }

    async fn over_bus(address: Option<&str>) -> Result<Self, CallError> {
        let builder = match address {
            Some(address) => connection::Builder::address(address),
            None => connection::Builder::system(),
        };
        let connection = timeout(CALL_TIMEOUT, builder.method_timeout(CALL_TIMEOUT).build())
            .await
            .unwrap_or_else(|_| Err(timed_out()))
            .map_err(|error| match &error {
                zbus::Error::Connection(cause, _)
                    if cause.kind() == io::ErrorKind::PermissionDenied =>
                {
                    CallError::Denied(error.to_string())
                }
                _ => CallError::NoBus(error),
            })?;
        Self::on(&connection).await
    }

    async fn on(connection: &Connection) -> Result<Self, CallError> {
        let builder = ManagerProxy::builder(connection).cache_properties(CacheProperties::No);
        Ok(Self {
            manager: builder.build().await?,
        })
    }

    /// Whether the connection is gone. A client never connects anew by itself.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.manager.inner().connection().is_closed()
    }

    /// Starts a run; returns once it is durable.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] the run may exist.
    pub async fn start(
        &self,
        workflow: &str,
        prompt: &str,
        options: StartOptions,
    ) -> Result<Started, CallError> {
        let (id, result, detail) = self.manager.start_run(workflow, prompt, options).await?;
        let is_dropped = !result.is_empty();
        let warning = (!is_dropped && !detail.is_empty()).then(|| detail.clone());
        let dropped = is_dropped.then_some(Dropped { result, detail });
        let run = id
            .parse()
            .map_err(|_| CallError::Misunderstood(zbus::Error::InvalidReply))?;
        Ok(Started {
            run,
            dropped,
            warning,
        })
    }

    /// Asks for the end of the run that `tail` names; returns once the request is durable. Asking twice is harmless.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] the kill may be in force.
    pub async fn kill(&self, tail: &str, reason: &str, grace: Duration) -> Result<(), CallError> {
        let grace_us = u64::try_from(grace.as_micros()).unwrap_or(u64::MAX);
        Ok(self.manager.kill_run(tail, reason, grace_us).await?)
    }

    /// Asks for the end of the run that `tail` names when its round is done; returns once the request is durable.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] the abort may be in force.
    pub async fn abort(&self, tail: &str, reason: &str) -> Result<(), CallError> {
        Ok(self.manager.abort_run(tail, reason).await?)
    }

    /// Asks for a new worker of a workflow once the runs of the one that it has have ended; after `timeout` those are
    /// ended. Asking twice is harmless.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn drain(
        &self,
        workflow: &WorkflowName,
        timeout: Option<Duration>,
    ) -> Result<(), CallError> {
        let us = |timeout: Duration| u64::try_from(timeout.as_micros()).unwrap_or(u64::MAX);
        let timeout_us = timeout.map_or(u64::MAX, us);
        let workflow = workflow.as_str();
        Ok(self.manager.drain_workflow(workflow, timeout_us).await?)
    }

    /// Has a workflow's deaths, block and stop forgotten.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn reset(&self, workflow: &WorkflowName) -> Result<(), CallError> {
        Ok(self.manager.reset_workflow(workflow.as_str()).await?)
    }

    /// Lets nothing leave a queue any more.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn pause(&self, reason: &str) -> Result<(), CallError> {
        Ok(self.manager.pause(reason).await?)
    }

    /// Ends the pause.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn resume(&self) -> Result<(), CallError> {
        Ok(self.manager.resume().await?)
    }

    /// Has new definitions taken; what is wrong with those that could not be.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn reload(&self) -> Result<Vec<String>, CallError> {
        Ok(self.manager.reload().await?)
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

    /// What happens to a run or a workflow, and to nerve's presence, from now on.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn changes(&self, subject: &Subject) -> Result<Changes, CallError> {
        let connection = self.manager.inner().connection();
        let (member, name) = match subject {
            Subject::Run(run) => ("RunChanged", run.to_string()),
            Subject::Workflow(workflow) => ("WorkflowChanged", workflow.to_string()),
        };
        let signals = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .path(PATH)
            .interface(INTERFACE)
            .member(member)
            .arg(0, name.as_str());
        if !connection.is_bus() {
            // There is nobody else, and what comes names no sender.
            return Ok(Changes {
                news: stream(connection, signals.build()?).await?,
                owner: None,
            });
        }
        let owner = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, NAME)
            .build()?;
        Ok(Changes {
            news: stream(connection, signals.sender(NAME).build()?).await?,
            owner: Some(stream(connection, owner).await?),
        })
    }
}

/// A connection to nerved alone.
async fn peer_to_peer(path: &Path) -> zbus::Result<Connection> {
    let stream = UnixStream::connect(path).await?.into_std()?;
    let builder = connection::Builder::unix_stream(stream).p2p();
    builder.method_timeout(CALL_TIMEOUT).build().await
}

/// Whether this is what a socket says that nobody has open, or that is not there.
fn nobody_listens(error: &zbus::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error, zbus::Error::InputOutput(cause) if matches!(cause.kind(), ConnectionRefused | NotFound))
}

fn timed_out() -> zbus::Error {
    let seconds = CALL_TIMEOUT.as_secs();
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no greeting within {seconds} s"),
    )
    .into()
}

async fn stream(connection: &Connection, rule: MatchRule<'_>) -> zbus::Result<MessageStream> {
    MessageStream::for_match_rule(rule, connection, None).await
}

/// Whom one wants to hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A run.
    Run(RunId),
    /// A workflow's worker.
    Workflow(WorkflowName),
}

/// What happens to one subject.
#[derive(Debug)]
pub struct Changes {
    news: MessageStream,
    /// Who has nerve's name; without a bus in between the connection itself says whether nerve is there.
    owner: Option<MessageStream>,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The run has this status.
    Run(String),
    /// Something about the workflow's worker is new.
    Workflow,
    /// nerve has come, or has come back: ask it again.
    Appeared,
    /// nerve is gone.
    Vanished,
    /// The connection is gone, and with it the bus or nerve: connect again.
    Disconnected,
}

impl Changes {
    /// The next change. Nothing is lost between two calls; across [`Change::Appeared`] and [`Change::Disconnected`]
    /// anything may have happened.
    pub async fn next(&mut self) -> Change {
        loop {
            let change = tokio::select! {
                message = self.news.next() => news(message),
                message = next_of(self.owner.as_mut()) => owner_change(message),
            };
            if let Some(change) = change {
                return change;
            }
        }
    }
}

async fn next_of(stream: Option<&mut MessageStream>) -> Option<zbus::Result<zbus::Message>> {
    match stream {
        Some(stream) => stream.next().await,
        None => pending().await,
    }
}

fn news(message: Option<zbus::Result<zbus::Message>>) -> Option<Change> {
    let Some(Ok(message)) = message else {
        return Some(Change::Disconnected);
    };
    if message.header().member()?.as_str() == "WorkflowChanged" {
        return Some(Change::Workflow);
    }
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
