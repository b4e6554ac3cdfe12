//! Packet marking compared with its limits: an empty BPF program, an unmarked transfer. Needs root.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/prog_run.rs"]
mod prog_run;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::daemon::{Home, lines};
use common::net::Hosts;
use common::wait_for;
use common::wire::Wire;
use flowd_rs::flow::{Flow, Protocol, Tag};
use flowd_rs::scitag;
use flowd_rs::scitag::Strategy;
use flowd_rs::sys::interfaces;
use flowd_rs::sys::mark_maps::{Key, Maps, Mark};
use flowd_rs::sys::marker::Program;
use libbpf_rs::{MapCore, TC_EGRESS, TcHookBuilder};
use prog_run::{BpfFs, empty_program, load, run, settings, writer};

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
    per_tcp_packet();
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

/// The headers of a TCP packet, as the kernel sends them: its payload is in fragments.
fn frame(flow: &Flow) -> Vec<u8> {
    let octets = |address| match address {
        std::net::IpAddr::V6(address) => std::net::Ipv6Addr::octets(&address),
        std::net::IpAddr::V4(_) => unreachable!("flow() returns IPv6 flows"),
    };
    let mut frame = vec![
        2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 6, 64,
    ];
    frame.extend_from_slice(&octets(flow.source.address));
    frame.extend_from_slice(&octets(flow.destination.address));
    frame.extend_from_slice(&flow.source.port.to_be_bytes());
    frame.extend_from_slice(&flow.destination.port.to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 8 << 4]);
    frame.resize(14 + 40 + 32, 0);
    frame
}

/// Prints a row for each lookup that costs `times` in addition to the first, which is that of an empty program. The
/// second is a miss, to which the hits are compared.
fn lookup_rows<const N: usize>(what: &str, names: [&str; N], times: [Vec<f64>; N]) {
    let medians = times.map(median);
    let (base, miss) = (medians[0], medians[1] - medians[0]);
    for (name, time) in names.iter().zip(medians).skip(1) {
        let net = time - base;
        row(
            &format!("{what}, {name}"),
            &format!("{net:.1} ns net"),
            &format!("miss {miss:.1} ns net, empty program {base:.1} ns"),
            &format!("{:.2}", net / miss),
        );
    }
}

const LOOKUPS: [&str; 4] = [
    "empty",
    "miss",
    "hit",
    "hit, label written by bpf_skb_store_bytes",
];

fn per_packet() {
    // Short rounds, so that the median is of rounds that nothing interrupted.
    const REPEAT: i32 = 10_000;
    const ROUNDS: usize = 501;
    let bpffs = [BpfFs::new(), BpfFs::new()];
    let [program, without] = [0, 1]
        .map(|n| Program::load(&settings(&bpffs[n], Strategy::Label), 200_000, &[7; 16]).unwrap());
    writer(&bpffs[1]).delete(&[0; 4]).unwrap();
    let empty = empty_program();
    let nanoseconds = |program: &OwnedFd, frame: &[u8]| {
        let began = Instant::now();
        run(program, frame, REPEAT);
        began.elapsed().as_nanos() as f64 / f64::from(REPEAT)
    };
    let (hit, miss) = (frame(&flow(5)), frame(&flow(900_000)));
    let mut entered = 0;
    for count in [10, 100_000] {
        for n in entered..count {
            for program in [&program, &without] {
                let key = Key::new(&flow(n)).unwrap();
                program.maps.enter(&key, mark()).unwrap();
            }
        }
        entered = count;
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..ROUNDS {
            times[0].push(nanoseconds(&empty, &hit));
            times[1].push(nanoseconds(program.programs()[0], &miss));
            times[2].push(nanoseconds(program.programs()[0], &hit));
            times[3].push(nanoseconds(without.programs()[0], &hit));
        }
        lookup_rows(
            &format!("per packet, {count} flows in the map"),
            LOOKUPS,
            times,
        );
    }
}

/// The kernel's statistics of the time that a program takes, while this value lives.
struct RunTimes;

const RUN_TIMES: &str = "/proc/sys/kernel/bpf_stats_enabled";

impl RunTimes {
    fn enable() -> RunTimes {
        std::fs::write(RUN_TIMES, "1").unwrap();
        RunTimes
    }

    /// Nanoseconds and number of runs.
    fn of(&self, program: &OwnedFd) -> [f64; 2] {
        let path = format!("/proc/self/fdinfo/{}", program.as_raw_fd());
        let info = std::fs::read_to_string(path).unwrap();
        ["run_time_ns:\t", "run_cnt:\t"].map(|name| {
            let value = info.lines().find_map(|line| line.strip_prefix(name));
            value.unwrap().parse().unwrap()
        })
    }
}

impl Drop for RunTimes {
    fn drop(&mut self) {
        let _ = std::fs::write(RUN_TIMES, "0");
    }
}

/// The same for the packets of a TCP connection, which TCP clones.
fn per_tcp_packet() {
    const WRITES: usize = 4000;
    const ROUNDS: usize = 31;
    let hosts = Hosts::new();
    let bpffs = [BpfFs::new(), BpfFs::new()];
    let programs = [0, 1].map(|n| load(&settings(&bpffs[n], Strategy::Label)));
    writer(&bpffs[1]).delete(&[0; 4]).unwrap();
    let empty = empty_program();
    let listener = hosts.there.enter(|| TcpListener::bind("[2001:db8::2]:443"));
    let listener = listener.unwrap();
    let (veth, mut client) = hosts.here.enter(|| {
        let (interfaces, _) = interfaces::list().unwrap();
        let veth = interfaces.into_iter().find(|i| i.name == "veth0").unwrap();
        programs[0].attach(&veth).unwrap();
        let mut hook = TcHookBuilder::new(empty.as_fd())
            .ifindex(veth.index as i32)
            .handle(1)
            .priority(5)
            .hook(TC_EGRESS);
        hook.attach().unwrap();
        (veth, TcpStream::connect("[2001:db8::2]:443").unwrap())
    });
    client.set_nodelay(true).unwrap();
    let mut server = listener.accept().unwrap().0;
    let reader = std::thread::spawn(move || std::io::copy(&mut server, &mut std::io::sink()));
    let ends = [client.local_addr().unwrap(), client.peer_addr().unwrap()];
    let [source, destination] = ends.map(|end| (end.ip(), end.port()));
    let key = Key::new(&Flow::new(Protocol::Tcp, source, destination).unwrap()).unwrap();
    let run_times = RunTimes::enable();
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        for (lookup, program) in [&programs[0], &programs[0], &programs[1]]
            .iter()
            .enumerate()
        {
            hosts.here.enter(|| program.attach(&veth).unwrap());
            match lookup {
                0 => drop(program.maps.remove(&key)),
                _ => drop(program.maps.enter(&key, mark()).unwrap()),
            }
            let fds = [&empty, program.programs()[0]];
            let before = fds.map(|fd| run_times.of(fd));
            for _ in 0..WRITES {
                client.write_all(&[0; 1000]).unwrap();
            }
            let after = fds.map(|fd| run_times.of(fd));
            let [base, time] =
                [0, 1].map(|n| (after[n][0] - before[n][0]) / (after[n][1] - before[n][1]));
            times[0].push(base);
            times[1 + lookup].push(time);
        }
    }
    drop(client);
    reader.join().unwrap().unwrap();
    lookup_rows("per packet, real TCP", LOOKUPS, times);
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
