//! nerve: a systemd-native daemon for durable workflows. The map of the crate; imports point down only.
//!
//! | layer | module | what |
//! |---|---|---|
//! | 5 | [`daemon`] | nerved, put together |
//! | 4 | [`bus`] | `org.nerve1`: interface, authorization, client half |
//! | 4 | [`ctl`] | nervectl, one function per verb |
//! | 3 | [`manager`] | the driver's five phases, the handle, the workers' links |
//! | 2 | [`store`] | SQLite: events and runs |
//! | 2 | [`systemd`] | D-Bus: worker units |
//! | 2 | [`worker`] | the protocol; the stock worker |
//! | 1 | [`engine`] | all policy, pure: inputs in, events and actions out |
//! | 1 | [`config`] | text to checked values, with places |
//! | 1 | [`os`] | cgroups, processes, peers, journal; the only `unsafe` |
//! | 0 | [`model`] | names, runs, messages, workflows; pure |
//!
//! What must always be true:
//! - `model` and `engine` are pure; the same events in the same order give the same run, live or replayed.
//! - No event is stored that [`model::run::Run::after`] refused.
//! - Nothing is done and nobody is answered before the event is committed.
//! - A run ends once, and only when its cgroup is empty; 137 only when somebody asked for it.
//! - Unit names, cgroups and round numbers are functions of the run: doing it twice is harmless, recovery guesses
//!   nothing.
//! - Only the driver writes to the store, but for definitions before they are in force; only `systemd/properties.rs`
//!   names unit properties; only `main` exits; nothing polls.

#![cfg_attr(
    test,
    expect(clippy::unwrap_used, reason = "a test that cannot go on fails")
)]

pub mod bus;
pub mod config;
pub mod ctl;
pub mod daemon;
pub mod engine;
pub mod manager;
pub mod model;
pub mod os;
pub mod store;
pub mod systemd;
pub mod worker;
