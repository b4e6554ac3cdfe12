//! The firefly codec: converts flow events to JSON behind an RFC 5424 header, and back. No I/O, no clock.
//!
//! Encoding follows the published schema, version 1. Decoding accepts what real producers send: any header or none,
//! trailing bytes, missing times, unknown keys, unescaped quotes in the application.

mod decode;
mod encode;
pub mod netlink_object;

pub use decode::{DecodeError, Rejection, decode, object, syslog_hostname};
pub use encode::{Encoder, MAX_DATAGRAM_SIZE};

/// The port that fireflies are sent to.
pub const PORT: u16 = 10514;

/// The longest application name that is sent, in bytes: with it, a datagram stays within [`MAX_DATAGRAM_SIZE`] for any
/// producer.
const MAX_APPLICATION_SIZE: usize = 128;

fn truncate_application(application: &str) -> &str {
    match application
        .char_indices()
        .find(|(at, c)| at + c.len_utf8() > MAX_APPLICATION_SIZE)
    {
        Some((at, _)) => &application[..at],
        None => application,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use jiff::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::event::{FlowEvent, Member, Origin, State};
    use crate::flow::{Flow, Protocol, Tag, Usage};

    const NOW: &str = "2026-01-02T03:04:05.000006Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn event(state: State) -> FlowEvent {
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        let flow = Flow::new(
            Protocol::Tcp,
            (ip("2001:db8::a"), 40001),
            (ip("2001:db8::b"), 443),
        );
        FlowEvent {
            tag: Some(Tag {
                experiment: 2,
                activity: 16,
            }),
            start_time: Some("2026-01-02T03:00:00.5Z".parse().unwrap()),
            ..FlowEvent::new(state, flow.unwrap(), now(), Origin::Firefly)
        }
    }

    fn encode(event: &FlowEvent) -> String {
        let mut out = String::new();
        Encoder::new("host.example", "flowd-rs 0.0.0", true).encode(event, now(), &mut out);
        out
    }

    #[test]
    fn the_whole_datagram_of_an_end() {
        let mut event = event(State::End);
        event.usage = Some(Usage {
            received: Some(5),
            sent: Some(7),
        });
        assert_eq!(
            encode(&event),
            concat!(
                "<134>1 2026-01-02T03:04:05.000006+00:00 host.example flowd-rs - firefly-json - ",
                r#"{"version":1,"flow-lifecycle":{"state":"end","current-time":"2026-01-02T03:04:05.000006+00:00","#,
                r#""start-time":"2026-01-02T03:00:00.500000+00:00","end-time":"2026-01-02T03:04:05.000006+00:00"},"#,
                r#""flow-id":{"afi":"ipv6","src-ip":"2001:db8::a","dst-ip":"2001:db8::b","protocol":"tcp","#,
                r#""src-port":40001,"dst-port":443},"usage":{"received":5,"sent":7},"#,
                r#""context":{"experiment-id":2,"activity-id":16,"application":"flowd-rs 0.0.0"}}"#
            )
        );
    }

    #[test]
    fn headers_of_every_kind_and_none() {
        let json = encode(&event(State::Start));
        let json = &json[json.find('{').unwrap()..];
        for (header, host) in [
            ("", None),
            (
                "<134>1 - red.example xrootd - firefly-json - ",
                Some("red.example"),
            ),
            (
                "<134>1  red.example flowd-go - firefly-json - ",
                Some("red.example"),
            ),
            (
                "Feb  1 18:54:27 red 1 2022-02-01T18:54:26.1+00:00 red.example flowd - firefly-json - ",
                Some("red.example"),
            ),
        ] {
            for tail in ["", "\0", "\n", "  \r\n\0"] {
                let datagram = format!("{header}{json}{tail}");
                let decoded = decode(datagram.as_bytes(), now()).unwrap();
                assert_eq!(decoded.flow, event(State::Start).flow);
                assert_eq!(syslog_hostname(datagram.as_bytes()), host, "{header:?}");
            }
        }
    }

    fn decode_with(lifecycle: &str, rest: &str) -> Result<FlowEvent, DecodeError> {
        let json = format!(
            r#"{{"version":1,"flow-lifecycle":{{{lifecycle}}},"flow-id":{{"afi":"ipv4","src-ip":"192.0.2.1","dst-ip":"192.0.2.2","protocol":"tcp","src-port":1,"dst-port":2}}{rest}}}"#
        );
        decode(json.as_bytes(), now())
    }

    const CONTEXT: &str = r#","context":{"experiment-id":3333,"activity-id":1}"#;

    #[test]
    fn times_as_producers_write_them() {
        for (time, expected) in [
            (r#""2021-09-22T11:12:27Z""#, Some("2021-09-22T11:12:27Z")),
            (
                r#""2021-09-22T11:12:27.123456789Z""#,
                Some("2021-09-22T11:12:27.123456Z"),
            ),
            (
                r#""2021-09-22T13:12:27.5+02:00""#,
                Some("2021-09-22T11:12:27.5Z"),
            ),
            ("null", None),
            (r#""0001-01-01T00:00:00Z""#, None),
        ] {
            let event =
                decode_with(&format!(r#""state":"end","start-time":{time}"#), CONTEXT).unwrap();
            assert_eq!(event.start_time, expected.map(|t| t.parse().unwrap()));
            assert_eq!(event.time, now());
        }
        let wrong = decode_with(r#""state":"end","start-time":"yesterday""#, CONTEXT);
        assert_eq!(wrong.unwrap_err().reason, Rejection::Time);
    }

    #[test]
    fn an_application_with_unescaped_quotes() {
        for rest in [
            r#","context":{"experiment-id":2,"activity-id":1,"application":"my "fast" copy"}"#,
            r#","context":{"application": "my "fast" copy", "experiment-id":2,"activity-id":1}"#,
        ] {
            let event = decode_with(r#""state":"start""#, rest).unwrap();
            assert_eq!(event.application.as_deref(), Some("my \"fast\" copy"));
        }
    }

    #[test]
    fn invalid_fireflies_are_rejected_by_reason() {
        let reason = |lifecycle: &str, rest: &str| decode_with(lifecycle, rest).unwrap_err().reason;
        assert_eq!(reason(r#""state":5"#, CONTEXT), Rejection::State);
        assert_eq!(reason("", CONTEXT), Rejection::State);
        assert_eq!(reason(r#""state":"start""#, ""), Rejection::Tag);
        let good = encode(&event(State::Start));
        for (from, to, expected) in [
            ("\"version\":1", "\"version\":2", Rejection::Version),
            ("tcp", "sctp", Rejection::Protocol),
            ("2001:db8::a", "nowhere", Rejection::Address),
            ("2001:db8::a", "::", Rejection::Address),
            ("2001:db8::a", "192.0.2.1", Rejection::Family),
            ("40001", "-1", Rejection::Port),
            ("40001", "65536", Rejection::Port),
            ("40001", "\"443\"", Rejection::Port),
            ("\"start\"", "\"started\"", Rejection::State),
            ("2026-01-02T03:00", "yesterday", Rejection::Time),
            ("2026-01-02T03:04", "2026-13-02T03:04", Rejection::Time),
            (":16,", ":-1,", Rejection::Tag),
            ("{", "(", Rejection::Json),
        ] {
            let error = decode(good.replace(from, to).as_bytes(), now()).unwrap_err();
            assert_eq!(error.reason, expected, "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn a_datagram_truncated_at_any_byte_is_rejected() {
        let datagram = encode(&event(State::End));
        for cut in 0..datagram.len() {
            let decoded = decode(&datagram.as_bytes()[..cut], now());
            assert_eq!(decoded.unwrap_err().reason, Rejection::Json);
        }
    }

    #[test]
    fn the_largest_datagram_fits_in_a_packet() {
        let mut event = event(State::End);
        let wide = Flow::new(
            Protocol::Tcp,
            (
                "2001:1db8:1111:2222:3333:4444:5555:6666".parse().unwrap(),
                65535,
            ),
            (
                "2001:1db8:1111:2222:3333:4444:5555:7777".parse().unwrap(),
                65535,
            ),
        );
        event.flow = wide.unwrap();
        event.application = Some("\u{1}".repeat(1000).into());
        event.usage = Some(Usage {
            received: Some(u64::MAX),
            sent: Some(u64::MAX),
        });
        event.tag = Some(Tag {
            experiment: u16::MAX,
            activity: u16::MAX,
        });
        let header = "h".repeat(64);
        let mut out = String::new();
        Encoder::new(&header, "", true).encode(&event, now(), &mut out);
        assert!(out.len() <= MAX_DATAGRAM_SIZE, "{}", out.len());
    }

    #[test]
    fn a_relayed_firefly_keeps_what_it_carried() {
        let json = r#"{"version":1,"flow-lifecycle":{"state":"ongoing","start-time":"2026-01-02T03:00:00.500000+00:00","current-time":"2026-01-02T03:01:00.000000+00:00"},"flow-id":{"afi":"ipv4","src-ip":"192.0.2.1","dst-ip":"192.0.2.2","protocol":"tcp","src-port":0,"dst-port":2},"usage":{},"netlink":{"rtt": 0.25,"x":[1, {"y":null}]},"context":{"experiment-id":1023,"activity-id":1,"application":"xrootd \"5\""},"storage-stats":{"a":1,"b":"\u00e9"},"skOps":{},"new \"key\"":[true]}"#;
        let event = decode(json.as_bytes(), now()).unwrap();
        let relayed = encode(&event);
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&relayed[relayed.find('{').unwrap()..]), value(json));
        assert!(relayed.contains(r#","netlink":{"rtt": 0.25,"x":[1, {"y":null}]},"#));
    }

    #[test]
    fn members_that_do_not_fit_are_left_out_unknown_ones_first() {
        let member = |key: &str, length: usize| Member {
            key: key.into(),
            json: format!("{{\"x\":\"{}\"}}", "x".repeat(length)).into(),
        };
        let kept = |members: &[Member]| {
            let mut event = event(State::End);
            event.members = members.to_vec();
            let mut out = String::new();
            let left_out = Encoder::new("host", "", true).encode(&event, now(), &mut out);
            assert!(out.len() <= MAX_DATAGRAM_SIZE, "{}", out.len());
            let decoded = decode(out.as_bytes(), now()).unwrap();
            assert_eq!(decoded.members.len() + left_out, members.len());
            decoded
                .members
                .iter()
                .map(|m| m.key.to_string())
                .collect::<Vec<_>>()
        };
        let all =
            |length| ["b", "a", "skOps", "storage-stats", "netlink"].map(|k| member(k, length));
        assert_eq!(
            kept(&all(50)),
            ["netlink", "storage-stats", "skOps", "b", "a"]
        );
        assert_eq!(kept(&all(300)), ["netlink", "storage-stats", "skOps"]);
        assert_eq!(kept(&all(900)), ["netlink"]);
        assert_eq!(kept(&all(2000)), [""; 0]);
        assert_eq!(kept(&[member("netlink", 2000), member("a", 9)]), ["a"]);
    }

    proptest! {
        #[test]
        fn an_encoded_event_decodes_to_the_same(
            state in 0usize..3, udp in any::<bool>(), v6 in any::<bool>(), a in any::<u128>(), b in any::<u128>(),
            ports in (1u16.., 1u16..), tag in (any::<u16>(), any::<u16>()), header in any::<bool>(),
            start in 1i64..4_000_000_000_000_000, lasted in 0i64..1_000_000_000_000,
            application in ".{0,32}", usage in proptest::option::of((any::<Option<u64>>(), any::<Option<u64>>())),
            reported in proptest::option::of(1i64..4_000_000_000_000_000),
            members in proptest::collection::vec(("[a-z]{1,9}\\PC?", ".{0,9}"), 0..5),
        ) {
            let ip = |n: u128| match v6 {
                true => IpAddr::from((n | 1 << 127).to_be_bytes()),
                false => IpAddr::from((n as u32 | 1).to_be_bytes()),
            };
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let state = [State::Start, State::Ongoing, State::End][state];
            let start_time = Timestamp::from_microsecond(start).unwrap();
            let later = Timestamp::from_microsecond(start + lasted).unwrap();
            let time = match state {
                State::Start => start_time,
                State::Ongoing => reported.map_or(later, |at| Timestamp::from_microsecond(at).unwrap()),
                State::End => later,
            };
            let flow = Flow::new(protocol, (ip(a), ports.0), (ip(b), ports.1)).unwrap();
            let mut event = FlowEvent {
                tag: Some(Tag { experiment: tag.0, activity: tag.1 }),
                start_time: Some(start_time),
                reported: reported.map(|at| Timestamp::from_microsecond(at).unwrap()),
                application: Some(application.as_str().into()),
                usage: usage.map(|(received, sent)| Usage { received, sent }),
                members: members.iter().filter(|(key, _)| key != "usage" && key != "context").map(|(key, text)| Member {
                    key: key.as_str().into(),
                    json: serde_json::to_string(text).unwrap().into(),
                }).collect(),
                ..FlowEvent::new(state, flow, time, Origin::Firefly)
            };
            let mut out = String::new();
            Encoder::new("host", "none", header).encode(&event, later, &mut out);
            // An event that is not relayed is reported when it is sent.
            event.reported.get_or_insert(later);
            prop_assert_eq!(decode(out.as_bytes(), now()).unwrap(), event);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes, now());
            let _ = syslog_hostname(&bytes);
        }

        #[test]
        fn a_corrupted_firefly_causes_neither_a_panic_nor_an_impossible_flow(
            changes in proptest::collection::vec((0usize..480, any::<u8>()), 1..4)
        ) {
            let mut datagram = encode(&event(State::End)).into_bytes();
            for (at, byte) in changes {
                let length = datagram.len();
                datagram[at % length] = byte;
            }
            if let Ok(event) = decode(&datagram, now()) {
                let (source, destination) = (event.flow.source, event.flow.destination);
                prop_assert!(source.port > 0 && destination.port > 0);
                prop_assert_eq!(source.address.is_ipv4(), destination.address.is_ipv4());
            }
        }
    }
}
