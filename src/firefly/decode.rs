//! Decodes a datagram of any producer to a flow event.

use std::borrow::Cow;
use std::fmt;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::truncate_application;
use crate::event::{FlowEvent, Member, Origin, State};
use crate::flow::{Flow, FlowError, Protocol, Tag, Usage, parse_address};
use crate::logging::quote;
use crate::metrics::outcomes;

outcomes! {
    /// Why a datagram is not a valid firefly.
    pub enum Rejection {
        /// No JSON object, or an invalid one.
        Json = "rejected_json": "rejected: {datagram|datagrams} without a valid JSON object",
        /// The version is not 1.
        Version = "rejected_version": "rejected: {datagram|datagrams} with an unknown schema version",
        /// The state is not start, ongoing or end.
        State = "rejected_state": "rejected: {datagram|datagrams} with an unknown state",
        /// A time is not in the format of RFC 3339.
        Time = "rejected_time": "rejected: {datagram|datagrams} with an invalid time",
        /// The protocol is neither tcp nor udp.
        Protocol = "rejected_protocol": "rejected: {datagram|datagrams} with an unknown protocol",
        /// Not an address, or one that cannot be the end of a flow.
        Address = "rejected_address": "rejected: {datagram|datagrams} with an invalid address",
        /// Not a port of 0 to 65535.
        Port = "rejected_port": "rejected: {datagram|datagrams} with an invalid port",
        /// One end is IPv4, the other IPv6.
        Family = "rejected_family": "rejected: {datagram|datagrams} with one IPv4 and one IPv6 address",
        /// Not an experiment or activity id of 0 to 65535.
        Tag = "rejected_tag": "rejected: {datagram|datagrams} with an invalid experiment or activity",
    }
}

/// Why a datagram was rejected; its `Display` says what was found and what was expected.
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

/// Decodes a datagram received at `now`.
///
/// Port 0 is accepted: dCache sends it if it does not know the port.
pub fn decode(datagram: &[u8], now: Timestamp) -> Result<FlowEvent, DecodeError> {
    let begin = memchr::memchr(b'{', datagram)
        .ok_or_else(|| DecodeError::new(Rejection::Json, "no JSON object, expected a firefly"))?;
    let json = &datagram[begin..];
    match parse(json) {
        Ok(received) => received.event(now),
        Err(error) => match escape_application(json).as_deref().map(parse) {
            Some(Ok(received)) => received.event(now),
            _ => Err(DecodeError::new(
                Rejection::Json,
                format!("invalid JSON: {error}"),
            )),
        },
    }
}

/// The JSON object of a datagram as received, without the syslog header before it and whatever stands behind it. Quotes in
/// XRootD's application are escaped, and what is not UTF-8 is replaced.
pub fn object(datagram: &[u8]) -> Option<String> {
    fn first(json: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(json);
        let mut values = serde_json::Deserializer::from_str(&text).into_iter::<Box<RawValue>>();
        Some(values.next()?.ok()?.get().to_owned())
    }
    let json = &datagram[memchr::memchr(b'{', datagram)?..];
    first(json).or_else(|| first(&escape_application(json)?))
}

/// The hostname in the syslog header (RFC 5424), if there is one.
pub fn syslog_hostname(datagram: &[u8]) -> Option<&str> {
    let json = memchr::memchr(b'{', datagram)?;
    let header = std::str::from_utf8(&datagram[..json]).ok()?;
    // VERSION TIMESTAMP HOSTNAME APP-NAME PROCID MSGID SD; an empty time leaves two spaces.
    let mut words = header.trim_end().rsplit(' ');
    let host = words.nth(4)?;
    (!host.is_empty() && host != "-").then_some(host)
}

/// Parses the first JSON value; trailing bytes (a NUL, a newline) are ignored.
fn parse(json: &[u8]) -> serde_json::Result<Received<'_>> {
    Received::deserialize(&mut serde_json::Deserializer::from_slice(json))
}

/// Escapes quotes in the application: XRootD writes the user's application into the JSON unescaped.
fn escape_application(json: &[u8]) -> Option<Vec<u8>> {
    let key = memchr::memmem::find(json, b"\"application\"")? + b"\"application\"".len();
    let begin = key + memchr::memchr(b'"', &json[key..])? + 1;
    let is_closing = |&at: &usize| {
        let rest = json[at + 1..].trim_ascii_start();
        match rest.first() {
            Some(b'}') => true,
            Some(b',') => rest[1..].trim_ascii_start().first() == Some(&b'"'),
            _ => false,
        }
    };
    let end = memchr::memchr_iter(b'"', &json[begin..])
        .map(|at| begin + at)
        .find(is_closing)?;
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

/// The JSON object of a firefly, before validation.
#[derive(Default)]
struct Received<'a> {
    version: Scalar<'a>,
    lifecycle: Lifecycle<'a>,
    flow_id: FlowId<'a>,
    context: FlowContext<'a>,
    usage: Option<Usage>,
    members: Vec<Member>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Lifecycle<'a> {
    #[serde(borrow)]
    state: Scalar<'a>,
    start_time: Scalar<'a>,
    end_time: Scalar<'a>,
    current_time: Scalar<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct FlowId<'a> {
    #[serde(borrow)]
    protocol: Scalar<'a>,
    src_ip: Scalar<'a>,
    src_port: Scalar<'a>,
    dst_ip: Scalar<'a>,
    dst_port: Scalar<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct FlowContext<'a> {
    #[serde(borrow)]
    experiment_id: Scalar<'a>,
    activity_id: Scalar<'a>,
    application: Scalar<'a>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct UsageObject<'a> {
    #[serde(borrow)]
    received: Scalar<'a>,
    sent: Scalar<'a>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Received<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Received<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a firefly")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Received<'de>, M::Error> {
                let mut received = Received::default();
                while let Some(Text(key)) = map.next_key()? {
                    match &*key {
                        "version" => received.version = map.next_value()?,
                        "flow-lifecycle" => received.lifecycle = map.next_value()?,
                        "flow-id" => received.flow_id = map.next_value()?,
                        "context" => received.context = map.next_value()?,
                        _ => {
                            let value: &RawValue = map.next_value()?;
                            received.keep_member(key, value.get());
                        }
                    }
                }
                Ok(received)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Received<'_> {
    /// Keeps members that are not part of the schema, to relay them. `usage` and `netlink` of the wrong type are dropped.
    fn keep_member(&mut self, key: Cow<'_, str>, json: &str) {
        match &*key {
            "usage" => {
                self.usage = serde_json::from_str(json).ok().map(|u: UsageObject| Usage {
                    received: u.received.number(),
                    sent: u.sent.number(),
                });
            }
            "netlink" if !json.starts_with('{') => {}
            _ => self.members.push(Member {
                key: key.into(),
                json: json.into(),
            }),
        }
    }

    fn event(self, now: Timestamp) -> Result<FlowEvent, DecodeError> {
        if self.version.number() != Some(1) {
            let detail = format!("version is {}, expected 1", self.version);
            return Err(DecodeError::new(Rejection::Version, detail));
        }
        let lifecycle = &self.lifecycle;
        let state = lifecycle.state.text().and_then(State::from_word);
        let state = state.ok_or_else(|| {
            let detail = format!(
                "flow-lifecycle.state is {}, expected start, ongoing or end",
                lifecycle.state
            );
            DecodeError::new(Rejection::State, detail)
        })?;
        let start_time = time(&lifecycle.start_time, "start-time")?;
        let reported = time(&lifecycle.current_time, "current-time")?;
        let happened = match state {
            State::Start => start_time,
            State::Ongoing => reported,
            State::End => time(&lifecycle.end_time, "end-time")?,
        };
        let time = happened.unwrap_or(now);
        let context = &self.context;
        Ok(FlowEvent {
            tag: Some(Tag {
                experiment: id(&context.experiment_id, "experiment-id")?,
                activity: id(&context.activity_id, "activity-id")?,
            }),
            start_time,
            reported,
            application: context
                .application
                .text()
                .map(|a| truncate_application(a).into()),
            usage: self.usage,
            members: self.members,
            ..FlowEvent::new(state, flow(&self.flow_id)?, time, Origin::Firefly)
        })
    }
}

/// A time of the lifecycle. `None` if it is null, absent, or before 1970 (Go's zero time).
fn time(value: &Scalar<'_>, key: &str) -> Result<Option<Timestamp>, DecodeError> {
    if matches!(value, Scalar::Absent | Scalar::Null) {
        return Ok(None);
    }
    let parsed = value.text().and_then(|text| text.parse::<Timestamp>().ok());
    let parsed = parsed.ok_or_else(|| {
        let detail = format!("flow-lifecycle.{key} is {value}, expected a time as in RFC 3339");
        DecodeError::new(Rejection::Time, detail)
    })?;
    let micros = Timestamp::from_microsecond(parsed.as_microsecond()).unwrap_or(parsed);
    Ok((micros > Timestamp::UNIX_EPOCH).then_some(micros))
}

fn flow(flow_id: &FlowId<'_>) -> Result<Flow, DecodeError> {
    let invalid = |reason, key: &str, value: &Scalar<'_>, expected: &str| {
        let detail = format!("flow-id.{key} is {value}, expected {expected}");
        DecodeError::new(reason, detail)
    };
    let address = |key: &str, value: &Scalar<'_>| {
        let parsed = value.text().and_then(parse_address);
        parsed.ok_or_else(|| invalid(Rejection::Address, key, value, "an IPv4 or IPv6 address"))
    };
    let port = |key: &str, value: &Scalar<'_>| {
        let port = value.number().and_then(|n| u16::try_from(n).ok());
        port.ok_or_else(|| invalid(Rejection::Port, key, value, "a port of 0 to 65535"))
    };
    let protocol = flow_id.protocol.text().and_then(Protocol::from_word);
    let protocol = protocol.ok_or_else(|| {
        let value = &flow_id.protocol;
        invalid(Rejection::Protocol, "protocol", value, "tcp or udp")
    })?;
    let source = (
        address("src-ip", &flow_id.src_ip)?,
        port("src-port", &flow_id.src_port)?,
    );
    let destination = (
        address("dst-ip", &flow_id.dst_ip)?,
        port("dst-port", &flow_id.dst_port)?,
    );
    Flow::new(protocol, source, destination).map_err(|e| {
        let reason = match e {
            FlowError::MixedFamilies => Rejection::Family,
            FlowError::Unspecified => Rejection::Address,
        };
        DecodeError::new(reason, e.to_string())
    })
}

fn id(value: &Scalar<'_>, key: &str) -> Result<u16, DecodeError> {
    let id = value.number().and_then(|n| u16::try_from(n).ok());
    id.ok_or_else(|| {
        let detail = format!("context.{key} is {value}, expected 0 to 65535");
        DecodeError::new(Rejection::Tag, detail)
    })
}

/// A value whose type may differ from the schema; its `Display` is for error messages.
#[derive(Default)]
enum Scalar<'a> {
    #[default]
    Absent,
    Null,
    Text(Cow<'a, str>),
    Number(u64),
    /// A type that no key has; only its description is kept.
    Other(String),
}

impl Scalar<'_> {
    fn text(&self) -> Option<&str> {
        match self {
            Scalar::Text(text) => Some(text),
            _ => None,
        }
    }

    fn number(&self) -> Option<u64> {
        match self {
            Scalar::Number(number) => Some(*number),
            _ => None,
        }
    }
}

impl fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scalar::Absent => f.write_str("missing"),
            Scalar::Null => f.write_str("null"),
            Scalar::Text(text) => f.write_str(&quote(text.as_bytes())),
            Scalar::Number(number) => number.fmt(f),
            Scalar::Other(description) => f.write_str(description),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Scalar<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Scalar<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Number(number))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other(number.to_string()))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other(number.to_string()))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other(value.to_string()))
            }

            fn visit_unit<E>(self) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Null)
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Scalar<'de>, S::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("an array".to_owned()))
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Scalar<'de>, M::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("an object".to_owned()))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// A string, borrowed if it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);
