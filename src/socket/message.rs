//! Encodes and decodes the messages of `NETLINK_SOCK_DIAG` (include/uapi/linux/inet_diag.h). No I/O.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::{
    Algorithm, Bbr, FIN_RECEIVED, Socket, SocketInfo, TcpInfo, is_connected, is_in_any,
    is_time_wait,
};
use crate::flow::{Flow, Protocol};

/// `SOCK_DIAG_BY_FAMILY`
const BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Size of `struct nlmsghdr`, in bytes.
const HEADER_SIZE: usize = 16;
/// Size of `struct inet_diag_msg`, in bytes.
const DIAG_SIZE: usize = 72;

/// A request for all sockets of a family (`AF_INET` or `AF_INET6`) and protocol in `states`, a bit mask of the kernel's
/// numbers, with the attributes `extensions`, a bit mask of `INET_DIAG_*` minus one.
pub fn request(
    family: u8,
    protocol: Protocol,
    states: u32,
    extensions: u8,
) -> [u8; HEADER_SIZE + 56] {
    let mut bytes = [0; HEADER_SIZE + 56];
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
    bytes[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    bytes[HEADER_SIZE] = family;
    bytes[HEADER_SIZE + 1] = match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    bytes[HEADER_SIZE + 2] = extensions;
    bytes[HEADER_SIZE + 4..HEADER_SIZE + 8].copy_from_slice(&states.to_ne_bytes());
    bytes
}

/// A request for the socket of a flow, whose source is the local end.
pub fn request_one(flow: &Flow, extensions: u8) -> [u8; HEADER_SIZE + 56] {
    let family = match flow.source.address {
        IpAddr::V4(_) => nix::libc::AF_INET,
        IpAddr::V6(_) => nix::libc::AF_INET6,
    };
    let mut bytes = request(family as u8, flow.protocol, u32::MAX, extensions);
    bytes[6..8].copy_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    let id = &mut bytes[HEADER_SIZE + 8..];
    for (end, port, address) in [(flow.source, 0, 4), (flow.destination, 2, 20)] {
        id[port..port + 2].copy_from_slice(&end.port.to_be_bytes());
        match end.address {
            IpAddr::V4(ip) => id[address..address + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => id[address..address + 16].copy_from_slice(&ip.octets()),
        }
    }
    // `INET_DIAG_NOCOOKIE`, in both words of the cookie.
    id[40..48].fill(0xff);
    bytes
}

/// A parsed message.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// A socket with a remote end.
    Socket(SocketMessage<'a>),
    /// A socket that is not connected, or another type of message.
    Other,
    /// The end of a dump.
    Done,
    /// An error of the kernel, as a positive errno number.
    Error(i32),
    /// The dump was interrupted by a change (`NLM_F_DUMP_INTR`): it may be incomplete.
    Interrupted,
}

/// The message of a socket with a remote end. Its statistics are parsed on demand: most sockets that a scan shows are
/// known already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMessage<'a> {
    /// From the local end to the remote one.
    pub flow: Flow,
    /// As in [`SocketInfo`].
    pub cookie: u64,
    /// As in [`SocketInfo`].
    pub state: u8,
    /// As in [`SocketInfo`].
    pub inode: u32,
    /// `struct inet_diag_msg` and the attributes.
    message: &'a [u8],
}

/// Iterates over the messages of one or more datagrams.
pub struct Messages<'a> {
    rest: &'a [u8],
    protocol: Protocol,
}

impl<'a> Messages<'a> {
    /// `protocol` is that of the sockets: messages do not contain it.
    pub fn new(datagrams: &'a [u8], protocol: Protocol) -> Messages<'a> {
        Messages {
            rest: datagrams,
            protocol,
        }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Parsed<'a>;

    fn next(&mut self) -> Option<Parsed<'a>> {
        let message = next_message(&mut self.rest)?;
        Some(match kind(message)? {
            Kind::Socket => match SocketMessage::new(&message[HEADER_SIZE..], self.protocol) {
                Some(socket) => Parsed::Socket(socket),
                None => Parsed::Other,
            },
            Kind::Other => Parsed::Other,
            Kind::Done => Parsed::Done,
            Kind::Error(number) => Parsed::Error(number),
            Kind::Interrupted => Parsed::Interrupted,
        })
    }
}

/// What a datagram says of the dump that it belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The dump was interrupted by a change (`NLM_F_DUMP_INTR`): it may be incomplete.
    pub interrupted: bool,
    /// The end of the dump; the error is a positive errno number.
    pub end: Option<Result<(), i32>>,
}

impl Progress {
    /// Looks at the headers of the messages alone.
    pub fn of(mut datagram: &[u8]) -> Progress {
        let mut progress = Progress::default();
        while let Some(kind) = next_message(&mut datagram).and_then(kind) {
            match kind {
                Kind::Interrupted => progress.interrupted = true,
                Kind::Done => progress.end = Some(Ok(())),
                Kind::Error(number) => progress.end = Some(Err(number)),
                Kind::Socket | Kind::Other => {}
            }
        }
        progress
    }
}

/// What a message is by its header.
enum Kind {
    Socket,
    Other,
    Done,
    Error(i32),
    Interrupted,
}

/// Takes the next message, with its header, off `rest`.
fn next_message<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32_at(rest, 0)? as usize;
    let message = rest.get(..length).filter(|m| m.len() >= HEADER_SIZE)?;
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    Some(message)
}

fn kind(message: &[u8]) -> Option<Kind> {
    if u16_at(message, 6)? & NLM_F_DUMP_INTR != 0 {
        return Some(Kind::Interrupted);
    }
    Some(match u16_at(message, 4)? {
        BY_FAMILY => Kind::Socket,
        NLMSG_DONE => Kind::Done,
        NLMSG_ERROR => {
            Kind::Error(u32_at(message, HEADER_SIZE).map_or(0, |e| (e as i32).wrapping_neg()))
        }
        _ => Kind::Other,
    })
}

impl<'a> SocketMessage<'a> {
    /// `None` if the socket has no remote end.
    fn new(message: &'a [u8], protocol: Protocol) -> Option<SocketMessage<'a>> {
        if message.len() < DIAG_SIZE {
            return None;
        }
        let end = |port: usize, address: usize| {
            let port = u16::from_be_bytes(message.get(port..port + 2)?.try_into().ok()?);
            let bytes: [u8; 16] = message.get(address..address + 16)?.try_into().ok()?;
            let address: IpAddr = match i32::from(message[0]) {
                nix::libc::AF_INET => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
                nix::libc::AF_INET6 => Ipv6Addr::from(bytes).into(),
                _ => return None,
            };
            Some((address, port)).filter(|(_, port)| *port != 0)
        };
        Some(SocketMessage {
            flow: Flow::new(protocol, end(4, 8)?, end(6, 24)?).ok()?,
            cookie: u64::from(u32_at(message, 44)?) | u64::from(u32_at(message, 48)?) << 32,
            state: message[1],
            inode: u32_at(message, 68)?,
            message,
        })
    }

    /// Like [`SocketInfo::is_connected`].
    pub fn is_connected(&self) -> bool {
        is_connected(self.state, self.inode)
    }

    /// Whether the socket is in one of `states`, a bit mask, and more than a time-wait entry, which has nothing new to
    /// report.
    pub fn is_alive_in(&self, states: u32) -> bool {
        is_in_any(self.state, states) && !is_time_wait(self.state, self.inode)
    }

    /// Parses the rest of the message.
    pub fn parse(&self) -> Arc<Socket> {
        self.parse_only(u8::MAX)
    }

    /// Parses the rest of the message as if only the attributes `extensions` had been requested, a bit mask of
    /// `INET_DIAG_*` minus one.
    pub fn parse_only(&self, extensions: u8) -> Arc<Socket> {
        let message = self.message;
        let word = |at| u32_at(message, at).unwrap_or(0);
        let mut info = SocketInfo {
            state: self.state,
            retransmits: message[3],
            fin_received: 1u32.checked_shl(self.state.into()).unwrap_or(0) & FIN_RECEIVED != 0,
            interface: word(40),
            cookie: self.cookie,
            uid: word(64),
            inode: self.inode,
            ..SocketInfo::default()
        };
        let mut rest = &message[DIAG_SIZE..];
        while let (Some(length), Some(kind)) = (u16_at(rest, 0), u16_at(rest, 2)) {
            let length = usize::from(length);
            let Some(value) = rest.get(4..length) else {
                break;
            };
            if is_requested(kind, extensions) {
                attribute(&mut info, kind, value);
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        }
        Arc::new(Socket {
            flow: self.flow,
            info,
        })
    }
}

/// Whether the kernel sends an attribute to those who ask for `extensions`.
fn is_requested(kind: u16, extensions: u8) -> bool {
    match kind {
        1..=7 => extensions & 1 << (kind - 1) != 0,
        // DCTCP and BBR, in place of Vegas.
        9 | 16 => is_requested(3, extensions),
        _ => true,
    }
}

fn attribute(info: &mut SocketInfo, kind: u16, value: &[u8]) {
    match kind {
        1 => info.memory = words(value),
        2 => info.tcp = Some(TcpInfo::parse(value)),
        3 => info.vegas = words(value),
        4 => info.congestion = Some(Algorithm::new(value)),
        5 => info.tos = value.first().copied(),
        6 => info.traffic_class = value.first().copied(),
        7 => info.socket_memory = words(value),
        8 => info.shutdown = value.first().copied(),
        9 => info.dctcp = dctcp(value),
        16 => {
            info.bbr = words(value).map(|[low, high, min_rtt, pacing_gain, cwnd_gain]| Bbr {
                bandwidth: u64::from(high) << 32 | u64::from(low),
                min_rtt,
                pacing_gain,
                cwnd_gain,
            });
        }
        21 => {
            info.cgroup = value
                .get(..8)
                .and_then(|v| v.try_into().ok())
                .map(u64::from_ne_bytes)
        }
        _ => {}
    }
}

/// Parses `struct tcp_dctcp_info`, whose first two fields have 16 bits.
fn dctcp(value: &[u8]) -> Option<[u32; 5]> {
    Some([
        u16_at(value, 0)?.into(),
        u16_at(value, 2)?.into(),
        u32_at(value, 4)?,
        u32_at(value, 8)?,
        u32_at(value, 12)?,
    ])
}

/// The first `N` 32-bit words; `None` if there are fewer.
fn words<const N: usize>(value: &[u8]) -> Option<[u32; N]> {
    let mut words = [0; N];
    for (index, word) in words.iter_mut().enumerate() {
        *word = u32_at(value, 4 * index)?;
    }
    Some(words)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Field;
    use proptest::prelude::*;

    /// A message of a socket from [2a00::1]:443 to [2a00::2]:5000 with these attributes.
    fn message(kind: u16, flags: u16, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_SIZE + DIAG_SIZE];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        let diag = &mut bytes[HEADER_SIZE..];
        (diag[0], diag[1], diag[3]) = (10, 1, 2);
        diag[4..6].copy_from_slice(&443u16.to_be_bytes());
        diag[6..8].copy_from_slice(&5000u16.to_be_bytes());
        (diag[8], diag[23]) = (0x2a, 1);
        (diag[24], diag[39]) = (0x2a, 2);
        diag[64..68].copy_from_slice(&1000u32.to_ne_bytes());
        for (kind, value) in attributes {
            bytes.extend_from_slice(&(4 + value.len() as u16).to_ne_bytes());
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    /// The messages, with the sockets parsed to their ends.
    fn sockets(bytes: &[u8]) -> Vec<Parsed<'_>> {
        let parsed = Messages::new(bytes, Protocol::Tcp);
        let parsed = parsed.inspect(|parsed| {
            if let Parsed::Socket(socket) = parsed {
                socket.parse();
            }
        });
        parsed.collect()
    }

    #[test]
    fn an_error_of_any_number_is_read() {
        for (number, expected) in [(-2, 2), (i32::MIN, i32::MIN), (0, 0)] {
            let mut bytes = message(NLMSG_ERROR, 0, &[]);
            bytes[HEADER_SIZE..HEADER_SIZE + 4].copy_from_slice(&number.to_ne_bytes());
            assert_eq!(sockets(&bytes), [Parsed::Error(expected)]);
        }
    }

    #[test]
    fn a_socket_with_its_attributes() {
        let mut tcp = [0; 104];
        tcp[68..72].copy_from_slice(&250u32.to_ne_bytes());
        let bbr: Vec<u8> = [1u32, 2, 3, 4, 5]
            .iter()
            .flat_map(|n| n.to_ne_bytes())
            .collect();
        let cgroup = 42u64.to_ne_bytes();
        let bytes = message(
            BY_FAMILY,
            2,
            &[
                (2, &tcp),
                (4, b"bbr\0"),
                (16, &bbr),
                (21, &cgroup),
                (6, &[0x28]),
                (99, b"?"),
            ],
        );
        let [Parsed::Socket(socket)] = &sockets(&bytes)[..] else {
            panic!("{:?}", sockets(&bytes));
        };
        assert_eq!(
            socket.flow.to_string(),
            "tcp [2a00::1]:443 > [2a00::2]:5000"
        );
        let info = &socket.parse().info;
        assert_eq!(
            (info.state, info.retransmits, info.uid, info.cgroup),
            (1, 2, 1000, Some(42))
        );
        assert_eq!(
            (
                info.congestion.map(|a| a.as_str().to_owned()).as_deref(),
                info.traffic_class
            ),
            (Some("bbr"), Some(0x28))
        );
        assert_eq!(info.bbr.unwrap().bandwidth, 2 << 32 | 1);
        assert_eq!(info.tcp.as_ref().unwrap().get(Field::Rtt), Some(250));
    }

    #[test]
    fn attributes_that_somebody_else_asked_for_are_left_out() {
        let attributes = [1, 2, 3, 5, 6, 7, 8, 16].map(|kind| (kind, &[1; 36][..]));
        let bytes = message(BY_FAMILY, 0, &attributes);
        let [Parsed::Socket(socket)] = sockets(&bytes)[..] else {
            panic!("{bytes:?}");
        };
        let shown = |extensions| {
            let info = &socket.parse_only(extensions).info;
            let memory = (info.memory.is_some(), info.socket_memory.is_some());
            let classes = (info.tos.is_some(), info.traffic_class.is_some());
            let congestion = (info.vegas.is_some(), info.bbr.is_some());
            let always = info.shutdown.is_some();
            (memory, info.tcp.is_some(), congestion, classes, always)
        };
        let none = (false, false);
        assert_eq!(shown(0), (none, false, none, none, true));
        assert_eq!(shown(1 << 1), (none, true, none, none, true));
        assert_eq!(shown(1 << 2), (none, false, (true, true), none, true));
        let all = (true, true);
        assert_eq!(shown(u8::MAX), (all, true, all, all, true));
    }

    #[test]
    fn the_headers_say_where_a_dump_stands() {
        let progress = |kinds: &[(u16, u16)]| {
            let bytes = kinds.iter();
            let bytes: Vec<u8> = bytes
                .flat_map(|&(k, flags)| message(k, flags, &[]))
                .collect();
            Progress::of(&bytes)
        };
        assert_eq!(progress(&[(BY_FAMILY, 2)]), Progress::default());
        let end = progress(&[(BY_FAMILY, NLM_F_DUMP_INTR), (NLMSG_DONE, 0)]);
        assert_eq!((end.interrupted, end.end), (true, Some(Ok(()))));
        let refused = progress(&[(NLMSG_ERROR, 0)]);
        assert!(matches!(refused.end, Some(Err(_))) && !refused.interrupted);
    }

    #[test]
    fn messages_other_than_sockets() {
        let mut bytes = message(BY_FAMILY, NLM_F_DUMP_INTR, &[]);
        bytes.extend(message(NLMSG_DONE, 0, &[]));
        bytes.extend(message(NLMSG_ERROR, 0, &[]));
        let mut listening = message(BY_FAMILY, 0, &[]);
        listening[HEADER_SIZE + 6..HEADER_SIZE + 8].fill(0);
        bytes.extend(listening);
        let parsed = sockets(&bytes);
        assert_eq!(parsed[..2], [Parsed::Interrupted, Parsed::Done]);
        assert!(matches!(parsed[2], Parsed::Error(_)) && parsed[3] == Parsed::Other);
    }

    #[test]
    fn a_truncated_message_does_not_panic() {
        let bytes = message(
            BY_FAMILY,
            2,
            &[(2, &[1; 250]), (7, &[2; 36]), (9, &[3; 16])],
        );
        for cut in 0..bytes.len() {
            let mut bytes = bytes[..cut].to_vec();
            assert!(sockets(&bytes).is_empty());
            if cut >= 4 {
                bytes[..4].copy_from_slice(&(cut as u32).to_ne_bytes());
                let _ = sockets(&bytes);
            }
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = sockets(&bytes);
            let mut framed = message(BY_FAMILY, 2, &[]);
            framed.extend(&bytes);
            let length = framed.len() as u32;
            framed[..4].copy_from_slice(&length.to_ne_bytes());
            let _ = sockets(&framed);
        }
    }
}
