//! What can be wrong with a call: the one table of the D-Bus error names `org.nerve1.Error.*` and of the exit statuses
//! that nervectl gives them. The interface returns [`Error`]; the client reads it
//! back from the wire, and [`CallError`] adds what can happen to a call on its way.
//!
//! The description is a lower-case sentence that names its subject and says what to do; it is shown as it is.

use std::fmt;

use zbus::fdo;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, zbus::DBusError)]
#[zbus(prefix = "org.nerve1.Error", impl_display = false)]
pub enum Error {
    /// Anything that is not nerve's own answer: the bus, the connection, the standard errors.
    #[zbus(error)]
    ZBus(zbus::Error),
    /// An argument or option is not valid.
    InvalidArgument(String),
    /// The workflow's definition is broken, and no earlier one is in force.
    BadDefinition(String),
    /// No workflow has this name.
    UnknownWorkflow(String),
    /// No run has an id that ends so.
    UnknownRun(String),
    /// More than one run has an id that ends so.
    AmbiguousRun(String),
    /// The run has ended, and not by a kill.
    AlreadyEnded(String),
    /// The run is being ended already, so that an abort has nothing to add.
    AlreadyEnding(String),
    /// The key of a start belongs to a run that was started with something else.
    KeyConflict(String),
    /// No blob has this digest.
    UnknownBlob(String),
    /// What was stored is not there any more as it was.
    Damaged(String),
    /// Something else is under way that this would get in the way of.
    Busy(String),
    /// The caller may not do this.
    NotPermitted(String),
    /// The store is full; nothing was stored.
    NoSpace(String),
    /// Whether it was stored is unknown: ask again.
    Unknown(String),
    /// A fault of nerve itself; nothing was stored.
    Internal(String),
}

impl Error {
    /// What nervectl exits with.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::InvalidArgument(_) | Self::BadDefinition(_) | Self::KeyConflict(_) => 65,
            Self::UnknownWorkflow(_) | Self::UnknownRun(_) | Self::UnknownBlob(_) => 66,
            Self::AmbiguousRun(_) => 67,
            Self::AlreadyEnded(_) | Self::AlreadyEnding(_) => 68,
            Self::NoSpace(_) | Self::Internal(_) | Self::Damaged(_) | Self::ZBus(_) => 70,
            Self::Unknown(_) => 74,
            Self::Busy(_) => 75,
            Self::NotPermitted(_) => 77,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ZBus(error) => fmt::Display::fmt(error, f),
            Self::InvalidArgument(text)
            | Self::BadDefinition(text)
            | Self::UnknownWorkflow(text)
            | Self::UnknownRun(text)
            | Self::AmbiguousRun(text)
            | Self::AlreadyEnded(text)
            | Self::AlreadyEnding(text)
            | Self::KeyConflict(text)
            | Self::UnknownBlob(text)
            | Self::Damaged(text)
            | Self::Busy(text)
            | Self::NotPermitted(text)
            | Self::NoSpace(text)
            | Self::Unknown(text)
            | Self::Internal(text) => f.write_str(text),
        }
    }
}

/// Why a call failed, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is no bus.
    #[error("no system bus: {0}; `systemctl start dbus.socket` starts it")]
    NoBus(zbus::Error),
    /// There is a bus and nobody on it has nerve's name.
    #[error("nerve is not running; `systemctl start nerve` starts it")]
    NoManager,
    /// The bus itself refuses; nerve was not asked.
    #[error("the system bus does not permit it: {0}; run it as root")]
    Denied(String),
    /// The call was sent and its answer never came. What it was to change may or may not have changed.
    #[error("nerve did not answer: {0}; `systemctl status nerve` says more")]
    Lost(zbus::Error),
    /// nerve says no.
    #[error(transparent)]
    Refused(Error),
    /// The two do not speak the same language.
    #[error("nerve's answer makes no sense: {0}; are nervectl and nerved of the same version?")]
    Misunderstood(zbus::Error),
}

impl CallError {
    /// What nervectl exits with. A lost call that would have changed something is its caller's to judge.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::NoBus(_) | Self::NoManager | Self::Lost(_) => 69,
            Self::Denied(_) => 77,
            Self::Refused(error) => error.exit_status(),
            Self::Misunderstood(_) => 70,
        }
    }
}

impl From<Error> for CallError {
    fn from(error: Error) -> Self {
        match error {
            Error::ZBus(error) => error.into(),
            answer => Self::Refused(answer),
        }
    }
}

impl From<zbus::Error> for CallError {
    fn from(error: zbus::Error) -> Self {
        let zbus::Error::FDO(standard) = &error else {
            return match error {
                zbus::Error::InputOutput(_) => Self::Lost(error),
                _ => Self::Misunderstood(error),
            };
        };
        match &**standard {
            fdo::Error::ServiceUnknown(_) | fdo::Error::NameHasNoOwner(_) => Self::NoManager,
            // dbus-daemon goes on, after a semicolon, with all it knows about both ends.
            fdo::Error::AccessDenied(text) | fdo::Error::AuthFailed(text) => {
                Self::Denied(text.split(';').next().unwrap_or_default().to_owned())
            }
            fdo::Error::NoReply(_)
            | fdo::Error::Disconnected(_)
            | fdo::Error::Timeout(_)
            | fdo::Error::TimedOut(_)
            | fdo::Error::NoServer(_)
            | fdo::Error::LimitsExceeded(_)
            | fdo::Error::IOError(_) => Self::Lost(error),
            _ => Self::Misunderstood(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::DBusError;

    #[test]
    fn every_name_comes_back_from_the_wire_with_its_text_and_exit_status() {
        type Make = fn(String) -> Error;
        let table: [(Make, &str, u8); 15] = [
            (Error::InvalidArgument, "InvalidArgument", 65),
            (Error::BadDefinition, "BadDefinition", 65),
            (Error::UnknownWorkflow, "UnknownWorkflow", 66),
            (Error::UnknownRun, "UnknownRun", 66),
            (Error::AmbiguousRun, "AmbiguousRun", 67),
            (Error::AlreadyEnded, "AlreadyEnded", 68),
            (Error::AlreadyEnding, "AlreadyEnding", 68),
            (Error::KeyConflict, "KeyConflict", 65),
            (Error::UnknownBlob, "UnknownBlob", 66),
            (Error::Damaged, "Damaged", 70),
            (Error::Busy, "Busy", 75),
            (Error::NotPermitted, "NotPermitted", 77),
            (Error::NoSpace, "NoSpace", 70),
            (Error::Unknown, "Unknown", 74),
            (Error::Internal, "Internal", 70),
        ];
        let call = zbus::Message::method_call("/org/nerve1", "GetRun")
            .build(&())
            .unwrap();
        for (make, name, status) in table {
            let error = make("no run ends in 3fa9".to_owned());
            assert_eq!(error.name().as_str(), format!("org.nerve1.Error.{name}"));
            assert_eq!(error.exit_status(), status, "{name}");
            let reply = error.create_reply(&call.header()).unwrap();
            assert_eq!(Error::from(zbus::Error::from(reply)), error);
            assert_eq!(error.to_string(), "no run ends in 3fa9");
        }
    }

    #[test]
    fn what_can_be_done_about_a_call_follows_from_its_error() {
        let status = |error: fdo::Error| CallError::from(zbus::Error::from(error)).exit_status();
        let text = || "why".to_owned();
        assert_eq!(status(fdo::Error::ServiceUnknown(text())), 69);
        assert_eq!(status(fdo::Error::NameHasNoOwner(text())), 69);
        assert_eq!(status(fdo::Error::NoReply(text())), 69);
        assert_eq!(status(fdo::Error::AccessDenied(text())), 77);
        assert_eq!(status(fdo::Error::UnknownMethod(text())), 70);
        let lost = CallError::from(zbus::Error::from(std::io::Error::other("gone")));
        assert!(matches!(lost, CallError::Lost(_)), "{lost:?}");
        let denied = CallError::from(zbus::Error::from(fdo::Error::AccessDenied(
            "Rejected; type=\"x\"".to_owned(),
        )));
        assert_eq!(
            denied.to_string(),
            "the system bus does not permit it: Rejected; run it as root"
        );
    }
}
