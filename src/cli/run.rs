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
    #[argh(option, short = 'c', default = "DEFAULT_PATH.into()")]
    config: PathBuf,

    /// log at level debug, one line a flow event
    #[argh(switch, short = 'd')]
    debug: bool,

    /// stay in the foreground, which it does anyway; accepted because flowd has it
    #[argh(switch, short = 'f', long = "fg")]
    #[allow(dead_code)]
    foreground: bool,

    /// error, warn, info, debug or trace; stronger than the configuration
    #[argh(option, from_str_fn(super::log_level))]
    log_level: Option<LevelFilter>,

    /// put the time in front of each line of the log
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
