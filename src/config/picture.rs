//! A diagnostic as people read it: the line of the file with the place marked, and what to do. Called by
//! `nervectl validate`; what nerved keeps and says has one line each, which is [`Diagnostic`]'s own form.

use annotate_snippets::{AnnotationKind, Level, Origin, Renderer, Snippet};

use super::diagnostic::{Diagnostic, Severity, escaped, is_unsafe};
use super::work::is_name;

/// Longest line that is shown, in bytes.
const LINE_BYTES: usize = 16_384;

/// Whether there are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// For a terminal.
    Coloured,
    /// For everything else.
    Plain,
}

/// Draws it, for so many columns. `line` is the line of the file that it is about; where there is none it is empty. No
/// control character of the input gets through.
#[must_use]
pub fn draw(diagnostic: &Diagnostic, line: &[u8], columns: usize, paint: Paint) -> String {
    let level = match diagnostic.severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    let title = level.primary_title(escaped(&diagnostic.message));
    let path = escaped(&diagnostic.path);
    // One character for one, so that columns stay what they are.
    let harmless = |c: char| {
        if is_unsafe(c) && c != '\t' {
            '\u{fffd}'
        } else {
            c
        }
    };
    let text = String::from_utf8_lossy(line);
    let text: String = text.trim_end().chars().map(harmless).collect();
    let mut group = if text.is_empty() || text.len() > LINE_BYTES || may_tell_a_key(&text) {
        let origin = Origin::path(path).line(diagnostic.line);
        title.element(origin.char_column(diagnostic.column))
    } else {
        let byte = |column: usize| {
            let mut starts = text.char_indices().map(|(at, _)| at);
            starts.nth(column - 1).unwrap_or(text.len())
        };
        let span = byte(diagnostic.column)..byte(diagnostic.end_column);
        let snippet = Snippet::source(text.clone()).path(path);
        let mark = AnnotationKind::Primary.span(span);
        title.element(snippet.line_start(diagnostic.line).annotation(mark))
    };
    if let Some(help) = &diagnostic.help {
        group = group.element(Level::HELP.message(escaped(help)));
    }
    let renderer = match paint {
        Paint::Coloured => Renderer::styled(),
        Paint::Plain => Renderer::plain(),
    };
    renderer.term_width(columns).render(&[group])
}

/// Whether a line seems to have a key or a password in it, which does not belong into the log of whoever validates.
fn may_tell_a_key(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    let after = ["api_key", "api-key", "apikey"]
        .iter()
        .find_map(|name| line.split_once(name));
    let value = after.map(|(_, after)| after.trim_start_matches(['\'', '"', ':', ' ']));
    // A user and a password, or a query.
    let has_more = |rest: &str| {
        let url = rest.split(' ').next().unwrap_or_default();
        url.contains(['@', '?', '#'])
    };
    let name = line.split_once("credential").and_then(|(_, after)| {
        let after = after.trim_start_matches(['\'', '"', ':', ' ']);
        after.split(['\'', '"', ',', '}', ' ']).next()
    });
    value.is_some_and(|value| !value.is_empty() && !value.starts_with('{'))
        || line.split("://").skip(1).any(has_more)
        || name.is_some_and(|name| !name.is_empty() && !is_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(line: &str, place: [usize; 3], paint: Paint) -> String {
        let diagnostic = Diagnostic {
            severity: Severity::Error,
            path: "a\u{9b}.yaml".to_owned(),
            line: place[0],
            column: place[1],
            end_column: place[2],
            message: "wrong\u{1b}[2J".to_owned(),
            count: 1,
            help: Some("do\u{202e} this".to_owned()),
        };
        draw(&diagnostic, line.as_bytes(), 80, paint)
    }

    #[test]
    fn the_place_is_marked_below_its_line() {
        let expected = r"error: wrong\u{1b}[2J
 --> a\u{9b}.yaml:2:4
  |
2 | b: näme # x
  |    ^^^^
  |
  = help: do\u{202e} this";
        assert_eq!(drawn("b: näme # x", [2, 4, 8], Paint::Plain), expected);
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped_in_the_source_too() {
        for paint in [Paint::Plain, Paint::Coloured] {
            let shown = drawn(
                "x\u{9b}31m\u{1b}]0;\u{7}\u{202e}\u{61c}y\r",
                [1, 2, 3],
                paint,
            );
            let harmless = shown.replace("\u{1b}[", "<").replace('m', ">");
            let wild =
                |c: char| (c.is_control() && c != '\n') || matches!(c, '\u{61c}' | '\u{202e}');
            assert!(!harmless.contains(wild), "{shown:?}");
            assert_eq!(paint == Paint::Coloured, shown.contains("\u{1b}["));
        }
    }

    #[test]
    fn a_long_line_is_cut_around_its_place() {
        let line = format!("{}HERE{}", "a".repeat(8_000), "b".repeat(8_000));
        for (place, expected) in [([1, 8_001, 8_005], "aHEREb"), ([1, 1, 16_005], "aaaa")] {
            let shown = drawn(&line, place, Paint::Plain);
            assert!(
                shown.contains(expected) && shown.contains("^^^^"),
                "{shown}"
            );
            assert!(
                shown.lines().all(|line| line.chars().count() <= 90),
                "{shown}"
            );
        }
        let longer = drawn(&line.repeat(20), [1, 8_001, 8_005], Paint::Plain);
        assert!(longer.contains(":1:8001") && longer.len() < 200, "{longer}");
    }

    #[test]
    fn a_line_with_a_key_is_not_shown() {
        for line in [
            "apiKey: sk-1",
            "{ \"api_key\": sk-1 }",
            "base_url: https://a:sk-1@b",
            "api-key:sk-1",
            "base_url: https://a/v1?key=sk-1",
            "TOKEN: { credential: sk-1+2/3= }",
            "\"TOKEN\": {\"credential\": \"sk-1+2/3=\"}",
            &format!("  credential: '{}'", "sk-1".repeat(20)),
        ] {
            assert!(
                !drawn(line, [1, 1, 2], Paint::Plain).contains("sk-1"),
                "{line}"
            );
        }
        for line in [
            "api_key: { credential: key }",
            "env: {A: {credential: 'a'}, B: c}",
            "url: https://example.org # ?",
            "api_key:",
        ] {
            assert!(drawn(line, [1, 1, 2], Paint::Plain).contains(line));
        }
    }

    #[test]
    fn a_place_that_is_not_there_is_told_all_the_same() {
        for place in [[9, 1, 2], [1, 2, 3], [1, 1, 900]] {
            let shown = drawn("é", place, Paint::Plain);
            assert!(
                shown.contains(&format!(":{}:{}", place[0], place[1])),
                "{shown}"
            );
        }
        assert!(!drawn("", [1, 1, 2], Paint::Plain).contains('|'));
    }
}
