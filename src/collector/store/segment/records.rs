//! Reads the records of a segment one after the other, and skips what is damaged.

use std::io::{self, ErrorKind, Read};

use super::{SegmentError, decode};
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// The bytes that are read at once.
const BUFFER_SIZE: usize = 1 << 20;

/// A part of a segment that was skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at offset {offset} skipped: {reason}")]
pub struct Damage {
    /// Where it begins, from the start of the segment.
    pub offset: u64,
    /// Its length, up to the next record or the end.
    pub bytes: u64,
    /// What is wrong with the bytes at `offset`.
    pub reason: SegmentError,
}

/// Why there is no record where one was expected.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Bytes were skipped; the next record follows.
    #[error(transparent)]
    Damage(#[from] Damage),
    /// The segment could not be read; no record follows.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The records of a segment, in their order.
pub struct Records<R> {
    input: R,
    buffer: Vec<u8>,
    /// Where the bytes in `buffer` that are still to be decoded begin.
    start: usize,
    /// Where they end.
    end: usize,
    /// The place of `start` in the segment.
    offset: u64,
    /// Nothing more can be read.
    has_ended: bool,
    /// The length of the last record, which ends at `start`.
    last: usize,
}

impl<R: Read> Records<R> {
    /// Reads from `input`, which needs no buffer.
    pub fn new(input: R) -> Records<R> {
        Records {
            input,
            buffer: vec![0; BUFFER_SIZE],
            start: 0,
            end: 0,
            offset: 0,
            has_ended: false,
            last: 0,
        }
    }

    /// Where the next record is to begin, from the start of the segment.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The bytes of the last record.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.start - self.last..self.start]
    }

    /// Whether everything that was read is decoded, so that the next record has to be read first.
    pub fn is_drained(&self) -> bool {
        self.start == self.end
    }

    fn window(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn advance(&mut self, bytes: usize) {
        self.start += bytes;
        self.offset += bytes as u64;
    }

    /// Reads once. What is in the buffer is less than two records, so that there is room.
    fn fill(&mut self) -> io::Result<()> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        self.last = 0;
        loop {
            match self.input.read(&mut self.buffer[self.end..]) {
                Ok(length) => {
                    self.end += length;
                    self.has_ended = length == 0;
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.has_ended = true;
                    self.end = 0;
                    return Err(error);
                }
            }
        }
    }

    /// Goes on to where the next record begins.
    fn skip(&mut self, reason: SegmentError) -> Result<Damage, io::Error> {
        let offset = self.offset;
        self.advance(1);
        loop {
            match begins_record(self.window(), self.has_ended) {
                None => self.fill()?,
                Some(true) => break,
                _ if self.window().is_empty() => break,
                _ => self.advance(1),
            }
        }
        Ok(Damage {
            offset,
            bytes: self.offset - offset,
            reason,
        })
    }
}

/// Whether a record that can be trusted begins here; `None` if more bytes are needed to tell, and there may be some.
fn begins_record(bytes: &[u8], has_ended: bool) -> Option<bool> {
    match decode(bytes) {
        Ok((_, fields, _)) if fields.contains(Fields::CRC32) => Some(true),
        // Without a CRC, the bytes of addresses and counters may look like a record.
        Ok((_, fields, length)) if fields != Fields::NONE && Fields::ALL.contains(fields) => {
            match decode(&bytes[length..]) {
                Ok(_) => Some(true),
                Err(SegmentError::Truncated { .. }) => has_ended.then_some(true),
                Err(_) => Some(false),
            }
        }
        Err(SegmentError::Truncated { .. }) if !has_ended => None,
        Ok(_) | Err(_) => Some(false),
    }
}

impl<R: Read> Iterator for Records<R> {
    type Item = Result<(FlowRecord, Fields), ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.last = 0;
        loop {
            match decode(self.window()) {
                Ok((record, fields, length)) => {
                    self.advance(length);
                    self.last = length;
                    return Some(Ok((record, fields)));
                }
                Err(SegmentError::Truncated { .. }) if !self.has_ended => {
                    if let Err(error) = self.fill() {
                        return Some(Err(error.into()));
                    }
                }
                Err(_) if self.window().is_empty() => return None,
                Err(reason) => {
                    return Some(Err(match self.skip(reason) {
                        Ok(damage) => damage.into(),
                        Err(error) => error.into(),
                    }));
                }
            }
        }
    }
}
