//! A FIFO in the file system: made or adopted, watched, retired.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Group};

/// What the kernel lets an unprivileged process ask for: room for some 13,000 lines.
const CAPACITY: i32 = 1 << 20;

/// An open FIFO and where it lies.
pub struct Fifo {
    path: PathBuf,
    file: File,
    made: bool,
}

/// What had to be done so that there is a FIFO.
pub struct Ensured {
    made: bool,
    /// The new name of a regular file that stood in its place.
    pub moved_aside: Option<PathBuf>,
}

/// A FIFO, and under which name the regular file in its place was kept, if there was one.
pub struct Opened {
    /// The FIFO, open for reading.
    pub fifo: Fifo,
    /// The new name of a regular file that stood in its place.
    pub moved_aside: Option<PathBuf>,
}

impl Fifo {
    /// Opens the FIFO at `path` without blocking. One that is there is adopted as it is; one that is
    /// not is made with `mode` and `group`. A regular file in its place is renamed.
    pub fn open(path: &Path, mode: u32, group: Option<Gid>) -> io::Result<Opened> {
        let Ensured { made, moved_aside } = ensure(path)?;
        // Open for writing too, so that the last writer's close is not an end of file.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        if !file.metadata()?.file_type().is_fifo() {
            return Err(io::Error::other("was replaced while it was opened"));
        }
        if made {
            if let Some(group) = group {
                std::os::unix::fs::fchown(&file, None, Some(group.as_raw()))?;
            }
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        // A smaller one is good too.
        let _ = fcntl(&file, FcntlArg::F_SETPIPE_SZ(CAPACITY));
        let fifo = Fifo {
            path: path.to_owned(),
            file,
            made,
        };
        Ok(Opened { fifo, moved_aside })
    }

    /// Whether the path still leads to this FIFO.
    pub fn is_in_place(&self) -> bool {
        match (fs::metadata(&self.path), self.file.metadata()) {
            (Ok(there), Ok(ours)) => there.dev() == ours.dev() && there.ino() == ours.ino(),
            _ => false,
        }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Removes the FIFO from the file system if the daemon made it and it is still there.
    pub fn remove(&self) -> io::Result<()> {
        if self.made && self.is_in_place() {
            fs::remove_file(&self.path)?;
        }
        Ok(())
    }

    /// The same FIFO, open for reading only: it ends when the last of its writers closes it.
    pub fn retire(self) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// Makes a FIFO, for its owner alone, if there is none; a regular file in its place is renamed.
pub fn ensure(path: &Path) -> io::Result<Ensured> {
    let mut moved_aside = None;
    let mut made = false;
    match fs::metadata(path) {
        Ok(there) if there.file_type().is_fifo() => {}
        Ok(there) if there.is_file() => {
            let aside = unused_name(path);
            fs::rename(path, &aside)?;
            moved_aside = Some(aside);
            made = make(path)?;
        }
        Ok(_) => {
            let message = "is neither a FIFO nor a regular file, will not be replaced";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
                DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(parent)?;
            }
            made = make(path)?;
        }
        Err(error) => return Err(error),
    }
    Ok(Ensured { made, moved_aside })
}

/// False if somebody else made it meanwhile.
fn make(path: &Path) -> io::Result<bool> {
    match nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600)) {
        Ok(()) => Ok(true),
        Err(nix::errno::Errno::EEXIST) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn unused_name(path: &Path) -> PathBuf {
    let now = Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let name = |n: u32| {
        let mut name = path.as_os_str().to_owned();
        name.push(if n == 0 {
            format!(".{now}")
        } else {
            format!(".{now}.{n}")
        });
        PathBuf::from(name)
    };
    let mut n = 0;
    while fs::symlink_metadata(name(n)).is_ok() {
        n += 1;
    }
    name(n)
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
    fn one_that_was_made_has_the_mode_and_is_removed_and_one_that_was_there_is_neither() {
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
    fn a_regular_file_is_kept_under_another_name_and_a_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let mut names = Vec::new();
        for content in ["one", "two"] {
            fs::write(&path, content).unwrap();
            let opened = Fifo::open(&path, 0o666, None).unwrap();
            let aside = opened.moved_aside.unwrap();
            assert_eq!(fs::read_to_string(&aside).unwrap(), content);
            opened.fifo.remove().unwrap();
            names.push(aside);
        }
        assert_ne!(names[0], names[1]);
        assert!(Fifo::open(dir.path(), 0o666, None).is_err());
    }

    #[test]
    fn a_retired_one_ends_with_its_last_writer() {
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
