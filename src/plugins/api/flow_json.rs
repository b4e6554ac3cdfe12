//! The JSON of flow events in a request, in one of two formats: that of flowd-rs, with the keys of a firefly without
//! its sections, or that of flowd-go. No I/O.

use std::net::IpAddr;

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::config::nearest::nearest;
use crate::event::{FlowEvent, Origin, State};
use crate::flow::{Flow, Protocol, Tag, Usage, parse_address};
use crate::logging::quote;
use crate::registry::Registry;

type Object = Map<String, Value>;
type Result<T> = std::result::Result<T, String>;

/// Every key of flowd-rs's format.
const KEYS: [&str; 12] = [
    "state",
    "protocol",
    "src-ip",
    "src-port",
    "dst-ip",
    "dst-port",
    "experiment-id",
    "activity-id",
    "start-time",
    "end-time",
    "application",
    "usage",
];

/// Reads one event or an array of events. An error names the field, its value and what was expected.
pub fn events(document: &Value, registry: &Registry, now: Timestamp) -> Result<Vec<FlowEvent>> {
    let one = |value: &Value, prefix: String| {
        let event = match value {
            Value::Object(object)
                if object.keys().any(|key| key.starts_with(char::is_uppercase)) =>
            {
                go_event(object, registry, now)
            }
            Value::Object(object) => event(object, registry, now),
            other => Err(format!(
                "a flow is {}, expected an object",
                json_type(other)
            )),
        };
        event.map_err(|error| prefix + &error)
    };
    match document {
        Value::Array(array) => {
            let numbered = array.iter().enumerate();
            numbered
                .map(|(n, value)| one(value, format!("[{n}] ")))
                .collect()
        }
        other => Ok(vec![one(other, String::new())?]),
    }
}

fn event(object: &Object, registry: &Registry, now: Timestamp) -> Result<FlowEvent> {
    if let Some(unknown) = object.keys().find(|key| !KEYS.contains(&key.as_str())) {
        let name = quote(unknown.as_bytes());
        // A longer key is near none, and takes long to compare.
        let near = Some(unknown).filter(|key| key.len() <= 32);
        let near = near.and_then(|key| nearest(key, &KEYS));
        let near = near.map_or(String::new(), |key| format!(", did you mean {key}?"));
        return Err(format!("{name}: unknown field{near}"));
    }
    let state = text(object, "state", "start, ongoing or end", State::from_word)?;
    let protocol = text(object, "protocol", "tcp or udp", Protocol::from_word)?;
    let address = |key| text(object, key, "an IPv4 or IPv6 address", parse_address);
    let port = |key| number(object, key, 1, 65535);
    let endpoint = |ip, at| Ok::<_, String>((address(ip)?, port(at)?));
    let flow = flow(
        protocol,
        endpoint("src-ip", "src-port")?,
        endpoint("dst-ip", "dst-port")?,
    )?;
    let experiment = id(object, "experiment-id", |name| registry.experiment_id(name))?;
    let activity = id(object, "activity-id", |name| {
        registry.activity_id(experiment, name)
    })?;
    let tag = Tag {
        experiment,
        activity,
    };
    let start_time = time(object, "start-time")?;
    let end_time = time(object, "end-time")?;
    let usage = match object.get("usage") {
        None | Some(Value::Null) => None,
        Some(Value::Object(usage)) => Some(Usage {
            received: count(usage, "received")?,
            sent: count(usage, "sent")?,
        }),
        Some(other) => return Err(wrong("usage", other, "an object with received and sent")),
    };
    Ok(FlowEvent {
        usage,
        ..build_event(
            state,
            flow,
            tag,
            [start_time, end_time],
            application(object, "application")?,
            now,
        )
    })
}

/// Reads an event in flowd-go's format. The other fields of its structure are ignored.
fn go_event(object: &Object, registry: &Registry, now: Timestamp) -> Result<FlowEvent> {
    let state = match number(object, "State", 2, 4)? {
        2 => State::Start,
        3 => State::End,
        _ => State::Ongoing,
    };
    let protocol = match number(object, "Protocol", 0, 1)? {
        0 => Protocol::Tcp,
        _ => Protocol::Udp,
    };
    match object.get("Family") {
        None => {}
        Some(family) if [Some(2), Some(10)].contains(&whole_number(family)) => {}
        Some(family) => return Err(wrong("Family", family, "2 (IPv4) or 10 (IPv6)")),
    }
    let endpoint = |key| {
        text(
            object,
            key,
            "address:port, an IPv6 address in brackets",
            socket_address,
        )
    };
    let flow = flow(protocol, endpoint("Src")?, endpoint("Dst")?)?;
    let experiment = id(object, "Experiment", |name| registry.experiment_id(name))?;
    let activity = id(object, "Activity", |name| {
        registry.activity_id(experiment, name)
    })?;
    let tag = Tag {
        experiment,
        activity,
    };
    let times = [time(object, "StartTs")?, time(object, "EndTs")?];
    Ok(build_event(
        state,
        flow,
        tag,
        times,
        application(object, "Application")?,
        now,
    ))
}

fn build_event(
    state: State,
    flow: Flow,
    tag: Tag,
    [start, end]: [Option<Timestamp>; 2],
    application: Option<&str>,
    now: Timestamp,
) -> FlowEvent {
    let event_time = match state {
        State::Start => start,
        State::Ongoing => None,
        State::End => end,
    };
    FlowEvent {
        tag: Some(tag),
        start_time: start,
        application: application.map(Into::into),
        ..FlowEvent::new(state, flow, event_time.unwrap_or(now), Origin::Api)
    }
}

fn flow(protocol: Protocol, source: (IpAddr, u16), destination: (IpAddr, u16)) -> Result<Flow> {
    Flow::new(protocol, source, destination).map_err(|error| error.to_string())
}

fn socket_address(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.rsplit_once(':')?;
    if address.contains(':') && !address.starts_with('[') {
        return None;
    }
    let port = port
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| port.parse().ok())??;
    (port != 0).then_some((parse_address(address)?, port))
}

fn wrong(key: &str, found: &Value, expected: &str) -> String {
    let found = match found {
        Value::Null => "missing".to_owned(),
        Value::String(text) => {
            let cut: String = text.chars().take(100).collect();
            format!("{cut:?}")
        }
        Value::Number(number) => number.to_string(),
        other => json_type(other).to_owned(),
    };
    format!("{key} is {found}, expected {expected}")
}

fn json_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn text<T>(
    object: &Object,
    key: &str,
    expected: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Result<T> {
    let value = object.get(key).unwrap_or(&Value::Null);
    let read = value.as_str().and_then(read);
    read.ok_or_else(|| wrong(key, value, expected))
}

/// JSON does not distinguish 5.0 from 5: both are whole numbers.
fn whole_number(value: &Value) -> Option<u64> {
    let is_whole = |n: &f64| n.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(n);
    let float = || value.as_f64().filter(is_whole).map(|n| n as u64);
    value.as_u64().or_else(float)
}

fn number(object: &Object, key: &str, min: u16, max: u16) -> Result<u16> {
    let value = object.get(key).unwrap_or(&Value::Null);
    let number = whole_number(value).and_then(|n| u16::try_from(n).ok());
    let number = number.filter(|n| (min..=max).contains(n));
    number.ok_or_else(|| wrong(key, value, &format!("a number of {min} to {max}")))
}

fn id(object: &Object, key: &str, by_name: impl Fn(&str) -> Option<u16>) -> Result<u16> {
    let value = object.get(key).unwrap_or(&Value::Null);
    match value.as_str() {
        Some(name) => by_name(name).ok_or_else(|| {
            wrong(
                key,
                value,
                "a number of 0 to 65535 or a name of the registry (GET /registry)",
            )
        }),
        None => number(object, key, 0, 65535),
    }
}

fn count(usage: &Object, key: &str) -> Result<Option<u64>> {
    match usage.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match whole_number(value) {
            Some(count) => Ok(Some(count)),
            None => Err(wrong(&format!("usage.{key}"), value, "a number of bytes")),
        },
    }
}

fn application<'a>(object: &'a Object, key: &str) -> Result<Option<&'a str>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(application)) if application.is_empty() => Ok(None),
        Some(Value::String(application)) => Ok(Some(application)),
        Some(other) => Err(wrong(key, other, "a string")),
    }
}

/// A time before 1970 counts as absent: Go's unset time is in the year 1.
fn time(object: &Object, key: &str) -> Result<Option<Timestamp>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let parsed = value
                .as_str()
                .and_then(|text| text.parse::<Timestamp>().ok());
            let parsed = parsed.ok_or_else(|| wrong(key, value, "an RFC 3339 time"))?;
            let micros = Timestamp::from_microsecond(parsed.as_microsecond()).unwrap_or(parsed);
            Ok((micros > Timestamp::UNIX_EPOCH).then_some(micros))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(document: &Value) -> Result<Vec<FlowEvent>> {
        events(document, &Registry::builtin(), Timestamp::UNIX_EPOCH)
    }

    fn own_format() -> Value {
        json!({
            "state": "start", "protocol": "tcp", "src-ip": "::1", "src-port": 2345, "dst-ip": "::1", "dst-port": 5777,
            "experiment-id": 1, "activity-id": 2,
        })
    }

    fn go_format() -> Value {
        json!({
            "State": 2, "Protocol": 0, "Family": 10, "Src": "[::1]:2345", "Dst": "[::1]:5777", "Experiment": 1, "Activity": 2,
            "StartTs": "0001-01-01T00:00:00Z", "EndTs": "0001-01-01T00:00:00Z", "Application": "",
        })
    }

    #[test]
    fn both_formats_mean_the_same() {
        assert_eq!(read(&own_format()).unwrap(), read(&go_format()).unwrap());
        assert_eq!(read(&json!([own_format(), go_format()])).unwrap().len(), 2);
        assert_eq!(read(&json!([])).unwrap(), []);
    }

    #[test]
    fn names_times_and_counts() {
        let mut document = own_format();
        for (key, value) in [
            ("state", json!("end")),
            ("experiment-id", json!("ATLAS")),
            ("activity-id", json!("Data Challenge")),
            ("start-time", json!("2026-01-02T03:04:05Z")),
            ("end-time", json!("2026-01-02T04:04:05+00:00")),
            ("application", json!("mover")),
            ("usage", json!({"sent": 5})),
        ] {
            document[key] = value;
        }
        let event = &read(&document).unwrap()[0];
        assert_eq!(
            event.tag,
            Some(Tag {
                experiment: 2,
                activity: 26
            })
        );
        assert_eq!(
            event.time - event.start_time(),
            jiff::Span::new().seconds(3600).fieldwise()
        );
        assert_eq!(event.application.as_deref(), Some("mover"));
        assert_eq!(
            event.usage,
            Some(Usage {
                received: None,
                sent: Some(5)
            })
        );
    }

    #[test]
    fn errors_name_the_field_and_what_was_expected() {
        for (key, value, expected) in [
            (
                "state",
                json!("begin"),
                "state is \"begin\", expected start, ongoing or end",
            ),
            ("protocol", json!(6), "protocol is 6, expected tcp or udp"),
            (
                "src-ip",
                json!("host"),
                "src-ip is \"host\", expected an IPv4 or IPv6 address",
            ),
            (
                "src-ip",
                json!("192.0.2.1"),
                "source and destination must be of one address family",
            ),
            (
                "dst-port",
                json!(0),
                "dst-port is 0, expected a number of 1 to 65535",
            ),
            (
                "dst-port",
                json!("443"),
                "dst-port is \"443\", expected a number of 1 to 65535",
            ),
            (
                "experiment-id",
                json!("nobody"),
                "experiment-id is \"nobody\", expected a number of 0 to 65535 or a name of the registry (GET /registry)",
            ),
            (
                "activity-id",
                json!(null),
                "activity-id is missing, expected a number of 0 to 65535",
            ),
            (
                "start-time",
                json!("soon"),
                "start-time is \"soon\", expected an RFC 3339 time",
            ),
            (
                "usage",
                json!({"sent": -1}),
                "usage.sent is -1, expected a number of bytes",
            ),
            (
                "usage",
                json!(3),
                "usage is 3, expected an object with received and sent",
            ),
            (
                "application",
                json!({}),
                "application is an object, expected a string",
            ),
            (
                "protocl",
                json!("tcp"),
                "\"protocl\": unknown field, did you mean protocol?",
            ),
        ] {
            let mut document = own_format();
            document[key] = value;
            assert_eq!(read(&document).unwrap_err(), expected);
            assert_eq!(
                read(&json!([own_format(), document])).unwrap_err(),
                format!("[1] {expected}")
            );
        }
        for (key, value, expected) in [
            ("State", json!(1), "State is 1, expected a number of 2 to 4"),
            (
                "Protocol",
                json!(6),
                "Protocol is 6, expected a number of 0 to 1",
            ),
            (
                "Family",
                json!(4),
                "Family is 4, expected 2 (IPv4) or 10 (IPv6)",
            ),
            (
                "Src",
                json!("::1:2345"),
                "Src is \"::1:2345\", expected address:port, an IPv6 address in brackets",
            ),
            (
                "Dst",
                json!("[::1]:0"),
                "Dst is \"[::1]:0\", expected address:port, an IPv6 address in brackets",
            ),
            (
                "Activity",
                json!(-1),
                "Activity is -1, expected a number of 0 to 65535",
            ),
        ] {
            let mut document = go_format();
            document[key] = value;
            assert_eq!(read(&document).unwrap_err(), expected);
        }
        assert_eq!(
            read(&json!("x")).unwrap_err(),
            "a flow is a string, expected an object"
        );
    }

    #[test]
    fn a_long_key_is_cut_in_the_error() {
        let mut document = own_format();
        document["x".repeat(1 << 20)] = json!(1);
        let error = read(&document).unwrap_err();
        assert!(
            error.len() < 200 && error.ends_with("…\": unknown field"),
            "{} bytes",
            error.len()
        );
    }
}
