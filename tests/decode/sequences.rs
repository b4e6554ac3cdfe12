//! Records that were lost on the way.

use flowd_rs::collector::decode::Decoder;

use crate::netflow::{Message, old};
use crate::{Bench, NOW, UPTIME, from};

/// Decodes datagrams, and returns how many records were lost in all.
fn lost(datagrams: &[Vec<u8>]) -> u64 {
    let mut bench = Bench::new();
    let all = datagrams.iter();
    all.map(|datagram| bench.decode(datagram).1.lost_records)
        .sum()
}

fn v5(sequence: u32, records: u32) -> Vec<u8> {
    old(5, records, sequence, UPTIME, NOW)
}

/// A datagram of a version whose sequence is `sequence`, with a template and records of flows.
fn with_template(version: u16, sequence: u32, records: usize) -> Vec<u8> {
    let message = if version == 9 {
        Message::v9(UPTIME, NOW, sequence, 7)
    } else {
        Message::ipfix(NOW, sequence, 7)
    };
    let message = message.template(256, &[(8, 4)]);
    message.set(256, &vec![1; 4 * records]).done()
}

#[test]
fn v5_counts_flows() {
    assert_eq!(lost(&[v5(0, 30), v5(30, 10), v5(40, 30)]), 0);
    assert_eq!(lost(&[v5(0, 30), v5(60, 10), v5(100, 1)]), 60);
    // It wraps.
    assert_eq!(lost(&[v5(u32::MAX - 9, 10), v5(0, 10), v5(15, 1)]), 5);
}

#[test]
fn v7_counts_flows_and_v1_nothing() {
    let v7 = |sequence| old(7, 10, sequence, UPTIME, NOW);
    assert_eq!(lost(&[v7(0), v7(10), v7(30)]), 10);
    let v1 = old(1, 10, 0, UPTIME, NOW);
    assert_eq!(lost(&[v1.clone(), v1]), 0);
}

#[test]
fn v9_counts_packets_of_so_many_records_on_average() {
    let v9 = |sequence| with_template(9, sequence, 10);
    assert_eq!(lost(&[v9(1), v9(2), v9(3), v9(4)]), 0);
    assert_eq!(lost(&[v9(1), v9(2), v9(5), v9(6)]), 20);
    // Two lost packets look like a packet of three records.
    let v9 = |sequence| with_template(9, sequence, 3);
    assert_eq!(lost(&[v9(1), v9(2), v9(5), v9(6)]), 6);
}

#[test]
fn ipfix_counts_data_records() {
    let ipfix = |sequence| with_template(10, sequence, 10);
    assert_eq!(lost(&[ipfix(0), ipfix(10), ipfix(20)]), 0);
    assert_eq!(lost(&[ipfix(0), ipfix(10), ipfix(50)]), 30);
    // Options records count, too.
    let options = |sequence| {
        let message = Message::ipfix(NOW, sequence, 7);
        let message = message.options_template(257, &[(144, 4)], &[(34, 4)]);
        message.set(257, &[0, 0, 0, 0, 0, 0, 0, 9]).done()
    };
    assert_eq!(lost(&[options(0), ipfix(1), options(11), ipfix(12)]), 0);
}

#[test]
fn exporters_that_count_something_else() {
    let v9 = |sequence| with_template(9, sequence, 10);
    assert_eq!(lost(&[v9(0), v9(10), v9(20), v9(30), v9(40)]), 0);
    assert_eq!(lost(&[v9(0), v9(10), v9(20), v9(30), v9(60)]), 20);
    let ipfix = |sequence| with_template(10, sequence, 10);
    assert_eq!(lost(&[ipfix(1), ipfix(2), ipfix(3), ipfix(4), ipfix(5)]), 0);
    assert_eq!(
        lost(&[ipfix(1), ipfix(2), ipfix(3), ipfix(4), ipfix(7)]),
        20
    );
}

#[test]
fn softflowd_counts_flow_records_up_to_the_end_of_the_datagram() {
    let mut sequence = 0;
    let mut datagrams = Vec::new();
    for records in [3, 10, 10, 5, 7, 1, 10, 2] {
        sequence += records as u32;
        datagrams.push(with_template(10, sequence, records));
    }
    assert_eq!(lost(&datagrams), 0);
    datagrams.remove(5);
    datagrams.remove(3);
    assert_eq!(lost(&datagrams), 6);
}

#[test]
fn what_comes_late_is_not_lost() {
    // Counted when it seems to be lost, and taken off the next loss.
    let late = [v5(0, 10), v5(20, 10), v5(10, 10), v5(30, 10)];
    assert_eq!(lost(&late), 10);
    let then_lost = [&late[..], &[v5(100, 10)]].concat();
    assert_eq!(lost(&then_lost), 60);
    // A datagram that comes twice.
    let twice = [v5(0, 10), v5(0, 10), v5(10, 10), v5(10, 10), v5(20, 10)];
    assert_eq!(lost(&twice), 0);
}

#[test]
fn an_exporter_that_restarts_has_lost_nothing() {
    for before in [
        5_000,
        100_000,
        3_000_000_000,
        u32::MAX - 1_000_000,
        u32::MAX - 40,
    ] {
        let restarted = |sequence| old(5, 10, sequence, 6_000, NOW);
        let mut datagrams = vec![v5(before, 10), v5(before + 10, 10)];
        datagrams.extend((0..20).map(|n| restarted(n * 10)));
        assert_eq!(lost(&datagrams), 0, "{before}");
    }
    // IPFIX tells no uptime.
    for before in [2_000, 100_000, 3_000_000_000] {
        let mut datagrams = vec![
            with_template(10, before, 10),
            with_template(10, before + 10, 10),
        ];
        datagrams.extend((0..20).map(|n| with_template(10, n * 10, 10)));
        assert_eq!(lost(&datagrams), 0, "{before}");
    }
    // The first loss after it is seen.
    let datagrams = [v5(100_000, 10), v5(0, 10), v5(10, 10), v5(40, 10)];
    assert_eq!(lost(&datagrams), 20);
}

#[test]
fn records_without_a_template_are_not_lost() {
    let unknown = |sequence| {
        let message = Message::ipfix(NOW, sequence, 7);
        message.set(300, &[1; 40]).done()
    };
    assert_eq!(lost(&[unknown(0), unknown(10), unknown(20)]), 0);
}

#[test]
fn each_process_of_an_exporter_has_its_own_sequence() {
    let mut bench = Bench::new();
    let mut records = Vec::new();
    let mut lost = 0;
    for n in 0..10_u32 {
        for (port, start) in [(1, 0), (2, 7_000)] {
            let mut sender = from();
            sender.set_port(port);
            let datagram = v5(start + 10 * n, 10);
            let decoded = bench
                .decoder
                .decode(&datagram, sender, (NOW, 0), &mut records);
            lost += decoded.lost_records;
        }
        for domain in [1, 2] {
            let message = Message::ipfix(NOW, n * domain, domain).template(256, &[(8, 4)]);
            let message = message.set(256, &vec![1; 4 * domain as usize]);
            lost += bench.decode(&message.done()).1.lost_records;
        }
    }
    assert_eq!(lost, 0);
}

#[test]
fn sequences_are_bounded() {
    let limits = flowd_rs::collector::exporters::Limits {
        sequences: 100,
        ..Default::default()
    };
    let exporters = std::sync::Arc::new(flowd_rs::collector::exporters::Exporters::new(limits));
    let mut decoder = Decoder::new(exporters);
    let mut records = Vec::new();
    let mut lost = 0;
    for n in 0..10_000_u32 {
        let mut sender = from();
        sender.set_port(n as u16);
        records.clear();
        decoder.decode(&v5(0, 1), sender, (NOW, 0), &mut records);
        // One that is heard all the time stays known: every second datagram of it is lost.
        sender.set_port(60_000);
        let decoded = decoder.decode(&v5(n * 2, 1), sender, (NOW, 0), &mut records);
        lost += decoded.lost_records;
    }
    assert_eq!(lost, 9_999);
    assert!(decoder.sequences() <= 200, "{}", decoder.sequences());
}
