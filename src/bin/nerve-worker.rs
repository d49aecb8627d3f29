//! nerve-worker: the main process of `nerve-wf@NAME.service`. Started by nerved through systemd, never by hand.

use std::process::ExitCode;

use clap::Parser;
use nerve::model::name::WorkflowName;
use nerve::worker::{llm, own, stock};

/// Executes the runs of one workflow. It is started by nerved: `nervectl workflow start NAME`.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The workflow.
    #[arg(required_unless_present = "llm")]
    workflow: Option<WorkflowName>,
    /// Make the one call of an LLM that stdin describes: what the worker starts for an `llm` role.
    #[arg(long, hide = true, conflicts_with = "workflow")]
    llm: bool,
}

fn main() -> ExitCode {
    let Some(workflow) = Arguments::parse().workflow else {
        return llm::run(std::io::stdin().lock(), std::io::stdout().lock());
    };
    nerve::os::log::init("nerve-worker");
    if let Ok(argv) = std::env::var(own::EXEC) {
        let error = own::become_program(&argv);
        tracing::error!("failed to become the worker of {workflow}: {error}");
        return ExitCode::from(own::EXEC_FAILED);
    }
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
