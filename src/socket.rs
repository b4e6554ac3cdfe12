//! What the kernel knows of a socket: the answers of `sock_diag(7)`. No I/O.

mod message;
mod skops;
mod tcp_info;

use std::sync::Arc;

pub use message::{Messages, Parsed, request, request_one};
pub use skops::{SKOPS_NAMES, Skops};
pub use tcp_info::{Field, TcpInfo};

use crate::connections::Connection;
use crate::flow::{Flow, Usage};

/// States of a TCP socket, by the kernel's numbers (include/net/tcp_states.h); the names are those of
/// flowd.
pub const STATES: [&str; 14] = [
    "",
    "established",
    "syn-sent",
    "syn-recv",
    "fin-wait-1",
    "fin-wait-2",
    "time-wait",
    "unconnected",
    "close-wait",
    "last-ack",
    "listening",
    "closing",
    "syn-recv",
    "unconnected",
];

/// States of a connection that both ends have agreed to, as bits of their numbers: ESTABLISHED, FIN_WAIT1,
/// FIN_WAIT2, CLOSE_WAIT, LAST_ACK and CLOSING.
pub const CONNECTED: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// `TCP_FIN_WAIT2`, `TCP_TIME_WAIT`
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;

/// States in which the FIN of the other end has come: TIME_WAIT, CLOSE_WAIT, LAST_ACK and CLOSING.
const FIN_RECEIVED: u32 = 1 << 6 | 1 << 8 | 1 << 9 | 1 << 11;

/// A socket with two ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// From the local end to the remote one.
    pub flow: Flow,
    /// What else there is to know.
    pub info: SocketInfo,
}

/// What `sock_diag` tells of a socket; what was not asked for, or is not known to this kernel, is absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketInfo {
    /// The state, as an index of [`STATES`].
    pub state: u8,
    /// Retransmissions of the last segment.
    pub retransmits: u8,
    /// The interface that the socket is bound to; 0 for none.
    pub interface: u32,
    /// Whether the FIN of the other end is known to have come: `bytes_received` counts it.
    pub fin_received: bool,
    /// The user who owns it.
    pub uid: u32,
    /// Its inode in sockfs; 0 once its owner has closed it.
    pub inode: u32,
    /// The cgroup of its owner (Linux 5.9 and later).
    pub cgroup: Option<u64>,
    /// `struct tcp_info`.
    pub tcp: Option<TcpInfo>,
    /// The congestion control algorithm.
    pub congestion: Option<Algorithm>,
    /// `struct inet_diag_meminfo`, in bytes: rmem, wmem, fmem, tmem.
    pub memory: Option<[u32; 4]>,
    /// SKMEMINFO, in bytes: rmem_alloc, rcvbuf, wmem_alloc, sndbuf, fwd_alloc, wmem_queued, optmem,
    /// backlog, and the count of drops.
    pub socket_memory: Option<[u32; 9]>,
    /// Type of service (IPv4).
    pub tos: Option<u8>,
    /// Traffic class (IPv6).
    pub traffic_class: Option<u8>,
    /// Which directions are shut down: 1 receiving, 2 sending.
    pub shutdown: Option<u8>,
    /// TCP Vegas: enabled, rtt count, rtt and minimum rtt in µs.
    pub vegas: Option<[u32; 4]>,
    /// DCTCP: enabled, ce_state, alpha, ab_ecn, ab_tot.
    pub dctcp: Option<[u32; 5]>,
    /// BBR.
    pub bbr: Option<Bbr>,
}

/// The name of a congestion control algorithm, up to 16 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Algorithm([u8; 16]);

impl Algorithm {
    /// Takes a name up to its first NUL.
    pub fn new(name: &[u8]) -> Algorithm {
        let mut bytes = [0; 16];
        let name = name.iter().take_while(|byte| byte.is_ascii_graphic());
        bytes
            .iter_mut()
            .zip(name)
            .for_each(|(to, from)| *to = *from);
        Algorithm(bytes)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let name = self.0.split(|&byte| byte == 0).next().unwrap_or_default();
        std::str::from_utf8(name).unwrap_or_default()
    }
}

/// `struct tcp_bbr_info`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bbr {
    /// Estimated bandwidth in bytes a second.
    pub bandwidth: u64,
    /// Minimum round-trip time in µs.
    pub min_rtt: u32,
    /// Pacing gain, times 256.
    pub pacing_gain: u32,
    /// Gain of the congestion window, times 256.
    pub cwnd_gain: u32,
}

impl SocketInfo {
    /// Payload bytes so far; what was sent again counts once. Of a socket that has gone, the received ones
    /// may be one too many: it is not always known whether the other end's FIN had come.
    pub fn usage(&self) -> Option<Usage> {
        let tcp = self.tcp.as_ref().filter(|_| self.was_established())?;
        let received = tcp.get(Field::BytesReceived);
        // Before Linux 4.19 what was acknowledged is close; it counts SYN and FIN, too.
        let acknowledged = || {
            tcp.get(Field::BytesAcked)
                .map(|acked| acked.saturating_sub(1))
        };
        Some(Usage {
            received: received.map(|bytes| bytes.saturating_sub(self.fin_received.into())),
            sent: self.sent_once().or_else(acknowledged),
        })
    }

    fn sent_once(&self) -> Option<u64> {
        let tcp = self.tcp.as_ref()?;
        let again = tcp.get(Field::BytesRetrans).unwrap_or(0);
        Some(tcp.get(Field::BytesSent)?.saturating_sub(again))
    }

    /// Whether a SYN or a FIN of this end was acknowledged, too.
    pub fn more_was_acknowledged_than_sent(&self) -> bool {
        let acknowledged = self.tcp.as_ref().and_then(|tcp| tcp.get(Field::BytesAcked));
        acknowledged > self.sent_once()
    }

    /// Whether both ends have agreed to the connection, and this end has an owner or something left to do.
    /// What is in FIN_WAIT2 without an owner only waits for the other end's FIN: it has closed.
    pub fn is_connected(&self) -> bool {
        self.is_in(CONNECTED) && !self.only_waits()
    }

    /// Whether it is one of those that wait for a while after both ends, or this one, have closed: all else of
    /// it is forgotten.
    pub fn only_waits(&self) -> bool {
        self.state == TIME_WAIT || (self.state == FIN_WAIT2 && self.inode == 0)
    }

    fn is_in(&self, states: u32) -> bool {
        1u32.checked_shl(self.state.into()).unwrap_or(0) & states != 0
    }

    /// Whether the connection came about, as far as it has counts that say so. Of a socket that has gone, a
    /// SYN of ours, at least, was acknowledged; those that their owner has reset have lost their counts.
    pub fn was_established(&self) -> bool {
        let count = |tcp: &TcpInfo, field| tcp.get(field).unwrap_or(0);
        self.tcp.as_ref().is_some_and(|tcp| {
            self.is_in(CONNECTED)
                || count(tcp, Field::BytesAcked) > 0
                || count(tcp, Field::BytesReceived) > 0
                || count(tcp, Field::DataSegsOut) > 0
        })
    }
}

impl From<Arc<Socket>> for Connection {
    fn from(socket: Arc<Socket>) -> Connection {
        Connection {
            flow: socket.flow,
            // A socket that has gone has no owner any more.
            uid: (socket.info.inode != 0).then_some(socket.info.uid),
            cgroup: socket.info.cgroup,
            usage: socket.info.usage(),
            socket: Some(socket),
        }
    }
}
