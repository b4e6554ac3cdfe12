//! `--json`: an object per line, with the names of goflow2's JSON and those that flowd-rs(8) documents.

use std::net::IpAddr;

use super::Stored;
use super::line::{address, display, number};
use super::names::{Names, word};
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// Appends a record: what it has, and no more.
pub fn record(stored: &Stored, names: &mut Names, out: &mut Vec<u8>) {
    let (record, fields) = (stored.record, stored.fields);
    let has = |field| fields.contains(field);
    out.push(b'{');
    let mut object = Object {
        out,
        is_empty: true,
    };
    if has(Fields::AGENT_INFO) {
        object.word("type", protocol(record.version));
    }
    if has(Fields::RECV_TIME) {
        object.number("time_received_ns", received_ns(record));
    }
    if has(Fields::FLOW_ENGINE_INFO) {
        object.number("sequence_num", record.sequence);
    }
    if has(Fields::SAMPLING) {
        object.number("sampling_rate", record.sampling_interval);
    }
    if fields.intersects(Fields::AGENT_ADDR4 | Fields::AGENT_ADDR6) {
        object.address("sampler_address", Some(record.exporter));
    }
    if let Some((start, end)) = times_ms(record, fields) {
        object.number("time_flow_start_ns", u128::from(start) * 1_000_000);
        object.number("time_flow_end_ns", u128::from(end) * 1_000_000);
    }
    if has(Fields::OCTETS) {
        object.number("bytes", record.octets);
    }
    if has(Fields::PACKETS) {
        object.number("packets", record.packets);
    }
    object.address("src_addr", record.source);
    object.address("dst_addr", record.destination);
    if let Some(source) = record.source {
        object.number("etype", if source.is_ipv4() { 0x0800 } else { 0x86dd });
    }
    if has(Fields::PROTO_FLAGS_TOS) {
        object.number("proto", record.protocol);
    }
    if has(Fields::SRCDST_PORT) {
        object.number("src_port", record.source_port);
        object.number("dst_port", record.destination_port);
    }
    if has(Fields::IF_INDICES) {
        object.number("in_if", record.input);
        object.number("out_if", record.output);
    }
    if has(Fields::PROTO_FLAGS_TOS) {
        object.number("ip_tos", record.tos);
        object.number("tcp_flags", record.tcp_flags);
    }
    if let Some(label) = record.flow_label {
        object.number("ipv6_flow_label", label);
    }
    object.address("next_hop", record.next_hop);
    if has(Fields::AS_INFO) {
        object.number("src_as", record.source_as);
        object.number("dst_as", record.destination_as);
        object.number("src_net", record.source_mask);
        object.number("dst_net", record.destination_mask);
    }
    if fields.intersects(Fields::DOMAIN | Fields::FLOW_ENGINE_INFO) {
        object.number("observation_domain_id", record.domain);
    }
    ours(stored, names, &mut object);
    out.extend_from_slice(b"}\n");
}

/// What goflow2 does not have.
fn ours(stored: &Stored, names: &mut Names, object: &mut Object) {
    let record = stored.record;
    let has = |field| stored.fields.contains(field);
    if let Some(tag) = record.rule_tag {
        object.number("tag", tag);
    }
    if let Some((science, origin)) = names.science(record) {
        object.number("scitag", science.scitag);
        object.text("experiment", &science.experiment);
        object.text("activity", &science.activity);
        object.word("attribution", word(origin));
    }
    if has(Fields::FLOW_ENGINE_INFO) {
        object.number("engine_type", record.engine_type);
        object.number("engine_id", record.engine_id);
    }
    if has(Fields::AGENT_INFO) {
        let ns = u64::from(record.exporter_s) * 1_000_000_000 + u64::from(record.exporter_ns);
        object.number("time_sent_ns", ns);
        object.number("uptime_ms", record.uptime_ms);
    }
    if has(Fields::FLOW_TIMES) {
        object.number("uptime_flow_start_ms", record.start_uptime_ms);
        object.number("uptime_flow_end_ms", record.end_uptime_ms);
    }
}

/// The protocol, as goflow2 names it.
fn protocol(version: u16) -> &'static str {
    match version {
        1 => "NETFLOW_V1",
        5 => "NETFLOW_V5",
        7 => "NETFLOW_V7",
        9 => "NETFLOW_V9",
        10 => "IPFIX",
        _ => "FLOWUNKNOWN",
    }
}

fn received_ns(record: &FlowRecord) -> u64 {
    u64::from(record.received_s) * 1_000_000_000 + u64::from(record.received_us) * 1000
}

/// The first and the last packet in UNIX milliseconds: as stored, or from the exporter's clock and uptime.
fn times_ms(record: &FlowRecord, fields: Fields) -> Option<(u64, u64)> {
    if fields.contains(Fields::ABSOLUTE_TIMES) {
        return Some((record.start_ms, record.end_ms));
    }
    if !fields.contains(Fields::AGENT_INFO | Fields::FLOW_TIMES) {
        return None;
    }
    // A template may be without times; a record of v1, v5 and v7 always has them.
    let is_of_template = matches!(record.version, 9 | 10);
    if is_of_template && (record.start_uptime_ms, record.end_uptime_ms) == (0, 0) {
        return None;
    }
    let sent = u64::from(record.exporter_s) * 1000 + u64::from(record.exporter_ns) / 1_000_000;
    // The uptime wraps after 49.7 days.
    let ago = |uptime: u32| u64::from(record.uptime_ms.wrapping_sub(uptime));
    let at = |uptime| sent.checked_sub(ago(uptime));
    at(record.start_uptime_ms).zip(at(record.end_uptime_ms))
}

/// An object that is being printed.
struct Object<'a> {
    out: &'a mut Vec<u8>,
    is_empty: bool,
}

impl Object<'_> {
    fn key(&mut self, key: &str) {
        self.out
            .extend_from_slice(if self.is_empty { b"\"" } else { b",\"" });
        self.is_empty = false;
        self.out.extend_from_slice(key.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    fn number(&mut self, key: &str, value: impl itoa::Integer) {
        self.key(key);
        number(self.out, value);
    }

    /// A text that needs no escape.
    fn word(&mut self, key: &str, word: &str) {
        self.key(key);
        display(self.out, format_args!("\"{word}\""));
    }

    fn address(&mut self, key: &str, value: Option<IpAddr>) {
        if let Some(value) = value {
            self.key(key);
            self.out.push(b'"');
            address(self.out, value);
            self.out.push(b'"');
        }
    }

    /// A name of the registry.
    fn text(&mut self, key: &str, text: &str) {
        self.key(key);
        string(self.out, text);
    }
}

/// Appends a string.
pub fn string(out: &mut Vec<u8>, text: &str) {
    let json = serde_json::Value::from(text).to_string();
    out.extend_from_slice(crate::cli::terminal::escaped_json(&json).as_bytes());
}
