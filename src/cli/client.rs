//! Queries the running daemon through its control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::access;
use super::terminal::escaped;
use crate::config::{Config, control_socket};
use crate::error::{Context, Error, Result};

/// How long the daemon may send nothing.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

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

/// The document at `path` of the daemon behind `socket`.
pub fn get(socket: &Path, path: &str) -> Result<Value> {
    get_within(ANSWER_TIMEOUT, socket, path)
}

fn get_within(timeout: Duration, socket: &Path, path: &str) -> Result<Value> {
    let shown = socket.display();
    let name = || format!("control socket {shown}");
    let mut stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => {
            return Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    Error::Failed(format!("no daemon listens on {shown} (controlSocket)"))
                }
                io::ErrorKind::PermissionDenied => access::denied(name(), socket),
                _ => Error::Resource {
                    resource: name(),
                    source: error,
                },
            });
        }
    };
    // HTTP/1.0: the answer ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    let mut answer = Vec::new();
    let done = stream
        .set_read_timeout(Some(timeout))
        .and_then(|()| stream.write_all(request.as_bytes()))
        .and_then(|()| stream.read_to_end(&mut answer));
    match done {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let seconds = timeout.as_secs();
            return Err(Error::Failed(format!(
                "{}: the daemon did not answer within {seconds} s",
                name()
            )));
        }
        done => done.context(name)?,
    };
    if answer.is_empty() {
        return Err(Error::Failed(format!(
            "{}: the daemon closed the connection without an answer",
            name()
        )));
    }
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    let (head, body) = answer.split_at(end);
    let document: Value = serde_json::from_slice(body)
        .map_err(|error| Error::Failed(format!("{}: not JSON: {error}", name())))?;
    if head.starts_with(b"HTTP/1.1 200 ") {
        return Ok(document);
    }
    let error = document["error"]
        .as_str()
        .unwrap_or("the daemon refused the request without a reason");
    Err(Error::Failed(escaped(error)))
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
        let error = get_within(Duration::from_secs(1), &path, "/flows").unwrap_err();
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
