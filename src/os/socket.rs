//! The socket a service listens on.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::Path;

use tokio::net::UnixListener;

/// The socket that systemd holds for us, so that workers never meet a closed door; without systemd one of our own.
///
/// # Errors
/// As bind(2).
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match sd_notify::listen_fds()?.next() {
        // SAFETY: systemd passes this descriptor to us, and nobody else here takes it.
        Some(fd) => std::os::unix::net::UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) }),
        None => {
            if let Some(directory) = path.parent() {
                std::fs::create_dir_all(directory)?;
            }
            // What an earlier nerved left; the store's lock says that none is running.
            let _ = std::fs::remove_file(path);
            std::os::unix::net::UnixListener::bind(path)?
        }
    };
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}
