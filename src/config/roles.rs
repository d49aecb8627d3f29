//! The `roles` section of a definition. Called by `definition`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::Value;

use super::diagnostic::{nearest, quoted};
use super::host::HostCheck;
use super::meta::{self, Checker};
use super::reader::{Fields, Reader};
use super::template;
use super::unit_settings;
use super::work::{self, name_of};
use super::yaml::{Content, Entry, Node, Place, to_json};
use crate::model::limits;
use crate::model::message::ERROR;
use crate::model::name::RoleName;
use crate::model::role::{Meta, Rehearsal, Retry, Role, Variable, Work};
use crate::model::status::RunResult;

const ROLE_KEYS: [&str; 14] = [
    "exec", "llm", "user", "agent", "prompt", "timeout", "stall", "cwd", "env", "ok_codes", "meta",
    "extract", "retry", "dry_run",
];
const RETRY_KEYS: [&str; 4] = ["attempts", "backoff", "max_backoff", "on"];
const REHEARSAL_KEYS: [&str; 2] = ["content", "meta"];
/// What a retry can be for; each of them also before a colon and what follows it.
const FAILURES: [&str; 9] = [
    "exit-code",
    "signal",
    "exec-failed",
    "role-timeout",
    "role-stalled",
    "oom-kill",
    "reply-too-large",
    "bad-reply",
    "llm-error",
];

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
        let role = role(reader, entry, &names, host_checks);
        if let Some(name) = name {
            roles.insert(name, role);
        }
    }
    roles
}

fn role(
    reader: &mut Reader,
    entry: &Entry,
    roles: &[&str],
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Role> {
    let shown = quoted(&entry.key);
    let shown = if entry.key.parse::<RoleName>().is_ok() {
        &entry.key
    } else {
        &shown
    };
    let fields = reader.fields(&entry.value, &format!("role {shown}"), &ROLE_KEYS)?;
    let work = work::read(reader, entry.place, fields, shown, roles, host_checks);
    let of = |key: &str| format!("{key} of role {shown}");
    let prompt = fields
        .get("prompt")
        .and_then(|entry| prompt(reader, &entry.value, &of("prompt"), roles));
    let mut duration = |key: &str| {
        let entry = fields.get(key)?;
        reader.duration(&entry.value, &of(key))
    };
    let (timeout, stall) = (duration("timeout"), duration("stall"));
    let cwd = fields.get("cwd").and_then(|entry| {
        let text = reader.text(&entry.value, &of("cwd"))?;
        if text.starts_with('/') {
            host_checks.push((entry.value.place, HostCheck::Directory(text.to_owned())));
        } else {
            let message = format!("{} is {}, which is not absolute", of("cwd"), quoted(text));
            reader.error_help(entry.value.place, message, "begin it with /");
        }
        Some(text.to_owned())
    });
    let environment = fields.get("env");
    let environment = environment.map(|entry| environment_of(reader, &entry.value, &of("env")));
    let ok_codes = fields.get("ok_codes");
    let ok_codes = ok_codes.and_then(|entry| codes(reader, &entry.value, &of("ok_codes")));
    let meta = fields.get("meta");
    let is_meta_right = meta.is_none();
    let meta = meta.and_then(|entry| meta_of(reader, &entry.value, &of("meta")));
    let extract = fields.get("extract").and_then(|entry| {
        if meta.is_none() && is_meta_right {
            let message = format!("{} has no effect without meta", of("extract"));
            reader.warning(
                entry.place,
                message,
                "write the JSON Schema that is to be met, or remove it",
            );
        }
        let name = name_of(reader, &entry.value, &of("extract"))?;
        host_checks.push((entry.value.place, HostCheck::Provider(name.clone())));
        Some(name)
    });
    let retry = fields.get("retry");
    let retry = retry.map(|entry| retry_of(reader, &entry.value, &of("retry")));
    let rehearsal = fields.get("dry_run");
    let rehearsal = rehearsal
        .and_then(|entry| rehearsal_of(reader, &entry.value, &of("dry_run"), meta.as_ref()));
    if !is_meta_right && meta.is_none() {
        return None;
    }
    let role = Role {
        work: work?,
        prompt,
        timeout,
        stall,
        cwd,
        environment: environment.unwrap_or_default(),
        ok_codes: ok_codes.unwrap_or_else(|| BTreeSet::from([0])),
        meta,
        extract,
        retry: retry.unwrap_or_default(),
        rehearsal: rehearsal.unwrap_or_default(),
    };
    without_effect(reader, fields, &role, shown);
    Some(role)
}

/// Warns of what the kind of work makes meaningless: whoever wrote it may expect something.
fn without_effect(reader: &mut Reader, fields: Fields<'_>, role: &Role, shown: &str) {
    let (kind, keys): (_, &[&str]) = match role.work {
        Work::Exec(_) | Work::Agent(_) => ("llm", &["user"]),
        Work::Llm(_) => ("exec or agent", &["ok_codes", "cwd", "env"]),
    };
    for entry in keys.iter().filter_map(|key| fields.get(key)) {
        let message = format!("{} has no effect in role {shown}", entry.key);
        reader.warning(
            entry.place,
            message,
            format!("remove it; it is for roles with {kind}"),
        );
    }
}

/// Variables by name, none of them one that systemd or nerve sets.
fn environment_of(reader: &mut Reader, node: &Node, subject: &str) -> BTreeMap<String, Variable> {
    let mut variables = BTreeMap::new();
    for entry in reader.entries(node, subject).unwrap_or_default() {
        if let Err(error) = unit_settings::variable_name(&entry.key) {
            reader.error(entry.place, format!("{subject}: {error}"));
            continue;
        }
        let variable = match &entry.value.content {
            Content::Map(_) => {
                work::credential(reader, &entry.value, &entry.key).map(Variable::Credential)
            }
            _ => reader
                .text(&entry.value, &entry.key)
                .map(|text| Variable::Text(text.to_owned())),
        };
        variables.extend(variable.map(|variable| (entry.key.clone(), variable)));
    }
    variables
}

fn codes(reader: &mut Reader, node: &Node, subject: &str) -> Option<BTreeSet<u8>> {
    let nodes = list(reader, node, subject, "[0, 1]")?;
    let mut codes = BTreeSet::new();
    for node in nodes {
        let code = reader.integer(node, &format!("a code of {subject}"), 0..=255);
        codes.extend(code.and_then(|code| u8::try_from(code).ok()));
    }
    Some(codes)
}

/// A list with something in it.
fn list<'n>(
    reader: &mut Reader,
    node: &'n Node,
    subject: &str,
    example: &str,
) -> Option<&'n [Node]> {
    match &node.content {
        Content::List(nodes) if !nodes.is_empty() => Some(nodes),
        other => {
            let kind = match other {
                Content::List(_) => "an empty list",
                other => super::reader::kind(other),
            };
            let help = format!("write a list like {example}");
            reader.error_help(node.place, format!("{subject} is {kind}"), help);
            None
        }
    }
}

fn meta_of(reader: &mut Reader, node: &Node, subject: &str) -> Option<Meta> {
    reader.entries(node, subject)?;
    let schema = to_json(node);
    match Checker::new(&schema) {
        Ok(checker) => Some(Meta {
            statuses: checker.statuses().to_vec(),
            schema,
        }),
        Err(error) => {
            let help = "write a JSON Schema of an object, such as {properties: {status: {enum: [done, again]}}, required: [status]}";
            reader.error_help(node.place, format!("{subject}: {error}"), help);
            None
        }
    }
}

fn retry_of(reader: &mut Reader, node: &Node, subject: &str) -> Retry {
    let mut retry = Retry::default();
    let Some(fields) = reader.fields(node, subject, &RETRY_KEYS) else {
        return retry;
    };
    let attempts = fields.get("attempts");
    let attempts =
        attempts.and_then(|entry| reader.integer(&entry.value, "attempts", 1..=limits::ATTEMPTS));
    // Who asks for a retry wants one.
    retry.attempts = attempts.unwrap_or(2);
    let mut duration = |key: &str| {
        let entry = fields.get(key)?;
        let duration = reader.duration(&entry.value, key)?;
        if duration > limits::BACKOFF {
            let message = format!("{key} of {subject} is more than a day");
            reader.error_help(entry.value.place, message, "write 1d or less");
        }
        Some(duration)
    };
    let (backoff, most) = (duration("backoff"), duration("max_backoff"));
    retry.backoff = backoff.unwrap_or(retry.backoff);
    retry.max_backoff = most.unwrap_or_else(|| retry.max_backoff.max(retry.backoff));
    if let Some(entry) = fields.get("max_backoff")
        && retry.max_backoff < retry.backoff
    {
        let message = format!("max_backoff of {subject} is less than backoff");
        reader.error_help(entry.value.place, message, "let it be the longer one");
    }
    let on = fields.get("on");
    let on = on.and_then(|entry| list(reader, &entry.value, "on", "[exit-code:75, llm-error]"));
    for node in on.unwrap_or_default() {
        let Some(word) = reader.text(node, &format!("a word of on of {subject}")) else {
            continue;
        };
        let class = word.split(':').next().unwrap_or_default();
        let is_known = FAILURES.contains(&class);
        let is_result = match word.parse::<RunResult>() {
            Ok(RunResult::ExitCode(code)) => (0..=255).contains(&code),
            result => result.is_ok(),
        };
        if !is_known || (class != word && !is_result) {
            let help = match nearest(class, FAILURES).filter(|_| !is_known) {
                Some(meant) => format!("did you mean {meant}?"),
                None => "write what a round can fail with, as nerve-workflow(5) lists it: exit-code:75, signal:SIGSEGV, llm-error:rate-limited, role-timeout".to_owned(),
            };
            reader.error_help(
                node.place,
                format!("a retry is never for {}", quoted(word)),
                help,
            );
        }
        retry.on.push(word.to_owned());
    }
    retry
}

fn rehearsal_of(
    reader: &mut Reader,
    node: &Node,
    subject: &str,
    expected: Option<&Meta>,
) -> Option<Rehearsal> {
    if let Content::Text { .. } = node.content {
        return reader
            .choice(node, subject, &[("execute", ())])
            .map(|()| Rehearsal::Execute);
    }
    let fields = reader.fields(node, subject, &REHEARSAL_KEYS)?;
    let content = fields.get("content");
    let content = content.and_then(|entry| reader.text(&entry.value, "content"));
    let meta = fields.get("meta");
    let meta = meta.and_then(|entry| {
        reader.entries(&entry.value, "meta")?;
        let said = to_json(&entry.value);
        if let Err(error) = meta::bounded(&said, &format!("meta of {subject}")) {
            reader.error_help(entry.value.place, error, "say less in it");
            return None;
        }
        let Value::Object(said) = said else {
            return None;
        };
        // What it says without a status it says with the first one.
        let status = said.get("status");
        if status.is_some_and(|status| !status.is_string()) {
            let message = format!("{subject} has a status that is no text");
            reader.error_help(
                entry.value.place,
                message,
                "write a status of the role, in quotes where YAML reads something else",
            );
        }
        let status = status.and_then(Value::as_str);
        let known: Vec<&str> = match expected {
            Some(meta) => meta.statuses.iter().map(String::as_str).collect(),
            None => vec!["ok"],
        };
        if let Some(status) = status.filter(|status| *status != ERROR && !known.contains(status)) {
            let help = match nearest(status, known.iter().copied()) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("its statuses are {} and {ERROR}", known.join(", ")),
            };
            let message = format!("{subject} has status {}", quoted(status));
            reader.error_help(entry.value.place, message, help);
        }
        Some(said)
    });
    Some(Rehearsal::Say {
        content: content.unwrap_or_default().to_owned(),
        meta: meta.unwrap_or_default(),
    })
}

/// A template; `subject` is what it is called.
pub(super) fn prompt(
    reader: &mut Reader,
    node: &Node,
    subject: &str,
    roles: &[&str],
) -> Option<String> {
    let text = reader.text(node, subject)?;
    for fault in template::check(text, roles) {
        let mut message = format!("{subject}: {}", fault.message);
        let literal = matches!(node.content, Content::Text { literal: true, .. });
        if !literal && text.contains('\n') {
            let line = text[..fault.part.start].matches('\n').count() + 1;
            let _ = write!(message, " in line {line} of the prompt");
        }
        reader.error_help(node.part(fault.part), message, fault.help);
    }
    Some(text.to_owned())
}

/// Stands for a role whose description is wrong while the graph is checked; never given out.
pub(super) fn nothing() -> Role {
    Role::command(Vec::new())
}
