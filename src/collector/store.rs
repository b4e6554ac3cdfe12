//! The store: segments of flow records on disk.

use std::path::{Path, PathBuf};
use std::time::Duration;

use fields::Fields;

pub mod fields;
pub mod log_socket;
pub mod names;
mod retention;
pub mod segment;
mod torn;
pub mod writer;

/// Where and how flow records are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A directory of segments, or one file.
    pub target: Target,
    /// After what time a new segment begins: at multiples of it since 1970-01-01T00:00:00Z, so that an hour begins with the
    /// hour. At least one second. For [`Target::Directory`] only.
    pub rotate_interval: Duration,
    /// At which length in bytes a new segment begins, within an interval. For [`Target::Directory`] only.
    pub rotate_size: Option<u64>,
    /// The age at which a segment is deleted, counted from its last change, and from the end of its interval. For
    /// [`Target::Directory`] only.
    pub keep_age: Option<Duration>,
    /// The bytes that all segments may have together; above it the oldest are deleted. For [`Target::Directory`] only.
    pub keep_size: Option<u64>,
    /// The fields that are stored of a record.
    pub fields: Fields,
    /// Whether the files must be of minor version 0, as those of djm's flowd: without the fields of [`Fields::EXTENSION`].
    pub compatible: bool,
    /// A socket that every stored record is sent to as well.
    pub log_socket: Option<LogSocketSettings>,
    /// The bytes of records that may wait in memory while they cannot be written.
    pub max_waiting: usize,
}

/// The files that flow records are stored in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A directory of segments, which are rotated and deleted.
    Directory(PathBuf),
    /// One file, which another program rotates: it renames the file, and then asks that it be reopened.
    File(PathBuf),
}

impl Target {
    /// The directory or the file.
    pub fn path(&self) -> &Path {
        match self {
            Target::Directory(path) | Target::File(path) => path,
        }
    }
}

/// A Unix datagram socket of another program, which receives one record per datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSocketSettings {
    /// The path that the other program has bound.
    pub path: PathBuf,
    /// The size of the send buffer in bytes; that of the system if `None`.
    pub buffer_size: Option<usize>,
}

impl Settings {
    /// The fields that are written of a record.
    pub fn fields_written(&self) -> Fields {
        match self.compatible {
            true => Fields(self.fields.0 & Fields::COMPATIBLE.0),
            false => self.fields,
        }
    }
}
