//! Encoding and decoding a record of a segment, with CRC.
#![allow(missing_docs)]

use std::hint::black_box;
use std::net::IpAddr;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowd_rs::collector::record::FlowRecord;
use flowd_rs::collector::store::fields::Fields;
use flowd_rs::collector::store::segment::{Records, decode, encode};

/// So many records are encoded into one buffer, as by a batch.
const BATCH: u32 = 1000;

fn record(n: u32, is_v6: bool) -> FlowRecord {
    let address = |v4: &str, v6: &str| -> Option<IpAddr> {
        let text = if is_v6 { v6 } else { v4 };
        text.parse().ok()
    };
    FlowRecord {
        received_s: 1_790_000_000,
        received_us: n,
        exporter: IpAddr::from([192, 0, 2, 1]),
        source: address("198.51.100.7", "2001:db8:1::7"),
        destination: address("203.0.113.9", "2001:db8:2::9"),
        next_hop: address("192.0.2.254", "2001:db8::fe"),
        source_port: n as u16,
        destination_port: 1094,
        protocol: 6,
        packets: u64::from(n),
        octets: 1500 * u64::from(n),
        version: 9,
        start_ms: 1_790_000_000_000,
        end_ms: 1_790_000_010_000,
        sampling_interval: 1000,
        domain: 1,
        flow_label: is_v6.then_some(n & 0xfffff),
        ..FlowRecord::default()
    }
}

fn benches(criterion: &mut Criterion) {
    let families = [("IPv4", false), ("IPv6", true)];
    let fields = [("all", Fields::ALL), ("compatible", Fields::COMPATIBLE)];
    let mut group = criterion.benchmark_group("segments");
    group.throughput(Throughput::Elements(BATCH.into()));
    for ((family, is_v6), (name, fields)) in families.iter().flat_map(|f| fields.map(|g| (*f, g))) {
        let records: Vec<FlowRecord> = (0..BATCH).map(|n| record(n, is_v6)).collect();
        let mut out = Vec::new();
        records
            .iter()
            .for_each(|record| encode(record, fields, &mut out));
        group.bench_function(format!("encode, {family}, {name}"), |b| {
            b.iter(|| {
                out.clear();
                for record in black_box(&records) {
                    encode(record, fields, &mut out);
                }
            });
        });
        group.bench_function(format!("decode, {family}, {name}"), |b| {
            b.iter(|| {
                let mut rest = black_box(&out[..]);
                while let Ok((record, _, length)) = decode(rest) {
                    black_box(record);
                    rest = &rest[length..];
                }
                assert!(rest.is_empty());
            });
        });
    }
    let mut out = Vec::new();
    (0..BATCH).for_each(|n| encode(&record(n, true), Fields::ALL, &mut out));
    let file = out.repeat(100);
    group.throughput(Throughput::Elements(100 * u64::from(BATCH)));
    group.bench_function("read a segment, IPv6, all", |b| {
        b.iter(|| {
            let records = Records::new(black_box(&file[..]));
            assert_eq!(records.flatten().count(), 100 * BATCH as usize);
        });
    });
}

criterion_group! {
    name = group;
    config = Criterion::default();
    targets = benches
}
criterion_main!(group);
