//! What a client hears: that a run or a worker changed, that the log has grown, and whether nerve is there.

use std::future::pending;

use futures_util::StreamExt;
use zbus::{Connection, MatchRule, MessageStream};

use super::client::{Client, INTERFACE, NAME, PATH, STORE_INTERFACE};
use super::error::CallError;
use crate::model::name::{RunId, WorkflowName};

impl Client {
    /// What happens to a run or a workflow, and to nerve's presence, from now on.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn changes(&self, subject: &Subject) -> Result<Changes, CallError> {
        let connection = self.connection();
        let (interface, member, name) = match subject {
            Subject::Run(run) => (INTERFACE, "RunChanged", run.to_string()),
            Subject::Workflow(workflow) => (INTERFACE, "WorkflowChanged", workflow.to_string()),
            Subject::Log => (STORE_INTERFACE, "EventsAppended", String::new()),
        };
        let mut signals = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .path(PATH)
            .interface(interface)
            .member(member);
        if !name.is_empty() {
            signals = signals.arg(0, name.as_str());
        }
        if !connection.is_bus() {
            // There is nobody else, and what comes names no sender.
            return Ok(Changes {
                news: stream(connection, signals.build()?).await?,
                owner: None,
            });
        }
        let owner = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, NAME)
            .build()?;
        Ok(Changes {
            news: stream(connection, signals.sender(NAME).build()?).await?,
            owner: Some(stream(connection, owner).await?),
        })
    }
}

async fn stream(connection: &Connection, rule: MatchRule<'_>) -> zbus::Result<MessageStream> {
    MessageStream::for_match_rule(rule, connection, None).await
}

/// Whom one wants to hear of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A run.
    Run(RunId),
    /// A workflow's worker.
    Workflow(WorkflowName),
    /// The log of events.
    Log,
}

/// What happens to one subject.
#[derive(Debug)]
pub struct Changes {
    news: MessageStream,
    /// Who has nerve's name; without a bus in between the connection itself says whether nerve is there.
    owner: Option<MessageStream>,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The run has this status.
    Run(String),
    /// Something about the workflow's worker is new.
    Workflow,
    /// There are newer events.
    Log,
    /// nerve has come, or has come back: ask it again.
    Appeared,
    /// nerve is gone.
    Vanished,
    /// The connection is gone, and with it the bus or nerve: connect again.
    Disconnected,
}

impl Changes {
    /// The next change. Nothing is lost between two calls; across [`Change::Appeared`] and [`Change::Disconnected`]
    /// anything may have happened.
    pub async fn next(&mut self) -> Change {
        loop {
            let change = tokio::select! {
                message = self.news.next() => news(message),
                message = next_of(self.owner.as_mut()) => owner_change(message),
            };
            if let Some(change) = change {
                return change;
            }
        }
    }
}

async fn next_of(stream: Option<&mut MessageStream>) -> Option<zbus::Result<zbus::Message>> {
    match stream {
        Some(stream) => stream.next().await,
        None => pending().await,
    }
}

fn news(message: Option<zbus::Result<zbus::Message>>) -> Option<Change> {
    let Some(Ok(message)) = message else {
        return Some(Change::Disconnected);
    };
    match message.header().member()?.as_str() {
        "WorkflowChanged" => return Some(Change::Workflow),
        "EventsAppended" => return Some(Change::Log),
        _ => {}
    }
    let (_, status): (String, String) = message.body().deserialize().ok()?;
    Some(Change::Run(status))
}

fn owner_change(message: Option<zbus::Result<zbus::Message>>) -> Option<Change> {
    let Some(Ok(message)) = message else {
        return Some(Change::Disconnected);
    };
    let (_, _, owner): (String, String, String) = message.body().deserialize().ok()?;
    Some(if owner.is_empty() {
        Change::Vanished
    } else {
        Change::Appeared
    })
}
