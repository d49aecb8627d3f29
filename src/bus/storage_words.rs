//! The dictionaries of `org.nerve1.Store`: what both halves of the interface speak in.

use zbus::{DeserializeDict, SerializeDict, Type};

/// The options of `Archive`.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase", deny_unknown_fields)]
pub struct ArchiveOptions {
    /// Days that ended longer ago than this, in µs; 30 days without it.
    pub older_than: Option<u64>,
    /// The oldest so many.
    pub max_days: Option<u32>,
    /// Give free space back to the filesystem.
    pub vacuum: Option<bool>,
    /// Only say what would be archived.
    pub dry_run: Option<bool>,
}

/// What `Archive` answers.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct ArchiveReport {
    /// The days that went, the oldest first.
    pub days: Vec<ArchivedDay>,
    /// Runs that were forgotten.
    pub forgotten: u64,
    /// Blobs that were removed.
    pub blobs: u64,
    /// Bytes that went back to the filesystem, if that was wanted.
    pub freed: Option<u64>,
}

/// A day that went.
#[derive(Debug, Clone, Default, PartialEq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct ArchivedDay {
    /// As 2026-11-20.
    pub day: String,
    /// The path of its file.
    pub file: String,
    /// Its events.
    pub rows: u64,
}

/// A file of the archive.
#[derive(Debug, Clone, Default, PartialEq, Eq, SerializeDict, DeserializeDict, Type)]
#[zbus(signature = "a{sv}", rename_all = "camelCase")]
pub struct ArchiveFile {
    /// The day that its events are of, as `2026-11-20`.
    pub day: String,
    /// Its name.
    pub file: String,
    /// The number of its first event.
    pub first: u64,
    /// sha256 of all of it.
    pub digest: String,
}
