//! The checked settings that the daemon runs with: every value has its default and is in range.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use log::LevelFilter;

use super::check;
use crate::firefly::netlink_object::Mode;
use crate::flow::{Protocol, Tag};
use crate::registry;
use crate::scitag::Strategy;
#[cfg(feature = "bpf")]
use crate::sys::sockops;

/// The default of `bpfFsPath`: the bpffs with the pinned maps of the marker.
pub const BPF_FS_PATH: &str = "/sys/fs/bpf";
/// The configuration file without the option `-c`.
pub const DEFAULT_PATH: &str = "/etc/flowd/flowd.cfg";

/// The default of `pipePath`, the same as in flowd: storage services write to this path.
pub const PIPE_PATH: &str = "/var/run/flowd";
/// The default of `workDir`, the same as in flowd-go.
pub const WORK_DIR: &str = "/var/cache/flowd-go";
/// The default of `registry.url`: where the registry is published.
pub const REGISTRY_URL: &str = "https://www.scitags.org/api.json";

/// The default of `controlSocket`. `instance` is `-NAME` for one daemon of several on a host, or empty for the only
/// one.
pub fn control_socket(instance: &str) -> String {
    format!("/run/flowd-rs{instance}/control.sock")
}

/// Settings that the daemon can run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `pidPath`: the file for the process id, for scripts; `None` to write none.
    pub pid_path: Option<PathBuf>,
    /// Whether the file sets `pidPath`.
    pub pid_path_given: bool,
    /// `workDir`: the directory for cached files, which may be deleted.
    pub work_dir: PathBuf,
    /// `stateDir`: the directory for the journal of open flows and the lock.
    pub state_dir: PathBuf,
    /// `controlSocket`.
    pub control_socket: ControlSocket,
    /// `logLevel`.
    pub log_level: LevelFilter,
    /// `registry`.
    pub registry: registry::Settings,
    /// `flows`.
    pub flows: Flows,
    /// `plugins.namedPipe`.
    pub named_pipe: Option<NamedPipe>,
    /// `plugins.firefly`.
    pub firefly_plugin: Option<FireflyPlugin>,
    /// `plugins.api`.
    pub api: Option<Api>,
    /// `plugins.perfsonar`: the tag for all packets.
    pub perfsonar: Option<Tag>,
    /// `plugins.netlink`.
    pub netlink: Option<Connections>,
    /// `plugins.netstat`.
    pub netstat: Option<Connections>,
    /// `plugins.iperf3`.
    pub iperf3: Option<Iperf3>,
    /// `enrichers.skops`.
    pub skops_enricher: Option<Sockops>,
    /// `enrichers.netlink`.
    pub netlink_enricher: Option<NetlinkEnricher>,
    /// `backends.firefly`.
    pub firefly: Option<Firefly>,
    /// `backends.marker`.
    pub marker: Option<Marker>,
    /// `backends.prometheus`.
    pub prometheus: Option<Prometheus>,
    /// Whether `backends.dummy` is enabled, which does nothing.
    pub dummy: bool,
    /// Settings without effect, each with the reason.
    pub notes: Vec<String>,
    /// Settings that were overridden, each with the reason.
    pub warnings: Vec<String>,
}

/// The socket that `flowd-rs flows` and `flowd-rs status` connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSocket {
    /// Its path.
    pub path: PathBuf,
    /// Whether the file sets `controlSocket`: then failing to create the socket is fatal.
    pub given: bool,
}

/// Limits of the table of open flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flows {
    /// `maxFlows`: how many flows may be open; further starts are refused.
    pub max_flows: usize,
    /// `maxPerSource`: how many of them one source may have opened.
    pub max_per_source: usize,
    /// `maxAge`: how long a flow may be open before the daemon ends it.
    pub max_age: Duration,
    /// `endOnSocketClose`: whether the daemon ends a flow when its socket on this host is closed.
    pub end_on_socket_close: bool,
}

/// The named pipe plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPipe {
    /// `pipePath`.
    pub path: PathBuf,
    /// `mode` of a pipe that the daemon creates.
    pub mode: u32,
    /// `group` of a pipe that the daemon creates, by name or id.
    pub group: Option<String>,
}

/// The firefly plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FireflyPlugin {
    /// `bindAddress` and `bindPort`.
    pub bind: SocketAddr,
    /// `bufferSize`: the maximum length of a datagram, in bytes.
    pub buffer_size: usize,
    /// `allowedSources`: the networks that fireflies are accepted from; `None` for those of this host.
    pub allowed_sources: Option<Vec<IpNet>>,
}

/// The netlink plugin or the netstat plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connections {
    /// `rules`, then one that matches everything, for `experiment` and `activity` of the plugin if they are set.
    pub rules: Vec<ConnectionRule>,
    /// `internalNetworks`.
    pub internal_networks: Vec<IpNet>,
    /// `period`: the interval between scans.
    pub period: Duration,
    /// `announceExisting`.
    pub announce_existing: bool,
}

/// Which connections get which tag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionRule {
    /// `remoteNetworks`; empty matches all.
    pub remote_networks: Vec<IpNet>,
    /// `localPorts`; empty matches all.
    pub local_ports: Vec<RangeInclusive<u16>>,
    /// `remotePorts`; empty matches all.
    pub remote_ports: Vec<RangeInclusive<u16>>,
    /// `experiment` and `activity`.
    pub tag: Tag,
    /// `uid`: a user by name or id.
    pub user: Option<String>,
    /// `cgroup`: the path of a cgroup.
    pub cgroup: Option<PathBuf>,
}

/// The iperf3 plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iperf3 {
    /// The program that reports connections.
    pub sockops: Sockops,
    /// `randomIDs`: whether tags are chosen at random instead of in turn.
    pub random: bool,
    /// `internalNetworks`: connections to these networks and to addresses that are not globally reachable are
    /// ignored; `None` to ignore none.
    pub internal_networks: Option<Vec<IpNet>>,
    /// `experimentIDs` and `activityIDs`, pair by pair.
    pub tags: Vec<Tag>,
}

/// Settings of the sockops program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockops {
    /// `cgroupPath`: the directory of the cgroup.
    pub cgroup: PathBuf,
    /// `programPath`: an object to load instead of the built-in one.
    pub program: Option<PathBuf>,
    /// `debugMode`: whether the program writes to the trace pipe.
    pub debug: bool,
    /// Local ports of the connections that are reported; a bound of 0 means no limit.
    pub local_ports: RangeInclusive<u16>,
    /// Remote ports of the connections that are reported; a bound of 0 means no limit.
    pub remote_ports: RangeInclusive<u16>,
    /// The minimum interval between two reports on an open connection; `None` for no such reports.
    pub period: Option<Duration>,
    /// Whether each change of a connection's state is reported.
    pub transitions: bool,
}

#[cfg(feature = "bpf")]
impl Sockops {
    /// The settings for the loader of the program.
    pub fn program_settings(&self) -> sockops::Settings {
        sockops::Settings {
            cgroup: self.cgroup.clone(),
            program: self.program.clone(),
            debug: self.debug,
            local_ports: self.local_ports.clone(),
            remote_ports: self.remote_ports.clone(),
            period: self.period,
            transitions: self.transitions,
        }
    }
}

/// The netlink enricher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetlinkEnricher {
    /// `enrichers.period`.
    pub period: Duration,
    /// `protocol`.
    pub protocol: Protocol,
    /// `ext`: the attributes to request, a bit mask of the `INET_DIAG_*` numbers minus one.
    pub extensions: u8,
    /// `state`: the socket states to report, a bit mask of the kernel's numbers.
    pub states: u32,
}

/// The API plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Api {
    /// `bindAddress` and `bindPort`; `None` for port 0.
    pub bind: Option<SocketAddr>,
    /// `unixSocket` and `unixSocketMode`.
    pub unix_socket: Option<(PathBuf, u32)>,
    /// `token`.
    pub token: Option<String>,
    /// `tokenFile`.
    pub token_file: Option<PathBuf>,
    /// `dummyRoutes`.
    pub dummy_routes: bool,
}

/// The firefly backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firefly {
    /// `enrich` and `enrichmentMode`: the format of the socket statistics.
    pub enrichment: Option<Mode>,
    /// `ongoing`: whether `enrich` sends fireflies of open flows, too.
    pub ongoing: bool,
    /// `publicIPv4` and `publicIPv6`: the addresses to report instead of this host's own.
    pub public: [Option<IpAddr>; 2],
    /// `stun`.
    pub stun: Option<Stun>,
    /// `relayed`.
    pub relayed: Relayed,
    /// `maxRelayRate`: how many datagrams of received fireflies are sent to one address in a second, the collector
    /// excepted.
    pub max_relay_rate: u32,
    /// `destinationPort`.
    pub destination_port: u16,
    /// `prependSyslog`.
    pub prepend_syslog: bool,
    /// `collectorAddress` and `collectorPort`, with `sendToCollector`.
    pub collector: Option<Collector>,
}

/// How the public addresses of a host behind NAT are found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stun {
    /// `manualMapping`: addresses of this host, and the public addresses that they map to.
    pub manual: BTreeMap<IpAddr, IpAddr>,
    /// `httpServices`: URLs of services that return the client's address.
    pub http_services: Vec<String>,
    /// `stunServers`: hosts and ports.
    pub stun_servers: Vec<(String, u16)>,
}

/// Where to send fireflies of flows that were learned from a received firefly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relayed {
    /// To the collector; if the flow has an end on this host, to the remote end as well.
    Auto,
    /// To the collector only.
    Collector,
    /// To the collector, and to the remote end, or to the destination if neither end is on this host.
    Destination,
}

impl Relayed {
    /// All values, the default first.
    pub const ALL: [Relayed; 3] = [Relayed::Auto, Relayed::Collector, Relayed::Destination];

    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Relayed::Auto => "auto",
            Relayed::Collector => "collector",
            Relayed::Destination => "destination",
        }
    }
}

/// The marker backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marker {
    /// `targetInterfaces`; `None` for those with a global IPv6 address (`discoverInterfaces`).
    pub interfaces: Option<Vec<String>>,
    /// `removeQdisc`.
    pub remove_qdisc: bool,
    /// `programPath`; `None` for the built-in program.
    pub program_path: Option<PathBuf>,
    /// `markingStrategy`.
    pub strategy: Strategy,
    /// `matchAll`.
    pub match_all: bool,
    /// With `match_all`, the tag for all packets; `None` for that of the most recently started flow.
    pub all: Option<Tag>,
    /// `debugMode`.
    pub debug: bool,
    /// `priority` of the tc filter.
    pub priority: u32,
    /// `keepOnExit`.
    pub keep_on_exit: bool,
    /// `bpfFsPath`.
    pub bpf_fs_path: PathBuf,
}

/// The prometheus backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prometheus {
    /// `bindAddress`.
    pub address: IpAddr,
    /// `port`: all metrics.
    pub port: Option<u16>,
    /// `netlinkPort`: socket statistics of the netlink enricher, with the label `flavour`.
    pub netlink_port: Option<u16>,
    /// `skopsPort`: socket statistics of the skops enricher, with the label `flavour`.
    pub skops_port: Option<u16>,
    /// `perFlow`: whether each flow has series of its own.
    pub per_flow: bool,
    /// `maxSeries`: the maximum number of series of individual flows.
    pub max_series: usize,
}

/// The collector, which gets a copy of each firefly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    /// An address or a name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

impl Prometheus {
    /// The addresses of its endpoints, each with its key.
    pub fn listeners(&self) -> impl Iterator<Item = (SocketAddr, &'static str)> {
        let ports = [
            (self.port, "backends.prometheus.port"),
            (self.netlink_port, "backends.prometheus.netlinkPort"),
            (self.skops_port, "backends.prometheus.skopsPort"),
        ];
        let address = self.address;
        let listener =
            move |(port, key): (Option<u16>, _)| Some((SocketAddr::new(address, port?), key));
        ports.into_iter().filter_map(listener)
    }
}

impl Config {
    /// The registry settings without a configuration file.
    pub fn default_registry() -> registry::Settings {
        registry::Settings {
            url: REGISTRY_URL.to_owned(),
            cache_dir: WORK_DIR.into(),
        }
    }

    /// The settings for public addresses without a configuration file.
    pub fn default_stun() -> Stun {
        check::default_stun()
    }

    /// Names of the plugins that are enabled.
    pub fn plugin_names(&self) -> Vec<&'static str> {
        let plugins = [
            ("namedPipe", self.named_pipe.is_some()),
            ("firefly", self.firefly_plugin.is_some()),
            ("api", self.api.is_some()),
            ("perfsonar", self.perfsonar.is_some()),
            ("netlink", self.netlink.is_some()),
            ("netstat", self.netstat.is_some()),
            ("iperf3", self.iperf3.is_some()),
        ];
        enabled(&plugins)
    }

    /// Keys of the enabled parts that load eBPF programs.
    pub fn bpf_users(&self) -> Vec<&'static str> {
        enabled(&[
            ("backends.marker", self.marker.is_some()),
            ("plugins.iperf3", self.iperf3.is_some()),
            ("enrichers.skops", self.skops_enricher.is_some()),
        ])
    }

    /// Whether any enabled part loads eBPF programs.
    pub fn uses_bpf(&self) -> bool {
        !self.bpf_users().is_empty()
    }

    /// Names of the enrichers that are enabled.
    pub fn enricher_names(&self) -> Vec<&'static str> {
        let netlink = self.flows.end_on_socket_close || self.netlink_enricher.is_some();
        enabled(&[
            ("netlink", netlink),
            ("skops", self.skops_enricher.is_some()),
        ])
    }

    /// Names of the backends that are enabled.
    pub fn backend_names(&self) -> Vec<&'static str> {
        let backends = [
            ("firefly", self.firefly.is_some()),
            ("marker", self.marker.is_some()),
            ("prometheus", self.prometheus.is_some()),
            ("dummy", self.dummy),
        ];
        enabled(&backends)
    }

    /// Whether each flow's packets carry its tag in the flow label.
    pub fn labels_packets(&self) -> bool {
        let marker = self.marker.as_ref();
        marker.is_some_and(|marker| marker.strategy == Strategy::Label && !marker.match_all)
    }

    /// Logs warnings and notes.
    pub fn log_remarks(&self) {
        for warning in &self.warnings {
            log::warn!("{warning}");
        }
        for note in &self.notes {
            log::info!("{note}");
        }
    }
}

fn enabled(parts: &[(&'static str, bool)]) -> Vec<&'static str> {
    let enabled = parts.iter().filter(|(_, enabled)| *enabled);
    enabled.map(|(name, _)| *name).collect()
}
