//! flowd-rs: the daemons of SciTags: one marks network flows and packets, the collector receives flow records.
//!
//! Flow events enter through [`plugins`], pass the [`dispatcher`], which owns the table of open
//! flows, and leave through [`backends`]. CONTRIBUTING.md follows one event from file to file.
//! Pure code (codecs, tables, parsers) does no I/O and takes the time as an argument.

pub mod backends;
pub mod cli;
pub mod collector;
pub mod config;
pub mod context;
pub mod control;
pub mod daemon;
pub mod dispatcher;
pub mod enrichers;
pub mod error;
pub mod event;
pub mod firefly;
pub mod flow;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod plugins;
pub mod registry;
pub mod scitag;
pub mod service;
pub mod socket;
pub mod sys;
