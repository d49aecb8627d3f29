//! Whether the disk has room for what is new. When it has not, nothing begins, and what is left, with what the store has
//! put aside, is for the runs that are under way: they all can end, and be killed. It goes on by itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::Instant;

use super::handle::{Change, Event};
use crate::engine::{Answer, Input, LinkId};
use crate::model::limits;
use crate::model::message::Message;
use crate::model::name::{RunId, WorkflowName};
use crate::model::status::RunResult;
use crate::os::disk;
use crate::store::{self, Log};

/// What could not be written is tried again so much later.
const AGAIN: Duration = Duration::from_secs(5);

/// Runs by workflow and key.
pub(super) type Keys = HashMap<(WorkflowName, String), RunId>;

/// The room that there is.
#[derive(Debug)]
pub struct Room {
    directory: PathBuf,
    /// How full the store's log is.
    pub(super) log: Log,
    /// A text that the disk did not take, and when.
    refused: Option<(Instant, String)>,
    /// Why nothing begins.
    scarcity: Option<String>,
    /// Runs whose last round there was no room for, by the connection that has to send it again.
    held_back: BTreeSet<(LinkId, RunId)>,
}

impl Room {
    /// The room in the store's directory.
    #[must_use]
    pub fn new(directory: PathBuf, log: Log) -> Self {
        Self {
            directory,
            log,
            refused: None,
            scarcity: None,
            held_back: BTreeSet::new(),
        }
    }

    /// Looks anew.
    pub(super) fn look(&mut self) {
        self.refused.take_if(|(at, _)| at.elapsed() >= AGAIN);
        // What cannot be told is no reason to hold up anything.
        let available = disk::available(&self.directory).unwrap_or(u64::MAX);
        self.scarcity = self.why(available);
    }

    fn why(&self, available: u64) -> Option<String> {
        // Twice that, so that it does not come and go with each round.
        let wanted = if self.is_scarce() {
            2 * limits::ROOM_BYTES
        } else {
            limits::ROOM_BYTES
        };
        let place = self.directory.display();
        let why = if available < wanted {
            let (available, wanted) = (mebibytes(available), mebibytes(wanted));
            format!("{available} are available in {place}, and {wanted} are wanted")
        } else if self.log.is_half_used() {
            let used = mebibytes(self.log.used);
            format!("{used} cannot be moved from the log in {place} into the database")
        } else {
            let (_, error) = self.refused.as_ref()?;
            return Some(self.no_blob(error));
        };
        Some(format!("no space left on device (ENOSPC): {why}"))
    }

    fn no_blob(&self, error: &str) -> String {
        let place = self.directory.display();
        format!("no space left on device (ENOSPC): {place} takes no more blobs: {error}")
    }

    /// A checkpoint that failed can be tried again.
    pub(super) fn may_move_log(&self) -> bool {
        let has_room = |available| available >= limits::ROOM_BYTES;
        self.log.is_stuck() && disk::available(&self.directory).is_ok_and(has_room)
    }

    /// Why nothing begins, if that is so.
    pub(super) fn scarcity(&self) -> Option<&String> {
        self.scarcity.as_ref()
    }

    pub(super) fn is_scarce(&self) -> bool {
        self.scarcity.is_some()
    }

    /// A reply of this length has to wait.
    fn is_too_long(&self, message: &Message) -> bool {
        let is_long = || message.content.len().max(message.meta_bytes()) > limits::INLINE_BYTES;
        self.is_scarce() && (self.log.is_half_used() || is_long())
    }

    /// Makes long texts durable before anything knows of them, so that one which the disk does not take concerns nobody
    /// else. Returns the events whose text it did not take.
    pub(super) async fn keep_texts(
        &mut self,
        events: &[Event],
        store: &store::Handle,
    ) -> Result<BTreeSet<usize>, store::Error> {
        let text = |event: &Event| {
            let text = match event {
                Event::Change(Change::Start { accepted, .. }, _) => &accepted.prompt,
                Event::Input(Input::Message { message, .. } | Input::Attempt { message, .. }) => {
                    &message.content
                }
                _ => return None,
            };
            (text.len() > limits::INLINE_BYTES).then(|| text.clone())
        };
        if self.is_scarce() {
            return Ok(BTreeSet::new());
        }
        let texts: Vec<_> = (0..)
            .zip(events)
            .filter_map(|(index, event)| Some((index, text(event)?)))
            .collect();
        if texts.is_empty() {
            return Ok(BTreeSet::new());
        }
        let blobs = store.call(|store| Ok(store.blobs().clone())).await?;
        let put = move || {
            let mut refused = BTreeMap::new();
            for (index, text) in texts {
                match blobs.put(text.as_bytes()) {
                    Err(error) if error.is_full() => drop(refused.insert(index, error.to_string())),
                    put => drop(put?),
                }
            }
            Ok::<_, store::Error>(refused)
        };
        let refused = tokio::task::spawn_blocking(put).await;
        let refused = refused.expect("putting a blob never panics")?;
        if let Some(error) = refused.values().next() {
            self.refused = Some((Instant::now(), error.clone()));
        }
        Ok(refused.into_keys().collect())
    }

    /// The event, unless there is no room for it: then a client is told so, and a worker is not answered, so that it
    /// sends its round again once there is.
    pub(super) fn let_in(&mut self, event: Event, is_refused: bool, keys: &Keys) -> Option<Event> {
        match event {
            Event::Change(Change::Start { run, accepted }, reply) => {
                let key = accepted.key.clone();
                let key = key.map(|key| (accepted.workflow.clone(), key));
                let is_known = key.is_some_and(|key| keys.contains_key(&key));
                let refused = self.refused.as_ref().filter(|_| is_refused);
                let why = refused.map(|(_, error)| self.no_blob(error));
                match why.or(self.scarcity.clone()) {
                    Some(why) if !is_known => {
                        // A client that went away needs no answer.
                        let _ = reply.send(Answer::NoSpace(why));
                        None
                    }
                    _ => Some(Event::Change(Change::Start { run, accepted }, reply)),
                }
            }
            Event::Input(
                Input::Message {
                    link,
                    run,
                    ref message,
                    ..
                }
                | Input::Attempt {
                    link,
                    run,
                    ref message,
                    ..
                },
            ) if is_refused
                || self.is_too_long(message)
                || self.held_back.contains(&(link, run)) =>
            {
                self.held_back.insert((link, run));
                None
            }
            // It comes after that round, and again with it.
            Event::Input(Input::Ended {
                link,
                run,
                ref result,
                ..
            }) if *result != RunResult::Killed && self.held_back.contains(&(link, run)) => None,
            Event::Input(Input::LinkLost { link }) => {
                self.held_back.retain(|(held, _)| *held != link);
                Some(event)
            }
            event => Some(event),
        }
    }

    /// The connections that have to send again what was held back; from now on it is not.
    pub(super) fn held_back(&mut self) -> BTreeSet<LinkId> {
        let held = std::mem::take(&mut self.held_back);
        held.into_iter().map(|(link, _)| link).collect()
    }
}

fn mebibytes(bytes: u64) -> String {
    let tenths = bytes / (1 << 10) * 10 / (1 << 10);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(bytes: usize) -> Message {
        Message {
            role: "a".to_owned(),
            content: "x".repeat(bytes),
            meta: serde_json::Map::new(),
            timestamp: 0,
        }
    }

    #[test]
    fn room_is_scarce_until_there_is_twice_as_much() {
        let mut room = Room::new("/var/lib/nerve".into(), Log::default());
        assert_eq!(room.why(limits::ROOM_BYTES), None);
        room.scarcity = room.why(limits::ROOM_BYTES - 1);
        assert_eq!(
            room.scarcity().unwrap(),
            "no space left on device (ENOSPC): 15.9 MiB are available in /var/lib/nerve, and 16.0 MiB are wanted"
        );
        room.scarcity = room.why(2 * limits::ROOM_BYTES - 1);
        assert!(room.is_scarce() && room.is_too_long(&said(limits::INLINE_BYTES + 1)));
        assert!(!room.is_too_long(&said(limits::INLINE_BYTES)));
        assert_eq!(room.why(2 * limits::ROOM_BYTES), None);
    }

    #[test]
    fn a_log_that_is_half_used_is_for_ends() {
        let log = Log {
            used: 17 << 20,
            reserved: 32 << 20,
        };
        let mut room = Room::new("/".into(), log);
        room.scarcity = room.why(u64::MAX);
        assert!(
            room.scarcity()
                .unwrap()
                .contains("17.0 MiB cannot be moved")
        );
        assert!(room.is_too_long(&said(0)));
    }
}
