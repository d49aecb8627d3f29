//! The worker: the protocol it speaks with nerved, and the stock worker that executes roles.
//!
//! It never sees the store or D-Bus. Everything a role does, the call of an LLM too, happens in a process of the
//! run's own cgroup.

mod agent;
mod home;
pub mod llm;
pub mod own;
pub mod protocol;
pub mod redact;
pub mod reply;
mod role;
mod round;
mod run;
mod said;
pub mod stock;
mod told;
