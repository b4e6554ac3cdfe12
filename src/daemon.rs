//! Builds everything, starts the threads, and sees to signals, readiness, watchdog and the orderly end.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use jiff::Timestamp;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use crate::config::{self, Config};
use crate::control::Control;
use crate::dispatcher::{Dispatcher, Heartbeat, Output};
use crate::echo::EchoFilter;
use crate::error::{Context, Error, Result};
use crate::flow_table::FlowTable;
use crate::journal::Journal;
use crate::metrics::Metrics;
use crate::plugins::EventSender;
use crate::registry::{self, Handle};
use crate::routes::{Routes, Sources};
use crate::scitag::Labeller;
use crate::sys::state_dir;
use crate::sys::stop::{StopSwitch, stop};
use crate::{backends, enrichers, plugins};

/// Events that wait for the dispatcher.
const DISPATCHER_QUEUE: usize = 4096;
/// Events that wait for a backend.
const BACKEND_QUEUE: usize = 16384;
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

/// Runs the daemon until it is told to stop, or until one of its threads dies, which is an error.
pub fn run(config: &Config) -> Result<()> {
    let (notices, inbox) = unbounded();
    listen_for_signals(notices.clone())?;
    let _lock = state_dir::lock(&config.state_dir)?;
    let pid_file = PidFile::write(config)?;
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    for note in &config.notes {
        log::info!("{note}");
    }

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
    let labeller = match &config.marker {
        Some(_) => Some(Labeller::new(state_dir::label_key(&config.state_dir)?)),
        None => None,
    };
    let mut backends = backends::build(config, labeller.as_ref(), &registry, &metrics)?;
    let (ask, queries) = bounded(QUERIES);
    let sources = Sources {
        queries: ask,
        registry: registry.clone(),
        metrics: metrics.clone(),
        labeller: labeller.filter(|_| config.labels_packets()),
        plugins: config.plugin_names(),
        enrichers: config.enricher_names(),
        backends: config.backend_names(),
        started: Timestamp::now(),
    };
    let plugins = plugins::build(config, &sources)?;
    let enrichers = enrichers::build(config, &sources)?;
    let control = Control::new(&config.control_socket, Routes::new(sources))?;
    for backend in &mut backends {
        backend.restore(&table)?;
    }

    let wishes = keep_registry(config, &registry, &metrics)?;
    let (switch, stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
    let mut running = 0;
    let mut start = |name: String, work: Box<dyn FnOnce() -> Result<()> + Send>| {
        running += 1;
        spawn(name, notices.clone(), work)
    };
    let mut outputs = Vec::new();
    for backend in backends {
        let (channel, events) = bounded(BACKEND_QUEUE);
        let queue = metrics.queue(backend.name());
        let wants_news = backend.wants_news();
        outputs.push(Output {
            channel,
            queue,
            wants_news,
        });
        start(
            format!("backend {}", backend.name()),
            Box::new(move || backend.run(events)),
        )?;
    }
    let (channel, events) = bounded(DISPATCHER_QUEUE);
    let dispatcher = Dispatcher::new(
        table,
        journal,
        outputs,
        config.flows.max_age,
        config.firefly_plugin.is_some().then(EchoFilter::default),
        &metrics,
    );
    let heartbeat = dispatcher.heartbeat();
    start(
        "dispatcher".to_owned(),
        Box::new(move || {
            dispatcher.run(&events, queries);
            Ok(())
        }),
    )?;
    for plugin in plugins {
        let (events, stop) = (EventSender::new(channel.clone(), &metrics), stop.clone());
        start(
            format!("plugin {}", plugin.name()),
            Box::new(move || plugin.run(events, stop)),
        )?;
    }
    for enricher in enrichers {
        let (events, stop) = (EventSender::new(channel.clone(), &metrics), stop.clone());
        let name = format!("enricher {}", enricher.name());
        start(name, Box::new(move || enricher.run(events, stop)))?;
    }
    drop(channel);
    if let Some(control) = control {
        let stop = stop.clone();
        start("control".to_owned(), Box::new(move || control.run(stop)))?;
    }

    log::info!(
        "flowd-rs {} is ready: plugins {}; backends {}",
        env!("CARGO_PKG_VERSION"),
        config.plugin_names().join(", "),
        config.backend_names().join(", ")
    );
    notify(&[NotifyState::Ready]);
    let supervisor = Supervisor {
        inbox,
        switch,
        running,
        metrics,
        heartbeat,
        started: Instant::now(),
        result: Ok(()),
    };
    let result = supervisor.run();
    drop(pid_file);
    result
}

/// The main thread's part once all others run.
struct Supervisor {
    inbox: Receiver<Notice>,
    switch: StopSwitch,
    running: usize,
    metrics: Metrics,
    heartbeat: Heartbeat,
    started: Instant,
    result: Result<()>,
}

impl Supervisor {
    fn run(mut self) -> Result<()> {
        let result = self.supervise();
        self.log_status("stopped");
        result.and(self.result)
    }

    fn supervise(&mut self) -> Result<()> {
        let watchdog = sd_notify::watchdog_enabled().map(|period| period / 2);
        let mut beats = 0;
        let mut deadline = None;
        while self.running > 0 {
            let patience = match deadline {
                Some(deadline) => Instant::now()
                    .checked_duration_since(deadline)
                    .map_or(Duration::from_millis(100), |_| Duration::ZERO),
                None => watchdog.unwrap_or(Duration::from_secs(3600)),
            };
            match self.inbox.recv_timeout(patience) {
                Ok(Notice::Signal(SIGUSR1)) => self.log_status("status"),
                Ok(Notice::Signal(signal @ (SIGHUP | SIGUSR2))) => {
                    let name = if signal == SIGHUP {
                        "SIGHUP"
                    } else {
                        "SIGUSR2"
                    };
                    log::warn!(
                        "{name}: not supported yet, restart the daemon to apply a new configuration"
                    );
                }
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
                    self.running -= 1;
                    self.thread_ended(&name, result, &mut deadline);
                }
                Err(RecvTimeoutError::Timeout) if deadline.is_some_and(|d| Instant::now() >= d) => {
                    let message = format!(
                        "{} threads did not end within {} s",
                        self.running,
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

    fn log_status(&self, what: &str) {
        let up = self.started.elapsed().as_secs();
        log::info!("{what}: up {up} s, {}", self.metrics.summary());
    }
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
        .spawn(move || registry::keep(&handle, &wishes, &metrics))
        .context(|| "thread registry".to_owned())?;
    Ok(wish)
}

fn listen_for_signals(notices: Sender<Notice>) -> Result<()> {
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2]);
    let mut signals = signals.context(|| "signal handlers".to_owned())?;
    let forward = move || {
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

fn spawn(
    name: String,
    notices: Sender<Notice>,
    work: Box<dyn FnOnce() -> Result<()> + Send>,
) -> Result<()> {
    let (thread, what) = (name.clone(), name.clone());
    let work = move || {
        // What a panicking thread leaves behind is dropped, not used: its channels close.
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

/// Without systemd there is nobody to tell.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        log::debug!("systemd could not be notified: {error}");
    }
}

/// For scripts; the lock of the state directory is what keeps a second daemon out.
struct PidFile<'a>(Option<&'a std::path::Path>);

impl PidFile<'_> {
    fn write(config: &Config) -> Result<PidFile<'_>> {
        let Some(path) = &config.pid_path else {
            return Ok(PidFile(None));
        };
        match fs::write(path, format!("{}\n", std::process::id())) {
            Ok(()) => Ok(PidFile(Some(path))),
            Err(error) if !config.pid_path_given => {
                log::info!(
                    "{}: {error}; running without a PID file (pidPath)",
                    path.display()
                );
                Ok(PidFile(None))
            }
            Err(error) => Err(error).context(|| format!("PID file {} (pidPath)", path.display())),
        }
    }
}

impl Drop for PidFile<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            let _ = fs::remove_file(path);
        }
    }
}
