//! Reloads on SIGHUP: only the parts that changed are replaced, and no event is lost.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;
#[path = "common/prog_run.rs"]
mod prog_run;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::daemon::{Daemon, Home, line, lines, run, write};
use common::http::Client;
use common::net::{Hosts, NetNs};
use common::sink::Sink;
use common::wait_for;
use nix::sys::signal::Signal;
use prog_run::BpfFs;

const SINK: &str = "[2001:db8::2]:20514";
const FIREFLY: &str =
    "firefly: {sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514}";

/// Writes the configuration and reloads it.
fn reload(home: &Home, daemon: &Daemon<'_>, more: &str) {
    home.configure(more);
    daemon.signal(Signal::SIGHUP);
    daemon.expect_notice("RELOADING=1");
    daemon.expect_notice("READY=1");
}

#[test]
#[ignore = "needs root: network namespaces"]
fn an_invalid_file_changes_nothing_and_is_logged() {
    let hosts = Hosts::new();
    let good = format!("backends:\n  {FIREFLY}\n");
    let home = Home::with(&good);
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    home.write(&line("start", 0, "2 9"));
    daemon.expect_status("flows_open 1");
    reload(&home, &daemon, "backends:\n  fireflies: {}\n");
    home.wait_for_log("backends.fireflies: unknown key, did you mean `firefly`?; the previous configuration stays in effect");
    // A valid file with a port that is already in use.
    let taken = hosts
        .here
        .enter(|| std::net::TcpListener::bind("127.0.0.1:9000").unwrap());
    reload(
        &home,
        &daemon,
        &format!("{good}  prometheus: {{port: 9000}}\nflows: {{maxFlows: 5}}\n"),
    );
    home.wait_for_log(
        "Address already in use (os error 98); the previous configuration stays in effect",
    );
    // The same for a plugin. The pipe keeps its reader throughout.
    let pipe = home.pipe().display().to_string();
    let elsewhere =
        format!("  namedPipe: {{pipePath: {pipe}}}\n  firefly: {{bindAddress: 2001:db8::99}}\n");
    home.configure_plugins(&elsewhere, &good);
    daemon.signal(Signal::SIGHUP);
    home.wait_for_log(
        "Cannot assign requested address (os error 99); the previous configuration stays in effect",
    );
    drop(taken);
    home.write(&lines("end", 0..1, "2 9"));
    home.write(&lines("start", 1..11, "2 9"));
    daemon.expect_status("flows_open 10");
    // The queue of the backend that could not start is gone.
    let config = home.path("flowd.cfg").display().to_string();
    let (_, status, _) = run(&["status", "--json", "-c", &config]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let queues = status["queues"].as_array().unwrap().iter();
    let queues: Vec<_> = queues.map(|queue| queue["name"].as_str()).collect();
    assert_eq!(queues, [Some("dispatcher"), Some("firefly")]);
    assert_eq!(sink.collect("start", 11).len(), 11);
    reload(&home, &daemon, &good);
    home.wait_for_log("has a new configuration");
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn no_event_is_lost_under_load_whatever_changes() {
    const FLOWS: usize = 40_000;
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let marker = |more: &str| {
        format!(
            "  marker: {{bpfFsPath: {}, targetInterfaces: [veth0]{more}}}\n",
            bpffs.path().display()
        )
    };
    let base = format!("backends:\n  {FIREFLY}\n");
    // When a clsact qdisc is created or removed, the kernel drops the packets that the interface is sending. The
    // daemon keeps one that existed before.
    let added = std::process::Command::new("tc")
        .args([
            "-n",
            &hosts.here.name,
            "qdisc",
            "add",
            "dev",
            "veth0",
            "clsact",
        ])
        .status();
    assert!(added.unwrap().success());
    // The daemon keeps the marker's capabilities only if a marker is enabled at start-up.
    let home = Home::with(&format!("{base}{}", marker("")));
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let pipe = fs::metadata(home.pipe()).unwrap().ino();
    let http = |port: u16| {
        Client::tcp(&hosts.here, &format!("127.0.0.1:{port}"))
            .get("/healthz")
            .status
    };
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            // 10,000 lines per second; each write opens and closes the pipe.
            let began = Instant::now();
            for n in (0..FLOWS).step_by(100) {
                home.write(&lines("start", n..n + 100, "2 9"));
                let due = Duration::from_micros(100 * n as u64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
        });
        let more = |text: &str| format!("{base}{text}");
        reload(&home, &daemon, &more("  prometheus: {port: 9000}\n"));
        assert_eq!(http(9000), 200);
        reload(&home, &daemon, &more("  prometheus: {port: 9001}\n"));
        assert_eq!(http(9001), 200);
        reload(&home, &daemon, &more(&marker("")));
        reload(&home, &daemon, &more(&marker(", priority: 20")));
        reload(
            &home,
            &daemon,
            &more(&marker(", markingStrategy: destination")),
        );
        reload(&home, &daemon, &base);
        // Each change replaces the backend; both send to the same collector.
        for _ in 0..3 {
            reload(
                &home,
                &daemon,
                &base.replace("sendToCollector", "relayed: collector, sendToCollector"),
            );
            reload(&home, &daemon, &base);
        }
        reload(
            &home,
            &daemon,
            &more(
                "logLevel: debug\nflows: {maxFlows: 100000, maxAge: 1d, endOnSocketClose: false}\n",
            ),
        );
        reload(&home, &daemon, &more("enrichers: {netlink: {}}\n"));
        let mode = |mode: &str| {
            home.configure_plugins(
                &format!(
                    "  namedPipe: {{pipePath: {}, mode: '{mode}'}}\n  api: {{bindPort: 7777}}\n",
                    home.pipe().display()
                ),
                &base,
            )
        };
        for text in ["0622", "0666", "0622"] {
            mode(text);
            daemon.signal(Signal::SIGHUP);
            daemon.expect_notice("RELOADING=1");
            daemon.expect_notice("READY=1");
        }
        assert_eq!(http(7777), 200);
        reload(&home, &daemon, &base);
        writer.join().unwrap();
    });
    let found = fs::metadata(home.pipe()).unwrap();
    assert_eq!(found.ino(), pipe, "the pipe was replaced");
    assert!(
        !home.log().contains("previous configuration"),
        "a reload failed"
    );
    daemon.expect_status(&format!("flows_open {FLOWS}"));
    daemon.expect_status(&format!("backend_events firefly sent {}", 2 * FLOWS));
    assert_eq!(sink.collect("start", FLOWS).len(), FLOWS);
    // Every flow is reported once.
    daemon.expect_status(&format!("plugin_events namedPipe accepted {FLOWS}"));
    home.write(&lines("end", 0..FLOWS, "2 9"));
    assert_eq!(sink.collect("end", FLOWS).len(), FLOWS);
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_backend_added_under_load_gets_each_open_flow_once() {
    const OPEN: usize = 20_000;
    let hosts = Hosts::new();
    let base = "flows: {endOnSocketClose: false}\nbackends:\n  firefly: {}\n";
    let home = Home::with(base);
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..OPEN, "2 9"));
    daemon.expect_status(&format!("flows_open {OPEN}"));
    // As many flows start as end, so that a flow that is missing or counts twice shows in the sums.
    let is_added = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = home.writer();
            let mut next = OPEN;
            while !is_added.load(Ordering::Relaxed) {
                let starts = lines("start", next..next + 100, "2 9");
                let ends = lines("end", next - OPEN..next + 100 - OPEN, "2 9");
                writer.write_all((starts + &ends).as_bytes()).unwrap();
                next += 100;
            }
        });
        reload(
            &home,
            &daemon,
            &format!("{base}  prometheus: {{port: 9000}}\n"),
        );
        is_added.store(true, Ordering::Relaxed);
    });
    daemon.expect_status(&format!("flows_open {OPEN}"));
    let mut client = Client::tcp(&hosts.here, "127.0.0.1:9000");
    wait_for("as many open flows in the sums as in the table", || {
        let page = client.get("/metrics").body;
        let sums = page
            .lines()
            .filter(|line| line.starts_with("flowd_flows_open{"));
        let open = sums.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        (open.sum::<f64>() == OPEN as f64).then_some(())
    });
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn packets_are_marked_while_the_marker_is_replaced() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let config = |more: &str| {
        format!(
            "backends:\n  marker: {{bpfFsPath: {}, targetInterfaces: [veth0]{more}}}\n",
            bpffs.path().display()
        )
    };
    let home = Home::with(&config(""));
    let daemon = home.start(&hosts.here);
    let from = hosts
        .here
        .enter(|| std::net::UdpSocket::bind("[2001:db8::1]:4000").unwrap());
    let to = hosts
        .there
        .enter(|| std::net::UdpSocket::bind("[2001:db8::2]:5000").unwrap());
    home.write("start udp 2001:db8::1 4000 2001:db8::2 5000 2 19\n");
    daemon.expect_status("backend_events marker entered 1");
    let wire = common::wire::Wire::listen(&hosts);
    let mut sent = 0;
    let mut send = |count: usize| {
        for _ in 0..count {
            from.send_to(b"x", to.local_addr().unwrap()).unwrap();
            std::thread::sleep(Duration::from_micros(200));
        }
        sent += count;
    };
    send(10);
    for more in [", priority: 30", ", removeQdisc: false", ""] {
        home.configure(&config(more));
        daemon.signal(Signal::SIGHUP);
        send(1000);
        daemon.expect_notice("READY=1");
    }
    send(10);
    let frames = wire.frames(sent, |frame| frame.source_port == 4000);
    assert_eq!(frames.len(), sent);
    let labels: HashSet<u32> = frames.iter().map(|frame| frame.label).collect();
    assert_eq!(labels.len(), 1, "{labels:x?}");
    assert!(!labels.contains(&0));
    daemon.stop();
}

/// The configuration is valid but a port is in use: the new mode of the pipe must not be applied.
#[test]
#[ignore = "needs root: network namespaces"]
fn a_failed_reload_loses_no_line_and_does_not_change_the_pipe() {
    const FLOWS: usize = 10_000;
    let hosts = Hosts::new();
    let home = Home::with("backends: {dummy: }\n");
    let daemon = home.start(&hosts.here);
    let _taken = hosts
        .here
        .enter(|| std::net::TcpListener::bind("127.0.0.1:9000").unwrap());
    let pipe = home.pipe().display().to_string();
    home.configure_plugins(
        &format!("  namedPipe: {{pipePath: {pipe}, mode: '0600'}}\n"),
        "backends: {dummy: , prometheus: {port: 9000}}\n",
    );
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let began = Instant::now();
            for n in (0..FLOWS).step_by(10) {
                home.write(&lines("start", n..n + 10, "2 9"));
                let due = Duration::from_micros(200 * n as u64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
        });
        while !writer.is_finished() {
            daemon.signal(Signal::SIGHUP);
            daemon.expect_notice("RELOADING=1");
            daemon.expect_notice("READY=1");
        }
        writer.join().unwrap();
    });
    daemon.expect_status(&format!("flows_open {FLOWS}"));
    let mode = fs::metadata(home.pipe()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    daemon.stop();
}

/// The reader of the pipe is replaced while a line is being written.
#[test]
#[ignore = "needs root: network namespaces"]
fn a_line_is_not_split_if_the_reader_is_replaced_in_the_middle() {
    let hosts = Hosts::new();
    let home = Home::with("backends: {dummy: }\n");
    let daemon = home.start(&hosts.here);
    let pipe = home.pipe().display().to_string();
    let mut writer = home.writer();
    for (n, mode) in ["0622", "0666", "0620"].into_iter().enumerate() {
        let line = lines("start", n..n + 1, "2 9");
        let (first, second) = line.split_at(10 + n);
        writer.write_all(first.as_bytes()).unwrap();
        home.configure_plugins(
            &format!("  namedPipe: {{pipePath: {pipe}, mode: '{mode}'}}\n"),
            "backends: {dummy: }\n",
        );
        daemon.signal(Signal::SIGHUP);
        std::thread::sleep(Duration::from_millis(100));
        // The next reader reads the following line.
        let next = lines("start", 100 + n..101 + n, "2 9");
        writer
            .write_all((second.to_owned() + &next).as_bytes())
            .unwrap();
        daemon.expect_notice("READY=1");
        daemon.expect_status(&format!("flows_open {}", 2 * (n + 1)));
    }
    assert!(!home.log().contains("rejected"), "{}", home.log());
    // A writer that never ends its line does not block the next reader.
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                writer.write_all(b"x").unwrap();
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        home.configure_plugins(
            &format!("  namedPipe: {{pipePath: {pipe}, mode: '0600'}}\n"),
            "backends: {dummy: }\n",
        );
        daemon.signal(Signal::SIGHUP);
        daemon.expect_notice("RELOADING=1");
        daemon.expect_notice("READY=1");
        done.store(true, Ordering::Relaxed);
    });
    assert!(!home.log().contains("did not end"), "{}", home.log());
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn fireflies_and_requests_wait_in_the_socket_for_the_next_reader() {
    let hosts = Hosts::new();
    hosts.here.ip(&["link", "set", "lo", "up"]);
    let home = Home::with("backends: {dummy: }\n");
    let pipe = home.pipe().display().to_string();
    let configure = |n: usize| {
        let socket = home.path(&format!("api{}.sock", n % 2));
        home.configure_plugins(
            &format!(
                "  namedPipe: {{pipePath: {pipe}}}\n  firefly: {{bufferSize: {}}}\n  api: {{unixSocket: {}}}\n",
                4096 + n,
                socket.display()
            ),
            "backends: {dummy: }\n",
        );
    };
    configure(0);
    let daemon = home.start(&hosts.here);
    let (fireflies, requests) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let socket = hosts
                .here
                .enter(|| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
            while !done.load(Ordering::Relaxed) {
                let n = fireflies.fetch_add(1, Ordering::Relaxed);
                let datagram = serde_json::json!({
                    "version": 1,
                    "flow-lifecycle": {"state": "start", "start-time": "2026-01-01T00:00:00Z", "current-time": "2026-01-01T00:00:00Z"},
                    "flow-id": {"afi": "ipv4", "protocol": "tcp", "src-ip": "192.0.2.1", "dst-ip": format!("198.51.100.{}", n / 60_000), "src-port": 1 + n % 60_000, "dst-port": 1},
                    "context": {"experiment-id": 2, "activity-id": 9},
                });
                socket
                    .send_to(datagram.to_string().as_bytes(), "127.0.0.1:10514")
                    .unwrap();
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let n = requests.fetch_add(1, Ordering::Relaxed);
                let stream = hosts
                    .here
                    .enter(|| std::net::TcpStream::connect("127.0.0.1:7777").unwrap());
                let flow = serde_json::json!({
                    "state": "start", "protocol": "tcp", "src-ip": "2001:db8::1", "dst-ip": "2001:db8::2",
                    "src-port": 1 + n % 60_000, "dst-port": 1 + n / 60_000, "experiment-id": 2, "activity-id": 9,
                });
                let answer = Client::new(stream).post("/flow", &flow.to_string());
                assert_eq!(answer.status, 200);
            }
        });
        for n in 1..=20 {
            std::thread::sleep(Duration::from_millis(50));
            configure(n);
            daemon.signal(Signal::SIGHUP);
            daemon.expect_notice("RELOADING=1");
            daemon.expect_notice("READY=1");
        }
        done.store(true, Ordering::Relaxed);
    });
    let [fireflies, requests] = [fireflies, requests].map(AtomicUsize::into_inner);
    assert!(fireflies > 1000 && requests > 20, "{fireflies} {requests}");
    daemon.expect_status(&format!("plugin_events firefly accepted {fireflies}"));
    daemon.expect_status(&format!("plugin_events api accepted {requests}"));
    assert!(!home.log().contains("previous configuration"));
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_reload_that_needs_dropped_privileges_is_a_clear_error() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = Home::with("backends: {dummy: }\n");
    let daemon = home.start(&hosts.here);
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "NoNewPrivs:\t1",
    ] {
        assert!(status.contains(line), "{line}: {status}");
    }
    let marker = format!(
        "backends: {{marker: {{bpfFsPath: {}, targetInterfaces: [veth0]}}}}\n",
        bpffs.path().display()
    );
    reload(&home, &daemon, &marker);
    home.wait_for_log("reload: eBPF needs CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, which the daemon dropped at its start because nothing needed it: restart the daemon; the previous configuration stays in effect");
    daemon.stop();
    let daemon = home.start(&hosts.here);
    daemon.expect_status("backend_events marker attached 1");
    daemon.stop();
}

fn threads_and_fds(daemon: &Daemon<'_>) -> (usize, usize) {
    let count = |what: &str| {
        fs::read_dir(format!("/proc/{}/{what}", daemon.child.id()))
            .unwrap()
            .count()
    };
    (count("task"), count("fd"))
}

fn resident(daemon: &Daemon<'_>) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_hundred_reloads_leak_nothing() {
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let config = |n: usize| {
        format!(
            "backends:\n  firefly: {{sendToCollector: true, collectorAddress: localhost, collectorPort: {}, stun: {{httpServices: [], stunServers: []}}}}\n  prometheus: {{port: {}}}\n  marker: {{bpfFsPath: {}, targetInterfaces: [veth0], priority: {}}}\nenrichers: {{netlink: {{}}, period: {}}}\n",
            20_000 + n,
            9000 + n,
            bpffs.path().display(),
            10 + n,
            500 + n
        )
    };
    let home = Home::with(&config(0));
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..1000, "2 9"));
    daemon.expect_status("flows_open 1000");
    // The first reloads warm up the allocator.
    for n in 1..20 {
        reload(&home, &daemon, &config(n));
    }
    let (before, memory) = (threads_and_fds(&daemon), resident(&daemon));
    for n in 20..120 {
        reload(&home, &daemon, &config(n));
    }
    wait_for("threads and file descriptors as before", || {
        let now = threads_and_fds(&daemon);
        // A leak would be at least one per reload; some threads and files are short-lived.
        (now.0 <= before.0 + 10 && now.1 <= before.1 + 30).then_some(())
    });
    let after = resident(&daemon);
    assert!(after < memory + 3000, "{after} kB after {memory} kB");
    daemon.expect_status("flows_open 1000");
    daemon.stop();
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_reload_may_switch_to_the_format_of_flowd() {
    let ns = NetNs::new("here");
    ns.ip(&["link", "set", "lo", "up"]);
    let home = Home::with("backends: {dummy: {}}\n");
    let daemon = home.start(&ns);
    home.write(&line("start", 0, "2 9"));
    daemon.expect_status("flows_open 1");
    let state = fs::metadata(home.path("state/journal")).unwrap().ino();
    write(
        &home.path("flowd.cfg"),
        &format!(
            "PLUGIN='np_api'\nBACKEND='dummy,prometheus'\nFLOW_MAP_API='file:///nowhere'\nNP_API_FILE='{}'\nPROMETHEUS_SRV_PORT=9123\n",
            home.pipe().display()
        ),
    );
    daemon.signal(Signal::SIGHUP);
    daemon.expect_notice("RELOADING=1");
    daemon.expect_notice("READY=1");
    home.wait_for_log("reload: stateDir changed; restart the daemon to apply it");
    let page = Client::tcp(&ns, "127.0.0.1:9123").get("/metrics").body;
    assert!(
        page.contains("flowd_flows_open{act=\"9\",exp=\"atlas\"} 1")
            || page.contains("exp=\"atlas\"} 1"),
        "{page}"
    );
    assert_eq!(
        fs::metadata(home.path("state/journal")).unwrap().ino(),
        state
    );
    assert_eq!(
        fs::metadata(home.pipe()).unwrap().permissions().mode() & 0o777,
        0o666
    );
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_service_manager_that_does_not_read_blocks_neither_reload_nor_stop() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let flood = UnixDatagram::unbound().unwrap();
    flood.set_nonblocking(true).unwrap();
    while flood.send_to(b"X_FULL=1", home.path("notify")).is_ok() {}
    daemon.signal(Signal::SIGHUP);
    home.wait_for_log("has a new configuration");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_link_in_the_place_of_the_pipe_is_not_followed() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let secret = home.path("secret");
    fs::write(&secret, "").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let config = fs::read_to_string(home.path("flowd.cfg")).unwrap();
    let config = config.replace("    pipePath:", "    mode: 0622\n    pipePath:");
    fs::write(home.path("flowd.cfg"), config).unwrap();
    fs::remove_file(home.pipe()).unwrap();
    std::os::unix::fs::symlink(&secret, home.pipe()).unwrap();
    daemon.signal(Signal::SIGHUP);
    home.wait_for_log("has a new configuration");
    let mode = fs::metadata(&secret).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_reload_that_cannot_read_its_file_does_not_hold_up_a_stop() {
    let ns = NetNs::new("reload");
    let home = Home::with("backends: {dummy: }\n");
    let daemon = home.start(&ns);
    // Opening it waits for a writer.
    let config = home.path("flowd.cfg");
    fs::remove_file(&config).unwrap();
    nix::unistd::mkfifo(&config, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon.expect_notice("RELOADING=1");
    daemon.status();
    daemon.stop();
}
