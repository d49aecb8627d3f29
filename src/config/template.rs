//! Prompts as minijinja templates. `definition` checks them here when a file is read; the worker renders them here.
//!
//! What passes [`check`] parses without overflowing a thread's stack and names nothing that does not exist. Rendering is
//! bounded in instructions and in output, not in time or memory between them: a definition that doubles a string or
//! nests a list in itself ten thousand times harms its own worker, which is what `MemoryMax` and the unit are for.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Enumerator, Object, Serde, Value};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};

use super::diagnostic::{escaped, listed, nearest, quoted};
use super::template_shape::{self, BLOCKS, LINE_BYTES, Shape, TAG_BYTES, Word};
use crate::model::limits;
use crate::model::message::Message;
use crate::model::name::{RoleName, RunId};

/// Functions of the environment, which a prompt can name too.
const FUNCTIONS: [&str; 3] = ["range", "dict", "namespace"];
/// Words that mean something else in a template, so that a role of this name could not be spoken of.
const WORDS: [&str; 22] = [
    "true",
    "false",
    "none",
    "and",
    "or",
    "not",
    "in",
    "is",
    "if",
    "else",
    "elif",
    "endif",
    "for",
    "endfor",
    "set",
    "loop",
    "self",
    "super",
    "caller",
    "recursive",
    "with",
    "as",
];
/// Filters and tests that people mistype.
const COMMON: [&str; 20] = [
    "default", "first", "indent", "join", "last", "length", "lines", "lower", "map", "replace",
    "reverse", "select", "sort", "split", "title", "tojson", "trim", "upper", "defined", "none",
];
/// How deep macros and loops may call each other while rendering; enough for people, and safe on a stack of 2 MiB.
const RECURSION: usize = 32;

/// Most unknown names of one prompt that are told; each costs a search.
const FAULTS: usize = 20;

/// What is wrong with a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TemplateFault {
    /// The bytes of the template that it is about.
    pub part: Range<usize>,
    pub message: String,
    pub help: String,
}

/// Whether templates use this word for something else than a role.
pub(super) fn is_word(name: &str) -> bool {
    WORDS.contains(&name) || FUNCTIONS.contains(&name)
}

/// How prompts are read and rendered: undefined names are false in a condition and an error in output, nothing is
/// escaped, the final line break stays, and there is fuel for [`limits::TEMPLATE_FUEL`] instructions.
#[must_use]
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(limits::TEMPLATE_FUEL));
    environment.set_recursion_limit(RECURSION);
    environment.add_test("divisibleby", is_divisible);
    if let Ok(syntax) = SyntaxConfig::builder().keep_trailing_newline(true).build() {
        environment.set_syntax(syntax);
    }
    let functions: Vec<String> = environment
        .globals()
        .map(|(name, _)| name.to_owned())
        .collect();
    for name in functions
        .iter()
        .filter(|name| !FUNCTIONS.contains(&name.as_str()))
    {
        environment.remove_global(name);
    }
    environment
}

/// `divisibleby`, which panics in minijinja (3.0.5) when it is to divide by 0.
fn is_divisible(value: &Value, by: &Value) -> Result<bool, Error> {
    let whole = |value: &Value| i128::try_from(value.clone()).ok();
    let remainder = match (whole(value), whole(by)) {
        (Some(value), Some(by)) => value.checked_rem(by).map(|rest| rest == 0),
        _ => None,
    };
    remainder.ok_or_else(|| {
        let why = "divisibleby takes two whole numbers, the second not 0";
        Error::new(ErrorKind::InvalidOperation, why)
    })
}

/// What is wrong with a prompt of a workflow with these roles.
pub(super) fn check(prompt: &str, roles: &[&str]) -> Vec<TemplateFault> {
    let tags = match template_shape::tags(prompt) {
        Ok(tags) => tags,
        Err(shape) => return vec![shape_fault(prompt, &shape)],
    };
    let environment = environment();
    let template = match environment.template_from_str(prompt) {
        Ok(template) => template,
        Err(error) => {
            let message = error
                .detail()
                .map_or_else(|| error.kind().to_string(), str::to_owned);
            return vec![TemplateFault {
                part: template_shape::line_of(prompt, error.line().unwrap_or(1)),
                message: escaped(&message),
                help: syntax_help(&message),
            }];
        }
    };
    let known = || RoleName::RESERVED.into_iter().chain(roles.iter().copied());
    let mut unknown: Vec<String> = template.undeclared_variables(false).into_iter().collect();
    unknown
        .retain(|name| !FUNCTIONS.contains(&name.as_str()) && !known().any(|known| known == name));
    unknown.sort();
    unknown.truncate(FAULTS);
    let fault = |name: &String| TemplateFault {
        part: part_of(prompt, &tags, name),
        message: format!("unknown name {}", quoted(name)),
        help: match nearest(name, known()) {
            Some(meant) => format!("did you mean {meant}?"),
            None => format!("a prompt knows {}", listed(known())),
        },
    };
    let mut faults: Vec<TemplateFault> = unknown.iter().map(fault).collect();
    let words = tags
        .iter()
        .flat_map(|tag| template_shape::words(prompt, tag.clone()));
    faults.extend(
        words
            .filter_map(|word| unknown_word(&environment, &word))
            .take(FAULTS),
    );
    faults
}

/// What to do about what minijinja says of a template's syntax.
fn syntax_help(message: &str) -> String {
    const STATEMENTS: [&str; 10] = [
        "if", "elif", "else", "endif", "for", "endfor", "set", "endset", "raw", "endraw",
    ];
    let word = message.strip_prefix("unknown statement ");
    if let Some(meant) = word.and_then(|word| nearest(word, STATEMENTS)) {
        return format!("did you mean {meant}?");
    }
    if message.contains("end of variable block") {
        "write }} at its end".to_owned()
    } else if message.contains("end of input") {
        "close the tag with %}, and the block with {% endif %}, {% endfor %} or what it is"
            .to_owned()
    } else {
        "see Templates in nerve-workflow(5); {% raw %} … {% endraw %} keeps braces as they are"
            .to_owned()
    }
}

/// minijinja looks filters and tests up when it renders; this asks for them before.
fn unknown_word(environment: &Environment<'_>, word: &Word<'_>) -> Option<TemplateFault> {
    let mut state = environment.empty_state();
    let (what, name, at, outcome) = match *word {
        Word::Filter(name, at) => ("filter", name, at, state.apply_filter(name, &[]).err()),
        Word::Test(name, at) => ("test", name, at, state.perform_test(name, &[]).err()),
    };
    let unknown = matches!(
        outcome?.kind(),
        ErrorKind::UnknownFilter | ErrorKind::UnknownTest
    );
    unknown.then(|| TemplateFault {
        part: at..at + name.len(),
        message: format!("unknown {what} {}", quoted(name)),
        help: match nearest(name, COMMON) {
            Some(meant) => format!("did you mean {meant}?"),
            None => format!("use one of minijinja's {what}s"),
        },
    })
}

fn shape_fault(prompt: &str, shape: &Shape) -> TemplateFault {
    let (line, message, help) = match shape {
        Shape::LongTag { line } => (
            *line,
            format!("a {{{{ … }}}} or {{% … %}} longer than {TAG_BYTES} bytes, or not closed"),
            "split it",
        ),
        Shape::LongLine { line } => (
            *line,
            format!("a line longer than {LINE_BYTES} bytes"),
            "break the line",
        ),
        Shape::ManyBlocks { line } => (
            *line,
            format!("more than {BLOCKS} blocks {{% … %}}"),
            "use fewer of them",
        ),
        Shape::Loads { line, keyword } => (
            *line,
            format!("{keyword} loads another template, and there is none"),
            "write its text here",
        ),
        Shape::Repeats { line } => (
            *line,
            "a `*` beside a text, a list or parentheses with one".to_owned(),
            "{% set x = … %} before it, and repeat x",
        ),
        Shape::Step { line } => (
            *line,
            "a slice with a step".to_owned(),
            "leave the step out; the filter reverse turns a list round",
        ),
        Shape::EmptyCycle { line } => (
            *line,
            "cycle with nothing to choose from".to_owned(),
            "write what it gives, such as loop.cycle(\"odd\", \"even\")",
        ),
    };
    TemplateFault {
        part: template_shape::line_of(prompt, line),
        message,
        help: help.to_owned(),
    }
}

/// Where a tag first has the name as a word, for a prompt in which it is known to be.
fn part_of(prompt: &str, tags: &[Range<usize>], name: &str) -> Range<usize> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let alone = |at: usize| {
        !prompt[..at].ends_with(|c| is_word(c) || c == '.')
            && !prompt[at + name.len()..].starts_with(is_word)
    };
    tags.iter()
        .filter_map(|tag| Some((tag.start, prompt.get(tag.clone())?)))
        .flat_map(|(start, tag)| tag.match_indices(name).map(move |(at, _)| start + at))
        .find(|at| alone(*at))
        .map_or(0..0, |at| at..at + name.len())
}

/// Renders a prompt.
///
/// # Errors
/// One line: what cannot be rendered and in which line of the prompt, or that the fuel or
/// [`limits::RENDERED_PROMPT_BYTES`] are used up.
pub fn render(prompt: &str, context: Value) -> Result<String, String> {
    if let Err(shape) = template_shape::tags(prompt) {
        let fault = shape_fault(prompt, &shape);
        let line = template_shape::line_at(prompt, fault.part.start);
        return Err(format!("line {line} of the prompt: {}", fault.message));
    }
    let environment = environment();
    let mut output = Bounded::default();
    let rendered = environment
        .template_from_str(prompt)
        .and_then(|template| template.render_captured_to(context, &mut output).map(drop));
    if output.overflowed {
        return Err(format!(
            "the rendered prompt is larger than {} bytes",
            limits::RENDERED_PROMPT_BYTES
        ));
    }
    rendered.map_err(|error| told(&error))?;
    String::from_utf8(output.bytes).map_err(|_| "the rendered prompt is not UTF-8".to_owned())
}

fn told(error: &Error) -> String {
    let line = error.line().unwrap_or(1);
    if error.kind() == ErrorKind::OutOfFuel {
        return format!(
            "line {line} of the prompt: more than {} instructions",
            limits::TEMPLATE_FUEL
        );
    }
    let detail = error
        .detail()
        .map(|detail| format!(": {}", escaped(detail)))
        .unwrap_or_default();
    format!("line {line} of the prompt: {}{detail}", error.kind())
}

/// A buffer that refuses to grow beyond [`limits::RENDERED_PROMPT_BYTES`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    overflowed: bool,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > limits::RENDERED_PROMPT_BYTES - self.bytes.len() {
            self.overflowed = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a prompt can name: `start` (round 0), `messages` (the whole thread), `last`, `round` (the number of the round
/// that is about to be executed), `run` (its id), and each role that has spoken as its latest message. A message has
/// `role`, `content`, `meta` and `timestamp`.
#[must_use]
pub fn context(thread: &[Message], round: u32, run: RunId) -> Value {
    let messages: Vec<Value> = thread
        .iter()
        .map(|message| Value::from_object(Spoken(message.clone())))
        .collect();
    let mut names = BTreeMap::new();
    for (message, value) in thread.iter().zip(&messages) {
        names.insert(message.role.clone(), value.clone());
    }
    let start = thread
        .iter()
        .position(|message| message.role == RoleName::START);
    let given = [
        (
            "start",
            start.and_then(|index| messages.get(index).cloned()),
        ),
        ("last", messages.last().cloned()),
        ("messages", Some(Value::from(messages))),
        ("round", Some(Value::from(round))),
        ("run", Some(Value::from(run.to_string()))),
    ];
    names.extend(
        given
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?))),
    );
    Value::from_object(Names(names))
}

struct Names(BTreeMap<String, Value>);

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Object for Names {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_str()?).cloned()
    }
}

/// A message as templates see it; `meta` is converted only when it is asked for.
#[derive(Debug)]
struct Spoken(Message);

impl Object for Spoken {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        match key.as_str()? {
            "role" => Some(Value::from(self.0.role.as_str())),
            "content" => Some(Value::from(self.0.content.as_str())),
            "meta" => Some(Value::from(Serde(&self.0.meta))),
            "timestamp" => Some(Value::from(self.0.timestamp)),
            _ => None,
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Str(&["role", "content", "meta", "timestamp"])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn message(role: &str, content: &str) -> Message {
        let serde_json::Value::Object(meta) = json!({"status": "ok", "exitCode": 0}) else {
            unreachable!()
        };
        Message {
            role: role.to_owned(),
            content: content.to_owned(),
            meta,
            timestamp: 7,
        }
    }

    fn thread() -> Value {
        let thread = [
            message("__start__", "do <it>"),
            message("coder", "one"),
            message("coder", "two"),
        ];
        context(&thread, 3, RunId::from_bits(0x3fa9_c1d2))
    }

    #[test]
    fn a_prompt_sees_the_thread() {
        for (prompt, expected) in [
            ("{{ start.content }}\n", "do <it>\n"),
            (
                "{{ coder.content }} {{ coder.meta.status }} {{ coder.meta.exitCode }}",
                "two ok 0",
            ),
            ("{{ last.role }} {{ last.timestamp }}", "coder 7"),
            (
                "{% for m in messages %}{{ m.role }},{% endfor %}{{ messages | length }}",
                "__start__,coder,coder,3",
            ),
            (
                "{{ round }} {{ run }}",
                "3 0000000000000000000000003fa9c1d2",
            ),
            (
                "{% if tester %}{{ tester.content }}{% else %}none{% endif %}",
                "none",
            ),
            ("{{ tester.content if tester is defined }}", ""),
            ("{{ messages | tojson | length > 50 }}", "True"),
            ("{{ round is divisibleby(3) }}", "True"),
            // It overflows, and must not panic.
            (
                "{{ range(9223372036854775807, 0, -9223372036854775807) | list }}",
                "[]",
            ),
            ("no template: 100% {x}", "no template: 100% {x}"),
        ] {
            assert_eq!(
                render(prompt, thread()).as_deref(),
                Ok(expected),
                "{prompt}"
            );
        }
    }

    #[test]
    fn what_cannot_be_rendered_is_told_in_one_line() {
        for (prompt, expected) in [
            ("a\n{{ tester }}", "line 2 of the prompt: undefined value"),
            (
                "{{ tester.content }}",
                "line 1 of the prompt: undefined value",
            ),
            (
                "{{ start.nothing }}",
                "line 1 of the prompt: undefined value",
            ),
            ("{{ 1 | nofilter }}", "line 1 of the prompt: unknown filter"),
            ("{{ debug() }}", "line 1 of the prompt: "),
            (
                "{% for a in range(9999) %}{% for a in range(9999) %}{% endfor %}{% endfor %}",
                "more than 100000 instructions",
            ),
            (
                "{% set x = 'x' %}{% for a in range(5000) %}{{ x * 1000 }}{% endfor %}",
                "larger than 4194304 bytes",
            ),
            (
                "{% set x = 'x' %}{{ x * 99999999999 }}",
                "line 1 of the prompt: ",
            ),
            ("{{ round is divisibleby(0) }}", "the second not 0"),
            (
                "{{ range(9223372036854775807, -2, -1) }}",
                "too many elements",
            ),
            ("{{ messages[:1:-1] }}", "a slice with a step"),
            (
                "{% for m in messages %}{{ loop.cycle() }}{% endfor %}",
                "cycle with nothing",
            ),
            ("{{", "line 1 of the prompt: syntax error"),
            (
                "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
                "line 1 of the prompt: ",
            ),
        ] {
            let error = render(prompt, thread()).unwrap_err();
            assert!(
                error.contains(expected) && !error.contains(char::is_control),
                "{prompt}: {error}"
            );
        }
        let most = "x".repeat(limits::RENDERED_PROMPT_BYTES);
        assert_eq!(
            render(&most, Value::UNDEFINED).map(|text| text.len()),
            Ok(most.len())
        );
    }

    #[test]
    fn unknown_names_are_found_when_a_file_is_read() {
        let roles = ["coder", "tester"];
        for good in [
            "{{ start }} {{ last }} {{ messages }} {{ round }} {{ run }} {{ coder }} {{ tester }}",
            "{% for m in messages %}{{ loop.index }}{{ m }}{% endfor %}{% set x = 1 %}{{ x }}",
            "{% for i in range(3) %}{% endfor %}{% set n = namespace(a=1) %}{{ dict(a=1) }}",
            "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1) }}",
            "{% raw %}{{ nothing }}{% endraw %}",
        ] {
            assert_eq!(check(good, &roles), [], "{good}");
        }
        let found = check("a\nb {{ codr }} {{ debug() }}", &roles);
        assert_eq!(found[0].message, "unknown name \"codr\"");
        assert_eq!(
            (found[0].part.clone(), found[0].help.as_str()),
            (7..11, "did you mean coder?")
        );
        assert_eq!(found[1].message, "unknown name \"debug\"");
        let found = check(
            "a\n{{ start.content | trimm }}{% if last is nonne %}{% endif %}",
            &roles,
        );
        assert_eq!(
            (found[0].part.clone(), found[0].message.as_str()),
            (21..26, "unknown filter \"trimm\"")
        );
        assert_eq!(
            (found[1].part.clone(), found[1].message.as_str()),
            (43..48, "unknown test \"nonne\"")
        );
        assert_eq!(
            check(
                "{{ start.content | trim | upper }}{{ 1 is odd }}{{ last is not defined }}{{ 1 is in [1] }}",
                &roles
            ),
            []
        );
    }

    /// Debug frames are the largest, and tokio's threads have 2 MiB: an overflow aborts the whole test.
    #[test]
    fn deep_templates_are_refused_or_fit_a_small_stack() {
        let chains = [
            "1+",
            "1~",
            "-",
            "not ",
            "(",
            "[",
            "{1:",
            "a.",
            "a|b|",
            "a is b is ",
            "1 if 1 else ",
            "1 and ",
            "1<",
            "1**",
        ];
        let mut templates: Vec<String> = Vec::new();
        for chain in chains {
            for length in [100_000, TAG_BYTES - 8] {
                let expression = format!("{}1", chain.repeat(length / chain.len()));
                templates.push(format!("{{{{ {expression} }}}}"));
                templates.push(format!("{{% if {expression} %}}{{% endif %}}"));
                let nested = "{% if 1 %}".repeat(120);
                templates.push(format!(
                    "{nested}{{{{ {expression} }}}}{}",
                    "{% endif %}".repeat(120)
                ));
                let elif = "{% elif 1 %}".repeat(250);
                templates.push(format!(
                    "{{% if 0 %}}{elif}{{{{ {expression} }}}}{{% endif %}}"
                ));
            }
        }
        for blocks in [100, 140, BLOCKS, 50_000] {
            templates.push("{% if 1 %}".repeat(blocks));
            templates.push(format!(
                "{}{}",
                "{% if 1 %}".repeat(blocks),
                "{% endif %}".repeat(blocks)
            ));
            templates.push(format!(
                "{{% if 1 %}}{}{{% endif %}}",
                "{% elif 1 %}".repeat(blocks)
            ));
            templates.push(format!(
                "{}{}",
                "{% for a in [1] %}".repeat(blocks),
                "{% endfor %}".repeat(blocks)
            ));
        }
        templates.push("{% macro m(a) %}{{ m([a]) }}{% endmacro %}{{ m(1) }}".to_owned());
        templates.push("{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned());
        let run = move || {
            for template in &templates {
                let _ = (check(template, &[]), render(template, thread()));
            }
        };
        std::thread::Builder::new()
            .stack_size(2 * 1024 * 1024)
            .spawn(run)
            .unwrap()
            .join()
            .unwrap();
    }

    proptest! {
        #[test]
        fn arbitrary_templates_never_panic(
            text: String,
            pieces in proptest::collection::vec("\\{\\{|\\}\\}|\\{%|%\\}|if |endif|for a in messages|endfor|'|\"|raw|\\(|\\)|-|\\||\\[|\\]|:|-1|\\*|,|start|[a-z1 .\\\\é]{0,3}", 0..30),
        ) {
            for template in [text, pieces.concat()] {
                let _ = check(&template, &["coder"]);
                if let Err(error) = render(&template, thread()) {
                    prop_assert!(!error.contains(char::is_control));
                }
            }
        }
    }
}
