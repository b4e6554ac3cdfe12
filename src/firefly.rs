//! The firefly codec: a flow event as JSON behind an RFC 5424 header, and back. No I/O, no clock.
//!
//! Encoding obeys the published schema, version 1. Decoding takes what real producers send: any header
//! or none, trailing bytes, missing times, keys that it does not know, unescaped quotes in the
//! application.

use std::fmt::Write as _;
use std::net::IpAddr;

use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use jiff::tz::Offset;
use serde::Deserialize;
use serde_json::Value;

use crate::flow::{Flow, FlowError, FlowEvent, Origin, Protocol, State, Tag, Usage};
use crate::metrics::outcomes;

/// The port that fireflies are sent to.
pub const PORT: u16 = 10514;

/// Facility local0, severity info.
const PRIORITY: &str = "<134>1 ";
/// The longest application that is sent, in bytes: it keeps a datagram under 1452 bytes whatever a
/// producer calls itself.
const APPLICATION_MAX: usize = 128;

/// Writes fireflies; keeps the times it last wrote, which often recur within a batch.
pub struct Encoder {
    /// What follows the time in the syslog header, if there is to be one.
    header: Option<String>,
    /// As JSON.
    application: String,
    current: PrintedTime,
    start: PrintedTime,
    end: PrintedTime,
}

impl Encoder {
    /// `hostname` goes into the syslog header, if there is one; `application` into events without one.
    pub fn new(hostname: &str, application: &str, syslog_header: bool) -> Encoder {
        let printable = |c: &char| c.is_ascii_graphic();
        let hostname: String = hostname.chars().filter(printable).take(255).collect();
        let hostname = if hostname.is_empty() {
            "localhost"
        } else {
            &hostname
        };
        Encoder {
            header: syslog_header.then(|| format!(" {hostname} flowd-rs - firefly-json - ")),
            application: escaped(application),
            current: PrintedTime::default(),
            start: PrintedTime::default(),
            end: PrintedTime::default(),
        }
    }

    /// Appends the firefly of `event`, sent at `now`, to `out`.
    ///
    /// The JSON is written piece by piece, at half the cost of a serializer: only the application can
    /// hold anything that needs escaping.
    pub fn encode(&mut self, event: &FlowEvent, now: Timestamp, out: &mut String) {
        let (flow, tag) = (&event.flow, event.tag());
        let current = self.current.print(now);
        let mut put = |text: &str| out.push_str(text);
        if let Some(header) = &self.header {
            put(PRIORITY);
            put(current);
            put(header);
        }
        put("{\"version\":1,\"flow-lifecycle\":{\"state\":\"");
        put(event.state.as_str());
        put("\",\"current-time\":\"");
        put(current);
        put("\",\"start-time\":\"");
        put(self.start.print(event.start_time()));
        if event.state == State::End {
            put("\",\"end-time\":\"");
            put(self.end.print(event.time));
        }
        put("\"},\"flow-id\":{\"afi\":\"");
        put(if flow.source.address.is_ipv4() {
            "ipv4"
        } else {
            "ipv6"
        });
        // Writing to a String cannot fail, here and below.
        let _ = write!(out, "\",\"src-ip\":\"{}", flow.source.address);
        let _ = write!(out, "\",\"dst-ip\":\"{}", flow.destination.address);
        let mut number = itoa::Buffer::new();
        let mut put = |text: &str, n: u64| {
            out.push_str(text);
            out.push_str(number.format(n));
        };
        let protocol = match flow.protocol {
            Protocol::Tcp => "\",\"protocol\":\"tcp\",\"src-port\":",
            Protocol::Udp => "\",\"protocol\":\"udp\",\"src-port\":",
        };
        put(protocol, flow.source.port.into());
        put(",\"dst-port\":", flow.destination.port.into());
        if let Some(usage) = event.usage {
            put("},\"usage\":{\"received\":", usage.received);
            put(",\"sent\":", usage.sent);
        }
        put("},\"context\":{\"experiment-id\":", tag.experiment.into());
        put(",\"activity-id\":", tag.activity.into());
        out.push_str(",\"application\":");
        match event.application.as_deref() {
            None => out.push_str(&self.application),
            Some(application) => out.push_str(&escaped(application)),
        }
        out.push_str("}}");
    }
}

/// A time as a firefly has it, `2021-09-22T11:12:27.808092+00:00`.
#[derive(Default)]
struct PrintedTime {
    time: Timestamp,
    text: String,
}

impl PrintedTime {
    fn print(&mut self, time: Timestamp) -> &str {
        const PRINTER: DateTimePrinter = DateTimePrinter::new().precision(Some(6));
        if time != self.time || self.text.is_empty() {
            self.time = time;
            self.text.clear();
            PRINTER
                .print_timestamp_with_offset(&time, Offset::UTC, &mut self.text)
                .expect("a String takes any time");
        }
        &self.text
    }
}

/// As a JSON string, cut.
fn escaped(application: &str) -> String {
    serde_json::to_string(cut(application)).expect("a string serializes")
}

fn cut(application: &str) -> &str {
    match application
        .char_indices()
        .find(|(at, c)| at + c.len_utf8() > APPLICATION_MAX)
    {
        Some((at, _)) => &application[..at],
        None => application,
    }
}

outcomes! {
    /// Why a datagram is no firefly.
    pub enum Rejection {
        /// No JSON object in it, or one that does not parse.
        Json = "json",
        /// Not version 1.
        Version = "version",
        /// Not start, ongoing or end.
        State = "state",
        /// A time that does not follow RFC 3339.
        Time = "time",
        /// Neither tcp nor udp.
        Protocol = "protocol",
        /// No address, or one that is no flow's end.
        Address = "address",
        /// No port of 1 to 65535.
        Port = "port",
        /// One end is IPv4, the other IPv6.
        Family = "family",
        /// No experiment or activity id of 0 to 65535.
        Tag = "tag",
    }
}

/// Why a datagram was rejected; its `Display` says what was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct DecodeError {
    /// The reason, for the counters.
    pub reason: Rejection,
    detail: String,
}

impl DecodeError {
    fn new(reason: Rejection, detail: impl Into<String>) -> DecodeError {
        DecodeError {
            reason,
            detail: detail.into(),
        }
    }
}

#[derive(Deserialize)]
struct Received {
    #[serde(default)]
    version: Value,
    #[serde(default, rename = "flow-lifecycle")]
    lifecycle: Value,
    #[serde(default, rename = "flow-id")]
    flow_id: Value,
    #[serde(default)]
    usage: Value,
    #[serde(default)]
    context: Value,
}

#[derive(Deserialize)]
struct UsageObject {
    received: u64,
    sent: u64,
}

/// Reads a datagram that was received at `now`.
pub fn decode(datagram: &[u8], now: Timestamp) -> Result<FlowEvent, DecodeError> {
    let received = parse(datagram)?;
    if received.version != 1 {
        let detail = format!("version is {}, expected 1", received.version);
        return Err(DecodeError::new(Rejection::Version, detail));
    }
    let state = received.lifecycle["state"]
        .as_str()
        .and_then(State::from_word);
    let state = state.ok_or_else(|| {
        let detail = format!(
            "flow-lifecycle.state is {}, expected start, ongoing or end",
            received.lifecycle["state"]
        );
        DecodeError::new(Rejection::State, detail)
    })?;
    let start_time = time(&received.lifecycle, "start-time")?;
    let happened = match state {
        State::Start => start_time,
        State::Ongoing => time(&received.lifecycle, "current-time")?,
        State::End => time(&received.lifecycle, "end-time")?,
    };
    let context = &received.context;
    Ok(FlowEvent {
        state,
        flow: flow(&received.flow_id)?,
        tag: Some(Tag {
            experiment: id(context, "experiment-id")?,
            activity: id(context, "activity-id")?,
        }),
        time: happened.unwrap_or(now),
        start_time,
        application: context["application"].as_str().map(|a| cut(a).into()),
        usage: UsageObject::deserialize(&received.usage)
            .ok()
            .map(|u| Usage {
                received: u.received,
                sent: u.sent,
            }),
        origin: Origin::Firefly,
    })
}

/// The host that a syslog header names: the word before `flowd`'s place in RFC 5424.
pub fn sender(datagram: &[u8]) -> Option<&str> {
    let json = memchr::memchr(b'{', datagram)?;
    let header = std::str::from_utf8(&datagram[..json]).ok()?;
    // VERSION TIMESTAMP HOSTNAME APP-NAME PROCID MSGID SD; an empty time leaves two spaces.
    let mut words = header.trim_end().rsplit(' ');
    let host = words.nth(4)?;
    (!host.is_empty() && host != "-").then_some(host)
}

fn parse(datagram: &[u8]) -> Result<Received, DecodeError> {
    let error = |detail: String| DecodeError::new(Rejection::Json, detail);
    let begin = memchr::memchr(b'{', datagram)
        .ok_or_else(|| error("no JSON object in it, expected a firefly".to_owned()))?;
    let json = &datagram[begin..];
    read_json(json).or_else(|e| {
        escape_application(json)
            .and_then(|repaired| read_json(&repaired).ok())
            .ok_or_else(|| error(format!("the JSON does not parse: {e}")))
    })
}

/// The first JSON value; what follows it (a NUL, a newline) is ignored.
fn read_json(json: &[u8]) -> serde_json::Result<Received> {
    Received::deserialize(&mut serde_json::Deserializer::from_slice(json))
}

/// XRootD puts the user's application into the JSON as it is: escapes the quotes in it.
fn escape_application(json: &[u8]) -> Option<Vec<u8>> {
    let key = memchr::memmem::find(json, b"\"application\"")? + b"\"application\"".len();
    let begin = key + memchr::memchr(b'"', &json[key..])? + 1;
    let closes = |&at: &usize| {
        let rest = json[at + 1..].trim_ascii_start();
        match rest.first() {
            Some(b'}') => true,
            Some(b',') => rest[1..].trim_ascii_start().first() == Some(&b'"'),
            _ => false,
        }
    };
    let end = memchr::memchr_iter(b'"', &json[begin..])
        .map(|at| begin + at)
        .find(closes)?;
    let mut repaired = json[..begin].to_vec();
    for &byte in &json[begin..end] {
        if byte == b'"' && repaired.last() != Some(&b'\\') {
            repaired.push(b'\\');
        }
        repaired.push(byte);
    }
    repaired.extend_from_slice(&json[end..]);
    Some(repaired)
}

/// A time of the lifecycle. Null, absent, or before 1970 (an unset time of Go) is none.
fn time(lifecycle: &Value, key: &str) -> Result<Option<Timestamp>, DecodeError> {
    let value = match &lifecycle[key] {
        Value::Null => return Ok(None),
        value => value,
    };
    let parsed = value
        .as_str()
        .and_then(|text| text.parse::<Timestamp>().ok());
    let parsed = parsed.ok_or_else(|| {
        let detail = format!("flow-lifecycle.{key} is {value}, expected a time of RFC 3339");
        DecodeError::new(Rejection::Time, detail)
    })?;
    let micros = Timestamp::from_microsecond(parsed.as_microsecond()).unwrap_or(parsed);
    Ok((micros > Timestamp::UNIX_EPOCH).then_some(micros))
}

fn flow(flow_id: &Value) -> Result<Flow, DecodeError> {
    let invalid = |reason, key: &str, expected: &str| {
        let detail = format!("flow-id.{key} is {}, expected {expected}", flow_id[key]);
        DecodeError::new(reason, detail)
    };
    let address = |key: &str| {
        let parsed = flow_id[key]
            .as_str()
            .and_then(|text| text.parse::<IpAddr>().ok());
        parsed.ok_or_else(|| invalid(Rejection::Address, key, "an IPv4 or IPv6 address"))
    };
    let port = |key: &str| {
        let port = flow_id[key].as_u64().and_then(|n| u16::try_from(n).ok());
        port.ok_or_else(|| invalid(Rejection::Port, key, "a port of 1 to 65535"))
    };
    let protocol = flow_id["protocol"].as_str().and_then(Protocol::from_word);
    let protocol =
        protocol.ok_or_else(|| invalid(Rejection::Protocol, "protocol", "tcp or udp"))?;
    let source = (address("src-ip")?, port("src-port")?);
    let destination = (address("dst-ip")?, port("dst-port")?);
    Flow::new(protocol, source, destination).map_err(|e| {
        let reason = match e {
            FlowError::MixedFamilies => Rejection::Family,
            FlowError::Unspecified => Rejection::Address,
            FlowError::PortZero => Rejection::Port,
        };
        DecodeError::new(reason, e.to_string())
    })
}

fn id(context: &Value, key: &str) -> Result<u16, DecodeError> {
    let id = context[key].as_u64().and_then(|n| u16::try_from(n).ok());
    id.ok_or_else(|| {
        let detail = format!("context.{key} is {}, expected 0 to 65535", context[key]);
        DecodeError::new(Rejection::Tag, detail)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
            state,
            flow: flow.unwrap(),
            tag: Some(Tag {
                experiment: 2,
                activity: 16,
            }),
            time: now(),
            start_time: Some("2026-01-02T03:00:00.5Z".parse().unwrap()),
            application: None,
            usage: None,
            origin: Origin::Firefly,
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
            received: 5,
            sent: 7,
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
                assert_eq!(sender(datagram.as_bytes()), host, "{header:?}");
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
    fn refusals_by_reason() {
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
            ("40001", "0", Rejection::Port),
            ("40001", "65536", Rejection::Port),
            (":16,", ":-1,", Rejection::Tag),
            ("{", "(", Rejection::Json),
        ] {
            let error = decode(good.replace(from, to).as_bytes(), now()).unwrap_err();
            assert_eq!(error.reason, expected, "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn cut_at_every_byte_it_is_refused() {
        let datagram = encode(&event(State::End));
        for cut in 0..datagram.len() {
            let decoded = decode(&datagram.as_bytes()[..cut], now());
            assert_eq!(decoded.unwrap_err().reason, Rejection::Json);
        }
    }

    #[test]
    fn the_largest_datagram_fits_a_packet() {
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
            received: u64::MAX,
            sent: u64::MAX,
        });
        event.tag = Some(Tag {
            experiment: u16::MAX,
            activity: u16::MAX,
        });
        let header = "h".repeat(64);
        let mut out = String::new();
        Encoder::new(&header, "", true).encode(&event, now(), &mut out);
        assert!(out.len() <= 1452, "{}", out.len());
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(
            state in 0usize..3, udp in any::<bool>(), v6 in any::<bool>(), a in any::<u128>(), b in any::<u128>(),
            ports in (1u16.., 1u16..), tag in (any::<u16>(), any::<u16>()), header in any::<bool>(),
            start in 1i64..4_000_000_000_000_000, lasted in 0i64..1_000_000_000_000,
            application in ".{0,32}", usage in proptest::option::of((any::<u64>(), any::<u64>())),
        ) {
            let ip = |n: u128| match v6 {
                true => IpAddr::from((n | 1 << 127).to_be_bytes()),
                false => IpAddr::from((n as u32 | 1).to_be_bytes()),
            };
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let state = [State::Start, State::Ongoing, State::End][state];
            let start_time = Timestamp::from_microsecond(start).unwrap();
            let later = Timestamp::from_microsecond(start + lasted).unwrap();
            let event = FlowEvent {
                state,
                flow: Flow::new(protocol, (ip(a), ports.0), (ip(b), ports.1)).unwrap(),
                tag: Some(Tag { experiment: tag.0, activity: tag.1 }),
                time: if state == State::Start { start_time } else { later },
                start_time: Some(start_time),
                application: Some(application.as_str().into()),
                usage: usage.map(|(received, sent)| Usage { received, sent }),
                origin: Origin::Firefly,
            };
            let mut out = String::new();
            Encoder::new("host", "none", header).encode(&event, later, &mut out);
            prop_assert_eq!(decode(out.as_bytes(), now()).unwrap(), event);
        }

        #[test]
        fn any_bytes_make_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes, now());
            let _ = sender(&bytes);
        }

        #[test]
        fn a_firefly_with_bytes_changed_makes_no_panic_and_no_impossible_flow(
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
