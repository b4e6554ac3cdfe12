//! `/metrics`: time and size of a scrape compared with the `prometheus` crate's own encoder, memory per flow, and the
//! rate of `ongoing` events that the backend processes while it is scraped.
#![allow(missing_docs)]

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use flowd_rs::backends::Backend;
use flowd_rs::backends::prometheus::{FAMILIES, Page, Prometheus, Source, Store};
use flowd_rs::config;
use flowd_rs::event::{FlowEvent, Origin, State};
use flowd_rs::flow::{Flow, Protocol, Tag};
use flowd_rs::metrics::Metrics;
use flowd_rs::metrics::exposition::{Format, Kind};
use flowd_rs::registry::{Registry, SharedRegistry};
use flowd_rs::socket::{Algorithm, Socket, SocketInfo, TcpInfo};
use jiff::Timestamp;
use prometheus::{Encoder, GaugeVec, Opts, TextEncoder};

const PORT: u16 = 19_000;

fn main() {
    println!("| measurement | result | baseline | ratio |");
    println!("| --- | --- | --- | --- |");
    // First, before the allocator has freed memory to reuse.
    memory();
    for count in [100, 1000, 10_000] {
        scrape(count);
    }
    event_rate();
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// An `ongoing` event of flow number `n`, with numbers of a realistic length.
fn ongoing(n: u32) -> FlowEvent {
    let end = |last: u16, port| {
        let address = Ipv6Addr::new(0x2001, 0xdb8, 1, 2, 0, 0, n as u16, last);
        (IpAddr::V6(address), port)
    };
    let flow = Flow::new(Protocol::Tcp, end(1, 40_001), end(2, 5201)).unwrap();
    let mut tcp = [0; 248];
    for (index, bytes) in tcp.chunks_exact_mut(4).enumerate() {
        let value = 123_456_789u32.wrapping_mul(index as u32 + n) % 1_000_003;
        bytes.copy_from_slice(&value.to_ne_bytes());
    }
    let info = SocketInfo {
        inode: n + 1,
        tcp: Some(TcpInfo::parse(&tcp)),
        congestion: Some(Algorithm::new(b"cubic")),
        socket_memory: Some([131_072; 9]),
        ..SocketInfo::default()
    };
    let tag = Tag {
        experiment: 2,
        activity: 9 + (n % 4) as u16,
    };
    FlowEvent {
        tag: Some(tag),
        usage: info.usage(),
        netlink: Some(Arc::new(Socket { flow, info })),
        ..FlowEvent::new(State::Ongoing, flow, Timestamp::now(), Origin::Socket)
    }
}

fn store(count: u32) -> Store {
    let mut store = Store::new(
        usize::MAX,
        Timestamp::UNIX_EPOCH,
        SharedRegistry::new(Registry::builtin()),
    );
    (0..count).for_each(|n| store.apply(&ongoing(n)));
    store
}

fn scrape(count: u32) {
    let (store, registry, metrics) = (store(count), Registry::builtin(), Metrics::new());
    let page = |format| {
        let snapshot = store.snapshot();
        Page::new(
            format,
            Source::Any,
            &registry,
            snapshot,
            None,
            &metrics.gather(),
        )
    };
    let rounds = (20_000 / count).clamp(5, 50);
    let mut size = 0;
    let ours = (0..rounds).map(|_| {
        let began = Instant::now();
        size = page(Format::Text).map(|part| black_box(part).len()).sum();
        began.elapsed().as_secs_f64() * 1e3
    });
    let ours = median(ours.collect());

    let labels = ["act", "dst", "exp", "flow", "src"];
    let crates = prometheus::Registry::new();
    for family in &FAMILIES {
        let gauges = GaugeVec::new(Opts::new(family.name, family.help), &labels).unwrap();
        for n in 0..count {
            let event = ongoing(n);
            let (experiment, activity) = registry.names(event.tag());
            let (source, destination) = (event.flow.source, event.flow.destination);
            let ports = format!("{}:{}", source.port, destination.port);
            let values = [
                activity,
                destination.address.to_string(),
                experiment,
                ports,
                source.address.to_string(),
            ];
            if let Some(value) = family.of_socket(event.netlink.as_ref().unwrap()) {
                gauges.with_label_values(&values).set(value);
            }
        }
        crates.register(Box::new(gauges)).unwrap();
    }
    let mut their_size = 0;
    let theirs = (0..rounds.min(9)).map(|_| {
        let began = Instant::now();
        let mut out = Vec::new();
        TextEncoder::new()
            .encode(&crates.gather(), &mut out)
            .unwrap();
        their_size = black_box(out).len();
        began.elapsed().as_secs_f64() * 1e3
    });
    let theirs = median(theirs.collect());
    println!(
        "| page of {count} flows | {ours:.2} ms, {:.2} MB | the prometheus crate's encoder {theirs:.2} ms, {:.2} MB | {:.2} |",
        size as f64 / 1e6,
        their_size as f64 / 1e6,
        ours / theirs
    );
    let counters = FAMILIES.iter().filter(|f| f.kind == Kind::Counter).count();
    assert!(counters > 0 && size > 0);
}

fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<f64>()
        .unwrap()
        * 1024.0
}

fn memory() {
    const FLOWS: u32 = 50_000;
    let before = resident();
    let store = store(FLOWS);
    let per_flow = (resident() - before) / f64::from(FLOWS);
    let count = black_box(store).snapshot().flows.len();
    println!("| memory per flow with series, {count} flows | {per_flow:.0} bytes |  |  |");
}

fn get() -> usize {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut page = Vec::new();
    stream.read_to_end(&mut page).unwrap();
    page.len()
}

/// Events processed per second, measured for two seconds.
fn rate(channel: &Sender<Arc<FlowEvent>>, events: &[Arc<FlowEvent>]) -> f64 {
    let (began, mut sent) = (Instant::now(), 0u32);
    while began.elapsed() < Duration::from_secs(2) {
        for event in &events[..1000] {
            channel.send(Arc::clone(event)).unwrap();
        }
        sent += 1000;
    }
    f64::from(sent) / began.elapsed().as_secs_f64()
}

fn event_rate() {
    let settings = config::Prometheus {
        address: Ipv4Addr::LOCALHOST.into(),
        port: Some(PORT),
        netlink_port: None,
        skops_port: None,
        per_flow: true,
        max_series: 10_000_000,
    };
    let registry = SharedRegistry::new(Registry::builtin());
    let backend = Prometheus::new(&settings, &registry, None, &Metrics::new()).unwrap();
    let (channel, inbox) = bounded(16_384);
    let events: Vec<_> = (0..10_000).map(|n| Arc::new(ongoing(n))).collect();
    let backend = std::thread::spawn(move || Box::new(backend).run(inbox));
    for event in &events {
        channel.send(Arc::clone(event)).unwrap();
    }
    while get() < 1_000_000 {}
    let (mut alone, mut scraped, mut scrapes) = (Vec::new(), Vec::new(), 0);
    for _ in 0..3 {
        alone.push(rate(&channel, &events));
        let done = AtomicBool::new(false);
        scrapes = std::thread::scope(|scope| {
            let scraper = scope.spawn(|| {
                let mut scrapes = 0;
                while !done.load(Ordering::Relaxed) {
                    get();
                    scrapes += 1;
                }
                scrapes
            });
            scraped.push(rate(&channel, &events));
            done.store(true, Ordering::Relaxed);
            scraper.join().unwrap()
        });
    }
    let (alone, scraped) = (median(alone), median(scraped));
    println!(
        "| `ongoing` events processed while scraped continuously, 10000 flows, {scrapes} scrapes in 2 s | {scraped:.0}/s | not scraped {alone:.0}/s | {:.2} |",
        scraped / alone
    );
    drop(channel);
    backend.join().unwrap().unwrap();
}
