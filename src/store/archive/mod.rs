//! Old events go into files and come back: whole UTC days, from the oldest on.
//!
//! A file is written under another name, synced, renamed to a name that was free, and read again; then it is listed in
//! the table `archive`, and only then its events are deleted, a few at a time, each time together with the watermark
//! `cleared`. So an event is in the database or in a listed file, for a while in both, and never in neither. What a
//! crash left half-done the next archiving completes ([`Work::tidy`]): listed files are cleared to their end, and files that
//! nobody lists are removed when the database has all their events.
//!
//! Runs on a thread of its own and has the store do many short jobs.

mod jobs;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::blob::{self, Blobs};
use super::cold::{self, Name, Summary};
use super::log::Logged;
use super::{Digest, Error, Handle, Store};
use crate::model::time::{DAY_US, day, day_start};
use crate::os::failpoint;
pub use jobs::Listed;
use jobs::{Gone, Span};

/// The event that says that a file is listed; its reference is the day.
pub const ARCHIVED: &str = "archived";
/// The event that says that a day's files are listed no more.
pub const RESTORED: &str = "restored";

/// One job of the store writes or compares so many rows, …
const BATCH: usize = 512;
/// …and takes or hands out so many bytes of events.
const SLICE_BYTES: usize = 1024 * 1024;

/// What is to be archived.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Days that had ended by then: µs since the epoch.
    pub ended_by: u64,
    /// The oldest so many.
    pub max_days: Option<u32>,
    /// Whether the files are compressed.
    pub compressed: bool,
    /// Nothing is done; what would be is said.
    pub dry_run: bool,
}

/// What became of a day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archived {
    pub day: String,
    /// The file's path.
    pub file: PathBuf,
    /// Its events.
    pub rows: u64,
}

/// A moment between two steps, at which a test has nerve die.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Written,
    Renamed,
    Verified,
    Listed,
    Cleared,
    Reopened,
    Returned,
    Unlisted,
}

type Hook<'a> = &'a dyn Fn(Step) -> Result<(), Error>;

/// Where nerved can be made to die.
#[expect(clippy::unnecessary_wraps, reason = "a test's hook stops the work")]
fn moment(step: Step) -> Result<(), Error> {
    failpoint!("F31", step == Step::Written);
    failpoint!("F32", step == Step::Renamed);
    failpoint!("F33", step == Step::Verified);
    failpoint!("F34", step == Step::Listed);
    failpoint!("F35", step == Step::Cleared);
    failpoint!("F36", step == Step::Reopened);
    failpoint!("F37", step == Step::Returned);
    failpoint!("F38", step == Step::Unlisted);
    Ok(())
}

/// Archives the days of a plan.
///
/// # Errors
/// When a file or the database does not take it, or what is to be archived is damaged. The days before are archived.
pub fn archive(store: &Handle, plan: &Plan) -> Result<Vec<Archived>, Error> {
    Work::new(store, &moment)?.archive(plan)
}

/// Brings a day back into the database; returns how many events its files had, `None` when there are no files of it.
///
/// # Errors
/// When a file is missing or damaged, or the database does not take it; then the day is archived as before.
pub fn restore(store: &Handle, day: &str) -> Result<Option<u64>, Error> {
    Work::new(store, &moment)?.restore(day)
}

pub(super) struct Work<'a> {
    store: &'a Handle,
    folder: PathBuf,
    blobs: Blobs,
    hook: Hook<'a>,
}

impl<'a> Work<'a> {
    pub(super) fn new(store: &'a Handle, hook: Hook<'a>) -> Result<Self, Error> {
        let (directory, blobs) = store
            .call_and_wait(|store| Ok((store.directory().to_owned(), store.blobs().clone())))?;
        Ok(Self {
            store,
            folder: cold::folder(&directory),
            blobs,
            hook,
        })
    }

    pub(super) fn archive(&self, plan: &Plan) -> Result<Vec<Archived>, Error> {
        let mut done = Vec::new();
        if !plan.dry_run {
            make_directories(&self.folder)?;
            self.tidy()?;
        }
        let mut from = 0;
        while plan.max_days.is_none_or(|most| done.len() < most as usize) {
            let ended_by = plan.ended_by;
            let Some(start) = self
                .store
                .call_and_wait(move |store| store.next_day(from, ended_by))?
            else {
                break;
            };
            from = start + DAY_US;
            done.extend(self.one_day(start, plan)?);
        }
        Ok(done)
    }

    fn one_day(&self, start: u64, plan: &Plan) -> Result<Option<Archived>, Error> {
        let name = self.free_name(start, plan.compressed)?;
        let path = self.folder.join(name.to_string());
        let archived = |rows| Archived {
            day: name.day.clone(),
            file: path.clone(),
            rows,
        };
        if plan.dry_run {
            let mut rows = 0;
            self.each_of_day(start, |_| {
                rows += 1;
                Ok(())
            })?;
            return Ok((rows > 0).then(|| archived(rows)));
        }
        let unfinished = self.folder.join(name.unfinished());
        let written = self.write(start, &unfinished, plan.compressed);
        let Some(summary) = written.inspect_err(|_| remove_what_is_there(&unfinished))? else {
            return Ok(None);
        };
        (self.hook)(Step::Written)?;
        let renamed = renameat_with(CWD, &unfinished, CWD, &path, RenameFlags::NOREPLACE);
        renamed.map_err(|error| failed(&path)(error.into()))?;
        blob::sync_directory(&self.folder).map_err(failed(&self.folder))?;
        (self.hook)(Step::Renamed)?;
        let found = cold::verify(&path, None);
        let found = found.inspect_err(|_| remove_what_is_there(&path))?;
        if found != summary {
            remove_what_is_there(&path);
            return Err(Error::Cold {
                path,
                why: format!("it holds {found:?}, and {summary:?} was written"),
            });
        }
        (self.hook)(Step::Verified)?;
        let listed = Listed {
            day: name.day.clone(),
            file: name.to_string(),
            rows: summary.rows,
            first: summary.first,
            last: summary.last,
            digest: summary.digest,
            cleared: 0,
        };
        let (row, part) = (listed.clone(), name.part);
        self.store
            .call_and_wait(move |store| store.list(&row, part))?;
        (self.hook)(Step::Listed)?;
        self.clear(&listed)?;
        Ok(Some(archived(listed.rows)))
    }

    /// A name that no file of the day has or had.
    fn free_name(&self, start: u64, compressed: bool) -> Result<Name, Error> {
        let day = day(start);
        let listed = self.store.call_and_wait(Store::archived_parts(&day))?;
        let mut name = Name {
            day,
            part: listed + 1,
            compressed,
        };
        let is_there = |name: &Name| {
            let other = Name {
                compressed: !name.compressed,
                ..name.clone()
            };
            [name, &other]
                .into_iter()
                .any(|name| fs::symlink_metadata(self.folder.join(name.to_string())).is_ok())
        };
        while is_there(&name) {
            name.part += 1;
        }
        Ok(name)
    }

    /// Writes what can go of a day; `None`, and no file, when that is nothing.
    fn write(&self, start: u64, path: &Path, compressed: bool) -> Result<Option<Summary>, Error> {
        let mut writer = None;
        self.each_of_day(start, |event| {
            let writer = match &mut writer {
                Some(writer) => writer,
                none => none.insert(cold::Writer::create(path.to_owned(), compressed)?),
            };
            writer.write(event)
        })?;
        writer.map(cold::Writer::finish).transpose()
    }

    /// The events of a day that can go, in order.
    fn each_of_day(
        &self,
        start: u64,
        mut take: impl FnMut(&Logged) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut span = Span::default();
        let mut from = (start, 0);
        loop {
            let (part, next) = self
                .store
                .call_and_wait(move |store| store.span(from, start + DAY_US))?;
            span = span.with(part);
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        let Span(Some((first, last))) = span else {
            return Ok(());
        };
        let mut after = first - 1;
        while after < last {
            let (events, next) = self
                .store
                .call_and_wait(move |store| store.slice(start, after, last))?;
            for event in &events {
                take(event)?;
            }
            after = next;
        }
        Ok(())
    }

    /// Deletes what a listed file has from the database.
    fn clear(&self, listed: &Listed) -> Result<(), Error> {
        let path = self.folder.join(&listed.file);
        let mut batch = Vec::with_capacity(BATCH);
        let clear = |batch: &mut Vec<Gone>| {
            let (file, gone) = (listed.file.clone(), std::mem::take(batch));
            self.store
                .call_and_wait(move |store| store.clear(&file, &gone))
        };
        for event in cold::read(&path)?.expecting(&listed.digest) {
            let event = event?;
            if event.seq <= listed.cleared {
                continue;
            }
            batch.push(Gone {
                seq: event.seq,
                hash: event.hash,
                blobs: self.blobs_of(&event),
            });
            if batch.len() == BATCH {
                clear(&mut batch)?;
                (self.hook)(Step::Cleared)?;
            }
        }
        if !batch.is_empty() {
            clear(&mut batch)?;
        }
        Ok(())
    }

    /// The blobs that an event has left its text to, or names.
    fn blobs_of(&self, event: &Logged) -> Vec<String> {
        let named = super::collect::digests(&event.payload);
        let own = event.blob.as_deref().and_then(Digest::parse);
        let named = named.filter(|digest| self.blobs.path(digest).exists());
        own.into_iter()
            .chain(named)
            .map(|digest| digest.to_string())
            .collect()
    }

    /// Completes what a crash left half-done.
    fn tidy(&self) -> Result<(), Error> {
        let listed = self.store.call_and_wait(|store| store.archived())?;
        for file in listed.iter().filter(|file| file.cleared < file.last) {
            cold::verify(&self.folder.join(&file.file), Some(&file.digest))?;
            self.clear(file)?;
        }
        let mut removed = false;
        for entry in fs::read_dir(&self.folder).map_err(failed(&self.folder))? {
            let entry = entry.map_err(failed(&self.folder))?;
            let (path, name) = (entry.path(), entry.file_name());
            let Some(name) = name.to_str() else { continue };
            let is_listed = || listed.iter().any(|file| file.file == name);
            let is_left_over = if Name::is_unfinished(name) {
                true
            } else if Name::parse(name).is_some() && !is_listed() {
                self.is_in_database(&path)?
            } else {
                false
            };
            if is_left_over {
                fs::remove_file(&path).map_err(failed(&path))?;
                removed = true;
            }
        }
        if removed {
            blob::sync_directory(&self.folder).map_err(failed(&self.folder))?;
        }
        Ok(())
    }

    /// Whether the database has all events of a file that nobody lists. Such a file stays and is in nobody's way
    /// otherwise: it may be all that is left of something.
    fn is_in_database(&self, path: &Path) -> Result<bool, Error> {
        let stays = |why: String| {
            tracing::warn!(
                "{} is a file of the archive that nerve did not list, and stays: {why}",
                path.display()
            );
            Ok(false)
        };
        let mut batch = Vec::with_capacity(BATCH);
        let mut events = cold::read(path)?;
        loop {
            let next = events.next();
            let is_end = next.is_none();
            match next {
                Some(Ok(event)) => batch.push(event.head()),
                Some(Err(error)) => return stays(error.to_string()),
                None => {}
            }
            if batch.len() == BATCH || is_end {
                let heads = std::mem::take(&mut batch);
                if !self
                    .store
                    .call_and_wait(move |store| store.has_all(&heads))?
                {
                    return stays("it has events that the database has not".to_owned());
                }
            }
            if is_end {
                return Ok(true);
            }
        }
    }

    pub(super) fn restore(&self, day: &str) -> Result<Option<u64>, Error> {
        let listed = self.store.call_and_wait(|store| store.archived())?;
        let files: Vec<Listed> = listed.into_iter().filter(|file| file.day == day).collect();
        if files.is_empty() {
            return Ok(None);
        }
        for file in &files {
            cold::verify(&self.folder.join(&file.file), Some(&file.digest))?;
        }
        // From now on it is as if they had never been cleared: what a crash leaves of this the next archiving clears.
        let of_day = day.to_owned();
        self.store
            .call_and_wait(move |store| store.reopen(&of_day))?;
        (self.hook)(Step::Reopened)?;
        for file in &files {
            self.bring_back(file)?;
        }
        (self.hook)(Step::Returned)?;
        let rows = files.iter().map(|file| file.rows).sum();
        let of_day = day.to_owned();
        self.store
            .call_and_wait(move |store| store.unlist(&of_day, rows))?;
        (self.hook)(Step::Unlisted)?;
        for file in &files {
            let path = self.folder.join(&file.file);
            fs::remove_file(&path).map_err(failed(&path))?;
        }
        blob::sync_directory(&self.folder).map_err(failed(&self.folder))?;
        Ok(Some(rows))
    }

    fn bring_back(&self, file: &Listed) -> Result<(), Error> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let put = |batch: &mut Vec<Logged>| {
            let events = std::mem::take(batch);
            self.store
                .call_and_wait(move |store| store.put_back(&events))
        };
        for event in cold::read(&self.folder.join(&file.file))?.expecting(&file.digest) {
            let event = event?;
            bytes += event.payload.len();
            batch.push(event);
            if batch.len() == BATCH || bytes > SLICE_BYTES {
                put(&mut batch)?;
                bytes = 0;
            }
        }
        put(&mut batch)
    }
}

/// Whether a text is a day, as those of the archive are written.
#[must_use]
pub fn is_day(text: &str) -> bool {
    day_start(text).is_some()
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path, source }
}

/// What is left when this fails too is removed by the next archiving.
fn remove_what_is_there(path: &Path) {
    let _ = fs::remove_file(path);
}

/// The folder, with what is above it in nerve's own.
fn make_directories(folder: &Path) -> Result<(), Error> {
    let above = folder.parent().unwrap_or(folder);
    for (directory, parent) in [(above, above.parent()), (folder, Some(above))] {
        match fs::create_dir(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => {
                made.map_err(failed(directory))?;
                let parent = parent.unwrap_or(above);
                blob::sync_directory(parent).map_err(failed(parent))?;
            }
        }
    }
    Ok(())
}
