//! The program as systemd and an administrator see it: arguments, exit codes, notices, signals, log.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::{Command, Stdio};

use common::daemon::{Home, PROGRAM, line, run, write};
use common::net::{Hosts, NetNs};
use nix::sys::signal::Signal;

#[test]
fn usage_errors_exit_with_2_and_help_with_0() {
    for arguments in [
        &["version"][..],
        &["--version"],
        &["help"],
        &["--help"],
        &["-h"],
        &["run", "--help"],
        &["registry"],
    ] {
        let (code, out, error) = run(arguments);
        assert_eq!((code, error.as_str()), (0, ""), "{arguments:?}");
        assert!(!out.is_empty());
    }
    for arguments in [
        &[][..],
        &["fly"],
        &["run", "--fast"],
        &["--log-level", "loud", "version"],
        &["run", "--log-level", "off"],
        &["config"],
        &["listen", "--port", "70000"],
    ] {
        let (code, out, error) = run(arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}");
        assert!(error.starts_with("flowd-rs: "), "{error}");
    }
}

#[test]
fn the_registry_lists_every_activity() {
    let (_, out, _) = run(&["registry"]);
    assert_eq!(out.lines().count(), 1 + 114, "{out}");
    let staging = out
        .lines()
        .find(|l| l.contains("Staging") && l.contains("atlas"))
        .unwrap();
    assert_eq!(
        staging.split_whitespace().collect::<Vec<_>>(),
        ["2", "atlas", "19", "Staging"]
    );
}

#[test]
fn config_check_prints_good_or_the_place_of_the_error() {
    let home = Home::new("{}");
    let file = home.path("flowd.cfg");
    let name = file.to_str().unwrap();
    let (code, out, _) = run(&["config", "check", "-c", name]);
    assert_eq!(
        (code, out.lines().next()),
        (0, Some(&*format!("{name}: valid")))
    );
    for line in [
        "plugins:    namedPipe",
        "backends:   firefly",
        "sends to:   UDP port 10514 of the flows' destinations",
    ] {
        assert!(out.lines().any(|l| l == line), "{out}");
    }
    for (text, expected) in [
        (
            "plugins: {namedPipe: {}}\nbackends: {fireflies: {}}\n",
            ":2:12: backends.fireflies: unknown key, did you mean `firefly`?",
        ),
        (
            "plugins: {namedPipe: {}}\nbackends: {firefly: {}}\nflows: {maxFlows: -1}\n",
            ":3:19: flows.maxFlows: -1 is out of range, expected 1 to 100000000",
        ),
    ] {
        write(&file, text);
        for arguments in [
            ["config", "check", "-c", name].as_slice(),
            &["run", "-c", name],
        ] {
            let (code, out, error) = run(arguments);
            assert_eq!((code, out.as_str()), (2, ""));
            // The check prints the place before the error.
            let last = error.lines().last().unwrap();
            assert_eq!(last, format!("flowd-rs: {name}{expected}"));
            assert_eq!(error.contains(" | "), arguments[0] == "config", "{error}");
            assert_eq!(error.contains("^\n"), arguments[0] == "config", "{error}");
        }
    }
    let (code, _, error) = run(&["run", "-c", "/nonexistent/flowd.cfg"]);
    assert_eq!(code, 2);
    assert_eq!(
        error,
        "flowd-rs: /nonexistent/flowd.cfg: cannot be read: No such file or directory (os error 2)\n"
    );
}

#[test]
fn an_unavailable_resource_is_one_line_and_nothing_is_left_behind() {
    let home = Home::new("{}");
    fs::create_dir(home.pipe()).unwrap();
    let file = home.path("flowd.cfg");
    let (code, _, error) = run(&["run", "-c", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    let errors: Vec<_> = error.lines().filter(|l| !l.starts_with("info: ")).collect();
    assert_eq!(errors.len(), 1, "{error}");
    assert!(
        errors[0]
            .contains("pipe (plugins.namedPipe.pipePath): is neither a FIFO nor a regular file"),
        "{error}"
    );
    assert!(!home.path("pid").exists());
}

#[test]
#[ignore = "needs root"]
fn systemd_gets_notifications_and_watchdog_pings() {
    let ns = NetNs::new("service");
    let home = Home::new("{}");
    let mut command = ns.command("sh");
    // WATCHDOG_PID is the process that systemd started: here the shell becomes it.
    command.args([
        "-c",
        "WATCHDOG_USEC=200000 WATCHDOG_PID=$$ exec \"$0\" \"$@\"",
        PROGRAM,
    ]);
    let mut daemon = home.start_command(command, &["-d", "-f"]);
    for _ in 0..5 {
        daemon.expect_notice("WATCHDOG=1");
    }
    daemon.signal(Signal::SIGINT);
    daemon.expect_notice("STOPPING=1");
    assert_eq!(daemon.wait(), 0);
}

#[test]
#[ignore = "needs root"]
fn a_second_daemon_with_the_same_state_directory_is_refused_and_a_stale_pid_file_is_ignored() {
    let ns = NetNs::new("service");
    let home = Home::new("{}");
    write(&home.path("pid"), "1\n");
    let first = home.start(&ns);
    let pid = first.child.id();
    assert_eq!(
        fs::read_to_string(home.path("pid")).unwrap(),
        format!("{pid}\n")
    );
    let file = home.path("flowd.cfg");
    let (code, _, error) = run(&["run", "-c", file.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(
        error.contains(&format!("is in use by another flowd-rs, process {pid}")),
        "{error}"
    );
    assert!(home.pipe().exists() && home.path("pid").exists());
    first.kill();
    home.start(&ns).stop();
}

#[test]
#[ignore = "needs root"]
fn without_permission_the_error_says_who_may_use_the_files_of_the_service() {
    let home = Home::new("{}");
    let mode = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let (config, state) = (home.path("flowd.cfg"), home.path("state"));
    let maps = home.path("flowd-rs/v1");
    mode(home.dir.path(), 0o755);
    for directory in [&state, &maps] {
        fs::create_dir_all(directory).unwrap();
        mode(directory, 0o700);
    }
    let unprivileged = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", PROGRAM]);
        let output = command.args(arguments).output().unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let denied = "permission denied, expected root or flowd, the user that the service runs as";
    let (code, error) = unprivileged(&["run", "-c", config.to_str().unwrap()]);
    let expected = format!(
        "flowd-rs: {}/lock (stateDir): {denied}; start the service (systemctl start flowd-rs), run flowd-rs as root (sudo), or set stateDir to a directory of your own\n",
        state.display()
    );
    assert_eq!((code, error), (Some(1), expected));
    if cfg!(feature = "bpf") {
        let bpffs = home.dir.path().to_str().unwrap();
        let (code, error) = unprivileged(&["marker", "--bpf-fs-path", bpffs, "show"]);
        let expected = format!(
            "flowd-rs: pinned maps in {}: {denied}; run flowd-rs as root (sudo)\n",
            maps.display()
        );
        assert_eq!((code, error), (Some(1), expected));
    }
}

#[test]
#[ignore = "needs root"]
fn hangup_and_usr1_do_not_stop_the_daemon() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    for signal in [Signal::SIGHUP, Signal::SIGUSR1] {
        daemon.signal(signal);
    }
    home.wait_for_log("status: up ");
    home.write(&line("start", 1, "2 9"));
    daemon.expect_status("flows_open 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn log_lines_have_priorities_for_the_journal_and_times_only_on_demand() {
    let ns = NetNs::new("service");
    let home = Home::new("{}");
    let log = fs::File::create(home.path("log"))
        .unwrap()
        .metadata()
        .unwrap();
    let stream = format!("{}:{}", log.dev(), log.ino());
    let mut command = ns.command(PROGRAM);
    command.env("JOURNAL_STREAM", stream);
    let daemon = home.start_command(command, &[]);
    home.write("nonsense\n");
    home.wait_for_log("nonsense");
    daemon.stop();
    let log = home.log();
    assert!(
        log.lines()
            .all(|l| l.starts_with("<6>") || l.starts_with("<4>")),
        "{log}"
    );
    assert!(
        log.contains("<4>namedPipe: rejected line \"nonsense\""),
        "{log}"
    );

    // The variable is inherited by children whose output goes elsewhere.
    let mut command = ns.command(PROGRAM);
    command.env("JOURNAL_STREAM", "1:1");
    fs::remove_file(home.path("log")).unwrap();
    home.start_command(command, &["--log-time"]).stop();
    let log = home.log();
    assert!(
        log.starts_with("20") && log.contains("Z info: flowd-rs "),
        "{log}"
    );
}

#[test]
#[ignore = "needs root"]
fn a_flow_is_logged_only_at_debug() {
    let hosts = Hosts::new();
    for (arguments, expected) in [(&["--log-level", "info"][..], false), (&["--debug"], true)] {
        let home = Home::new("{}");
        let daemon = home.start_command(hosts.here.command(PROGRAM), arguments);
        home.write(&line("start", 1, "2 9"));
        daemon.expect_status("flows_open 1");
        daemon.stop();
        assert_eq!(
            home.log().contains("debug: Started: tcp [2001:db8::1]:2"),
            expected,
            "{}",
            home.log()
        );
    }
}

#[test]
fn listen_prints_received_fireflies() {
    let probe = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = probe.local_addr().unwrap().port().to_string();
    drop(probe);
    let mut child = Command::new(PROGRAM)
        .args(["listen", "--address", "127.0.0.1", "--port", &port])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(format!("127.0.0.1:{port}")).unwrap();
    let firefly = r#"<134>1 - se.example xrootd - firefly-json - {"version":1,"flow-lifecycle":{"state":"end","start-time":"2026-01-01T00:00:00Z","end-time":"2026-01-01T00:00:02Z"},"flow-id":{"afi":"ipv4","src-ip":"192.0.2.1","dst-ip":"192.0.2.2","protocol":"tcp","src-port":1094,"dst-port":2},"usage":{"received":5,"sent":7},"context":{"experiment-id":3,"activity-id":3,"application":"xrootd"}}"#;
    let (lines, incoming) = std::sync::mpsc::channel();
    let out = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(out)) {
            let _ = lines.send(line.unwrap());
        }
    });
    let line = common::wait_for("a line of listen", || {
        // Until it listens, sending fails.
        let _ = socket
            .send(b"no firefly")
            .and_then(|_| socket.send(firefly.as_bytes()));
        incoming
            .recv_timeout(std::time::Duration::from_millis(50))
            .ok()
    });
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        line.ends_with(" se.example end     tcp 192.0.2.1:1094 > 192.0.2.2:2 cms / Cache by xrootd after 2.000 s sent 7 received 5 bytes"),
        "{line}"
    );
}

#[test]
fn a_file_that_everybody_may_write_to_is_refused() {
    let home = Home::new("{}");
    let (config, token) = (home.path("flowd.cfg"), home.path("token"));
    let mode = |path: &std::path::Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let pipe = home.pipe().display().to_string();
    let api = format!(
        "  namedPipe: {{pipePath: {pipe}}}\n  api: {{bindPort: 0, unixSocket: {pipe}.api, tokenFile: {}}}\n",
        token.display()
    );
    home.configure_plugins(&api, "backends: {dummy: }\n");
    write(&token, "secret\n");
    mode(&token, 0o602);
    let expected = "every user can write to this file, expected mode 0664 or stricter (chmod o-w)";
    let run_with = |path: &std::path::Path| run(&["run", "-c", path.to_str().unwrap()]);
    let (code, _, error) = run_with(&config);
    let last = error.lines().last().unwrap();
    assert_eq!(
        (code, last),
        (
            1,
            &*format!(
                "flowd-rs: {} (plugins.api.tokenFile): {expected}",
                token.display()
            )
        )
    );
    mode(&config, 0o666);
    let (code, _, error) = run_with(&config);
    assert_eq!(
        (code, error),
        (2, format!("flowd-rs: {}: {expected}\n", config.display()))
    );
}

/// Root obeys a configuration. One that the user of the service may write would let that user become root.
#[test]
#[ignore = "needs root"]
fn root_refuses_a_configuration_that_others_may_change() {
    use std::os::unix::fs::{chown, symlink};
    const USER: u32 = 64123;
    let root = tempfile::tempdir_in("/run").unwrap();
    let path = |name: &str| root.path().join(name);
    let mode = |name: &str, mode| {
        fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    mode("", 0o755);
    let victim = path("profile.d/z.sh");
    let text = format!(
        "plugins: {{namedPipe: {{pipePath: {}}}}}\nbackends: {{dummy: }}\n",
        victim.display()
    );
    for directory in [
        "profile.d",
        "ours",
        "theirs",
        "theirs/ours",
        "group",
        "sticky",
    ] {
        fs::create_dir(path(directory)).unwrap();
    }
    for name in [
        "ours/f",
        "ours/g",
        "ours/t",
        "theirs/f",
        "theirs/ours/f",
        "group/f",
    ] {
        write(&path(name), &text);
    }
    write(&path("sticky/f"), &text);
    write(&path("sticky/t"), &text);
    symlink(path("ours/f"), path("theirs/link")).unwrap();
    symlink(path("theirs/f"), path("ours/link")).unwrap();
    for theirs in ["theirs", "ours/t", "sticky/t"] {
        chown(path(theirs), Some(USER), None).unwrap();
    }
    chown(path("group"), None, Some(USER)).unwrap();
    mode("group", 0o775);
    mode("ours/g", 0o664);
    mode("sticky", 0o1777);
    let expected = "users other than root may change this file, or a directory of its path";
    for refused in [
        "ours/g",
        "ours/t",
        "ours/link",
        "theirs/f",
        "theirs/ours/f",
        "theirs/link",
        "group/f",
        "sticky/t",
    ] {
        let file = path(refused);
        let file = file.to_str().unwrap();
        for command in [
            &["prepare", "--user", "64123"][..],
            &["run"],
            &["config", "check"],
            &["config", "show"],
            &["config", "convert"],
            &["flows"],
            &["status"],
            &[
                "send",
                "start",
                "tcp",
                "192.0.2.1",
                "1",
                "192.0.2.2",
                "2",
                "2",
                "9",
            ],
            &["registry", "update"],
            &["stun", "sample"],
        ] {
            // The option comes before the line of `send` and before the subcommand of `registry`.
            let split = match command[0] {
                "config" | "stun" => 2,
                _ => 1,
            };
            let mut arguments = command[..split].to_vec();
            arguments.extend(["-c", file]);
            arguments.extend(&command[split..]);
            let (code, _, error) = run(&arguments);
            assert_eq!(code, 2, "{arguments:?}: {error}");
            assert!(error.contains(expected), "{arguments:?}: {error}");
        }
    }
    assert!(!victim.exists());
    for accepted in ["ours/f", "sticky/f"] {
        let (code, _, error) = run(&["config", "check", "-c", path(accepted).to_str().unwrap()]);
        assert_eq!(code, 0, "{error}");
    }
    // The user's own file is fine for the user.
    let mut command = Command::new("setpriv");
    command.args(["--reuid=64123", "--regid=64123", "--clear-groups", PROGRAM]);
    let status = command
        .args(["config", "check", "-c"])
        .arg(path("theirs/f"))
        .output();
    assert!(status.unwrap().status.success());
}

/// Run by hand as root, the daemon uses directories of the user of the service, who may lay links in them.
#[test]
#[ignore = "needs root"]
fn a_daemon_of_root_follows_no_link_in_a_directory_of_another_user() {
    use std::os::unix::fs::{chown, symlink};
    const USER: u32 = 64123;
    let ns = NetNs::new("service");
    let home = Home::new("{}");
    let path = |name: &str| home.path(name);
    for directory in ["state", "run", "victim"] {
        fs::create_dir(path(directory)).unwrap();
        chown(path(directory), Some(USER), None).unwrap();
    }
    chown(path("victim"), Some(0), None).unwrap();
    let victim = path("victim/file");
    let untouched = || fs::read_to_string(&victim).unwrap() == "precious\n";
    write(&victim, "precious\n");
    let link = |name: &str, target: &std::path::Path| {
        symlink(target, path(name)).unwrap();
        nix::unistd::fchownat(
            nix::fcntl::AT_FDCWD,
            &path(name),
            Some(USER.into()),
            None,
            nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
        )
        .unwrap();
    };
    let configure = |pid: &str, socket: &str, pipe: &str| {
        let shown = |name: &str| path(name).display().to_string();
        let text = format!(
            "registry: {{url: ''}}\npidPath: {}\nstateDir: {}\ncontrolSocket: {}\nplugins: {{namedPipe: {{pipePath: {}}}}}\nbackends: {{firefly: {{}}}}\n",
            shown(pid),
            shown("state"),
            shown(socket),
            shown(pipe)
        );
        write(&path("flowd.cfg"), &text);
    };
    let refused = |expected: &str| {
        let (code, _, error) = run(&["run", "-c", path("flowd.cfg").to_str().unwrap()]);
        assert!(code == 1 && error.contains(expected), "{code}: {error}");
        assert!(untouched());
        assert_eq!(fs::read_dir(path("victim")).unwrap().count(), 1);
    };
    // Files with fixed names: what is replaced, replaces the link; what is kept, is refused.
    configure("run/pid", "run/control.sock", "run/pipe");
    for name in ["state/journal.new", "state/label-key", "run/pid"] {
        link(name, &victim);
    }
    let daemon = home.start(&ns);
    assert!(
        home.log()
            .contains("pid: is a symbolic link, expected a file"),
        "{}",
        home.log()
    );
    assert!(untouched());
    daemon.stop();
    assert!(untouched() && path("run/pid").is_symlink());
    for name in ["state/lock", "state/journal"] {
        fs::remove_file(path(name)).unwrap();
        link(name, &victim);
        refused("is a symbolic link, expected a file");
        fs::remove_file(path(name)).unwrap();
        fs::hard_link(&victim, path(name)).unwrap();
        refused("has another name (a hard link)");
        fs::remove_file(path(name)).unwrap();
    }
    // Directories on the way.
    link("run/elsewhere", &path("victim"));
    for (socket, pipe) in [
        ("run/elsewhere/control.sock", "run/pipe"),
        ("run/elsewhere/new/control.sock", "run/pipe"),
        ("run/control.sock", "run/elsewhere/pipe"),
        ("run/control.sock", "run/elsewhere/new/pipe"),
    ] {
        configure("run/pid", socket, pipe);
        refused("is a symbolic link, and not only root may change it");
    }
}

#[test]
fn a_token_is_not_shown_and_a_token_file_that_everybody_reads_is_a_warning() {
    let home = Home::new("{}");
    let config = home.path("flowd.cfg");
    let shown = config.to_str().unwrap().to_owned();
    home.configure_plugins(
        "  api: {bindPort: 0, unixSocket: /u, token: s3cret}\n",
        "backends: {dummy: }\n",
    );
    let (code, out, _) = run(&["config", "show", "-c", &shown]);
    assert!(
        code == 0 && out.contains("token: HIDDEN") && !out.contains("s3cret"),
        "{out}"
    );
    let token = home.path("token");
    write(&token, "s3cret\n");
    // The daemon ends after it has read the token: what is at the path is not a socket.
    fs::create_dir(home.path("api.sock")).unwrap();
    let plugins = format!(
        "  api: {{bindPort: 0, unixSocket: {}, tokenFile: {}}}\n  namedPipe: {{pipePath: {}}}\n",
        home.path("api.sock").display(),
        token.display(),
        home.pipe().display()
    );
    home.configure_plugins(&plugins, "backends: {dummy: }\n");
    for (mode, warned) in [(0o644, true), (0o640, false)] {
        fs::set_permissions(&token, fs::Permissions::from_mode(mode)).unwrap();
        let (_, _, error) = run(&["run", "-c", &shown]);
        assert_eq!(
            error.contains("every user can read the token"),
            warned,
            "{error}"
        );
    }
}
