//! `-c`: the CSV of flow-tools, as djm's flowd-reader prints it.

use std::net::IpAddr;

use super::Stored;
use super::line::{address, number};
use crate::collector::store::fields::Fields;

/// The first line.
pub const HEADER: &str = "#:unix_secs,unix_nsecs,sysuptime,exaddr,dpkts,doctets,first,last,engine_type,engine_id,srcaddr,dstaddr,nexthop,input,output,srcport,dstport,prot,tos,tcp_flags,src_mask,dst_mask,src_as,dst_as\n";

/// Appends a record. What it does not have is 0, and an address `(null)`.
pub fn record(stored: &Stored, out: &mut Vec<u8>) {
    let record = stored.record;
    let agent_address = Fields::AGENT_ADDR4 | Fields::AGENT_ADDR6;
    let exporter = stored.fields.intersects(agent_address);
    number(out, record.exporter_s);
    field(out, record.exporter_ns);
    field(out, record.uptime_ms);
    address_field(out, exporter.then_some(record.exporter));
    field(out, record.packets);
    field(out, record.octets);
    field(out, record.start_uptime_ms);
    field(out, record.end_uptime_ms);
    field(out, record.engine_type);
    field(out, record.engine_id);
    address_field(out, record.source);
    address_field(out, record.destination);
    address_field(out, record.next_hop);
    field(out, record.input);
    field(out, record.output);
    field(out, record.source_port);
    field(out, record.destination_port);
    field(out, record.protocol);
    field(out, record.tos);
    field(out, record.tcp_flags);
    field(out, record.source_mask);
    field(out, record.destination_mask);
    field(out, record.source_as);
    field(out, record.destination_as);
    out.push(b'\n');
}

fn field(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.push(b',');
    number(out, value);
}

fn address_field(out: &mut Vec<u8>, value: Option<IpAddr>) {
    out.push(b',');
    match value {
        Some(value) => address(out, value),
        None => out.extend_from_slice(b"(null)"),
    }
}
