//! The firefly backend: tells a flow's destination, and a collector, about every flow event.
//!
//! Of a flow that was heard of by a firefly, and that comes to this host, the other end is told: a
//! firefly is to travel the way of the data. Nothing is sent to the daemon's own listener.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;
use log::Level;

use super::{Backend, with_socket};
use crate::config::{self, Relayed};
use crate::error::{Context, Result};
use crate::firefly::Encoder;
use crate::flow::{Effect, EndReason, Flow, FlowEvent, Origin, Protocol, State};
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::public_addresses::{Known, PublicAddresses};
use crate::sys::interfaces::LocalAddresses;
use crate::sys::resolver::Resolver;
use crate::sys::sock_diag::Dump;
use crate::sys::udp::{BATCH, Batch, Sender};

const NAME: &str = "firefly";
const TICK: Duration = Duration::from_secs(1);
/// How long an end waits for its counts.
const PATIENCE: Duration = Duration::from_millis(100);
/// How many wait at most.
const HELD_MOST: usize = 4096;

outcomes! {
    enum Datagram {
        Sent = "sent",
        Unreachable = "unreachable",
        Failed = "failed",
        CollectorUnresolved = "collector_unresolved",
        OwnListener = "own_listener",
        NotRelayed = "not_relayed",
        MembersLeftOut = "members_left_out",
    }
}

/// The backend, with its sockets open.
pub struct Firefly {
    destination_port: u16,
    collector: Option<Collector>,
    relayed: Relayed,
    /// Where the firefly plugin listens.
    listener: Option<SocketAddr>,
    local: LocalAddresses,
    encoder: Encoder,
    /// Whether fireflies say what is known of sockets.
    enrich: bool,
    /// What stands for the addresses of this host, IPv4 and IPv6.
    public: [Option<IpAddr>; 2],
    discovered: Option<PublicAddresses>,
    /// `None` on a kernel without `sock_diag`.
    sockets: Option<Dump>,
    held: Held,
    sender: Sender,
    counters: Outcomes<Datagram>,
    trouble: LogLimit,
}

enum Collector {
    Address(SocketAddr),
    Name(Resolver),
}

impl Firefly {
    /// Opens the sockets and starts looking up the collector's name, if it is one. `counts_come_late` if
    /// somebody watches for sockets that go; `known` has the public addresses that were found before.
    pub fn new(
        config: &config::Firefly,
        listener: Option<SocketAddr>,
        counts_come_late: bool,
        known: &Known,
        metrics: &Metrics,
    ) -> Result<Firefly> {
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
            relayed: config.relayed,
            listener,
            local: LocalAddresses::watch().context(|| "addresses of this host".to_owned())?,
            encoder: Encoder::new(
                &hostname.to_string_lossy(),
                application,
                config.prepend_syslog,
            )
            .enriched(config.enrichment),
            enrich: config.enrichment.is_some(),
            public: config.public,
            discovered: config
                .stun
                .clone()
                .map(|stun| PublicAddresses::start(stun, known))
                .transpose()
                .context(|| "thread addresses".to_owned())?,
            sockets: Dump::open().ok(),
            held: Held {
                most: if counts_come_late { HELD_MOST } else { 0 },
                ..Held::default()
            },
            sender,
            counters: metrics.backend(NAME),
            trouble: LogLimit::new(Level::Warn, "firefly: datagrams that could not be sent"),
        })
    }

    /// Where the firefly of an event goes: the same place only once.
    fn destinations(&mut self, event: &FlowEvent) -> impl Iterator<Item = SocketAddr> + use<> {
        let destination = self.destination(event);
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
        if destination.is_none() && self.collector.is_none() {
            self.counters.add(Datagram::NotRelayed);
        }
        let collector = collector.filter(|c| Some(*c) != destination);
        [destination, collector]
            .map(|to| self.not_own(to))
            .into_iter()
            .flatten()
    }

    fn destination(&self, event: &FlowEvent) -> Option<SocketAddr> {
        let (source, destination) = (event.flow.source.address, event.flow.destination.address);
        let mut end = destination;
        if event.origin == Origin::Firefly {
            let here = [source, destination].map(|address| self.local.contains(&address));
            if here == [false, true] {
                end = source;
            }
            match self.relayed {
                Relayed::Collector => return None,
                Relayed::Auto if here == [false, false] => return None,
                Relayed::Auto | Relayed::Destination => {}
            }
        }
        Some(SocketAddr::new(end, self.destination_port))
    }

    /// A firefly that this daemon would hear again is not sent.
    fn not_own(&self, to: Option<SocketAddr>) -> Option<SocketAddr> {
        let (to, listener) = match (to, self.listener) {
            (Some(to), Some(listener)) if to.port() == listener.port() => (to, listener.ip()),
            _ => return to,
        };
        let heard = match listener {
            IpAddr::V4(any) if any.is_unspecified() => {
                to.is_ipv4() && self.local.contains(&to.ip())
            }
            IpAddr::V6(any) if any.is_unspecified() => self.local.contains(&to.ip()),
            listener => to.ip() == listener,
        };
        if heard {
            self.counters.add(Datagram::OwnListener);
        }
        (!heard).then_some(to)
    }

    /// What there is to say of an event, in this moment: it may have to wait, or bring forth what did.
    fn take(&mut self, event: Arc<FlowEvent>) -> impl Iterator<Item = Arc<FlowEvent>> + use<> {
        let mut waited = match event.state {
            State::Ongoing if event.effect != Effect::Opened => None,
            _ => self.held.remove(&event.flow),
        };
        if event.effect == Effect::Counted {
            if let Some(end) = &mut waited {
                let end = Arc::make_mut(end);
                end.usage = event.usage;
                end.netlink.clone_from(&event.netlink);
            }
            return waited.into_iter().chain(None);
        }
        let event = self.completed(event);
        let gone = event.effect == Effect::Closed(EndReason::Producer)
            && event.usage.is_none()
            && event.flow.protocol == Protocol::Tcp
            && self.local.outgoing(&event.flow).is_some();
        let now = match gone {
            true => self.held.insert(event),
            false => Some(event),
        };
        waited.into_iter().chain(now)
    }

    /// With what the kernel knows of the flow's socket, where a firefly is to say it and nobody has
    /// looked: a start if fireflies are enriched, and an end.
    fn completed(&mut self, event: Arc<FlowEvent>) -> Arc<FlowEvent> {
        let wanted = match event.state {
            State::Start => self.enrich && event.netlink.is_none(),
            State::Ongoing => false,
            State::End => event.usage.is_none(),
        };
        let completed = match &mut self.sockets {
            Some(sockets) if wanted => with_socket(&event, &self.local, sockets),
            _ => Ok(None),
        };
        match completed {
            Ok(Some(completed)) => Arc::new(completed),
            Ok(None) => event,
            Err(error) => {
                self.trouble
                    .log(Instant::now(), || format!("firefly: sock_diag: {error}"));
                event
            }
        }
    }

    /// With the public address of this host in place of its own.
    fn seen_from_outside(&mut self, event: Arc<FlowEvent>) -> Arc<FlowEvent> {
        if self.public == [None; 2] && self.discovered.is_none() {
            return event;
        }
        let mut flow = event.flow;
        let ends = [&flow.source, &flow.destination].map(|end| self.local.contains(&end.address));
        // Of a flow with no end here, somebody may still have said what stands for its source.
        let end = match ends {
            [false, true] => &mut flow.destination,
            _ => &mut flow.source,
        };
        let here = ends != [false; 2];
        let discovered = self.discovered.as_ref();
        let mapped = discovered.and_then(|public| public.public_of(&end.address));
        let fixed = self.public[usize::from(end.address.is_ipv6())].filter(|_| here);
        let Some(public) = fixed.or(mapped) else {
            return event;
        };
        end.address = public;
        Arc::new(FlowEvent {
            flow,
            ..FlowEvent::clone(&event)
        })
    }

    fn encode(&mut self, event: Arc<FlowEvent>, now: Timestamp, batch: &mut Batch) {
        let destinations = self.destinations(&event);
        let event = self.seen_from_outside(event);
        let left_out = batch.push(destinations, |out| self.encoder.encode(&event, now, out));
        self.counters
            .add_many(Datagram::MembersLeftOut, left_out as u64);
        if batch.len() >= BATCH {
            self.send(batch);
        }
    }

    fn send(&mut self, batch: &mut Batch) {
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
        batch.clear();
    }
}

impl Backend for Firefly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()> {
        let mut batch = Batch::default();
        loop {
            let patience = self.held.rest().map_or(TICK, |rest| rest.min(TICK));
            let (first, done) = match events.recv_timeout(patience) {
                Ok(event) => (Some(event), false),
                Err(RecvTimeoutError::Timeout) => (None, false),
                Err(RecvTimeoutError::Disconnected) => (None, true),
            };
            self.local.refresh();
            let now = Timestamp::now();
            for event in first.into_iter().chain(events.try_iter()).take(BATCH) {
                for event in self.take(event) {
                    self.encode(event, now, &mut batch);
                }
            }
            while let Some(event) = self.held.overdue(done) {
                self.encode(event, now, &mut batch);
            }
            self.send(&mut batch);
            self.trouble.tick(Instant::now());
            if done {
                break;
            }
        }
        self.trouble.flush();
        Ok(())
    }
}

/// Ends of flows whose socket has just gone: the word of it, with the counts, is on its way.
#[derive(Default)]
struct Held {
    most: usize,
    ends: HashMap<Flow, Arc<FlowEvent>>,
    /// In the order in which they came; some may have gone.
    order: VecDeque<(Instant, Flow)>,
}

impl Held {
    /// Holds an end, or gives it back if there is no room.
    fn insert(&mut self, end: Arc<FlowEvent>) -> Option<Arc<FlowEvent>> {
        if self.ends.len() >= self.most {
            return Some(end);
        }
        self.order.push_back((Instant::now(), end.flow));
        self.ends.insert(end.flow, end)
    }

    fn remove(&mut self, flow: &Flow) -> Option<Arc<FlowEvent>> {
        self.ends.remove(flow)
    }

    /// How long the one that waits longest goes on waiting.
    fn rest(&self) -> Option<Duration> {
        let (since, _) = self.order.front()?;
        Some(PATIENCE.saturating_sub(since.elapsed()))
    }

    /// One that has waited long enough; with `all` it need not have.
    fn overdue(&mut self, all: bool) -> Option<Arc<FlowEvent>> {
        while all || self.rest()?.is_zero() {
            let (_, flow) = self.order.pop_front()?;
            if let Some(end) = self.ends.remove(&flow) {
                return Some(end);
            }
        }
        None
    }
}
