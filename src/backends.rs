//! What acts on flow events, one thread each.

pub mod firefly;

use std::sync::Arc;

use crossbeam_channel::Receiver;

use crate::config::Config;
use crate::error::Result;
use crate::flow::FlowEvent;
use crate::metrics::Metrics;

/// A consumer of flow events. Building one acquires every resource it needs.
pub trait Backend: Send {
    /// The name in logs, metrics and threads.
    fn name(&self) -> &'static str;

    /// Runs on its own thread until the channel is closed and drained.
    fn run(self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()>;
}

/// Builds every backend that is configured.
pub fn build(config: &Config, metrics: &Metrics) -> Result<Vec<Box<dyn Backend>>> {
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    if let Some(config) = &config.firefly {
        backends.push(Box::new(firefly::Firefly::new(config, metrics)?));
    }
    Ok(backends)
}
