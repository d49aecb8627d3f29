//! The clocks: wall time for people, CLOCK_BOOTTIME for deadlines.

use std::io;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// µs since the epoch.
#[must_use]
pub fn wall_us() -> u64 {
    micros(clock_gettime(ClockId::Realtime))
}

/// µs since the machine was booted, suspended time included.
#[must_use]
pub fn boot_us() -> u64 {
    micros(clock_gettime(ClockId::Boottime))
}

fn micros(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000)
        .saturating_add(nanoseconds / 1_000)
}

/// Tells one boot from another. nerve.service passes it as `NERVE_BOOT_ID`, since its sandbox hides `/proc/sys`.
///
/// # Errors
/// When neither is there.
pub fn boot_id() -> io::Result<String> {
    if let Ok(id) = std::env::var("NERVE_BOOT_ID") {
        return Ok(id);
    }
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}
