//! Packet marking compared with its limits: an empty BPF program, an unmarked transfer. Needs root.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/prog_run.rs"]
mod prog_run;

use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::daemon::{Home, lines};
use common::net::Hosts;
use common::wait_for;
use common::wire::Wire;
use flowd_rs::flow::{Flow, Protocol, Tag};
use flowd_rs::scitag;
use flowd_rs::scitag::Strategy;
use flowd_rs::sys::mark_maps::{Key, Maps, Mark};
use flowd_rs::sys::marker::Program;
use libbpf_rs::ObjectBuilder;
use prog_run::{BpfFs, run, settings};

const TAG: Tag = Tag {
    experiment: 2,
    activity: 9,
};

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the marker bench needs root, for eBPF and network namespaces");
        std::process::exit(1);
    }
    println!("| measurement | result | baseline | ratio |");
    println!("| --- | --- | --- | --- |");
    per_packet();
    map_updates();
    latency();
    throughput();
}

fn row(measurement: &str, result: &str, baseline: &str, ratio: &str) {
    println!("| {measurement} | {result} | {baseline} | {ratio} |");
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A tc program that returns at once.
fn empty_program() -> OwnedFd {
    let object = include_bytes!(concat!(env!("OUT_DIR"), "/empty.bpf.o"));
    let object = ObjectBuilder::default()
        .open_memory(object)
        .unwrap()
        .load()
        .unwrap();
    let program = object.progs().next().unwrap();
    program.as_fd().try_clone_to_owned().unwrap()
}

fn flow(n: u32) -> Flow {
    let source = (
        std::net::Ipv6Addr::from(0x2001_0db8_u128 << 96 | u128::from(n >> 15)).into(),
        1 + (n & 0x7fff) as u16,
    );
    let destination = (
        std::net::Ipv6Addr::from(0x2001_0db8_u128 << 96 | 2 << 64).into(),
        443,
    );
    Flow::new(Protocol::Tcp, source, destination).unwrap()
}

fn mark() -> Mark {
    Mark {
        label: scitag::label(TAG),
        tag: TAG,
        ..Mark::default()
    }
}

fn frame(flow: &Flow) -> Vec<u8> {
    let octets = |address| match address {
        std::net::IpAddr::V6(address) => std::net::Ipv6Addr::octets(&address),
        std::net::IpAddr::V4(_) => unreachable!("flow() returns IPv6 flows"),
    };
    let mut frame = vec![
        2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 100, 6, 64,
    ];
    frame.extend_from_slice(&octets(flow.source.address));
    frame.extend_from_slice(&octets(flow.destination.address));
    frame.extend_from_slice(&flow.source.port.to_be_bytes());
    frame.extend_from_slice(&flow.destination.port.to_be_bytes());
    frame.resize(14 + 40 + 100, 0);
    frame
}

fn per_packet() {
    const REPEAT: i32 = 1_000_000;
    const ROUNDS: usize = 7;
    let bpffs = BpfFs::new();
    let program = Program::load(&settings(&bpffs, Strategy::Label), 200_000, &[7; 16]).unwrap();
    let empty = empty_program();
    let nanoseconds =
        |program: &OwnedFd, frame: &[u8]| run(program, frame, REPEAT).duration.as_nanos() as f64;
    let (hit, miss) = (frame(&flow(5)), frame(&flow(900_000)));
    let mut entered = 0;
    for count in [10, 100_000] {
        for n in entered..count {
            program
                .maps
                .enter(&Key::new(&flow(n)).unwrap(), mark())
                .unwrap();
        }
        entered = count;
        let [mut base, mut hits, mut misses] = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            base.push(nanoseconds(&empty, &hit));
            hits.push(nanoseconds(program.programs()[0], &hit));
            misses.push(nanoseconds(program.programs()[0], &miss));
        }
        let base = median(base);
        for (lookup, times) in [("hit", hits), ("miss", misses)] {
            let net = median(times) - base;
            row(
                &format!("per packet, {lookup}, {count} flows in the map"),
                &format!("{net:.0} ns net"),
                &format!("empty program {base:.0} ns"),
                "",
            );
        }
    }
}

fn map_updates() {
    const COUNT: u32 = 100_000;
    let mut rates = Vec::new();
    for _ in 0..5 {
        let bpffs = BpfFs::new();
        let program =
            Program::load(&settings(&bpffs, Strategy::Label), COUNT as usize, &[7; 16]).unwrap();
        let keys: Vec<Key> = (0..COUNT).map(|n| Key::new(&flow(n)).unwrap()).collect();
        let began = Instant::now();
        for key in &keys {
            program.maps.enter(key, mark()).unwrap();
        }
        rates.push(f64::from(COUNT) / began.elapsed().as_secs_f64());
    }
    row(
        "map updates, 100,000 single ones",
        &format!("{:.0}/s", median(rates)),
        "",
        "",
    );
    // The same through the pipe and the daemon.
    let hosts = Hosts::new();
    let mut rates = Vec::new();
    for _ in 0..5 {
        let bpffs = BpfFs::new();
        let home = marker_home(&bpffs, "label");
        let daemon = home.start(&hosts.here);
        let text = lines("start", 0..COUNT as usize, "2 9");
        let maps = Maps::pinned(bpffs.path()).unwrap().unwrap();
        let last = Key::new(&line_flow(COUNT as usize - 1)).unwrap();
        let began = Instant::now();
        home.write(&text);
        while maps.get(&last).is_none() {
            std::thread::sleep(Duration::from_micros(200));
        }
        rates.push(f64::from(COUNT) / began.elapsed().as_secs_f64());
        daemon.stop();
    }
    row(
        "starts, pipe to map, 100,000 as fast as possible",
        &format!("{:.0}/s", median(rates)),
        "",
        "",
    );
}

/// The flow of line `n` of [`common::daemon::line`].
fn line_flow(n: usize) -> Flow {
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let source = (ip("2001:db8::1"), (1 + n % 60_000) as u16);
    Flow::new(
        Protocol::Tcp,
        source,
        (ip("2001:db8::2"), (1000 + n / 60_000) as u16),
    )
    .unwrap()
}

fn marker_home(bpffs: &BpfFs, strategy: &str) -> Home {
    let path = bpffs.path().display();
    Home::with(&format!(
        "backends:\n  marker: {{bpfFsPath: {path}, targetInterfaces: [veth0], markingStrategy: {strategy}}}\n"
    ))
}

fn latency() {
    const SAMPLES: usize = 1000;
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = marker_home(&bpffs, "label");
    let daemon = home.start(&hosts.here);
    let maps = Maps::pinned(bpffs.path()).unwrap().unwrap();
    let mut writer = home.writer();
    let mut samples = Vec::new();
    for n in 0..SAMPLES {
        std::thread::sleep(Duration::from_millis(1));
        let (line, key) = (
            lines("start", n..n + 1, "2 9"),
            Key::new(&line_flow(n)).unwrap(),
        );
        let began = Instant::now();
        std::io::Write::write_all(&mut writer, line.as_bytes()).unwrap();
        while maps.get(&key).is_none() {
            std::hint::spin_loop();
        }
        samples.push(began.elapsed().as_secs_f64() * 1e6);
    }
    samples.sort_by(f64::total_cmp);
    row(
        "single line, write to map, median",
        &format!("{:.0} µs", samples[SAMPLES / 2]),
        "flowd-go 142 µs",
        "",
    );
    row(
        "single line, write to map, 99th percentile",
        &format!("{:.0} µs", samples[SAMPLES * 99 / 100]),
        "flowd-go 3300 µs",
        "",
    );

    // Until the first marked packet: datagrams are sent continuously after the write.
    let socket = hosts
        .here
        .enter(|| std::net::UdpSocket::bind("[2001:db8::1]:9").unwrap());
    let mut samples = Vec::new();
    for n in 0..200u16 {
        let port = 2000 + n;
        let wire = Wire::listen(&hosts);
        let began = Instant::now();
        let line = format!("start udp 2001:db8::1 9 2001:db8::2 {port} 2 9\n");
        std::io::Write::write_all(&mut writer, line.as_bytes()).unwrap();
        let mut sent = Vec::new();
        while sent.len() < 400 && began.elapsed() < Duration::from_millis(3) {
            socket.send_to(b"x", ("2001:db8::2", port)).unwrap();
            sent.push(began.elapsed().as_secs_f64() * 1e6);
        }
        let frames = wire.frames(sent.len(), |f| {
            f.source_port == 9 && f.destination_port == port
        });
        if let Some(first) = frames
            .iter()
            .position(|f| scitag::from_label(f.label) == TAG)
        {
            samples.push(sent[first]);
        }
    }
    samples.sort_by(f64::total_cmp);
    let at = |share: usize| samples[(samples.len() - 1) * share / 100];
    row(
        "single line, write to first marked packet, median",
        &format!("{:.0} µs", at(50)),
        "",
        "",
    );
    row(
        "single line, write to first marked packet, 99th percentile",
        &format!("{:.0} µs", at(99)),
        "",
        "",
    );
    daemon.stop();
}

/// Gb/s of iperf3 over the veth for one second, with offloads.
fn iperf3(hosts: &Hosts) -> f64 {
    let mut server = hosts.there.command("iperf3");
    let mut server = server
        .args(["-s", "-1", "-B", "2001:db8::2"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the iperf3 server", || {
        let sockets = hosts
            .there
            .enter(|| std::fs::read_to_string("/proc/thread-self/net/tcp6").unwrap());
        sockets.contains(":1451 ").then_some(())
    });
    let mut client = hosts.here.command("timeout");
    client.args([
        "20",
        "iperf3",
        "-6",
        "-c",
        "2001:db8::2",
        "--cport",
        "40001",
        "-t",
        "1",
        "-J",
    ]);
    let output = client.stdin(Stdio::null()).output().unwrap();
    let _ = server.kill();
    server.wait().unwrap();
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    result["end"]["sum_received"]["bits_per_second"]
        .as_f64()
        .unwrap_or(0.0)
        / 1e9
}

fn throughput() {
    const ROUNDS: usize = 5;
    let hosts = Hosts::new();
    let transfer = |strategy: Option<(&str, bool)>| {
        let Some((strategy, known)) = strategy else {
            return iperf3(&hosts);
        };
        let bpffs = BpfFs::new();
        let home = marker_home(&bpffs, strategy);
        let daemon = home.start(&hosts.here);
        if known {
            home.write("start tcp 2001:db8::1 40001 2001:db8::2 5201 2 9\n");
            daemon.expect_status("backend_events marker entered 1");
        }
        let rate = iperf3(&hosts);
        daemon.stop();
        rate
    };
    let cases = [
        ("program loaded, flow unknown", Some(("label", false))),
        ("label", Some(("label", true))),
        ("hopByHop", Some(("hopByHop", true))),
        ("destination", Some(("destination", true))),
        ("hopByHopDestination", Some(("hopByHopDestination", true))),
    ];
    let mut bare = Vec::new();
    let mut marked = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        bare.push(transfer(None));
        for (results, (_, strategy)) in marked.iter_mut().zip(cases) {
            results.push(transfer(strategy));
        }
    }
    let limit = median(bare.clone());
    for (results, (name, _)) in marked.iter().zip(cases) {
        let ratio = median(
            results
                .iter()
                .zip(&bare)
                .map(|(marked, bare)| marked / bare)
                .collect(),
        );
        row(
            &format!("iperf3, one stream, {name}"),
            &format!("{:.1} Gb/s", median(results.clone())),
            &format!("no program {limit:.1} Gb/s"),
            &format!("{ratio:.2}"),
        );
    }
}
