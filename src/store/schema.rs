//! The schema, as an append-only list of migrations indexed by `user_version`. Never change or remove an entry: a
//! database of any release opens for ever.

use rusqlite::{Connection, Transaction, TransactionBehavior};

use super::log::{Entry, Head, SYSTEM};
use super::{Error, unsigned};

/// Marks a file as nerve's, from schema 3 on: "nrv1".
pub(super) const APPLICATION_ID: i32 = 0x6e72_7631;

/// One thing that a migration does.
enum Step {
    Sql(&'static str),
    Code(fn(&Transaction<'_>) -> Result<(), Error>),
}

/// The version that this nerve writes.
pub(super) const VERSION: u32 = 4;

const MIGRATIONS: [&[Step]; VERSION as usize] = [
    // `runs` is what the events add up to. `tail` is the id backwards, so that a prefix of it is a tail of the id.
    &[Step::Sql(
    "CREATE TABLE events (
         seq INTEGER PRIMARY KEY,
         source TEXT NOT NULL,
         type TEXT NOT NULL,
         ref TEXT NOT NULL,
         payload TEXT NOT NULL,
         at INTEGER NOT NULL
     ) STRICT;
     CREATE INDEX events_of ON events (ref, seq);
     CREATE TRIGGER events_keep_what_was_said BEFORE UPDATE ON events
         BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
     CREATE TABLE workflow_runs (
         seq INTEGER PRIMARY KEY,
         run TEXT NOT NULL UNIQUE,
         tail TEXT NOT NULL,
         workflow TEXT NOT NULL,
         status TEXT NOT NULL,
         killing INTEGER NOT NULL,
         exit_code INTEGER,
         result TEXT,
         reason TEXT,
         rounds INTEGER NOT NULL,
         max_rounds INTEGER,
         dry_run INTEGER NOT NULL,
         trigger TEXT NOT NULL,
         definition TEXT REFERENCES definitions (digest),
         created_at INTEGER NOT NULL,
         started_at INTEGER,
         ended_at INTEGER
     ) STRICT;
     CREATE INDEX runs_by_tail ON workflow_runs (tail);
     CREATE INDEX runs_by_workflow ON workflow_runs (workflow, seq);
     CREATE INDEX runs_open ON workflow_runs (seq) WHERE ended_at IS NULL;
     CREATE TRIGGER runs_end_once BEFORE UPDATE ON workflow_runs WHEN OLD.ended_at IS NOT NULL
         BEGIN SELECT RAISE(ABORT, 'a run that has ended never changes'); END;
     CREATE TABLE definitions (
         digest TEXT PRIMARY KEY,
         bytes BLOB NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE workflows (
         name TEXT PRIMARY KEY,
         definition TEXT NOT NULL REFERENCES definitions (digest)
     ) STRICT, WITHOUT ROWID;",
    )],
    // `workers` and `manager` are what the events of workflows and of the manager add up to.
    &[Step::Sql(
    "ALTER TABLE workflow_runs ADD COLUMN aborting INTEGER NOT NULL DEFAULT 0;
     ALTER TABLE workflow_runs ADD COLUMN key TEXT;
     CREATE UNIQUE INDEX runs_by_key ON workflow_runs (workflow, key) WHERE key IS NOT NULL;
     CREATE TABLE workers (
         workflow TEXT PRIMARY KEY,
         record TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE manager (
         name TEXT PRIMARY KEY,
         value TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;",
    )],
    // Events are chained (log.rs), leave long texts to blobs, and go to files when they are old; runs are listed by
    // the time at which they were accepted.
    &[
        Step::Sql(
            "CREATE TABLE log (
                 seq INTEGER PRIMARY KEY,
                 source TEXT NOT NULL,
                 type TEXT NOT NULL,
                 ref TEXT NOT NULL,
                 payload TEXT NOT NULL,
                 blob TEXT,
                 at INTEGER NOT NULL,
                 hash BLOB NOT NULL
             ) STRICT;",
        ),
        Step::Code(chain),
        Step::Sql(
            "DROP TABLE events;
             ALTER TABLE log RENAME TO events;
             CREATE INDEX events_of ON events (ref, seq);
             CREATE INDEX events_by_time ON events (at);
             CREATE INDEX events_with_blob ON events (blob) WHERE blob IS NOT NULL;
             CREATE TRIGGER events_keep_what_was_said BEFORE UPDATE ON events
                 BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
             ALTER TABLE workflow_runs ADD COLUMN old_id TEXT;
             CREATE UNIQUE INDEX runs_by_old_id ON workflow_runs (old_id) WHERE old_id IS NOT NULL;
             DROP INDEX runs_by_workflow;
             CREATE INDEX runs_by_time ON workflow_runs (created_at);
             CREATE INDEX runs_by_workflow ON workflow_runs (workflow, created_at);
             CREATE INDEX runs_by_status ON workflow_runs (status, created_at) WHERE ended_at IS NOT NULL;
             CREATE INDEX runs_by_workflow_and_status ON workflow_runs (workflow, status, created_at)
                 WHERE ended_at IS NOT NULL;
             CREATE INDEX runs_by_exit_code ON workflow_runs (exit_code, created_at) WHERE ended_at IS NOT NULL;
             CREATE INDEX runs_by_workflow_and_exit_code ON workflow_runs (workflow, exit_code, created_at)
                 WHERE ended_at IS NOT NULL;
             CREATE INDEX runs_open_by_time ON workflow_runs (created_at) WHERE ended_at IS NULL;
             CREATE TABLE archive (
                 day TEXT NOT NULL,
                 part INTEGER NOT NULL,
                 file TEXT NOT NULL UNIQUE,
                 rows INTEGER NOT NULL,
                 first INTEGER NOT NULL,
                 last INTEGER NOT NULL,
                 digest TEXT NOT NULL,
                 cleared INTEGER NOT NULL,
                 PRIMARY KEY (day, part)
             ) STRICT, WITHOUT ROWID;
             CREATE TABLE archived_blobs (
                 blob TEXT NOT NULL,
                 file TEXT NOT NULL REFERENCES archive (file),
                 PRIMARY KEY (blob, file)
             ) STRICT, WITHOUT ROWID;
             CREATE TABLE imported (
                 digest BLOB PRIMARY KEY,
                 seq INTEGER NOT NULL,
                 run TEXT,
                 round INTEGER
             ) STRICT, WITHOUT ROWID;
             CREATE INDEX imported_rounds ON imported (run, round) WHERE run IS NOT NULL;
             PRAGMA application_id = 0x6e727631;",
        ),
    ],
    // Tails are random: in one index of all runs each start would change a page of its own. In parts of 4,096 runs the
    // newest part has few pages, and the others do not change. What refuses a change of a single row need not undo it,
    // so SQLite need not keep what the row was.
    &[Step::Sql(
        "DROP INDEX runs_by_tail;
         CREATE INDEX runs_by_tail ON workflow_runs (seq >> 12, tail);
         DROP TRIGGER runs_end_once;
         CREATE TRIGGER runs_end_once BEFORE UPDATE ON workflow_runs WHEN OLD.ended_at IS NOT NULL
             BEGIN SELECT RAISE(FAIL, 'a run that has ended never changes'); END;",
    )],
];

/// The version of a database, if this nerve knows it.
pub(super) fn refuse_newer(connection: &Connection) -> Result<u32, Error> {
    let version: u32 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version > VERSION {
        return Err(Error::TooNew {
            found: version,
            known: VERSION,
        });
    }
    Ok(version)
}

/// Type and name of something that a database of this version has, and this one has not.
pub(super) fn missing(connection: &Connection, version: u32) -> Result<Option<String>, Error> {
    let mut fresh = Connection::open_in_memory()?;
    migrate_to(&mut fresh, version)?;
    let found = names(connection)?;
    let mut expected = names(&fresh)?.into_iter();
    Ok(expected.find(|name| !found.contains(name)))
}

fn names(connection: &Connection) -> Result<Vec<String>, Error> {
    let mut select = connection.prepare("SELECT type || ' ' || name FROM sqlite_schema")?;
    Ok(select
        .query_map([], |row| row.get(0))?
        .collect::<Result<_, _>>()?)
}

/// Brings the database to this version's schema.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), Error> {
    migrate_to(connection, VERSION)
}

fn migrate_to(connection: &mut Connection, wanted: u32) -> Result<(), Error> {
    let version = refuse_newer(connection)?;
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
    let steps = &MIGRATIONS[..wanted as usize];
    for step in steps.iter().skip(version as usize).copied().flatten() {
        match step {
            Step::Sql(statements) => transaction.execute_batch(statements)?,
            Step::Code(code) => code(&transaction)?,
        }
    }
    transaction.pragma_update(None, "user_version", wanted)?;
    transaction.commit()?;
    Ok(())
}

/// Schema 3: every event that there is gets its hash, and each workflow's definition an event that says so.
fn chain(transaction: &Transaction<'_>) -> Result<(), Error> {
    let mut insert = transaction.prepare(
        "INSERT INTO log (seq, source, type, ref, payload, at, hash) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?;
    let mut head = Head::default();
    let mut follow = |entry: &Entry<'_>| -> Result<(), Error> {
        head = head.after(entry);
        insert.execute(rusqlite::params![
            super::sql(head.seq),
            entry.source,
            entry.event_type,
            entry.reference,
            entry.payload,
            super::sql(entry.at),
            head.hash,
        ])?;
        Ok(())
    };
    let mut select =
        transaction.prepare("SELECT source, type, ref, payload, at FROM events ORDER BY seq")?;
    let mut rows = select.query([])?;
    let mut newest = 0;
    while let Some(row) = rows.next()? {
        let text = |column| row.get_ref(column)?.as_str().map_err(rusqlite::Error::from);
        newest = unsigned(row, "at")?;
        follow(&Entry {
            source: text("source")?,
            event_type: text("type")?,
            reference: text("ref")?,
            payload: text("payload")?,
            blob: None,
            at: newest,
        })?;
    }
    let mut select = transaction.prepare("SELECT name, definition FROM workflows ORDER BY name")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (name, definition): (String, String) = (row.get(0)?, row.get(1)?);
        follow(&Entry {
            source: SYSTEM,
            event_type: super::DEFINED,
            reference: &name,
            payload: &super::defined(&definition),
            blob: None,
            at: newest,
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Begin, EventFilter, Store, check};
    use super::*;

    /// The last schema before the chain.
    const UNCHAINED: u32 = 2;
    /// A run of such a schema, as the nerve of that schema wrote it.
    const RUN: &str = r#"
        INSERT INTO definitions VALUES ('d1', x'00');
        INSERT INTO workflows VALUES ('a', 'd1');
        INSERT INTO events (source, type, ref, payload, at) VALUES
            ('workflow', 'queued', '01930000000070008000000000000001',
                '{"type":"queued","workflow":"a","prompt":"p","maxRounds":null,"dryRun":false,"trigger":{"type":"client","uid":0}}', 5),
            ('workflow', 'ended', '01930000000070008000000000000001', '{"type":"ended","result":"queue-full","detail":"full"}', 6);
        INSERT INTO workflow_runs (run, tail, workflow, status, killing, exit_code, result, rounds, dry_run, trigger, created_at, ended_at)
            VALUES ('01930000000070008000000000000001', '10000000000000080007000000003910', 'a', 'dropped', 0, 75, 'queue-full', 0, 0,
                '{"type":"client","uid":0}', 5, 6);"#;

    #[test]
    fn a_database_of_each_schema_opens_and_is_sound() {
        for version in 1..VERSION {
            let directory = tempfile::tempdir().unwrap();
            let mut old = Connection::open(directory.path().join("nerve.db")).unwrap();
            migrate_to(&mut old, version.min(UNCHAINED)).unwrap();
            old.execute_batch(RUN).unwrap();
            migrate_to(&mut old, version).unwrap();
            drop(old);
            let store = Store::open(directory.path()).unwrap();
            let all = store.list_events(&EventFilter::default(), Begin::After(0), 9);
            let events = all.unwrap().events;
            let types: Vec<_> = events.iter().map(|event| &*event.event_type).collect();
            assert_eq!(types, ["queued", "ended", "defined"], "schema {version}");
            let head = |index: usize| {
                if index == 0 {
                    Head::default()
                } else {
                    events[index - 1].head()
                }
            };
            for (index, event) in events.iter().enumerate() {
                assert_eq!(head(index).after(&event.entry()), event.head());
            }
            drop(store);
            let scratch = tempfile::tempdir().unwrap();
            let report = check::offline::offline(directory.path(), scratch.path()).unwrap();
            // The definition's digest is none of its bytes.
            assert_eq!(report.faults.len(), 1, "{:?}", report.faults);
        }
    }
}
