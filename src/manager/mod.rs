//! The manager: the engine's hands. It has no policy of its own.
//!
//! - [`definitions`]: what is on disk, read again when it changes
//! - [`handle`]: what callers hold
//! - [`driver`]: the one task that changes state, turn by turn
//! - [`hands`]: what it does to systemd and to cgroups
//! - [`link`]: connections of workers, each with its `outbox`
//! - [`room`]: whether the disk has some

pub mod definitions;
pub mod driver;
mod frames;
pub mod handle;
pub mod hands;
pub mod link;
mod outbox;
pub mod room;
mod tickets;
