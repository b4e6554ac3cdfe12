//! Sources of flow events, one thread each.

pub mod api;
pub mod firefly;
#[cfg(feature = "bpf")]
pub mod iperf3;
pub mod named_pipe;
pub mod netlink;
pub mod netstat;
pub mod perfsonar;

use std::os::fd::OwnedFd;

use crossbeam_channel::Sender;
use jiff::Timestamp;
use prometheus::IntCounter;

use crate::config::Config;
use crate::error::Result;
use crate::flow::{FlowEvent, State};
use crate::metrics::Metrics;
use crate::queue::{Pushed, push};
use crate::routes::Sources;
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;

/// A source of flow events. Building one acquires every resource it needs (socket, pipe, BPF program),
/// so that a bad configuration or a missing privilege is an error before the daemon says it is ready.
pub trait Plugin: Send {
    /// The name in logs, metrics and threads.
    fn name(&self) -> &'static str;

    /// Runs on its own thread until `stop` is set; dropping `events` is how it says it is done.
    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()>;
}

/// Builds the plugin of this name, if it is configured. `inherited` is what the one before it has left.
pub fn build(
    name: &str,
    config: &Config,
    sources: &Sources,
    handover: Handover,
    inherited: Option<OwnedFd>,
) -> Result<Option<Box<dyn Plugin>>> {
    let (registry, metrics) = (&sources.registry, &sources.metrics);
    Ok(match name {
        "named_pipe" => {
            let build = |pipe| named_pipe::NamedPipe::new(pipe, registry, metrics, handover);
            boxed(config.named_pipe.as_ref().map(build).transpose()?)
        }
        "firefly" => {
            let build = |firefly| firefly::Firefly::new(firefly, metrics, handover, inherited);
            boxed(config.firefly_plugin.as_ref().map(build).transpose()?)
        }
        "api" => {
            let build = |api| api::Api::new(api, sources.clone(), handover, inherited);
            boxed(config.api.as_ref().map(build).transpose()?)
        }
        "netlink" => {
            let build = |netlink| netlink::Netlink::new(netlink, sources);
            boxed(config.netlink.as_ref().map(build).transpose()?)
        }
        "netstat" => {
            let build = |netstat| netstat::Netstat::new(netstat, metrics);
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

/// As the trait object that the daemon runs.
pub fn boxed<P: Plugin + 'static>(plugin: Option<P>) -> Option<Box<dyn Plugin>> {
    plugin.map(|plugin| Box::new(plugin) as Box<dyn Plugin>)
}

/// The time to the microsecond, which is what a firefly and the journal keep.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

/// The way to the dispatcher. The channel behind it is bounded.
#[derive(Clone)]
pub struct EventSender {
    channel: Sender<FlowEvent>,
    ongoing_dropped: IntCounter,
}

/// The dispatcher has ended: the daemon is going down.
#[derive(Debug)]
pub struct Closed;

impl EventSender {
    /// Events go into `channel`.
    pub fn new(channel: Sender<FlowEvent>, metrics: &Metrics) -> EventSender {
        EventSender {
            channel,
            ongoing_dropped: metrics.ongoing_dropped.clone(),
        }
    }

    /// Waits for room with a start or an end; drops and counts news that does not fit.
    pub fn send(&self, event: FlowEvent) -> std::result::Result<(), Closed> {
        self.push(event.state, event)
    }

    /// Waits for room whatever the event: for those who have nothing else to do meanwhile.
    pub fn send_patiently(&self, event: FlowEvent) -> std::result::Result<(), Closed> {
        self.push(State::End, event)
    }

    fn push(&self, urgency: State, event: FlowEvent) -> std::result::Result<(), Closed> {
        match push(&self.channel, urgency, event) {
            Pushed::Done => Ok(()),
            Pushed::Dropped => {
                self.ongoing_dropped.inc();
                Ok(())
            }
            Pushed::Closed => Err(Closed),
        }
    }
}
