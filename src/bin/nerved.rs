//! nerved(8): the manager. Started by nerve.service.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use nerve::daemon::{self, Settings};

/// The manager of nerve's workflows. It is started by systemd: `systemctl start nerve`.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Only say whether anything in the store was changed or lost; exits 65 if so. nerve must not be running
    ///
    /// Changes nothing. The database is copied to $TMPDIR, or /tmp, first; DIR is /var/lib/nerve if it is not given.
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "/var/lib/nerve")]
    check: Option<PathBuf>,
}

fn main() -> ExitCode {
    let Arguments { check } = Arguments::parse();
    nerve::os::log::init("nerved");
    if let Some(directory) = check {
        return daemon::check(&directory);
    }
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", nerve::os::log::whole(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), daemon::Error> {
    let system = |action| move |source| daemon::Error::System { action, source };
    let settings = Settings::of_system().map_err(system("find itself"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(system("start"))?;
    let ended = runtime.block_on(daemon::run(settings));
    // What takes long, such as an archiving, is cut off: it can be at any point.
    runtime.shutdown_background();
    ended
}
