//! `flowd-rs status`: the state of the running daemon.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};
use serde_json::Value;

use super::terminal::{escaped, escaped_json};
use super::{client, flows};
use crate::error::Result;

/// Show uptime, counters, queues and warnings of the running daemon.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "status", help_triggers("-h", "--help", "help"))]
pub struct Status {
    /// configuration file that names the control socket (default:
    /// /etc/flowd/flowd.cfg)
    #[argh(option, short = 'c', arg_name = "file")]
    config: Option<PathBuf>,

    /// control socket of the daemon
    #[argh(option, arg_name = "path")]
    socket: Option<PathBuf>,

    /// the status of the collector (flowd-rs collect)
    #[argh(switch)]
    collector: bool,

    /// print JSON
    #[argh(switch)]
    json: bool,
}

impl Status {
    pub fn run(self) -> Result<()> {
        let socket = match self.collector {
            true => client::collector_socket(self.socket, self.config)?,
            false => client::socket(self.socket, self.config)?,
        };
        let status = client::get(&socket, "/status")?;
        let text = match self.json {
            true => escaped_json(&status.to_string()) + "\n",
            false if status["service"] == "collector" => describe_collector(&status),
            false => describe(&status),
        };
        // The reader (head, less) may close the pipe early.
        let _ = std::io::stdout().write_all(text.as_bytes());
        Ok(())
    }
}

fn describe(status: &Value) -> String {
    let text = |value: &Value| escaped(value.as_str().unwrap_or("?"));
    let number = |value: &Value| escaped(&value.to_string());
    let list = |key: &str| status[key].as_array().cloned().unwrap_or_default();
    let mut out = format!(
        "flowd-rs {}, process {}, up {} since {}\n",
        text(&status["version"]),
        number(&status["pid"]),
        flows::age(status["uptime"].as_u64().unwrap_or(0)),
        text(&status["started"]),
    );
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(out, "open flows  {}", number(&status["flows-open"]));
    for (title, key) in [
        ("plugin", "plugins"),
        ("backend", "backends"),
        ("enricher", "enrichers"),
    ] {
        for part in list(key) {
            let name = format!("{title} {}", text(&part["name"]));
            let _ = writeln!(out, "{name:<20} {}", counts(&part));
        }
    }
    for key in ["dispatcher", "journal", "registry"] {
        let _ = writeln!(out, "{key:<20} {}", counts(&status[key]));
    }
    for queue in list("queues") {
        let name = format!("queue {}", text(&queue["name"]));
        let _ = writeln!(
            out,
            "{name:<20} {} waiting, {} at most since the start",
            number(&queue["depth"]),
            number(&queue["high-water"])
        );
    }
    if status["ongoing-dropped"] != 0 {
        let dropped = number(&status["ongoing-dropped"]);
        let plural = if dropped == "1" { "" } else { "s" };
        let _ = writeln!(
            out,
            "{:<20} {dropped} ongoing event{plural}: a queue was full",
            "dropped"
        );
    }
    put_warnings(&mut out, status);
    out
}

/// The state of the collector.
fn describe_collector(status: &Value) -> String {
    let number = |key: &str| escaped(&status[key].to_string());
    let mut out = format!(
        "flowd-rs {} (collector), process {}, up {} since {}\n",
        escaped(status["version"].as_str().unwrap_or("?")),
        number("pid"),
        flows::age(status["uptime"].as_u64().unwrap_or(0)),
        escaped(status["started"].as_str().unwrap_or("?")),
    );
    let mut line = |name: &str, text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<20} {text}");
    };
    line(
        "records",
        format!(
            "received {} = stored {} + filtered {} + rejected {}",
            number("received"),
            number("stored"),
            number("filtered"),
            number("rejected")
        ),
    );
    if status["rejected"] != 0 {
        line("rejected", counts(status));
    }
    line(
        "lost on the way",
        format!("{} records, by sequence numbers", number("lost")),
    );
    line(
        "datagrams",
        format!(
            "{} received, {} dropped by the kernel",
            number("datagrams"),
            number("kernel-dropped")
        ),
    );
    if status["forwarded"] != 0 || status["forward-failed"] != 0 {
        line(
            "forwarded",
            format!(
                "{} datagrams, {} failed",
                number("forwarded"),
                number("forward-failed")
            ),
        );
    }
    if let Some(socket) = status["log-socket"].as_object() {
        let number = |key: &str| escaped(&socket[key].to_string());
        line(
            "log socket",
            format!(
                "{} records sent, {} dropped",
                number("sent"),
                number("dropped")
            ),
        );
    }
    line("exporters", number("exporters"));
    line(
        "store",
        format!(
            "{} bytes written, {} records wait{}",
            number("written-bytes"),
            number("waiting"),
            match status["store-error"].as_str() {
                Some(error) => format!("; the last write failed: {}", escaped(error)),
                None => String::new(),
            }
        ),
    );
    put_warnings(&mut out, status);
    out
}

fn put_warnings(out: &mut String, status: &Value) {
    let text = |value: &Value| escaped(value.as_str().unwrap_or("?"));
    let warnings = status["warnings"].as_array().cloned().unwrap_or_default();
    if warnings.is_empty() {
        *out += "no warnings or errors\n";
    } else {
        *out += "last warnings and errors:\n";
    }
    for warning in warnings {
        let _ = writeln!(
            out,
            "  {} {}: {}",
            text(&warning["time"]),
            text(&warning["level"]),
            text(&warning["message"])
        );
    }
}

/// The counters of a part of the daemon as text, separated by semicolons.
fn counts(part: &Value) -> String {
    let summary = part["summary"].as_array();
    let texts = summary.into_iter().flatten().filter_map(Value::as_str);
    let texts: Vec<&str> = texts.collect();
    match texts.is_empty() {
        true => "nothing yet".to_owned(),
        false => escaped(&texts.join("; ")),
    }
}
