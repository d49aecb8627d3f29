//! The moderator: from a workflow and where its thread stands, what comes next. The worker routes with it and
//! nerved checks the worker with it, so both are this one function.

use super::message::{ERROR, Position};
use super::name::RoleName;
use super::status::RunResult;
use super::workflow::{Routing, Target, Workflow};

/// What comes next in a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// This role speaks.
    Role(RoleName),
    /// The run ends so.
    End(RunResult),
}

/// Routes one step.
#[must_use]
pub fn next(workflow: &Workflow, max_rounds: u32, position: &Position) -> Next {
    let target = match (&workflow.routing, &position.last) {
        (Routing::Graph(graph), None) => Some(&graph.start),
        (Routing::Graph(graph), Some(last)) => graph.route(&last.role, &last.status),
        (Routing::Moderator(_) | Routing::Worker, _) => None,
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
