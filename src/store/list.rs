//! Lists of runs, newest first by the time at which they were accepted. Each page is read from one index, or from a few
//! of which each has the order already: nothing is sorted, and what is not in the page is not read, however many runs
//! there are.

use rusqlite::types::ToSql;

use super::read::{RUN_COLUMNS, RunRow, run_row};
use super::{Error, Store, sql};
use crate::model::name::{RunId, WorkflowName};
use crate::model::status::Status;

/// Which runs to list; by default all.
#[derive(Debug, Clone, Default)]
pub struct RunFilter {
    /// Of this workflow only.
    pub workflow: Option<WorkflowName>,
    /// Only those that stand there; when it is empty, wherever they stand.
    pub statuses: Vec<Status>,
    /// Only those that ended with this code.
    pub exit_code: Option<u8>,
    /// Only those that have not ended.
    pub active: bool,
    /// Accepted then or later, µs since the epoch.
    pub since: Option<u64>,
    /// Accepted then or earlier.
    pub until: Option<u64>,
    /// Only what the list has after this run, which need not be in it.
    pub before: Option<RunId>,
    /// At most so many.
    pub limit: u32,
}

/// By name.
type Parameters = Vec<(&'static str, Box<dyn ToSql>)>;

/// One way through the runs: the index that has them in order, and what to leave out.
struct Path {
    index: &'static str,
    condition: String,
}

impl RunFilter {
    /// The ways that lead to all runs of the filter, none of them twice.
    fn paths(&self) -> Vec<Path> {
        let names = |statuses: &[Status]| -> String {
            let quoted = statuses.iter().map(|status| format!("'{status}'"));
            quoted.collect::<Vec<_>>().join(", ")
        };
        let path = |index, condition: String| Path { index, condition };
        let is_wanted = |status: &Status| {
            (self.statuses.is_empty() || self.statuses.contains(status))
                && !(self.active && status.is_terminal())
        };
        let wanted = Status::ALL.into_iter().filter(is_wanted);
        let (ended, open): (Vec<_>, Vec<_>) = wanted.partition(|status| status.is_terminal());
        let has_workflow = self.workflow.is_some();
        if self.exit_code.is_some() {
            if ended.is_empty() {
                return Vec::new();
            }
            // A code is nearly always one status's, so that hardly a row is left out.
            let index = if has_workflow {
                "runs_by_workflow_and_exit_code"
            } else {
                "runs_by_exit_code"
            };
            let statuses = names(&ended);
            let condition =
                format!("ended_at IS NOT NULL AND exit_code = :code AND status IN ({statuses})");
            return vec![path(index, condition)];
        }
        if self.statuses.is_empty() && !self.active {
            let index = if has_workflow {
                "runs_by_workflow"
            } else {
                "runs_by_time"
            };
            return vec![path(index, "TRUE".to_owned())];
        }
        let mut paths = Vec::new();
        if !open.is_empty() {
            let condition = format!("ended_at IS NULL AND status IN ({})", names(&open));
            paths.push(path("runs_open_by_time", condition));
        }
        let index = if has_workflow {
            "runs_by_workflow_and_status"
        } else {
            "runs_by_status"
        };
        paths.extend(ended.iter().map(|status| {
            let condition = format!("ended_at IS NOT NULL AND status = '{status}'");
            path(index, condition)
        }));
        paths
    }

    fn sql(&self, path: &Path) -> String {
        let Path { index, condition } = path;
        let mut sql = format!(
            "SELECT seq, {RUN_COLUMNS} FROM workflow_runs INDEXED BY {index} WHERE {condition}"
        );
        let conditions = [
            (self.workflow.is_some(), "workflow = :workflow"),
            (self.since.is_some(), "created_at >= :since"),
            (self.until.is_some(), "created_at <= :until"),
            (
                self.before.is_some(),
                "(created_at, seq) < (SELECT created_at, seq FROM workflow_runs WHERE run = :before)",
            ),
        ];
        for (_, condition) in conditions.iter().filter(|(is_given, _)| *is_given) {
            sql.push_str(" AND ");
            sql.push_str(condition);
        }
        sql.push_str(" ORDER BY created_at DESC, seq DESC LIMIT :limit");
        sql
    }

    /// The statements, each with its parameters.
    fn statements(&self) -> Vec<(String, Parameters)> {
        let statement = |path: &Path| {
            let text = self.sql(path);
            let workflow = self.workflow.as_ref().map(|name| name.as_str().to_owned());
            let parameters: [(_, Box<dyn ToSql>); 6] = [
                (":workflow", Box::new(workflow)),
                (":code", Box::new(self.exit_code)),
                (":since", Box::new(self.since.map(sql))),
                (":until", Box::new(self.until.map(sql))),
                (":before", Box::new(self.before.map(|run| run.to_string()))),
                (":limit", Box::new(self.limit)),
            ];
            let is_used = |name: &str| text.contains(name);
            let used = parameters.into_iter().filter(|(name, _)| is_used(name));
            let used = used.collect();
            (text, used)
        };
        self.paths().iter().map(statement).collect()
    }
}

impl Store {
    /// Rows, newest first.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn runs(&self, filter: &RunFilter) -> Result<Vec<RunRow>, Error> {
        let statements = filter.statements();
        let ways = statements.len();
        let mut found: Vec<(i64, RunRow)> = Vec::new();
        for (statement, parameters) in statements {
            let mut select = self.connection.prepare_cached(&statement)?;
            let parameters: Vec<(&str, &dyn ToSql)> = parameters
                .iter()
                .map(|(name, value)| (*name, &**value))
                .collect();
            let mut rows = select.query(&*parameters)?;
            while let Some(row) = rows.next()? {
                found.push((row.get("seq")?, run_row(row)?));
            }
        }
        if ways > 1 {
            found.sort_by_key(|(seq, row)| std::cmp::Reverse((row.created_at, *seq)));
            found.truncate(usize::try_from(filter.limit).unwrap_or(usize::MAX));
        }
        Ok(found.into_iter().map(|(_, row)| row).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKFLOWS: [&str; 2] = ["a", "b"];
    const ENDS: [(Status, Option<u8>); 8] = [
        (Status::Queued, None),
        (Status::Started, None),
        (Status::Completed, Some(0)),
        (Status::Failed, Some(1)),
        (Status::Failed, Some(2)),
        (Status::Killed, Some(137)),
        (Status::Dropped, Some(75)),
        (Status::Completed, Some(0)),
    ];

    /// A run with this number. Times come in pairs, and the clock is once set back.
    fn row(number: u64) -> (WorkflowName, Status, Option<u8>, u64) {
        let place = usize::try_from(number).unwrap();
        let (status, code) = ENDS[place % ENDS.len()];
        let workflow = WORKFLOWS[place / ENDS.len() % 2].parse().unwrap();
        let at = 1_000 + number / 2 - if number > 60 { 25 } else { 0 };
        (workflow, status, code, at)
    }

    fn id(number: u64) -> RunId {
        RunId::from_bits(u128::from(number))
    }

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        for number in 1..=100 {
            let (workflow, status, code, at) = row(number);
            let insert = "INSERT INTO workflow_runs (seq, run, tail, workflow, status, killing, exit_code, rounds, dry_run,
                 trigger, created_at, ended_at) VALUES (?1, ?2, ?2, ?3, ?4, FALSE, ?5, 0, FALSE, '{}', ?6, ?7)";
            let ended = status.is_terminal().then_some(5_000);
            let (workflow, status) = (workflow.as_str(), status.as_str());
            let run = id(number).to_string();
            let values =
                rusqlite::params![sql(number), run, workflow, status, code, sql(at), ended];
            store.connection.execute(insert, values).unwrap();
        }
        (directory, store)
    }

    /// Every combination, with what it should give.
    fn filters() -> Vec<RunFilter> {
        use Status::{Completed, Failed, Killed, Queued, Started};
        let workflows = [None, Some("a"), Some("absent")];
        let statuses: [&[Status]; 5] = [
            &[],
            &[Failed],
            &[Queued],
            &[Started, Failed, Killed],
            &[Completed, Failed],
        ];
        let times = [
            (None, None),
            (Some(1_010), Some(1_030)),
            (Some(1_020), None),
        ];
        let mut filters = Vec::new();
        for workflow in workflows {
            for statuses in statuses {
                for exit_code in [None, Some(0), Some(2)] {
                    for (since, until) in times {
                        for before in [None, Some(id(59)), Some(id(62))] {
                            for active in [false, true] {
                                filters.push(RunFilter {
                                    workflow: workflow.map(|name| name.parse().unwrap()),
                                    statuses: statuses.to_vec(),
                                    exit_code,
                                    active,
                                    since,
                                    until,
                                    before,
                                    limit: 7,
                                });
                            }
                        }
                    }
                }
            }
        }
        filters
    }

    /// What the filter says, taken literally.
    fn expected(filter: &RunFilter) -> Vec<String> {
        let place = |number| (row(number).3, number);
        let before = filter
            .before
            .map(|run| place(u64::from_str_radix(&run.to_string(), 16).unwrap()));
        let mut numbers: Vec<u64> = (1..=100)
            .filter(|number| {
                let (workflow, status, code, at) = row(*number);
                filter
                    .workflow
                    .as_ref()
                    .is_none_or(|name| *name == workflow)
                    && (filter.statuses.is_empty() || filter.statuses.contains(&status))
                    && filter.exit_code.is_none_or(|wanted| code == Some(wanted))
                    && (!filter.active || !status.is_terminal())
                    && filter.since.is_none_or(|since| at >= since)
                    && filter.until.is_none_or(|until| at <= until)
                    && before.is_none_or(|before| place(*number) < before)
            })
            .collect();
        numbers.sort_by_key(|number| std::cmp::Reverse(place(*number)));
        let ids = numbers.iter().map(|number| id(*number).to_string());
        ids.take(filter.limit as usize).collect()
    }

    // Parity 104, 105.
    #[test]
    fn every_combination_lists_what_it_says_in_order() {
        let (_directory, store) = store();
        let mut found = 0;
        for filter in filters() {
            let listed: Vec<_> = store.runs(&filter).unwrap().into_iter().collect();
            let listed: Vec<String> = listed.into_iter().map(|row| row.run).collect();
            assert_eq!(listed, expected(&filter), "{filter:?}");
            found += listed.len();
        }
        assert!(found > 1_000, "{found}");
    }

    #[test]
    fn page_after_page_is_the_whole_list() {
        let (_directory, store) = store();
        for statuses in [vec![], vec![Status::Failed, Status::Killed, Status::Queued]] {
            let mut filter = RunFilter {
                statuses,
                limit: 1_000,
                ..RunFilter::default()
            };
            let all: Vec<_> = store.runs(&filter).unwrap();
            filter.limit = 3;
            let mut paged = Vec::new();
            loop {
                let page = store.runs(&filter).unwrap();
                let Some(last) = page.last() else {
                    break;
                };
                filter.before = Some(last.run.parse().unwrap());
                paged.extend(page);
            }
            assert_eq!(paged, all);
            assert!(all.len() > 30);
        }
    }

    #[test]
    fn no_combination_reads_the_table_or_sorts() {
        let (_directory, store) = store();
        for filter in filters() {
            for (statement, parameters) in filter.statements() {
                let explain = format!("EXPLAIN QUERY PLAN {statement}");
                let mut explain = store.connection.prepare(&explain).unwrap();
                let parameters: Vec<(&str, &dyn ToSql)> = parameters
                    .iter()
                    .map(|(name, value)| (*name, &**value))
                    .collect();
                let plan: Vec<String> = explain
                    .query_map(&*parameters, |row| row.get("detail"))
                    .unwrap()
                    .map(Result::unwrap)
                    .collect();
                let plan = plan.join("\n");
                assert!(!plan.contains("B-TREE"), "{statement}\n{plan}");
                // What has no bound goes through its index from the newest on.
                assert!(plan.contains("USING INDEX runs_"), "{statement}\n{plan}");
                let has_bound = filter.since.is_some() || filter.before.is_some();
                assert!(
                    !has_bound || !plan.contains("SCAN workflow_runs"),
                    "{statement}\n{plan}"
                );
            }
        }
    }
}
