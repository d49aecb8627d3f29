//! `org.nerve1.Store`, the answering half: history, archive, blobs and backups. What takes long is done in many short
//! jobs of the store, so that no run waits for it.
//!
//! Files come and go as descriptors, never as paths.

use std::os::fd::OwnedFd;

use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, interface};

use super::answers::{invalid, no_space, unreadable};
use super::error::Error;
use super::service::Manager;
use super::storage_words::{ArchiveFile, ArchiveOptions, ArchiveReport, ArchivedDay};
use super::upkeep::UnderWay;
use super::words::{EventFilter, LoggedEvent};
use crate::model::audit::{Audit, Verb};
use crate::model::hex::hex;
use crate::model::limits;
use crate::model::name::RunTail;
use crate::model::predecessor::Piece;
use crate::model::report::Report;
use crate::model::run::Caller;
use crate::os::clock;
use crate::os::descriptor::{Use, regular_file};
use crate::os::log::whole;
use crate::store::import::{Added, slices};
use crate::store::retention::FORGOTTEN;
use crate::store::upkeep::{Orders, Outcome, upkeep};
use crate::store::{self, Begin, Blobs, Digest, Handle, Store, archive, backup, check};

/// Blobs that one answer lists.
const BLOBS: usize = 1_000;

/// What the interface answers from.
#[derive(Debug, Clone)]
pub struct Storage(pub(super) Manager);

#[interface(name = "org.nerve1.Store")]
impl Storage {
    #[zbus(out_args("events", "next"))]
    async fn list_events(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        filter: EventFilter,
    ) -> Result<(Vec<LoggedEvent>, u64), Error> {
        self.0.authority.authorize(connection, &header).await?;
        let from = match (filter.after, filter.before) {
            (Some(after), None) => Begin::After(after),
            (None, before) => Begin::Before(before.unwrap_or(u64::MAX)),
            (Some(_), Some(_)) => {
                let text = "after and before exclude each other: events are read in one direction";
                return Err(Error::InvalidArgument(text.to_owned()));
            }
        };
        let limit = filter.limit.unwrap_or(limits::LIST_ROWS);
        let reference = match filter.reference {
            Some(text) => Some(self.reference(&text).await?.unwrap_or(text)),
            None => None,
        };
        let filter = store::EventFilter {
            source: filter.source,
            event_type: filter.kind,
            reference,
            since: filter.since,
            until: filter.until,
        };
        let read = self
            .0
            .store
            .call(move |store| store.list_events(&filter, from, limit));
        let slice = read.await.map_err(unreadable)?;
        let events = slice.events.into_iter().map(LoggedEvent::of).collect();
        Ok((events, slice.next))
    }

    #[zbus(signal)]
    pub(super) async fn events_appended(emitter: &SignalEmitter<'_>, seq: u64) -> zbus::Result<()>;

    #[zbus(out_args("events", "runs"))]
    async fn import(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        pieces: String,
    ) -> Result<(u32, u32), Error> {
        let caller = self.0.authority.authorize(connection, &header).await?;
        let pieces: Vec<Piece> = serde_json::from_str(&pieces).map_err(invalid)?;
        let (mut sum, mut failed) = (Added::default(), None);
        for slice in slices(pieces) {
            match self.0.store.call(move |store| store.import(&slice)).await {
                Ok(added) => {
                    sum.events += added.events;
                    sum.runs += added.runs;
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if sum != Added::default() || failed.is_some() {
            let why = failed.as_ref().map(|error| format!(", then: {error}"));
            let outcome = format!(
                "{} events, {} runs{}",
                sum.events,
                sum.runs,
                why.unwrap_or_default()
            );
            self.record(Verb::Import, Audit::NERVE, caller, &outcome)
                .await?;
        }
        if let Some(error) = failed {
            return Err(refused(error));
        }
        Ok((sum.events, sum.runs))
    }

    #[zbus(out_args("digest", "outcome"))]
    async fn put_blob(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        file: zbus::OwnedFd,
    ) -> Result<(String, String), Error> {
        let caller = self.0.authority.authorize(connection, &header).await?;
        let mut file = passed(file, Use::Read)?;
        let put = move |blobs: &Blobs| blobs.put_from(&mut file, limits::BLOB_BYTES);
        let (digest, outcome) = self.with_blobs(put).await?;
        let (digest, outcome) = (digest.to_string(), outcome.as_str());
        self.record(Verb::PutBlob, &digest, caller, outcome).await?;
        Ok((digest, outcome.to_owned()))
    }

    #[zbus(out_args("file"))]
    async fn get_blob(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        digest: &str,
    ) -> Result<zbus::OwnedFd, Error> {
        self.0.authority.authorize(connection, &header).await?;
        let wanted = Digest::parse(digest).ok_or_else(|| no_such_blob(digest))?;
        let file = self.with_blobs(move |blobs| blobs.open(&wanted)).await?;
        let file = file.ok_or_else(|| no_such_blob(digest))?;
        Ok(OwnedFd::from(file).into())
    }

    async fn blob_exists(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        digest: &str,
    ) -> Result<bool, Error> {
        self.0.authority.authorize(connection, &header).await?;
        let Some(digest) = Digest::parse(digest) else {
            return Ok(false);
        };
        self.with_blobs(move |blobs| Ok(blobs.exists(&digest)))
            .await
    }

    /// The blobs after this one, with size and with how many events refer to each: some of them, or none when there are
    /// no more.
    #[zbus(out_args("blobs"))]
    async fn list_blobs(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        after: &str,
    ) -> Result<Vec<(String, u64, u64)>, Error> {
        self.0.authority.authorize(connection, &header).await?;
        let after = Digest::parse(after);
        let list = move |blobs: &Blobs| blobs.list(after.as_ref(), BLOBS);
        let mut listed = Vec::new();
        for some in self.with_blobs(list).await?.chunks(BLOBS) {
            let some = some.to_vec();
            let count = move |store: &mut Store| store.count_references(some);
            listed.extend(self.0.store.call(count).await.map_err(unreadable)?);
        }
        let text = |(digest, size, count): (Digest, u64, u64)| (digest.to_string(), size, count);
        Ok(listed.into_iter().map(text).collect())
    }

    /// Copies the database to this file; the newest event in it, number and hash.
    #[zbus(out_args("seq", "hash"))]
    async fn backup(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        file: zbus::OwnedFd,
    ) -> Result<(u64, String), Error> {
        let caller = self.0.authority.authorize(connection, &header).await?;
        let file = passed(file, Use::Fill)?;
        let under_way = self.0.upkeep.begin("a backup")?;
        let work = move |store: &Handle| backup::backup(store, &file);
        let copied = self.at_length(under_way, work).await;
        let outcome = copied.as_ref().map_or_else(ToString::to_string, |_| done());
        self.record(Verb::Backup, Audit::NERVE, caller, &outcome)
            .await?;
        let head = copied?;
        Ok((head.seq, hex(&head.hash)))
    }

    /// What a check of the whole store found: a report as JSON.
    #[zbus(out_args("report"))]
    async fn check(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<String, Error> {
        let caller = self.0.authority.authorize(connection, &header).await?;
        let under_way = self.0.upkeep.begin("a check")?;
        let report = self.at_length(under_way, check::online).await;
        let outcome = match &report {
            Ok(Report { faults, more, .. }) => match faults.len() as u64 + more {
                0 => done(),
                count => format!("{count} faults"),
            },
            Err(error) => error.to_string(),
        };
        self.record(Verb::Check, Audit::NERVE, caller, &outcome)
            .await?;
        serde_json::to_string(&report?).map_err(|error| Error::Internal(error.to_string()))
    }

    async fn archive(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        options: ArchiveOptions,
    ) -> Result<ArchiveReport, Error> {
        let caller = self.0.authority.authorize(connection, &header).await?;
        let under_way = self.0.upkeep.begin("an archiving")?;
        let orders = Orders {
            older_than: options.older_than.unwrap_or(limits::ARCHIVE_AGE_US),
            max_days: options.max_days,
            vacuum: options.vacuum.unwrap_or(false),
            dry_run: options.dry_run.unwrap_or(false),
        };
        let is_rehearsal = orders.dry_run;
        let policy = self.0.definitions.policy();
        let now = clock::wall_us();
        let work = move |store: &Handle| upkeep(store, &orders, &policy, now);
        let archived = self.at_length(under_way, work).await;
        let outcome = match &archived {
            Ok(archived) => format!("files: {}", archived.days.len()),
            Err(error) => error.to_string(),
        };
        if !is_rehearsal {
            self.record(Verb::Archive, Audit::NERVE, caller, &outcome)
                .await?;
        }
        Ok(report(archived?))
    }

    #[zbus(out_args("reference", "files"))]
    async fn list_archive(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        reference: String,
    ) -> Result<(String, Vec<ArchiveFile>), Error> {
        self.0.authority.authorize(connection, &header).await?;
        let reference = match self.reference(&reference).await? {
            Some(known) => known,
            None => self.forgotten(reference).await?,
        };
        let listed = self.0.store.call(|store| store.archived()).await;
        let file = |listed: archive::Listed| ArchiveFile {
            day: listed.day,
            file: listed.file,
            first: listed.first,
            digest: listed.digest,
        };
        let files = listed.map_err(unreadable)?.into_iter().map(file);
        Ok((reference, files.collect()))
    }

    #[zbus(out_args("file"))]
    async fn open_archive(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        file: String,
    ) -> Result<zbus::OwnedFd, Error> {
        self.0.authority.authorize(connection, &header).await?;
        let open = move |store: &mut Store| store.open_archived(&file);
        let opened = self.0.store.call(open).await.map_err(unreadable)?;
        let opened = opened.ok_or_else(|| invalid("the archive has no such file"))?;
        Ok(OwnedFd::from(opened).into())
    }

    async fn restore(
        &self,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
        day: String,
    ) -> Result<u64, Error> {
        let caller = self.0.authority.authorize(connection, &header).await?;
        if !archive::is_day(&day) {
            return Err(invalid(format!(
                "{day:?} is no day; write it like 2026-11-20"
            )));
        }
        let under_way = self.0.upkeep.begin("a restoring")?;
        let of_day = day.clone();
        let work = move |store: &Handle| archive::restore(store, &of_day);
        let restored = self.at_length(under_way, work).await;
        let outcome = match &restored {
            Ok(Some(rows)) => format!("{rows} events"),
            Ok(None) => "nothing of it is archived".to_owned(),
            Err(error) => error.to_string(),
        };
        self.record(Verb::Restore, &day, caller, &outcome).await?;
        restored?.ok_or_else(|| {
            invalid(format!(
                "the archive has nothing of {day}; its files are in /var/lib/nerve/archive/logs"
            ))
        })
    }
}

impl Storage {
    /// What the log calls it: a word that it knows, or else the run that this is the tail of. None when nothing has been
    /// said about it yet, if it is anything.
    async fn reference(&self, text: &str) -> Result<Option<String>, Error> {
        let asked = text.to_owned();
        let is_known = self.0.store.call(move |store| store.is_reference(&asked));
        if is_known.await.map_err(unreadable)? {
            return Ok(Some(text.to_owned()));
        }
        match self.0.find(text).await {
            Ok(run) => Ok(Some(run.to_string())),
            // A whole id is one, whether the run has been forgotten or not.
            Err(Error::UnknownRun(_)) if text.len() == 32 => Ok(Some(text.to_ascii_lowercase())),
            Err(Error::UnknownRun(_) | Error::InvalidArgument(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The forgotten run that this is the tail of, as far as the database says that it went; or else the text.
    async fn forgotten(&self, text: String) -> Result<String, Error> {
        if text.parse::<RunTail>().is_err() {
            return Ok(text);
        }
        let tail = text.to_ascii_lowercase();
        let filter = store::EventFilter {
            event_type: Some(FORGOTTEN.to_owned()),
            ..store::EventFilter::default()
        };
        let (mut found, mut after) = (None, 0);
        loop {
            let filter = filter.clone();
            let read =
                move |store: &mut Store| store.list_events(&filter, Begin::After(after), u32::MAX);
            let slice = self.0.store.call(read).await.map_err(unreadable)?;
            let runs = slice.events.into_iter().map(|event| event.reference);
            for run in runs.filter(|run| run.ends_with(&tail)) {
                if found.as_ref().is_some_and(|other| *other != run) {
                    return Err(Error::AmbiguousRun(format!(
                        "several forgotten runs' ids end in {tail}; give more digits"
                    )));
                }
                found = Some(run);
            }
            if slice.next == after {
                return Ok(found.unwrap_or(text));
            }
            after = slice.next;
        }
    }

    async fn with_blobs<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Blobs) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let blobs = self.0.store.call(|store| Ok(store.blobs().clone())).await;
        let blobs = blobs.map_err(unreadable)?;
        blocking(move || job(&blobs)).await
    }

    /// Does what takes long. It goes on when the caller goes away.
    async fn at_length<T: Send + 'static>(
        &self,
        under_way: UnderWay,
        work: impl FnOnce(&Handle) -> Result<T, store::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let store = self.0.store.clone();
        blocking(move || {
            let done = work(&store);
            drop(under_way);
            done
        })
        .await
    }

    /// Who did what to the store.
    async fn record(
        &self,
        verb: Verb,
        subject: &str,
        by: Caller,
        outcome: &str,
    ) -> Result<(), Error> {
        let audit = Audit {
            verb,
            subject: subject.to_owned(),
            by: Some(by),
            reason: None,
            outcome: outcome.to_owned(),
            at: clock::wall_us(),
        };
        Ok(self.0.handle.audit(audit).await?)
    }
}

fn done() -> String {
    "done".to_owned()
}

/// Does what takes its time where nobody waits for it but who asked.
async fn blocking<T: Send + 'static>(
    job: impl FnOnce() -> Result<T, store::Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(job).await {
        Ok(done) => done.map_err(refused),
        Err(error) => Err(Error::Internal(error.to_string())),
    }
}

fn passed(descriptor: zbus::OwnedFd, usage: Use) -> Result<std::fs::File, Error> {
    regular_file(descriptor.into(), usage)
        .map_err(|error| Error::InvalidArgument(format!("the descriptor {error}")))
}

fn no_such_blob(digest: &str) -> Error {
    Error::UnknownBlob(format!(
        "no such blob: {}; `nervectl blob list` lists those that there are",
        digest.trim().chars().take(80).collect::<String>()
    ))
}

/// Why the store did not do something.
fn refused(error: store::Error) -> Error {
    let why = whole(&error);
    match error {
        store::Error::TooLong { .. } | store::Error::Import(_) => Error::InvalidArgument(why),
        store::Error::NotCopied(_) => Error::Busy(why),
        error if error.is_full() => no_space(&why, "repeat it when there is room"),
        store::Error::Sqlite(_) => {
            tracing::error!("the store failed: {why}");
            Error::Unknown(why)
        }
        error => unreadable(error),
    }
}

fn report(done: Outcome) -> ArchiveReport {
    let day = |day: archive::Archived| ArchivedDay {
        day: day.day,
        file: day.file.display().to_string(),
        rows: day.rows,
    };
    ArchiveReport {
        days: done.days.into_iter().map(day).collect(),
        forgotten: done.forgotten,
        blobs: done.blobs,
        freed: done.freed,
    }
}
