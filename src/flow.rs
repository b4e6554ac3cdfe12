//! The vocabulary: flow, endpoint, tag, usage. No I/O, no clock.

pub mod recent;
pub mod special_networks;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

/// Transport protocol of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// Transmission Control Protocol.
    Tcp,
    /// User Datagram Protocol.
    Udp,
}

impl Protocol {
    /// `tcp` or `udp`, as in a firefly.
    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }

    /// Reads `tcp` or `udp` in any case.
    pub fn from_word(word: &str) -> Option<Protocol> {
        [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .find(|p| p.as_str().eq_ignore_ascii_case(word))
    }
}

/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// The address; never an IPv4-mapped IPv6 one.
    pub address: IpAddr,
    /// The port; 0 if the producer of a firefly did not know it.
    pub port: u16,
}

impl Endpoint {
    /// The socket address of this end, without flow information or scope.
    pub fn socket_addr(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket_addr().fmt(f)
    }
}

/// Reads an address. An IPv6 address may stand in brackets and carry a zone, which is dropped: a flow has none.
pub fn parse_address(text: &str) -> Option<IpAddr> {
    let bare = text
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(text);
    match bare.split_once('%') {
        Some((address, zone)) if !zone.is_empty() => address.parse().ok().map(IpAddr::V6),
        _ => bare.parse().ok(),
    }
}

/// A 5-tuple: what identifies a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// The transport protocol.
    pub protocol: Protocol,
    /// The sending end.
    pub source: Endpoint,
    /// The receiving end.
    pub destination: Endpoint,
}

/// Why two endpoints do not make a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// One end is IPv4, the other IPv6.
    #[error("source and destination must be of one address family")]
    MixedFamilies,
    /// An end is the unspecified address.
    #[error("0.0.0.0 and :: cannot be an endpoint of a flow")]
    Unspecified,
}

impl Flow {
    /// A flow between two endpoints. IPv4-mapped IPv6 addresses become IPv4 addresses.
    pub fn new(
        protocol: Protocol,
        source: (IpAddr, u16),
        destination: (IpAddr, u16),
    ) -> Result<Flow, FlowError> {
        let end = |(address, port): (IpAddr, u16)| {
            let address = address.to_canonical();
            match address.is_unspecified() {
                true => Err(FlowError::Unspecified),
                false => Ok(Endpoint { address, port }),
            }
        };
        let (source, destination) = (end(source)?, end(destination)?);
        if source.address.is_ipv4() != destination.address.is_ipv4() {
            return Err(FlowError::MixedFamilies);
        }
        Ok(Flow {
            protocol,
            source,
            destination,
        })
    }

    /// The direction of the two that sorts first, and whether that is the other one. Both directions of a connection have
    /// the same canonical flow.
    pub fn canonical(&self) -> (Flow, bool) {
        match self.source <= self.destination {
            true => (*self, false),
            false => (self.reversed(), true),
        }
    }

    /// The same flow in the other direction.
    pub fn reversed(&self) -> Flow {
        Flow {
            protocol: self.protocol,
            source: self.destination,
            destination: self.source,
        }
    }
}

/// Hashes all fields in one piece: a derived implementation hashes ten, which takes SipHash three times as long.
impl Hash for Flow {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        let mut bytes = [0; 37];
        bytes[0] = self.protocol as u8;
        for (end, at) in [(self.source, 1), (self.destination, 19)] {
            match end.address {
                IpAddr::V4(address) => bytes[at..at + 4].copy_from_slice(&address.octets()),
                IpAddr::V6(address) => bytes[at..at + 16].copy_from_slice(&address.octets()),
            }
            bytes[at + 16..at + 18].copy_from_slice(&end.port.to_ne_bytes());
        }
        hasher.write(&bytes);
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = self.protocol.as_str();
        write!(f, "{protocol} {} > {}", self.source, self.destination)
    }
}

/// Experiment and activity. Experiments 1 to 511 and activities 1 to 63 fit in a flow label; fireflies carry
/// larger ones too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag {
    /// Experiment id of the SciTags registry; 0 is untagged.
    pub experiment: u16,
    /// Activity id within the experiment; 0 is untagged.
    pub activity: u16,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.experiment, self.activity)
    }
}

/// Payload bytes that a flow has carried so far; `None` where unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes received by the reporting end.
    pub received: Option<u64>,
    /// Bytes sent by the reporting end.
    pub sent: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(source: &str, destination: &str) -> Result<Flow, FlowError> {
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        Flow::new(Protocol::Tcp, (ip(source), 1), (ip(destination), 2))
    }

    #[test]
    fn mapped_addresses_mean_ipv4() {
        let mapped = flow("::ffff:192.0.2.1", "192.0.2.2").unwrap();
        assert_eq!(mapped, flow("192.0.2.1", "192.0.2.2").unwrap());
    }

    #[test]
    fn ends_that_make_no_flow() {
        assert_eq!(
            flow("192.0.2.1", "2001:db8::1"),
            Err(FlowError::MixedFamilies)
        );
        assert_eq!(flow("::", "2001:db8::1"), Err(FlowError::Unspecified));
    }

    #[test]
    fn both_directions_have_one_canonical_flow() {
        let flow = flow("192.0.2.1", "192.0.2.2").unwrap();
        assert_eq!(flow.canonical(), (flow, false));
        assert_eq!(flow.reversed().canonical(), (flow, true));
    }

    #[test]
    fn a_flow_is_small_enough_to_keep_a_million() {
        assert!(size_of::<Flow>() <= 42);
    }
}
