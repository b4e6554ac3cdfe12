//! Asks the running daemon through its control socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::config::{Config, control_socket};
use crate::error::{Context, Error, Result};

/// How long the daemon may keep silent.
const PATIENCE: Duration = Duration::from_secs(10);

/// The socket that the command line names, or else the configuration. A configuration that is not
/// there says nothing, unless it was named.
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
    let shown = socket.display();
    let mut stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::Failed(format!("no daemon listens on {shown} (controlSocket)"))
        }
        _ => Error::Resource {
            what: format!("control socket {shown}"),
            source: error,
        },
    })?;
    let what = || format!("control socket {shown}");
    // HTTP/1.0: the answer ends with the connection.
    let request = format!("GET {path} HTTP/1.0\r\n\r\n");
    let mut answer = Vec::new();
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.write_all(request.as_bytes()))
        .and_then(|()| stream.read_to_end(&mut answer))
        .context(what)?;
    let end = memchr::memmem::find(&answer, b"\r\n\r\n").map_or(answer.len(), |at| at + 4);
    let (head, body) = answer.split_at(end);
    let document: Value = serde_json::from_slice(body)
        .map_err(|error| Error::Failed(format!("{}: not JSON: {error}", what())))?;
    if head.starts_with(b"HTTP/1.1 200 ") {
        return Ok(document);
    }
    let error = document["error"]
        .as_str()
        .unwrap_or("an answer that is no error text");
    Err(Error::Failed(error.to_owned()))
}
