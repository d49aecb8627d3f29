//! The client half of `org.nerve1.Store`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::client::Client;
use super::error::{CallError, Error};
pub use super::storage_words::*;
use super::words::{EventFilter, LoggedEvent};
use crate::model::report::Report;
use crate::store::log::Logged;

/// The interface.
#[zbus::proxy(
    interface = "org.nerve1.Store",
    default_service = "org.nerve1",
    default_path = "/org/nerve1"
)]
pub trait Store {
    /// Keeps what a file holds; returns its digest, and what came of it.
    fn put_blob(&self, file: zbus::Fd<'_>) -> Result<(String, String), Error>;
    /// A blob, found to be whole.
    fn get_blob(&self, digest: &str) -> Result<zbus::OwnedFd, Error>;
    /// Whether there is a blob of this digest.
    fn blob_exists(&self, digest: &str) -> Result<bool, Error>;
    /// The blobs after this one, with size and with how many events refer to each: some, or none when there are no more.
    fn list_blobs(&self, after: &str) -> Result<Vec<(String, u64, u64)>, Error>;
    /// Copies the database to an empty file; the newest event in it, number and hash.
    fn backup(&self, file: zbus::Fd<'_>) -> Result<(u64, String), Error>;
    /// What a check of the whole store found: a report as JSON.
    fn check(&self) -> Result<String, Error>;
    /// Events of the log, and the number of the last that was looked at, from which to go on; that is the bound that was
    /// given when there is nothing more.
    fn list_events(&self, filter: EventFilter) -> Result<(Vec<LoggedEvent>, u64), Error>;
    /// There are newer events, up to this number. It comes no more often than every 100 ms.
    #[zbus(signal)]
    fn events_appended(&self, seq: u64) -> zbus::Result<()>;
    /// Moves whole days of old events into files.
    fn archive(&self, options: ArchiveOptions) -> Result<ArchiveReport, Error>;
    /// What the log calls this, a run by its id, and the files of the archive.
    fn list_archive(&self, reference: &str) -> Result<(String, Vec<ArchiveFile>), Error>;
    /// A file of the archive.
    fn open_archive(&self, file: &str) -> Result<zbus::OwnedFd, Error>;
    /// Brings a day back into the database; returns how many events that were.
    fn restore(&self, day: &str) -> Result<u64, Error>;
    /// Takes in pieces of another history, a JSON array of [`crate::model::predecessor::Piece`]; what is there already
    /// is left out. Returns how many events and how many runs are new.
    fn import(&self, pieces: &str) -> Result<(u32, u32), Error>;
}

impl Client {
    /// Keeps what a file holds; its digest, and what came of it: `written`, `known` or `repaired`.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] it may be there, and putting it again is harmless.
    pub async fn put_blob(&self, file: OwnedFd) -> Result<(String, String), CallError> {
        Ok(self.store().await?.put_blob(file.into()).await?)
    }

    /// A blob.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn blob(&self, digest: &str) -> Result<File, CallError> {
        let file = self.store().await?.get_blob(digest).await?;
        Ok(OwnedFd::from(file).into())
    }

    /// Whether there is a blob of this digest.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn has_blob(&self, digest: &str) -> Result<bool, CallError> {
        Ok(self.store().await?.blob_exists(digest).await?)
    }

    /// Some blobs after this one, or none: see [`StoreProxy::list_blobs`].
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn blobs(&self, after: &str) -> Result<Vec<(String, u64, u64)>, CallError> {
        Ok(self.store().await?.list_blobs(after).await?)
    }

    /// Copies the database to an empty file; the newest event in it, number and hash.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn backup(&self, file: OwnedFd) -> Result<(u64, String), CallError> {
        Ok(self.store().await?.backup(file.into()).await?)
    }

    /// What a check of the whole store finds.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn check(&self) -> Result<Report, CallError> {
        let report = self.store().await?.check().await?;
        serde_json::from_str(&report)
            .map_err(|_| CallError::Misunderstood(zbus::Error::InvalidReply))
    }

    /// Some events, and from where to go on: see [`StoreProxy::list_events`].
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn events(&self, filter: EventFilter) -> Result<(Vec<Logged>, u64), CallError> {
        let (events, next) = self.store().await?.list_events(filter).await?;
        let events = events.into_iter().map(LoggedEvent::event).collect();
        let events: Option<Vec<_>> = events;
        let misunderstood = || CallError::Misunderstood(zbus::Error::InvalidReply);
        Ok((events.ok_or_else(misunderstood)?, next))
    }

    /// Has days that ended longer ago than `older_than` archived, and what else is due done. This takes its time: see
    /// [`Client::connect_patiently`].
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] it may be done, or go on.
    pub async fn archive(
        &self,
        older_than: Duration,
        options: ArchiveOptions,
    ) -> Result<ArchiveReport, CallError> {
        let older_than = u64::try_from(older_than.as_micros()).unwrap_or(u64::MAX);
        let options = ArchiveOptions {
            older_than: Some(older_than),
            ..options
        };
        Ok(self.store().await?.archive(options).await?)
    }

    /// What the log calls this, a run by its id, and the files of the archive.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn archive_files(
        &self,
        reference: &str,
    ) -> Result<(String, Vec<ArchiveFile>), CallError> {
        Ok(self.store().await?.list_archive(reference).await?)
    }

    /// A file of the archive.
    ///
    /// # Errors
    /// [`CallError`]
    pub async fn archive_file(&self, file: &str) -> Result<File, CallError> {
        let file = self.store().await?.open_archive(file).await?;
        Ok(OwnedFd::from(file).into())
    }

    /// Brings a day back into the database.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] it may be done, or go on.
    pub async fn restore(&self, day: &str) -> Result<u64, CallError> {
        Ok(self.store().await?.restore(day).await?)
    }

    /// Takes in pieces of another history; how many events and runs are new.
    ///
    /// # Errors
    /// [`CallError`]; after [`CallError::Lost`] any of them may be there, and importing them again is harmless.
    pub async fn import(&self, pieces: &str) -> Result<(u32, u32), CallError> {
        Ok(self.store().await?.import(pieces).await?)
    }
}
