//! Sequence numbers: how many records were lost on the way.

use std::collections::HashMap;
use std::hash::Hash;

/// A gap of more packets, or of more records, is the restart of an exporter.
const MOST_LOST_PACKETS: u32 = 1 << 15;
const MOST_LOST_RECORDS: u32 = 1 << 20;
/// A datagram that is at most so many packets, or records, behind the last one was overtaken on the way.
const MOST_LATE_PACKETS: u32 = 64;
const MOST_LATE_RECORDS: u32 = 4096;
/// So many late datagrams in a row are the restart of an exporter.
const MOST_LATE_IN_A_ROW: u8 = 8;
/// An uptime that goes back by more is that of an exporter that restarted.
const UPTIME_JITTER_MS: u32 = 60_000;
/// So many times in a row other units must fit, and those that did so far not, to take their place.
const MAX_DOUBTS: u8 = 3;

/// What a sequence number counts. RFC 3954 says packets, RFC 7011 the data records before the datagram, and exporters do otherwise:
/// softflowd counts the flow records up to the end of the datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Datagrams.
    Packets,
    /// Data records: flows and options.
    DataRecords,
    /// Flow records alone.
    FlowRecords,
    /// Data records, those of the datagram itself included.
    DataRecordsToEnd,
    /// Flow records alone, those of the datagram itself included.
    FlowRecordsToEnd,
}

const UNITS: [Unit; 5] = [
    Unit::Packets,
    Unit::DataRecords,
    Unit::FlowRecords,
    Unit::DataRecordsToEnd,
    Unit::FlowRecordsToEnd,
];

impl Unit {
    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// A datagram, as far as sequence numbers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Its sequence number.
    pub sequence: u32,
    /// Data records in it.
    pub data_records: u32,
    /// Those of them that are flow records.
    pub flow_records: u32,
    /// Whether all of its data records could be counted: all templates were known.
    pub exact: bool,
    /// The exporter's uptime in milliseconds, if it told it.
    pub uptime_ms: Option<u32>,
}

/// The sequence of one exporter's process.
#[derive(Clone, Debug)]
pub struct Sequence {
    last: Counted,
    /// What the protocol says.
    unit: Unit,
    /// The units that have fit so far, as bits.
    possible: u8,
    /// The units that there may be at all.
    allowed: u8,
    doubts: u8,
    /// Running mean of flow records in a datagram.
    mean: f32,
    late_in_a_row: u8,
    /// Records counted as lost.
    lost: u64,
    /// Records counted as lost that came late: they are not counted again when the next ones are lost.
    credit: u64,
}

impl Sequence {
    /// Starts with the first datagram of an exporter.
    pub fn new(version: u16, first: Counted) -> Sequence {
        let unit = match version {
            9 => Unit::Packets,
            10 => Unit::DataRecords,
            _ => Unit::FlowRecords,
        };
        let allowed = match version {
            9 | 10 => UNITS.iter().fold(0, |bits, unit| bits | unit.bit()),
            _ => unit.bit(),
        };
        Sequence {
            unit,
            possible: allowed,
            allowed,
            doubts: 0,
            mean: first.flow_records as f32,
            last: first,
            late_in_a_row: 0,
            lost: 0,
            credit: 0,
        }
    }

    /// Steps from the datagram that follows the last one to `next`; negative if `next` is older.
    fn gap(&self, unit: Unit, next: &Counted) -> i32 {
        let step = match unit {
            Unit::Packets => 1,
            Unit::DataRecords => self.last.data_records,
            Unit::FlowRecords => self.last.flow_records,
            Unit::DataRecordsToEnd => next.data_records,
            Unit::FlowRecordsToEnd => next.flow_records,
        };
        next.sequence
            .wrapping_sub(self.last.sequence)
            .wrapping_sub(step) as i32
    }

    /// Takes the next datagram. Returns how many flow records were lost before it.
    pub fn follow(&mut self, next: Counted) -> u64 {
        let fitting = UNITS.iter().filter(|unit| self.gap(**unit, &next) == 0);
        let fitting = fitting.fold(0, |bits, unit| bits | unit.bit()) & self.allowed;
        let exact = self.last.exact && next.exact;
        if fitting & self.possible != 0 {
            if exact {
                self.possible &= fitting;
            }
            self.doubts = 0;
            self.advance(next);
            return 0;
        }
        // A loss may look the same by chance, but not often.
        self.doubts = if fitting == 0 { 0 } else { self.doubts + 1 };
        if self.doubts >= MAX_DOUBTS {
            self.possible = fitting;
            self.doubts = 0;
            self.advance(next);
            return 0;
        }
        let is_possible = |unit: &Unit| unit.bit() & self.possible != 0;
        let first = UNITS.into_iter().find(is_possible);
        let unit = Some(self.unit).filter(is_possible).or(first);
        let unit = unit.unwrap_or(self.unit);
        let gap = self.gap(unit, &next);
        let went_back = |last: u32, now: u32| now < last && last - now > UPTIME_JITTER_MS;
        let restarted = matches!((self.last.uptime_ms, next.uptime_ms),
            (Some(last), Some(now)) if went_back(last, now));
        let (most_lost, most_late) = match unit {
            Unit::Packets => (MOST_LOST_PACKETS, MOST_LATE_PACKETS),
            _ => (MOST_LOST_RECORDS, MOST_LATE_RECORDS),
        };
        if gap < 0 && gap.unsigned_abs() <= most_late && !restarted {
            self.late_in_a_row += 1;
            if self.late_in_a_row < MOST_LATE_IN_A_ROW {
                let late = u64::from(next.flow_records).min(self.lost);
                self.lost -= late;
                self.credit += late;
                return 0;
            }
        }
        let known = unit == Unit::Packets || exact;
        let mut lost = 0;
        if gap > 0 && gap.unsigned_abs() <= most_lost && !restarted && known {
            lost = match unit {
                Unit::Packets => (f64::from(gap) * f64::from(self.mean)).round() as u64,
                _ => u64::from(gap.unsigned_abs()),
            };
            let credit = self.credit.min(lost);
            self.credit -= credit;
            lost -= credit;
            self.lost += lost;
        } else {
            (self.lost, self.credit) = (0, 0);
        }
        self.advance(next);
        lost
    }

    fn advance(&mut self, next: Counted) {
        self.late_in_a_row = 0;
        self.mean += (next.flow_records as f32 - self.mean) / 16.0;
        self.last = next;
    }
}

/// A bounded map. An entry that was used lately stays: one that is not among the last `most` that were used may go.
pub struct Recent<K, V> {
    most: usize,
    newer: HashMap<K, V>,
    older: HashMap<K, V>,
}

impl<K: Eq + Hash + Copy, V> Recent<K, V> {
    /// Holds at most twice `most` entries.
    pub fn new(most: usize) -> Recent<K, V> {
        Recent {
            most,
            newer: HashMap::new(),
            older: HashMap::new(),
        }
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.newer.len() + self.older.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// An entry.
    pub fn get(&mut self, key: &K) -> Option<&mut V> {
        if !self.newer.contains_key(key) {
            let value = self.older.remove(key)?;
            self.insert(*key, value);
        }
        self.newer.get_mut(key)
    }

    /// Adds an entry, or replaces it.
    pub fn insert(&mut self, key: K, value: V) {
        if self.newer.len() >= self.most {
            std::mem::swap(&mut self.newer, &mut self.older);
            self.newer.clear();
        }
        self.newer.insert(key, value);
    }
}
