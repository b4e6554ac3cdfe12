//! `flowd-rs exporters`: who sends flow records to the running collector.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};
use serde_json::Value;

use super::terminal::{escaped, escaped_json};
use super::{client, flows};
use crate::error::Result;

/// List the exporters that send flow records to the running collector.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "exporters", help_triggers("-h", "--help", "help"))]
pub struct Exporters {
    /// configuration file that names the control socket (default:
    /// /etc/flowd/collector.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// control socket of the collector
    #[argh(option, arg_name = "path")]
    socket: Option<PathBuf>,

    /// print JSON, one object per line
    #[argh(switch)]
    json: bool,
}

impl Exporters {
    pub fn run(self) -> Result<()> {
        let socket = client::collector_socket(self.socket, self.config)?;
        let answer = client::get(&socket, "/exporters")?;
        let exporters = answer["exporters"].as_array().cloned().unwrap_or_default();
        let text = match self.json {
            true => {
                let lines = exporters.iter().map(Value::to_string);
                lines.map(|line| escaped_json(&line) + "\n").collect()
            }
            false => table(&exporters),
        };
        // The reader (head, less) may close the pipe early.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

fn table(exporters: &[Value]) -> String {
    let mut out = format!(
        "{:<40} {:>10} {:<8} {:>9} {:>10} {:>14} {:>10} {:>10} {:>11} {:>9}\n",
        "EXPORTER",
        "DOMAIN",
        "PROTOCOL",
        "TEMPLATES",
        "RECORDS/S",
        "RECORDS",
        "REJECTED",
        "LOST",
        "CLOCK",
        "LAST SEEN"
    );
    let number = |value: &Value| escaped(&value.to_string());
    for exporter in exporters {
        let text = |key: &str| escaped(exporter[key].as_str().unwrap_or("?"));
        let clock = exporter["clock-offset"].as_f64();
        let seen = exporter["last-seen"].as_f64();
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:<40} {:>10} {:<8} {:>9} {:>10.1} {:>14} {:>10} {:>10} {:>11} {:>9}",
            text("address"),
            number(&exporter["domain"]),
            text("protocol"),
            number(&exporter["templates"]),
            exporter["rate"].as_f64().unwrap_or(0.0),
            number(&exporter["received"]),
            number(&exporter["rejected"]),
            number(&exporter["lost"]),
            clock.map_or_else(|| "-".to_owned(), |s| format!("{s:+.3} s")),
            seen.map_or_else(|| "-".to_owned(), |s| flows::age(s as u64)),
        );
    }
    out
}
