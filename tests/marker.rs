//! The marker on real interfaces: frames read off the wire at the far side.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;
#[path = "common/prog_run.rs"]
mod prog_run;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Home, PROGRAM, run as run_program};
use common::net::{Hosts, NetNs};
use common::wait_for;
use flowd_rs::flow::Tag;
use flowd_rs::scitag;
use prog_run::BpfFs;

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

/// Frames at the far side, by tshark: traffic class, flow label, lengths and so on as asked for.
struct Capture {
    child: std::process::Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Capture {
    fn start(hosts: &Hosts, filter: &str, fields: &[&str]) -> Capture {
        let mut command = hosts.there.command("tshark");
        command.args(["-l", "-n", "-i", "veth0", "-f", filter, "-T", "fields"]);
        // Checksums of this host's own making are checked where they are asked for.
        command.args([
            "-o",
            "tcp.check_checksum:TRUE",
            "-o",
            "udp.check_checksum:TRUE",
        ]);
        fields.iter().for_each(|field| {
            command.args(["-e", field]);
        });
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("tshark is installed");
        let (send, lines) = std::sync::mpsc::channel();
        let out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok)
            {
                let _ = send.send(line);
            }
        });
        // It says so on standard error once it listens.
        let mut error = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("Capturing on") {
            assert_ne!(
                std::io::BufRead::read_line(&mut error, &mut said).unwrap(),
                0,
                "{said}"
            );
        }
        std::thread::spawn(move || {
            let _ = error.read_to_string(&mut String::new());
        });
        let capture = Capture { child, lines };
        capture.settle(hosts);
        capture
    }

    /// Until a probe that passes the filter is seen: only then is the capture open.
    fn settle(&self, _hosts: &Hosts) {
        std::thread::sleep(Duration::from_millis(500));
    }

    /// The next frame.
    fn line(&self) -> String {
        self.lines
            .recv_timeout(common::DEADLINE)
            .expect("a frame within the deadline")
    }

    /// Everything that comes until it has been quiet for a while.
    fn rest(&self) -> Vec<String> {
        std::iter::from_fn(|| self.lines.recv_timeout(Duration::from_millis(700)).ok()).collect()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn label(field: &str) -> u32 {
    u32::from_str_radix(field.trim_start_matches("0x"), 16).unwrap()
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
fn udp_of_both_roles_is_labelled_from_start_to_end_and_neighbours_are_not() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let capture = Capture::start(
        &hosts,
        "ip6 and udp",
        &[
            "udp.srcport",
            "ipv6.flow",
            "ipv6.tclass",
            "udp.checksum.status",
        ],
    );
    // As source, and as destination: what leaves this host is what is marked.
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
        (0..9).map(|_| capture.line()).collect::<Vec<_>>()
    };
    let during = send();
    for port in ["4000", "4001", "4002"] {
        let labels: HashSet<u32> = during
            .iter()
            .filter(|l| l.starts_with(port))
            .map(|l| label(l.split('\t').nth(1).unwrap()))
            .collect();
        let tagged = port != "4002";
        assert_eq!(labels.len(), 1, "{during:?}");
        assert_eq!(
            scitag::from_label(*labels.iter().next().unwrap()) == TAG,
            tagged,
            "{during:?}"
        );
    }
    // Whichever way round the end is told.
    home.write("end udp 2001:db8::1 4000 2001:db8::2 5000 2 19\nend udp 2001:db8::2 5001 2001:db8::1 4001 2 19\n");
    daemon.expect_status("backend_events marker removed 2");
    for line in send() {
        assert_ne!(
            scitag::from_label(label(line.split('\t').nth(1).unwrap())),
            TAG,
            "{line}"
        );
    }
    home.write("start udp 192.0.2.1 1 192.0.2.2 2 2 9\nstart udp 2001:db8::1 1 2001:db8::2 2 0 0\nstart udp 2001:db8::1 2 2001:db8::2 2 512 1\n");
    for outcome in ["ipv4", "untagged", "tag_too_large"] {
        daemon.expect_status(&format!("backend_events marker {outcome} 1"));
    }
    daemon.stop();
    assert!(!qdiscs(&hosts.here).contains("clsact"));
    assert!(!bpffs.path().join("flowd-rs").exists());
}

#[test]
#[ignore = "needs root"]
fn every_packet_of_a_tcp_connection_has_one_label_from_the_first() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    let capture = Capture::start(
        &hosts,
        "ip6 and tcp src port 40001",
        &["ipv6.flow", "ipv6.tclass"],
    );
    home.write("start tcp 2001:db8::1 40001 2001:db8::2 443 atlas Staging\n");
    entered(&daemon, 1);
    let listener = hosts
        .there
        .enter(|| TcpListener::bind("[2001:db8::2]:443").unwrap());
    let client = hosts.here.enter(|| {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn6, bind, connect, setsockopt, socket,
            sockopt,
        };
        use std::os::fd::AsRawFd;
        let socket = socket(
            AddressFamily::Inet6,
            SockType::Stream,
            SockFlag::empty(),
            None,
        )
        .unwrap();
        // DSCP EF and ECT(0).
        setsockopt(&socket, sockopt::Ipv6TClass, &0xba).unwrap();
        let address =
            |text: &str| SockaddrIn6::from(text.parse::<std::net::SocketAddrV6>().unwrap());
        bind(socket.as_raw_fd(), &address("[2001:db8::1]:40001")).unwrap();
        connect(socket.as_raw_fd(), &address("[2001:db8::2]:443")).unwrap();
        TcpStream::from(socket)
    });
    let mut server = listener.accept().unwrap().0;
    let data = vec![7; 1 << 20];
    std::thread::scope(|scope| {
        scope.spawn(|| (&client).write_all(&data).unwrap());
        server.read_exact(&mut vec![0; 1 << 20]).unwrap();
    });
    client.shutdown(std::net::Shutdown::Both).unwrap();
    let frames = capture.rest();
    assert!(frames.len() > 5, "{frames:?}");
    let labels: HashSet<u32> = frames
        .iter()
        .map(|line| label(line.split('\t').next().unwrap()))
        .collect();
    assert_eq!(labels.len(), 1, "{labels:x?}");
    assert_eq!(scitag::from_label(*labels.iter().next().unwrap()), TAG);
    let classes: HashSet<&str> = frames
        .iter()
        .map(|line| line.split('\t').nth(1).unwrap())
        .collect();
    assert!(
        classes.iter().all(|class| label(class) & !3 == 0xb8),
        "{classes:?}"
    );
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
    let capture = Capture::start(&hosts, "ip6 and udp", &["udp.srcport", "ipv6.flow"]);
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
    for _ in 0..COUNT {
        let line = capture.line();
        let (port, found) = line.split_once('\t').unwrap();
        assert_eq!(
            scitag::from_label(label(found)),
            tag(port.parse().unwrap()),
            "{line}"
        );
    }
    daemon.stop();
}

/// iperf3 from here to there; returns the bytes that arrived.
fn iperf3(hosts: &Hosts, seconds: &str) -> f64 {
    let mut server = hosts
        .there
        .command("iperf3")
        .args(["-s", "-1", "-B", "2001:db8::2"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let output = wait_for("the iperf3 server", || {
        let mut client = hosts.here.command("iperf3");
        client.args([
            "-6",
            "-c",
            "2001:db8::2",
            "--cport",
            "40001",
            "-t",
            seconds,
            "-J",
        ]);
        let output = client.output().unwrap();
        output.status.success().then_some(output.stdout)
    });
    server.wait().unwrap();
    let result: serde_json::Value = serde_json::from_slice(&output).unwrap();
    result["end"]["sum_received"]["bytes"].as_f64().unwrap()
}

#[test]
#[ignore = "needs root"]
fn bulk_transfers_complete_with_every_strategy_with_offloads_and_without() {
    let hosts = Hosts::new();
    for offload in ["on", "off"] {
        for ns in [&hosts.here, &hosts.there] {
            for feature in ["tso", "gso", "gro", "tx", "rx"] {
                let status = ns
                    .command("ethtool")
                    .args(["-K", "veth0", feature, offload])
                    .stderr(Stdio::null())
                    .status();
                assert!(status.unwrap().code().is_some());
            }
        }
        for strategy in ["label", "hopByHop", "destination", "hopByHopDestination"] {
            let bpffs = BpfFs::new();
            let home = home(
                &bpffs,
                &format!("targetInterfaces: [veth0], markingStrategy: {strategy}"),
            );
            let daemon = home.start(&hosts.here);
            home.write("start tcp 2001:db8::1 40001 2001:db8::2 5201 atlas Staging\n");
            entered(&daemon, 1);
            let fields = [
                "ipv6.flow",
                "ipv6.opt.type",
                "ipv6.plen",
                "tcp.checksum.status",
                "frame.len",
            ];
            let capture = Capture::start(
                &hosts,
                "ip6 and src host 2001:db8::1 and port 40001",
                &fields,
            );
            let bytes = iperf3(&hosts, "0.3");
            assert!(bytes > 1e6, "{bytes}");
            let frames = capture.rest();
            let marked = frames.iter().filter(|line| {
                let mut fields = line.split('\t');
                let (flow, options) = (fields.next().unwrap(), fields.next().unwrap());
                // Option 0x1e, as tshark prints it.
                if strategy == "label" {
                    scitag::from_label(label(flow)) == TAG
                } else {
                    options.contains("0x1e") || options.contains("30")
                }
            });
            let share = marked.count() as f64 / frames.len() as f64;
            let largest = frames
                .iter()
                .filter_map(|l| l.split('\t').nth(4)?.parse::<u32>().ok())
                .max()
                .unwrap();
            eprintln!(
                "{strategy}, offloads {offload}: {bytes:.2e} bytes, {} frames, {share:.3} of them marked, largest {largest}",
                frames.len()
            );
            if offload == "off" {
                assert!(largest <= 1514, "{largest}");
                // 0 is bad.
                let bad = frames
                    .iter()
                    .filter(|l| l.split('\t').nth(3) == Some("0"))
                    .count();
                assert_eq!(bad, 0, "of {}", frames.len());
            }
            if strategy == "label" {
                assert_eq!(share, 1.0);
            } else {
                assert!(share > 0.3, "{share}");
            }
            let (code, shown, _) = show(&hosts, &bpffs);
            assert_eq!(code, Some(0));
            assert!(
                shown.contains(&format!("strategy    {strategy}\n")),
                "{shown}"
            );
            daemon.stop();
        }
    }
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
fn marking_goes_on_while_the_daemon_is_dead_and_the_next_one_takes_over() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 atlas Staging\nstart udp 2001:db8::1 4001 2001:db8::2 5000 atlas Staging\n");
    entered(&daemon, 2);
    let capture = Capture::start(&hosts, "ip6 and udp src port 4000", &["ipv6.flow"]);
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
        // Old and new at once: the new one is refused, and marking goes on.
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
        let labels: Vec<u32> = capture.rest().iter().map(|line| label(line)).collect();
        let (_, shown, _) = show(&hosts, &bpffs);
        assert!(
            shown.contains("flows       1\n") && shown.contains("atlas / Staging"),
            "{shown}"
        );
        // Whatever was counted before the kill is still counted.
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
fn others_on_the_qdisc_are_left_alone() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    tc(&hosts.here, &["qdisc", "add", "dev", "veth0", "clsact"]);
    let other = [
        "filter", "add", "dev", "veth0", "egress", "prio", "5", "matchall", "action", "continue",
    ];
    tc(&hosts.here, &other);
    let before = attached(&hosts.here, "veth0");
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    let daemon = home.start(&hosts.here);
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    assert!(attached(&hosts.here, "veth0").contains("matchall"));
    daemon.stop();
    assert_eq!(attached(&hosts.here, "veth0"), before);
    assert!(qdiscs(&hosts.here).contains("clsact"));
    // A qdisc of ours that somebody else has begun to use stays as well.
    tc(&hosts.here, &["qdisc", "del", "dev", "veth0", "clsact"]);
    let daemon = home.start(&hosts.here);
    tc(&hosts.here, &other);
    daemon.stop();
    assert_eq!(attached(&hosts.here, "veth0"), before);
    // And without them it goes; with removeQdisc: false it stays.
    tc(&hosts.here, &["qdisc", "del", "dev", "veth0", "clsact"]);
    home.start(&hosts.here).stop();
    assert!(!qdiscs(&hosts.here).contains("clsact"));
}

#[test]
#[ignore = "needs root"]
fn interfaces_that_come_and_go_are_followed() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "discoverInterfaces: true");
    let daemon = home.start(&hosts.here);
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    assert_eq!(attached(&hosts.here, "lo"), "");
    hosts.here.ip(&["link", "add", "late", "type", "dummy"]);
    hosts.here.ip(&["link", "set", "late", "up"]);
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
        home.wait_for_log("late is gone");
        hosts.here.ip(&["link", "add", "late", "type", "dummy"]);
        hosts.here.ip(&["link", "set", "late", "up"]);
    }
    daemon.stop();
    assert_eq!(attached(&hosts.here, "veth0"), "");
}

#[test]
#[ignore = "needs root"]
fn a_tunnel_without_ethernet_headers_is_marked() {
    let hosts = Hosts::new();
    for (ns, local, remote, inner) in [
        (&hosts.here, "2001:db8::1", "2001:db8::2", "1"),
        (&hosts.there, "2001:db8::2", "2001:db8::1", "2"),
    ] {
        ns.ip(&[
            "link",
            "add",
            "tunnel",
            "type",
            "ip6tnl",
            "mode",
            "ip6ip6",
            "local",
            local,
            "remote",
            remote,
            "encaplimit",
            "none",
        ]);
        ns.ip(&[
            "addr",
            "add",
            &format!("2001:db8:2::{inner}/64"),
            "dev",
            "tunnel",
            "nodad",
        ]);
        ns.ip(&["link", "set", "tunnel", "up"]);
    }
    for strategy in ["label", "hopByHopDestination"] {
        let bpffs = BpfFs::new();
        let home = home(
            &bpffs,
            &format!("targetInterfaces: [tunnel], markingStrategy: {strategy}"),
        );
        let daemon = home.start(&hosts.here);
        assert!(attached(&hosts.here, "tunnel").contains("flowd_mark_l3"));
        home.write("start udp 2001:db8:2::1 4000 2001:db8:2::2 5000 atlas Staging\n");
        entered(&daemon, 1);
        let receiver = udp(&hosts.there, "[2001:db8:2::2]:5000");
        receiver
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let capture = Capture::start(&hosts, "ip6 proto 41", &["ipv6.flow", "ipv6.opt.type"]);
        let sender = udp(&hosts.here, "[2001:db8:2::1]:4000");
        wait_for("a datagram through the tunnel", || {
            sender.send_to(b"hello", "[2001:db8:2::2]:5000").ok()?;
            receiver.recv(&mut [0; 9]).ok()
        });
        let line = capture.line();
        let inner = line.split('\t').next().unwrap().split(',').nth(1).unwrap();
        match strategy {
            "label" => assert_eq!(scitag::from_label(label(inner)), TAG, "{line}"),
            _ => assert_eq!(line.matches("0x1e").count(), 2, "{line}"),
        }
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn what_a_killed_daemon_left_is_cleaned() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = home(&bpffs, "targetInterfaces: [veth0]");
    home.start(&hosts.here).kill();
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    let clean = |arguments: &[&str]| {
        let mut command = hosts.here.command(PROGRAM);
        let output = command
            .args(["marker", "--bpf-fs-path"])
            .arg(bpffs.path())
            .arg("clean")
            .args(arguments)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
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
    // What is to stay on purpose stays, and marks, until somebody cleans it.
    let kept = self::home(&bpffs, "targetInterfaces: [veth0], keepOnExit: true");
    kept.start(&hosts.here).stop();
    assert!(attached(&hosts.here, "veth0").contains("flowd_mark_l2"));
    assert_eq!(clean(&[]).0, Some(0));
    assert!(qdiscs(&hosts.here).contains("clsact"));
}

#[test]
#[ignore = "needs root"]
fn what_keeps_the_marker_from_running_is_one_clear_line() {
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
        "interface nowhere (backends.marker.targetInterfaces) is not there; there are lo, veth0",
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
fn a_full_map_leaves_the_rest_marked_and_says_so() {
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
    let began = Instant::now();
    daemon.stop();
    assert!(began.elapsed() < Duration::from_secs(10));
}
