//! The `worker` section of a definition: what it may say about its worker unit, by systemd's names, in systemd's syntax.
//! Called by `definition`; what comes out is ready to be sent as properties of a transient unit.
//!
//! A value is a scalar, or a list, which is the key given several times as in a unit file. What would have no effect, or
//! would be lost when systemd reads the unit again, is refused.

use std::time::Duration;

use super::diagnostic::quoted;
use super::host::{self, HostCheck};
use super::reader::Reader;
use super::time::parse_duration;
use super::unit_syntax::{account, boolean, permyriad, size, tasks, words};
use super::work;
use super::yaml::{Content, Entry, Node, Place};
use crate::model::limits;
use crate::model::worker::DEATHS;
use crate::model::workflow::WorkerSettings;

const KEYS: [&str; 14] = [
    "exec",
    "User",
    "Group",
    "SupplementaryGroups",
    "Environment",
    "MemoryMax",
    "TasksMax",
    "CPUQuota",
    "Nice",
    "ReadWritePaths",
    "ReadOnlyPaths",
    "PrivateNetwork",
    "StartLimitIntervalSec",
    "StartLimitBurst",
];
/// Variables that systemd or nerve sets itself; a prefix where it ends in `_`.
const TAKEN: [&str; 16] = [
    "NERVE_",
    "LISTEN_",
    "WATCHDOG_",
    "NOTIFY_SOCKET",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "STATE_DIRECTORY",
    "RUNTIME_DIRECTORY",
    "CACHE_DIRECTORY",
    "LOGS_DIRECTORY",
    "CONFIGURATION_DIRECTORY",
    "CREDENTIALS_DIRECTORY",
    "MAINPID",
    "MANAGERPID",
    "SYSTEMD_EXEC_PID",
    "MEMORY_PRESSURE_",
];
/// Longest path, without its prefix.
const PATH_BYTES: usize = 4_095;

/// Reads the section, noting everything that is wrong with it.
pub(super) fn read(
    reader: &mut Reader,
    node: &Node,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> WorkerSettings {
    let mut settings = WorkerSettings::default();
    let Some(fields) = reader.fields(node, "worker", &KEYS) else {
        return settings;
    };
    let entry = |key: &str| fields.get(key);
    settings.exec = entry("exec")
        .and_then(|entry| work::exec(reader, &entry.value, host::WORKER, host_checks))
        .unwrap_or_default();
    settings.user = entry("User").and_then(|entry| single(reader, entry, name));
    settings.group = entry("Group").and_then(|entry| single(reader, entry, name));
    settings.memory_max = entry("MemoryMax").and_then(|entry| single(reader, entry, size));
    settings.tasks_max = entry("TasksMax").and_then(|entry| single(reader, entry, tasks));
    settings.cpu_quota = entry("CPUQuota").and_then(|entry| single(reader, entry, quota));
    settings.nice = entry("Nice").and_then(|entry| single(reader, entry, nice));
    settings.private_network = entry("PrivateNetwork").and_then(|entry| {
        single(reader, entry, |text| {
            boolean(text)
                .ok_or_else(|| format!("{} is neither yes nor no; write one of them", quoted(text)))
        })
    });
    settings.start_limit_interval =
        entry("StartLimitIntervalSec").and_then(|entry| single(reader, entry, interval));
    settings.start_limit_burst =
        entry("StartLimitBurst").and_then(|entry| single(reader, entry, burst));
    if let Some(entry) = entry("SupplementaryGroups") {
        let groups = several(reader, entry, account);
        settings.supplementary_groups = groups.into_iter().map(|(_, group)| group).collect();
    }
    if let Some(entry) = entry("Environment") {
        settings.environment = environment(reader, entry);
    }
    let mut paths = |key: &str| match entry(key) {
        Some(entry) => {
            let paths = several(reader, entry, path);
            paths.into_iter().map(|(_, path)| path).collect()
        }
        None => Vec::new(),
    };
    settings.read_write_paths = paths("ReadWritePaths");
    settings.read_only_paths = paths("ReadOnlyPaths");
    settings
}

/// A key with one value.
fn single<T>(
    reader: &mut Reader,
    entry: &Entry,
    read: impl Fn(&str) -> Result<T, String>,
) -> Option<T> {
    if let Content::List(_) = entry.value.content {
        let message = format!("{} is a list, and has one value only", entry.key);
        reader.error_help(entry.value.place, message, "keep one");
        return None;
    }
    let text = reader.text(&entry.value, &entry.key)?;
    match read(text.trim()) {
        Ok(value) => Some(value),
        Err(error) => {
            reader.error(entry.value.place, format!("{}: {error}", entry.key));
            None
        }
    }
}

/// A key with any number of words, in a scalar or a list of scalars, each with its place.
fn several(
    reader: &mut Reader,
    entry: &Entry,
    check: impl Fn(&str) -> Result<(), String>,
) -> Vec<(Place, String)> {
    let nodes = match &entry.value.content {
        Content::List(nodes) => nodes.as_slice(),
        _ => std::slice::from_ref(&entry.value),
    };
    let mut found = Vec::new();
    let before = reader.faults.len();
    for node in nodes {
        let Some(text) = reader.text(node, &entry.key) else {
            continue;
        };
        let checked = words(text).and_then(|words| {
            if words.is_empty() {
                return Err("an empty value has no effect; remove it".to_owned());
            }
            words.iter().try_for_each(|word| check(word))?;
            Ok(words)
        });
        match checked {
            Ok(words) => found.extend(words.into_iter().map(|word| (node.place, word))),
            Err(error) => reader.error(node.place, format!("{}: {error}", entry.key)),
        }
    }
    if found.is_empty() && reader.faults.len() == before {
        reader.error_help(
            entry.value.place,
            format!("{} is an empty list", entry.key),
            "remove the key",
        );
    }
    found
}

fn name(text: &str) -> Result<String, String> {
    account(text).map(|()| text.to_owned())
}

fn nice(text: &str) -> Result<i32, String> {
    text.parse()
        .ok()
        .filter(|nice| (-20..=19).contains(nice))
        .ok_or_else(|| {
            format!(
                "{} is no nice level; write a whole number from -20 to 19",
                quoted(text)
            )
        })
}

/// A share of one CPU as CPU time per second.
fn quota(text: &str) -> Result<Duration, String> {
    match permyriad(text) {
        Some(0) => Err("a quota of 0% lets nothing run; write more, or remove the key".to_owned()),
        Some(share) => Ok(Duration::from_micros(u64::from(share) * 100)),
        None => Err(format!(
            "{} is no percentage; write one of one CPU, like 150%",
            quoted(text)
        )),
    }
}

/// The crash limit cannot be switched off: a worker that dies at once would be started for ever.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = match text {
        "infinity" => Duration::MAX,
        text => parse_duration(text)?,
    };
    match u64::try_from(interval.as_micros()) {
        Ok(0) => Err("0 would switch the limit off; write a time span like 60s".to_owned()),
        // What systemd means by infinity.
        Err(_) | Ok(u64::MAX) => {
            Err("infinity would never forget a death; write a time span like 1d".to_owned())
        }
        Ok(_) => Ok(interval),
    }
}

/// No more than are remembered.
fn burst(text: &str) -> Result<u32, String> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|burst| digits && (1..=DEATHS).contains(&(*burst as usize)))
        .ok_or_else(|| {
            format!(
                "{} is out of range; write a whole number from 1 to {DEATHS}",
                quoted(text)
            )
        })
}

fn environment(reader: &mut Reader, entry: &Entry) -> Vec<String> {
    let assignments = several(reader, entry, assignment);
    for (index, (place, word)) in assignments.iter().enumerate() {
        let name = variable(word);
        if assignments[..index]
            .iter()
            .any(|(_, other)| variable(other) == name)
        {
            let message =
                format!("Environment: {name} is set twice, and only the last would count");
            reader.error_help(*place, message, "keep one of them");
        }
    }
    assignments.into_iter().map(|(_, word)| word).collect()
}

fn variable(assignment: &str) -> &str {
    assignment
        .split_once('=')
        .map_or(assignment, |(name, _)| name)
}

fn assignment(word: &str) -> Result<(), String> {
    let shown = quoted(word);
    let Some((name, value)) = word.split_once('=') else {
        return Err(format!(
            "{shown} is no NAME=VALUE; put quotes around an assignment with blanks: '\"NAME=a b\"'"
        ));
    };
    variable_name(name)?;
    if word.len() > limits::ARGUMENT_BYTES {
        return Err(format!(
            "{name} has more than the {} bytes that Linux allows; put it into a file",
            limits::ARGUMENT_BYTES
        ));
    }
    if value
        .chars()
        .any(|c| c.is_control() && c != '\t' && c != '\n')
    {
        return Err(format!(
            "the value of {name} has a control character in it; remove it"
        ));
    }
    Ok(())
}

/// A name that nobody else sets.
pub(super) fn variable_name(name: &str) -> Result<(), String> {
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    if !first || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Err(format!(
            "{} is no name of a variable; use letters, digits and _",
            quoted(name)
        ));
    }
    let taken = |taken: &&str| {
        if taken.ends_with('_') {
            name.starts_with(*taken)
        } else {
            *taken == name
        }
    };
    if TAKEN.iter().any(taken) {
        return Err(format!(
            "{name} is set by nerve or systemd itself; choose another name"
        ));
    }
    Ok(())
}

fn path(text: &str) -> Result<(), String> {
    let shown = quoted(text);
    let path = text.strip_prefix('-').unwrap_or(text);
    if path.starts_with('+') {
        return Err(format!(
            "{shown} is relative to a root directory that the unit does not have; remove the +"
        ));
    }
    if !path.starts_with('/') {
        return Err(format!("{shown} is not absolute; begin it with /"));
    }
    if path.split('/').any(|component| component == "..") {
        return Err(format!(
            "{shown} has .. in it, which systemd does not take; write where it leads"
        ));
    }
    if path.len() > PATH_BYTES || path.chars().any(char::is_control) {
        return Err(format!(
            "{shown} is no usable path; write one of at most {PATH_BYTES} bytes, without control characters"
        ));
    }
    let components: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    if matches!(components.as_slice(), ["tmp", ..] | ["var", "tmp", ..]) {
        return Err(format!(
            "{shown} has no effect: every worker has a /tmp of its own; use another path"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::yaml;
    use crate::model::workflow::Limit;

    fn section(text: &str) -> Result<WorkerSettings, Vec<String>> {
        let mut reader = Reader::default();
        let settings = read(&mut reader, &yaml::parse(text).0.unwrap(), &mut Vec::new());
        if reader.failed() {
            Err(reader
                .faults
                .into_iter()
                .map(|fault| format!("{}; {}", fault.message, fault.help.unwrap_or_default()))
                .collect())
        } else {
            Ok(settings)
        }
    }

    #[test]
    fn values_are_in_unit_file_syntax() {
        let settings = section(
            "User: 0\nGroup: adm\nMemoryMax: 50%\nTasksMax: infinity\nNice: -5\nPrivateNetwork: off\nReadOnlyPaths: ['/a b', '\"/c d\"']\n\
             Environment:\n  - A=1 B=2\n  - '\"C=x y\" D=100%%'\n  - LD_LIBRARY_PATH=/x\n",
        );
        // A quoted YAML scalar with a blank is still two words.
        assert!(settings.unwrap_err()[0].contains("\"b\" is not absolute"));
        let settings = section(
            "User: 0\nGroup: adm\nMemoryMax: 50%\nTasksMax: infinity\nNice: -5\nPrivateNetwork: off\nReadOnlyPaths: ['\"/c d\"']\n\
             Environment:\n  - A=1 B=2\n  - '\"C=x y\" D=100%%'\n  - LD_LIBRARY_PATH=/x\n",
        )
        .unwrap();
        assert_eq!(settings.user.as_deref(), Some("0"));
        assert_eq!(settings.memory_max, Some(Limit::Permyriad(5_000)));
        assert_eq!(settings.tasks_max, Some(Limit::Absolute(u64::MAX)));
        assert_eq!(
            (settings.nice, settings.private_network),
            (Some(-5), Some(false))
        );
        assert_eq!(
            settings.environment,
            ["A=1", "B=2", "C=x y", "D=100%", "LD_LIBRARY_PATH=/x"]
        );
        assert_eq!(settings.read_only_paths, ["/c d"]);
    }

    #[test]
    fn the_crash_limit_is_systemds_unless_the_section_says_otherwise() {
        assert_eq!(
            section("Nice: 0").unwrap().start_limit(),
            (Duration::from_secs(60), 6)
        );
        let both = section("StartLimitIntervalSec: 1min 30s\nStartLimitBurst: 100\n").unwrap();
        assert_eq!(both.start_limit(), (Duration::from_secs(90), 100));
        let one = section("StartLimitBurst: '1'").unwrap();
        assert_eq!(one.start_limit(), (Duration::from_secs(60), 1));
        let bare = section("StartLimitIntervalSec: 10").unwrap();
        assert_eq!(bare.start_limit(), (Duration::from_secs(10), 6));
    }

    #[test]
    fn what_has_no_effect_is_refused_with_its_reason() {
        for (text, expected) in [
            (
                "Environment: NERVE_RUN_ID=1",
                "NERVE_RUN_ID is set by nerve or systemd itself",
            ),
            ("Environment: NOTIFY_SOCKET=x", "set by nerve or systemd"),
            ("Environment: LISTEN_FDS=3", "set by nerve or systemd"),
            ("Environment: A=1 A=2", "A is set twice"),
            ("Environment: {A: 1}", "Environment is a map"),
            ("Environment: A", "no NAME=VALUE"),
            ("Environment: 1A=2", "no name of a variable"),
            ("Environment: \"A=\\x07\"", "control character"),
            ("Environment: A=%h", "specifier"),
            ("Environment: []", "is an empty list"),
            ("Environment: ''", "an empty value has no effect"),
            ("Environment:", "Environment is empty"),
            (
                "ReadWritePaths: /tmp/x",
                "every worker has a /tmp of its own",
            ),
            (
                "ReadWritePaths: [/srv, -/var//tmp]",
                "every worker has a /tmp of its own",
            ),
            ("ReadWritePaths: srv", "is not absolute"),
            ("ReadWritePaths: +/srv", "remove the +"),
            ("ReadOnlyPaths: /srv/../etc", "has .. in it"),
            ("MemoryMax: 0", "a limit of 0"),
            ("MemoryMax: [1G, 2G]", "is a list, and has one value only"),
            ("CPUQuota: 150", "no percentage; write"),
            ("CPUQuota: 0%", "quota of 0%"),
            ("Nice: 20", "a whole number from -20 to 19"),
            ("PrivateNetwork: maybe", "neither yes nor no"),
            (
                "StartLimitBurst: 0",
                "StartLimitBurst: \"0\" is out of range; write a whole number from 1 to 100",
            ),
            ("StartLimitBurst: 101", "a whole number from 1 to 100"),
            ("StartLimitBurst: +5", "a whole number from 1 to 100"),
            ("StartLimitBurst: [5]", "is a list"),
            ("StartLimitBurst: infinity", "a whole number from 1 to 100"),
            (
                "StartLimitIntervalSec: 0",
                "StartLimitIntervalSec: 0 would switch the limit off",
            ),
            ("StartLimitIntervalSec: 0.0000001", "switch the limit off"),
            ("StartLimitIntervalSec: infinity", "never forget a death"),
            (
                "StartLimitIntervalSec: 18446744073709551615us",
                "never forget a death",
            ),
            ("StartLimitIntervalSec: soon", "\"soon\" is no time span"),
            (
                "StartLimitInterval: 5",
                "unknown key \"StartLimitInterval\" in worker",
            ),
            ("User: bad.name", "no valid name"),
            ("SupplementaryGroups: [a b, c:d]", "no valid name"),
            ("ExecStart: /bin/sh", "unknown key \"ExecStart\" in worker"),
        ] {
            let errors = section(text).unwrap_err();
            assert!(
                errors.len() == 1 && errors[0].contains(expected),
                "{text}: {errors:?}"
            );
        }
        assert!(section("User: build\nReadWritePaths: /tmp/x").is_err());
        assert!(section("ReadWritePaths: /tmpfiles").is_ok());
    }
}
