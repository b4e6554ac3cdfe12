//! Socket monitoring: CPU time of watching connections compared with a bare dump of them, and the time from a
//! connection to its flow. Needs root.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::daemon::Home;
use common::net::Hosts;
use common::sink::Sink;
use flowd_rs::flow::Protocol;
use flowd_rs::socket::{CONNECTED, request};
use measure::{median, row};
use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

const HERE: &str = "2a00:1::1";
const THERE: &str = "2a00:1::2";
const SINK: &str = "[2001:db8::2]:20514";
/// Seconds over which the daemon's CPU time is measured.
const SPAN_SECONDS: u64 = 10;
/// How often it is measured.
const ROUNDS: usize = 7;

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the sockets bench needs root, for network namespaces");
        std::process::exit(1);
    }
    if std::env::args().any(|argument| argument == "hold") {
        hold();
    }
    let hosts = Hosts::new();
    hosts.here.ip(&[
        "addr",
        "add",
        &format!("{HERE}/64"),
        "dev",
        "veth0",
        "nodad",
    ]);
    hosts.there.ip(&[
        "addr",
        "add",
        &format!("{THERE}/64"),
        "dev",
        "veth0",
        "nodad",
    ]);
    println!("| measurement | result | baseline | ratio |");
    println!("| --- | --- | --- | --- |");
    for count in [1000, 10_000] {
        watching(&hosts, count);
    }
    latency(&hosts);
}

/// A separate process holds the remote ends, so that neither process runs out of file descriptors.
fn hold() {
    let listener = TcpListener::bind(format!("[{THERE}]:5000")).unwrap();
    let mut held = Vec::new();
    for stream in listener.incoming() {
        held.push(stream.unwrap());
    }
}

fn home(plugins: &str, more: &str) -> Home {
    Home::with(&format!(
        "{plugins}backends:\n  firefly: {{sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514}}\n{more}"
    ))
}

fn connect(hosts: &Hosts, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let to = format!("[{THERE}]:{}", listener.local_addr().unwrap().port());
    let near = hosts.here.enter(|| TcpStream::connect(to).unwrap());
    (near, listener.accept().unwrap().0)
}

/// The limit: a dump with all attributes, received but not parsed. Returns CPU milliseconds per dump.
fn bare_dump(hosts: &Hosts) -> f64 {
    let netlink = hosts
        .here
        .enter(|| NlSocket::connect(NlFamily::SockOrInetDiag, None, Groups::empty()).unwrap());
    let mut buffer = vec![0; 64 << 10];
    let mut dump = || {
        for family in [2, 10] {
            let request = request(family, Protocol::Tcp, CONNECTED, 255);
            netlink.send(request, Msg::empty()).unwrap();
            loop {
                netlink.recv(&mut buffer, Msg::empty()).unwrap();
                // NLMSG_DONE, in a datagram of its own.
                if buffer[4..6] == 3u16.to_ne_bytes() {
                    break;
                }
            }
        }
    };
    let before = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    const TIMES: i32 = 20;
    (0..TIMES).for_each(|_| dump());
    let after = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    (after - before).num_microseconds() as f64 / 1e3 / f64::from(TIMES)
}

/// CPU milliseconds of `ss -tni`.
fn ss(hosts: &Hosts) -> f64 {
    let used = || {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
        (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e3
    };
    let before = used();
    for _ in 0..5 {
        let mut ss = hosts.here.command("ss");
        assert!(
            ss.arg("-tni")
                .stdout(Stdio::null())
                .status()
                .unwrap()
                .success()
        );
    }
    (used() - before) / 5.0
}

fn watching(hosts: &Hosts, count: usize) {
    let program = std::env::current_exe().unwrap();
    let mut far = hosts.there.command(program.to_str().unwrap());
    let mut far = far.arg("hold").spawn().unwrap();
    let connect = || {
        let to = format!("[{THERE}]:5000");
        hosts.here.enter(|| TcpStream::connect(to).ok())
    };
    let open: Vec<_> = (0..count)
        .map(|_| common::wait_for("a connection", connect))
        .collect();
    let home = home(
        "  netlink: {experiment: 2, activity: 9, period: 1s, announceExisting: true}\n",
        "enrichers: {period: 1000, netlink: {}}\n",
    );
    let daemon = home.start(&hosts.here);
    daemon.expect_status(&format!("flows_open {count}"));
    let clock = clock_getcpuclockid(Pid::from_raw(daemon.child.id() as i32)).unwrap();
    let used = || clock_gettime(clock).unwrap().num_microseconds() as f64 / 1e3;
    let dumps = || {
        let status = daemon.status();
        let count = status
            .split(", ")
            .find_map(|s| s.strip_prefix("socket_dumps "));
        count.unwrap().parse::<f64>().unwrap()
    };
    let (mut rounds, mut bare, mut ratios, mut per_second) = (vec![], vec![], vec![], vec![]);
    for _ in 0..ROUNDS {
        let before = (used(), dumps());
        std::thread::sleep(Duration::from_secs(SPAN_SECONDS));
        let after = (used(), dumps());
        let ours = (after.0 - before.0) / SPAN_SECONDS as f64;
        let limit = bare_dump(hosts);
        ratios.push(ours / limit);
        rounds.push(ours);
        bare.push(limit);
        per_second.push((after.1 - before.1) / SPAN_SECONDS as f64);
    }
    let (ours, bare) = (median(rounds), median(bare));
    row(
        &format!("{count} connections watched and enriched, CPU per second"),
        &format!(
            "{ours:.1} ms, {:.2} µs per connection, {:.1} dumps",
            ours * 1e3 / count as f64,
            median(per_second)
        ),
        &format!("one bare dump {bare:.1} ms, ss -tni {:.0} ms", ss(hosts)),
        &format!("{:.1}", median(ratios)),
    );
    daemon.stop();
    drop(open);
    far.kill().unwrap();
    far.wait().unwrap();
}

fn latency(hosts: &Hosts) {
    const SAMPLES: usize = 200;
    let listener = hosts
        .there
        .enter(|| TcpListener::bind(format!("[{THERE}]:5001")).unwrap());
    let sink = Sink::bind(&hosts.there, SINK);
    let cgroup = "/sys/fs/cgroup";
    for (name, plugin) in [
        (
            "netlink, a scan every 200 ms",
            "  netlink: {experiment: 2, activity: 9, period: 200}\n".to_owned(),
        ),
        (
            "iperf3 (sockops)",
            format!(
                "  iperf3: {{cgroupPath: {cgroup}, experimentIDs: [2], activityIDs: [9], minDestinationPort: 5001, maxDestinationPort: 5001}}\n"
            ),
        ),
    ] {
        let home = home(&plugin, "");
        let daemon = home.start(&hosts.here);
        std::thread::sleep(Duration::from_millis(500));
        let (mut starts, mut ends) = (Vec::new(), Vec::new());
        let next = |state: &str| {
            while sink.firefly().event.state.as_str() != state {}
        };
        for n in 0..SAMPLES {
            // So that samples are not synchronized with the scans.
            std::thread::sleep(Duration::from_micros(1 + 7919 * n as u64 % 50_000));
            let began = Instant::now();
            let (mut near, far) = connect(hosts, &listener);
            next("start");
            starts.push(began.elapsed().as_secs_f64() * 1e3);
            drop(far);
            assert_eq!(near.read_to_end(&mut Vec::new()).unwrap(), 0);
            let began = Instant::now();
            drop(near);
            next("end");
            ends.push(began.elapsed().as_secs_f64() * 1e3);
        }
        daemon.stop();
        for (span, times) in [
            ("connect() to the start firefly", starts),
            ("close() to the end firefly", ends),
        ] {
            row(
                &format!("{name}: {span}, median"),
                &format!("{:.2} ms", median(times)),
                "",
                "",
            );
        }
    }
}
