//! The file of the process id, for scripts. The lock of the state directory is what keeps a second daemon out.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::Path;

use log::Level;

use crate::sys::directory::Directory;

/// The file; it is removed when this is dropped.
pub struct PidFile(Option<(Directory, OsString)>);

impl PidFile {
    /// Writes the process id to `path`, if there is one. A failure is only logged: as a warning if the path `is_given` in
    /// the configuration, since the service needs no such file and may not write to a default path.
    pub fn write(path: Option<&Path>, is_given: bool) -> PidFile {
        let Some(path) = path else {
            return PidFile(None);
        };
        let write = || {
            let (directory, name) = Directory::open_parent(path)?;
            let mut file = directory.open_or_create(&name)?;
            file.set_len(0)?;
            writeln!(file, "{}", std::process::id())?;
            io::Result::Ok((directory, name))
        };
        let written = write();
        if let Err(error) = &written {
            let level = match is_given {
                true => Level::Warn,
                false => Level::Debug,
            };
            log::log!(
                level,
                "{}: {error}; running without a PID file (pidPath)",
                path.display()
            );
        }
        PidFile(written.ok())
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some((directory, name)) = &self.0 {
            let _ = directory.remove(name);
        }
    }
}
