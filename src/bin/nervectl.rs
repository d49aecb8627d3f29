//! nervectl: the command line. See `nerve::ctl`.

use std::process::ExitCode;

fn main() -> ExitCode {
    nerve::ctl::run()
}
