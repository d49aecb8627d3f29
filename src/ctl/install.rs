//! `nervectl install`: a workspace's definitions become the system's. Everything is read, checked and compared first; then
//! each file is replaced as a whole. What was put there is written down before it is put there, so that whatever happens
//! in between, the next installation knows what is its own and removes no other.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::{Display, Write as _};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, DirEntry, Mode, OFlags};
use rustix::io::Errno;

use super::cli::Install;
use super::input::unreadable;
use super::text::line;
use super::{BROKEN, Failure, Settings, control, difference, note, print, validate};
use crate::bus::error::CallError;
use crate::config::diagnostic::{Diagnostic, Severity};
use crate::config::{definition, settings};
use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::os::disk;

/// Shows what changes, and changes it.
pub(super) async fn install(settings: &Settings, arguments: &Install) -> Result<u8, Failure> {
    let root = settings.engine.file.parent().unwrap_or(Path::new("/"));
    let workspace = Workspace::read(&arguments.directory)?;
    if !workspace.is_right() {
        return Ok(BROKEN);
    }
    if !arguments.dry_run && !rustix::process::geteuid().is_root() {
        return Err(Failure::Forbidden(
            "only root may install; --dry-run shows what would change".to_owned(),
        ));
    }
    // Held to the end: two installations at a time would not know of each other.
    let _lock = (!arguments.dry_run).then(|| lock(root)).transpose()?;
    let plan = Plan::of(&workspace, root)?;
    print(&plan.shown(root))?;
    if !arguments.force && !plan.strangers.is_empty() {
        for stranger in &plan.strangers {
            note(&format!("nervectl: {stranger}"));
        }
        return Ok(BROKEN);
    }
    if arguments.dry_run {
        return Ok(0);
    }
    plan.perform(root)?;
    if plan.changes.is_empty() {
        return Ok(0);
    }
    match control::reload(settings).await {
        Err(Failure::Call(CallError::NoManager | CallError::NoBus(_))) => {
            note("nerve is not running; it takes what is installed when it starts");
            Ok(0)
        }
        done => done,
    }
}

/// What a workspace has to be installed, by where that goes below /etc/nerve.
struct Workspace {
    name: WorkflowName,
    files: Vec<(PathBuf, PathBuf, Vec<u8>)>,
}

impl Workspace {
    fn read(directory: &Path) -> Result<Self, Failure> {
        let path = fs::canonicalize(directory).map_err(|error| unreadable(directory, &error))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.parse().map_err(|error| {
            Failure::Input(format!(
                "the directory's name is the workspace's, and {error}; rename the directory"
            ))
        })?;
        // Whoever may write there may put another in the place of what has been looked at: each is opened once.
        let workspace = open_directory(CWD, &path).map_err(|error| unreadable(&path, &error))?;
        let mut files = Vec::new();
        let own = path.join("nerve.yaml");
        if let Some(bytes) = read(&workspace, &own).map_err(|error| unreadable(&own, &error))? {
            let target = Path::new("nerve.yaml.d").join(format!("50-{name}.yaml"));
            files.push((target, own, bytes));
        }
        let folder = path.join("workflows");
        let unlisted = |error: io::Error| unreadable(&folder, &error);
        let workflows = open_directory(&workspace, Path::new("workflows")).map_err(unlisted)?;
        for name in names(&workflows).map_err(unlisted)? {
            let shown = name.to_string_lossy();
            if !shown.ends_with(".yaml") || shown.starts_with('.') {
                continue;
            }
            let source = folder.join(&name);
            let read = read(&workflows, &source).map_err(|error| unreadable(&source, &error))?;
            files.extend(read.map(|bytes| (Path::new("workflows").join(&name), source, bytes)));
        }
        Ok(Self { name, files })
    }

    /// Whether all of it can be used; says what is wrong with any of it.
    fn is_right(&self) -> bool {
        let faults = |(target, source, bytes): &(PathBuf, PathBuf, Vec<u8>)| {
            let shown = source.display().to_string();
            let stem = source.file_stem().unwrap_or_default().to_string_lossy();
            if !target.starts_with("workflows") {
                settings::parse(&shown, bytes).1
            } else if bytes.is_empty() {
                // It hides another one of its name.
                let fault = stem.parse::<WorkflowName>().err();
                fault
                    .map(|fault| misnamed(&shown, &fault))
                    .into_iter()
                    .collect()
            } else {
                definition::parse(&shown, Some(&stem), bytes).diagnostics
            }
        };
        let files = self.files.iter();
        validate::tell(files.map(|file| (faults(file), file.2.as_slice())))
    }
}

/// An empty file whose name is that of no workflow.
fn misnamed(path: &str, fault: &impl Display) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        path: path.to_owned(),
        line: 1,
        column: 1,
        end_column: 1,
        message: format!("the file is named after no workflow: {fault}"),
        help: Some("rename or remove the file".to_owned()),
        count: 1,
    }
}

/// A directory, not one that a link leads to.
fn open_directory(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty()).map_err(|error| match error {
        Errno::LOOP | Errno::NOTDIR => {
            io::Error::other("it is a symbolic link or a file; replace it by a directory")
        }
        error => error.into(),
    })
}

/// What a directory has, in order.
fn names(directory: &OwnedFd) -> io::Result<BTreeSet<OsString>> {
    let entries = Dir::read_from(directory)?;
    let name = |entry: rustix::io::Result<DirEntry>| {
        Ok(OsString::from_vec(entry?.file_name().to_bytes().to_vec()))
    };
    entries.map(name).collect()
}

/// A regular file of a directory, by its name alone; not one that a link leads to: root is not to be made to read what is
/// somebody else's. None when there is no such file.
fn read(directory: &OwnedFd, path: &Path) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let name = path.file_name().unwrap_or_default();
    let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(Errno::LOOP) => {
            let error = "it is a symbolic link; replace it by the file";
            return Err(io::Error::other(error));
        }
        Err(error) => return Err(error.into()),
    };
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    // One byte more than is allowed is told by who reads it as a definition.
    file.take(limits::DEFINITION_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// A file below /etc/nerve that is to have other content, or is to go.
struct Change {
    target: PathBuf,
    old: Option<Vec<u8>>,
    new: Option<Vec<u8>>,
}

/// What an installation does.
struct Plan {
    changes: Vec<Change>,
    /// Where it is written down which files are the workspace's.
    manifest: PathBuf,
    /// What is the workspace's before, and after.
    owned: BTreeSet<PathBuf>,
    wanted: BTreeSet<PathBuf>,
    /// What stays of the manifests of other workspaces whose files become this one's.
    others: Vec<(PathBuf, BTreeSet<PathBuf>)>,
    /// Why files that are to change are not the workspace's.
    strangers: Vec<String>,
}

impl Plan {
    fn of(workspace: &Workspace, root: &Path) -> Result<Self, Failure> {
        let manifest = manifests(root).join(workspace.name.as_str());
        let owned = owned_by(&manifest)?;
        let wanted: BTreeSet<PathBuf> = workspace
            .files
            .iter()
            .map(|(target, ..)| target.clone())
            .collect();
        let gone = owned.difference(&wanted).map(|target| (target, None));
        let there = workspace
            .files
            .iter()
            .map(|(target, _, bytes)| (target, Some(bytes)));
        let (mut changes, mut strangers) = (Vec::new(), Vec::new());
        for (target, new) in there.chain(gone) {
            let path = root.join(target);
            let old = installed(&path).map_err(|error| unreadable(&path, &error))?;
            if old.as_ref() == new {
                continue;
            }
            if old.is_some() && !owned.contains(target) {
                strangers.push(format!(
                    "{} is there already, and not from the workspace {}; remove it, or --force replaces it",
                    line(&path.display().to_string()),
                    workspace.name
                ));
            }
            changes.push(Change {
                target: target.clone(),
                old,
                new: new.cloned(),
            });
        }
        Ok(Self {
            others: robbed(root, &manifest, &wanted)?,
            changes,
            manifest,
            owned,
            wanted,
            strangers,
        })
    }

    /// The difference, file by file.
    fn shown(&self, root: &Path) -> String {
        if self.changes.is_empty() {
            return "Nothing changes.\n".to_owned();
        }
        let show = |change: &Change| {
            let path = root.join(&change.target).display().to_string();
            let name = |bytes: &Option<Vec<u8>>| match bytes {
                Some(_) => path.clone(),
                None => "/dev/null".to_owned(),
            };
            let text = |bytes: &Option<Vec<u8>>| {
                String::from_utf8_lossy(bytes.as_deref().unwrap_or_default()).into_owned()
            };
            let (old, new) = (&change.old, &change.new);
            difference::unified(&name(old), &name(new), &text(old), &text(new))
        };
        self.changes.iter().map(show).collect()
    }

    fn perform(&self, root: &Path) -> Result<(), Failure> {
        if !self.wanted.is_subset(&self.owned) {
            write_manifest(&self.manifest, self.owned.union(&self.wanted))?;
        }
        for (manifest, rest) in &self.others {
            write_manifest(manifest, rest)?;
        }
        for change in &self.changes {
            let path = root.join(&change.target);
            let done = match &change.new {
                Some(bytes) => path
                    .parent()
                    .map_or(Ok(()), make_directory)
                    .and_then(|()| disk::replace(&path, bytes)),
                None => disk::remove(&path),
            };
            done.map_err(|error| unwritable(&path, &error))?;
        }
        if self.wanted.is_superset(&self.owned) {
            return Ok(());
        }
        write_manifest(&self.manifest, &self.wanted)
    }
}

/// What is there of a file; of a link that leads nowhere, where that is.
fn installed(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let nothing_is_none = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(None),
        _ => Err(error),
    };
    if let Some(bytes) = fs::read(path).map(Some).or_else(nothing_is_none)? {
        return Ok(Some(bytes));
    }
    let link = fs::read_link(path).map(|to| Some(to.into_os_string().into_vec()));
    link.or_else(nothing_is_none)
}

/// Where it is written down which files are whose: a file for each workspace, a path on each line.
fn manifests(root: &Path) -> PathBuf {
    root.join("workspaces")
}

/// The other manifests that have any of these files, and what they have besides.
fn robbed(
    root: &Path,
    manifest: &Path,
    files: &BTreeSet<PathBuf>,
) -> Result<Vec<(PathBuf, BTreeSet<PathBuf>)>, Failure> {
    let folder = manifests(root);
    let listed = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.and_then(|entries| {
            let paths = entries.map(|entry| Ok(entry?.path()));
            paths.collect::<io::Result<Vec<_>>>()
        }),
    };
    let mut robbed = Vec::new();
    for other in listed.map_err(|error| unreadable(&folder, &error))? {
        let owned = owned_by(&other)?;
        if other != manifest && !owned.is_disjoint(files) {
            robbed.push((other, &owned - files));
        }
    }
    Ok(robbed)
}

fn write_manifest<'a>(
    path: &Path,
    files: impl IntoIterator<Item = &'a PathBuf>,
) -> Result<(), Failure> {
    let mut text = String::new();
    for file in files {
        let _ = writeln!(text, "{}", file.display());
    }
    disk::replace(path, text.as_bytes()).map_err(|error| unwritable(path, &error))
}

/// The files of a workspace that was installed before. Only root writes there; still, nothing outside is ever removed.
fn owned_by(manifest: &Path) -> Result<BTreeSet<PathBuf>, Failure> {
    let text = match fs::read_to_string(manifest) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(|error| unreadable(manifest, &error))?,
    };
    let is_ours = |path: &PathBuf| {
        let folder = path.parent().and_then(Path::to_str);
        matches!(folder, Some("workflows" | "nerve.yaml.d"))
    };
    Ok(text.lines().map(PathBuf::from).filter(is_ours).collect())
}

/// Keeps other installations waiting for as long as it lives.
fn lock(root: &Path) -> Result<File, Failure> {
    let path = manifests(root);
    let lock = || {
        make_directory(&path)?;
        let directory = File::open(&path)?;
        directory.lock()?;
        Ok(directory)
    };
    lock().map_err(|error| unwritable(&path, &error))
}

/// Whoever may read the files has to get there, whatever the umask is.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    path.parent().map_or(Ok(()), make_directory)?;
    fs::DirBuilder::new().mode(0o755).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    let path = path.display().to_string();
    Failure::Internal(format!(
        "cannot write {}: {error}; what was written before it is whole, and installing again completes it",
        line(&path)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn definition(name: &str) -> String {
        format!(
            "version: 1\nname: {name}\nroles:\n  a:\n    exec: [cat]\ngraph:\n  $START: a\n  a: {{ ok: $END }}\n"
        )
    }

    /// A workspace, and a place where it is installed.
    struct Place {
        directory: tempfile::TempDir,
    }

    impl Place {
        fn new(names: &[&str]) -> Self {
            let place = Self {
                directory: tempfile::tempdir().unwrap(),
            };
            fs::create_dir_all(place.workspace().join("workflows")).unwrap();
            fs::create_dir_all(place.root().join("workspaces")).unwrap();
            for name in names {
                place.write(&format!("workflows/{name}.yaml"), &definition(name));
            }
            place
        }

        fn workspace(&self) -> PathBuf {
            self.directory.path().join("work")
        }

        fn root(&self) -> PathBuf {
            self.directory.path().join("etc/nerve")
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.workspace().join(name), text).unwrap();
        }

        fn plan(&self) -> Plan {
            self.plan_of("work")
        }

        fn plan_of(&self, name: &str) -> Plan {
            let workspace = Workspace::read(&self.directory.path().join(name)).unwrap();
            assert!(workspace.is_right());
            Plan::of(&workspace, &self.root()).unwrap()
        }

        fn installed(&self) -> Vec<String> {
            let listed = |folder: &str| -> Vec<String> {
                let entries = fs::read_dir(self.root().join(folder)).into_iter().flatten();
                entries
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect()
            };
            let mut names: Vec<String> = [listed("workflows"), listed("nerve.yaml.d")].concat();
            names.sort();
            names
        }
    }

    #[test]
    fn what_a_workspace_has_is_installed_and_what_it_has_no_more_is_removed() {
        let place = Place::new(&["do-this", "do-that"]);
        place.write("nerve.yaml", "max_active: 3\n");
        place.plan().perform(&place.root()).unwrap();
        assert_eq!(
            place.installed(),
            ["50-work.yaml", "do-that.yaml", "do-this.yaml"]
        );
        assert_eq!(place.plan().shown(&place.root()), "Nothing changes.\n");
        fs::write(place.root().join("workflows/by-hand.yaml"), "x").unwrap();
        fs::remove_file(place.workspace().join("workflows/do-that.yaml")).unwrap();
        place.write(
            "workflows/do-this.yaml",
            &definition("do-this").replace("cat", "tac"),
        );
        let plan = place.plan();
        let shown = plan.shown(&place.root());
        for line in ["+++ /dev/null", "-    exec: [cat]", "+    exec: [tac]"] {
            assert!(shown.contains(line), "{shown}");
        }
        plan.perform(&place.root()).unwrap();
        assert_eq!(
            place.installed(),
            ["50-work.yaml", "by-hand.yaml", "do-this.yaml"]
        );
    }

    #[test]
    fn an_installation_that_was_cut_off_is_completed_by_the_next() {
        let place = Place::new(&["do-this", "do-that"]);
        let plan = place.plan();
        // As far as the first file.
        write_manifest(&plan.manifest, &plan.wanted).unwrap();
        make_directory(&place.root().join("workflows")).unwrap();
        let first = &plan.changes[0];
        disk::replace(
            &place.root().join(&first.target),
            first.new.as_ref().unwrap(),
        )
        .unwrap();
        fs::remove_file(place.workspace().join("workflows/do-that.yaml")).unwrap();
        let next = place.plan();
        assert_eq!(next.strangers, [""; 0]);
        next.perform(&place.root()).unwrap();
        assert_eq!(place.installed(), ["do-this.yaml"]);
    }

    #[test]
    fn what_somebody_else_put_there_is_not_replaced_unasked() {
        let place = Place::new(&["do-this"]);
        make_directory(&place.root().join("workflows")).unwrap();
        let path = place.root().join("workflows/do-this.yaml");
        fs::write(&path, "by hand").unwrap();
        let strangers = place.plan().strangers;
        assert!(
            strangers[0].contains("--force replaces it"),
            "{strangers:?}"
        );
        fs::remove_file(&path).unwrap();
        symlink("/nowhere", &path).unwrap();
        let plan = place.plan();
        assert_eq!(plan.strangers.len(), 1);
        assert!(plan.shown(&place.root()).contains("-/nowhere\n"));
        fs::remove_file(&path).unwrap();
        // The same is no matter.
        fs::write(&path, definition("do-this")).unwrap();
        assert_eq!(place.plan().strangers, [""; 0]);
    }

    #[test]
    fn what_is_gone_without_an_installation_is_the_workspaces_no_more() {
        let place = Place::new(&["do-this", "do-that"]);
        place.plan().perform(&place.root()).unwrap();
        let installed = place.root().join("workflows/do-that.yaml");
        fs::remove_file(&installed).unwrap();
        fs::remove_file(place.workspace().join("workflows/do-that.yaml")).unwrap();
        let plan = place.plan();
        assert_eq!(plan.shown(&place.root()), "Nothing changes.\n");
        plan.perform(&place.root()).unwrap();
        fs::write(&installed, "by hand").unwrap();
        place.plan().perform(&place.root()).unwrap();
        assert_eq!(fs::read(&installed).unwrap(), b"by hand");
    }

    #[test]
    fn what_another_workspace_takes_over_is_its_own() {
        let place = Place::new(&["do-this", "do-that"]);
        place.plan().perform(&place.root()).unwrap();
        let (file, other) = (
            "workflows/do-this.yaml",
            place.directory.path().join("other"),
        );
        fs::create_dir_all(other.join("workflows")).unwrap();
        let text = definition("do-this").replace("cat", "tac");
        fs::write(other.join(file), &text).unwrap();
        let plan = place.plan_of("other");
        assert_eq!(plan.strangers.len(), 1);
        plan.perform(&place.root()).unwrap();
        assert_eq!(place.plan().strangers.len(), 1);
        fs::remove_file(place.workspace().join(file)).unwrap();
        place.plan().perform(&place.root()).unwrap();
        assert_eq!(place.installed(), ["do-that.yaml", "do-this.yaml"]);
        assert_eq!(fs::read_to_string(place.root().join(file)).unwrap(), text);
    }

    #[test]
    fn a_manifest_leads_nowhere_else() {
        let place = Place::new(&["do-this"]);
        let lines =
            "../passwd\nworkflows/../../passwd\n/etc/passwd\nworkspaces/x\nworkflows/own.yaml\n";
        let manifest = place.root().join("workspaces/work");
        fs::write(&manifest, lines).unwrap();
        let owned = owned_by(&manifest).unwrap();
        assert_eq!(owned, [PathBuf::from("workflows/own.yaml")].into());
    }

    #[test]
    fn links_broken_definitions_and_odd_names_are_refused() {
        let place = Place::new(&["do-this"]);
        let text = |failure: Option<Failure>| failure.unwrap().to_string();
        let link = place.workspace().join("workflows/linked.yaml");
        symlink("/etc/hostname", &link).unwrap();
        let said = text(Workspace::read(&place.workspace()).err());
        assert!(
            said.contains("linked.yaml: it is a symbolic link"),
            "{said}"
        );
        fs::remove_file(link).unwrap();
        place.write("workflows/other.yaml", "version: 1\nname: another\n");
        assert!(!Workspace::read(&place.workspace()).unwrap().is_right());
        place.write("workflows/other.yaml", "");
        assert!(Workspace::read(&place.workspace()).unwrap().is_right());
        place.write("workflows/Odd Name.yaml", "");
        assert!(!Workspace::read(&place.workspace()).unwrap().is_right());
        let folder = place.workspace().join("workflows");
        fs::rename(&folder, place.workspace().join("elsewhere")).unwrap();
        symlink("elsewhere", folder).unwrap();
        let said = text(Workspace::read(&place.workspace()).err());
        assert!(said.contains("workflows: it is a symbolic link"), "{said}");
        let odd = place.directory.path().join("Odd Name");
        fs::create_dir(&odd).unwrap();
        let said = text(Workspace::read(&odd).err());
        assert!(said.contains("rename the directory"), "{said}");
    }
}
