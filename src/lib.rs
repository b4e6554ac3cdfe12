//! flowd-rs: a daemon for SciTags network flow and packet marking.
//!
//! Flow events come in through [`plugins`], pass the [`dispatcher`], which owns the table of open
//! flows, and go out to [`backends`]. The pure parts (codecs, tables, parsers) do no I/O and take the
//! time as an argument.

pub mod backends;
pub mod cli;
pub mod config;
pub mod connections;
pub mod control;
pub mod daemon;
pub mod dispatcher;
pub mod echo;
pub mod enrichers;
pub mod enrichment;
pub mod error;
pub mod exposition;
pub mod firefly;
pub mod flow;
pub mod flow_table;
pub mod http;
pub mod journal;
pub mod line_buffer;
pub mod log_limit;
pub mod logging;
pub mod metrics;
pub mod nearest;
pub mod pipe_line;
pub mod plugins;
pub mod public_addresses;
pub mod queue;
pub mod recent;
pub mod registry;
pub mod routes;
pub mod scitag;
pub mod socket;
pub mod special_networks;
pub mod sys;
