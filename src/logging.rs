//! The log: one line a message on standard error, with journal priorities when systemd reads it.

use std::collections::VecDeque;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use env_logger::Builder;
use jiff::Timestamp;
use log::{Level, LevelFilter};

/// How many warnings and errors are remembered.
const REMEMBERED: usize = 20;

/// A warning or an error that was logged.
#[derive(Clone, Debug)]
pub struct Complaint {
    /// When.
    pub time: Timestamp,
    /// Warn or error.
    pub level: Level,
    /// The line.
    pub message: String,
}

/// Like standard error, this is every thread's.
static COMPLAINTS: Mutex<VecDeque<Complaint>> = Mutex::new(VecDeque::new());

/// The last warnings and errors, the latest last.
pub fn complaints() -> Vec<Complaint> {
    let complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    complaints.iter().cloned().collect()
}

fn remember(record: &log::Record<'_>) {
    let mut complaints = COMPLAINTS.lock().unwrap_or_else(PoisonError::into_inner);
    if complaints.len() == REMEMBERED {
        complaints.pop_front();
    }
    complaints.push_back(Complaint {
        time: Timestamp::now(),
        level: record.level(),
        message: record.args().to_string(),
    });
}

/// Starts logging. `timestamps` puts the time in front of each line.
pub fn start(level: LevelFilter, timestamps: bool) {
    let journal = is_journal();
    let mut builder = Builder::new();
    builder.filter_level(LevelFilter::Trace);
    // Libraries tell of their own threads and requests.
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
    // Only a second start in one process could fail.
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

/// Whether standard error is the stream that systemd named in `JOURNAL_STREAM` (systemd.exec(5)).
fn is_journal() -> bool {
    let Some(stream) = std::env::var_os("JOURNAL_STREAM") else {
        return false;
    };
    let stderr = std::fs::metadata("/proc/self/fd/2");
    stderr.is_ok_and(|s| stream.to_str() == Some(&format!("{}:{}", s.dev(), s.ino())))
}

/// sd-daemon(3)
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}
