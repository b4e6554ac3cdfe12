//! `flowd-rs flows`: the open flows, as a table.

use std::cmp::Ordering;
use std::io::{IsTerminal, Write, stdout};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use form_urlencoded::Serializer;
use serde_json::Value;
use terminal_size::{Width, terminal_size};

use super::client;
use super::terminal::escaped;
use crate::error::{Error, Result};

const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// List the open flows of the running daemon.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "flows", help_triggers("-h", "--help", "help"))]
pub struct Flows {
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

    /// age, experiment, source or destination (default: age, oldest first)
    #[argh(option, arg_name = "key", default = "Sort::Age", from_str_fn(sort))]
    sort: Sort,

    /// print JSON
    #[argh(switch)]
    json: bool,

    /// print the flows again every two seconds, until Ctrl-C
    #[argh(switch)]
    watch: bool,
}

enum Sort {
    Age,
    Experiment,
    Source,
    Destination,
}

fn sort(word: &str) -> std::result::Result<Sort, String> {
    match word {
        "age" => Ok(Sort::Age),
        "experiment" => Ok(Sort::Experiment),
        "source" => Ok(Sort::Source),
        "destination" => Ok(Sort::Destination),
        _ => Err(format!(
            "\"{}\" is not a sort key, expected age, experiment, source or destination",
            word.escape_debug()
        )),
    }
}

impl Flows {
    pub fn run(self) -> Result<()> {
        let socket = client::socket(self.socket.clone(), self.config.clone())?;
        let mut query = Serializer::new(String::new());
        for (key, value) in [("experiment", &self.experiment), ("address", &self.address)] {
            if let Some(value) = value {
                query.append_pair(key, value);
            }
        }
        let path = format!("/flows?{}", query.finish());
        loop {
            let mut document = client::get(&socket, &path)?;
            let Some(flows) = document["flows"].as_array_mut() else {
                return Err(Error::Failed(
                    "the answer of the daemon has no list of flows".to_owned(),
                ));
            };
            flows.sort_by(|a, b| self.compare(a, b));
            let text = match self.json {
                true => format!("{document}\n"),
                false => table(flows, width()),
            };
            let clear = if self.watch && !self.json && stdout().is_terminal() {
                "\x1b[H\x1b[2J"
            } else {
                ""
            };
            // The reader (head, less) may close the pipe early.
            let mut out = stdout().lock();
            let shown = write!(out, "{clear}{text}").and_then(|()| out.flush());
            if !self.watch || shown.is_err() {
                return Ok(());
            }
            sleep(WATCH_INTERVAL);
        }
    }

    fn compare(&self, a: &Value, b: &Value) -> Ordering {
        let text = |key: &str| a[key].as_str().cmp(&b[key].as_str());
        let end = |ip: &str, port: &str| text(ip).then(a[port].as_u64().cmp(&b[port].as_u64()));
        let source = || end("src-ip", "src-port");
        let destination = || end("dst-ip", "dst-port");
        match self.sort {
            Sort::Age => text("start-time").then_with(source),
            Sort::Experiment => text("experiment").then(text("activity")).then_with(source),
            Sort::Source => source().then_with(destination),
            Sort::Destination => destination().then_with(source),
        }
    }
}

/// The width of the terminal, if it is one.
fn width() -> Option<usize> {
    let (Width(width), _) = terminal_size()?;
    Some(width.into())
}

const TITLES: [&str; 9] = [
    "STATE",
    "PROTO",
    "SOURCE",
    "DESTINATION",
    "EXPERIMENT",
    "ACTIVITY",
    "AGE",
    "ORIGIN",
    "LABEL",
];

/// One line per flow, or two if that is wider than `width`: the destination below the source, the
/// activity below the experiment, the origin below the age.
fn table(flows: &[Value], width: Option<usize>) -> String {
    let rows: Vec<[String; 9]> = flows.iter().map(row).collect();
    let titles = TITLES.map(str::to_owned);
    let count = match flows.len() {
        1 => "1 flow is open\n".to_owned(),
        count => format!("{count} flows are open\n"),
    };
    if flows.is_empty() {
        return count;
    }
    let wide: Vec<Vec<String>> = [&titles]
        .into_iter()
        .chain(&rows)
        .map(|r| r.to_vec())
        .collect();
    let widths = widths(&wide);
    let total = widths.iter().sum::<usize>() + 2 * (widths.len() - 1);
    if width.is_none_or(|width| total <= width) {
        return layout(&wide, &widths, usize::MAX) + &count;
    }
    let two = |[
        state,
        protocol,
        source,
        destination,
        experiment,
        activity,
        age,
        origin,
        label,
    ]: &[String; 9]| {
        let line = |cells: [&str; 6]| cells.map(str::to_owned).to_vec();
        [
            line([state, protocol, source, experiment, age, label]),
            line(["", "", destination, activity, origin, ""]),
        ]
    };
    let narrow: Vec<Vec<String>> = [&titles].into_iter().chain(&rows).flat_map(two).collect();
    layout(&narrow, &self::widths(&narrow), width.unwrap_or(usize::MAX)) + &count
}

fn widths(lines: &[Vec<String>]) -> Vec<usize> {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect()
}

/// Pads the columns to `widths` and cuts lines longer than `max_width`.
fn layout(lines: &[Vec<String>], widths: &[usize], max_width: usize) -> String {
    let mut text = String::new();
    for cells in lines {
        let mut line = String::new();
        for (cell, &width) in cells.iter().zip(widths) {
            line += &format!("{cell:width$}  ");
        }
        let line = line.trim_end();
        if line.chars().count() > max_width {
            text.extend(line.chars().take(max_width.saturating_sub(1)));
            text.push('…');
        } else {
            text += line;
        }
        text.push('\n');
    }
    text
}

fn row(flow: &Value) -> [String; 9] {
    let text = |key: &str| escaped(flow[key].as_str().unwrap_or("?"));
    let end = |ip: &str, port: &str| {
        let (ip, port) = (text(ip), escaped(&flow[port].to_string()));
        match ip.contains(':') {
            true => format!("[{ip}]:{port}"),
            false => format!("{ip}:{port}"),
        }
    };
    [
        text("state"),
        text("protocol"),
        end("src-ip", "src-port"),
        end("dst-ip", "dst-port"),
        text("experiment"),
        text("activity"),
        age(flow["age"].as_f64().unwrap_or(0.0) as u64),
        text("origin"),
        flow["label"]
            .as_u64()
            .map_or("-".to_owned(), |label| format!("{label:#07x}")),
    ]
}

/// `7s`, `3m05s`, `2h03m`, `4d01h`
pub fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn flow(label: Value) -> Value {
        json!({
            "state": "start", "protocol": "tcp", "src-ip": "2001:db8:1111:2222:3333:4444:5555:6666",
            "src-port": 65535, "dst-ip": "2001:db8:1111:2222:3333:4444:5555:7777", "dst-port": 1094,
            "experiment": "atlas", "activity": "Data Consolidation", "age": 185.2, "origin": "namedPipe", "label": label,
        })
    }

    #[test]
    fn a_wide_table_has_one_line_per_flow() {
        let text = table(&[flow(json!(65612)), flow(json!(null))], None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[1].ends_with("  atlas       Data Consolidation  3m05s  namedPipe  0x1004c"),
            "{text}"
        );
        assert!(lines[2].ends_with("  -"));
        assert_eq!(lines[3], "2 flows are open");
        let narrow = NARROW_WIDTH;
        assert!(
            table(&[flow(json!(1))], Some(narrow))
                .lines()
                .all(|line| line.chars().count() <= narrow)
        );
    }

    const NARROW_WIDTH: usize = 100;

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in [20, 80, 100, 120, 200] {
            let text = table(&[flow(json!(65612))], Some(width));
            assert!(
                text.lines().all(|line| line.chars().count() <= width),
                "{width}\n{text}"
            );
        }
        let text = table(&[flow(json!(65612))], Some(100));
        assert!(
            text.contains("\n              [2001:db8:1111:2222:3333:4444:5555:7777]:1094"),
            "{text}"
        );
    }

    #[test]
    fn ages() {
        for (seconds, expected) in [
            (0, "0s"),
            (59, "59s"),
            (61, "1m01s"),
            (7385, "2h03m"),
            (90_000, "1d01h"),
        ] {
            assert_eq!(age(seconds), expected);
        }
    }
}
