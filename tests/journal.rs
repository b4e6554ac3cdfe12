//! Open flows survive a restart, a crash and a full disk.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::daemon::{Home, line, lines};
use common::disk::Disk;
use common::net::Hosts;
use common::sink::Sink;
use common::wait_for;
use flowd_rs::event::State;

const DESTINATION: &str = "[2001:db8::2]:10514";

#[test]
#[ignore = "needs root"]
fn after_a_kill_amid_ten_thousand_starts_none_is_sent_twice_and_every_end_has_its_start_time() {
    const COUNT: usize = 10_000;
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let first = home.start(&hosts.here);
    let mut writer = home.writer();
    let mut starts = HashMap::new();
    let (received, killed) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..COUNT {
                // Stays close behind the daemon, so that the kill comes before everything is journalled.
                while n > received.load(Ordering::Relaxed) + 2000 && !killed.load(Ordering::Relaxed)
                {
                    std::thread::yield_now();
                }
                // The pipe has no reader after the kill.
                if writer
                    .write_all(line("start", n, "2 9").as_bytes())
                    .is_err()
                {
                    return;
                }
            }
        });
        while starts.len() < COUNT / 3 {
            let event = sink.firefly().event;
            starts.insert(event.flow, event);
            received.store(starts.len(), Ordering::Relaxed);
        }
        first.kill();
        killed.store(true, Ordering::Relaxed);
    });
    for event in sink.drain(Duration::from_millis(200)) {
        assert!(starts.insert(event.flow, event).is_none());
    }
    let open = home.journalled();
    assert!(
        open >= starts.len(),
        "{open} journalled, {} sent",
        starts.len()
    );
    assert!(open < COUNT, "the kill came too late for this test");

    // Lines that no reader has read are lost with the last open end of the pipe.
    drop(writer);
    let second = home.start(&hosts.here);
    second.expect_status(&format!("flows_open {open}"));
    home.write(&lines("start", 0..COUNT, "2 9"));
    second.expect_status(&format!("flows_open {COUNT}"));
    home.write(&lines("end", 0..COUNT, "0 0"));
    second.expect_status(&format!("dispatcher_events ended {COUNT}"));
    let mut ends = HashMap::new();
    for event in sink.drain(Duration::from_millis(500)) {
        let twice = match event.state {
            State::End => ends.insert(event.flow, event),
            _ => starts.insert(event.flow, event),
        };
        assert!(twice.is_none(), "{twice:?}");
    }
    assert_eq!(ends.len(), COUNT);
    for (flow, start) in &starts {
        assert_eq!(ends[flow].start_time, start.start_time);
        assert_eq!(ends[flow].tag, start.tag);
    }
    // Only flows that were journalled but not yet sent at the kill have no start firefly.
    assert!(
        starts.len() + 4096 + 16384 >= COUNT,
        "{} starts",
        starts.len()
    );
    second.stop();
    assert_eq!(home.journalled(), 0);
}

#[test]
#[ignore = "needs root"]
fn a_stop_and_a_start_keep_open_flows_open() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&line("start", 1, "2 9"));
    let start = sink.firefly();
    daemon.stop();
    let daemon = home.start(&hosts.here);
    home.write(&line("start", 1, "2 9"));
    sink.assert_silent();
    home.write(&line("end", 1, "2 9"));
    let end = sink.firefly();
    assert_eq!(end.event.start_time, start.event.start_time);
    assert_eq!(end.json["context"]["activity-id"], 9);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_torn_journal_loses_only_its_last_line() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..3, "2 9"));
    let starts = sink.collect("start", 3);
    daemon.kill();
    let journal = home.path("state/journal");
    let whole = fs::read(&journal).unwrap();
    fs::write(&journal, &whole[..whole.len() - 5]).unwrap();

    let daemon = home.start(&hosts.here);
    assert!(
        home.log().contains("line 4 is incomplete, skipped"),
        "{}",
        home.log()
    );
    daemon.expect_status("flows_open 2");
    home.write(&lines("end", 0..3, "2 9"));
    let ends = sink.collect("end", 3);
    let kept = ends
        .values()
        .filter(|end| end.start_time == starts[&end.flow].start_time);
    assert_eq!(kept.count(), 2);
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn flows_older_than_max_age_are_ended() {
    let hosts = Hosts::new();
    let home = Home::with("backends: {firefly: {}}\nflows: {maxAge: 1s}\n");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&line("start", 1, "2 9"));
    let start = sink.firefly();
    let end = sink.firefly();
    assert_eq!(end.json["flow-lifecycle"]["state"], "end");
    assert_eq!(end.event.start_time, start.event.start_time);
    daemon.expect_status("dispatcher_events ended_expired 1");
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_full_table_refuses_starts_and_logs_it() {
    let hosts = Hosts::new();
    let home = Home::with("backends: {firefly: {}}\nflows: {maxFlows: 100, maxPerSource: 100}\n");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..1000, "2 9"));
    sink.collect("start", 100);
    daemon.expect_status("dispatcher_events refused_table_full 900");
    sink.assert_silent();
    daemon.stop();
    let refused = home.log().lines().filter(|l| l.contains("refused")).count();
    assert!((1..10).contains(&refused), "{refused} lines");
}

#[test]
#[ignore = "needs root"]
fn a_full_disk_delays_no_firefly_and_the_journal_catches_up() {
    const COUNT: usize = 5000;
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let state = home.path("state");
    let _disk = Disk::mount(&state, "4m");
    let filler = state.join("filler");
    let _ = fs::write(&filler, vec![0; 4 << 20]);
    let sink = Sink::bind(&hosts.there, DESTINATION);

    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..COUNT, "2 9"));
    let starts = sink.collect("start", COUNT);
    home.wait_for_log("the daemon continues without it");
    assert!(home.log().contains("No space left on device"));
    fs::remove_file(&filler).unwrap();
    home.wait_for_log("writable again, and complete");
    daemon.kill();

    let daemon = home.start(&hosts.here);
    daemon.expect_status(&format!("flows_open {COUNT}"));
    home.write(&lines("end", 0..COUNT, "2 9"));
    for (flow, end) in sink.collect("end", COUNT) {
        assert_eq!(end.start_time, starts[&flow].start_time);
    }
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn on_a_disk_that_stays_full_flows_that_ended_do_not_come_back() {
    const COUNT: usize = 12_000;
    const OPEN: usize = 200;
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let state = home.path("state");
    let _disk = Disk::mount(&state, "4m");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..COUNT, "2 9"));
    sink.collect("start", COUNT);
    // From now on there is no room for another line.
    let _ = fs::write(state.join("filler"), vec![0; 4 << 20]);
    home.write(&lines("end", OPEN..COUNT, "2 9"));
    sink.collect("end", COUNT - OPEN);
    home.wait_for_log("writable again, and complete");
    wait_for("the journal of the open flows", || {
        (home.journalled() == OPEN).then_some(())
    });
    daemon.kill();
    let daemon = home.start(&hosts.here);
    daemon.expect_status(&format!("flows_open {OPEN}"));
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_read_only_state_directory_is_a_warning() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let state = home.path("state");
    let _disk = Disk::mount(&state, "1m");
    let remounted = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&state)
        .status();
    assert!(remounted.unwrap().success());
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&line("start", 1, "2 9"));
    home.write(&line("end", 1, "2 9"));
    sink.collect("end", 1);
    daemon.stop();
    assert!(home.log().contains("running without a journal"));
    assert!(home.log().contains("running without its lock"));
}

#[test]
#[ignore = "needs root"]
fn a_damaged_header_loses_no_flow() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    home.write(&lines("start", 0..3, "2 9"));
    daemon.expect_status("flows_open 3");
    daemon.kill();
    let journal = home.path("state/journal");
    let mut bytes = fs::read(&journal).unwrap();
    bytes[0] ^= 1;
    fs::write(&journal, bytes).unwrap();
    let daemon = home.start(&hosts.here);
    daemon.expect_status("flows_open 3");
    assert!(home.log().contains("its first line is damaged"));
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn an_end_that_is_reported_twice_is_sent_once() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let daemon = home.start(&hosts.here);
    home.write(&(line("start", 1, "2 9") + &line("end", 1, "2 9") + &line("end", 1, "2 9")));
    daemon.expect_status("dispatcher_events ended_already 1");
    sink.collect("end", 1);
    sink.assert_silent();
    daemon.stop();
}
