//! All events in their order, from the archive's files and the database: dense from 1, each the one that followed.

use std::collections::BTreeSet;
use std::iter::Peekable;

use rusqlite::Connection;

use super::Place;
use super::rows::Tables;
use crate::model::report::Report;
use crate::store::log::{Head, Logged};
use crate::store::{Digest, Error, cold, unsigned};

/// A file of the archive that is being read.
struct OpenFile {
    listed: Listed,
    events: Peekable<cold::Reader>,
    rows: u64,
    last: u64,
    /// Those that its events refer to and that are kept for them.
    blobs: BTreeSet<String>,
}

/// A file as the table `archive` has it.
struct Listed {
    file: String,
    rows: u64,
    first: u64,
    last: u64,
    digest: String,
    /// The database has none of its events up to this one.
    cleared: u64,
}

/// Goes through all events and hands each to the tables; the newest one.
pub(super) fn walk(
    connection: &Connection,
    place: &Place<'_>,
    report: &mut Report,
    tables: &mut Tables<'_>,
) -> Result<Head, Error> {
    let mut archive = Archive {
        connection,
        place,
        waiting: listed(connection)?,
        open: Vec::new(),
    };
    let mut select = connection.prepare(&format!(
        "SELECT {} FROM events ORDER BY seq",
        Logged::COLUMNS
    ))?;
    let mut rows = select.query([])?;
    let mut live = rows.next()?.map(Logged::of).transpose()?;
    let mut head = Head::default();
    loop {
        let archived = archive.next_up_to(live.as_ref().map(|event| event.seq), report)?;
        let event = match (archived, live.take()) {
            (Some(archived), Some(same)) if archived.seq == same.seq => {
                // It is in both until it is cleared.
                if archived != same {
                    let seq = same.seq;
                    report.fault(format!("event {seq} is another one in the archive"));
                }
                live = rows.next()?.map(Logged::of).transpose()?;
                archived
            }
            (Some(archived), later) => {
                live = later;
                archived
            }
            (None, Some(event)) => {
                live = rows.next()?.map(Logged::of).transpose()?;
                event
            }
            (None, None) => return Ok(head),
        };
        report.events += 1;
        if event.seq <= head.seq {
            report.fault(format!("event {} is there twice", event.seq));
            continue;
        }
        follow(&mut head, &event, report, tables);
        if let Some(blob) = &event.blob {
            refer(blob, event.seq, place, report);
        }
        tables.take(&event, report)?;
    }
}

/// Whether the event is the one that followed.
fn follow(head: &mut Head, event: &Logged, report: &mut Report, tables: &mut Tables<'_>) {
    let (before, seq) = (head.seq, event.seq);
    if seq > before + 1 {
        let (first, last) = (before + 1, seq - 1);
        report.fault(match last - before {
            1 => format!("event {first} is missing"),
            _ => format!("events {first} to {last} are missing"),
        });
        tables.miss_events();
    } else if head.after(&event.entry()) != event.head() {
        report.fault(format!(
            "event {seq} is not what it was, or does not follow event {before}: its hash is another"
        ));
    }
    *head = event.head();
}

fn refer(blob: &str, seq: u64, place: &Place<'_>, report: &mut Report) {
    match Digest::parse(blob) {
        Some(digest) if place.blobs.exists(&digest) => {}
        Some(digest) => report.fault(format!("blob {digest} of event {seq} is missing")),
        None => report.fault(format!("event {seq} refers to a blob that is none")),
    }
}

/// The files, those that begin last first.
fn listed(connection: &Connection) -> Result<Vec<Listed>, Error> {
    let mut select = connection.prepare(
        "SELECT file, rows, first, last, digest, cleared FROM archive ORDER BY first DESC",
    )?;
    let files = select.query_map([], |row| {
        Ok(Listed {
            file: row.get("file")?,
            rows: unsigned(row, "rows")?,
            first: unsigned(row, "first")?,
            last: unsigned(row, "last")?,
            digest: row.get("digest")?,
            cleared: unsigned(row, "cleared")?,
        })
    })?;
    Ok(files.collect::<Result<_, _>>()?)
}

/// The archive's events, in order. Only those files are open whose turn it is.
struct Archive<'a> {
    connection: &'a Connection,
    place: &'a Place<'a>,
    waiting: Vec<Listed>,
    open: Vec<OpenFile>,
}

impl Archive<'_> {
    /// The next event, unless it comes after this one.
    fn next_up_to(
        &mut self,
        bound: Option<u64>,
        report: &mut Report,
    ) -> Result<Option<Logged>, Error> {
        loop {
            let mut least: Option<(u64, usize)> = None;
            let mut ended = None;
            for (index, file) in self.open.iter_mut().enumerate() {
                match file.events.peek() {
                    Some(Ok(event)) => {
                        let next = (event.seq, index);
                        least = Some(least.map_or(next, |least| least.min(next)));
                    }
                    Some(Err(_)) | None => ended = Some(index),
                }
            }
            if let Some(index) = ended {
                let file = self.open.swap_remove(index);
                self.close(file, report)?;
                continue;
            }
            let before = [least.map(|(seq, _)| seq), bound];
            let before = before.into_iter().flatten().min();
            let is_due = |next: &Listed| before.is_none_or(|before| next.first <= before);
            if let Some(next) = self.waiting.pop_if(|next| is_due(next)) {
                self.open(next, report);
                continue;
            }
            let Some((_, index)) = least.filter(|(seq, _)| bound.is_none_or(|bound| *seq <= bound))
            else {
                return Ok(None);
            };
            let file = &mut self.open[index];
            let Some(Ok(event)) = file.events.next() else {
                return Ok(None);
            };
            file.rows += 1;
            file.last = event.seq;
            if event.seq <= file.listed.cleared {
                file.blobs.extend(event.blob.clone());
            }
            return Ok(Some(event));
        }
    }

    fn open(&mut self, listed: Listed, report: &mut Report) {
        let name = cold::Name::parse(&listed.file);
        let path = name.map(|name| self.place.archive.join(name.to_string()));
        let Some(path) = path else {
            report.fault(format!("{:?} is no file of the archive", listed.file));
            return;
        };
        match cold::read(&path) {
            Ok(events) => self.open.push(OpenFile {
                events: events.expecting(&listed.digest).peekable(),
                listed,
                rows: 0,
                last: 0,
                blobs: BTreeSet::new(),
            }),
            Err(error) => report.fault(error.to_string()),
        }
    }

    /// What is to be said of a file when all of it was read.
    fn close(&self, mut file: OpenFile, report: &mut Report) -> Result<(), Error> {
        if let Some(Err(error)) = file.events.next() {
            report.fault(error.to_string());
            return Ok(());
        }
        let Listed {
            file: name,
            rows,
            last,
            ..
        } = file.listed;
        if (file.rows, file.last) != (rows, last) {
            report.fault(format!("the archive's file {name} is not as it is listed"));
        }
        // Besides them there may be some that are named in other ways.
        let mut select = self
            .connection
            .prepare_cached("SELECT blob FROM archived_blobs WHERE file = ?1")?;
        let mut rows = select.query([&name])?;
        while let Some(row) = rows.next()? {
            let blob: String = row.get(0)?;
            let digest = Digest::parse(&blob);
            if !digest.is_some_and(|digest| self.place.blobs.exists(&digest)) {
                report.fault(format!(
                    "blob {blob:?} of the archive's file {name} is missing"
                ));
            }
            file.blobs.remove(&blob);
        }
        for blob in file.blobs {
            report.fault(format!(
                "blob {blob} of the archive's file {name} is not listed"
            ));
        }
        Ok(())
    }
}
