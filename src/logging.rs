//! The log: one line per message on standard error, with journal priorities if systemd reads it.

mod limit;

pub use limit::{LogLimit, quote};

use std::collections::VecDeque;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use env_logger::Builder;
use jiff::Timestamp;
use log::{Level, LevelFilter};

/// How many warnings and errors are kept.
const MAX_WARNINGS: usize = 20;

/// A warning or an error that was logged.
#[derive(Clone, Debug)]
pub struct LoggedWarning {
    /// When it was logged.
    pub time: Timestamp,
    /// Warn or error.
    pub level: Level,
    /// The text, without level and time.
    pub message: String,
}

/// Shared by all threads, like standard error.
static WARNINGS: Mutex<VecDeque<LoggedWarning>> = Mutex::new(VecDeque::new());

/// The last 20 warnings and errors, the latest last.
pub fn warnings() -> Vec<LoggedWarning> {
    let warnings = WARNINGS.lock().unwrap_or_else(PoisonError::into_inner);
    warnings.iter().cloned().collect()
}

fn remember(record: &log::Record<'_>) {
    let mut warnings = WARNINGS.lock().unwrap_or_else(PoisonError::into_inner);
    if warnings.len() == MAX_WARNINGS {
        warnings.pop_front();
    }
    warnings.push_back(LoggedWarning {
        time: Timestamp::now(),
        level: record.level(),
        message: record.args().to_string(),
    });
}

/// Starts logging at `level`. With `timestamps`, each line starts with the time.
pub fn start(level: LevelFilter, timestamps: bool) {
    let journal = is_journal();
    let mut builder = Builder::new();
    builder.filter_level(LevelFilter::Trace);
    // These libraries log their own threads and requests at lower levels.
    for library in ["neli", "ureq", "ureq_proto", "rustls", "mio"] {
        builder.filter_module(library, LevelFilter::Warn);
    }
    builder.format(move |out, record| {
        if record.level() <= Level::Warn {
            remember(record);
        }
        if journal {
            write!(out, "<{}>", priority(record.level()))?;
        }
        if timestamps {
            write!(out, "{:.6} ", Timestamp::now())?;
        }
        if !journal {
            write!(out, "{}: ", record.level().as_str().to_lowercase())?;
        }
        writeln!(out, "{}", record.args())
    });
    // Fails only if the logger is already set.
    let _ = builder.try_init();
    log::set_max_level(level);
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?");
        log::error!(
            "thread {name} panicked: {}",
            panic.to_string().replace('\n', " ")
        );
    }));
}

/// Whether standard error is the stream named in `JOURNAL_STREAM` by systemd (systemd.exec(5)).
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else {
        return false;
    };
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stderr.is_ok_and(|s| stream.to_str() == Some(&format!("{}:{}", s.dev(), s.ino())))
}

/// The journal priority, see sd-daemon(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}
