//! Prints the settings in effect as YAML, with every default, and a JSON schema of the YAML for editors.

use std::path::Path;

use serde_json::Value;

use super::raw::{self, Short, TextOrList};
use super::settings::CollectorConfig;
use crate::collector::store::Target;
use crate::collector::store::fields::Fields;
use crate::config::raw::Registry;
use crate::config::show::{describe, keys_of};
use crate::config::yaml::Document;

pub use crate::config::show::print;

/// The commented example configuration, with the description and default of every key.
const EXAMPLE_CONFIG: &str = include_str!("../../../conf/collector.cfg");

/// Keys without a default: their value in the example configuration is an example.
const WITHOUT_DEFAULT: [&str; 6] = ["sources", "logfile", "size", "age", "path", "bufferSize"];

impl Document for raw::Raw {
    fn keys() -> Vec<String> {
        keys()
    }
}

/// A JSON schema (draft 2020-12) of the YAML, for editors: descriptions and defaults.
pub fn schema() -> Value {
    describe::<raw::Raw>(
        "collector.cfg of flowd-rs",
        EXAMPLE_CONFIG,
        &WITHOUT_DEFAULT,
    )
}

/// All keys of the YAML, by dots, in their order; for a list of mappings also the keys of its elements.
pub fn keys() -> Vec<String> {
    keys_of(&schema())
}

impl CollectorConfig {
    /// YAML with the same meaning and every default.
    pub fn to_yaml(&self) -> String {
        print(&self.to_raw())
    }

    pub(super) fn to_raw(&self) -> raw::Raw {
        let store = &self.store;
        let (directory, logfile) = match &store.target {
            Target::Directory(directory) => (Some(path(directory)), None),
            Target::File(file) => (None, Some(path(file))),
        };
        let rules: Vec<String> = self.rules.iter().map(|rule| format!("{rule}\n")).collect();
        let listen = self.listen.iter().map(|listen| raw::Listen {
            address: Some(listen.address.to_string()),
            port: None,
            receive_buffer: Some(listen.receive_buffer as i64),
        });
        let groups = self
            .multicast_groups
            .iter()
            .map(|group| raw::MulticastGroup {
                group: Some(group.group.to_string()),
                interface: group.interface.clone(),
            });
        let forward = self.forward.iter().map(|forward| raw::Forward {
            address: Some(forward.address.to_string()),
            port: None,
            spoof_source: Some(forward.spoof_source),
        });
        let networks =
            |sources: &Vec<ipnet::IpNet>| sources.iter().map(|n| n.to_string()).collect();
        raw::Raw {
            listen: Some(listen.map(Short).collect()),
            workers: Some(self.workers as i64),
            sources: self.sources.as_ref().map(networks),
            multicast_groups: Some(groups.map(Short).collect()),
            macros: None,
            filter: (!rules.is_empty()).then(|| TextOrList::Text(rules.concat())),
            store: raw::Store {
                directory,
                logfile,
                fields: Some(fields(store.fields)),
                compatible: Some(store.compatible),
                rotate: raw::Rotate {
                    interval: Some(format!("{}s", store.rotate_interval.as_secs())),
                    size: store.rotate_size.map(size),
                },
                keep: raw::Keep {
                    age: store.keep_age.map(|age| format!("{}s", age.as_secs())),
                    size: store.keep_size.map(size),
                },
            },
            forward: Some(forward.map(Short).collect()),
            log_socket: store.log_socket.as_ref().map(|socket| {
                Short(raw::LogSocket {
                    path: Some(path(&socket.path)),
                    buffer_size: socket.buffer_size.map(|size| size as i64),
                })
            }),
            limits: raw::Limits {
                max_waiting: Some(size(store.max_waiting as u64)),
                template_memory: Some(size(self.limits.template_memory as u64)),
                template_memory_per_exporter: Some(size(
                    self.limits.template_memory_per_exporter as u64,
                )),
                template_timeout: Some(format!("{}s", self.limits.template_timeout.as_secs())),
                max_exporters: Some(self.limits.max_exporters as i64),
            },
            metrics: self.metrics.map(|address| raw::Metrics {
                bind_address: Some(address.ip().to_string()),
                bind_port: Some(address.port().into()),
            }),
            pid_path: Some(self.pid_path.as_deref().map(path).unwrap_or_default()),
            state_dir: Some(path(&self.state_dir)),
            control_socket: Some(path(&self.control_socket.path)),
            log_level: Some(self.log_level.to_string().to_lowercase()),
            registry: Registry {
                url: Some(self.registry.url.clone()),
            },
        }
    }
}

fn path(path: &Path) -> String {
    path.display().to_string()
}

/// With the largest unit that divides it.
fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB")];
    let unit = units
        .into_iter()
        .find(|(shift, _)| bytes.is_multiple_of(1 << shift));
    let (shift, unit) = unit.unwrap_or((10, "KiB"));
    format!("{}{unit}", bytes >> shift)
}

/// The fewest names that stand for a set, each for both families where it can.
fn fields(fields: Fields) -> TextOrList {
    if fields == Fields::ALL {
        return TextOrList::Text("ALL".to_owned());
    }
    let known = Fields::names().filter_map(|name| Some((name, Fields::from_name(name)?)));
    let mut known: Vec<(&str, Fields)> = known.collect();
    known.sort_by_key(|(_, set)| std::cmp::Reverse(set.0.count_ones()));
    let (mut left, mut names) = (fields, Vec::new());
    for (name, set) in known {
        if fields.contains(set) && left.intersects(set) {
            left = Fields(left.0 & !set.0);
            names.push((set.0, name.to_owned()));
        }
    }
    names.sort();
    TextOrList::List(names.into_iter().map(|(_, name)| name).collect())
}
