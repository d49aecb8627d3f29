//! Deaths of workers, and what they mean: runs that are lost, found guilty, or ended because there will be no worker.

use super::admission::micros;
use super::unit::{LAST_QUESTION, Patience};
use super::{Action, Engine, ReadId, Stop, Unit, UnitState};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Illegal, RunEvent, Started};
use crate::model::status::RunResult;
use crate::model::worker::{Cause, Death, WorkerEvent};

/// So many ends are known again when they are told twice.
const REMEMBERED: usize = 8;

impl Engine {
    /// This invocation is gone, with all its processes but perhaps some of its runs'.
    pub(super) fn died(
        &mut self,
        name: &WorkflowName,
        invocation: &str,
        unit: &Unit,
    ) -> Result<(), Illegal> {
        let worker = &mut self.workflow(name).worker;
        let current = worker
            .current
            .take_if(|current| current.invocation == invocation);
        worker.buried.push_back(invocation.to_owned());
        if worker.buried.len() > REMEMBERED {
            worker.buried.pop_front();
        }
        // What is said of another invocation says nothing of this one.
        let is_of_it = unit.invocation == invocation || unit.invocation.is_empty();
        let unit = Some(unit).filter(|_| is_of_it);
        let seen = unit.and_then(|unit| unit.death.clone());
        let was_told = current
            .as_ref()
            .is_some_and(|current| current.gone_by.is_some());
        let was_stopped = unit.is_some_and(|unit| unit.stop != Stop::Nobody);
        let killed_for = current.as_ref().and_then(|current| current.killed_for);
        let death = if was_told || was_stopped {
            Death::of(Cause::Stopped)
        } else if let Some(cause) = killed_for {
            Death::of(cause)
        } else {
            let is_gone = unit.is_some_and(|unit| unit.state == UnitState::Absent);
            let unseen = if is_gone {
                Cause::Unseen
            } else {
                Cause::Unknown
            };
            seen.unwrap_or(Death::of(unseen))
        };
        if let Some(link) = current.and_then(|current| current.link) {
            self.links.remove(&link);
            self.release(name);
        }
        let since = self.instant();
        let record = &self.workflow(name).record;
        let is_drained = record
            .draining
            .as_ref()
            .is_some_and(|drain| drain.invocation == invocation);
        let is_news = !death.is_blameless() && !record.has_died(invocation);
        if is_drained {
            self.note(name, WorkerEvent::WorkerDrained);
        }
        if is_news {
            let event = WorkerEvent::WorkerDied {
                invocation: invocation.to_owned(),
                death: death.clone(),
                since,
            };
            self.note(name, event);
        }
        for id in self.live(name) {
            if self
                .open
                .get(&id)
                .is_some_and(|open| open.is_with(invocation))
            {
                self.lost(id, &death)?;
            }
        }
        if is_news {
            self.check_crash_limit(name, &death)?;
        }
        Ok(())
    }

    /// The invocation that had this run is gone.
    pub(super) fn lost(&mut self, id: RunId, death: &Death) -> Result<(), Illegal> {
        let Some(started) = self.open.get(&id).and_then(|open| open.run.started()) else {
            return Ok(());
        };
        let Some(place) = started.place.clone() else {
            return Ok(());
        };
        let event = RunEvent::WorkerLost {
            invocation: place.invocation,
            attempt: started.attempt,
            death: death.clone(),
        };
        self.record(id, event)?;
        self.judge(id)
    }

    /// A run that no worker has any more has crashed, or is resumed. In both cases nothing of it may be left.
    pub(super) fn judge(&mut self, id: RunId) -> Result<(), Illegal> {
        let Some(open) = self.open.get(&id) else {
            return Ok(());
        };
        let started = open.run.started();
        let guilty = started.filter(|started| started.losses >= limits::CRASHED_DEATHS);
        if let Some(Started {
            losses,
            last_death: Some(death),
            ..
        }) = guilty
        {
            let detail = format!("its worker died {losses} times without a new round ({death})");
            let result = worker_result(death, RunResult::WorkerDied);
            return self.end(id, result, Some(detail));
        }
        let blocked = self.workflows.get(&open.run.workflow);
        let blocked = blocked.and_then(|workflow| workflow.record.blocked.clone());
        if let Some(block) = blocked {
            return self.end(id, block.result, Some(block.detail));
        }
        self.empty(id);
        Ok(())
    }

    fn check_crash_limit(&mut self, name: &WorkflowName, death: &Death) -> Result<(), Illegal> {
        let now = self.instant();
        let workflow = self.workflow(name);
        let definition = workflow.known.definition.as_ref();
        let (interval, burst) = definition.map_or(limits::START_LIMIT, |definition| {
            definition.workflow.worker.start_limit()
        });
        let deaths = workflow.record.deaths_within(micros(interval), &now);
        if deaths < burst as usize {
            return Ok(());
        }
        let seconds = interval.as_secs_f64();
        let detail =
            format!("its worker died {deaths} times within {seconds} s, the last time by {death}");
        self.block(name, &detail, Some(death))
    }

    /// No worker is started any more; what has one, or waits for one, ends.
    pub(super) fn block(
        &mut self,
        name: &WorkflowName,
        detail: &str,
        death: Option<&Death>,
    ) -> Result<(), Illegal> {
        let record = &self.workflow(name).record;
        if record.blocked.is_some() || record.stopped.is_some() {
            return Ok(());
        }
        let detail = detail.to_owned();
        let result = death.map_or(RunResult::StartLimitHit, |death| {
            worker_result(death, RunResult::StartLimitHit)
        });
        let event = WorkerEvent::WorkflowBlocked {
            detail: detail.clone(),
            result: result.clone(),
        };
        self.note(name, event);
        self.end_live(name, &result, &detail)
    }

    pub(super) fn end_live(
        &mut self,
        name: &WorkflowName,
        result: &RunResult,
        detail: &str,
    ) -> Result<(), Illegal> {
        for id in self.live(name) {
            self.end(id, result.clone(), Some(detail.to_owned()))?;
        }
        Ok(())
    }

    pub(super) fn start_taken(&mut self, name: &WorkflowName, read: ReadId) {
        let heard_by = self.now.boot_us + micros(limits::READY_TIMEOUT);
        let worker = &mut self.workflow(name).worker;
        worker.start_pending = false;
        worker.read = worker.read.max(read);
        if worker.current.is_none() {
            worker.heard_by = Some(heard_by);
        }
    }

    pub(super) fn start_refused(
        &mut self,
        name: &WorkflowName,
        error: &str,
    ) -> Result<(), Illegal> {
        let worker = &mut self.workflow(name).worker;
        // What systemd said meanwhile is newer.
        if std::mem::take(&mut worker.start_pending) {
            worker.unit = Some(UnitState::Absent);
        }
        self.end_live(name, &RunResult::UnitRefused, error)
    }

    /// Tries again later, each time twice as late.
    pub(super) fn start_failed(&mut self, name: &WorkflowName) {
        let now = self.now.boot_us;
        let worker = &mut self.workflow(name).worker;
        let (first, longest) = limits::RECONNECT;
        let pause = first
            .saturating_mul(1 << worker.retries.min(10))
            .min(longest);
        if std::mem::take(&mut worker.start_pending) {
            worker.unit = Some(UnitState::Absent);
        }
        worker.retry_at = Some(now + micros(pause));
        worker.retries += 1;
    }

    /// What is due of a worker: it should be ready, gone, or heard of by now; or may be started again.
    pub(super) fn worker_deadlines(&mut self, name: &WorkflowName) {
        let now = self.now.boot_us;
        let worker = &mut self.workflow(name).worker;
        let mut is_to_be_read = false;
        let mut to_kill = None;
        worker.retry_at.take_if(|at| *at <= now);
        if worker.heard_by.is_some_and(|at| at <= now) {
            worker.heard_by = Some(now + micros(limits::READY_TIMEOUT));
            is_to_be_read = true;
        }
        if let Some(current) = &mut worker.current {
            match current.ready_by {
                Some(Patience::Waits(at)) if at <= now => {
                    current.ready_by = Some(Patience::Ends(now + micros(LAST_QUESTION)));
                    is_to_be_read = true;
                }
                Some(Patience::Ends(at)) if at <= now => {
                    current.ready_by = Some(Patience::Ends(now + micros(limits::READY_TIMEOUT)));
                    if worker.unit != Some(UnitState::Stopping) {
                        current.killed_for = Some(Cause::NotReady);
                        to_kill = Some(current.cgroup.clone());
                    }
                }
                _ => {}
            }
            if current.gone_by.is_some_and(|at| at <= now) {
                current.gone_by = Some(now + micros(limits::SHUTDOWN));
                to_kill = Some(current.cgroup.clone());
            }
        }
        let workflow = name.clone();
        match to_kill.filter(|cgroup| !cgroup.is_empty()) {
            Some(cgroup) => self.act(Action::KillUnit { workflow, cgroup }),
            None if is_to_be_read => self.act(Action::ReadUnit { workflow }),
            None => {}
        }
    }
}

fn worker_result(death: &Death, otherwise: RunResult) -> RunResult {
    match death.code {
        Some(code) if code != 0 => RunResult::WorkerExit(code),
        _ => otherwise,
    }
}
