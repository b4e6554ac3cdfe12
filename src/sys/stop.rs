//! The word to stop, for threads that wait in a poll loop and for those that look now and then.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Held by the daemon.
pub struct StopSwitch {
    stopped: Arc<AtomicBool>,
    writer: Option<PipeWriter>,
}

/// Held by every plugin.
#[derive(Clone)]
pub struct Stop {
    stopped: Arc<AtomicBool>,
    reader: Arc<PipeReader>,
}

/// A switch and what it sets.
pub fn stop() -> io::Result<(StopSwitch, Stop)> {
    let (reader, writer) = io::pipe()?;
    let stopped = Arc::new(AtomicBool::new(false));
    let switch = StopSwitch {
        stopped: Arc::clone(&stopped),
        writer: Some(writer),
    };
    let reader = Arc::new(reader);
    Ok((switch, Stop { stopped, reader }))
}

impl StopSwitch {
    /// Tells every holder of the [`Stop`] to stop.
    pub fn set(&mut self) {
        self.stopped.store(true, Ordering::Release);
        // The end of the pipe is what wakes all who poll its other end.
        self.writer = None;
    }
}

/// Who waits for a word that will never come is told to stop.
impl Drop for StopSwitch {
    fn drop(&mut self) {
        self.set();
    }
}

impl Stop {
    /// Whether it is time to stop.
    pub fn is_set(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

/// Becomes readable when it is time to stop, and stays so.
impl AsRawFd for Stop {
    fn as_raw_fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }
}
