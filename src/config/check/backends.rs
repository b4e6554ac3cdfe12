//! Checks of the backends.

use std::net::IpAddr;
use std::path::PathBuf;

use super::plugins::bind_address;
use super::{Result, error, path, range, stun};
use crate::config::{BPF_FS_PATH, Collector, Firefly, Marker, Prometheus, Relayed, raw};
use crate::firefly;
use crate::firefly::netlink_object::Mode;
use crate::flow::parse_address;
use crate::scitag::Strategy;

/// The fireflies of 500 transfers a second between this host and another.
const MAX_RELAY_RATE: i64 = 1000;
/// Before most filters, as one of them may end the chain; lower than the priorities that tc(8) chooses by itself.
const MARKER_PRIORITY: i64 = 10;

pub fn firefly(raw: raw::Firefly) -> Result<Firefly> {
    let mode = match raw.enrichment_mode.as_deref() {
        None => Some(Mode::Lean),
        Some(word) => Mode::ALL.into_iter().find(|m| m.as_str() == word),
    };
    let Some(mode) = mode else {
        let word = raw.enrichment_mode.unwrap_or_default();
        let message = format!(
            "\"{}\" is not a valid mode, expected lean, compatible, flowd, or \"\" for everything",
            word.escape_debug()
        );
        return error("backends.firefly.enrichmentMode", message);
    };
    let port = |key: &str, value| {
        let key = format!("backends.firefly.{key}");
        range(&key, value, i64::from(firefly::PORT), 1, 65535)
    };
    let collector_port = port("collectorPort", raw.collector_port)?;
    let host = raw
        .collector_address
        .unwrap_or_else(|| "127.0.0.1".to_owned());
    let bare = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(&host);
    if bare.is_empty() || bare.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let message = format!(
            "\"{}\" is not a valid address or host name",
            host.escape_debug()
        );
        return error("backends.firefly.collectorAddress", message);
    }
    // The resolver checks the zone of a link-local address.
    let address = bare.split_once('%').map_or(bare, |(address, _)| address);
    if address.contains(':') && address.parse::<IpAddr>().is_err() {
        let message = format!(
            "\"{}\" is not a valid address or host name; the port belongs in collectorPort",
            host.escape_debug()
        );
        return error("backends.firefly.collectorAddress", message);
    }
    let relayed = match raw.relayed.as_deref() {
        None => Some(Relayed::Auto),
        Some(word) => Relayed::ALL.into_iter().find(|r| r.as_str() == word),
    };
    let Some(relayed) = relayed else {
        let word = raw.relayed.unwrap_or_default();
        let expected = Relayed::ALL.map(Relayed::as_str).join(", ");
        let message = format!(
            "\"{}\" is not valid, expected one of {expected}",
            word.escape_debug()
        );
        return error("backends.firefly.relayed", message);
    };
    let public = |key: &str, text: Option<String>, v4: bool| {
        let address = text.as_deref().map(|text| {
            let address = parse_address(text).filter(|a| a.is_ipv4() == v4);
            let family = if v4 { "IPv4" } else { "IPv6" };
            address.ok_or_else(|| {
                format!(
                    "\"{}\" is not a valid {family} address",
                    text.escape_debug()
                )
            })
        });
        let key = format!("backends.firefly.{key}");
        address.transpose().or_else(|message| error(&key, message))
    };
    Ok(Firefly {
        ongoing: raw.ongoing.unwrap_or(true),
        public: [
            public("publicIPv4", raw.public_ipv4, true)?,
            public("publicIPv6", raw.public_ipv6, false)?,
        ],
        stun: raw.stun.map(stun::check).transpose()?,
        enrichment: raw.enrich.unwrap_or(false).then_some(mode),
        relayed,
        destination_port: port("destinationPort", raw.destination_port)?,
        max_relay_rate: range(
            "backends.firefly.maxRelayRate",
            raw.max_relay_rate,
            MAX_RELAY_RATE,
            1,
            i64::from(u32::MAX),
        )?,
        prepend_syslog: raw.prepend_syslog.unwrap_or(true),
        collector: raw.send_to_collector.unwrap_or(false).then(|| Collector {
            host: bare.to_owned(),
            port: collector_port,
        }),
    })
}

/// Defaults of flowd-go, unless `port` is set.
const NETLINK_PORT: i64 = 8080;
const SKOPS_PORT: i64 = 8081;
const MAX_SERIES: i64 = 500_000;

pub fn prometheus(
    raw: raw::Prometheus,
    has_skops: bool,
    notes: &mut Vec<String>,
) -> Result<Prometheus> {
    if raw.log.is_some() {
        notes.push(
            "backends.prometheus.log has no effect: logLevel applies to the whole daemon"
                .to_owned(),
        );
    }
    let has_main_port = raw.port.is_some_and(|port| port != 0);
    let port = |key: &str, value, default| {
        let key = format!("backends.prometheus.{key}");
        let default = if has_main_port { 0 } else { default };
        let port: u16 = range(&key, value, default, 0, 65535)?;
        Ok((port != 0).then_some(port))
    };
    let config = Prometheus {
        address: bind_address("backends.prometheus.bindAddress", raw.bind_address)?,
        port: port("port", raw.port, 0)?,
        netlink_port: port("netlinkPort", raw.netlink_port, NETLINK_PORT)?,
        skops_port: port("skopsPort", raw.skops_port, SKOPS_PORT)?,
        per_flow: raw.per_flow.unwrap_or(true),
        max_series: range(
            "backends.prometheus.maxSeries",
            raw.max_series,
            MAX_SERIES,
            0,
            100_000_000,
        )?,
    };
    if config.listeners().next().is_none() {
        let message = "no port is set, expected at least one of port, netlinkPort and skopsPort";
        return error("backends.prometheus", message);
    }
    if !has_skops && config.skops_port.is_some() {
        notes.push(
            "backends.prometheus.skopsPort shows no flows: enrichers.skops is not enabled"
                .to_owned(),
        );
    }
    Ok(config)
}

pub fn marker(raw: raw::Marker, notes: &mut Vec<String>) -> Result<Marker> {
    if cfg!(not(feature = "bpf")) {
        return error(
            "backends.marker",
            "this flowd-rs was built without packet marking (feature bpf)",
        );
    }
    let discover = raw.discover_interfaces.unwrap_or(false);
    if discover && raw.target_interfaces.is_some() {
        notes.push(
            "backends.marker.targetInterfaces has no effect: discoverInterfaces is true".to_owned(),
        );
    }
    let names = raw
        .target_interfaces
        .unwrap_or_else(|| vec!["lo".to_owned()]);
    let is_wrong =
        |name: &&String| name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '\0']);
    if let Some(wrong) = names.iter().find(is_wrong) {
        let message = format!(
            "\"{}\" is not a valid interface name, expected 1 to 15 bytes without \"/\" and spaces",
            wrong.escape_debug()
        );
        return error("backends.marker.targetInterfaces", message);
    }
    if names.is_empty() && !discover {
        return error(
            "backends.marker.targetInterfaces",
            "empty, expected interface names, or discoverInterfaces: true",
        );
    }
    let strategy = match raw.marking_strategy.as_deref() {
        None => Some(Strategy::Label),
        Some(word) => Strategy::ALL.into_iter().find(|s| s.as_str() == word),
    };
    let Some(strategy) = strategy else {
        let word = raw.marking_strategy.unwrap_or_default();
        let expected = Strategy::ALL.map(Strategy::as_str).join(", ");
        let message = format!(
            "\"{}\" is not a valid strategy, expected one of {expected}",
            word.escape_debug()
        );
        return error("backends.marker.markingStrategy", message);
    };
    Ok(Marker {
        interfaces: (!discover).then_some(names),
        remove_qdisc: raw.remove_qdisc.unwrap_or(true),
        program_path: raw
            .program_path
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        strategy,
        match_all: raw.match_all.unwrap_or(false),
        all: None,
        debug: raw.debug_mode.unwrap_or(false),
        priority: range(
            "backends.marker.priority",
            raw.priority,
            MARKER_PRIORITY,
            1,
            65535,
        )?,
        keep_on_exit: raw.keep_on_exit.unwrap_or(false),
        bpf_fs_path: path("backends.marker.bpfFsPath", raw.bpf_fs_path, BPF_FS_PATH)?,
    })
}
