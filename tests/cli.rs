//! The commands of the program, run as a user runs them.
#![allow(missing_docs)]

mod common;

use std::fs::{self, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use common::daemon::{Home, PROGRAM, lines, run};
use common::net::{Hosts, NetNs};
use common::wait_for;
use nix::libc::O_NONBLOCK;
use serde_json::Value;

/// Runs a command with the configuration file of a daemon.
fn run_with_config(home: &Home, command: &str, more: &[&str]) -> (i32, String, String) {
    let config = home.path("flowd.cfg");
    run(&[&[command, "-c", config.to_str().unwrap()], more].concat())
}

/// The client prints what it receives, so that its memory does not grow with the table.
#[test]
#[ignore = "needs root"]
fn a_long_list_of_flows_is_streamed() {
    const FLOWS: usize = 200_000;
    /// Less than the listing has by far.
    const MEMORY: &str = "65536";
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..FLOWS, "2 9"));
    daemon.expect_status(&format!("flows_open {FLOWS}"));
    let list = |arguments: &[&str]| {
        let shell = r#"ulimit -d "$1"; shift; exec "$@""#;
        let output = Command::new("sh")
            .args(["-c", shell, "sh", MEMORY, PROGRAM, "flows", "-c"])
            .arg(home.path("flowd.cfg"))
            .args(arguments)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let table = list(&[]);
    assert_eq!(table.lines().count(), FLOWS + 2);
    let last =
        format!("\n{FLOWS} flows are open; so many are sorted only with --sort or --limit\n");
    assert!(table.ends_with(&last));
    let document: Value = serde_json::from_str(&list(&["--json"])).unwrap();
    assert_eq!(document["flows"].as_array().unwrap().len(), FLOWS);
    let first = list(&["--limit", "2", "--sort", "source"]);
    assert_eq!(first.lines().count(), 4, "{first}");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn flows_lists_the_open_flows() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let (code, out, _) = run_with_config(&home, "flows", &[]);
    assert_eq!((code, out.as_str()), (0, "0 flows are open\n"));
    home.write("start tcp 2001:db8::1 40001 2001:db8::2 1094 atlas Data_Challenge\n");
    home.write("start udp 192.0.2.1 40002 192.0.2.2 443 3333 7\n");
    home.write("start tcp 2001:db8::1 40003 2001:db8::2 1094 cms Cache\n");
    daemon.expect_status("flows_open 3");
    let (_, out, _) = run_with_config(&home, "flows", &["--sort", "experiment"]);
    let rows: Vec<Vec<&str>> = out
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    assert_eq!(
        rows[0],
        [
            "STATE",
            "PROTO",
            "SOURCE",
            "DESTINATION",
            "EXPERIMENT",
            "ACTIVITY",
            "AGE",
            "ORIGIN",
            "LABEL"
        ]
    );
    assert_eq!(
        rows[2][..7],
        [
            "start",
            "tcp",
            "[2001:db8::1]:40001",
            "[2001:db8::2]:1094",
            "atlas",
            "Data",
            "Challenge"
        ]
    );
    assert_eq!(
        rows[1][..6],
        [
            "start",
            "udp",
            "192.0.2.1:40002",
            "192.0.2.2:443",
            "3333",
            "7"
        ]
    );
    assert_eq!(rows[3][7..], ["namedPipe", "-"]);
    assert!(out.ends_with("\n3 flows are open\n"));

    for (arguments, expected) in [
        (&["--experiment", "CMS"][..], 1),
        (&["--experiment", "3333"], 1),
        (&["--address", "2001:db8::/64"], 2),
        (&["--address", "192.0.2.2"], 1),
        (&["--address", "198.51.100.1"], 0),
    ] {
        let (_, out, _) = run_with_config(&home, "flows", &[arguments, &["--json"]].concat());
        let document: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(
            document["flows"].as_array().unwrap().len(),
            expected,
            "{arguments:?}"
        );
    }
    let (_, out, _) = run_with_config(&home, "flows", &["--sort", "source"]);
    assert!(
        out.find("40002").unwrap() < out.find("40001").unwrap(),
        "{out}"
    );
    let (code, _, error) = run_with_config(&home, "flows", &["--experiment", "nobody"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("\"nobody\" is neither an id of 0 to 65535 nor a name of the registry"),
        "{error}"
    );
    let (code, _, error) = run_with_config(&home, "flows", &["--sort", "colour"]);
    assert_eq!(code, 2);
    assert!(
        error.contains(
            "--sort: \"colour\" is not a sort key, expected age, experiment, source or destination"
        ),
        "{error}"
    );

    let (_, out, _) = run_with_config(&home, "flows", &["--sort", "source", "--limit", "1"]);
    assert!(out.contains("192.0.2.1:40002"), "{out}");
    assert!(!out.contains("40001"), "{out}");
    assert!(out.ends_with("\n3 flows are open\n"), "{out}");

    // --watch prints the table until it is killed.
    let mut watch = Command::new(PROGRAM)
        .args(["flows", "--watch", "-c"])
        .arg(home.path("flowd.cfg"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shown = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || {
        shown
            .by_ref()
            .map(Result::unwrap)
            .find(|line| line.ends_with("open"))
            .unwrap()
    };
    assert_eq!(next(), "3 flows are open");
    home.write("end tcp 2001:db8::1 40003 2001:db8::2 1094 0 0\n");
    while next() != "2 flows are open" {}
    watch.kill().unwrap();
    watch.wait().unwrap();
    daemon.stop();
    let (code, _, error) = run_with_config(&home, "flows", &[]);
    let socket = home.path("control.sock").display().to_string();
    assert_eq!(
        (code, error),
        (
            1,
            format!("flowd-rs: no daemon listens on {socket} (controlSocket)\n")
        )
    );
}

#[test]
#[ignore = "needs root"]
fn status_shows_the_state_of_the_daemon() {
    let ns = NetNs::new("status");
    let home = Home::with("  firefly:\n  api:\nbackends:\n  firefly: {}\n");
    let daemon = home.start(&ns);
    home.write("start tcp 192.0.2.1 1 192.0.2.2 2 2 9\nrubbish\n");
    home.wait_for_log("rejected line");
    daemon.expect_status("backend_events firefly unreachable 1");
    // The depth of a queue is updated once a second.
    let out = wait_for("empty queues", || {
        let (code, out, _) = run_with_config(&home, "status", &[]);
        assert_eq!(code, 0);
        (out.matches(" 0 waiting, ").count() == 2).then_some(out)
    });
    for expected in [
        &format!(
            "flowd-rs {}, process {}, up ",
            env!("CARGO_PKG_VERSION"),
            daemon.child.id()
        ),
        "open flows  1\n",
        "plugin namedPipe     accepted: 1 line; rejected: 1 line with the wrong number of fields\n",
        "plugin firefly       nothing yet\n",
        "plugin api           nothing yet\n",
        "backend firefly      not sent: 1 datagram to unreachable destinations\n",
        "dispatcher           started: 1 flow\n",
        "queue dispatcher     0 waiting, ",
        "warn: namedPipe: rejected line \"rubbish\": 1 field, expected 8",
    ] {
        assert!(out.contains(expected), "{expected:?} is not in\n{out}");
    }
    let (_, out, _) = run_with_config(&home, "status", &["--json"]);
    let status: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(status["flows-open"], 1);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn send_checks_the_line_and_reports_whether_a_daemon_reads_it() {
    let ns = NetNs::new("send");
    let home = Home::new("{}");
    let flow = ["tcp", "2001:db8::1", "40001", "2001:db8::2", "1094"];
    let send = |state: &str, tag: &[&str]| {
        run_with_config(&home, "send", &[&[state], &flow[..], tag].concat())
    };
    let pipe = home.pipe().display().to_string();
    let (code, _, error) = send("end", &[]);
    assert_eq!(
        (code, error),
        (
            1,
            format!(
                "flowd-rs: there is no named pipe {pipe}: no daemon is running, or it uses another pipe (plugins.namedPipe.pipePath)\n"
            )
        )
    );
    let daemon = home.start(&ns);
    let (code, out, _) = send("start", &["atlas", "Data Challenge"]);
    let line = "start tcp 2001:db8::1 40001 2001:db8::2 1094 atlas Data_Challenge";
    assert_eq!(
        (code, out),
        (0, format!("sent to {pipe} (a daemon is reading): {line}\n"))
    );
    daemon.expect_status("flows_open 1");
    for (state, tag, expected) in [
        (
            "start",
            &[][..],
            "expected an experiment and an activity after the destination port",
        ),
        (
            "start",
            &["atlas", "Sleeping"],
            "field 8 (activity) is \"Sleeping\", expected an activity id",
        ),
        (
            "ongoing",
            &["2", "9"],
            "field 1 (state) is \"ongoing\", expected start or end",
        ),
    ] {
        let (code, _, error) = send(state, tag);
        assert_eq!(code, 2);
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(send("end", &[]).0, 0);
    daemon.expect_status("dispatcher_events ended 1");
    daemon.kill();
    let (code, _, error) = send("end", &[]);
    assert_eq!(
        (code, error),
        (
            1,
            format!(
                "flowd-rs: nothing reads the named pipe {pipe}: no daemon is running, or it uses another pipe (plugins.namedPipe.pipePath)\n"
            )
        )
    );
}

#[test]
#[ignore = "needs root"]
fn listen_prints_one_line_per_firefly() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let listen = |more: &[&str]| {
        let mut child = hosts
            .there
            .command(PROGRAM)
            .args(["listen", "--port", "10514"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Wait until its port is bound. Binding it here to find out could take it away.
        wait_for("the listener", || {
            let sockets = format!("/proc/{}/net/udp6", child.id());
            let sockets = std::fs::read_to_string(sockets).ok()?;
            sockets.contains(&format!(":{:04X} ", 10514)).then_some(())
        });
        (child, lines)
    };
    let daemon = home.start(&hosts.here);
    let (mut child, mut printed) = listen(&[]);
    home.write("start tcp 2001:db8::1 40001 2001:db8::2 1094 atlas Data_Challenge\n");
    let line = printed.next().unwrap().unwrap();
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let expected = format!(
        "{host} start   tcp [2001:db8::1]:40001 > [2001:db8::2]:1094 atlas / Data Challenge by flowd-rs "
    );
    assert!(line.contains(&expected), "{line}");
    home.write("end tcp 2001:db8::1 40001 2001:db8::2 1094 0 0\n");
    let line = printed.next().unwrap().unwrap();
    assert!(
        line.contains(" end     tcp ") && line.contains(" after 0."),
        "{line}"
    );
    // A datagram that is not a firefly is reported, and the program continues.
    let stray = hosts
        .here
        .enter(|| std::net::UdpSocket::bind("[::]:0").unwrap());
    stray.send_to(b"hello", "[2001:db8::2]:10514").unwrap();
    stray
        .send_to(br#"{"version":1,"flow-lifecycle":{"state":"ongoing"},"flow-id":{"protocol":"udp","src-ip":"192.0.2.1","src-port":1,"dst-ip":"192.0.2.2","dst-port":2},"usage":{"sent":7},"context":{"experiment-id":3333,"activity-id":1}}"#, "[2001:db8::2]:10514")
        .unwrap();
    let line = printed.next().unwrap().unwrap();
    assert!(
        line.contains("2001:db8::1 ongoing udp 192.0.2.1:1 > 192.0.2.2:2 3333 / 1 sent 7 bytes"),
        "{line}"
    );
    // Nothing that a terminal obeys is printed.
    let firefly = r#"{"version":1,"flow-lifecycle":{"state":"ongoing"},"flow-id":{"protocol":"udp","src-ip":"192.0.2.1","src-port":1,"dst-ip":"192.0.2.2","dst-port":2},"context":{"experiment-id":3333,"activity-id":1,"application":"a\u001b[2J\u009bm"}}"#;
    let hostile = format!("<134>1 - h\u{1b}]0;x\u{7} flowd - firefly-json - {firefly}");
    stray
        .send_to(hostile.as_bytes(), "[2001:db8::2]:10514")
        .unwrap();
    let line = printed.next().unwrap().unwrap();
    assert!(
        line.contains(r" h\u{1b}]0;x\u{7} ongoing ") && line.ends_with(r" by a\u{1b}[2J\u{9b}m"),
        "{line:?}"
    );
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(
        errors.contains("not a firefly, from ") && errors.contains("\"hello\""),
        "{errors}"
    );

    let (mut child, mut printed) = listen(&["--json"]);
    home.write(&lines("start", 5..6, "2 9"));
    let object: Value = serde_json::from_str(&printed.next().unwrap().unwrap()).unwrap();
    assert_eq!(object["context"]["experiment-id"], 2);
    // One datagram is one line: what stands behind the object is no record, nor is an object on a line within it.
    let first = firefly.replacen(',', ",\n\"x\":\n{\"version\":1}\n,\"y\":\"\u{9b}\",", 1);
    for datagram in [
        format!("{first}\n{{\"version\":1,\"forged\":true}}"),
        firefly.replace("activity-id\":1", "activity-id\":2"),
    ] {
        stray
            .send_to(datagram.as_bytes(), "[2001:db8::2]:10514")
            .unwrap();
    }
    for activity in [1, 2] {
        let line = printed.next().unwrap().unwrap();
        assert!(!line.contains(char::is_control), "{line:?}");
        let object: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["context"]["activity-id"], activity);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (code, _, error) = run(&["listen", "--address", "192.0.2.99"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("UDP 192.0.2.99:10514: Cannot assign requested address"),
        "{error}"
    );
    daemon.stop();
}

#[test]
fn a_wrong_command_line_is_explained() {
    let (code, out, error) = run(&[]);
    assert_eq!((code, out.as_str()), (2, ""));
    let first = "flowd-rs: missing command, expected one of:\n  run       Run the daemon ";
    assert!(error.starts_with(first), "{error}");
    for command in flowd_rs::cli::commands() {
        let name = command.command;
        let lines = error.lines().filter(|line| {
            let mut words = line.split_whitespace();
            line.starts_with("  ") && words.next() == Some(&name)
        });
        let expected = usize::from(!name.is_empty() && !name.contains(' '));
        assert_eq!(lines.count(), expected, "{name}: {error}");
    }
    for (arguments, expected) in [
        (
            &["statsu"][..],
            "flowd-rs: unknown command \"statsu\", did you mean status?\nSee `flowd-rs help`.\n",
        ),
        (
            &["status", "--jsno"],
            "flowd-rs: unknown option --jsno, did you mean --json?\nSee `flowd-rs help status`.\n",
        ),
        (
            &["listen", "--port=http"],
            "flowd-rs: --port: \"http\" is not a port, expected 1 to 65535\nSee `flowd-rs help listen`.\n",
        ),
    ] {
        assert_eq!(
            run(arguments),
            (2, String::new(), expected.to_owned()),
            "{arguments:?}"
        );
    }
}

/// Runs the program as a user without any rights.
fn run_unprivileged(arguments: &[&str]) -> String {
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", PROGRAM];
    let mut command = Command::new("setpriv");
    let output = command.args(nobody).args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
#[ignore = "needs root"]
fn without_permission_the_error_says_who_has_it() {
    let ns = NetNs::new("denied");
    let home = Home::new("{}");
    let daemon = home.start(&ns);
    let (socket, pipe) = (home.path("control.sock"), home.pipe());
    let [socket, pipe, directory] = [&socket, &pipe, &home.dir.path().to_owned()];
    let set_mode = |path: &Path, mode| {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    let flows = || run_unprivileged(&["flows", "--socket", socket.to_str().unwrap()]);
    let send = || {
        let pipe = pipe.to_str().unwrap();
        let flow = ["end", "tcp", "192.0.2.1", "1", "192.0.2.2", "2"];
        run_unprivileged(&[&["send", "--pipe", pipe], &flow[..]].concat())
    };
    let on_socket = |reason: &str| {
        let socket = socket.display();
        format!("flowd-rs: control socket {socket}: permission denied{reason}\n")
    };
    let on_pipe = |reason: &str| {
        let pipe = pipe.display();
        format!("flowd-rs: named pipe {pipe}: permission denied{reason}\n")
    };

    set_mode(directory, 0o700);
    let closed = format!(
        "; the directory {} is open to root only: use sudo",
        directory.display()
    );
    assert_eq!(flows(), on_socket(&closed));
    assert_eq!(send(), on_pipe(&closed));

    set_mode(directory, 0o755);
    set_mode(pipe, 0o620);
    // Joining the group of root is no good advice.
    let root = "; it is open to root only: use sudo";
    assert_eq!(flows(), on_socket(root));
    assert_eq!(send(), on_pipe(root));

    let daemons = nix::unistd::Group::from_name("daemon").unwrap().unwrap();
    for path in [socket, pipe] {
        chown(path, None, Some(daemons.gid.as_raw())).unwrap();
    }
    let group = "; it is open to the user root and the group daemon: use sudo, or join the group (`usermod -aG daemon USER`, then log in again)";
    assert_eq!(flows(), on_socket(group));
    assert_eq!(send(), on_pipe(group));
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn listen_on_the_port_of_a_daemon_points_to_its_plugin() {
    let ns = NetNs::new("busy");
    let home = Home::with("  firefly:\nbackends:\n  firefly: {}\n");
    let daemon = home.start(&ns);
    let output = ns.command(PROGRAM).arg("listen").output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), error.as_str()),
        (
            Some(1),
            "flowd-rs: UDP [::]:10514: the port is in use, probably by the firefly plugin of a running daemon (plugins.firefly): use --port\n"
        )
    );
    daemon.stop();
}

#[test]
fn send_reports_a_pipe_that_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(O_NONBLOCK);
    let mut reader = options.open(&pipe).unwrap();
    while reader.write(&[b'x'; 4096]).is_ok() {}
    let pipe = pipe.to_str().unwrap();
    let flow = ["end", "tcp", "192.0.2.1", "1", "192.0.2.2", "2"];
    let expected = format!(
        "flowd-rs: named pipe {pipe} is full: the daemon does not read it fast enough; nothing was sent\n"
    );
    assert_eq!(
        run(&[&["send", "--pipe", pipe], &flow[..]].concat()),
        (1, String::new(), expected)
    );
}

#[test]
fn config_commands_know_the_collector_in_both_spellings() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let conf = path("netflow.conf");
    let text = "web = \"port 80\"\nlogfile \"/var/log/flowd\"\nlisten on [::]:9995\nflow source any\n\
                discard all\naccept tag 4294967295 quick dst 192.0.2.0/24 $web\naccept src any\n";
    fs::write(&conf, text).unwrap();
    let (code, output, error) = run(&["config", "check", "-c", &conf]);
    assert_eq!((code, error.as_str()), (0, ""), "{output}");
    for line in [
        "listens on:  UDP [::]:9995 (listen)\n",
        "sources:     every network\n",
        "filter:      3 rules\n",
        "stores in:   /var/log/flowd\n",
        "note:        line 4: flow source any accepts every source",
        "note:        line 7: src any matches every record",
    ] {
        assert!(output.contains(line), "{line}{output}");
    }
    let (code, yaml, error) = run(&["config", "convert", "-c", &conf, "-D", "web=port 443"]);
    assert_eq!((code, error.as_str()), (0, ""), "{yaml}");
    assert!(yaml.contains("dst 192.0.2.0/24 port 443"), "{yaml}");
    let cfg = path("collector.cfg");
    fs::write(&cfg, yaml).unwrap();
    let shown = run(&["config", "show", "-c", &cfg]);
    assert_eq!(shown.0, 0, "{}", shown.2);
    let original = run(&["config", "show", "-c", &conf, "-D", "web=port 443"]);
    assert_eq!(shown.1, original.1);

    // A file without a key of its own is the collector's by its name, or by the option.
    fs::write(&cfg, "logLevel: debug\n").unwrap();
    let (code, output, _) = run(&["config", "check", "-c", &cfg]);
    assert!(code == 0 && output.contains("UDP [::]:2055"), "{output}");
    let other = path("other");
    fs::write(&other, "logLevel: debug\n").unwrap();
    assert_eq!(run(&["config", "check", "-c", &other]).0, 2);
    assert_eq!(run(&["config", "check", "--collector", "-c", &other]).0, 0);

    fs::write(
        &cfg,
        "filter: |\n  accept all\n  discard src 192.0.2.1/24\n",
    )
    .unwrap();
    let (code, _, error) = run(&["config", "check", "-c", &cfg]);
    let expected = format!(
        "    3 |   discard src 192.0.2.1/24\n      |               ^\n\
         flowd-rs: {cfg}:3:15: filter: 192.0.2.1/24 has bits of a host behind its length, expected 192.0.2.0/24 for the network or 192.0.2.1 for the host\n"
    );
    assert_eq!((code, error), (2, expected));
    fs::set_permissions(&cfg, Permissions::from_mode(0o666)).unwrap();
    let (code, _, error) = run(&["config", "show", "--collector", "-c", &cfg]);
    assert_eq!(code, 2);
    assert!(
        error.contains("every user can write to this file"),
        "{error}"
    );
    let (code, _, error) = run(&["config", "check", "-c", &conf, "-D", "1=x"]);
    assert_eq!(code, 2);
    assert!(
        error.contains("\"1\" is not a valid name of a macro"),
        "{error}"
    );

    let (code, schema, _) = run(&["config", "schema", "--collector"]);
    let schema: Value = serde_json::from_str(&schema).unwrap();
    assert_eq!(
        (code, &schema["title"]),
        (0, &"collector.cfg of flowd-rs".into())
    );
}
