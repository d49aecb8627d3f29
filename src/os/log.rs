//! Where the programs' own log goes: to the journal, else to stderr. `NERVE_LOG` is the level.

use std::io::IsTerminal as _;

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Begins to log. Under systemd (`JOURNAL_STREAM`) entries go to the journal with their fields as `NERVE_…`.
pub fn init(identifier: &str) {
    let level = std::env::var("NERVE_LOG").ok();
    let filter = level.as_deref().map(str::parse).transpose();
    let registry = tracing_subscriber::registry()
        .with(filter.clone().ok().flatten().unwrap_or(LevelFilter::INFO));
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        Some(layer) => {
            let layer = layer
                .with_syslog_identifier(identifier.to_owned())
                .with_field_prefix(Some("NERVE".to_owned()));
            registry.with(layer).init();
        }
        None => registry
            .with(
                tracing_subscriber::fmt::layer()
                    .with_ansi(std::io::stderr().is_terminal())
                    .with_writer(std::io::stderr),
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
