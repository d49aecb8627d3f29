//! Waiting for a run's end, or a worker's: through restarts of nerve and of the bus, without ever asking in a loop
//! while nothing changes. Subscribe, ask, wait for a change, ask again.
//!
//! On a bus nerve's name comes and goes, and one waits for it. On the private socket the connection ends with nerve,
//! and one connects again, with a pause that grows.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::Settings;
use crate::bus::client::{Change, Changes, Client, Run, Subject};
use crate::bus::error::CallError;
use crate::model::limits::RECONNECT;
use crate::model::name::{RunId, WorkflowName};
use crate::model::status::Status;

/// The run, once it has ended.
pub(super) async fn until_ended(
    settings: &Settings,
    client: Client,
    id: RunId,
) -> Result<Run, CallError> {
    let tail = id.to_string();
    let ask = async |client: &Client| {
        let run = client.run(&tail).await?;
        Ok(run.end().is_some().then_some(run))
    };
    until(settings, client, &Subject::Run(id), ask).await
}

/// Returns once the workflow's worker is not this invocation of it.
pub(super) async fn until_gone(
    settings: &Settings,
    client: Client,
    workflow: &WorkflowName,
    invocation: &str,
) -> Result<(), CallError> {
    let ask = async |client: &Client| {
        let status = client.status().await?;
        let mut all = status.workflows.iter();
        let known = all.find(|known| known.name == workflow.as_str());
        let is_there = known.is_some_and(|known| {
            // As long as systemd cannot be heard nobody knows.
            known.worker == "unknown" || known.invocation.as_deref() == Some(invocation)
        });
        Ok((!is_there).then_some(()))
    };
    let subject = Subject::Workflow(workflow.clone());
    until(settings, client, &subject, ask).await
}

/// What `ask` gives, once it gives something; it is asked again when the answer can have changed. Connects anew, for
/// ever, when the connection goes away.
pub(super) async fn until<T>(
    settings: &Settings,
    client: Client,
    subject: &Subject,
    mut ask: impl AsyncFnMut(&Client) -> Result<Option<T>, CallError>,
) -> Result<T, CallError> {
    let mut client = Some(client);
    let mut pause = RECONNECT.0;
    loop {
        let connected = match client.take() {
            Some(client) => Ok(client),
            None => settings.connect().await,
        };
        let end = match connected {
            Ok(client) => watch(settings, &client, subject, &mut ask, &mut pause).await,
            Err(error) => Err(error),
        };
        match end {
            Ok(Some(end)) => return Ok(end),
            Ok(None) | Err(CallError::NoBus(_) | CallError::NoManager | CallError::Lost(_)) => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RECONNECT.1);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Watches on one connection; `None` when that is gone, or leads to nobody while there may be a better one. A
/// connection that worked makes the next pause short again.
async fn watch<T>(
    settings: &Settings,
    client: &Client,
    subject: &Subject,
    ask: &mut impl AsyncFnMut(&Client) -> Result<Option<T>, CallError>,
    pause: &mut Duration,
) -> Result<Option<T>, CallError> {
    let mut changes = client.changes(subject).await?;
    loop {
        match ask(client).await {
            Ok(Some(end)) => return Ok(Some(end)),
            Ok(None) => *pause = RECONNECT.0,
            // The bus may be the one that nerve will not be on again.
            Err(CallError::NoManager) if settings.addresses.private.is_some() => return Ok(None),
            // Away: it will appear again.
            Err(CallError::NoManager) => *pause = RECONNECT.0,
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
        Change::Workflow | Change::Log | Change::Appeared | Change::Disconnected => true,
    }
}

/// Returns when stdout is a pipe or a terminal that nobody reads any more: then there is nobody to wait for.
pub(super) async fn nobody_reads() {
    let (told, gone) = oneshot::channel();
    // It ends with the process at the latest.
    std::thread::spawn(move || {
        // Whatever else is asked for, an error of the other end is always told.
        let stdout = io::stdout();
        let mut stdout = [PollFd::new(&stdout, PollFlags::empty())];
        while poll(&mut stdout, None) == Err(Errno::INTR) {}
        let _ = told.send(());
    });
    let _ = gone.await;
}

/// SIGINT, SIGTERM and SIGHUP, while one waits for something that goes on without us.
pub(super) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    /// None under nohup, which wants it to mean nothing.
    hang_up: Option<Signal>,
}

impl Interrupts {
    /// From now on none ends the process.
    pub(super) fn new() -> io::Result<Self> {
        let process = std::fs::read_to_string("/proc/self/status")?;
        let hang_up = !ignores_hang_up(&process);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: hang_up.then(|| signal(SignalKind::hangup())).transpose()?,
        })
    }

    /// What `future` gives; `Err` with the exit status 128 + the signal's number when that comes first.
    pub(super) async fn or<T>(&mut self, future: impl Future<Output = T>) -> Result<T, u8> {
        let hung_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            output = future => Ok(output),
            _ = self.interrupt.recv() => Err(130),
            _ = self.terminate.recv() => Err(143),
            _ = hung_up => Err(129),
        }
    }
}

/// Whether a process, by its proc_pid_status(5), was told to ignore SIGHUP.
fn ignores_hang_up(status: &str) -> bool {
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};
    use tokio::net::UnixListener;
    use tokio::sync::mpsc;
    use zbus::object_server::SignalEmitter;
    use zbus::{Connection, connection, fdo};

    use crate::bus::client::{Addresses, INTERFACE, ManagerStatus, NAME, PATH, WorkflowStatus};

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

    /// The next answers, to whatever is asked; each question is reported.
    struct Manager {
        answers: Answers,
        asked: mpsc::UnboundedSender<()>,
    }

    type Answers = Arc<Mutex<Vec<fdo::Result<Answer>>>>;

    #[derive(Debug)]
    enum Answer {
        Run(Box<Run>),
        /// The worker's word and invocation.
        Worker(&'static str, Option<&'static str>),
    }

    impl Manager {
        fn answer(&self) -> fdo::Result<Answer> {
            let answer = self.answers.lock().unwrap().remove(0);
            self.asked.send(()).unwrap();
            answer
        }
    }

    #[zbus::interface(name = "org.nerve1.Manager")]
    impl Manager {
        fn get_run(&self, run: &str) -> fdo::Result<Run> {
            assert_eq!(run, ID);
            match self.answer()? {
                Answer::Run(run) => Ok(*run),
                other @ Answer::Worker(..) => panic!("{other:?} is no run"),
            }
        }

        fn get_status(&self) -> fdo::Result<ManagerStatus> {
            let Answer::Worker(word, invocation) = self.answer()? else {
                panic!("a worker was asked for");
            };
            let worker = WorkflowStatus {
                name: "a".to_owned(),
                worker: word.to_owned(),
                invocation: invocation.map(str::to_owned),
                ..WorkflowStatus::default()
            };
            Ok(ManagerStatus {
                workflows: vec![worker],
                ..ManagerStatus::default()
            })
        }
    }

    /// A fake bus in a socket, with a fake nerve on it, and the place of a private socket.
    struct Fake {
        listener: UnixListener,
        settings: Settings,
        answers: Answers,
        ask: mpsc::UnboundedSender<()>,
        asked: mpsc::UnboundedReceiver<()>,
        directory: tempfile::TempDir,
    }

    impl Fake {
        fn new(answers: Vec<fdo::Result<Answer>>) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("bus");
            let bus = Some(format!("unix:path={}", path.display()));
            let (ask, asked) = mpsc::unbounded_channel();
            Self {
                listener: UnixListener::bind(path).unwrap(),
                settings: Settings {
                    addresses: Addresses { private: None, bus },
                    ..Settings::default()
                },
                answers: Arc::new(Mutex::new(answers)),
                ask,
                asked,
                directory,
            }
        }

        /// One whose nervectl is root's.
        fn with_private(answers: Vec<fdo::Result<Answer>>) -> Self {
            let mut fake = Self::new(answers);
            fake.settings.addresses.private = Some(fake.private());
            fake
        }

        fn private(&self) -> PathBuf {
            self.directory.path().join("private")
        }

        fn manager(&self) -> Manager {
            Manager {
                answers: self.answers.clone(),
                asked: self.ask.clone(),
            }
        }

        async fn accept(&self) -> Connection {
            let (stream, _) = self.listener.accept().await.unwrap();
            connection::Builder::unix_stream(stream.into_std().unwrap())
                .server(zbus::Guid::generate())
                .p2p()
                .serve_at("/org/freedesktop/DBus", Bus::default())
                .serve_at(PATH, self.manager())
                .build()
                .await
                .unwrap()
        }

        async fn accept_private(&self, listener: &UnixListener) -> Connection {
            let (stream, _) = listener.accept().await.unwrap();
            connection::Builder::unix_stream(stream.into_std().unwrap())
                .server(zbus::Guid::generate())
                .p2p()
                .serve_at(PATH, self.manager())
                .build()
                .await
                .unwrap()
        }

        async fn question(&mut self) {
            self.asked.recv().await.unwrap();
        }
    }

    fn run(status: &str, exit_code: Option<i32>) -> Answer {
        Answer::Run(Box::new(Run {
            run: ID.to_owned(),
            status: status.to_owned(),
            exit_code,
            ..Run::default()
        }))
    }

    fn away() -> fdo::Result<Answer> {
        Err(fdo::Error::ServiceUnknown(
            "nobody has that name".to_owned(),
        ))
    }

    fn died() -> fdo::Result<Answer> {
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

    /// Does `wait` as nervectl does, while `script` plays the bus and nerve.
    async fn during<T>(
        mut fake: Fake,
        wait: impl AsyncFnOnce(&Settings, Client) -> Result<T, CallError>,
        script: impl AsyncFnOnce(&mut Fake),
    ) -> T {
        let settings = fake.settings.clone();
        let waiting = async {
            let client = settings.connect().await.unwrap();
            wait(&settings, client).await.unwrap()
        };
        let both = async { tokio::join!(waiting, script(&mut fake)) };
        let (end, ()) = tokio::time::timeout(Duration::from_secs(20), both)
            .await
            .expect("a change was missed");
        assert!(
            fake.answers.lock().unwrap().is_empty(),
            "it asked too seldom"
        );
        end
    }

    async fn wait_during(fake: Fake, script: impl AsyncFnOnce(&mut Fake)) -> Run {
        let wait = async |settings: &Settings, client| {
            until_ended(settings, client, ID.parse().unwrap()).await
        };
        during(fake, wait, script).await
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
            Change::Workflow,
            Change::Log,
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

    #[tokio::test]
    async fn without_a_bus_it_hears_of_the_end_from_nerve_itself() {
        let fake = Fake::with_private(vec![Ok(run("queued", None)), Ok(run("failed", Some(2)))]);
        let private = UnixListener::bind(fake.private()).unwrap();
        let ended = wait_during(fake, async |fake| {
            let nerve = fake.accept_private(&private).await;
            fake.question().await;
            run_changed(&nerve, "started").await;
            run_changed(&nerve, "failed").await;
            fake.question().await;
        });
        assert_eq!(ended.await.end(), Some(2));
    }

    #[tokio::test]
    async fn without_a_bus_it_survives_nerve() {
        let fake = Fake::with_private(vec![
            Ok(run("started", None)),
            Ok(run("started", None)),
            Ok(run("killed", Some(137))),
        ]);
        let private = UnixListener::bind(fake.private()).unwrap();
        let ended = wait_during(fake, async |fake| {
            let nerve = fake.accept_private(&private).await;
            fake.question().await;
            nerve.close().await.unwrap();
            let nerve = fake.accept_private(&private).await;
            fake.question().await;
            run_changed(&nerve, "killed").await;
            fake.question().await;
        });
        assert_eq!(ended.await.end(), Some(137));
    }

    #[tokio::test]
    async fn it_survives_nerve_and_the_bus_in_any_order() {
        let fake = Fake::with_private(vec![
            Ok(run("started", None)),
            away(),
            Ok(run("completed", Some(0))),
        ]);
        let private = UnixListener::bind(fake.private()).unwrap();
        let ended = wait_during(fake, async |fake| {
            let nerve = fake.accept_private(&private).await;
            fake.question().await;
            // Nerve is away: there is only the bus to ask.
            drop(private);
            nerve.close().await.unwrap();
            let bus = fake.accept().await;
            fake.question().await;
            // Nerve comes back, and is never seen on the bus.
            std::fs::remove_file(fake.private()).unwrap();
            let private = UnixListener::bind(fake.private()).unwrap();
            let _nerve = fake.accept_private(&private).await;
            fake.question().await;
            drop(bus);
        });
        assert_eq!(ended.await.end(), Some(0));
    }

    #[tokio::test]
    async fn neither_a_bus_nor_nerve_is_said_to_be_no_nerve() {
        let mut fake = Fake::with_private(vec![]);
        let status = async |fake: &Fake| {
            let error = fake.settings.connect().await.unwrap_err();
            assert_eq!(error.exit_status(), 69);
            error.to_string()
        };
        drop(std::mem::replace(
            &mut fake.listener,
            UnixListener::bind(fake.directory.path().join("other")).unwrap(),
        ));
        assert!(status(&fake).await.contains("nerve is not running"));
        fake.settings.addresses.private = None;
        assert!(status(&fake).await.contains("no system bus"));
    }

    async fn workflow_changed(connection: &Connection) {
        let emitter = SignalEmitter::new(connection, PATH).unwrap();
        let changed = emitter.emit(INTERFACE, "WorkflowChanged", &("a",));
        changed.await.unwrap();
    }

    #[test]
    fn under_nohup_a_hang_up_means_nothing() {
        assert!(ignores_hang_up("SigBlk:\t00\nSigIgn:\t0000000000001001\n"));
        assert!(!ignores_hang_up("SigBlk:\t01\nSigIgn:\t0000000000001000\n"));
    }

    #[tokio::test]
    async fn a_worker_is_gone_when_there_is_none_or_another_one() {
        let wait = async |settings: &Settings, client| {
            until_gone(settings, client, &"a".parse().unwrap(), "old").await
        };
        for (fake, last) in [
            (Fake::new(vec![]), Answer::Worker("absent", None)),
            (
                Fake::with_private(vec![]),
                Answer::Worker("ready", Some("new")),
            ),
        ] {
            fake.answers.lock().unwrap().extend([
                Ok(Answer::Worker("draining", Some("old"))),
                Ok(Answer::Worker("unknown", None)),
                Ok(last),
            ]);
            let private = UnixListener::bind(fake.private()).unwrap();
            let has_private = fake.settings.addresses.private.is_some();
            let gone = during(fake, wait, async |fake| {
                let nerve = if has_private {
                    fake.accept_private(&private).await
                } else {
                    fake.accept().await
                };
                fake.question().await;
                workflow_changed(&nerve).await;
                fake.question().await;
                workflow_changed(&nerve).await;
                fake.question().await;
            });
            gone.await;
        }
    }
}
