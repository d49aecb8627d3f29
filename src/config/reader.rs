//! Typed reading of a file: each step either gives a value or notes what is wrong, and goes on. Called by the modules of
//! `config` that know what a file may say.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::diagnostic::{Diagnostic, Severity, listed, nearest, quoted};
use super::time::parse_duration;
use super::yaml::{self, Content, Entry, Node, Place};
use crate::model::limits;

/// Most faults of one file that are told one by one: whoever reads them mends these first.
pub(super) const DIAGNOSTICS: usize = 100;

/// Something wrong, before it has a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Fault {
    pub place: Place,
    pub severity: Severity,
    pub message: String,
    pub help: Option<String>,
}

impl From<yaml::Fault> for Fault {
    fn from(fault: yaml::Fault) -> Self {
        let yaml::Fault {
            place,
            message,
            help,
        } = fault;
        Self {
            place,
            severity: Severity::Error,
            message,
            help: Some(help.to_owned()),
        }
    }
}

impl Fault {
    pub fn at(self, path: &str) -> Diagnostic {
        Diagnostic {
            severity: self.severity,
            path: path.to_owned(),
            line: self.place.line,
            column: self.place.column,
            end_column: self.place.end,
            message: self.message,
            help: self.help,
            count: 1,
        }
    }
}

/// Collects what is wrong.
#[derive(Debug, Default)]
pub(super) struct Reader {
    pub faults: Vec<Fault>,
}

/// The keys of a map that was checked.
#[derive(Clone, Copy)]
pub(super) struct Fields<'n>(&'n [Entry]);

impl<'n> Fields<'n> {
    pub fn get(self, key: &str) -> Option<&'n Entry> {
        self.0.iter().find(|entry| entry.key == key)
    }
}

impl Reader {
    /// What a check of `config` says: what is wrong and, after the last semicolon, what to do.
    pub fn error(&mut self, place: Place, message: impl Into<String>) {
        let message = message.into();
        match message.rsplit_once("; ") {
            Some((message, help)) => self.error_help(place, message, help),
            None => self.push(Severity::Error, place, message, None),
        }
    }

    pub fn error_help(
        &mut self,
        place: Place,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.push(Severity::Error, place, message.into(), Some(help.into()));
    }

    pub fn warning(&mut self, place: Place, message: impl Into<String>, help: impl Into<String>) {
        self.push(Severity::Warning, place, message.into(), Some(help.into()));
    }

    fn push(&mut self, severity: Severity, place: Place, message: String, help: Option<String>) {
        self.faults.push(Fault {
            place,
            severity,
            message,
            help,
        });
    }

    pub fn failed(&self) -> bool {
        self.faults
            .iter()
            .any(|fault| fault.severity == Severity::Error)
    }

    /// The tree of a file, if there is one worth reading.
    pub fn tree(&mut self, bytes: &[u8]) -> Option<Node> {
        if bytes.len() > limits::DEFINITION_BYTES {
            let (size, limit) = (bytes.len(), limits::DEFINITION_BYTES);
            self.error_help(
                Place::START,
                format!("the file has {size} bytes, more than the {limit} that it may have"),
                "move long texts into files that a role reads",
            );
            return None;
        }
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                self.error_help(
                    end_of(&bytes[..error.valid_up_to()]),
                    "the file is not UTF-8",
                    "save it as UTF-8",
                );
                return None;
            }
        };
        let (node, faults) = yaml::parse(text);
        self.faults.extend(faults.into_iter().map(Into::into));
        node
    }

    /// What was noted, in the order of the file.
    pub fn diagnostics(mut self, path: &str) -> Vec<Diagnostic> {
        self.faults.sort();
        self.faults.dedup();
        // An error, if there is one at all, is among those that stay.
        self.faults
            .sort_by_key(|fault| (fault.severity, fault.place));
        let rest = self.faults.split_off(self.faults.len().min(DIAGNOSTICS));
        self.faults.sort();
        let faults = self.faults.into_iter();
        let mut diagnostics: Vec<Diagnostic> = faults.map(|fault| fault.at(path)).collect();
        for severity in [Severity::Error, Severity::Warning] {
            let of_it = rest.iter().filter(|fault| fault.severity == severity);
            let count = of_it.clone().count();
            diagnostics.extend(of_it.take(1).map(|first| Diagnostic {
                message: format!("{count} more of this kind are not shown"),
                help: Some("mend those that are shown first".to_owned()),
                count,
                ..first.clone().at(path)
            }));
        }
        diagnostics
    }

    /// The entries of a map. `subject` is what the map is called: `the file`, `role coder`.
    pub fn entries<'n>(&mut self, node: &'n Node, subject: &str) -> Option<&'n [Entry]> {
        match &node.content {
            Content::Map(entries) => Some(entries),
            other => {
                let found = kind(other);
                let help = match other {
                    Content::Null => "write what it has below it, indented",
                    _ => "write it as a map, lines like `key: value`",
                };
                self.error_help(node.place, format!("{subject} is {found}"), help);
                None
            }
        }
    }

    /// The entries of a map that may have only these keys.
    pub fn fields<'n>(
        &mut self,
        node: &'n Node,
        subject: &str,
        keys: &[&str],
    ) -> Option<Fields<'n>> {
        let entries = self.entries(node, subject)?;
        for entry in entries {
            if !keys.contains(&entry.key.as_str()) {
                let help = match nearest(&entry.key, keys.iter().copied()) {
                    Some(meant) => format!("did you mean {meant}?"),
                    None => format!("the keys of {subject} are {}", listed(keys.iter().copied())),
                };
                self.error_help(
                    entry.place,
                    format!("unknown key {} in {subject}", quoted(&entry.key)),
                    help,
                );
            }
        }
        Some(Fields(entries))
    }

    /// A text; a number or a word like `true` is a text too.
    pub fn text<'n>(&mut self, node: &'n Node, subject: &str) -> Option<&'n str> {
        let help = match &node.content {
            Content::Text { text, .. } if text.contains('\0') => {
                self.error_help(
                    node.place,
                    format!("{subject} has a NUL character in it"),
                    "remove it",
                );
                return None;
            }
            Content::Text { text, .. } => return Some(text),
            Content::Null => "give it a value, or remove the key",
            Content::Map(_) | Content::List(_) => {
                "write it as text, in quotes when it begins with { or [ or has ': ' in it"
            }
        };
        self.error_help(
            node.place,
            format!("{subject} is {}, and must be text", kind(&node.content)),
            help,
        );
        None
    }

    pub fn integer(
        &mut self,
        node: &Node,
        subject: &str,
        range: RangeInclusive<u32>,
    ) -> Option<u32> {
        let text = self.text(node, subject)?;
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        let number = text
            .parse()
            .ok()
            .filter(|number| digits && range.contains(number));
        if number.is_none() {
            let (least, most) = (range.start(), range.end());
            let message = format!("{subject} is {}", quoted(text));
            self.error_help(
                node.place,
                message,
                format!("write a whole number from {least} to {most}"),
            );
        }
        number
    }

    /// One of a few words.
    pub fn choice<T: Copy>(
        &mut self,
        node: &Node,
        subject: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let text = self.text(node, subject)?;
        let choice = choices.iter().find(|(word, _)| *word == text);
        if choice.is_none() {
            let words = || choices.iter().map(|(word, _)| *word);
            let help = match nearest(text, words()) {
                Some(meant) => format!("did you mean {meant}?"),
                None if choices.len() == 1 => {
                    format!("write {}, or remove the key", listed(words()))
                }
                None => format!("write one of {}", listed(words())),
            };
            self.error_help(node.place, format!("{subject} is {}", quoted(text)), help);
        }
        choice.map(|(_, value)| *value)
    }

    pub fn duration(&mut self, node: &Node, subject: &str) -> Option<Duration> {
        let text = self.text(node, subject)?;
        match parse_duration(text) {
            Ok(Duration::ZERO) => {
                self.error_help(
                    node.place,
                    format!("{subject} is zero"),
                    "remove the key to have no time-out",
                );
                None
            }
            Ok(duration) => Some(duration),
            Err(error) => {
                self.error(node.place, format!("{subject}: {error}"));
                None
            }
        }
    }
}

/// The place right after a text.
fn end_of(bytes: &[u8]) -> Place {
    let text = String::from_utf8_lossy(bytes);
    let line = text.matches('\n').count() + 1;
    let column = text
        .rsplit('\n')
        .next()
        .map_or(0, |last| last.chars().count())
        + 1;
    Place::at(line, column)
}

/// What a value is, for a message.
pub(super) fn kind(content: &Content) -> &'static str {
    match content {
        Content::Null => "empty",
        Content::Text { .. } => "text",
        Content::List(_) => "a list",
        Content::Map(_) => "a map",
    }
}
