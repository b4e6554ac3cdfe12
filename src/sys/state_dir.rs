//! The state directory, and its lock against a second daemon.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::directory::Directory;
use super::ownership;
use crate::error::{Context, Error, Result};

/// The lock. The daemon holds it as long as it runs; the kernel releases it however the daemon ends.
pub struct Lock {
    _file: Option<Flock<File>>,
}

/// Creates the directory if it does not exist, and locks it.
///
/// # Errors
///
/// Another daemon uses the directory, or the user may not write to it. On a read-only file system there is only a warning,
/// and no lock.
pub fn lock(directory: &Path) -> Result<Lock> {
    let shown = directory.display();
    let path = directory.join("lock");
    let opened = Directory::ensure(directory, 0o750);
    let opened = opened.map_err(|error| access_failure(directory, error))?;
    let mut file = match opened.open_or_create("lock") {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            log::warn!("state directory {shown} (stateDir): {error}; running without its lock");
            return Ok(Lock { _file: None });
        }
        file => file.map_err(|error| access_failure(&path, error))?,
    };
    let mut holder = String::new();
    // If the process id cannot be read, it is only missing from the message.
    let _ = file.read_to_string(&mut holder);
    let mut file =
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => Error::Failed(format!(
                "state directory {shown} (stateDir) is in use by another flowd-rs, process {}",
                holder.trim()
            )),
            errno => access_failure(&path, errno.into()),
        })?;
    // The process id is only for the message above: ignore failures, such as a full disk.
    let _ = file.set_len(0);
    let _ = io::Seek::rewind(&mut *file);
    let _ = writeln!(file, "{}", std::process::id());
    Ok(Lock { _file: Some(file) })
}

/// The error of an access to the state directory. If permission is denied, it says who may access it.
fn access_failure(path: &Path, error: io::Error) -> Error {
    let shown = path.display();
    match error.kind() {
        io::ErrorKind::PermissionDenied => Error::Failed(format!(
            "{shown} (stateDir): {}; start the service (systemctl start flowd-rs), run flowd-rs as root (sudo), or set stateDir to a directory of your own",
            ownership::DENIED
        )),
        _ => Error::Resource {
            resource: format!("{shown} (stateDir)"),
            source: error,
        },
    }
}

/// The key of the entropy bits of flow labels. It is random, and stored in the state directory so that labels do not
/// change with a restart.
pub fn label_key(state_dir: &Path) -> Result<[u8; 16]> {
    let directory = Directory::open(state_dir).context(|| state_dir.display().to_string())?;
    let mut key = [0; 16];
    let stored = directory.read("label-key");
    if let Ok(mut file) = stored
        && file.metadata().is_ok_and(|found| found.len() == 16)
        && file.read_exact(&mut key).is_ok()
    {
        return Ok(key);
    }
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut key))
        .context(|| "/dev/urandom".to_owned())?;
    let written = directory.create_new("label-key");
    if let Err(error) = written.and_then(|mut file| file.write_all(&key)) {
        log::warn!(
            "{}: {error}; the entropy bits of flow labels will change at the next start",
            directory.shown("label-key").display()
        );
    }
    Ok(key)
}
