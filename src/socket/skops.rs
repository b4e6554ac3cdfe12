//! Socket statistics reported by the sockops program.

use super::Algorithm;

/// Names of [`Skops::numbers`] as in flowd-go; times are in µs.
pub const SKOPS_NAMES: [&str; 16] = [
    "srtt",
    "rttMin",
    "sndCwnd",
    "sndSsThresh",
    "mssCache",
    "rateDelivered",
    "rateInterval",
    "packetsOut",
    "retransOut",
    "totalRetrans",
    "segsIn",
    "segsOut",
    "dataSegsIn",
    "dataSegsOut",
    "lostOut",
    "sackedOut",
];

/// The fields of `struct bpf_sock_ops` of a TCP socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skops {
    /// TCP state; of a closed socket, its former state.
    pub state: u8,
    /// Payload bytes received; the remote end's FIN counts as one.
    pub bytes_received: u64,
    /// Bytes acknowledged by the remote end; SYN and FIN of this end count as one each.
    pub bytes_acked: u64,
    /// The other fields, in the order of [`SKOPS_NAMES`]. The first one holds eight times the smoothed round-trip time.
    pub numbers: [u32; 16],
    /// The congestion control algorithm.
    pub congestion: Algorithm,
}
