//! The marker backend: enters open flows into the map by which the eBPF program on the egress side of
//! the interfaces marks packets.

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
use crate::error::{Context, Error, Result};
use crate::flow::{Effect, Flow, FlowEvent, State, Tag};
use crate::flow_table::FlowTable;
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::scitag::{self, Labeller};
use crate::sys::handover::Handover;
use crate::sys::interfaces::{self, Interface};
use crate::sys::mark_maps::{Entered, Key, Maps, Mark, UNMARKED};
use crate::sys::marker::{Program, our_filters};

const NAME: &str = "marker";
/// Events in a row before a change of interfaces has its turn.
const BATCH: usize = 512;

outcomes! {
    enum Outcome {
        Entered = "entered",
        Removed = "removed",
        Ipv4 = "ipv4",
        PortUnknown = "port_unknown",
        Untagged = "untagged",
        TagTooLarge = "tag_too_large",
        MapFull = "map_full",
        Failed = "failed",
        Attached = "attached",
        AttachFailed = "attach_failed",
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
    /// With `matchAll`: the flow whose tag all packets get.
    all: Option<Flow>,
    counters: Outcomes<Outcome>,
    /// How many interfaces it is attached to.
    interfaces: IntGauge,
    handover: Handover,
    trouble: LogLimit,
}

/// What reads the maps of the marker, from any thread.
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
        // First those of closed flows: one that closes meanwhile is missing once, not counted twice.
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
    /// Loads the program and looks for the interfaces. Nothing is attached before the flows that are
    /// open are in the map: see [`Backend::restore`].
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
            let known: Vec<&str> = found.iter().map(|i| i.name.as_str()).collect();
            let message = format!(
                "interface {unknown} (backends.marker.targetInterfaces) is not there; there are {}",
                known.join(", ")
            );
            return Err(Error::Failed(message));
        }
        let program = Program::load(config, max_flows, labeller.key())?;
        Ok(Marker {
            config: config.clone(),
            program,
            labeller: labeller.clone(),
            local,
            attached: HashMap::new(),
            changes,
            all: None,
            counters: metrics.backend(NAME),
            interfaces: metrics.marker_interfaces.clone(),
            handover,
            trouble: LogLimit::new(Level::Warn, "marker: flows not marked"),
        })
    }

    /// Attaches to interfaces that are wanted and new, and forgets those that are gone.
    fn follow_interfaces(&mut self) -> io::Result<()> {
        let (found, local) = interfaces::list()?;
        self.local = local;
        let wanted = |interface: &Interface| match &self.config.interfaces {
            Some(names) => names.contains(&interface.name),
            None => interface.global_ipv6,
        };
        self.attached.retain(|index, old| {
            if !found.iter().any(|i| i.index == *index) {
                log::info!("marker: {} is gone", old.name);
                return false;
            }
            // Others who remove a clsact qdisc remove our filter with it: flowd-go does when it stops.
            let gone = our_filters(*index).is_ok_and(|filters| filters.is_empty());
            if gone {
                log::warn!(
                    "marker: the filter on {} was removed, attaching again",
                    old.name
                );
            }
            !gone
        });
        let mut result = Ok(());
        self.interfaces.set(self.attached.len() as i64);
        for interface in found.iter().filter(|i| wanted(i)) {
            if self.attached.contains_key(&interface.index) {
                continue;
            }
            match self.program.attach(interface) {
                Ok(()) => {
                    log::info!("marker: attached to {}", interface.name);
                    self.counters.add(Outcome::Attached);
                    self.attached.insert(interface.index, interface.clone());
                    self.interfaces.set(self.attached.len() as i64);
                }
                Err(error) => {
                    self.counters.add(Outcome::AttachFailed);
                    result = Err(io::Error::other(format!("{}: {error}", interface.name)));
                }
            }
        }
        result
    }

    /// The entry of a flow, or why it has none.
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

    fn enter(&mut self, flow: &Flow, tag: Tag) {
        let outcome = match self.entry(flow, tag) {
            Ok((key, mark)) => match self.program.maps.enter(&key, mark) {
                Ok(Entered::Done) => {
                    self.all = Some(*flow);
                    Outcome::Entered
                }
                Ok(Entered::Full) => Outcome::MapFull,
                Err(error) => {
                    self.trouble
                        .log(Instant::now(), || format!("marker: {flow}: {error}"));
                    Outcome::Failed
                }
            },
            Err(why) => {
                // A retagged flow may have an entry of its former tag.
                self.remove(flow);
                why
            }
        };
        self.counters.add(outcome);
        match outcome {
            Outcome::TagTooLarge => self.trouble.log(Instant::now(), || {
                format!("marker: {flow}: tag {tag} does not fit in a flow label (511/63 at most), not marked")
            }),
            Outcome::MapFull => self.trouble.log(Instant::now(), || {
                format!("marker: {flow}: the map is full, not marked (flows.maxFlows)")
            }),
            Outcome::Ipv4 | Outcome::PortUnknown | Outcome::Untagged => log::debug!("marker: {flow}: not marked: {outcome:?}"),
            _ => {}
        }
    }

    fn remove(&mut self, flow: &Flow) {
        let removed = if self.config.match_all {
            self.all == Some(*flow) && self.program.maps.remove(&Key::ALL)
        } else {
            // Whichever way round it was entered: addresses may have come and gone since.
            [*flow, flow.reversed()]
                .iter()
                .filter_map(Key::new)
                .any(|key| self.program.maps.remove(&key))
        };
        if removed {
            self.counters.add(Outcome::Removed);
        }
    }

    /// With a tag of its own for all packets, flows say nothing.
    fn take(&mut self, event: &FlowEvent) {
        if self.config.all.is_some() {
            return;
        }
        match event.state {
            State::Start => self.enter(&event.flow, event.tag()),
            // News can open a flow, too.
            State::Ongoing => {
                let entry = self.entry(&event.flow, event.tag());
                if entry.is_ok_and(|(key, _)| self.program.maps.get(&key).is_none()) {
                    self.enter(&event.flow, event.tag());
                }
            }
            State::End if event.effect == Effect::Counted => {}
            State::End => self.remove(&event.flow),
        }
    }
}

impl Backend for Marker {
    fn name(&self) -> &'static str {
        NAME
    }

    /// The map first, then the filter: what the former daemon's filter marks stays marked throughout.
    fn restore(&mut self, table: &FlowTable) -> Result<()> {
        let mut wanted = HashSet::new();
        if let Some(tag) = self.config.all {
            let mark = Mark {
                label: scitag::label(tag),
                tag,
                ..Mark::default()
            };
            let entered = self.program.maps.enter(&Key::ALL, mark);
            entered.context(|| "map of the marker".to_owned())?;
            self.counters.add(Outcome::Entered);
            wanted.insert(Key::ALL);
        } else {
            for (flow, open) in table.iter() {
                if let Ok((key, _)) = self.entry(flow, open.tag) {
                    wanted.insert(key);
                }
                self.enter(flow, open.tag);
            }
        }
        let stale: Vec<Key> = self
            .program
            .maps
            .marks()
            .map(|(key, _)| key)
            .filter(|k| !wanted.contains(k))
            .collect();
        for key in &stale {
            self.program.maps.remove(key);
        }
        if !stale.is_empty() {
            log::info!(
                "marker: removed {} marks of flows that are not open",
                stale.len()
            );
        }
        let attach = |marker: &mut Marker| {
            marker.follow_interfaces()?;
            // Interfaces that the configuration named when the daemon last ran.
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
                    self.take(&event);
                    for event in events.try_iter().take(BATCH) {
                        self.take(&event);
                    }
                }
                recv(changes) -> change => {
                    if change.is_err() {
                        changes = never();
                    }
                    if let Err(error) = self.follow_interfaces() {
                        log::error!("marker: {error}");
                    }
                }
                recv(ticks) -> _ => self.trouble.tick(Instant::now()),
            }
        }
        self.trouble.flush();
        Ok(())
    }
}

/// Whichever way the daemon ends in good order, or fails to start: nothing of ours stays behind.
impl Drop for Marker {
    fn drop(&mut self) {
        if self.config.keep_on_exit || self.handover.is_begun() {
            return;
        }
        if let Err(error) = self.program.maps.detach_all(self.config.remove_qdisc) {
            log::warn!("marker: cannot be detached: {error}");
        }
        if let Err(error) = self.program.maps.unpin() {
            log::warn!("marker: the pinned maps cannot be removed: {error}");
        }
    }
}
