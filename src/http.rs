//! A small HTTP/1.1 server (RFC 9112) for the daemon's own routes, over TCP and Unix sockets.
//!
//! One thread and one poll loop serve all connections, so that a silent, slow or endlessly sending client
//! costs a bounded buffer and no thread. Limits apply to the size of a request, the time to receive it, the
//! time to send a response, the number of connections (beyond it, the one that has waited longest for its
//! client is closed), and the total size of the buffers of incomplete requests.

mod body;
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
const MAX_CONNECTIONS: usize = 256;
/// Size of the buffers of all incomplete requests together, in bytes.
const MAX_BUFFERED_BYTES: usize = 8 << 20;
/// How long a stop waits for responses in progress.
const SHUTDOWN_DRAIN: Duration = Duration::from_millis(100);
/// How often the deadlines of connections are checked.
const DEADLINE_CHECK_INTERVAL: Duration = Duration::from_millis(250);
/// Tokens of listeners count down from this one, those of connections count up from 0.
const STOP: Token = Token(usize::MAX);

/// Answers requests. It must be fast: all other clients wait meanwhile.
pub trait Handler {
    /// The response to a request that is refused for its head alone: its body, which is still empty, is not read.
    fn refuse(&mut self, _head: &Request) -> Option<Response> {
        None
    }

    /// The response to a request.
    fn handle(&mut self, request: &Request) -> Response;
}

/// A server whose sockets are bound.
pub struct Server {
    poll: Poll,
    listeners: Vec<Listener>,
}

impl Server {
    /// A server for these listeners.
    pub fn new(mut listeners: Vec<Listener>) -> io::Result<Server> {
        let poll = Poll::new()?;
        for (index, listener) in listeners.iter_mut().enumerate() {
            let token = Token(STOP.0 - 1 - index);
            poll.registry()
                .register(listener, token, Interest::READABLE)?;
        }
        Ok(Server { poll, listeners })
    }

    /// Serves until `stop` is set. An error on a connection closes only that one.
    pub fn run(mut self, handler: &mut dyn Handler, stop: Stop) -> io::Result<()> {
        self.poll.registry().register(
            &mut SourceFd(&stop.as_raw_fd()),
            STOP,
            Interest::READABLE,
        )?;
        let mut events = Events::with_capacity(MAX_CONNECTIONS);
        let mut connections: Slab<Connection> = Slab::with_capacity(16);
        let mut ready: Vec<usize> = Vec::new();
        let mut deadline = None;
        loop {
            // Requests that have arrived are answered. New clients wait for the process that takes over the listener.
            let stopping = stop.is_set();
            if stopping {
                let deadline = *deadline.get_or_insert(Instant::now() + SHUTDOWN_DRAIN);
                if connections.is_empty() || Instant::now() >= deadline {
                    return Ok(());
                }
            }
            let timeout = match () {
                () if !ready.is_empty() => Duration::ZERO,
                () if stopping => SHUTDOWN_DRAIN / 10,
                () => DEADLINE_CHECK_INTERVAL,
            };
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            let now = Instant::now();
            for event in &events {
                match event.token() {
                    STOP => {}
                    Token(key) if key < MAX_CONNECTIONS => ready.push(key),
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
                    Next::Yield => ready.push(key),
                    Next::Close => drop(connections.remove(key)),
                }
                enforce_buffer_limit(&mut connections);
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
                    // Out of file descriptors, or the client has already gone.
                    log::debug!("http: accept: {error}");
                    if !make_room(connections) {
                        return;
                    }
                    continue;
                }
            };
            if connections.len() >= MAX_CONNECTIONS {
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

/// Closes connections, those with the largest buffers first, until the total is within the limit.
fn enforce_buffer_limit(connections: &mut Slab<Connection>) {
    while connections
        .iter()
        .map(|(_, c)| c.buffered_bytes())
        .sum::<usize>()
        > MAX_BUFFERED_BYTES
    {
        let largest = connections.iter().max_by_key(|(_, c)| c.buffered_bytes());
        let Some((key, _)) = largest else { return };
        connections.remove(key);
    }
}

/// Closes the connection that has waited longest for its client. Returns whether there was one.
fn make_room(connections: &mut Slab<Connection>) -> bool {
    let oldest = connections.iter().min_by_key(|(_, c)| c.waiting_since());
    let oldest = oldest.map(|(key, _)| key);
    oldest.is_some_and(|key| {
        connections.remove(key);
        true
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::sys::stop::stop;

    /// Answers /short at once and /long in parts, and records both.
    struct Recorder(Arc<Mutex<Vec<&'static str>>>);

    impl Handler for Recorder {
        fn handle(&mut self, request: &Request) -> Response {
            let record = self.0.clone();
            if request.path == "/short" {
                record.lock().unwrap().push("short");
                return problem(200, "");
            }
            let mut left = 20;
            let parts = std::iter::from_fn(move || {
                record.lock().unwrap().push("part");
                left -= 1;
                (left > 0).then(|| b"x".to_vec())
            });
            Response {
                body: Body::Parts(Box::new(parts)),
                ..problem(200, "")
            }
        }
    }

    #[test]
    fn a_part_of_a_response_is_a_turn() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let server = Server::new(vec![Listener::unix(&path, 0o600).unwrap()]).unwrap();
        // Both have sent their requests before the server begins.
        let clients = ["/long", "/short"].map(|target| {
            let mut client = UnixStream::connect(&path).unwrap();
            write!(client, "GET {target} HTTP/1.0\r\n\r\n").unwrap();
            client
        });
        let record = Arc::default();
        let (mut switch, stop) = stop().unwrap();
        let mut handler = Recorder(Arc::clone(&record));
        let thread = std::thread::spawn(move || server.run(&mut handler, stop));
        for mut client in clients {
            client.read_to_end(&mut Vec::new()).unwrap();
        }
        switch.set();
        thread.join().unwrap().unwrap();
        let record = record.lock().unwrap();
        let before = record.iter().position(|entry| *entry == "short").unwrap();
        assert!(before <= 2, "{record:?}");
        assert_eq!(record.len(), 21);
    }
}
