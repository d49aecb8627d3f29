//! The `roles` section of a definition. Called by `definition`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::diagnostic::quoted;
use super::host::HostCheck;
use super::reader::{Fields, Reader, kind};
use super::template;
use super::yaml::{Content, Node, Place};
use crate::model::limits;
use crate::model::name::RoleName;
use crate::model::workflow::Role;

const ROLE_KEYS: [&str; 4] = ["exec", "prompt", "timeout", "cwd"];

/// The roles by name; `None` for one whose name is known and whose description is wrong.
pub(super) fn roles(
    reader: &mut Reader,
    node: &Node,
    fields: Fields<'_>,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> BTreeMap<RoleName, Option<Role>> {
    let mut roles = BTreeMap::new();
    let Some(section) = fields.get("roles") else {
        reader.error_help(
            node.place,
            "the definition has no roles",
            "write `roles:` and at least one role",
        );
        return roles;
    };
    let entries = reader.entries(&section.value, "roles").unwrap_or_default();
    if entries.len() > limits::ROLES {
        let message = format!(
            "{} roles, more than the {} a workflow may have",
            entries.len(),
            limits::ROLES
        );
        reader.error_help(section.place, message, "split the workflow");
        return roles;
    }
    if entries.is_empty() && matches!(section.value.content, Content::Map(_)) {
        reader.error_help(
            section.place,
            "there is no role",
            "write at least one role below `roles:`",
        );
    }
    let names: Vec<&str> = entries.iter().map(|entry| entry.key.as_str()).collect();
    for entry in entries {
        let name = match entry.key.parse::<RoleName>() {
            Ok(name) if template::is_word(name.as_str()) => {
                let message = format!("role name {name} is a word of the template language");
                reader.error_help(entry.place, message, "choose another");
                None
            }
            Ok(name) => Some(name),
            Err(error) => {
                reader.error(entry.place, error.to_string());
                None
            }
        };
        let role = role(
            reader,
            &entry.key,
            entry.place,
            &entry.value,
            &names,
            host_checks,
        );
        if let Some(name) = name {
            roles.insert(name, role);
        }
    }
    roles
}

fn role(
    reader: &mut Reader,
    name: &str,
    place: Place,
    node: &Node,
    roles: &[&str],
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Role> {
    let shown = quoted(name);
    let shown = if name.parse::<RoleName>().is_ok() {
        name
    } else {
        &shown
    };
    let fields = reader.fields(node, &format!("role {shown}"), &ROLE_KEYS)?;
    let exec = if let Some(entry) = fields.get("exec") {
        exec(reader, &entry.value, shown, host_checks)
    } else {
        let help = format!("write `exec: [command, argument]` below {shown}");
        reader.error_help(place, format!("role {shown} has no exec"), help);
        None
    };
    let prompt = fields
        .get("prompt")
        .and_then(|entry| prompt(reader, &entry.value, shown, roles));
    let timeout = fields
        .get("timeout")
        .and_then(|entry| reader.duration(&entry.value, &format!("timeout of role {shown}")));
    let cwd = fields.get("cwd").and_then(|entry| {
        let text = reader.text(&entry.value, &format!("cwd of role {shown}"))?;
        if !text.starts_with('/') {
            let message = format!(
                "cwd of role {shown} is {}, which is not absolute",
                quoted(text)
            );
            reader.error_help(entry.value.place, message, "begin it with /");
        }
        Some(text.to_owned())
    });
    Some(Role {
        exec: exec?,
        prompt,
        timeout,
        cwd,
    })
}

fn exec(
    reader: &mut Reader,
    node: &Node,
    role: &str,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Vec<String>> {
    const HELP: &str =
        "write a list like [make, test]; no shell reads it, [sh, -c, '…'] starts one";
    let Content::List(nodes) = &node.content else {
        let message = format!(
            "exec of role {role} is {}, and must be a list of words",
            kind(&node.content)
        );
        reader.error_help(node.place, message, HELP);
        return None;
    };
    let Some(first) = nodes.first() else {
        reader.error_help(
            node.place,
            format!("exec of role {role} is an empty list"),
            HELP,
        );
        return None;
    };
    let subject = format!("a word of exec of role {role}");
    let words: Vec<_> = nodes
        .iter()
        .map(|word| reader.text(word, &subject).map(str::to_owned))
        .collect();
    let words: Vec<String> = words.into_iter().collect::<Option<_>>()?;
    let command = words.first()?;
    if command.is_empty() {
        reader.error_help(
            first.place,
            format!("exec of role {role} begins with an empty word"),
            "name a command",
        );
        return None;
    }
    if command.starts_with('/') {
        let check = HostCheck::Executable {
            role: role.to_owned(),
            path: command.clone(),
        };
        host_checks.push((first.place, check));
    }
    Some(words)
}

fn prompt(reader: &mut Reader, node: &Node, role: &str, roles: &[&str]) -> Option<String> {
    let text = reader.text(node, &format!("prompt of role {role}"))?;
    // The place of a block scalar is its first line that is not blank.
    let blank = text.len() - text.trim_start_matches('\n').len();
    for fault in template::check(text, roles) {
        let mut message = format!("prompt of role {role}: {}", fault.message);
        let mut place = node.place;
        // The lines of a block scalar are lines of the file; of other scalars only the beginning is known.
        match (fault.line, &node.content) {
            (Some(line), Content::Text { literal: true, .. }) => {
                place = Place {
                    line: (node.place.line + line).saturating_sub(1 + blank),
                    column: 1,
                }
            }
            (Some(line), _) if text.contains('\n') => {
                let _ = write!(message, " in line {line} of the prompt");
            }
            _ => {}
        }
        match fault.help {
            Some(help) => reader.error_help(place, message, help),
            None => reader.error(place, message),
        }
    }
    Some(text.to_owned())
}

/// Stands for a role whose description is wrong while the graph is checked; never given out.
pub(super) fn nothing() -> Role {
    Role {
        exec: Vec::new(),
        prompt: None,
        timeout: None,
        cwd: None,
    }
}
