//! What is known of exporters, as text that is kept over restarts: a header, then one entry per line.
//!
//! ```text
//! flowd exporters 1
//! template 192.0.2.1 9 0 1700000000000000 data 0100000100010004 9ae0daaf
//! interval 192.0.2.1 9 0 1700000000000000 sampler 3 1000 414fa339
//! start 192.0.2.1 10 7 1700000000000000 1699990000000 6a5a6c1e
//! ```
//!
//! Address, version, domain, time of last use in UNIX microseconds, what is known, and the CRC-32 of the line before the last blank.
//! Template records are as they came, and are read again as if they had just come.

use std::fmt::Write as _;
use std::str::{FromStr, SplitAsciiWhitespace};

use super::{Change, Exporters};
use crate::collector::decode::options::News;
use crate::collector::decode::sampling::Scope;
use crate::collector::decode::template::{self, Kind, Record, Template};
use crate::collector::record::ExporterKey;

const HEADER: &str = "flowd exporters";
const VERSION: u32 = 1;

/// What was restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// Templates, sampling intervals and times of start.
    pub entries: usize,
    /// Entries that were not used for too long.
    pub expired: usize,
    /// Lines that are damaged.
    pub damaged: usize,
}

/// Why nothing could be restored.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It is something else.
    #[error("not a file of exporters: expected a first line \"{HEADER} {VERSION}\"")]
    Foreign,
    /// A later version of this program wrote it.
    #[error("format {0} of exporters is not known, expected {VERSION}")]
    Version(u32),
}

fn crc(text: &str) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(text.as_bytes());
    crc.sum()
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::Data => "data",
        Kind::Options => "options",
    }
}

impl Exporters {
    /// What is known, for [`Exporters::restore`].
    pub fn save(&self) -> Vec<u8> {
        let mut text = format!("{HEADER} {VERSION}\n");
        let mut line = String::new();
        // Writing to a String cannot fail.
        let mut finish = |line: &mut String| {
            let _ = writeln!(text, "{line} {:08x}", crc(line));
            line.clear();
        };
        for shard in &self.shards {
            for (key, exporter) in shard.all() {
                let key = format!("{} {} {}", key.address, key.version, key.domain);
                let used_us = exporter.used_us();
                for template in &exporter.templates {
                    let (used_us, kind) = (template.used_us(), word(template.kind()));
                    let _ = write!(line, "template {key} {used_us} {kind} ");
                    for byte in &template.record {
                        let _ = write!(line, "{byte:02x}");
                    }
                    finish(&mut line);
                }
                for (scope, interval) in exporter.sampling.iter() {
                    let _ = write!(line, "interval {key} {used_us} ");
                    let _ = match scope {
                        Scope::All => write!(line, "all 0 {interval}"),
                        Scope::Sampler(id) => write!(line, "sampler {id} {interval}"),
                        Scope::Interface(index) => write!(line, "interface {index} {interval}"),
                    };
                    finish(&mut line);
                }
                if exporter.system_init_ms != 0 {
                    let _ = write!(line, "start {key} {used_us} {}", exporter.system_init_ms);
                    finish(&mut line);
                }
            }
        }
        text.into_bytes()
    }

    /// Takes back what [`Exporters::save`] returned. A damaged line costs its own entry only.
    pub fn restore(&self, bytes: &[u8], now_s: u64) -> Result<Restored, RestoreError> {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let header = std::str::from_utf8(lines.next().unwrap_or_default());
        let version = header.ok().and_then(|header| header.strip_prefix(HEADER));
        match version.map(|version| version.trim().parse()) {
            Some(Ok(VERSION)) => {}
            Some(Ok(version)) => return Err(RestoreError::Version(version)),
            _ => return Err(RestoreError::Foreign),
        }
        let oldest_s = now_s.saturating_sub(self.limits().lifetime_s);
        let mut restored = Restored::default();
        for line in lines.filter(|line| !line.is_empty()) {
            match std::str::from_utf8(line).ok().and_then(entry) {
                Some((_, _, used_us)) if used_us / 1_000_000 < oldest_s => {
                    restored.expired += 1;
                }
                Some((key, change, used_us)) => {
                    // It is known: datagrams of unknown senders must not drive it out.
                    self.change_since(&key, [change], 0, used_us);
                    restored.entries += 1;
                }
                None => restored.damaged += 1,
            }
        }
        Ok(restored)
    }
}

/// Reads a line.
fn entry(line: &str) -> Option<(ExporterKey, Change, u64)> {
    let (line, sum) = line.rsplit_once(' ')?;
    if sum.len() != 8 || u32::from_str_radix(sum, 16) != Ok(crc(line)) {
        return None;
    }
    let mut words = line.split_ascii_whitespace();
    let what = words.next()?;
    let key = ExporterKey {
        address: next(&mut words)?,
        version: next(&mut words)?,
        domain: next(&mut words)?,
    };
    let used_us = next(&mut words)?;
    let change = match what {
        "template" => {
            let kind = match words.next()? {
                "data" => Kind::Data,
                "options" => Kind::Options,
                _ => return None,
            };
            let record = bytes(words.next()?)?;
            match template::cut(key.version, kind, &record).ok()? {
                (Record::Definition(id, whole), length) if length == record.len() => {
                    Change::Learn(Template::new(key.version, kind, id, whole, used_us).ok()?)
                }
                _ => return None,
            }
        }
        "interval" => {
            let scope = match words.next()? {
                "all" => next::<u8>(&mut words).map(|_| Scope::All),
                "sampler" => next(&mut words).map(Scope::Sampler),
                "interface" => next(&mut words).map(Scope::Interface),
                _ => None,
            };
            Change::News(News::Interval(scope?, next(&mut words)?))
        }
        "start" => Change::News(News::SystemInit(next(&mut words)?)),
        _ => return None,
    };
    words.next().is_none().then_some((key, change, used_us))
}

fn next<T: FromStr>(words: &mut SplitAsciiWhitespace<'_>) -> Option<T> {
    words.next()?.parse().ok()
}

/// The bytes of hexadecimal digits.
fn bytes(digits: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let pairs = digits.as_bytes().chunks(2);
    pairs
        .map(|pair| match *pair {
            [high, low] => Some((digit(high)? << 4 | digit(low)?) as u8),
            _ => None,
        })
        .collect()
}
