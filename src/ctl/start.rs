//! `nervectl workflow start`

use std::io;

use super::cli::Start;
use super::control::unknown;
use super::text::line;
use super::wait::{Interrupts, until_ended};
use super::{Failure, Settings, follow, input, note, now, print, render};
use crate::bus::client::{Client, Run, StartOptions, Started};
use crate::model::name::RunId;
use crate::model::status::Status;

/// Exit code of a run that was dropped.
const DROPPED: u8 = 75;

/// Starts a run, prints its id, and with `--wait` or `--follow` stays until its end.
pub(super) async fn start(settings: &Settings, arguments: &Start) -> Result<u8, Failure> {
    let workflow = input::workflow(&arguments.workflow)?;
    let prompt = input::prompt(&arguments.prompt)?;
    let key = input::key(arguments.key.as_deref())?;
    let what_to_do = match key {
        Some(_) => "starting it again with the same key does no harm".to_owned(),
        None => format!("look with `nervectl workflow list {workflow}` before you start it again"),
    };
    let client = settings.connect().await?;
    let options = StartOptions {
        max_rounds: arguments.max_rounds,
        // One that does not know the option has to be asked for it only when it is wanted.
        dry_run: arguments.dry_run.then_some(true),
        key,
    };
    let started = client.start(workflow.as_str(), &prompt, options).await;
    let Started {
        run: id,
        dropped,
        warning,
    } = started.map_err(|error| unknown(error, &what_to_do))?;
    // Before the id is out, so that who reads it may interrupt us at once.
    let interrupts = if arguments.wait || arguments.follow {
        Some(interrupts()?)
    } else {
        None
    };
    announce(id)?;
    if let Some(warning) = warning {
        note(&line(&warning));
    }
    if let Some(dropped) = dropped {
        note(&render::dropped(id, &dropped));
        return Ok(DROPPED);
    }
    let Some(mut interrupts) = interrupts else {
        explain(&client, id).await;
        return Ok(0);
    };
    let ended = async {
        explain(&client, id).await;
        if arguments.follow {
            follow::until_ended(settings, client, id).await
        } else {
            Ok(until_ended(settings, client, id).await?)
        }
    };
    match interrupts.or(ended).await {
        Ok(run) => Ok(report(&run?)),
        Err(status) => {
            let run = id.short();
            let text = format!(
                "run {run} goes on; `nervectl thread -f {run}` follows it, `nervectl workflow kill {run}` ends it"
            );
            Err(Failure::Interrupted { status, text })
        }
    }
}

/// Says why the run does not start, when something is in its way. The run is durable: this is a courtesy that may fail.
async fn explain(client: &Client, id: RunId) {
    let Ok(run) = client.run(&id.to_string()).await else {
        return;
    };
    if run.status == Status::Queued.as_str()
        && let Some(why) = waits(client, &run).await
    {
        note(&format!("run {} waits: {why}", id.short()));
    }
}

/// Why a run that has not ended is not executed, when something is in its way.
pub(super) async fn waits(client: &Client, run: &Run) -> Option<String> {
    if run.end().is_some() {
        return None;
    }
    let status = client.status().await.ok()?;
    render::waits(run, &status, now())
}

/// The id alone on stdout. That nobody listens there is no reason not to wait.
fn announce(id: RunId) -> Result<(), Failure> {
    match print(&format!("{id}\n")) {
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(failure) => {
            note(&format!("run {id} has been started"));
            Err(failure)
        }
        Ok(()) => Ok(()),
    }
}

pub(super) fn interrupts() -> Result<Interrupts, Failure> {
    Interrupts::new().map_err(|error| Failure::Internal(format!("cannot handle signals: {error}")))
}

/// The run's exit code; what is not success is explained.
fn report(run: &Run) -> u8 {
    let code = run.end().unwrap_or(0);
    if code != 0 {
        note(&render::end(run));
    }
    code
}
