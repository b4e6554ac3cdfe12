//! Copies to a collector, and unreachable destinations.
#![allow(missing_docs)]

mod common;

use common::daemon::{Home, line, lines};
use common::net::{Hosts, THERE4, THERE6};
use common::sink::Sink;

fn collector(address: &str) -> String {
    format!("{{sendToCollector: true, collectorAddress: '{address}', collectorPort: 20514}}")
}

#[test]
#[ignore = "needs root"]
fn a_collector_of_either_family_gets_the_flows_of_both() {
    for address in [THERE4, THERE6] {
        let hosts = Hosts::new();
        let home = Home::new(&collector(address));
        let bind = if address == THERE4 {
            "192.0.2.2:20514"
        } else {
            "[2001:db8::2]:20514"
        };
        let sink = Sink::bind(&hosts.there, bind);
        let daemon = home.start(&hosts.here);
        home.write(
            "start tcp 192.0.2.1 1 192.0.2.2 2 2 9\nstart tcp 2001:db8::1 1 2001:db8::2 2 2 9\n",
        );
        assert_eq!(sink.collect("start", 2).len(), 2);
        sink.assert_silent();
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn a_destination_without_a_route_affects_no_other_firefly() {
    let hosts = Hosts::new();
    let home = Home::new(&collector(THERE6));
    let sink = Sink::bind(&hosts.there, "[2001:db8::2]:20514");
    let direct = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
    let daemon = home.start(&hosts.here);
    let mut text = String::new();
    for n in 0..500 {
        text += &format!("start tcp 198.51.100.1 {} 203.0.113.1 2 2 9\n", n + 1);
        text += &format!("start tcp 2001:db8:1::1 {} 2001:db8:2::2 2 2 9\n", n + 1);
        text += &line("start", n, "2 9");
    }
    home.write(&text);
    assert_eq!(sink.collect("start", 1500).len(), 1500);
    assert_eq!(direct.collect("start", 500).len(), 500);
    daemon.expect_status("backend_events firefly unreachable 1000");
    daemon.expect_status("backend_events firefly sent 2000");
    daemon.stop();
    let warnings = home
        .log()
        .lines()
        .filter(|l| l.contains("unreachable"))
        .count();
    assert!((1..20).contains(&warnings), "{warnings} lines");
}

/// Datagrams to an unresponsive neighbour wait in the kernel, up to 212,992 bytes per neighbour, and count against the
/// send buffer of their socket: forty such neighbours would fill any send buffer.
#[test]
#[ignore = "needs root"]
fn unresponsive_neighbours_delay_no_other_firefly() {
    const GOOD: usize = 2000;
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let sink = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
    // Without CAP_NET_ADMIN the send buffer is small.
    let mut command = hosts.here.command("setpriv");
    command.args([
        "--bounding-set=-net_admin",
        "--inh-caps=-net_admin",
        common::daemon::PROGRAM,
    ]);
    let daemon = home.start_command(command, &[]);
    let mut text = String::new();
    for n in 0..GOOD {
        for dead in 0..10 {
            let host = 0x100 + (n * 10 + dead) % 40;
            text += &format!(
                "start tcp 2001:db8::1 {} 2001:db8::{host:x} {} 2 9\n",
                n + 1,
                dead + 1
            );
        }
        text += &line("start", n, "2 9");
    }
    let began = std::time::Instant::now();
    home.write(&text);
    assert_eq!(sink.collect("start", GOOD).len(), GOOD);
    eprintln!(
        "{GOOD} fireflies among {} to unresponsive neighbours in {:?}",
        GOOD * 10,
        began.elapsed()
    );
    let status = daemon.expect_status(&format!("backend_events firefly sent {}", GOOD * 11));
    assert!(!status.contains("failed"), "{status}");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_collector_that_refuses_datagrams_affects_no_other_firefly() {
    let hosts = Hosts::new();
    let home = Home::new(&collector(THERE6));
    let sink = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
    let daemon = home.start(&hosts.here);
    // Nothing listens on the collector's port: each datagram is answered with an ICMPv6 error.
    home.write(&lines("start", 0..3000, "2 9"));
    assert_eq!(sink.collect("start", 3000).len(), 3000);
    daemon.expect_status("backend_events firefly sent 6000");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_collector_whose_name_does_not_resolve_loses_only_its_own_copies() {
    let hosts = Hosts::new();
    let home = Home::new(&collector("collector.invalid"));
    let sink = Sink::bind(&hosts.there, "[2001:db8::2]:10514");
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..3000, "2 9"));
    assert_eq!(sink.collect("start", 3000).len(), 3000);
    daemon.expect_status("backend_events firefly collector_unresolved 3000");
    home.wait_for_log("the name collector.invalid cannot be resolved");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_collector_given_by_name_is_resolved() {
    let hosts = Hosts::new();
    let home = Home::new(&collector("localhost"));
    let sink = Sink::bind(&hosts.here, "[::]:20514");
    let daemon = home.start(&hosts.here);
    home.write(&line("start", 1, "2 9"));
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], 2);
    daemon.stop();
}
