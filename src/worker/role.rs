//! One process of a role in the run's cgroup, from its stdin to its output.
//!
//! It ends when the first process exits; then the cgroup is emptied, and the pipes are read to their end. Nothing of it
//! runs when [`Process::execute`] returns.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::pin::{Pin, pin};
use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use super::home::Home;
use crate::model::exit::{Exit, signal_name};
use crate::model::limits;
use crate::model::name::{RoleName, RunId};
use crate::model::status::RunResult;
use crate::os::cgroup::Cgroup;
use crate::os::process::{self, Child, Command};

/// A journal that did not take a line in time is sent nothing for so long.
const JOURNAL_PAUSE: Duration = Duration::from_secs(1);

/// What a run is told while it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// This round is durable.
    MessageAck(u32),
    /// This attempt of a round is durable.
    AttemptAck { round: u32, attempt: u32 },
    /// What the moderator said of this round is durable.
    RouteAck(u32),
    /// End: SIGTERM now, SIGKILL after the grace.
    Kill { grace: Duration },
    /// [`super::run::Run`]'s abort was set; nothing to do for a round.
    Abort,
}

/// A process about to be started.
#[derive(Debug)]
pub(super) struct Process<'a> {
    pub home: &'a Home,
    pub run: RunId,
    pub cgroup: &'a Cgroup,
    pub name: &'a RoleName,
    pub number: u32,
    pub argv: &'a [String],
    pub directory: &'a Path,
    /// What it reads.
    pub stdin: Option<&'a str>,
    pub environment: &'a [(String, String)],
    /// When it has taken too long…
    pub deadline: Option<Instant>,
    /// …and how long it may say nothing.
    pub stall: Option<Duration>,
    /// Most bytes that it may write to stdout, newlines at the end aside.
    pub stdout_bytes: usize,
    /// When the run's time-out passes.
    pub run_deadline: Option<Instant>,
}

/// How a process ended.
#[derive(Debug)]
pub(super) enum End {
    /// By itself, or because it took or said too much.
    Exited(Output),
    /// There was none, for this reason.
    NotStarted(String),
    /// The run was killed.
    Killed,
    /// The run's time-out passed.
    TimedOut,
}

/// What is left of a process.
#[derive(Debug)]
pub(super) struct Output {
    pub exit: Exit,
    /// Why nerve ended it, or the kernel did.
    pub cut: Option<RunResult>,
    /// At most as much as it might write.
    pub stdout: Vec<u8>,
    /// The end of it, without secrets.
    pub stderr: Vec<u8>,
}

/// Why a process is being ended from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stop {
    Kill,
    RunTimeout,
    /// The round fails with this.
    Role(RunResult),
}

/// What the pipes tell who watches the process.
#[derive(Debug, Default)]
struct News {
    /// Something came.
    activity: Notify,
    /// More came than may.
    too_large: Notify,
}

impl Process<'_> {
    /// Executes it.
    pub(super) async fn execute(self, orders: &mut mpsc::UnboundedReceiver<Order>) -> End {
        if let Err(error) = self.cgroup.create_anew() {
            return End::NotStarted(format!("cannot make the cgroup of the run: {error}"));
        }
        let (child, stdin, stdout, stderr) = match self.start() {
            Ok(started) => started,
            Err(error) if self.directory.is_dir() => {
                let program = self.argv.first().map_or("", String::as_str);
                return End::NotStarted(format!("cannot execute {program}: {error}"));
            }
            Err(error) => {
                let why = format!("cannot enter {}: {error}", self.directory.display());
                return End::NotStarted(why);
            }
        };
        let (mut content, mut tail) = (Vec::new(), Vec::new());
        let news = News::default();
        let (exit, stop) = {
            let mut pipes = pin!(async {
                tokio::join!(
                    feed(stdin, self.stdin.unwrap_or_default()),
                    self.collect(stdout, &mut content, &news),
                    self.forward(stderr, &mut tail, &news)
                );
            });
            let mut pipes_open = true;
            let ended = self
                .watch(&child, orders, pipes.as_mut(), &mut pipes_open, &news)
                .await;
            if pipes_open {
                // Its processes are gone, so the pipes end at once, unless somebody outside holds one.
                let _ = tokio::time::timeout(Duration::from_secs(1), pipes).await;
            }
            ended
        };
        let out_of_memory = exit == Exit::Signal(libc::SIGKILL) && self.cgroup.oom_kills() > 0;
        // A cgroup is for one process: since Linux 6.14 what is born into one that was once killed dies at once.
        if let Err(error) = self.cgroup.remove() {
            tracing::error!(run_id = %self.run, %error, "failed to remove the cgroup of a run");
        }
        let is_too_large = trimmed(&content) > self.stdout_bytes;
        let cut = match stop {
            Some(Stop::Kill) => return End::Killed,
            Some(Stop::RunTimeout) => return End::TimedOut,
            Some(Stop::Role(result)) => Some(result),
            None if is_too_large => Some(RunResult::ReplyTooLarge),
            None => out_of_memory.then_some(RunResult::OomKill),
        };
        End::Exited(Output {
            exit,
            cut,
            stdout: content,
            stderr: tail,
        })
    }

    fn start(&self) -> io::Result<(Child, Option<pipe::Sender>, pipe::Receiver, pipe::Receiver)> {
        let (stdin, feeder) = match self.stdin {
            Some(_) => process::pipe().map(|(read, write)| (read, Some(write)))?,
            None => (self.home.nothing.try_clone()?, None),
        };
        let (stdout, stdout_write) = process::pipe()?;
        let (stderr, stderr_write) = process::pipe()?;
        let cgroup = self.cgroup.open()?;
        let command = Command {
            argv: self.argv,
            environment: self.environment,
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
        news: &News,
    ) -> (Exit, Option<Stop>) {
        let after = |time: Option<Duration>| time.map(|time| Instant::now() + time);
        let mut stall_at = after(self.stall);
        let mut stop = None;
        let mut kill_at: Option<Instant> = None;
        let exit = loop {
            tokio::select! {
                exit = child.wait() => break exit,
                () = &mut pipes, if *pipes_open => *pipes_open = false,
                () = news.activity.notified(), if stall_at.is_some() => stall_at = after(self.stall),
                () = news.too_large.notified() => {
                    stop.get_or_insert(Stop::Role(RunResult::ReplyTooLarge));
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
                () = at(self.deadline), if stop.is_none() => {
                    stop = Some(Stop::Role(RunResult::RoleTimeout));
                    self.terminate(limits::DEFAULT_GRACE, &mut kill_at);
                }
                () = at(stall_at), if stop.is_none() => {
                    stop = Some(Stop::Role(RunResult::RoleStalled));
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

    /// Reads stdout, and says so when it is more than it may be.
    async fn collect(&self, mut stdout: pipe::Receiver, content: &mut Vec<u8>, news: &News) {
        let most = self.stdout_bytes;
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(count @ 1..) = stdout.read(&mut buffer).await {
            news.activity.notify_one();
            content.extend_from_slice(&buffer[..count]);
            if content.len() > most && (trimmed(content) > most || content.len() > 2 * most) {
                return news.too_large.notify_one();
            }
        }
    }

    /// Sends stderr to the journal, line by line and without secrets, and keeps its end.
    async fn forward(&self, mut stderr: pipe::Receiver, tail: &mut Vec<u8>, news: &News) {
        let longest = limits::JOURNAL_LINE_BYTES;
        let (mut piece, mut held) = (vec![0; longest], Vec::new());
        let mut redacted = self.home.redactor.stream();
        let mut resume_at = Instant::now();
        loop {
            let count = stderr.read(&mut piece).await.unwrap_or(0);
            news.activity.notify_one();
            let clean = match count {
                0 => redacted.finish(),
                _ => redacted.push(&piece[..count]),
            };
            keep_tail(tail, &clean);
            held.extend_from_slice(&clean);
            let mut start = 0;
            while start < held.len() {
                let rest = &held[start..];
                let line = &rest[..rest.len().min(longest)];
                let (length, newline) = match line.iter().position(|byte| *byte == b'\n') {
                    Some(length) => (length, 1),
                    None if line.len() == longest || count == 0 => (line.len(), 0),
                    None => break,
                };
                let is_due = Instant::now() >= resume_at;
                if is_due && !self.log(&line[..length]).await {
                    // A journal that is slow must not make the role slow: it misses some of this.
                    resume_at = Instant::now() + JOURNAL_PAUSE;
                }
                start += length + newline;
            }
            held.drain(..start);
            if count == 0 {
                return;
            }
        }
    }

    async fn log(&self, line: &[u8]) -> bool {
        self.home
            .log(self.run, self.name, self.number, b"6", line)
            .await
    }
}

impl Output {
    /// Why it is a failure, with these exit codes for success.
    pub(super) fn failure(&self, ok_codes: &BTreeSet<u8>) -> Option<RunResult> {
        let of_exit = || match self.exit {
            Exit::Signal(number) => Some(RunResult::Signal(signal_name(number))),
            Exit::Code(code) if u8::try_from(code).is_ok_and(|code| ok_codes.contains(&code)) => {
                None
            }
            Exit::Code(code) => Some(RunResult::ExitCode(code)),
        };
        self.cut.clone().or_else(of_exit)
    }
}

/// Length without trailing newlines.
pub(super) fn trimmed(bytes: &[u8]) -> usize {
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
