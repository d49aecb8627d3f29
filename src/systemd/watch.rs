//! The one who tells how the worker units are: it hears systemd's signals, reads what has changed, and reports.
//!
//! Signals are only hints that something changed: how a unit is, is read anew each time. What the signals alone know
//! is kept in [`Lives`]. PID 1 sends the signals about what happened before it answers a call, and both come in order;
//! so what is read belongs to what was heard when all signals that are there are heard first, and none of them was
//! about this unit since it was asked for. Nothing else may report units: it could tell of one that is gone without
//! the reason.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::future::poll_fn;
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use zbus::names::{MemberName, UniqueName};
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, MatchRule, MessageStream, ObjectPath, fdo, message};

use super::lives::Lives;
use super::reading::{self, Properties};
use super::{MANAGER_PATH, SERVICE, Systemd, UNIT, UNIT_SERVICE, UNITS, next_read};
use crate::engine::{Input, Unit};
use crate::model::name::WorkflowName;

/// First and longest pause before systemd is asked again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// So long systemd may say nothing, as while it executes itself anew, until that is reported.
const ABSENCE: Duration = Duration::from_secs(3);

/// Reports how the worker units are, as long as the bus connection lasts.
#[derive(Debug)]
pub struct Watch {
    systemd: Systemd,
    ears: Ears,
    /// Workflows whose unit is to be reported again.
    requests: mpsc::UnboundedReceiver<WorkflowName>,
}

impl Watch {
    /// Begins to listen. From now on [`Self::run`] has to be polled: what is not heard holds up all of the connection.
    pub(super) async fn new(
        systemd: Systemd,
        requests: mpsc::UnboundedReceiver<WorkflowName>,
    ) -> zbus::Result<Self> {
        let ears = Ears::new(&systemd.connection).await?;
        Ok(Self {
            systemd,
            ears,
            requests,
        })
    }

    /// Reports all units first, then each that changes, and all of them again when systemd was reloaded or executed
    /// anew. [`Input::BusLost`] says that systemd cannot be heard for the time being. It ends with the connection.
    pub async fn run<R: Future<Output = ()>>(mut self, mut report: impl FnMut(Input) -> R) {
        let (mut pause, mut absent) = (PAUSE.0, None);
        while self.something_changed().await {
            let mut inputs = Vec::new();
            let looked = self.look(&mut inputs).await;
            for input in inputs {
                self.ears.meanwhile(report(input)).await;
            }
            let Err(error) = looked else {
                (pause, absent) = (PAUSE.0, None);
                continue;
            };
            self.ears.heard.everything = true;
            tracing::debug!(%error, "systemd does not answer; trying again");
            let (since, is_reported) = absent.get_or_insert((Instant::now(), false));
            if since.elapsed() > ABSENCE && !mem::replace(is_reported, true) {
                tracing::warn!(%error, "systemd does not answer; trying on");
                self.ears.meanwhile(report(Input::BusLost)).await;
            }
            self.ears.meanwhile(sleep(pause)).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Waits until there is something to read; false when the connection has ended.
    async fn something_changed(&mut self) -> bool {
        loop {
            while let Ok(workflow) = self.requests.try_recv() {
                self.ears.heard.changed.insert(workflow);
            }
            let heard = &self.ears.heard;
            if heard.is_deaf || heard.everything || !heard.changed.is_empty() {
                return !heard.is_deaf;
            }
            tokio::select! {
                () = self.ears.hear() => {}
                Some(workflow) = self.requests.recv() => {
                    self.ears.heard.changed.insert(workflow);
                }
            }
        }
    }

    /// Reads what changed. What `inputs` says is to be reported even when it fails: it is told once.
    async fn look(&mut self, inputs: &mut Vec<Input>) -> zbus::Result<()> {
        if !mem::take(&mut self.ears.heard.everything) {
            if let Some(workflow) = self.ears.heard.changed.pop_first() {
                let told = self.ask(&workflow).await?;
                inputs.extend(told.into_iter().map(|unit| changed(&workflow, unit)));
            }
            return Ok(());
        }
        self.ears.meanwhile(self.systemd.subscribe()).await?;
        let read = next_read();
        let mut workflows = self.ears.meanwhile(self.systemd.workers()).await?;
        let heard = &mut self.ears.heard;
        workflows.append(&mut heard.changed);
        workflows.extend(heard.lives.workflows().cloned());
        let mut units = BTreeMap::new();
        for workflow in workflows {
            match self.ask(&workflow).await {
                Ok(mut told) => {
                    let newest = told.pop();
                    log(&workflow, newest.as_ref());
                    inputs.extend(told.into_iter().map(|unit| changed(&workflow, unit)));
                    units.extend(newest.map(|unit| (workflow, unit)));
                }
                Err(error) => {
                    let told = units.into_iter();
                    inputs.extend(told.map(|(workflow, unit)| changed(&workflow, unit)));
                    return Err(error);
                }
            }
        }
        tracing::debug!("units: {units:?}");
        inputs.push(Input::Units { units, read });
        Ok(())
    }

    /// Reads a unit until nothing changes meanwhile; what is to be told of it, the newest last.
    async fn ask(&mut self, workflow: &WorkflowName) -> zbus::Result<Vec<Unit>> {
        let Self { systemd, ears, .. } = self;
        loop {
            ears.heard.changed.remove(workflow);
            let number = next_read();
            let read = ears.meanwhile(systemd.read(workflow)).await?;
            if ears.heard.changed.contains(workflow) {
                continue;
            }
            let lives = &mut ears.heard.lives;
            lives.meet(workflow, &read.unit.invocation, read.start_job);
            if read.is_stopped_by_job {
                lives.stop(workflow);
            }
            if lives.is_unclear(workflow) {
                let by = ears.meanwhile(systemd.stopped_by()).await?;
                ears.heard.lives.settle(workflow, by);
            }
            if !ears.heard.changed.contains(workflow) {
                let unit = Unit {
                    read: number,
                    ..read.unit
                };
                return Ok(ears.heard.lives.tell(workflow, unit));
            }
        }
    }
}

fn changed(workflow: &WorkflowName, unit: Unit) -> Input {
    log(workflow, Some(&unit));
    Input::Unit {
        workflow: workflow.clone(),
        unit,
    }
}

fn log(workflow: &WorkflowName, unit: Option<&Unit>) {
    tracing::debug!(workflow = %workflow, "unit of {workflow}: {unit:?}");
}

/// What has been heard and not yet been looked at.
#[derive(Debug)]
struct Heard {
    lives: Lives,
    changed: BTreeSet<WorkflowName>,
    everything: bool,
    /// The connection has ended.
    is_deaf: bool,
}

/// Listens to the bus.
#[derive(Debug)]
struct Ears {
    signals: MessageStream,
    /// Changes of who systemd is.
    owners: MessageStream,
    /// Who systemd is and was on this bus. Others may send signals that look like its own.
    senders: BTreeSet<String>,
    heard: Heard,
}

impl Ears {
    async fn new(connection: &Connection) -> zbus::Result<Self> {
        let signals = MatchRule::builder()
            .msg_type(message::Type::Signal)
            .sender(SERVICE)
            .path_namespace(MANAGER_PATH)
            .build()?;
        let owners = MatchRule::builder()
            .msg_type(message::Type::Signal)
            .sender("org.freedesktop.DBus")
            .interface("org.freedesktop.DBus")
            .member("NameOwnerChanged")
            .arg(0, SERVICE)
            .build()?;
        let owners = MessageStream::for_match_rule(owners, connection, None).await?;
        let bus = fdo::DBusProxy::new(connection).await?;
        let owner = bus.get_name_owner(SERVICE.try_into()?).await?;
        Ok(Self {
            signals: MessageStream::for_match_rule(signals, connection, None).await?,
            owners,
            senders: BTreeSet::from([owner.to_string()]),
            heard: Heard {
                lives: Lives::default(),
                changed: BTreeSet::new(),
                everything: true,
                is_deaf: false,
            },
        })
    }

    /// Hears while something else is waited for; when that is there, all is heard that came before it.
    async fn meanwhile<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        loop {
            tokio::select! {
                biased;
                () = self.hear(), if !self.heard.is_deaf => {}
                done = &mut other => {
                    while !self.heard.is_deaf && self.hear().now_or_never().is_some() {}
                    return done;
                }
            }
        }
    }

    /// Hears one signal.
    async fn hear(&mut self) {
        // A change of the owner comes before what the new owner says.
        let (is_owner, signal) = poll_fn(|context| {
            if let Poll::Ready(signal) = self.owners.poll_next_unpin(context) {
                return Poll::Ready((true, signal));
            }
            self.signals
                .poll_next_unpin(context)
                .map(|signal| (false, signal))
        })
        .await;
        let Some(Ok(signal)) = signal else {
            self.heard.is_deaf = true;
            return;
        };
        let header = signal.header();
        let sender = header.sender().map(UniqueName::as_str).unwrap_or_default();
        if is_owner {
            if sender == "org.freedesktop.DBus" {
                self.heard.everything = true;
                let names: Result<(String, String, String), _> = signal.body().deserialize();
                self.senders.extend(names.map(|(_, _, new)| new));
            }
        } else if self.senders.contains(sender) {
            self.heard.take(&signal);
        }
    }
}

impl Heard {
    /// A signal of systemd's.
    fn take(&mut self, signal: &message::Message) {
        let header = signal.header();
        let body = signal.body();
        match header.member().map(MemberName::as_str) {
            Some("Reloading") => {
                // Nothing that it said before the reload needs to be true after it, and not every change is signalled.
                self.everything |= body.deserialize().is_ok_and(|begins: bool| !begins);
            }
            Some("UnitRemoved") => {
                let removed: Result<(String, OwnedObjectPath), _> = body.deserialize();
                let removed = removed.ok();
                self.changed
                    .extend(removed.and_then(|(unit, _)| WorkflowName::of_unit(&unit)));
            }
            Some("PropertiesChanged") => {
                let path = header.path().map(ObjectPath::as_str);
                let Some(workflow) = path.and_then(unit_at) else {
                    return;
                };
                let changes: Result<(String, Properties, Vec<String>), _> = body.deserialize();
                match changes {
                    Ok((interface, changes, _)) => self.see(&workflow, &interface, &changes),
                    Err(error) => tracing::warn!(%error, "a signal of systemd's cannot be read"),
                }
                self.changed.insert(workflow);
            }
            _ => {}
        }
    }

    /// systemd tells all that can change in one signal.
    fn see(&mut self, workflow: &WorkflowName, interface: &str, changes: &Properties) {
        match interface {
            UNIT_SERVICE => self.lives.main_process(workflow, reading::death(changes)),
            UNIT => self.lives.see(workflow, &reading::glimpse(changes)),
            _ => {}
        }
    }
}

/// The workflow whose worker unit is at this object path.
fn unit_at(path: &str) -> Option<WorkflowName> {
    let label = path.strip_prefix(UNITS)?.strip_prefix('/')?;
    WorkflowName::of_unit(&unescape(label))
}

/// The unit name that an object path stands for: `_40` is `@`.
fn unescape(label: &str) -> String {
    let mut parts = label.split('_');
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code {
            Some(code) => name.extend([char::from(code)].into_iter().chain(part.chars().skip(2))),
            None => name.extend(['_'].into_iter().chain(part.chars())),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use zbus::wire::Variant;

    use super::*;

    fn signal<B: serde::Serialize + zbus::wire::Type>(
        path: &str,
        interface: &str,
        member: &str,
        body: &B,
    ) -> message::Message {
        let builder = message::Message::signal(path, interface, member);
        builder.build(body).unwrap()
    }

    fn heard() -> Heard {
        Heard {
            lives: Lives::default(),
            changed: BTreeSet::new(),
            everything: false,
            is_deaf: false,
        }
    }

    #[test]
    fn object_paths_lead_back_to_unit_names() {
        assert_eq!(
            unescape("nerve_2dwf_40fix_2dtest_2eservice"),
            "nerve-wf@fix-test.service"
        );
        assert_eq!(unescape("a_"), "a_");
    }

    #[test]
    fn a_change_of_a_unit_is_heard_with_its_job() {
        let mut heard = heard();
        let changes = BTreeMap::from([
            ("ActiveState", Variant::from("deactivating")),
            ("SubState", "stop-sigterm".into()),
            (
                "Job",
                (7_u32, OwnedObjectPath::try_from("/job/7").unwrap()).into(),
            ),
            ("InvocationID", vec![0xab_u8].into()),
        ]);
        heard.take(&signal(
            "/org/freedesktop/systemd1/unit/nerve_2dwf_40fix_2eservice",
            "org.freedesktop.DBus.Properties",
            "PropertiesChanged",
            &(UNIT, changes, Vec::<String>::new()),
        ));
        let fix: WorkflowName = "fix".parse().unwrap();
        assert!(heard.changed.contains(&fix));
        assert!(heard.lives.is_unclear(&fix));
    }

    #[test]
    fn a_unit_that_is_removed_is_read() {
        let mut heard = heard();
        for unit in ["nerve-wf@fix.service", "cron.service"] {
            let path = OwnedObjectPath::try_from("/unit").unwrap();
            heard.take(&signal(
                MANAGER_PATH,
                "org.freedesktop.systemd1.Manager",
                "UnitRemoved",
                &(unit, path),
            ));
        }
        assert_eq!(heard.changed, BTreeSet::from(["fix".parse().unwrap()]));
    }

    #[test]
    fn all_is_read_after_a_reload() {
        for (begins, everything) in [(true, false), (false, true)] {
            let mut heard = heard();
            heard.take(&signal(
                MANAGER_PATH,
                "org.freedesktop.systemd1.Manager",
                "Reloading",
                &begins,
            ));
            assert_eq!(heard.everything, everything);
        }
    }
}
