//! systemd over D-Bus, and nothing but that: start a worker unit, read it, hear of its changes.
//!
//! One [`Systemd`] lives as long as its bus connection. Signals are only hints that something changed: what counts is
//! read anew each time (org.freedesktop.systemd1(5)).

mod properties;
mod proxy;

use std::collections::{BTreeMap, HashMap};

use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use zbus::wire::{OwnedObjectPath, OwnedVariant};
use zbus::{Connection, MatchRule, MessageStream, fdo, message};

use crate::engine::{Unit, UnitState};
use crate::model::exit::Exit;
use crate::model::hex::hex;
use crate::model::name::WorkflowName;
use crate::model::workflow::WorkerSettings;

pub use properties::WorkerUnit;
use proxy::{ManagerProxy, PropertiesProxy};

const SERVICE: &str = "org.freedesktop.systemd1";
const UNITS: &str = "/org/freedesktop/systemd1/unit";
const UNIT: &str = "org.freedesktop.systemd1.Unit";
const UNIT_SERVICE: &str = "org.freedesktop.systemd1.Service";
/// Where systemd keeps the files of transient units.
const TRANSIENT: &str = "/run/systemd/transient/";

/// Why a worker unit was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// systemd does not want it; its words.
    #[error("{0}")]
    Refused(String),
    /// There is such a unit; the caller reads how it is.
    #[error("there is such a unit already")]
    Exists,
    /// Whether it was started is unknown: the bus or systemd is in trouble.
    #[error("bus")]
    Bus(#[from] zbus::Error),
}

/// Who a worker unit's main process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub main_pid: u32,
    /// 32 hex digits.
    pub invocation: String,
    /// The unit's cgroup below the cgroup root.
    pub cgroup: String,
}

/// systemd, as long as the bus connection lasts.
#[derive(Debug, Clone)]
pub struct Systemd {
    connection: Connection,
    manager: ManagerProxy<'static>,
}

type Properties = HashMap<String, OwnedVariant>;

impl Systemd {
    /// Begins to listen.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn connect(connection: &Connection) -> zbus::Result<Self> {
        let manager = ManagerProxy::new(connection).await?;
        manager.subscribe().await?;
        Ok(Self {
            connection: connection.clone(),
            manager,
        })
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
        // A failed unit keeps its name until it is reset; a reset also forgets systemd's count of starts.
        if let Some(path) = self.path(&name).await? {
            let unit = self.read(&path, UNIT).await?;
            if text(&unit, "ActiveState") == "failed" && is_ours(&text(&unit, "FragmentPath")) {
                self.manager.reset_failed_unit(&name).await?;
            }
        }
        let started = self
            .manager
            .start_transient_unit(&name, "fail", &unit.properties(settings), &[])
            .await;
        match started {
            Ok(_) => Ok(()),
            Err(zbus::Error::MethodError(error, ..))
                if error.as_str() == "org.freedesktop.systemd1.UnitExists" =>
            {
                match self.obstacle(&name).await? {
                    Some(obstacle) => Err(StartError::Refused(obstacle)),
                    None => Err(StartError::Exists),
                }
            }
            Err(error) if is_trouble(&error) => Err(StartError::Bus(error)),
            Err(zbus::Error::MethodError(_, Some(words), _)) => Err(StartError::Refused(words)),
            Err(error) => Err(StartError::Refused(error.to_string())),
        }
    }

    /// What stands in the way: a unit of this name that is not ours. It is looked at, never touched.
    async fn obstacle(&self, name: &str) -> zbus::Result<Option<String>> {
        // A file on disk is no loaded unit until somebody asks for it.
        let path = self.manager.load_unit(name).await?;
        let unit = self.read(&path, UNIT).await?;
        let file = text(&unit, "FragmentPath");
        Ok(match text(&unit, "LoadState").as_str() {
            "masked" => Some(format!("{name} is masked: systemctl unmask {name}")),
            _ if is_ours(&file) => None,
            _ => Some(format!(
                "{file} stands in the way: nerve makes {name} itself; use a drop-in in {name}.d/ instead"
            )),
        })
    }

    /// How a worker unit is.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn unit(&self, workflow: &WorkflowName) -> zbus::Result<Unit> {
        let absent = Unit {
            state: UnitState::Absent,
            exit: None,
            detail: String::new(),
        };
        let Some(path) = self.path(&workflow.unit()).await? else {
            return Ok(absent);
        };
        let (unit, service) = (
            self.read(&path, UNIT).await?,
            self.read(&path, UNIT_SERVICE).await?,
        );
        let has_job = get::<(u32, OwnedObjectPath)>(&unit, "Job").is_some_and(|(id, _)| id != 0);
        let state = match text(&unit, "ActiveState").as_str() {
            // Somebody else's: to start ours is to be told so.
            _ if !is_ours(&text(&unit, "FragmentPath")) => UnitState::Absent,
            "active" | "reloading" => UnitState::Active,
            "deactivating" => UnitState::Stopping,
            // Between two starts a unit that restarts looks dead for a moment, but has a job.
            "failed" | "inactive" if has_job => UnitState::Starting,
            "failed" => UnitState::Failed,
            "inactive" => UnitState::Absent,
            _ => UnitState::Starting,
        };
        let status = get::<i32>(&service, "ExecMainStatus").unwrap_or_default();
        let exit = match get::<i32>(&service, "ExecMainCode").unwrap_or_default() {
            libc::CLD_EXITED => Some(Exit::Code(status)),
            libc::CLD_KILLED | libc::CLD_DUMPED => Some(Exit::Signal(status)),
            _ => None,
        };
        let how = exit
            .as_ref()
            .map_or_else(|| "not started".to_owned(), ToString::to_string);
        let detail = format!("{}: {} ({how})", workflow.unit(), text(&service, "Result"));
        Ok(Unit {
            state,
            exit,
            detail,
        })
    }

    /// How every worker unit is that systemd knows.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn units(&self) -> zbus::Result<BTreeMap<WorkflowName, Unit>> {
        let mut units = BTreeMap::new();
        for entry in self
            .manager
            .list_units_by_patterns(&[], &["nerve-wf@*.service"])
            .await?
        {
            if let Some(workflow) = WorkflowName::of_unit(&entry.0) {
                let unit = self.unit(&workflow).await?;
                units.insert(workflow, unit);
            }
        }
        Ok(units)
    }

    /// Who a worker unit's main process is; `None` when there is no such unit.
    ///
    /// # Errors
    /// When systemd does not answer.
    pub async fn identity(&self, workflow: &WorkflowName) -> zbus::Result<Option<Identity>> {
        let Some(path) = self.path(&workflow.unit()).await? else {
            return Ok(None);
        };
        let (unit, service) = (
            self.read(&path, UNIT).await?,
            self.read(&path, UNIT_SERVICE).await?,
        );
        let invocation: Vec<u8> = get(&unit, "InvocationID").unwrap_or_default();
        Ok(Some(Identity {
            main_pid: get(&service, "MainPID").unwrap_or_default(),
            invocation: hex(&invocation),
            cgroup: text(&service, "ControlGroup"),
        }))
    }

    /// The workflows whose worker unit may have changed. It ends with the connection.
    ///
    /// # Errors
    /// When the bus does not take the subscription.
    pub async fn changes(&self) -> zbus::Result<mpsc::UnboundedReceiver<WorkflowName>> {
        let signals = || {
            MatchRule::builder()
                .msg_type(message::Type::Signal)
                .sender(SERVICE)
        };
        let changed = signals()
            .path_namespace(UNITS)
            .interface("org.freedesktop.DBus.Properties")
            .member("PropertiesChanged")
            .build()?;
        let removed = signals()
            .interface("org.freedesktop.systemd1.Manager")
            .member("UnitRemoved")
            .build()?;
        let changed = MessageStream::for_match_rule(changed, &self.connection, None).await?;
        let removed = MessageStream::for_match_rule(removed, &self.connection, None).await?;
        let mut signals = futures_util::stream::select(changed, removed);
        let (sender, workflows) = mpsc::unbounded_channel();
        // A task of its own: a stream that is not read holds up all of the connection, answers to calls included.
        tokio::spawn(async move {
            while let Some(Ok(signal)) = signals.next().await {
                if let Some(workflow) = unit_of(&signal)
                    && sender.send(workflow).is_err()
                {
                    return;
                }
            }
        });
        Ok(workflows)
    }

    async fn path(&self, name: &str) -> zbus::Result<Option<OwnedObjectPath>> {
        match self.manager.get_unit(name).await {
            Ok(path) => Ok(Some(path)),
            Err(zbus::Error::MethodError(error, ..))
                if error.as_str() == "org.freedesktop.systemd1.NoSuchUnit" =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn read(&self, path: &OwnedObjectPath, interface: &str) -> zbus::Result<Properties> {
        let properties = PropertiesProxy::builder(&self.connection)
            .path(path.clone())
            .build()
            .await?;
        match properties.get_all(interface).await {
            // It went away between two calls.
            Err(zbus::Error::FDO(error))
                if matches!(
                    *error,
                    fdo::Error::UnknownObject(_) | fdo::Error::UnknownInterface(_)
                ) =>
            {
                Ok(Properties::new())
            }
            all => all,
        }
    }
}

/// The workflow whose worker unit a signal is about.
fn unit_of(signal: &message::Message) -> Option<WorkflowName> {
    let header = signal.header();
    if header.member()?.as_str() == "UnitRemoved" {
        let (unit, _): (String, OwnedObjectPath) = signal.body().deserialize().ok()?;
        return WorkflowName::of_unit(&unit);
    }
    let label = header.path()?.strip_prefix(UNITS)?.strip_prefix('/')?;
    WorkflowName::of_unit(&unescape(label))
}

/// Whether a unit with this file, or none yet, is one that nerve made.
fn is_ours(file: &str) -> bool {
    file.is_empty() || file.starts_with(TRANSIENT)
}

/// Errors that say nothing about the request: the answer is not there, rather than no.
fn is_trouble(error: &zbus::Error) -> bool {
    use fdo::Error::{
        Disconnected, IOError, LimitsExceeded, NameHasNoOwner, NoReply, NoServer, ServiceUnknown,
        TimedOut, Timeout,
    };
    match error {
        zbus::Error::MethodError(..) => false,
        zbus::Error::FDO(error) => matches!(
            **error,
            Disconnected(_)
                | IOError(_)
                | LimitsExceeded(_)
                | NameHasNoOwner(_)
                | NoReply(_)
                | NoServer(_)
                | ServiceUnknown(_)
                | TimedOut(_)
                | Timeout(_)
        ),
        _ => true,
    }
}

fn get<T: TryFrom<OwnedVariant>>(properties: &Properties, name: &str) -> Option<T> {
    properties.get(name)?.clone().try_into().ok()
}

fn text(properties: &Properties, name: &str) -> String {
    get(properties, name).unwrap_or_default()
}

/// The unit name that an object path stands for: `_40` is `@`.
fn unescape(label: &str) -> String {
    let mut parts = label.split('_');
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(code) => name.extend([char::from(code)].into_iter().chain(part.chars().skip(2))),
            None => name.extend(['_'].into_iter().chain(part.chars())),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    #[test]
    fn object_paths_lead_back_to_unit_names() {
        assert_eq!(
            super::unescape("nerve_2dwf_40fix_2dtest_2eservice"),
            "nerve-wf@fix-test.service"
        );
        assert_eq!(super::unescape("a_"), "a_");
    }
}
