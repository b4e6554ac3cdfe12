//! Where records go.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write, stdout};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::input::Input;
use crate::error::{Context, Error, Result};

/// Output is written in pieces of this size.
const BUFFER_SIZE: usize = 256 << 10;

/// Where output goes, through one buffer.
pub struct Output {
    name: String,
    file: Box<dyn Write>,
    pub buffer: Vec<u8>,
}

impl Output {
    fn new(name: &str, file: Box<dyn Write>) -> Output {
        Output {
            name: name.to_owned(),
            file,
            buffer: Vec::with_capacity(BUFFER_SIZE + (4 << 10)),
        }
    }

    pub fn standard() -> Output {
        Output::new("standard output", Box::new(stdout()))
    }

    /// Opens the file for copies of records.
    pub fn copy(path: &Path, inputs: &[Input]) -> Result<Output> {
        if path == Path::new("-") {
            if stdout().is_terminal() {
                return Err(Error::Usage(
                    "-o -: standard output is a terminal, and records are not text".to_owned(),
                ));
            }
            return Ok(Output::standard());
        }
        let name = path.display().to_string();
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(path);
        let file: File = file.context(|| name.clone())?;
        // Its own output would be read for ever.
        let metadata = file.metadata().context(|| name.clone())?;
        let is_same = |input: &&Input| {
            let input = input.path.metadata();
            input.is_ok_and(|input| (input.dev(), input.ino()) == (metadata.dev(), metadata.ino()))
        };
        if metadata.is_file() && inputs.iter().any(|input| is_same(&input)) {
            return Err(Error::Usage(format!(
                "-o {name}: this file is read as well"
            )));
        }
        Ok(Output::new(&name, Box::new(file)))
    }

    pub fn is_full(&self) -> bool {
        self.buffer.len() >= BUFFER_SIZE
    }

    pub fn flush(&mut self) -> Result<()> {
        let result = self.file.write_all(&self.buffer);
        self.buffer.clear();
        let result = result.and_then(|()| self.file.flush());
        result.context(|| self.name.clone())
    }
}
