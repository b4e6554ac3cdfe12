//! Repairs the end of a file that was not written to its end: by a kill, or by a host that went down.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::segment::{MAX_LENGTH, valid_prefix};

/// How much of a file is read at once, from its end.
const WINDOW: usize = 1 << 20;

/// Cuts a file after its last whole record. Returns false, and leaves the file alone, if there is none and the file does not
/// begin like one.
pub(super) fn repair(file: &File, path: &Path) -> io::Result<bool> {
    let length = file.metadata()?.len();
    let Some(end) = end_of_records(file, length)? else {
        return Ok(false);
    };
    if end < length {
        file.set_len(end)?;
        let cut = length - end;
        let path = path.display();
        log::warn!(
            "store {path}: its last record is not whole; {cut} bytes at the end are removed"
        );
    }
    Ok(true)
}

/// Where the last whole record ends. `None` if there is no record, nor the beginning of one.
fn end_of_records(file: &File, length: u64) -> io::Result<Option<u64>> {
    let mut buffer = Vec::new();
    let mut end = length;
    let mut zeros = true;
    while end > 0 {
        let begin = end.saturating_sub(WINDOW as u64);
        buffer.resize((end - begin) as usize, 0);
        file.read_exact_at(&mut buffer, begin)?;
        if let Some(found) = last_end(&buffer) {
            return Ok(Some(begin + found as u64));
        }
        zeros &= buffer.iter().all(|byte| *byte == 0);
        if begin == 0 {
            break;
        }
        // No record begins in this window, but one may end in it.
        end = begin + MAX_LENGTH as u64;
    }
    // The first record, cut; or what is left after a crash of a file that had grown, but was not written yet.
    let cut = length < MAX_LENGTH as u64 && buffer.first().is_none_or(|byte| byte >> 5 == 3);
    Ok((cut || zeros).then_some(0))
}

/// Where the last whole record in `bytes` ends. The bytes may begin within a record, and may have damaged ones.
fn last_end(bytes: &[u8]) -> Option<usize> {
    let (mut at, mut last) = (0, None);
    while at < bytes.len() {
        match valid_prefix(&bytes[at..]) {
            0 => at += 1,
            whole => {
                at += whole;
                last = Some(at);
                if bytes.len() - at < MAX_LENGTH {
                    break;
                }
            }
        }
    }
    // What is left is a torn record, and what looks like a record in it is none; or a damaged one with whole ones behind it.
    let mut rest = at..bytes.len();
    match rest.find(|&at| at + valid_prefix(&bytes[at..]) == bytes.len()) {
        Some(_) => Some(bytes.len()),
        None => last,
    }
}
