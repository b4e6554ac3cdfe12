//! Files that root creates for an unprivileged user, safe against a user who replaces parts of their path.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::libc;
use nix::unistd::{Gid, Uid, User, fchownat};

use super::directory::{self, Found, Others};

/// Who may use the files of the service, for errors.
pub const DENIED: &str =
    "permission denied, expected root or flowd, the user that the service runs as";

/// A user and the primary group of that user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: Uid,
    /// The group.
    pub group: Gid,
}

impl Owner {
    /// Looks up a user by name or number. A number needs no entry in the user database; without one, the
    /// group has the same number.
    pub fn find(user: &str) -> io::Result<Owner> {
        let number = user.parse().ok();
        let found = match number {
            Some(id) => User::from_uid(Uid::from_raw(id))?,
            None => User::from_name(user)?,
        };
        match (found, number) {
            (Some(found), _) => Ok(Owner {
                user: found.uid,
                group: found.gid,
            }),
            (None, Some(id)) => Ok(Owner {
                user: Uid::from_raw(id),
                group: Gid::from_raw(id),
            }),
            (None, None) => Err(io::Error::new(io::ErrorKind::NotFound, "no such user")),
        }
    }

    /// Makes this user and group the owner of an open file, which may be open with `O_PATH`.
    pub fn chown(&self, open: impl AsFd) -> io::Result<()> {
        let (user, group) = (Some(self.user), Some(self.group));
        fchownat(open, "", user, group, AtFlags::AT_EMPTY_PATH)?;
        Ok(())
    }

    /// Makes this user and group the owner of a FIFO, and sets its mode.
    pub fn chown_fifo(&self, path: &Path, mode: u32) -> io::Result<()> {
        change_fifo(path, Some(self.user), Some(self.group), mode)
    }
}

/// Sets the group of a FIFO, if given, and its mode. Does not follow a symbolic link.
pub fn set_fifo_mode(path: &Path, group: Option<Gid>, mode: u32) -> io::Result<()> {
    change_fifo(path, None, group, mode)
}

fn change_fifo(path: &Path, user: Option<Uid>, group: Option<Gid>, mode: u32) -> io::Result<()> {
    let fifo = open_path(path)?;
    if !fifo.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other("not a FIFO"));
    }
    fchownat(&fifo, "", user, group, AtFlags::AT_EMPTY_PATH)?;
    let open = format!("/proc/self/fd/{}", fifo.as_raw_fd());
    fs::set_permissions(open, PermissionsExt::from_mode(mode))
}

/// Opens a path with `O_PATH`, without following a symbolic link: for everything except access to the content.
fn open_path(path: &Path) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Resolves the path of a directory, creating missing directories. `None` if users other than root may write to a
/// directory on the way, because they could change where the path leads.
pub fn ensure_root_only_directory(path: &Path) -> io::Result<Option<PathBuf>> {
    let found = directory::walk(path, Others::Refuse, Some(0o755))?;
    found.map(Found::into_directory_path).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn users_by_name_and_by_number() {
        assert_eq!(Owner::find("root").unwrap().user, Uid::from_raw(0));
        assert_eq!(Owner::find("64123").unwrap().group, Gid::from_raw(64123));
        assert!(Owner::find("nobody-of-this-name").is_err());
    }

    #[test]
    fn a_path_that_other_users_may_change_is_not_root_only() {
        assert_eq!(
            ensure_root_only_directory(Path::new("/usr/bin/../lib")).unwrap(),
            Some("/usr/lib".into())
        );
        assert_eq!(
            ensure_root_only_directory(&std::env::temp_dir()).unwrap(),
            None
        );
        assert_eq!(
            ensure_root_only_directory(&std::env::temp_dir().join("not/there")).unwrap(),
            None
        );
    }

    #[test]
    fn only_a_fifo_changes_its_owner() {
        let folder = tempfile::tempdir().unwrap();
        let owner = Owner {
            user: nix::unistd::getuid(),
            group: nix::unistd::getgid(),
        };
        let path = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink(path("fifo"), path("link")).unwrap();
        owner.chown_fifo(&path("fifo"), 0o622).unwrap();
        assert_eq!(fs::metadata(path("fifo")).unwrap().mode() & 0o777, 0o622);
        assert!(owner.chown_fifo(&path("file"), 0o622).is_err());
        assert!(owner.chown_fifo(&path("link"), 0o666).is_err());
    }
}
