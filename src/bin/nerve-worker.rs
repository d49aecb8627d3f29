//! nerve-worker: the main process of `nerve-wf@NAME.service`. Started by nerved through systemd, never by hand.

use std::process::ExitCode;

use clap::Parser;
use nerve::model::name::WorkflowName;
use nerve::worker::stock;

/// Executes the runs of one workflow. It is started by nerved: `nervectl workflow start NAME`.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The workflow.
    workflow: WorkflowName,
}

fn main() -> ExitCode {
    let Arguments { workflow } = Arguments::parse();
    nerve::os::log::init("nerve-worker");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime.and_then(|runtime| runtime.block_on(stock::run(workflow))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("failed to work: {error}");
            ExitCode::FAILURE
        }
    }
}
