//! The verbs that steer workers and nerve itself: `workflow abort`, `workflow drain`, `workflow reset`, `pause`,
//! `resume`, `reload`.

use super::cli::{Abort, Drain, Pause, Reset};
use super::start::interrupts;
use super::wait::until_gone;
use super::{BROKEN, Failure, Settings, input, note};
use crate::bus::client::Client;
use crate::bus::error::CallError;
use crate::model::name::WorkflowName;

/// Ends a run when its round is done.
pub(super) async fn abort(settings: &Settings, arguments: &Abort) -> Result<u8, Failure> {
    let tail = input::run(&arguments.run)?;
    let reason = input::reason(arguments.reason.as_deref())?;
    let client = settings.connect().await?;
    let aborted = client.abort(&tail, &reason).await;
    aborted.map_err(|error| unknown(error, &format!("`nervectl workflow show {tail}` tells")))?;
    Ok(0)
}

/// Has a workflow's worker replaced, and waits until it is gone if that is wanted.
pub(super) async fn drain(settings: &Settings, arguments: &Drain) -> Result<u8, Failure> {
    let workflow = input::workflow(&arguments.workflow)?;
    let client = settings.connect().await?;
    if !arguments.wait {
        request_drain(&client, &workflow, arguments).await?;
        return Ok(0);
    }
    let all = async {
        // Before the drain: the worker that comes after it is not waited for.
        let invocation = invocation(&client, &workflow).await?;
        request_drain(&client, &workflow, arguments).await?;
        match invocation {
            Some(invocation) => {
                let gone = until_gone(settings, client, &workflow, &invocation);
                Ok(gone.await?)
            }
            None => Ok(()),
        }
    };
    match interrupts()?.or(all).await {
        Ok(done) => done.map(|()| 0),
        Err(status) => Err(Failure::Interrupted {
            status,
            text: "the drain stays in force; `nervectl status` shows the worker".to_owned(),
        }),
    }
}

async fn request_drain(
    client: &Client,
    workflow: &WorkflowName,
    arguments: &Drain,
) -> Result<(), Failure> {
    let done = client.drain(workflow, arguments.timeout).await;
    done.map_err(|error| unknown(error, "draining once more does no harm"))
}

/// The worker that a workflow has.
async fn invocation(client: &Client, workflow: &WorkflowName) -> Result<Option<String>, CallError> {
    let status = client.status().await?;
    let mut all = status.workflows.into_iter();
    let known = all.find(|known| known.name == workflow.as_str());
    Ok(known.and_then(|known| known.invocation))
}

/// Forgets a workflow's deaths, block and stop.
pub(super) async fn reset(settings: &Settings, arguments: &Reset) -> Result<u8, Failure> {
    let workflow = input::workflow(&arguments.workflow)?;
    let client = settings.connect().await?;
    let done = client.reset(&workflow).await;
    done.map_err(|error| unknown(error, "resetting it once more does no harm"))?;
    Ok(0)
}

/// Lets nothing leave a queue any more.
pub(super) async fn pause(settings: &Settings, arguments: &Pause) -> Result<u8, Failure> {
    let reason = input::reason(arguments.reason.as_deref())?;
    let client = settings.connect().await?;
    let done = client.pause(&reason).await;
    done.map_err(|error| unknown(error, "`nervectl status` tells"))?;
    Ok(0)
}

/// Ends the pause.
pub(super) async fn resume(settings: &Settings) -> Result<u8, Failure> {
    let done = settings.connect().await?.resume().await;
    done.map_err(|error| unknown(error, "`nervectl status` tells"))?;
    Ok(0)
}

/// Takes new definitions; what is wrong with those that cannot be taken is said.
pub(super) async fn reload(settings: &Settings) -> Result<u8, Failure> {
    let done = settings.connect().await?.reload().await;
    let errors = done.map_err(|error| unknown(error, "reloading once more does no harm"))?;
    for error in &errors {
        note(error.trim_end());
    }
    Ok(if errors.is_empty() { 0 } else { BROKEN })
}

/// A change whose answer was lost may be in force.
pub(super) fn unknown(error: CallError, what_to_do: &str) -> Failure {
    match error {
        CallError::Lost(cause) => {
            Failure::Unknown(format!("the answer is unknown: {cause}; {what_to_do}"))
        }
        error => error.into(),
    }
}
