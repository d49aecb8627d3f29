//! Starts, the queue and the slots, the pause. A slot is a live run: there is no counter that could leak.

use std::sync::Arc;
use std::time::Duration;

use super::{Answer, Engine, Event, Open, Staged, Ticket, Touched, Workflow};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::{Accepted, Illegal, Run, RunEvent};
use crate::model::status::RunResult;
use crate::model::worker::ManagerEvent;
use crate::model::workflow::{Definition, OnFull, Overflow};

impl Engine {
    pub(super) fn start(
        &mut self,
        ticket: Ticket,
        id: RunId,
        accepted: Accepted,
        existing: Option<RunId>,
    ) -> Touched {
        let name = accepted.workflow.clone();
        let key = accepted.key.clone().map(|key| (name.clone(), key));
        let of_this_turn = key.as_ref().and_then(|key| self.keys.get(key)).copied();
        if let Some(run) = existing.or(of_this_turn) {
            self.answer(ticket, Answer::Existing(run));
            return Touched::Nothing;
        }
        let known = self.workflows.get(&name).map(|workflow| &workflow.known);
        if known.is_none_or(|known| known.definition.is_none()) {
            let fault = known.and_then(|known| known.fault.clone());
            let answer = fault.map_or(Answer::UnknownWorkflow, Answer::BadDefinition);
            self.answer(ticket, answer);
            return Touched::Nothing;
        }
        if let Some(key) = key {
            self.keys.insert(key, id);
        }
        let at = self.now.wall_us;
        let run = Run::accept(id, at, &accepted);
        self.turn.runs.insert(id, run.clone());
        let event = Event::Run(id, RunEvent::Queued(accepted));
        self.turn.events.push(Staged { event, at });
        let order = self.next_order;
        self.next_order += 1;
        self.open.insert(id, Open::new(run, order));
        self.workflow(&name).queue.insert(order, id);
        self.unanswered.push((ticket, id));
        Touched::Workflow(name)
    }

    /// What became of a run that was started in this turn.
    pub(super) fn started(&self, run: RunId) -> Answer {
        let workflow = self.turn.runs.get(&run).map(|run| &run.workflow);
        let workflow = workflow.and_then(|name| self.workflows.get(name));
        Answer::Started {
            run,
            dropped: self.dropped(run),
            fault: workflow.and_then(|workflow| workflow.known.fault.clone()),
        }
    }

    fn dropped(&self, run: RunId) -> Option<(RunResult, String)> {
        self.turn
            .events
            .iter()
            .rev()
            .find_map(|staged| match &staged.event {
                Event::Run(id, RunEvent::Ended { result, detail }) if *id == run => {
                    Some((result.clone(), detail.clone().unwrap_or_default()))
                }
                _ => None,
            })
    }

    pub(super) fn set_pause(&mut self, ticket: Ticket, event: ManagerEvent) -> Touched {
        let at = self.now.wall_us;
        self.pause = event.pause(at);
        self.turn.pause = Some(self.pause.clone());
        let event = Event::Manager(event);
        self.turn.events.push(Staged { event, at });
        self.answer(ticket, Answer::Done);
        Touched::Everything
    }

    /// Fills free slots from the queue, oldest first, then drops what the queue may not hold. When there is a limit over
    /// all workflows, a slot may be anybody's: the one that has waited longest is first.
    pub(super) fn admit(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let mut admitted = Vec::new();
        loop {
            let next = match self.max_active {
                Some(max) if self.running() >= max as usize => None,
                Some(_) => self.longest_waiting(),
                None => self.may_admit(name).then(|| name.clone()),
            };
            let Some(next) = next else { break };
            self.admit_one(&next)?;
            if next != *name {
                admitted.push(next);
            }
        }
        for other in admitted {
            self.settle_worker(&other)?;
        }
        self.drop_surplus(name)
    }

    fn longest_waiting(&self) -> Option<WorkflowName> {
        let waiting = self.workflows.iter().filter_map(|(name, workflow)| {
            let (order, _) = workflow.queue.first_key_value()?;
            self.may_admit(name).then_some((order, name))
        });
        waiting.min().map(|(_, name)| name.clone())
    }

    /// Whether a run that waits may have a slot of its workflow.
    fn may_admit(&self, name: &WorkflowName) -> bool {
        self.workflows.get(name).is_some_and(|workflow| {
            let slots = workflow.known.definition.as_ref().map_or(0, |definition| {
                usize::try_from(definition.workflow.concurrency).unwrap_or(usize::MAX)
            });
            !workflow.queue.is_empty()
                && workflow.live.len() < slots
                && self.units_known
                && self.pause.is_none()
                && self.going_down_until.is_none()
                && !workflow.is_draining()
                && self.is_of_one_kind(workflow)
                && workflow.may_start()
                && !self.is_scarce
        })
    }

    /// Whether the runs that have a slot want the worker, nerve's or their own, that the next one wants.
    fn is_of_one_kind(&self, workflow: &Workflow) -> bool {
        let exec = |definition: &Arc<Definition>| definition.workflow.worker.exec.clone();
        let wanted = workflow.known.definition.as_ref().map(exec);
        let mut live = workflow.live.values().filter_map(|id| self.open.get(id));
        live.all(|open| open.definition.as_ref().map(exec) == wanted)
    }

    fn admit_one(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let workflow = self.workflow(name);
        let Some(definition) = workflow.known.definition.clone() else {
            return Ok(());
        };
        let Some((order, id)) = workflow.queue.pop_first() else {
            return Ok(());
        };
        workflow.live.insert(order, id);
        let limits = &definition.workflow;
        let asked = self.open.get(&id).and_then(|open| open.run.max_rounds);
        let event = RunEvent::Started {
            definition: definition.digest.clone(),
            max_rounds: asked
                .or(limits.max_rounds)
                .unwrap_or(limits::DEFAULT_MAX_ROUNDS),
            since: self.instant(),
        };
        self.record(id, event)?;
        let now = self.now.boot_us;
        if let Some(open) = self.open.get_mut(&id) {
            open.timeout_at = limits.timeout.map(|timeout| {
                now.saturating_add(micros(timeout.saturating_add(limits::TIMEOUT_SLACK)))
            });
            open.definition = Some(definition);
        }
        Ok(())
    }

    /// Drops what waits and may not: under `drop` everything, under `latest` all but the newest, else what is more than
    /// `max_queue`.
    fn drop_surplus(&mut self, name: &WorkflowName) -> Result<(), Illegal> {
        let workflow = self.workflow(name);
        let Some(definition) = workflow.known.definition.clone() else {
            return Ok(());
        };
        let limits = &definition.workflow;
        let room = match limits.overflow {
            Overflow::Drop => 0,
            Overflow::Latest => 1,
            Overflow::Queue => usize::try_from(limits.max_queue).unwrap_or(usize::MAX),
        };
        while self.workflow(name).queue.len() > room {
            let queue = &mut self.workflow(name).queue;
            let (surplus, why) = match (limits.overflow, limits.on_full) {
                (Overflow::Drop, _) => (queue.pop_last(), self.why_no_slot(name)),
                (Overflow::Latest, _) => (
                    queue.pop_first(),
                    (
                        RunResult::QueueFull,
                        "a newer run waits in its place (overflow: latest)".to_owned(),
                    ),
                ),
                (Overflow::Queue, OnFull::Evict) if room > 0 => (
                    queue.pop_first(),
                    (
                        RunResult::QueueFull,
                        format!("{room} newer runs wait (max_queue), and it had waited longest"),
                    ),
                ),
                (Overflow::Queue, _) => (
                    queue.pop_last(),
                    (
                        RunResult::QueueFull,
                        format!("{room} runs wait already (max_queue)"),
                    ),
                ),
            };
            if let Some((_, id)) = surplus {
                self.drop_queued(id, why.0, why.1)?;
            }
        }
        Ok(())
    }

    /// A run that never started and never will. It has left the queue.
    pub(super) fn drop_queued(
        &mut self,
        id: RunId,
        result: RunResult,
        detail: String,
    ) -> Result<(), Illegal> {
        let detail = Some(detail);
        self.record(id, RunEvent::Ended { result, detail })?;
        self.open.remove(&id);
        Ok(())
    }

    fn why_no_slot(&self, name: &WorkflowName) -> (RunResult, String) {
        let workflow = self.workflows.get(name);
        if let Some(pause) = &self.pause {
            let reason = pause.reason.as_deref().unwrap_or("no reason was given");
            let text = format!("nerve is paused: {reason}; `nervectl resume` ends that");
            return (RunResult::Blocked, text);
        }
        if let Some(workflow) = workflow.filter(|workflow| !workflow.may_start()) {
            let text = workflow.obstacle(name).map(|(_, text)| text);
            return (RunResult::Blocked, text.unwrap_or_default());
        }
        let text = match workflow {
            Some(workflow) if workflow.is_draining() => "its worker is being replaced".to_owned(),
            Some(workflow) if !workflow.live.is_empty() => {
                format!("concurrency is reached: {} active", workflow.live.len())
            }
            _ => "no slot is free".to_owned(),
        };
        (RunResult::QueueFull, text)
    }
}

impl Workflow {
    /// Neither systemd nor a person nor a crash limit is against a worker.
    pub(super) fn may_start(&self) -> bool {
        self.record.blocked.is_none()
            && self.record.stopped.is_none()
            && !self.worker.is_obstructed()
    }
}

/// A duration in µs; one too long for that never passes anyway.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
