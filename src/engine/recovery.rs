//! The engine that a store's open runs and the definitions on disk add up to. It waits for systemd's list of units
//! before it starts or ends anything that has to do with a worker.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::admission::micros;
use super::{Engine, Now, Open, Turn, Workflow};
use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::model::run::{Illegal, Run};
use crate::model::status::{RunResult, Status};
use crate::model::worker::{Cause, Death, Pause, WorkerRecord};
use crate::model::workflow::Definition;

/// What recovery starts from.
#[derive(Debug)]
pub struct Recovered {
    /// Of this boot.
    pub boot_id: String,
    /// Every workflow that has a file: the definition in force, if there is one, and what is wrong with the file.
    pub workflows: BTreeMap<WorkflowName, super::Known>,
    /// Most runs at a time over all workflows.
    pub max_active: Option<u32>,
    /// What is remembered of workers.
    pub workers: BTreeMap<WorkflowName, WorkerRecord>,
    /// The pause, if there is one.
    pub pause: Option<Pause>,
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
        let workflow = |known| Workflow {
            known,
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
            open: HashMap::with_capacity(recovered.runs.len()),
            links: HashMap::new(),
            max_active: recovered.max_active,
            pause: recovered.pause,
            is_scarce: false,
            units_known: false,
            going_down_until: None,
            next_order: 0,
            unanswered: Vec::new(),
            keys: HashMap::new(),
            turn: Turn::default(),
        };
        for (name, record) in recovered.workers {
            engine.workflow(&name).record = record;
        }
        for run in recovered.runs {
            engine.adopt(run, &recovered.pinned)?;
        }
        engine.settle_all()?;
        Ok(engine)
    }

    fn adopt(
        &mut self,
        run: Run,
        pinned: &HashMap<String, Arc<Definition>>,
    ) -> Result<(), Illegal> {
        let order = self.next_order;
        self.next_order += 1;
        let (id, name, status) = (run.id, run.workflow.clone(), run.status());
        let mut open = Open::new(run, order);
        open.is_inherited = true;
        if let Some(started) = open.run.started() {
            open.definition = pinned.get(&started.definition).cloned();
            open.timeout_at = self.timeout_at(&open);
        }
        if let Some(kill) = &open.run.kill {
            open.kill_at = Some(
                self.now
                    .boot_us
                    .saturating_add(kill.grace_us)
                    .saturating_add(micros(limits::KILL_CONFIRM)),
            );
        }
        let has_definition = open.definition.is_some();
        let started = open.run.started();
        let is_lost = started.is_some_and(|started| started.is_lost);
        let is_of_earlier_boot = started.is_some_and(|started| {
            let is_known = started.place.is_some() && !started.boot_id.is_empty();
            is_known && !started.is_lost && started.boot_id != self.boot_id
        });
        self.open.insert(id, open);
        if status == Status::Queued {
            self.workflow(&name).queue.insert(order, id);
            if !self.workflow(&name).exists() {
                self.workflow(&name).queue.remove(&order);
                let detail = "its definition was removed".to_owned();
                self.drop_queued(id, RunResult::Removed, detail)?;
            }
            return Ok(());
        }
        self.workflow(&name).live.insert(order, id);
        if is_of_earlier_boot {
            self.lost(id, &Death::of(Cause::Reboot))?;
        }
        if !has_definition {
            let detail = "the definition it is pinned to cannot be read any more";
            self.end(id, RunResult::UnitRefused, Some(detail.to_owned()))?;
        } else if is_lost {
            // What followed from that, nobody remembers.
            self.judge(id)?;
        } else if self
            .open
            .get(&id)
            .is_some_and(|open| open.run.asked().is_some() && open.place().is_none())
        {
            self.finish(id)?;
        }
        Ok(())
    }

    /// When nerved enforces the time-out of a run that an earlier nerved started. Within a boot the clock never jumped;
    /// across a reboot the wall clock is all there is.
    fn timeout_at(&self, open: &Open) -> Option<u64> {
        let timeout = open.definition.as_ref()?.workflow.timeout?;
        let timeout = micros(timeout.saturating_add(limits::TIMEOUT_SLACK));
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
