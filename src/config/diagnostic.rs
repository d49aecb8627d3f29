//! What is wrong with a text, where, and what to do about it: one line each. Made by the modules of `config`, shown by
//! nervectl, the journal and the bus. No control character of the input gets through.

use std::fmt;

use crate::model::text::escape;
pub(super) use crate::model::text::is_unsafe;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The text cannot be used.
    Error,
    /// The text can be used, and probably does not do what is meant.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One thing that is wrong. Shown as `PATH:LINE:COLUMN: error: MESSAGE (HELP)`, without a line break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file.
    pub path: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// The column after the last character it is about, in this line.
    pub end_column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
    /// How many faults it stands for: one, but for what is too many to be told one by one.
    pub count: usize,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = (escaped(&self.path), self.line, self.column, self.severity);
        write!(f, "{}:{}:{}: {}: ", head.0, head.1, head.2, head.3)?;
        f.write_str(&escaped(&self.message))?;
        match &self.help {
            Some(help) => write!(f, " ({})", escaped(help)),
            None => Ok(()),
        }
    }
}

/// The text with its control characters, line breaks and direction marks written as escapes.
pub(super) fn escaped(text: &str) -> String {
    escape(text, is_unsafe).into_owned()
}

/// A piece of the input for a message: quoted, escaped, at most 80 characters.
pub(super) fn quoted(text: &str) -> String {
    let mut shown = format!("{:?}", text.chars().take(80).collect::<String>());
    if text.chars().nth(80).is_some() {
        shown.push('…');
    }
    shown
}

/// What the writer of `word` may have meant: the candidate that is at most two keystrokes away.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let word: Vec<char> = word.chars().take(65).collect();
    let allowed = match word.len() {
        0..=1 => 0,
        2..=4 => 1,
        _ => 2,
    };
    candidates
        .into_iter()
        .map(|candidate| (distance(&word, candidate), candidate))
        .filter(|(distance, _)| word.len() <= 64 && *distance <= allowed)
        .min()
        .map(|(_, candidate)| candidate)
}

/// How many characters to insert, remove, replace, or swap with the next; a difference in case alone counts as one.
fn distance(from: &[char], to: &str) -> usize {
    if from.iter().collect::<String>().eq_ignore_ascii_case(to) {
        return 1;
    }
    let to: Vec<char> = to.chars().collect();
    let mut rows: Vec<Vec<usize>> = vec![(0..=from.len()).collect()];
    for (i, b) in to.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, a) in from.iter().enumerate() {
            let replaced = rows[i][j] + usize::from(a != b);
            let least = replaced.min(rows[i][j + 1] + 1).min(row[j] + 1);
            let is_swap = i > 0 && j > 0 && *a == to[i - 1] && from[j - 1] == *b;
            row.push(if is_swap {
                least.min(rows[i - 1][j - 1] + 1)
            } else {
                least
            });
        }
        rows.push(row);
    }
    rows[to.len()][from.len()]
}

/// The allowed words for a message: `a, b, c`.
pub(super) fn listed<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diagnostic_is_one_line_whatever_it_quotes() {
        let diagnostic = Diagnostic {
            severity: Severity::Error,
            path: "a\nb.yaml".to_owned(),
            line: 3,
            column: 7,
            end_column: 8,
            message: "bad \u{1b}[31m\u{202e}word\r".to_owned(),
            count: 1,
            help: Some("do\nthis".to_owned()),
        };
        assert_eq!(
            diagnostic.to_string(),
            "a\\nb.yaml:3:7: error: bad \\u{1b}[31m\\u{202e}word\\r (do\\nthis)"
        );
    }

    #[test]
    fn quoted_input_is_short_and_escaped() {
        let shown = quoted(&format!("\n\u{1b}{}", "é".repeat(500)));
        assert!(
            shown.starts_with("\"\\n\\u{1b}é") && shown.chars().count() < 100,
            "{shown}"
        );
    }

    #[test]
    fn a_slip_of_the_keyboard_finds_its_word() {
        let words = ["timeout", "prompt", "exec", "cwd", "User"];
        for (typed, meant) in [
            ("timout", Some("timeout")),
            ("promt", Some("prompt")),
            ("exce", Some("exec")),
            ("exe", Some("exec")),
            ("user", Some("User")),
            ("TIMEOUT", Some("timeout")),
            ("banana", None),
            ("", None),
        ] {
            assert_eq!(nearest(typed, words), meant, "{typed}");
        }
        assert_eq!(nearest(&"timeout".repeat(1000), words), None);
    }
}
