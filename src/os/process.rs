//! Starting a process right into a cgroup, and waiting for its end by pidfd.
//!
//! clone3(2) with CLONE_INTO_CGROUP: the child is born in its cgroup. Moving it afterwards would leave a moment in
//! which its own children escape, and costs milliseconds on a busy machine. CLONE_VM and CLONE_VFORK make it as cheap as
//! posix_spawn(3), which cannot do this in the C libraries nerve is built for.

use std::arch::asm;
use std::cell::Cell;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
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
/// The child's stack until exec: a few system calls deep.
const STACK_WORDS: usize = 2_048;

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
        let argv = c_strings(self.argv.iter().map(|word| word.as_bytes().to_vec()))?;
        let environment = self.environment.iter();
        let environment =
            c_strings(environment.map(|(name, value)| format!("{name}={value}").into_bytes()))?;
        let birth = Birth {
            program: self.program()?,
            argv: pointers(&argv),
            environment: pointers(&environment),
            directory: c_string(self.directory.as_os_str().as_bytes().to_vec())?,
            stdio: self.stdio.map(|fd| fd.as_raw_fd()),
            errno: Cell::new(0),
        };
        let mut stack = vec![0_u128; STACK_WORDS];
        let mut pidfd: libc::c_int = -1;
        // SAFETY: all-zero is a valid clone_args.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        // CLEAR_SIGHAND: a signal that comes before exec must not run our handlers.
        let flags = libc::CLONE_PIDFD | libc::CLONE_VM | libc::CLONE_VFORK;
        arguments.flags = u64::from(flags.unsigned_abs()) | CLONE_INTO_CGROUP | CLONE_CLEAR_SIGHAND;
        arguments.pidfd = &raw mut pidfd as u64;
        arguments.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
        arguments.stack = stack.as_mut_ptr() as u64;
        arguments.stack_size = size_of_val(stack.as_slice()) as u64;
        arguments.cgroup = u64::from(self.cgroup.as_raw_fd().unsigned_abs());
        // SAFETY: the child runs `become_program` on a stack of its own; until it is done with our memory, by exec or
        // exit, CLONE_VFORK holds this thread here, so all that `birth` points to lives.
        let result = unsafe { clone(&mut arguments, &birth) };
        if result < 0 {
            return Err(io::Error::from_raw_os_error(
                i32::try_from(-result).unwrap_or(libc::EINVAL),
            ));
        }
        // SAFETY: the kernel made this descriptor for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        if birth.errno.get() != 0 {
            let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
            return Err(io::Error::from_raw_os_error(birth.errno.get()));
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

/// All that the child needs, made before it is born: it may not allocate.
struct Birth {
    program: CString,
    argv: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    directory: CString,
    stdio: [libc::c_int; 3],
    /// Why there is no program, if so.
    errno: Cell<libc::c_int>,
}

/// clone3(2) with a stack for the child, which calls [`become_program`]. Returns the child's pid, or minus the error.
///
/// # Safety
/// `arguments` has a stack, and flags under which `birth` outlives the child's use of it.
unsafe fn clone(arguments: &mut libc::clone_args, birth: &Birth) -> libc::c_long {
    let result: libc::c_long;
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the parent only gets its result; the child starts on an aligned stack and never comes back.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") ptr::from_mut(arguments),
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") ptr::from_ref(birth),
            in("r13") become_program as extern "C" fn(&Birth) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        asm!(
            "svc 0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x20",
            "blr x21",
            "brk 1",
            "2:",
            inlateout("x0") ptr::from_mut(arguments) => result,
            in("x1") size_of::<libc::clone_args>(),
            in("x8") libc::SYS_clone3,
            in("x20") ptr::from_ref(birth),
            in("x21") become_program as extern "C" fn(&Birth) -> !,
        );
    }
    result
}

/// The child's way from clone to exec: system calls on memory that was made before, and nothing else.
extern "C" fn become_program(birth: &Birth) -> ! {
    // SAFETY: every pointer is to a C string or a list that ends with a null pointer, and the parent keeps them.
    unsafe {
        libc::setsid();
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        // The Rust runtime ignores SIGPIPE, and what is ignored stays so across exec.
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGPIPE, &raw const default, ptr::null_mut());
        // Descriptors 0 to 2 of a service are open, so none of these three is in the way of another.
        let [stdin, stdout, stderr] = birth.stdio;
        if libc::dup2(stdin, 0) == 0
            && libc::dup2(stdout, 1) == 1
            && libc::dup2(stderr, 2) == 2
            && libc::chdir(birth.directory.as_ptr()) == 0
        {
            libc::execve(
                birth.program.as_ptr(),
                birth.argv.as_ptr(),
                birth.environment.as_ptr(),
            );
        }
        birth.errno.set(*libc::__errno_location());
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

/// The same descriptor, which from now on never waits.
///
/// # Errors
/// As ioctl(2).
pub fn unblocked(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

/// The environment of this process, as text.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    let text = |word: &OsStr| word.to_str().map(ToOwned::to_owned);
    std::env::vars_os()
        .filter_map(|(name, value)| text(&name).zip(text(&value)))
        .collect()
}
