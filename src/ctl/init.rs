//! `nervectl init`: a workspace to start from. Needs neither nerve nor root.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::cli::Init;
use super::text::line;
use super::{Failure, print};
use crate::os::disk;

/// The files of a workspace, and what is in them.
const FILES: [(&str, &str); 5] = [
    (
        "nerve.yaml",
        include_str!("../../packaging/usr/share/nerve/workspace/nerve.yaml"),
    ),
    (
        "workflows/report-disk-usage.yaml",
        include_str!("../../packaging/usr/share/nerve/workspace/workflows/report-disk-usage.yaml"),
    ),
    (
        "AGENT.md",
        include_str!("../../packaging/usr/share/nerve/workspace/AGENT.md"),
    ),
    (
        ".gitignore",
        include_str!("../../packaging/usr/share/nerve/workspace/gitignore"),
    ),
    (
        "workflow.schema.json",
        include_str!("../../packaging/usr/share/nerve/workflow.schema.json"),
    ),
];

/// Writes what is not there yet, or with `--force` everything, and says of each file what became of it.
pub(super) fn init(arguments: &Init) -> Result<u8, Failure> {
    let directory = &arguments.directory;
    let mut said = String::new();
    for (name, text) in FILES {
        let path = directory.join(name);
        let shown = path.display().to_string();
        let is_there = fs::symlink_metadata(&path).is_ok();
        let what = match (is_there, arguments.force) {
            (true, false) => "left    ",
            (true, true) => "replaced",
            (false, _) => "wrote   ",
        };
        if !is_there || arguments.force {
            write(&path, text.as_bytes()).map_err(|error| {
                Failure::Input(format!("cannot write {}: {error}", line(&shown)))
            })?;
        }
        let _ = writeln!(said, "{what} {}", line(&shown));
    }
    if said.contains("left  ") {
        said.push_str("What was left was there already; --force replaces it.\n");
    }
    said.push_str("AGENT.md says how to go on.\n");
    print(&said)?;
    Ok(0)
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    disk::replace(path, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{definition, settings};

    #[test]
    fn what_a_workspace_starts_with_is_right_and_nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let mut arguments = Init {
            directory: directory.path().join("new/workspace"),
            force: false,
        };
        let path = |name: &str| directory.path().join("new/workspace").join(name);
        assert_eq!(init(&arguments).unwrap(), 0);
        for (name, text) in FILES {
            assert_eq!(fs::read_to_string(path(name)).unwrap(), text);
            let faults = match name.split_once('/') {
                Some((_, file)) => {
                    let stem = file.strip_suffix(".yaml");
                    definition::parse(name, stem, text.as_bytes()).diagnostics
                }
                None if name == "nerve.yaml" => settings::parse(name, text.as_bytes()).1,
                None => Vec::new(),
            };
            assert_eq!(faults, []);
        }
        fs::write(path("AGENT.md"), "mine").unwrap();
        init(&arguments).unwrap();
        assert_eq!(fs::read_to_string(path("AGENT.md")).unwrap(), "mine");
        arguments.force = true;
        init(&arguments).unwrap();
        assert_eq!(fs::read_to_string(path("AGENT.md")).unwrap(), FILES[2].1);
    }
}
