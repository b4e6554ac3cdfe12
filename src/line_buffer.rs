//! Cuts a stream of bytes into lines, however they were spread over reads. No I/O.

/// The longest line that is kept; a longer one is reported once and skipped to its newline.
pub const MAX_LINE: usize = 1024;

/// A line, or word of one that was too long.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A line without its newline.
    Whole(&'a [u8]),
    /// The beginning of a line longer than [`MAX_LINE`].
    TooLong(&'a [u8]),
}

/// Bytes read and not yet handed out as lines.
pub struct LineBuffer {
    bytes: Box<[u8]>,
    filled: usize,
    skipping: bool,
}

impl LineBuffer {
    /// A buffer that takes `size` bytes a read, more than [`MAX_LINE`].
    pub fn new(size: usize) -> LineBuffer {
        LineBuffer {
            bytes: vec![0; size + MAX_LINE].into_boxed_slice(),
            filled: 0,
            skipping: false,
        }
    }

    /// Where the next read goes; never empty.
    pub fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.filled..]
    }

    /// Takes `read` bytes that were put into [`LineBuffer::space`], and hands out every line that is
    /// now whole.
    pub fn commit(&mut self, read: usize, mut line: impl FnMut(Line<'_>)) {
        let searched = self.filled;
        self.filled += read;
        let mut begin = 0;
        for newline in memchr::memchr_iter(b'\n', &self.bytes[searched..self.filled]) {
            let end = searched + newline;
            let found = &self.bytes[begin..end];
            begin = end + 1;
            if std::mem::take(&mut self.skipping) {
                continue;
            }
            match found.len() {
                0..=MAX_LINE => line(Line::Whole(found)),
                _ => line(Line::TooLong(found)),
            }
        }
        if self.filled - begin > MAX_LINE {
            if !std::mem::replace(&mut self.skipping, true) {
                line(Line::TooLong(&self.bytes[begin..self.filled]));
            }
            begin = self.filled;
        } else if self.skipping {
            begin = self.filled;
        }
        self.bytes.copy_within(begin..self.filled, 0);
        self.filled -= begin;
    }

    /// Whether the beginning of a line waits for its rest.
    pub fn has_partial(&self) -> bool {
        self.filled > 0 || self.skipping
    }

    /// Gives up waiting: what is there is the line.
    pub fn finish(&mut self, mut line: impl FnMut(Line<'_>)) {
        if self.filled > 0 {
            line(Line::Whole(&self.bytes[..self.filled]));
        }
        self.filled = 0;
        self.skipping = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Feeds `input` in pieces and returns the lines, a too long one as `None`.
    fn lines(input: &[u8], pieces: &[usize]) -> Vec<Option<Vec<u8>>> {
        let mut buffer = LineBuffer::new(MAX_LINE + 1);
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
                    Line::Whole(line) => Some(line.to_vec()),
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

    /// The same by definition: split on newlines.
    fn expected(input: &[u8]) -> Vec<Option<Vec<u8>>> {
        let mut lines: Vec<_> = input
            .split(|&b| b == b'\n')
            .map(|line| (line.len() <= MAX_LINE).then(|| line.to_vec()))
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
    fn a_line_too_long_is_one_report_and_the_next_one_is_whole() {
        let mut input = vec![b'x'; 64 * 1024];
        input.extend_from_slice(b"\ngood\n");
        assert_eq!(lines(&input, &[777]), vec![None, Some(b"good".to_vec())]);
    }

    proptest! {
        #[test]
        fn any_stream_in_any_pieces_is_the_same_lines(
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
