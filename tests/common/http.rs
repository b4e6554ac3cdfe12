//! An HTTP client of the daemon, on a connection that is kept open.
#![allow(dead_code, missing_docs)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use super::net::NetNs;
use super::{DEADLINE, wait_for};

pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

pub struct Client {
    stream: BufReader<Box<dyn Stream>>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    pub fn error(&self) -> String {
        self.json()["error"].as_str().unwrap().to_owned()
    }
}

pub fn connect(ns: &NetNs, address: &str) -> TcpStream {
    let stream = wait_for("a connection", || {
        ns.enter(|| TcpStream::connect(address)).ok()
    });
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

impl Client {
    pub fn tcp(ns: &NetNs, address: &str) -> Client {
        Client::new(connect(ns, address))
    }

    pub fn unix(path: &Path) -> Client {
        let stream = wait_for("a connection", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Client::new(stream)
    }

    pub fn new(stream: impl Stream + 'static) -> Client {
        Client {
            stream: BufReader::new(Box::new(stream)),
        }
    }

    pub fn get(&mut self, path: &str) -> Answer {
        self.request("GET", path, "", "")
    }

    pub fn post(&mut self, path: &str, body: &str) -> Answer {
        self.request("POST", path, "", body)
    }

    /// `headers` are complete lines, each with its CRLF; those that are not given have usual values.
    pub fn request(&mut self, method: &str, path: &str, headers: &str, body: &str) -> Answer {
        let mut headers = headers.to_owned();
        for (name, value) in [
            ("Host", "localhost"),
            ("Content-Type", "application/json"),
            ("Content-Length", &body.len().to_string()),
        ] {
            if !headers.to_lowercase().contains(&name.to_lowercase()) {
                headers += &format!("{name}: {value}\r\n");
            }
        }
        let request = format!("{method} {path} HTTP/1.1\r\n{headers}\r\n{body}");
        self.raw(request.as_bytes());
        self.answer()
    }

    /// A write error is ignored: the daemon may have refused the request and closed the connection.
    pub fn raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.get_mut().write_all(bytes);
    }

    pub fn answer(&mut self) -> Answer {
        self.try_answer().expect("an answer")
    }

    /// Reads status line and headers, up to the empty line.
    pub fn headers(&mut self) -> String {
        let mut headers = String::new();
        while !headers.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut headers).unwrap_or(0) == 0 {
                break;
            }
        }
        headers
    }

    pub fn try_answer(&mut self) -> Option<Answer> {
        let headers = self.headers();
        let status = headers.split(' ').nth(1)?.parse().ok()?;
        let lower = headers.to_lowercase();
        let mut body = Vec::new();
        if let Some((_, rest)) = lower.split_once("content-length: ") {
            body.resize(rest.split("\r\n").next()?.parse().ok()?, 0);
            self.stream.read_exact(&mut body).ok()?;
        } else if lower.contains("transfer-encoding: chunked") {
            loop {
                let mut size = String::new();
                self.stream.read_line(&mut size).ok()?;
                let size = usize::from_str_radix(size.trim(), 16).ok()?;
                let at = body.len();
                body.resize(at + size + 2, 0);
                self.stream.read_exact(&mut body[at..]).ok()?;
                body.truncate(at + size);
                if size == 0 {
                    break;
                }
            }
        }
        let body = String::from_utf8(body).unwrap();
        Some(Answer {
            status,
            headers,
            body,
        })
    }
}
