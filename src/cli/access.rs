//! Messages for a socket or a pipe that the user may not open: who may, and what to do.

use std::fmt::Display;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::{Gid, Group, Uid, User};

use crate::error::Error;

/// The error for `path`, which could not be written to for want of permission. `resource` names it: `named pipe /…`.
pub fn denied(resource: impl Display, path: &Path) -> Error {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    // A path that cannot be looked at lies below a directory that the user may not enter.
    let closed = path.ancestors().find_map(|at| Some((at, visible(at)?)));
    let reason = match closed {
        Some((at, found)) if at == path => describe("it", &found, 0o2),
        Some((at, found)) => describe(&format!("the directory {}", at.display()), &found, 0o1),
        None => String::new(),
    };
    Error::Failed(format!("{resource}: permission denied{reason}"))
}

fn visible(path: &Path) -> Option<Metadata> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => None,
        found => found.ok(),
    }
}

/// Who has `access`, a permission bit of others, to what was found. The superuser always has.
fn describe(name: &str, found: &Metadata, access: u32) -> String {
    let (user, group) = (user_name(found.uid()), group_name(found.gid()));
    let of_group = found.mode() & access << 3 != 0 && found.gid() != 0;
    let of_others = found.mode() & access != 0;
    match (of_group, found.uid()) {
        // Something other than its mode forbids it: an access control list, SELinux.
        _ if of_others => {
            let mode = found.mode() & 0o7777;
            format!(" ({name} has owner {user}, group {group}, mode {mode:04o})")
        }
        (true, _) => format!(
            "; {name} is open to the user {user} and the group {group}: use sudo, or join the group (`usermod -aG {group} USER`, then log in again)"
        ),
        (false, 0) => format!("; {name} is open to root only: use sudo"),
        (false, _) => format!("; {name} is open to the user {user} only: use sudo"),
    }
}

fn user_name(id: u32) -> String {
    let found = User::from_uid(Uid::from_raw(id)).ok().flatten();
    found.map_or_else(|| id.to_string(), |user| user.name)
}

fn group_name(id: u32) -> String {
    let found = Group::from_gid(Gid::from_raw(id)).ok().flatten();
    found.map_or_else(|| id.to_string(), |group| group.name)
}
