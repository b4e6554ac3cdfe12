//! What both daemons do as a service: signals, readiness and watchdog, reloads, shutdown, the PID file.

mod notifier;
mod pid_file;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use log::LevelFilter;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::error::{ConfigError, Context, Error, Result};
use crate::sys::privileges;
pub use notifier::Notifier;
pub use pid_file::PidFile;

/// Exit status after SIGUSR2, EX_TEMPFAIL of sysexits(3): the unit makes systemd start the daemon again at once.
const EXIT_CODE_RESTART: u8 = 75;
/// How long threads may take to end on a stop.
pub const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// A normal stop finishes within this time; until then a second signal is ignored.
const SECOND_SIGNAL_GRACE: Duration = Duration::from_secs(2);

/// A message to the main thread of a service with the configuration `C`.
pub enum Notice<C> {
    /// A signal arrived.
    Signal(i32),
    /// A reload has read the configuration file.
    Loaded(Box<std::result::Result<C, ConfigError>>),
    /// A thread has ended.
    Ended(String, Result<()>),
}

/// What a reload did.
pub enum Reload {
    /// The new configuration is in effect, with this level of the log.
    Applied(LevelFilter),
    /// The previous configuration stays in effect; the reason is for the operator.
    Refused(String),
}

/// A daemon whose threads run.
pub trait Service {
    /// Its checked configuration.
    type Config: Send + 'static;

    /// The number of running threads that the service must not lose.
    fn running(&self) -> usize;
    /// Records that a thread has ended.
    fn ended(&mut self, thread: &str);
    /// The next notice that arrived while a reload waited for others.
    fn next_deferred_notice(&mut self) -> Option<Notice<Self::Config>> {
        None
    }
    /// Makes all threads end, without losing what was accepted.
    fn stop(&mut self);
    /// Called before [`Service::stop`] if the next process takes over.
    fn hand_over(&mut self);
    /// Applies a configuration. An error means that the daemon has lost a part, and must stop.
    fn reload(
        &mut self,
        config: Self::Config,
        inbox: &Receiver<Notice<Self::Config>>,
    ) -> Result<Reload>;
    /// Called after every reload, also after one that was refused.
    fn reload_ended(&mut self) {}
    /// Called on SIGUSR1, before the status is logged.
    fn user_signal(&mut self) {}
    /// The counters that are not zero, for the log.
    fn summary(&self) -> String;
    /// A number that changes while the daemon works. If it does not, systemd restarts the daemon.
    fn beats(&mut self) -> u64;
}

/// Reads a configuration file.
pub type Load<C> = Box<dyn Fn(&Path) -> std::result::Result<C, ConfigError> + Send + Sync>;

/// The work of the main thread once all others run.
pub struct Supervisor<S: Service> {
    service: S,
    notifier: Notifier,
    inbox: Receiver<Notice<S::Config>>,
    notices: Sender<Notice<S::Config>>,
    load: Arc<Load<S::Config>>,
    path: PathBuf,
    /// Whether the command line sets the level of the log.
    has_fixed_log_level: bool,
    started: Instant,
    result: Result<()>,
    /// The exit code of an orderly stop.
    exit_code: ExitCode,
    /// A thread reads the configuration file.
    reading: bool,
    reload_again: bool,
}

impl<S: Service> Supervisor<S> {
    /// Notifies systemd that the service is ready. `load` reads the configuration file at `path` on a reload.
    pub fn new(
        service: S,
        notifier: Notifier,
        notices: Sender<Notice<S::Config>>,
        inbox: Receiver<Notice<S::Config>>,
        load: Load<S::Config>,
        path: PathBuf,
        has_fixed_log_level: bool,
    ) -> Supervisor<S> {
        notifier.notify(&[NotifyState::Ready]);
        Supervisor {
            service,
            notifier,
            inbox,
            notices,
            load: Arc::new(load),
            path,
            has_fixed_log_level,
            started: Instant::now(),
            result: Ok(()),
            exit_code: ExitCode::SUCCESS,
            reading: false,
            reload_again: false,
        }
    }

    /// Handles signals until the service has stopped, and returns the exit code. It is an error if a thread dies.
    pub fn run(mut self) -> Result<ExitCode> {
        let result = self.supervise();
        self.log_status("stopped");
        result.and(self.result).map(|()| self.exit_code)
    }

    fn supervise(&mut self) -> Result<()> {
        let watchdog = sd_notify::watchdog_enabled().map(|period| period / 2);
        let mut beats = 0;
        let mut deadline = None;
        while self.service.running() > 0 {
            let timeout = match deadline {
                Some(deadline) => Instant::now()
                    .checked_duration_since(deadline)
                    .map_or(Duration::from_millis(100), |_| Duration::ZERO),
                None => watchdog.unwrap_or(Duration::from_secs(3600)),
            };
            let notice = match self.service.next_deferred_notice() {
                Some(notice) => Ok(notice),
                None => self.inbox.recv_timeout(timeout),
            };
            match notice {
                Ok(Notice::Signal(SIGUSR1)) => {
                    self.service.user_signal();
                    self.log_status("status");
                }
                Ok(Notice::Signal(SIGHUP)) if deadline.is_none() => self.reload(),
                Ok(Notice::Loaded(loaded)) if deadline.is_none() => {
                    if let Err(error) = self.finish_reload(*loaded) {
                        let why = format!("{error}: stopping");
                        deadline = Some(self.stop(&why));
                        self.result = Err(error);
                    }
                }
                Ok(Notice::Signal(SIGHUP) | Notice::Loaded(_)) => {}
                Ok(Notice::Signal(SIGUSR2)) if deadline.is_none() => {
                    self.service.hand_over();
                    self.exit_code = ExitCode::from(EXIT_CODE_RESTART);
                    deadline = Some(self.stop("SIGUSR2: stopping, the next process takes over"));
                }
                Ok(Notice::Signal(SIGUSR2)) => {}
                Ok(Notice::Signal(_)) if deadline.is_some() => {
                    // Ctrl-C can deliver SIGINT twice (terminal and wrapper script). Only a second signal after the grace
                    // period forces an immediate exit.
                    if deadline.is_some_and(|d| {
                        d.saturating_duration_since(Instant::now())
                            < STOP_DEADLINE - SECOND_SIGNAL_GRACE
                    }) {
                        return Err(Error::Failed(
                            "second stop signal while stopping: ended at once".to_owned(),
                        ));
                    }
                }
                Ok(Notice::Signal(signal)) => {
                    let name = if signal == SIGINT {
                        "SIGINT"
                    } else {
                        "SIGTERM"
                    };
                    deadline = Some(self.stop(&format!("{name}: stopping")));
                }
                Ok(Notice::Ended(name, result)) => {
                    self.service.ended(&name);
                    self.thread_ended(&name, result, &mut deadline);
                }
                Err(RecvTimeoutError::Timeout) if deadline.is_some_and(|d| Instant::now() >= d) => {
                    let message = format!(
                        "{} threads did not end within {} s",
                        self.service.running(),
                        STOP_DEADLINE.as_secs()
                    );
                    return Err(Error::Failed(message));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            // If the daemon hangs, systemd gets no more keep-alives and restarts it.
            let now = self.service.beats();
            if watchdog.is_some() && now != std::mem::replace(&mut beats, now) {
                self.notifier.notify(&[NotifyState::Watchdog]);
            }
        }
        Ok(())
    }

    fn stop(&mut self, why: &str) -> Instant {
        log::info!("{why}");
        self.notifier.notify(&[NotifyState::Stopping]);
        self.service.stop();
        Instant::now() + STOP_DEADLINE
    }

    /// During a stop threads are meant to end; at any other time the end of one stops the daemon.
    fn thread_ended(&mut self, name: &str, result: Result<()>, deadline: &mut Option<Instant>) {
        let error = match (result, &deadline) {
            (Ok(()), Some(_)) => return,
            (Ok(()), None) => Error::Failed(format!("thread {name} ended unexpectedly")),
            (Err(error), _) => Error::Failed(format!("thread {name} died: {error}")),
        };
        if deadline.is_none() {
            *deadline = Some(self.stop(&format!("{error}: stopping")));
        }
        if self.result.is_ok() {
            self.result = Err(error);
        }
    }

    /// Reads the configuration file, on a thread of its own: signals are answered meanwhile. A reload that is asked for
    /// while the file is read begins when this one has ended.
    fn reload(&mut self) {
        if self.reading {
            self.reload_again = true;
            return;
        }
        self.notifier.notify(&[
            NotifyState::Reloading,
            NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading),
        ]);
        let (path, notices, load) = (
            self.path.clone(),
            self.notices.clone(),
            Arc::clone(&self.load),
        );
        let read = move || {
            // Nobody receives it after a stop.
            let _ = notices.send(Notice::Loaded(Box::new(load(&path))));
        };
        let thread = thread::Builder::new().name("configuration".to_owned());
        match thread.spawn(read) {
            Ok(_) => self.reading = true,
            Err(error) => {
                self.report_refused_reload(&format!("thread configuration: {error}"));
                self.notifier.notify(&[NotifyState::Ready]);
            }
        }
    }

    /// Applies the configuration that was read. One that is refused is only logged.
    fn finish_reload(&mut self, loaded: std::result::Result<S::Config, ConfigError>) -> Result<()> {
        self.reading = false;
        let result = match loaded {
            Ok(config) => match self.service.reload(config, &self.inbox) {
                Ok(Reload::Applied(log_level)) => {
                    if !self.has_fixed_log_level {
                        log::set_max_level(log_level);
                    }
                    self.notifier.notify(&[NotifyState::Status("")]);
                    Ok(())
                }
                Ok(Reload::Refused(reason)) => {
                    self.report_refused_reload(&reason);
                    Ok(())
                }
                Err(error) => Err(error),
            },
            Err(error) => {
                self.report_refused_reload(&error);
                Ok(())
            }
        };
        self.service.reload_ended();
        self.notifier.notify(&[NotifyState::Ready]);
        if std::mem::take(&mut self.reload_again) && result.is_ok() {
            self.reload();
        }
        result
    }

    /// Logs why a reload was refused, and shows it in `systemctl status`.
    fn report_refused_reload(&self, error: &dyn std::fmt::Display) {
        let text = format!("reload: {error}; the previous configuration stays in effect");
        log::error!("{text}");
        self.notifier.notify(&[NotifyState::Status(&text)]);
    }

    fn log_status(&self, what: &str) {
        let up = self.started.elapsed().as_secs();
        log::info!("{what}: up {up} s, {}", self.service.summary());
    }
}

/// Forwards the signals of a service to the main thread.
pub fn listen_for_signals<C: Send + 'static>(notices: Sender<Notice<C>>) -> Result<()> {
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2]);
    let mut signals = signals.context(|| "signal handlers".to_owned())?;
    let forward = move || {
        privileges::drop_all();
        for signal in signals.forever() {
            if notices.send(Notice::Signal(signal)).is_err() {
                return;
            }
        }
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(forward)
        .context(|| "thread signals".to_owned())?;
    Ok(())
}

/// Waits until a thread has ended, and returns its result. Other notices that arrive meanwhile are deferred.
///
/// # Errors
///
/// The thread did not end within [`STOP_DEADLINE`].
pub fn wait_until_ended<C>(
    inbox: &Receiver<Notice<C>>,
    thread: &str,
    deferred: &mut VecDeque<Notice<C>>,
) -> Result<Result<()>> {
    let deadline = Instant::now() + STOP_DEADLINE;
    loop {
        match inbox.recv_deadline(deadline) {
            Ok(Notice::Ended(name, result)) if name == thread => return Ok(result),
            Ok(other) => deferred.push_back(other),
            Err(_) => return Err(Error::Failed(format!("thread {thread} did not end"))),
        }
    }
}

/// Runs `work` on a thread of this name, and sends a notice when it ends.
pub fn spawn<C: Send + 'static>(
    name: String,
    notices: Sender<Notice<C>>,
    work: Box<dyn FnOnce() -> Result<()> + Send>,
) -> Result<()> {
    let (thread, what) = (name.clone(), name.clone());
    let work = move || {
        // After a panic the state of the thread is dropped and never used again; its channels close.
        let result = catch_unwind(AssertUnwindSafe(work));
        let result = result.unwrap_or_else(|_| Err(Error::Failed("it panicked".to_owned())));
        let _ = notices.send(Notice::Ended(name, result));
    };
    thread::Builder::new()
        .name(thread)
        .spawn(work)
        .context(|| format!("thread {what}"))?;
    Ok(())
}
