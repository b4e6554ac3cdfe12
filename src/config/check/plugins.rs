//! Checks of the plugins.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::{Result, error, octal, path, range};
use crate::config::{FireflyPlugin, NamedPipe, PIPE_PATH, raw};
use crate::firefly;
use crate::flow::parse_address;

const PIPE_MODE: u32 = 0o666;
/// flowd-go's.
const FIREFLY_BUFFER: i64 = 4096;
/// The longest UDP datagram.
const DATAGRAM_MAX: usize = 65536;

pub fn named_pipe(raw: raw::NamedPipe, notes: &mut Vec<String>) -> Result<NamedPipe> {
    for (key, value) in [("maxReaders", raw.max_readers), ("buffSize", raw.buff_size)] {
        let key = format!("plugins.namedPipe.{key}");
        if value.is_some() {
            let _: u32 = range(&key, value, 1, 1, i64::from(u32::MAX))?;
            notes.push(format!(
                "{key} has no effect: the pipe is read in large blocks, lines of any number at once"
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
            "empty, expected the name or the id of a group",
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
        FIREFLY_BUFFER,
        2049,
        i64::from(i32::MAX),
    )?;
    if raw.deadline.is_some() {
        let _: u32 = range(&key("deadline"), raw.deadline, 0, 0, i64::from(u32::MAX))?;
        notes.push(format!(
            "{} has no effect: the socket is read whenever something has arrived",
            key("deadline")
        ));
    }
    if raw.has_syslog_header.is_some() {
        notes.push(format!(
            "{} has no effect: fireflies with a syslog header and without are both taken",
            key("hasSyslogHeader")
        ));
    }
    Ok(FireflyPlugin {
        bind: SocketAddr::new(ip, port),
        buffer_size: buffer.min(DATAGRAM_MAX),
    })
}

/// Loopback unless given; no names, which may mean several addresses.
fn bind_address(key: &str, value: Option<String>) -> Result<IpAddr> {
    let Some(text) = value else {
        return Ok(Ipv4Addr::LOCALHOST.into());
    };
    match parse_address(&text) {
        Some(address) => Ok(address),
        None => error(
            key,
            format!(
                "\"{}\" is no address, expected one of this host, IPv4 or IPv6, or 0.0.0.0 or :: for all",
                text.escape_debug()
            ),
        ),
    }
}
