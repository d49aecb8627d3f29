//! A worker of the user's own (`worker: {exec: […]}`): nerve-worker begins as it always does, and then becomes another
//! program in the same process, which speaks nerve-worker-protocol(7).

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use sd_notify::NotifyState;

use super::home;

/// The variable in which the unit has its argv, as a JSON array.
pub const EXEC: &str = "NERVE_WORKER_EXEC";
/// Exit status of a process that could not become that program, as systemd has it.
pub const EXEC_FAILED: u8 = 203;

/// Becomes the program; returns only to say why it could not.
#[must_use]
pub fn become_program(argv: &str) -> io::Error {
    match prepare(argv) {
        Ok(mut command) => {
            let error = command.exec();
            let program = command.get_program().display();
            let help =
                "make it a file that the worker's user may execute, or change `worker: {exec: …}`";
            io::Error::new(
                error.kind(),
                format!("cannot execute {program}: {error}; {help}"),
            )
        }
        Err(error) => error,
    }
}

fn prepare(argv: &str) -> io::Result<Command> {
    let argv: Vec<String> = serde_json::from_str(argv)?;
    let (program, arguments) = argv
        .split_first()
        .ok_or_else(|| io::Error::other(format!("{EXEC} is an empty list")))?;
    home::enter_main()?;
    let mut command = Command::new(program);
    command.args(arguments).env_remove(EXEC);
    // It is ready for systemd; what it does not do then is between it and nerved.
    sd_notify::notify(&[NotifyState::Ready])?;
    Ok(command)
}
