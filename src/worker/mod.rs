//! The worker: the protocol it speaks with nerved, and the stock worker that executes command roles.
//!
//! It never sees the store or D-Bus. Everything a role does happens in a process of the run's own cgroup.

mod home;
pub mod protocol;
mod role;
mod run;
pub mod stock;
