//! The client half of `org.nerve1.Manager`: the interface and a [`Client`] whose errors say what a caller can do about
//! them. The same interface is spoken over a bus and over nerved's private socket, where there is nobody in between.
//!
//! No method waits for a run. Who wants its end subscribes ([`Client::changes`]), then asks ([`Client::run`]).

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;
use zbus::proxy::CacheProperties;
use zbus::{Connection, connection};

pub use super::changes::{Change, Changes, Subject};
use super::error::{CallError, Error};
use super::storage_client::StoreProxy;
pub use super::words::*;
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};

/// The name on the bus.
pub const NAME: &str = "org.nerve1";
/// The one object.
pub const PATH: &str = "/org/nerve1";
/// Its interface.
pub const INTERFACE: &str = "org.nerve1.Manager";
/// Its store's interface.
pub const STORE_INTERFACE: &str = "org.nerve1.Store";

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
        Self::connect_with(addresses, Some(CALL_TIMEOUT)).await
    }

    /// Likewise, for calls that take as long as they take. Only the end of the connection ends one.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_patiently(addresses: &Addresses) -> Result<Self, CallError> {
        Self::connect_with(addresses, None).await
    }

    async fn connect_with(
        addresses: &Addresses,
        patience: Option<Duration>,
    ) -> Result<Self, CallError> {
        let bus = addresses.bus.as_deref();
        let Some(path) = &addresses.private else {
            return Self::over_bus(bus, patience).await;
        };
        let private = match timeout(CALL_TIMEOUT, peer_to_peer(path, patience)).await {
            Ok(Ok(connection)) => return Self::on(&connection).await,
            Ok(Err(error)) => error,
            // Nor would it answer on the bus.
            Err(_) => return Err(CallError::Lost(timed_out())),
        };
        match Self::over_bus(bus, patience).await {
            Err(CallError::NoBus(_)) if nobody_listens(&private) => Err(CallError::NoManager),
            other => other,
        }
    }

    async fn over_bus(
        address: Option<&str>,
        patience: Option<Duration>,
    ) -> Result<Self, CallError> {
        let builder = match address {
            Some(address) => connection::Builder::address(address),
            None => connection::Builder::system(),
        };
        let connection = timeout(CALL_TIMEOUT, patient(builder, patience).build())
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

    pub(super) async fn store(&self) -> Result<StoreProxy<'static>, CallError> {
        let builder = StoreProxy::builder(self.connection());
        Ok(builder
            .cache_properties(CacheProperties::No)
            .build()
            .await?)
    }

    pub(super) fn connection(&self) -> &Connection {
        self.manager.inner().connection()
    }

    /// Whether the connection is gone. A client never connects anew by itself.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.connection().is_closed()
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

    /// Runs, newest first; in as many calls as that takes.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn list(&self, mut filter: ListFilter) -> Result<Vec<Run>, CallError> {
        let mut runs = Vec::new();
        let mut left = filter.limit;
        loop {
            filter.limit = left;
            let mut page = self.manager.list_runs(filter.clone()).await?;
            let count = u32::try_from(page.len()).unwrap_or(u32::MAX);
            left = left.map(|left| left.saturating_sub(count));
            if let Some(last) = page.last() {
                filter.before = Some(last.run.clone());
            }
            runs.append(&mut page);
            if count < limits::LIST_ROWS || left == Some(0) {
                return Ok(runs);
            }
        }
    }

    /// Messages of a run, in order: the newest `limit` of those that the options ask for, or all; in as many calls as
    /// that takes.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn thread(
        &self,
        tail: &str,
        options: &ThreadOptions,
    ) -> Result<Vec<Round>, CallError> {
        let mut thread: Vec<Round> = Vec::new();
        loop {
            let have = u32::try_from(thread.len()).unwrap_or(u32::MAX);
            let first = thread.first().map(|message| message.round);
            let before = first.or(options.before.filter(|before| *before > 0));
            let limit = options.limit.map(|limit| limit.saturating_sub(have));
            if limit == Some(0) && have > 0 || first == Some(0) {
                return Ok(thread);
            }
            let wanted = ThreadOptions {
                limit,
                before,
                after: options.after,
            };
            let mut older = self.manager.get_thread(tail, wanted).await?;
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
}

/// A connection to nerved alone.
async fn peer_to_peer(path: &Path, patience: Option<Duration>) -> zbus::Result<Connection> {
    let stream = UnixStream::connect(path).await?.into_std()?;
    let builder = connection::Builder::unix_stream(stream).p2p();
    patient(builder, patience).build().await
}

/// Calls that are not answered within this time count as lost.
fn patient(
    builder: connection::Builder<'_>,
    patience: Option<Duration>,
) -> connection::Builder<'_> {
    match patience {
        Some(patience) => builder.method_timeout(patience),
        None => builder,
    }
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
