//! SIGUSR2, with which the package replaces a running daemon: no event is lost, no packet unmarked.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;
#[path = "common/prog_run.rs"]
mod prog_run;

use std::fs::{self, File};
use std::io::Write;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::daemon::{Home, lines};
use common::net::Hosts;
use common::service::Service;
use common::sink::Sink;
use common::wait_for;
use common::wire::Wire;
use flowd_rs::event::{FlowEvent, Origin, State};
use flowd_rs::firefly::Encoder;
use flowd_rs::flow::{Flow, Protocol, Tag};
use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prog_run::BpfFs;

/// Sets a flag when dropped, also if the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A firefly datagram for flow number `n` of another producer.
fn datagram(encoder: &mut Encoder, state: State, n: u16) -> String {
    let flow = Flow::new(
        Protocol::Tcp,
        ("2001:db8::1".parse().unwrap(), n),
        ("2001:db8::2".parse().unwrap(), 9),
    );
    let tag = Tag {
        experiment: 2,
        activity: 9,
    };
    let event = FlowEvent {
        tag: Some(tag),
        ..FlowEvent::new(state, flow.unwrap(), Timestamp::now(), Origin::Firefly)
    };
    let mut out = String::new();
    encoder.encode(&event, Timestamp::now(), &mut out);
    out
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_new_version_takes_over_a_thousand_flows_under_load() {
    const OPEN: usize = 1000;
    const LINES: usize = 20_000;
    const FIREFLIES: u16 = 5000;
    let hosts = Hosts::new();
    hosts.here.ip(&["link", "set", "lo", "up"]);
    let bpffs = BpfFs::new();
    let home = Home::with("");
    let plugins = format!(
        "  namedPipe: {{pipePath: {}}}\n  firefly: {{bindAddress: '::1'}}\n",
        home.pipe().display()
    );
    home.configure_plugins(
        &plugins,
        &format!(
            "backends:\n  firefly: {{destinationPort: 20514, relayed: destination, maxRelayRate: 1000000}}\n  marker: {{bpfFsPath: {}, targetInterfaces: [veth0]}}\n",
            bpffs.path().display()
        ),
    );
    let sink = Sink::bind(&hosts.there, "[2001:db8::2]:20514");
    let mut service = Service::start(&home, &hosts.here, "run", "flowd.cfg");
    home.write(&lines("start", 100_000..100_000 + OPEN, "2 9"));
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 2 19\n");
    assert_eq!(sink.collect("start", OPEN + 1).len(), OPEN + 1);
    let (pipe, wire) = (fs::metadata(home.pipe()).unwrap(), Wire::listen(&hosts));
    let stop = AtomicBool::new(false);
    let sent = std::thread::scope(|scope| {
        // Packets of an open flow are sent all the time.
        let packets = scope.spawn(|| {
            let from = hosts
                .here
                .enter(|| UdpSocket::bind("[2001:db8::1]:4000").unwrap());
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                from.send_to(b"x", "[2001:db8::2]:5000").unwrap();
                sent += 1;
                std::thread::sleep(Duration::from_micros(300));
            }
            sent
        });
        let writer = scope.spawn(|| {
            // As storage services do: open without blocking, write, close. The pipe must always have a reader.
            let began = Instant::now();
            for n in (0..LINES).step_by(10) {
                let mut options = File::options();
                let mut pipe = std::os::unix::fs::OpenOptionsExt::custom_flags(
                    options.write(true),
                    nix::libc::O_NONBLOCK,
                )
                .open(home.pipe())
                .expect("the pipe has a reader");
                pipe.write_all(lines("start", n..n + 10, "2 9").as_bytes())
                    .unwrap();
                std::thread::sleep(
                    Duration::from_micros(100 * n as u64).saturating_sub(began.elapsed()),
                );
            }
        });
        let fireflies = scope.spawn(|| {
            let socket = hosts.here.enter(|| UdpSocket::bind("[::1]:0").unwrap());
            let mut encoder = Encoder::new("storage", "mover 1", true);
            for n in 1..=FIREFLIES {
                socket
                    .send_to(
                        datagram(&mut encoder, State::Start, n).as_bytes(),
                        "[::1]:10514",
                    )
                    .unwrap();
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let done = SetOnDrop(&stop);
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            service.replace();
        }
        writer.join().unwrap();
        fireflies.join().unwrap();
        drop(done);
        packets.join().unwrap()
    });
    // Every start is sent once, from the pipe and relayed.
    let starts = LINES + usize::from(FIREFLIES);
    assert_eq!(sink.collect("start", starts).len(), starts);
    // Every packet has the same label.
    let frames = wire.frames(sent, |frame| frame.source_port == 4000);
    assert_eq!(frames.len(), sent);
    assert!(
        frames
            .iter()
            .all(|frame| frame.label == frames[0].label && frame.label != 0),
        "a gap"
    );
    // Flows are still open, and end with their start time.
    home.write(&lines("end", 100_000..100_000 + OPEN, "2 9"));
    for (flow, end) in sink.collect("end", OPEN) {
        assert!(
            end.start_time.is_some_and(|start| start < end.time),
            "{flow}"
        );
    }
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(home.pipe()).unwrap().ino(), pipe.ino());
    assert!(
        service.store.is_empty(),
        "the store is empty while the daemon runs"
    );
    // A plain stop removes everything.
    kill(Pid::from_raw(service.child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(
        wait_for("the end", || service.child.try_wait().unwrap()).code(),
        Some(0)
    );
    assert!(!bpffs.path().join("flowd-rs/v1/flows").exists());
}
