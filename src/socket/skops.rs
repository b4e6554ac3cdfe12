//! What the sockops program sees of a socket.

use super::Algorithm;

/// Names of [`Skops::numbers`] as flowd-go writes such fields; times are in µs.
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

/// What `struct bpf_sock_ops` has of a TCP socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skops {
    /// TCP state; of a socket that was closed, the one before.
    pub state: u8,
    /// Payload bytes received; the other end's FIN counts as one.
    pub bytes_received: u64,
    /// Bytes that the other end has acknowledged; SYN and FIN of this end count as one each.
    pub bytes_acked: u64,
    /// The other fields, in the order of [`SKOPS_NAMES`]; the first, the smoothed round-trip time, is
    /// eight times its value.
    pub numbers: [u32; 16],
    /// The congestion control algorithm.
    pub congestion: Algorithm,
}
