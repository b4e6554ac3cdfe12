//! Sends UDP datagrams with the source address of another host: raw sockets, which need `CAP_NET_RAW`.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

/// Hops that a datagram may take.
const HOP_LIMIT: u8 = 64;
const UDP: u8 = 17;
const UDP_HEADER: usize = 8;

/// Raw sockets of both families.
pub struct RawSender {
    ipv4: OwnedFd,
    ipv6: OwnedFd,
    packet: Vec<u8>,
}

impl RawSender {
    /// Opens the sockets.
    ///
    /// # Errors
    ///
    /// The thread lacks `CAP_NET_RAW`.
    pub fn open() -> io::Result<RawSender> {
        // With this protocol the kernel takes the IP header from the packet.
        let open = |family| {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            socket(family, SockType::Raw, flags, SockProtocol::Raw)
        };
        Ok(RawSender {
            ipv4: open(AddressFamily::Inet)?,
            ipv6: open(AddressFamily::Inet6)?,
            packet: Vec::new(),
        })
    }

    /// Sends a datagram as if it came from `from`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` if the addresses are of different families or the payload is too long; the errors of sendto(2), among
    /// them `EMSGSIZE` for a datagram larger than the MTU.
    pub fn send(&mut self, payload: &[u8], from: SocketAddr, to: SocketAddr) -> io::Result<()> {
        self.packet.clear();
        put_packet(&mut self.packet, payload, from, to)?;
        let (socket, to): (_, SocketAddr) = match to {
            SocketAddr::V4(to) => (&self.ipv4, SocketAddrV4::new(*to.ip(), 0).into()),
            // A raw IPv6 socket takes the port for a protocol, and refuses one that is not its own.
            SocketAddr::V6(to) => (
                &self.ipv6,
                SocketAddrV6::new(*to.ip(), 0, 0, to.scope_id()).into(),
            ),
        };
        let to = SockaddrStorage::from(to);
        loop {
            match sendto(
                socket.as_raw_fd(),
                &self.packet,
                &to,
                MsgFlags::MSG_DONTWAIT,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Appends an IP packet with a UDP datagram. For IPv4 the kernel fills in the header's checksum and identification.
fn put_packet(
    packet: &mut Vec<u8>,
    payload: &[u8],
    from: SocketAddr,
    to: SocketAddr,
) -> io::Result<()> {
    let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "the datagram is too long");
    let udp_length = u16::try_from(UDP_HEADER + payload.len()).map_err(|_| too_long())?;
    let mut sum = u32::from(udp_length) + u32::from(UDP);
    match (from.ip(), to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let total = udp_length.checked_add(20).ok_or_else(too_long)?;
            packet.extend([0x45, 0]);
            packet.extend(total.to_be_bytes());
            packet.extend([0, 0, 0, 0, HOP_LIMIT, UDP, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            sum = add_words(add_words(sum, &source.octets()), &destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend(udp_length.to_be_bytes());
            packet.extend([UDP, HOP_LIMIT]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
            sum = add_words(add_words(sum, &source.octets()), &destination.octets());
        }
        _ => {
            let message = "sender and destination are of different address families";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
    }
    let udp = packet.len();
    for word in [from.port(), to.port(), udp_length, 0] {
        packet.extend(word.to_be_bytes());
    }
    packet.extend(payload);
    let mut sum = add_words(sum, &packet[udp..]);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // RFC 768: a checksum of 0 is sent as all ones, since 0 means that there is none.
    let checksum = match !(sum as u16) {
        0 => 0xffff,
        checksum => checksum,
    };
    packet[udp + 6..udp + 8].copy_from_slice(&checksum.to_be_bytes());
    Ok(())
}

/// Adds 16-bit words of the Internet checksum (RFC 1071). A datagram has at most 32,768 words, whose sum fits.
fn add_words(sum: u32, bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    words.map(word).fold(sum, u32::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_768() {
        let cases = [
            ("192.0.2.1:9", "198.51.100.7:2055"),
            ("[2001:db8::1]:9", "[2001:db8::2]:2055"),
        ];
        for (from, to) in cases {
            for payload in [&b""[..], b"odd", b"even"] {
                let mut packet = Vec::new();
                put_packet(
                    &mut packet,
                    payload,
                    from.parse().unwrap(),
                    to.parse().unwrap(),
                )
                .unwrap();
                // A receiver sums pseudo header and datagram, checksum included: all ones.
                let (addresses, udp) = match packet[0] >> 4 {
                    4 => (12..20, 20),
                    _ => (8..40, 40),
                };
                let length = (packet.len() - udp) as u32;
                let mut sum = add_words(length + u32::from(UDP), &packet[addresses]);
                sum = add_words(sum, &packet[udp..]);
                while sum > 0xffff {
                    sum = (sum & 0xffff) + (sum >> 16);
                }
                assert_eq!(sum, 0xffff, "{from} {payload:?}");
                assert!(packet.ends_with(payload));
            }
        }
    }

    #[test]
    fn families_are_not_mixed() {
        let (from, to) = ("192.0.2.1:9".parse().unwrap(), "[::1]:9".parse().unwrap());
        let error = put_packet(&mut Vec::new(), b"", from, to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
