//! `sock_diag(7)`: dumps of all sockets, and notifications of closed TCP sockets. [`super::scanner`] shares the dumps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::flow::{Flow, Protocol};
use crate::socket::{
    Field, Messages, Parsed, Progress, Socket, SocketMessage, request, request_one,
};

/// Size of the buffer for a netlink datagram, in bytes.
const MAX_DATAGRAM_SIZE: usize = 64 << 10;
/// How often to read a socket that receives data until two reads agree.
const MAX_SETTLING_READS: usize = 3;
/// How often to request a dump that was interrupted.
const MAX_DUMP_ATTEMPTS: usize = 3;
/// Size of the receive buffer for notifications, in bytes: room for about 10,000 sockets.
const RECEIVE_BUFFER_SIZE: usize = 16 << 20;
/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`
const TCP_DESTROYED: [u32; 2] = [1, 3];

/// The sockets of a dump, as the kernel's messages: few who read them need all that is in them.
pub struct Answer {
    protocol: Protocol,
    /// Kept from dump to dump, since memory that is new costs the kernel as much as a tenth of the dump.
    bytes: Vec<u8>,
    /// How many of the bytes are messages.
    length: usize,
}

impl Default for Answer {
    fn default() -> Answer {
        Answer {
            protocol: Protocol::Tcp,
            bytes: Vec::new(),
            length: 0,
        }
    }
}

impl Answer {
    /// The sockets that have a remote end.
    pub fn sockets(&self) -> impl Iterator<Item = SocketMessage<'_>> {
        let messages = Messages::new(&self.bytes[..self.length], self.protocol);
        messages.filter_map(|parsed| match parsed {
            Parsed::Socket(socket) => Some(socket),
            _ => None,
        })
    }

    /// Room for the next datagram.
    fn room(&mut self) -> &mut [u8] {
        if self.bytes.len() < self.length + MAX_DATAGRAM_SIZE {
            let larger = self.length + self.length / 4 + MAX_DATAGRAM_SIZE;
            self.bytes.resize(larger, 0);
        }
        &mut self.bytes[self.length..]
    }

    /// Keeps the first `length` bytes of the room, and returns them. Datagrams end at a multiple of 4 bytes.
    fn extend(&mut self, length: usize) -> &[u8] {
        let start = self.length;
        self.length = (start + length).next_multiple_of(4).min(self.bytes.len());
        &self.bytes[start..self.length]
    }
}

/// Requests sockets from the kernel.
pub struct Dump {
    netlink: NlSocket,
    buffer: Vec<u8>,
}

impl Dump {
    /// Opens the netlink socket, which needs no privileges.
    pub fn open() -> io::Result<Dump> {
        let netlink = NlSocket::connect(NlFamily::SockOrInetDiag, None, Groups::empty())?;
        Ok(Dump {
            netlink,
            buffer: vec![0; MAX_DATAGRAM_SIZE],
        })
    }

    /// Reads all IPv4 and IPv6 sockets in one of `states` into `answer`, in place of what it holds. `states` is a bit mask
    /// of the kernel's numbers, `extensions` a bit mask of `INET_DIAG_*` minus one.
    ///
    /// A socket may be there twice, because an interrupted dump is repeated.
    pub fn sockets(
        &mut self,
        protocol: Protocol,
        states: u32,
        extensions: u8,
        answer: &mut Answer,
    ) -> io::Result<()> {
        answer.length = 0;
        answer.protocol = protocol;
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = request(family as u8, protocol, states, extensions);
            for _ in 0..MAX_DUMP_ATTEMPTS {
                self.netlink.send(request, Msg::empty())?;
                if self.receive(answer)? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The socket of a flow whose source is the local end. `None` if there is no such socket.
    pub fn socket(&mut self, flow: &Flow, extensions: u8) -> io::Result<Option<Arc<Socket>>> {
        self.netlink
            .send(request_one(flow, extensions), Msg::empty())?;
        let (length, _) = self.netlink.recv(&mut self.buffer, Msg::empty())?;
        match Messages::new(&self.buffer[..length], flow.protocol).next() {
            Some(Parsed::Socket(socket)) => Ok(Some(socket.parse())),
            Some(Parsed::Error(libc::ENOENT)) => Ok(None),
            Some(Parsed::Error(number)) => Err(io::Error::from_raw_os_error(number)),
            _ => Ok(None),
        }
    }

    /// Like [`Dump::socket`], but with a state that agrees with the byte counts. The kernel reads the state before the
    /// counts: a FIN that arrives in between is in `bytes_received`, but not in the state. The state of a second read
    /// with the same counts is right.
    pub fn settled_socket(
        &mut self,
        flow: &Flow,
        extensions: u8,
    ) -> io::Result<Option<Arc<Socket>>> {
        let received = |socket: &Socket| socket.info.tcp.as_ref()?.get(Field::BytesReceived);
        let Some(mut socket) = self.socket(flow, extensions)? else {
            return Ok(None);
        };
        for _ in 0..MAX_SETTLING_READS {
            let Some(next) = self.socket(flow, extensions)? else {
                break;
            };
            let has_settled = received(&next) == received(&socket);
            socket = next;
            if has_settled {
                break;
            }
        }
        Ok(Some(socket))
    }

    /// Appends a dump to `answer`, up to its end. Returns whether it is complete: it was not interrupted.
    fn receive(&mut self, answer: &mut Answer) -> io::Result<bool> {
        let mut is_complete = true;
        loop {
            let (length, _) = self.netlink.recv(answer.room(), Msg::empty())?;
            let progress = Progress::of(answer.extend(length));
            is_complete &= !progress.interrupted;
            match progress.end {
                Some(Ok(())) => return Ok(is_complete),
                Some(Err(number)) => return Err(io::Error::from_raw_os_error(number)),
                None => {}
            }
        }
    }
}

/// The result of reading notifications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// Sockets, or an interruption by a signal; more may wait.
    Sockets,
    /// Like `Sockets`, but at least one notification does not identify its connection: this end has reset the
    /// connection, it was never established, or the socket was listening.
    Unidentified,
    /// No notification waits.
    Nothing,
    /// The kernel lost notifications: only a scan shows which sockets have closed.
    Overrun,
}

/// Notifications of the closed TCP sockets of this network namespace, with their final statistics.
pub struct DestroyNotifications {
    netlink: NlSocket,
    buffer: Vec<u8>,
    lookup: Dump,
}

impl DestroyNotifications {
    /// Subscribes to the notifications.
    ///
    /// # Errors
    ///
    /// The kernel does not send them: it is older than Linux 4.3.
    pub fn subscribe() -> io::Result<DestroyNotifications> {
        let netlink = NlSocket::connect(NlFamily::SockOrInetDiag, None, Groups::empty())?;
        netlink.nonblock()?;
        // SAFETY: `netlink` keeps the descriptor open for as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(netlink.as_raw_fd()) };
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_SIZE).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER_SIZE)?;
        }
        for group in TCP_DESTROYED {
            netlink.add_mcast_membership(Groups::new_groups(&[group]))?;
        }
        Ok(DestroyNotifications {
            netlink,
            buffer: vec![0; MAX_DATAGRAM_SIZE],
            lookup: Dump::open()?,
        })
    }

    /// Reads one datagram without waiting, and passes its sockets to `handle`.
    pub fn receive(&mut self, mut handle: impl FnMut(Arc<Socket>)) -> io::Result<Received> {
        let length = match self.netlink.recv(&mut self.buffer, Msg::empty()) {
            Ok((length, _)) => length,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::ENOBUFS) => Ok(Received::Overrun),
                    Some(libc::EAGAIN) => Ok(Received::Nothing),
                    Some(libc::EINTR) => Ok(Received::Sockets),
                    _ => Err(error),
                };
            }
        };
        let mut received = Received::Sockets;
        for parsed in Messages::new(&self.buffer[..length], Protocol::Tcp) {
            if let Parsed::Other = parsed {
                received = Received::Unidentified;
            }
            if let Parsed::Socket(socket) = parsed {
                let mut socket = socket.parse();
                // The end that closes first leaves a FIN_WAIT2 entry, which becomes TIME_WAIT when the remote FIN
                // arrives. The end that closes second leaves no entry, and has received a FIN.
                let info = &socket.info;
                if info.was_established() && info.has_acknowledged_more_than_payload() {
                    let entry = self.lookup.socket(&socket.flow, 0);
                    let fin_received =
                        entry.is_ok_and(|entry| entry.is_none_or(|entry| entry.info.fin_received));
                    if let Some(socket) = Arc::get_mut(&mut socket) {
                        socket.info.fin_received = fin_received;
                    }
                }
                handle(socket);
            }
        }
        Ok(received)
    }
}

impl AsRawFd for DestroyNotifications {
    fn as_raw_fd(&self) -> RawFd {
        self.netlink.as_raw_fd()
    }
}
