//! The firefly backend: tells a flow's destination, and a collector, about every flow event.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;
use log::Level;

use super::Backend;
use crate::config;
use crate::error::{Context, Result};
use crate::firefly::Encoder;
use crate::flow::FlowEvent;
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::resolver::Resolver;
use crate::sys::udp::{BATCH, Batch, Sender};

const NAME: &str = "firefly";
const TICK: Duration = Duration::from_secs(1);

outcomes! {
    enum Datagram {
        Sent = "sent",
        Unreachable = "unreachable",
        Failed = "failed",
        CollectorUnresolved = "collector_unresolved",
    }
}

/// The backend, with its sockets open.
pub struct Firefly {
    destination_port: u16,
    collector: Option<Collector>,
    encoder: Encoder,
    sender: Sender,
    counters: Outcomes<Datagram>,
    trouble: LogLimit,
}

enum Collector {
    Address(SocketAddr),
    Name(Resolver),
}

impl Firefly {
    /// Opens the sockets and starts looking up the collector's name, if it is one.
    pub fn new(config: &config::Firefly, metrics: &Metrics) -> Result<Firefly> {
        let sender = Sender::open().context(|| "socket of the firefly backend".to_owned())?;
        let hostname = nix::unistd::gethostname().unwrap_or_default();
        let application = concat!("flowd-rs ", env!("CARGO_PKG_VERSION"));
        let collector = config
            .collector
            .as_ref()
            .map(|c| match c.host.parse::<IpAddr>() {
                Ok(address) => Ok(Collector::Address(SocketAddr::new(address, c.port))),
                Err(_) => Resolver::start(c.host.clone(), c.port).map(Collector::Name),
            })
            .transpose()
            .context(|| "resolver of the firefly backend".to_owned())?;
        Ok(Firefly {
            destination_port: config.destination_port,
            collector,
            encoder: Encoder::new(
                &hostname.to_string_lossy(),
                application,
                config.prepend_syslog,
            ),
            sender,
            counters: metrics.backend(NAME),
            trouble: LogLimit::new(Level::Warn, "firefly: datagrams that could not be sent"),
        })
    }

    /// Where the firefly of an event goes: the same place only once.
    fn destinations(&mut self, event: &FlowEvent) -> impl Iterator<Item = SocketAddr> + use<> {
        let destination = SocketAddr::new(event.flow.destination.address, self.destination_port);
        let collector = match &mut self.collector {
            None => None,
            Some(Collector::Address(address)) => Some(*address),
            Some(Collector::Name(resolver)) => {
                let address = resolver.address();
                if address.is_none() {
                    self.counters.add(Datagram::CollectorUnresolved);
                }
                address
            }
        };
        [Some(destination), collector.filter(|c| *c != destination)]
            .into_iter()
            .flatten()
    }

    fn send(&mut self, batch: &Batch) {
        let mut failures = 0;
        let (counters, trouble, collector) =
            (&self.counters, &mut self.trouble, &mut self.collector);
        self.sender.send(batch, |to, error| {
            failures += 1;
            counters.add(match error.kind() {
                io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
                    Datagram::Unreachable
                }
                _ => Datagram::Failed,
            });
            trouble.log(Instant::now(), || format!("firefly: to {to}: {error}"));
            if let Some(Collector::Name(resolver)) = collector
                && resolver.address() == Some(to)
            {
                resolver.failed();
            }
        });
        self.counters
            .add_many(Datagram::Sent, batch.len() as u64 - failures);
    }
}

impl Backend for Firefly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()> {
        let mut batch = Batch::default();
        loop {
            let first = match events.recv_timeout(TICK) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            batch.clear();
            let now = Timestamp::now();
            for event in first.into_iter().chain(events.try_iter()) {
                let destinations = self.destinations(&event);
                batch.push(destinations, |out| self.encoder.encode(&event, now, out));
                if batch.len() >= BATCH {
                    break;
                }
            }
            self.send(&batch);
            self.trouble.tick(Instant::now());
        }
        self.trouble.flush();
        Ok(())
    }
}
