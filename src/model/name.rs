//! Names and ids: parsed once at the edge, valid for ever after.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::limits;

/// Why a string is not a name. The text says what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {shown} is not valid; {rule}")]
pub struct InvalidName {
    what: &'static str,
    shown: String,
    rule: &'static str,
}

fn invalid(what: &'static str, text: &str, rule: &'static str) -> InvalidName {
    // Debug escapes control characters, and a name of megabytes is not worth repeating.
    let mut shown = format!("{:?}", text.chars().take(80).collect::<String>());
    if text.chars().nth(80).is_some() {
        shown.push('…');
    }
    InvalidName { what, shown, rule }
}

macro_rules! text_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The text, as people write it.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = InvalidName;
            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.into()
            }
        }
    };
}

text_type! {
    /// A workflow's name: `[a-z][a-z0-9]*(-[a-z0-9]+)*`, at most 64 bytes. It is used verbatim in unit names,
    /// paths and journal fields, so it can hold nothing that any of them would read.
    WorkflowName
}

impl FromStr for WorkflowName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let word = |word: &str| {
            !word.is_empty()
                && word
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        let valid = text.len() <= limits::WORKFLOW_NAME_BYTES
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.split('-').all(word);
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(invalid(
                "workflow name",
                text,
                "use lower-case words joined by '-', at most 64 characters, like review-pull-request",
            ))
        }
    }
}

impl WorkflowName {
    const UNIT_PREFIX: &str = "nerve-wf@";
    const UNIT_SUFFIX: &str = ".service";

    /// The unit its worker runs as: `nerve-wf@NAME.service`.
    #[must_use]
    pub fn unit(&self) -> String {
        format!("{}{self}{}", Self::UNIT_PREFIX, Self::UNIT_SUFFIX)
    }

    /// The workflow whose worker a unit is, if it is one.
    #[must_use]
    pub fn of_unit(unit: &str) -> Option<Self> {
        unit.strip_prefix(Self::UNIT_PREFIX)?
            .strip_suffix(Self::UNIT_SUFFIX)?
            .parse()
            .ok()
    }
}

text_type! {
    /// A role's name: an identifier `[a-z][a-z0-9_]*`, since templates call roles by name; not one of the words
    /// that templates have already.
    RoleName
}

impl RoleName {
    /// The author of a thread's round 0.
    pub const START: &str = "__start__";
    /// What prompts can name beside the workflow's roles.
    pub const RESERVED: [&str; 5] = ["start", "messages", "last", "round", "run"];
}

impl FromStr for RoleName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if Self::RESERVED.contains(&text) {
            return Err(invalid(
                "role name",
                text,
                "choose another, templates use this word for something else",
            ));
        }
        let valid = text.len() <= limits::ROLE_NAME_BYTES
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(invalid(
                "role name",
                text,
                "use lower-case letters, digits and _, the first one a letter, at most 64 of them, like run_tests",
            ))
        }
    }
}

/// A run's id: a UUIDv7 as 32 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(u128);

impl RunId {
    /// An id from the 128 bits of a UUID.
    #[must_use]
    pub fn from_bits(bits: u128) -> Self {
        Self(bits)
    }

    /// The last eight digits: how people see it.
    #[must_use]
    pub fn short(self) -> String {
        format!("{:08x}", self.0 & 0xffff_ffff)
    }

    /// The cgroup of the run below its worker unit's cgroup.
    #[must_use]
    pub fn cgroup(self) -> String {
        format!("run-{self}")
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for RunId {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        RunTail::from_str(text)
            .ok()
            .filter(|tail| tail.0.len() == 32)
            .and_then(|tail| u128::from_str_radix(&tail.0, 16).ok())
            .map(Self)
            .ok_or_else(|| invalid("run id", text, "it is 32 hex digits"))
    }
}

impl TryFrom<String> for RunId {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> String {
        id.to_string()
    }
}

/// What people type for a run: its last digits, as many as are needed to tell it apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunTail(String);

impl RunTail {
    /// The digits in lower case, least significant first: how the store finds them.
    #[must_use]
    pub fn reversed(&self) -> String {
        self.0.chars().rev().collect()
    }
}

impl FromStr for RunTail {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let valid = (1..=32).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
        if valid {
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(invalid(
                "run",
                text,
                "give a run id or its last hex digits, as `nervectl workflow list` shows them",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workflow_names_hold_nothing_that_a_unit_or_path_would_read() {
        for good in ["a", "review-pull-request", "x2-3y", &"a".repeat(64)] {
            assert!(good.parse::<WorkflowName>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-",
            "a-",
            "-a",
            "a--b",
            "A",
            "1a",
            "a/b",
            "..",
            "a.b",
            "a@b",
            "%i",
            "a\n",
            "a b",
            "é",
            "a_b",
            "\\x2d",
            &"a".repeat(65),
        ] {
            assert!(bad.parse::<WorkflowName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_unit_name_and_its_workflow_are_each_others_inverse() {
        let name: WorkflowName = "fix-failing-test".parse().unwrap();
        assert_eq!(WorkflowName::of_unit(&name.unit()), Some(name));
        for stranger in [
            "nerve.service",
            "nerve-wf@.service",
            "nerve-wf@A.service",
            "nerve-wf@a.slice",
            "ssh@a.service",
        ] {
            assert_eq!(WorkflowName::of_unit(stranger), None, "{stranger}");
        }
    }

    #[test]
    fn role_names_are_identifiers_and_not_template_words() {
        assert!("run_tests2".parse::<RoleName>().is_ok());
        for bad in [
            "",
            "Run",
            "a-b",
            "_a",
            "1a",
            "start",
            "messages",
            "last",
            "round",
            "run",
            "__start__",
        ] {
            assert!(bad.parse::<RoleName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn run_ids_round_trip_and_tails_are_hex() {
        let id = RunId::from_bits(0x0193_0000_0000_7000_8000_0000_3fa9_c1d2);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.short(), "3fa9c1d2");
        assert_eq!("3FA9".parse::<RunTail>().unwrap().reversed(), "9af3");
        for bad in ["", "xyz", "3fa9c1d2-", &"a".repeat(33), "+1"] {
            assert!(bad.parse::<RunTail>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_invalid_name_is_shown_escaped_and_short() {
        let text = format!("\n\u{1b}[31m{}", "x".repeat(1000))
            .parse::<WorkflowName>()
            .unwrap_err()
            .to_string();
        assert!(
            text.contains("\\n") && !text.contains('\n') && text.len() < 400,
            "{text}"
        );
    }
}
