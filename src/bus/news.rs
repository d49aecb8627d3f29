//! What is signalled: every connection that serves the interface listens for itself, from when it says so until it is
//! gone.

use std::sync::{Arc, Mutex, PoisonError};

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use zbus::object_server::SignalEmitter;

use super::service::Manager;
use crate::manager::handle::News;

/// That the log has grown is said no more often: who wants to know what is new asks.
const HINTS: Duration = Duration::from_millis(100);

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

/// That the log has grown, at once and then not too often; never that it has not.
#[derive(Debug)]
pub(super) struct Growth {
    newest: watch::Receiver<u64>,
    not_before: Instant,
}

impl Growth {
    /// From now on.
    pub fn from_now(mut newest: watch::Receiver<u64>) -> Self {
        newest.mark_unchanged();
        Self {
            newest,
            not_before: Instant::now(),
        }
    }

    /// The number of the newest event, once it is newer than the last that was said. What is dropped half-way loses
    /// nothing.
    pub async fn next(&mut self) -> u64 {
        sleep_until(self.not_before).await;
        if self.newest.changed().await.is_err() {
            // The store is gone, and nerved with it.
            std::future::pending().await
        }
        self.not_before = Instant::now() + HINTS;
        *self.newest.borrow_and_update()
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

    #[tokio::test(start_paused = true)]
    async fn growth_is_said_at_once_then_rarely_and_the_last_of_it_always() {
        let (sender, newest) = watch::channel(7);
        let mut growth = Growth::from_now(newest);
        let begin = Instant::now();
        sender.send_replace(8);
        assert_eq!((growth.next().await, begin.elapsed()), (8, Duration::ZERO));
        sender.send_replace(9);
        sender.send_replace(10);
        assert_eq!((growth.next().await, begin.elapsed()), (10, HINTS));
        let mut silence = std::pin::pin!(growth.next());
        assert!(tokio::time::timeout(HINTS * 9, &mut silence).await.is_err());
        sender.send_replace(11);
        assert_eq!((silence.await, begin.elapsed()), (11, HINTS * 10));
    }

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
