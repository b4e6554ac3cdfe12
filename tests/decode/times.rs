//! Times of flows, in every form and with clocks that are wrong.

use crate::netflow::{Message, number, old};
use crate::{Bench, NOW, NOW_MS, UPTIME, fields, ipfix};

/// The times of an IPFIX record.
fn times(record: &[(u16, u16, u128)]) -> (u64, u64) {
    let record = [&[(1, 4, 1)], record].concat();
    let (template, values) = fields(&record);
    let message = ipfix().template(256, &template).set(256, &values);
    let records = Bench::new().good(&message.done());
    (records[0].start_ms, records[0].end_ms)
}

/// NTP's seconds, and half a second.
fn ntp(unix_s: u64) -> u128 {
    u128::from(unix_s + 2_208_988_800) << 32 | 1 << 31
}

#[test]
fn absolute_times_in_every_form() {
    let (s, ms) = (u128::from(NOW), u128::from(NOW_MS));
    let expected = (NOW_MS - 9000, NOW_MS - 2000);
    assert_eq!(times(&[(150, 4, s - 9), (151, 4, s - 2)]), expected);
    assert_eq!(times(&[(152, 8, ms - 9000), (153, 8, ms - 2000)]), expected);
    let fractions = (expected.0 + 500, expected.1 + 500);
    let (start, end) = (ntp(u64::from(NOW) - 9), ntp(u64::from(NOW) - 2));
    assert_eq!(times(&[(154, 8, start), (155, 8, end)]), fractions);
    assert_eq!(times(&[(156, 8, start), (157, 8, end)]), fractions);
    let before = [(158, 4, 9_000_000), (159, 4, 2_000_000)];
    assert_eq!(times(&before), expected);
    let duration = [(152, 8, ms - 9000), (161, 4, 7000)];
    assert_eq!(times(&duration), expected);
    let duration = [(162, 4, 7_000_000), (152, 8, ms - 9000)];
    assert_eq!(times(&duration), expected);
    // The most precise form.
    let both = [
        (150, 4, s),
        (151, 4, s),
        (153, 8, ms - 2000),
        (152, 8, ms - 9000),
    ];
    assert_eq!(times(&both), expected);
}

#[test]
fn uptimes_count_from_the_start_of_the_exporter() {
    let init = u128::from(NOW_MS) - 100_000;
    let record = [(22, 4, 91_000), (21, 4, 98_000), (160, 8, init)];
    let expected = (NOW_MS - 9000, NOW_MS - 2000);
    assert_eq!(times(&record), expected);
    assert_eq!(times(&record[..2]), (0, 0));
    for unknown in [0, u64::MAX as u128, u128::from(NOW_MS) + 1] {
        assert_eq!(
            times(&[(22, 4, 91_000), (21, 4, 98_000), (160, 8, unknown)]),
            (0, 0)
        );
    }
    // Told once, in an options record.
    let mut bench = Bench::new();
    let (template, values) = fields(&record[..2]);
    let template = [&template[..], &[(1, 4)]].concat();
    let values = [values, vec![0, 0, 0, 1]].concat();
    let message = ipfix()
        .options_template(257, &[(144, 4)], &[(160, 8)])
        .set(257, &[vec![0; 4], number(init, 8)].concat())
        .template(256, &template)
        .set(256, &values);
    let records = bench.good(&message.done());
    assert_eq!((records[0].start_ms, records[0].end_ms), expected);
    assert_eq!(records[0].start_uptime_ms, 91_000);
}

#[test]
fn a_flow_never_ends_in_1970_or_before_it_starts() {
    let ms = u128::from(NOW_MS);
    for (start, end) in [
        (150, 151),
        (152, 153),
        (154, 155),
        (156, 157),
        (158, 159),
        (22, 21),
    ] {
        let length = if matches!(start, 152..=157) { 8 } else { 4 };
        let top = number_of_ones(length);
        for values in [
            [0, 0],
            [0, top],
            [top, 0],
            [top, top],
            [1, 1],
            [ms, ms - 5000],
        ] {
            for clock in [0, 1, NOW, u32::MAX] {
                let (template, mut record) =
                    fields(&[(start, length, values[0]), (end, length, values[1])]);
                record.extend([0, 0, 0, 1]);
                let template = [&template[..], &[(1, 4)]].concat();
                for message in [
                    Message::v9(UPTIME, clock, 1, 7),
                    Message::ipfix(clock, 1, 7),
                ] {
                    let message = message.template(256, &template).set(256, &record);
                    let flow = Bench::new().good(&message.done())[0];
                    let context = format!("{start}: {values:?}, clock {clock}: {flow:?}");
                    assert!(flow.start_ms <= flow.end_ms, "{context}");
                    assert_eq!(flow.start_ms == 0, flow.end_ms == 0, "{context}");
                    let earliest = 820_454_400_000;
                    assert!(flow.end_ms == 0 || flow.start_ms >= earliest, "{context}");
                    assert!(flow.end_ms < 1 << 42, "{context}");
                }
            }
        }
    }
}

fn number_of_ones(length: u16) -> u128 {
    (1 << (8 * length)) - 1
}

#[test]
fn the_uptime_wraps_between_the_first_packet_and_the_datagram() {
    let mut datagram = old(5, 1, 0, 10_000, NOW);
    // First and last packet.
    datagram[24 + 24..24 + 28].copy_from_slice(&(u32::MAX - 9_999).to_be_bytes());
    datagram[24 + 28..24 + 32].copy_from_slice(&9000_u32.to_be_bytes());
    let record = Bench::new().good(&datagram)[0];
    let sent = NOW_MS + 500;
    assert_eq!(
        (record.start_ms, record.end_ms),
        (sent - 20_000, sent - 1000)
    );
    assert_eq!(record.start_uptime_ms, u32::MAX - 9_999);
}

#[test]
fn the_offset_of_the_exporters_clock() {
    for (clock, offset) in [
        (NOW, -250),
        (NOW - 3600, -3_600_250),
        (0, -i64::from(NOW) * 1000 - 250),
    ] {
        for message in [
            Message::v9(UPTIME, clock, 1, 7),
            Message::ipfix(clock, 1, 7),
        ] {
            let (_, decoded) = Bench::new().decode(&message.done());
            assert_eq!(decoded.clock_offset_ms, Some(offset));
        }
    }
}
