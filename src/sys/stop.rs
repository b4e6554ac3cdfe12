//! The signal to stop, for threads that wait in a poll loop and for threads that check it regularly.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Sets the signal. The daemon holds it.
pub struct StopSwitch {
    stopped: Arc<AtomicBool>,
    writer: Option<PipeWriter>,
}

/// Receives the signal. Every plugin holds one.
#[derive(Clone)]
pub struct Stop {
    stopped: Arc<AtomicBool>,
    reader: Arc<PipeReader>,
}

/// Creates a switch and the signal that it sets.
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
    /// Signals every holder of the [`Stop`] to stop.
    pub fn set(&mut self) {
        self.stopped.store(true, Ordering::Release);
        // Closing the pipe wakes all threads that poll its other end.
        self.writer = None;
    }
}

/// Sets the signal, so that no thread waits for it forever.
impl Drop for StopSwitch {
    fn drop(&mut self) {
        self.set();
    }
}

impl Stop {
    /// Whether the signal is set.
    pub fn is_set(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

/// Becomes readable when the signal is set, and stays readable.
impl AsRawFd for Stop {
    fn as_raw_fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }
}
