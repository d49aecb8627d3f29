//! nerved(8): the manager. Started by nerve.service.

use std::error::Error as _;
use std::process::ExitCode;

use clap::Parser;
use nerve::daemon::{self, Settings};

/// The manager of nerve's workflows. It is started by systemd: `systemctl start nerve`.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {}

fn main() -> ExitCode {
    let Arguments {} = Arguments::parse();
    nerve::os::log::init("nerved");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let ended = runtime
        .map_err(|source| daemon::Error::System {
            action: "start",
            source,
        })
        .and_then(|runtime| {
            let settings = Settings::of_system().map_err(|source| daemon::Error::System {
                action: "find itself",
                source,
            })?;
            runtime.block_on(daemon::run(settings))
        });
    let Err(error) = ended else {
        return ExitCode::SUCCESS;
    };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    tracing::error!("{text}");
    ExitCode::FAILURE
}
