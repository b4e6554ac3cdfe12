//! The kernel's statistics of sockets: decodes the answers of `sock_diag(7)`. No I/O.

mod message;
mod skops;
mod tcp_info;

pub use message::{Messages, Parsed, Progress, SocketMessage, request, request_one};
pub use skops::{SKOPS_NAMES, Skops};
pub use tcp_info::{Field, TcpInfo};

use crate::flow::{Flow, Usage};

/// States of a TCP socket, indexed by the kernel's numbers (include/net/tcp_states.h), with flowd's names.
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

/// The states after the handshake and before TIME_WAIT, as a bit mask: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT,
/// LAST_ACK and CLOSING.
pub const CONNECTED: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

/// `TCP_FIN_WAIT2`, `TCP_TIME_WAIT`
const FIN_WAIT2: u8 = 5;
const TIME_WAIT: u8 = 6;

/// The states in which the remote end's FIN has been received, as a bit mask: TIME_WAIT, CLOSE_WAIT, LAST_ACK and CLOSING.
const FIN_RECEIVED: u32 = 1 << 6 | 1 << 8 | 1 << 9 | 1 << 11;

/// A connected socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// From the local end to the remote one.
    pub flow: Flow,
    /// State and statistics.
    pub info: SocketInfo,
}

/// What `sock_diag` reports of a socket. Fields that were not requested, or that this kernel does not have, are `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketInfo {
    /// The cookie, which tells apart sockets of the same flow that follow each other; 0 if it is not known.
    pub cookie: u64,
    /// The state, as an index of [`STATES`].
    pub state: u8,
    /// Retransmissions of the last segment (`idiag_retrans`).
    pub retransmits: u8,
    /// The interface that the socket is bound to; 0 for none.
    pub interface: u32,
    /// Whether the remote end's FIN is known to have been received: `bytes_received` includes it.
    pub fin_received: bool,
    /// User id of its owner.
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
    /// Reads a name up to its first NUL.
    pub fn new(name: &[u8]) -> Algorithm {
        let mut bytes = [0; 16];
        let name = name.iter().take_while(|byte| byte.is_ascii_graphic());
        bytes
            .iter_mut()
            .zip(name)
            .for_each(|(to, from)| *to = *from);
        Algorithm(bytes)
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        let name = self.0.split(|&byte| byte == 0).next().unwrap_or_default();
        std::str::from_utf8(name).unwrap_or_default()
    }
}

/// `struct tcp_bbr_info`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bbr {
    /// Estimated bandwidth in bytes per second.
    pub bandwidth: u64,
    /// Minimum round-trip time in µs.
    pub min_rtt: u32,
    /// Pacing gain, times 256.
    pub pacing_gain: u32,
    /// Congestion window gain, times 256.
    pub cwnd_gain: u32,
}

impl SocketInfo {
    /// Payload bytes so far; retransmitted bytes count once. For a closed socket, `received` may be one too many: it is not
    /// always known whether the remote end's FIN was received.
    pub fn usage(&self) -> Option<Usage> {
        let tcp = self.tcp.as_ref().filter(|_| self.was_established())?;
        let received = tcp.get(Field::BytesReceived);
        // Before Linux 4.19 there is no `bytes_sent`: `bytes_acked` is close, and includes SYN and FIN.
        let acknowledged = || {
            tcp.get(Field::BytesAcked)
                .map(|acked| acked.saturating_sub(1))
        };
        Some(Usage {
            received: received.map(|bytes| bytes.saturating_sub(self.fin_received.into())),
            sent: self.unique_bytes_sent().or_else(acknowledged),
        })
    }

    fn unique_bytes_sent(&self) -> Option<u64> {
        let tcp = self.tcp.as_ref()?;
        let retransmitted = tcp.get(Field::BytesRetrans).unwrap_or(0);
        Some(tcp.get(Field::BytesSent)?.saturating_sub(retransmitted))
    }

    /// Whether more bytes were acknowledged than payload was sent: then a SYN or FIN of this end was acknowledged.
    pub fn has_acknowledged_more_than_payload(&self) -> bool {
        let acknowledged = self.tcp.as_ref().and_then(|tcp| tcp.get(Field::BytesAcked));
        acknowledged > self.unique_bytes_sent()
    }

    /// Whether the connection is established and this end has not finished closing it.
    pub fn is_connected(&self) -> bool {
        is_connected(self.state, self.inode)
    }

    /// Whether the connection was established, by its state or its counts. For a closed socket, at least this end's SYN
    /// was acknowledged; a socket that its owner has reset has lost its counts.
    pub fn was_established(&self) -> bool {
        let count = |tcp: &TcpInfo, field| tcp.get(field).unwrap_or(0);
        self.tcp.as_ref().is_some_and(|tcp| {
            is_in_any(self.state, CONNECTED)
                || count(tcp, Field::BytesAcked) > 0
                || count(tcp, Field::BytesReceived) > 0
                || count(tcp, Field::DataSegsOut) > 0
        })
    }
}

fn is_connected(state: u8, inode: u32) -> bool {
    is_in_any(state, CONNECTED) && !is_time_wait(state, inode)
}

/// Whether the kernel keeps only a time-wait entry of the socket: in TIME_WAIT, or in FIN_WAIT2 without an owner,
/// which only waits for the remote end's FIN.
fn is_time_wait(state: u8, inode: u32) -> bool {
    state == TIME_WAIT || (state == FIN_WAIT2 && inode == 0)
}

fn is_in_any(state: u8, states: u32) -> bool {
    1u32.checked_shl(state.into()).unwrap_or(0) & states != 0
}
