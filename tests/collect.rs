//! The collector: the real program receives crafted datagrams and those of real exporters, and its records are read back.
#![allow(missing_docs)]

mod common;
#[cfg(feature = "bpf")]
#[path = "common/prog_run.rs"]
mod prog_run;

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::daemon::{Home, PROGRAM, run};
use common::disk::Disk;
use common::http::Client;
use common::net::{HERE4, HERE6, Hosts, NetNs, THERE4, THERE6};
use common::service::Service;
use common::wait_for;
use nix::sys::signal::Signal;
use serde_json::Value;

/// A datagram of NetFlow v5 with `records` records, whose first has the sequence number `sequence`.
fn v5(sequence: u32, records: u16) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(5u16.to_be_bytes());
    datagram.extend(records.to_be_bytes());
    let now = jiff::Timestamp::now();
    for word in [1_000_000, now.as_second() as u32, 0, sequence, 0] {
        datagram.extend(u32::to_be_bytes(word));
    }
    for n in 0..u32::from(records) {
        // Source, destination, next hop; interfaces.
        for word in [0xc000_0201, 0xc633_6400 + n, 0, 0x0001_0002] {
            datagram.extend(u32::to_be_bytes(word));
        }
        // Packets, bytes, first, last.
        for word in [10, sequence + n, 990_000, 999_000] {
            datagram.extend(u32::to_be_bytes(word));
        }
        datagram.extend(40_000u16.to_be_bytes());
        datagram.extend(443u16.to_be_bytes());
        // Padding, TCP flags, TCP, type of service; autonomous systems, masks, padding.
        datagram.extend([0, 0x1b, 6, 0, 0, 1, 0, 2, 24, 24, 0, 0]);
    }
    datagram
}

/// An IPFIX message of domain 7: its sets behind a header.
fn ipfix(sequence: u32, sets: &[Vec<u8>]) -> Vec<u8> {
    let length = 16 + sets.iter().map(Vec::len).sum::<usize>();
    let mut message = Vec::new();
    message.extend(10u16.to_be_bytes());
    message.extend((length as u16).to_be_bytes());
    for word in [jiff::Timestamp::now().as_second() as u32, sequence, 7] {
        message.extend(u32::to_be_bytes(word));
    }
    sets.iter().for_each(|set| message.extend(set));
    message
}

fn set(id: u16, content: &[u8]) -> Vec<u8> {
    let mut set = Vec::new();
    set.extend(id.to_be_bytes());
    set.extend((content.len() as u16 + 4).to_be_bytes());
    set.extend(content);
    set
}

/// Template 300: IPv6 addresses, ports, protocol, flow label, bytes, packets, start and end in milliseconds.
fn template() -> Vec<u8> {
    let fields = [
        (27, 16),
        (28, 16),
        (7, 2),
        (11, 2),
        (4, 1),
        (31, 4),
        (1, 8),
        (2, 8),
        (152, 8),
        (153, 8),
    ];
    let mut content = Vec::new();
    for word in [300, fields.len() as u16] {
        content.extend(u16::to_be_bytes(word));
    }
    for (element, length) in fields {
        content.extend(u16::to_be_bytes(element));
        content.extend(u16::to_be_bytes(length));
    }
    set(2, &content)
}

fn ipv6_record(label: u32, octets: u64) -> Vec<u8> {
    let mut record = Vec::new();
    for address in [HERE6, THERE6] {
        record.extend(address.parse::<std::net::Ipv6Addr>().unwrap().octets());
    }
    record.extend(40_001u16.to_be_bytes());
    record.extend(1094u16.to_be_bytes());
    record.push(6);
    record.extend(label.to_be_bytes());
    for number in [octets, 3, 1_790_000_000_000, 1_790_000_001_500] {
        record.extend(u64::to_be_bytes(number));
    }
    record
}

/// A socket that sends to the collector of the namespace, on loopback.
fn exporter(ns: &NetNs, to: &str) -> UdpSocket {
    let socket = ns.enter(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.connect(to).unwrap();
    socket
}

fn status(home: &Home) -> Value {
    let answer = Client::unix(&home.path("control.sock")).get("/status");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let status = answer.json();
    let number = |key: &str| status[key].as_u64().unwrap();
    assert_eq!(
        number("received"),
        number("stored") + number("filtered") + number("rejected"),
        "{status}"
    );
    status
}

/// The status, once `key` has reached `number`.
fn status_with(home: &Home, key: &str, number: u64) -> Value {
    wait_for(&format!("{key} {number}"), || {
        let status = status(home);
        (status[key].as_u64().unwrap() >= number).then_some(status)
    })
}

/// The stored records, as JSON.
fn records(path: &Path) -> Vec<Value> {
    let (code, out, err) = run(&["reader", "--json", path.to_str().unwrap()]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    out.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn segments(home: &Home) -> Vec<Value> {
    records(&home.path("segments"))
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const LISTEN: &str = "listen: ['127.0.0.1:2055']\n";
const TO: &str = "127.0.0.1:2055";

#[test]
#[ignore = "needs root: network namespaces"]
fn records_are_received_filtered_stored_and_read_back() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(&format!(
        "{LISTEN}filter: |\n  discard dst 198.51.100.3\n  accept tag 9 dst 198.51.100.4\n"
    ));
    let collector = home.start_collector(&ns);
    let exporter = exporter(&ns, TO);
    exporter.send(&v5(0, 10)).unwrap();
    // Two of IPFIX with the same template, and data in the same message.
    let label = 0x1004f;
    let data = [ipv6_record(label, 1500), ipv6_record(0, 7)].concat();
    exporter
        .send(&ipfix(0, &[template(), set(300, &data)]))
        .unwrap();
    // 5 flows are missing before this one.
    exporter.send(&v5(15, 1)).unwrap();
    // A set whose template nobody has sent, and what is no NetFlow at all.
    exporter.send(&ipfix(2, &[set(999, &[0; 40])])).unwrap();
    exporter.send(b"hello, world").unwrap();

    let status = status_with(&home, "received", 15);
    for (key, number) in [
        ("datagrams", 5),
        ("stored", 12),
        ("filtered", 1),
        ("rejected", 2),
        ("lost", 5),
        ("kernel-dropped", 0),
    ] {
        assert_eq!(status[key], number, "{key}: {status}");
    }
    let (code, shown, _) = run(&[
        "status",
        "--collector",
        "--socket",
        home.path("control.sock").to_str().unwrap(),
    ]);
    assert_eq!(code, 0);
    assert!(
        shown.contains("received 15 = stored 12 + filtered 1 + rejected 2\n"),
        "{shown}"
    );
    let (_, listed, _) = run(&[
        "exporters",
        "--socket",
        home.path("control.sock").to_str().unwrap(),
    ]);
    let lines: Vec<Vec<&str>> = listed
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(lines[1][..4], ["127.0.0.1", "0", "v5", "0"], "{listed}");
    assert_eq!(lines[2][..4], ["127.0.0.1", "7", "ipfix", "1"], "{listed}");
    let (_, rules, _) = run(&[
        "filter",
        "--socket",
        home.path("control.sock").to_str().unwrap(),
    ]);
    let rules: Vec<Vec<&str>> = rules
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(rules[1][1..4], ["13", "1", "1"], "{rules:?}");

    collector.stop();
    let stored = segments(&home);
    assert_eq!(stored.len(), 12);
    assert!(
        stored
            .iter()
            .all(|record| record["dst_addr"] != "198.51.100.3")
    );
    let tagged: Vec<&Value> = stored.iter().filter(|r| r["tag"] == 9).collect();
    assert_eq!(tagged.len(), 1);
    assert_eq!(tagged[0]["dst_addr"], "198.51.100.4");
    let labelled = stored
        .iter()
        .find(|r| r["ipv6_flow_label"] == label)
        .unwrap();
    assert_eq!(labelled["src_addr"], HERE6);
    assert_eq!(labelled["bytes"], 1500);
    assert!(
        home.log().contains("rejected: 127.0.0.1:"),
        "{}",
        home.log()
    );
}

/// The addresses of exporters are true, whatever family the socket before had.
#[test]
#[ignore = "needs root: network namespaces"]
fn exporters_of_both_families_are_told_apart() {
    let ns = NetNs::new("collect");
    ns.ip(&[
        "addr",
        "add",
        "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff/128",
        "dev",
        "lo",
    ]);
    let home = Home::with("");
    home.configure_collector("listen: ['127.0.0.1:2055', '[::1]:2055']\n");
    let collector = home.start_collector(&ns);
    let senders = ["127.0.0.1", "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff", "::1"];
    for round in 0..3 {
        for from in senders {
            let address: std::net::IpAddr = from.parse().unwrap();
            let socket = ns.enter(|| UdpSocket::bind((address, 0)).unwrap());
            let to = if address.is_ipv4() {
                "127.0.0.1"
            } else {
                "::1"
            };
            socket.send_to(&v5(0, 1), (to, 2055)).unwrap();
        }
        status_with(&home, "stored", 3 * (round + 1));
    }
    let listed = Client::unix(&home.path("control.sock"))
        .get("/exporters")
        .json();
    let listed = listed["exporters"].as_array().unwrap();
    let mut found: Vec<&str> = listed
        .iter()
        .map(|e| e["address"].as_str().unwrap())
        .collect();
    found.sort_unstable();
    let mut expected = senders;
    expected.sort_unstable();
    assert_eq!(found, expected);
    collector.stop();
}

/// A template of one byte makes 65,000 records of a datagram: on a disk that works, none is dropped for it.
#[test]
#[ignore = "needs root: network namespaces"]
fn datagrams_of_very_many_records_do_not_fill_the_memory() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(&format!("{LISTEN}limits: {{maxWaiting: 16MiB}}\n"));
    let collector = home.start_collector(&ns);
    let exporter = exporter(&ns, TO);
    let template = set(2, &[1, 0x96, 0, 1, 0, 1, 0, 1]);
    exporter.send(&ipfix(0, &[template])).unwrap();
    for n in 0..20 {
        exporter.send(&ipfix(n, &[set(406, &[7; 60_000])])).unwrap();
        exporter.send(&v5(n * 10, 10)).unwrap();
    }
    let status = status_with(&home, "datagrams", 41);
    assert_eq!(status["stored"], 20 * 60_000 + 200, "{status}");
    collector.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn djms_configuration_runs_as_it_is() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    let log = home.path("flows.log");
    fs::write(
        home.path("collector.cfg"),
        format!(
            "# A collector\nlogfile \"{}\"\npidfile \"{}\"\nlisten on 127.0.0.1:2055\nflow source 127.0.0.0/8\nstore ALL\n\
             net = \"198.51.100.4\"\ndiscard all\naccept tag 5 quick \\\n  dst $net\n",
            log.display(),
            home.path("pid").display(),
        ),
    )
    .unwrap();
    // The file cannot name a state directory: the default one is on a file system of its own.
    let mut command = ns.command("unshare");
    let mount = "mount -t tmpfs none /var/lib && mount -t tmpfs none /run && exec \"$@\"";
    command.args(["-m", "bash", "-c", mount, "bash", PROGRAM]);
    let collector = home.launch(
        command,
        "collect",
        "collector.cfg",
        &["-D", "net=198.51.100.5"],
    );
    let exporter = exporter(&ns, TO);
    exporter.send(&v5(0, 10)).unwrap();
    wait_for("a stored record", || {
        fs::metadata(&log).ok().filter(|f| f.len() > 0)
    });
    // Rotation as it was with djm's: mv, then USR1.
    let old = home.path("flows.old");
    fs::rename(&log, &old).unwrap();
    collector.signal(Signal::SIGUSR1);
    wait_for("a new file", || fs::metadata(&log).ok());
    exporter.send(&v5(10, 10)).unwrap();
    wait_for("a record in the new file", || {
        fs::metadata(&log).ok().filter(|f| f.len() > 0)
    });
    collector.stop();
    for path in [old, log] {
        let stored = records(&path);
        assert_eq!(stored.len(), 1, "{}", path.display());
        assert_eq!(stored[0]["dst_addr"], "198.51.100.5");
        assert_eq!(stored[0]["tag"], 5);
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_restart_keeps_the_templates_and_a_reload_the_sockets() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(LISTEN);
    let collector = home.start_collector(&ns);
    let exporter = exporter(&ns, TO);
    exporter.send(&ipfix(0, &[template()])).unwrap();
    exporter
        .send(&ipfix(0, &[set(300, &ipv6_record(1, 1))]))
        .unwrap();
    status_with(&home, "stored", 1);
    wait_for("the file of templates", || {
        fs::metadata(home.path("state/templates")).ok()
    });
    collector.kill();

    let collector = home.start_collector(&ns);
    exporter
        .send(&ipfix(1, &[set(300, &ipv6_record(1, 2))]))
        .unwrap();
    let restarted = status_with(&home, "received", 1);
    assert_eq!(restarted["stored"], 1, "{restarted}");

    // Another filter, another address more; a datagram in every millisecond of the reload.
    home.configure_collector(
        "listen: ['127.0.0.1:2055', '127.0.0.1:2056']\nfilter: discard tag 1 bytes = 77\nworkers: 1\n",
    );
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                exporter
                    .send(&ipfix(2 + sent, &[set(300, &ipv6_record(1, 3))]))
                    .unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_micros(500));
            }
            u64::from(sent)
        });
        for _ in 0..5 {
            collector.signal(Signal::SIGHUP);
            collector.expect_notice("READY=1");
        }
        stop.store(true, Ordering::Relaxed);
        sender.join().unwrap()
    });
    let reloaded = status_with(&home, "stored", 1 + sent);
    assert_eq!(reloaded["received"], 1 + sent, "{reloaded}");
    assert_eq!(reloaded["lost"], 0, "{reloaded}");
    let other = self::exporter(&ns, "127.0.0.1:2056");
    other
        .send(&ipfix(0, &[set(300, &ipv6_record(1, 77))]))
        .unwrap();
    status_with(&home, "filtered", 1);

    // A group that cannot be joined is refused, and the collector goes on.
    home.configure_collector(&format!(
        "{LISTEN}multicastGroups: [{{group: 239.1.1.1, interface: nosuch}}]\n"
    ));
    collector.signal(Signal::SIGHUP);
    home.wait_for_log("239.1.1.1 on nosuch (multicastGroups)");

    // A configuration that is wrong is refused, and changes nothing.
    home.configure_collector(&format!("{LISTEN}filter: discard nonsense\n"));
    collector.signal(Signal::SIGHUP);
    home.wait_for_log("the previous configuration stays in effect");
    other
        .send(&ipfix(1, &[set(300, &ipv6_record(1, 77))]))
        .unwrap();
    status_with(&home, "filtered", 2);
    collector.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn an_upgrade_under_load_loses_nothing() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(&format!("{LISTEN}workers: 2\n"));
    let mut service = Service::start(&home, &ns, "collect", "collector.cfg");
    let exporters: Vec<UdpSocket> = (0..4).map(|_| exporter(&ns, TO)).collect();
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                for exporter in &exporters {
                    exporter.send(&v5(sent * 10, 10)).unwrap();
                }
                sent += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            sent as usize * exporters.len() * 10
        });
        for _ in 0..3 {
            service.replace();
        }
        stop.store(true, Ordering::Relaxed);
        sender.join().unwrap()
    });
    wait_for("all records", || {
        (segments(&home).len() >= sent).then_some(())
    });
    assert_eq!(segments(&home).len(), sent);
}

/// Sends datagrams of v5 with 10 records each until `stop`, as fast as every `pause`. Returns the number of records.
fn send_until(stop: &AtomicBool, exporter: &UdpSocket, pause: Duration) -> u64 {
    let mut sent = 0;
    while !stop.load(Ordering::Relaxed) {
        exporter.send(&v5(sent, 10)).unwrap();
        sent += 10;
        std::thread::sleep(pause);
    }
    u64::from(sent)
}

#[test]
#[ignore = "needs root: network namespaces"]
fn after_a_kill_under_load_the_store_has_whole_records_and_goes_on() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(LISTEN);
    let exporter = exporter(&ns, TO);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        scope.spawn(|| {
            // The socket reports the ICMP error of a datagram that nobody received.
            while !stop.load(Ordering::Relaxed) {
                let _ = exporter.send(&v5(0, 10));
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        for _ in 0..5 {
            let collector = home.start_collector(&ns);
            let stored = status_with(&home, "stored", 1000)["stored"]
                .as_u64()
                .unwrap();
            let before = segments_of(&home).1;
            collector.kill();
            // What was reported as stored is there; nothing is damaged but, at most, the end of the last file.
            let (kept, after) = segments_of(&home);
            assert!(
                after.len() as u64 >= stored && after.len() >= before.len(),
                "{kept}"
            );
        }
    });
    let collector = home.start_collector(&ns);
    collector.stop();
    let (damage, records) = segments_of(&home);
    assert_eq!(damage, "");
    assert!(records.len() >= 5000);
}

/// What the reader says of damage, and the records.
fn segments_of(home: &Home) -> (String, Vec<String>) {
    let segments = home.path("segments");
    let (_, out, err) = run(&["reader", "--json", segments.to_str().unwrap()]);
    (err, out.lines().map(str::to_owned).collect())
}

#[test]
#[ignore = "needs root: network namespaces, a file system"]
fn a_full_disk_costs_only_what_does_not_fit_in_memory_and_all_of_it_is_counted() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    let segments = home.path("segments");
    let _disk = Disk::mount(&segments, "1m");
    home.configure_collector(&format!(
        "{LISTEN}store: {{directory: {}}}\nlimits: {{maxWaiting: 1MiB}}\n",
        segments.display()
    ));
    let collector = home.start_collector(&ns);
    let exporter = exporter(&ns, TO);
    let mut sent = 0;
    let mut send_until = |done: &dyn Fn(&Value) -> bool| {
        wait_for("the status", || {
            for _ in 0..20 {
                exporter.send(&v5(sent, 30)).unwrap();
                sent += 30;
                std::thread::sleep(Duration::from_micros(200));
            }
            let status = status(&home);
            done(&status).then_some(status)
        })
    };
    let full = send_until(&|status| status["reasons"]["store_full"].as_u64() > Some(0));
    assert!(
        full["store-error"]
            .as_str()
            .unwrap()
            .contains("No space left on device"),
        "{full}"
    );
    assert!(full["waiting"].as_u64().unwrap() > 0, "{full}");
    home.wait_for_log("No space left on device");

    // Room again: what waits is written.
    let oldest = fs::read_dir(&segments)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let copy = home.path("copy");
    fs::copy(&oldest, &copy).unwrap();
    fs::remove_file(&oldest).unwrap();
    let written = wait_for("everything written", || {
        let status = status(&home);
        let is_written = status["waiting"] == 0 && status["store-error"].is_null();
        // What was dropped is counted once a second.
        (is_written && status["received"] == sent).then_some(status)
    });
    home.wait_for_log("writing works again");
    collector.stop();
    let stored = records(&copy).len() + self::segments(&home).len();
    assert_eq!(written["stored"], stored, "{written}");
    assert_eq!(
        written["reasons"]["store_full"].as_u64().unwrap() + stored as u64,
        u64::from(sent)
    );
}

#[test]
#[ignore = "needs root: network namespaces"]
fn rotation_under_load_loses_nothing_and_a_directory_that_vanishes_comes_back() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(&format!(
        "{LISTEN}store: {{directory: {}, rotate: {{interval: 1s, size: 16KiB}}}}\n",
        home.path("segments").display()
    ));
    let collector = home.start_collector(&ns);
    let exporter = exporter(&ns, TO);
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        let _stop = SetOnDrop(&stop);
        let sender = scope.spawn(|| send_until(&stop, &exporter, Duration::from_millis(1)));
        wait_for("ten segments", || {
            (fs::read_dir(home.path("segments")).unwrap().count() >= 10).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
        sender.join().unwrap()
    });
    status_with(&home, "stored", sent);
    assert_eq!(segments(&home).len() as u64, sent);

    fs::rename(home.path("segments"), home.path("elsewhere")).unwrap();
    exporter.send(&v5(sent as u32, 10)).unwrap();
    status_with(&home, "stored", sent + 10);
    wait_for("the new directory", || {
        exporter.send(&v5(0, 10)).unwrap();
        let found = fs::read_dir(home.path("segments")).ok()?;
        (found.count() > 0).then_some(())
    });
    collector.stop();
    let lost = status_of_log(&home);
    let stored = records(&home.path("elsewhere")).len() + segments(&home).len();
    assert!(
        lost.contains(&format!("stored {stored} ")),
        "{stored}: {lost}"
    );
}

/// The last line of the log with the accounts.
fn status_of_log(home: &Home) -> String {
    let log = home.log();
    let line = log.lines().rev().find(|line| line.contains("= stored"));
    line.unwrap_or_else(|| panic!("{log}")).to_owned()
}

/// The program stays small whoever sends it templates.
#[test]
#[ignore = "needs root: network namespaces, raw sockets"]
fn a_flood_of_templates_from_spoofed_sources_does_not_grow_the_memory() {
    const SOURCES: u32 = 200_000;
    let hosts = Hosts::new();
    let home = Home::with("");
    home.configure_collector("listen: ['[::]:2055']\n");
    let collector = home.start_collector(&hosts.here);
    let resident = || {
        let status = fs::read_to_string(format!("/proc/{}/status", collector.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap();
        line.split_whitespace()
            .nth(1)
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let idle = resident();
    let to = format!("[{HERE6}]:2055").parse().unwrap();
    let mut sender = hosts
        .there
        .enter(|| flowd_rs::sys::raw_udp::RawSender::open().unwrap());
    let message = ipfix(0, &[template()]);
    for n in 0..SOURCES {
        let mut from: std::net::Ipv6Addr = "2001:db8:1::".parse().unwrap();
        from = (u128::from(from) + u128::from(n)).into();
        while sender.send(&message, (from, 4739).into(), to).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if n % 64 == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let status = wait_for("the last of them", || {
        let before = status(&home);
        std::thread::sleep(Duration::from_millis(200));
        (status(&home)["datagrams"] == before["datagrams"]).then_some(before)
    });
    // The kernel may drop many: the sender is faster.
    assert!(status["datagrams"].as_u64().unwrap() > 20_000, "{status}");
    let grown = resident().saturating_sub(idle);
    assert!(grown < 64 << 10, "{grown} KiB");

    // One that is honest is served nevertheless.
    let honest = hosts.there.enter(|| UdpSocket::bind((THERE6, 0)).unwrap());
    honest.connect((HERE6, 2055)).unwrap();
    honest
        .send(&ipfix(0, &[template(), set(300, &ipv6_record(5, 99))]))
        .unwrap();
    status_with(&home, "stored", 1);
    collector.stop();
}

/// Sets a flag when dropped, also if the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The records of `softflowd` for one TCP transfer between the hosts.
fn softflowd(version: &str, to: &str, port: u16) -> Vec<Value> {
    let hosts = Hosts::new();
    let home = Home::with("");
    home.configure_collector(LISTEN);
    let collector = home.start_collector(&hosts.here);
    let mut probe = hosts.here.command("softflowd");
    let path = |name: &str| home.path(name).display().to_string();
    let probe = probe
        .args([
            "-D",
            "-i",
            "veth0",
            "-v",
            version,
            "-n",
            TO,
            "-t",
            "expint=1",
            "-t",
            "tcp.fin=1",
        ])
        .args([
            "-t",
            "general=1",
            "-t",
            "tcp=1",
            "-t",
            "udp=1",
            "-t",
            "maxlife=5",
        ])
        .args(["-p", &path("softflowd.pid"), "-c", &path("softflowd.ctl")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("softflowd is installed");
    let _probe = Killed(probe);
    wait_for("softflowd", || {
        fs::metadata(home.path("softflowd.ctl")).ok()
    });
    let listener = hosts
        .there
        .enter(|| std::net::TcpListener::bind((to, port)).unwrap());
    // In IPFIX, softflowd tells when it was started only after the first records, whose times are not known.
    let is_of_transfer = |record: &Value| {
        let is_of_port = record["src_port"] == port || record["dst_port"] == port;
        is_of_port && record["time_flow_start_ns"].is_number()
    };
    let found = wait_for("both directions of the transfer", || {
        // softflowd may not have opened the interface yet: a transfer in every round.
        let mut stream = hosts
            .here
            .enter(|| std::net::TcpStream::connect((to, port)).unwrap());
        std::io::Write::write_all(&mut stream, &[0; 50_000]).unwrap();
        drop(stream);
        let (mut other, _) = listener.accept().unwrap();
        std::io::copy(&mut other, &mut std::io::sink()).unwrap();
        drop(other);
        std::thread::sleep(Duration::from_millis(200));
        let mut found = segments(&home);
        found.retain(is_of_transfer);
        let out = found
            .iter()
            .any(|r| r["dst_port"] == port && r["bytes"].as_u64() > Some(50_000));
        let back = found.iter().any(|r| r["src_port"] == port);
        (out && back).then_some(found)
    });
    let status = status(&home);
    assert_eq!(status["rejected"], 0, "{status}");
    assert_eq!(status["lost"], 0, "{status}");
    collector.stop();
    found
}

/// Times are those of the last minute, and in order.
fn assert_times_are_recent(record: &Value) {
    let now = jiff::Timestamp::now().as_nanosecond() as f64;
    let [start, end] = ["time_flow_start_ns", "time_flow_end_ns"].map(|key| {
        record[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{key}: {record}"))
    });
    assert!(
        start <= end && now - end < 60e9 && end < now + 2e9,
        "{record}"
    );
}

#[test]
#[ignore = "needs root: network namespaces"]
fn softflowd_exports_ipv4_in_every_version() {
    for (version, protocol) in [
        ("1", "NETFLOW_V1"),
        ("5", "NETFLOW_V5"),
        ("9", "NETFLOW_V9"),
        ("10", "IPFIX"),
    ] {
        let found = softflowd(version, THERE4, 5001);
        let out = found.iter().find(|r| r["dst_port"] == 5001).unwrap();
        assert_eq!(out["src_addr"], HERE4, "{out}");
        assert_eq!(out["dst_addr"], THERE4, "{out}");
        assert_eq!(out["proto"], 6, "{out}");
        assert_eq!(out["type"], protocol, "{out}");
        assert_times_are_recent(out);
    }
}

#[test]
#[ignore = "needs root: network namespaces"]
fn softflowd_exports_ipv6() {
    for version in ["9", "10"] {
        let found = softflowd(version, THERE6, 5002);
        let back = found.iter().find(|r| r["src_port"] == 5002).unwrap();
        assert_eq!(back["src_addr"], THERE6, "{back}");
        assert_eq!(back["dst_addr"], HERE6, "{back}");
        assert_times_are_recent(back);
    }
}

/// The records of an exporter that watches `veth0`, of a transfer to port 5003 of the other host.
fn probed(start: impl Fn(&Hosts, &Home) -> Child) -> Vec<Value> {
    let hosts = Hosts::new();
    let home = Home::with("");
    home.configure_collector(LISTEN);
    let collector = home.start_collector(&hosts.here);
    let _probe = Killed(start(&hosts, &home));
    let listener = hosts
        .there
        .enter(|| std::net::TcpListener::bind((THERE4, 5003)).unwrap());
    let found = wait_for("a record of the transfer", || {
        transfer(&hosts, &listener, (THERE4, 5003));
        std::thread::sleep(Duration::from_millis(200));
        let mut found = segments(&home);
        found.retain(|r| r["dst_port"] == 5003 && r["bytes"].as_u64() > Some(50_000));
        (!found.is_empty()).then_some(found)
    });
    assert_eq!(status(&home)["rejected"], 0, "{}", status(&home));
    collector.stop();
    found
}

fn transfer(hosts: &Hosts, listener: &std::net::TcpListener, to: (&str, u16)) {
    let mut stream = hosts
        .here
        .enter(|| std::net::TcpStream::connect(to).unwrap());
    std::io::Write::write_all(&mut stream, &[0; 50_000]).unwrap();
    drop(stream);
    let (mut other, _) = listener.accept().unwrap();
    std::io::copy(&mut other, &mut std::io::sink()).unwrap();
}

/// The record has the addresses of both hosts, and times of the last minute.
fn assert_goes_out(out: &Value) {
    assert_eq!(
        (&out["src_addr"], &out["dst_addr"]),
        (&HERE4.into(), &THERE4.into()),
        "{out}"
    );
    assert_times_are_recent(out);
}

fn quietly(command: &mut Command) -> Child {
    let name = command.get_program().to_owned();
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("{name:?}: {e}"))
}

#[test]
#[ignore = "needs root: network namespaces"]
fn fprobe_exports_v5() {
    let found = probed(|hosts, _| {
        let mut fprobe = hosts.here.command("fprobe");
        // In the foreground: -l 2; flows are sent after a second.
        quietly(fprobe.args([
            "-i", "veth0", "-f", "tcp", "-l", "2", "-s", "1", "-d", "1", "-e", "1", TO,
        ]))
    });
    assert_goes_out(&found[0]);
}

#[test]
#[ignore = "needs root: network namespaces"]
fn pmacctd_exports_v9_and_ipfix() {
    for version in ["9", "10"] {
        let found = probed(|hosts, home| {
            let config = home.path("pmacctd.conf");
            fs::write(
                &config,
                format!(
                    "daemonize: false\npcap_interface: veth0\naggregate: src_host, dst_host, src_port, dst_port, proto, tos, tcpflags\n\
                     plugins: nfprobe\nnfprobe_receiver: {TO}\nnfprobe_version: {version}\n\
                     nfprobe_timeouts: tcp=1:tcp.rst=1:tcp.fin=1:general=1:maxlife=5:expint=1\n"
                ),
            )
            .unwrap();
            let mut pmacctd = hosts.here.command("pmacctd");
            quietly(pmacctd.arg("-f").arg(config))
        });
        assert_goes_out(&found[0]);
    }
}

/// What is forwarded to nfcapd is what arrived, and comes back from its file by nfreplay.
#[test]
#[ignore = "needs root: network namespaces"]
fn datagrams_are_forwarded_as_they_came_and_nfreplay_sends_them_again() {
    let ns = NetNs::new("collect");
    let home = Home::with("");
    home.configure_collector(&format!(
        "{LISTEN}forward: [{{address: 127.0.0.1, port: 9995, spoofSource: true}}]\n"
    ));
    let flows = home.path("nfcapd");
    fs::create_dir(&flows).unwrap();
    let mut nfcapd = ns.command("nfcapd");
    let nfcapd = quietly(
        nfcapd
            .args(["-b", "127.0.0.1", "-p", "9995", "-t", "3600", "-w"])
            .arg(&flows),
    );
    let mut nfcapd = Killed(nfcapd);
    let is_bound = || {
        let sockets = ns.command("cat").arg("/proc/net/udp").output().unwrap();
        String::from_utf8_lossy(&sockets.stdout)
            .contains(":270B ")
            .then_some(())
    };
    wait_for("nfcapd", is_bound);
    let collector = home.start_collector(&ns);
    // The exporter's address is kept: nfcapd files the records under it.
    ns.ip(&["addr", "add", "127.0.0.77/8", "dev", "lo"]);
    let exporter = ns.enter(|| UdpSocket::bind("127.0.0.77:4444").unwrap());
    exporter.connect(TO).unwrap();
    exporter.send(&v5(0, 10)).unwrap();
    let sent = status_with(&home, "forwarded", 1);
    assert_eq!(sent["forward-failed"], 0, "{sent}");
    status_with(&home, "stored", 10);
    let nfdump = |what: &[&str]| {
        let output = Command::new("nfdump")
            .arg("-R")
            .arg(&flows)
            .args(what)
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    std::thread::sleep(Duration::from_millis(200));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(nfcapd.0.id() as i32),
        Signal::SIGTERM,
    )
    .unwrap();
    nfcapd.0.wait().unwrap();
    let listed = nfdump(&["-q", "-o", "fmt:%ra %sa %da %byt"]);
    assert_eq!(
        listed
            .lines()
            .filter(|line| line.contains("127.0.0.77"))
            .count(),
        10,
        "{listed}"
    );

    let file = fs::read_dir(&flows).unwrap().map(|e| e.unwrap().path());
    let file = file.into_iter().find(|p| !p.ends_with(".nfstat")).unwrap();
    let mut nfreplay = ns.command("nfreplay");
    let status = nfreplay
        .args(["-H", "127.0.0.1", "-p", "2055", "-v", "9", "-r"])
        .arg(file)
        .status();
    assert!(status.unwrap().success());
    status_with(&home, "stored", 20);
    collector.stop();
    let mut stored = segments(&home);
    stored.sort_by_key(|r| {
        (
            r["dst_addr"].as_str().unwrap().to_owned(),
            r["received"].to_string(),
        )
    });
    for pair in stored.chunks(2) {
        for key in [
            "src_addr",
            "dst_addr",
            "src_port",
            "dst_port",
            "proto",
            "bytes",
            "packets",
            "tcp_flags",
        ] {
            assert_eq!(pair[0][key], pair[1][key], "{key}: {pair:?}");
        }
    }
}

/// Open vSwitch between two hosts, in a namespace of its own, with the collector beside it.
#[cfg(feature = "bpf")]
struct Switch {
    ns: NetNs,
    left: NetNs,
    right: NetNs,
    _daemons: [Killed; 2],
}

#[cfg(feature = "bpf")]
impl Switch {
    fn new(home: &Home) -> Switch {
        let [ns, left, right] = ["switch", "left", "right"].map(NetNs::new);
        for (host, port, address) in [(&left, "to-left", HERE6), (&right, "to-right", THERE6)] {
            ns.ip(&[
                "link", "add", port, "type", "veth", "peer", "name", "veth0", "netns", &host.name,
            ]);
            ns.ip(&["link", "set", port, "up"]);
            host.ip(&[
                "addr",
                "add",
                &format!("{address}/64"),
                "dev",
                "veth0",
                "nodad",
            ]);
            host.ip(&["link", "set", "veth0", "up"]);
            // The switch in user space does not complete checksums.
            let mut ethtool = host.command("ethtool");
            assert!(
                quietly(ethtool.args(["-K", "veth0", "tx", "off"]))
                    .wait()
                    .unwrap()
                    .success()
            );
        }
        let path = |name: &str| home.path(name).display().to_string();
        let database = format!("unix:{}", path("db.sock"));
        let mut tool = Command::new("ovsdb-tool");
        let tool = tool.args([
            "create",
            &path("conf.db"),
            "/usr/share/openvswitch/vswitch.ovsschema",
        ]);
        assert!(
            tool.status()
                .expect("ovsdb-tool (openvswitch-switch) is installed")
                .success()
        );
        let mut server = ns.command("ovsdb-server");
        let server = quietly(server.args([
            &path("conf.db"),
            &format!("--remote=p{database}"),
            &format!("--unixctl={}", path("db.ctl")),
            &format!("--pidfile={}", path("db.pid")),
        ]));
        wait_for("the database", || fs::metadata(home.path("db.sock")).ok());
        let mut daemon = ns.command("ovs-vswitchd");
        let daemon = quietly(daemon.args([
            &database,
            &format!("--unixctl={}", path("vswitchd.ctl")),
            &format!("--pidfile={}", path("vswitchd.pid")),
        ]));
        let switch = Switch {
            ns,
            left,
            right,
            _daemons: [Killed(daemon), Killed(server)],
        };
        let mut control = switch.ns.command("ovs-vsctl");
        let control = control.arg(format!("--db={database}")).args([
            "--timeout=20",
            "add-br",
            "br0",
            "--",
            "set",
            "bridge",
            "br0",
            "datapath_type=netdev",
            "--",
            "add-port",
            "br0",
            "to-left",
            "--",
            "add-port",
            "br0",
            "to-right",
            "--",
            "set",
            "bridge",
            "br0",
            "ipfix=@ipfix",
            "--",
            "--id=@ipfix",
            "create",
            "ipfix",
            "targets=\"127.0.0.1:2055\"",
            "obs_domain_id=5",
            "obs_point_id=1",
            "sampling=1",
            "cache_active_timeout=1",
            "cache_max_flows=1000",
        ]);
        let output = control.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        switch
    }
}

/// The marker writes a label, a switch that knows nothing of SciTags exports it, and the collector stores it.
#[test]
#[cfg(feature = "bpf")]
#[ignore = "needs root: network namespaces, eBPF, Open vSwitch"]
fn open_vswitch_exports_the_label_that_the_marker_wrote() {
    let home = Home::with("");
    let switch = Switch::new(&home);
    home.configure_collector(LISTEN);
    let collector = home.start_collector(&switch.ns);
    let pinned = prog_run::BpfFs::new();
    let marking = Home::with(&format!(
        "backends:\n  marker: {{targetInterfaces: [veth0], bpfFsPath: {}}}\n",
        pinned.path().display()
    ));
    let marker = marking.start(&switch.left);
    let listener = switch
        .right
        .enter(|| std::net::TcpListener::bind((THERE6, 1094)).unwrap());
    // The port is told before the connection, so that every packet of the flow is marked.
    let line = |state: &str, port: u16| format!("{state} tcp {HERE6} {port} {THERE6} 1094 2 9\n");
    // The switch exports a flow a second or more after its packets: labels by port.
    let (mut port, mut labels) = (41_000, std::collections::HashMap::new());
    let found = wait_for("a record with the label", || {
        port += 1;
        marking.write(&line("start", port));
        let flow = wait_for("the flow", || {
            let flows = Client::unix(&marking.path("control.sock"))
                .get("/flows")
                .json();
            flows["flows"]
                .as_array()?
                .iter()
                .find(|f| f["src-port"] == port)
                .cloned()
        });
        labels.insert(u64::from(port), flow["label"].clone());
        switch.left.enter(|| {
            let mut stream = connect_from(port);
            std::io::Write::write_all(&mut stream, &[0; 20_000]).unwrap();
        });
        let (mut other, _) = listener.accept().unwrap();
        std::io::copy(&mut other, &mut std::io::sink()).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        segments(&home).into_iter().find(|r| {
            let label = r["src_port"].as_u64().and_then(|port| labels.get(&port));
            r["dst_port"] == 1094 && label.is_some_and(|label| r["ipv6_flow_label"] == *label)
        })
    });
    assert_eq!(found["src_addr"], HERE6, "{found}");
    assert_eq!(found["observation_domain_id"], 5, "{found}");
    assert_times_are_recent(&found);
    let listed = Client::unix(&home.path("control.sock"))
        .get("/exporters")
        .json();
    let mut exporters = listed["exporters"].as_array().unwrap().iter();
    let exporter = exporters.find(|exporter| exporter["domain"] == 5).unwrap();
    assert_eq!(exporter["protocol"], "ipfix", "{listed}");
    assert!(exporter["templates"].as_u64().unwrap() > 50, "{listed}");
    assert_eq!(status(&home)["rejected"], 0, "{}", status(&home));
    marker.stop();
    collector.stop();
}

/// A connection from this port of the left host to the right one.
#[cfg(feature = "bpf")]
fn connect_from(port: u16) -> std::net::TcpStream {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn6, bind, connect, socket};
    use std::os::fd::AsRawFd;
    let address = |host: &str, port| -> SockaddrIn6 {
        std::net::SocketAddrV6::new(host.parse().unwrap(), port, 0, 0).into()
    };
    let family = AddressFamily::Inet6;
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(socket.as_raw_fd(), &address(HERE6, port)).unwrap();
    connect(socket.as_raw_fd(), &address(THERE6, 1094)).unwrap();
    socket.into()
}
