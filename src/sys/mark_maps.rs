//! The pinned maps of packet marking: the marks of flows, and the counts of marked packets. The layout of keys and
//! values is that of bpf/marker.h.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle};
use nix::libc;
use nix::unistd::Uid;

use super::ownership;
use crate::error::{Error, Result};
use crate::flow::{Flow, Protocol, Tag};
use crate::scitag::Strategy;

/// The directory of the pinned maps in the bpffs. The version is that of the layout in bpf/marker.h.
pub(super) const PIN_DIR: &str = "flowd-rs/v1";

/// The array with the program that writes labels in place. Its pin keeps the kernel from emptying it when the daemon ends.
pub(super) const WRITER: &str = "writer";

/// The key of a flow, in the direction of the packets that leave this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 40]);

impl Key {
    /// The key that every packet matches with `matchAll`.
    pub const ALL: Key = Key([0; 40]);

    /// The key of an IPv6 flow, in the direction of the flow. `None` for an IPv4 flow.
    pub fn new(flow: &Flow) -> Option<Key> {
        let (IpAddr::V6(source), IpAddr::V6(destination)) =
            (flow.source.address, flow.destination.address)
        else {
            return None;
        };
        let mut key = [0; 40];
        key[..16].copy_from_slice(&source.octets());
        key[16..32].copy_from_slice(&destination.octets());
        key[32..34].copy_from_slice(&flow.source.port.to_be_bytes());
        key[34..36].copy_from_slice(&flow.destination.port.to_be_bytes());
        key[36] = match flow.protocol {
            Protocol::Tcp => libc::IPPROTO_TCP as u8,
            Protocol::Udp => libc::IPPROTO_UDP as u8,
        };
        Some(Key(key))
    }

    fn from_bytes(bytes: &[u8]) -> Option<Key> {
        bytes.try_into().ok().map(Key)
    }

    /// The flow of a key; `None` for [`Key::ALL`].
    pub fn flow(&self) -> Option<Flow> {
        let endpoint = |address: usize, port: usize| {
            let octets: [u8; 16] = self.0[address..address + 16].try_into().unwrap_or_default();
            (
                IpAddr::from(octets),
                u16::from_be_bytes([self.0[port], self.0[port + 1]]),
            )
        };
        let protocol = match i32::from(self.0[36]) {
            libc::IPPROTO_TCP => Protocol::Tcp,
            _ => Protocol::Udp,
        };
        Flow::new(protocol, endpoint(0, 32), endpoint(16, 34)).ok()
    }
}

/// The mark of a flow's packets, and how many packets were marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The flow label, 20 bits.
    pub label: u32,
    /// The tag that the mark encodes.
    pub tag: Tag,
    /// Packets marked, as sent over the wire.
    pub packets: u64,
    /// Bytes marked, including all headers of a frame. The headers of a GSO packet count once.
    pub bytes: u64,
}

impl Mark {
    fn to_bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&self.label.to_ne_bytes());
        bytes[4..8].copy_from_slice(&crate::scitag::option_value(self.tag).to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.packets.to_ne_bytes());
        bytes[16..].copy_from_slice(&self.bytes.to_ne_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Mark> {
        let bytes: &[u8; 24] = bytes.try_into().ok()?;
        let word = |at: usize| {
            u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let long = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
        Some(Mark {
            label: word(0),
            tag: tag(word(4)),
            packets: long(8),
            bytes: long(16),
        })
    }
}

fn tag(option: u32) -> Tag {
    Tag {
        experiment: (option >> 8) as u16,
        activity: option as u16 & 0xff,
    }
}

/// The sums over the ended flows of a tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Packets marked.
    pub packets: u64,
    /// Bytes marked.
    pub bytes: u64,
}

/// The reasons why packets of known flows are sent unmarked, in the order of `enum unmarked`.
pub const UNMARKED: [&str; 3] = [
    "larger than the MTU",
    "conflicting headers",
    "refused by the kernel",
];

const NEEDED: &str = "; CAP_BPF and CAP_NET_ADMIN (before Linux 5.8: CAP_SYS_ADMIN) are needed";

/// The pinned maps.
pub struct Maps {
    directory: PathBuf,
    pub(super) flows: MapHandle,
    unmarked: MapHandle,
    totals: MapHandle,
    /// Interfaces whose clsact qdisc the daemon created, by index.
    pub(super) qdiscs: MapHandle,
    /// One entry: the strategy, for `flowd-rs marker show`.
    pub(super) about: MapHandle,
}

/// The outcome of [`Maps::enter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// It is in the map.
    Done,
    /// The map is full.
    Full,
}

impl Maps {
    /// Opens the maps that a daemon has pinned. `None` if there are none.
    ///
    /// # Errors
    ///
    /// The user may not read the maps, or one is missing.
    pub fn pinned(bpffs: &Path) -> Result<Option<Maps>> {
        let directory = bpffs.join(PIN_DIR);
        let flows = directory.join("flows");
        match fs::exists(&flows) {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(error) => {
                let resource = format!("pinned maps in {}", directory.display());
                return Err(access_failure(&resource, error));
            }
        }
        let map = |name: &str| {
            let path = directory.join(name);
            MapHandle::from_pinned_path(&path).map_err(|e| {
                access_failure(&format!("pinned map {}", path.display()), io_error(&e))
            })
        };
        Ok(Some(Maps {
            flows: map("flows")?,
            unmarked: map("unmarked")?,
            totals: map("totals")?,
            qdiscs: map("qdiscs")?,
            about: map("about")?,
            directory,
        }))
    }

    /// Iterates over the marks of all flows.
    pub fn marks(&self) -> impl Iterator<Item = (Key, Mark)> {
        // The kernel restarts the iteration if the current key is removed meanwhile.
        let mut seen = HashSet::new();
        let mark = move |key: Vec<u8>| {
            if !seen.insert(key.clone()) {
                return None;
            }
            let value = self.flows.lookup(&key, MapFlags::ANY).ok().flatten()?;
            Some((Key::from_bytes(&key)?, Mark::from_bytes(&value)?))
        };
        self.flows.keys().filter_map(mark)
    }

    /// The keys of all flows. One may come twice if entries are removed meanwhile.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.flows.keys().filter_map(|key| Key::from_bytes(&key))
    }

    /// The mark of a key.
    pub fn get(&self, key: &Key) -> Option<Mark> {
        let value = self.flows.lookup(&key.0, MapFlags::ANY).ok().flatten()?;
        Mark::from_bytes(&value)
    }

    /// Enters a mark. An existing mark is replaced unless its label and tag are the same; its counts are added to the
    /// total of its tag.
    pub fn enter(&self, key: &Key, mark: Mark) -> io::Result<Entered> {
        match self
            .flows
            .update(&key.0, &mark.to_bytes(), MapFlags::NO_EXIST)
        {
            Ok(()) => return Ok(Entered::Done),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                let error = io_error(&error);
                return match error.raw_os_error() {
                    Some(libc::E2BIG) => Ok(Entered::Full),
                    _ => Err(error),
                };
            }
        }
        if let Some(old) = self.get(key) {
            if (old.label, old.tag) == (mark.label, mark.tag) {
                return Ok(Entered::Done);
            }
            self.add_to_total(old);
        }
        let updated = self.flows.update(&key.0, &mark.to_bytes(), MapFlags::ANY);
        updated.map(|()| Entered::Done).map_err(|e| io_error(&e))
    }

    /// Removes a mark and adds its counts to the total of its tag. Returns whether the mark existed.
    pub fn remove(&self, key: &Key) -> bool {
        let Some(old) = self.get(key) else {
            return false;
        };
        if self.flows.delete(&key.0).is_err() {
            return false;
        }
        self.add_to_total(old);
        true
    }

    fn add_to_total(&self, mark: Mark) {
        if mark.packets == 0 {
            return;
        }
        let key = crate::scitag::option_value(mark.tag).to_ne_bytes();
        let sum = self.total(&key);
        let mut value = [0; 16];
        value[..8].copy_from_slice(&(sum.packets + mark.packets).to_ne_bytes());
        value[8..].copy_from_slice(&(sum.bytes + mark.bytes).to_ne_bytes());
        if let Err(error) = self.totals.update(&key, &value, MapFlags::ANY) {
            log::debug!("marker: totals of tag {}: {}", mark.tag, io_error(&error));
        }
    }

    fn total(&self, key: &[u8]) -> Total {
        let value = self
            .totals
            .lookup(key, MapFlags::ANY)
            .ok()
            .flatten()
            .unwrap_or_default();
        let long = |at: usize| {
            value
                .get(at..at + 8)
                .and_then(|b| b.try_into().ok())
                .map_or(0, u64::from_ne_bytes)
        };
        Total {
            packets: long(0),
            bytes: long(8),
        }
    }

    /// Packets and bytes marked of ended flows, by tag.
    pub fn totals(&self) -> Vec<(Tag, Total)> {
        let entry = |key: Vec<u8>| {
            let option = u32::from_ne_bytes(key.as_slice().try_into().ok()?);
            Some((tag(option), self.total(&key)))
        };
        self.totals.keys().filter_map(entry).collect()
    }

    /// How many flows the map has room for.
    pub fn capacity(&self) -> usize {
        self.flows.max_entries() as usize
    }

    /// How many packets were sent unmarked, for each reason in [`UNMARKED`].
    pub fn unmarked(&self) -> [u64; 3] {
        let count = |index: u32| {
            let values = self
                .unmarked
                .lookup_percpu(&index.to_ne_bytes(), MapFlags::ANY)
                .ok()
                .flatten();
            let cpu_count =
                |value: &Vec<u8>| value.as_slice().try_into().map_or(0, u64::from_ne_bytes);
            values.unwrap_or_default().iter().map(cpu_count).sum()
        };
        [count(0), count(1), count(2)]
    }

    /// The strategy of the daemon that last loaded the program.
    pub fn strategy(&self) -> Option<Strategy> {
        let value = self.about.lookup(&[0; 4], MapFlags::ANY).ok().flatten()?;
        Strategy::ALL.get(usize::from(*value.first()?)).copied()
    }

    /// Removes the pins. The kernel frees the maps when their last user closes them.
    pub fn unpin(&self) -> io::Result<()> {
        for name in ["flows", "unmarked", WRITER, "totals", "qdiscs", "about"] {
            remove_pin(&self.directory.join(name))?;
        }
        // The directories may hold the maps of another version.
        let _ = fs::remove_dir(&self.directory);
        if let Some(parent) = self.directory.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Removes a pin if there is one.
pub(super) fn remove_pin(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The error of a libbpf call on `resource`, with the capabilities that it needs.
pub(super) fn failure(resource: &str, error: &libbpf_rs::Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => NEEDED,
        _ => "",
    };
    let error = io_error(error);
    // Error numbers of libbpf's own: LIBBPF_ERRNO__LIBELF, __FORMAT and so on.
    if error.raw_os_error().is_some_and(|number| number >= 4000) {
        return Error::Failed(format!("{resource}: not a valid eBPF object file"));
    }
    Error::Failed(format!("{resource}: {error}{hint}"))
}

/// The error of an access to the pinned maps. If permission is denied, it says who may access them.
pub(super) fn access_failure(resource: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::PermissionDenied if !Uid::effective().is_root() => Error::Failed(format!(
            "{resource}: {}; run flowd-rs as root (sudo)",
            ownership::DENIED
        )),
        io::ErrorKind::PermissionDenied => Error::Failed(format!("{resource}: {error}{NEEDED}")),
        _ => Error::Failed(format!("{resource}: {error}")),
    }
}

/// The system's error in an error of libbpf-rs, which contains the number only in its text.
pub(super) fn io_error(error: &libbpf_rs::Error) -> io::Error {
    let text = format!("{error:#}");
    let number = text
        .rsplit_once("(os error ")
        .and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    number.map_or_else(|| io::Error::other(text), io::Error::from_raw_os_error)
}
