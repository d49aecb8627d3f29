//! What nerve.yaml provides for roles: LLM providers and agent CLIs. `config` reads it, the worker gets what its runs need.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::limits;
use super::workflow::Workflow;

/// Providers and agents by name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Tools {
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub providers: BTreeMap<String, Provider>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub agents: BTreeMap<String, Preset>,
}

/// An OpenAI-compatible HTTP server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Provider {
    /// What comes before `/chat/completions`.
    pub base_url: String,
    /// Which model, where the role does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The credential that holds the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential: Option<String>,
    /// For one call.
    pub timeout_ms: u64,
}

/// How an agent CLI is called and understood.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preset {
    /// argv; a role's own words follow.
    pub exec: Vec<String>,
    #[serde(default)]
    pub prompt: PromptBy,
    #[serde(default)]
    pub reply: ReplyForm,
    /// JSON pointers into what the reply was read from, by the names that `meta.usage` has.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub usage: BTreeMap<String, String>,
}

/// How an agent gets its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromptBy {
    /// It reads it.
    #[default]
    Stdin,
    /// It is the last word of its argv: one of at most 128 KiB, which is all that Linux allows.
    Argument,
}

/// What an agent writes on stdout. Pointers are RFC 6901's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplyForm {
    /// The reply.
    #[default]
    Text,
    /// One JSON value; the reply is at this pointer.
    Json(String),
    /// JSON values, one a line; the reply is at this pointer of the last one that has these values.
    JsonLines {
        text: String,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        matching: BTreeMap<String, Value>,
    },
}

impl Tools {
    /// What a workflow uses of it.
    #[must_use]
    pub fn of(&self, workflow: &Workflow) -> Self {
        let roles = || workflow.roles.values();
        let provider = |name: &str| Some((name.to_owned(), self.providers.get(name)?.clone()));
        let agent = |name: &str| Some((name.to_owned(), self.agents.get(name)?.clone()));
        Self {
            providers: roles()
                .flat_map(|role| role.providers().filter_map(provider))
                .collect(),
            agents: roles().filter_map(|role| agent(role.agent()?)).collect(),
        }
    }

    /// These, where `later` is silent.
    #[must_use]
    pub fn beaten_by(mut self, later: Self) -> Self {
        self.providers.extend(later.providers);
        self.agents.extend(later.agents);
        self
    }

    /// The credentials that hold keys.
    pub fn credentials(&self) -> impl Iterator<Item = &String> {
        self.providers
            .values()
            .filter_map(|provider| provider.credential.as_ref())
    }
}

impl Default for Provider {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            model: None,
            credential: None,
            timeout_ms: u64::try_from(limits::LLM_TIMEOUT.as_millis()).unwrap_or(u64::MAX),
        }
    }
}
