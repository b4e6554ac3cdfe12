//! The format of a line in the named pipe:
//! `state protocol src_ip src_port dst_ip dst_port experiment activity`. No I/O.

use std::fmt;
use std::net::IpAddr;

use jiff::Timestamp;

use crate::event::{FlowEvent, Origin, State};
use crate::flow::{Flow, FlowError, Protocol, Tag, parse_address};
use crate::logging::quote;
use crate::metrics::outcomes;
use crate::registry::Registry;

/// The names of the fields in errors, in the order of the line.
const FIELDS: [&str; 8] = [
    "state",
    "protocol",
    "source address",
    "source port",
    "destination address",
    "destination port",
    "experiment",
    "activity",
];

outcomes! {
    /// The outcome of a line: accepted, or the reason for its rejection.
    pub enum LineOutcome {
        /// The line is a flow event.
        Accepted = "accepted": "accepted: {line|lines}",
        /// Not UTF-8, or with control characters.
        NotText = "rejected_encoding": "rejected: {line|lines} that {is|are} not UTF-8 text",
        /// Longer than [`MAX_LINE_LENGTH`](super::line_buffer::MAX_LINE_LENGTH).
        TooLong = "rejected_length": "rejected: {line|lines} over the length limit",
        /// Not eight fields.
        Fields = "rejected_fields": "rejected: {line|lines} with the wrong number of fields",
        /// Neither start nor end.
        State = "rejected_state": "rejected: {line|lines} with an unknown state",
        /// Neither tcp nor udp.
        Protocol = "rejected_protocol": "rejected: {line|lines} with an unknown protocol",
        /// Not an IP address, or the unspecified address.
        Address = "rejected_address": "rejected: {line|lines} with an invalid address",
        /// Not a port of 1 to 65535.
        Port = "rejected_port": "rejected: {line|lines} with an invalid port",
        /// One address is IPv4, the other IPv6.
        Family = "rejected_family": "rejected: {line|lines} with one IPv4 and one IPv6 address",
        /// Neither an id nor a name in the registry.
        Experiment = "rejected_experiment": "rejected: {line|lines} with an unknown experiment",
        /// Neither an id nor a name of the experiment's activities.
        Activity = "rejected_activity": "rejected: {line|lines} with an unknown activity",
    }
}

/// Why a line was rejected. The `Display` output says what was found and what was expected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineError {
    /// The reason, as it is counted.
    pub reason: LineOutcome,
    detail: String,
}

impl fmt::Display for LineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl LineError {
    fn new(reason: LineOutcome, detail: String) -> LineError {
        LineError { reason, detail }
    }

    fn field(reason: LineOutcome, index: usize, found: &str, expected: &str) -> LineError {
        let (number, name, found) = (index + 1, FIELDS[index], quote(found.as_bytes()));
        LineError::new(
            reason,
            format!("field {number} ({name}) is {found}, expected {expected}"),
        )
    }
}

/// Parses one line without its newline. A blank line is `None`.
///
/// The experiment and activity of an `end` may be anything, because an `end` is matched by its 5-tuple alone.
pub fn parse(
    line: &[u8],
    registry: &Registry,
    now: Timestamp,
) -> Result<Option<FlowEvent>, LineError> {
    let text = text(line)?;
    let mut fields = [""; 8];
    let mut count = 0;
    for field in text.split_ascii_whitespace() {
        if let Some(slot) = fields.get_mut(count) {
            *slot = field;
        }
        count += 1;
    }
    if count == 0 {
        return Ok(None);
    }
    if count != FIELDS.len() {
        let fields = if count == 1 { "field" } else { "fields" };
        let detail = format!("{count} {fields}, expected 8: {}", FIELDS.join(", "));
        return Err(LineError::new(LineOutcome::Fields, detail));
    }
    let state = match State::from_word(fields[0]) {
        Some(state @ (State::Start | State::End)) => state,
        _ => {
            return Err(LineError::field(
                LineOutcome::State,
                0,
                fields[0],
                "start or end",
            ));
        }
    };
    let protocol = Protocol::from_word(fields[1])
        .ok_or_else(|| LineError::field(LineOutcome::Protocol, 1, fields[1], "tcp or udp"))?;
    let source = (address(&fields, 2)?, port(&fields, 3)?);
    let destination = (address(&fields, 4)?, port(&fields, 5)?);
    let flow = Flow::new(protocol, source, destination).map_err(|e| {
        let reason = match e {
            FlowError::MixedFamilies => LineOutcome::Family,
            FlowError::Unspecified => LineOutcome::Address,
        };
        LineError::new(reason, e.to_string())
    })?;
    let tag = match (tag(&fields, registry), state) {
        (Ok(tag), _) => Some(tag),
        (Err(_), State::End) => None,
        (Err(error), _) => return Err(error),
    };
    Ok(Some(FlowEvent {
        tag,
        ..FlowEvent::new(state, flow, now, Origin::NamedPipe)
    }))
}

fn text(line: &[u8]) -> Result<&str, LineError> {
    let reject = |detail: &str| LineError::new(LineOutcome::NotText, detail.to_owned());
    let text = std::str::from_utf8(line).map_err(|_| reject("not UTF-8, expected plain text"))?;
    let is_control = |b: u8| b.is_ascii_control() && !b.is_ascii_whitespace();
    if text.bytes().any(is_control) {
        return Err(reject("contains control characters, expected plain text"));
    }
    Ok(text)
}

fn address(fields: &[&str; 8], index: usize) -> Result<IpAddr, LineError> {
    let field = fields[index];
    parse_address(field).ok_or_else(|| {
        LineError::field(
            LineOutcome::Address,
            index,
            field,
            "an IPv4 or IPv6 address",
        )
    })
}

fn port(fields: &[&str; 8], index: usize) -> Result<u16, LineError> {
    number(fields[index])
        .filter(|&port| port != 0)
        .ok_or_else(|| {
            LineError::field(
                LineOutcome::Port,
                index,
                fields[index],
                "a port of 1 to 65535",
            )
        })
}

fn tag(fields: &[&str; 8], registry: &Registry) -> Result<Tag, LineError> {
    let expected =
        |kind| format!("{kind} id of 0 to 65535 or a name of the registry (flowd-rs registry)");
    let experiment = number(fields[6])
        .or_else(|| registry.experiment_id(fields[6]))
        .ok_or_else(|| {
            LineError::field(
                LineOutcome::Experiment,
                6,
                fields[6],
                &expected("an experiment"),
            )
        })?;
    let activity = number(fields[7])
        .or_else(|| registry.activity_id(experiment, fields[7]))
        .ok_or_else(|| {
            LineError::field(
                LineOutcome::Activity,
                7,
                fields[7],
                &expected("an activity"),
            )
        })?;
    Ok(Tag {
        experiment,
        activity,
    })
}

/// Decimal digits only: `u16::from_str` would also accept a sign.
fn number(field: &str) -> Option<u16> {
    field
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| field.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(line: &str) -> Result<Option<FlowEvent>, LineError> {
        parse(line.as_bytes(), &Registry::builtin(), Timestamp::UNIX_EPOCH)
    }

    fn event(line: &str) -> FlowEvent {
        read(line).unwrap().unwrap()
    }

    fn reason(line: &str) -> LineOutcome {
        read(line).unwrap_err().reason
    }

    #[test]
    fn a_plain_line() {
        let event = event("start tcp 192.0.2.1 2345 192.0.2.2 5777 1 2");
        assert_eq!(event.state, State::Start);
        assert_eq!(
            event.flow.to_string(),
            "tcp 192.0.2.1:2345 > 192.0.2.2:5777"
        );
        assert_eq!(
            event.tag,
            Some(Tag {
                experiment: 1,
                activity: 2
            })
        );
    }

    #[test]
    fn the_forms_that_real_writers_send() {
        let plain = event("start tcp 2001:db8::1 1 2001:db8::2 2 3 3");
        for line in [
            "START\tTCP  2001:DB8::1 1 2001:db8:0::2 2 3 3\r",
            " start tcp [2001:db8::1] 1 [2001:db8::2] 2 3 3 ",
            "start tcp 2001:db8::1%eth0 1 2001:db8::2%2 2 3 3",
            "start tcp [2001:db8::1%eth0] 1 2001:db8::2 02 3 3",
            "start tcp 2001:db8::1 1 2001:db8::2 2 cms Cache",
            "start tcp 2001:db8::1 1 2001:db8::2 2 CMS cache",
        ] {
            assert_eq!(event(line), plain, "{line}");
        }
        let mapped = event("start udp ::ffff:192.0.2.1 1 192.0.2.2 2 0 0");
        assert_eq!(mapped.flow.source.to_string(), "192.0.2.1:1");
        assert_eq!(mapped.tag, Some(Tag::default()));
        let spaced = event("start udp 192.0.2.1 1 192.0.2.2 2 atlas Data_Challenge");
        assert_eq!(
            spaced.tag,
            Some(Tag {
                experiment: 2,
                activity: 26
            })
        );
        assert_eq!(read(""), Ok(None));
        assert_eq!(read(" \t\r"), Ok(None));
    }

    #[test]
    fn an_end_is_accepted_with_any_tag() {
        let event = event("end tcp 192.0.2.1 1 192.0.2.2 2 nonsense 99999");
        assert_eq!((event.state, event.tag), (State::End, None));
    }

    #[test]
    fn each_reason_for_rejection() {
        for (line, expected) in [
            ("strat tcp 192.0.2.1 1 192.0.2.2 2 1 2", LineOutcome::State),
            (
                "ongoing tcp 192.0.2.1 1 192.0.2.2 2 1 2",
                LineOutcome::State,
            ),
            (
                "start sctp 192.0.2.1 1 192.0.2.2 2 1 2",
                LineOutcome::Protocol,
            ),
            (
                "start tcp 192.0.2.256 1 192.0.2.2 2 1 2",
                LineOutcome::Address,
            ),
            (
                "start tcp 192.0.2.1%eth0 1 192.0.2.2 2 1 2",
                LineOutcome::Address,
            ),
            (
                "start tcp 2001:db8::1% 1 2001:db8::2 2 1 2",
                LineOutcome::Address,
            ),
            (
                "start tcp [2001:db8::1 1 2001:db8::2 2 1 2",
                LineOutcome::Address,
            ),
            ("start tcp 0.0.0.0 1 192.0.2.2 2 1 2", LineOutcome::Address),
            (
                "start tcp host.example 1 192.0.2.2 2 1 2",
                LineOutcome::Address,
            ),
            ("start tcp 192.0.2.1 0 192.0.2.2 2 1 2", LineOutcome::Port),
            (
                "start tcp 192.0.2.1 1 192.0.2.2 65536 1 2",
                LineOutcome::Port,
            ),
            ("start tcp 192.0.2.1 +1 192.0.2.2 2 1 2", LineOutcome::Port),
            ("start tcp 192.0.2.1 -1 192.0.2.2 2 1 2", LineOutcome::Port),
            (
                "start tcp 192.0.2.1 1 2001:db8::2 2 1 2",
                LineOutcome::Family,
            ),
            (
                "start tcp 192.0.2.1 1 192.0.2.2 2 nobody 2",
                LineOutcome::Experiment,
            ),
            (
                "start tcp 192.0.2.1 1 192.0.2.2 2 65536 2",
                LineOutcome::Experiment,
            ),
            (
                "start tcp 192.0.2.1 1 192.0.2.2 2 cms Nothing",
                LineOutcome::Activity,
            ),
            ("start tcp 192.0.2.1 1 192.0.2.2 2 1", LineOutcome::Fields),
            (
                "start tcp 192.0.2.1 1 192.0.2.2 2 1 2 3",
                LineOutcome::Fields,
            ),
            (
                "start tcp 192.0.2.1 1 192.0.2.2 2 1 2\0",
                LineOutcome::NotText,
            ),
        ] {
            assert_eq!(reason(line), expected, "{line}");
        }
        let invalid = parse(b"start \xff", &Registry::builtin(), Timestamp::UNIX_EPOCH);
        assert_eq!(invalid.unwrap_err().reason, LineOutcome::NotText);
    }

    #[test]
    fn an_error_names_the_field_its_value_and_what_was_expected() {
        let error = read("start tcp 192.0.2.1 99999 192.0.2.2 2 1 2").unwrap_err();
        assert_eq!(
            error.to_string(),
            "field 4 (source port) is \"99999\", expected a port of 1 to 65535"
        );
        for (line, count) in [("start", "1 field, "), ("start tcp", "2 fields, ")] {
            let error = read(line).unwrap_err().to_string();
            assert!(error.starts_with(count), "{error}");
        }
    }

    fn line_of(event: &FlowEvent, tag: Tag) -> String {
        let (flow, state) = (&event.flow, event.state.as_str());
        let (source, destination) = (flow.source, flow.destination);
        format!(
            "{state} {} {} {} {} {} {} {}",
            flow.protocol.as_str(),
            source.address,
            source.port,
            destination.address,
            destination.port,
            tag.experiment,
            tag.activity
        )
    }

    proptest! {
        #[test]
        fn any_bytes_cause_no_panic_and_an_accepted_line_reads_the_same_again(
            line in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            let registry = Registry::builtin();
            if let Ok(Some(event)) = parse(&line, &registry, Timestamp::UNIX_EPOCH) {
                let again = line_of(&event, event.tag());
                let again = parse(again.as_bytes(), &registry, Timestamp::UNIX_EPOCH);
                prop_assert_eq!(again.unwrap().unwrap().flow, event.flow);
            }
        }

        #[test]
        fn a_line_of_any_flow_reads_back(
            start in any::<bool>(), udp in any::<bool>(), v6 in any::<bool>(),
            a in any::<u128>(), b in any::<u128>(), sport in 1u16.., dport in 1u16..,
            experiment in any::<u16>(), activity in any::<u16>(),
        ) {
            let ip = |n: u128| match v6 {
                true => IpAddr::from(n.to_be_bytes()),
                false => IpAddr::from((n as u32).to_be_bytes()),
            };
            prop_assume!(ip(a).to_canonical().is_ipv4() == ip(b).to_canonical().is_ipv4());
            prop_assume!(!ip(a).to_canonical().is_unspecified() && !ip(b).to_canonical().is_unspecified());
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let state = if start { State::Start } else { State::End };
            let flow = Flow::new(protocol, (ip(a), sport), (ip(b), dport)).unwrap();
            let event = FlowEvent {
                tag: Some(Tag { experiment, activity }),
                ..FlowEvent::new(state, flow, Timestamp::UNIX_EPOCH, Origin::NamedPipe)
            };
            prop_assert_eq!(read(&line_of(&event, event.tag())), Ok(Some(event)));
        }

        #[test]
        fn a_good_line_with_one_byte_changed_never_panics(at in 0usize..43, byte in any::<u8>()) {
            let mut line = b"start tcp 192.0.2.1 2345 192.0.2.2 5777 1 2".to_vec();
            line[at] = byte;
            let _ = parse(&line, &Registry::builtin(), Timestamp::UNIX_EPOCH);
        }
    }
}
