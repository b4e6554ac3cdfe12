//! The fields of `--sum-by`, and their values in a record.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::cli::reader::names::Names;
use crate::cli::terminal::escaped;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// A field of `--sum-by`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// As the user wrote it.
    pub name: String,
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
pub struct Columns(pub Vec<Column>);

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

/// What a field of a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Absent,
    Number(u32),
    Label(u32),
    Prefix(IpNet),
    Name(String),
}

const ABSENT: u8 = 0;
const NUMBER: u8 = 1;
const LABEL: u8 = 2;
const V4: u8 = 4;
const V6: u8 = 6;
const NAME: u8 = 7;

/// Appends the value of a field in a record.
pub fn encode(
    column: &Column,
    record: &FlowRecord,
    fields: Fields,
    names: &mut Names,
    key: &mut Vec<u8>,
) {
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
    match column.kind {
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
pub fn decode(mut key: &[u8]) -> Vec<Value> {
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
    pub fn text(&self, absent: &str) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

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
