//! `nervectl workflow start`

use std::io;

use super::cli::Start;
use super::wait::{Interrupts, until_ended};
use super::{Failure, Settings, input, note, print, render};
use crate::bus::client::{Run, StartOptions};
use crate::bus::error::CallError;
use crate::model::name::RunId;
use crate::model::status::Status;

/// Starts a run, prints its id, and with `--wait` follows it to its end.
pub(super) async fn start(settings: &Settings, arguments: &Start) -> Result<u8, Failure> {
    let workflow = input::workflow(&arguments.workflow)?;
    let prompt = input::prompt(arguments)?;
    let client = settings.connect().await?;
    let options = StartOptions {
        max_rounds: arguments.max_rounds,
    };
    let id = client.start(workflow.as_str(), &prompt, options).await.map_err(|error| match error {
        CallError::Lost(cause) => Failure::Unknown(format!(
            "the answer is unknown: {cause}; look with `nervectl workflow list {workflow}` before you start it again"
        )),
        error => error.into(),
    })?;
    // Before the id is out, so that who reads it may interrupt us at once.
    let interrupts = if arguments.wait {
        Some(interrupts()?)
    } else {
        None
    };
    announce(id)?;
    let Some(mut interrupts) = interrupts else {
        // The run is durable; asking whether it was dropped on the spot is a courtesy that may fail.
        return match client.run(&id.to_string()).await {
            Ok(run) if run.status == Status::Dropped.as_str() => Ok(report(&run)),
            _ => Ok(0),
        };
    };
    match interrupts.or(until_ended(settings, client, id)).await {
        Ok(run) => Ok(report(&run?)),
        Err(status) => {
            let run = id.short();
            let text = format!(
                "run {run} goes on; `nervectl logs -f {run}` follows it, `nervectl workflow kill {run}` ends it"
            );
            Err(Failure::Interrupted { status, text })
        }
    }
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
