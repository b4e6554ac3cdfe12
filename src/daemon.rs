//! Builds the daemon, starts its threads, and handles signals, readiness, the watchdog, reloads and shutdown.

mod notifier;
mod parts;
mod wanted;

use std::ffi::OsString;
use std::io::{self, Write as _};
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

use crate::backends::firefly::public_addresses::AddressCache;
use crate::config::Config;
use crate::context::DaemonContext;
use crate::control::Control;
use crate::control::routes::Routes;
use crate::dispatcher::echo_filter::EchoFilter;
use crate::dispatcher::flow_table::FlowTable;
use crate::dispatcher::journal::Journal;
use crate::dispatcher::{Dispatcher, Heartbeat};
use crate::error::{ConfigError, Context, Error, Result};
use crate::metrics::Metrics;
use crate::registry::{self, SharedRegistry};
use crate::sys::directory::Directory;
use crate::sys::stop::{StopSwitch, stop};
use crate::sys::{privileges, state_dir};
use notifier::Notifier;
use parts::{Parts, spawn};

/// Exit status after SIGUSR2, EX_TEMPFAIL of sysexits(3): the unit makes systemd start the daemon again at once.
const EXIT_CODE_RESTART: u8 = 75;
/// How many events may wait for the dispatcher.
const DISPATCHER_QUEUE: usize = 4096;
/// How many queries may wait for the dispatcher.
const QUERY_QUEUE: usize = 16;
/// How long threads may take to end on a stop.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// A normal stop finishes within this time; until then a second signal is ignored.
const SECOND_SIGNAL_GRACE: Duration = Duration::from_secs(2);

/// A message to the main thread.
enum Notice {
    Signal(i32),
    /// A reload has read the configuration file.
    Loaded(Box<std::result::Result<Config, ConfigError>>),
    /// A thread has ended.
    Ended(String, Result<()>),
}

/// Runs the daemon until a signal stops it, and returns the exit code. It is an error if one of its threads dies.
/// `path` is the file of `config`, which a reload reads again; `log_level` is the one of the command line.
pub fn run(config: Config, path: &Path, log_level: Option<LevelFilter>) -> Result<ExitCode> {
    privileges::no_new_privileges();
    let (notices, inbox) = unbounded();
    listen_for_signals(notices.clone())?;
    let _lock = state_dir::lock(&config.state_dir)?;
    let pid_file = PidFile::write(&config);
    config.log_remarks();

    let metrics = Metrics::new();
    let (known, source) = registry::load_cached_or_builtin(&config.registry);
    log::debug!("registry: {source}");
    let registry = SharedRegistry::new(known);
    let mut table = FlowTable::new(config.flows.max_flows);
    table.set_limits(config.flows.max_flows, config.flows.max_per_source);
    let journal = Journal::open(&config.state_dir, &mut table, &metrics)
        .context(|| format!("journal in {} (stateDir)", config.state_dir.display()))?;
    if !table.is_empty() {
        log::info!(
            "restored {} open {} from {}",
            table.len(),
            if table.len() == 1 { "flow" } else { "flows" },
            journal.path().display()
        );
    }
    let (query_sender, queries) = bounded(QUERY_QUEUE);
    let context = DaemonContext {
        queries: query_sender,
        registry: registry.clone(),
        metrics: metrics.clone(),
        active: Arc::new(ArcSwap::from_pointee(wanted::active(&config)?)),
        started: Timestamp::now(),
    };
    let (channel, events) = bounded(DISPATCHER_QUEUE);
    let addresses = AddressCache::default();
    let built = wanted::build_all(&config, &context, &addresses)?;
    let control = Control::new(&config.control_socket, Routes::new(context.clone()))?;
    let registry_updates = start_registry_updates(&config, &registry, &metrics)?;

    // Every resource is acquired. Threads started from now on have at most the privileges of this one.
    privileges::keep_only(&privileges::needed(config.uses_bpf()));
    let notifier = Notifier::start()?;
    let (switch, stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
    let mut parts = Parts::new(context, addresses, channel, notices.clone());
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
        privileges::drop_all();
        dispatcher.run(&events, queries);
        Ok(())
    };
    spawn("dispatcher".to_owned(), notices.clone(), Box::new(dispatch))?;
    parts.start_plugins(built.plugins)?;
    let mut others = 1;
    if let Some(control) = control {
        let serve = move || {
            privileges::drop_all();
            control.run(stop)
        };
        spawn("control".to_owned(), notices.clone(), Box::new(serve))?;
        others += 1;
    }

    log_ready("is ready", &config);
    notifier.notify(&[NotifyState::Ready]);
    let supervisor = Supervisor {
        notifier,
        inbox,
        switch,
        parts,
        others,
        metrics,
        heartbeat,
        started: Instant::now(),
        result: Ok(()),
        exit_code: ExitCode::SUCCESS,
        config,
        path: path.to_owned(),
        log_level,
        registry_updates,
        notices,
        reading: false,
        reload_again: false,
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

/// The work of the main thread once all others run.
struct Supervisor {
    notifier: Notifier,
    inbox: Receiver<Notice>,
    switch: StopSwitch,
    parts: Parts,
    /// The number of running threads that are not parts: dispatcher and control socket.
    others: usize,
    metrics: Metrics,
    heartbeat: Heartbeat,
    started: Instant,
    result: Result<()>,
    /// The exit code of an orderly stop.
    exit_code: ExitCode,
    config: Config,
    path: PathBuf,
    log_level: Option<LevelFilter>,
    registry_updates: Sender<registry::Settings>,
    notices: Sender<Notice>,
    /// A thread reads the configuration file.
    reading: bool,
    reload_again: bool,
}

impl Supervisor {
    fn run(mut self) -> Result<ExitCode> {
        let result = self.supervise();
        self.log_status("stopped");
        result.and(self.result).map(|()| self.exit_code)
    }

    fn supervise(&mut self) -> Result<()> {
        let watchdog = sd_notify::watchdog_enabled().map(|period| period / 2);
        let mut beats = 0;
        let mut deadline = None;
        while self.others + self.parts.running() > 0 {
            let timeout = match deadline {
                Some(deadline) => Instant::now()
                    .checked_duration_since(deadline)
                    .map_or(Duration::from_millis(100), |_| Duration::ZERO),
                None => watchdog.unwrap_or(Duration::from_secs(3600)),
            };
            let notice = match self.parts.next_deferred_notice() {
                Some(notice) => Ok(notice),
                None => self.inbox.recv_timeout(timeout),
            };
            match notice {
                Ok(Notice::Signal(SIGUSR1)) => self.log_status("status"),
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
                    self.parts.hand_over();
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
            // If the dispatcher hangs, systemd gets no more keep-alives and restarts the daemon.
            let now = self.heartbeat.beats();
            if watchdog.is_some() && now != std::mem::replace(&mut beats, now) {
                self.notifier.notify(&[NotifyState::Watchdog]);
            }
        }
        Ok(())
    }

    fn stop(&mut self, why: &str) -> Instant {
        log::info!("{why}");
        self.notifier.notify(&[NotifyState::Stopping]);
        self.parts.stop();
        self.switch.set();
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
        let (path, notices) = (self.path.clone(), self.notices.clone());
        let read = move || {
            // Nobody receives it after a stop.
            let _ = notices.send(Notice::Loaded(Box::new(Config::load(&path))));
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

    /// Applies the configuration that was read. One that is refused is only logged. An error means that the daemon has lost
    /// a part, and must stop.
    fn finish_reload(&mut self, loaded: std::result::Result<Config, ConfigError>) -> Result<()> {
        self.reading = false;
        let result = match loaded {
            Ok(config) => self.apply(config),
            Err(error) => {
                self.report_refused_reload(&error);
                Ok(())
            }
        };
        let _ = self.registry_updates.send(self.config.registry.clone());
        self.notifier.notify(&[NotifyState::Ready]);
        if std::mem::take(&mut self.reload_again) && result.is_ok() {
            self.reload();
        }
        result
    }

    fn apply(&mut self, mut config: Config) -> Result<()> {
        let missing = privileges::missing(config.uses_bpf());
        if !missing.is_empty() && (config.uses_bpf() && !self.config.uses_bpf()) {
            self.report_refused_reload(&format!(
                "eBPF needs {}, which the daemon dropped at its start because nothing needed it: restart the daemon",
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
                log::warn!("reload: {key} changed; restart the daemon to apply it");
            }
        }
        config.pid_path.clone_from(&self.config.pid_path);
        config.state_dir.clone_from(&self.config.state_dir);
        config
            .control_socket
            .clone_from(&self.config.control_socket);
        if let Err(error) = self.parts.apply(&config, &self.config, &self.inbox) {
            self.report_refused_reload(&error);
            return self.parts.apply(&self.config, &config, &self.inbox);
        }
        if self.log_level.is_none() {
            log::set_max_level(config.log_level);
        }
        log_ready("has a new configuration", &config);
        self.notifier.notify(&[NotifyState::Status("")]);
        self.config = config;
        Ok(())
    }

    /// Logs why a reload was refused, and shows it in `systemctl status`.
    fn report_refused_reload(&self, error: &dyn std::fmt::Display) {
        let text = format!("reload: {error}; the previous configuration stays in effect");
        log::error!("{text}");
        self.notifier.notify(&[NotifyState::Status(&text)]);
    }

    fn log_status(&self, what: &str) {
        let up = self.started.elapsed().as_secs();
        log::info!("{what}: up {up} s, {}", self.metrics.summary());
    }
}

/// Starts the thread that updates the registry. A stop does not wait for it, since it may be waiting for the network.
fn start_registry_updates(
    config: &Config,
    handle: &SharedRegistry,
    metrics: &Metrics,
) -> Result<Sender<registry::Settings>> {
    let (request, registry_updates) = unbounded();
    let (handle, metrics) = (handle.clone(), metrics.clone());
    let _ = request.send(config.registry.clone());
    thread::Builder::new()
        .name("registry".to_owned())
        .spawn(move || {
            privileges::drop_all();
            registry::keep_updated(&handle, &registry_updates, &metrics);
        })
        .context(|| "thread registry".to_owned())?;
    Ok(request)
}

fn listen_for_signals(notices: Sender<Notice>) -> Result<()> {
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

/// The file of the process id, for scripts. The lock of the state directory is what keeps a second daemon out.
struct PidFile(Option<(Directory, OsString)>);

impl PidFile {
    fn write(config: &Config) -> PidFile {
        let Some(path) = &config.pid_path else {
            return PidFile(None);
        };
        let write = || {
            let (directory, name) = Directory::open_parent(path)?;
            let mut file = directory.open_or_create(&name)?;
            file.set_len(0)?;
            writeln!(file, "{}", std::process::id())?;
            io::Result::Ok((directory, name))
        };
        let written = write();
        if let Err(error) = &written {
            // The service needs no such file, and may not write to the default path, which is flowd-go's.
            let level = match config.pid_path_given {
                true => Level::Warn,
                false => Level::Debug,
            };
            log::log!(
                level,
                "{}: {error}; running without a PID file (pidPath)",
                path.display()
            );
        }
        PidFile(written.ok())
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some((directory, name)) = &self.0 {
            let _ = directory.remove(name);
        }
    }
}
