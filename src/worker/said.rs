//! The message of a round: made, failed, without secrets.

use serde_json::{Map, Value};

use super::redact::Redactor;
use super::role::trimmed;
use crate::model::limits;
use crate::model::message::{ERROR, Message};
use crate::model::name::RoleName;
use crate::model::status::RunResult;
use crate::model::text::shorten;
use crate::os::clock;

/// A message.
pub(super) fn message(role: &RoleName, content: String, status: &str) -> Message {
    Message {
        role: role.to_string(),
        content,
        meta: Map::from_iter([("status".to_owned(), status.into())]),
        timestamp: clock::wall_us(),
    }
}

/// The message of a round that could not be executed.
pub(super) fn failure(role: &RoleName, result: &RunResult, why: &str) -> Message {
    let mut message = message(role, String::new(), ERROR);
    fail(&mut message, result);
    note(&mut message.meta, why);
    message
}

/// Makes it one of a round that failed.
pub(super) fn fail(message: &mut Message, result: &RunResult) {
    message.meta.insert("status".into(), ERROR.into());
    message
        .meta
        .insert("result".into(), result.to_string().into());
}

/// Says something beside what the role wrote to stderr.
pub(super) fn note(meta: &mut Map<String, Value>, why: &str) {
    let mut stderr = match meta.remove("stderr") {
        Some(Value::String(stderr)) => stderr,
        _ => String::new(),
    };
    let mut why = why.to_owned();
    shorten(&mut why, limits::NOTE_BYTES);
    add_line(&mut stderr, &why);
    meta.insert("stderr".into(), stderr.into());
}

pub(super) fn add_line(text: &mut String, line: &str) {
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(line);
}

/// The reply as text, without trailing newlines, and whether it was text. NUL is none: D-Bus cannot carry it.
pub(super) fn decode(mut bytes: Vec<u8>) -> (String, bool) {
    bytes.truncate(trimmed(&bytes));
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => (text, true),
        Ok(text) => (text.replace('\0', "\u{fffd}"), false),
        Err(error) => {
            let text = String::from_utf8_lossy(error.as_bytes());
            (text.replace('\0', "\u{fffd}"), false)
        }
    }
}

/// Makes it fit to be sent: without secrets, and no larger than nerved takes. A message that nerved refused would be sent
/// again for ever.
pub(super) fn finish(message: &mut Message, redactor: &Redactor) {
    message.content = redactor.redact(&message.content).into_owned();
    message.meta = map_without_secrets(std::mem::take(&mut message.meta), redactor);
    if let Some(Value::String(stderr)) = message.meta.get_mut("stderr") {
        *stderr = tail(stderr).to_owned();
    }
    if message.content.len() > limits::REPLY_BYTES {
        message.content.clear();
        fail(message, &RunResult::ReplyTooLarge);
    }
}

/// Its last bytes, as many as are kept of a stderr.
fn tail(text: &str) -> &str {
    let begin = text.len().saturating_sub(limits::STDERR_TAIL_BYTES);
    let mut begins = begin..=text.len();
    let begin = begins.find(|at| text.is_char_boundary(*at));
    &text[begin.unwrap_or(0)..]
}

fn map_without_secrets(map: Map<String, Value>, redactor: &Redactor) -> Map<String, Value> {
    let clean = |(key, value): (String, Value)| {
        (
            redactor.redact(&key).into(),
            without_secrets(value, redactor),
        )
    };
    map.into_iter().map(clean).collect()
}

fn without_secrets(value: Value, redactor: &Redactor) -> Value {
    match value {
        Value::String(text) => redactor.redact(&text).into(),
        Value::Array(values) => values
            .into_iter()
            .map(|value| without_secrets(value, redactor))
            .collect(),
        Value::Object(map) => map_without_secrets(map, redactor).into(),
        Value::Number(number) => {
            let text = number.to_string();
            match redactor.redact(&text) {
                clean if clean == text => number.into(),
                clean => clean.into(),
            }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_part_of_a_message_keeps_a_secret() {
        let redactor = Redactor::new(["sk-canary-1", "12345678"]);
        let mut message = failure(
            &"coder".parse().unwrap(),
            &RunResult::BadReply,
            "it said sk-canary-1",
        );
        message.content = "key: sk-canary-1".to_owned();
        let list = json!([{"sk-canary-1": ["sk-canary-1", 7, 12_345_678, null]}]);
        message.meta.insert("list".to_owned(), list);
        finish(&mut message, &redactor);
        assert_eq!(message.content, "key: [redacted]");
        assert_eq!(
            Value::Object(message.meta),
            json!({"status": "error", "result": "bad-reply", "stderr": "it said [redacted]",
                "list": [{"[redacted]": ["[redacted]", 7, "[redacted]", null]}]})
        );
    }

    #[test]
    fn whatever_was_said_is_taken() {
        let redactor = Redactor::new(["12345678"]);
        let why = "\u{1b}".repeat(4 << 20);
        let mut message = failure(&"coder".parse().unwrap(), &RunResult::BadReply, &why);
        message.content = "12345678".repeat(limits::REPLY_BYTES / 8);
        finish(&mut message, &redactor);
        assert_eq!(message.excess(), None);
        assert_eq!(
            (message.content.as_str(), message.result()),
            ("", Some(RunResult::ReplyTooLarge))
        );
        let mut long = "ä".repeat(limits::STDERR_TAIL_BYTES);
        long.push('!');
        assert_eq!(tail(&long).len(), limits::STDERR_TAIL_BYTES - 1);
    }

    #[test]
    fn a_reply_is_text_without_newlines_at_its_end() {
        assert_eq!(decode(b"a\n\nb\n\n".to_vec()), ("a\n\nb".to_owned(), true));
        assert_eq!(
            decode(b"a\xff\0".to_vec()),
            ("a\u{fffd}\u{fffd}".to_owned(), false)
        );
    }
}
