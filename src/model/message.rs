//! A message is what a round produced; a thread is the messages of a run, in order.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::limits;
use super::name::RoleName;
use super::status::RunResult;
use super::workflow::Target;

/// Status of a round that did not fail, unless its role has words of its own for that.
pub const OK: &str = "ok";
/// Status of a round that failed, for whatever reason.
pub const ERROR: &str = "error";

/// What a round produced. Round 0 is the start: role `__start__`, content = the prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// The role that spoke, or `__start__`.
    pub role: String,
    /// What it said.
    pub content: String,
    /// `status` always, what the reply says of itself, and what nerve adds; nerve-workflow(5) lists it under Statuses.
    pub meta: Map<String, Value>,
    /// µs since the epoch.
    pub timestamp: u64,
}

impl Message {
    /// The status that routes the round.
    #[must_use]
    pub fn status(&self) -> &str {
        self.text("status").unwrap_or(ERROR)
    }

    /// Why the round is an `error`.
    #[must_use]
    pub fn result(&self) -> Option<RunResult> {
        self.text("result")?.parse().ok()
    }

    /// What of it is more than nerved takes.
    #[must_use]
    pub fn excess(&self) -> Option<String> {
        let (content, meta) = (self.content.len(), self.meta_bytes());
        if content > limits::REPLY_BYTES {
            Some(format!("its content has {content} bytes"))
        } else if meta > limits::MESSAGE_META_BYTES {
            Some(format!("its meta has {meta} bytes"))
        } else if self.status().len() > limits::STATUS_BYTES {
            Some(format!("its status has {} bytes", self.status().len()))
        } else {
            None
        }
    }

    /// Length of the meta as JSON.
    #[must_use]
    pub fn meta_bytes(&self) -> usize {
        serde_json::to_string(&self.meta).map_or(0, |json| json.len())
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.meta.get(key)?.as_str()
    }
}

/// Where a thread stands: all that routing looks at.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Position {
    /// Rounds done.
    pub rounds: u32,
    /// The newest round, if there is one.
    pub last: Option<LastRound>,
    /// What the workflow's moderator said of the next one, if it has been asked.
    pub route: Option<Target>,
}

/// The newest round of a thread.
#[derive(Debug, Clone, PartialEq)]
pub struct LastRound {
    /// Who spoke.
    pub role: RoleName,
    /// How the round ended.
    pub status: String,
    /// Why, when it is an `error`.
    pub result: Option<RunResult>,
}

impl Position {
    /// The position after one more message. `None` when its role is no role name.
    #[must_use]
    pub fn after(&self, message: &Message) -> Option<Self> {
        Some(Self {
            rounds: self.rounds + 1,
            last: Some(LastRound {
                role: message.role.parse().ok()?,
                status: message.status().to_owned(),
                result: message.result(),
            }),
            route: None,
        })
    }
}
