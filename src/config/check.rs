//! The second step: defaults, ranges, and which settings exclude or require each other.

mod backends;
mod connections;
pub mod plugins;
mod sockops;
mod stun;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use log::LevelFilter;

use super::yaml::{self, YamlError};
use super::{Config, ControlSocket, Flows, REGISTRY_URL, Stun, WORK_DIR, control_socket, raw};
use crate::registry;

/// The default of flowd-go.
const PID_PATH: &str = "/var/run/flowd-go.pid";
const STATE_DIR: &str = "/var/lib/flowd";
const MAX_FLOWS: i64 = 1_000_000;
const MAX_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// A key whose value is wrong, or missing.
pub struct CheckError {
    pub key: String,
    /// Which element, from 0, if the value is a list.
    pub element: Option<usize>,
    pub message: String,
}

impl CheckError {
    /// The error at its place in the YAML.
    pub fn locate(self, text: &str) -> YamlError {
        let parts: Vec<&str> = self.key.split('.').collect();
        // A key that is missing is reported at its parent.
        let parents = (1..parts.len()).rev().map(|depth| &parts[..depth]);
        let place = yaml::locate(text, &parts, self.element).or_else(|| {
            parents
                .into_iter()
                .find_map(|key| yaml::locate(text, key, None))
        });
        YamlError {
            place,
            key: self.key,
            message: self.message,
        }
    }
}

/// The result of a check.
pub type Result<T> = std::result::Result<T, CheckError>;

/// The error for a value.
pub fn error<T>(key: &str, message: impl Into<String>) -> Result<T> {
    Err(CheckError {
        key: key.to_owned(),
        element: None,
        message: message.into(),
    })
}

/// The error for an element of a list, from 0.
pub fn error_in<T>(key: &str, element: usize, message: impl Into<String>) -> Result<T> {
    error(key, message).map_err(|error| CheckError {
        element: Some(element),
        ..error
    })
}

/// Fills in defaults and checks all values. `instance` is the suffix of the directories of this daemon: `-NAME`, or
/// empty for the only daemon of the host.
pub fn check(raw: raw::Raw, instance: &str) -> Result<Config> {
    let (mut notes, mut warnings) = (Vec::new(), Vec::new());
    let (plugins, backends) = (raw.plugins, raw.backends);
    let enrichers = raw.enrichers.unwrap_or_default();
    let has_skops = enrichers.skops.is_some();
    let named_pipe = plugins
        .named_pipe
        .map(|p| plugins::named_pipe(p, &mut notes))
        .transpose()?;
    let firefly_plugin = plugins
        .firefly
        .map(|p| plugins::firefly(p, &mut notes))
        .transpose()?;
    let api = plugins.api.map(plugins::api).transpose()?;
    let work_dir = path("workDir", raw.work_dir, WORK_DIR)?;
    let registry = registry(raw.registry, &work_dir)?;
    let connections = |section: &str, raw| {
        let (registry, _) = registry::load_cached_or_builtin(&registry);
        connections::check(section, raw, &registry)
    };
    let netlink = plugins.netlink.map(|p| connections("plugins.netlink", p));
    let netstat = plugins.netstat.map(|p| connections("plugins.netstat", p));
    let (netlink, netstat) = (netlink.transpose()?, netstat.transpose()?);
    if let Some(rule) = netstat
        .iter()
        .flat_map(|n| &n.rules)
        .find(|r| r.cgroup.is_some())
    {
        let path = rule.cgroup.as_deref().unwrap_or(Path::new("")).display();
        let message = format!(
            "cgroup {path}: /proc/net/tcp does not show the cgroup of a socket, use plugins.netlink instead"
        );
        return error("plugins.netstat.rules", message);
    }
    let perfsonar = plugins.perfsonar.map(plugins::perfsonar).transpose()?;
    let firefly = backends.firefly.map(backends::firefly).transpose()?;
    let mut marker = backends
        .marker
        .map(|m| backends::marker(m, &mut notes))
        .transpose()?;
    match (perfsonar, &mut marker) {
        (None, _) => {}
        (Some(_), None) => {
            let message = "backends.marker must be enabled, too: it marks the packets";
            return error("plugins.perfsonar", message);
        }
        (Some(_), Some(marker)) => {
            marker.all = perfsonar;
            if !marker.match_all {
                marker.match_all = true;
                warnings.push(
                    "backends.marker.matchAll is set to true: plugins.perfsonar marks every packet"
                        .to_owned(),
                );
            }
        }
    }
    let prometheus = backends
        .prometheus
        .map(|p| backends::prometheus(p, has_skops, &mut notes))
        .transpose()?;
    connections::period(
        "enrichers.period",
        enrichers.period.as_deref(),
        connections::ENRICHER_PERIOD,
    )?;
    // Ongoing fireflies and socket metrics need an enricher.
    let sends_ongoing = firefly
        .as_ref()
        .is_some_and(|f| f.enrichment.is_some() && f.ongoing);
    let needs_enricher = sends_ongoing || prometheus.is_some();
    let max_flows = range(
        "flows.maxFlows",
        raw.flows.max_flows,
        MAX_FLOWS,
        1,
        100_000_000,
    )?;
    let config = Config {
        pid_path_given: raw.pid_path.is_some(),
        pid_path: match raw.pid_path.as_deref() {
            Some("") => None,
            path => Some(PathBuf::from(path.unwrap_or(PID_PATH))),
        },
        work_dir,
        registry,
        state_dir: path("stateDir", raw.state_dir, &format!("{STATE_DIR}{instance}"))?,
        control_socket: ControlSocket {
            given: raw.control_socket.is_some(),
            path: path(
                "controlSocket",
                raw.control_socket,
                &control_socket(instance),
            )?,
        },
        log_level: match raw.log_level {
            Some(level) => log_level(&level).or_else(|message| error("logLevel", message))?,
            None => LevelFilter::Info,
        },
        flows: Flows {
            max_flows,
            // A tenth is left for the others; a small table is not divided.
            max_per_source: range(
                "flows.maxPerSource",
                raw.flows.max_per_source,
                (max_flows - max_flows / 10) as i64,
                1,
                100_000_000,
            )?,
            max_age: match raw.flows.max_age {
                Some(text) => duration("flows.maxAge", &text)?,
                None => MAX_AGE,
            },
            end_on_socket_close: raw.flows.end_on_socket_close.unwrap_or(true),
        },
        named_pipe,
        firefly_plugin,
        api,
        perfsonar,
        netlink,
        netstat,
        iperf3: plugins.iperf3.map(sockops::iperf3).transpose()?,
        skops_enricher: match enrichers.skops {
            Some(skops) => Some(sockops::enricher(skops, enrichers.period.as_deref())?),
            None => None,
        },
        netlink_enricher: match enrichers.netlink {
            Some(netlink) => Some(connections::enricher(netlink, enrichers.period.as_deref())?),
            None if !has_skops && needs_enricher => Some(connections::enricher(
                Default::default(),
                enrichers.period.as_deref(),
            )?),
            None => None,
        },
        firefly,
        marker,
        prometheus,
        dummy: backends.dummy.is_some(),
        notes,
        warnings,
    };
    check_ports_distinct(&config)?;
    if config.plugin_names().is_empty() {
        return error(
            "plugins",
            "no plugin is enabled, expected at least one (namedPipe, firefly, api, perfsonar, netlink, netstat, iperf3)",
        );
    }
    if config.backend_names().is_empty() {
        return error(
            "backends",
            "no backend is enabled, expected at least one (firefly, marker, prometheus)",
        );
    }
    Ok(config)
}

/// `backends.firefly.stun` with its defaults.
pub fn default_stun() -> Stun {
    stun::check(raw::Stun::default()).unwrap_or_default()
}

/// Two listeners cannot have the same address and TCP port.
fn check_ports_distinct(config: &Config) -> Result<()> {
    let api = config.api.as_ref().and_then(|api| api.bind);
    let mut listeners: Vec<_> = api
        .map(|bind| (bind, "plugins.api.bindPort"))
        .into_iter()
        .collect();
    if let Some(prometheus) = &config.prometheus {
        for (address, key) in prometheus.listeners() {
            if let Some((_, other)) = listeners.iter().find(|(used, _)| *used == address) {
                let port = address.port();
                return error(key, format!("port {port} is already used by {other}"));
            }
            listeners.push((address, key));
        }
    }
    Ok(())
}

/// Checks only the settings that the registry needs.
pub fn registry_settings(raw: raw::Raw) -> Result<registry::Settings> {
    registry(raw.registry, &path("workDir", raw.work_dir, WORK_DIR)?)
}

/// The settings of the registry, which is cached in `work_dir`.
pub fn registry(raw: raw::Registry, work_dir: &Path) -> Result<registry::Settings> {
    let url = raw.url.unwrap_or_else(|| REGISTRY_URL.to_owned());
    let host_and_path = ["http://", "https://"]
        .iter()
        .find_map(|s| url.strip_prefix(s));
    let is_http =
        host_and_path.is_some_and(|rest| !rest.is_empty() && !rest.contains(char::is_whitespace));
    if !url.is_empty() && !is_http && !url.starts_with("file:///") {
        let message = format!(
            "\"{}\" is not a valid URL, expected https://…, http://…, file:///…, or \"\" for the built-in registry",
            url.escape_debug()
        );
        return error("registry.url", message);
    }
    Ok(registry::Settings {
        url,
        cache_dir: work_dir.to_owned(),
    })
}

/// A number within bounds.
pub fn range<T: TryFrom<i64>>(
    key: &str,
    value: Option<i64>,
    default: i64,
    min: i64,
    max: i64,
) -> Result<T> {
    let value = value.unwrap_or(default);
    match T::try_from(value) {
        Ok(number) if (min..=max).contains(&value) => Ok(number),
        _ => error(
            key,
            format!("{value} is out of range, expected {min} to {max}"),
        ),
    }
}

/// A path that is not empty.
pub fn path(key: &str, value: Option<String>, default: &str) -> Result<PathBuf> {
    match value.as_deref() {
        Some("") => error(key, "empty, expected a path"),
        value => Ok(PathBuf::from(value.unwrap_or(default))),
    }
}

/// Permissions in octal digits, as for chmod(1); YAML's `0o666` is accepted, too.
fn octal(key: &str, text: &str) -> Result<u32> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o777 && !digits.starts_with('+') => Ok(mode),
        _ => error(
            key,
            format!(
                "\"{}\" is not a valid file mode, expected octal digits, 0000 to 0777",
                text.escape_debug()
            ),
        ),
    }
}

/// `7d`, `36h`, `90 min`, or a number of seconds.
pub fn duration(key: &str, text: &str) -> Result<Duration> {
    let seconds = match text.parse::<u64>() {
        Ok(seconds) => Some(seconds),
        Err(_) => Span::from_str(text)
            .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()))
            .ok()
            .and_then(|duration| u64::try_from(duration.as_secs()).ok()),
    };
    match seconds {
        Some(seconds @ 1..=3_155_760_000) => Ok(Duration::from_secs(seconds)),
        _ => error(
            key,
            format!(
                "\"{}\" is not a valid time, expected 1 second to 100 years: a number of seconds, or for example 7d, 36h or 90min",
                text.escape_debug()
            ),
        ),
    }
}

/// `error`, `warn`, `info`, `debug` or `trace`, in any case.
pub fn log_level(word: &str) -> std::result::Result<LevelFilter, String> {
    match LevelFilter::from_str(word) {
        Ok(level) if level != LevelFilter::Off => Ok(level),
        _ => Err(format!(
            "\"{}\" is not a valid log level, expected error, warn, info, debug or trace",
            word.escape_debug()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    fn parse(text: &str) -> std::result::Result<Config, String> {
        Config::parse(text, Path::new("f")).map_err(|e| e.to_string())
    }

    const MINIMAL: &str = "plugins:\n  namedPipe:\nbackends:\n  firefly: {}\n";

    #[test]
    fn defaults_are_those_of_flowd_and_flowd_go() {
        let config = parse(MINIMAL).unwrap();
        assert_eq!(config.pid_path, Some("/var/run/flowd-go.pid".into()));
        assert_eq!(config.work_dir, Path::new("/var/cache/flowd-go"));
        assert_eq!(config.state_dir, Path::new("/var/lib/flowd"));
        assert_eq!(config.flows.max_flows, 1_000_000);
        assert_eq!(config.flows.max_age, Duration::from_secs(604_800));
        let pipe = config.named_pipe.unwrap();
        assert_eq!(
            (pipe.path.as_path(), pipe.mode),
            (Path::new("/var/run/flowd"), 0o666)
        );
        let firefly = config.firefly.unwrap();
        assert_eq!(
            (firefly.destination_port, firefly.prepend_syslog),
            (10514, true)
        );
        assert_eq!(firefly.collector, None);
    }

    #[test]
    fn values_are_read() {
        let config = parse(
            "logLevel: Debug\npidPath: ''\nflows: {maxFlows: 5, maxAge: 1d 12h}\n\
             plugins: {namedPipe: {mode: 0o620, group: 0, pipePath: p, maxReaders: 5}}\n\
             backends: {firefly: {sendToCollector: true, collectorAddress: '[::1]', collectorPort: 7, enrich: false}}\n",
        )
        .unwrap();
        assert_eq!(
            (config.log_level, config.pid_path),
            (LevelFilter::Debug, None)
        );
        assert_eq!(
            config.flows,
            Flows {
                max_flows: 5,
                max_per_source: 5,
                max_age: Duration::from_secs(36 * 3600),
                end_on_socket_close: true
            }
        );
        let pipe = config.named_pipe.unwrap();
        assert_eq!((pipe.mode, pipe.group.as_deref()), (0o620, Some("0")));
        let collector = config.firefly.unwrap().collector.unwrap();
        assert_eq!((collector.host.as_str(), collector.port), ("::1", 7));
        assert_eq!(config.notes.len(), 1);
    }

    /// Every key of flowd-go's manual page with its default, except perfSONAR's ids, whose default of 0 flowd-go does
    /// not accept itself.
    #[cfg(feature = "bpf")]
    #[test]
    fn flowd_gos_configuration_works_as_it_is() {
        let config = parse(
            r#"
pidPath: "/var/run/flowd-go.pid"
workDir: "/var/cache/flowd-go"
plugins:
    namedPipe: {maxReaders: 5, buffSize: 1000, pipePath: "/var/run/flowd-go/np"}
    api: {bindAddress: "127.0.0.1", bindPort: 7777}
    firefly: {bindAddress: "127.0.0.1", bindPort: 10514, bufferSize: 4096, deadline: 0, hasSyslogHeader: false}
    perfsonar: {activityId: 9, experimentId: 2}
    iperf3:
        minSourcePort: 0
        maxSourcePort: 0
        minDestinationPort: 0
        maxDestinationPort: 0
        cgroupPath: /sys/fs/cgroup
        programPath: ""
        debugMode: false
        randomIDs: false
        experimentIDs: [0, 1, 2]
        activityIDs: [0, 1, 2]
backends:
    marker:
        targetInterfaces: ["lo"]
        discoverInterfaces: false
        removeQdisc: true
        programPath: ""
        markingStrategy: "label"
        matchAll: false
        debugMode: false
    firefly:
        destinationPort: 10514
        prependSyslog: true
        sendToCollector: false
        collectorAddress: "127.0.0.1"
        collectorPort: 10514
        enrich: false
        enrichmentMode: "lean"
        stun:
            manualMapping: {}
            stunServers:
                - "stun.l.google.com:3478"
                - "stun1.l.google.com:3478"
                - "stun2.l.google.com:3478"
                - "stun3.l.google.com:3478"
                - "stun4.l.google.com:3478"
    prometheus: {log: true, bindAddress: "127.0.0.1", netlinkPort: 8080, skopsPort: 8081}
enrichers:
    period: 1000
    netlink: {protocol: 6, ext: 255, state: 3071}
    skops: {cgroupPath: "/sys/fs/cgroup", programPath: "", debugMode: false, strategy: "poll"}
"#,
        )
        .unwrap();
        // The same as sections without values, except the pipe.
        let defaults = parse(
            "plugins: {namedPipe: {pipePath: /var/run/flowd-go/np}, api: , firefly: , perfsonar: {activityId: 9, experimentId: 2}, iperf3: }\n\
             backends: {marker: , firefly: {stun: }, prometheus: }\nenrichers: {netlink: , skops: }\n",
        )
        .unwrap();
        let comparable = |config: Config| Config {
            notes: Vec::new(),
            pid_path_given: false,
            ..config
        };
        assert_eq!(comparable(config), comparable(defaults));
    }

    #[test]
    fn each_error_names_line_key_and_what_was_expected() {
        for (text, expected) in [
            (
                "",
                "f: plugins: no plugin is enabled, expected at least one (namedPipe, firefly, api, perfsonar, netlink, netstat, iperf3)",
            ),
            (
                "plugins: {namedPipe: }\n",
                "f: backends: no backend is enabled, expected at least one (firefly, marker, prometheus)",
            ),
            (
                "plugins:\n  netlink:\n    rules:\n      - {experiment: 2, activity: 9}\n      - experiment: 2\n        activity: 9\n        localPorts: [x]\nbackends: {dummy: }\n",
                "f:5:9: plugins.netlink.rules: rule 2: localPorts: \"x\" is not a valid port or range, expected for example 1094 or 20000-25000",
            ),
            (
                "plugins: {api: {bindPort: 9000}}\nbackends:\n  prometheus: {port: 9000}\n",
                "f:3:22: backends.prometheus.port: port 9000 is already used by plugins.api.bindPort",
            ),
            (
                "plugins: {namedPipe: }\nbackends: {firefly: {collectorAddress: 'col:10514'}}\n",
                "f:2:40: backends.firefly.collectorAddress: \"col:10514\" is not a valid address or host name; the port belongs in collectorPort",
            ),
            (
                "plugins: {namedPipe: }\nbackends: {dummy: }\nenrichers: {period: rubbish}\n",
                "f:3:21: enrichers.period: \"rubbish\" is not a valid time, expected 10 ms to 1 day: a number of milliseconds, or for example 2s",
            ),
            (
                "plugins:\n  marker: {}\n",
                "f:2:3: plugins.marker: unknown key, did you mean `backends.marker`?",
            ),
            (
                "plugins:\n  iperf3:\n    period: 3\n",
                "f:3:5: plugins.iperf3.period: unknown key, expected one of minSourcePort, maxSourcePort, minDestinationPort, maxDestinationPort, cgroupPath, programPath, debugMode, randomIDs, experimentIDs, activityIDs, internalNetworks",
            ),
            (
                "plugins: {namedPipe: {}}\nbackends: {prometheus: {port: 9000, netlinkPort: 9000}}\n",
                "f:2:50: backends.prometheus.netlinkPort: port 9000 is already used by backends.prometheus.port",
            ),
            (
                "plugins: {namedPipe: {}}\nbackends: {prometheus: {netlinkPort: 0, skopsPort: 0}}\n",
                "f:2:24: backends.prometheus: no port is set, expected at least one of port, netlinkPort and skopsPort",
            ),
            (
                "plugins: {namedPipe: {}}\nbackends: {prometheus: {bindAddress: everywhere}}\n",
                "f:2:38: backends.prometheus.bindAddress: \"everywhere\" is not a valid address, expected an IPv4 or IPv6 address of this host, or 0.0.0.0 or :: for all",
            ),
            (
                "plugins: {namedPipe: {mode: 999}}\n",
                "f:1:29: plugins.namedPipe.mode: \"999\" is not a valid file mode, expected octal digits, 0000 to 0777",
            ),
            (
                "plugins: {namedPipe: {mode: 1777}}\n",
                "f:1:29: plugins.namedPipe.mode: \"1777\" is not a valid file mode, expected octal digits, 0000 to 0777",
            ),
            (
                "plugins: {namedPipe: {buffSize: 0}}\n",
                "f:1:33: plugins.namedPipe.buffSize: 0 is out of range, expected 1 to 4294967295",
            ),
            (
                "plugins: {namedPipe: }\nbackends:\n  firefly:\n    collectorPort: 65536\n",
                "f:4:20: backends.firefly.collectorPort: 65536 is out of range, expected 1 to 65535",
            ),
            (
                "plugins: {namedPipe: }\nbackends: {firefly: {stun: {stunServers: ['a:b']}}}\n",
                "f:2:42: backends.firefly.stun.stunServers: \"a:b\" is not a valid server, expected HOST or HOST:PORT",
            ),
            (
                "plugins: {namedPipe: }\nbackends: {firefly: {stun: {manualMapping: {10.0.0.1: '::1'}}}}\n",
                "f:2:44: backends.firefly.stun.manualMapping: 10.0.0.1 and ::1 have different address families, expected the same",
            ),
            (
                "plugins: {namedPipe: }\nbackends: {firefly: {publicIPv4: '::1'}}\n",
                "f:2:34: backends.firefly.publicIPv4: \"::1\" is not a valid IPv4 address",
            ),
            (
                "registry: {url: ftp://x}\n",
                "f:1:17: registry.url: \"ftp://x\" is not a valid URL, expected https://…, http://…, file:///…, or \"\" for the built-in registry",
            ),
            (
                "plugins: {namedPipe: }\nbackends: {firefly: {enrichmentMode: fat}}\n",
                "f:2:38: backends.firefly.enrichmentMode: \"fat\" is not a valid mode, expected lean, compatible, flowd, or \"\" for everything",
            ),
            (
                "pidPath: 'x\n",
                "f:1:10: pidPath: this quote is never closed",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err(), expected, "{text}");
        }
        for (line, key) in [
            ("flows: {maxFlows: 0}", "flows.maxFlows"),
            ("flows: {maxAge: soon}", "flows.maxAge"),
            ("flows: {maxAge: 0}", "flows.maxAge"),
            ("logLevel: loud", "logLevel"),
            ("logLevel: off", "logLevel"),
            ("stateDir: ''", "stateDir"),
        ] {
            let error = parse(&format!("{MINIMAL}{line}\n")).unwrap_err();
            assert!(error.starts_with("f:5:") && error.contains(key), "{error}");
        }
    }
}
