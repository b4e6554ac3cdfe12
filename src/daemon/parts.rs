//! The running parts of the daemon: plugins, enrichers and backends, each on its own thread. A reload replaces those
//! that the new configuration changes, and no others.

use std::collections::{HashMap, VecDeque};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use nix::libc;

use super::Notice;
use super::wanted::{
    BuiltBackend, BuiltPlugin, Kind, Part, active, build_backend, build_plugin, wanted,
};
use crate::backends::firefly::public_addresses::AddressCache;
use crate::backends::{self, Backend};
use crate::config::Config;
use crate::context::DaemonContext;
use crate::dispatcher::flow_table::FlowTable;
use crate::dispatcher::{self, Output, Query, Settings};
use crate::error::{Context, Error, Result};
use crate::event::FlowEvent;
use crate::plugins::{EventSender, named_pipe};
use crate::service::{spawn, wait_until_ended};
use crate::sys::handover::Handover;
use crate::sys::privileges;
use crate::sys::stop::{StopSwitch, stop};

/// How many events may wait for a backend.
const BACKEND_QUEUE: usize = 16384;
/// The plugin and the enricher that receive the kernel's notifications about sockets.
const SOCKET_WATCHER: &str = "netlink";
/// How long the dispatcher may take to answer.
const DISPATCHER_TIMEOUT: Duration = Duration::from_secs(10);

/// What stops a running part.
struct Running {
    part: Part,
    /// `None` for a backend, which ends when its channel closes.
    switch: Option<StopSwitch>,
    handover: Handover,
}

/// The parts that run now.
pub struct Parts {
    context: DaemonContext,
    /// Public addresses that were found, kept over reloads.
    addresses: AddressCache,
    /// To the dispatcher; dropped on a stop.
    channel: Option<Sender<FlowEvent>>,
    notices: Sender<Notice>,
    running: Vec<Running>,
    /// Notices that arrived while a reload waited for others.
    deferred: VecDeque<Notice>,
    /// File descriptors that stopped parts left for their successors, by name, until the reload is done.
    kept: HashMap<&'static str, OwnedFd>,
}

impl Parts {
    /// No part runs yet.
    pub fn new(
        context: DaemonContext,
        addresses: AddressCache,
        channel: Sender<FlowEvent>,
        notices: Sender<Notice>,
    ) -> Parts {
        Parts {
            context,
            addresses,
            channel: Some(channel),
            notices,
            running: Vec::new(),
            deferred: VecDeque::new(),
            kept: HashMap::new(),
        }
    }

    /// Starts the backends, after each has learned which flows are open. Returns their channels for the dispatcher.
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

    /// The number of running parts.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Records that a thread has ended. Returns whether it was that of a part.
    pub fn ended(&mut self, thread: &str) -> bool {
        let before = self.running.len();
        self.running
            .retain(|running| running.part.thread_name() != thread);
        self.running.len() < before
    }

    /// The next notice that arrived during a reload.
    pub fn next_deferred_notice(&mut self) -> Option<Notice> {
        self.deferred.pop_front()
    }

    /// Makes the parts leave to the next process what they would otherwise remove on a stop.
    pub fn hand_over(&self) {
        self.running
            .iter()
            .for_each(|running| running.handover.begin_restart());
    }

    /// Stops plugins and enrichers. The dispatcher ends with the last of them, and then the backends.
    pub fn stop(&mut self) {
        self.channel = None;
        for running in &mut self.running {
            if let Some(switch) = &mut running.switch {
                switch.set();
            }
        }
    }

    /// Replaces the parts whose settings differ between `previous` and `config`. After an error some are replaced and
    /// some are not; applying `previous` again restores them.
    pub fn apply(
        &mut self,
        config: &Config,
        previous: &Config,
        inbox: &Receiver<Notice>,
    ) -> Result<()> {
        let wanted = wanted(config);
        let active = active(config)?;
        let parts = self.running.iter().map(|running| &running.part);
        let outdated = parts.filter(|part| !wanted.contains(part));
        let outdated: Vec<Part> = outdated.cloned().collect();
        for part in outdated.iter().filter(|part| part.kind != Kind::Backend) {
            let next = wanted.iter().find(|wanted| wanted.is_same_part(part));
            self.keep_descriptors(part, next.is_some(), config, previous);
            // A part that receives notifications from the kernel subscribes before its predecessor stops.
            let next = next.filter(|next| next.name == SOCKET_WATCHER);
            let next = next.map(|next| build_plugin(next.clone(), config, &self.context, None));
            let next = next.transpose()?.flatten();
            self.stop_part(part, inbox)?;
            next.into_iter()
                .try_for_each(|next| self.start_plugin(next))?;
        }
        self.send(Query::Settings(Settings {
            max_flows: config.flows.max_flows,
            max_per_source: config.flows.max_per_source,
            max_age: config.flows.max_age,
            receives_fireflies: config.firefly_plugin.is_some(),
        }))?;
        for part in outdated.iter().filter(|part| part.kind == Kind::Backend) {
            if !wanted.iter().any(|wanted| wanted.is_same_part(part)) {
                self.remove_output(part.name)?;
                self.wait_for(part, inbox)?;
            }
        }
        for part in wanted {
            if self.running.iter().any(|running| running.part == part) {
                continue;
            }
            match part.kind {
                Kind::Backend => self.replace_backend(part, config, previous, inbox)?,
                _ => {
                    // The original stays in `kept` until the whole reload has succeeded.
                    let kept = self.kept.get(part.name);
                    let kept = kept.and_then(|kept| kept.try_clone().ok());
                    let built = build_plugin(part, config, &self.context, kept)?;
                    built
                        .into_iter()
                        .try_for_each(|built| self.start_plugin(built))?;
                }
            }
        }
        if let (Some(new), Some(old)) = (&config.named_pipe, &previous.named_pipe)
            && new.path == old.path
            && (new.mode, &new.group) != (old.mode, &old.group)
            && let Err(error) = named_pipe::adjust(new)
        {
            log::warn!("namedPipe: {}: {error}", new.path.display());
        }
        self.kept.clear();
        self.context.active.store(active.into());
        Ok(())
    }

    /// Starts a backend, and stops the running one of the same name. Events wait in the new channel meanwhile. If the
    /// new backend cannot be built, the old one is started again.
    fn replace_backend(
        &mut self,
        part: Part,
        config: &Config,
        previous: &Config,
        inbox: &Receiver<Notice>,
    ) -> Result<()> {
        let bpffs = |config: &Config| config.marker.as_ref().map(|m| m.bpf_fs_path.clone());
        let running = self
            .running
            .iter()
            .find(|running| running.part.is_same_part(&part));
        let running = running.map(|running| (running.part.clone(), running.handover.clone()));
        if let Some((_, handover)) = &running
            && bpffs(config) == bpffs(previous)
        {
            handover.begin();
        }
        let (output, events) = self.output(&part, config);
        let table = self.add_output(output)?;
        let Some((old, _)) = running else {
            let name = part.name;
            let started = self.start_built_backend(part, config, &table, &events);
            return started.or_else(|error| {
                self.remove_output(name)?;
                Err(error)
            });
        };
        self.wait_for(&old, inbox)?;
        let started = self.start_built_backend(part, config, &table, &events);
        started.or_else(|error| {
            self.start_built_backend(old, previous, &table, &events)?;
            Err(error)
        })
    }

    fn start_built_backend(
        &mut self,
        part: Part,
        config: &Config,
        table: &FlowTable,
        events: &Receiver<Arc<FlowEvent>>,
    ) -> Result<()> {
        let built = build_backend(part, config, &self.context, &self.addresses)?;
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
            queue: self.context.metrics.queue(part.name),
            wants_socket_reports: backends::wants_socket_reports(part.name, config),
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
        spawn(part.thread_name(), self.notices.clone(), work)?;
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
        let events = EventSender::new(channel, &self.context.metrics);
        let work = confined(&part, move || plugin.run(events, stop));
        spawn(part.thread_name(), self.notices.clone(), work)?;
        self.running.push(Running {
            part,
            switch: Some(switch),
            handover,
        });
        Ok(())
    }

    fn stop_part(&mut self, part: &Part, inbox: &Receiver<Notice>) -> Result<()> {
        let running = self
            .running
            .iter_mut()
            .find(|running| running.part.is_same_part(part));
        let handover = running.as_ref().map(|running| running.handover.clone());
        if let Some(switch) = running.and_then(|running| running.switch.as_mut()) {
            switch.set();
        }
        self.wait_for(part, inbox)?;
        let left = handover.and_then(|handover| handover.take());
        self.kept.extend(left.map(|left| (part.name, left)));
        Ok(())
    }

    /// Waits until the thread of a part has ended.
    fn wait_for(&mut self, part: &Part, inbox: &Receiver<Notice>) -> Result<()> {
        let thread = part.thread_name();
        let result = wait_until_ended(inbox, &thread, &mut self.deferred)?;
        self.ended(&thread);
        result
    }

    /// Keeps the open file descriptors of a part for its successor of the same name.
    fn keep_descriptors(
        &mut self,
        part: &Part,
        has_successor: bool,
        config: &Config,
        previous: &Config,
    ) {
        let Some(running) = self
            .running
            .iter()
            .find(|running| running.part.is_same_part(part))
        else {
            return;
        };
        if part.name == "namedPipe" {
            let path = |config: &Config| config.named_pipe.as_ref().map(|pipe| pipe.path.clone());
            let Some(path) =
                path(previous).filter(|previous| Some(previous) == path(config).as_ref())
            else {
                return;
            };
            // While the pipe has a reader, writers do not notice that the reader changes.
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_NONBLOCK);
            self.kept.extend(
                options
                    .open(path)
                    .ok()
                    .map(|file| ("held pipe", file.into())),
            );
        }
        if has_successor {
            running.handover.begin();
        }
    }

    fn send(&self, query: Query) -> Result<()> {
        let sent = self.context.queries.send_timeout(query, DISPATCHER_TIMEOUT);
        sent.map_err(|_| no_answer())
    }

    /// Sends the events of a backend to this output. Returns the flows that are open, each as it was when its events
    /// began to go to the output.
    fn add_output(&self, output: Output) -> Result<FlowTable> {
        let (sender, pages) = unbounded();
        self.send(Query::AddOutput(output, sender))?;
        let mut table = FlowTable::new(usize::MAX);
        loop {
            match pages.recv_timeout(DISPATCHER_TIMEOUT) {
                Ok(flows) => flows
                    .into_iter()
                    .for_each(|(flow, open)| table.restore(flow, open)),
                Err(RecvTimeoutError::Disconnected) => return Ok(table),
                Err(RecvTimeoutError::Timeout) => return Err(no_answer()),
            }
        }
    }

    fn remove_output(&self, name: &'static str) -> Result<()> {
        let query = |reply| Query::RemoveOutput(name, reply);
        let answer = dispatcher::ask(&self.context.queries, DISPATCHER_TIMEOUT, query);
        self.context.metrics.remove_queue(name);
        answer.ok_or_else(no_answer)
    }
}

fn no_answer() -> Error {
    Error::Failed("the dispatcher does not answer".to_owned())
}

/// Wraps the work of a thread so that only threads that use eBPF keep privileges.
fn confined(
    part: &Part,
    work: impl FnOnce() -> Result<()> + Send + 'static,
) -> Box<dyn FnOnce() -> Result<()> + Send> {
    let privileged = matches!(part.name, "marker" | "prometheus" | "iperf3" | "skops");
    Box::new(move || {
        if !privileged {
            privileges::drop_all();
        }
        work()
    })
}
