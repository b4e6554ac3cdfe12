//! `flowd-rs status`: how the running daemon is doing.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};
use serde_json::{Map, Value};

use super::{client, flows};
use crate::error::Result;

/// Print how the running daemon is doing: uptime, open flows, counters, queues, last warnings.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "status", help_triggers("-h", "--help", "help"))]
pub struct Status {
    /// configuration file, for its controlSocket (default: /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c')]
    config: Option<PathBuf>,

    /// control socket of the daemon
    #[argh(option)]
    socket: Option<PathBuf>,

    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Status {
    pub fn run(self) -> Result<()> {
        let socket = client::socket(self.socket, self.config)?;
        let status = client::get(&socket, "/status")?;
        let text = match self.json {
            true => format!("{status}\n"),
            false => describe(&status),
        };
        // A reader that has seen enough (head, less) closes the pipe.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

fn describe(status: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let list = |key: &str| status[key].as_array().cloned().unwrap_or_default();
    let mut out = format!(
        "flowd-rs {}, process {}, up {} since {}\n",
        text(&status["version"]),
        status["pid"],
        flows::age(status["uptime"].as_u64().unwrap_or(0)),
        text(&status["started"]),
    );
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(out, "open flows  {}", status["flows-open"]);
    for (title, key) in [
        ("plugin", "plugins"),
        ("backend", "backends"),
        ("enricher", "enrichers"),
    ] {
        for part in list(key) {
            let name = format!("{title} {}", text(&part["name"]));
            let _ = writeln!(out, "{name:<20} {}", counts(&part["events"]));
        }
    }
    for key in ["dispatcher", "journal"] {
        let _ = writeln!(out, "{key:<20} {}", counts(&status[key]));
    }
    for queue in list("queues") {
        let name = format!("queue {}", text(&queue["name"]));
        let _ = writeln!(
            out,
            "{name:<20} {} waiting, {} at most so far",
            queue["depth"], queue["high-water"]
        );
    }
    if status["ongoing-dropped"] != 0 {
        let _ = writeln!(
            out,
            "{:<20} {} ongoing events, for want of room in a queue",
            "dropped", status["ongoing-dropped"]
        );
    }
    let complaints = list("complaints");
    if complaints.is_empty() {
        out += "no warnings and no errors\n";
    } else {
        out += "last warnings and errors:\n";
    }
    for complaint in complaints {
        let _ = writeln!(
            out,
            "  {} {}: {}",
            text(&complaint["time"]),
            text(&complaint["level"]),
            text(&complaint["message"])
        );
    }
    out
}

/// What is not zero.
fn counts(counts: &Value) -> String {
    let none = Map::new();
    let counts = counts.as_object().unwrap_or(&none).iter();
    let counts: Vec<String> = counts
        .filter(|(_, count)| **count != 0)
        .map(|(outcome, count)| format!("{outcome} {count}"))
        .collect();
    match counts.is_empty() {
        true => "nothing yet".to_owned(),
        false => counts.join(", "),
    }
}
