//! The marker's eBPF program on crafted frames: exactly which bytes it changes.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

#[path = "common/prog_run.rs"]
mod prog_run;

use std::net::Ipv6Addr;

use flowd_rs::flow::{Flow, Protocol, Tag};
use flowd_rs::scitag;
use flowd_rs::scitag::Strategy;
use flowd_rs::sys::mark_maps::{Entered, Key, Mark};
use flowd_rs::sys::marker::Program;
use libbpf_rs::MapCore;
use prog_run::{BpfFs, empty_program, load, replace_writer, run, settings, writer, written_by};
use proptest::prelude::*;

const SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const DESTINATION: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2);
const MULTICAST: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0, 1);
const TAG: Tag = Tag {
    experiment: 3,
    activity: 14,
};
/// `TC_ACT_UNSPEC`: continue with the next filter.
const UNSPEC: u32 = u32::MAX;
const TCP: u8 = 6;
const UDP: u8 = 17;
const OLD_LABEL: u32 = 0xabcde;

fn flow(protocol: Protocol) -> Flow {
    Flow::new(protocol, (SOURCE.into(), 40001), (DESTINATION.into(), 443)).unwrap()
}

fn label() -> u32 {
    scitag::label(TAG) | scitag::ENTROPY
}

/// Enters the TCP and the UDP flow from SOURCE port 40001 to DESTINATION port 443.
fn enter(program: &Program) {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let key = Key::new(&flow(protocol)).unwrap();
        let mark = Mark {
            label: label(),
            tag: TAG,
            ..Mark::default()
        };
        assert_eq!(program.maps.enter(&key, mark).unwrap(), Entered::Done);
    }
}

/// An IPv6 packet: traffic class, extension headers as (type, bytes without the first one), transport.
fn packet(class: u8, extensions: &[Extension], protocol: u8, port: u16) -> Vec<u8> {
    let mut payload = Vec::new();
    let kinds: Vec<u8> = extensions
        .iter()
        .map(|(kind, _)| *kind)
        .chain([protocol])
        .collect();
    for ((_, body), next) in extensions.iter().zip(&kinds[1..]) {
        payload.push(*next);
        payload.extend_from_slice(body);
    }
    payload.extend_from_slice(&40001u16.to_be_bytes());
    payload.extend_from_slice(&port.to_be_bytes());
    payload.extend((0..36).map(|n| n as u8));
    let mut packet = (0x6000_0000 | u32::from(class) << 20 | OLD_LABEL)
        .to_be_bytes()
        .to_vec();
    packet.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    packet.extend_from_slice(&[kinds[0], 64]);
    packet.extend_from_slice(&SOURCE.octets());
    packet.extend_from_slice(&DESTINATION.octets());
    packet.extend(payload);
    packet
}

fn plain() -> Vec<u8> {
    packet(0, &[], TCP, 443)
}

/// The packet in an Ethernet frame, behind these VLAN tags.
fn frame(vlans: &[u16], packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    for (n, kind) in vlans.iter().enumerate() {
        frame.extend_from_slice(&kind.to_be_bytes());
        frame.extend_from_slice(&(100 + n as u16).to_be_bytes());
    }
    frame.extend_from_slice(&[0x86, 0xdd]);
    frame.extend_from_slice(packet);
    frame
}

/// The expected frame: with this label in the packet at `offset`.
fn labelled(frame: &[u8], offset: usize, label: u32) -> Vec<u8> {
    let mut expected = frame.to_vec();
    let word = u32::from_be_bytes(frame[offset..offset + 4].try_into().unwrap());
    expected[offset..offset + 4].copy_from_slice(&((word & 0xfff0_0000) | label).to_be_bytes());
    expected
}

fn check(program: &Program, frame: &[u8], expected: &[u8]) {
    let ran = run(program.programs()[0], frame, 1);
    assert_eq!(ran.verdict, UNSPEC);
    assert_eq!(ran.frame, expected);
}

fn options(body: &[u8]) -> Vec<u8> {
    let mut header = vec![0];
    header.extend_from_slice(body);
    header.resize(7, 0);
    header
}

/// An extension header: its type, and its bytes behind the next-header field.
type Extension = (u8, Vec<u8>);

fn extensions() -> Vec<(&'static str, Vec<Extension>)> {
    let hop = (0u8, options(&[1, 4]));
    let jumbo = (0u8, options(&[0xc2, 4, 0, 1, 0, 0]));
    let destination = (60u8, {
        let mut d = options(&[1, 12]);
        d[0] = 1;
        d.resize(15, 0);
        d
    });
    let routing = (43u8, options(&[4, 0]));
    let first_fragment = (44u8, vec![0, 0, 1, 0, 0, 0, 9]);
    let auth = (51u8, {
        let mut a = vec![4];
        a.resize(23, 0);
        a
    });
    vec![
        ("hop-by-hop", vec![hop.clone()]),
        ("jumbo option", vec![jumbo]),
        ("destination", vec![destination.clone()]),
        ("routing", vec![routing.clone()]),
        ("first fragment", vec![first_fragment.clone()]),
        ("authentication", vec![auth.clone()]),
        (
            "chain",
            vec![
                hop,
                destination.clone(),
                routing,
                first_fragment,
                auth,
                destination,
            ],
        ),
    ]
}

#[test]
#[ignore = "needs root"]
fn in_every_kind_of_frame_only_the_label_changes() {
    let bpffs = BpfFs::new();
    let program = load(&settings(&bpffs, Strategy::Label));
    enter(&program);
    for vlans in [&[][..], &[0x8100], &[0x88a8, 0x8100]] {
        let offset = 14 + 4 * vlans.len();
        // DSCP and ECN never change.
        for class in 0..=255 {
            let frame = frame(vlans, &packet(class, &[], TCP, 443));
            check(&program, &frame, &labelled(&frame, offset, label()));
        }
        for (name, headers) in extensions() {
            for protocol in [TCP, UDP] {
                let frame = frame(vlans, &packet(0xb8, &headers, protocol, 443));
                let ran = run(program.programs()[0], &frame, 1);
                assert_eq!(ran.frame, labelled(&frame, offset, label()), "{name}");
            }
        }
    }
    // Devices without an Ethernet header are tested in tests/marker.rs, with a tunnel: BPF_PROG_RUN always takes the
    // first 14 bytes for an Ethernet header.
    let marks: u64 = program.maps.marks().map(|(_, mark)| mark.packets).sum();
    assert_eq!(marks, 3 * (256 + 2 * extensions().len() as u64));
}

/// A TCP packet with nothing but headers in the frame, as the kernel sends them: the payload is in fragments.
fn tcp_headers() -> Vec<u8> {
    let mut packet = packet(0, &[], TCP, 443);
    packet.truncate(40 + 32);
    packet[40 + 12] = 8 << 4;
    packet
}

fn to_multicast(mut packet: Vec<u8>) -> Vec<u8> {
    packet[24..40].copy_from_slice(&MULTICAST.octets());
    packet
}

#[test]
#[ignore = "needs root"]
fn labels_are_written_in_place_only_if_that_copies_nothing_and_else_as_well() {
    let bpffs = BpfFs::new();
    let program = load(&settings(&bpffs, Strategy::Label));
    enter(&program);
    let multicast = Flow::new(
        Protocol::Udp,
        (SOURCE.into(), 40001),
        (MULTICAST.into(), 443),
    );
    let mark = Mark {
        label: label(),
        tag: TAG,
        ..Mark::default()
    };
    let key = Key::new(&multicast.unwrap()).unwrap();
    program.maps.enter(&key, mark).unwrap();
    let udp = packet(0xb8, &[], UDP, 443);
    let extension = packet(0, &extensions()[0].1, UDP, 443);
    let frames = [
        (true, "TCP headers", frame(&[], &tcp_headers())),
        (true, "UDP", frame(&[], &udp)),
        (false, "TCP with payload", frame(&[], &plain())),
        (false, "multicast", frame(&[], &to_multicast(udp.clone()))),
        (false, "VLAN", frame(&[0x8100], &udp)),
        (false, "extension header", frame(&[], &extension)),
    ];
    let marked = |frame: &[u8]| labelled(frame, if frame[12] == 0x81 { 18 } else { 14 }, label());
    for (_, _, frame) in &frames {
        check(&program, frame, &marked(frame));
    }
    // With a program in its place that does nothing, the packets that are written in place show.
    let writer = writer(&bpffs);
    replace_writer(&writer, &empty_program());
    for (in_place, name, frame) in &frames {
        let expected = if *in_place {
            frame.clone()
        } else {
            marked(frame)
        };
        assert_eq!(
            run(program.programs()[0], frame, 1).frame,
            expected,
            "{name}"
        );
    }
    // Without a program, all packets are marked all the same.
    writer.delete(&[0; 4]).unwrap();
    for (_, _, frame) in &frames {
        check(&program, frame, &marked(frame));
    }
    let marks: Vec<_> = program.maps.marks().map(|(_, mark)| mark).collect();
    let packets: u64 = marks.iter().map(|mark| mark.packets).sum();
    let bytes: u64 = marks.iter().map(|mark| mark.bytes).sum();
    let sizes: usize = frames.iter().map(|(_, _, frame)| frame.len()).sum();
    assert_eq!(
        (packets, bytes),
        (3 * frames.len() as u64, 3 * sizes as u64)
    );
    assert_eq!(program.maps.unmarked(), [0, 0, 0]);
}

#[test]
#[ignore = "needs root"]
fn the_pin_keeps_the_program_that_writes_labels_and_the_next_daemon_replaces_it() {
    let bpffs = BpfFs::new();
    let settings = settings(&bpffs, Strategy::Label);
    let program = load(&settings);
    let (first, attached) = (writer(&bpffs), program.programs()[0].try_clone().unwrap());
    enter(&program);
    let id = written_by(&first);
    assert!(id.is_some());
    drop(program);
    assert_eq!(written_by(&first), id);
    let next = load(&settings);
    assert_ne!(written_by(&writer(&bpffs)), id);
    // While the next daemon starts, the program of the former one still marks, with its array (which this test holds)
    // and without.
    for _ in 0..2 {
        let frame = frame(&[], &tcp_headers());
        let ran = run(&attached, &frame, 1);
        assert_eq!(ran.frame, labelled(&frame, 14, label()));
        let _ = first.delete(&[0; 4]);
    }
    // The pins of a former version, which wrote no label in place, are taken over, and removed.
    std::fs::remove_file(bpffs.path().join("flowd-rs/v1/writer")).unwrap();
    drop(next);
    let next = load(&settings);
    assert_eq!(next.maps.marks().count(), 2);
    next.maps.unpin().unwrap();
    assert!(!bpffs.path().join("flowd-rs").exists());
}

#[test]
#[ignore = "needs root"]
fn packets_of_no_known_flow_are_unchanged() {
    let bpffs = BpfFs::new();
    for strategy in Strategy::ALL {
        let program = load(&settings(&bpffs, strategy));
        enter(&program);
        let later_fragment = (44u8, vec![0, 0, 8, 0, 0, 0, 9]);
        let mut ipv4 = frame(&[], &plain());
        ipv4[12..14].copy_from_slice(&[8, 0]);
        let mut version = frame(&[], &plain());
        version[14] = 0x40;
        for (name, frame) in [
            ("another port", frame(&[], &packet(0, &[], TCP, 444))),
            ("ICMPv6", frame(&[], &packet(0, &[], 58, 443))),
            ("SCTP", frame(&[], &packet(0, &[], 132, 443))),
            ("ESP", frame(&[], &packet(0, &[], 50, 443))),
            ("no next header", frame(&[], &packet(0, &[], 59, 443))),
            (
                "later fragment",
                frame(&[], &packet(0, &[later_fragment], TCP, 443)),
            ),
            (
                "three VLAN tags",
                frame(&[0x88a8, 0x8100, 0x8100], &plain()),
            ),
            ("IPv4 by its type", ipv4),
            ("IPv4 by its version", version),
            (
                "ten headers",
                frame(
                    &[],
                    &packet(0, &vec![(60u8, options(&[1, 4])); 10], TCP, 443),
                ),
            ),
        ] {
            let ran = run(program.programs()[0], &frame, 1);
            assert_eq!((ran.verdict, ran.frame), (UNSPEC, frame), "{name}");
        }
        let whole = frame(&[0x8100], &packet(0, &extensions()[6].1, TCP, 443));
        let ports_end = whole.len() - 36;
        for length in 14..whole.len() {
            let cut = &whole[..length];
            let ran = run(program.programs()[0], cut, 1);
            let marked = strategy == Strategy::Label && length >= ports_end;
            let expected = if marked {
                labelled(cut, 18, label())
            } else {
                cut.to_vec()
            };
            assert_eq!(
                (ran.verdict, ran.frame),
                (UNSPEC, expected),
                "cut at {length}"
            );
        }
    }
}

/// The expected frame: with the headers of the strategy behind the IPv6 header.
fn with_headers(frame: &[u8], strategy: Strategy) -> Vec<u8> {
    let kinds: &[u8] = match strategy {
        Strategy::Label => &[],
        Strategy::HopByHop => &[0],
        Strategy::Destination => &[60],
        Strategy::HopByHopDestination => &[0, 60],
    };
    let mut expected = frame[..14 + 40].to_vec();
    let next = expected[14 + 6];
    for (n, _) in kinds.iter().enumerate() {
        // FACTS: next header, length 0, type 0x1e, length 3, 24 bits of experiment and activity, Pad1.
        let next = kinds.get(n + 1).copied().unwrap_or(next);
        expected.extend_from_slice(&[next, 0, 0x1e, 3, 0, 3, 14, 0]);
    }
    expected[14 + 6] = kinds[0];
    let length = u16::from_be_bytes([frame[18], frame[19]]) + 8 * kinds.len() as u16;
    expected[18..20].copy_from_slice(&length.to_be_bytes());
    expected.extend_from_slice(&frame[54..]);
    expected
}

#[test]
#[ignore = "needs root"]
fn extension_headers_are_exact_and_packets_that_cannot_carry_them_are_counted() {
    for strategy in [
        Strategy::HopByHop,
        Strategy::Destination,
        Strategy::HopByHopDestination,
    ] {
        let bpffs = BpfFs::new();
        let program = load(&settings(&bpffs, strategy));
        enter(&program);
        for class in [0, 0xb8, 0xff] {
            for protocol in [TCP, UDP] {
                let frame = frame(&[], &packet(class, &[], protocol, 443));
                check(&program, &frame, &with_headers(&frame, strategy));
            }
        }
        for (name, headers) in extensions() {
            let frame = frame(&[], &packet(0, &headers, TCP, 443));
            let ran = run(program.programs()[0], &frame, 1);
            let is_marked = !matches!(
                name,
                "hop-by-hop" | "jumbo option" | "first fragment" | "chain"
            );
            let expected = if is_marked {
                with_headers(&frame, strategy)
            } else {
                frame
            };
            assert_eq!(ran.frame, expected, "{name}");
        }
        assert_eq!(program.maps.unmarked(), [0, 4, 0]);
        // With an inline VLAN tag, the kernel does not make room for headers.
        let vlan = frame(&[0x8100], &plain());
        check(&program, &vlan, &vlan);
        assert_eq!(program.maps.unmarked(), [0, 4, 1]);
        // BPF_PROG_RUN uses a device of MTU 65536; the limit of the MTU is tested in tests/marker.rs.
    }
}

#[test]
#[ignore = "needs root"]
fn match_all_marks_every_ipv6_packet_with_one_label_per_flow() {
    for strategy in Strategy::ALL {
        let bpffs = BpfFs::new();
        let mut settings = settings(&bpffs, strategy);
        settings.match_all = true;
        let program = load(&settings);
        let frames: Vec<_> = [(TCP, 443), (TCP, 444), (UDP, 443), (58, 1)]
            .map(|(protocol, port)| frame(&[], &packet(0x20, &[], protocol, port)))
            .into();
        for frame in &frames {
            check(&program, frame, frame);
        }
        let mark = Mark {
            label: label(),
            tag: TAG,
            ..Mark::default()
        };
        program.maps.enter(&Key::ALL, mark).unwrap();
        for frame in &frames {
            if strategy != Strategy::Label {
                check(&program, frame, &with_headers(frame, strategy));
                continue;
            }
            let first = run(program.programs()[0], frame, 1).frame;
            let found = u32::from_be_bytes(first[14..18].try_into().unwrap()) & 0xfffff;
            assert_eq!(scitag::from_label(found), TAG);
            check(&program, frame, &labelled(frame, 14, found));
        }
    }
}

#[test]
#[ignore = "needs root"]
fn arbitrary_frames_are_neither_dropped_nor_changed_outside_label_and_headers() {
    let bpffs: Vec<_> = Strategy::ALL.iter().map(|_| BpfFs::new()).collect();
    let programs: Vec<_> = Strategy::ALL
        .iter()
        .zip(&bpffs)
        .map(|(s, fs)| load(&settings(fs, *s)))
        .collect();
    programs.iter().for_each(enter);
    let base = frame(&[0x8100], &packet(0, &extensions()[6].1, UDP, 443));
    let changed = |changes: Vec<(usize, u8)>, base: &[u8]| {
        let mut frame = base.to_vec();
        for (at, byte) in changes {
            let length = frame.len();
            frame[at % length] = byte;
        }
        frame
    };
    proptest!(|(noise in proptest::collection::vec(any::<u8>(), 14..200),
                changes in proptest::collection::vec((0usize..300, any::<u8>()), 0..4), plainly in any::<bool>())| {
        let plain = frame(&[], &plain());
        for input in [noise, changed(changes, if plainly { &plain } else { &base })] {
            // BPF_PROG_RUN refuses frames that end within the IP header.
            let header = match input[12..14] {
                [8, 0] => 20,
                [0x86, 0xdd] => 40,
                _ => 0,
            };
            if input.len() < 14 + header {
                continue;
            }
            for (program, strategy) in programs.iter().zip(Strategy::ALL) {
                for fd in program.programs() {
                    let ran = run(fd, &input, 1);
                    prop_assert_eq!(ran.verdict, UNSPEC);
                    if strategy == Strategy::Label {
                        prop_assert_eq!(ran.frame.len(), input.len());
                        let different = ran.frame.iter().zip(&input).filter(|(a, b)| a != b).count();
                        prop_assert!(different <= 3);
                    } else {
                        let grown = ran.frame.len() - input.len();
                        let full = if strategy == Strategy::HopByHopDestination { 16 } else { 8 };
                        prop_assert!(grown == 0 || grown == full);
                        let tail = input.len() - 54.min(input.len());
                        prop_assert!(ran.frame.ends_with(&input[input.len() - tail..]));
                        if grown == 0 {
                            prop_assert_eq!(&ran.frame, &input);
                        }
                    }
                }
            }
        }
    });
}

#[test]
#[ignore = "needs root"]
fn maps_with_another_layout_are_recreated_and_a_second_daemon_is_refused() {
    let bpffs = BpfFs::new();
    let settings = settings(&bpffs, Strategy::Label);
    let program = load(&settings);
    enter(&program);
    let second = Program::load(&settings, 1000, &[7; 16])
        .err()
        .unwrap()
        .to_string();
    assert!(second.contains("in use by another flowd-rs"), "{second}");
    drop(program);
    let adopted = load(&settings);
    assert_eq!(adopted.maps.marks().count(), 2);
    drop(adopted);
    let other = Program::load(&settings, 500, &[7; 16]).unwrap();
    assert_eq!(other.maps.marks().count(), 0);
}

#[test]
#[ignore = "needs root"]
fn a_full_map_is_reported_and_counts_outlive_the_flow() {
    let bpffs = BpfFs::new();
    let program = Program::load(&settings(&bpffs, Strategy::Label), 2, &[7; 16]).unwrap();
    enter(&program);
    let third = Flow::new(Protocol::Tcp, (SOURCE.into(), 1), (DESTINATION.into(), 2)).unwrap();
    let mark = Mark {
        label: label(),
        tag: TAG,
        ..Mark::default()
    };
    assert_eq!(
        program
            .maps
            .enter(&Key::new(&third).unwrap(), mark)
            .unwrap(),
        Entered::Full
    );
    run(program.programs()[0], &frame(&[], &plain()), 5);
    let key = Key::new(&flow(Protocol::Tcp)).unwrap();
    assert_eq!(program.maps.get(&key).unwrap().packets, 5);
    assert!(program.maps.remove(&key));
    assert!(!program.maps.remove(&key));
    let totals = program.maps.totals();
    assert_eq!(
        (totals.len(), totals[0].0, totals[0].1.packets),
        (1, TAG, 5)
    );
    assert_eq!(key.flow(), Some(flow(Protocol::Tcp)));
}

/// Loads the built object by path, with its trace output.
#[test]
#[ignore = "needs root"]
fn a_custom_program_with_debug_output_marks_the_same() {
    let bpffs = BpfFs::new();
    let object = bpffs.path().with_extension("o");
    std::fs::write(
        &object,
        include_bytes!(concat!(env!("OUT_DIR"), "/marker.bpf.o")),
    )
    .unwrap();
    let mut settings = settings(&bpffs, Strategy::Label);
    settings.program_path = Some(object.clone());
    settings.debug = true;
    let program = load(&settings);
    enter(&program);
    let frame = frame(&[], &plain());
    check(&program, &frame, &labelled(&frame, 14, label()));
    drop(program);
    // An object that is not a marker is refused, with the name of the missing map.
    std::fs::write(
        &object,
        include_bytes!(concat!(env!("OUT_DIR"), "/empty.bpf.o")),
    )
    .unwrap();
    let error = Program::load(&settings, 1000, &[7; 16])
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("lacks the map \"flows\""), "{error}");
    std::fs::remove_file(object).unwrap();
}
