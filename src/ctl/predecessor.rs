//! What the TypeScript predecessor kept: its database, the log beside that, and its archive. They are only read: not
//! even a file beside them is made.

use std::fmt::{self, Display, Formatter};
use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rusqlite::types::ValueRef;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

use super::input::unreadable;
use super::{Failure, note};
use crate::model::hex::hex;
use crate::model::predecessor::{OldRun, Row, Survey};
use crate::model::run::Imported;

/// The predecessor's database, and what its archive held.
pub(super) struct Old {
    connection: Connection,
    path: PathBuf,
    has_exit_codes: bool,
    /// Where it is a copy: removed in the end.
    _copy: Option<Copy>,
}

/// Rows in the order of their ids; one that is in the log and in the archive is one row.
const COLUMNS: &str = "id, source, type, ref_id, payload, timestamp";

impl Old {
    /// Opens a database, and makes sure that it is the predecessor's and whole.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let path = path.to_owned();
        let failed = |error: &dyn Display| unreadable(&path, error);
        fs::metadata(&path).map_err(|error| failed(&error))?;
        let (wal, index) = (beside(&path, "-wal"), beside(&path, "-shm"));
        let has_log = fs::metadata(wal).is_ok_and(|log| log.len() > 0);
        let mut copy = None;
        let uri = match (has_log, index.exists()) {
            (false, _) => uri(&path, "immutable=1"),
            (true, true) => uri(&path, "mode=ro&readonly_shm=1"),
            // Nobody has it open, or there were an index of its log; one of our own would be a file beside it.
            (true, false) => {
                let made = Copy::of(&path).map_err(|error| failed(&error))?;
                let uri = uri(&made.0.join("logs.db"), "mode=rw");
                copy = Some(made);
                uri
            }
        };
        let mut flags = OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        flags |= if copy.is_some() {
            OpenFlags::SQLITE_OPEN_READ_WRITE
        } else {
            OpenFlags::SQLITE_OPEN_READ_ONLY
        };
        let opened = (|| {
            let connection = Connection::open_with_flags(uri, flags)?;
            connection.pragma_update(None, "trusted_schema", false)?;
            connection.execute_batch(
                "CREATE TEMP TABLE archived (id INTEGER, source TEXT, type TEXT, ref_id TEXT, payload TEXT,
                     timestamp INTEGER);
                 CREATE INDEX temp.archived_of ON archived (ref_id);
                 CREATE TEMP TABLE days (day TEXT, first INTEGER);",
            )?;
            let verdict: String =
                connection.query_row("PRAGMA main.quick_check(1)", [], |row| row.get(0))?;
            Ok((connection, verdict))
        })();
        let (connection, verdict) =
            opened.map_err(|error: rusqlite::Error| failed(&said(&error)))?;
        if verdict != "ok" {
            return Err(failed(&format!("it is damaged: {verdict}")));
        }
        let mut old = Self {
            connection,
            path,
            has_exit_codes: false,
            _copy: copy,
        };
        old.check_columns(
            "logs",
            &["id", "source", "type", "ref_id", "payload", "timestamp"],
        )?;
        let runs = ["run_id", "workflow", "status", "timestamp", "exit_code"];
        let found = old.check_columns("workflow_runs", &runs[..4])?;
        old.index_logs().map_err(|error| old.failed(&error))?;
        old.has_exit_codes = found.iter().any(|column| column == runs[4]);
        Ok(old)
    }

    /// Whether a table has what it should have, and nothing that is not known.
    fn check_columns(&self, table: &str, needed: &[&str]) -> Result<Vec<String>, Failure> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let mut select = self.connection.prepare(
                "SELECT column.name FROM main.sqlite_schema AS thing, pragma_table_info(thing.name, 'main') AS column
                 WHERE thing.type = 'table' AND thing.name = ?1",
            )?;
            select.query_map([table], |row| row.get(0))?.collect()
        };
        let found = read().map_err(|error| self.failed(&error))?;
        let path = self.path.display();
        let is_there = |column: &&str| found.iter().any(|name| name == column);
        if !needed.iter().all(is_there) {
            return Err(Failure::Input(format!(
                "{path} is no database of the predecessor: it has no table {table} with the columns {}",
                needed.join(", ")
            )));
        }
        let known = |column: &&String| needed.contains(&column.as_str()) || *column == "exit_code";
        match found.iter().find(|column| !known(column)) {
            Some(column) => Err(Failure::Input(format!(
                "{path} is newer than what can be imported: its table {table} has a column {column}"
            ))),
            None => Ok(found),
        }
    }

    fn index_logs(&self) -> rusqlite::Result<()> {
        self.connection.execute_batch(
            "CREATE TEMP TABLE logged (ref_id TEXT, place INTEGER, PRIMARY KEY (ref_id, place)) WITHOUT ROWID;
             INSERT INTO temp.logged SELECT ref_id, rowid FROM main.logs
             WHERE ref_id IN (SELECT run_id FROM main.workflow_runs) ORDER BY ref_id, rowid;",
        )
    }

    /// Loads the archive, if there is one: that which is given, or, once days were archived, the one beside the database.
    pub(super) fn load_archive(&self, given: Option<&Path>) -> Result<(), Failure> {
        let usual = self.path.with_file_name("archive").join("logs");
        let directory = given.unwrap_or(&usual);
        let newest = self.archived_up_to()?;
        if let Some(day) = &newest
            && !directory.join(format!("{day}.jsonl")).is_file()
        {
            return Err(Failure::Input(format!(
                "the log of {} up to {day} is in an archive, and {} has no {day}.jsonl; say where it is with --archive",
                self.path.display(),
                directory.display()
            )));
        }
        if newest.is_some() || given.is_some() {
            let is_day = |path: &&PathBuf| {
                path.extension()
                    .is_some_and(|extension| extension == "jsonl")
            };
            for path in entries(directory)?.iter().filter(is_day) {
                self.load_day(path)?;
            }
        }
        self.check_ids(directory, newest.as_deref())
    }

    /// The predecessor left no id out, so each that is in neither the log nor the archive was lost.
    fn check_ids(&self, archive: &Path, newest: Option<&str>) -> Result<(), Failure> {
        let failed = |error| self.failed(&error);
        let Some(gap) = self.gap().map_err(failed)? else {
            return Ok(());
        };
        let missing = match newest {
            Some(day) => self.missing_day(&gap, day).map_err(failed)?,
            None => None,
        };
        let (path, archive) = (self.path.display(), archive.display());
        match missing {
            Some(day) => Err(Failure::Input(format!(
                "{gap} of the log of {path} are missing, and {archive} has no {day}.jsonl; say where the whole archive is with --archive; nothing was imported"
            ))),
            None => {
                note(&format!(
                    "nervectl: {gap} of the log of {path} are missing; all others are imported"
                ));
                Ok(())
            }
        }
    }

    /// The first ids that no row has.
    fn gap(&self) -> rusqlite::Result<Option<Gap>> {
        let end = if self
            .connection
            .table_exists(Some("main"), "sqlite_sequence")?
        {
            "UNION SELECT seq + 1 FROM main.sqlite_sequence WHERE name = 'logs'"
        } else {
            ""
        };
        let mut select = self.connection.prepare(&format!(
            "WITH ids (id) AS (SELECT 0 UNION SELECT id FROM main.logs UNION SELECT id FROM temp.archived {end})
             SELECT CAST(previous + 1 AS INTEGER), CAST(id - 1 AS INTEGER),
                 CAST(sum(id - previous - 1) OVER () AS INTEGER)
             FROM (SELECT id, lag(id) OVER (ORDER BY id) AS previous FROM ids WHERE id >= 0)
             WHERE id > previous + 1 ORDER BY id LIMIT 1"
        ))?;
        let gap = select.query_row([], |row| {
            Ok(Gap {
                first: row.get(0)?,
                last: row.get(1)?,
                total: row.get(2)?,
            })
        });
        gap.optional()
    }

    /// A day whose file is missing. From its first day on the predecessor made one for every day, even for an empty one;
    /// a day that it archived again, for the sake of late rows, has lost what it had.
    fn missing_day(&self, gap: &Gap, newest: &str) -> rusqlite::Result<Option<String>> {
        let mut select = self.connection.prepare(
            "SELECT date(day, '+1 day') AS next FROM temp.days
             WHERE next <= ?1 AND next NOT IN (SELECT day FROM temp.days) ORDER BY next LIMIT 1",
        )?;
        let between: Option<String> = select.query_row([newest], |row| row.get(0)).optional()?;
        if between.is_some() || gap.first > 1 {
            return Ok(between);
        }
        let mut select = self
            .connection
            .prepare("SELECT date(day, '-1 day'), first FROM temp.days ORDER BY day LIMIT 1")?;
        let (before, first): (Option<String>, Option<i64>) =
            select.query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(before.filter(|_| first.is_none_or(|first| first == gap.last + 1)))
    }

    fn load_day(&self, path: &Path) -> Result<(), Failure> {
        let file = File::open(path).map_err(|error| unreadable(path, &error))?;
        let mut insert =
            self.prepare("INSERT INTO temp.archived VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?;
        let mut first: Option<i64> = None;
        for (number, line) in (1..).zip(BufReader::new(file).lines()) {
            let broken = |error: &dyn Display| {
                let path = path.display();
                Failure::Input(format!("{path}:{number} is no row of a log: {error}"))
            };
            let line = line.map_err(|error| broken(&error))?;
            let row: Row = serde_json::from_str(&line).map_err(|error| broken(&error))?;
            first = Some(first.map_or(row.id, |first| first.min(row.id)));
            let (ref_id, payload) = (row.ref_id, row.payload);
            let row = params![
                row.id,
                row.source,
                row.row_type,
                ref_id,
                payload,
                row.timestamp
            ];
            insert.execute(row).map_err(|error| self.failed(&error))?;
        }
        let day = path.file_stem().unwrap_or_default().to_string_lossy();
        let mut insert = self.prepare("INSERT INTO temp.days VALUES (?1, ?2)")?;
        let inserted = insert.execute(params![day, first]);
        inserted.map_err(|error| self.failed(&error))?;
        Ok(())
    }

    fn archived_up_to(&self) -> Result<Option<String>, Failure> {
        let read = || -> rusqlite::Result<Option<String>> {
            if !self.connection.table_exists(Some("main"), "meta")? {
                return Ok(None);
            }
            let select = "SELECT value FROM main.meta WHERE key = 'archived_up_to'";
            let value = self.connection.query_row(select, [], |row| row.get(0));
            value.optional()
        };
        read().map_err(|error| self.failed(&error))
    }

    /// Every run, the oldest first; a status that nobody knows is found before anything is sent.
    pub(super) fn runs(&self) -> Result<Runs, Failure> {
        let exit_code = if self.has_exit_codes {
            "exit_code"
        } else {
            "NULL"
        };
        let read = || -> rusqlite::Result<Vec<OldRun>> {
            let mut select = self.connection.prepare(&format!(
                "SELECT run_id, workflow, status, timestamp, {exit_code} FROM main.workflow_runs ORDER BY timestamp, run_id"
            ))?;
            let run = |row: &rusqlite::Row<'_>| {
                Ok(OldRun {
                    id: text(row.get_ref(0)?).unwrap_or_default(),
                    workflow: text(row.get_ref(1)?).unwrap_or_default(),
                    status: text(row.get_ref(2)?).unwrap_or_default(),
                    timestamp: whole(row.get_ref(3)?).unwrap_or_default(),
                    exit_code: whole(row.get_ref(4)?),
                })
            };
            select.query_map([], run)?.collect()
        };
        let runs = read().map_err(|error| self.failed(&error))?;
        for run in &runs {
            conclude(Survey::default(), run.clone())?;
        }
        Ok(Runs(runs.into_iter()))
    }

    /// Every row of a run. The older databases have no index of them, and nothing is written there.
    pub(super) fn rows_of_run(&self) -> Result<rusqlite::CachedStatement<'_>, Failure> {
        self.prepare(&format!(
            "SELECT {COLUMNS} FROM main.logs WHERE rowid IN (SELECT place FROM temp.logged WHERE ref_id = ?1)
             UNION SELECT {COLUMNS} FROM temp.archived WHERE ref_id = ?1 ORDER BY id"
        ))
    }

    pub(super) fn other_rows(&self) -> Result<rusqlite::CachedStatement<'_>, Failure> {
        let of_none = "ref_id IS NULL OR ref_id NOT IN (SELECT run_id FROM main.workflow_runs WHERE run_id IS NOT NULL)";
        self.prepare(&format!(
            "SELECT {COLUMNS} FROM main.logs WHERE {of_none}
             UNION SELECT {COLUMNS} FROM temp.archived WHERE {of_none} ORDER BY id"
        ))
    }

    fn prepare(&self, sql: &str) -> Result<rusqlite::CachedStatement<'_>, Failure> {
        let prepared = self.connection.prepare_cached(sql);
        prepared.map_err(|error| self.failed(&error))
    }

    pub(super) fn next(&self, rows: &mut rusqlite::Rows<'_>) -> Result<Option<Row>, Failure> {
        let mut read = || -> rusqlite::Result<Option<Row>> {
            let Some(row) = rows.next()? else {
                return Ok(None);
            };
            Ok(Some(Row {
                id: whole(row.get_ref(0)?).unwrap_or_default(),
                source: text(row.get_ref(1)?).unwrap_or_default(),
                row_type: text(row.get_ref(2)?).unwrap_or_default(),
                ref_id: text(row.get_ref(3)?),
                payload: text(row.get_ref(4)?),
                timestamp: whole(row.get_ref(5)?).unwrap_or_default(),
            }))
        };
        read().map_err(|error| self.failed(&error))
    }

    pub(super) fn failed(&self, error: &rusqlite::Error) -> Failure {
        unreadable(&self.path, &said(error))
    }
}

/// Ids that no row has: the first ones without a break, and how many there are in all.
struct Gap {
    first: i64,
    last: i64,
    total: i64,
}

impl Display for Gap {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let Self { first, last, total } = self;
        write!(formatter, "rows {first} to {last}")?;
        match total - (last - first + 1) {
            0 => Ok(()),
            more => write!(formatter, " and {more} more"),
        }
    }
}

/// The runs that are still to be sent.
pub(super) struct Runs(std::vec::IntoIter<OldRun>);

impl Runs {
    pub(super) fn next(&mut self, old: &Old) -> Result<Option<Imported>, Failure> {
        let Some(run) = self.0.next() else {
            return Ok(None);
        };
        let mut survey = Survey::default();
        let mut statement = old.rows_of_run()?;
        let mut rows = statement
            .query([&run.id])
            .map_err(|error| old.failed(&error))?;
        while let Some(row) = old.next(&mut rows)? {
            survey.see(&row);
        }
        conclude(survey, run).map(Some)
    }
}

fn conclude(survey: Survey, run: OldRun) -> Result<Imported, Failure> {
    let id = run.id.clone();
    let concluded = survey.conclude(run);
    concluded.map_err(|error| Failure::Input(format!("run {id:?}: {error}; nothing was imported")))
}

/// SQLite does not hold anybody to the types of columns.
fn text(value: ValueRef<'_>) -> Option<String> {
    match value {
        ValueRef::Null => None,
        ValueRef::Integer(number) => Some(number.to_string()),
        ValueRef::Real(number) => Some(number.to_string()),
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            Some(String::from_utf8_lossy(bytes).into_owned())
        }
    }
}

fn whole(value: ValueRef<'_>) -> Option<i64> {
    match value {
        ValueRef::Integer(number) => Some(number),
        #[expect(clippy::cast_possible_truncation, reason = "it saturates")]
        ValueRef::Real(number) => Some(number as i64),
        _ => None,
    }
}

fn said(error: &rusqlite::Error) -> String {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => "it is no SQLite database".to_owned(),
        Some(rusqlite::ErrorCode::DatabaseCorrupt) => format!("it is damaged: {error}"),
        _ => error.to_string(),
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// sqlite.org/uri.html
fn uri(path: &Path, parameters: &str) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut uri = "file://".to_owned();
    for byte in absolute.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'.' | b'-' | b'_' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => {
                uri.push(char::from(*byte))
            }
            byte => uri.extend(["%", &hex(&[*byte])]),
        }
    }
    uri + "?" + parameters
}

/// A database and its log, copied to where SQLite may work on them; removed when it is dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(path: &Path) -> io::Result<Self> {
        let directory =
            std::env::temp_dir().join(format!("nervectl-import-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&directory)?;
        let copy = Self(directory);
        fs::copy(path, copy.0.join("logs.db"))?;
        fs::copy(beside(path, "-wal"), copy.0.join("logs.db-wal"))?;
        Ok(copy)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What is left over is in nobody's way.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a directory holds, in order.
pub(super) fn entries(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let read = fs::read_dir(directory).and_then(|entries| {
        let paths = entries.map(|entry| Ok(entry?.path()));
        paths.collect::<io::Result<Vec<_>>>()
    });
    let mut paths = read.map_err(|error| unreadable(directory, &error))?;
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A database with rows of these ids, one run each, and a file of the archive for each day with these.
    fn old(
        ids: &[i64],
        archived_up_to: Option<&str>,
        days: &[(&str, &[i64])],
    ) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let connection = Connection::open(directory.path().join("logs.db")).unwrap();
        connection
            .execute_batch(
                "CREATE TABLE logs (id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, type TEXT NOT NULL,
                     ref_id TEXT, payload TEXT, timestamp INTEGER NOT NULL);
                 CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
                 CREATE TABLE workflow_runs (run_id TEXT PRIMARY KEY, workflow TEXT NOT NULL, status TEXT NOT NULL,
                     timestamp INTEGER NOT NULL);",
            )
            .unwrap();
        for id in ids {
            let insert =
                "INSERT INTO logs VALUES (?1, 'workflow', 'started', 'run-' || ?1, NULL, 0)";
            connection.execute(insert, [id]).unwrap();
            let insert = "INSERT INTO workflow_runs VALUES ('run-' || ?1, 'w', 'completed', ?1)";
            connection.execute(insert, [id]).unwrap();
        }
        if let Some(day) = archived_up_to {
            let insert = "INSERT INTO meta VALUES ('archived_up_to', ?1)";
            connection.execute(insert, [day]).unwrap();
        }
        let archive = directory.path().join("archive/logs");
        fs::create_dir_all(&archive).unwrap();
        for (day, ids) in days {
            let line = |id: &i64| {
                format!(
                    "{{\"id\":{id},\"source\":\"system\",\"type\":\"t\",\"refId\":null,\"payload\":null,\"timestamp\":0}}\n"
                )
            };
            let lines: String = ids.iter().map(line).collect();
            fs::write(archive.join(format!("{day}.jsonl")), lines).unwrap();
        }
        directory
    }

    fn load(directory: &tempfile::TempDir, given: Option<&Path>) -> Result<Old, String> {
        let loaded = (|| {
            let old = Old::open(&directory.path().join("logs.db"))?;
            old.load_archive(given)?;
            Ok(old)
        })();
        loaded.map_err(|failure: Failure| failure.to_string())
    }

    #[test]
    fn a_day_that_is_missing_is_named() {
        let newest = Some("2026-03-01");
        let (february, march) = ("2026-02-28", "2026-03-01");
        for (rows, days, missing) in [
            ("rows 1 to 4 ", &[(march, &[][..])][..], "2026-02-28.jsonl"),
            ("rows 1 to 2 ", &[(march, &[3, 4])], "2026-02-28.jsonl"),
            (
                "rows 2 to 3 ",
                &[("2026-02-27", &[1]), (march, &[4])],
                "2026-02-28.jsonl",
            ),
            (
                "rows 2 to 2 and 1 more ",
                &[("2026-02-27", &[1, 3]), (march, &[])],
                "2026-02-28.jsonl",
            ),
            ("", &[(february, &[1, 2, 3, 4])], "2026-03-01.jsonl"),
        ] {
            let directory = old(&[5, 6], newest, days);
            let said = load(&directory, None).err().unwrap();
            for words in [rows, missing, "--archive"] {
                assert!(said.contains(words), "{said}");
            }
        }
    }

    #[test]
    fn a_log_that_is_whole_or_was_never_whole_is_taken() {
        let newest = Some("2026-03-01");
        let (february, march) = ("2026-02-28", "2026-03-01");
        for (ids, newest, days) in [
            (&[1, 2][..], None, &[][..]),
            (&[3, 7], None, &[]),
            (&[], None, &[]),
            (&[2, 3], newest, &[(march, &[1, 2][..])]),
            // The file of an empty day is nobody's loss.
            (&[3], newest, &[("2026-02-27", &[1]), (march, &[2])]),
            // The day was archived again, for a late row, and has lost rows 1 to 2.
            (&[3], newest, &[(february, &[4]), (march, &[])]),
            (&[4], newest, &[(february, &[1]), (march, &[3])]),
        ] {
            let directory = old(ids, newest, days);
            assert_eq!(load(&directory, None).err(), None, "{ids:?}");
        }
    }

    #[test]
    fn rows_at_the_end_may_be_missing_too() {
        let newest = Some("2026-03-01");
        let directory = old(
            &[1, 2, 3],
            newest,
            &[("2026-02-27", &[]), ("2026-03-01", &[])],
        );
        let connection = Connection::open(directory.path().join("logs.db")).unwrap();
        connection
            .execute("DELETE FROM logs WHERE id > 1", [])
            .unwrap();
        drop(connection);
        let said = load(&directory, None).err().unwrap();
        assert!(said.contains("rows 2 to 3 "), "{said}");
    }

    #[test]
    fn rows_of_a_run_are_found_without_reading_the_log() {
        let directory = old(&[1, 2, 3], None, &[]);
        let old = load(&directory, None).unwrap();
        let mut statement = old.rows_of_run().unwrap();
        let mut rows = statement.query(["run-2"]).unwrap();
        assert_eq!(old.next(&mut rows).unwrap().unwrap().id, 2);
        assert_eq!(old.next(&mut rows).unwrap(), None);
        drop(rows);
        let steps = rusqlite::StatementStatus::FullscanStep;
        assert_eq!(statement.get_status(steps), 0);
    }

    #[test]
    fn the_archive_of_another_log_is_read_only_when_it_is_given() {
        let directory = old(&[1], None, &[("2026-03-01", &[2])]);
        let count = |old: &Old| {
            let mut statement = old.other_rows().unwrap();
            let mut rows = statement.query([]).unwrap();
            std::iter::from_fn(|| old.next(&mut rows).unwrap()).count()
        };
        assert_eq!(count(&load(&directory, None).unwrap()), 0);
        let given = directory.path().join("archive/logs");
        assert_eq!(count(&load(&directory, Some(&given)).unwrap()), 1);
    }
}
