//! A connection: reads requests one after the other and writes the responses.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::Handler;
use super::message::{self, Body, Framing, Head, Refusal, Request, Response, problem};
use super::socket::Stream;

/// How long a connection may stay open without a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request may take to arrive, counted from its first byte.
const REQUEST_READ_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to send one part of a response, about 64 KiB.
const RESPONSE_WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to drain the client's input after the last response: closing with unread input would reset the connection
/// before the client has read the response.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);
const READ_SIZE: usize = 16 << 10;
/// Reads and writes in a row before other connections get their turn.
const MAX_IO_OPS_PER_TURN: usize = 16;

/// What the server does next with a connection.
pub enum Next {
    /// Wait until its socket is ready.
    Wait,
    /// Drive it again after other connections have had their turn.
    Yield,
    /// Close it.
    Close,
}

pub struct Connection {
    stream: Stream,
    /// Input that has not been processed.
    input: Vec<u8>,
    /// The head of a request whose body is incomplete.
    head: Option<Head>,
    /// Output, of which the first `sent` bytes have been sent.
    output: Vec<u8>,
    sent: usize,
    parts: Option<Parts>,
    /// The current response is the last: no more requests are read.
    closing: bool,
    /// The last response has been sent.
    finished: bool,
    waiting_since: Instant,
    deadline: Instant,
}

struct Parts {
    parts: Box<dyn Iterator<Item = Vec<u8>> + Send>,
    chunked: bool,
}

impl Connection {
    pub fn new(stream: Stream, now: Instant) -> Connection {
        Connection {
            stream,
            input: Vec::new(),
            head: None,
            output: Vec::new(),
            sent: 0,
            parts: None,
            closing: false,
            finished: false,
            waiting_since: now,
            deadline: now + IDLE_TIMEOUT,
        }
    }

    /// Whether a timeout has expired.
    pub fn is_overdue(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    /// Since when the server has waited for the client.
    pub fn waiting_since(&self) -> Instant {
        self.waiting_since
    }

    /// The size of the buffer of an incomplete request, in bytes.
    pub fn buffered_bytes(&self) -> usize {
        self.input.capacity()
    }

    /// Reads, answers and writes as far as possible without blocking.
    pub fn drive(&mut self, handler: &mut dyn Handler, now: Instant) -> Next {
        for _ in 0..MAX_IO_OPS_PER_TURN {
            let result = match () {
                () if self.sent < self.output.len() => self.write(now),
                () if self.parts.is_some() => {
                    self.next_part(now);
                    continue;
                }
                () if self.finished => self.discard(),
                () if self.closing => self.finish(now),
                () => match self.next_request() {
                    Ok(Some(request)) => {
                        let response = handler.handle(&request.0);
                        self.respond(response, &request.1, now);
                        continue;
                    }
                    Ok(None) if self.sent < self.output.len() => continue,
                    Ok(None) => self.read(now),
                    Err(refusal) => {
                        self.refuse(refusal, now);
                        continue;
                    }
                },
            };
            match result {
                Ok(0) => return Next::Close,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Wait,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Next::Close,
            }
        }
        Next::Yield
    }

    fn read(&mut self, now: Instant) -> io::Result<usize> {
        let before = self.input.len();
        self.input.resize(before + READ_SIZE, 0);
        let result = self.stream.read(&mut self.input[before..]);
        let read = *result.as_ref().unwrap_or(&0);
        self.input.truncate(before + read);
        if before == 0 {
            // A silent client occupies no buffer.
            if read == 0 {
                self.input = Vec::new();
            } else if self.head.is_none() {
                self.waiting_since = now;
                self.deadline = now + REQUEST_READ_TIMEOUT;
            }
        }
        result
    }

    fn write(&mut self, now: Instant) -> io::Result<usize> {
        let written = self.stream.write(&self.output[self.sent..])?;
        self.sent += written;
        if self.sent == self.output.len() {
            // An idle connection keeps no large buffer.
            match self.output.capacity() > READ_SIZE && self.parts.is_none() {
                true => self.output = Vec::new(),
                false => self.output.clear(),
            }
            self.sent = 0;
            self.waiting_since = now;
            let idle = self.input.is_empty() && self.head.is_none();
            self.deadline = now
                + if idle {
                    IDLE_TIMEOUT
                } else {
                    REQUEST_READ_TIMEOUT
                };
        }
        Ok(written)
    }

    /// Reads and drops input after the last request, see [`LINGER_TIMEOUT`].
    fn discard(&mut self) -> io::Result<usize> {
        let mut buffer = [0; READ_SIZE];
        self.stream.read(&mut buffer)
    }

    fn finish(&mut self, now: Instant) -> io::Result<usize> {
        self.finished = true;
        self.deadline = now + LINGER_TIMEOUT;
        self.input = Vec::new();
        self.stream.finish().map(|()| 1)
    }

    /// The next request, if it is complete.
    fn next_request(&mut self) -> Result<Option<(Request, Head)>, Refusal> {
        if self.head.is_none() {
            // A client may send an empty line after the previous body (RFC 9112, section 2.2).
            if self.input.starts_with(b"\r\n") {
                self.input.drain(..2);
            }
            if self.input.is_empty() {
                return Ok(None);
            }
            let Some(head) = message::head(&self.input)? else {
                return Ok(None);
            };
            self.input.drain(..head.length);
            if head.expects_continue && head.framing != Framing::Length(0) && self.input.is_empty()
            {
                self.output
                    .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            self.head = Some(head);
        }
        let Some(mut head) = self.head.take() else {
            return Ok(None);
        };
        let Some((body, length)) = message::body(&self.input, head.framing)? else {
            self.head = Some(head);
            return Ok(None);
        };
        self.input.drain(..length);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        let mut request = std::mem::take(&mut head.request);
        request.body = body;
        Ok(Some((request, head)))
    }

    fn respond(&mut self, mut response: Response, head: &Head, now: Instant) {
        self.closing = !head.keep_alive;
        let body = std::mem::replace(&mut response.body, Body::Whole(Vec::new()));
        match body {
            Body::Whole(bytes) => {
                message::put_head(&mut self.output, &response, Some(bytes.len()), self.closing);
                if !head.head_only {
                    self.output.extend_from_slice(&bytes);
                }
            }
            Body::Parts(parts) => {
                // HTTP/1.0 has no chunks: the body ends when the connection is closed.
                self.closing |= !head.http_1_1;
                let chunked = !self.closing;
                message::put_head(&mut self.output, &response, None, self.closing);
                if !head.head_only {
                    self.parts = Some(Parts { parts, chunked });
                }
            }
        }
        self.deadline = now + RESPONSE_WRITE_TIMEOUT;
    }

    fn refuse(&mut self, refusal: Refusal, now: Instant) {
        self.closing = true;
        let response = problem(refusal.status, refusal.error);
        if let Body::Whole(bytes) = &response.body {
            message::put_head(&mut self.output, &response, Some(bytes.len()), true);
            self.output.extend_from_slice(bytes);
        }
        self.deadline = now + RESPONSE_WRITE_TIMEOUT;
    }

    fn next_part(&mut self, now: Instant) {
        let Some(Parts { parts, chunked }) = &mut self.parts else {
            return;
        };
        self.deadline = now + RESPONSE_WRITE_TIMEOUT;
        // An empty chunk would end the body.
        let part = parts.find(|part| !part.is_empty());
        if *chunked {
            let size = part.as_ref().map_or(0, Vec::len);
            self.output
                .extend_from_slice(format!("{size:x}\r\n").as_bytes());
        }
        if let Some(part) = &part {
            self.output.extend_from_slice(part);
        }
        if *chunked {
            self.output.extend_from_slice(b"\r\n");
        }
        if part.is_none() {
            self.parts = None;
        }
    }
}
