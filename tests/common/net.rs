//! Network namespaces.

use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::wait_for;

/// Addresses of the two ends of the veth.
pub const HERE4: &str = "192.0.2.1";
pub const THERE4: &str = "192.0.2.2";
pub const HERE6: &str = "2001:db8::1";
pub const THERE6: &str = "2001:db8::2";

/// A network namespace. Dropping it deletes the namespace.
pub struct NetNs {
    pub name: String,
}

impl NetNs {
    pub fn new(role: &str) -> NetNs {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "flowd-{}-{}-{role}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        ip(&["netns", "add", &name]);
        let ns = NetNs { name };
        ns.ip(&["link", "set", "lo", "up"]);
        ns
    }

    /// `ip -n NAME …`
    pub fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", self.name.as_str()], arguments].concat());
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// A command that runs in this network namespace and in the mount namespace of the test.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", self.path()))
            .arg("--")
            .arg(program);
        command
    }

    /// Runs `work` on a thread in the namespace. Sockets that it opens stay in the namespace.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).unwrap();
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                    work()
                })
                .join()
                .unwrap()
        })
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// A host with the daemon, and a host that is the destination of its flows.
pub struct Hosts {
    pub here: NetNs,
    pub there: NetNs,
}

impl Hosts {
    pub fn new() -> Hosts {
        let (here, there) = (NetNs::new("here"), NetNs::new("there"));
        here.ip(&[
            "link",
            "add",
            "veth0",
            "type",
            "veth",
            "peer",
            "name",
            "veth0",
            "netns",
            &there.name,
        ]);
        for (ns, v4, v6) in [(&here, HERE4, HERE6), (&there, THERE4, THERE6)] {
            ns.ip(&["addr", "add", &format!("{v4}/24"), "dev", "veth0"]);
            ns.ip(&["addr", "add", &format!("{v6}/64"), "dev", "veth0", "nodad"]);
            ns.ip(&["link", "set", "veth0", "up"]);
        }
        let hosts = Hosts { here, there };
        for (here, there) in [(HERE4, THERE4), (HERE6, THERE6)] {
            hosts.wait_until_connected(here.parse().unwrap(), there.parse().unwrap());
        }
        hosts
    }

    /// Waits until a datagram arrives: a new link is not up at once, and neighbour discovery takes time.
    fn wait_until_connected(&self, here: IpAddr, there: IpAddr) {
        let from = self.here.enter(|| UdpSocket::bind((here, 0)).unwrap());
        let to = self.there.enter(|| UdpSocket::bind((there, 0)).unwrap());
        to.set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        wait_for("a datagram through the veth", || {
            from.send_to(b"?", to.local_addr().unwrap()).ok()?;
            to.recv(&mut [0; 1]).ok()
        });
    }
}

pub fn ip(arguments: &[&str]) {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .expect("ip (iproute2) is installed");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "ip {}: {error}",
        arguments.join(" ")
    );
}
