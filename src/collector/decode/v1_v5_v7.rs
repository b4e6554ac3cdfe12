//! NetFlow v1, v5 and v7: records of one layout each.

use std::net::{IpAddr, Ipv4Addr};

use super::problem::{Expected, Problem, Rejection};
use super::times::{self, Clocks};
use crate::collector::record::FlowRecord;

/// What is read of the header, and what of the records.
pub struct Header {
    /// Sequence number of the first record; 0 in v1.
    pub sequence: u32,
    /// `engine type << 8 | engine id` of v5.
    pub engine: u16,
    /// How long the exporter had been up.
    pub uptime_ms: u32,
    /// The exporter's clock, UNIX seconds.
    pub exporter_s: u32,
    /// Nanoseconds after `exporter_s`.
    pub exporter_ns: u32,
    /// The exporter's clock, UNIX milliseconds.
    pub exporter_ms: u64,
    /// One of how many packets v5 counted; 0 if unknown.
    pub sampling_interval: u32,
}

fn be16<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads the header; [`run`] has checked nothing yet. `None` if the datagram is too short.
pub fn header(version: u16, datagram: &[u8]) -> Option<Header> {
    let common: &[u8; 16] = datagram.first_chunk()?;
    let (exporter_s, exporter_ns) = (be32(common, 8), be32(common, 12));
    let more: Option<&[u8; 24]> = datagram.first_chunk();
    if version != 1 && more.is_none() {
        return None;
    }
    let v5 = more.filter(|_| version == 5);
    Some(Header {
        sequence: more.filter(|_| version != 1).map_or(0, |h| be32(h, 16)),
        engine: v5.map_or(0, |h| be16(h, 20)),
        uptime_ms: be32(common, 4),
        exporter_s,
        exporter_ns,
        exporter_ms: u64::from(exporter_s) * 1000 + u64::from(exporter_ns) / 1_000_000,
        // The upper two bits are the mode, which exporters leave 0.
        sampling_interval: v5.map_or(0, |h| (be16(h, 22) & 0x3fff).into()),
    })
}

/// Decodes the records of a datagram whose header was read, and appends them.
pub fn run(
    version: u16,
    datagram: &[u8],
    base: FlowRecord,
    clocks: &Clocks,
    records: &mut Vec<FlowRecord>,
) -> Result<usize, Problem> {
    let (header, most, expected) = match version {
        1 => (16, 24, "1 to 24"),
        _ => (24, 30, "1 to 30"),
    };
    let count = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
    if !(1..=most).contains(&count) {
        return Err(Problem {
            reason: Rejection::Malformed,
            offset: 2,
            what: "number of records",
            found: count,
            expected: Expected::Words(expected),
        });
    }
    let body = &datagram[header..];
    let record = match version {
        // Cisco's routers send 52 bytes, softflowd 48: all that differs is padding at the end.
        1 if body.len() != count * 52 => 48,
        5 => 48,
        _ => 52,
    };
    if body.len() != count * record {
        return Err(Problem {
            reason: if body.len() < count * record {
                Rejection::Truncated
            } else {
                Rejection::Malformed
            },
            offset: 2,
            what: "number of records, with a datagram length of",
            found: datagram.len(),
            expected: Expected::Exactly(header + count * record),
        });
    }
    match (version, record) {
        (1, 48) => append::<48>(body, records, |record| v1(record, base, clocks)),
        (1, _) => append::<52>(body, records, |record| v1(record, base, clocks)),
        (5, _) => append::<48>(body, records, |record| v5_v7(record, base, clocks)),
        _ => append::<52>(body, records, |record| v5_v7(record, base, clocks)),
    }
    Ok(count)
}

fn append<const N: usize>(
    body: &[u8],
    records: &mut Vec<FlowRecord>,
    decode: impl Fn(&[u8; N]) -> FlowRecord,
) {
    let chunks = body.chunks_exact(N);
    // Each chunk has N bytes.
    records.extend(chunks.filter_map(|chunk| chunk.first_chunk()).map(decode));
}

fn address<const N: usize>(record: &[u8; N], at: usize) -> Option<IpAddr> {
    Some(Ipv4Addr::from(be32(record, at)).into())
}

/// What v1, v5 and v7 have in the same place.
#[inline(always)]
fn common<const N: usize>(record: &[u8; N], base: FlowRecord) -> FlowRecord {
    FlowRecord {
        source: address(record, 0),
        destination: address(record, 4),
        next_hop: address(record, 8),
        input: be16(record, 12).into(),
        output: be16(record, 14).into(),
        packets: be32(record, 16).into(),
        octets: be32(record, 20).into(),
        start_uptime_ms: be32(record, 24),
        end_uptime_ms: be32(record, 28),
        source_port: be16(record, 32),
        destination_port: be16(record, 34),
        ..base
    }
}

#[inline(always)]
fn v1<const N: usize>(record: &[u8; N], base: FlowRecord, clocks: &Clocks) -> FlowRecord {
    let mut flow = FlowRecord {
        protocol: record[38],
        tos: record[39],
        tcp_flags: record[40],
        ..common(record, base)
    };
    times::settle(&mut flow, clocks);
    flow
}

/// The fields of v5, and those of v7 that both have.
#[inline(always)]
fn v5_v7<const N: usize>(record: &[u8; N], base: FlowRecord, clocks: &Clocks) -> FlowRecord {
    let mut flow = FlowRecord {
        tcp_flags: record[37],
        protocol: record[38],
        tos: record[39],
        source_as: be16(record, 40).into(),
        destination_as: be16(record, 42).into(),
        source_mask: record[44],
        destination_mask: record[45],
        ..common(record, base)
    };
    times::settle(&mut flow, clocks);
    flow
}
