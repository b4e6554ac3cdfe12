//! The eBPF program of packet marking: how it is loaded, and where it is attached.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libbpf_rs::{
    ErrorKind, MapCore, MapFlags, MapHandle, MapType, ObjectBuilder, ProgramType, TC_EGRESS,
    TC_INGRESS, TcHookBuilder, libbpf_sys,
};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, mkdirat};
use nix::sys::statfs::{BPF_FS_MAGIC, fstatfs, statfs};

use super::clsact;
use super::interfaces::Interface;
use super::mark_maps::{Maps, PIN_DIR, UNMARKED, failure, io_error};
use super::ownership::{self, Owner};
use crate::config::{Marker as Settings, Strategy};
use crate::error::{Context, Error, Result};

/// Ours among the filters of one priority.
const HANDLE: u32 = 0x5c17;
/// What the names of our programs begin with, in the object and on the filters.
const PROGRAM: &str = "flowd_mark_l";
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/marker.bpf.o"));

/// Our filters on the egress side of an interface.
pub fn our_filters(interface: u32) -> io::Result<Vec<clsact::Filter>> {
    let filters = clsact::egress_filters(interface)?;
    Ok(filters
        .into_iter()
        .filter(|f| f.program.starts_with(PROGRAM))
        .collect())
}

/// libbpf wants a file descriptor for a hook, also where it does not look at it.
fn detach_filter(any: BorrowedFd<'_>, filter: &clsact::Filter) -> io::Result<()> {
    let mut hook = TcHookBuilder::new(any)
        .ifindex(filter.interface as i32)
        .handle(filter.handle)
        .priority(filter.priority)
        .hook(TC_EGRESS);
    hook.detach().map_err(|e| io_error(&e))
}

impl Maps {
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
            detach_filter(self.flows.as_fd(), &filter)?;
        }
        if remove_qdisc && self.made_qdisc(interface) && !clsact::is_used(interface)? {
            let mut hook = TcHookBuilder::new(self.flows.as_fd());
            let mut hook = hook.ifindex(interface as i32).hook(TC_EGRESS | TC_INGRESS);
            hook.destroy().map_err(|e| io_error(&e))?;
            let _ = self.qdiscs.delete(&interface.to_ne_bytes());
        }
        Ok(())
    }
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
        let lock = lock(&settings.bpf_fs_path)?;
        libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Debug, |_, text| {
            log::trace!("{}", text.trim_end())
        })));
        let mut builder = ObjectBuilder::default();
        let mut opened = match &settings.program_path {
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
            detach_filter(program.as_fd(), old)?;
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
    mount(Some("bpffs"), path, Some("bpf"), MsFlags::empty(), Some("mode=0711")).map_err(|errno| {
        Error::Failed(format!("{shown} (backends.marker.bpfFsPath) is no bpffs and cannot be made one: {errno}; needed: mount -t bpf bpffs {shown}"))
    })?;
    log::info!("mounted a bpffs on {shown}");
    Ok(())
}

/// Makes the directory of the pinned maps for a daemon that is not root's, and gives it what a daemon of root's
/// has left there. systemd mounts the bpffs for root alone: it becomes one that others may pass through, what
/// lies in it has owners and modes of its own.
pub fn prepare(bpffs: &Path, owner: Owner) -> Result<()> {
    let what = || format!("{} (backends.marker.bpfFsPath)", bpffs.display());
    let parent = ownership::roots_alone(bpffs.parent().unwrap_or(bpffs)).context(what)?;
    let (Some(parent), Some(name)) = (parent, bpffs.file_name()) else {
        return Err(Error::Failed(format!(
            "{}: others than root can make files on the way there",
            what()
        )));
    };
    let bpffs = parent.join(name);
    if bpffs.is_symlink() {
        return Err(io::Error::from_raw_os_error(nix::libc::ELOOP)).context(what);
    }
    ensure_bpffs(&bpffs)?;
    prepare_below(&bpffs, owner).context(what)
}

/// Every step by what is open: whoever owns a directory may put a symbolic link in place of what was in it.
fn prepare_below(bpffs: &Path, owner: Owner) -> io::Result<()> {
    let mut directory = File::open(bpffs)?;
    if fstatfs(&directory)?.filesystem_type() != BPF_FS_MAGIC {
        return Err(io::Error::other("is no bpffs"));
    }
    let mode = directory.metadata()?.permissions().mode();
    if mode & 0o111 != 0o111 {
        directory.set_permissions(Permissions::from_mode(mode | 0o111))?;
    }
    let flags = OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    for name in Path::new(PIN_DIR) {
        match mkdirat(&directory, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
        let flags = flags | OFlag::O_DIRECTORY | OFlag::O_RDONLY;
        directory = openat(&directory, name, flags, Mode::empty())?.into();
        give_of_root(&directory, owner)?;
        if directory.metadata()?.uid() != owner.user.as_raw() {
            let message = format!("{} in it is another user's", name.display());
            return Err(io::Error::other(message));
        }
    }
    for entry in Dir::from_fd(directory.try_clone()?.into())?.iter() {
        let name = entry?.file_name().to_owned();
        if !name.to_bytes().starts_with(b".") {
            let entry = openat(
                &directory,
                name.as_c_str(),
                flags | OFlag::O_PATH,
                Mode::empty(),
            )?;
            give_of_root(&entry.into(), owner)?;
        }
    }
    Ok(())
}

fn give_of_root(open: &File, owner: Owner) -> io::Result<()> {
    let found = open.metadata()?;
    let is_bpffs = fstatfs(open)?.filesystem_type() == BPF_FS_MAGIC;
    let is_one = found.is_dir() || (found.is_file() && found.nlink() == 1);
    match is_bpffs && is_one && found.uid() == 0 {
        true => owner.give(open),
        false => Ok(()),
    }
}

fn pin_directory(bpffs: &Path) -> Result<PathBuf> {
    let directory = bpffs.join(PIN_DIR);
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&directory)
        .context(|| format!("{} (below backends.marker.bpfFsPath)", directory.display()))?;
    Ok(directory)
}

/// Keeps everybody else from the pinned maps; held by the daemon as long as it runs.
pub fn lock(bpffs: &Path) -> Result<Flock<File>> {
    let directory = pin_directory(bpffs)?;
    let shown = directory.display();
    let what = || format!("{shown} (below backends.marker.bpfFsPath)");
    let file = File::open(&directory).context(what)?;
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
