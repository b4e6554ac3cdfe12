//! Sends datagrams in batches: one socket per address family, `sendmmsg(2)`.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, setsockopt, sockopt};

/// The most datagrams in one system call.
pub const MAX_BATCH_SIZE: usize = 128;
/// Requested size of the send buffer, in bytes: room for the datagrams that wait for the link-layer addresses of about
/// twenty neighbours that do not answer.
const SEND_BUFFER_SIZE: usize = 4 << 20;
/// How long to wait for space in a full send buffer, in milliseconds.
const SEND_TIMEOUT_MS: u8 = 10;

/// Datagrams to send together.
#[derive(Default)]
pub struct Batch {
    text: String,
    datagrams: Vec<(Range<usize>, SocketAddr)>,
}

impl Batch {
    /// Removes the datagrams and keeps the allocated memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.datagrams.clear();
    }

    /// Adds a datagram with the text that `write` appends, for each of `destinations`. Returns the result of `write`.
    pub fn push<T>(
        &mut self,
        destinations: impl IntoIterator<Item = SocketAddr>,
        write: impl FnOnce(&mut String) -> T,
    ) -> T {
        let begin = self.text.len();
        let result = write(&mut self.text);
        let end = self.text.len();
        self.datagrams
            .extend(destinations.into_iter().map(|to| (begin..end, to)));
        result
    }

    /// The number of datagrams.
    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// Whether the batch has no datagrams.
    pub fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }
}

/// Sends batches over IPv4 and IPv6.
pub struct Sender {
    ipv4: io::Result<FamilySocket>,
    ipv6: io::Result<FamilySocket>,
}

impl Sender {
    /// Opens a socket for each address family. If the host lacks one family, sending a datagram of that family fails;
    /// if it lacks both, this is an error.
    pub fn open() -> io::Result<Sender> {
        let ipv4 = FamilySocket::open(Ipv4Addr::UNSPECIFIED.into());
        let ipv6 = FamilySocket::open(Ipv6Addr::UNSPECIFIED.into());
        match (ipv4, ipv6) {
            (Err(error), Err(_)) => Err(error),
            (ipv4, ipv6) => Ok(Sender { ipv4, ipv6 }),
        }
    }

    /// Sends all datagrams of a batch. Calls `on_failure` with the destination and the error of each datagram that
    /// cannot be sent, and goes on with the others.
    pub fn send(&mut self, batch: &Batch, mut on_failure: impl FnMut(SocketAddr, io::Error)) {
        for (socket, is_ipv4) in [(&mut self.ipv4, true), (&mut self.ipv6, false)] {
            let of_family: Vec<_> = batch
                .datagrams
                .iter()
                .filter(|(_, to)| to.is_ipv4() == is_ipv4)
                .collect();
            for chunk in of_family.chunks(MAX_BATCH_SIZE) {
                match socket {
                    Ok(socket) => socket.send(batch.text.as_bytes(), chunk, &mut on_failure),
                    Err(error) => {
                        for (_, to) in chunk {
                            on_failure(*to, io::Error::new(error.kind(), error.to_string()));
                        }
                    }
                }
            }
        }
    }
}

struct FamilySocket {
    socket: UdpSocket,
    /// The unspecified address of the family.
    any: IpAddr,
}

impl FamilySocket {
    fn open(any: IpAddr) -> io::Result<FamilySocket> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        if setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER_SIZE).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER_SIZE)?;
        }
        Ok(FamilySocket { socket, any })
    }

    fn send(
        &mut self,
        bytes: &[u8],
        chunk: &[&(Range<usize>, SocketAddr)],
        on_failure: &mut impl FnMut(SocketAddr, io::Error),
    ) {
        let slices: Vec<_> = chunk
            .iter()
            .map(|(range, _)| [IoSlice::new(&bytes[range.clone()])])
            .collect();
        let addresses: Vec<_> = chunk
            .iter()
            .map(|(_, to)| Some(SockaddrStorage::from(*to)))
            .collect();
        let mut at = 0;
        let mut replaced = false;
        while at < chunk.len() {
            let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(chunk.len() - at, None);
            let sent = sendmmsg(
                self.socket.as_raw_fd(),
                &mut headers,
                &slices[at..],
                &addresses[at..],
                [],
                MsgFlags::MSG_DONTWAIT,
            )
            .map(Iterator::count);
            match sent {
                Ok(sent) => at += sent,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if self.wait_for_space() => {}
                Err(Errno::EAGAIN) if !replaced => {
                    replaced = true;
                    self.replace_socket();
                }
                Err(errno) => {
                    on_failure(chunk[at].1, errno.into());
                    at += 1;
                }
            }
        }
    }

    /// Waits for space in the send buffer. Returns whether there is some.
    fn wait_for_space(&self) -> bool {
        let mut socket = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        poll(&mut socket, PollTimeout::from(SEND_TIMEOUT_MS)).is_ok_and(|ready| ready > 0)
    }

    /// Continues with a new socket. Datagrams to a neighbour that does not answer wait in the kernel for seconds and
    /// fill the send buffer of their socket; datagrams to other destinations must not wait for them. The kernel keeps
    /// the waiting datagrams after their socket is closed.
    fn replace_socket(&mut self) {
        if let Ok(new) = FamilySocket::open(self.any) {
            *self = new;
        }
    }
}
