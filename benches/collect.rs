//! The collector's whole path, from the socket to the disk, beside nfcapd on the same feed: CPU time of a record, records
//! lost by rate, bytes of a record, memory. Needs root.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;
mod measure;

use std::fs;
use std::io::IoSlice;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::daemon::Home;
use common::http::Client;
use common::net::NetNs;
use common::wait_for;
use measure::reader::beside_nfdump;
use measure::{cpu_of, median, resident_of, row};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long a feed lasts.
const SPAN: Duration = Duration::from_secs(4);
/// Records per second at which CPU time is compared.
const COMMON_RATE: u64 = 200_000;
/// Records per second that are tried for losses.
const RATES: [u64; 6] = [200_000, 400_000, 600_000, 800_000, 1_200_000, 2_000_000];
const RUNS: usize = 3;
/// Datagrams of one system call of the feed.
const BATCH: usize = 32;
/// Sockets of the feed: the kernel distributes them among workers.
const SOCKETS: usize = 8;
const RECEIVE_BUFFER: usize = 32 << 20;
const PORT: u16 = 2055;

/// A feed of equal datagrams, except for their sequence numbers.
#[derive(Clone)]
struct Feed {
    name: &'static str,
    templates: Option<Vec<u8>>,
    datagram: Vec<u8>,
    records: u64,
    /// Where the sequence number stands, and by how much it grows.
    sequence: (usize, u32),
}

fn words(datagram: &mut Vec<u8>, words: &[u32]) {
    words
        .iter()
        .for_each(|word| datagram.extend(word.to_be_bytes()));
}

fn halves(datagram: &mut Vec<u8>, halves: &[u16]) {
    halves
        .iter()
        .for_each(|half| datagram.extend(half.to_be_bytes()));
}

/// 30 records in 1464 bytes.
fn v5() -> Feed {
    let mut datagram = Vec::new();
    halves(&mut datagram, &[5, 30]);
    let now = jiff::Timestamp::now().as_second() as u32;
    words(&mut datagram, &[1_000_000, now, 0, 0, 0]);
    for n in 0..30 {
        words(
            &mut datagram,
            &[
                0xc000_0200 + n,
                0xc633_6400 + n,
                0,
                0x0001_0002,
                10 + n,
                15_000,
                990_000,
                999_000,
            ],
        );
        halves(&mut datagram, &[40_000 + n as u16, 443]);
        datagram.extend([0, 0x1b, 6, 0]);
        halves(&mut datagram, &[64_500, 64_501]);
        datagram.extend([24, 24, 0, 0]);
    }
    Feed {
        name: "v5",
        templates: None,
        datagram,
        records: 30,
        sequence: (16, 30),
    }
}

/// The 20 fields of the records of v9: element and length.
const FIELDS: [(u16, u16); 20] = [
    (8, 4),
    (12, 4),
    (15, 4),
    (10, 4),
    (14, 4),
    (2, 4),
    (1, 4),
    (22, 4),
    (21, 4),
    (7, 2),
    (11, 2),
    (6, 1),
    (4, 1),
    (5, 1),
    (61, 1),
    (16, 4),
    (17, 4),
    (9, 1),
    (13, 1),
    (60, 1),
];

fn v9() -> Feed {
    let header = |sequence: u32, count: u16| {
        let mut datagram = Vec::new();
        halves(&mut datagram, &[9, count]);
        let now = jiff::Timestamp::now().as_second() as u32;
        words(&mut datagram, &[1_000_000, now, sequence, 1]);
        datagram
    };
    let mut templates = header(0, 1);
    halves(
        &mut templates,
        &[0, 8 + 4 * FIELDS.len() as u16, 260, FIELDS.len() as u16],
    );
    for (element, length) in FIELDS {
        halves(&mut templates, &[element, length]);
    }
    let mut record = Vec::new();
    for (element, length) in FIELDS {
        let value: u64 = match element {
            8 => 0xc000_0201,
            12 => 0xc633_6401,
            2 => 10,
            1 => 15_000,
            22 => 990_000,
            21 => 999_000,
            4 => 6,
            60 => 4,
            _ => 1,
        };
        record.extend(&value.to_be_bytes()[8 - usize::from(length)..]);
    }
    let records = (1464 - 24) / record.len();
    let mut datagram = header(1, records as u16);
    let padding = (4 - record.len() * records % 4) % 4;
    halves(
        &mut datagram,
        &[260, (4 + record.len() * records + padding) as u16],
    );
    (0..records).for_each(|_| datagram.extend(&record));
    datagram.extend(vec![0; padding]);
    Feed {
        name: "v9",
        templates: Some(templates),
        datagram,
        records: records as u64,
        sequence: (12, 1),
    }
}

/// Sends a feed for [`SPAN`] at a rate. Returns how many records were sent.
fn send(ns: &NetNs, feed: &Feed, rate: u64) -> u64 {
    let sockets: Vec<UdpSocket> = (0..SOCKETS)
        .map(|_| {
            let socket = ns.enter(|| UdpSocket::bind("127.0.0.1:0").unwrap());
            socket.connect(("127.0.0.1", PORT)).unwrap();
            if let Some(templates) = &feed.templates {
                socket.send(templates).unwrap();
            }
            socket
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let mut datagrams = vec![feed.datagram.clone(); BATCH];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let (at, step) = feed.sequence;
    let mut sequences = [u32::from(feed.templates.is_some()); SOCKETS];
    let (start, mut sent) = (Instant::now(), 0);
    for (socket, sequence) in sockets.iter().zip(0..SOCKETS).cycle() {
        while start.elapsed().as_secs_f64() * (rate as f64) < sent as f64 {
            std::thread::sleep(Duration::from_micros(100));
        }
        if start.elapsed() >= SPAN {
            break;
        }
        let sequence = &mut sequences[sequence];
        for datagram in &mut datagrams {
            datagram[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
            *sequence = sequence.wrapping_add(step);
        }
        let slices: Vec<_> = datagrams.iter().map(|d| [IoSlice::new(d)]).collect();
        let flags = MsgFlags::empty();
        let result = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices,
            [None; BATCH],
            [],
            flags,
        );
        assert_eq!(result.unwrap().count(), BATCH);
        sent += feed.records * BATCH as u64;
    }
    sent
}

/// What a program did with a feed.
struct Outcome {
    sent: u64,
    stored: u64,
    /// CPU seconds.
    cpu: f64,
    /// Bytes on the disk.
    bytes: u64,
    /// The stored files, until this is dropped.
    files: PathBuf,
    _folder: TempDir,
}

impl Outcome {
    fn nanoseconds(&self) -> f64 {
        self.cpu / self.stored as f64 * 1e9
    }

    fn lost(&self) -> u64 {
        self.sent - self.stored
    }
}

/// The collector, with a number of workers.
fn ours(ns: &NetNs, feed: &Feed, rate: u64, more: &str) -> Outcome {
    let home = Home::with("");
    home.configure_collector(&format!(
        "listen: [{{address: 127.0.0.1, port: {PORT}, receiveBuffer: {RECEIVE_BUFFER}}}]\n{more}"
    ));
    let collector = home.start_collector(ns);
    let before = cpu_of(collector.child.id());
    let sent = send(ns, feed, rate);
    let mut last = 0;
    let stored = wait_for("the end of the records", || {
        std::thread::sleep(Duration::from_millis(300));
        let status = Client::unix(&home.path("control.sock"))
            .get("/status")
            .json();
        let stored = status["stored"].as_u64().unwrap();
        (std::mem::replace(&mut last, stored) == stored).then_some(stored)
    });
    let cpu = cpu_of(collector.child.id()) - before;
    collector.stop();
    Outcome {
        sent,
        stored,
        cpu,
        bytes: size(&home.path("segments")),
        files: home.path("segments"),
        _folder: home.dir,
    }
}

fn size(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap();
    entries
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum()
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn nfcapd(ns: &NetNs, feed: &Feed, rate: u64) -> Outcome {
    let directory = tempfile::tempdir().unwrap();
    let mut command = ns.command("nfcapd");
    command
        .args([
            "-b",
            "127.0.0.1",
            "-p",
            &PORT.to_string(),
            "-t",
            "3600",
            "-B",
            &RECEIVE_BUFFER.to_string(),
            "-w",
        ])
        .arg(directory.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = Killed(command.spawn().expect("nfcapd (nfdump) is installed"));
    wait_for("nfcapd", || {
        let mut ss = ns.command("cat");
        let sockets = ss.arg("/proc/net/udp").output().unwrap();
        String::from_utf8_lossy(&sockets.stdout)
            .contains(&format!(":{PORT:04X} "))
            .then_some(())
    });
    let before = cpu_of(child.0.id());
    let sent = send(ns, feed, rate);
    std::thread::sleep(Duration::from_millis(1000));
    let cpu = cpu_of(child.0.id()) - before;
    kill(Pid::from_raw(child.0.id() as i32), Signal::SIGTERM).unwrap();
    child.0.wait().unwrap();
    let counted = Command::new("nfdump")
        .arg("-I")
        .arg("-R")
        .arg(directory.path())
        .output()
        .unwrap();
    let counted = String::from_utf8_lossy(&counted.stdout).into_owned();
    let line = counted
        .lines()
        .find_map(|line| line.strip_prefix("Flows: "));
    let stored = line
        .unwrap_or_else(|| panic!("{counted}"))
        .trim()
        .parse()
        .unwrap();
    Outcome {
        sent,
        stored,
        cpu,
        bytes: size(directory.path()),
        files: directory.path().to_owned(),
        _folder: directory,
    }
}

/// The lowest of [`RATES`] at which records are lost in the median run, and the losses there.
fn first_loss(run: impl Fn(u64) -> Outcome) -> String {
    for rate in RATES {
        let runs = (0..RUNS).map(|_| run(rate));
        let shares: Vec<f64> = runs.map(|o| o.lost() as f64 / o.sent as f64).collect();
        let share = median(shares);
        if share > 0.0 {
            return format!("{} k/s: {:.2} %", rate / 1000, share * 100.0);
        }
    }
    format!("none up to {} k/s", RATES[RATES.len() - 1] / 1000)
}

/// Memory with 1,000 exporters of 20 templates each.
fn memory(ns: &NetNs) {
    let home = Home::with("");
    home.configure_collector(&format!("listen: ['127.0.0.1:{PORT}']\n"));
    let collector = home.start_collector(ns);
    let idle = resident_of(collector.child.id());
    let socket = ns.enter(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket.connect(("127.0.0.1", PORT)).unwrap();
    for domain in 0..1000u32 {
        let mut sets = Vec::new();
        for id in 0..20u16 {
            halves(
                &mut sets,
                &[
                    2,
                    8 + 4 * FIELDS.len() as u16,
                    256 + id,
                    FIELDS.len() as u16,
                ],
            );
            for (element, length) in FIELDS {
                halves(&mut sets, &[element, length]);
            }
        }
        let mut message = Vec::new();
        halves(&mut message, &[10, 16 + sets.len() as u16]);
        words(
            &mut message,
            &[jiff::Timestamp::now().as_second() as u32, 0, domain],
        );
        message.extend(sets);
        socket.send(&message).unwrap();
        std::thread::sleep(Duration::from_micros(300));
    }
    wait_for("all exporters", || {
        let status = Client::unix(&home.path("control.sock"))
            .get("/status")
            .json();
        (status["exporters"] == 1000).then_some(())
    });
    let full = resident_of(collector.child.id());
    row(
        "memory, 1,000 exporters of 20 templates",
        &format!("{:.1} MiB", full / f64::from(1 << 20)),
        &format!("idle {:.1} MiB", idle / f64::from(1 << 20)),
        &format!("{:.0} B/template", (full - idle) / 20_000.0),
    );
}

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the collect bench needs root, for network namespaces");
        std::process::exit(1);
    }
    let limit = "/proc/sys/net/core/rmem_max";
    let former = fs::read_to_string(limit).unwrap();
    // nfcapd cannot exceed the limit.
    fs::write(limit, RECEIVE_BUFFER.to_string()).unwrap();
    let ns = NetNs::new("bench");
    println!("| measurement | flowd-rs | nfcapd | ratio |");
    println!("| --- | --- | --- | --- |");
    for feed in [v5(), v9()] {
        let (mut us, mut them, mut two) = (Vec::new(), Vec::new(), Vec::new());
        let mut bytes = (0.0, 0.0);
        for _ in 0..RUNS {
            let [our, their] = [
                ours(&ns, &feed, COMMON_RATE, ""),
                nfcapd(&ns, &feed, COMMON_RATE),
            ];
            bytes = (
                our.bytes as f64 / our.stored as f64,
                their.bytes as f64 / their.stored as f64,
            );
            us.push(our.nanoseconds());
            them.push(their.nanoseconds());
            two.push(ours(&ns, &feed, COMMON_RATE, "workers: 2\n").nanoseconds());
        }
        let (us, them, two) = (median(us), median(them), median(two));
        let name = feed.name;
        row(
            &format!("{name}: CPU of a record, {} k/s", COMMON_RATE / 1000),
            &format!("{us:.0} ns"),
            &format!("{them:.0} ns"),
            &format!("{:.2}", us / them),
        );
        row(
            &format!("{name}: the same with two workers"),
            &format!("{two:.0} ns"),
            &format!("{us:.0} ns (one)"),
            &format!("{:.2}", two / us),
        );
        row(
            &format!("{name}: bytes of a record"),
            &format!("{:.0}", bytes.0),
            &format!("{:.0}", bytes.1),
            &format!("{:.2}", bytes.0 / bytes.1),
        );
        row(
            &format!("{name}: first rate with losses"),
            &first_loss(|rate| ours(&ns, &feed, rate, "")),
            &first_loss(|rate| nfcapd(&ns, &feed, rate)),
            "",
        );
    }
    memory(&ns);
    println!("| records read back | flowd-rs reader | nfdump | speed, ratio |");
    println!("| --- | --- | --- | --- |");
    let feed = v5();
    let [our, their] = [
        ours(&ns, &feed, COMMON_RATE, ""),
        nfcapd(&ns, &feed, COMMON_RATE),
    ];
    beside_nfdump(&our.files, &their.files, our.stored.min(their.stored));
    fs::write(limit, former).unwrap();
}
