//! What acts on flow events, one thread each.

pub mod firefly;
#[cfg(feature = "bpf")]
pub mod marker;
pub mod prometheus;

use std::sync::Arc;

use crossbeam_channel::Receiver;

use crate::config::Config;
use crate::error::Result;
use crate::flow::FlowEvent;
use crate::flow_table::FlowTable;
use crate::metrics::Metrics;
use crate::registry::Handle;
use crate::scitag::Labeller;

/// A consumer of flow events. Building one acquires every resource it needs.
pub trait Backend: Send {
    /// The name in logs, metrics and threads.
    fn name(&self) -> &'static str;

    /// Told once, before it runs, which flows are open from before. For these no start will come.
    fn restore(&mut self, table: &FlowTable) -> Result<()> {
        let _ = table;
        Ok(())
    }

    /// Whether it has a use for news of sockets: there is much of it.
    fn wants_news(&self) -> bool {
        false
    }

    /// Runs on its own thread until the channel is closed and drained.
    fn run(self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()>;
}

/// Builds every backend that is configured.
pub fn build(
    config: &Config,
    labeller: Option<&Labeller>,
    registry: &Handle,
    metrics: &Metrics,
) -> Result<Vec<Box<dyn Backend>>> {
    let mut backends: Vec<Box<dyn Backend>> = Vec::new();
    let listener = config.firefly_plugin.as_ref().map(|plugin| plugin.bind);
    if let Some(firefly) = &config.firefly {
        backends.push(Box::new(firefly::Firefly::new(firefly, listener, metrics)?));
    }
    #[cfg(not(feature = "bpf"))]
    let (_, marks) = (labeller, None);
    #[cfg(feature = "bpf")]
    let mut marks = None;
    #[cfg(feature = "bpf")]
    if let (Some(marker), Some(labeller)) = (&config.marker, labeller) {
        backends.push(Box::new(marker::Marker::new(
            marker,
            config.flows.max_flows,
            labeller,
            metrics,
        )?));
        marks = marker::read_marks(marker)?;
    }
    if let Some(config) = &config.prometheus {
        let prometheus = prometheus::Prometheus::new(config, registry, marks, metrics)?;
        backends.push(Box::new(prometheus));
    }
    Ok(backends)
}
