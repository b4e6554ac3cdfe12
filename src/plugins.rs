//! Sources of flow events, one thread each.

pub mod api;
pub mod firefly;
#[cfg(feature = "bpf")]
pub mod iperf3;
pub mod named_pipe;
pub mod netlink;
pub mod netstat;
pub mod perfsonar;

use crossbeam_channel::Sender;
use jiff::Timestamp;
use prometheus::IntCounter;

use crate::config::Config;
use crate::error::Result;
use crate::flow::{FlowEvent, State};
use crate::metrics::Metrics;
use crate::queue::{Pushed, push};
use crate::routes::Sources;
use crate::sys::stop::Stop;

/// A source of flow events. Building one acquires every resource it needs (socket, pipe, BPF program),
/// so that a bad configuration or a missing privilege is an error before the daemon says it is ready.
pub trait Plugin: Send {
    /// The name in logs, metrics and threads.
    fn name(&self) -> &'static str;

    /// Runs on its own thread until `stop` is set; dropping `events` is how it says it is done.
    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()>;
}

/// Builds every plugin that is configured.
pub fn build(config: &Config, sources: &Sources) -> Result<Vec<Box<dyn Plugin>>> {
    let (registry, metrics) = (&sources.registry, &sources.metrics);
    let mut plugins: Vec<Box<dyn Plugin>> = Vec::new();
    if let Some(config) = &config.named_pipe {
        plugins.push(Box::new(named_pipe::NamedPipe::new(
            config, registry, metrics,
        )?));
    }
    if let Some(config) = &config.firefly_plugin {
        plugins.push(Box::new(firefly::Firefly::new(config, metrics)?));
    }
    if let Some(config) = &config.api {
        plugins.push(Box::new(api::Api::new(config, sources.clone())?));
    }
    if let Some(config) = &config.netlink {
        plugins.push(Box::new(netlink::Netlink::new(config, metrics)?));
    }
    if let Some(config) = &config.netstat {
        plugins.push(Box::new(netstat::Netstat::new(config, metrics)?));
    }
    #[cfg(feature = "bpf")]
    if let Some(config) = &config.iperf3 {
        plugins.push(Box::new(iperf3::Iperf3::new(config, metrics)?));
    }
    if let Some(tag) = config.perfsonar {
        plugins.push(Box::new(perfsonar::Perfsonar::new(tag)?));
    }
    Ok(plugins)
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
