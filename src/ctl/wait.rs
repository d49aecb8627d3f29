//! Waiting for a run's end: through restarts of nerve and of the bus, without ever asking in a loop while nothing
//! changes. Subscribe, ask, wait for a change, ask again.

use std::io;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Settings;
use crate::bus::client::{Change, Changes, Client, Run};
use crate::bus::error::CallError;
use crate::model::limits::RECONNECT;
use crate::model::name::RunId;
use crate::model::status::Status;

/// The run, once it has ended. Connects anew, for ever, when the bus goes away.
pub(super) async fn until_ended(
    settings: &Settings,
    client: Client,
    id: RunId,
) -> Result<Run, CallError> {
    let mut client = Some(client);
    let mut pause = RECONNECT.0;
    loop {
        let connected = match client.take() {
            Some(client) => Ok(client),
            None => Client::connect(settings.bus.as_deref()).await,
        };
        let end = match connected {
            Ok(client) => watch(&client, id, &mut pause).await,
            Err(error) => Err(error),
        };
        match end {
            Ok(Some(run)) => return Ok(run),
            Ok(None) | Err(CallError::NoBus(_) | CallError::Lost(_)) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RECONNECT.1);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Watches on one connection; `None` when that is gone. A connection that worked makes the next pause short again.
async fn watch(client: &Client, id: RunId, pause: &mut Duration) -> Result<Option<Run>, CallError> {
    let mut changes = client.changes(id).await?;
    *pause = RECONNECT.0;
    let tail = id.to_string();
    loop {
        match client.run(&tail).await {
            Ok(run) if run.end().is_some() => return Ok(Some(run)),
            // Away: it will appear again.
            Ok(_) | Err(CallError::NoManager) => {}
            Err(CallError::Lost(_)) if client.is_closed() => return Ok(None),
            // It died or hung while it was asked. This does not spin: the bus says so once for each nerve that dies,
            // and a call that was given up took its time-out.
            Err(CallError::Lost(_)) => continue,
            Err(error) => return Err(error),
        }
        if next_question(&mut changes).await == Change::Disconnected {
            return Ok(None);
        }
    }
}

/// The next change after which the answer can be another one.
async fn next_question(changes: &mut Changes) -> Change {
    loop {
        let change = changes.next().await;
        if calls_for_a_question(&change) {
            return change;
        }
    }
}

fn calls_for_a_question(change: &Change) -> bool {
    match change {
        Change::Run(status) => status.parse().is_ok_and(Status::is_terminal),
        Change::Vanished => false,
        Change::Appeared | Change::Disconnected => true,
    }
}

/// SIGINT and SIGTERM, while one waits for something that goes on without us.
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    /// From now on neither ends the process.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// What `future` gives; `Err` with the exit status 128 + the signal's number when that comes first.
    pub(super) async fn or<T>(&mut self, future: impl Future<Output = T>) -> Result<T, u8> {
        tokio::select! {
            biased;
            output = future => Ok(output),
            _ = self.interrupt.recv() => Err(130),
            _ = self.terminate.recv() => Err(143),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::net::UnixListener;
    use tokio::sync::mpsc;
    use zbus::object_server::SignalEmitter;
    use zbus::{Connection, connection, fdo};

    use crate::bus::client::{INTERFACE, NAME, PATH};

    const ID: &str = "0193000000007000800000003fa9c1d2";

    /// What a bus needs to be one for a client.
    #[derive(Default)]
    struct Bus {
        clients: u32,
        rules: Vec<String>,
    }

    #[zbus::interface(name = "org.freedesktop.DBus")]
    impl Bus {
        fn hello(&mut self) -> String {
            self.clients += 1;
            format!(":1.{}", self.clients)
        }
        fn add_match(&mut self, rule: String) {
            self.rules.push(rule);
        }
        #[expect(
            clippy::needless_pass_by_value,
            reason = "arguments of an interface are owned"
        )]
        fn remove_match(&mut self, rule: String) {
            self.rules.retain(|known| *known != rule);
        }
    }

    /// The next answers to `GetRun`; each question is reported.
    struct Manager {
        answers: Arc<Mutex<Vec<fdo::Result<Run>>>>,
        asked: mpsc::UnboundedSender<()>,
    }

    #[zbus::interface(name = "org.nerve1.Manager")]
    impl Manager {
        fn get_run(&self, run: &str) -> fdo::Result<Run> {
            assert_eq!(run, ID);
            let answer = self.answers.lock().unwrap().remove(0);
            self.asked.send(()).unwrap();
            answer
        }
    }

    /// A fake bus in a socket, with a fake nerve on it.
    struct Fake {
        listener: UnixListener,
        settings: Settings,
        answers: Arc<Mutex<Vec<fdo::Result<Run>>>>,
        ask: mpsc::UnboundedSender<()>,
        asked: mpsc::UnboundedReceiver<()>,
        _directory: tempfile::TempDir,
    }

    impl Fake {
        fn new(answers: Vec<fdo::Result<Run>>) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("bus");
            let bus = Some(format!("unix:path={}", path.display()));
            let (ask, asked) = mpsc::unbounded_channel();
            Self {
                listener: UnixListener::bind(path).unwrap(),
                settings: Settings {
                    bus,
                    ..Settings::default()
                },
                answers: Arc::new(Mutex::new(answers)),
                ask,
                asked,
                _directory: directory,
            }
        }

        async fn accept(&self) -> Connection {
            let (stream, _) = self.listener.accept().await.unwrap();
            let manager = Manager {
                answers: self.answers.clone(),
                asked: self.ask.clone(),
            };
            connection::Builder::unix_stream(stream.into_std().unwrap())
                .server(zbus::Guid::generate())
                .p2p()
                .serve_at("/org/freedesktop/DBus", Bus::default())
                .serve_at(PATH, manager)
                .build()
                .await
                .unwrap()
        }

        async fn question(&mut self) {
            self.asked.recv().await.unwrap();
        }
    }

    fn run(status: &str, exit_code: Option<i32>) -> Run {
        Run {
            run: ID.to_owned(),
            status: status.to_owned(),
            exit_code,
            ..Run::default()
        }
    }

    fn away() -> fdo::Result<Run> {
        Err(fdo::Error::ServiceUnknown(
            "nobody has that name".to_owned(),
        ))
    }

    fn died() -> fdo::Result<Run> {
        Err(fdo::Error::NoReply("it disconnected".to_owned()))
    }

    async fn run_changed(bus: &Connection, status: &str) {
        let emitter = SignalEmitter::new(bus, PATH).unwrap();
        emitter
            .emit(INTERFACE, "RunChanged", &(ID, status))
            .await
            .unwrap();
    }

    async fn owner_changed(bus: &Connection, old: &str, new: &str) {
        let signal = zbus::Message::signal(
            "/org/freedesktop/DBus",
            "org.freedesktop.DBus",
            "NameOwnerChanged",
        )
        .sender("org.freedesktop.DBus")
        .build(&(NAME, old, new))
        .unwrap();
        bus.send(&signal).await.unwrap();
    }

    /// Waits as nervectl does, while `script` plays the bus.
    async fn wait_during(mut fake: Fake, script: impl AsyncFnOnce(&mut Fake)) -> Run {
        let settings = fake.settings.clone();
        let waiting = async {
            let client = settings.connect().await.unwrap();
            until_ended(&settings, client, ID.parse().unwrap())
                .await
                .unwrap()
        };
        let both = async { tokio::join!(waiting, script(&mut fake)) };
        let (run, ()) = tokio::time::timeout(Duration::from_secs(20), both)
            .await
            .expect("a change was missed");
        assert!(
            fake.answers.lock().unwrap().is_empty(),
            "it asked too seldom"
        );
        run
    }

    #[test]
    fn only_what_can_have_changed_the_answer_is_a_question() {
        for status in ["queued", "started", "suspended", "of-a-later-version"] {
            assert!(
                !calls_for_a_question(&Change::Run(status.to_owned())),
                "{status}"
            );
        }
        assert!(!calls_for_a_question(&Change::Vanished));
        for change in [
            Change::Run("dropped".to_owned()),
            Change::Appeared,
            Change::Disconnected,
        ] {
            assert!(calls_for_a_question(&change), "{change:?}");
        }
    }

    #[tokio::test]
    async fn it_asks_once_and_then_when_the_run_has_ended() {
        let fake = Fake::new(vec![Ok(run("queued", None)), Ok(run("failed", Some(2)))]);
        let ended = wait_during(fake, async |fake| {
            let bus = fake.accept().await;
            fake.question().await;
            run_changed(&bus, "started").await;
            run_changed(&bus, "failed").await;
            fake.question().await;
        });
        assert_eq!(ended.await.end(), Some(2));
    }

    #[tokio::test]
    async fn it_survives_a_nerve_that_dies_is_away_and_comes_back() {
        let fake = Fake::new(vec![
            died(),
            away(),
            Ok(run("started", None)),
            Ok(run("completed", Some(0))),
        ]);
        let ended = wait_during(fake, async |fake| {
            let bus = fake.accept().await;
            fake.question().await;
            fake.question().await;
            owner_changed(&bus, ":1.5", "").await;
            owner_changed(&bus, "", ":1.6").await;
            fake.question().await;
            run_changed(&bus, "completed").await;
            fake.question().await;
        });
        assert_eq!(ended.await.end(), Some(0));
    }

    #[tokio::test]
    async fn it_survives_the_bus() {
        let fake = Fake::new(vec![
            Ok(run("started", None)),
            Ok(run("started", None)),
            Ok(run("crashed", Some(255))),
        ]);
        let ended = wait_during(fake, async |fake| {
            let bus = fake.accept().await;
            fake.question().await;
            bus.close().await.unwrap();
            let bus = fake.accept().await;
            fake.question().await;
            run_changed(&bus, "crashed").await;
            fake.question().await;
        });
        assert_eq!(ended.await.end(), Some(255));
    }
}
