//! The `netlink` object of a firefly: socket statistics of the kernel, in the formats of flowd and flowd-go. No I/O.

use std::fmt::{Display, Write as _};

use crate::socket::{Field, SKOPS_NAMES, STATES, Skops, Socket, SocketInfo, TcpInfo};

/// The format of the object: `enrichmentMode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// flowd-go's `lean`: a few fields of `tcpInfo`, and `cong`.
    Lean,
    /// flowd-go's `compatible`: one flat object in snake case, times in ms.
    Compatible,
    /// flowd's: the same below `tcp_info`, next to the addresses and attributes of the socket.
    Flowd,
    /// flowd-go's empty mode: everything.
    Full,
}

impl Mode {
    /// Every mode, in the order of the documentation.
    pub const ALL: [Mode; 4] = [Mode::Lean, Mode::Compatible, Mode::Flowd, Mode::Full];

    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Lean => "lean",
            Mode::Compatible => "compatible",
            Mode::Flowd => "flowd",
            Mode::Full => "",
        }
    }
}

/// The fields of `lean`, in flowd-go's order.
const LEAN_FIELDS: [Field; 11] = [
    Field::Retransmits,
    Field::SndMss,
    Field::Pmtu,
    Field::Rtt,
    Field::RttVar,
    Field::SndSsthresh,
    Field::SndCwnd,
    Field::AdvMss,
    Field::MinRtt,
    Field::DeliveryRate,
    Field::BytesSent,
];

/// The fields of `struct tcp_info` that flowd writes, most useful first.
const FLOWD_FIELDS: [Field; 42] = [
    Field::Rtt,
    Field::RttVar,
    Field::MinRtt,
    Field::SndCwnd,
    Field::SndMss,
    Field::TotalRetrans,
    Field::Retrans,
    Field::Lost,
    Field::DeliveryRate,
    Field::PacingRate,
    Field::BytesAcked,
    Field::BytesReceived,
    Field::SndSsthresh,
    Field::Pmtu,
    Field::SegsOut,
    Field::SegsIn,
    Field::DataSegsOut,
    Field::DataSegsIn,
    Field::BusyTime,
    Field::RwndLimited,
    Field::SndbufLimited,
    Field::Rto,
    Field::RcvRtt,
    Field::RcvSpace,
    Field::RcvSsthresh,
    Field::RcvMss,
    Field::AdvMss,
    Field::NotsentBytes,
    Field::Unacked,
    Field::Sacked,
    Field::Reordering,
    Field::Retransmits,
    Field::CaState,
    Field::MaxPacingRate,
    Field::LastDataSent,
    Field::LastDataRecv,
    Field::LastAckRecv,
    Field::LastAckSent,
    Field::Ato,
    Field::Backoff,
    Field::Probes,
    Field::Fackets,
];

/// Appends the object, in at most `room` bytes, and returns how many fields did not fit.
/// Fields are added in the order of [`FLOWD_FIELDS`] (`compatible`, `flowd`), or in that of flowd-go.
pub fn put(mode: Mode, socket: &Socket, room: usize, out: &mut String) -> usize {
    let end = out.len().saturating_add(room);
    let mut object = Object::begin(out, end);
    let info = &socket.info;
    match mode {
        Mode::Lean => {
            if let Some(tcp) = info.tcp.as_ref() {
                object.section("tcpInfo", |object| {
                    go_fields(object, tcp, LEAN_FIELDS.into_iter())
                });
            }
            congestion(&mut object, info);
        }
        Mode::Compatible => {
            object.text("state", state(info.state));
            if let Some(tcp) = info.tcp.as_ref() {
                flowd_fields(&mut object, tcp);
            }
        }
        Mode::Flowd => flowd(&mut object, socket),
        Mode::Full => full(&mut object, info),
    }
    object.end()
}

/// Appends flowd-go's `skOps` object, as [`put`] does.
pub fn put_skops(skops: &Skops, room: usize, out: &mut String) -> usize {
    let end = out.len().saturating_add(room);
    let mut object = Object::begin(out, end);
    let numbers = SKOPS_NAMES.iter().zip(skops.numbers);
    for (index, (name, number)) in numbers.enumerate() {
        // The kernel stores eight times the smoothed round-trip time.
        object.field(name, if index == 0 { number >> 3 } else { number });
    }
    object.field("bytesReceived", skops.bytes_received);
    object.field("bytesAcked", skops.bytes_acked);
    object.text("state", state(skops.state));
    object.text("congestion", skops.congestion.as_str());
    object.end()
}

fn state(state: u8) -> &'static str {
    STATES.get(usize::from(state)).copied().unwrap_or("")
}

fn go_fields(object: &mut Object<'_>, tcp: &TcpInfo, fields: impl Iterator<Item = Field>) {
    for field in fields {
        if let Some(value) = tcp.get(field) {
            object.field(field.camel_name(), value);
        }
    }
}

fn congestion(object: &mut Object<'_>, info: &SocketInfo) {
    if let Some(algorithm) = &info.congestion {
        object.section("cong", |object| {
            object.text("algorithm", algorithm.as_str())
        });
    }
}

/// Times are fractional ms, except `min_rtt`; initial values of the kernel become null.
fn flowd_fields(object: &mut Object<'_>, tcp: &TcpInfo) {
    for field in FLOWD_FIELDS {
        let Some(value) = tcp.get(field) else {
            continue;
        };
        let name = field.name();
        match field {
            Field::Rto if value == 3_000_000 => object.field(name, "null"),
            Field::SndSsthresh if value >= 65535 => object.field(name, "null"),
            Field::Rtt | Field::RttVar | Field::Rto | Field::Ato | Field::RcvRtt => {
                object.field(name, format_args!("{:?}", value as f64 / 1000.0));
            }
            _ => object.field(name, value),
        }
    }
    let options = tcp.get(Field::Options).unwrap_or(0);
    let names = [(1, "\"ts\""), (2, "\"sack\""), (8, "\"ecn\"")];
    let set = names.iter().filter(|(bit, _)| options & bit != 0);
    let set: Vec<&str> = set.map(|(_, name)| *name).collect();
    object.field("opts", format_args!("[{}]", set.join(",")));
    object.optional("snd_wscale", tcp.snd_wscale());
    object.optional("rcv_wscale", tcp.rcv_wscale());
    let limited = tcp.delivery_rate_app_limited();
    object.optional("delivery_rate_app_limited", limited.map(u8::from));
}

fn flowd(object: &mut Object<'_>, socket: &Socket) {
    let (flow, info) = (&socket.flow, &socket.info);
    object.field("src", format_args!("\"{}\"", flow.source.address));
    object.field("dst", format_args!("\"{}\"", flow.destination.address));
    object.field("src_port", flow.source.port);
    object.field("dst_port", flow.destination.port);
    object.field("inode", info.inode);
    object.field("iface_idx", info.interface);
    object.field("retrans", info.retransmits);
    if let Some(algorithm) = &info.congestion {
        object.text("cong_algo", algorithm.as_str());
    }
    if let Some([r, w, f, t]) = info.memory {
        object.section("meminfo", |object| {
            for (name, bytes) in [("r", r), ("w", w), ("f", f), ("t", t)] {
                object.field(name, bytes);
            }
        });
    }
    if let Some(tcp) = info.tcp.as_ref() {
        object.section("tcp_info", |object| {
            object.text("state", state(info.state));
            flowd_fields(object, tcp);
        });
    }
}

fn full(object: &mut Object<'_>, info: &SocketInfo) {
    if let Some(tcp) = info.tcp.as_ref() {
        object.section("tcpInfo", |object| {
            go_fields(object, tcp, Field::all());
            object.optional("sndWScale", tcp.snd_wscale());
            object.optional("rcvWScale", tcp.rcv_wscale());
            let limited = tcp.delivery_rate_app_limited();
            object.optional("deliveryRateAppLimited", limited.map(u8::from));
        });
    }
    congestion(object, info);
    if let Some(bbr) = info.bbr {
        object.section("bbr", |object| {
            object.field("bw", bbr.bandwidth);
            object.field("minRtt", bbr.min_rtt);
            object.field("pacingGain", bbr.pacing_gain);
            object.field("cwndGain", bbr.cwnd_gain);
        });
    }
    if info.tos.is_some() || info.traffic_class.is_some() {
        object.section("tos", |object| {
            object.optional("tos", info.tos);
            object.optional("tClass", info.traffic_class);
        });
    }
    let names = ["rMem", "wMem", "fMem", "tMem"];
    words(object, "memInfo", &names, info.memory.as_ref());
    let names = [
        "rMemAlloc",
        "rcvBuf",
        "wMemAlloc",
        "sndBuf",
        "fwdAlloc",
        "wMemQueued",
        "optMem",
        "backlog",
        "drops",
    ];
    words(object, "skMemInfo", &names, info.socket_memory.as_ref());
    let names = ["enabled", "rttCnt", "rtt", "minRtt"];
    words(object, "vegasInfo", &names, info.vegas.as_ref());
    let names = ["enabled", "ceState", "alpha", "abEcn", "abTot"];
    words(object, "dctcpInfo", &names, info.dctcp.as_ref());
    object.optional("shutdown", info.shutdown);
}

fn words<const N: usize>(
    object: &mut Object<'_>,
    section: &str,
    names: &[&str; N],
    values: Option<&[u32; N]>,
) {
    if let Some(values) = values {
        object.section(section, |object| {
            for (name, value) in names.iter().zip(values) {
                object.field(name, value);
            }
        });
    }
}

/// Writes members as long as they and the closing braces fit.
struct Object<'a> {
    out: &'a mut String,
    end: usize,
    /// Number of open braces.
    depth: usize,
    first: bool,
    left_out: usize,
}

impl<'a> Object<'a> {
    fn begin(out: &'a mut String, end: usize) -> Object<'a> {
        out.push('{');
        Object {
            out,
            end,
            depth: 1,
            first: true,
            left_out: 0,
        }
    }

    fn end(self) -> usize {
        self.out.push('}');
        self.left_out
    }

    /// `value` is JSON.
    fn field(&mut self, name: &str, value: impl Display) {
        let before = self.out.len();
        let comma = if self.first { "" } else { "," };
        // Writing to a String cannot fail, here and below.
        let _ = write!(self.out, "{comma}\"{name}\":{value}");
        if self.out.len() + self.depth > self.end {
            self.out.truncate(before);
            self.left_out += 1;
        } else {
            self.first = false;
        }
    }

    /// Drops characters that would need escaping: the kernel or this program wrote `text`.
    fn text(&mut self, name: &str, text: &str) {
        let plain = text
            .chars()
            .filter(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\'));
        self.field(name, format_args!("\"{}\"", plain.collect::<String>()));
    }

    fn optional(&mut self, name: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.field(name, value);
        }
    }

    /// A section without a fitting field is left out.
    fn section(&mut self, name: &str, fill: impl FnOnce(&mut Object<'_>)) {
        let (before, first) = (self.out.len(), self.first);
        let comma = if first { "" } else { "," };
        let _ = write!(self.out, "{comma}\"{name}\":{{");
        self.depth += 1;
        self.first = true;
        fill(self);
        self.depth -= 1;
        if self.first || self.out.len() + 1 + self.depth > self.end {
            self.out.truncate(before);
            self.first = first;
        } else {
            self.out.push('}');
            self.first = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Flow, Protocol};
    use crate::socket::{Algorithm, Bbr};
    use serde_json::{Value, json};

    /// Every byte of `tcp_info` is set, and a few to known values.
    fn socket() -> Socket {
        let mut tcp = [1u8; 248];
        tcp[5] = 0b1111;
        tcp[6] = 0x9a;
        tcp[7] = 1;
        for (at, value) in [
            (8, 204_000u32),
            (16, 1448),
            (60, 1500),
            (68, 250),
            (72, 75),
            (76, 0x7fff_ffff),
            (80, 10),
            (148, 17),
        ] {
            tcp[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let ends = (([42, 0, 0, 1].into(), 443), ([42, 0, 0, 2].into(), 5000));
        Socket {
            flow: Flow::new(Protocol::Tcp, ends.0, ends.1).unwrap(),
            info: SocketInfo {
                state: 1,
                inode: 77,
                tcp: Some(TcpInfo::parse(&tcp)),
                congestion: Some(Algorithm::new(b"bbr")),
                memory: Some([1, 2, 3, 4]),
                socket_memory: Some([5; 9]),
                bbr: Some(Bbr {
                    bandwidth: 1 << 33,
                    min_rtt: 9,
                    pacing_gain: 256,
                    cwnd_gain: 512,
                }),
                vegas: Some([6; 4]),
                dctcp: Some([7; 5]),
                tos: Some(8),
                shutdown: Some(0),
                ..SocketInfo::default()
            },
        }
    }

    fn object(mode: Mode, room: usize) -> (Value, usize, usize) {
        let mut out = String::new();
        let left_out = put(mode, &socket(), room, &mut out);
        (serde_json::from_str(&out).unwrap(), out.len(), left_out)
    }

    #[test]
    fn lean_has_the_fields_of_flowd_go() {
        let (lean, _, left_out) = object(Mode::Lean, usize::MAX);
        assert_eq!(left_out, 0);
        assert_eq!(
            lean,
            json!({
                "tcpInfo": {
                    "retransmits": 1, "sndMss": 1448, "pMtu": 1500, "rtt": 250, "rttVar": 75, "sndSsThresh": 0x7fff_ffff, "sndCwnd": 10,
                    "advMss": 0x0101_0101, "minRtt": 17, "deliveryRate": 0x0101_0101_0101_0101u64, "bytesSent": 0x0101_0101_0101_0101u64,
                },
                "cong": {"algorithm": "bbr"},
            })
        );
    }

    #[test]
    fn compatible_has_every_key_in_its_unit() {
        let (flat, ..) = object(Mode::Compatible, usize::MAX);
        const KEYS: &str = "state pmtu retrans ato rto snd_wscale rcv_wscale snd_mss snd_cwnd snd_ssthresh rtt rttvar rcv_rtt rcv_space \
            opts last_data_sent rcv_ssthresh segs_in segs_out data_segs_in data_segs_out lost notsent_bytes rcv_mss pacing_rate retransmits \
            min_rtt rwnd_limited max_pacing_rate probes reordering last_data_recv bytes_received fackets last_ack_recv unacked sacked \
            bytes_acked delivery_rate_app_limited delivery_rate sndbuf_limited ca_state busy_time total_retrans advmss backoff last_ack_sent";
        let mut expected: Vec<&str> = KEYS.split_whitespace().collect();
        expected.sort_unstable();
        let found: Vec<&String> = flat.as_object().unwrap().keys().collect();
        assert_eq!(found, expected);
        for (key, value) in [
            ("state", json!("established")),
            ("rtt", json!(0.25)),
            ("rttvar", json!(0.075)),
            ("rto", json!(204.0)),
            ("min_rtt", json!(17)),
            ("snd_ssthresh", json!(null)),
            ("opts", json!(["ts", "sack", "ecn"])),
            ("snd_wscale", json!(10)),
            ("rcv_wscale", json!(9)),
            ("delivery_rate_app_limited", json!(1)),
        ] {
            assert_eq!(flat[key], value, "{key}");
        }
    }

    #[test]
    fn flowds_format_has_the_socket_attributes() {
        let (flowd, ..) = object(Mode::Flowd, usize::MAX);
        assert_eq!(
            (&flowd["src"], &flowd["dst_port"], &flowd["inode"]),
            (&json!("42.0.0.1"), &json!(5000), &json!(77))
        );
        assert_eq!(flowd["meminfo"], json!({"r": 1, "w": 2, "f": 3, "t": 4}));
        assert_eq!(
            (&flowd["cong_algo"], &flowd["tcp_info"]["rtt"]),
            (&json!("bbr"), &json!(0.25))
        );
    }

    #[test]
    fn full_has_everything() {
        let (full, ..) = object(Mode::Full, usize::MAX);
        let sections: Vec<&String> = full.as_object().unwrap().keys().collect();
        assert_eq!(
            sections,
            [
                "bbr",
                "cong",
                "dctcpInfo",
                "memInfo",
                "shutdown",
                "skMemInfo",
                "tcpInfo",
                "tos",
                "vegasInfo"
            ]
        );
        assert_eq!(
            full["tcpInfo"].as_object().unwrap().len(),
            Field::all().count() + 3
        );
        assert_eq!(full["bbr"]["bw"], 1u64 << 33);
    }

    #[test]
    fn the_object_is_valid_json_and_fits_in_any_room() {
        for mode in Mode::ALL {
            let (_, whole, _) = object(mode, usize::MAX);
            assert_eq!(object(mode, whole).2, 0);
            for room in 2..whole {
                let (value, length, _) = object(mode, room);
                assert!(length <= room && value.is_object());
            }
        }
        let (cut, ..) = object(Mode::Compatible, 100);
        assert!(cut["rtt"] == 0.25 && cut["state"] == "established");
    }
}
