//! `org.nerve1`: what people and programs ask nerve with, on the system bus and on a private socket.
//!
//! - [`client`]: the calling half
//! - [`changes`]: what a client hears
//! - [`words`]: the dictionaries that both halves speak in
//! - [`error`]: the error names and the exit statuses
//! - [`service`]: the answering half; every method asks [`authorize`] first
//! - [`storage`]: the answering half of the store's own interface, one job of [`upkeep`] at a time; [`storage_client`] is
//!   its calling half, in words of [`storage_words`]
//! - `denials`: who was denied what, on record
//! - `answers`: what it answers, made purely from what it found
//! - [`news`]: what is signalled, to whoever is connected
//! - [`session`]: one connection to the bus, for as long as it lasts
//! - [`private`]: root's own way in, without a bus

mod answers;
pub mod authorize;
pub mod changes;
pub mod client;
mod denials;
pub mod error;
pub mod news;
pub mod private;
pub mod service;
pub mod session;
pub mod storage;
pub mod storage_client;
pub mod storage_words;
pub mod upkeep;
pub mod words;
