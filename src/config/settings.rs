//! The engine's settings: nerve.yaml, and what is in nerve.yaml.d beside it. Called when nerved starts and when it reads
//! its definitions again. Looks at the file system with the eyes of [`directory`].
//!
//! All files are optional. A file with an error says nothing at all, and what the others say holds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::diagnostic::{Diagnostic, Severity};
use super::directory::{self, Found, Trust};
use super::reader::Reader;
use super::retention;
use super::tools;
use crate::model::limits;
use crate::model::retention::Retention;
use crate::model::tools::Tools;

const KEYS: [&str; 6] = [
    "max_active",
    "max_rounds",
    "archive",
    "retention",
    "providers",
    "agents",
];
const ARCHIVE_KEYS: [&str; 1] = ["compress"];

/// What nerve.yaml may say. What no file says is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Most runs at a time over all workflows; without one there is no limit.
    pub max_active: Option<u32>,
    /// Whether the archive's files are compressed.
    pub compressed: Option<bool>,
    /// How long runs are kept, where their workflow says nothing else.
    pub retention: Retention,
    /// Rounds after which a run ends 2, where neither its start nor its workflow says otherwise.
    pub max_rounds: Option<u32>,
    /// What roles may use.
    pub tools: Tools,
}

impl Settings {
    /// These settings where `later` is silent.
    #[must_use]
    pub fn beaten_by(self, later: Self) -> Self {
        Self {
            max_active: later.max_active.or(self.max_active),
            compressed: later.compressed.or(self.compressed),
            retention: later.retention.or(self.retention),
            max_rounds: later.max_rounds.or(self.max_rounds),
            tools: self.tools.beaten_by(later.tools),
        }
    }
}

/// What the files add up to.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// What is in force.
    pub settings: Settings,
    /// What is wrong with any of the files.
    pub diagnostics: Vec<Diagnostic>,
}

/// Where the engine's settings are.
pub const STANDARD: &str = "/etc/nerve/nerve.yaml";
/// Where those are that come with nerve and with other packages.
pub const VENDOR: &str = "/usr/lib/nerve/nerve.yaml.d";

/// Where settings are looked for.
#[derive(Debug, Clone)]
pub struct Places {
    /// A directory whose files are beaten by all others.
    pub vendor: PathBuf,
    /// nerve.yaml; the directory [`drop_ins`] is beside it.
    pub file: PathBuf,
}

impl Places {
    /// Those of the system.
    #[must_use]
    pub fn of_system() -> Self {
        Self {
            vendor: VENDOR.into(),
            file: STANDARD.into(),
        }
    }
}

/// The directory beside a settings file whose files beat it: its path with `.d`.
#[must_use]
pub fn drop_ins(file: &Path) -> PathBuf {
    let mut path = file.as_os_str().to_owned();
    path.push(".d");
    path.into()
}

/// Reads the vendor's files, then `file`, then the files of [`drop_ins`], each directory in the order of names; a later one
/// beats an earlier one, and a drop-in hides the vendor's file of its name. What does not exist, is empty or links to
/// /dev/null says nothing.
#[must_use]
pub fn load(places: &Places, trust: Trust) -> Loaded {
    let mut loaded = Loaded::default();
    let exists = |path: &Path| {
        !fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    let own = directory::listing(&drop_ins(&places.file), &mut loaded.diagnostics);
    let mut paths = directory::listing(&places.vendor, &mut loaded.diagnostics);
    paths.retain(|path| !own.iter().any(|own| own.file_name() == path.file_name()));
    paths.extend(exists(&places.file).then(|| places.file.clone()));
    paths.extend(own);
    for path in paths {
        match directory::read(&path, trust) {
            Found::Mask => {}
            Found::Unusable(diagnostic) => loaded.diagnostics.push(diagnostic),
            Found::Bytes(bytes) => {
                let (settings, diagnostics) = parse(&path.display().to_string(), &bytes);
                loaded.settings = loaded.settings.beaten_by(settings.unwrap_or_default());
                loaded.diagnostics.extend(diagnostics);
            }
        }
    }
    loaded
}

/// Reads one file. There are settings exactly when there is no error among the diagnostics.
#[must_use]
pub fn parse(path: &str, bytes: &[u8]) -> (Option<Settings>, Vec<Diagnostic>) {
    if is_silent(bytes) {
        return (Some(Settings::default()), Vec::new());
    }
    let mut reader = Reader::default();
    let settings = read(&mut reader, bytes);
    let diagnostics = reader.diagnostics(path);
    let failed = diagnostics
        .iter()
        .any(|found| found.severity == Severity::Error);
    (settings.filter(|_| !failed), diagnostics)
}

/// Whether there is nothing but comments, as in a file that waits for its first setting.
fn is_silent(bytes: &[u8]) -> bool {
    bytes
        .split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .all(|line| line.is_empty() || line.starts_with(b"#"))
}

fn read(reader: &mut Reader, bytes: &[u8]) -> Option<Settings> {
    let node = reader.tree(bytes)?;
    let fields = reader.fields(&node, "a settings file", &KEYS)?;
    let max_active = fields
        .get("max_active")
        .and_then(|entry| reader.integer(&entry.value, "max_active", 1..=limits::MAX_ACTIVE));
    let max_rounds = fields
        .get("max_rounds")
        .and_then(|entry| reader.integer(&entry.value, "max_rounds", 1..=limits::MAX_ROUNDS));
    let compressed = fields.get("archive").and_then(|entry| {
        let fields = reader.fields(&entry.value, "archive", &ARCHIVE_KEYS)?;
        let choices = [("none", false), ("zstd", true)];
        reader.choice(&fields.get("compress")?.value, "compress", &choices)
    });
    let retention = fields
        .get("retention")
        .map(|entry| retention::read(reader, &entry.value));
    Some(Settings {
        max_active,
        compressed,
        retention: retention.unwrap_or_default(),
        max_rounds,
        tools: tools::read(reader, fields),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn at(file: &Path) -> Places {
        Places {
            vendor: file.with_file_name("vendor"),
            file: file.to_owned(),
        }
    }

    /// A nerve.yaml, its drop-ins, and what the vendor has.
    fn load_all(files: &[(&str, &str)]) -> Loaded {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("nerve.yaml");
        fs::create_dir(drop_ins(&file)).unwrap();
        fs::create_dir(root.path().join("vendor")).unwrap();
        for (name, text) in files {
            fs::write(root.path().join(name), text).unwrap();
        }
        let mut loaded = load(&at(&file), Trust::Anyone);
        for diagnostic in &mut loaded.diagnostics {
            let path = Path::new(&diagnostic.path);
            diagnostic.path = path
                .strip_prefix(root.path())
                .unwrap()
                .display()
                .to_string();
        }
        loaded
    }

    fn says(loaded: &Loaded) -> Vec<String> {
        loaded.diagnostics.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn without_a_file_there_is_no_limit() {
        let root = tempfile::tempdir().unwrap();
        for file in ["nerve.yaml", "none/nerve.yaml"] {
            let loaded = load(&at(&root.path().join(file)), Trust::Anyone);
            assert_eq!(loaded.settings, Settings::default());
            assert_eq!(says(&loaded), [""; 0]);
        }
        let silent = load_all(&[
            ("nerve.yaml", "# max_active: 5\n\n  # nothing\n"),
            ("nerve.yaml.d/a.yaml", ""),
            ("nerve.yaml.d/b.yaml", "{}"),
        ]);
        assert_eq!(silent.settings, Settings::default());
        assert_eq!(says(&silent), [""; 0]);
    }

    #[test]
    fn a_later_file_beats_an_earlier_one() {
        let one = load_all(&[("nerve.yaml", "max_active: 100000\n")]);
        assert_eq!(one.settings.max_active, Some(100_000));
        let files = [
            ("nerve.yaml.d/20-b.yaml", "max_active: 2"),
            ("nerve.yaml.d/30-silent.yaml", "# nothing"),
            ("nerve.yaml.d/40.yml", "max_active: 4"),
            ("nerve.yaml.d/.50.yaml", "max_active: 5"),
            ("nerve.yaml.d/10-a.yaml", "max_active: 1"),
            ("nerve.yaml", "max_active: 9"),
        ];
        let several = load_all(&files);
        assert_eq!(several.settings.max_active, Some(2));
        assert_eq!(says(&several), [""; 0]);
    }

    #[test]
    fn tools_come_by_name_and_an_own_file_hides_the_vendors() {
        let agents = "agents: {a: {exec: [a]}, b: {exec: [b], reply: {jsonl: /t, where: {/type: done}}, usage: {n: /n}}}";
        let providers = "max_rounds: 7\nproviders: {p: {base_url: 'http://h/v1/', model: m, api_key: {credential: k}, timeout: 1min}}";
        let files = [
            ("vendor/agents.yaml", agents),
            ("nerve.yaml", providers),
            (
                "nerve.yaml.d/other.yaml",
                "agents: {a: {exec: [z], prompt: argument}}",
            ),
        ];
        let loaded = load_all(&files);
        assert_eq!(says(&loaded), [""; 0]);
        let tools = loaded.settings.tools;
        assert_eq!(tools.agents["a"].exec, ["z"]);
        assert_eq!(tools.agents["b"].usage["n"], "/n");
        let provider = &tools.providers["p"];
        assert_eq!(
            (provider.base_url.as_str(), provider.timeout_ms),
            ("http://h/v1", 60_000)
        );
        assert!(tools.credentials().eq(["k"]));
        assert_eq!(loaded.settings.max_rounds, Some(7));
        let hidden = load_all(&[files[0], ("nerve.yaml.d/agents.yaml", "# none")]);
        assert_eq!(hidden.settings, Settings::default());
    }

    #[test]
    fn a_key_in_the_file_is_refused_and_not_quoted() {
        let text = "providers: {p: {base_url: 'ftp://x', api_key: sk-secret}, 'a b': {}}\nagents: {c: {exec: [x], reply: {json: x}}}";
        let loaded = load_all(&[("nerve.yaml", text)]);
        let said = says(&loaded).join("\n");
        for expected in [
            "/etc/credstore/NAME",
            "begins with https://",
            "has no base_url",
            "a name has letters",
            "begin it with /",
        ] {
            assert!(said.contains(expected), "{said}");
        }
        assert!(!said.contains("secret"), "{said}");
    }

    #[test]
    fn the_archive_and_what_is_kept_are_set_key_by_key() {
        let loaded = load_all(&[
            (
                "nerve.yaml",
                "archive: {compress: zstd}\nretention: {days: 90, runs: 10000}\n",
            ),
            ("nerve.yaml.d/a.yaml", "retention:\n  runs: infinity\n"),
        ]);
        assert_eq!(says(&loaded), [""; 0]);
        assert_eq!(loaded.settings.compressed, Some(true));
        assert_eq!(loaded.settings.retention.limits(), (Some(90), None));
        let wrong = load_all(&[(
            "nerve.yaml",
            "archive: {compress: gzip}\nretention: {days: -1, weeks: 2, runs: 1000000001}\n",
        )]);
        assert_eq!(wrong.settings, Settings::default());
        let expected = [
            "nerve.yaml:1:21: error: compress is \"gzip\" (write one of none, zstd)",
            "nerve.yaml:2:19: error: days is \"-1\" (write a whole number from 0 to 36500, or infinity)",
            "nerve.yaml:2:23: error: unknown key \"weeks\" in retention (the keys of retention are days, runs)",
            "nerve.yaml:2:39: error: runs is \"1000000001\" (write a whole number from 0 to 1000000000, or infinity)",
        ];
        assert_eq!(says(&wrong).len(), expected.len(), "{:#?}", says(&wrong));
        for (found, expected) in says(&wrong).iter().zip(expected) {
            assert!(found.ends_with(expected), "{found}\nis not {expected}");
        }
    }

    #[test]
    fn a_file_with_an_error_says_nothing_and_the_others_hold() {
        let loaded = load_all(&[
            ("nerve.yaml", "max_active: 3\n"),
            (
                "nerve.yaml.d/a.yaml",
                "max_active: 7\nmax_actve: 1\nunheard_of: 2\n",
            ),
            ("nerve.yaml.d/b.yaml", "max_active: 0\n"),
            ("nerve.yaml.d/c.yaml", "max_active: 100001\n"),
            ("nerve.yaml.d/d.yaml", "max_active: 5\nmax_active: 6\n"),
            ("nerve.yaml.d/e.yaml", "[7]\n"),
            ("nerve.yaml.d/f.yaml", "max_active: [\n"),
        ]);
        assert_eq!(loaded.settings.max_active, Some(3));
        let expected = [
            "nerve.yaml.d/a.yaml:2:1: error: unknown key \"max_actve\" in a settings file (did you mean max_active?)",
            "nerve.yaml.d/a.yaml:3:1: error: unknown key \"unheard_of\" in a settings file (the keys of a settings file are max_active, max_rounds, archive, retention, providers, agents)",
            "nerve.yaml.d/b.yaml:1:13: error: max_active is \"0\" (write a whole number from 1 to 100000)",
            "nerve.yaml.d/c.yaml:1:13: error: max_active is \"100001\"",
            "nerve.yaml.d/d.yaml:2:1: error: \"max_active\" is here twice",
            "nerve.yaml.d/e.yaml:1:1: error: a settings file is a list",
            "nerve.yaml.d/f.yaml:",
        ];
        let found = says(&loaded);
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.starts_with(expected), "{found}\nis not {expected}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("nerve.yaml");
        symlink("nowhere", &file).unwrap();
        fs::write(drop_ins(&file), "no directory").unwrap();
        let loaded = load(&at(&file), Trust::Anyone);
        assert_eq!(loaded.diagnostics.len(), 2, "{:?}", says(&loaded));
        fs::remove_file(&file).unwrap();
        symlink("/dev/null", &file).unwrap();
        let nulled = load(&at(&file), Trust::Anyone);
        assert_eq!(nulled.diagnostics.len(), 1, "{:?}", says(&nulled));
    }

    #[test]
    fn a_file_that_others_can_change_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("nerve.yaml");
        fs::write(&file, "max_active: 3\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
        let loaded = load(&at(&file), Trust::RootOwned);
        assert_eq!(loaded.settings, Settings::default());
        assert!(says(&loaded)[0].contains("not trusted"), "{loaded:?}");
    }
}
