//! Who does a role's work, in a definition: a command, an LLM or an agent. Called by `roles` and `definition`.

use super::diagnostic::quoted;
use super::host::{self, HostCheck};
use super::reader::{Fields, Reader, kind};
use super::roles::prompt;
use super::yaml::{Content, Entry, Node, Place};
use crate::model::limits;
use crate::model::role::{Agent, Llm, Moderator, Work};

const KINDS: [&str; 3] = ["exec", "llm", "agent"];
const LLM_KEYS: [&str; 5] = ["provider", "model", "temperature", "max_tokens", "stream"];
const AGENT_KEYS: [&str; 2] = ["name", "args"];
const MODERATOR_KEYS: [&str; 3] = ["exec", "timeout", "dry_run"];

/// The one of `exec`, `llm` and `agent` that the role has.
pub(super) fn read(
    reader: &mut Reader,
    place: Place,
    fields: Fields<'_>,
    role: &str,
    roles: &[&str],
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Work> {
    let mut kinds = KINDS.iter().filter_map(|kind| fields.get(kind));
    let Some(entry) = kinds.next() else {
        let help = format!(
            "write `exec: [command, argument]` below {role}, or `llm: PROVIDER`, or `agent: NAME`"
        );
        reader.error_help(
            place,
            format!("role {role} has no exec, llm or agent"),
            help,
        );
        return None;
    };
    if let Some(other) = kinds.next() {
        let message = format!("role {role} has {} and {}", entry.key, other.key);
        reader.error_help(
            other.place,
            message,
            "keep one of them; two kinds of work are two roles",
        );
    }
    let subject = format!("{} of role {role}", entry.key);
    match entry.key.as_str() {
        "exec" => exec(reader, &entry.value, &subject, host_checks).map(Work::Exec),
        "llm" => {
            let llm = llm(reader, fields, entry, &subject, roles)?;
            let place = entry.value.get("provider").unwrap_or(entry).value.place;
            host_checks.push((place, HostCheck::Provider(llm.provider.clone())));
            Some(Work::Llm(llm))
        }
        _ => {
            let agent = agent(reader, entry, &subject)?;
            let place = entry.value.get("name").unwrap_or(entry).value.place;
            host_checks.push((place, HostCheck::Agent(agent.name.clone())));
            Some(Work::Agent(agent))
        }
    }
}

/// argv.
pub(super) fn exec(
    reader: &mut Reader,
    node: &Node,
    subject: &str,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Vec<String>> {
    const HELP: &str =
        "write a list like [make, test]; no shell reads it, [sh, -c, '…'] starts one";
    let words = words(reader, node, subject, HELP)?;
    let Some(command) = words.first() else {
        reader.error_help(node.place, format!("{subject} is an empty list"), HELP);
        return None;
    };
    let Content::List(nodes) = &node.content else {
        return None;
    };
    let place = nodes.first()?.place;
    if command.is_empty() {
        let message = format!("{subject} begins with an empty word");
        reader.error_help(place, message, "name a command");
        return None;
    }
    if command.starts_with('/') {
        let check = HostCheck::Executable {
            subject: subject.to_owned(),
            path: command.clone(),
        };
        host_checks.push((place, check));
    }
    Some(words)
}

/// A list of words, empty or not.
pub(super) fn words(
    reader: &mut Reader,
    node: &Node,
    subject: &str,
    help: &str,
) -> Option<Vec<String>> {
    let Content::List(nodes) = &node.content else {
        let found = kind(&node.content);
        let message = format!("{subject} is {found}, and must be a list of words");
        reader.error_help(node.place, message, help);
        return None;
    };
    let subject = format!("a word of {subject}");
    let words: Vec<_> = nodes
        .iter()
        .map(|word| reader.text(word, &subject).map(str::to_owned))
        .collect();
    words.into_iter().collect()
}

fn llm(
    reader: &mut Reader,
    fields: Fields<'_>,
    entry: &Entry,
    subject: &str,
    roles: &[&str],
) -> Option<Llm> {
    let user = fields.get("user").and_then(|entry| {
        prompt(
            reader,
            &entry.value,
            &format!("user beside {subject}"),
            roles,
        )
    });
    if let Content::Text { .. } = entry.value.content {
        return Some(Llm {
            provider: name_of(reader, &entry.value, subject)?,
            model: None,
            user,
            temperature: None,
            max_tokens: None,
            is_streamed: true,
        });
    }
    let fields = reader.fields(&entry.value, subject, &LLM_KEYS)?;
    let Some(provider) = fields.get("provider") else {
        let message = format!("{subject} names no provider");
        reader.error_help(
            entry.place,
            message,
            "write `provider: NAME`, a name that nerve.yaml has below `providers:`",
        );
        return None;
    };
    let model = fields.get("model");
    let model = model.and_then(|entry| reader.text(&entry.value, "model"));
    let temperature = fields.get("temperature").and_then(|entry| {
        let text = reader.text(&entry.value, "temperature")?;
        let number = text
            .parse()
            .ok()
            .filter(|number| (0.0..=2.0).contains(number));
        if number.is_none() {
            let message = format!("temperature is {}", quoted(text));
            reader.error_help(entry.value.place, message, "write a number from 0 to 2");
        }
        number
    });
    let max_tokens = fields.get("max_tokens");
    let max_tokens = max_tokens
        .and_then(|entry| reader.integer(&entry.value, "max_tokens", 1..=limits::MAX_TOKENS));
    let is_streamed = fields.get("stream").and_then(|entry| {
        reader.choice(&entry.value, "stream", &[("true", true), ("false", false)])
    });
    Some(Llm {
        provider: name_of(reader, &provider.value, &format!("provider of {subject}"))?,
        model: model.map(str::to_owned),
        user,
        temperature,
        max_tokens,
        is_streamed: is_streamed.unwrap_or(true),
    })
}

fn agent(reader: &mut Reader, entry: &Entry, subject: &str) -> Option<Agent> {
    if let Content::Text { .. } = entry.value.content {
        return Some(Agent {
            name: name_of(reader, &entry.value, subject)?,
            arguments: Vec::new(),
        });
    }
    let fields = reader.fields(&entry.value, subject, &AGENT_KEYS)?;
    let arguments = fields.get("args").and_then(|entry| {
        words(
            reader,
            &entry.value,
            &format!("args of {subject}"),
            "write a list like [--model, small]",
        )
    });
    let Some(name) = fields.get("name") else {
        let message = format!("{subject} has no name");
        reader.error_help(
            entry.place,
            message,
            "write `name: NAME`, a name that nerve.yaml has below `agents:`",
        );
        return None;
    };
    Some(Agent {
        name: name_of(reader, &name.value, &format!("name of {subject}"))?,
        arguments: arguments.unwrap_or_default(),
    })
}

/// The command that routes.
pub(super) fn moderator(
    reader: &mut Reader,
    entry: &Entry,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Moderator> {
    let fields = reader.fields(&entry.value, "moderator", &MODERATOR_KEYS)?;
    let timeout = fields.get("timeout");
    let timeout =
        timeout.and_then(|entry| reader.duration(&entry.value, "timeout of the moderator"));
    let rehearses = fields.get("dry_run");
    let rehearses = rehearses.and_then(|entry| {
        reader.choice(
            &entry.value,
            "dry_run of the moderator",
            &[("execute", true)],
        )
    });
    let Some(exec) = fields.get("exec") else {
        let help = "write `exec: [command, argument]` below moderator";
        reader.error_help(entry.place, "the moderator has no exec", help);
        return None;
    };
    Some(Moderator {
        exec: self::exec(reader, &exec.value, host::MODERATOR, host_checks)?,
        timeout,
        rehearses: rehearses.unwrap_or(false),
    })
}

/// The name of a provider or an agent.
pub(super) fn name_of(reader: &mut Reader, node: &Node, subject: &str) -> Option<String> {
    let text = reader.text(node, subject)?;
    if !is_name(text) {
        let message = format!("{subject} is {}", quoted(text));
        reader.error_help(node.place, message, name_rule());
        return None;
    }
    Some(text.to_owned())
}

/// What providers, agents and credentials can be called.
pub(super) fn is_name(text: &str) -> bool {
    text.len() <= limits::SETTING_NAME_BYTES
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn name_rule() -> String {
    let most = limits::SETTING_NAME_BYTES;
    format!(
        "a name has letters, digits, '.', '_' and '-', begins with a letter or digit, and has at most {most} bytes"
    )
}

/// `{credential: NAME}`.
pub(super) fn credential(reader: &mut Reader, node: &Node, subject: &str) -> Option<String> {
    let fields = reader.fields(node, subject, &["credential"])?;
    let Some(entry) = fields.get("credential") else {
        let help = "write {credential: NAME}, the name of a systemd credential";
        reader.error_help(node.place, format!("{subject} names no credential"), help);
        return None;
    };
    let subject = format!("the credential of {subject}");
    let name = reader.text(&entry.value, &subject)?;
    if !is_name(name) {
        // Never quoted: it may be the key.
        let message = format!("{subject} is no name");
        reader.error_help(entry.value.place, message, name_rule());
        return None;
    }
    Some(name.to_owned())
}
