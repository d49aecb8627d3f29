//! The schema, as an append-only list of migrations indexed by `user_version`. Never change or remove an entry: a
//! database of any release opens for ever.

use rusqlite::{Connection, TransactionBehavior};

use super::Error;

const MIGRATIONS: [&str; 2] = [
    // `runs` is what the events add up to. `tail` is the id backwards, so that a prefix of it is a tail of the id.
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
    // `workers` and `manager` are what the events of workflows and of the manager add up to.
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
];

/// Brings the database to this version's schema.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), Error> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Exclusive)?;
    let version: u32 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let known = u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX);
    if version > known {
        return Err(Error::TooNew {
            found: version,
            known,
        });
    }
    for migration in MIGRATIONS.iter().skip(version as usize) {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", known)?;
    transaction.commit()?;
    Ok(())
}
