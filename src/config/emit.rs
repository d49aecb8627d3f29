//! Values as YAML that people go on writing. Called by `convert` only.

use std::fmt::Write as _;

use serde_json::Value;

/// Longest line of a list or map that is written as one.
const LINE: usize = 80;

/// A key and its value, so far indented, as lines.
pub(super) fn entry(out: &mut String, indent: usize, key: &str, value: &Value) {
    let space = " ".repeat(indent);
    let key = scalar(key);
    match value {
        Value::String(text) if is_block(text) => {
            let _ = writeln!(out, "{space}{key}: |");
            for line in text.trim_end_matches('\n').lines() {
                let _ = match line {
                    "" => writeln!(out),
                    line => writeln!(out, "{space}  {line}"),
                };
            }
        }
        Value::Object(map) if !is_flow(value, indent + key.len()) => {
            let _ = writeln!(out, "{space}{key}:");
            for (key, value) in map {
                entry(out, indent + 2, key, value);
            }
        }
        Value::Array(list) if !is_flow(value, indent + key.len()) => {
            let _ = writeln!(out, "{space}{key}:");
            for item in list {
                let _ = writeln!(out, "{space}  - {}", flow(item));
            }
        }
        value => {
            let _ = writeln!(out, "{space}{key}: {}", flow(value));
        }
    }
}

/// Several lines that a block keeps as they are.
fn is_block(text: &str) -> bool {
    text.contains('\n')
        && !text.starts_with([' ', '\t', '\n'])
        && text.chars().all(|c| c == '\n' || is_printable(c))
        && !text.ends_with("\n\n")
        && text.ends_with('\n')
}

fn is_flow(value: &Value, before: usize) -> bool {
    let is_empty = value.as_object().is_some_and(serde_json::Map::is_empty);
    is_empty || before + flow(value).len() <= LINE && !has_nested_maps(value)
}

/// Maps in maps are easier to read line by line.
fn has_nested_maps(value: &Value) -> bool {
    let nested = |value: &Value| {
        value
            .as_object()
            .is_some_and(|map| map.values().any(Value::is_object))
    };
    nested(value) || value.as_array().is_some_and(|list| list.iter().any(nested))
}

fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        Value::Array(list) => {
            let items: Vec<String> = list.iter().map(flow).collect();
            format!("[{}]", items.join(", "))
        }
        Value::Object(map) if map.is_empty() => "{}".to_owned(),
        Value::Object(map) => {
            let entry =
                |(key, value): (&String, &Value)| format!("{}: {}", scalar(key), flow(value));
            let entries: Vec<String> = map.iter().map(entry).collect();
            format!("{{ {} }}", entries.join(", "))
        }
        other => other.to_string(),
    }
}

/// What YAML lets stand for itself.
pub(super) fn is_printable(c: char) -> bool {
    let is_break = matches!(
        c,
        '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}'
    );
    !is_break && (c == '\t' || !c.is_control())
}

/// A text that every reader of YAML takes for that text: JSON's is YAML's, but for what YAML wants to be escaped.
fn scalar(text: &str) -> String {
    const WORDS: [&str; 10] = [
        "true", "false", "null", "yes", "no", "on", "off", "y", "n", "inf",
    ];
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '$')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-$".contains(c))
        && !WORDS.iter().any(|word| word.eq_ignore_ascii_case(text));
    if is_plain {
        return text.to_owned();
    }
    let mut quoted = String::new();
    for c in Value::from(text).to_string().chars() {
        if is_printable(c) {
            quoted.push(c);
        } else {
            let _ = write!(quoted, "\\u{:04x}", u32::from(c));
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Our reader and everybody's read the same.
        #[test]
        fn what_is_written_reads_back(texts in prop::collection::vec("(?s).{0,12}", 4), word in "[a-z$~#:-]{0,6}") {
            let value = serde_json::json!({
                "a": texts[0], "b": {"c": [texts[1].clone(), {"d": texts[2]}], "e": {}}, "f": {"g": {"h": format!("{}\n", texts[3])}},
                word: 1,
            });
            let mut text = String::new();
            for (key, value) in value.as_object().unwrap() {
                entry(&mut text, 0, key, value);
            }
            let theirs: Value = serde_yaml::from_str(&text).unwrap();
            prop_assert_eq!(&theirs, &value, "{}", text);
            let (node, faults) = super::super::yaml::parse(&text);
            prop_assert!(faults.is_empty(), "{faults:?} {text}");
            prop_assert_eq!(super::super::yaml::to_json(&node.unwrap()), value);
        }
    }
}
