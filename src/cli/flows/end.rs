//! `flowd-rs flows end`: ends open flows.

use std::io::{IsTerminal, Write, stderr, stdin};
use std::path::{Path, PathBuf};

use argh::{ArgsInfo, FromArgs};
use serde_json::Value;

use super::{Listing, client, parameters};
use crate::error::{Context, Error, Result};

/// End the open flows, as if their producers had.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "end", help_triggers("-h", "--help", "help"))]
pub struct End {
    /// configuration file that names the control socket (default:
    /// /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// control socket of the daemon
    #[argh(option, arg_name = "path")]
    socket: Option<PathBuf>,

    /// only flows of this experiment, by name or id
    #[argh(option)]
    experiment: Option<String>,

    /// only flows with an end at this address or in this prefix
    #[argh(option)]
    address: Option<String>,

    /// print how many flows would be ended, and end none
    #[argh(switch, short = 'n')]
    dry_run: bool,

    /// end all flows, if neither --experiment nor --address is given, without
    /// asking
    #[argh(switch)]
    yes: bool,
}

impl End {
    pub fn run(self) -> Result<()> {
        let socket = client::socket(self.socket.clone(), self.config.clone())?;
        let parameters = parameters(&self.experiment, &self.address);
        if self.dry_run {
            let count = count(&socket, &parameters)?;
            println!("{} would be ended", flows(count));
            return Ok(());
        }
        if parameters.is_empty() && !self.yes {
            confirm(&socket)?;
        }
        let answer = client::post(&socket, &format!("/flows/end?{parameters}"))?;
        let ended = answer["ended"].as_u64().unwrap_or(0);
        println!("{} ended", flows(ended));
        match &answer["error"] {
            Value::Null => Ok(()),
            error => Err(client::refused(error)),
        }
    }
}

/// Asks on the terminal whether all flows shall end. An error unless the user says yes.
fn confirm(socket: &Path) -> Result<()> {
    if !stdin().is_terminal() || !stderr().is_terminal() {
        let message =
            "this would end all open flows: expected --experiment, --address, or --yes to end all";
        return Err(Error::Usage(message.to_owned()));
    }
    let count = count(socket, "")?;
    let terminal = || "terminal".to_owned();
    match count {
        1 => eprint!("End the open flow? [y/N] "),
        _ => eprint!("End all {count} open flows? [y/N] "),
    }
    stderr().flush().context(terminal)?;
    let mut answer = String::new();
    stdin().read_line(&mut answer).context(terminal)?;
    match answer.trim().to_lowercase().as_str() {
        "y" | "yes" => Ok(()),
        _ => Err(Error::Failed("no flow was ended".to_owned())),
    }
}

/// How many flows are open that the parameters select.
fn count(socket: &Path, parameters: &str) -> Result<u64> {
    let mut listing = Listing::request(socket, parameters)?;
    let mut count = 0;
    while listing.next()?.is_some() {
        count += 1;
    }
    Ok(count)
}

fn flows(count: u64) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} flow{plural}")
}
