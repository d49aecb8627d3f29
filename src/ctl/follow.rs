//! A run as it goes on: each round when it is done, and on a terminal a line below that moves while nothing is said.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::time::Duration;

use tokio::time::{Instant, interval};

use super::paper::Paper;
use super::text::span;
use super::wait::until;
use super::{Failure, Settings, print, render};
use crate::bus::client::{Client, EventFilter, Round, Run, Subject, ThreadOptions};
use crate::bus::error::CallError;
use crate::model::name::RunId;

/// The run, once it has ended; its rounds are shown as they happen. That nobody reads them is no reason not to wait.
pub(super) async fn until_ended(
    settings: &Settings,
    client: Client,
    id: RunId,
) -> Result<Run, Failure> {
    let spinner = Spinner::new();
    let beginning = Run {
        run: id.to_string(),
        ..Run::default()
    };
    let mut followed = Followed {
        spinner: Some(&spinner),
        ..Followed::of(&beginning)
    };
    let look = async |client: &Client| followed.look(client).await;
    tokio::select! {
        end = until(settings, client, &Subject::Log, look) => end?,
        never = spinner.spin() => match never {},
    }
}

/// How far one has come with a run.
pub(super) struct Followed<'a> {
    run: String,
    /// Whether nerve has been asked since.
    has_looked: bool,
    /// The newest of its events that was seen.
    position: u64,
    /// The newest round that was shown, or is not to be.
    round: u32,
    /// When the next round began.
    since: Option<u64>,
    is_shown: bool,
    /// Who waits for the end has one, and wants to know how long each round took rather than when it was.
    spinner: Option<&'a Spinner>,
}

impl Followed<'_> {
    /// From here on.
    pub(super) fn of(run: &Run) -> Self {
        let newest = run.events.as_ref().and_then(|events| events.last());
        Self {
            run: run.run.clone(),
            has_looked: false,
            position: newest.map_or(0, |event| event.seq),
            round: run.rounds,
            since: None,
            is_shown: false,
            spinner: None,
        }
    }

    /// Shows what is new, if anything is; gives the run when that was the last. The first look never says that nothing is
    /// new: the events of a run that ended long ago are in the archive.
    pub(super) async fn look(
        &mut self,
        client: &Client,
    ) -> Result<Option<Result<Run, Failure>>, CallError> {
        let mut position = self.position;
        loop {
            let filter = EventFilter {
                reference: Some(self.run.clone()),
                after: Some(position),
                ..EventFilter::default()
            };
            let (_, next) = client.events(filter).await?;
            if next <= position {
                break;
            }
            position = next;
        }
        if position == self.position && self.has_looked {
            return Ok(None);
        }
        // Before its thread: one that has ended says no more.
        let run = client.run(&self.run).await?;
        let options = ThreadOptions {
            after: Some(self.round),
            ..ThreadOptions::default()
        };
        let rounds = client.thread(&self.run, &options).await?;
        self.since = self.since.or(run.started_at);
        if let Err(failure) = self.show(&rounds) {
            return Ok(Some(Err(failure)));
        }
        if let Some(spinner) = self.spinner {
            spinner.say(&run, self.round);
        }
        (self.has_looked, self.position) = (true, position);
        Ok(run.end().is_some().then_some(Ok(run)))
    }

    /// Shows these rounds.
    pub(super) fn show(&mut self, rounds: &[Round]) -> Result<(), Failure> {
        let Some(last) = rounds.last() else {
            return Ok(());
        };
        let separator = if self.is_shown { "\n" } else { "" };
        let text = match self.spinner {
            None => render::thread(rounds, render::moment, Paper::stdout()),
            Some(spinner) => {
                spinner.erase();
                let mut since = self.since;
                let took = |round: &Round| {
                    let began = since.replace(round.timestamp).unwrap_or(round.timestamp);
                    span(round.timestamp.saturating_sub(began))
                };
                render::thread(rounds, took, Paper::stdout())
            }
        };
        (self.is_shown, self.round) = (true, self.round.max(last.round));
        self.since = Some(last.timestamp);
        match print(&format!("{separator}{text}")) {
            Err(Failure::Output(error))
                if self.spinner.is_some() && error.kind() == ErrorKind::BrokenPipe =>
            {
                Ok(())
            }
            done => done,
        }
    }
}

/// The line at the bottom of a terminal that says what goes on, and for how long. Where stderr is no terminal it is not
/// there.
struct Spinner {
    text: RefCell<String>,
    since: Cell<Instant>,
    is_there: bool,
}

impl Spinner {
    const FRAMES: [char; 4] = ['|', '/', '-', '\\'];
    const FRAME: Duration = Duration::from_millis(200);

    fn new() -> Self {
        Self {
            text: RefCell::default(),
            since: Cell::new(Instant::now()),
            is_there: io::stderr().is_terminal(),
        }
    }

    /// What goes on from now.
    fn say(&self, run: &Run, round: u32) {
        let status = render::status_word(run);
        let text = match run.started_at {
            Some(_) => format!("{status}, round {}", round + 1),
            None => status,
        };
        self.text.replace(text);
        self.since.set(Instant::now());
    }

    /// Moves for ever.
    async fn spin(&self) -> Infallible {
        if !self.is_there {
            return std::future::pending().await;
        }
        let mut tick = interval(Self::FRAME);
        let mut frame = 0;
        loop {
            tick.tick().await;
            frame = (frame + 1) % Self::FRAMES.len();
            let seconds = self.since.get().elapsed().as_secs();
            let text = self.text.borrow();
            if !text.is_empty() {
                let (frame, time) = (Self::FRAMES[frame], span(seconds * 1_000_000));
                self.write(&format!("\r{frame} {text}, {time}\x1b[K"));
            }
        }
    }

    fn erase(&self) {
        self.write("\r\x1b[K");
    }

    fn write(&self, text: &str) {
        if self.is_there {
            // Nobody can be told when stderr is gone.
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.erase();
    }
}
