//! Who is at the other end of a Unix socket.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A peer, pinned by a pidfd so that its pid cannot become somebody else's unnoticed.
#[derive(Debug)]
pub struct Peer {
    /// Its process id.
    pub pid: u32,
    /// Its uid when it connected.
    pub uid: u32,
    pidfd: OwnedFd,
}

impl Peer {
    /// The peer of a connected socket.
    ///
    /// # Errors
    /// When it is gone already, or the kernel does not tell.
    pub fn of(stream: &tokio::net::UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let pid = credentials
            .pid()
            .and_then(Pid::from_raw)
            .ok_or_else(|| io::Error::other("the peer has no pid"))?;
        let pidfd = match peer_pidfd(stream.as_fd()) {
            // Linux before 6.5; the pid may have been taken over since the connect, which `pid` alone cannot tell.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                pidfd_open(pid, PidfdFlags::empty())?
            }
            pidfd => pidfd?,
        };
        Ok(Self {
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            uid: credentials.uid(),
            pidfd,
        })
    }

    /// Whether the process lives, so that what was read of its pid meanwhile is about it.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(
            poll(
                &mut polled,
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 0
                })
            ),
            Ok(0)
        )
    }
}

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut length = libc::socklen_t::from(4_u8);
    // SAFETY: the option (socket(7), Linux 6.5) writes one int, 4 bytes, for which there is room.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
