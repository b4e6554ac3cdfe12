//! `flowd-rs listen`: prints the fireflies that arrive.

use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};

use argh::{ArgsInfo, FromArgs};
use jiff::Timestamp;

use crate::error::{Context, Result};
use crate::firefly::{self, PORT};
use crate::flow::{FlowEvent, State, Usage};
use crate::log_limit::quote;
use crate::registry::Registry;

/// Print incoming fireflies, one line each: time, host, state, flow, experiment and activity,
/// application, bytes.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "listen", help_triggers("-h", "--help", "help"))]
pub struct Listen {
    /// UDP port (default: 10514)
    #[argh(option, default = "PORT")]
    port: u16,

    /// address to listen on (default: all, IPv4 and IPv6)
    #[argh(option, default = "Ipv6Addr::UNSPECIFIED.into()")]
    address: IpAddr,

    /// print the JSON as it came instead
    #[argh(switch)]
    json: bool,
}

impl Listen {
    pub fn run(self) -> Result<()> {
        let here = SocketAddr::new(self.address, self.port);
        let socket = UdpSocket::bind(here).context(|| format!("UDP {here}"))?;
        let registry = super::registry::known(None);
        let mut datagram = vec![0; 65536];
        loop {
            let (length, from) = socket
                .recv_from(&mut datagram)
                .context(|| format!("UDP {here}"))?;
            let datagram = &datagram[..length];
            let now = Timestamp::now();
            let line = match firefly::decode(datagram, now) {
                Ok(_) if self.json => json(datagram),
                Ok(event) => {
                    let sender = from.ip().to_canonical().to_string();
                    let host = firefly::sender(datagram).unwrap_or(&sender);
                    describe(&event, host, now, &registry)
                }
                Err(error) => {
                    eprintln!(
                        "flowd-rs: not a firefly, from {from}: {error}: {}",
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

/// The JSON object, without header and tail.
fn json(datagram: &[u8]) -> String {
    let begin = memchr::memchr(b'{', datagram).unwrap_or(0);
    let end = memchr::memrchr(b'}', datagram).map_or(datagram.len(), |at| at + 1);
    String::from_utf8_lossy(&datagram[begin..end.max(begin)]).into_owned()
}

fn describe(event: &FlowEvent, host: &str, now: Timestamp, registry: &Registry) -> String {
    let (experiment, activity) = registry.names(event.tag());
    let mut line = format!(
        "{now:.3} {host} {:<7} {} {experiment} / {activity}",
        event.state.as_str(),
        event.flow
    );
    if let Some(application) = &event.application {
        line += &format!(" by {}", application.escape_debug());
    }
    if event.state == State::End {
        let lasted = event.time.duration_since(event.start_time());
        line += &format!(" after {:.3} s", lasted.as_secs_f64());
    }
    let usage = event.usage.unwrap_or_default();
    for (what, bytes) in [("sent", usage.sent), ("received", usage.received)] {
        if let Some(bytes) = bytes {
            line += &format!(" {what} {bytes}");
        }
    }
    if usage != Usage::default() {
        line += " bytes";
    }
    line
}
