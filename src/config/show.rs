//! Prints the settings in effect as YAML, with every default, and a JSON schema of the YAML for editors.

use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::yaml::Document;
use super::{Config, ConnectionRule, Connections, Sockops, raw};
use crate::flow::Tag;

impl Config {
    /// YAML with the same meaning and every default.
    pub fn to_yaml(&self) -> String {
        print(&self.to_raw())
    }

    fn to_raw(&self) -> raw::Raw {
        let enricher_period = self.netlink_enricher.as_ref().map(|n| n.period);
        let period = enricher_period.or(self.skops_enricher.as_ref().and_then(|s| s.period));
        let enrichers = raw::Enrichers {
            period: period.map(millis),
            netlink: self
                .netlink_enricher
                .as_ref()
                .map(|n| raw::NetlinkEnricher {
                    protocol: Some(match n.protocol {
                        crate::flow::Protocol::Tcp => 6,
                        crate::flow::Protocol::Udp => 17,
                    }),
                    ext: Some(n.extensions.into()),
                    state: Some(n.states.into()),
                }),
            skops: self.skops_enricher.as_ref().map(|skops| {
                let (cgroup_path, program_path, debug_mode) = program(skops);
                raw::SkopsEnricher {
                    cgroup_path,
                    program_path,
                    debug_mode,
                    strategy: Some(
                        if skops.transitions {
                            "transition"
                        } else {
                            "poll"
                        }
                        .to_owned(),
                    ),
                }
            }),
        };
        let any_enricher = enrichers.netlink.is_some() || enrichers.skops.is_some();
        raw::Raw {
            pid_path: Some(self.pid_path.as_deref().map(path).unwrap_or_default()),
            work_dir: Some(path(&self.work_dir)),
            state_dir: Some(path(&self.state_dir)),
            control_socket: Some(path(&self.control_socket.path)),
            log_level: Some(self.log_level.to_string().to_lowercase()),
            registry: raw::Registry {
                url: Some(self.registry.url.clone()),
            },
            flows: raw::Flows {
                max_flows: Some(self.flows.max_flows as i64),
                max_per_source: Some(self.flows.max_per_source as i64),
                max_age: Some(format!("{}s", self.flows.max_age.as_secs())),
                end_on_socket_close: Some(self.flows.end_on_socket_close),
            },
            plugins: self.raw_plugins(),
            backends: self.raw_backends(),
            enrichers: any_enricher.then_some(enrichers),
        }
    }

    fn raw_plugins(&self) -> raw::Plugins {
        raw::Plugins {
            named_pipe: self.named_pipe.as_ref().map(|pipe| raw::NamedPipe {
                max_readers: None,
                buff_size: None,
                pipe_path: Some(path(&pipe.path)),
                mode: Some(format!("{:04o}", pipe.mode)),
                group: pipe.group.clone(),
            }),
            firefly: self
                .firefly_plugin
                .as_ref()
                .map(|plugin| raw::FireflyPlugin {
                    bind_address: Some(plugin.bind.ip().to_string()),
                    bind_port: Some(plugin.bind.port().into()),
                    buffer_size: Some(plugin.buffer_size as i64),
                    allowed_sources: plugin.allowed_sources.as_deref().map(networks),
                    deadline: None,
                    has_syslog_header: None,
                }),
            api: self.api.as_ref().map(|api| raw::Api {
                bind_address: api.bind.map(|bind| bind.ip().to_string()),
                bind_port: Some(api.bind.map_or(0, |bind| bind.port().into())),
                unix_socket: api.unix_socket.as_ref().map(|(socket, _)| path(socket)),
                unix_socket_mode: api
                    .unix_socket
                    .as_ref()
                    .map(|(_, mode)| format!("{mode:04o}")),
                token: api.token.clone(),
                token_file: api.token_file.as_deref().map(path),
                dummy_routes: Some(api.dummy_routes),
            }),
            perfsonar: self.perfsonar.map(|tag| raw::Perfsonar {
                activity_id: Some(tag.activity.into()),
                experiment_id: Some(tag.experiment.into()),
            }),
            netlink: self.netlink.as_ref().map(connections),
            netstat: self.netstat.as_ref().map(connections),
            iperf3: self.iperf3.as_ref().map(|iperf3| {
                let (cgroup_path, program_path, debug_mode) = program(&iperf3.sockops);
                let (local, remote) = (&iperf3.sockops.local_ports, &iperf3.sockops.remote_ports);
                let ids =
                    |id: fn(&Tag) -> u16| Some(iperf3.tags.iter().map(|t| id(t).into()).collect());
                raw::Iperf3 {
                    min_source_port: Some((*local.start()).into()),
                    max_source_port: Some((*local.end()).into()),
                    min_destination_port: Some((*remote.start()).into()),
                    max_destination_port: Some((*remote.end()).into()),
                    cgroup_path,
                    program_path,
                    debug_mode,
                    random_ids: Some(iperf3.random),
                    experiment_ids: ids(|tag| tag.experiment),
                    activity_ids: ids(|tag| tag.activity),
                    internal_networks: iperf3.internal_networks.as_deref().map(networks),
                }
            }),
        }
    }

    fn raw_backends(&self) -> raw::Backends {
        raw::Backends {
            firefly: self.firefly.as_ref().map(|firefly| raw::Firefly {
                destination_port: Some(firefly.destination_port.into()),
                prepend_syslog: Some(firefly.prepend_syslog),
                send_to_collector: Some(firefly.collector.is_some()),
                collector_address: firefly.collector.as_ref().map(|c| c.host.clone()),
                collector_port: firefly.collector.as_ref().map(|c| c.port.into()),
                relayed: Some(firefly.relayed.as_str().to_owned()),
                max_relay_rate: Some(firefly.max_relay_rate.into()),
                enrich: Some(firefly.enrichment.is_some()),
                enrichment_mode: firefly.enrichment.map(|mode| mode.as_str().to_owned()),
                ongoing: Some(firefly.ongoing),
                public_ipv4: firefly.public[0].map(|address| address.to_string()),
                public_ipv6: firefly.public[1].map(|address| address.to_string()),
                stun: firefly.stun.as_ref().map(|stun| raw::Stun {
                    manual_mapping: Some(
                        stun.manual
                            .iter()
                            .map(|(a, b)| (a.to_string(), b.to_string()))
                            .collect(),
                    ),
                    http_services: Some(stun.http_services.clone()),
                    stun_servers: Some(
                        stun.stun_servers
                            .iter()
                            .map(|(host, port)| match host.contains(':') {
                                true => format!("[{host}]:{port}"),
                                false => format!("{host}:{port}"),
                            })
                            .collect(),
                    ),
                }),
            }),
            marker: self.marker.as_ref().map(|marker| raw::Marker {
                target_interfaces: marker.interfaces.clone(),
                discover_interfaces: Some(marker.interfaces.is_none()),
                remove_qdisc: Some(marker.remove_qdisc),
                program_path: Some(marker.program_path.as_deref().map(path).unwrap_or_default()),
                marking_strategy: Some(marker.strategy.as_str().to_owned()),
                match_all: Some(marker.match_all),
                debug_mode: Some(marker.debug),
                priority: Some(marker.priority.into()),
                keep_on_exit: Some(marker.keep_on_exit),
                bpf_fs_path: Some(path(&marker.bpf_fs_path)),
            }),
            prometheus: self.prometheus.as_ref().map(|prometheus| {
                let port = |port: Option<u16>| Some(port.unwrap_or(0).into());
                raw::Prometheus {
                    log: None,
                    bind_address: Some(prometheus.address.to_string()),
                    port: port(prometheus.port),
                    netlink_port: port(prometheus.netlink_port),
                    skops_port: port(prometheus.skops_port),
                    per_flow: Some(prometheus.per_flow),
                    max_series: Some(prometheus.max_series as i64),
                }
            }),
            dummy: self.dummy.then(raw::Dummy::default),
        }
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

fn millis(period: Duration) -> String {
    period.as_millis().to_string()
}

fn networks(networks: &[IpNet]) -> Vec<String> {
    networks.iter().map(IpNet::to_string).collect()
}

fn program(sockops: &Sockops) -> (Option<String>, Option<String>, Option<bool>) {
    let program = sockops.program.as_deref().map(path).unwrap_or_default();
    (
        Some(path(&sockops.cgroup)),
        Some(program),
        Some(sockops.debug),
    )
}

/// A last rule without conditions is the plugin's own tag.
fn connections(connections: &Connections) -> raw::Connections {
    let (mut rules, mut own) = (connections.rules.as_slice(), None);
    if let Some((last, others)) = rules.split_last()
        && *last
            == (ConnectionRule {
                tag: last.tag,
                ..Default::default()
            })
    {
        (rules, own) = (others, Some(last.tag));
    }
    let rule = |rule: &ConnectionRule| {
        let ports = |ranges: &[std::ops::RangeInclusive<u16>]| {
            let ports = ranges.iter().map(|r| format!("{}-{}", r.start(), r.end()));
            Some(ports.collect())
        };
        raw::ConnectionRule {
            remote_networks: Some(networks(&rule.remote_networks)),
            local_ports: ports(&rule.local_ports),
            remote_ports: ports(&rule.remote_ports),
            uid: rule.user.clone(),
            cgroup: rule.cgroup.as_deref().map(path),
            experiment: Some(rule.tag.experiment.to_string()),
            activity: Some(rule.tag.activity.to_string()),
        }
    };
    raw::Connections {
        experiment: own.map(|tag| tag.experiment.to_string()),
        activity: own.map(|tag| tag.activity.to_string()),
        internal_networks: Some(networks(&connections.internal_networks)),
        period: Some(millis(connections.period)),
        announce_existing: Some(connections.announce_existing),
        rules: (!rules.is_empty()).then(|| rules.iter().map(rule).collect()),
    }
}

/// The keys that are set, as YAML.
pub fn print(raw: &impl Serialize) -> String {
    let value = serde_json::to_value(raw).unwrap_or_default();
    serde_yaml::to_string(&without_nulls(value)).unwrap_or_default()
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let map = map.into_iter().filter(|(_, value)| !value.is_null());
            map.map(|(key, value)| (key, without_nulls(value)))
                .collect()
        }
        Value::Array(list) => list.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

/// Keys with a fixed set of values.
const ENUMS: [(&str, &[&str]); 5] = [
    ("logLevel", &["error", "warn", "info", "debug", "trace"]),
    ("relayed", &["auto", "collector", "destination"]),
    ("enrichmentMode", &["lean", "compatible", "flowd", ""]),
    (
        "markingStrategy",
        &["label", "hopByHop", "destination", "hopByHopDestination"],
    ),
    ("strategy", &["poll", "transition"]),
];
/// Keys with a text that may be a number in YAML.
const TEXT_OR_NUMBER: [&str; 15] = [
    "maxAge",
    "maxWaiting",
    "templateMemory",
    "templateMemoryPerExporter",
    "templateTimeout",
    "interval",
    "size",
    "age",
    "period",
    "mode",
    "unixSocketMode",
    "group",
    "uid",
    "experiment",
    "activity",
];

/// The commented example configuration, with the description and default of every key.
const EXAMPLE_CONFIG: &str = include_str!("../../conf/flowd.cfg");

/// Keys without a default: their value in the example configuration is an example.
const WITHOUT_DEFAULT: [&str; 16] = [
    "stunServers",
    "group",
    "unixSocket",
    "token",
    "tokenFile",
    "experiment",
    "activity",
    "experimentId",
    "activityId",
    "experimentIDs",
    "activityIDs",
    "internalNetworks",
    "publicIPv4",
    "publicIPv6",
    "manualMapping",
    "port",
];

/// A key of the example configuration: the comment above it and its value.
struct Described {
    key: Vec<String>,
    text: String,
    default: Option<Value>,
}

/// All keys of a commented configuration.
fn described(example: &str) -> Vec<Described> {
    let (mut described, mut comment) = (Vec::new(), Vec::new());
    let mut sections: Vec<(usize, String)> = Vec::new();
    for line in example.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        // "# text" is a comment, "#key: value" is a key that is commented out.
        if let Some(words) = text.strip_prefix("# ") {
            comment.push(words.trim());
            continue;
        }
        let name_and_value = text.trim_start_matches('#').split_once(':');
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric());
        if let Some((name, value)) = name_and_value.filter(|(name, _)| is_name(name)) {
            sections.retain(|(outer, _)| *outer < indent);
            sections.push((indent, name.to_owned()));
            let value = Some(value.trim()).filter(|value| !value.is_empty());
            described.push(Described {
                key: sections.iter().map(|(_, name)| name.clone()).collect(),
                text: comment.join(" "),
                default: value.and_then(|value| serde_yaml::from_str(value).ok()),
            });
        }
        comment.clear();
    }
    described
}

/// The schema of a key, given by its parts.
fn property<'a>(root: &'a mut Value, key: &[String]) -> Option<&'a mut Value> {
    let mut pointer = String::new();
    for name in key {
        let schema = root.pointer(&pointer)?;
        if let Some(target) = definition(schema) {
            pointer = format!("/$defs/{target}");
        }
        pointer += &format!("/properties/{name}");
    }
    root.pointer_mut(&pointer)
}

/// The name of the definition that a schema refers to, perhaps as one of several possibilities.
fn definition(schema: &Value) -> Option<&str> {
    let target = schema["$ref"].as_str();
    let name = target.and_then(|target| target.strip_prefix("#/$defs/"));
    let possibilities = schema["anyOf"].as_array().into_iter().flatten();
    name.or_else(|| possibilities.into_iter().find_map(definition))
}

/// A JSON schema (draft 2020-12) of the YAML, for editors: allowed values, descriptions and defaults.
pub fn schema() -> Value {
    describe::<raw::Raw>("flowd.cfg of flowd-rs", EXAMPLE_CONFIG, &WITHOUT_DEFAULT)
}

/// The schema of raw settings, with the comments and defaults of a commented configuration; its values of the keys
/// `without_default` are examples.
pub fn describe<T: JsonSchema>(title: &str, example: &str, without_default: &[&str]) -> Value {
    let schema: Schema = schemars::schema_for!(T);
    let mut schema = serde_json::to_value(schema).unwrap_or_default();
    refine(&mut schema);
    for Described { key, text, default } in described(example) {
        let Some(property) = property(&mut schema, &key) else {
            continue;
        };
        if !text.is_empty() {
            property["description"] = json!(text);
        }
        match default {
            Some(value)
                if key
                    .last()
                    .is_some_and(|key| without_default.contains(&key.as_str())) =>
            {
                property["examples"] = json!([value]);
            }
            Some(default) => property["default"] = default,
            None => {}
        }
    }
    schema["title"] = json!(title);
    schema
}

fn refine(schema: &mut Value) {
    let Value::Object(map) = schema else { return };
    // These are Rust's; the example configuration has those for the user.
    map.remove("default");
    map.remove("description");
    if map.get("format").is_some_and(|format| format == "int64") {
        map.remove("format");
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        for (key, property) in properties {
            if let Some((_, values)) = ENUMS.iter().find(|(name, _)| name == key) {
                *property = json!({ "enum": values });
            } else if key.ends_with("Port") {
                property["minimum"] = json!(0);
                property["maximum"] = json!(65535);
            } else if key.ends_with("Ports") {
                let items = json!({"type": ["string", "integer"]});
                *property = json!({"type": "array", "items": items});
            } else if TEXT_OR_NUMBER.contains(&key.as_str()) {
                *property = json!({"type": ["string", "integer"]});
            }
        }
    }
    map.values_mut().for_each(refine_all);
}

fn refine_all(value: &mut Value) {
    match value {
        Value::Object(_) => refine(value),
        Value::Array(list) => list.iter_mut().for_each(refine_all),
        _ => {}
    }
}

/// All keys of the YAML, by dots, in their order; for a list of mappings also the keys of its elements.
pub fn keys() -> Vec<String> {
    keys_of(&schema())
}

/// All keys of a schema.
pub fn keys_of(schema: &Value) -> Vec<String> {
    let mut keys = Vec::new();
    collect(schema, schema, "", &mut keys);
    keys
}

impl Document for raw::Raw {
    fn keys() -> Vec<String> {
        keys()
    }
}

fn collect(root: &Value, schema: &Value, prefix: &str, keys: &mut Vec<String>) {
    let own = Map::new();
    for (key, property) in schema["properties"].as_object().unwrap_or(&own) {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        keys.push(path.clone());
        for inner in [property, &property["items"]] {
            if let Some(name) = definition(inner) {
                collect(root, &root["$defs"][name], &path, keys);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Config {
        Config::parse(text, Path::new("f")).unwrap()
    }

    const ALL: &str = "
logLevel: debug
pidPath: /x
controlSocket: /c
workDir: /w
stateDir: /s
registry: {url: 'file:///r'}
flows: {maxFlows: 5, maxPerSource: 3, maxAge: 1d, endOnSocketClose: false}
plugins:
  namedPipe: {pipePath: /p, mode: 0600, group: users}
  firefly: {bindAddress: '::', bindPort: 5, bufferSize: 3000, allowedSources: [10.0.0.0/8, '::1']}
  api: {bindPort: 0, unixSocket: /u, unixSocketMode: 0640, token: t, dummyRoutes: true}
  netlink:
    experiment: cms
    activity: Cache
    internalNetworks: [10.0.0.0/8]
    period: 3s
    rules: [{remoteNetworks: [9.0.0.0/8], localPorts: [5-6], uid: nobody, cgroup: /c, experiment: 2, activity: 9}]
  netstat: {rules: [{remotePorts: [443], experiment: 2, activity: 9}], announceExisting: true}
enrichers:
  period: 500
  netlink: {protocol: 17, ext: 3, state: 5}
backends:
  firefly:
    sendToCollector: true
    collectorAddress: '::1'
    enrich: true
    enrichmentMode: ''
    ongoing: false
    maxRelayRate: 50
    publicIPv4: 9.9.9.9
    stun: {manualMapping: {10.0.0.1: 9.9.9.8}, stunServers: ['[::1]:5', 'a']}
  prometheus: {port: 9, perFlow: false}
  dummy:
";

    #[cfg(feature = "bpf")]
    const BPF: &str = "
plugins:
  perfsonar: {experimentId: 2, activityId: 9}
  iperf3: {minSourcePort: 5, randomIDs: true, experimentIDs: [1], activityIDs: [2], internalNetworks: []}
enrichers: {skops: {strategy: transition}}
backends:
  marker: {targetInterfaces: [a, b], markingStrategy: destination, priority: 3, keepOnExit: true}
";

    #[test]
    fn shown_yaml_has_the_same_meaning() {
        let texts = [
            ALL,
            "plugins: {namedPipe: }\nbackends: {firefly: {}}",
            #[cfg(feature = "bpf")]
            BPF,
        ];
        for text in texts {
            let config = parse(text);
            let shown = config.to_yaml();
            let mut reread =
                Config::parse(&shown, Path::new("f")).unwrap_or_else(|e| panic!("{e}\n{shown}"));
            // The shown YAML sets every key.
            (reread.pid_path_given, reread.control_socket.given) =
                (config.pid_path_given, config.control_socket.given);
            reread.notes.clone_from(&config.notes);
            reread.warnings.clone_from(&config.warnings);
            assert_eq!(reread, config, "{shown}");
        }
    }

    #[test]
    fn the_schema_accepts_the_same_files_as_the_program() {
        let schema = schema();
        let port = &schema["$defs"]["FireflyPlugin"]["properties"]["bindPort"];
        assert_eq!(
            (&port["maximum"], &port["default"]),
            (&json!(65535), &json!(10514))
        );
        let mode = &schema["$defs"]["Firefly"]["properties"]["enrichmentMode"];
        assert!(
            mode["enum"].is_array() && mode["default"] == "lean",
            "{mode}"
        );
        let described = described(EXAMPLE_CONFIG);
        assert!(described.len() > 80 && described.iter().all(|d| !d.key.is_empty()));
        let validator = jsonschema::validator_for(&schema).unwrap();
        let texts = [
            ALL,
            "plugins: {namedPipe: }\nbackends: {firefly: }",
            #[cfg(feature = "bpf")]
            BPF,
            include_str!("../../conf/flowd.cfg"),
            include_str!("../../conf/quickstart.cfg"),
        ];
        for text in texts {
            let value: Value = serde_yaml::from_str(text).unwrap();
            if let Err(error) = validator.validate(&value) {
                panic!("{text}\n{error} at {}", error.instance_path());
            }
            let shown: Value = serde_yaml::from_str(&parse(text).to_yaml()).unwrap();
            assert!(validator.is_valid(&shown), "{shown}");
        }
        for wrong in [
            "plugins: {namedPip: }",
            "plugins: {namedPipe: {pipePath: [1]}}",
            "backends: {marker: {markingStrategy: labels}}",
            "flows: {maxFlows: many}",
        ] {
            let value: Value = serde_yaml::from_str(wrong).unwrap();
            assert!(!validator.is_valid(&value), "{wrong}");
        }
    }

    #[test]
    fn keys_include_those_of_list_elements() {
        let keys = keys();
        for key in [
            "pidPath",
            "plugins.namedPipe.mode",
            "plugins.netlink.rules.remoteNetworks",
            "backends.firefly.stun.stunServers",
        ] {
            assert!(keys.iter().any(|k| k == key), "{key}: {keys:?}");
        }
    }
}
