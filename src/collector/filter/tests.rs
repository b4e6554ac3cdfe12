//! Tests of the language as a whole: each clause and trap, and a model that evaluates rules as they are written.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use proptest::prelude::*;

use super::rule::{
    Addresses, Clauses, Comparison, End, Family, Masked, Name, Operator, Ranges, Test,
};
use super::*;
use crate::collector::record::{Attribution, FlowRecord, Origin};
use crate::flow::Tag;
use crate::registry::Registry;
use crate::scitag;

/// A rule as it prints; panics with the error.
fn print(text: &str) -> String {
    let parsed = parse_rules(text, &mut Macros::default(), &Registry::builtin()).unwrap();
    let texts: Vec<String> = parsed.rules.iter().map(Rule::to_string).collect();
    texts.join("\n")
}

fn error(text: &str) -> String {
    let parsed = parse_rules(text, &mut Macros::default(), &Registry::builtin());
    let error = parsed.expect_err(text);
    format!("{}:{}: {}", error.place.0, error.place.1, error.message)
}

fn berlin() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn matches(clauses: &str, record: &FlowRecord) -> bool {
    let found = Where::parse(clauses, &Registry::builtin(), berlin());
    found.expect(clauses).matches(record)
}

fn filter(text: &str) -> Filter {
    let parsed = parse_rules(text, &mut Macros::default(), &Registry::builtin()).unwrap();
    Filter::compile(&parsed.rules, &Registry::builtin(), TimeZone::UTC).unwrap()
}

/// A flow of ATLAS from 192.0.2.1:40000 to 198.51.100.7:1094, received on Tuesday, 2026-11-24 at 17:30:00 UTC.
fn example() -> FlowRecord {
    FlowRecord {
        received_s: 1_795_541_400,
        exporter: IpAddr::V6(Ipv4Addr::new(203, 0, 113, 1).to_ipv6_mapped()),
        source: Some("192.0.2.1".parse().unwrap()),
        destination: Some("198.51.100.7".parse().unwrap()),
        source_port: 40000,
        destination_port: 1094,
        protocol: 6,
        tcp_flags: 0x1b,
        tos: 8,
        packets: 10,
        octets: 1500,
        input: 3,
        output: 4,
        ..FlowRecord::default()
    }
}

#[test]
fn each_clause_matches_what_it_says_and_nothing_else() {
    let record = example();
    for (holds, fails) in [
        ("agent 203.0.113.0/24", "agent 192.0.2.1"),
        ("agent ! 192.0.2.1", "agent ! 203.0.113.1"),
        ("in_ifndx 3", "in_ifndx 4"),
        ("in_ifndx { 1, 2, 3-9 }", "in_ifndx { 1 2 4-9 }"),
        ("out_ifndx ! 3", "out_ifndx ! 4"),
        ("inet", "inet6"),
        ("! inet6", "! inet"),
        ("src 192.0.2.0/24", "src 192.0.2.2"),
        ("src any", "src ! any"),
        ("src ! 10.0.0.0/8", "src ! 192.0.2.0 /24"),
        (
            "src { 10.0.0.0/8, 192.0.2.0/25 }",
            "src { 2001:db8::/32 10.0.0.0/8 }",
        ),
        ("src 0.0.0.0/0", "src ::/0"),
        ("src any port 40000", "src any port 1094"),
        ("src port 40000-40010", "src port 0-39999"),
        (
            "dst 198.51.100.7 port { 80, 1094 }",
            "dst 198.51.100.7 port { 80, 443 }",
        ),
        ("dst any port ! 80", "dst any port ! 1094"),
        ("proto tcp", "proto udp"),
        ("proto 6", "proto ! TCP"),
        (
            "proto { udp, tcp }",
            "proto { udp, \"ipv6-icmp\", icmp6, ipv6-icmp }",
        ),
        ("tos 0x8", "tos 9"),
        ("tos 0-16", "tos ! 8"),
        ("tcp_flags equals 0x1b", "tcp_flags equals 0x1"),
        (
            "tcp_flags mask 0x12 equals 0x12",
            "tcp_flags mask SAU equals SAU",
        ),
        (
            "tcp_flags mask SA ! equals S",
            "tcp_flags mask SA ! equals SA",
        ),
        ("tcp_flags FSPA", "tcp_flags ! FSPA"),
        ("bytes > 1499", "bytes > 1500"),
        ("bytes >= 1500", "bytes < 1500"),
        ("bytes <= 1500", "bytes = 1501"),
        ("packets = 10", "packets < 10"),
        (
            "bytes > 1 bytes < 2000 packets > 9",
            "bytes > 1 bytes < 1000",
        ),
        ("experiment ! atlas", "experiment atlas"),
        ("activity ! { 1, 2 }", "activity 9"),
        ("label ! any", "label any"),
        ("label ! 5", "label mask 0 equals 0"),
        ("days tue", "days wed"),
        ("days mon-fri", "days weekends"),
        ("days weekdays,sun", "days sat-mon"),
        ("days { Tuesday Friday }", "days thursday , FRI"),
        // 18:30 in Berlin.
        ("after 18:30", "after 18:30:01"),
        ("before 18:30:01", "before 18:30"),
        ("after 18:00 before 19:00", "after 17:00 before 18:00"),
        ("after 18:00 before 8:00", "after 19:00 before 18:30"),
        ("before 24:00", "before 0:00"),
        ("after date 20261124183000", "after date 20261124183001"),
        ("after date 2026", "after date 2027"),
        ("before date 202612", "before date 202611"),
        (
            "before date 2026112419 after 18:00",
            "before date 2026112418",
        ),
        ("all", "src 192.0.2.0/24 dst 192.0.2.0/24"),
    ] {
        assert!(matches(holds, &record), "{holds}");
        assert!(!matches(fails, &record), "{fails}");
    }
}

#[test]
fn experiment_and_activity_come_from_the_attribution_or_from_a_label_of_a_registered_tag() {
    let tag = |experiment, activity| Tag {
        experiment,
        activity,
    };
    let labelled = |tag| FlowRecord {
        flow_label: Some(scitag::label(tag) | scitag::ENTROPY),
        ..example()
    };
    let atlas = labelled(tag(2, 26));
    for (holds, fails) in [
        ("experiment ATLAS", "experiment cms"),
        ("experiment 2", "experiment ! 2"),
        (
            "experiment { cms atlas }",
            "experiment ! { cms, \"atlas\" }",
        ),
        (
            "experiment atlas activity data_challenge",
            "experiment cms activity \"Data Challenge\"",
        ),
        ("activity \"Data Challenge\"", "activity ! data_challenge"),
        (
            "experiment ! cms activity 26",
            "experiment ! cms activity ! 26",
        ),
        ("label any", "label ! any"),
        ("label mask 0x3fefc ! equals 5", "label 5"),
    ] {
        assert!(matches(holds, &atlas), "{holds}");
        assert!(!matches(fails, &atlas), "{fails}");
    }
    // Data Challenge has another id in CMS.
    assert!(matches("activity data_challenge", &labelled(tag(3, 4))));
    // A random label: the registry has no such activity.
    assert!(!matches("experiment 2", &labelled(tag(2, 63))));
    assert!(matches("experiment ! 2", &labelled(tag(2, 63))));
    let attributed = FlowRecord {
        attribution: Some(Attribution {
            scitag: scitag::scitag(tag(3, 63)),
            origin: Origin::Firefly,
        }),
        ..atlas
    };
    assert!(matches("experiment cms activity 63", &attributed));
    assert!(!matches("experiment atlas", &attributed));
}

#[test]
fn a_record_without_an_address_is_in_no_prefix() {
    let record = FlowRecord::default();
    for holds in [
        "src any",
        "src ! 0.0.0.0/0",
        "! inet",
        "! inet6",
        "dst ! { ::/0 0.0.0.0/0 }",
    ] {
        assert!(matches(holds, &record), "{holds}");
    }
    for fails in ["src 0.0.0.0/0", "inet", "inet6", "dst { ::/0 0.0.0.0/0 }"] {
        assert!(!matches(fails, &record), "{fails}");
    }
}

#[test]
fn the_last_match_wins_quick_stops_and_the_tag_of_the_winner_alone_counts() {
    let filter = filter(
        "discard tag 1 all\naccept tag 2 proto tcp\naccept quick dst any port 1094\ndiscard tag 4 all\n",
    );
    let mut counts = Counts::new(&filter);
    let verdict = |record: &FlowRecord, counts: &mut Counts| {
        let Verdict { accept, tag, rule } = filter.evaluate(record, counts);
        (accept, tag, rule)
    };
    assert_eq!(verdict(&example(), &mut counts), (true, None, Some(2)));
    let other = FlowRecord {
        destination_port: 80,
        ..example()
    };
    assert_eq!(verdict(&other, &mut counts), (false, Some(4), Some(3)));
    let rows = counts.rules(&filter);
    let rows: Vec<_> = rows
        .iter()
        .map(|r| (r.evaluations, r.matches, r.wins))
        .collect();
    assert_eq!(rows, [(2, 2, 0), (2, 2, 0), (2, 1, 1), (1, 1, 1)]);
    assert_eq!((counts.records(), counts.unmatched()), (2, 0));

    let mut sum = Counts::default();
    sum += &counts;
    sum += &counts;
    assert_eq!(
        sum.rules(&filter)[2],
        RuleCounts {
            evaluations: 4,
            matches: 2,
            wins: 2
        }
    );
    assert_eq!(sum.records(), 4);
}

#[test]
fn without_a_match_a_record_is_accepted() {
    let filter = filter("discard proto udp");
    let mut counts = Counts::new(&filter);
    let verdict = filter.evaluate(&example(), &mut counts);
    assert_eq!(
        verdict,
        Verdict {
            accept: true,
            tag: None,
            rule: None
        }
    );
    assert_eq!(counts.unmatched(), 1);
}

#[test]
fn local_time_follows_the_transitions_of_the_time_zone() {
    // 2026-10-25 at 01:00 UTC, summer time ends in Berlin; 2026-03-29 at 01:00 UTC, it begins.
    let mut clock = LocalClock::default();
    for (unix, hour) in [
        (1_792_889_999, 2),
        (1_792_890_000, 2),
        (1_792_893_600, 3),
        (1_774_746_000, 3),
        (1_774_745_999, 1),
        (1_792_890_000, 2),
        (0, 1),
        (u32::MAX, 7),
    ] {
        let local = clock.local_seconds(unix, &berlin());
        assert_eq!(local.rem_euclid(86_400) / 3600, hour, "{unix}");
        assert_eq!(local, LocalClock::default().local_seconds(unix, &berlin()));
    }
}

#[test]
fn clauses_stand_in_any_order_and_print_in_the_canonical_one() {
    let canonical = "accept tag 7 quick agent 192.0.2.1/32 in_ifndx 5 inet6 src 2001:db8::/32 port 80 \
                     dst any proto tcp tcp_flags mask 0x12 equals 0x2 experiment belleii bytes > 5 \
                     days mon,tue after 08:00 before 17:30:01";
    let shuffled = "accept before 17:30:1 after 8:00 days tue,mon bytes>5 experiment BelleII tcp_flags mask SA equals S \
                    proto TCP dst any src 2001:db8:0::/32 port 80 inet6 in_ifndx 5 agent 192.0.2.1 quick tag 0x7";
    assert_eq!(print(shuffled), canonical.replace("belleii", "BelleII"));
    assert_eq!(print(canonical), canonical);
    assert_eq!(
        print("discard src port 5-9 proto { 58, 200, 6-7 } label any before date 2027"),
        "discard src any port 5-9 proto { \"ipv6-icmp\", 200, 6-7 } label any before date 20270101000000"
    );
}

#[test]
fn macros_are_expanded_and_those_of_the_command_line_win() {
    let mut macros = Macros::new(&[("port".to_owned(), "443".to_owned())]);
    let text = "net = 192.0.2.0\nport = \"80\"\nends = \"src $net/24 port $port\"\naccept $ends \\\n  proto tcp\n";
    let parsed = parse_rules(text, &mut macros, &Registry::builtin()).unwrap();
    assert_eq!(
        parsed.rules[0].to_string(),
        "accept src 192.0.2.0/24 port 443 proto tcp"
    );
    assert_eq!(parsed.places, [(4, 1)]);
}

#[test]
fn each_error_names_its_place_and_what_was_expected() {
    for (text, expected) in [
        (
            "accept",
            "1:1: the line ends too early, expected all, or a clause such as src, dst or proto",
        ),
        (
            "\n  drop all",
            "2:3: found \"drop\", expected accept or discard, or a macro (name = \"value\")",
        ),
        (
            "accept all src any",
            "1:8: all stands beside other clauses, expected all or clauses",
        ),
        (
            "accept all all",
            "1:12: all is given twice in one rule, expected once",
        ),
        (
            "accept quick quick all",
            "1:14: quick is given twice in one rule, expected once",
        ),
        (
            "accept tag 4294967296 all",
            "1:12: \"4294967296\" is not a valid number, expected 0 to 4294967295",
        ),
        (
            "accept tag 010 all",
            "1:12: \"010\" begins with 0, which some programs read as octal; expected a number without leading zeros, or with 0x",
        ),
        (
            "accept src 192.0.2.1/24",
            "1:12: 192.0.2.1/24 has bits of a host behind its length, expected 192.0.2.0/24 for the network or 192.0.2.1 for the host",
        ),
        (
            "accept src 192.0.2.256",
            "1:12: \"192.0.2.256\" is not a valid address or prefix, expected for example 192.0.2.0/24 or 2001:db8::/32",
        ),
        (
            "accept src { }",
            "1:14: the list is empty, expected at least one element",
        ),
        (
            "accept src { ::1",
            "1:14: the line ends too early, expected \"}\" at the end of the list",
        ),
        (
            "accept src any port 65536",
            "1:21: \"65536\" is not a valid number, expected 0 to 65535",
        ),
        (
            "accept src any port 9-5",
            "1:21: the range 9-5 ends before it begins",
        ),
        (
            "accept port 80",
            "1:8: unexpected port: port belongs behind the address of src or dst: src any port 80",
        ),
        (
            "accept scr any",
            "1:8: unknown clause \"scr\", did you mean src?",
        ),
        (
            "accept ! src any",
            "1:10: found \"src\", expected inet or inet6; in other clauses, ! stands before the value",
        ),
        (
            "accept inet inet6",
            "1:13: inet and inet6 are given together, or twice; expected one of them",
        ),
        (
            "accept proto tpc",
            "1:14: \"tpc\" is not a known protocol, did you mean tcp?",
        ),
        (
            "accept proto 256",
            "1:14: \"256\" is not a valid number, expected 0 to 255",
        ),
        (
            "accept tcp_flags equals 256",
            "1:25: \"256\" is not a valid number, expected 0 to 255, or letters of FSRPAUEC",
        ),
        (
            "accept label 0x100000",
            "1:14: \"0x100000\" is not a valid number, expected 0 to 1048575",
        ),
        (
            "accept bytes 5",
            "1:14: found \"5\", expected a comparison (<, <=, =, >=, >)",
        ),
        (
            "accept experiment atlsa",
            "1:19: \"atlsa\" is not a known experiment, did you mean \"atlas\"?",
        ),
        (
            "accept experiment 512",
            "1:19: \"512\" is not a valid number, expected 0 to 511",
        ),
        (
            "accept activity data_challeng experiment alice",
            "1:17: \"data_challeng\" is not a known activity of the experiment, did you mean \"Data Challenge\"?",
        ),
        (
            "accept days today",
            "1:13: found \"today\", expected days (mon, tuesday, mon-fri, weekdays, weekends, all), separated by commas",
        ),
        (
            "accept after 25:00",
            "1:14: found \"25:00\", expected a time of day, HH:MM[:SS], or date YYYY[MM[DD[HH[MM[SS]]]]]",
        ),
        (
            "accept after date 20261301",
            "1:19: \"20261301\" is not a valid date, expected YYYY[MM[DD[HH[MM[SS]]]]]",
        ),
        (
            "a =\naccept all",
            "1:1: macro a has no value, expected text, in quotes",
        ),
    ] {
        assert_eq!(error(text), expected, "{text}");
    }
    let clauses = Where::parse("src any\ndst any", &Registry::builtin(), TimeZone::UTC);
    assert_eq!(
        clauses.unwrap_err().to_string(),
        "line 2, column 1: unexpected second line, expected clauses in one line"
    );
}

#[test]
fn a_name_that_a_later_registry_does_not_have_is_an_error_and_no_panic() {
    let rule = parse_rules(
        "accept experiment atlas",
        &mut Macros::default(),
        &Registry::builtin(),
    );
    let mut rule = rule.unwrap().rules;
    let names = vec![Name::Name("Dissolved".to_owned())];
    rule[0].clauses.experiment = Some(Test {
        negated: false,
        value: names,
    });
    let error = Filter::compile(&rule, &Registry::builtin(), TimeZone::UTC).unwrap_err();
    assert_eq!(
        error.to_string(),
        "rule 1: \"Dissolved\" is not a known experiment, expected an id, or a name that `flowd-rs registry` lists"
    );
}

// The model: rules are evaluated as they are written, without regard to time.

fn model_evaluate(rules: &[Rule], record: &FlowRecord, time_zone: &TimeZone) -> Verdict {
    let mut verdict = Verdict {
        accept: true,
        tag: None,
        rule: None,
    };
    for (index, rule) in rules.iter().enumerate() {
        if model_matches(&rule.clauses, record, time_zone) {
            verdict = Verdict {
                accept: rule.accept,
                tag: rule.tag,
                rule: Some(index as u16),
            };
            if rule.quick {
                break;
            }
        }
    }
    verdict
}

fn model_matches(clauses: &Clauses, record: &FlowRecord, time_zone: &TimeZone) -> bool {
    fn test<T>(test: &Option<Test<T>>, holds: impl Fn(&T) -> bool) -> bool {
        test.as_ref()
            .is_none_or(|test| holds(&test.value) ^ test.negated)
    }
    let address = |clause: &Option<Test<Addresses>>, address: Option<IpAddr>| {
        test(clause, |addresses| match addresses {
            Addresses::Any => true,
            Addresses::In(prefixes) => {
                address.is_some_and(|a| prefixes.iter().any(|prefix| prefix.contains(&a)))
            }
        })
    };
    let number = |clause: &Option<Test<Ranges>>, number: u32| {
        test(clause, |ranges| {
            ranges
                .iter()
                .any(|(first, last)| *first <= number && number <= *last)
        })
    };
    let masked =
        |masked: &Masked, number: u32| number & masked.mask.unwrap_or(u32::MAX) == masked.value;
    let compare = |comparisons: &[Comparison], count: u64| {
        comparisons.iter().all(|Comparison { operator, value }| {
            let order = count.cmp(value);
            match operator {
                Operator::Less => order.is_lt(),
                Operator::AtMost => order.is_le(),
                Operator::Equal => order.is_eq(),
                Operator::AtLeast => order.is_ge(),
                Operator::Greater => order.is_gt(),
            }
        })
    };
    let registry = Registry::builtin();
    let tag = match record.attribution {
        Some(attribution) => Some(scitag::from_scitag(attribution.scitag as u16)),
        None => record.flow_label.map(scitag::from_label).filter(|tag| {
            let experiment = registry.experiment(tag.experiment);
            experiment.is_some_and(|e| e.activities.iter().any(|a| a.id == tag.activity))
        }),
    };
    let experiment = |name: &Name| match (name, tag) {
        (_, None) => false,
        (Name::Id(id), Some(tag)) => tag.experiment == *id,
        (Name::Name(name), Some(tag)) => registry.experiment_id(name) == Some(tag.experiment),
    };
    let activity = |name: &Name| match (name, tag) {
        (_, None) => false,
        (Name::Id(id), Some(tag)) => tag.activity == *id,
        (Name::Name(name), Some(tag)) => {
            registry.activity_id(tag.experiment, name) == Some(tag.activity)
        }
    };
    let time = jiff::Timestamp::from_second(record.received_s.into()).unwrap();
    let local = time.to_zoned(time_zone.clone()).datetime();
    let second = {
        let time = local.time();
        u32::from(time.hour() as u8) * 3600
            + u32::from(time.minute() as u8) * 60
            + u32::from(time.second() as u8)
    };
    let (after, before) = (clauses.after.unwrap_or(0), clauses.before.unwrap_or(86_400));
    let in_day = match after <= before {
        true => after <= second && second < before,
        false => after <= second || second < before,
    };
    let instant = |date: DateTime| time_zone.to_ambiguous_timestamp(date).compatible().unwrap();
    address(&clauses.agent, Some(record.exporter.to_canonical()))
        && number(&clauses.input, record.input)
        && number(&clauses.output, record.output)
        && test(&clauses.family, |family| {
            super::rule::family(record.source.or(record.destination)) == Some(*family)
        })
        && address(&clauses.source.address, record.source)
        && number(&clauses.source.port, record.source_port.into())
        && address(&clauses.destination.address, record.destination)
        && number(&clauses.destination.port, record.destination_port.into())
        && number(&clauses.protocol, record.protocol.into())
        && number(&clauses.tos, record.tos.into())
        && test(&clauses.tcp_flags, |flags| {
            masked(flags, record.tcp_flags.into())
        })
        && test(&clauses.label, |label| match (label, record.flow_label) {
            (_, None) => false,
            (None, Some(label)) => label != 0,
            (Some(test), Some(label)) => masked(test, label),
        })
        && test(&clauses.experiment, |names| names.iter().any(experiment))
        && test(&clauses.activity, |names| names.iter().any(activity))
        && compare(&clauses.bytes, record.octets)
        && compare(&clauses.packets, record.packets)
        && clauses
            .days
            .is_none_or(|days| days >> local.date().weekday().to_sunday_zero_offset() & 1 != 0)
        && in_day
        && clauses.after_date.is_none_or(|date| time >= instant(date))
        && clauses.before_date.is_none_or(|date| time < instant(date))
}

fn negatable<T: std::fmt::Debug>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Option<Test<T>>> {
    proptest::option::weighted(0.3, (any::<bool>(), value))
        .prop_map(|test| test.map(|(negated, value)| Test { negated, value }))
}

/// Few addresses, so that they often match.
fn an_address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0..4_u32).prop_map(|n| IpAddr::V4(Ipv4Addr::from(0xc000_0200 | n))),
        (0..4_u128).prop_map(|n| IpAddr::V6(Ipv6Addr::from(0x2001_0db8_u128 << 96 | n))),
    ]
}

fn some_addresses() -> impl Strategy<Value = Addresses> {
    let prefix = (an_address(), 0..=32_u8).prop_map(|(address, shorter)| {
        let length = if address.is_ipv4() { 32 } else { 128 } - shorter;
        IpNet::new(address, length).unwrap().trunc()
    });
    prop_oneof![
        1 => Just(Addresses::Any),
        4 => proptest::collection::vec(prefix, 1..4).prop_map(Addresses::In),
    ]
}

fn some_ranges(max: u32) -> impl Strategy<Value = Ranges> {
    let range = (0..=max, 0..=max).prop_map(|(a, b)| (a.min(b), a.max(b)));
    proptest::collection::vec(range, 1..4)
}

fn an_end() -> impl Strategy<Value = End> {
    let any = Test {
        negated: false,
        value: Addresses::Any,
    };
    (negatable(some_addresses()), negatable(some_ranges(9))).prop_map(move |(address, port)| End {
        // As the parser reads it.
        address: address.or_else(|| port.is_some().then(|| any.clone())),
        port,
    })
}

fn some_masked(max: u32) -> impl Strategy<Value = Masked> {
    (proptest::option::of(0..=max), 0..=max).prop_map(|(mask, value)| Masked { mask, value })
}

fn some_comparisons() -> impl Strategy<Value = Vec<Comparison>> {
    let operator = proptest::sample::select(Operator::ALL.to_vec());
    let comparison = (operator, 0..5_u64);
    let comparison = comparison.prop_map(|(operator, value)| Comparison { operator, value });
    proptest::collection::vec(comparison, 0..2)
}

fn some_names(
    ids: std::ops::Range<u16>,
    names: &'static [&'static str],
) -> impl Strategy<Value = Vec<Name>> {
    let name = prop_oneof![
        ids.prop_map(Name::Id),
        proptest::sample::select(names).prop_map(|name| Name::Name(name.to_owned())),
    ];
    proptest::collection::vec(name, 1..3)
}

fn a_date() -> impl Strategy<Value = DateTime> {
    (1..=12_i8, 1..=28_i8, 0..24_i8, 0..60_i8).prop_map(|(month, day, hour, minute)| {
        DateTime::new(2026, month, day, hour, minute, 9, 0).unwrap()
    })
}

prop_compose! {
    fn some_clauses()(
        agent in negatable(some_addresses()),
        input in negatable(some_ranges(u32::MAX)),
        output in negatable(some_ranges(9)),
        family in negatable(proptest::sample::select(vec![Family::Inet, Family::Inet6])),
        source in an_end(),
        destination in an_end(),
        protocol in negatable(some_ranges(255)),
        tos in negatable(some_ranges(255)),
        tcp_flags in negatable(some_masked(3)),
        label in negatable(proptest::option::of(some_masked(0xf_ffff))),
        (experiment, activity) in (
            negatable(some_names(0..4, &["atlas", "CMS", "belleii"])),
            negatable(some_names(0..4, &["Data Challenge", "default"])),
        ),
    )(
        (bytes, packets) in (some_comparisons(), some_comparisons()),
        days in proptest::option::weighted(0.2, 1..=0x7f_u8),
        after in proptest::option::weighted(0.2, 0..=86_400_u32),
        before in proptest::option::weighted(0.2, 0..=86_400_u32),
        after_date in proptest::option::weighted(0.2, a_date()),
        before_date in proptest::option::weighted(0.2, a_date()),
        agent in Just(agent), input in Just(input), output in Just(output), family in Just(family),
        source in Just(source), destination in Just(destination), protocol in Just(protocol),
        (tos, tcp_flags, label, experiment, activity) in
            Just((tos, tcp_flags, label, experiment, activity)),
    ) -> Clauses {
        Clauses {
            agent, input, output, family, source, destination, protocol, tos, tcp_flags, label,
            experiment, activity, bytes, packets, days, after, before, after_date, before_date,
        }
    }
}

fn a_rule() -> impl Strategy<Value = Rule> {
    let clauses = prop_oneof![1 => Just(Clauses::default()), 6 => some_clauses()];
    (any::<bool>(), any::<Option<u32>>(), any::<bool>(), clauses).prop_map(
        |(accept, tag, quick, clauses)| Rule {
            accept,
            tag,
            quick,
            clauses,
        },
    )
}

prop_compose! {
    fn a_record()(
        (source, destination) in
            (proptest::option::of(an_address()), proptest::option::of(an_address())),
        exporter in an_address(),
        (source_port, destination_port) in (0..9_u16, 0..9_u16),
        (protocol, tos, tcp_flags) in (any::<u8>(), any::<u8>(), 0..4_u8),
        (packets, octets) in (0..5_u64, 0..5_u64),
        (input, output) in (any::<u32>(), 0..9_u32),
        received_s in 1_767_225_600..1_798_761_600_u32,
        tag in proptest::option::of((0..5_u16, 0..5_u16)),
        is_attributed in any::<bool>(),
        entropy in any::<u32>(),
    ) -> FlowRecord {
        let tag = tag.map(|(experiment, activity)| Tag { experiment, activity });
        FlowRecord {
            received_s, source, destination, exporter, source_port, destination_port, protocol, tos,
            tcp_flags, packets, octets, input, output,
            flow_label: tag.map(|tag| scitag::label(tag) | entropy & scitag::ENTROPY),
            attribution: tag.filter(|_| is_attributed).map(|tag| Attribution {
                scitag: scitag::scitag(tag),
                origin: Origin::Site,
            }),
            ..FlowRecord::default()
        }
    }
}

fn tokens() -> impl Strategy<Value = String> {
    let words = vec![
        "accept",
        "discard",
        "tag",
        "quick",
        "all",
        "any",
        "!",
        "{",
        "}",
        ",",
        "=",
        ">",
        "<",
        "src",
        "dst",
        "port",
        "agent",
        "proto",
        "tcp",
        "in_ifndx",
        "tos",
        "tcp_flags",
        "mask",
        "equals",
        "label",
        "experiment",
        "activity",
        "atlas",
        "bytes",
        "packets",
        "days",
        "mon-fri",
        "after",
        "before",
        "date",
        "8:00",
        "2026",
        "inet",
        "1",
        "5-9",
        "0x1f",
        "::/0",
        "10.0.0.0",
        "/",
        "/8",
        "\"",
        "'",
        "\\",
        "\n",
        "#",
        "$a",
        "a =",
        "$",
        "é",
        "\r",
        "\0",
    ];
    let parts = proptest::collection::vec(proptest::sample::select(words), 0..30);
    parts.prop_map(|parts| parts.join(" "))
}

proptest! {
    #[test]
    fn a_rule_that_is_printed_and_parsed_again_is_the_same(rule in a_rule()) {
        let text = rule.to_string();
        let parsed = parse_rules(&text, &mut Macros::default(), &Registry::builtin());
        // An activity may be unknown to the experiments of the rule.
        match parsed {
            Ok(parsed) => prop_assert_eq!(parsed.rules, [rule], "{}", text),
            Err(error) => prop_assert!(error.message.contains("not a known activity"), "{text}: {error}"),
        }
    }

    #[test]
    fn compiled_rules_decide_as_the_model_does(
        rules in proptest::collection::vec(a_rule(), 0..6),
        records in proptest::collection::vec(a_record(), 1..20),
    ) {
        let registry = Registry::builtin();
        if let Ok(filter) = Filter::compile(&rules, &registry, berlin()) {
            let mut counts = Counts::new(&filter);
            for record in &records {
                let expected = model_evaluate(&rules, record, &berlin());
                prop_assert_eq!(filter.evaluate(record, &mut counts), expected);
            }
            let wins: u64 = counts.rules(&filter).iter().map(|rule| rule.wins).sum();
            prop_assert_eq!(wins + counts.unmatched(), records.len() as u64);
        }
    }

    #[test]
    fn no_text_causes_a_panic(text in ".{0,200}", more in tokens()) {
        for text in [text, more] {
            let _ = parse_rules(&text, &mut Macros::default(), &Registry::builtin());
            let _ = Where::parse(&text, &Registry::builtin(), TimeZone::UTC);
        }
    }
}
