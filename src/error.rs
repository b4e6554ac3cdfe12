//! What ends the program early: one line for the operator, and the exit code.

use std::io;
use std::process::ExitCode;

use crate::config;

/// An error that the operator reads.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] config::ConfigError),
    /// A resource could not be had; `what` names it.
    #[error("{what}: {source}")]
    Resource {
        /// The path, socket or name.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// Anything else that went wrong at run time.
    #[error("{0}")]
    Failed(String),
}

/// The result of what can end the program.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// 2 for usage or configuration, 1 for a failure at run time.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Error::Config(_) | Error::Usage(_) => ExitCode::from(2),
            _ => ExitCode::from(1),
        }
    }
}

/// Names the resource that an I/O error is about.
pub trait Context<T> {
    /// `what` is the path, socket or name.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Resource {
            what: what(),
            source: source.into(),
        })
    }
}
