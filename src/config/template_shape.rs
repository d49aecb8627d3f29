//! How long a template's tags are and how many there are, before minijinja parses it: its parser recurses over chains
//! (`1+1+…`, `{% elif %}…`) without a limit of its own and would overflow the stack. Called by `template` only.
//!
//! The scan follows minijinja's lexer (strings, brackets, comments, raw blocks) with its default delimiters: a tag must
//! never end earlier here than there, or a long one would pass.

use std::ops::Range;

/// Longest `{{ … }}` or `{% … %}`, in bytes.
pub(super) const TAG_BYTES: usize = 1_024;
/// Most `{% … %}` in one template.
pub(super) const BLOCKS: usize = 256;

/// Longest line of a template that has tags. minijinja counts columns in 16 bits, and a syntax error in column 65,535
/// makes it panic (3.0.5).
pub(super) const LINE_BYTES: usize = 32_768;

/// What is wrong with the shape of a template.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A tag that begins in this line is too long.
    LongTag { line: usize },
    /// This line is too long.
    LongLine { line: usize },
    /// There are too many blocks; this line has the first that is too many.
    ManyBlocks { line: usize },
    /// A block that loads other templates, of which there are none.
    Loads { line: usize, keyword: &'static str },
    /// A tag that begins in this line may repeat a text or a list that stands in it. minijinja does so when it compiles,
    /// with no bound on all of them together.
    Repeats { line: usize },
    /// A tag that begins in this line has a slice with a step, which makes minijinja panic when it goes backwards through
    /// what is empty (3.0.5).
    Step { line: usize },
    /// A tag that begins in this line calls `cycle` with nothing, which makes minijinja panic (3.0.5).
    EmptyCycle { line: usize },
}

/// The tags of a template, as ranges of its bytes; or the first thing that is wrong with its shape.
pub(super) fn tags(source: &str) -> Result<Vec<Range<usize>>, Shape> {
    let bytes = source.as_bytes();
    let mut tags = Vec::new();
    let mut blocks = 0;
    let mut at = 0;
    while let Some(start) = find(bytes, at, b"{") {
        let long = || Shape::LongTag {
            line: line_at(source, start),
        };
        at = match bytes.get(start + 1) {
            Some(b'#') => match find(bytes, start + 2, b"#}") {
                Some(end) => end + 2,
                None => bytes.len(),
            },
            Some(b'{') => tag_end(bytes, start, b"}}").ok_or_else(long)?,
            Some(b'%') => {
                blocks += 1;
                if blocks > BLOCKS {
                    return Err(Shape::ManyBlocks {
                        line: line_at(source, start),
                    });
                }
                if let Some(body) = plain_block(bytes, start, b"raw") {
                    at = raw_end(bytes, body);
                    continue;
                }
                if let Some(keyword) = loading(&source[start + 2..]) {
                    return Err(Shape::Loads {
                        line: line_at(source, start),
                        keyword,
                    });
                }
                tag_end(bytes, start, b"%}").ok_or_else(long)?
            }
            _ => {
                at = start + 1;
                continue;
            }
        };
        if bytes[start + 1] != b'#' {
            let tag = bytes.get(start + 2..at).unwrap_or_default();
            if let Some(shape) = dangerous(tag) {
                return Err(shape(line_at(source, start)));
            }
            tags.push(start..at);
        }
    }
    long_line(source).map_or(Ok(tags), Err)
}

/// A line that is too long, in a template that has anything for minijinja to read.
fn long_line(source: &str) -> Option<Shape> {
    if !["{{", "{%", "{#"]
        .iter()
        .any(|start| source.contains(start))
    {
        return None;
    }
    let index = source
        .split('\n')
        .position(|line| line.len() > LINE_BYTES)?;
    Some(Shape::LongLine { line: index + 1 })
}

/// The line of a template that a byte is in, from 1.
pub(super) fn line_at(source: &str, at: usize) -> usize {
    source.as_bytes()[..at].split(|byte| *byte == b'\n').count()
}

/// The bytes of a line, which is from 1, without the blanks around it.
pub(super) fn line_of(source: &str, line: usize) -> Range<usize> {
    let mut lines = source.split_inclusive('\n');
    let start: usize = lines
        .by_ref()
        .take(line.saturating_sub(1))
        .map(str::len)
        .sum();
    let line = lines.next().unwrap_or_default();
    let blanks = line.len() - line.trim_start().len();
    start + blanks..start + blanks.max(line.trim_end().len())
}

/// Something that only the environment can know, with where it is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Word<'s> {
    /// After `|`.
    Filter(&'s str, usize),
    /// After `is` or `is not`.
    Test(&'s str, usize),
}

/// The filters and tests that a tag names.
pub(super) fn words<'s>(source: &'s str, tag: Range<usize>) -> Vec<Word<'s>> {
    let bytes = source.as_bytes();
    let mut found = Vec::new();
    // What the next word is, after `|` or `is`.
    let mut next: Option<fn(&'s str, usize) -> Word<'s>> = None;
    let mut at = tag.start + 2;
    while at < tag.end {
        let byte = bytes[at];
        if byte == b'"' || byte == b'\'' {
            at = string_end(bytes, at);
            next = None;
        } else if byte.is_ascii_alphabetic() || byte == b'_' {
            let length = bytes[at..]
                .iter()
                .take_while(|b| b.is_ascii_alphanumeric() || **b == b'_')
                .count();
            let word = &source[at..at + length];
            match (word, next) {
                ("not", Some(_)) => {}
                (_, Some(kind)) => {
                    found.push(kind(word, at));
                    next = None;
                }
                ("is", None) => next = Some(Word::Test),
                _ => {}
            }
            at += length;
        } else {
            if byte == b'|' {
                next = Some(Word::Filter);
            } else if !byte.is_ascii_whitespace() {
                next = None;
            }
            at += 1;
        }
    }
    found
}

/// Where a string that begins at `at` ends, its second quotation mark included.
fn string_end(bytes: &[u8], at: usize) -> usize {
    let quote = bytes[at];
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != quote {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    end + 1
}

/// Where the tag that begins at `start` ends; `None` when it is too long.
fn tag_end(bytes: &[u8], start: usize, end: &[u8]) -> Option<usize> {
    let mut balance: isize = 0;
    let mut at = start + 2;
    while at < bytes.len() {
        if at - start > TAG_BYTES {
            return None;
        }
        match bytes[at] {
            b'"' | b'\'' => {
                at = string_end(bytes, at);
                continue;
            }
            _ if balance == 0 && bytes[at..].starts_with(end) => {
                return (at - start <= TAG_BYTES).then_some(at + end.len());
            }
            b'(' | b'[' | b'{' => balance += 1,
            b')' | b']' | b'}' => balance -= 1,
            _ => {}
        }
        at += 1;
    }
    (at - start <= TAG_BYTES).then_some(bytes.len())
}

/// A pair of brackets that is open.
#[derive(Default)]
struct Bracket {
    kind: u8,
    /// It follows a `*`.
    is_factor: bool,
    /// It has a text, a list or a comma in it.
    has_literal: bool,
    colons: usize,
}

/// What would harm whoever compiles or renders this tag; all of it is seen in what is beside what.
///
/// A side of a `*` may be a text or a list that stands here when a quotation mark or a bracket is beside it, or
/// parentheses that have one of these or a comma in them.
fn dangerous(tag: &[u8]) -> Option<fn(usize) -> Shape> {
    const REPEATS: fn(usize) -> Shape = |line| Shape::Repeats { line };
    let mut open = vec![Bracket::default()];
    let (mut is_factor, mut is_literal) = (false, false);
    let mut word: &[u8] = b"";
    let mut at = 0;
    while let Some(&byte) = tag.get(at) {
        let here = open.last_mut()?;
        let was_factor = std::mem::take(&mut is_factor);
        let was_literal = std::mem::take(&mut is_literal);
        let was = std::mem::take(&mut word);
        let mut end = at + 1;
        match byte {
            _ if byte.is_ascii_whitespace() => {
                (is_factor, is_literal, word) = (was_factor, was_literal, was);
            }
            b'*' if was == b"cycle(" => return Some(|line| Shape::EmptyCycle { line }),
            b'*' if tag.get(end) == Some(&b'*') => end += 1,
            b'*' if was_literal => return Some(REPEATS),
            b'*' => is_factor = true,
            b'"' | b'\'' | b'[' if was_factor => return Some(REPEATS),
            b'"' | b'\'' => {
                end = string_end(tag, at);
                here.has_literal = true;
                is_literal = true;
            }
            b'(' | b'[' | b'{' => {
                here.has_literal |= byte == b'[';
                open.push(Bracket {
                    kind: byte,
                    is_factor: was_factor,
                    ..Bracket::default()
                });
                word = if was == b"cycle" { b"cycle(" } else { b"" };
            }
            b')' if was == b"cycle(" => return Some(|line| Shape::EmptyCycle { line }),
            b')' | b']' | b'}' => {
                let inner = open.pop()?;
                is_literal = byte == b']' || inner.has_literal;
                if inner.is_factor && is_literal {
                    return Some(REPEATS);
                }
                match open.last_mut() {
                    Some(outer) => outer.has_literal |= inner.has_literal,
                    None => open.push(Bracket::default()),
                }
            }
            b',' => here.has_literal = true,
            b':' => {
                here.colons += 1;
                if here.kind == b'[' && here.colons > 1 {
                    return Some(|line| Shape::Step { line });
                }
            }
            _ if is_word(byte) => {
                end = at + tag[at..].iter().take_while(|byte| is_word(**byte)).count();
                word = &tag[at..end];
            }
            _ => {}
        }
        at = end;
    }
    None
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// Where the content begins after `{% NAME %}` at `start`, if that is what is there.
fn plain_block(bytes: &[u8], start: usize, name: &[u8]) -> Option<usize> {
    let sign = |at: usize| at + usize::from(matches!(bytes.get(at), Some(b'-' | b'+')));
    let blanks = |at: usize| {
        at + bytes[at.min(bytes.len())..]
            .iter()
            .take_while(|b| b.is_ascii_whitespace())
            .count()
    };
    let at = blanks(sign(start + 2));
    let at = sign(blanks(
        bytes
            .get(at..)?
            .starts_with(name)
            .then_some(at + name.len())?,
    ));
    bytes.get(at..)?.starts_with(b"%}").then_some(at + 2)
}

/// Where a raw block ends whose content begins at `at`.
fn raw_end(bytes: &[u8], mut at: usize) -> usize {
    while let Some(start) = find(bytes, at, b"{%") {
        if let Some(end) = plain_block(bytes, start, b"endraw") {
            return end;
        }
        at = start + 2;
    }
    bytes.len()
}

/// The keyword of a block that loads a template.
fn loading(block: &str) -> Option<&'static str> {
    let block = block.strip_prefix(['-', '+']).unwrap_or(block).trim_start();
    let end = block
        .find(|c: char| !c.is_ascii_alphabetic())
        .unwrap_or(block.len());
    ["include", "import", "from", "extends"]
        .into_iter()
        .find(|keyword| *keyword == &block[..end])
}

fn find(bytes: &[u8], from: usize, pattern: &[u8]) -> Option<usize> {
    let rest = bytes.get(from..)?;
    rest.windows(pattern.len())
        .position(|window| window == pattern)
        .map(|at| from + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_templates_pass() {
        for good in [
            "",
            "plain { text } with 100% {braces",
            "{{ start.content }} {% if tester %}{{ tester.content }}{% endif %}",
            "{# long ".repeat(10).as_str(),
            &format!("{{# {} #}}", "1+".repeat(5_000)),
            &format!("{{% raw %}}{{{{ {} {{%- endraw +%}}", "1+".repeat(5_000)),
            &"{{ start.content }}\n".repeat(5_000),
            &"x".repeat(LINE_BYTES * 4),
        ] {
            assert_eq!(tags(good).map(drop), Ok(()), "{good:.100}");
        }
    }

    #[test]
    fn a_long_tag_is_found_wherever_it_hides() {
        let long = "1+".repeat(5_000);
        for (line, bad) in [
            (1, format!("{{{{ {long}1 }}}}")),
            (2, format!("\n{{% if {long}1 %}}{{% endif %}}")),
            (1, format!("{{{{ '}}}}' ~ {long}1 }}}}")),
            (1, format!("{{{{ '\\'}}}}' ~ {long}1 }}}}")),
            (1, format!("{{{{ {{'a': {{'b': 1}}}} ~ {long}1 }}}}")),
            (
                1,
                format!("{{% raw %}}{{{{ \" {{% endraw %}}{{{{ \"}}}}\" ~ {long}1 }}}}"),
            ),
            (1, format!("{{% set x %}}{{{{ {long}")),
        ] {
            assert_eq!(tags(&bad), Err(Shape::LongTag { line }), "{bad:.60}");
        }
    }

    /// minijinja 3.0.5 adds 1 to a column of 65,535.
    #[test]
    fn a_line_that_overflows_a_column_is_found() {
        for (line, bad) in [
            (1, format!("{}{{{{ $ }}}}", "x".repeat(70_000))),
            (2, format!("{{# \n{}", "x".repeat(70_000))),
            (2, format!("{{{{ a }}}}\n{}{{", "é{{ a }}".repeat(10_000))),
        ] {
            assert_eq!(tags(&bad), Err(Shape::LongLine { line }), "{bad:.60}");
        }
    }

    #[test]
    fn many_blocks_and_loading_blocks_are_found() {
        let chain = format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}\n".repeat(500));
        assert_eq!(tags(&chain), Err(Shape::ManyBlocks { line: 256 }));
        assert_eq!(
            tags("a\n{%- include 'x' %}"),
            Err(Shape::Loads {
                line: 2,
                keyword: "include"
            })
        );
        assert_eq!(tags("{% includes %}").map(drop), Ok(()));
    }

    #[test]
    fn what_would_repeat_what_stands_here_is_found() {
        for bad in [
            "'x' * 9",
            "9*\"x\"",
            "[1] * 9",
            "9 * [1]",
            "('x') * 9",
            "9 * (('x'))",
            "( ( 'x' ) ~ 'y' ) * 9",
            "(1,) * 9",
            "9 * (1,)",
            "a ~ 'x'*9",
            "n * ([1])",
            "{'a': 'x'*9}",
            "f('x' * 9)",
        ] {
            let bad = format!("\n{{{{ {bad} }}}}");
            assert_eq!(tags(&bad), Err(Shape::Repeats { line: 2 }), "{bad}");
        }
        for good in [
            "a * 9",
            "'*' ~ a",
            "(a + 1) * (b - 2) * 3",
            "2 ** 3",
            "a.meta.b * f(x) ~ 'x'",
            "x('a', 2) ~ 3",
        ] {
            let good = format!("{{{{ {good} }}}}");
            assert_eq!(tags(&good).map(drop), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_makes_minijinja_panic_is_found() {
        for bad in ["a[::-1]", "a[1 : 2 : b]", "a[(1):(2):3]", "a[{1: 2}::]"] {
            let bad = format!("{{{{ {bad} }}}}");
            assert_eq!(tags(&bad), Err(Shape::Step { line: 1 }), "{bad}");
        }
        for bad in ["loop.cycle()", "l.cycle ( )", "loop.cycle(*a)"] {
            let bad = format!("{{{{ {bad} }}}}");
            assert_eq!(tags(&bad), Err(Shape::EmptyCycle { line: 1 }), "{bad}");
        }
        for good in ["a[1:2]", "{1: 2, 3: [4:5]}", "loop.cycle('a')", "cycle"] {
            let good = format!("{{{{ {good} }}}}");
            assert_eq!(tags(&good).map(drop), Ok(()), "{good}");
        }
    }

    #[test]
    fn filters_and_tests_are_found_outside_strings() {
        let source = "é{{ a|upper | default('|x is y') }}";
        let tag = tags(source).unwrap().remove(0);
        assert_eq!(
            words(source, tag),
            [Word::Filter("upper", 7), Word::Filter("default", 15)]
        );
        let source = "{% if a is not none and b is divisibleby(2) %}";
        assert_eq!(
            words(source, 0..source.len()),
            [Word::Test("none", 15), Word::Test("divisibleby", 29)]
        );
        let source = "{{ 'a";
        assert_eq!(words(source, 0..source.len()), []);
    }
}
