//! Listening sockets and streams, TCP and Unix.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use mio::event::Source;
use mio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use mio::{Interest, Registry, Token};

use crate::event::Sender;
use crate::sys::directory::Directory;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

/// A bound socket that clients connect to.
pub enum Listener {
    /// TCP.
    Tcp(TcpListener),
    /// A Unix socket and its path.
    Unix(UnixListener, UnixPath),
}

/// The path of a Unix socket. Dropping it removes the file.
pub struct UnixPath(Directory, OsString);

impl Drop for UnixPath {
    fn drop(&mut self) {
        let _ = self.0.remove(&self.1);
    }
}

impl Listener {
    /// Listens on a TCP address and port.
    pub fn tcp(address: SocketAddr) -> io::Result<Listener> {
        TcpListener::bind(address).map(Listener::Tcp)
    }

    /// Takes over a listening socket, if it is bound to this address.
    pub fn adopt_tcp(fd: OwnedFd, address: SocketAddr) -> Option<Listener> {
        let listener = std::net::TcpListener::from(fd);
        let is_same = listener.local_addr().ok()? == address;
        listener.set_nonblocking(true).ok()?;
        is_same.then(|| Listener::Tcp(TcpListener::from_std(listener)))
    }

    /// A duplicate of the file descriptor of the socket.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        match self {
            Listener::Tcp(listener) => listener.as_fd().try_clone_to_owned(),
            Listener::Unix(listener, _) => listener.as_fd().try_clone_to_owned(),
        }
    }

    /// Listens on a Unix socket with these permissions. Creates its directory if necessary, and replaces a
    /// socket that no process listens on.
    pub fn unix(path: &Path, mode: u32) -> io::Result<Listener> {
        let (directory, name) = Directory::ensure_parent(path, 0o755)?;
        let place = directory.proc_path(&name);
        if let Ok(metadata) = fs::symlink_metadata(&place) {
            if !metadata.file_type().is_socket() {
                let message = "the file at this path is not a socket";
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
            }
            if std::os::unix::net::UnixStream::connect(&place).is_ok() {
                let message = "another process is listening on it";
                return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
            }
        }
        // Bound under a temporary name until the permissions are set, so that no other user can connect before.
        let mut temporary = name.clone();
        temporary.push(format!(".{}", std::process::id()));
        let _ = directory.remove(&temporary);
        let listener = UnixListener::bind(directory.proc_path(&temporary))?;
        let placed = directory.set_socket_mode(&temporary, mode);
        let placed = placed.and_then(|()| directory.rename(&temporary, &name));
        placed.inspect_err(|_| {
            let _ = directory.remove(&temporary);
        })?;
        Ok(Listener::Unix(listener, UnixPath(directory, name)))
    }

    pub(super) fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Listener::Unix(listener, _) => Ok(Stream::Unix(listener.accept()?.0)),
        }
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Listener::Tcp(listener) => listener,
            Listener::Unix(listener, _) => listener,
        }
    }
}

/// A connection to a client.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    pub(super) fn is_unix(&self) -> bool {
        matches!(self, Stream::Unix(_))
    }

    /// The address of a TCP client, or the user at the other end of a Unix socket.
    pub(super) fn peer(&self) -> Option<Sender> {
        match self {
            Stream::Tcp(stream) => {
                let address = stream.peer_addr().ok()?.ip().to_canonical();
                Some(Sender::Address(address))
            }
            Stream::Unix(stream) => {
                let peer = getsockopt(stream, PeerCredentials).ok()?;
                Some(Sender::User(peer.uid()))
            }
        }
    }

    /// Tells the client that no more data follows.
    pub(super) fn finish(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
        }
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Unix(stream) => stream,
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(buffer),
            Stream::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

macro_rules! source {
    ($name:ident) => {
        impl Source for $name {
            fn register(&mut self, r: &Registry, t: Token, i: Interest) -> io::Result<()> {
                self.source().register(r, t, i)
            }
            fn reregister(&mut self, r: &Registry, t: Token, i: Interest) -> io::Result<()> {
                self.source().reregister(r, t, i)
            }
            fn deregister(&mut self, r: &Registry) -> io::Result<()> {
                self.source().deregister(r)
            }
        }
    };
}
source!(Listener);
source!(Stream);
