//! Which runs a worker is sent, and whether there has to be a worker.

use super::admission::micros;
use super::{Action, Cgroup, Dispatch, Engine, Held, LinkId, Open};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Failed, Illegal, RunEvent};

impl Engine {
    /// Sends the worker every run that it should have and has not. A run that an earlier invocation had waits until
    /// that one's processes are gone. Runs that may have brought the worker down are sent before the others, and each
    /// alone.
    pub(super) fn dispatch(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let Some(workflow) = self.workflows.get(name) else {
            return Ok(());
        };
        let Some((place, link)) = workflow.worker.available() else {
            return Ok(());
        };
        // What it has been given already it may be sent again: the frame may never have left.
        let is_closed = !workflow.may_start() || workflow.is_drained_by(&place.invocation);
        let settings = workflow.worker.settings().cloned();
        let live: Vec<_> = workflow.live.values().copied().collect();
        let is = |id: &RunId, what: fn(&Open) -> bool| self.open.get(id).is_some_and(what);
        let suspect = live.iter().find(|id| is(id, Open::is_suspect)).copied();
        let candidates = match suspect {
            Some(_) if live.iter().any(|id| is(id, Open::is_held)) => Vec::new(),
            Some(suspect) => vec![suspect],
            None => live,
        };
        for id in candidates {
            let Some(open) = self.open.get(&id) else {
                continue;
            };
            let is_here = open.place() == Some(&place);
            let is_lost = open.run.started().is_some_and(|started| started.is_lost);
            let is_elsewhere = open.place().is_some() && (!is_here || is_lost);
            let is_unwelcome = is_closed || open.wants_other_than(settings.as_ref());
            if is_unwelcome && !open.is_with(&place.invocation)
                || open.is_held()
                || open.is_finishing()
                || open.run.is_aborting()
                || is_elsewhere && open.cgroup != Cgroup::Empty
            {
                continue;
            }
            if !is_here || is_lost {
                let attempt = open.run.started().map_or(0, |started| started.attempt) + 1;
                let event = RunEvent::Dispatched {
                    place: place.clone(),
                    attempt,
                    boot_id: self.boot_id.clone(),
                };
                self.record(id, event)?;
            }
            self.send(id, link);
        }
        Ok(())
    }

    fn send(&mut self, id: RunId, link: LinkId) {
        let (now, wall_us, instant) = (self.now.boot_us, self.now.wall_us, self.instant());
        let Some(open) = self.open.get_mut(&id) else {
            return;
        };
        let Some((started, definition)) = open.run.started().zip(open.definition.clone()) else {
            return;
        };
        let slack = micros(limits::TIMEOUT_SLACK);
        let wait = |failed: &Failed| failed.wait_us(wall_us, &instant);
        let dispatch = Dispatch {
            run: id,
            attempt: started.attempt,
            rounds: started.position.rounds,
            max_rounds: open.run.round_limit(),
            dry_run: open.run.dry_run,
            timeout_us: open
                .timeout_at
                .map(|at| at.saturating_sub(slack).saturating_sub(now)),
            failed: started
                .failed
                .as_deref()
                .map(|failed| (failed.attempts, wait(failed))),
            route: started.position.route.clone(),
            definition,
        };
        open.held = Held::Works;
        open.is_inherited = false;
        open.cgroup = Cgroup::Unknown;
        self.act(Action::Dispatch { link, dispatch });
    }

    /// Sees that a workflow with something to do has a worker.
    pub(super) fn ensure_worker(&mut self, name: &WorkflowName) {
        let Some(workflow) = self.workflows.get(name) else {
            return;
        };
        if self.going_down_until.is_some()
            || !workflow.worker.is_startable()
            || !workflow.may_start()
        {
            return;
        }
        let waiting = workflow.live.values().find_map(|id| {
            let open = self.open.get(id)?;
            let waits = !open.is_finishing() && !open.run.is_aborting();
            open.definition.clone().filter(|_| waits)
        });
        let Some(definition) = waiting else { return };
        let worker = &mut self.workflow(name).worker;
        worker.unit = Some(super::UnitState::Starting);
        worker.start_pending = true;
        self.act(Action::StartUnit {
            workflow: name.clone(),
            settings: definition.workflow.worker.clone(),
        });
    }
}

impl Open {
    pub(super) fn is_held(&self) -> bool {
        self.held != Held::No
    }

    /// The worker died under it so often that it may be its doing.
    pub(super) fn is_suspect(&self) -> bool {
        let losses = self.run.started().map(|started| started.losses);
        losses >= Some(limits::SUSPECT_DEATHS) && !self.is_finishing() && !self.run.is_aborting()
    }
}
