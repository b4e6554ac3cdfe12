//! Bad input: none of it stops the decoder or becomes a flow, and each fault is counted once.

use flowd_rs::collector::decode::{Decoder, Rejection};
use flowd_rs::collector::record::FlowRecord;

use crate::netflow::{FIELDS_20, Message, REVERSE, VARIABLE, old, short_v1, template, variable};
use crate::{Bench, NOW, UPTIME, from, ipfix, v9};

#[test]
fn what_is_not_netflow() {
    for version in [0, 2, 6, 8, 11, 65535_u16] {
        let datagram = [&version.to_be_bytes()[..], &[0; 100]].concat();
        let (reason, message) = Bench::new().bad(&datagram);
        assert_eq!(reason, Rejection::UnknownVersion);
        let expected = "at byte 0, expected 1, 5, 7, 9, or 10 for IPFIX";
        assert_eq!(message, format!("version {version} {expected}"));
    }
    for datagram in [&[][..], &[0], &[0, 5], &[0, 9, 0, 0], &[0, 10, 0, 4]] {
        let (reason, message) = Bench::new().bad(datagram);
        assert_eq!(reason, Rejection::Truncated, "{message}");
        let length = datagram.len();
        let expected = "at byte 0, expected a whole header";
        assert_eq!(message, format!("datagram length {length} {expected}"));
    }
}

#[test]
fn counts_of_old_versions_that_lie() {
    for version in [1, 5, 7] {
        let datagram = old(version, 10, 0, UPTIME, NOW);
        for count in [0, 9, 11, 24, 30, 31, 65535_u16] {
            let mut lying = datagram.clone();
            lying[2..4].copy_from_slice(&count.to_be_bytes());
            let (records, _) = Bench::new().decode(&lying);
            assert_eq!(records.len(), 0);
            Bench::new().bad(&lying);
        }
        let longer = [&datagram[..], &[0]].concat();
        assert_eq!(Bench::new().bad(&longer).0, Rejection::Malformed);
    }
    let (_, message) = Bench::new().bad(&old(5, 31, 0, UPTIME, NOW));
    assert_eq!(message, "number of records 31 at byte 2, expected 1 to 30");
}

/// One datagram of every kind, and how many records it has.
fn every_kind() -> Vec<(Vec<u8>, usize)> {
    let long = [variable(&[7; 3], false), variable(&[8; 300], true)].concat();
    let names: Vec<u8> = [[1, 1, 1, 1].to_vec(), long].concat().repeat(3);
    let biflow = [(8, 4, 0), (2, 1, 0), (2, 1, REVERSE)];
    let mut kinds = Vec::from([1, 5, 7].map(|version| (old(version, 7, 1, UPTIME, NOW), 7)));
    kinds.push((short_v1(7, UPTIME, NOW), 7));
    for message in [v9(), ipfix()] {
        let length: usize = FIELDS_20
            .iter()
            .map(|(_, length)| usize::from(*length))
            .sum();
        let message = message
            .template(256, &FIELDS_20)
            .set(256, &vec![3; 5 * length])
            .options_template(257, &[(1, 4)], &[(34, 4)])
            .set(257, &[1; 16])
            .template(258, &[(8, 4), (82, VARIABLE), (83, VARIABLE)])
            .set(258, &names);
        kinds.push((message.done(), 8));
    }
    let message = ipfix().template_with(256, &biflow).set(256, &[9; 30]);
    kinds.push((message.done(), 10));
    kinds
}

#[test]
fn a_datagram_that_is_cut_off_at_any_byte() {
    for (datagram, count) in every_kind() {
        let all = Bench::new().good(&datagram);
        assert_eq!(all.len(), count);
        let mut whole_sets = 0;
        for length in 0..datagram.len() {
            if datagram[1] == 1 && length == 16 + count * 48 {
                // As if softflowd had sent it.
                continue;
            }
            let (records, decoded) = Bench::new().decode(&datagram[..length]);
            assert_eq!(records[..], all[..records.len()], "{length}");
            // NetFlow v9 does not tell how long a datagram is: it may end with any set.
            let is_whole = decoded.rejected.total() == 0;
            whole_sets += usize::from(is_whole);
            assert!(!is_whole || datagram[1] == 9, "{length}: {decoded:?}");
        }
        // The end of the header, or of one of five sets, and up to three bytes of padding after it.
        let expected = if datagram[1] == 9 { 6 * 4 } else { 0 };
        assert_eq!(whole_sets, expected);
    }
}

#[test]
fn any_byte_may_be_any_other() {
    let mut bench = Bench::new();
    for (datagram, count) in every_kind() {
        for at in 0..datagram.len() {
            for value in [0, 1, 3, 0x7f, 0x80, 0xff] {
                let mut changed = datagram.clone();
                changed[at] = value;
                let (records, decoded) = bench.decode(&changed);
                assert!(
                    records.len() <= 1000.max(count),
                    "{at} {value}: {decoded:?}"
                );
            }
        }
    }
}

#[test]
fn sets_of_length_0_to_3_and_beyond_the_datagram() {
    for message in [v9(), ipfix()] {
        let message = message.template(256, &[(8, 4)]).set(256, &[1; 4]);
        let good = message.clone().done();
        let at = good.len();
        for length in [0_u16, 1, 2, 3, 9, 65535] {
            let mut datagram = message.clone().set(256, &[2; 4]).done();
            datagram[at + 2..at + 4].copy_from_slice(&length.to_be_bytes());
            let (records, decoded) = Bench::new().decode(&datagram);
            assert_eq!(records.len(), 1);
            assert_eq!(decoded.rejected.total(), 1);
            let (reason, expected) = match length {
                0..=3 => (Rejection::Malformed, "at least 4"),
                _ => (Rejection::Truncated, "at most 8"),
            };
            let problem = decoded.problem.unwrap();
            assert_eq!(problem.reason, reason);
            let at = at + 2;
            let expected = format!("set length {length} at byte {at}, expected {expected}");
            assert_eq!(problem.to_string(), expected);
        }
    }
}

#[test]
fn sets_with_ids_that_mean_nothing() {
    for (message, ids) in [(v9(), [2, 3, 4, 255]), (ipfix(), [0, 1, 4, 255])] {
        for id in ids {
            // What follows is decoded.
            let message = message.clone().set(id, &[1; 8]).template(256, &[(8, 4)]);
            let (records, decoded) = Bench::new().decode(&message.set(256, &[1; 4]).done());
            assert_eq!(records.len(), 1);
            assert_eq!(decoded.rejected.get(Rejection::Malformed), 1);
        }
    }
}

#[test]
fn the_length_of_an_ipfix_message_that_lies() {
    let message = ipfix().template(256, &[(8, 4)]).set(256, &[1; 4]);
    let good = message.done();
    let length = good.len() as u16;
    for (told, records, reason) in [
        (0, 0, Rejection::Malformed),
        (15, 0, Rejection::Malformed),
        (16, 0, Rejection::Malformed),
        (length - 8, 0, Rejection::Malformed),
        (length + 1, 1, Rejection::Truncated),
        (65535, 1, Rejection::Truncated),
    ] {
        let mut lying = good.clone();
        lying[2..4].copy_from_slice(&told.to_be_bytes());
        let (flows, decoded) = Bench::new().decode(&lying);
        assert_eq!(flows.len(), records);
        assert_eq!(decoded.rejected.get(reason), 1, "{told}: {decoded:?}");
    }
}

/// Decodes a set with a template that is to be refused, and data for it.
fn refused(message: Message, template: &[u8]) -> String {
    let set = if message.clone().done()[1] == 9 { 0 } else { 2 };
    let mut bench = Bench::new();
    let (reason, text) = bench.bad(&message.clone().set(set, template).done());
    assert_eq!(reason, Rejection::BadTemplate);
    let (records, decoded) = bench.decode(&message.set(256, &[1; 64]).done());
    assert_eq!(records.len(), 0);
    assert_eq!(decoded.rejected.get(Rejection::NoTemplate), 1);
    text
}

#[test]
fn templates_that_cannot_be_used() {
    let nothing = template(256, &[]);
    assert_eq!(
        refused(v9(), &nothing),
        "number of fields 0 at byte 26, expected at least 1"
    );
    for message in [v9(), ipfix()] {
        for id in [1_u16, 255] {
            let reserved = template(id, &[(8, 4, 0)]);
            let text = refused(message.clone(), &reserved);
            assert!(text.starts_with(&format!("template id {id} at byte ")));
        }
        let empty = template(256, &[(8, 0, 0), (12, 0, 0)]);
        let text = refused(message.clone(), &empty);
        assert!(text.ends_with("expected 1 to 65535 bytes"), "{text}");
        // No datagram can hold such a record.
        let huge = template(256, &[(8, 40_000, 0), (12, 40_000, 0)]);
        refused(message.clone(), &huge);
        // More fields than there are.
        for count in [3_u16, 1000, 65535] {
            let mut lying = template(256, &[(8, 4, 0), (12, 4, 0)]);
            lying[2..4].copy_from_slice(&count.to_be_bytes());
            let text = refused(message.clone(), &lying);
            assert!(text.contains("a template record that ends within its set"));
        }
    }
}

#[test]
fn options_templates_that_cannot_be_used() {
    // Lengths of scopes and options that are not multiples of 4, or lie.
    for lengths in [[0, 3, 0, 4], [0, 4, 0, 5], [0, 0, 0, 0], [0xff, 0xfc, 0, 4]] {
        let content = [&[1, 1][..], &lengths, &[0, 1, 0, 4, 0, 34, 0, 4]].concat();
        let (reason, _) = Bench::new().bad(&v9().set(1, &content).done());
        assert_eq!(reason, Rejection::BadTemplate);
    }
    // One or more of the fields are the scope.
    for numbers in [[0, 2, 0, 0], [0, 2, 0, 3], [0, 2, 0xff, 0xff]] {
        let content = [&[1, 1][..], &numbers, &[0, 1, 0, 4, 0, 34, 0, 4]].concat();
        let (reason, _) = Bench::new().bad(&ipfix().set(3, &content).done());
        assert_eq!(reason, Rejection::BadTemplate);
    }
}

#[test]
fn a_template_of_65535_fields_or_of_too_many_bytes() {
    let mut bench = Bench::new();
    // As many fields as fit into a datagram.
    let fields = vec![(999, 1, 0); 16_000];
    let many = template(256, &fields);
    let datagram = ipfix().set(2, &many).set(256, &[1; 400]).done();
    let (records, decoded) = bench.decode(&datagram);
    assert_eq!((records.len(), decoded.rejected.total()), (0, 1));
    let bytes: usize = bench.exporters.templates().iter().map(|e| e.bytes).sum();
    assert!(bytes <= bench.exporters.limits().exporter_bytes);
    // Fields that overlap in what they fill: the first one counts.
    let twice = [(8, 4), (8, 4), (1, 1), (1, 2)];
    let message = v9().template(256, &twice);
    let record = bench.good(&message.set(256, &[1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4]).done())[0];
    assert_eq!(record.source, crate::ip("1.1.1.1"));
    assert_eq!(record.octets, 3);
}

#[test]
fn withdrawn_templates_are_gone() {
    let mut bench = Bench::new();
    let learn = || {
        let message = ipfix().template(256, &[(8, 4)]).template(257, &[(12, 4)]);
        message
            .options_template(258, &[(144, 4)], &[(34, 4)])
            .done()
    };
    let known = |bench: &mut Bench| {
        [256, 257, 258].map(|id| {
            let (_, decoded) = bench.decode(&ipfix().set(id, &[0; 8]).done());
            decoded.rejected.total() == 0
        })
    };
    for (withdrawal, left) in [
        (ipfix().set(2, &[1, 0, 0, 0]), [false, true, true]),
        (ipfix().set(2, &[0, 2, 0, 0]), [false, false, true]),
        (ipfix().set(3, &[0, 3, 0, 0]), [true, true, false]),
        (ipfix().set(3, &[1, 2, 0, 0]), [true, true, false]),
        (
            ipfix().set(2, &[1, 0, 0, 0, 1, 1, 0, 0]),
            [false, false, true],
        ),
    ] {
        bench.good(&learn());
        assert_eq!(known(&mut bench), [true; 3]);
        let (_, decoded) = bench.decode(&withdrawal.done());
        assert!(decoded.templates_changed);
        assert_eq!(decoded.rejected.total(), 0);
        assert_eq!(known(&mut bench), left);
    }
    // Of one that is not known.
    bench.good(&Message::ipfix(NOW, 0, 99).set(2, &[1, 0, 0, 0]).done());
}

#[test]
fn a_template_id_that_is_used_again_has_the_new_layout() {
    let mut bench = Bench::new();
    for message in [v9(), ipfix()] {
        let content = [[1; 4], [2; 4]].concat();
        let first = message.clone().template(256, &[(8, 4), (12, 4)]);
        let record = bench.good(&first.set(256, &content).done())[0];
        assert_eq!(record.source, crate::ip("1.1.1.1"));
        let second = message.clone().template(256, &[(12, 4), (8, 4)]);
        let record = bench.good(&second.set(256, &content).done())[0];
        assert_eq!(record.source, crate::ip("2.2.2.2"));
        // Options in place of flows.
        let third = message.options_template(256, &[(8, 4)], &[(34, 4)]);
        assert_eq!(bench.good(&third.set(256, &content).done()).len(), 0);
    }
}

#[test]
fn templates_of_one_domain_and_of_one_exporter_are_not_those_of_another() {
    let mut bench = Bench::new();
    let learn = Message::v9(UPTIME, NOW, 1, 7).template(256, &[(8, 4)]);
    bench.good(&learn.done());
    let data = Message::v9(UPTIME, NOW, 1, 8).set(256, &[1; 4]).done();
    assert_eq!(bench.bad(&data).0, Rejection::NoTemplate);
    let data = Message::ipfix(NOW, 1, 7).set(256, &[1; 4]).done();
    assert_eq!(bench.bad(&data).0, Rejection::NoTemplate);
    let data = Message::v9(UPTIME, NOW, 1, 7).set(256, &[1; 4]).done();
    let mut records: Vec<FlowRecord> = Vec::new();
    let other = "192.0.2.98:2055".parse().unwrap();
    let mut decoder = Decoder::new(bench.exporters.clone());
    let decoded = decoder.decode(&data, other, (NOW, 0), &mut records);
    assert_eq!(decoded.rejected.get(Rejection::NoTemplate), 1);
    decoder.decode(&data, from(), (NOW, 0), &mut records);
    assert_eq!(records.len(), 1);
}

#[test]
fn records_that_are_no_flows() {
    for message in [v9(), ipfix()] {
        let message = message.template(256, &[(4, 1), (61, 1)]);
        let (records, decoded) = Bench::new().decode(&message.set(256, &[6; 8]).done());
        assert_eq!(records.len(), 0);
        assert_eq!(decoded.rejected.get(Rejection::NotAFlow), 4);
        assert_eq!(
            decoded.problem.unwrap().to_string(),
            format!(
                "data set 256 at byte {}, expected an address or a counter in its template",
                decoded.problem.unwrap().offset
            )
        );
    }
}

#[test]
fn bytes_after_the_last_record_of_a_set_that_are_no_padding() {
    for message in [v9(), ipfix()] {
        let message = message.template(256, &[(8, 4), (12, 4)]);
        let content = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
        let (records, decoded) = Bench::new().decode(&message.set(256, &content).done());
        assert_eq!(records.len(), 1);
        assert_eq!(decoded.rejected.get(Rejection::Truncated), 1);
    }
    // A length of a variable field that goes beyond its set.
    for length in [
        &[5][..],
        &[254],
        &[255, 0, 5],
        &[255, 0xff, 0xff],
        &[255, 0],
        &[255],
    ] {
        let message = ipfix().template(256, &[(8, 4), (82, VARIABLE)]);
        let content = [&[1, 1, 1, 1, 0, 2, 2, 2, 2], length].concat();
        let (records, decoded) = Bench::new().decode(&message.set(256, &content).done());
        assert_eq!(records.len(), 1, "{length:?}");
        assert_eq!(decoded.rejected.get(Rejection::Truncated), 1);
    }
}
