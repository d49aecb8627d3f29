//! `providers` and `agents` of nerve.yaml. Called by `settings`.

use std::collections::BTreeMap;

use super::diagnostic::quoted;
use super::reader::{Fields, Reader};
use super::work::{self, name_of};
use super::yaml::{Content, Entry, Node, to_json};
use crate::model::limits;
use crate::model::tools::{Preset, PromptBy, Provider, ReplyForm, Tools};

const PROVIDER_KEYS: [&str; 4] = ["base_url", "model", "api_key", "timeout"];
const AGENT_KEYS: [&str; 4] = ["exec", "prompt", "reply", "usage"];
const REPLY_KEYS: [&str; 3] = ["json", "jsonl", "where"];

pub(super) fn read(reader: &mut Reader, fields: Fields<'_>) -> Tools {
    Tools {
        providers: each(reader, fields, "providers", provider),
        agents: each(reader, fields, "agents", agent),
    }
}

/// The values of a section, by their names.
fn each<T>(
    reader: &mut Reader,
    fields: Fields<'_>,
    section: &str,
    read: impl Fn(&mut Reader, &Entry, &str) -> Option<T>,
) -> BTreeMap<String, T> {
    let mut all = BTreeMap::new();
    let Some(section_entry) = fields.get(section) else {
        return all;
    };
    let entries = reader.entries(&section_entry.value, section);
    for entry in entries.unwrap_or_default() {
        let name = Node {
            place: entry.place,
            content: Content::Text {
                text: entry.key.clone(),
                plain: true,
                literal: false,
            },
        };
        let name = name_of(reader, &name, &format!("a name in {section}"));
        let value = read(reader, entry, &format!("{} in {section}", entry.key));
        all.extend(name.zip(value));
    }
    all
}

fn provider(reader: &mut Reader, entry: &Entry, subject: &str) -> Option<Provider> {
    let fields = reader.fields(&entry.value, subject, &PROVIDER_KEYS)?;
    let Some(base_url) = fields.get("base_url") else {
        let help =
            "write what comes before /chat/completions, like `base_url: https://api.openai.com/v1`";
        reader.error_help(entry.place, format!("{subject} has no base_url"), help);
        return None;
    };
    let url = reader
        .text(&base_url.value, "base_url")
        .filter(|url| !url.is_empty());
    let is_url = url.is_some_and(|url| {
        let rest = url
            .strip_prefix("https://")
            .or_else(|| url.strip_prefix("http://"));
        let is_plain = url.bytes().all(|byte| byte.is_ascii_graphic());
        let has_host = rest.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
        is_plain && has_host && !url.contains(['?', '#', '@'])
    });
    if let Some(url) = url.filter(|_| !is_url) {
        // Nor is a password, or a key in a query.
        let message = match url.chars().find(|c| "?#@".contains(*c)) {
            Some(sign) => format!("base_url has '{sign}' in it"),
            None => format!("base_url is {}", quoted(url)),
        };
        let help = "write an address that begins with https:// or http://, without a user, a query or a fragment; the key goes to api_key";
        reader.error_help(base_url.value.place, message, help);
    }
    let model = fields.get("model");
    let model = model.and_then(|entry| reader.text(&entry.value, "model"));
    let credential = fields.get("api_key").and_then(|entry| {
        if let Content::Text { .. } = entry.value.content {
            // Never quoted: it may be the key.
            let help = "write api_key: {credential: NAME} and put the key into /etc/credstore/NAME, mode 0600";
            reader.error_help(entry.place, "api_key is no credential: keys do not belong into this file", help);
            return None;
        }
        work::credential(reader, &entry.value, "api_key")
    });
    let timeout = fields.get("timeout");
    let timeout = timeout.and_then(|entry| reader.duration(&entry.value, "timeout"));
    let timeout = timeout.unwrap_or(limits::LLM_TIMEOUT).as_millis();
    Some(Provider {
        base_url: url?.trim_end_matches('/').to_owned(),
        model: model.map(str::to_owned),
        credential,
        timeout_ms: u64::try_from(timeout).unwrap_or(u64::MAX),
    })
}

fn agent(reader: &mut Reader, entry: &Entry, subject: &str) -> Option<Preset> {
    let fields = reader.fields(&entry.value, subject, &AGENT_KEYS)?;
    let Some(exec) = fields.get("exec") else {
        let help = "write `exec: [command, argument]`";
        reader.error_help(entry.place, format!("{subject} has no exec"), help);
        return None;
    };
    let prompt = fields.get("prompt").and_then(|entry| {
        let choices = [("stdin", PromptBy::Stdin), ("argument", PromptBy::Argument)];
        reader.choice(&entry.value, "prompt", &choices)
    });
    let form = fields.get("reply").and_then(|entry| reply(reader, entry));
    let usage = fields.get("usage");
    let usage = usage.map(|entry| {
        let pointers = reader.entries(&entry.value, "usage").unwrap_or_default();
        let pair = |entry: &Entry| Some((entry.key.clone(), pointer(reader, &entry.value)?));
        pointers.iter().filter_map(pair).collect()
    });
    Some(Preset {
        // Which machine has it is not known here; a round says so when it is not there.
        exec: work::exec(
            reader,
            &exec.value,
            &format!("exec of {subject}"),
            &mut Vec::new(),
        )?,
        prompt: prompt.unwrap_or_default(),
        reply: form.unwrap_or_default(),
        usage: usage.unwrap_or_default(),
    })
}

fn reply(reader: &mut Reader, entry: &Entry) -> Option<ReplyForm> {
    if let Content::Text { .. } = entry.value.content {
        return reader
            .choice(&entry.value, "reply", &[("text", ())])
            .map(|()| ReplyForm::Text);
    }
    let fields = reader.fields(&entry.value, "reply", &REPLY_KEYS)?;
    let mut at = |key: &str| pointer(reader, &fields.get(key)?.value);
    match (at("json"), at("jsonl")) {
        (Some(text), None) => {
            if let Some(entry) = fields.get("where") {
                let help = "remove it, or write jsonl instead of json";
                reader.error_help(entry.place, "reply has where beside json", help);
            }
            Some(ReplyForm::Json(text))
        }
        (None, Some(text)) => {
            let matching = fields.get("where").and_then(|entry| {
                let entries = reader.entries(&entry.value, "where")?;
                Some(
                    entries
                        .iter()
                        .map(|entry| (entry.key.clone(), to_json(&entry.value)))
                        .collect(),
                )
            });
            Some(ReplyForm::JsonLines {
                text,
                matching: matching.unwrap_or_default(),
            })
        }
        _ => {
            let help =
                "write `text`, {json: /result}, or {jsonl: /item/text, where: {/type: done}}";
            reader.error_help(
                entry.value.place,
                "reply has to have one of json and jsonl",
                help,
            );
            None
        }
    }
}

/// A JSON pointer.
fn pointer(reader: &mut Reader, node: &Node) -> Option<String> {
    let text = reader.text(node, "a JSON pointer")?;
    if !text.is_empty() && !text.starts_with('/') {
        let message = format!("the JSON pointer is {}", quoted(text));
        reader.error_help(
            node.place,
            message,
            "begin it with /, like /result or /usage/input_tokens",
        );
        return None;
    }
    Some(text.to_owned())
}
