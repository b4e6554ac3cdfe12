//! The formats of djm's flowd-reader: a line per record, brief or with all fields (`-v`).

use std::net::IpAddr;

use jiff::tz::TimeZone;

use super::Stored;
use super::line::{address, display, number};
use super::names::{Names, word};
use super::period::Clock;
use crate::cli::terminal::escaped;
use crate::collector::store::fields::Fields;

/// The units of a duration in the exporter's uptime, as djm prints it: `1d2h3m4s`.
const UNITS: [(u32, char); 6] = [
    (364 * 24 * 3600, 'y'),
    (7 * 24 * 3600, 'w'),
    (24 * 3600, 'd'),
    (3600, 'h'),
    (60, 'm'),
    (1, 's'),
];

/// Prints records as text.
pub struct Text {
    is_verbose: bool,
    received: Clock,
    sent: Clock,
    start: Clock,
    end: Clock,
}

impl Text {
    pub fn new(is_verbose: bool, zone: TimeZone) -> Text {
        Text {
            is_verbose,
            received: Clock::new(zone.clone()),
            sent: Clock::new(zone.clone()),
            start: Clock::new(zone.clone()),
            end: Clock::new(zone),
        }
    }

    /// Appends a record.
    pub fn record(&mut self, stored: &Stored, names: &mut Names, out: &mut Vec<u8>) {
        let (record, fields) = (stored.record, stored.fields);
        let has = |field| fields.contains(field);
        out.extend_from_slice(b"FLOW");
        if has(Fields::TAG) {
            field(out, "tag", record.rule_tag.unwrap_or_default());
        }
        if has(Fields::RECV_TIME) {
            let time = self.received.text(record.received_s);
            display(
                out,
                format_args!(" recv_time {time}.{:06}", record.received_us),
            );
        }
        if has(Fields::PROTO_FLAGS_TOS) {
            field(out, "proto", record.protocol);
            hexadecimal(out, "tcpflags", record.tcp_flags);
            hexadecimal(out, "tos", record.tos);
        }
        if fields.intersects(Fields::AGENT_ADDR4 | Fields::AGENT_ADDR6) {
            bracketed(out, "agent", record.exporter);
        }
        let ports = has(Fields::SRCDST_PORT);
        for (name, end, port) in [
            ("src", record.source, record.source_port),
            ("dst", record.destination, record.destination_port),
        ] {
            if let Some(end) = end {
                bracketed(out, name, end);
                if ports {
                    out.push(b':');
                    number(out, port);
                }
            }
        }
        if let Some(gateway) = record.next_hop.filter(|_| self.is_verbose) {
            bracketed(out, "gateway", gateway);
        }
        if has(Fields::PACKETS) {
            field(out, "packets", record.packets);
        }
        if has(Fields::OCTETS) {
            field(out, "octets", record.octets);
        }
        if self.is_verbose {
            self.details(stored, out);
            self.extension(stored, names, out);
        }
        out.push(b'\n');
    }

    fn details(&mut self, stored: &Stored, out: &mut Vec<u8>) {
        let record = stored.record;
        let has = |field| stored.fields.contains(field);
        if has(Fields::IF_INDICES) {
            field(out, "in_if", record.input);
            field(out, "out_if", record.output);
        }
        if has(Fields::AGENT_INFO) {
            uptime(out, "sys_uptime_ms", record.uptime_ms);
            let time = self.sent.text(record.exporter_s);
            display(out, format_args!(" time_sec {time}"));
            field(out, "time_nanosec", record.exporter_ns);
            field(out, "netflow ver", record.version);
        }
        if has(Fields::FLOW_TIMES) {
            uptime(out, "flow_start", record.start_uptime_ms);
            uptime(out, "flow_finish", record.end_uptime_ms);
        }
        if has(Fields::AS_INFO) {
            field(out, "src_AS", record.source_as);
            field(out, "src_masklen", record.source_mask);
            field(out, "dst_AS", record.destination_as);
            field(out, "dst_masklen", record.destination_mask);
        }
        if has(Fields::FLOW_ENGINE_INFO) {
            field(out, "engine_type", record.engine_type);
            field(out, "engine_id", record.engine_id);
            field(out, "seq", record.sequence);
            field(out, "source", record.domain);
        }
        if let Some(crc) = stored.crc {
            display(out, format_args!(" crc32 {crc:08x}"));
        }
    }

    /// The fields that djm's flowd does not have follow those that it has.
    fn extension(&mut self, stored: &Stored, names: &mut Names, out: &mut Vec<u8>) {
        let record = stored.record;
        let has = |field| stored.fields.contains(field);
        if let Some(label) = record.flow_label {
            display(out, format_args!(" label {label:#07x}"));
        }
        if let Some((science, origin)) = names.science(record) {
            let (experiment, activity) = (escaped(&science.experiment), escaped(&science.activity));
            let (scitag, word) = (science.scitag, word(origin));
            display(
                out,
                format_args!(
                    " scitag {scitag} by {word} experiment \"{experiment}\" activity \"{activity}\""
                ),
            );
        }
        if has(Fields::ABSOLUTE_TIMES) {
            milliseconds(out, "start", record.start_ms, &mut self.start);
            milliseconds(out, "end", record.end_ms, &mut self.end);
        }
        if has(Fields::SAMPLING) {
            field(out, "sampling", record.sampling_interval);
        }
        if has(Fields::DOMAIN) {
            field(out, "domain", record.domain);
        }
    }
}

fn field(out: &mut Vec<u8>, name: &str, value: impl itoa::Integer) {
    label(out, name);
    number(out, value);
}

fn label(out: &mut Vec<u8>, name: &str) {
    out.push(b' ');
    out.extend_from_slice(name.as_bytes());
    out.push(b' ');
}

fn hexadecimal(out: &mut Vec<u8>, name: &str, value: u8) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    label(out, name);
    out.push(DIGITS[usize::from(value >> 4)]);
    out.push(DIGITS[usize::from(value & 15)]);
}

fn bracketed(out: &mut Vec<u8>, name: &str, value: IpAddr) {
    label(out, name);
    out.push(b'[');
    address(out, value);
    out.push(b']');
}

/// Appends a time in the exporter's uptime.
fn uptime(out: &mut Vec<u8>, name: &str, milliseconds: u32) {
    label(out, name);
    let mut rest = milliseconds / 1000;
    for (seconds, unit) in UNITS {
        if rest >= seconds || unit == 's' {
            display(out, format_args!("{}{unit}", rest / seconds));
            rest %= seconds;
        }
    }
    display(out, format_args!(".{:03}", milliseconds % 1000));
}

/// Appends a UNIX time; as a number if it is beyond the year 2106.
fn milliseconds(out: &mut Vec<u8>, name: &str, time: u64, clock: &mut Clock) {
    label(out, name);
    match u32::try_from(time / 1000) {
        Ok(second) => display(
            out,
            format_args!("{}.{:03}", clock.text(second), time % 1000),
        ),
        Err(_) => number(out, time),
    }
}
