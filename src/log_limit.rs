//! Keeps a repeated message from flooding the log: the first few go out whole, the rest as a count
//! every few seconds.

use std::time::{Duration, Instant};

use log::Level;

const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Limits the messages of one kind.
#[derive(Debug)]
pub struct LogLimit {
    level: Level,
    what: &'static str,
    since: Option<Instant>,
    logged: u32,
    held_back: u64,
}

impl LogLimit {
    /// `what` names the messages in the count: `named pipe: rejected lines`.
    pub fn new(level: Level, what: &'static str) -> LogLimit {
        LogLimit {
            level,
            what,
            since: None,
            logged: 0,
            held_back: 0,
        }
    }

    /// Logs the message, or counts it when enough of its kind went out lately.
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
            self.held_back += 1;
        }
        admitted
    }

    /// Reports what was held back once the period is over; to be called about once a second.
    pub fn tick(&mut self, now: Instant) {
        if self
            .since
            .is_some_and(|since| now.duration_since(since) >= PERIOD)
        {
            self.flush();
        }
    }

    /// Reports what was held back, now.
    pub fn flush(&mut self) {
        if self.held_back > 0 {
            let (what, more) = (self.what, self.held_back);
            let seconds = PERIOD.as_secs();
            log::log!(self.level, "{what}: {more} more within {seconds} s");
        }
        self.since = None;
        self.logged = 0;
        self.held_back = 0;
    }
}

/// A piece of foreign input as it may stand in a log line: escaped, cut, quoted.
pub fn quote(input: &[u8]) -> String {
    const MOST: usize = 100;
    let shown = &input[..input.len().min(MOST)];
    let shown = String::from_utf8_lossy(shown);
    let dots = if input.len() > MOST { "…" } else { "" };
    format!("\"{}{dots}\"", shown.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_few_of_a_period_are_logged_whole() {
        let mut limit = LogLimit::new(Level::Warn, "test");
        let start = Instant::now();
        let admitted = (0..1000).filter(|_| limit.admits(start)).count();
        assert_eq!((admitted, limit.held_back), (BURST as usize, 995));
        assert!(limit.admits(start + PERIOD));
        assert_eq!(limit.held_back, 0);
    }

    #[test]
    fn quoted_input_is_cut_and_cannot_forge_a_line() {
        assert_eq!(quote(b"a\nb\0\"\x1b[0m"), r#""a\nb\0\"\u{1b}[0m""#);
        assert!(quote(&[b'x'; 500]).len() < 110);
        assert_eq!(quote(&[0xff]), "\"\u{fffd}\"");
    }
}
