//! The namedPipe plugin: reads the lines that storage services write when a transfer starts and when it ends.
//!
//! A poll loop reads the pipe until it is empty. A pipe that was deleted or replaced is recreated within a second; the
//! old one is read until its last writer closes it.

pub mod line;
pub mod line_buffer;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::Level;
use nix::unistd::Gid;

use self::line::LineOutcome;
use self::line_buffer::{Line, LineBuffer, MAX_LINE_LENGTH};
use super::{Closed, EventSender, Plugin, now};
use crate::config;
use crate::error::{Context, Result};
use crate::logging::{LogLimit, quote};
use crate::metrics::{Metrics, Outcomes};
use crate::registry::{Registry, SharedRegistry};
use crate::sys::fifo::{Fifo, group_id};
use crate::sys::handover::Handover;
use crate::sys::ownership;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "namedPipe";
/// How often the loop checks whether the pipe is still in its place.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait for the rest of a line.
const PARTIAL_LINE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a stop keeps reading while writers keep writing.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes per read.
const READ_SIZE: usize = 64 * 1024;
/// Reads of one pipe before the loop turns to the others and to the stop.
const MAX_READS_PER_TURN: u32 = 16;
/// Deleted pipes that are still read because they have writers. Beyond this number, the oldest is closed.
const MAX_RETIRED_PIPES: usize = 8;

/// The plugin, with its pipe open.
pub struct NamedPipe {
    mode: u32,
    group: Option<Gid>,
    pipe: Fifo,
    waiter: Waiter,
    registry: SharedRegistry,
    counters: Outcomes<LineOutcome>,
    handover: Handover,
}

impl NamedPipe {
    /// Opens the pipe, creating it if it does not exist.
    pub fn new(
        config: &config::NamedPipe,
        registry: &SharedRegistry,
        metrics: &Metrics,
        handover: Handover,
    ) -> Result<NamedPipe> {
        let group = config
            .group
            .as_deref()
            .map(|group| group_id(group).context(|| format!("plugins.namedPipe.group {group}")))
            .transpose()?;
        let pipe = open(&config.path, config.mode, group).context(|| {
            format!(
                "named pipe {} (plugins.namedPipe.pipePath)",
                config.path.display()
            )
        })?;
        let waiter = Waiter::new().context(poll_loop)?;
        waiter.watch(pipe.file()).context(poll_loop)?;
        Ok(NamedPipe {
            mode: config.mode,
            group,
            pipe,
            waiter,
            registry: registry.clone(),
            counters: metrics.plugin(NAME),
            handover,
        })
    }
}

/// Sets the mode and group of an existing pipe to those of the configuration.
pub fn adjust(config: &config::NamedPipe) -> io::Result<()> {
    let group = config.group.as_deref().map(group_id).transpose()?;
    ownership::set_fifo_mode(&config.path, group, config.mode)
}

fn open(path: &std::path::Path, mode: u32, group: Option<Gid>) -> io::Result<Fifo> {
    let opened = Fifo::open(path, mode, group)?;
    if let Some(backup) = opened.backup {
        log::warn!(
            "namedPipe: {} was a regular file; renamed it to {} and created the pipe",
            path.display(),
            backup.display()
        );
    }
    Ok(opened.fifo)
}

fn poll_loop() -> String {
    "poll loop of the namedPipe plugin".to_owned()
}

impl Plugin for NamedPipe {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let mut waiter = self.waiter;
        waiter.watch(&stop).context(poll_loop)?;
        let mut handler = LineHandler {
            registry: self.registry.load(),
            counters: &self.counters,
            rejected_log: LogLimit::new(Level::Warn, "namedPipe: rejected lines"),
            events,
        };
        let mut failures = LogLimit::new(Level::Error, "namedPipe: failures");
        let mut pipe = self.pipe;
        let mut lines = LineReader::new();
        let mut retired: Vec<(File, LineReader)> = Vec::new();
        let mut last_check = Instant::now();
        let mut more = false;
        while !stop.is_set() {
            let timeout = if more { Duration::ZERO } else { CHECK_INTERVAL };
            waiter.wait(Some(timeout)).context(poll_loop)?;
            handler.registry = self.registry.load();
            let status = match lines.read(pipe.file(), &mut handler) {
                Err(Closed) => return Ok(()),
                Ok(status) => status,
            };
            more = status == ReadStatus::More;
            let mut closed = false;
            retired.retain_mut(|(file, lines)| match lines.read(file, &mut handler) {
                Ok(ReadStatus::More) => {
                    more = true;
                    true
                }
                Ok(ReadStatus::Empty) => true,
                Ok(ReadStatus::Ended) => false,
                Err(Closed) => {
                    closed = true;
                    false
                }
            });
            if closed {
                return Ok(());
            }
            let now = Instant::now();
            if now.duration_since(last_check) < CHECK_INTERVAL {
                continue;
            }
            last_check = now;
            handler.rejected_log.tick(now);
            failures.tick(now);
            if lines.finish_if_idle(now, &mut handler).is_err() {
                return Ok(());
            }
            if pipe.is_in_place() {
                continue;
            }
            let reopened = open(pipe.path(), self.mode, self.group).and_then(|new| {
                waiter.watch(new.file())?;
                Ok(new)
            });
            match reopened {
                Ok(new) => {
                    log::warn!(
                        "namedPipe: {} was deleted or replaced; recreated it",
                        pipe.path().display()
                    );
                    more = true;
                    let old = std::mem::replace(&mut pipe, new);
                    let old_lines = std::mem::replace(&mut lines, LineReader::new());
                    match old.retire() {
                        Ok(file) if waiter.watch(&file).is_ok() => retired.push((file, old_lines)),
                        _ => {}
                    }
                    if retired.len() > MAX_RETIRED_PIPES {
                        retired.remove(0);
                    }
                }
                Err(error) => failures.log(now, || {
                    let path = pipe.path().display();
                    format!("namedPipe: {path} was deleted or replaced, and cannot be recreated: {error}")
                }),
            }
        }
        self.handover.leave(NAME, pipe.file().as_fd());
        // A writer that opens the path from now on finds no pipe, instead of one without a reader.
        if !self.handover.is_begun()
            && let Err(error) = pipe.remove()
        {
            log::warn!(
                "namedPipe: cannot remove {}: {error}",
                pipe.path().display()
            );
        }
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        let mut sources: Vec<(&File, LineReader)> = Vec::new();
        match self.handover.is_begun() {
            // The successor continues with the next line.
            true if lines.finish_line(pipe.file(), &mut handler).is_err() => return Ok(()),
            true => {}
            false => sources.push((pipe.file(), lines)),
        }
        sources.extend(
            retired
                .iter_mut()
                .map(|(file, lines)| (&*file, std::mem::replace(lines, LineReader::new()))),
        );
        for (file, mut lines) in sources {
            while let Ok(ReadStatus::More) = lines.read(file, &mut handler) {
                if Instant::now() >= deadline {
                    log::warn!(
                        "namedPipe: writers kept writing while the daemon stopped; their last lines are lost"
                    );
                    break;
                }
            }
            if lines.finish(&mut handler).is_err() {
                break;
            }
        }
        handler.rejected_log.flush();
        Ok(())
    }
}

/// Parses lines, sends their flow events, and counts and logs those that are rejected.
struct LineHandler<'a> {
    registry: Arc<Registry>,
    counters: &'a Outcomes<LineOutcome>,
    rejected_log: LogLimit,
    events: EventSender,
}

impl LineHandler<'_> {
    fn handle(&mut self, line: Line<'_>, now: Timestamp) -> std::result::Result<(), Closed> {
        let (line, parsed) = match line {
            Line::Complete(line) => (line, line::parse(line, &self.registry, now)),
            Line::TooLong(line) => {
                self.reject(LineOutcome::TooLong, line, || {
                    format!("longer than {MAX_LINE_LENGTH} bytes")
                });
                return Ok(());
            }
        };
        match parsed {
            Ok(None) => {}
            Ok(Some(event)) => {
                self.counters.add(LineOutcome::Accepted);
                self.events.send(event)?;
            }
            Err(error) => self.reject(error.reason, line, || error.to_string()),
        }
        Ok(())
    }

    fn reject(&mut self, reason: LineOutcome, line: &[u8], detail: impl FnOnce() -> String) {
        self.counters.add(reason);
        self.rejected_log.log(Instant::now(), || {
            format!("namedPipe: rejected line {}: {}", quote(line), detail())
        });
    }
}

/// Why a turn of reading a pipe ended.
#[derive(PartialEq, Eq)]
enum ReadStatus {
    /// The limit of reads was reached; there may be more.
    More,
    /// The pipe is empty.
    Empty,
    /// All writers have closed it.
    Ended,
}

/// Reads the lines of one open pipe.
struct LineReader {
    buffer: LineBuffer,
    /// When the last bytes arrived.
    last_read: Instant,
}

impl LineReader {
    fn new() -> LineReader {
        LineReader {
            buffer: LineBuffer::new(READ_SIZE),
            last_read: Instant::now(),
        }
    }

    fn read(
        &mut self,
        mut file: &File,
        handler: &mut LineHandler<'_>,
    ) -> std::result::Result<ReadStatus, Closed> {
        for _ in 0..MAX_READS_PER_TURN {
            match file.read(self.buffer.space()) {
                Ok(0) => {
                    self.finish(handler)?;
                    return Ok(ReadStatus::Ended);
                }
                Ok(n) => self.commit(n, handler)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Empty, or a transient error: reading a FIFO has no others.
                Err(_) => return Ok(ReadStatus::Empty),
            }
        }
        Ok(ReadStatus::More)
    }

    /// Reads the rest of a partial line, if there is one and the rest arrives in time, and not a byte more.
    fn finish_line(
        &mut self,
        mut file: &File,
        handler: &mut LineHandler<'_>,
    ) -> std::result::Result<(), Closed> {
        let deadline = Instant::now() + PARTIAL_LINE_TIMEOUT;
        while self.buffer.has_partial() && Instant::now() < deadline {
            match file.read(&mut self.buffer.space()[..1]) {
                Ok(0) => break,
                Ok(n) => self.commit(n, handler)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
        self.finish(handler)
    }

    /// Handles the lines that the next `n` bytes of the buffer complete.
    fn commit(
        &mut self,
        n: usize,
        handler: &mut LineHandler<'_>,
    ) -> std::result::Result<(), Closed> {
        self.last_read = Instant::now();
        let now = now();
        let mut result = Ok(());
        self.buffer.commit(n, |line| {
            if result.is_ok() {
                result = handler.handle(line, now);
            }
        });
        result
    }

    /// Handles a partial line as a complete one if its rest does not arrive: the writer left without a newline.
    fn finish_if_idle(
        &mut self,
        now: Instant,
        handler: &mut LineHandler<'_>,
    ) -> std::result::Result<(), Closed> {
        if self.buffer.has_partial() && now.duration_since(self.last_read) >= PARTIAL_LINE_TIMEOUT {
            return self.finish(handler);
        }
        Ok(())
    }

    fn finish(&mut self, handler: &mut LineHandler<'_>) -> std::result::Result<(), Closed> {
        let now = now();
        let mut result = Ok(());
        self.buffer
            .finish(|line| result = handler.handle(line, now));
        result
    }
}
