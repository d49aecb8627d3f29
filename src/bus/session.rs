//! One connection to the bus, from the handshake to its end: nerve's name, systemd's signals, our own signals.
//!
//! The bus may go away and come back at any time. Nothing that nerve promised hangs on it: while it is away nobody can
//! ask and no unit is started, and all else goes on.

use std::sync::Arc;

use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use zbus::connection::Builder;
use zbus::object_server::SignalEmitter;

use super::authorize::Authority;
use super::client::{NAME, PATH};
use super::news::{Growth, Listeners, signal};
use super::service::Manager;
use super::storage::Storage;
use crate::engine::{Input, UnitState};
use crate::model::limits;
use crate::systemd::Systemd;

/// Keeps nerve on the bus.
#[derive(Debug)]
pub struct Bus {
    /// Without one the system bus.
    pub address: Option<String>,
    pub manager: Manager,
    /// Where everybody finds systemd.
    pub systemd: watch::Sender<Option<Systemd>>,
    /// Where what is to be signalled is heard.
    pub listeners: Listeners,
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
            self.manager.handle.report(Input::BusLost).await;
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
            authority: Arc::new(Authority::on_bus(self.manager.handle.clone())),
            ..self.manager.clone()
        };
        let storage = Storage(manager.clone());
        // Before anybody can ask: who then hears nothing has missed nothing.
        let mut news = self.listeners.listen();
        let mut growth = Growth::from_now(self.manager.store.newest());
        let connection = builder
            .serve_at(PATH, manager)
            .serve_at(PATH, storage)
            .build()
            .await?;
        let (systemd, units) = Systemd::connect(&connection).await?;
        self.systemd.send_replace(Some(systemd));
        // The first report is how all units are, or that nobody can tell.
        let (handle, reported) = (&self.manager.handle, Arc::new(Notify::new()));
        let watch = units.run(|input| {
            let (handle, reported) = (handle.clone(), Arc::clone(&reported));
            async move {
                if let Input::Unit { unit, .. } = &input {
                    crate::os::failpoint!("F09", unit.state == UnitState::Active);
                    crate::os::failpoint!("F19", unit.state == UnitState::Absent);
                }
                handle.report(input).await;
                reported.notify_one();
            }
        });
        let emitter = SignalEmitter::new(&connection, PATH)?;
        let serve = async {
            reported.notified().await;
            connection.request_name(NAME).await?;
            tracing::info!("serving {NAME}");
            served();
            loop {
                tokio::select! {
                    one = news.recv() => match one {
                        Some(one) => signal(&emitter, one).await?,
                        None => return Ok(()),
                    },
                    seq = growth.next() => Storage::events_appended(&emitter, seq).await?,
                }
            }
        };
        tokio::select! {
            () = watch => Ok(()),
            ended = serve => ended,
            () = connection.closed() => Ok(()),
        }
    }
}
