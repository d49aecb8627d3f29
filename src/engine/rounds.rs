//! What workers say of the rounds of their runs: what came of one, which attempt failed, who speaks next. Each is
//! acknowledged once it is durable, unless the run is to end at a boundary: then it must not go on.

use super::{Action, Engine, Held, LinkId, Open, Order, Touched};
use crate::model::limits;
use crate::model::message::Message;
use crate::model::moderator::{self, Next};
use crate::model::name::{RoleName, RunId};
use crate::model::run::{Illegal, RunEvent, Started};
use crate::model::workflow::Target;

impl Engine {
    pub(super) fn message(
        &mut self,
        link: LinkId,
        id: RunId,
        round: u32,
        message: Message,
    ) -> Result<Touched, Illegal> {
        let Some(open) = self.speaker(link, id) else {
            return Ok(Touched::Nothing);
        };
        let done = open.run.position().rounds;
        if round == done && open.run.is_aborting() {
            // It was at a boundary when the connection broke, and waits for the acknowledgement.
            self.start_kill(id, 0);
            return Ok(Touched::Nothing);
        }
        if round <= done {
            self.tell(link, Order::MessageAck { run: id, round });
            return Ok(Touched::Nothing);
        }
        if round != done + 1 || !open.may_speak(&message.role) {
            let (role, next) = (&message.role, open.what_is_next());
            let error =
                format!("round {round} of run {id} by {role:?} is not what comes next: {next}");
            self.act(Action::Refuse { link, error });
            return Ok(Touched::Nothing);
        }
        let name = open.run.workflow.clone();
        let was_suspect = open.is_suspect();
        self.record(id, RunEvent::ThreadWorkflowMessage { round, message })?;
        self.go_on(link, id, Order::MessageAck { run: id, round });
        Ok(if was_suspect {
            Touched::Workflow(name)
        } else {
            Touched::Nothing
        })
    }

    pub(super) fn attempt_failed(
        &mut self,
        link: LinkId,
        id: RunId,
        round: u32,
        attempt: u32,
        message: Message,
        delay_us: u64,
    ) -> Result<Touched, Illegal> {
        let Some(open) = self.speaker(link, id) else {
            return Ok(Touched::Nothing);
        };
        let next = open.run.position().rounds + 1;
        let failed = open.run.started().map_or(0, Started::failed_attempts);
        let is_repeated = round < next || round == next && attempt <= failed;
        if !is_repeated {
            let is_due = (round, attempt) == (next, failed + 1)
                && attempt <= limits::FAILED_ATTEMPTS
                && open.may_speak(&message.role);
            if !is_due {
                let error = format!(
                    "attempt {attempt} of round {round} of run {id} by {:?} is not what comes after attempt {failed} of round {next}",
                    message.role
                );
                self.act(Action::Refuse { link, error });
                return Ok(Touched::Nothing);
            }
            let since = self.instant();
            let event = RunEvent::AttemptFailed {
                round,
                attempt,
                message,
                delay_us,
                since,
            };
            self.record(id, event)?;
        }
        let order = Order::AttemptAck {
            run: id,
            round,
            attempt,
        };
        self.go_on(link, id, order);
        Ok(Touched::Nothing)
    }

    pub(super) fn routed(
        &mut self,
        link: LinkId,
        id: RunId,
        round: u32,
        target: Target,
    ) -> Result<Touched, Illegal> {
        let Some(open) = self.speaker(link, id) else {
            return Ok(Touched::Nothing);
        };
        let position = open.run.position();
        let next = position.rounds + 1;
        let is_repeated = round < next || round == next && position.route.as_ref() == Some(&target);
        if !is_repeated {
            let is_known = match &target {
                Target::End => true,
                Target::Role(role) => open.has_role(role),
            };
            if round != next || open.next() != Some(Next::Ask) || !is_known {
                let error = format!(
                    "{:?} is no answer of the moderator of run {id} in round {round}",
                    String::from(target)
                );
                self.act(Action::Refuse { link, error });
                return Ok(Touched::Nothing);
            }
            self.record(id, RunEvent::Routed { round, target })?;
        }
        self.go_on(link, id, Order::RouteAck { run: id, round });
        Ok(Touched::Nothing)
    }

    /// The run, if this worker has it and may still say something of its rounds.
    fn speaker(&mut self, link: LinkId, id: RunId) -> Option<&Open> {
        if self.held(link, id).is_none() {
            self.disown(link, id);
        }
        self.held(link, id)
            .filter(|open| !open.is_finishing() && open.held != Held::Reported)
    }

    /// What the worker said is durable: it goes on, or is ended here.
    fn go_on(&mut self, link: LinkId, id: RunId, order: Order) {
        let is_aborting = |open: &Open| open.run.is_aborting();
        if self.open.get(&id).is_some_and(is_aborting) {
            self.start_kill(id, 0);
        } else {
            self.tell(link, order);
        }
    }
}

impl Open {
    /// What comes next in it.
    fn next(&self) -> Option<Next> {
        let definition = self.definition.as_ref()?;
        let (limit, position) = (self.run.round_limit(), self.run.position());
        Some(moderator::next(&definition.workflow, limit, position))
    }

    /// The same in words.
    fn what_is_next(&self) -> String {
        let (round, limit) = (self.run.position().rounds + 1, self.run.round_limit());
        match self.next() {
            Some(Next::Role(role)) => format!("round {round} by {role}"),
            Some(Next::Any) if round <= limit => format!("round {round} by a role"),
            Some(Next::Any) => format!("its end, after at most {limit} rounds"),
            Some(Next::Ask) => format!("who speaks in round {round}"),
            Some(Next::End(result)) => format!("its end, {result}"),
            None => "nothing".to_owned(),
        }
    }

    /// Whether the next round is this role's.
    fn may_speak(&self, role: &str) -> bool {
        match self.next() {
            Some(Next::Role(next)) => next.as_str() == role,
            Some(Next::Any) => {
                let is_left = self.run.position().rounds < self.run.round_limit();
                is_left && role.parse::<RoleName>().is_ok()
            }
            Some(Next::Ask | Next::End(_)) | None => false,
        }
    }

    fn has_role(&self, role: &RoleName) -> bool {
        let definition = self.definition.as_ref();
        definition.is_some_and(|definition| definition.workflow.roles.contains_key(role))
    }
}
