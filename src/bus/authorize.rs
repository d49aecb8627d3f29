//! Who may do what. Every method has an action in one table; a method that is not there is denied to everybody.
//!
//! The caller is who the bus says it is: the uid of the sender's connection, never a pid and never a word of the
//! message.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use zbus::Connection;
use zbus::message::Header;

use super::error::Error;

/// Method and action.
pub const ACTIONS: [(&str, &str); 6] = [
    ("StartRun", "org.nerve1.start-run"),
    ("KillRun", "org.nerve1.kill-run"),
    ("GetRun", "org.nerve1.read"),
    ("ListRuns", "org.nerve1.read"),
    ("GetThread", "org.nerve1.read"),
    ("GetStatus", "org.nerve1.read"),
];

/// Senders that are remembered. A bus never gives a unique name twice, so what it said of one stays true; the next bus
/// gives them all again, so an [`Authority`] lives no longer than its connection.
const REMEMBERED: usize = 256;

/// Answers whether a caller on one bus connection may.
#[derive(Debug, Default)]
pub struct Authority {
    senders: Mutex<HashMap<String, u32>>,
}

impl Authority {
    /// Lets the sender of this call do what its method's action is, or says that it may not. Returns the sender's uid.
    ///
    /// # Errors
    /// [`Error::NotPermitted`], also when nobody can say who the sender is.
    pub async fn authorize(
        &self,
        connection: &Connection,
        header: &Header<'_>,
    ) -> Result<u32, Error> {
        let method = header.member().map_or("", |member| member.as_str());
        let Some((_, action)) = ACTIONS.iter().find(|(known, _)| *known == method) else {
            return Err(Error::NotPermitted(format!(
                "{method} has no action and is nobody's"
            )));
        };
        let uid = self.uid(connection, header).await?;
        if uid == 0 {
            return Ok(uid);
        }
        tracing::warn!(uid, action, "denied");
        Err(Error::NotPermitted(format!(
            "uid {uid} may not do {action}; run it as root"
        )))
    }

    async fn uid(&self, connection: &Connection, header: &Header<'_>) -> Result<u32, Error> {
        let sender = header
            .sender()
            .ok_or_else(|| Error::NotPermitted("the call has no sender".to_owned()))?;
        let known = self
            .senders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(sender.as_str())
            .copied();
        if let Some(uid) = known {
            return Ok(uid);
        }
        let unknown = |error: zbus::Error| {
            Error::NotPermitted(format!("the bus cannot tell who {sender} is: {error}"))
        };
        let bus = zbus::fdo::DBusProxy::new(connection)
            .await
            .map_err(unknown)?;
        let uid = bus
            .get_connection_unix_user(sender.clone().into())
            .await
            .map_err(|error| unknown(error.into()))?;
        let mut senders = self.senders.lock().unwrap_or_else(PoisonError::into_inner);
        if senders.len() >= REMEMBERED {
            senders.clear();
        }
        senders.insert(sender.to_string(), uid);
        Ok(uid)
    }
}
