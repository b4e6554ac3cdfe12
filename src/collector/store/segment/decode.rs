//! Reads a record.

use std::net::IpAddr;

use super::{HEADER_LENGTH, Header, SegmentError, crc};
use crate::collector::record::{Attribution, FlowRecord, Origin};
use crate::collector::store::fields::Fields;

/// The fields of a record that are still to be read. Its length has been checked against them, so that none is missing.
struct Reader<'a> {
    rest: &'a [u8],
    fields: u32,
}

impl Reader<'_> {
    #[inline(always)]
    fn has(&self, field: Fields) -> bool {
        self.fields & field.0 != 0
    }

    #[inline(always)]
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((&bytes, rest)) = self.rest.split_first_chunk() else {
            return [0; N];
        };
        self.rest = rest;
        bytes
    }

    #[inline(always)]
    fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take())
    }

    #[inline(always)]
    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    /// Two numbers at once, which saves a check of the length.
    #[inline(always)]
    fn pair(&mut self) -> (u32, u32) {
        let both = self.u64();
        ((both >> 32) as u32, both as u32)
    }

    #[inline(always)]
    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }

    /// The address of either family; as in djm's reader, IPv6 counts if both are there.
    #[inline(always)]
    fn address(&mut self, v4: Fields, v6: Fields) -> Option<IpAddr> {
        let mut address = None;
        if self.has(v4) {
            address = Some(IpAddr::from(self.take::<4>()));
        }
        if self.has(v6) {
            address = Some(IpAddr::from(self.take::<16>()));
        }
        address
    }

    #[inline(always)]
    fn compatible(&mut self, record: &mut FlowRecord) {
        if self.has(Fields::TAG) {
            record.rule_tag = Some(self.u32());
        }
        if self.has(Fields::RECV_TIME) {
            (record.received_s, record.received_us) = self.pair();
        }
        if self.has(Fields::PROTO_FLAGS_TOS) {
            [record.tcp_flags, record.protocol, record.tos, _] = self.take();
        }
        if let Some(exporter) = self.address(Fields::AGENT_ADDR4, Fields::AGENT_ADDR6) {
            record.exporter = exporter;
        }
        record.source = self.address(Fields::SRC_ADDR4, Fields::SRC_ADDR6);
        record.destination = self.address(Fields::DST_ADDR4, Fields::DST_ADDR6);
        record.next_hop = self.address(Fields::GATEWAY_ADDR4, Fields::GATEWAY_ADDR6);
        if self.has(Fields::SRCDST_PORT) {
            record.source_port = self.u16();
            record.destination_port = self.u16();
        }
        if self.has(Fields::PACKETS) {
            record.packets = self.u64();
        }
        if self.has(Fields::OCTETS) {
            record.octets = self.u64();
        }
        if self.has(Fields::IF_INDICES) {
            (record.input, record.output) = self.pair();
        }
        if self.has(Fields::AGENT_INFO) {
            (record.uptime_ms, record.exporter_s) = self.pair();
            let (exporter_ns, version) = self.pair();
            (record.exporter_ns, record.version) = (exporter_ns, (version >> 16) as u16);
        }
        if self.has(Fields::FLOW_TIMES) {
            (record.start_uptime_ms, record.end_uptime_ms) = self.pair();
        }
        if self.has(Fields::AS_INFO) {
            (record.source_as, record.destination_as) = self.pair();
            [record.source_mask, record.destination_mask, _, _] = self.take();
        }
        if self.has(Fields::FLOW_ENGINE_INFO) {
            record.engine_type = self.u16();
            record.engine_id = self.u16();
            record.sequence = self.u32();
            record.domain = self.u32();
        }
    }

    #[inline(always)]
    fn extension(&mut self, record: &mut FlowRecord) {
        if self.has(Fields::FLOW_LABEL) {
            record.flow_label = Some(self.u32());
        }
        if self.has(Fields::SCITAG) {
            let scitag = self.u32();
            let [origin, ..] = self.take::<4>();
            // A later version may know further origins.
            record.attribution = origin_of(origin).map(|origin| Attribution { scitag, origin });
        }
        if self.has(Fields::ABSOLUTE_TIMES) {
            record.start_ms = self.u64();
            record.end_ms = self.u64();
        }
        if self.has(Fields::SAMPLING) {
            record.sampling_interval = self.u32();
        }
        if self.has(Fields::DOMAIN) {
            record.domain = self.u32();
        }
    }
}

fn origin_of(byte: u8) -> Option<Origin> {
    [Origin::Label, Origin::Firefly, Origin::Site]
        .into_iter()
        .find(|origin| *origin as u8 == byte)
}

/// Reads the record at the start of `bytes`: what it says, which fields it has, and its length.
pub fn decode(bytes: &[u8]) -> Result<(FlowRecord, Fields, usize), SegmentError> {
    let header = Header::parse(bytes)?;
    let Some(bytes) = bytes.get(..header.length) else {
        return Err(SegmentError::Truncated {
            found: bytes.len(),
            needed: header.length,
        });
    };
    let mut record = FlowRecord::default();
    let mut reader = Reader {
        rest: &bytes[HEADER_LENGTH..],
        fields: header.fields.0,
    };
    reader.compatible(&mut record);
    if header.fields.contains(Fields::CRC32) {
        let (covered, crc) = (
            &bytes[..bytes.len() - reader.rest.len()],
            bytes.last_chunk(),
        );
        check(covered, crc)?;
    }
    if header.fields.intersects(Fields::EXTENSION) {
        let extension = reader.rest;
        reader.extension(&mut record);
        if header.fields.contains(Fields::EXTENSION_CRC32) {
            let covered = &extension[..extension.len() - reader.rest.len()];
            check(covered, reader.rest.first_chunk())?;
        }
    }
    Ok((record, header.fields, header.length))
}

fn check(covered: &[u8], found: Option<&[u8; 4]>) -> Result<(), SegmentError> {
    let (found, expected) = (found.map(|&crc| u32::from_be_bytes(crc)), crc(covered));
    if found == Some(expected) {
        return Ok(());
    }
    let found = found.unwrap_or_default();
    Err(SegmentError::Crc { found, expected })
}
