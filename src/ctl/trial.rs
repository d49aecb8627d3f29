//! `nervectl workflow try`: one run of a definition that need not be installed, here and now, as who asks for it, without
//! nerve. A worker executes it as ever, in a cgroup below one's own; this side of its socket says what nerved would.
//! Nothing is kept.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use super::cli::Try;
use super::paper::Paper;
use super::start::interrupts;
use super::text::{line, span};
use super::wait::Interrupts;
use super::{BROKEN, Failure, Settings, input, note, now, print, render, validate};
use crate::bus::client::Round;
use crate::config::directory::{self, Found, Trust};
use crate::config::{definition, settings};
use crate::model::limits;
use crate::model::message::Message;
use crate::model::name::RunId;
use crate::model::workflow::Definition;
use crate::os::cgroup::{self, Cgroup};
use crate::worker::own;
use crate::worker::protocol::{self, Assignment, FrameError, ToManager, ToWorker, VERSION};

/// Set for who has been given a cgroup of his own already.
const IN_SCOPE: &str = "NERVE_TRY_SCOPE";
/// Where a worker finds its credentials.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";
/// Where units have theirs from, and root's workers here.
const CREDSTORE: &str = "/etc/credstore";

/// Executes a definition to the end of one run, shows its rounds, and exits with the run's exit code.
pub(super) async fn try_out(settings: &Settings, arguments: &Try) -> Result<u8, Failure> {
    let run_id = RunId::from_bits(Uuid::now_v7().as_u128());
    // Nobody can tell it before it is there, and have it first.
    let place = format!("nerve-try-{}", run_id.short());
    // Before anything is read: who does it all again in a scope would find nothing more on stdin.
    let own = own_cgroup(&place)?;
    let (name, bytes) = input::definition(&arguments.file)?;
    let prompt = input::prompt(&arguments.prompt)?;
    let stem = arguments
        .file
        .file_stem()
        .map(|stem| stem.to_string_lossy());
    let parsed = definition::parse(&name, stem.as_deref().filter(|stem| *stem != "-"), &bytes);
    let is_right = validate::tell([(parsed.diagnostics, bytes.as_slice())]);
    let Some(definition) = parsed.definition.filter(|_| is_right) else {
        return Ok(BROKEN);
    };
    let mut interrupts = interrupts()?;
    let place = Place::new(own, &place)?;
    let known = known(settings, &arguments.file);
    let max_rounds = arguments
        .max_rounds
        .or(definition.workflow.max_rounds)
        .or(known.max_rounds);
    let timeout = definition.workflow.timeout;
    let run = Assignment {
        run_id,
        attempt: 1,
        prompt,
        max_rounds: max_rounds.unwrap_or(limits::DEFAULT_MAX_ROUNDS),
        dry_run: arguments.dry_run,
        trigger: json!({"type": "try"}),
        created_at: now(),
        timeout_ms: timeout.map(millis),
        workflow: definition.source.clone(),
        tools: known.tools.of(&definition.workflow),
        failed: None,
        route: None,
    };
    let ended = place.execute(&definition, run, &mut interrupts).await;
    place.clear().await;
    let (code, result) = ended?;
    if code != 0 {
        note(&format!("the run ended {code}: {}", line(&result)));
    }
    Ok(code)
}

/// nerve's settings, and those of the workspace that the file is in: what it may use once it is installed.
fn known(settings: &Settings, file: &Path) -> settings::Settings {
    let known = settings::load(&settings.engine, Trust::Anyone).settings;
    let file = std::path::absolute(file).unwrap_or_default();
    let folder = file.parent().filter(|folder| folder.ends_with("workflows"));
    let own = folder.map(|folder| folder.with_file_name("nerve.yaml"));
    match own.map(|own| {
        (
            own.display().to_string(),
            directory::read(&own, Trust::Anyone),
        )
    }) {
        Some((path, Found::Bytes(bytes))) => {
            let (own, faults) = settings::parse(&path, &bytes);
            validate::tell([(faults, bytes.as_slice())]);
            known.beaten_by(own.unwrap_or_default())
        }
        _ => known,
    }
}

/// Reads what the worker says until the connection ends.
async fn read(stream: OwnedReadHalf, frames: mpsc::Sender<Result<ToManager, FrameError>>) {
    let (mut reader, mut line) = (BufReader::new(stream), Vec::new());
    while let Some(frame) = protocol::read(&mut reader, &mut line).await.transpose() {
        let is_last = frame.is_err();
        if frames.send(frame).await.is_err() || is_last {
            return;
        }
    }
}

/// What nerved would say to the worker, and be told.
struct Conversation {
    frames: mpsc::Receiver<Result<ToManager, FrameError>>,
    writer: OwnedWriteHalf,
    assignment: Assignment,
    /// When the last round was done.
    since: u64,
}

impl Conversation {
    fn new(stream: UnixStream, assignment: Assignment) -> Self {
        let (reader, writer) = stream.into_split();
        let (frame, frames) = mpsc::channel(1);
        tokio::spawn(read(reader, frame));
        Self {
            frames,
            writer,
            assignment,
            since: now(),
        }
    }

    /// The exit code and the result of the run. An interrupt kills it: the worker does, or, when that does not in time or
    /// there is one more interrupt, we do.
    async fn hold(
        mut self,
        interrupts: &mut Interrupts,
        cgroup: &Cgroup,
    ) -> Result<(u8, String), Failure> {
        let run_id = self.assignment.run_id;
        let kill = || {
            cgroup.kill().map_err(cannot)?;
            Ok((137, "killed".to_owned()))
        };
        let mut confirmed_by = None;
        loop {
            let patience = confirmed_by.map_or(Duration::MAX, |by: Instant| by - Instant::now());
            if patience.is_zero() {
                return kill();
            }
            let next = timeout(patience, self.frames.recv());
            let frame = match interrupts.or(next).await {
                Ok(Ok(Some(frame))) => frame.map_err(|error| refused(&error.to_string()))?,
                Ok(Ok(None)) => {
                    let text = "the worker went down under the run".to_owned();
                    return Err(Failure::Internal(text));
                }
                Err(_) if confirmed_by.is_none() => {
                    let grace = limits::DEFAULT_GRACE;
                    confirmed_by = Some(Instant::now() + grace + limits::KILL_CONFIRM);
                    let grace_ms = millis(grace);
                    self.say(&ToWorker::KillThread { run_id, grace_ms }).await;
                    continue;
                }
                Ok(Err(_)) | Err(_) => return kill(),
            };
            let answer = match frame {
                ToManager::Ready { workflow, .. } => {
                    self.say(&ToWorker::Welcome {
                        protocol: VERSION,
                        workflow,
                    })
                    .await;
                    // It can be longer than what fits into the socket of a worker that does not read.
                    let start = ToWorker::StartThread(self.assignment.clone());
                    if interrupts.or(self.say(&start)).await.is_err() {
                        return kill();
                    }
                    continue;
                }
                ToManager::ThreadWorkflowMessage { round, message, .. } => {
                    let most = self.assignment.max_rounds;
                    if round > most {
                        return Err(refused(&format!(
                            "round {round} of a run that may have {most}; \
                             let it end the run with max-rounds, or raise max_rounds"
                        )));
                    }
                    self.show(round, None, message)?;
                    ToWorker::MessageAck { run_id, round }
                }
                ToManager::ThreadAttempt {
                    round,
                    attempt,
                    message,
                    ..
                } => {
                    self.show(round, Some(attempt), message)?;
                    ToWorker::AttemptAck {
                        run_id,
                        round,
                        attempt,
                    }
                }
                ToManager::ThreadRoute { round, .. } => ToWorker::RouteAck { run_id, round },
                ToManager::ThreadEvent {
                    event_type,
                    exit_code,
                    result,
                    detail,
                    ..
                } => {
                    if !event_type.agrees(exit_code, &result) {
                        let (said, (status, code)) = (json!(event_type), result.end());
                        return Err(refused(&format!(
                            "a thread-event of {said} with exitCode {exit_code} and the result \"{result}\"; \
                             that result takes \"{status}\" with {code}"
                        )));
                    }
                    self.say(&ToWorker::EventAck { run_id }).await;
                    self.say(&ToWorker::Shutdown { timeout_ms: 0 }).await;
                    let detail = detail.map(|detail| format!(", {detail}"));
                    let result = format!("{result}{}", detail.unwrap_or_default());
                    return Ok((exit_code, result));
                }
                ToManager::Error { error } => {
                    note(&line(&error));
                    continue;
                }
            };
            self.say(&answer).await;
        }
    }

    async fn say(&mut self, frame: &ToWorker) {
        let mut bytes = Vec::new();
        protocol::append(&mut bytes, frame);
        // A connection that broke ends by its reader, which may have more to hand on.
        let _ = self.writer.write_all(&bytes).await;
    }

    /// A round, or an attempt of one that failed.
    fn show(&mut self, round: u32, attempt: Option<u32>, said: Message) -> Result<(), Failure> {
        if let Some(excess) = said.excess() {
            return Err(refused(&format!(
                "round {round} that is more than a message may be: {excess}"
            )));
        }
        let round = Round {
            round,
            role: said.role,
            content: said.content,
            meta: Value::Object(said.meta).to_string(),
            timestamp: now(),
        };
        let took = span(round.timestamp.saturating_sub(self.since));
        self.since = round.timestamp;
        let text = render::thread(&[round], |_| took.clone(), Paper::stdout());
        let text = match attempt {
            Some(attempt) => text.replacen("---", &format!("--- attempt {attempt} failed:"), 1),
            None => text,
        };
        print(&format!("{text}\n"))
    }
}

/// Where the worker lives: a cgroup, and a directory.
struct Place {
    directory: PathBuf,
    /// The cgroup that this process is in, and one below it.
    own: Cgroup,
    cgroup: Cgroup,
}

impl Place {
    fn new(own: Cgroup, name: &str) -> Result<Self, Failure> {
        let cgroup = own.child(name);
        cgroup.create().map_err(cannot)?;
        let directory = env::temp_dir().join(name);
        if let Err(error) = DirBuilder::new().mode(0o700).create(&directory) {
            // It is empty; that it stays would harm nobody.
            let _ = cgroup.remove();
            let directory = directory.display().to_string();
            return Err(Failure::Internal(format!(
                "cannot make {}: {error}; set TMPDIR to a directory that you may write to",
                line(&directory)
            )));
        }
        Ok(Self {
            directory,
            own,
            cgroup,
        })
    }

    /// The exit code and the result of a run.
    async fn execute(
        &self,
        definition: &Definition,
        run: Assignment,
        interrupts: &mut Interrupts,
    ) -> Result<(u8, String), Failure> {
        let socket = self.directory.join("worker.sock");
        let listener = UnixListener::bind(&socket).map_err(cannot)?;
        let mut worker = self.start_worker(definition, &socket)?;
        let mut exited = tokio::task::spawn_blocking(move || worker.wait());
        let connected = async {
            tokio::select! {
                accepted = listener.accept() => accepted.map(|(stream, _)| stream),
                exit = &mut exited => Err(io::Error::other(format!("its worker does not start: {exit:?}"))),
            }
        };
        let stream = match interrupts.or(connected).await {
            Ok(stream) => stream.map_err(cannot)?,
            Err(status) => {
                let text = "nothing was executed".to_owned();
                return Err(Failure::Interrupted { status, text });
            }
        };
        let conversation = Conversation::new(stream, run);
        let end = conversation.hold(interrupts, &self.cgroup).await?;
        // It has been told to go, or killed; what does not go is killed then.
        let _ = interrupts.or(timeout(limits::SHUTDOWN, exited)).await;
        Ok(end)
    }

    /// Ends what is left in the cgroup, and removes it and the directory. What fails here harms nobody.
    async fn clear(self) {
        let _ = self.cgroup.kill();
        let _ = timeout(limits::KILL_CONFIRM, self.cgroup.emptied()).await;
        let _ = self.cgroup.remove();
        let _ = fs::remove_dir_all(&self.directory);
    }

    /// Starts it in its cgroup: it is born where its parent is.
    fn start_worker(&self, definition: &Definition, socket: &Path) -> Result<Child, Failure> {
        let mut command = Command::new(worker_path()?);
        command
            .arg(definition.workflow.name.as_str())
            .env("NERVE_SOCKET", socket)
            .env("NERVE_WORKFLOW", definition.workflow.name.as_str())
            .env("STATE_DIRECTORY", &self.directory)
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Ctrl-C is for us: we kill the run, and not only its worker.
            .process_group(0);
        let is_root = rustix::process::geteuid().is_root();
        if is_root && env::var_os(CREDENTIALS).is_none() && Path::new(CREDSTORE).is_dir() {
            command.env(CREDENTIALS, CREDSTORE);
        }
        if let [program, ..] = definition.workflow.worker.exec.as_slice() {
            let exec = json!(definition.workflow.worker.exec).to_string();
            command.env(own::EXEC, exec);
            note(&format!("its own worker, {}, executes it", line(program)));
        }
        for variable in &definition.workflow.worker.environment {
            if let Some((name, value)) = variable.split_once('=') {
                command.env(name, value);
            }
        }
        let id = std::process::id();
        self.cgroup.adopt(id).map_err(cannot)?;
        let child = command.spawn();
        self.own.adopt(id).map_err(cannot)?;
        child.map_err(cannot)
    }
}

/// The cgroup that this process is in, once there may be one of this name below it.
fn own_cgroup(name: &str) -> Result<Cgroup, Failure> {
    let own = Cgroup::at(&cgroup::of_process(std::process::id()).map_err(cannot)?);
    let probe = own.child(name);
    match probe.create().and_then(|()| probe.remove()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(in_scope()),
        made => made.map(|()| own).map_err(cannot),
    }
}

/// Does it all again in a scope of the user's own manager, where there may be cgroups. Returns only when there is none.
fn in_scope() -> Failure {
    let nowhere = |why: &str| {
        Failure::Unavailable(format!(
            "cannot make a cgroup: {why}; this takes root, or a user manager, in which `systemd-run --user --scope true` works"
        ))
    };
    if env::var_os(IN_SCOPE).is_some() {
        return nowhere("the user manager has delegated none");
    }
    let program = match env::current_exe() {
        Ok(program) => program,
        Err(error) => return cannot(error),
    };
    // It is tried with nothing first: systemd-run tells nobody but the terminal why it fails.
    match scope("true").output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => return nowhere(String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => return nowhere(&format!("systemd-run: {error}")),
    }
    let mut command = scope(program);
    command.args(env::args_os().skip(1)).env(IN_SCOPE, "1");
    cannot(command.exec())
}

/// A command in a scope of the user's own manager.
fn scope(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("systemd-run");
    command.args(["--user", "--scope", "--quiet", "--collect"]);
    command.args(["--property=Delegate=yes", "--"]).arg(program);
    command
}

/// Beside nervectl where it was built, below libexec where it is installed.
fn worker_path() -> Result<PathBuf, Failure> {
    let program = env::current_exe().map_err(cannot)?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let places = [
        folder.join("nerve-worker"),
        folder.join("../libexec/nerve/nerve-worker"),
    ];
    let [first, second] = &places;
    places
        .iter()
        .find(|path| path.is_file())
        .cloned()
        .ok_or_else(|| {
            let (first, second) = (first.display(), second.display());
            Failure::Internal(format!(
                "there is no nerve-worker, neither {first} nor {second}; install nerve"
            ))
        })
}

/// The worker says what nerved would end the connection for.
fn refused(what: &str) -> Failure {
    Failure::Internal(format!(
        "nerved would not take this from the worker: {what}"
    ))
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err hands on")]
fn cannot(error: io::Error) -> Failure {
    Failure::Internal(format!("cannot try it here: {error}"))
}
