//! The way to one worker: what is sent is written in order, and nobody waits for a worker that does not read.

use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, oneshot};

use crate::model::limits;
use crate::model::name::WorkflowName;
use crate::model::run::Place;
use crate::os::peer::Peer;
use crate::worker::protocol::{self, ToWorker};

/// A worker that takes nothing for so long is not worth waiting for.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// The way to one worker. When it is dropped what was sent is still written, then the connection is closed.
#[derive(Debug)]
pub(super) struct Outbox {
    /// Whose worker it is.
    pub(super) workflow: WorkflowName,
    /// Where it runs.
    pub(super) place: Place,
    /// Its process.
    pub(super) peer: Peer,
    lines: mpsc::Sender<Vec<u8>>,
    /// Dropped with it, and then the worker is heard no more.
    open: Option<oneshot::Sender<()>>,
}

impl Outbox {
    /// The way to the worker of `workflow` at the other end of `stream`; the receiver ends when it is closed.
    pub(super) fn open(
        workflow: WorkflowName,
        place: Place,
        peer: Peer,
        stream: OwnedWriteHalf,
    ) -> (Self, oneshot::Receiver<()>) {
        let (lines, outgoing) = mpsc::channel(limits::OUTBOX_FRAMES);
        let (open, closed) = oneshot::channel();
        tokio::spawn(write(stream, outgoing));
        let open = Some(open);
        let outbox = Self {
            workflow,
            place,
            peer,
            lines,
            open,
        };
        (outbox, closed)
    }

    /// Sends frames, in order. A connection that broke, or a worker that does not read, is reported by the reader.
    pub(super) fn send(&mut self, frames: &[ToWorker]) {
        let mut lines = Vec::new();
        for frame in frames {
            protocol::append(&mut lines, frame);
        }
        if self.lines.try_send(lines).is_err() {
            self.open = None;
        }
    }
}

async fn write(mut stream: OwnedWriteHalf, mut lines: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = lines.recv().await {
        let written = tokio::time::timeout(WRITE_PATIENCE, stream.write_all(&bytes)).await;
        if !matches!(written, Ok(Ok(()))) {
            return;
        }
        crate::os::failpoint!("F15", has(&bytes, b"message-ack"));
        crate::os::failpoint!("F18", has(&bytes, b"event-ack"));
        crate::os::failpoint!("F23", has(&bytes, b"kill-thread"));
    }
}

/// Whether frames of this type are among the bytes; a prompt that says so too does no harm.
fn has(bytes: &[u8], kind: &[u8]) -> bool {
    bytes.windows(kind.len()).any(|window| window == kind)
}
