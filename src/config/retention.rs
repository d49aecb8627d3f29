//! `retention`, in nerve.yaml and in a definition: how long runs that have ended are kept.

use super::diagnostic::quoted;
use super::reader::Reader;
use super::yaml::Node;
use crate::model::limits;
use crate::model::retention::{INFINITY, Retention};

const KEYS: [&str; 2] = ["days", "runs"];

pub(super) fn read(reader: &mut Reader, node: &Node) -> Retention {
    let Some(fields) = reader.fields(node, "retention", &KEYS) else {
        return Retention::default();
    };
    let mut limit = |key: &str, most: u32| {
        let node = &fields.get(key)?.value;
        let text = reader.text(node, key)?;
        if text == "infinity" {
            return Some(INFINITY);
        }
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text
            .parse()
            .ok()
            .filter(|number| is_number && *number <= most);
        if number.is_none() {
            reader.error_help(
                node.place,
                format!("{key} is {}", quoted(text)),
                format!("write a whole number from 0 to {most}, or infinity"),
            );
        }
        number
    };
    Retention {
        days: limit("days", limits::RETENTION_DAYS),
        runs: limit("runs", limits::RETENTION_RUNS),
    }
}
