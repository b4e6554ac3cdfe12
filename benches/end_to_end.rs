//! The running daemon compared with the limit of this machine: rate, latency, memory, start-up. Needs root.
//!
//! Every result is the median of several rounds; daemon and baseline are measured alternately within one run.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::fs::{self, OpenOptions};
use std::io::{IoSlice, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::{Home, PROGRAM, line, lines};
use common::net::Hosts;
use common::sink::Sink;
use flowd_rs::firefly::Encoder;
use flowd_rs::plugins::named_pipe::line::parse;
use flowd_rs::registry::Registry;
use jiff::Timestamp;
use measure::{cpu, median, receive, resident, row};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

const FLOWS: usize = 200_000;
const ROUNDS: usize = 7;
const DESTINATION: &str = "[2001:db8::2]:10514";

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the end-to-end bench needs root, for network namespaces");
        std::process::exit(1);
    }
    // `cargo bench --bench end_to_end start million` runs these parts alone. Flags of cargo are ignored.
    let hosts = Hosts::new();
    println!("| measurement | result | baseline | ratio |");
    println!("| --- | --- | --- | --- |");
    let parts = [
        ("throughput", throughput as fn(&Hosts)),
        ("latency", latency),
        ("memory", memory),
        ("start", start),
        ("first_firefly", first_firefly),
        ("million", million),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |part: &str| wanted.iter().any(|wanted| wanted == part);
    let all = !parts.iter().any(|(part, _)| is_wanted(part));
    for (_, run) in parts.iter().filter(|(part, _)| all || is_wanted(part)) {
        run(&hosts);
    }
}

/// Sends and receives at the same time; returns datagrams per second.
fn rate(sink: &Sink, send: impl FnOnce() + Send) -> f64 {
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(sink.socket(), FLOWS));
        let began = Instant::now();
        send();
        let (received, last) = receiver.join().unwrap();
        assert_eq!(received, FLOWS, "datagrams were lost");
        FLOWS as f64 / last.duration_since(began).as_secs_f64()
    })
}

/// The datagrams that the daemon will send.
fn datagrams() -> Vec<String> {
    let hostname = nix::unistd::gethostname().unwrap();
    let mut encoder = Encoder::new(hostname.to_str().unwrap(), "flowd-rs 0.1.0", true);
    let registry = Registry::builtin();
    (0..FLOWS)
        .map(|n| {
            let line = line("start", n, "2 9");
            let event = parse(line.as_bytes(), &registry, Timestamp::now())
                .unwrap()
                .unwrap();
            let mut datagram = String::new();
            encoder.encode(&event, Timestamp::now(), &mut datagram);
            datagram
        })
        .collect()
}

/// The limit: one thread sends prepared datagrams, 128 per call.
fn bare_sendmmsg(socket: &UdpSocket, datagrams: &[String]) {
    let to = Some(SockaddrStorage::from(
        DESTINATION.parse::<SocketAddr>().unwrap(),
    ));
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(128, None);
    for chunk in datagrams.chunks(128) {
        let slices: Vec<_> = chunk.iter().map(|d| [IoSlice::new(d.as_bytes())]).collect();
        let addresses = vec![to; chunk.len()];
        let mut at = 0;
        while at < chunk.len() {
            let sent = sendmmsg(
                socket.as_raw_fd(),
                &mut headers,
                &slices[at..],
                &addresses[at..],
                [],
                MsgFlags::empty(),
            );
            at += sent.unwrap().count();
        }
    }
}

fn throughput(hosts: &Hosts) {
    let datagrams = datagrams();
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let bare_socket = hosts.here.enter(|| UdpSocket::bind("[::]:0").unwrap());
    let mut bare = Vec::new();
    let mut daemon: [Vec<(f64, f64, f64)>; 2] = Default::default();
    for _ in 0..ROUNDS {
        bare.push(rate(&sink, || bare_sendmmsg(&bare_socket, &datagrams)));
        for (results, at_once) in daemon.iter_mut().zip([1, 50]) {
            let home = Home::new("{}");
            let process = home.start(&hosts.here);
            let writes: Vec<String> = (0..FLOWS / at_once)
                .map(|n| lines("start", n * at_once..(n + 1) * at_once, "2 9"))
                .collect();
            let mut writer = home.writer();
            let before = cpu(&process);
            let rate = rate(&sink, move || {
                for write in &writes {
                    writer.write_all(write.as_bytes()).unwrap();
                }
            });
            let after = cpu(&process);
            let per_flow = |seconds: f64| seconds / FLOWS as f64 * 1e6;
            results.push((
                rate,
                per_flow(after.0 - before.0),
                per_flow(after.1 - before.1),
            ));
            process.stop();
        }
    }
    let limit = median(bare.clone());
    for (results, at_once) in daemon.iter().zip([1, 50]) {
        let pick = |f: fn(&(f64, f64, f64)) -> f64| median(results.iter().map(f).collect());
        let ratio = median(
            results
                .iter()
                .zip(&bare)
                .map(|(r, bare)| r.0 / bare)
                .collect(),
        );
        row(
            &format!("pipe to firefly, 200,000 flows, lines per write: {at_once}"),
            &format!("{:.0} flows/s", pick(|r| r.0)),
            &format!("bare sendmmsg {limit:.0}/s"),
            &format!("{ratio:.2}"),
        );
        let (user, system) = (pick(|r| r.1), pick(|r| r.2));
        row(
            "— CPU per flow",
            &format!("{user:.2} µs user, {system:.2} µs system"),
            "",
            "",
        );
    }
}

fn percentiles(mut samples: Vec<Duration>) -> (f64, f64) {
    samples.sort();
    let at = |share: f64| samples[(samples.len() as f64 * share) as usize].as_secs_f64() * 1e6;
    (at(0.5), at(0.99))
}

fn latency(hosts: &Hosts) {
    const SAMPLES: usize = 2000;
    // So that no thread is still busy with the previous sample.
    let pause = || std::thread::sleep(Duration::from_millis(1));
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let mut writer = home.writer();
    let mut buffer = [0; 2048];

    let echo = hosts
        .there
        .enter(|| UdpSocket::bind("[2001:db8::2]:7").unwrap());
    let near = hosts
        .here
        .enter(|| UdpSocket::bind("[2001:db8::1]:0").unwrap());
    near.connect("[2001:db8::2]:7").unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            let _ = echo.send_to(&buffer[..length], from);
        }
    });

    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for n in 0..SAMPLES {
        pause();
        let line = line("start", n, "2 9");
        let began = Instant::now();
        writer.write_all(line.as_bytes()).unwrap();
        sink.socket().recv(&mut buffer).unwrap();
        ours.push(began.elapsed());
        pause();
        let began = Instant::now();
        near.send(&[0; 500]).unwrap();
        near.recv(&mut buffer).unwrap();
        bare.push(began.elapsed());
    }
    daemon.stop();
    let (ours, bare) = (percentiles(ours), percentiles(bare));
    for (statistic, ours, bare) in [
        ("median", ours.0, bare.0),
        ("99th percentile", ours.1, bare.1),
    ] {
        row(
            &format!("single line, write to datagram, {statistic}"),
            &format!("{ours:.0} µs"),
            &format!("UDP echo round trip {bare:.0} µs"),
            &format!("{:.2}", ours / bare),
        );
    }
}

fn memory(hosts: &Hosts) {
    const MANY: usize = 1_000_000;
    // The pipe alone fills the table.
    let home = Home::with("backends: {firefly: {}}\nflows: {maxPerSource: 1000000}\n");
    let daemon = home.start(&hosts.here);
    daemon.expect_status("journal_writes rewritten 1");
    let idle = resident(&daemon);
    let mut writer = home.writer();
    for block in 0..MANY / 1000 {
        let text = lines("start", block * 1000..(block + 1) * 1000, "2 9");
        writer.write_all(text.as_bytes()).unwrap();
    }
    daemon.expect_status(&format!("flows_open {MANY}"));
    let full = resident(&daemon);
    daemon.stop();
    let mib = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
    row("resident memory, idle", &mib(idle), "", "");
    let each = (full - idle) / MANY as f64;
    row(
        "resident memory, 1,000,000 open flows",
        &mib(full),
        "",
        &format!("{each:.0} bytes per flow"),
    );
}

/// How long `flowd-rs version` takes, in ms: the cost of any process.
fn version(hosts: &Hosts) -> f64 {
    let began = Instant::now();
    hosts.here.command(PROGRAM).arg("version").output().unwrap();
    began.elapsed().as_secs_f64() * 1e3
}

fn start(hosts: &Hosts) {
    let ready = |home: &Home| {
        let began = Instant::now();
        let daemon = home.start(&hosts.here);
        let duration = began.elapsed().as_secs_f64() * 1e3;
        daemon.stop();
        duration
    };
    let empty = Home::new("{}");
    let full = Home::new("{}");
    let daemon = full.start(&hosts.here);
    full.write(&lines("start", 0..100_000, "2 9"));
    daemon.expect_status("flows_open 100000");
    daemon.stop();
    let (mut bare, mut none, mut many) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..15 {
        bare.push(version(hosts));
        none.push(ready(&empty));
        many.push(ready(&full));
    }
    let bare = median(bare);
    for (journal, times) in [
        ("empty journal", none),
        ("100,000 flows in the journal", many),
    ] {
        let time = median(times);
        row(
            &format!("start to READY=1, {journal}"),
            &format!("{time:.1} ms"),
            &format!("flowd-rs version {bare:.1} ms"),
            &format!("{:.1}", time / bare),
        );
    }
}

/// Processes that keep every CPU busy. Dropping it ends them.
struct BusyCpus(Vec<Child>);

impl BusyCpus {
    fn new() -> BusyCpus {
        let cpus = std::thread::available_parallelism().unwrap().get();
        let spin = |_| {
            let mut shell = Command::new("sh");
            shell.args(["-c", "while :; do :; done"]).spawn().unwrap()
        };
        BusyCpus((0..cpus).map(spin).collect())
    }
}

impl Drop for BusyCpus {
    fn drop(&mut self) {
        for process in &mut self.0 {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// From `exec` to the first firefly, for a line whose writer waits for the daemon to open the pipe.
fn first_firefly(hosts: &Hosts) {
    const ROUNDS: usize = 20;
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let home = Home::new("{}");
    for (load, is_busy) in [("", false), (", every CPU busy", true)] {
        let _busy = is_busy.then(BusyCpus::new);
        let (mut bare, mut ours) = (Vec::new(), Vec::new());
        for n in 0..ROUNDS {
            bare.push(version(hosts));
            let _ = fs::remove_dir_all(home.path("state"));
            let _ = fs::remove_file(home.pipe());
            mkfifo(&home.pipe(), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut writer = OpenOptions::new().write(true).open(home.pipe()).unwrap();
                    writer
                        .write_all(line("start", n, "2 9").as_bytes())
                        .unwrap();
                });
                let began = Instant::now();
                let socket = sink.socket();
                let first = scope.spawn(move || {
                    socket.recv(&mut [0; 2048]).unwrap();
                    began.elapsed()
                });
                let daemon = home.start(&hosts.here);
                ours.push(first.join().unwrap().as_secs_f64() * 1e3);
                daemon.stop();
            });
        }
        let (bare, ours) = (median(bare), median(ours));
        row(
            &format!("start to the first firefly{load}"),
            &format!("{ours:.1} ms"),
            &format!("flowd-rs version {bare:.1} ms"),
            &format!("{:.1}", ours / bare),
        );
    }
}

/// With a million open flows: the listing, its client's memory, an event's wait meanwhile, and a start.
fn million(hosts: &Hosts) {
    const MANY: usize = 1_000_000;
    const SAMPLES: usize = 5000;
    let home = Home::with("backends: {firefly: {}}\nflows: {endOnSocketClose: false}\n");
    let daemon = home.start(&hosts.here);
    let mut writer = home.writer();
    for block in 0..MANY / 1000 {
        let text = lines("start", block * 1000..(block + 1) * 1000, "2 9");
        writer.write_all(text.as_bytes()).unwrap();
    }
    daemon.expect_status(&format!("flows_open {MANY}"));
    // The flows per second of a listing, and the most memory that its client has meanwhile, in MiB.
    let list = || {
        let began = Instant::now();
        let mut client = hosts.here.command(PROGRAM);
        client.args(["flows", "-c"]).arg(home.path("flowd.cfg"));
        let mut client = client.stdout(Stdio::piped()).spawn().unwrap();
        let (mut out, status) = (
            client.stdout.take().unwrap(),
            format!("/proc/{}/status", client.id()),
        );
        let (mut buffer, mut read, mut memory) = (vec![0; 64 << 10], 1, 0.0_f64);
        for n in 0.. {
            if read == 0 {
                break;
            }
            read = out.read(&mut buffer).unwrap();
            if n % 100 == 0 {
                let status = fs::read_to_string(&status).unwrap_or_default();
                let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
                let peak = peak.and_then(|peak| peak.split_whitespace().next()?.parse().ok());
                memory = memory.max(peak.unwrap_or(0.0) / 1024.0);
            }
        }
        assert!(client.wait().unwrap().success());
        (MANY as f64 / began.elapsed().as_secs_f64(), memory)
    };
    let (rate, memory) = list();
    row(
        "listing of 1,000,000 open flows, flowd-rs flows",
        &format!("{rate:.0} flows/s"),
        "",
        &format!("client {memory:.0} MiB"),
    );
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let mut buffer = [0; 2048];
    let mut waits = |writer: &mut fs::File, first: usize| {
        let mut waits: Vec<Duration> = Vec::new();
        for n in first..first + SAMPLES {
            std::thread::sleep(Duration::from_millis(1));
            let began = Instant::now();
            writer
                .write_all(line("start", n, "2 9").as_bytes())
                .unwrap();
            sink.socket().recv(&mut buffer).unwrap();
            waits.push(began.elapsed());
        }
        waits.sort();
        waits[SAMPLES * 999 / 1000].as_secs_f64() * 1e3
    };
    let idle = waits(&mut writer, MANY);
    let busy = std::thread::scope(|scope| {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || while stopped.try_recv().is_err() && list().0 > 0.0 {});
        let busy = waits(&mut writer, MANY + SAMPLES);
        let _ = stop.send(());
        busy
    });
    row(
        "— single line, 99.9th percentile, while listing",
        &format!("{busy:.1} ms"),
        &format!("idle {idle:.1} ms"),
        "",
    );
    daemon.stop();
    let began = Instant::now();
    let daemon = home.start(&hosts.here);
    let each = began.elapsed().as_secs_f64() / MANY as f64 * 1e6;
    daemon.stop();
    row(
        "start to READY=1, 1,000,000 flows in the journal",
        &format!("{each:.2} µs per flow"),
        "",
        "",
    );
}
