//! Receives datagrams in batches: `recvmmsg(2)`.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrStorage, bind, getsockname,
    recvmmsg, setsockopt, socket, sockopt,
};

/// The most datagrams in one system call.
const MAX_BATCH_SIZE: usize = 64;
/// Requested size of the receive buffer, in bytes: a tenth of a second of fireflies at full speed.
const RECEIVE_BUFFER_SIZE: usize = 32 << 20;

/// A bound UDP socket.
pub struct Receiver {
    socket: OwnedFd,
    /// The kernel's count of dropped datagrams when it was last read.
    drop_count: u32,
}

/// Memory for the datagrams of one system call. It belongs to the thread that receives.
pub struct ReceiveBuffer {
    headers: MultiHeaders<SockaddrStorage>,
    bytes: Vec<u8>,
    max_datagram_size: usize,
}

impl ReceiveBuffer {
    /// A buffer for datagrams of up to `max_datagram_size` bytes.
    pub fn new(max_datagram_size: usize) -> ReceiveBuffer {
        ReceiveBuffer {
            headers: MultiHeaders::preallocate(MAX_BATCH_SIZE, None),
            bytes: vec![0; MAX_BATCH_SIZE * max_datagram_size],
            max_datagram_size,
        }
    }
}

/// A received datagram.
pub struct Datagram<'a> {
    /// The content, truncated to the size of the buffer.
    pub bytes: &'a [u8],
    /// Whether the datagram was longer than the buffer.
    pub truncated: bool,
    from: Option<SockaddrStorage>,
}

impl Datagram<'_> {
    /// The address of the sender.
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
    /// Binds a socket to an address; `::` receives IPv4, too.
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
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER_SIZE).is_err() {
            setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER_SIZE)?;
        }
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        Ok(Receiver {
            socket,
            drop_count: 0,
        })
    }

    /// Takes over a socket if it is bound to this address.
    pub fn adopt(socket: OwnedFd, address: SocketAddr) -> Option<Receiver> {
        let bound: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
        let mut receiver = Receiver {
            socket,
            drop_count: 0,
        };
        // Earlier drops are not counted: they belong to the predecessor.
        receiver.take_dropped();
        (bound == SockaddrStorage::from(address)).then_some(receiver)
    }

    /// The socket.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Passes the datagrams of one system call to `handle`, and returns their number: 0 if none waits.
    pub fn receive(
        &self,
        buffer: &mut ReceiveBuffer,
        mut handle: impl FnMut(Datagram<'_>),
    ) -> io::Result<usize> {
        let mut slices: Vec<_> = buffer
            .bytes
            .chunks_exact_mut(buffer.max_datagram_size)
            .map(|chunk| [IoSliceMut::new(chunk)])
            .collect();
        let received = recvmmsg(
            self.socket.as_raw_fd(),
            &mut buffer.headers,
            slices.iter_mut(),
            MsgFlags::MSG_DONTWAIT,
            None,
        );
        let messages = match received {
            Ok(messages) => messages,
            // No datagram waits, a signal arrived, or an ICMP error, which does not concern a socket that sends
            // nothing.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let mut count = 0;
        for message in messages {
            count += 1;
            handle(Datagram {
                bytes: message.iovs().next().unwrap_or_default(),
                truncated: message.flags.contains(MsgFlags::MSG_TRUNC),
                from: message.address,
            });
        }
        Ok(count)
    }

    /// How many datagrams the kernel has dropped since the last call because the receive buffer was full. The count is
    /// that of SO_RXQ_OVFL, which the kernel attaches only to the next datagram; SO_MEMINFO also gives it without one.
    pub fn take_dropped(&mut self) -> u32 {
        // SK_MEMINFO_DROPS
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
        let before = std::mem::replace(&mut self.drop_count, info[DROPS]);
        info[DROPS].wrapping_sub(before)
    }
}

impl AsRawFd for Receiver {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
