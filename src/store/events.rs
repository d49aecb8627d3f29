//! The log as people ask for it: slices by number, in either direction, each a short piece of work.

use rusqlite::Row;
use rusqlite::types::ToSql;

use super::log::Logged;
use super::{Error, Store, sql, unsigned};

/// So many events one slice looks at.
const LOOKED_AT: u32 = 2_000;
/// So many events one slice holds…
const ROWS: u32 = 2_000;
/// …and so much of their payloads, but at least one event.
const BYTES: usize = 4 * 1024 * 1024;

/// Which events to read; by default all.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// Of this source only.
    pub source: Option<String>,
    /// Of this type only.
    pub event_type: Option<String>,
    /// About this run, workflow or day, or `nerve`, only.
    pub reference: Option<String>,
    /// Then or later, µs since the epoch.
    pub since: Option<u64>,
    /// Then or earlier.
    pub until: Option<u64>,
}

/// Where a slice begins, and where to it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// After this number, oldest first.
    After(u64),
    /// Before this number, newest first.
    Before(u64),
}

/// Some of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// In the order in which they were looked at.
    pub events: Vec<Logged>,
    /// The number of the last that was looked at: the next slice begins there. It is where this one began when there was
    /// nothing to look at.
    pub next: u64,
}

impl Store {
    /// One slice of the log, with at most `limit` events.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn list_events(
        &self,
        filter: &EventFilter,
        from: Begin,
        limit: u32,
    ) -> Result<Slice, Error> {
        let by_time = self.is_short(filter)?;
        let mut select = self
            .connection
            .prepare_cached(&statement(filter, from, by_time))?;
        let (Begin::After(begin) | Begin::Before(begin)) = from;
        let (since, until) = filter.window();
        let mut parameters: Vec<(&str, &dyn ToSql)> = Vec::new();
        let begin_at = sql(begin);
        parameters.push((":begin", &begin_at));
        if let Some(reference) = &filter.reference {
            parameters.push((":ref", reference));
        }
        if by_time {
            parameters.extend([(":since", &since as &dyn ToSql), (":until", &until)]);
        }
        let mut rows = select.query(&*parameters)?;
        let mut slice = Slice {
            events: Vec::new(),
            next: begin,
        };
        let (mut looked_at, mut bytes) = (0, 0);
        let most = usize::try_from(limit.min(ROWS)).unwrap_or(usize::MAX);
        while looked_at < LOOKED_AT && slice.events.len() < most && bytes < BYTES {
            let Some(row) = rows.next()? else {
                break;
            };
            looked_at += 1;
            slice.next = unsigned(row, "seq")?;
            if filter.matches(row)? {
                let event = Logged::of(row)?;
                bytes += event.payload.len();
                slice.events.push(event);
            }
        }
        Ok(slice)
    }

    /// Whether this is said of events, or is a workflow: its events may all be in the archive.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn is_reference(&self, text: &str) -> Result<bool, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT 1 FROM events WHERE ref = ?1 UNION ALL SELECT 1 FROM workflows WHERE name = ?1
             UNION ALL SELECT 1 FROM workflow_runs WHERE workflow = ?1",
        )?;
        Ok(select.exists([text])?)
    }

    /// Whether the events of the filter's time are few: then the index on time leads to them. Times need not grow with
    /// the numbers, since clocks are set back and old histories are imported, so there is no other way to know where in
    /// the log they are.
    fn is_short(&self, filter: &EventFilter) -> Result<bool, Error> {
        if filter.since.is_none() && filter.until.is_none() || filter.reference.is_some() {
            return Ok(false);
        }
        let (since, until) = filter.window();
        let mut count = self.connection.prepare_cached(
            "SELECT count(*) FROM (SELECT 1 FROM events WHERE at BETWEEN ?1 AND ?2 LIMIT ?3)",
        )?;
        let found: u32 = count.query_row((since, until, LOOKED_AT + 1), |row| row.get(0))?;
        Ok(found <= LOOKED_AT)
    }
}

impl EventFilter {
    fn window(&self) -> (i64, i64) {
        (
            sql(self.since.unwrap_or(0)),
            self.until.map_or(i64::MAX, sql),
        )
    }

    fn matches(&self, row: &Row<'_>) -> Result<bool, Error> {
        let is = |column: &str, wanted: &Option<String>| match wanted {
            Some(wanted) => {
                Ok::<_, Error>(row.get_ref(column)?.as_bytes().ok() == Some(wanted.as_bytes()))
            }
            None => Ok(true),
        };
        let (since, until) = self.window();
        let at: i64 = row.get("at")?;
        Ok((since..=until).contains(&at)
            && is("source", &self.source)?
            && is("type", &self.event_type)?)
    }
}

fn statement(filter: &EventFilter, from: Begin, by_time: bool) -> String {
    let (bound, order) = match from {
        Begin::After(_) => (">", "ASC"),
        Begin::Before(_) => ("<", "DESC"),
    };
    let columns = Logged::COLUMNS;
    let of = if filter.reference.is_some() {
        "AND ref = :ref"
    } else {
        ""
    };
    let in_time = if by_time {
        "AND seq IN (SELECT seq FROM events WHERE at BETWEEN :since AND :until)"
    } else {
        ""
    };
    format!(
        "SELECT {columns} FROM events WHERE seq {bound} :begin {of} {in_time} ORDER BY seq {order}"
    )
}

#[cfg(test)]
mod tests {
    use super::super::log::{AUDIT, Entry, SYSTEM, WORKFLOW};
    use super::*;

    /// Events with these sources, types, references and times.
    fn store(
        entries: impl IntoIterator<Item = (&'static str, &'static str, String, u64)>,
    ) -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        let transaction = store.connection.transaction().unwrap();
        for (source, event_type, reference, at) in entries {
            let entry = Entry {
                source,
                event_type,
                reference: &reference,
                payload: "{}",
                blob: None,
                at,
            };
            store.head.append(&transaction, &entry).unwrap();
        }
        transaction.commit().unwrap();
        (directory, store)
    }

    fn read_all(store: &Store, filter: &EventFilter, from: Begin, limit: u32) -> (Vec<u64>, u32) {
        let (mut from, mut found, mut slices) = (from, Vec::new(), 0);
        loop {
            let slice = store.list_events(filter, from, limit).unwrap();
            assert!(slice.events.len() <= limit as usize);
            let next = match from {
                Begin::After(_) => Begin::After(slice.next),
                Begin::Before(_) => Begin::Before(slice.next),
            };
            found.extend(slice.events.iter().map(|event| event.seq));
            if next == from {
                return (found, slices);
            }
            (from, slices) = (next, slices + 1);
        }
    }

    // Parity 100, 101.
    #[test]
    fn every_filter_gives_what_it_says_in_either_direction() {
        let sources = [WORKFLOW, SYSTEM, AUDIT];
        let types = ["queued", "ended"];
        // The clock is set back in the middle.
        let entry = |number: usize| {
            let at = if number < 50 {
                100 + number
            } else {
                70 + number
            };
            (
                sources[number % 3],
                types[number / 3 % 2],
                format!("r{}", number % 5),
                at as u64,
            )
        };
        let (_directory, store) = store((1..=100).map(entry));
        let text = |text: Option<&str>| text.map(str::to_owned);
        let mut found = 0;
        for source in [None, Some(AUDIT), Some("sense")] {
            for event_type in [None, Some("ended")] {
                for reference in [None, Some("r2"), Some("absent")] {
                    for (since, until) in [
                        (None, None),
                        (Some(110), Some(130)),
                        (None, Some(110)),
                        (Some(149), None),
                        (Some(130), Some(110)),
                    ] {
                        let filter = EventFilter {
                            source: text(source),
                            event_type: text(event_type),
                            reference: text(reference),
                            since,
                            until,
                        };
                        let is_wanted = |number: &u64| {
                            let (its_source, its_type, its_reference, at) =
                                entry(usize::try_from(*number).unwrap());
                            source.is_none_or(|wanted| wanted == its_source)
                                && event_type.is_none_or(|wanted| wanted == its_type)
                                && reference.is_none_or(|wanted| wanted == its_reference)
                                && since.is_none_or(|since| at >= since)
                                && until.is_none_or(|until| at <= until)
                        };
                        let mut expected: Vec<u64> = (1..=100).filter(is_wanted).collect();
                        for limit in [3, 1_000] {
                            assert_eq!(
                                read_all(&store, &filter, Begin::After(0), limit).0,
                                expected,
                                "{filter:?}"
                            );
                        }
                        expected.reverse();
                        assert_eq!(
                            read_all(&store, &filter, Begin::Before(u64::MAX), 3).0,
                            expected,
                            "{filter:?}"
                        );
                        found += expected.len();
                    }
                }
            }
        }
        assert!(found > 300, "{found}");
    }

    #[test]
    fn a_workflow_is_known_when_none_of_its_events_is_there() {
        let (_directory, store) = store([(WORKFLOW, "queued", "r".to_owned(), 5)]);
        let rows = "INSERT INTO definitions VALUES ('d', x'00');
             INSERT INTO workflows VALUES ('feed', 'd');
             INSERT INTO workflow_runs (run, tail, workflow, status, killing, rounds, dry_run, trigger, created_at)
                 VALUES ('00feed', 'deef00', 'cafe', 'completed', 0, 0, 0, '{}', 5);";
        store.connection.execute_batch(rows).unwrap();
        for (text, is_known) in [("r", true), ("feed", true), ("cafe", true), ("FEED", false)] {
            assert_eq!(store.is_reference(text).unwrap(), is_known, "{text}");
        }
    }

    #[test]
    fn a_slice_is_short_even_where_little_is_found() {
        let many = LOOKED_AT * 2 + 5;
        let rare = [LOOKED_AT - 7, 2 * LOOKED_AT - 7].map(u64::from);
        let entry = |number| {
            (
                WORKFLOW,
                if number == LOOKED_AT - 7 || number == 2 * LOOKED_AT - 7 {
                    "rare"
                } else {
                    "queued"
                },
                "r".to_owned(),
                5,
            )
        };
        let (_directory, store) = store((1..=many).map(entry));
        for (since, reference) in [(None, None), (Some(5), None), (None, Some("r".to_owned()))] {
            let filter = EventFilter {
                event_type: Some("rare".to_owned()),
                since,
                reference,
                ..EventFilter::default()
            };
            assert_eq!(
                read_all(&store, &filter, Begin::After(0), 10),
                (rare.to_vec(), 3)
            );
            assert_eq!(
                read_all(&store, &filter, Begin::Before(u64::MAX), 10),
                (vec![rare[1], rare[0]], 3)
            );
        }
        let slice = store
            .list_events(&EventFilter::default(), Begin::After(0), u32::MAX)
            .unwrap();
        assert_eq!(slice.events.len(), ROWS as usize);
    }

    #[test]
    fn a_few_events_in_a_long_log_are_found_by_their_time() {
        let entry = |number: u32| (WORKFLOW, "queued", "r".to_owned(), u64::from(number));
        let (_directory, store) = store((1..=LOOKED_AT * 3).map(entry));
        let filter = EventFilter {
            since: Some(17),
            until: Some(19),
            ..EventFilter::default()
        };
        for (from, expected) in [
            (Begin::After(0), [17, 18, 19]),
            (Begin::Before(u64::MAX), [19, 18, 17]),
        ] {
            assert_eq!(read_all(&store, &filter, from, 10), (expected.to_vec(), 1));
            let explain = format!("EXPLAIN QUERY PLAN {}", statement(&filter, from, true));
            let mut explain = store.connection.prepare(&explain).unwrap();
            let (begin, since, until) = (5, 17, 19);
            let plan: Vec<String> = explain
                .query_map(
                    rusqlite::named_params! {":begin": begin, ":since": since, ":until": until},
                    |row| row.get("detail"),
                )
                .unwrap()
                .map(Result::unwrap)
                .collect();
            let plan = plan.join("\n");
            assert!(
                plan.contains("events_by_time")
                    && !plan.contains("B-TREE")
                    && !plan.contains("SCAN"),
                "{plan}"
            );
        }
    }
}
