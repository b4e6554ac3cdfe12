//! One evaluation of the filter of the collector: 20 rules, of which every one is evaluated.
#![allow(missing_docs)]

use std::hint::black_box;
use std::net::IpAddr;

use criterion::{Criterion, criterion_group, criterion_main};
use jiff::tz::TimeZone;

use flowd_rs::collector::filter::{Counts, Filter, Macros, parse_rules};
use flowd_rs::collector::record::FlowRecord;
use flowd_rs::flow::Tag;
use flowd_rs::registry::Registry;
use flowd_rs::scitag;

/// As a site may have them: the networks of its storage, look-ups that are not kept, experiments, lists, and times.
const MIXED: &str = r#"
storage = "{ 192.0.2.0/26, 198.51.100.0/25, 2001:db8:1::/48, 2001:db8:2::/48, 2001:db8:3::/64 }"
discard proto udp dst any port 53
discard proto udp src any port 53
discard proto icmp
discard proto "ipv6-icmp"
discard packets <= 3 bytes < 200
accept tag 1 src $storage
accept tag 2 dst $storage
accept tag 3 experiment atlas
accept tag 4 experiment cms
accept tag 5 experiment { alice, lhcb } activity ! 2
accept tag 6 proto tcp dst any port { 443, 1094, 2811, 8443, 9000-9100 }
accept tag 7 proto tcp src any port 1094
accept tag 8 in_ifndx { 1, 2, 5-9 }
discard agent ! 203.0.113.0/24
discard tcp_flags mask SA equals S
accept tag 9 src 2001:db8:7::/48 dst 2001:db8:8::/48
accept tag 10 src ! 192.0.2.0/24 inet
accept tag 11 label any
accept tag 12 days weekdays after 08:00 before 18:00
accept tag 13 tos 8 bytes > 1000000
"#;

fn benches(criterion: &mut Criterion) {
    let prefixes: String = (0..20)
        .map(|n| format!("accept tag {n} src 10.{n}.0.0/16 dst 2001:db8:{n}::/48\n"))
        .collect();
    // Every record matches, and goes on to the next rule.
    let all: String = (0..20)
        .map(|n| format!("accept tag {n} src any\n"))
        .collect();
    for (name, text) in [
        ("20 rules, mixed", MIXED),
        ("20 rules, prefixes", &prefixes),
        ("20 rules, all match", &all),
        ("no rule", ""),
    ] {
        let registry = Registry::builtin();
        let rules = parse_rules(text, &mut Macros::default(), &registry).unwrap();
        assert!(matches!(rules.rules.len(), 0 | 20));
        let time_zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        let filter = Filter::compile(&rules.rules, &registry, time_zone).unwrap();
        let mut counts = Counts::new(&filter);
        let records = records();
        let mut next = records.iter().cycle();
        criterion.bench_function(&format!("filter, {name}"), |bencher| {
            bencher.iter(|| {
                let record = next.next().unwrap();
                filter.evaluate(black_box(record), &mut counts)
            });
        });
    }
}

/// Records that differ in everything that rules test, so that no branch is predicted by heart.
fn records() -> Vec<FlowRecord> {
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % below
    };
    let address = move |random: &mut dyn FnMut(u64) -> u64, v4: bool| -> IpAddr {
        match v4 {
            true => IpAddr::from([192, 0, random(4) as u8, random(256) as u8]),
            false => {
                let (net, host) = (random(10) as u16, random(1000) as u16);
                IpAddr::from([0x2001, 0xdb8, net, 0, 0, 0, 0, host])
            }
        }
    };
    let mut record = |n: u32| {
        let v4 = random(2) == 0;
        let tag = Tag {
            experiment: random(5) as u16,
            activity: random(20) as u16,
        };
        FlowRecord {
            received_s: 1_795_541_400 + n,
            exporter: IpAddr::from([203, 0, 113, random(3) as u8]),
            source: Some(address(&mut random, v4)),
            destination: Some(address(&mut random, v4)),
            source_port: [53, 1094, 40000][random(3) as usize],
            destination_port: [53, 443, 1094, 40000][random(4) as usize],
            protocol: [6, 6, 17, 1][random(4) as usize],
            tcp_flags: random(32) as u8,
            packets: random(100),
            octets: random(100_000),
            input: random(12) as u32,
            flow_label: (!v4).then(|| scitag::label(tag)),
            ..FlowRecord::default()
        }
    };
    (0..4096).map(&mut record).collect()
}

criterion_group!(filter, benches);
criterion_main!(filter);
