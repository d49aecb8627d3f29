//! Where the programs' own log goes: to the journal, else to stderr. `NERVE_LOG` is the level.

use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Begins to log; to be called before there are threads. Under systemd (`JOURNAL_STREAM`) entries go to the journal
/// with their fields as `NERVE_…`.
pub fn init(identifier: &str) {
    let level = std::env::var("NERVE_LOG").ok();
    let filter = level.as_deref().map(str::parse).transpose();
    let registry = tracing_subscriber::registry()
        .with(filter.clone().ok().flatten().unwrap_or(LevelFilter::INFO));
    match std::env::var_os("JOURNAL_STREAM").and_then(|_| journal().ok()) {
        Some(layer) => registry
            .with(layer.with_syslog_identifier(identifier.to_owned()))
            .init(),
        None => registry
            .with(
                tracing_subscriber::fmt::layer()
                    .with_ansi(io::stderr().is_terminal())
                    .with_writer(io::stderr),
            )
            .init(),
    }
    if let Err(error) = filter {
        tracing::warn!(
            "NERVE_LOG={} is no level ({error}): use error, warn, info, debug or trace",
            level.unwrap_or_default()
        );
    }
}

/// The way to the journal, which never waits: a journal that stands still loses entries and holds up nobody.
fn journal() -> io::Result<tracing_journald::Layer> {
    // The layer keeps its socket to itself. A new descriptor has the lowest free number, as this one just had.
    let free = std::fs::File::open("/dev/null")?.as_fd().as_raw_fd();
    let layer = tracing_journald::layer()?;
    // SAFETY: it is only looked at, and made non-blocking when it is a socket.
    let socket = unsafe { BorrowedFd::borrow_raw(free) };
    if FileType::from_raw_mode(fstat(socket)?.st_mode) == FileType::Socket {
        fcntl_setfl(socket, fcntl_getfl(socket)? | OFlags::NONBLOCK)?;
    }
    let priorities = PriorityMappings {
        error: Priority::Error,
        warn: Priority::Warning,
        info: Priority::Informational,
        debug: Priority::Debug,
        trace: Priority::Debug,
    };
    let layer = layer.with_priority_mappings(priorities);
    Ok(layer.with_field_prefix(Some("NERVE".to_owned())))
}

/// An error with all its causes. Some say what their own cause says: that is left out.
#[must_use]
pub fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut above = text.clone();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        let new = said.strip_suffix(&*above).unwrap_or(&said);
        let new = new.trim_end_matches([':', ' ']);
        if !text.contains(new) {
            text = format!("{text}: {new}");
        }
        above = said;
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("database: {0}")]
    struct Repeats(#[from] rusqlite::Error);

    #[test]
    fn nothing_is_said_twice() {
        let full = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_FULL);
        let said = |text: &str| {
            let error = rusqlite::Error::SqliteFailure(full, Some(text.to_owned()));
            whole(&Repeats::from(error))
        };
        let text = full.to_string();
        let (code, meaning) = text.split_once(": ").unwrap();
        assert_eq!(said(meaning), format!("database: {meaning}: {code}"));
        assert_eq!(said("else"), format!("database: else: {text}"));
    }
}
