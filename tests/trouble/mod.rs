//! What a store meets on a bad day: power cuts at every moment (`states`), and calls that fail (`walk`). A program that lives
//! through whole lives of runs (`writer`) is run beneath a shim that stands between it and the C library (shim.c): it
//! records every change, or has one fail.

mod check;
mod record;
mod states;
mod walk;
mod writer;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::OnceLock;

use tempfile::TempDir;
use writer::ACKNOWLEDGED;

/// The work of the writer: how many runs, and how many at a time.
const WORK: &str = "NERVE_TROUBLE_WORK";
/// Where it works.
const DIRECTORY: &str = "NERVE_SHIM_DIRECTORY";

/// A directory that no disk slows down, where there is one.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// The shim, compiled once.
fn shim() -> &'static Path {
    static SHIM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = SHIM.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shim.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/trouble/shim.c");
        let compiled = Command::new("cc")
            .args([
                "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o",
            ])
            .args([&path, Path::new(source)])
            .args(["-ldl", "-lpthread"])
            .status();
        assert!(compiled.unwrap().success(), "the shim does not compile");
        (directory, path)
    });
    path
}

/// Runs the writer beneath the shim.
fn run_writer(directory: &Path, work: (u32, u32), settings: &[(&str, &str)]) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "trouble::the_writer",
            "--ignored",
            "--quiet",
            "--test-threads=1",
        ])
        .env("LD_PRELOAD", shim())
        .env(DIRECTORY, directory)
        .env("RUST_BACKTRACE", "0")
        .env(WORK, format!("{} {}", work.0, work.1))
        .envs(settings.iter().copied())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}

#[test]
#[ignore = "the program that the others here run"]
fn the_writer() {
    let Ok(work) = std::env::var(WORK) else {
        return;
    };
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).unwrap());
    let mut words = work.split(' ').map(|word| word.parse().unwrap());
    let (runs, together) = (words.next().unwrap(), words.next().unwrap());
    writer::write(&directory, runs, together).unwrap();
}

/// A number from the environment.
fn setting(name: &str, or: u64) -> u64 {
    std::env::var(name).map_or(or, |text| text.parse().unwrap())
}
