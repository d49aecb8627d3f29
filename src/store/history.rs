//! What happened to a run, wherever it is kept: in the database, in the archive's files, or some in these and some in
//! those.
//!
//! A run that has no day in the archive is read by one short job of the store. For the others the files of their days
//! are read, on a thread of its own. What the database has and which files are listed is asked at once, so that nothing
//! is missed that moves meanwhile; what is in both counts once.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use super::archive::Listed;
use super::log::{AUDIT, Logged};
use super::read::{self, EventRow, RunRow};
use super::rounds::{Round, Rounds, ThreadRange, round_of};
use super::{Blobs, Error, Handle, Store, cold};
use crate::model::name::RunId;
use crate::model::run::RunEvent;
use crate::model::time::day;

/// What the store's thread knows of a run.
enum Known<T> {
    /// All of it.
    All(T),
    /// What it takes to read the rest.
    Part(Box<Part>),
}

struct Part {
    row: RunRow,
    /// Its events that are in the database.
    events: Vec<Logged>,
    /// All files there are.
    files: Vec<Listed>,
    folder: PathBuf,
    blobs: Blobs,
}

impl Handle {
    /// What happened to a run, oldest first, without what is large and said elsewhere: the prompt, and what messages
    /// hold.
    ///
    /// # Errors
    /// When the database or a file of the archive cannot be read.
    pub async fn events(&self, id: RunId) -> Result<Vec<EventRow>, Error> {
        let all = move |store: &mut Store| store.events(id);
        self.wherever(id, all, move |part| {
            let mut events = BTreeMap::new();
            part.each(id, |event| {
                events.insert(event.seq, read::shortened(event));
                Ok(())
            })?;
            Ok(events.into_values().collect())
        })
        .await
    }

    /// Part of a thread, oldest first; the start is round 0.
    ///
    /// # Errors
    /// When the database, a file of the archive or a blob cannot be read.
    pub async fn thread(&self, id: RunId, range: ThreadRange) -> Result<Vec<Round>, Error> {
        let of_part = range.clone();
        let all = move |store: &mut Store| store.thread(id, &range);
        self.wherever(id, all, move |part| part.thread(id, &of_part))
            .await
    }

    async fn wherever<T: Send + 'static>(
        &self,
        id: RunId,
        all: impl FnOnce(&mut Store) -> Result<T, Error> + Send + 'static,
        of_part: impl Fn(&Part) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let known = self.call(move |store| match store.run(id)? {
            Some(row) if store.has_days_of(&row)? => {
                Ok(Known::Part(Box::new(store.part(id, row)?)))
            }
            _ => all(store).map(Known::All),
        });
        let mut part = match known.await? {
            Known::All(answer) => return Ok(answer),
            Known::Part(part) => part,
        };
        let store = self.clone();
        let read = tokio::task::spawn_blocking(move || {
            loop {
                let error = match of_part(&part) {
                    Err(error @ Error::Cold { .. }) => error,
                    answer => return answer,
                };
                // The day may have been restored meanwhile, and then its events are in the database.
                let now = store.call_and_wait(move |store| {
                    let row = store.run(id)?;
                    row.map(|row| store.part(id, row)).transpose()
                });
                match now? {
                    Some(now) if now.files != part.files => *part = now,
                    _ => return Err(error),
                }
            }
        });
        read.await.expect("reading the archive never panics")
    }
}

impl Store {
    /// Whether the archive has a day in which the run was there. What has not ended is not archived.
    fn has_days_of(&self, row: &RunRow) -> Result<bool, Error> {
        let Some((first, last)) = days_of(row) else {
            return Ok(false);
        };
        let mut select = self
            .connection
            .prepare_cached("SELECT 1 FROM archive WHERE day BETWEEN ?1 AND ?2")?;
        Ok(select.exists([first, last])?)
    }

    fn part(&self, id: RunId, row: RunRow) -> Result<Part, Error> {
        Ok(Part {
            events: self.map_logged(id, |event| event)?,
            files: self.archived()?,
            folder: cold::folder(self.directory()),
            blobs: self.blobs().clone(),
            row,
        })
    }
}

/// The first and the last day of a run that has ended.
fn days_of(row: &RunRow) -> Option<(String, String)> {
    let ended_at = row.ended_at?;
    let (first, last) = (row.created_at.min(ended_at), row.created_at.max(ended_at));
    Some((day(first), day(last)))
}

impl Part {
    /// Each event of the run once, in no order.
    fn each(
        &self,
        id: RunId,
        mut take: impl FnMut(&Logged) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (id, start) = (id.to_string(), self.row.start_event());
        let (mut seen, said) = (HashSet::new(), Cell::new(0));
        let mut once = |event: &Logged| {
            // Who asked for what is not what happened to it.
            if event.reference != id || event.source == AUDIT || !seen.insert(event.seq) {
                return Ok(());
            }
            let is_said = [RunEvent::MESSAGE, start].contains(&&*event.event_type);
            said.set(said.get() + u32::from(is_said));
            take(event)
        };
        for event in &self.events {
            once(event)?;
        }
        let days = days_of(&self.row).unwrap_or_default();
        let is_near = |file: &&Listed| (&days.0..=&days.1).contains(&&file.day);
        let (near, far): (Vec<_>, Vec<_>) = self.files.iter().partition(is_near);
        let mut read = |files: &[&Listed]| -> Result<(), Error> {
            for file in files {
                for event in cold::read(&self.folder.join(&file.file))?.expecting(&file.digest) {
                    once(&event?)?;
                }
            }
            Ok(())
        };
        read(&near)?;
        // A clock that was set back in the middle of a run leaves events on other days.
        if said.get() > self.row.rounds {
            Ok(())
        } else {
            read(&far)
        }
    }

    fn thread(&self, id: RunId, range: &ThreadRange) -> Result<Vec<Round>, Error> {
        let before = range.before.unwrap_or(u32::MAX);
        let oldest = range.limit.map_or(0, |limit| {
            (self.row.rounds + 1)
                .min(before)
                .saturating_sub(limit)
                .max(1)
        });
        let oldest = oldest.max(range.after.map_or(0, |after| after.saturating_add(1)));
        let mut said: BTreeMap<u32, Logged> = BTreeMap::new();
        let mut bytes = 0;
        self.each(id, |event| {
            let round = match &*event.event_type {
                RunEvent::MESSAGE => Some(round_of(event)?),
                word => (word == self.row.start_event()).then_some(0),
            };
            if let Some(round) = round.filter(|round| (oldest..before).contains(round)) {
                bytes += event.payload.len();
                said.insert(round, event.clone());
            }
            // What will not be answered is not kept.
            while range.bytes.is_some_and(|most| bytes > most) && said.len() > 1 {
                bytes -= said.pop_first().map_or(0, |(_, event)| event.payload.len());
            }
            Ok(())
        })?;
        let mut rounds = Rounds::new(&self.row, id, range.bytes, &self.blobs);
        for event in said.values().rev() {
            if !rounds.add(event.into())? {
                break;
            }
        }
        Ok(rounds.finish())
    }
}
