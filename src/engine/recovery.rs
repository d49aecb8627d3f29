//! The engine that a store's open runs and the definitions on disk add up to. It waits for systemd's list of units
//! before it starts or ends anything that has to do with a worker.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::admission::micros;
use super::{Engine, Now, Open, Turn, Workflow};
use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::model::run::{Illegal, Run, RunEvent};
use crate::model::status::{RunResult, Status};
use crate::model::workflow::Definition;

/// What recovery starts from.
#[derive(Debug)]
pub struct Recovered {
    /// Of this boot.
    pub boot_id: String,
    /// Every workflow that has a file: the definition in force, if there is one, and what is wrong with the file.
    pub workflows: BTreeMap<WorkflowName, (Option<Arc<Definition>>, Option<String>)>,
    /// Definitions that started runs are pinned to, by digest. A run whose definition is missing is ended.
    pub pinned: HashMap<String, Arc<Definition>>,
    /// Open runs, by order of acceptance.
    pub runs: Vec<Run>,
}

impl Engine {
    /// Makes the engine. What it already decided is in its first turn.
    ///
    /// # Errors
    /// Never, for runs that came out of a store.
    pub fn recover(recovered: Recovered, now: Now) -> Result<Self, Illegal> {
        let workflow = |(definition, fault)| Workflow {
            definition,
            fault,
            ..Workflow::default()
        };
        let mut engine = Self {
            boot_id: recovered.boot_id,
            now,
            workflows: recovered
                .workflows
                .into_iter()
                .map(|(name, known)| (name, workflow(known)))
                .collect(),
            open: HashMap::new(),
            links: HashMap::new(),
            next_order: 0,
            turn: Turn::default(),
        };
        for run in recovered.runs {
            let order = engine.next_order;
            engine.next_order += 1;
            let (id, name) = (run.id, run.workflow.clone());
            let is_known = engine.workflows.contains_key(&name);
            let is_queued = run.status() == Status::Queued;
            let mut open = Open::new(run, order);
            if let Some(started) = open.run.started() {
                open.definition = recovered.pinned.get(&started.definition).cloned();
                open.timeout_at = engine.timeout_at(&open);
            }
            if let Some(kill) = &open.run.kill {
                open.kill_at = Some(
                    now.boot_us
                        .saturating_add(kill.grace_us)
                        .saturating_add(micros(limits::KILL_CONFIRM)),
                );
            }
            engine.open.insert(id, open);
            let workflow = engine.workflow(&name);
            if !is_queued {
                workflow.live.insert(order, id);
                if engine
                    .open
                    .get(&id)
                    .is_some_and(|open| open.definition.is_none())
                {
                    let detail = "the definition it is pinned to cannot be read any more";
                    engine.end(id, RunResult::UnitRefused, Some(detail.to_owned()))?;
                }
            } else if is_known {
                workflow.queue.insert(order, id);
            } else {
                engine.record(
                    id,
                    RunEvent::Ended {
                        result: RunResult::Removed,
                        detail: None,
                    },
                )?;
                engine.open.remove(&id);
            }
        }
        engine.settle_all()?;
        Ok(engine)
    }

    /// When nerved enforces the time-out of a run that an earlier nerved started. Within a boot the clock never jumped;
    /// across a reboot the wall clock is all there is.
    fn timeout_at(&self, open: &Open) -> Option<u64> {
        let timeout = micros(open.definition.as_ref()?.workflow.timeout? + limits::TIMEOUT_SLACK);
        let started = open.run.started()?;
        if started.since.boot_id == self.boot_id {
            return Some(started.since.boot_us.saturating_add(timeout));
        }
        let elapsed = self.now.wall_us.saturating_sub(started.at);
        Some(
            self.now
                .boot_us
                .saturating_add(timeout.saturating_sub(elapsed)),
        )
    }
}
