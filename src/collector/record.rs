//! A flow record: what an exporter tells of a flow that it has seen. Flat and of fixed size; no I/O, no clock.
//!
//! A number that the exporter did not tell is 0, as in NetFlow v5, which has no other way to say it.

use std::net::{IpAddr, Ipv4Addr};

/// What an exporter tells of one flow, in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowRecord {
    /// When the datagram arrived here, UNIX seconds.
    pub received_s: u32,
    /// Microseconds after `received_s`.
    pub received_us: u32,
    /// The address that the datagram came from.
    pub exporter: IpAddr,
    /// The address of the source; `None` if the exporter did not tell it.
    pub source: Option<IpAddr>,
    /// The address of the destination.
    pub destination: Option<IpAddr>,
    /// The address of the next hop.
    pub next_hop: Option<IpAddr>,
    /// The port of the source; for ICMP 0.
    pub source_port: u16,
    /// The port of the destination; for ICMP type × 256 + code, as in NetFlow v5.
    pub destination_port: u16,
    /// The number of the transport protocol.
    pub protocol: u8,
    /// The flags of all TCP segments, or-ed.
    pub tcp_flags: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// Prefix length of the source's network.
    pub source_mask: u8,
    /// Prefix length of the destination's network.
    pub destination_mask: u8,
    /// Packets, as the exporter counted them: not multiplied by `sampling_interval`.
    pub packets: u64,
    /// Bytes, as the exporter counted them.
    pub octets: u64,
    /// SNMP index of the interface that the flow came in by.
    pub input: u32,
    /// SNMP index of the interface that the flow went out by.
    pub output: u32,
    /// Autonomous system of the source.
    pub source_as: u32,
    /// Autonomous system of the destination.
    pub destination_as: u32,
    /// Version of the protocol: 1, 5, 7, 9, or 10 for IPFIX.
    pub version: u16,
    /// How long the exporter had been up when it sent the datagram, in milliseconds; wraps after 49.7 days. 0 in IPFIX.
    pub uptime_ms: u32,
    /// The exporter's clock when it sent the datagram, UNIX seconds.
    pub exporter_s: u32,
    /// Nanoseconds after `exporter_s`.
    pub exporter_ns: u32,
    /// The first packet, in the exporter's uptime as it came; 0 if the exporter told an absolute time only.
    pub start_uptime_ms: u32,
    /// The last packet, likewise.
    pub end_uptime_ms: u32,
    /// The first packet, UNIX milliseconds; 0 if unknown. Never later than `end_ms`.
    pub start_ms: u64,
    /// The last packet, UNIX milliseconds; 0 if unknown.
    pub end_ms: u64,
    /// Type of the flow switching engine (v5, v7).
    pub engine_type: u16,
    /// Slot of the flow switching engine (v5, v7).
    pub engine_id: u16,
    /// Sequence number in the header of the datagram.
    pub sequence: u32,
    /// Source ID of NetFlow v9, observation domain of IPFIX; 0 in others.
    pub domain: u32,
    /// One of how many packets was counted; 0 if unknown, 1 without sampling.
    pub sampling_interval: u32,
    /// IPv6 flow label, 20 bits; `None` if the exporter did not tell it.
    pub flow_label: Option<u32>,
    /// The tag that a rule of the filter gave.
    pub rule_tag: Option<u32>,
    /// Experiment and activity, and how they are known.
    pub attribution: Option<Attribution>,
}

/// The tag given to a flow record, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribution {
    /// `experiment << 6 | activity`.
    pub scitag: u32,
    /// How it is known.
    pub origin: Origin,
}

/// How the tag of a flow record is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Origin {
    /// By its flow label.
    Label = 1,
    /// By a firefly of the same 5-tuple.
    Firefly = 2,
    /// By the site of one of its addresses.
    Site = 3,
}

impl Default for FlowRecord {
    /// A record of which nothing is known.
    fn default() -> FlowRecord {
        FlowRecord {
            received_s: 0,
            received_us: 0,
            exporter: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            source: None,
            destination: None,
            next_hop: None,
            source_port: 0,
            destination_port: 0,
            protocol: 0,
            tcp_flags: 0,
            tos: 0,
            source_mask: 0,
            destination_mask: 0,
            packets: 0,
            octets: 0,
            input: 0,
            output: 0,
            source_as: 0,
            destination_as: 0,
            version: 0,
            uptime_ms: 0,
            exporter_s: 0,
            exporter_ns: 0,
            start_uptime_ms: 0,
            end_uptime_ms: 0,
            start_ms: 0,
            end_ms: 0,
            engine_type: 0,
            engine_id: 0,
            sequence: 0,
            domain: 0,
            sampling_interval: 0,
            flow_label: None,
            rule_tag: None,
            attribution: None,
        }
    }
}

/// Who sent a datagram, as far as sequence numbers, templates and counts go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExporterKey {
    /// The address that it came from.
    pub address: IpAddr,
    /// Version of the protocol: 1, 5, 7, 9, or 10 for IPFIX.
    pub version: u16,
    /// Source ID or observation domain; for v5 and v7 `engine type << 8 | engine id`.
    pub domain: u32,
}
