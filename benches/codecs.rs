//! The parts of the hot path without I/O: parsing a line, encoding and decoding a firefly, applying an event to the
//! flow table, a line of the journal.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use std::time::Duration;

use flowd_rs::dispatcher::flow_table::{FlowTable, Now};
use flowd_rs::dispatcher::journal;
use flowd_rs::event::{FlowEvent, State};
use flowd_rs::firefly::{Encoder, decode};
use flowd_rs::plugins::named_pipe::line::parse;
use flowd_rs::registry::Registry;
use jiff::Timestamp;

fn event(n: u32) -> FlowEvent {
    let line = format!(
        "start tcp 2001:db8::{:x} {} 2001:db8::2 443 2 9",
        n >> 15,
        1 + n % 32768
    );
    parse(line.as_bytes(), &Registry::builtin(), Timestamp::now())
        .unwrap()
        .unwrap()
}

fn benches(criterion: &mut Criterion) {
    let registry = Registry::builtin();
    let now = Timestamp::now();
    for (name, line) in [
        (
            "line, ids",
            "start tcp 2001:db8:1:2::a 40001 2001:db8:3:4::b 443 2 9",
        ),
        (
            "line, names",
            "start tcp 2001:db8:1:2::a 40001 2001:db8:3:4::b 443 atlas Staging",
        ),
        (
            "line, rejected",
            "start tcp 2001:db8:1:2::a 40001 2001:db8:3:4::b 70000 2 9",
        ),
    ] {
        criterion.bench_function(name, |b| {
            b.iter(|| parse(black_box(line.as_bytes()), &registry, now))
        });
    }

    let mut encoder = Encoder::new("storage.example.org", "flowd-rs 0.1.0", true);
    let mut datagram = String::new();
    let start = event(1);
    criterion.bench_function("firefly, encode", |b| {
        b.iter(|| {
            datagram.clear();
            // As in the daemon, the send time differs from batch to batch.
            encoder.encode(black_box(&start), Timestamp::now(), &mut datagram);
        });
    });
    criterion.bench_function("firefly, decode", |b| {
        b.iter(|| decode(black_box(datagram.as_bytes()), now))
    });

    let present = Now {
        wall: now,
        boot: Duration::from_secs(1000),
    };
    let mut table = FlowTable::new(2_000_000);
    for n in 0..1_000_000 {
        table.apply(&mut event(n), present, |_| None);
    }
    let mut n = 0;
    criterion.bench_function("table of 1,000,000, start and end", |b| {
        b.iter_batched(
            || {
                n += 1;
                let mut end = event(1_000_000 + n % 1_000_000);
                end.state = State::End;
                (event(1_000_000 + n % 1_000_000), end)
            },
            |(mut start, mut end)| {
                table.apply(&mut start, present, |_| None);
                table.apply(&mut end, present, |_| None)
            },
            BatchSize::SmallInput,
        );
    });

    let (flow, open) = table.iter().next().map(|(f, o)| (f, o.clone())).unwrap();
    let mut lines = String::new();
    criterion.bench_function("journal, encode a line", |b| {
        b.iter(|| {
            lines.clear();
            journal::encode_open(&mut lines, black_box(&flow), black_box(&open));
        });
    });
    let line = lines.trim_end();
    criterion.bench_function("journal, decode a line", |b| {
        b.iter(|| journal::decode(black_box(line), journal::VERSION))
    });
}

criterion_group!(group, benches);
criterion_main!(group);
