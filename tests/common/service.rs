//! Does what systemd does for a service with a file descriptor store.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;

use super::daemon::{Home, PROGRAM};
use super::net::NetNs;
use super::{DEADLINE, wait_for};

/// Does what systemd does for a service of `Type=notify` with a file descriptor store.
pub struct Service<'a> {
    home: &'a Home,
    ns: &'a NetNs,
    /// The command of the program, and its configuration file.
    command: [&'a str; 2],
    notify: UnixDatagram,
    pub child: Child,
    /// The file descriptors that the service left, by name.
    pub store: Vec<(String, OwnedFd)>,
}

impl<'a> Service<'a> {
    pub fn start(home: &'a Home, ns: &'a NetNs, word: &'a str, config: &'a str) -> Service<'a> {
        let notify = UnixDatagram::bind(home.path("notify")).unwrap();
        notify.set_read_timeout(Some(DEADLINE)).unwrap();
        let command = [word, config];
        let child = spawn(home, ns, command, &[]);
        let mut service = Service {
            home,
            ns,
            command,
            notify,
            child,
            store: Vec::new(),
        };
        service.wait_until_ready();
        service
    }

    /// Receives a notification, and stores the file descriptors that come with it.
    fn notification(&mut self) -> Option<String> {
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([i32; 8]);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(
            self.notify.as_raw_fd(),
            &mut slices,
            Some(&mut space),
            flags,
        )
        .ok()?;
        let mut fds = Vec::new();
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel has just created them for this process.
                fds.extend(
                    received
                        .into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let length = message.bytes;
        let text = String::from_utf8(buffer[..length].to_vec()).unwrap();
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
        let name = name.unwrap_or_default().to_owned();
        if text.contains("FDSTOREREMOVE=1") {
            self.store.retain(|(stored, _)| *stored != name);
        } else if text.contains("FDSTORE=1") {
            self.store
                .extend(fds.into_iter().map(|fd| (name.clone(), fd)));
        }
        Some(text)
    }

    fn wait_until_ready(&mut self) {
        wait_for("READY=1", || {
            self.notification().filter(|text| text.contains("READY=1"))
        });
    }

    /// Does what the package does, and what systemd does on exit code 75.
    pub fn replace(&mut self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGUSR2).unwrap();
        let status = wait_for("the exit", || {
            self.notify
                .set_read_timeout(Some(Duration::from_millis(1)))
                .unwrap();
            while self.notification().is_some() {}
            self.child.try_wait().unwrap()
        });
        while self.notification().is_some() {}
        self.notify.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!(status.code(), Some(75), "{}", self.home.log());
        self.child = spawn(self.home, self.ns, self.command, &self.store);
        self.wait_until_ready();
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.home.log());
        }
    }
}

fn spawn(home: &Home, ns: &NetNs, [word, config]: [&str; 2], store: &[(String, OwnedFd)]) -> Child {
    // The shell passes them as systemd does: from descriptor 3 on.
    let mut script = String::new();
    for (index, (_, fd)) in store.iter().enumerate() {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        script += &format!("exec {}<&{}; ", 3 + index, fd.as_raw_fd());
    }
    script += "LISTEN_PID=$$ exec \"$@\"";
    let names: Vec<&str> = store.iter().map(|(name, _)| name.as_str()).collect();
    let log = File::options()
        .create(true)
        .append(true)
        .open(home.path("log"));
    let mut command = ns.command("bash");
    command
        .args(["-c", &script, "bash", PROGRAM, word, "-c"])
        .arg(home.path(config))
        .env("NOTIFY_SOCKET", home.path("notify"))
        .stdin(Stdio::null())
        .stderr(log.unwrap());
    if !store.is_empty() {
        command.env("LISTEN_FDS", store.len().to_string());
        command.env("LISTEN_FDNAMES", names.join(":"));
    }
    command.spawn().unwrap()
}
