use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::collector::record::{Attribution, FlowRecord, Origin};

/// A record of which everything that `fields` selects may have any value.
fn record(n: [u64; 24]) -> FlowRecord {
    let address = |n: u64, more: u64| match n & 1 {
        0 => IpAddr::V4(Ipv4Addr::from_bits((n >> 32) as u32)),
        _ => IpAddr::V6(Ipv6Addr::from_bits(u128::from(n) << 64 | u128::from(more))),
    };
    let optional = |is_known: u64, value: u64| (is_known & 1 == 1).then_some(value as u32);
    let origin = [Origin::Label, Origin::Firefly, Origin::Site][(n[0] % 3) as usize];
    FlowRecord {
        received_s: n[1] as u32,
        received_us: (n[1] >> 32) as u32,
        exporter: address(n[2], n[3]),
        source: optional(n[0] >> 2, 0).map(|_| address(n[4], n[5])),
        destination: optional(n[0] >> 3, 0).map(|_| address(n[6], n[7])),
        next_hop: optional(n[0] >> 4, 0).map(|_| address(n[8], n[9])),
        source_port: n[10] as u16,
        destination_port: (n[10] >> 16) as u16,
        protocol: (n[10] >> 32) as u8,
        tcp_flags: (n[10] >> 40) as u8,
        tos: (n[10] >> 48) as u8,
        source_mask: (n[10] >> 56) as u8,
        destination_mask: n[11] as u8,
        packets: n[12],
        octets: n[13],
        input: n[14] as u32,
        output: (n[14] >> 32) as u32,
        source_as: n[15] as u32,
        destination_as: (n[15] >> 32) as u32,
        version: (n[11] >> 8) as u16,
        uptime_ms: n[16] as u32,
        exporter_s: (n[16] >> 32) as u32,
        exporter_ns: n[17] as u32,
        start_uptime_ms: n[18] as u32,
        end_uptime_ms: (n[18] >> 32) as u32,
        start_ms: n[19],
        end_ms: n[20],
        engine_type: (n[11] >> 24) as u16,
        engine_id: (n[11] >> 40) as u16,
        sequence: n[21] as u32,
        domain: (n[21] >> 32) as u32,
        sampling_interval: n[22] as u32,
        flow_label: optional(n[0] >> 5, n[22] >> 32),
        rule_tag: optional(n[0] >> 6, n[23]),
        attribution: optional(n[0] >> 7, n[23] >> 32).map(|scitag| Attribution { scitag, origin }),
    }
}

fn any_record() -> impl Strategy<Value = FlowRecord> {
    any::<[u64; 24]>().prop_map(record)
}

/// A record with everything, in IPv4 or IPv6.
fn full(is_v6: bool) -> FlowRecord {
    let mut n: [u64; 24] = std::array::from_fn(|i| 0x9e37_79b9_7f4a_7c15_u64.rotate_left(i as u32));
    n[0] = u64::MAX;
    for i in [2, 4, 6, 8] {
        n[i] = n[i] & !1 | u64::from(is_v6);
    }
    record(n)
}

/// What is left of a record that is written with `fields` alone.
fn projected(record: &FlowRecord, fields: Fields) -> FlowRecord {
    let mut left = FlowRecord::default();
    let has = |field| fields.contains(field);
    let address = |address: Option<IpAddr>, v4, v6| {
        address.filter(|address| has(if address.is_ipv4() { v4 } else { v6 }))
    };
    macro_rules! keep {
        ($($field:ident: $($name:ident)*,)*) => {
            $(if has(Fields::$field) { $(left.$name = record.$name;)* })*
        };
    }
    keep! {
        TAG: rule_tag,
        RECV_TIME: received_s received_us,
        PROTO_FLAGS_TOS: protocol tcp_flags tos,
        SRCDST_PORT: source_port destination_port,
        PACKETS: packets,
        OCTETS: octets,
        IF_INDICES: input output,
        AGENT_INFO: uptime_ms exporter_s exporter_ns version,
        FLOW_TIMES: start_uptime_ms end_uptime_ms,
        AS_INFO: source_as destination_as source_mask destination_mask,
        FLOW_ENGINE_INFO: engine_type engine_id sequence domain,
        FLOW_LABEL: flow_label,
        SCITAG: attribution,
        ABSOLUTE_TIMES: start_ms end_ms,
        SAMPLING: sampling_interval,
        DOMAIN: domain,
    }
    left.exporter = address(
        Some(record.exporter),
        Fields::AGENT_ADDR4,
        Fields::AGENT_ADDR6,
    )
    .unwrap_or(left.exporter);
    left.source = address(record.source, Fields::SRC_ADDR4, Fields::SRC_ADDR6);
    left.destination = address(record.destination, Fields::DST_ADDR4, Fields::DST_ADDR6);
    left.next_hop = address(
        record.next_hop,
        Fields::GATEWAY_ADDR4,
        Fields::GATEWAY_ADDR6,
    );
    left
}

fn encoded(record: &FlowRecord, fields: Fields) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(record, fields, &mut bytes);
    bytes
}

/// Gives its bytes in pieces.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.1.min(buffer.len());
        self.0
            .take(length as u64)
            .read(buffer)
            .inspect(|&read| self.0 = &self.0[read..])
    }
}

/// Every record and every damage, with what each takes.
fn read(bytes: &[u8], piece: usize) -> (Vec<FlowRecord>, Vec<(u64, u64)>) {
    let mut records = Records::new(Pieces(bytes, piece));
    let (mut found, mut damaged, mut taken) = (Vec::new(), Vec::new(), 0);
    while let Some(item) = records.next() {
        match item {
            Ok((record, _)) => {
                let raw = records.bytes();
                assert_eq!(raw, &bytes[taken as usize..][..raw.len()]);
                taken += raw.len() as u64;
                found.push(record);
            }
            Err(ReadError::Damage(damage)) => {
                assert_eq!(damage.offset, taken);
                assert!(damage.bytes > 0);
                taken += damage.bytes;
                damaged.push((damage.offset, damage.bytes));
            }
            Err(ReadError::Io(error)) => panic!("{error}"),
        }
        assert_eq!(records.offset(), taken);
    }
    assert_eq!(taken, bytes.len() as u64);
    (found, damaged)
}

#[test]
fn the_crc_is_that_of_djm() {
    assert_eq!(crc(b"123456789"), 0x2dfd_2d88);
    assert_eq!(crc(b""), 0);
}

#[test]
fn a_record_is_what_the_format_says() {
    let record = FlowRecord {
        received_s: 0x0102_0304,
        received_us: 5,
        source: Some("192.0.2.1".parse().unwrap()),
        destination: Some("2001:db8::2".parse().unwrap()),
        protocol: 6,
        tcp_flags: 0x1b,
        tos: 0x20,
        engine_type: 1,
        engine_id: 2,
        sequence: 3,
        domain: 4,
        flow_label: Some(0x12345),
        ..FlowRecord::default()
    };
    let wanted = Fields::RECV_TIME
        | Fields::PROTO_FLAGS_TOS
        | Fields(0xf << 5)
        | Fields::FLOW_ENGINE_INFO
        | Fields::CRC32;
    let plain = [
        "6010 0000 4004 0126", // no SRC_ADDR6 (bit 6), no DST_ADDR4 (bit 7)
        "01020304 00000005",
        "1b062000",
        "c0000201",
        "20010db8 00000000 00000000 00000002",
        "0001 0002 00000003 00000004",
    ];
    let bytes = |hex: &[&str]| {
        let hex = hex.concat().replace(' ', "");
        let pairs = hex.as_bytes().chunks(2);
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        pairs.map(|pair| byte(pair).unwrap()).collect::<Vec<u8>>()
    };
    let mut expected = bytes(&plain);
    // 0x40040126: bits 1, 2, 5, 8, 18, 30.
    expected[1] = ((expected.len() - 8 + 4) / 4) as u8;
    let sum = crc(&expected);
    expected.extend(sum.to_be_bytes());
    assert_eq!(encoded(&record, wanted), expected);

    let wanted = wanted | Fields::FLOW_LABEL | Fields::EXTENSION_CRC32 | Fields::SCITAG;
    let mut expected = bytes(&plain);
    expected[..8].copy_from_slice(&bytes(&["610e 0000 410c 0126"]));
    let sum = crc(&expected);
    let label = 0x12345_u32.to_be_bytes();
    for part in [label, crc(&label).to_be_bytes(), sum.to_be_bytes()] {
        expected.extend(part);
    }
    assert_eq!(expected.len(), 8 + 4 * 0x0e);
    assert_eq!(encoded(&record, wanted), expected);
}

#[test]
fn further_fields_of_others_are_skipped() {
    let record = full(false);
    let mut bytes = encoded(&record, Fields::COMPATIBLE);
    let sum = bytes.split_off(bytes.len() - 4);
    bytes[0] = 0x61;
    bytes[1] += 3;
    bytes[4] |= 0x20;
    bytes.extend([0xff; 12]);
    let covered = bytes.len() - 12;
    assert_eq!(sum.len(), 4);
    let sum = crc(&bytes[..covered]);
    bytes.extend(sum.to_be_bytes());
    let (read, fields, length) = decode(&bytes).unwrap();
    assert_eq!(read, projected(&record, fields));
    assert_eq!(length, bytes.len());
    // Minor version 0 does not have them.
    bytes[0] = 0x60;
    assert_eq!(decode(&bytes), Err(SegmentError::Fields(0x2000_0000)));
}

#[test]
fn each_defect_has_its_reason() {
    let good = encoded(&full(true), Fields::ALL);
    let with = |place: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[place] = byte;
        decode(&bytes).unwrap_err().to_string()
    };
    assert_eq!(with(0, 0x41), "major version 2, expected 3");
    assert_eq!(with(2, 1), "reserved bytes 0x0100, expected 0");
    assert_eq!(
        with(0, 0x60),
        "fields 0x01f80000, which its minor version does not have"
    );
    assert!(
        with(1, 9).starts_with("length 36, expected "),
        "{}",
        with(1, 9)
    );
    assert!(with(8, good[8] ^ 1).starts_with("CRC 0x"));
    let extension = good.len() - 12;
    assert!(with(extension, good[extension] ^ 1).starts_with("CRC 0x"));
    assert_eq!(
        decode(&good[..good.len() - 1]).unwrap_err().to_string(),
        format!(
            "truncated: {} bytes of at least {}",
            good.len() - 1,
            good.len()
        )
    );
}

#[test]
fn damage_at_any_byte_loses_only_its_record() {
    let records = [full(false), full(true), full(false)];
    let parts: Vec<Vec<u8>> = records.iter().map(|r| encoded(r, Fields::ALL)).collect();
    let file = parts.concat();
    let starts: Vec<usize> = (0..3)
        .map(|i| parts[..i].iter().map(Vec::len).sum())
        .collect();
    for place in 0..file.len() {
        let lost = starts.iter().rposition(|&start| start <= place).unwrap();
        for flip in [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xff] {
            let mut bytes = file.clone();
            bytes[place] ^= flip;
            let (found, damaged) = read(&bytes, usize::MAX);
            let damage = (starts[lost] as u64, parts[lost].len() as u64);
            assert_eq!(damaged, [damage], "byte {place} ^ {flip:#x}");
            let mut left = records.to_vec();
            left.remove(lost);
            assert_eq!(found, left, "byte {place} ^ {flip:#x}");
        }
    }
}

#[test]
fn records_go_on_after_a_torn_one_and_after_garbage() {
    let fields = [Fields::ALL, Fields(Fields::COMPATIBLE.0 & !Fields::CRC32.0)];
    for fields in fields {
        let one = encoded(&full(true), fields);
        for torn in 1..one.len() {
            let file = [&one[..], &one[..torn], &one, &[0x60; 7], &one, &one[..torn]].concat();
            let (found, damaged) = read(&file, 100);
            // Without a CRC, a torn record may swallow the one after it.
            let least = if fields.contains(Fields::CRC32) { 3 } else { 2 };
            assert!(
                (least..=3).contains(&found.len()),
                "{torn}: {}",
                found.len()
            );
            assert!(!damaged.is_empty());
            if least == 3 {
                assert_eq!(valid_prefix(&file), one.len());
            }
        }
    }
}

proptest! {
    #[test]
    fn decoding_what_was_encoded_is_the_identity(record in any_record(), fields in any::<u32>()) {
        let fields = Fields(fields & Fields::ALL.0);
        let bytes = encoded(&record, fields);
        let (decoded, found, length) = decode(&bytes).unwrap();
        prop_assert_eq!(decoded, projected(&record, fields));
        prop_assert!(fields.contains(found));
        prop_assert_eq!(length, bytes.len());
        prop_assert_eq!(encoded(&decoded, found), bytes);
    }

    #[test]
    fn any_bytes_are_read_to_their_end(
        records in prop::collection::vec((any_record(), any::<u32>()), 0..4),
        noise in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        tail in prop::collection::vec(any::<u8>(), 0..40),
        piece in 1..300_usize,
    ) {
        let mut bytes = Vec::new();
        for (record, fields) in &records {
            encode(record, Fields(fields & Fields::ALL.0), &mut bytes);
        }
        bytes.extend(tail);
        for (place, byte) in noise {
            if !bytes.is_empty() {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
        }
        // It is the same whatever pieces it comes in.
        prop_assert_eq!(read(&bytes, piece), read(&bytes, usize::MAX));
        prop_assert!(valid_prefix(&bytes) <= bytes.len());
        if let Ok(records) = v2::Records::new(&bytes[..]) {
            prop_assert!(records.count() <= bytes.len());
        }
    }

    #[test]
    fn any_bytes_after_the_header_of_version_2_are_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let header = [v2::MAGIC, 2, 1_700_000_000, 0].map(u32::to_be_bytes).concat();
        let file = [header, bytes].concat();
        let records = v2::Records::new(&file[..]).unwrap();
        prop_assert_eq!(records.started_s(), 1_700_000_000);
        prop_assert!(records.count() <= file.len());
    }
}
