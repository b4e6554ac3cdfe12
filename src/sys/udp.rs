//! Sending datagrams in batches: one socket a family, `sendmmsg(2)`.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, setsockopt, sockopt};

/// The most datagrams of one system call.
pub const BATCH: usize = 128;
/// Send buffer that is asked for, in bytes: room for the datagrams that wait for the link-layer
/// address of some twenty silent neighbours.
const SEND_BUFFER: usize = 4 << 20;
/// How long a full send buffer is waited for, in milliseconds.
const PATIENCE_MS: u8 = 10;

/// Datagrams to be sent together.
#[derive(Default)]
pub struct Batch {
    text: String,
    datagrams: Vec<(Range<usize>, SocketAddr)>,
}

impl Batch {
    /// Forgets the datagrams and keeps the memory.
    pub fn clear(&mut self) {
        self.text.clear();
        self.datagrams.clear();
    }

    /// Adds what `write` appends, once for each of `destinations`, and returns what it returns.
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

    /// How many datagrams there are.
    pub fn len(&self) -> usize {
        self.datagrams.len()
    }

    /// Whether there is no datagram.
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
    /// Opens a socket a family. A host may lack one family: then sending to it fails, datagram by
    /// datagram. Lacking both is an error.
    pub fn open() -> io::Result<Sender> {
        let ipv4 = FamilySocket::open(Ipv4Addr::UNSPECIFIED.into());
        let ipv6 = FamilySocket::open(Ipv6Addr::UNSPECIFIED.into());
        match (ipv4, ipv6) {
            (Err(error), Err(_)) => Err(error),
            (ipv4, ipv6) => Ok(Sender { ipv4, ipv6 }),
        }
    }

    /// Sends all datagrams of a batch, and tells `failed` which could not be sent and why. One that
    /// cannot be sent does not keep the others.
    pub fn send(&mut self, batch: &Batch, mut failed: impl FnMut(SocketAddr, io::Error)) {
        for (socket, is_ipv4) in [(&mut self.ipv4, true), (&mut self.ipv6, false)] {
            let of_family: Vec<_> = batch
                .datagrams
                .iter()
                .filter(|(_, to)| to.is_ipv4() == is_ipv4)
                .collect();
            for chunk in of_family.chunks(BATCH) {
                match socket {
                    Ok(socket) => socket.send(batch.text.as_bytes(), chunk, &mut failed),
                    Err(error) => {
                        for (_, to) in chunk {
                            failed(*to, io::Error::new(error.kind(), error.to_string()));
                        }
                    }
                }
            }
        }
    }
}

struct FamilySocket {
    socket: UdpSocket,
    any: IpAddr,
}

impl FamilySocket {
    fn open(any: IpAddr) -> io::Result<FamilySocket> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        if setsockopt(&socket, sockopt::SndBufForce, &SEND_BUFFER).is_err() {
            setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER)?;
        }
        Ok(FamilySocket { socket, any })
    }

    fn send(
        &mut self,
        bytes: &[u8],
        chunk: &[&(Range<usize>, SocketAddr)],
        failed: &mut impl FnMut(SocketAddr, io::Error),
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
                Err(Errno::EAGAIN) if self.wait() => {}
                Err(Errno::EAGAIN) if !replaced => {
                    replaced = true;
                    self.replace();
                }
                Err(errno) => {
                    failed(chunk[at].1, errno.into());
                    at += 1;
                }
            }
        }
    }

    /// Waits a little for room in the send buffer.
    fn wait(&self) -> bool {
        let mut socket = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        poll(&mut socket, PollTimeout::from(PATIENCE_MS)).is_ok_and(|ready| ready > 0)
    }

    /// Goes on with a new socket. Datagrams to a neighbour that does not answer wait in the kernel for
    /// seconds and fill the send buffer of their socket; those to others must not wait with them. What
    /// waits keeps waiting after its socket is closed.
    fn replace(&mut self) {
        if let Ok(new) = FamilySocket::open(self.any) {
            *self = new;
        }
    }
}
