//! Backends: the consumers of flow events, each on its own thread.

#[cfg(test)]
mod example;
pub mod firefly;
#[cfg(feature = "bpf")]
pub mod marker;
pub mod prometheus;

use std::io;
use std::sync::Arc;

use crossbeam_channel::Receiver;

use crate::backends::firefly::public_addresses::AddressCache;
use crate::config::Config;
use crate::dispatcher::flow_table::FlowTable;
use crate::error::Result;
use crate::event::{FlowEvent, State};
use crate::flow::{Flow, Protocol};
use crate::metrics::Metrics;
use crate::registry::SharedRegistry;
use crate::scitag::Labeller;
use crate::sys::handover::Handover;
use crate::sys::sock_diag::Dump;

/// All extensions of `sock_diag`, as a bit mask.
const ALL_EXTENSIONS: u8 = u8::MAX;

/// A consumer of flow events. Building one acquires every resource it needs.
pub trait Backend: Send {
    /// The name in logs, metrics and threads.
    fn name(&self) -> &'static str;

    /// Takes over the flows that are already open: called once, before [`Backend::run`]. No start event follows for
    /// them.
    fn restore(&mut self, table: &FlowTable) -> Result<()> {
        let _ = table;
        Ok(())
    }

    /// Runs on its own thread until the channel is closed and drained.
    fn run(self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()>;
}

/// What the constructors of the backends need.
pub struct BackendContext<'a> {
    /// The configuration of the whole daemon.
    pub config: &'a Config,
    /// Computes flow labels; `None` without a marker.
    pub labeller: Option<&'a Labeller>,
    /// Names of experiments and activities.
    pub registry: &'a SharedRegistry,
    /// The public addresses of this host found so far.
    pub addresses: &'a AddressCache,
    /// The daemon's counters.
    pub metrics: &'a Metrics,
    /// Whether a successor takes over what this backend would remove when it ends.
    pub handover: Handover,
}

/// Builds the backend of this name, if it is configured.
pub fn build(name: &str, context: BackendContext<'_>) -> Result<Option<Box<dyn Backend>>> {
    let (config, metrics) = (context.config, context.metrics);
    Ok(match name {
        "firefly" => {
            let listener = config.firefly_plugin.as_ref().map(|plugin| plugin.bind);
            let hold_ends = config.flows.end_on_socket_close;
            let build = |settings| {
                firefly::Firefly::new(settings, listener, hold_ends, context.addresses, metrics)
            };
            boxed(config.firefly.as_ref().map(build).transpose()?)
        }
        #[cfg(feature = "bpf")]
        "marker" => {
            let settings = config.marker.as_ref().zip(context.labeller);
            let build = |(settings, labeller)| {
                let max_flows = config.flows.max_flows;
                marker::Marker::new(settings, max_flows, labeller, metrics, context.handover)
            };
            boxed(settings.map(build).transpose()?)
        }
        "prometheus" => {
            #[cfg(feature = "bpf")]
            let marks = config.marker.as_ref().map(marker::read_marks);
            #[cfg(not(feature = "bpf"))]
            let marks = None;
            let build =
                |settings| prometheus::Prometheus::new(settings, context.registry, marks, metrics);
            boxed(config.prometheus.as_ref().map(build).transpose()?)
        }
        _ => None,
    })
}

/// Whether the backend of this name uses socket reports (`ongoing` events). Others do not receive them, as there are
/// many.
pub fn wants_socket_reports(name: &str, config: &Config) -> bool {
    match name {
        "firefly" => {
            let firefly = config.firefly.as_ref();
            firefly.is_some_and(|firefly| firefly.enrichment.is_some() && firefly.ongoing)
        }
        "prometheus" => true,
        _ => false,
    }
}

/// Adds the kernel's socket statistics to an event of a TCP flow with an end on this host; `outgoing` is the flow with
/// that end as its source. `None` for other flows, and if the kernel no longer knows the socket.
fn with_socket(
    event: &FlowEvent,
    outgoing: Option<Flow>,
    sockets: &mut Dump,
) -> io::Result<Option<FlowEvent>> {
    let Some(flow) = outgoing.filter(|flow| flow.protocol == Protocol::Tcp) else {
        return Ok(None);
    };
    let socket = match event.state {
        State::End => sockets.settled_socket(&flow, ALL_EXTENSIONS)?,
        _ => sockets.socket(&flow, ALL_EXTENSIONS)?,
    };
    let socket = socket.filter(|socket| socket.info.was_established());
    Ok(socket.map(|socket| FlowEvent {
        usage: match event.state {
            State::End => socket.info.usage(),
            _ => event.usage,
        },
        netlink: Some(socket),
        ..event.clone()
    }))
}

fn boxed<B: Backend + 'static>(backend: Option<B>) -> Option<Box<dyn Backend>> {
    backend.map(|backend| Box::new(backend) as Box<dyn Backend>)
}
