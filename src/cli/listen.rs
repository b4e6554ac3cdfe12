//! `flowd-rs listen`: prints incoming fireflies.

use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};

use argh::{ArgsInfo, FromArgs};
use jiff::Timestamp;

use super::terminal::{escaped, escaped_json};
use crate::error::{Context, Error, Result};
use crate::event::{FlowEvent, State};
use crate::firefly::{self, PORT};
use crate::flow::Usage;
use crate::logging::quote;
use crate::registry::Registry;

/// Print incoming fireflies, one per line.
#[derive(ArgsInfo, FromArgs)]
#[argh(
    subcommand,
    name = "listen",
    help_triggers("-h", "--help", "help"),
    note = "A line has: time, host, state, flow, experiment and activity, application,\nduration, bytes. Datagrams that are not fireflies are reported on standard\nerror."
)]
pub struct Listen {
    /// UDP port (default: 10514)
    #[argh(option, default = "PORT", from_str_fn(port))]
    port: u16,

    /// address to listen on (default: all, IPv4 and IPv6)
    #[argh(option, default = "Ipv6Addr::UNSPECIFIED.into()", from_str_fn(address))]
    address: IpAddr,

    /// print the JSON object as received instead
    #[argh(switch)]
    json: bool,
}

fn port(word: &str) -> std::result::Result<u16, String> {
    let port = word.parse().ok().filter(|&port| port != 0);
    port.ok_or_else(|| {
        format!(
            "\"{}\" is not a port, expected 1 to 65535",
            word.escape_debug()
        )
    })
}

fn address(word: &str) -> std::result::Result<IpAddr, String> {
    word.parse()
        .map_err(|_| format!("\"{}\" is not an IPv4 or IPv6 address", word.escape_debug()))
}

impl Listen {
    pub fn run(self) -> Result<()> {
        let local = SocketAddr::new(self.address, self.port);
        let socket = UdpSocket::bind(local).map_err(|error| bind_error(local, error))?;
        let registry = super::registry::load(None);
        let mut datagram = vec![0; 65536];
        loop {
            let (length, from) = socket
                .recv_from(&mut datagram)
                .context(|| format!("UDP {local}"))?;
            let datagram = &datagram[..length];
            let now = Timestamp::now();
            let line = match firefly::decode(datagram, now) {
                Ok(_) if self.json => firefly::object(datagram)
                    .map(|object| escaped_json(&object))
                    .unwrap_or_default(),
                Ok(event) => {
                    let sender = from.ip().to_canonical().to_string();
                    let host = firefly::syslog_hostname(datagram).unwrap_or(&sender);
                    escaped(&describe(&event, host, now, &registry))
                }
                Err(error) => {
                    eprintln!(
                        "flowd-rs: not a firefly, from {from}: {}: {}",
                        escaped(&error.to_string()),
                        quote(datagram)
                    );
                    continue;
                }
            };
            if writeln!(std::io::stdout(), "{line}").is_err() {
                return Ok(());
            }
        }
    }
}

fn bind_error(local: SocketAddr, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::AddrInUse => Error::Failed(format!(
            "UDP {local}: the port is in use, probably by the firefly plugin of a running daemon (plugins.firefly): use --port"
        )),
        _ => Error::Resource {
            resource: format!("UDP {local}"),
            source: error,
        },
    }
}

fn describe(event: &FlowEvent, host: &str, now: Timestamp, registry: &Registry) -> String {
    let (experiment, activity) = registry.names(event.tag());
    let mut line = format!(
        "{now:.3} {host} {:<7} {} {experiment} / {activity}",
        event.state.as_str(),
        event.flow
    );
    if let Some(application) = &event.application {
        line += &format!(" by {application}");
    }
    if event.state == State::End {
        let lasted = event.time.duration_since(event.start_time());
        line += &format!(" after {:.3} s", lasted.as_secs_f64());
    }
    let usage = event.usage.unwrap_or_default();
    for (direction, bytes) in [("sent", usage.sent), ("received", usage.received)] {
        if let Some(bytes) = bytes {
            line += &format!(" {direction} {bytes}");
        }
    }
    if usage != Usage::default() {
        line += " bytes";
    }
    line
}
