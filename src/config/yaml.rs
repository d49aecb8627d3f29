//! YAML (and JSON) as a tree whose every node knows its place. Called by all of `config` that reads.
//!
//! One parser reads the file, so that what is checked is what is used. Scalars stay text until somebody asks for
//! another type: `1.10` and `yes` are what they look like. A tree is at most [`DEPTH`] deep, so recursion over it is
//! bounded, and a key is in a map once.

use std::collections::HashMap;
use std::ops::Range;

use saphyr_parser::{Event, Parser, ScalarStyle, Span};
use serde_json::{Map, Number, Value};

use super::diagnostic::quoted;
use crate::model::limits;

/// Deepest nesting of lists and maps. A line of the worker protocol has at most 64, and a definition is below some of them.
const DEPTH: usize = 56;

/// Where something is: line and columns from 1, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Place {
    pub line: usize,
    pub column: usize,
    /// The column after its last character in this line.
    pub end: usize,
}

impl Place {
    pub const START: Self = Self::at(1, 1);

    /// One character.
    pub const fn at(line: usize, column: usize) -> Self {
        Self {
            line,
            column,
            end: column + 1,
        }
    }

    /// What the parser tells; of more than one line it is the first to its end.
    fn of(span: Span, lines: &[&str]) -> Self {
        let place = Self::at(span.start.line().max(1), span.start.col() + 1);
        if span.end.line() == span.start.line() {
            place.until(span.end.col() + 1)
        } else {
            place.until_end(lines)
        }
    }

    /// Up to a column, and one character at least.
    fn until(self, end: usize) -> Self {
        let end = end.max(self.column + 1);
        Self { end, ..self }
    }

    /// The end of the last line that has anything, for what is found at the end of the file.
    fn in_text(self, lines: &[&str]) -> Self {
        match lines.iter().rposition(|line| !line.trim().is_empty()) {
            Some(last) if last + 1 < self.line => {
                Self::at(last + 1, lines[last].trim_end().chars().count())
            }
            _ => self,
        }
    }

    fn until_end(self, lines: &[&str]) -> Self {
        let line = lines.get(self.line - 1);
        self.until(line.map_or(0, |line| line.trim_end().chars().count() + 1))
    }
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub place: Place,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    /// Nothing, `~` or `null`.
    Null,
    /// A scalar; `plain` when it was not quoted, `literal` when it is a block (`|`) whose lines are the file's lines.
    Text {
        text: String,
        plain: bool,
        literal: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

impl Node {
    /// A key of a map.
    pub fn get(&self, key: &str) -> Option<&Entry> {
        match &self.content {
            Content::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    /// Where a part of a text is, in bytes of it. Known of block scalars, whose lines are the file's lines, and of what
    /// stands in one line as it is; of all others the whole is marked.
    pub fn part(&self, part: Range<usize>) -> Place {
        let Content::Text { text, literal, .. } = &self.content else {
            return self.place;
        };
        let (Some(before), Some(marked)) = (text.get(..part.start), text.get(part)) else {
            return self.place;
        };
        let width = marked.lines().next().unwrap_or("").chars().count();
        let (line, indent) = if *literal {
            // The place of a block scalar is its first line that is not blank.
            let blank = text.len() - text.trim_start_matches('\n').len();
            let line = self.place.line + before.matches('\n').count();
            (line.saturating_sub(blank), self.place.column)
        } else {
            let shown = self.place.end - self.place.column;
            match shown.checked_sub(text.chars().count()) {
                Some(quotes @ (0 | 2)) if !text.contains('\n') => {
                    (self.place.line, self.place.column + quotes / 2)
                }
                _ => return self.place,
            }
        };
        let last = before.rsplit('\n').next().unwrap_or_default();
        let column = indent + last.chars().count();
        Place::at(line, column).until(column + width)
    }
}

/// One key of a map with its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub key: String,
    pub place: Place,
    pub value: Node,
}

/// Why a text is no tree.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Fault {
    pub place: Place,
    pub message: String,
    pub help: &'static str,
}

impl Fault {
    fn new(place: Place, message: impl Into<String>, help: &'static str) -> Self {
        Self {
            place,
            message: message.into(),
            help,
        }
    }
}

/// What to do about `prompt: {{ x }}`.
pub(super) const QUOTE_TEMPLATE: &str = "an unquoted value that begins with {{ or {% is YAML, not a template: quote it or use a block scalar (|)";

/// The tree of a file with one document, and its duplicate keys. No tree when the text is no YAML.
pub(super) fn parse(text: &str) -> (Option<Node>, Vec<Fault>) {
    let mut builder = Builder::default();
    let lines: Vec<&str> = text.split('\n').collect();
    for event in Parser::new_from_str(text) {
        let outcome = match event {
            Ok((event, span)) => builder.event(event, Place::of(span, &lines), &lines),
            Err(error) => {
                let marker = error.marker();
                let place = Place::at(marker.line().max(1), marker.col() + 1);
                let place = place.in_text(&lines);
                let help = if template_near(text, place.line) {
                    QUOTE_TEMPLATE
                } else {
                    yaml_help(error.info())
                };
                Err(Fault::new(
                    place,
                    format!("not valid YAML: {}", error.info()),
                    help,
                ))
            }
        };
        if let Err(fault) = outcome {
            builder.faults.push(fault);
            return (None, builder.faults);
        }
    }
    if builder.root.is_none() {
        builder.faults.push(Fault::new(
            Place::START,
            "the file is empty",
            "write a definition, see nerve-workflow(5)",
        ));
    }
    (builder.root, builder.faults)
}

/// What to do about the parser's commonest complaints.
fn yaml_help(complaint: &str) -> &'static str {
    const HELP: [(&str, &str); 4] = [
        ("mapping values", "a value that has ': ' in it needs quotes"),
        ("tab", "indent with blanks"),
        ("anchor", "write &NAME before the value that *NAME repeats"),
        (
            "quoted scalar",
            "look for a quotation mark that is not closed",
        ),
    ];
    let help = HELP.iter().find(|(word, _)| complaint.contains(word));
    help.map_or(
        "look for what is not closed, not quoted or not indented here, or in the lines before",
        |(_, help)| help,
    )
}

/// Whether a value on this line, or on the two before it, looks like an unquoted template.
fn template_near(text: &str, line: usize) -> bool {
    text.lines()
        .skip(line.saturating_sub(3))
        .take(3.min(line))
        .any(|line| {
            let value = line.split_once(": ").map_or(line, |(_, value)| value);
            let value = value.trim_start().trim_start_matches("- ").trim_start();
            value.starts_with("{{") || value.starts_with("{%")
        })
}

/// A collection that is not closed yet.
struct Open {
    place: Place,
    anchor: usize,
    /// The key that waits for its value.
    key: Option<(String, Place)>,
    seen: HashMap<String, Place>,
    content: Content,
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: HashMap<usize, (Node, usize)>,
    /// How much more text and nodes aliases may add: a few lines of them could otherwise grow without bound.
    copied: usize,
    root: Option<Node>,
    faults: Vec<Fault>,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, place: Place, lines: &[&str]) -> Result<(), Fault> {
        match event {
            Event::DocumentStart(_) if self.root.is_some() => Err(Fault::new(
                place,
                "a second document begins here",
                "keep one document in a file; remove '---' and what follows",
            )),
            Event::Scalar(.., Some(_))
            | Event::SequenceStart(_, Some(_))
            | Event::MappingStart(_, Some(_)) => Err(Fault::new(
                place,
                "a tag (!…) has no meaning here",
                "remove it",
            )),
            Event::Scalar(text, style, anchor, None) => {
                let content = scalar(text.into_owned(), style);
                self.complete(Node { place, content }, anchor)
            }
            Event::SequenceStart(anchor, None) => {
                self.start(place, anchor, Content::List(Vec::new()))
            }
            Event::MappingStart(anchor, None) => {
                self.start(place, anchor, Content::Map(Vec::new()))
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => {
                    // A block ends where something else begins.
                    let here = place.line == open.place.line && place.end > open.place.end;
                    let node = Node {
                        place: if here {
                            open.place.until(place.end)
                        } else {
                            open.place.until_end(lines)
                        },
                        content: open.content,
                    };
                    self.complete(node, open.anchor)
                }
                None => Ok(()),
            },
            Event::Alias(anchor) => self.alias(anchor, place),
            _ => Ok(()),
        }
    }

    fn start(&mut self, place: Place, anchor: usize, content: Content) -> Result<(), Fault> {
        if self.open.len() >= DEPTH {
            return Err(Fault::new(
                place,
                format!("nested deeper than {DEPTH} levels"),
                "write it flatter",
            ));
        }
        if let Some(Open {
            content: Content::Map(entries),
            key: None,
            place: parent,
            ..
        }) = self.open.last()
        {
            let brace = entries.is_empty()
                && parent.line == place.line
                && parent.column + 1 == place.column;
            return Err(if brace {
                Fault::new(*parent, "a flow map whose key is a map", QUOTE_TEMPLATE)
            } else {
                Fault::new(
                    place,
                    "a key must be plain text, not a list or map",
                    "quote it when it is meant as text",
                )
            });
        }
        self.open.push(Open {
            place,
            anchor,
            key: None,
            seen: HashMap::new(),
            content,
        });
        Ok(())
    }

    fn alias(&mut self, anchor: usize, place: Place) -> Result<(), Fault> {
        let Some((node, size)) = self.anchors.get(&anchor) else {
            return Err(Fault::new(
                place,
                "an alias to a value that is not complete",
                "write the value out",
            ));
        };
        self.copied += size;
        if self.copied > limits::DEFINITION_BYTES {
            let limit = limits::DEFINITION_BYTES;
            return Err(Fault::new(
                place,
                format!("aliases add up to more than {limit} bytes"),
                "write fewer of them",
            ));
        }
        if depth(node) + self.open.len() > DEPTH {
            return Err(Fault::new(
                place,
                format!("nested deeper than {DEPTH} levels"),
                "write it flatter",
            ));
        }
        let mut node = Node {
            place,
            ..node.clone()
        };
        if let Content::Text { literal, .. } = &mut node.content {
            // Its lines are elsewhere.
            *literal = false;
        }
        self.complete(node, 0)
    }

    /// Puts a finished node where it belongs.
    fn complete(&mut self, node: Node, anchor: usize) -> Result<(), Fault> {
        if anchor > 0 {
            let size = size(&node);
            self.copied += size;
            if self.copied > limits::DEFINITION_BYTES * 2 {
                return Err(Fault::new(
                    node.place,
                    "too many nested anchors",
                    "write fewer of them",
                ));
            }
            self.anchors.insert(anchor, (node.clone(), size));
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        let entries = match &mut open.content {
            Content::List(nodes) => {
                nodes.push(node);
                return Ok(());
            }
            Content::Map(entries) => entries,
            Content::Null | Content::Text { .. } => return Ok(()),
        };
        if let Some((key, place)) = open.key.take() {
            if let Some(first) = open.seen.get(&key) {
                let message = format!(
                    "{} is here twice, first in line {}",
                    quoted(&key),
                    first.line
                );
                self.faults
                    .push(Fault::new(place, message, "keep one of them"));
            } else {
                open.seen.insert(key.clone(), place);
                entries.push(Entry {
                    key,
                    place,
                    value: node,
                });
            }
            return Ok(());
        }
        let key = match node.content {
            Content::Text { text, .. } => text,
            Content::Null => String::new(),
            Content::List(_) | Content::Map(_) => {
                return Err(Fault::new(
                    node.place,
                    "a key must be plain text, not a list or map",
                    "write it out",
                ));
            }
        };
        open.key = Some((key, node.place));
        Ok(())
    }
}

fn scalar(text: String, style: ScalarStyle) -> Content {
    let plain = style == ScalarStyle::Plain;
    if plain && matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL") {
        Content::Null
    } else {
        Content::Text {
            text,
            plain,
            literal: style == ScalarStyle::Literal,
        }
    }
}

/// A measure of the memory that a copy costs.
fn size(node: &Node) -> usize {
    32 + match &node.content {
        Content::Null => 0,
        Content::Text { text, .. } => text.len(),
        Content::List(nodes) => nodes.iter().map(size).sum(),
        Content::Map(entries) => entries
            .iter()
            .map(|entry| entry.key.len() + size(&entry.value))
            .sum(),
    }
}

fn depth(node: &Node) -> usize {
    match &node.content {
        Content::Null | Content::Text { .. } => 0,
        Content::List(nodes) => 1 + nodes.iter().map(depth).max().unwrap_or(0),
        Content::Map(entries) => {
            1 + entries
                .iter()
                .map(|entry| depth(&entry.value))
                .max()
                .unwrap_or(0)
        }
    }
}

/// The tree as JSON, in its own shape. Only scalars that read back as the same text become numbers.
pub(super) fn to_json(node: &Node) -> Value {
    match &node.content {
        Content::Null => Value::Null,
        Content::Text {
            text, plain: true, ..
        } => match text.as_str() {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ => {
                let whole = text.parse::<i64>().ok().map(Number::from);
                let number = whole.or_else(|| Number::from_f64(text.parse().ok()?));
                let number = number.filter(|number| number.to_string() == *text);
                number.map_or_else(|| Value::String(text.clone()), Value::Number)
            }
        },
        Content::Text { text, .. } => Value::String(text.clone()),
        Content::List(nodes) => Value::Array(nodes.iter().map(to_json).collect()),
        Content::Map(entries) => {
            let pair = |entry: &Entry| (entry.key.clone(), to_json(&entry.value));
            Value::Object(entries.iter().map(pair).collect::<Map<_, _>>())
        }
    }
}

/// The inverse of [`to_json`], without places.
pub(super) fn from_json(value: &Value) -> Node {
    let plain = |text: String| Content::Text {
        text,
        plain: true,
        literal: false,
    };
    let content = match value {
        Value::Null => Content::Null,
        Value::Bool(flag) => plain(flag.to_string()),
        Value::Number(number) => plain(number.to_string()),
        Value::String(text) => Content::Text {
            text: text.clone(),
            plain: false,
            literal: false,
        },
        Value::Array(values) => Content::List(values.iter().map(from_json).collect()),
        Value::Object(map) => Content::Map(
            map.iter()
                .map(|(key, value)| Entry {
                    key: key.clone(),
                    place: Place::START,
                    value: from_json(value),
                })
                .collect(),
        ),
    };
    Node {
        place: Place::START,
        content,
    }
}
