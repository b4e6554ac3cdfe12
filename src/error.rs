//! Errors that end the program: one line for the operator, and the exit code.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// An error for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file, socket or other resource could not be used.
    #[error("{resource}: {source}")]
    Resource {
        /// The path, socket or name.
        resource: String,
        /// The error of the system call.
        source: io::Error,
    },
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// Any other failure at run time.
    #[error("{0}")]
    Failed(String),
}

/// A configuration error: where it is, what is wrong and what was expected.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// Line and column, from 1.
    pub place: Option<(usize, usize)>,
    /// The key as a dotted path, `plugins.api.bindPort`; empty if the error is about the whole file.
    pub key: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// The text of the line at `place`.
    pub line: Option<String>,
}

impl ConfigError {
    /// The line with a caret below the column; empty without a place.
    pub fn excerpt(&self) -> String {
        let (Some((number, column)), Some(line)) = (self.place, &self.line) else {
            return String::new();
        };
        // Tabs are kept, so that the caret lines up.
        let before = line.chars().take(column - 1);
        let indent: String = before.map(|c| if c == '\t' { c } else { ' ' }).collect();
        let shown = |c: char| {
            if c.is_control() && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        };
        let line: String = line.chars().map(shown).collect();
        format!("{number:>5} | {line}\n      | {indent}^\n")
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.path.display())?;
        if let Some((line, column)) = self.place {
            write!(f, "{line}:{column}:")?;
        }
        if !self.key.is_empty() {
            // Control characters in a key must not reach the terminal.
            let key = self.key.chars().flat_map(|c| match c.is_control() {
                true => c.escape_default().collect::<Vec<_>>(),
                false => vec![c],
            });
            write!(f, " {}:", key.collect::<String>())?;
        }
        write!(f, " {}", self.message)
    }
}

/// The result of a function whose error ends the program.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// 2 for an error in the command line or the configuration, 1 for a failure at run time.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Error::Config(_) | Error::Usage(_) => ExitCode::from(2),
            _ => ExitCode::from(1),
        }
    }
}

/// Names the resource that an I/O error is about.
pub trait Context<T> {
    /// `resource` is the path, socket or name.
    fn context(self, resource: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, resource: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Resource {
            resource: resource(),
            source: source.into(),
        })
    }
}
