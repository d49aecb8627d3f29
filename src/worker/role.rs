//! One round: a role's command in the run's cgroup, from its prompt to its message.
//!
//! The round ends when the first process exits; then the cgroup is emptied, the pipes are read to their end, and the
//! message is made. Nothing of the round runs when [`Round::execute`] returns.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::pin::{Pin, pin};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Map, Value};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use super::home::Home;
use crate::model::exit::{Exit, signal_name};
use crate::model::limits;
use crate::model::message::{ERROR, Message, OK};
use crate::model::name::{RoleName, RunId};
use crate::model::role::Role;
use crate::model::status::RunResult;
use crate::os::cgroup::Cgroup;
use crate::os::clock;
use crate::os::process::{self, Child, Command};

/// What a run is told while it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// This round is durable.
    MessageAck(u32),
    /// End: SIGTERM now, SIGKILL after the grace.
    Kill { grace: Duration },
    /// [`super::run::Run`]'s abort was set; nothing to do for a round.
    Abort,
}

/// How a round ended.
#[derive(Debug)]
pub(super) enum RoundEnd {
    /// It said this.
    Said(Message),
    /// The run was killed.
    Killed,
    /// The run's time-out passed.
    TimedOut,
}

/// A round about to be executed.
#[derive(Debug)]
pub(super) struct Round<'a> {
    pub home: &'a Home,
    pub run: RunId,
    pub cgroup: &'a Cgroup,
    pub name: &'a RoleName,
    pub role: &'a Role,
    /// What is executed.
    pub argv: &'a [String],
    pub directory: &'a Path,
    /// What it reads on stdin.
    pub prompt: Option<String>,
    pub environment: Vec<(String, String)>,
    pub number: u32,
    /// When the run's time-out passes.
    pub run_deadline: Option<Instant>,
}

/// Why a round is being ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Kill,
    RunTimeout,
    RoleTimeout,
    ReplyTooLarge,
}

/// What came through the pipes.
#[derive(Debug, Default)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Round<'_> {
    /// Executes the round.
    pub(super) async fn execute(self, orders: &mut mpsc::UnboundedReceiver<Order>) -> RoundEnd {
        let (child, stdin, stdout, stderr) = match self.start() {
            Ok(started) => started,
            Err(error) => {
                let why = if self.directory.is_dir() {
                    let program = self.argv.first().map_or("", String::as_str);
                    format!("cannot execute {program}: {error}")
                } else {
                    format!("cannot enter {}: {error}", self.directory.display())
                };
                return RoundEnd::Said(failure(self.name, &RunResult::ExecFailed, &why));
            }
        };
        let mut output = Output::default();
        let too_large = Notify::new();
        let (exit, stop) = {
            let Output {
                stdout: content,
                stderr: tail,
            } = &mut output;
            let mut pipes = pin!(async {
                tokio::join!(
                    feed(stdin, self.prompt.as_deref().unwrap_or_default()),
                    collect(stdout, content, &too_large),
                    self.forward(stderr, tail)
                );
            });
            let mut pipes_open = true;
            let ended = self
                .watch(&child, orders, pipes.as_mut(), &mut pipes_open, &too_large)
                .await;
            if pipes_open {
                // Its processes are gone, so the pipes end at once, unless somebody outside holds one.
                let _ = tokio::time::timeout(Duration::from_secs(1), pipes).await;
            }
            ended
        };
        let out_of_memory = exit == Exit::Signal(libc::SIGKILL) && self.cgroup.oom_kills() > 0;
        // A cgroup is for one round: since Linux 6.14 what is born into one that was once killed dies at once.
        if let Err(error) = self.cgroup.remove() {
            tracing::error!(run_id = %self.run, %error, "failed to remove the cgroup of a run");
        }
        match stop {
            Some(Stop::Kill) => RoundEnd::Killed,
            Some(Stop::RunTimeout) => RoundEnd::TimedOut,
            stop => RoundEnd::Said(self.message(exit, stop, out_of_memory, output)),
        }
    }

    fn start(&self) -> io::Result<(Child, Option<pipe::Sender>, pipe::Receiver, pipe::Receiver)> {
        let (stdin, feeder) = match &self.prompt {
            Some(_) => process::pipe().map(|(read, write)| (read, Some(write)))?,
            None => (self.home.nothing.try_clone()?, None),
        };
        let (stdout, stdout_write) = process::pipe()?;
        let (stderr, stderr_write) = process::pipe()?;
        let cgroup = self.cgroup.open()?;
        let command = Command {
            argv: self.argv,
            environment: &self.environment,
            directory: self.directory,
            cgroup: cgroup.as_fd(),
            stdio: [stdin.as_fd(), stdout_write.as_fd(), stderr_write.as_fd()],
        };
        let feeder = feeder.map(process::unblocked).transpose()?;
        let feeder = feeder
            .map(pipe::Sender::from_owned_fd_unchecked)
            .transpose()?;
        let (stdout, stderr) = (process::unblocked(stdout)?, process::unblocked(stderr)?);
        let stdout = pipe::Receiver::from_owned_fd_unchecked(stdout)?;
        let stderr = pipe::Receiver::from_owned_fd_unchecked(stderr)?;
        Ok((command.start()?, feeder, stdout, stderr))
    }

    /// Waits for the first process and empties the cgroup behind it, minding orders and time-outs.
    async fn watch(
        &self,
        child: &Child,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        mut pipes: Pin<&mut impl Future<Output = ()>>,
        pipes_open: &mut bool,
        too_large: &Notify,
    ) -> (Exit, Option<Stop>) {
        let role_deadline = self.role.timeout.map(|timeout| Instant::now() + timeout);
        let mut stop = None;
        let mut kill_at: Option<Instant> = None;
        let exit = loop {
            tokio::select! {
                exit = child.wait() => break exit,
                () = &mut pipes, if *pipes_open => *pipes_open = false,
                () = too_large.notified() => {
                    stop.get_or_insert(Stop::ReplyTooLarge);
                    self.kill_cgroup();
                }
                Some(order) = orders.recv() => if let Order::Kill { grace } = order {
                    stop = Some(Stop::Kill);
                    self.terminate(grace, &mut kill_at);
                },
                () = at(self.run_deadline), if stop.is_none() => {
                    stop = Some(Stop::RunTimeout);
                    self.terminate(limits::DEFAULT_GRACE, &mut kill_at);
                }
                () = at(role_deadline), if stop.is_none() => {
                    stop = Some(Stop::RoleTimeout);
                    self.terminate(limits::DEFAULT_GRACE, &mut kill_at);
                }
                () = at(kill_at) => {
                    kill_at = None;
                    self.kill_cgroup();
                }
            }
        };
        let exit = exit.unwrap_or_else(|error| {
            tracing::error!(run_id = %self.run, %error, "failed to wait for a role");
            Exit::Code(-1)
        });
        if let Some(kill_at) = kill_at {
            // The grace is for all of the run's processes, not for the first alone.
            tokio::select! {
                _ = self.cgroup.emptied() => {}
                () = sleep_until(kill_at) => {}
                () = drain(pipes, pipes_open) => {}
            }
        }
        // A kill that comes now asks for what is being done already, but it decides how the run ends.
        if let Err(error) = self.empty().await {
            tracing::error!(run_id = %self.run, %error, "failed to empty the cgroup of a run");
        }
        while let Ok(order) = orders.try_recv() {
            if matches!(order, Order::Kill { .. }) {
                stop = Some(Stop::Kill);
            }
        }
        (exit, stop)
    }

    fn terminate(&self, grace: Duration, kill_at: &mut Option<Instant>) {
        self.cgroup.signal(Signal::TERM);
        // What is stopped can only take the signal when it goes on.
        self.cgroup.signal(Signal::CONT);
        let at = Instant::now() + grace;
        *kill_at = Some(kill_at.map_or(at, |earlier| earlier.min(at)));
    }

    fn kill_cgroup(&self) {
        if let Err(error) = self.cgroup.kill() {
            tracing::error!(run_id = %self.run, %error, "failed to kill the cgroup of a run");
        }
    }

    async fn empty(&self) -> io::Result<()> {
        if self.cgroup.is_empty()? {
            return Ok(());
        }
        self.cgroup.kill()?;
        self.cgroup.emptied().await
    }

    /// Sends stderr to the journal, line by line, and keeps its end.
    async fn forward(&self, mut stderr: pipe::Receiver, tail: &mut Vec<u8>) {
        let mut buffer = vec![0; limits::JOURNAL_LINE_BYTES];
        let mut held = 0;
        loop {
            let count = stderr.read(&mut buffer[held..]).await.unwrap_or(0);
            keep_tail(tail, &buffer[held..held + count]);
            held += count;
            let mut start = 0;
            while let Some(length) = buffer[start..held].iter().position(|byte| *byte == b'\n') {
                self.log(&buffer[start..start + length]).await;
                start += length + 1;
            }
            if start == 0 && held > 0 && (held == buffer.len() || count == 0) {
                self.log(&buffer[..held]).await;
                start = held;
            }
            buffer.copy_within(start..held, 0);
            held -= start;
            if count == 0 && held == 0 {
                return;
            }
        }
    }

    async fn log(&self, line: &[u8]) {
        self.home
            .log(self.run, self.name, self.number, b"6", line)
            .await;
    }

    fn message(
        &self,
        exit: Exit,
        stop: Option<Stop>,
        out_of_memory: bool,
        output: Output,
    ) -> Message {
        let (content, is_text) = decode(output.stdout);
        let result = match (stop, exit) {
            (Some(Stop::RoleTimeout), _) => Some(RunResult::RoleTimeout),
            (Some(Stop::ReplyTooLarge), _) => Some(RunResult::ReplyTooLarge),
            _ if content.len() > limits::REPLY_BYTES => Some(RunResult::ReplyTooLarge),
            (_, Exit::Signal(_)) if out_of_memory => Some(RunResult::OomKill),
            (_, Exit::Signal(number)) => Some(RunResult::Signal(signal_name(number))),
            (_, Exit::Code(0)) => None,
            (_, Exit::Code(code)) => Some(RunResult::ExitCode(code)),
        };
        if !is_text {
            tracing::warn!(run_id = %self.run, role = %self.name, round = self.number,
                "the reply of role {} is not UTF-8; what is not became U+FFFD", self.name);
        }
        let mut meta = meta(result.as_ref(), &output.stderr);
        match exit {
            Exit::Code(code) => meta.insert("exitCode".into(), code.into()),
            Exit::Signal(number) => meta.insert("signal".into(), signal_name(number).into()),
        };
        let content = if result == Some(RunResult::ReplyTooLarge) {
            String::new()
        } else {
            content
        };
        Message {
            role: self.name.to_string(),
            content,
            meta,
            timestamp: clock::wall_us(),
        }
    }
}

/// The message of a round that could not be executed.
pub(super) fn failure(role: &RoleName, result: &RunResult, why: &str) -> Message {
    let meta = meta(Some(result), why.as_bytes());
    Message {
        role: role.to_string(),
        content: String::new(),
        meta,
        timestamp: clock::wall_us(),
    }
}

fn meta(result: Option<&RunResult>, stderr: &[u8]) -> Map<String, Value> {
    let mut meta = Map::new();
    meta.insert(
        "status".into(),
        if result.is_some() { ERROR } else { OK }.into(),
    );
    if let Some(result) = result {
        meta.insert("result".into(), result.to_string().into());
    }
    meta.insert("stderr".into(), String::from_utf8_lossy(stderr).into());
    meta
}

/// The reply as text, without trailing newlines, and whether it was text. NUL is none: D-Bus cannot carry it.
fn decode(mut bytes: Vec<u8>) -> (String, bool) {
    bytes.truncate(trimmed(&bytes));
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => (text, true),
        Ok(text) => (text.replace('\0', "\u{fffd}"), false),
        Err(error) => {
            let text = String::from_utf8_lossy(error.as_bytes());
            (text.replace('\0', "\u{fffd}"), false)
        }
    }
}

/// Length without trailing newlines.
fn trimmed(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rposition(|byte| *byte != b'\n')
        .map_or(0, |last| last + 1)
}

/// Keeps the pipes flowing; never returns.
async fn drain(pipes: Pin<&mut impl Future<Output = ()>>, open: &mut bool) {
    if *open {
        pipes.await;
        *open = false;
    }
    std::future::pending().await
}

/// Writes the prompt; a role that does not read it is no error.
async fn feed(stdin: Option<pipe::Sender>, prompt: &str) {
    if let Some(mut stdin) = stdin {
        let _ = stdin.write_all(prompt.as_bytes()).await;
    }
}

/// Reads the reply, and says so when it is more than a reply may be.
async fn collect(mut stdout: pipe::Receiver, content: &mut Vec<u8>, too_large: &Notify) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count @ 1..) = stdout.read(&mut buffer).await {
        content.extend_from_slice(&buffer[..count]);
        if content.len() > limits::REPLY_BYTES
            && (trimmed(content) > limits::REPLY_BYTES || content.len() > 2 * limits::REPLY_BYTES)
        {
            too_large.notify_one();
            return;
        }
    }
}

fn keep_tail(tail: &mut Vec<u8>, bytes: &[u8]) {
    let bytes = &bytes[bytes.len().saturating_sub(limits::STDERR_TAIL_BYTES)..];
    let surplus = (tail.len() + bytes.len()).saturating_sub(limits::STDERR_TAIL_BYTES);
    tail.drain(..surplus);
    tail.extend_from_slice(bytes);
}

/// An instant that may never come.
async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
