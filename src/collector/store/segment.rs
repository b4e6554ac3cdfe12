//! A segment is a sequence of flow records in version 3 of the format of djm's flowd. No I/O but the `Read` of [`Records`].
//!
//! All numbers are big endian. A segment has no file header, trailer or index, so segments can be appended and concatenated.
//! A record is a header of 8 bytes (version u8, 3 << 5 | minor; length u8, in words of 4 bytes after the header; reserved
//! u16, 0; fields u32) and the bytes of its fields, packed in the order of their bits, with the CRC last:
//!
//! | part | bits | minor version |
//! | --- | --- | --- |
//! | the fields that djm's flowd knows | 0 to 18 | 0 |
//! | further fields, which his reader skips | 19 to 23 | 1 |
//! | CRC-32 of the further fields | 24 | 1 |
//! | CRC-32 of the header and of bits 0 to 18 | 30 | 0 |
//!
//! Both CRCs have the polynomial 0xEDB88320 reflected, initial value 0 and no final xor.

mod decode;
mod encode;
mod records;
pub mod v2;

pub use decode::decode;
pub use encode::encode;
pub use records::{Damage, ReadError, Records};

use super::fields::Fields;

/// The length of a record's header.
pub const HEADER_LENGTH: usize = 8;
/// The length of the longest record that the format allows.
pub const MAX_LENGTH: usize = HEADER_LENGTH + 4 * 255;
/// The major version, where it stands in the first byte of a record.
const MAJOR: u8 = 3 << 5;
/// The bit of `fields` that is never set.
const RESERVED: u32 = 1 << 31;

/// Why bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// The bytes end within the record.
    #[error("truncated: {found} bytes of at least {needed}")]
    Truncated {
        /// The bytes that there are.
        found: usize,
        /// The bytes that the record has at least.
        needed: usize,
    },
    /// The first byte names another version of the format.
    #[error("major version {}, expected 3", .0 >> 5)]
    Version(u8),
    /// The reserved bytes of the header are not 0.
    #[error("reserved bytes {0:#06x}, expected 0")]
    Reserved(u16),
    /// Fields that the record's minor version does not have.
    #[error("fields {0:#010x}, which its minor version does not have")]
    Fields(u32),
    /// The length in the header is not that of the fields.
    #[error("length {found}, expected {expected} for the fields {fields:#010x}")]
    Length {
        /// Bytes after the header, by the header.
        found: usize,
        /// Bytes after the header, by the fields.
        expected: usize,
        /// The fields.
        fields: u32,
    },
    /// The record is not what was written.
    #[error("CRC {found:#010x}, expected {expected:#010x}")]
    Crc {
        /// The CRC in the record.
        found: u32,
        /// The CRC of its bytes.
        expected: u32,
    },
}

/// The bytes that each field takes, by bit; bits that are unknown here take none.
const SIZES: [u8; 32] = {
    let mut sizes = [0; 32];
    let known = [
        4, 8, 4, 4, 16, 4, 16, 4, 16, 4, 16, 4, 8, 8, 8, 16, 8, 12, 12, // djm's
        4, 8, 16, 4, 4, 4, // further ones
    ];
    let mut bit = 0;
    while bit < known.len() {
        sizes[bit] = known[bit];
        bit += 1;
    }
    sizes[30] = 4;
    sizes
};

/// The bytes that any fields take, by each byte of the header's `fields`: the length of every record is checked.
static SIZES_BY_BYTE: [[u8; 256]; 4] = {
    let mut sums = [[0; 256]; 4];
    let mut index = 0;
    while index < 4 * 256 {
        let (byte, value) = (index / 256, index % 256);
        sums[byte][value] = size((value << (8 * byte)) as u32) as u8;
        index += 1;
    }
    sums
};

const fn size(fields: u32) -> usize {
    let (mut sum, mut bit) = (0, 0);
    while bit < 32 {
        if fields >> bit & 1 == 1 {
            sum += SIZES[bit] as usize;
        }
        bit += 1;
    }
    sum
}

/// The CRC of flowd: that of zlib without its inversions.
fn crc(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(u32::MAX);
    hasher.update(bytes);
    hasher.finalize() ^ u32::MAX
}

/// The header of a record, checked.
struct Header {
    /// The length of the whole record.
    length: usize,
    fields: Fields,
}

impl Header {
    #[inline(always)]
    fn parse(bytes: &[u8]) -> Result<Header, SegmentError> {
        let Some(&[version, words, r0, r1, f0, f1, f2, f3]) = bytes.first_chunk() else {
            return Err(SegmentError::Truncated {
                found: bytes.len(),
                needed: HEADER_LENGTH,
            });
        };
        let (major, minor) = (version & 0xe0, version & 0x1f);
        if major != MAJOR {
            return Err(SegmentError::Version(version));
        }
        if (r0, r1) != (0, 0) {
            return Err(SegmentError::Reserved(u16::from_be_bytes([r0, r1])));
        }
        let fields = u32::from_be_bytes([f0, f1, f2, f3]);
        let impossible = if minor == 0 {
            !Fields::COMPATIBLE.0
        } else {
            RESERVED
        };
        if fields & impossible != 0 {
            return Err(SegmentError::Fields(fields & impossible));
        }
        let found = 4 * usize::from(words);
        let sums = &SIZES_BY_BYTE;
        let expected = usize::from(sums[0][usize::from(f3)])
            + usize::from(sums[1][usize::from(f2)])
            + usize::from(sums[2][usize::from(f1)])
            + usize::from(sums[3][usize::from(f0)]);
        // Fields that are unknown here have an unknown length.
        let is_known = fields & !Fields::ALL.0 == 0 && minor <= 1;
        if found != expected && (is_known || found < expected) {
            return Err(SegmentError::Length {
                found,
                expected,
                fields,
            });
        }
        Ok(Header {
            length: HEADER_LENGTH + found,
            fields: Fields(fields),
        })
    }
}

/// The length of the whole records at the start of `bytes`.
pub fn valid_prefix(bytes: &[u8]) -> usize {
    let mut length = 0;
    while let Ok((_, _, consumed)) = decode(&bytes[length..]) {
        length += consumed;
    }
    length
}

#[cfg(test)]
mod tests;
