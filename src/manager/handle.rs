//! What the rest of nerved holds of the manager: ask for a run, kill one, look.
//!
//! Changes go to the driver and are answered when they are durable. Reads go to the store, which knows only what is
//! durable.

use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::outbox::Outbox;
use crate::engine::{Answer, Input, LinkId, WorkflowStatus};
use crate::model::name::RunId;
use crate::model::run::{Accepted, KillRequest};

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
    /// A client wants to look.
    Overview(oneshot::Sender<Overview>),
    /// A worker is ready, and this is the way to it.
    Ready(LinkId, Outbox, Input),
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
    Start { run: RunId, accepted: Accepted },
    Kill { run: RunId, request: KillRequest },
}

/// How everything stands.
#[derive(Debug, Clone)]
pub struct Overview {
    pub running: usize,
    pub queued: usize,
    pub workflows: Vec<WorkflowStatus>,
}

impl Handle {
    pub(super) fn new(inbox: mpsc::Sender<Event>) -> Self {
        Self { inbox }
    }

    /// Starts a run; returns when it is durable.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn start(&self, accepted: Accepted) -> Result<(RunId, Answer), Gone> {
        let run = RunId::from_bits(Uuid::now_v7().as_u128());
        let answer = self.change(Change::Start { run, accepted }).await?;
        Ok((run, answer))
    }

    /// Asks for the end of a run; returns when the request is durable.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn kill(&self, run: RunId, request: KillRequest) -> Result<Answer, Gone> {
        self.change(Change::Kill { run, request }).await
    }

    async fn change(&self, change: Change) -> Result<Answer, Gone> {
        let (reply, answer) = oneshot::channel();
        self.inbox
            .send(Event::Change(change, reply))
            .await
            .map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
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
