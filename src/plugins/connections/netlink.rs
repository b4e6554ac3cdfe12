//! The netlink plugin: reports the TCP connections of this host as flows, with `sock_diag(7)`.
//!
//! Periodic scans find new connections. The kernel notifies the plugin of each socket that closes, at once and with its
//! final counts. Without notifications, or after some were lost, the scans detect closed connections. The scans are those
//! of [`crate::sys::scanner`], which the netlink enricher shares.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Sender;
use jiff::{SignedDuration, Timestamp};
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
use crate::logging::LogLimit;
use crate::metrics::{Outcomes, outcomes};
use crate::plugins::{self, Closed, EventSender, Plugin};
use crate::socket::{Socket, SocketMessage};
use crate::sys::interfaces::LocalAddresses;
use crate::sys::scanner::{Scan, Subscriber, Wanted};
use crate::sys::sock_diag::{DestroyNotifications, Received};
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "netlink";
/// How long to wait for the notification of a closed socket: the kernel sends it from a work queue, later than a scan
/// shows the close.
const NOTIFICATION_GRACE: SignedDuration = SignedDuration::from_secs(1);

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
    /// The cookies of all closed connections.
    sockets: HashSet<u64>,
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
    scanner: Subscriber,
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
        let scanner = context
            .scanner
            .subscribe(config.period, Wanted::CONNECTIONS);
        let scan = scanner.scan_now().context(sock_diag)?;
        let local = LocalAddresses::watch().context(|| "addresses of this host".to_owned())?;
        let announce = config.announce_existing;
        let mut tracker = Tracker::new(Origin::Netlink, rules, networks, announce, grace);
        tracker.begin_scan();
        let time = plugins::now();
        let is_local = |address: &_| local.contains(address);
        let found = connections(&scan);
        let starts = found.filter_map(|found| observe_open(&mut tracker, &found, time, is_local));
        Ok(Netlink {
            config: config.clone(),
            initial_starts: starts.collect(),
            tracker,
            local,
            scanner,
            notifications,
            waiter,
            queries: context.queries.clone(),
            counters: context.metrics.plugin(NAME),
            scans: context.metrics.scans("plugin netlink"),
        })
    }

    /// Scans the connections, after the notifications that `closings` holds were read: adds to `closings` those that the scan
    /// and further notifications show. The periodic scan, if `is_due`, may share a dump.
    fn scan(&mut self, closings: &mut Closings, now: Instant, is_due: bool) -> io::Result<()> {
        self.local.refresh();
        rules::refresh(&self.config.rules, &mut self.tracker.rules);
        let scan = match is_due {
            true => self.scanner.scan_due(now, closings.incomplete)?,
            false => self.scanner.scan_now()?,
        };
        // Read the closes that happened during the dump before drawing conclusions from the dump.
        closings.incomplete = false;
        self.read_closings(closings)?;
        let time = plugins::now();
        self.tracker.begin_scan();
        for found in connections(&scan).filter(|found| !closings.sockets.contains(&found.cookie)) {
            let local = |address: &_| self.local.contains(address);
            let start = observe_open(&mut self.tracker, &found, time, local);
            closings.events.extend(start);
        }
        closings.events.extend(self.tracker.end_scan(time));
        Ok(())
    }

    /// The ends of the connections that closed after construction and before the thread started. Connections that both
    /// opened and closed in this time are left out: the predecessor, if there was one, reports them.
    fn initial_ends(&mut self) -> io::Result<Vec<FlowEvent>> {
        let mut closings = Closings::default();
        self.read_closings(&mut closings)?;
        let mut events = closings.events;
        // The end of such a connection directly follows its start.
        let mut is_start = false;
        events.retain(|event| {
            let follows_start = std::mem::replace(&mut is_start, event.state == State::Start);
            !follows_start && !is_start
        });
        Ok(events)
    }

    /// Adds the notifications that wait to `closings`.
    fn read_closings(&mut self, closings: &mut Closings) -> io::Result<()> {
        let Some(notifications) = &mut self.notifications else {
            return Ok(());
        };
        let time = plugins::now();
        loop {
            let received = notifications.receive(|socket| {
                if socket.info.was_established() || self.tracker.is_tracked(&socket.flow) {
                    closings.sockets.insert(socket.info.cookie);
                    let local = |address: &_| self.local.contains(address);
                    let events = self.tracker.observe_closed(&socket.into(), time, local);
                    closings.events.extend(events);
                }
            })?;
            match received {
                Received::Sockets | Received::Unidentified => {}
                Received::Nothing => return Ok(()),
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

/// The open connections of this host.
fn connections(scan: &Scan) -> impl Iterator<Item = SocketMessage<'_>> {
    scan.sockets().filter(SocketMessage::is_connected)
}

/// Records an open connection: see [`Tracker::observe_open`]. Most are known already, or no flows.
fn observe_open(
    tracker: &mut Tracker,
    found: &SocketMessage<'_>,
    now: Timestamp,
    is_local: impl Fn(&IpAddr) -> bool,
) -> Option<FlowEvent> {
    if tracker.observe_again(&found.flow) || !tracker.may_be_flow(&found.flow, &is_local) {
        return None;
    }
    let socket = found.parse_only(Wanted::CONNECTIONS.extensions);
    tracker.observe_open(&socket.into(), now, is_local)
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
        // A scan before the next periodic one, if need be.
        let mut extra_scan = None;
        while !stop.is_set() {
            let mut closings = Closings::default();
            self.read_closings(&mut closings).context(sock_diag)?;
            let began = Instant::now();
            let is_due = self.scanner.is_due(began);
            let is_extra_due = extra_scan.is_some_and(|due| began >= due);
            if closings.incomplete || is_due || is_extra_due {
                extra_scan = None;
                match self.scan(&mut closings, began, is_due) {
                    Ok(()) => {
                        self.counters.add(Outcome::Scanned);
                        self.scans.observe(began.elapsed().as_secs_f64());
                        if closings.incomplete {
                            extra_scan = Some(began);
                        } else if self.tracker.has_missing() {
                            extra_scan = Some(began + NOTIFICATION_GRACE.unsigned_abs());
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                        return Err(error).context(sock_diag);
                    }
                    Err(error) => {
                        self.counters.add(Outcome::ScanFailed);
                        failures.log(began, || format!("netlink: sock_diag: {error}"));
                    }
                }
            }
            if self.send(closings.events, &events).is_err() {
                break;
            }
            failures.tick(began);
            let next_due = self.scanner.next_due();
            let next_scan = extra_scan.map_or(next_due, |extra| extra.min(next_due));
            let timeout = next_scan.saturating_duration_since(Instant::now());
            self.waiter.wait(Some(timeout)).context(poll_loop)?;
        }
        // The successor may not announce connections that exist when it starts: announce those that are new since the
        // last scan.
        let mut closings = Closings::default();
        if self.scan(&mut closings, Instant::now(), false).is_ok() {
            let _ = self.send(closings.events, &events);
        }
        failures.flush();
        Ok(())
    }
}
