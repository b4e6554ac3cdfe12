//! Templates of NetFlow v9 (RFC 3954) and IPFIX (RFC 7011): what a set's data records look like.

use std::sync::atomic::{AtomicU64, Ordering};

use super::plan::Plan;
use super::problem::{Expected, Problem, Rejection};

/// Length of a field whose data records tell its length.
const VARIABLE: u16 = u16::MAX;
/// Set in the number of an element that a private enterprise number follows.
const ENTERPRISE_BIT: u16 = 0x8000;
/// Templates have ids from here on; lower ones are those of sets.
pub const FIRST_ID: u16 = 256;

/// A field of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Number of the information element; in the scope of a v9 options template, the number of the scope.
    pub element: u16,
    /// Length in bytes.
    pub length: u16,
    /// Private enterprise number; 0 for elements of IANA's registry.
    pub enterprise: u32,
}

impl Field {
    /// Whether each data record tells the length.
    pub fn is_variable(&self) -> bool {
        self.length == VARIABLE
    }

    /// Bytes in a data record at least.
    pub fn least_bytes(&self) -> usize {
        if self.is_variable() {
            1
        } else {
            self.length.into()
        }
    }
}

/// Which of two lists of templates a record belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Templates of flow records.
    Data,
    /// Templates of records about the exporter itself.
    Options,
}

/// A template record of a datagram: where it ends is known, what it means is not yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Defines a template. The bytes start with its id.
    Definition(u16, &'a [u8]),
    /// Withdraws a template; its own id, or all of a kind if it is the id of the set.
    Withdrawal(u16),
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Cuts the first template record off. Returns it and its length.
pub fn cut(version: u16, kind: Kind, bytes: &[u8]) -> Result<(Record<'_>, usize), Problem> {
    let bad = |offset, what, found: usize, expected| Problem {
        reason: Rejection::BadTemplate,
        offset,
        what,
        found,
        expected,
    };
    let short = || {
        let expected = Expected::Words("a template record that ends within its set");
        bad(0, "set with bytes left:", bytes.len(), expected)
    };
    let id = be16(bytes, 0).ok_or_else(short)?;
    let count = be16(bytes, 2).ok_or_else(short)?;
    let is_ipfix = version == 10;
    if is_ipfix && count == 0 {
        return Ok((Record::Withdrawal(id), 4));
    }
    if id < FIRST_ID {
        let expected = Expected::AtLeast(FIRST_ID.into());
        return Err(bad(0, "template id", id.into(), expected));
    }
    let mut length = match (is_ipfix, kind) {
        (_, Kind::Data) => 4,
        (_, Kind::Options) => 6,
    };
    let fields = match (is_ipfix, kind) {
        (true, _) | (false, Kind::Data) => usize::from(count),
        (false, Kind::Options) => {
            // Both are lengths in bytes.
            let options = be16(bytes, 4).ok_or_else(short)?;
            let total = usize::from(count) + usize::from(options);
            if count % 4 != 0 || options % 4 != 0 {
                let expected = Expected::Words("multiples of 4");
                return Err(bad(2, "length of scopes and options", total, expected));
            }
            total / 4
        }
    };
    if fields == 0 {
        let expected = Expected::AtLeast(1);
        return Err(bad(2, "number of fields", 0, expected));
    }
    if is_ipfix && kind == Kind::Options {
        let scopes = be16(bytes, 4).ok_or_else(short)?;
        if scopes == 0 || scopes > count {
            let expected = Expected::Words("one or more, and no more than there are fields");
            return Err(bad(4, "number of scope fields", scopes.into(), expected));
        }
    }
    for _ in 0..fields {
        let element = be16(bytes, length).ok_or_else(short)?;
        let has_enterprise = is_ipfix && element & ENTERPRISE_BIT != 0;
        length += if has_enterprise { 8 } else { 4 };
    }
    let record = bytes.get(..length).ok_or_else(short)?;
    Ok((Record::Definition(id, record), length))
}

/// The fields of a template record that [`cut`] returned, and how many of them are the scope.
fn fields(version: u16, kind: Kind, record: &[u8]) -> (Vec<Field>, usize) {
    let is_ipfix = version == 10;
    let (mut at, scopes) = match kind {
        Kind::Data => (4, 0),
        Kind::Options if is_ipfix => (6, be16(record, 4).unwrap_or(0)),
        Kind::Options => (6, be16(record, 2).unwrap_or(0) / 4),
    };
    let mut fields = Vec::new();
    while let (Some(element), Some(length)) = (be16(record, at), be16(record, at + 2)) {
        at += 4;
        let mut field = Field {
            element,
            length,
            enterprise: 0,
        };
        if is_ipfix && element & ENTERPRISE_BIT != 0 {
            let number = record.get(at..).and_then(|rest| rest.first_chunk());
            field.element &= !ENTERPRISE_BIT;
            field.enterprise = number.map_or(0, |number| u32::from_be_bytes(*number));
            at += 4;
        }
        fields.push(field);
    }
    (fields, scopes.into())
}

/// What the data records of a template are for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Flow records.
    Flows(Plan),
    /// Records about the exporter: their fields, and how many of these are the scope.
    Options(Box<[Field]>, usize),
}

/// A template, compiled.
#[derive(Debug)]
pub struct Template {
    /// The id of its data sets.
    pub id: u16,
    /// What its data records are for.
    pub content: Content,
    /// The template record, as it came.
    pub record: Box<[u8]>,
    /// When it was last defined or used, UNIX microseconds.
    used_us: AtomicU64,
}

impl Template {
    /// Compiles a template record that [`cut`] returned.
    pub fn new(
        version: u16,
        kind: Kind,
        id: u16,
        record: &[u8],
        now_us: u64,
    ) -> Result<Template, Problem> {
        let (fields, scopes) = fields(version, kind, record);
        let absurd = || Problem {
            reason: Rejection::BadTemplate,
            offset: 0,
            what: "length of the data records of template",
            found: id.into(),
            expected: Expected::Words("1 to 65535 bytes"),
        };
        let plan = Plan::new(&fields).ok_or_else(absurd)?;
        Ok(Template {
            id,
            content: match kind {
                Kind::Data => Content::Flows(plan),
                Kind::Options => Content::Options(fields.into(), scopes),
            },
            record: record.into(),
            used_us: AtomicU64::new(now_us),
        })
    }

    /// Whether it is for flow records or options.
    pub fn kind(&self) -> Kind {
        match self.content {
            Content::Flows(_) => Kind::Data,
            Content::Options(..) => Kind::Options,
        }
    }

    /// Notes that it was defined again, or used.
    pub fn touch(&self, now_us: u64) {
        self.used_us.store(now_us, Ordering::Relaxed);
    }

    /// When it was last defined or used, UNIX microseconds.
    pub fn used_us(&self) -> u64 {
        self.used_us.load(Ordering::Relaxed)
    }

    /// Memory in use, in bytes, with what an allocation costs beside its content.
    pub fn bytes(&self) -> usize {
        const ALLOCATION: usize = 16;
        let content = match &self.content {
            Content::Flows(plan) => plan.heap_bytes(),
            Content::Options(fields, _) => size_of_val::<[Field]>(fields),
        };
        // Itself with the two counts of its `Arc`, the record, and at most two lists.
        size_of::<Template>() + 16 + self.record.len() + content + 4 * ALLOCATION
    }
}
