//! The perfsonar plugin: one tag for all packets that leave this host.
//!
//! It sends no flow events. The marker reads the tag from the configuration and marks all packets while the daemon
//! runs.

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
    /// A plugin for `tag`, which all packets get.
    pub fn new(tag: Tag) -> Result<Perfsonar> {
        let waiter = Waiter::new().context(poll_loop)?;
        Ok(Perfsonar { tag, waiter })
    }
}

fn poll_loop() -> String {
    "poll loop of the perfsonar plugin".to_owned()
}

impl Plugin for Perfsonar {
    fn name(&self) -> &'static str {
        "perfsonar"
    }

    /// Holds `_events` until the stop: the daemon runs only as long as a plugin can still send events.
    fn run(mut self: Box<Self>, _events: EventSender, stop: Stop) -> Result<()> {
        log::info!(
            "perfsonar: every outgoing IPv6 packet gets the tag {}",
            self.tag
        );
        self.waiter.watch(&stop).context(poll_loop)?;
        while !stop.is_set() {
            self.waiter.wait(None).context(poll_loop)?;
        }
        Ok(())
    }
}
