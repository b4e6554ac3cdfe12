//! The filter: rules in the language of djm's flowd decide which flow records are stored, and with which tag. No I/O.
//!
//! [`lexer`] cuts a text into words and expands macros, [`grammar`] reads [`rule`]s, [`compile`] turns them into checks,
//! and [`evaluate`] applies these to records.

pub mod compile;
pub mod evaluate;
pub mod grammar;
pub mod lexer;
pub mod rule;
#[cfg(test)]
mod tests;

pub use compile::{CompileError, Filter, Where};
pub use evaluate::{Counts, LocalClock, RuleCounts, Verdict};
pub use grammar::{Rules, parse_rules};
pub use lexer::{Macros, ParseError};
pub use rule::Rule;
