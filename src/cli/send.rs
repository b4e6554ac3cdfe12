//! `flowd-rs send`: a line for the named pipe, checked.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};
use jiff::Timestamp;
use nix::libc;

use crate::config::{Config, DEFAULT_PATH, PIPE_PATH};
use crate::error::{Context, Error, Result};
use crate::pipe_line;

/// Tell the daemon through the named pipe that a transfer starts or ends.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "send", help_triggers("-h", "--help", "help"))]
pub struct Send {
    /// configuration file, for its pipePath (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c')]
    config: Option<PathBuf>,

    /// the named pipe
    #[argh(option)]
    pipe: Option<PathBuf>,

    /// start or end
    #[argh(positional)]
    state: String,

    /// tcp or udp
    #[argh(positional)]
    protocol: String,

    /// address, IPv4 or IPv6
    #[argh(positional)]
    source: String,

    /// port, 1 to 65535
    #[argh(positional)]
    source_port: String,

    /// address, IPv4 or IPv6
    #[argh(positional)]
    destination: String,

    /// port, 1 to 65535
    #[argh(positional)]
    destination_port: String,

    /// experiment and activity, by id or name; an end may go without
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
            .map_err(|error| complaint(&path, error))?;
        if !fs::metadata(&path).is_ok_and(|found| found.file_type().is_fifo()) {
            return Err(Error::Failed(format!(
                "{shown} is no named pipe: no daemon reads it"
            )));
        }
        // Shorter than PIPE_BUF: all of it or nothing.
        pipe.write_all(line.as_bytes())
            .context(|| format!("named pipe {shown}"))?;
        println!("sent to {shown}, which a daemon reads: {}", line.trim_end());
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
                let expected =
                    "expected an experiment and an activity after the destination's port";
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
        // A name may have spaces on the command line; in the line `_` stands for them.
        let line = fields
            .map(|field| field.trim().replace(char::is_whitespace, "_"))
            .join(" ");
        let registry = super::registry::known(self.config.as_deref());
        match pipe_line::parse(line.as_bytes(), &registry, Timestamp::now()) {
            Ok(Some(_)) => Ok(line + "\n"),
            Ok(None) => Err(Error::Usage("nothing to send".to_owned())),
            Err(error) => Err(Error::Usage(error.to_string())),
        }
    }
}

fn complaint(path: &Path, error: io::Error) -> Error {
    let shown = path.display();
    match error.raw_os_error() {
        Some(libc::ENXIO) => Error::Failed(format!(
            "nobody reads the named pipe {shown}: no daemon is running"
        )),
        Some(libc::ENOENT) => Error::Failed(format!(
            "there is no named pipe {shown}: no daemon is running"
        )),
        _ => Error::Resource {
            what: format!("named pipe {shown}"),
            source: error,
        },
    }
}
