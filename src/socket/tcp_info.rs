//! The kernel's `struct tcp_info` (include/uapi/linux/tcp.h), which grows with kernel versions.

/// The size that this program knows, in bytes.
const MAX_LENGTH: usize = 248;

/// The bytes returned by the kernel, up to [`MAX_LENGTH`]: fields beyond them are absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    bytes: [u8; MAX_LENGTH],
    length: usize,
}

/// A field of `struct tcp_info`. Times are in µs, `last_*` in ms, rates in bytes per second, windows and
/// counts in segments or bytes as their names say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Field {
    /// `tcpi_state`
    State,
    /// `tcpi_ca_state`
    CaState,
    /// `tcpi_retransmits`
    Retransmits,
    /// `tcpi_probes`
    Probes,
    /// `tcpi_backoff`
    Backoff,
    /// `tcpi_options`
    Options,
    /// `tcpi_rto`
    Rto,
    /// `tcpi_ato`
    Ato,
    /// `tcpi_snd_mss`
    SndMss,
    /// `tcpi_rcv_mss`
    RcvMss,
    /// `tcpi_unacked`
    Unacked,
    /// `tcpi_sacked`
    Sacked,
    /// `tcpi_lost`
    Lost,
    /// `tcpi_retrans`
    Retrans,
    /// `tcpi_fackets`
    Fackets,
    /// `tcpi_last_data_sent`
    LastDataSent,
    /// `tcpi_last_ack_sent`
    LastAckSent,
    /// `tcpi_last_data_recv`
    LastDataRecv,
    /// `tcpi_last_ack_recv`
    LastAckRecv,
    /// `tcpi_pmtu`
    Pmtu,
    /// `tcpi_rcv_ssthresh`
    RcvSsthresh,
    /// `tcpi_rtt`
    Rtt,
    /// `tcpi_rttvar`
    RttVar,
    /// `tcpi_snd_ssthresh`
    SndSsthresh,
    /// `tcpi_snd_cwnd`
    SndCwnd,
    /// `tcpi_advmss`
    AdvMss,
    /// `tcpi_reordering`
    Reordering,
    /// `tcpi_rcv_rtt`
    RcvRtt,
    /// `tcpi_rcv_space`
    RcvSpace,
    /// `tcpi_total_retrans`
    TotalRetrans,
    /// `tcpi_pacing_rate`
    PacingRate,
    /// `tcpi_max_pacing_rate`
    MaxPacingRate,
    /// `tcpi_bytes_acked`
    BytesAcked,
    /// `tcpi_bytes_received`
    BytesReceived,
    /// `tcpi_segs_out`
    SegsOut,
    /// `tcpi_segs_in`
    SegsIn,
    /// `tcpi_notsent_bytes`
    NotsentBytes,
    /// `tcpi_min_rtt`
    MinRtt,
    /// `tcpi_data_segs_in`
    DataSegsIn,
    /// `tcpi_data_segs_out`
    DataSegsOut,
    /// `tcpi_delivery_rate`
    DeliveryRate,
    /// `tcpi_busy_time`
    BusyTime,
    /// `tcpi_rwnd_limited`
    RwndLimited,
    /// `tcpi_sndbuf_limited`
    SndbufLimited,
    /// `tcpi_delivered`
    Delivered,
    /// `tcpi_delivered_ce`
    DeliveredCe,
    /// `tcpi_bytes_sent`
    BytesSent,
    /// `tcpi_bytes_retrans`
    BytesRetrans,
    /// `tcpi_dsack_dups`
    DsackDups,
    /// `tcpi_reord_seen`
    ReordSeen,
    /// `tcpi_rcv_ooopack`
    RcvOoopack,
    /// `tcpi_snd_wnd`
    SndWnd,
    /// `tcpi_rcv_wnd`
    RcvWnd,
    /// `tcpi_rehash`
    Rehash,
    /// `tcpi_total_rto`
    TotalRto,
    /// `tcpi_total_rto_recoveries`
    TotalRtoRecoveries,
    /// `tcpi_total_rto_time`
    TotalRtoTime,
}

/// Names, offset and size of each field, in the order of [`Field`].
const FIELDS: [(Field, &str, &str, usize, usize); 57] = [
    (Field::State, "state", "state", 0, 1),
    (Field::CaState, "ca_state", "caState", 1, 1),
    (Field::Retransmits, "retransmits", "retransmits", 2, 1),
    (Field::Probes, "probes", "probes", 3, 1),
    (Field::Backoff, "backoff", "backoff", 4, 1),
    (Field::Options, "options", "options", 5, 1),
    (Field::Rto, "rto", "rto", 8, 4),
    (Field::Ato, "ato", "ato", 12, 4),
    (Field::SndMss, "snd_mss", "sndMss", 16, 4),
    (Field::RcvMss, "rcv_mss", "rcvMss", 20, 4),
    (Field::Unacked, "unacked", "unacked", 24, 4),
    (Field::Sacked, "sacked", "sacked", 28, 4),
    (Field::Lost, "lost", "lost", 32, 4),
    (Field::Retrans, "retrans", "retrans", 36, 4),
    (Field::Fackets, "fackets", "fackets", 40, 4),
    (Field::LastDataSent, "last_data_sent", "lastDataSent", 44, 4),
    (Field::LastAckSent, "last_ack_sent", "lastAckSent", 48, 4),
    (Field::LastDataRecv, "last_data_recv", "lastDataRecv", 52, 4),
    (Field::LastAckRecv, "last_ack_recv", "lastAckRecv", 56, 4),
    (Field::Pmtu, "pmtu", "pMtu", 60, 4),
    (Field::RcvSsthresh, "rcv_ssthresh", "rcvSsThresh", 64, 4),
    (Field::Rtt, "rtt", "rtt", 68, 4),
    (Field::RttVar, "rttvar", "rttVar", 72, 4),
    (Field::SndSsthresh, "snd_ssthresh", "sndSsThresh", 76, 4),
    (Field::SndCwnd, "snd_cwnd", "sndCwnd", 80, 4),
    (Field::AdvMss, "advmss", "advMss", 84, 4),
    (Field::Reordering, "reordering", "reordering", 88, 4),
    (Field::RcvRtt, "rcv_rtt", "rcvRtt", 92, 4),
    (Field::RcvSpace, "rcv_space", "rcvSpace", 96, 4),
    (Field::TotalRetrans, "total_retrans", "totalRetrans", 100, 4),
    (Field::PacingRate, "pacing_rate", "pacingRate", 104, 8),
    (
        Field::MaxPacingRate,
        "max_pacing_rate",
        "maxPacingRate",
        112,
        8,
    ),
    (Field::BytesAcked, "bytes_acked", "bytesAcked", 120, 8),
    (
        Field::BytesReceived,
        "bytes_received",
        "bytesReceived",
        128,
        8,
    ),
    (Field::SegsOut, "segs_out", "segsOut", 136, 4),
    (Field::SegsIn, "segs_in", "segsIn", 140, 4),
    (Field::NotsentBytes, "notsent_bytes", "notsentBytes", 144, 4),
    (Field::MinRtt, "min_rtt", "minRtt", 148, 4),
    (Field::DataSegsIn, "data_segs_in", "dataSegsIn", 152, 4),
    (Field::DataSegsOut, "data_segs_out", "dataSegsOut", 156, 4),
    (Field::DeliveryRate, "delivery_rate", "deliveryRate", 160, 8),
    (Field::BusyTime, "busy_time", "busyTime", 168, 8),
    (Field::RwndLimited, "rwnd_limited", "rwndLimited", 176, 8),
    (
        Field::SndbufLimited,
        "sndbuf_limited",
        "sndbufLimited",
        184,
        8,
    ),
    (Field::Delivered, "delivered", "delivered", 192, 4),
    (Field::DeliveredCe, "delivered_ce", "deliveredCe", 196, 4),
    (Field::BytesSent, "bytes_sent", "bytesSent", 200, 8),
    (Field::BytesRetrans, "bytes_retrans", "bytesRetrans", 208, 8),
    (Field::DsackDups, "dsack_dups", "dsackDups", 216, 4),
    (Field::ReordSeen, "reord_seen", "reordSeen", 220, 4),
    (Field::RcvOoopack, "rcv_ooopack", "rcvOoopack", 224, 4),
    (Field::SndWnd, "snd_wnd", "sndWnd", 228, 4),
    (Field::RcvWnd, "rcv_wnd", "rcvWnd", 232, 4),
    (Field::Rehash, "rehash", "rehash", 236, 4),
    (Field::TotalRto, "total_rto", "totalRto", 240, 2),
    (
        Field::TotalRtoRecoveries,
        "total_rto_recoveries",
        "totalRtoRecoveries",
        242,
        2,
    ),
    (
        Field::TotalRtoTime,
        "total_rto_time",
        "totalRtoTime",
        244,
        4,
    ),
];

impl Field {
    /// The kernel's name without `tcpi_`: snake case, as in flowd.
    pub fn name(self) -> &'static str {
        FIELDS[self as usize].1
    }

    /// The name as in flowd-go: `sndMss`, `pMtu`.
    pub fn camel_name(self) -> &'static str {
        FIELDS[self as usize].2
    }

    /// Every field, in the order of the structure.
    pub fn all() -> impl Iterator<Item = Field> {
        FIELDS.iter().map(|(field, ..)| *field)
    }
}

impl TcpInfo {
    /// Parses a structure of any length.
    pub fn parse(bytes: &[u8]) -> TcpInfo {
        let mut info = TcpInfo {
            bytes: [0; MAX_LENGTH],
            length: bytes.len().min(MAX_LENGTH),
        };
        info.bytes[..info.length].copy_from_slice(&bytes[..info.length]);
        info
    }

    /// The value of a field, if the kernel has it.
    pub fn get(&self, field: Field) -> Option<u64> {
        let (_, _, _, offset, size) = FIELDS[field as usize];
        if offset + size > self.length {
            return None;
        }
        let mut value = [0; 8];
        let end = if cfg!(target_endian = "little") {
            0
        } else {
            8 - size
        };
        value[end..end + size].copy_from_slice(&self.bytes[offset..offset + size]);
        Some(u64::from_ne_bytes(value))
    }

    /// Scale shift of the window advertised by the remote end.
    pub fn snd_wscale(&self) -> Option<u8> {
        self.bit_field(6)
            .map(|byte| match cfg!(target_endian = "little") {
                true => byte & 0xf,
                false => byte >> 4,
            })
    }

    /// Scale shift of the window advertised by this end.
    pub fn rcv_wscale(&self) -> Option<u8> {
        self.bit_field(6)
            .map(|byte| match cfg!(target_endian = "little") {
                true => byte >> 4,
                false => byte & 0xf,
            })
    }

    /// Whether the delivery rate was limited by the application instead of the network.
    pub fn delivery_rate_app_limited(&self) -> Option<bool> {
        self.bit_field(7)
            .map(|byte| match cfg!(target_endian = "little") {
                true => byte & 1 != 0,
                false => byte >> 7 != 0,
            })
    }

    fn bit_field(&self, offset: usize) -> Option<u8> {
        (offset < self.length).then(|| self.bytes[offset])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_in_order_and_do_not_overlap() {
        let mut end = 0;
        for (index, (field, name, _, offset, size)) in FIELDS.into_iter().enumerate() {
            assert_eq!(field as usize, index, "{name}");
            // Bytes 6 and 7 are bit fields.
            assert!(offset == end || (offset, end) == (8, 6), "{name}");
            end = offset + size;
        }
        assert_eq!(end, MAX_LENGTH);
    }

    #[test]
    fn structures_of_older_and_future_kernels() {
        let mut bytes: Vec<u8> = vec![0; 300];
        bytes[68..72].copy_from_slice(&1234u32.to_ne_bytes());
        bytes[6] = 0x9a;
        bytes[120..128].copy_from_slice(&77u64.to_ne_bytes());
        // Linux 2.6, 3.15, 4.18, 5.4, and a future one.
        for (length, last) in [
            (104, Field::TotalRetrans),
            (136, Field::BytesReceived),
            (192, Field::SndbufLimited),
            (232, Field::SndWnd),
            (300, Field::TotalRtoTime),
        ] {
            let info = TcpInfo::parse(&bytes[..length]);
            assert_eq!(info.get(Field::Rtt), Some(1234));
            assert_eq!((info.snd_wscale(), info.rcv_wscale()), (Some(0xa), Some(9)));
            assert_eq!(info.get(Field::BytesAcked), (length > 127).then_some(77));
            let known = Field::all().filter(|field| info.get(*field).is_some());
            assert_eq!(known.last(), Some(last), "{length}");
        }
        assert!(Field::all().all(|field| TcpInfo::parse(&[]).get(field).is_none()));
    }

    proptest! {
        #[test]
        fn fields_within_the_length_are_present(bytes in proptest::collection::vec(any::<u8>(), 0..260)) {
            let info = TcpInfo::parse(&bytes);
            for (field, _, _, offset, size) in FIELDS {
                prop_assert_eq!(info.get(field).is_some(), offset + size <= bytes.len());
            }
        }
    }
}
