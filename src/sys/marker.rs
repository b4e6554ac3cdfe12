//! The eBPF side of packet marking: the program, its pinned maps, and where it is attached. What is
//! in the maps is laid out as in bpf/marker.h.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use libbpf_rs::{
    ErrorKind, MapCore, MapFlags, MapHandle, MapType, ObjectBuilder, ProgramType, TC_EGRESS,
    TC_INGRESS, TcHookBuilder, libbpf_sys,
};
use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::clsact;
use super::interfaces::Interface;
use crate::config::{Marker as Settings, Strategy};
use crate::error::{Context, Error, Result};
use crate::flow::{Endpoint, Flow, Protocol, Tag};

/// Below the bpffs; the version is that of keys and values in bpf/marker.h.
const PIN_DIR: &str = "flowd-rs/v1";
/// Ours among the filters of one priority.
const HANDLE: u32 = 0x5c17;
/// What the names of our programs begin with, in the object and on the filters.
const PROGRAM: &str = "flowd_mark_l";
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/marker.bpf.o"));

/// A flow as its packets leave this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 40]);

impl Key {
    /// What every packet matches with `matchAll`.
    pub const ALL: Key = Key([0; 40]);

    /// The key of an IPv6 flow in its own direction.
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
        let end = |address: usize, port: usize| {
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
        Flow::new(protocol, end(0, 32), end(16, 34)).ok()
    }
}

/// The same flow in the other direction.
pub fn reversed(flow: &Flow) -> Flow {
    let (source, destination): (Endpoint, Endpoint) = (flow.destination, flow.source);
    Flow {
        source,
        destination,
        ..*flow
    }
}

/// What the packets of a flow get, and how many got it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The flow label, 20 bits.
    pub label: u32,
    /// The tag behind it.
    pub tag: Tag,
    /// Packets as they go over the wire.
    pub packets: u64,
    /// Bytes of frames, the headers of a GSO packet once.
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

/// Sum over the closed flows of a tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Packets marked.
    pub packets: u64,
    /// Bytes marked.
    pub bytes: u64,
}

/// Packets of known flows that went out unmarked, by reason, in the order of `enum unmarked`.
pub const UNMARKED: [&str; 3] = [
    "larger than the MTU",
    "headers in the way",
    "refused by the kernel",
];

/// The pinned maps.
pub struct Maps {
    directory: PathBuf,
    flows: MapHandle,
    unmarked: MapHandle,
    totals: MapHandle,
    /// Interfaces whose clsact qdisc the daemon made, by index.
    qdiscs: MapHandle,
    /// One entry: the strategy, for `flowd-rs marker show`.
    about: MapHandle,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// It is in the map.
    Done,
    /// The map is full.
    Full,
}

impl Maps {
    /// The maps that a daemon has pinned, for looking at them.
    pub fn pinned(bpffs: &Path) -> Result<Option<Maps>> {
        let directory = bpffs.join(PIN_DIR);
        if !directory.join("flows").exists() {
            return Ok(None);
        }
        let map = |name: &str| {
            let path = directory.join(name);
            MapHandle::from_pinned_path(&path)
                .map_err(|e| failure(&format!("pinned map {}", path.display()), &e))
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

    /// Every entry of the map of flows.
    pub fn marks(&self) -> impl Iterator<Item = (Key, Mark)> {
        let mark = |key: Vec<u8>| {
            let value = self.flows.lookup(&key, MapFlags::ANY).ok().flatten()?;
            Some((Key::from_bytes(&key)?, Mark::from_bytes(&value)?))
        };
        self.flows.keys().filter_map(mark)
    }

    /// The entry of a key.
    pub fn get(&self, key: &Key) -> Option<Mark> {
        let value = self.flows.lookup(&key.0, MapFlags::ANY).ok().flatten()?;
        Mark::from_bytes(&value)
    }

    /// Enters a mark. One that is there is replaced unless it is the same; what it counted goes to the
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

    /// Removes a mark and adds what it counted to the total of its tag. Returns whether it was there.
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
            log::debug!("marker: totals of tag {}: {error}", mark.tag);
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

    /// Packets and bytes marked, by tag: of closed flows.
    pub fn totals(&self) -> Vec<(Tag, Total)> {
        let entry = |key: Vec<u8>| {
            let option = u32::from_ne_bytes(key.as_slice().try_into().ok()?);
            Some((tag(option), self.total(&key)))
        };
        self.totals.keys().filter_map(entry).collect()
    }

    /// How many packets went out unmarked, for each of [`UNMARKED`].
    pub fn unmarked(&self) -> [u64; 3] {
        let count = |index: u32| {
            let values = self
                .unmarked
                .lookup_percpu(&index.to_ne_bytes(), MapFlags::ANY)
                .ok()
                .flatten();
            let cpu = |value: &Vec<u8>| value.as_slice().try_into().map_or(0, u64::from_ne_bytes);
            values.unwrap_or_default().iter().map(cpu).sum()
        };
        [count(0), count(1), count(2)]
    }

    /// The strategy of the daemon that made the maps.
    pub fn strategy(&self) -> Option<Strategy> {
        let value = self.about.lookup(&[0; 4], MapFlags::ANY).ok().flatten()?;
        Strategy::ALL.get(usize::from(*value.first()?)).copied()
    }

    fn made_qdisc(&self, interface: u32) -> bool {
        matches!(
            self.qdiscs.lookup(&interface.to_ne_bytes(), MapFlags::ANY),
            Ok(Some(_))
        )
    }

    /// Detaches from every interface that has a filter of ours, or a clsact qdisc that we made.
    pub fn detach_all(&self, remove_qdisc: bool) -> io::Result<()> {
        let (found, _) = super::interfaces::list()?;
        found
            .iter()
            .try_for_each(|interface| self.detach(interface.index, remove_qdisc))
    }

    /// Detaches from an interface. Removes its clsact qdisc if that was ours, nobody else uses it, and
    /// `remove_qdisc` says so.
    pub fn detach(&self, interface: u32, remove_qdisc: bool) -> io::Result<()> {
        for filter in our_filters(interface)? {
            let mut hook = TcHookBuilder::new(self.flows.as_fd())
                .ifindex(interface as i32)
                .handle(filter.handle)
                .priority(filter.priority)
                .hook(TC_EGRESS);
            hook.detach().map_err(|e| io_error(&e))?;
        }
        if remove_qdisc && self.made_qdisc(interface) && !clsact::is_used(interface)? {
            let mut hook = TcHookBuilder::new(self.flows.as_fd());
            let mut hook = hook.ifindex(interface as i32).hook(TC_EGRESS | TC_INGRESS);
            hook.destroy().map_err(|e| io_error(&e))?;
            let _ = self.qdiscs.delete(&interface.to_ne_bytes());
        }
        Ok(())
    }

    /// Removes the pins; the maps go with their last user.
    pub fn unpin(&self) -> io::Result<()> {
        for name in ["flows", "unmarked", "totals", "qdiscs", "about"] {
            fs::remove_file(self.directory.join(name))?;
        }
        // Other versions may have theirs beside them.
        let _ = fs::remove_dir(&self.directory);
        if let Some(parent) = self.directory.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

/// Our filters on the egress side of an interface.
pub fn our_filters(interface: u32) -> io::Result<Vec<clsact::Filter>> {
    let filters = clsact::egress_filters(interface)?;
    Ok(filters
        .into_iter()
        .filter(|f| f.program.starts_with(PROGRAM))
        .collect())
}

/// The loaded program, its maps pinned and held against another daemon.
pub struct Program {
    /// The maps.
    pub maps: Maps,
    ethernet: OwnedFd,
    layer3: OwnedFd,
    priority: u32,
    _lock: Flock<File>,
}

impl Program {
    /// Loads the program. Maps that are pinned and of the right shape are adopted.
    pub fn load(settings: &Settings, max_flows: usize, key: &[u8; 16]) -> Result<Program> {
        ensure_bpffs(&settings.bpf_fs_path)?;
        let directory = settings.bpf_fs_path.join(PIN_DIR);
        let lock = lock(&directory)?;
        libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Debug, |_, text| {
            log::trace!("{}", text.trim_end())
        })));
        let mut builder = ObjectBuilder::default();
        let opened = match &settings.program_path {
            Some(path) => builder.open_file(path).map_err(|e| {
                failure(
                    &format!("{} (backends.marker.programPath)", path.display()),
                    &e,
                )
            })?,
            None => builder
                .open_memory(OBJECT)
                .map_err(|e| failure("marker program", &e))?,
        };
        let mut opened = opened;
        let (mut has_flows, mut has_settings) = (false, false);
        for mut map in opened.maps_mut() {
            match map.name().to_str() {
                Some("flows") => {
                    has_flows = true;
                    map.set_max_entries(max_flows as u32)
                        .map_err(|e| failure("map of flows", &e))?;
                    adopt(&mut map, &directory.join("flows"), 40, 24, max_flows as u32)?;
                }
                Some("unmarked") => adopt(
                    &mut map,
                    &directory.join("unmarked"),
                    4,
                    8,
                    UNMARKED.len() as u32,
                )?,
                Some(".rodata.settings") => {
                    has_settings = true;
                    map.set_initial_value(&settings_bytes(settings, key))
                        .map_err(|e| failure("settings of the program", &e))?;
                }
                _ => {}
            }
        }
        if !has_flows || !has_settings {
            let path = settings
                .program_path
                .as_deref()
                .unwrap_or(Path::new("marker program"))
                .display()
                .to_string();
            return Err(Error::Failed(format!(
                "{path}: lacks the map \"flows\" or the section .rodata.settings, expected a program built from bpf/marker.bpf.c"
            )));
        }
        let mut object = opened.load().map_err(|e| refused(&e))?;
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            let path = directory.join(&name);
            if matches!(name.as_str(), "flows" | "unmarked") && !path.exists() {
                map.pin(&path)
                    .map_err(|e| failure(&format!("pinned map {}", path.display()), &e))?;
            }
        }
        for (name, kind, key, value, entries) in [
            ("totals", MapType::Hash, 4, 16, 32768),
            ("qdiscs", MapType::Hash, 4, 4, 1024),
            ("about", MapType::Array, 4, 4, 1),
        ] {
            let path = directory.join(name);
            if !path.exists() {
                let options = libbpf_sys::bpf_map_create_opts {
                    sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
                    map_flags: if kind == MapType::Hash {
                        libbpf_sys::BPF_F_NO_PREALLOC
                    } else {
                        0
                    },
                    ..Default::default()
                };
                let made = MapHandle::create(kind, Some(name), key, value, entries, &options);
                made.and_then(|mut map| map.pin(&path))
                    .map_err(|e| failure(&format!("pinned map {}", path.display()), &e))?;
            }
        }
        let fd = |suffix: &str| {
            let name = format!("{PROGRAM}{suffix}");
            let program = object.progs().find(|p| p.name() == name.as_str());
            let program = program.ok_or_else(|| {
                Error::Failed(format!("the program {name} is missing in the object"))
            })?;
            program.as_fd().try_clone_to_owned().context(|| name)
        };
        let (ethernet, layer3) = (fd("2")?, fd("3")?);
        let maps = Maps::pinned(&settings.bpf_fs_path)?
            .ok_or_else(|| Error::Failed(format!("{} vanished", directory.display())))?;
        let strategy = (settings.strategy as u32).to_ne_bytes();
        maps.about
            .update(&[0; 4], &strategy, MapFlags::ANY)
            .map_err(|e| failure("pinned map about", &e))?;
        Ok(Program {
            maps,
            ethernet,
            layer3,
            priority: settings.priority,
            _lock: lock,
        })
    }

    /// Attaches to the egress side of an interface, making the clsact qdisc if there is none. A filter
    /// of ours that is there is replaced at once; one of somebody else in its place is an error.
    pub fn attach(&self, interface: &Interface) -> io::Result<()> {
        if !clsact::is_there(interface.index)? {
            self.maps
                .qdiscs
                .update(&interface.index.to_ne_bytes(), &[1, 0, 0, 0], MapFlags::ANY)
                .map_err(|e| io_error(&e))?;
        }
        let program = if interface.ethernet {
            &self.ethernet
        } else {
            &self.layer3
        };
        let mut hook = TcHookBuilder::new(program.as_fd())
            .ifindex(interface.index as i32)
            .replace(true)
            .handle(HANDLE)
            .priority(self.priority)
            .hook(TC_EGRESS);
        hook.create().map_err(|e| io_error(&e))?;
        for filter in clsact::egress_filters(interface.index)? {
            let ours = filter.program.starts_with(PROGRAM);
            if (filter.handle, filter.priority) == (HANDLE, self.priority) && !ours {
                let message = format!(
                    "another program's filter ({}) has priority {} and handle {HANDLE:#x}",
                    filter.program, self.priority
                );
                return Err(io::Error::other(message));
            }
        }
        hook.attach().map_err(|e| io_error(&e))?;
        // One of a run with another priority.
        for old in our_filters(interface.index)?
            .iter()
            .filter(|f| f.priority != self.priority)
        {
            let mut hook = TcHookBuilder::new(program.as_fd());
            let mut hook = hook
                .ifindex(interface.index as i32)
                .handle(old.handle)
                .priority(old.priority)
                .hook(TC_EGRESS);
            hook.detach().map_err(|e| io_error(&e))?;
        }
        Ok(())
    }

    /// The program for devices with an Ethernet header, and the one for those without, for
    /// `BPF_PROG_RUN`.
    pub fn programs(&self) -> [&OwnedFd; 2] {
        [&self.ethernet, &self.layer3]
    }
}

/// `struct settings`
fn settings_bytes(settings: &Settings, key: &[u8; 16]) -> Vec<u8> {
    let check_mtu = ProgramType::SchedCls
        .is_helper_supported(libbpf_sys::BPF_FUNC_check_mtu)
        .unwrap_or(false);
    let strategy = settings.strategy;
    let words = [
        matches!(strategy, Strategy::HopByHop | Strategy::HopByHopDestination),
        matches!(
            strategy,
            Strategy::Destination | Strategy::HopByHopDestination
        ),
        settings.match_all,
        check_mtu,
        settings.debug,
        false,
    ];
    let mut bytes: Vec<u8> = words
        .iter()
        .flat_map(|&word| u32::from(word).to_ne_bytes())
        .collect();
    bytes.extend_from_slice(&key[..8]);
    bytes
}

/// Uses the pinned map if it has the shape; removes the pin of one that has not.
fn adopt(
    map: &mut libbpf_rs::OpenMapMut<'_>,
    path: &Path,
    key: u32,
    value: u32,
    entries: u32,
) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let shown = path.display();
    let shape = MapHandle::from_pinned_path(path)
        .map(|m| (m.key_size(), m.value_size(), m.max_entries(), m.map_type()));
    match shape {
        Ok(shape) if shape == (key, value, entries, map.map_type()) => map
            .reuse_pinned_map(path)
            .map_err(|e| failure(&format!("pinned map {shown}"), &e)),
        Ok(_) => {
            log::info!("pinned map {shown}: has another shape, made anew");
            fs::remove_file(path).context(|| format!("pinned map {shown}"))
        }
        Err(error) => Err(failure(&format!("pinned map {shown}"), &error)),
    }
}

/// Mounts a bpffs if there is none, as systemd does at boot.
fn ensure_bpffs(path: &Path) -> Result<()> {
    let shown = path.display();
    let is_bpffs = || statfs(path).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC);
    if is_bpffs() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .create(path)
        .context(|| format!("{shown} (backends.marker.bpfFsPath)"))?;
    mount(Some("bpffs"), path, Some("bpf"), MsFlags::empty(), None::<&str>).map_err(|errno| {
        Error::Failed(format!("{shown} (backends.marker.bpfFsPath) is no bpffs and cannot be made one: {errno}; needed: mount -t bpf bpffs {shown}"))
    })?;
    log::info!("mounted a bpffs on {shown}");
    Ok(())
}

fn lock(directory: &Path) -> Result<Flock<File>> {
    let shown = directory.display();
    let what = || format!("{shown} (below backends.marker.bpfFsPath)");
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .context(what)?;
    let file = File::open(directory).context(what)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        Error::Failed(format!("{shown} is in use by another flowd-rs ({errno})"))
    })
}

/// One line for the operator, with what is needed.
fn refused(error: &libbpf_rs::Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => {
            "CAP_BPF and CAP_NET_ADMIN (before Linux 5.8: CAP_SYS_ADMIN) are needed"
        }
        ErrorKind::InvalidInput => {
            "the kernel's verifier refused it; --log-level trace shows why; Linux 4.18 of RHEL 8, 5.8 or newer is needed"
        }
        _ => "--log-level trace shows what libbpf says",
    };
    Error::Failed(format!(
        "the marker program cannot be loaded: {}: {hint}",
        io_error(error)
    ))
}

fn failure(what: &str, error: &libbpf_rs::Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => {
            "; CAP_BPF and CAP_NET_ADMIN (before Linux 5.8: CAP_SYS_ADMIN) are needed"
        }
        _ => "",
    };
    Error::Failed(format!("{what}: {}{hint}", io_error(error)))
}

/// The system's error in libbpf-rs's, which tells its number in its text only.
fn io_error(error: &libbpf_rs::Error) -> io::Error {
    let text = format!("{error:#}");
    let number = text
        .rsplit_once("(os error ")
        .and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    number.map_or_else(|| io::Error::other(text), io::Error::from_raw_os_error)
}
