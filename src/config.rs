//! The configuration: read, checked, and what comes out of it.
//!
//! Two steps: the file into [`raw`], where only keys and types count, then [`check`] into [`Config`],
//! where every value is in its range and has its default.

mod check;
mod flowd;
mod python;
mod raw;
mod show;
mod yaml;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use log::LevelFilter;

use crate::connections::Rule;
use crate::enrichment::Mode;
use crate::flow::{Protocol, Tag};

pub use check::log_level;
pub use flowd::KEYS as FLOWD_KEYS;
pub use show::{keys, schema};

/// Where the pinned maps of the marker lie, unless `bpfFsPath` says otherwise.
pub const BPF_FS_PATH: &str = "/sys/fs/bpf";
/// Where the configuration is looked for unless `-c` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/flowd/flowd.cfg";

/// The named pipe, unless `pipePath` says otherwise: flowd's, which storage services write to.
pub const PIPE_PATH: &str = "/var/run/flowd";
/// Where cached files are, unless `workDir` says otherwise: flowd-go's.
pub const WORK_DIR: &str = "/var/cache/flowd-go";
/// Where the registry is published.
pub const REGISTRY_URL: &str = "https://www.scitags.org/api.json";

/// Where the control socket is, unless `controlSocket` says otherwise; `instance` is `-NAME` of a daemon
/// beside others, empty for the only one.
pub fn control_socket(instance: &str) -> String {
    format!("/run/flowd-rs{instance}/control.sock")
}

/// Settings that the daemon can run with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `pidPath`: where the process id is written, for scripts; `None` for nowhere.
    pub pid_path: Option<PathBuf>,
    /// Whether `pidPath` stands in the file.
    pub pid_path_given: bool,
    /// `workDir`: cached files that may be lost.
    pub work_dir: PathBuf,
    /// `stateDir`: the journal of open flows and the lock.
    pub state_dir: PathBuf,
    /// `controlSocket`.
    pub control_socket: ControlSocket,
    /// `logLevel`.
    pub log_level: LevelFilter,
    /// `registry`.
    pub registry: Registry,
    /// `flows`.
    pub flows: Flows,
    /// `plugins.namedPipe`.
    pub named_pipe: Option<NamedPipe>,
    /// `plugins.firefly`.
    pub firefly_plugin: Option<FireflyPlugin>,
    /// `plugins.api`.
    pub api: Option<Api>,
    /// `plugins.perfsonar`: the tag of all packets.
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
    /// `backends.dummy`: flowd's; it does nothing.
    pub dummy: bool,
    /// Settings that are accepted and have no effect, each with the reason.
    pub notes: Vec<String>,
    /// Settings that do something else than they say, each with the reason.
    pub warnings: Vec<String>,
}

/// The socket that `flowd-rs flows` and `flowd-rs status` ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlSocket {
    /// Its path.
    pub path: PathBuf,
    /// Whether `controlSocket` stands in the file: then it must be had.
    pub given: bool,
}

/// Where the SciTags registry comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registry {
    /// `url`: http, https or file; empty for the one that is built in.
    pub url: String,
    /// `workDir`: where it is kept.
    pub cache: PathBuf,
}

/// Limits of the table of open flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flows {
    /// `maxFlows`: beyond it a start is refused.
    pub max_flows: usize,
    /// `maxAge`: a flow open for longer is ended.
    pub max_age: Duration,
    /// `endOnSocketClose`: a flow whose socket on this host has gone is ended.
    pub end_on_socket_close: bool,
}

/// The named pipe plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedPipe {
    /// `pipePath`.
    pub path: PathBuf,
    /// `mode` of a pipe that the daemon makes.
    pub mode: u32,
    /// `group` of a pipe that the daemon makes, by name or id.
    pub group: Option<String>,
}

/// The firefly plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FireflyPlugin {
    /// `bindAddress` and `bindPort`.
    pub bind: SocketAddr,
    /// `bufferSize`: the longest datagram, in bytes.
    pub buffer_size: usize,
}

/// The netlink plugin, or the netstat plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connections {
    /// `rules`, and `experiment` and `activity` as the last of them.
    pub rules: Vec<ConnectionRule>,
    /// `internalNetworks`.
    pub internal_networks: Vec<IpNet>,
    /// `period` of scans.
    pub period: Duration,
    /// `announceExisting`.
    pub announce_existing: bool,
}

/// Which connections get a tag.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionRule {
    /// What does not depend on the host.
    pub rule: Rule,
    /// `uid`: a user by name or id.
    pub user: Option<String>,
    /// `cgroup`: the path of a cgroup.
    pub cgroup: Option<PathBuf>,
}

/// The iperf3 plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iperf3 {
    /// What tells of connections.
    pub sockops: Sockops,
    /// `randomIDs`: tags are picked at random, not in turns.
    pub random: bool,
    /// `internalNetworks`: connections to these are left out, and those to addresses that are nobody's on
    /// the Internet; `None` to leave out nothing.
    pub internal_networks: Option<Vec<IpNet>>,
    /// `experimentIDs` and `activityIDs`, pair by pair.
    pub tags: Vec<Tag>,
}

/// How the sockops program is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockops {
    /// `cgroupPath`: the directory of the cgroup.
    pub cgroup: PathBuf,
    /// `programPath`: an object to load instead of the built-in one.
    pub program: Option<PathBuf>,
    /// `debugMode`: write to the trace pipe.
    pub debug: bool,
    /// Local ports that are looked at; 0 is no bound.
    pub local_ports: RangeInclusive<u16>,
    /// Remote ports that are looked at; 0 is no bound.
    pub remote_ports: RangeInclusive<u16>,
    /// News of a connection every so often, at most; `None` for none.
    pub period: Option<Duration>,
    /// News of a connection whenever its state changes.
    pub transitions: bool,
}

/// The netlink enricher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetlinkEnricher {
    /// `enrichers.period`.
    pub period: Duration,
    /// `protocol`.
    pub protocol: Protocol,
    /// `ext`: what is asked for, as bits of `INET_DIAG_*` less one.
    pub extensions: u8,
    /// `state`: the states of sockets, as bits of the kernel's numbers.
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
}

/// The firefly backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Firefly {
    /// `enrich` and `enrichmentMode`: the spelling of what the kernel knows.
    pub enrichment: Option<Mode>,
    /// `ongoing`: with `enrich`, news of flows is sent, too.
    pub ongoing: bool,
    /// `publicIPv4` and `publicIPv6`: what stands for the addresses of this host.
    pub public: [Option<IpAddr>; 2],
    /// `stun`.
    pub stun: Option<Stun>,
    /// `relayed`.
    pub relayed: Relayed,
    /// `destinationPort`.
    pub destination_port: u16,
    /// `prependSyslog`.
    pub prepend_syslog: bool,
    /// `collectorAddress` and `collectorPort`, with `sendToCollector`.
    pub collector: Option<Collector>,
}

/// How the public addresses behind private ones are found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stun {
    /// `manualMapping`: an address of this host, and what stands for it.
    pub manual: BTreeMap<IpAddr, IpAddr>,
    /// `httpServices`: URLs that answer with the address of who asks.
    pub http_services: Vec<String>,
    /// `stunServers`: hosts and ports.
    pub stun_servers: Vec<(String, u16)>,
}

/// Who is told of flows that the daemon has heard of by a firefly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relayed {
    /// The collector; of flows with an end on this host, the other end as well.
    Auto,
    /// The collector alone.
    Collector,
    /// The collector, and the other end or the destination.
    Destination,
}

impl Relayed {
    /// Every choice, the default first.
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
    /// The tag of all packets, if it is not that of the last flow started.
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
    /// `port`: everything.
    pub port: Option<u16>,
    /// `netlinkPort`: sockets by `sock_diag`, with the label `flavour`.
    pub netlink_port: Option<u16>,
    /// `skopsPort`: sockets by the sockops program, with the label `flavour`.
    pub skops_port: Option<u16>,
    /// `perFlow`: flows have series of their own.
    pub per_flow: bool,
    /// `maxSeries`: how many series of single flows there may be.
    pub max_series: usize,
}

/// Where in the IPv6 header a packet carries its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// In the flow label.
    Label,
    /// In a Hop-by-Hop Options header.
    HopByHop,
    /// In a Destination Options header.
    Destination,
    /// In both.
    HopByHopDestination,
}

impl Strategy {
    /// Every strategy, in the order of their numbers.
    pub const ALL: [Strategy; 4] = [
        Strategy::Label,
        Strategy::HopByHop,
        Strategy::Destination,
        Strategy::HopByHopDestination,
    ];

    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Strategy::Label => "label",
            Strategy::HopByHop => "hopByHop",
            Strategy::Destination => "destination",
            Strategy::HopByHopDestination => "hopByHopDestination",
        }
    }
}

/// Where copies of all fireflies go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Collector {
    /// An address or a name.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

/// What is wrong with a configuration, where, and what was expected.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// Line and column, from 1.
    pub place: Option<(usize, usize)>,
    /// The key, by dots; empty for the file as a whole.
    pub key: String,
    /// What was wrong and what was expected.
    pub message: String,
    /// The line of the place.
    pub line: Option<String>,
}

impl ConfigError {
    /// The line with a caret below the place, for people; empty without a place.
    pub fn excerpt(&self) -> String {
        let (Some((number, column)), Some(line)) = (self.place, &self.line) else {
            return String::new();
        };
        // Tabs stay, so that the caret is below what it points at.
        let before = line.chars().take(column - 1);
        let indent: String = before.map(|c| if c == '\t' { c } else { ' ' }).collect();
        format!("{number:>5} | {line}\n      | {indent}^\n")
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.path.display())?;
        if let Some((line, column)) = self.place {
            write!(f, "{line}:{column}:")?;
        }
        if !self.key.is_empty() {
            write!(f, " {}:", self.key)?;
        }
        write!(f, " {}", self.message)
    }
}

impl Prometheus {
    /// Where it is scraped, and by which keys.
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
    /// Where the registry comes from if no configuration says it.
    pub fn default_registry() -> Registry {
        Registry {
            url: REGISTRY_URL.to_owned(),
            cache: WORK_DIR.into(),
        }
    }

    /// How public addresses are found if no configuration says it.
    pub fn default_stun() -> Stun {
        check::default_stun()
    }

    /// Names of the plugins that are enabled.
    pub fn plugin_names(&self) -> Vec<&'static str> {
        let plugins = [
            ("named_pipe", self.named_pipe.is_some()),
            ("firefly", self.firefly_plugin.is_some()),
            ("api", self.api.is_some()),
            ("perfsonar", self.perfsonar.is_some()),
            ("netlink", self.netlink.is_some()),
            ("netstat", self.netstat.is_some()),
            ("iperf3", self.iperf3.is_some()),
        ];
        enabled(&plugins)
    }

    /// The keys of what is enabled and loads eBPF programs.
    pub fn bpf_users(&self) -> Vec<&'static str> {
        enabled(&[
            ("backends.marker", self.marker.is_some()),
            ("plugins.iperf3", self.iperf3.is_some()),
            ("enrichers.skops", self.skops_enricher.is_some()),
        ])
    }

    /// Names of the enrichers that are enabled.
    pub fn enricher_names(&self) -> Vec<&'static str> {
        let sockets = self.flows.end_on_socket_close || self.netlink_enricher.is_some();
        enabled(&[
            ("sockets", sockets),
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

    /// Whether packets carry their tag in the flow label.
    pub fn labels_packets(&self) -> bool {
        let marker = self.marker.as_ref();
        marker.is_some_and(|marker| marker.strategy == Strategy::Label && !marker.match_all)
    }

    /// Logs what has no effect, or another than it seems.
    pub fn log_remarks(&self) {
        for warning in &self.warnings {
            log::warn!("{warning}");
        }
        for note in &self.notes {
            log::info!("{note}");
        }
    }

    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        Config::parse(&read(path)?, path)
    }

    /// Reads where the registry of a file comes from, and checks nothing else: its names may be those of a
    /// registry that is yet to be fetched.
    pub fn load_registry(path: &Path) -> Result<Registry, ConfigError> {
        let text = read(path)?;
        let error = |place, key, message| at(path, &text, place, key, message);
        let yaml = match is_python(&text) {
            true => {
                let converted = Config::convert(&text);
                converted
                    .map_err(|e| error(e.place, e.key, e.message))?
                    .yaml
            }
            false => text.clone(),
        };
        let raw = yaml::read(&yaml).map_err(|e| error(e.place, e.key, e.message))?;
        let settings = check::registry_of(raw);
        settings.map_err(|e| error(None, e.key, e.message))
    }

    /// Checks a text; `path` is for its errors.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        let error = |place, key, message| at(path, text, place, key, message);
        if !is_python(text) {
            return Config::from_yaml(text, &instance(path))
                .map_err(|e| error(e.place, e.key, e.message));
        }
        let converted = Config::convert(text).map_err(|e| error(e.place, e.key, e.message))?;
        let config = Config::from_yaml(&converted.yaml, &instance(path));
        let mut config = config.map_err(|e| {
            // The nearest key above that has an origin.
            let mut known = e.key.as_str();
            while !converted.origins.contains_key(known) {
                known = known
                    .rsplit_once('.')
                    .map_or("plugins", |(parent, _)| parent);
            }
            let (key, place) = converted.origins[known];
            error(Some(place), key.to_owned(), e.message)
        })?;
        config.notes.splice(0..0, converted.notes);
        Ok(config)
    }

    /// The YAML that a file of flowd's means, once it is checked.
    pub fn converted(path: &Path) -> Result<String, ConfigError> {
        let text = read(path)?;
        if !is_python(&text) {
            let message = "not a KEY=value file of flowd: there is nothing to convert";
            return Err(at(path, &text, None, String::new(), message.to_owned()));
        }
        Config::parse(&text, path)?;
        let converted = Config::convert(&text);
        let converted = converted.map_err(|e| at(path, &text, e.place, e.key, e.message))?;
        let notes = converted.notes.iter().map(|note| format!("# {note}\n"));
        Ok(converted.yaml + &notes.collect::<String>())
    }

    fn from_yaml(text: &str, instance: &str) -> Result<Config, yaml::YamlError> {
        let raw = yaml::read(text)?;
        check::check(raw, instance).map_err(|e| {
            let parts: Vec<&str> = e.key.split('.').collect();
            yaml::YamlError {
                place: yaml::locate(text, &parts, e.element),
                key: e.key,
                message: e.message,
            }
        })
    }

    fn convert(text: &str) -> Result<flowd::Converted, flowd::FlowdError> {
        let assignments = python::read(text).map_err(|mistake| flowd::FlowdError {
            place: Some(mistake.place),
            key: String::new(),
            message: mistake.message,
        })?;
        flowd::convert(assignments)
    }
}

/// What is wrong with a file that [`is_writable_by_all`].
pub const WRITABLE_BY_ALL: &str =
    "everybody may write to it, expected a mode of at most 0664 (chmod o-w)";

/// Whether any user of this host could have written what stands in the file.
pub fn is_writable_by_all(path: &Path) -> bool {
    let metadata = std::fs::metadata(path);
    metadata.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o002 != 0)
}

/// The longest file that is read, in bytes.
const LENGTH_MAX: u64 = 1 << 20;

fn read(path: &Path) -> Result<String, ConfigError> {
    let whole = |message: String| at(path, "", None, String::new(), message);
    if is_writable_by_all(path) {
        return Err(whole(WRITABLE_BY_ALL.to_owned()));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(LENGTH_MAX + 1).read_to_end(&mut bytes))
        .map_err(|e| whole(format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > LENGTH_MAX {
        return Err(whole(format!(
            "over {} KiB, expected a configuration",
            LENGTH_MAX >> 10
        )));
    }
    String::from_utf8(bytes).map_err(|e| {
        let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        let line = 1 + valid.iter().filter(|&&b| b == b'\n').count();
        whole(format!("line {line} is not UTF-8"))
    })
}

fn at(
    path: &Path,
    text: &str,
    place: Option<(usize, usize)>,
    key: String,
    message: String,
) -> ConfigError {
    let line = |(line, _): (usize, usize)| text.lines().nth(line - 1).map(str::to_owned);
    ConfigError {
        path: path.to_owned(),
        line: place.and_then(line),
        place,
        key,
        message,
    }
}

/// `-NAME` of a file `flowd-NAME.cfg`, as `flowd-rs@NAME.service` reads it.
fn instance(path: &Path) -> String {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.and_then(|name| name.strip_prefix("flowd-")?.strip_suffix(".cfg"));
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '@');
    let name = name.filter(|name| !name.is_empty() && name.chars().all(good));
    name.map_or_else(String::new, |name| format!("-{name}"))
}

fn enabled(parts: &[(&'static str, bool)]) -> Vec<&'static str> {
    let enabled = parts.iter().filter(|(_, enabled)| *enabled);
    enabled.map(|(name, _)| *name).collect()
}

/// Whether the first line that says something is a `KEY=` of flowd's.
fn is_python(text: &str) -> bool {
    let says = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    let first = text.trim_start_matches('\u{feff}').lines().find(says);
    // What flowd would have executed, and flowd-rs refuses.
    let statement = |line: &str| {
        ["import ", "from ", "\"\"\"", "\'\'\'"]
            .iter()
            .any(|word| line.starts_with(word))
    };
    if first.is_some_and(statement) {
        return true;
    }
    let key = first
        .and_then(|line| line.split_once('='))
        .map(|(key, _)| key.trim());
    let is_key = |c: char| c.is_ascii_alphanumeric() || c == '_';
    key.is_some_and(|key| !key.is_empty() && key.chars().all(is_key))
}
