//! The eBPF program that tells of the TCP connections of a cgroup: how it is loaded and attached, and
//! what it says.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
use crate::config::Sockops as Settings;
use crate::error::{Context, Error, Result};
use crate::flow::{Flow, Protocol};
use crate::log_limit::LogLimit;
use crate::socket::{Algorithm, Skops};

const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sockops.bpf.o"));
/// Where cgroups are, and where those of version 2 are on a host that has both.
const CGROUP: &str = "/sys/fs/cgroup";
const UNIFIED: &str = "/sys/fs/cgroup/unified";
/// `struct sockops_event`
const EVENT: usize = 144;
/// How often the buffer is looked at in any case.
const TICK: Duration = Duration::from_millis(250);
/// Pages of a perf buffer, a CPU.
const PERF_PAGES: usize = 64;

/// What has become of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This end has opened it.
    Connected,
    /// The other end has.
    Accepted,
    /// There is news of it.
    News,
    /// It was closed.
    Closed,
}

/// What the program says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What has become of the connection.
    pub kind: Kind,
    /// From the local end to the remote one.
    pub flow: Flow,
    /// When.
    pub time: Timestamp,
    /// How it is doing.
    pub skops: Skops,
}

/// The program, attached; detached with the value.
pub struct Sockops {
    object: Object,
    ring: bool,
    _link: Link,
}

impl Sockops {
    /// Loads the program and attaches it to the cgroup, beside those of others. `section` is the key of
    /// the configuration, for errors.
    pub fn attach(settings: &Settings, section: &str) -> Result<Sockops> {
        let place = cgroup(&settings.cgroup, section)?;
        let ring = MapType::RingBuf.is_supported().unwrap_or(false);
        let what = match &settings.program {
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
        .map_err(|e| failure(&what, &e))?;
        let mut has_settings = false;
        for mut map in opened.maps_mut() {
            let result = match map.name().to_str() {
                Some("ring") => map.set_autocreate(ring),
                Some("perf") => map.set_autocreate(!ring),
                Some(".rodata.settings") => {
                    has_settings = true;
                    map.set_initial_value(&settings_bytes(settings))
                }
                _ => Ok(()),
            };
            result.map_err(|e| failure(&what, &e))?;
        }
        let name = if ring {
            "flowd_sockops_ring"
        } else {
            "flowd_sockops_perf"
        };
        for mut program in opened.progs_mut() {
            let chosen = program.name() == name;
            program.set_autoload(chosen);
        }
        let object = opened.load().map_err(|e| refused(&what, &e))?;
        let program = object.progs_mut().find(|program| program.name() == name);
        let Some(program) = program.filter(|_| has_settings) else {
            return Err(Error::Failed(format!(
                "{what}: lacks the program {name} or the section .rodata.settings, expected one built from bpf/sockops.bpf.c"
            )));
        };
        let directory = File::open(&place).context(|| place.display().to_string())?;
        let link = program.attach_cgroup(directory.as_raw_fd());
        let link = link.map_err(|e| failure(&format!("{what} on {}", place.display()), &e))?;
        Ok(Sockops {
            object,
            ring,
            _link: link,
        })
    }

    /// Hands out events until it is time to stop or nobody wants more. Says how many were lost, because
    /// the buffer was full, to `count` and, as `name`, to the log.
    pub fn follow<E>(
        &self,
        name: &str,
        stop: &Stop,
        mut take: impl FnMut(Event) -> std::result::Result<(), E>,
        count: impl Fn(u64),
    ) -> Result<()> {
        let buffer = || format!("{name}: buffer of the sockops program");
        let mut reader = self.reader().context(buffer)?;
        let mut waiter = Waiter::new().context(buffer)?;
        waiter.watch(&reader).context(buffer)?;
        waiter.watch(stop).context(buffer)?;
        let mut losses = LogLimit::new(Level::Warn, "sockops: losses");
        let mut lost = 0;
        while !stop.is_set() {
            waiter.wait(Some(TICK)).context(buffer)?;
            for event in reader.events().context(buffer)? {
                if take(event).is_err() {
                    return Ok(());
                }
            }
            let more = self.lost() - lost;
            if more > 0 {
                lost += more;
                count(more);
                losses.log(Instant::now(), || {
                    format!("{name}: {more} events were lost: the buffer was full")
                });
            }
            losses.tick(Instant::now());
        }
        Ok(())
    }

    /// Opens the buffer of events, for the thread that reads them.
    fn reader(&self) -> io::Result<Reader> {
        let events = Rc::new(RefCell::new(Vec::new()));
        let name = if self.ring { "ring" } else { "perf" };
        let maps = self.object.maps();
        let Some(map) = maps.into_iter().find(|map| map.name() == name) else {
            return Err(io::Error::other(format!("the program has no map {name}")));
        };
        let taken = Rc::clone(&events);
        let take = move |bytes: &[u8]| taken.borrow_mut().extend(raw(bytes));
        let buffer = if self.ring {
            let mut builder = RingBufferBuilder::new();
            builder
                .add(&map, move |bytes| {
                    take(bytes);
                    0
                })
                .map_err(|e| io_error(&e))?;
            Buffer::Ring(builder.build().map_err(|e| io_error(&e))?)
        } else {
            let builder = PerfBufferBuilder::new(&map).pages(PERF_PAGES);
            let builder = builder.sample_cb(move |_, bytes: &[u8]| take(bytes));
            Buffer::Perf(builder.build().map_err(|e| io_error(&e))?)
        };
        Ok(Reader { buffer, events })
    }

    /// Events that found the buffer full.
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

/// The buffer of events.
struct Reader {
    buffer: Buffer,
    events: Rc<RefCell<Vec<Raw>>>,
}

impl Reader {
    /// The events that have come, without waiting.
    fn events(&mut self) -> io::Result<Vec<Event>> {
        match &self.buffer {
            Buffer::Ring(ring) => ring.consume(),
            Buffer::Perf(perf) => perf.consume(),
        }
        .map_err(|e| io_error(&e))?;
        let since_boot = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let (wall, boot) = (Timestamp::now(), Duration::from(since_boot));
        let event = |raw: Raw| {
            let ago = boot.saturating_sub(Duration::from_nanos(raw.time));
            let ago = SignedDuration::try_from(ago).unwrap_or_default();
            let time = wall.checked_sub(ago).unwrap_or(wall);
            Event {
                time: Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time),
                ..raw.event
            }
        };
        let mut events = self.events.borrow_mut();
        // The buffers of perf events are one a CPU.
        events.sort_by_key(|raw| raw.time);
        Ok(events.drain(..).map(event).collect())
    }
}

/// Becomes readable when there are events.
impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        match &self.buffer {
            Buffer::Ring(ring) => ring.epoll_fd(),
            Buffer::Perf(perf) => perf.epoll_fd(),
        }
    }
}

/// An event whose time is in ns since boot.
struct Raw {
    time: u64,
    event: Event,
}

fn raw(bytes: &[u8]) -> Option<Raw> {
    let bytes = bytes.get(..EVENT)?;
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
        3 => Kind::News,
        4 => Kind::Closed,
        _ => return None,
    };
    let (local, remote) = ((address(24)?, u16_at(56)?), (address(40)?, u16_at(58)?));
    let mut numbers = [0; 16];
    for (index, number) in numbers.iter_mut().enumerate() {
        *number = u32_at(64 + 4 * index)?;
    }
    Some(Raw {
        time: u64_at(0)?,
        event: Event {
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

/// The directory of the cgroup: it must be of version 2. At the default, that of a host with both
/// versions is found.
fn cgroup(path: &Path, section: &str) -> Result<PathBuf> {
    let is_v2 =
        |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
    if is_v2(path) {
        return Ok(path.to_owned());
    }
    let unified = Path::new(UNIFIED);
    if path == Path::new(CGROUP) && is_v2(unified) {
        return Ok(unified.to_owned());
    }
    Err(Error::Failed(format!(
        "{} ({section}.cgroupPath): not a cgroup of version 2, expected a directory of the cgroup2 file system",
        path.display()
    )))
}

/// `struct sockops_settings`
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

fn refused(what: &str, error: &libbpf_rs::Error) -> Error {
    match error.kind() {
        ErrorKind::InvalidInput => Error::Failed(format!(
            "{what}: {}: the kernel's verifier refused it; --log-level trace shows why",
            io_error(error)
        )),
        _ => failure(what, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read() {
        let mut bytes = [0; EVENT];
        bytes[..8].copy_from_slice(&5u64.to_ne_bytes());
        bytes[8..16].copy_from_slice(&7u64.to_ne_bytes());
        bytes[24..28].copy_from_slice(&[192, 0, 2, 1]);
        bytes[40..44].copy_from_slice(&[192, 0, 2, 2]);
        bytes[56..58].copy_from_slice(&443u16.to_ne_bytes());
        bytes[58..60].copy_from_slice(&5201u16.to_ne_bytes());
        (bytes[60], bytes[61], bytes[62]) = (2, 2, 1);
        bytes[64..68].copy_from_slice(&8000u32.to_ne_bytes());
        bytes[128..133].copy_from_slice(b"cubic");
        let raw = raw(&bytes).unwrap();
        assert_eq!((raw.time, raw.event.kind), (5, Kind::Accepted));
        assert_eq!(
            raw.event.flow.to_string(),
            "tcp 192.0.2.1:443 > 192.0.2.2:5201"
        );
        let skops = raw.event.skops;
        assert_eq!(
            (
                skops.bytes_received,
                skops.numbers[0],
                skops.congestion.as_str()
            ),
            (7, 8000, "cubic")
        );
        for cut in 0..EVENT {
            assert!(super::raw(&bytes[..cut]).is_none());
        }
        bytes[61] = 9;
        assert!(super::raw(&bytes).is_none());
    }
}
