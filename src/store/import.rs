//! Import: the history of the predecessor becomes events, and its runs become rows.
//!
//! Every row of its log becomes one event, once: `imported` remembers each by its digest, so that an import that was cut
//! off goes on where it ended, and one that is repeated adds what is new and nothing else. A message that came before its
//! run was any other row; once the run is there it becomes a round of it, by a second event. An event whose `seq` is there
//! says what happened elsewhere: nothing but the `imported` event of a run adds up to anything here. As a run that has
//! ended never changes, what its old log has gained since it came over is kept as it was.

use rusqlite::{OptionalExtension as _, Transaction, params};
use sha2::{Digest as _, Sha256};

use super::blob::{Blobs, Digest};
use super::commit::{json, without_long_text};
use super::log::{AUDIT, CLIENT, Entry, Head, SOURCES, WORKFLOW};
use super::{Error, RunRow, Store, sql};
use crate::model::hex::hex;
use crate::model::limits;
use crate::model::name::RunId;
use crate::model::predecessor::{Piece, Row, microseconds, run_id};
use crate::model::run::{Imported, RunEvent};
use crate::os::clock;

/// Type of the event that keeps an imported blob: its reference is the digest.
pub const BLOB: &str = "imported-blob";

/// One job of the store takes at most so many pieces, and stops at so many bytes: the runs do not wait longer.
const SLICE: (usize, usize) = (128, 4 * limits::INLINE_BYTES);

/// What came of an import.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Added {
    /// Events that are new.
    pub events: u32,
    /// Of them, those that made a run.
    pub runs: u32,
}

/// Cuts what is to be imported into what one job may take.
#[must_use]
pub fn slices(pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
    let mut slices: Vec<Vec<Piece>> = Vec::new();
    let mut bytes = usize::MAX;
    for piece in pieces {
        match slices.last_mut() {
            Some(slice) if slice.len() < SLICE.0 && bytes < SLICE.1 => {
                bytes += piece.weight();
                slice.push(piece);
            }
            _ => {
                bytes = piece.weight();
                slices.push(vec![piece]);
            }
        }
    }
    slices
}

impl Store {
    /// Makes events of these pieces and rows of the runs among them; what is there already is left out.
    ///
    /// # Errors
    /// [`Error::Import`] for what cannot be; nothing of these pieces is stored then. When the database does not take it.
    pub fn import(&mut self, pieces: &[Piece]) -> Result<Added, Error> {
        self.must_have_room(0)?;
        let blobs = self.blobs.clone();
        self.write(|transaction, head| {
            let mut import = Import {
                transaction,
                head: *head,
                blobs: &blobs,
                added: Added::default(),
            };
            for piece in pieces {
                match piece {
                    Piece::Run(run) => import.run(run)?,
                    Piece::OfRun(row) => import.row_of_run(row)?,
                    Piece::Row(row) => import.row(row)?,
                    Piece::Blob(digest) => import.blob(digest)?,
                }
            }
            *head = import.head;
            Ok(import.added)
        })
    }

    /// The run that had this id where it was imported from.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn find_imported(&self, old_id: &str) -> Result<Option<RunId>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT run FROM workflow_runs WHERE old_id = ?1")?;
        let run: Option<String> = select.query_row([old_id], |row| row.get(0)).optional()?;
        Ok(run.and_then(|run| run.parse().ok()))
    }
}

/// The row that an `imported` event adds up to.
#[must_use]
pub fn imported_row(run: &Imported) -> RunRow {
    RunRow {
        run: run_id(&run.old_id).to_string(),
        workflow: run.workflow.clone(),
        status: run.status,
        killing: false,
        aborting: false,
        exit_code: Some(run.exit_code),
        result: run.result.as_ref().map(ToString::to_string),
        reason: None,
        rounds: run.rounds,
        max_rounds: run.max_rounds,
        dry_run: run.dry_run,
        trigger: run.trigger().to_string(),
        definition: None,
        created_at: run.created_at,
        started_at: run.started_at,
        ended_at: Some(run.ended_at),
        old_id: Some(run.old_id.clone()),
    }
}

fn insert(transaction: &Transaction<'_>, row: &RunRow) -> Result<(), Error> {
    let mut insert = transaction.prepare_cached(
        "INSERT INTO workflow_runs (run, tail, workflow, status, killing, exit_code, result, rounds, max_rounds, dry_run,
             trigger, created_at, started_at, ended_at, old_id)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
    )?;
    insert.execute(params![
        row.run,
        row.run.chars().rev().collect::<String>(),
        row.workflow,
        row.status.as_str(),
        row.killing,
        row.exit_code,
        row.result,
        row.rounds,
        row.max_rounds,
        row.dry_run,
        row.trigger,
        sql(row.created_at),
        row.started_at.map(sql),
        row.ended_at.map(sql),
        row.old_id,
    ])?;
    Ok(())
}

/// One transaction's worth.
struct Import<'a> {
    transaction: &'a Transaction<'a>,
    head: Head,
    blobs: &'a Blobs,
    added: Added,
}

impl Import<'_> {
    fn run(&mut self, run: &Imported) -> Result<(), Error> {
        if !run.status.is_terminal() {
            let Imported { old_id, status, .. } = run;
            return Err(Error::Import(format!(
                "run {old_id:?} is {status}, which is no end"
            )));
        }
        let digest: [u8; 32] = Sha256::digest(&run.old_id).into();
        if self.is_known(&digest)? {
            return Ok(());
        }
        let mut run = run.clone();
        run.workflow = harmless(&run.workflow);
        let id = run_id(&run.old_id).to_string();
        let row = imported_row(&run);
        let at = run.created_at;
        let event = RunEvent::Imported(Box::new(run));
        self.event(CLIENT, &event, &id, at)?;
        self.remember(&digest, Some((&id, 0)))?;
        insert(self.transaction, &row)?;
        self.added.runs += 1;
        Ok(())
    }

    fn row_of_run(&mut self, row: &Row) -> Result<(), Error> {
        let digest = row.digest();
        let is_known = self.is_known(&digest)?;
        if is_known && self.is_of_run(&digest)? {
            return Ok(());
        }
        let old_id = row.ref_id.as_deref().unwrap_or_default();
        let id = run_id(old_id).to_string();
        let Some((rounds, last)) = self.rounds(&id)? else {
            return Err(Error::Import(format!(
                "a row of run {old_id:?} came before the run"
            )));
        };
        match row.message().filter(|_| last < rounds) {
            Some(message) => {
                if is_known {
                    self.make_room(&digest)?;
                }
                let round = last + 1;
                let event = RunEvent::ThreadWorkflowMessage { round, message };
                self.event(WORKFLOW, &event, &id, microseconds(row.timestamp))?;
                self.remember(&digest, Some((&id, round)))
            }
            None if is_known => Ok(()),
            None => {
                self.verbatim(row, &id)?;
                self.remember(&digest, None)
            }
        }
    }

    fn row(&mut self, row: &Row) -> Result<(), Error> {
        let digest = row.digest();
        if self.is_known(&digest)? {
            return Ok(());
        }
        let reference = row.ref_id.as_deref().unwrap_or_default();
        if reference.parse::<RunId>().is_ok() {
            // Nothing of another history is about a run of ours.
            self.verbatim(row, &format!("old-{reference}"))?;
        } else {
            self.verbatim(row, reference)?;
        }
        self.remember(&digest, None)
    }

    /// A blob is kept for ever once an event names it.
    fn blob(&mut self, digest: &str) -> Result<(), Error> {
        let digest = Digest::parse(digest)
            .ok_or_else(|| Error::Import(format!("{digest:?} is no digest of a blob")))?;
        // What it is the digest of is no row and no id.
        let known: [u8; 32] = Sha256::digest(format!("blob {digest}")).into();
        if self.is_known(&known)? {
            return Ok(());
        }
        // It was found to be whole when it was put.
        if !self.blobs.exists(&digest) {
            return Err(Error::BlobMissing(digest));
        }
        let entry = Entry {
            source: CLIENT,
            event_type: BLOB,
            reference: digest.as_str(),
            payload: "{}",
            blob: Some(digest.as_str()),
            at: clock::wall_us(),
        };
        self.append(&entry)?;
        self.remember(&known, None)
    }

    fn append(&mut self, entry: &Entry<'_>) -> Result<(), Error> {
        self.head.append(self.transaction, entry)?;
        self.added.events += 1;
        Ok(())
    }

    /// An event of ours; a long text goes to a blob.
    fn event(&mut self, source: &str, event: &RunEvent, run: &str, at: u64) -> Result<(), Error> {
        let (short, long) = without_long_text(event);
        let blob = long
            .map(|text| self.blobs.put(text.as_bytes()))
            .transpose()?;
        let payload = json(&*short)?;
        self.append(&Entry {
            source,
            event_type: event.name(),
            reference: run,
            payload: &payload,
            blob: blob.as_ref().map(|(digest, _)| digest.as_str()),
            at,
        })
    }

    /// An event as it was there.
    fn verbatim(&mut self, row: &Row, reference: &str) -> Result<(), Error> {
        let source = SOURCES.into_iter().find(|known| *known == row.source);
        // Who did what here is for nobody else to say.
        let source = source.filter(|source| *source != AUDIT);
        // These two say something here, which such a row does not.
        let is_ours = [RunEvent::MESSAGE, RunEvent::IMPORTED].contains(&row.row_type.as_str());
        let prefix = if is_ours { "old-" } else { "" };
        let payload = row.json();
        self.append(&Entry {
            source: source.unwrap_or(CLIENT),
            event_type: &harmless(&format!("{prefix}{}", row.row_type)),
            reference: &harmless(reference),
            payload: &payload,
            blob: None,
            at: microseconds(row.timestamp),
        })
    }

    fn is_known(&self, digest: &[u8; 32]) -> Result<bool, Error> {
        let mut select = self
            .transaction
            .prepare_cached("SELECT 1 FROM imported WHERE digest = ?1")?;
        Ok(select.exists([digest])?)
    }

    /// Whether a row that is known has become part of a run.
    fn is_of_run(&self, digest: &[u8; 32]) -> Result<bool, Error> {
        let mut select = self
            .transaction
            .prepare_cached("SELECT 1 FROM imported WHERE digest = ?1 AND run IS NOT NULL")?;
        Ok(select.exists([digest])?)
    }

    /// The event that a row was before its run came is remembered by another digest from now on.
    fn make_room(&self, digest: &[u8; 32]) -> Result<(), Error> {
        let other: [u8; 32] = Sha256::digest(format!("before its run {}", hex(digest))).into();
        let mut update = self
            .transaction
            .prepare_cached("UPDATE imported SET digest = ?2 WHERE digest = ?1")?;
        update.execute(params![digest, other])?;
        Ok(())
    }

    /// How many rounds a run has, and how many of them are there; `None` before the run itself is.
    fn rounds(&self, run: &str) -> Result<Option<(u32, u32)>, Error> {
        let mut select = self.transaction.prepare_cached(
            "SELECT max(round), (SELECT rounds FROM workflow_runs WHERE run = ?1) FROM imported WHERE run = ?1",
        )?;
        let (last, rounds): (Option<u32>, Option<u32>) =
            select.query_row([run], |row| Ok((row.get(0)?, row.get(1)?)))?;
        // Retention may have taken the run: then it has no thread that could go on.
        Ok(last.map(|last| (rounds.unwrap_or(0), last)))
    }

    /// That the newest event is this.
    fn remember(&self, digest: &[u8; 32], round: Option<(&str, u32)>) -> Result<(), Error> {
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO imported (digest, seq, run, round) VALUES (?1, ?2, ?3, ?4)",
        )?;
        let (run, round) = round.unzip();
        insert.execute(params![digest, sql(self.head.seq), run, round])?;
        Ok(())
    }
}

/// D-Bus has no NUL.
fn harmless(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::super::ThreadRange;
    use super::super::check::offline::offline;
    use super::*;
    use crate::model::predecessor::{OldRun, Survey};

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        (directory, store)
    }

    fn message(id: i64, content: &str) -> Row {
        let payload = serde_json::json!({"role": "a", "content": content, "timestamp": id});
        Row {
            id,
            source: "workflow".to_owned(),
            row_type: "thread_workflow_message".to_owned(),
            ref_id: Some("old".to_owned()),
            payload: Some(payload.to_string()),
            timestamp: id,
        }
    }

    fn imported(rows: &[Row]) -> Piece {
        let mut survey = Survey::default();
        for row in rows {
            survey.see(row);
        }
        let run = OldRun {
            id: "old".to_owned(),
            workflow: "no name".to_owned(),
            status: "started".to_owned(),
            timestamp: 9,
            exit_code: None,
        };
        Piece::Run(survey.conclude(run).unwrap())
    }

    fn said(store: &Store) -> Vec<(u32, String)> {
        let thread = store
            .thread(run_id("old"), &ThreadRange::default())
            .unwrap();
        let said = thread.into_iter().map(|round| (round.round, round.content));
        said.collect()
    }

    fn types(store: &Store) -> Vec<(String, String, String)> {
        let mut select = store
            .connection
            .prepare("SELECT source, type, ref FROM events ORDER BY seq")
            .unwrap();
        let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
        let types = select.query_map([], row).unwrap();
        types.collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn an_import_that_was_cut_off_is_completed_and_twice_changes_nothing() {
        let (directory, mut store) = store();
        let long = "x".repeat(limits::INLINE_BYTES + 1);
        let rows = [message(1, "one"), message(2, &long), message(3, "three")];
        let mut pieces = vec![imported(&rows)];
        pieces.extend(rows.into_iter().map(Piece::OfRun));
        let added = store.import(&pieces[..2]).unwrap();
        assert_eq!(added, Added { events: 2, runs: 1 });
        drop(store);
        let mut store = Store::open(directory.path()).unwrap();
        let added = store.import(&pieces).unwrap();
        assert_eq!(added, Added { events: 2, runs: 0 });
        let thread = [(0, ""), (1, "one"), (2, &long), (3, "three")];
        let thread = thread.map(|(round, content)| (round, content.to_owned()));
        assert_eq!(said(&store), thread);
        assert_eq!(store.import(&pieces).unwrap(), Added::default());
        let row = store.run(run_id("old")).unwrap().unwrap();
        let Piece::Run(run) = &pieces[0] else {
            panic!("is a run");
        };
        assert_eq!(row, imported_row(run));
        assert_eq!(store.find_imported("old").unwrap(), Some(run_id("old")));
        assert_eq!(store.find_imported("other").unwrap(), None);
        assert!(store.open_runs().unwrap().is_empty());
        // What the predecessor did later.
        let late = [Piece::OfRun(message(4, "late"))];
        assert_eq!(store.import(&late).unwrap().events, 1);
        assert_eq!(said(&store), thread);
        assert_eq!(types(&store).last().unwrap().1, "thread_workflow_message");
    }

    #[test]
    fn rows_that_came_before_their_run_become_its_rounds() {
        let (directory, mut store) = store();
        let long = "x".repeat(limits::INLINE_BYTES + 1);
        let mut started = message(1, "");
        started.row_type = "started".to_owned();
        let rows = [
            started,
            message(2, "one"),
            message(3, &long),
            message(4, "three"),
        ];
        let early: Vec<_> = rows[..3].iter().cloned().map(Piece::Row).collect();
        assert_eq!(store.import(&early).unwrap().events, 3);
        let mut pieces = vec![imported(&rows)];
        pieces.extend(rows.into_iter().map(Piece::OfRun));
        let added = store.import(&pieces[..3]).unwrap();
        assert_eq!(added, Added { events: 2, runs: 1 });
        let faults = |store: Store| {
            drop(store);
            let report = offline(directory.path(), directory.path()).unwrap();
            (Store::open(directory.path()).unwrap(), report.faults)
        };
        let (mut store, found) = faults(store);
        let cut_off = format!(
            "run {}: 1 of its 3 rounds are there; its import was cut off, and is completed by repeating it",
            run_id("old")
        );
        assert_eq!(found, [cut_off]);
        assert_eq!(store.import(&pieces).unwrap().events, 2);
        let thread = [(0, ""), (1, "one"), (2, &long), (3, "three")];
        let thread = thread.map(|(round, content)| (round, content.to_owned()));
        assert_eq!(said(&store), thread);
        let select = "SELECT round FROM imported WHERE run IS NOT NULL ORDER BY round";
        let rounds: Vec<u32> = {
            let mut select = store.connection.prepare(select).unwrap();
            let rounds = select.query_map([], |row| row.get(0)).unwrap();
            rounds.collect::<Result<_, _>>().unwrap()
        };
        assert_eq!(rounds, [0, 1, 2, 3]);
        for pieces in [&pieces, &early] {
            assert_eq!(store.import(pieces).unwrap(), Added::default());
        }
        assert_eq!(faults(store).1, Vec::<String>::new());
    }

    #[test]
    fn sources_and_types_are_kept_unless_they_would_say_something_here() {
        let (_directory, mut store) = store();
        let row = |id, source: &str, row_type: &str| Row {
            source: source.to_owned(),
            row_type: row_type.to_owned(),
            ref_id: None,
            ..message(id, "")
        };
        let pieces = [
            imported(&[]),
            Piece::Row(row(1, "audit", "kill")),
            Piece::Row(row(2, "odd", "o\0dd")),
            Piece::OfRun(Row {
                row_type: "queued".to_owned(),
                ..message(3, "")
            }),
            Piece::OfRun(Row {
                row_type: RunEvent::MESSAGE.to_owned(),
                ..message(4, "")
            }),
        ];
        store.import(&pieces).unwrap();
        let id = run_id("old").to_string();
        let expected = [
            ("client", "imported", id.as_str()),
            ("client", "kill", ""),
            ("client", "o\u{fffd}dd", ""),
            ("workflow", "queued", &id),
            ("workflow", "old-thread-workflow-message", &id),
        ];
        let expected = expected.map(|(a, b, c)| (a.to_owned(), b.to_owned(), c.to_owned()));
        assert_eq!(types(&store), expected);
        assert_eq!(said(&store), [(0, String::new())]);
    }

    #[test]
    fn what_cannot_be_leaves_nothing() {
        let (_directory, mut store) = store();
        let Piece::Run(run) = imported(&[]) else {
            panic!("is a run");
        };
        let open = Imported {
            status: crate::model::status::Status::Queued,
            ..run
        };
        let missing = Piece::Blob(Digest::of(b"missing").to_string());
        let row = Piece::Row(message(1, ""));
        for bad in [
            Piece::Run(open),
            Piece::OfRun(message(2, "")),
            Piece::Blob("x".to_owned()),
            missing,
        ] {
            let shown = format!("{bad:?}");
            assert!(store.import(&[row.clone(), bad]).is_err(), "{shown}");
            assert_eq!((types(&store), store.head), (vec![], Head::default()));
        }
    }

    #[test]
    fn a_blob_is_named_by_one_event() {
        let (_directory, mut store) = store();
        let (digest, _) = store.blobs().put(b"bytes").unwrap();
        let piece = [Piece::Blob(format!(" {} ", digest.as_str().to_uppercase()))];
        assert_eq!(store.import(&piece).unwrap().events, 1);
        assert_eq!(store.import(&piece).unwrap().events, 0);
        let select = "SELECT blob FROM events";
        let blob: String = store
            .connection
            .query_row(select, [], |row| row.get(0))
            .unwrap();
        assert_eq!(blob, digest.as_str());
    }

    #[test]
    fn slices_are_short() {
        let long = "x".repeat(SLICE.1);
        let mut pieces: Vec<_> = (0..300).map(|id| Piece::Row(message(id, ""))).collect();
        pieces.insert(10, Piece::Row(message(300, &long)));
        let lengths: Vec<_> = slices(pieces).iter().map(Vec::len).collect();
        assert_eq!(lengths, [11, 128, 128, 34]);
        assert!(slices(vec![]).is_empty());
    }
}
