//! Builds the daemon, starts its threads, reloads and stops it.

mod parts;
mod wanted;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use jiff::Timestamp;
use log::LevelFilter;

use crate::backends::firefly::public_addresses::AddressCache;
use crate::config::Config;
use crate::context::DaemonContext;
use crate::control::Control;
use crate::control::routes::Routes;
use crate::dispatcher::echo_filter::EchoFilter;
use crate::dispatcher::flow_table::FlowTable;
use crate::dispatcher::journal::Journal;
use crate::dispatcher::{Dispatcher, Heartbeat};
use crate::error::{Context, Result};
use crate::metrics::Metrics;
use crate::registry::{self, SharedRegistry};
use crate::service::{
    self, Notifier, PidFile, Reload, Service, Supervisor, listen_for_signals, spawn,
};
use crate::sys::scanner::Scanner;
use crate::sys::stop::{StopSwitch, stop};
use crate::sys::{privileges, state_dir};
use parts::Parts;

/// How many events may wait for the dispatcher.
const DISPATCHER_QUEUE: usize = 4096;
/// How many queries may wait for the dispatcher.
const QUERY_QUEUE: usize = 16;

/// A message to the main thread.
type Notice = service::Notice<Config>;

/// Runs the daemon until a signal stops it, and returns the exit code. It is an error if one of its threads dies.
/// `path` is the file of `config`, which a reload reads again; `log_level` is the one of the command line.
pub fn run(config: Config, path: &Path, log_level: Option<LevelFilter>) -> Result<ExitCode> {
    privileges::no_new_privileges();
    let (notices, inbox) = unbounded();
    listen_for_signals(notices.clone())?;
    let _lock = state_dir::lock(&config.state_dir)?;
    let _pid_file = PidFile::write(config.pid_path.as_deref(), config.pid_path_given);
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
        scanner: start_scanner(&metrics)?,
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
    let daemon = Daemon {
        switch,
        parts,
        others,
        metrics,
        heartbeat,
        config,
        registry_updates,
    };
    let supervisor = Supervisor::new(
        daemon,
        notifier,
        notices,
        inbox,
        Box::new(Config::load),
        path.to_owned(),
        log_level.is_some(),
    );
    supervisor.run()
}

fn log_ready(what: &str, config: &Config) {
    log::info!(
        "flowd-rs {} {what}: plugins {}; backends {}",
        env!("CARGO_PKG_VERSION"),
        config.plugin_names().join(", "),
        config.backend_names().join(", ")
    );
}

/// The running daemon, as the main thread sees it.
struct Daemon {
    switch: StopSwitch,
    parts: Parts,
    /// The number of running threads that are not parts: dispatcher and control socket.
    others: usize,
    metrics: Metrics,
    heartbeat: Heartbeat,
    config: Config,
    registry_updates: Sender<registry::Settings>,
}

impl Service for Daemon {
    type Config = Config;

    fn running(&self) -> usize {
        self.others + self.parts.running()
    }

    fn ended(&mut self, thread: &str) {
        if !self.parts.ended(thread) {
            self.others -= 1;
        }
    }

    fn next_deferred_notice(&mut self) -> Option<Notice> {
        self.parts.next_deferred_notice()
    }

    fn stop(&mut self) {
        self.parts.stop();
        self.switch.set();
    }

    fn hand_over(&mut self) {
        self.parts.hand_over();
    }

    fn reload(&mut self, mut config: Config, inbox: &Receiver<Notice>) -> Result<Reload> {
        let missing = privileges::missing(config.uses_bpf());
        if !missing.is_empty() && (config.uses_bpf() && !self.config.uses_bpf()) {
            return Ok(Reload::Refused(format!(
                "eBPF needs {}, which the daemon dropped at its start because nothing needed it: restart the daemon",
                missing.join(", ")
            )));
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
        if let Err(error) = self.parts.apply(&config, &self.config, inbox) {
            let restored = self.parts.apply(&self.config, &config, inbox);
            return restored
                .inspect_err(|_| log::error!("reload: {error}"))
                .map(|()| Reload::Refused(error.to_string()));
        }
        log_ready("has a new configuration", &config);
        self.config = config;
        Ok(Reload::Applied(self.config.log_level))
    }

    fn reload_ended(&mut self) {
        let _ = self.registry_updates.send(self.config.registry.clone());
    }

    fn summary(&self) -> String {
        self.metrics.summary()
    }

    fn beats(&mut self) -> u64 {
        self.heartbeat.beats()
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

/// Starts the thread that scans sockets. A stop does not wait for it: those who ask it for scans are waited for.
fn start_scanner(metrics: &Metrics) -> Result<Scanner> {
    let (scanner, work) = Scanner::new(metrics.socket_dumps.clone());
    thread::Builder::new()
        .name("sockets".to_owned())
        .spawn(move || {
            privileges::drop_all();
            work();
        })
        .context(|| "thread sockets".to_owned())?;
    Ok(scanner)
}
