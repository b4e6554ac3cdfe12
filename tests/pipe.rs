//! From a line in the named pipe to a firefly on the wire.
#![allow(missing_docs)]

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::daemon::{Home, line, lines};
use common::net::Hosts;
use common::sink::Sink;
use common::wait_for;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

const DESTINATION: &str = "[2001:db8::2]:10514";

#[test]
#[ignore = "needs root"]
fn a_start_and_an_end_reach_the_destination_over_both_families() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    for (destination, afi, source) in [
        ("192.0.2.2", "ipv4", "192.0.2.1"),
        ("2001:db8::2", "ipv6", "2001:db8::1"),
    ] {
        let address = if afi == "ipv4" {
            "192.0.2.2:10514"
        } else {
            DESTINATION
        };
        let sink = Sink::bind(&hosts.there, address);
        home.write(&format!(
            "start tcp {source} 40001 {destination} 443 atlas Staging\n"
        ));
        let start = sink.firefly();
        assert!(start.header.starts_with("<134>1 20"), "{}", start.header);
        assert!(
            start.header.ends_with(" flowd-rs - firefly-json - "),
            "{}",
            start.header
        );
        assert_eq!(start.json["flow-lifecycle"]["state"], "start");
        assert_eq!(start.json["flow-id"]["afi"], afi);
        assert_eq!(start.json["context"]["experiment-id"], 2);
        assert_eq!(start.json["context"]["activity-id"], 19);
        assert_eq!(
            start.json["context"]["application"],
            format!("flowd-rs {}", env!("CARGO_PKG_VERSION"))
        );
        // The end is matched on the 5-tuple alone.
        home.write(&format!("end tcp {source} 40001 {destination} 443 19 2\n"));
        let end = sink.firefly();
        assert_eq!(end.json["flow-lifecycle"]["state"], "end");
        assert_eq!(
            end.json["flow-lifecycle"]["start-time"],
            start.json["flow-lifecycle"]["start-time"]
        );
        assert_eq!(end.json["context"], start.json["context"]);
        assert!(end.event.time >= start.event.time);
        sink.assert_silent();
    }
    daemon.stop();
    assert!(!home.pipe().exists());
    assert!(!home.path("pid").exists());
}

#[test]
#[ignore = "needs root"]
fn repeated_starts_retags_and_unknown_ends_follow_the_table() {
    let hosts = Hosts::new();
    let home = Home::new("{prependSyslog: false}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    home.write(&line("start", 1, "2 9"));
    let start = sink.firefly();
    assert_eq!(start.header, "");
    home.write(&line("start", 1, "2 9"));
    home.write(&line("start", 1, "2 10"));
    let retag = sink.firefly();
    assert_eq!(retag.json["context"]["activity-id"], 10);
    assert_eq!(retag.event.start_time, start.event.start_time);
    home.write(&line("end", 2, "0 0"));
    let unmatched = sink.firefly();
    let lifecycle = &unmatched.json["flow-lifecycle"];
    assert_eq!(lifecycle["start-time"], lifecycle["end-time"]);
    daemon.expect_status("dispatcher_events duplicate 1");
    daemon.expect_status("dispatcher_events ended_unmatched 1");
    daemon.expect_status("flows_open 1");
    sink.assert_silent();
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_line_split_at_every_byte_is_one_line() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let mut writer = home.writer();
    let length = line("start", 1, "2 9").len();
    for at in 1..length {
        let line = line("start", 1 + at % 9, &format!("2 {at}"));
        let (first, second) = line.split_at(at.min(line.len()));
        writer.write_all(first.as_bytes()).unwrap();
        // Write the second half only after the daemon has read the first.
        wait_for("an empty pipe", || {
            (!is_ready(&home, PollFlags::POLLIN)).then_some(())
        });
        writer.write_all(second.as_bytes()).unwrap();
        let start = sink.firefly();
        assert_eq!(start.json["context"]["activity-id"], at);
    }
    daemon.stop();
    assert!(!home.log().contains("rejected"), "{}", home.log());
}

/// Whether the pipe is ready for `events` now. `POLLIN` means that the pipe contains bytes; without `POLLOUT` it is full.
fn is_ready(home: &Home, events: PollFlags) -> bool {
    let mut options = fs::OpenOptions::new();
    let pipe = options.read(true).write(true).open(home.pipe()).unwrap();
    poll(&mut [PollFd::new(pipe.as_fd(), events)], PollTimeout::ZERO).unwrap() > 0
}

#[test]
#[ignore = "needs root"]
fn twenty_writers_at_once_lose_nothing() {
    const EACH: usize = 1000;
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    std::thread::scope(|scope| {
        for writer in 0..20 {
            let home = &home;
            scope.spawn(move || {
                for n in 0..EACH {
                    // Opens the pipe for every line.
                    home.write(&line("start", writer * EACH + n, "2 9"));
                }
            });
        }
    });
    assert_eq!(sink.collect("start", 20 * EACH).len(), 20 * EACH);
    sink.assert_silent();
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn every_kind_of_bad_input_is_counted_and_good_lines_in_between_are_accepted() {
    let bad: &[(&[u8], &str)] = &[
        (b"strat tcp 2001:db8::1 1 2001:db8::2 2 1 2", "state"),
        (b"ongoing tcp 2001:db8::1 1 2001:db8::2 2 1 2", "state"),
        (b"start icmp 2001:db8::1 1 2001:db8::2 2 1 2", "protocol"),
        (b"start tcp 2001:db8::g 1 2001:db8::2 2 1 2", "address"),
        (b"start tcp 192.0.2.300 1 192.0.2.2 2 1 2", "address"),
        (b"start tcp 2001:db8::1 0 2001:db8::2 2 1 2", "port"),
        (b"start tcp 2001:db8::1 70000 2001:db8::2 2 1 2", "port"),
        (b"start tcp 192.0.2.1 1 2001:db8::2 2 1 2", "family"),
        (b"start tcp 2001:db8::1 1 2001:db8::2 2 1 2 3", "fields"),
        (b"start tcp 2001:db8::1 1", "fields"),
        (
            b"start tcp 2001:db8::1 1 2001:db8::2 2 nobody 2",
            "experiment",
        ),
        (
            b"start tcp 2001:db8::1 1 2001:db8::2 2 cms nothing",
            "activity",
        ),
        (
            b"start tcp 2001:db8::1 1 2001:db8::2 2 1 2\xff\xfe",
            "encoding",
        ),
        (b"start tcp 2001:db8::1 1 2001:db8::2 2 1 2\0", "encoding"),
        (b"\0\0\0\0", "encoding"),
        (&[b'x'; 65536], "length"),
        (&[b' '; 65536], "length"),
    ];
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let mut writer = home.writer();
    for (n, (bytes, reason)) in bad.iter().enumerate() {
        writer.write_all(bytes).unwrap();
        writer.write_all(b"\n").unwrap();
        writer
            .write_all(line("start", n, "2 9").as_bytes())
            .unwrap();
        let start = sink.firefly();
        assert_eq!(start.json["flow-id"]["src-port"], 1 + n);
        let count = bad[..=n].iter().filter(|(_, r)| r == reason).count();
        daemon.expect_status(&format!(
            "plugin_events namedPipe rejected_{reason} {count}"
        ));
    }
    // A partial line whose writer has closed the pipe.
    writer.write_all(b"start tcp 2001:db8::1 1 2001:").unwrap();
    drop(writer);
    daemon.expect_status("plugin_events namedPipe rejected_fields 3");
    home.write(&line("start", 100, "2 9").replace('\n', "\r\n\r\n \t\n"));
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], 101);
    // A good line without a newline is accepted after a timeout.
    home.write(line("start", 101, "2 9").trim_end());
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], 102);
    daemon.stop();
    let log = home.log();
    assert!(
        log.contains("field 1 (state) is \"strat\", expected start or end"),
        "{log}"
    );
}

#[test]
#[ignore = "needs root"]
fn a_million_garbage_lines_neither_stop_the_good_ones_nor_flood_the_log() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let block = "garbage \u{1f47e} line\n".repeat(1000);
            let mut writer = home.writer();
            for n in 0..1000 {
                writer.write_all(block.as_bytes()).unwrap();
                writer
                    .write_all(line("start", n, "2 9").as_bytes())
                    .unwrap();
            }
        });
        assert_eq!(sink.collect("start", 1000).len(), 1000);
    });
    daemon.expect_status("plugin_events namedPipe rejected_fields 1000000");
    daemon.expect_status("plugin_events namedPipe accepted 1000");
    daemon.stop();
    let log = home.log();
    let shown = log
        .lines()
        .filter(|l| l.contains("rejected line \""))
        .count();
    assert!((1..60).contains(&shown), "{shown} lines");
    assert!(log.contains("namedPipe: rejected lines: 99"), "{log}");
}

#[test]
#[ignore = "needs root"]
fn a_deleted_pipe_is_recreated_and_the_old_one_is_still_read() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let mut old = home.writer();
    fs::remove_file(home.pipe()).unwrap();
    home.write(&line("start", 1, "2 9"));
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], 2);
    old.write_all(line("start", 2, "2 9").as_bytes()).unwrap();
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], 3);
    let mode = fs::metadata(home.pipe()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    // A shell redirection creates a regular file first: the file is renamed, and the pipe recreated.
    fs::remove_file(home.pipe()).unwrap();
    fs::write(home.pipe(), "start of something\n").unwrap();
    home.write(&line("start", 3, "2 9"));
    assert_eq!(sink.firefly().json["flow-id"]["src-port"], 4);
    home.wait_for_log("was a regular file; renamed it to");
    let is_kept = |p: &PathBuf| p.is_file() && p.to_string_lossy().contains("/pipe.");
    let mut files = fs::read_dir(home.dir.path())
        .unwrap()
        .map(|e| e.unwrap().path());
    let kept = files.find(is_kept).unwrap();
    assert_eq!(fs::read_to_string(kept).unwrap(), "start of something\n");
    daemon.stop();
    assert!(!home.pipe().exists());
}

#[test]
#[ignore = "needs root"]
fn an_existing_pipe_is_adopted_and_not_removed() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    nix::unistd::mkfifo(
        &home.pipe(),
        nix::sys::stat::Mode::from_bits_truncate(0o600),
    )
    .unwrap();
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    home.write(&line("start", 1, "2 9"));
    sink.firefly();
    daemon.stop();
    assert!(fs::metadata(home.pipe()).unwrap().file_type().is_fifo());
}

#[test]
#[ignore = "needs root"]
fn a_full_pipe_blocks_its_writers_and_loses_nothing() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let count = 60_000;
    let text = lines("start", 0..count, "2 9");
    daemon.signal(Signal::SIGSTOP);
    std::thread::scope(|scope| {
        scope.spawn(|| home.writer().write_all(text.as_bytes()).unwrap());
        wait_for("a full pipe", || {
            (!is_ready(&home, PollFlags::POLLOUT)).then_some(())
        });
        daemon.signal(Signal::SIGCONT);
        assert_eq!(sink.collect("start", count).len(), count);
    });
    daemon.stop();
}

#[test]
#[ignore = "needs root"]
fn a_stop_under_load_sends_everything_that_was_accepted() {
    let hosts = Hosts::new();
    let home = Home::new("{}");
    let daemon = home.start(&hosts.here);
    let sink = Sink::bind(&hosts.there, DESTINATION);
    let stopped = AtomicBool::new(false);
    let seen: HashSet<_> = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut writer = home.writer();
            for block in 0.. {
                let text = lines("start", block * 50..(block + 1) * 50, "2 9");
                if stopped.load(Ordering::Relaxed) || writer.write_all(text.as_bytes()).is_err() {
                    return;
                }
            }
        });
        let mut seen = HashSet::new();
        while seen.len() < 20_000 {
            seen.insert(sink.firefly().event.flow);
        }
        daemon.stop();
        stopped.store(true, Ordering::Relaxed);
        seen.extend(
            sink.drain(Duration::from_millis(200))
                .into_iter()
                .map(|e| e.flow),
        );
        seen
    });
    let log = home.log();
    let accepted = format!("plugin_events namedPipe accepted {}", seen.len());
    let last = log.lines().last().unwrap();
    assert!(
        last.contains("stopped: ") && last.contains(&accepted),
        "{}: {last}",
        seen.len()
    );
    // The next daemon restores the flows that were open at the stop.
    assert_eq!(home.journalled(), seen.len());
}

#[test]
#[ignore = "needs root"]
fn each_kind_of_writer_can_use_the_documented_modes_and_others_cannot_read() {
    const STORM: u32 = 54321;
    let hosts = Hosts::new();
    for (mode, group_may_read) in [("0622", false), ("0662", true)] {
        let home = Home::new("{}");
        fs::set_permissions(home.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let config = fs::read_to_string(home.path("flowd.cfg")).unwrap();
        let keys = format!("    mode: '{mode}'\n    group: {STORM}\n    pipePath:");
        let config = config.replace("    pipePath:", &keys);
        fs::write(home.path("flowd.cfg"), config).unwrap();
        let sink = Sink::bind(&hosts.there, DESTINATION);
        let daemon = home.start(&hosts.here);
        let shell = |group: u32, script: &str| {
            let mut command = Command::new("setpriv");
            command
                .args(["--reuid=65534", "--clear-groups"])
                .arg(format!("--regid={group}"))
                .args(["sh", "-c", script])
                .env("PIPE", home.pipe())
                .stderr(Stdio::null());
            command.status().unwrap().success()
        };
        // As most services do, and as StoRM WebDAV does.
        let write = |n| format!("echo '{}' > $PIPE", line("start", n, "2 9").trim_end());
        let read_write = |n| {
            let line = line("start", n, "2 9");
            format!("exec 3<> $PIPE && echo '{}' >&3", line.trim_end())
        };
        assert!(shell(65534, &write(1)) && shell(STORM, &write(2)), "{mode}");
        sink.collect("start", 2);
        assert_eq!(shell(STORM, &read_write(3)), group_may_read, "{mode}");
        sink.collect("start", usize::from(group_may_read));
        assert!(
            !shell(65534, &read_write(4)) && !shell(65534, "exec 3< $PIPE"),
            "{mode}"
        );
        daemon.stop();
    }
}
