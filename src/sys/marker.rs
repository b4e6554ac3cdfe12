//! Loads the eBPF program of packet marking, and attaches it to interfaces.

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
use super::mark_maps::{
    Maps, PIN_DIR, UNMARKED, WRITER, access_failure, failure, io_error, remove_pin,
};
use super::ownership::{self, Owner};
use crate::error::{Context, Error, Result};
use crate::scitag::Strategy;

/// The handle of our filter among the filters of one priority.
const FILTER_HANDLE: u32 = 0x5c17;
/// The prefix of the names of our programs, in the object file and on the filters.
const PROGRAM_PREFIX: &str = "flowd_mark_l";
const OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/marker.bpf.o"));

/// Our filters on the egress side of an interface.
pub fn our_filters(interface: u32) -> io::Result<Vec<clsact::Filter>> {
    let filters = clsact::egress_filters(interface)?;
    Ok(filters
        .into_iter()
        .filter(|f| f.program.starts_with(PROGRAM_PREFIX))
        .collect())
}

/// Detaches a filter. `any` is any file descriptor: libbpf requires one for a hook, but does not use it here.
fn detach_filter(any: BorrowedFd<'_>, filter: &clsact::Filter) -> io::Result<()> {
    let mut hook = TcHookBuilder::new(any)
        .ifindex(filter.interface as i32)
        .handle(filter.handle)
        .priority(filter.priority)
        .hook(TC_EGRESS);
    hook.detach().map_err(|e| io_error(&e))
}

impl Maps {
    /// Whether the daemon created the clsact qdisc of an interface.
    fn owns_qdisc(&self, interface: u32) -> bool {
        matches!(
            self.qdiscs.lookup(&interface.to_ne_bytes(), MapFlags::ANY),
            Ok(Some(_))
        )
    }

    /// Detaches from all interfaces: see [`Maps::detach`].
    pub fn detach_all(&self, remove_qdisc: bool) -> io::Result<()> {
        let (interfaces, _) = super::interfaces::list()?;
        interfaces
            .iter()
            .try_for_each(|interface| self.detach(interface.index, remove_qdisc))
    }

    /// Removes our filters from an interface. With `remove_qdisc`, also removes its clsact qdisc, if the daemon created
    /// it and it has no other filters.
    pub fn detach(&self, interface: u32, remove_qdisc: bool) -> io::Result<()> {
        for filter in our_filters(interface)? {
            detach_filter(self.flows.as_fd(), &filter)?;
        }
        if remove_qdisc && self.owns_qdisc(interface) && !clsact::has_filters(interface)? {
            let mut hook = TcHookBuilder::new(self.flows.as_fd());
            let mut hook = hook.ifindex(interface as i32).hook(TC_EGRESS | TC_INGRESS);
            hook.destroy().map_err(|e| io_error(&e))?;
            let _ = self.qdiscs.delete(&interface.to_ne_bytes());
        }
        Ok(())
    }
}

/// How to load the program, and how it marks packets.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the bpffs is mounted.
    pub bpf_fs_path: PathBuf,
    /// An object file to load instead of the built-in one.
    pub program_path: Option<PathBuf>,
    /// How a packet carries its tag.
    pub strategy: Strategy,
    /// Whether every packet gets the tag of the only entry of the map.
    pub match_all: bool,
    /// Whether the program writes to the kernel's trace pipe.
    pub debug: bool,
    /// Priority of the tc filter.
    pub priority: u32,
}

/// The loaded program, with its maps pinned and locked against other daemons.
pub struct Program {
    /// The maps.
    pub maps: Maps,
    ethernet: OwnedFd,
    layer3: OwnedFd,
    priority: u32,
    _lock: Flock<File>,
}

impl Program {
    /// Loads the program. Pinned maps with a compatible layout are reused. `max_flows` is the size of the map of flows;
    /// `key` is the key of the entropy bits.
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
                    reuse_pinned(&mut map, &directory.join("flows"), 40, 24, max_flows as u32)?;
                }
                Some("unmarked") => reuse_pinned(
                    &mut map,
                    &directory.join("unmarked"),
                    4,
                    8,
                    UNMARKED.len() as u32,
                )?,
                Some(".rodata.settings") => {
                    has_settings = true;
                    map.set_initial_value(&settings_bytes(settings, key))
                        .map_err(|e| failure("settings of the marker program", &e))?;
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
                "{path}: lacks the map \"flows\" or the section .rodata.settings, expected an object file built from bpf/marker.bpf.c"
            )));
        }
        let mut object = opened.load().map_err(|e| load_failure(&e))?;
        for mut map in object.maps_mut() {
            let name = map.name().to_string_lossy().into_owned();
            let path = directory.join(&name);
            // Each load has an array of its own: programs of a former one go on without it.
            if name == WRITER {
                remove_pin(&path).context(|| format!("pinned map {}", path.display()))?;
            }
            if matches!(name.as_str(), "flows" | "unmarked" | WRITER) && !path.exists() {
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
                let created = MapHandle::create(kind, Some(name), key, value, entries, &options);
                created
                    .and_then(|mut map| map.pin(&path))
                    .map_err(|e| failure(&format!("pinned map {}", path.display()), &e))?;
            }
        }
        let fd = |suffix: &str| {
            let name = format!("{PROGRAM_PREFIX}{suffix}");
            let program = object.progs().find(|p| p.name() == name.as_str());
            let program = program.ok_or_else(|| {
                Error::Failed(format!(
                    "marker program: the object file lacks the program {name}"
                ))
            })?;
            program.as_fd().try_clone_to_owned().context(|| name)
        };
        let (ethernet, layer3) = (fd("2")?, fd("3")?);
        let maps = Maps::pinned(&settings.bpf_fs_path)?.ok_or_else(|| {
            Error::Failed(format!(
                "pinned maps in {}: were removed by another process",
                directory.display()
            ))
        })?;
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

    /// Attaches to the egress side of an interface, creating the clsact qdisc if there is none. An existing filter of
    /// ours is replaced atomically. A filter of another program with the same priority and handle is an error.
    pub fn attach(&self, interface: &Interface) -> io::Result<()> {
        if !clsact::exists(interface.index)? {
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
            .handle(FILTER_HANDLE)
            .priority(self.priority)
            .hook(TC_EGRESS);
        hook.create().map_err(|e| io_error(&e))?;
        for filter in clsact::egress_filters(interface.index)? {
            let is_ours = filter.program.starts_with(PROGRAM_PREFIX);
            if (filter.handle, filter.priority) == (FILTER_HANDLE, self.priority) && !is_ours {
                let message = format!(
                    "another program's filter ({}) has priority {} and handle {FILTER_HANDLE:#x}",
                    filter.program, self.priority
                );
                return Err(io::Error::other(message));
            }
        }
        hook.attach().map_err(|e| io_error(&e))?;
        // A filter that was attached with another priority.
        for old in our_filters(interface.index)?
            .iter()
            .filter(|f| f.priority != self.priority)
        {
            detach_filter(program.as_fd(), old)?;
        }
        Ok(())
    }

    /// The program for interfaces with an Ethernet header and the one for interfaces without, for `BPF_PROG_RUN`.
    pub fn programs(&self) -> [&OwnedFd; 2] {
        [&self.ethernet, &self.layer3]
    }
}

/// Encodes `struct settings`.
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

/// Reuses the map pinned at `path` if its layout is compatible; otherwise removes the pin.
fn reuse_pinned(
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
    let layout = MapHandle::from_pinned_path(path)
        .map(|m| (m.key_size(), m.value_size(), m.max_entries(), m.map_type()));
    match layout {
        Ok(layout) if layout == (key, value, entries, map.map_type()) => map
            .reuse_pinned_map(path)
            .map_err(|e| failure(&format!("pinned map {shown}"), &e)),
        Ok(_) => {
            log::info!("marker: pinned map {shown} has an incompatible layout; recreated it");
            fs::remove_file(path).context(|| format!("pinned map {shown}"))
        }
        Err(error) => Err(failure(&format!("pinned map {shown}"), &error)),
    }
}

/// Mounts a bpffs at `path` if there is none, as systemd does at boot.
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
    let mut entries =
        std::fs::read_dir(path).context(|| format!("{shown} (backends.marker.bpfFsPath)"))?;
    if entries.next().is_some() {
        return Err(Error::Failed(format!(
            "{shown} (backends.marker.bpfFsPath): found files, expected a bpffs or an empty directory to mount one on"
        )));
    }
    mount(Some("bpffs"), path, Some("bpf"), MsFlags::empty(), Some("mode=0711")).map_err(|errno| {
        let error = io::Error::from(errno);
        Error::Failed(format!("{shown} (backends.marker.bpfFsPath): not a bpffs, and mounting one failed: {error}; run as root: mount -t bpf bpffs {shown}"))
    })?;
    log::info!("marker: mounted a bpffs on {shown}");
    Ok(())
}

/// Creates the directory of the pinned maps for a daemon that does not run as root, and makes `owner` the owner of the
/// maps that a daemon that ran as root has left there. systemd mounts the bpffs with access for root alone: everybody
/// gets search permission, because the entries of the bpffs have their own owners and modes.
pub fn prepare(bpffs: &Path, owner: Owner) -> Result<()> {
    let resource = || format!("{} (backends.marker.bpfFsPath)", bpffs.display());
    let parent =
        ownership::ensure_root_only_directory(bpffs.parent().unwrap_or(bpffs)).context(resource)?;
    let (Some(parent), Some(name)) = (parent, bpffs.file_name()) else {
        return Err(Error::Failed(format!(
            "{}: users other than root may write to a directory of this path, expected a path that only root can change",
            resource()
        )));
    };
    let bpffs = parent.join(name);
    if bpffs.is_symlink() {
        return Err(io::Error::from_raw_os_error(nix::libc::ELOOP)).context(resource);
    }
    ensure_bpffs(&bpffs)?;
    prepare_pin_directory(&bpffs, owner).context(resource)
}

/// Every step works on an open directory: the owner of a directory may replace its entries with symbolic links.
fn prepare_pin_directory(bpffs: &Path, owner: Owner) -> io::Result<()> {
    let mut directory = File::open(bpffs)?;
    if fstatfs(&directory)?.filesystem_type() != BPF_FS_MAGIC {
        return Err(io::Error::other("not a bpffs"));
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
        chown_if_root_owned(&directory, owner)?;
        if directory.metadata()?.uid() != owner.user.as_raw() {
            let message = format!(
                "the directory {} in it belongs to another user, expected root or the user of the daemon",
                name.display()
            );
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
            chown_if_root_owned(&entry.into(), owner)?;
        }
    }
    Ok(())
}

/// Makes `owner` the owner of a directory or a map in a bpffs, if it belongs to root.
fn chown_if_root_owned(open: &File, owner: Owner) -> io::Result<()> {
    let found = open.metadata()?;
    let is_bpffs = fstatfs(open)?.filesystem_type() == BPF_FS_MAGIC;
    let is_directory_or_map = found.is_dir() || (found.is_file() && found.nlink() == 1);
    match is_bpffs && is_directory_or_map && found.uid() == 0 {
        true => owner.chown(open),
        false => Ok(()),
    }
}

fn shown(pin_directory: &Path) -> String {
    format!(
        "pinned maps in {} (below backends.marker.bpfFsPath)",
        pin_directory.display()
    )
}

fn create_pin_directory(bpffs: &Path) -> Result<PathBuf> {
    let directory = bpffs.join(PIN_DIR);
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&directory)
        .map_err(|e| access_failure(&shown(&directory), e))?;
    Ok(directory)
}

/// Locks the pinned maps against other processes. The daemon holds the lock as long as it runs.
pub fn lock(bpffs: &Path) -> Result<Flock<File>> {
    let directory = create_pin_directory(bpffs)?;
    let resource = shown(&directory);
    let file = File::open(&directory).map_err(|e| access_failure(&resource, e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Error::Failed(format!("{resource}: in use by another flowd-rs")),
        errno => access_failure(&resource, errno.into()),
    })
}

/// The error of loading the program, with what it needs.
fn load_failure(error: &libbpf_rs::Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::PermissionDenied => {
            "CAP_BPF and CAP_NET_ADMIN (before Linux 5.8: CAP_SYS_ADMIN) are needed"
        }
        ErrorKind::InvalidInput => {
            "the kernel's verifier rejected it; --log-level trace shows why; the 4.18 kernel of RHEL 8, or Linux 5.8 or newer, is needed"
        }
        _ => "--log-level trace shows the messages of libbpf",
    };
    Error::Failed(format!(
        "marker program: cannot be loaded: {}; {hint}",
        io_error(error)
    ))
}
