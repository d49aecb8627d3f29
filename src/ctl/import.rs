//! `nervectl store import`: sends what the TypeScript predecessor kept to nerve.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::cli::Import;
use super::input::unreadable;
use super::predecessor::{Old, entries};
use super::{BROKEN, Failure, Settings, note, print};
use crate::bus::client::Client;
use crate::model::hex::hex;
use crate::model::predecessor::Piece;

/// What one call sends, about.
const BATCH_BYTES: usize = 1024 * 1024;

/// `nervectl store import`
pub(super) async fn import(settings: &Settings, arguments: &Import) -> Result<u8, Failure> {
    let old = Old::open(&arguments.database)?;
    old.load_archive(arguments.archive.as_deref())?;
    let mut runs = old.runs()?;
    let mut sender = Sender {
        client: settings.connect_patiently().await?,
        pieces: Vec::new(),
        bytes: 0,
        events: 0,
        runs: 0,
    };
    let damaged = match &arguments.blobs {
        Some(directory) => send_blobs(&mut sender, directory).await?,
        None => 0,
    };
    while let Some(run) = runs.next(&old)? {
        sender.send(Piece::Run(run.clone())).await?;
        let mut statement = old.rows_of_run()?;
        let mut rows = statement
            .query([&run.old_id])
            .map_err(|error| old.failed(&error))?;
        while let Some(row) = old.next(&mut rows)? {
            sender.send(Piece::OfRun(row)).await?;
        }
    }
    let mut statement = old.other_rows()?;
    let mut rows = statement.query([]).map_err(|error| old.failed(&error))?;
    while let Some(row) = old.next(&mut rows)? {
        sender.send(Piece::Row(row)).await?;
    }
    sender.flush().await?;
    print(&format!(
        "imported {} runs, {} events\n",
        sender.runs, sender.events
    ))?;
    Ok(if damaged == 0 { 0 } else { BROKEN })
}

/// Gathers pieces to calls of a fair size.
struct Sender {
    client: Client,
    pieces: Vec<Piece>,
    bytes: usize,
    events: u64,
    runs: u64,
}

impl Sender {
    async fn send(&mut self, piece: Piece) -> Result<(), Failure> {
        self.bytes += piece.weight();
        self.pieces.push(piece);
        if self.bytes >= BATCH_BYTES {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        let pieces = serde_json::to_string(&self.pieces)
            .map_err(|error| Failure::Internal(error.to_string()))?;
        let (events, runs) = self.client.import(&pieces).await?;
        self.events += u64::from(events);
        self.runs += u64::from(runs);
        self.pieces.clear();
        self.bytes = 0;
        Ok(())
    }
}

/// Sends every blob below a directory, `ab/cdef…` each; how many were damaged, and left out.
async fn send_blobs(sender: &mut Sender, directory: &Path) -> Result<u32, Failure> {
    let mut damaged = 0;
    for folder in entries(directory)? {
        let Some(first) = name(&folder).filter(|name| name.len() == 2 && folder.is_dir()) else {
            continue;
        };
        for path in entries(&folder)? {
            let Some(rest) = name(&path).filter(|rest| is_hex(rest) && rest.len() == 62) else {
                continue;
            };
            let (mut file, found) = digest(&path).map_err(|error| unreadable(&path, &error))?;
            if found != format!("{first}{rest}") {
                damaged += 1;
                note(&format!(
                    "nervectl: blob {first}{rest} is damaged: {} has the digest {found}; it is left out",
                    path.display()
                ));
                continue;
            }
            file.rewind().map_err(|error| unreadable(&path, &error))?;
            sender.client.put_blob(file.into()).await?;
            sender.send(Piece::Blob(found)).await?;
        }
    }
    Ok(damaged)
}

fn digest(path: &Path) -> io::Result<(File, String)> {
    let mut file = File::open(path)?;
    let (mut sha, mut buffer) = (Sha256::new(), vec![0; 64 * 1024]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((file, hex(&sha.finalize()))),
            read => sha.update(&buffer[..read]),
        }
    }
}

fn name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
