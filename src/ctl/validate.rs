//! `nervectl validate`: everything that is wrong with all files at once, for people or for machines. Needs no daemon.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::mem;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::cli::{Format, Validate};
use super::paper::{Ink, Paper};
use super::{BROKEN, Failure, Settings, input, print, text};
use crate::config::definition::{self, Parsed};
use crate::config::diagnostic::{Diagnostic, Severity};
use crate::config::directory::{self, Found, Trust};
use crate::config::picture::{Paint, draw};
use crate::config::settings;
use crate::model::tools::Tools;

/// Columns of a picture when nobody says how many there are.
const COLUMNS: usize = 120;

/// `nervectl validate`
pub(super) fn validate(settings: &Settings, arguments: &Validate) -> Result<u8, Failure> {
    let verdict = Verdict::on(settings, &arguments.files)?;
    match arguments.output {
        Format::Json => print(&format!("{:#}\n", verdict.json()))?,
        Format::Text => {
            show(&verdict);
            print(&verdict.right)?;
        }
    }
    let warnings = verdict.count(Severity::Warning);
    let is_right = verdict.count(Severity::Error) == 0 && !(arguments.strict && warnings > 0);
    Ok(if is_right { 0 } else { BROKEN })
}

/// What validation found.
#[derive(Debug, Default)]
struct Verdict {
    files: usize,
    /// What nerve.yaml provides on this machine.
    tools: Tools,
    /// A line for each file that is right.
    right: String,
    /// What is wrong, each with its line of the file.
    found: Vec<(Diagnostic, Vec<u8>)>,
}

impl Verdict {
    fn on(settings: &Settings, files: &[PathBuf]) -> Result<Self, Failure> {
        let engine = settings::load(&settings.engine, Trust::Anyone).settings;
        let mut verdict = Self {
            tools: engine.tools,
            ..Self::default()
        };
        if files.is_empty() {
            verdict.add_machine(settings);
        }
        // What is provided first: definitions may need it.
        let (engine, definitions): (Vec<_>, Vec<_>) =
            files.iter().partition(|path| is_settings(path));
        for path in engine.into_iter().chain(definitions) {
            verdict.add_file(path)?;
        }
        Ok(verdict)
    }

    /// All that nerved reads, as it reads it: what it would not trust is wrong.
    fn add_machine(&mut self, settings: &Settings) {
        let loaded = directory::load(&settings.definitions, Trust::RootOwned);
        let others = settings::load(&settings.engine, Trust::RootOwned).diagnostics;
        let others: Vec<Diagnostic> = loaded.diagnostics.into_iter().chain(others).collect();
        let paths: BTreeSet<&str> = others.iter().map(|other| other.path.as_str()).collect();
        for path in paths {
            self.files += 1;
            let source = match directory::read(Path::new(path), Trust::Anyone) {
                Found::Bytes(bytes) => bytes,
                Found::Mask | Found::Unusable(_) => Vec::new(),
            };
            let of_it = others.iter().filter(|other| other.path == path);
            self.add(of_it.cloned(), &source);
        }
        for file in loaded.definitions.into_values() {
            self.judge(file.parsed, &file.bytes);
        }
    }

    fn add_file(&mut self, path: &Path) -> Result<(), Failure> {
        if path == Path::new("-") {
            let (name, bytes) = input::definition(path)?;
            self.judge(definition::parse(&name, None, &bytes), &bytes);
            return Ok(());
        }
        let shown = path.display().to_string();
        match directory::read(path, Trust::Anyone) {
            Found::Unusable(diagnostic) => {
                self.files += 1;
                self.add([diagnostic], &[]);
            }
            Found::Mask => {
                self.files += 1;
                self.say(&format!("{shown}: empty; it hides others of its name"));
            }
            Found::Bytes(bytes) if is_settings(path) => {
                self.files += 1;
                let (settings, diagnostics) = settings::parse(&shown, &bytes);
                self.add(diagnostics, &bytes);
                if let Some(settings) = settings {
                    self.tools = mem::take(&mut self.tools).beaten_by(settings.tools);
                    self.say(&format!("{shown}: ok"));
                }
            }
            Found::Bytes(bytes) => {
                let stem = path.file_stem().map(OsStr::to_string_lossy);
                self.judge(definition::parse(&shown, stem.as_deref(), &bytes), &bytes);
            }
        }
        Ok(())
    }

    fn judge(&mut self, parsed: Parsed, source: &[u8]) {
        self.files += 1;
        let warnings = definition::host_warnings(&parsed, &self.tools);
        if let Some(definition) = &parsed.definition {
            self.say(&format!("{}: ok", definition.workflow.name));
        }
        self.add(parsed.diagnostics.into_iter().chain(warnings), source);
    }

    /// Keeps of a file the lines that are spoken of.
    fn add(&mut self, diagnostics: impl IntoIterator<Item = Diagnostic>, source: &[u8]) {
        let lines: Vec<&[u8]> = source.split(|byte| *byte == b'\n').collect();
        for diagnostic in diagnostics {
            let line = lines.get(diagnostic.line - 1).copied().unwrap_or_default();
            self.found.push((diagnostic, line.to_vec()));
        }
    }

    fn say(&mut self, line: &str) {
        self.right.push_str(&text::line(line));
        self.right.push('\n');
    }

    fn count(&self, severity: Severity) -> usize {
        let found = self.found.iter().map(|(found, _)| found);
        let of_it = found.filter(|found| found.severity == severity);
        of_it.map(|found| found.count).sum()
    }

    /// `2 errors, 1 warning in 1 of 3 files`; `None` when nothing is wrong.
    fn summary(&self) -> Option<String> {
        let number = |severity: Severity| match self.count(severity) {
            0 => None,
            1 => Some(format!("1 {severity}")),
            count => Some(format!("{count} {severity}s")),
        };
        let words: Vec<String> = [Severity::Error, Severity::Warning]
            .into_iter()
            .filter_map(number)
            .collect();
        let paths: BTreeSet<&str> = self.found.iter().map(|(at, _)| at.path.as_str()).collect();
        let files = if self.files == 1 { "file" } else { "files" };
        let all = self.files;
        (!words.is_empty())
            .then(|| format!("{} in {} of {all} {files}", words.join(", "), paths.len()))
    }

    fn json(&self) -> serde_json::Value {
        let object = |(found, _): &(Diagnostic, _)| {
            json!({
                "path": found.path,
                "line": found.line,
                "column": found.column,
                "endColumn": found.end_column,
                "severity": found.severity.to_string(),
                "message": found.message,
                "help": found.help,
            })
        };
        self.found.iter().map(object).collect()
    }
}

/// Shows what is wrong with texts, each with its text; whether all of them can be used.
pub(super) fn tell<'a>(found: impl IntoIterator<Item = (Vec<Diagnostic>, &'a [u8])>) -> bool {
    let mut verdict = Verdict::default();
    for (diagnostics, source) in found {
        verdict.files += 1;
        verdict.add(diagnostics, source);
    }
    show(&verdict);
    verdict.count(Severity::Error) == 0
}

/// Whether a file is one of the engine's, by where it is.
fn is_settings(path: &Path) -> bool {
    path.file_name() == Some(OsStr::new("nerve.yaml"))
        || path
            .parent()
            .is_some_and(|parent| parent.ends_with("nerve.yaml.d"))
}

/// The pictures and the summary, on stderr. Nobody can be told when it is gone.
fn show(verdict: &Verdict) {
    let Some(summary) = verdict.summary() else {
        return;
    };
    let mut stderr = io::stderr().lock();
    let paper = Paper::of(&stderr);
    let paint = match paper.ink {
        Ink::Black => Paint::Plain,
        Ink::Coloured => Paint::Coloured,
    };
    let columns = paper.room.unwrap_or(COLUMNS);
    for (diagnostic, line) in &verdict.found {
        let picture = draw(diagnostic, line, columns, paint);
        let _ = writeln!(stderr, "{picture}\n");
    }
    let _ = writeln!(stderr, "{summary}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "version: 1\nname: right\nroles:\n  a:\n    exec: [/bin/true]\ngraph:\n  $START: a\n  a: { ok: $END }\n";

    fn verdict(files: &[(&str, &str)]) -> Verdict {
        let directory = tempfile::tempdir().unwrap();
        let path = |(name, text): &(&str, &str)| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path
        };
        let paths: Vec<PathBuf> = files.iter().map(path).collect();
        Verdict::on(&Settings::default(), &paths).unwrap()
    }

    #[test]
    fn each_file_is_judged_and_counted() {
        let good = verdict(&[("right.yaml", RIGHT), ("mask.yaml", "")]);
        assert_eq!((good.found.len(), good.summary()), (0, None));
        assert!(good.right.starts_with("right: ok\n"), "{good:?}");
        assert!(good.right.contains("mask.yaml: empty"), "{good:?}");
        let bad = verdict(&[
            ("wrong.yaml", "version: 1\nname: wrong\nrules: {}\n"),
            ("right.yaml", RIGHT),
            (
                "warned.yaml",
                &RIGHT
                    .replace("bin/true", "nonexistent")
                    .replace(": right", ": warned"),
            ),
            (
                "unprovided.yaml",
                &RIGHT
                    .replace(
                        "exec: [/bin/true]",
                        "{llm: {provider: near}, extract: nobodys, meta: {type: object}}",
                    )
                    .replace(": right", ": unprovided"),
            ),
            (
                "nerve.yaml",
                "providers: {neat: {base_url: 'http://[::1]/v1'}}\n",
            ),
        ]);
        assert_eq!(bad.right.matches(": ok\n").count(), 4);
        let summary = bad.summary().unwrap();
        assert_eq!(summary, "3 errors, 3 warnings in 3 of 5 files");
        let said = |words: &str| {
            bad.found
                .iter()
                .any(|(found, _)| found.to_string().contains(words))
        };
        assert!(
            said("\"near\" is not in the providers of nerve.yaml (did you mean neat?)"),
            "{bad:?}"
        );
        assert!(
            said("\"nobodys\" is not in the providers of nerve.yaml (write"),
            "{bad:?}"
        );
        let both = RIGHT.replace("bin/true", "nonexistent") + "rules: {}\n";
        let summary = verdict(&[("right.yaml", &both)]).summary().unwrap();
        assert_eq!(summary, "1 error, 1 warning in 1 of 1 file");
        let flood = verdict(&[("flood.yaml", &"a:\n".repeat(5_000))]);
        let summary = flood.summary().unwrap();
        assert_eq!(flood.found.len(), 101);
        assert!(summary.starts_with("500"), "{summary}");
        let missing = Verdict::on(&Settings::default(), &["/nonexistent/a.yaml".into()]).unwrap();
        assert_eq!(missing.summary().unwrap(), "1 error in 1 of 1 file");
    }

    #[test]
    fn settings_are_known_by_where_they_are() {
        let files = [
            ("nerve.yaml", "max_active: 0\n"),
            ("nerve.yaml.d/a.yaml", "max_active: 1\n"),
            ("other.yaml", "max_active: 1\n"),
        ];
        let found = verdict(&files);
        assert!(found.right.ends_with("/nerve.yaml.d/a.yaml: ok\n"));
        let json = found.json();
        let first = json[0].as_object().unwrap();
        let words: Vec<&str> = first.keys().map(String::as_str).collect();
        let expected = [
            "column",
            "endColumn",
            "help",
            "line",
            "message",
            "path",
            "severity",
        ];
        assert_eq!(words, expected);
        assert_eq!(
            (&first["column"], &first["endColumn"]),
            (&json!(13), &json!(14))
        );
        assert!(json[1]["message"].to_string().contains("max_active"));
    }

    #[test]
    fn no_definitions_at_all_are_right() {
        let settings = Settings {
            definitions: vec!["/nonexistent".into()],
            engine: settings::Places {
                file: "/nonexistent/nerve.yaml".into(),
                vendor: "/nonexistent/nerve.yaml.d".into(),
            },
            ..Settings::default()
        };
        let verdict = Verdict::on(&settings, &[]).unwrap();
        assert_eq!(
            (verdict.files, verdict.found.len(), verdict.right.as_str()),
            (0, 0, "")
        );
    }
}
