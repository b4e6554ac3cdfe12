//! The names of segments: `flows-20261124T171500Z.flowd`, with the time in UTC at which the segment begins. They are all the
//! index that there is, and sort by time.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

const FORMAT: &str = "flows-%Y%m%dT%H%M%SZ.flowd";

/// How many seconds before its segment begins, or after the next one begins, a record may have been received. Batches of
/// several threads are not in order, and a clock is corrected by small steps.
const TOLERANCE: i64 = 10;

/// The time at which a segment begins, which is its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName(i64);

impl SegmentName {
    /// The segment that begins at this time, which is cut to seconds. A time before 1970 counts as 1970.
    pub fn at(time: Timestamp) -> SegmentName {
        SegmentName(time.as_second().max(0))
    }

    /// The first segment of the interval that `time` is in. Intervals begin at multiples of `interval` since 1970.
    pub fn of_interval(time: Timestamp, interval: Duration) -> SegmentName {
        let SegmentName(second) = SegmentName::at(time);
        SegmentName(second - second % whole_seconds(interval))
    }

    /// The first segment of the interval after the one that this segment is in.
    pub fn next_interval(self, interval: Duration) -> SegmentName {
        let interval = whole_seconds(interval);
        let begin = self.0 - self.0 % interval;
        SegmentName(begin.saturating_add(interval))
    }

    /// Whether records that are received at `time` still go to this segment, which was the last one.
    pub(super) fn takes(self, time: Timestamp, interval: Duration) -> bool {
        let SegmentName(second) = SegmentName::at(time);
        second < self.next_interval(interval).0 && second >= self.0 - TOLERANCE
    }

    /// Whether no record is expected any more.
    pub(super) fn is_over(self, now: Timestamp, interval: Duration) -> bool {
        let end = self.next_interval(interval).0;
        SegmentName::at(now).0 >= end.saturating_add(TOLERANCE)
    }

    /// Reads a file name; `None` if the file is not a segment.
    pub fn parse(name: &OsStr) -> Option<SegmentName> {
        let name = name.to_str()?;
        let time = DateTime::strptime(FORMAT, name).ok()?;
        let time = TimeZone::UTC.to_timestamp(time).ok()?;
        let parsed = SegmentName(time.as_second());
        // Only names that the store gives: strptime accepts digits that are missing.
        (parsed.0 >= 0 && parsed.file_name() == name).then_some(parsed)
    }

    /// The name of the file.
    pub fn file_name(self) -> String {
        self.time().strftime(FORMAT).to_string()
    }

    /// When the segment begins.
    pub fn time(self) -> Timestamp {
        Timestamp::from_second(self.0).unwrap_or(Timestamp::MAX)
    }
}

/// An interval in seconds, at least 1.
fn whole_seconds(interval: Duration) -> i64 {
    i64::try_from(interval.as_secs()).unwrap_or(i64::MAX).max(1)
}

/// The segments in a directory, the oldest first.
pub fn list(directory: &Path) -> io::Result<Vec<SegmentName>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.extend(SegmentName::parse(&entry?.file_name()));
    }
    names.sort_unstable();
    Ok(names)
}

/// The paths of the segments in a directory that may have records received at or after `from` and before `to`, the oldest
/// first. With rotation by size, a clock that was set back by more than ten seconds may have put records elsewhere.
pub fn segments(
    directory: &Path,
    from: Option<Timestamp>,
    to: Option<Timestamp>,
) -> io::Result<Vec<PathBuf>> {
    let names = list(directory)?;
    let chosen = select(&names, from, to);
    let path = |name: &SegmentName| directory.join(name.file_name());
    Ok(chosen.iter().map(path).collect())
}

fn select(names: &[SegmentName], from: Option<Timestamp>, to: Option<Timestamp>) -> &[SegmentName] {
    // The last one that begins at the time or before has records of that time.
    let first = from.map_or(0, |from| {
        let from = SegmentName(from.as_second().saturating_sub(TOLERANCE));
        names
            .partition_point(|name| *name <= from)
            .saturating_sub(1)
    });
    let end = to.map_or(names.len(), |to| {
        let to = SegmentName(to.as_second().saturating_add(TOLERANCE));
        names.partition_point(|name| *name <= to)
    });
    names.get(first..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn parse(name: &str) -> Option<SegmentName> {
        SegmentName::parse(OsStr::new(name))
    }

    #[test]
    fn a_name_tells_when_its_interval_begins() {
        let name = |at: &str, seconds| {
            SegmentName::of_interval(time(at), Duration::from_secs(seconds)).file_name()
        };
        let at = "2026-11-24T17:17:03.9Z";
        assert_eq!(name(at, 300), "flows-20261124T171500Z.flowd");
        assert_eq!(name(at, 3600), "flows-20261124T170000Z.flowd");
        assert_eq!(name(at, 86400), "flows-20261124T000000Z.flowd");
        assert_eq!(name(at, 1), "flows-20261124T171703Z.flowd");
        assert_eq!(name(at, 0), "flows-20261124T171703Z.flowd");
        assert_eq!(
            name("1969-01-01T00:00:00Z", 60),
            "flows-19700101T000000Z.flowd"
        );
    }

    #[test]
    fn the_names_of_others_are_not_segments() {
        assert!(parse("flows-20261124T171500Z.flowd").is_some());
        for name in [
            "",
            "flows-20261124T171500Z.flowd.gz",
            "flows-20261124T171500Z.flow",
            "flows-20261124T171500.flowd",
            "flows-20261124T17150Z.flowd",
            "flows-20261124T171560Z.flowd",
            "flows-20261324T171500Z.flowd",
            "flows-+2026124T171500Z.flowd",
            "flows- 2026124T171500Z.flowd",
            "flows-19691231T235959Z.flowd",
            "FLOWS-20261124T171500Z.flowd",
            "nfcapd.202611241715",
        ] {
            assert_eq!(parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_period_is_in_the_segments_around_it() {
        let names: Vec<_> = [0, 300, 600, 900].map(SegmentName).into();
        let chosen = |from: Option<i64>, to: Option<i64>| {
            let at = |second: i64| Timestamp::from_second(second).unwrap();
            let chosen = select(&names, from.map(at), to.map(at));
            chosen.iter().map(|name| name.0).collect::<Vec<_>>()
        };
        assert_eq!(chosen(None, None), [0, 300, 600, 900]);
        assert_eq!(chosen(Some(400), Some(500)), [300]);
        // Within the tolerance of a boundary.
        assert_eq!(chosen(Some(305), Some(500)), [0, 300]);
        assert_eq!(chosen(Some(400), Some(595)), [300, 600]);
        assert_eq!(chosen(Some(5000), None), [900]);
        assert_eq!(chosen(None, Some(-100)), [0; 0]);
        assert_eq!(chosen(Some(500), Some(100)), [0; 0]);
        assert!(select(&[], Some(Timestamp::UNIX_EPOCH), None).is_empty());
    }

    #[test]
    fn other_files_in_the_directory_are_not_listed() {
        let dir = tempfile::tempdir().unwrap();
        let names = [
            "flows-20261124T171500Z.flowd",
            "flows-20261124T171000Z.flowd",
        ];
        for name in names.iter().chain(&["flows.flowd", "notes"]) {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let expected = [dir.path().join(names[1]), dir.path().join(names[0])];
        assert_eq!(segments(dir.path(), None, None).unwrap(), expected);
    }

    proptest! {
        #[test]
        fn a_name_reads_back_and_names_sort_by_time(
            a in 0i64..253_000_000_000, b in 0i64..253_000_000_000, interval in 1u64..1_000_000,
        ) {
            let at = |second| Timestamp::from_second(second).unwrap();
            let (first, second) = (SegmentName::at(at(a)), SegmentName::at(at(b)));
            prop_assert_eq!(parse(&first.file_name()), Some(first));
            prop_assert_eq!(first.cmp(&second), first.file_name().cmp(&second.file_name()));
            let interval = Duration::from_secs(interval);
            let begin = SegmentName::of_interval(at(a), interval);
            prop_assert!(begin <= first && first < begin.next_interval(interval));
            prop_assert_eq!(begin.0 % interval.as_secs() as i64, 0);
            prop_assert_eq!(first.next_interval(interval), begin.next_interval(interval));
        }

        #[test]
        fn any_name_makes_no_panic(name in ".*") {
            let _ = parse(&name);
        }
    }
}
