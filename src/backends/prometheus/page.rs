//! The page of one scrape, generated in parts as the client reads it. No I/O.

use std::collections::HashMap;

use super::Marks;
use super::families::{COUNTERS, FAMILIES, Family, options};
use super::store::{Series, Snapshot};
use super::sums::Sums;
use crate::event::EndReason;
use crate::flow::{Flow, Tag};
use crate::metrics::exposition::{
    Format, Kind, put_end, put_family, put_gathered, put_label, put_sample,
};
use crate::registry::Registry;

/// Minimum size of a part, in bytes; the last one may be smaller.
const PART_SIZE: usize = 64 << 10;

/// Where the socket statistics of an endpoint come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// `sock_diag`, or the sockops program for flows that it does not report.
    Any,
    /// `sock_diag`, with the label `flavour` as in flowd-go.
    Netlink,
    /// The sockops program, likewise.
    Skops,
}

impl Source {
    fn flavour(self) -> Option<&'static str> {
        match self {
            Source::Any => None,
            Source::Netlink => Some("netlink"),
            Source::Skops => Some("skops"),
        }
    }

    fn value(self, family: &Family, series: &Series) -> Option<f64> {
        let socket = || series.socket.as_ref().and_then(|s| family.of_socket(s));
        let skops = || series.skops.as_ref().and_then(|s| family.of_skops(s));
        match self {
            Source::Any if series.socket.is_some() => socket(),
            Source::Any | Source::Skops => skops(),
            Source::Netlink => socket(),
        }
    }
}

/// An iterator over the parts of a page.
pub struct Page {
    format: Format,
    source: Source,
    /// Labels and data of each flow that has series of its own.
    shown: Vec<(String, Series)>,
    /// Sums of each tag with flows that have none.
    hidden: Vec<Hidden>,
    /// Index of the family in progress.
    family: usize,
    /// Index of the next flow of that family.
    flow: usize,
    /// The families that are not about single flows; they come last.
    rest: Option<String>,
}

/// Sums over the flows of a tag that have no series of their own.
struct Hidden {
    labels: String,
    gauges: [f64; FAMILIES.len()],
    counters: [f64; COUNTERS],
}

/// Labels with the names and values that flowd uses.
struct Labels<'a> {
    registry: &'a Registry,
    names: HashMap<Tag, (String, String)>,
}

impl Labels<'_> {
    fn names(&mut self, tag: Tag) -> &(String, String) {
        let registry = self.registry;
        self.names.entry(tag).or_insert_with(|| registry.names(tag))
    }

    fn tag(&mut self, tag: Tag) -> String {
        let mut labels = String::new();
        let (experiment, activity) = self.names(tag);
        put_label(&mut labels, "act", activity);
        put_label(&mut labels, "exp", experiment);
        labels
    }

    fn flow(&mut self, flow: &Flow, tag: Tag, flavour: Option<&str>) -> String {
        let mut labels = String::with_capacity(160);
        let (experiment, activity) = self.names(tag);
        put_label(&mut labels, "act", activity);
        put_label(&mut labels, "dst", &flow.destination.address.to_string());
        put_label(&mut labels, "exp", experiment);
        if let Some(flavour) = flavour {
            put_label(&mut labels, "flavour", flavour);
        }
        let ports = format!("{}:{}", flow.source.port, flow.destination.port);
        put_label(&mut labels, "flow", &ports);
        put_label(&mut labels, "src", &flow.source.address.to_string());
        labels
    }
}

impl Page {
    /// The page of a snapshot; `gathered` holds the daemon's own families.
    pub fn new(
        format: Format,
        source: Source,
        registry: &Registry,
        snapshot: Snapshot,
        marks: Option<&Marks>,
        gathered: &[prometheus::proto::MetricFamily],
    ) -> Page {
        let mut labels = Labels {
            registry,
            names: HashMap::new(),
        };
        let mut rest = String::new();
        put_sums(&mut rest, format, &mut labels, &snapshot.sums);
        if let Some(marks) = marks {
            put_marks(&mut rest, format, &mut labels, marks);
        }
        for family in gathered {
            put_gathered(&mut rest, format, family);
        }
        put_end(&mut rest, format);

        let flavour = source.flavour();
        let hidden_labels = |labels: &mut Labels<'_>, tag| {
            let mut text = labels.tag(tag);
            if let Some(flavour) = flavour {
                put_label(&mut text, "flavour", flavour);
            }
            text
        };
        let mut hidden: HashMap<Tag, Hidden> = HashMap::new();
        for (tag, sums) in &snapshot.sums {
            let [by_socket, by_skops] = &sums.hidden;
            let counters = match source {
                Source::Skops => by_skops,
                Source::Any if by_socket.iter().all(|count| *count == 0.0) => by_skops,
                _ => by_socket,
            };
            if counters.iter().any(|count| *count > 0.0) {
                let labels = hidden_labels(&mut labels, *tag);
                let (gauges, counters) = ([0.0; FAMILIES.len()], *counters);
                hidden.insert(
                    *tag,
                    Hidden {
                        labels,
                        gauges,
                        counters,
                    },
                );
            }
        }
        let mut shown = Vec::with_capacity(snapshot.flows.len());
        for (flow, series) in snapshot.flows {
            if series.shown {
                shown.push((labels.flow(&flow, series.tag, flavour), series));
            } else if let Some(hidden) = hidden.get_mut(&series.tag) {
                for (sum, family) in hidden.gauges.iter_mut().zip(&FAMILIES) {
                    *sum += source.value(family, &series).unwrap_or(0.0);
                }
            }
        }
        Page {
            format,
            source,
            shown,
            hidden: hidden.into_values().collect(),
            family: 0,
            flow: 0,
            rest: Some(rest),
        }
    }

    /// Continues a family; returns whether it is complete.
    fn put_family(&mut self, family: &Family, out: &mut String) -> bool {
        let is_family = |name| FAMILIES.iter().any(|other| other.name == name);
        let begin = |out: &mut String, format| {
            let kind = match (format, family.name.strip_suffix("_total")) {
                (Format::OpenMetrics, Some(name)) if is_family(name) => Kind::Unknown,
                _ => family.kind,
            };
            put_family(out, format, family.name, kind, family.help);
        };
        let mut begun = self.flow > 0;
        while let Some((labels, series)) = self.shown.get(self.flow) {
            self.flow += 1;
            if let Some(value) = self.source.value(family, series) {
                if !std::mem::replace(&mut begun, true) {
                    begin(out, self.format);
                }
                put_sample(out, family.name, labels, value);
            }
            if begun && out.len() >= PART_SIZE {
                return false;
            }
        }
        if family.adds_up {
            let before = FAMILIES[..self.family].iter();
            let counter = before.filter(|f| f.kind == Kind::Counter).count();
            for hidden in &self.hidden {
                if !std::mem::replace(&mut begun, true) {
                    begin(out, self.format);
                }
                let value = match family.kind {
                    Kind::Counter => hidden.counters[counter],
                    _ => hidden.gauges[self.family],
                };
                put_sample(out, family.name, &hidden.labels, value);
            }
        }
        true
    }

    fn put_options(&self, out: &mut String) {
        const NAME: &str = "flow_tcp_ca_info";
        let mut begun = false;
        for (labels, series) in &self.shown {
            let socket = series
                .socket
                .as_ref()
                .filter(|_| self.source != Source::Skops);
            let skops = series
                .skops
                .as_ref()
                .filter(|_| self.source != Source::Netlink);
            let of_skops = || skops.map(|s| s.congestion.as_str().to_owned());
            let Some(options) = socket.and_then(|s| options(&s.info)).or_else(of_skops) else {
                continue;
            };
            if !std::mem::replace(&mut begun, true) {
                let help = "TCP options and congestion control as spelled by ss -ti, in the label opts (tcp_info, sock_diag).";
                put_family(out, self.format, NAME, Kind::Info, help);
            }
            let mut labels = labels.clone();
            put_label(&mut labels, "opts", &options);
            put_sample(out, NAME, &labels, 1.0);
        }
    }
}

impl Iterator for Page {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut out = String::with_capacity(PART_SIZE + 1024);
        while out.len() < PART_SIZE {
            if let Some(family) = FAMILIES.get(self.family) {
                if self.put_family(family, &mut out) {
                    self.family += 1;
                    self.flow = 0;
                }
            } else {
                let rest = self.rest.take()?;
                self.put_options(&mut out);
                out += &rest;
                break;
            }
        }
        Some(out.into_bytes())
    }
}

/// A family with one series per tag.
struct ByTag {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    value: fn(&Sums) -> f64,
}

const BY_TAG: [ByTag; 7] = [
    ByTag {
        name: "flowd_flows_open",
        kind: Kind::Gauge,
        help: "Open flows, by experiment and activity.",
        value: |sums| sums.open as f64,
    },
    ByTag {
        name: "flowd_flows_started_total",
        kind: Kind::Counter,
        help: "Flows started, by experiment and activity.",
        value: |sums| sums.started as f64,
    },
    ByTag {
        name: "flowd_sent_bytes_total",
        kind: Kind::Counter,
        help: "Payload bytes sent by this host in flows, by experiment and activity; retransmitted bytes count once (tcp_info).",
        value: |sums| sums.counts.sent_bytes as f64,
    },
    ByTag {
        name: "flowd_received_bytes_total",
        kind: Kind::Counter,
        help: "Payload bytes received by this host in flows, by experiment and activity (tcp_info).",
        value: |sums| sums.counts.received_bytes as f64,
    },
    ByTag {
        name: "flowd_sent_packets_total",
        kind: Kind::Counter,
        help: "Segments sent by this host in flows, by experiment and activity (tcp_info).",
        value: |sums| sums.counts.sent_packets as f64,
    },
    ByTag {
        name: "flowd_received_packets_total",
        kind: Kind::Counter,
        help: "Segments received by this host in flows, by experiment and activity (tcp_info).",
        value: |sums| sums.counts.received_packets as f64,
    },
    ByTag {
        name: "flowd_retransmitted_packets_total",
        kind: Kind::Counter,
        help: "Segments retransmitted by this host in flows, by experiment and activity (tcp_info).",
        value: |sums| sums.counts.retransmitted as f64,
    },
];

fn put_sums(out: &mut String, format: Format, labels: &mut Labels<'_>, sums: &[(Tag, Sums)]) {
    let sums: Vec<(String, &Sums)> = sums.iter().map(|(tag, s)| (labels.tag(*tag), s)).collect();
    if sums.is_empty() {
        return;
    }
    for family in &BY_TAG {
        put_family(out, format, family.name, family.kind, family.help);
        for (labels, sums) in &sums {
            put_sample(out, family.name, labels, (family.value)(sums));
        }
    }
    let name = "flowd_flows_ended_total";
    let help = "Flows ended, by experiment, activity and reason: producer (reported by its producer), socket_closed (flows.endOnSocketClose), expired (flows.maxAge), retagged (the flow continues with another tag), operator (flowd-rs flows end).";
    put_family(out, format, name, Kind::Counter, help);
    for (labels, sums) in &sums {
        for (reason, count) in EndReason::ALL.iter().zip(sums.ended) {
            let mut labels = labels.clone();
            put_label(&mut labels, "reason", reason.as_str());
            put_sample(out, name, &labels, count as f64);
        }
    }
    let name = "flowd_rtt_seconds";
    let help = "Smoothed round-trip times of the sockets of flows, one observation per flow and enricher period, by experiment and activity (tcp_info).";
    put_family(out, format, name, Kind::Summary, help);
    for (labels, sums) in &sums {
        let (sum, count) = sums.rtt;
        put_sample(out, "flowd_rtt_seconds_sum", labels, sum);
        put_sample(out, "flowd_rtt_seconds_count", labels, count as f64);
    }
}

fn put_marks(out: &mut String, format: Format, labels: &mut Labels<'_>, marks: &Marks) {
    let by_tag: Vec<_> = marks
        .by_tag
        .iter()
        .map(|(tag, m)| (labels.tag(*tag), m))
        .collect();
    let name = "flowd_marked_packets_total";
    let help =
        "Marked packets as sent over the wire, by experiment and activity (map of the marker).";
    put_family(out, format, name, Kind::Counter, help);
    for (labels, marked) in &by_tag {
        put_sample(out, name, labels, marked.packets as f64);
    }
    let name = "flowd_marked_bytes_total";
    let help = "Bytes of marked frames, the headers of a GSO packet counted once, by experiment and activity (map of the marker).";
    put_family(out, format, name, Kind::Counter, help);
    for (labels, marked) in &by_tag {
        put_sample(out, name, labels, marked.bytes as f64);
    }
    let name = "flowd_unmarked_packets_total";
    let help = "Packets of flows in the marker's map that were sent unmarked, by reason.";
    put_family(out, format, name, Kind::Counter, help);
    for (reason, count) in &marks.unmarked {
        let mut labels = String::new();
        put_label(&mut labels, "reason", reason);
        put_sample(out, name, &labels, *count as f64);
    }
    for (name, help, value) in [
        (
            "flowd_marker_map_entries",
            "Flows in the marker's map.",
            marks.entries,
        ),
        (
            "flowd_marker_map_capacity",
            "Maximum number of flows in the marker's map (flows.maxFlows).",
            marks.capacity,
        ),
    ] {
        put_family(out, format, name, Kind::Gauge, help);
        put_sample(out, name, "", value as f64);
    }
}
