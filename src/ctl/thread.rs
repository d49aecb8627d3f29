//! `nervectl thread`: what the roles of a run said, and what they say as it goes on. Inside a role it reads the file that
//! the role was given, and asks nobody.

use std::env;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::cli::{Format, Thread};
use super::follow::Followed;
use super::paper::Paper;
use super::wait::{nobody_reads, until};
use super::{Failure, Settings, input, json, print, render};
use crate::bus::client::{Client, Round, Subject, ThreadOptions};

/// Where a role finds the file with its run's thread.
const THREAD: &str = "NERVE_THREAD";

/// Shows a thread, or a part of it, and with `-f` what comes until the run has ended.
pub(super) async fn thread(settings: &Settings, arguments: &Thread) -> Result<u8, Failure> {
    if arguments.follow && arguments.output == Format::Json {
        return Err(Failure::Usage(
            "an array has an end, and what is followed has none; leave -o json out".to_owned(),
        ));
    }
    let Some(run) = &arguments.run else {
        show(arguments, &own(arguments)?)?;
        return Ok(0);
    };
    let tail = input::run(run)?;
    let client = settings.connect().await?;
    let options = ThreadOptions {
        limit: arguments.lines,
        before: arguments.before,
        after: None,
    };
    if !arguments.follow {
        show(arguments, &client.thread(&tail, &options).await?)?;
        return Ok(0);
    }
    // Before the thread: what comes meanwhile is seen again, never missed.
    let run = client.run(&tail).await?;
    let rounds = client.thread(&run.run, &options).await?;
    let mut followed = Followed::of(&run);
    followed.show(&rounds)?;
    if run.end().is_some() {
        return Ok(0);
    }
    let look = async |client: &Client| followed.look(client).await;
    tokio::select! {
        end = until(settings, client, &Subject::Log, look) => end?.map(|_| 0),
        () = nobody_reads() => Ok(0),
    }
}

fn show(arguments: &Thread, rounds: &[Round]) -> Result<(), Failure> {
    match arguments.output {
        Format::Json => print(&json::thread(rounds)),
        Format::Text => print(&render::thread(rounds, render::moment, Paper::stdout())),
    }
}

/// The thread of the run that this is executed in.
fn own(arguments: &Thread) -> Result<Vec<Round>, Failure> {
    let Some(path) = env::var_os(THREAD) else {
        return Err(Failure::Usage(format!(
            "no run is named, and {THREAD} is not set, so this is no role of one; say which: `nervectl thread RUN`; \
             see `nervectl workflow list`, and `nervectl thread --help`"
        )));
    };
    if arguments.follow {
        return Err(Failure::Usage(
            "a thread does not grow while a role speaks; leave -f out, or name the run".to_owned(),
        ));
    }
    let path = Path::new(&path);
    let damaged = |why: String| {
        let path = path.display();
        Failure::Input(format!("{path}, the thread that {THREAD} names: {why}"))
    };
    let text = fs::read_to_string(path).map_err(|error| damaged(error.to_string()))?;
    let rounds = read(&text).map_err(|error| damaged(error.to_string()))?;
    Ok(part(rounds, arguments.lines, arguments.before))
}

/// A line of the file.
#[derive(Deserialize)]
struct Line {
    round: u32,
    role: String,
    content: String,
    meta: Map<String, Value>,
    timestamp: u64,
}

fn read(text: &str) -> serde_json::Result<Vec<Round>> {
    let round = |line: Line| Round {
        round: line.round,
        role: line.role,
        content: line.content,
        meta: Value::Object(line.meta).to_string(),
        timestamp: line.timestamp,
    };
    let lines = text.lines().map(serde_json::from_str::<Line>);
    lines.map(|line| line.map(round)).collect()
}

/// What nerve would answer: who counts rounds does not mean the start.
fn part(mut rounds: Vec<Round>, lines: Option<u32>, before: Option<u32>) -> Vec<Round> {
    let before = before.filter(|before| *before > 0).unwrap_or(u32::MAX);
    rounds.retain(|round| round.round < before && (lines.is_none() || round.round > 0));
    let wanted = lines.map_or(usize::MAX, |lines| lines as usize);
    rounds.split_off(rounds.len().saturating_sub(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_sees_the_same_parts_of_its_thread_as_everybody() {
        let line = r#"{"round":N,"role":"a","content":"","meta":{"status":"ok"},"timestamp":1}"#;
        let text = ["0", "1", "2", "3"]
            .map(|number| line.replace('N', number))
            .join("\n");
        let numbers = |lines, before| {
            let rounds = part(read(&text).unwrap(), lines, before);
            rounds.iter().map(|round| round.round).collect::<Vec<_>>()
        };
        assert_eq!(numbers(None, None), [0, 1, 2, 3]);
        assert_eq!(numbers(Some(9), None), [1, 2, 3]);
        assert_eq!(numbers(Some(2), None), [2, 3]);
        assert_eq!(numbers(Some(1), Some(3)), [2]);
        assert_eq!(numbers(None, Some(0)), [0, 1, 2, 3]);
        assert_eq!(numbers(Some(0), None), [0; 0]);
        assert_eq!(read(&text).unwrap()[0].meta, r#"{"status":"ok"}"#);
        assert!(read("{}\n").is_err());
    }
}
