//! Definitions of united-workforce (version 1 of its format) as ours. Called by `nervectl convert`.
//!
//! There a role is a text and a schema, each edge of the graph has a prompt of its own, and who executes a role is said
//! elsewhere. What cannot be carried over is told with its line; what is made is checked as every definition is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde_json::Value;

use super::diagnostic::{Diagnostic, Severity, listed, quoted};
use super::reader::Reader;
use super::template;
use super::yaml::{Content, Entry, Node, Place, to_json};
use super::{definition, emit, liquid};
use crate::model::limits;
use crate::model::message::ERROR;
use crate::model::name::{RoleName, WorkflowName};
use crate::model::workflow::Target;

/// There the name of the key that a role's status is in.
const STATUS: &str = "$status";
/// Who executes every role until somebody says otherwise.
const AGENT: &str = "claude";
const KEYS: [&str; 5] = ["version", "name", "description", "roles", "graph"];

/// What became of a definition.
#[derive(Debug)]
pub struct Converted {
    /// Ours; none when the text is no definition of theirs.
    pub text: Option<String>,
    /// What could not be carried over, by place in the text that was given, and what is wrong with what was made of it.
    pub diagnostics: Vec<Diagnostic>,
}

/// Converts a definition; `path` is what it is called.
#[must_use]
pub fn convert(path: &str, bytes: &[u8]) -> Converted {
    let mut reader = Reader::default();
    let node = reader.tree(bytes);
    let conversion = node
        .as_ref()
        .and_then(|node| Conversion::read(&mut reader, node));
    let text = conversion.map(|conversion| conversion.write(&mut reader));
    let mut diagnostics = reader.diagnostics(path);
    if let Some(text) = &text {
        let result = format!("{path} as converted");
        let made = definition::parse(&result, None, text.as_bytes()).diagnostics;
        diagnostics.extend(
            made.into_iter()
                .filter(|fault| fault.severity == Severity::Error),
        );
    }
    Converted { text, diagnostics }
}

/// An edge of the graph.
struct Edge<'n> {
    /// Who has spoken, and the status; the start has neither.
    from: Option<(&'n str, &'n str)>,
    target: &'n str,
    place: Place,
    prompt: Option<&'n Node>,
    location: Option<&'n Node>,
}

struct Conversion<'n> {
    name: &'n str,
    description: &'n str,
    roles: &'n [Entry],
    edges: Vec<Edge<'n>>,
    /// Roles by the names that they had.
    names: BTreeMap<&'n str, String>,
}

impl<'n> Conversion<'n> {
    fn read(reader: &mut Reader, node: &'n Node) -> Option<Self> {
        let entries = reader.entries(node, "the file")?;
        for entry in entries {
            if !KEYS.contains(&entry.key.as_str()) && !entry.key.starts_with("x-") {
                reader.warning(
                    entry.place,
                    format!("{} is not carried over", quoted(&entry.key)),
                    "say it in the roles or the graph, if it matters",
                );
            }
        }
        let of = |key: &str| value(node, key);
        if let Some(version) = of("version")
            .and_then(text)
            .filter(|version| *version != "1")
        {
            let help = "convert it to version 1 with its own tools";
            reader.error_help(
                node.place,
                format!("version {} is not known", quoted(version)),
                help,
            );
        }
        let (Some(roles), Some(graph)) = (of("roles"), of("graph")) else {
            let message = "a definition of united-workforce has roles and a graph";
            reader.error_help(node.place, message, "check that this is one");
            return None;
        };
        let place = roles.place;
        let roles = reader.entries(roles, "roles")?;
        if roles.len() > limits::ROLES {
            let most = limits::ROLES;
            let message = format!(
                "{} roles, more than the {most} of a workflow of nerve",
                roles.len()
            );
            reader.error_help(place, message, "split the definition");
            return None;
        }
        let edges = edges(reader, graph)?;
        Some(Self {
            name: of("name").and_then(text).unwrap_or("converted"),
            description: of("description").and_then(text).unwrap_or_default(),
            names: names(roles),
            roles,
            edges,
        })
    }

    fn write(&self, reader: &mut Reader) -> String {
        let mut out = format!(
            "# yaml-language-server: $schema=/usr/share/nerve/workflow.schema.json\n\
             # Converted from a definition of united-workforce, which does not say who executes a role: look at each `agent:`.\n\
             version: 1\nname: {}\n",
            workflow_name(self.name)
        );
        if !self.description.is_empty() {
            emit::entry(&mut out, 0, "description", &self.description.trim().into());
        }
        out.push_str(
            "max_rounds: 50                         # that format has no such limit\n\nroles:\n",
        );
        if let Some(first) = self.roles.first() {
            let message =
                format!("who executes the roles is not said; each has `agent: {AGENT}` now");
            let help = "choose for each role an agent of nerve.yaml, `llm: PROVIDER`, or a command: `exec: [make, test]`";
            reader.warning(first.place, message, help);
        }
        for role in self.roles {
            self.role(reader, role, &mut out);
        }
        let start = self.edges.iter().find(|edge| edge.from.is_none());
        if let Some(edge) = start {
            let _ = writeln!(out, "\ngraph:\n  $START: {}", self.target(edge.target));
        }
        for role in self.roles {
            let _ = writeln!(out, "  {}:", self.target(&role.key));
            for edge in &self.edges {
                if let Some((_, word)) = edge.from.filter(|(from, _)| *from == role.key) {
                    emit::entry(&mut out, 4, &status(word), &self.target(edge.target).into());
                }
            }
        }
        out
    }

    fn role(&self, reader: &mut Reader, role: &Entry, out: &mut String) {
        let of = |key: &str| {
            value(&role.value, key)
                .and_then(text)
                .unwrap_or_default()
                .trim()
        };
        let _ = writeln!(out, "  {}:", self.target(&role.key));
        let capabilities = value(&role.value, "capabilities").map(to_json);
        let capabilities: Vec<String> = capabilities
            .and_then(|list| serde_json::from_value(list).ok())
            .unwrap_or_default();
        for line in of("description").lines() {
            let _ = writeln!(out, "    # {}", comment(line));
        }
        if !capabilities.is_empty() {
            let capabilities = listed(capabilities.iter().map(String::as_str));
            let _ = writeln!(
                out,
                "    # It needs to be capable of: {}",
                comment(&capabilities)
            );
        }
        emit::entry(out, 4, "agent", &AGENT.into());
        let mut parts: Vec<String> = ["goal", "procedure", "output"]
            .map(of)
            .into_iter()
            .filter(|part| !part.is_empty())
            .map(|part| liquid::verbatim(&part.replace(STATUS, "status")))
            .collect();
        parts.push("{% if start.content %}The task: {{ start.content }}{% endif %}".to_owned());
        let edges: Vec<&Edge<'_>> = self
            .edges
            .iter()
            .filter(|edge| edge.target == role.key)
            .collect();
        parts.extend(self.task(reader, &edges));
        emit::entry(out, 4, "prompt", &(parts.join("\n\n") + "\n").into());
        if let Some(cwd) = location(reader, &edges) {
            emit::entry(out, 4, "cwd", &cwd.into());
        }
        match value(&role.value, "frontmatter") {
            Some(frontmatter) => {
                let schema = schema(to_json(frontmatter));
                if schema.pointer("/properties/status").is_none() && schema.get("oneOf").is_none() {
                    let message =
                        format!("frontmatter of role {} has no {STATUS}", quoted(&role.key));
                    let help = format!(
                        "write its properties with `{STATUS}: {{const: …}}`, for each status a branch of oneOf"
                    );
                    reader.error_help(frontmatter.place, message, help);
                }
                emit::entry(out, 4, "meta", &schema);
            }
            None => reader.warning(
                role.place,
                format!(
                    "role {} has no frontmatter, so its status is ok or error",
                    quoted(&role.key)
                ),
                "write a meta with its statuses",
            ),
        }
    }

    /// What the edges to a role tell it: one text, or which of them, by who has spoken.
    fn task(&self, reader: &mut Reader, edges: &[&Edge<'_>]) -> Option<String> {
        let mut tasks: Vec<(&Edge<'_>, String)> = Vec::new();
        for edge in edges {
            let Some((node, prompt)) = edge
                .prompt
                .and_then(|node| Some((node, text(node)?.trim())))
            else {
                continue;
            };
            if prompt.is_empty() {
                continue;
            }
            let root = edge.from.map_or(liquid::START, |_| "last.meta");
            let translated = liquid::translate(prompt, root);
            for (line, what) in translated.left {
                // The lines of a block begin below its key.
                let is_block = matches!(node.content, Content::Text { literal: true, .. });
                let place = Place::at(node.place.line + usize::from(is_block) + line, 1);
                let message =
                    format!("{what} cannot be said in a prompt of nerve, and stays as text");
                let help = "write it with what minijinja has, see nerve-workflow(5)";
                match edge.from {
                    Some(_) => reader.warning(place, message, help),
                    None => reader.error_help(
                        place,
                        message,
                        format!("name `task`, what the run is started with, or {help}"),
                    ),
                }
            }
            tasks.push((edge, translated.text));
        }
        let different: BTreeSet<&str> = tasks.iter().map(|(_, text)| text.as_str()).collect();
        if tasks.is_empty() || (different.len() == 1 && tasks.len() == edges.len()) {
            return tasks.pop().map(|(_, text)| text);
        }
        let mut text = String::new();
        for (index, (edge, task)) in tasks.iter().enumerate() {
            let word = if index == 0 { "if" } else { "elif" };
            let condition = match edge.from {
                None => format!("last.role == \"{}\"", RoleName::START),
                Some((role, word)) => format!(
                    "last.role == \"{}\" and last.meta.status == \"{}\"",
                    self.target(role),
                    status(word)
                ),
            };
            let _ = writeln!(text, "{{% {word} {condition} %}}{task}");
        }
        text.push_str("{% endif %}");
        Some(text)
    }

    /// A role, or the end.
    fn target(&self, target: &str) -> String {
        if target == Target::END {
            return Target::END.to_owned();
        }
        self.names
            .get(target)
            .cloned()
            .unwrap_or_else(|| identifier(target))
    }
}

/// Their schema of a reply as ours.
fn schema(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let entry = |(key, value): (String, Value)| match key.as_str() {
                STATUS => ("status".to_owned(), statuses(value)),
                _ => (key, schema(value)),
            };
            Value::Object(map.into_iter().map(entry).collect())
        }
        Value::Array(list) => list.into_iter().map(schema).collect(),
        Value::String(text) if text == STATUS => "status".into(),
        other => other,
    }
}

/// The schema of a status, its words as ours.
fn statuses(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let entry = |(key, value): (String, Value)| match key.as_str() {
                "const" | "enum" => (key, statuses(value)),
                _ => (key, value),
            };
            Value::Object(map.into_iter().map(entry).collect())
        }
        Value::Array(list) => list.into_iter().map(statuses).collect(),
        Value::String(text) => status(&text).into(),
        other => other,
    }
}

/// A status: a word, and not one of nerve's own.
fn status(text: &str) -> String {
    let word = |c: char| match c {
        c if c.is_alphanumeric() || c == '-' => c,
        _ => '_',
    };
    match text {
        ERROR => "failed".to_owned(),
        text => text.chars().map(word).collect(),
    }
}

/// All edges of a graph, that of the start first.
fn edges<'n>(reader: &mut Reader, graph: &'n Node) -> Option<Vec<Edge<'n>>> {
    let mut edges = Vec::new();
    for role in reader.entries(graph, "graph")? {
        let Content::Map(routes) = &role.value.content else {
            let message = format!("the routes of {} are not by status", quoted(&role.key));
            let help = "this is the format before version 1: convert it with its own tools, or write `STATUS: {role: …, prompt: …}`";
            reader.error_help(role.value.place, message, help);
            continue;
        };
        for route in routes {
            let is_start = role.key == Target::START;
            if is_start && route.key != "new" {
                let message = format!(
                    "$START.{} is not carried over: a run that has ended is not gone on with",
                    route.key
                );
                let help = "start a new run, and say in its prompt what is there already";
                reader.warning(route.place, message, help);
                continue;
            }
            let of = |key: &str| value(&route.value, key);
            let Some(target) = of("role").and_then(text) else {
                let message = format!("{}.{} names no role", role.key, route.key);
                reader.error_help(route.place, message, "write `role: NAME`, or `role: $END`");
                continue;
            };
            let is_suspended = target == "$SUSPEND";
            if is_suspended {
                let message = format!(
                    "{}.{} ends the run now: a run waits for nobody yet",
                    role.key, route.key
                );
                let help = "start it again with the answer in its prompt";
                reader.warning(route.place, message, help);
            }
            if route.key == ERROR {
                let message =
                    "error is nerve's own status; what the role calls so is called failed now";
                reader.warning(route.place, message, "say so in the role's prompt");
            }
            let is_told = of("prompt")
                .and_then(text)
                .is_some_and(|text| !text.trim().is_empty());
            if is_told && (is_suspended || target == Target::END) {
                let message = format!(
                    "the prompt of {}.{} is not carried over: at the end nobody is told anything",
                    role.key, route.key
                );
                let help = format!("say in the prompt of {} what it is to report", role.key);
                reader.warning(route.place, message, help);
            }
            edges.push(Edge {
                from: (!is_start).then_some((role.key.as_str(), route.key.as_str())),
                target: if is_suspended { Target::END } else { target },
                place: route.place,
                prompt: of("prompt"),
                location: of("location").filter(|node| node.content != Content::Null),
            });
        }
    }
    edges.sort_by_key(|edge| edge.from.is_some());
    Some(edges)
}

/// Where a role works, when all who lead to it say the same place.
fn location(reader: &mut Reader, edges: &[&Edge<'_>]) -> Option<String> {
    let places: BTreeSet<&str> = edges
        .iter()
        .filter_map(|edge| text(edge.location?))
        .collect();
    let only = places.first().filter(|only| {
        let is_fixed = places.len() == 1 && edges.iter().all(|edge| edge.location.is_some());
        is_fixed && only.starts_with('/') && !only.contains("{{") && !only.contains("{%")
    });
    if only.is_none() {
        for edge in edges.iter().filter(|edge| edge.location.is_some()) {
            reader.warning(
                edge.place,
                "location is not carried over: a role of nerve always works in the same directory",
                "give the role a `cwd`, or tell it in its prompt where to go",
            );
        }
    }
    only.map(|only| (*only).to_owned())
}

fn value<'n>(node: &'n Node, key: &str) -> Option<&'n Node> {
    node.get(key).map(|entry| &entry.value)
}

fn text(node: &Node) -> Option<&str> {
    match &node.content {
        Content::Text { text, .. } => Some(text),
        _ => None,
    }
}

/// What may stand in a comment: even a lone carriage return would end it.
fn comment(text: &str) -> String {
    text.replace(|c| !emit::is_printable(c), " ")
}

/// Names that prompts can speak of, each once.
fn names(roles: &[Entry]) -> BTreeMap<&str, String> {
    let mut names: BTreeMap<&str, String> = BTreeMap::new();
    for role in roles {
        let mut name = identifier(&role.key);
        while names.values().any(|known| *known == name) {
            name.push('_');
        }
        names.insert(&role.key, name);
    }
    names
}

fn identifier(text: &str) -> String {
    let word = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_lowercase()
        } else {
            '_'
        }
    };
    let mut name: String = text.chars().map(word).collect();
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        name.insert_str(0, "role_");
    }
    if name.parse::<RoleName>().is_err() || template::is_word(&name) {
        name.push_str("_role");
    }
    name
}

fn workflow_name(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<String> = words
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    let name = words.join("-");
    match name.parse::<WorkflowName>() {
        Ok(_) => name,
        Err(_) => "converted".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::message::Message;
    use crate::model::workflow::Workflow;

    fn fixture(name: &str) -> Vec<u8> {
        std::fs::read(format!("tests/fixtures/united-workforce/{name}.yaml")).unwrap()
    }

    fn converted(name: &str) -> (String, Workflow, Vec<String>) {
        let Converted { text, diagnostics } = convert("f", &fixture(name));
        let text = text.unwrap();
        let parsed = definition::parse("result", None, text.as_bytes());
        assert_eq!(parsed.diagnostics, [], "{text}");
        let told = diagnostics.iter().map(ToString::to_string).collect();
        (text, parsed.definition.unwrap().workflow, told)
    }

    /// What a role is told after this message.
    fn told(workflow: &Workflow, role: &str, after: &str, meta: Value) -> String {
        let message = |role: &str, content: &str, meta: Value| Message {
            role: role.to_owned(),
            content: content.to_owned(),
            meta: meta.as_object().unwrap().clone(),
            timestamp: 0,
        };
        let start = message(RoleName::START, "do it", serde_json::json!({}));
        let thread = if after.is_empty() {
            vec![start]
        } else {
            vec![start, message(after, "said", meta)]
        };
        let run = "0193000000007000800000003fa9c1d2".parse().unwrap();
        let context = template::context(&thread, 2, run);
        let prompt = workflow.roles[&role.parse().unwrap()]
            .prompt
            .as_deref()
            .unwrap();
        template::render(prompt, context).unwrap()
    }

    #[test]
    fn every_definition_becomes_a_right_one_and_what_it_loses_is_told() {
        let resume = "$START.resume is not carried over";
        let agent = "who executes the roles is not said";
        let end = "is not carried over: at the end nobody is told anything";
        for (name, expected) in [
            ("debate", &[(22, agent), (54, resume), (64, end)][..]),
            ("review-code", &[(5, agent), (54, resume), (70, end)]),
            ("analyze-topic", &[(4, agent), (24, resume), (26, end)]),
            (
                "solve-issue",
                &[
                    (5, agent),
                    (49, resume),
                    (51, "location is not carried over"),
                    (52, "the filter truncate cannot be said"),
                    (52, "planner.insufficient_info ends the run now"),
                    (52, end),
                    (55, "error is nerve's own status"),
                    (55, end),
                    (57, end),
                ],
            ),
            (
                "count-words",
                &[
                    (4, "\"settings\" is not carried over"),
                    (6, agent),
                    (21, resume),
                    (23, "and beside or in one condition"),
                    (23, "the tag case"),
                    (24, end),
                ],
            ),
            ("release-package", &[(5, agent), (50, resume)]),
        ] {
            let Converted { diagnostics, .. } = convert("f", &fixture(name));
            let told: Vec<_> = diagnostics
                .iter()
                .map(|d| (d.line, d.message.as_str()))
                .collect();
            let same = told.len() == expected.len()
                && told
                    .iter()
                    .zip(expected)
                    .all(|(told, expected)| told.0 == expected.0 && told.1.contains(expected.1));
            assert!(same, "{name}: {told:#?}");
            assert!(
                diagnostics.iter().all(|d| d.help.is_some()),
                "{diagnostics:?}"
            );
        }
    }

    #[test]
    fn a_role_is_told_what_the_edge_to_it_says() {
        let (text, debate, _) = converted("debate");
        assert!(
            text.contains("  opponent:\n    speak: proponent\n"),
            "{text}"
        );
        let first = told(&debate, "proponent", "", Value::Null);
        assert!(first.contains("must have status: final") && first.contains("The task: do it"));
        assert!(first.contains("Open the debate."), "{first}");
        let spoken = serde_json::json!({"status": "speak", "argument": "because"});
        let next = told(&debate, "proponent", "opponent", spoken);
        assert!(next.contains("They say:\n\nbecause"), "{next}");
        assert!(!next.contains("Open the debate."), "{next}");
        let (_, review, _) = converted("review-code");
        let issues = serde_json::json!({"status": "changes-requested", "issues": ["a", "b"]});
        let comment = told(&review, "commenter", "reviewer", issues);
        assert!(comment.contains("1. a\n2. b\n"), "{comment}");
        let fetcher = told(&review, "fetcher", "", Value::Null);
        assert!(
            fetcher.contains("repos/{{owner}}/{{repo}}/pulls"),
            "{fetcher}"
        );
        let (text, solve, told_of) = converted("solve-issue");
        assert_eq!(solve.name.as_str(), "solve-issue");
        assert_eq!(
            solve.roles.keys().map(RoleName::as_str).collect::<Vec<_>>(),
            ["last_role", "lead_developer", "planner"]
        );
        assert_eq!(
            solve.roles[&"last_role".parse().unwrap()].cwd.as_deref(),
            Some("/srv/build")
        );
        assert!(
            text.contains("failed: $END") && told_of.len() == 9,
            "{text}"
        );
    }

    #[test]
    fn a_comment_stays_one() {
        let text = "roles: {a: {description: \"x\\ry: 1\\u0085z: 2\", capabilities: [\"v\\rw: 3\"]}}\ngraph: {$START: {new: {role: a}}}\n";
        let converted = convert("f", text.as_bytes()).text.unwrap();
        assert!(converted.contains("    # x y: 1 z: 2\n"), "{converted}");
        assert!(converted.contains("capable of: v w: 3\n"), "{converted}");
    }

    #[test]
    fn the_start_knows_its_task_and_null_is_no_location() {
        let text = |name| {
            format!(
                "version: 1\nname: a\nroles: {{a: {{goal: x, frontmatter: {{properties: {{$status: {{const: done}}}}}}}}}}\n\
                 graph: {{$START: {{new: {{role: a, prompt: 'Start: {{{{ {name} }}}}', location: null}}}}, a: {{done: {{role: $END}}}}}}\n"
            )
        };
        let right = convert("f", text("task").as_bytes());
        assert!(right.text.unwrap().contains("Start: {{ start.content }}"));
        // Who executes the role is not said.
        assert_eq!(right.diagnostics.len(), 1, "{:?}", right.diagnostics);
        let wrong = convert("f", text("repo").as_bytes()).diagnostics;
        let is_told = |d: &Diagnostic| d.severity == Severity::Error && d.message.contains("repo");
        assert!(wrong.iter().any(is_told), "{wrong:?}");
    }

    #[test]
    fn what_one_edge_says_is_not_said_after_another() {
        let text = "version: 1
name: a
roles:
  a: {goal: x, frontmatter: {properties: {$status: {enum: [again, done]}}}}
graph:
  $START: {new: {role: a}}
  a: {again: {role: a, prompt: Once more.}, done: {role: $END}}
";
        let text = convert("f", text.as_bytes()).text.unwrap();
        let workflow = definition::parse("result", None, text.as_bytes())
            .definition
            .unwrap()
            .workflow;
        assert!(!told(&workflow, "a", "", Value::Null).contains("Once more."));
        let again = serde_json::json!({"status": "again"});
        assert!(told(&workflow, "a", "a", again).contains("Once more."));
    }

    #[test]
    fn what_is_no_such_definition_is_refused() {
        let many: Vec<String> = (0..=limits::ROLES).map(|n| format!("r{n}: {{}}")).collect();
        let many = many.join(", ");
        let many = format!("roles: {{{many}}}\ngraph: {{$START: {{new: {{role: r1}}}}}}\n");
        for (text, says) in [
            (
                "version: 2\nroles: {}\ngraph: {}\n",
                "version \"2\" is not known",
            ),
            ("version: 1\nname: a\n", "has roles and a graph"),
            (
                "roles: {a: {goal: x}}\ngraph: {a: [{role: b, condition: c}]}\n",
                "the routes of \"a\" are not by status",
            ),
            (
                "roles: {a: {frontmatter: {properties: {done: {type: boolean}}}}}\ngraph: {$START: {new: {role: a}}, a: {x: {role: $END}}}\n",
                "has no $status",
            ),
            ("a: !include b.yaml\n", "a tag"),
            (&many, "65 roles, more than the 64"),
        ] {
            let told = convert("f", text.as_bytes()).diagnostics;
            let is_told = told
                .iter()
                .any(|d| d.severity == Severity::Error && d.message.contains(says));
            assert!(is_told, "{text}: {told:?}");
        }
    }
}
