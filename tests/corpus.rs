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

/// The broken ones that no schema sees: graphs, templates, statuses, comparisons, what is said twice, what a unit's
/// property means to systemd, and warnings.
const UNSEEN: &[&str] = &[
    "backs-off-backwards",
    "calls-a-function",
    "extracts-without-meta",
    "folds-a-prompt",
    "has-a-key-twice",
    "has-a-status-that-is-error",
    "has-a-status-that-is-open",
    "has-a-status-twice",
    "has-a-timeout-of-zero",
    "has-a-user-for-a-command",
    "has-another-name",
    "has-bad-paths",
    "has-keys-for-other-work",
    "has-keys-without-effect",
    "has-no-route-for-ok",
    "includes-a-template",
    "leads-to-nobody",
    "leaves-a-block-open",
    "leaves-a-tag-open",
    "misspells-a-block",
    "misspells-a-status-of-meta",
    "names-an-unknown-filter",
    "names-what-does-not-exist",
    "never-ends",
    "never-reaches-a-role",
    "routes-an-unknown-role",
    "routes-an-unknown-status",
    "sets-bad-variables",
];

type Check = fn(&Path, &[u8]) -> Vec<Diagnostic>;

fn definition(path: &Path, bytes: &[u8]) -> Vec<Diagnostic> {
    let name = path.file_name().unwrap().to_string_lossy();
    definition::parse(&name, name.strip_suffix(".yaml"), bytes).diagnostics
}

fn settings(path: &Path, bytes: &[u8]) -> Vec<Diagnostic> {
    let name = path.file_name().unwrap().to_string_lossy();
    settings::parse(&name, bytes).1
}

/// The files of a directory, sorted.
fn every_file(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(directory)).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Those that are YAML.
fn files(directory: &str) -> Vec<PathBuf> {
    let mut paths = every_file(directory);
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "yaml"));
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
            assert!(
                !shown.is_empty(),
                "nothing is wrong with {}",
                path.display()
            );
            let expected = path.with_extension("txt");
            if std::env::var_os("NERVE_BLESS").is_some() {
                fs::write(&expected, &shown).unwrap();
            }
            if fs::read_to_string(&expected).unwrap_or_default() != shown {
                different.push(format!("{}\n{shown}", path.display()));
            }
        }
    }
    assert!(
        different.is_empty(),
        "not as agreed on:\n{}",
        different.join("\n")
    );
    assert!(count >= 60, "{count} files");
}

/// Whether a file is one by the schema that editors have. What is no YAML is not.
fn fits(schema: &Validator, path: &Path) -> bool {
    let text = fs::read_to_string(path).unwrap();
    serde_yaml::from_str::<Value>(&text).is_ok_and(|value| schema.is_valid(&value))
}

fn schema(name: &str) -> Validator {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(SCHEMAS)
        .join(name);
    let schema: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(jsonschema::meta::is_valid(&schema), "{name}");
    jsonschema::validator_for(&schema).unwrap()
}

#[test]
fn a_schema_sees_what_is_wrong_in_shape() {
    for (directory, name, unseen) in [
        ("tests/corpus/definitions", "workflow.schema.json", UNSEEN),
        (
            "tests/corpus/settings",
            "nerve.schema.json",
            &["has-a-key-twice"],
        ),
    ] {
        let schema = schema(name);
        let paths = files(directory).into_iter();
        let seen = paths.filter(|path| fits(&schema, path));
        let seen: Vec<String> = seen
            .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(seen, unseen, "{directory}");
    }
}

#[test]
fn what_is_good_is_good_for_both() {
    let workflow = (schema("workflow.schema.json"), definition as Check);
    let engine = (schema("nerve.schema.json"), settings as Check);
    for (directory, (schema, check)) in [
        ("tests/corpus/good/definitions", &workflow),
        ("packaging/usr/lib/nerve/workflows", &workflow),
        (
            "packaging/usr/lib/nerve/examples/develop-workflow/workflows",
            &workflow,
        ),
        (
            "packaging/usr/lib/nerve/examples/review-pull-request/workflows",
            &workflow,
        ),
        ("packaging/usr/share/nerve/workspace/workflows", &workflow),
        ("tests/corpus/good/settings", &engine),
        ("packaging/usr/lib/nerve/nerve.yaml.d", &engine),
        ("packaging/usr/share/nerve/workspace", &engine),
    ] {
        for path in files(directory) {
            let found = check(&path, &fs::read(&path).unwrap());
            assert_eq!(found, [], "{}", path.display());
            // Nothing but comments is no YAML document to an editor.
            let text = fs::read_to_string(&path).unwrap();
            let is_silent = text
                .lines()
                .all(|line| line.is_empty() || line.starts_with('#'));
            assert!(is_silent || fits(schema, &path), "{}", path.display());
        }
    }
}

/// The fuzzers' corpora, and the broken files, which are a good one to begin with.
#[test]
fn what_fuzzers_found_is_harmless() {
    for (name, target) in crate::fuzz::ALL {
        let of_it = format!("tests/fuzz/corpus/{name}");
        let kept = every_file(&of_it);
        assert!(!kept.is_empty(), "{of_it}");
        for path in kept.iter().chain(&every_file("tests/corpus/definitions")) {
            target(&fs::read(path).unwrap());
        }
    }
}
