//! Texts that have a largest size.

/// Cuts a text to at most so many bytes, between two characters.
pub fn shorten(text: &mut String, bytes: usize) {
    let mut end = text.len().min(bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
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
