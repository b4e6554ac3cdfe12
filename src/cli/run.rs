//! `flowd-rs run`: the daemon.

use std::path::PathBuf;
use std::process::ExitCode;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use super::Logging;
use crate::config::{Config, DEFAULT_PATH};
use crate::daemon;
use crate::error::Result;

/// Run the daemon in the foreground until SIGTERM or SIGINT.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "run", help_triggers("-h", "--help", "help"))]
pub struct Run {
    /// configuration file (default: /etc/flowd/flowd.cfg)
    #[argh(
        option,
        short = 'c',
        arg_name = "file",
        default = "DEFAULT_PATH.into()"
    )]
    config: PathBuf,

    /// the same as --log-level debug: log each flow event
    #[argh(switch, short = 'd')]
    debug: bool,

    /// accepted for compatibility with flowd; the daemon always stays in the
    /// foreground
    #[argh(switch, short = 'f', long = "fg")]
    #[allow(dead_code)]
    foreground: bool,

    /// error, warn, info, debug or trace; overrides the configuration file
    #[argh(option, arg_name = "level", from_str_fn(super::log_level))]
    log_level: Option<LevelFilter>,

    /// start each line of the log with the time
    #[argh(switch)]
    log_time: bool,
}

impl Run {
    pub fn run(self, mut logging: Logging) -> Result<ExitCode> {
        let config = Config::load(&self.config)?;
        let debug = self.debug.then_some(LevelFilter::Debug);
        logging.level = self.log_level.or(debug).or(logging.level);
        logging.time |= self.log_time;
        logging.start(config.log_level);
        daemon::run(config, &self.config, logging.level)
    }
}
