//! `flowd-rs config`: what a configuration file says, without starting anything.

use std::path::PathBuf;

use argh::FromArgs;

use crate::config::DEFAULT_PATH;
use crate::error::Result;

/// Look at a configuration file.
#[derive(FromArgs)]
#[argh(subcommand, name = "config", help_triggers("-h", "--help", "help"))]
pub struct Config {
    #[argh(subcommand)]
    command: Command,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Command {
    Check(Check),
}

/// Check a configuration file: exit code 0 if the daemon would take it, 2 if not.
#[derive(FromArgs)]
#[argh(subcommand, name = "check", help_triggers("-h", "--help", "help"))]
struct Check {
    /// configuration file (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', default = "DEFAULT_PATH.into()")]
    config: PathBuf,
}

impl Config {
    pub fn run(self) -> Result<()> {
        let Command::Check(check) = self.command;
        let config = crate::config::Config::load(&check.config)?;
        println!("{}: good", check.config.display());
        for warning in &config.warnings {
            println!("warning: {warning}");
        }
        for note in &config.notes {
            println!("note: {note}");
        }
        Ok(())
    }
}
