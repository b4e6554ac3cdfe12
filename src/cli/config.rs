//! `flowd-rs config`: checks, converts and shows a configuration file, without starting anything.

mod collector;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use crate::collector::config::{self as collector_config, CollectorConfig};
use crate::collector::filter::Macros;
use crate::config::{self, DEFAULT_PATH};
use crate::error::{ConfigError, Result};
use crate::sys::interfaces;

/// Check, convert or show a configuration file.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "config", help_triggers("-h", "--help", "help"))]
pub struct Config {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Check(Check),
    Convert(Convert),
    Schema(Schema),
    Show(Show),
}

/// Check a configuration file and show what the daemon would do.
#[derive(ArgsInfo, FromArgs)]
#[argh(
    subcommand,
    name = "check",
    help_triggers("-h", "--help", "help"),
    note = "The exit code is 0 if the file is valid, 2 if not."
)]
struct Check {
    /// configuration file (default: /etc/flowd/flowd.cfg, or with --collector /etc/flowd/collector.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// the file is that of the collector, also if its content does not show it
    #[argh(switch)]
    collector: bool,

    /// of the collector: a macro that overrides that of the file; may be repeated
    #[argh(
        option,
        short = 'D',
        long = "define",
        arg_name = "macro=value",
        from_str_fn(macro_definition)
    )]
    macros: Vec<(String, String)>,
}

/// Print a KEY=value file or a flowd.conf of flowd as YAML.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "convert", help_triggers("-h", "--help", "help"))]
struct Convert {
    /// configuration file (default: /etc/flowd/flowd.cfg, or with --collector /etc/flowd/collector.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// the file is that of the collector, also if its content does not show it
    #[argh(switch)]
    collector: bool,

    /// of the collector: a macro that overrides that of the file; may be repeated
    #[argh(
        option,
        short = 'D',
        long = "define",
        arg_name = "macro=value",
        from_str_fn(macro_definition)
    )]
    macros: Vec<(String, String)>,
}

/// Print a JSON schema of the YAML configuration, for editors.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "schema", help_triggers("-h", "--help", "help"))]
struct Schema {
    /// that of the collector
    #[argh(switch)]
    collector: bool,
}

/// Print the settings in effect as YAML, including every default.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "show", help_triggers("-h", "--help", "help"))]
struct Show {
    /// configuration file (default: /etc/flowd/flowd.cfg, or with --collector /etc/flowd/collector.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// the file is that of the collector, also if its content does not show it
    #[argh(switch)]
    collector: bool,

    /// of the collector: a macro that overrides that of the file; may be repeated
    #[argh(
        option,
        short = 'D',
        long = "define",
        arg_name = "macro=value",
        from_str_fn(macro_definition)
    )]
    macros: Vec<(String, String)>,
}

impl Config {
    pub fn run(self) -> Result<()> {
        let text = match self.command {
            Command::Check(check) => {
                let file = File::find(check.config, check.collector)?;
                let description = match file.is_collector {
                    true => collector::describe(&file.load_collector(&check.macros)?),
                    false => describe(&file.load()?),
                };
                format!("{}: valid\n{description}", file.path.display())
            }
            Command::Convert(convert) => {
                let file = File::find(convert.config, convert.collector)?;
                let converted = match file.is_collector {
                    true => CollectorConfig::convert_file(&file.path, &convert.macros),
                    false => config::Config::convert_file(&file.path),
                };
                converted.inspect_err(print_excerpt)?
            }
            Command::Schema(schema) => {
                let schema = match schema.collector {
                    true => collector_config::schema(),
                    false => config::schema(),
                };
                format!("{schema:#}\n")
            }
            Command::Show(show) => {
                let file = File::find(show.config, show.collector)?;
                if file.is_collector {
                    file.load_collector(&show.macros)?.to_yaml()
                } else {
                    let mut config = file.load()?;
                    // What is shown is passed on, in tickets and mails.
                    if let Some(token) = config.api.as_mut().and_then(|api| api.token.as_mut()) {
                        "HIDDEN".clone_into(token);
                    }
                    config.to_yaml()
                }
            }
        };
        // The reader (head, less) may close the pipe early.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

/// `name=value`, as the option `-D` has it.
fn macro_definition(word: &str) -> std::result::Result<(String, String), String> {
    Macros::split(word)
}

/// A configuration file, of one of the daemons.
struct File {
    path: PathBuf,
    is_collector: bool,
}

impl File {
    fn find(path: Option<PathBuf>, is_collector: bool) -> Result<File> {
        let default = match is_collector {
            true => collector_config::DEFAULT_PATH,
            false => DEFAULT_PATH,
        };
        let path = path.unwrap_or_else(|| default.into());
        let is_collector = is_collector || CollectorConfig::is_file(&path)?;
        Ok(File { path, is_collector })
    }

    fn load(&self) -> Result<config::Config> {
        Ok(config::Config::load(&self.path).inspect_err(print_excerpt)?)
    }

    fn load_collector(&self, macros: &[(String, String)]) -> Result<CollectorConfig> {
        let config = CollectorConfig::load(&self.path, macros);
        Ok(config.inspect_err(print_excerpt)?)
    }
}

/// Prints the line of the error with a caret; `main` prints the error itself.
fn print_excerpt(error: &ConfigError) {
    eprint!("{}", error.excerpt());
}

/// What the daemon would do with this configuration, one `name: value` per line.
fn describe(config: &config::Config) -> String {
    let mut lines = vec![
        ("plugins", config.plugin_names().join(", ")),
        ("enrichers", config.enricher_names().join(", ")),
        ("backends", config.backend_names().join(", ")),
    ];
    if let Some(pipe) = &config.named_pipe {
        let path = pipe.path.display();
        lines.push(("named pipe", format!("{path}, mode {:04o}", pipe.mode)));
        lines.push(("pipe users", pipe_users(pipe.mode)));
    }
    for (protocol, address, key) in listeners(config) {
        lines.push(("listens on", format!("{protocol} {address} ({key})")));
    }
    if let Some((path, mode)) = config.api.as_ref().and_then(|api| api.unix_socket.as_ref()) {
        lines.push((
            "listens on",
            format!(
                "{}, mode {mode:04o} (plugins.api.unixSocket)",
                path.display()
            ),
        ));
    }
    if let Some(firefly) = &config.firefly {
        let port = firefly.destination_port;
        lines.push((
            "sends to",
            format!("UDP port {port} of the flows' destinations"),
        ));
        if let Some(collector) = &firefly.collector {
            let (host, port) = (&collector.host, collector.port);
            lines.push((
                "sends to",
                format!("UDP port {port} of the collector {host}"),
            ));
        }
    }
    if let Some(marker) = &config.marker {
        lines.push(("marks on", marked_interfaces(marker)));
    }
    let files = [
        ("stateDir", &config.state_dir),
        ("workDir", &config.work_dir),
    ];
    for (key, path) in files {
        lines.push(("writes in", format!("{} ({key})", path.display())));
    }
    lines.push(("registry", config.registry.url.clone()));
    lines.extend(privileges(config).into_iter().map(|need| ("needs", need)));
    lines.extend(
        config
            .warnings
            .iter()
            .map(|warning| ("warning", warning.clone())),
    );
    lines.extend(config.notes.iter().map(|note| ("note", note.clone())));
    let lines = lines.into_iter().filter(|(_, value)| !value.is_empty());
    lines
        .map(|(name, value)| format!("{:<12}{value}\n", format!("{name}:")))
        .collect()
}

/// What the mode of the named pipe permits to users other than its owner.
fn pipe_users(mode: u32) -> String {
    let permitted = |who: &str, bits: u32| {
        let what = match (bits & 2 != 0, bits & 4 != 0) {
            (true, true) => "may report flows, and take away lines of others",
            (true, false) => "may report flows",
            (false, true) => "may take away lines",
            (false, false) => "may do nothing",
        };
        format!("{who} {what}")
    };
    let (group, others) = (
        permitted("the group", mode >> 3),
        permitted("every user", mode),
    );
    format!("{others}; {group} (plugins.namedPipe.mode)")
}

/// Protocol, address and configuration key of each socket that listens on the network.
fn listeners(config: &config::Config) -> Vec<(&'static str, SocketAddr, &'static str)> {
    let mut listeners = Vec::new();
    if let Some(plugin) = &config.firefly_plugin {
        listeners.push(("UDP", plugin.bind, "plugins.firefly"));
    }
    if let Some(bind) = config.api.as_ref().and_then(|api| api.bind) {
        listeners.push(("TCP", bind, "plugins.api"));
    }
    if let Some(prometheus) = &config.prometheus {
        let scraped = prometheus.listeners();
        listeners.extend(scraped.map(|(address, key)| ("TCP", address, key)));
    }
    listeners
}

/// The interfaces whose packets would be marked; configured ones that do not exist are shown as such.
fn marked_interfaces(marker: &config::Marker) -> String {
    let (found, _) = interfaces::list().unwrap_or_default();
    match &marker.interfaces {
        Some(names) => {
            let exists = |name: &String| found.iter().any(|interface| interface.name == *name);
            let shown = names.iter().map(|name| match exists(name) {
                true => name.clone(),
                false => format!("{name} (no such interface)"),
            });
            shown.collect::<Vec<_>>().join(", ")
        }
        None => {
            let global = found.iter().filter(|interface| interface.global_ipv6);
            let names: Vec<&str> = global.map(|interface| interface.name.as_str()).collect();
            let now = if names.is_empty() {
                "none"
            } else {
                &names.join(", ")
            };
            format!("every interface with a global IPv6 address (now: {now})")
        }
    }
}

/// What the configuration needs beyond the rights of an ordinary user.
fn privileges(config: &config::Config) -> Vec<String> {
    let mut needs = Vec::new();
    let bpf = config.bpf_users();
    if !bpf.is_empty() {
        needs.push(format!(
            "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, before Linux 5.8 CAP_SYS_ADMIN ({})",
            bpf.join(", ")
        ));
    }
    if config.firefly_plugin.is_some() && bpf.is_empty() {
        needs.push("CAP_NET_ADMIN for a receive buffer larger than net.core.rmem_max; optional (plugins.firefly)".to_owned());
    }
    for (_, address, key) in listeners(config) {
        if address.port() < 1024 {
            needs.push(format!(
                "CAP_NET_BIND_SERVICE for port {} ({key})",
                address.port()
            ));
        }
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_mode_of_the_pipe_permits() {
        for (mode, expected) in [
            (
                0o666,
                "every user may report flows, and take away lines of others; the group may report flows, and take away lines of others",
            ),
            (
                0o622,
                "every user may report flows; the group may report flows",
            ),
            (
                0o662,
                "every user may report flows; the group may report flows, and take away lines of others",
            ),
            (
                0o640,
                "every user may do nothing; the group may take away lines",
            ),
        ] {
            assert_eq!(
                pipe_users(mode),
                format!("{expected} (plugins.namedPipe.mode)")
            );
        }
    }
}
