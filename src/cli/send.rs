//! `flowd-rs send`: checks a line and writes it to the named pipe.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};
use jiff::Timestamp;
use nix::libc;

use super::access;
use crate::config::{Config, DEFAULT_PATH, PIPE_PATH};
use crate::error::{Error, Result};
use crate::plugins::named_pipe::line;

/// Report the start or end of a transfer through the named pipe.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "send", help_triggers("-h", "--help", "help"))]
pub struct Send {
    /// configuration file that names the pipe (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// the named pipe
    #[argh(option, arg_name = "path")]
    pipe: Option<PathBuf>,

    /// start or end
    #[argh(positional)]
    state: String,

    /// tcp or udp
    #[argh(positional)]
    protocol: String,

    /// IPv4 or IPv6 address
    #[argh(positional)]
    source: String,

    /// port, 1 to 65535
    #[argh(positional, arg_name = "source-port")]
    source_port: String,

    /// IPv4 or IPv6 address
    #[argh(positional)]
    destination: String,

    /// port, 1 to 65535
    #[argh(positional, arg_name = "destination-port")]
    destination_port: String,

    /// experiment and activity, by id or name; optional for an end
    #[argh(positional, arg_name = "tag")]
    tag: Vec<String>,
}

impl Send {
    pub fn run(self) -> Result<()> {
        let path = self.path()?;
        let line = self.line()?;
        let shown = path.display();
        let mut pipe = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|error| open_error(&path, error))?;
        if !fs::metadata(&path).is_ok_and(|metadata| metadata.file_type().is_fifo()) {
            return Err(Error::Failed(format!(
                "{shown} is not a named pipe: no daemon reads it"
            )));
        }
        // Shorter than PIPE_BUF: the pipe takes all of it or nothing.
        pipe.write_all(line.as_bytes())
            .map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => Error::Failed(format!(
                    "named pipe {shown} is full: the daemon does not read it fast enough; nothing was sent"
                )),
                _ => resource_error(&path, error),
            })?;
        println!("sent to {shown} (a daemon is reading): {}", line.trim_end());
        Ok(())
    }

    fn path(&self) -> Result<PathBuf> {
        if let Some(pipe) = &self.pipe {
            return Ok(pipe.clone());
        }
        let default = Path::new(DEFAULT_PATH);
        let config = match &self.config {
            Some(config) => config,
            None if default.exists() => default,
            None => return Ok(PIPE_PATH.into()),
        };
        match Config::load(config)?.named_pipe {
            Some(pipe) => Ok(pipe.path),
            None => Err(Error::Failed(format!(
                "{}: plugins.namedPipe is not enabled",
                config.display()
            ))),
        }
    }

    fn line(&self) -> Result<String> {
        let (experiment, activity) = match self.tag.as_slice() {
            [experiment, activity] => (experiment.as_str(), activity.as_str()),
            [] if self.state.eq_ignore_ascii_case("end") => ("0", "0"),
            _ => {
                let expected = "expected an experiment and an activity after the destination port";
                return Err(Error::Usage(expected.to_owned()));
            }
        };
        let fields = [
            self.state.as_str(),
            &self.protocol,
            &self.source,
            &self.source_port,
            &self.destination,
            &self.destination_port,
            experiment,
            activity,
        ];
        // Names may contain spaces on the command line; in the line of the pipe `_` replaces them.
        let line = fields
            .map(|field| field.trim().replace(char::is_whitespace, "_"))
            .join(" ");
        let registry = super::registry::load(self.config.as_deref());
        match line::parse(line.as_bytes(), &registry, Timestamp::now()) {
            Ok(Some(_)) => Ok(line + "\n"),
            Ok(None) => Err(Error::Usage("nothing to send".to_owned())),
            Err(error) => Err(Error::Usage(error.to_string())),
        }
    }
}

fn open_error(path: &Path, error: io::Error) -> Error {
    let shown = path.display();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Error::Failed(format!(
            "nothing reads the named pipe {shown}: no daemon is running, or it uses another pipe (plugins.namedPipe.pipePath)"
        )),
        Some(libc::ENOENT) => Error::Failed(format!(
            "there is no named pipe {shown}: no daemon is running, or it uses another pipe (plugins.namedPipe.pipePath)"
        )),
        Some(libc::EACCES) => access::denied(format!("named pipe {shown}"), path),
        _ => resource_error(path, error),
    }
}

fn resource_error(path: &Path, error: io::Error) -> Error {
    Error::Resource {
        resource: format!("named pipe {}", path.display()),
        source: error,
    }
}
