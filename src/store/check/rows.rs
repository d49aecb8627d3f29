//! The tables that the events add up to: `workflow_runs`, `workers`, `manager`, `workflows`, `archive`. What should be in
//! them is made anew, by the model's own tables, and compared column by column. A run is compared, and let go, when its
//! last event has come.

use std::collections::{BTreeMap, HashMap, HashSet};

use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::model::name::{RunId, WorkflowName};
use crate::model::report::Report;
use crate::model::run::{Run, RunEvent};
use crate::model::worker::{ManagerEvent, Pause, WorkerEvent, WorkerRecord};
use crate::store::import::imported_row;
use crate::store::log::{Logged, SYSTEM, WORKFLOW};
use crate::store::{DEFINED, Error, RunRow, cold, sql, unsigned};

/// The columns of `workflow_runs` that are compared: all but its own numbering, whose order is.
const COLUMNS: [&str; 19] = [
    "run",
    "tail",
    "workflow",
    "status",
    "killing",
    "aborting",
    "exit_code",
    "result",
    "reason",
    "rounds",
    "max_rounds",
    "dry_run",
    "trigger",
    "key",
    "definition",
    "created_at",
    "started_at",
    "ended_at",
    "old_id",
];

/// A run as far as its events have come, and what of its first event only its row keeps.
struct Folded {
    run: Run,
    trigger: String,
    key: Option<String>,
}

impl Folded {
    fn row(&self) -> RunRow {
        let (run, started, ended) = (&self.run, self.run.started(), self.run.ended());
        RunRow {
            run: run.id.to_string(),
            workflow: run.workflow.to_string(),
            status: run.status(),
            killing: run.is_killing(),
            aborting: run.is_aborting(),
            exit_code: ended.map(|(result, _)| result.end().1),
            result: ended.map(|(result, _)| result.to_string()),
            reason: run.reason().map(str::to_owned),
            rounds: run.position().rounds,
            max_rounds: run.max_rounds,
            dry_run: run.dry_run,
            trigger: self.trigger.clone(),
            definition: started.map(|started| started.definition.clone()),
            created_at: run.created_at,
            started_at: started.map(|started| started.at),
            ended_at: ended.map(|(_, at)| at),
            old_id: None,
        }
    }
}

/// A run's row, in the order of [`COLUMNS`].
fn values(row: RunRow, key: Option<String>) -> [Value; COLUMNS.len()] {
    fn maybe<T>(value: Option<T>, make: impl Fn(T) -> Value) -> Value {
        value.map_or(Value::Null, make)
    }
    let time = |at: u64| Value::Integer(sql(at));
    let number = |number: u32| Value::Integer(number.into());
    let flag = |flag: bool| Value::Integer(flag.into());
    [
        Value::Text(row.run.clone()),
        Value::Text(row.run.chars().rev().collect()),
        Value::Text(row.workflow),
        Value::Text(row.status.to_string()),
        flag(row.killing),
        flag(row.aborting),
        maybe(row.exit_code, |code| Value::Integer(code.into())),
        maybe(row.result, Value::Text),
        maybe(row.reason, Value::Text),
        number(row.rounds),
        maybe(row.max_rounds, number),
        flag(row.dry_run),
        Value::Text(row.trigger),
        maybe(key, Value::Text),
        maybe(row.definition, Value::Text),
        time(row.created_at),
        maybe(row.started_at, time),
        maybe(row.ended_at, time),
        maybe(row.old_id, Value::Text),
    ]
}

/// What of an `archived` event the table `archive` keeps.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Archived {
    #[serde(default)]
    day: String,
    file: String,
    rows: u64,
    first: u64,
    last: u64,
    digest: String,
}

/// What the events so far add up to.
pub(super) struct Tables<'a> {
    connection: &'a Connection,
    /// Runs that have not ended.
    open: HashMap<RunId, Folded>,
    /// Runs without a row: right for those that will be forgotten.
    rowless: HashSet<RunId>,
    /// The number of the newest run's row: rows are in the order in which runs were accepted.
    newest_row: i64,
    workers: BTreeMap<String, WorkerRecord>,
    pause: Option<Pause>,
    workflows: BTreeMap<String, String>,
    archive: BTreeMap<String, Archived>,
    /// Events that are another program's history, the next one last: but for those that make a run they add up to
    /// nothing.
    imported: Vec<u64>,
    /// Imported runs whose rounds have not all come: how many have, and how many there are.
    unfinished: HashMap<RunId, (u32, u32)>,
    is_complete: bool,
}

impl<'a> Tables<'a> {
    pub(super) fn new(connection: &'a Connection) -> Result<Self, Error> {
        let mut select = connection.prepare("SELECT seq FROM imported ORDER BY seq DESC")?;
        let imported = select.query_map([], |row| unsigned(row, "seq"))?;
        Ok(Self {
            connection,
            open: HashMap::new(),
            rowless: HashSet::new(),
            newest_row: i64::MIN,
            workers: BTreeMap::new(),
            pause: None,
            workflows: BTreeMap::new(),
            archive: BTreeMap::new(),
            imported: imported.collect::<Result<_, _>>()?,
            unfinished: HashMap::new(),
            is_complete: true,
        })
    }

    /// From here on nobody knows what is missing.
    pub(super) fn miss_events(&mut self) {
        self.is_complete = false;
        self.open.clear();
        self.unfinished.clear();
    }

    /// One more event.
    pub(super) fn take(&mut self, event: &Logged, report: &mut Report) -> Result<(), Error> {
        let seq = event.seq;
        while let Some(imported) = self.imported.pop_if(|imported| *imported <= seq) {
            if imported == seq {
                return self.imported(event, report);
            }
            report.fault(format!("event {imported} was imported and is not there"));
        }
        let known = match event.source.as_str() {
            WORKFLOW => {
                if let Some(of_run) = parsed::<RunEvent>(event) {
                    self.run(event, &of_run, report)?;
                    true
                } else {
                    self.worker(event)
                }
            }
            SYSTEM => self.system(event, report),
            _ => true,
        };
        if !known {
            let (kind, of) = (&event.event_type, &event.reference);
            report.fault(format!("event {seq}, {kind:?} of {of:?}, makes no sense"));
        }
        Ok(())
    }

    fn imported(&mut self, event: &Logged, report: &mut Report) -> Result<(), Error> {
        let is_ours = [RunEvent::IMPORTED, RunEvent::MESSAGE].contains(&event.event_type.as_str());
        if !is_ours {
            return Ok(());
        }
        match (event.reference.parse(), parsed::<RunEvent>(event)) {
            (Ok(id), Some(RunEvent::Imported(run))) => {
                if run.rounds > 0 {
                    self.unfinished.insert(id, (0, run.rounds));
                }
                self.begin(id, report)?;
                self.compare(id, imported_row(&run), None, report)?;
            }
            (Ok(id), Some(RunEvent::ThreadWorkflowMessage { round, .. })) => {
                self.imported_round(id, round, event.seq, report);
            }
            _ => report.fault(format!("event {} is of no imported run", event.seq)),
        }
        Ok(())
    }

    fn imported_round(&mut self, id: RunId, round: u32, seq: u64, report: &mut Report) {
        match self.unfinished.get_mut(&id) {
            Some((come, all)) if round == *come + 1 => {
                *come = round;
                if come == all {
                    self.unfinished.remove(&id);
                }
            }
            None if !self.is_complete => {}
            _ => report.fault(format!(
                "event {seq}: round {round} of run {id} is not the one that follows"
            )),
        }
    }

    fn run(&mut self, event: &Logged, of_run: &RunEvent, report: &mut Report) -> Result<(), Error> {
        let seq = event.seq;
        let Ok(id) = event.reference.parse::<RunId>() else {
            report.fault(format!("event {seq} is of no run"));
            return Ok(());
        };
        let folded = match (self.open.remove(&id), of_run) {
            (None, RunEvent::Queued(accepted)) => {
                self.begin(id, report)?;
                Folded {
                    run: Run::accept(id, event.at, accepted),
                    trigger: accepted.trigger.to_string(),
                    key: accepted.key.clone(),
                }
            }
            (Some(folded), of_run) => match folded.run.after(of_run, event.at) {
                Ok(run) => Folded { run, ..folded },
                Err(illegal) => {
                    report.fault(format!("event {seq}: {illegal}"));
                    folded
                }
            },
            (None, _) if self.is_complete => {
                report.fault(format!("event {seq} is of run {id}, which is not open"));
                return Ok(());
            }
            (None, _) => return Ok(()),
        };
        if folded.run.status().is_terminal() {
            self.compare(id, folded.row(), folded.key, report)
        } else {
            self.open.insert(id, folded);
            Ok(())
        }
    }

    /// A run's first event: its row comes after those of the runs before it.
    fn begin(&mut self, id: RunId, report: &mut Report) -> Result<(), Error> {
        let mut find = self
            .connection
            .prepare_cached("SELECT seq FROM workflow_runs WHERE run = ?1")?;
        let row: Option<i64> = find
            .query_row([id.to_string()], |row| row.get(0))
            .optional()?;
        match row {
            None => drop(self.rowless.insert(id)),
            Some(row) if row > self.newest_row => {
                self.unexplained(Some(row), report)?;
                self.newest_row = row;
            }
            Some(_) => report.fault(format!("run {id}: its row is not in its place")),
        }
        Ok(())
    }

    /// Rows after the newest one, up to this one, are of runs that were never accepted.
    fn unexplained(&self, next: Option<i64>, report: &mut Report) -> Result<(), Error> {
        if !self.is_complete {
            return Ok(());
        }
        let mut between = self
            .connection
            .prepare_cached("SELECT run FROM workflow_runs WHERE seq > ?1 AND seq < ?2")?;
        let next = next.unwrap_or(i64::MAX);
        let runs = between.query_map([self.newest_row, next], |row| row.get::<_, String>(0))?;
        for run in runs {
            report.fault(format!("run {}: no event made its row", run?));
        }
        Ok(())
    }

    fn compare(
        &mut self,
        id: RunId,
        expected: RunRow,
        key: Option<String>,
        report: &mut Report,
    ) -> Result<(), Error> {
        let mut select = self.connection.prepare_cached(&format!(
            "SELECT {} FROM workflow_runs WHERE run = ?1",
            COLUMNS.join(", ")
        ))?;
        let mut rows = select.query([id.to_string()])?;
        // One without a row is known to be without.
        let Some(row) = rows.next()? else {
            return Ok(());
        };
        for (index, (column, expected)) in COLUMNS.iter().zip(values(expected, key)).enumerate() {
            let found: Value = row.get(index)?;
            if found != expected {
                let (found, expected) = (shown(&found), shown(&expected));
                report.fault(format!(
                    "run {id}: its {column} is {found}, by its events it is {expected}"
                ));
            }
        }
        Ok(())
    }

    fn worker(&mut self, event: &Logged) -> bool {
        let name = event.reference.parse::<WorkflowName>();
        let (Some(of_worker), Ok(_)) = (parsed::<WorkerEvent>(event), name) else {
            return false;
        };
        let record = self.workers.entry(event.reference.clone()).or_default();
        *record = record.after(&of_worker, event.at);
        true
    }

    /// Whether it is one of those that there are.
    fn system(&mut self, event: &Logged, report: &mut Report) -> bool {
        match event.event_type.as_str() {
            DEFINED => {
                #[derive(Deserialize)]
                struct Defined {
                    definition: String,
                }
                let defined: Option<Defined> = parsed(event);
                let Some(Defined { definition }) = defined else {
                    return false;
                };
                self.workflows.insert(event.reference.clone(), definition);
            }
            "archived" => {
                let archived: Option<Archived> = parsed(event);
                let Some(mut archived) = archived else {
                    return false;
                };
                archived.day.clone_from(&event.reference);
                self.archive.insert(archived.file.clone(), archived);
            }
            "restored" => self.archive.retain(|_, file| file.day != event.reference),
            "forgotten" => {
                let Ok(id) = event.reference.parse::<RunId>() else {
                    return false;
                };
                self.unfinished.remove(&id);
                if !self.rowless.remove(&id) && self.is_complete {
                    report.fault(format!("run {id}: it was forgotten, and has a row"));
                }
            }
            _ => {
                let Some(of_manager) = parsed::<ManagerEvent>(event) else {
                    return false;
                };
                self.pause = of_manager.pause(event.at);
            }
        }
        true
    }

    /// All events have come.
    pub(super) fn finish(mut self, report: &mut Report) -> Result<(), Error> {
        let count = "SELECT count(*) FROM workflow_runs";
        report.runs = self
            .connection
            .query_row(count, [], |row| unsigned(row, "count(*)"))?;
        for (id, folded) in std::mem::take(&mut self.open) {
            self.compare(id, folded.row(), folded.key, report)?;
        }
        for seq in self.imported.iter().rev() {
            report.fault(format!("event {seq} was imported and is not there"));
        }
        if !self.is_complete {
            report.fault("what events are missing may have changed, so not everything is compared");
            return Ok(());
        }
        for id in &self.rowless {
            report.fault(format!("run {id}: its row is missing"));
        }
        for (id, (come, all)) in &self.unfinished {
            report.fault(format!(
                "run {id}: {come} of its {all} rounds are there; its import was cut off, and is completed by repeating it"
            ));
        }
        self.unexplained(None, report)?;
        let pause = self.pause.take().map(|pause| ("pause".to_owned(), pause));
        let json = |text: String| serde_json::from_str(&text).ok();
        self.same("workers", "workflow, record", &self.workers, json, report)?;
        let json = |text: String| serde_json::from_str(&text).ok();
        let manager = pause.into_iter().collect();
        self.same("manager", "name, value", &manager, json, report)?;
        self.same(
            "workflows",
            "name, definition",
            &self.workflows,
            Some,
            report,
        )?;
        self.archive(report)
    }

    /// A table of names and values has these and no others.
    fn same<T: PartialEq>(
        &self,
        table: &str,
        columns: &str,
        expected: &BTreeMap<String, T>,
        read: impl Fn(String) -> Option<T>,
        report: &mut Report,
    ) -> Result<(), Error> {
        let mut select = self
            .connection
            .prepare(&format!("SELECT {columns} FROM {table}"))?;
        let mut rows = select.query([])?;
        let mut found = HashSet::new();
        while let Some(row) = rows.next()? {
            let (name, value): (String, String) = (row.get(0)?, row.get(1)?);
            if !expected
                .get(&name)
                .is_some_and(|expected| read(value).as_ref() == Some(expected))
            {
                report.fault(format!("{table}: {name} is not what its events add up to"));
            }
            found.insert(name);
        }
        for name in expected.keys().filter(|name| !found.contains(*name)) {
            report.fault(format!("{table}: {name} is missing"));
        }
        Ok(())
    }

    fn archive(&mut self, report: &mut Report) -> Result<(), Error> {
        let mut select = self
            .connection
            .prepare("SELECT day, part, file, rows, first, last, digest, cleared FROM archive")?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let found = Archived {
                day: row.get("day")?,
                file: row.get("file")?,
                rows: unsigned(row, "rows")?,
                first: unsigned(row, "first")?,
                last: unsigned(row, "last")?,
                digest: row.get("digest")?,
            };
            let named = cold::Name::parse(&found.file);
            let named = named.map(|name| (name.day, name.part));
            let place = (found.day.clone(), row.get("part")?);
            // How far its events are cleared from the database is no event.
            let cleared = unsigned(row, "cleared")?;
            let is_right = self.archive.remove(&found.file).as_ref() == Some(&found)
                && named == Some(place)
                && cleared <= found.last;
            if !is_right {
                let file = found.file;
                report.fault(format!("archive: {file} is not as its event has it"));
            }
        }
        for file in self.archive.keys() {
            report.fault(format!("archive: {file} is missing"));
        }
        Ok(())
    }
}

/// The event in the model's words, if its payload is one of the type that it has.
fn parsed<T: DeserializeOwned>(event: &Logged) -> Option<T> {
    serde_json::from_str(&event.payload).ok()
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "not there".to_owned(),
        Value::Integer(number) => number.to_string(),
        Value::Real(number) => number.to_string(),
        Value::Text(text) => format!("{text:?}"),
        Value::Blob(bytes) => format!("{} bytes", bytes.len()),
    }
}
