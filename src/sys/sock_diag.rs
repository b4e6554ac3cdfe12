//! `sock_diag(7)`: all sockets at once, and word of each TCP socket that goes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use neli::consts::socket::{Msg, NlFamily};
use neli::socket::NlSocket;
use neli::utils::Groups;
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};

use crate::flow::{Flow, Protocol};
use crate::socket::{Messages, Parsed, Socket, request, request_one};

/// Room for a datagram of a dump.
const DATAGRAM: usize = 64 << 10;
/// How often a dump that was disturbed is repeated.
const REPEATS: usize = 3;
/// Receive buffer of notifications, in bytes: some 10,000 sockets.
const RECEIVE_BUFFER: usize = 16 << 20;
/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`
const TCP_DESTROYED: [u32; 2] = [1, 3];

/// Asks the kernel for sockets.
pub struct Dump {
    netlink: NlSocket,
    buffer: Vec<u8>,
}

impl Dump {
    /// Opens the netlink socket. It needs no privileges.
    pub fn open() -> io::Result<Dump> {
        let netlink = NlSocket::connect(NlFamily::SockOrInetDiag, None, Groups::empty())?;
        Ok(Dump {
            netlink,
            buffer: vec![0; DATAGRAM],
        })
    }

    /// Hands out every socket of IPv4 and of IPv6 that has two ends and is in one of `states`, as bits of
    /// the kernel's numbers; `extensions` are bits of `INET_DIAG_*` less one.
    ///
    /// A socket may come twice: a dump that was disturbed is repeated.
    pub fn sockets(
        &mut self,
        protocol: Protocol,
        states: u32,
        extensions: u8,
        mut take: impl FnMut(Arc<Socket>),
    ) -> io::Result<()> {
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = request(family as u8, protocol, states, extensions);
            for _ in 0..REPEATS {
                self.netlink.send(request, Msg::empty())?;
                if self.receive(protocol, &mut take)? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The socket of one flow, whose source is the local end, if it is there.
    pub fn socket(&mut self, flow: &Flow, extensions: u8) -> io::Result<Option<Arc<Socket>>> {
        self.netlink
            .send(request_one(flow, extensions), Msg::empty())?;
        let (length, _) = self.netlink.recv(&mut self.buffer, Msg::empty())?;
        match Messages::new(&self.buffer[..length], flow.protocol).next() {
            Some(Parsed::Socket(socket)) => Ok(Some(socket)),
            Some(Parsed::Error(libc::ENOENT)) => Ok(None),
            Some(Parsed::Error(number)) => Err(io::Error::from_raw_os_error(number)),
            _ => Ok(None),
        }
    }

    /// Reads to the end of a dump; whether it was undisturbed.
    fn receive(
        &mut self,
        protocol: Protocol,
        take: &mut impl FnMut(Arc<Socket>),
    ) -> io::Result<bool> {
        let mut undisturbed = true;
        loop {
            let (length, _) = self.netlink.recv(&mut self.buffer, Msg::empty())?;
            for parsed in Messages::new(&self.buffer[..length], protocol) {
                match parsed {
                    Parsed::Socket(socket) => take(socket),
                    Parsed::Interrupted => undisturbed = false,
                    Parsed::Done => return Ok(undisturbed),
                    Parsed::Error(number) => return Err(io::Error::from_raw_os_error(number)),
                    Parsed::Nothing => {}
                }
            }
        }
    }
}

/// What a read of notifications came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notified {
    /// There may be more.
    Some,
    /// The same, but one or more did not say of which connection they were: those that this end has reset, that
    /// never came about, or that listened.
    Nameless,
    /// Nothing waits.
    Nothing,
    /// Some were lost: only a scan tells what has gone.
    Overrun,
}

/// Word of each TCP socket of this network namespace that goes, with its last numbers.
pub struct Destroyed {
    netlink: NlSocket,
    buffer: Vec<u8>,
    lookup: Dump,
}

impl Destroyed {
    /// Subscribes. Kernels before 4.3 do not have it.
    pub fn subscribe() -> io::Result<Destroyed> {
        let netlink = NlSocket::connect(NlFamily::SockOrInetDiag, None, Groups::empty())?;
        netlink.nonblock()?;
        // SAFETY: `netlink` keeps the descriptor open for as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(netlink.as_raw_fd()) };
        if setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&fd, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        for group in TCP_DESTROYED {
            netlink.add_mcast_membership(Groups::new_groups(&[group]))?;
        }
        Ok(Destroyed {
            netlink,
            buffer: vec![0; DATAGRAM],
            lookup: Dump::open()?,
        })
    }

    /// Hands out the sockets of one datagram.
    pub fn receive(&mut self, mut take: impl FnMut(Arc<Socket>)) -> io::Result<Notified> {
        let length = match self.netlink.recv(&mut self.buffer, Msg::empty()) {
            Ok((length, _)) => length,
            Err(error) => {
                return match error.raw_os_error() {
                    Some(libc::ENOBUFS) => Ok(Notified::Overrun),
                    Some(libc::EAGAIN) => Ok(Notified::Nothing),
                    Some(libc::EINTR) => Ok(Notified::Some),
                    _ => Err(error),
                };
            }
        };
        let mut notified = Notified::Some;
        for parsed in Messages::new(&self.buffer[..length], Protocol::Tcp) {
            if let Parsed::Nothing = parsed {
                notified = Notified::Nameless;
            }
            if let Parsed::Socket(mut socket) = parsed {
                // The end that closed first leaves a FIN_WAIT2 behind, which becomes a TIME_WAIT with the
                // other end's FIN; the other end leaves nothing, and has had a FIN.
                let info = &socket.info;
                if info.was_established() && info.more_was_acknowledged_than_sent() {
                    let left = self.lookup.socket(&socket.flow, 0);
                    let came =
                        left.is_ok_and(|left| left.is_none_or(|left| left.info.fin_received));
                    if let Some(socket) = Arc::get_mut(&mut socket) {
                        socket.info.fin_received = came;
                    }
                }
                take(socket);
            }
        }
        Ok(notified)
    }
}

impl AsRawFd for Destroyed {
    fn as_raw_fd(&self) -> RawFd {
        self.netlink.as_raw_fd()
    }
}
