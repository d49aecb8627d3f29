//! What differs between two texts, purely, as `diff -u` shows it.

use std::fmt::Write as _;

use super::text::line;

/// Lines around a change that are shown.
const AROUND: usize = 3;
/// Cells of the table that is compared with; beyond, what lies between equal ends counts as replaced.
const MOST: usize = 4_000_000;

/// A line of both texts, of the old, or of the new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line<'a> {
    Both(&'a str),
    Old(&'a str),
    New(&'a str),
}

/// The unified difference, with the names above; what a terminal would obey is escaped.
pub(super) fn unified(old_name: &str, new_name: &str, old: &str, new: &str) -> String {
    let lines = compare(&lines_of(old), &lines_of(new));
    let mut text = format!("--- {}\n+++ {}\n", line(old_name), line(new_name));
    let is_change = |line: &Line<'_>| !matches!(line, Line::Both(_));
    let mut next = 0;
    // Line numbers of the old and the new text.
    let mut at = (1, 1);
    while let Some(first) = lines[next..].iter().position(is_change) {
        let begin = (next + first).saturating_sub(AROUND).max(next);
        let mut end = next + first;
        // As long as the gap to the next change is all context.
        while let Some(more) = lines[end..].iter().take(2 * AROUND + 1).position(is_change) {
            end += more + 1;
        }
        end = (end + AROUND).min(lines.len());
        advance(&mut at, &lines[next..begin]);
        let from = at;
        advance(&mut at, &lines[begin..end]);
        let (olds, news) = (at.0 - from.0, at.1 - from.1);
        let place = |start: usize, count: usize| match count {
            // Of nothing, the line before it.
            0 => format!("{},0", start - 1),
            count => format!("{start},{count}"),
        };
        let _ = writeln!(
            text,
            "@@ -{} +{} @@",
            place(from.0, olds),
            place(from.1, news)
        );
        for one in &lines[begin..end] {
            let (mark, content) = match one {
                Line::Both(content) => (' ', content),
                Line::Old(content) => ('-', content),
                Line::New(content) => ('+', content),
            };
            let _ = writeln!(text, "{mark}{}", super::text::block(content));
        }
        next = end;
    }
    text
}

/// Without the end of the last line: whether it has one is told by a line of its own.
fn lines_of(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    if !text.is_empty() && !text.ends_with('\n') {
        lines.push("\\ No newline at end of file");
    }
    lines
}

fn advance(at: &mut (usize, usize), lines: &[Line<'_>]) {
    for line in lines {
        at.0 += usize::from(!matches!(line, Line::New(_)));
        at.1 += usize::from(!matches!(line, Line::Old(_)));
    }
}

/// The lines of both texts in order, as many as possible in common.
fn compare<'a>(old: &[&'a str], new: &[&'a str]) -> Vec<Line<'a>> {
    let same = |(old, new): &(&&str, &&str)| old == new;
    let head = old.iter().zip(new).take_while(same).count();
    let (old_rest, new_rest) = (&old[head..], &new[head..]);
    let tail = old_rest
        .iter()
        .rev()
        .zip(new_rest.iter().rev())
        .take_while(same)
        .count();
    let old_part = &old_rest[..old_rest.len() - tail];
    let new_part = &new_rest[..new_rest.len() - tail];
    let mut lines: Vec<Line<'a>> = old[..head].iter().map(|line| Line::Both(line)).collect();
    if old_part.len().saturating_mul(new_part.len()) > MOST {
        lines.extend(old_part.iter().map(|line| Line::Old(line)));
        lines.extend(new_part.iter().map(|line| Line::New(line)));
    } else {
        middle(old_part, new_part, &mut lines);
    }
    lines.extend(
        old_rest[old_part.len()..]
            .iter()
            .map(|line| Line::Both(line)),
    );
    lines
}

/// By the longest common subsequence: `longest[i][j]` is that of what begins at `i` and `j`.
fn middle<'a>(old: &[&'a str], new: &[&'a str], lines: &mut Vec<Line<'a>>) {
    let mut longest = vec![vec![0_u32; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            longest[i][j] = if old[i] == new[j] {
                longest[i + 1][j + 1] + 1
            } else {
                longest[i + 1][j].max(longest[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            lines.push(Line::Both(old[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || (i < old.len() && longest[i + 1][j] >= longest[i][j + 1]) {
            lines.push(Line::Old(old[i]));
            i += 1;
        } else {
            lines.push(Line::New(new[j]));
            j += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_difference_is_what_diff_shows() {
        let text = |lines: &[&str]| {
            lines
                .iter()
                .map(|line| [*line, "\n"].concat())
                .collect::<String>()
        };
        let old = text(&[
            "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13",
        ]);
        let new = old
            .replace("2\n3\n", "2\nzwei\n")
            .replace("13\n", "dreizehn\u{1b}");
        assert_eq!(
            unified("a", "b", &old, &new),
            "--- a\n+++ b\n@@ -1,6 +1,6 @@\n 1\n 2\n-3\n+zwei\n 4\n 5\n 6\n@@ -10,4 +10,5 @@\n 10\n 11\n 12\n-13\n\
             +dreizehn\\u{1b}\n+\\ No newline at end of file\n"
        );
        assert_eq!(
            unified("a", "b", "", "x\n"),
            "--- a\n+++ b\n@@ -0,0 +1,1 @@\n+x\n"
        );
        assert_eq!(unified("a", "b", "x\n", "x\n"), "--- a\n+++ b\n");
    }

    proptest! {
        /// Who applies it to the old text gets the new one.
        #[test]
        fn a_difference_can_be_applied(old in "([ab]\n){0,20}", new in "([abc]\n){0,20}") {
            let difference = unified("a", "b", &old, &new);
            let applied = apply(&old, &difference);
            prop_assert_eq!(applied, new);
        }
    }

    fn apply(old: &str, difference: &str) -> String {
        let old: Vec<&str> = old.lines().collect();
        let (mut new, mut at) = (Vec::new(), 0);
        for line in difference.lines().skip(2) {
            if let Some(place) = line.strip_prefix("@@ -") {
                let (start, rest) = place.split_once(',').unwrap();
                let count: usize = rest.split(' ').next().unwrap().parse().unwrap();
                let start: usize = start.parse().unwrap();
                let start = if count == 0 { start } else { start - 1 };
                new.extend(&old[at..start]);
                at = start;
                continue;
            }
            let (mark, content) = line.split_at(1);
            match mark {
                "+" => new.push(content),
                "-" => at += 1,
                _ => {
                    assert_eq!(old[at], content);
                    new.push(content);
                    at += 1;
                }
            }
        }
        new.extend(&old[at..]);
        new.iter().map(|line| [*line, "\n"].concat()).collect()
    }
}
