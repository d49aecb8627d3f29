//! `nervectl store archive` and `store restore`: old days of the log move out of the database, and back.

use std::fmt::Write as _;

use serde::Serialize;

use super::cli::{Archive, ListFormat, Restore};
use super::control::unknown;
use super::paper::Paper;
use super::text::{line, table};
use super::{Failure, Settings, json, note, print};
use crate::bus::storage_client::{ArchiveOptions, ArchiveReport};

/// `nervectl store archive`
pub(super) async fn archive(settings: &Settings, arguments: &Archive) -> Result<u8, Failure> {
    let client = settings.connect_patiently().await?;
    let options = ArchiveOptions {
        max_days: arguments.max_days,
        vacuum: Some(arguments.vacuum),
        dry_run: Some(arguments.dry_run),
        ..ArchiveOptions::default()
    };
    let done = client.archive(arguments.older_than, options).await;
    let report = done.map_err(|error| unknown(error, "archiving once more does no harm"))?;
    match arguments.output {
        ListFormat::Json => print(&json::array(&[Report::from(&report)]))?,
        ListFormat::Table => print(&archived(&report, arguments.dry_run))?,
    }
    Ok(0)
}

/// `nervectl store restore`
pub(super) async fn restore(settings: &Settings, arguments: &Restore) -> Result<u8, Failure> {
    let client = settings.connect_patiently().await?;
    let done = client.restore(&arguments.day).await;
    let rows = done.map_err(|error| unknown(error, "restoring it once more does no harm"))?;
    note(&format!("{}: {rows} events are back", arguments.day));
    Ok(0)
}

#[derive(Serialize)]
struct Report<'a> {
    days: Vec<Gone<'a>>,
    forgotten: u64,
    blobs: u64,
    freed: Option<u64>,
}

#[derive(Serialize)]
struct Gone<'a> {
    day: &'a str,
    rows: u64,
    file: &'a str,
}

impl<'a> From<&'a ArchiveReport> for Report<'a> {
    fn from(report: &'a ArchiveReport) -> Self {
        let days = report.days.iter().map(|day| Gone {
            day: &day.day,
            rows: day.rows,
            file: &day.file,
        });
        Self {
            days: days.collect(),
            forgotten: report.forgotten,
            blobs: report.blobs,
            freed: report.freed,
        }
    }
}

/// A table of the days, and a line for what else was done.
fn archived(report: &ArchiveReport, dry_run: bool) -> String {
    let mut text = if report.days.is_empty() {
        "No day is old enough, or has anything that can go.\n".to_owned()
    } else {
        let rows = report.days.iter().map(|day| {
            vec![
                line(&day.day).into_owned(),
                day.rows.to_string(),
                line(&day.file).into_owned(),
            ]
        });
        table(
            &["DAY", "EVENTS", "FILE"],
            &["EVENTS"],
            &rows.collect::<Vec<_>>(),
            Paper::stdout(),
        )
    };
    let mut say = |number: u64, what: &str| {
        if number > 0 {
            // A write to a String cannot fail.
            let _ = writeln!(text, "{what}: {number}");
        }
    };
    let (forgotten, blobs) = if dry_run {
        (
            "runs that would be forgotten",
            "blobs that would be removed",
        )
    } else {
        ("runs forgotten", "blobs removed")
    };
    say(report.forgotten, forgotten);
    say(report.blobs, blobs);
    say(report.freed.unwrap_or(0), "bytes given back");
    if dry_run {
        text.push_str("Nothing was done.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::storage_client::ArchivedDay;

    #[test]
    fn what_was_done_is_said_and_what_was_not_is_not() {
        let day = ArchivedDay {
            day: "2026-11-20".to_owned(),
            file: "/a\u{1b}".to_owned(),
            rows: 7,
        };
        let report = ArchiveReport {
            days: vec![day],
            forgotten: 2,
            blobs: 0,
            freed: Some(4_096),
        };
        assert_eq!(
            archived(&report, false),
            "DAY         EVENTS  FILE\n2026-11-20       7  /a\\u{1b}\nruns forgotten: 2\nbytes given back: 4096\n"
        );
        let planned = archived(&report, true);
        assert!(
            planned.contains("\nruns that would be forgotten: 2\n"),
            "{planned}"
        );
        let nothing = archived(&ArchiveReport::default(), true);
        assert!(nothing.starts_with("No day") && nothing.ends_with("Nothing was done.\n"));
        let json = json::array(&[Report::from(&report)]);
        let keys = ["days", "day", "rows", "file", "forgotten", "blobs", "freed"];
        let place = |key: &str| json.find(&format!("\"{key}\"")).unwrap();
        assert!(
            keys.windows(2).all(|pair| place(pair[0]) < place(pair[1])),
            "{json}"
        );
    }
}
