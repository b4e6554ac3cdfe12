//! The journal of open flows: a text file to which every opened and closed flow is appended, so that open flows
//! survive a crash, a kill and an upgrade.
//!
//! ```text
//! flowd-rs journal 1
//! + <start, µs since 1970> <entered, s since 1970> namedPipe tcp 192.0.2.1 443 192.0.2.2 5000 2 9 "application"
//! - tcp 192.0.2.1 443 192.0.2.2 5000
//! ```
//!
//! The application is a JSON string and may be absent. Appends are not synced to the disk: data that the kernel has
//! survives the daemon, and a host that goes down takes its flows with it.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::Level;
use serde_json::Value;

use crate::dispatcher::flow_table::{FlowTable, OpenFlow};
use crate::event::Origin;
use crate::flow::{Flow, Protocol, Tag};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};

const HEADER: &str = "flowd-rs journal 1";
/// A running daemon does not rewrite a journal below this size, in bytes.
const MIN_COMPACT_SIZE: u64 = 16 << 20;
/// How long after a failed write the journal is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

outcomes! {
    enum Written {
        Done = "done": "{batch|batches} written",
        Failed = "failed": "{write|writes} failed",
        Rewritten = "rewritten": "rewritten {time|times}",
    }
}

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A flow was opened or retagged.
    Open(Flow, OpenFlow),
    /// A flow was closed.
    Close(Flow),
}

/// Appends the line of an opened flow to `out`.
pub fn encode_open(out: &mut String, flow: &Flow, open: &OpenFlow) {
    out.push_str("+ ");
    put_number(out, open.start_time().as_microsecond());
    put_number(out, open.opened);
    out.push_str(open.origin.as_str());
    out.push(' ');
    encode_flow(out, flow);
    put_number(out, open.tag.experiment);
    put_number(out, open.tag.activity);
    if let Some(application) = &open.application {
        out.push_str(&Value::from(&**application).to_string());
    } else {
        out.pop();
    }
    out.push('\n');
}

/// Appends the line of a closed flow to `out`.
pub fn encode_close(out: &mut String, flow: &Flow) {
    out.push_str("- ");
    encode_flow(out, flow);
    out.pop();
    out.push('\n');
}

/// Appends a flow and a space.
fn encode_flow(out: &mut String, flow: &Flow) {
    out.push_str(flow.protocol.as_str());
    for end in [flow.source, flow.destination] {
        // Writing to a String cannot fail.
        let _ = write!(out, " {} ", end.address);
        out.push_str(itoa::Buffer::new().format(end.port));
    }
    out.push(' ');
}

/// Appends a number and a space.
fn put_number(out: &mut String, number: impl itoa::Integer) {
    out.push_str(itoa::Buffer::new().format(number));
    out.push(' ');
}

/// Reads one line without its newline.
pub fn decode(line: &str) -> Option<Record> {
    let (kind, rest) = line.split_once(' ')?;
    match kind {
        "+" => {
            let mut fields = rest.splitn(11, ' ');
            let start = Timestamp::from_microsecond(fields.next()?.parse().ok()?).ok()?;
            let opened = fields.next()?.parse().ok()?;
            let origin = origin(fields.next()?)?;
            let flow = decode_flow(&mut fields)?;
            let tag = Tag {
                experiment: fields.next()?.parse().ok()?,
                activity: fields.next()?.parse().ok()?,
            };
            let application: Option<Arc<str>> = match fields.next() {
                Some(json) => Some(serde_json::from_str::<String>(json).ok()?.into()),
                None => None,
            };
            Some(Record::Open(
                flow,
                OpenFlow::new(tag, origin, start, opened, application),
            ))
        }
        "-" => {
            let mut fields = rest.split(' ');
            let flow = decode_flow(&mut fields)?;
            fields.next().is_none().then_some(Record::Close(flow))
        }
        _ => None,
    }
}

/// Reads the name of a plugin. Older journals call the plugin `namedPipe` `named_pipe`.
fn origin(word: &str) -> Option<Origin> {
    Origin::from_word(match word {
        "named_pipe" => "namedPipe",
        word => word,
    })
}

fn decode_flow<'a>(fields: &mut impl Iterator<Item = &'a str>) -> Option<Flow> {
    let protocol = Protocol::from_word(fields.next()?)?;
    let source = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let destination = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Flow::new(protocol, source, destination).ok()
}

/// The journal's file. Only the dispatcher writes to it.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines in the file.
    length: u64,
    /// [`Journal::length`] after the last rewriting.
    compact_length: u64,
    /// While the file lacks events: when a write last failed.
    failed_at: Option<Instant>,
    counters: Outcomes<Written>,
    limit: LogLimit,
}

impl Journal {
    /// Reads the journal in `state_dir` into `table`, rewrites it, and opens it for appending.
    ///
    /// Unreadable lines are skipped with a warning. A failure to rewrite the file, for example on a full disk, is a
    /// warning too. Failing to open or read the file is an error.
    pub fn open(state_dir: &Path, table: &mut FlowTable, metrics: &Metrics) -> io::Result<Journal> {
        let path = state_dir.join("journal");
        let length = match File::open(&path) {
            Ok(file) => read(&path, file, table)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let file = OpenOptions::new().append(true).create(true).open(&path)?;
        let mut journal = Journal {
            path,
            file,
            length,
            compact_length: length,
            failed_at: None,
            counters: metrics.journal(),
            limit: LogLimit::new(Level::Error, "journal: failed writes"),
        };
        if let Err(error) = journal.rewrite(table) {
            journal.fail(Instant::now(), &error);
            // The next line must not continue a torn one.
            let _ = journal.file.set_len(journal.length);
        }
        Ok(journal)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole lines in one write. If a write fails, the lines are dropped, and the journal is rewritten from the
    /// table as soon as it can be written again.
    pub fn append(&mut self, lines: &str, now: Instant) {
        if lines.is_empty() || self.failed_at.is_some() {
            return;
        }
        match self.file.write_all(lines.as_bytes()) {
            Ok(()) => {
                self.length += lines.len() as u64;
                self.counters.add(Written::Done);
            }
            Err(error) => {
                let _ = self.file.set_len(self.length);
                self.fail(now, &error);
            }
        }
    }

    /// Rewrites the journal if more than half of it is about closed flows, or if it lacks events; to be called after
    /// every batch and about once a second.
    pub fn compact_if_due(&mut self, table: &FlowTable, now: Instant) {
        self.limit.tick(now);
        let due = match self.failed_at {
            Some(last) => now.duration_since(last) >= RETRY_INTERVAL,
            None => self.length > MIN_COMPACT_SIZE && self.length > 2 * self.compact_length,
        };
        if !due {
            return;
        }
        let had_failed = self.failed_at.is_some();
        match self.rewrite(table) {
            Ok(()) if had_failed => log::info!(
                "journal {}: writable again, and complete",
                self.path.display()
            ),
            Ok(()) => {}
            Err(error) => {
                // The old file is longer than necessary, but complete.
                if had_failed {
                    self.fail(now, &error);
                } else {
                    self.compact_length = self.length;
                    log::warn!(
                        "journal {}: cannot be compacted: {error}",
                        self.path.display()
                    );
                }
            }
        }
    }

    fn rewrite(&mut self, table: &FlowTable) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let written = write_all(&new, table).and_then(|written| {
            fs::rename(&new, &self.path)?;
            Ok(written)
        });
        let (file, length) = written.inspect_err(|_| {
            let _ = fs::remove_file(&new);
        })?;
        self.file = file;
        self.length = length;
        self.compact_length = length;
        self.failed_at = None;
        self.counters.add(Written::Rewritten);
        Ok(())
    }

    fn fail(&mut self, now: Instant, error: &io::Error) {
        self.failed_at = Some(now);
        self.counters.add(Written::Failed);
        let path = self.path.display();
        self.limit.log(now, || {
            format!(
                "journal {path}: {error}; the daemon continues without it, and forgets flows opened from now on if it is killed before the journal is writable again"
            )
        });
    }
}

/// Writes a new journal of the open flows. Returns the file, open for appending, and its length.
fn write_all(path: &Path, table: &FlowTable) -> io::Result<(File, u64)> {
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .and_then(|file| file.set_len(0).map(|()| file))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut length = HEADER.len() as u64 + 1;
    writeln!(out, "{HEADER}")?;
    let mut line = String::new();
    for (flow, open) in table.iter() {
        line.clear();
        encode_open(&mut line, flow, open);
        length += line.len() as u64;
        out.write_all(line.as_bytes())?;
    }
    let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
    Ok((file, length))
}

/// Reads a journal into `table`. Returns the length of its whole lines, in bytes.
fn read(path: &Path, file: File, table: &mut FlowTable) -> io::Result<u64> {
    let mut input = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    let (mut number, mut length, mut skipped) = (0u64, 0, 0u64);
    let shown = path.display();
    loop {
        line.clear();
        let n = input.read_until(b'\n', &mut line)?;
        if n == 0 {
            break;
        }
        number += 1;
        let Some(text) = line.strip_suffix(b"\n") else {
            log::warn!("journal {shown}: line {number} is incomplete, skipped");
            break;
        };
        length += n as u64;
        let record = std::str::from_utf8(text).ok();
        if number == 1 {
            if record != Some(HEADER) {
                return set_aside(path);
            }
            continue;
        }
        match record.and_then(decode) {
            Some(Record::Open(flow, open)) => table.restore(flow, open),
            Some(Record::Close(flow)) => table.forget(&flow),
            None => {
                skipped += 1;
                if skipped == 1 {
                    log::warn!("journal {shown}: line {number} is not a valid record, skipped");
                }
            }
        }
    }
    if skipped > 1 {
        log::warn!("journal {shown}: skipped {skipped} lines that are not valid records");
    }
    Ok(length)
}

/// Keeps a file that is not a journal of this version under another name.
fn set_aside(path: &Path) -> io::Result<u64> {
    let aside = path.with_extension(format!("unreadable.{}", Timestamp::now().as_second()));
    fs::rename(path, &aside)?;
    log::warn!(
        "journal {}: does not begin with \"{HEADER}\"; kept as {}, starting without open flows",
        path.display(),
        aside.display()
    );
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{FlowEvent, State};
    use proptest::prelude::*;

    fn flow(port: u16) -> Flow {
        let end = |n: u8| ([192, 0, 2, n].into(), port);
        Flow::new(Protocol::Tcp, end(1), end(2)).unwrap()
    }

    fn open_flow() -> OpenFlow {
        let start = Timestamp::from_microsecond(1_700_000_000_123_456).unwrap();
        OpenFlow::new(
            Tag {
                experiment: 2,
                activity: 9,
            },
            Origin::NamedPipe,
            start,
            1_700_000_001,
            None,
        )
    }

    fn reopen(dir: &Path) -> (Journal, FlowTable) {
        let mut table = FlowTable::new(100);
        let journal = Journal::open(dir, &mut table, &Metrics::new()).unwrap();
        (journal, table)
    }

    #[test]
    fn a_journal_of_before_the_plugins_had_the_names_of_the_configuration_is_read() {
        let mut line = String::new();
        encode_open(&mut line, &flow(1), &open_flow());
        let old = line.replace(" namedPipe ", " named_pipe ");
        assert_ne!(old, line);
        let expected = Some(Record::Open(flow(1), open_flow()));
        assert_eq!(decode(old.trim_end()), expected);
    }

    #[test]
    fn open_flows_come_back_and_closed_ones_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = reopen(dir.path());
        let mut lines = String::new();
        encode_open(&mut lines, &flow(1), &open_flow());
        encode_open(&mut lines, &flow(2), &open_flow());
        encode_close(&mut lines, &flow(1));
        journal.append(&lines, Instant::now());
        drop(journal);
        let (_, table) = reopen(dir.path());
        assert_eq!((table.len(), table.get(&flow(2))), (1, Some(&open_flow())));
    }

    #[test]
    fn a_journal_cut_anywhere_gives_the_flows_of_its_whole_lines_and_takes_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut whole = format!("{HEADER}\n");
        let header = whole.len();
        encode_open(&mut whole, &flow(1), &open_flow());
        encode_open(&mut whole, &flow(2), &open_flow());
        for cut in header..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let lines = whole[header..cut].matches('\n').count();
            let (mut journal, table) = reopen(dir.path());
            assert_eq!(table.len(), lines);
            let mut more = String::new();
            encode_open(&mut more, &flow(3), &open_flow());
            journal.append(&more, Instant::now());
            assert_eq!(reopen(dir.path()).1.len(), lines + 1);
        }
    }

    #[test]
    fn garbage_between_good_lines_is_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let mut content = format!("{HEADER}\n+ garbage\n\0\0\0\n\n");
        encode_open(&mut content, &flow(1), &open_flow());
        fs::write(dir.path().join("journal"), content).unwrap();
        assert_eq!(reopen(dir.path()).1.len(), 1);
    }

    #[test]
    fn a_file_of_another_kind_is_kept_aside() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("journal"),
            "flowd-rs journal 99\nprecious\n",
        )
        .unwrap();
        assert!(reopen(dir.path()).1.is_empty());
        let kept = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path());
        let kept: Vec<_> = kept
            .filter(|p| p.to_string_lossy().contains("unreadable"))
            .collect();
        assert!(fs::read_to_string(&kept[0]).unwrap().contains("precious"));
    }

    #[test]
    fn it_is_rewritten_when_it_has_grown_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, mut table) = reopen(dir.path());
        let epoch = Timestamp::UNIX_EPOCH;
        let mut event = FlowEvent::new(State::Start, flow(7), epoch, Origin::NamedPipe);
        table.apply(&mut event, Timestamp::UNIX_EPOCH);
        let mut lines = String::new();
        while lines.len() < 1 << 20 {
            encode_close(&mut lines, &flow(1));
        }
        while journal.length <= MIN_COMPACT_SIZE {
            journal.append(&lines, Instant::now());
            assert!(journal.length > 1 << 20);
            journal.compact_if_due(&table, Instant::now());
            if journal.length < 1 << 20 {
                break;
            }
        }
        assert!(journal.length < 200, "{}", journal.length);
        drop(journal);
        assert_eq!(reopen(dir.path()).1.len(), 1);
    }

    proptest! {
        #[test]
        fn a_record_reads_back(
            a in any::<u128>(), b in any::<u128>(), ports in (1u16.., 1u16..), udp in any::<bool>(),
            tag in (any::<u16>(), any::<u16>()), start in 0i64..4_000_000_000_000_000, opened in any::<u32>(),
            application in proptest::option::of(".*"),
        ) {
            let ip = |n: u128| std::net::IpAddr::from((n | 1 << 127).to_be_bytes());
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let flow = Flow::new(protocol, (ip(a), ports.0), (ip(b), ports.1)).unwrap();
            let tag = Tag { experiment: tag.0, activity: tag.1 };
            let start = Timestamp::from_microsecond(start).unwrap();
            let open = OpenFlow::new(tag, Origin::Firefly, start, opened, application.map(Into::into));
            let mut text = String::new();
            encode_open(&mut text, &flow, &open);
            encode_close(&mut text, &flow);
            let records: Vec<_> = text.split_terminator('\n').map(decode).collect();
            prop_assert_eq!(records, vec![Some(Record::Open(flow, open)), Some(Record::Close(flow))]);
        }

        #[test]
        fn any_line_makes_no_panic(line in ".*") {
            let _ = decode(&line);
        }
    }
}
