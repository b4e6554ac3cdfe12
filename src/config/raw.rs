//! The YAML as it is in the file: every key is optional, an unknown key is an error, values are not checked yet.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

/// The whole file.
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping of settings (plugins: …, backends: …)"
)]
pub struct Raw {
    pub pid_path: Option<String>,
    pub work_dir: Option<String>,
    pub state_dir: Option<String>,
    pub control_socket: Option<String>,
    pub log_level: Option<String>,
    pub registry: Registry,
    pub flows: Flows,
    pub plugins: Plugins,
    pub backends: Backends,
    pub enrichers: Option<Enrichers>,
}

/// `registry`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Registry {
    pub url: Option<String>,
}

/// `flows`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Flows {
    pub max_flows: Option<i64>,
    pub max_per_source: Option<i64>,
    pub max_age: Option<String>,
    pub end_on_socket_close: Option<bool>,
}

/// `plugins`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping of plugins (namedPipe: …)"
)]
pub struct Plugins {
    #[serde(deserialize_with = "section")]
    pub named_pipe: Option<NamedPipe>,
    #[serde(deserialize_with = "section")]
    pub api: Option<Api>,
    #[serde(deserialize_with = "section")]
    pub firefly: Option<FireflyPlugin>,
    #[serde(deserialize_with = "section")]
    pub perfsonar: Option<Perfsonar>,
    #[serde(deserialize_with = "section")]
    pub iperf3: Option<Iperf3>,
    #[serde(deserialize_with = "section")]
    pub netlink: Option<Connections>,
    #[serde(deserialize_with = "section")]
    pub netstat: Option<Connections>,
}

/// `plugins.namedPipe`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct NamedPipe {
    pub max_readers: Option<i64>,
    pub buff_size: Option<i64>,
    pub pipe_path: Option<String>,
    pub mode: Option<String>,
    pub group: Option<String>,
}

/// `plugins.firefly`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct FireflyPlugin {
    pub bind_address: Option<String>,
    pub bind_port: Option<i64>,
    pub buffer_size: Option<i64>,
    pub allowed_sources: Option<Vec<String>>,
    pub deadline: Option<i64>,
    pub has_syslog_header: Option<bool>,
}

/// `plugins.api`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Api {
    pub bind_address: Option<String>,
    pub bind_port: Option<i64>,
    pub unix_socket: Option<String>,
    pub unix_socket_mode: Option<String>,
    pub token: Option<String>,
    pub token_file: Option<String>,
    pub dummy_routes: Option<bool>,
}

/// `plugins.perfsonar`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Perfsonar {
    pub activity_id: Option<i64>,
    pub experiment_id: Option<i64>,
}

/// `plugins.netlink` and `plugins.netstat`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Connections {
    pub experiment: Option<String>,
    pub activity: Option<String>,
    pub internal_networks: Option<Vec<String>>,
    pub period: Option<String>,
    pub announce_existing: Option<bool>,
    pub rules: Option<Vec<ConnectionRule>>,
}

/// `plugins.netlink.rules` and `plugins.netstat.rules`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value)"
)]
pub struct ConnectionRule {
    pub remote_networks: Option<Vec<String>>,
    pub local_ports: Option<Vec<String>>,
    pub remote_ports: Option<Vec<String>>,
    pub uid: Option<String>,
    pub cgroup: Option<String>,
    pub experiment: Option<String>,
    pub activity: Option<String>,
}

/// `plugins.iperf3`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Iperf3 {
    pub min_source_port: Option<i64>,
    pub max_source_port: Option<i64>,
    pub min_destination_port: Option<i64>,
    pub max_destination_port: Option<i64>,
    pub cgroup_path: Option<String>,
    pub program_path: Option<String>,
    pub debug_mode: Option<bool>,
    #[serde(rename = "randomIDs")]
    pub random_ids: Option<bool>,
    #[serde(rename = "experimentIDs")]
    pub experiment_ids: Option<Vec<i64>>,
    #[serde(rename = "activityIDs")]
    pub activity_ids: Option<Vec<i64>>,
    pub internal_networks: Option<Vec<String>>,
}

/// `enrichers.skops`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct SkopsEnricher {
    pub cgroup_path: Option<String>,
    pub program_path: Option<String>,
    pub debug_mode: Option<bool>,
    pub strategy: Option<String>,
}

/// `enrichers`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping of enrichers (netlink: …)"
)]
pub struct Enrichers {
    pub period: Option<String>,
    #[serde(deserialize_with = "section")]
    pub netlink: Option<NetlinkEnricher>,
    #[serde(deserialize_with = "section")]
    pub skops: Option<SkopsEnricher>,
}

/// `enrichers.netlink`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct NetlinkEnricher {
    pub protocol: Option<i64>,
    pub ext: Option<i64>,
    pub state: Option<i64>,
}

/// `backends`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping of backends (firefly: …)"
)]
pub struct Backends {
    #[serde(deserialize_with = "section")]
    pub firefly: Option<Firefly>,
    #[serde(deserialize_with = "section")]
    pub marker: Option<Marker>,
    #[serde(deserialize_with = "section")]
    pub prometheus: Option<Prometheus>,
    #[serde(deserialize_with = "section")]
    pub dummy: Option<Dummy>,
}

/// `backends.dummy`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(default, deny_unknown_fields, expecting = "nothing")]
pub struct Dummy {}

/// `backends.prometheus`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Prometheus {
    pub log: Option<bool>,
    pub bind_address: Option<String>,
    pub port: Option<i64>,
    pub netlink_port: Option<i64>,
    pub skops_port: Option<i64>,
    pub per_flow: Option<bool>,
    pub max_series: Option<i64>,
}

/// `backends.firefly`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Firefly {
    pub destination_port: Option<i64>,
    pub prepend_syslog: Option<bool>,
    pub send_to_collector: Option<bool>,
    pub collector_address: Option<String>,
    pub collector_port: Option<i64>,
    pub relayed: Option<String>,
    pub max_relay_rate: Option<i64>,
    pub enrich: Option<bool>,
    pub enrichment_mode: Option<String>,
    pub ongoing: Option<bool>,
    #[serde(rename = "publicIPv4")]
    pub public_ipv4: Option<String>,
    #[serde(rename = "publicIPv6")]
    pub public_ipv6: Option<String>,
    #[serde(deserialize_with = "section")]
    pub stun: Option<Stun>,
}

/// `backends.firefly.stun`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Stun {
    pub manual_mapping: Option<BTreeMap<String, String>>,
    pub http_services: Option<Vec<String>>,
    pub stun_servers: Option<Vec<String>>,
}

/// `backends.marker`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Marker {
    pub target_interfaces: Option<Vec<String>>,
    pub discover_interfaces: Option<bool>,
    pub remove_qdisc: Option<bool>,
    pub program_path: Option<String>,
    pub marking_strategy: Option<String>,
    pub match_all: Option<bool>,
    pub debug_mode: Option<bool>,
    pub priority: Option<i64>,
    pub keep_on_exit: Option<bool>,
    pub bpf_fs_path: Option<String>,
}

/// A section that is named is enabled, even without a value.
pub fn section<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Some(Option::deserialize(deserializer)?.unwrap_or_default()))
}
