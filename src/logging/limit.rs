//! Keeps repeated messages from flooding the log: the first few of a period are logged, the rest are only counted.

use std::time::{Duration, Instant};

use log::Level;

/// Messages that are logged within a [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Limits the rate of one kind of message.
#[derive(Debug)]
pub struct LogLimit {
    level: Level,
    kind: &'static str,
    /// When the current period started.
    since: Option<Instant>,
    logged: u32,
    suppressed: u64,
}

impl LogLimit {
    /// `kind` names the messages where they are only counted: `named pipe: rejected lines`.
    pub fn new(level: Level, kind: &'static str) -> LogLimit {
        LogLimit {
            level,
            kind,
            since: None,
            logged: 0,
            suppressed: 0,
        }
    }

    /// Logs the message, or counts it if the limit of the current period is reached.
    pub fn log(&mut self, now: Instant, message: impl FnOnce() -> String) {
        if self.admits(now) {
            log::log!(self.level, "{}", message());
        }
    }

    fn admits(&mut self, now: Instant) -> bool {
        self.tick(now);
        self.since.get_or_insert(now);
        let admitted = self.logged < BURST;
        if admitted {
            self.logged += 1;
        } else {
            self.suppressed += 1;
        }
        admitted
    }

    /// Logs how many messages were suppressed, once the period is over. Call about once a second.
    pub fn tick(&mut self, now: Instant) {
        if self
            .since
            .is_some_and(|since| now.duration_since(since) >= PERIOD)
        {
            self.flush();
        }
    }

    /// Logs now how many messages were suppressed.
    pub fn flush(&mut self) {
        if self.suppressed > 0 {
            let (kind, more) = (self.kind, self.suppressed);
            let seconds = PERIOD.as_secs();
            log::log!(self.level, "{kind}: {more} more within {seconds} s");
        }
        self.since = None;
        self.logged = 0;
        self.suppressed = 0;
    }
}

/// Quotes untrusted input for a log line: escaped, and cut to 100 bytes.
pub fn quote(input: &[u8]) -> String {
    const MAX_QUOTED_BYTES: usize = 100;
    let shown = &input[..input.len().min(MAX_QUOTED_BYTES)];
    let shown = String::from_utf8_lossy(shown);
    let dots = if input.len() > MAX_QUOTED_BYTES {
        "…"
    } else {
        ""
    };
    format!("\"{}{dots}\"", shown.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_messages_of_a_period_are_logged_and_the_rest_counted() {
        let mut limit = LogLimit::new(Level::Warn, "test");
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| limit.admits(start)).count();
        assert_eq!((admitted, limit.suppressed), (BURST as usize, 995));
        assert!(limit.admits(start + PERIOD));
        assert_eq!(limit.suppressed, 0);
    }

    #[test]
    fn quoted_input_is_cut_and_cannot_forge_a_line() {
        assert_eq!(quote(b"a\nb\0\"\x1b[0m"), r#""a\nb\0\"\u{1b}[0m""#);
        assert!(quote(&[b'x'; 500]).len() < 110);
        assert_eq!(quote(&[0xff]), "\"\u{fffd}\"");
    }
}
