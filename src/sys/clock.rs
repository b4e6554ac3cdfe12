//! The clock by which the daemon counts ages: clock_gettime(2).

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Time since the host started, including time asleep (`CLOCK_BOOTTIME`). Setting the wall clock does not change it.
pub fn boottime() -> Duration {
    // The kernel has had this clock since Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
