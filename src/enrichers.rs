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
use crate::plugins::Plugin;
use crate::routes::Sources;

/// Builds every enricher that is configured. Seen from the dispatcher they are plugins.
pub fn build(config: &Config, sources: &Sources) -> Result<Vec<Box<dyn Plugin>>> {
    let mut enrichers: Vec<Box<dyn Plugin>> = Vec::new();
    if let Some(sockets) = sockets::Sockets::new(config, sources)? {
        enrichers.push(Box::new(sockets));
    }
    #[cfg(feature = "bpf")]
    if let Some(settings) = &config.skops_enricher {
        let skops = skops::SkopsEnricher::new(settings, &sources.metrics)?;
        enrichers.push(Box::new(skops));
    }
    Ok(enrichers)
}
