//! The words and values of unit files, systemd.syntax(7): quoting, sizes, percentages, booleans, names. Pure; called by
//! `unit_settings`. Errors are fragments that fit after `KEY: `.

use super::diagnostic::quoted;
use crate::model::workflow::Limit;

/// Longest user or group name, systemd's strict rule.
const ACCOUNT_BYTES: usize = 31;

/// Splits a value as systemd does: at blanks, with quotes and C escapes, `%%` for a percent sign. Specifiers are
/// refused: the properties of a transient unit are taken literally.
pub(super) fn words(text: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, ' ' | '\t' | '\n' | '\r') => words.extend(word.take()),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (Some(open), c) if c == open => quote = None,
            (_, '\\') => word.get_or_insert_default().push(escape(&mut chars)?),
            (_, '%') if chars.as_str().starts_with('%') => {
                chars.next();
                word.get_or_insert_default().push('%');
            }
            (_, '%') => {
                let near: String = std::iter::once('%')
                    .chain(chars.as_str().chars().take(1))
                    .collect();
                return Err(format!(
                    "{} would be a specifier, and none is expanded here; write %% for a %",
                    quoted(&near)
                ));
            }
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    if let Some(quote) = quote {
        return Err(format!(
            "a quotation mark ({quote}) is not closed; write another at the end"
        ));
    }
    words.extend(word);
    Ok(words)
}

/// What follows a backslash.
fn escape(chars: &mut std::str::Chars<'_>) -> Result<char, String> {
    let wrong = || "an escape with \\ is not valid; write \\\\ for a \\".to_owned();
    let next = chars.next().ok_or_else(wrong)?;
    let mut number = |first: Option<char>, digits: usize, radix: u32| {
        let text: String = first
            .into_iter()
            .chain(chars.by_ref().take(digits))
            .collect();
        let valid = text.len() == digits + usize::from(first.is_some())
            && text.chars().all(|c| c.is_digit(radix));
        // A byte above 0x7f alone is no UTF-8.
        let code = u32::from_str_radix(&text, radix)
            .ok()
            .filter(|code| valid && *code != 0)?;
        char::from_u32(code).filter(|c| digits >= 4 || c.is_ascii())
    };
    let c = match next {
        'a' => Some('\u{7}'),
        'b' => Some('\u{8}'),
        'f' => Some('\u{c}'),
        'n' => Some('\n'),
        'r' => Some('\r'),
        't' => Some('\t'),
        'v' => Some('\u{b}'),
        's' => Some(' '),
        '\\' | '"' | '\'' => Some(next),
        'x' => number(None, 2, 16),
        'u' => number(None, 4, 16),
        'U' => number(None, 8, 16),
        '0'..='3' => number(Some(next), 2, 8),
        _ => None,
    };
    c.ok_or_else(wrong)
}

/// A size: `4G`, `1.5M`, `512` (base 1024), `50%`, `infinity`.
pub(super) fn size(text: &str) -> Result<Limit, String> {
    const RULE: &str = "write a size like 512M or 4G, a percentage like 50%, or infinity";
    if let Some(limit) = relative(text, RULE)? {
        return Ok(limit);
    }
    let wrong = || format!("{} is no size; {RULE}", quoted(text));
    let number_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(number_end);
    let shift = match suffix.trim_start() {
        "" | "B" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        "E" => 60,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number
        .split_once('.')
        .map_or((number, None), |(whole, part)| (whole, Some(part)));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !fraction.is_none_or(|part| digits(part) && part.len() <= 9) {
        return Err(wrong());
    }
    let unit = 1_u128 << shift;
    let whole = whole.parse::<u64>().map_err(|_| wrong())?;
    let part = match fraction {
        Some(part) => {
            part.parse::<u128>().map_err(|_| wrong())? * unit
                / part.bytes().fold(1, |scale, _| scale * 10)
        }
        None => 0,
    };
    let bytes = u64::try_from(u128::from(whole) * unit + part).map_err(|_| wrong())?;
    absolute(bytes)
}

/// A number of tasks: `512`, `50%`, `infinity`.
pub(super) fn tasks(text: &str) -> Result<Limit, String> {
    const RULE: &str = "write a number like 512, a percentage like 50%, or infinity";
    if let Some(limit) = relative(text, RULE)? {
        return Ok(limit);
    }
    match text.parse() {
        Ok(count) if text.bytes().all(|b| b.is_ascii_digit()) => absolute(count),
        _ => Err(format!("{} is no number of tasks; {RULE}", quoted(text))),
    }
}

fn absolute(value: u64) -> Result<Limit, String> {
    match value {
        0 => Err("a limit of 0 lets nothing run; write more, or remove the key".to_owned()),
        u64::MAX => Err("the limit is too large; write infinity".to_owned()),
        value => Ok(Limit::Absolute(value)),
    }
}

fn relative(text: &str, rule: &str) -> Result<Option<Limit>, String> {
    if text == "infinity" {
        return Ok(Some(Limit::Absolute(u64::MAX)));
    }
    if !text.ends_with('%') {
        return Ok(None);
    }
    match permyriad(text) {
        Some(0) => Err("a limit of 0% lets nothing run; write more, or remove the key".to_owned()),
        Some(share @ 1..=10_000) => Ok(Some(Limit::Permyriad(share))),
        Some(_) => Err(format!("{} is more than there is; {rule}", quoted(text))),
        None => Err(format!("{} is no percentage; {rule}", quoted(text))),
    }
}

/// A percentage with at most two decimals, in hundredths.
pub(super) fn permyriad(text: &str) -> Option<u32> {
    let number = text.strip_suffix('%')?;
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 2 {
        return None;
    }
    let tens = if part.len() == 1 { 10 } else { 1 };
    whole
        .parse::<u32>()
        .ok()?
        .checked_mul(100)?
        .checked_add(part.parse::<u32>().ok()? * tens)
}

/// A boolean in any of systemd's spellings.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "yes" | "y" | "true" | "t" | "on" => Some(true),
        "0" | "no" | "n" | "false" | "f" | "off" => Some(false),
        _ => None,
    }
}

/// Checks a user or group: a name by systemd's strict rule, or a number.
pub(super) fn account(text: &str) -> Result<(), String> {
    if text.bytes().all(|b| b.is_ascii_digit()) && !text.is_empty() {
        // 65535 and 4294967295 mean "none" to the kernel.
        let valid = text
            .parse::<u32>()
            .is_ok_and(|id| id != 0xffff && id != u32::MAX);
        let canonical = text == "0" || !text.starts_with('0');
        return if valid && canonical {
            Ok(())
        } else {
            Err(format!(
                "{} is no valid id; write the number that `getent` shows, without leading zeros",
                quoted(text)
            ))
        };
    }
    let first = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
    let rest = text
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    if first && rest && text.len() <= ACCOUNT_BYTES {
        Ok(())
    } else {
        let rule =
            "use letters, digits, _ and -, at most 31 characters, the first one no digit or -";
        Err(format!("{} is no valid name; {rule}", quoted(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn words_are_split_as_systemd_does() {
        for (text, expected) in [
            ("", vec![]),
            ("a b\tc", vec!["a", "b", "c"]),
            ("\"A=one two\" B=2", vec!["A=one two", "B=2"]),
            ("A='one two'", vec!["A=one two"]),
            ("A=\"x\"'y'z", vec!["A=xyz"]),
            ("'' a", vec!["", "a"]),
            ("a\\sb \\x41\\101\\u00e9\\\\", vec!["a b", "AAé\\"]),
            ("'it\\'s'", vec!["it's"]),
            ("A=100%%", vec!["A=100%"]),
        ] {
            assert_eq!(words(text).unwrap(), expected, "{text}");
        }
        for bad in [
            "\"a", "a'", "\\", "\\q", "\\x4", "\\xff", "\\000", "\\ud800", "%h", "a%", "% ",
        ] {
            assert!(words(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_base_1024() {
        for (text, bytes) in [
            ("1", 1),
            ("4G", 4 << 30),
            ("1.5K", 1536),
            ("2 M", 2 << 20),
            ("1T", 1 << 40),
            ("infinity", u64::MAX),
        ] {
            assert_eq!(size(text), Ok(Limit::Absolute(bytes)), "{text}");
        }
        assert_eq!(size("50%"), Ok(Limit::Permyriad(5_000)));
        assert_eq!(size("12.5%"), Ok(Limit::Permyriad(1_250)));
        for bad in [
            "",
            "0",
            "0%",
            "101%",
            "G",
            "4GB",
            "4g",
            "-1",
            "1.M",
            ".5M",
            "16E",
            "99999999999999999999",
            "1.1234567890K",
            "%",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(tasks("512"), Ok(Limit::Absolute(512)));
        assert!(tasks("0").is_err() && tasks("1K").is_err() && tasks("+1").is_err());
    }

    #[test]
    fn accounts_follow_the_strict_rule() {
        for good in [
            "root",
            "0",
            "build",
            "_apt",
            "systemd-journal",
            "1000",
            &"a".repeat(31),
        ] {
            assert_eq!(account(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "-a",
            "1a",
            "a.b",
            "a b",
            "é",
            "65535",
            "4294967295",
            "007",
            "99999999999",
            "a\n",
            &"a".repeat(32),
        ] {
            assert!(account(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn booleans_have_many_spellings() {
        assert_eq!(boolean("Yes"), Some(true));
        assert_eq!(boolean("off"), Some(false));
        assert_eq!(boolean("maybe"), None);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text: String, near in "[0-9.%\\\\xuKMGE'\" ]{0,30}") {
            for text in [text, near] {
                let _ = (words(&text), size(&text), tasks(&text), permyriad(&text), boolean(&text), account(&text));
            }
        }
    }
}
