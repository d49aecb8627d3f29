//! What nerved does must follow from what is committed.

use std::collections::BTreeMap;

use super::super::{Action, Answer, Dispatch, Input, LinkId, Order, Ticket, UnitState};
use super::definitions::{index, name};
use super::machine::{Machine, place};
use super::oracle::{Ledger, Oracle, Phase, SLACK_US};
use crate::model::name::RunId;
use crate::model::status::RunResult;

impl Oracle {
    pub(super) fn action(&mut self, action: &Action, machine: &Machine) {
        match action {
            Action::Tell { link, order } => self.order(*link, order),
            Action::Dispatch { link, dispatch } => self.dispatch(*link, dispatch, machine),
            Action::StartUnit { workflow, .. } => {
                let desk = &self.desks[index(workflow)];
                assert!(
                    !desk.is_blocked && !desk.is_stopped,
                    "{workflow} is started though it must not be"
                );
                assert!(
                    self.down_until == 0,
                    "{workflow} is started while nerve goes down"
                );
                let told = desk.told.as_ref().map(|told| told.state);
                assert!(
                    told.is_some_and(|told| told != UnitState::Foreign),
                    "{workflow} is started: {told:?}"
                );
                assert!(
                    !desk.started.is_empty(),
                    "{workflow} is started for nothing"
                );
                assert!(
                    desk.accepted.is_none(),
                    "I5: {workflow} is started and has a worker"
                );
            }
            Action::KillUnit { workflow, cgroup } => {
                let workflow = index(workflow);
                assert_eq!(*cgroup, place(workflow, 0).cgroup);
                let is_foreign = machine.services[workflow].state == UnitState::Foreign;
                let told = self.desks[workflow].told.as_ref().map(|told| told.state);
                let is_known = told == Some(UnitState::Foreign);
                assert!(
                    !is_foreign || !is_known,
                    "a unit that is not ours is killed"
                );
                self.desks[workflow].killed = self.desks[workflow].newest;
            }
            Action::EmptyUnit { run: id, .. } | Action::Empty { run: id, .. } => {
                let run = &self.runs[id];
                match action {
                    Action::Empty { cgroup, .. } => {
                        assert_eq!(*cgroup, place(run.workflow, 0).of_run(*id));
                    }
                    _ => {
                        assert!(run.thread.is_own, "the unit of the stock worker is killed");
                        self.desks[run.workflow].forced = run.invocation;
                    }
                }
                let desk = &self.desks[run.workflow];
                let is_needless = run.phase == Phase::Started
                    && run.is_placed()
                    && !run.killed
                    && run.aborted.is_none()
                    && run.reported.is_empty()
                    && !run.is_late(machine)
                    && !desk.is_blocked
                    && !desk.is_refused
                    && desk
                        .drains
                        .iter()
                        .all(|(invocation, _)| *invocation != run.invocation);
                assert!(!is_needless, "{id:?} is killed for nothing: {run:?}");
            }
            Action::Fence { link, .. } => {
                if let Some((workflow, _)) = self.links.get(link) {
                    self.desks[*workflow].killed = self.desks[*workflow].newest;
                }
            }
            // What it said before may still be read.
            Action::Refuse { .. } => {}
            Action::Answer { .. } | Action::ReadUnit { .. } | Action::ResetUnit { .. } => {}
        }
    }

    fn order(&mut self, link: LinkId, order: &Order) {
        let Some((workflow, invocation)) = self.links.get(&link).copied() else {
            return;
        };
        let is_accepted = self.desks[workflow].accepted == Some((link, invocation));
        match order {
            Order::MessageAck { run: id, round } => {
                let run = &self.runs[id];
                assert!(
                    is_accepted && run.invocation == invocation,
                    "I5: a stale worker is acknowledged"
                );
                assert!(
                    *round <= run.thread.rounds,
                    "I6: round {round} of {id:?} is acknowledged and not stored"
                );
                assert!(!run.killed, "I7: {id:?} goes on though it is killed");
                let is_late = run.aborted.is_some_and(|done| *round > done);
                assert!(!is_late, "I7: {id:?} goes on though it is aborted");
            }
            Order::AttemptAck {
                run: id,
                round,
                attempt,
            } => {
                let run = self.goes_on(*id, is_accepted, invocation);
                let stored = (run.thread.rounds + 1, run.thread.failed);
                assert!(
                    (*round, *attempt) <= stored,
                    "attempt {attempt} of {id:?} is acknowledged and not stored"
                );
            }
            Order::RouteAck { run: id, round } => {
                let thread = &self.goes_on(*id, is_accepted, invocation).thread;
                let is_stored = *round <= thread.rounds + u32::from(thread.route.is_some());
                assert!(
                    is_stored,
                    "a route of {id:?} is acknowledged and not stored"
                );
            }
            Order::EventAck { run } => {
                let is_open = self.runs.get(run).is_some_and(|run| {
                    run.phase != Phase::Ended && run.is_placed() && run.invocation == invocation
                });
                assert!(
                    !is_open || !is_accepted,
                    "I2: the end of {run:?} is acknowledged and not stored"
                );
                self.sent.remove(&(link, *run));
            }
            Order::AbortThread { run, .. } => {
                assert!(
                    self.runs[run].aborted.is_some(),
                    "I7: {run:?} is aborted though nobody wants it"
                );
            }
            Order::Shutdown => {
                let mut started = self.desks[workflow].started.iter().map(|id| &self.runs[id]);
                let mut left = started.find(|run| run.is_placed() && run.invocation == invocation);
                assert!(
                    left.take().is_none(),
                    "worker {invocation} is sent home and has a run"
                );
            }
            Order::Welcome | Order::KillThread { .. } => {}
        }
    }

    /// A run whose worker is told to go on within a round.
    fn goes_on(&self, id: RunId, is_accepted: bool, invocation: u64) -> &Ledger {
        let run = &self.runs[&id];
        assert!(
            is_accepted && run.invocation == invocation,
            "I5: a stale worker is acknowledged"
        );
        let is_asked = run.killed || run.aborted.is_some();
        assert!(!is_asked, "I7: {id:?} goes on though it is to end");
        run
    }

    fn dispatch(&mut self, link: LinkId, dispatch: &Dispatch, machine: &Machine) {
        let id = dispatch.run;
        let run = &self.runs[&id];
        let is_right =
            run.phase == Phase::Started && run.is_placed() && !run.killed && run.aborted.is_none();
        assert!(is_right, "{id:?} is sent out: {run:?}");
        let accepted = self.desks[run.workflow].accepted;
        assert_eq!(
            accepted,
            Some((link, run.invocation)),
            "I5: {id:?} is sent nowhere"
        );
        let is_left = machine.is_left_by_another(id, run.invocation);
        assert!(
            !is_left,
            "I6: {id:?} is sent before its old cgroup is empty"
        );
        let sent = (dispatch.attempt, dispatch.rounds, dispatch.max_rounds);
        assert_eq!(
            sent,
            (run.attempt, run.thread.rounds, run.max_rounds),
            "what is sent of {id:?}"
        );
        let definition = run.definition.as_ref().unwrap();
        assert_eq!(
            dispatch.definition.digest, definition.digest,
            "{id:?} is not pinned"
        );
        let since = run
            .since
            .as_ref()
            .filter(|since| since.boot_id == machine.boot_id());
        if let Some((timeout, since)) = definition.workflow.timeout.zip(since) {
            let end = since.boot_us + u64::try_from(timeout.as_micros()).unwrap();
            assert_eq!(
                dispatch.timeout_us,
                Some(end.saturating_sub(machine.now.boot_us)),
                "time left of {id:?}"
            );
        }
        let failed = run
            .backoff
            .as_ref()
            .map(|backoff| (run.thread.failed, backoff.left(machine)));
        assert_eq!(dispatch.failed, failed, "what failed of {id:?}");
        assert_eq!(
            dispatch.route, run.thread.route,
            "what was routed of {id:?}"
        );
        let exec = &machine.services[run.workflow].settings.exec;
        assert_eq!(
            exec, &definition.workflow.worker.exec,
            "{id:?} is sent to a worker of another kind"
        );
        assert!(self.sent.insert((link, id)), "I6: {id:?} is sent twice");
    }

    /// Every call of a step is answered, once, with what is committed.
    pub(super) fn check_answers(
        &self,
        input: Option<&Input>,
        before: Option<(Phase, bool)>,
        answers: &BTreeMap<Ticket, &Answer>,
        ended: &[(RunId, RunResult)],
    ) {
        let Some(
            Input::Start { ticket, .. }
            | Input::Kill { ticket, .. }
            | Input::Abort { ticket, .. }
            | Input::Drain { ticket, .. }
            | Input::Reset { ticket, .. }
            | Input::Pause { ticket, .. }
            | Input::Resume { ticket, .. },
        ) = input
        else {
            return assert!(answers.is_empty(), "answers to nobody: {answers:?}");
        };
        let answer = answers
            .get(ticket)
            .unwrap_or_else(|| panic!("no answer to {input:?}"));
        assert_eq!(answers.len(), 1, "answers to nobody: {answers:?}");
        let known = |workflow| self.definitions.get(&name(workflow));
        let is_right = match (input.unwrap(), answer) {
            (
                Input::Start { run, accepted, .. },
                Answer::Started {
                    run: told, dropped, ..
                },
            ) => {
                let end = ended
                    .iter()
                    .find(|(ended, _)| ended == run)
                    .map(|(_, result)| result);
                run == told
                    && dropped.as_ref().map(|(result, _)| result) == end
                    && self
                        .runs
                        .get(run)
                        .is_some_and(|run| run.workflow == index(&accepted.workflow))
            }
            (Input::Start { accepted, .. }, Answer::Existing(told)) => {
                let key = accepted
                    .key
                    .clone()
                    .map(|key| (index(&accepted.workflow), key));
                key.and_then(|key| self.keys.get(&key)) == Some(told)
            }
            (Input::Start { accepted, .. }, Answer::UnknownWorkflow) => {
                known(index(&accepted.workflow)).is_none_or(|known| known.definition.is_none())
            }
            (Input::Start { accepted, .. }, Answer::BadDefinition(_)) => {
                known(index(&accepted.workflow)).is_some_and(|known| known.definition.is_none())
            }
            (Input::Kill { run, .. }, Answer::Done) => {
                self.runs.get(run).is_some_and(|run| run.killed)
            }
            (Input::Abort { run, .. }, Answer::Done) => {
                self.runs.get(run).is_some_and(|run| run.aborted.is_some())
            }
            (Input::Kill { .. } | Input::Abort { .. }, Answer::NotOpen) => {
                before.is_none_or(|(phase, _)| phase == Phase::Ended)
            }
            (Input::Abort { .. }, Answer::Ending) => {
                before.is_some_and(|(phase, is_asked)| phase != Phase::Ended && is_asked)
            }
            (Input::Drain { .. } | Input::Reset { .. }, Answer::UnknownWorkflow) => true,
            (Input::Drain { .. }, Answer::Done) => true,
            (Input::Reset { workflow, .. }, Answer::Done) => {
                let desk = &self.desks[index(workflow)];
                !desk.is_blocked && !desk.is_stopped && desk.deaths.is_empty()
            }
            (Input::Pause { .. }, Answer::Done) => self.is_paused,
            (Input::Resume { .. }, Answer::Done) => !self.is_paused,
            _ => false,
        };
        let is_refused_rightly = !matches!(answer, Answer::Done)
            || !matches!(input, Some(Input::Abort { .. }))
            || before.is_some_and(|(phase, is_asked)| phase != Phase::Ended && !is_asked);
        assert!(
            is_right && is_refused_rightly,
            "I11: {input:?} is answered {answer:?}"
        );
    }

    /// nerved does not forget a time-out.
    pub(super) fn check_time_outs(&self, deadline: Option<u64>, machine: &Machine) {
        for id in self.desks.iter().flat_map(|desk| &desk.started) {
            let run = &self.runs[id];
            let timeout = run
                .definition
                .as_ref()
                .and_then(|definition| definition.workflow.timeout);
            let since = run
                .since
                .as_ref()
                .filter(|since| since.boot_id == machine.boot_id());
            let Some((timeout, since)) = timeout.zip(since) else {
                continue;
            };
            let at = since.boot_us + u64::try_from(timeout.as_micros()).unwrap() + SLACK_US;
            let is_ending =
                run.killed || run.aborted.is_some() || !run.reported.is_empty() || run.blame >= 3;
            let desk = &self.desks[run.workflow];
            let is_given_up = desk.is_blocked || desk.is_refused || !desk.drains.is_empty();
            if machine.now.boot_us < at && !is_ending && !is_given_up {
                let is_kept = deadline.is_some_and(|deadline| deadline <= at);
                assert!(
                    is_kept,
                    "the time-out of {id:?} is forgotten: {deadline:?}, {at}"
                );
            }
        }
    }
}
