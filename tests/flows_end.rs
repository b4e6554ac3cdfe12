//! `flowd-rs flows end`: an operator ends open flows.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;
#[path = "common/prog_run.rs"]
mod prog_run;

use std::fs::{File, Permissions, set_permissions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use common::daemon::{Home, PROGRAM, run};
use common::http::Client;
use common::net::{HERE6, Hosts, NetNs, THERE6};
use common::sink::Sink;
use common::wait_for;
use flowd_rs::event::State;
use flowd_rs::sys::mark_maps::Maps;
use prog_run::BpfFs;

fn end(home: &Home, more: &[&str]) -> (i32, String, String) {
    let config = home.path("flowd.cfg");
    run(&[&["flows", "end", "-c", config.to_str().unwrap()], more].concat())
}

fn done(output: &str) -> (i32, String, String) {
    (0, output.to_owned(), String::new())
}

/// The source ports of the flows in the marker's map, sorted.
fn marked(bpffs: &BpfFs) -> Vec<u16> {
    let maps = Maps::pinned(bpffs.path()).unwrap().unwrap();
    let ports = maps.marks().map(|(key, _)| key.flow().unwrap().source.port);
    let mut ports: Vec<u16> = ports.collect();
    ports.sort_unstable();
    ports
}

#[test]
#[ignore = "needs root"]
fn flows_of_two_sources_end_in_every_respect_and_stay_ended() {
    const OTHER: &str = "2001:db8::77";
    let hosts = Hosts::new();
    let bpffs = BpfFs::new();
    let home = Home::with(&format!(
        "  api: {{bindAddress: 0.0.0.0, token: secret}}\nbackends:\n  firefly: {{}}\n  \
         marker: {{bpfFsPath: {}, targetInterfaces: [veth0]}}\n  prometheus: {{port: 9000}}\n",
        bpffs.path().display()
    ));
    let sink = Sink::bind(&hosts.there, &format!("[{THERE6}]:10514"));
    let daemon = home.start(&hosts.here);
    let listener = hosts.there.enter(|| TcpListener::bind((THERE6, 1094)));
    let listener = listener.unwrap();
    let near = hosts.here.enter(|| TcpStream::connect((THERE6, 1094)));
    let (mut near, mut far) = (near.unwrap(), listener.accept().unwrap().0);
    let port = near.local_addr().unwrap().port();
    let transfer = format!("tcp {HERE6} {port} {THERE6} 1094");
    home.write(&format!("start {transfer} 2 9\n"));
    near.write_all(&[7; 5000]).unwrap();
    far.read_exact(&mut [0; 5000]).unwrap();
    home.write(&format!("start tcp {HERE6} 7 {OTHER} 1094 2 9\n"));
    const TOKEN: &str = "Authorization: Bearer secret\r\n";
    let mut api = Client::tcp(&hosts.here, "127.0.0.1:7777");
    let flow = format!(
        r#"{{"state": "start", "protocol": "udp", "src-ip": "{HERE6}", "src-port": 8, "dst-ip": "{THERE6}",
            "dst-port": 443, "experiment-id": 3, "activity-id": 5}}"#
    );
    assert_eq!(api.request("POST", "/flow", TOKEN, &flow).status, 200);
    daemon.expect_status("backend_events marker entered 3");
    daemon.expect_status("flows_open 3");
    assert_eq!(marked(&bpffs).len(), 3);
    sink.collect("start", 2);

    // Only the control socket ends flows.
    for (headers, status) in [("", 401), (TOKEN, 405)] {
        let mut api = Client::tcp(&hosts.here, "127.0.0.1:7777");
        let answer = api.request("POST", "/flows/end", headers, "");
        assert_eq!(answer.status, status, "{}", answer.body);
    }
    for wrong in [
        &["--experiment", "nobody"][..],
        &["--address", "host"],
        // Nobody is there to be asked whether all are meant.
        &[],
    ] {
        let (code, out, error) = end(&home, wrong);
        let expected = if wrong.is_empty() { 2 } else { 1 };
        assert_eq!((code, out.as_str()), (expected, ""), "{wrong:?}: {error}");
    }
    let there = ["--address", THERE6];
    let dry_run = [&there[..], &["--dry-run"]].concat();
    assert_eq!(end(&home, &dry_run), done("2 flows would be ended\n"));
    daemon.expect_status("flows_open 3");

    assert_eq!(end(&home, &there), done("2 flows ended\n"));
    daemon.expect_status("flows_open 1");
    daemon.expect_status("dispatcher_events ended_operator 2");
    wait_for("the marks to be removed", || {
        (marked(&bpffs) == [7]).then_some(())
    });
    let ends = sink.collect("end", 2);
    let of_transfer = ends.values().find(|e| e.flow.source.port == port);
    // Its socket is open, and has counted until now.
    assert_eq!(of_transfer.unwrap().usage.unwrap().sent, Some(5000));
    for tag in [
        r#"act="Debug",exp="atlas""#,
        r#"act="Data Brokering",exp="cms""#,
    ] {
        let sample = format!("\nflowd_flows_ended_total{{{tag},reason=\"operator\"}} 1\n");
        wait_for(&sample, || {
            let page = Client::tcp(&hosts.here, "127.0.0.1:9000").get("/metrics");
            page.body.contains(&sample).then_some(())
        });
    }

    // The producer's own end comes late.
    home.write(&format!("end {transfer} 2 9\n"));
    daemon.expect_status("dispatcher_events ended_already 1");
    sink.assert_silent();
    assert_eq!(home.journalled(), 1);
    daemon.stop();
    let daemon = home.start(&hosts.here);
    daemon.expect_status("flows_open 1");
    assert_eq!(marked(&bpffs), [7]);
    home.wait_for_log("flows ended by user id 0 (flowd-rs flows end): 2");

    // A flow that starts anew is open again.
    home.write(&format!("start {transfer} 2 9\n"));
    assert_eq!(sink.firefly().event.state, State::Start);
    assert_eq!(
        end(&home, &["--experiment", "atlas"]),
        done("2 flows ended\n")
    );
    assert_eq!(home.journalled(), 0);
    daemon.stop();
}

/// Answers the question of `flows end` on a terminal. Returns the question and what the command printed.
fn answer_on_terminal(home: &Home, answer: &str) -> (String, i32, String) {
    let terminal = nix::pty::openpty(None, None).unwrap();
    let [input, error] = [(); 2].map(|()| terminal.slave.try_clone().unwrap());
    let mut command = Command::new(PROGRAM);
    command
        .args(["flows", "end", "-c"])
        .arg(home.path("flowd.cfg"));
    let command = command.stdin(input).stdout(Stdio::piped()).stderr(error);
    let mut child = command.spawn().unwrap();
    let mut screen = File::from(terminal.master);
    let mut question = String::new();
    while !question.ends_with("[y/N] ") {
        let mut byte = [0];
        screen.read_exact(&mut byte).unwrap();
        question.push(byte[0].into());
    }
    screen.write_all(answer.as_bytes()).unwrap();
    let status = child.wait().unwrap();
    let mut out = String::new();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_to_string(&mut out).unwrap();
    (question, status.code().unwrap(), out)
}

#[test]
#[ignore = "needs root"]
fn all_flows_end_only_if_the_operator_says_so() {
    const FLOWS: u16 = 2000;
    let ns = NetNs::new("end");
    let home = Home::new("{}");
    let daemon = home.start(&ns);
    // More than are ended at a time, all in one shard of the table.
    let line = |n: u16| format!("start udp ::1 {} ::2 {n} 2 9\n", n.rotate_left(5) + 1);
    home.write(&(1..=FLOWS).map(line).collect::<String>());
    daemon.expect_status(&format!("flows_open {FLOWS}"));
    let question = format!("End all {FLOWS} open flows? [y/N] ");
    for no in ["\n", "no\n"] {
        let answered = answer_on_terminal(&home, no);
        assert_eq!(answered, (question.clone(), 1, String::new()));
    }
    daemon.expect_status(&format!("flows_open {FLOWS}"));
    let ended = format!("{FLOWS} flows ended\n");
    assert_eq!(answer_on_terminal(&home, "y\n"), (question, 0, ended));
    daemon.expect_status(&format!("dispatcher_events ended_operator {FLOWS}"));
    assert_eq!(end(&home, &["--yes"]), done("0 flows ended\n"));
    home.write(&line(1));
    daemon.expect_status("flows_open 1");
    assert_eq!(
        answer_on_terminal(&home, "n\n").0,
        "End the open flow? [y/N] "
    );
    // A filter before the word is not one that is ignored.
    let config = home.path("flowd.cfg");
    let config = config.to_str().unwrap();
    for options in [&["-c", config][..], &["--address", "::3"], &["--json"]] {
        let (code, _, error) =
            run(&[&["flows"], options, &["end", "--yes", "-c", config]].concat());
        assert_eq!(code, 2, "{options:?}");
        assert!(error.contains("options must follow `end`"), "{error}");
    }
    assert_eq!(end(&home, &["--yes"]), done("1 flow ended\n"));
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn of_those_who_may_list_flows_only_root_and_the_user_of_the_daemon_end_them() {
    const DAEMON: u32 = 64123;
    const OTHER: u32 = 64124;
    let ns = NetNs::new("end");
    let home = Home::new("{}");
    let set_mode = |path: &Path, mode| set_permissions(path, Permissions::from_mode(mode)).unwrap();
    chown(home.dir.path(), Some(DAEMON), None).unwrap();
    set_mode(home.dir.path(), 0o755);
    let as_user = |program: &mut Command, user: u32| {
        program.arg(format!("--reuid={user}"));
        program.args(["--regid=65534", "--clear-groups", PROGRAM]);
    };
    let mut command = ns.command("setpriv");
    as_user(&mut command, DAEMON);
    let daemon = home.start_command(command, &[]);
    let socket = home.path("control.sock");
    set_mode(&socket, 0o666);
    let run_as = |user: u32, arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        as_user(&mut command, user);
        command.args(arguments).arg("--socket").arg(&socket);
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let status = output.status.code().unwrap();
        (status, text(&output.stdout), text(&output.stderr))
    };
    for user in [DAEMON, OTHER, 0] {
        home.write("start tcp 192.0.2.1 1 192.0.2.2 2 2 9\n");
        daemon.expect_status("flows_open 1");
        let dry_run = run_as(user, &["flows", "end", "--dry-run"]);
        assert_eq!(dry_run, done("1 flow would be ended\n"));
        let answer = run_as(user, &["flows", "end", "--yes"]);
        if user != OTHER {
            assert_eq!(answer, done("1 flow ended\n"));
            continue;
        }
        let refused = "flowd-rs: expected root or the user that the daemon runs as\n";
        assert_eq!(answer, (1, String::new(), refused.to_owned()));
        daemon.expect_status("flows_open 1");
    }
    let mut client = Client::unix(&socket);
    let answer = client.get("/flows/end");
    assert_eq!(
        (answer.status, answer.error().as_str()),
        (405, "expected POST")
    );
    assert!(client.get("/").body.contains("/flows/end"));
    daemon.stop();
}
