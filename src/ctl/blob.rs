//! `nervectl blob …`: files go to nerved, and come from it, as open descriptors.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;

use super::cli::{Blob, ListFormat};
use super::input::unreadable;
use super::{Failure, Settings, note, paper, print, text};
use crate::model::limits;

/// Exit status when there is no such blob.
const NONE: u8 = 66;

pub(super) async fn dispatch(settings: &Settings, command: Blob) -> Result<u8, Failure> {
    match command {
        Blob::Put { file } => put(settings, &file).await,
        Blob::Get { digest } => get(settings, &digest).await,
        Blob::Exists { digest } => {
            let exists = settings.connect().await?.has_blob(&digest).await?;
            Ok(if exists { 0 } else { NONE })
        }
        Blob::List { output } => list(settings, output).await,
    }
}

async fn put(settings: &Settings, path: &Path) -> Result<u8, Failure> {
    let file = open(path).map_err(|error| unreadable(path, &error))?;
    let client = settings.connect_patiently().await?;
    let (digest, outcome) = client.put_blob(file.into()).await?;
    if outcome == "repaired" {
        note("the blob was there and damaged; it has been replaced");
    }
    print(&format!("{digest}\n"))?;
    Ok(0)
}

/// The file; what is none, such as stdin or a pipe, is read to its end first.
fn open(path: &Path) -> io::Result<File> {
    let source: Box<dyn io::Read> = if path.as_os_str() == "-" {
        Box::new(io::stdin().lock())
    } else {
        let file = File::open(path)?;
        if file.metadata()?.is_file() {
            return Ok(file);
        }
        Box::new(file)
    };
    let mut spool = File::from(memfd_create("nervectl", MemfdFlags::CLOEXEC)?);
    // It is in memory until nerved has it, and one that is longer would be refused.
    let most = limits::BLOB_BYTES;
    if io::copy(&mut source.take(most + 1), &mut spool)? > most {
        let error = format!("it is longer than {most} bytes, the most that a blob may have");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, error));
    }
    spool.rewind()?;
    Ok(spool)
}

async fn get(settings: &Settings, digest: &str) -> Result<u8, Failure> {
    let mut file = settings.connect_patiently().await?.blob(digest).await?;
    let mut stdout = io::stdout().lock();
    io::copy(&mut file, &mut stdout)
        .and_then(|_| stdout.flush())
        .map_err(Failure::Output)?;
    Ok(0)
}

async fn list(settings: &Settings, output: ListFormat) -> Result<u8, Failure> {
    let client = settings.connect().await?;
    let mut blobs: Vec<(String, u64, u64)> = Vec::new();
    loop {
        let after = blobs.last().map_or("", |(digest, ..)| digest);
        let mut more = client.blobs(after).await?;
        if more.is_empty() {
            break;
        }
        blobs.append(&mut more);
    }
    match output {
        ListFormat::Json => {
            let object = |(digest, size, references): &(String, u64, u64)| json!({"digest": digest, "size": size, "references": references});
            let objects: Vec<_> = blobs.iter().map(object).collect();
            print(&format!("{:#}\n", serde_json::Value::Array(objects)))?;
        }
        ListFormat::Table => {
            let row = |(digest, size, references): &(String, u64, u64)| {
                vec![digest.clone(), size.to_string(), references.to_string()]
            };
            let rows: Vec<_> = blobs.iter().map(row).collect();
            print(&text::table(
                &["DIGEST", "SIZE", "REFERENCES"],
                &["SIZE", "REFERENCES"],
                &rows,
                paper::Paper::PLAIN,
            ))?;
        }
    }
    Ok(0)
}
