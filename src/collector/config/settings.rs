//! The checked settings that the collector runs with: every value has its default and is in range.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use log::LevelFilter;

use crate::collector::filter::Rule;
use crate::collector::store;
use crate::config::ControlSocket;
use crate::registry;

/// The configuration file without the option `-c`.
pub const DEFAULT_PATH: &str = "/etc/flowd/collector.cfg";
/// The default of `stateDir`.
pub const STATE_DIR: &str = "/var/lib/flowd-collector";
/// The default of `controlSocket`.
pub const CONTROL_SOCKET: &str = "/run/flowd-collector/control";
/// The default port of `listen`: that of NetFlow, by custom.
pub const NETFLOW_PORT: u16 = 2055;

/// Settings that the collector can run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollectorConfig {
    /// `pidPath`: the file for the process id; `None` to write none.
    pub pid_path: Option<PathBuf>,
    /// `stateDir`: the directory for templates, the cached registry and the lock.
    pub state_dir: PathBuf,
    /// `controlSocket`.
    pub control_socket: ControlSocket,
    /// `logLevel`.
    pub log_level: LevelFilter,
    /// `registry`, cached in `stateDir`.
    pub registry: registry::Settings,
    /// `listen`: at least one socket.
    pub listen: Vec<Listen>,
    /// `workers`: how many sockets, each with a thread, are opened for each of `listen`. At least 1.
    pub workers: usize,
    /// `sources`: the networks that datagrams are accepted from; `None` for all.
    pub sources: Option<Vec<IpNet>>,
    /// `multicastGroups`: the groups that are joined.
    pub multicast_groups: Vec<MulticastGroup>,
    /// `filter`, with macros expanded.
    pub rules: Vec<Rule>,
    /// `store` and `logSocket`.
    pub store: store::Settings,
    /// `forward`: other collectors that receive a copy of each datagram.
    pub forward: Vec<Forward>,
    /// `limits`, without `maxWaiting`, which is in `store`.
    pub limits: Limits,
    /// `metrics`: the TCP address to serve metrics at; `None` to serve none.
    pub metrics: Option<SocketAddr>,
    /// Settings without effect, or with another one than in djm's flowd, each with the reason.
    pub notes: Vec<String>,
}

/// A socket for datagrams of exporters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// `address` and `port`. The address `::` receives IPv4 as well.
    pub address: SocketAddr,
    /// `receiveBuffer` of the socket, in bytes.
    pub receive_buffer: usize,
}

/// A multicast group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MulticastGroup {
    /// `group`: a multicast address.
    pub group: IpAddr,
    /// `interface`: the name of the interface to join on; `None` for the choice of the kernel.
    pub interface: Option<String>,
}

/// Another collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// `address` and `port`.
    pub address: SocketAddr,
    /// `spoofSource`: whether datagrams keep the address of the exporter.
    pub spoof_source: bool,
}

/// What exporters may use of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `templateMemory`: bytes of all templates and options; beyond, the ones used least recently are dropped.
    pub template_memory: usize,
    /// `templateMemoryPerExporter`: bytes of those of one address, likewise.
    pub template_memory_per_exporter: usize,
    /// `templateTimeout`: how long a template is kept after its last use.
    pub template_timeout: Duration,
    /// `maxExporters`: how many exporters have counts of their own; beyond, those that were silent longest are counted
    /// together.
    pub max_exporters: usize,
}
