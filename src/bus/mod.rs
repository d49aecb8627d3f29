//! `org.nerve1` on the system bus: what people and programs ask nerve with.
//!
//! - [`client`]: the calling half, and the dictionaries both halves speak in
//! - [`error`]: the error names and the exit statuses
//! - [`service`]: the answering half; every method asks [`authorize`] first
//! - [`session`]: one connection to the bus, for as long as it lasts

pub mod authorize;
pub mod client;
pub mod error;
pub mod service;
pub mod session;
