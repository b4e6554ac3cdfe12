//! `flowd-rs reader`: prints, selects, sums up and copies the flow records of segments. Its options are those of djm's
//! flowd-reader and some more.

pub(super) mod arguments;
mod csv;
mod input;
mod json;
mod line;
mod names;
mod output;
mod period;
mod progress;
mod selection;
mod sums;
mod text;

use std::io::{ErrorKind, IsTerminal, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use argh::{ArgsInfo, FromArgs};
use jiff::Zoned;
use jiff::tz::TimeZone;

use crate::collector::filter::Where;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;
use crate::collector::store::segment::{self, SegmentError, v2};
use crate::error::{Error, Result};
use crate::registry::Registry;
use input::{Input, Problem, Source};
use names::Names;
use output::Output;
use period::{Clock, Period};
use progress::Progress;
use selection::{Rules, Selection};
use sums::{Columns, Style, Sums};
use text::Text;

/// Print, select, sum up or copy stored flow records.
#[derive(ArgsInfo, FromArgs)]
#[argh(subcommand, name = "reader", help_triggers("-h", "--help", "help"))]
pub struct Reader {
    /// print all fields of each record
    #[argh(switch, short = 'v')]
    verbose: bool,

    /// print CSV, as flow-tools does
    #[argh(switch, short = 'c')]
    csv: bool,

    /// print a JSON object per record
    #[argh(switch)]
    json: bool,

    /// print no records
    #[argh(switch, short = 'q')]
    quiet: bool,

    /// times are in UTC, not in local time
    #[argh(switch, short = 'U')]
    utc: bool,

    /// stop after so many records
    #[argh(option, short = 'H', arg_name = "count")]
    head: Option<u64>,

    /// only records received at this time or later: 2026-11-24T17:00:00Z,
    /// 2026-11-24T17:00 (local time), -1h30m (before now)
    #[argh(option, arg_name = "time")]
    from: Option<String>,

    /// only records received before this time
    #[argh(option, arg_name = "time")]
    to: Option<String>,

    /// only records that match the clauses of a rule: 'src 192.0.2.0/24 proto tcp'
    #[argh(option, long = "where", arg_name = "clauses")]
    clauses: Option<String>,

    /// only records that the rules in a file accept, with their tags
    #[argh(option, short = 'f', arg_name = "file")]
    filter: Option<PathBuf>,

    /// sum up by fields: src, dst, src/24, dst/48, src_port, dst_port, src_as,
    /// dst_as, in_if, out_if, proto, exporter, tag, experiment, activity, label
    #[argh(option, arg_name = "fields", from_str_fn(Columns::parse))]
    sum_by: Option<Columns>,

    /// print only so many sums, those with the most bytes
    #[argh(option, arg_name = "count")]
    top: Option<usize>,

    /// append the records to a file, - for standard output
    #[argh(option, short = 'o', arg_name = "file")]
    output: Option<PathBuf>,

    /// the files are of version 2, which flowd wrote before 0.9
    #[argh(switch, short = 'L')]
    legacy: bool,

    /// say on standard error what each file has
    #[argh(switch, short = 'd')]
    debug: bool,

    /// files, directories of segments, - for standard input
    #[argh(positional, arg_name = "file")]
    files: Vec<PathBuf>,
}

/// A record as it was stored.
struct Stored<'a> {
    record: &'a FlowRecord,
    fields: Fields,
    /// The CRC, if the record has one.
    crc: Option<u32>,
}

impl Reader {
    pub fn run(self) -> Result<ExitCode> {
        let now = match self.utc {
            true => Zoned::now().with_time_zone(TimeZone::UTC),
            false => Zoned::now(),
        };
        let period = self.check(&now)?;
        let zone = now.time_zone();
        let registry = super::registry::load(None);
        let selection = self.selection(period, &registry, zone)?;
        let format = self.format(zone.clone());
        let (inputs, errors) = input::list(&self.files, period);
        let copy = match &self.output {
            Some(path) => Some(Output::copy(path, &inputs)?),
            None => None,
        };
        let total = match inputs.iter().any(|input| input.length == 0) {
            true => 0,
            false => inputs.iter().map(|input| input.length).sum(),
        };
        let is_quiet = matches!(format, Format::Nothing | Format::Sums(..)) && copy.is_none();
        let mut run = Run {
            is_debug: self.debug,
            is_v2: self.legacy,
            is_verbose: self.verbose && matches!(format, Format::Text(_)),
            selection,
            left: self.head.unwrap_or(u64::MAX),
            names: Names::new(registry),
            started: Clock::new(zone.clone()),
            format,
            out: Output::standard(),
            copy,
            progress: Progress::new(is_quiet || !stdout().is_terminal(), total),
            has_failed: false,
        };
        for error in errors {
            run.fail(&error);
        }
        match run.all(&inputs, self.top) {
            // The reader (head, less) may close the pipe early.
            Err(Error::Resource { source, .. }) if source.kind() == ErrorKind::BrokenPipe => {}
            result => result?,
        }
        run.progress.clear();
        Ok(ExitCode::from(u8::from(run.has_failed)))
    }

    /// Checks the options against one another, and reads the period.
    fn check(&self, now: &Zoned) -> Result<Period> {
        let usage = |message: &str| Error::Usage(format!("{message}\nSee `flowd-rs help reader`."));
        if self.files.is_empty() {
            return Err(usage("missing argument: file"));
        }
        if self.csv && self.json {
            return Err(usage("-c and --json exclude each other"));
        }
        let prints = self.verbose || self.csv || self.json || self.sum_by.is_some();
        if self.output.as_deref() == Some(Path::new("-")) && prints {
            return Err(usage(
                "-o -: only records may go to standard output, without -v, -c, --json and --sum-by",
            ));
        }
        if self.top.is_some() && self.sum_by.is_none() {
            return Err(usage("--top needs --sum-by"));
        }
        let time = |option: &str, text: &Option<String>| {
            let time = text.as_deref().map(|text| period::time(text, now));
            let time = time.transpose();
            time.map_err(|error| usage(&format!("{option}: {error}")))
        };
        let (from, to) = (time("--from", &self.from)?, time("--to", &self.to)?);
        if from.zip(to).is_some_and(|(from, to)| from >= to) {
            return Err(usage("--from must be earlier than --to"));
        }
        Ok(Period { from, to })
    }

    fn selection(&self, period: Period, registry: &Registry, zone: &TimeZone) -> Result<Selection> {
        let clauses = self.clauses.as_deref();
        let clauses = clauses.map(|text| Where::parse(text, registry, zone.clone()));
        let clauses = clauses.transpose().map_err(|error| {
            Error::Usage(format!(
                "--where: column {}: {}",
                error.place.1, error.message
            ))
        })?;
        let rules = self.filter.as_deref();
        let rules = rules.map(|path| Rules::load(path, registry, zone.clone()));
        Ok(Selection {
            period,
            clauses,
            rules: rules.transpose()?,
        })
    }

    fn format(&self, zone: TimeZone) -> Format {
        // As with djm's, a copy is not printed as well, unless that is asked for.
        let is_quiet = self.quiet || self.output.is_some() && !self.verbose;
        match &self.sum_by {
            Some(columns) => Format::Sums(Sums::new(columns.clone()), self.style()),
            None if self.quiet => Format::Nothing,
            None if self.csv => Format::Csv,
            None if self.json => Format::Json,
            None if is_quiet => Format::Nothing,
            None => Format::Text(Text::new(self.verbose, zone)),
        }
    }

    fn style(&self) -> Style {
        match (self.csv, self.json) {
            (true, _) => Style::Csv,
            (_, true) => Style::Json,
            _ => Style::Table,
        }
    }
}

/// How records are printed.
enum Format {
    Nothing,
    Text(Text),
    Csv,
    Json,
    Sums(Sums, Style),
}

/// A run of the command.
struct Run {
    is_debug: bool,
    is_v2: bool,
    /// Each file is announced.
    is_verbose: bool,
    selection: Selection,
    /// How many records are still wanted.
    left: u64,
    names: Names,
    started: Clock,
    format: Format,
    out: Output,
    copy: Option<Output>,
    progress: Progress,
    has_failed: bool,
}

impl Run {
    /// Tells of a failure that the other inputs survive.
    fn fail(&mut self, message: &str) {
        self.progress.clear();
        eprintln!("flowd-rs: {message}");
        self.has_failed = true;
    }

    fn all(&mut self, inputs: &[Input], top: Option<usize>) -> Result<()> {
        if matches!(self.format, Format::Csv) {
            self.out.buffer.extend_from_slice(csv::HEADER.as_bytes());
        }
        for input in inputs {
            if self.left == 0 {
                break;
            }
            match input.open(self.is_v2) {
                Ok(Ok(source)) => self.input(input, source)?,
                Ok(Err(error)) => self.fail(&format!("{}: {error}", input.name())),
                Err(error) => self.fail(&format!("{}: {error}", input.name())),
            }
            self.progress.input(input.length);
        }
        self.progress.clear();
        if let Some(rules) = self.selection.rules.as_ref().filter(|_| self.is_debug) {
            for line in rules.statistics() {
                eprintln!("flowd-rs: {line}");
            }
        }
        if let Format::Sums(sums, style) = std::mem::replace(&mut self.format, Format::Nothing) {
            // Writing to a Vec cannot fail.
            let _ = sums.print(top, style, &mut self.out.buffer);
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush()?;
        self.copy.as_mut().map_or(Ok(()), Output::flush)
    }

    fn input(&mut self, input: &Input, mut source: Source) -> Result<()> {
        if self.is_verbose {
            self.announce(input, &source);
        }
        // What a pipe gives is printed before more of it is waited for.
        let is_live = input.length == 0;
        let (mut records, mut selected, mut skipped) = (0_u64, 0_u64, 0_u64);
        while self.left > 0 {
            match source.next() {
                None => break,
                Some(Ok((mut record, mut fields))) => {
                    records += 1;
                    self.progress.record(source.offset());
                    let tag = record.rule_tag;
                    if self.selection.takes(&mut record, &mut fields) {
                        selected += 1;
                        self.left -= 1;
                        let is_changed = record.rule_tag != tag;
                        self.record(&record, fields, &source, is_changed)?;
                    }
                }
                Some(Err(Problem::Skipped(damage)))
                    if matches!(damage.reason, SegmentError::Truncated { .. })
                        && source.is_drained()
                        && input.is_being_written(source.offset()) =>
                {
                    break;
                }
                Some(Err(Problem::Skipped(damage))) => {
                    skipped += damage.bytes;
                    let hint = match is_v2_magic(&damage) {
                        true => "; a file of version 2 is read with -L",
                        false => "",
                    };
                    self.fail(&format!("{}: {damage}{hint}", input.name()));
                }
                Some(Err(Problem::Ended(error))) => {
                    self.fail(&format!("{}: {error}", input.name()));
                    break;
                }
            }
            if is_live && source.is_drained() {
                self.flush()?;
            }
        }
        if self.is_debug {
            self.progress.clear();
            eprintln!(
                "flowd-rs: {}: {} bytes, {records} records, {selected} of them selected, {skipped} bytes skipped",
                input.name(),
                source.offset()
            );
        }
        Ok(())
    }

    fn announce(&mut self, input: &Input, source: &Source) {
        let mut line = format!("LOGFILE {}", input.name());
        if let Some(second) = source.started_s() {
            line += &format!(" started at {}", self.started.text(second));
        }
        line.push('\n');
        self.out.buffer.extend_from_slice(line.as_bytes());
    }

    /// Prints or copies a record. `is_changed` is for one that is not as it was stored.
    fn record(
        &mut self,
        record: &FlowRecord,
        fields: Fields,
        source: &Source,
        is_changed: bool,
    ) -> Result<()> {
        let has_crc = fields.contains(Fields::CRC32);
        let stored = Stored {
            record,
            fields,
            crc: has_crc.then(|| source.crc()),
        };
        let out = &mut self.out.buffer;
        match &mut self.format {
            Format::Nothing => {}
            Format::Text(text) => text.record(&stored, &mut self.names, out),
            Format::Csv => csv::record(&stored, out),
            Format::Json => json::record(&stored, &mut self.names, out),
            Format::Sums(sums, _) => sums.add(record, fields, &mut self.names),
        }
        if let Some(copy) = &mut self.copy {
            match source.bytes() {
                Some(bytes) if !is_changed => copy.buffer.extend_from_slice(bytes),
                _ => segment::encode(record, fields, &mut copy.buffer),
            }
            if copy.is_full() {
                copy.flush()?;
            }
        }
        if self.out.is_full() {
            self.out.flush()?;
        }
        Ok(())
    }
}

/// Whether the damage is the header of a file of version 2.
fn is_v2_magic(damage: &segment::Damage) -> bool {
    let first = v2::MAGIC.to_be_bytes()[0];
    damage.offset == 0 && damage.reason == SegmentError::Version(first)
}
