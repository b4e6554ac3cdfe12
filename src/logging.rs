//! The log: one line a message on standard error, with journal priorities when systemd reads it.

use std::io::Write;
use std::os::unix::fs::MetadataExt;

use env_logger::Builder;
use jiff::Timestamp;
use log::{Level, LevelFilter};

/// Starts logging. `timestamps` puts the time in front of each line.
pub fn start(level: LevelFilter, timestamps: bool) {
    let journal = is_journal();
    let mut builder = Builder::new();
    builder.filter_level(level);
    // The netlink library tells of its own threads.
    builder.filter_module("neli", level.min(LevelFilter::Warn));
    builder.format(move |out, record| {
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
