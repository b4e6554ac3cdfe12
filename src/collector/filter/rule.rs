//! A rule as it is written: what it tests, and how it prints. No I/O.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use jiff::civil::DateTime;

use super::lexer::is_word;

/// A rule of the filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Whether the records that it decides are stored.
    pub accept: bool,
    /// The tag that these records get.
    pub tag: Option<u32>,
    /// Whether no further rule is evaluated for a record that matches.
    pub quick: bool,
    /// What a record must be like; no clause matches every record.
    pub clauses: Clauses,
}

/// The conditions of a rule: a record matches if all of them hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clauses {
    /// `agent`: the address of the exporter.
    pub agent: Option<Test<Addresses>>,
    /// `in_ifndx`: the interface that the flow came in by.
    pub input: Option<Test<Ranges>>,
    /// `out_ifndx`: the interface that the flow went out by.
    pub output: Option<Test<Ranges>>,
    /// `inet` or `inet6`: the family of the flow's addresses.
    pub family: Option<Test<Family>>,
    /// `src`.
    pub source: End,
    /// `dst`.
    pub destination: End,
    /// `proto`: the transport protocol.
    pub protocol: Option<Test<Ranges>>,
    /// `tos`: the type of service.
    pub tos: Option<Test<Ranges>>,
    /// `tcp_flags`.
    pub tcp_flags: Option<Test<Masked>>,
    /// `label`: the IPv6 flow label; `None` in it for any label but 0.
    pub label: Option<Test<Option<Masked>>>,
    /// `experiment`.
    pub experiment: Option<Test<Vec<Name>>>,
    /// `activity`.
    pub activity: Option<Test<Vec<Name>>>,
    /// `bytes`: all must hold.
    pub bytes: Vec<Comparison>,
    /// `packets`: all must hold.
    pub packets: Vec<Comparison>,
    /// `days`: bit 0 is Sunday, by local time.
    pub days: Option<u8>,
    /// `after HH:MM:SS`: the first second of the day that matches, by local time.
    pub after: Option<u32>,
    /// `before HH:MM:SS`: the first second of the day that does not match any more, up to 86400.
    pub before: Option<u32>,
    /// `after date`: the first second that matches, local time.
    pub after_date: Option<DateTime>,
    /// `before date`: the first second that does not match any more.
    pub before_date: Option<DateTime>,
}

/// A condition that may be negated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Test<T> {
    /// Whether the rule matches where the condition does not hold.
    pub negated: bool,
    /// What is compared.
    pub value: T,
}

/// Addresses to compare with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// Every address, also an unknown one.
    Any,
    /// Prefixes without host bits; at least one.
    In(Vec<IpNet>),
}

/// Numbers to compare with, by ranges: first and last. At least one.
pub type Ranges = Vec<(u32, u32)>;

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `inet`
    Inet,
    /// `inet6`
    Inet6,
}

/// `src` or `dst`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// The address.
    pub address: Option<Test<Addresses>>,
    /// The port.
    pub port: Option<Test<Ranges>>,
}

/// The bits of a number that are compared, and their value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// The bits that are compared; `None` for all.
    pub mask: Option<u32>,
    /// Their value.
    pub value: u32,
}

/// An experiment or an activity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// By its id.
    Id(u16),
    /// By its name in the registry.
    Name(String),
}

/// A comparison of a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// How the counter compares to `value`.
    pub operator: Operator,
    /// The number.
    pub value: u64,
}

/// How a counter compares to a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `<`
    Less,
    /// `<=`
    AtMost,
    /// `=`
    Equal,
    /// `>=`
    AtLeast,
    /// `>`
    Greater,
}

impl Operator {
    /// All of them.
    pub const ALL: [Operator; 5] = [
        Operator::Less,
        Operator::AtMost,
        Operator::Equal,
        Operator::AtLeast,
        Operator::Greater,
    ];

    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Operator::Less => "<",
            Operator::AtMost => "<=",
            Operator::Equal => "=",
            Operator::AtLeast => ">=",
            Operator::Greater => ">",
        }
    }
}

/// The days of the week, Sunday first, as `days` prints them.
pub const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// Transport protocols by name; the first name of a number is the one that is printed.
pub const PROTOCOLS: &[(&str, u8)] = &[
    ("icmp", 1),
    ("igmp", 2),
    ("ipencap", 4),
    ("ipip", 4),
    ("tcp", 6),
    ("egp", 8),
    ("igp", 9),
    ("udp", 17),
    ("dccp", 33),
    ("ipv6", 41),
    ("ipv6-route", 43),
    ("ipv6-frag", 44),
    ("rsvp", 46),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", 58),
    ("icmp6", 58),
    ("icmpv6", 58),
    ("ipv6-nonxt", 59),
    ("ipv6-opts", 60),
    ("eigrp", 88),
    ("ospf", 89),
    ("pim", 103),
    ("ipcomp", 108),
    ("vrrp", 112),
    ("l2tp", 115),
    ("sctp", 132),
    ("udplite", 136),
    ("mpls-in-ip", 137),
];

impl Clauses {
    /// Whether there is no condition: every record matches.
    pub fn is_empty(&self) -> bool {
        *self == Clauses::default()
    }

    /// Whether the clauses ask for something that no record can have.
    pub fn never_match(&self) -> bool {
        let not_any = |test: &Test<Addresses>| test.negated && matches!(test.value, Addresses::Any);
        let addresses = [&self.agent, &self.source.address, &self.destination.address];
        let beyond = |test: Masked, negated: bool| {
            !negated && test.mask.is_some_and(|mask| test.value & !mask != 0)
        };
        addresses.into_iter().flatten().any(not_any)
            || self
                .tcp_flags
                .as_ref()
                .is_some_and(|test| beyond(test.value, test.negated))
            || self
                .label
                .as_ref()
                .is_some_and(|test| test.value.is_some_and(|value| beyond(value, test.negated)))
            || (self.after.is_some() && self.after == self.before)
            || matches!((self.after_date, self.before_date), (Some(after), Some(before)) if after >= before)
    }
}

/// Whether an address is known, and of which family it is.
pub fn family(address: Option<IpAddr>) -> Option<Family> {
    Some(match address? {
        IpAddr::V4(_) => Family::Inet,
        IpAddr::V6(_) => Family::Inet6,
    })
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.accept { "accept" } else { "discard" })?;
        if let Some(tag) = self.tag {
            write!(f, " tag {tag}")?;
        }
        if self.quick {
            f.write_str(" quick")?;
        }
        write!(f, " {}", self.clauses)
    }
}

impl fmt::Display for Clauses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("all");
        }
        let mut words: Vec<String> = Vec::new();
        if let Some(test) = &self.agent {
            words.push(format!("agent {}", addresses(test)));
        }
        for (name, test) in [("in_ifndx", &self.input), ("out_ifndx", &self.output)] {
            words.extend(test.iter().map(|test| format!("{name} {}", ranges(test))));
        }
        if let Some(test) = &self.family {
            let name = match test.value {
                Family::Inet => "inet",
                Family::Inet6 => "inet6",
            };
            words.push(format!("{}{name}", not(test.negated)));
        }
        for (name, end) in [("src", &self.source), ("dst", &self.destination)] {
            if *end == End::default() {
                continue;
            }
            // djm's grammar has no port without an address.
            let address = end.address.as_ref().map_or("any".to_owned(), addresses);
            words.push(format!("{name} {address}"));
            let port = end.port.as_ref();
            words.extend(port.map(|port| format!("port {}", ranges(port))));
        }
        if let Some(test) = &self.protocol {
            words.push(format!("proto {}", protocols(test)));
        }
        if let Some(test) = &self.tos {
            words.push(format!("tos {}", ranges(test)));
        }
        if let Some(test) = &self.tcp_flags {
            words.push(format!("tcp_flags {}", masked(test.negated, test.value)));
        }
        if let Some(test) = &self.label {
            words.push(match test.value {
                None => format!("label {}any", not(test.negated)),
                Some(value) => format!("label {}", masked(test.negated, value)),
            });
        }
        for (name, test) in [
            ("experiment", &self.experiment),
            ("activity", &self.activity),
        ] {
            words.extend(test.iter().map(|test| {
                let texts: Vec<String> = test.value.iter().map(Name::to_string).collect();
                format!("{name} {}{}", not(test.negated), list(&texts))
            }));
        }
        for (name, comparisons) in [("bytes", &self.bytes), ("packets", &self.packets)] {
            words.extend(comparisons.iter().map(|comparison| {
                let Comparison { operator, value } = comparison;
                format!("{name} {} {value}", operator.as_str())
            }));
        }
        if let Some(days) = self.days {
            let names = (0..7).filter(|day| days & 1 << day != 0);
            let names: Vec<&str> = names.map(|day| DAYS[day]).collect();
            words.push(format!("days {}", names.join(",")));
        }
        for (name, time, date) in [
            ("after", self.after, self.after_date),
            ("before", self.before, self.before_date),
        ] {
            words.extend(time.map(|time| format!("{name} {}", time_of_day(time))));
            words.extend(date.map(|date| format!("{name} date {}", date.strftime("%Y%m%d%H%M%S"))));
        }
        f.write_str(&words.join(" "))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Name::Id(id) => id.fmt(f),
            // A word that begins with a digit could be read as a number.
            Name::Name(name)
                if is_word(name) && !name.starts_with(|c: char| c.is_ascii_digit()) =>
            {
                f.write_str(name)
            }
            Name::Name(name) => write!(f, "{}", quoted(name)),
        }
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

fn not(negated: bool) -> &'static str {
    if negated { "! " } else { "" }
}

/// One element as it is, several in braces.
fn list(texts: &[String]) -> String {
    match texts {
        [one] => one.clone(),
        several => format!("{{ {} }}", several.join(", ")),
    }
}

fn addresses(test: &Test<Addresses>) -> String {
    let addresses = match &test.value {
        Addresses::Any => "any".to_owned(),
        Addresses::In(prefixes) => {
            let texts: Vec<String> = prefixes.iter().map(IpNet::to_string).collect();
            list(&texts)
        }
    };
    not(test.negated).to_owned() + &addresses
}

fn range(&(first, last): &(u32, u32)) -> String {
    match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    }
}

fn ranges(test: &Test<Ranges>) -> String {
    let texts: Vec<String> = test.value.iter().map(range).collect();
    not(test.negated).to_owned() + &list(&texts)
}

fn protocols(test: &Test<Ranges>) -> String {
    let name = |range: &(u32, u32)| {
        let named = PROTOCOLS.iter().find(|(_, number)| {
            let number = u32::from(*number);
            *range == (number, number)
        });
        match named {
            // djm's flowd reads a hyphen in quotes only.
            Some((name, _)) if name.contains('-') => Some(quoted(name)),
            Some((name, _)) => Some((*name).to_owned()),
            None => None,
        }
    };
    let texts: Vec<String> = test
        .value
        .iter()
        .map(|numbers| name(numbers).unwrap_or_else(|| range(numbers)))
        .collect();
    not(test.negated).to_owned() + &list(&texts)
}

fn masked(negated: bool, Masked { mask, value }: Masked) -> String {
    let mask = mask.map_or_else(String::new, |mask| format!("mask {mask:#x} "));
    format!("{mask}{}equals {value:#x}", not(negated))
}

fn time_of_day(seconds: u32) -> String {
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match second {
        0 => format!("{hour:02}:{minute:02}"),
        _ => format!("{hour:02}:{minute:02}:{second:02}"),
    }
}
