//! The netlink plugin: reports the TCP connections of this host as flows, with `sock_diag(7)`.
//!
//! Periodic scans find new connections. The kernel notifies the plugin of each socket that closes, at once and with its
//! final counts. Without notifications, or after some were lost, the scans detect closed connections.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;
use jiff::SignedDuration;
use log::Level;
use prometheus::Histogram;

use super::Connection;
use super::rules;
use super::tracker::Tracker;
use crate::config;
use crate::context::DaemonContext;
use crate::dispatcher::{self, Query};
use crate::error::{Context, Error, Result};
use crate::event::{FlowEvent, Origin, State};
use crate::flow::{Flow, Protocol};
use crate::logging::LogLimit;
use crate::metrics::{Outcomes, outcomes};
use crate::plugins::{Closed, EventSender, Plugin, now};
use crate::socket::{CONNECTED, Socket};
use crate::sys::interfaces::LocalAddresses;
use crate::sys::sock_diag::{DestroyNotifications, Dump, Received};
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "netlink";
/// How long to wait for the notification of a closed socket: the kernel sends it from a work queue, later than a scan
/// shows the close.
const NOTIFICATION_GRACE: SignedDuration = SignedDuration::from_secs(1);
/// `struct inet_diag_msg` alone identifies a connection.
const NO_EXTENSIONS: u8 = 0;

outcomes! {
    enum Outcome {
        Started = "started": "{connection|connections} started",
        Ended = "ended": "{connection|connections} ended",
        Scanned = "scanned": "{scan|scans} done",
        ScanFailed = "scan_failed": "{scan|scans} failed",
        Overrun = "overrun": "lost kernel notifications {time|times}",
    }
}

/// The connections that notifications report as closed.
#[derive(Default)]
struct Closings {
    /// The flow events of the connections that are flows.
    events: Vec<FlowEvent>,
    /// All closed connections.
    flows: HashSet<Flow>,
    /// Some notifications were lost: only a new scan shows the rest.
    incomplete: bool,
}

/// The plugin, with its netlink sockets open.
pub struct Netlink {
    config: config::Connections,
    tracker: Tracker,
    /// The starts of the connections that were open at construction.
    initial_starts: Vec<FlowEvent>,
    local: LocalAddresses,
    dump: Dump,
    notifications: Option<DestroyNotifications>,
    waiter: Waiter,
    queries: Sender<Query>,
    counters: Outcomes<Outcome>,
    scans: Histogram,
}

impl Netlink {
    /// Opens the netlink sockets, and scans once to tell existing connections from new ones.
    pub fn new(config: &config::Connections, context: &DaemonContext) -> Result<Netlink> {
        let rules = rules::build(&config.rules)?;
        let networks = config.internal_networks.clone();
        let waiter = Waiter::new().context(poll_loop)?;
        // Subscribe before the scan, so that no close between the two is missed.
        let notifications = DestroyNotifications::subscribe().and_then(|notifications| {
            waiter.watch(&notifications)?;
            Ok(notifications)
        });
        let notifications = notifications
            .inspect_err(|error| {
                log::warn!(
                    "netlink: the kernel does not send notifications of closed sockets ({error}): flows end only with the next scan, and connections shorter than {} ms may be missed",
                    config.period.as_millis()
                );
            })
            .ok();
        let grace = notifications
            .as_ref()
            .map_or(SignedDuration::ZERO, |_| NOTIFICATION_GRACE);
        let mut dump = Dump::open().context(sock_diag)?;
        let found = connections(&mut dump).context(sock_diag)?;
        let local = LocalAddresses::watch().context(|| "addresses of this host".to_owned())?;
        let announce = config.announce_existing;
        let mut tracker = Tracker::new(Origin::Netlink, rules, networks, announce, grace);
        tracker.begin_scan();
        let time = now();
        let is_local = |address: &_| local.contains(address);
        let starts = found.iter();
        let starts = starts.filter_map(|found| tracker.observe_open(found, time, is_local));
        Ok(Netlink {
            config: config.clone(),
            initial_starts: starts.collect(),
            tracker,
            local,
            dump,
            notifications,
            waiter,
            queries: context.queries.clone(),
            counters: context.metrics.plugin(NAME),
            scans: context.metrics.scans("plugin netlink"),
        })
    }

    fn scan(&mut self) -> io::Result<Closings> {
        self.local.refresh();
        rules::refresh(&self.config.rules, &mut self.tracker.rules);
        let found = connections(&mut self.dump)?;
        // Read the closes that happened during the dump before drawing conclusions from the dump.
        let mut closings = self.read_closings()?;
        let time = now();
        self.tracker.begin_scan();
        for connection in found.iter().filter(|c| !closings.flows.contains(&c.flow)) {
            let local = |address: &_| self.local.contains(address);
            let start = self.tracker.observe_open(connection, time, local);
            closings.events.extend(start);
        }
        closings.events.extend(self.tracker.end_scan(time));
        Ok(closings)
    }

    /// The ends of the connections that closed after construction and before the thread started. Connections that both
    /// opened and closed in this time are left out: the predecessor, if there was one, reports them.
    fn initial_ends(&mut self) -> io::Result<Vec<FlowEvent>> {
        let mut events = self.read_closings()?.events;
        // The end of such a connection directly follows its start.
        let mut is_start = false;
        events.retain(|event| {
            let follows_start = std::mem::replace(&mut is_start, event.state == State::Start);
            !follows_start && !is_start
        });
        Ok(events)
    }

    /// Reads the notifications that wait.
    fn read_closings(&mut self) -> io::Result<Closings> {
        let mut closings = Closings::default();
        let Some(notifications) = &mut self.notifications else {
            return Ok(closings);
        };
        let time = now();
        loop {
            let received = notifications.receive(|socket| {
                if socket.info.was_established() || self.tracker.is_tracked(&socket.flow) {
                    closings.flows.insert(socket.flow);
                    let local = |address: &_| self.local.contains(address);
                    let events = self.tracker.observe_closed(&socket.into(), time, local);
                    closings.events.extend(events);
                }
            })?;
            match received {
                Received::Sockets | Received::Unidentified => {}
                Received::Nothing => return Ok(closings),
                Received::Overrun => {
                    self.counters.add(Outcome::Overrun);
                    closings.incomplete = true;
                }
            }
        }
    }

    fn send(&self, batch: Vec<FlowEvent>, events: &EventSender) -> std::result::Result<(), Closed> {
        for event in batch {
            self.counters.add(match event.state {
                State::End => Outcome::Ended,
                _ => Outcome::Started,
            });
            events.send(event)?;
        }
        Ok(())
    }
}

impl From<Arc<Socket>> for Connection {
    fn from(socket: Arc<Socket>) -> Connection {
        Connection {
            flow: socket.flow,
            // A closed socket has no inode, and its user id is not that of an owner.
            uid: (socket.info.inode != 0).then_some(socket.info.uid),
            cgroup: socket.info.cgroup,
            usage: socket.info.usage(),
            socket: Some(socket),
        }
    }
}

/// Lists the open connections of this host.
fn connections(dump: &mut Dump) -> io::Result<Vec<Connection>> {
    let mut found = Vec::new();
    dump.sockets(Protocol::Tcp, CONNECTED, NO_EXTENSIONS, |socket| {
        if socket.info.is_connected() {
            found.push(socket.into());
        }
    })?;
    Ok(found)
}

fn poll_loop() -> String {
    "poll loop of the netlink plugin".to_owned()
}

fn sock_diag() -> String {
    "sock_diag of the netlink plugin".to_owned()
}

impl Plugin for Netlink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        self.waiter.watch(&stop).context(poll_loop)?;
        let open = dispatcher::open_flows(&self.queries).ok_or_else(|| {
            Error::Failed(
                "the dispatcher does not answer: which flows are open is not known".to_owned(),
            )
        })?;
        let own = open
            .iter()
            .filter(|(_, open)| open.origin == Origin::Netlink);
        own.for_each(|(flow, _)| self.tracker.resume(*flow));
        let mut batch = std::mem::take(&mut self.initial_starts);
        batch.extend(self.initial_ends().context(sock_diag)?);
        if self.send(batch, &events).is_err() {
            return Ok(());
        }
        let mut failures = LogLimit::new(Level::Error, "netlink: failures");
        let mut next_scan = Instant::now();
        while !stop.is_set() {
            let closings = self.read_closings().context(sock_diag)?;
            let mut batch = closings.events;
            let began = Instant::now();
            if closings.incomplete || began >= next_scan {
                next_scan = began + self.config.period;
                match self.scan() {
                    Ok(scanned) => {
                        self.counters.add(Outcome::Scanned);
                        self.scans.observe(began.elapsed().as_secs_f64());
                        batch.extend(scanned.events);
                        if scanned.incomplete {
                            next_scan = began;
                        } else if self.tracker.has_missing() {
                            next_scan = next_scan.min(began + NOTIFICATION_GRACE.unsigned_abs());
                        }
                    }
                    Err(error) => {
                        self.counters.add(Outcome::ScanFailed);
                        failures.log(began, || format!("netlink: sock_diag: {error}"));
                    }
                }
            }
            if self.send(batch, &events).is_err() {
                break;
            }
            failures.tick(began);
            let timeout = next_scan.saturating_duration_since(Instant::now());
            self.waiter.wait(Some(timeout)).context(poll_loop)?;
        }
        // The successor may not announce connections that exist when it starts: announce those that are new since the
        // last scan.
        if let Ok(scanned) = self.scan() {
            let _ = self.send(scanned.events, &events);
        }
        failures.flush();
        Ok(())
    }
}
