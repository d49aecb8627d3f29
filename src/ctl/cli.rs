//! The command line: what can be typed, and the texts that teach it. Checks here what needs no daemon and no file.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::time::parse_duration;
use crate::model::limits;

const EXIT_STATUSES: &str = "\
Exit status:
   0  success                       69  nerve or the system bus is not there
  64  usage                         70  internal error
  65  bad definition or input       74  the answer is unknown: look, then repeat
  66  unknown workflow or run       75  the run was dropped
  67  more than one run is meant    77  not permitted
  68  the run had ended, or is being ended, already
  `workflow start --wait` exits with the run's own exit code: 0 completed,
  1 failed, 2 out of rounds, 124 timed out, 130 interrupted, 137 killed,
  143 aborted, 255 crashed.
  nervectl(1) has the whole table.";

/// Start, watch and end durable workflows.
///
/// A workflow is a file, such as /etc/nerve/workflows/NAME.yaml; a run is one execution of it. RUN is a run's id or its
/// last digits, as many as tell it apart from all others. Only root may use nervectl, but for `validate`.
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
    Thread(Thread),
    /// Show the journal of a run alone
    ///
    /// What the run's roles wrote to stderr and what nerve says about the run, from the journal, by journalctl.
    Logs(Logs),
    /// Check definitions; needs no daemon
    ///
    /// Prints `NAME: ok` for each that is right; what is wrong goes to stderr as PATH:LINE:COLUMN. Exits 65 when
    /// anything is wrong; warnings alone are right.
    Validate(Validate),
    /// Show nerve itself: what runs, what waits and why, and which definitions are broken
    Status(Status),
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

/// What can be done with runs.
#[derive(Debug, Subcommand)]
pub(super) enum Workflow {
    /// Start a run; prints its id
    ///
    /// The id is printed alone, on stdout, as soon as the run is durable: from then on it ends in exactly one status,
    /// whatever happens to nerve or the machine.
    Start(Start),
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

/// `workflow start`
#[derive(Debug, Args)]
pub(super) struct Start {
    /// The workflow, as `nervectl status` lists it
    #[arg(value_name = "NAME")]
    pub workflow: OsString,
    /// What the run is about: `start.content` in the roles' prompts; at most 1 MiB
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<OsString>,
    /// Read the prompt from a file, or from stdin (-); at most 1 MiB
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    /// Rounds that the run may take; when it needs one more it ends (failed, 2). Without it the definition says
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::MAX_ROUNDS)))]
    pub max_rounds: Option<u32>,
    /// Start it once only: when a run of the workflow has this key already, that run is the answer; at most 128 bytes
    ///
    /// A run that has it and was started with another prompt is an error (65).
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    pub key: Option<OsString>,
    /// Wait for the run's end, also across restarts of nerve, and exit with its exit code
    ///
    /// Interrupted, nervectl goes and the run stays.
    #[arg(long)]
    pub wait: bool,
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
    /// The newest so many, at most 10000
    #[arg(short = 'n', long, value_name = "N", default_value_t = 50)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::LIST_ROWS)))]
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
    /// The run: its id or the last digits of it
    pub run: OsString,
    /// The newest N rounds, without the start; without it all, the start (round 0) first
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub lines: Option<u32>,
    /// How to print it
    #[arg(short, long, value_enum, default_value_t = Format::Text)]
    pub output: Format,
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
    /// The files; without any, all that nerve would read, and whether it would trust them
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
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
    use crate::model::status::{RunResult, Status as RunStatus};
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
            "nervectl workflow list",
            "nervectl workflow list a --active -n 5 -o json",
            "nervectl workflow show 3fa9 -o json",
            "nervectl workflow kill 3fa9 77e0 --reason why --grace 5s --no-block",
            "nervectl thread 3fa9 -n 3 -o json",
            "nervectl logs 3fa9 -f",
            "nervectl validate",
            "nervectl validate a.yaml b.yaml",
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
            "nervectl thread 3fa9 -n 0",
            "nervectl workflow abort",
            "nervectl workflow abort 3fa9 77e0",
            "nervectl workflow drain",
            "nervectl workflow drain a --timeout soon",
            "nervectl workflow reset",
            "nervectl pause why",
            "nervectl resume now",
            "nervectl reload a",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
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
            "killed",
            "aborted",
            "queue-full",
            "blocked",
            "removed",
            "worker-died",
            "start-limit-hit",
            "unit-refused",
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
