//! Properties of the decoder, for any datagram.

use flowd_rs::collector::record::FlowRecord;
use proptest::prelude::*;
use proptest::sample::subsequence;

use crate::netflow::{Message, REVERSE, VARIABLE, number, old, template, variable};
use crate::{Bench, NOW, UPTIME};

/// An element, and how its value gets into a record.
type Element = (u16, fn(&mut FlowRecord, u64));

/// Elements that stand for themselves, whatever else a record has.
const ELEMENTS: &[Element] = &[
    (1, |r, v| r.octets = v),
    (2, |r, v| r.packets = v),
    (4, |r, v| r.protocol = v as u8),
    (5, |r, v| r.tos = v as u8),
    (6, |r, v| r.tcp_flags = v as u8),
    (7, |r, v| r.source_port = v as u16),
    (11, |r, v| r.destination_port = v as u16),
    (9, |r, v| r.source_mask = v as u8),
    (13, |r, v| r.destination_mask = v as u8),
    (10, |r, v| r.input = v as u32),
    (14, |r, v| r.output = v as u32),
    (16, |r, v| r.source_as = v as u32),
    (17, |r, v| r.destination_as = v as u32),
    (31, |r, v| r.flow_label = Some(v as u32 & 0xf_ffff)),
    (21, |r, v| r.end_uptime_ms = v as u32),
    (22, |r, v| r.start_uptime_ms = v as u32),
];

#[derive(Clone, Debug)]
enum Field {
    /// Index in `ELEMENTS`, length, whether the length is variable, and in the long form.
    Known(usize, u16, bool, bool),
    /// Element, enterprise, length, whether it is variable.
    Unknown(u16, u32, u16, bool),
}

fn fields() -> impl Strategy<Value = Vec<Field>> {
    let known = subsequence((1..ELEMENTS.len()).collect::<Vec<_>>(), 0..ELEMENTS.len());
    let known = known.prop_flat_map(|indices| {
        let field = |index| {
            let form = (1..=8_u16, any::<bool>(), any::<bool>());
            form.prop_map(move |(length, variable, long)| {
                Field::Known(index, length, variable, long)
            })
        };
        indices.into_iter().map(field).collect::<Vec<_>>()
    });
    let unknown = (500..0x7fff_u16, 0..3_u32, 0..40_u16, any::<bool>());
    let unknown = unknown.prop_map(|(element, enterprise, length, variable)| {
        Field::Unknown(element, enterprise, length, variable)
    });
    let unknown = proptest::collection::vec(unknown, 0..4);
    let all = (known, unknown).prop_map(|(mut all, unknown)| {
        // What makes it a flow.
        all.push(Field::Known(0, 8, false, false));
        all.extend(unknown);
        all
    });
    all.prop_shuffle()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_an_encoder_writes_is_what_is_decoded(
        fields in fields(),
        is_v9 in any::<bool>(),
        values in proptest::collection::vec(any::<u64>(), 64),
        count in 1..5_usize,
        padding in 0..4_usize,
    ) {
        let (mut definition, mut content, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        let mut next = values.iter().cycle();
        let mut least = 0;
        for field in &fields {
            let (element, enterprise, length, is_variable) = match *field {
                Field::Known(index, length, is_variable, _) => {
                    (ELEMENTS[index].0, 0, length, is_variable)
                }
                Field::Unknown(element, enterprise, length, is_variable) => {
                    (element, if is_v9 { 0 } else { enterprise }, length, is_variable)
                }
            };
            let length = if is_variable { VARIABLE } else { length };
            least += if is_variable { 1 } else { length };
            definition.push((element, length, enterprise));
        }
        for _ in 0..count {
            let mut record = FlowRecord::default();
            for field in &fields {
                let value = *next.next().unwrap();
                match *field {
                    Field::Known(index, length, is_variable, long) => {
                        let bytes = number(value.into(), length.into());
                        let value = bytes.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
                        ELEMENTS[index].1(&mut record, value);
                        content.extend(if is_variable { variable(&bytes, long) } else { bytes });
                    }
                    Field::Unknown(.., length, is_variable) => {
                        let bytes = vec![value as u8; length.into()];
                        content.extend(if is_variable { variable(&bytes, false) } else { bytes });
                    }
                }
            }
            expected.push(record);
        }
        // Padding is shorter than a record.
        content.extend(vec![0; padding.min(usize::from(least) - 1)]);
        let (message, set) = if is_v9 {
            (Message::v9(UPTIME, NOW, 1, 7), 0)
        } else {
            (Message::ipfix(NOW, 1, 7), 2)
        };
        let message = message.set(set, &template(300, &definition)).set(300, &content);
        let records = Bench::new().good(&message.done());
        prop_assert_eq!(records.len(), expected.len());
        for (record, mut expected) in records.into_iter().zip(expected) {
            prop_assert!(record.start_ms <= record.end_ms);
            expected.received_s = record.received_s;
            expected.received_us = record.received_us;
            expected.exporter = crate::from().ip();
            expected.version = if is_v9 { 9 } else { 10 };
            expected.uptime_ms = if is_v9 { UPTIME } else { 0 };
            expected.exporter_s = NOW;
            expected.sequence = 1;
            expected.domain = 7;
            (expected.start_ms, expected.end_ms) = (record.start_ms, record.end_ms);
            prop_assert_eq!(record, expected);
        }
    }

    #[test]
    fn any_bytes_are_decoded_or_rejected(
        version in prop_oneof![Just(1_u16), Just(5), Just(7), Just(9), Just(10), any::<u16>()],
        bytes in proptest::collection::vec(any::<u8>(), 0..2000),
        learned in any::<bool>(),
    ) {
        let mut bench = Bench::new();
        if learned {
            for id in 0..=255_u16 {
                let fields = [(8, 4, 0), (31, 1, 0), (2, VARIABLE, REVERSE)];
                let content = template(256 + id, &fields[..1 + usize::from(id) % 3]);
                bench.good(&Message::ipfix(NOW, 1, 7).set(2, &content).done());
            }
        }
        let mut datagram = [&version.to_be_bytes()[..], &bytes].concat();
        if version == 10 && datagram.len() >= 16 {
            // The domain that is known.
            datagram[12..16].copy_from_slice(&[0, 0, 0, 7]);
        }
        let (records, decoded) = bench.decode(&datagram);
        prop_assert!(records.len() <= 2 * datagram.len());
        prop_assert!(records.len() + decoded.rejected.total() as usize > 0 || version >= 9);
        prop_assert_eq!(decoded.problem.is_some(), decoded.rejected.total() > 0);
        if let Some(problem) = decoded.problem {
            prop_assert!(problem.offset <= datagram.len());
            prop_assert!(!problem.to_string().contains('\n'));
        }
        for record in records {
            prop_assert!(record.start_ms <= record.end_ms);
            prop_assert_eq!(record.start_ms == 0, record.end_ms == 0);
            prop_assert!(record.flow_label.unwrap_or(0) <= 0xf_ffff);
        }
        // What comes next is decoded as if nothing had been.
        let good = old(5, 3, 0, UPTIME, NOW);
        prop_assert_eq!(bench.good(&good).len(), 3);
    }

    #[test]
    fn any_fields_of_a_template_are_compiled_or_refused(
        fields in proptest::collection::vec((0..400_u16, any::<u16>(), 0..4_u32), 0..60),
        content in proptest::collection::vec(any::<u8>(), 0..3000),
        is_options in any::<bool>(),
    ) {
        let enterprises = [0, 0, REVERSE, 99];
        let fields: Vec<_> = fields
            .into_iter()
            .map(|(element, length, n)| {
                // Most lengths are short ones.
                let length = if length % 16 == 0 { VARIABLE } else { length % 16 };
                (element, length, enterprises[n as usize])
            })
            .collect();
        let mut definition = template(300, &fields);
        if is_options {
            definition.splice(4..4, [0, 1]);
        }
        let set = if is_options { 3 } else { 2 };
        let message = Message::ipfix(NOW, 1, 7).set(set, &definition);
        let (records, _) = Bench::new().decode(&message.set(300, &content).done());
        prop_assert!(records.len() <= 2 * content.len());
        for record in records {
            prop_assert!(record.start_ms <= record.end_ms);
        }
    }
}
