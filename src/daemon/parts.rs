//! The parts of the running daemon that its configuration names: plugins, enrichers and backends, each on
//! its thread. What a new configuration changes is replaced, and nothing else.

use std::collections::{HashMap, VecDeque};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::libc;

use super::{Notice, STOP_DEADLINE};
use crate::backends::{self, Backend, Means};
use crate::config::Config;
use crate::dispatcher::{self, Output, Query, Settings};
use crate::enrichers;
use crate::error::{Context, Error, Result};
use crate::flow::{Flow, FlowEvent};
use crate::flow_table::{FlowTable, OpenFlow};
use crate::plugins::{self, EventSender, Plugin, named_pipe};
use crate::routes::{Setup, Sources};
use crate::scitag::Labeller;
use crate::sys::handover::{self, Handover};
use crate::sys::stop::{StopSwitch, stop};
use crate::sys::{privileges, state_dir};

/// Events that wait for a backend.
const BACKEND_QUEUE: usize = 16384;
/// The parts that the kernel tells of sockets.
const LISTENERS: [&str; 2] = ["sockets", "netlink"];
/// How long the dispatcher may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plugin,
    Enricher,
    Backend,
}

/// A part and the settings that it depends on: with others it is another part.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    kind: Kind,
    name: &'static str,
    settings: String,
}

impl Part {
    fn thread(&self) -> String {
        let kind = match self.kind {
            Kind::Plugin => "plugin",
            Kind::Enricher => "enricher",
            Kind::Backend => "backend",
        };
        format!("{kind} {}", self.name)
    }

    fn is(&self, other: &Part) -> bool {
        (self.kind, self.name) == (other.kind, other.name)
    }
}

/// The parts that a configuration asks for.
fn wanted(config: &Config) -> Vec<Part> {
    let settings = |kind, name: &str| match (kind, name) {
        (Kind::Plugin, "named_pipe") => format!("{:?}", config.named_pipe),
        (Kind::Plugin, "firefly") => format!("{:?}", config.firefly_plugin),
        (Kind::Plugin, "api") => format!("{:?}", config.api),
        (Kind::Plugin, "perfsonar") => format!("{:?}", config.perfsonar),
        (Kind::Plugin, "netlink") => format!("{:?}", config.netlink),
        (Kind::Plugin, "netstat") => format!("{:?}", config.netstat),
        (Kind::Plugin, _) => format!("{:?}", config.iperf3),
        (Kind::Enricher, "sockets") => {
            format!(
                "{:?} {:?}",
                config.flows.end_on_socket_close, config.netlink_enricher
            )
        }
        (Kind::Enricher, _) => format!("{:?}", config.skops_enricher),
        (Kind::Backend, "firefly") => {
            let listener = config.firefly_plugin.as_ref().map(|plugin| plugin.bind);
            format!("{:?} {listener:?}", config.firefly)
        }
        (Kind::Backend, "marker") => {
            format!("{:?} {:?}", config.marker, config.flows.max_flows)
        }
        (Kind::Backend, _) => {
            let marker = config.marker.as_ref().map(|marker| &marker.bpf_fs_path);
            format!("{:?} {marker:?}", config.prometheus)
        }
    };
    let part = |kind, name| Part {
        kind,
        name,
        settings: settings(kind, name),
    };
    let plugins = config
        .plugin_names()
        .into_iter()
        .map(|name| part(Kind::Plugin, name));
    let enrichers = config
        .enricher_names()
        .into_iter()
        .map(|name| part(Kind::Enricher, name));
    let backends = config
        .backend_names()
        .into_iter()
        .map(|name| part(Kind::Backend, name));
    // flowd's dummy does nothing.
    let backends = backends.filter(|part| part.name != "dummy");
    backends.chain(plugins).chain(enrichers).collect()
}

/// What the routes tell of a configuration.
pub fn setup(config: &Config) -> Result<Setup> {
    let labeller = labeller(config)?;
    Ok(Setup {
        labeller: labeller.filter(|_| config.labels_packets()),
        plugins: config.plugin_names(),
        enrichers: config.enricher_names(),
        backends: config.backend_names(),
    })
}

fn labeller(config: &Config) -> Result<Option<Labeller>> {
    match &config.marker {
        Some(_) => Ok(Some(Labeller::new(state_dir::label_key(
            &config.state_dir,
        )?))),
        None => Ok(None),
    }
}

/// Parts that have everything they need, and do not run yet.
#[derive(Default)]
pub struct Built {
    pub backends: Vec<BuiltBackend>,
    pub plugins: Vec<BuiltPlugin>,
}

pub struct BuiltBackend(Part, Handover, Box<dyn Backend>);
pub struct BuiltPlugin(Part, Handover, Box<dyn Plugin>);

/// What takes a running part down.
struct Running {
    part: Part,
    /// `None` for a backend, which ends with its channel.
    switch: Option<StopSwitch>,
    handover: Handover,
}

/// The parts that run.
pub struct Parts {
    sources: Sources,
    /// To the dispatcher; gone once it is time to stop.
    channel: Option<Sender<FlowEvent>>,
    notices: Sender<Notice>,
    running: Vec<Running>,
    /// Notices that came while a reload waited for others.
    aside: VecDeque<Notice>,
    /// What parts have left that a reload has taken down, by their names, until it is done.
    kept: HashMap<&'static str, OwnedFd>,
}

impl Parts {
    /// Acquires what all parts of a configuration need, the backends first.
    pub fn build(config: &Config, sources: &Sources) -> Result<Built> {
        let mut built = Built::default();
        let mut inherited = handover::inherited();
        for part in wanted(config) {
            match part.kind {
                Kind::Backend => built.backends.extend(build_backend(part, config, sources)?),
                _ => {
                    let inherited = inherited.remove(part.name);
                    built
                        .plugins
                        .extend(build_plugin(part, config, sources, inherited)?);
                }
            }
        }
        Ok(built)
    }

    /// Nothing runs yet.
    pub fn new(sources: Sources, channel: Sender<FlowEvent>, notices: Sender<Notice>) -> Parts {
        Parts {
            sources,
            channel: Some(channel),
            notices,
            running: Vec::new(),
            aside: VecDeque::new(),
            kept: HashMap::new(),
        }
    }

    /// Starts backends, which are told what is open; the dispatcher is given the other ends.
    pub fn start_backends(
        &mut self,
        mut backends: Vec<BuiltBackend>,
        config: &Config,
        table: &FlowTable,
    ) -> Result<Vec<Output>> {
        for BuiltBackend(_, _, backend) in &mut backends {
            backend.restore(table)?;
        }
        let mut outputs = Vec::new();
        for BuiltBackend(part, handover, backend) in backends {
            let (output, events) = self.output(&part, config);
            self.start_backend(part, handover, backend, events)?;
            outputs.push(output);
        }
        Ok(outputs)
    }

    /// Starts plugins and enrichers.
    pub fn start_plugins(&mut self, plugins: Vec<BuiltPlugin>) -> Result<()> {
        plugins
            .into_iter()
            .try_for_each(|plugin| self.start_plugin(plugin))
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Takes note that a thread has ended; whether it was one of a part.
    pub fn ended(&mut self, thread: &str) -> bool {
        let before = self.running.len();
        self.running
            .retain(|running| running.part.thread() != thread);
        self.running.len() < before
    }

    /// A notice that came during a reload.
    pub fn aside(&mut self) -> Option<Notice> {
        self.aside.pop_front()
    }

    /// Whatever is to be taken down on a stop is left to the next process.
    pub fn hand_over(&self) {
        self.running
            .iter()
            .for_each(|running| running.handover.begin_restart());
    }

    /// Plugins and enrichers are told to stop. With the last of them the dispatcher ends, and with it the
    /// backends.
    pub fn stop(&mut self) {
        self.channel = None;
        for running in &mut self.running {
            if let Some(switch) = &mut running.switch {
                switch.set();
            }
        }
    }

    /// Replaces what `config` changes of `former`. An error leaves some of it undone: to apply the former
    /// configuration undoes the rest.
    pub fn apply(
        &mut self,
        config: &Config,
        former: &Config,
        inbox: &Receiver<Notice>,
    ) -> Result<()> {
        let wanted = wanted(config);
        let setup = setup(config)?;
        let go = self.running.iter().map(|running| &running.part);
        let go: Vec<Part> = go.filter(|part| !wanted.contains(part)).cloned().collect();
        for part in go.iter().filter(|part| part.kind != Kind::Backend) {
            let next = wanted.iter().find(|wanted| wanted.is(part));
            self.keep(part, next.is_some(), config, former);
            // Who listens to the kernel does so before the one before it stops.
            let next = next.filter(|next| LISTENERS.contains(&next.name));
            let next = next.map(|next| build_plugin(next.clone(), config, &self.sources, None));
            let next = next.transpose()?.flatten();
            self.take_down(part, inbox)?;
            next.into_iter()
                .try_for_each(|next| self.start_plugin(next))?;
        }
        self.tell(Query::Settings(Settings {
            max_flows: config.flows.max_flows,
            max_age: config.flows.max_age,
            fireflies_come_in: config.firefly_plugin.is_some(),
        }))?;
        for part in go.iter().filter(|part| part.kind == Kind::Backend) {
            if !wanted.iter().any(|wanted| wanted.is(part)) {
                self.set_output(part.name, None)?;
                self.wait_for(part, inbox)?;
            }
        }
        for part in wanted {
            if self.running.iter().any(|running| running.part == part) {
                continue;
            }
            match part.kind {
                Kind::Backend => self.put_backend(part, config, former, inbox)?,
                _ => {
                    // It is kept until all is well.
                    let kept = self.kept.get(part.name);
                    let kept = kept.and_then(|kept| kept.try_clone().ok());
                    let built = build_plugin(part, config, &self.sources, kept)?;
                    built
                        .into_iter()
                        .try_for_each(|built| self.start_plugin(built))?;
                }
            }
        }
        if let (Some(new), Some(old)) = (&config.named_pipe, &former.named_pipe)
            && new.path == old.path
            && (new.mode, &new.group) != (old.mode, &old.group)
            && let Err(error) = named_pipe::adjust(new)
        {
            log::warn!("named pipe {}: {error}", new.path.display());
        }
        self.kept.clear();
        self.sources.setup.store(setup.into());
        Ok(())
    }

    /// Puts a backend in the place of the one of its name, if there is one. What happens meanwhile waits in
    /// the channel of the new one. If it cannot be had, the old one comes back.
    fn put_backend(
        &mut self,
        part: Part,
        config: &Config,
        former: &Config,
        inbox: &Receiver<Notice>,
    ) -> Result<()> {
        let bpffs = |config: &Config| config.marker.as_ref().map(|m| m.bpf_fs_path.clone());
        let running = self.running.iter().find(|running| running.part.is(&part));
        let running = running.map(|running| (running.part.clone(), running.handover.clone()));
        if let Some((_, handover)) = &running
            && bpffs(config) == bpffs(former)
        {
            handover.begin();
        }
        let (output, events) = self.output(&part, config);
        let open = self.set_output(part.name, Some(output))?;
        let mut table = FlowTable::new(usize::MAX);
        open.into_iter()
            .for_each(|(flow, open)| table.restore(flow, open));
        let Some((old, _)) = running else {
            let name = part.name;
            let filled = self.fill_backend(part, config, &table, &events);
            return filled.or_else(|error| {
                self.set_output(name, None)?;
                Err(error)
            });
        };
        self.wait_for(&old, inbox)?;
        let filled = self.fill_backend(part, config, &table, &events);
        filled.or_else(|error| {
            self.fill_backend(old, former, &table, &events)?;
            Err(error)
        })
    }

    fn fill_backend(
        &mut self,
        part: Part,
        config: &Config,
        table: &FlowTable,
        events: &Receiver<Arc<FlowEvent>>,
    ) -> Result<()> {
        let built = build_backend(part, config, &self.sources)?;
        built
            .into_iter()
            .try_for_each(|BuiltBackend(part, handover, mut backend)| {
                backend.restore(table)?;
                self.start_backend(part, handover, backend, events.clone())
            })
    }

    fn output(&self, part: &Part, config: &Config) -> (Output, Receiver<Arc<FlowEvent>>) {
        let (channel, events) = bounded(BACKEND_QUEUE);
        let output = Output {
            name: part.name,
            channel,
            queue: self.sources.metrics.queue(part.name),
            wants_news: backends::wants_news(part.name, config),
        };
        (output, events)
    }

    fn start_backend(
        &mut self,
        part: Part,
        handover: Handover,
        backend: Box<dyn Backend>,
        events: Receiver<Arc<FlowEvent>>,
    ) -> Result<()> {
        let work = confined(&part, move || backend.run(events));
        spawn(part.thread(), self.notices.clone(), work)?;
        self.running.push(Running {
            part,
            switch: None,
            handover,
        });
        Ok(())
    }

    fn start_plugin(&mut self, built: BuiltPlugin) -> Result<()> {
        let BuiltPlugin(part, handover, plugin) = built;
        let Some(channel) = self.channel.clone() else {
            return Ok(());
        };
        let (switch, stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
        let events = EventSender::new(channel, &self.sources.metrics);
        let work = confined(&part, move || plugin.run(events, stop));
        spawn(part.thread(), self.notices.clone(), work)?;
        self.running.push(Running {
            part,
            switch: Some(switch),
            handover,
        });
        Ok(())
    }

    fn take_down(&mut self, part: &Part, inbox: &Receiver<Notice>) -> Result<()> {
        let running = self
            .running
            .iter_mut()
            .find(|running| running.part.is(part));
        let handover = running.as_ref().map(|running| running.handover.clone());
        if let Some(switch) = running.and_then(|running| running.switch.as_mut()) {
            switch.set();
        }
        self.wait_for(part, inbox)?;
        let left = handover.and_then(|handover| handover.left());
        self.kept.extend(left.map(|left| (part.name, left)));
        Ok(())
    }

    /// Waits for the end of a part's thread.
    fn wait_for(&mut self, part: &Part, inbox: &Receiver<Notice>) -> Result<()> {
        let (thread, deadline) = (part.thread(), Instant::now() + STOP_DEADLINE);
        loop {
            match inbox.recv_deadline(deadline) {
                Ok(Notice::Ended(name, result)) if name == thread => {
                    self.ended(&name);
                    return result;
                }
                Ok(other) => self.aside.push_back(other),
                Err(_) => return Err(Error::Failed(format!("thread {thread} did not end"))),
            }
        }
    }

    /// What a part has open is kept for the one of its name that comes after it.
    fn keep(&mut self, part: &Part, again: bool, config: &Config, former: &Config) {
        let Some(running) = self.running.iter().find(|running| running.part.is(part)) else {
            return;
        };
        if part.name == "named_pipe" {
            let path = |config: &Config| config.named_pipe.as_ref().map(|pipe| pipe.path.clone());
            let Some(path) = path(former).filter(|former| Some(former) == path(config).as_ref())
            else {
                return;
            };
            // As long as somebody holds a pipe open, writers do not notice that its reader changes.
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_NONBLOCK);
            self.kept.extend(
                options
                    .open(path)
                    .ok()
                    .map(|file| ("held pipe", file.into())),
            );
        }
        if again {
            running.handover.begin();
        }
    }

    fn tell(&self, query: Query) -> Result<()> {
        let told = self.sources.queries.send_timeout(query, PATIENCE);
        told.map_err(|_| Error::Failed("the dispatcher does not answer".to_owned()))
    }

    fn set_output(
        &self,
        name: &'static str,
        output: Option<Output>,
    ) -> Result<Vec<(Flow, OpenFlow)>> {
        let query = |reply| Query::Output(name, output, reply);
        let answer = dispatcher::ask(&self.sources.queries, PATIENCE, query);
        answer.ok_or_else(|| Error::Failed("the dispatcher does not answer".to_owned()))
    }
}

fn build_backend(part: Part, config: &Config, sources: &Sources) -> Result<Option<BuiltBackend>> {
    let handover = Handover::default();
    let labeller = labeller(config)?;
    let means = Means {
        config,
        labeller: labeller.as_ref(),
        registry: &sources.registry,
        public: &sources.public,
        metrics: &sources.metrics,
        handover: handover.clone(),
    };
    let backend = backends::build(part.name, means)?;
    Ok(backend.map(|backend| BuiltBackend(part, handover, backend)))
}

fn build_plugin(
    part: Part,
    config: &Config,
    sources: &Sources,
    inherited: Option<OwnedFd>,
) -> Result<Option<BuiltPlugin>> {
    let handover = Handover::default();
    let plugin = match part.kind {
        Kind::Plugin => plugins::build(part.name, config, sources, handover.clone(), inherited),
        _ => enrichers::build(part.name, config, sources),
    };
    Ok(plugin?.map(|plugin| BuiltPlugin(part, handover, plugin)))
}

/// Threads that have no business with eBPF, and those that read what others send, have no privileges.
fn confined(
    part: &Part,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Box<dyn FnOnce() -> Result<()> + Send> {
    let privileged = matches!(part.name, "marker" | "prometheus" | "iperf3" | "skops");
    Box::new(move || {
        if !privileged {
            privileges::keep_none();
        }
        work()
    })
}

/// Runs `work` on a thread of this name, and gives notice of its end.
pub fn spawn(
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
