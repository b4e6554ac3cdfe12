//! Directories that are opened and checked once, and files in them that are opened without following a link.
//!
//! Run as root, the program uses directories of other users: `stateDir` belongs to the user of the service. That user
//! may replace every entry of such a directory at any time, also with a link to a file of root.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{Uid, UnlinkatFlags, mkfifoat, unlinkat};

/// The most symbolic links in a path, as in Linux.
const MAX_SYMLINKS: usize = 40;

/// Who may change the entries of a directory, or of one above it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ChangedBy {
    /// Root alone.
    Root,
    /// Every user creates entries in it, but nobody replaces those of root: the sticky bit is set.
    Owners,
    /// Others.
    Anyone,
}

/// The end of a path: a directory, or another file in `directory`.
pub(super) struct Found {
    directory: File,
    path: PathBuf,
    other: Option<FileStat>,
    changed_by: ChangedBy,
}

/// What to do about directories that users other than root may change.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Others {
    /// Stop.
    Refuse,
    /// Stop, except for entries of root in directories with the sticky bit.
    RefuseUnlessSticky,
    /// Go on, but follow no link that another user may have made.
    Distrust,
    /// Go on as the kernel does: for a program that has no more rights than its user.
    Trust,
}

/// Follows a path to its end, one component after the other. Creates missing directories with mode `create`, if given.
/// `None` if the path leads through a directory that `others` refuses.
pub(super) fn walk(path: &Path, others: Others, create: Option<u32>) -> io::Result<Option<Found>> {
    let mut pending: Vec<PathBuf> = vec![std::path::absolute(path)?];
    let root = || open_directory(nix::fcntl::AT_FDCWD, OsStr::new("/"));
    let mut at = Found {
        directory: root()?,
        path: "/".into(),
        other: None,
        changed_by: ChangedBy::Root,
    };
    let mut links = 0;
    while let Some(rest) = pending.pop() {
        let mut components = rest.components();
        let Some(next) = components.next() else {
            continue;
        };
        pending.push(components.as_path().to_owned());
        if at.other.is_some() {
            return Err(Errno::ENOTDIR.into());
        }
        let name = match next {
            Component::RootDir => {
                at.directory = root()?;
                at.path = "/".into();
                at.changed_by = changed_by(&at.directory.metadata()?, ChangedBy::Root);
                if !others.accepts(at.changed_by) {
                    return Ok(None);
                }
                continue;
            }
            // Where links are followed, nobody moves the directory.
            Component::ParentDir if others.follows(at.changed_by, 0) => {
                let parent = at.path.parent().unwrap_or(&at.path).to_owned();
                pending.push(parent);
                continue;
            }
            Component::ParentDir => return Err(Errno::EXDEV.into()),
            next => next.as_os_str().to_owned(),
        };
        let mut found = fstatat(
            &at.directory,
            name.as_os_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        );
        if let (Err(Errno::ENOENT), Some(mode)) = (found, create) {
            match mkdirat(
                &at.directory,
                name.as_os_str(),
                Mode::from_bits_truncate(mode),
            ) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(error) => return Err(error.into()),
            }
            found = fstatat(
                &at.directory,
                name.as_os_str(),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            );
        }
        let found = found?;
        let below = at.path.join(&name);
        match file_type(&found) {
            SFlag::S_IFLNK => {
                links += 1;
                if links > MAX_SYMLINKS {
                    return Err(Errno::ELOOP.into());
                }
                if !others.follows(at.changed_by, found.st_uid) {
                    let message = format!(
                        "{} is a symbolic link, and not only root may change it",
                        below.display()
                    );
                    return Err(io::Error::other(message));
                }
                if at.path.starts_with("/proc") {
                    // An open file: /dev/stdin.
                    at.path = below;
                    at.other = Some(found);
                } else {
                    pending.push(readlinkat(&at.directory, name.as_os_str())?.into());
                }
            }
            SFlag::S_IFDIR => {
                let directory = open_directory(&at.directory, &name)?;
                at.changed_by = changed_by(&directory.metadata()?, at.changed_by);
                at.directory = directory;
                at.path = below;
                if !others.accepts(at.changed_by) {
                    return Ok(None);
                }
            }
            _ => {
                at.path = below;
                at.other = Some(found);
            }
        }
    }
    Ok(Some(at))
}

impl Found {
    pub(super) fn into_directory_path(self) -> io::Result<PathBuf> {
        match self.other {
            Some(_) => Err(Errno::ENOTDIR.into()),
            None => Ok(self.path),
        }
    }
}

impl Others {
    fn accepts(self, changed_by: ChangedBy) -> bool {
        match self {
            Others::Refuse => changed_by == ChangedBy::Root,
            Others::RefuseUnlessSticky => changed_by != ChangedBy::Anyone,
            Others::Distrust | Others::Trust => true,
        }
    }

    /// Whether a link of this owner in a directory that `changed_by` may change is followed.
    fn follows(self, changed_by: ChangedBy, owner: u32) -> bool {
        self == Others::Trust
            || changed_by == ChangedBy::Root
            || (changed_by == ChangedBy::Owners && owner == 0)
    }
}

fn changed_by(directory: &std::fs::Metadata, parent: ChangedBy) -> ChangedBy {
    if parent == ChangedBy::Anyone || directory.uid() != 0 {
        return ChangedBy::Anyone;
    }
    match (directory.mode() & 0o022, directory.mode() & libc::S_ISVTX) {
        (0, _) => ChangedBy::Root,
        (_, 0) => ChangedBy::Anyone,
        _ => ChangedBy::Owners,
    }
}

fn file_type(found: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits())
}

fn open_directory(at: impl std::os::fd::AsFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(at, name, flags, Mode::empty())?.into())
}

/// Whether `file`, which was opened at `path`, is one that root alone may write to or replace.
pub fn is_changed_by_root_only(path: &Path, file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    let writable = metadata.mode() & 0o022 != 0 && !metadata.file_type().is_fifo();
    if metadata.uid() != 0 || writable {
        return Ok(false);
    }
    let found = walk(path, Others::RefuseUnlessSticky, None)?;
    let owner = |found: Found| found.other.map(|other| other.st_uid);
    Ok(found.is_some_and(|found| owner(found) == Some(0)))
}

/// An open directory.
pub struct Directory {
    file: File,
    path: PathBuf,
}

impl Directory {
    /// Opens a directory.
    pub fn open(path: &Path) -> io::Result<Directory> {
        Directory::find(path, None)
    }

    /// Opens a directory. Creates it, and those above it, with this mode if they do not exist.
    pub fn ensure(path: &Path, mode: u32) -> io::Result<Directory> {
        Directory::find(path, Some(mode))
    }

    /// Opens the directory of a file, and returns also the name of the file.
    pub fn open_parent(path: &Path) -> io::Result<(Directory, OsString)> {
        Directory::find_parent(path, None)
    }

    /// Like [`Directory::open_parent`], and creates the directory as [`Directory::ensure`] does.
    pub fn ensure_parent(path: &Path, mode: u32) -> io::Result<(Directory, OsString)> {
        Directory::find_parent(path, Some(mode))
    }

    fn find_parent(path: &Path, create: Option<u32>) -> io::Result<(Directory, OsString)> {
        let name = path.file_name().ok_or(Errno::EISDIR)?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        let directory = Directory::find(parent.unwrap_or(Path::new(".")), create)?;
        Ok((directory, name.to_owned()))
    }

    fn find(path: &Path, create: Option<u32>) -> io::Result<Directory> {
        let others = match Uid::effective().is_root() {
            true => Others::Distrust,
            false => Others::Trust,
        };
        match walk(path, others, create)? {
            Some(found) if found.other.is_none() => Ok(Directory {
                file: found.directory,
                path: path.to_owned(),
            }),
            _ => Err(Errno::ENOTDIR.into()),
        }
    }

    /// The path of an entry, for messages.
    pub fn shown(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A path of an entry that leads through the open directory, for calls that take a path.
    pub fn proc_path(&self, name: impl AsRef<Path>) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd())).join(name)
    }

    /// Opens a regular file for reading.
    pub fn read(&self, name: impl AsRef<Path>) -> io::Result<File> {
        self.open_file(name.as_ref(), OFlag::O_RDONLY)
    }

    /// Opens a regular file for reading and writing, with its content. Creates it if it does not exist.
    pub fn open_or_create(&self, name: impl AsRef<Path>) -> io::Result<File> {
        self.open_file(name.as_ref(), OFlag::O_RDWR | OFlag::O_CREAT)
    }

    /// Like [`Directory::open_or_create`], for appending.
    pub fn append(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT;
        self.open_file(name.as_ref(), flags)
    }

    /// Opens a regular file for reading and appending. Creates it with this mode if it does not exist.
    pub fn append_with_mode(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<File> {
        let flags = OFlag::O_RDWR | OFlag::O_APPEND | OFlag::O_CREAT;
        self.open_with_mode(name.as_ref(), flags, mode)
    }

    /// Creates a file in the place of whatever has the name, and opens it for appending.
    pub fn create_new(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let name = name.as_ref();
        match self.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_EXCL;
        self.open_file(name, flags)
    }

    fn open_file(&self, name: &Path, flags: OFlag) -> io::Result<File> {
        self.open_with_mode(name, flags, 0o644)
    }

    fn open_with_mode(&self, name: &Path, flags: OFlag, mode: u32) -> io::Result<File> {
        // Opening a FIFO must not block.
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = openat(&self.file, name, flags, Mode::from_bits_truncate(mode));
        let file: File = match opened {
            Err(Errno::ELOOP) => {
                return Err(io::Error::other("is a symbolic link, expected a file"));
            }
            opened => opened?.into(),
        };
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        if found.nlink() > 1 && Uid::effective().is_root() {
            return Err(io::Error::other(
                "has another name (a hard link), expected a file of its own",
            ));
        }
        Ok(file)
    }

    /// Renames an entry, in the place of the other if that exists.
    pub fn rename(&self, from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
        renameat(&self.file, from.as_ref(), &self.file, to.as_ref())?;
        Ok(())
    }

    /// Removes an entry that is not a directory.
    pub fn remove(&self, name: impl AsRef<Path>) -> io::Result<()> {
        unlinkat(&self.file, name.as_ref(), UnlinkatFlags::NoRemoveDir)?;
        Ok(())
    }

    /// Creates a FIFO with mode 0600. False if the name is taken.
    pub fn create_fifo(&self, name: impl AsRef<Path>) -> io::Result<bool> {
        match mkfifoat(&self.file, name.as_ref(), Mode::from_bits_truncate(0o600)) {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the permissions of a Unix socket.
    pub fn set_socket_mode(&self, name: impl AsRef<Path>, mode: u32) -> io::Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let socket: File = openat(&self.file, name.as_ref(), flags, Mode::empty())?.into();
        let found = socket.metadata()?;
        if !found.file_type().is_socket() || found.nlink() > 1 {
            return Err(io::Error::other("was replaced while it was being opened"));
        }
        let open = format!("/proc/self/fd/{}", socket.as_raw_fd());
        std::fs::set_permissions(open, Permissions::from_mode(mode))
    }
}
