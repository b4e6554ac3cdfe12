//! A flow event as a firefly.

use std::fmt::Write as _;

use jiff::Timestamp;
use jiff::fmt::temporal::DateTimePrinter;
use jiff::tz::Offset;

use super::cut;
use crate::enrichment::{self, Mode};
use crate::flow::{FlowEvent, Member, Protocol, State, Usage};

/// Facility local0, severity info.
const PRIORITY: &str = "<134>1 ";
/// The largest firefly, in bytes: a packet of 1500 bytes without the headers of IPv6 and UDP.
pub const DATAGRAM_MAX: usize = 1452;
/// Which members of a relayed firefly are kept first when there is not room for all.
const KEPT_FIRST: [&str; 3] = ["netlink", "storage-stats", "skOps"];

/// Writes fireflies; keeps the times it last wrote, which often recur within a batch.
pub struct Encoder {
    /// What follows the time in the syslog header, if there is to be one.
    header: Option<String>,
    /// As JSON.
    application: String,
    current: PrintedTime,
    reported: PrintedTime,
    start: PrintedTime,
    end: PrintedTime,
    /// The spelling of `netlink`.
    enrichment: Option<Mode>,
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
            reported: PrintedTime::default(),
            start: PrintedTime::default(),
            end: PrintedTime::default(),
            enrichment: None,
        }
    }

    /// The same, which writes what the kernel knows of a flow's socket, too.
    pub fn enriched(self, enrichment: Option<Mode>) -> Encoder {
        Encoder { enrichment, ..self }
    }

    /// Appends the firefly of `event`, sent at `now`, to `out`, and returns how many of its members
    /// there was no room for: see [`FlowEvent::members`].
    ///
    /// The JSON is written piece by piece, at half the cost of a serializer: only the application can
    /// hold anything that needs escaping.
    pub fn encode(&mut self, event: &FlowEvent, now: Timestamp, out: &mut String) -> usize {
        let begin = out.len();
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
        let end = begin + DATAGRAM_MAX - 1;
        let mut left_out = put_members(&event.members, end, out);
        left_out += self.put_enrichment(event, end, out);
        out.push('}');
        left_out
    }
}

impl Encoder {
    /// What the producer of a relayed firefly says stands. Who asks for everything gets it, in a datagram
    /// of whatever size.
    fn put_enrichment(&self, event: &FlowEvent, end: usize, out: &mut String) -> usize {
        let Some(mode) = self.enrichment else {
            return 0;
        };
        let said = |key: &str| event.members.iter().any(|member| &*member.key == key);
        let mut left_out = 0;
        let mut put = |key: &str, put: &dyn Fn(usize, &mut String) -> usize| {
            let room = match mode {
                Mode::Full => usize::MAX,
                _ => end.saturating_sub(out.len() + key.len() + 4),
            };
            // Room for no field at all is no room.
            if room < 16 {
                left_out += 1;
                return;
            }
            // Writing to a String cannot fail.
            let _ = write!(out, ",\"{key}\":");
            left_out += put(room, out);
        };
        if let Some(socket) = event.netlink.as_deref().filter(|_| !said("netlink")) {
            put("netlink", &|room, out| {
                enrichment::put(mode, socket, room, out)
            });
        }
        if let Some(skops) = event.skops.as_deref().filter(|_| !said("skOps")) {
            put("skOps", &|room, out| {
                enrichment::put_skops(skops, room, out)
            });
        }
        left_out
    }
}

/// Each as long as it fits, the better known ones first; returns how many did not.
fn put_members(members: &[Member], end: usize, out: &mut String) -> usize {
    let rank = |member: &&Member| {
        let known = KEPT_FIRST.iter().position(|key| **key == *member.key);
        known.unwrap_or(KEPT_FIRST.len())
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
    quoted(cut(application))
}

/// As a JSON string.
fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("a string serializes")
}
