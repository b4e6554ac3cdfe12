//! Takes the body of a request out of what arrives, each byte once. No I/O.

use super::message::{Framing, MAX_BODY_BYTES, Refusal, TOO_LARGE, refusal};

/// The longest line with the size of a chunk and its extensions, in bytes.
const MAX_SIZE_LINE: usize = 256;
/// The longest trailers, in bytes.
const MAX_TRAILER_BYTES: usize = 8 << 10;
/// The longest chunked body with the sizes of its chunks, in bytes.
const MAX_CHUNKED_BYTES: usize = 2 * MAX_BODY_BYTES;

const MALFORMED: Refusal = refusal(400, "the chunked body is malformed");
const TRAILERS_TOO_LONG: Refusal = refusal(431, "the trailers exceed 8192 bytes");

/// A body that arrives.
#[derive(Debug)]
pub struct BodyReader {
    body: Vec<u8>,
    expected: Expected,
    is_chunked: bool,
    /// Bytes taken so far, with the sizes of chunks.
    taken: usize,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// So many bytes of the body, or of a chunk.
    Data(usize),
    /// The line end after a chunk.
    ChunkEnd,
    /// The line with the size of a chunk.
    Size,
    Trailers {
        /// Bytes of all trailers so far.
        total: usize,
        /// Bytes of the current line so far.
        line: usize,
        /// The last byte was a carriage return.
        return_seen: bool,
    },
    Nothing,
}

impl BodyReader {
    pub fn new(framing: Framing) -> BodyReader {
        let (expected, is_chunked) = match framing {
            Framing::Length(0) => (Expected::Nothing, false),
            Framing::Length(length) => (Expected::Data(length), false),
            Framing::Chunked => (Expected::Size, true),
        };
        BodyReader {
            body: Vec::new(),
            expected,
            is_chunked,
            taken: 0,
        }
    }

    pub fn is_complete(&self) -> bool {
        self.expected == Expected::Nothing
    }

    /// The body, once it is complete.
    pub fn into_body(self) -> Vec<u8> {
        self.body
    }

    /// The size of the buffer, in bytes.
    pub fn buffered_bytes(&self) -> usize {
        self.body.capacity()
    }

    /// Takes what belongs to the body from the beginning of `input`, and returns its length in bytes. Only an
    /// incomplete line with the size of a chunk is left, to be given again with more.
    pub fn take(&mut self, input: &[u8]) -> Result<usize, Refusal> {
        let mut at = 0;
        while self.expected != Expected::Nothing {
            let taken = self.step(&input[at..])?;
            if taken == 0 {
                break;
            }
            at += taken;
            self.taken += taken;
            if self.is_chunked && self.taken > MAX_CHUNKED_BYTES {
                return Err(TOO_LARGE);
            }
        }
        Ok(at)
    }

    /// Takes the next piece, and returns its length; 0 if there is not enough input.
    fn step(&mut self, input: &[u8]) -> Result<usize, Refusal> {
        match self.expected {
            Expected::Data(rest) => {
                let taken = rest.min(input.len());
                self.body.extend_from_slice(&input[..taken]);
                self.expected = match (rest - taken, self.is_chunked) {
                    (0, true) => Expected::ChunkEnd,
                    (0, false) => Expected::Nothing,
                    (rest, _) => Expected::Data(rest),
                };
                Ok(taken)
            }
            Expected::ChunkEnd => match input {
                [b'\r', b'\n', ..] => {
                    self.expected = Expected::Size;
                    Ok(2)
                }
                [] | [b'\r'] => Ok(0),
                _ => Err(MALFORMED),
            },
            Expected::Size => match httparse::parse_chunk_size(input) {
                Ok(httparse::Status::Complete((length, size))) if length <= MAX_SIZE_LINE => {
                    self.expected = match usize::try_from(size) {
                        Ok(0) => Expected::Trailers {
                            total: 0,
                            line: 0,
                            return_seen: false,
                        },
                        Ok(size) if size <= MAX_BODY_BYTES - self.body.len() => {
                            Expected::Data(size)
                        }
                        _ => return Err(TOO_LARGE),
                    };
                    Ok(length)
                }
                Ok(httparse::Status::Partial) if input.len() < MAX_SIZE_LINE => Ok(0),
                _ => Err(MALFORMED),
            },
            Expected::Trailers { .. } => self.skip_trailers(input),
            Expected::Nothing => Ok(0),
        }
    }

    /// Trailers end with an empty line. Nothing is done with them.
    fn skip_trailers(&mut self, input: &[u8]) -> Result<usize, Refusal> {
        let Expected::Trailers {
            mut total,
            mut line,
            mut return_seen,
        } = self.expected
        else {
            return Ok(0);
        };
        for (at, byte) in input.iter().enumerate() {
            total += 1;
            match (byte, return_seen) {
                (b'\n', true) if line == 0 => {
                    self.expected = Expected::Nothing;
                    return Ok(at + 1);
                }
                (b'\n', true) => (line, return_seen) = (0, false),
                (b'\r', false) => return_seen = true,
                (b'\n' | b'\r', _) | (_, true) => return Err(MALFORMED),
                _ => line += 1,
            }
            if total > MAX_TRAILER_BYTES {
                return Err(TRAILERS_TOO_LONG);
            }
        }
        self.expected = Expected::Trailers {
            total,
            line,
            return_seen,
        };
        Ok(input.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CHUNKED: &[u8] = b"5;x=y\r\nhello\r\n1\r\n!\r\n0\r\nTrailer: x\r\n\r\nGET";

    /// Reads the pieces as they would arrive; returns the body, if it is complete, and the rest.
    fn read(framing: Framing, pieces: &[&[u8]]) -> Result<(Option<Vec<u8>>, Vec<u8>), Refusal> {
        let (mut reader, mut input) = (BodyReader::new(framing), Vec::new());
        for piece in pieces {
            input.extend_from_slice(piece);
            let taken = reader.take(&input)?;
            input.drain(..taken);
            // Nothing else is kept to be parsed again.
            assert!(reader.is_complete() || input.len() < MAX_SIZE_LINE);
        }
        let body = reader.is_complete().then(|| reader.into_body());
        Ok((body, input))
    }

    fn status(input: &[u8]) -> u16 {
        read(Framing::Chunked, &[input]).unwrap_err().status
    }

    #[test]
    fn a_body_is_the_same_in_whatever_pieces_it_arrives() {
        for (framing, input, body) in [
            (Framing::Chunked, CHUNKED, b"hello!".as_slice()),
            (Framing::Length(5), b"helloGET", b"hello"),
            (Framing::Length(0), b"GET", b""),
        ] {
            let expected = Ok((Some(body.to_vec()), b"GET".to_vec()));
            for cut in 0..=input.len() {
                let (first, second) = input.split_at(cut);
                assert_eq!(read(framing, &[first, second]), expected, "{cut}");
            }
            let single: Vec<&[u8]> = input.chunks(1).collect();
            assert_eq!(read(framing, &single), expected);
        }
        let (incomplete, _) = read(Framing::Chunked, &[&CHUNKED[..CHUNKED.len() - 4]]).unwrap();
        assert_eq!(incomplete, None);
    }

    #[test]
    fn chunked_bodies_that_are_malformed_or_too_long_are_refused() {
        for malformed in [
            b"zz\r\n".as_slice(),
            b"1\r\nab\r\n",
            b"1\r\na\n",
            b"0\r\na\n\r\n",
            b"0\r\n\n",
            b"0\r\na\rb\r\n",
        ] {
            assert_eq!(status(malformed), 400, "{}", malformed.escape_ascii());
        }
        let extension = format!("1;{}", "x".repeat(MAX_SIZE_LINE));
        assert_eq!(status(extension.as_bytes()), 400);
        assert_eq!(status(b"200000\r\n"), 413);
        assert_eq!(status(b"ffffffffffffffff\r\n"), 413);
        assert_eq!(status(&b"1\r\nx\r\n".repeat(MAX_BODY_BYTES)), 413);
    }

    #[test]
    fn trailers_are_bounded() {
        let trailers = |lines| [b"0\r\n".to_vec(), b"a: b\r\n".repeat(lines)].concat();
        let short = [trailers(1000), b"\r\n".to_vec()].concat();
        assert!(read(Framing::Chunked, &[&short]).unwrap().0.is_some());
        assert_eq!(status(&trailers(MAX_TRAILER_BYTES)), 431);
        assert_eq!(
            status(&[b"0\r\n".to_vec(), b"x".repeat(MAX_TRAILER_BYTES + 1)].concat()),
            431
        );
    }

    proptest! {
        #[test]
        fn no_input_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), size in 1_usize..50) {
            let pieces: Vec<&[u8]> = bytes.chunks(size).collect();
            let in_pieces = read(Framing::Chunked, &pieces);
            if let Ok((Some(body), _)) = read(Framing::Chunked, &[&bytes]) {
                prop_assert_eq!(in_pieces.unwrap().0, Some(body));
            }
        }
    }
}
