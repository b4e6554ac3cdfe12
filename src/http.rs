//! A small HTTP/1.1 server (RFC 9112) for the daemon's own routes, over TCP and Unix sockets.
//!
//! One thread and one poll loop serve all connections, so that a client that is silent, slow or sends
//! without end costs a bounded buffer and no thread. What is bounded: the size of a request, the time
//! that it takes to arrive, the time that a response takes to leave, the number of connections (beyond
//! it, who has kept silent the longest goes), and the bytes that all requests together hold.

mod connection;
mod message;
mod socket;

pub use message::{Body, Request, Response, problem};
pub use socket::{Listener, UnixPath};

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use slab::Slab;

use crate::sys::stop::Stop;
use connection::{Connection, Next};

/// Connections at once.
const CONNECTIONS: usize = 256;
/// Bytes that requests which have not arrived in full may hold together.
const BUFFERED: usize = 8 << 20;
/// How long a stop waits for answers that are under way.
const LAST_ANSWERS: Duration = Duration::from_millis(100);
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(250);
/// Tokens of listeners count down from here, those of connections up from 0.
const STOP: Token = Token(usize::MAX);

/// What answers requests. It must not take long: it holds up all other clients.
pub trait Handler {
    /// The answer to a request.
    fn handle(&mut self, request: &Request) -> Response;
}

/// A server with its sockets bound.
pub struct Server {
    poll: Poll,
    listeners: Vec<Listener>,
}

impl Server {
    /// Serves these listeners.
    pub fn new(mut listeners: Vec<Listener>) -> io::Result<Server> {
        let poll = Poll::new()?;
        for (index, listener) in listeners.iter_mut().enumerate() {
            let token = Token(STOP.0 - 1 - index);
            poll.registry()
                .register(listener, token, Interest::READABLE)?;
        }
        Ok(Server { poll, listeners })
    }

    /// Serves until it is time to stop. An error of one connection ends that one only.
    pub fn run(mut self, handler: &mut dyn Handler, stop: Stop) -> io::Result<()> {
        self.poll.registry().register(
            &mut SourceFd(&stop.as_raw_fd()),
            STOP,
            Interest::READABLE,
        )?;
        let mut events = Events::with_capacity(CONNECTIONS);
        let mut connections: Slab<Connection> = Slab::with_capacity(16);
        let mut ready: Vec<usize> = Vec::new();
        let mut deadline = None;
        loop {
            // What has come is answered; who comes now waits for whoever takes over the listener.
            let stopping = stop.is_set();
            if stopping {
                let deadline = *deadline.get_or_insert(Instant::now() + LAST_ANSWERS);
                if connections.is_empty() || Instant::now() >= deadline {
                    return Ok(());
                }
            }
            let patience = match () {
                () if !ready.is_empty() => Duration::ZERO,
                () if stopping => LAST_ANSWERS / 10,
                () => TICK,
            };
            match self.poll.poll(&mut events, Some(patience)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            let now = Instant::now();
            for event in &events {
                match event.token() {
                    STOP => {}
                    Token(key) if key < CONNECTIONS => ready.push(key),
                    Token(_) if stopping => {}
                    Token(token) => self.accept(STOP.0 - 1 - token, &mut connections, &mut ready),
                }
            }
            ready.sort_unstable();
            ready.dedup();
            for key in std::mem::take(&mut ready) {
                let Some(connection) = connections.get_mut(key) else {
                    continue;
                };
                match connection.drive(handler, now) {
                    Next::Wait => {}
                    Next::Again => ready.push(key),
                    Next::Close => drop(connections.remove(key)),
                }
                bound(&mut connections);
            }
            connections.retain(|_, connection| !connection.is_overdue(now));
        }
    }

    fn accept(&self, index: usize, connections: &mut Slab<Connection>, ready: &mut Vec<usize>) {
        let Some(listener) = self.listeners.get(index) else {
            return;
        };
        loop {
            let mut stream = match listener.accept() {
                Ok(stream) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // Out of file descriptors, or a client that has gone again.
                    log::debug!("http: accept: {error}");
                    if !make_room(connections) {
                        return;
                    }
                    continue;
                }
            };
            if connections.len() >= CONNECTIONS {
                make_room(connections);
            }
            let entry = connections.vacant_entry();
            let (key, interests) = (entry.key(), Interest::READABLE | Interest::WRITABLE);
            let registered = self
                .poll
                .registry()
                .register(&mut stream, Token(key), interests);
            if registered.is_ok() {
                entry.insert(Connection::new(stream, Instant::now()));
                ready.push(key);
            }
        }
    }
}

/// Closes the connections that hold the most as long as all together hold too much.
fn bound(connections: &mut Slab<Connection>) {
    while connections.iter().map(|(_, c)| c.held()).sum::<usize>() > BUFFERED {
        let largest = connections.iter().max_by_key(|(_, c)| c.held());
        let Some((key, _)) = largest else { return };
        connections.remove(key);
    }
}

/// Closes the connection that has waited the longest for its client.
fn make_room(connections: &mut Slab<Connection>) -> bool {
    let oldest = connections.iter().min_by_key(|(_, c)| c.waiting_since());
    let oldest = oldest.map(|(key, _)| key);
    oldest.is_some_and(|key| {
        connections.remove(key);
        true
    })
}
