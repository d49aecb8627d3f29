//! The command line: what can be typed, and the texts that teach it. Checks here what needs no daemon and no file.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::tz::TimeZone;

use crate::bus::client::SOURCES;
use crate::config::moment::parse_moment;
use crate::config::time::parse_duration;
use crate::model::limits;
use crate::model::status::Status as RunStatus;

const EXIT_STATUSES: &str = "\
Exit status:
   0  success                       69  nerve or the system bus is not there
  64  usage                         70  internal error
  65  bad definition, input, store  74  the answer is unknown: look, then repeat
  66  unknown workflow, run, blob   75  the run was dropped; nerve is busy
  67  more than one run is meant    77  not permitted
  68  the run had ended, or is being ended, already
  `workflow start --wait` exits with the run's own exit code: 0 completed,
  1 failed, 2 out of rounds, 124 timed out, 130 interrupted, 137 killed,
  143 aborted, 255 crashed.
  nervectl(1) has the whole table.";

/// Start, watch and end durable workflows.
///
/// A workflow is a file, such as /etc/nerve/workflows/NAME.yaml; a run is one execution of it. RUN is a run's id or its
/// last digits, as many as tell it apart from all others. Only root may ask nerve; `init`, `validate`, `convert`,
/// `install --dry-run`, `workflow try`, and `thread` inside a role, ask nobody.
#[derive(Debug, Parser)]
#[command(name = "nervectl", version, after_help = EXIT_STATUSES, max_term_width = 120, disable_help_subcommand = true)]
pub(super) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Start, list, show and end runs of workflows; replace and reset their workers
    #[command(subcommand)]
    Workflow(Workflow),
    /// Show what the roles of a run said, in order
    ///
    /// A role of a run need not say which: without RUN it is shown its own, from the file $NERVE_THREAD, without nerve.
    Thread(Thread),
    /// Show the log of events: what happened, to whom, and who asked for it
    ///
    /// Oldest first: all that there are, or the newest N. Each start, kill, abort, drain, reset, pause, resume and reload,
    /// and each call that was denied, is an event of the source `audit`, with who it was.
    Events(Events),
    /// Show the journal of a run alone
    ///
    /// What the run's roles wrote to stderr and what nerve says about the run, from the journal, by journalctl.
    Logs(Logs),
    /// Check definitions and settings; needs no daemon
    ///
    /// Prints `NAME: ok` for each that is right; all that is wrong goes to stderr, each fault with its line and what to
    /// do. Exits 65 when there is an error; warnings alone are right.
    Validate(Validate),
    /// Make a workspace: a directory of workflows to write, try and install; needs no daemon
    ///
    /// It has a workflow that runs as it is, settings, a page that tells an agent how to write workflows, and the schema for
    /// editors. What is there already stays.
    Init(Init),
    /// Turn a definition of united-workforce into one of nerve; needs no daemon
    ///
    /// What it becomes goes to stdout. What could not be carried over goes to stderr, each with its line and what to do;
    /// first of all who executes the roles, which such a definition does not say.
    Convert(Convert),
    /// Put a workspace's workflows and settings into /etc/nerve, and have nerve take them
    ///
    /// Checks all of them, shows the difference to what is installed, and refuses all when anything is wrong. What was
    /// installed from the workspace and is in it no more is removed; nothing else is.
    Install(Install),
    /// Show nerve itself: what runs, what waits and why, and which definitions are broken
    Status(Status),
    /// Keep, get and list blobs: bytes under their sha256
    #[command(subcommand)]
    Blob(Blob),
    /// Check, copy and archive what nerve remembers
    #[command(subcommand)]
    Store(Store),
    /// Let no more runs start; those that have started go on
    ///
    /// Runs are accepted as before and wait, but workflows with `overflow: drop` drop theirs. It holds until
    /// `nervectl resume`, also across restarts and reboots.
    Pause(Pause),
    /// Let runs start again after `nervectl pause`
    Resume,
    /// Take new definitions, as `systemctl reload nerve` does
    ///
    /// Runs that have started keep the definition that they were started with; no run is interrupted. What is wrong
    /// with a definition goes to stderr, and exits 65; the others are taken all the same.
    Reload,
}

/// `store import`
#[derive(Debug, Args)]
pub(super) struct Import {
    /// Its database, logs.db; stop the predecessor first
    #[arg(value_name = "FILE")]
    pub database: PathBuf,
    /// Its blobs
    #[arg(long, value_name = "DIR")]
    pub blobs: Option<PathBuf>,
    /// Its archive, a directory of YYYY-MM-DD.jsonl; by default archive/logs beside the database
    #[arg(long, value_name = "DIR")]
    pub archive: Option<PathBuf>,
}

/// What can be done with runs.
#[derive(Debug, Subcommand)]
pub(super) enum Workflow {
    /// Start a run; prints its id
    ///
    /// The id is printed alone, on stdout, as soon as the run is durable: from then on it ends in exactly one status,
    /// whatever happens to nerve or the machine.
    Start(Start),
    /// Execute a definition once, here and as you, without nerve and without installing it
    ///
    /// Shows each round as it is done, and exits with the run's exit code. Nothing of the run is kept, and what the
    /// definition says below `worker` about its unit does not hold, but for Environment. Interrupted, it ends the run.
    Try(Try),
    /// List runs, newest first
    List(List),
    /// Show everything about a run: status, times, prompt, events
    Show(Show),
    /// End runs now; each ends 137 and no process of it is left
    ///
    /// SIGTERM to all processes of the run, then, after the grace, SIGKILL. Returns when the runs have ended; until
    /// then they are shown as `started (killing)`. Killing a run that is already killed succeeds.
    Kill(Kill),
    /// End a run when its round is done; it ends 143
    ///
    /// Returns once the request is durable; until the run has ended it is shown as `started (aborting)`. A run that
    /// waits, or that no worker has, ends at once. What has ended, or is being ended already, is refused.
    Abort(Abort),
    /// Have a workflow's worker replaced as soon as its runs have ended
    ///
    /// The worker gets no new runs; those wait for the next one. Without a worker it is done at once.
    Drain(Drain),
    /// Forget that a workflow's worker died too often, or was stopped: its runs start again
    Reset(Reset),
}

/// What can be done with blobs. DIGEST is the sha256, 64 hex digits in any case.
#[derive(Debug, Subcommand)]
pub(super) enum Blob {
    /// Keep what a file holds; prints its digest
    ///
    /// What is there already is not stored again. A blob that turns out to be damaged is replaced, and stderr says so.
    /// `store archive`, and so nerve-archive.timer, removes a blob that nothing refers to 30 days after it was last put.
    Put {
        /// The file, or - for stdin; at most 1 GiB
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Write a blob to stdout, once it is found to be whole
    Get {
        /// Its sha256
        #[arg(value_name = "DIGEST")]
        digest: String,
    },
    /// Exit with 0 if there is such a blob, or else with 66
    Exists {
        /// Its sha256
        #[arg(value_name = "DIGEST")]
        digest: String,
    },
    /// List all blobs: digest, size, and how often the history refers to each
    List {
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
        output: ListFormat,
    },
}

/// What can be done with the store.
#[derive(Debug, Subcommand)]
pub(super) enum Store {
    /// Say whether anything in the store was changed or lost; exits 65 if so
    ///
    /// Prints what is wrong, a fault on a line, then the newest event's number and hash: note them elsewhere, and nobody
    /// can change what was before. Runs go on meanwhile. When nerve does not start use `nerved --check`.
    Check {
        /// How to print it
        #[arg(short, long, value_enum, default_value_t = ReportFormat::Text)]
        output: ReportFormat,
    },
    /// Copy the database to a new file, while runs go on
    ///
    /// The archive and the blobs are files of their own, to be copied after it; nerve-store(7) says how, and how to restore it.
    Backup {
        /// The file; it must not be there yet, and - is not stdout
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Move old days of the log into files; nerve-archive.timer does it daily
    ///
    /// Whole days, by UTC, go to /var/lib/nerve/archive/logs/YYYY-MM-DD.jsonl, but for what happened to runs that have
    /// not ended. `thread` and `workflow show` read the files. Afterwards runs are forgotten as nerve.yaml's `retention`
    /// says, and blobs removed that nothing refers to.
    Archive(Archive),
    /// Bring an archived day back into the database
    ///
    /// It stays there until `store archive` reaches it again.
    Restore(Restore),
    /// Take over the history of the TypeScript predecessor
    ///
    /// Its runs are shown, with their threads, under new ids and under their old ones; what had not ended is
    /// `interrupted`, and nothing starts. The old files are only read. Whatever was imported before is left out, so
    /// that an import which was cut off can simply be repeated.
    Import(Import),
}

/// `store archive`
#[derive(Debug, Args)]
pub(super) struct Archive {
    /// Days that ended longer ago than this
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = parse_duration)]
    pub older_than: Duration,
    /// The oldest N days; without it all
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_days: Option<u32>,
    /// Give space that the database does not need any more back to the filesystem
    #[arg(long)]
    pub vacuum: bool,
    /// Only say what would be archived, forgotten and removed
    #[arg(long, conflicts_with = "vacuum")]
    pub dry_run: bool,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
}

/// `store restore`
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// The day, as 2026-11-20
    pub day: String,
}

/// `workflow start`
#[derive(Debug, Args)]
pub(super) struct Start {
    /// The workflow, as `nervectl status` lists it
    #[arg(value_name = "NAME")]
    pub workflow: OsString,
    #[command(flatten)]
    pub prompt: Prompt,
    /// Rounds that the run may take; when it needs one more it ends (failed, 2). Without it the definition says, or nerve.yaml
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::MAX_ROUNDS)))]
    pub max_rounds: Option<u32>,
    /// Start it once only: when a run of the workflow has this key already, that run is the answer; at most 128 bytes
    ///
    /// A run that has it and was started with another prompt is an error (65).
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    pub key: Option<OsString>,
    /// Rehearse: the prompts are rendered and the graph is walked, and no role is executed that does not ask for it
    #[arg(long)]
    pub dry_run: bool,
    /// Wait for the run's end, also across restarts of nerve, and exit with its exit code
    ///
    /// Interrupted, nervectl goes and the run stays.
    #[arg(long)]
    pub wait: bool,
    /// Show each round as it is done until the run has ended, also across restarts of nerve, and exit with its exit code
    ///
    /// Interrupted, nervectl goes and the run stays.
    #[arg(short, long)]
    pub follow: bool,
}

/// What a run is started with.
#[derive(Debug, Args)]
pub(super) struct Prompt {
    /// What the run is about: `start.content` in the roles' prompts; at most 1 MiB
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<OsString>,
    /// Read the prompt from a file, or from stdin (-); at most 1 MiB
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
}

/// `workflow try`
#[derive(Debug, Args)]
pub(super) struct Try {
    /// The definition, or - for stdin
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub prompt: Prompt,
    /// Rounds that the run may take, as of `workflow start`
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::MAX_ROUNDS)))]
    pub max_rounds: Option<u32>,
    /// Rehearse, as `workflow start` does
    #[arg(long)]
    pub dry_run: bool,
}

/// `workflow list`
#[derive(Debug, Args)]
pub(super) struct List {
    /// Only runs of this workflow
    #[arg(value_name = "NAME")]
    pub workflow: Option<OsString>,
    /// Only runs that have not ended
    #[arg(long)]
    pub active: bool,
    /// Only runs with this status; of several any
    #[arg(long, value_name = "STATUS", value_parser = status)]
    pub status: Vec<RunStatus>,
    /// Only runs that ended with this exit code
    #[arg(long, value_name = "N")]
    pub exit_code: Option<u8>,
    /// Only runs that were accepted then or later: -1h, yesterday, "2026-11-20 10:36", …, see systemd.time(7)
    #[arg(long, value_name = "WHEN", value_parser = moment, allow_hyphen_values = true)]
    pub since: Option<u64>,
    /// Only runs that were accepted then or earlier
    #[arg(long, value_name = "WHEN", value_parser = moment, allow_hyphen_values = true)]
    pub until: Option<u64>,
    /// Go on after this run of the list: the next page
    #[arg(long, value_name = "RUN")]
    pub before: Option<OsString>,
    /// The newest so many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    pub lines: u32,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub output: ListFormat,
}

/// How a list is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ListFormat {
    /// For people
    Table,
    /// An array of objects; times in µs since the epoch
    Json,
}

/// `workflow show`
#[derive(Debug, Args)]
pub(super) struct Show {
    /// The run: its id or the last digits of it
    pub run: OsString,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// How one thing is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// For people
    Text,
    /// An array of objects; times in µs since the epoch
    Json,
}

/// How a check's report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ReportFormat {
    /// For people
    Text,
    /// One object
    Json,
}

/// `workflow kill`
#[derive(Debug, Args)]
pub(super) struct Kill {
    /// The runs: their ids or the last digits of them
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<OsString>,
    /// Why; is kept with the run; at most 1 KiB
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub reason: Option<OsString>,
    /// Time between SIGTERM and SIGKILL, at most 1 h; 0 is SIGKILL at once
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = grace)]
    pub grace: Duration,
    /// Return once the request is durable; the run ends all the same
    #[arg(long)]
    pub no_block: bool,
}

/// `workflow abort`
#[derive(Debug, Args)]
pub(super) struct Abort {
    /// The run: its id or the last digits of it
    pub run: OsString,
    /// Why; is kept with the run; at most 1 KiB
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub reason: Option<OsString>,
}

/// `workflow drain`
#[derive(Debug, Args)]
pub(super) struct Drain {
    /// The workflow, as `nervectl status` lists it
    #[arg(value_name = "NAME")]
    pub workflow: OsString,
    /// After this time end the runs that are left (interrupted, 130); without it they take as long as they take
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Return when the worker that was there is gone, also across restarts of nerve
    ///
    /// Interrupted, nervectl goes and the drain stays in force.
    #[arg(long)]
    pub wait: bool,
}

/// `workflow reset`
#[derive(Debug, Args)]
pub(super) struct Reset {
    /// The workflow, as `nervectl status` lists it
    #[arg(value_name = "NAME")]
    pub workflow: OsString,
}

/// `pause`
#[derive(Debug, Args)]
pub(super) struct Pause {
    /// Why; is shown by `nervectl status`; at most 1 KiB
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub reason: Option<OsString>,
}

/// `status`
#[derive(Debug, Args)]
pub(super) struct Status {
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// `thread`
#[derive(Debug, Args)]
pub(super) struct Thread {
    /// The run: its id or the last digits of it; inside a role, that role's
    pub run: Option<OsString>,
    /// The newest N rounds, without the start; without it all, the start (round 0) first
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<u32>,
    /// Only what is older than this round; 0 is no bound
    #[arg(long, value_name = "ROUND", conflicts_with = "follow")]
    pub before: Option<u32>,
    /// Go on with the rounds that come until the run has ended, also across restarts of nerve
    #[arg(short, long)]
    pub follow: bool,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// `events`
#[derive(Debug, Args)]
pub(super) struct Events {
    /// Only events of this source
    #[arg(long, value_name = "SOURCE", value_parser = PossibleValuesParser::new(SOURCES))]
    pub source: Option<String>,
    /// Only events of this type, such as `ended` or `kill`
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<String>,
    /// Only events about this: a run's id or its last digits, a workflow, a day, or `nerve`
    #[arg(long = "ref", value_name = "ID")]
    pub reference: Option<String>,
    /// Only events of then or later: -1h, yesterday, "2026-11-20 10:36", …, see systemd.time(7)
    #[arg(long, value_name = "WHEN", value_parser = moment, allow_hyphen_values = true)]
    pub since: Option<u64>,
    /// Only events of then or earlier
    #[arg(long, value_name = "WHEN", value_parser = moment, allow_hyphen_values = true, conflicts_with = "follow")]
    pub until: Option<u64>,
    /// The newest N; without it all, or with -f and without --since the newest 10
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<u32>,
    /// Go on with what comes, also across restarts of nerve, until interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// Events of archived days too
    #[arg(long)]
    pub archived: bool,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = EventFormat::Table)]
    pub output: EventFormat,
}

/// How events are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum EventFormat {
    /// For people
    Table,
    /// An array of objects; times in µs since the epoch
    Json,
    /// The same objects, one a line, as the archive has them
    Jsonl,
}

/// `logs`
#[derive(Debug, Args)]
pub(super) struct Logs {
    /// The run: its id or the last digits of it
    pub run: OsString,
    /// Go on with what comes, until interrupted
    #[arg(short, long)]
    pub follow: bool,
    /// The newest N lines; without it all of the run
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<u32>,
}

/// `validate`
#[derive(Debug, Args)]
pub(super) struct Validate {
    /// The files, `-` for standard input; without any, all that nerve would read, and whether it would trust them
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Exit 65 for warnings too, for where nobody reads them
    #[arg(long)]
    pub strict: bool,
    /// For people on stderr, or as an array on stdout
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
}

/// `init`
#[derive(Debug, Args)]
pub(super) struct Init {
    /// Where; it is made if it is not there
    #[arg(value_name = "DIR", default_value = ".")]
    pub directory: PathBuf,
    /// Replace what is there already
    #[arg(long)]
    pub force: bool,
}

/// `convert`
#[derive(Debug, Args)]
pub(super) struct Convert {
    /// The definition, version 1 of its format, or - for stdin
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// `install`
#[derive(Debug, Args)]
pub(super) struct Install {
    /// The workspace: its nerve.yaml and its workflows/*.yaml; its name is the directory's
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Only show what would change
    #[arg(long)]
    pub dry_run: bool,
    /// Replace files too that did not come from the workspace
    #[arg(long)]
    pub force: bool,
}

/// A moment as systemd.time(7) writes timestamps: µs since the epoch.
fn moment(text: &str) -> Result<u64, String> {
    parse_moment(text, super::now(), &TimeZone::system())
}

fn status(text: &str) -> Result<RunStatus, String> {
    let all = RunStatus::ALL.map(RunStatus::as_str).join(", ");
    text.parse().map_err(|_| format!("it is one of {all}"))
}

fn grace(text: &str) -> Result<Duration, String> {
    let grace = parse_duration(text)?;
    if grace > limits::MAX_GRACE {
        return Err(format!("at most {} s", limits::MAX_GRACE.as_secs()));
    }
    Ok(grace)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::status::RunResult;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_form_is_accepted() {
        for line in [
            "nervectl workflow start a -p text --max-rounds 3 --wait",
            "nervectl workflow start a -p -text",
            "nervectl workflow start a --prompt-file -",
            "nervectl workflow start a --dry-run -f",
            "nervectl workflow try a.yaml -p text --max-rounds 3 --dry-run",
            "nervectl workflow try - --prompt-file p",
            "nervectl workflow list",
            "nervectl workflow list a --active -n 5 -o json",
            "nervectl workflow list --status failed --status killed --exit-code 1",
            "nervectl workflow list --since -1h --until now --before 3fa9 -n 100000",
            "nervectl events",
            "nervectl events --source audit --type kill --ref 3fa9 --since -1d --until now",
            "nervectl events -n 0 -f -o jsonl",
            "nervectl thread 3fa9 --before 7 -n 0",
            "nervectl thread 3fa9 -n 1 -f",
            "nervectl thread -n 1 -o json",
            "nervectl workflow show 3fa9 -o json",
            "nervectl workflow kill 3fa9 77e0 --reason why --grace 5s --no-block",
            "nervectl thread 3fa9 -n 3 -o json",
            "nervectl logs 3fa9 -f",
            "nervectl validate",
            "nervectl validate a.yaml b.yaml",
            "nervectl validate --strict -o json -",
            "nervectl convert -",
            "nervectl init",
            "nervectl init a --force",
            "nervectl install . --dry-run --force",
            "nervectl status",
            "nervectl status -o json",
            "nervectl workflow start a --key ticket-4711",
            "nervectl workflow abort 3fa9 --reason -why",
            "nervectl workflow drain a",
            "nervectl workflow drain a --timeout 2h --wait",
            "nervectl workflow reset a",
            "nervectl pause",
            "nervectl pause --reason why",
            "nervectl resume",
            "nervectl reload",
            "nervectl blob put -",
            "nervectl blob get ab",
            "nervectl blob exists ab",
            "nervectl blob list -o json",
            "nervectl store check -o json",
            "nervectl store backup /srv/nerve.db",
            "nervectl store archive",
            "nervectl store archive --older-than 30d --max-days 3 --vacuum -o json",
            "nervectl store archive --dry-run",
            "nervectl store restore 2026-11-20",
            "nervectl store import logs.db",
            "nervectl store import logs.db --blobs blobs --archive archive/logs",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn what_is_out_of_range_is_a_usage_error() {
        for line in [
            "nervectl",
            "nervectl workflow",
            "nervectl workflow start",
            "nervectl workflow start a -p x --prompt-file y",
            "nervectl workflow start a --max-rounds 0",
            "nervectl workflow start a --max-rounds 10001",
            "nervectl workflow list -n 0",
            "nervectl workflow list -o yaml",
            "nervectl workflow kill",
            "nervectl workflow kill 3fa9 --grace soon",
            "nervectl workflow kill 3fa9 --grace 3601s",
            "nervectl thread 3fa9 --before 7 -f",
            "nervectl thread 3fa9 -n -1",
            "nervectl workflow list --status ended",
            "nervectl workflow list --exit-code 256",
            "nervectl workflow list --since soon",
            "nervectl events a",
            "nervectl events --source me",
            "nervectl events --until now -f",
            "nervectl events -o text",
            "nervectl workflow abort",
            "nervectl workflow abort 3fa9 77e0",
            "nervectl workflow drain",
            "nervectl workflow drain a --timeout soon",
            "nervectl workflow reset",
            "nervectl pause why",
            "nervectl resume now",
            "nervectl reload a",
            "nervectl blob put",
            "nervectl blob get",
            "nervectl store",
            "nervectl store backup",
            "nervectl store",
            "nervectl store archive --older-than soon",
            "nervectl store archive --max-days 0",
            "nervectl store archive --dry-run --vacuum",
            "nervectl store restore",
            "nervectl store import",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn the_default_age_is_the_stores() {
        let Ok(Cli {
            command: Command::Store(Store::Archive(archive)),
        }) = parse("nervectl store archive")
        else {
            panic!("is an archive");
        };
        let age_us = u128::from(limits::ARCHIVE_AGE_US);
        assert_eq!(archive.older_than.as_micros(), age_us);
    }

    #[test]
    fn the_default_grace_is_the_engines() {
        let Ok(Cli {
            command: Command::Workflow(Workflow::Kill(kill)),
        }) = parse("nervectl workflow kill 3fa9")
        else {
            panic!("is a kill");
        };
        assert_eq!(kill.grace, limits::DEFAULT_GRACE);
    }

    const MANUAL: &str = include_str!("../../man/nervectl.1");

    #[test]
    fn every_verb_and_option_is_in_the_manual() {
        fn check(command: &clap::Command, verb: &str) {
            for option in command
                .get_arguments()
                .filter(|argument| !argument.is_positional())
            {
                let long = option.get_long().unwrap();
                assert!(MANUAL.contains(&format!("Fl -{long}")), "{verb} --{long}");
                if let Some(short) = option.get_short() {
                    assert!(MANUAL.contains(&format!("Fl {short}")), "{verb} -{short}");
                }
            }
            for command in command.get_subcommands() {
                let verb = format!("{verb} {}", command.get_name());
                if !command.has_subcommands() {
                    assert!(MANUAL.contains(&format!("Cm{verb}")), "{verb}");
                }
                check(command, &verb);
            }
        }
        check(&Cli::command(), "");
    }

    #[test]
    fn every_status_and_exit_code_of_a_run_is_in_the_manual() {
        for status in RunStatus::ALL {
            assert!(MANUAL.contains(&format!("\n.It {status} Ta")), "{status}");
        }
        for word in [
            "success",
            "exec-failed",
            "role-timeout",
            "oom-kill",
            "reply-too-large",
            "template-error",
            "max-rounds",
            "timeout",
            "drained",
            "imported",
            "killed",
            "aborted",
            "queue-full",
            "blocked",
            "removed",
            "worker-died",
            "start-limit-hit",
            "unit-refused",
            "thread-damaged",
            "exit-code:1",
            "signal:SIGSEGV",
            "no-route:retry",
            "worker-exit:1",
        ] {
            let (status, code) = word.parse::<RunResult>().unwrap().end();
            let row = format!("\n.It {status} Ta {code} Ta ");
            let shown = word.split(':').next().unwrap();
            assert!(
                MANUAL.contains(&row) && MANUAL.contains(shown),
                "{status} {code} {word}"
            );
        }
    }
}
