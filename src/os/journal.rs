//! Entries for the journal with fields of their own, in its native protocol
//! (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>).

use std::io;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::net::UnixDatagram;

/// Where journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";
/// How long an entry waits for a journal that is busy. Nobody may be held up by it for good.
const PATIENCE: Duration = Duration::from_millis(200);

/// A way to the journal.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
}

impl Journal {
    /// Opens it; whether journald is there shows at the first entry.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            socket: UnixDatagram::unbound()?,
        })
    }

    /// Sends one entry. Values may hold any bytes.
    ///
    /// # Errors
    /// When journald is away or too busy; the entry is lost then.
    pub async fn send(&self, fields: &[(&str, &[u8])]) -> io::Result<()> {
        let entry = serialize(fields);
        match tokio::time::timeout(PATIENCE, self.socket.send_to(&entry, SOCKET)).await {
            Ok(sent) => sent.map(drop),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// The last `bytes` of what an invocation of a unit has in the journal, for people; empty when there is nothing, or
/// nobody to ask. Uses journalctl(1): reading the journal's files is a library of its own.
pub async fn last_words(invocation: &str, bytes: usize) -> String {
    let matches = format!("_SYSTEMD_INVOCATION_ID={invocation}");
    let read = move || {
        // What was written last may still be on its way.
        let _ = Command::new("journalctl")
            .arg("--sync")
            .stdin(Stdio::null())
            .output();
        let lines = [
            "--no-pager",
            "--quiet",
            "--output=cat",
            "--lines=200",
            &matches,
        ];
        Command::new("journalctl")
            .args(lines)
            .stdin(Stdio::null())
            .output()
    };
    let Ok(Ok(output)) = tokio::task::spawn_blocking(read).await else {
        return String::new();
    };
    let words = output.stdout.trim_ascii_end();
    let from = words.len().saturating_sub(bytes);
    String::from_utf8_lossy(&words[from..]).into_owned()
}

fn serialize(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut entry = Vec::new();
    for (name, value) in fields {
        entry.extend_from_slice(name.as_bytes());
        if value.contains(&b'\n') {
            entry.push(b'\n');
            entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
        } else {
            entry.push(b'=');
        }
        entry.extend_from_slice(value);
        entry.push(b'\n');
    }
    entry
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_value_with_a_line_break_is_sent_with_its_length() {
        let entry = super::serialize(&[("A", b"x=y"), ("B", b"1\n2")]);
        assert_eq!(entry, b"A=x=y\nB\n\x03\0\0\0\0\0\0\x001\n2\n");
    }
}
