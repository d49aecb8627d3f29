//! What an agent CLI wrote, read as its preset says. Pure.

use serde_json::{Map, Value};

use crate::config::meta::is_figure;
use crate::model::tools::{Preset, ReplyForm};

/// The reply, and the usage as far as it is there.
///
/// # Errors
/// The output is not of that form: what was expected.
pub(super) fn read(stdout: &str, preset: &Preset) -> Result<(String, Map<String, Value>), String> {
    let (mut content, mut usage) = (None, Map::new());
    let pointer = match &preset.reply {
        ReplyForm::Text => return Ok((stdout.to_owned(), usage)),
        ReplyForm::Json(pointer) => {
            let value = serde_json::from_str(stdout);
            let value: Value =
                value.map_err(|error| format!("stdout is not one JSON value: {error}"))?;
            content = value.pointer(pointer).and_then(text);
            count(&value, preset, &mut usage);
            pointer
        }
        ReplyForm::JsonLines { text: pointer, .. } => {
            // What a CLI says beside its events, warnings perhaps, is no event. There may be a lot of them, so none is kept.
            for line in stdout.lines().rev() {
                let Ok(value) = serde_json::from_str(line) else {
                    continue;
                };
                if content.is_none() && is_reply(&value, preset) {
                    content = value.pointer(pointer).and_then(text);
                }
                count(&value, preset, &mut usage);
                if content.is_some() && usage.len() == preset.usage.len() {
                    break;
                }
            }
            pointer
        }
    };
    let content = content.ok_or_else(|| match &preset.reply {
        ReplyForm::JsonLines { matching, .. } => format!(
            "no line of stdout is a JSON value with a reply at {pointer} and with {}",
            Value::from_iter(matching.clone())
        ),
        _ => format!("the JSON value on stdout has no reply at {pointer}"),
    })?;
    Ok((content, usage))
}

/// Takes the figures that are not known yet.
fn count(value: &Value, preset: &Preset, usage: &mut Map<String, Value>) {
    for (name, pointer) in &preset.usage {
        let found = value.pointer(pointer).filter(|found| is_figure(found));
        if let (Some(found), false) = (found, usage.contains_key(name)) {
            usage.insert(name.clone(), found.clone());
        }
    }
}

fn is_reply(value: &Value, preset: &Preset) -> bool {
    match &preset.reply {
        ReplyForm::JsonLines { matching, .. } => matching
            .iter()
            .all(|(pointer, expected)| value.pointer(pointer) == Some(expected)),
        _ => true,
    }
}

/// A reply as text; one that is structured is JSON.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn preset(value: Value) -> Preset {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_reply_is_read_as_the_preset_says() {
        let json = preset(json!({"exec": ["a"], "reply": {"json": "/result"},
            "usage": {"output": "/usage/out", "absent": "/no"}}));
        let usage = |value: Value| value.as_object().unwrap().clone();
        assert_eq!(
            read(r#"{"result": "done", "usage": {"out": 7}}"#, &json),
            Ok(("done".to_owned(), usage(json!({"output": 7}))))
        );
        assert_eq!(
            read(r#"{"result": {"a": 1}}"#, &json).unwrap().0,
            r#"{"a":1}"#
        );
        let lines = preset(json!({"exec": ["a"],
            "reply": {"json-lines": {"text": "/item/text", "matching": {"/type": "done"}}},
            "usage": {"input": "/usage/in"}}));
        let stdout = "warning: old\n{\"type\":\"done\",\"item\":{\"text\":\"one\"}}\n\
            {\"type\":\"done\",\"item\":{\"text\":\"two\"}}\n{\"type\":\"other\",\"item\":{\"text\":\"no\"}}\n\
            {\"type\":\"end\",\"usage\":{\"in\":3}}";
        assert_eq!(
            read(stdout, &lines),
            Ok(("two".to_owned(), usage(json!({"input": 3}))))
        );
    }

    #[test]
    fn what_is_not_of_the_form_is_told_with_what_was_expected() {
        let json = preset(json!({"exec": ["a"], "reply": {"json": "/result"}}));
        let lines = preset(json!({"exec": ["a"],
            "reply": {"json-lines": {"text": "/text", "matching": {"/type": "done"}}}}));
        for (stdout, preset, expected) in [
            ("hello", &json, "stdout is not one JSON value: "),
            ("{}", &json, "has no reply at /result"),
            (r#"{"result": null}"#, &json, "has no reply at /result"),
            (
                r#"{"text": "a"}"#,
                &lines,
                r#"a reply at /text and with {"/type":"done"}"#,
            ),
            ("", &lines, "no line of stdout"),
        ] {
            let error = read(stdout, preset).unwrap_err();
            assert!(error.contains(expected), "{stdout}: {error}");
        }
    }
}
