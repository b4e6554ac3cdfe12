//! The marker backend: enters open flows into the map from which the eBPF program on the egress side of the interfaces
//! marks packets.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never, select, tick};
use log::Level;
use prometheus::IntGauge;

use super::Backend;
use super::prometheus::{Marked, Marks, ReadMarks};
use crate::config;
use crate::dispatcher::flow_table::{FlowTable, OpenFlow};
use crate::error::{Context, Error, Result};
use crate::event::{Effect, FlowEvent};
use crate::flow::{Flow, Tag};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::scitag::{self, Labeller};
use crate::sys::handover::Handover;
use crate::sys::interfaces::{self, Interface};
use crate::sys::mark_maps::{Entered, Key, Maps, Mark, UNMARKED};
use crate::sys::marker::{self, Program, our_filters};

const NAME: &str = "marker";
/// Events handled in a row before changes of interfaces are looked at.
const MAX_EVENTS_PER_TURN: usize = 512;

outcomes! {
    enum Outcome {
        Entered = "entered": "marked: {flow|flows}",
        Removed = "removed": "no longer marked: {flow|flows}",
        Ipv4 = "ipv4": "not marked: IPv4 {flow|flows}",
        PortUnknown = "port_unknown": "not marked: {flow|flows} with port 0",
        Untagged = "untagged": "not marked: untagged {flow|flows}",
        TagTooLarge = "tag_too_large": "not marked: {flow|flows} with ids that do not fit",
        MapFull = "map_full": "not marked: {flow|flows} because the map is full",
        Failed = "failed": "not marked: {flow|flows} because the map could not be written",
        Attached = "attached": "attached to {interface|interfaces}",
        AttachFailed = "attach_failed": "failed to attach {time|times}",
    }
}

/// The backend, with its program loaded.
pub struct Marker {
    config: config::Marker,
    program: Program,
    labeller: Labeller,
    local: HashSet<IpAddr>,
    attached: HashMap<u32, Interface>,
    changes: interfaces::Changes,
    /// With `matchAll`: the flow whose tag all packets carry.
    match_all_flow: Option<Flow>,
    counters: Outcomes<Outcome>,
    /// The number of interfaces that the program is attached to.
    interface_count: IntGauge,
    handover: Handover,
    unmarked_log: LogLimit,
}

fn program_settings(config: &config::Marker) -> marker::Settings {
    marker::Settings {
        bpf_fs_path: config.bpf_fs_path.clone(),
        program_path: config.program_path.clone(),
        strategy: config.strategy,
        match_all: config.match_all,
        debug: config.debug,
        priority: config.priority,
    }
}

/// Returns a function that reads the maps of the marker, from any thread.
pub fn read_marks(config: &config::Marker) -> ReadMarks {
    let bpffs = config.bpf_fs_path.clone();
    Arc::new(move || {
        let maps = Maps::pinned(&bpffs).inspect_err(|error| log::debug!("marker: {error}"));
        let maps = maps.ok().flatten()?;
        let mut by_tag: HashMap<Tag, Marked> = HashMap::new();
        let mut add = |tag, packets, bytes| {
            let marked = by_tag.entry(tag).or_default();
            marked.packets += packets;
            marked.bytes += bytes;
        };
        // Totals of ended flows come first: a flow that ends in between is missing once instead of counted twice.
        for (tag, total) in maps.totals() {
            add(tag, total.packets, total.bytes);
        }
        let mut entries = 0;
        for (_, mark) in maps.marks() {
            entries += 1;
            add(mark.tag, mark.packets, mark.bytes);
        }
        Some(Marks {
            by_tag: by_tag.into_iter().collect(),
            unmarked: UNMARKED.into_iter().zip(maps.unmarked()).collect(),
            entries,
            capacity: maps.capacity(),
        })
    })
}

impl Marker {
    /// Loads the program and checks that the configured interfaces exist. [`Backend::restore`] attaches it, once
    /// the open flows are in the map.
    pub fn new(
        config: &config::Marker,
        max_flows: usize,
        labeller: &Labeller,
        metrics: &Metrics,
        handover: Handover,
    ) -> Result<Marker> {
        let changes = interfaces::watch().context(|| "rtnetlink of the marker".to_owned())?;
        let (found, local) = interfaces::list().context(|| "interfaces of this host".to_owned())?;
        if let Some(names) = &config.interfaces
            && let Some(unknown) = names
                .iter()
                .find(|name| !found.iter().any(|i| i.name == **name))
        {
            let existing: Vec<&str> = found.iter().map(|i| i.name.as_str()).collect();
            let message = format!(
                "interface {unknown} (backends.marker.targetInterfaces) does not exist, expected one of {}",
                existing.join(", ")
            );
            return Err(Error::Failed(message));
        }
        let program = Program::load(&program_settings(config), max_flows, labeller.key())?;
        Ok(Marker {
            config: config.clone(),
            program,
            labeller: labeller.clone(),
            local,
            attached: HashMap::new(),
            changes,
            match_all_flow: None,
            counters: metrics.backend(NAME),
            interface_count: metrics.marker_interfaces.clone(),
            handover,
            unmarked_log: LogLimit::new(Level::Warn, "marker: flows not marked"),
        })
    }

    /// Attaches to new interfaces, and again where the filter was removed; forgets interfaces that no longer exist.
    fn update_interfaces(&mut self) -> io::Result<()> {
        let (found, local) = interfaces::list()?;
        self.local = local;
        let is_wanted = |interface: &Interface| match &self.config.interfaces {
            Some(names) => names.contains(&interface.name),
            None => interface.global_ipv6,
        };
        self.attached.retain(|index, old| {
            if !found.iter().any(|i| i.index == *index) {
                log::info!("marker: interface {} was removed", old.name);
                return false;
            }
            // Our filter is removed together with its clsact qdisc: flowd-go does that when it stops.
            let is_removed = our_filters(*index).is_ok_and(|filters| filters.is_empty());
            if is_removed {
                log::warn!(
                    "marker: the filter on {} was removed; attaching it again",
                    old.name
                );
            }
            !is_removed
        });
        let mut result = Ok(());
        self.interface_count.set(self.attached.len() as i64);
        for interface in found.iter().filter(|i| is_wanted(i)) {
            if self.attached.contains_key(&interface.index) {
                continue;
            }
            match self.program.attach(interface) {
                Ok(()) => {
                    log::info!("marker: attached to {}", interface.name);
                    self.counters.add(Outcome::Attached);
                    self.attached.insert(interface.index, interface.clone());
                    self.interface_count.set(self.attached.len() as i64);
                }
                Err(error) => {
                    self.counters.add(Outcome::AttachFailed);
                    result = Err(io::Error::other(format!("{}: {error}", interface.name)));
                }
            }
        }
        result
    }

    /// The map entry of a flow, or why the flow is not marked.
    fn entry(&self, flow: &Flow, tag: Tag) -> std::result::Result<(Key, Mark), Outcome> {
        let outgoing = interfaces::outgoing(flow, &self.local);
        let key = Key::new(&outgoing).ok_or(Outcome::Ipv4)?;
        if flow.source.port == 0 || flow.destination.port == 0 {
            return Err(Outcome::PortUnknown);
        }
        if tag.experiment == 0 || tag.activity == 0 {
            return Err(Outcome::Untagged);
        }
        if !scitag::fits(tag) {
            return Err(Outcome::TagTooLarge);
        }
        let label = self.labeller.label(&outgoing, tag);
        let key = if self.config.match_all { Key::ALL } else { key };
        Ok((
            key,
            Mark {
                label,
                tag,
                ..Mark::default()
            },
        ))
    }

    /// Enters a flow into the map. Returns its key, if the flow is one that can be marked.
    fn enter(&mut self, flow: &Flow, tag: Tag) -> Option<Key> {
        let entry = self.entry(flow, tag);
        let key = entry.as_ref().ok().map(|(key, _)| *key);
        let outcome = match entry {
            Ok((key, mark)) => match self.program.maps.enter(&key, mark) {
                Ok(Entered::Done) => {
                    self.match_all_flow = Some(*flow);
                    Outcome::Entered
                }
                Ok(Entered::Full) => Outcome::MapFull,
                Err(error) => {
                    self.unmarked_log.log(Instant::now(), || {
                        format!("marker: {flow}: not marked: {error}")
                    });
                    Outcome::Failed
                }
            },
            Err(reason) => {
                // A retagged flow may have an entry with its former tag.
                self.remove(flow);
                reason
            }
        };
        self.counters.add(outcome);
        match outcome {
            Outcome::TagTooLarge => self.unmarked_log.log(Instant::now(), || {
                format!("marker: {flow}: not marked: tag {tag} does not fit in a flow label (at most 511/63)")
            }),
            Outcome::MapFull => self.unmarked_log.log(Instant::now(), || {
                format!("marker: {flow}: not marked: the map is full (flows.maxFlows)")
            }),
            Outcome::Ipv4 | Outcome::PortUnknown | Outcome::Untagged => log::debug!("marker: {flow}: not marked: {outcome:?}"),
            _ => {}
        }
        key
    }

    fn remove(&mut self, flow: &Flow) {
        let removed = if self.config.match_all {
            self.match_all_flow == Some(*flow) && self.program.maps.remove(&Key::ALL)
        } else {
            // Its direction in the map may differ from now: addresses of this host may have changed since.
            [*flow, flow.reversed()]
                .iter()
                .filter_map(Key::new)
                .any(|key| self.program.maps.remove(&key))
        };
        if removed {
            self.counters.add(Outcome::Removed);
        }
    }

    /// Applies to the map what an event did to the table of open flows: an entry is there as long as its flow is open. If
    /// a tag for all packets is configured, flow events are ignored.
    fn apply(&mut self, event: &FlowEvent) {
        if self.config.all.is_some() {
            return;
        }
        match event.effect {
            Effect::Opened | Effect::Retagged(_) => {
                self.enter(&event.flow, event.tag());
            }
            Effect::Closed(_) => self.remove(&event.flow),
            // The end of a flow that was not open says nothing about the mark of another.
            Effect::Nothing | Effect::Counted => {}
        }
    }
}

impl Backend for Marker {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Fills the map before it attaches the filter: flows that the former daemon's filter marks stay marked throughout.
    fn restore(&mut self, table: &FlowTable) -> Result<()> {
        // Listed first: in a new map there is nothing to list, however many flows are open.
        let mut stale: HashSet<Key> = self.program.maps.keys().collect();
        if let Some(tag) = self.config.all {
            let mark = Mark {
                label: scitag::label(tag),
                tag,
                ..Mark::default()
            };
            let entered = self.program.maps.enter(&Key::ALL, mark);
            entered.context(|| "map of the marker".to_owned())?;
            self.counters.add(Outcome::Entered);
            stale.remove(&Key::ALL);
        } else {
            let mut flows: Vec<(Flow, &OpenFlow)> = table.iter().collect();
            // With `matchAll` the flow that was started last gives its tag to all packets.
            if self.config.match_all {
                flows.sort_unstable_by_key(|(_, open)| open.sequence);
            }
            for (flow, open) in flows {
                let key = self.enter(&flow, open.tag);
                if let Some(key) = key.filter(|_| !stale.is_empty()) {
                    stale.remove(&key);
                }
            }
        }
        for key in &stale {
            self.program.maps.remove(key);
        }
        match stale.len() {
            0 => {}
            1 => log::info!("marker: removed the mark of 1 flow that is not open"),
            count => log::info!("marker: removed the marks of {count} flows that are not open"),
        }
        let attach = |marker: &mut Marker| {
            marker.update_interfaces()?;
            // A former configuration may have named other interfaces.
            let (found, _) = interfaces::list()?;
            for interface in found
                .iter()
                .filter(|i| !marker.attached.contains_key(&i.index))
            {
                marker
                    .program
                    .maps
                    .detach(interface.index, marker.config.remove_qdisc)?;
            }
            Ok::<(), io::Error>(())
        };
        attach(self).context(|| "marker".to_owned())
    }

    fn run(mut self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()> {
        let ticks = tick(Duration::from_secs(1));
        let mut changes = self.changes.receiver().clone();
        loop {
            select! {
                recv(events) -> event => {
                    let Ok(event) = event else { break };
                    self.apply(&event);
                    for event in events.try_iter().take(MAX_EVENTS_PER_TURN) {
                        self.apply(&event);
                    }
                }
                recv(changes) -> change => {
                    if change.is_err() {
                        changes = never();
                    }
                    if let Err(error) = self.update_interfaces() {
                        log::error!("marker: {error}");
                    }
                }
                recv(ticks) -> _ => self.unmarked_log.tick(Instant::now()),
            }
        }
        self.unmarked_log.flush();
        Ok(())
    }
}

/// Removes the filters and the maps when the backend ends or fails to start.
impl Drop for Marker {
    fn drop(&mut self) {
        if self.config.keep_on_exit || self.handover.is_begun() {
            return;
        }
        if let Err(error) = self.program.maps.detach_all(self.config.remove_qdisc) {
            log::warn!("marker: cannot detach: {error}");
        }
        if let Err(error) = self.program.maps.unpin() {
            log::warn!("marker: cannot remove the pinned maps: {error}");
        }
    }
}
