//! Receives datagrams in batches: `recvmmsg(2)`.

use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockType, SockaddrStorage, bind, getsockname,
    getsockopt, recvmmsg, setsockopt, socket, sockopt,
};

/// The most datagrams in one system call.
const MAX_BATCH_SIZE: usize = 64;
/// Requested size of the receive buffer, in bytes: a tenth of a second of fireflies at full speed.
pub const RECEIVE_BUFFER_SIZE: usize = 32 << 20;

/// How a socket is set up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Requested size of the receive buffer, in bytes. The kernel may give less.
    pub receive_buffer: usize,
    /// Whether several sockets share the address: the kernel distributes senders among them.
    pub reuse_port: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            receive_buffer: RECEIVE_BUFFER_SIZE,
            reuse_port: false,
        }
    }
}

/// A bound UDP socket.
pub struct Receiver {
    socket: OwnedFd,
    is_ipv6: bool,
    /// The kernel's count of dropped datagrams when it was last read.
    drop_count: u32,
}

/// Memory for the datagrams of one system call. It belongs to the thread that receives.
pub struct ReceiveBuffer {
    /// For sockets of IPv4 and of IPv6: the kernel takes the length of an address that it has written for the room for the next.
    headers: [MultiHeaders<SockaddrStorage>; 2],
    bytes: Vec<u8>,
    max_datagram_size: usize,
}

impl ReceiveBuffer {
    /// A buffer for datagrams of up to `max_datagram_size` bytes.
    pub fn new(max_datagram_size: usize) -> ReceiveBuffer {
        ReceiveBuffer {
            headers: [(); 2].map(|()| MultiHeaders::preallocate(MAX_BATCH_SIZE, None)),
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
        Receiver::bind_with(address, Options::default())
    }

    /// Binds a socket with these options.
    pub fn bind_with(address: SocketAddr, options: Options) -> io::Result<Receiver> {
        let family = match address.ip() {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Datagram, flags, None)?;
        if address.ip().is_unspecified() && address.is_ipv6() {
            setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
        }
        set_receive_buffer_size(&socket, options.receive_buffer)?;
        if options.reuse_port {
            setsockopt(&socket, sockopt::ReusePort, &true)?;
        }
        bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
        Ok(Receiver {
            socket,
            is_ipv6: address.is_ipv6(),
            drop_count: 0,
        })
    }

    /// Takes over a socket if it is bound to this address.
    pub fn adopt(socket: OwnedFd, address: SocketAddr) -> Option<Receiver> {
        let bound: SockaddrStorage = getsockname(socket.as_raw_fd()).ok()?;
        let mut receiver = Receiver {
            socket,
            is_ipv6: address.is_ipv6(),
            drop_count: 0,
        };
        // Earlier drops are not counted: they belong to the predecessor.
        receiver.take_dropped();
        (bound == SockaddrStorage::from(address)).then_some(receiver)
    }

    /// The size of the receive buffer in bytes, as it was requested: the kernel doubles it for its own use.
    pub fn receive_buffer_size(&self) -> io::Result<usize> {
        Ok(getsockopt(&self.socket, sockopt::RcvBuf)? / 2)
    }

    /// Requests another size of the receive buffer, in bytes. The kernel may give less.
    pub fn set_receive_buffer_size(&self, bytes: usize) {
        let _ = set_receive_buffer_size(&self.socket, bytes);
    }

    /// Whether other sockets may share the address.
    pub fn shares_port(&self) -> bool {
        getsockopt(&self.socket, sockopt::ReusePort).unwrap_or(false)
    }

    /// Joins a multicast group on an interface, by default the one of the route to the group, and receives no other groups that this host has joined. Joining twice is
    /// no error.
    ///
    /// # Errors
    ///
    /// The interface does not exist, or the group is not a multicast address of the family of the socket.
    pub fn join(&self, group: IpAddr, interface: Option<&str>) -> io::Result<()> {
        let index = interface.map_or(Ok(0), nix::net::if_::if_nametoindex)?;
        let joined = match group {
            IpAddr::V6(group) => {
                // Not known before Linux 4.20; the socket then also receives other groups that this host has joined.
                let _ = self.set_option(libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_ALL, &0i32);
                let request = libc::ipv6_mreq {
                    ipv6mr_multiaddr: libc::in6_addr {
                        s6_addr: group.octets(),
                    },
                    ipv6mr_interface: index,
                };
                self.set_option(libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &request)
            }
            IpAddr::V4(group) => {
                self.set_option(libc::IPPROTO_IP, libc::IP_MULTICAST_ALL, &0i32)?;
                let request = libc::ip_mreqn {
                    imr_multiaddr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(group.octets()),
                    },
                    imr_address: libc::in_addr { s_addr: 0 },
                    imr_ifindex: index as libc::c_int,
                };
                self.set_option(libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &request)
            }
        };
        match joined {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => Ok(()),
            joined => joined,
        }
    }

    fn set_option<T>(&self, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
        // SAFETY: `value` is a structure that the kernel reads for this option, of the length that is given.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                level,
                name,
                std::ptr::from_ref(value).cast(),
                size_of::<T>() as libc::socklen_t,
            )
        };
        nix::errno::Errno::result(result)
            .map(drop)
            .map_err(io::Error::from)
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
            &mut buffer.headers[usize::from(self.is_ipv6)],
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

/// Beyond the system's limit only with the privilege; a buffer that is larger already stays as it is.
fn set_receive_buffer_size(socket: &OwnedFd, bytes: usize) -> nix::Result<()> {
    let before = getsockopt(socket, sockopt::RcvBuf)? / 2;
    if bytes <= before || setsockopt(socket, sockopt::RcvBufForce, &bytes).is_ok() {
        return Ok(());
    }
    let limit = std::fs::read_to_string("/proc/sys/net/core/rmem_max");
    let limit = limit.ok().and_then(|limit| limit.trim().parse().ok());
    match limit.unwrap_or(usize::MAX) > before {
        true => setsockopt(socket, sockopt::RcvBuf, &bytes),
        false => Ok(()),
    }
}

impl AsRawFd for Receiver {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
