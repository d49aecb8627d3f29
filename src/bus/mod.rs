//! `org.nerve1`: what people and programs ask nerve with, on the system bus and on a private socket.
//!
//! - [`client`]: the calling half
//! - [`words`]: the dictionaries that both halves speak in
//! - [`error`]: the error names and the exit statuses
//! - [`service`]: the answering half; every method asks [`authorize`] first
//! - `answers`: what it answers, made purely from what it found
//! - [`news`]: what is signalled, to whoever is connected
//! - [`session`]: one connection to the bus, for as long as it lasts
//! - [`private`]: root's own way in, without a bus

mod answers;
pub mod authorize;
pub mod client;
pub mod error;
pub mod news;
pub mod private;
pub mod service;
pub mod session;
pub mod words;
