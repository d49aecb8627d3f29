//! Moments as systemd.time(7) writes timestamps. Anyone who reads one calls this; pure, but that zones are the system's.

use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::{Disambiguation, Offset, TimeZone};
use jiff::{Timestamp, ToSpan as _};

use super::diagnostic::quoted;
use super::time::parse_duration;

const WEEKDAYS: [(&str, Weekday); 7] = [
    ("monday", Weekday::Monday),
    ("tuesday", Weekday::Tuesday),
    ("wednesday", Weekday::Wednesday),
    ("thursday", Weekday::Thursday),
    ("friday", Weekday::Friday),
    ("saturday", Weekday::Saturday),
    ("sunday", Weekday::Sunday),
];

/// Reads a moment, where it is `now_us` in `zone`: µs since the epoch.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn parse_moment(text: &str, now_us: u64, zone: &TimeZone) -> Result<u64, String> {
    let text = text.trim();
    relative(text, now_us)
        .or_else(|| absolute(text, now_us, zone))
        .ok_or_else(|| {
            format!(
                "{} is no time; write one like -1h, 2h ago, yesterday, 10:36, 2026-11-20, \"2026-11-20 10:36:24 UTC\", \
                 2026-11-20T10:36:24Z or @1795170984",
                quoted(text)
            )
        })
}

/// `now`, `@SECONDS`, `+SPAN`, `-SPAN`, `SPAN ago`, `SPAN left`.
fn relative(text: &str, now: u64) -> Option<u64> {
    let span = |text: &str| u64::try_from(parse_duration(text).ok()?.as_micros()).ok();
    if text == "now" {
        Some(now)
    } else if let Some(since_epoch) = text.strip_prefix('@') {
        span(since_epoch)
    } else if let Some(after) = text.strip_prefix('+').or(text.strip_suffix(" left")) {
        now.checked_add(span(after)?)
    } else {
        let before = text.strip_prefix('-').or(text.strip_suffix(" ago"))?;
        // As in systemd: nothing was before the epoch.
        Some(now.saturating_sub(span(before)?))
    }
}

/// A day, a time of day or both, with a weekday before and a zone behind it.
fn absolute(text: &str, now: u64, zone: &TimeZone) -> Option<u64> {
    let (text, zone) = with_zone(text, zone);
    let now = Timestamp::from_microsecond(i64::try_from(now).ok()?).ok()?;
    let today = now.to_zoned(zone.clone()).date();
    let (text, weekday) = after_weekday(text);
    let midnight = Time::midnight();
    let (date, time) = match text {
        "today" => (today, midnight),
        "yesterday" => (today.checked_sub(1.day()).ok()?, midnight),
        "tomorrow" => (today.checked_add(1.day()).ok()?, midnight),
        _ => match text.split_once([' ', 'T']) {
            Some((date, time)) => (day(date)?, time_of_day(time.trim_start())?),
            None if text.contains(':') => (today, time_of_day(text)?),
            None => (day(text)?, midnight),
        },
    };
    if weekday.is_some_and(|weekday| weekday != date.weekday()) {
        return None;
    }
    let local = zone.into_ambiguous_zoned(DateTime::from_parts(date, time));
    let moment = local.disambiguate(Disambiguation::Compatible).ok()?;
    u64::try_from(moment.timestamp().as_microsecond()).ok()
}

/// Takes the zone off the end: `UTC`, `Z`, `+01:00`, or a name that the system knows.
fn with_zone<'a>(text: &'a str, local: &TimeZone) -> (&'a str, TimeZone) {
    let is_utc = |word: &str| word.eq_ignore_ascii_case("UTC");
    if let Some((rest, word)) = text.rsplit_once(' ') {
        let zone = if is_utc(word) {
            Some(TimeZone::UTC)
        } else if word.starts_with(['+', '-']) {
            offset(word)
        } else if word.starts_with(|c: char| c.is_ascii_alphabetic()) {
            TimeZone::get(word).ok()
        } else {
            None
        };
        if let Some(zone) = zone {
            return (rest.trim_end(), zone);
        }
    }
    // RFC 3339: right behind a time of day.
    let Some(time) = text.rfind(':').and_then(|_| text.find(':')) else {
        return (text, local.clone());
    };
    if let Some(rest) = text.strip_suffix(['Z', 'z']) {
        return (rest, TimeZone::UTC);
    }
    let sign = text[time..].find(['+', '-']).map(|at| time + at);
    match sign.and_then(|at| Some((&text[..at], offset(&text[at..])?))) {
        Some(found) => found,
        None => (text, local.clone()),
    }
}

/// `+01:00`, `-0530`, `+02`
fn offset(text: &str) -> Option<TimeZone> {
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let (hours, minutes) = match (digits.split_once(':'), digits.len()) {
        (Some(parts), _) => parts,
        (None, 4) => digits.split_at_checked(2)?,
        (None, _) => (digits, "00"),
    };
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes) = (number(hours, 2)?, number(minutes, 2)?);
    if minutes > 59 {
        return None;
    }
    let offset = Offset::from_seconds(sign * (hours * 3_600 + minutes * 60)).ok()?;
    Some(TimeZone::fixed(offset))
}

/// Takes a weekday off the beginning.
fn after_weekday(text: &str) -> (&str, Option<Weekday>) {
    let Some((word, rest)) = text.split_once(' ') else {
        return (text, None);
    };
    let word = word.to_ascii_lowercase();
    let known = WEEKDAYS
        .iter()
        .find(|(name, _)| *name == word || name[..3] == word);
    known.map_or((text, None), |(_, weekday)| {
        (rest.trim_start(), Some(*weekday))
    })
}

/// `2026-11-20`, `26-11-20`
fn day(text: &str) -> Option<Date> {
    let mut parts = text.split('-');
    let (year, month, day) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let year = match (year.len(), number(year, 4)?) {
        // strptime(3): two digits from 69 on are of the last century.
        (1 | 2, short @ 69..) => 1_900 + short,
        (1 | 2, short) => 2_000 + short,
        (_, year) => year,
    };
    let part = |text| i8::try_from(number(text, 2)?).ok();
    Date::new(i16::try_from(year).ok()?, part(month)?, part(day)?).ok()
}

/// `10:36`, `10:36:24`, `10:36:24.5`
fn time_of_day(text: &str) -> Option<Time> {
    let mut parts = text.split(':');
    let (hour, minute) = (parts.next()?, parts.next()?);
    let seconds = parts.next().unwrap_or("0");
    if parts.next().is_some() {
        return None;
    }
    let (second, fraction) = seconds.split_once('.').unwrap_or((seconds, "0"));
    let is_digits = !fraction.is_empty() && fraction.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits {
        return None;
    }
    // µs; what is finer is cut off.
    let micros = number(&format!("{fraction:0<6}")[..6], 6)?;
    let part = |text| i8::try_from(number(text, 2)?).ok();
    Time::new(part(hour)?, part(minute)?, part(second)?, micros * 1_000).ok()
}

/// Digits alone, one or as many.
fn number(text: &str, longest: usize) -> Option<i32> {
    let is_number = (1..=longest).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::time::utc;
    use proptest::prelude::*;

    /// Fri 2026-11-20 10:36:22.5 UTC
    const NOW: u64 = 1_795_170_982_500_000;
    const HOUR: u64 = 3_600_000_000;

    /// An hour ahead of UTC, two in summer, as systems in the middle of Europe are.
    fn zone() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
    }

    #[test]
    fn spans_count_from_now_and_from_the_epoch() {
        for (text, expected) in [
            ("now", NOW),
            (" now ", NOW),
            ("-1h", NOW - HOUR),
            ("- 1h", NOW - HOUR),
            ("+5min", NOW + HOUR / 12),
            ("+1h 30min", NOW + HOUR * 3 / 2),
            ("1h ago", NOW - HOUR),
            ("90 ago", NOW - 90_000_000),
            ("1h left", NOW + HOUR),
            ("-90", NOW - 90_000_000),
            ("-1000y", 0),
            ("@0", 0),
            ("@1700000000", 1_700_000_000_000_000),
            ("@1700000000.25", 1_700_000_000_250_000),
        ] {
            assert_eq!(parse_moment(text, NOW, &zone()), Ok(expected), "{text}");
        }
    }

    // As `TZ=Europe/Berlin systemd-analyze timestamp` says on that day.
    #[test]
    fn days_and_times_of_day_are_those_of_the_zone() {
        for (text, expected) in [
            ("today", "2026-11-19 23:00:00 UTC"),
            ("yesterday", "2026-11-18 23:00:00 UTC"),
            ("tomorrow", "2026-11-20 23:00:00 UTC"),
            ("today UTC", "2026-11-20 00:00:00 UTC"),
            ("2026-11-20", "2026-11-19 23:00:00 UTC"),
            ("2026-07-20", "2026-07-19 22:00:00 UTC"),
            ("26-11-20", "2026-11-19 23:00:00 UTC"),
            ("70-01-02", "1970-01-01 23:00:00 UTC"),
            ("2026-1-2 3:4:5", "2026-01-02 02:04:05 UTC"),
            ("2026-11-20 10:36", "2026-11-20 09:36:00 UTC"),
            ("2026-11-20  10:36:24", "2026-11-20 09:36:24 UTC"),
            ("2026-11-20T10:36:24", "2026-11-20 09:36:24 UTC"),
            ("10:36", "2026-11-20 09:36:00 UTC"),
            ("9:05:07", "2026-11-20 08:05:07 UTC"),
            ("10:36 UTC", "2026-11-20 10:36:00 UTC"),
            ("Fri 2026-11-20 10:36", "2026-11-20 09:36:00 UTC"),
            ("friday 2026-11-20", "2026-11-19 23:00:00 UTC"),
            ("FRI 10:36", "2026-11-20 09:36:00 UTC"),
            ("Fri 2026-11-20 10:36:24 UTC", "2026-11-20 10:36:24 UTC"),
            ("2026-11-20 utc", "2026-11-20 00:00:00 UTC"),
            ("2026-11-20 10:36:24 +05:30", "2026-11-20 05:06:24 UTC"),
            ("2026-11-20T10:36:24Z", "2026-11-20 10:36:24 UTC"),
            ("2026-11-20T10:36:24.5z", "2026-11-20 10:36:24 UTC"),
            ("2026-11-20T10:36:24-08:00", "2026-11-20 18:36:24 UTC"),
            ("2026-11-20 10:36:24+0130", "2026-11-20 09:06:24 UTC"),
            // Twice, and never: the clock is set back, and forward.
            ("2026-10-25 02:30", "2026-10-25 00:30:00 UTC"),
            ("2026-03-29 02:30", "2026-03-29 01:30:00 UTC"),
        ] {
            let found = parse_moment(text, NOW, &zone()).map(utc);
            assert_eq!(found.as_deref(), Ok(expected), "{text}");
        }
        let found = parse_moment("2026-11-20 10:36:24.5000019 UTC", NOW, &zone());
        assert_eq!(found, Ok(1_795_170_984_500_001));
        // Before the day begins in UTC it has begun here.
        let evening = 1_795_217_400_000_000;
        assert_eq!(utc(evening), "2026-11-20 23:30:00 UTC");
        let found = parse_moment("today", evening, &zone()).map(utc);
        assert_eq!(found.as_deref(), Ok("2026-11-20 23:00:00 UTC"));
    }

    #[test]
    fn what_is_no_time_is_refused_in_one_line_that_says_what_is_one() {
        for text in [
            "",
            " ",
            "soon",
            "ago",
            "-",
            "+",
            "@",
            "@-1",
            "@1-",
            "1h",
            "-1h ago",
            "infinity",
            "+infinity",
            "2026",
            "2026-11",
            "2026-13-01",
            "2026-02-30",
            "2026-11-20-1",
            "2026-11-20 24:00",
            "2026-11-20 10",
            "2026-11-20 10:60",
            "2026-11-20 10:36:24.",
            "2026-11-20 10:36:24:1",
            "2026-11-20 10:36 Nowhere/Land",
            "2026-11-20T10:36:24+25:61",
            "2026-11-20Z",
            "Mon 2026-11-20",
            "Fri",
            "+2026-11-20",
            "1969-12-31",
            "99999999999999999999",
            "2026\u{1b}-11-20",
        ] {
            let error = parse_moment(text, NOW, &zone()).unwrap_err();
            assert!(
                error.contains("is no time; write one like -1h"),
                "{text:?}: {error}"
            );
            assert!(!error.contains(char::is_control), "{text:?}: {error:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC*", near in "[-+@0-9:.TZ adgonwy]{0,30}") {
            let _ = (parse_moment(&text, NOW, &zone()), parse_moment(&near, NOW, &zone()));
        }
    }
}
