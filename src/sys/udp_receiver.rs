//! Receiving datagrams in batches: `recvmmsg(2)`.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrStorage, bind, getsockname,
    recvmmsg, setsockopt, socket, sockopt,
};

/// The most datagrams of one system call.
const BATCH: usize = 64;
/// Receive buffer that is asked for, in bytes: a tenth of a second of fireflies at full speed.
const RECEIVE_BUFFER: usize = 32 << 20;

/// A bound UDP socket.
pub struct Receiver {
    socket: OwnedFd,
    dropped: u32,
}

/// Room for the datagrams of one system call; belongs to the thread that receives.
pub struct Room {
    headers: MultiHeaders<SockaddrStorage>,
    bytes: Vec<u8>,
    datagram_max: usize,
}

impl Room {
    /// For datagrams of up to `datagram_max` bytes.
    pub fn new(datagram_max: usize) -> Room {
        Room {
            headers: MultiHeaders::preallocate(BATCH, None),
            bytes: vec![0; BATCH * datagram_max],
            datagram_max,
        }
    }
}

/// What was received.
pub struct Datagram<'a> {
    /// The datagram, as far as there was room.
    pub bytes: &'a [u8],
    /// Whether it was longer.
    pub cut: bool,
    from: Option<SockaddrStorage>,
}

impl Datagram<'_> {
    /// Who sent it.
    pub fn from(&self) -> Option<SocketAddr> {
        let from = self.from.as_ref()?;
        let ipv4 = from
            .as_sockaddr_in()
            .map(|v4| ((*v4).ip().into(), v4.port()));
        let (ip, port): (IpAddr, u16) = match from.as_sockaddr_in6() {
            Some(v6) => (v6.ip().into(), v6.port()),
            None => ipv4?,
        };
        Some(SocketAddr::new(ip.to_canonical(), port))
    }
}

impl Receiver {
    /// Binds to an address; `::` takes IPv4 as well.
    pub fn bind(address: SocketAddr) -> io::Result<Receiver> {
        let family = match address.ip() {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Datagram, flags, None)?;
        if address.ip().is_unspecified() && address.is_ipv6() {
            setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
        }
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER)?;
        }
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        Ok(Receiver { socket, dropped: 0 })
    }

    /// Takes over a socket if it is bound to this address.
    pub fn adopt(socket: OwnedFd, address: SocketAddr) -> Option<Receiver> {
        let bound: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
        let mut receiver = Receiver { socket, dropped: 0 };
        // What was dropped before is not this process's to count.
        receiver.dropped();
        (bound == SockaddrStorage::from(address)).then_some(receiver)
    }

    /// The socket.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Hands out the datagrams of one system call and returns how many there were: 0 when none waits.
    pub fn receive(
        &self,
        room: &mut Room,
        mut take: impl FnMut(Datagram<'_>),
    ) -> io::Result<usize> {
        let mut slices: Vec<_> = room
            .bytes
            .chunks_exact_mut(room.datagram_max)
            .map(|chunk| [IoSliceMut::new(chunk)])
            .collect();
        let received = recvmmsg(
            self.socket.as_raw_fd(),
            &mut room.headers,
            slices.iter_mut(),
            MsgFlags::MSG_DONTWAIT,
            None,
        );
        let messages = match received {
            Ok(messages) => messages,
            // An ICMP error of nobody's datagram, or a signal.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let mut count = 0;
        for message in messages {
            count += 1;
            take(Datagram {
                bytes: message.iovs().next().unwrap_or_default(),
                cut: message.flags.contains(MsgFlags::MSG_TRUNC),
                from: message.address,
            });
        }
        Ok(count)
    }

    /// How many datagrams the kernel has dropped since it was last asked, for want of room in the
    /// receive buffer. This is the count that SO_RXQ_OVFL attaches to the next datagram, also when there
    /// is no next one.
    pub fn dropped(&mut self) -> u32 {
        const DROPS: usize = 8;
        let mut info = [0u32; DROPS + 1];
        let mut length = size_of_val(&info) as libc::socklen_t;
        // SAFETY: `info` is as long as `length` says, and outlives the call.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                info.as_mut_ptr().cast(),
                &mut length,
            )
        };
        if result != 0 || (length as usize) < size_of_val(&info) {
            return 0;
        }
        let before = std::mem::replace(&mut self.dropped, info[DROPS]);
        info[DROPS].wrapping_sub(before)
    }
}

impl AsRawFd for Receiver {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
