//! `flowd-rs reader`, run as a user runs it, beside a second implementation of djm's formats in Python.
#![allow(missing_docs)]

mod common;

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::daemon::PROGRAM;
use flowd_rs::collector::record::{Attribution, FlowRecord, Origin};
use flowd_rs::collector::store::fields::Fields;
use flowd_rs::collector::store::segment::encode;
use serde_json::Value;
use tempfile::TempDir;

const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/djm_v3.py");

/// A directory with files.
struct Files(TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

fn python(arguments: &[&str]) -> Vec<u8> {
    let mut command = Command::new("python3");
    let output = command.arg(PYTHON).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {error}");
    output.stdout
}

fn reader(arguments: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.arg("reader").args(arguments).output().unwrap()
}

/// What it prints; it must succeed, and have nothing to complain of.
fn read(arguments: &[&str]) -> String {
    let output = reader(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), error.as_str()),
        (Some(0), ""),
        "{arguments:?}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The exit code, and what is printed on standard output and standard error.
fn outcome(arguments: &[&str]) -> (i32, String, String) {
    let output = reader(arguments);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// A record with everything, received in 2026 at 17:00:00 UTC plus `n` seconds.
fn record(n: u32) -> FlowRecord {
    let is_v6 = n.is_multiple_of(2);
    let address = |v4: String, v6: String| if is_v6 { v6 } else { v4 }.parse().ok();
    FlowRecord {
        received_s: 1_795_539_600 + n,
        received_us: 7 * n,
        exporter: "192.0.2.1".parse().unwrap(),
        source: address(
            format!("198.51.100.{}", n % 200),
            format!("2001:db8:1::{n:x}"),
        ),
        destination: address("203.0.113.9".to_owned(), "2001:db8:2::9".to_owned()),
        next_hop: address("192.0.2.254".to_owned(), "2001:db8::fe".to_owned()),
        source_port: n as u16,
        destination_port: 1094,
        protocol: 6,
        tcp_flags: 0x1b,
        tos: 0x20,
        source_mask: 24,
        destination_mask: 48,
        packets: u64::from(n) + 1,
        octets: u64::MAX / 4 - u64::from(n),
        input: u32::MAX,
        output: n,
        source_as: 4_200_000_000,
        destination_as: 513,
        version: 9,
        uptime_ms: 90_061_001,
        exporter_s: 1_795_539_600,
        exporter_ns: 999_999_999,
        start_uptime_ms: 1000,
        end_uptime_ms: 604_801_002,
        start_ms: 1_795_539_590_000,
        end_ms: 1_795_539_600_123,
        engine_type: 1,
        engine_id: 513,
        sequence: n,
        domain: 77,
        sampling_interval: 10,
        flow_label: is_v6.then_some(n & 0xfffff),
        rule_tag: n.is_multiple_of(3).then_some(n),
        attribution: (n % 4 == 1).then_some(Attribution {
            scitag: 2 << 6 | 9,
            origin: Origin::Firefly,
        }),
    }
}

fn segment(records: impl IntoIterator<Item = u32>, fields: Fields) -> Vec<u8> {
    let mut bytes = Vec::new();
    for n in records {
        encode(&record(n), fields, &mut bytes);
    }
    bytes
}

#[test]
fn files_of_djm_are_printed_as_his_reader_prints_them() {
    let files = Files::new();
    for seed in ["1", "2", "3"] {
        let file = files.write("djm", python(&["make-v3", "400", seed]));
        for (command, option) in [("brief", "-U"), ("verbose", "-vU"), ("csv", "-c")] {
            let expected = String::from_utf8(python(&[command, &file])).unwrap();
            assert!(expected.lines().count() >= 390);
            assert_eq!(read(&[option, &file]), expected, "{option}, seed {seed}");
        }
    }
}

#[test]
fn a_file_of_version_2_becomes_one_of_version_3_byte_for_byte() {
    let files = Files::new();
    let (v2, v3) = (
        python(&["make-v2", "400", "7"]),
        python(&["make-v3", "400", "7"]),
    );
    let (v2_file, v3_file) = (files.write("v2", &v2), files.write("v3", &v3));
    let copy = files.path("copy");
    assert_eq!(read(&["-L", "-o", copy.to_str().unwrap(), &v2_file]), "");
    assert!(fs::read(&copy).unwrap() == v3, "not the same bytes");
    assert_eq!(read(&["-UL", &v2_file]), read(&["-U", &v3_file]));
    let verbose = read(&["-vUL", &v2_file]);
    let first = format!("LOGFILE {v2_file} started at 2023-11-14T22:13:20\n");
    assert!(verbose.starts_with(&first), "{verbose}");
    // A second run appends.
    read(&["-o", copy.to_str().unwrap(), &v3_file]);
    assert!(
        fs::read(&copy).unwrap() == [&v3[..], &v3].concat(),
        "not the same bytes"
    );

    let (code, out, error) = outcome(&[&v2_file]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(
        error.contains("major version 0, expected 3; a file of version 2 is read with -L\n"),
        "{error}"
    );
    let (code, _, error) = outcome(&["-L", &v3_file]);
    assert_eq!(code, 1);
    assert!(
        error.contains("v3: not a file of version 2: magic number 0x6"),
        "{error}"
    );
    let cut = files.write("cut", &v2[..v2.len() - 1]);
    let (code, out, error) = outcome(&["-UL", &cut]);
    assert_eq!(code, 1);
    assert!(error.ends_with(": truncated\n"), "{error}");
    assert_eq!(
        out.lines().count(),
        read(&["-UL", &v2_file]).lines().count() - 1
    );
}

#[test]
fn files_of_ours_are_read_by_a_reader_that_skips_further_fields() {
    let files = Files::new();
    let ours = files.write("ours", segment(0..100, Fields::ALL));
    let compatible = segment(0..100, Fields::COMPATIBLE);
    assert!(fs::read(&ours).unwrap().len() > compatible.len());
    // His CRC covers the header, which is another one: all but header and CRC is the same.
    let expected = String::from_utf8(python(&["brief", &ours])).unwrap();
    assert_eq!(expected.lines().count(), 100);
    assert_eq!(read(&["-U", &ours]), expected);
    assert!(
        python(&["rewrite", &ours]) == compatible,
        "not the same bytes"
    );
    let compatible_file = files.write("compatible", &compatible);
    for (command, option) in [("brief", "-U"), ("verbose", "-vU"), ("csv", "-c")] {
        let expected = String::from_utf8(python(&[command, &compatible_file])).unwrap();
        // Labels and tags are found in what is stored alone.
        assert_eq!(read(&[option, &compatible_file]), expected, "{option}");
    }
    let verbose = read(&["-vU", "-H1", &ours]);
    let extension = " label 0x00000 start 2026-11-24T16:59:50.000 end 2026-11-24T17:00:00.123 sampling 10 domain 77\n";
    assert!(verbose.ends_with(extension), "{verbose}");
    let verbose = read(&["-vU", "-H2", &ours]);
    assert!(
        verbose.contains(" scitag 137 by firefly experiment \"atlas\" activity \""),
        "{verbose}"
    );
}

#[test]
fn local_time_is_that_of_the_environment() {
    let files = Files::new();
    let file = files.write("ours", segment(0..1, Fields::ALL));
    let mut command = Command::new(PROGRAM);
    let output = command
        .args(["reader", &file])
        .env("TZ", "Asia/Tokyo")
        .output()
        .unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    assert!(
        line.starts_with("FLOW tag 0 recv_time 2026-11-25T02:00:00.000000 proto 6 "),
        "{line}"
    );
}

#[test]
fn csv_and_json_are_read_by_others() {
    let files = Files::new();
    let file = files.write("ours", segment(0..50, Fields::ALL));
    let csv = files.write("csv", read(&["-c", &file]));
    let script = "import csv, sys; rows = list(csv.DictReader(open(sys.argv[1]))); \
        print(len(rows), sum(int(r['doctets']) for r in rows), rows[1]['srcaddr'], rows[2]['nexthop'], rows[3]['#:unix_secs'])";
    let output = Command::new("python3")
        .args(["-c", script, &csv])
        .output()
        .unwrap();
    let total: u128 = (0..50).map(|n| u128::from(record(n).octets)).sum();
    let expected = format!("50 {total} 198.51.100.1 2001:db8::fe 1795539600\n");
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);

    let json = files.write("json", read(&["--json", &file]));
    let script = "import json, sys; rows = [json.loads(l) for l in open(sys.argv[1])]; \
        print(len(rows), sum(r['bytes'] for r in rows), json.dumps(rows[1], sort_keys=True))";
    let output = Command::new("python3")
        .args(["-c", script, &json])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let rest = printed.strip_prefix(&format!("50 {total} ")).unwrap();
    let object: Value = serde_json::from_str(rest).unwrap();
    let expected = serde_json::json!({
        "type": "NETFLOW_V9",
        "time_received_ns": 1_795_539_601_000_007_000_u64,
        "sequence_num": 1,
        "sampling_rate": 10,
        "sampler_address": "192.0.2.1",
        "time_flow_start_ns": 1_795_539_590_000_000_000_u64,
        "time_flow_end_ns": 1_795_539_600_123_000_000_u64,
        "bytes": u64::MAX / 4 - 1,
        "packets": 2,
        "src_addr": "198.51.100.1",
        "dst_addr": "203.0.113.9",
        "etype": 2048,
        "proto": 6,
        "src_port": 1,
        "dst_port": 1094,
        "in_if": u32::MAX,
        "out_if": 1,
        "ip_tos": 32,
        "tcp_flags": 27,
        "next_hop": "192.0.2.254",
        "src_as": 4_200_000_000_u32,
        "dst_as": 513,
        "src_net": 24,
        "dst_net": 48,
        "observation_domain_id": 77,
        "scitag": 137,
        "experiment": "atlas",
        "activity": object["activity"],
        "attribution": "firefly",
        "engine_type": 1,
        "engine_id": 513,
        "time_sent_ns": 1_795_539_600_999_999_999_u64,
        "uptime_ms": 90_061_001,
        "uptime_flow_start_ms": 1000,
        "uptime_flow_end_ms": 604_801_002,
    });
    assert_eq!(object, expected);
}

#[test]
fn json_without_absolute_times_counts_back_from_the_exporters_clock() {
    let files = Files::new();
    let file = files.write(
        "compatible",
        segment(0..1, Fields::AGENT_INFO | Fields::FLOW_TIMES),
    );
    let object: Value = serde_json::from_str(&read(&["--json", &file])).unwrap();
    // The exporter was up for 90,061.001 s; its clock stood at 1,795,539,600.999 s.
    let start = 1_795_539_600_999_u64 - (90_061_001 - 1000);
    assert_eq!(object["time_flow_start_ns"], start * 1_000_000);
    assert_eq!(object.get("bytes"), None);
    let nothing = files.write("nothing", [0x60, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(read(&["--json", &nothing]), "{}\n");
}

#[test]
fn a_damaged_record_is_skipped_and_told() {
    let files = Files::new();
    let mut bytes = segment(0..10, Fields::ALL);
    let lengths: Vec<usize> = (0..10).map(|n| segment([n], Fields::ALL).len()).collect();
    let start: usize = lengths[..4].iter().sum();
    bytes[start + 20] ^= 0x10;
    let damaged = files.write("damaged", &bytes);
    let good = files.write("good", segment(20..25, Fields::ALL));
    let missing = files.path("missing").to_str().unwrap().to_owned();
    let (code, out, error) = outcome(&["-U", &damaged, &missing, &good]);
    assert_eq!(code, 1);
    assert_eq!(out.lines().count(), 9 + 5);
    let length = lengths[4];
    let lines: Vec<&str> = error.lines().collect();
    let told = format!("flowd-rs: {damaged}: {length} bytes at offset {start} skipped: CRC 0x");
    assert!(lines[0].starts_with(&told), "{error}");
    let told = format!("flowd-rs: {missing}: No such file or directory (os error 2)");
    assert_eq!(lines[1], told);
    assert_eq!(lines.len(), 2);
    // The copy has what is good.
    let copy = files.path("copy").to_str().unwrap().to_owned();
    assert_eq!(outcome(&["-o", &copy, &damaged]).0, 1);
    assert_eq!(read(&["-U", &copy]).lines().count(), 9);
    // A file in which nothing is right is one complaint.
    let garbage = files.write("garbage", vec![0x55; 3 << 20]);
    let (code, out, error) = outcome(&["-d", &garbage]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(error.lines().count(), 2, "{error}");
    assert!(
        error.contains(&format!(
            "{} bytes at offset 0 skipped: major version 2",
            3 << 20
        )),
        "{error}"
    );
    assert!(
        error.contains(&format!(
            "{} bytes, 0 records, 0 of them selected, {0} bytes skipped",
            3 << 20
        )),
        "{error}"
    );
}

/// A write is seen in parts: a record that is written meanwhile is not damaged.
#[test]
fn a_file_that_is_being_written_has_no_torn_end() {
    let files = Files::new();
    let path = files.write("live", "");
    let record = segment([0], Fields::ALL);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut file = OpenOptions::new().append(true).open(&path).unwrap();
            let (first, second) = record.split_at(record.len() / 2);
            while !stop.load(Ordering::Relaxed) {
                file.write_all(first).unwrap();
                std::thread::sleep(Duration::from_millis(1));
                file.write_all(second).unwrap();
            }
        });
        let outcomes: Vec<_> = (0..20).map(|_| outcome(&["-U", &path])).collect();
        stop.store(true, Ordering::Relaxed);
        for (code, _, error) in outcomes {
            assert_eq!((code, error.as_str()), (0, ""));
        }
    });
    // A torn end that stays is told.
    fs::write(&path, &record[..record.len() - 1]).unwrap();
    let (code, _, error) = outcome(&[&path]);
    let length = record.len();
    let told = format!(
        "{} bytes at offset 0 skipped: truncated: {0} bytes of at least {length}\n",
        length - 1
    );
    assert_eq!(code, 1);
    assert!(error.ends_with(&told), "{error}");
}

#[test]
fn of_a_directory_only_the_segments_of_the_period_are_read() {
    let files = Files::new();
    files.write("flows-20261124T165500Z.flowd", [0x55; 100]);
    files.write("flows-20261124T170000Z.flowd", segment(0..300, Fields::ALL));
    files.write(
        "flows-20261124T170500Z.flowd",
        segment(300..600, Fields::ALL),
    );
    files.write("flows-20261124T171000Z.flowd", [0x55; 100]);
    files.write("notes", "not a segment");
    let directory = files.0.path().to_str().unwrap();
    let (code, out, error) = outcome(&[directory]);
    assert_eq!((code, out.lines().count()), (1, 600));
    assert_eq!(error.lines().count(), 2, "{error}");

    let first = |arguments: &[&str]| {
        let out = read(&[&["--json", directory], arguments].concat());
        let lines: Vec<Value> = out
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let sequence =
            |line: Option<&Value>| line.map(|line| line["sequence_num"].as_u64().unwrap());
        (lines.len(), sequence(lines.first()), sequence(lines.last()))
    };
    let period = [
        "--from",
        "2026-11-24T17:01:00Z",
        "--to",
        "2026-11-24T17:06:00Z",
    ];
    assert_eq!(first(&period), (300, Some(60), Some(359)));
    let local = [
        "-U",
        "--from",
        "2026-11-24 17:06",
        "--to",
        "2026-11-24T17:06:01",
    ];
    assert_eq!(first(&local), (1, Some(360), Some(360)));
    // No segment is of that time, and none is complained of.
    let none = [
        "--from",
        "2026-11-24T17:07:00Z",
        "--to",
        "2026-11-24T17:07:00.000001Z",
    ];
    assert_eq!(first(&none).0, 0);

    let empty = files.path("empty");
    fs::create_dir(&empty).unwrap();
    let (code, _, error) = outcome(&[empty.to_str().unwrap()]);
    assert_eq!(code, 1);
    assert!(
        error.ends_with("/empty: no segments (flows-*.flowd) in it\n"),
        "{error}"
    );
}

#[test]
fn a_relative_period_counts_from_now() {
    let files = Files::new();
    let now = jiff::Timestamp::now().as_second() as u32;
    let mut bytes = Vec::new();
    for ago in [7200, 1800] {
        let received_s = now - ago;
        encode(
            &FlowRecord {
                received_s,
                ..record(ago)
            },
            Fields::ALL,
            &mut bytes,
        );
    }
    let file = files.write("flows", bytes);
    assert_eq!(read(&["--from", "-1h", &file]).lines().count(), 1);
    assert_eq!(read(&["--to=-1h", &file]).lines().count(), 1);
    assert_eq!(
        read(&["--from", "-3h", "--to", "-10m", &file])
            .lines()
            .count(),
        2
    );
    assert_eq!(read(&["--from", "-10m", &file]), "");
}

#[test]
fn records_are_chosen_by_the_clauses_of_a_rule() {
    let files = Files::new();
    let file = files.write("ours", segment(0..100, Fields::ALL));
    let count = |clauses: &str| read(&["--where", clauses, &file]).lines().count();
    assert_eq!(count("src 198.51.100.0/24"), 50);
    assert_eq!(count("src 198.51.100.0/24 port 1"), 1);
    assert_eq!(count("proto tcp dst 2001:db8:2::9 port 1094"), 50);
    assert_eq!(count("experiment atlas"), 25);
    assert_eq!(count("proto udp"), 0);
    let period = ["--from", "2026-11-24T17:00:10Z", "-H3"];
    let chosen = read(&[&period[..], &["--where", "inet", &file]].concat());
    assert_eq!(chosen.lines().count(), 3);
    assert!(chosen.contains("src [198.51.100.11]:11 "), "{chosen}");
    let (code, out, error) = outcome(&["--where", "proto tcp src nowhere", &file]);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        error.starts_with("flowd-rs: --where: column 15: "),
        "{error}"
    );
}

#[test]
fn the_rules_of_a_file_choose_and_tag_records() {
    let files = Files::new();
    let file = files.write("ours", segment(0..100, Fields::ALL));
    let rules = "# comment\nours = \"198.51.100.0/24\"\ndiscard all\naccept tag 7 src $ours\naccept quick src 2001:db8:1::6\n";
    let rules = files.write("rules", rules);
    let copy = files.path("copy").to_str().unwrap().to_owned();
    let output = reader(&["-d", "-f", &rules, "-o", &copy, &file]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), output.stdout.len()),
        (Some(0), 0),
        "{error}"
    );
    let lines: Vec<&str> = error.lines().collect();
    assert!(
        lines[0].ends_with(" 100 records, 51 of them selected, 0 bytes skipped"),
        "{error}"
    );
    assert_eq!(
        lines[2],
        "flowd-rs: rule in line 4: 100 evaluations, 50 matches, decided 50"
    );
    let sums = read(&["-c", "--sum-by", "tag", &copy]);
    // Record 6 was stored with tag 6.
    let tags: Vec<&str> = sums
        .lines()
        .filter_map(|line| line.split(',').next())
        .collect();
    assert_eq!(tags, ["tag", "7", "6", "total"]);
    // All else is as it was.
    let expected: Vec<u8> = (0..100)
        .filter(|n| n % 2 == 1 || *n == 6)
        .flat_map(|n| {
            let rule_tag = Some(if n == 6 { 6 } else { 7 });
            let mut bytes = Vec::new();
            encode(
                &FlowRecord {
                    rule_tag,
                    ..record(n)
                },
                Fields::ALL,
                &mut bytes,
            );
            bytes
        })
        .collect();
    assert!(fs::read(&copy).unwrap() == expected, "not the same bytes");
    let wrong = files.write("wrong", "accept all\naccept form here\n");
    let (code, out, error) = outcome(&["-f", &wrong, &file]);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        error.starts_with(&format!("flowd-rs: {wrong}:2:8: ")),
        "{error}"
    );
}

#[test]
fn sums_are_sorted_by_bytes_and_have_a_total() {
    let files = Files::new();
    let file = files.write("ours", segment(0..100, Fields::ALL));
    let table = read(&["--sum-by", "src/24/48,proto", "--top", "1", &file]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(
        lines[0],
        "packets and bytes are multiplied by the sampling interval, which 100 of 100 flows have"
    );
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        words(lines[1]),
        ["SRC/24/48", "PROTO", "FLOWS", "PACKETS", "BYTES"]
    );
    let bytes = |parity| {
        (0..100)
            .filter(|n| n % 2 == parity)
            .map(|n| 10 * u128::from(record(n).octets))
            .sum::<u128>()
    };
    assert_eq!(
        words(lines[2]),
        ["2001:db8:1::/48", "6", "50", "25000", &bytes(0).to_string()]
    );
    let total = (bytes(0) + bytes(1)).to_string();
    assert_eq!(words(lines[3]), ["total", "100", "50500", &total]);
    assert_eq!(lines.len(), 4);

    let csv = files.write(
        "csv",
        read(&["-c", "--sum-by", "experiment,activity", &file]),
    );
    let script = "import csv, sys; print([(r['experiment'], r['flows'], r['packets']) for r in csv.DictReader(open(sys.argv[1]))])";
    let output = Command::new("python3")
        .args(["-c", script, &csv])
        .output()
        .unwrap();
    let rows = String::from_utf8(output.stdout).unwrap();
    // The labels of records 0 to 98 are too small for an experiment.
    assert_eq!(
        rows,
        "[('', '75', '38000'), ('atlas', '25', '12500'), ('total', '100', '50500')]\n"
    );

    let json = read(&["--json", "--sum-by", "tag", "--top", "2", "-H", "7", &file]);
    let rows: Vec<Value> = json
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["tag"], Value::Null);
    assert_eq!(rows[0]["flows"], 4);
    assert_eq!(rows[2]["total"], true);
    assert_eq!(rows[2]["flows"], 7);
}

#[test]
fn a_pipe_is_read_as_it_comes() {
    let mut command = Command::new(PROGRAM);
    command
        .args(["reader", "-U", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for n in 0..3 {
        input.write_all(&segment([n], Fields::ALL)).unwrap();
        let line = lines.next().unwrap().unwrap();
        assert!(
            line.contains(&format!("recv_time 2026-11-24T17:00:0{n}.")),
            "{line}"
        );
    }
    drop(input);
    assert!(lines.next().is_none());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_closed_output_ends_it_quietly() {
    let files = Files::new();
    let file = files.write("long", segment(0..50_000, Fields::ALL));
    let mut command = Command::new(PROGRAM);
    command
        .args(["reader", &file])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let mut error = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut error)
        .unwrap();
    assert_eq!(
        (child.wait().unwrap().code(), error.as_str()),
        (Some(0), "")
    );
    assert!(line.starts_with("FLOW "));
}

#[test]
fn a_full_disk_is_an_error() {
    let files = Files::new();
    let file = files.write("ours", segment(0..10, Fields::ALL));
    let (code, _, error) = outcome(&["-o", "/dev/full", &file]);
    let told = "flowd-rs: /dev/full: No space left on device (os error 28)\n";
    assert_eq!((code, error.as_str()), (1, told));
}

#[test]
fn options_that_do_not_fit_together_are_refused() {
    let files = Files::new();
    let file = &files.write("ours", segment(0..10, Fields::ALL));
    for (arguments, expected) in [
        (&[][..], "missing argument: file"),
        (&["-c", "--json", file], "-c and --json exclude each other"),
        (&["--top", "3", file], "--top needs --sum-by"),
        (
            &["--sum-by", "srcport", file],
            "--sum-by: \"srcport\" is not a field, expected src, dst, ",
        ),
        (
            &["--from", "noon", file],
            "--from: \"noon\" is not a time, expected 2026-",
        ),
        (
            &["--from", "-1h", "--to", "-2h", file],
            "--from must be earlier than --to",
        ),
        (
            &["-v", "-o", "-", file],
            "-o -: only records may go to standard output",
        ),
        (&["-o", file, file], "this file is read as well"),
    ] {
        let (code, out, error) = outcome(arguments);
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}");
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(fs::read(file).unwrap(), segment(0..10, Fields::ALL));
    assert_eq!(
        reader(&["-o", "-", file]).stdout,
        segment(0..10, Fields::ALL)
    );
    assert_eq!(read(&["-q", file]), "");
}

/// The test feeds records until the progress appears on the terminal that is standard error.
#[test]
fn a_long_run_shows_its_progress_on_a_terminal() {
    let files = Files::new();
    let records = files.write("records", segment(0..5000, Fields::ALL));
    let script = r#"
import os, pty, select, subprocess, sys, time
terminal, other = pty.openpty()
child = subprocess.Popen([sys.argv[1], "reader", "-q", "-"], stdin=subprocess.PIPE, stderr=other)
records, shown, deadline = open(sys.argv[2], "rb").read(), b"", time.monotonic() + 60
while b" records" not in shown and time.monotonic() < deadline:
    child.stdin.write(records)
    child.stdin.flush()
    if select.select([terminal], [], [], 0.02)[0]:
        shown += os.read(terminal, 1000)
child.stdin.close()
print(child.wait(), shown)
"#;
    let mut command = Command::new("python3");
    let output = command
        .args(["-c", script, PROGRAM, &records])
        .output()
        .unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        printed.starts_with("0 b'\\r") && printed.contains(" records"),
        "{printed}"
    );
}

/// The directory may be another user's: what is not a file is reported, and the rest is read.
#[test]
fn a_pipe_or_a_link_among_the_segments_is_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("flows-20261124T100000Z.flowd");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink(
        "/dev/zero",
        folder.path().join("flows-20261124T100500Z.flowd"),
    )
    .unwrap();
    std::fs::write(folder.path().join("flows-20261124T101000Z.flowd"), b"").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_flowd-rs"))
        .args(["reader", "-q"])
        .arg(folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        errors.lines().filter(|line| line.contains("T100")).count(),
        2,
        "{errors}"
    );
}
