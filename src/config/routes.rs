//! The `graph` section of a definition, and the faults of a graph at their places. Called by `definition`.

use std::collections::{BTreeMap, BTreeSet};

use super::diagnostic::{listed, nearest, quoted};
use super::reader::{Fields, Reader};
use super::yaml::{Content, Entry, Node, Place};
use crate::model::message::ERROR;
use crate::model::name::RoleName;
use crate::model::role::Role;
use crate::model::workflow::{Fault, Graph, Target, Workflow};

/// The routing table, and whether all of it could be read. `None` without a beginning.
pub(super) fn graph(reader: &mut Reader, node: &Node, fields: Fields<'_>) -> Option<(Graph, bool)> {
    let Some(section) = fields.get("graph") else {
        reader.error_help(
            node.place,
            "the definition has no graph",
            "write `graph:` with `$START: ROLE` below it",
        );
        return None;
    };
    let entries = reader.entries(&section.value, "graph")?;
    let before = reader.faults.len();
    let mut start = None;
    let mut routes = BTreeMap::new();
    for entry in entries {
        if entry.key == Target::START {
            start = target(reader, &entry.value, Target::START);
            if start == Some(Target::End) {
                reader.error_help(
                    entry.value.place,
                    "$START leads to $END",
                    "name the role that speaks first",
                );
            }
        } else if entry.key.starts_with('$') {
            let message = format!("unknown word {} in graph", quoted(&entry.key));
            let help = match nearest(&entry.key, [Target::START]) {
                Some(meant) => format!("did you mean {meant}?"),
                None => "write $START, or the name of a role".to_owned(),
            };
            reader.error_help(entry.place, message, help);
        } else if let Some(role) = role_name(reader, entry.place, &entry.key) {
            let outcomes = outcomes(reader, entry);
            routes.insert(role, outcomes);
        }
    }
    if !entries.iter().any(|entry| entry.key == Target::START) {
        reader.error_help(
            section.place,
            "the graph has no $START",
            "write `$START: ROLE` below `graph:`",
        );
    }
    let complete = reader.faults.len() == before;
    Some((
        Graph {
            start: start?,
            routes,
        },
        complete,
    ))
}

/// Where each status of a role leads.
fn outcomes(reader: &mut Reader, entry: &Entry) -> BTreeMap<String, Target> {
    let mut outcomes = BTreeMap::new();
    if let Content::Text { .. } | Content::Null = entry.value.content {
        let message = format!("routes of {} must be a map of statuses", entry.key);
        reader.error_help(
            entry.value.place,
            message,
            "write them like { ok: next_role, error: $END }",
        );
        return outcomes;
    }
    for route in reader
        .entries(&entry.value, &format!("routes of {}", entry.key))
        .unwrap_or_default()
    {
        if let Some(target) = target(reader, &route.value, &format!("a route of {}", entry.key)) {
            outcomes.insert(route.key.clone(), target);
        }
    }
    outcomes
}

fn target(reader: &mut Reader, node: &Node, subject: &str) -> Option<Target> {
    let text = reader.text(node, subject)?;
    if text == Target::END {
        return Some(Target::End);
    }
    let meant_end = text.trim_start_matches('$').eq_ignore_ascii_case("end");
    if meant_end || text.starts_with('$') {
        let help = if meant_end {
            "did you mean $END?"
        } else {
            "write a role, or $END"
        };
        let message = format!("{subject} leads to {}", quoted(text));
        reader.error_help(node.place, message, help);
        return None;
    }
    role_name(reader, node.place, text).map(Target::Role)
}

fn role_name(reader: &mut Reader, place: Place, text: &str) -> Option<RoleName> {
    text.parse()
        .map_err(|error: crate::model::name::InvalidName| reader.error(place, error.to_string()))
        .ok()
}

/// Notes what [`Workflow::check`] finds, each fault at its place. What an unreadable part of the file could answer is
/// said only when all of it was read.
pub(super) fn check(
    reader: &mut Reader,
    workflow: &Workflow,
    roles: &Entry,
    graph: &Entry,
    complete: bool,
    unread: &BTreeSet<RoleName>,
) {
    let complete = complete && unread.is_empty();
    let names = || workflow.roles.keys().map(RoleName::as_str);
    let role_help = |name: &RoleName| match nearest(name.as_str(), names()) {
        Some(meant) => format!("did you mean {meant}?"),
        None => format!(
            "write it below `roles:`, or name one of {}",
            listed(names())
        ),
    };
    let at_role = |role: &RoleName| {
        roles
            .value
            .get(role.as_str())
            .map_or(roles.place, |entry| entry.place)
    };
    let of_graph = |key: &str| graph.value.get(key);
    for fault in workflow.check() {
        match fault {
            Fault::Unreachable(_) | Fault::MissingRoute(..) | Fault::Endless if !complete => {}
            Fault::UnknownStatus(role, _) if unread.contains(&role) => {}
            Fault::Unreachable(role) => {
                let message = format!("no route leads to role {role}");
                reader.error_help(
                    at_role(&role),
                    message,
                    "route to it in the graph, or remove it",
                );
            }
            Fault::MissingRoute(role, status) => {
                let place =
                    of_graph(role.as_str()).map_or_else(|| at_role(&role), |entry| entry.place);
                let help = format!("write `{role}: {{ {status}: ROLE }}` or `$END` in the graph");
                reader.error_help(
                    place,
                    format!("role {role} has no route for {status}"),
                    help,
                );
            }
            Fault::UnknownStatus(role, status) => {
                let route = of_graph(role.as_str()).and_then(|entry| entry.value.get(&status));
                let role_of = workflow.roles.get(&role);
                let known = || role_of.into_iter().flat_map(Role::statuses);
                let help = match nearest(&status, known().chain([ERROR])) {
                    Some(meant) => format!("did you mean {meant}?"),
                    None => format!("its statuses are {} and {ERROR}", listed(known())),
                };
                let place = route.map_or(graph.place, |entry| entry.place);
                reader.error_help(
                    place,
                    format!("role {role} never ends with status {}", quoted(&status)),
                    help,
                );
            }
            Fault::UnknownTarget(from, target) => {
                let entry = match &from {
                    None => of_graph(Target::START),
                    Some((role, status)) => {
                        of_graph(role.as_str()).and_then(|entry| entry.value.get(status))
                    }
                };
                let place = entry.map_or(graph.place, |entry| entry.value.place);
                reader.error_help(
                    place,
                    format!("there is no role {target}"),
                    role_help(&target),
                );
            }
            Fault::UnknownRole(role) => {
                let place = of_graph(role.as_str()).map_or(graph.place, |entry| entry.place);
                reader.error_help(place, format!("there is no role {role}"), role_help(&role));
            }
            Fault::Endless => {
                let message = "no way leads to $END: only max_rounds ends a run";
                reader.warning(graph.place, message, "route a status to $END");
            }
        }
    }
}
