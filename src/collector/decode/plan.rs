//! Plans: a template of data records, compiled once to a list of copies into the flat [`FlowRecord`].
//!
//! Where no field has a variable length, a copy runs over all records of a set before the next copy does: what to do is decided once a
//! set, not once a record.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::elements::{self, Form, Part};
use super::sampling::{Sampling, Scope};
use super::template::Field;
use super::times::{self, Clocks, plausible};
use crate::collector::record::FlowRecord;

const ICMP: u8 = 1;
const ICMP_V6: u8 = 58;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// What all records of a set have in common.
pub struct Context<'a> {
    /// What the header tells of each record.
    pub base: FlowRecord,
    /// The clocks at the time of the datagram.
    pub clocks: Clocks,
    /// The sampling intervals of the exporter.
    pub sampling: &'a Sampling,
}

/// Copies a field of each data record to its part of the flow record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FieldCopy {
    part: Part,
    form: Form,
    /// Whether the field takes precedence over what filled the same place before it only if it has a value of its own.
    yields: bool,
    /// In bytes from the start of the data record, where no field has a variable length.
    offset: u16,
    /// In bytes; unused where the length is variable.
    length: u16,
}

/// How to find the fields of a data record that has fields of variable length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Fields that no copy needs.
    Skip(u16),
    /// A field of variable length that no copy needs.
    SkipVariable,
    /// The field of a copy.
    Take(u8),
    /// The field of a copy, of variable length.
    TakeVariable(u8),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Layout {
    Fixed {
        length: usize,
    },
    Variable {
        steps: Box<[Step]>,
        /// The length of a data record at least.
        minimum: usize,
    },
}

/// A template of data records, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    layout: Layout,
    /// Sorted by part: first those of the flow, then, from `reverse` on, those of the opposite direction.
    copies: Box<[FieldCopy]>,
    reverse: usize,
    is_flow: bool,
}

/// Where the fields of a data record of variable length are.
#[derive(Debug, Default)]
pub struct Places {
    /// Offset and length of the field of each copy.
    fields: Vec<(u16, u16)>,
    /// Offsets of all bytes that tell a length.
    lengths: Vec<usize>,
}

/// What became of a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Data records that were decoded.
    pub data_records: usize,
    /// Bytes that they took. What follows is padding, or a record that is cut off.
    pub bytes: usize,
}

impl Plan {
    /// Compiles the fields of a template; `None` if a record would have no bytes, or would be longer than any datagram.
    pub fn new(fields: &[Field]) -> Option<Plan> {
        let mut chosen: Vec<(bool, Part, u8, usize)> = Vec::new();
        for (index, field) in fields.iter().enumerate() {
            let reverse = match field.enterprise {
                0 => false,
                elements::REVERSE => true,
                _ => continue,
            };
            let Some((part, form, rank)) = elements::meaning(field.element) else {
                continue;
            };
            if reverse && !may_be_reversed(part) {
                continue;
            }
            if !field.is_variable() && !form.accepts(field.length.into()) {
                continue;
            }
            let same = |other: &&mut (bool, Part, u8, usize)| (other.0, other.1) == (reverse, part);
            match chosen.iter_mut().find(same) {
                // The first of equal rank is the outermost (RFC 7011, 8).
                Some(other) if other.2 <= rank => {}
                Some(other) => *other = (reverse, part, rank, index),
                None => chosen.push((reverse, part, rank, index)),
            }
        }
        chosen.sort_unstable();
        let reverse = chosen.partition_point(|(reverse, ..)| !reverse);
        let has = |part| {
            chosen[..reverse]
                .iter()
                .any(|(_, other, ..)| *other == part)
        };
        let is_flow = [
            Part::Octets,
            Part::Packets,
            Part::SourceV4,
            Part::SourceV6,
            Part::DestinationV4,
            Part::DestinationV6,
        ]
        .into_iter()
        .any(has);
        let mut offsets = Vec::with_capacity(fields.len());
        let mut length = 0;
        for field in fields {
            offsets.push(length);
            length += field.least_bytes();
        }
        if !(1..=usize::from(u16::MAX)).contains(&length) {
            return None;
        }
        let copy = |&(_, part, _, index): &(bool, Part, u8, usize)| {
            let field: &Field = &fields[index];
            FieldCopy {
                part,
                form: elements::meaning(field.element).map_or(Form::Integer, |(_, form, _)| form),
                yields: match part {
                    Part::SourceV4 => has(Part::SourceV6),
                    Part::DestinationV4 => has(Part::DestinationV6),
                    Part::NextHopV4 => has(Part::NextHopV6),
                    Part::SourceMaskV4 => has(Part::SourceMaskV6),
                    Part::DestinationMaskV4 => has(Part::DestinationMaskV6),
                    _ => false,
                },
                offset: offsets[index] as u16,
                length: field.length,
            }
        };
        let copies: Box<[FieldCopy]> = chosen.iter().map(copy).collect();
        let layout = if fields.iter().any(Field::is_variable) {
            let mut steps = Vec::new();
            for (index, field) in fields.iter().enumerate() {
                // There are fewer copies than parts, of which there are few.
                let copy = chosen.iter().position(|(.., field)| *field == index);
                match (copy.map(|copy| copy as u8), steps.last_mut()) {
                    (Some(copy), _) if field.is_variable() => steps.push(Step::TakeVariable(copy)),
                    (Some(copy), _) => steps.push(Step::Take(copy)),
                    (None, _) if field.is_variable() => steps.push(Step::SkipVariable),
                    // The sum of all lengths was checked above.
                    (None, Some(Step::Skip(length))) => *length += field.length,
                    (None, _) => steps.push(Step::Skip(field.length)),
                }
            }
            Layout::Variable {
                steps: steps.into(),
                minimum: length,
            }
        } else {
            Layout::Fixed { length }
        };
        Some(Plan {
            layout,
            copies,
            reverse,
            is_flow,
        })
    }

    /// Whether a record tells of a flow: has an address or a counter.
    pub fn is_flow(&self) -> bool {
        self.is_flow
    }

    /// Memory in use on the heap, in bytes.
    pub fn heap_bytes(&self) -> usize {
        let steps = match &self.layout {
            Layout::Fixed { .. } => 0,
            Layout::Variable { steps, .. } => size_of_val::<[Step]>(steps),
        };
        size_of_val::<[FieldCopy]>(&self.copies) + steps
    }

    /// Decodes the data records of a set, without its header, and appends the flow records.
    pub fn run(
        &self,
        set: &[u8],
        context: &Context<'_>,
        places: &mut Places,
        records: &mut Vec<FlowRecord>,
    ) -> Ran {
        match &self.layout {
            Layout::Fixed { length } => {
                let data_records = set.len() / length;
                let set = &set[..data_records * length];
                if self.is_flow {
                    let new = records.len();
                    records.resize(new + data_records, context.base);
                    let rows = Rows {
                        bytes: set,
                        stride: *length,
                    };
                    self.fill(rows, context, None, new, records);
                }
                Ran {
                    data_records,
                    bytes: set.len(),
                }
            }
            Layout::Variable { steps, minimum } => {
                let mut ran = Ran {
                    data_records: 0,
                    bytes: 0,
                };
                while set.len() - ran.bytes >= *minimum {
                    let rest = &set[ran.bytes..];
                    let Some(length) = self.find(steps, rest, places) else {
                        break;
                    };
                    // Most names are as long as the one before: what has the same lengths is decoded together.
                    let like_first =
                        |row: &&[u8]| places.lengths.iter().all(|at| row[*at] == rest[*at]);
                    let alike = rest.chunks_exact(length).take_while(like_first).count();
                    if self.is_flow {
                        let new = records.len();
                        records.resize(new + alike, context.base);
                        let rows = Rows {
                            bytes: &rest[..alike * length],
                            stride: length,
                        };
                        self.fill(rows, context, Some(&places.fields), new, records);
                    }
                    ran.data_records += alike;
                    ran.bytes += alike * length;
                }
                ran
            }
        }
    }

    /// Finds the fields of the first data record in `bytes`. Returns its length, `None` if it is cut off.
    fn find(&self, steps: &[Step], bytes: &[u8], places: &mut Places) -> Option<usize> {
        places.lengths.clear();
        places.fields.clear();
        places.fields.resize(self.copies.len(), (0, 0));
        let mut at = 0_usize;
        for step in steps {
            let (copy, length) = match *step {
                Step::Skip(length) => (None, usize::from(length)),
                Step::Take(copy) => (Some(copy), self.copies[usize::from(copy)].length.into()),
                Step::SkipVariable | Step::TakeVariable(_) => {
                    // RFC 7011, 7.
                    let mut length = usize::from(*bytes.get(at)?);
                    places.lengths.push(at);
                    at += 1;
                    if length == 255 {
                        let long = bytes.get(at..)?.first_chunk()?;
                        length = u16::from_be_bytes(*long).into();
                        places.lengths.extend([at, at + 1]);
                        at += 2;
                    }
                    match *step {
                        Step::TakeVariable(copy) => (Some(copy), length),
                        _ => (None, length),
                    }
                }
            };
            if let Some(copy) = copy {
                // A datagram, and so an offset in it, has 16 bits.
                places.fields[usize::from(copy)] = (u16::try_from(at).ok()?, length as u16);
            }
            at += length;
            if at > bytes.len() {
                return None;
            }
        }
        Some(at)
    }

    /// Fills in `records[new..]`, and appends records of the opposite direction.
    fn fill(
        &self,
        rows: Rows<'_>,
        context: &Context<'_>,
        places: Option<&[(u16, u16)]>,
        new: usize,
        records: &mut Vec<FlowRecord>,
    ) {
        let (forward, reverse) = self.copies.split_at(self.reverse);
        let run = |copies: &[FieldCopy], first: usize, records: &mut [FlowRecord]| {
            for (index, copy) in copies.iter().enumerate() {
                let (offset, length) = match places {
                    None => (copy.offset, copy.length),
                    Some(places) => places[first + index],
                };
                let copy = FieldCopy {
                    offset,
                    length,
                    ..*copy
                };
                copy.run(rows, records, context);
            }
            if context.sampling.by_interface() {
                for record in records.iter_mut() {
                    let scope = Scope::Interface(record.input);
                    if let Some(interval) = context.sampling.get(scope) {
                        record.sampling_interval = interval;
                    }
                }
            }
            for record in records {
                times::settle(record, &context.clocks);
            }
        };
        run(forward, 0, &mut records[new..]);
        if reverse.is_empty() {
            return;
        }
        let opposite = records.len();
        for index in new..opposite {
            records.push(turned(&records[index]));
        }
        run(reverse, self.reverse, &mut records[opposite..]);
        // A flow of one direction has a reverse side without packets (RFC 5103, 6.1).
        let mut kept = opposite;
        for index in opposite..records.len() {
            if records[index].packets != 0 || records[index].octets != 0 {
                records.swap(kept, index);
                kept += 1;
            }
        }
        records.truncate(kept);
    }
}

/// Whether a reverse element may fill the part. The flow's key is that of the other direction, with its ends swapped.
fn may_be_reversed(part: Part) -> bool {
    part < Part::SourceV6 && part != Part::Protocol
        || part >= Part::IcmpV4 && part != Part::SystemInit
}

/// The opposite direction of a flow, without what is known of the direction itself.
fn turned(record: &FlowRecord) -> FlowRecord {
    let is_icmp = matches!(record.protocol, ICMP | ICMP_V6);
    FlowRecord {
        source: record.destination,
        destination: record.source,
        next_hop: None,
        source_port: if is_icmp { 0 } else { record.destination_port },
        destination_port: if is_icmp { 0 } else { record.source_port },
        source_mask: record.destination_mask,
        destination_mask: record.source_mask,
        input: record.output,
        output: record.input,
        source_as: record.destination_as,
        destination_as: record.source_as,
        tcp_flags: 0,
        packets: 0,
        octets: 0,
        flow_label: None,
        ..*record
    }
}

/// Data records of one length.
#[derive(Clone, Copy)]
struct Rows<'a> {
    bytes: &'a [u8],
    stride: usize,
}

impl FieldCopy {
    /// Sets a part of each record to the `N` bytes of its field.
    #[inline(always)]
    fn each<const N: usize>(
        self,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        set: impl Fn(&mut FlowRecord, [u8; N]),
    ) {
        let Some(column) = rows.bytes.get(usize::from(self.offset)..) else {
            return;
        };
        if usize::from(self.length) != N {
            return;
        }
        // `chunks` would divide by the stride, once per field.
        let mut rest = column;
        for record in records {
            let Some(bytes) = rest.first_chunk() else {
                return;
            };
            set(record, *bytes);
            rest = rest.get(rows.stride..).unwrap_or_default();
        }
    }

    /// Sets a part of each record to the integer in its field.
    #[inline(always)]
    fn integers(
        self,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        set: impl Fn(&mut FlowRecord, u64),
    ) {
        match self.length {
            1 => self.each(rows, records, |r, [byte]| set(r, byte.into())),
            2 => self.each(rows, records, |r, b| set(r, u16::from_be_bytes(b).into())),
            4 => self.each(rows, records, |r, b| set(r, u32::from_be_bytes(b).into())),
            8 => self.each(rows, records, |r, b| set(r, u64::from_be_bytes(b))),
            3 | 5..=7 => {
                let (offset, length) = (usize::from(self.offset), usize::from(self.length));
                let rows = rows.bytes.chunks_exact(rows.stride);
                for (record, row) in records.iter_mut().zip(rows) {
                    if let Some(bytes) = row.get(offset..offset + length) {
                        let value = bytes.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
                        set(record, value);
                    }
                }
            }
            _ => {}
        }
    }

    /// Addresses of IPv4. Where a template has addresses of both families, the one that is not used is zero.
    #[inline(always)]
    fn ipv4(
        self,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        place: impl Fn(&mut FlowRecord) -> &mut Option<IpAddr>,
    ) {
        self.each(rows, records, |record, bytes: [u8; 4]| {
            let place = place(record);
            let unused = |address: IpAddr| address.is_unspecified();
            if !self.yields || bytes != [0; 4] || place.is_none_or(unused) {
                *place = Some(Ipv4Addr::from(bytes).into());
            }
        });
    }

    #[inline(always)]
    fn ipv6(
        self,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        place: impl Fn(&mut FlowRecord) -> &mut Option<IpAddr>,
    ) {
        self.each(rows, records, |record, bytes: [u8; 16]| {
            *place(record) = Some(Ipv6Addr::from(bytes).into());
        });
    }

    /// Absolute times; 0 where they cannot be true.
    #[inline(always)]
    fn times(
        self,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        clocks: &Clocks,
        place: impl Fn(&mut FlowRecord) -> &mut u64,
    ) {
        let ms = |value: u64| match self.form {
            Form::Seconds => plausible(value.saturating_mul(1000)),
            Form::Ntp => clocks.ntp(value),
            Form::BeforeExport => clocks.before_export(value),
            _ => plausible(value),
        };
        self.integers(rows, records, |record, value| *place(record) = ms(value));
    }

    fn run(self, rows: Rows<'_>, records: &mut [FlowRecord], context: &Context<'_>) {
        let is_v4 = |address: Option<IpAddr>| address.is_some_and(|address| address.is_ipv4());
        match self.part {
            Part::Octets => self.integers(rows, records, |r, v| r.octets = v),
            Part::Packets => self.integers(rows, records, |r, v| r.packets = v),
            Part::Protocol => self.integers(rows, records, |r, v| r.protocol = v as u8),
            Part::Tos if self.form == Form::Dscp => {
                self.integers(rows, records, |r, v| r.tos = (v << 2) as u8);
            }
            Part::Tos => self.integers(rows, records, |r, v| r.tos = v as u8),
            Part::TcpFlags => self.integers(rows, records, |r, v| r.tcp_flags = v as u8),
            Part::SourceV6 => self.ipv6(rows, records, |r| &mut r.source),
            Part::SourceV4 => self.ipv4(rows, records, |r| &mut r.source),
            Part::DestinationV6 => self.ipv6(rows, records, |r| &mut r.destination),
            Part::DestinationV4 => self.ipv4(rows, records, |r| &mut r.destination),
            Part::NextHopV6 => self.ipv6(rows, records, |r| &mut r.next_hop),
            Part::NextHopV4 => self.ipv4(rows, records, |r| &mut r.next_hop),
            Part::SourceMaskV6 => self.integers(rows, records, |r, v| r.source_mask = v as u8),
            Part::SourceMaskV4 => self.integers(rows, records, |r, v| {
                if !self.yields || is_v4(r.source) {
                    r.source_mask = v as u8;
                }
            }),
            Part::DestinationMaskV6 => {
                self.integers(rows, records, |r, v| r.destination_mask = v as u8);
            }
            Part::DestinationMaskV4 => self.integers(rows, records, |r, v| {
                if !self.yields || is_v4(r.destination) {
                    r.destination_mask = v as u8;
                }
            }),
            Part::SourceUdpPort => self.port(UDP, rows, records, |r| &mut r.source_port),
            Part::SourceTcpPort => self.port(TCP, rows, records, |r| &mut r.source_port),
            Part::SourcePort => self.integers(rows, records, |r, v| r.source_port = v as u16),
            Part::DestinationUdpPort => self.port(UDP, rows, records, |r| &mut r.destination_port),
            Part::DestinationTcpPort => self.port(TCP, rows, records, |r| &mut r.destination_port),
            Part::DestinationPort => {
                self.integers(rows, records, |r, v| r.destination_port = v as u16);
            }
            Part::IcmpV4 => self.icmp(ICMP, rows, records, |_, v| v),
            Part::IcmpTypeV4 => self.icmp(ICMP, rows, records, |_, v| v << 8),
            Part::IcmpCodeV4 => self.icmp(ICMP, rows, records, |port, v| port & 0xff00 | v & 0xff),
            Part::IcmpV6 => self.icmp(ICMP_V6, rows, records, |_, v| v),
            Part::IcmpTypeV6 => self.icmp(ICMP_V6, rows, records, |_, v| v << 8),
            Part::IcmpCodeV6 => {
                self.icmp(ICMP_V6, rows, records, |port, v| port & 0xff00 | v & 0xff);
            }
            Part::Input => self.integers(rows, records, |r, v| r.input = v as u32),
            Part::Output => self.integers(rows, records, |r, v| r.output = v as u32),
            Part::SourceAs => self.integers(rows, records, |r, v| r.source_as = v as u32),
            Part::DestinationAs => self.integers(rows, records, |r, v| r.destination_as = v as u32),
            Part::FlowLabel => self.integers(rows, records, |r, v| {
                r.flow_label = Some(v as u32 & 0xf_ffff);
            }),
            Part::Sampler => self.integers(rows, records, |r, v| {
                if let Some(interval) = context.sampling.get(Scope::Sampler(v)) {
                    r.sampling_interval = interval;
                }
            }),
            Part::SamplingInterval => self.integers(rows, records, |r, v| {
                if v != 0 {
                    r.sampling_interval = v as u32;
                }
            }),
            Part::Start => self.times(rows, records, &context.clocks, |r| &mut r.start_ms),
            Part::End => self.times(rows, records, &context.clocks, |r| &mut r.end_ms),
            Part::StartUptime => self.integers(rows, records, |r, v| r.start_uptime_ms = v as u32),
            Part::EndUptime => self.integers(rows, records, |r, v| r.end_uptime_ms = v as u32),
            Part::SystemInit => self.integers(rows, records, |record, init_ms| {
                times::settle(record, &context.clocks.since_start(init_ms));
            }),
            Part::Duration => {
                let to_ms = if self.form == Form::Microseconds {
                    1000
                } else {
                    1
                };
                self.integers(rows, records, |r, v| {
                    if r.end_ms == 0 && r.start_ms != 0 {
                        r.end_ms = plausible(r.start_ms.saturating_add(v / to_ms));
                    }
                });
            }
        }
    }

    /// Ports of one protocol, where the template has none of any protocol, or has both.
    #[inline(always)]
    fn port(
        self,
        protocol: u8,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        place: impl Fn(&mut FlowRecord) -> &mut u16,
    ) {
        self.integers(rows, records, |record, value| {
            if record.protocol == protocol || record.protocol == 0 && value != 0 {
                *place(record) = value as u16;
            }
        });
    }

    /// ICMP's type and code, which are in `destination_port`.
    #[inline(always)]
    fn icmp(
        self,
        protocol: u8,
        rows: Rows<'_>,
        records: &mut [FlowRecord],
        port: impl Fn(u16, u16) -> u16,
    ) {
        self.integers(rows, records, |record, value| {
            if record.protocol == protocol {
                // Some exporters leave this element 0 and have type and code in the port.
                let known = port(record.destination_port, value as u16);
                if value != 0 {
                    record.destination_port = known;
                }
                record.source_port = 0;
            }
        });
    }
}
