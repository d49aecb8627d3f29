//! Definitions as files: those that are shipped, and our reading of YAML beside another parser's.

use std::path::{Path, PathBuf};

use nerve::config::definition;
use nerve::config::directory::{self, Trust};

const SHIPPED: &str = "packaging/usr/lib/nerve/workflows";

/// What two parsers might read differently.
const TRICKY: &str = r#"
version: 1
name: "tricky"   # a comment
description: >-
  folded
  text: with a colon
max_rounds: 17
concurrency: 2
timeout: 1h 30min
roles:
  coder: &coder
    exec: [sh, -c, 'echo "yes" no ~ 012']
    prompt: |
      Task: {{ start.content }}

        indented
    cwd: "/srv/\u00e4"
  tester: *coder
graph:
  $START: coder
  coder: { ok: tester, error: "$END" }
  tester:
    ok: $END
"#;

fn agree(name: &str, text: &str) {
    let parsed = definition::parse(name, None, text.as_bytes());
    assert!(parsed.diagnostics.is_empty(), "{:?}", parsed.diagnostics);
    let other: serde_json::Value = serde_yaml::from_str(text).unwrap();
    assert_eq!(parsed.definition.unwrap().source, other, "{name}");
}

#[test]
fn shipped_definitions_are_without_fault() {
    let loaded = directory::load(&[PathBuf::from(SHIPPED)], Trust::Anyone);
    assert!(loaded.diagnostics.is_empty(), "{:?}", loaded.diagnostics);
    let names: Vec<_> = loaded.definitions.keys().map(ToString::to_string).collect();
    assert_eq!(names, ["check-host", "fix-failing-test"]);
    for file in loaded.definitions.values() {
        assert!(
            file.parsed.diagnostics.is_empty(),
            "{:?}",
            file.parsed.diagnostics
        );
    }
}

/// Their agents and directories are whoever's uses them: only the host may lack something.
#[test]
fn examples_are_without_fault() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir("packaging/usr/lib/nerve/examples").unwrap() {
        let folder = entry.unwrap().path().join("workflows");
        let loaded = directory::load(&[folder], Trust::Anyone);
        assert!(loaded.diagnostics.is_empty(), "{:?}", loaded.diagnostics);
        for (name, file) in loaded.definitions {
            assert!(
                file.parsed.diagnostics.is_empty(),
                "{:?}",
                file.parsed.diagnostics
            );
            names.push(name.to_string());
        }
    }
    names.sort();
    assert_eq!(names, ["develop-workflow", "review-pull-request"]);
}

#[test]
fn our_reading_of_yaml_is_everybodys() {
    agree("tricky", TRICKY);
    for entry in std::fs::read_dir(Path::new(SHIPPED)).unwrap() {
        let path = entry.unwrap().path();
        agree(
            &path.display().to_string(),
            &std::fs::read_to_string(&path).unwrap(),
        );
    }
}
