//! Files that root makes for an ordinary user.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::Path;

use nix::libc;
use nix::unistd::{Gid, Uid, User};

/// A user and the group of that user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub user: Uid,
    /// The group.
    pub group: Gid,
}

impl Owner {
    /// By name, or by number.
    pub fn find(user: &str) -> io::Result<Owner> {
        let found = match user.parse() {
            Ok(id) => User::from_uid(Uid::from_raw(id))?,
            Err(_) => User::from_name(user)?,
        };
        let number = user.parse().ok();
        match (found, number) {
            (Some(found), _) => Ok(Owner {
                user: found.uid,
                group: found.gid,
            }),
            // A number needs no entry in the user database.
            (None, Some(id)) => Ok(Owner {
                user: Uid::from_raw(id),
                group: Gid::from_raw(id),
            }),
            (None, None) => Err(io::Error::new(io::ErrorKind::NotFound, "no such user")),
        }
    }

    /// Gives the file or directory at `path` to them, with `mode` if there is one. A symbolic link is an
    /// error: whoever made it is not to choose what is given away.
    pub fn give(&self, path: &Path, mode: Option<u32>) -> io::Result<()> {
        let handle = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(path)?;
        if handle.metadata()?.is_symlink() {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let handle_path = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let (user, group) = (self.user.as_raw(), self.group.as_raw());
        chown(&handle_path, Some(user), Some(group))?;
        match mode {
            Some(mode) => fs::set_permissions(&handle_path, PermissionsExt::from_mode(mode)),
            None => Ok(()),
        }
    }

    /// The same, if it is there and root's.
    pub fn give_of_root(&self, path: &Path) -> io::Result<()> {
        match fs::symlink_metadata(path) {
            Ok(there) if there.uid() == 0 => self.give(path, None),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}
