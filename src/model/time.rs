//! Times of day as people read them. µs since the epoch in, text out; no clock.

/// A time of day: `2026-11-20 10:36:22 UTC`.
#[must_use]
pub fn utc(us: u64) -> String {
    let seconds = us / 1_000_000;
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// µs of a UTC day; there are no leap seconds.
pub const DAY_US: u64 = 86_400_000_000;

/// The UTC day that a moment is in: `2026-11-20`.
#[must_use]
pub fn day(us: u64) -> String {
    let (year, month, day) = date(us / DAY_US);
    format!("{year:04}-{month:02}-{day:02}")
}

/// The moment at which a day, as [`day`] writes it, began.
#[must_use]
pub fn day_start(text: &str) -> Option<u64> {
    let mut parts = text.split('-');
    let mut part = |digits| {
        let part = parts.next().filter(|part| part.len() == digits)?;
        part.parse::<u64>().ok()
    };
    let (year, month, of_month) = (part(4)?, part(2)?, part(2)?);
    if !(1..=12).contains(&month) || year < 1970 {
        return None;
    }
    // The inverse of `date`, from the same source: `days_from_civil`.
    let year = year - u64::from(month <= 2);
    let (era, year_of_era) = (year / 400, year % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + of_month - u64::from(of_month > 0);
    let of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + of_year;
    let start = (era * 146_097 + of_era).checked_sub(719_468)? * DAY_US;
    // What is no date, the 30th of February, is written otherwise.
    (day(start) == text).then_some(start)
}

/// The date that is `days` after 1970-01-01. Years count from March, so that the leap day is the last of its year
/// (Howard Hinnant, "chrono-compatible low-level date algorithms", `civil_from_days`).
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_OF_ERA: u64 = 146_097;
    let days = days + 719_468;
    let (era, of_era) = (days / DAYS_OF_ERA, days % DAYS_OF_ERA);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_that_date_prints() {
        // `date -u -d @SECONDS`
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (68_169_599, "1972-02-28 23:59:59 UTC"),
            (68_169_600, "1972-02-29 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds * 1_000_000), text);
        }
    }

    #[test]
    fn a_day_is_read_as_it_is_written() {
        for days in (0..200_000).step_by(7).chain([11_016, 11_017]) {
            let start = days * DAY_US;
            assert_eq!(day_start(&day(start)), Some(start));
            assert_eq!(day(start + DAY_US - 1), day(start));
        }
        for none in [
            "",
            "2026-11",
            "2026-11-31",
            "2026-02-29",
            "2026-00-01",
            "2026-13-01",
            "2026-11-00",
            "1969-12-31",
            "2026-1-01",
            "2026-11-20-",
            "2026-11-20-1",
            "+026-11-20",
            "yesterday",
        ] {
            assert_eq!(day_start(none), None, "{none}");
        }
    }
}
