//! Queries the running daemon through its control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::access;
use super::terminal::escaped;
use crate::collector::config::{self as collector, CollectorConfig};
use crate::config::{Config, control_socket};
use crate::error::{Context, Error, Result};

/// How long the daemon may send nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Size of the buffer for an answer, in bytes.
const READ_SIZE: usize = 256 << 10;

/// The control socket: `socket` if given, else that of the configuration file. Without either, the file at the default
/// path is used if it exists.
pub fn socket(socket: Option<PathBuf>, config: Option<PathBuf>) -> Result<PathBuf> {
    match (socket, config) {
        (Some(socket), _) => Ok(socket),
        (None, Some(config)) => Ok(Config::load(&config)?.control_socket.path),
        (None, None) => {
            let config = Path::new(crate::config::DEFAULT_PATH);
            match config.exists() {
                true => Ok(Config::load(config)?.control_socket.path),
                false => Ok(control_socket("").into()),
            }
        }
    }
}

/// The control socket of the collector: `socket` if given, else that of the configuration file. Without either, the file at
/// the default path is used if it exists.
pub fn collector_socket(socket: Option<PathBuf>, config: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(socket) = socket {
        return Ok(socket);
    }
    let default = Path::new(collector::DEFAULT_PATH);
    match config.or_else(|| default.exists().then(|| default.to_owned())) {
        Some(config) => Ok(CollectorConfig::load(&config, &[])?.control_socket.path),
        None => Ok(collector::CONTROL_SOCKET.into()),
    }
}

/// The document at `path` of the daemon behind `socket`.
pub fn get(socket: &Path, path: &str) -> Result<Value> {
    request(ANSWER_TIMEOUT, socket, "GET", path)
}

/// The answer of the daemon behind `socket` to a POST request without a body.
pub fn post(socket: &Path, path: &str) -> Result<Value> {
    request(ANSWER_TIMEOUT, socket, "POST", path)
}

fn request(timeout: Duration, socket: &Path, method: &str, path: &str) -> Result<Value> {
    let mut answer = Answer::request(timeout, socket, method, path)?;
    let mut body = Vec::new();
    let read = answer.body.read_to_end(&mut body);
    answer.done(read)?;
    match body.trim_ascii() {
        b"" => Err(answer.missing()),
        body => serde_json::from_slice(body).map_err(|error| answer.invalid(&error)),
    }
}

/// The lines of the document at `path` of the daemon behind `socket`, as they arrive.
pub fn get_lines(socket: &Path, path: &str) -> Result<Answer> {
    Answer::request(ANSWER_TIMEOUT, socket, "GET", path)
}

/// The error that the daemon gives as the `error` of a document.
pub fn refused(error: &Value) -> Error {
    let error = error.as_str();
    Error::Failed(escaped(
        error.unwrap_or("the daemon refused the request without a reason"),
    ))
}

/// The body of a successful answer, which has not been read yet.
pub struct Answer {
    name: String,
    timeout: Duration,
    body: BufReader<UnixStream>,
}

impl Answer {
    fn request(timeout: Duration, socket: &Path, method: &str, path: &str) -> Result<Answer> {
        let shown = socket.display();
        let name = format!("control socket {shown}");
        let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Error::Failed(format!("no daemon listens on {shown} (controlSocket)"))
            }
            io::ErrorKind::PermissionDenied => access::denied(name.clone(), socket),
            _ => Error::Resource {
                resource: name.clone(),
                source: error,
            },
        })?;
        let mut answer = Answer {
            name,
            timeout,
            body: BufReader::with_capacity(READ_SIZE, stream),
        };
        // HTTP/1.0: the answer ends with the connection.
        let request = format!("{method} {path} HTTP/1.0\r\n\r\n");
        let stream = answer.body.get_mut();
        let sent = stream.set_read_timeout(Some(timeout));
        let sent = sent.and_then(|()| stream.write_all(request.as_bytes()));
        answer.done(sent)?;
        let mut status = Vec::new();
        if answer.read_line(&mut status)? == 0 {
            return Err(answer.missing());
        }
        let mut header = Vec::new();
        while answer.read_line(&mut header)? > 0 && !matches!(&header[..], b"\r\n" | b"\n") {
            header.clear();
        }
        if status.starts_with(b"HTTP/1.1 200 ") {
            return Ok(answer);
        }
        let mut body = Vec::new();
        let read = answer.body.read_to_end(&mut body);
        answer.done(read)?;
        let document: Value =
            serde_json::from_slice(&body).map_err(|error| answer.invalid(&error))?;
        Err(refused(&document["error"]))
    }

    /// Appends the next line to `line`, with its newline. Returns its length, which is 0 at the end.
    pub fn read_line(&mut self, line: &mut Vec<u8>) -> Result<usize> {
        let read = self.body.read_until(b'\n', line);
        self.done(read)
    }

    fn missing(&self) -> Error {
        Error::Failed(format!(
            "{}: the daemon closed the connection without an answer",
            self.name
        ))
    }

    /// The error of an answer that is not the expected document.
    pub fn invalid(&self, error: &dyn std::fmt::Display) -> Error {
        Error::Failed(format!("{}: not JSON: {error}", self.name))
    }

    fn done<T>(&self, result: io::Result<T>) -> Result<T> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let seconds = self.timeout.as_secs();
                Err(Error::Failed(format!(
                    "{}: the daemon did not answer within {seconds} s",
                    self.name
                )))
            }
            result => result.context(|| self.name.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_silent_daemon_is_reported_after_the_timeout() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let error = request(Duration::from_secs(1), &path, "GET", "/flows").unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "control socket {}: the daemon did not answer within 1 s",
                path.display()
            )
        );
        drop(listener);
    }
}
