//! Sends datagrams on as they came, to other collectors.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Instant;

use log::Level;

use crate::collector::config::Forward;
use crate::logging::LogLimit;
use crate::sys::raw_udp::RawSender;

/// Sends each datagram to every destination. It belongs to one worker.
pub struct Forwarder {
    destinations: Vec<Forward>,
    ipv4: Option<UdpSocket>,
    ipv6: Option<UdpSocket>,
    /// For destinations that shall see the address of the exporter; `None` without the privilege.
    raw: Option<RawSender>,
    failures: LogLimit,
}

/// How often a datagram was sent on, and how often that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Sent.
    pub sent: u64,
    /// Not sent.
    pub failed: u64,
}

impl Forwarder {
    /// Opens the sockets that the destinations need.
    pub fn open(destinations: &[Forward]) -> io::Result<Forwarder> {
        let raw = destinations.iter().any(|to| to.spoof_source);
        Forwarder::new(destinations, if raw { open_raw() } else { None })
    }

    /// The same for other destinations. A raw socket is kept: the privilege to open one may have been dropped.
    pub fn with_destinations(self, destinations: &[Forward]) -> io::Result<Forwarder> {
        let raw = destinations.iter().any(|to| to.spoof_source);
        Forwarder::new(
            destinations,
            if raw {
                self.raw.or_else(open_raw)
            } else {
                None
            },
        )
    }

    fn new(destinations: &[Forward], raw: Option<RawSender>) -> io::Result<Forwarder> {
        let open = |address: SocketAddr| {
            let is_needed = destinations
                .iter()
                .any(|to| to.address.is_ipv4() == address.is_ipv4());
            let socket = is_needed.then(|| UdpSocket::bind(address)).transpose()?;
            if let Some(socket) = &socket {
                socket.set_nonblocking(true)?;
            }
            io::Result::Ok(socket)
        };
        Ok(Forwarder {
            destinations: destinations.to_vec(),
            ipv4: open((Ipv4Addr::UNSPECIFIED, 0).into())?,
            ipv6: open((Ipv6Addr::UNSPECIFIED, 0).into())?,
            raw,
            failures: LogLimit::new(Level::Warn, "forward: datagrams that could not be sent"),
        })
    }

    /// Sends a datagram to every destination. One that the network does not take at once is lost, and counted.
    pub fn send(&mut self, datagram: &[u8], from: SocketAddr) -> Forwarded {
        let mut forwarded = Forwarded::default();
        for to in &self.destinations {
            let socket = match to.address.is_ipv4() {
                true => &self.ipv4,
                false => &self.ipv6,
            };
            let result = match &mut self.raw {
                // Only a sender of the same family can be kept.
                Some(raw) if to.spoof_source && from.is_ipv4() == to.address.is_ipv4() => {
                    raw.send(datagram, from, to.address)
                }
                _ => match socket {
                    Some(socket) => send(socket, datagram, to.address),
                    None => Err(io::ErrorKind::Unsupported.into()),
                },
            };
            match result {
                Ok(()) => forwarded.sent += 1,
                Err(error) => {
                    forwarded.failed += 1;
                    let address = to.address;
                    self.failures
                        .log(Instant::now(), || format!("forward to {address}: {error}"));
                }
            }
        }
        forwarded
    }

    /// Logs how many messages were suppressed. Call about once a second.
    pub fn tick(&mut self, now: Instant) {
        self.failures.tick(now);
    }
}

fn open_raw() -> Option<RawSender> {
    let opened = RawSender::open().inspect_err(|error| {
        log::warn!(
            "forward: spoofSource needs CAP_NET_RAW at the start: {error}; datagrams are sent with this host's address"
        );
    });
    opened.ok()
}

fn send(socket: &UdpSocket, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
    // The first call may report the ICMP error of an earlier datagram.
    match socket.send_to(datagram, to) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            socket.send_to(datagram, to).map(drop)
        }
        result => result.map(drop),
    }
}
