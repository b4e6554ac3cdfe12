//! `--sum-by`: flows, packets and bytes for each value of some fields.

mod columns;

use std::collections::HashMap;
use std::io::{self, Write};

use super::json;
use super::line::{display, number};
use super::names::Names;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;
pub use columns::Columns;
use columns::{Column, Value, decode, encode};

/// How sums are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Table,
    Csv,
    Json,
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
            encode(column, record, fields, names, &mut self.key);
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
}
