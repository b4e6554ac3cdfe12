//! Plugins: the sources of flow events, each on its own thread.

pub mod api;
pub mod connections;
#[cfg(test)]
mod example;
pub mod firefly;
#[cfg(feature = "bpf")]
pub mod iperf3;
pub mod named_pipe;
pub mod perfsonar;

use std::os::fd::OwnedFd;

use crossbeam_channel::Sender;
use jiff::Timestamp;
use prometheus::IntCounter;

use crate::config::Config;
use crate::context::DaemonContext;
use crate::dispatcher::queue::{Pushed, push};
use crate::error::Result;
use crate::event::{FlowEvent, State};
use crate::metrics::Metrics;
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;

/// A source of flow events. Its constructor acquires every resource that it needs (socket, pipe, eBPF program), so that
/// a bad configuration or a missing privilege is an error before the daemon reports that it is ready.
pub trait Plugin: Send {
    /// The name in the configuration, in logs and metrics, and of the thread.
    fn name(&self) -> &'static str;

    /// Runs on its own thread until `stop` is set. Dropping `events` signals that no more events follow.
    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()>;
}

/// Builds the plugin of this name, if it is configured. `inherited` is the socket that its predecessor left in the
/// [`Handover`].
pub fn build(
    name: &str,
    config: &Config,
    context: &DaemonContext,
    handover: Handover,
    inherited: Option<OwnedFd>,
) -> Result<Option<Box<dyn Plugin>>> {
    let (registry, metrics) = (&context.registry, &context.metrics);
    Ok(match name {
        "namedPipe" => {
            let build = |pipe| named_pipe::NamedPipe::new(pipe, registry, metrics, handover);
            boxed(config.named_pipe.as_ref().map(build).transpose()?)
        }
        "firefly" => {
            let build = |firefly| firefly::Firefly::new(firefly, metrics, handover, inherited);
            boxed(config.firefly_plugin.as_ref().map(build).transpose()?)
        }
        "api" => {
            let build = |api| api::Api::new(api, context.clone(), handover, inherited);
            boxed(config.api.as_ref().map(build).transpose()?)
        }
        "netlink" => {
            let build = |netlink| connections::netlink::Netlink::new(netlink, context);
            boxed(config.netlink.as_ref().map(build).transpose()?)
        }
        "netstat" => {
            let build = |netstat| connections::netstat::Netstat::new(netstat, metrics);
            boxed(config.netstat.as_ref().map(build).transpose()?)
        }
        #[cfg(feature = "bpf")]
        "iperf3" => {
            let build = |iperf3| iperf3::Iperf3::new(iperf3, metrics);
            boxed(config.iperf3.as_ref().map(build).transpose()?)
        }
        "perfsonar" => boxed(
            config
                .perfsonar
                .map(perfsonar::Perfsonar::new)
                .transpose()?,
        ),
        _ => None,
    })
}

/// Boxes a plugin as the trait object that the daemon runs.
pub fn boxed<P: Plugin + 'static>(plugin: Option<P>) -> Option<Box<dyn Plugin>> {
    plugin.map(|plugin| Box::new(plugin) as Box<dyn Plugin>)
}

/// The current time in whole microseconds, the resolution of fireflies and of the journal.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// Sends flow events to the dispatcher, over a bounded channel.
#[derive(Clone)]
pub struct EventSender {
    channel: Sender<FlowEvent>,
    ongoing_dropped: IntCounter,
}

/// The dispatcher has ended: the daemon is stopping.
#[derive(Debug)]
pub struct Closed;

impl EventSender {
    /// A sender into `channel`. Counts the events that it drops in `metrics`.
    pub fn new(channel: Sender<FlowEvent>, metrics: &Metrics) -> EventSender {
        EventSender {
            channel,
            ongoing_dropped: metrics.ongoing_dropped.clone(),
        }
    }

    /// Sends an event. A start or an end waits for room in the channel; an `ongoing` event that finds the channel full
    /// is dropped and counted.
    pub fn send(&self, event: FlowEvent) -> std::result::Result<(), Closed> {
        self.push(event.state, event)
    }

    /// Sends an event and always waits for room, also with an `ongoing` event. For threads with nothing else to do
    /// meanwhile.
    pub fn send_blocking(&self, event: FlowEvent) -> std::result::Result<(), Closed> {
        self.push(State::End, event)
    }

    fn push(&self, priority: State, event: FlowEvent) -> std::result::Result<(), Closed> {
        match push(&self.channel, priority, event) {
            Pushed::Done => Ok(()),
            Pushed::Dropped => {
                self.ongoing_dropped.inc();
                Ok(())
            }
            Pushed::Closed => Err(Closed),
        }
    }
}
