//! `flowd-rs collect`: the collector.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::{ArgsInfo, FromArgs};
use log::LevelFilter;

use super::Logging;
use crate::collector;
use crate::collector::config::{CollectorConfig, DEFAULT_PATH};
use crate::error::Result;

/// Run the collector in the foreground until SIGTERM or SIGINT.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "collect", help_triggers("-h", "--help", "help"))]
pub struct Collect {
    /// configuration file (default: /etc/flowd/collector.cfg)
    #[argh(
        option,
        short = 'c',
        arg_name = "file",
        default = "DEFAULT_PATH.into()"
    )]
    config: PathBuf,

    /// define a macro of the filter, name=value; it overrides that of the file
    #[argh(option, short = 'D', arg_name = "name=value", from_str_fn(definition))]
    define: Vec<(String, String)>,

    /// the same as --log-level debug
    #[argh(switch, short = 'd')]
    debug: bool,

    /// error, warn, info, debug or trace; overrides the configuration file
    #[argh(option, arg_name = "level", from_str_fn(super::log_level))]
    log_level: Option<LevelFilter>,

    /// start each line of the log with the time
    #[argh(switch)]
    log_time: bool,
}

/// A definition of a macro.
pub fn definition(word: &str) -> std::result::Result<(String, String), String> {
    match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!(
            "\"{}\" is not a definition, expected name=value",
            word.escape_debug()
        )),
    }
}

impl Collect {
    pub fn run(self, mut logging: Logging) -> Result<ExitCode> {
        let macros = self.define;
        let load = move |path: &Path| CollectorConfig::load(path, &macros);
        let config = load(&self.config)?;
        let debug = self.debug.then_some(LevelFilter::Debug);
        logging.level = self.log_level.or(debug).or(logging.level);
        logging.time |= self.log_time;
        logging.start(config.log_level);
        collector::run(config, &self.config, Box::new(load), logging.level)
    }
}
