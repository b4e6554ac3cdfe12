//! Deletes the oldest segments: those that are older than `keep` says, and those that are more than it says.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use jiff::Timestamp;

use super::Settings;
use super::names::{self, SegmentName};
use crate::sys::directory::Directory;

/// What is kept of the segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    age: Option<Duration>,
    size: Option<u64>,
    interval: Duration,
}

/// What was deleted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Deleted {
    segments: u64,
    bytes: u64,
    /// Segments that could not be deleted.
    failed: u64,
}

/// Deletes segments in a thread of its own, so that a directory with a million files does not hold up the writer.
pub(super) struct Retention {
    directory: PathBuf,
    limits: Limits,
    running: Option<JoinHandle<()>>,
    started: Option<Timestamp>,
}

/// How often it runs while no segment is closed.
const PERIOD: Duration = Duration::from_secs(60);

impl Retention {
    /// `None` if everything is kept.
    pub(super) fn new(directory: &Path, settings: &Settings) -> Option<Retention> {
        let limits = Limits {
            age: settings.keep_age,
            size: settings.keep_size,
            interval: settings.rotate_interval,
        };
        (limits.age.is_some() || limits.size.is_some()).then(|| Retention {
            directory: directory.to_owned(),
            limits,
            running: None,
            started: None,
        })
    }

    /// Starts it if it has not run for a minute, or for longer than that is to come.
    pub(super) fn tick(&mut self, written: Option<SegmentName>, now: Timestamp) {
        let due = self
            .started
            .is_none_or(|started| now.duration_since(started).unsigned_abs() >= PERIOD);
        if due {
            self.start(written, now);
        }
    }

    /// Starts it, unless it still runs. The segment `written` is kept.
    pub(super) fn start(&mut self, written: Option<SegmentName>, now: Timestamp) {
        if self.running.as_ref().is_some_and(|run| !run.is_finished()) {
            return;
        }
        self.started = Some(now);
        let (path, limits) = (self.directory.clone(), self.limits);
        let run = move || {
            let shown = path.display();
            match Directory::open(&path).and_then(|open| sweep(&open, limits, written, now)) {
                Ok(deleted) => {
                    let Deleted {
                        segments,
                        bytes,
                        failed,
                    } = deleted;
                    if segments > 0 {
                        log::info!(
                            "store {shown}: deleted the oldest segments: {segments}, with {bytes} bytes"
                        );
                    }
                    if failed > 0 {
                        log::warn!("store {shown}: segments that could not be deleted: {failed}");
                    }
                }
                Err(error) => log::warn!("store {shown}: {error}; no old segments are deleted"),
            }
        };
        let thread = thread::Builder::new().name("retention".to_owned());
        match thread.spawn(run) {
            Ok(run) => self.running = Some(run),
            Err(error) => log::warn!("retention of segments: {error}"),
        }
    }
}

/// Deletes what the limits do not allow, the oldest first. Keeps the segment that is `written`, and the newest.
fn sweep(
    directory: &Directory,
    limits: Limits,
    written: Option<SegmentName>,
    now: Timestamp,
) -> io::Result<Deleted> {
    let names = names::list(&directory.proc_path(""))?;
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        match fs::symlink_metadata(directory.proc_path(name.file_name())) {
            Ok(file) if file.is_file() => {
                let changed = file
                    .modified()
                    .ok()
                    .and_then(|t| Timestamp::try_from(t).ok());
                found.push((name, file.len(), changed));
            }
            Ok(_) => {}
            // Someone else deletes, too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let mut total: u64 = found.iter().map(|(_, length, _)| length).sum();
    let newest = found.last().map(|(name, ..)| *name);
    let mut deleted = Deleted::default();
    for (name, length, changed) in found {
        // The interval may have been longer when the segment was written; the time of its last change may be that of a copy.
        let end = name.next_interval(limits.interval).time();
        let end = changed.map_or(end, |changed| changed.max(end));
        let old = limits.age.is_some_and(|age| {
            Duration::try_from(now.duration_since(end)).is_ok_and(|since| since > age)
        });
        let many = limits.size.is_some_and(|size| total > size);
        if !(old || many) || Some(name) == written || Some(name) == newest {
            continue;
        }
        match directory.remove(name.file_name()) {
            Ok(()) => {
                deleted.segments += 1;
                deleted.bytes += length;
                total -= length;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => total -= length,
            Err(_) => deleted.failed += 1,
        }
    }
    Ok(deleted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs::{File, FileTimes};

    fn time(text: &str) -> Timestamp {
        format!("2026-11-24T{text}Z").parse().unwrap()
    }

    fn name(text: &str) -> SegmentName {
        SegmentName::at(time(text))
    }

    /// A directory with segments of 100 bytes that were last changed when their interval of five minutes ended.
    fn directory(times: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for begin in times {
            let file = File::create(dir.path().join(name(begin).file_name())).unwrap();
            file.set_len(100).unwrap();
            let changed = time(begin) + Duration::from_secs(300);
            let changed = FileTimes::new().set_modified(changed.into());
            file.set_times(changed).unwrap();
        }
        dir
    }

    fn swept(
        dir: &Path,
        age: Option<u64>,
        size: Option<u64>,
        written: Option<&str>,
        now: &str,
    ) -> (Deleted, Vec<SegmentName>) {
        let limits = Limits {
            age: age.map(Duration::from_secs),
            size,
            interval: Duration::from_secs(300),
        };
        let open = Directory::open(dir).unwrap();
        let deleted = sweep(&open, limits, written.map(name), time(now)).unwrap();
        (deleted, names::list(dir).unwrap())
    }

    const TIMES: [&str; 4] = ["17:00:00", "17:05:00", "17:10:00", "17:15:00"];

    #[test]
    fn a_segment_is_deleted_when_its_last_record_has_the_age() {
        let dir = directory(&TIMES);
        let newest = Some("17:15:00");
        let (deleted, kept) = swept(dir.path(), Some(600), None, newest, "17:20:00");
        assert_eq!((deleted.segments, kept.len()), (1, 3));
        assert_eq!(kept[0], name("17:05:00"));
        // One that was changed later is not old yet.
        let file = File::open(dir.path().join(name("17:05:00").file_name())).unwrap();
        let changed = FileTimes::new().set_modified(time("17:18:00").into());
        file.set_times(changed).unwrap();
        let (_, kept) = swept(dir.path(), Some(600), None, newest, "17:27:00");
        assert_eq!(kept, [name("17:05:00"), name("17:15:00")]);
        // The newest stays, whatever its age.
        let (_, kept) = swept(dir.path(), Some(600), None, None, "23:00:00");
        assert_eq!(kept, [name("17:15:00")]);
    }

    #[test]
    fn the_oldest_are_deleted_until_the_rest_has_the_size() {
        let dir = directory(&TIMES);
        let (deleted, kept) = swept(dir.path(), None, Some(250), None, "17:20:00");
        let expected = Deleted {
            segments: 2,
            bytes: 200,
            failed: 0,
        };
        assert_eq!((deleted, kept.len()), (expected, 2));
        assert_eq!(kept[0], name("17:10:00"));
        let (deleted, _) = swept(dir.path(), None, Some(200), None, "17:20:00");
        assert_eq!(deleted, Deleted::default());
        // One that is written stays, also if it is not the newest.
        let (_, kept) = swept(dir.path(), None, Some(0), Some("17:10:00"), "17:20:00");
        assert_eq!(kept, [name("17:10:00"), name("17:15:00")]);
    }

    #[test]
    fn only_files_with_names_of_segments_are_deleted() {
        let dir = directory(&TIMES);
        let others = ["notes", "flows-20200101T000000Z.flowd.gz", "flows.flowd"];
        for other in others {
            std::fs::write(dir.path().join(other), "").unwrap();
        }
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("flows-20200101T000000Z.flowd")).unwrap();
        let link = path("flows-20200102T000000Z.flowd");
        std::os::unix::fs::symlink(path("notes"), &link).unwrap();
        swept(dir.path(), Some(1), Some(1), None, "23:00:00");
        let left = std::fs::read_dir(dir.path()).unwrap();
        let left: BTreeSet<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left.len(), others.len() + 3, "{left:?}");
    }

    #[test]
    fn it_runs_once_a_minute_and_when_a_segment_was_begun() {
        let dir = directory(&TIMES);
        let settings = Settings {
            target: super::super::Target::Directory(dir.path().to_owned()),
            rotate_interval: Duration::from_secs(300),
            rotate_size: None,
            keep_age: None,
            keep_size: Some(250),
            fields: super::super::Fields::ALL,
            compatible: false,
            log_socket: None,
            max_waiting: 0,
        };
        let mut retention = Retention::new(dir.path(), &settings).unwrap();
        let mut finished = |run: &dyn Fn(&mut Retention)| {
            run(&mut retention);
            if let Some(thread) = retention.running.take() {
                thread.join().unwrap();
            }
            names::list(dir.path()).unwrap().len()
        };
        assert_eq!(finished(&|it| it.tick(None, time("17:20:00"))), 2);
        File::create(dir.path().join(name("17:20:00").file_name()))
            .and_then(|file| file.set_len(100))
            .unwrap();
        assert_eq!(finished(&|it| it.tick(None, time("17:20:59"))), 3);
        assert_eq!(finished(&|it| it.start(None, time("17:20:59"))), 2);
        let unlimited = Settings {
            keep_size: None,
            ..settings
        };
        assert!(Retention::new(dir.path(), &unlimited).is_none());
    }
}
