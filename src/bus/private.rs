//! Root's own way in: the same interface peer to peer, on a socket that only root can open, as systemctl has one to
//! PID 1. It needs no bus, and works while that is down or hangs.
//!
//! Each connection has a task of its own and waits for nobody else's.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use zbus::connection::Builder;
use zbus::object_server::SignalEmitter;

use super::authorize::Authority;
use super::client::PATH;
use super::news::{Growth, Listeners, signal};
use super::service::Manager;
use super::storage::Storage;
use crate::model::limits::{PRIVATE_CONNECTIONS, PRIVATE_PATIENCE};
use crate::os::peer::Peer;
use crate::os::socket;

/// When there are no descriptors left, some may be closed meanwhile.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// Serves the interface on the private socket.
#[derive(Debug)]
pub struct Private {
    manager: Manager,
    /// Where what is to be signalled is heard.
    listeners: Listeners,
    patience: Duration,
}

impl Private {
    /// What answers there.
    #[must_use]
    pub fn new(manager: Manager, listeners: Listeners) -> Self {
        Self {
            manager,
            listeners,
            patience: PRIVATE_PATIENCE,
        }
    }

    /// Serves everybody who connects, for ever.
    pub async fn serve(self, listener: UnixListener) {
        let this = Arc::new(self);
        let places = Arc::new(Semaphore::new(PRIVATE_CONNECTIONS));
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a private connection");
                    sleep(EXHAUSTED).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::warn!("more than {PRIVATE_CONNECTIONS} private connections; closed one");
                continue;
            };
            let this = this.clone();
            tokio::spawn(async move {
                if let Err(error) = this.connection(stream).await {
                    tracing::debug!(%error, "a private connection ended");
                }
                drop(place);
            });
        }
    }

    /// One connection, from its greeting to its end.
    async fn connection(&self, stream: UnixStream) -> zbus::Result<()> {
        let peer = Peer::of(&stream)?;
        let stream = stream.into_std()?;
        // Whatever still hangs on the connection then, a reply that is not read or a call that is not answered: this
        // ends it.
        let _end = socket::ShutDown::at_end(OwnedFd::from(stream.try_clone()?));
        let mut news = self.listeners.listen();
        let mut growth = Growth::from_now(self.manager.store.newest());
        let manager = Manager {
            authority: Arc::new(Authority::of_peer(&peer, self.manager.handle.clone())),
            ..self.manager.clone()
        };
        let storage = Storage(manager.clone());
        let builder = Builder::unix_stream(stream)
            .server(zbus::Guid::generate())
            .p2p()
            .serve_at(PATH, manager)
            .serve_at(PATH, storage);
        let connection = timeout(self.patience, builder.build())
            .await
            .map_err(|_| does_not_read())??;
        let emitter = SignalEmitter::new(&connection, PATH)?;
        loop {
            tokio::select! {
                () = connection.closed() => return Ok(()),
                Some(one) = news.recv() => timeout(self.patience, signal(&emitter, one))
                    .await
                    .map_err(|_| does_not_read())??,
                seq = growth.next() => timeout(self.patience, Storage::events_appended(&emitter, seq))
                    .await
                    .map_err(|_| does_not_read())??,
            }
        }
    }
}

fn does_not_read() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the peer does not go on")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures_util::future::join;
    use tokio::io::AsyncReadExt as _;

    use super::super::client::{Addresses, Change, Client, Subject};
    use super::super::error::{CallError, Error};
    use super::super::service::tests::manager;
    use super::*;
    use crate::manager::handle::News;
    use crate::model::name::{RunId, WorkflowName};
    use crate::model::status::Status;

    /// What serves in a directory, on a socket of its own.
    fn serve(directory: &Path, patience: Duration) -> (Listeners, Addresses) {
        let listeners = Listeners::default();
        let private = Private {
            manager: manager(directory),
            listeners: listeners.clone(),
            patience,
        };
        let path = directory.join("private");
        tokio::spawn(private.serve(socket::listen_private(&path).unwrap()));
        let addresses = Addresses {
            private: Some(path),
            bus: Some("unix:path=/nonexistent".to_owned()),
        };
        (listeners, addresses)
    }

    /// A root's call is answered, and somebody else's is refused: by nerve, either way.
    async fn is_answered(client: &Client) -> bool {
        let is_root = rustix::process::geteuid().is_root();
        match client.run("3fa9").await {
            Err(CallError::Refused(Error::UnknownRun(_))) => is_root,
            Err(CallError::Refused(Error::NotPermitted(_))) => !is_root,
            _ => false,
        }
    }

    #[tokio::test]
    async fn everybody_is_answered_whatever_others_do() {
        let directory = tempfile::tempdir().unwrap();
        let (_, addresses) = serve(directory.path(), PRIVATE_PATIENCE);
        let path = addresses.private.as_deref().unwrap();
        let _says_nothing = UnixStream::connect(path).await.unwrap();
        let idle = Client::connect(&addresses).await.unwrap();
        let client = Client::connect(&addresses).await.unwrap();
        assert!(is_answered(&client).await);
        assert!(is_answered(&idle).await);
    }

    #[tokio::test]
    async fn who_does_not_greet_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let (_, addresses) = serve(directory.path(), Duration::from_millis(1));
        let path = addresses.private.as_deref().unwrap();
        let mut says_nothing = UnixStream::connect(path).await.unwrap();
        assert_eq!(says_nothing.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_and_the_others_stay() {
        let directory = tempfile::tempdir().unwrap();
        let (_, addresses) = serve(directory.path(), PRIVATE_PATIENCE);
        let path = addresses.private.as_deref().unwrap();
        let client = Client::connect(&addresses).await.unwrap();
        let mut others = Vec::new();
        for _ in 1..PRIVATE_CONNECTIONS {
            others.push(UnixStream::connect(path).await.unwrap());
        }
        let mut one_too_many = UnixStream::connect(path).await.unwrap();
        assert_eq!(one_too_many.read(&mut [0]).await.unwrap(), 0);
        assert!(is_answered(&client).await);
    }

    #[tokio::test]
    async fn news_goes_to_everybody_whom_it_concerns() {
        let directory = tempfile::tempdir().unwrap();
        let (listeners, addresses) = serve(directory.path(), PRIVATE_PATIENCE);
        let (sender, news) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(listeners.pass_on(news));
        let (run, other) = (RunId::from_bits(1), RunId::from_bits(2));
        let workflow: WorkflowName = "a".parse().unwrap();
        let mut clients = Vec::new();
        for subject in [Subject::Run(run), Subject::Workflow(workflow.clone())] {
            let client = Client::connect(&addresses).await.unwrap();
            let changes = client.changes(&subject).await.unwrap();
            // An answer says that the connection is served, and so listened for.
            assert!(is_answered(&client).await);
            clients.push((changes, client));
        }
        for one in [
            News::Run(other, Status::Killed),
            News::Run(run, Status::Started),
            News::Workflow("b".parse().unwrap()),
            News::Workflow(workflow),
        ] {
            sender.send(one).unwrap();
        }
        let [(of_run, _), (of_workflow, _)] = &mut clients[..] else {
            panic!("there are two clients");
        };
        let heard = join(of_run.next(), of_workflow.next()).await;
        assert_eq!(heard, (Change::Run("started".to_owned()), Change::Workflow));
    }
}
