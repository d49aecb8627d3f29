//! Control groups (cgroups(7), version 2). A [`Cgroup`] is a name, not a handle: it may be gone at any time, and a
//! cgroup that is gone is empty.

use std::fs;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

const ROOT: &str = "/sys/fs/cgroup";

/// A control group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// The cgroup that `/proc/PID/cgroup` calls `path`: `/nerve.slice/…`.
    #[must_use]
    pub fn at(path: &str) -> Self {
        Self(Path::new(ROOT).join(path.trim_start_matches('/')))
    }

    /// A cgroup below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    /// Makes it anew.
    ///
    /// # Errors
    /// As mkdir(2); as rmdir(2) when there is one and it is not empty.
    pub fn create_anew(&self) -> io::Result<()> {
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.remove()?;
                fs::create_dir(&self.0)
            }
            result => result,
        }
    }

    /// Makes it, if it is not there.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn create(&self) -> io::Result<()> {
        match fs::create_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    /// A descriptor to start a process into it.
    ///
    /// # Errors
    /// As open(2).
    pub fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(&self.0, flags, Mode::empty())?)
    }

    /// Moves a process in.
    ///
    /// # Errors
    /// As write(2) of `cgroup.procs`.
    pub fn adopt(&self, pid: u32) -> io::Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string())
    }

    /// Lets the cgroups below have these controllers, as far as this one has them.
    pub fn delegate(&self, controllers: &[&str]) {
        for controller in controllers {
            // A controller that is not there limits nothing and counts nothing; all else works without it.
            let _ = fs::write(
                self.0.join("cgroup.subtree_control"),
                format!("+{controller}"),
            );
        }
    }

    /// Bounds what may be made below it. Only the owner of this cgroup can undo that, not those it is delegated to.
    ///
    /// # Errors
    /// As write(2).
    pub fn bound(&self, descendants: u32, depth: u32) -> io::Result<()> {
        fs::write(
            self.0.join("cgroup.max.descendants"),
            descendants.to_string(),
        )?;
        fs::write(self.0.join("cgroup.max.depth"), depth.to_string())
    }

    /// Kills every process in it and below, those that are being forked included.
    ///
    /// # Errors
    /// As write(2) of `cgroup.kill`.
    pub fn kill(&self) -> io::Result<()> {
        gone_is(fs::write(self.0.join("cgroup.kill"), "1"), ())
    }

    /// Sends a signal to every process that is now in it or below.
    pub fn signal(&self, signal: Signal) {
        for pid in self.processes() {
            // It may be gone by now, or belong to somebody we may not signal; `kill` is what counts.
            let _ = kill_process(pid, signal);
        }
    }

    /// The processes in it and below.
    #[must_use]
    pub fn processes(&self) -> Vec<Pid> {
        let text = fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        let mut pids: Vec<_> = text
            .lines()
            .filter_map(|line| Pid::from_raw(line.parse().ok()?))
            .collect();
        pids.extend(self.children().iter().flat_map(Self::processes));
        pids
    }

    fn children(&self) -> Vec<Self> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders.map(|entry| Self(entry.path())).collect()
    }

    /// Whether no process is in it or below; one that is gone is empty.
    ///
    /// # Errors
    /// As read(2) of `cgroup.events`.
    pub fn is_empty(&self) -> io::Result<bool> {
        let events = gone_is(
            fs::read_to_string(self.0.join("cgroup.events")),
            String::new(),
        )?;
        Ok(!is_populated(&events))
    }

    /// Waits until no process is in it or below.
    ///
    /// # Errors
    /// As open(2) and read(2) of `cgroup.events`.
    pub async fn emptied(&self) -> io::Result<()> {
        let Some(file) = gone_is(fs::File::open(self.0.join("cgroup.events")).map(Some), None)?
        else {
            return Ok(());
        };
        // SAFETY: a `File` owns its descriptor and keeps it open until it is dropped.
        let events =
            unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY | Interest::ERROR) }?;
        loop {
            let mut text = String::new();
            let mut file = events.get_ref();
            gone_is(file.rewind(), ())?;
            gone_is(file.read_to_string(&mut text), 0)?;
            if !is_populated(&text) {
                return Ok(());
            }
            events
                .ready(Interest::PRIORITY | Interest::ERROR)
                .await?
                .clear_ready();
        }
    }

    /// How many of its processes were killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.events")).unwrap_or_default();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    /// Removes it and those below, if they are empty.
    ///
    /// # Errors
    /// As rmdir(2).
    pub fn remove(&self) -> io::Result<()> {
        match gone_is(fs::remove_dir(&self.0), ()) {
            Err(_) => {
                for child in self.children() {
                    child.remove()?;
                }
                gone_is(fs::remove_dir(&self.0), ())
            }
            done => done,
        }
    }
}

/// The cgroup of a process, as `/proc/PID/cgroup` has it: `/nerve.slice/…`.
///
/// # Errors
/// When the process is gone, or the host has no unified hierarchy.
pub fn of_process(pid: u32) -> io::Result<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let unified = text.lines().find_map(|line| line.strip_prefix("0::"));
    unified.map(ToOwned::to_owned).ok_or_else(|| {
        io::Error::other("no cgroup v2 hierarchy: boot with systemd.unified_cgroup_hierarchy=1")
    })
}

fn is_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// A cgroup that was removed answers ENOENT, or ENODEV to who holds it open.
fn gone_is<T>(result: io::Result<T>, value: T) -> io::Result<T> {
    match result {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(libc::ENODEV) =>
        {
            Ok(value)
        }
        result => result,
    }
}
