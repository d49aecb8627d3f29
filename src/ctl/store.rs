//! `nervectl store …`: what is done to the store as a whole.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::cli::{ReportFormat, Store};
use super::{BROKEN, Failure, Settings, archive, import, print};

pub(super) async fn dispatch(settings: &Settings, command: Store) -> Result<u8, Failure> {
    match command {
        Store::Check { output } => check(settings, output).await,
        Store::Backup { file } => backup(settings, &file).await,
        Store::Archive(arguments) => archive::archive(settings, &arguments).await,
        Store::Restore(arguments) => archive::restore(settings, &arguments).await,
        Store::Import(arguments) => import::import(settings, &arguments).await,
    }
}

async fn check(settings: &Settings, output: ReportFormat) -> Result<u8, Failure> {
    let report = settings.connect_patiently().await?.check().await?;
    match output {
        ReportFormat::Json => print(&format!("{:#}\n", serde_json::json!(report)))?,
        ReportFormat::Text => print(&report.to_string())?,
    }
    Ok(if report.is_clean() { 0 } else { BROKEN })
}

/// The file is there, whole and synced, or it is not there.
async fn backup(settings: &Settings, path: &Path) -> Result<u8, Failure> {
    if path.as_os_str() == "-" {
        return Err(Failure::Usage(
            "a backup is a file, and does not go to standard output: give a path; ./- is a file of that name".to_owned(),
        ));
    }
    let client = settings.connect_patiently().await?;
    let failed =
        |error: io::Error| Failure::Input(format!("cannot write {}: {error}", path.display()));
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    let mut unfinished = Unfinished(Some(path.to_owned()));
    let (seq, hash) = client.backup(file.into()).await?;
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))
        .and_then(|directory| directory.sync_all())
        .map_err(failed)?;
    unfinished.0 = None;
    print(&format!("event {seq} {hash}\n"))?;
    Ok(0)
}

/// Half a backup is worse than none.
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // That it could not be removed adds nothing to why the backup failed.
            let _ = fs::remove_file(path);
        }
    }
}
