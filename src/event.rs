//! Flow events: what plugins send, the dispatcher completes and backends act on. No I/O, no clock.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use crate::flow::{Flow, Tag, Usage};
use crate::socket::{Skops, Socket};

/// What a flow event reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The flow begins.
    Start,
    /// The flow is still open.
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

/// Where a flow event came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// A connection that the iperf3 plugin's eBPF program reported.
    Iperf3,
    /// A socket that an enricher reported: never the origin of a flow.
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

    /// The name of the plugin, as in the configuration, metrics and the journal.
    pub fn as_str(self) -> &'static str {
        match self {
            Origin::NamedPipe => "namedPipe",
            Origin::Firefly => "firefly",
            Origin::Api => "api",
            Origin::Netlink => "netlink",
            Origin::Netstat => "netstat",
            Origin::Iperf3 => "iperf3",
            Origin::Socket => "socket",
        }
    }

    /// Whether its events report sockets of this host. Nothing knows better when a socket ends.
    pub fn is_socket(self) -> bool {
        matches!(
            self,
            Origin::Netlink | Origin::Netstat | Origin::Iperf3 | Origin::Socket
        )
    }

    /// How far a report from here is trusted; see FLOWS in flowd-rs(8). A report that is trusted less than the one that
    /// opened a flow does not change its tag. Anyone who can send a datagram can send a firefly.
    pub fn trust(self) -> u8 {
        match self {
            Origin::NamedPipe | Origin::Api => 3,
            Origin::Firefly => 2,
            Origin::Netlink | Origin::Netstat | Origin::Iperf3 | Origin::Socket => 1,
        }
    }

    /// The inverse of [`Origin::as_str`].
    pub fn from_word(word: &str) -> Option<Origin> {
        Origin::ALL.into_iter().find(|o| o.as_str() == word)
    }
}

/// Who sent a flow event, where the kernel tells. Lines of the named pipe have no known sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sender {
    /// The address that a datagram or a TCP connection came from.
    Address(IpAddr),
    /// The user id of the process at the other end of a Unix socket.
    User(u32),
}

/// A member of a received firefly's JSON object that is relayed unchanged: `netlink`, `skOps`, `storage-stats`
/// and whatever else a producer adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub key: Box<str>,
    /// Its value, as JSON text.
    pub json: Box<str>,
}

/// Why a flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Its producer reported the end.
    Producer,
    /// Its socket on this host closed.
    SocketClosed,
    /// It was older than `flows.maxAge`.
    Expired,
    /// It continues with another tag.
    Retagged,
    /// An operator ended it: `flowd-rs flows end`.
    Operator,
}

impl EndReason {
    /// Every reason.
    pub const ALL: [EndReason; 5] = [
        EndReason::Producer,
        EndReason::SocketClosed,
        EndReason::Expired,
        EndReason::Retagged,
        EndReason::Operator,
    ];

    /// The word in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Producer => "producer",
            EndReason::SocketClosed => "socket_closed",
            EndReason::Expired => "expired",
            EndReason::Retagged => "retagged",
            EndReason::Operator => "operator",
        }
    }
}

/// What an event did to the table of open flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: an `ongoing` event, or the end of a flow that was not open.
    #[default]
    Nothing,
    /// The flow was not open, and is now.
    Opened,
    /// The flow stays open; this was its tag before.
    Retagged(Tag),
    /// The flow was open, and has ended.
    Closed(EndReason),
    /// The flow had just ended without byte counts; the event brings them.
    Counted,
}

/// A flow's start, its end, or a report on it while it is open.
///
/// A plugin fills in what it knows. The dispatcher completes the event from the table of open flows, so that
/// every event that reaches a backend has `tag` and `start_time`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// What happened.
    pub state: State,
    /// The flow it happened to.
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
    /// Byte counts, if known.
    pub usage: Option<Usage>,
    /// Further members of a received firefly.
    pub members: Vec<Member>,
    /// What `sock_diag` reports about the flow's socket on this host.
    pub netlink: Option<Arc<Socket>>,
    /// What the sockops program reports about that socket.
    pub skops: Option<Arc<Skops>>,
    /// Where the event came from.
    pub origin: Origin,
    /// Who sent it, if known.
    pub sender: Option<Sender>,
    /// What it did to the table of open flows.
    pub effect: Effect,
}

impl FlowEvent {
    /// An event with the required fields alone.
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
            sender: None,
            effect: Effect::Nothing,
        }
    }

    /// The tag, 0/0 (untagged) where there is none.
    pub fn tag(&self) -> Tag {
        self.tag.unwrap_or_default()
    }

    /// When the flow began, or the time of this event if that is unknown.
    pub fn start_time(&self) -> Timestamp {
        self.start_time.unwrap_or(self.time)
    }
}
