//! What a reply has to say of itself: the JSON Schema of a role's `meta`, what its statuses are, and whether a reply
//! keeps to it. Pure; called when a definition is read and by the worker.
//!
//! A schema is bounded in size and depth, refers to nothing, and its patterns are matched in linear time: neither it
//! nor a reply can hold anybody up.

use jsonschema::error::ValidationErrorKind;
use jsonschema::{PatternOptions, ValidationError, Validator};
use serde_json::{Map, Value};

use super::diagnostic::escaped;
use super::yaml;
use crate::model::limits;
use crate::model::message::{ERROR, OK};

/// What nerve itself writes into a message's `meta`.
pub const RESERVED: [&str; 10] = [
    "exitCode",
    "signal",
    "stderr",
    "result",
    "usage",
    "model",
    "extraction",
    "attempts",
    "dryRun",
    "prompt",
];
/// Most violations that a role is told of at once.
const VIOLATIONS: usize = 10;
/// Longest text of one of them: it quotes the reply.
const VIOLATION_CHARS: usize = 300;
/// What the patterns of a schema may take together when they are compiled.
const PATTERN_BYTES: usize = 16 * 1024 * 1024;

/// A schema, compiled once.
#[derive(Debug)]
pub struct Checker {
    schema: Value,
    statuses: Vec<String>,
    validator: Validator,
}

impl Checker {
    /// Compiles a schema.
    ///
    /// # Errors
    /// What is wrong with it, and what to do.
    pub fn new(schema: &Value) -> Result<Self, String> {
        let Some(keywords) = schema.as_object() else {
            return Err("a schema is a map, such as {type: object, properties: {…}}".to_owned());
        };
        if keywords.get("type").is_some_and(|kind| kind != "object") {
            return Err("the schema of a meta is of `type: object`".to_owned());
        }
        bounded(schema, "the schema")?;
        if refers(schema) {
            return Err("a schema cannot refer to others ($ref): write them out".to_owned());
        }
        let mut parts = vec![keywords];
        parts.extend(
            branches(schema)
                .iter()
                .filter_map(|branch| branch.as_object()),
        );
        let properties = parts
            .iter()
            .filter_map(|part| part.get("properties")?.as_object());
        if let Some(key) = properties
            .flat_map(Map::keys)
            .find(|key| RESERVED.contains(&key.as_str()))
        {
            return Err(format!(
                "`{key}` is what nerve itself writes there: give it another name"
            ));
        }
        let share = PATTERN_BYTES / patterns(schema).max(1);
        let validator = jsonschema::options()
            .offline()
            .with_pattern_options(PatternOptions::regex().size_limit(share))
            .build(schema)
            .map_err(|error| format!("not a JSON Schema: {}", described(&error)))?;
        Ok(Self {
            statuses: statuses(schema)?,
            schema: schema.clone(),
            validator,
        })
    }

    /// The schema.
    #[must_use]
    pub fn schema(&self) -> &Value {
        &self.schema
    }

    /// The values that a reply's `status` may have; [`OK`] alone when the schema says nothing of it.
    #[must_use]
    pub fn statuses(&self) -> &[String] {
        &self.statuses
    }

    /// Whether a reply's meta is as the schema says. One whose schema says nothing of `status` has [`OK`] afterwards.
    ///
    /// # Errors
    /// Everything that is wrong with it, for whoever wrote it.
    pub fn check(&self, mut meta: Map<String, Value>) -> Result<Map<String, Value>, String> {
        let value = Value::Object(meta.clone());
        bounded(&value, "the meta")?;
        let status = meta.get("status").and_then(Value::as_str);
        let mut violations = Vec::new();
        for error in self.validator.iter_errors(&value) {
            self.describe(&error, status, &mut violations);
        }
        if !meta.contains_key("status") && self.statuses == [OK] {
            meta.insert("status".into(), OK.into());
        }
        let said = meta
            .get("status")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if !self.statuses.iter().any(|status| status == said) {
            violations.insert(
                0,
                format!("/status: it is one of {}", self.statuses.join(", ")),
            );
        }
        if violations.is_empty() {
            return Ok(meta);
        }
        violations.dedup();
        violations.truncate(VIOLATIONS);
        Err(violations.join("; "))
    }

    /// One violation; of alternatives, those of the one that the status chose.
    fn describe(
        &self,
        error: &ValidationError<'_>,
        status: Option<&str>,
        violations: &mut Vec<String>,
    ) {
        let (ValidationErrorKind::OneOfNotValid { context }
        | ValidationErrorKind::AnyOf { context }) = error.kind()
        else {
            return violations.push(described(error));
        };
        let chosen = branches(&self.schema).iter().position(|branch| {
            status.is_some_and(|status| words(branch).is_some_and(|words| words.contains(&status)))
        });
        match chosen.and_then(|chosen| context.get(chosen)) {
            Some(errors) if error.instance_path().as_str().is_empty() => {
                violations.extend(errors.iter().map(described));
            }
            _ => violations.push(described(error)),
        }
    }
}

/// The values that a `status` of this schema may have: those of `properties.status`, or of the alternatives.
fn statuses(schema: &Value) -> Result<Vec<String>, String> {
    let of_branches = || {
        let words: Option<Vec<_>> = branches(schema).iter().map(words).collect();
        words.map(|words| words.concat())
    };
    let found = words(schema).or_else(of_branches).unwrap_or_default();
    let says = |schema: &Value| schema.pointer("/properties/status").is_some();
    if found.is_empty() && (says(schema) || branches(schema).iter().any(says)) {
        let why = "its status has neither const nor enum, or not in each of the alternatives: what is not named has no route";
        return Err(why.to_owned());
    }
    let mut statuses: Vec<String> = Vec::new();
    for word in found {
        let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        if word == ERROR
            || word.is_empty()
            || word.len() > limits::STATUS_BYTES
            || !word.chars().all(is_word)
        {
            let most = limits::STATUS_BYTES;
            return Err(format!(
                "{word:?} is no status: use at most {most} letters, digits, `-` and `_`, and not error, which is nerve's own"
            ));
        }
        if !statuses.iter().any(|known| known == word) {
            statuses.push(word.to_owned());
        }
    }
    if statuses.is_empty() {
        statuses.push(OK.to_owned());
    }
    Ok(statuses)
}

/// The map that this YAML is, as a reply's frontmatter has it. What the schema wants as text stays text.
///
/// # Errors
/// Where it is none.
pub fn frontmatter(text: &str, checker: &Checker) -> Result<Map<String, Value>, String> {
    let (node, faults) = yaml::parse(text);
    if let Some(fault) = faults.first() {
        return Err(format!(
            "line {} of the frontmatter: {}",
            fault.place.line, fault.message
        ));
    }
    let Some(Value::Object(mut meta)) = node.as_ref().map(yaml::to_json) else {
        return Err("the frontmatter is no map of `key: value` lines".to_owned());
    };
    if let Some(status) = meta.get_mut("status") {
        make_text(status);
    }
    let status = meta.get("status").and_then(Value::as_str);
    let status = status.unwrap_or_default().to_owned();
    let is_chosen =
        |branch: &&Value| words(branch).is_none_or(|words| words.contains(&status.as_str()));
    let mut parts = vec![&checker.schema];
    parts.extend(branches(&checker.schema).iter().filter(is_chosen));
    for (key, value) in &mut meta {
        let mut properties = parts
            .iter()
            .filter_map(|part| part.get("properties")?.get(key));
        if properties.any(|property| wants_text(property, value)) {
            make_text(value);
        }
    }
    Ok(meta)
}

/// Whether a property of this schema is text, or a text that reads like this value.
fn wants_text(property: &Value, value: &Value) -> bool {
    let text = Value::String(value.to_string());
    property.get("type").is_some_and(|kind| kind == "string")
        || property.get("const") == Some(&text)
        || property
            .get("enum")
            .and_then(Value::as_array)
            .is_some_and(|words| words.contains(&text) && !words.contains(value))
}

fn make_text(value: &mut Value) {
    if value.is_number() || value.is_boolean() {
        *value = Value::String(value.to_string());
    }
}

/// What `properties.status` allows, when it names it.
fn words(schema: &Value) -> Option<Vec<&str>> {
    let status = schema.pointer("/properties/status")?;
    match (status.get("const"), status.get("enum")) {
        (Some(word), _) => Some(vec![word.as_str()?]),
        (None, Some(Value::Array(words))) => words.iter().map(Value::as_str).collect(),
        _ => None,
    }
}

fn branches(schema: &Value) -> &[Value] {
    let of = |key| schema.get(key).and_then(Value::as_array);
    of("oneOf")
        .or_else(|| of("anyOf"))
        .map_or(&[], Vec::as_slice)
}

fn refers(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => map.iter().any(|(key, value)| {
            matches!(key.as_str(), "$ref" | "$dynamicRef" | "$recursiveRef") && value.is_string()
                || refers(value)
        }),
        Value::Array(values) => values.iter().any(refers),
        _ => false,
    }
}

/// How many patterns there are, at most.
fn patterns(schema: &Value) -> usize {
    match schema {
        Value::Object(map) => {
            let of = |(key, value): (&String, &Value)| {
                let here = match (key.as_str(), value) {
                    ("pattern", _) => 1,
                    ("patternProperties", Value::Object(map)) => map.len(),
                    _ => 0,
                };
                here + patterns(value)
            };
            map.iter().map(of).sum()
        }
        Value::Array(values) => values.iter().map(patterns).sum(),
        _ => 0,
    }
}

/// Whether this is as small and as shallow as a meta is.
pub(super) fn bounded(value: &Value, what: &str) -> Result<(), String> {
    let (bytes, deepest) = (limits::META_BYTES, limits::META_DEPTH);
    if depth(value) > deepest {
        return Err(format!("{what} is nested deeper than {deepest} levels"));
    }
    if value.to_string().len() > bytes {
        return Err(format!("{what} is larger than {bytes} bytes"));
    }
    Ok(())
}

/// Whether this may be kept as what a call took.
#[must_use]
pub fn is_figure(value: &Value) -> bool {
    depth(value) <= limits::USAGE_DEPTH && value.to_string().len() <= limits::USAGE_BYTES
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Path and fault, on one line.
fn described(error: &ValidationError<'_>) -> String {
    let mut text: String = error
        .to_string()
        .chars()
        .take(VIOLATION_CHARS + 1)
        .collect();
    if text.chars().count() > VIOLATION_CHARS {
        text.pop();
        text.push('…');
    }
    let text = escaped(&text);
    match error.instance_path().as_str() {
        "" => text,
        path => format!("{}: {text}", escaped(path)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn checked(schema: &Value, meta: &Value) -> Result<Map<String, Value>, String> {
        Checker::new(schema)
            .unwrap()
            .check(meta.as_object().unwrap().clone())
    }

    #[test]
    fn a_figure_is_small_and_shallow() {
        let nested = |depth| {
            serde_json::from_str(&format!("{}{}", "[".repeat(depth), "]".repeat(depth))).unwrap()
        };
        assert!(
            is_figure(&nested(limits::USAGE_DEPTH)) && !is_figure(&nested(limits::USAGE_DEPTH + 1))
        );
        assert!(!is_figure(&json!("x".repeat(limits::USAGE_BYTES))));
    }

    #[test]
    fn statuses_are_those_that_the_schema_names() {
        let status = |status: Value| json!({"properties": {"status": status}});
        let rows = [
            (json!({}), vec!["ok"]),
            (json!({"properties": {"files": {}}}), vec!["ok"]),
            (
                status(json!({"enum": ["done", "continue", "done"]})),
                vec!["done", "continue"],
            ),
            (status(json!({"const": "done"})), vec!["done"]),
            (
                json!({"oneOf": [status(json!({"const": "a"})), status(json!({"enum": ["b", "a"]}))]}),
                vec!["a", "b"],
            ),
            (
                json!({"anyOf": [status(json!({"const": "a"}))], "properties": {"status": {"type": "string"}}}),
                vec!["a"],
            ),
            (
                json!({"oneOf": [{"required": ["x"]}, {"required": ["y"]}]}),
                vec!["ok"],
            ),
        ];
        for (schema, expected) in rows {
            assert_eq!(statuses(&schema).unwrap(), expected, "{schema}");
        }
        for unnamed in [
            status(json!({"type": "string"})),
            status(json!({"enum": []})),
            status(json!({"enum": ["a", 3]})),
            status(json!({"const": "error"})),
            status(json!({"const": "two words"})),
            status(json!({"const": "x".repeat(65)})),
            json!({"oneOf": [status(json!({"const": "a"})), {"required": ["x"]}]}),
        ] {
            assert!(statuses(&unnamed).is_err(), "{unnamed}");
        }
    }

    #[test]
    fn a_schema_is_bounded_and_refers_to_nothing() {
        let deep = |levels| (0..levels).fold(json!({}), |schema, _| json!({"items": schema}));
        let rows = [
            (json!("text"), "a map"),
            (json!({"type": "array"}), "type: object"),
            (
                json!({"type": "object", "properties": 3}),
                "not a JSON Schema: /properties",
            ),
            (json!({"properties": {"x": {"$ref": "#"}}}), "$ref"),
            (
                json!({"$schema": "http://127.0.0.1/schema"}),
                "not a JSON Schema",
            ),
            (
                json!({"properties": {"x": {"pattern": "(a)\\1"}}}),
                "not a JSON Schema: /properties/x/pattern",
            ),
            (
                json!({"properties": {"x": {"pattern": "(a{9999}){9999}"}}}),
                "not a JSON Schema",
            ),
            (
                json!({"allOf": vec![json!({"pattern": "(\\p{L}{20}){9}"}); 100]}),
                "not a JSON Schema",
            ),
            (json!({"properties": {"stderr": {}}}), "`stderr`"),
            (
                json!({"oneOf": [{"properties": {"status": {"const": "a"}, "usage": {}}}]}),
                "`usage`",
            ),
            (deep(limits::META_DEPTH), "deeper than 32"),
            (
                json!({"description": "x".repeat(limits::META_BYTES)}),
                "larger than 65536",
            ),
        ];
        for (schema, expected) in rows {
            let error = Checker::new(&schema).unwrap_err();
            assert!(error.contains(expected), "{schema}: {error}");
        }
        assert!(Checker::new(&deep(limits::META_DEPTH - 1)).is_ok());
        let honest = "^[A-Z]{2,9}-\\d+: \\p{L}{1,32}$";
        let schema = json!({"allOf": vec![json!({"items": {"pattern": honest}}); 8]});
        assert!(Checker::new(&schema).is_ok());
    }

    #[test]
    fn every_violation_is_told_with_its_path_and_what_was_expected() {
        let schema = json!({
            "type": "object",
            "required": ["status", "files"],
            "properties": {
                "status": {"enum": ["done", "continue"]},
                "files": {"type": "array", "items": {"type": "string"}},
                "score": {"maximum": 1},
            },
        });
        assert!(
            checked(
                &schema,
                &json!({"status": "done", "files": ["a"], "score": 0.5})
            )
            .is_ok()
        );
        let error = checked(
            &schema,
            &json!({"status": "donе", "files": [1, "a", null], "score": 2}),
        )
        .unwrap_err();
        let expected = [
            "/status: it is one of done, continue",
            "/files/0: 1 is not of type \"string\"",
            "/files/2: null is not of type \"string\"",
            "/score: 2 is greater than the maximum of 1",
        ];
        for part in expected {
            assert!(error.contains(part), "{error}");
        }
        let error = checked(&schema, &json!({"score": "x".repeat(9_000)})).unwrap_err();
        assert!(
            error.contains("\"files\" is a required property") && error.len() < 1_000,
            "{error}"
        );
        let error = checked(&schema, &json!({"status": "done", "files": vec![1; 99]})).unwrap_err();
        assert_eq!(error.split("; ").count(), VIOLATIONS);
    }

    #[test]
    fn of_alternatives_the_one_that_the_status_chose_is_told_of() {
        let branch = |status: &str, key: &str| json!({"properties": {"status": {"const": status}, key: {"type": "string"}}, "required": ["status", key]});
        let schema = json!({"type": "object", "oneOf": [branch("done", "summary"), branch("blocked", "question")]});
        assert!(checked(&schema, &json!({"status": "blocked", "question": "why?"})).is_ok());
        let error = checked(&schema, &json!({"status": "blocked", "summary": "x"})).unwrap_err();
        assert_eq!(error, "\"question\" is a required property");
        let error = checked(&schema, &json!({"status": "other"})).unwrap_err();
        assert!(
            error.starts_with("/status: it is one of done, blocked"),
            "{error}"
        );
    }

    #[test]
    fn a_status_is_there_even_when_the_schema_does_not_ask_for_it() {
        let loose = json!({"properties": {"status": {"enum": ["done"]}}});
        assert!(checked(&loose, &json!({})).unwrap_err().contains("/status"));
        assert_eq!(checked(&json!({}), &json!({})).unwrap()["status"], "ok");
        assert!(checked(&json!({}), &json!({"status": "other"})).is_err());
        assert!(checked(&json!({}), &json!({"a": "x".repeat(limits::META_BYTES)})).is_err());
    }

    #[test]
    fn frontmatter_is_typed_as_yaml_is_but_text_stays_text_where_the_schema_wants_it() {
        let schema =
            json!({"properties": {"commit": {"type": "string"}, "lines": {"type": "integer"}}});
        let checker = Checker::new(&schema).unwrap();
        let meta = frontmatter(
            "commit: 1234567\nlines: 12\nscore: 0.5\nflag: true\nversion: 1.10",
            &checker,
        )
        .unwrap();
        let expected = json!({"commit": "1234567", "lines": 12, "score": 0.5, "flag": true, "version": "1.10"});
        assert_eq!(Value::Object(meta), expected);
        let commit = json!({"status": {"const": "true"}, "commit": {"type": "string"}});
        let count =
            json!({"status": {"const": "2"}, "commit": {"enum": ["1"]}, "n": {"enum": ["1", 1]}});
        let schema = json!({"oneOf": [{"properties": commit}, {"properties": count}]});
        let checker = Checker::new(&schema).unwrap();
        for (text, expected) in [
            (
                "status: true\ncommit: 12",
                json!({"status": "true", "commit": "12"}),
            ),
            (
                "status: 2\ncommit: 1\nn: 1",
                json!({"status": "2", "commit": "1", "n": 1}),
            ),
        ] {
            let meta = frontmatter(text, &checker).unwrap();
            assert_eq!(Value::Object(checker.check(meta).unwrap()), expected);
        }
        let checker = Checker::new(&json!({})).unwrap();
        for (text, expected) in [
            ("a: b: c", "line 1"),
            ("a: 1\na: 2", "line 2"),
            ("- a", "no map"),
            ("", "empty"),
        ] {
            let error = frontmatter(text, &checker).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
