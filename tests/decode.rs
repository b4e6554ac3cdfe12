//! Decoding of NetFlow and IPFIX: crafted datagrams, good and bad.
#![allow(missing_docs)]

#[path = "common/netflow.rs"]
#[allow(dead_code)]
mod netflow;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use flowd_rs::collector::decode::{Decoded, Decoder, Rejection};
use flowd_rs::collector::exporters::{Exporters, Limits};
use flowd_rs::collector::record::{ExporterKey, FlowRecord};
use netflow::{Message, REVERSE, VARIABLE, number, old, variable};

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

#[test]
fn records_of_v1_v5_and_v7() {
    for (version, most) in [(1, 24), (5, 30), (7, 30)] {
        for count in [1, most] {
            let (records, decoded) = Bench::new().decode(&old(version, count, 77, UPTIME, NOW));
            assert_eq!(decoded.problem, None);
            assert_eq!(records.len(), count as usize);
            let n = count - 1;
            let is_5 = version == 5;
            let or_0 = |condition: bool, value: u32| if condition { value } else { 0 };
            let expected = FlowRecord {
                received_s: NOW,
                received_us: 250_000,
                exporter: from().ip(),
                source: ip("192.0.2.1"),
                destination: ip("198.51.100.2"),
                next_hop: ip("203.0.113.3"),
                source_port: 40_000 + n as u16,
                destination_port: 443,
                protocol: 6,
                tcp_flags: 0x1b,
                tos: 0x20,
                source_mask: or_0(version != 1, 24) as u8,
                destination_mask: or_0(version != 1, 16) as u8,
                packets: u64::from(10 + n),
                octets: u64::from(1000 + n),
                input: 7,
                output: 8,
                source_as: or_0(version != 1, 65_000),
                destination_as: or_0(version != 1, 65_001),
                version,
                uptime_ms: UPTIME,
                exporter_s: NOW,
                exporter_ns: 500_000_000,
                start_uptime_ms: UPTIME - 5000,
                end_uptime_ms: UPTIME - 1000,
                start_ms: NOW_MS + 500 - 5000,
                end_ms: NOW_MS + 500 - 1000,
                engine_type: or_0(is_5, 1) as u16,
                engine_id: or_0(is_5, 2) as u16,
                sequence: or_0(version != 1, 77),
                domain: 0,
                sampling_interval: or_0(is_5, 100),
                flow_label: None,
                rule_tag: None,
                attribution: None,
            };
            assert_eq!(records[n as usize], expected);
            assert_eq!(decoded.clock_offset_ms, Some(250));
            let key = ExporterKey {
                address: from().ip(),
                version,
                domain: or_0(is_5, 0x102),
            };
            assert_eq!(decoded.exporter, Some(key));
        }
    }
}

#[test]
fn every_element_of_a_flow() {
    let record = one(&[
        (8, 4, 0xc000_0201),
        (12, 4, 0xc633_6402),
        (15, 4, 0xcb00_7103),
        (1, 8, 1 << 40),
        (2, 4, 12),
        (4, 1, 6),
        (5, 1, 0xb8),
        (6, 2, 0x0112),
        (7, 2, 40_000),
        (11, 2, 443),
        (9, 1, 24),
        (13, 1, 16),
        (10, 4, 70_000),
        (14, 2, 8),
        (16, 4, 4_200_000_000),
        (17, 2, 65_001),
        (22, 4, u128::from(UPTIME) - 5000),
        (21, 4, u128::from(UPTIME) - 1000),
        (34, 4, 512),
    ]);
    let expected = FlowRecord {
        received_s: NOW,
        received_us: 250_000,
        exporter: from().ip(),
        source: ip("192.0.2.1"),
        destination: ip("198.51.100.2"),
        next_hop: ip("203.0.113.3"),
        source_port: 40_000,
        destination_port: 443,
        protocol: 6,
        tcp_flags: 0x12,
        tos: 0xb8,
        source_mask: 24,
        destination_mask: 16,
        packets: 12,
        octets: 1 << 40,
        input: 70_000,
        output: 8,
        source_as: 4_200_000_000,
        destination_as: 65_001,
        version: 9,
        uptime_ms: UPTIME,
        exporter_s: NOW,
        start_uptime_ms: UPTIME - 5000,
        end_uptime_ms: UPTIME - 1000,
        start_ms: NOW_MS - 5000,
        end_ms: NOW_MS - 1000,
        sequence: 1,
        domain: 7,
        sampling_interval: 512,
        ..FlowRecord::default()
    };
    assert_eq!(record, expected);
    let record = one(&[
        (27, 16, 0x2001_0db8 << 96 | 1),
        (28, 16, 0x2001_0db8 << 96 | 2),
        (62, 16, 0x2001_0db8 << 96 | 3),
        (29, 1, 64),
        (30, 1, 48),
        (85, 4, 99),
        (86, 3, 9),
    ]);
    assert_eq!(record.source, ip("2001:db8::1"));
    assert_eq!(record.destination, ip("2001:db8::2"));
    assert_eq!(record.next_hop, ip("2001:db8::3"));
    assert_eq!((record.source_mask, record.destination_mask), (64, 48));
    assert_eq!((record.octets, record.packets), (99, 9));
    assert_eq!((record.start_ms, record.end_ms), (0, 0));
}

#[test]
fn a_flow_label_of_any_length() {
    for length in 1..=4 {
        let record = one(&[(1, 4, 1), (31, length, 0xfff9_8765)]);
        let expected = [0x65, 0x8765, 0x9_8765, 0x9_8765][usize::from(length) - 1];
        assert_eq!(record.flow_label, Some(expected));
    }
    assert_eq!(one(&[(1, 4, 1)]).flow_label, None);
}

#[test]
fn an_unknown_template_is_known_to_another_worker_and_after_a_restart() {
    let mut bench = Bench::new();
    let (template, values) = fields(&[(8, 4, 1), (1, 4, 2)]);
    let data = v9().set(300, &values).done();
    let (reason, message) = bench.bad(&data);
    assert_eq!(reason, Rejection::NoTemplate);
    assert_eq!(
        message,
        "data set 300 at byte 20, expected its template before it"
    );
    let learn = v9().template(300, &template).done();
    assert!(bench.decode(&learn).1.templates_changed);
    assert!(!bench.decode(&learn).1.templates_changed);
    assert_eq!(bench.good(&data).len(), 1);
    let mut other = Decoder::new(bench.exporters.clone());
    let mut records = Vec::new();
    let port_1: SocketAddr = "192.0.2.99:1".parse().unwrap();
    other.decode(&data, port_1, (NOW, 0), &mut records);
    assert_eq!(records.len(), 1);
    let saved = bench.exporters.save();
    let mut later = Bench::new();
    let restored = later.exporters.restore(&saved, u64::from(NOW)).unwrap();
    assert_eq!((restored.entries, restored.damaged), (1, 0));
    assert_eq!(later.good(&data).len(), 1);
}

#[test]
fn fields_of_variable_length_and_of_enterprises_are_skipped() {
    for long in [false, true] {
        let template = [
            (82, VARIABLE, 0),
            (8, 4, 0),
            (1, 4, 4711),
            (1, VARIABLE, 0),
            (999, VARIABLE, 6871),
            (2, 2, 0),
        ];
        let mut records = Vec::new();
        for name in ["", "eth0"] {
            records.extend(variable(name.as_bytes(), long));
            records.extend([192, 0, 2, 1, 9, 9, 9, 9]);
            records.extend(variable(&[1, 0, 0], long));
            records.extend(variable(&[0; 300], true));
            records.extend([0, 5]);
        }
        let message = ipfix().template_with(256, &template).set(256, &records);
        let records = Bench::new().good(&message.done());
        assert_eq!(records.len(), 2);
        for record in records {
            assert_eq!(record.source, ip("192.0.2.1"));
            assert_eq!((record.octets, record.packets), (65_536, 5));
        }
    }
}

#[test]
fn a_biflow_is_two_records() {
    let template = [
        (8, 4, 0),
        (12, 4, 0),
        (7, 2, 0),
        (11, 2, 0),
        (4, 1, 0),
        (1, 4, 0),
        (2, 4, 0),
        (1, 4, REVERSE),
        (2, 4, REVERSE),
        (6, 1, REVERSE),
    ];
    let record = |reverse: u8| {
        let mut bytes = vec![192, 0, 2, 1, 192, 0, 2, 2, 0x9c, 0x40, 1, 187, 6];
        bytes.extend([
            0, 0, 1, 0, 0, 0, 0, 2, 0, 0, reverse, 0, 0, 0, 0, reverse, 0x12,
        ]);
        bytes
    };
    let both = [record(3), record(0), record(5)].concat();
    let message = ipfix().template_with(256, &template).set(256, &both);
    let records = Bench::new().good(&message.done());
    assert_eq!(records.len(), 5);
    for (record, octets) in records[3..].iter().zip([0x300, 0x500]) {
        assert_eq!(record.source, ip("192.0.2.2"));
        assert_eq!(record.destination, ip("192.0.2.1"));
        assert_eq!((record.source_port, record.destination_port), (443, 40_000));
        assert_eq!((record.octets, record.tcp_flags), (octets, 0x12));
    }
    assert_eq!((records[0].octets, records[0].tcp_flags), (256, 0));
}

#[test]
fn sampling_intervals_of_options_records() {
    let mut bench = Bench::new();
    let data = |sampler: u128| {
        let (template, values) = fields(&[(8, 4, 1), (48, 1, sampler)]);
        v9().template(300, &template).set(300, &values).done()
    };
    assert_eq!(bench.good(&data(1))[0].sampling_interval, 0);
    // Two samplers of v9, as Cisco's routers have them: the scope is the system.
    let options = v9()
        .options_template(257, &[(1, 4)], &[(48, 1), (49, 1), (50, 4)])
        .set(
            257,
            &[
                0, 0, 0, 0, 1, 2, 0, 0, 0, 100, 0, 0, 0, 0, 2, 2, 0, 0, 3, 232,
            ],
        );
    let (records, decoded) = bench.decode(&options.clone().done());
    assert_eq!((records.len(), decoded.problem), (0, None));
    assert!(decoded.templates_changed);
    assert!(!bench.decode(&options.done()).1.templates_changed);
    assert_eq!(bench.good(&data(1))[0].sampling_interval, 100);
    assert_eq!(bench.good(&data(2))[0].sampling_interval, 1000);
    assert_eq!(bench.good(&data(3))[0].sampling_interval, 0);
}
