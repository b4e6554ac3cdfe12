//! The collector: receives NetFlow and IPFIX, filters the flow records, and stores them.
//!
//! The rooms stand in the order in which a record walks through them: a [`worker`] receives a datagram, decodes it to
//! [`record`]s, filters them and encodes those that are to be stored; the [`recorder`] writes them to the [`store`].

pub mod accounts;
pub mod config;
pub mod decode;
pub mod exporters;
pub mod filter;
pub mod forward;
mod metrics_page;
pub mod receive;
pub mod record;
pub mod recorder;
pub mod routes;
pub mod store;
mod templates_file;
pub mod worker;

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use log::LevelFilter;

use crate::control;
use crate::error::{Context, Error, Result};
use crate::http::{Listener, Server};
use crate::registry;
use crate::service::{
    self, Notifier, PidFile, Reload, STOP_DEADLINE, Service, Supervisor, listen_for_signals, spawn,
    wait_until_ended,
};
use crate::sys::handover::{self, Handover};
use crate::sys::stop::{StopSwitch, stop};
use crate::sys::{privileges, state_dir};
use config::{CollectorConfig, Limits};
use decode::Decoder;
use exporters::Exporters;
use filter::{Filter, Rule};
use forward::Forwarder;
use receive::Socket;
use recorder::{Message, Recorder, Waiting};
use routes::Routes;
use store::log_socket::LogSocket;
use store::writer::Store;
use templates_file::TemplatesFile;
use worker::{Carried, Rules, Worker};

/// A message to the main thread.
type Notice = service::Notice<CollectorConfig>;

/// Runs the collector until a signal stops it, and returns the exit code. It is an error if one of its threads dies.
/// `load` reads the configuration file at `path` again on a reload; `log_level` is the one of the command line.
pub fn run(
    config: CollectorConfig,
    path: &Path,
    load: service::Load<CollectorConfig>,
    log_level: Option<LevelFilter>,
) -> Result<ExitCode> {
    privileges::no_new_privileges();
    let (notices, inbox) = unbounded();
    listen_for_signals(notices.clone())?;
    let _lock = state_dir::lock(&config.state_dir)?;
    let _pid_file = PidFile::write(config.pid_path.as_deref(), true);
    log_notes(&config);

    let now = Timestamp::now();
    let filter = compile(&config)?;
    let exporters = Arc::new(Exporters::new(template_limits(&config.limits)));
    let templates = TemplatesFile::open(&config.state_dir, &exporters, now);
    let store = Store::open(&config.store, now)?;
    let log_socket = config.store.log_socket.as_ref().map(LogSocket::start);
    let waiting = Waiting::new(config.store.max_waiting);
    let recorder = Recorder::new(
        Box::new(store),
        log_socket.transpose()?,
        Arc::clone(&filter),
        texts(&config.rules),
        config.limits.max_exporters,
        waiting.clone(),
    );
    let (to_recorder, messages) = unbounded();
    let mut collector = Collector {
        control: None,
        workers: Vec::new(),
        notices: notices.clone(),
        running: 0,
        deferred: VecDeque::new(),
        recorder: Some(to_recorder.clone()),
        exporters: Arc::clone(&exporters),
        waiting,
        handover: Handover::default(),
        beats: Vec::new(),
        beats_seen: Vec::new(),
        beat: 0,
        template_changes: templates.changes(),
        filter,
        config,
    };
    let mut inherited = handover::inherited();
    let workers = collector.build_workers(Vec::new(), &mut inherited)?;
    let control = collector.bind_control()?;

    // Every resource is acquired. The collector needs no privilege from now on.
    privileges::drop_all();
    let notifier = Notifier::start()?;
    let record = move || {
        recorder.run(&messages);
        Ok(())
    };
    spawn("recorder".to_owned(), notices.clone(), Box::new(record))?;
    collector.running += 1;
    let (switch, control_stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
    collector.control = Some(switch);
    let saving = templates.clone();
    let stop = control_stop.clone();
    let save = move || {
        saving.keep_saved(&stop);
        Ok(())
    };
    spawn("templates".to_owned(), notices.clone(), Box::new(save))?;
    collector.running += 1;
    if let Some(server) = control {
        let mut routes = Routes::new(to_recorder, Arc::clone(&exporters));
        let serve = move || {
            let served = server.run(&mut routes, control_stop);
            served.context(|| "control socket".to_owned())
        };
        spawn("control".to_owned(), notices.clone(), Box::new(serve))?;
        collector.running += 1;
    }
    collector.start_workers(workers)?;

    log_ready("is ready", &collector.config);
    let supervisor = Supervisor::new(
        collector,
        notifier,
        notices,
        inbox,
        load,
        path.to_owned(),
        log_level.is_some(),
    );
    let result = supervisor.run();
    templates.save();
    result
}

fn log_ready(what: &str, config: &CollectorConfig) {
    let listen = config
        .listen
        .iter()
        .map(|listen| listen.address.to_string());
    log::info!(
        "flowd-rs {} (collector) {what}: UDP {}; store {}",
        env!("CARGO_PKG_VERSION"),
        listen.collect::<Vec<_>>().join(", "),
        config.store.target.path().display()
    );
}

fn log_notes(config: &CollectorConfig) {
    for note in &config.notes {
        log::info!("{note}");
    }
}

/// Compiles the rules. Their names were checked when the file was read.
fn compile(config: &CollectorConfig) -> Result<Arc<Filter>> {
    let (registry, _) = registry::load_cached_or_builtin(&config.registry);
    let filter = Filter::compile(&config.rules, &registry, TimeZone::system());
    let filter = filter.map_err(|error| Error::Failed(format!("filter: {error}")))?;
    Ok(Arc::new(filter))
}

fn texts(rules: &[Rule]) -> Vec<String> {
    rules.iter().map(Rule::to_string).collect()
}

fn template_limits(limits: &Limits) -> exporters::Limits {
    exporters::Limits {
        exporter_bytes: limits.template_memory_per_exporter,
        total_bytes: limits.template_memory,
        lifetime_s: limits.template_timeout.as_secs(),
        ..exporters::Limits::default()
    }
}

/// A worker that runs.
struct RunningWorker {
    thread: String,
    switch: StopSwitch,
    carried: Receiver<Carried>,
}

/// The running collector, as the main thread sees it.
struct Collector {
    config: CollectorConfig,
    /// The compiled rules of `config`.
    filter: Arc<Filter>,
    /// Counts up with every change of a template.
    template_changes: Arc<AtomicUsize>,
    notices: Sender<Notice>,
    /// The number of threads that run.
    running: usize,
    /// Notices that arrived while a reload waited for others.
    deferred: VecDeque<Notice>,
    /// To the recorder; dropped on a stop.
    recorder: Option<Sender<Message>>,
    exporters: Arc<Exporters>,
    waiting: Waiting,
    workers: Vec<RunningWorker>,
    /// Stops the control socket and the metrics endpoint.
    control: Option<StopSwitch>,
    handover: Handover,
    /// Each worker counts up about once a second.
    beats: Vec<Arc<AtomicUsize>>,
    beats_seen: Vec<usize>,
    beat: u64,
}

impl Collector {
    /// The control socket and the metrics endpoint; `None` if neither is to be served. The default control socket may fail.
    fn bind_control(&self) -> Result<Option<Server>> {
        let mut listeners = Vec::from_iter(control::listen(&self.config.control_socket)?);
        if let Some(address) = self.config.metrics {
            let listener = Listener::tcp(address);
            listeners.push(listener.context(|| format!("TCP {address} (metrics)"))?);
        }
        if listeners.is_empty() {
            return Ok(None);
        }
        let server = Server::new(listeners);
        server
            .map(Some)
            .context(|| "poll loop of the control socket".to_owned())
    }

    /// Workers for the present configuration, with what earlier ones carried over or a previous process left.
    fn build_workers(
        &mut self,
        mut carried: Vec<Carried>,
        inherited: &mut HashMap<String, OwnedFd>,
    ) -> Result<Vec<(Worker, Receiver<Carried>)>> {
        let config = &self.config;
        let recorder = self.recorder.clone();
        let recorder = recorder.ok_or_else(|| Error::Failed("the collector stops".to_owned()))?;
        let mut workers = Vec::new();
        carried.reverse();
        self.beats.clear();
        for number in 0..config.workers {
            let (mut kept, decoder, forwarder) = match carried.pop() {
                Some(carried) => (
                    carried.sockets,
                    carried.decoder,
                    carried.forwarder.with_destinations(&config.forward),
                ),
                None => (
                    Vec::new(),
                    Decoder::new(Arc::clone(&self.exporters)),
                    Forwarder::open(&config.forward),
                ),
            };
            let sockets = receive::open(number, config, inherited, &mut kept)?;
            let (sender, receiver) = bounded(1);
            let beats = Arc::new(AtomicUsize::new(0));
            self.beats.push(Arc::clone(&beats));
            let worker = Worker {
                number,
                sockets,
                decoder,
                rules: Rules {
                    sources: config.sources.clone(),
                    filter: Arc::clone(&self.filter),
                    fields: config.store.fields_written(),
                },
                forwarder: forwarder.context(|| "sockets of forward".to_owned())?,
                recorder: recorder.clone(),
                waiting: self.waiting.with_limit(config.store.max_waiting),
                handover: self.handover.clone(),
                carried: sender,
                beats,
                template_changes: Arc::clone(&self.template_changes),
            };
            workers.push((worker, receiver));
        }
        Ok(workers)
    }

    fn start_workers(&mut self, workers: Vec<(Worker, Receiver<Carried>)>) -> Result<()> {
        for (worker, carried) in workers {
            let (switch, stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
            let thread = format!("worker {}", worker.number);
            let work = move || worker.run(stop);
            spawn(thread.clone(), self.notices.clone(), Box::new(work))?;
            self.running += 1;
            self.workers.push(RunningWorker {
                thread,
                switch,
                carried,
            });
        }
        Ok(())
    }

    /// Stops the workers, and returns what they carry over.
    fn stop_workers(&mut self, inbox: &Receiver<Notice>) -> Result<Vec<Carried>> {
        let mut all_carried = Vec::new();
        for worker in &mut self.workers {
            worker.switch.set();
        }
        for worker in std::mem::take(&mut self.workers) {
            let ended = wait_until_ended(inbox, &worker.thread, &mut self.deferred)?;
            self.running -= 1;
            ended?;
            all_carried.extend(worker.carried.try_recv());
        }
        Ok(all_carried)
    }

    /// Takes back changes of settings that take effect at the next start only, with a warning.
    fn keep_until_restart(&self, config: &mut CollectorConfig) {
        let now = &self.config;
        let template_limits_changed = Limits {
            max_exporters: now.limits.max_exporters,
            ..config.limits.clone()
        } != now.limits;
        for (key, changed) in [
            ("pidPath", config.pid_path != now.pid_path),
            ("stateDir", config.state_dir != now.state_dir),
            ("controlSocket", config.control_socket != now.control_socket),
            ("metrics", config.metrics != now.metrics),
            ("workers", config.workers != now.workers),
            ("limits of templates", template_limits_changed),
        ] {
            if changed {
                log::warn!("reload: {key} changed; restart the collector to apply it");
            }
        }
        *config = CollectorConfig {
            pid_path: now.pid_path.clone(),
            state_dir: now.state_dir.clone(),
            control_socket: now.control_socket.clone(),
            metrics: now.metrics,
            workers: now.workers,
            limits: Limits {
                max_exporters: config.limits.max_exporters,
                ..now.limits.clone()
            },
            ..config.clone()
        };
    }

    /// Makes the recorder use other settings. A store that cannot be opened is refused.
    fn set_recorder(
        &self,
        config: &CollectorConfig,
        filter: &Arc<Filter>,
    ) -> std::result::Result<(), String> {
        let (reply, answer) = bounded(1);
        let store = (config.store != self.config.store).then(|| config.store.clone());
        let message = Message::Settings {
            store,
            filter: Arc::clone(filter),
            rules: texts(&config.rules),
            max_exporters: config.limits.max_exporters,
            reply,
        };
        let stopping = || "the collector stops".to_owned();
        let recorder = self.recorder.as_ref().ok_or_else(stopping)?;
        recorder.send(message).map_err(|_| stopping())?;
        let answer = answer.recv_timeout(STOP_DEADLINE);
        answer.unwrap_or_else(|_| Err("the recorder does not answer".to_owned()))
    }
}

impl Service for Collector {
    type Config = CollectorConfig;

    fn running(&self) -> usize {
        self.running
    }

    fn ended(&mut self, _thread: &str) {
        self.running -= 1;
    }

    fn next_deferred_notice(&mut self) -> Option<Notice> {
        self.deferred.pop_front()
    }

    fn stop(&mut self) {
        for worker in &mut self.workers {
            worker.switch.set();
        }
        if let Some(control) = &mut self.control {
            control.set();
        }
        // The recorder ends once the workers have sent their last batches.
        self.recorder = None;
    }

    fn hand_over(&mut self) {
        self.handover.begin_restart();
    }

    fn reload(&mut self, mut config: CollectorConfig, inbox: &Receiver<Notice>) -> Result<Reload> {
        log_notes(&config);
        self.keep_until_restart(&mut config);
        let filter = match compile(&config) {
            Ok(filter) => filter,
            Err(error) => return Ok(Reload::Refused(error.to_string())),
        };
        if let Err(error) = receive::check_groups(&config) {
            return Ok(Reload::Refused(error.to_string()));
        }
        // Sockets of new addresses are bound while the old workers still receive.
        let mut fresh = Vec::new();
        for _ in 0..config.workers {
            match receive::open_new(&config, &self.config) {
                Ok(sockets) => fresh.push(sockets),
                Err(error) => return Ok(Reload::Refused(error.to_string())),
            }
        }
        if let Err(error) = self.set_recorder(&config, &filter) {
            return Ok(Reload::Refused(error));
        }
        let mut carried = self.stop_workers(inbox)?;
        for (carried, fresh) in carried.iter_mut().zip(fresh) {
            carried.sockets.extend::<Vec<Socket>>(fresh);
        }
        self.config = config;
        self.filter = filter;
        let workers = self.build_workers(carried, &mut HashMap::new())?;
        self.start_workers(workers)?;
        log_ready("has a new configuration", &self.config);
        Ok(Reload::Applied(self.config.log_level))
    }

    fn user_signal(&mut self) {
        if let Some(recorder) = &self.recorder {
            let _ = recorder.send(Message::Reopen);
        }
    }

    fn summary(&self) -> String {
        let (reply, answer) = bounded(1);
        let recorder = self.recorder.as_ref();
        let is_asked = recorder.is_some_and(|r| r.send(Message::Snapshot(reply)).is_ok());
        let snapshot = match is_asked {
            true => answer.recv_timeout(STOP_DEADLINE).ok(),
            false => None,
        };
        match snapshot {
            Some(snapshot) => snapshot.summary(),
            None => "all records written".to_owned(),
        }
    }

    /// Changes once every worker has counted up.
    fn beats(&mut self) -> u64 {
        let now = self.beats.iter().map(|beats| beats.load(Ordering::Relaxed));
        let now: Vec<usize> = now.collect();
        let has_each_changed = now.len() != self.beats_seen.len()
            || now
                .iter()
                .zip(&self.beats_seen)
                .all(|(now, seen)| now != seen);
        if has_each_changed {
            self.beats_seen = now;
            self.beat += 1;
        }
        self.beat
    }
}
