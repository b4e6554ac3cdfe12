//! Other decoders see the same values: netflow_parser and tshark.

use std::net::IpAddr;
use std::process::Command;

use flowd_rs::collector::record::FlowRecord;
use netflow_parser::variable_versions::field_value::FieldValue;
use netflow_parser::variable_versions::{ipfix, v9};
use netflow_parser::{NetflowPacket, NetflowParser};

use crate::netflow::{FIELDS_20, Message, VARIABLE, number, old, short_v1, variable};
use crate::{Bench, NOW, UPTIME};

/// An IPv6 flow, with a label and absolute times; lengths as of several routers.
const FIELDS_V6: [(u16, u16); 14] = [
    (27, 16),
    (28, 16),
    (62, 16),
    (29, 1),
    (30, 1),
    (31, 3),
    (4, 1),
    (7, 2),
    (11, 2),
    (1, 8),
    (2, 8),
    (6, 2),
    (152, 8),
    (153, 8),
];
const RECORDS: u64 = 7;

/// Values that differ from record to record and use all of their bytes.
fn value(element: u16, record: u64) -> u128 {
    let n = u128::from(record * 1000 + u64::from(element));
    match element {
        4 => 6,
        152 => u128::from(NOW) * 1000 - 9_000 - n,
        153 => u128::from(NOW) * 1000 - 1_000 - n,
        22 => u128::from(UPTIME) - 20_000 - n,
        21 => u128::from(UPTIME) - 10_000 - n,
        31 => 0xf_0000 + n,
        27 | 28 | 62 => 0x2001_0db8 << 96 | n << 32 | n,
        61 => n % 2,
        9 | 13 => n % 33,
        29 | 30 => n % 129,
        _ => n * 0x0101_0101_0101_0101,
    }
}

fn content(fields: &[(u16, u16)]) -> Vec<u8> {
    let record = |n| {
        let fields = fields.iter();
        fields.flat_map(move |(element, length)| number(value(*element, n), (*length).into()))
    };
    (0..RECORDS).flat_map(record).collect()
}

fn message(version: u16, fields: &[(u16, u16)]) -> Vec<u8> {
    let message = if version == 9 {
        Message::v9(UPTIME, NOW, 1, 7)
    } else {
        Message::ipfix(NOW, 1, 7)
    };
    // tshark does not take another layout for an id.
    let id = 300 + fields.len() as u16;
    message
        .template(id, fields)
        .set(id, &content(fields))
        .done()
}

fn bytes_of(address: Option<IpAddr>) -> Vec<u8> {
    match address.unwrap() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What our record has of an element, in so many bytes.
fn ours(record: &FlowRecord, element: u16, length: usize) -> Option<Vec<u8>> {
    let value: u64 = match element {
        8 | 27 => return Some(bytes_of(record.source)),
        12 | 28 => return Some(bytes_of(record.destination)),
        15 | 62 => return Some(bytes_of(record.next_hop)),
        1 => record.octets,
        2 => record.packets,
        4 => record.protocol.into(),
        5 => record.tos.into(),
        6 => record.tcp_flags.into(),
        7 => record.source_port.into(),
        11 => record.destination_port.into(),
        9 | 29 => record.source_mask.into(),
        13 | 30 => record.destination_mask.into(),
        10 => record.input.into(),
        14 => record.output.into(),
        16 => record.source_as.into(),
        17 => record.destination_as.into(),
        21 => record.end_uptime_ms.into(),
        22 => record.start_uptime_ms.into(),
        31 => record.flow_label.unwrap().into(),
        152 => record.start_ms,
        153 => record.end_ms,
        _ => return None,
    };
    Some(number(value.into(), length))
}

/// The values of each record, as netflow_parser reads them.
fn parsed(datagram: &[u8]) -> Vec<Vec<FieldValue>> {
    let result = NetflowParser::default().parse_bytes(datagram);
    assert!(result.error.is_none(), "{:?}", result.error);
    let [packet] = &result.packets[..] else {
        panic!("{:?}", result.packets);
    };
    let mut records = Vec::new();
    match packet {
        NetflowPacket::V9(packet) => {
            for set in &packet.flowsets {
                if let v9::FlowSetBody::Data(data) = &set.body {
                    let values = |record: &v9::V9FlowRecord| {
                        record.iter().map(|(_, value)| value.clone()).collect()
                    };
                    records.extend(data.fields.iter().map(values));
                }
            }
        }
        NetflowPacket::IPFix(packet) => {
            for set in &packet.flowsets {
                if let ipfix::FlowSetBody::Data(data) = &set.body {
                    let values = |record: &ipfix::IPFixFlowRecord| {
                        record.iter().map(|(_, value)| value.clone()).collect()
                    };
                    records.extend(data.fields.iter().map(values));
                }
            }
        }
        other => panic!("{other:?}"),
    }
    records
}

#[test]
fn netflow_parser_reads_the_same_of_v9_and_ipfix() {
    for version in [9, 10] {
        for fields in [&FIELDS_20[..], &FIELDS_V6] {
            let datagram = message(version, fields);
            let records = Bench::new().good(&datagram);
            let theirs = parsed(&datagram);
            assert_eq!(records.len(), RECORDS as usize);
            assert_eq!(records.len(), theirs.len());
            for (record, values) in records.iter().zip(theirs) {
                assert_eq!(values.len(), fields.len());
                for ((element, length), value) in fields.iter().zip(values) {
                    let Some(ours) = ours(record, *element, (*length).into()) else {
                        continue;
                    };
                    let mut theirs = Vec::new();
                    value.write_be_bytes(&mut theirs).unwrap();
                    // Flags have one byte here, and two in IPFIX.
                    let from = if *element == 6 { theirs.len() - 1 } else { 0 };
                    let ours = if *element == 6 {
                        &ours[ours.len() - 1..]
                    } else {
                        &ours
                    };
                    assert_eq!(ours, &theirs[from..], "element {element} of v{version}");
                }
            }
        }
    }
}

#[test]
fn netflow_parser_reads_the_same_of_v5_and_v7() {
    for version in [5, 7] {
        // netflow_parser takes no more of v7.
        let datagram = old(version, 28, 7, UPTIME, NOW);
        let records = Bench::new().good(&datagram);
        let result = NetflowParser::default().parse_bytes(&datagram);
        assert!(result.error.is_none(), "{:?}", result.error);
        let theirs = serde_json::to_value(&result.packets[0]).unwrap();
        let packet = theirs.as_object().unwrap().values().next().unwrap();
        assert_eq!(packet["header"]["flow_sequence"], records[0].sequence);
        let theirs = packet["flowsets"].as_array().unwrap();
        assert_eq!(theirs.len(), records.len());
        for (theirs, ours) in theirs.iter().zip(&records) {
            let address = |address: Option<IpAddr>| address.unwrap().to_string();
            let first = |names: [&str; 2]| {
                let found = names.iter().find_map(|name| theirs.get(name));
                found
                    .unwrap_or_else(|| panic!("{names:?}: {theirs}"))
                    .clone()
            };
            assert_eq!(theirs["src_addr"], address(ours.source));
            assert_eq!(theirs["dst_addr"], address(ours.destination));
            assert_eq!(theirs["next_hop"], address(ours.next_hop));
            assert_eq!(theirs["input"], ours.input);
            assert_eq!(theirs["output"], ours.output);
            assert_eq!(theirs["d_pkts"], ours.packets);
            assert_eq!(theirs["d_octets"], ours.octets);
            assert_eq!(theirs["first"], ours.start_uptime_ms);
            assert_eq!(theirs["last"], ours.end_uptime_ms);
            assert_eq!(theirs["src_port"], ours.source_port);
            assert_eq!(theirs["dst_port"], ours.destination_port);
            assert_eq!(theirs["tcp_flags"], ours.tcp_flags);
            assert_eq!(first(["protocol_number", "protocol"]), ours.protocol);
            assert_eq!(theirs["tos"], ours.tos);
            assert_eq!(theirs["src_as"], ours.source_as);
            assert_eq!(theirs["dst_as"], ours.destination_as);
            assert_eq!(theirs["src_mask"], ours.source_mask);
            assert_eq!(theirs["dst_mask"], ours.destination_mask);
        }
    }
}

/// A capture file with one frame per datagram: pcap(5), Ethernet, IPv4, UDP.
fn capture(datagrams: &[Vec<u8>]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65535, 1] {
        file.extend(word.to_ne_bytes());
    }
    for datagram in datagrams {
        let udp_length = 8 + datagram.len() as u16;
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + udp_length).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 99, 192, 0, 2, 1]);
        for number in [2055, 2055, udp_length, 0] {
            frame.extend(number.to_be_bytes());
        }
        frame.extend(datagram);
        let length = frame.len() as u32;
        for word in [NOW, 0, length, length] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(frame);
    }
    file
}

/// All values of a field of tshark's, of all flows of a frame.
fn tshark(datagrams: &[Vec<u8>], fields: &[&str]) -> Vec<Vec<Vec<String>>> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("flows.pcap");
    std::fs::write(&file, capture(datagrams)).unwrap();
    let mut command = Command::new("tshark");
    command.arg("-r").arg(&file);
    command.args([
        "-d",
        "udp.port==2055,cflow",
        "-T",
        "json",
        "--no-duplicate-keys",
    ]);
    let output = command.output().expect("tshark is installed");
    let frames: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let values = |frame: &serde_json::Value| {
        let mut found = vec![Vec::new(); fields.len()];
        collect(&frame["_source"]["layers"]["cflow"], fields, &mut found);
        found
    };
    frames.iter().map(values).collect()
}

/// Collects the values of the fields, wherever they are in the tree.
fn collect(tree: &serde_json::Value, fields: &[&str], found: &mut [Vec<String>]) {
    match tree {
        serde_json::Value::Object(object) => {
            // "Flow 2" comes before "Flow 10".
            let mut entries: Vec<_> = object.iter().collect();
            entries.sort_by_key(|(key, _)| {
                let digits: String = key.chars().filter(char::is_ascii_digit).collect();
                digits.parse::<u64>().unwrap_or(0)
            });
            for (key, value) in entries {
                let field = fields.iter().position(|field| field == key);
                match (field, value) {
                    (Some(field), serde_json::Value::String(text)) => {
                        found[field].push(text.clone());
                    }
                    (Some(field), serde_json::Value::Array(texts)) => {
                        let texts = texts.iter().filter_map(|text| text.as_str());
                        found[field].extend(texts.map(str::to_owned));
                    }
                    _ => collect(value, fields, found),
                }
            }
        }
        serde_json::Value::Array(values) => {
            values
                .iter()
                .for_each(|value| collect(value, fields, found));
        }
        _ => {}
    }
}

#[test]
fn tshark_reads_the_same() {
    const FIELDS: [&str; 18] = [
        "cflow.srcaddr",
        "cflow.dstaddr",
        "cflow.nexthop",
        "cflow.srcaddrv6",
        "cflow.dstaddrv6",
        "cflow.ipv6flowlabel",
        "cflow.inputint",
        "cflow.outputint",
        "cflow.packets",
        "cflow.octets",
        "cflow.srcport",
        "cflow.dstport",
        "cflow.protocol",
        "cflow.tos",
        "cflow.srcas",
        "cflow.dstas",
        "cflow.srcmask",
        "cflow.dstmask",
    ];
    // A name of variable length between the fields of an IPFIX record.
    let mut named = Vec::new();
    for n in 0..RECORDS {
        named.extend(number(value(8, n), 4));
        let name = vec![b'x'; 50 * n as usize];
        named.extend(variable(&name, n % 2 == 1 || name.len() > 254));
        named.extend(number(value(1, n), 5));
    }
    let with_names = Message::ipfix(NOW, 1, 9)
        .template(300, &[(8, 4), (82, VARIABLE), (1, 5)])
        .set(300, &named)
        .done();
    let datagrams = [
        short_v1(24, UPTIME, NOW),
        old(5, 30, 7, UPTIME, NOW),
        old(7, 30, 7, UPTIME, NOW),
        message(9, &FIELDS_20),
        message(9, &FIELDS_V6),
        message(10, &FIELDS_20),
        message(10, &FIELDS_V6),
        with_names,
    ];
    let theirs = tshark(&datagrams, &FIELDS);
    assert_eq!(theirs.len(), datagrams.len());
    let parse = |text: &String| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => text.parse().unwrap(),
    };
    for (datagram, theirs) in datagrams.iter().zip(theirs) {
        let records = Bench::new().good(datagram);
        let mut compared = 0;
        for (field, values) in FIELDS.iter().zip(theirs) {
            if values.is_empty() {
                continue;
            }
            compared += 1;
            let context = format!("{field} of version {}", datagram[1]);
            assert_eq!(values.len(), records.len(), "{context}");
            for (text, record) in values.iter().zip(&records) {
                let address = match *field {
                    "cflow.srcaddr" | "cflow.srcaddrv6" => Some(record.source),
                    "cflow.dstaddr" | "cflow.dstaddrv6" => Some(record.destination),
                    "cflow.nexthop" => Some(record.next_hop),
                    _ => None,
                };
                if let Some(address) = address {
                    assert_eq!(text.parse().ok(), address, "{context}");
                    continue;
                }
                let ours: u64 = match *field {
                    "cflow.ipv6flowlabel" => record.flow_label.unwrap().into(),
                    "cflow.inputint" => record.input.into(),
                    "cflow.outputint" => record.output.into(),
                    "cflow.packets" => record.packets,
                    "cflow.octets" => record.octets,
                    "cflow.srcport" => record.source_port.into(),
                    "cflow.dstport" => record.destination_port.into(),
                    "cflow.protocol" => record.protocol.into(),
                    "cflow.tos" => record.tos.into(),
                    "cflow.srcas" => record.source_as.into(),
                    "cflow.dstas" => record.destination_as.into(),
                    "cflow.srcmask" => record.source_mask.into(),
                    _ => record.destination_mask.into(),
                };
                assert_eq!(parse(text), ours, "{context}");
            }
        }
        // The record with a name has two of the fields, others have eight or more.
        let least = if datagram[15] == 9 { 2 } else { 8 };
        assert!(compared >= least, "{compared} of version {}", datagram[1]);
    }
}
