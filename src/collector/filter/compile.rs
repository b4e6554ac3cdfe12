//! Turns rules into checks: lists become sorted ranges, names become sets of tags, cheap checks come first. No I/O.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::tz::TimeZone;

use super::evaluate::Counts;
use super::grammar::parse_clauses;
use super::lexer::ParseError;
use super::rule::{
    Addresses, Clauses, Comparison, End, Family, Name, Operator, Ranges, Rule, Test,
};
use crate::collector::record::FlowRecord;
use crate::config::nearest::nearest;
use crate::flow::Tag;
use crate::registry::{Registry, same_name};
use crate::scitag::{ACTIVITY_MAX, EXPERIMENT_MAX};

/// A name that the registry does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileError {
    /// The rule, from 1.
    pub rule: usize,
    /// What is wrong, and what was expected.
    pub message: String,
}

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rule {}: {}", self.rule, self.message)
    }
}

impl std::error::Error for CompileError {}

/// Compiled rules. It never changes, so that workers share it.
#[derive(Debug)]
pub struct Filter {
    pub(super) rules: Vec<Compiled>,
    /// The checks of all rules, one after the other.
    pub(super) checks: Vec<Check>,
    /// Tags that a flow label may stand for.
    pub(super) registered: TagSet,
    pub(super) uses_tags: bool,
    pub(super) uses_local_time: bool,
    pub(super) time_zone: TimeZone,
}

#[derive(Debug)]
pub(super) struct Compiled {
    pub(super) accept: bool,
    pub(super) quick: bool,
    pub(super) tag: Option<u32>,
    /// The end of its checks; they begin where those of the rule before end.
    pub(super) end: usize,
}

/// A condition; all of a rule must hold.
#[derive(Debug)]
pub(super) enum Check {
    Family {
        v4: bool,
        negated: bool,
    },
    Number {
        field: Field,
        first: u32,
        last: u32,
        negated: bool,
    },
    Numbers {
        field: Field,
        ranges: Box<[(u32, u32)]>,
        negated: bool,
    },
    Flags {
        mask: u8,
        value: u8,
        negated: bool,
    },
    Label {
        mask: u32,
        value: u32,
        negated: bool,
    },
    AnyLabel {
        negated: bool,
    },
    /// From the first to the last value, both included.
    Count {
        counter: Counter,
        first: u64,
        last: u64,
    },
    V4 {
        whose: Whose,
        mask: u32,
        network: u32,
        negated: bool,
    },
    V6 {
        whose: Whose,
        mask: u128,
        network: u128,
        negated: bool,
    },
    Addresses {
        whose: Whose,
        set: Box<AddressSet>,
        negated: bool,
    },
    Tag(Box<Tags>),
    Days(u8),
    /// Seconds of the day: from the first, up to but without the second; over midnight if it is the smaller one.
    TimeOfDay(u32, u32),
    /// UNIX seconds, likewise.
    Time(i64, i64),
    Never,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Whose {
    // The order is that of `Derived::ipv4`.
    Agent,
    Source,
    Destination,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Field {
    // The order is that of `Derived::numbers`.
    Input,
    Output,
    SourcePort,
    DestinationPort,
    Protocol,
    Tos,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Counter {
    // The order is that of `Derived::counters`.
    Octets,
    Packets,
}

/// Sorted ranges of addresses that do not touch each other.
#[derive(Debug)]
pub(super) struct AddressSet {
    v4: Box<[(u32, u32)]>,
    v6: Box<[(u128, u128)]>,
}

impl AddressSet {
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => contains(&self.v4, u32::from(address)),
            IpAddr::V6(address) => contains(&self.v6, u128::from(address)),
        }
    }
}

/// Whether a number is in one of the sorted ranges.
pub(super) fn contains<T: Copy + Ord>(ranges: &[(T, T)], number: T) -> bool {
    // Few are compared one by one, which the processor predicts.
    if ranges.len() <= 8 {
        return ranges.iter().fold(false, |is_in, (first, last)| {
            is_in | ((*first <= number) & (number <= *last))
        });
    }
    let after = ranges.partition_point(|(first, _)| *first <= number);
    after > 0 && number <= ranges[after - 1].1
}

/// The first and the last count that a comparison admits; `None` if it admits none.
fn counts(comparison: &Comparison) -> Option<(u64, u64)> {
    let value = comparison.value;
    Some(match comparison.operator {
        Operator::Less => (0, value.checked_sub(1)?),
        Operator::AtMost => (0, value),
        Operator::Equal => (value, value),
        Operator::AtLeast => (value, u64::MAX),
        Operator::Greater => (value.checked_add(1)?, u64::MAX),
    })
}

/// Tags that match, and whether a record without a tag does.
#[derive(Debug)]
pub(super) struct Tags {
    pub(super) set: TagSet,
    pub(super) untagged: bool,
}

/// A set of tags that fit in a flow label: for each experiment a bit per activity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TagSet(Box<[u64]>);

impl TagSet {
    /// `activities` gives the bits of an experiment.
    fn of(activities: impl Fn(u16) -> u64) -> TagSet {
        TagSet((0..=EXPERIMENT_MAX).map(activities).collect())
    }

    fn registered(registry: &Registry) -> TagSet {
        TagSet::of(|experiment| {
            let experiment = registry.experiment(experiment);
            let activities = experiment.iter().flat_map(|e| &e.activities);
            activities
                .map(|activity| bit(activity.id))
                .fold(0, |all, bit| all | bit)
        })
    }

    pub(super) fn contains(&self, tag: Tag) -> bool {
        let activities = self.0.get(usize::from(tag.experiment));
        activities.is_some_and(|bits| tag.activity <= ACTIVITY_MAX && bits >> tag.activity & 1 != 0)
    }
}

impl Filter {
    /// Compiles rules. Times are those of `time_zone`, which is that of this host unless a test asks for another.
    pub fn compile(
        rules: &[Rule],
        registry: &Registry,
        time_zone: TimeZone,
    ) -> Result<Filter, CompileError> {
        let mut filter = Filter {
            rules: Vec::with_capacity(rules.len()),
            checks: Vec::new(),
            registered: TagSet::registered(registry),
            uses_tags: false,
            uses_local_time: false,
            time_zone,
        };
        for (index, rule) in rules.iter().enumerate() {
            let clauses = &rule.clauses;
            check_names(clauses, registry).map_err(|unknown| CompileError {
                rule: index + 1,
                message: unknown.message,
            })?;
            filter.push_checks(clauses, registry);
            filter.uses_tags |= clauses.experiment.is_some() || clauses.activity.is_some();
            filter.uses_local_time |=
                clauses.days.is_some() || clauses.after.is_some() || clauses.before.is_some();
            filter.rules.push(Compiled {
                accept: rule.accept,
                quick: rule.quick,
                tag: rule.tag,
                end: filter.checks.len(),
            });
        }
        Ok(filter)
    }

    /// How many rules there are.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether there is no rule: every record is accepted.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Adds the checks of a rule: those that take little time and fail often first.
    fn push_checks(&mut self, clauses: &Clauses, registry: &Registry) {
        let mut checks = Vec::new();
        if let Some(Test { negated, value }) = clauses.family {
            let v4 = value == Family::Inet;
            checks.push(Check::Family { v4, negated });
        }
        for (field, test) in [
            (Field::Protocol, &clauses.protocol),
            (Field::Input, &clauses.input),
            (Field::Output, &clauses.output),
            (Field::DestinationPort, &clauses.destination.port),
            (Field::SourcePort, &clauses.source.port),
            (Field::Tos, &clauses.tos),
        ] {
            checks.extend(test.as_ref().map(|test| numbers(field, test)));
        }
        if let Some(Test { negated, value }) = &clauses.tcp_flags {
            // The parser has checked that both have 8 bits.
            let (mask, value) = (value.mask.unwrap_or(0xff) as u8, value.value as u8);
            let negated = *negated;
            checks.push(Check::Flags {
                mask,
                value,
                negated,
            });
        }
        if let Some(Test { negated, value }) = &clauses.label {
            let negated = *negated;
            checks.push(match value {
                None => Check::AnyLabel { negated },
                Some(masked) => {
                    let (mask, value) = (masked.mask.unwrap_or(u32::MAX), masked.value);
                    Check::Label {
                        mask,
                        value,
                        negated,
                    }
                }
            });
        }
        for (counter, comparisons) in [
            (Counter::Octets, &clauses.bytes),
            (Counter::Packets, &clauses.packets),
        ] {
            let check = |comparison: &Comparison| match counts(comparison) {
                Some((first, last)) => Check::Count {
                    counter,
                    first,
                    last,
                },
                None => Check::Never,
            };
            checks.extend(comparisons.iter().map(check));
        }
        let address = |end: &End| end.address.clone();
        for (whose, test) in [
            (Whose::Source, address(&clauses.source)),
            (Whose::Destination, address(&clauses.destination)),
            (Whose::Agent, clauses.agent.clone()),
        ] {
            checks.extend(test.and_then(|test| addresses(whose, &test)));
        }
        if clauses.experiment.is_some() || clauses.activity.is_some() {
            checks.push(Check::Tag(Box::new(tags(clauses, registry))));
        }
        if let Some(days) = clauses.days.filter(|days| *days != 0x7f) {
            checks.push(Check::Days(days));
        }
        match (clauses.after, clauses.before) {
            (None, None) => {}
            (after, before) => {
                checks.push(Check::TimeOfDay(
                    after.unwrap_or(0),
                    before.unwrap_or(86_400),
                ));
            }
        }
        if clauses.after_date.is_some() || clauses.before_date.is_some() {
            let seconds = |date: Option<jiff::civil::DateTime>, otherwise| match date {
                Some(date) => {
                    let time = self.time_zone.to_ambiguous_timestamp(date).compatible();
                    // Only dates of the years 1 and 9999 are out of range, in some time zones.
                    time.map_or(otherwise, |time| time.as_second())
                }
                None => otherwise,
            };
            let first = seconds(clauses.after_date, i64::MIN);
            checks.push(Check::Time(first, seconds(clauses.before_date, i64::MAX)));
        }
        if clauses.never_match() {
            checks = vec![Check::Never];
        }
        self.checks.append(&mut checks);
    }
}

/// Sorts ranges and joins those that overlap or touch.
fn merged<T: Copy + Ord>(mut ranges: Vec<(T, T)>, next: impl Fn(T) -> Option<T>) -> Vec<(T, T)> {
    ranges.sort();
    let mut merged: Vec<(T, T)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some((_, end)) if next(*end).is_none_or(|next| first <= next) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn numbers(field: Field, test: &Test<Ranges>) -> Check {
    let negated = test.negated;
    let ranges = merged(test.value.clone(), |end: u32| end.checked_add(1));
    match *ranges.as_slice() {
        [(first, last)] => Check::Number {
            field,
            first,
            last,
            negated,
        },
        _ => {
            let ranges = ranges.into();
            Check::Numbers {
                field,
                ranges,
                negated,
            }
        }
    }
}

/// `None` for `any`, which every record matches.
fn addresses(whose: Whose, test: &Test<Addresses>) -> Option<Check> {
    let negated = test.negated;
    let prefixes = match &test.value {
        Addresses::Any if negated => return Some(Check::Never),
        Addresses::Any => return None,
        Addresses::In(prefixes) => prefixes,
    };
    Some(match *prefixes.as_slice() {
        [IpNet::V4(prefix)] => Check::V4 {
            whose,
            mask: prefix.netmask().into(),
            network: prefix.network().into(),
            negated,
        },
        [IpNet::V6(prefix)] => Check::V6 {
            whose,
            mask: prefix.netmask().into(),
            network: prefix.network().into(),
            negated,
        },
        _ => {
            let (mut v4, mut v6) = (Vec::new(), Vec::new());
            for prefix in prefixes {
                match prefix {
                    IpNet::V4(p) => v4.push((u32::from(p.network()), u32::from(p.broadcast()))),
                    IpNet::V6(p) => v6.push((u128::from(p.network()), u128::from(p.broadcast()))),
                }
            }
            let set = Box::new(AddressSet {
                v4: merged(v4, |end| end.checked_add(1)).into(),
                v6: merged(v6, |end| end.checked_add(1)).into(),
            });
            Check::Addresses {
                whose,
                set,
                negated,
            }
        }
    })
}

/// The bit of an activity; none for one that does not fit in a label.
fn bit(activity: u16) -> u64 {
    1_u64.checked_shl(activity.into()).unwrap_or(0)
}

fn tags(clauses: &Clauses, registry: &Registry) -> Tags {
    let test = |test: &Option<Test<Vec<Name>>>| match test {
        Some(test) => (test.negated, test.value.clone()),
        // Not one of none: all.
        None => (true, Vec::new()),
    };
    let (not_experiments, experiments) = test(&clauses.experiment);
    let (not_activities, activities) = test(&clauses.activity);
    let experiments: Vec<u16> = experiments
        .iter()
        .filter_map(|name| match name {
            Name::Id(id) => Some(*id),
            Name::Name(name) => registry.experiment_id(name),
        })
        .collect();
    let set = TagSet::of(|experiment| {
        if experiments.contains(&experiment) == not_experiments {
            return 0;
        }
        // The same name has another id in each experiment.
        let ids = activities.iter().filter_map(|name| match name {
            Name::Id(id) => Some(*id),
            Name::Name(name) => registry.activity_id(experiment, name),
        });
        let bits = ids.map(bit).fold(0, |all, bit| all | bit);
        if not_activities { !bits } else { bits }
    });
    let untagged = not_experiments && not_activities;
    Tags { set, untagged }
}

/// A name of a rule that the registry does not know.
pub(super) struct UnknownName {
    pub(super) is_experiment: bool,
    /// Which name of the clause, from 0.
    pub(super) index: usize,
    pub(super) message: String,
}

/// Whether the registry knows the names of experiments and activities.
pub(super) fn check_names(clauses: &Clauses, registry: &Registry) -> Result<(), UnknownName> {
    let names =
        |test: &Option<Test<Vec<Name>>>| test.as_ref().map_or(&[][..], |t| &t.value).to_vec();
    let experiments = registry.experiments();
    for (index, name) in names(&clauses.experiment).into_iter().enumerate() {
        let Name::Name(name) = name else { continue };
        if registry.experiment_id(&name).is_none() {
            let known: Vec<&str> = experiments.iter().map(|e| e.name.as_str()).collect();
            let message = unknown("experiment", &name, &known);
            return Err(UnknownName {
                is_experiment: true,
                index,
                message,
            });
        }
    }
    // Without a negation, the activity must be one of an experiment of the same rule.
    let chosen = clauses.experiment.as_ref().filter(|test| !test.negated);
    let is_chosen = |id: u16| {
        chosen.is_none_or(|test| {
            test.value.iter().any(|name| match name {
                Name::Id(other) => *other == id,
                Name::Name(name) => registry.experiment_id(name) == Some(id),
            })
        })
    };
    let of_chosen = experiments.iter().filter(|e| is_chosen(e.id));
    let known: Vec<&str> = of_chosen
        .flat_map(|e| e.activities.iter().map(|a| a.name.as_str()))
        .collect();
    for (index, name) in names(&clauses.activity).into_iter().enumerate() {
        let Name::Name(name) = name else { continue };
        if !known.iter().any(|known| same_name(known, &name)) {
            let kind = match chosen {
                Some(_) => "activity of the experiment",
                None => "activity",
            };
            let message = unknown(kind, &name, &known);
            return Err(UnknownName {
                is_experiment: false,
                index,
                message,
            });
        }
    }
    Ok(())
}

fn unknown(kind: &str, name: &str, known: &[&str]) -> String {
    let hint = match nearest(name, known) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => "expected an id, or a name that `flowd-rs registry` lists".to_owned(),
    };
    format!("\"{}\" is not a known {kind}, {hint}", name.escape_debug())
}

/// The clauses of a rule, to choose records with.
#[derive(Debug)]
pub struct Where {
    filter: Filter,
    counts: Counts,
}

impl Where {
    /// Reads clauses: `src 192.0.2.0/24 port 443`.
    pub fn parse(
        text: &str,
        registry: &Registry,
        time_zone: TimeZone,
    ) -> Result<Where, ParseError> {
        let rule = Rule {
            accept: true,
            tag: None,
            quick: false,
            clauses: parse_clauses(text, registry)?,
        };
        let filter = Filter::compile(&[rule], registry, time_zone);
        let filter = filter.map_err(|error| ParseError {
            place: (1, 1),
            message: error.message,
        })?;
        let counts = Counts::new(&filter);
        Ok(Where { filter, counts })
    }

    /// Whether a record matches all clauses.
    pub fn matches(&mut self, record: &FlowRecord) -> bool {
        self.filter
            .evaluate(record, &mut self.counts)
            .rule
            .is_some()
    }
}
