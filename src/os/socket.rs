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

/// A socket that only this user can connect to, whoever may look into its directory.
///
/// # Errors
/// As bind(2).
pub fn listen_private(path: &Path) -> io::Result<UnixListener> {
    use rustix::fs::Mode;
    use rustix::process::umask;

    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    // What an earlier nerved left; the store's lock says that none is running.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Never open to others, not even between two system calls.
    let before = umask(Mode::from_raw_mode(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener
}

/// Ends a connection for both sides when it is dropped, whoever else holds it.
#[derive(Debug)]
pub struct ShutDown(OwnedFd);

impl ShutDown {
    /// Of the connected socket behind this descriptor.
    #[must_use]
    pub fn at_end(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl Drop for ShutDown {
    fn drop(&mut self) {
        // One that is shut down already is as wanted.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn a_private_socket_takes_the_place_of_an_old_one_and_is_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made").join("private");
        let old = listen_private(&path).unwrap();
        let listener = listen_private(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(old);
        let client = tokio::net::UnixStream::connect(&path).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let held = ShutDown::at_end(server.into_std().unwrap().into());
        drop(held);
        client.readable().await.unwrap();
        assert_eq!(client.try_read(&mut [0]).unwrap(), 0);
    }
}
