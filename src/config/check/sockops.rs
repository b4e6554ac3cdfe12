//! Checks of the parts that use the sockops program: the iperf3 plugin and the skops enricher.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::connections::{ENRICHER_PERIOD, internal_or, network, period};
use super::{Result, error, path, range};
use crate::config::{Iperf3, Sockops, raw};
use crate::flow::Tag;

/// The default of flowd-go.
const CGROUP: &str = "/sys/fs/cgroup";
/// The default of flowd-go.
const IDS: [i64; 3] = [0, 1, 2];

/// The iperf3 plugin.
pub fn iperf3(raw: raw::Iperf3) -> Result<Iperf3> {
    built_with_bpf("plugins.iperf3")?;
    let key = |key: &str| format!("plugins.iperf3.{key}");
    let ports = |end: &str, min, max| -> Result<RangeInclusive<u16>> {
        let bound =
            |which: &str, value| range(&key(&format!("{which}{end}Port")), value, 0, 0, 65535);
        let (min, max): (u16, u16) = (bound("min", min)?, bound("max", max)?);
        if max != 0 && min > max {
            let message = format!("{max} is less than min{end}Port, {min}; 0 means no limit");
            return error(&key(&format!("max{end}Port")), message);
        }
        Ok(min..=max)
    };
    let ids = |name: &str, ids: Option<Vec<i64>>| -> Result<Vec<u16>> {
        let ids = ids.unwrap_or_else(|| IDS.to_vec());
        ids.into_iter()
            .map(|id| range(&key(name), Some(id), 0, 0, 65535))
            .collect()
    };
    let experiments = ids("experimentIDs", raw.experiment_ids)?;
    let activities = ids("activityIDs", raw.activity_ids)?;
    if experiments.len() != activities.len() || experiments.is_empty() {
        let message = format!(
            "found {} ids here and {} in experimentIDs, expected two lists of the same length that are not empty",
            activities.len(),
            experiments.len()
        );
        return error(&key("activityIDs"), message);
    }
    let internal = raw.internal_networks.map(|texts| {
        let networks = texts.iter().map(|text| network(text)).collect();
        internal_or(networks, &key("internalNetworks"))
    });
    let pairs = experiments.into_iter().zip(activities);
    Ok(Iperf3 {
        sockops: Sockops {
            local_ports: ports("Source", raw.min_source_port, raw.max_source_port)?,
            remote_ports: ports(
                "Destination",
                raw.min_destination_port,
                raw.max_destination_port,
            )?,
            ..program(
                &key("cgroupPath"),
                raw.cgroup_path,
                raw.program_path,
                raw.debug_mode,
            )?
        },
        internal_networks: internal.transpose()?,
        random: raw.random_ids.unwrap_or(false),
        tags: pairs
            .map(|(experiment, activity)| Tag {
                experiment,
                activity,
            })
            .collect(),
    })
}

/// The skops enricher.
pub fn enricher(raw: raw::SkopsEnricher, interval: Option<&str>) -> Result<Sockops> {
    built_with_bpf("enrichers.skops")?;
    let period = period("enrichers.period", interval, ENRICHER_PERIOD)?;
    let transitions = match raw.strategy.as_deref() {
        None | Some("poll") => false,
        Some("transition") => true,
        Some(other) => {
            let message = format!(
                "\"{}\" is not a valid strategy, expected poll or transition",
                other.escape_debug()
            );
            return error("enrichers.skops.strategy", message);
        }
    };
    let key = "enrichers.skops.cgroupPath";
    Ok(Sockops {
        period: (!transitions).then_some(period),
        transitions,
        ..program(key, raw.cgroup_path, raw.program_path, raw.debug_mode)?
    })
}

/// The settings that both parts share: reports only starts and ends, of connections with any ports.
fn program(
    cgroup_key: &str,
    cgroup: Option<String>,
    program: Option<String>,
    debug: Option<bool>,
) -> Result<Sockops> {
    Ok(Sockops {
        cgroup: path(cgroup_key, cgroup, CGROUP)?,
        program: program.filter(|path| !path.is_empty()).map(PathBuf::from),
        debug: debug.unwrap_or(false),
        local_ports: 0..=0,
        remote_ports: 0..=0,
        period: None,
        transitions: false,
    })
}

fn built_with_bpf(section: &str) -> Result<()> {
    match cfg!(feature = "bpf") {
        true => Ok(()),
        false => error(
            section,
            "this flowd-rs was built without eBPF (feature bpf)",
        ),
    }
}
