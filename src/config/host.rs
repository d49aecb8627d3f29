//! What definitions expect of the machine, beside what the machine has. Called by `definition` only; looks at the file
//! system, changes nothing.

use std::fs;
use std::path::Path;

use super::diagnostic::{Diagnostic, nearest, quoted};
use super::reader::Reader;
use super::yaml::Place;
use crate::model::tools::Tools;

/// What the command of the worker is called, and that of the moderator.
pub(super) const WORKER: &str = "exec of the worker";
pub(super) const MODERATOR: &str = "exec of the moderator";

/// What a definition expects of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HostCheck {
    Executable {
        subject: String,
        path: String,
    },
    User(String),
    Group(String),
    Path(String),
    /// The directory that a role works in.
    Directory(String),
    Provider(String),
    Agent(String),
}

/// What of it is missing below `root`.
pub(super) fn warnings(
    definition: &str,
    checks: &[(Place, HostCheck)],
    root: &Path,
    tools: &Tools,
) -> Vec<Diagnostic> {
    let below = |path: &str| root.join(path.trim_start_matches('/'));
    let known = |file: &str, name: &str| {
        // Where the file cannot be read nothing is known, and nothing is said.
        fs::read(below(file)).map_or(true, |bytes| {
            bytes
                .split(|byte| *byte == b'\n')
                .any(|line| line.split(|byte| *byte == b':').next() == Some(name.as_bytes()))
        })
    };
    let names = |file: &str| -> Vec<String> {
        let text = fs::read(below(file)).unwrap_or_default();
        String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| Some(line.split_once(':')?.0.to_owned()))
            .collect()
    };
    let mut reader = Reader::default();
    for (place, check) in checks {
        let mut provided = |section: &str, name: &str, known: Vec<&String>| {
            if known.iter().any(|known| *known == name) {
                return;
            }
            let help = match nearest(name, known.into_iter().map(String::as_str)) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!(
                    "write `{name}:` below `{section}:` in /etc/nerve/nerve.yaml, or its rounds end in exec-failed"
                ),
            };
            reader.warning(
                *place,
                format!("{} is not in the {section} of nerve.yaml", quoted(name)),
                help,
            );
        };
        let (what, name, file) = match check {
            HostCheck::Provider(name) => {
                provided("providers", name, tools.providers.keys().collect());
                continue;
            }
            HostCheck::Agent(name) => {
                provided("agents", name, tools.agents.keys().collect());
                continue;
            }
            HostCheck::Executable { subject, path } => {
                if !below(path).exists() {
                    let message = format!(
                        "{} in {subject} does not exist on this machine",
                        quoted(path)
                    );
                    let help = match subject.as_str() {
                        WORKER => "install it, or the worker exits with 203 and its runs crash",
                        MODERATOR => "install it, or its runs end in bad-route",
                        _ => "install it, or its rounds end in exec-failed",
                    };
                    reader.warning(*place, message, help);
                }
                continue;
            }
            HostCheck::Directory(path) => {
                if !below(path).is_dir() {
                    let message = format!("{} is no directory on this machine", quoted(path));
                    let help = "make it, or its rounds end in exec-failed";
                    reader.warning(*place, message, help);
                }
                continue;
            }
            HostCheck::Path(path) => {
                if !below(path).exists() {
                    let message = format!("{} does not exist on this machine", quoted(path));
                    let help = "make it, or write -PATH to go without; the worker cannot be started otherwise";
                    reader.warning(*place, message, help);
                }
                continue;
            }
            HostCheck::User(name) => ("user", name, "/etc/passwd"),
            HostCheck::Group(name) => ("group", name, "/etc/group"),
        };
        if !known(file, name) {
            let names = names(file);
            let help = match nearest(name, names.iter().map(String::as_str)) {
                Some(meant) => format!("did you mean {meant}?"),
                None => "make it, or the worker cannot be started".to_owned(),
            };
            reader.warning(*place, format!("{what} {name} is not in {file}"), help);
        }
    }
    reader.faults.sort();
    reader
        .faults
        .into_iter()
        .map(|fault| fault.at(definition))
        .collect()
}
