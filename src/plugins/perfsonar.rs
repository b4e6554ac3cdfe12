//! The perfSONAR plugin: one tag for all packets that leave this host.
//!
//! There are no flow events in it: the marker has the tag from the configuration, and marks with it
//! from start to stop.

use std::io;

use mio::{Events, Interest, Poll, Token};

use super::{EventSender, Plugin};
use crate::error::{Context, Result};
use crate::flow::Tag;
use crate::sys::stop::Stop;

/// The plugin.
pub struct Perfsonar {
    tag: Tag,
    poll: Poll,
}

impl Perfsonar {
    /// The tag that all packets get.
    pub fn new(tag: Tag) -> Result<Perfsonar> {
        let poll = Poll::new().context(poll_loop)?;
        Ok(Perfsonar { tag, poll })
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
    fn run(mut self: Box<Self>, _events: EventSender, mut stop: Stop) -> Result<()> {
        log::info!("perfsonar: every IPv6 packet gets the tag {}", self.tag);
        let registry = self.poll.registry();
        registry
            .register(&mut stop, Token(0), Interest::READABLE)
            .context(poll_loop)?;
        let mut wakeups = Events::with_capacity(1);
        while !stop.is_set() {
            match self.poll.poll(&mut wakeups, None) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error).context(poll_loop);
                }
                _ => {}
            }
        }
        Ok(())
    }
}
