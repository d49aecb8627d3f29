//! Tells when something in a set of directories may have changed, inotify(7). Whoever is told looks for itself, and
//! watches anew: what was watched may have been replaced.
//!
//! The way to each directory is watched too, but for what concerns it alone: that a directory comes, goes, is replaced
//! or changes its mode is noticed, and what else happens in `/etc` wakes nobody for long.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What can happen to a watched directory itself, and, by its mode, to the trust in it.
const ITSELF: WatchFlags = WatchFlags::ONLYDIR
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB);
/// What can happen to an entry. A file that is being written says nothing until it is closed.
const ENTRIES: WatchFlags = WatchFlags::ONLYDIR
    .union(WatchFlags::CREATE)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::ATTRIB);
/// One read; an event with the longest name takes 272 bytes.
const BUFFER_BYTES: usize = 4_096;

/// Directories that are watched.
#[derive(Debug)]
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
    /// Each watched directory.
    concerns: HashMap<i32, (PathBuf, Concern)>,
}

/// Which entries of a watched directory matter. What happens to itself always does.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Concern {
    All,
    Only(BTreeSet<OsString>),
}

/// Whether there is a directory to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    Missing,
}

/// What one read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    Change,
    Unconcerning,
    Nothing,
}

impl Watch {
    /// Watches these directories. Of one that does not exist the nearest that does is watched for its coming.
    ///
    /// # Errors
    /// As inotify_init(2) and inotify_add_watch(2): the system's limits of watches are reached.
    pub fn new<'p>(directories: impl IntoIterator<Item = &'p Path>) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        // SAFETY: an `OwnedFd` keeps its descriptor open until it is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) }?;
        let mut watch = Self {
            inotify,
            concerns: HashMap::new(),
        };
        for directory in directories {
            watch.follow(&std::path::absolute(directory)?)?;
        }
        Ok(watch)
    }

    /// Returns when something was created, written and closed, moved or deleted, or its attributes changed, or when
    /// that cannot be ruled out. May be dropped at any time.
    ///
    /// # Errors
    /// As read(2): nothing more will be heard.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match self.read()? {
                Read::Change => return Ok(()),
                Read::Unconcerning => {}
                Read::Nothing => ready.clear_ready(),
            }
        }
    }

    /// Watches the way to a directory, as far as there is one, and at its end the directory.
    fn follow(&mut self, directory: &Path) -> io::Result<()> {
        let mut at = PathBuf::new();
        for part in directory.components() {
            let (above, name) = (at.clone(), part.as_os_str());
            at.push(name);
            let mut place = self.add(&at, Concern::nothing())?;
            let is_link = fs::symlink_metadata(&at).is_ok_and(|found| found.is_symlink());
            if place == Place::Missing || is_link {
                self.add(&above, Concern::Only(BTreeSet::from([name.to_owned()])))?;
                // Listen first, then look again: it may have come in between.
                place = self.add(&at, Concern::nothing())?;
            }
            if place == Place::Missing {
                return Ok(());
            }
        }
        // Should it be gone by now, that is an event already.
        self.add(&at, Concern::All).map(drop)
    }

    fn add(&mut self, directory: &Path, concern: Concern) -> io::Result<Place> {
        let flags = match &concern {
            Concern::Only(names) if names.is_empty() => ITSELF,
            Concern::Only(_) | Concern::All => ITSELF | ENTRIES,
        };
        match inotify::add_watch(&self.inotify, directory, flags | WatchFlags::MASK_ADD) {
            Ok(id) => {
                let known = self.concerns.remove(&id);
                let known = known.map_or(Concern::nothing(), |(_, known)| known);
                self.concerns
                    .insert(id, (directory.to_owned(), known.and(concern)));
                Ok(Place::Here)
            }
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ACCESS) => Ok(Place::Missing),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what is there, at most one buffer of it.
    fn read(&self) -> io::Result<Read> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut events = Reader::new(&self.inotify, &mut buffer);
        let mut read = Read::Unconcerning;
        loop {
            match events.next() {
                Ok(event) if self.concerns(&event) => read = Read::Change,
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(Read::Nothing),
                Err(Errno::INTR) => return Ok(read),
                Err(error) => return Err(error.into()),
            }
            if events.is_buffer_empty() {
                return Ok(read);
            }
        }
    }

    fn concerns(&self, event: &Event<'_>) -> bool {
        // Without a name it is about the watched directory itself, or about events that were lost.
        let Some(name) = event.file_name() else {
            return true;
        };
        let name = OsStr::from_bytes(name.to_bytes());
        let Some((directory, concern)) = self.concerns.get(&event.wd()) else {
            return false;
        };
        let matters = match concern {
            Concern::All => true,
            Concern::Only(names) => names.contains(name),
        };
        // A file that was opened to be written is there and empty: it is heard of again when it is closed.
        let is_new = event.events().contains(ReadFlags::CREATE);
        matters && !(is_new && is_being_written(&directory.join(name)))
    }
}

/// Whether this is a file that came by being written, and not by another name for one that there was.
fn is_being_written(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.nlink() == 1)
}

impl Concern {
    fn nothing() -> Self {
        Self::Only(BTreeSet::new())
    }

    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Only(mut names), Self::Only(more)) => {
                names.extend(more);
                Self::Only(names)
            }
            (Self::All, _) | (_, Self::All) => Self::All,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// What it does, and doing it.
    type Step<'a> = (&'static str, Box<dyn Fn() + 'a>);

    impl Watch {
        /// Whether there was a change so far. The kernel has queued its event when the call that made it returns.
        fn has_changed(&self) -> bool {
            let mut changed = false;
            loop {
                match self.read().unwrap() {
                    Read::Change => changed = true,
                    Read::Unconcerning => {}
                    Read::Nothing => return changed,
                }
            }
        }
    }

    fn watch(paths: &[&Path]) -> Watch {
        let watch = Watch::new(paths.iter().copied()).unwrap();
        assert!(!watch.has_changed());
        watch
    }

    #[tokio::test]
    async fn whatever_happens_to_a_file_of_the_directory_is_a_change() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let other = tempfile::tempdir().unwrap();
        let watch = watch(&[root.path()]);
        let steps: Vec<Step<'_>> = vec![
            ("created", Box::new(|| fs::write(at("a"), "1").unwrap())),
            ("written", Box::new(|| fs::write(at("a"), "2").unwrap())),
            (
                "chmod",
                Box::new(|| {
                    fs::set_permissions(at("a"), fs::Permissions::from_mode(0o600)).unwrap();
                }),
            ),
            (
                "renamed",
                Box::new(|| fs::rename(at("a"), at("b")).unwrap()),
            ),
            (
                "moved out",
                Box::new(|| fs::rename(at("b"), other.path().join("b")).unwrap()),
            ),
            (
                "moved in",
                Box::new(|| fs::rename(other.path().join("b"), at("c")).unwrap()),
            ),
            ("deleted", Box::new(|| fs::remove_file(at("c")).unwrap())),
            ("linked", Box::new(|| symlink("x", at("l")).unwrap())),
        ];
        for (what, step) in steps {
            step();
            assert!(watch.has_changed(), "{what}");
            assert!(!watch.has_changed(), "{what}");
        }
    }

    #[tokio::test]
    async fn reading_is_no_change() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("a"), "1").unwrap();
        let watch = watch(&[root.path()]);
        fs::read_dir(root.path()).unwrap().for_each(drop);
        fs::read(root.path().join("a")).unwrap();
        assert!(!watch.has_changed());
    }

    #[tokio::test]
    async fn a_file_that_is_being_written_is_a_change_when_it_is_closed() {
        use std::io::Write as _;
        let root = tempfile::tempdir().unwrap();
        let watch = watch(&[root.path()]);
        let mut file = fs::File::create(root.path().join("a")).unwrap();
        assert!(!watch.has_changed());
        file.write_all(b"half").unwrap();
        assert!(!watch.has_changed());
        drop(file);
        assert!(watch.has_changed());
    }

    #[tokio::test]
    async fn the_coming_of_a_directory_is_noticed_step_by_step() {
        let root = tempfile::tempdir().unwrap();
        let wanted = root.path().join("nerve/workflows");
        let first = watch(&[&wanted]);
        fs::write(root.path().join("other"), "").unwrap();
        assert!(!first.has_changed(), "that concerns nobody");
        fs::create_dir(root.path().join("nerve")).unwrap();
        assert!(first.has_changed());
        let second = watch(&[&wanted]);
        fs::write(root.path().join("nerve/other"), "").unwrap();
        assert!(!second.has_changed());
        fs::create_dir(&wanted).unwrap();
        assert!(second.has_changed());
        let third = watch(&[&wanted]);
        fs::write(wanted.join("a"), "").unwrap();
        assert!(third.has_changed());
    }

    #[tokio::test]
    async fn a_directory_that_goes_or_is_replaced_is_a_change() {
        let root = tempfile::tempdir().unwrap();
        let (above, wanted) = (root.path().join("a"), root.path().join("a/b"));
        fs::create_dir_all(&wanted).unwrap();
        let removed = watch(&[&wanted]);
        fs::remove_dir(&wanted).unwrap();
        assert!(removed.has_changed());
        fs::create_dir(&wanted).unwrap();
        let moved = watch(&[&wanted]);
        fs::rename(&wanted, root.path().join("a/c")).unwrap();
        assert!(moved.has_changed());
        fs::create_dir(&wanted).unwrap();
        let way_moved = watch(&[&wanted]);
        fs::rename(&above, root.path().join("d")).unwrap();
        assert!(way_moved.has_changed());
        fs::create_dir_all(&wanted).unwrap();
        let way_closed = watch(&[&wanted]);
        fs::set_permissions(&above, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(way_closed.has_changed());
    }

    #[tokio::test]
    async fn a_file_in_the_way_and_a_link_are_watched_where_they_are() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::write(at("file"), "").unwrap();
        let in_the_way = watch(&[&at("file")]);
        fs::remove_file(at("file")).unwrap();
        assert!(in_the_way.has_changed());
        fs::create_dir(at("one")).unwrap();
        fs::create_dir(at("two")).unwrap();
        symlink("one", at("link")).unwrap();
        let linked = watch(&[&at("link")]);
        fs::write(at("one/a"), "").unwrap();
        assert!(linked.has_changed());
        symlink("two", at("new")).unwrap();
        assert!(!linked.has_changed());
        fs::rename(at("new"), at("link")).unwrap();
        assert!(linked.has_changed());
    }

    #[tokio::test]
    async fn one_directory_can_be_wanted_and_on_the_way_to_another() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("missing");
        for paths in [[root.path(), &missing], [&missing, root.path()]] {
            let watch = watch(&paths);
            fs::write(root.path().join("a"), "").unwrap();
            assert!(watch.has_changed());
        }
    }

    #[tokio::test]
    async fn events_that_were_lost_are_a_change() {
        let root = tempfile::tempdir().unwrap();
        let files = ["a", "b"].map(|name| root.path().join(name));
        for file in &files {
            fs::write(file, "").unwrap();
        }
        let watch = watch(&[&root.path().join("missing")]);
        let most = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        // None concerns us. By turns, since what comes twice in a row is told once.
        for file in files
            .iter()
            .cycle()
            .take(most.trim().parse::<usize>().unwrap() + 1)
        {
            drop(fs::File::options().append(true).open(file).unwrap());
        }
        assert!(watch.has_changed());
    }

    #[tokio::test]
    async fn a_change_wakes_who_waits() {
        let root = tempfile::tempdir().unwrap();
        let mut watch = watch(&[root.path()]);
        let write = async { fs::write(root.path().join("a"), "1").unwrap() };
        let (changed, ()) = tokio::join!(watch.changed(), write);
        changed.unwrap();
    }
}
