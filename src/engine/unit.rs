//! A worker unit, as systemd describes it and as the engine knows it.

use std::collections::VecDeque;
use std::time::Duration;

use super::admission::micros;
use super::{LinkId, ReadId, Workflow};
use crate::model::limits;
use crate::model::name::{RunId, WorkflowName};
use crate::model::run::Place;
use crate::model::worker::{Cause, Death};

/// So long before a worker that is not ready is killed systemd is asked once more.
pub(super) const LAST_QUESTION: Duration = Duration::from_secs(1);

/// A worker unit, as systemd describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// When systemd was asked.
    pub read: ReadId,
    /// Where it stands.
    pub state: UnitState,
    /// Its newest invocation, 32 hex digits; empty when it has none, or is not there any more.
    pub invocation: String,
    /// Its cgroup below the cgroup root; empty when it has none.
    pub cgroup: String,
    /// How its newest invocation ended, if it did.
    pub death: Option<Death>,
    /// Whether somebody had systemd stop or restart its newest invocation.
    pub stop: Stop,
    /// The digest of the settings that nerve started it with ([`crate::model::workflow::WorkerSettings::digest`]); none
    /// when only the end of an invocation is told that is not the newest any more.
    pub settings: Option<String>,
    /// For people: systemd's own words, or what stands in the way.
    pub detail: String,
}

impl Unit {
    /// Whether its newest invocation has ended, or it never had one.
    pub(super) fn has_ended(&self) -> bool {
        match self.state {
            UnitState::Absent | UnitState::Failed | UnitState::Foreign => true,
            UnitState::Starting => {
                self.invocation.is_empty() || self.death.is_some() || self.stop != Stop::Nobody
            }
            UnitState::Active | UnitState::Stopping => self.invocation.is_empty(),
        }
    }

    /// A unit that is not there.
    #[must_use]
    pub fn absent(read: ReadId) -> Self {
        Self {
            read,
            state: UnitState::Absent,
            invocation: String::new(),
            cgroup: String::new(),
            death: None,
            stop: Stop::Nobody,
            settings: None,
            detail: String::new(),
        }
    }
}

/// Who had systemd stop a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Nobody: what ended, ended by itself.
    Nobody,
    /// Somebody, who wants this one unit stopped, or restarted.
    Operator,
    /// nerve as a whole, or the machine, goes down.
    GoingDown,
}

/// Where a unit stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnitState {
    /// Not loaded, or stopped.
    Absent,
    /// On its way up, or about to be restarted.
    Starting,
    /// Up.
    Active,
    /// On its way down.
    Stopping,
    /// systemd gave up.
    Failed,
    /// There is something of that name that is not ours, and it is in the way.
    Foreign,
}

/// What the engine knows of a workflow's worker.
#[derive(Debug, Default)]
pub(super) struct Worker {
    /// `None`: systemd has not been asked yet, or cannot be.
    pub(super) unit: Option<UnitState>,
    /// When systemd was asked for what is known here.
    pub(super) read: ReadId,
    /// The invocation that lives.
    pub(super) current: Option<Current>,
    /// A worker that is ready, and of which systemd has not said yet how the one before it ended.
    pub(super) waiting: Option<Peer>,
    /// systemd brings it back by itself, with these settings.
    pub(super) returning: Option<String>,
    /// The invocations that ended last: systemd may tell of an end twice.
    pub(super) buried: VecDeque<String>,
    /// systemd's words, or what stands in the way.
    pub(super) detail: String,
    /// systemd was asked to start the unit and has not answered: that there is none is no news.
    pub(super) start_pending: bool,
    /// Not to be started before then.
    pub(super) retry_at: Option<u64>,
    /// How often the start was put off.
    pub(super) retries: u32,
    /// By then systemd must have said something of a unit that was started.
    pub(super) heard_by: Option<u64>,
}

/// The invocation that lives. All of it ends with it.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) invocation: String,
    pub(super) cgroup: String,
    /// Digest of the settings it was started with.
    pub(super) settings: Option<String>,
    pub(super) link: Option<LinkId>,
    /// By then it must be ready.
    pub(super) ready_by: Option<Patience>,
    /// Since when it has nothing to do.
    pub(super) idle_since: Option<u64>,
    /// It was told to shut down, and must be gone by then.
    pub(super) gone_by: Option<u64>,
    /// nerved killed it, for this.
    pub(super) killed_for: Option<Cause>,
}

/// A worker that said `ready`, and what systemd said of it when it connected.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) link: LinkId,
    pub(super) place: Place,
    pub(super) read: ReadId,
    pub(super) settings: Option<String>,
    pub(super) held: Vec<RunId>,
}

/// How long one waits for a worker to be ready.
#[derive(Debug, Clone, Copy)]
pub(super) enum Patience {
    /// Until then; then systemd is asked once more, since it may be nerved that slept.
    Waits(u64),
    /// Until then; then it is killed.
    Ends(u64),
}

impl Patience {
    /// With a worker that was started: it has to come up.
    pub(super) fn with_new(now: u64) -> Self {
        Self::Waits(now + micros(limits::READY_TIMEOUT.saturating_sub(LAST_QUESTION)))
    }

    /// With a worker that had been ready: it comes back when it notices that nerved is there.
    pub(super) fn with_known(now: u64) -> Self {
        Self::Waits(now + micros(limits::RECONNECT_TIMEOUT))
    }

    pub(super) fn at(self) -> u64 {
        let (Self::Waits(at) | Self::Ends(at)) = self;
        at
    }
}

impl Current {
    pub(super) fn new(place: &Place, settings: Option<String>) -> Self {
        Self {
            invocation: place.invocation.clone(),
            cgroup: place.cgroup.clone(),
            settings,
            link: None,
            ready_by: None,
            idle_since: None,
            gone_by: None,
            killed_for: None,
        }
    }

    fn place(&self) -> Place {
        Place {
            invocation: self.invocation.clone(),
            cgroup: self.cgroup.clone(),
        }
    }
}

impl Worker {
    pub(super) fn invocation(&self) -> Option<&str> {
        self.current
            .as_ref()
            .map(|current| current.invocation.as_str())
    }

    /// There is a worker, or systemd brings one back.
    pub(super) fn is_there(&self) -> bool {
        self.current.is_some() || self.waiting.is_some() || self.returning.is_some()
    }

    /// What the worker that is there, or comes back, was started with, as far as that is known.
    pub(super) fn settings(&self) -> Option<&String> {
        match (&self.current, &self.waiting) {
            (Some(current), _) => current.settings.as_ref(),
            (None, Some(peer)) => peer.settings.as_ref(),
            (None, None) => self.returning.as_ref(),
        }
    }

    pub(super) fn link(&self) -> Option<LinkId> {
        self.current.as_ref()?.link
    }

    /// The worker that can be sent a run: where it is, and the way to it.
    pub(super) fn available(&self) -> Option<(Place, LinkId)> {
        let current = self.current.as_ref()?;
        let is_leaving = current.gone_by.is_some() || self.unit == Some(UnitState::Stopping);
        Some((current.place(), current.link.filter(|_| !is_leaving)?))
    }

    pub(super) fn is_obstructed(&self) -> bool {
        self.unit == Some(UnitState::Foreign)
    }

    /// It is not there, and systemd will not bring it back by itself.
    pub(super) fn is_down(&self) -> bool {
        matches!(
            self.unit,
            Some(UnitState::Absent | UnitState::Failed | UnitState::Foreign)
        )
    }

    pub(super) fn is_startable(&self) -> bool {
        matches!(self.unit, Some(UnitState::Absent | UnitState::Failed))
            && self.current.is_none()
            && !self.start_pending
            && self.retry_at.is_none()
    }

    /// It can be started, or need not be: what was put off is put off no more.
    pub(super) fn forget_retries(&mut self) {
        self.retry_at = None;
        self.retries = 0;
    }

    pub(super) fn forget_unit(&mut self) {
        self.unit = None;
        self.start_pending = false;
        self.heard_by = None;
        if let Some(current) = &mut self.current {
            current.ready_by = None;
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        let current = self.current.as_ref();
        let of_current = current.and_then(|current| {
            let idle = current
                .idle_since
                .map(|since| since.saturating_add(micros(limits::WORKER_IDLE)));
            let ready = current.ready_by.map(Patience::at);
            [idle, ready, current.gone_by].into_iter().flatten().min()
        });
        [of_current, self.retry_at, self.heard_by]
            .into_iter()
            .flatten()
            .min()
    }
}

impl Workflow {
    /// One word for people.
    pub(super) fn word(&self) -> &'static str {
        let worker = &self.worker;
        match (&worker.current, worker.unit) {
            (_, Some(UnitState::Foreign)) => "obstructed",
            _ if self.record.blocked.is_some() => "blocked",
            _ if self.record.stopped.is_some() => "stopped",
            (Some(current), _) if current.gone_by.is_some() => "stopping",
            (Some(_), _) if self.is_draining() => "draining",
            (Some(current), _) if current.link.is_some() => "ready",
            (_, None) => "unknown",
            (_, Some(UnitState::Absent)) => "absent",
            (_, Some(UnitState::Starting | UnitState::Active)) => "starting",
            (_, Some(UnitState::Stopping)) => "stopping",
            (_, Some(UnitState::Failed)) => "failed",
        }
    }

    /// Since when (µs since the epoch) and why nothing is started, and what helps.
    pub(super) fn obstacle(&self, name: &WorkflowName) -> Option<(Option<u64>, String)> {
        let reset = format!("`nervectl workflow reset {name}` lets it start again");
        if self.worker.is_obstructed() {
            return Some((None, self.worker.detail.clone()));
        }
        if let Some(block) = &self.record.blocked {
            let text = format!("blocked: {}; {reset}", block.detail);
            return Some((Some(block.at), text));
        }
        let at = self.record.stopped?;
        Some((Some(at), format!("{} was stopped; {reset}", name.unit())))
    }
}
