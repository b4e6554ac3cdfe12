//! Checks of the settings for this host's sockets: the netlink and netstat plugins, and the netlink enricher.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::{Span, SpanRelativeTo};

use super::{Result, error, error_in, range};
use crate::config::{ConnectionRule, Connections, NetlinkEnricher, raw};
use crate::flow::{Protocol, Tag, parse_address};
use crate::registry::Registry;

/// The default of flowd, for both plugins.
const SCAN_PERIOD: Duration = Duration::from_secs(2);
/// The default of flowd-go.
pub const ENRICHER_PERIOD: Duration = Duration::from_secs(1);
/// The default of flowd-go: all attributes.
const EXTENSIONS: i64 = 255;
/// The default of flowd-go: all states except LISTEN.
const STATES: i64 = 3071;

/// The netlink or netstat plugin; `section` is its key.
pub fn check(section: &str, raw: raw::Connections, registry: &Registry) -> Result<Connections> {
    let key = |key: &str| format!("{section}.{key}");
    let mut rules = Vec::new();
    for (index, raw) in raw.rules.into_iter().flatten().enumerate() {
        let checked = rule(raw, registry);
        let checked = checked
            .or_else(|why| error_in(&key("rules"), index, format!("rule {}: {why}", index + 1)));
        rules.push(checked?);
    }
    match (&raw.experiment, &raw.activity) {
        (None, None) if !rules.is_empty() => {}
        (None, None) => {
            let message = "no tag is set, expected experiment and activity, or rules";
            return error(section, message);
        }
        (experiment, activity) => {
            let tag = tag(registry, experiment.as_deref(), activity.as_deref());
            let tag = tag.or_else(|(which, why)| error(&key(which), why))?;
            rules.push(ConnectionRule {
                tag,
                ..ConnectionRule::default()
            });
        }
    }
    let networks = raw.internal_networks.unwrap_or_default();
    let internal = networks.iter().map(|text| network(text)).collect();
    Ok(Connections {
        rules,
        internal_networks: internal_or(internal, &key("internalNetworks"))?,
        period: period(&key("period"), raw.period.as_deref(), SCAN_PERIOD)?,
        announce_existing: raw.announce_existing.unwrap_or(false),
    })
}

/// The netlink enricher.
pub fn enricher(raw: raw::NetlinkEnricher, interval: Option<&str>) -> Result<NetlinkEnricher> {
    let key = |key: &str| format!("enrichers.netlink.{key}");
    let protocol = match raw.protocol {
        None | Some(6) => Protocol::Tcp,
        Some(17) => Protocol::Udp,
        Some(other) => {
            return error(
                &key("protocol"),
                format!("{other} is not a valid protocol, expected 6 (TCP) or 17 (UDP)"),
            );
        }
    };
    Ok(NetlinkEnricher {
        period: period("enrichers.period", interval, ENRICHER_PERIOD)?,
        protocol,
        extensions: range(&key("ext"), raw.ext, EXTENSIONS, 0, 255)?,
        states: range(&key("state"), raw.state, STATES, 1, 0x1fff)?,
    })
}

pub fn internal_or(
    networks: std::result::Result<Vec<IpNet>, String>,
    key: &str,
) -> Result<Vec<IpNet>> {
    networks.or_else(|why| error(key, why))
}

/// A number of milliseconds, or a number with a unit.
pub fn period(key: &str, text: Option<&str>, default: Duration) -> Result<Duration> {
    let Some(text) = text else {
        return Ok(default);
    };
    let millis = match text.parse::<u64>() {
        Ok(millis) => Some(millis),
        Err(_) => Span::from_str(text)
            .and_then(|span| span.to_duration(SpanRelativeTo::days_are_24_hours()))
            .ok()
            .and_then(|duration| u64::try_from(duration.as_millis()).ok()),
    };
    match millis {
        Some(millis @ 10..=86_400_000) => Ok(Duration::from_millis(millis)),
        _ => error(
            key,
            format!(
                "\"{}\" is not a valid time, expected 10 ms to 1 day: a number of milliseconds, or for example 2s",
                text.escape_debug()
            ),
        ),
    }
}

pub fn network(text: &str) -> std::result::Result<IpNet, String> {
    let address = parse_address(text).map(IpNet::from);
    address.or_else(|| text.parse().ok()).ok_or_else(|| {
        format!(
            "\"{}\" is not a valid network or address, expected for example 192.168.0.0/16",
            text.escape_debug()
        )
    })
}

fn ports(text: &str) -> std::result::Result<RangeInclusive<u16>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
        (Ok(first @ 1..), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err(format!(
            "\"{}\" is not a valid port or range, expected for example 1094 or 20000-25000",
            text.escape_debug()
        )),
    }
}

fn rule(
    raw: raw::ConnectionRule,
    registry: &Registry,
) -> std::result::Result<ConnectionRule, String> {
    fn all<T>(
        key: &str,
        texts: Option<Vec<String>>,
        read: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> std::result::Result<Vec<T>, String> {
        let texts = texts.unwrap_or_default();
        let read = texts
            .iter()
            .map(|text| read(text).map_err(|why| format!("{key}: {why}")));
        read.collect()
    }
    let tag = tag(registry, raw.experiment.as_deref(), raw.activity.as_deref());
    let tag = tag.map_err(|(which, why)| format!("{which}: {why}"))?;
    if raw.uid.as_deref() == Some("") {
        return Err("uid: empty, expected a user name or id".to_owned());
    }
    if raw.cgroup.as_deref() == Some("") {
        return Err("cgroup: empty, expected a path".to_owned());
    }
    Ok(ConnectionRule {
        remote_networks: all("remoteNetworks", raw.remote_networks, network)?,
        local_ports: all("localPorts", raw.local_ports, ports)?,
        remote_ports: all("remotePorts", raw.remote_ports, ports)?,
        tag,
        user: raw.uid,
        cgroup: raw.cgroup.map(PathBuf::from),
    })
}

/// A tag by ids or names; an error names the key.
fn tag(
    registry: &Registry,
    experiment: Option<&str>,
    activity: Option<&str>,
) -> std::result::Result<Tag, (&'static str, String)> {
    let id = |text: &str| text.parse::<u16>().ok();
    let wrong = |which, text: Option<&str>| {
        let found = text.map_or("missing".to_owned(), |text| {
            format!("\"{}\" is unknown", text.escape_debug())
        });
        (
            which,
            format!(
                "{found}, expected an id from 0 to 65535 or a name in the registry (see flowd-rs registry)"
            ),
        )
    };
    let by_name = |text| id(text).or_else(|| registry.experiment_id(text));
    let experiment_id = experiment.and_then(by_name);
    let experiment = experiment_id.ok_or_else(|| wrong("experiment", experiment))?;
    let by_name = |text| id(text).or_else(|| registry.activity_id(experiment, text));
    let activity_id = activity.and_then(by_name);
    let activity = activity_id.ok_or_else(|| wrong("activity", activity))?;
    Ok(Tag {
        experiment,
        activity,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    fn parse(netlink: &str) -> Result<Config, String> {
        let text = format!("plugins:\n  netlink: {netlink}\nbackends:\n  firefly:\n");
        Config::parse(&text, Path::new("f")).map_err(|e| e.to_string())
    }

    #[test]
    fn one_tag_for_all_or_rules() {
        let config = parse("{experiment: atlas, activity: 26, internalNetworks: [192.0.2.0/24, '2001:db8::1'], period: 500}").unwrap();
        let netlink = config.netlink.unwrap();
        assert_eq!(
            (netlink.rules.len(), netlink.rules[0].tag.experiment),
            (1, 2)
        );
        assert_eq!(
            (netlink.period.as_millis(), netlink.internal_networks.len()),
            (500, 2)
        );
        let config = parse(
            "{period: 3s, rules: [{localPorts: [1094, 20000-25000], uid: xrootd, experiment: cms, activity: Cache}, {cgroup: /a, remoteNetworks: ['::/0'], experiment: 1, activity: 1}]}",
        );
        let netlink = config.unwrap().netlink.unwrap();
        assert_eq!(netlink.rules[0].local_ports, [1094..=1094, 20000..=25000]);
        assert_eq!(
            (netlink.rules.len(), netlink.rules[1].user.as_deref()),
            (2, None)
        );
    }

    #[test]
    fn errors_name_key_and_value() {
        for (netlink, expected) in [
            (
                "{}",
                "plugins.netlink: no tag is set, expected experiment and activity, or rules",
            ),
            (
                "{experiment: nobody, activity: 1}",
                "plugins.netlink.experiment: \"nobody\" is unknown, expected an id",
            ),
            (
                "{experiment: 2}",
                "f:2:12: plugins.netlink.activity: missing, expected an id",
            ),
            (
                "{experiment: 2, activity: 9, internalNetworks: [10/8]}",
                "plugins.netlink.internalNetworks: \"10/8\" is not a valid network",
            ),
            (
                "{experiment: 2, activity: 9, period: 5}",
                "plugins.netlink.period: \"5\" is not a valid time, expected 10 ms to 1 day",
            ),
            (
                "{rules: [{experiment: 2, activity: 9}, {localPorts: [5-3], experiment: 2, activity: 9}]}",
                "plugins.netlink.rules: rule 2: localPorts: \"5-3\" is not a valid port",
            ),
            (
                "{rules: [{experiment: 2, activity: Sleeping}]}",
                "plugins.netlink.rules: rule 1: activity: \"Sleeping\" is unknown, expected",
            ),
        ] {
            let error = parse(netlink).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let text = "plugins:\n  netstat: {rules: [{cgroup: /a, experiment: 2, activity: 9}]}\nbackends:\n  firefly:\n";
        let error = Config::parse(text, Path::new("f")).unwrap_err().to_string();
        assert!(
            error.contains("plugins.netstat.rules: cgroup /a: /proc/net/tcp does not show"),
            "{error}"
        );
    }
}
