//! What the rest of nerved holds of the manager: ask for a change, look, tell what happened.
//!
//! Changes go to the driver and are answered when they are durable. Reads go to the store, which knows only what is
//! durable.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::outbox::Outbox;
use crate::engine::{Answer, Input, LinkId, WorkflowStatus};
use crate::model::audit::Audit;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{AbortRequest, Accepted, Caller, KillRequest};
use crate::model::status::Status;
use crate::model::worker::Pause;

/// The driver's inbox holds so many events; who has more to say waits.
pub(super) const INBOX: usize = 1_024;

/// The manager could not answer: it is going down, and whether the change is stored is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nerved is going down")]
pub struct Gone;

/// What reaches the driver.
#[derive(Debug)]
pub(super) enum Event {
    /// A client wants a change.
    Change(Change, oneshot::Sender<Answer>),
    /// Somebody did something that does not go through the engine; answered when it is on record.
    Audit(Audit, oneshot::Sender<()>),
    /// A client wants to look.
    Overview(oneshot::Sender<Overview>),
    /// A worker is ready, and this is the way to it.
    Ready(LinkId, Outbox, Input),
    /// A worker broke the protocol: it is told how, and heard no more.
    Breach(LinkId, String),
    /// Something happened.
    Input(Input),
}

/// A cheap way to the manager.
#[derive(Debug, Clone)]
pub struct Handle {
    inbox: mpsc::Sender<Event>,
}

/// A change that a client asks for.
#[derive(Debug)]
pub enum Change {
    /// A run.
    Start { run: RunId, accepted: Accepted },
    /// The end of a run, now.
    Kill { run: RunId, request: KillRequest },
    /// The end of a run, at the next round boundary.
    Abort { run: RunId, request: AbortRequest },
    /// A new worker for a workflow, once the runs of its worker have ended; after the time-out those are ended.
    Drain {
        workflow: WorkflowName,
        timeout: Option<Duration>,
        by: Caller,
    },
    /// A workflow's deaths, block and stop forgotten.
    Reset { workflow: WorkflowName, by: Caller },
    /// Nothing leaves a queue.
    Pause { reason: Option<String>, by: Caller },
    /// And no longer.
    Resume { by: Caller },
}

/// Something that others want to hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// The run's status changed, or a kill or an abort of it began.
    Run(RunId, Status),
    /// Something about the workflow's worker changed.
    Workflow(WorkflowName),
}

/// How everything stands.
#[derive(Debug, Clone)]
pub struct Overview {
    pub running: usize,
    pub queued: usize,
    /// Most runs at a time over all workflows.
    pub max_active: Option<u32>,
    pub pause: Option<Pause>,
    /// Why nothing begins, when the disk has no room.
    pub scarcity: Option<String>,
    pub workflows: Vec<WorkflowStatus>,
}

impl Handle {
    pub(super) fn new(inbox: mpsc::Sender<Event>) -> Self {
        Self { inbox }
    }

    /// Starts a run; returns when it is durable: [`Answer::Started`], [`Answer::Existing`], or why not.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn start(&self, accepted: Accepted) -> Result<Answer, Gone> {
        let run = RunId::from_bits(Uuid::now_v7().as_u128());
        self.change(Change::Start { run, accepted }).await
    }

    /// Asks for a change; returns when it is durable.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn change(&self, change: Change) -> Result<Answer, Gone> {
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Event::Change(change, reply))
            .await
            .map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    /// Puts something on record that does not go through the engine; returns when that is durable.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn audit(&self, audit: Audit) -> Result<(), Gone> {
        let (reply, answer) = oneshot::channel();
        let sent = self.inbox.send(Event::Audit(audit, reply)).await;
        sent.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    /// The same without waiting, for what must be answered however slow the disk is.
    ///
    /// # Errors
    /// [`Gone`] also when the driver has too much to do; then it is not on record.
    pub fn audit_later(&self, audit: Audit) -> Result<(), Gone> {
        let (reply, _) = oneshot::channel();
        let sent = self.inbox.try_send(Event::Audit(audit, reply));
        sent.map_err(|_| Gone)
    }

    /// How everything stands, as of the last turn.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn overview(&self) -> Result<Overview, Gone> {
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Event::Overview(reply))
            .await
            .map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    /// Tells the driver that something happened.
    pub async fn report(&self, input: Input) {
        // A driver that is gone wants to know nothing.
        let _ = self.inbox.send(Event::Input(input)).await;
    }

    pub(super) async fn send(&self, event: Event) {
        let _ = self.inbox.send(event).await;
    }
}
