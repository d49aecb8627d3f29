//! Text for people, purely: what strangers wrote made harmless, times, spans, columns.

use std::borrow::Cow;
use std::fmt::Write;

use unicode_width::UnicodeWidthStr as _;

use super::paper::Paper;
use crate::model::text::{escape, is_unsafe};

/// What roles, clients or the other end of the bus wrote, for a terminal: control characters other than line feed and
/// tab, and what would reorder the line (bidirectional overrides), are escaped.
#[must_use]
pub(super) fn block(text: &str) -> Cow<'_, str> {
    escape(text, |c| c != '\n' && c != '\t' && is_unsafe(c))
}

/// The same for what has to stay on one line.
#[must_use]
pub(super) fn line(text: &str) -> Cow<'_, str> {
    escape(text, is_unsafe)
}

/// Columns of a terminal that a text takes: none for a combining mark, two for most of CJK.
#[must_use]
pub(super) fn columns(text: &str) -> usize {
    text.width()
}

/// The text, or as much of it as fits, and `…`.
#[must_use]
pub(super) fn clip(text: &str, room: usize) -> Cow<'_, str> {
    if columns(text) <= room {
        return Cow::Borrowed(text);
    }
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    // Of all before it: what follows a character may make that wider.
    let fitting = ends.partition_point(|end| columns(&text[..*end]) < room);
    let end = fitting.checked_sub(1).map_or(0, |last| ends[last]);
    Cow::Owned(format!("{}…", &text[..end]))
}

/// A table: each column as wide as its widest cell, two spaces between, nothing after the last cell of a line. Columns
/// of `right` are aligned to the right; STATUS and WORKER have colours. What is too wide for the paper loses from its
/// widest columns.
#[must_use]
pub(super) fn table(header: &[&str], right: &[&str], rows: &[Vec<String>], paper: Paper) -> String {
    let mut widths: Vec<usize> = header.iter().map(|title| columns(title)).collect();
    for row in rows {
        for (column, cell) in widths.iter_mut().zip(row) {
            *column = (*column).max(columns(cell));
        }
    }
    // An id that is cut off is none.
    let ids = usize::from(header.first() == Some(&"RUN"));
    let taken: usize = widths.iter().take(ids).map(|width| width + 2).sum();
    let room = paper.room.map(|room| room.saturating_sub(taken));
    squeeze(&mut widths[ids..], room);
    let mut text = String::new();
    let titles: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    for (index, row) in std::iter::once(&titles).chain(rows).enumerate() {
        let mut line = String::new();
        for ((cell, width), title) in row.iter().zip(&widths).zip(header) {
            let cell = clip(cell, *width);
            let space = " ".repeat(width.saturating_sub(columns(&cell)));
            let cell = match *title {
                "STATUS" | "WORKER" if index > 0 => paper.tint(&cell),
                _ => cell.into_owned(),
            };
            let separator = if line.is_empty() { "" } else { "  " };
            // A write to a String cannot fail.
            let _ = if right.contains(title) {
                write!(line, "{separator}{space}{cell}")
            } else {
                write!(line, "{separator}{cell}{space}")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Makes columns fit, the widest of them narrower, but none so narrow that it says nothing.
fn squeeze(widths: &mut [usize], room: Option<usize>) {
    const NARROWEST: usize = 4;
    let Some(room) = room else {
        return;
    };
    let separators = 2 * widths.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + separators > room {
        match widths.iter_mut().max() {
            Some(widest) if *widest > NARROWEST => *widest -= 1,
            _ => return,
        }
    }
}

/// A cell of a column so wide.
#[must_use]
pub(super) fn pad(cell: &str, width: usize) -> String {
    format!("{cell}{}", " ".repeat(width.saturating_sub(columns(cell))))
}

/// A span of time in systemd's words, its two largest units: `2h 5min`, `31.2s`, `840ms`.
#[must_use]
pub(super) fn span(us: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")];
    let seconds = us / 1_000_000;
    if seconds == 0 {
        return match us {
            0 => "0s".to_owned(),
            1..1_000 => format!("{us}us"),
            _ => format!("{}ms", us / 1_000),
        };
    }
    if seconds < 60 {
        return match us % 1_000_000 / 100_000 {
            0 => format!("{seconds}s"),
            tenths => format!("{seconds}.{tenths}s"),
        };
    }
    let mut parts = Vec::new();
    let mut rest = seconds;
    for (size, unit) in UNITS {
        if rest >= size || !parts.is_empty() {
            parts.push((rest / size, unit));
            rest %= size;
        }
    }
    let shown: Vec<String> = parts
        .iter()
        .take(2)
        .filter(|(count, _)| *count > 0)
        .map(|(count, unit)| format!("{count}{unit}"))
        .collect();
    shown.join(" ")
}

/// How long ago: `5min ago`; what a clock that was set back puts into the future is `now`.
#[must_use]
pub(super) fn ago(then: u64, now: u64) -> String {
    match now.saturating_sub(then) {
        us if us < 1_000_000 => "now".to_owned(),
        // Tenths of a second are noise here.
        us => format!("{} ago", span(us - us % 1_000_000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ctl::paper::Ink;

    #[test]
    fn what_a_terminal_would_obey_is_escaped_and_the_rest_is_not() {
        assert_eq!(block("a\tb\nüber 日本\n"), "a\tb\nüber 日本\n");
        assert_eq!(
            block("\u{1b}[31mred\u{1b}[0m\r\u{7}\u{7f}\u{9b}"),
            r"\u{1b}[31mred\u{1b}[0m\r\u{7}\u{7f}\u{9b}"
        );
        assert_eq!(
            block("user\u{202e}txt.exe\u{2066}"),
            r"user\u{202e}txt.exe\u{2066}"
        );
        assert_eq!(line("a\nb\tc"), r"a\nb\tc");
    }

    #[test]
    fn columns_are_aligned_and_nothing_is_cut_off() {
        let rows = vec![
            vec!["x".to_owned(), "7".to_owned(), "long enough".to_owned()],
            vec!["yy".to_owned(), "1234".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&["A", "NUM", "B"], &["NUM"], &rows, Paper::PLAIN),
            "A    NUM  B\nx      7  long enough\nyy  1234\n"
        );
    }

    #[test]
    fn a_table_fits_the_terminal_and_counts_columns_not_characters() {
        let row = |name: &str, status: &str| vec![name.to_owned(), status.to_owned()];
        let rows = [
            row("日本語のワークフロー", "completed"),
            row("e\u{301}", "failed"),
        ];
        let paper = |room| Paper {
            room: Some(room),
            ink: Ink::Coloured,
        };
        assert_eq!(
            table(&["NAME", "STATUS"], &[], &rows, paper(23)),
            "NAME          STATUS\n\
             日本語のワ…   \u{1b}[32mcompleted\u{1b}[0m\n\
             e\u{301}             \u{1b}[31mfailed\u{1b}[0m\n"
        );
        let widest = |text: &str| text.lines().map(columns).max().unwrap();
        let plain = |room| Paper {
            room: Some(room),
            ..Paper::PLAIN
        };
        for room in 18..40 {
            assert!(widest(&table(&["NAME", "STATUS"], &[], &rows, plain(room))) <= room);
        }
        let hearts = [row(&"❤\u{fe0f}".repeat(20), "completed")];
        for room in 18..60 {
            assert!(widest(&table(&["NAME", "STATUS"], &[], &hearts, plain(room))) <= room);
        }
        assert_eq!(clip("日本", 3), "日…");
        assert_eq!(clip("", 0), "");
    }

    #[test]
    fn an_id_is_never_cut_off() {
        let row = ["3fa9c1d2", "fix-failing-test", "completed"].map(str::to_owned);
        let narrow = Paper {
            room: Some(20),
            ..Paper::PLAIN
        };
        let text = table(&["RUN", "WORKFLOW", "STATUS"], &[], &[row.to_vec()], narrow);
        assert!(text.contains("\n3fa9c1d2  fix…  com…\n"), "{text}");
    }

    #[test]
    fn spans_show_their_two_largest_units() {
        for (us, text) in [
            (0, "0s"),
            (7, "7us"),
            (840_000, "840ms"),
            (1_000_000, "1s"),
            (31_250_000, "31.2s"),
            (60_000_000, "1min"),
            (125_000_000, "2min 5s"),
            (3_600_000_000, "1h"),
            (7_500_000_000, "2h 5min"),
            (3_605_000_000, "1h"),
            (90_000_000_000, "1d 1h"),
        ] {
            assert_eq!(span(us), text);
        }
        assert_eq!(ago(1_000_000, 6_900_000), "5s ago");
        assert_eq!(ago(9, 5), "now");
    }
}
