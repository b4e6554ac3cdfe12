//! `--from` and `--to`: the period in which records were received.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};

use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// A period; an end that is not given is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Period {
    pub from: Option<Timestamp>,
    /// The first moment after it.
    pub to: Option<Timestamp>,
}

impl Period {
    /// Whether the record was received in the period. A record without this time counts by the exporter's clock, and
    /// without that one it is in an open period alone.
    pub fn contains(&self, record: &FlowRecord, fields: Fields) -> bool {
        if self.from.is_none() && self.to.is_none() {
            return true;
        }
        let time = if fields.contains(Fields::RECV_TIME) {
            microseconds(record.received_s, record.received_us)
        } else if fields.contains(Fields::AGENT_INFO) {
            microseconds(record.exporter_s, record.exporter_ns / 1000)
        } else {
            return false;
        };
        self.from.is_none_or(|from| from.as_microsecond() <= time)
            && self.to.is_none_or(|to| time < to.as_microsecond())
    }
}

fn microseconds(seconds: u32, microseconds: u32) -> i64 {
    i64::from(seconds) * 1_000_000 + i64::from(microseconds)
}

/// Reads a time: RFC 3339 with an offset, local without one, or so long before `now`: `-1h30m`.
pub fn time(text: &str, now: &Zoned) -> Result<Timestamp, String> {
    let relative = || {
        let span: Span = text.starts_with('-').then(|| text.parse().ok())??;
        Some(now.checked_add(span).ok()?.timestamp())
    };
    let local = || {
        let time: DateTime = text.parse().ok()?;
        let zoned = time.to_zoned(now.time_zone().clone()).ok()?;
        Some(zoned.timestamp())
    };
    let time = text.parse().ok().or_else(relative).or_else(local);
    time.ok_or_else(|| {
        format!(
            "\"{}\" is not a time, expected 2026-11-24T17:00:00Z, 2026-11-24T17:00 (local time) or -1h30m (before now)",
            text.escape_debug()
        )
    })
}

/// Prints seconds as `2026-11-24T17:00:00`, in UTC or local time.
pub struct Clock {
    zone: TimeZone,
    second: Option<u32>,
    text: String,
}

impl Clock {
    pub fn new(zone: TimeZone) -> Clock {
        Clock {
            zone,
            second: None,
            text: String::new(),
        }
    }

    /// Many records in a row have the same second.
    pub fn text(&mut self, second: u32) -> &str {
        if self.second != Some(second) {
            let time = Timestamp::from_second(second.into()).unwrap_or_default();
            let time = time.to_zoned(self.zone.clone());
            self.text = time.strftime("%Y-%m-%dT%H:%M:%S").to_string();
            self.second = Some(second);
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_absolute_local_or_relative() {
        let zone = TimeZone::get("Europe/Zurich").unwrap();
        let now: Timestamp = "2026-11-24T17:00:00Z".parse().unwrap();
        let now = now.to_zoned(zone);
        for (text, expected) in [
            ("2026-11-24T12:00:00Z", "2026-11-24T12:00:00Z"),
            ("2026-11-24T12:00:00.5+02:00", "2026-11-24T10:00:00.5Z"),
            ("2026-11-24T12:00:00", "2026-11-24T11:00:00Z"),
            ("2026-07-24 12:00", "2026-07-24T10:00:00Z"),
            ("2026-11-24", "2026-11-23T23:00:00Z"),
            ("-1h", "2026-11-24T16:00:00Z"),
            ("-1h30m", "2026-11-24T15:30:00Z"),
            ("-90s", "2026-11-24T16:58:30Z"),
            // Over the change of the clocks, a day has 25 hours.
            ("-60d", "2026-09-25T16:00:00Z"),
        ] {
            let expected: Timestamp = expected.parse().unwrap();
            assert_eq!(time(text, &now), Ok(expected), "{text}");
        }
        for text in ["", "1h", "-", "-1", "yesterday", "2026-13-01", "-999999y"] {
            assert!(time(text, &now).is_err(), "{text}");
        }
    }

    #[test]
    fn a_period_includes_its_start_and_not_its_end() {
        let time = |text: &str| Some(text.parse().unwrap());
        let period = Period {
            from: time("1970-01-01T00:00:10Z"),
            to: time("1970-01-01T00:00:20Z"),
        };
        let at = |received_s, received_us| FlowRecord {
            received_s,
            received_us,
            exporter_s: 15,
            ..FlowRecord::default()
        };
        let is_in = |s, us| period.contains(&at(s, us), Fields::RECV_TIME);
        assert!(is_in(10, 0) && is_in(19, 999_999));
        assert!(!is_in(9, 999_999) && !is_in(20, 0));
        assert!(period.contains(&at(0, 0), Fields::AGENT_INFO));
        assert!(!period.contains(&at(15, 0), Fields::OCTETS));
        assert!(Period::default().contains(&at(0, 0), Fields::NONE));
    }
}
