//! `nervectl events --archived`: the log as it was before old days went into files. nerved lists the files and opens
//! them; they are read here, each once, beside what the database still has, in the order of the log.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;

use super::Failure;
use crate::bus::client::{Client, EventFilter};
use crate::bus::storage_client::ArchiveFile;
use crate::model::time::day;
use crate::store::cold;
use crate::store::log::Logged;

/// Where events come from, each in the order of the log.
enum Source {
    /// A file that nothing was read of yet.
    Listed(ArchiveFile),
    /// A file.
    File(Box<cold::Reader>),
    /// The database, after an event.
    Live(VecDeque<Logged>, u64),
}

/// All events that a filter lets through, wherever they are, once each.
pub(super) struct Everywhere<'a> {
    client: &'a Client,
    filter: EventFilter,
    /// By the number of the event that is next, or that may be.
    sources: BTreeMap<(u64, usize), (Option<Logged>, Source)>,
    last: u64,
}

impl<'a> Everywhere<'a> {
    /// Those up to an event of the log.
    pub(super) async fn begin(client: &'a Client, filter: &EventFilter) -> Result<Self, Failure> {
        let (reference, files) = files(client, filter).await?;
        let mut filter = filter.clone();
        // By the name that the log has for it: in files nobody looks for digits at the end.
        filter.reference = filter.reference.map(|_| reference);
        let files = files.into_iter();
        let listed = |(index, file): (usize, ArchiveFile)| {
            ((file.first, index), (None, Source::Listed(file)))
        };
        let mut sources: BTreeMap<_, _> = (1..).zip(files).map(listed).collect();
        sources.insert((0, 0), (None, Source::Live(VecDeque::new(), 0)));
        Ok(Self {
            client,
            filter,
            sources,
            last: 0,
        })
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Result<Option<Logged>, Failure> {
        while let Some(((_, index), (event, source))) = self.sources.pop_first() {
            if let Some((next, source)) = self.advance(source).await? {
                let seq = next.seq;
                self.sources.insert((seq, index), (Some(next), source));
            }
            // What is being archived, or brought back, is in two places.
            if let Some(event) = event.filter(|event| event.seq > self.last) {
                self.last = event.seq;
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    async fn advance(&self, source: Source) -> Result<Option<(Logged, Source)>, Failure> {
        match source {
            Source::Listed(file) => {
                let opened = self.client.archive_file(&file.file).await?;
                let path = cold::folder(Path::new("/var/lib/nerve")).join(&file.file);
                let reader = cold::read_open(opened, &path).map_err(damaged)?;
                self.read(Box::new(reader.expecting(&file.digest)))
            }
            Source::File(reader) => self.read(reader),
            Source::Live(mut slice, mut after) => loop {
                if let Some(event) = slice.pop_front() {
                    return Ok(Some((event, Source::Live(slice, after))));
                }
                let filter = EventFilter {
                    after: Some(after),
                    ..self.filter.clone()
                };
                let (events, next) = self.client.events(filter).await?;
                if events.is_empty() && next <= after {
                    return Ok(None);
                }
                slice.extend(events);
                after = next;
            },
        }
    }

    fn read(&self, mut reader: Box<cold::Reader>) -> Result<Option<(Logged, Source)>, Failure> {
        for event in reader.by_ref() {
            let event = event.map_err(damaged)?;
            if lets_through(&self.filter, &event) {
                return Ok(Some((event, Source::File(reader))));
            }
        }
        Ok(None)
    }
}

/// The name that the log has for what a filter is about, and the files that may have such events.
pub(super) async fn files(
    client: &Client,
    filter: &EventFilter,
) -> Result<(String, Vec<ArchiveFile>), Failure> {
    let reference = filter.reference.as_deref().unwrap_or_default();
    let (reference, mut files) = client.archive_files(reference).await?;
    let since = filter.since.map(day).unwrap_or_default();
    let until = filter.until.map(day);
    files.retain(|file| file.day >= since && until.as_ref().is_none_or(|until| file.day <= *until));
    Ok((reference, files))
}

fn lets_through(filter: &EventFilter, event: &Logged) -> bool {
    let is = |wanted: &Option<String>, found: &str| wanted.as_ref().is_none_or(|one| one == found);
    is(&filter.source, &event.source)
        && is(&filter.kind, &event.event_type)
        && is(&filter.reference, &event.reference)
        && filter.since.is_none_or(|since| event.at >= since)
        && filter.until.is_none_or(|until| event.at <= until)
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn damaged(error: crate::store::Error) -> Failure {
    Failure::Internal(format!(
        "{error}; `nervectl store check` tells what else is wrong"
    ))
}
