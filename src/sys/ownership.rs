//! Files that root makes for an ordinary user, who is not to choose which.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::libc;
use nix::unistd::{Gid, Uid, User, fchownat};

/// Symbolic links on the way to a file, at most, as in Linux.
const LINKS_MOST: usize = 40;

/// A user and the group of that user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: Uid,
    /// The group.
    pub group: Gid,
}

impl Owner {
    /// By name, or by number, which needs no entry in the user database.
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

    /// Gives them what is open.
    pub fn give(&self, open: impl AsFd) -> io::Result<()> {
        let (user, group) = (Some(self.user), Some(self.group));
        fchownat(open, "", user, group, AtFlags::AT_EMPTY_PATH)?;
        Ok(())
    }

    /// Gives them a FIFO, with `mode`.
    pub fn give_fifo(&self, path: &Path, mode: u32) -> io::Result<()> {
        let fifo = open_path(path)?;
        if !fifo.metadata()?.file_type().is_fifo() {
            return Err(io::Error::other("is no FIFO"));
        }
        self.give(&fifo)?;
        let open = format!("/proc/self/fd/{}", fifo.as_raw_fd());
        fs::set_permissions(open, PermissionsExt::from_mode(mode))
    }
}

/// What lies at a path, not what a symbolic link there leads to; for everything but its content.
fn open_path(path: &Path) -> io::Result<File> {
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

/// Where a directory is that nobody but root can replace, with all that leads to it; it is made if it is not
/// there. `None` if others can make files on the way, so that they could have a hand in where it leads.
pub fn roots_alone(directory: &Path) -> io::Result<Option<PathBuf>> {
    let mut way: Vec<PathBuf> = vec![std::path::absolute(directory)?];
    let mut at = PathBuf::from("/");
    let mut links = 0;
    while let Some(rest) = way.pop() {
        let mut components = rest.components();
        let Some(next) = components.next() else {
            continue;
        };
        way.push(components.as_path().to_owned());
        let below = match next {
            Component::RootDir => PathBuf::from("/"),
            Component::ParentDir => at.parent().unwrap_or(&at).to_owned(),
            next => at.join(next),
        };
        let found = match fs::symlink_metadata(&below) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                DirBuilder::new().mode(0o755).create(&below)?;
                fs::symlink_metadata(&below)?
            }
            found => found?,
        };
        if found.is_symlink() {
            links += 1;
            if links > LINKS_MOST {
                return Err(io::Error::from_raw_os_error(libc::ELOOP));
            }
            // It lies in a directory of root's alone.
            way.push(fs::read_link(&below)?);
        } else if !found.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        } else if found.uid() != 0 || found.mode() & 0o022 != 0 {
            return Ok(None);
        } else {
            at = below;
        }
    }
    Ok(Some(at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_by_name_and_by_number() {
        assert_eq!(Owner::find("root").unwrap().user, Uid::from_raw(0));
        assert_eq!(Owner::find("64123").unwrap().group, Gid::from_raw(64123));
        assert!(Owner::find("nobody-of-this-name").is_err());
    }

    #[test]
    fn what_others_may_change_is_not_roots_alone() {
        assert_eq!(
            roots_alone(Path::new("/usr/bin/../lib")).unwrap(),
            Some("/usr/lib".into())
        );
        assert_eq!(roots_alone(&std::env::temp_dir()).unwrap(), None);
        assert_eq!(
            roots_alone(&std::env::temp_dir().join("not/there")).unwrap(),
            None
        );
    }

    #[test]
    fn only_a_fifo_is_given_away() {
        let folder = tempfile::tempdir().unwrap();
        let owner = Owner {
            user: nix::unistd::getuid(),
            group: nix::unistd::getgid(),
        };
        let path = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink(path("fifo"), path("link")).unwrap();
        owner.give_fifo(&path("fifo"), 0o622).unwrap();
        assert_eq!(fs::metadata(path("fifo")).unwrap().mode() & 0o777, 0o622);
        assert!(owner.give_fifo(&path("file"), 0o622).is_err());
        assert!(owner.give_fifo(&path("link"), 0o666).is_err());
    }
}
