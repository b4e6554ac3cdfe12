//! Decodes NetFlow v1, v5, v7, v9 and IPFIX to flow records. No I/O, no clock.
//!
//! The templates of v9 and IPFIX are compiled once, by `template.rs` and `plan.rs`; `exporters.rs` keeps them. `sets.rs` walks through a
//! datagram with them.

pub mod elements;
pub mod options;
pub mod plan;
mod problem;
pub mod sampling;
pub mod sequence;
mod sets;
pub mod template;
pub mod times;
mod v1_v5_v7;

use std::net::SocketAddr;
use std::sync::Arc;

use self::plan::Places;
use self::sequence::{Counted, Recent, Sequence};
use self::times::Clocks;
use super::exporters::Exporters;
use super::record::{ExporterKey, FlowRecord};

pub use self::problem::{Expected, Problem, Rejection, Rejections};

/// What became of a datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// Who sent it; `None` if not even the header could be read.
    pub exporter: Option<ExporterKey>,
    /// Records that were appended.
    pub records: u32,
    /// Records that were rejected. A set, a template or a datagram that cannot be read counts as one.
    pub rejected: Rejections,
    /// The first problem.
    pub problem: Option<Problem>,
    /// Records that were lost on the way, as the gap in the sequence numbers before this datagram tells.
    pub lost_records: u64,
    /// The exporter's clock minus ours, in milliseconds.
    pub clock_offset_ms: Option<i64>,
    /// Whether what is to be kept over a restart has changed: templates, or sampling intervals.
    pub templates_changed: bool,
}

impl Decoded {
    /// `start` is the place in the datagram that the offset of the problem counts from.
    fn reject(&mut self, problem: Problem, records: u32, start: usize) {
        self.rejected.add(problem.reason, records);
        let offset = problem.offset + start;
        self.problem.get_or_insert(Problem { offset, ..problem });
    }
}

/// Decodes datagrams; each worker has its own.
pub struct Decoder {
    exporters: Arc<Exporters>,
    sequences: Recent<(SocketAddr, u16, u32), Sequence>,
    /// Reused from record to record.
    places: Places,
}

impl Decoder {
    /// A decoder that knows what the others have learned from exporters.
    pub fn new(exporters: Arc<Exporters>) -> Decoder {
        Decoder {
            sequences: Recent::new(exporters.limits().sequences),
            exporters,
            places: Places::default(),
        }
    }

    /// Number of exporters' processes whose sequence numbers are followed.
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Decodes a datagram that arrived at `received`, UNIX seconds and microseconds, and appends its flow records. An IPv4 sender's
    /// address is not mapped to IPv6.
    pub fn decode(
        &mut self,
        datagram: &[u8],
        from: SocketAddr,
        received: (u32, u32),
        records: &mut Vec<FlowRecord>,
    ) -> Decoded {
        let mut decoded = Decoded::default();
        let new = records.len();
        let version = datagram
            .first_chunk()
            .map(|version| u16::from_be_bytes(*version));
        let read = match version {
            Some(version @ (1 | 5 | 7)) => {
                self.old(version, datagram, from, received, records, &mut decoded)
            }
            Some(version @ (9 | 10)) => {
                self.sets(version, datagram, from, received, records, &mut decoded)
            }
            Some(version) => Err(Problem {
                reason: Rejection::UnknownVersion,
                offset: 0,
                what: "version",
                found: version.into(),
                expected: Expected::Words("1, 5, 7, 9, or 10 for IPFIX"),
            }),
            None => Err(no_header(datagram)),
        };
        if let Err(problem) = read {
            decoded.reject(problem, 1, 0);
        }
        decoded.records = (records.len() - new) as u32;
        decoded
    }

    /// NetFlow v1, v5 and v7.
    fn old(
        &mut self,
        version: u16,
        datagram: &[u8],
        from: SocketAddr,
        received: (u32, u32),
        records: &mut Vec<FlowRecord>,
        decoded: &mut Decoded,
    ) -> Result<(), Problem> {
        let header = v1_v5_v7::header(version, datagram).ok_or_else(|| no_header(datagram))?;
        let key = ExporterKey {
            address: from.ip(),
            version,
            domain: header.engine.into(),
        };
        decoded.exporter = Some(key);
        decoded.clock_offset_ms = Some(clock_offset(header.exporter_ms, received));
        let clocks = Clocks::new(header.exporter_ms, Some(header.uptime_ms), received);
        let base = FlowRecord {
            received_s: received.0,
            received_us: received.1,
            exporter: key.address,
            version,
            uptime_ms: header.uptime_ms,
            exporter_s: header.exporter_s,
            exporter_ns: header.exporter_ns,
            engine_type: header.engine >> 8,
            engine_id: header.engine & 0xff,
            sequence: header.sequence,
            sampling_interval: header.sampling_interval,
            ..FlowRecord::default()
        };
        let count = v1_v5_v7::run(version, datagram, base, &clocks, records)? as u32;
        if version != 1 {
            let counted = Counted {
                sequence: header.sequence,
                data_records: count,
                flow_records: count,
                exact: true,
                uptime_ms: Some(header.uptime_ms),
            };
            decoded.lost_records = self.follow(from, key, counted);
        }
        Ok(())
    }

    /// NetFlow v9 and IPFIX.
    fn sets(
        &mut self,
        version: u16,
        mut datagram: &[u8],
        from: SocketAddr,
        received: (u32, u32),
        records: &mut Vec<FlowRecord>,
        decoded: &mut Decoded,
    ) -> Result<(), Problem> {
        let header = sets::header(version, datagram).ok_or_else(|| no_header(datagram))?;
        let key = ExporterKey {
            address: from.ip(),
            version,
            domain: header.domain,
        };
        decoded.exporter = Some(key);
        if version == 10 {
            // RFC 7011, 3.1: the length of the message.
            let length = usize::from(u16::from_be_bytes([datagram[2], datagram[3]]));
            if length != datagram.len() {
                let problem = Problem {
                    reason: if length > datagram.len() {
                        Rejection::Truncated
                    } else {
                        Rejection::Malformed
                    },
                    offset: 2,
                    what: "message length",
                    found: length,
                    expected: Expected::Exactly(datagram.len()),
                };
                if length < header.length {
                    return Err(problem);
                }
                // What there is may be good.
                decoded.reject(problem, 1, 0);
                datagram = &datagram[..length.min(datagram.len())];
            }
        }
        let exporter_ms = u64::from(header.exporter_s) * 1000;
        decoded.clock_offset_ms = Some(clock_offset(exporter_ms, received));
        let uptime_ms = header.uptime_ms;
        let datagram = sets::Datagram {
            bytes: datagram,
            key,
            header,
            base: FlowRecord {
                received_s: received.0,
                received_us: received.1,
                exporter: key.address,
                version,
                uptime_ms: uptime_ms.unwrap_or(0),
                exporter_s: header.exporter_s,
                sequence: header.sequence,
                domain: header.domain,
                ..FlowRecord::default()
            },
            clocks: Clocks::new(exporter_ms, uptime_ms, received),
            now_us: u64::from(received.0) * 1_000_000 + u64::from(received.1),
            exporters: &self.exporters,
        };
        let mut results = sets::Results {
            records,
            decoded,
            places: &mut self.places,
        };
        let counted = sets::run(&datagram, &mut results);
        decoded.lost_records = self.follow(from, key, counted);
        Ok(())
    }

    /// Follows the sequence numbers of a sender. Returns how many records were lost.
    fn follow(&mut self, from: SocketAddr, key: ExporterKey, counted: Counted) -> u64 {
        let sender = (from, key.version, key.domain);
        match self.sequences.get(&sender) {
            Some(sequence) => sequence.follow(counted),
            None => {
                let first = Sequence::new(key.version, counted);
                self.sequences.insert(sender, first);
                0
            }
        }
    }
}

fn no_header(datagram: &[u8]) -> Problem {
    Problem {
        reason: Rejection::Truncated,
        offset: 0,
        what: "datagram length",
        found: datagram.len(),
        expected: Expected::Words("a whole header"),
    }
}

/// The exporter's clock minus the time of arrival.
fn clock_offset(exporter_ms: u64, received: (u32, u32)) -> i64 {
    let received_ms = u64::from(received.0) * 1000 + u64::from(received.1) / 1000;
    // Both are UNIX milliseconds of 32 bits of seconds.
    exporter_ms as i64 - received_ms as i64
}
