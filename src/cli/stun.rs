//! `flowd-rs stun`: how the public addresses of this host are found.

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use crate::config::{Config, DEFAULT_PATH};
use crate::error::{Error, Result};
use crate::public_addresses::{Mapping, discover};

/// See how the public addresses of this host are found.
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

/// Look for them as the daemon would, and print each step; exit code 1 if a private address is left without a public one.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "sample", help_triggers("-h", "--help", "help"))]
struct Sample {
    /// configuration file, for its backends.firefly.stun (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c')]
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
            println!("{path}: backends.firefly.stun (IP_DISCOVERY_ENABLED) is not enabled: with its defaults");
            Config::default_stun()
        });
        let nothing = Mapping::new();
        let (mapping, missing) =
            discover(&settings, &nothing, &|| false, |step| println!("{step}"));
        for (private, public) in &mapping {
            println!("{private} -> {public}");
        }
        match missing {
            true => Err(Error::Failed(
                "a private address was left without a public one".to_owned(),
            )),
            false => Ok(()),
        }
    }
}
