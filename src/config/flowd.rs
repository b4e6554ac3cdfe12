//! Converts the `KEY=value` configuration of flowd to YAML, and keeps which key each line comes from. No I/O.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::python::{Assignment, Place, Value};
use crate::config::nearest::nearest;

/// Every key.
pub const KEYS: [&str; 24] = [
    "PLUGIN",
    "BACKEND",
    "FLOW_MAP_API",
    "NP_API_FILE",
    "FIREFLY_LISTENER_HOST",
    "FIREFLY_LISTENER_PORT",
    "NETSTAT_EXPERIMENT",
    "NETSTAT_ACTIVITY",
    "NETSTAT_INTERNAL_NETWORKS",
    "NETSTAT_TIMEOUT",
    "NETLINK_EXPERIMENT",
    "NETLINK_ACTIVITY",
    "NETLINK_INTERNAL_NETWORKS",
    "NETLINK_TIMEOUT",
    "IPERF_FLOW_ID",
    "IPERF_INTERNAL_NETWORKS",
    "IP_DISCOVERY_ENABLED",
    "UDP_FIREFLY_DST",
    "UDP_FIREFLY_IP4_SRC",
    "UDP_FIREFLY_IP6_SRC",
    "UDP_FIREFLY_NETLINK",
    "NETWORK_INTERFACE",
    "PROMETHEUS_SS_PATH",
    "PROMETHEUS_SRV_PORT",
];
const PLUGINS: [&str; 6] = [
    "netstat", "netlink", "np_api", "firefly", "iperf", "iperf_rr",
];
const BACKENDS: [&str; 6] = [
    "udp_firefly",
    "prometheus",
    "dummy",
    "ebpf",
    "ebpf_el8",
    "ebpf_el9",
];
/// The tags of the iperf plugins by default.
const IPERF_TAGS: [(i64, i64); 8] = [
    (2, 9),
    (2, 19),
    (3, 3),
    (3, 4),
    (4, 3),
    (4, 4),
    (5, 10),
    (5, 14),
];

/// The file in YAML.
#[derive(Debug)]
pub struct Converted {
    /// The text; a comment in each line names the key that it comes from.
    pub yaml: String,
    /// For each key of the YAML, by dots, the key of the file that it comes from, and its place.
    pub origins: HashMap<String, (&'static str, Place)>,
    /// Keys without effect, each with the reason.
    pub notes: Vec<String>,
}

/// A key whose value is wrong, or missing.
#[derive(Debug, PartialEq, Eq)]
pub struct FlowdError {
    /// Where.
    pub place: Option<Place>,
    /// The key; empty if the error is not about one.
    pub key: String,
    /// What was wrong and what was expected.
    pub message: String,
}

type Result<T> = std::result::Result<T, FlowdError>;

/// Converts the assignments to YAML with the meaning that they have in flowd.
pub fn convert(assignments: Vec<Assignment>) -> Result<Converted> {
    let mut notes = Vec::new();
    let mut given: HashMap<&'static str, Assignment> = HashMap::new();
    for assignment in assignments {
        let Some(key) = KEYS.into_iter().find(|key| *key == assignment.key) else {
            let message = match nearest(&assignment.key, &KEYS) {
                Some(nearest) => format!("unknown key, did you mean {nearest}?"),
                None => format!("unknown key, expected one of {}", KEYS.join(", ")),
            };
            return Err(FlowdError {
                place: Some(assignment.place),
                key: assignment.key,
                message,
            });
        };
        let line = assignment.place.0;
        if let Some(earlier) = given.insert(key, assignment) {
            notes.push(format!(
                "{key} in line {} has no effect: line {line} sets it again",
                earlier.place.0
            ));
        }
    }
    let mut file = File {
        given,
        yaml: "# From a flowd.cfg of scitags/flowd.\n".to_owned(),
        origins: HashMap::new(),
        section: Vec::new(),
    };
    if let Some(url) = file.text("FLOW_MAP_API")? {
        file.open_section("registry", "FLOW_MAP_API");
        file.put("url", &quoted(&url), "FLOW_MAP_API");
        file.close_section();
    }
    let plugins = file.names("PLUGIN", &PLUGINS)?;
    if plugins.contains(&"iperf") && plugins.contains(&"iperf_rr") {
        let message = "iperf and iperf_rr are the same plugin, with tags at random or in turn; enable only one of them";
        return file.fail("PLUGIN", message.to_owned());
    }
    let backends = file.names("BACKEND", &BACKENDS)?;
    file.open_section("plugins", "PLUGIN");
    for plugin in &plugins {
        file.plugin(plugin)?;
    }
    file.close_section();
    file.open_section("backends", "BACKEND");
    let mut has_marker = false;
    for backend in &backends {
        let is_marker = backend.starts_with("ebpf");
        if !(is_marker && std::mem::replace(&mut has_marker, is_marker)) {
            file.backend(backend)?;
        }
    }
    file.close_section();
    if file.given.contains_key("PROMETHEUS_SS_PATH") {
        notes.push("PROMETHEUS_SS_PATH has no effect: ss is not needed".to_owned());
    }
    Ok(Converted {
        yaml: file.yaml,
        origins: file.origins,
        notes,
    })
}

struct File {
    given: HashMap<&'static str, Assignment>,
    yaml: String,
    origins: HashMap<String, (&'static str, Place)>,
    /// The path of the section that is being written.
    section: Vec<&'static str>,
}

/// As a string of both YAML and JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::None => "None",
        Value::Bool(_) => "True or False",
        Value::Int(_) => "a whole number",
        Value::Float(_) => "a number with a fraction",
        Value::Text(_) => "a string",
        Value::Tuple(_) => "a tuple",
        Value::List(_) => "a list",
    }
}

impl File {
    /// The value of a key, unless it is None.
    fn value(&self, key: &str) -> Option<&Value> {
        let value = &self.given.get(key)?.value;
        (*value != Value::None).then_some(value)
    }

    fn fail<T>(&self, key: &str, message: String) -> Result<T> {
        Err(FlowdError {
            place: self.given.get(key).map(|given| given.value_place),
            key: key.to_owned(),
            message,
        })
    }

    fn expected<T>(&self, key: &str, value: &Value, expected: &str) -> Result<T> {
        self.fail(key, format!("found {}, expected {expected}", kind(value)))
    }

    fn text(&self, key: &str) -> Result<Option<String>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text.trim().to_owned())),
            Some(other) => self.expected(key, other, "a string"),
        }
    }

    fn boolean(&self, key: &str) -> Result<bool> {
        match self.value(key) {
            None | Some(Value::Bool(false) | Value::Int(0)) => Ok(false),
            Some(Value::Bool(true) | Value::Int(1)) => Ok(true),
            Some(other) => self.expected(key, other, "True or False"),
        }
    }

    fn port(&self, key: &str, default: i64) -> Result<i64> {
        match self.value(key) {
            None => Ok(default),
            Some(Value::Int(port)) if *port != 0 => Ok(*port),
            Some(Value::Int(_)) => {
                self.fail(key, "0 is out of range, expected 1 to 65535".to_owned())
            }
            Some(other) => self.expected(key, other, "a whole number"),
        }
    }

    /// The elements of a tuple or list of strings, or of a string with commas.
    fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let expected = "a string, or a tuple or list of strings";
        let split = |text: &str| -> Vec<String> {
            let words = text.split(',').map(str::trim).filter(|w| !w.is_empty());
            words.map(str::to_owned).collect()
        };
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(split(text))),
            Some(Value::Tuple(values) | Value::List(values)) => {
                let mut words = Vec::new();
                for value in values {
                    match value {
                        Value::Text(text) => words.extend(split(text)),
                        other => {
                            return self.fail(
                                key,
                                format!("found {} in the list, expected {expected}", kind(other)),
                            );
                        }
                    }
                }
                Ok(Some(words))
            }
            Some(other) => self.expected(key, other, expected),
        }
    }

    /// The names that a required key lists: at least one of the known ones, each once.
    fn names(&self, key: &str, known: &[&'static str]) -> Result<Vec<&'static str>> {
        let Some(words) = self.strings(key)? else {
            return self.fail(
                key,
                format!(
                    "missing, expected one or more of {}, separated by commas",
                    known.join(", ")
                ),
            );
        };
        let mut names = Vec::new();
        for word in &words {
            // flowd's README has udp-firefly.
            let normalized = word.replace('-', "_");
            match known.iter().find(|name| **name == normalized) {
                Some(name) if names.contains(name) => {}
                Some(name) => names.push(*name),
                None => {
                    let hint = match nearest(word, known) {
                        Some(nearest) => format!("did you mean {nearest}?"),
                        None => format!(
                            "expected one or more of {}, separated by commas",
                            known.join(", ")
                        ),
                    };
                    return self.fail(
                        key,
                        format!("\"{}\" is unknown, {hint}", word.escape_debug()),
                    );
                }
            }
        }
        match names.is_empty() {
            false => Ok(names),
            true => self.fail(
                key,
                format!(
                    "empty, expected one or more of {}, separated by commas",
                    known.join(", ")
                ),
            ),
        }
    }

    fn line(&mut self, name: &'static str, value: &str, origin: &'static str) {
        let given = self.given.get(origin);
        let comment = match given {
            Some(_) => origin.to_owned(),
            None => format!("flowd's default of {origin}"),
        };
        let place = given
            .or_else(|| self.given.get(self.parent_key()))
            .map_or((1, 1), |g| g.value_place);
        let path: Vec<&str> = self.section.iter().copied().chain([name]).collect();
        self.origins.insert(path.join("."), (origin, place));
        let indent = "  ".repeat(self.section.len());
        let space = if value.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = writeln!(self.yaml, "{indent}{name}:{space}{value}  # {comment}");
    }

    fn parent_key(&self) -> &'static str {
        match self.section.first() {
            Some(&"plugins") => "PLUGIN",
            _ => "BACKEND",
        }
    }

    fn open_section(&mut self, name: &'static str, origin: &'static str) {
        self.line(name, "", origin);
        self.section.push(name);
    }

    fn put(&mut self, name: &'static str, value: &str, origin: &'static str) {
        self.line(name, value, origin);
    }

    fn close_section(&mut self) {
        self.section.pop();
    }

    fn plugin(&mut self, plugin: &str) -> Result<()> {
        match plugin {
            "np_api" => {
                let path = self.text("NP_API_FILE")?;
                self.open_section("namedPipe", "PLUGIN");
                let path = path.unwrap_or_else(|| super::PIPE_PATH.to_owned());
                self.put("pipePath", &quoted(&path), "NP_API_FILE");
                self.put("mode", "\"0666\"", "PLUGIN");
            }
            "firefly" => {
                let host = self.text("FIREFLY_LISTENER_HOST")?;
                let host = host.unwrap_or_else(|| "0.0.0.0".to_owned());
                let port = self.port("FIREFLY_LISTENER_PORT", 10514)?;
                self.open_section("firefly", "PLUGIN");
                self.put("bindAddress", &quoted(&host), "FIREFLY_LISTENER_HOST");
                self.put("bindPort", &port.to_string(), "FIREFLY_LISTENER_PORT");
            }
            "netstat" => {
                self.scanner(
                    "netstat",
                    [
                        "NETSTAT_EXPERIMENT",
                        "NETSTAT_ACTIVITY",
                        "NETSTAT_INTERNAL_NETWORKS",
                        "NETSTAT_TIMEOUT",
                    ],
                )?;
            }
            "netlink" => {
                self.scanner(
                    "netlink",
                    [
                        "NETLINK_EXPERIMENT",
                        "NETLINK_ACTIVITY",
                        "NETLINK_INTERNAL_NETWORKS",
                        "NETLINK_TIMEOUT",
                    ],
                )?;
            }
            _ => self.iperf(plugin == "iperf")?,
        }
        self.close_section();
        Ok(())
    }

    fn scanner(&mut self, name: &'static str, keys: [&'static str; 4]) -> Result<()> {
        let [experiment, activity, networks, timeout] = keys;
        let mut ids = Vec::new();
        for (name, key) in [("experiment", experiment), ("activity", activity)] {
            match self.value(key) {
                Some(Value::Int(id)) => ids.push((name, id.to_string(), key)),
                Some(Value::Text(text)) => ids.push((name, quoted(text.trim()), key)),
                Some(other) => {
                    return self.expected(key, other, "an id or a name in the registry");
                }
                None => {
                    return self.fail(
                        key,
                        "missing, expected an id or a name in the registry".to_owned(),
                    );
                }
            }
        }
        let internal = self.strings(networks)?;
        let millis = match self.value(timeout) {
            None => 2000.0,
            Some(Value::Int(seconds)) => *seconds as f64 * 1000.0,
            Some(Value::Float(seconds)) => seconds * 1000.0,
            Some(other) => return self.expected(timeout, other, "a number of seconds"),
        };
        if !(10.0..=86_400_000.0).contains(&millis) {
            return self.fail(
                timeout,
                format!(
                    "{} is out of range, expected 0.01 to 86400 seconds",
                    millis / 1000.0
                ),
            );
        }
        self.open_section(name, "PLUGIN");
        for (name, value, key) in ids {
            self.put(name, &value, key);
        }
        if let Some(internal) = internal {
            self.put("internalNetworks", &list(&internal), networks);
        }
        self.put("period", &(millis as u64).to_string(), timeout);
        Ok(())
    }

    fn iperf(&mut self, random: bool) -> Result<()> {
        let expected = "a list of pairs of ids, for example [(2, 9), (3, 4)]";
        let pair = |value: &Value| match value {
            Value::Tuple(ids) | Value::List(ids) => match ids.as_slice() {
                [Value::Int(experiment), Value::Int(activity)] => Some((*experiment, *activity)),
                _ => None,
            },
            _ => None,
        };
        let tags = match self.value("IPERF_FLOW_ID") {
            None => Some(IPERF_TAGS.to_vec()),
            Some(Value::Tuple(pairs) | Value::List(pairs)) => pairs.iter().map(pair).collect(),
            Some(_) => None,
        };
        let Some(tags) = tags.filter(|tags| !tags.is_empty()) else {
            return self.fail("IPERF_FLOW_ID", format!("expected {expected}"));
        };
        let internal = self.strings("IPERF_INTERNAL_NETWORKS")?.unwrap_or_default();
        let ids = |id: fn(&(i64, i64)) -> i64| {
            let ids: Vec<String> = tags.iter().map(|tag| id(tag).to_string()).collect();
            format!("[{}]", ids.join(", "))
        };
        self.open_section("iperf3", "PLUGIN");
        self.put("minSourcePort", "5201", "PLUGIN");
        self.put("maxSourcePort", "5299", "PLUGIN");
        self.put("experimentIDs", &ids(|tag| tag.0), "IPERF_FLOW_ID");
        self.put("activityIDs", &ids(|tag| tag.1), "IPERF_FLOW_ID");
        self.put("randomIDs", if random { "true" } else { "false" }, "PLUGIN");
        self.put(
            "internalNetworks",
            &list(&internal),
            "IPERF_INTERNAL_NETWORKS",
        );
        Ok(())
    }

    fn backend(&mut self, backend: &str) -> Result<()> {
        match backend {
            "udp_firefly" => self.firefly()?,
            "prometheus" => {
                let port = self.port("PROMETHEUS_SRV_PORT", 9000)?;
                self.open_section("prometheus", "BACKEND");
                self.put("bindAddress", "0.0.0.0", "BACKEND");
                self.put("port", &port.to_string(), "PROMETHEUS_SRV_PORT");
            }
            "dummy" => self.open_section("dummy", "BACKEND"),
            _ => {
                let interfaces = self.strings("NETWORK_INTERFACE")?;
                self.open_section("marker", "BACKEND");
                match interfaces {
                    Some(names) => self.put("targetInterfaces", &list(&names), "NETWORK_INTERFACE"),
                    None => self.put("discoverInterfaces", "true", "NETWORK_INTERFACE"),
                }
            }
        }
        self.close_section();
        Ok(())
    }

    fn firefly(&mut self) -> Result<()> {
        let collector = self.text("UDP_FIREFLY_DST")?;
        let sources = [
            ("publicIPv4", "UDP_FIREFLY_IP4_SRC"),
            ("publicIPv6", "UDP_FIREFLY_IP6_SRC"),
        ];
        let sources = sources.map(|(name, key)| (name, key, self.text(key)));
        let enrich = self.boolean("UDP_FIREFLY_NETLINK")?;
        let discover = self.boolean("IP_DISCOVERY_ENABLED")?;
        self.open_section("firefly", "BACKEND");
        if let Some(host) = collector {
            self.put("sendToCollector", "true", "UDP_FIREFLY_DST");
            self.put("collectorAddress", &quoted(&host), "UDP_FIREFLY_DST");
        }
        for (name, key, address) in sources {
            if let Some(address) = address? {
                self.put(name, &quoted(&address), key);
            }
        }
        if enrich {
            self.put("enrich", "true", "UDP_FIREFLY_NETLINK");
            self.put("enrichmentMode", "flowd", "UDP_FIREFLY_NETLINK");
            self.put("ongoing", "false", "UDP_FIREFLY_NETLINK");
        }
        if discover {
            self.put("stun", "{}", "IP_DISCOVERY_ENABLED");
        }
        Ok(())
    }
}

fn list(texts: &[String]) -> String {
    let texts: Vec<String> = texts.iter().map(|text| quoted(text)).collect();
    format!("[{}]", texts.join(", "))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::KEYS;
    use crate::config::{Config, ConfigError};

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("f"))
    }

    /// Every key.
    const ALL: &str = r#"# flowd
PLUGIN = 'np_api,firefly, netstat,netlink'
BACKEND = "udp_firefly,prometheus,dummy"
FLOW_MAP_API = 'http://localhost/api.json'
NP_API_FILE='/tmp/np'
FIREFLY_LISTENER_HOST="::"
FIREFLY_LISTENER_PORT=10515
NETSTAT_EXPERIMENT=1
NETSTAT_ACTIVITY=1
NETSTAT_INTERNAL_NETWORKS=('192.168.0.0/16')
NETSTAT_TIMEOUT=0.5
NETLINK_EXPERIMENT='CMS'
NETLINK_ACTIVITY='Data Challenge'
NETLINK_INTERNAL_NETWORKS=[
    '10.1.0.0/16',  # one
    '2a00:1::/32',
]
NETLINK_TIMEOUT=5
IPERF_FLOW_ID=[(2, 9), (3, 4)]
IPERF_INTERNAL_NETWORKS=None
IP_DISCOVERY_ENABLED=True
UDP_FIREFLY_DST='collector.example.org'
UDP_FIREFLY_IP4_SRC='9.9.9.9'
UDP_FIREFLY_IP6_SRC='2a00::9'
UDP_FIREFLY_NETLINK=True
NETWORK_INTERFACE='eth0,eth1'
PROMETHEUS_SS_PATH='/usr/sbin/ss'
PROMETHEUS_SRV_PORT=9001
"#;

    #[test]
    fn every_key_has_the_meaning_that_it_has_in_flowd() {
        assert!(KEYS.iter().all(|key| ALL.contains(key)));
        let config = parse(ALL).unwrap();
        let expected = "
registry: {url: 'http://localhost/api.json'}
plugins:
  namedPipe: {pipePath: /tmp/np, mode: '0666'}
  firefly: {bindAddress: '::', bindPort: 10515}
  netstat: {experiment: 1, activity: 1, internalNetworks: [192.168.0.0/16], period: 500}
  netlink: {experiment: 3, activity: 4, internalNetworks: [10.1.0.0/16, '2a00:1::/32'], period: 5s}
backends:
  firefly:
    sendToCollector: true
    collectorAddress: collector.example.org
    publicIPv4: 9.9.9.9
    publicIPv6: 2a00::9
    enrich: true
    enrichmentMode: flowd
    ongoing: false
    stun: {}
  prometheus: {bindAddress: 0.0.0.0, port: 9001}
  dummy:
";
        let mut expected = parse(expected).unwrap();
        expected.notes = vec!["PROMETHEUS_SS_PATH has no effect: ss is not needed".to_owned()];
        assert_eq!(config, expected);
    }

    #[test]
    fn defaults_are_flowds() {
        let config = parse("PLUGIN='np_api,firefly'\nBACKEND='udp-firefly,prometheus'\n").unwrap();
        let pipe = config.named_pipe.unwrap();
        assert_eq!(
            (pipe.path.as_path(), pipe.mode),
            (Path::new("/var/run/flowd"), 0o666)
        );
        assert_eq!(
            config.firefly_plugin.unwrap().bind,
            "0.0.0.0:10514".parse().unwrap()
        );
        let prometheus = config.prometheus.unwrap();
        assert_eq!(
            (prometheus.address.to_string().as_str(), prometheus.port),
            ("0.0.0.0", Some(9000))
        );
        assert_eq!(
            (prometheus.netlink_port, prometheus.skops_port),
            (None, None)
        );
        let firefly = config.firefly.unwrap();
        assert_eq!(
            (firefly.collector, firefly.enrichment, firefly.stun),
            (None, None, None)
        );
        assert_eq!(config.registry.url, "https://www.scitags.org/api.json");
        assert!(config.netlink_enricher.is_some(), "for the metrics");
    }

    #[cfg(feature = "bpf")]
    #[test]
    fn packet_marking_and_iperf() {
        let config =
            parse("PLUGIN='iperf_rr'\nBACKEND='ebpf_el8,ebpf'\nNETWORK_INTERFACE='eth0'\n")
                .unwrap();
        assert_eq!(
            config.marker.unwrap().interfaces,
            Some(vec!["eth0".to_owned()])
        );
        let iperf = config.iperf3.unwrap();
        assert_eq!(
            (iperf.tags.len(), iperf.random, iperf.sockops.local_ports),
            (8, false, 5201..=5299)
        );
        assert_eq!(iperf.internal_networks, Some(vec![]));
        let config = parse("PLUGIN='iperf'\nBACKEND='ebpf_el9'\nIPERF_FLOW_ID=[(2, 9)]\nIPERF_INTERNAL_NETWORKS='10.0.0.0/8'\n").unwrap();
        assert_eq!(config.marker.unwrap().interfaces, None);
        let iperf = config.iperf3.unwrap();
        assert_eq!(
            (
                iperf.tags.len(),
                iperf.random,
                iperf.internal_networks.map(|n| n.len())
            ),
            (1, true, Some(1))
        );
    }

    #[test]
    fn each_error_has_its_line_and_key() {
        const GOOD: &str = "PLUGIN='np_api'\nBACKEND='udp_firefly'\n";
        for (text, expected) in [
            (
                "PLUGIN='np_api'\n",
                "f: BACKEND: missing, expected one or more of udp_firefly, prometheus, dummy, ebpf, ebpf_el8, ebpf_el9, separated by commas",
            ),
            (
                "BACKEND='udp_firefly'\n",
                "f: PLUGIN: missing, expected one or more of netstat, netlink, np_api, firefly, iperf, iperf_rr, separated by commas",
            ),
            (
                "PLUGIN='np_ap'\nBACKEND='dummy'\n",
                "f:1:8: PLUGIN: \"np_ap\" is unknown, did you mean np_api?",
            ),
            (
                "import os\nPLUGIN='np_api'\nBACKEND='dummy'\n",
                "f:1:1: expected KEY = value, found \"import\" without \"=\"; the file is not executed",
            ),
            (
                "PLUGIN='iperf,iperf_rr'\nBACKEND='dummy'\n",
                "f:1:8: PLUGIN: iperf and iperf_rr are the same plugin, with tags at random or in turn; enable only one of them",
            ),
            (
                "PLUGIN='np_api'\nBACKEND='prometheus'\nPROMETHEUS_SRV_PORT=0\n",
                "f:3:21: PROMETHEUS_SRV_PORT: 0 is out of range, expected 1 to 65535",
            ),
            (
                "PLUGIN=5\nBACKEND='dummy'\n",
                "f:1:8: PLUGIN: found a whole number, expected a string, or a tuple or list of strings",
            ),
            (
                "PLUGIN=''\nBACKEND='dummy'\n",
                "f:1:8: PLUGIN: empty, expected one or more of netstat, netlink, np_api, firefly, iperf, iperf_rr, separated by commas",
            ),
            (
                &format!("{GOOD}NP_API_FIL='x'\n"),
                "f:3:1: NP_API_FIL: unknown key, did you mean NP_API_FILE?",
            ),
            (
                &format!("{GOOD}np_api_file='x'\n"),
                "f:3:1: np_api_file: unknown key, did you mean NP_API_FILE?",
            ),
            (
                &format!("{GOOD}import os\n"),
                "f:3:1: expected KEY = value, found \"import\" without \"=\"; the file is not executed",
            ),
            (
                &format!("{GOOD}UDP_FIREFLY_DST=os.environ['X']\n"),
                "f:3:17: found the name \"os\", expected a string in quotes, a number, True, False, None, a tuple or a list; the file is not executed",
            ),
            (
                &format!("{GOOD}NP_API_FILE=5\n"),
                "f:3:13: NP_API_FILE: found a whole number, expected a string",
            ),
            (
                &format!("{GOOD}NP_API_FILE=''\n"),
                "f:3:13: NP_API_FILE: empty, expected a path",
            ),
            (
                &format!("{GOOD}UDP_FIREFLY_NETLINK='yes'\n"),
                "f:3:21: UDP_FIREFLY_NETLINK: found a string, expected True or False",
            ),
            (
                &format!("{GOOD}UDP_FIREFLY_IP4_SRC='::1'\n"),
                "f:3:21: UDP_FIREFLY_IP4_SRC: \"::1\" is not a valid IPv4 address",
            ),
            (
                &format!("{GOOD}FLOW_MAP_API='nowhere'\n"),
                "f:3:14: FLOW_MAP_API: \"nowhere\" is not a valid URL, expected https://…, http://…, file:///…, or \"\" for the built-in registry",
            ),
            (
                "PLUGIN='firefly'\nBACKEND='dummy'\nFIREFLY_LISTENER_PORT=70000\n",
                "f:3:23: FIREFLY_LISTENER_PORT: 70000 is out of range, expected 1 to 65535",
            ),
            (
                "PLUGIN='firefly'\nBACKEND='dummy'\nFIREFLY_LISTENER_PORT='10514'\n",
                "f:3:23: FIREFLY_LISTENER_PORT: found a string, expected a whole number",
            ),
            (
                "PLUGIN='netstat'\nBACKEND='dummy'\n",
                "f: NETSTAT_EXPERIMENT: missing, expected an id or a name in the registry",
            ),
            (
                "PLUGIN='netstat'\nBACKEND='dummy'\nNETSTAT_EXPERIMENT='nobody'\nNETSTAT_ACTIVITY=1\n",
                "f:3:20: NETSTAT_EXPERIMENT: \"nobody\" is unknown, expected an id from 0 to 65535 or a name in the registry (see flowd-rs registry)",
            ),
            (
                "PLUGIN='netlink'\nBACKEND='dummy'\nNETLINK_EXPERIMENT=1\nNETLINK_ACTIVITY=1\nNETLINK_TIMEOUT=0\n",
                "f:5:17: NETLINK_TIMEOUT: 0 is out of range, expected 0.01 to 86400 seconds",
            ),
            (
                "PLUGIN='netlink'\nBACKEND='dummy'\nNETLINK_EXPERIMENT=1\nNETLINK_ACTIVITY=1\nNETLINK_INTERNAL_NETWORKS=('10.0.0.0/8', 5)\n",
                "f:5:27: NETLINK_INTERNAL_NETWORKS: found a whole number in the list, expected a string, or a tuple or list of strings",
            ),
            (
                "PLUGIN='iperf'\nBACKEND='dummy'\nIPERF_FLOW_ID=[(2, 9), 3]\n",
                "f:3:15: IPERF_FLOW_ID: expected a list of pairs of ids, for example [(2, 9), (3, 4)]",
            ),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), expected, "{text}");
        }
    }

    #[test]
    fn a_caret_points_at_the_error() {
        let error = parse("PLUGIN='np_api'\n\tBACKEND=1\n").unwrap_err();
        assert_eq!(error.excerpt(), "    2 | \tBACKEND=1\n      | \t^\n");
        let error = parse("plugins:\n  namedPip: {}\n").unwrap_err();
        assert_eq!(error.excerpt(), "    2 |   namedPip: {}\n      |   ^\n");
    }

    #[test]
    fn an_instance_has_its_own_directories() {
        let config = |name: &str| {
            let text = "PLUGIN='np_api'\nBACKEND='dummy'\n";
            let config = Config::parse(text, Path::new(name)).unwrap();
            (config.state_dir, config.control_socket.path)
        };
        let plain = (
            Path::new("/var/lib/flowd").to_owned(),
            Path::new("/run/flowd-rs/control.sock").to_owned(),
        );
        for name in [
            "/etc/flowd/flowd.cfg",
            "flowd-.cfg",
            "flowd-a b.cfg",
            "conf.yaml",
            "flowd-x",
        ] {
            assert_eq!(config(name), plain, "{name}");
        }
        let tags = (
            Path::new("/var/lib/flowd-tags").to_owned(),
            Path::new("/run/flowd-rs-tags/control.sock").to_owned(),
        );
        assert_eq!(config("/etc/flowd/flowd-tags.cfg"), tags);
    }

    #[test]
    fn the_last_of_two_values_is_used() {
        let config =
            parse("PLUGIN='np_api'\nBACKEND='dummy'\nNP_API_FILE='/a'\nNP_API_FILE='/b'\n")
                .unwrap();
        assert_eq!(config.named_pipe.unwrap().path, Path::new("/b"));
        assert_eq!(
            config.notes,
            ["NP_API_FILE in line 3 has no effect: line 4 sets it again"]
        );
    }
}
