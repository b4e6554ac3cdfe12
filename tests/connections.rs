//! The connections of this host as flows: found, enriched, and ended with their sockets.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use common::daemon::{Daemon, Home, PROGRAM};
use common::net::Hosts;
use common::sink::Sink;
use common::{DEADLINE, wait_for};
use flowd_rs::event::FlowEvent;
use flowd_rs::flow::Flow;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt,
};
use serde_json::Value;

/// Addresses outside all special-purpose networks.
const HERE4: &str = "42.0.0.1";
const THERE4: &str = "42.0.0.2";
const HERE6: &str = "2a00:1::1";
const THERE6: &str = "2a00:1::2";
const SINK: &str = "[2001:db8::2]:20514";

fn hosts() -> Hosts {
    let hosts = Hosts::new();
    for (ns, v4, v6) in [(&hosts.here, HERE4, HERE6), (&hosts.there, THERE4, THERE6)] {
        ns.ip(&["addr", "add", &format!("{v4}/24"), "dev", "veth0"]);
        ns.ip(&["addr", "add", &format!("{v6}/64"), "dev", "veth0", "nodad"]);
    }
    hosts
}

/// `plugins` is the YAML of plugins, each line indented by two spaces; `firefly` is that of the firefly backend's options.
fn home(plugins: &str, firefly: &str) -> Home {
    Home::with(&format!(
        "{plugins}backends:\n  firefly: {{sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514, {firefly}}}\n"
    ))
}

const NETLINK: &str = "  netlink: {experiment: atlas, activity: Data Challenge, period: 200, internalNetworks: ['42.0.1.0/24', '2a00:1:9::/48']}\n";

fn listen(hosts: &Hosts, address: &str) -> TcpListener {
    hosts.there.enter(|| TcpListener::bind(address).unwrap())
}

/// Connects from here to a listener there, and returns both ends.
fn connect(hosts: &Hosts, listener: &TcpListener, to: &str) -> (TcpStream, TcpStream) {
    let to: SocketAddr = format!("{to}:{}", listener.local_addr().unwrap().port())
        .parse()
        .unwrap();
    let near = hosts
        .here
        .enter(|| TcpStream::connect_timeout(&to, DEADLINE).unwrap());
    let far = listener.accept().unwrap().0;
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    near.set_read_timeout(Some(DEADLINE)).unwrap();
    (near, far)
}

/// Sends and receives the given numbers of bytes at the near end.
fn exchange(near: &mut TcpStream, far: &mut TcpStream, sent: usize, received: usize) {
    let copy = |from: &mut TcpStream, to: &mut TcpStream, bytes: usize| {
        std::thread::scope(|scope| {
            scope.spawn(move || from.write_all(&vec![7; bytes]).unwrap());
            let mut buffer = vec![0; bytes];
            to.read_exact(&mut buffer).unwrap();
        });
    };
    copy(near, far, sent);
    copy(far, near, received);
}

/// Closes the far end first, as a client of a storage service does.
fn close(mut near: TcpStream, far: TcpStream) {
    drop(far);
    assert_eq!(near.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(near);
}

/// A count of the status line, whose name is given as in there; 0 if it is not there.
fn count(status: &str, name: &str) -> u64 {
    let word = status
        .split([',', ':'])
        .find_map(|word| word.trim().strip_prefix(name)?.strip_prefix(' '));
    word.map_or(0, |count| count.parse().unwrap())
}

/// Waits for another scan by `scanner`, which is `plugin_events netlink` or `enricher_events netlink`.
fn wait_for_scan(daemon: &Daemon<'_>, scanner: &str) {
    let scans = || count(&daemon.status(), &format!("{scanner} scanned"));
    let before = scans();
    wait_for("another scan", || (scans() > before + 1).then_some(()));
}

#[test]
#[ignore = "needs root"]
fn each_connection_is_announced_and_ends_with_exact_counts() {
    let hosts = hosts();
    let home = home(NETLINK, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let v6 = listen(&hosts, "[::]:5000");
    let existing = connect(&hosts, &v6, &format!("[{THERE6}]"));
    let daemon = home.start(&hosts.here);
    wait_for_scan(&daemon, "plugin_events netlink");
    let v4 = listen(&hosts, "42.0.0.2:5001");
    // IPv6, IPv4, and IPv4 to a listener of both.
    let mut connections = vec![
        connect(&hosts, &v6, &format!("[{THERE6}]")),
        connect(&hosts, &v4, THERE4),
        connect(&hosts, &v6, THERE4),
    ];
    let starts = sink.collect("start", 3);
    for (near, _) in &connections {
        let (source, to) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
        let start = starts
            .values()
            .find(|s| s.flow.source.socket_addr() == source)
            .unwrap();
        assert_eq!(start.flow.destination.socket_addr(), to);
        assert_eq!((start.tag().experiment, start.tag().activity), (2, 26));
    }
    let mut expected = HashMap::new();
    for (n, (near, far)) in connections.iter_mut().enumerate() {
        let (sent, received) = (100_000 * (n + 1), 3000 * (n + 1));
        exchange(near, far, sent, received);
        expected.insert(near.local_addr().unwrap(), (sent as u64, received as u64));
    }
    // A half-closed connection is still open.
    connections[0].0.shutdown(Shutdown::Write).unwrap();
    wait_for_scan(&daemon, "plugin_events netlink");
    assert_eq!(sink.drain(Duration::from_millis(100)), []);
    connections
        .into_iter()
        .for_each(|(near, far)| close(near, far));
    for (flow, end) in sink.collect("end", 3) {
        let usage = end.usage.unwrap();
        let counts = (usage.sent.unwrap(), usage.received.unwrap());
        assert_eq!(counts, expected[&flow.source.socket_addr()]);
        assert_eq!(end.start_time, starts[&flow].start_time);
    }
    // A connection that was open before the daemon started is not reported.
    close(existing.0, existing.1);
    wait_for_scan(&daemon, "plugin_events netlink");
    assert_eq!(sink.drain(Duration::from_millis(100)), []);
    daemon.expect_status("dispatcher_events ended_socket_closed 3");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn private_internal_listening_and_unanswered_ones_are_left_out() {
    let hosts = hosts();
    hosts
        .here
        .ip(&["addr", "add", "42.0.1.1/24", "dev", "veth0"]);
    hosts
        .there
        .ip(&["addr", "add", "42.0.1.2/24", "dev", "veth0"]);
    let home = home(NETLINK, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    wait_for_scan(&daemon, "plugin_events netlink");
    let any = listen(&hosts, "[::]:5000");
    let here = hosts.here.enter(|| TcpListener::bind("[::]:5000").unwrap());
    let mut left_out = vec![
        connect(&hosts, &any, "192.0.2.2"),
        connect(&hosts, &any, "[2001:db8::2]"),
        connect(&hosts, &any, "42.0.1.2"),
    ];
    // To itself, and on loopback.
    for to in ["42.0.0.1:5000", "127.0.0.1:5000"] {
        let to: SocketAddr = to.parse().unwrap();
        let near = hosts.here.enter(|| TcpStream::connect(to).unwrap());
        left_out.push((near, here.accept().unwrap().0));
    }
    // An address that does not answer, and a port without a listener.
    hosts.here.enter(|| {
        let _ =
            TcpStream::connect_timeout(&"42.0.0.77:1".parse().unwrap(), Duration::from_millis(300));
        let _ = TcpStream::connect_timeout(&"42.0.0.2:1".parse().unwrap(), DEADLINE);
    });
    wait_for_scan(&daemon, "plugin_events netlink");
    left_out
        .into_iter()
        .for_each(|(near, far)| close(near, far));
    wait_for_scan(&daemon, "plugin_events netlink");
    assert_eq!(sink.drain(Duration::from_millis(100)), []);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_connection_shorter_than_a_period_has_a_start_and_an_end() {
    let hosts = hosts();
    let home = home(&NETLINK.replace("period: 200", "period: 60000"), "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    daemon.expect_status("plugin_events netlink scanned 1");
    let listener = listen(&hosts, "[::]:5000");
    const SHORT: usize = 50;
    for _ in 0..SHORT {
        let (mut near, mut far) = connect(&hosts, &listener, &format!("[{THERE6}]"));
        exchange(&mut near, &mut far, 1000, 10);
        close(near, far);
    }
    let events = wait_for("the ends of all", || {
        let status = daemon.status();
        status
            .contains(&format!("plugin_events netlink ended {SHORT}"))
            .then(|| sink.drain(Duration::from_millis(200)))
    });
    let of = |state: &str| -> HashMap<Flow, &FlowEvent> {
        let wanted = events.iter().filter(|e| e.state.as_str() == state);
        wanted.map(|e| (e.flow, e)).collect()
    };
    assert_eq!((of("start").len(), of("end").len()), (SHORT, SHORT));
    assert!(
        of("end")
            .values()
            .all(|e| e.usage.unwrap().sent == Some(1000))
    );
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn existing_connections_are_announced_on_request_and_rules_pick_the_tag() {
    let hosts = hosts();
    let rules = "[{remotePorts: [5001], experiment: cms, activity: Cache}, {remoteNetworks: ['2a00::/16'], uid: root, experiment: 16, activity: 1}]";
    let home = home(
        &format!("  netlink: {{period: 100, announceExisting: true, rules: {rules}}}\n"),
        "",
    );
    let sink = Sink::bind(&hosts.there, SINK);
    let listeners = [5000, 5001].map(|port| listen(&hosts, &format!("[::]:{port}")));
    let _open = [
        connect(&hosts, &listeners[0], &format!("[{THERE6}]")),
        connect(&hosts, &listeners[1], THERE4),
        // No rule matches this one.
        connect(&hosts, &listeners[0], THERE4),
    ];
    let daemon = home.start(&hosts.here);
    let starts = sink.collect("start", 2);
    let mut tags: Vec<_> = starts
        .values()
        .map(|s| (s.flow.destination.port, s.tag().experiment))
        .collect();
    tags.sort();
    assert_eq!(tags, [(5000, 16), (5001, 3)]);
    sink.assert_silent();
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn netstat_sees_the_same_without_privileges() {
    let hosts = hosts();
    let home = home(&NETLINK.replace("netlink", "netstat"), "");
    let sink = Sink::bind(&hosts.there, SINK);
    let mut command = hosts.here.command("setpriv");
    command.args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--bounding-set=-all",
        PROGRAM,
    ]);
    std::fs::set_permissions(
        home.dir.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let daemon = home.start_command(command, &[]);
    wait_for_scan(&daemon, "plugin_events netstat");
    let listener = listen(&hosts, "[::]:5000");
    let connections =
        [format!("[{THERE6}]"), THERE4.to_owned()].map(|to| connect(&hosts, &listener, &to));
    let starts = sink.collect("start", 2);
    assert!(starts.values().all(|s| s.tag().experiment == 2));
    connections
        .into_iter()
        .for_each(|(near, far)| close(near, far));
    assert_eq!(sink.collect("end", 2).len(), 2);
    daemon.stop();
}

/// A connection that the remote end resets has ended, but its socket exists until its owner closes it; the kernel sends the
/// notification only then.
#[test]
#[ignore = "needs root"]
fn a_connection_that_is_reset_ends_once_however_long_its_socket_is_kept() {
    let hosts = hosts();
    let home = home(NETLINK, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    wait_for_scan(&daemon, "plugin_events netlink");
    let listener = listen(&hosts, "[::]:5000");
    let (mut near, far) = connect(&hosts, &listener, THERE4);
    sink.collect("start", 1);
    // Closing a socket with unread data resets the connection.
    near.write_all(b"unread").unwrap();
    wait_for("the bytes", || {
        (far.peek(&mut [0; 6]).unwrap() == 6).then_some(())
    });
    drop(far);
    sink.collect("end", 1);
    wait_for_scan(&daemon, "plugin_events netlink");
    drop(near);
    sink.assert_silent();
    daemon.expect_status("plugin_events netlink ended 1");
    daemon.stop();
}

/// Closed by the local end first: a socket that only waits for the remote FIN is not a connection.
#[test]
#[ignore = "needs root"]
fn a_connection_that_only_the_local_end_has_closed_is_one_flow() {
    let hosts = hosts();
    for plugin in [NETLINK.to_owned(), NETLINK.replace("netlink", "netstat")] {
        let home = home(&plugin, "");
        let sink = Sink::bind(&hosts.there, SINK);
        let daemon = home.start(&hosts.here);
        let name = if plugin == NETLINK {
            "netlink"
        } else {
            "netstat"
        };
        wait_for_scan(&daemon, &format!("plugin_events {name}"));
        let listener = listen(&hosts, "[::]:5000");
        let (near, far) = connect(&hosts, &listener, THERE4);
        sink.collect("start", 1);
        drop(near);
        sink.collect("end", 1);
        wait_for_scan(&daemon, &format!("plugin_events {name}"));
        sink.assert_silent();
        drop(far);
        daemon.stop();
    }
}

/// The kernel discards the counts of a connection that the local end resets.
#[test]
#[ignore = "needs root"]
fn a_connection_that_the_local_end_resets_ends_whichever_source_reported_it() {
    let hosts = hosts();
    for plugin in ["", NETLINK] {
        let home = home(plugin, "");
        let config = std::fs::read_to_string(home.path("flowd.cfg")).unwrap();
        let config = config + "enrichers: {period: 200, netlink: {}}\n";
        std::fs::write(home.path("flowd.cfg"), config).unwrap();
        let sink = Sink::bind(&hosts.there, SINK);
        let daemon = home.start(&hosts.here);
        if !plugin.is_empty() {
            // Connections that are open at the first scan are not announced.
            wait_for_scan(&daemon, "plugin_events netlink");
        }
        let listener = listen(&hosts, "[::]:5000");
        let (mut near, mut far) = connect(&hosts, &listener, THERE4);
        if plugin.is_empty() {
            let port = near.local_addr().unwrap().port();
            home.write(&format!("start tcp {HERE4} {port} {THERE4} 5000 2 9\n"));
        }
        sink.collect("start", 1);
        exchange(&mut near, &mut far, 1000, 10);
        wait_for_scan(&daemon, "enricher_events netlink");
        let linger = nix::libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        setsockopt(&near, sockopt::Linger, &linger).unwrap();
        drop(near);
        sink.collect("end", 1);
        daemon.stop();
    }
}

/// The owner of a closed socket is unknown.
#[test]
#[ignore = "needs root"]
fn a_rule_with_an_owner_does_not_match_connections_without_one() {
    let hosts = hosts();
    let rules = "rules: [{uid: 0, experiment: 3, activity: 3}]";
    let plugin = NETLINK.replace("period: 200", &format!("period: 60000, {rules}"));
    let home = home(&plugin, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    daemon.expect_status("plugin_events netlink scanned 1");
    let listener = listen(&hosts, "[::]:5000");
    let (near, far) = connect(&hosts, &listener, THERE4);
    close(near, far);
    let start = sink.collect("start", 1).into_values().next().unwrap();
    assert_eq!(start.tag().experiment, 2);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn five_thousand_connections_at_once() {
    const MANY: usize = 5000;
    let hosts = hosts();
    let home = home(NETLINK, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    wait_for_scan(&daemon, "plugin_events netlink");
    let listener = listen(&hosts, "[::]:5000");
    let open: Vec<_> = (0..MANY)
        .map(|_| connect(&hosts, &listener, &format!("[{THERE6}]")))
        .collect();
    assert_eq!(sink.collect("start", MANY).len(), MANY);
    daemon.expect_status(&format!("flows_open {MANY}"));
    open.into_iter().for_each(|(near, far)| close(near, far));
    assert_eq!(sink.collect("end", MANY).len(), MANY);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_flow_ends_with_its_socket_whichever_source_reported_it() {
    let hosts = hosts();
    let sink = Sink::bind(&hosts.there, SINK);
    for end in [true, false] {
        let home = home("", "");
        home.configure(&format!(
            "flows: {{endOnSocketClose: {end}}}\nbackends:\n  firefly: {{sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514}}\n"
        ));
        let daemon = home.start(&hosts.here);
        let listener = listen(&hosts, "[::]:5000");
        let (mut near, mut far) = connect(&hosts, &listener, THERE4);
        let (source, port) = (near.local_addr().unwrap(), near.peer_addr().unwrap().port());
        // In the direction from the remote end, as dCache reports it.
        let line = |state: &str| {
            format!(
                "{state} tcp {THERE4} {port} {HERE4} {} 2 9\n",
                source.port()
            )
        };
        home.write(&line("start"));
        sink.collect("start", 1);
        exchange(&mut near, &mut far, 5000, 700);
        // A killed service does not report the end.
        close(near, far);
        if end {
            let ended = sink.collect("end", 1).into_values().next().unwrap();
            let usage = ended.usage.unwrap();
            assert_eq!((usage.sent, usage.received), (Some(5000), Some(700)));
            daemon.expect_status("dispatcher_events ended_socket_closed 1");
            home.write(&line("end"));
            daemon.expect_status("dispatcher_events ended_already 1");
            sink.assert_silent();
        } else {
            std::thread::sleep(Duration::from_millis(1500));
            sink.assert_silent();
            daemon.expect_status("flows_open 1");
        }
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn an_end_that_comes_before_the_socket_closes_has_the_counts_so_far() {
    let hosts = hosts();
    let sink = Sink::bind(&hosts.there, SINK);
    let home = home("", "");
    let daemon = home.start(&hosts.here);
    let listener = listen(&hosts, "[::]:5000");
    for to in [THERE4.to_owned(), format!("[{THERE6}]")] {
        let (mut near, mut far) = connect(&hosts, &listener, &to);
        exchange(&mut near, &mut far, 1234, 567);
        home.write(&line_of("start", &near));
        sink.collect("start", 1);
        home.write(&line_of("end", &near));
        let usage = sink.firefly().event.usage.unwrap();
        assert_eq!((usage.sent, usage.received), (Some(1234), Some(567)));
        close(near, far);
    }
    daemon.stop();
}

/// As after a transfer whose client has closed: the service reports the end, and closes its socket.
#[test]
#[ignore = "needs root"]
fn an_end_with_its_socket_has_the_last_counts_whichever_comes_first() {
    let hosts = hosts();
    let home = home("", "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let listener = listen(&hosts, "[::]:5000");
    for n in 0..200 {
        let (mut near, mut far) = connect(&hosts, &listener, THERE4);
        home.write(&line_of("start", &near));
        sink.collect("start", 1);
        exchange(&mut near, &mut far, 5000, 700);
        let end = line_of("end", &near);
        let mut pipe = home.writer();
        if n % 2 == 0 {
            drop(far);
            pipe.write_all(end.as_bytes()).unwrap();
            drop(near);
        } else {
            pipe.write_all(end.as_bytes()).unwrap();
            drop((near, far));
        }
        let usage = sink.firefly().event.usage;
        let usage = usage.unwrap_or_else(|| panic!("{n}: no counts"));
        assert_eq!((usage.sent, usage.received), (Some(5000), Some(700)));
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_connection_that_closes_while_the_daemon_is_down_is_ended_by_the_next() {
    let hosts = hosts();
    let home = home(NETLINK, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    wait_for_scan(&daemon, "plugin_events netlink");
    let listener = listen(&hosts, "[::]:5000");
    let (gone, stays) = (
        connect(&hosts, &listener, THERE4),
        connect(&hosts, &listener, THERE4),
    );
    let starts = sink.collect("start", 2);
    daemon.kill();
    let source = gone.0.local_addr().unwrap();
    close(gone.0, gone.1);
    let daemon = home.start(&hosts.here);
    let end = sink.collect("end", 1).into_values().next().unwrap();
    assert_eq!(end.flow.source.socket_addr(), source);
    assert_eq!(end.start_time, starts[&end.flow].start_time);
    // The other connection ends normally, although this daemon has not announced it.
    close(stays.0, stays.1);
    assert_eq!(sink.collect("end", 1).len(), 1);
    daemon.stop();
}

/// The output of `ss` for the socket with this local address.
fn ss(hosts: &Hosts, source: SocketAddr) -> String {
    let filter = format!("sport = :{}", source.port());
    let output = hosts
        .here
        .command("ss")
        .args(["-tinH", "-e", &filter])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs root"]
fn enriched_fireflies_agree_with_ss() {
    let hosts = hosts();
    let listener = listen(&hosts, "[::]:5000");
    for mode in ["lean", "compatible", "flowd", "''"] {
        let sink = Sink::bind(&hosts.there, SINK);
        let enrichers = "enrichers: {period: 200}\n";
        let home = home("", &format!("enrich: true, enrichmentMode: {mode}"));
        let config = std::fs::read_to_string(home.path("flowd.cfg")).unwrap();
        std::fs::write(home.path("flowd.cfg"), config + enrichers).unwrap();
        let daemon = home.start(&hosts.here);
        let (mut near, mut far) = connect(&hosts, &listener, THERE4);
        let source = near.local_addr().unwrap();
        exchange(&mut near, &mut far, 50_000, 20_000);
        home.write(&format!(
            "start tcp {HERE4} {} {THERE4} 5000 2 9\n",
            source.port()
        ));
        let datagram = |state: &str| -> Value {
            wait_for("a firefly", || {
                let datagram = sink.datagram(DEADLINE)?;
                assert!(
                    mode == "''" || datagram.len() <= 1452,
                    "{} bytes",
                    datagram.len()
                );
                let text = String::from_utf8(datagram).unwrap();
                let json: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
                (json["flow-lifecycle"]["state"] == state).then_some(json)
            })
        };
        let start = datagram("start");
        assert!(start["netlink"].is_object(), "{start}");
        // By the second report, the numbers of both include the last acknowledgement.
        datagram("ongoing");
        let ongoing = datagram("ongoing");
        let output = ss(&hosts, source);
        let value = |key: &str| -> f64 {
            let word = output
                .split_whitespace()
                .find_map(|w| w.strip_prefix(&format!("{key}:")));
            let word = word.unwrap_or_else(|| panic!("{key} is not in {output}"));
            word.split('/').next().unwrap().parse().unwrap()
        };
        let netlink = &ongoing["netlink"];
        let (info, ms) = match mode {
            "lean" | "''" => (&netlink["tcpInfo"], 1000.0),
            "flowd" => (&netlink["tcp_info"], 1.0),
            _ => (netlink, 1.0),
        };
        let close_to = |found: &Value, expected: f64| {
            let found = found.as_f64().unwrap_or_else(|| panic!("{netlink}"));
            assert!(
                (found - expected).abs() <= 0.05 * expected + 0.01,
                "{mode}: {found} is not {expected}"
            );
        };
        close_to(&info["rtt"], value("rtt") * ms);
        let mss = if ms == 1.0 { "snd_mss" } else { "sndMss" };
        assert_eq!(info[mss], value("mss") as u64);
        let cwnd = if ms == 1.0 { "snd_cwnd" } else { "sndCwnd" };
        assert_eq!(info[cwnd], value("cwnd") as u64);
        assert_eq!(ongoing["usage"]["sent"], value("bytes_sent") as u64);
        assert_eq!(ongoing["usage"]["received"], value("bytes_received") as u64);
        let algorithm = match mode {
            "lean" | "''" => &netlink["cong"]["algorithm"],
            "flowd" => &netlink["cong_algo"],
            _ => &Value::Null,
        };
        assert!(
            algorithm.is_null() || output.contains(&format!(" {} ", algorithm.as_str().unwrap())),
            "{output}"
        );
        if mode == "compatible" {
            assert_eq!(netlink["state"], "established");
            close_to(&netlink["rto"], value("rto"));
            assert_eq!(netlink["pmtu"], value("pmtu") as u64);
        }
        close(near, far);
        let end = datagram("end");
        assert_eq!(
            end["usage"],
            serde_json::json!({"sent": 50_000, "received": 20_000})
        );
        assert!(end["netlink"].is_object());
        daemon.stop();
    }
}

/// Whether every subscription to notifications of closed sockets has lost some, by the kernel's count.
fn has_lost_notifications(daemon: &Daemon<'_>) -> bool {
    let table = format!("/proc/{}/net/netlink", daemon.child.id());
    let table = std::fs::read_to_string(table).unwrap();
    let lines = table.lines().map(|line| line.split_whitespace().collect());
    let mut subscribed = lines
        .filter(|column: &Vec<&str>| column[1] == "4" && column[3] != "00000000")
        .peekable();
    assert!(subscribed.peek().is_some());
    subscribed.all(|column| column[8] != "0")
}

#[test]
#[ignore = "needs root"]
fn a_scan_makes_up_for_lost_notifications() {
    const OPEN: usize = 200;
    let hosts = hosts();
    let listener = listen(&hosts, "[::]:5000");
    let netlink = NETLINK.replace("period: 200", "period: 60000, announceExisting: true");
    for (scanner, reporter) in [("enricher_events", ""), ("plugin_events", netlink.as_str())] {
        let home = home(reporter, "");
        let config = std::fs::read_to_string(home.path("flowd.cfg")).unwrap();
        let end = format!(
            "flows: {{endOnSocketClose: {}}}\n",
            scanner == "enricher_events"
        );
        let config = config + &end + "enrichers: {period: 500, netlink: {}}\n";
        std::fs::write(home.path("flowd.cfg"), config).unwrap();
        let sink = Sink::bind(&hosts.there, SINK);
        let open: Vec<_> = (0..OPEN)
            .map(|_| connect(&hosts, &listener, THERE4))
            .collect();
        // Without CAP_NET_ADMIN the receive buffer of the notifications is smaller.
        let mut command = hosts.here.command("setpriv");
        command.args([
            "--bounding-set=-net_admin",
            "--inh-caps=-net_admin",
            PROGRAM,
        ]);
        let daemon = home.start_command(command, &[]);
        if scanner == "enricher_events" {
            let line = |(near, _): &(TcpStream, TcpStream)| {
                let port = near.local_addr().unwrap().port();
                format!("start tcp {HERE4} {port} {THERE4} 5000 2 9\n")
            };
            home.write(&open.iter().map(line).collect::<String>());
        }
        sink.collect("start", OPEN);
        wait_for_scan(&daemon, "enricher_events netlink");
        daemon.signal(nix::sys::signal::Signal::SIGSTOP);
        while !has_lost_notifications(&daemon) {
            for _ in 0..500 {
                let (near, far) = connect(&hosts, &listener, THERE4);
                close(near, far);
            }
        }
        let ports: Vec<u16> = open
            .iter()
            .map(|(near, _)| near.local_addr().unwrap().port())
            .collect();
        open.into_iter().for_each(|(near, far)| close(near, far));
        daemon.signal(nix::sys::signal::Signal::SIGCONT);
        let mut ended = std::collections::HashSet::new();
        wait_for("the ends of the open ones", || {
            let events = sink.drain(Duration::from_millis(50));
            let ends = events.iter().filter(|e| e.state.as_str() == "end");
            ended.extend(ends.map(|e| e.flow.source.port));
            ports.iter().all(|port| ended.contains(port)).then_some(())
        });
        let status = daemon.status();
        assert!(
            status.contains(&format!("{scanner} netlink overrun ")),
            "{status}"
        );
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn the_flows_of_a_killed_service_end_with_any_congestion_control() {
    let hosts = hosts();
    let home = home(NETLINK, "enrich: true, enrichmentMode: ''");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    wait_for_scan(&daemon, "plugin_events netlink");
    let listener = listen(&hosts, "[::]:5000");
    let available = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control");
    let available = available.unwrap();
    let both = ["cubic", "bbr"]
        .into_iter()
        .filter(|name| available.contains(name));
    for algorithm in both {
        let (mut near, mut far) = connect(&hosts, &listener, THERE4);
        let name = std::ffi::OsString::from(algorithm);
        nix::sys::socket::setsockopt(&near, nix::sys::socket::sockopt::TcpCongestion, &name)
            .unwrap();
        // From here on, the socket belongs to a service.
        exchange(&mut near, &mut far, 70_000, 10);
        // The command holds the socket, too, until it is dropped.
        let mut service = {
            let mut command = Command::new("sleep");
            let command = command.arg("60").stdin(OwnedFd::from(near));
            command.spawn().unwrap()
        };
        let json = |state: &str| -> Value {
            wait_for("a firefly", || {
                let datagram = sink.datagram(DEADLINE)?;
                let text = String::from_utf8(datagram).unwrap();
                let json: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
                (json["flow-lifecycle"]["state"] == state).then_some(json)
            })
        };
        let ongoing = json("ongoing");
        assert_eq!(ongoing["netlink"]["cong"]["algorithm"], algorithm);
        assert_eq!(
            ongoing["netlink"]["bbr"].is_object(),
            algorithm == "bbr",
            "{ongoing}"
        );
        service.kill().unwrap();
        service.wait().unwrap();
        drop(far);
        let end = json("end");
        assert_eq!(end["usage"]["sent"], 70_000);
        assert!(end["netlink"]["tcpInfo"].is_object());
    }
    daemon.stop();
}

/// Connects from this port here, which a connection that has just closed may have had.
fn connect_from(hosts: &Hosts, listener: &TcpListener, port: u16) -> (TcpStream, TcpStream) {
    let address = |ip: &str, port: u16| -> SockaddrIn {
        let address: std::net::SocketAddrV4 = format!("{ip}:{port}").parse().unwrap();
        address.into()
    };
    let near = hosts.here.enter(|| {
        let near = socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        setsockopt(&near, sockopt::ReuseAddr, &true).unwrap();
        bind(near.as_raw_fd(), &address(HERE4, port)).unwrap();
        let to = address(THERE4, listener.local_addr().unwrap().port());
        nix::sys::socket::connect(near.as_raw_fd(), &to).unwrap();
        TcpStream::from(near)
    });
    let far = listener.accept().unwrap().0;
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    near.set_read_timeout(Some(DEADLINE)).unwrap();
    (near, far)
}

fn line_of(state: &str, near: &TcpStream) -> String {
    let (source, destination) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
    format!(
        "{state} tcp {} {} {} {} 2 9\n",
        source.ip(),
        source.port(),
        destination.ip(),
        destination.port()
    )
}

#[test]
#[ignore = "needs root"]
fn a_start_on_the_ports_of_a_closed_connection_is_a_flow_of_its_own() {
    let hosts = hosts();
    let home = home("", "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let listener = listen(&hosts, "[::]:5000");
    let (mut near, mut far) = connect_from(&hosts, &listener, 6001);
    let start = line_of("start", &near);
    home.write(&start);
    let first = sink.firefly().event;
    exchange(&mut near, &mut far, 100, 7);
    close(near, far);
    daemon.expect_status("dispatcher_events socket_closing 1");
    let (mut near, mut far) = connect_from(&hosts, &listener, 6001);
    home.write(&start);
    let end = sink.firefly().event;
    assert_eq!(
        (end.state.as_str(), end.start_time),
        ("end", first.start_time)
    );
    assert_eq!(end.usage.and_then(|usage| usage.sent), Some(100));
    let second = sink.firefly().event;
    assert_eq!(second.state.as_str(), "start");
    assert_ne!(second.start_time, first.start_time);
    // Longer than the grace of the flow before.
    assert_eq!(sink.drain(Duration::from_millis(1500)), []);
    exchange(&mut near, &mut far, 50, 5);
    home.write(&line_of("end", &near));
    let end = sink.firefly().event;
    assert_eq!(end.start_time, second.start_time);
    assert_eq!(end.usage.and_then(|usage| usage.sent), Some(50));
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn late_notifications_of_former_sockets_do_not_end_live_flows() {
    const PORTS: std::ops::Range<u16> = 6000..6040;
    let hosts = hosts();
    let home = home("", "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let listener = listen(&hosts, "[::]:5000");
    let open: Vec<_> = PORTS
        .map(|port| connect_from(&hosts, &listener, port))
        .collect();
    home.write(
        &open
            .iter()
            .map(|(near, _)| line_of("start", near))
            .collect::<String>(),
    );
    sink.collect("start", PORTS.len());
    let mut pipe = home.writer();
    let mut next = Vec::new();
    for (mut near, mut far) in open {
        exchange(&mut near, &mut far, 100, 7);
        let lines = line_of("end", &near) + &line_of("start", &near);
        let port = near.local_addr().unwrap().port();
        close(near, far);
        next.push(connect_from(&hosts, &listener, port));
        pipe.write_all(lines.as_bytes()).unwrap();
    }
    let mut events = sink.drain(Duration::from_millis(1500));
    events.retain(|event| event.state.as_str() != "start");
    assert_eq!(
        events.len(),
        PORTS.len(),
        "one end of each former connection"
    );
    daemon.expect_status(&format!("flows_open {}", PORTS.len()));
    for (near, far) in &mut next {
        exchange(near, far, 10, 1);
        home.write(&line_of("end", near));
        let end = sink.firefly().event;
        assert_eq!(end.usage.and_then(|usage| usage.sent), Some(10));
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_flow_whose_known_socket_closes_while_no_daemon_runs_is_ended_by_the_next() {
    let hosts = hosts();
    let home = home("", "");
    let config = std::fs::read_to_string(home.path("flowd.cfg")).unwrap();
    let config = config + "enrichers: {period: 200, netlink: {}}\n";
    std::fs::write(home.path("flowd.cfg"), config).unwrap();
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let listener = listen(&hosts, "[::]:5000");
    let (near, far) = connect_from(&hosts, &listener, 6001);
    // Nothing on this host has a socket of the second.
    home.write(&(line_of("start", &near) + "start tcp 42.0.0.1 9 42.0.0.2 9 2 9\n"));
    let starts = sink.collect("start", 2);
    let journal = || std::fs::read_to_string(home.path("state/journal")).unwrap();
    wait_for("the socket in the journal", || {
        journal().contains("\n= ").then_some(())
    });
    daemon.kill();
    let flow = starts.keys().find(|flow| flow.source.port == 6001).unwrap();
    close(near, far);
    let daemon = home.start(&hosts.here);
    let end = sink.collect("end", 1);
    assert_eq!(end[flow].start_time, starts[flow].start_time);
    daemon.expect_status("flows_open 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn an_upload_that_the_pipe_and_the_netlink_plugin_report_is_one_flow() {
    let hosts = hosts();
    let home = home(NETLINK, "");
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let listener = listen(&hosts, "[::]:5000");
    let (near, far) = connect_from(&hosts, &listener, 6001);
    let start = sink.firefly().event;
    assert_eq!(start.tag().activity, 26);
    // The storage service names the client first.
    let reversed = format!("tcp {THERE4} 5000 {HERE4} 6001 cms Cache\n");
    home.write(&format!("start {reversed}"));
    let retagged = sink.firefly().event;
    assert_eq!((retagged.flow, retagged.tag().experiment), (start.flow, 3));
    daemon.expect_status("flows_open 1");
    close(near, far);
    home.write(&format!("end {reversed}"));
    let end = sink.firefly().event;
    assert_eq!((end.flow, end.tag().experiment), (start.flow, 3));
    sink.assert_silent();
    daemon.expect_status("dispatcher_events started 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn one_dump_serves_the_netlink_plugin_and_the_netlink_enricher() {
    const SCANS: u64 = 10;
    let hosts = hosts();
    let sink = Sink::bind(&hosts.there, SINK);
    let listener = listen(&hosts, "[::]:5000");
    let home = home(NETLINK, "enrich: true");
    let without_enricher = std::fs::read_to_string(home.path("flowd.cfg")).unwrap();
    let enriched = format!("{without_enricher}enrichers: {{period: 200, netlink: {{}}}}\n");
    std::fs::write(home.path("flowd.cfg"), &enriched).unwrap();
    let daemon = home.start(&hosts.here);
    let scans = |status: &str| {
        ["plugin_events", "enricher_events"]
            .map(|kind| count(status, &format!("{kind} netlink scanned")))
    };
    // Returns how many dumps and how many scans there were meanwhile.
    let watch = || {
        let before = daemon.status();
        let after = wait_for("more scans of both", || {
            let status = daemon.status();
            let more = scans(&status).into_iter().zip(scans(&before));
            let enough = more.into_iter().all(|(now, before)| now >= before + SCANS);
            enough.then_some(status)
        });
        let scanned = scans(&after).iter().sum::<u64>() - scans(&before).iter().sum::<u64>();
        (
            count(&after, "socket_dumps") - count(&before, "socket_dumps"),
            scanned,
        )
    };
    let (dumps, scanned) = watch();
    // With a dump for each scan, there are as many dumps.
    assert!(dumps > 0 && 4 * dumps < 3 * scanned, "{dumps}, {scanned}");

    // Both see a new connection: the plugin reports its start, the enricher its statistics.
    let (mut near, mut far) = connect(&hosts, &listener, THERE4);
    exchange(&mut near, &mut far, 50_000, 20_000);
    let source = near.local_addr().unwrap();
    let next = |state: &str| -> Value {
        wait_for("a firefly", || {
            let text = String::from_utf8(sink.datagram(DEADLINE)?).unwrap();
            let json: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
            (json["flow-lifecycle"]["state"] == state).then_some(json)
        })
    };
    let start = next("start");
    assert_eq!(start["flow-id"]["src-port"], source.port());
    next("ongoing");
    let ongoing = next("ongoing");
    assert_eq!(ongoing["usage"]["sent"], 50_000, "{ongoing}");
    assert!(ongoing["netlink"].is_object(), "{ongoing}");
    close(near, far);
    assert_eq!(next("end")["usage"]["sent"], 50_000);

    // Each goes on without the other, and shares again when it is back.
    for (config, scanner) in [
        (
            enriched.replace("  netlink: {exp", "  netstat: {exp"),
            "enricher_events",
        ),
        (
            without_enricher.replace("enrich: true", "") + "flows: {endOnSocketClose: false}\n",
            "plugin_events",
        ),
    ] {
        std::fs::write(home.path("flowd.cfg"), config).unwrap();
        daemon.signal(nix::sys::signal::Signal::SIGHUP);
        daemon.expect_notice("READY=1");
        wait_for_scan(&daemon, &format!("{scanner} netlink"));
    }
    let (near, far) = connect(&hosts, &listener, THERE4);
    assert_eq!(
        next("start")["flow-id"]["src-port"],
        near.local_addr().unwrap().port()
    );
    close(near, far);
    next("end");
    std::fs::write(home.path("flowd.cfg"), &enriched).unwrap();
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    daemon.expect_notice("READY=1");
    let (dumps, scanned) = watch();
    assert!(dumps > 0 && 4 * dumps < 3 * scanned, "{dumps}, {scanned}");
    daemon.stop();
}
