//! Texts that have a largest size, and texts that a terminal would obey.

use std::borrow::Cow;

/// Cuts a text to at most so many bytes, between two characters.
pub fn shorten(text: &mut String, bytes: usize) {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// Whether a terminal would obey it instead of showing it: control characters, line breaks, direction marks.
#[must_use]
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text with these characters written as escapes.
#[must_use]
pub fn escape(text: &str, is_unsafe: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut harmless = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_unsafe(c) {
            harmless.extend(c.escape_default());
        } else {
            harmless.push(c);
        }
    }
    Cow::Owned(harmless)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_character_is_cut() {
        for (bytes, expected) in [(0, ""), (1, ""), (2, "ä"), (3, "äb"), (9, "äb")] {
            let mut text = "äb".to_owned();
            shorten(&mut text, bytes);
            assert_eq!(text, expected);
        }
    }
}
