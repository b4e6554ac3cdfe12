//! Applies compiled rules to a record, and counts what each rule did. No I/O, no clock, no allocation.

use std::net::IpAddr;
use std::ops::AddAssign;

use jiff::{SignedDuration, Timestamp, tz::TimeZone};

use super::compile::{Check, Filter, Whose, contains};
use crate::collector::record::FlowRecord;
use crate::flow::Tag;
use crate::scitag;

/// What the rules say of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the record is stored.
    pub accept: bool,
    /// The tag of the rule that decided.
    pub tag: Option<u32>,
    /// The rule that decided, from 0; `None` if none matched.
    pub rule: Option<u16>,
}

/// What the rules of a filter did, counted by one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    records: u64,
    rules: Vec<Row>,
    clock: LocalClock,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Row {
    matches: u64,
    wins: u64,
}

/// What one rule did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleCounts {
    /// Records that it was evaluated for.
    pub evaluations: u64,
    /// Records that matched.
    pub matches: u64,
    /// Records that it decided.
    pub wins: u64,
}

impl Counts {
    /// Counts from 0 for a filter.
    pub fn new(filter: &Filter) -> Counts {
        Counts {
            rules: vec![Row::default(); filter.len()],
            ..Counts::default()
        }
    }

    /// Records that were evaluated.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// Records that no rule matched, which are accepted.
    pub fn unmatched(&self) -> u64 {
        self.records - self.rules.iter().map(|row| row.wins).sum::<u64>()
    }

    /// The counts of each rule of `filter`, which they must have been made for.
    pub fn rules(&self, filter: &Filter) -> Vec<RuleCounts> {
        let mut evaluations = self.records;
        let rules = self.rules.iter().zip(&filter.rules);
        rules
            .map(|(row, rule)| {
                let Row { matches, wins } = *row;
                let counts = RuleCounts {
                    evaluations,
                    matches,
                    wins,
                };
                // What a quick rule matches goes no further.
                evaluations -= if rule.quick { matches } else { 0 };
                counts
            })
            .collect()
    }
}

impl AddAssign<&Counts> for Counts {
    /// Adds the counts of another worker with the same filter.
    fn add_assign(&mut self, other: &Counts) {
        self.records += other.records;
        self.rules
            .resize(self.rules.len().max(other.rules.len()), Row::default());
        for (sum, row) in self.rules.iter_mut().zip(&other.rules) {
            sum.matches += row.matches;
            sum.wins += row.wins;
        }
    }
}

/// Converts UNIX seconds to local time, and remembers how long the offset stays the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalClock {
    from: i64,
    until: i64,
    offset: i64,
}

impl LocalClock {
    /// Seconds since 1970-01-01 00:00:00 on the wall clock of the time zone.
    pub fn local_seconds(&mut self, unix: u32, time_zone: &TimeZone) -> i64 {
        let unix = i64::from(unix);
        if !(self.from..self.until).contains(&unix) {
            *self = LocalClock::around(unix, time_zone);
        }
        unix + self.offset
    }

    fn around(unix: i64, time_zone: &TimeZone) -> LocalClock {
        // Any u32 is in the range of a timestamp.
        let time = Timestamp::from_second(unix).unwrap_or(Timestamp::UNIX_EPOCH);
        let second = SignedDuration::from_secs(1);
        let at = |transition: jiff::tz::TimeZoneTransition| transition.timestamp().as_second();
        let preceding = time_zone.preceding(time + second).next();
        let following = time_zone.following(time).next();
        LocalClock {
            from: preceding.map_or(i64::MIN, at),
            until: following.map_or(i64::MAX, at),
            offset: time_zone.to_offset(time).seconds().into(),
        }
    }
}

/// A number that no network contains: its upper half is not 0.
const NO_IPV4: u64 = u64::MAX;
/// The upper half of a number in [`Derived::ipv4`].
const NO_IPV4_MASK: u64 = 0xffff_ffff_0000_0000;

/// What is computed once for a record.
struct Derived {
    /// In the order of `Field`: looking one up takes no branch.
    numbers: [u32; 6],
    /// In the order of `Counter`.
    counters: [u64; 2],
    /// The IPv4 addresses in the order of [`Whose`]; [`NO_IPV4`] for others.
    ipv4: [u64; 3],
    tag: Option<Tag>,
    /// Sunday is 0.
    day: u8,
    /// Seconds since midnight, local time.
    time_of_day: u32,
}

impl Filter {
    /// What the rules say of a record: the last one that matches decides, or the first one with `quick`.
    pub fn evaluate(&self, record: &FlowRecord, counts: &mut Counts) -> Verdict {
        counts.records += 1;
        let derived = self.derive(record, &mut counts.clock);
        let mut winner = None;
        let mut start = 0;
        for (index, (rule, row)) in self.rules.iter().zip(&mut counts.rules).enumerate() {
            let checks = &self.checks[start..rule.end];
            start = rule.end;
            if checks.iter().all(|check| holds(check, record, &derived)) {
                row.matches += 1;
                winner = Some(index);
                if rule.quick {
                    break;
                }
            }
        }
        let Some(index) = winner else {
            return Verdict {
                accept: true,
                tag: None,
                rule: None,
            };
        };
        counts.rules[index].wins += 1;
        let rule = &self.rules[index];
        Verdict {
            accept: rule.accept,
            tag: rule.tag,
            rule: Some(index as u16),
        }
    }

    fn derive(&self, record: &FlowRecord, clock: &mut LocalClock) -> Derived {
        let local = match self.uses_local_time {
            true => clock.local_seconds(record.received_s, &self.time_zone),
            false => 0,
        };
        Derived {
            numbers: [
                record.input,
                record.output,
                record.source_port.into(),
                record.destination_port.into(),
                record.protocol.into(),
                record.tos.into(),
            ],
            counters: [record.octets, record.packets],
            ipv4: [Whose::Agent, Whose::Source, Whose::Destination].map(|whose| {
                match address(record, whose) {
                    Some(IpAddr::V4(address)) => u32::from(address).into(),
                    _ => NO_IPV4,
                }
            }),
            tag: self.uses_tags.then(|| self.tag(record)).flatten(),
            // 1970-01-01 was a Thursday.
            day: (local.div_euclid(86_400) + 4).rem_euclid(7) as u8,
            time_of_day: local.rem_euclid(86_400) as u32,
        }
    }

    /// The tag of a record: that of its attribution, or of its flow label if the registry has that tag.
    fn tag(&self, record: &FlowRecord) -> Option<Tag> {
        if let Some(attribution) = record.attribution {
            return Some(Tag {
                experiment: (attribution.scitag >> 6).try_into().unwrap_or(u16::MAX),
                activity: (attribution.scitag & u32::from(scitag::ACTIVITY_MAX)) as u16,
            });
        }
        let tag = scitag::from_label(record.flow_label?);
        self.registered.contains(tag).then_some(tag)
    }
}

fn holds(check: &Check, record: &FlowRecord, derived: &Derived) -> bool {
    match *check {
        Check::Family { v4, negated } => {
            let address = record.source.or(record.destination);
            address.is_some_and(|address| address.is_ipv4() == v4) != negated
        }
        Check::Number {
            field,
            first,
            last,
            negated,
        } => (first..=last).contains(&derived.numbers[field as usize]) != negated,
        Check::Numbers {
            field,
            ref ranges,
            negated,
        } => contains(ranges, derived.numbers[field as usize]) != negated,
        Check::Flags {
            mask,
            value,
            negated,
        } => (record.tcp_flags & mask == value) != negated,
        Check::Label {
            mask,
            value,
            negated,
        } => record.flow_label.is_some_and(|label| label & mask == value) != negated,
        Check::AnyLabel { negated } => record.flow_label.is_some_and(|label| label != 0) != negated,
        Check::Count {
            counter,
            first,
            last,
        } => (first..=last).contains(&derived.counters[counter as usize]),
        Check::V4 {
            whose,
            mask,
            network,
            negated,
        } => {
            let is_in = derived.ipv4[whose as usize] & (NO_IPV4_MASK | u64::from(mask))
                == u64::from(network);
            is_in != negated
        }
        Check::V6 {
            whose,
            mask,
            network,
            negated,
        } => {
            let is_in = match address(record, whose) {
                Some(IpAddr::V6(address)) => u128::from(address) & mask == network,
                _ => false,
            };
            is_in != negated
        }
        Check::Addresses {
            whose,
            ref set,
            negated,
        } => address(record, whose).is_some_and(|address| set.contains(address)) != negated,
        Check::Tag(ref tags) => match derived.tag {
            Some(tag) => tags.set.contains(tag),
            None => tags.untagged,
        },
        Check::Days(days) => days >> derived.day & 1 != 0,
        Check::TimeOfDay(first, end) => {
            let time = derived.time_of_day;
            match first <= end {
                true => first <= time && time < end,
                false => first <= time || time < end,
            }
        }
        Check::Time(first, end) => (first..end).contains(&i64::from(record.received_s)),
        Check::Never => false,
    }
}

fn address(record: &FlowRecord, whose: Whose) -> Option<IpAddr> {
    match whose {
        // An IPv6 socket receives from IPv4-mapped addresses.
        Whose::Agent => Some(record.exporter.to_canonical()),
        Whose::Source => record.source,
        Whose::Destination => record.destination,
    }
}
