//! A role: one kind of work in a workflow, who does it, and what is expected of it. Plain data: `config` reads it from
//! files, the worker acts on it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde_json::{Map, Value};

use super::message::OK;
use super::status::RunResult;

/// One kind of work.
#[derive(Debug, Clone, PartialEq)]
pub struct Role {
    /// Who does it.
    pub work: Work,
    /// Template of what a command reads on stdin, and of an LLM's system message. A command without one has an empty stdin.
    pub prompt: Option<String>,
    /// An attempt that takes longer has failed.
    pub timeout: Option<Duration>,
    /// So has one that says nothing for so long.
    pub stall: Option<Duration>,
    /// Absolute; without one the run's own directory.
    pub cwd: Option<String>,
    /// What its processes have in their environment beside what every role has.
    pub environment: BTreeMap<String, Variable>,
    /// The exit codes that are `ok`.
    pub ok_codes: BTreeSet<u8>,
    /// What its reply has to say of itself.
    pub meta: Option<Meta>,
    /// The provider that makes a meta of a reply that has none.
    pub extract: Option<String>,
    /// How often, and after what, it is tried again.
    pub retry: Retry,
    /// What it does in a dry run.
    pub rehearsal: Rehearsal,
}

impl Role {
    /// A command that nothing is said of.
    #[must_use]
    pub fn command(argv: Vec<String>) -> Self {
        Self {
            work: Work::Exec(argv),
            prompt: None,
            timeout: None,
            stall: None,
            cwd: None,
            environment: BTreeMap::new(),
            ok_codes: BTreeSet::from([0]),
            meta: None,
            extract: None,
            retry: Retry::default(),
            rehearsal: Rehearsal::default(),
        }
    }

    /// What its rounds can end with, `error` aside.
    pub fn statuses(&self) -> impl Iterator<Item = &str> {
        let of_meta = self.meta.iter().flat_map(|meta| &meta.statuses);
        let plain = self.meta.is_none().then_some(OK);
        of_meta.map(String::as_str).chain(plain)
    }

    /// The providers of nerve.yaml that it needs.
    pub fn providers(&self) -> impl Iterator<Item = &str> {
        let own = match &self.work {
            Work::Llm(llm) => Some(&llm.provider),
            Work::Exec(_) | Work::Agent(_) => None,
        };
        own.into_iter().chain(&self.extract).map(String::as_str)
    }

    /// The credentials that its environment needs.
    pub fn credentials(&self) -> impl Iterator<Item = String> {
        self.environment
            .values()
            .filter_map(|variable| match variable {
                Variable::Credential(name) => Some(name.clone()),
                Variable::Text(_) => None,
            })
    }

    /// The preset of nerve.yaml that it needs.
    #[must_use]
    pub fn agent(&self) -> Option<&str> {
        match &self.work {
            Work::Agent(agent) => Some(&agent.name),
            Work::Exec(_) | Work::Llm(_) => None,
        }
    }
}

/// Who does a role's work.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// A command: argv; no shell.
    Exec(Vec<String>),
    /// An LLM, asked once.
    Llm(Llm),
    /// An agent CLI.
    Agent(Agent),
}

/// One chat completion.
#[derive(Debug, Clone, PartialEq)]
pub struct Llm {
    /// Its name in nerve.yaml.
    pub provider: String,
    /// Instead of the provider's.
    pub model: Option<String>,
    /// Template of the user's message; without one it is the content of the start.
    pub user: Option<String>,
    /// 0 to 2.
    pub temperature: Option<f64>,
    /// Most tokens of the reply.
    pub max_tokens: Option<u32>,
    /// Whether the reply comes piece by piece.
    pub is_streamed: bool,
}

/// An agent CLI, as nerve.yaml describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// The preset's name.
    pub name: String,
    /// Words that follow the preset's.
    pub arguments: Vec<String>,
}

/// The value of an environment variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Variable {
    /// This text.
    Text(String),
    /// What the worker unit's credential of this name holds.
    Credential(String),
}

/// What a reply has to say of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Meta {
    /// A JSON Schema of an object.
    pub schema: Value,
    /// The values that its `status` may have; `ok` alone when it has no `status`.
    pub statuses: Vec<String>,
}

/// What a role does in a dry run.
#[derive(Debug, Clone, PartialEq)]
pub enum Rehearsal {
    /// It says this; nothing is executed.
    Say {
        content: String,
        /// Its `status` is the first of the role's when it has none.
        meta: Map<String, Value>,
    },
    /// What it always does, and is told by NERVE_DRY_RUN that it does not count.
    Execute,
}

impl Default for Rehearsal {
    fn default() -> Self {
        Self::Say {
            content: String::new(),
            meta: Map::new(),
        }
    }
}

/// How often a round is tried, and when again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all.
    pub attempts: u32,
    /// Before the second attempt; it doubles before each further one…
    pub backoff: Duration,
    /// …up to this.
    pub max_backoff: Duration,
    /// Results, or what is before their colon; none of them: whatever the error is.
    pub on: Vec<String>,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            attempts: 1,
            backoff: Duration::from_secs(1),
            max_backoff: Duration::from_secs(60),
            on: Vec::new(),
        }
    }
}

impl Retry {
    /// Whether this failure of the attempt of this number, from 1, is followed by another attempt.
    #[must_use]
    pub fn allows(&self, attempt: u32, result: &RunResult) -> bool {
        let result = result.to_string();
        let class = result.split(':').next();
        let matches = |word: &String| *word == result || Some(word.as_str()) == class;
        attempt < self.attempts && (self.on.is_empty() || self.on.iter().any(matches))
    }

    /// How long to wait after the attempt of this number has failed: between half and all of the doubled backoff, as
    /// `jitter`, from 0 to 1, says, so that what failed together does not come back together.
    #[must_use]
    pub fn delay(&self, attempt: u32, jitter: f64) -> Duration {
        let doubled = 2_u32.saturating_pow(attempt.saturating_sub(1).min(31));
        let most = self.backoff.saturating_mul(doubled).min(self.max_backoff);
        most.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
    }
}

/// A command that routes: it reads the thread as JSON and answers a role or `$END`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moderator {
    /// argv; no shell.
    pub exec: Vec<String>,
    /// One that takes longer is wrong.
    pub timeout: Option<Duration>,
    /// Whether it is executed in a dry run, too.
    pub rehearses: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_bound_and_jitter_takes_half_of_it_at_most() {
        let retry = Retry {
            attempts: 9,
            backoff: Duration::from_secs(2),
            max_backoff: Duration::from_secs(7),
            on: Vec::new(),
        };
        let millis = |attempt, jitter| retry.delay(attempt, jitter).as_millis();
        assert_eq!(
            [1, 2, 3, 40].map(|n| millis(n, 1.0)),
            [2_000, 4_000, 7_000, 7_000]
        );
        assert_eq!([1, 2].map(|n| millis(n, 0.0)), [1_000, 2_000]);
    }

    #[test]
    fn a_retry_is_for_what_it_names_and_as_often_as_it_says() {
        let retry = Retry {
            attempts: 3,
            on: vec!["exit-code:75".to_owned(), "llm-error".to_owned()],
            ..Retry::default()
        };
        let allows = |attempt, result: &str| retry.allows(attempt, &result.parse().unwrap());
        assert!(allows(1, "exit-code:75") && allows(2, "llm-error:rate-limited"));
        assert!(!allows(3, "exit-code:75") && !allows(1, "exit-code:7"));
        assert!(!allows(1, "role-timeout"));
        assert!(!Retry::default().allows(1, &RunResult::RoleTimeout));
    }
}
