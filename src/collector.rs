//! The collector: receives NetFlow and IPFIX, filters the flow records, and stores them.
//!
//! The rooms stand in the order in which a record walks through them: a datagram is decoded to [`record`]s, filtered, and
//! written to segments.

pub mod config;
pub mod decode;
pub mod exporters;
pub mod filter;
pub mod record;
pub mod store;
