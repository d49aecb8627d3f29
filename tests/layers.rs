//! The layers of the house: imports point down only, `unsafe` stays in its room, files stay readable.

use std::path::{Path, PathBuf};

/// Layer by module. Who is not here is no module of the crate.
const LAYERS: [(&str, u32); 11] = [
    ("model", 0),
    ("engine", 1),
    ("config", 1),
    ("os", 1),
    ("store", 2),
    ("systemd", 2),
    ("worker", 2),
    ("manager", 3),
    ("bus", 4),
    ("ctl", 4),
    ("daemon", 5),
];

/// Imports within a layer that have a reason.
const NEIGHBOURS: [(&str, &str); 1] = [
    // nervectl is the bus's client half.
    ("ctl", "bus"),
];

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| {
            if path.is_dir() {
                sources(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}

fn module(path: &Path) -> String {
    let below = path.strip_prefix("src").unwrap();
    below
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_str()
        .unwrap()
        .trim_end_matches(".rs")
        .to_owned()
}

fn layer(module: &str) -> Option<u32> {
    LAYERS
        .iter()
        .find(|(name, _)| *name == module)
        .map(|(_, layer)| *layer)
}

/// Modules of the crate that a source names, `use crate::{a, b}` included.
fn imports(source: &str) -> Vec<String> {
    let word = |text: &str| {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    let mut found = Vec::new();
    for part in source.split("crate::").skip(1) {
        match part.strip_prefix('{') {
            Some(list) => {
                let list = list.split('}').next().unwrap_or_default();
                found.extend(list.split(',').map(|item| word(item.trim())));
            }
            None => found.push(word(part)),
        }
    }
    found
}

fn faults() -> Vec<String> {
    let mut faults = Vec::new();
    for path in sources(Path::new("src")) {
        let source = std::fs::read_to_string(&path).unwrap();
        let (from, shown) = (module(&path), path.display());
        // The map and the programs are above all layers; a test may take what it needs to make its world.
        let is_test = path.ends_with("tests.rs") || path.iter().any(|part| part == "simulation");
        if from == "lib" || from == "bin" || is_test {
            continue;
        }
        let Some(of_from) = layer(&from) else {
            faults.push(format!("{shown}: module {from} has no layer"));
            continue;
        };
        for to in imports(&source).into_iter().filter(|to| *to != from) {
            let is_known_neighbour = NEIGHBOURS.contains(&(from.as_str(), to.as_str()));
            match layer(&to) {
                Some(of_to) if of_to < of_from || is_known_neighbour => {}
                Some(_) => faults.push(format!(
                    "{shown}: {from} imports {to}, which is not below it"
                )),
                None => faults.push(format!("{shown}: there is no module {to}")),
            }
        }
        if ["model", "engine"].contains(&from.as_str()) {
            for impure in [
                "tokio",
                "zbus",
                "rusqlite",
                "rustix",
                "std::fs",
                "SystemTime",
                "Instant::now",
                "std::process",
            ] {
                if source.contains(impure) {
                    faults.push(format!("{shown}: {from} is pure and names {impure}"));
                }
            }
        }
        if from != "os" && source.contains("unsafe {") {
            faults.push(format!("{shown}: unsafe outside src/os"));
        }
        if !source.starts_with("//!") {
            faults.push(format!("{shown}: does not say what it is"));
        }
    }
    faults
}

#[test]
fn imports_point_down_only() {
    assert_eq!(faults(), Vec::<String>::new());
}

#[test]
fn the_checker_sees_every_form_of_import() {
    let source =
        "use crate::model::run;\nuse crate::{os, store::Store};\nlet x = crate::bus::NAME;";
    assert_eq!(imports(source), ["model", "os", "store", "bus"]);
}
