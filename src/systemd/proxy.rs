//! The part of systemd's D-Bus interface that nerve uses (org.freedesktop.systemd1(5)).

use std::collections::HashMap;

use zbus::proxy;
use zbus::wire::{OwnedObjectPath, OwnedVariant, Variant};

/// Name, description, load state, active state, sub state, followed unit, path, job id, job type, job path.
pub(super) type ListedUnit = (
    String,
    String,
    String,
    String,
    String,
    String,
    OwnedObjectPath,
    u32,
    String,
    OwnedObjectPath,
);

/// A unit that comes along with a transient one.
pub(super) type AuxiliaryUnit<'a> = (&'a str, Vec<(&'a str, Variant<'a>)>);

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub(super) trait Manager {
    async fn subscribe(&self) -> zbus::Result<()>;
    async fn get_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    async fn get_unit_file_state(&self, name: &str) -> zbus::Result<String>;
    async fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    async fn list_units_by_patterns(
        &self,
        states: &[&str],
        patterns: &[&str],
    ) -> zbus::Result<Vec<ListedUnit>>;
    /// Path and state of unit files.
    async fn list_unit_files_by_patterns(
        &self,
        states: &[&str],
        patterns: &[&str],
    ) -> zbus::Result<Vec<(String, String)>>;
    async fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        auxiliary: &[AuxiliaryUnit<'_>],
    ) -> zbus::Result<OwnedObjectPath>;
}

#[proxy(
    interface = "org.freedesktop.DBus.Properties",
    default_service = "org.freedesktop.systemd1"
)]
pub(super) trait Properties {
    async fn get(&self, interface: &str, name: &str) -> zbus::Result<OwnedVariant>;
    async fn get_all(&self, interface: &str) -> zbus::Result<HashMap<String, OwnedVariant>>;
}
