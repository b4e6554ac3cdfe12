//! The iperf3 plugin and the skops enricher: connections of a cgroup, as an eBPF program reports them.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use common::daemon::{Home, PROGRAM};
use common::net::{Hosts, THERE4, THERE6};
use common::sink::Sink;
use common::{DEADLINE, wait_for};
use flowd_rs::event::{FlowEvent, State};
use serde_json::Value;

const SINK: &str = "[2001:db8::2]:20514";

/// A cgroup v2 for one test. Dropping the value removes it.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new() -> Cgroup {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let root = roots
            .into_iter()
            .find(|r| r.join("cgroup.procs").exists() && r.join("cgroup.controllers").exists());
        let path = root
            .expect("cgroup v2")
            .join(format!("flowd-{}-{n}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }

    /// Runs a line of bash in the cgroup, in a namespace.
    fn bash(&self, hosts: &Hosts, line: &str) -> Child {
        let procs = self.0.join("cgroup.procs");
        let line = format!("echo $$ > {} && {line}", procs.display());
        let mut command = hosts.here.command("bash");
        command
            .args(["-c", &line])
            .stdin(Stdio::piped())
            .stdout(Stdio::null());
        command.spawn().unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Processes that have ended take a moment to leave it.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn home(more: &str, firefly: &str) -> Home {
    Home::with(&format!(
        "{more}backends:\n  firefly: {{sendToCollector: true, collectorAddress: '2001:db8::2', collectorPort: 20514, {firefly}}}\n"
    ))
}

/// A client that sends 1000 bytes, gets 500, and closes after the other end.
fn client(cgroup: &Cgroup, hosts: &Hosts, to: &str, listener: &TcpListener) {
    let port = listener.local_addr().unwrap().port();
    let line = format!("exec 3<>/dev/tcp/{to}/{port} && head -c 1000 /dev/zero >&3 && cat <&3");
    let mut child = cgroup.bash(hosts, &line);
    let (mut far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    far.read_exact(&mut [0; 1000]).unwrap();
    far.write_all(&[0; 500]).unwrap();
    drop(far);
    assert!(child.wait().unwrap().success());
}

#[test]
#[ignore = "needs root"]
fn connections_get_the_tags_of_the_list_in_turn() {
    let hosts = Hosts::new();
    let cgroup = Cgroup::new();
    let home = home(
        &format!(
            "  iperf3: {{cgroupPath: {}, experimentIDs: [2, 3], activityIDs: [9, 4]}}\n",
            cgroup.0.display()
        ),
        "",
    );
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let listener = hosts
        .there
        .enter(|| TcpListener::bind("[::]:5201").unwrap());
    for (n, to) in [THERE4, THERE6, THERE4, THERE6].into_iter().enumerate() {
        client(&cgroup, &hosts, to, &listener);
        let start = sink.collect("start", 1).into_values().next().unwrap();
        let tag = (start.tag().experiment, start.tag().activity);
        assert_eq!(tag, if n % 2 == 0 { (2, 9) } else { (3, 4) });
        assert_eq!(
            start.flow.destination.socket_addr(),
            format!(
                "{}:5201",
                if to == THERE4 {
                    to.to_owned()
                } else {
                    format!("[{to}]")
                }
            )
            .parse()
            .unwrap()
        );
        let end = sink.collect("end", 1).into_values().next().unwrap();
        assert_eq!((end.flow, end.start_time), (start.flow, start.start_time));
        let usage = end.usage.unwrap();
        assert_eq!((usage.sent, usage.received), (Some(1000), Some(500)));
    }
    // Connections of processes in other cgroups are not reported.
    let near = hosts
        .here
        .enter(|| std::net::TcpStream::connect("192.0.2.2:5201").unwrap());
    drop((near, listener.accept().unwrap()));
    sink.assert_silent();
    daemon.expect_status("plugin_events iperf3 started 4");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn ports_out_of_range_are_left_out_and_iperf3_itself_is_seen() {
    let hosts = Hosts::new();
    let cgroup = Cgroup::new();
    let home = home(
        &format!(
            "  iperf3: {{cgroupPath: {}, minDestinationPort: 5201, maxDestinationPort: 5299, experimentIDs: [16], activityIDs: [1], randomIDs: true}}\n",
            cgroup.0.display()
        ),
        "",
    );
    let sink = Sink::bind(&hosts.there, SINK);
    let daemon = home.start(&hosts.here);
    let other = hosts
        .there
        .enter(|| TcpListener::bind("[::]:5300").unwrap());
    client(&cgroup, &hosts, THERE4, &other);
    let mut server = hosts.there.command("iperf3");
    let mut server = server
        .args(["-s", "-1", "-p", "5202"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let line = format!(
        "for n in 1 2 3 4 5 6 7 8 9; do iperf3 -c {THERE6} -p 5202 -n 1M && exit 0; sleep 0.2; done; exit 1"
    );
    assert!(cgroup.bash(&hosts, &line).wait().unwrap().success());
    server.wait().unwrap();
    let mut seen = Vec::new();
    wait_for("the end of the data connection", || {
        seen.extend(sink.drain(std::time::Duration::from_millis(50)));
        let sent = |e: &FlowEvent| e.usage.and_then(|usage| usage.sent).unwrap_or(0);
        let ends = seen.iter().filter(|e| e.state == State::End);
        ends.map(sent).any(|sent| sent >= 1 << 20).then_some(())
    });
    // The control connection and the data connection, perhaps of more than one try.
    let starts = seen.iter().filter(|e| e.state == State::Start);
    assert!(starts.count() >= 2);
    assert!(
        seen.iter()
            .all(|e| e.tag().experiment == 16 && e.flow.destination.port == 5202)
    );
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn the_skops_enricher_reports_open_flows_next_to_another_program() {
    let hosts = Hosts::new();
    let cgroup = Cgroup::new();
    let path = cgroup.0.display();
    for strategy in ["poll", "transition"] {
        let sink = Sink::bind(&hosts.there, SINK);
        // Two programs on the same cgroup: the plugin's and the enricher's.
        let home = home(
            &format!(
                "  iperf3: {{cgroupPath: {path}, experimentIDs: [2], activityIDs: [9]}}\nenrichers: {{period: 100, skops: {{cgroupPath: {path}, strategy: {strategy}}}}}\n"
            ),
            "enrich: true, enrichmentMode: lean",
        );
        let daemon = home.start(&hosts.here);
        let listener = hosts
            .there
            .enter(|| wait_for("the port", || TcpListener::bind("[::]:5203").ok()));
        let line = format!(
            "exec 3<>/dev/tcp/{THERE6}/5203 && while read -r line; do printf %s \"$line\" >&3; done"
        );
        let mut child = cgroup.bash(&hosts, &line);
        let (far, _) = listener.accept().unwrap();
        let mut input = child.stdin.take().unwrap();
        sink.collect("start", 1);
        let ongoing = wait_for("a report on the connection", || {
            let _ = input.write_all(b"more\n");
            if strategy == "transition" {
                far.shutdown(std::net::Shutdown::Write).unwrap();
            }
            let datagram = sink.datagram(std::time::Duration::from_millis(50))?;
            let text = String::from_utf8(datagram).unwrap();
            let json: Value = serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
            (json["skOps"].is_object()).then_some(json)
        });
        let skops = &ongoing["skOps"];
        assert_eq!(ongoing["flow-lifecycle"]["state"], "ongoing");
        assert!(
            skops["srtt"].as_u64().unwrap() > 0 && skops["sndCwnd"].as_u64().unwrap() > 0,
            "{skops}"
        );
        assert!(!skops["congestion"].as_str().unwrap().is_empty());
        drop(input);
        drop(far);
        child.wait().unwrap();
        sink.collect("end", 1);
        daemon.stop();
    }
}

#[test]
#[ignore = "needs root"]
fn a_path_that_is_not_a_cgroup_v2_is_a_clear_error() {
    let hosts = Hosts::new();
    let start = |home: &Home| {
        let output = hosts
            .here
            .command(PROGRAM)
            .args(["run", "-c"])
            .arg(home.path("flowd.cfg"))
            .output()
            .unwrap();
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, error) = start(&home("  iperf3: {cgroupPath: /tmp}\n", ""));
    assert_eq!(code, 1);
    assert!(
        error.contains("/tmp (plugins.iperf3.cgroupPath): not a cgroup v2"),
        "{error}"
    );
    for (iperf3, expected) in [
        (
            "{experimentIDs: [1]}",
            "plugins.iperf3.activityIDs: found 3 ids here and 1 in experimentIDs, expected two lists of the same length",
        ),
        (
            "{minSourcePort: 9, maxSourcePort: 3}",
            "plugins.iperf3.maxSourcePort: 3 is less than minSourcePort, 9",
        ),
    ] {
        let (code, error) = start(&home(&format!("  iperf3: {iperf3}\n"), ""));
        assert_eq!(code, 2);
        assert!(error.contains(expected), "{error}");
    }
}
