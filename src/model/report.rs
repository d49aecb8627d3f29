//! What a check of the store has found, as nerved, the bus and nervectl say it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Faults that are told; more of them are counted.
const TOLD: usize = 1_000;

/// What a check has found.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// What is wrong, a sentence each, in the order in which it was found.
    pub faults: Vec<String>,
    /// Faults beyond those.
    pub more: u64,
    /// Events in the database and in the archive.
    pub events: u64,
    /// Runs that have a row.
    pub runs: u64,
    /// Blobs that there are.
    pub blobs: u64,
    /// The newest event.
    pub seq: u64,
    /// Its hash, as 64 hex digits: who has noted it elsewhere can tell later that nothing up to it was changed.
    pub hash: String,
}

impl Report {
    /// Nothing is wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    /// One more.
    pub fn fault(&mut self, text: impl Into<String>) {
        if self.faults.len() < TOLD {
            self.faults.push(text.into());
        } else {
            self.more += 1;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for fault in &self.faults {
            // What is quoted in it may be anything.
            let escape = |c: char| {
                let escaped = c.is_control().then(|| c.escape_default().to_string());
                escaped.unwrap_or_else(|| c.to_string())
            };
            writeln!(f, "{}", fault.chars().map(escape).collect::<String>())?;
        }
        if self.more > 0 {
            writeln!(f, "and {} more", self.more)?;
        }
        let verdict = match self.faults.len() as u64 + self.more {
            0 => "nothing is wrong".to_owned(),
            1 => "1 fault".to_owned(),
            count => format!("{count} faults"),
        };
        let (events, runs, blobs) = (self.events, self.runs, self.blobs);
        writeln!(f, "{events} events, {runs} runs, {blobs} blobs: {verdict}")?;
        writeln!(f, "event {} {}", self.seq, self.hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_is_wrong_and_ends_with_the_newest_event() {
        let mut report = Report {
            events: 7,
            seq: 7,
            hash: "ab".to_owned(),
            ..Report::default()
        };
        assert!(report.is_clean());
        assert_eq!(
            report.to_string(),
            "7 events, 0 runs, 0 blobs: nothing is wrong\nevent 7 ab\n"
        );
        for number in 0..=TOLD {
            report.fault(format!("fault\u{1b} {number}"));
        }
        let text = report.to_string();
        assert!(
            !report.is_clean() && text.starts_with("fault\\u{1b} 0\nfault"),
            "{text}"
        );
        assert!(text.ends_with("and 1 more\n7 events, 0 runs, 0 blobs: 1001 faults\nevent 7 ab\n"));
    }
}
