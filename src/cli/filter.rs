//! `flowd-rs filter`: what the rules of the running collector do.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};
use serde_json::Value;

use super::client;
use super::terminal::{escaped, escaped_json};
use crate::error::Result;

/// List the rules of the running collector, and how often each applied.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "filter", help_triggers("-h", "--help", "help"))]
pub struct Filter {
    /// configuration file that names the control socket (default:
    /// /etc/flowd/collector.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// control socket of the collector
    #[argh(option, arg_name = "path")]
    socket: Option<PathBuf>,

    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Filter {
    pub fn run(self) -> Result<()> {
        let socket = client::collector_socket(self.socket, self.config)?;
        let answer = client::get(&socket, "/filter")?;
        let text = match self.json {
            true => escaped_json(&answer.to_string()) + "\n",
            false => table(&answer),
        };
        // The reader (head, less) may close the pipe early.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

fn table(answer: &Value) -> String {
    let mut out = format!(
        "{:>4} {:>14} {:>14} {:>14}  {}\n",
        "RULE", "EVALUATIONS", "MATCHES", "WINS", "TEXT"
    );
    let rules = answer["rules"].as_array().cloned().unwrap_or_default();
    for (number, rule) in rules.iter().enumerate() {
        let count = |key: &str| escaped(&rule[key].to_string());
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(
            out,
            "{number:>4} {:>14} {:>14} {:>14}  {}",
            count("evaluations"),
            count("matches"),
            count("wins"),
            escaped(rule["rule"].as_str().unwrap_or("?"))
        );
    }
    let unmatched = escaped(&answer["unmatched"].to_string());
    let _ = writeln!(
        out,
        "{:>4} {:>14} {:>14} {unmatched:>14}  (no rule matched: accepted)",
        "-", "-", "-"
    );
    out
}
