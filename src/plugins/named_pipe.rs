//! The named pipe plugin: storage services write a line when a transfer starts and when it ends.
//!
//! The pipe is read on a poll loop until it is empty. One that somebody deletes or replaces is made
//! again within a second; the old one is read until its last writer closes it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::Level;
use nix::unistd::Gid;

use super::{Closed, EventSender, Plugin, now};
use crate::config;
use crate::error::{Context, Result};
use crate::line_buffer::{Line, LineBuffer, MAX_LINE};
use crate::log_limit::{LogLimit, quote};
use crate::metrics::{Metrics, Outcomes};
use crate::pipe_line::{self, LineOutcome};
use crate::registry::{Handle, Registry};
use crate::sys::fifo::{Fifo, group_id};
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "named_pipe";
/// What the loop does when nothing happens: see whether the pipe is still there.
const TICK: Duration = Duration::from_secs(1);
/// How long the rest of a line is waited for.
const LINE_PATIENCE: Duration = Duration::from_secs(1);
/// How long a stop waits for writers that do not stop writing.
const DRAIN: Duration = Duration::from_secs(1);
const READ_SIZE: usize = 64 * 1024;
/// Reads in a row before the loop looks at anything else.
const READS: u32 = 16;
/// Deleted pipes that still have writers; beyond it the oldest is given up.
const RETIRED: usize = 8;

/// The plugin, with its pipe open.
pub struct NamedPipe {
    mode: u32,
    group: Option<Gid>,
    pipe: Fifo,
    waiter: Waiter,
    registry: Handle,
    counters: Outcomes<LineOutcome>,
    handover: Handover,
}

impl NamedPipe {
    /// Opens the pipe, making it if it is not there.
    pub fn new(
        config: &config::NamedPipe,
        registry: &Handle,
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

/// Gives a pipe that is there the mode and group of these settings.
pub fn adjust(config: &config::NamedPipe) -> io::Result<()> {
    let group = config.group.as_deref().map(group_id).transpose()?;
    nix::unistd::chown(&config.path, None, group)?;
    fs::set_permissions(&config.path, fs::Permissions::from_mode(config.mode))
}

fn open(path: &std::path::Path, mode: u32, group: Option<Gid>) -> io::Result<Fifo> {
    let opened = Fifo::open(path, mode, group)?;
    if let Some(aside) = opened.moved_aside {
        log::warn!(
            "named pipe {}: a regular file stood in its place, kept as {}",
            path.display(),
            aside.display()
        );
    }
    Ok(opened.fifo)
}

fn poll_loop() -> String {
    "poll loop of the named pipe".to_owned()
}

impl Plugin for NamedPipe {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let mut waiter = self.waiter;
        waiter.watch(&stop).context(poll_loop)?;
        let mut intake = Intake {
            registry: self.registry.load(),
            counters: &self.counters,
            rejected: LogLimit::new(Level::Warn, "named pipe: rejected lines"),
            events,
        };
        let mut trouble = LogLimit::new(Level::Error, "named pipe: failures");
        let mut pipe = self.pipe;
        let mut lines = Lines::new();
        let mut retired: Vec<(File, Lines)> = Vec::new();
        let mut checked = Instant::now();
        let mut more = false;
        while !stop.is_set() {
            let patience = if more { Duration::ZERO } else { TICK };
            waiter.wait(Some(patience)).context(poll_loop)?;
            intake.registry = self.registry.load();
            let read = match lines.read(pipe.file(), &mut intake) {
                Err(Closed) => return Ok(()),
                Ok(read) => read,
            };
            more = read == Reading::More;
            let mut closed = false;
            retired.retain_mut(|(file, lines)| match lines.read(file, &mut intake) {
                Ok(Reading::More) => {
                    more = true;
                    true
                }
                Ok(Reading::Empty) => true,
                Ok(Reading::Ended) => false,
                Err(Closed) => {
                    closed = true;
                    false
                }
            });
            if closed {
                return Ok(());
            }
            let now = Instant::now();
            if now.duration_since(checked) < TICK {
                continue;
            }
            checked = now;
            intake.rejected.tick(now);
            trouble.tick(now);
            if lines.give_up_waiting(now, &mut intake).is_err() {
                return Ok(());
            }
            if pipe.is_in_place() {
                continue;
            }
            let again = open(pipe.path(), self.mode, self.group).and_then(|new| {
                waiter.watch(new.file())?;
                Ok(new)
            });
            match again {
                Ok(new) => {
                    log::warn!(
                        "named pipe {}: was deleted or replaced, made again",
                        pipe.path().display()
                    );
                    more = true;
                    let old = std::mem::replace(&mut pipe, new);
                    let old_lines = std::mem::replace(&mut lines, Lines::new());
                    match old.retire() {
                        Ok(file) if waiter.watch(&file).is_ok() => retired.push((file, old_lines)),
                        _ => {}
                    }
                    if retired.len() > RETIRED {
                        retired.remove(0);
                    }
                }
                Err(error) => trouble.log(now, || {
                    let path = pipe.path().display();
                    format!("named pipe {path}: was deleted and cannot be made again: {error}")
                }),
            }
        }
        self.handover.leave(NAME, pipe.file().as_fd());
        // Whoever comes now finds no pipe, instead of one that nobody reads.
        if !self.handover.is_begun()
            && let Err(error) = pipe.remove()
        {
            log::warn!(
                "named pipe {}: cannot be removed: {error}",
                pipe.path().display()
            );
        }
        let deadline = Instant::now() + DRAIN;
        let mut sources: Vec<(&File, Lines)> = Vec::new();
        match self.handover.is_begun() {
            // Who takes over goes on with the next line.
            true if lines.finish_line(pipe.file(), &mut intake).is_err() => return Ok(()),
            true => {}
            false => sources.push((pipe.file(), lines)),
        }
        sources.extend(
            retired
                .iter_mut()
                .map(|(file, lines)| (&*file, std::mem::replace(lines, Lines::new()))),
        );
        for (file, mut lines) in sources {
            while let Ok(Reading::More) = lines.read(file, &mut intake) {
                if Instant::now() >= deadline {
                    log::warn!(
                        "named pipe: writers kept writing while the daemon stopped; what they wrote last is lost"
                    );
                    break;
                }
            }
            if lines.finish(&mut intake).is_err() {
                break;
            }
        }
        intake.rejected.flush();
        Ok(())
    }
}

/// Turns lines into flow events, counts them, and says what is wrong with the others.
struct Intake<'a> {
    registry: Arc<Registry>,
    counters: &'a Outcomes<LineOutcome>,
    rejected: LogLimit,
    events: EventSender,
}

impl Intake<'_> {
    fn take(&mut self, line: Line<'_>, now: Timestamp) -> std::result::Result<(), Closed> {
        let (line, parsed) = match line {
            Line::Whole(line) => (line, pipe_line::parse(line, &self.registry, now)),
            Line::TooLong(line) => {
                self.reject(LineOutcome::TooLong, line, || {
                    format!("longer than {MAX_LINE} bytes")
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

    fn reject(&mut self, reason: LineOutcome, line: &[u8], why: impl FnOnce() -> String) {
        self.counters.add(reason);
        self.rejected.log(Instant::now(), || {
            format!("named pipe: rejected line {}: {}", quote(line), why())
        });
    }
}

#[derive(PartialEq, Eq)]
enum Reading {
    /// There may be more.
    More,
    /// The pipe is empty.
    Empty,
    /// All writers have closed it.
    Ended,
}

/// The lines of one open pipe.
struct Lines {
    buffer: LineBuffer,
    /// When the last bytes came.
    last: Instant,
}

impl Lines {
    fn new() -> Lines {
        Lines {
            buffer: LineBuffer::new(READ_SIZE),
            last: Instant::now(),
        }
    }

    fn read(
        &mut self,
        mut file: &File,
        intake: &mut Intake<'_>,
    ) -> std::result::Result<Reading, Closed> {
        for _ in 0..READS {
            match file.read(self.buffer.space()) {
                Ok(0) => {
                    self.finish(intake)?;
                    return Ok(Reading::Ended);
                }
                Ok(n) => self.take(n, intake)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Reading a FIFO has no other error that waiting would not cure.
                Err(_) => return Ok(Reading::Empty),
            }
        }
        Ok(Reading::More)
    }

    /// Reads the rest of a line that has begun, if there is one and it comes soon, and not a byte more.
    fn finish_line(
        &mut self,
        mut file: &File,
        intake: &mut Intake<'_>,
    ) -> std::result::Result<(), Closed> {
        let deadline = Instant::now() + LINE_PATIENCE;
        while self.buffer.has_partial() && Instant::now() < deadline {
            match file.read(&mut self.buffer.space()[..1]) {
                Ok(0) => break,
                Ok(n) => self.take(n, intake)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
        self.finish(intake)
    }

    /// Bytes that have come.
    fn take(&mut self, n: usize, intake: &mut Intake<'_>) -> std::result::Result<(), Closed> {
        self.last = Instant::now();
        let now = now();
        let mut result = Ok(());
        self.buffer.commit(n, |line| {
            if result.is_ok() {
                result = intake.take(line, now);
            }
        });
        result
    }

    /// A writer that left without a newline has said all it had to say.
    fn give_up_waiting(
        &mut self,
        now: Instant,
        intake: &mut Intake<'_>,
    ) -> std::result::Result<(), Closed> {
        if self.buffer.has_partial() && now.duration_since(self.last) >= LINE_PATIENCE {
            return self.finish(intake);
        }
        Ok(())
    }

    fn finish(&mut self, intake: &mut Intake<'_>) -> std::result::Result<(), Closed> {
        let now = now();
        let mut result = Ok(());
        self.buffer.finish(|line| result = intake.take(line, now));
        result
    }
}
