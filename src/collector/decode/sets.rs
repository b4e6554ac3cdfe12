//! NetFlow v9 and IPFIX: a header, then sets of templates, options templates or data records.

use super::plan::{Context, Places};
use super::problem::{Expected, Problem, Rejection};
use super::sequence::Counted;
use super::template::{self, Content, Kind, Record, Template};
use super::times::Clocks;
use super::{Decoded, options};
use crate::collector::exporters::{Change, Exporter, Exporters};
use crate::collector::record::{ExporterKey, FlowRecord};

const SET_HEADER: usize = 4;
/// Bytes that a set may end with without being a record that is cut off.
const MOST_PADDING: usize = 3;

/// What the header of a datagram tells.
#[derive(Clone, Copy)]
pub struct Header {
    /// Bytes of the header.
    pub length: usize,
    /// Source ID, observation domain.
    pub domain: u32,
    /// Sequence number.
    pub sequence: u32,
    /// The exporter's uptime; `None` in IPFIX.
    pub uptime_ms: Option<u32>,
    /// The exporter's clock, UNIX seconds.
    pub exporter_s: u32,
}

/// Reads a header; `None` if the datagram is too short.
pub fn header(version: u16, datagram: &[u8]) -> Option<Header> {
    let be32 = |at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(*datagram.get(at..)?.first_chunk()?))
    };
    Some(if version == 9 {
        Header {
            length: 20,
            uptime_ms: Some(be32(4)?),
            exporter_s: be32(8)?,
            sequence: be32(12)?,
            domain: be32(16)?,
        }
    } else {
        Header {
            length: 16,
            uptime_ms: None,
            exporter_s: be32(4)?,
            sequence: be32(8)?,
            domain: be32(12)?,
        }
    })
}

/// A datagram on its way through the decoder.
pub struct Datagram<'a> {
    /// Its bytes; as many as an IPFIX header says, or fewer.
    pub bytes: &'a [u8],
    /// Its exporter.
    pub key: ExporterKey,
    /// Its header.
    pub header: Header,
    /// What the header tells of each record.
    pub base: FlowRecord,
    /// The clocks.
    pub clocks: Clocks,
    /// When it arrived, UNIX microseconds.
    pub now_us: u64,
    /// What all exporters have told before.
    pub exporters: &'a Exporters,
}

/// Where the results go.
pub struct Results<'a> {
    /// Flow records are appended here.
    pub records: &'a mut Vec<FlowRecord>,
    /// What became of the datagram.
    pub decoded: &'a mut Decoded,
    /// Reused from record to record.
    pub places: &'a mut Places,
}

impl Results<'_> {
    fn reject(
        &mut self,
        reason: Rejection,
        records: usize,
        offset: usize,
        (what, found): (&'static str, usize),
        expected: Expected,
    ) {
        let problem = Problem {
            reason,
            offset,
            what,
            found,
            expected,
        };
        self.decoded.reject(problem, records as u32, 0);
    }
}

/// Decodes the sets of a datagram.
pub fn run(datagram: &Datagram<'_>, results: &mut Results<'_>) -> Counted {
    let bytes = datagram.bytes;
    let mut exporter = datagram.exporters.get(&datagram.key);
    if let Some(exporter) = &exporter {
        exporter.touch(datagram.now_us);
    }
    let mut counted = Counted {
        sequence: datagram.header.sequence,
        data_records: 0,
        flow_records: 0,
        exact: true,
        uptime_ms: datagram.header.uptime_ms,
    };
    let is_ipfix = datagram.key.version == 10;
    let mut at = datagram.header.length;
    while bytes.len() - at >= SET_HEADER {
        let id = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let length = usize::from(u16::from_be_bytes([bytes[at + 2], bytes[at + 3]]));
        let rest = bytes.len() - at;
        if length < SET_HEADER || length > rest {
            let (reason, expected) = if length > rest {
                (Rejection::Truncated, Expected::AtMost(rest))
            } else {
                (Rejection::Malformed, Expected::AtLeast(SET_HEADER))
            };
            results.reject(reason, 1, at + 2, ("set length", length), expected);
            counted.exact = false;
            return counted;
        }
        let set = Set {
            id,
            offset: at + SET_HEADER,
            bytes: &bytes[at + SET_HEADER..at + length],
        };
        let kind = match (is_ipfix, id) {
            (false, 0) | (true, 2) => Some(Kind::Data),
            (false, 1) | (true, 3) => Some(Kind::Options),
            _ => None,
        };
        let changes = match kind {
            Some(kind) => templates(datagram, kind, set, exporter.as_deref(), results),
            None if id < template::FIRST_ID => {
                let expected = Expected::Words("the id of templates or of data");
                results.reject(Rejection::Malformed, 1, at, ("set id", id.into()), expected);
                Vec::new()
            }
            None => data(datagram, set, exporter.as_deref(), results, &mut counted),
        };
        if !changes.is_empty() {
            results.decoded.templates_changed = true;
            exporter = datagram
                .exporters
                .change(&datagram.key, changes, datagram.now_us);
        }
        at += length;
    }
    counted
}

/// A set without its header.
#[derive(Clone, Copy)]
struct Set<'a> {
    id: u16,
    /// Of its first byte after the header, in the datagram.
    offset: usize,
    bytes: &'a [u8],
}

/// Reads a set of templates. Returns what changes.
fn templates(
    datagram: &Datagram<'_>,
    kind: Kind,
    set: Set<'_>,
    exporter: Option<&Exporter>,
    results: &mut Results<'_>,
) -> Vec<Change> {
    let version = datagram.key.version;
    let mut changes = Vec::new();
    let mut at = 0;
    let is_padding = |rest: &[u8]| rest.iter().all(|byte| *byte == 0);
    while set.bytes.len() - at >= SET_HEADER && !is_padding(&set.bytes[at..]) {
        let offset = set.offset + at;
        let (record, length) = match template::cut(version, kind, &set.bytes[at..]) {
            Ok(cut) => cut,
            Err(problem) => {
                results.decoded.reject(problem, 1, offset);
                break;
            }
        };
        at += length;
        let (id, record) = match record {
            Record::Withdrawal(id) => {
                changes.push(match id == set.id {
                    true => Change::WithdrawAll(kind),
                    false => Change::Withdraw(id),
                });
                continue;
            }
            Record::Definition(id, record) => (id, record),
        };
        let known = exporter.and_then(|exporter| exporter.template(id));
        let same = |known: &&Template| known.kind() == kind && *known.record == *record;
        // After a change the known one may not be the last one.
        if let Some(known) = known.filter(same).filter(|_| changes.is_empty()) {
            known.touch(datagram.now_us);
            continue;
        }
        match Template::new(version, kind, id, record, datagram.now_us) {
            Ok(template) if template.bytes() > datagram.exporters.limits().exporter_bytes / 2 => {
                let found = ("bytes of a template", record.len());
                let expected = Expected::Words("fewer, by the limit of an exporter's memory");
                results.reject(Rejection::BadTemplate, 1, offset, found, expected);
            }
            Ok(template) => changes.push(Change::Learn(template)),
            Err(problem) => results.decoded.reject(problem, 1, offset),
        }
    }
    changes
}

/// Decodes a set of data records. Returns what options records change.
fn data(
    datagram: &Datagram<'_>,
    set: Set<'_>,
    exporter: Option<&Exporter>,
    results: &mut Results<'_>,
    counted: &mut Counted,
) -> Vec<Change> {
    let mut changes = Vec::new();
    let found = ("data set", usize::from(set.id));
    let start = set.offset - SET_HEADER;
    let Some((known, template)) = exporter.and_then(|known| Some((known, known.template(set.id)?)))
    else {
        let expected = Expected::Words("its template before it");
        results.reject(Rejection::NoTemplate, 1, start, found, expected);
        counted.exact = false;
        return changes;
    };
    template.touch(datagram.now_us);
    let ran = match &template.content {
        Content::Flows(plan) => {
            let context = Context {
                base: FlowRecord {
                    sampling_interval: known.sampling().default_interval(),
                    ..datagram.base
                },
                clocks: match datagram.clocks.uptime_ms {
                    Some(_) => datagram.clocks,
                    None => datagram.clocks.since_start(known.system_init_ms()),
                },
                sampling: known.sampling(),
            };
            let ran = plan.run(set.bytes, &context, results.places, results.records);
            if plan.is_flow() {
                counted.flow_records += ran.data_records as u32;
            } else if ran.data_records > 0 {
                let expected = Expected::Words("an address or a counter in its template");
                results.reject(
                    Rejection::NotAFlow,
                    ran.data_records,
                    start,
                    found,
                    expected,
                );
            }
            ran
        }
        Content::Options(fields, scopes) => {
            let version = datagram.key.version;
            options::run(version, fields, *scopes, set.bytes, |news| {
                if !known.knows(&news) {
                    changes.push(Change::News(news));
                }
            })
        }
    };
    counted.data_records += ran.data_records as u32;
    let rest = &set.bytes[ran.bytes..];
    if rest.len() > MOST_PADDING && rest.iter().any(|byte| *byte != 0) {
        let found = ("data set with bytes left:", rest.len());
        let expected = Expected::Words("a whole record, or padding");
        results.reject(
            Rejection::Truncated,
            1,
            set.offset + ran.bytes,
            found,
            expected,
        );
    }
    changes
}
