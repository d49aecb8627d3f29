//! The verbs that only look: `workflow list`, `workflow show`, `logs`, `status`.

use std::fmt::Write as _;
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::cli::{Format, List, ListFormat, Logs, Show, Status};
use super::paper::Paper;
use super::start::waits;
use super::{Failure, Settings, input, is_terminal, json, note, now, print, render, render_status};
use crate::bus::client::{ListFilter, Run};
use crate::bus::error::CallError;
use crate::model::name::{RunId, WorkflowName};

/// `nervectl workflow list`
pub(super) async fn list(settings: &Settings, arguments: &List) -> Result<u8, Failure> {
    input::window(arguments.since, arguments.until)?;
    let workflow = arguments.workflow.as_deref();
    let workflow = workflow.map(input::workflow).transpose()?;
    let before = arguments.before.as_deref().map(input::run).transpose()?;
    let statuses = arguments.status.iter().map(ToString::to_string).collect();
    let filter = ListFilter {
        workflow: workflow.map(String::from),
        active: arguments.active.then_some(true),
        statuses: Some(statuses),
        exit_code: arguments.exit_code,
        since: arguments.since,
        until: arguments.until,
        before,
        limit: Some(arguments.lines),
    };
    let runs = settings.connect().await?.list(filter.clone()).await?;
    match arguments.output {
        ListFormat::Json => print(&json::list(&runs))?,
        ListFormat::Table => {
            print(&render::list(&runs, now(), Paper::stdout()))?;
            let is_full = u32::try_from(runs.len()).is_ok_and(|count| count >= arguments.lines);
            if let Some(last) = runs.last().filter(|_| is_full && is_terminal()) {
                note(&format!(
                    "\nThose before them: {}",
                    next_page(&filter, &last.run)
                ));
            }
        }
    }
    Ok(0)
}

/// The command that lists what comes after this run. Times are moments, so that the pages fit together whenever they are
/// asked for.
fn next_page(filter: &ListFilter, last: &str) -> String {
    let mut command = "nervectl workflow list".to_owned();
    let mut add = |option: &str, value: &str| {
        let _ = write!(command, "{option}{value}");
    };
    if let Some(workflow) = &filter.workflow {
        add(" ", workflow);
    }
    if filter.active == Some(true) {
        add(" --active", "");
    }
    for status in filter.statuses.iter().flatten() {
        add(" --status ", status);
    }
    if let Some(code) = filter.exit_code {
        add(" --exit-code ", &code.to_string());
    }
    for (option, at) in [(" --since @", filter.since), (" --until @", filter.until)] {
        if let Some(at) = at {
            add(option, &format!("{}.{:06}", at / 1_000_000, at % 1_000_000));
        }
    }
    if let Some(lines) = filter.limit {
        add(" -n ", &lines.to_string());
    }
    add(" --before ", render::short(last));
    command
}

/// `nervectl workflow show`
pub(super) async fn show(settings: &Settings, arguments: &Show) -> Result<u8, Failure> {
    let tail = input::run(&arguments.run)?;
    let client = settings.connect().await?;
    let run = client.run(&tail).await?;
    let waits = waits(&client, &run).await;
    match arguments.output {
        Format::Json => print(&json::show(&run, waits))?,
        Format::Text => print(&render::show(&run, waits, now(), Paper::stdout()))?,
    }
    Ok(0)
}

/// `nervectl status`
pub(super) async fn status(settings: &Settings, arguments: &Status) -> Result<u8, Failure> {
    let status = settings.connect().await?.status().await?;
    match arguments.output {
        Format::Json => print(&json::status(&status))?,
        Format::Text => print(&render_status::status(&status, now(), Paper::stdout()))?,
    }
    Ok(0)
}

/// `nervectl logs`: becomes journalctl, whose exit status is the answer.
pub(super) async fn logs(settings: &Settings, arguments: &Logs) -> Result<u8, Failure> {
    let tail = input::run(&arguments.run)?;
    let run = settings.connect().await?.run(&tail).await?;
    let error = journalctl(&run, arguments)?.exec();
    Err(Failure::Internal(format!("cannot run journalctl: {error}")))
}

/// The journal of one run: what its worker's unit and nerve itself wrote about it.
fn journalctl(run: &Run, arguments: &Logs) -> Result<Command, Failure> {
    let misunderstood = || CallError::Misunderstood(zbus::Error::InvalidReply);
    let id: RunId = run.run.parse().map_err(|_| misunderstood())?;
    let workflow: WorkflowName = run.workflow.parse().map_err(|_| misunderstood())?;
    let of_run = format!("NERVE_RUN_ID={id}");
    let mut command = Command::new("journalctl");
    command.args(["--quiet", "--output=short"]);
    if !is_terminal() {
        command.arg("--no-pager");
    }
    if arguments.follow {
        command.arg("--follow");
    }
    match arguments.lines {
        // Without a beginning: journalctl of systemd 252 would count the lines from there on.
        Some(lines) => command.arg(format!("--lines={lines}")),
        None => {
            // A second earlier: the two clocks are read at different places, and the journal's index is coarse.
            let since = (run.created_at / 1_000_000).saturating_sub(1);
            command.arg(format!("--since=@{since}"));
            if arguments.follow {
                command.arg("--no-tail");
            }
            &mut command
        }
    };
    command.args([
        &format!("_SYSTEMD_UNIT={}", workflow.unit()),
        &of_run,
        "+",
        "_SYSTEMD_UNIT=nerve.service",
        &of_run,
    ]);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::render::tests::ended;

    fn arguments(run: &Run, logs: &Logs) -> Vec<String> {
        let command = journalctl(run, logs).unwrap();
        command
            .get_args()
            .map(|argument| argument.to_string_lossy().into_owned())
            .filter(|a| a != "--no-pager")
            .collect()
    }

    #[test]
    fn the_next_page_is_a_command_that_says_all_of_the_list() {
        let filter = ListFilter {
            workflow: Some("a".to_owned()),
            active: Some(true),
            statuses: Some(vec!["queued".to_owned(), "started".to_owned()]),
            exit_code: Some(2),
            since: Some(1_795_170_982_000_007),
            until: None,
            before: Some("77e0".to_owned()),
            limit: Some(50),
        };
        assert_eq!(
            next_page(&filter, &ended().run),
            "nervectl workflow list a --active --status queued --status started --exit-code 2 --since @1795170982.000007 \
             -n 50 --before 3fa9c1d2"
        );
    }

    #[test]
    fn logs_asks_the_journal_for_that_run_alone() {
        let logs = Logs {
            run: "3fa9".into(),
            follow: true,
            lines: None,
        };
        assert_eq!(
            arguments(&ended(), &logs),
            [
                "--quiet",
                "--output=short",
                "--follow",
                "--since=@1795170981",
                "--no-tail",
                "_SYSTEMD_UNIT=nerve-wf@fix-failing-test.service",
                "NERVE_RUN_ID=0193000000007000800000003fa9c1d2",
                "+",
                "_SYSTEMD_UNIT=nerve.service",
                "NERVE_RUN_ID=0193000000007000800000003fa9c1d2",
            ]
        );
        let logs = Logs {
            run: "3fa9".into(),
            follow: false,
            lines: Some(5),
        };
        let newest = arguments(&ended(), &logs);
        assert!(newest.contains(&"--lines=5".to_owned()));
        assert!(
            !newest
                .iter()
                .any(|argument| argument.starts_with("--since"))
        );
    }

    #[test]
    fn logs_hands_no_odd_name_to_journalctl() {
        let run = Run {
            workflow: "a.service -x".to_owned(),
            ..ended()
        };
        assert!(
            journalctl(
                &run,
                &Logs {
                    run: "3fa9".into(),
                    follow: false,
                    lines: None
                }
            )
            .is_err()
        );
    }
}
