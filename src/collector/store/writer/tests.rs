use super::*;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;
use crate::collector::store::segment::{decode, encode};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use tempfile::TempDir;

/// A record of 20 bytes.
fn record(tag: u32) -> Vec<u8> {
    record_at(tag, 0)
}

/// A record of 20 bytes with this receive time.
fn record_at(tag: u32, received_s: u32) -> Vec<u8> {
    let record = FlowRecord {
        rule_tag: Some(tag),
        received_s,
        ..FlowRecord::default()
    };
    let mut bytes = Vec::new();
    encode(&record, Fields::TAG | Fields::RECV_TIME, &mut bytes);
    assert_eq!(bytes.len(), 20);
    bytes
}

/// A record with every field of IPv6.
fn long_record() -> Vec<u8> {
    let address = Some("2001:db8::1".parse().unwrap());
    let record = FlowRecord {
        exporter: "2001:db8::2".parse().unwrap(),
        source: address,
        destination: address,
        next_hop: address,
        rule_tag: Some(9),
        flow_label: Some(0xfffff),
        start_ms: 1,
        end_ms: 2,
        octets: u64::MAX,
        ..FlowRecord::default()
    };
    let mut bytes = Vec::new();
    encode(&record, Fields::ALL, &mut bytes);
    bytes
}

fn settings(target: Target) -> Settings {
    Settings {
        target,
        rotate_interval: Duration::from_secs(300),
        rotate_size: None,
        keep_age: None,
        keep_size: None,
        fields: Fields::ALL,
        compatible: false,
        log_socket: None,
        max_waiting: 1 << 20,
    }
}

/// A directory that the store may write to, and does not exist yet.
fn directory() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    (dir, path)
}

fn at(time: &str) -> Timestamp {
    format!("2026-11-24T{time}Z").parse().unwrap()
}

fn open(settings: &Settings, time: &str) -> Store {
    Store::open(settings, at(time)).unwrap()
}

/// The times of the segments in a directory, as hhmmss, with the lengths.
fn segments(path: &Path) -> Vec<(String, u64)> {
    let names = names::list(path).unwrap();
    let found = names.iter().map(|name| {
        let file = name.file_name();
        let length = fs::metadata(path.join(&file)).unwrap().len();
        (file[15..21].to_owned(), length)
    });
    found.collect()
}

fn listed<const N: usize>(expected: [(&str, u64); N]) -> Vec<(String, u64)> {
    expected
        .map(|(name, length)| (name.to_owned(), length))
        .into()
}

#[test]
fn a_segment_begins_with_its_interval_and_a_restart_goes_on_with_it() {
    let (_dir, path) = directory();
    let settings = settings(Target::Directory(path.clone()));
    let batch = record(1);
    let mut store = open(&settings, "17:16:40");
    store.append(&batch, at("17:17:00")).unwrap();
    store.close().unwrap();
    let mut store = open(&settings, "17:18:00");
    for time in ["17:19:59.999", "17:20:00", "17:24:59", "18:00:01"] {
        store.append(&batch, at(time)).unwrap();
    }
    let expected = listed([("171500", 40), ("172000", 40), ("180000", 20)]);
    assert_eq!(segments(&path), expected);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path) & !0o750, 0);
    assert_eq!(mode(store.path().unwrap()) & !0o640, 0);
}

#[test]
fn records_that_waited_go_to_the_segment_of_their_time() {
    let (_dir, path) = directory();
    let settings = settings(Target::Directory(path.clone()));
    let mut store = open(&settings, "17:15:00");
    let batch = record(1);
    // The interval of the open segment is over; then come the records that waited, then a small step of the clock.
    store.tick(at("17:25:00"));
    assert_eq!(store.path(), None);
    store.append(&[], at("17:25:00")).unwrap();
    assert_eq!(store.path(), None);
    for time in ["17:19:00", "17:20:00", "17:25:00", "17:24:55", "17:25:01"] {
        store.append(&batch, at(time)).unwrap();
    }
    store.tick(at("17:30:05"));
    assert!(store.path().is_some());
    let expected = listed([("171500", 20), ("172000", 20), ("172500", 60)]);
    assert_eq!(segments(&path), expected);
    // A step of the clock by an hour.
    store.append(&batch, at("16:25:01")).unwrap();
    store.append(&batch, at("17:26:00")).unwrap();
    assert_eq!(segments(&path)[0], ("162500".to_owned(), 20));
    assert_eq!(segments(&path)[3], ("172500".to_owned(), 80));
}

#[test]
fn a_full_segment_is_followed_by_one_with_the_time_at_which_that_begins() {
    let (_dir, path) = directory();
    let mut settings = settings(Target::Directory(path.clone()));
    settings.rotate_size = Some(40);
    let mut store = open(&settings, "17:15:00");
    let batch = record(1);
    let times = [
        "17:15:01", "17:15:02", "17:15:03", "17:15:03", "17:15:03", "17:15:04",
    ];
    for time in times {
        store.append(&batch, at(time)).unwrap();
    }
    let mut expected = listed([("171500", 40), ("171503", 60), ("171504", 20)]);
    assert_eq!(segments(&path), expected);
    drop(store);
    // A restart goes on with the last one.
    let mut store = open(&settings, "17:16:00");
    store.append(&batch, at("17:16:01")).unwrap();
    expected[2].1 = 40;
    assert_eq!(segments(&path), expected);
    drop(store);
    let mut store = open(&settings, "17:17:00");
    store.append(&batch, at("17:17:01")).unwrap();
    store.append(&batch, at("17:20:00")).unwrap();
    expected.extend(listed([("171700", 20), ("172000", 20)]));
    assert_eq!(segments(&path), expected);
}

#[test]
fn a_file_torn_at_any_byte_of_its_last_record_is_cut_to_whole_records() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let settings = settings(Target::File(path.clone()));
    let many: Vec<u8> = (0..60_000).flat_map(record).collect();
    assert!(many.len() > 1 << 20);
    // Behind more than is read at once, some lengths do.
    for (before, step) in [(&[][..], 1), (&record(7), 1), (&many, 17)] {
        let last = long_record();
        for torn in (1..last.len()).step_by(step) {
            fs::write(&path, [before, &last[..torn]].concat()).unwrap();
            let mut store = open(&settings, "17:15:00");
            assert_eq!(fs::metadata(&path).unwrap().len(), before.len() as u64);
            store.append(&last, at("17:15:00")).unwrap();
            assert!(fs::read(&path).unwrap() == [before, &last].concat());
        }
        fs::write(&path, [before, &last].concat()).unwrap();
        open(&settings, "17:15:00");
        assert_eq!(
            fs::metadata(&path).unwrap().len(),
            (before.len() + last.len()) as u64
        );
    }
}

#[test]
fn blocks_of_zeros_after_a_crash_are_cut_and_damage_within_a_file_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let settings = settings(Target::File(path.clone()));
    let length = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        open(&settings, "17:15:00");
        fs::metadata(&path).unwrap().len()
    };
    let one = record(1);
    let zeros = vec![0; 3 << 20];
    assert_eq!(length(&zeros), 0);
    assert_eq!(length(&[&one[..], &zeros].concat()), 20);
    let mut damaged = one.clone();
    damaged[0] = 0xff;
    assert_eq!(length(&[&one[..], &damaged, &one].concat()), 60);
    assert_eq!(length(&[&one[..], &damaged].concat()), 20);
}

#[test]
fn the_newest_segment_is_repaired_after_its_interval_too() {
    let (_dir, path) = directory();
    let settings = settings(Target::Directory(path.clone()));
    open(&settings, "17:15:00");
    let segment = path.join("flows-20261124T171500Z.flowd");
    fs::write(&segment, &[record(1), record(2)].concat()[..39]).unwrap();
    open(&settings, "17:20:00");
    assert_eq!(segments(&path), listed([("171500", 20), ("172000", 0)]));
}

#[test]
fn a_file_of_another_kind_is_not_written_to() {
    let (dir, path) = directory();
    let text = "root:x:0:0:root:/root:/bin/bash\n".repeat(100);
    let file = dir.path().join("passwd");
    fs::write(&file, &text).unwrap();
    let opened = Store::open(&settings(Target::File(file.clone())), at("17:15:00"));
    let error = opened.err().unwrap().to_string();
    assert!(error.contains("passwd: has no record of flows"), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
    // Among the segments it is put aside.
    fs::create_dir(&path).unwrap();
    let segment = path.join("flows-20261124T171500Z.flowd");
    fs::write(&segment, &text).unwrap();
    let mut store = open(&settings(Target::Directory(path.clone())), "17:15:00");
    store.append(&record(1), at("17:15:00")).unwrap();
    assert_eq!(segments(&path), listed([("171500", 20)]));
    let aside = fs::read_to_string(segment.with_extension("flowd.unreadable")).unwrap();
    assert_eq!(aside, text);
}

#[test]
fn a_file_that_was_renamed_is_written_until_it_is_reopened() {
    let dir = tempfile::tempdir().unwrap();
    let (path, old) = (dir.path().join("flows"), dir.path().join("flows.0"));
    let mut store = open(&settings(Target::File(path.clone())), "17:15:00");
    store.append(&record(1), at("17:15:00")).unwrap();
    fs::rename(&path, &old).unwrap();
    store.append(&record(2), at("18:15:00")).unwrap();
    store.reopen().unwrap();
    store.append(&record(3), at("18:15:01")).unwrap();
    assert_eq!(fs::read(&old).unwrap(), [record(1), record(2)].concat());
    assert_eq!(fs::read(&path).unwrap(), record(3));
    // Where it cannot be opened, the old one goes on.
    fs::rename(&path, &old).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(store.reopen().is_err());
    store.append(&record(4), at("18:15:02")).unwrap();
    assert_eq!(fs::read(&old).unwrap(), [record(3), record(4)].concat());
}

#[test]
fn a_deleted_segment_and_a_directory_that_vanished_are_created_again() {
    let (_dir, path) = directory();
    let settings = settings(Target::Directory(path.clone()));
    let mut store = open(&settings, "17:15:00");
    let batch = record(1);
    store.append(&batch, at("17:15:00")).unwrap();
    fs::remove_file(store.path().unwrap()).unwrap();
    store.append(&batch, at("17:15:01")).unwrap();
    assert_eq!(segments(&path), listed([("171500", 20)]));
    fs::remove_dir_all(&path).unwrap();
    store.append(&batch, at("17:15:02")).unwrap();
    assert_eq!(segments(&path), listed([("171500", 20)]));
    // At a rotation, in a directory that was replaced.
    fs::rename(&path, path.with_extension("old")).unwrap();
    fs::create_dir(&path).unwrap();
    store.append(&batch, at("17:20:00")).unwrap();
    assert_eq!(segments(&path), listed([("172000", 20)]));
}

#[test]
fn while_the_directory_cannot_be_created_a_batch_may_be_tried_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("volume/flows");
    fs::create_dir(path.parent().unwrap()).unwrap();
    let settings = settings(Target::Directory(path.clone()));
    let mut store = open(&settings, "17:15:00");
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    for _ in 0..3 {
        let error = store.append(&record(1), at("17:15:00")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let message = error.to_string();
        assert!(message.contains("/volume: No such file"), "{message}");
    }
    let error = Store::open(&settings, at("17:15:00")).err().unwrap();
    assert!(error.to_string().contains("/volume: No such file"));
    fs::create_dir(path.parent().unwrap()).unwrap();
    store.append(&record(1), at("17:15:00")).unwrap();
    assert_eq!(segments(&path), listed([("171500", 20)]));
}

/// A small file system, unmounted on drop.
struct Tmpfs<'a>(&'a Path);

impl Tmpfs<'_> {
    fn mount(path: &Path) -> Tmpfs<'_> {
        let options = Some("size=64k");
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            MsFlags::empty(),
            options,
        )
        .unwrap();
        Tmpfs(path)
    }

    fn remount(&self, flags: MsFlags) -> nix::Result<()> {
        let none = None::<&str>;
        mount(none, self.0, none, MsFlags::MS_REMOUNT | flags, none)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
#[ignore = "needs root"]
fn on_a_full_disk_a_batch_is_backed_out_whole_and_written_once_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(dir.path());
    let (path, other) = (dir.path().join("flows"), dir.path().join("other"));
    let settings = settings(Target::Directory(path.clone()));
    let mut store = open(&settings, "17:15:00");
    // Neither fills pages: a write of the last one is short.
    let batch = record(1).repeat(500);
    fs::write(&other, vec![0; 24 << 10]).unwrap();
    let mut written = 0;
    let error = loop {
        match store.append(&batch, at("17:15:00")) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::StorageFull);
    let name = "flows/flows-20261124T171500Z.flowd: No space left on device";
    assert!(error.to_string().contains(name), "{error}");
    let length = |batches: usize| vec![("171500".to_owned(), (batches * batch.len()) as u64)];
    assert_eq!(segments(&path), length(written));
    for _ in 0..10 {
        assert!(store.append(&batch, at("17:15:01")).is_err());
        assert_eq!(segments(&path), length(written));
    }
    fs::remove_file(&other).unwrap();
    store.append(&batch, at("17:15:02")).unwrap();
    assert_eq!(segments(&path), length(written + 1));
    store.close().unwrap();
    // No segment can be begun on a file system that is read-only, and none is lost.
    let mut store = open(&settings, "17:16:00");
    store.tick(at("17:26:00"));
    disk.remount(MsFlags::MS_RDONLY).unwrap();
    let error = store.append(&batch, at("17:26:00")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
    disk.remount(MsFlags::empty()).unwrap();
    store.append(&batch, at("17:16:00")).unwrap();
    assert_eq!(segments(&path), length(written + 2));
}

#[test]
#[ignore = "needs root"]
fn when_the_disk_was_replaced_the_store_leaves_the_one_that_failed() {
    let dir = tempfile::tempdir().unwrap();
    let full = Tmpfs::mount(dir.path());
    let path = dir.path().join("flows");
    let mut store = open(&settings(Target::Directory(path.clone())), "17:15:00");
    let batch = record(1).repeat(5000);
    assert!(store.append(&batch, at("17:15:00")).is_err());
    drop(full);
    let _empty = Tmpfs::mount(dir.path());
    store.append(&record(1), at("17:15:00")).unwrap();
    assert_eq!(segments(&path), listed([("171500", 20)]));
}

#[test]
fn part_of_a_batch_that_could_not_be_removed_is_removed_before_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flows");
    let mut store = open(&settings(Target::File(path.clone())), "17:15:00");
    store.append(&record(1), at("17:15:00")).unwrap();
    // As the failed attempt leaves it.
    let current = store.current.as_mut().unwrap();
    current.file.write_all(&record(2)[..11]).unwrap();
    (current.failed, current.torn_at) = (true, Some(20));
    store.append(&record(2), at("17:15:01")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [record(1), record(2)].concat());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the order of times, restarts and ticks: every batch is stored once, in a segment of its time. With rotation by
    /// size, as long as the clock is not set back by more than the tolerance: a segment that is begun between two others cuts
    /// the time of the first.
    #[test]
    fn every_batch_is_in_a_segment_of_its_time(
        steps in prop::collection::vec((-40i64..400, 0i64..10, 0u8..8), 1..60), size in prop::option::of(1u64..200),
    ) {
        let (_dir, path) = directory();
        let mut settings = settings(Target::Directory(path.clone()));
        settings.rotate_interval = Duration::from_secs(60);
        settings.rotate_size = size;
        let begin = at("17:15:00");
        let mut second = begin.as_second();
        let mut store = Store::open(&settings, begin).unwrap();
        for (number, (step, late, action)) in steps.iter().enumerate() {
            second += match size {
                Some(_) => (*step).max(0),
                None => *step,
            };
            let received = second - late;
            let now = Timestamp::from_second(received).unwrap();
            match action {
                0 => {
                    drop(store);
                    store = Store::open(&settings, now).unwrap();
                }
                1 => store.tick(now),
                _ => {}
            }
            store.append(&record_at(number as u32, received as u32), now).unwrap();
        }
        let mut numbers = Vec::new();
        for file in names::segments(&path, None, None).unwrap() {
            let content = fs::read(&file).unwrap();
            prop_assert_eq!(content.len() % 20, 0);
            for bytes in content.chunks(20) {
                let record = decode(bytes).unwrap().0;
                numbers.push(record.rule_tag.unwrap());
                let time = Timestamp::from_second(record.received_s.into()).unwrap();
                let after = time + Duration::from_millis(1);
                let found = names::segments(&path, Some(time), Some(after)).unwrap();
                prop_assert!(found.contains(&file), "{} in {}", time, file.display());
            }
        }
        numbers.sort_unstable();
        let expected: Vec<u32> = (0..steps.len() as u32).collect();
        prop_assert_eq!(numbers, expected);
    }
}
