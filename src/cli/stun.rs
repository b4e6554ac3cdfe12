//! `flowd-rs stun`: looks up the public addresses of this host.

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use crate::backends::firefly::public_addresses::{Mapping, discover};
use crate::config::{Config, DEFAULT_PATH};
use crate::error::{Error, Result};

/// Look up the public addresses of this host, step by step.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "stun", help_triggers("-h", "--help", "help"))]
pub struct Stun {
    #[argh(subcommand)]
    command: Command,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    Sample(Sample),
}

/// Look up the public addresses as the daemon would, and print each step.
#[derive(ArgsInfo, FromArgs)]
#[argh(
    subcommand,
    name = "sample",
    help_triggers("-h", "--help", "help"),
    note = "The exit code is 1 if no public address is found for a private address."
)]
struct Sample {
    /// configuration file with backends.firefly.stun (default:
    /// /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,
}

impl Stun {
    pub fn run(self) -> Result<()> {
        let Command::Sample(sample) = self.command;
        let path = sample.config.unwrap_or_else(|| DEFAULT_PATH.into());
        let firefly = Config::load(&path)?.firefly;
        let settings = firefly.and_then(|firefly| firefly.stun);
        let settings = settings.unwrap_or_else(|| {
            let path = path.display();
            println!("{path}: backends.firefly.stun (IP_DISCOVERY_ENABLED) is not enabled; using its defaults");
            Config::default_stun()
        });
        let known = Mapping::new();
        let (mapping, missing) = discover(&settings, &known, &|| false, |step| println!("{step}"));
        for (private, public) in &mapping {
            println!("{private} -> {public}");
        }
        match missing {
            true => Err(Error::Failed(
                "no public address found for at least one private address".to_owned(),
            )),
            false => Ok(()),
        }
    }
}
