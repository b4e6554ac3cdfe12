//! The second step: defaults, ranges, and which settings exclude each other.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use log::LevelFilter;

use super::raw::{self, TextOrList};
use super::settings::{
    CONTROL_SOCKET, CollectorConfig, Forward, Limits, Listen, MulticastGroup, NETFLOW_PORT,
    STATE_DIR,
};
use crate::collector::exporters;
use crate::collector::filter::Rules;
use crate::collector::filter::grammar::prefix;
use crate::collector::store::fields::Fields;
use crate::collector::store::{self, LogSocketSettings, Target};
use crate::config::ControlSocket;
use crate::config::check::plugins::bind_address;
use crate::config::check::{Result, duration, error, error_in, log_level, path, range, registry};
use crate::config::nearest::nearest;
use crate::config::raw::Registry;
use crate::registry;

/// 8 MiB: a tenth of a second of an exporter at 1 Gbit/s, or seconds of most.
const RECEIVE_BUFFER: i64 = 8 << 20;
const DIRECTORY: &str = "/var/lib/flowd-collector/segments";
const ROTATE_INTERVAL: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;
const MAX_WAITING: u64 = 256 * MIB;
const MAX_EXPORTERS: i64 = 10_000;
/// The prometheus backend of `flowd-rs run` has 8080 and 8081.
const METRICS_PORT: i64 = 8082;
const MAX_WORKERS: i64 = 64;
/// 1 PiB, in bytes.
const MAX_SIZE: u64 = 1 << 50;

/// The settings of the registry.
pub fn registry_settings(raw: &raw::Raw) -> Result<registry::Settings> {
    let state_dir = path("stateDir", raw.state_dir.clone(), STATE_DIR)?;
    let url = raw.registry.url.clone();
    registry(Registry { url }, &state_dir)
}

/// Fills in defaults and checks all values. `rules` are those of the filter.
pub fn check(raw: raw::Raw, rules: Rules) -> Result<CollectorConfig> {
    let mut notes = Vec::new();
    let registry = registry_settings(&raw)?;
    let limits = raw.limits;
    let exporters = exporters::Limits::default();
    let max_waiting = size("limits.maxWaiting", limits.max_waiting.as_deref())?;
    let log_socket = raw
        .log_socket
        .map(|short| log_socket(short.0))
        .transpose()?;
    let metrics = raw.metrics.map(metrics).transpose()?;
    let listen = match raw.listen {
        None => vec![raw::Short(raw::Listen::default())],
        Some(list) if list.is_empty() => {
            return error("listen", "empty, expected at least one ADDRESS:PORT");
        }
        Some(list) => list,
    };
    let mut sockets: Vec<Listen> = Vec::new();
    for (index, raw::Short(raw)) in listen.into_iter().enumerate() {
        let listen = listen_on(raw).or_else(|message| error_in("listen", index, message))?;
        if sockets.iter().any(|other| other.address == listen.address) {
            let message = format!("{} is given twice", listen.address);
            return error_in("listen", index, message);
        }
        sockets.push(listen);
    }
    let groups = raw.multicast_groups.into_iter().flatten().enumerate();
    let groups = groups.map(|(index, raw::Short(raw))| {
        multicast_group(raw).or_else(|message| error_in("multicastGroups", index, message))
    });
    let forward = raw.forward.into_iter().flatten().enumerate();
    let forward = forward.map(|(index, raw::Short(raw))| {
        let address = address_and_port(raw.address, raw.port, None);
        let address = address.or_else(|message| error_in("forward", index, message))?;
        let spoof_source = raw.spoof_source.unwrap_or(false);
        if let Some(listen) = sockets.iter().find(|listen| receives(listen, address)) {
            let message = format!(
                "{address} is received by this collector itself (listen {}), expected another collector",
                listen.address
            );
            return error_in("forward", index, message);
        }
        Ok(Forward {
            address,
            spoof_source,
        })
    });
    let forward = forward.collect::<Result<_>>()?;
    let size_or = |key: &str, text: Option<String>, default: u64| {
        Ok(size(key, text.as_deref())?.unwrap_or(default) as usize)
    };
    Ok(CollectorConfig {
        pid_path: raw
            .pid_path
            .filter(|path| !path.is_empty())
            .map(PathBuf::from),
        state_dir: path("stateDir", raw.state_dir, STATE_DIR)?,
        control_socket: ControlSocket {
            given: raw.control_socket.is_some(),
            path: path("controlSocket", raw.control_socket, CONTROL_SOCKET)?,
        },
        log_level: match raw.log_level {
            Some(level) => log_level(&level).or_else(|message| error("logLevel", message))?,
            None => LevelFilter::Info,
        },
        registry,
        listen: sockets,
        workers: range("workers", raw.workers, 1, 1, MAX_WORKERS)?,
        sources: sources(raw.sources)?,
        multicast_groups: groups.collect::<Result<_>>()?,
        rules: rules.rules,
        store: store(raw.store, log_socket, max_waiting, &mut notes)?,
        forward,
        limits: Limits {
            template_memory: size_or(
                "limits.templateMemory",
                limits.template_memory,
                exporters.total_bytes as u64,
            )?,
            template_memory_per_exporter: size_or(
                "limits.templateMemoryPerExporter",
                limits.template_memory_per_exporter,
                exporters.exporter_bytes as u64,
            )?,
            template_timeout: match limits.template_timeout {
                Some(text) => duration("limits.templateTimeout", &text)?,
                None => Duration::from_secs(exporters.lifetime_s),
            },
            max_exporters: range(
                "limits.maxExporters",
                limits.max_exporters,
                MAX_EXPORTERS,
                1,
                100_000_000,
            )?,
        },
        metrics,
        notes,
    })
}

fn listen_on(raw: raw::Listen) -> std::result::Result<Listen, String> {
    let default = SocketAddr::from(([0_u16; 8], NETFLOW_PORT));
    let address = match (raw.address, raw.port) {
        (None, None) => default,
        (address, port) => {
            let address = address.unwrap_or_else(|| default.ip().to_string());
            address_and_port(Some(address), port, Some(NETFLOW_PORT))?
        }
    };
    let buffer = raw.receive_buffer.unwrap_or(RECEIVE_BUFFER);
    match usize::try_from(buffer) {
        Ok(receive_buffer) if (2048..=1 << 30).contains(&buffer) => Ok(Listen {
            address,
            receive_buffer,
        }),
        _ => Err(format!(
            "receiveBuffer: {buffer} is out of range, expected 2048 to {} (bytes)",
            1 << 30
        )),
    }
}

/// `ADDRESS:PORT`, or both apart.
fn address_and_port(
    address: Option<String>,
    port: Option<i64>,
    default_port: Option<u16>,
) -> std::result::Result<SocketAddr, String> {
    const EXPECTED: &str = "expected for example 192.0.2.1:2055 or [2001:db8::1]:2055";
    let Some(text) = address else {
        return Err(format!("the address is missing, {EXPECTED}"));
    };
    let invalid = || {
        format!(
            "\"{}\" is not a valid address with a port, {EXPECTED}",
            text.escape_debug()
        )
    };
    let port_of = |port: i64| match u16::try_from(port) {
        Ok(port @ 1..) => Ok(port),
        _ => Err(format!("port {port} is out of range, expected 1 to 65535")),
    };
    if let Ok(both) = text.parse::<SocketAddr>() {
        if port.is_some() {
            let message = format!("the port is given twice, in \"{text}\" and in port");
            return Err(message);
        }
        port_of(both.port().into())?;
        return Ok(both);
    }
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    let Ok(ip) = bare.unwrap_or(&text).parse::<IpAddr>() else {
        return Err(invalid());
    };
    let port = port.or(default_port.map(i64::from)).ok_or_else(invalid)?;
    Ok(SocketAddr::new(ip, port_of(port)?))
}

fn sources(raw: Option<Vec<String>>) -> Result<Option<Vec<IpNet>>> {
    let Some(texts) = raw else { return Ok(None) };
    if texts.is_empty() {
        return error(
            "sources",
            "empty, expected at least one network or address; all are accepted without this key",
        );
    }
    let networks = texts.iter().enumerate();
    let networks = networks
        .map(|(index, text)| prefix(text).or_else(|message| error_in("sources", index, message)));
    networks.collect::<Result<_>>().map(Some)
}

fn multicast_group(raw: raw::MulticastGroup) -> std::result::Result<MulticastGroup, String> {
    let text = raw.group.unwrap_or_default();
    let group = text.parse::<IpAddr>().ok();
    let Some(group) = group.filter(IpAddr::is_multicast) else {
        return Err(format!(
            "\"{}\" is not a multicast address, expected for example 239.1.2.3 or ff05::1",
            text.escape_debug()
        ));
    };
    let is_wrong =
        |name: &String| name.is_empty() || name.len() > 15 || name.contains(['/', ' ', '\0']);
    if let Some(wrong) = raw.interface.as_ref().filter(|name| is_wrong(name)) {
        return Err(format!(
            "interface \"{}\" is not a valid name, expected 1 to 15 bytes without \"/\" and spaces",
            wrong.escape_debug()
        ));
    }
    Ok(MulticastGroup {
        group,
        interface: raw.interface,
    })
}

fn log_socket(raw: raw::LogSocket) -> Result<LogSocketSettings> {
    let Some(text) = raw.path.filter(|path| !path.is_empty()) else {
        return error(
            "logSocket",
            "the path is missing, expected that of a Unix socket",
        );
    };
    let key = "logSocket.bufferSize";
    let buffer_size = match raw.buffer_size {
        None => None,
        size => Some(range(key, size, 0, 2048, 1 << 30)?),
    };
    Ok(LogSocketSettings {
        path: text.into(),
        buffer_size,
    })
}

fn metrics(raw: raw::Metrics) -> Result<SocketAddr> {
    let address = bind_address("metrics.bindAddress", raw.bind_address)?;
    let port = range("metrics.bindPort", raw.bind_port, METRICS_PORT, 1, 65535)?;
    Ok(SocketAddr::new(address, port))
}

/// Whether a socket receives what this host sends to an address.
fn receives(listen: &Listen, to: SocketAddr) -> bool {
    let (own, to_ip) = (listen.address.ip(), to.ip());
    let is_here =
        own == to_ip || own.is_unspecified() && (to_ip.is_loopback() || to_ip.is_unspecified());
    listen.address.port() == to.port() && is_here
}

fn store(
    raw: raw::Store,
    log_socket: Option<LogSocketSettings>,
    max_waiting: Option<u64>,
    notes: &mut Vec<String>,
) -> Result<store::Settings> {
    let compatible = raw.compatible.unwrap_or(false);
    let is_file = raw.logfile.is_some();
    let target = match (raw.directory, raw.logfile) {
        (Some(_), Some(_)) => {
            return error("store", "set either directory or logfile, not both");
        }
        (directory, None) => Target::Directory(path("store.directory", directory, DIRECTORY)?),
        (None, logfile) => Target::File(path("store.logfile", logfile, "")?),
    };
    for (key, value) in [
        ("rotate.interval", &raw.rotate.interval),
        ("rotate.size", &raw.rotate.size),
        ("keep.age", &raw.keep.age),
        ("keep.size", &raw.keep.size),
    ] {
        if is_file && value.is_some() {
            notes.push(format!(
                "store.{key} has no effect: store.logfile is one file, which another program rotates"
            ));
        }
    }
    let seconds = |key: &str, text: Option<&str>| match text {
        Some(text) => duration(key, text).map(Some),
        None => Ok(None),
    };
    let interval = seconds("store.rotate.interval", raw.rotate.interval.as_deref())?;
    Ok(store::Settings {
        target,
        rotate_interval: interval.unwrap_or(ROTATE_INTERVAL),
        rotate_size: size("store.rotate.size", raw.rotate.size.as_deref())?,
        keep_age: seconds("store.keep.age", raw.keep.age.as_deref())?,
        keep_size: size("store.keep.size", raw.keep.size.as_deref())?,
        fields: fields(raw.fields, compatible)?,
        compatible,
        log_socket,
        max_waiting: max_waiting.unwrap_or(MAX_WAITING) as usize,
    })
}

fn fields(raw: Option<TextOrList>, compatible: bool) -> Result<Fields> {
    let (names, is_list) = match raw {
        None => return Ok(Fields::ALL),
        Some(TextOrList::Text(name)) => (vec![name], false),
        Some(TextOrList::List(names)) => (names, true),
    };
    let key = "store.fields";
    let mut fields = Fields::NONE;
    for (index, name) in names.iter().enumerate() {
        let wrong = |message: String| match is_list {
            true => error_in(key, index, message),
            false => error(key, message),
        };
        let Some(named) = Fields::from_name(name) else {
            let known: Vec<&str> = Fields::names().collect();
            let hint = match nearest(name, &known) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("expected {}", known.join(", ")),
            };
            return wrong(format!(
                "\"{}\" is not a known field, {hint}",
                name.escape_debug()
            ));
        };
        if compatible && !named.intersects(Fields::COMPATIBLE) {
            return wrong(format!(
                "{name} is not in the format of djm's flowd, expected compatible: false, or other fields"
            ));
        }
        fields = fields | named;
    }
    match fields.intersects(Fields(
        Fields::ALL.0 & !Fields::CRC32.0 & !Fields::EXTENSION_CRC32.0,
    )) {
        true => Ok(fields),
        false => error(key, "no field to store, expected at least one, or ALL"),
    }
}

/// A number of MiB, or a number with a unit.
pub fn size(key: &str, text: Option<&str>) -> Result<Option<u64>> {
    let Some(text) = text else { return Ok(None) };
    let digits = text
        .trim_end_matches(|c: char| c.is_ascii_alphabetic())
        .trim_end();
    let shift = match text[digits.len()..]
        .trim_start()
        .to_ascii_lowercase()
        .as_str()
    {
        "" | "m" | "mib" => Some(20),
        "k" | "kib" => Some(10),
        "g" | "gib" => Some(30),
        "t" | "tib" => Some(40),
        _ => None,
    };
    let number = digits
        .parse::<u64>()
        .ok()
        .filter(|_| !digits.starts_with('+'));
    let bytes = number
        .zip(shift)
        .and_then(|(number, shift)| number.checked_mul(1 << shift));
    match bytes {
        Some(bytes @ 1024..=MAX_SIZE) => Ok(Some(bytes)),
        _ => error(
            key,
            format!(
                "\"{}\" is not a valid size, expected 1KiB to 1024TiB: a number of MiB, or for example 512KiB, 10GiB or 1TiB",
                text.escape_debug()
            ),
        ),
    }
}
