//! Builds everything, starts the threads, and sees to signals, readiness, watchdog, reloads and the orderly
//! end.

mod parts;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use jiff::Timestamp;
use log::{Level, LevelFilter};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::config::{self, Config};
use crate::control::Control;
use crate::dispatcher::{Dispatcher, Heartbeat};
use crate::echo::EchoFilter;
use crate::error::{Context, Error, Result};
use crate::flow_table::FlowTable;
use crate::journal::Journal;
use crate::metrics::Metrics;
use crate::public_addresses::Known;
use crate::registry::{self, Handle};
use crate::routes::{Routes, Sources};
use crate::sys::stop::{StopSwitch, stop};
use crate::sys::{privileges, state_dir};
use parts::{Parts, spawn};

/// What the process ends with on SIGUSR2, EX_TEMPFAIL of sysexits(3): systemd starts it again at once.
const RESTART: u8 = 75;
/// Events that wait for the dispatcher.
const DISPATCHER_QUEUE: usize = 4096;
/// Questions that wait for the dispatcher.
const QUERIES: usize = 16;
/// How long threads may take to end.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// How long a stop takes at most in good health: until then a second signal is not impatience.
const IN_TIME: Duration = Duration::from_secs(2);

/// What the main thread waits for.
enum Notice {
    Signal(i32),
    /// A thread has ended.
    Ended(String, Result<()>),
}

/// Runs the daemon until it is told to stop, which gives the exit code, or until one of its threads dies, which is an error.
/// `path` is where `config` was read, and is read again on a reload; `log_level` is the command line's.
pub fn run(config: Config, path: &Path, log_level: Option<LevelFilter>) -> Result<ExitCode> {
    privileges::no_new_privileges();
    let (notices, inbox) = unbounded();
    listen_for_signals(notices.clone())?;
    let _lock = state_dir::lock(&config.state_dir)?;
    let pid_file = PidFile::write(&config);
    config.log_remarks();

    let metrics = Metrics::new();
    let (known, source) = registry::known(&config.registry);
    log::debug!("registry: {source}");
    let registry = Handle::new(known);
    let mut table = FlowTable::new(config.flows.max_flows);
    let journal = Journal::open(&config.state_dir, &mut table, &metrics)
        .context(|| format!("journal in {} (stateDir)", config.state_dir.display()))?;
    if !table.is_empty() {
        log::info!(
            "{} flows are open from before, by {}",
            table.len(),
            journal.path().display()
        );
    }
    let (ask, queries) = bounded(QUERIES);
    let sources = Sources {
        queries: ask,
        registry: registry.clone(),
        public: Known::default(),
        metrics: metrics.clone(),
        setup: Arc::new(ArcSwap::from_pointee(parts::setup(&config)?)),
        started: Timestamp::now(),
    };
    let (channel, events) = bounded(DISPATCHER_QUEUE);
    let built = Parts::build(&config, &sources)?;
    let control = Control::new(&config.control_socket, Routes::new(sources.clone()))?;
    let wishes = keep_registry(&config, &registry, &metrics)?;

    // Everything is acquired. Threads that are started from now on have no more than this one.
    privileges::keep(&privileges::kept(&config));
    let (switch, stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
    let mut parts = Parts::new(sources, channel, notices.clone());
    let outputs = parts.start_backends(built.backends, &config, &table)?;
    let dispatcher = Dispatcher::new(
        table,
        journal,
        outputs,
        config.flows.max_age,
        config.firefly_plugin.is_some().then(EchoFilter::default),
        &metrics,
    );
    let heartbeat = dispatcher.heartbeat();
    let dispatch = move || {
        privileges::keep_none();
        dispatcher.run(&events, queries);
        Ok(())
    };
    spawn("dispatcher".to_owned(), notices.clone(), Box::new(dispatch))?;
    parts.start_plugins(built.plugins)?;
    let mut others = 1;
    if let Some(control) = control {
        let serve = move || {
            privileges::keep_none();
            control.run(stop)
        };
        spawn("control".to_owned(), notices, Box::new(serve))?;
        others += 1;
    }

    log_ready("is ready", &config);
    notify(&[NotifyState::Ready]);
    let supervisor = Supervisor {
        inbox,
        switch,
        parts,
        others,
        metrics,
        heartbeat,
        started: Instant::now(),
        result: Ok(()),
        ending: ExitCode::SUCCESS,
        config,
        path: path.to_owned(),
        log_level,
        wishes,
    };
    let result = supervisor.run();
    drop(pid_file);
    result
}

fn log_ready(what: &str, config: &Config) {
    log::info!(
        "flowd-rs {} {what}: plugins {}; backends {}",
        env!("CARGO_PKG_VERSION"),
        config.plugin_names().join(", "),
        config.backend_names().join(", ")
    );
}

/// The main thread's part once all others run.
struct Supervisor {
    inbox: Receiver<Notice>,
    switch: StopSwitch,
    parts: Parts,
    /// Threads that run beside the parts: the dispatcher, the control socket.
    others: usize,
    metrics: Metrics,
    heartbeat: Heartbeat,
    started: Instant,
    result: Result<()>,
    /// What an orderly stop ends with.
    ending: ExitCode,
    config: Config,
    path: PathBuf,
    log_level: Option<LevelFilter>,
    wishes: Sender<config::Registry>,
}

impl Supervisor {
    fn run(mut self) -> Result<ExitCode> {
        let result = self.supervise();
        self.log_status("stopped");
        result.and(self.result).map(|()| self.ending)
    }

    fn supervise(&mut self) -> Result<()> {
        let watchdog = sd_notify::watchdog_enabled().map(|period| period / 2);
        let mut beats = 0;
        let mut deadline = None;
        while self.others + self.parts.running() > 0 {
            let patience = match deadline {
                Some(deadline) => Instant::now()
                    .checked_duration_since(deadline)
                    .map_or(Duration::from_millis(100), |_| Duration::ZERO),
                None => watchdog.unwrap_or(Duration::from_secs(3600)),
            };
            let notice = match self.parts.aside() {
                Some(notice) => Ok(notice),
                None => self.inbox.recv_timeout(patience),
            };
            match notice {
                Ok(Notice::Signal(SIGUSR1)) => self.log_status("status"),
                Ok(Notice::Signal(SIGHUP)) if deadline.is_none() => {
                    if let Err(error) = self.reload() {
                        let why = format!("{error}: stopping");
                        deadline = Some(self.stop(&why));
                        self.result = Err(error);
                    }
                }
                Ok(Notice::Signal(SIGHUP)) => {}
                Ok(Notice::Signal(SIGUSR2)) if deadline.is_none() => {
                    self.parts.hand_over();
                    self.ending = ExitCode::from(RESTART);
                    deadline = Some(self.stop("SIGUSR2: stopping for the next process"));
                }
                Ok(Notice::Signal(SIGUSR2)) => {}
                Ok(Notice::Signal(_)) if deadline.is_some() => {
                    // A terminal and a script may both say it; who says it again later means it.
                    if deadline.is_some_and(|d| {
                        d.saturating_duration_since(Instant::now()) < STOP_DEADLINE - IN_TIME
                    }) {
                        return Err(Error::Failed(
                            "told to stop again while stopping: ended at once".to_owned(),
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
                    if !self.parts.ended(&name) {
                        self.others -= 1;
                    }
                    self.thread_ended(&name, result, &mut deadline);
                }
                Err(RecvTimeoutError::Timeout) if deadline.is_some_and(|d| Instant::now() >= d) => {
                    let message = format!(
                        "{} threads did not end within {} s",
                        self.others + self.parts.running(),
                        STOP_DEADLINE.as_secs()
                    );
                    return Err(Error::Failed(message));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            // A dispatcher that hangs gets no more pings, and the daemon is restarted.
            let now = self.heartbeat.beats();
            if watchdog.is_some() && now != std::mem::replace(&mut beats, now) {
                notify(&[NotifyState::Watchdog]);
            }
        }
        Ok(())
    }

    fn stop(&mut self, why: &str) -> Instant {
        log::info!("{why}");
        notify(&[NotifyState::Stopping]);
        self.parts.stop();
        self.switch.set();
        Instant::now() + STOP_DEADLINE
    }

    /// During a stop a thread ends as it should; at any other time the daemon goes down with it.
    fn thread_ended(&mut self, name: &str, result: Result<()>, deadline: &mut Option<Instant>) {
        let error = match (result, &deadline) {
            (Ok(()), Some(_)) => return,
            (Ok(()), None) => Error::Failed(format!("thread {name} ended by itself")),
            (Err(error), _) => Error::Failed(format!("thread {name} died: {error}")),
        };
        if deadline.is_none() {
            *deadline = Some(self.stop(&format!("{error}: stopping")));
        }
        if self.result.is_ok() {
            self.result = Err(error);
        }
    }

    /// By the file as it is now. A wrong one is only said; an error is one that leaves the daemon without
    /// a part of it.
    fn reload(&mut self) -> Result<()> {
        notify(&[
            NotifyState::Reloading,
            NotifyState::monotonic_usec_now().unwrap_or(NotifyState::Reloading),
        ]);
        let result = match Config::load(&self.path) {
            Ok(config) => self.apply(config),
            Err(error) => {
                complain(&error);
                Ok(())
            }
        };
        let _ = self.wishes.send(self.config.registry.clone());
        notify(&[NotifyState::Ready]);
        result
    }

    fn apply(&mut self, mut config: Config) -> Result<()> {
        let missing = privileges::missing(&config);
        if !missing.is_empty()
            && !privileges::kept(&self.config).is_superset(&privileges::kept(&config))
        {
            complain(&format!(
                "eBPF needs {}, which was given up at the start, as there was no need of it: restart the daemon",
                missing.join(", ")
            ));
            return Ok(());
        }
        config.log_remarks();
        for (key, changed) in [
            ("pidPath", config.pid_path != self.config.pid_path),
            ("stateDir", config.state_dir != self.config.state_dir),
            (
                "controlSocket",
                config.control_socket != self.config.control_socket,
            ),
        ] {
            if changed {
                log::warn!("reload: {key} is another, which takes effect at the next start");
            }
        }
        config.pid_path.clone_from(&self.config.pid_path);
        config.state_dir.clone_from(&self.config.state_dir);
        config
            .control_socket
            .clone_from(&self.config.control_socket);
        if let Err(error) = self.parts.apply(&config, &self.config, &self.inbox) {
            complain(&error);
            return self.parts.apply(&self.config, &config, &self.inbox);
        }
        if self.log_level.is_none() {
            log::set_max_level(config.log_level);
        }
        log_ready("has a new configuration", &config);
        notify(&[NotifyState::Status("")]);
        self.config = config;
        Ok(())
    }

    fn log_status(&self, what: &str) {
        let up = self.started.elapsed().as_secs();
        log::info!("{what}: up {up} s, {}", self.metrics.summary());
    }
}

/// Said to the log and to systemd.
fn complain(error: &dyn std::fmt::Display) {
    let text = format!("reload: {error}; going on with the former configuration");
    log::error!("{text}");
    notify(&[NotifyState::Status(&text)]);
}

/// A thread that updates the registry; it is not waited for on a stop, as it may wait for the network.
fn keep_registry(
    config: &Config,
    handle: &Handle,
    metrics: &Metrics,
) -> Result<Sender<config::Registry>> {
    let (wish, wishes) = unbounded();
    let (handle, metrics) = (handle.clone(), metrics.clone());
    let _ = wish.send(config.registry.clone());
    thread::Builder::new()
        .name("registry".to_owned())
        .spawn(move || {
            privileges::keep_none();
            registry::keep(&handle, &wishes, &metrics);
        })
        .context(|| "thread registry".to_owned())?;
    Ok(wish)
}

fn listen_for_signals(notices: Sender<Notice>) -> Result<()> {
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2]);
    let mut signals = signals.context(|| "signal handlers".to_owned())?;
    let forward = move || {
        privileges::keep_none();
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

/// Without systemd there is nobody to tell.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("systemd could not be notified: {error}");
    }
}

/// For scripts; the lock of the state directory is what keeps a second daemon out.
struct PidFile(Option<PathBuf>);

impl PidFile {
    fn write(config: &Config) -> PidFile {
        let Some(path) = &config.pid_path else {
            return PidFile(None);
        };
        if let Err(error) = fs::write(path, format!("{}\n", std::process::id())) {
            // The service needs none, and may not write where flowd-go's is.
            let level = match config.pid_path_given {
                true => Level::Warn,
                false => Level::Debug,
            };
            log::log!(
                level,
                "{}: {error}; running without a PID file (pidPath)",
                path.display()
            );
            return PidFile(None);
        }
        PidFile(Some(path.clone()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}
