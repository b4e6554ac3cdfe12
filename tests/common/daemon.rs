//! Runs the real binary: configuration file, readiness, signals, log, exit code.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::libc::O_NONBLOCK;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::net::NetNs;
use super::{DEADLINE, wait_for};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_flowd-rs");

/// A directory with the configuration, pipe, state and log of a daemon; kept over restarts.
pub struct Home {
    pub dir: TempDir,
}

impl Home {
    /// `firefly` is the YAML of the settings of the firefly backend, in braces.
    pub fn new(firefly: &str) -> Home {
        Home::with(&format!("backends:\n  firefly: {firefly}\n"))
    }

    /// `more` is YAML at the top level.
    pub fn with(more: &str) -> Home {
        let home = Home {
            dir: tempfile::tempdir().unwrap(),
        };
        home.configure(more);
        home
    }

    /// Configures the pipe and `more`, which may start with further plugins.
    pub fn configure(&self, more: &str) {
        let pipe = self.path("pipe").display().to_string();
        self.configure_plugins(&format!("  namedPipe:\n    pipePath: {pipe}\n"), more);
    }

    /// `plugins` is the YAML of the plugins, each line indented by two spaces.
    pub fn configure_plugins(&self, plugins: &str, more: &str) {
        let path = |name| self.path(name).display().to_string();
        // No test uses the Internet.
        let registry = match more.contains("registry:") {
            true => "",
            false => "registry: {url: ''}\n",
        };
        let config = format!(
            "{registry}pidPath: {}\nstateDir: {}\ncontrolSocket: {}\nplugins:\n{plugins}{more}",
            path("pid"),
            path("state"),
            path("control.sock"),
        );
        fs::write(self.path("flowd.cfg"), config).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pipe(&self) -> PathBuf {
        self.path("pipe")
    }

    /// Opens the pipe for writing, once it exists and has a reader.
    pub fn writer(&self) -> File {
        let open = || {
            OpenOptions::new()
                .write(true)
                .custom_flags(O_NONBLOCK)
                .open(self.pipe())
                .ok()
        };
        let writer = wait_for("a reader of the pipe", || {
            fs::metadata(self.pipe())
                .ok()?
                .file_type()
                .is_fifo()
                .then(open)
                .flatten()
        });
        let flags = nix::fcntl::OFlag::empty();
        nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
        writer
    }

    /// Opens, writes and closes, as a shell does.
    pub fn write(&self, lines: &str) {
        self.writer().write_all(lines.as_bytes()).unwrap();
    }

    /// Starts the daemon in a namespace and waits until it is ready.
    pub fn start(&self, ns: &NetNs) -> Daemon<'_> {
        self.start_command(ns.command(PROGRAM), &[])
    }

    pub fn start_command(&self, command: Command, arguments: &[&str]) -> Daemon<'_> {
        self.launch(command, "run", "flowd.cfg", arguments)
    }

    /// Configures a collector, in place of a marking daemon. `more` is YAML at the top level.
    pub fn configure_collector(&self, more: &str) {
        let path = |name| self.path(name).display().to_string();
        let store = match more.contains("store:") {
            true => String::new(),
            false => format!("store: {{directory: {}}}\n", path("segments")),
        };
        let config = format!(
            "registry: {{url: ''}}\npidPath: {}\nstateDir: {}\ncontrolSocket: {}\n{store}{more}",
            path("pid"),
            path("state"),
            path("control.sock"),
        );
        fs::write(self.path("collector.cfg"), config).unwrap();
    }

    /// Starts the collector in a namespace and waits until it is ready.
    pub fn start_collector(&self, ns: &NetNs) -> Daemon<'_> {
        self.launch(ns.command(PROGRAM), "collect", "collector.cfg", &[])
    }

    /// Starts a command of the program that notifies systemd, and waits until it is ready.
    pub fn launch(
        &self,
        mut command: Command,
        word: &str,
        config: &str,
        arguments: &[&str],
    ) -> Daemon<'_> {
        let socket = self.path("notify");
        let _ = fs::remove_file(&socket);
        let notify = UnixDatagram::bind(&socket).unwrap();
        // A daemon that does not run as root must be able to send.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        command
            .args([word, "-c"])
            .arg(self.path(config))
            .args(arguments)
            .env("NOTIFY_SOCKET", &socket)
            .stdin(Stdio::null())
            .stderr(log);
        let child = command.spawn().unwrap();
        let daemon = Daemon {
            home: self,
            child,
            notify,
        };
        daemon.expect_notice("READY=1");
        daemon
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub fn wait_for_log(&self, text: &str) {
        wait_for(&format!("{text:?} in the log"), || {
            self.log().contains(text).then_some(())
        });
    }

    /// The number of open flows in the journal.
    pub fn journalled(&self) -> usize {
        let mut table = flowd_rs::dispatcher::flow_table::FlowTable::new(usize::MAX);
        let copy = tempfile::tempdir().unwrap();
        fs::copy(self.path("state/journal"), copy.path().join("journal")).unwrap();
        flowd_rs::dispatcher::journal::Journal::open(
            copy.path(),
            &mut table,
            &flowd_rs::metrics::Metrics::new(),
        )
        .unwrap();
        table.len()
    }
}

/// A running daemon. Dropping it kills the process.
pub struct Daemon<'a> {
    home: &'a Home,
    pub child: Child,
    notify: UnixDatagram,
}

impl Daemon<'_> {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for a line of a notification to systemd.
    pub fn expect_notice(&self, expected: &str) {
        self.notify.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut buffer = [0; 4096];
        loop {
            let length = match self.notify.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => panic!("no {expected}: {error}; log:\n{}", self.home.log()),
            };
            if std::str::from_utf8(&buffer[..length])
                .unwrap()
                .lines()
                .any(|line| line == expected)
            {
                return;
            }
        }
    }

    /// Waits until the process exits and returns the exit code.
    pub fn wait(&mut self) -> i32 {
        let status = wait_for("the daemon's end", || self.child.try_wait().unwrap());
        status.code().unwrap_or(-1)
    }

    /// Sends SIGTERM and checks that the exit code is 0.
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        assert_eq!(self.wait(), 0, "log:\n{}", self.home.log());
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The status line that the daemon logs on SIGUSR1.
    pub fn status(&self) -> String {
        let before = self.home.log().len();
        self.signal(Signal::SIGUSR1);
        wait_for("a status line", || {
            let log = self.home.log();
            let mut lines = log[before..].lines();
            lines.find(|l| l.contains("status: ")).map(str::to_owned)
        })
    }

    /// The status line, once it contains `expected`.
    pub fn expect_status(&self, expected: &str) -> String {
        wait_for(&format!("status with {expected:?}"), || {
            let line = self.status();
            let words = format!(", {line}, ");
            if words.contains(&format!(", {expected},")) {
                return Some(line);
            }
            std::thread::sleep(Duration::from_millis(20));
            None
        })
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.home.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("log of the daemon, last lines first:\n{}", tail.join("\n"));
        }
    }
}

/// A line for the pipe: flow number `n`, from this host to the other.
pub fn line(state: &str, n: usize, tag: &str) -> String {
    let (host, port) = (n / 60_000, 1 + n % 60_000);
    format!(
        "{state} tcp 2001:db8::1 {port} 2001:db8::2 {} {tag}\n",
        1000 + host
    )
}

pub fn lines(state: &str, range: std::ops::Range<usize>, tag: &str) -> String {
    range.map(|n| line(state, n, tag)).collect()
}

/// Runs the program and returns exit code, standard output and standard error.
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(PROGRAM).args(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Writes a file, creating it if necessary.
pub fn write(path: &Path, content: &str) {
    fs::write(path, content).unwrap();
}
