//! The journal of open flows: a text file to which every opened and closed flow is appended, so that open flows
//! survive a crash, a kill and an upgrade.
//!
//! ```text
//! flowd-rs journal 2
//! + <start, µs since 1970> <entered, s since the host started> <sequence> namedPipe tcp 192.0.2.1 443 192.0.2.2 5000 2 9 "application"
//! = <cookie> tcp 192.0.2.1 443 192.0.2.2 5000
//! - tcp 192.0.2.1 443 192.0.2.2 5000
//! ```
//!
//! `=` gives the socket of a flow, in the direction of the socket. The sequence numbers give the order of the starts.
//! In version 1, `entered` counts from 1970, and the order of the lines is that of the starts. The application is a JSON string and may be absent. Appends are not synced to the disk: data that the kernel has
//! survives the daemon, and a host that goes down takes its flows with it.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::Level;
use serde_json::Value;

use super::flow_table::{FlowTable, OpenFlow};
use super::shards::SHARDS;
use crate::event::Origin;
use crate::flow::{Flow, Protocol, Tag};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::clock;
use crate::sys::directory::Directory;

/// The version of the journals that are written.
pub const VERSION: u8 = 2;
const HEADER: &str = "flowd-rs journal 2";
/// What the header of every version begins with.
const HEADER_ANY: &str = "flowd-rs journal ";
const HEADER_1: &str = "flowd-rs journal 1";
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
    /// The socket of a flow became known; the flow is in the direction of the socket.
    Socket(Flow, u64),
    /// A flow was closed.
    Close(Flow),
}

/// Appends the line of an opened flow to `out`, and that of its socket, if it is known.
pub fn encode_open(out: &mut String, flow: &Flow, open: &OpenFlow) {
    out.push_str("+ ");
    put_number(out, open.start_time().as_microsecond());
    put_number(out, open.entered);
    put_number(out, open.sequence);
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
    if let Some(socket) = open.socket {
        encode_socket(out, &socket.direction(flow), socket.cookie.get());
    }
}

/// Appends the line of the socket of a flow to `out`.
pub fn encode_socket(out: &mut String, flow: &Flow, cookie: u64) {
    out.push_str("= ");
    put_number(out, cookie);
    encode_flow(out, flow);
    out.pop();
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

/// Reads one line, of version 1 or 2, without its newline.
pub fn decode(line: &str, version: u8) -> Option<Record> {
    let (kind, rest) = line.split_once(' ')?;
    match kind {
        "+" => {
            let mut fields = rest.splitn(10 + usize::from(version), ' ');
            let start = Timestamp::from_microsecond(fields.next()?.parse().ok()?).ok()?;
            let entered = fields.next()?.parse().ok()?;
            let sequence = match version {
                1 => 0,
                _ => fields.next()?.parse().ok()?,
            };
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
            let mut open = OpenFlow::new(tag, origin, start, entered, application);
            open.sequence = sequence;
            Some(Record::Open(flow, open))
        }
        "=" => {
            let mut fields = rest.split(' ');
            let cookie = fields.next()?.parse().ok()?;
            let flow = decode_flow(&mut fields)?;
            fields
                .next()
                .is_none()
                .then_some(Record::Socket(flow, cookie))
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
    directory: Directory,
    path: PathBuf,
    /// `None` if the state directory is on a read-only file system.
    file: Option<File>,
    /// Bytes of whole lines in the file.
    length: u64,
    /// [`Journal::length`] after the last rewrite.
    compact_length: u64,
    /// While the file lacks events: when a write last failed.
    failed_at: Option<Instant>,
    rewrite: Option<Rewrite>,
    counters: Outcomes<Written>,
    limit: LogLimit,
}

/// The name of the journal in the state directory, and of a new one that is not complete.
const FILE: &str = "journal";
const NEW_FILE: &str = "journal.new";

/// A new journal that is being written beside the old one, shard by shard.
struct Rewrite {
    out: BufWriter<File>,
    length: u64,
    next_shard: usize,
}

impl Rewrite {
    /// Creates the new file, with its header.
    fn begin(directory: &Directory) -> io::Result<Rewrite> {
        let file = directory.create_new(NEW_FILE)?;
        let mut rewrite = Rewrite {
            out: BufWriter::with_capacity(1 << 20, file),
            length: 0,
            next_shard: 0,
        };
        rewrite.append(&format!("{HEADER}\n"))?;
        Ok(rewrite)
    }

    fn append(&mut self, lines: &str) -> io::Result<()> {
        self.length += lines.len() as u64;
        self.out.write_all(lines.as_bytes())
    }

    /// Writes the flows of the next shard.
    fn write_shard(&mut self, table: &FlowTable) -> io::Result<()> {
        let lines = lines_of_shard(table, self.next_shard);
        self.next_shard += 1;
        self.append(&lines)
    }

    fn is_complete(&self) -> bool {
        self.next_shard == SHARDS
    }

    /// Renames the new file into the place of the old one. Returns it, open for appending, and its length.
    fn finish(self, directory: &Directory) -> io::Result<(File, u64)> {
        let file = self.out.into_inner();
        let file = file.map_err(io::IntoInnerError::into_error)?;
        directory.rename(NEW_FILE, FILE)?;
        Ok((file, self.length))
    }
}

fn lines_of_shard(table: &FlowTable, index: usize) -> String {
    let mut lines = String::new();
    for (flow, open) in table.shard(index) {
        encode_open(&mut lines, &flow, open);
    }
    lines
}

impl Journal {
    /// Reads the journal in `state_dir` into `table`, rewrites it, and opens it for appending.
    ///
    /// Unreadable lines are skipped with a warning. A failure to rewrite the file, for example on a full disk, is a
    /// warning too; on a read-only file system the daemon runs without a journal. Other failures to open or read the
    /// file are errors.
    pub fn open(state_dir: &Path, table: &mut FlowTable, metrics: &Metrics) -> io::Result<Journal> {
        let directory = Directory::open(state_dir)?;
        let path = directory.shown(FILE);
        let length = match directory.read(FILE) {
            Ok(file) => read(&directory, file, table)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let file = match directory.append(FILE) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                let path = path.display();
                log::warn!("journal {path}: {error}; running without a journal");
                None
            }
            Err(error) => return Err(error),
        };
        let mut journal = Journal {
            directory,
            path,
            file,
            length,
            compact_length: length,
            failed_at: None,
            rewrite: None,
            counters: metrics.journal(),
            limit: LogLimit::new(Level::Error, "journal: failed writes"),
        };
        if let Err(error) = journal.rewrite_at_once(table) {
            journal.fail(Instant::now(), &error);
            if let Some(file) = &journal.file {
                // The next line must not continue a torn one.
                let _ = file.set_len(journal.length);
            }
        }
        Ok(journal)
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a rewrite is under way, which [`Journal::maintain`] continues.
    pub fn is_rewriting(&self) -> bool {
        self.rewrite.is_some()
    }

    /// Appends whole lines in one write. If a write fails, the lines are dropped, and the journal is rewritten from the
    /// table as soon as it can be written again.
    pub fn append(&mut self, lines: &str, now: Instant) {
        if lines.is_empty() || self.file.is_none() {
            return;
        }
        // A shard that is still to be written will have these flows as they are then: to have them twice does no harm.
        if let Some(Err(error)) = self.rewrite.as_mut().map(|new| new.append(lines)) {
            self.give_up_rewrite(&error);
        }
        let Some(file) = self.file.as_mut().filter(|_| self.failed_at.is_none()) else {
            return;
        };
        match file.write_all(lines.as_bytes()) {
            Ok(()) => {
                self.length += lines.len() as u64;
                self.counters.add(Written::Done);
            }
            Err(error) => {
                let _ = file.set_len(self.length);
                self.fail(now, &error);
                // Tried at once: flows that ended have made room.
                self.failed_at = now.checked_sub(RETRY_INTERVAL).or(Some(now));
            }
        }
    }

    /// Continues a rewrite by one shard. Begins one if more than half of the journal is about closed flows. Tries to
    /// repair a journal that lacks events. To be called after every batch and about once a second.
    pub fn maintain(&mut self, table: &FlowTable, now: Instant) {
        self.limit.tick(now);
        if self.file.is_none() {
            return;
        }
        if let Some(failed_at) = self.failed_at {
            if now.duration_since(failed_at) >= RETRY_INTERVAL {
                self.repair(table, now);
            }
            return;
        }
        let result = match &mut self.rewrite {
            Some(new) => new.write_shard(table),
            None if self.length > MIN_COMPACT_SIZE && self.length > 2 * self.compact_length => {
                Rewrite::begin(&self.directory).map(|new| self.rewrite = Some(new))
            }
            None => return,
        };
        let result = result.and_then(|()| match self.rewrite.take_if(|new| new.is_complete()) {
            Some(new) => self.replace(new),
            None => Ok(()),
        });
        if let Err(error) = result {
            self.give_up_rewrite(&error);
        }
    }

    /// The old file is longer than necessary, but complete.
    fn give_up_rewrite(&mut self, error: &io::Error) {
        self.rewrite = None;
        let _ = self.directory.remove(NEW_FILE);
        self.compact_length = self.length;
        let path = self.path.display();
        log::warn!("journal {path}: cannot be compacted: {error}");
    }

    fn repair(&mut self, table: &FlowTable, now: Instant) {
        self.rewrite = None;
        let result = self.rewrite_at_once(table).or_else(|error| {
            match error.kind() {
                // The old file holds the space that the new one lacks.
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    self.rewrite_in_place(table).map_err(|_| error)
                }
                _ => Err(error),
            }
        });
        match result {
            Ok(()) => log::warn!(
                "journal {}: writable again, and complete",
                self.path.display()
            ),
            Err(error) => self.fail(now, &error),
        }
    }

    fn rewrite_at_once(&mut self, table: &FlowTable) -> io::Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let rewrite = || {
            let mut new = Rewrite::begin(&self.directory)?;
            while !new.is_complete() {
                new.write_shard(table)?;
            }
            Ok(new)
        };
        let replaced = rewrite().and_then(|new| self.replace(new));
        replaced.inspect_err(|_| {
            let _ = self.directory.remove(NEW_FILE);
        })
    }

    fn replace(&mut self, new: Rewrite) -> io::Result<()> {
        let (file, length) = new.finish(&self.directory)?;
        self.file = Some(file);
        self.note_rewrite(length);
        Ok(())
    }

    /// Overwrites the file with the open flows, in the blocks that it has, and cuts it. Fails if they do not fit. A crash
    /// between the two steps may bring back flows that have ended.
    fn rewrite_in_place(&mut self, table: &FlowTable) -> io::Result<()> {
        let mut lines = format!("{HEADER}\n");
        for index in 0..SHARDS {
            lines += &lines_of_shard(table, index);
            if lines.len() as u64 > self.length {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        let file = self.directory.open_or_create(FILE)?;
        file.write_all_at(lines.as_bytes(), 0)?;
        file.set_len(lines.len() as u64)?;
        self.note_rewrite(lines.len() as u64);
        Ok(())
    }

    fn note_rewrite(&mut self, length: u64) {
        self.length = length;
        self.compact_length = length;
        self.failed_at = None;
        self.counters.add(Written::Rewritten);
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

/// Reads a journal into `table`. Returns the length of its whole lines, in bytes.
fn read(directory: &Directory, file: File, table: &mut FlowTable) -> io::Result<u64> {
    let mut input = BufReader::with_capacity(1 << 20, file);
    let mut line = Vec::new();
    let (mut number, mut length, mut skipped) = (0u64, 0, 0u64);
    let path = directory.shown(FILE);
    let shown = path.display();
    let (boot, wall) = (clock::boottime().as_secs(), Timestamp::now().as_second());
    let (mut version, mut has_header) = (VERSION, true);
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
            match record {
                Some(HEADER) => {}
                Some(HEADER_1) => version = 1,
                // Another version; or a header that was damaged, in front of good lines.
                Some(other) if other.starts_with(HEADER_ANY) => return set_aside(directory),
                _ => has_header = false,
            }
            continue;
        }
        match record.and_then(|line| decode(line, version)) {
            Some(Record::Open(flow, mut open)) => {
                let entered = match version {
                    1 => boot.saturating_add_signed(i64::from(open.entered) - wall),
                    _ => open.entered.into(),
                };
                // The host may have been started again since.
                open.entered = u32::try_from(entered.min(boot)).unwrap_or(u32::MAX);
                table.restore(flow, open);
            }
            Some(Record::Socket(flow, cookie)) => table.restore_socket(&flow, cookie),
            Some(Record::Close(flow)) => table.forget(&flow),
            None => {
                skipped += 1;
                if skipped == 1 {
                    log::warn!("journal {shown}: line {number} is not a valid record, skipped");
                }
            }
        }
    }
    if !has_header {
        if number == skipped + 1 {
            return set_aside(directory);
        }
        log::warn!("journal {shown}: its first line is damaged; the others are used");
    }
    if skipped > 1 {
        log::warn!("journal {shown}: skipped {skipped} lines that are not valid records");
    }
    Ok(length)
}

/// Keeps a file that is not a journal of this version under another name.
fn set_aside(directory: &Directory) -> io::Result<u64> {
    let aside = format!("{FILE}.unreadable.{}", Timestamp::now().as_second());
    directory.rename(FILE, &aside)?;
    let (path, aside) = (directory.shown(FILE), directory.shown(&aside));
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
    use crate::dispatcher::flow_table::Now;
    use crate::event::{FlowEvent, State};
    use proptest::prelude::*;
    use std::fs;

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
        assert_eq!(decode(old.trim_end(), 2), expected);
        // Version 1 has no sequence number.
        let first = old.replacen(" 0 named_pipe", " named_pipe", 1);
        assert_eq!(
            decode(first.trim_end(), 1),
            Some(Record::Open(flow(1), open_flow()))
        );
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
        assert_eq!((table.len(), table.get(&flow(2)).is_some()), (1, true));
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
        let now = Now {
            wall: epoch,
            boot: Duration::ZERO,
        };
        table.apply(&mut event, now, |_| None);
        let mut lines = String::new();
        while lines.len() < 1 << 20 {
            encode_close(&mut lines, &flow(1));
        }
        while journal.length <= MIN_COMPACT_SIZE {
            journal.append(&lines, Instant::now());
            assert!(journal.length > 1 << 20);
            // As often as there are shards, and once to begin.
            for _ in 0..=SHARDS {
                journal.maintain(&table, Instant::now());
            }
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
            application in proptest::option::of(".*"), sequence in 1u64.., cookie in 1u64..,
        ) {
            let ip = |n: u128| std::net::IpAddr::from((n | 1 << 127).to_be_bytes());
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let flow = Flow::new(protocol, (ip(a), ports.0), (ip(b), ports.1)).unwrap();
            let tag = Tag { experiment: tag.0, activity: tag.1 };
            let start = Timestamp::from_microsecond(start).unwrap();
            let mut open = OpenFlow::new(tag, Origin::Firefly, start, opened, application.map(Into::into));
            open.sequence = sequence;
            let mut text = String::new();
            encode_open(&mut text, &flow, &open);
            encode_socket(&mut text, &flow, cookie);
            encode_close(&mut text, &flow);
            let records: Vec<_> = text.split_terminator('\n').map(|line| decode(line, 2)).collect();
            let expected = [Record::Open(flow, open), Record::Socket(flow, cookie), Record::Close(flow)];
            prop_assert_eq!(records, expected.map(Some).to_vec());
        }

        #[test]
        fn any_line_makes_no_panic(line in ".*") {
            let _ = (decode(&line, 1), decode(&line, 2));
        }
    }
}
