//! What the engine wants a worker to be told, as frames of the protocol. Called by the driver.

use crate::engine::{Dispatch, Order};
use crate::model::message::Message;
use crate::model::name::WorkflowName;
use crate::model::tools::Tools;
use crate::worker::protocol::{Assignment, FailedAttempts, Route, ToWorker, VERSION};

/// An order to a worker of this workflow.
pub(super) fn order(order: Order, workflow: WorkflowName) -> ToWorker {
    match order {
        Order::Welcome => ToWorker::Welcome {
            protocol: VERSION,
            workflow,
        },
        Order::KillThread { run, grace_us } => ToWorker::KillThread {
            run_id: run,
            grace_ms: grace_us / 1_000,
        },
        Order::AbortThread { run, reason } => ToWorker::AbortThread {
            run_id: run,
            reason,
        },
        Order::MessageAck { run, round } => ToWorker::MessageAck { run_id: run, round },
        Order::AttemptAck {
            run,
            round,
            attempt,
        } => ToWorker::AttemptAck {
            run_id: run,
            round,
            attempt,
        },
        Order::RouteAck { run, round } => ToWorker::RouteAck { run_id: run, round },
        Order::EventAck { run } => ToWorker::EventAck { run_id: run },
        Order::Shutdown => ToWorker::Shutdown { timeout_ms: 0 },
    }
}

/// The frames that give a run to a worker: a start, or a resume with its rounds.
pub(super) fn assignment(dispatch: &Dispatch, tools: Tools, thread: Vec<Message>) -> Vec<ToWorker> {
    let run_id = dispatch.run;
    let mut thread = thread.into_iter();
    let Some(mut start) = thread.next() else {
        tracing::error!(run_id = %run_id, "run {run_id} has no start");
        return Vec::new();
    };
    let assignment = Assignment {
        run_id,
        attempt: dispatch.attempt,
        prompt: start.content,
        max_rounds: dispatch.max_rounds,
        dry_run: dispatch.dry_run,
        trigger: start.meta.remove("trigger").unwrap_or_default(),
        created_at: start.timestamp,
        timeout_ms: dispatch.timeout_us.map(|us| us / 1_000),
        workflow: dispatch.definition.source.clone(),
        tools,
        failed: dispatch.failed.map(|(attempts, wait_us)| FailedAttempts {
            round: dispatch.rounds + 1,
            attempts,
            wait_ms: wait_us.div_ceil(1_000),
        }),
        route: dispatch.route.clone().map(|target| Route {
            round: dispatch.rounds + 1,
            target,
        }),
    };
    if dispatch.attempt == 1 && dispatch.rounds == 0 {
        return vec![ToWorker::StartThread(assignment)];
    }
    let message = |(round, message)| ToWorker::ThreadMessage {
        run_id,
        round,
        message,
    };
    std::iter::once(ToWorker::ResumeThread {
        assignment,
        messages: dispatch.rounds,
    })
    .chain((1..).zip(thread).map(message))
    .collect()
}
