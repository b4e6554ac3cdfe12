//! Checks of the plugins.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{Result, connections, error, error_in, octal, path, range};
use crate::config::{Api, FireflyPlugin, NamedPipe, PIPE_PATH, raw};
use crate::firefly;
use crate::flow::{Tag, parse_address};
use crate::scitag;

const PIPE_MODE: u32 = 0o666;
/// The default of flowd-go, in bytes.
const FIREFLY_BUFFER_SIZE: i64 = 4096;
/// The default of flowd-go.
const API_PORT: i64 = 7777;
/// The default of the API's Unix socket: its owner and group can write.
const SOCKET_MODE: u32 = 0o660;
/// More than any UDP datagram has, in bytes.
const MAX_BUFFER_SIZE: usize = 65536;

pub fn named_pipe(raw: raw::NamedPipe, notes: &mut Vec<String>) -> Result<NamedPipe> {
    for (key, value) in [("maxReaders", raw.max_readers), ("buffSize", raw.buff_size)] {
        let key = format!("plugins.namedPipe.{key}");
        if value.is_some() {
            let _: u32 = range(&key, value, 1, 1, i64::from(u32::MAX))?;
            notes.push(format!(
                "{key} has no effect: the pipe is read in large blocks"
            ));
        }
    }
    let mode = match raw.mode {
        Some(text) => octal("plugins.namedPipe.mode", &text)?,
        None => PIPE_MODE,
    };
    if raw.group.as_deref() == Some("") {
        return error(
            "plugins.namedPipe.group",
            "empty, expected a group name or id",
        );
    }
    Ok(NamedPipe {
        path: path("plugins.namedPipe.pipePath", raw.pipe_path, PIPE_PATH)?,
        mode,
        group: raw.group,
    })
}

/// The firefly plugin.
pub fn firefly(raw: raw::FireflyPlugin, notes: &mut Vec<String>) -> Result<FireflyPlugin> {
    let key = |key: &str| format!("plugins.firefly.{key}");
    let ip = bind_address(&key("bindAddress"), raw.bind_address)?;
    let default = i64::from(firefly::PORT);
    let port = range(&key("bindPort"), raw.bind_port, default, 1, 65535)?;
    let buffer: usize = range(
        &key("bufferSize"),
        raw.buffer_size,
        FIREFLY_BUFFER_SIZE,
        2049,
        i64::from(i32::MAX),
    )?;
    if raw.deadline.is_some() {
        let _: u32 = range(&key("deadline"), raw.deadline, 0, 0, i64::from(u32::MAX))?;
        notes.push(format!(
            "{} has no effect: the socket is read as soon as a datagram arrives",
            key("deadline")
        ));
    }
    if raw.has_syslog_header.is_some() {
        notes.push(format!(
            "{} has no effect: fireflies with and without a syslog header are accepted",
            key("hasSyslogHeader")
        ));
    }
    let allowed_sources = match raw.allowed_sources {
        None => None,
        Some(texts) if texts.is_empty() => {
            let message = "empty, expected at least one network or address";
            return error(&key("allowedSources"), message);
        }
        Some(texts) => {
            let mut networks = Vec::new();
            for (index, text) in texts.iter().enumerate() {
                let network = connections::network(text);
                networks.push(network.or_else(|why| error_in(&key("allowedSources"), index, why))?);
            }
            Some(networks)
        }
    };
    Ok(FireflyPlugin {
        allowed_sources,
        bind: SocketAddr::new(ip, port),
        buffer_size: buffer.min(MAX_BUFFER_SIZE),
    })
}

/// The API plugin.
pub fn api(raw: raw::Api) -> Result<Api> {
    let key = |key: &str| format!("plugins.api.{key}");
    let ip = bind_address(&key("bindAddress"), raw.bind_address)?;
    let port = range(&key("bindPort"), raw.bind_port, API_PORT, 0, 65535)?;
    if raw.token.is_some() && raw.token_file.is_some() {
        return error("plugins.api", "set either token or tokenFile, not both");
    }
    if let Some(token) = &raw.token
        && (token.is_empty() || token.contains(|c: char| !c.is_ascii_graphic()))
    {
        let message = "expected printable ASCII characters without spaces";
        return error(&key("token"), message);
    }
    let token_file = match raw.token_file {
        Some(file) => Some(path(&key("tokenFile"), Some(file), "")?),
        None => None,
    };
    if port != 0 && !ip.is_loopback() && raw.token.is_none() && token_file.is_none() {
        let message = format!(
            "{ip} is not a loopback address: set token or tokenFile, so that not everyone can report flows"
        );
        return error(&key("bindAddress"), message);
    }
    let mode = match raw.unix_socket_mode {
        Some(text) => octal(&key("unixSocketMode"), &text)?,
        None => SOCKET_MODE,
    };
    let unix_socket = match raw.unix_socket {
        Some(socket) => Some((path(&key("unixSocket"), Some(socket), "")?, mode)),
        None => None,
    };
    if port == 0 && unix_socket.is_none() {
        return error(
            &key("bindPort"),
            "0 disables TCP, but unixSocket is not set: set one of them",
        );
    }
    Ok(Api {
        bind: (port != 0).then(|| SocketAddr::new(ip, port)),
        unix_socket,
        token: raw.token,
        token_file,
        dummy_routes: raw.dummy_routes.unwrap_or(false),
    })
}

/// The perfSONAR plugin: a tag that packets can carry.
pub fn perfsonar(raw: raw::Perfsonar) -> Result<Tag> {
    let id = |key: &str, value: Option<i64>, max: u16| {
        let key = format!("plugins.perfsonar.{key}");
        match value {
            Some(_) => range(&key, value, 0, 1, max.into()),
            None => error(&key, format!("missing, expected 1 to {max}")),
        }
    };
    Ok(Tag {
        experiment: id("experimentId", raw.experiment_id, scitag::EXPERIMENT_MAX)?,
        activity: id("activityId", raw.activity_id, scitag::ACTIVITY_MAX)?,
    })
}

/// Loopback by default. A host name is an error, as it may have several addresses.
pub fn bind_address(key: &str, value: Option<String>) -> Result<IpAddr> {
    let Some(text) = value else {
        return Ok(Ipv4Addr::LOCALHOST.into());
    };
    match parse_address(&text) {
        Some(address) => Ok(address),
        None => error(
            key,
            format!(
                "\"{}\" is not a valid address, expected an IPv4 or IPv6 address of this host, or 0.0.0.0 or :: for all",
                text.escape_debug()
            ),
        ),
    }
}
