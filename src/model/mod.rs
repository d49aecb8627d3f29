//! The words of nerve as types. Pure: no I/O, no clock, no async; imports nothing else of the crate.
//!
//! A value of these types is valid by construction: names are parsed once, a [`workflow::Workflow`] has been
//! proved, and a [`run::Run`] changes only through [`run::Run::after`].

pub mod audit;
mod event;
pub mod exit;
pub mod hex;
pub mod limits;
pub mod message;
pub mod moderator;
pub mod name;
pub mod predecessor;
pub mod report;
pub mod retention;
pub mod role;
pub mod run;
pub mod status;
pub mod text;
pub mod time;
pub mod tools;
pub mod worker;
pub mod workflow;
