//! nervectl: one function per verb; rendering is pure. Knows the bus's client half, `config`, and of what nerved does only
//! what is done here without it: the worker's protocol, cgroups, whole files, the lines of the archive.
//!
//! Only [`run`] decides the exit status. stdout has what was asked for and nothing else; all else goes to stderr.

mod archive;
mod archived;
mod blob;
mod cli;
mod control;
mod convert;
mod difference;
mod events;
mod follow;
mod import;
mod init;
mod input;
mod install;
mod json;
mod kill;
mod paper;
mod predecessor;
mod render;
mod render_status;
mod start;
mod store;
mod text;
mod thread;
mod trial;
mod validate;
mod verbs;
mod wait;

use std::env;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;

use crate::bus::client::{Addresses, Client, PRIVATE};
use crate::bus::error::CallError;
use crate::config::{directory, settings};
use cli::{Cli, Command, Workflow};

/// Exit status of a command line that makes no sense.
const USAGE: u8 = 64;
/// Exit status when what was given, or what was looked at, is not as it should be.
const BROKEN: u8 = 65;

/// Where things are.
#[derive(Debug, Clone)]
struct Settings {
    /// Where nerve is. The system bus is `DBUS_SYSTEM_BUS_ADDRESS`, if that is set, and then it is what is meant.
    addresses: Addresses,
    /// The directories of definitions; the first wins.
    definitions: Vec<PathBuf>,
    /// The engine's settings.
    engine: settings::Places,
}

impl Default for Settings {
    fn default() -> Self {
        let definitions = directory::STANDARD;
        let is_root = rustix::process::geteuid().is_root();
        let is_told = env::var_os("DBUS_SYSTEM_BUS_ADDRESS").is_some();
        Self {
            addresses: Addresses {
                private: (is_root && !is_told).then(|| PathBuf::from(PRIVATE)),
                bus: None,
            },
            definitions: definitions.map(PathBuf::from).to_vec(),
            engine: settings::Places::of_system(),
        }
    }
}

impl Settings {
    async fn connect(&self) -> Result<Client, CallError> {
        Client::connect(&self.addresses).await
    }

    /// For what takes as long as it takes.
    async fn connect_patiently(&self) -> Result<Client, CallError> {
        Client::connect_patiently(&self.addresses).await
    }
}

/// Why a verb did not do what was asked. The text is what `nervectl: ` precedes.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Options contradict each other.
    #[error("{0}")]
    Usage(String),
    /// What was given is not valid.
    #[error("{0}")]
    Input(String),
    /// nerve could not be asked, or said no.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The call was sent and not answered: it may have had its effect.
    #[error("{0}")]
    Unknown(String),
    /// The caller may not do it.
    #[error("{0}")]
    Forbidden(String),
    /// Who would have to do it is not there.
    #[error("{0}")]
    Unavailable(String),
    /// The run had ended before it could be killed or aborted.
    #[error("{0}")]
    AlreadyEnded(String),
    /// A signal ended the wait; what was waited for goes on.
    #[error("{text}")]
    Interrupted { status: u8, text: String },
    /// stdout does not take what is to be said.
    #[error("cannot write to standard output: {0}")]
    Output(io::Error),
    /// Neither nerve nor what was given is to blame.
    #[error("{0}")]
    Internal(String),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => USAGE,
            Self::Input(_) => BROKEN,
            Self::Call(error) => error.exit_status(),
            Self::AlreadyEnded(_) => 68,
            Self::Unavailable(_) => 69,
            Self::Internal(_) => 70,
            Self::Unknown(_) | Self::Output(_) => 74,
            Self::Forbidden(_) => 77,
            Self::Interrupted { status, .. } => *status,
        }
    }
}

/// Does what the command line says; the whole of nervectl.
#[must_use]
pub fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors and go to stdout. Whether anybody reads it is not our business.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(dispatch(&Settings::default(), cli.command)),
        Err(error) => Err(Failure::Internal(format!("cannot start: {error}"))),
    };
    ExitCode::from(conclude(done))
}

async fn dispatch(settings: &Settings, command: Command) -> Result<u8, Failure> {
    match command {
        Command::Workflow(Workflow::Start(arguments)) => start::start(settings, &arguments).await,
        Command::Workflow(Workflow::Try(arguments)) => trial::try_out(settings, &arguments).await,
        Command::Workflow(Workflow::List(arguments)) => verbs::list(settings, &arguments).await,
        Command::Workflow(Workflow::Show(arguments)) => verbs::show(settings, &arguments).await,
        Command::Workflow(Workflow::Kill(arguments)) => kill::kill(settings, &arguments).await,
        Command::Workflow(Workflow::Abort(arguments)) => control::abort(settings, &arguments).await,
        Command::Workflow(Workflow::Drain(arguments)) => control::drain(settings, &arguments).await,
        Command::Workflow(Workflow::Reset(arguments)) => control::reset(settings, &arguments).await,
        Command::Blob(command) => blob::dispatch(settings, command).await,
        Command::Store(command) => store::dispatch(settings, command).await,
        Command::Init(arguments) => init::init(&arguments),
        Command::Convert(arguments) => convert::convert(&arguments),
        Command::Install(arguments) => install::install(settings, &arguments).await,
        Command::Pause(arguments) => control::pause(settings, &arguments).await,
        Command::Resume => control::resume(settings).await,
        Command::Reload => control::reload(settings).await,
        Command::Thread(arguments) => thread::thread(settings, &arguments).await,
        Command::Events(arguments) => events::events(settings, &arguments).await,
        Command::Logs(arguments) => verbs::logs(settings, &arguments).await,
        Command::Validate(arguments) => validate::validate(settings, &arguments),
        Command::Status(arguments) => verbs::status(settings, &arguments).await,
    }
}

/// The exit status, and the one line that explains it.
fn conclude(done: Result<u8, Failure>) -> u8 {
    match done {
        Ok(status) => status,
        // `nervectl … | head` has got what it wants.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(failure) => {
            complain(&failure);
            failure.status()
        }
    }
}

fn complain(failure: &Failure) {
    note(&format!("nervectl: {failure}"));
}

/// A line for the person, beside the answer. Nobody can be told when stderr is gone.
fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", text::block(text));
}

/// The answer.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
        .map_err(Failure::Output)
}

fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// µs since the epoch.
fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
