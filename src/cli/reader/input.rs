//! What is read: files, the segments of directories, standard input.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use nix::libc;

use super::arguments::STDIN;
use super::period::Period;
use crate::cli::terminal::escaped;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;
use crate::collector::store::names;
use crate::collector::store::segment::{self, ReadError, Records, v2};

/// The bytes that are read at once of a file of version 2.
const BUFFER_SIZE: usize = 1 << 20;
/// A batch is written in far less.
const WRITE_TIME: Duration = Duration::from_millis(20);

/// A file, or standard input.
pub struct Input {
    pub path: PathBuf,
    /// A segment of a directory, which others may write to: no link is followed, and no pipe waited for.
    is_segment: bool,
    /// 0 if unknown, as for a pipe.
    pub length: u64,
}

impl Input {
    fn new(path: PathBuf, is_segment: bool) -> Input {
        let length = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        Input {
            path,
            is_segment,
            length,
        }
    }

    /// As it is shown to the user.
    pub fn name(&self) -> String {
        match self.path == Path::new(STDIN) {
            true => "standard input".to_owned(),
            false => escaped(&self.path.display().to_string()),
        }
    }

    /// Whether the end that was found at `offset` is that of a batch which the collector was writing: soon it is elsewhere.
    pub fn is_being_written(&self, offset: u64) -> bool {
        sleep(WRITE_TIME);
        fs::metadata(&self.path)
            .is_ok_and(|metadata| metadata.is_file() && metadata.len() != offset)
    }

    /// Opens it. `is_v2` is for a file of version 2.
    pub fn open(&self, is_v2: bool) -> io::Result<Result<Source, v2::Error>> {
        let input: Box<dyn Read> = match self.path == Path::new(STDIN) {
            true => Box::new(io::stdin()),
            false if self.is_segment => Box::new(open_segment(&self.path)?),
            false => Box::new(File::open(&self.path)?),
        };
        if !is_v2 {
            return Ok(Ok(Source::V3(Records::new(input))));
        }
        let records = v2::Records::new(BufReader::with_capacity(BUFFER_SIZE, input));
        Ok(records.map(Source::V2))
    }
}

fn open_segment(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true);
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )),
    }
}

/// Lists the inputs for the path arguments. A directory expands to its segments within the period. Errors are for the user;
/// the other inputs can still be read.
pub fn list(paths: &[PathBuf], period: Period) -> (Vec<Input>, Vec<String>) {
    let (mut inputs, mut errors) = (Vec::new(), Vec::new());
    for path in paths {
        if !path.is_dir() {
            inputs.push(Input::new(path.clone(), false));
            continue;
        }
        let shown = || escaped(&path.display().to_string());
        match names::list(path) {
            Err(error) => errors.push(format!("{}: {error}", shown())),
            Ok(all) if all.is_empty() => {
                errors.push(format!("{}: no segments (flows-*.flowd) in it", shown()));
            }
            Ok(_) => match names::segments(path, period.from, period.to) {
                Ok(segments) => {
                    inputs.extend(segments.into_iter().map(|path| Input::new(path, true)))
                }
                Err(error) => errors.push(format!("{}: {error}", shown())),
            },
        }
    }
    (inputs, errors)
}

/// The records of an input.
pub enum Source {
    V3(Records<Box<dyn Read>>),
    V2(v2::Records<BufReader<Box<dyn Read>>>),
}

/// Why there is no record.
pub enum Problem {
    /// The next record follows.
    Skipped(segment::Damage),
    /// No record follows.
    Ended(String),
}

impl Source {
    /// The next record.
    pub fn next(&mut self) -> Option<Result<(FlowRecord, Fields), Problem>> {
        Some(match self {
            Source::V3(records) => records.next()?.map_err(|error| match error {
                ReadError::Damage(damage) => Problem::Skipped(damage),
                ReadError::Io(error) => Problem::Ended(error.to_string()),
            }),
            Source::V2(records) => records
                .next()?
                .map_err(|error| Problem::Ended(error.to_string())),
        })
    }

    /// The bytes of the last record, if they are of version 3.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Source::V3(records) => Some(records.bytes()),
            Source::V2(_) => None,
        }
    }

    /// The CRC of the last record, which has one.
    pub fn crc(&self) -> u32 {
        match self {
            Source::V3(records) => {
                let crc = records.bytes().last_chunk();
                crc.map_or(0, |crc| u32::from_be_bytes(*crc))
            }
            Source::V2(records) => records.crc(),
        }
    }

    /// The bytes that have been read.
    pub fn offset(&self) -> u64 {
        match self {
            Source::V3(records) => records.offset(),
            Source::V2(records) => records.offset(),
        }
    }

    /// Whether the next record may have to be waited for.
    pub fn is_drained(&self) -> bool {
        match self {
            Source::V3(records) => records.is_drained(),
            Source::V2(_) => false,
        }
    }

    /// When a file of version 2 was begun, UNIX seconds.
    pub fn started_s(&self) -> Option<u32> {
        match self {
            Source::V3(_) => None,
            Source::V2(records) => Some(records.started_s()),
        }
    }
}
