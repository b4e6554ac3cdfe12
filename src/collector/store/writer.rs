//! Writes batches of records to segments, or to one file. Every file ends with a whole record, whatever happens to the disk.

use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use super::names::{self, SegmentName};
use super::retention::Retention;
use super::torn;
use super::{Settings, Target};
use crate::error::{Context, Result};
use crate::sys::directory::Directory;

/// Mode of the files: the group may read them.
const FILE_MODE: u32 = 0o640;
/// Mode of the directory, if it is created here.
const DIRECTORY_MODE: u32 = 0o750;

/// The open store.
pub struct Store {
    place: Place,
    current: Option<Current>,
}

enum Place {
    Directory(Segments),
    File(PathBuf),
}

/// A directory of segments.
struct Segments {
    path: PathBuf,
    interval: Duration,
    rotate_size: Option<u64>,
    /// The newest segment that was opened.
    newest: Option<SegmentName>,
    retention: Option<Retention>,
}

/// The file that is being written.
struct Current {
    file: File,
    path: PathBuf,
    /// When the segment begins; `None` for one file.
    name: Option<SegmentName>,
    /// Whether the last write failed.
    failed: bool,
    /// The length to go back to: part of a batch was written, and could not be removed.
    torn_at: Option<u64>,
}

/// Names the file that an error is about.
fn about(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

impl Store {
    /// Opens the file or segment that is to be written at the time `now`, so that a place where nothing can be written is an
    /// error. Creates the directory if only its last component is missing. If the last file ends within a record, it is cut
    /// after the last whole one.
    pub fn open(settings: &Settings, now: Timestamp) -> Result<Store> {
        let place = match &settings.target {
            Target::File(path) => Place::File(path.clone()),
            Target::Directory(path) => Place::Directory(Segments {
                path: path.clone(),
                interval: settings.rotate_interval,
                rotate_size: settings.rotate_size,
                newest: None,
                retention: Retention::new(path, settings),
            }),
        };
        let mut store = Store {
            place,
            current: None,
        };
        let opened = store.place.repair_newest();
        opened
            .and_then(|()| store.writable(now).map(drop))
            .context(|| "store".to_owned())?;
        Ok(store)
    }

    /// Appends the records of a batch, of which the first was received at `received`; that time decides on the segment. So a
    /// batch that had to wait goes where a reader looks for it. Without records nothing happens.
    ///
    /// # Errors
    ///
    /// The error names the file. Nothing of the batch is in it then, and the call may be repeated at any time: it opens
    /// what has to be opened again.
    pub fn append(&mut self, batch: &[u8], received: Timestamp) -> io::Result<()> {
        match batch.is_empty() {
            true => Ok(()),
            false => self.writable(received)?.append(batch),
        }
    }

    /// Closes the segment whose interval is over, and deletes old segments. Call about once a second.
    pub fn tick(&mut self, now: Timestamp) {
        let Place::Directory(segments) = &mut self.place else {
            return;
        };
        if let Some(current) = &mut self.current
            && let Some(name) = current.name
            && name.is_over(now, segments.interval)
            && current.undo().is_ok()
        {
            self.current = None;
        }
        let written = self.current.as_ref().and_then(|current| current.name);
        if let Some(retention) = &mut segments.retention {
            retention.tick(written, now);
        }
    }

    /// Opens the file by its name again: another program has renamed it. On an error the open file is kept.
    pub fn reopen(&mut self) -> io::Result<()> {
        let name = self.current.as_ref().and_then(|current| current.name);
        let opened = match (&self.place, name) {
            (Place::File(path), _) => open_file(path)?,
            (Place::Directory(segments), Some(name)) => segments.open(name)?,
            (Place::Directory(_), None) => return Ok(()),
        };
        if let Some(mut old) = self.current.replace(opened)
            && let Err(error) = old.undo()
        {
            log::warn!("store {error}; the file ends within a record");
        }
        Ok(())
    }

    /// Closes the file, with a whole record at its end. It is not synced to the disk, which could take longer than a stop may:
    /// data that the kernel has survives the program.
    pub fn close(mut self) -> io::Result<()> {
        self.current.as_mut().map_or(Ok(()), Current::undo)
    }

    /// The file that is being written; `None` between two segments.
    pub fn path(&self) -> Option<&Path> {
        Some(&self.current.as_ref()?.path)
    }

    /// The file that records of this time go to, open, and with a whole record at its end.
    fn writable(&mut self, time: Timestamp) -> io::Result<&mut Current> {
        let current = match self.current.take() {
            Some(current) => self.still_writable(current, time)?,
            None => None,
        };
        let current = match current {
            Some(current) => current,
            None => self.place.open(time)?,
        };
        Ok(self.current.insert(current))
    }

    /// Returns the open file if it can go on being written. On an error it is kept for the next attempt.
    fn still_writable(
        &mut self,
        mut current: Current,
        time: Timestamp,
    ) -> io::Result<Option<Current>> {
        let found = match current.file.metadata() {
            Ok(found) if found.nlink() > 0 => found,
            // Deleted; or on a file system that is gone.
            _ => {
                let path = current.path.display();
                log::warn!("store {path}: was deleted while it was written; it is created again");
                return Ok(None);
            }
        };
        let undone = current.undo();
        if current.failed && current.is_replaced(&found) {
            let path = current.path.display();
            log::warn!("store {path}: is another file now; it is written from here on");
            return Ok(None);
        }
        if let Err(error) = undone {
            self.current = Some(current);
            return Err(error);
        }
        Ok(self
            .place
            .continues(current.name, found.len(), time)
            .then_some(current))
    }
}

impl Current {
    fn new(file: File, path: PathBuf, name: Option<SegmentName>) -> Current {
        Current {
            file,
            path,
            name,
            failed: false,
            torn_at: None,
        }
    }

    fn append(&mut self, batch: &[u8]) -> io::Result<()> {
        let before = self.file.metadata().map_err(about(&self.path))?.len();
        // One write(2). If that was short, a second one tells why.
        let written = self.file.write_all(batch).map_err(about(&self.path));
        self.failed = written.is_err();
        let Err(error) = written else { return Ok(()) };
        self.torn_at = Some(before);
        Err(match self.undo() {
            Ok(()) => error,
            Err(undo) => {
                let message = format!("{error}; the part that was written stays for now: {undo}");
                io::Error::new(error.kind(), message)
            }
        })
    }

    /// Removes what was written of a batch that failed.
    fn undo(&mut self) -> io::Result<()> {
        if let Some(length) = self.torn_at {
            self.file.set_len(length).map_err(about(&self.path))?;
            self.torn_at = None;
        }
        Ok(())
    }

    /// Whether another file, or none, has the path: another disk may have been mounted.
    fn is_replaced(&self, found: &Metadata) -> bool {
        match fs::metadata(&self.path) {
            Ok(other) => (other.dev(), other.ino()) != (found.dev(), found.ino()),
            Err(error) => error.kind() == ErrorKind::NotFound,
        }
    }
}

impl Place {
    /// Whether records of this time still go to the open file.
    fn continues(&self, name: Option<SegmentName>, length: u64, time: Timestamp) -> bool {
        let (Place::Directory(segments), Some(name)) = (self, name) else {
            return true;
        };
        // There is one name per second.
        let full = segments.rotate_size.is_some_and(|size| length >= size);
        let next = full && SegmentName::at(time) > name;
        !next && name.takes(time, segments.interval)
    }

    /// Opens the file that records of this time go to.
    fn open(&mut self, time: Timestamp) -> io::Result<Current> {
        let segments = match self {
            Place::File(path) => return open_file(path),
            Place::Directory(segments) => segments,
        };
        let name = segments.choose(time)?;
        let current = segments.open(name)?;
        segments.newest = segments.newest.max(Some(name));
        if let Some(retention) = &mut segments.retention {
            retention.start(Some(name), time);
        }
        Ok(current)
    }

    /// Repairs the end of the newest segment.
    fn repair_newest(&self) -> io::Result<()> {
        let Place::Directory(segments) = self else {
            return Ok(());
        };
        let directory = open_directory(&segments.path)?;
        let names = names::list(&directory.proc_path("")).map_err(about(&segments.path))?;
        if let Some(newest) = names.last()
            && let Err(error) = segments.open(*newest)
        {
            // The segment of this time is opened later; this one may be something else of its name.
            log::warn!("store {error}; the file is left as it is");
        }
        Ok(())
    }
}

impl Segments {
    /// The segment that records of this time go to: the first of the interval, or the last that was begun since because of
    /// the size.
    fn choose(&self, time: Timestamp) -> io::Result<SegmentName> {
        let first = SegmentName::of_interval(time, self.interval);
        let Some(size) = self.rotate_size else {
            return Ok(first);
        };
        if self.newest.is_some_and(|newest| newest < first) {
            return Ok(first);
        }
        let directory = open_directory(&self.path)?;
        let here = directory.proc_path("");
        let names = names::list(&here).map_err(about(&self.path))?;
        let now = SegmentName::at(time);
        let mut of_interval = names.iter().filter(|name| (first..=now).contains(name));
        let Some(last) = of_interval.next_back() else {
            return Ok(first);
        };
        let length = here.join(last.file_name()).symlink_metadata()?.len();
        Ok(if length < size { *last } else { now })
    }

    fn open(&self, name: SegmentName) -> io::Result<Current> {
        let directory = open_directory(&self.path)?;
        let file_name = name.file_name();
        let path = directory.shown(&file_name);
        let open = || directory.append_with_mode(&file_name, FILE_MODE);
        let mut file = open().map_err(about(&path))?;
        if !torn::repair(&file, &path).map_err(about(&path))? {
            let aside = format!("{file_name}.unreadable");
            directory.rename(&file_name, &aside).map_err(about(&path))?;
            let aside = directory.shown(aside);
            log::warn!(
                "store {}: has no record of flows; kept as {}",
                path.display(),
                aside.display()
            );
            file = open().map_err(about(&path))?;
        }
        Ok(Current::new(file, path, Some(name)))
    }
}

fn open_file(path: &Path) -> io::Result<Current> {
    let (directory, name) = Directory::open_parent(path).map_err(about(path))?;
    let file = directory
        .append_with_mode(name, FILE_MODE)
        .map_err(about(path))?;
    if !torn::repair(&file, path).map_err(about(path))? {
        let message = "has no record of flows in version 3 of flowd's format; choose another file, or remove it";
        return Err(about(path)(io::Error::new(ErrorKind::InvalidData, message)));
    }
    Ok(Current::new(file, path.to_owned(), None))
}

/// Opens a directory, and creates it if the one above it exists.
fn open_directory(path: &Path) -> io::Result<Directory> {
    match Directory::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        opened => return opened.map_err(about(path)),
    }
    if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
        Directory::open(parent).map_err(about(parent))?;
    }
    let created = Directory::ensure(path, DIRECTORY_MODE).map_err(about(path))?;
    log::info!("store {}: created the directory", path.display());
    Ok(created)
}

#[cfg(test)]
mod tests;
