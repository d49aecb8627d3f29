//! The directories that definitions are read from. Called when nerved starts or reads them again, by `settings`, and by
//! `nervectl validate`.
//!
//! A file is opened once and read once: what is checked, hashed and used is the same bytes. Nothing that is found stops
//! anything: it becomes a diagnostic. A definition decides what runs as which user, so nerved trusts a file only when
//! nobody but root can change it, or what any part of its path leads to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs::{self, File as Handle};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::definition::{Parsed, parse};
use super::diagnostic::{Diagnostic, Severity};
use crate::model::limits;
use crate::model::name::WorkflowName;

/// Most symbolic links on the way to a file, as in the kernel.
const LINKS: usize = 40;

/// Whose files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Only those that root alone can change, and whose whole path root alone can change.
    RootOwned,
    /// Any that can be read.
    Anyone,
}

/// A definition file as it was found.
#[derive(Debug, Clone)]
pub struct File {
    /// Where it is.
    pub path: PathBuf,
    /// Its stem.
    pub name: WorkflowName,
    /// What was read; empty when it could not be.
    pub bytes: Vec<u8>,
    /// What it says, or why it says nothing.
    pub parsed: Parsed,
}

/// What the directories hold.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// The files that are in force, broken ones included; masked ones are not there.
    pub definitions: BTreeMap<WorkflowName, File>,
    /// What is wrong with the directories, and with files that can be no definition.
    pub diagnostics: Vec<Diagnostic>,
}

/// Where definitions are: the administrator's, the machine's until it reboots, the distribution's.
pub const STANDARD: [&str; 3] = [
    "/etc/nerve/workflows",
    "/run/nerve/workflows",
    "/usr/lib/nerve/workflows",
];

/// What is at a path.
#[derive(Debug)]
pub enum Found {
    /// A file with something in it.
    Bytes(Vec<u8>),
    /// An empty file, or a link to /dev/null: it hides what other directories have under its name.
    Mask,
    /// Something that cannot be used.
    Unusable(Diagnostic),
}

/// Reads `NAME.yaml` in each of the directories; the first that has a name wins, broken or not. A directory that does
/// not exist is empty; hidden files and other endings are not looked at.
#[must_use]
pub fn load(directories: &[PathBuf], trust: Trust) -> Loaded {
    let mut loaded = Loaded::default();
    let mut seen = BTreeSet::new();
    for directory in directories {
        for path in listing(directory, &mut loaded.diagnostics) {
            let stem = path
                .file_stem()
                .map(OsStr::to_string_lossy)
                .unwrap_or_default();
            let name = match stem.parse::<WorkflowName>() {
                Ok(name) => name,
                Err(error) => {
                    let message = format!("the file is no definition: {error}");
                    loaded.diagnostics.push(diagnostic(
                        &path,
                        message,
                        "rename it, or move it elsewhere",
                    ));
                    continue;
                }
            };
            if !seen.insert(name.clone()) {
                continue;
            }
            let shown = path.display().to_string();
            let (bytes, parsed) = match read(&path, trust) {
                Found::Mask => continue,
                Found::Unusable(diagnostic) => (Vec::new(), Parsed::failed(diagnostic)),
                Found::Bytes(bytes) => {
                    let parsed = parse(&shown, Some(name.as_str()), &bytes);
                    (bytes, parsed)
                }
            };
            loaded.definitions.insert(
                name.clone(),
                File {
                    path,
                    name,
                    bytes,
                    parsed,
                },
            );
        }
    }
    loaded
}

/// The files of a directory that may be definitions, or settings, sorted.
pub(super) fn listing(directory: &Path, diagnostics: &mut Vec<Diagnostic>) -> Vec<PathBuf> {
    let wanted = |name: &OsStr| {
        let name = name.as_bytes();
        name.ends_with(b".yaml") && !name.starts_with(b".")
    };
    let entries = fs::read_dir(directory).and_then(|entries| {
        entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()
    });
    match entries {
        Ok(names) => {
            let mut paths: Vec<PathBuf> = names
                .iter()
                .filter(|name| wanted(name))
                .map(|name| directory.join(name))
                .collect();
            paths.sort();
            paths
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            let message = format!("the directory cannot be read: {error}");
            diagnostics.push(diagnostic(
                directory,
                message,
                "check its type and its permissions",
            ));
            Vec::new()
        }
    }
}

/// Reads one file, at most one byte more than a definition may have.
#[must_use]
pub fn read(path: &Path, trust: Trust) -> Found {
    match open(path, trust) {
        Ok(None) => Found::Mask,
        Ok(Some(handle)) => {
            let mut bytes = Vec::new();
            let limit = limits::DEFINITION_BYTES as u64 + 1;
            match handle.take(limit).read_to_end(&mut bytes) {
                Ok(0) => Found::Mask,
                Ok(_) => Found::Bytes(bytes),
                Err(error) => {
                    let message = format!("the file cannot be read: {error}");
                    Found::Unusable(diagnostic(path, message, "check the disk it is on"))
                }
            }
        }
        Err(diagnostic) => Found::Unusable(diagnostic),
    }
}

/// Opens a regular file that is trusted; `None` when it is a link to /dev/null.
fn open(path: &Path, trust: Trust) -> Result<Option<Handle>, Diagnostic> {
    let unreadable = |error: io::Error| {
        let help = match error.kind() {
            io::ErrorKind::NotFound => "check the name, and where it links to",
            _ => "check its permissions",
        };
        diagnostic(path, format!("the file cannot be opened: {error}"), help)
    };
    // A fifo would block without NONBLOCK.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let handle =
        rustix::fs::open(path, flags, Mode::empty()).map_err(|error| unreadable(error.into()))?;
    let handle = Handle::from(handle);
    let metadata = handle.metadata().map_err(unreadable)?;
    let null = !metadata.is_file()
        && fs::metadata("/dev/null").is_ok_and(|null| {
            null.rdev() == metadata.rdev() && null.mode() & 0o170_000 == metadata.mode() & 0o170_000
        });
    if !metadata.is_file() && !null {
        return Err(diagnostic(
            path,
            "this is not a regular file".to_owned(),
            "replace it by one",
        ));
    }
    if trust == Trust::RootOwned {
        let identity = (metadata.dev(), metadata.ino());
        walk(path, identity, null, &look).map_err(|complaint| complaint.about(path))?;
    }
    Ok((!null).then_some(handle))
}

/// What lies at one place on the way to a file.
#[derive(Debug, Clone)]
struct Seen {
    uid: u32,
    mode: u32,
    identity: (u64, u64),
    link: Option<PathBuf>,
}

fn look(path: &Path) -> io::Result<Seen> {
    let metadata = fs::symlink_metadata(path)?;
    let link = if metadata.is_symlink() {
        Some(fs::read_link(path)?)
    } else {
        None
    };
    Ok(Seen {
        uid: metadata.uid(),
        mode: metadata.mode(),
        identity: (metadata.dev(), metadata.ino()),
        link,
    })
}

/// Why a path is not trusted.
#[derive(Debug, PartialEq, Eq)]
struct Complaint {
    message: String,
    help: String,
}

impl Complaint {
    fn about(self, path: &Path) -> Diagnostic {
        diagnostic(path, self.message, &self.help)
    }
}

/// Follows a path as the kernel does and judges all that it goes through, the directories of links included. The end
/// must be the file that is already open; `null` when that is /dev/null, which everybody may write.
fn walk(
    path: &Path,
    identity: (u64, u64),
    null: bool,
    look: &dyn Fn(&Path) -> io::Result<Seen>,
) -> Result<(), Complaint> {
    let unclear = |path: &Path, why: &str| Complaint {
        message: format!("it cannot be told who may change {}: {why}", path.display()),
        help: "give the file a path that does not change".to_owned(),
    };
    let absolute = std::path::absolute(path).map_err(|error| unclear(path, &error.to_string()))?;
    let mut rest: VecDeque<PathBuf> = absolute
        .components()
        .map(|part| PathBuf::from(part.as_os_str()))
        .collect();
    let mut at = PathBuf::from("/");
    let mut links = 0;
    let mut last = None;
    while let Some(part) = rest.pop_front() {
        match part.components().next() {
            Some(Component::ParentDir) => {
                at.pop();
            }
            Some(Component::RootDir) => at = PathBuf::from("/"),
            Some(Component::Normal(name)) => at.push(name),
            _ => continue,
        }
        let seen = look(&at).map_err(|error| unclear(&at, &error.to_string()))?;
        if let Some(target) = &seen.link {
            links += 1;
            if links > LINKS {
                return Err(unclear(path, "too many symbolic links"));
            }
            if seen.uid != 0 {
                return Err(not_roots(&at, "-h "));
            }
            for part in target.components().rev() {
                rest.push_front(PathBuf::from(part.as_os_str()));
            }
            at.pop();
            continue;
        }
        let is_end = rest.is_empty();
        if !(is_end && null) {
            judge(&at, &seen)?;
        }
        last = is_end.then_some(seen.identity);
    }
    if last == Some(identity) {
        Ok(())
    } else {
        Err(unclear(path, "it was replaced while it was being read"))
    }
}

fn judge(path: &Path, seen: &Seen) -> Result<(), Complaint> {
    if seen.uid != 0 {
        return Err(not_roots(path, ""));
    }
    if seen.mode & 0o022 == 0 {
        return Ok(());
    }
    let who = if seen.mode & 0o002 == 0 {
        "its group"
    } else {
        "everybody"
    };
    let shown = path.display();
    Err(Complaint {
        message: format!(
            "not trusted: {shown} can be written by {who} (mode {:04o})",
            seen.mode & 0o7777
        ),
        help: format!("run `chmod go-w {shown}`"),
    })
}

fn not_roots(path: &Path, option: &str) -> Complaint {
    let shown = path.display();
    Complaint {
        message: format!("not trusted: {shown} does not belong to root"),
        help: format!("run `chown {option}root: {shown}`"),
    }
}

fn diagnostic(path: &Path, message: String, help: &str) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        path: path.display().to_string(),
        line: 1,
        column: 1,
        end_column: 2,
        message,
        count: 1,
        help: Some(help.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    fn definition(name: &str) -> String {
        format!(
            "version: 1\nname: {name}\nroles: {{r: {{exec: [x]}}}}\ngraph: {{$START: r, r: {{ok: $END}}}}\n"
        )
    }

    #[test]
    fn the_first_directory_that_has_a_name_wins_and_empty_files_mask() {
        let root = tempfile::tempdir().unwrap();
        let (etc, lib) = (root.path().join("etc"), root.path().join("lib"));
        fs::create_dir(&etc).unwrap();
        fs::create_dir(&lib).unwrap();
        fs::write(etc.join("a.yaml"), "broken").unwrap();
        fs::write(etc.join("masked.yaml"), "").unwrap();
        symlink("/dev/null", etc.join("nulled.yaml")).unwrap();
        for name in ["a", "b", "masked", "nulled"] {
            fs::write(lib.join(format!("{name}.yaml")), definition(name)).unwrap();
        }
        for ignored in [".hidden.yaml", "b.yaml~", "README", "c.yml", ".yaml"] {
            fs::write(etc.join(ignored), "x").unwrap();
        }
        fs::write(etc.join("Bad_Name.yaml"), definition("x")).unwrap();
        let loaded = load(
            &[etc.clone(), root.path().join("none"), lib.clone()],
            Trust::Anyone,
        );
        let names: Vec<&str> = loaded
            .definitions
            .keys()
            .map(WorkflowName::as_str)
            .collect();
        assert_eq!(names, ["a", "b"]);
        let (a, b) = (
            &loaded.definitions[&"a".parse().unwrap()],
            &loaded.definitions[&"b".parse().unwrap()],
        );
        assert!(a.parsed.definition.is_none() && a.path == etc.join("a.yaml"));
        assert_eq!(
            b.parsed.definition.as_ref().unwrap().digest,
            super::super::definition::digest(&b.bytes)
        );
        assert_eq!(loaded.diagnostics.len(), 1);
        assert!(
            loaded.diagnostics[0]
                .to_string()
                .contains("Bad_Name.yaml:1:1: error: the file is no definition")
        );
    }

    #[test]
    fn what_cannot_be_read_is_told_and_blocks_nothing() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("dir.yaml")).unwrap();
        symlink("nowhere", at("dangling.yaml")).unwrap();
        symlink("loop.yaml", at("loop.yaml")).unwrap();
        symlink("/dev/zero", at("zero.yaml")).unwrap();
        let fifo = rustix::fs::CWD;
        rustix::fs::mknodat(
            fifo,
            at("fifo.yaml"),
            rustix::fs::FileType::Fifo,
            Mode::RUSR,
            0,
        )
        .unwrap();
        fs::write(at("big.yaml"), vec![b'#'; limits::DEFINITION_BYTES * 2]).unwrap();
        fs::write(at("good.yaml"), definition("good")).unwrap();
        let loaded = load(&[root.path().to_owned(), at("good.yaml")], Trust::Anyone);
        assert_eq!(loaded.definitions.len(), 7);
        for (name, file) in &loaded.definitions {
            assert_eq!(
                file.parsed.definition.is_some(),
                name.as_str() == "good",
                "{name}"
            );
            assert_eq!(
                file.parsed.diagnostics.is_empty(),
                name.as_str() == "good",
                "{name}"
            );
        }
        let big = &loaded.definitions[&"big".parse().unwrap()];
        assert!(big.bytes.len() == limits::DEFINITION_BYTES + 1);
        assert_eq!(
            loaded.diagnostics.len(),
            1,
            "a directory that is a file: {:?}",
            loaded.diagnostics
        );
    }

    #[test]
    fn a_file_below_a_directory_of_everybody_is_not_trusted() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("open");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(directory.join("a.yaml"), definition("a")).unwrap();
        let Found::Unusable(diagnostic) = read(&directory.join("a.yaml"), Trust::RootOwned) else {
            panic!("it was trusted");
        };
        assert!(
            diagnostic.message.starts_with("not trusted: /"),
            "{diagnostic}"
        );
        assert!(matches!(
            read(&directory.join("a.yaml"), Trust::Anyone),
            Found::Bytes(_)
        ));
    }

    /// A pretended machine: path, owner, mode, target of the link.
    fn judged(path: &str, places: &[(&str, u32, u32, Option<&str>)]) -> Result<(), String> {
        let mut machine: HashMap<PathBuf, Seen> = HashMap::new();
        for (index, (path, uid, mode, link)) in places.iter().enumerate() {
            let identity = (
                1,
                if path.ends_with("/a.yaml") && link.is_none() {
                    99
                } else {
                    index as u64
                },
            );
            let seen = Seen {
                uid: *uid,
                mode: *mode,
                identity,
                link: link.map(PathBuf::from),
            };
            machine.insert(PathBuf::from(path), seen);
        }
        let look = |path: &Path| {
            machine
                .get(path)
                .cloned()
                .ok_or_else(|| io::ErrorKind::NotFound.into())
        };
        walk(Path::new(path), (1, 99), false, &look)
            .map_err(|complaint| format!("{} ({})", complaint.message, complaint.help))
    }

    #[test]
    fn every_part_of_a_path_is_judged() {
        let root = ("/", 0, 0o755, None);
        let etc = ("/etc", 0, 0o755, None);
        let file = ("/etc/a.yaml", 0, 0o644, None);
        assert_eq!(judged("/etc/a.yaml", &[root, etc, file]), Ok(()));
        for (places, expected) in [
            (
                [root, etc, ("/etc/a.yaml", 1000, 0o644, None)],
                "/etc/a.yaml does not belong to root (run `chown root: /etc/a.yaml`)",
            ),
            (
                [root, etc, ("/etc/a.yaml", 0, 0o664, None)],
                "/etc/a.yaml can be written by its group (mode 0664) (run `chmod go-w /etc/a.yaml`)",
            ),
            (
                [root, ("/etc", 0, 0o1777, None), file],
                "/etc can be written by everybody (mode 1777)",
            ),
            (
                [("/", 7, 0o755, None), etc, file],
                "not trusted: / does not belong to root",
            ),
        ] {
            let error = judged("/etc/a.yaml", &places).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn links_are_followed_through_every_directory_on_the_way() {
        let root = ("/", 0, 0o755, None);
        let etc = ("/etc", 0, 0o755, None);
        let link = ("/etc/a.yaml", 0, 0o777, Some("../srv/b/../a.yaml"));
        let srv = ("/srv", 0, 0o755, None);
        let file = ("/srv/a.yaml", 0, 0o644, None);
        let sub = ("/srv/b", 0, 0o755, None);
        assert_eq!(
            judged("/etc/a.yaml", &[root, etc, link, srv, sub, file]),
            Ok(())
        );
        let open = ("/srv/b", 0, 0o777, None);
        assert!(
            judged("/etc/a.yaml", &[root, etc, link, srv, open, file])
                .unwrap_err()
                .contains("/srv/b can be written")
        );
        let stranger = ("/etc/a.yaml", 5, 0o777, Some("/srv/a.yaml"));
        assert!(
            judged("/etc/a.yaml", &[root, etc, stranger, srv, file])
                .unwrap_err()
                .contains("chown -h root: /etc/a.yaml")
        );
        let loop_ = ("/etc/a.yaml", 0, 0o777, Some("a.yaml"));
        assert!(
            judged("/etc/a.yaml", &[root, etc, loop_])
                .unwrap_err()
                .contains("too many symbolic links")
        );
        let other = ("/etc/b", 0, 0o644, None);
        assert!(
            judged("/etc/b", &[root, etc, other])
                .unwrap_err()
                .contains("replaced while it was being read")
        );
    }
}
