//! `nervectl thread`: what the roles of a run said, and what they say as it goes on.

use super::cli::{Format, Thread};
use super::wait::{nobody_reads, until};
use super::{Failure, Settings, input, json, print, render};
use crate::bus::client::{Client, EventFilter, Round, Run, Subject, ThreadOptions};
use crate::bus::error::CallError;

/// The type of the event that a run has ended.
const ENDED: &str = "ended";

/// Shows a thread, or a part of it, and with `-f` what comes until the run has ended.
pub(super) async fn thread(settings: &Settings, arguments: &Thread) -> Result<u8, Failure> {
    let tail = input::run(&arguments.run)?;
    if arguments.follow && arguments.output == Format::Json {
        return Err(Failure::Usage(
            "an array has an end, and what is followed has none; leave -o json out".to_owned(),
        ));
    }
    let client = settings.connect().await?;
    let options = ThreadOptions {
        limit: arguments.lines,
        before: arguments.before,
        after: None,
    };
    if !arguments.follow {
        let rounds = client.thread(&tail, &options).await?;
        match arguments.output {
            Format::Json => print(&json::thread(&rounds))?,
            Format::Text => print(&render::thread(&rounds))?,
        }
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
        end = until(settings, client, &Subject::Log, look) => end?.map(|()| 0),
        () = nobody_reads() => Ok(0),
    }
}

/// How far one has come with a run.
struct Followed {
    run: String,
    /// The newest of its events that was seen.
    position: u64,
    /// The newest round that was shown, or is not to be.
    round: u32,
    is_shown: bool,
}

impl Followed {
    fn of(run: &Run) -> Self {
        let newest = run.events.as_ref().and_then(|events| events.last());
        Self {
            run: run.run.clone(),
            position: newest.map_or(0, |event| event.seq),
            round: run.rounds,
            is_shown: false,
        }
    }

    /// Shows what is new, if anything is; gives something when that was the last.
    async fn look(&mut self, client: &Client) -> Result<Option<Result<(), Failure>>, CallError> {
        let (mut position, mut has_ended) = (self.position, false);
        loop {
            let filter = EventFilter {
                reference: Some(self.run.clone()),
                after: Some(position),
                ..EventFilter::default()
            };
            let (events, next) = client.events(filter).await?;
            has_ended |= events.iter().any(|event| event.event_type == ENDED);
            if next <= position {
                break;
            }
            position = next;
        }
        if position == self.position {
            return Ok(None);
        }
        let options = ThreadOptions {
            after: Some(self.round),
            ..ThreadOptions::default()
        };
        let rounds = client.thread(&self.run, &options).await?;
        if let Err(failure) = self.show(&rounds) {
            return Ok(Some(Err(failure)));
        }
        self.position = position;
        Ok(has_ended.then_some(Ok(())))
    }

    fn show(&mut self, rounds: &[Round]) -> Result<(), Failure> {
        let Some(last) = rounds.last() else {
            return Ok(());
        };
        let separator = if self.is_shown { "\n" } else { "" };
        print(&format!("{separator}{}", render::thread(rounds)))?;
        (self.is_shown, self.round) = (true, self.round.max(last.round));
        Ok(())
    }
}
