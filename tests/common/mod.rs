//! The harness: two network namespaces joined by a veth, the daemon run in one of them as a user would
//! run it, and UDP sinks to catch its fireflies.
//!
//! Every wait is for a condition, with a deadline.
#![allow(dead_code, missing_docs)]

pub mod daemon;
pub mod http;
pub mod net;
pub mod sink;
pub mod wire;

use std::time::{Duration, Instant};

/// How long anything may take before it counts as never.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `condition` gives something.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
