//! nerve-worker-protocol(7), version 1: JSON objects, one a line, over a Unix stream socket. Both directions.
//!
//! Unknown fields are ignored, unknown types are an error. Fields are in camelCase, types in kebab-case, times in µs
//! since the epoch. A line that is too long is refused before it is kept.

use std::io;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _};

use crate::model::limits;
use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::status::{RunResult, Status};
use crate::model::tools::Tools;
use crate::model::workflow::Target;

/// The version this is.
pub const VERSION: u32 = 1;
/// Deepest nesting of a line.
const DEPTH: usize = 64;

/// Worker to manager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum ToManager {
    /// The worker speaks first: who it is and which runs it still has.
    Ready {
        protocol: u32,
        workflow: WorkflowName,
        runs: Vec<Held>,
    },
    /// A round is done.
    ThreadWorkflowMessage {
        run_id: RunId,
        round: u32,
        message: Message,
    },
    /// An attempt of a round failed, and another follows after the delay; attempts are numbered from 1.
    ThreadAttempt {
        run_id: RunId,
        round: u32,
        attempt: u32,
        message: Message,
        delay_ms: u64,
    },
    /// The workflow's moderator said who speaks in this round, or `$END`.
    ThreadRoute {
        run_id: RunId,
        round: u32,
        target: Target,
    },
    /// A run ended; `detail` is for people.
    ThreadEvent {
        run_id: RunId,
        event_type: EventType,
        exit_code: u8,
        result: RunResult,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// Something the worker wants logged; it ends nothing.
    Error { error: String },
}

/// A run that a worker still has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Held {
    pub run_id: RunId,
    #[serde(default)]
    pub round: u32,
    #[serde(default)]
    pub attempt: u32,
    /// It ended, and the end is not acknowledged.
    #[serde(default)]
    pub ended: bool,
}

/// How a run ended, in the worker's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventType {
    Completed,
    Failed,
    Killed,
    Aborted,
}

impl EventType {
    /// Whether an end that is said so, with this code, has this result.
    #[must_use]
    pub fn agrees(self, exit_code: u8, result: &RunResult) -> bool {
        let status = match self {
            Self::Completed => Status::Completed,
            Self::Failed => Status::Failed,
            Self::Killed => Status::Killed,
            Self::Aborted => Status::Aborted,
        };
        (status, exit_code) == result.end()
    }
}

/// Manager to worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "camelCase"
)]
pub enum ToWorker {
    /// The connection is accepted.
    Welcome {
        protocol: u32,
        workflow: WorkflowName,
    },
    /// It is not, or no longer; the connection is closed.
    Error { error: String },
    /// Execute this run.
    StartThread(Assignment),
    /// Likewise; `messages` lines of `thread-message` follow, the rounds that are done.
    ResumeThread {
        #[serde(flatten)]
        assignment: Assignment,
        messages: u32,
    },
    /// One of those.
    ThreadMessage {
        run_id: RunId,
        round: u32,
        message: Message,
    },
    /// End this run: SIGTERM, after the grace SIGKILL.
    KillThread { run_id: RunId, grace_ms: u64 },
    /// End this run when its round is done; `reason` is what the person said.
    AbortThread {
        run_id: RunId,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// This round is durable; go on.
    MessageAck { run_id: RunId, round: u32 },
    /// This attempt of a round is durable; wait, and go on.
    AttemptAck {
        run_id: RunId,
        round: u32,
        attempt: u32,
    },
    /// What the moderator said of this round is durable; go on.
    RouteAck { run_id: RunId, round: u32 },
    /// The end of this run is durable, or nobody wants it: forget the run.
    EventAck { run_id: RunId },
    /// No more runs will come; exit with 0.
    Shutdown { timeout_ms: u64 },
}

/// A run to execute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    pub run_id: RunId,
    pub attempt: u32,
    pub prompt: String,
    pub max_rounds: u32,
    pub dry_run: bool,
    pub trigger: serde_json::Value,
    /// When the run was accepted.
    pub created_at: u64,
    /// What is left of the run's time-out.
    pub timeout_ms: Option<u64>,
    /// The definition, in the shape of its file.
    pub workflow: serde_json::Value,
    /// What nerve.yaml has of the providers and agents that the definition names.
    #[serde(default, flatten)]
    pub tools: Tools,
    /// The attempts of the next round that failed, if any did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<FailedAttempts>,
    /// What the moderator said of the next round, if it has been asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<Route>,
}

/// Attempts of a round that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailedAttempts {
    pub round: u32,
    pub attempts: u32,
    /// What is left of the pause before the next one.
    pub wait_ms: u64,
}

/// What a moderator said of a round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Route {
    pub round: u32,
    pub target: Target,
}

/// Why a line could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection broke.
    #[error("connection broke")]
    Io(#[from] io::Error),
    /// It ended in the middle of a line.
    #[error("connection ended in the middle of a line")]
    CutOff,
    /// The line is longer than allowed.
    #[error("line is longer than {} bytes", limits::LINE_BYTES)]
    TooLong,
    /// The line is nested deeper than allowed.
    #[error("line is nested deeper than {DEPTH}")]
    TooDeep,
    /// The line is not a message of this protocol.
    #[error("not a message of this protocol: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// Reads one message into `line`, which is reused. `None`: the connection ended between two lines.
///
/// # Errors
/// [`FrameError`]; the connection is of no use afterwards.
pub async fn read<T: DeserializeOwned>(
    reader: &mut (impl AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
) -> Result<Option<T>, FrameError> {
    line.clear();
    loop {
        let chunk = reader.fill_buf().await?;
        if chunk.is_empty() {
            return if line.is_empty() {
                Ok(None)
            } else {
                Err(FrameError::CutOff)
            };
        }
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let taken = end.unwrap_or(chunk.len());
        if line.len() + taken > limits::LINE_BYTES {
            return Err(FrameError::TooLong);
        }
        line.extend_from_slice(&chunk[..taken]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            break;
        }
    }
    if depth(line) > DEPTH {
        return Err(FrameError::TooDeep);
    }
    let message = serde_json::from_slice(line)?;
    // One large line must not pin its memory for the connection's lifetime.
    line.shrink_to(64 * 1024);
    Ok(Some(message))
}

/// Appends one message as a line.
///
/// # Panics
/// Never: the messages are plain data, and writing to memory does not fail.
pub fn append(lines: &mut Vec<u8>, message: &impl Serialize) {
    serde_json::to_writer(&mut *lines, message).expect("messages are plain data");
    lines.push(b'\n');
}

fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_all(bytes: &[u8]) -> Result<Vec<serde_json::Value>, FrameError> {
        let (mut reader, mut line, mut all) = (bytes, Vec::new(), Vec::new());
        while let Some(value) = read(&mut reader, &mut line).await? {
            all.push(value);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn lines_are_bounded_in_length_and_depth() {
        assert_eq!(read_all(b"{\"a\":1}\n[2]\n").await.unwrap().len(), 2);
        assert!(matches!(read_all(b"{}").await, Err(FrameError::CutOff)));
        assert!(matches!(
            read_all(b"\n").await,
            Err(FrameError::Malformed(_))
        ));
        assert!(matches!(
            read_all(b"\xff\n").await,
            Err(FrameError::Malformed(_))
        ));
        assert!(matches!(
            read_all(&vec![b' '; limits::LINE_BYTES + 1]).await,
            Err(FrameError::TooLong)
        ));
        let nested = |n: usize| [b"[".repeat(n), b"]".repeat(n), b"\n".to_vec()].concat();
        assert!(read_all(&nested(64)).await.is_ok());
        assert!(matches!(
            read_all(&nested(65)).await,
            Err(FrameError::TooDeep)
        ));
        assert!(
            read_all(
                br#"["\"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["]"#
            )
            .await
            .is_err()
        );
    }

    #[test]
    fn messages_read_as_the_protocol_says() {
        let text = r#"{"type":"thread-event","runId":"00000000000070008000000000000001","eventType":"failed","exitCode":1,"result":"exit-code:3","later":true}"#;
        let event: ToManager = serde_json::from_str(text).unwrap();
        assert!(matches!(
            event,
            ToManager::ThreadEvent {
                exit_code: 1,
                result: RunResult::ExitCode(3),
                ..
            }
        ));
        let route = |target: &str| {
            let run = "00000000000070008000000000000001";
            let text = format!(
                r#"{{"type":"thread-route","runId":"{run}","round":1,"target":"{target}"}}"#
            );
            serde_json::from_str(&text).ok()
        };
        assert!(matches!(
            route("$END"),
            Some(ToManager::ThreadRoute {
                target: Target::End,
                ..
            })
        ));
        assert!(route("coder").is_some() && route("$START").is_none());
        assert!(serde_json::from_str::<ToManager>(r#"{"type":"surprise"}"#).is_err());
    }
}
