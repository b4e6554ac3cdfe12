//! The families of a flow's socket: names and units as flowd's, values as `ss -ti` shows them.

use crate::exposition::Kind;
use crate::socket::{Field, Skops, Socket, SocketInfo};

/// A family with one series a flow.
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What it is, its unit and where it comes from.
    pub help: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// Whether the values of flows may be added up.
    pub adds_up: bool,
    netlink: fn(&SocketInfo) -> Option<f64>,
    skops: fn(&Skops) -> Option<f64>,
}

impl Family {
    /// The value by `sock_diag(7)`.
    pub fn of_socket(&self, socket: &Socket) -> Option<f64> {
        (self.netlink)(&socket.info)
    }

    /// The value by the sockops program.
    pub fn of_skops(&self, skops: &Skops) -> Option<f64> {
        (self.skops)(skops)
    }
}

fn get(info: &SocketInfo, field: Field) -> Option<f64> {
    info.tcp.as_ref()?.get(field).map(|value| value as f64)
}

/// µs to ms.
fn ms(info: &SocketInfo, field: Field) -> Option<f64> {
    get(info, field).map(|micros| micros / 1000.0)
}

/// bytes/s to bit/s.
fn bits(info: &SocketInfo, field: Field) -> Option<f64> {
    get(info, field).map(|bytes| bytes * 8.0)
}

fn memory(info: &SocketInfo, index: usize) -> Option<f64> {
    info.socket_memory.map(|memory| f64::from(memory[index]))
}

/// The kernel's "not set".
fn set(value: Option<f64>, unset: impl Fn(f64) -> bool) -> Option<f64> {
    value.filter(|value| !unset(*value))
}

/// What `mss`, `cwnd` and `rtt` (µs) give, in bit/s.
fn send(mss: f64, cwnd: f64, rtt: f64) -> Option<f64> {
    (rtt > 0.0).then(|| mss * 8.0 * cwnd * 1e6 / rtt)
}

/// By the position in `socket::SKOPS_NAMES`.
fn seen(skops: &Skops, index: usize) -> Option<f64> {
    Some(f64::from(skops.numbers[index]))
}

macro_rules! families {
    ($($name:literal $kind:ident $adds_up:literal $help:literal $netlink:expr, $skops:expr;)*) => {
        [$(Family { name: concat!("flow_tcp_", $name), help: $help, kind: Kind::$kind, adds_up: $adds_up, netlink: $netlink, skops: $skops },)*]
    };
}

/// Every family with one series a flow; `flow_tcp_ca_info` is [`options`].
pub static FAMILIES: [Family; 60] = families! {
    "skmem_rmem_alloc" Gauge true "Receive memory in use, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 0), |_| None;
    "skmem_rcv_buf" Gauge true "Receive memory at most, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 1), |_| None;
    "skmem_wmem_allow" Gauge true "Send memory in use, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 2), |_| None;
    "skmem_snd_buf" Gauge true "Send memory at most, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 3), |_| None;
    "skmem_fwd_alloc" Gauge true "Memory kept for later use, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 4), |_| None;
    "skmem_wmem_queued" Gauge true "Send memory of what is queued, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 5), |_| None;
    "skmem_opt_mem" Gauge true "Memory of socket options, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 6), |_| None;
    "skmem_back_log" Gauge true "Packets not processed yet, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 7), |_| None;
    "skmem_sock_drop" Gauge true "Packets dropped before they reached the socket (sock_diag, SKMEMINFO)." |s| memory(s, 8), |_| None;
    "rto" Gauge false "Retransmission time-out, in ms (tcp_info)." |s| set(ms(s, Field::Rto), |rto| rto == 3000.0), |_| None;
    "rtt" Gauge false "Smoothed round-trip time, in ms (tcp_info)." |s| set(ms(s, Field::Rtt), |rtt| rtt == 0.0), |k| seen(k, 0).map(|srtt| srtt / 8000.0);
    "rtt_var" Gauge false "Mean deviation of the round-trip time, in ms (tcp_info)." |s| ms(s, Field::RttVar), |_| None;
    "ato" Gauge false "Time-out of delayed acknowledgements, in ms (tcp_info)." |s| ms(s, Field::Ato), |_| None;
    "mss" Gauge false "Maximum segment size for sending, in bytes (tcp_info)." |s| get(s, Field::SndMss), |k| seen(k, 4);
    "pmtu" Gauge false "Path MTU, in bytes (tcp_info)." |s| get(s, Field::Pmtu), |_| None;
    "rcvmss" Gauge false "Maximum segment size seen in what was received, in bytes (tcp_info)." |s| get(s, Field::RcvMss), |_| None;
    "advmss" Gauge false "Maximum segment size advertised, in bytes (tcp_info)." |s| get(s, Field::AdvMss), |_| None;
    "cwnd" Gauge true "Congestion window, in segments (tcp_info)." |s| get(s, Field::SndCwnd), |k| seen(k, 2);
    "ssthresh" Gauge false "Slow-start threshold, in segments (tcp_info)." |s| set(get(s, Field::SndSsthresh), |t| t >= 65535.0), |k| set(seen(k, 3), |t| t >= 65535.0);
    "bytes_sent_total" Counter true "Payload bytes sent, with those sent again (tcp_info)." |s| get(s, Field::BytesSent), |_| None;
    "bytes_retrans_total" Counter true "Payload bytes sent again (tcp_info)." |s| get(s, Field::BytesRetrans), |_| None;
    "bytes_acked_total" Counter true "Bytes that the other end has acknowledged, SYN and FIN counted (tcp_info)." |s| get(s, Field::BytesAcked), |k| Some(k.bytes_acked as f64);
    "bytes_received_total" Counter true "Payload bytes received (tcp_info)." |s| get(s, Field::BytesReceived), |k| Some(k.bytes_received as f64);
    "segs_out_total" Counter true "Segments sent (tcp_info)." |s| get(s, Field::SegsOut), |k| seen(k, 11);
    "segs_in_total" Counter true "Segments received (tcp_info)." |s| get(s, Field::SegsIn), |k| seen(k, 10);
    "data_segs_out_total" Counter true "Segments with payload sent (tcp_info)." |s| get(s, Field::DataSegsOut), |k| seen(k, 13);
    "data_segs_in_total" Counter true "Segments with payload received (tcp_info)." |s| get(s, Field::DataSegsIn), |k| seen(k, 12);
    "retrans_total" Counter true "Segments sent again (tcp_info)." |s| get(s, Field::TotalRetrans), |k| seen(k, 9);
    "retrans" Gauge true "Segments sent again and not acknowledged yet (tcp_info)." |s| get(s, Field::Retrans), |k| seen(k, 8);
    "lost" Gauge true "Segments held for lost (tcp_info)." |s| get(s, Field::Lost), |k| seen(k, 14);
    "sacked" Gauge true "Segments acknowledged selectively (tcp_info)." |s| get(s, Field::Sacked), |k| seen(k, 15);
    "unacked" Gauge true "Segments sent and not acknowledged yet (tcp_info)." |s| get(s, Field::Unacked), |k| seen(k, 7);
    "notsent" Gauge true "Bytes queued and not sent yet (tcp_info)." |s| get(s, Field::NotsentBytes), |_| None;
    "reordering" Gauge false "Reordering that is expected, in segments (tcp_info)." |s| get(s, Field::Reordering), |_| None;
    "reord_seen" Gauge true "Times that reordering was seen (tcp_info)." |s| get(s, Field::ReordSeen), |_| None;
    "rcv_ooopack" Gauge true "Segments received out of order (tcp_info)." |s| get(s, Field::RcvOoopack), |_| None;
    "dsack_dups" Gauge true "Segments that the other end reported as duplicates (tcp_info)." |s| get(s, Field::DsackDups), |_| None;
    "backoff" Gauge false "Doublings of the retransmission time-out (tcp_info)." |s| get(s, Field::Backoff), |_| None;
    "bbr_bw" Gauge true "Bandwidth as BBR estimates it, in bit/s (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| bbr.bandwidth as f64 * 8.0), |_| None;
    "bbr_mrtt" Gauge false "Minimum round-trip time of BBR, in ms (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| f64::from(bbr.min_rtt) / 1000.0), |_| None;
    "bbr_pacing_gain" Gauge false "Pacing gain of BBR (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| f64::from(bbr.pacing_gain) / 256.0), |_| None;
    "bbr_cwnd_gain" Gauge false "Gain of the congestion window of BBR (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| f64::from(bbr.cwnd_gain) / 256.0), |_| None;
    "dctcp_alpha" Gauge false "Share of marked bytes as DCTCP estimates it, times 1024 (sock_diag, DCTCPINFO)." |s| s.dctcp.map(|dctcp| f64::from(dctcp[2])), |_| None;
    "send" Gauge true "What congestion window and round-trip time let through, in bit/s (from tcp_info)."
        |s| send(get(s, Field::SndMss)?, get(s, Field::SndCwnd)?, get(s, Field::Rtt)?),
        |k| send(seen(k, 4)?, seen(k, 2)?, seen(k, 0)? / 8.0);
    "lastsnd" Gauge false "Time since payload was last sent, in ms (tcp_info)." |s| get(s, Field::LastDataSent), |_| None;
    "lastrcv" Gauge false "Time since payload was last received, in ms (tcp_info)." |s| get(s, Field::LastDataRecv), |_| None;
    "lastack" Gauge false "Time since an acknowledgement was last received, in ms (tcp_info)." |s| get(s, Field::LastAckRecv), |_| None;
    "pacing_rate" Gauge true "Pacing rate, in bit/s (tcp_info)." |s| set(bits(s, Field::PacingRate), |rate| rate >= 1.4e20), |_| None;
    "delivery_rate" Gauge true "Rate of what was last acknowledged, in bit/s (tcp_info)." |s| bits(s, Field::DeliveryRate),
        |k| (k.numbers[6] > 0).then(|| f64::from(k.numbers[5]) * f64::from(k.numbers[4]) * 8e6 / f64::from(k.numbers[6]));
    "delivered" Gauge true "Segments delivered (tcp_info)." |s| get(s, Field::Delivered), |_| None;
    "delivered_ce" Gauge true "Segments delivered with the mark of congestion, ECN (tcp_info)." |s| get(s, Field::DeliveredCe), |_| None;
    "busy" Gauge true "Time with payload to send or to be acknowledged, in ms (tcp_info)." |s| ms(s, Field::BusyTime), |_| None;
    "rwnd_limited" Gauge true "Time of it in which the other end's window was full, in ms (tcp_info)." |s| ms(s, Field::RwndLimited), |_| None;
    "sndbuf_limited" Gauge true "Time of it in which the send buffer was too small, in ms (tcp_info)." |s| ms(s, Field::SndbufLimited), |_| None;
    "rcv_rtt" Gauge false "Round-trip time as the receiver estimates it, in ms (tcp_info)." |s| set(ms(s, Field::RcvRtt), |rtt| rtt == 0.0), |_| None;
    "rcv_space" Gauge true "Receive buffer that the application's reading asks for, in bytes (tcp_info)." |s| get(s, Field::RcvSpace), |_| None;
    "rcv_ssthresh" Gauge true "Threshold of the window that is advertised, in bytes (tcp_info)." |s| get(s, Field::RcvSsthresh), |_| None;
    "minrtt" Gauge false "Minimum round-trip time, in ms (tcp_info)." |s| set(ms(s, Field::MinRtt), |rtt| rtt >= 4_294_967.0), |k| set(seen(k, 1), |rtt| rtt >= 4_294_967_295.0).map(|rtt| rtt / 1000.0);
    "snd_wnd" Gauge true "Window that the other end advertises, in bytes (tcp_info)." |s| get(s, Field::SndWnd), |_| None;
    "rcv_wnd" Gauge true "Window that this end advertises, in bytes (tcp_info)." |s| get(s, Field::RcvWnd), |_| None;
};

/// How many of [`FAMILIES`] are counters.
pub const COUNTERS: usize = {
    let (mut index, mut counters) = (0, 0);
    while index < FAMILIES.len() {
        if matches!(FAMILIES[index].kind, Kind::Counter) {
            counters += 1;
        }
        index += 1;
    }
    counters
};

/// The counters among [`FAMILIES`], in their order.
pub fn counters() -> impl Iterator<Item = &'static Family> {
    FAMILIES
        .iter()
        .filter(|family| family.kind == Kind::Counter)
}

/// `opts` of `flow_tcp_ca_info`: options and congestion control, as `ss -ti` spells them.
pub fn options(info: &SocketInfo) -> Option<String> {
    let tcp = info.tcp.as_ref()?;
    let options = tcp.get(Field::Options)?;
    let congestion = info.congestion.as_ref().map(|c| c.as_str());
    let words = [
        (options & 1 != 0, "ts"),
        (options & 2 != 0, "sack"),
        (options & 8 != 0, "ecn"),
        (options & 16 != 0, "ecnseen"),
        (options & 32 != 0, "fastopen"),
        (congestion.is_some(), congestion.unwrap_or_default()),
    ];
    let words = words.iter().filter(|(there, _)| *there);
    let mut words: Vec<String> = words.map(|(_, word)| (*word).to_owned()).collect();
    if options & 4 != 0 {
        let shift = |shift: Option<u8>| shift.unwrap_or(0);
        words.push(format!(
            "wscale:{},{}",
            shift(tcp.snd_wscale()),
            shift(tcp.rcv_wscale())
        ));
    }
    Some(words.join(" "))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn counters_and_nothing_else_end_in_total_and_names_are_distinct() {
        let mut names = HashSet::new();
        for family in &FAMILIES {
            assert_eq!(
                family.kind == Kind::Counter,
                family.name.ends_with("_total"),
                "{}",
                family.name
            );
            assert!(names.insert(family.name), "{}", family.name);
        }
        assert_eq!(counters().count(), COUNTERS);
    }

    #[test]
    fn skops_numbers_are_where_their_names_are() {
        for (name, index, field) in [
            ("srtt", 0, "rtt"),
            ("rttMin", 1, "minrtt"),
            ("sndCwnd", 2, "cwnd"),
            ("sndSsThresh", 3, "ssthresh"),
            ("mssCache", 4, "mss"),
            ("packetsOut", 7, "unacked"),
            ("retransOut", 8, "retrans"),
            ("totalRetrans", 9, "retrans_total"),
            ("segsIn", 10, "segs_in_total"),
            ("segsOut", 11, "segs_out_total"),
            ("dataSegsIn", 12, "data_segs_in_total"),
            ("dataSegsOut", 13, "data_segs_out_total"),
            ("lostOut", 14, "lost"),
            ("sackedOut", 15, "sacked"),
        ] {
            assert_eq!(crate::socket::SKOPS_NAMES[index], name);
            let mut skops = Skops::default();
            skops.numbers[index] = 8000;
            let family = FAMILIES
                .iter()
                .find(|f| f.name.strip_prefix("flow_tcp_") == Some(field))
                .unwrap();
            let expected = match field {
                "rtt" => 1.0,
                "minrtt" => 8.0,
                _ => 8000.0,
            };
            assert_eq!(family.of_skops(&skops), Some(expected), "{name}");
        }
    }
}
