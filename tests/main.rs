//! What can be checked without a machine: one binary, so that there is one link and shared fixtures.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod corpus;
mod corruption;
mod definitions;
#[path = "fuzz/targets.rs"]
mod fuzz;
mod layers;
mod trouble;
