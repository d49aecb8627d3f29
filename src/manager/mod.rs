//! The manager: the engine's hands. It has no policy of its own.
//!
//! - [`handle`]: what callers hold
//! - [`driver`]: the one task that changes state, turn by turn
//! - [`link`]: connections of workers, each with its `outbox`

pub mod driver;
pub mod handle;
pub mod link;
mod outbox;
