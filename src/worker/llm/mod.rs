//! One chat completion: `nerve-worker --llm`, a child in the run's cgroup like every role, so that a kill takes its
//! connection along. The child reads a [`Call`] from stdin and writes JSON lines to stdout, which the worker
//! [`read`]s.
//!
//! The key is a credential of the worker's unit, and the child alone reads it: it is in no argv, no environment and no
//! frame, and what the server says comes without it.

mod child;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use child::run;

use crate::model::status::LlmError;

/// What the child is told, as one JSON object.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// `http://` or `https://`; `/chat/completions` is put behind it.
    pub base_url: String,
    pub model: String,
    /// Where the key is; without one none is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    pub messages: Vec<Turn>,
    /// Whether the reply is to come piece by piece.
    #[serde(default)]
    pub stream: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<u32>,
    /// For all of it.
    pub timeout_ms: u64,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub role: Speaker,
    pub content: String,
}

/// Who says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    System,
    User,
    Assistant,
}

/// What the server said.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    pub content: String,
    /// As the server counts.
    pub usage: Option<Map<String, Value>>,
    /// Which model it was.
    pub model: Option<String>,
    /// `stop`; `length` when `max_tokens` cut it; and others.
    pub finish_reason: Option<String>,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    pub class: LlmError,
    /// Of HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// For people: what, where, and what to do. Without secrets and control characters.
    pub message: String,
    /// What the server asks for before the next attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
}

impl Failure {
    fn new(class: LlmError, message: String) -> Self {
        Self {
            class,
            status: None,
            message,
            retry_after_ms: None,
        }
    }
}

/// Most that the child writes: pieces are small, and what is around each grows with their number.
pub const OUTPUT_BYTES: usize = 32 * 1024 * 1024;

/// A line of the child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    /// A piece of the reply; empty when the server only said that it lives.
    Text { text: String },
    /// It failed.
    #[serde(rename_all = "camelCase")]
    Error { error: Failure },
    /// That was all.
    #[serde(rename_all = "camelCase")]
    End {
        usage: Option<Map<String, Value>>,
        model: Option<String>,
        finish_reason: Option<String>,
    },
}

/// What the child wrote, as an answer. Only a last line makes it one. NUL is no text: D-Bus cannot carry it.
///
/// # Errors
/// What the child says, or that it ended without a word.
pub fn read(stdout: &[u8]) -> Result<Answer, Failure> {
    let mut content = String::new();
    for line in stdout
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        match serde_json::from_slice(line) {
            Ok(Line::Text { text }) => content.push_str(&text.replace('\0', "\u{fffd}")),
            Ok(Line::Error { error }) => return Err(error),
            Ok(Line::End {
                usage,
                model,
                finish_reason,
            }) => {
                return Ok(Answer {
                    content,
                    usage,
                    model,
                    finish_reason,
                });
            }
            Err(_) => break,
        }
    }
    let why = "the process that called the LLM ended before it was done";
    Err(Failure::new(LlmError::CutOff, why.to_owned()))
}
