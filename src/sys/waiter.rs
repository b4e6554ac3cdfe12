//! A poll loop: waits until there is something to read, or for a while.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

/// Waits for all that it watches.
pub struct Waiter {
    poll: Poll,
    events: Events,
}

impl Waiter {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Waiter> {
        Ok(Waiter {
            poll: Poll::new()?,
            events: Events::with_capacity(8),
        })
    }

    /// Wakes up when more has come to read. What was there before and is left unread wakes nobody.
    pub fn watch(&self, source: &impl AsRawFd) -> io::Result<()> {
        self.poll.registry().register(
            &mut SourceFd(&source.as_raw_fd()),
            Token(0),
            Interest::READABLE,
        )
    }

    /// Waits until something wakes, a signal comes, or `patience` is over, if it ever is.
    pub fn wait(&mut self, patience: Option<Duration>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, patience) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }
}
