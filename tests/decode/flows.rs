//! What becomes of each element of a flow.

use std::net::SocketAddr;

use flowd_rs::collector::decode::{Decoder, Rejection};
use flowd_rs::collector::record::{ExporterKey, FlowRecord};

use crate::netflow::{REVERSE, VARIABLE, old, short_v1, variable};
use crate::{Bench, NOW, NOW_MS, UPTIME, fields, from, ip, ipfix, one, v9};

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
fn records_of_v1_may_be_shorter() {
    for count in [1, 12, 24] {
        let long = Bench::new().good(&old(1, count, 0, UPTIME, NOW));
        let short = Bench::new().good(&short_v1(count, UPTIME, NOW));
        assert_eq!(long, short);
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
fn runs_of_records_with_the_same_lengths_and_with_others() {
    let mut content = Vec::new();
    let names = ["a", "b", "cc", "cc", "d", "", "", "eeee", "f"];
    for (n, name) in names.into_iter().enumerate() {
        content.extend(variable(name.as_bytes(), n == 3));
        content.extend([192, 0, 2, n as u8]);
        content.extend(variable(&vec![1; 1 + n % 3], false));
    }
    let message = ipfix().template(256, &[(82, VARIABLE), (8, 4), (1, VARIABLE)]);
    let records = Bench::new().good(&message.set(256, &content).done());
    assert_eq!(records.len(), names.len());
    for (n, record) in records.iter().enumerate() {
        assert_eq!(record.source, ip(&format!("192.0.2.{n}")));
        assert_eq!(record.octets, [1, 0x101, 0x1_0101][n % 3]);
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

#[test]
fn sampling_intervals_in_every_form() {
    let interval = |options: &[(u16, u16, u128)]| {
        let (template, values) = fields(options);
        let mut bench = Bench::new();
        let learn = ipfix()
            .options_template(257, &[(144, 4)], &template)
            .set(257, &[vec![0; 4], values].concat())
            .template(300, &[(8, 4)])
            .set(300, &[192, 0, 2, 1]);
        bench.good(&learn.done())[0].sampling_interval
    };
    assert_eq!(interval(&[(34, 4, 100), (35, 1, 1)]), 100);
    assert_eq!(interval(&[(50, 4, 200)]), 200);
    assert_eq!(interval(&[(304, 2, 1), (305, 4, 1), (306, 4, 999)]), 1000);
    assert_eq!(interval(&[(304, 2, 1), (305, 4, 10), (306, 4, 995)]), 101);
    assert_eq!(interval(&[(305, 4, 512)]), 512);
    assert_eq!(interval(&[(305, 4, 10), (306, 4, 0)]), 1);
    assert_eq!(interval(&[(309, 4, 1), (310, 4, 4096)]), 4096);
    let probability = u128::from(0.001_f64.to_bits());
    assert_eq!(interval(&[(311, 8, probability)]), 1000);
    // The only selector that there is.
    assert_eq!(interval(&[(302, 8, 9), (305, 4, 1), (306, 4, 9)]), 10);
    for nothing in [
        &[(34, 4, 0)][..],
        &[(305, 4, 0), (306, 4, 9)],
        &[(309, 4, 0), (310, 4, 9)],
        &[(311, 8, 0)],
        &[(311, 8, u64::MAX as u128)],
    ] {
        assert_eq!(interval(nothing), 0, "{nothing:?}");
    }
    assert_eq!(interval(&[(34, 8, u64::MAX as u128)]), u32::MAX);
}

#[test]
fn sampling_intervals_of_selectors_and_of_interfaces() {
    let mut bench = Bench::new();
    let learn = ipfix()
        .options_template(257, &[(302, 2)], &[(305, 4), (306, 4)])
        .set(
            257,
            &[0, 1, 0, 0, 0, 1, 0, 0, 0, 9, 0, 2, 0, 0, 0, 1, 0, 0, 0, 99],
        )
        .options_template(258, &[(10, 4)], &[(34, 4)])
        .set(258, &[0, 0, 0, 7, 0, 0, 3, 232]);
    bench.good(&learn.done());
    let interval = |bench: &mut Bench, record: &[(u16, u16, u128)]| {
        let (template, values) = fields(record);
        let message = ipfix().template(300, &template).set(300, &values).done();
        bench.good(&message)[0].sampling_interval
    };
    assert_eq!(interval(&mut bench, &[(1, 4, 1), (302, 2, 1)]), 10);
    assert_eq!(interval(&mut bench, &[(1, 4, 1), (302, 8, 2)]), 100);
    assert_eq!(interval(&mut bench, &[(1, 4, 1), (302, 2, 3)]), 0);
    assert_eq!(interval(&mut bench, &[(1, 4, 1), (10, 4, 7)]), 1000);
    assert_eq!(interval(&mut bench, &[(1, 4, 1), (10, 4, 8)]), 0);
    assert_eq!(interval(&mut bench, &[(1, 4, 1), (34, 4, 5)]), 5);
    // In NetFlow v9, 2 is the scope "interface".
    let learn = v9()
        .options_template(258, &[(2, 4)], &[(34, 4)])
        .set(258, &[0, 0, 0, 7, 0, 0, 0, 50])
        .template(300, &[(10, 2), (1, 4)])
        .set(300, &[0, 7, 0, 0, 0, 1, 0, 8, 0, 0, 0, 1]);
    let records = bench.good(&learn.done());
    assert_eq!(records[0].sampling_interval, 50);
    assert_eq!(records[1].sampling_interval, 0);
}

#[test]
fn icmp_has_type_and_code_in_the_destination_port() {
    let port = |record: &[(u16, u16, u128)]| {
        let record = one(&[&[(8, 4, 1)], record].concat());
        (record.source_port, record.destination_port)
    };
    assert_eq!(port(&[(4, 1, 1), (32, 2, 0x0301)]), (0, 0x0301));
    assert_eq!(port(&[(4, 1, 58), (139, 2, 0x8000)]), (0, 0x8000));
    assert_eq!(port(&[(4, 1, 1), (176, 1, 3), (177, 1, 1)]), (0, 0x0301));
    assert_eq!(port(&[(177, 1, 1), (176, 1, 3), (4, 1, 1)]), (0, 0x0301));
    assert_eq!(port(&[(4, 1, 58), (178, 1, 128), (179, 1, 0)]), (0, 0x8000));
    // Some have it in the port and leave the element 0; some have both.
    assert_eq!(port(&[(4, 1, 1), (11, 2, 0x0301), (32, 2, 0)]), (0, 0x0301));
    assert_eq!(
        port(&[(4, 1, 1), (7, 2, 9), (11, 2, 9), (32, 2, 0x0800)]),
        (0, 0x0800)
    );
    // TCP has no type.
    assert_eq!(
        port(&[(4, 1, 6), (7, 2, 9), (11, 2, 8), (32, 2, 7), (176, 1, 6)]),
        (9, 8)
    );
    // Elements of both families in one template.
    let both = [(32, 2, 0x0800), (139, 2, 0x8000), (4, 1, 58)];
    assert_eq!(port(&both), (0, 0x8000));
}

#[test]
fn elements_that_take_the_place_of_missing_ones() {
    let record = one(&[(23, 4, 100), (24, 4, 10), (195, 1, 46), (4, 1, 17)]);
    assert_eq!((record.octets, record.packets, record.tos), (100, 10, 0xb8));
    let record = one(&[(23, 4, 1), (85, 4, 2), (1, 4, 3), (86, 4, 4), (24, 4, 5)]);
    assert_eq!((record.octets, record.packets), (3, 4));
    let ports = [(180, 2, 1), (181, 2, 2), (182, 2, 3), (183, 2, 4)];
    for (protocol, expected) in [(17, (1, 2)), (6, (3, 4)), (47, (0, 0))] {
        let record = one(&[&ports[..], &[(4, 1, protocol), (1, 4, 1)]].concat());
        assert_eq!((record.source_port, record.destination_port), expected);
    }
    let record = one(&[(180, 2, 1), (183, 2, 4), (7, 2, 7), (11, 2, 8), (1, 1, 1)]);
    assert_eq!((record.source_port, record.destination_port), (7, 8));
    let record = one(&[(18, 4, 0x0a00_0001), (252, 4, 7), (253, 4, 8), (1, 1, 1)]);
    assert_eq!(record.next_hop, ip("10.0.0.1"));
    assert_eq!((record.input, record.output), (7, 8));
    let record = one(&[(18, 4, 0x0a00_0001), (15, 4, 0x0a00_0002), (1, 1, 1)]);
    assert_eq!(record.next_hop, ip("10.0.0.2"));
}

#[test]
fn a_template_with_addresses_of_both_families() {
    let six = 0x2001_0db8 << 96 | 1;
    let record = |four: u128, six: u128| {
        one(&[
            (8, 4, four),
            (27, 16, six),
            (28, 16, six),
            (12, 4, four),
            (9, 1, 24),
            (29, 1, 64),
            (13, 1, 16),
            (30, 1, 48),
            (15, 4, four),
            (62, 16, six),
        ])
    };
    let flow = record(0xc000_0201, 0);
    for address in [flow.source, flow.destination, flow.next_hop] {
        assert_eq!(address, ip("192.0.2.1"));
    }
    assert_eq!((flow.source_mask, flow.destination_mask), (24, 16));
    let flow = record(0, six);
    for address in [flow.source, flow.destination, flow.next_hop] {
        assert_eq!(address, ip("2001:db8::1"));
    }
    assert_eq!((flow.source_mask, flow.destination_mask), (64, 48));
    assert_eq!(record(0, 0).source, ip("0.0.0.0"));
}

#[test]
fn integers_of_any_length() {
    for length in 1..=8 {
        let value = 0x0102_0304_0506_0708_u64;
        let expected = u64::MAX >> (64 - 8 * length) & value;
        let record = one(&[(1, length, value.into()), (2, length, value.into())]);
        assert_eq!((record.octets, record.packets), (expected, expected));
        let record = one(&[(1, 1, 1), (10, length, value.into()), (7, length, 0x1_0050)]);
        assert_eq!(record.input, expected as u32);
        assert_eq!(record.source_port, 0x50);
    }
    // No integer has nine bytes, and no address three.
    let record = one(&[(1, 9, 5), (2, 1, 6), (8, 3, 7), (27, 4, 8), (12, 4, 9)]);
    assert_eq!((record.octets, record.packets), (0, 6));
    assert_eq!((record.source, record.destination), (None, ip("0.0.0.9")));
}

#[test]
fn several_sets_and_padding_in_a_datagram() {
    let mut bench = Bench::new();
    for padding in 0..=7 {
        for message in [v9(), ipfix()] {
            let mut first = vec![192, 0, 2, 1, 192, 0, 2, 2];
            first.extend(vec![0; padding]);
            let message = message
                .template(256, &[(8, 4), (12, 4)])
                .set(256, &first)
                .template(257, &[(27, 16)])
                .set(257, &[0x20; 32])
                .set(256, &first);
            assert_eq!(bench.good(&message.done()).len(), 4, "{padding}");
        }
    }
    // Two templates in one set, padded.
    let mut content = crate::netflow::template(256, &[(8, 4, 0)]);
    content.extend(crate::netflow::template(257, &[(12, 4, 0)]));
    content.extend([0; 3]);
    let message = v9().set(0, &content).set(257, &[1; 4]).set(256, &[2; 8]);
    assert_eq!(bench.good(&message.done()).len(), 3);
}
