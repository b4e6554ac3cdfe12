//! Decoding of NetFlow and IPFIX: crafted datagrams, good and bad.
#![allow(missing_docs)]

mod bad;
mod exporters;
mod flows;
#[path = "../common/netflow.rs"]
#[allow(dead_code)]
mod netflow;
mod oracles;
mod properties;
mod sequences;
mod times;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use flowd_rs::collector::decode::{Decoded, Decoder, Rejection};
use flowd_rs::collector::exporters::{Exporters, Limits};
use flowd_rs::collector::record::FlowRecord;
use netflow::{Message, number};

const NOW: u32 = 1_790_000_000;
const NOW_MS: u64 = NOW as u64 * 1000;
const UPTIME: u32 = 1_000_000;

fn from() -> SocketAddr {
    "192.0.2.99:2055".parse().unwrap()
}

/// A decoder that knows no exporter.
struct Bench {
    exporters: Arc<Exporters>,
    decoder: Decoder,
}

impl Bench {
    fn new() -> Bench {
        let exporters = Arc::new(Exporters::new(Limits::default()));
        Bench {
            decoder: Decoder::new(exporters.clone()),
            exporters,
        }
    }

    fn decode(&mut self, datagram: &[u8]) -> (Vec<FlowRecord>, Decoded) {
        let mut records = Vec::new();
        let decoded = self
            .decoder
            .decode(datagram, from(), (NOW, 250_000), &mut records);
        assert_eq!(decoded.records as usize, records.len());
        (records, decoded)
    }

    /// Decodes a datagram without any fault.
    fn good(&mut self, datagram: &[u8]) -> Vec<FlowRecord> {
        let (records, decoded) = self.decode(datagram);
        assert_eq!(decoded.problem, None, "{}", decoded.problem.unwrap());
        assert_eq!(decoded.rejected.total(), 0);
        records
    }

    /// Decodes a datagram that has one fault.
    fn bad(&mut self, datagram: &[u8]) -> (Rejection, String) {
        let (_, decoded) = self.decode(datagram);
        assert_eq!(decoded.rejected.total(), 1, "{decoded:?}");
        let problem = decoded.problem.unwrap();
        assert_eq!(decoded.rejected.get(problem.reason), 1);
        (problem.reason, problem.to_string())
    }
}

fn v9() -> Message {
    Message::v9(UPTIME, NOW, 1, 7)
}

fn ipfix() -> Message {
    Message::ipfix(NOW, 1, 7)
}

fn ip(address: &str) -> Option<IpAddr> {
    Some(address.parse().unwrap())
}

/// Elements, lengths and values of a record.
fn fields(fields: &[(u16, u16, u128)]) -> (Vec<(u16, u16)>, Vec<u8>) {
    let template = fields.iter().map(|(e, l, _)| (*e, *l)).collect();
    let values = fields.iter().flat_map(|(_, l, v)| number(*v, (*l).into()));
    (template, values.collect())
}

/// Decodes one record of v9 and one of IPFIX, which must be the same but for what the header tells.
fn one(record: &[(u16, u16, u128)]) -> FlowRecord {
    let (template, values) = fields(record);
    let [mut nine, mut ten] = [v9(), ipfix()].map(|message| {
        let message = message.template(256, &template).set(256, &values);
        let records = Bench::new().good(&message.done());
        assert_eq!(records.len(), 1);
        records[0]
    });
    let result = nine;
    assert_eq!(ten.version, 10);
    for record in [&mut nine, &mut ten] {
        (record.version, record.uptime_ms) = (0, 0);
        (record.start_ms, record.end_ms) = (0, 0);
    }
    assert_eq!(nine, ten);
    result
}
