//! Connections of workers. The peer's unit is its identity: a connection is heard when its peer is the main process of
//! the unit of a workflow, in that unit's current invocation. Anybody else is dropped before a byte is read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::BufReader;
use tokio::net::unix::OwnedReadHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use super::handle::{Event, Handle};
use super::outbox::Outbox;
use crate::engine::{Input, LinkId};
use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::model::run::Place;
use crate::os::cgroup::{self, Cgroup};
use crate::os::peer::Peer;
use crate::systemd::{Identity, Systemd};
use crate::worker::protocol::{self, FrameError, ToManager, ToWorker, VERSION};

/// Why a connection is not a worker's.
#[derive(Debug, thiserror::Error)]
enum Stranger {
    #[error("its peer cannot be told: {0}")]
    Unknown(#[from] std::io::Error),
    #[error("it is of {0:?}, which is no worker unit")]
    NoWorker(String),
    #[error("it is of {unit:?}, but process {pid} is not its main process")]
    NotMain { unit: String, pid: u32 },
    #[error("systemd cannot be asked: {0}")]
    Bus(#[from] zbus::Error),
    #[error("nerved is going down")]
    GoingDown,
}

/// Counts connections, by uid.
#[derive(Debug, Clone, Default)]
struct Seats(Arc<Mutex<HashMap<u32, usize>>>);

/// One connection's place; given back when dropped.
#[derive(Debug)]
struct Seat(Seats, u32);

impl Seats {
    fn take(&self, uid: u32) -> Option<Seat> {
        let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = seats.values().sum();
        let of_uid = seats.entry(uid).or_default();
        if all >= limits::CONNECTIONS || *of_uid >= limits::CONNECTIONS_PER_UID {
            return None;
        }
        *of_uid += 1;
        Some(Seat(self.clone(), uid))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_uid) = seats.get_mut(&self.1) {
            *of_uid -= 1;
            if *of_uid == 0 {
                seats.remove(&self.1);
            }
        }
    }
}

/// Keeps strangers from filling the log: one complaint in a while, and how many there were in between.
#[derive(Debug, Clone, Default)]
struct Complaints(Arc<Mutex<(Option<Instant>, u32)>>);

impl Complaints {
    const PAUSE: Duration = Duration::from_secs(1);

    fn admit(&self) -> Option<u32> {
        let mut complaints = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, before) = &mut *complaints;
        if last.is_some_and(|last| last.elapsed() < Self::PAUSE) {
            *before += 1;
            return None;
        }
        *last = Some(Instant::now());
        Some(std::mem::take(before))
    }
}

/// Accepts workers for ever.
pub async fn serve(
    listener: UnixListener,
    systemd: watch::Receiver<Option<Systemd>>,
    handle: Handle,
) {
    let (seats, complaints) = (Seats::default(), Complaints::default());
    let mut next: LinkId = 0;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                next += 1;
                let uid = stream
                    .peer_cred()
                    .map_or(u32::MAX, |credentials| credentials.uid());
                match seats.take(uid) {
                    Some(seat) => {
                        let (systemd, handle) = (systemd.clone(), handle.clone());
                        let complaints = complaints.clone();
                        tokio::spawn(async move {
                            greet(next, stream, systemd, handle, complaints).await;
                            drop(seat);
                        });
                    }
                    None => {
                        if let Some(before) = complaints.admit() {
                            tracing::warn!(uid, before, "dropped a connection: there are too many");
                        }
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "failed to accept a worker");
                // Out of descriptors: to try again at once would only burn time.
                tokio::time::sleep(limits::RECONNECT.0).await;
            }
        }
    }
}

async fn greet(
    link: LinkId,
    stream: UnixStream,
    systemd: watch::Receiver<Option<Systemd>>,
    handle: Handle,
    complaints: Complaints,
) {
    crate::os::failpoint!("F10");
    let (workflow, identity, peer) = match identify(&stream, systemd).await {
        Ok(identified) => identified,
        Err(stranger) => {
            if let Some(before) = complaints.admit() {
                tracing::warn!(before, "dropped a connection: {stranger}");
            }
            return;
        }
    };
    crate::os::failpoint!("F11");
    let place = Place {
        invocation: identity.invocation.clone(),
        cgroup: identity.cgroup.clone(),
    };
    let (descendants, depth) = limits::CGROUPS;
    if let Err(error) = Cgroup::at(&place.cgroup).bound(descendants, depth) {
        tracing::warn!(workflow = %workflow, %error, "failed to bound the worker's cgroups");
    }
    let (read_half, write_half) = stream.into_split();
    let (outbox, closed) = Outbox::open(workflow.clone(), place.clone(), peer, write_half);
    let unit = workflow.unit();
    let ended = tokio::select! {
        ended = converse(link, read_half, outbox, workflow, identity, place, &handle) => ended,
        _ = closed => Ok(()),
    };
    match ended {
        Ok(()) => tracing::debug!(link, "{unit} disconnected"),
        Err(error) => {
            tracing::warn!(link, error = %error, "connection of {unit} ended");
            handle.send(Event::Breach(link, error.to_string())).await;
        }
    }
    handle.report(Input::LinkLost { link }).await;
}

/// Tells whose worker this is. With the bus away it waits: nobody is heard whose unit is not known.
async fn identify(
    stream: &UnixStream,
    mut systemd: watch::Receiver<Option<Systemd>>,
) -> Result<(WorkflowName, Identity, Peer), Stranger> {
    let peer = Peer::of(stream)?;
    let path = cgroup::of_process(peer.pid)?;
    let unit = path
        .rsplit('/')
        .find(|part| part.ends_with(".service"))
        .unwrap_or(&path)
        .to_owned();
    let workflow = WorkflowName::of_unit(&unit).ok_or_else(|| Stranger::NoWorker(unit.clone()))?;
    let systemd = systemd
        .wait_for(Option::is_some)
        .await
        .map_err(|_| Stranger::GoingDown)?
        .clone();
    let identity = match systemd {
        Some(systemd) => systemd.identity(&workflow).await?,
        None => None,
    };
    match identity {
        Some(identity)
            if identity.main_pid == peer.pid
                && is_in(&path, &identity.cgroup)
                && peer.is_alive() =>
        {
            Ok((workflow, identity, peer))
        }
        _ => Err(Stranger::NotMain {
            unit,
            pid: peer.pid,
        }),
    }
}

fn is_in(path: &str, cgroup: &str) -> bool {
    let below = path.strip_prefix(cgroup);
    !cgroup.is_empty() && below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
}

/// Why a conversation ended badly.
#[derive(Debug, thiserror::Error)]
enum Breach {
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("it was not ready within {} s", limits::READY_TIMEOUT.as_secs())]
    Silent,
    #[error("it did not begin with a ready of protocol {VERSION} for its own workflow")]
    NotReady,
    #[error("run {0} cannot end with code {1} and this result")]
    BadEnd(crate::model::name::RunId, u8),
    #[error("round {1} of run {0} is more than a message may be: {2}")]
    TooLarge(crate::model::name::RunId, u32, String),
    #[error("it said ready twice")]
    ReadyTwice,
}

/// What a worker says of an end, as long as what a person says of it may be.
fn shortened(mut detail: String) -> String {
    crate::model::text::shorten(&mut detail, limits::REASON_BYTES);
    detail
}

async fn converse(
    id: LinkId,
    stream: OwnedReadHalf,
    mut outbox: Outbox,
    workflow: WorkflowName,
    identity: Identity,
    place: Place,
    handle: &Handle,
) -> Result<(), Breach> {
    let (mut reader, mut line) = (BufReader::new(stream), Vec::new());
    let complaints = Complaints::default();
    let first = tokio::time::timeout(
        limits::READY_TIMEOUT,
        protocol::read(&mut reader, &mut line),
    )
    .await;
    let held = match first.map_err(|_| Breach::Silent)?? {
        Some(ToManager::Ready {
            protocol: VERSION,
            workflow: named,
            runs,
        }) if named == workflow => runs.into_iter().map(|held| held.run_id).collect(),
        None => return Ok(()),
        Some(_) => {
            outbox.send(&[ToWorker::Error {
                error: Breach::NotReady.to_string(),
            }]);
            return Err(Breach::NotReady);
        }
    };
    let ready = Input::Ready {
        link: id,
        workflow: workflow.clone(),
        place: place.clone(),
        read: identity.read,
        settings: identity.settings,
        held,
    };
    handle.send(Event::Ready(id, outbox, ready)).await;
    while let Some(frame) = protocol::read(&mut reader, &mut line).await? {
        if let ToManager::ThreadWorkflowMessage {
            run_id,
            round,
            message,
        }
        | ToManager::ThreadAttempt {
            run_id,
            round,
            message,
            ..
        } = &frame
            && let Some(excess) = message.excess()
        {
            return Err(Breach::TooLarge(*run_id, *round, excess));
        }
        let input = match frame {
            ToManager::ThreadWorkflowMessage {
                run_id,
                round,
                message,
            } => Input::Message {
                link: id,
                run: run_id,
                round,
                message,
            },
            ToManager::ThreadAttempt {
                run_id,
                round,
                attempt,
                message,
                delay_ms,
            } => {
                let longest = u64::try_from(limits::BACKOFF.as_millis()).unwrap_or(u64::MAX);
                Input::Attempt {
                    link: id,
                    run: run_id,
                    round,
                    attempt,
                    message,
                    delay_us: delay_ms.min(longest) * 1_000,
                }
            }
            ToManager::ThreadRoute {
                run_id,
                round,
                target,
            } => Input::Routed {
                link: id,
                run: run_id,
                round,
                target,
            },
            ToManager::ThreadEvent {
                run_id,
                event_type,
                exit_code,
                result,
                detail,
            } => {
                if !event_type.agrees(exit_code, &result) {
                    return Err(Breach::BadEnd(run_id, exit_code));
                }
                let is_empty = Cgroup::at(&place.of_run(run_id))
                    .is_empty()
                    .unwrap_or(false);
                Input::Ended {
                    link: id,
                    run: run_id,
                    result,
                    detail: detail.map(shortened),
                    is_empty,
                }
            }
            ToManager::Error { error } => {
                if let Some(before) = complaints.admit() {
                    tracing::warn!(workflow = %workflow, before, "worker says: {:.1000}", error.escape_debug().to_string());
                }
                continue;
            }
            ToManager::Ready { .. } => return Err(Breach::ReadyTwice),
        };
        crate::os::failpoint!("F13", matches!(input, Input::Message { .. }));
        crate::os::failpoint!("F16", matches!(input, Input::Ended { .. }));
        handle.report(input).await;
    }
    Ok(())
}
