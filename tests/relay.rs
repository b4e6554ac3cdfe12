//! Relayed fireflies: the formats of producers, rejected datagrams, and no relay loops.
#![allow(missing_docs)]

mod common;

use std::io::IoSlice;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::time::Duration;

use common::daemon::{Daemon, Home};
use common::net::{Hosts, NetNs};
use common::sink::Sink;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use serde_json::{Value, json};

const COLLECTOR: &str = "[2001:db8::2]:20514";

/// A daemon that listens on all addresses and sends to a collector on the other host.
fn home(backend: &str) -> Home {
    Home::with(&format!(
        "  firefly: {{bindAddress: '::'}}\nbackends:\n  firefly: {{sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514, {backend}}}\n"
    ))
}

/// A socket that sends to the daemon.
fn producer(ns: &NetNs, to: &str) -> UdpSocket {
    ns.enter(|| {
        let any = if to.starts_with('[') {
            "[::]:0"
        } else {
            "0.0.0.0:0"
        };
        let socket = UdpSocket::bind(any).unwrap();
        socket.connect(to).unwrap();
        socket
    })
}

fn near(hosts: &Hosts) -> UdpSocket {
    producer(&hosts.here, "127.0.0.1:10514")
}

fn firefly(state: &str, port: u16) -> Value {
    let mut lifecycle = json!({
        "state": state, "start-time": "2026-01-02T03:04:05.000006+00:00",
        "current-time": "2026-01-02T03:04:06.000000+00:00",
    });
    if state == "end" {
        lifecycle["end-time"] = "2026-01-02T03:04:06.500000+00:00".into();
    }
    json!({
        "version": 1, "flow-lifecycle": lifecycle,
        "flow-id": {"afi": "ipv6", "src-ip": "2001:db8::1", "dst-ip": "2001:db8::2", "protocol": "tcp", "src-port": port, "dst-port": 1094},
        "context": {"experiment-id": 2, "activity-id": 9, "application": "dcache 9.2"},
    })
}

#[test]
#[ignore = "needs root"]
fn fireflies_of_every_producer_are_relayed_completely() {
    let hosts = Hosts::new();
    let home = home("");
    let sink = Sink::bind(&hosts.there, COLLECTOR);
    let daemon = home.start(&hosts.here);
    let socket = near(&hosts);
    let relayed = |datagram: &str| {
        socket.send(datagram.as_bytes()).unwrap();
        sink.firefly().json
    };

    // XRootD and EOS: no time in the header, a float in netlink, unescaped quotes.
    let xrootd = relayed(concat!(
        r#"<134>1 - se1.example.org xrootd - firefly-json - {"version":1,"flow-lifecycle":{"state":"end","#,
        r#""current-time":"2026-01-02T03:04:07.000000+00:00","start-time":"2026-01-02T03:04:05.000006+00:00","#,
        r#""end-time":"2026-01-02T03:04:06.000000+00:00"},"usage":{"received":7,"sent":1234567890123},"#,
        r#""netlink":{"rtt":0.255},"context":{"experiment-id":1023,"activity-id":3,"application":"copy of "mine""},"#,
        r#""flow-id":{"afi":"ipv6","src-ip":"2001:db8::1","dst-ip":"2001:db8::2","protocol":"tcp","src-port":1094,"dst-port":40001}}"#,
    ));
    assert_eq!(xrootd["netlink"], json!({"rtt": 0.255}));
    assert_eq!(
        xrootd["usage"],
        json!({"received": 7, "sent": 1234567890123u64})
    );
    assert_eq!(
        xrootd["context"],
        json!({"experiment-id": 1023, "activity-id": 3, "application": "copy of \"mine\""})
    );
    assert_eq!(
        xrootd["flow-lifecycle"],
        json!({
            "state": "end", "start-time": "2026-01-02T03:04:05.000006+00:00",
            "end-time": "2026-01-02T03:04:06.000000+00:00", "current-time": "2026-01-02T03:04:07.000000+00:00",
        })
    );

    // dCache: Z times with any number of digits, empty usage, storage-stats, the remote side as source.
    for (n, digits) in ["", ".1", ".12", ".123456789"].into_iter().enumerate() {
        let dcache = concat!(
            r#"<134>1 2026-01-02T03:04:05TIMEZ pool.example.org dCache - firefly-json - {"version":1,"flow-lifecycle":{"#,
            r#""state":"start","start-time":"2026-01-02T03:04:05TIMEZ","current-time":"2026-01-02T03:04:05TIMEZ"},"usage":{},"#,
            r#""storage-stats":{"read":{"bytes":12},"io":"fast"},"context":{"experiment-id":16,"activity-id":1,"application":"dCache"},"#,
            r#""flow-id":{"afi":"ipv4","src-ip":"192.0.2.2","dst-ip":"192.0.2.1","protocol":"tcp","src-port":PORT,"dst-port":24125}}"#,
        );
        let port = (100 + n).to_string();
        let dcache = relayed(&dcache.replace("TIME", digits).replace("PORT", &port));
        assert_eq!(
            dcache["storage-stats"],
            json!({"read": {"bytes": 12}, "io": "fast"})
        );
        assert_eq!(dcache["usage"], json!({}));
        let expected = format!(
            "2026-01-02T03:04:05.{:0<6.6}+00:00",
            digits.trim_start_matches('.')
        );
        assert_eq!(dcache["flow-lifecycle"]["start-time"], expected);
        assert_eq!(dcache["flow-id"]["src-ip"], "192.0.2.2");
    }

    // flowd-go: an empty time, a local offset, no current-time, netlink and skOps.
    let flowd_go = relayed(concat!(
        r#"<134>1  se2.example.org flowd-go - firefly-json - {"version":1,"flow-lifecycle":{"state":"start","#,
        r#""start-time":"2026-01-02T05:04:05.000006+02:00","end-time":"0001-01-01T00:00:00Z"},"#,
        r#""flow-id":{"afi":"ipv6","src-ip":"2001:db8::1","dst-ip":"2001:db8::2","protocol":"udp","src-port":2345,"dst-port":5777},"#,
        r#""context":{"experiment-id":1,"activity-id":2,"application":"flowd-go"},"netlink":{"tcpInfo":{"rtt":12}},"skOps":{"x":[1,2]}}"#,
    ));
    assert_eq!(
        flowd_go["flow-lifecycle"]["start-time"],
        "2026-01-02T03:04:05.000006+00:00"
    );
    assert_eq!(flowd_go["netlink"], json!({"tcpInfo": {"rtt": 12}}));
    assert_eq!(flowd_go["skOps"], json!({"x": [1, 2]}));

    // flowd through rsyslog: its prefix instead of <PRI>, an end without a start time.
    let flowd = relayed(concat!(
        r#"Feb  1 18:54:27 se3 1 2026-01-02T03:04:05.000006+00:00 se3.example.org flowd - firefly-json - {"flow-id":"#,
        r#"{"protocol":"tcp","afi":"ipv6","dst-ip":"2001:db8::2","src-port":1094,"src-ip":"2001:db8::1","dst-port":50848},"version":1,"#,
        r#""flow-lifecycle":{"state":"end","end-time":"2026-01-02T03:04:06.000000+00:00","start-time":null,"#,
        r#""current-time":"2026-01-02T03:04:06.000001+00:00"},"context":{"experiment-id":3333,"application":"flowd v1.1.7","activity-id":1}}"#,
    ));
    assert_eq!(flowd["context"]["experiment-id"], 3333);
    assert_eq!(
        flowd["flow-lifecycle"]["start-time"],
        "2026-01-02T03:04:06.000000+00:00"
    );

    // Any other producer: no header, trailing bytes, unknown keys, an end-time without an end.
    for (n, tail) in ["\0", "\n", "  \r\n"].into_iter().enumerate() {
        let mut sent = firefly("ongoing", 2000 + n as u16);
        sent["flow-lifecycle"]["end-time"] = "2026-01-02T03:04:06.000000+00:00".into();
        sent["site"] = json!({"name": "é", "tiers": [1, 2]});
        let got = relayed(&format!("{sent}{tail}"));
        assert_eq!(got["site"], sent["site"]);
        assert_eq!(got["flow-lifecycle"]["state"], "ongoing");
    }

    // dCache sends port 0 for an unknown port. The schema does not allow it, so the sink does not check this one.
    socket
        .send(firefly("start", 0).to_string().as_bytes())
        .unwrap();
    let datagram = sink
        .datagram(Duration::from_secs(5))
        .expect("a firefly with port 0");
    assert!(
        String::from_utf8(datagram)
            .unwrap()
            .contains("\"src-port\":0,")
    );
    daemon.expect_status("plugin_events firefly accepted 11");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn invalid_fireflies_are_rejected_by_reason() {
    let hosts = Hosts::new();
    let home = home("");
    let daemon = home.start(&hosts.here);
    let socket = near(&hosts);
    let good = firefly("start", 1).to_string();
    for (from, to) in [
        ("{", "("),
        ("\"version\":1", "\"version\":7"),
        ("\"start\"", "5"),
        ("2026-01-02T03:04:05", "yesterday"),
        ("\"tcp\"", "\"sctp\""),
        ("\"2001:db8::1\"", "\"se1.example.org\""),
        ("\"src-port\":1", "\"src-port\":65536"),
        ("\"2001:db8::1\"", "\"192.0.2.1\""),
        ("\"experiment-id\":2", "\"experiment-id\":\"atlas\""),
    ] {
        let bad = good.replace(from, to);
        assert_ne!(bad, good, "{from}");
        socket.send(bad.as_bytes()).unwrap();
    }
    let long = format!("{good}{}", " ".repeat(5000));
    socket.send(long.as_bytes()).unwrap();
    for reason in [
        "json", "version", "state", "time", "protocol", "address", "port", "family", "tag",
        "length",
    ] {
        daemon.expect_status(&format!("plugin_events firefly rejected_{reason} 1"));
    }
    home.wait_for_log("firefly: rejected datagram from 127.0.0.1:");
    home.wait_for_log("version is 7, expected 1");
    for cut in 0..good.len() {
        socket.send(&good.as_bytes()[..cut]).unwrap();
    }
    let status = daemon.expect_status(&format!(
        "plugin_events firefly rejected_json {}",
        good.len() + 1
    ));
    assert!(
        !status.contains("flows_open") && !status.contains("accepted"),
        "{status}"
    );
    daemon.stop();
    let warnings = home.log().matches("rejected datagram").count();
    assert!(
        warnings < 20,
        "{warnings} lines for {} datagrams",
        good.len()
    );
}

/// Sends datagrams in batches, as fast as possible.
fn flood<T: AsRef<[u8]>>(socket: &UdpSocket, datagrams: &[T]) {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(64, None);
    for chunk in datagrams.chunks(64) {
        let slices: Vec<_> = chunk.iter().map(|d| [IoSlice::new(d.as_ref())]).collect();
        let to = vec![None; chunk.len()];
        let mut at = 0;
        while at < chunk.len() {
            let fd = socket.as_raw_fd();
            let sent = sendmmsg(
                fd,
                &mut headers,
                &slices[at..],
                &to[at..],
                [],
                MsgFlags::empty(),
            );
            at += sent.unwrap().count();
        }
    }
}

/// Waits until the plugin's counters sum up to `expected`.
fn expect_counted(daemon: &Daemon<'_>, expected: u64) -> String {
    common::wait_for(&format!("{expected} datagrams in the counters"), || {
        let status = daemon.status();
        let counted: u64 = status
            .split(", ")
            .filter(|word| word.starts_with("plugin_events ") && word.contains(" firefly "))
            .map(|word| word.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum();
        assert!(counted <= expected, "{status}");
        (counted == expected).then_some(status)
    })
}

#[test]
#[ignore = "needs root"]
fn a_million_random_datagrams_create_no_flow() {
    const ROUNDS: usize = 100;
    let hosts = Hosts::new();
    let home = home("");
    let daemon = home.start(&hosts.here);
    let socket = near(&hosts);
    // xorshift, so that failures are reproducible.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let good = format!("<134>1 - h x - firefly-json - {}", firefly("start", 7));
    for _ in 0..ROUNDS {
        let datagrams: Vec<Vec<u8>> = (0..10_000)
            .map(|n| {
                let length = random() as usize % good.len();
                match n % 3 {
                    0 => (0..length).map(|_| random() as u8).collect(),
                    // A firefly, truncated and with bytes changed.
                    _ => {
                        let mut bytes = good.as_bytes()[..length].to_vec();
                        for _ in 0..n % 3 {
                            if let Some(byte) = bytes.get_mut(random() as usize % good.len()) {
                                *byte = random() as u8;
                            }
                        }
                        bytes
                    }
                }
            })
            .collect();
        flood(&socket, &datagrams);
    }
    let status = expect_counted(&daemon, 10_000 * ROUNDS as u64);
    assert!(
        !status.contains("accepted") && !status.contains("flows_open"),
        "{status}"
    );
    // The daemon still works.
    socket.send(good.as_bytes()).unwrap();
    daemon.expect_status("flows_open 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn in_a_burst_every_datagram_is_accepted_or_counted_as_dropped() {
    const SENT: usize = 200_000;
    let hosts = Hosts::new();
    let home = home("");
    let sink = Sink::bind(&hosts.there, COLLECTOR);
    let daemon = home.start(&hosts.here);
    let socket = near(&hosts);
    let template = firefly("start", 0).to_string();
    let datagrams: Vec<String> = (0..SENT)
        .map(|n| {
            let source = format!("\"2001:db8::{:x}\"", 0x100 + n / 60_000);
            template.replace("\"2001:db8::1\"", &source).replace(
                "\"src-port\":0",
                &format!("\"src-port\":{}", 1 + n % 60_000),
            )
        })
        .collect();
    flood(&socket, &datagrams);
    let status = expect_counted(&daemon, SENT as u64);
    eprintln!("{status}");
    let count = |name: &str| {
        let word = status.split(", ").find(|word| word.starts_with(name));
        word.map_or(0, |word| {
            word.rsplit(' ').next().unwrap().parse::<usize>().unwrap()
        })
    };
    let accepted = count("plugin_events firefly accepted");
    assert_eq!(
        accepted + count("plugin_events firefly kernel_dropped"),
        SENT
    );
    daemon.expect_status(&format!("flows_open {accepted}"));
    assert_eq!(sink.collect("start", accepted).len(), accepted);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn relayed_fireflies_go_to_the_remote_end_or_only_to_the_collector() {
    let hosts = Hosts::new();
    let between = |source: &str, destination: &str, port: u16| {
        let mut firefly = firefly("start", port);
        firefly["flow-id"]["src-ip"] = source.into();
        firefly["flow-id"]["dst-ip"] = destination.into();
        firefly.to_string()
    };
    // An outgoing flow, an incoming one, and one between other hosts.
    let flows = [
        between("2001:db8::1", "2001:db8::2", 1),
        between("2001:db8::2", "2001:db8::1", 2),
        between("2001:db8:9::1", "2001:db8::2", 3),
    ];
    for (option, expected) in [
        ("", vec![1, 2]),
        ("relayed: auto", vec![1, 2]),
        ("relayed: collector", vec![]),
        ("relayed: destination", vec![1, 2, 3]),
    ] {
        let home = home(option);
        let collector = Sink::bind(&hosts.there, COLLECTOR);
        let end = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
        let daemon = home.start(&hosts.here);
        let socket = near(&hosts);
        for flow in &flows {
            socket.send(flow.as_bytes()).unwrap();
        }
        let ports = |sink: &Sink, count| {
            let flows = sink.collect("start", count);
            let mut ports: Vec<u16> = flows.keys().map(|flow| flow.source.port).collect();
            ports.sort();
            ports
        };
        assert_eq!(ports(&collector, 3), [1, 2, 3]);
        assert_eq!(ports(&end, expected.len()), expected, "{option}");
        end.assert_silent();
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn fireflies_are_accepted_from_allowed_sources() {
    let hosts = Hosts::new();
    // A sender behind a router, with an address that no network of this host contains.
    hosts
        .there
        .ip(&["addr", "add", "198.51.100.7/32", "dev", "lo"]);
    hosts
        .here
        .ip(&["route", "add", "198.51.100.7", "via", "192.0.2.2"]);
    let far = hosts.there.enter(|| {
        let socket = UdpSocket::bind("198.51.100.7:0").unwrap();
        socket.connect("192.0.2.1:10514").unwrap();
        socket
    });
    let near = near(&hosts);
    let neighbour = producer(&hosts.there, "[2001:db8::1]:10514");
    let settings = |allowed: &str| {
        Home::with(&format!(
            "  firefly: {{bindAddress: '::', {allowed}}}\nbackends:\n  firefly: {{relayed: collector}}\n"
        ))
    };
    for (allowed, accepted) in [
        ("", 2),
        ("allowedSources: ['::1', 198.51.100.0/24]", 1),
        ("allowedSources: [0.0.0.0/0, '::/0']", 3),
    ] {
        let home = settings(allowed);
        let daemon = home.start(&hosts.here);
        for (port, socket) in [&far, &near, &neighbour].into_iter().enumerate() {
            let firefly = firefly("start", 1 + port as u16).to_string();
            socket.send(firefly.as_bytes()).unwrap();
        }
        let status = expect_counted(&daemon, 3);
        assert!(
            status.contains(&format!("plugin_events firefly accepted {accepted}")),
            "{status}"
        );
        if accepted < 3 {
            let rejected = format!("plugin_events firefly rejected_source {}", 3 - accepted);
            assert!(status.contains(&rejected), "{status}");
            home.wait_for_log("plugins.firefly.allowedSources");
        }
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn a_firefly_from_outside_sends_to_no_loopback_multicast_or_broadcast_address() {
    let hosts = Hosts::new();
    let home = home("relayed: destination, destinationPort: 20514");
    let daemon = home.start(&hosts.here);
    let loopback = Sink::bind(&hosts.here, "127.0.0.9:20514");
    let victim = Sink::bind(&hosts.there, "192.0.2.2:20514");
    let outside = producer(&hosts.there, "192.0.2.1:10514");
    for (n, (source, destination)) in [
        ("192.0.2.2", "224.0.0.1"),
        ("192.0.2.2", "255.255.255.255"),
        ("192.0.2.2", "192.0.2.255"),
        ("2001:db8::2", "ff02::1"),
        ("192.0.2.2", "127.0.0.9"),
        ("127.0.0.1", "127.0.0.9"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut sent = firefly("start", 10);
        sent["flow-id"]["src-ip"] = source.into();
        sent["flow-id"]["dst-ip"] = destination.into();
        outside.send(sent.to_string().as_bytes()).unwrap();
        daemon.expect_status(&format!("backend_events firefly not_one_host {}", n + 1));
    }
    victim.assert_silent();
    loopback.assert_silent();
    daemon.stop();

    // A loopback source is not an end on this host: nothing but the collector learns of the flow.
    let home = Home::with(
        "  firefly: {bindAddress: '::'}\nbackends:\n  firefly: {destinationPort: 20514}\n",
    );
    let daemon = home.start(&hosts.here);
    let mut sent = firefly("start", 11);
    sent["flow-id"]["src-ip"] = "127.0.0.1".into();
    sent["flow-id"]["dst-ip"] = "192.0.2.2".into();
    outside.send(sent.to_string().as_bytes()).unwrap();
    let status = daemon.expect_status("backend_events firefly not_relayed 1");
    assert!(!status.contains("firefly sent"), "{status}");
    victim.assert_silent();
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn received_fireflies_cause_a_limited_rate_to_one_destination() {
    const SENT: usize = 20_000;
    let hosts = Hosts::new();
    let home = home("maxRelayRate: 5");
    let collector = Sink::bind(&hosts.there, COLLECTOR);
    let daemon = home.start(&hosts.here);
    let socket = near(&hosts);
    let datagrams: Vec<String> = (1..=SENT)
        .map(|n| firefly("start", n as u16).to_string())
        .collect();
    flood(&socket, &datagrams);
    let accepted = collector.collect("start", SENT).len();
    assert_eq!(accepted, SENT);
    home.wait_for_log("backends.firefly.maxRelayRate");
    let status = daemon.status();
    let over: usize = status
        .split(", ")
        .find_map(|word| word.strip_prefix("backend_events firefly over_rate "))
        .unwrap()
        .parse()
        .unwrap();
    assert!(over > SENT / 2, "{status}");
    // A flow of the pipe to the same destination is not limited.
    let end = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
    let lines: String = (1..=100)
        .map(|n| format!("start tcp 2001:db8::1 {} 2001:db8::2 9 2 9\n", 30_000 + n))
        .collect();
    home.write(&lines);
    let told = || end.datagram(Duration::from_millis(10)).map(|_| ());
    let mut count = 0;
    common::wait_for("the fireflies of the pipe", || {
        count += std::iter::from_fn(told).count();
        (count >= 100).then_some(())
    });
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn one_source_leaves_room_in_the_table_for_the_others() {
    let hosts = Hosts::new();
    let home = Home::with(
        "  firefly: {bindAddress: '::'}\nflows: {maxFlows: 20}\nbackends:\n  firefly: {relayed: collector}\n",
    );
    let daemon = home.start(&hosts.here);
    let line = |state: &str, n: u16| format!("{state} udp 2001:db8::1 {n} 2001:db8::2 9 2 9\n");
    let start = |ports: std::ops::Range<u16>| ports.map(|n| line("start", n)).collect::<String>();
    home.write(&start(1..26));
    daemon.expect_status("dispatcher_events refused_source_share 7");
    daemon.expect_status("flows_open 18");
    home.wait_for_log("namedPipe are open as flows.maxPerSource allows");
    let socket = near(&hosts);
    socket
        .send(firefly("start", 100).to_string().as_bytes())
        .unwrap();
    daemon.expect_status("flows_open 19");
    // An end makes room for the source, a retag does not.
    home.write(&line("start", 1).replace("2 9\n", "2 10\n"));
    home.write(&(line("end", 2) + &start(200..202)));
    daemon.expect_status("dispatcher_events refused_source_share 8");
    daemon.stop();
    // The share counts after a restart, too.
    let daemon = home.start(&hosts.here);
    home.write(&start(300..301));
    daemon.expect_status("dispatcher_events refused_source_share 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn nothing_is_sent_to_the_daemons_own_listener() {
    let hosts = Hosts::new();
    let own = "  firefly: {bindAddress: BIND}\nbackends:\n  firefly: {sendToCollector: true, collectorAddress: COLLECTOR, relayed: destination}\n";
    for (bind, collector, source, destination) in [
        ("0.0.0.0", "127.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("'::'", "127.0.0.1", "127.0.0.1", "192.0.2.1"),
        (
            "'2001:db8::1'",
            "'2001:db8::1'",
            "2001:db8::1",
            "2001:db8::1",
        ),
    ] {
        let home = Home::with(&own.replace("BIND", bind).replace("COLLECTOR", collector));
        let daemon = home.start(&hosts.here);
        home.write(&format!("start tcp {source} 1 {destination} 2 2 9\n"));
        // If the collector is the destination, there is only one datagram.
        let each = if collector.contains(destination) {
            1
        } else {
            2
        };
        daemon.expect_status(&format!("backend_events firefly own_listener {each}"));
        let to = if source.contains(':') {
            "[2001:db8::1]:10514"
        } else {
            "192.0.2.1:10514"
        };
        let mut sent = firefly("start", 9);
        sent["flow-id"]["src-ip"] = source.into();
        sent["flow-id"]["dst-ip"] = destination.into();
        producer(&hosts.here, to)
            .send(sent.to_string().as_bytes())
            .unwrap();
        daemon.expect_status("plugin_events firefly accepted 1");
        let both = 2 * each;
        let status = daemon.expect_status(&format!("backend_events firefly own_listener {both}"));
        assert!(!status.contains("firefly sent"), "{status}");
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn two_daemons_that_relay_to_each_other_cause_no_storm() {
    let hosts = Hosts::new();
    let relay = |collector: &str| {
        Home::with(&format!(
            "  firefly: {{bindAddress: '::'}}\nbackends:\n  firefly: {{sendToCollector: true, collectorAddress: '{collector}', relayed: destination}}\n"
        ))
    };
    let (home_a, home_b) = (relay("2001:db8::2"), relay("2001:db8::1"));
    let a = home_a.start(&hosts.here);
    let b = home_b.start(&hosts.there);
    let socket = near(&hosts);
    const FLOWS: u16 = 100;
    for n in 1..=FLOWS {
        for state in ["start", "ongoing", "end"] {
            socket
                .send(firefly(state, n).to_string().as_bytes())
                .unwrap();
        }
    }
    home_b.write(
        "start tcp 2001:db8::2 1 2001:db8::1 2 2 9\nend tcp 2001:db8::2 1 2001:db8::1 2 2 9\n",
    );
    a.expect_status(&format!("dispatcher_events ended {}", FLOWS + 1));
    b.expect_status(&format!("dispatcher_events ended {}", FLOWS + 1));
    let sent = |daemon: &Daemon<'_>| {
        let status = daemon.status();
        let word = status
            .split(", ")
            .find(|w| w.starts_with("backend_events firefly sent"))
            .unwrap();
        word.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    // The daemons stop sending.
    let settled = common::wait_for("the daemons to stop sending", || {
        let before = sent(&a) + sent(&b);
        std::thread::sleep(Duration::from_millis(200));
        (sent(&a) + sent(&b) == before).then_some(before)
    });
    // Each daemon relays each event once.
    assert!(settled <= 2 * (3 * u64::from(FLOWS) + 2), "{settled} sent");
    a.stop();
    b.stop();
}
