//! Splits a stream of bytes into lines, however the reads cut it. No I/O.

/// The longest accepted line, in bytes without the newline. A longer one is reported once and skipped to its newline.
pub const MAX_LINE_LENGTH: usize = 1024;

/// A line, or the beginning of one that is too long.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A line without its newline.
    Complete(&'a [u8]),
    /// The beginning of a line longer than [`MAX_LINE_LENGTH`].
    TooLong(&'a [u8]),
}

/// Holds the bytes that were read and not yet returned as lines.
pub struct LineBuffer {
    bytes: Box<[u8]>,
    /// The number of bytes in use.
    filled: usize,
    /// Whether the rest of a line that is too long is skipped.
    skipping: bool,
}

impl LineBuffer {
    /// A buffer for reads of at least `size` bytes, which must be more than [`MAX_LINE_LENGTH`].
    pub fn new(size: usize) -> LineBuffer {
        LineBuffer {
            bytes: vec![0; size + MAX_LINE_LENGTH].into_boxed_slice(),
            filled: 0,
            skipping: false,
        }
    }

    /// The space for the next read, which is never empty.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// Adds `read` bytes that were written to [`LineBuffer::space`], and passes every line that is now complete to
    /// `emit`.
    pub fn commit(&mut self, read: usize, mut emit: impl FnMut(Line<'_>)) {
        let searched = self.filled;
        self.filled += read;
        let mut begin = 0;
        for newline in memchr::memchr_iter(b'\n', &self.bytes[searched..self.filled]) {
            let end = searched + newline;
            let line = &self.bytes[begin..end];
            begin = end + 1;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            match line.len() {
                0..=MAX_LINE_LENGTH => emit(Line::Complete(line)),
                _ => emit(Line::TooLong(line)),
            }
        }
        if self.filled - begin > MAX_LINE_LENGTH {
            if !std::mem::replace(&mut self.skipping, true) {
                emit(Line::TooLong(&self.bytes[begin..self.filled]));
            }
            begin = self.filled;
        } else if self.skipping {
            begin = self.filled;
        }
        self.bytes.copy_within(begin..self.filled, 0);
        self.filled -= begin;
    }

    /// Whether the buffer holds, or skips, a line whose newline has not been read yet.
    pub fn has_partial(&self) -> bool {
        self.filled > 0 || self.skipping
    }

    /// Passes a partial line to `emit` as a complete one, because no more bytes are expected.
    pub fn finish(&mut self, mut emit: impl FnMut(Line<'_>)) {
        if self.filled > 0 {
            emit(Line::Complete(&self.bytes[..self.filled]));
        }
        self.filled = 0;
        self.skipping = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `input` in pieces and returns the lines, with `None` for one that is too long.
    fn lines(input: &[u8], pieces: &[usize]) -> Vec<Option<Vec<u8>>> {
        let mut buffer = LineBuffer::new(MAX_LINE_LENGTH + 1);
        let mut out = Vec::new();
        let mut rest = input;
        let mut pieces = pieces.iter().cycle();
        while !rest.is_empty() {
            let space = buffer.space();
            let n = (*pieces.next().unwrap()).clamp(1, rest.len().min(space.len()));
            space[..n].copy_from_slice(&rest[..n]);
            rest = &rest[n..];
            let mut keep = |line: Line<'_>| {
                out.push(match line {
                    Line::Complete(line) => Some(line.to_vec()),
                    Line::TooLong(_) => None,
                });
            };
            buffer.commit(n, &mut keep);
            if rest.is_empty() {
                buffer.finish(keep);
            }
        }
        out
    }

    /// The expected result of [`lines`]: `input` split on newlines.
    fn expected(input: &[u8]) -> Vec<Option<Vec<u8>>> {
        let mut lines: Vec<_> = input
            .split(|&b| b == b'\n')
            .map(|line| (line.len() <= MAX_LINE_LENGTH).then(|| line.to_vec()))
            .collect();
        if input.last() == Some(&b'\n') || lines.last() == Some(&Some(Vec::new())) {
            lines.pop();
        }
        lines
    }

    #[test]
    fn a_line_split_at_every_byte() {
        let input = b"first line\nsecond\n\nlast";
        for at in 1..input.len() {
            assert_eq!(lines(input, &[at, input.len()]), expected(input));
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_reported_once_and_the_next_one_is_complete() {
        let mut input = vec![b'x'; 64 * 1024];
        input.extend_from_slice(b"\ngood\n");
        assert_eq!(lines(&input, &[777]), vec![None, Some(b"good".to_vec())]);
    }

    proptest! {
        #[test]
        fn any_stream_gives_the_same_lines_in_any_pieces(
            parts in proptest::collection::vec((0usize..1500, any::<bool>()), 1..12),
            pieces in proptest::collection::vec(1usize..2000, 1..9),
        ) {
            let mut input = Vec::new();
            for (length, newline) in parts {
                input.extend(std::iter::repeat_n(b'a' + (length % 26) as u8, length));
                if newline { input.push(b'\n'); }
            }
            prop_assert_eq!(lines(&input, &pieces), expected(&input));
        }
    }
}
