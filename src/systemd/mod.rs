//! systemd over D-Bus, and nothing but that: start a worker unit, read it, report its changes.
//!
//! One [`Systemd`] lives as long as its bus connection, and so does the [`Watch`] that reports for it.

mod lives;
mod properties;
mod proxy;
mod reading;
mod watch;

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, fdo};

use crate::engine::{ReadId, Stop, Unit, UnitState};
use crate::model::name::WorkflowName;
use crate::model::workflow::WorkerSettings;

pub use properties::WorkerUnit;
use proxy::{ManagerProxy, PropertiesProxy};
use reading::Properties;
pub use watch::Watch;

const SERVICE: &str = "org.freedesktop.systemd1";
const MANAGER_PATH: &str = "/org/freedesktop/systemd1";
const UNITS: &str = "/org/freedesktop/systemd1/unit";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const UNIT_SERVICE: &str = "org.freedesktop.systemd1.Service";
const JOB: &str = "org.freedesktop.systemd1.Job";
/// What nerved itself runs in.
const NERVE: &str = "nerve.service";
/// As long as other clients wait for an answer: systemd may be busy, but it may also hang.
const PATIENCE: Duration = Duration::from_secs(25);

/// Why a worker unit was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// systemd does not want it; its words.
    #[error("{0}")]
    Refused(String),
    /// There is such a unit, ours or not; the caller has it reported.
    #[error("there is such a unit already")]
    Exists,
    /// Not now, or whether it was started is unknown: the bus or systemd is in trouble, or going down.
    #[error("systemd or the bus is in trouble")]
    Trouble(#[from] zbus::Error),
}

/// Who a worker unit's main process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// When systemd was asked.
    pub read: ReadId,
    pub main_pid: u32,
    /// 32 hex digits.
    pub invocation: String,
    /// The unit's cgroup below the cgroup root.
    pub cgroup: String,
    /// The digest of the settings that it was started with.
    pub settings: Option<String>,
}

/// A number for a question that is about to be put to systemd. On one connection answers are as old as their questions.
pub fn next_read() -> ReadId {
    static READS: AtomicU64 = AtomicU64::new(1);
    READS.fetch_add(1, Ordering::Relaxed)
}

/// systemd, as long as the bus connection lasts.
#[derive(Debug, Clone)]
pub struct Systemd {
    connection: Connection,
    manager: ManagerProxy<'static>,
    requests: mpsc::UnboundedSender<WorkflowName>,
}

/// A worker unit as it was read.
struct Read {
    unit: Unit,
    /// The job that it is being started by, 0 for none; `None` when it will be started again.
    start_job: Option<u32>,
    is_stopped_by_job: bool,
}

impl Systemd {
    /// Begins to listen. The [`Watch`] has to be run at once, and for as long as there is anything to ask.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn connect(connection: &Connection) -> zbus::Result<(Self, Watch)> {
        let (requests, requested) = mpsc::unbounded_channel();
        let systemd = Self {
            connection: connection.clone(),
            manager: ManagerProxy::new(connection).await?,
            requests,
        };
        let watch = Watch::new(systemd.clone(), requested).await?;
        Ok((systemd, watch))
    }

    /// Starts a worker unit; returns when systemd has taken the job.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn start(
        &self,
        unit: &WorkerUnit<'_>,
        settings: &WorkerSettings,
    ) -> Result<(), StartError> {
        let name = unit.workflow.unit();
        // A failed unit keeps its name until it is reset.
        if let Some(unit) = self.properties(&name).await?
            && reading::text(&unit, "ActiveState") == "failed"
            && reading::is_ours(&unit)
        {
            match patiently(self.manager.reset_failed_unit(&name)).await {
                Err(error) if is_trouble(&error) => return Err(StartError::Trouble(error)),
                // Somebody else was faster.
                _ => {}
            }
        }
        let properties = unit.properties(settings);
        let start = self
            .manager
            .start_transient_unit(&name, "fail", &properties, &[]);
        match patiently(start).await {
            Ok(_) => Ok(()),
            Err(error) if is_named(&error, "org.freedesktop.systemd1.UnitExists") => {
                Err(StartError::Exists)
            }
            Err(error) if is_trouble(&error) => Err(StartError::Trouble(error)),
            Err(zbus::Error::MethodError(_, Some(words), _)) => Err(StartError::Refused(words)),
            Err(error) => Err(StartError::Refused(error.to_string())),
        }
    }

    /// Has systemd forget that a worker unit failed, and how often it was started; only if it is ours.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn reset(&self, workflow: &WorkflowName) -> zbus::Result<()> {
        let name = workflow.unit();
        match self.properties(&name).await? {
            Some(unit) if reading::is_ours(&unit) => {
                patiently(self.manager.reset_failed_unit(&name)).await
            }
            _ => Ok(()),
        }
    }

    /// Has the [`Watch`] report a worker unit, whether it changed or not.
    pub fn look_at(&self, workflow: WorkflowName) {
        // Without a watch the connection is at its end, and all is read when there is a new one.
        let _ = self.requests.send(workflow);
    }

    /// Has systemd send signals. Twice does no harm.
    async fn subscribe(&self) -> zbus::Result<()> {
        match patiently(self.manager.subscribe()).await {
            Err(error) if is_named(&error, "org.freedesktop.systemd1.AlreadySubscribed") => Ok(()),
            subscribed => subscribed,
        }
    }

    /// The workflows of all worker units that systemd knows.
    async fn workers(&self) -> zbus::Result<BTreeSet<WorkflowName>> {
        let list = self
            .manager
            .list_units_by_patterns(&[], &["nerve-wf@*.service"]);
        let units = patiently(list).await?;
        let workflows = units.iter().map(|unit| WorkflowName::of_unit(&unit.0));
        Ok(workflows.flatten().collect())
    }

    /// How a worker unit is.
    async fn read(&self, workflow: &WorkflowName) -> zbus::Result<Read> {
        let name = workflow.unit();
        let Some(properties) = self.properties(&name).await? else {
            let unit = self.on_disk(&name).await?;
            return Ok(Read {
                unit,
                start_job: None,
                is_stopped_by_job: false,
            });
        };
        let unit = reading::unit(&name, &properties);
        let is_stopped_by_job = match reading::job(&properties) {
            Some((_, job)) if unit.state == UnitState::Stopping => self.is_stop(job).await?,
            _ => false,
        };
        let start_job = reading::glimpse(&properties).start_job();
        Ok(Read {
            unit,
            start_job,
            is_stopped_by_job,
        })
    }

    /// A unit that is not loaded: absent, unless there is a file of that name. (To load it would only be to see it
    /// unloaded at once, and that is a change to look at.)
    async fn on_disk(&self, name: &str) -> zbus::Result<Unit> {
        match patiently(self.manager.get_unit_file_state(name)).await {
            Ok(state) if state != "transient" => {
                let file = self.file_of(name).await?;
                let why = reading::obstacle_of_file(name, &state, file.as_deref());
                Ok(reading::foreign(why))
            }
            Err(error) if is_trouble(&error) => Err(error),
            _ => Ok(Unit::absent(0)),
        }
    }

    /// Which file makes a unit of this name, or of all names like it.
    async fn file_of(&self, name: &str) -> zbus::Result<Option<String>> {
        let patterns = [name, "nerve-wf@.service"];
        let list = self.manager.list_unit_files_by_patterns(&[], &patterns);
        let mut files = patiently(list).await?;
        files.sort();
        Ok(files.pop().map(|(path, _)| path))
    }

    async fn is_stop(&self, job: OwnedObjectPath) -> zbus::Result<bool> {
        match self.property(job, JOB, "JobType").await {
            Ok(job) => Ok(is_stop(&job)),
            Err(error) if is_trouble(&error) => Err(error),
            // It is done; that it was there, has been heard.
            Err(_) => Ok(false),
        }
    }

    /// Whose wish it is that a worker unit is stopped, to be asked while it is, or soon after. Its worker is stopped
    /// before nerve is, so while nerve has a job to stop, or to restart, it is that.
    async fn stopped_by(&self) -> zbus::Result<Stop> {
        let nerve = patiently(self.manager.list_units_by_patterns(&[], &[NERVE])).await?;
        let is_going = nerve
            .iter()
            .any(|unit| unit.3 == "deactivating" || is_stop(&unit.8));
        let manager = OwnedObjectPath::try_from(MANAGER_PATH)?;
        if is_going || self.property(manager, MANAGER, "SystemState").await? == "stopping" {
            return Ok(Stop::GoingDown);
        }
        Ok(Stop::Operator)
    }

    /// Who a worker unit's main process is; `None` when there is no such unit.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn identity(&self, workflow: &WorkflowName) -> zbus::Result<Option<Identity>> {
        let read = next_read();
        let Some(unit) = self.properties(&workflow.unit()).await? else {
            return Ok(None);
        };
        Ok(Some(Identity {
            read,
            main_pid: reading::get(&unit, "MainPID").unwrap_or_default(),
            invocation: reading::invocation(&unit),
            cgroup: reading::text(&unit, "ControlGroup"),
            settings: reading::settings(&unit),
        }))
    }

    /// All properties of a unit and of its service at one moment; `None` when it is not loaded.
    async fn properties(&self, name: &str) -> zbus::Result<Option<Properties>> {
        let path = match patiently(self.manager.get_unit(name)).await {
            Ok(path) => path,
            Err(error) if is_named(&error, "org.freedesktop.systemd1.NoSuchUnit") => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let properties = PropertiesProxy::builder(&self.connection)
            .path(path)
            .build()
            .await?;
        // Without an interface systemd takes all of them.
        match patiently(properties.get_all("")).await {
            Ok(properties) => Ok(Some(properties)),
            // It went away between two calls.
            Err(zbus::Error::FDO(error)) if matches!(*error, fdo::Error::UnknownObject(_)) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn property(
        &self,
        path: OwnedObjectPath,
        interface: &str,
        name: &str,
    ) -> zbus::Result<String> {
        let properties = PropertiesProxy::builder(&self.connection)
            .path(path)
            .build()
            .await?;
        patiently(properties.get(interface, name)).await?.try_into()
    }
}

/// Waits for an answer, but not for ever.
async fn patiently<T>(call: impl Future<Output = zbus::Result<T>>) -> zbus::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, call).await;
    answer.unwrap_or_else(|_| {
        let error = io::Error::new(io::ErrorKind::TimedOut, "systemd does not answer");
        Err(zbus::Error::InputOutput(Arc::new(error)))
    })
}

/// Whether a job of this type stops the unit.
fn is_stop(job: &str) -> bool {
    matches!(job, "stop" | "restart" | "try-restart")
}

fn is_named(error: &zbus::Error, name: &str) -> bool {
    matches!(error, zbus::Error::MethodError(error, ..) if error.as_str() == name)
}

/// Errors that say nothing about the request: not now, or no answer at all, rather than no.
fn is_trouble(error: &zbus::Error) -> bool {
    use fdo::Error::{
        Disconnected, IOError, LimitsExceeded, NameHasNoOwner, NoMemory, NoReply, NoServer,
        ServiceUnknown, SpawnChildExited, TimedOut, Timeout,
    };
    match error {
        zbus::Error::MethodError(error, ..) => match error.as_str() {
            // The machine goes down, or the slice, or the unit itself.
            "org.freedesktop.systemd1.ShuttingDown"
            | "org.freedesktop.systemd1.TransactionIsDestructive"
            // What systemd met with itself: no space, no memory, too many files.
            | "System.Error.ENOSPC"
            | "System.Error.ENOMEM"
            | "System.Error.EMFILE"
            | "System.Error.ENFILE"
            | "System.Error.EBUSY"
            | "System.Error.EAGAIN" => true,
            // It was not there, and the bus tried to start it.
            name => name.starts_with("org.freedesktop.DBus.Error.Spawn."),
        },
        zbus::Error::FDO(error) => matches!(
            **error,
            Disconnected(_)
                | IOError(_)
                | LimitsExceeded(_)
                | NameHasNoOwner(_)
                | NoMemory(_)
                | NoReply(_)
                | NoServer(_)
                | ServiceUnknown(_)
                | SpawnChildExited(_)
                | TimedOut(_)
                | Timeout(_)
        ),
        _ => true,
    }
}
