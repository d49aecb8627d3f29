//! nerved, put together: settings, store, definitions, recovery, the driver, the workers' socket, the bus, READY=1.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::bus::authorize::Authority;
use crate::bus::client;
use crate::bus::news::Listeners;
use crate::bus::private::Private;
use crate::bus::service::Manager;
use crate::bus::session::Bus;
use crate::bus::upkeep::Upkeep;
use crate::config::directory::{self, Trust};
use crate::config::settings;
use crate::engine::{Engine, Now, Recovered};
use crate::manager::definitions::{self, Definitions, InForce, Keeper, Places};
use crate::manager::driver::Driver;
use crate::manager::handle::Handle;
use crate::manager::hands::World;
use crate::manager::link;
use crate::manager::room::Room;
use crate::os::{clock, log, socket};
use crate::store::{self, Store};

/// Where everything is. Nothing else in nerved names a path, a bus or a uid.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The database's directory.
    pub state: PathBuf,
    /// Where workers connect.
    pub socket: PathBuf,
    /// Where root's nervectl connects, without a bus.
    pub private: PathBuf,
    /// Definitions: the first directory that has a name wins.
    pub workflows: Vec<PathBuf>,
    /// The engine's settings.
    pub engine: settings::Places,
    /// Whose definitions and settings are taken.
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
            private: PathBuf::from(client::PRIVATE),
            workflows: directory::STANDARD.map(PathBuf::from).to_vec(),
            engine: settings::Places::of_system(),
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
    /// The workers' socket, or root's, cannot be had.
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

type Storage<'a> = &'a dyn Fn(store::Error) -> Error;

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
    // Until there is somebody who reads, SIGHUP waits; without a handler it would end nerved.
    let hangup = signal(SignalKind::hangup()).map_err(system("handle SIGHUP"))?;
    crate::os::failpoint!("F26");
    let mut store = Store::open(&settings.state).map_err(storage)?;
    crate::os::failpoint!("F27");
    let places = Places {
        workflows: settings.workflows.clone(),
        settings: settings.engine.clone(),
        trust: settings.trust,
    };
    let (keeper, definitions) = Keeper::load(places, &mut store).map_err(storage)?;
    let engine = recover(&store, keeper.in_force(), &storage)?;
    let log = store.reserve(store::RESERVE).map_err(storage)?;
    let store = store::Handle::spawn(store).map_err(system("start the store's thread"))?;
    let listener = socket::listen(&settings.socket).map_err(|source| Error::Socket {
        path: settings.socket.clone(),
        source,
    })?;
    let private = socket::listen_private(&settings.private).map_err(|source| Error::Socket {
        path: settings.private.clone(),
        source,
    })?;

    let (systemd_sender, systemd) = watch::channel(None);
    let (news_sender, news) = mpsc::unbounded_channel();
    let world = World {
        systemd: systemd.clone(),
        worker: settings.worker.clone(),
        socket: settings.socket.clone(),
        tools: definitions.tools(),
    };
    let (running, queued) = engine.counts();
    let room = Room::new(settings.state.clone(), log);
    tracing::info!(
        running,
        queued,
        workflows = keeper.in_force().workflows.len(),
        "nerved {} starts, with {} MiB put aside for a full disk",
        env!("CARGO_PKG_VERSION"),
        log.reserved >> 20
    );
    let (driver, handle) = Driver::new(engine, store.clone(), room, world, news_sender);
    tokio::spawn(link::serve(listener, systemd.clone(), handle.clone()));
    tokio::spawn(keeper.run(handle.clone(), store.clone()));
    tokio::spawn(reload_on(hangup, definitions.clone(), handle.clone()));
    let manager = Manager {
        authority: Arc::new(Authority::on_bus(handle.clone())),
        handle,
        store,
        systemd,
        definitions,
        upkeep: Upkeep::default(),
        started_at: clock::wall_us(),
    };
    let listeners = Listeners::default();
    tokio::spawn(listeners.clone().pass_on(news));
    tokio::spawn(Private::new(manager.clone(), listeners.clone()).serve(private));
    let bus = Bus {
        address: settings.bus.clone(),
        manager,
        systemd: systemd_sender,
        listeners,
    };
    tokio::spawn(bus.serve(|| {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }));
    let ended = driver.run(stop).await.map_err(storage);
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    ended
}

/// The engine that the store's open runs and what is on disk add up to.
fn recover(store: &Store, on_disk: &InForce, storage: Storage<'_>) -> Result<Engine, Error> {
    let boot_id = clock::boot_id().map_err(|source| Error::System {
        action: "tell this boot from others",
        source,
    })?;
    let storage = |error: store::Error| storage(error.at_start());
    let runs = store.open_runs().map_err(storage)?;
    let mut pins = HashMap::new();
    for started in runs.iter().filter_map(|run| run.started()) {
        if !pins.contains_key(&started.definition)
            && let Some(definition) = on_disk
                .stored(store, &started.definition)
                .map_err(storage)?
        {
            pins.insert(started.definition.clone(), definition);
        }
    }
    let now = Now {
        wall_us: clock::wall_us(),
        boot_us: clock::boot_us(),
    };
    let recovered = Recovered {
        boot_id,
        workflows: on_disk.workflows.clone(),
        max_active: on_disk.max_active,
        workers: store.workers().map_err(storage)?,
        pause: store.pause().map_err(storage)?,
        pinned: pins,
        runs,
    };
    Ok(Engine::recover(recovered, now)?)
}

/// Takes new definitions whenever systemd, or somebody, sends SIGHUP.
async fn reload_on(mut hangup: Signal, definitions: Definitions, manager: Handle) {
    while hangup.recv().await.is_some() {
        let reloading = NotifyState::monotonic_usec_now().map(|now| [NotifyState::Reloading, now]);
        if let Ok(reloading) = reloading {
            let _ = sd_notify::notify(&reloading);
        }
        // What is wrong is in the log.
        definitions.reload().await;
        // Who is going down says so elsewhere.
        let _ = manager.audit(definitions::reloaded(None)).await;
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }
}

/// Checks a store that no nerved has open, and says what it finds.
#[must_use]
pub fn check(directory: &Path) -> ExitCode {
    /// Exit status when something is wrong with the store.
    const FAULTY: u8 = 65;
    match store::check::offline::offline(directory, &std::env::temp_dir()) {
        Ok(report) => {
            let said = io::stdout().write_all(report.to_string().as_bytes());
            match said {
                Ok(()) if report.is_clean() => ExitCode::SUCCESS,
                Ok(()) => ExitCode::from(FAULTY),
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            tracing::error!(
                "failed to check {}: {}",
                directory.display(),
                log::whole(&error)
            );
            ExitCode::FAILURE
        }
    }
}
