//! What acts on flow events, one thread each.

pub mod firefly;
#[cfg(feature = "bpf")]
pub mod marker;
pub mod prometheus;

use std::io;
use std::sync::Arc;

use crossbeam_channel::Receiver;

use crate::config::Config;
use crate::error::Result;
use crate::flow::{FlowEvent, Protocol, State};
use crate::flow_table::FlowTable;
use crate::metrics::Metrics;
use crate::public_addresses::Known;
use crate::registry::Handle;
use crate::scitag::Labeller;
use crate::sys::handover::Handover;
use crate::sys::interfaces::LocalAddresses;
use crate::sys::sock_diag::Dump;

/// Every extension of `sock_diag`.
const ALL: u8 = u8::MAX;

/// A consumer of flow events. Building one acquires every resource it needs.
pub trait Backend: Send {
    /// The name in logs, metrics and threads.
    fn name(&self) -> &'static str;

    /// Told once, before it runs, which flows are open from before. For these no start will come.
    fn restore(&mut self, table: &FlowTable) -> Result<()> {
        let _ = table;
        Ok(())
    }

    /// Runs on its own thread until the channel is closed and drained.
    fn run(self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()>;
}

/// What a backend is built with.
pub struct Means<'a> {
    /// The settings of the whole daemon.
    pub config: &'a Config,
    /// Labels of packets, where there is a marker.
    pub labeller: Option<&'a Labeller>,
    /// Names of tags.
    pub registry: &'a Handle,
    /// Public addresses of this host that were found before.
    pub public: &'a Known,
    /// Counters.
    pub metrics: &'a Metrics,
    /// Whether another takes over.
    pub handover: Handover,
}

/// Builds the backend of this name, if it is configured.
pub fn build(name: &str, means: Means<'_>) -> Result<Option<Box<dyn Backend>>> {
    let (config, metrics) = (means.config, means.metrics);
    Ok(match name {
        "firefly" => {
            let listener = config.firefly_plugin.as_ref().map(|plugin| plugin.bind);
            let watched = config.flows.end_on_socket_close;
            let build = |settings| {
                firefly::Firefly::new(settings, listener, watched, means.public, metrics)
            };
            boxed(config.firefly.as_ref().map(build).transpose()?)
        }
        #[cfg(feature = "bpf")]
        "marker" => {
            let settings = config.marker.as_ref().zip(means.labeller);
            let build = |(settings, labeller)| {
                let max_flows = config.flows.max_flows;
                marker::Marker::new(settings, max_flows, labeller, metrics, means.handover)
            };
            boxed(settings.map(build).transpose()?)
        }
        "prometheus" => {
            #[cfg(feature = "bpf")]
            let marks = config.marker.as_ref().map(marker::read_marks);
            #[cfg(not(feature = "bpf"))]
            let marks = None;
            let build =
                |settings| prometheus::Prometheus::new(settings, means.registry, marks, metrics);
            boxed(config.prometheus.as_ref().map(build).transpose()?)
        }
        _ => None,
    })
}

/// Whether the backend of this name has a use for news of sockets: there is much of it.
pub fn wants_news(name: &str, config: &Config) -> bool {
    match name {
        "firefly" => {
            let firefly = config.firefly.as_ref();
            firefly.is_some_and(|firefly| firefly.enrichment.is_some() && firefly.ongoing)
        }
        "prometheus" => true,
        _ => false,
    }
}

/// An event of a TCP flow with an end here, with what the kernel knows of its socket, if it still does.
fn with_socket(
    event: &FlowEvent,
    local: &LocalAddresses,
    sockets: &mut Dump,
) -> io::Result<Option<FlowEvent>> {
    let outgoing = local.outgoing(&event.flow);
    let Some(flow) = outgoing.filter(|flow| flow.protocol == Protocol::Tcp) else {
        return Ok(None);
    };
    let socket = sockets.socket(&flow, ALL)?;
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
