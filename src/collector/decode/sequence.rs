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
/// So many times in a row another unit must fit, and the known one not, to take its place.
const DOUBTS: u8 = 3;

/// What a sequence number counts. RFC 3954 says packets and RFC 7011 data records, and exporters of either do otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Datagrams.
    Packets,
    /// Data records: flows and options.
    DataRecords,
    /// Flow records alone.
    FlowRecords,
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
    unit: Unit,
    /// Whether the unit may be another one than the protocol says.
    guess: bool,
    /// Whether a datagram has shown that the unit is right.
    confirmed: bool,
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
        Sequence {
            unit: match version {
                9 => Unit::Packets,
                10 => Unit::DataRecords,
                _ => Unit::FlowRecords,
            },
            guess: matches!(version, 9 | 10),
            confirmed: false,
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
        };
        next.sequence
            .wrapping_sub(self.last.sequence)
            .wrapping_sub(step) as i32
    }

    /// Takes the next datagram. Returns how many flow records were lost before it.
    pub fn follow(&mut self, next: Counted) -> u64 {
        let gap = self.gap(self.unit, &next);
        let units = [Unit::Packets, Unit::DataRecords, Unit::FlowRecords];
        let fitting = units.into_iter().find(|unit| self.gap(*unit, &next) == 0);
        if gap == 0 {
            self.confirmed |= units.iter().any(|unit| self.gap(*unit, &next) != 0);
            self.doubts = 0;
            self.advance(next);
            return 0;
        }
        if let Some(unit) = fitting.filter(|_| self.guess) {
            self.doubts += 1;
            if self.doubts >= DOUBTS {
                self.unit = unit;
                self.doubts = 0;
            }
            // A loss may look the same by chance.
            if !self.confirmed || self.unit == unit {
                self.advance(next);
                return 0;
            }
        } else {
            self.doubts = 0;
        }
        let went_back = |last: u32, now: u32| now < last && last - now > UPTIME_JITTER_MS;
        let restarted = matches!((self.last.uptime_ms, next.uptime_ms),
            (Some(last), Some(now)) if went_back(last, now));
        let (most_lost, most_late) = match self.unit {
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
        let known = self.unit == Unit::Packets || self.last.exact;
        let mut lost = 0;
        if gap > 0 && gap.unsigned_abs() <= most_lost && !restarted && known {
            lost = match self.unit {
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
