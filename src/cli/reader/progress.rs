//! How far a long run is, on standard error.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(500);
/// The clock is read once for so many records.
const STRIDE: u64 = 4096;

/// Shows the progress.
pub struct Progress {
    is_wanted: bool,
    is_shown: bool,
    next: Instant,
    records: u64,
    /// The bytes of all inputs; 0 if unknown.
    total: u64,
    /// The bytes of the inputs that have been read.
    before: u64,
}

impl Progress {
    /// `is_wanted` is false if records go to the terminal meanwhile.
    pub fn new(is_wanted: bool, total: u64) -> Progress {
        Progress {
            is_wanted: is_wanted && stderr().is_terminal(),
            is_shown: false,
            next: Instant::now() + FIRST,
            records: 0,
            total,
            before: 0,
        }
    }

    /// A record has been read; `offset` is the place in its input.
    pub fn record(&mut self, offset: u64) {
        self.records += 1;
        if self.records.is_multiple_of(STRIDE) && self.is_wanted && Instant::now() >= self.next {
            self.next = Instant::now() + INTERVAL;
            self.is_shown = true;
            let records = self.records;
            let share = match self.total {
                0 => String::new(),
                total => format!("{} %, ", 100 * (self.before + offset).min(total) / total),
            };
            let _ = write!(stderr(), "\r{share}{records} records\x1b[K");
        }
    }

    /// An input has been read.
    pub fn input(&mut self, bytes: u64) {
        self.before += bytes;
    }

    /// Clears the line, so that a message can follow.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.is_shown) {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}
