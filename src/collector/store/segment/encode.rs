//! Writes a record.

use std::net::IpAddr;

use super::{HEADER_LENGTH, MAJOR, crc, size};
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// The length of a record with every field that is known here.
const MAX_ENCODED: usize = HEADER_LENGTH + size(Fields::ALL.0);

/// Appends the record to `out`, with those of `fields` that it has: addresses of their family, and no flow label, tag,
/// scitag, absolute time, sampling interval or observation domain that is unknown.
pub fn encode(record: &FlowRecord, fields: Fields, out: &mut Vec<u8>) {
    let mut writer = Writer {
        bytes: [0; MAX_ENCODED],
        length: HEADER_LENGTH,
        wanted: fields.0,
        written: 0,
    };
    writer.compatible(record);
    let compatible = writer.length;
    if fields.intersects(Fields::EXTENSION) {
        writer.extension(record);
    }
    if writer.written & Fields::EXTENSION.0 != 0 && writer.wants(Fields::EXTENSION_CRC32) {
        let crc = crc(&writer.bytes[compatible..writer.length]);
        writer.put(crc.to_be_bytes());
    }
    let has_crc = writer.wants(Fields::CRC32);
    let length = writer.length + if has_crc { 4 } else { 0 };
    let is_extended = writer.written & Fields::EXTENSION.0 != 0;
    writer.bytes[0] = MAJOR | u8::from(is_extended);
    writer.bytes[1] = ((length - HEADER_LENGTH) / 4) as u8;
    writer.bytes[4..HEADER_LENGTH].copy_from_slice(&writer.written.to_be_bytes());
    if has_crc {
        let crc = crc(&writer.bytes[..compatible]);
        writer.put(crc.to_be_bytes());
    }
    out.extend_from_slice(&writer.bytes[..writer.length]);
}

/// A record that is being encoded.
struct Writer {
    bytes: [u8; MAX_ENCODED],
    length: usize,
    wanted: u32,
    written: u32,
}

impl Writer {
    /// Whether the field is wanted; if so, it is noted as written.
    #[inline(always)]
    fn wants(&mut self, field: Fields) -> bool {
        self.written |= self.wanted & field.0;
        self.wanted & field.0 != 0
    }

    #[inline(always)]
    fn put<const N: usize>(&mut self, bytes: [u8; N]) {
        self.bytes[self.length..self.length + N].copy_from_slice(&bytes);
        self.length += N;
    }

    /// Two numbers at once, which saves a check of the length.
    #[inline(always)]
    fn pair(&mut self, first: u32, second: u32) {
        self.put((u64::from(first) << 32 | u64::from(second)).to_be_bytes());
    }

    #[inline(always)]
    fn address(&mut self, v4: Fields, v6: Fields, address: Option<IpAddr>) {
        match address {
            Some(IpAddr::V4(address)) if self.wants(v4) => self.put(address.octets()),
            Some(IpAddr::V6(address)) if self.wants(v6) => self.put(address.octets()),
            _ => {}
        }
    }

    #[inline(always)]
    fn compatible(&mut self, record: &FlowRecord) {
        if let Some(tag) = record.rule_tag
            && self.wants(Fields::TAG)
        {
            self.put(tag.to_be_bytes());
        }
        if self.wants(Fields::RECV_TIME) {
            self.pair(record.received_s, record.received_us);
        }
        if self.wants(Fields::PROTO_FLAGS_TOS) {
            self.put([record.tcp_flags, record.protocol, record.tos, 0]);
        }
        let exporter = Some(record.exporter);
        self.address(Fields::AGENT_ADDR4, Fields::AGENT_ADDR6, exporter);
        self.address(Fields::SRC_ADDR4, Fields::SRC_ADDR6, record.source);
        self.address(Fields::DST_ADDR4, Fields::DST_ADDR6, record.destination);
        self.address(
            Fields::GATEWAY_ADDR4,
            Fields::GATEWAY_ADDR6,
            record.next_hop,
        );
        if self.wants(Fields::SRCDST_PORT) {
            let (source, destination) = (record.source_port, record.destination_port);
            self.put((u32::from(source) << 16 | u32::from(destination)).to_be_bytes());
        }
        if self.wants(Fields::PACKETS) {
            self.put(record.packets.to_be_bytes());
        }
        if self.wants(Fields::OCTETS) {
            self.put(record.octets.to_be_bytes());
        }
        if self.wants(Fields::IF_INDICES) {
            self.pair(record.input, record.output);
        }
        if self.wants(Fields::AGENT_INFO) {
            self.pair(record.uptime_ms, record.exporter_s);
            self.pair(record.exporter_ns, u32::from(record.version) << 16);
        }
        if self.wants(Fields::FLOW_TIMES) {
            self.pair(record.start_uptime_ms, record.end_uptime_ms);
        }
        if self.wants(Fields::AS_INFO) {
            self.pair(record.source_as, record.destination_as);
            self.put([record.source_mask, record.destination_mask, 0, 0]);
        }
        if self.wants(Fields::FLOW_ENGINE_INFO) {
            let engine = u32::from(record.engine_type) << 16 | u32::from(record.engine_id);
            self.pair(engine, record.sequence);
            self.put(record.domain.to_be_bytes());
        }
    }

    #[inline(always)]
    fn extension(&mut self, record: &FlowRecord) {
        if let Some(label) = record.flow_label
            && self.wants(Fields::FLOW_LABEL)
        {
            self.put(label.to_be_bytes());
        }
        if let Some(attribution) = record.attribution
            && self.wants(Fields::SCITAG)
        {
            self.pair(attribution.scitag, (attribution.origin as u32) << 24);
        }
        if (record.start_ms != 0 || record.end_ms != 0) && self.wants(Fields::ABSOLUTE_TIMES) {
            self.put(record.start_ms.to_be_bytes());
            self.put(record.end_ms.to_be_bytes());
        }
        if record.sampling_interval != 0 && self.wants(Fields::SAMPLING) {
            self.put(record.sampling_interval.to_be_bytes());
        }
        if record.domain != 0 && self.wants(Fields::DOMAIN) {
            self.put(record.domain.to_be_bytes());
        }
    }
}
