//! The JSON Schemas of replies. Called by `roles`.

use serde_json::Value;

use crate::model::message::{ERROR, OK};

/// The values that `status` can have in what a schema allows: `ok` alone when it has no `status`.
///
/// # Errors
/// What is wrong with the schema.
pub fn statuses(schema: &Value) -> Result<Vec<String>, String> {
    let branches = ["oneOf", "anyOf"]
        .iter()
        .filter_map(|key| schema.get(key)?.as_array())
        .flatten();
    let mut statuses = Vec::new();
    for schema in std::iter::once(schema).chain(branches) {
        let Some(status) = schema.pointer("/properties/status") else {
            continue;
        };
        let words = match (status.get("const"), status.get("enum")) {
            (Some(word), _) => vec![word],
            (None, Some(Value::Array(words))) => words.iter().collect(),
            _ => return Err("its status has neither const nor enum".to_owned()),
        };
        for word in words {
            let word = word
                .as_str()
                .filter(|word| !word.is_empty() && *word != ERROR);
            let word = word.ok_or("a status must be text, and not error, which is nerve's own")?;
            if !statuses.iter().any(|known| known == word) {
                statuses.push(word.to_owned());
            }
        }
    }
    if statuses.is_empty() {
        statuses.push(OK.to_owned());
    }
    Ok(statuses)
}
