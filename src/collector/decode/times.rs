//! Times of flows: exporters tell them in their uptime, which wraps after 49.7 days, or in several absolute forms.
//!
//! A time outside of [`EARLIEST_MS`] to [`LATEST_MS`] is that of a clock that was never set, or nonsense: it counts as unknown.

use crate::collector::record::FlowRecord;

/// 1996-01-01, when there was no NetFlow yet.
pub const EARLIEST_MS: u64 = 820_454_400_000;
/// The last millisecond that 32 bits of UNIX seconds can tell, in 2106.
pub const LATEST_MS: u64 = u32::MAX as u64 * 1000 + 999;
/// Seconds from 1900, where NTP starts, to 1970.
const NTP_TO_UNIX_S: u32 = 2_208_988_800;
/// A packet that an exporter saw up to this long after it filled in the header of its datagram is no packet from before the last
/// wrap of the uptime.
const MAX_AHEAD_MS: u32 = 3_600_000;

/// The time, or 0 if it cannot be true.
pub fn plausible(ms: u64) -> u64 {
    if (EARLIEST_MS..=LATEST_MS).contains(&ms) {
        ms
    } else {
        0
    }
}

/// The clocks at the time of a datagram.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    /// The exporter's clock when it sent the datagram, UNIX milliseconds. Where that clock was never set, the time of arrival.
    pub export_ms: u64,
    /// The exporter's uptime at that time; `None` if it did not tell it.
    pub uptime_ms: Option<u32>,
    /// When the datagram arrived, UNIX seconds.
    pub received_s: u32,
}

impl Clocks {
    /// `exporter_ms` is the exporter's clock, as it came; `received` the time of arrival in seconds and microseconds.
    pub fn new(exporter_ms: u64, uptime_ms: Option<u32>, received: (u32, u32)) -> Clocks {
        let received_ms = u64::from(received.0) * 1000 + u64::from(received.1) / 1000;
        let is_set = plausible(exporter_ms) != 0;
        Clocks {
            export_ms: if is_set { exporter_ms } else { received_ms },
            uptime_ms,
            received_s: received.0,
        }
    }

    /// These clocks, with the uptime of an exporter that started at `init_ms`.
    pub fn since_start(self, init_ms: u64) -> Clocks {
        let started = plausible(init_ms) != 0 && init_ms <= self.export_ms;
        // The low 32 bits, as the exporter's own counter has them.
        let uptime_ms = started.then(|| (self.export_ms - init_ms) as u32);
        Clocks { uptime_ms, ..self }
    }

    /// When the exporter had been up for `at_ms`, UNIX milliseconds; 0 if unknown, or `at_ms` is 0.
    pub fn at_uptime(&self, at_ms: u32) -> u64 {
        let Some(uptime_ms) = self.uptime_ms.filter(|_| at_ms != 0) else {
            return 0;
        };
        let ahead = at_ms.wrapping_sub(uptime_ms);
        plausible(if ahead <= MAX_AHEAD_MS {
            self.export_ms + u64::from(ahead)
        } else {
            let age = uptime_ms.wrapping_sub(at_ms);
            self.export_ms.saturating_sub(u64::from(age))
        })
    }

    /// `us` before the datagram was sent.
    pub fn before_export(&self, us: u64) -> u64 {
        plausible(self.export_ms.saturating_sub(us / 1000))
    }

    /// An NTP time, of the era that is nearest to the time of arrival.
    pub fn ntp(&self, time: u64) -> u64 {
        if time == 0 {
            return 0;
        }
        let (seconds, fraction) = ((time >> 32) as u32, time & 0xffff_ffff);
        let now = self.received_s.wrapping_add(NTP_TO_UNIX_S);
        let ahead = seconds.wrapping_sub(now) as i32;
        let unix_s = i64::from(self.received_s) + i64::from(ahead);
        u64::try_from(unix_s).map_or(0, |s| plausible(s * 1000 + ((fraction * 1000) >> 32)))
    }
}

/// Fills in the times that the exporter told in its uptime alone. Afterwards both times are known or neither, and the end is not before
/// the start.
pub fn settle(record: &mut FlowRecord, clocks: &Clocks) {
    if record.start_ms == 0 {
        record.start_ms = clocks.at_uptime(record.start_uptime_ms);
    }
    if record.end_ms == 0 {
        record.end_ms = clocks.at_uptime(record.end_uptime_ms);
    }
    if record.end_ms == 0 {
        record.end_ms = record.start_ms;
    }
    if record.start_ms == 0 || record.start_ms > record.end_ms {
        record.start_ms = record.end_ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_S: u32 = 1_700_000_000;
    const NOW_MS: u64 = 1_700_000_000_000;

    fn clocks(uptime_ms: u32) -> Clocks {
        Clocks::new(NOW_MS, Some(uptime_ms), (NOW_S, 0))
    }

    #[test]
    fn the_uptime_wraps() {
        assert_eq!(clocks(100_000).at_uptime(40_000), NOW_MS - 60_000);
        // The first packet came before the wrap.
        assert_eq!(clocks(500).at_uptime(u32::MAX - 499), NOW_MS - 1000);
        // The last packet came after the header was filled in.
        assert_eq!(clocks(500).at_uptime(700), NOW_MS + 200);
        assert_eq!(clocks(u32::MAX).at_uptime(99), NOW_MS + 100);
        // A flow of 49 days.
        let age = 49 * 86_400_000;
        assert_eq!(clocks(age + 5).at_uptime(5), NOW_MS - u64::from(age));
        assert_eq!(clocks(0).at_uptime(0), 0);
    }

    #[test]
    fn an_uptime_is_known_by_the_start_of_the_exporter() {
        let clocks = Clocks::new(NOW_MS, None, (NOW_S, 0));
        assert_eq!(clocks.at_uptime(5), 0);
        let up_for = 60 * 86_400_000_u64;
        let started = clocks.since_start(NOW_MS - up_for);
        assert_eq!(started.at_uptime((up_for - 1000) as u32), NOW_MS - 1000);
        for init in [0, NOW_MS + 1, u64::MAX] {
            assert_eq!(clocks.since_start(init).at_uptime(5), 0);
        }
    }

    #[test]
    fn a_clock_that_was_never_set_does_not_date_a_flow_to_1970() {
        for clock in [0, 86_400_000, u64::MAX] {
            let clocks = Clocks::new(clock, Some(5000), (NOW_S, 500_000));
            assert_eq!(clocks.at_uptime(4000), NOW_MS + 500 - 1000);
        }
        let nothing = Clocks::new(0, Some(5000), (0, 0));
        assert_eq!(nothing.at_uptime(4000), 0);
    }

    #[test]
    fn ntp_times_are_of_the_nearest_era() {
        let at = |unix_s: u32, ntp: u64| Clocks::new(0, None, (unix_s, 0)).ntp(ntp);
        let ntp = |unix_s: u64| (unix_s + u64::from(NTP_TO_UNIX_S)) << 32;
        assert_eq!(at(NOW_S, ntp(1_699_999_990)), 1_699_999_990_000);
        assert_eq!(at(NOW_S, ntp(1_699_999_990) | 1 << 31), 1_699_999_990_500);
        // NTP's seconds wrap on 7 February 2036, UNIX second 2,085,978,496.
        assert_eq!(at(2_085_978_500, ntp(2_085_978_490)), 2_085_978_490_000);
        assert_eq!(at(2_085_978_490, 10 << 32), 2_085_978_506_000);
        assert_eq!(at(NOW_S, 0), 0);
        assert_eq!(at(NOW_S, ntp(0)), 0);
    }

    #[test]
    fn both_times_are_known_or_neither() {
        let times = |start_ms, end_ms, first, last| {
            let mut record = FlowRecord {
                start_ms,
                end_ms,
                start_uptime_ms: first,
                end_uptime_ms: last,
                ..FlowRecord::default()
            };
            settle(&mut record, &clocks(10_000));
            (record.start_ms, record.end_ms)
        };
        assert_eq!(times(0, 0, 0, 0), (0, 0));
        assert_eq!(times(0, 0, 8000, 9000), (NOW_MS - 2000, NOW_MS - 1000));
        assert_eq!(times(0, 0, 9000, 8000), (NOW_MS - 2000, NOW_MS - 2000));
        assert_eq!(times(0, 0, 0, 9000), (NOW_MS - 1000, NOW_MS - 1000));
        assert_eq!(times(0, 0, 9000, 0), (NOW_MS - 1000, NOW_MS - 1000));
        assert_eq!(times(NOW_MS, 0, 0, 0), (NOW_MS, NOW_MS));
        assert_eq!(times(NOW_MS, NOW_MS - 1, 9, 9), (NOW_MS - 1, NOW_MS - 1));
    }
}
