//! A workflow file, nerve-workflow(5), as a proved [`Workflow`]. Called when definitions are loaded, by the worker with
//! the JSON that nerved sends it, and by `nervectl validate`.
//!
//! [`parse`] and [`from_json`] are pure and read the same tree with the same code: what a run pinned means the same
//! where it is executed. A [`Definition`] is given out only when nothing is wrong with it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::diagnostic::{Diagnostic, Severity, quoted};
use super::host::{self, HostCheck};
use super::reader::{Fields, Reader};
use super::retention;
use super::roles;
use super::routes;
use super::unit_settings;
use super::work;
use super::yaml::{self, Content, Node, Place};
use crate::model::hex::hex;
use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::model::role::Role;
use crate::model::run::Digest;
use crate::model::tools::Tools;
use crate::model::workflow::{Definition, OnFull, Overflow, Routing, WorkerSettings, Workflow};

const KEYS: [&str; 14] = [
    "version",
    "name",
    "description",
    "max_rounds",
    "concurrency",
    "overflow",
    "max_queue",
    "on_full",
    "timeout",
    "retention",
    "roles",
    "graph",
    "moderator",
    "worker",
];

/// What reading a file came to.
#[derive(Debug, Clone, Default)]
pub struct Parsed {
    /// `None` exactly when there is an error among the diagnostics.
    pub definition: Option<Definition>,
    /// Everything that is wrong, in the order of the file.
    pub diagnostics: Vec<Diagnostic>,
    path: String,
    host_checks: Vec<(Place, HostCheck)>,
}

impl Parsed {
    /// A file that cannot be read.
    #[must_use]
    pub fn failed(diagnostic: Diagnostic) -> Self {
        Self {
            path: diagnostic.path.clone(),
            diagnostics: vec![diagnostic],
            ..Self::default()
        }
    }
}

/// The sha256 of a definition's bytes, as 64 hex digits.
#[must_use]
pub fn digest(bytes: &[u8]) -> Digest {
    hex(&Sha256::digest(bytes))
}

/// Reads a definition. `path` is for the diagnostics; `stem` is what the name must be, if it must be something.
#[must_use]
pub fn parse(path: &str, stem: Option<&str>, bytes: &[u8]) -> Parsed {
    let mut reader = Reader::default();
    let mut host_checks = Vec::new();
    let read = reader.tree(bytes).and_then(|node| {
        let workflow = workflow(&mut reader, &node, stem, &mut host_checks)?;
        Some((workflow, yaml::to_json(&node)))
    });
    let definition = read
        .filter(|_| !reader.failed())
        .map(|(workflow, source)| Definition {
            digest: digest(bytes),
            workflow,
            source,
        });
    Parsed {
        definition,
        diagnostics: reader.diagnostics(path),
        path: path.to_owned(),
        host_checks,
    }
}

/// Makes of a [`Definition::source`] the workflow it was read as.
///
/// # Errors
/// Everything that is wrong, in one line.
pub fn from_json(source: &Value) -> Result<Workflow, String> {
    let mut reader = Reader::default();
    let read = workflow(&mut reader, &yaml::from_json(source), None, &mut Vec::new());
    match read {
        Some(workflow) if !reader.failed() => Ok(workflow),
        _ => {
            let errors = reader
                .faults
                .into_iter()
                .filter(|fault| fault.severity == Severity::Error);
            let messages: Vec<String> = errors
                .map(|fault| super::diagnostic::escaped(&fault.message))
                .collect();
            Err(messages.join("; "))
        }
    }
}

/// Everything of a file. `None` when so much is wrong that there is nothing to check together.
fn workflow(
    reader: &mut Reader,
    node: &Node,
    stem: Option<&str>,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<Workflow> {
    if let Content::Map(_) = node.content {
        version(reader, node)?;
    }
    let fields = reader.fields(node, "a definition", &KEYS)?;
    let name = name(reader, node, fields, stem);
    let description = match fields.get("description") {
        Some(entry) => reader.text(&entry.value, "description").unwrap_or_default(),
        None => "",
    };
    let mut integer = |key: &str, least: u32, most: u32| {
        let entry = fields.get(key)?;
        reader.integer(&entry.value, key, least..=most)
    };
    let max_rounds = integer("max_rounds", 1, limits::MAX_ROUNDS);
    let concurrency = integer("concurrency", 1, limits::CONCURRENCY).unwrap_or(1);
    let max_queue = integer("max_queue", 0, limits::MAX_QUEUE).unwrap_or(limits::DEFAULT_MAX_QUEUE);
    let (overflow, on_full) = overflow(reader, fields);
    let timeout = fields
        .get("timeout")
        .and_then(|entry| reader.duration(&entry.value, "timeout"));
    let retention = fields
        .get("retention")
        .map(|entry| retention::read(reader, &entry.value));
    let mut worker = worker(reader, fields, host_checks);
    let is_own = fields
        .get("worker")
        .is_some_and(|entry| entry.value.get("exec").is_some());
    let roles = if is_own && fields.get("roles").is_none() {
        BTreeMap::new()
    } else {
        roles::roles(reader, node, fields, host_checks)
    };
    let (routing, complete) = routing(reader, node, fields, is_own, host_checks)?;
    let known = roles.values().flatten();
    worker.credentials.extend(known.flat_map(Role::credentials));
    let unread = roles.iter().filter(|(_, role)| role.is_none());
    let unread = unread.map(|(name, _)| name.clone()).collect();
    let roles = roles
        .into_iter()
        .map(|(name, role)| (name, role.unwrap_or_else(roles::nothing)))
        .collect();
    let workflow = Workflow {
        name: name?,
        description: description.to_owned(),
        max_rounds,
        concurrency,
        overflow,
        max_queue,
        on_full,
        timeout,
        retention: retention.unwrap_or_default(),
        roles,
        routing,
        worker,
    };
    let roles_node = fields.get("roles").filter(|_| !workflow.roles.is_empty());
    if let (Some(roles), Some(graph)) = (roles_node, fields.get("graph")) {
        routes::check(reader, &workflow, roles, graph, complete, &unread);
    }
    Some(workflow)
}

/// Who says what comes next, and whether all of it could be read.
fn routing(
    reader: &mut Reader,
    node: &Node,
    fields: Fields<'_>,
    has_own_worker: bool,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> Option<(Routing, bool)> {
    let (graph, moderator) = (fields.get("graph"), fields.get("moderator"));
    if let (Some(_), Some(moderator)) = (graph, moderator) {
        let message = "the definition has graph and moderator";
        reader.error_help(moderator.place, message, "keep the one that is to route");
    }
    match (graph, moderator) {
        (None, Some(moderator)) => {
            let moderator = work::moderator(reader, moderator, host_checks)?;
            Some((Routing::Moderator(moderator), true))
        }
        (None, None) if has_own_worker => Some((Routing::Worker, true)),
        _ => {
            let (graph, complete) = routes::graph(reader, node, fields)?;
            Some((Routing::Graph(graph), complete))
        }
    }
}

/// `None` when this is the format of another nerve, of which nothing is known.
fn version(reader: &mut Reader, node: &Node) -> Option<()> {
    let entry = match &node.content {
        Content::Map(entries) => entries.iter().find(|entry| entry.key == "version"),
        _ => None,
    };
    let Some(entry) = entry else {
        reader.error_help(
            node.place,
            "the definition has no version",
            "begin the file with `version: 1`",
        );
        return Some(());
    };
    let text = reader.text(&entry.value, "version")?;
    if text == "1" {
        return Some(());
    }
    let message = format!("version is {}", quoted(text));
    reader.error_help(
        entry.value.place,
        message,
        "write `version: 1`, which is what this nerve reads, or update nerve",
    );
    None
}

/// The name; when it is missing or wrong a stand-in, so that the rest is checked all the same.
fn name(
    reader: &mut Reader,
    node: &Node,
    fields: Fields<'_>,
    stem: Option<&str>,
) -> Option<WorkflowName> {
    let stand_in = || "unnamed".parse().ok();
    let Some(entry) = fields.get("name") else {
        let help = stem.map_or("write `name: ` and the file's stem".to_owned(), |stem| {
            format!("write `name: {stem}`")
        });
        reader.error_help(node.place, "the definition has no name", help);
        return stand_in();
    };
    let Some(text) = reader.text(&entry.value, "name") else {
        return stand_in();
    };
    match text.parse::<WorkflowName>() {
        Ok(name) => {
            if let Some(stem) = stem.filter(|stem| *stem != name.as_str()) {
                let message = format!(
                    "the name is {name}, the file is {}.yaml",
                    super::diagnostic::escaped(stem)
                );
                reader.error_help(entry.value.place, message, "give both the same name");
            }
            Some(name)
        }
        Err(error) => {
            reader.error(entry.value.place, error.to_string());
            stand_in()
        }
    }
}

/// What happens to a start that finds no slot, and what when it finds no place in the queue either. What another key
/// makes meaningless is a warning: whoever wrote it may expect something.
fn overflow(reader: &mut Reader, fields: Fields<'_>) -> (Overflow, OnFull) {
    let overflow = fields.get("overflow").and_then(|entry| {
        let choices = [
            ("queue", Overflow::Queue),
            ("drop", Overflow::Drop),
            ("latest", Overflow::Latest),
        ];
        reader.choice(&entry.value, "overflow", &choices)
    });
    let on_full = fields.get("on_full").and_then(|entry| {
        let choices = [("evict", OnFull::Evict), ("refuse", OnFull::Refuse)];
        reader.choice(&entry.value, "on_full", &choices)
    });
    let (word, why, meaningless): (_, _, &[&str]) = match overflow {
        Some(Overflow::Drop) => ("drop", "nothing ever waits", &["max_queue", "on_full"]),
        Some(Overflow::Latest) => (
            "latest",
            "a newer run always takes the place of the one that waits",
            &["on_full"],
        ),
        Some(Overflow::Queue) | None => ("queue", "", &[]),
    };
    for entry in meaningless.iter().filter_map(|key| fields.get(key)) {
        let message = format!("{} has no effect with `overflow: {word}`: {why}", entry.key);
        let help = format!("remove {}, or write `overflow: queue`", entry.key);
        reader.warning(entry.place, message, help);
    }
    (
        overflow.unwrap_or(Overflow::Queue),
        on_full.unwrap_or(OnFull::Evict),
    )
}

fn worker(
    reader: &mut Reader,
    fields: Fields<'_>,
    host_checks: &mut Vec<(Place, HostCheck)>,
) -> WorkerSettings {
    let Some(section) = fields.get("worker") else {
        return WorkerSettings::default();
    };
    let settings = unit_settings::read(reader, &section.value, host_checks);
    let place = |key: &str| Some(section.value.get(key)?.value.place);
    let named = |name: &&String| !name.bytes().all(|b| b.is_ascii_digit());
    let user = settings.user.iter().filter(named);
    host_checks
        .extend(user.filter_map(|user| Some((place("User")?, HostCheck::User(user.clone())))));
    // A group beside a dynamic user is made with it when it does not exist.
    let group = settings
        .group
        .iter()
        .filter(named)
        .filter(|_| settings.user.is_some());
    host_checks
        .extend(group.filter_map(|group| Some((place("Group")?, HostCheck::Group(group.clone())))));
    for (key, paths) in [
        ("ReadWritePaths", &settings.read_write_paths),
        ("ReadOnlyPaths", &settings.read_only_paths),
    ] {
        let paths = paths.iter().filter(|path| path.starts_with('/'));
        host_checks
            .extend(paths.filter_map(|path| Some((place(key)?, HostCheck::Path(path.clone())))));
    }
    let groups = settings.supplementary_groups.iter().filter(named);
    let group = |group: &String| {
        Some((
            place("SupplementaryGroups")?,
            HostCheck::Group(group.clone()),
        ))
    };
    host_checks.extend(groups.filter_map(group));
    settings
}

/// What the definition expects and this machine does not have: executables, paths, users, groups, and providers and agents
/// of nerve.yaml, whose `tools` are given. Warnings, since a round ends in `exec-failed`, or the worker cannot be started,
/// only if it is still so then. Looks at the file system.
#[must_use]
pub fn host_warnings(parsed: &Parsed, tools: &Tools) -> Vec<Diagnostic> {
    host::warnings(&parsed.path, &parsed.host_checks, Path::new("/"), tools)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::fs;
    use std::time::Duration;

    use super::super::reader::DIAGNOSTICS;
    use super::*;
    use crate::model::role::Work;
    use proptest::prelude::*;

    const GOOD: &str = r#"version: 1
name: fix-failing-test            # the file's stem
description: Repair until the test-suite passes.
max_rounds: 12
concurrency: 2
overflow: queue
max_queue: 7
timeout: 2h 30min
roles:
  coder:
    exec: [claude, -p, 1.10, true, 007]
    prompt: |
      Make the tests pass. {{ start.content }}
      {% if tester %}The last run said: {{ tester.content }}{% endif %}
    timeout: 20m
    cwd: /srv/build
  tester:
    exec: [/usr/bin/make, test]
graph:
  $START: coder
  coder:  { ok: tester }
  tester: { ok: $END, error: coder }
worker:
  User: build
  Group: build
  SupplementaryGroups: [systemd-journal, adm]
  Environment: A=1 "B=two words"
  MemoryMax: 4G
  TasksMax: 50%
  CPUQuota: 150%
  Nice: 5
  ReadWritePaths: /srv -/opt/x
  PrivateNetwork: yes
  StartLimitIntervalSec: 2min
  StartLimitBurst: 3
"#;

    fn errors(text: &str) -> Vec<String> {
        let parsed = parse("f.yaml", None, text.as_bytes());
        let failed = parsed
            .diagnostics
            .iter()
            .any(|found| found.severity == Severity::Error);
        assert_eq!(
            parsed.definition.is_none(),
            failed,
            "{:?}",
            parsed.diagnostics
        );
        parsed.diagnostics.iter().map(ToString::to_string).collect()
    }

    /// The good file with one line replaced.
    fn with(line: &str, other: &str) -> String {
        assert!(GOOD.contains(line), "{line}");
        GOOD.replacen(line, other, 1)
    }

    fn says(text: &str, expected: &[&str]) {
        let found = errors(text);
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{found}\nhas no {expected}");
        }
    }

    #[test]
    fn what_is_kept_can_be_said() {
        let retention = |text: &str| {
            let text = format!("{GOOD}retention: {text}\n");
            let parsed = parse("f.yaml", None, text.as_bytes());
            let definition = parsed.definition;
            definition.map(|definition| definition.workflow.retention.limits())
        };
        assert_eq!(
            retention("{ days: 7, runs: infinity }"),
            Some((Some(7), None))
        );
        assert_eq!(retention("{ runs: 0 }"), Some((None, Some(0))));
        assert_eq!(retention("7"), None);
    }

    #[test]
    fn a_whole_file_is_read() {
        let parsed = parse("f.yaml", Some("fix-failing-test"), GOOD.as_bytes());
        assert_eq!(parsed.diagnostics, []);
        let definition = parsed.definition.unwrap();
        let workflow = &definition.workflow;
        assert_eq!(workflow.name.as_str(), "fix-failing-test");
        assert_eq!(workflow.max_rounds, Some(12));
        assert_eq!((workflow.concurrency, workflow.max_queue), (2, 7));
        assert_eq!(workflow.timeout, Some(Duration::from_secs(9_000)));
        let coder = &workflow.roles[&"coder".parse().unwrap()];
        let argv = ["claude", "-p", "1.10", "true", "007"].map(str::to_owned);
        assert_eq!(coder.work, Work::Exec(argv.into()));
        assert!(coder.prompt.as_ref().unwrap().ends_with("{% endif %}\n"));
        assert_eq!(coder.cwd.as_deref(), Some("/srv/build"));
        let worker = &workflow.worker;
        assert_eq!(worker.environment, ["A=1", "B=two words"]);
        assert_eq!(worker.supplementary_groups, ["systemd-journal", "adm"]);
        assert_eq!(worker.cpu_quota, Some(Duration::from_millis(1_500)));
        assert_eq!((worker.nice, worker.private_network), (Some(5), Some(true)));
        assert_eq!(worker.read_write_paths, ["/srv", "-/opt/x"]);
        assert_eq!(worker.start_limit_interval, Some(Duration::from_secs(120)));
        assert_eq!(worker.start_limit_burst, Some(3));
        assert_eq!(
            definition.source["roles"]["coder"]["exec"][3],
            Value::Bool(true)
        );
        assert_eq!(definition.source["max_rounds"], Value::from(12));
        assert_eq!(from_json(&definition.source).as_ref(), Ok(workflow));
        let text = serde_json::to_string(&definition.source).unwrap();
        assert_eq!(
            from_json(&serde_json::from_str(&text).unwrap()).as_ref(),
            Ok(workflow)
        );
    }

    #[test]
    fn defaults_hold_where_the_file_is_silent() {
        let text =
            "version: 1\nname: a\nroles: {r: {exec: [x]}}\ngraph: {$START: r, r: {ok: $END}}\n";
        let parsed = parse("a.yaml", Some("a"), text.as_bytes());
        let workflow = parsed.definition.unwrap().workflow;
        assert_eq!(
            (
                workflow.max_rounds,
                workflow.concurrency,
                workflow.max_queue
            ),
            (None, 1, 100)
        );
        assert_eq!(workflow.worker, WorkerSettings::default());
        assert_eq!(workflow.roles[&"r".parse().unwrap()].prompt, None);
    }

    #[test]
    fn what_happens_when_all_slots_are_taken_can_be_chosen() {
        let read = |keys: &str| {
            let text = with("overflow: queue\nmax_queue: 7\n", keys);
            let workflow = parse("f.yaml", None, text.as_bytes())
                .definition
                .unwrap()
                .workflow;
            (workflow.overflow, workflow.max_queue, workflow.on_full)
        };
        for (keys, expected) in [
            ("", (Overflow::Queue, 100, OnFull::Evict)),
            ("on_full: refuse\n", (Overflow::Queue, 100, OnFull::Refuse)),
            (
                "overflow: queue\nmax_queue: 3\non_full: evict\n",
                (Overflow::Queue, 3, OnFull::Evict),
            ),
            ("overflow: drop\n", (Overflow::Drop, 100, OnFull::Evict)),
            ("overflow: latest\n", (Overflow::Latest, 100, OnFull::Evict)),
            (
                "overflow: latest\nmax_queue: 0\n",
                (Overflow::Latest, 0, OnFull::Evict),
            ),
        ] {
            assert_eq!(read(keys), expected, "{keys}");
        }
    }

    #[test]
    fn what_another_key_makes_meaningless_is_told() {
        for (keys, expected) in [
            (
                "overflow: drop\nmax_queue: 7\non_full: evict",
                vec![
                    "f.yaml:7:1: warning: max_queue has no effect with `overflow: drop`: nothing ever waits (remove max_queue, or write `overflow: queue`)",
                    "f.yaml:8:1: warning: on_full has no effect with `overflow: drop`: nothing ever waits (remove on_full, or write `overflow: queue`)",
                ],
            ),
            (
                "overflow: latest\nmax_queue: 7\non_full: refuse",
                vec![
                    "f.yaml:8:1: warning: on_full has no effect with `overflow: latest`: a newer run",
                ],
            ),
            (
                "overflow: lates\nmax_queue: 7\non_full: drop",
                vec![
                    "f.yaml:6:11: error: overflow is \"lates\" (did you mean latest?)",
                    "f.yaml:8:10: error: on_full is \"drop\" (write one of evict, refuse)",
                ],
            ),
            (
                "overflow: [drop]\nmax_queue: 7\non_full:",
                vec![
                    "f.yaml:6:11: error: overflow is a list",
                    "error: on_full is empty",
                ],
            ),
        ] {
            says(&with("overflow: queue\nmax_queue: 7", keys), &expected);
        }
    }

    #[test]
    fn the_digest_is_sha256() {
        assert_eq!(
            digest(b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn all_faults_of_a_file_are_told_in_its_order() {
        let text = "version: 1\nname: A_b\nmax_rounds: 0\nconcurrency: 257\nmax_queue: -1\ntimeout: soon\nrols: {}\n\
            roles:\n  näme:\n    exec: []\n  c:\n    exec: make test\n    cwd: build\n    timeout: 0s\n    promt: x\n\
            graph:\n  $START: d\nworker: {Usr: x, MemoryMax: 4Q}\n";
        says(
            text,
            &[
                "f.yaml:2:7: error: workflow name \"A_b\" is not valid",
                "f.yaml:3:13: error: max_rounds is \"0\" (write a whole number from 1 to 10000)",
                "f.yaml:4:14: error: concurrency is \"257\" (write a whole number from 1 to 256)",
                "f.yaml:5:12: error: max_queue is \"-1\"",
                "f.yaml:6:10: error: timeout: \"soon\" is no time span",
                "f.yaml:7:1: error: unknown key \"rols\" in a definition (did you mean roles?)",
                "f.yaml:9:3: error: role name \"näme\" is not valid",
                "f.yaml:10:11: error: exec of role \"näme\" is an empty list",
                "f.yaml:12:11: error: exec of role c is text, and must be a list",
                "f.yaml:13:10: error: cwd of role c is \"build\", which is not absolute",
                "f.yaml:14:14: error: timeout of role c is zero",
                "f.yaml:15:5: error: unknown key \"promt\" in role c (did you mean prompt?)",
                "f.yaml:17:11: error: there is no role d (write it below `roles:`, or name one of c)",
                "f.yaml:18:10: error: unknown key \"Usr\" in worker (did you mean User?)",
                "f.yaml:18:29: error: MemoryMax: \"4Q\" is no size",
            ],
        );
    }

    #[test]
    fn what_is_no_definition_at_all_is_told() {
        says("", &["f.yaml:1:1: error: the file is empty"]);
        says("# nothing\n", &["1:1: error: the file is empty"]);
        says("- a\n", &["a definition is a list"]);
        says("hello", &["a definition is text"]);
        says(
            "{}",
            &["no version", "no name", "no roles", "no graph"]
                .map(|_| "error: the definition has no"),
        );
        says("a: [\n", &["not valid YAML"]);
        says("a: 1\n---\nb: 2\n", &["2:1: error: a second document"]);
        says("a: !exec x\n", &["1:4: error: a tag"]);
        says(
            &with("version: 1", "version: 2"),
            &["f.yaml:1:10: error: version is \"2\" (write `version: 1`"],
        );
        says(
            &with("version: 1", "# none"),
            &["the definition has no version"],
        );
        says(
            &format!("a: {}", "[".repeat(100)),
            &["nested deeper than 56 levels"],
        );
        let big = vec![b'#'; limits::DEFINITION_BYTES + 1];
        assert!(
            parse("f", None, &big).diagnostics[0]
                .message
                .contains("262145 bytes")
        );
        let latin = parse("f", None, b"a: 1\nb: \xc3\xa9\xe9").diagnostics;
        assert_eq!(
            (latin[0].line, latin[0].column, latin[0].message.as_str()),
            (2, 5, "the file is not UTF-8")
        );
    }

    #[test]
    fn a_name_other_than_the_stem_is_an_error() {
        let parsed = parse("x.yaml", Some("x"), GOOD.as_bytes());
        assert!(
            parsed.diagnostics[0]
                .to_string()
                .starts_with("x.yaml:2:7: error: the name is fix-failing-test, the file is x.yaml")
        );
    }

    #[test]
    fn keys_that_are_there_twice_are_found_at_every_level() {
        says(
            &with("  tester:\n    exec: [/usr", "  coder:\n    exec: [/usr"),
            &[
                "unknown name \"tester\"",
                "17:3: error: \"coder\" is here twice, first in line 10",
                "there is no role tester",
                "there is no role tester",
            ],
        );
        says(
            &with("max_rounds: 12", "name: b"),
            &["4:1: error: \"name\" is here twice, first in line 2"],
        );
        says(
            &with("{ ok: tester }", "{ ok: tester, ok: coder }"),
            &["21:25: error: \"ok\" is here twice"],
        );
        says(
            &with("  Nice: 5", "  User: x"),
            &["31:3: error: \"User\" is here twice"],
        );
    }

    #[test]
    fn faults_of_the_graph_point_to_their_places() {
        says(
            &with("{ ok: tester }", "{ ok: testr }"),
            &[
                "17:3: error: no route leads to role tester",
                "21:17: error: there is no role testr (did you mean tester?)",
            ],
        );
        says(
            &with(
                "coder:  { ok: tester }",
                "coder:  { okay: tester, ok: tester }",
            ),
            &[
                "21:13: error: role coder never ends with status \"okay\" (its statuses are ok and error)",
            ],
        );
        says(
            &with("$START: coder", "$START: codr"),
            &[
                "no route leads to role coder",
                "no route leads to role tester",
                "20:11: error: there is no role codr",
            ],
        );
        says(
            &with("$START: coder", "$STRAT: coder"),
            &[
                "19:1: error: the graph has no $START",
                "20:3: error: unknown word \"$STRAT\"",
            ],
        );
        says(
            &with("$START: coder", "$START: $END"),
            &["20:11: error: $START leads to $END"],
        );
        says(
            &with("{ ok: tester }", "{ error: tester }"),
            &["21:3: error: role coder has no route for ok"],
        );
        says(
            &with("{ ok: tester }", "tester"),
            &["21:11: error: routes of coder must be a map"],
        );
        says(
            &with("{ ok: tester }", "{ ok: $STOP }"),
            &["21:17: error: a route of coder leads to \"$STOP\""],
        );
        says(
            &with("  tester: {", "  testr: {"),
            &[
                "17:3: error: role tester has no route for ok",
                "22:3: error: there is no role testr (did you mean tester?)",
            ],
        );
        says(
            &with("ok: $END", "ok: coder"),
            &["19:1: warning: no way leads to $END"],
        );
    }

    #[test]
    fn an_unquoted_template_is_explained() {
        for value in [
            "{{ start.content }}",
            "{{ start.content }} please",
            "{% if last %}x{% endif %}",
            "{{a}}{{b}}",
        ] {
            let text = GOOD.replacen("    timeout: 20m\n", "", 1);
            let prompt = text.find("    prompt:").unwrap();
            let end = text.find("    cwd:").unwrap();
            let text = format!("{}    prompt: {value}\n{}", &text[..prompt], &text[end..]);
            let found = errors(&text).join("\n");
            assert!(
                found.contains("quote it or use a block scalar (|)"),
                "{value}: {found}"
            );
            assert!(found.contains("f.yaml:12:"), "{value}: {found}");
        }
    }

    #[test]
    fn prompts_are_checked_at_their_lines() {
        says(
            &with("{{ tester.content }}", "{{ testr.content }}"),
            &["14:44: error: prompt of role coder: unknown name \"testr\" (did you mean tester?)"],
        );
        says(
            &with("{% endif %}", "{% endfi %}"),
            &["14:7: error: prompt of role coder: "],
        );
        says(
            &with("    timeout: 20m", "    timeout: 20m\n    x: y"),
            &[
                "16:5: error: unknown key \"x\" in role coder (the keys of role coder are exec, llm, user, agent, prompt, timeout",
            ],
        );
    }

    #[test]
    fn the_lines_of_a_block_scalar_are_found_whatever_its_header() {
        for (header, body, line) in [
            ("|", "      {{ nix }}", 13),
            ("|-", "      a\n\n      {{ nix }}", 15),
            ("| # why", "      {{ nix }}", 13),
            ("|", "\n\n      {{ nix }}", 15),
            ("|2", "\n      {{ nix }}", 14),
            ("|", "        é\n        {{ nix }}", 14),
        ] {
            let start = GOOD.find("    prompt:").unwrap();
            let end = GOOD.find("    timeout:").unwrap();
            let text = format!(
                "{}    prompt: {header}\n{body}\n{}",
                &GOOD[..start],
                &GOOD[end..]
            );
            let found = errors(&text);
            let column = body.lines().last().unwrap().find("nix").unwrap() + 1;
            assert!(
                found[0].starts_with(&format!("f.yaml:{line}:{column}: ")),
                "{header} {body:?}: {found:?}"
            );
        }
        says(
            &with("name: fix", "description: a"),
            &["no name", "is here twice"],
        );
    }

    #[test]
    fn words_of_templates_are_no_role_names() {
        for name in ["loop", "range", "not", "true", "start"] {
            let text = GOOD.replace("coder", name);
            assert!(errors(&text)[0].contains("role name"), "{name}");
        }
        assert_eq!(errors(&GOOD.replace("coder", "debug")), [""; 0]);
    }

    #[test]
    fn exec_is_a_list_of_words() {
        for (exec, expected) in [
            ("[\"\", a]", "begins with an empty word"),
            ("[a, [b]]", "a word of exec of role coder is a list"),
            ("[a, ~]", "a word of exec of role coder is empty"),
            ("[\"a\\0b\"]", "NUL character"),
            ("{a: b}", "is a map, and must be a list"),
        ] {
            says(&with("[claude, -p, 1.10, true, 007]", exec), &[expected]);
        }
    }

    #[test]
    fn a_flood_of_roles_or_aliases_is_refused() {
        let mut text = "version: 1\nname: a\ngraph: {$START: r0}\nroles:\n".to_owned();
        for number in 0..65 {
            let _ = writeln!(text, "  r{number}: {{exec: [x]}}");
        }
        says(&text, &["65 roles, more than the 64"]);
        let mut bomb = "a: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for number in 1..30 {
            let previous = vec![format!("*a{}", number - 1); 9].join(", ");
            let _ = writeln!(bomb, "b{number}: &a{number} [{previous}]");
        }
        assert!(
            errors(&bomb)[0].contains("aliases add up"),
            "{:?}",
            errors(&bomb)
        );
        assert!(errors("a: &a [*a]")[0].contains("error"));
    }

    #[test]
    fn roles_are_commands_llms_and_agents() {
        let text = "version: 1
name: a
roles:
  coder:
    agent: {name: claude, args: [--model, small]}
    prompt: x
    env: {A: b, TOKEN: {credential: key}}
    meta: {properties: {status: {enum: [done, again]}, share: {minimum: 0.5}}}
    extract: local
    retry: {attempts: 4, backoff: 2s, on: [exit-code:75, exit-code:0, llm-error]}
    stall: 10m
    ok_codes: [0, 3]
    dry_run: {content: said, meta: {status: again, n: 1}}
  critic:
    llm: {provider: local, temperature: 0.2, max_tokens: 9, stream: false}
    user: '{{ coder.content }}'
    dry_run: execute
graph:
  $START: coder
  coder: {done: critic, again: coder}
  critic: {ok: $END}
";
        let definition = parse("f", None, text.as_bytes());
        assert_eq!(definition.diagnostics, []);
        let definition = definition.definition.unwrap();
        let workflow = &definition.workflow;
        assert_eq!(from_json(&definition.source).as_ref(), Ok(workflow));
        assert_eq!(workflow.worker.credentials, ["key".to_owned()].into());
        let coder = &workflow.roles[&"coder".parse().unwrap()];
        assert!(coder.statuses().eq(["done", "again"]));
        assert_eq!(
            coder.meta.as_ref().unwrap().schema["properties"]["share"]["minimum"],
            0.5
        );
        assert_eq!(
            (coder.retry.attempts, coder.stall),
            (4, Some(Duration::from_mins(10)))
        );
        let changed = |line: &str, other: &str| errors(&text.replacen(line, other, 1));
        for (line, other, says) in [
            (
                "on: [exit-code:75,",
                "on: [exit-cod:75,",
                "did you mean exit-code?",
            ),
            (
                "on: [exit-code:75,",
                "on: [exit-code:x,",
                "a retry is never for",
            ),
            (
                "on: [exit-code:75,",
                "on: [template-error,",
                "a retry is never for",
            ),
            ("status: again", "status: agian", "did you mean again?"),
            (
                "status: again",
                "status: true",
                "has a status that is no text",
            ),
            (
                "status: again",
                "status: [again]",
                "has a status that is no text",
            ),
            (
                "n: 1}",
                &format!("n: {}}}", "[".repeat(40) + &"]".repeat(40)),
                "deeper than 32",
            ),
            (
                "n: 1}",
                &format!("n: {}}}", "x".repeat(limits::META_BYTES)),
                "larger than 65536",
            ),
            ("again: coder}", "agian: coder}", "did you mean again?"),
            ("    prompt: x", "    exec: [x]", "has exec and agent"),
            ("TOKEN:", "NERVE_X:", "is set by nerve"),
            ("temperature: 0.2", "temperature: 3", "a number from 0 to 2"),
            (
                "{credential: key}",
                "{credential: a/b}",
                "a name has letters",
            ),
            (
                "enum: [done, again]",
                "type: string",
                "neither const nor enum",
            ),
        ] {
            let found = changed(line, other);
            assert!(
                found.iter().any(|found| found.contains(says)),
                "{other}: {found:#?}"
            );
        }
    }

    #[test]
    fn a_command_or_a_worker_of_its_own_may_route() {
        let moderated =
            "version: 1\nname: a\nroles: {r: {exec: [x]}}\nmoderator: {exec: [y], timeout: 1s}\n";
        let own = "version: 1\nname: a\nworker: {exec: [/bin/worker], User: root}\n";
        for text in [moderated, own] {
            let definition = parse("f", None, text.as_bytes()).definition.unwrap();
            assert_eq!(from_json(&definition.source), Ok(definition.workflow));
        }
        says(
            &format!("{moderated}graph: {{$START: r, r: {{ok: $END}}}}\n"),
            &["4:1: error: the definition has graph and moderator"],
        );
    }

    #[test]
    fn aliases_mean_what_they_name() {
        let text = with("exec: [/usr/bin/make, test]", "exec: *e").replacen(
            "exec: [claude",
            "exec: &e [claude",
            1,
        );
        let definition = parse("f", None, text.as_bytes()).definition.unwrap();
        let roles = &definition.workflow.roles;
        let work = |role: &str| &roles[&role.parse().unwrap()].work;
        assert_eq!(work("tester"), work("coder"));
        assert_eq!(from_json(&definition.source), Ok(definition.workflow));
    }

    #[test]
    fn a_fault_in_what_an_alias_repeats_is_shown_at_the_alias() {
        let text = "version: 1
name: a
roles:
  one: {exec: [x], prompt: &p \"{{ two }}\\n{{ three }}\"}
  two:
    exec: [x]
    prompt: &q |
      a
      {{ three }}
  last_one:
    exec: [x]
    prompt: *q
graph: {$START: one, one: {ok: two}, two: {ok: last_one}, last_one: {ok: $END}}
";
        let found = errors(text);
        assert_eq!(found.len(), 3, "{found:#?}");
        assert!(found[2].starts_with("f.yaml:12:13: error: "), "{found:#?}");
        assert!(found[2].contains("in line 2 of the prompt"), "{found:#?}");
    }

    #[test]
    fn a_flood_of_faults_is_told_briefly_and_quickly() {
        let found = errors(&"a:\n".repeat(50_000));
        assert_eq!(found.len(), DIAGNOSTICS + 1);
        let last = &found[DIAGNOSTICS];
        assert!(last.contains(" more of this kind are not shown"), "{last}");
        let mut names = String::new();
        for number in 0..10_000 {
            let _ = writeln!(names, "      {{{{ n{number} }}}}");
        }
        assert_eq!(
            errors(&with(
                "      Make the tests",
                &format!("{names}      Make the tests")
            ))
            .len(),
            20
        );
    }

    #[test]
    fn json_is_checked_like_a_file() {
        let error =
            from_json(&serde_json::json!({"version": 1, "name": "a\nb", "x": 1})).unwrap_err();
        assert!(
            error.contains("unknown key \"x\"")
                && error.contains("no roles")
                && !error.contains('\n'),
            "{error}"
        );
        assert!(from_json(&Value::Null).is_err());
    }

    #[test]
    fn the_machine_is_looked_at_apart() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(
            root.path().join("etc/passwd"),
            "root:x:0:0::/:/bin/sh\nbuilt:x:1:1::/:\n",
        )
        .unwrap();
        fs::write(root.path().join("etc/group"), "adm:x:4:\nbuild:x:5:\n").unwrap();
        let parsed = parse("f.yaml", None, GOOD.as_bytes());
        let warnings: Vec<String> = host::warnings(
            &parsed.path,
            &parsed.host_checks,
            root.path(),
            &Tools::default(),
        )
        .iter()
        .map(ToString::to_string)
        .collect();
        assert_eq!(
            warnings,
            [
                "f.yaml:16:10: warning: \"/srv/build\" is no directory on this machine (make it, or its rounds end in exec-failed)",
                "f.yaml:18:12: warning: \"/usr/bin/make\" in exec of role tester does not exist on this machine (install it, or its rounds end in exec-failed)",
                "f.yaml:24:9: warning: user build is not in /etc/passwd (did you mean built?)",
                "f.yaml:26:24: warning: group systemd-journal is not in /etc/group (make it, or the worker cannot be started)",
                "f.yaml:32:19: warning: \"/srv\" does not exist on this machine (make it, or write -PATH to go without; the worker cannot be started otherwise)",
            ]
        );
        fs::create_dir_all(root.path().join("usr/bin")).unwrap();
        fs::write(root.path().join("usr/bin/make"), "").unwrap();
        fs::remove_file(root.path().join("etc/passwd")).unwrap();
        fs::create_dir_all(root.path().join("srv/build")).unwrap();
        assert_eq!(
            host::warnings(
                &parsed.path,
                &parsed.host_checks,
                root.path(),
                &Tools::default()
            )
            .len(),
            1
        );
    }

    /// Pieces that make almost definitions.
    fn pieces() -> impl Strategy<Value = String> {
        let lines: Vec<&str> = GOOD
            .lines()
            .chain([
                "- x",
                "  {{ a }}",
                "<<: *a",
                "? a",
                "&a b: *a",
                "\t",
                "---",
                "...",
                "| >",
                "a: 'b",
                "!x",
                "%YAML 1.2",
                "[[",
                "}}",
            ])
            .collect();
        proptest::collection::vec(proptest::sample::select(lines), 0..40)
            .prop_map(|lines| lines.join("\n"))
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>, text: String, pieces in pieces()) {
            for bytes in [bytes.as_slice(), text.as_bytes(), pieces.as_bytes()] {
                let parsed = parse("f\n", Some("a"), bytes);
                let failed = parsed.diagnostics.iter().any(|found| found.severity == Severity::Error);
                prop_assert_eq!(parsed.definition.is_none(), failed);
                for found in &parsed.diagnostics {
                    prop_assert!(found.line >= 1 && found.column >= 1);
                    prop_assert!(!found.to_string().contains(char::is_control));
                }
                if let Some(definition) = parsed.definition {
                    prop_assert_eq!(from_json(&definition.source), Ok(definition.workflow));
                }
            }
        }

        #[test]
        fn a_valid_definition_survives_json(
            description in "[^\0]{0,40}",
            words in proptest::collection::vec("[^\0]{1,12}|[0-9.]{1,20}|true|null|~", 1..5),
            seconds in 1_u64..1_000_000,
            rounds in 1_u32..=10_000,
        ) {
            let json = |text: &str| serde_json::to_string(text).unwrap();
            let words: Vec<String> = words.iter().map(|word| json(word)).collect();
            let text = format!(
                "version: 1\nname: a\ndescription: {}\nmax_rounds: {rounds}\ntimeout: {seconds}\n\
                 roles: {{r: {{exec: [{}]}}}}\ngraph: {{$START: r, r: {{ok: $END}}}}\n",
                json(&description), words.join(", "),
            );
            let parsed = parse("a.yaml", Some("a"), text.as_bytes());
            // saphyr takes JSON strings, except for characters that YAML does not allow unescaped.
            if let Some(definition) = parsed.definition {
                prop_assert_eq!(&definition.workflow.description, &description);
                prop_assert_eq!(from_json(&definition.source), Ok(definition.workflow));
            } else {
                prop_assert!(parsed.diagnostics[0].message.starts_with("not valid YAML"), "{:?}", parsed.diagnostics);
            }
        }
    }
}
