//! What the kernel knows of the sockets of open flows, as events, one thread each.
//!
//! An enricher tells of sockets whether or not they are those of open flows: the dispatcher, which owns
//! the table, drops what is not. So nothing flows back to an enricher, and nothing can block in a
//! circle.

#[cfg(feature = "bpf")]
pub mod skops;
pub mod sockets;

use crate::config::Config;
use crate::error::Result;
use crate::plugins::{Plugin, boxed};
use crate::routes::Sources;

/// Builds the enricher of this name, if it is configured. Seen from the dispatcher it is a plugin.
pub fn build(name: &str, config: &Config, sources: &Sources) -> Result<Option<Box<dyn Plugin>>> {
    Ok(match name {
        "sockets" => boxed(sockets::Sockets::new(config, sources)?),
        #[cfg(feature = "bpf")]
        "skops" => {
            let build = |settings| skops::SkopsEnricher::new(settings, &sources.metrics);
            boxed(config.skops_enricher.as_ref().map(build).transpose()?)
        }
        _ => None,
    })
}
