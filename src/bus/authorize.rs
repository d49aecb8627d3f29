//! Who may do what. Every method has an action in one table; a method that is not there is denied to everybody.
//!
//! The caller is who the bus, or on a connection without a bus the kernel, says it is: what decides is the uid, never a
//! pid and never a word of the message. The pid and the process's name are for the record.

use std::collections::HashMap;
use std::fs;
use std::sync::{Mutex, PoisonError};

use zbus::Connection;
use zbus::message::Header;

use super::denials::Denials;
use super::error::Error;
use crate::manager::handle::Handle;
use crate::model::run::Caller;
use crate::os::peer::Peer;

/// Method and action.
pub const ACTIONS: &[(&str, &str)] = &[
    ("StartRun", "org.nerve1.start-run"),
    ("KillRun", "org.nerve1.kill-run"),
    ("AbortRun", "org.nerve1.abort-run"),
    ("DrainWorkflow", "org.nerve1.drain-workflow"),
    ("ResetWorkflow", "org.nerve1.reset-workflow"),
    ("Pause", "org.nerve1.pause"),
    ("Resume", "org.nerve1.pause"),
    ("Reload", "org.nerve1.reload"),
    ("GetRun", "org.nerve1.read"),
    ("ListRuns", "org.nerve1.read"),
    ("GetThread", "org.nerve1.read"),
    ("GetStatus", "org.nerve1.read"),
    ("GetBlob", "org.nerve1.read"),
    ("BlobExists", "org.nerve1.read"),
    ("ListBlobs", "org.nerve1.read"),
    ("PutBlob", "org.nerve1.store"),
    ("Backup", "org.nerve1.store"),
    ("Check", "org.nerve1.store"),
    ("ListEvents", "org.nerve1.read"),
    ("Archive", "org.nerve1.store"),
    ("Restore", "org.nerve1.store"),
    ("ListArchive", "org.nerve1.read"),
    ("OpenArchive", "org.nerve1.read"),
    ("Import", "org.nerve1.store"),
];

/// Senders that are remembered. A bus never gives a unique name twice, so what it said of one stays true; the next bus
/// gives them all again, so an [`Authority`] lives no longer than its connection.
const REMEMBERED: usize = 256;

/// Answers whether a caller on one connection may.
#[derive(Debug)]
pub struct Authority {
    callers: Callers,
    denials: Denials,
}

/// Who can be at the other end of a connection.
#[derive(Debug)]
enum Callers {
    /// Everybody on a bus: by unique name those who have called.
    OnBus(Mutex<HashMap<String, Caller>>),
    /// One process.
    Peer(Caller),
}

impl Authority {
    /// Of a connection to a bus. The manager keeps who was denied what on record.
    #[must_use]
    pub fn on_bus(manager: Handle) -> Self {
        Self {
            callers: Callers::OnBus(Mutex::default()),
            denials: Denials::new(manager),
        }
    }

    /// Of a connection that has nobody but this peer at its other end.
    #[must_use]
    pub fn of_peer(peer: &Peer, manager: Handle) -> Self {
        let (comm, unit) = (comm(peer.pid), unit(peer.pid));
        Self {
            callers: Callers::Peer(Caller {
                uid: peer.uid,
                pid: Some(peer.pid),
                comm: comm.filter(|_| peer.is_alive()),
                unit: unit.filter(|_| peer.is_alive()),
            }),
            denials: Denials::new(manager),
        }
    }

    /// Lets the sender of this call do what its method's action is, or says that it may not. Returns the sender.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], also when nobody can say who the sender is.
    pub async fn authorize(
        &self,
        connection: &Connection,
        header: &Header<'_>,
    ) -> Result<Caller, Error> {
        let method = header.member().map_or("", |member| member.as_str());
        let Some((_, action)) = ACTIONS.iter().find(|(known, _)| *known == method) else {
            return Err(Error::NotPermitted(format!(
                "{method} has no action and is nobody's"
            )));
        };
        let caller = match &self.callers {
            Callers::OnBus(known) => sender(known, connection, header).await?,
            Callers::Peer(peer) => peer.clone(),
        };
        let uid = caller.uid;
        if uid == 0 {
            return Ok(caller);
        }
        self.denials.record(&caller, method, action);
        Err(Error::NotPermitted(format!(
            "uid {uid} may not do {action}; run it as root"
        )))
    }
}

/// Who the bus says the sender is.
async fn sender(
    known: &Mutex<HashMap<String, Caller>>,
    connection: &Connection,
    header: &Header<'_>,
) -> Result<Caller, Error> {
    let sender = header
        .sender()
        .ok_or_else(|| Error::NotPermitted("the call has no sender".to_owned()))?;
    let remembered = known
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get(sender.as_str())
        .cloned();
    if let Some(caller) = remembered {
        return Ok(caller);
    }
    let unknown = |error: zbus::Error| {
        Error::NotPermitted(format!("the bus cannot tell who {sender} is: {error}"))
    };
    let bus = zbus::fdo::DBusProxy::new(connection)
        .await
        .map_err(unknown)?;
    let credentials = bus
        .get_connection_credentials(sender.clone().into())
        .await
        .map_err(|error| unknown(error.into()))?;
    let uid = credentials
        .unix_user_id()
        .ok_or_else(|| Error::NotPermitted(format!("the bus does not tell the uid of {sender}")))?;
    let pid = credentials.process_id();
    let caller = Caller {
        uid,
        pid,
        comm: pid.and_then(comm),
        unit: pid.and_then(unit),
    };
    let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
    if known.len() >= REMEMBERED {
        known.clear();
    }
    known.insert(sender.to_string(), caller.clone());
    Ok(caller)
}

/// A process's name, if it can be read.
fn comm(pid: u32) -> Option<String> {
    let comm = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(harmless(comm.strip_suffix(b"\n").unwrap_or(&comm)))
}

/// The unit that a process belongs to, if it can be read.
fn unit(pid: u32) -> Option<String> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::"))?;
    unit_of_path(path).map(str::to_owned)
}

/// systemd.unit(5): below its slices a unit's cgroup is named like it; what is below that is the unit's own affair.
fn unit_of_path(path: &str) -> Option<&str> {
    let is_unit = |part: &&str| {
        let kind = part.rsplit_once('.').map(|(_, kind)| kind);
        matches!(kind, Some("service" | "scope"))
    };
    path.split('/').find(is_unit)
}

/// A process chooses its name itself, and it goes into logs and onto terminals.
fn harmless(comm: &[u8]) -> String {
    let escape = |c: char| {
        let (escaped, plain) = if c.is_control() {
            (Some(c.escape_default()), None)
        } else {
            (None, Some(c))
        };
        escaped.into_iter().flatten().chain(plain)
    };
    String::from_utf8_lossy(comm)
        .chars()
        .flat_map(escape)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_by_the_kernel_and_its_name_is_made_harmless() {
        assert_eq!(harmless("a\u{1b}[2Jb\n ü".as_bytes()), r"a\u{1b}[2Jb\n ü");
        assert_eq!(harmless(b"\xffa"), "\u{fffd}a");
        let own = std::process::id();
        let name = fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(comm(own).as_deref(), Some(name.trim_end()));
        assert_eq!(comm(u32::MAX), None);
    }

    #[test]
    fn a_unit_is_told_by_its_cgroup() {
        for (path, unit) in [
            ("/system.slice/cron.service", Some("cron.service")),
            (
                "/user.slice/user-0.slice/session-3.scope",
                Some("session-3.scope"),
            ),
            (
                "/nerve.slice/nerve-wf.slice/nerve-wf@a.service/run-1/x",
                Some("nerve-wf@a.service"),
            ),
            ("/", None),
        ] {
            assert_eq!(unit_of_path(path), unit);
        }
    }
}
