//! Relayed fireflies and API requests, compared with the limit of this machine. Needs root.
//!
//! Every result is the median of several rounds; daemon and baseline are measured alternately within one run.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::daemon::{Home, line};
use common::net::{Hosts, NetNs};
use common::sink::Sink;
use flowd_rs::firefly::Encoder;
use flowd_rs::plugins::named_pipe::line::parse;
use flowd_rs::registry::Registry;
use jiff::Timestamp;
use measure::{cpu, median, row};
use nix::sys::socket::{
    MsgFlags, MultiHeaders, SockaddrIn6, SockaddrStorage, recvmmsg, sendmmsg, setsockopt, sockopt,
};

const FIREFLIES: usize = 200_000;
/// Limit of datagrams in flight: as many as fit in a receive buffer.
const MAX_IN_FLIGHT: usize = 10_000;
const ROUNDS: usize = 5;
const DAEMON: &str = "[2001:db8::1]:10514";
const COLLECTOR: &str = "[2001:db8::2]:20514";

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the inputs bench needs root, for network namespaces");
        std::process::exit(1);
    }
    println!("| measurement | result | baseline | ratio |");
    println!("| --- | --- | --- | --- |");
    relay();
    api();
    idle_connections();
}

/// Fireflies of different flows, as another daemon would send them.
fn fireflies() -> Vec<String> {
    let mut encoder = Encoder::new("storage.example.org", "mover 1.0", true);
    let registry = Registry::builtin();
    let firefly = |n| {
        let event = parse(
            line("start", n, "2 9").as_bytes(),
            &registry,
            Timestamp::now(),
        );
        let mut datagram = String::new();
        encoder.encode(&event.unwrap().unwrap(), Timestamp::now(), &mut datagram);
        datagram
    };
    (0..FIREFLIES).map(firefly).collect()
}

/// Sends at the rate at which datagrams arrive at the collector, without loss; returns datagrams per second.
fn paced(producer: &UdpSocket, sink: &Sink, fireflies: &[String]) -> f64 {
    let received = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let counter = scope.spawn(|| {
            let socket = sink.socket();
            socket
                .set_read_timeout(Some(Duration::from_secs(2)))
                .unwrap();
            let mut headers = MultiHeaders::<SockaddrIn6>::preallocate(64, None);
            let mut buffers = vec![[0u8; 2048]; 64];
            while received.load(Ordering::Relaxed) < FIREFLIES {
                let mut slices: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
                let flags = MsgFlags::MSG_WAITFORONE;
                match recvmmsg(
                    socket.as_raw_fd(),
                    &mut headers,
                    slices.iter_mut(),
                    flags,
                    None,
                ) {
                    Ok(messages) => received.fetch_add(messages.count(), Ordering::Relaxed),
                    Err(nix::errno::Errno::EINTR) => continue,
                    Err(_) => break,
                };
            }
            Instant::now()
        });
        let began = Instant::now();
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(64, None);
        for (n, chunk) in fireflies.chunks(64).enumerate() {
            while n * 64 > received.load(Ordering::Relaxed) + MAX_IN_FLIGHT
                && began.elapsed().as_secs() < 20
            {
                std::thread::sleep(Duration::from_micros(50));
            }
            let slices: Vec<_> = chunk.iter().map(|d| [IoSlice::new(d.as_bytes())]).collect();
            let to = vec![None; chunk.len()];
            let sent = sendmmsg(
                producer.as_raw_fd(),
                &mut headers,
                &slices,
                &to,
                [],
                MsgFlags::empty(),
            );
            assert_eq!(sent.unwrap().count(), chunk.len());
        }
        let ended = counter.join().unwrap();
        assert_eq!(
            received.load(Ordering::Relaxed),
            FIREFLIES,
            "datagrams were lost"
        );
        FIREFLIES as f64 / ended.duration_since(began).as_secs_f64()
    })
}

/// The limit: one thread that receives 64 datagrams at a time and forwards them unchanged.
fn bare_relay(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffers = vec![[0u8; 2048]; 64];
    let mut receive_headers = MultiHeaders::<SockaddrIn6>::preallocate(64, None);
    let mut send_headers = MultiHeaders::<SockaddrStorage>::preallocate(64, None);
    let to = Some(SockaddrStorage::from(
        COLLECTOR.parse::<SocketAddr>().unwrap(),
    ));
    while !stop.load(Ordering::Relaxed) {
        let lengths: Vec<usize> = {
            let mut slices: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
            let flags = MsgFlags::MSG_WAITFORONE;
            match recvmmsg(
                socket.as_raw_fd(),
                &mut receive_headers,
                slices.iter_mut(),
                flags,
                None,
            ) {
                Ok(messages) => messages.map(|m| m.bytes).collect(),
                Err(_) => continue,
            }
        };
        let slices: Vec<_> = buffers
            .iter()
            .zip(&lengths)
            .map(|(b, &n)| [IoSlice::new(&b[..n])])
            .collect();
        let to = vec![to; slices.len()];
        let sent = sendmmsg(
            socket.as_raw_fd(),
            &mut send_headers,
            &slices,
            &to,
            [],
            MsgFlags::empty(),
        );
        assert_eq!(sent.unwrap().count(), slices.len());
    }
}

fn relay() {
    let hosts = Hosts::new();
    let fireflies = fireflies();
    let sink = Sink::bind(&hosts.there, COLLECTOR);
    let producer = hosts
        .there
        .enter(|| UdpSocket::bind("[2001:db8::2]:0").unwrap());
    producer.connect(DAEMON).unwrap();
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let socket = hosts.here.enter(|| UdpSocket::bind(DAEMON).unwrap());
        setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20)).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let stop = AtomicBool::new(false);
        bare.push(std::thread::scope(|scope| {
            scope.spawn(|| bare_relay(&socket, &stop));
            let rate = paced(&producer, &sink, &fireflies);
            stop.store(true, Ordering::Relaxed);
            rate
        }));
        drop(socket);
        let home = Home::with(
            "  firefly: {bindAddress: '::'}\nbackends:\n  firefly: {relayed: collector, sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514}\n",
        );
        let daemon = home.start(&hosts.here);
        let before = cpu(&daemon);
        let rate = paced(&producer, &sink, &fireflies);
        let after = cpu(&daemon);
        daemon.expect_status(&format!("plugin_events firefly accepted {FIREFLIES}"));
        daemon.stop();
        let each = |seconds: f64| seconds / FIREFLIES as f64 * 1e6;
        ours.push((rate, each(after.0 - before.0), each(after.1 - before.1)));
    }
    let pick = |f: fn(&(f64, f64, f64)) -> f64| median(ours.iter().map(f).collect());
    let ratio = median(
        ours.iter()
            .zip(&bare)
            .map(|(ours, bare)| ours.0 / bare)
            .collect(),
    );
    row(
        "fireflies relayed to a collector, 200,000 without loss",
        &format!("{:.0}/s", pick(|r| r.0)),
        &format!("bare recvmmsg and sendmmsg {:.0}/s", median(bare)),
        &format!("{ratio:.2}"),
    );
    let (user, system) = (pick(|r| r.1), pick(|r| r.2));
    row(
        "— CPU per firefly",
        &format!("{user:.2} µs user, {system:.2} µs system"),
        "",
        "",
    );
}

/// Requests per second, by wrk with 16 persistent connections.
fn wrk(ns: &NetNs, url: &str, script: Option<&str>) -> f64 {
    let mut command = ns.command("wrk");
    command.args(["-t1", "-c16", "-d2s"]);
    if let Some(script) = script {
        command.args(["-s", script]);
    }
    let output = command.arg(url).output().expect("wrk is installed");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains("Non-2xx"), "{text}");
    let line = text.lines().find(|line| line.starts_with("Requests/sec:"));
    let rate = line
        .unwrap_or_else(|| panic!("{text}"))
        .split_whitespace()
        .nth(1)
        .unwrap();
    rate.parse().unwrap()
}

/// Serves a constant answer with tiny_http, on a loopback port of the namespace.
fn tiny_http(ns: &NetNs, address: &str) {
    let listener = ns.enter(|| std::net::TcpListener::bind(address).unwrap());
    let server = tiny_http::Server::from_listener(listener, None).unwrap();
    std::thread::spawn(move || {
        for request in server.incoming_requests() {
            let _ = request.respond(tiny_http::Response::from_string("{\"status\":\"ok\"}\n"));
        }
    });
}

fn api() {
    let ns = NetNs::new("api");
    let home = Home::with("  api: {}\nbackends:\n  firefly: {relayed: collector}\n");
    let script = home.path("post.lua");
    let flow = r#"{"state":"start","protocol":"tcp","src-ip":"::1","src-port":1,"dst-ip":"::1","dst-port":2,"experiment-id":2,"activity-id":9}"#;
    fs::write(
        &script,
        format!("wrk.method = \"POST\"\nwrk.body = [[{flow}]]\n"),
    )
    .unwrap();
    tiny_http(&ns, "127.0.0.1:7778");
    let daemon = home.start(&ns);
    let (mut bare, mut health, mut posts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        bare.push(wrk(&ns, "http://127.0.0.1:7778/", None));
        health.push(wrk(&ns, "http://127.0.0.1:7777/healthz", None));
        posts.push(wrk(&ns, "http://127.0.0.1:7777/flow", script.to_str()));
    }
    daemon.stop();
    for (request, rates) in [("GET /healthz", &health), ("POST /flow", &posts)] {
        let ratio = median(
            rates
                .iter()
                .zip(&bare)
                .map(|(ours, bare)| ours / bare)
                .collect(),
        );
        row(
            &format!("API, {request}, 16 persistent connections"),
            &format!("{:.0} requests/s", median(rates.clone())),
            &format!("tiny_http, constant answer {:.0}/s", median(bare.clone())),
            &format!("{ratio:.2}"),
        );
    }
}

/// The cost of 500 silent clients: threads, and the request rate of other clients.
fn idle_connections() {
    let ns = NetNs::new("idle");
    let home = Home::with("  api: {}\nbackends:\n  firefly: {}\n");
    let daemon = home.start(&ns);
    tiny_http(&ns, "127.0.0.1:7778");
    let threads = |process: u32| {
        fs::read_dir(format!("/proc/{process}/task"))
            .unwrap()
            .count()
    };
    let cost = |process: u32, address: &str| {
        let before = threads(process);
        let clients: Vec<_> = (0..500)
            .map(|_| ns.enter(|| TcpStream::connect(address).unwrap()))
            .collect();
        let url = format!("http://{address}/healthz");
        let rate = wrk(&ns, &url, None);
        let threads = threads(process) - before;
        drop(clients);
        (threads, rate)
    };
    let ours = cost(daemon.child.id(), "127.0.0.1:7777");
    let bare = cost(std::process::id(), "127.0.0.1:7778");
    row(
        "API with 500 silent connections",
        &format!("{} additional threads, {:.0} requests/s", ours.0, ours.1),
        &format!("tiny_http {} additional threads, {:.0}/s", bare.0, bare.1),
        &format!("{:.2}", ours.1 / bare.1),
    );
    daemon.stop();
}
