//! `nervectl workflow kill`

use super::cli::Kill;
use super::control::unknown;
use super::start::interrupts;
use super::wait::until_ended;
use super::{Failure, Settings, complain, input, now, render};
use crate::bus::client::{Client, Run};
use crate::bus::error::{CallError, Error};
use crate::model::name::RunId;
use crate::model::status::Status;

/// What a request led to.
enum Request {
    /// It is durable.
    Accepted,
    /// The run was killed before.
    Superfluous,
}

/// Ends runs now. Interrupted, the kill stays in force.
pub(super) async fn kill(settings: &Settings, arguments: &Kill) -> Result<u8, Failure> {
    let reason = input::reason(arguments.reason.as_deref())?;
    let client = settings.connect().await?;
    if arguments.no_block {
        let mut first = 0;
        for run in &arguments.runs {
            let requested = match input::run(run) {
                Ok(tail) => request(&client, &tail, &reason, arguments).await,
                Err(failure) => Err(failure),
            };
            first = earlier(first, requested.map(drop));
        }
        return Ok(first);
    }
    let all = kill_and_wait(settings, &client, &reason, arguments);
    interrupts()?.or(all).await.map_err(|status| Failure::Interrupted {
        status,
        text: "the kill stays in force; `nervectl workflow list --active` shows what has not ended yet".to_owned(),
    })
}

/// Asks for the end of every run first, then waits for each; the first error, in the order typed, is the status.
async fn kill_and_wait(settings: &Settings, client: &Client, reason: &str, arguments: &Kill) -> u8 {
    let mut requests = Vec::new();
    for run in &arguments.runs {
        let requested = request_to_wait(client, run, reason, arguments).await;
        // Said at once: the waits may be long.
        requests.push(requested.map_err(|failure| earlier(0, Err(failure))));
    }
    let mut first = 0;
    for request in requests {
        let status = match request {
            Ok(None) => 0,
            Ok(Some(id)) => earlier(0, wait(settings, client, id).await),
            Err(status) => status,
        };
        if first == 0 {
            first = status;
        }
    }
    first
}

/// The first error's status; each is said when it happens.
fn earlier(first: u8, done: Result<(), Failure>) -> u8 {
    let Err(failure) = done else {
        return first;
    };
    complain(&failure);
    if first == 0 { failure.status() } else { first }
}

/// The run to wait for, unless it was killed before. The kill is asked for first, so that who may not kill is told so,
/// and the log says it; a name that means another run too by then is an error.
async fn request_to_wait(
    client: &Client,
    run: &std::ffi::OsStr,
    reason: &str,
    arguments: &Kill,
) -> Result<Option<RunId>, Failure> {
    let tail = input::run(run)?;
    if let Request::Superfluous = request(client, &tail, reason, arguments).await? {
        return Ok(None);
    }
    let id = client.run(&tail).await?.run.parse();
    id.map(Some)
        .map_err(|_| CallError::Misunderstood(zbus::Error::InvalidReply).into())
}

async fn request(
    client: &Client,
    tail: &str,
    reason: &str,
    arguments: &Kill,
) -> Result<Request, Failure> {
    match client.kill(tail, reason, arguments.grace).await {
        Ok(()) => Ok(Request::Accepted),
        Err(CallError::Refused(Error::AlreadyEnded(text))) => match client.run(tail).await {
            Ok(run) if is_killed(&run) => Ok(Request::Superfluous),
            Ok(run) => Err(Failure::AlreadyEnded(render::already_ended(&run, now()))),
            Err(_) => Err(Failure::AlreadyEnded(text)),
        },
        Err(error) => Err(unknown(
            error,
            &format!("`nervectl workflow show {tail}` tells, and killing it again does no harm"),
        )),
    }
}

async fn wait(settings: &Settings, client: &Client, id: RunId) -> Result<(), Failure> {
    match until_ended(settings, client.clone(), id).await? {
        run if is_killed(&run) => Ok(()),
        run => Err(Failure::AlreadyEnded(render::already_ended(&run, now()))),
    }
}

fn is_killed(run: &Run) -> bool {
    run.status == Status::Killed.as_str()
}
