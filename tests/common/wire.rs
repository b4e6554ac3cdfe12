//! Captures frames at the far end of the veth pair.
#![allow(dead_code, missing_docs)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{RcvBufForce, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::net::Hosts;

/// A packet socket at the far end.
pub struct Wire {
    socket: OwnedFd,
}

/// A captured IPv6 packet.
#[derive(Debug)]
pub struct Frame {
    pub length: usize,
    pub class: u8,
    pub label: u32,
    /// Next-header values from the IPv6 header on, up to the transport's.
    pub headers: Vec<u8>,
    pub source_port: u16,
    pub destination_port: u16,
    /// The first 1600 bytes.
    pub bytes: Vec<u8>,
}

impl Wire {
    pub fn listen(hosts: &Hosts) -> Wire {
        let socket = hosts.there.enter(|| {
            socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )
            .unwrap()
        });
        setsockopt(&socket, RcvBufForce, &(256 << 20)).unwrap();
        setsockopt(&socket, ReceiveTimeout, &TimeVal::milliseconds(100)).unwrap();
        Wire { socket }
    }

    /// IPv6 frames that are `wanted`, until `count` have arrived or none arrives for 500 ms.
    pub fn frames(&self, count: usize, wanted: impl Fn(&Frame) -> bool) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 1 << 17];
        let mut last = Instant::now();
        while frames.len() < count && last.elapsed() < Duration::from_millis(500) {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => {
                    if let Some(frame) = parse(&buffer[..length]).filter(&wanted) {
                        frames.push(frame);
                        last = Instant::now();
                    }
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => panic!("{error}"),
            }
        }
        frames
    }
}

fn parse(bytes: &[u8]) -> Option<Frame> {
    if bytes.get(12..14)? != [0x86, 0xdd] {
        return None;
    }
    let word = u32::from_be_bytes(bytes.get(14..18)?.try_into().ok()?);
    let mut headers = vec![*bytes.get(20)?];
    let mut at = 54;
    while matches!(headers.last()?, 0 | 60) {
        headers.push(*bytes.get(at)?);
        at += 8 * (1 + usize::from(*bytes.get(at + 1)?));
    }
    let port = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    Some(Frame {
        length: bytes.len(),
        class: (word >> 20) as u8,
        label: word & 0xfffff,
        headers,
        source_port: port(at)?,
        destination_port: port(at + 2)?,
        bytes: bytes[..bytes.len().min(1600)].to_vec(),
    })
}

impl Frame {
    /// Whether the checksum of the transport header is right. The frame must have been captured completely.
    pub fn checksum_is_right(&self) -> bool {
        assert_eq!(self.length, self.bytes.len());
        let transport = 54 + 8 * (self.headers.len() - 1);
        let upper = &self.bytes[transport..];
        let mut sum = u32::from(*self.headers.last().unwrap()) + upper.len() as u32;
        for part in [&self.bytes[22..54], upper] {
            for pair in part.chunks(2) {
                sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            }
        }
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum == 0xffff
    }
}
