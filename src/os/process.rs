//! Starting a process right into a cgroup, and waiting for its end by pidfd.
//!
//! clone3(2) with CLONE_INTO_CGROUP: the child is born in its cgroup. Moving it afterwards would leave a moment in
//! which its own children escape, and costs milliseconds on a busy machine.

use std::ffi::{CString, OsStr};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr;

use rustix::process::{WaitId, WaitIdOptions, waitid};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::model::exit::Exit;

/// `libc` has these as 32-bit numbers, which they are not.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What to execute.
#[derive(Debug)]
pub struct Command<'a> {
    /// Program and arguments; the program is looked up in `PATH` of `environment` when it has no slash.
    pub argv: &'a [String],
    /// All of its environment.
    pub environment: &'a [(String, String)],
    /// Its working directory.
    pub directory: &'a Path,
    /// The cgroup it is born in.
    pub cgroup: BorrowedFd<'a>,
    /// Its stdin, stdout and stderr.
    pub stdio: [BorrowedFd<'a>; 3],
}

/// A process that was started and is not reaped yet.
#[derive(Debug)]
pub struct Child {
    pidfd: AsyncFd<OwnedFd>,
}

impl Command<'_> {
    /// Starts it, as the leader of a session of its own.
    ///
    /// # Errors
    /// When there is no such program or directory, or no process to be had. Then nothing is running.
    pub fn start(&self) -> io::Result<Child> {
        let program = self.program()?;
        let argv = c_strings(self.argv.iter().map(|word| word.as_bytes().to_vec()))?;
        let environment = self
            .environment
            .iter()
            .map(|(name, value)| format!("{name}={value}").into_bytes());
        let environment = c_strings(environment)?;
        let directory = c_string(self.directory.as_os_str().as_bytes().to_vec())?;
        let (argv, environment) = (pointers(&argv), pointers(&environment));
        let (report, reporter) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;

        let mut pidfd: libc::c_int = -1;
        // SAFETY: all-zero is a valid clone_args.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        // CLEAR_SIGHAND: a signal that comes before exec must not run our handlers. VFORK: nothing is gained by going
        // on before exec, whose outcome is waited for.
        arguments.flags = (libc::CLONE_PIDFD | libc::CLONE_VFORK) as u64
            | CLONE_INTO_CGROUP
            | CLONE_CLEAR_SIGHAND;
        arguments.pidfd = (&raw mut pidfd) as u64;
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.cgroup = u64::try_from(self.cgroup.as_raw_fd()).unwrap_or_default();
        // SAFETY: without CLONE_VM this is a fork; the child below makes system calls on memory made before, and
        // nothing else.
        let pid = unsafe {
            libc::syscall(
                libc::SYS_clone3,
                &raw mut arguments,
                size_of_val(&arguments),
            )
        };
        match pid {
            -1 => return Err(io::Error::last_os_error()),
            0 => {
                let stdio = self.stdio.map(|fd| fd.as_raw_fd());
                // SAFETY: we are the child; all pointers are to memory that lives until exec or exit.
                unsafe {
                    become_program(
                        &program,
                        &argv,
                        &environment,
                        &directory,
                        stdio,
                        reporter.as_raw_fd(),
                    )
                }
            }
            _ => {}
        }
        drop(reporter);
        // SAFETY: the kernel made this descriptor for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let mut errno = [0; 4];
        if std::fs::File::from(report).read_exact(&mut errno).is_ok() {
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            return Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)));
        }
        // SAFETY: an `OwnedFd` keeps its descriptor open until it is dropped.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Child { pidfd })
    }

    /// The file to execute.
    fn program(&self) -> io::Result<CString> {
        let name = self.argv.first().ok_or(io::ErrorKind::InvalidInput)?;
        if name.contains('/') {
            return c_string(name.as_bytes().to_vec());
        }
        let path = self
            .environment
            .iter()
            .find(|(key, _)| key == "PATH")
            .map_or("", |(_, value)| value);
        let mut outcome = io::Error::from_raw_os_error(libc::ENOENT);
        for folder in path.split(':').filter(|folder| folder.starts_with('/')) {
            let file = Path::new(folder).join(name);
            match rustix::fs::access(&file, rustix::fs::Access::EXEC_OK) {
                Ok(()) if file.is_file() => {
                    return c_string(file.into_os_string().as_bytes().to_vec());
                }
                Err(rustix::io::Errno::ACCESS) => {
                    outcome = io::Error::from_raw_os_error(libc::EACCES)
                }
                _ => {}
            }
        }
        Err(outcome)
    }
}

/// The child's way from clone to exec.
///
/// # Safety
/// To be called in a fresh child only; every pointer in `argv` and `environment` is valid, and each list ends with a
/// null pointer.
unsafe fn become_program(
    program: &CString,
    argv: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    directory: &CString,
    stdio: [libc::c_int; 3],
    reporter: libc::c_int,
) -> ! {
    // SAFETY: system calls on memory that the parent prepared.
    unsafe {
        libc::setsid();
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        // The Rust runtime ignores SIGPIPE, and what is ignored stays so across exec.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        // Descriptors 0 to 2 of a service are open, so none of these three is in the way of another.
        let connected = (0..)
            .zip(stdio)
            .all(|(number, fd)| libc::dup2(fd, number) == number);
        if connected && libc::chdir(directory.as_ptr()) == 0 {
            libc::execve(program.as_ptr(), argv.as_ptr(), environment.as_ptr());
        }
        let errno = (*libc::__errno_location()).to_ne_bytes();
        libc::write(reporter, errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}

impl Child {
    /// Waits for its end and reaps it.
    ///
    /// # Errors
    /// As waitid(2).
    pub async fn wait(&self) -> io::Result<Exit> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        loop {
            let mut ready = self.pidfd.readable().await?;
            if let Some(status) = waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options)? {
                let signal = status.terminating_signal().map(Exit::Signal);
                return Ok(signal.unwrap_or(Exit::Code(status.exit_status().unwrap_or(-1))));
            }
            ready.clear_ready();
        }
    }
}

fn c_string(bytes: Vec<u8>) -> io::Result<CString> {
    CString::new(bytes).map_err(io::Error::other)
}

fn c_strings(words: impl Iterator<Item = Vec<u8>>) -> io::Result<Vec<CString>> {
    words.map(c_string).collect()
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|string| string.as_ptr())
        .chain([ptr::null()])
        .collect()
}

/// A pipe, closed on exec: (what is read, what is written).
///
/// # Errors
/// As pipe(2).
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// The environment of this process, as text.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let text = |word: &OsStr| word.to_str().map(ToOwned::to_owned);
    std::env::vars_os()
        .filter_map(|(name, value)| text(&name).zip(text(&value)))
        .collect()
}
