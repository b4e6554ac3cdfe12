//! The reader beside nfdump, on the same records.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::{median, row};
use crate::common::daemon::PROGRAM;

const RUNS: usize = 5;

/// CPU time of a command, in seconds. What it prints is thrown away.
fn cpu_of(command: &mut Command) -> f64 {
    let used = || {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
        (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
    };
    let before = used();
    let status = command.stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}");
    used() - before
}

/// Prints a row each for CSV, JSON and sums. `segments` and `nfcapd` are directories with the same `records` flow records.
pub fn beside_nfdump(segments: &Path, nfcapd: &Path, records: u64) {
    let cases: [(&str, &[&str], &[&str]); 3] = [
        ("CSV", &["-c"], &["-o", "csv"]),
        ("JSON", &["--json"], &["-o", "json"]),
        (
            "bytes of the top 10 sources",
            &["--sum-by", "src", "--top", "10"],
            &["-s", "srcip/bytes", "-n", "10"],
        ),
    ];
    for (name, ours, theirs) in cases {
        let (mut reader, mut nfdump) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            let mut command = Command::new(PROGRAM);
            reader.push(cpu_of(command.arg("reader").args(ours).arg(segments)));
            let mut command = Command::new("nfdump");
            nfdump.push(cpu_of(command.arg("-R").arg(nfcapd).args(theirs)));
        }
        let speed = |seconds: Vec<f64>| records as f64 / median(seconds) / 1e6;
        let (reader, nfdump) = (speed(reader), speed(nfdump));
        row(
            &format!("stored records, {name}"),
            &format!("{reader:.2} M/s"),
            &format!("{nfdump:.2} M/s (nfdump)"),
            &format!("{:.2}", reader / nfdump),
        );
    }
}
