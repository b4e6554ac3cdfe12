//! A FIFO in the file system: created or adopted, watched, retired.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::unistd::{Gid, Group};

use super::directory::Directory;

/// Requested capacity in bytes: the most that the kernel grants an unprivileged process, room for about 13,000 lines.
const PIPE_CAPACITY: i32 = 1 << 20;

/// An open FIFO and its path.
pub struct Fifo {
    path: PathBuf,
    file: File,
    created: bool,
}

/// What [`ensure`] did.
pub struct Ensured {
    created: bool,
    /// The new path of the regular file that was at the path, if there was one.
    pub backup: Option<PathBuf>,
}

/// What [`Fifo::open`] did.
pub struct Opened {
    /// The FIFO, open for reading.
    pub fifo: Fifo,
    /// The new path of the regular file that was at the path, if there was one.
    pub backup: Option<PathBuf>,
}

impl Fifo {
    /// Opens the FIFO at `path` without blocking. An existing one is adopted unchanged; a missing one is created with
    /// `mode` and `group`. A regular file at `path` is renamed.
    pub fn open(path: &Path, mode: u32, group: Option<Gid>) -> io::Result<Opened> {
        let Ensured { created, backup } = ensure(path)?;
        // Open for writing, too, so that the close of the last writer does not cause an end of file.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | if created { libc::O_NOFOLLOW } else { 0 })
            .open(path)?;
        if !file.metadata()?.file_type().is_fifo() {
            return Err(io::Error::other("was replaced while it was being opened"));
        }
        if created {
            if let Some(group) = group {
                std::os::unix::fs::fchown(&file, None, Some(group.as_raw()))?;
            }
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        // A smaller capacity works, too.
        let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(PIPE_CAPACITY));
        let fifo = Fifo {
            path: path.to_owned(),
            file,
            created,
        };
        Ok(Opened { fifo, backup })
    }

    /// Whether the path still leads to this FIFO.
    pub fn is_in_place(&self) -> bool {
        match (fs::metadata(&self.path), self.file.metadata()) {
            (Ok(found), Ok(own)) => found.dev() == own.dev() && found.ino() == own.ino(),
            _ => false,
        }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Removes the FIFO from the file system if the daemon created it and the path still leads to it.
    pub fn remove(&self) -> io::Result<()> {
        if self.created && self.is_in_place() {
            fs::remove_file(&self.path)?;
        }
        Ok(())
    }

    /// Reopens the FIFO for reading only, so that it ends when its last writer closes it.
    pub fn retire(self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// Creates a FIFO with mode 0600 if there is none. A regular file at `path` is renamed.
pub fn ensure(path: &Path) -> io::Result<Ensured> {
    let mut backup = None;
    let mut created = false;
    match fs::metadata(path) {
        Ok(found) if found.file_type().is_fifo() => {}
        Ok(found) if found.is_file() => {
            let new_path = unused_path(path);
            fs::rename(path, &new_path)?;
            backup = Some(new_path);
            created = create(path)?;
        }
        Ok(_) => {
            let message = "is neither a FIFO nor a regular file; it is not replaced";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            created = create(path)?;
        }
        Err(error) => return Err(error),
    }
    Ok(Ensured { created, backup })
}

/// Creates the FIFO. False if another process has created it meanwhile.
fn create(path: &Path) -> io::Result<bool> {
    let (directory, name) = Directory::ensure_parent(path, 0o755)?;
    directory.create_fifo(name)
}

/// `path` with the current time appended, and a number if that path exists.
fn unused_path(path: &Path) -> PathBuf {
    let now = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let candidate = |n: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(if n == 0 {
            format!(".{now}")
        } else {
            format!(".{now}.{n}")
        });
        PathBuf::from(name)
    };
    let mut n = 0;
    while fs::symlink_metadata(candidate(n)).is_ok() {
        n += 1;
    }
    candidate(n)
}

/// The id of a group given by name or id.
pub fn group_id(group: &str) -> io::Result<Gid> {
    if let Ok(id) = group.parse::<u32>() {
        return Ok(Gid::from_raw(id));
    }
    match Group::from_name(group)? {
        Some(found) => Ok(found.gid),
        None => Err(io::Error::new(io::ErrorKind::NotFound, "no such group")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_created_fifo_has_the_mode_and_is_removed_and_an_adopted_one_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/pipe");
        let fifo = Fifo::open(&path, 0o622, None).unwrap().fifo;
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o622);
        let adopted = Fifo::open(&path, 0o666, None).unwrap().fifo;
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o622);
        adopted.remove().unwrap();
        assert!(fifo.is_in_place());
        fifo.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_regular_file_is_renamed_and_a_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let mut names = Vec::new();
        for content in ["one", "two"] {
            fs::write(&path, content).unwrap();
            let opened = Fifo::open(&path, 0o666, None).unwrap();
            let backup = opened.backup.unwrap();
            assert_eq!(fs::read_to_string(&backup).unwrap(), content);
            opened.fifo.remove().unwrap();
            names.push(backup);
        }
        assert_ne!(names[0], names[1]);
        assert!(Fifo::open(dir.path(), 0o666, None).is_err());
    }

    #[test]
    fn a_retired_fifo_ends_with_its_last_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let fifo = Fifo::open(&path, 0o666, None).unwrap().fifo;
        let mut writer = OpenOptions::new().write(true).open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(!fifo.is_in_place());
        let mut retired = fifo.retire().unwrap();
        writer.write_all(b"last").unwrap();
        let mut read = [0; 9];
        assert_eq!(retired.read(&mut read).unwrap(), 4);
        assert_eq!(
            retired.read(&mut read).unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
        drop(writer);
        assert_eq!(retired.read(&mut read).unwrap(), 0);
    }
}
