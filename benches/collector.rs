//! Decoding of datagrams as routers send them, by the collector's decoder and by the crate netflow_parser. The figures of each
//! line are per datagram; throughput counts flow records.
#![allow(missing_docs)]

#[path = "../tests/common/netflow.rs"]
#[allow(dead_code)]
mod netflow;

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowd_rs::collector::decode::Decoder;
use flowd_rs::collector::exporters::{Exporters, Limits};
use netflow::{FIELDS_20, Message, VARIABLE, number, old, variable};
use netflow_parser::NetflowParser;

const NOW: u32 = 1_790_000_000;
const RECORDS: u32 = 24;

/// Records with different values in every field.
fn records(fields: &[(u16, u16)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for n in 0..RECORDS {
        for (element, length) in fields {
            let value = u128::from(n) + u128::from(*element) * 3;
            bytes.extend(number(value, (*length).into()));
        }
    }
    bytes
}

fn benches(criterion: &mut Criterion) {
    let nine = || Message::v9(1_000_000, NOW, 1, 7);
    let ten = || Message::ipfix(NOW, 1, 7);
    let mut named = FIELDS_20.to_vec();
    named.push((82, VARIABLE));
    let mut names = Vec::new();
    for record in records(&FIELDS_20).chunks(records(&FIELDS_20).len() / RECORDS as usize) {
        names.extend(record);
        names.extend(variable(b"eth0", false));
    }
    let feeds = [
        ("v5", Vec::new(), old(5, RECORDS, 0, 1_000_000, NOW)),
        (
            "v9 of 20 fields",
            nine().template(256, &FIELDS_20).done(),
            nine().set(256, &records(&FIELDS_20)).done(),
        ),
        (
            "IPFIX of 20 fields",
            ten().template(256, &FIELDS_20).done(),
            ten().set(256, &records(&FIELDS_20)).done(),
        ),
        (
            "IPFIX of 20 fields and a name",
            ten().template(256, &named).done(),
            ten().set(256, &names).done(),
        ),
    ];
    let from: SocketAddr = "192.0.2.1:2055".parse().unwrap();
    for (name, template, data) in &feeds {
        let mut group = criterion.benchmark_group(*name);
        group.throughput(Throughput::Elements(RECORDS.into()));
        let mut decoder = Decoder::new(Arc::new(Exporters::new(Limits::default())));
        let mut flows = Vec::new();
        decoder.decode(template, from, (NOW, 0), &mut flows);
        group.bench_function("flowd-rs", |b| {
            b.iter(|| {
                flows.clear();
                let decoded = decoder.decode(black_box(data), from, (NOW, 1), &mut flows);
                assert_eq!(decoded.records, RECORDS);
                black_box(&flows);
            });
        });
        let mut parser = NetflowParser::default();
        assert!(parser.parse_bytes(template).error.is_none());
        group.bench_function("netflow_parser", |b| {
            b.iter(|| {
                let parsed = parser.parse_bytes(black_box(data));
                assert!(parsed.error.is_none());
                black_box(parsed)
            });
        });
    }
}

criterion_group!(group, benches);
criterion_main!(group);
