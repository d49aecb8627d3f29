//! The driver's hands: what touches systemd and cgroups. Each is a task of its own that reports what came of it, so
//! that no turn waits for anything but the store.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::handle::Handle;
use crate::engine::{Event, Input, Staged};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::tools::Tools;
use crate::model::worker::WorkerEvent;
use crate::model::workflow::{WorkerSettings, Workflow};
use crate::os::cgroup::Cgroup;
use crate::os::journal;
use crate::systemd::{StartError, Systemd, WorkerUnit, next_read};

/// When a killed cgroup is not empty by then, the log says which processes do not die; that of a run is killed again.
const STUBBORN: Duration = Duration::from_secs(5);

/// What the driver needs of the world.
#[derive(Debug)]
pub struct World {
    /// `None` while the bus is away.
    pub systemd: watch::Receiver<Option<Systemd>>,
    /// `nerve-worker`'s path.
    pub worker: PathBuf,
    /// Where workers connect.
    pub socket: PathBuf,
    /// What roles may use.
    pub tools: watch::Receiver<Arc<Tools>>,
}

#[derive(Debug)]
pub(super) struct Hands {
    world: World,
    handle: Handle,
}

impl Hands {
    pub(super) fn new(world: World, handle: Handle) -> Self {
        Self { world, handle }
    }

    /// What a workflow's roles may use.
    pub(super) fn tools(&self, workflow: &Workflow) -> Tools {
        self.world.tools.borrow().of(workflow)
    }

    /// Has systemd start a worker unit.
    pub(super) fn start_unit(&self, workflow: WorkflowName, settings: WorkerSettings) {
        let Some(systemd) = self.world.systemd.borrow().clone() else {
            let handle = self.handle.clone();
            tokio::spawn(async move { handle.report(Input::StartFailed { workflow }).await });
            return;
        };
        let (handle, executable, socket) = (
            self.handle.clone(),
            self.world.worker.clone(),
            self.world.socket.clone(),
        );
        tokio::spawn(async move {
            let unit = WorkerUnit {
                workflow: &workflow,
                executable: &executable,
                socket: &socket,
            };
            let started = systemd.start(&unit, &settings).await;
            crate::os::failpoint!("F08");
            let input = match started {
                Ok(()) => {
                    tracing::info!(workflow = %workflow, "starting {}", workflow.unit());
                    let read = next_read();
                    Input::StartTaken { workflow, read }
                }
                Err(StartError::Exists) => {
                    let name = workflow.clone();
                    let read = next_read();
                    handle.report(Input::StartTaken { workflow, read }).await;
                    return systemd.look_at(name);
                }
                Err(StartError::Refused(error)) => {
                    tracing::error!(workflow = %workflow, error, "systemd refuses {}", workflow.unit());
                    Input::StartRefused { workflow, error }
                }
                Err(StartError::Trouble(error)) => {
                    tracing::warn!(workflow = %workflow, %error, "failed to start {}; trying again", workflow.unit());
                    Input::StartFailed { workflow }
                }
            };
            handle.report(input).await;
        });
    }

    /// Kills what is in a run's cgroup, until that is empty.
    pub(super) fn empty(&self, run: RunId, path: String) {
        let handle = self.handle.clone();
        tokio::spawn(async move {
            let cgroup = Cgroup::at(&path);
            while !emptied(&cgroup, run).await {}
            // The worker does it too; it may be gone.
            let _ = blocking(&cgroup, Cgroup::remove).await;
            handle.report(Input::Emptied { run }).await;
        });
    }

    /// Kills every process of a worker unit, once, and tells when they are gone; what systemd starts then in the same place
    /// is let alone.
    pub(super) fn empty_unit(&self, run: RunId, workflow: &WorkflowName, path: String) {
        let (handle, unit) = (self.handle.clone(), workflow.unit());
        tracing::warn!(run_id = %run, "killing {unit}, which has not ended run {run}");
        tokio::spawn(async move {
            let cgroup = Cgroup::at(&path);
            let watch = async {
                while let Err(error) = cgroup.emptied().await {
                    tracing::error!(run_id = %run, %error, "failed to watch {unit}");
                    tokio::time::sleep(STUBBORN).await;
                }
            };
            let kill = async {
                while let Err(error) = blocking(&cgroup, Cgroup::kill).await {
                    tracing::error!(run_id = %run, %error, "failed to kill {unit}");
                    tokio::time::sleep(STUBBORN).await;
                }
            };
            // It is watched before it is killed: the end of what is in it now must not be missed.
            let mut end = Box::pin(async { tokio::join!(watch, kill) });
            while tokio::time::timeout(STUBBORN, &mut end).await.is_err() {
                tell_of_stubborn(&cgroup, run);
            }
            handle.report(Input::Emptied { run }).await;
        });
    }

    /// Has systemd forget that a worker unit failed, and how often it was started.
    pub(super) fn reset_unit(&self, workflow: WorkflowName) {
        let Some(systemd) = self.world.systemd.borrow().clone() else {
            return;
        };
        tokio::spawn(async move {
            if let Err(error) = systemd.reset(&workflow).await {
                tracing::warn!(workflow = %workflow, %error, "failed to reset {}", workflow.unit());
            }
        });
    }

    /// Has systemd asked how a worker unit is.
    pub(super) fn read_unit(&self, workflow: WorkflowName) {
        // While the bus is away there is nobody to ask; when it is back all units are reported.
        if let Some(systemd) = &*self.world.systemd.borrow() {
            systemd.look_at(workflow);
        }
    }

    /// Kills every process of a worker unit. No D-Bus is needed for it.
    pub(super) fn kill_unit(workflow: &WorkflowName, path: String) {
        let unit = workflow.unit();
        tracing::warn!(workflow = %workflow, "killing {unit}");
        tokio::spawn(async move {
            if let Err(error) = blocking(&Cgroup::at(&path), Cgroup::kill).await {
                tracing::error!(%error, "failed to kill cgroup {path} of {unit}");
            }
        });
    }

    /// Says of each worker that died what it last said itself.
    pub(super) fn tell_of_deaths(events: &[Staged]) {
        for staged in events {
            let Event::Worker(
                workflow,
                WorkerEvent::WorkerDied {
                    invocation, death, ..
                },
            ) = &staged.event
            else {
                continue;
            };
            let (workflow, invocation, death) =
                (workflow.clone(), invocation.clone(), death.clone());
            tokio::spawn(async move {
                let unit = workflow.unit();
                let words = journal::last_words(&invocation, limits::LAST_WORDS_BYTES).await;
                let words = if words.is_empty() {
                    "none".to_owned()
                } else {
                    words
                };
                tracing::error!(workflow = %workflow, invocation, "{unit} died ({death}); its last words: {words}");
            });
        }
    }
}

/// Kills what is in a run's cgroup, and gives it some time; whether that is empty then. A worker that has not heard yet
/// may have begun another round meanwhile.
async fn emptied(cgroup: &Cgroup, run: RunId) -> bool {
    let killed = blocking(cgroup, Cgroup::kill).await;
    crate::os::failpoint!("F23");
    if let Err(error) = killed {
        tracing::error!(run_id = %run, %error, "failed to kill the cgroup of run {run}");
    }
    match tokio::time::timeout(STUBBORN, cgroup.emptied()).await {
        Ok(Ok(())) => cgroup.is_empty().unwrap_or(true),
        Ok(Err(error)) => {
            tracing::error!(run_id = %run, %error, "failed to watch the cgroup of run {run}");
            tokio::time::sleep(STUBBORN).await;
            false
        }
        Err(_) => {
            tell_of_stubborn(cgroup, run);
            false
        }
    }
}

/// Names the processes of a run that is killed.
fn tell_of_stubborn(cgroup: &Cgroup, run: RunId) {
    let pids = cgroup.processes();
    let pids: Vec<_> = pids.iter().map(|pid| pid.as_raw_nonzero().get()).collect();
    tracing::warn!(run_id = %run, "run {run} is killed but processes {pids:?} do not die");
}

/// Does something with a cgroup that takes the longer the more a role made of it.
async fn blocking(cgroup: &Cgroup, action: fn(&Cgroup) -> io::Result<()>) -> io::Result<()> {
    let cgroup = cgroup.clone();
    let done = tokio::task::spawn_blocking(move || action(&cgroup)).await;
    done.unwrap_or_else(|error| Err(io::Error::other(error)))
}
