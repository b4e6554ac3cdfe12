//! The metric families of a flow's socket: names and units as in flowd, values as shown by `ss -ti`.

use crate::metrics::exposition::Kind;
use crate::socket::{Field, Skops, Socket, SocketInfo};

/// A family with one series per flow.
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// Help text: meaning, unit and source.
    pub help: &'static str,
    /// Counter or gauge.
    pub kind: Kind,
    /// Whether a sum over flows is meaningful.
    pub adds_up: bool,
    netlink: fn(&SocketInfo) -> Option<f64>,
    skops: fn(&Skops) -> Option<f64>,
}

impl Family {
    /// The value reported by `sock_diag(7)`.
    pub fn of_socket(&self, socket: &Socket) -> Option<f64> {
        (self.netlink)(&socket.info)
    }

    /// The value reported by the sockops program.
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

/// The value, unless it is what the kernel reports before it is set.
fn unless_unset(value: Option<f64>, unset: impl Fn(f64) -> bool) -> Option<f64> {
    value.filter(|value| !unset(*value))
}

/// The send rate in bit/s: one congestion window (`mss` times `cwnd`) per `rtt` (µs).
fn send_rate(mss: f64, cwnd: f64, rtt: f64) -> Option<f64> {
    (rtt > 0.0).then(|| mss * 8.0 * cwnd * 1e6 / rtt)
}

/// A field of the sockops program, by its index in `socket::SKOPS_NAMES`.
fn skops_number(skops: &Skops, index: usize) -> Option<f64> {
    Some(f64::from(skops.numbers[index]))
}

macro_rules! families {
    ($($name:literal $kind:ident $adds_up:literal $help:literal $netlink:expr, $skops:expr;)*) => {
        [$(Family { name: concat!("flow_tcp_", $name), help: $help, kind: Kind::$kind, adds_up: $adds_up, netlink: $netlink, skops: $skops },)*]
    };
}

/// Every family with one series per flow, except `flow_tcp_ca_info`: see [`options`].
pub static FAMILIES: [Family; 60] = families! {
    "skmem_rmem_alloc" Gauge true "Receive memory in use, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 0), |_| None;
    "skmem_rcv_buf" Gauge true "Receive buffer limit, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 1), |_| None;
    "skmem_wmem_allow" Gauge true "Send memory in use, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 2), |_| None;
    "skmem_snd_buf" Gauge true "Send buffer limit, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 3), |_| None;
    "skmem_fwd_alloc" Gauge true "Memory reserved for later use, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 4), |_| None;
    "skmem_wmem_queued" Gauge true "Memory of the send queue, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 5), |_| None;
    "skmem_opt_mem" Gauge true "Memory of socket options, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 6), |_| None;
    "skmem_back_log" Gauge true "Memory of packets not processed yet, in bytes (sock_diag, SKMEMINFO)." |s| memory(s, 7), |_| None;
    "skmem_sock_drop" Gauge true "Packets dropped before they reached the socket (sock_diag, SKMEMINFO)." |s| memory(s, 8), |_| None;
    "rto" Gauge false "Retransmission timeout, in ms (tcp_info)." |s| unless_unset(ms(s, Field::Rto), |rto| rto == 3000.0), |_| None;
    "rtt" Gauge false "Smoothed round-trip time, in ms (tcp_info)." |s| unless_unset(ms(s, Field::Rtt), |rtt| rtt == 0.0), |k| skops_number(k, 0).map(|srtt| srtt / 8000.0);
    "rtt_var" Gauge false "Mean deviation of the round-trip time, in ms (tcp_info)." |s| ms(s, Field::RttVar), |_| None;
    "ato" Gauge false "Delayed acknowledgement timeout, in ms (tcp_info)." |s| ms(s, Field::Ato), |_| None;
    "mss" Gauge false "Maximum segment size for sending, in bytes (tcp_info)." |s| get(s, Field::SndMss), |k| skops_number(k, 4);
    "pmtu" Gauge false "Path MTU, in bytes (tcp_info)." |s| get(s, Field::Pmtu), |_| None;
    "rcvmss" Gauge false "Maximum segment size of received segments, in bytes (tcp_info)." |s| get(s, Field::RcvMss), |_| None;
    "advmss" Gauge false "Advertised maximum segment size, in bytes (tcp_info)." |s| get(s, Field::AdvMss), |_| None;
    "cwnd" Gauge true "Congestion window, in segments (tcp_info)." |s| get(s, Field::SndCwnd), |k| skops_number(k, 2);
    "ssthresh" Gauge false "Slow-start threshold, in segments (tcp_info)." |s| unless_unset(get(s, Field::SndSsthresh), |t| t >= 65535.0), |k| unless_unset(skops_number(k, 3), |t| t >= 65535.0);
    "bytes_sent_total" Counter true "Payload bytes sent, including retransmissions (tcp_info)." |s| get(s, Field::BytesSent), |_| None;
    "bytes_retrans_total" Counter true "Payload bytes retransmitted (tcp_info)." |s| get(s, Field::BytesRetrans), |_| None;
    "bytes_acked_total" Counter true "Bytes acknowledged by the remote end, including SYN and FIN (tcp_info)." |s| get(s, Field::BytesAcked), |k| Some(k.bytes_acked as f64);
    "bytes_received_total" Counter true "Payload bytes received (tcp_info)." |s| get(s, Field::BytesReceived), |k| Some(k.bytes_received as f64);
    "segs_out_total" Counter true "Segments sent (tcp_info)." |s| get(s, Field::SegsOut), |k| skops_number(k, 11);
    "segs_in_total" Counter true "Segments received (tcp_info)." |s| get(s, Field::SegsIn), |k| skops_number(k, 10);
    "data_segs_out_total" Counter true "Segments with payload sent (tcp_info)." |s| get(s, Field::DataSegsOut), |k| skops_number(k, 13);
    "data_segs_in_total" Counter true "Segments with payload received (tcp_info)." |s| get(s, Field::DataSegsIn), |k| skops_number(k, 12);
    "retrans_total" Counter true "Segments retransmitted (tcp_info)." |s| get(s, Field::TotalRetrans), |k| skops_number(k, 9);
    "retrans" Gauge true "Retransmitted segments not acknowledged yet (tcp_info)." |s| get(s, Field::Retrans), |k| skops_number(k, 8);
    "lost" Gauge true "Segments considered lost (tcp_info)." |s| get(s, Field::Lost), |k| skops_number(k, 14);
    "sacked" Gauge true "Segments acknowledged selectively (tcp_info)." |s| get(s, Field::Sacked), |k| skops_number(k, 15);
    "unacked" Gauge true "Segments sent but not acknowledged yet (tcp_info)." |s| get(s, Field::Unacked), |k| skops_number(k, 7);
    "notsent" Gauge true "Bytes queued but not sent yet (tcp_info)." |s| get(s, Field::NotsentBytes), |_| None;
    "reordering" Gauge false "Expected reordering, in segments (tcp_info)." |s| get(s, Field::Reordering), |_| None;
    "reord_seen" Gauge true "Reordering events seen (tcp_info)." |s| get(s, Field::ReordSeen), |_| None;
    "rcv_ooopack" Gauge true "Segments received out of order (tcp_info)." |s| get(s, Field::RcvOoopack), |_| None;
    "dsack_dups" Gauge true "Segments reported as duplicates by the remote end (tcp_info)." |s| get(s, Field::DsackDups), |_| None;
    "backoff" Gauge false "Doublings of the retransmission timeout (tcp_info)." |s| get(s, Field::Backoff), |_| None;
    "bbr_bw" Gauge true "Bandwidth estimated by BBR, in bit/s (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| bbr.bandwidth as f64 * 8.0), |_| None;
    "bbr_mrtt" Gauge false "Minimum round-trip time seen by BBR, in ms (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| f64::from(bbr.min_rtt) / 1000.0), |_| None;
    "bbr_pacing_gain" Gauge false "Pacing gain of BBR (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| f64::from(bbr.pacing_gain) / 256.0), |_| None;
    "bbr_cwnd_gain" Gauge false "Congestion window gain of BBR (sock_diag, BBRINFO)." |s| s.bbr.map(|bbr| f64::from(bbr.cwnd_gain) / 256.0), |_| None;
    "dctcp_alpha" Gauge false "Share of marked bytes estimated by DCTCP, times 1024 (sock_diag, DCTCPINFO)." |s| s.dctcp.map(|dctcp| f64::from(dctcp[2])), |_| None;
    "send" Gauge true "Send rate that congestion window and round-trip time allow, in bit/s (from tcp_info)."
        |s| send_rate(get(s, Field::SndMss)?, get(s, Field::SndCwnd)?, get(s, Field::Rtt)?),
        |k| send_rate(skops_number(k, 4)?, skops_number(k, 2)?, skops_number(k, 0)? / 8.0);
    "lastsnd" Gauge false "Time since payload was last sent, in ms (tcp_info)." |s| get(s, Field::LastDataSent), |_| None;
    "lastrcv" Gauge false "Time since payload was last received, in ms (tcp_info)." |s| get(s, Field::LastDataRecv), |_| None;
    "lastack" Gauge false "Time since an acknowledgement was last received, in ms (tcp_info)." |s| get(s, Field::LastAckRecv), |_| None;
    "pacing_rate" Gauge true "Pacing rate, in bit/s (tcp_info)." |s| unless_unset(bits(s, Field::PacingRate), |rate| rate >= 1.4e20), |_| None;
    "delivery_rate" Gauge true "Most recent delivery rate, in bit/s (tcp_info)." |s| bits(s, Field::DeliveryRate),
        |k| (k.numbers[6] > 0).then(|| f64::from(k.numbers[5]) * f64::from(k.numbers[4]) * 8e6 / f64::from(k.numbers[6]));
    "delivered" Gauge true "Segments delivered (tcp_info)." |s| get(s, Field::Delivered), |_| None;
    "delivered_ce" Gauge true "Segments delivered with the ECN congestion mark (tcp_info)." |s| get(s, Field::DeliveredCe), |_| None;
    "busy" Gauge true "Time with payload unsent or unacknowledged, in ms (tcp_info)." |s| ms(s, Field::BusyTime), |_| None;
    "rwnd_limited" Gauge true "Part of the busy time limited by the remote end's receive window, in ms (tcp_info)." |s| ms(s, Field::RwndLimited), |_| None;
    "sndbuf_limited" Gauge true "Part of the busy time limited by the send buffer, in ms (tcp_info)." |s| ms(s, Field::SndbufLimited), |_| None;
    "rcv_rtt" Gauge false "Round-trip time estimated by the receiver, in ms (tcp_info)." |s| unless_unset(ms(s, Field::RcvRtt), |rtt| rtt == 0.0), |_| None;
    "rcv_space" Gauge true "Receive buffer space that the application's reads require, in bytes (tcp_info)." |s| get(s, Field::RcvSpace), |_| None;
    "rcv_ssthresh" Gauge true "Current limit of the advertised window, in bytes (tcp_info)." |s| get(s, Field::RcvSsthresh), |_| None;
    "minrtt" Gauge false "Minimum round-trip time, in ms (tcp_info)." |s| unless_unset(ms(s, Field::MinRtt), |rtt| rtt >= 4_294_967.0), |k| unless_unset(skops_number(k, 1), |rtt| rtt >= 4_294_967_295.0).map(|rtt| rtt / 1000.0);
    "snd_wnd" Gauge true "Window advertised by the remote end, in bytes (tcp_info)." |s| get(s, Field::SndWnd), |_| None;
    "rcv_wnd" Gauge true "Window advertised by this host, in bytes (tcp_info)." |s| get(s, Field::RcvWnd), |_| None;
};

/// The number of counters in [`FAMILIES`].
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

/// The counters in [`FAMILIES`], in the same order.
pub fn counters() -> impl Iterator<Item = &'static Family> {
    FAMILIES
        .iter()
        .filter(|family| family.kind == Kind::Counter)
}

/// The label `opts` of `flow_tcp_ca_info`: TCP options and congestion control, as spelled by `ss -ti`.
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
    let words = words.iter().filter(|(is_set, _)| *is_set);
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
    fn only_counters_end_in_total_and_names_are_distinct() {
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
    fn skops_numbers_have_the_indices_of_their_names() {
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
