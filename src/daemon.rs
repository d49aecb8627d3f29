//! nerved, put together: settings, store, definitions, recovery, the driver, the workers' socket, the bus, READY=1.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::bus::authorize::Authority;
use crate::bus::service::Manager;
use crate::bus::session::Bus;
use crate::config::definition;
use crate::config::diagnostic::Severity;
use crate::config::directory::{self, Trust};
use crate::engine::{Engine, Now, Recovered};
use crate::manager::driver::{Driver, World};
use crate::manager::link;
use crate::model::name::WorkflowName;
use crate::model::workflow::Definition;
use crate::os::{clock, socket};
use crate::store::{self, Store};

/// Where everything is. Nothing else in nerved names a path, a bus or a uid.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The database's directory.
    pub state: PathBuf,
    /// Where workers connect.
    pub socket: PathBuf,
    /// Definitions: the first directory that has a name wins.
    pub workflows: Vec<PathBuf>,
    /// Whose definitions are taken.
    pub trust: Trust,
    /// `nerve-worker`.
    pub worker: PathBuf,
    /// Without one the system bus.
    pub bus: Option<String>,
}

impl Settings {
    /// The settings of the system's nerved. systemd says where the state is; the worker lies beside nerved.
    ///
    /// # Errors
    /// When the path of nerved itself cannot be told.
    pub fn of_system() -> io::Result<Self> {
        let state = std::env::var_os("STATE_DIRECTORY")
            .map_or_else(|| PathBuf::from("/var/lib/nerve"), PathBuf::from);
        Ok(Self {
            state,
            socket: PathBuf::from("/run/nerve/worker.sock"),
            workflows: directory::STANDARD.map(PathBuf::from).to_vec(),
            trust: Trust::RootOwned,
            worker: std::env::current_exe()?.with_file_name("nerve-worker"),
            bus: None,
        })
    }
}

/// Why nerved ends, other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The store cannot be opened, or did not take a turn.
    #[error("failed to keep the state of runs in {}", directory.display())]
    Store {
        /// Where it is.
        directory: PathBuf,
        /// Why.
        source: store::Error,
    },
    /// The workers' socket cannot be had.
    #[error("failed to listen on {}", path.display())]
    Socket {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else of the system.
    #[error("failed to {action}")]
    System {
        /// What it was for.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The store's runs do not add up.
    #[error("failed to recover the open runs: {0}")]
    Recovery(#[from] crate::model::run::Illegal),
}

/// Runs nerved until SIGTERM or SIGINT.
///
/// # Errors
/// [`Error`]; a restart recovers.
pub async fn run(settings: Settings) -> Result<(), Error> {
    let system = |action| move |source| Error::System { action, source };
    let storage = |source| Error::Store {
        directory: settings.state.clone(),
        source,
    };
    let mut terminate = signal(SignalKind::terminate()).map_err(system("handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("handle SIGINT"))?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let mut store = Store::open(&settings.state).map_err(storage)?;
    let (files, engine) = recover(&settings, &mut store)?;
    let store = store::Handle::spawn(store).map_err(system("start the store's thread"))?;
    let listener = socket::listen(&settings.socket).map_err(|source| Error::Socket {
        path: settings.socket.clone(),
        source,
    })?;

    let (systemd_sender, systemd) = watch::channel(None);
    let (changes_sender, changes) = mpsc::unbounded_channel();
    let world = World {
        store: store.clone(),
        systemd: systemd.clone(),
        changes: changes_sender,
        worker: settings.worker.clone(),
        socket: settings.socket.clone(),
    };
    let (running, queued) = engine.counts();
    tracing::info!(
        running,
        queued,
        workflows = files.len(),
        "nerved {} starts",
        env!("CARGO_PKG_VERSION")
    );
    let (driver, handle) = Driver::new(engine, world);
    tokio::spawn(link::serve(listener, systemd.clone(), handle.clone()));
    let manager = Manager {
        handle,
        store,
        systemd,
        files: Arc::new(files),
        started_at: clock::wall_us(),
        authority: Arc::new(Authority::default()),
    };
    let bus = Bus {
        address: settings.bus.clone(),
        manager,
        systemd: systemd_sender,
        changes,
    };
    tokio::spawn(bus.serve(|| {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }));
    let ended = driver.run(stop).await.map_err(storage);
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    ended
}

/// The engine that the store's open runs and the definitions on disk add up to, and where each definition's file is.
fn recover(
    settings: &Settings,
    store: &mut Store,
) -> Result<(BTreeMap<WorkflowName, PathBuf>, Engine), Error> {
    let storage = |source| Error::Store {
        directory: settings.state.clone(),
        source,
    };
    let boot_id = clock::boot_id().map_err(|source| Error::System {
        action: "tell this boot from others",
        source,
    })?;
    let loaded = directory::load(&settings.workflows, settings.trust);
    for diagnostic in &loaded.diagnostics {
        tracing::warn!("{diagnostic}");
    }
    let (mut workflows, mut files) = (BTreeMap::new(), BTreeMap::new());
    for (name, file) in loaded.definitions {
        for diagnostic in &file.parsed.diagnostics {
            match diagnostic.severity {
                Severity::Error => tracing::error!("{diagnostic}"),
                Severity::Warning => tracing::warn!("{diagnostic}"),
            }
        }
        let known = match file.parsed.definition {
            Some(definition) => {
                store
                    .put_definition(&definition, &file.bytes)
                    .map_err(storage)?;
                (Some(Arc::new(definition)), None)
            }
            None => {
                let errors = file
                    .parsed
                    .diagnostics
                    .iter()
                    .filter(|found| found.severity == Severity::Error);
                let fault = errors
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join("\n");
                // The last good one stays in force.
                let last = store.last_definition(&name).map_err(storage)?;
                let last = last.map(|digest| stored(store, &digest, settings));
                (last.transpose()?.flatten(), Some(fault))
            }
        };
        files.insert(name.clone(), file.path);
        workflows.insert(name, known);
    }
    let runs = store.open_runs().map_err(storage)?;
    let mut pins = HashMap::new();
    for started in runs.iter().filter_map(|run| run.started()) {
        if !pins.contains_key(&started.definition)
            && let Some(definition) = stored(store, &started.definition, settings)?
        {
            pins.insert(started.definition.clone(), definition);
        }
    }
    let now = Now {
        wall_us: clock::wall_us(),
        boot_us: clock::boot_us(),
    };
    Ok((
        files,
        Engine::recover(
            Recovered {
                boot_id,
                workflows,
                pinned: pins,
                runs,
            },
            now,
        )?,
    ))
}

/// A definition that the store has. One that this version cannot read any more is said so, and is not there.
fn stored(
    store: &Store,
    digest: &str,
    settings: &Settings,
) -> Result<Option<Arc<Definition>>, Error> {
    let bytes = store.definition(digest).map_err(|source| Error::Store {
        directory: settings.state.clone(),
        source,
    })?;
    let parsed = definition::parse(digest, None, &bytes);
    if parsed.definition.is_none() {
        for diagnostic in &parsed.diagnostics {
            tracing::error!("a stored definition cannot be used: {diagnostic}");
        }
    }
    Ok(parsed.definition.map(Arc::new))
}
