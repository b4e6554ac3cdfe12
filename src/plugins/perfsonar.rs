//! The perfSONAR plugin: one tag for all packets that leave this host.
//!
//! There are no flow events in it: the marker has the tag from the configuration, and marks with it
//! from start to stop.

use super::{EventSender, Plugin};
use crate::error::{Context, Result};
use crate::flow::Tag;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

/// The plugin.
pub struct Perfsonar {
    tag: Tag,
    waiter: Waiter,
}

impl Perfsonar {
    /// The tag that all packets get.
    pub fn new(tag: Tag) -> Result<Perfsonar> {
        let waiter = Waiter::new().context(poll_loop)?;
        Ok(Perfsonar { tag, waiter })
    }
}

fn poll_loop() -> String {
    "poll loop of the perfSONAR plugin".to_owned()
}

impl Plugin for Perfsonar {
    fn name(&self) -> &'static str {
        "perfsonar"
    }

    /// The daemon runs as long as a plugin could still send events.
    fn run(mut self: Box<Self>, _events: EventSender, stop: Stop) -> Result<()> {
        log::info!("perfsonar: every IPv6 packet gets the tag {}", self.tag);
        self.waiter.watch(&stop).context(poll_loop)?;
        while !stop.is_set() {
            self.waiter.wait(None).context(poll_loop)?;
        }
        Ok(())
    }
}
