//! A poll loop: waits until a file descriptor is readable, with a timeout.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

/// Waits for the file descriptors that it watches.
pub struct Waiter {
    poll: Poll,
    events: Events,
}

impl Waiter {
    /// A waiter that watches nothing yet.
    pub fn new() -> io::Result<Waiter> {
        Ok(Waiter {
            poll: Poll::new()?,
            events: Events::with_capacity(8),
        })
    }

    /// Watches a file descriptor. It is edge-triggered: [`Waiter::wait`] returns when new data arrives, but not for
    /// data that was left unread before.
    pub fn watch(&self, source: &impl AsRawFd) -> io::Result<()> {
        self.poll.registry().register(
            &mut SourceFd(&source.as_raw_fd()),
            Token(0),
            Interest::READABLE,
        )
    }

    /// Waits until a file descriptor is readable, a signal arrives, or `timeout` has passed; `None` is no timeout.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, timeout) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}
