//! What Linux gives: cgroups, processes, peers, clocks, files that change, the journal, room. The only place with `unsafe`,
//! each block with its reason. Knows nothing of runs or workflows.

#![expect(unsafe_code, reason = "system calls that no crate of ours wraps")]

pub mod cgroup;
pub mod clock;
pub mod descriptor;
pub mod disk;
pub mod failpoint;
pub mod journal;
pub mod log;
pub mod peer;
pub mod process;
pub mod socket;
pub mod watch;

pub(crate) use failpoint::failpoint;
