//! Encodes a flow event as a firefly.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use jiff::tz::Offset;

use super::truncate_application;
use crate::event::{FlowEvent, Member, State};
use crate::firefly::netlink_object::{self, Mode};
use crate::flow::{Protocol, Usage};

/// Facility local0, severity info; version 1 of the header (RFC 5424).
const SYSLOG_PRIORITY: &str = "<134>1 ";
/// The largest firefly, in bytes: a packet of 1500 bytes less the headers of IPv6 and UDP.
pub const MAX_DATAGRAM_SIZE: usize = 1452;
/// The members of a relayed firefly that are kept first if not all fit.
const PREFERRED_MEMBERS: [&str; 3] = ["netlink", "storage-stats", "skOps"];

/// Writes fireflies. Caches the times last written, which often recur within a batch.
pub struct Encoder {
    /// The part of the syslog header after the time; `None` to write no header.
    header: Option<String>,
    /// The default application, as a JSON string.
    application: String,
    current: PrintedTime,
    reported: PrintedTime,
    start: PrintedTime,
    end: PrintedTime,
    /// The format of the `netlink` object; `None` to write none.
    enrichment: Option<Mode>,
}

impl Encoder {
    /// `hostname` is used in the syslog header, `application` for events without one.
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
            reported: PrintedTime::default(),
            start: PrintedTime::default(),
            end: PrintedTime::default(),
            enrichment: None,
        }
    }

    /// An encoder that also writes socket statistics, in the format `enrichment`.
    pub fn enriched(self, enrichment: Option<Mode>) -> Encoder {
        Encoder { enrichment, ..self }
    }

    /// Appends the firefly of `event`, sent at `now`, to `out`. Returns how many members (see [`FlowEvent::members`])
    /// and socket statistics did not fit.
    ///
    /// The JSON is written piece by piece, at half the cost of a serializer: apart from members, only the application
    /// may need escaping.
    pub fn encode(&mut self, event: &FlowEvent, now: Timestamp, out: &mut String) -> usize {
        let begin = out.len();
        let (flow, tag) = (&event.flow, event.tag());
        let current = self.current.print(now);
        let mut put = |text: &str| out.push_str(text);
        if let Some(header) = &self.header {
            put(SYSLOG_PRIORITY);
            put(current);
            put(header);
        }
        put("{\"version\":1,\"flow-lifecycle\":{\"state\":\"");
        put(event.state.as_str());
        put("\",\"current-time\":\"");
        put(match event.reported {
            None if event.state == State::Ongoing => self.reported.print(event.time),
            None => current,
            Some(reported) => self.reported.print(reported),
        });
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
        let mut put = |out: &mut String, text: &str, n: u64| {
            out.push_str(text);
            out.push_str(number.format(n));
        };
        let protocol = match flow.protocol {
            Protocol::Tcp => "\",\"protocol\":\"tcp\",\"src-port\":",
            Protocol::Udp => "\",\"protocol\":\"udp\",\"src-port\":",
        };
        put(out, protocol, flow.source.port.into());
        put(out, ",\"dst-port\":", flow.destination.port.into());
        match event.usage {
            None => {}
            Some(Usage {
                received: None,
                sent: None,
            }) => out.push_str("},\"usage\":{"),
            Some(Usage { received, sent }) => {
                let mut before = "},\"usage\":{";
                for (key, count) in [("\"received\":", received), ("\"sent\":", sent)] {
                    if let Some(count) = count {
                        out.push_str(before);
                        put(out, key, count);
                        before = ",";
                    }
                }
            }
        }
        put(
            out,
            "},\"context\":{\"experiment-id\":",
            tag.experiment.into(),
        );
        put(out, ",\"activity-id\":", tag.activity.into());
        out.push_str(",\"application\":");
        match event.application.as_deref() {
            None => out.push_str(&self.application),
            Some(application) => out.push_str(&escaped(application)),
        }
        out.push('}');
        let end = begin + MAX_DATAGRAM_SIZE - 1;
        let mut left_out = put_members(&event.members, end, out);
        left_out += self.put_enrichment(event, end, out);
        out.push('}');
        left_out
    }
}

impl Encoder {
    /// Appends socket statistics, except where the producer of a relayed firefly has sent its own. [`Mode::Full`] has no
    /// size limit.
    fn put_enrichment(&self, event: &FlowEvent, end: usize, out: &mut String) -> usize {
        let Some(mode) = self.enrichment else {
            return 0;
        };
        let is_member = |key: &str| event.members.iter().any(|member| &*member.key == key);
        let mut left_out = 0;
        let mut put = |key: &str, put: &dyn Fn(usize, &mut String) -> usize| {
            let room = match mode {
                Mode::Full => usize::MAX,
                _ => end.saturating_sub(out.len() + key.len() + 4),
            };
            // Too little for a single field.
            if room < 16 {
                left_out += 1;
                return;
            }
            // Writing to a String cannot fail.
            let _ = write!(out, ",\"{key}\":");
            left_out += put(room, out);
        };
        if let Some(socket) = event.netlink.as_deref().filter(|_| !is_member("netlink")) {
            put("netlink", &|room, out| {
                netlink_object::put(mode, socket, room, out)
            });
        }
        if let Some(skops) = event.skops.as_deref().filter(|_| !is_member("skOps")) {
            put("skOps", &|room, out| {
                netlink_object::put_skops(skops, room, out)
            });
        }
        left_out
    }
}

/// Appends the members that fit, [`PREFERRED_MEMBERS`] first; returns how many did not.
fn put_members(members: &[Member], end: usize, out: &mut String) -> usize {
    let rank = |member: &&Member| {
        let preferred = PREFERRED_MEMBERS
            .iter()
            .position(|key| **key == *member.key);
        preferred.unwrap_or(PREFERRED_MEMBERS.len())
    };
    let mut ranked: Vec<&Member> = members.iter().collect();
    ranked.sort_by_key(rank);
    let mut left_out = 0;
    for member in ranked {
        let before = out.len();
        // Writing to a String cannot fail.
        let _ = write!(out, ",{}:{}", quoted(&member.key), member.json);
        if out.len() > end {
            out.truncate(before);
            left_out += 1;
        }
    }
    left_out
}

/// A time in the format of fireflies, `2021-09-22T11:12:27.808092+00:00`.
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
                .expect("writing to a String cannot fail");
        }
        &self.text
    }
}

/// As a JSON string, truncated.
fn escaped(application: &str) -> String {
    quoted(truncate_application(application))
}

/// As a JSON string.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string serializes")
}
