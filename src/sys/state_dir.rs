//! The state directory and its lock: one daemon a directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::error::{Context, Error, Result};

/// Held as long as the daemon runs; the kernel releases it however the daemon ends.
pub struct Lock {
    _file: Flock<File>,
}

/// Makes the directory if it is not there and locks it.
pub fn lock(directory: &Path) -> Result<Lock> {
    let shown = directory.display();
    DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(directory)
        .context(|| format!("state directory {shown} (stateDir)"))?;
    let path = directory.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .context(|| path.display().to_string())?;
    let mut holder = String::new();
    // Whatever cannot be read is only missing from the message.
    let _ = file.read_to_string(&mut holder);
    let mut file =
        Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => Error::Failed(format!(
                "state directory {shown} (stateDir) is in use by another flowd-rs, process {}",
                holder.trim()
            )),
            errno => Error::Resource {
                what: path.display().to_string(),
                source: io::Error::from(errno),
            },
        })?;
    // For the reader of the message above only: a full disk is no reason not to run.
    let _ = file.set_len(0);
    let _ = io::Seek::rewind(&mut *file);
    let _ = writeln!(file, "{}", std::process::id());
    Ok(Lock { _file: file })
}

/// The key of the entropy bits of flow labels: random, and kept in the state directory so that labels survive restarts.
pub fn label_key(state_dir: &Path) -> Result<[u8; 16]> {
    let path = state_dir.join("label-key");
    if let Ok(bytes) = fs::read(&path)
        && let Ok(key) = bytes.try_into()
    {
        return Ok(key);
    }
    let mut key = [0; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut key))
        .context(|| "/dev/urandom".to_owned())?;
    if let Err(error) = fs::write(&path, key) {
        log::warn!(
            "{}: {error}; the entropy bits of labels change with the next start",
            path.display()
        );
    }
    Ok(key)
}
