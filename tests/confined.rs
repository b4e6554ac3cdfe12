//! The daemon as its systemd unit confines it: all of its functions work, and other operations are refused.
#![cfg(feature = "bpf")]
#![allow(missing_docs)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::daemon::{Home, PROGRAM};
use common::http::Client;
use common::net::{HERE6, Hosts, THERE6};
use common::sink::Sink;
use common::wait_for;
use common::wire::Wire;

const UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/flowd-rs.service");
const COLLECTOR_UNIT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/conf/flowd-collector.service");
const CONFINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/confine.py");

/// A directory that everybody may read, with the files that the confined user needs.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for (from, name) in [
        (CONFINE, "confine.py"),
        (UNIT, "unit"),
        (PROGRAM, "flowd-rs"),
    ] {
        fs::copy(from, folder.path().join(name)).unwrap();
    }
    folder
}

fn confined(hosts: &Hosts, folder: &Path) -> Command {
    // Debian's Python, for which python3-seccomp is installed.
    let mut command = hosts.here.command("/usr/bin/python3");
    command.args(["confine.py", "unit"].map(|name| folder.join(name)));
    command
}

#[test]
#[ignore = "needs root: network namespaces"]
fn all_functions_of_the_confined_daemon_work() {
    let hosts = Hosts::new();
    hosts.here.ip(&["link", "set", "lo", "up"]);
    let home = Home::with("");
    fs::set_permissions(home.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(
        home.path("flowd.cfg"),
        "registry: {url: ''}\nplugins: {namedPipe: {mode: '0660'}, netstat: {experiment: cms, activity: Cache}, firefly: {bindAddress: '::1'}, api: }\n\
         backends: {firefly: , marker: {targetInterfaces: [veth0]}, prometheus: {port: 9000}}\nenrichers: {period: 100, netlink: }\n",
    )
    .unwrap();
    let folder = folder();
    let mut command = confined(&hosts, folder.path());
    command.arg(folder.path().join("flowd-rs"));
    let daemon = home.start_command(command, &[]);
    let inside = PathBuf::from(format!("/proc/{}/root", daemon.child.id()));
    let mode = fs::metadata(inside.join("run/flowd")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o660);
    let sink = Sink::bind(&hosts.there, &format!("[{THERE6}]:10514"));
    let wire = Wire::listen(&hosts);

    // Pipe, firefly, marks, sock_diag, metrics.
    let listener = hosts
        .there
        .enter(|| TcpListener::bind((THERE6, 5000)).unwrap());
    let to = listener.local_addr().unwrap();
    let mut near = hosts.here.enter(|| TcpStream::connect(to).unwrap());
    let mut far = listener.accept().unwrap().0;
    let port = near.local_addr().unwrap().port();
    let mut pipe = fs::File::options()
        .write(true)
        .open(inside.join("run/flowd"))
        .unwrap();
    writeln!(pipe, "start tcp {HERE6} {port} {THERE6} 5000 cms Cache").unwrap();
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], port);
    wait_for("a mark", || {
        near.write_all(b"x").unwrap();
        far.read_exact(&mut [0]).unwrap();
        let marked = wire.frames(1, |frame| {
            frame.source_port == port && frame.label & 0x3fefc == 196_620 & 0x3fefc
        });
        (!marked.is_empty()).then_some(())
    });
    let page = wait_for("series", || {
        let page = Client::tcp(&hosts.here, "127.0.0.1:9000")
            .get("/metrics")
            .body;
        page.contains("flow_tcp_bytes_sent_total{").then_some(page)
    });
    for name in [
        "flowd_marked_packets_total{act=\"Cache\"",
        "process_open_fds ",
        "flowd_marker_interfaces 1",
    ] {
        assert!(page.contains(name), "{name}: {page}");
    }
    drop(far);
    assert_eq!(near.read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(near);
    let end = wait_for("the end with its socket", || {
        let firefly = sink.firefly();
        (firefly.event.state.as_str() == "end").then_some(firefly)
    });
    assert!(end.json["usage"]["sent"].as_u64() > Some(0), "{}", end.json);

    // The journal, the control socket, the API, a reload.
    assert!(inside.join("var/lib/flowd/journal").exists());
    let status = Client::unix(&inside.join("run/flowd-rs/control.sock"))
        .get("/status")
        .json();
    assert_eq!(status["flows-open"], 0);
    assert_eq!(
        Client::tcp(&hosts.here, "127.0.0.1:7777")
            .get("/healthz")
            .status,
        200
    );
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    daemon.expect_notice("RELOADING=1");
    daemon.expect_notice("READY=1");
    for line in home.log().lines() {
        assert!(
            !line.starts_with("warn") && !line.starts_with("error"),
            "{line}"
        );
    }
    daemon.stop();
    assert!(home.log().contains("stopped"));
}

#[test]
#[ignore = "needs root: network namespaces"]
fn other_operations_are_refused() {
    let hosts = Hosts::new();
    // Each attempt prints its name and its result.
    let probe = r#"
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, action):
    try:
        result = action()
        if isinstance(result, int) and result < 0:
            raise OSError(ctypes.get_errno(), "")
        print(name, "done")
    except OSError as error:
        print(name, os.strerror(error.errno).replace(" ", "_"))
attempt("state", lambda: open("/var/lib/flowd/x", "w").close())
attempt("etc", lambda: open("/etc/flowd-rs-was-here", "w"))
attempt("usr", lambda: open("/usr/bin/flowd-rs-was-here", "w"))
attempt("kernel_setting", lambda: open("/proc/sys/kernel/core_pattern", "w"))
attempt("root", lambda: os.setuid(0))
attempt("raw_socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
attempt("packet_socket", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3))
attempt("tcp_socket", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).close())
attempt("module", lambda: libc.syscall(313, 0, b"", 0))
attempt("mount", lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None))
attempt("reboot", lambda: libc.syscall(169, 0, 0, 0, 0))
attempt("trace", lambda: libc.ptrace(16, 1, 0, 0))
attempt("executable_memory", lambda: libc.syscall(9, 0, 4096, 7, 0x22, -1, 0))
attempt("kill_init", lambda: os.kill(1, 0))
"#;
    let folder = folder();
    let output = confined(&hosts, folder.path())
        .args(["/usr/bin/python3", "-c", probe])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{printed}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let done: Vec<&str> = printed
        .lines()
        .filter_map(|line| line.strip_suffix(" done"))
        .collect();
    assert_eq!(done, ["state", "tcp_socket"], "{printed}");
    assert_eq!(printed.lines().count(), 14, "{printed}");
}

#[test]
fn the_unit_is_well_formed_and_exposes_little() {
    let run = |arguments: &[&str]| {
        let output = Command::new("systemd-analyze")
            .args(arguments)
            .env("COLUMNS", "200")
            .output();
        let output = output.ok()?;
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Some((output.status.success(), text.into_owned()))
    };
    // The collector needs no capability, and is less exposed.
    for (unit, threshold) in [(UNIT, "20"), (COLLECTOR_UNIT, "15")] {
        let threshold = format!("--threshold={threshold}");
        let arguments = ["security", "--offline=true", &threshold, "--no-pager", unit];
        let Some((good, printed)) = run(&arguments) else {
            // Packages for the tests are installed only where they run as root.
            assert!(
                !nix::unistd::geteuid().is_root(),
                "systemd-analyze (systemd) is installed"
            );
            return;
        };
        assert!(good, "{printed}");
    }
    // The template unit differs only in the name of the instance.
    let [unit, instance] = ["flowd-rs.service", "flowd-rs@.service"].map(|name| {
        fs::read_to_string(format!("{}/conf/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
    });
    let plain = instance.replace("-%i", "").replace(", %i", "");
    assert_eq!(plain, unit);
}
