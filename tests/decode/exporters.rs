//! What is kept of exporters: bounds, age, and the file that is kept over restarts.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use flowd_rs::collector::decode::{Decoder, Rejection};
use flowd_rs::collector::exporters::{Exporters, Limits, RestoreError};

use crate::netflow::{FIELDS_20, Message};
use crate::{Bench, NOW, UPTIME, ipfix, v9};

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    let kilobytes = line.split_whitespace().nth(1).unwrap();
    kilobytes.parse::<usize>().unwrap() << 10
}

fn accounted(exporters: &Exporters) -> usize {
    exporters.templates().iter().map(|known| known.bytes).sum()
}

#[test]
fn templates_of_a_million_spoofed_senders_are_bounded() {
    let exporters = Arc::new(Exporters::new(Limits::default()));
    let mut decoder = Decoder::new(exporters.clone());
    let mut records = Vec::new();
    let before = resident();
    // A real exporter, which sends once in a while.
    let router: SocketAddr = "192.0.2.1:2055".parse().unwrap();
    let learn = v9().template(256, &FIELDS_20).done();
    decoder.decode(&learn, router, (NOW, 0), &mut records);
    decoder.decode(&learn, router, (NOW + 2, 0), &mut records);
    let mut most = 0;
    for n in 0..1_000_000_u32 {
        let address = if n % 2 == 0 {
            Ipv4Addr::from(0x0a00_0000 + n).into()
        } else {
            Ipv6Addr::from(u128::from(n) << 64 | 1).into()
        };
        let sender = SocketAddr::new(address, n as u16);
        let now = NOW + 3 + n / 50_000;
        decoder.decode(&learn, sender, (now, n % 50_000 * 20), &mut records);
        if n % 4096 == 0 {
            most = most.max(exporters.bytes());
            assert_eq!(exporters.bytes(), accounted(&exporters));
        }
    }
    assert!(most <= exporters.limits().total_bytes, "{most}");
    assert!(exporters.templates().len() > 1000);
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{} MiB more", grown >> 20);
    let data = v9().set(256, &[1; 55]).done();
    let decoded = decoder.decode(&data, router, (NOW + 60, 0), &mut records);
    assert_eq!(decoded.rejected.total(), 0);
    assert_eq!(records.len(), 1);
}

#[test]
fn one_address_cannot_take_the_memory_of_all() {
    let mut bench = Bench::new();
    let limit = bench.exporters.limits().exporter_bytes;
    // Many templates, then many domains.
    for domain in 0..100 {
        for id in 256..400 {
            let message = Message::v9(UPTIME, NOW, 1, domain);
            bench.good(&message.template(id, &FIELDS_20).done());
        }
        assert!(accounted(&bench.exporters) <= limit);
    }
    for domain in 0..10_000 {
        let message = Message::v9(UPTIME, NOW, 1, domain);
        bench.good(&message.template(256, &FIELDS_20).done());
    }
    assert!(accounted(&bench.exporters) <= limit);
    assert_eq!(bench.exporters.bytes(), accounted(&bench.exporters));
    // Sampling intervals.
    for sampler in 0..20_000_u32 {
        let message = v9().options_template(257, &[(1, 4)], &[(48, 4), (34, 4)]);
        let sampler = sampler.to_be_bytes();
        let content = [[0; 4], sampler, [0, 0, 1, 0]].concat();
        let message = message.set(257, &content).done();
        if sampler[3] == 0 {
            bench.good(&message);
        } else {
            bench.decode(&message);
        }
    }
    assert!(accounted(&bench.exporters) <= limit);
}

#[test]
fn what_is_used_stays_when_an_exporter_has_too_much() {
    let mut bench = Bench::new();
    let mut records = Vec::new();
    let data = v9().set(256, &[1; 55]).done();
    let mut decode = |datagram: &[u8], now: u32| {
        let sender = crate::from();
        bench
            .decoder
            .decode(datagram, sender, (now, 0), &mut records)
    };
    decode(&v9().template(256, &FIELDS_20).done(), NOW);
    for id in 257..3000 {
        let now = NOW + u32::from(id);
        decode(&v9().template(id, &FIELDS_20).done(), now);
        assert_eq!(decode(&data, now).rejected.total(), 0);
    }
    let early = v9().set(300, &[1; 55]).done();
    let decoded = decode(&early, NOW + 3000);
    assert_eq!(decoded.rejected.get(Rejection::NoTemplate), 1);
}

#[test]
fn templates_expire_after_their_last_use() {
    let mut bench = Bench::new();
    let lifetime = bench.exporters.limits().lifetime_s;
    let now = u64::from(NOW);
    bench.good(&v9().template(256, &[(8, 4)]).done());
    bench.good(&v9().template(257, &[(8, 4)]).done());
    bench.good(&ipfix().template(256, &[(8, 4)]).done());
    bench.exporters.expire(now + lifetime);
    assert_eq!(bench.exporters.templates().len(), 2);
    let mut records = Vec::new();
    let later = NOW + lifetime as u32;
    let data = v9().set(257, &[1; 4]).done();
    bench
        .decoder
        .decode(&data, crate::from(), (later, 0), &mut records);
    bench.exporters.expire(now + lifetime + 1);
    let [known] = bench.exporters.templates()[..] else {
        panic!("{:?}", bench.exporters.templates());
    };
    assert_eq!((known.key.version, known.templates), (9, 1));
    assert_eq!(bench.exporters.bytes(), known.bytes);
    bench.exporters.expire(now + 2 * lifetime + 1);
    assert!(bench.exporters.templates().is_empty());
    assert_eq!(bench.exporters.bytes(), 0);
}

/// Exporters with templates of both kinds, sampling intervals and a time of start.
fn known() -> Bench {
    let mut bench = Bench::new();
    let init = 1_789_000_000_000_u64;
    for message in [v9(), ipfix()] {
        let message = message
            .template(256, &FIELDS_20)
            .options_template(257, &[(144, 4)], &[(48, 2), (34, 4)])
            .set(257, &[0, 0, 0, 0, 0, 3, 0, 0, 0, 100])
            .options_template(258, &[(144, 4)], &[(160, 8), (34, 4)])
            .set(
                258,
                &[&[0; 4], &init.to_be_bytes()[..], &[0, 0, 0, 9]].concat(),
            );
        bench.good(&message.done());
    }
    bench
}

#[test]
fn a_restart_forgets_nothing() {
    let before = known();
    let saved = before.exporters.save();
    let after = Bench::new();
    let restored = after.exporters.restore(&saved, u64::from(NOW) + 9).unwrap();
    assert_eq!(restored.damaged + restored.expired, 0);
    // Three templates, two intervals and a start, twice.
    assert_eq!(restored.entries, 12);
    assert_eq!(before.exporters.templates(), after.exporters.templates());
    let lines = |bytes: &[u8]| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(lines(&after.exporters.save()), lines(&saved));
    let late = u64::from(NOW) + after.exporters.limits().lifetime_s + 1;
    let old = Bench::new();
    assert_eq!(old.exporters.restore(&saved, late).unwrap().expired, 12);
    assert!(old.exporters.templates().is_empty());
}

#[test]
fn a_damaged_file_costs_the_damaged_entries_only() {
    let saved = known().exporters.save();
    let header = saved.iter().position(|byte| *byte == b'\n').unwrap();
    for at in (header + 1..saved.len()).step_by(3) {
        for value in [b'7', b' ', b'\n', 0xff] {
            let mut damaged = saved.clone();
            damaged[at] = value;
            let exporters = Exporters::new(Limits::default());
            let restored = exporters.restore(&damaged, u64::from(NOW)).unwrap();
            let is_same = damaged == saved;
            // A line that loses its end takes the next one with it.
            let lost = if is_same { 0..=0 } else { 1..=2 };
            assert!(
                lost.contains(&(12 - restored.entries)),
                "{at} {value}: {restored:?}"
            );
            assert_eq!(restored.damaged == 0, is_same);
        }
    }
    for length in (0..saved.len()).step_by(7) {
        let exporters = Exporters::new(Limits::default());
        let restored = exporters.restore(&saved[..length], u64::from(NOW));
        assert!(length <= header || restored.is_ok());
    }
    for (text, error) in [
        ("", RestoreError::Foreign),
        ("[]", RestoreError::Foreign),
        ("flowd exporters 2\n", RestoreError::Version(2)),
    ] {
        let exporters = Exporters::new(Limits::default());
        assert_eq!(exporters.restore(text.as_bytes(), 0), Err(error));
    }
}

#[test]
fn workers_learn_from_each_other_at_the_same_time() {
    let exporters = Arc::new(Exporters::new(Limits::default()));
    std::thread::scope(|scope| {
        for worker in 0..4_u16 {
            let exporters = exporters.clone();
            scope.spawn(move || {
                let mut decoder = Decoder::new(exporters);
                let mut records = Vec::new();
                for n in 0..200 {
                    let id = 256 + worker * 200 + n;
                    let message = v9().template(id, &[(8, 4)]).set(id, &[1; 4]).done();
                    let sender = crate::from();
                    let decoded = decoder.decode(&message, sender, (NOW, 0), &mut records);
                    assert_eq!(decoded.rejected.total(), 0);
                }
            });
        }
    });
    assert_eq!(exporters.templates()[0].templates, 800);
    assert_eq!(exporters.bytes(), accounted(&exporters));
}
