//! A connection: reads requests one after the other and writes the responses.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::Handler;
use super::body::BodyReader;
use super::message::{self, Body, Head, Refusal, Request, Response, problem};
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
/// Reads and writes in a row before other connections get their turn. A request, and a part of a response, which cost
/// more, are a turn of their own.
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
    /// How many bytes of `input` are known not to complete a head.
    searched: usize,
    /// A request whose body is incomplete.
    incoming: Option<(Head, BodyReader)>,
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
            searched: 0,
            incoming: None,
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
        let body = self.incoming.as_ref();
        self.input.capacity() + body.map_or(0, |(_, body)| body.buffered_bytes())
    }

    /// Reads, answers and writes as far as possible without blocking.
    pub fn drive(&mut self, handler: &mut dyn Handler, now: Instant) -> Next {
        let mut worked = false;
        for _ in 0..MAX_IO_OPS_PER_TURN {
            let result = match () {
                () if self.sent < self.output.len() => self.write(now),
                () if worked => return Next::Yield,
                () if self.parts.is_some() => {
                    self.next_part(now);
                    worked = true;
                    continue;
                }
                () if self.finished => self.discard(),
                () if self.closing => self.finish(now),
                () => match self.next_request(handler, now) {
                    Ok(Some((request, head))) => {
                        let response = handler.handle(&request);
                        self.respond(response, &head, now);
                        worked = true;
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
            } else if self.incoming.is_none() {
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
            let idle = self.input.is_empty() && self.incoming.is_none();
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

    /// The next request, if it is complete. One that the handler does not admit is answered before its body is read.
    fn next_request(
        &mut self,
        handler: &mut dyn Handler,
        now: Instant,
    ) -> Result<Option<(Request, Head)>, Refusal> {
        if self.incoming.is_none() {
            let Some(mut head) = self.next_head()? else {
                return Ok(None);
            };
            let body = BodyReader::new(head.framing);
            if let Some(response) = handler.refuse(&head.request) {
                head.keep_alive &= body.is_complete();
                self.respond(response, &head, now);
                return Ok(None);
            }
            if head.expects_continue && !body.is_complete() && self.input.is_empty() {
                self.output
                    .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            self.incoming = Some((head, body));
        }
        let Some((_, body)) = &mut self.incoming else {
            return Ok(None);
        };
        let taken = body.take(&self.input)?;
        self.input.drain(..taken);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        let complete = self.incoming.take_if(|(_, body)| body.is_complete());
        Ok(complete.map(|(mut head, body)| {
            let mut request = std::mem::take(&mut head.request);
            request.body = body.into_body();
            (request, head)
        }))
    }

    /// The head of the next request, if it is complete. It is parsed when it begins, so that the rubbish of another
    /// protocol is refused at once, and when its empty line has arrived.
    fn next_head(&mut self) -> Result<Option<Head>, Refusal> {
        // A client may send an empty line after the previous body (RFC 9112, section 2.2).
        let is_line_end = |byte: &&u8| matches!(byte, b'\r' | b'\n');
        let empty = self.input.iter().take_while(is_line_end).count();
        if empty > 0 {
            self.input.drain(..empty);
            self.searched = 0;
        }
        if self.input.is_empty() {
            return Ok(None);
        }
        let begins = self.searched == 0;
        // The last three bytes may be the beginning of the empty line.
        let unseen = &self.input[self.searched.saturating_sub(3)..];
        let ends = memchr::memmem::find(unseen, b"\n\r\n").is_some()
            || memchr::memmem::find(unseen, b"\n\n").is_some();
        self.searched = self.input.len();
        if !begins && !ends && self.input.len() < message::MAX_HEAD_BYTES {
            return Ok(None);
        }
        let Some(mut head) = message::head(&self.input)? else {
            return Ok(None);
        };
        self.searched = 0;
        self.input.drain(..head.length);
        head.request.is_unix = self.stream.is_unix();
        head.request.peer = self.stream.peer();
        Ok(Some(head))
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
        self.incoming = None;
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
