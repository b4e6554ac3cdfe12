//! The firefly backend: sends every flow event to the flow's destination and to a collector.
//!
//! If an incoming flow was learned from a firefly, the firefly is sent to the remote end: it is to take the same
//! path as the data. Nothing is sent to the daemon's own listener.
//!
//! Anyone who can send a datagram names a flow's ends. The backend must not become a reflector: it sends to no address that
//! reaches several hosts, and the datagrams that received fireflies cause have a maximum rate for each destination.

pub mod public_addresses;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;
use log::Level;

use super::{Backend, with_socket};
use crate::backends::firefly::public_addresses::{AddressCache, PublicAddresses};
use crate::config::{self, Relayed};
use crate::error::{Context, Result};
use crate::event::{self, Effect, EndReason, FlowEvent, Origin, State};
use crate::firefly::Encoder;
use crate::flow::{Flow, Protocol};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::interfaces::LocalAddresses;
use crate::sys::resolver::Resolver;
use crate::sys::sock_diag::Dump;
use crate::sys::udp::{Batch, MAX_BATCH_SIZE, Sender};

const NAME: &str = "firefly";
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// How long an end is held back for its byte counts.
const END_HOLD_TIMEOUT: Duration = Duration::from_millis(100);
/// How many ends are held back at most.
const MAX_HELD_ENDS: usize = 4096;

outcomes! {
    enum Datagram {
        Sent = "sent": "sent: {datagram|datagrams}",
        Unreachable = "unreachable": "not sent: {datagram|datagrams} to unreachable destinations",
        Failed = "failed": "not sent: {datagram|datagrams} that the system refused",
        CollectorUnresolved = "collector_unresolved": "not sent: {datagram|datagrams} because the collector's name is not resolved",
        OwnListener = "own_listener": "not sent: {datagram|datagrams} to this daemon's own listener",
        NotOneHost = "not_one_host": "not sent: {datagram|datagrams} to multicast, broadcast or foreign loopback addresses",
        OverRate = "over_rate": "not sent: {datagram|datagrams} of received fireflies beyond maxRelayRate",
        NotRelayed = "not_relayed": "not relayed: {firefly|fireflies}",
        MembersLeftOut = "members_left_out": "left out for lack of room: {field|fields}",
    }
}

/// The backend, with its sockets open.
pub struct Firefly {
    destination_port: u16,
    collector: Option<Collector>,
    relayed: Relayed,
    rate: RateLimit,
    /// The address at which the firefly plugin listens.
    listener: Option<SocketAddr>,
    local: LocalAddresses,
    encoder: Encoder,
    /// Whether fireflies carry socket statistics.
    enrich: bool,
    /// Reported instead of this host's addresses, IPv4 and IPv6.
    public: [Option<IpAddr>; 2],
    discovered: Option<PublicAddresses>,
    /// `None` on a kernel without `sock_diag`.
    sockets: Option<Dump>,
    held: Held,
    sender: Sender,
    counters: Outcomes<Datagram>,
    failure_log: LogLimit,
}

enum Collector {
    Address(SocketAddr),
    Name(Resolver),
}

impl Firefly {
    /// Opens the sockets, and starts to resolve the collector if it is given by name. `hold_ends` if an enricher
    /// reports closed sockets, so that an end without byte counts waits for them. `known` holds the public
    /// addresses found so far.
    pub fn new(
        config: &config::Firefly,
        listener: Option<SocketAddr>,
        hold_ends: bool,
        known: &AddressCache,
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
            rate: RateLimit::new(config.max_relay_rate),
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
                .context(|| "thread addresses (backends.firefly.stun)".to_owned())?,
            sockets: Dump::open().ok(),
            held: Held {
                max: if hold_ends { MAX_HELD_ENDS } else { 0 },
                ..Held::default()
            },
            sender,
            counters: metrics.backend(NAME),
            failure_log: LogLimit::new(Level::Warn, "firefly: failures"),
        })
    }

    /// The destinations of an event's firefly, without duplicates.
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
        let configured = collector;
        let collector = collector.filter(|c| Some(*c) != destination);
        let destination = self.skip_own_listener(destination);
        let is_collector = destination.is_some() && destination == configured;
        let destination = destination.filter(|to| is_collector || self.may_send(event, to.ip()));
        [destination, self.skip_own_listener(collector)]
            .into_iter()
            .flatten()
    }

    fn destination(&self, event: &FlowEvent) -> Option<SocketAddr> {
        let mut end = event.flow.destination.address;
        if event.origin == Origin::Firefly {
            let local = self.local_ends(event);
            if local == [false, true] {
                end = event.flow.source.address;
            }
            match self.relayed {
                Relayed::Collector => return None,
                Relayed::Auto if local == [false, false] => return None,
                Relayed::Auto | Relayed::Destination => {}
            }
        }
        Some(SocketAddr::new(end, self.destination_port))
    }

    /// Which ends of the flow are on this host: source, destination. Every host has a loopback address: in a firefly, it
    /// means this host only if the firefly was sent here and the other end is here as well.
    fn local_ends(&self, event: &FlowEvent) -> [bool; 2] {
        let ends = [event.flow.source.address, event.flow.destination.address];
        let local = ends.map(|end| self.local.contains(&end));
        let is_loopback = ends.iter().any(IpAddr::is_loopback);
        if event.origin != Origin::Firefly || !is_loopback {
            return local;
        }
        let sent_here = matches!(event.sender, Some(event::Sender::Address(sender)) if self.local.contains(&sender));
        match sent_here && local == [true; 2] {
            true => local,
            false => [0, 1].map(|end| local[end] && !ends[end].is_loopback()),
        }
    }

    /// The flow as the socket on this host sees it. `None` if neither end is on this host.
    fn outgoing(&self, event: &FlowEvent) -> Option<Flow> {
        match self.local_ends(event) {
            [true, _] => Some(event.flow),
            [false, true] => Some(event.flow.reversed()),
            [false, false] => None,
        }
    }

    /// Whether the end of a flow may be sent a datagram. Anyone may name an end in a firefly.
    fn may_send(&mut self, event: &FlowEvent, to: IpAddr) -> bool {
        let is_foreign_loopback = to.is_loopback()
            && event.origin == Origin::Firefly
            && self.local_ends(event) != [true; 2];
        if self.local.is_for_many(&to) || is_foreign_loopback {
            self.counters.add(Datagram::NotOneHost);
            return false;
        }
        if event.origin == Origin::Firefly && !self.rate.take(to, Instant::now()) {
            self.counters.add(Datagram::OverRate);
            let max = self.rate.max;
            self.failure_log.log(Instant::now(), || {
                format!("firefly: to {to}: dropped, as received fireflies cause more than {max} datagrams a second (backends.firefly.maxRelayRate)")
            });
            return false;
        }
        true
    }

    /// Drops an address at which this daemon would receive its own firefly.
    fn skip_own_listener(&self, to: Option<SocketAddr>) -> Option<SocketAddr> {
        let (to, listener) = match (to, self.listener) {
            (Some(to), Some(listener)) if to.port() == listener.port() => (to, listener.ip()),
            _ => return to,
        };
        let is_own = match listener {
            IpAddr::V4(any) if any.is_unspecified() => {
                to.is_ipv4() && self.local.contains(&to.ip())
            }
            IpAddr::V6(any) if any.is_unspecified() => self.local.contains(&to.ip()),
            listener => to.ip() == listener,
        };
        if is_own {
            self.counters.add(Datagram::OwnListener);
        }
        (!is_own).then_some(to)
    }

    /// The events to send now: without `event` if it is held back, and with an end that was held back before it.
    fn events_to_send(
        &mut self,
        event: Arc<FlowEvent>,
    ) -> impl Iterator<Item = Arc<FlowEvent>> + use<> {
        let mut held = match event.state {
            State::Ongoing if event.effect != Effect::Opened => None,
            _ => self.held.remove(&event.flow),
        };
        if event.effect == Effect::Counted {
            if let Some(end) = &mut held {
                let end = Arc::make_mut(end);
                end.usage = event.usage;
                end.netlink.clone_from(&event.netlink);
            }
            return held.into_iter().chain(None);
        }
        let event = self.with_socket_statistics(event);
        let awaits_counts = event.effect == Effect::Closed(EndReason::Producer)
            && event.usage.is_none()
            && event.flow.protocol == Protocol::Tcp
            && self.outgoing(&event).is_some();
        let event = match awaits_counts {
            true => self.held.insert(event),
            false => Some(event),
        };
        held.into_iter().chain(event)
    }

    /// Looks up the flow's socket if the event lacks what its firefly is to carry: statistics in a start, if
    /// fireflies are enriched, and byte counts in an end.
    fn with_socket_statistics(&mut self, event: Arc<FlowEvent>) -> Arc<FlowEvent> {
        let needs_lookup = match event.state {
            State::Start => self.enrich && event.netlink.is_none(),
            State::Ongoing => false,
            State::End => event.usage.is_none(),
        };
        let outgoing = self.outgoing(&event);
        let completed = match &mut self.sockets {
            Some(sockets) if needs_lookup => with_socket(&event, outgoing, sockets),
            _ => Ok(None),
        };
        match completed {
            Ok(Some(completed)) => Arc::new(completed),
            Ok(None) => event,
            Err(error) => {
                self.failure_log
                    .log(Instant::now(), || format!("firefly: sock_diag: {error}"));
                event
            }
        }
    }

    /// Replaces the address of this host by its public one.
    fn with_public_address(&mut self, event: Arc<FlowEvent>) -> Arc<FlowEvent> {
        if self.public == [None; 2] && self.discovered.is_none() {
            return event;
        }
        let mut flow = event.flow;
        let ends = self.local_ends(&event);
        // If neither end is on this host, manualMapping may still map the source.
        let end = match ends {
            [false, true] => &mut flow.destination,
            _ => &mut flow.source,
        };
        let has_local_end = ends != [false; 2];
        let discovered = self.discovered.as_ref();
        let mapped = discovered.and_then(|public| public.public_of(&end.address));
        let fixed = self.public[usize::from(end.address.is_ipv6())].filter(|_| has_local_end);
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
        let event = self.with_public_address(event);
        let left_out = batch.push(destinations, |out| self.encoder.encode(&event, now, out));
        self.counters
            .add_many(Datagram::MembersLeftOut, left_out as u64);
        if batch.len() >= MAX_BATCH_SIZE {
            self.send(batch);
        }
    }

    fn send(&mut self, batch: &mut Batch) {
        let mut failures = 0;
        let (counters, failure_log, collector) =
            (&self.counters, &mut self.failure_log, &mut self.collector);
        self.sender.send(batch, |to, error| {
            failures += 1;
            counters.add(match error.kind() {
                io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => {
                    Datagram::Unreachable
                }
                _ => Datagram::Failed,
            });
            failure_log.log(Instant::now(), || format!("firefly: to {to}: {error}"));
            if let Some(Collector::Name(resolver)) = collector
                && resolver.address() == Some(to)
            {
                resolver.report_failure();
            }
        });
        self.counters
            .add_many(Datagram::Sent, batch.len() as u64 - failures);
        batch.clear();
    }
}

/// How many datagrams received fireflies cause to be sent to each address in this second.
struct RateLimit {
    max: u32,
    since: Instant,
    sent: HashMap<IpAddr, u32>,
}

impl RateLimit {
    fn new(max: u32) -> RateLimit {
        RateLimit {
            max,
            since: Instant::now(),
            sent: HashMap::new(),
        }
    }

    /// Whether one more datagram may be sent to `to`.
    fn take(&mut self, to: IpAddr, now: Instant) -> bool {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            self.since = now;
            self.sent.clear();
        }
        let sent = self.sent.entry(to).or_default();
        let may = *sent < self.max;
        *sent += u32::from(may);
        may
    }
}

impl Backend for Firefly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()> {
        let mut batch = Batch::default();
        loop {
            let until_due = self.held.time_until_due().unwrap_or(TICK_INTERVAL);
            let (first, done) = match events.recv_timeout(until_due.min(TICK_INTERVAL)) {
                Ok(event) => (Some(event), false),
                Err(RecvTimeoutError::Timeout) => (None, false),
                Err(RecvTimeoutError::Disconnected) => (None, true),
            };
            self.local.refresh();
            let now = Timestamp::now();
            for event in first
                .into_iter()
                .chain(events.try_iter())
                .take(MAX_BATCH_SIZE)
            {
                for event in self.events_to_send(event) {
                    self.encode(event, now, &mut batch);
                }
            }
            while let Some(event) = self.held.pop_due(done) {
                self.encode(event, now, &mut batch);
            }
            self.send(&mut batch);
            self.failure_log.tick(Instant::now());
            if done {
                break;
            }
        }
        self.failure_log.flush();
        Ok(())
    }
}

/// Ends of flows whose socket has just closed: the notification with the byte counts is still to come.
#[derive(Default)]
struct Held {
    max: usize,
    ends: HashMap<Flow, Arc<FlowEvent>>,
    /// In order of arrival; may list ends that are no longer held.
    order: VecDeque<(Instant, Flow)>,
}

impl Held {
    /// Holds an end, or returns it if too many are held.
    fn insert(&mut self, end: Arc<FlowEvent>) -> Option<Arc<FlowEvent>> {
        if self.ends.len() >= self.max {
            return Some(end);
        }
        self.order.push_back((Instant::now(), end.flow));
        self.ends.insert(end.flow, end)
    }

    fn remove(&mut self, flow: &Flow) -> Option<Arc<FlowEvent>> {
        self.ends.remove(flow)
    }

    /// Time until the oldest end is due.
    fn time_until_due(&self) -> Option<Duration> {
        let (since, _) = self.order.front()?;
        Some(END_HOLD_TIMEOUT.saturating_sub(since.elapsed()))
    }

    /// Removes an end that is due, or with `all` any end.
    fn pop_due(&mut self, all: bool) -> Option<Arc<FlowEvent>> {
        while all || self.time_until_due()?.is_zero() {
            let (_, flow) = self.order.pop_front()?;
            if let Some(end) = self.ends.remove(&flow) {
                return Some(end);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_destination_has_its_own_rate() {
        let start = Instant::now();
        let mut rate = RateLimit::new(2);
        rate.since = start;
        let [a, b] = ["192.0.2.1", "2001:db8::1"].map(|text| text.parse().unwrap());
        let take =
            |rate: &mut RateLimit, to, millis| rate.take(to, start + Duration::from_millis(millis));
        assert!(take(&mut rate, a, 0) && take(&mut rate, a, 1));
        assert!(!take(&mut rate, a, 999) && take(&mut rate, b, 999));
        assert!(take(&mut rate, a, 1000));
    }
}
