//! Loads the eBPF program that reports the TCP connections of a cgroup, attaches it, and reads its reports.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use libbpf_rs::{
    ErrorKind, Link, MapCore, MapFlags, MapType, Object, ObjectBuilder, PerfBuffer,
    PerfBufferBuilder, RingBuffer, RingBufferBuilder,
};
use log::Level;
use nix::libc;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use nix::time::{ClockId, clock_gettime};

use super::mark_maps::{failure, io_error};
use super::stop::Stop;
use super::waiter::Waiter;
use crate::error::{Context, Error, Result};
use crate::flow::{Flow, Protocol};
use crate::logging::LogLimit;
use crate::socket::{Algorithm, Skops};

const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sockops.bpf.o"));
/// The root of the cgroup hierarchy.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// The root of the cgroup v2 hierarchy on a host with both versions.
const HYBRID_CGROUP2_ROOT: &str = "/sys/fs/cgroup/unified";
/// Size of `struct sockops_event`, in bytes.
const REPORT_SIZE: usize = 144;
/// How often the buffer is read if the kernel does not wake the reader.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Pages of the perf buffer of each CPU.
const PERF_PAGES_PER_CPU: usize = 64;

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The local end has established it.
    Connected,
    /// The remote end has established it.
    Accepted,
    /// It is open: a periodic report, or a change of its TCP state.
    Ongoing,
    /// It was closed.
    Closed,
}

/// A report of the program on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What happened to the connection.
    pub kind: Kind,
    /// The flow, from the local to the remote end.
    pub flow: Flow,
    /// When it happened.
    pub time: Timestamp,
    /// The statistics of the connection.
    pub skops: Skops,
}

/// How to load the program, where to attach it and what it reports.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The directory of the cgroup.
    pub cgroup: PathBuf,
    /// An object file to load instead of the built-in one.
    pub program: Option<PathBuf>,
    /// Whether the program writes to the kernel's trace pipe.
    pub debug: bool,
    /// Local ports to report; a bound of 0 does not limit.
    pub local_ports: RangeInclusive<u16>,
    /// Remote ports to report; a bound of 0 does not limit.
    pub remote_ports: RangeInclusive<u16>,
    /// The minimum time between two periodic reports of one connection; `None` for no periodic reports.
    pub period: Option<Duration>,
    /// Whether the program reports each change of a connection's TCP state.
    pub transitions: bool,
}

/// The attached program. Dropping the value detaches it.
pub struct Sockops {
    object: Object,
    /// Whether reports arrive in the ring buffer, or else in the perf buffer.
    uses_ring: bool,
    _link: Link,
}

impl Sockops {
    /// Loads the program and attaches it to the cgroup, in addition to programs that are already attached. `section` is
    /// the key of the configuration, for errors.
    pub fn attach(settings: &Settings, section: &str) -> Result<Sockops> {
        let cgroup = cgroup_directory(&settings.cgroup, section)?;
        let uses_ring = MapType::RingBuf.is_supported().unwrap_or(false);
        let resource = match &settings.program {
            Some(path) => format!("{} ({section}.programPath)", path.display()),
            None => "sockops program".to_owned(),
        };
        libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Debug, |_, text| {
            log::trace!("{}", text.trim_end())
        })));
        let mut builder = ObjectBuilder::default();
        let mut opened = match &settings.program {
            Some(path) => builder.open_file(path),
            None => builder.open_memory(OBJECT),
        }
        .map_err(|e| failure(&resource, &e))?;
        let mut has_settings = false;
        for mut map in opened.maps_mut() {
            let result = match map.name().to_str() {
                Some("ring") => map.set_autocreate(uses_ring),
                Some("perf") => map.set_autocreate(!uses_ring),
                Some(".rodata.settings") => {
                    has_settings = true;
                    map.set_initial_value(&settings_bytes(settings))
                }
                _ => Ok(()),
            };
            result.map_err(|e| failure(&resource, &e))?;
        }
        let name = if uses_ring {
            "flowd_sockops_ring"
        } else {
            "flowd_sockops_perf"
        };
        for mut program in opened.progs_mut() {
            let is_used = program.name() == name;
            program.set_autoload(is_used);
        }
        let object = opened.load().map_err(|e| load_failure(&resource, &e))?;
        let program = object.progs_mut().find(|program| program.name() == name);
        let Some(program) = program.filter(|_| has_settings) else {
            return Err(Error::Failed(format!(
                "{resource}: lacks the program {name} or the section .rodata.settings, expected an object file built from bpf/sockops.bpf.c"
            )));
        };
        let directory = File::open(&cgroup).context(|| cgroup.display().to_string())?;
        let link = program.attach_cgroup(directory.as_raw_fd());
        let link = link.map_err(|e| failure(&format!("{resource} on {}", cgroup.display()), &e))?;
        Ok(Sockops {
            object,
            uses_ring,
            _link: link,
        })
    }

    /// Passes reports to `handle` until the stop, or until `handle` fails. Passes the number of reports that were lost
    /// because the buffer was full to `count_lost`, and logs it with the prefix `name`.
    pub fn follow<E>(
        &self,
        name: &str,
        stop: &Stop,
        mut handle: impl FnMut(Report) -> std::result::Result<(), E>,
        count_lost: impl Fn(u64),
    ) -> Result<()> {
        let buffer = || format!("{name}: buffer of the sockops program");
        let mut reader = self.reader().context(buffer)?;
        let mut waiter = Waiter::new().context(buffer)?;
        waiter.watch(&reader).context(buffer)?;
        waiter.watch(stop).context(buffer)?;
        let mut lost_log = LogLimit::new(Level::Warn, "sockops: lost reports");
        let mut lost = 0;
        while !stop.is_set() {
            waiter.wait(Some(POLL_INTERVAL)).context(buffer)?;
            for report in reader.read().context(buffer)? {
                if handle(report).is_err() {
                    return Ok(());
                }
            }
            let more = self.lost() - lost;
            if more > 0 {
                lost += more;
                count_lost(more);
                lost_log.log(Instant::now(), || {
                    let reports = if more == 1 {
                        "report was"
                    } else {
                        "reports were"
                    };
                    format!("{name}: {more} {reports} lost: the buffer was full")
                });
            }
            lost_log.tick(Instant::now());
        }
        Ok(())
    }

    /// Opens the buffer, for the thread that reads the reports.
    fn reader(&self) -> io::Result<Reader> {
        let reports = Rc::new(RefCell::new(Vec::new()));
        let name = if self.uses_ring { "ring" } else { "perf" };
        let maps = self.object.maps();
        let Some(map) = maps.into_iter().find(|map| map.name() == name) else {
            return Err(io::Error::other(format!("the program has no map {name}")));
        };
        let decoded = Rc::clone(&reports);
        let decode = move |bytes: &[u8]| decoded.borrow_mut().extend(decode(bytes));
        let buffer = if self.uses_ring {
            let mut builder = RingBufferBuilder::new();
            builder
                .add(&map, move |bytes| {
                    decode(bytes);
                    0
                })
                .map_err(|e| io_error(&e))?;
            Buffer::Ring(builder.build().map_err(|e| io_error(&e))?)
        } else {
            let builder = PerfBufferBuilder::new(&map).pages(PERF_PAGES_PER_CPU);
            let builder = builder.sample_cb(move |_, bytes: &[u8]| decode(bytes));
            Buffer::Perf(builder.build().map_err(|e| io_error(&e))?)
        };
        Ok(Reader { buffer, reports })
    }

    /// The number of reports so far that found the buffer full.
    fn lost(&self) -> u64 {
        let maps = self.object.maps();
        let lost = maps.into_iter().find(|map| map.name() == "lost");
        let counts =
            lost.and_then(|map| map.lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY).ok());
        let count = |bytes: Vec<u8>| bytes.try_into().map_or(0, u64::from_ne_bytes);
        counts.flatten().into_iter().flatten().map(count).sum()
    }
}

enum Buffer {
    Ring(RingBuffer<'static>),
    Perf(PerfBuffer<'static>),
}

/// Reads reports from the buffer.
struct Reader {
    buffer: Buffer,
    reports: Rc<RefCell<Vec<RawReport>>>,
}

impl Reader {
    /// Reads the reports that wait in the buffer, without waiting for more.
    fn read(&mut self) -> io::Result<Vec<Report>> {
        match &self.buffer {
            Buffer::Ring(ring) => ring.consume(),
            Buffer::Perf(perf) => perf.consume(),
        }
        .map_err(|e| io_error(&e))?;
        let since_boot = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let (wall, boot) = (Timestamp::now(), Duration::from(since_boot));
        let report = |raw: RawReport| {
            let ago = boot.saturating_sub(Duration::from_nanos(raw.time));
            let ago = SignedDuration::try_from(ago).unwrap_or_default();
            let time = wall.checked_sub(ago).unwrap_or(wall);
            Report {
                time: Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time),
                ..raw.report
            }
        };
        let mut reports = self.reports.borrow_mut();
        // There is one perf buffer per CPU, so the reports of several CPUs are not in order.
        reports.sort_by_key(|raw| raw.time);
        Ok(reports.drain(..).map(report).collect())
    }
}

/// Becomes readable when reports wait in the buffer.
impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        match &self.buffer {
            Buffer::Ring(ring) => ring.epoll_fd(),
            Buffer::Perf(perf) => perf.epoll_fd(),
        }
    }
}

/// A report with its time in nanoseconds of `CLOCK_MONOTONIC`.
struct RawReport {
    time: u64,
    report: Report,
}

fn decode(bytes: &[u8]) -> Option<RawReport> {
    let bytes = bytes.get(..REPORT_SIZE)?;
    let u64_at = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u16_at = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
        match i32::from(bytes[60]) {
            libc::AF_INET => Some(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]).into()),
            libc::AF_INET6 => Some(Ipv6Addr::from(octets).into()),
            _ => None,
        }
    };
    let kind = match bytes[61] {
        1 => Kind::Connected,
        2 => Kind::Accepted,
        3 => Kind::Ongoing,
        4 => Kind::Closed,
        _ => return None,
    };
    let (local, remote) = ((address(24)?, u16_at(56)?), (address(40)?, u16_at(58)?));
    let mut numbers = [0; 16];
    for (index, number) in numbers.iter_mut().enumerate() {
        *number = u32_at(64 + 4 * index)?;
    }
    Some(RawReport {
        time: u64_at(0)?,
        report: Report {
            kind,
            flow: Flow::new(Protocol::Tcp, local, remote).ok()?,
            time: Timestamp::UNIX_EPOCH,
            skops: Skops {
                state: bytes[62],
                bytes_received: u64_at(8)?,
                bytes_acked: u64_at(16)?,
                numbers,
                congestion: Algorithm::new(&bytes[128..144]),
            },
        },
    })
}

/// Checks that `path` is a directory of a cgroup v2. The default, the root of the hierarchy, is replaced by the root of
/// the cgroup v2 hierarchy on a host with both versions.
fn cgroup_directory(path: &Path, section: &str) -> Result<PathBuf> {
    let is_v2 =
        |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if is_v2(path) {
        return Ok(path.to_owned());
    }
    let hybrid = Path::new(HYBRID_CGROUP2_ROOT);
    if path == Path::new(CGROUP_ROOT) && is_v2(hybrid) {
        return Ok(hybrid.to_owned());
    }
    Err(Error::Failed(format!(
        "{} ({section}.cgroupPath): not a cgroup v2, expected a directory in the cgroup2 file system",
        path.display()
    )))
}

/// Encodes `struct sockops_settings`.
fn settings_bytes(settings: &Settings) -> [u8; 24] {
    let mut bytes = [0; 24];
    let period = settings.period.map_or(0, |period| period.as_nanos() as u64);
    bytes[..8].copy_from_slice(&period.to_ne_bytes());
    bytes[8..12].copy_from_slice(&u32::from(settings.transitions).to_ne_bytes());
    bytes[12..16].copy_from_slice(&u32::from(settings.debug).to_ne_bytes());
    let (local, remote) = (&settings.local_ports, &settings.remote_ports);
    let bounds = [local.start(), local.end(), remote.start(), remote.end()];
    for (index, bound) in bounds.into_iter().enumerate() {
        bytes[16 + 2 * index..18 + 2 * index].copy_from_slice(&bound.to_ne_bytes());
    }
    bytes
}

fn load_failure(resource: &str, error: &libbpf_rs::Error) -> Error {
    match error.kind() {
        ErrorKind::InvalidInput => Error::Failed(format!(
            "{resource}: {}; the kernel's verifier rejected it; --log-level trace shows why",
            io_error(error)
        )),
        _ => failure(resource, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_decoded() {
        let mut bytes = [0; REPORT_SIZE];
        bytes[..8].copy_from_slice(&5u64.to_ne_bytes());
        bytes[8..16].copy_from_slice(&7u64.to_ne_bytes());
        bytes[24..28].copy_from_slice(&[192, 0, 2, 1]);
        bytes[40..44].copy_from_slice(&[192, 0, 2, 2]);
        bytes[56..58].copy_from_slice(&443u16.to_ne_bytes());
        bytes[58..60].copy_from_slice(&5201u16.to_ne_bytes());
        (bytes[60], bytes[61], bytes[62]) = (2, 2, 1);
        bytes[64..68].copy_from_slice(&8000u32.to_ne_bytes());
        bytes[128..133].copy_from_slice(b"cubic");
        let raw = decode(&bytes).unwrap();
        assert_eq!((raw.time, raw.report.kind), (5, Kind::Accepted));
        assert_eq!(
            raw.report.flow.to_string(),
            "tcp 192.0.2.1:443 > 192.0.2.2:5201"
        );
        let skops = raw.report.skops;
        assert_eq!(
            (
                skops.bytes_received,
                skops.numbers[0],
                skops.congestion.as_str()
            ),
            (7, 8000, "cubic")
        );
        for cut in 0..REPORT_SIZE {
            assert!(decode(&bytes[..cut]).is_none());
        }
        bytes[61] = 9;
        assert!(decode(&bytes).is_none());
    }
}
