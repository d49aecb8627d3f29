//! Time spans as systemd.time(7) writes them. Anyone who reads or shows a duration calls this; pure.

use std::time::Duration;

/// Units by name, in µs. A month is 30.44 days and a year 365.25, as in systemd.
const UNITS: [(&[&str], u64); 10] = [
    (&["us", "usec", "µs", "μs"], 1),
    (&["ms", "msec"], 1_000),
    (&["", "s", "sec", "second", "seconds"], 1_000_000),
    (&["m", "min", "minute", "minutes"], 60_000_000),
    (&["h", "hr", "hour", "hours"], 3_600_000_000),
    (&["d", "day", "days"], 86_400_000_000),
    (&["w", "week", "weeks"], 604_800_000_000),
    (&["M", "month", "months"], 2_629_800_000_000),
    (&["y", "year", "years"], 31_557_600_000_000),
    // Nobody waits for nanoseconds; systemd has them, and they round down to µs.
    (&["ns", "nsec"], 0),
];

/// Reads a span: `5s`, `2h 30min`, `1.5h`; a number without a unit is in seconds. Exact to the µs.
///
/// # Errors
/// A sentence that says what is wrong: no number, an unknown unit, `infinity`, more than `u64::MAX` µs.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let mut rest = text.trim();
    if rest == "infinity" {
        return Err("infinity is no time span here; leave the key out to have no limit".to_owned());
    }
    if rest.is_empty() {
        return Err("a time span is empty; write one like 90s, 20min or 2h 30min".to_owned());
    }
    let too_long = || "the time span is too long; write one below 500 000 years".to_owned();
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = after.strip_prefix('.').map_or(("", after), digits);
        if whole.is_empty() || (fraction.is_empty() && rest[whole.len()..].starts_with('.')) {
            return Err(no_span(text));
        }
        let after = after.trim_start();
        let unit_length = after
            .find(|c: char| !c.is_alphabetic())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_length);
        let (_, scale) = UNITS
            .iter()
            .find(|(names, _)| names.contains(&unit))
            .ok_or_else(|| no_span(text))?;
        let whole = whole
            .parse::<u64>()
            .ok()
            .and_then(|whole| whole.checked_mul(*scale));
        total = whole
            .and_then(|whole| total.checked_add(whole))
            .and_then(|sum| sum.checked_add(part(fraction, *scale)))
            .ok_or_else(too_long)?;
        rest = after.trim_start();
    }
    Ok(Duration::from_micros(total))
}

fn digits(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

/// `0.FRACTION` of a unit, rounded down.
fn part(fraction: &str, scale: u64) -> u64 {
    let mut place = scale;
    let mut sum = 0;
    for digit in fraction.bytes().take(15) {
        // Each place rounds down, which loses less than 1 µs.
        sum += place * u64::from(digit - b'0') / 10;
        place /= 10;
    }
    sum
}

fn no_span(text: &str) -> String {
    let shown = super::diagnostic::quoted(text);
    format!("{shown} is no time span; write one like 90s, 20min or 2h 30min")
}

/// Writes a span so that [`parse_duration`] reads the same one: `2h 30min`, `500ms`, `0s`. Below 1 µs is cut off.
#[must_use]
pub fn show_duration(duration: Duration) -> String {
    const SHOWN: [(&str, u128); 6] = [
        ("d", 86_400_000_000),
        ("h", 3_600_000_000),
        ("min", 60_000_000),
        ("s", 1_000_000),
        ("ms", 1_000),
        ("us", 1),
    ];
    let mut rest = duration.as_micros();
    let mut words = Vec::new();
    for (unit, scale) in SHOWN {
        if rest >= scale {
            words.push(format!("{}{unit}", rest / scale));
            rest %= scale;
        }
    }
    if words.is_empty() {
        "0s".to_owned()
    } else {
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spans_are_read_as_systemd_reads_them() {
        for (text, ms) in [
            ("5s", 5_000),
            ("90", 90_000),
            ("2h 30min", 9_000_000),
            ("2h30min", 9_000_000),
            ("2 h 30 min", 9_000_000),
            ("1.5h", 5_400_000),
            ("500ms", 500),
            ("20m", 1_200_000),
            ("1d", 86_400_000),
            ("1w", 604_800_000),
            ("1M", 2_629_800_000),
            ("1month", 2_629_800_000),
            ("1y", 31_557_600_000),
            ("1year 1s", 31_557_601_000),
            ("0", 0),
            ("0.001", 1),
            ("5s 20", 25_000),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(ms)),
                "{text}"
            );
        }
        assert_eq!(
            parse_duration("1.000007s"),
            Ok(Duration::from_micros(1_000_007))
        );
        assert_eq!(parse_duration("7us"), Ok(Duration::from_micros(7)));
    }

    #[test]
    fn what_is_no_span_is_refused_in_one_line() {
        for text in [
            "",
            " ",
            "s",
            "-1",
            "+1",
            "1x",
            "1 2x",
            ".5",
            "1.",
            "1..5",
            "1,5",
            "infinity",
            "1\n\u{1b}",
            "1e3",
            "0x10",
            "99999999999999999999",
            "999999999y",
            "1H",
        ] {
            let error = parse_duration(text).unwrap_err();
            assert!(!error.contains(char::is_control), "{text:?}: {error:?}");
        }
        assert!(
            parse_duration("infinity")
                .unwrap_err()
                .contains("leave the key out")
        );
    }

    #[test]
    fn spans_are_shown_readably() {
        for text in ["2h 30min", "1d", "500ms", "0s", "1min 1s 1ms 1us"] {
            assert_eq!(show_duration(parse_duration(text).unwrap()), text);
        }
    }

    proptest! {
        #[test]
        fn shown_and_read_again_is_the_same(us: u64) {
            let span = Duration::from_micros(us);
            prop_assert_eq!(parse_duration(&show_duration(span)), Ok(span));
        }

        #[test]
        fn arbitrary_text_never_panics(text in "\\PC*", near in "[0-9.smhdwyM ]{0,40}") {
            let _ = (parse_duration(&text), parse_duration(&near));
        }
    }
}
