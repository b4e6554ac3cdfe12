//! The vocabulary: flow, tag, flow event. No I/O, no clock.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use jiff::Timestamp;

use crate::socket::{Skops, Socket};

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
    /// The port; 0 only where the producer of a firefly did not know it.
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

/// Reads an address as people and programs write them: an IPv6 one in brackets or not, with a zone or
/// not. The zone says nothing that a flow needs.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// The transport protocol.
    pub protocol: Protocol,
    /// Where the flow comes from.
    pub source: Endpoint,
    /// Where the flow goes to.
    pub destination: Endpoint,
}

/// Why two ends do not make a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlowError {
    /// One end is IPv4, the other IPv6.
    #[error("source and destination must be of one address family")]
    MixedFamilies,
    /// An end is the unspecified address.
    #[error("0.0.0.0 and :: are not the address of a flow's end")]
    Unspecified,
}

impl Flow {
    /// A flow between two ends. IPv4-mapped IPv6 addresses become the IPv4 addresses that they mean.
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

    /// The same flow in the other direction.
    pub fn reversed(&self) -> Flow {
        Flow {
            protocol: self.protocol,
            source: self.destination,
            destination: self.source,
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = self.protocol.as_str();
        write!(f, "{protocol} {} > {}", self.source, self.destination)
    }
}

/// Experiment and activity. Ids of 1 to 511 and 1 to 63 fit in a flow label; larger ones travel in
/// fireflies only.
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

/// What a flow event says of its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The flow begins.
    Start,
    /// News of an open flow.
    Ongoing,
    /// The flow is over.
    End,
}

impl State {
    /// `start`, `ongoing` or `end`, as in a firefly.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Start => "start",
            State::Ongoing => "ongoing",
            State::End => "end",
        }
    }

    /// Reads `start`, `ongoing` or `end` in any case.
    pub fn from_word(word: &str) -> Option<State> {
        [State::Start, State::Ongoing, State::End]
            .into_iter()
            .find(|s| s.as_str().eq_ignore_ascii_case(word))
    }
}

/// Which way a flow event came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A line in the named pipe.
    NamedPipe,
    /// A firefly datagram.
    Firefly,
    /// A request to the HTTP API.
    Api,
    /// A connection that the netlink plugin found.
    Netlink,
    /// A connection that the netstat plugin found.
    Netstat,
    /// A connection that the iperf3 plugin was told of.
    Iperf3,
    /// A socket that the kernel told of: never the origin of a flow.
    Socket,
}

impl Origin {
    const ALL: [Origin; 7] = [
        Origin::NamedPipe,
        Origin::Firefly,
        Origin::Api,
        Origin::Netlink,
        Origin::Netstat,
        Origin::Iperf3,
        Origin::Socket,
    ];

    /// The name of the plugin, as in metrics and in the journal.
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::NamedPipe => "named_pipe",
            Origin::Firefly => "firefly",
            Origin::Api => "api",
            Origin::Netlink => "netlink",
            Origin::Netstat => "netstat",
            Origin::Iperf3 => "iperf3",
            Origin::Socket => "socket",
        }
    }

    /// Whether its events are about sockets of this host, whose end nobody knows better.
    pub fn is_socket(self) -> bool {
        matches!(
            self,
            Origin::Netlink | Origin::Netstat | Origin::Iperf3 | Origin::Socket
        )
    }

    /// The inverse of [`Origin::as_str`].
    pub fn from_word(word: &str) -> Option<Origin> {
        Origin::ALL.into_iter().find(|o| o.as_str() == word)
    }
}

/// Payload bytes that a flow has carried so far, as far as known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes received by the reporting end.
    pub received: Option<u64>,
    /// Bytes sent by the reporting end.
    pub sent: Option<u64>,
}

/// A member of the JSON object of a received firefly that is passed on as it is: `netlink`, `skOps`,
/// `storage-stats`, and whatever else a producer adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub key: Box<str>,
    /// Its value, as JSON text.
    pub json: Box<str>,
}

/// Why a flow is open no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Its producer said so.
    Producer,
    /// Its socket on this host has gone.
    SocketClosed,
    /// It was older than `flows.maxAge`.
    Expired,
    /// It goes on with another tag.
    Retagged,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [EndReason; 4] = [
        EndReason::Producer,
        EndReason::SocketClosed,
        EndReason::Expired,
        EndReason::Retagged,
    ];

    /// The word in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Producer => "producer",
            EndReason::SocketClosed => "socket_closed",
            EndReason::Expired => "expired",
            EndReason::Retagged => "retagged",
        }
    }
}

/// What an event has done to the table of open flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: news, or the end of a flow that was not open.
    #[default]
    Nothing,
    /// The flow was not open and is now.
    Opened,
    /// It is open with another tag than this one.
    Retagged(Tag),
    /// It was open and is no more.
    Closed(EndReason),
    /// It was closed a moment ago, without counts; these are they.
    Counted,
}

/// A flow's start, its end, or news of it while it is open.
///
/// A plugin fills what it knows; the dispatcher completes the rest from the table of open flows, so
/// that a backend finds `tag` and `start_time` in every event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// What happened.
    pub state: State,
    /// To which flow.
    pub flow: Flow,
    /// Experiment and activity.
    pub tag: Option<Tag>,
    /// When it happened, to the microsecond.
    pub time: Timestamp,
    /// When it was reported (`current-time` of a firefly), to the microsecond.
    pub reported: Option<Timestamp>,
    /// When the flow began.
    pub start_time: Option<Timestamp>,
    /// Name and version of the program that moves the data.
    pub application: Option<Arc<str>>,
    /// Byte counts, when somebody knows them.
    pub usage: Option<Usage>,
    /// What else a received firefly carried.
    pub members: Vec<Member>,
    /// What the kernel knows of the flow's socket on this host.
    pub netlink: Option<Arc<Socket>>,
    /// What the sockops program sees of it.
    pub skops: Option<Arc<Skops>>,
    /// Which way the event came in.
    pub origin: Origin,
    /// What it did to the table of open flows.
    pub effect: Effect,
}

impl FlowEvent {
    /// An event of which only the least is known.
    pub fn new(state: State, flow: Flow, time: Timestamp, origin: Origin) -> FlowEvent {
        FlowEvent {
            state,
            flow,
            tag: None,
            time,
            reported: None,
            start_time: None,
            application: None,
            usage: None,
            members: Vec::new(),
            netlink: None,
            skops: None,
            origin,
            effect: Effect::Nothing,
        }
    }

    /// The tag, 0/0 (untagged) where there is none.
    pub fn tag(&self) -> Tag {
        self.tag.unwrap_or_default()
    }

    /// When the flow began: as far as known, else the time of this event.
    pub fn start_time(&self) -> Timestamp {
        self.start_time.unwrap_or(self.time)
    }
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
    fn a_flow_is_small_enough_to_keep_a_million() {
        assert!(size_of::<Flow>() <= 42);
    }
}
