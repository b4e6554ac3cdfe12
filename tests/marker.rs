//! The marker on real interfaces: frames captured at the remote end.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;
#[path = "common/prog_run.rs"]
mod prog_run;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use common::daemon::{Daemon, Home, PROGRAM, lines, run as run_program};
use common::net::{Hosts, NetNs};
use common::wait_for;
use common::wire::{Frame, Wire};
use flowd_rs::flow::Tag;
use flowd_rs::scitag;
use flowd_rs::scitag::Strategy;
use flowd_rs::sys::mark_maps::Maps;
use libbpf_rs::MapCore;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn6, bind, connect, setsockopt, socket, sockopt,
};
use prog_run::{BpfFs, empty_program, replace_writer, writer, written_by};

const TAG: Tag = Tag {
    experiment: 2,
    activity: 19,
};

fn home(bpffs: &BpfFs, marker: &str) -> Home {
    let path = bpffs.path().display();
    Home::with(&format!(
        "backends:\n  marker: {{bpfFsPath: {path}, {marker}}}\n"
    ))
}

fn udp(ns: &NetNs, address: &str) -> UdpSocket {
    let address: SocketAddr = address.parse().unwrap();
    ns.enter(move || UdpSocket::bind(address).unwrap())
}

fn attached(ns: &NetNs, interface: &str) -> String {
    let output = Command::new("tc")
        .args(["-n", &ns.name, "filter", "show", "dev", interface, "egress"])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn qdiscs(ns: &NetNs) -> String {
    let output = Command::new("tc")
        .args(["-n", &ns.name, "qdisc", "show", "dev", "veth0"])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn tc(ns: &NetNs, arguments: &[&str]) {
    let status = Command::new("tc")
        .args(["-n", &ns.name])
        .args(arguments)
        .status()
        .unwrap();
    assert!(status.success(), "tc {arguments:?}");
}

fn entered(daemon: &Daemon<'_>, count: usize) {
    daemon.expect_status(&format!("backend_events marker entered {count}"));
}

#[test]
#[ignore = "needs root"]
fn udp_packets_in_both_directions_are_labelled_from_start_to_end_and_others_are_not() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    // This host as source, and as destination: outgoing packets are marked in both cases.
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\n");
    home.write("start udp 2001:db8::2 5001 2001:db8::1 4001 atlas Staging\n");
    entered(&daemon, 2);
    let sockets: Vec<_> = [4000, 4001, 4002]
        .iter()
        .map(|p| udp(&hosts.here, &format!("[2001:db8::1]:{p}")))
        .collect();
    let send = || {
        for (socket, to) in sockets.iter().zip([5000, 5001, 5000]) {
            for _ in 0..3 {
                socket
                    .send_to(b"data", format!("[2001:db8::2]:{to}"))
                    .unwrap();
            }
        }
        let frames = wire.frames(9, |f| (4000..4003).contains(&f.source_port));
        assert_eq!(frames.len(), 9);
        frames
    };
    let during = send();
    for port in 4000..4003 {
        let labels: HashSet<u32> = during
            .iter()
            .filter(|f| f.source_port == port)
            .map(|f| f.label)
            .collect();
        assert_eq!(labels.len(), 1, "{during:?}");
        let tag = scitag::from_label(*labels.iter().next().unwrap());
        assert_eq!(tag == TAG, port != 4002, "{during:?}");
    }
    // The ends remove the marks, in either direction.
    home.write("end udp 2001:db8::1 4000 2001:db8::2 5000 2 19\nend udp 2001:db8::2 5001 2001:db8::1 4001 2 19\n");
    daemon.expect_status("backend_events marker removed 2");
    assert!(send().iter().all(|f| scitag::from_label(f.label) != TAG));
    home.write("start udp 192.0.2.1 1 192.0.2.2 2 2 9\nstart udp 2001:db8::1 1 2001:db8::2 2 0 0\nstart udp 2001:db8::1 2 2001:db8::2 2 512 1\n");
    for outcome in ["ipv4", "untagged", "tag_too_large"] {
        daemon.expect_status(&format!("backend_events marker {outcome} 1"));
    }
    daemon.stop();
    assert!(!qdiscs(&hosts.here).contains("clsact"));
    assert!(!bpffs.path().join("flowd-rs").exists());
}

/// A connection from port 40001 of this host to port 443 of the other, with this traffic class.
fn connection(hosts: &Hosts, class: i32) -> (TcpStream, TcpStream) {
    let listener = hosts
        .there
        .enter(|| TcpListener::bind("[2001:db8::2]:443").unwrap());
    let connected = || {
        let socket = socket(
            AddressFamily::Inet6,
            SockType::Stream,
            SockFlag::empty(),
            None,
        )
        .unwrap();
        setsockopt(&socket, sockopt::Ipv6TClass, &class).unwrap();
        setsockopt(&socket, sockopt::ReuseAddr, &true).unwrap();
        let address =
            |text: &str| SockaddrIn6::from(text.parse::<std::net::SocketAddrV6>().unwrap());
        bind(socket.as_raw_fd(), &address("[2001:db8::1]:40001")).unwrap();
        connect(socket.as_raw_fd(), &address("[2001:db8::2]:443")).ok()?;
        Some(TcpStream::from(socket))
    };
    // The previous connection may still wait for its last acknowledgement.
    let client = hosts
        .here
        .enter(|| wait_for("the port to be free", connected));
    let server = listener.accept().unwrap().0;
    (client, server)
}

/// Sends `length` bytes and ends the connection so that no port stays behind.
fn transfer((mut client, mut server): (TcpStream, TcpStream), length: usize) {
    let data: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
    let mut received = vec![0; length];
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(&data).unwrap());
        server.set_read_timeout(Some(common::DEADLINE)).unwrap();
        server.read_exact(&mut received).unwrap();
    });
    assert!(received == data);
    // The end that closes first keeps the port for a minute.
    drop(server);
    assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), 0);
}

#[test]
#[ignore = "needs root"]
fn flows_shows_the_label_of_the_packets() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 2 19\nstart udp 2001:db8::2 5001 2001:db8::1 4001 2 19\n");
    entered(&daemon, 2);
    let socket = home.path("control.sock");
    let (_, shown, _) = run_program(&["flows", "--json", "--socket", socket.to_str().unwrap()]);
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    for (port, to) in [(4000, 5000), (4001, 5001)] {
        let socket = udp(&hosts.here, &format!("[2001:db8::1]:{port}"));
        socket
            .send_to(b"data", format!("[2001:db8::2]:{to}"))
            .unwrap();
        let frame = wire.frames(1, |f| f.source_port == port).remove(0);
        let flows = shown["flows"].as_array().unwrap().iter();
        let flow = flows
            .into_iter()
            .find(|f| f["src-port"] == port || f["dst-port"] == port);
        assert_eq!(flow.unwrap()["label"], frame.label);
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn perfsonar_marks_every_packet_with_one_tag() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let path = bpffs.path().display();
    let home = Home::with(&format!(
        "  perfsonar: {{experimentId: 2, activityId: 19}}\nbackends:\n  marker: {{bpfFsPath: {path}, targetInterfaces: [veth0]}}\n"
    ));
    let wire = Wire::listen(&hosts);
    for _ in 0..2 {
        let daemon = home.start(&hosts.here);
        // Flow events have no effect on the marks.
        home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 3 3\n");
        daemon.expect_status("flows_open 1");
        let socket = udp(&hosts.here, "[2001:db8::1]:4000");
        for port in [5000, 5001, 53] {
            socket
                .send_to(b"data", format!("[2001:db8::2]:{port}"))
                .unwrap();
        }
        transfer(connection(&hosts, 0), 100_000);
        let frames = wire.frames(20, |f| [4000, 40001].contains(&f.source_port));
        assert!(frames.len() > 5);
        assert!(
            frames.iter().all(|f| scitag::from_label(f.label) == TAG),
            "{frames:?}"
        );
        // Discard the remaining frames.
        wire.frames(usize::MAX, |_| true);
        daemon.stop();
    }
    let log = home.log();
    assert!(
        log.contains(
            "warn: backends.marker.matchAll is set to true: plugins.perfsonar marks every packet"
        ),
        "{log}"
    );
}

#[test]
fn perfsonar_without_a_marker_or_a_tag_is_a_configuration_error() {
    for (perfsonar, backend, expected) in [
        (
            "{experimentId: 2, activityId: 19}",
            "firefly: {}",
            "plugins.perfsonar: backends.marker must be enabled, too",
        ),
        (
            "{activityId: 19}",
            "marker: {}",
            "plugins.perfsonar.experimentId: missing, expected 1 to 511",
        ),
        (
            "{experimentId: 2, activityId: 64}",
            "marker: {}",
            "plugins.perfsonar.activityId: 64 is out of range, expected 1 to 63",
        ),
    ] {
        let home = Home::with(&format!(
            "  perfsonar: {perfsonar}\nbackends:\n  {backend}\n"
        ));
        let config = home.path("flowd.cfg");
        let (code, _, error) = run_program(&["config", "check", "-c", config.to_str().unwrap()]);
        assert_eq!(code, 2);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
#[ignore = "needs root"]
fn every_packet_of_a_tcp_connection_has_one_label_from_the_first() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    home.write("start tcp 2001:db8::1 40001 2001:db8::2 443 atlas Staging\n");
    entered(&daemon, 1);
    // DSCP EF.
    transfer(connection(&hosts, 0xb8), 1 << 20);
    let frames = wire.frames(usize::MAX, |f| f.source_port == 40001);
    assert!(frames.len() > 5);
    let labels: HashSet<u32> = frames.iter().map(|f| f.label).collect();
    assert_eq!(labels.len(), 1, "{labels:x?}");
    assert_eq!(scitag::from_label(*labels.iter().next().unwrap()), TAG);
    assert!(frames.iter().all(|f| f.class & !3 == 0xb8));
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_thousand_flows_at_once_have_their_own_marks() {
    const COUNT: u16 = 1000;
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    let tag = |port: u16| Tag {
        experiment: 1 + port % 511,
        activity: 1 + port % 63,
    };
    let lines: String = (10_000..10_000 + COUNT)
        .map(|port| {
            let tag = tag(port);
            format!(
                "start udp 2001:db8::1 {port} 2001:db8::2 5000 {} {}\n",
                tag.experiment, tag.activity
            )
        })
        .collect();
    home.write(&lines);
    entered(&daemon, COUNT.into());
    for port in 10_000..10_000 + COUNT {
        udp(&hosts.here, &format!("[2001:db8::1]:{port}"))
            .send_to(b"x", "[2001:db8::2]:5000")
            .unwrap();
    }
    let frames = wire.frames(COUNT.into(), |f| f.destination_port == 5000);
    assert_eq!(frames.len(), usize::from(COUNT));
    for frame in frames {
        assert_eq!(scitag::from_label(frame.label), tag(frame.source_port));
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn bulk_transfers_complete_with_every_strategy_with_and_without_offloads() {
    let hosts = Hosts::new();
    for offload in ["on", "off"] {
        for ns in [&hosts.here, &hosts.there] {
            for feature in ["tso", "gso", "gro", "tx", "rx"] {
                let mut ethtool = ns.command("ethtool");
                let output = ethtool.args(["-K", "veth0", feature, offload]).output();
                assert!(output.unwrap().status.code().is_some());
            }
        }
        for strategy in Strategy::ALL {
            let bpffs = BpfFs::new();
            let word = strategy.as_str();
            let home = home(
                &bpffs,
                &format!("targetInterfaces: [veth0], markingStrategy: {word}"),
            );
            let daemon = home.start(&hosts.here);
            let wire = Wire::listen(&hosts);
            home.write("start tcp 2001:db8::1 40001 2001:db8::2 443 atlas Staging\n");
            entered(&daemon, 1);
            transfer(connection(&hosts, 0), 20 << 20);
            let frames = wire.frames(usize::MAX, |f| f.source_port == 40001);
            let marked = |f: &&Frame| match strategy {
                Strategy::Label => scitag::from_label(f.label) == TAG,
                Strategy::HopByHop => f.headers == [0, 6],
                Strategy::Destination => f.headers == [60, 6],
                Strategy::HopByHopDestination => f.headers == [0, 60, 6],
            };
            let share = frames.iter().filter(marked).count() as f64 / frames.len() as f64;
            let largest = frames.iter().map(|f| f.length).max().unwrap();
            eprintln!(
                "{word}, offloads {offload}: {} frames, {share:.3} of them marked, largest {largest}",
                frames.len()
            );
            if offload == "off" {
                assert!(largest <= 1514, "{word}: {largest}");
                assert!(frames.iter().all(Frame::checksum_is_right), "{word}");
            }
            if strategy == Strategy::Label {
                assert_eq!(share, 1.0);
            } else {
                assert!(share > 0.5, "{word}: {share}");
            }
            let (code, shown, _) = show(&hosts, &bpffs);
            assert_eq!(code, Some(0));
            assert!(shown.contains(&format!("strategy    {word}\n")), "{shown}");
            daemon.stop();
        }
    }
}

#[test]
#[ignore = "needs root"]
fn a_header_never_makes_a_packet_larger_than_the_mtu() {
    let hosts = Hosts::new();
    for (strategy, size) in [("hopByHop", 8), ("hopByHopDestination", 16)] {
        let bpffs = BpfFs::new();
        let home = home(
            &bpffs,
            &format!("targetInterfaces: [veth0], markingStrategy: {strategy}"),
        );
        let daemon = home.start(&hosts.here);
        let wire = Wire::listen(&hosts);
        home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\n");
        entered(&daemon, 1);
        // 1500 bytes less the headers of IPv6, UDP and the option, and one byte more.
        let room = 1500 - 40 - 8 - size;
        let socket = udp(&hosts.here, "[2001:db8::1]:4000");
        for length in [room, room + 1, 1452] {
            socket
                .send_to(&vec![7; length], "[2001:db8::2]:5000")
                .unwrap();
        }
        let frames = wire.frames(3, |f| f.source_port == 4000);
        let seen: Vec<_> = frames
            .iter()
            .map(|f| (f.length - 14, f.headers.len() > 1))
            .collect();
        assert_eq!(
            seen,
            [(1500, true), (1500 - size + 1, false), (1500, false)]
        );
        let (_, shown, _) = show(&hosts, &bpffs);
        assert!(
            shown.contains("unmarked    2 packets: larger than the MTU\n"),
            "{shown}"
        );
        daemon.stop();
    }
}

/// The label as decoded by tshark.
#[test]
#[ignore = "needs root"]
fn tshark_reads_the_same_label() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\n");
    entered(&daemon, 1);
    udp(&hosts.here, "[2001:db8::1]:4000")
        .send_to(b"data", "[2001:db8::2]:5000")
        .unwrap();
    let frame = wire.frames(1, |f| f.source_port == 4000).pop().unwrap();
    // A capture file of one frame: pcap(5), Ethernet.
    let length = (frame.bytes.len() as u32).to_ne_bytes();
    let mut capture = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65535, 1, 0, 0] {
        capture.extend_from_slice(&word.to_ne_bytes());
    }
    capture.extend_from_slice(&length);
    capture.extend_from_slice(&length);
    capture.extend_from_slice(&frame.bytes);
    let file = home.path("frame.pcap");
    std::fs::write(&file, capture).unwrap();
    let mut tshark = Command::new("tshark");
    tshark
        .arg("-r")
        .arg(&file)
        .args(["-T", "fields", "-e", "ipv6.flow", "-e", "ipv6.plen"]);
    let output = tshark.output().expect("tshark is installed");
    let text = String::from_utf8(output.stdout).unwrap();
    let (label, length) = text.trim().split_once('\t').unwrap();
    assert_eq!(
        u32::from_str_radix(label.trim_start_matches("0x"), 16),
        Ok(frame.label)
    );
    assert_eq!((scitag::from_label(frame.label), length), (TAG, "12"));
    daemon.stop();
}

fn show(hosts: &Hosts, bpffs: &BpfFs) -> (Option<i32>, String, String) {
    let mut command = hosts.here.command(PROGRAM);
    let output = command
        .args(["marker", "--bpf-fs-path"])
        .arg(bpffs.path())
        .arg("show")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
#[ignore = "needs root"]
fn marking_continues_without_a_daemon_and_the_next_one_takes_over() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\nstart udp 2001:db8::1 4001 2001:db8::2 5000 atlas Staging\n");
    entered(&daemon, 2);
    let wire = Wire::listen(&hosts);
    let socket = udp(&hosts.here, "[2001:db8::1]:4000");
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (sent, labels) = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                socket.send_to(b"x", "[2001:db8::2]:5000").unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_micros(500));
            }
            sent
        });
        // A second daemon is refused, and marking continues.
        let file = home.path("flowd.cfg");
        let mut second = hosts.here.command(PROGRAM);
        let second = second.args(["run", "-c"]).arg(&file).output().unwrap();
        assert_eq!(second.status.code(), Some(1));
        daemon.kill();
        std::thread::sleep(Duration::from_millis(100));
        let daemon = home.start(&hosts.here);
        daemon.expect_status("flows_open 2");
        home.write("end udp 2001:db8::1 4001 2001:db8::2 5000 2 19\n");
        daemon.expect_status("backend_events marker removed 1");
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let sent: usize = sender.join().unwrap();
        let frames = wire.frames(sent, |f| f.source_port == 4000);
        let labels: Vec<u32> = frames.iter().map(|f| f.label).collect();
        let (_, shown, _) = show(&hosts, &bpffs);
        assert!(
            shown.contains("flows       1\n") && shown.contains("atlas / Staging"),
            "{shown}"
        );
        // Packets counted before the kill are still counted.
        assert!(shown.contains(&format!("  {sent}  ")), "{sent}: {shown}");
        daemon.stop();
        (sent, labels)
    });
    assert_eq!(labels.len(), sent);
    let distinct: HashSet<u32> = labels.into_iter().collect();
    assert_eq!(distinct.len(), 1, "{distinct:x?}");
    assert_eq!(scitag::from_label(*distinct.iter().next().unwrap()), TAG);
}

#[test]
#[ignore = "needs root"]
fn labels_are_written_in_place_after_the_daemon_was_killed_too() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\n");
    entered(&daemon, 1);
    let wire = Wire::listen(&hosts);
    let socket = udp(&hosts.here, "[2001:db8::1]:4000");
    let is_marked = || {
        socket.send_to(b"x", "[2001:db8::2]:5000").unwrap();
        let frames = wire.frames(1, |f| f.source_port == 4000);
        scitag::from_label(frames[0].label) == TAG
    };
    assert!(is_marked());
    daemon.kill();
    assert!(written_by(&writer(&bpffs)).is_some());
    assert!(is_marked());
    // The filter runs the program that is in the pinned array; without one, it marks by itself.
    replace_writer(&writer(&bpffs), &empty_program());
    assert!(!is_marked());
    writer(&bpffs).delete(&[0; 4]).unwrap();
    assert!(is_marked());
    // The next daemon has an array of its own.
    let daemon = home.start(&hosts.here);
    assert!(written_by(&writer(&bpffs)).is_some());
    assert!(is_marked());
    daemon.stop();
}

/// A copy that another filter made shares the packet's memory.
#[test]
#[ignore = "needs root"]
fn the_label_is_not_written_into_a_copy_that_another_filter_made() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    hosts.here.ip(&[
        "link",
        "add",
        "mirror",
        "type",
        "veth",
        "peer",
        "name",
        "mirror",
        "netns",
        &hosts.there.name,
    ]);
    for ns in [&hosts.here, &hosts.there] {
        ns.ip(&[
            "link",
            "set",
            "mirror",
            "up",
            "arp",
            "off",
            "addrgenmode",
            "none",
        ]);
    }
    tc(&hosts.here, &["qdisc", "add", "dev", "veth0", "clsact"]);
    let mirror = "filter add dev veth0 egress prio 5 protocol ipv6 u32 match u32 0 0 action mirred egress mirror dev mirror continue";
    tc(&hosts.here, &mirror.split(' ').collect::<Vec<_>>());
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\nstart tcp 2001:db8::1 40001 2001:db8::2 443 atlas Staging\n");
    entered(&daemon, 2);
    let wire = Wire::listen(&hosts);
    let socket = udp(&hosts.here, "[2001:db8::1]:4000");
    for _ in 0..10 {
        socket.send_to(b"x", "[2001:db8::2]:5000").unwrap();
    }
    transfer(connection(&hosts, 0), 1 << 20);
    let frames = wire.frames(usize::MAX, |f| matches!(f.source_port, 4000 | 40001));
    for port in [4000, 40001] {
        let of_port = frames.iter().filter(|f| f.source_port == port);
        let (marked, copies): (Vec<_>, Vec<_>) =
            of_port.partition(|f| scitag::from_label(f.label) == TAG);
        assert!(marked.len() >= 10);
        assert_eq!(marked.len(), copies.len(), "port {port}");
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn retransmitted_packets_are_marked() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    home.write("start tcp 2001:db8::1 40001 2001:db8::2 443 atlas Staging\n");
    entered(&daemon, 1);
    let (mut client, server) = connection(&hosts, 0);
    // Without its address, the other host drops the packets.
    let address = ["2001:db8::2/64", "dev", "veth0"];
    hosts.there.ip(&[&["addr", "del"], &address[..]].concat());
    let wire = Wire::listen(&hosts);
    client.write_all(b"lost").unwrap();
    let frames = wire.frames(3, |f| f.source_port == 40001 && f.bytes.ends_with(b"lost"));
    assert_eq!(frames.len(), 3);
    assert!(frames.iter().all(|f| scitag::from_label(f.label) == TAG));
    hosts
        .there
        .ip(&[&["addr", "add"], &address[..], &["nodad"]].concat());
    let mut received = [0; 4];
    server.set_read_timeout(Some(common::DEADLINE)).unwrap();
    (&server).read_exact(&mut received).unwrap();
    assert_eq!(&received, b"lost");
    transfer((client, server), 1 << 20);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_restart_synchronizes_the_map_with_the_open_flows() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..10, "atlas Staging"));
    entered(&daemon, 10);
    daemon.kill();
    // While no daemon runs, one flow is removed from the journal, and one mark from the map.
    let journal = std::fs::read_to_string(home.path("state/journal")).unwrap();
    let kept: String = journal
        .lines()
        .filter(|l| !l.contains("::1 4 2001"))
        .map(|l| format!("{l}\n"))
        .collect();
    std::fs::write(home.path("state/journal"), kept).unwrap();
    let maps = Maps::pinned(bpffs.path()).unwrap().unwrap();
    let missing = maps
        .marks()
        .find(|(key, _)| key.flow().unwrap().source.port == 7)
        .unwrap();
    assert!(maps.remove(&missing.0));
    let daemon = home.start(&hosts.here);
    let mut ports: Vec<u16> = maps
        .marks()
        .map(|(key, _)| key.flow().unwrap().source.port)
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [1, 2, 3, 5, 6, 7, 8, 9, 10]);
    // The mark has its former label.
    assert_eq!(maps.get(&missing.0).unwrap().label, missing.1.label);
    home.wait_for_log("removed the mark of 1 flow that is not open");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn filters_of_other_programs_are_left_alone() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    tc(&hosts.here, &["qdisc", "add", "dev", "veth0", "clsact"]);
    let other = [
        "filter",
        "add",
        "dev",
        "veth0",
        "egress",
        "prio",
        "5",
        "protocol",
        "all",
        "bpf",
        "bytecode",
        "1,6 0 0 0",
    ];
    tc(&hosts.here, &other);
    let before = attached(&hosts.here, "veth0");
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    assert!(attached(&hosts.here, "veth0").contains("pref 5 bpf"));
    daemon.stop();
    assert_eq!(attached(&hosts.here, "veth0"), before);
    assert!(qdiscs(&hosts.here).contains("clsact"));
    // A qdisc made by the daemon also stays if another program uses it.
    tc(&hosts.here, &["qdisc", "del", "dev", "veth0", "clsact"]);
    let daemon = home.start(&hosts.here);
    tc(&hosts.here, &other);
    daemon.stop();
    assert_eq!(attached(&hosts.here, "veth0"), before);
    // Without other filters it is removed.
    tc(&hosts.here, &["qdisc", "del", "dev", "veth0", "clsact"]);
    home.start(&hosts.here).stop();
    assert!(!qdiscs(&hosts.here).contains("clsact"));
}

#[test]
#[ignore = "needs root"]
fn added_and_removed_interfaces_are_followed() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "discoverInterfaces: true");
    let daemon = home.start(&hosts.here);
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    assert_eq!(attached(&hosts.here, "lo"), "");
    let add = || {
        hosts.here.ip(&[
            "link", "add", "late", "type", "veth", "peer", "name", "peer",
        ]);
        hosts.here.ip(&["link", "set", "late", "up"]);
    };
    add();
    for _ in 0..2 {
        hosts
            .here
            .ip(&["addr", "add", "2001:db8:1::1/64", "dev", "late", "nodad"]);
        wait_for("a filter", || {
            attached(&hosts.here, "late")
                .contains("flowd_mark_l2")
                .then_some(())
        });
        hosts.here.ip(&["link", "del", "late"]);
        home.wait_for_log("interface late was removed");
        add();
    }
    daemon.stop();
    assert_eq!(attached(&hosts.here, "veth0"), "");
}

/// A tun device in a namespace: reads of the file return the packets sent through it.
fn tun(ns: &NetNs, name: &str) -> std::fs::File {
    const TUNSETIFF: u64 = 0x4004_54ca;
    const IFF_TUN_NO_PI: u16 = 0x1001;
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&IFF_TUN_NO_PI.to_ne_bytes());
    let file = ns.enter(|| {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        // SAFETY: TUNSETIFF reads and writes a struct ifreq of 40 bytes.
        let result = unsafe {
            nix::libc::ioctl(
                std::os::fd::AsRawFd::as_raw_fd(&file),
                TUNSETIFF,
                request.as_mut_ptr(),
            )
        };
        assert_eq!(result, 0);
        file
    });
    ns.ip(&["addr", "add", "2001:db8:2::1/64", "dev", name, "nodad"]);
    ns.ip(&["link", "set", name, "up"]);
    file
}

#[test]
#[ignore = "needs root"]
fn a_device_without_ethernet_headers_is_marked() {
    let hosts = Hosts::new();
    let mut device = tun(&hosts.here, "tun0");
    for strategy in ["label", "hopByHopDestination"] {
        let bpffs = BpfFs::new();
        let home = home(
            &bpffs,
            &format!("targetInterfaces: [tun0], markingStrategy: {strategy}"),
        );
        let daemon = home.start(&hosts.here);
        assert!(attached(&hosts.here, "tun0").contains("flowd_mark_l3"));
        home.write("start udp 2001:db8:2::1 4000 2001:db8:2::2 5000 atlas Staging\n");
        entered(&daemon, 1);
        udp(&hosts.here, "[2001:db8:2::1]:4000")
            .send_to(b"hello", "[2001:db8:2::2]:5000")
            .unwrap();
        let mut packet = [0; 2048];
        // Other packets, such as router solicitations, are sent as well.
        let length = loop {
            let length = device.read(&mut packet).unwrap();
            if packet[..length].ends_with(b"hello") {
                break length;
            }
        };
        let label = u32::from_be_bytes(packet[..4].try_into().unwrap()) & 0xfffff;
        if strategy == "label" {
            assert_eq!((scitag::from_label(label), length), (TAG, 40 + 8 + 5));
        } else {
            let [hop, destination] = [
                scitag::options_header(TAG, 60),
                scitag::options_header(TAG, 17),
            ];
            assert_eq!(
                (packet[6], &packet[40..48], &packet[48..56]),
                (0, &hop[..], &destination[..])
            );
            assert_eq!((length, packet[5]), (40 + 16 + 8 + 5, 16 + 8 + 5));
        }
        daemon.stop();
    }
}

fn run_clean(hosts: &Hosts, bpffs: &BpfFs, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = hosts.here.command(PROGRAM);
    command
        .args(["marker", "--bpf-fs-path"])
        .arg(bpffs.path())
        .arg("clean");
    let output = command.args(arguments).output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

/// The daemon's user could replace its directory by a symlink: the target must not change its owner.
#[test]
#[ignore = "needs root"]
fn prepare_follows_no_symlink() {
    use std::os::unix::fs::{MetadataExt, chown, symlink};
    const USER: u32 = 64123;
    let bpffs = BpfFs::of_root();
    let home = Home::with(&format!(
        "backends: {{marker: {{bpfFsPath: {}, targetInterfaces: [lo]}}}}\n",
        bpffs.path().display()
    ));
    let prepare = || {
        let mut command = std::process::Command::new(PROGRAM);
        command.args(["prepare", "--user", &USER.to_string(), "-c"]);
        let output = command.arg(home.path("flowd.cfg")).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    assert_eq!(prepare(), (true, String::new()));
    let ours = bpffs.path().join("flowd-rs");
    for path in [&ours, &ours.join("v1")] {
        assert_eq!(std::fs::metadata(path).unwrap().uid(), USER);
    }
    let elsewhere = home.path("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    std::fs::write(elsewhere.join("secret"), "").unwrap();
    std::fs::remove_dir(ours.join("v1")).unwrap();
    symlink(&elsewhere, ours.join("v1")).unwrap();
    let (success, error) = prepare();
    assert!(!success && error.contains("Not a directory"), "{error}");
    // Neither one level up.
    std::fs::remove_file(ours.join("v1")).unwrap();
    std::fs::remove_dir(&ours).unwrap();
    symlink(home.dir.path(), &ours).unwrap();
    assert!(!prepare().0);
    for path in [&elsewhere, &elsewhere.join("secret")] {
        assert_eq!(std::fs::metadata(path).unwrap().uid(), 0);
    }
    // In a directory that another user can write to, no pipe is created, wherever that user's symlinks point.
    let root = tempfile::tempdir_in("/run").unwrap();
    let path = |name: &str| root.path().join(name);
    for name in ["victim", "theirs"] {
        std::fs::create_dir(path(name)).unwrap();
    }
    std::fs::write(path("victim/f"), "").unwrap();
    symlink(path("victim"), path("theirs/sub")).unwrap();
    chown(path("theirs"), Some(USER), None).unwrap();
    for (pipe, is_created) in [
        ("theirs/pipe", false),
        ("theirs/sub/f", false),
        ("theirs/sub/new", false),
        ("theirs/not/there", false),
        ("not/there/pipe", true),
    ] {
        let shown = path(pipe).display().to_string();
        home.configure_plugins(
            &format!("  namedPipe: {{pipePath: {shown}}}\n"),
            "backends: {dummy: }\n",
        );
        assert_eq!(prepare(), (true, String::new()), "{pipe}");
        let found = std::fs::metadata(path(pipe));
        let is_theirs = found.is_ok_and(|found| found.uid() == USER);
        assert_eq!(is_theirs, is_created, "{pipe}");
    }
    assert_eq!(std::fs::read_dir(path("victim")).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(path("theirs")).unwrap().count(), 1);
}

#[test]
#[ignore = "needs root"]
fn a_removed_filter_is_attached_again() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    // flowd-go does this when it stops.
    tc(&hosts.here, &["qdisc", "del", "dev", "veth0", "clsact"]);
    wait_for("the filter", || {
        attached(&hosts.here, "veth0")
            .contains("flowd_mark_l2")
            .then_some(())
    });
    home.wait_for_log("the filter on veth0 was removed; attaching it again");
    daemon.stop();
    assert!(!qdiscs(&hosts.here).contains("clsact"));
}

#[test]
#[ignore = "needs root"]
fn clean_removes_what_a_killed_daemon_left() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    assert_eq!(run_clean(&hosts, &bpffs, &[]).0, Some(1));
    daemon.kill();
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    let clean = |arguments: &[&str]| run_clean(&hosts, &bpffs, arguments);
    assert_eq!(clean(&["--target-interface", "nowhere"]).0, Some(1));
    assert_eq!(
        clean(&["--remove-qdisc"]),
        (
            Some(0),
            "veth0: detached\npinned maps: removed\n".to_owned()
        )
    );
    assert_eq!(attached(&hosts.here, "veth0"), "");
    assert!(!qdiscs(&hosts.here).contains("clsact"));
    assert!(!bpffs.path().join("flowd-rs").exists());
    assert_eq!(clean(&[]), (Some(0), String::new()));
    // With keepOnExit, the filter stays until it is cleaned.
    let kept = self::home(&bpffs, "targetInterfaces: [veth0], keepOnExit: true");
    kept.start(&hosts.here).stop();
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    assert_eq!(clean(&[]).0, Some(0));
    assert!(qdiscs(&hosts.here).contains("clsact"));
}

#[test]
#[ignore = "needs root"]
fn a_marker_that_cannot_run_fails_with_one_clear_line() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let fails = |marker: &str, wrapper: &[&str], expected: &str| {
        let home = home(&bpffs, marker);
        let mut command = hosts.here.command(wrapper.first().unwrap_or(&PROGRAM));
        command.args(wrapper.get(1..).unwrap_or_default());
        let output = command
            .args(["run", "-c"])
            .arg(home.path("flowd.cfg"))
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = error.lines().filter(|l| !l.starts_with("info: ")).collect();
        assert_eq!((output.status.code(), lines.len()), (Some(1), 1), "{error}");
        assert!(lines[0].contains(expected), "{error}");
        assert_eq!(attached(&hosts.here, "veth0"), "");
    };
    fails(
        "targetInterfaces: [nowhere]",
        &[],
        "interface nowhere (backends.marker.targetInterfaces) does not exist, expected one of lo, veth0",
    );
    let drop = "--bounding-set=-bpf,-sys_admin,-net_admin,-perfmon";
    fails(
        "targetInterfaces: [veth0]",
        &["setpriv", drop, PROGRAM],
        "CAP_BPF and CAP_NET_ADMIN (before Linux 5.8: CAP_SYS_ADMIN) are needed",
    );
    fails(
        "targetInterfaces: [veth0], programPath: /dev/null",
        &[],
        "/dev/null (backends.marker.programPath)",
    );
}

#[test]
fn tags_are_explained() {
    let (code, out, _) = run_program(&["tag", "encode", "CMS", "14"]);
    assert_eq!(code, 0);
    assert!(
        out.contains("scitag      206 0xce\n") && out.contains("label       196664 0x30038 "),
        "{out}"
    );
    assert!(out.contains("option      1e 03 00 03 0e 00"), "{out}");
    let (_, out, _) = run_program(&["tag", "decode", "0xb0139"]);
    assert!(
        out.starts_with("experiment  3 cms\nactivity    14 "),
        "{out}"
    );
    let (_, out, _) = run_program(&["tag", "decode", "--scitag", "206"]);
    assert!(
        out.starts_with("experiment  3 cms\nactivity    14 "),
        "{out}"
    );
    for wrong in [
        &["tag", "encode", "512", "1"][..],
        &["tag", "encode", "cms", "nothing"],
        &["tag", "decode", "0x100000"],
        &["tag", "decode", "--scitag", "65536"],
    ] {
        assert_eq!(run_program(wrong).0, 2);
    }
}

#[test]
#[ignore = "needs root"]
fn flows_beyond_max_flows_are_refused_and_the_others_stay_marked() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let path = bpffs.path().display();
    let home = Home::with(&format!(
        "flows: {{maxFlows: 3}}\nbackends:\n  marker: {{bpfFsPath: {path}, targetInterfaces: [veth0]}}\n"
    ));
    let daemon = home.start(&hosts.here);
    let lines: String = (1..=10)
        .map(|n| format!("start udp 2001:db8::1 {n} 2001:db8::2 2 2 9\n"))
        .collect();
    home.write(&lines);
    entered(&daemon, 3);
    daemon.expect_status("dispatcher_events refused_table_full 7");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn nothing_but_the_end_of_its_flow_takes_a_mark_off() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let path = bpffs.path().display();
    let home = Home::with(&format!(
        "  firefly: {{bindAddress: '::1', bindPort: 10600}}\nbackends:\n  marker: {{bpfFsPath: {path}, targetInterfaces: [veth0]}}\n"
    ));
    let daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    let client = udp(&hosts.here, "[2001:db8::1]:4000");
    let is_marked = || {
        client.send_to(b"data", "[2001:db8::2]:5000").unwrap();
        let frame = wire.frames(1, |f| f.source_port == 4000).remove(0);
        scitag::from_label(frame.label) == TAG
    };
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 2 19\n");
    entered(&daemon, 1);
    assert!(is_marked());
    // A firefly of the other host, in its direction.
    let firefly = |state: &str, tag: (u16, u16)| {
        let end = if state == "end" {
            ",\"end-time\":\"2026-01-01T00:00:01Z\""
        } else {
            ""
        };
        let json = format!(
            "{{\"version\":1,\"flow-lifecycle\":{{\"state\":\"{state}\",\"start-time\":\"2026-01-01T00:00:00Z\"{end}}},\"context\":{{\"experiment-id\":{},\"activity-id\":{}}},\"flow-id\":{{\"afi\":\"ipv6\",\"src-ip\":\"2001:db8::2\",\"src-port\":5000,\"dst-ip\":\"2001:db8::1\",\"dst-port\":4000,\"protocol\":\"udp\"}}}}",
            tag.0, tag.1
        );
        let sender = udp(&hosts.here, "[::1]:0");
        sender.send_to(json.as_bytes(), "[::1]:10600").unwrap();
    };
    for (n, (state, tag)) in [("end", (2, 19)), ("start", (0, 0)), ("start", (3, 3))]
        .into_iter()
        .enumerate()
    {
        firefly(state, tag);
        daemon.expect_status(&format!("dispatcher_events less_trusted {}", n + 1));
        assert!(is_marked(), "{state}");
    }
    // An end of a flow that was never open, by the pipe itself.
    home.write("end udp 2001:db8::2 5000 2001:db8::1 4001 2 19\n");
    daemon.expect_status("dispatcher_events ended_unmatched 1");
    assert!(is_marked());
    home.write("end udp 2001:db8::2 5000 2001:db8::1 4000 2 19\n");
    daemon.expect_status("backend_events marker removed 1");
    assert!(!is_marked());
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn with_match_all_the_flow_that_started_last_gives_the_tag_after_a_restart_too() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0], matchAll: true");
    let mut daemon = home.start(&hosts.here);
    let wire = Wire::listen(&hosts);
    let client = udp(&hosts.here, "[2001:db8::1]:4999");
    let tag = || {
        client.send_to(b"data", "[2001:db8::2]:5999").unwrap();
        let frame = wire.frames(1, |f| f.source_port == 4999).remove(0);
        let tag = scitag::from_label(frame.label);
        (tag.experiment, tag.activity)
    };
    for n in 1..=8 {
        home.write(&format!(
            "start udp 2001:db8::1 {n} 2001:db8::2 5000 {n} {n}\n"
        ));
    }
    daemon.expect_status("backend_events marker entered 8");
    for _ in 0..6 {
        assert_eq!(tag(), (8, 8));
        daemon.kill();
        daemon = home.start(&hosts.here);
    }
    assert_eq!(tag(), (8, 8));
    home.write("end udp 2001:db8::1 8 2001:db8::2 5000 8 8\n");
    daemon.expect_status("backend_events marker removed 1");
    assert_ne!(tag(), (8, 8));
    daemon.stop();
}
