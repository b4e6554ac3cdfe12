//! Checks of the backends.

use std::path::PathBuf;

use super::{Result, error, path, range};
use crate::config::{BPF_FS_PATH, Collector, Firefly, Marker, Relayed, Strategy, raw};
use crate::enrichment::Mode;
use crate::firefly;

/// Early, so that filters which end the chain come after; above what tc(8) gives by itself.
const MARKER_PRIORITY: i64 = 10;

pub fn firefly(raw: raw::Firefly) -> Result<Firefly> {
    if raw.stun.is_some() {
        return error("backends.firefly.stun", "not supported yet");
    }
    let mode = match raw.enrichment_mode.as_deref() {
        None => Some(Mode::Lean),
        Some(word) => Mode::ALL.into_iter().find(|m| m.as_str() == word),
    };
    let Some(mode) = mode else {
        let word = raw.enrichment_mode.unwrap_or_default();
        let message = format!(
            "\"{}\" is unknown, expected lean, compatible, flowd, or \"\" for everything",
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
            "\"{}\" is neither an address nor a host name",
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
            "\"{}\" is unknown, expected one of {expected}",
            word.escape_debug()
        );
        return error("backends.firefly.relayed", message);
    };
    Ok(Firefly {
        enrichment: raw.enrich.unwrap_or(false).then_some(mode),
        relayed,
        destination_port: port("destinationPort", raw.destination_port)?,
        prepend_syslog: raw.prepend_syslog.unwrap_or(true),
        collector: raw.send_to_collector.unwrap_or(false).then(|| Collector {
            host: bare.to_owned(),
            port: collector_port,
        }),
    })
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
            "backends.marker.targetInterfaces has no effect: discoverInterfaces is on".to_owned(),
        );
    }
    let names = raw
        .target_interfaces
        .unwrap_or_else(|| vec!["lo".to_owned()]);
    let wrong =
        |name: &&String| name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '\0']);
    if let Some(wrong) = names.iter().find(wrong) {
        let message = format!("\"{}\" is no name of an interface", wrong.escape_debug());
        return error("backends.marker.targetInterfaces", message);
    }
    if names.is_empty() && !discover {
        return error(
            "backends.marker.targetInterfaces",
            "empty, expected names of interfaces, or discoverInterfaces: true",
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
            "\"{}\" is no strategy, expected one of {expected}",
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
