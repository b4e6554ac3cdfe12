//! `flowd-rs flows`: the open flows, as a table.

mod end;

use std::borrow::Cow;
use std::collections::BinaryHeap;
use std::fmt::Write as _;
use std::io::{self, BufWriter, IsTerminal, Write, stdout};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use argh::{ArgsInfo, FromArgs};
use form_urlencoded::Serializer;
use serde::Deserialize;
use terminal_size::{Width, terminal_size};

use super::client::{self, Answer};
use super::terminal::{escaped, escaped_json};
use crate::error::{Error, Result};

/// So many flows at most are sorted without `--sort` and `--limit`: the client holds them in memory.
const SORTED_MAX: usize = 10_000;
const WATCH_INTERVAL: Duration = Duration::from_secs(2);

/// List or end the open flows of the running daemon.
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

    /// age, experiment, source or destination (default: age, oldest first;
    /// more than 10,000 flows are sorted only with this or --limit)
    #[argh(option, arg_name = "key", from_str_fn(sort))]
    sort: Option<Sort>,

    /// print only the first flows, at most so many
    #[argh(option, arg_name = "count")]
    limit: Option<usize>,

    /// print JSON
    #[argh(switch)]
    json: bool,

    /// print the flows again every two seconds, until Ctrl-C
    #[argh(switch)]
    watch: bool,

    #[argh(subcommand)]
    command: Option<Command>,
}

#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand)]
enum Command {
    End(end::End),
}

#[derive(Clone, Copy)]
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
        match self {
            Flows {
                command: Some(Command::End(end)),
                config: None,
                socket: None,
                experiment: None,
                address: None,
                sort: None,
                limit: None,
                json: false,
                watch: false,
            } => return end.run(),
            // A filter that is ignored would end too many flows.
            Flows {
                command: Some(Command::End(_)),
                ..
            } => {
                let message = "options must follow `end`: `flowd-rs flows end --address ADDRESS`";
                return Err(Error::Usage(message.to_owned()));
            }
            _ => {}
        }
        let socket = client::socket(self.socket.clone(), self.config.clone())?;
        let parameters = parameters(&self.experiment, &self.address);
        loop {
            let listing = Listing::request(&socket, &parameters)?;
            let clear = if self.watch && !self.json && stdout().is_terminal() {
                "\x1b[H\x1b[2J"
            } else {
                ""
            };
            let mut out = BufWriter::with_capacity(64 << 10, stdout().lock());
            let shown = match self.json {
                true => self.list(listing, &mut Document::new(&mut out)),
                false => self.list(listing, &mut Table::new(&mut out, clear, width())),
            };
            match shown {
                Ok(()) => {}
                // The reader (head, less) may close the pipe early.
                Err(Failure::Output) => return Ok(()),
                Err(Failure::Daemon(error)) => {
                    let _ = out.flush();
                    return Err(error);
                }
            }
            if !self.watch || out.flush().is_err() {
                return Ok(());
            }
            drop(out);
            sleep(WATCH_INTERVAL);
        }
    }

    /// Prints the flows as they arrive, or, sorted, once all have arrived.
    fn list(
        &self,
        mut listing: Listing,
        format: &mut dyn Format,
    ) -> std::result::Result<(), Failure> {
        let sort = self.sort.unwrap_or(Sort::Age);
        let limit = self.limit.unwrap_or(usize::MAX);
        // The heap has the flow that comes last on top.
        let mut held: BinaryHeap<Held> = BinaryHeap::new();
        let (mut count, mut is_sorted) = (0, true);
        while let Some((line, flow)) = listing.next()? {
            count += 1;
            if !is_sorted {
                format.flow(line, &flow)?;
                continue;
            }
            let row = Held::new(sort, line, &flow);
            if held.len() < limit {
                held.push(row);
            } else if let Some(mut last) = held.peek_mut()
                && row < *last
            {
                *last = row;
            }
            if self.sort.is_none() && self.limit.is_none() && held.len() > SORTED_MAX {
                is_sorted = false;
                print(std::mem::take(&mut held), format)?;
            }
        }
        print(held, format)?;
        Ok(format.end(count, is_sorted)?)
    }
}

/// The filter as the parameters of a request; empty without one.
fn parameters(experiment: &Option<String>, address: &Option<String>) -> String {
    let mut parameters = Serializer::new(String::new());
    for (key, value) in [("experiment", experiment), ("address", address)] {
        if let Some(value) = value {
            parameters.append_pair(key, value);
        }
    }
    parameters.finish()
}

/// Prints the flows that were held back, sorted.
fn print(held: BinaryHeap<Held>, format: &mut dyn Format) -> std::result::Result<(), Failure> {
    let held = held.into_sorted_vec();
    let flows = held.iter().map(|row| serde_json::from_str(&row.line));
    let flows: Vec<ListedFlow> = flows
        .collect::<serde_json::Result<_>>()
        .map_err(io::Error::from)?;
    format.widths(&flows);
    let mut lines = held.iter().zip(&flows);
    Ok(lines.try_for_each(|(row, flow)| format.flow(&row.line, flow))?)
}

/// Why a listing ended early.
enum Failure {
    Daemon(Error),
    Output,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::Daemon(error)
    }
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Failure {
        Failure::Output
    }
}

/// A flow as `GET /flows` describes it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ListedFlow<'a> {
    #[serde(borrow)]
    state: Cow<'a, str>,
    #[serde(borrow)]
    protocol: Cow<'a, str>,
    #[serde(borrow)]
    src_ip: Cow<'a, str>,
    src_port: u16,
    #[serde(borrow)]
    dst_ip: Cow<'a, str>,
    dst_port: u16,
    #[serde(borrow)]
    experiment: Cow<'a, str>,
    #[serde(borrow)]
    activity: Cow<'a, str>,
    #[serde(borrow)]
    start_time: Cow<'a, str>,
    age: f64,
    #[serde(borrow)]
    origin: Cow<'a, str>,
    label: Option<u32>,
}

/// A flow that waits to be sorted: its sort key, and its line of the listing.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    key: Box<str>,
    line: Box<str>,
}

impl Held {
    fn new(sort: Sort, line: &str, flow: &ListedFlow) -> Held {
        // U+0000 separates the fields: a shorter field comes first.
        let source = || format!("{}\0{:05}", flow.src_ip, flow.src_port);
        let destination = || format!("{}\0{:05}", flow.dst_ip, flow.dst_port);
        let key = match sort {
            Sort::Age => format!("{}\0{}", flow.start_time, source()),
            Sort::Experiment => {
                format!("{}\0{}\0{}", flow.experiment, flow.activity, source())
            }
            Sort::Source => format!("{}\0{}", source(), destination()),
            Sort::Destination => format!("{}\0{}", destination(), source()),
        };
        Held {
            key: key.into(),
            line: line.into(),
        }
    }
}

/// Reads the document of `GET /flows`, which has one flow per line.
struct Listing {
    answer: Answer,
    line: Vec<u8>,
}

impl Listing {
    /// The open flows that the parameters select.
    fn request(socket: &Path, parameters: &str) -> Result<Listing> {
        Ok(Listing {
            answer: client::get_lines(socket, &format!("/flows?{parameters}"))?,
            line: Vec::new(),
        })
    }

    /// The next flow, and its line. An error if the document ends before its last line.
    fn next(&mut self) -> Result<Option<(&str, ListedFlow<'_>)>> {
        loop {
            self.line.clear();
            if self.answer.read_line(&mut self.line)? == 0 {
                return Err(Error::Failed(
                    "the daemon ended the list of flows too early".to_owned(),
                ));
            }
            match self.line.trim_ascii() {
                b"]}" => return Ok(None),
                b"{\"flows\":[" | b"" => {}
                _ => break,
            }
        }
        let line = self.line.trim_ascii();
        let line = line.strip_suffix(b",").unwrap_or(line);
        let line = str::from_utf8(line).map_err(|error| self.answer.invalid(&error))?;
        match serde_json::from_str(line) {
            Ok(flow) => Ok(Some((line, flow))),
            Err(error) => Err(self.answer.invalid(&error)),
        }
    }
}

/// How flows are printed.
trait Format {
    /// Announces flows that follow, for the widths of columns.
    fn widths(&mut self, flows: &[ListedFlow]);
    /// Prints a flow, whose JSON is `line`.
    fn flow(&mut self, line: &str, flow: &ListedFlow) -> io::Result<()>;
    /// Prints what stands after the last of `count` flows.
    fn end(&mut self, count: usize, is_sorted: bool) -> io::Result<()>;
}

/// The JSON document of `GET /flows`, with one flow per line.
struct Document<'a> {
    out: &'a mut dyn Write,
    has_begun: bool,
}

impl Document<'_> {
    fn new(out: &mut dyn Write) -> Document<'_> {
        Document {
            out,
            has_begun: false,
        }
    }
}

impl Format for Document<'_> {
    fn widths(&mut self, _: &[ListedFlow]) {}

    fn flow(&mut self, line: &str, _: &ListedFlow) -> io::Result<()> {
        let before: &[u8] = match std::mem::replace(&mut self.has_begun, true) {
            true => b",\n",
            false => b"{\"flows\":[\n",
        };
        self.out.write_all(before)?;
        self.out.write_all(escaped_json(line).as_bytes())
    }

    fn end(&mut self, _: usize, _: bool) -> io::Result<()> {
        match self.has_begun {
            true => self.out.write_all(b"\n]}\n"),
            false => self.out.write_all(b"{\"flows\":[]}\n"),
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

/// One line per flow, or two if that is wider than the terminal: the destination below the source, the activity below
/// the experiment, the origin below the age. A cell that is wider than those announced moves the rest of its line.
struct Table<'a> {
    out: &'a mut dyn Write,
    /// What is printed before the titles.
    clear: &'static str,
    max_width: Option<usize>,
    widths: [usize; 9],
    has_begun: bool,
    /// Reused for each flow.
    cells: [String; 9],
    line: String,
}

impl Table<'_> {
    fn new<'a>(out: &'a mut dyn Write, clear: &'static str, max_width: Option<usize>) -> Table<'a> {
        Table {
            out,
            clear,
            max_width,
            widths: TITLES.map(str::len),
            has_begun: false,
            cells: Default::default(),
            line: String::new(),
        }
    }

    fn begin(&mut self) -> io::Result<()> {
        self.has_begun = true;
        self.out.write_all(self.clear.as_bytes())
    }

    fn print_cells(&mut self) -> io::Result<()> {
        let total = self.widths.iter().sum::<usize>() + 2 * (self.widths.len() - 1);
        let cells = self.cells.each_ref().map(String::as_str);
        let Some(max_width) = self.max_width.filter(|max_width| total > *max_width) else {
            layout(&mut self.line, &cells, &self.widths, usize::MAX);
            return self.out.write_all(self.line.as_bytes());
        };
        let [
            state,
            protocol,
            source,
            destination,
            experiment,
            activity,
            age,
            origin,
            label,
        ] = cells;
        let w = self.widths;
        let widths = [
            w[0],
            w[1],
            w[2].max(w[3]),
            w[4].max(w[5]),
            w[6].max(w[7]),
            w[8],
        ];
        for cells in [
            [state, protocol, source, experiment, age, label],
            ["", "", destination, activity, origin, ""],
        ] {
            layout(&mut self.line, &cells, &widths, max_width);
            self.out.write_all(self.line.as_bytes())?;
        }
        Ok(())
    }
}

impl Format for Table<'_> {
    fn widths(&mut self, flows: &[ListedFlow]) {
        for flow in flows {
            row(&mut self.cells, flow);
            for (width, cell) in self.widths.iter_mut().zip(&self.cells) {
                *width = (*width).max(cell.chars().count());
            }
        }
    }

    fn flow(&mut self, _: &str, flow: &ListedFlow) -> io::Result<()> {
        if !self.has_begun {
            self.begin()?;
            self.cells = TITLES.map(str::to_owned);
            self.print_cells()?;
        }
        row(&mut self.cells, flow);
        self.print_cells()
    }

    fn end(&mut self, count: usize, is_sorted: bool) -> io::Result<()> {
        if !self.has_begun {
            self.begin()?;
        }
        match (count, is_sorted) {
            (1, _) => writeln!(self.out, "1 flow is open"),
            (_, true) => writeln!(self.out, "{count} flows are open"),
            (_, false) => writeln!(
                self.out,
                "{count} flows are open; so many are sorted only with --sort or --limit"
            ),
        }
    }
}

/// Pads the cells to `widths` and cuts a line that is longer than `max_width`.
fn layout(line: &mut String, cells: &[&str], widths: &[usize], max_width: usize) {
    line.clear();
    for (cell, &width) in cells.iter().zip(widths) {
        line.push_str(cell);
        let padding = width.saturating_sub(cell.chars().count()) + 2;
        line.extend(std::iter::repeat_n(' ', padding));
    }
    line.truncate(line.trim_end().len());
    if line.len() > max_width && line.chars().count() > max_width {
        let cut = line.char_indices().nth(max_width.saturating_sub(1));
        line.truncate(cut.map_or(0, |(at, _)| at));
        line.push('…');
    }
    line.push('\n');
}

/// The cells of a flow.
fn row(cells: &mut [String; 9], flow: &ListedFlow) {
    cells.iter_mut().for_each(String::clear);
    let [
        state,
        protocol,
        source,
        destination,
        experiment,
        activity,
        age,
        origin,
        label,
    ] = cells;
    for (cell, text) in [
        (state, &flow.state),
        (protocol, &flow.protocol),
        (experiment, &flow.experiment),
        (activity, &flow.activity),
        (origin, &flow.origin),
    ] {
        cell.push_str(&escaped(text));
    }
    // Writing to a String cannot fail.
    for (cell, ip, port) in [
        (source, &flow.src_ip, flow.src_port),
        (destination, &flow.dst_ip, flow.dst_port),
    ] {
        let ip = escaped(ip);
        let _ = match ip.contains(':') {
            true => write!(cell, "[{ip}]:{port}"),
            false => write!(cell, "{ip}:{port}"),
        };
    }
    age.push_str(&self::age(flow.age as u64));
    let _ = match flow.label {
        Some(number) => write!(label, "{number:#07x}"),
        None => write!(label, "-"),
    };
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

    fn flow(label: Option<u32>) -> ListedFlow<'static> {
        ListedFlow {
            state: "start".into(),
            protocol: "tcp".into(),
            src_ip: "2001:db8:1111:2222:3333:4444:5555:6666".into(),
            src_port: 65535,
            dst_ip: "2001:db8:1111:2222:3333:4444:5555:7777".into(),
            dst_port: 1094,
            experiment: "atlas".into(),
            activity: "Data Consolidation".into(),
            start_time: "2023-11-14T22:13:20.000000Z".into(),
            age: 185.2,
            origin: "namedPipe".into(),
            label,
        }
    }

    fn table(flows: &[ListedFlow], width: Option<usize>) -> String {
        let mut out = Vec::new();
        let mut table = Table::new(&mut out, "", width);
        table.widths(flows);
        for flow in flows {
            table.flow("", flow).unwrap();
        }
        table.end(flows.len(), true).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_wide_table_has_one_line_per_flow() {
        let text = table(&[flow(Some(65612)), flow(None)], None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(
            lines[1].ends_with("  atlas       Data Consolidation  3m05s  namedPipe  0x1004c"),
            "{text}"
        );
        assert!(lines[2].ends_with("  -"));
        assert_eq!(lines[3], "2 flows are open");
        assert_eq!(table(&[], None), "0 flows are open\n");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in [20, 80, 100, 120, 200] {
            let text = table(&[flow(Some(65612))], Some(width));
            assert!(
                text.lines().all(|line| line.chars().count() <= width),
                "{width}\n{text}"
            );
        }
        let text = table(&[flow(Some(65612))], Some(100));
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
