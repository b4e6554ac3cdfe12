//! Why a datagram, a set or a record is rejected.

use std::fmt;

use crate::metrics::{Outcome, outcomes};

outcomes! {
    /// Why something is rejected. A set, a template or a datagram that cannot be read counts as one record.
    pub enum Rejection {
        /// The version is none that is known.
        UnknownVersion = "rejected_unknown_version": "rejected: {datagram|datagrams} of an unknown version",
        /// The datagram ends too early.
        Truncated = "rejected_truncated": "rejected: {record|records} cut off by the end of the datagram",
        /// A length or a count cannot be true.
        Malformed = "rejected_malformed": "rejected: {set or datagram|sets and datagrams} with a length or count that cannot be true",
        /// A template that cannot be used.
        BadTemplate = "rejected_bad_template": "rejected: {template|templates} that cannot be used",
        /// The template of a set is unknown.
        NoTemplate = "rejected_no_template": "rejected: {set|sets} of records whose template is not known",
        /// A record has neither an address nor a counter.
        NotAFlow = "rejected_not_a_flow": "rejected: {record|records} with neither an address nor a counter",
    }
}

/// How many records were rejected, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rejections([u32; Rejection::ALL.len()]);

impl Rejections {
    /// Counts `records`.
    pub fn add(&mut self, reason: Rejection, records: u32) {
        let count = &mut self.0[reason.index()];
        *count = count.saturating_add(records);
    }

    /// The count of a reason.
    pub fn get(&self, reason: Rejection) -> u32 {
        self.0[reason.index()]
    }

    /// The counts that are not zero.
    pub fn iter(&self) -> impl Iterator<Item = (Rejection, u32)> + '_ {
        let all = Rejection::ALL
            .iter()
            .map(|reason| (*reason, self.get(*reason)));
        all.filter(|(_, records)| *records != 0)
    }

    /// All of them.
    pub fn total(&self) -> u32 {
        self.0
            .iter()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// What was expected in place of what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// In words.
    Words(&'static str),
    /// This number.
    Exactly(usize),
    /// This number, or a larger one.
    AtLeast(usize),
    /// This number, or a smaller one.
    AtMost(usize),
}

/// What is wrong with a datagram, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The reason that it is counted under.
    pub reason: Rejection,
    /// In bytes from the start of the datagram.
    pub offset: usize,
    /// What is there.
    pub what: &'static str,
    /// Its value.
    pub found: usize,
    /// What was expected.
    pub expected: Expected,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem {
            offset,
            what,
            found,
            ..
        } = self;
        write!(f, "{what} {found} at byte {offset}, expected ")?;
        match self.expected {
            Expected::Words(words) => f.write_str(words),
            Expected::Exactly(number) => write!(f, "{number}"),
            Expected::AtLeast(number) => write!(f, "at least {number}"),
            Expected::AtMost(number) => write!(f, "at most {number}"),
        }
    }
}
