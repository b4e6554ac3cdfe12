//! Enrichers: report the kernel's statistics of the sockets of open flows as flow events, each on its own thread.
//!
//! An enricher reports sockets whether or not they belong to open flows: the dispatcher, which owns the table of open
//! flows, drops the others. So enrichers need no messages from the dispatcher, and no cycle of queues can block.

pub mod netlink;
#[cfg(feature = "bpf")]
pub mod skops;

use crate::config::Config;
use crate::context::DaemonContext;
use crate::error::Result;
use crate::plugins::{Plugin, boxed};

/// Builds the enricher of this name, if it is configured. To the dispatcher it is a plugin.
pub fn build(
    name: &str,
    config: &Config,
    context: &DaemonContext,
) -> Result<Option<Box<dyn Plugin>>> {
    Ok(match name {
        "netlink" => boxed(netlink::Netlink::new(config, context)?),
        #[cfg(feature = "bpf")]
        "skops" => {
            let build = |settings| skops::SkopsEnricher::new(settings, &context.metrics);
            boxed(config.skops_enricher.as_ref().map(build).transpose()?)
        }
        _ => None,
    })
}
