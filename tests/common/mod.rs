//! The test harness: two network namespaces joined by a veth pair, the daemon in one of them, and UDP sinks that
//! receive its fireflies.
//!
//! Every wait is for a condition and has a deadline.
#![allow(dead_code, missing_docs)]

pub mod daemon;
pub mod disk;
pub mod http;
pub mod net;
pub mod service;
pub mod sink;
pub mod wire;

use std::time::{Duration, Instant};

/// How long a test waits for a condition before it fails.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `condition` returns `Some`.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "timed out waiting for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
