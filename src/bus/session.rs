//! One connection to the bus, from the handshake to its end: nerve's name, systemd's signals, our own signals.
//!
//! The bus may go away and come back at any time. Nothing that nerve promised hangs on it: while it is away nobody can
//! ask and no unit is started, and all else goes on.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use zbus::connection::Builder;
use zbus::object_server::SignalEmitter;

use super::client::{NAME, PATH};
use super::service::Manager;
use crate::engine::Input;
use crate::manager::handle::Handle;
use crate::model::limits;
use crate::model::name::RunId;
use crate::model::status::Status;
use crate::systemd::Systemd;

/// Keeps nerve on the bus.
#[derive(Debug)]
pub struct Bus {
    /// Without one the system bus.
    pub address: Option<String>,
    pub manager: Manager,
    /// Where everybody finds systemd.
    pub systemd: watch::Sender<Option<Systemd>>,
    /// Runs whose status changed.
    pub changes: mpsc::UnboundedReceiver<(RunId, Status)>,
}

impl Bus {
    /// Connects, serves, and connects again, for ever. `settled` is called once: when nerve is on the bus, or when the
    /// first attempt failed.
    pub async fn serve(mut self, settled: impl FnOnce()) {
        let (first, longest) = limits::RECONNECT;
        let mut settled = Some(settled);
        let mut pause = first;
        loop {
            let mut served = false;
            let ended = self
                .session(|| {
                    served = true;
                    if let Some(settled) = settled.take() {
                        settled();
                    }
                })
                .await;
            self.systemd.send_replace(None);
            let why = ended.err().map_or_else(
                || "the connection ended".to_owned(),
                |error| error.to_string(),
            );
            tracing::warn!("no bus: {why}; trying again");
            if let Some(settled) = settled.take() {
                settled();
            }
            pause = if served {
                first
            } else {
                (pause * 2).min(longest)
            };
            sleep(pause).await;
        }
    }

    async fn session(&mut self, mut served: impl FnMut()) -> zbus::Result<()> {
        let builder = self
            .address
            .as_deref()
            .map_or_else(Builder::system, Builder::address);
        let manager = Manager {
            authority: Arc::default(),
            ..self.manager.clone()
        };
        let connection = builder.serve_at(PATH, manager).build().await?;
        let systemd = Systemd::connect(&connection).await?;
        // Listen first, then read, so that no change falls between.
        let mut changed = systemd.changes().await?;
        let all = systemd.units().await?;
        self.systemd.send_replace(Some(systemd.clone()));
        let handle: &Handle = &self.manager.handle;
        handle.report(Input::Units(all)).await;
        connection.request_name(NAME).await?;
        tracing::info!("serving {NAME}");
        served();
        let emitter = SignalEmitter::new(&connection, PATH)?;
        let watch = async {
            let mut workflows = Vec::new();
            while changed.recv_many(&mut workflows, usize::MAX).await > 0 {
                for workflow in workflows.drain(..).collect::<BTreeSet<_>>() {
                    let unit = systemd.unit(&workflow).await?;
                    tracing::debug!(workflow = %workflow, ?unit, "unit");
                    handle.report(Input::Unit { workflow, unit }).await;
                }
            }
            Ok(())
        };
        let announce = async {
            while let Some((run, status)) = self.changes.recv().await {
                Manager::run_changed(&emitter, &run.to_string(), status.as_str()).await?;
            }
            Ok(())
        };
        tokio::select! {
            ended = watch => ended,
            ended = announce => ended,
            () = connection.closed() => Ok(()),
        }
    }
}
