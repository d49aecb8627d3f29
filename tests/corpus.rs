//! Broken files and what is said about them: `corpus/*/NAME.yaml` beside `NAME.txt`, which `NERVE_BLESS=1` rewrites.
//! They, the good ones and what is shipped hold the JSON Schemas for editors and the parser against each other, too.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use jsonschema::Validator;
use nerve::config::definition;
use nerve::config::diagnostic::Diagnostic;
use nerve::config::picture::{Paint, draw};
use nerve::config::settings;
use serde_json::Value;

const SCHEMAS: &str = "packaging/usr/share/nerve";
const SHIPPED: &str = "packaging/usr/lib/nerve/workflows";

type Check = fn(&Path, &[u8]) -> Vec<Diagnostic>;

fn definition(path: &Path, bytes: &[u8]) -> Vec<Diagnostic> {
    let name = path.file_name().unwrap().to_string_lossy();
    definition::parse(&name, name.strip_suffix(".yaml"), bytes).diagnostics
}

fn settings(path: &Path, bytes: &[u8]) -> Vec<Diagnostic> {
    let name = path.file_name().unwrap().to_string_lossy();
    settings::parse(&name, bytes).1
}

/// The YAML files of a directory.
fn files(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(directory)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|ending| ending == "yaml"))
        .collect();
    paths.sort();
    paths
}

/// What a person is shown.
fn shown(path: &Path, check: Check) -> String {
    let bytes = fs::read(path).unwrap();
    let lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').collect();
    let mut shown = String::new();
    for diagnostic in check(path, &bytes) {
        assert!(diagnostic.help.is_some(), "no help: {diagnostic}");
        let line = lines.get(diagnostic.line - 1).copied().unwrap_or_default();
        let _ = writeln!(shown, "{}\n", draw(&diagnostic, line, 100, Paint::Plain));
    }
    shown
}

#[test]
fn what_is_said_about_a_broken_file_is_what_was_agreed_on() {
    let mut different = Vec::new();
    let mut count = 0;
    for (directory, check) in [
        ("tests/corpus/definitions", definition as Check),
        ("tests/corpus/settings", settings),
    ] {
        for path in files(directory) {
            count += 1;
            let shown = shown(&path, check);
            assert!(!shown.is_empty(), "nothing is wrong with {}", path.display());
            let expected = path.with_extension("txt");
            if std::env::var_os("NERVE_BLESS").is_some() {
                fs::write(&expected, &shown).unwrap();
            }
            if fs::read_to_string(&expected).unwrap_or_default() != shown {
                different.push(format!("{}\n{shown}", path.display()));
            }
        }
    }
    assert!(different.is_empty(), "not as agreed on:\n{}", different.join("\n"));
    assert!(count >= 60, "{count} files");
}
