//! What is signalled: every connection that serves the interface listens for itself, from when it says so until it is
//! gone.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use zbus::object_server::SignalEmitter;

use super::service::Manager;
use crate::manager::handle::News;

/// Hands all news to everybody who listens.
#[derive(Debug, Clone, Default)]
pub struct Listeners {
    senders: Arc<Mutex<Vec<mpsc::UnboundedSender<News>>>>,
}

impl Listeners {
    /// From now on all news, until the receiver is dropped.
    #[must_use]
    pub fn listen(&self) -> mpsc::UnboundedReceiver<News> {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        // Where there are no news nobody else would notice who has gone.
        senders.retain(|sender| !sender.is_closed());
        senders.push(sender);
        receiver
    }

    /// Passes on what the manager says, for as long as that lives.
    pub async fn pass_on(self, mut news: mpsc::UnboundedReceiver<News>) {
        while let Some(one) = news.recv().await {
            let mut senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
            senders.retain(|sender| sender.send(one.clone()).is_ok());
        }
    }
}

/// Signals one thing on one connection.
///
/// # Errors
/// When the connection does not take it.
pub(super) async fn signal(emitter: &SignalEmitter<'_>, news: News) -> zbus::Result<()> {
    match news {
        News::Run(run, status) => {
            Manager::run_changed(emitter, &run.to_string(), status.as_str()).await
        }
        News::Workflow(workflow) => Manager::workflow_changed(emitter, workflow.as_str()).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_hears_what_comes_while_he_listens_and_who_has_gone_is_forgotten() {
        let listeners = Listeners::default();
        let (sender, news) = mpsc::unbounded_channel();
        let one = |name: &str| News::Workflow(name.parse().unwrap());
        let mut first = listeners.listen();
        drop(listeners.listen());
        let mut second = listeners.listen();
        assert_eq!(listeners.senders.lock().unwrap().len(), 2);
        drop(listeners.listen());
        sender.send(one("a")).unwrap();
        drop(sender);
        listeners.clone().pass_on(news).await;
        assert_eq!(listeners.senders.lock().unwrap().len(), 2);
        for listener in [&mut first, &mut second] {
            assert_eq!(listener.recv().await, Some(one("a")));
        }
    }
}
