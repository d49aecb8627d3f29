//! The moderator: from a workflow and where its thread stands, what comes next. The worker routes with it and
//! nerved checks the worker with it, so both are this one function.

use super::message::{ERROR, Position};
use super::name::RoleName;
use super::status::{RunResult, Status};
use super::workflow::{Routing, Target, Workflow};

/// What comes next in a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// This role speaks.
    Role(RoleName),
    /// The workflow's own moderator says it, and has not been asked.
    Ask,
    /// Whatever the workflow's own worker likes.
    Any,
    /// The run ends so.
    End(RunResult),
}

/// Whether a worker may say that a run ends so, when nobody asked for its end.
#[must_use]
pub fn may_end(
    workflow: &Workflow,
    max_rounds: u32,
    position: &Position,
    result: &RunResult,
) -> bool {
    match (next(workflow, max_rounds, position), result) {
        (_, RunResult::Timeout) => workflow.timeout.is_some(),
        (Next::End(end), _) => end == *result,
        (Next::Ask, _) => *result == RunResult::BadRoute,
        (Next::Any, RunResult::BadRoute) => false,
        (Next::Any, _) => matches!(result.end().0, Status::Completed | Status::Failed),
        (Next::Role(_), _) => false,
    }
}

/// Routes one step.
#[must_use]
pub fn next(workflow: &Workflow, max_rounds: u32, position: &Position) -> Next {
    let target = match (&workflow.routing, &position.last) {
        (Routing::Graph(graph), None) => Some(&graph.start),
        (Routing::Graph(graph), Some(last)) => graph.route(&last.role, &last.status),
        (Routing::Moderator(_), _) if position.route.is_none() => return Next::Ask,
        (Routing::Moderator(_), _) => position.route.as_ref(),
        (Routing::Worker, _) => return Next::Any,
    };
    match (target, &position.last) {
        (Some(Target::End), _) => Next::End(RunResult::Success),
        (Some(Target::Role(_)), _) if position.rounds >= max_rounds => {
            Next::End(RunResult::MaxRounds)
        }
        (Some(Target::Role(role)), _) => Next::Role(role.clone()),
        (None, Some(last)) if last.status == ERROR => {
            Next::End(last.result.clone().unwrap_or(RunResult::ExitCode(1)))
        }
        (None, last) => Next::End(RunResult::NoRoute(
            last.as_ref()
                .map_or(String::new(), |last| last.status.clone()),
        )),
    }
}
