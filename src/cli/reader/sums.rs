//! `--sum-by`: flows, packets and bytes for each value of some fields.

use std::collections::HashMap;
use std::io::{self, Write};
use std::net::IpAddr;

use ipnet::IpNet;

use super::json;
use super::line::{display, number};
use super::names::Names;
use crate::cli::terminal::escaped;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// How sums are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Table,
    Csv,
    Json,
}

/// A field of `--sum-by`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Column {
    /// As the user wrote it.
    name: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Source(Lengths),
    Destination(Lengths),
    SourcePort,
    DestinationPort,
    SourceAs,
    DestinationAs,
    Input,
    Output,
    Protocol,
    Exporter,
    Tag,
    Experiment,
    Activity,
    Label,
}

const KINDS: [(&str, Kind); 14] = [
    ("src", Kind::Source(Lengths::WHOLE)),
    ("dst", Kind::Destination(Lengths::WHOLE)),
    ("src_port", Kind::SourcePort),
    ("dst_port", Kind::DestinationPort),
    ("src_as", Kind::SourceAs),
    ("dst_as", Kind::DestinationAs),
    ("in_if", Kind::Input),
    ("out_if", Kind::Output),
    ("proto", Kind::Protocol),
    ("exporter", Kind::Exporter),
    ("tag", Kind::Tag),
    ("experiment", Kind::Experiment),
    ("activity", Kind::Activity),
    ("label", Kind::Label),
];

/// The lengths of the prefixes that addresses are cut to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Lengths {
    v4: u8,
    v6: u8,
}

impl Lengths {
    const WHOLE: Lengths = Lengths { v4: 32, v6: 128 };

    /// Reads `24` (of IPv4), `48` (of IPv6, as it is above 32) or `24/48` (of both).
    fn parse(text: &str) -> Option<Lengths> {
        let whole = Lengths::WHOLE;
        let number = |text: &str, max| text.parse().ok().filter(|length| *length <= max);
        match text.split_once('/') {
            Some((v4, v6)) => Some(Lengths {
                v4: number(v4, 32)?,
                v6: number(v6, 128)?,
            }),
            None => match number(text, 128)? {
                v4 @ ..=32 => Some(Lengths { v4, ..whole }),
                v6 => Some(Lengths { v6, ..whole }),
            },
        }
    }

    fn cut(self, address: IpAddr) -> IpNet {
        let length = match address {
            IpAddr::V4(_) => self.v4,
            IpAddr::V6(_) => self.v6,
        };
        // The length has been checked.
        IpNet::new(address, length).map_or(address.into(), |prefix| prefix.trunc())
    }
}

impl Column {
    fn parse(name: &str) -> Option<Column> {
        let (field, lengths) = match name.split_once('/') {
            Some((field, lengths)) => (field, Some(Lengths::parse(lengths)?)),
            None => (name, None),
        };
        let (_, kind) = KINDS.iter().find(|(known, _)| *known == field)?;
        let kind = match (kind, lengths) {
            (kind, None) => *kind,
            (Kind::Source(_), Some(lengths)) => Kind::Source(lengths),
            (Kind::Destination(_), Some(lengths)) => Kind::Destination(lengths),
            (_, Some(_)) => return None,
        };
        Some(Column {
            name: name.to_owned(),
            kind,
        })
    }
}

/// The fields of `--sum-by`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns(Vec<Column>);

impl Columns {
    /// Reads `src/24,dst_port`.
    pub fn parse(text: &str) -> Result<Columns, String> {
        let column = |name: &str| {
            Column::parse(name).ok_or_else(|| {
                let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
                format!(
                    "\"{}\" is not a field, expected {}; src and dst may have a prefix length: src/24, src/48, src/24/48",
                    name.escape_debug(),
                    names.join(", ")
                )
            })
        };
        text.split(',')
            .map(column)
            .collect::<Result<_, _>>()
            .map(Columns)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sum {
    flows: u64,
    packets: u128,
    bytes: u128,
}

impl Sum {
    fn add(&mut self, packets: u128, bytes: u128) {
        self.flows += 1;
        self.packets = self.packets.saturating_add(packets);
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// What a field of a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Value {
    Absent,
    Number(u32),
    Label(u32),
    Prefix(IpNet),
    Name(String),
}

/// Sums, by the values of the columns.
pub struct Sums {
    columns: Vec<Column>,
    /// The values of the columns, encoded one after the other: one look-up, and one allocation for a new row.
    rows: HashMap<Box<[u8]>, Sum>,
    key: Vec<u8>,
    total: Sum,
    /// How many flows have a sampling interval.
    sampled: u64,
}

impl Sums {
    pub fn new(columns: Columns) -> Sums {
        Sums {
            columns: columns.0,
            rows: HashMap::new(),
            key: Vec::new(),
            total: Sum::default(),
            sampled: 0,
        }
    }

    pub fn add(&mut self, record: &FlowRecord, fields: Fields, names: &mut Names) {
        self.key.clear();
        for column in &self.columns {
            encode(column.kind, record, fields, names, &mut self.key);
        }
        let interval = u128::from(record.sampling_interval.max(1));
        self.sampled += u64::from(record.sampling_interval != 0);
        let packets = u128::from(record.packets) * interval;
        let bytes = u128::from(record.octets) * interval;
        self.total.add(packets, bytes);
        match self.rows.get_mut(&self.key[..]) {
            Some(sum) => sum.add(packets, bytes),
            None => {
                let mut sum = Sum::default();
                sum.add(packets, bytes);
                self.rows.insert(self.key[..].into(), sum);
            }
        }
    }

    /// Prints the rows with the most bytes, all if `top` is not given, and the total.
    pub fn print(self, top: Option<usize>, style: Style, out: &mut impl Write) -> io::Result<()> {
        let mut rows: Vec<(Box<[u8]>, Sum)> = self.rows.into_iter().collect();
        rows.sort_unstable_by(|(key, sum), (other_key, other)| {
            other.bytes.cmp(&sum.bytes).then_with(|| key.cmp(other_key))
        });
        rows.truncate(top.unwrap_or(usize::MAX));
        let rows = rows.iter().map(|(key, sum)| (decode(key), *sum));
        let (total, sampled) = (self.total, self.sampled);
        match style {
            Style::Table => table(&self.columns, rows.collect(), total, sampled, out),
            Style::Csv => csv(&self.columns, rows, total, out),
            Style::Json => objects(&self.columns, rows, total, sampled, out),
        }
    }
}

const ABSENT: u8 = 0;
const NUMBER: u8 = 1;
const LABEL: u8 = 2;
const V4: u8 = 4;
const V6: u8 = 6;
const NAME: u8 = 7;

fn encode(kind: Kind, record: &FlowRecord, fields: Fields, names: &mut Names, key: &mut Vec<u8>) {
    let mut tagged_number = |tag: u8, value: Option<u32>| match value {
        Some(value) => {
            key.push(tag);
            key.extend_from_slice(&value.to_be_bytes());
        }
        None => key.push(ABSENT),
    };
    let mut number = |field, value: u32| {
        tagged_number(NUMBER, fields.contains(field).then_some(value));
    };
    let agent_address = Fields::AGENT_ADDR4 | Fields::AGENT_ADDR6;
    match kind {
        Kind::SourcePort => number(Fields::SRCDST_PORT, record.source_port.into()),
        Kind::DestinationPort => number(Fields::SRCDST_PORT, record.destination_port.into()),
        Kind::SourceAs => number(Fields::AS_INFO, record.source_as),
        Kind::DestinationAs => number(Fields::AS_INFO, record.destination_as),
        Kind::Input => number(Fields::IF_INDICES, record.input),
        Kind::Output => number(Fields::IF_INDICES, record.output),
        Kind::Protocol => number(Fields::PROTO_FLAGS_TOS, record.protocol.into()),
        Kind::Tag => tagged_number(NUMBER, record.rule_tag),
        Kind::Label => tagged_number(LABEL, record.flow_label),
        Kind::Source(lengths) => prefix(key, lengths, record.source),
        Kind::Destination(lengths) => prefix(key, lengths, record.destination),
        Kind::Exporter => {
            let is_known = fields.intersects(agent_address);
            prefix(key, Lengths::WHOLE, is_known.then_some(record.exporter));
        }
        Kind::Experiment => name(key, names.science(record).map(|(s, _)| &*s.experiment)),
        Kind::Activity => name(key, names.science(record).map(|(s, _)| &*s.activity)),
    }
}

fn prefix(key: &mut Vec<u8>, lengths: Lengths, address: Option<IpAddr>) {
    match address.map(|address| lengths.cut(address)) {
        None => key.push(ABSENT),
        Some(IpNet::V4(prefix)) => {
            key.extend_from_slice(&[V4, prefix.prefix_len()]);
            key.extend_from_slice(&prefix.addr().octets());
        }
        Some(IpNet::V6(prefix)) => {
            key.extend_from_slice(&[V6, prefix.prefix_len()]);
            key.extend_from_slice(&prefix.addr().octets());
        }
    }
}

fn name(key: &mut Vec<u8>, name: Option<&str>) {
    match name {
        Some(name) => {
            key.push(NAME);
            key.extend_from_slice(&(name.len() as u32).to_be_bytes());
            key.extend_from_slice(name.as_bytes());
        }
        None => key.push(ABSENT),
    }
}

/// The inverse of [`encode`], for all columns.
fn decode(mut key: &[u8]) -> Vec<Value> {
    let mut values = Vec::new();
    while let Some((value, rest)) = decode_one(key) {
        values.push(value);
        key = rest;
    }
    values
}

fn decode_one(key: &[u8]) -> Option<(Value, &[u8])> {
    let (&tag, rest) = key.split_first()?;
    let number = || {
        let (&bytes, rest) = rest.split_first_chunk()?;
        Some((u32::from_be_bytes(bytes), rest))
    };
    Some(match tag {
        NUMBER => number().map(|(value, rest)| (Value::Number(value), rest))?,
        LABEL => number().map(|(value, rest)| (Value::Label(value), rest))?,
        V4 => {
            let (&[length, a, b, c, d], rest) = rest.split_first_chunk()?;
            let prefix = IpNet::new([a, b, c, d].into(), length).ok()?;
            (Value::Prefix(prefix), rest)
        }
        V6 => {
            let (&length, rest) = rest.split_first()?;
            let (&address, rest) = rest.split_first_chunk::<16>()?;
            (
                Value::Prefix(IpNet::new(address.into(), length).ok()?),
                rest,
            )
        }
        NAME => {
            let (length, rest) = number()?;
            let (name, rest) = rest.split_at_checked(length as usize)?;
            (
                Value::Name(String::from_utf8_lossy(name).into_owned()),
                rest,
            )
        }
        _ => (Value::Absent, rest),
    })
}

impl Value {
    /// As a person reads it; `absent` if there is none.
    fn text(&self, absent: &str) -> String {
        match self {
            Value::Absent => absent.to_owned(),
            Value::Number(number) => number.to_string(),
            Value::Label(label) => format!("{label:#07x}"),
            Value::Prefix(prefix) if prefix.prefix_len() == prefix.max_prefix_len() => {
                prefix.addr().to_string()
            }
            Value::Prefix(prefix) => prefix.to_string(),
            Value::Name(name) => escaped(name),
        }
    }
}

type Row = (Vec<Value>, Sum);

fn table(
    columns: &[Column],
    rows: Vec<Row>,
    total: Sum,
    sampled: u64,
    out: &mut impl Write,
) -> io::Result<()> {
    let note = match sampled {
        0 => "no flow has a sampling interval: packets and bytes are as counted".to_owned(),
        _ => format!(
            "packets and bytes are multiplied by the sampling interval, which {sampled} of {} flows have",
            total.flows
        ),
    };
    writeln!(out, "{note}")?;
    let numbers = |sum: Sum| {
        let texts = [
            sum.flows.to_string(),
            sum.packets.to_string(),
            sum.bytes.to_string(),
        ];
        texts.into_iter()
    };
    let mut lines: Vec<Vec<String>> = Vec::with_capacity(rows.len() + 2);
    let names = columns.iter().map(|column| column.name.as_str());
    let heads = names.chain(["flows", "packets", "bytes"]);
    lines.push(heads.map(str::to_uppercase).collect());
    for (values, sum) in &rows {
        let values = values.iter().map(|value| value.text("-"));
        lines.push(values.chain(numbers(*sum)).collect());
    }
    let label = (0..columns.len()).map(|index| if index == 0 { "total" } else { "" });
    lines.push(label.map(str::to_owned).chain(numbers(total)).collect());
    let width = |index: usize| lines.iter().map(|line| line[index].chars().count()).max();
    let widths: Vec<usize> = (0..lines[0].len()).filter_map(width).collect();
    for line in &lines {
        for (index, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let gap = if index == 0 { "" } else { "  " };
            if index < columns.len() {
                write!(out, "{gap}{cell:<width$}")?;
            } else {
                write!(out, "{gap}{cell:>width$}")?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// A cell, in quotes if it has to be.
fn quoted(text: &str) -> String {
    match text.contains([',', '"']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

fn csv(
    columns: &[Column],
    rows: impl Iterator<Item = Row>,
    total: Sum,
    out: &mut impl Write,
) -> io::Result<()> {
    for column in columns {
        write!(out, "{},", column.name)?;
    }
    writeln!(out, "flows,packets,bytes")?;
    for (values, sum) in rows {
        for value in &values {
            write!(out, "{},", quoted(&value.text("")))?;
        }
        writeln!(out, "{},{},{}", sum.flows, sum.packets, sum.bytes)?;
    }
    let commas = ",".repeat(columns.len());
    writeln!(
        out,
        "total{commas}{},{},{}",
        total.flows, total.packets, total.bytes
    )
}

fn objects(
    columns: &[Column],
    rows: impl Iterator<Item = Row>,
    total: Sum,
    sampled: u64,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut line = Vec::new();
    for (values, sum) in rows {
        line.clear();
        line.push(b'{');
        for (column, value) in columns.iter().zip(&values) {
            display(&mut line, format_args!("\"{}\":", column.name));
            match value {
                Value::Absent => line.extend_from_slice(b"null"),
                Value::Number(value) | Value::Label(value) => number(&mut line, *value),
                Value::Name(name) => json::string(&mut line, name),
                Value::Prefix(_) => json::string(&mut line, &value.text("")),
            }
            line.push(b',');
        }
        display(
            &mut line,
            format_args!(
                "\"flows\":{},\"packets\":{},\"bytes\":{}}}\n",
                sum.flows, sum.packets, sum.bytes
            ),
        );
        out.write_all(&line)?;
    }
    writeln!(
        out,
        "{{\"total\":true,\"flows\":{},\"packets\":{},\"bytes\":{},\"flows_with_sampling\":{sampled}}}",
        total.flows, total.packets, total.bytes
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collector::record::{Attribution, Origin};
    use crate::registry::Registry;

    fn print(columns: &str, records: &[FlowRecord], top: Option<usize>, style: Style) -> String {
        let mut sums = Sums::new(Columns::parse(columns).unwrap());
        let mut names = Names::new(Registry::builtin());
        for record in records {
            sums.add(record, Fields::ALL, &mut names);
        }
        let mut out = Vec::new();
        sums.print(top, style, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn record(source: &str, octets: u64, sampling_interval: u32) -> FlowRecord {
        FlowRecord {
            source: source.parse().ok(),
            octets,
            packets: 1,
            sampling_interval,
            ..FlowRecord::default()
        }
    }

    #[test]
    fn the_table_is_sorted_by_bytes_and_has_a_total() {
        let records = [
            record("192.0.2.1", 10, 0),
            record("192.0.2.9", 5, 100),
            record("2001:db8::1", 20, 1),
            record("", 1, 0),
        ];
        let expected = "\
packets and bytes are multiplied by the sampling interval, which 2 of 4 flows have
SRC/24        FLOWS  PACKETS  BYTES
192.0.2.0/24      2      101    510
2001:db8::1       1        1     20
total             4      103    531
";
        assert_eq!(print("src/24", &records, Some(2), Style::Table), expected);
        let expected = "src/24,proto,flows,packets,bytes\n192.0.2.0/24,0,2,101,510\n2001:db8::1,0,1,1,20\n,0,1,1,1\ntotal,,4,103,531\n";
        assert_eq!(print("src/24,proto", &records, None, Style::Csv), expected);
        let plain = print("dst", &records[..1], None, Style::Table);
        assert!(plain.starts_with("no flow has a sampling interval: "));
    }

    #[test]
    fn sums_by_science_use_the_names_of_the_registry() {
        let attributed = FlowRecord {
            attribution: Some(Attribution {
                scitag: 2 << 6 | 9,
                origin: Origin::Site,
            }),
            ..record("192.0.2.1", 7, 0)
        };
        let unregistered = FlowRecord {
            flow_label: Some(0x12345),
            ..record("192.0.2.1", 3, 0)
        };
        let records = [attributed, unregistered];
        let (experiment, activity) = Registry::builtin().names(crate::flow::Tag {
            experiment: 2,
            activity: 9,
        });
        let expected = format!(
            "{{\"experiment\":\"{experiment}\",\"activity\":\"{activity}\",\"label\":null,\"flows\":1,\"packets\":1,\"bytes\":7}}\n\
             {{\"experiment\":null,\"activity\":null,\"label\":74565,\"flows\":1,\"packets\":1,\"bytes\":3}}\n\
             {{\"total\":true,\"flows\":2,\"packets\":2,\"bytes\":10,\"flows_with_sampling\":0}}\n"
        );
        let columns = "experiment,activity,label";
        assert_eq!(print(columns, &records, None, Style::Json), expected);
    }

    #[test]
    fn columns_are_checked() {
        for good in ["src", "src/24,dst/48", "dst/0/0", "src/32/128", "label,tag"] {
            assert!(Columns::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "src,",
            "port",
            "src/",
            "src/129",
            "src/33/64",
            "proto/8",
            "src/24/48/1",
        ] {
            assert!(Columns::parse(bad).is_err(), "{bad}");
        }
    }
}
