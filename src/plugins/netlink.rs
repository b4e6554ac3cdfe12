//! The netlink plugin: the TCP connections of this host are flows, as `sock_diag(7)` shows them.
//!
//! A scan every period finds what is new; the kernel tells of each socket that goes, in that moment and
//! with its last counts. Where it does not, or where notifications were lost, the scans find out.

use std::collections::HashSet;
use std::io;
use std::time::Instant;

use crossbeam_channel::Sender;
use jiff::SignedDuration;
use log::Level;
use prometheus::Histogram;

use super::{Closed, EventSender, Plugin, now};
use crate::config;
use crate::connections::{Connection, Tracker};
use crate::dispatcher::{self, Query};
use crate::error::{Context, Result};
use crate::flow::{Flow, FlowEvent, Origin, Protocol, State};
use crate::log_limit::LogLimit;
use crate::metrics::{Outcomes, outcomes};
use crate::routes::Sources;
use crate::socket::CONNECTED;
use crate::sys::connection_rules;
use crate::sys::interfaces::LocalAddresses;
use crate::sys::sock_diag::{Destroyed, Dump, Notified};
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "netlink";
/// How long the kernel may take to tell that a socket has gone: it does so from a work queue, later than a
/// scan would show it.
const LATE: SignedDuration = SignedDuration::from_secs(1);
/// Nothing but `struct inet_diag_msg` is needed to know a connection.
const NO_EXTENSIONS: u8 = 0;

outcomes! {
    enum Outcome {
        Started = "started",
        Ended = "ended",
        Scanned = "scanned",
        ScanFailed = "scan_failed",
        Overrun = "overrun",
    }
}

/// What notifications tell.
#[derive(Default)]
struct Closings {
    events: Vec<FlowEvent>,
    /// The connections that went, whether or not they are anybody's business.
    flows: HashSet<Flow>,
    /// Some were lost: a scan from now on is needed to know the rest.
    incomplete: bool,
}

/// The plugin, with its netlink sockets open.
pub struct Netlink {
    config: config::Connections,
    tracker: Tracker,
    /// The starts of what was there when the plugin was made.
    existing: Vec<FlowEvent>,
    local: LocalAddresses,
    dump: Dump,
    destroyed: Option<Destroyed>,
    waiter: Waiter,
    queries: Sender<Query>,
    counters: Outcomes<Outcome>,
    scans: Histogram,
}

impl Netlink {
    /// Opens the sockets, and scans once to know what was there before.
    pub fn new(config: &config::Connections, sources: &Sources) -> Result<Netlink> {
        let rules = connection_rules::build(&config.rules)?;
        let networks = config.internal_networks.clone();
        let waiter = Waiter::new().context(poll_loop)?;
        // The notifications first, so that nothing goes unseen between the two.
        let destroyed = Destroyed::subscribe().and_then(|destroyed| {
            waiter.watch(&destroyed)?;
            Ok(destroyed)
        });
        let destroyed = destroyed
            .inspect_err(|error| {
                log::warn!(
                    "netlink: the kernel does not tell which sockets go ({error}): ends are as late as the next scan, and connections shorter than {} ms may be missed",
                    config.period.as_millis()
                );
            })
            .ok();
        let patience = destroyed.as_ref().map_or(SignedDuration::ZERO, |_| LATE);
        let mut dump = Dump::open().context(sock_diag)?;
        let found = connections(&mut dump).context(sock_diag)?;
        let local = LocalAddresses::watch().context(|| "addresses of this host".to_owned())?;
        let announce = config.announce_existing;
        let mut tracker = Tracker::new(Origin::Netlink, rules, networks, announce, patience);
        tracker.begin_scan();
        let time = now();
        let is_local = |address: &_| local.contains(address);
        let starts = found.iter();
        let starts = starts.filter_map(|found| tracker.open(found, time, is_local));
        Ok(Netlink {
            config: config.clone(),
            existing: starts.collect(),
            tracker,
            local,
            dump,
            destroyed,
            waiter,
            queries: sources.queries.clone(),
            counters: sources.metrics.plugin(NAME),
            scans: sources.metrics.scans(NAME),
        })
    }

    fn scan(&mut self) -> io::Result<Closings> {
        self.local.refresh();
        connection_rules::refresh(&self.config.rules, &mut self.tracker.rules);
        let found = connections(&mut self.dump)?;
        // What went while the kernel was counting is known before anything is concluded from it.
        let mut closed = self.closed()?;
        let time = now();
        self.tracker.begin_scan();
        for connection in found.iter().filter(|c| !closed.flows.contains(&c.flow)) {
            let local = |address: &_| self.local.contains(address);
            let start = self.tracker.open(connection, time, local);
            closed.events.extend(start);
        }
        closed.events.extend(self.tracker.end_scan(time));
        Ok(closed)
    }

    /// The ends of what has gone before this plugin runs. Connections that came and went meanwhile are
    /// those of the one before it, if there was one.
    fn closed_before(&mut self) -> io::Result<Vec<FlowEvent>> {
        let mut events = self.closed()?.events;
        // Their end comes right behind their start.
        let mut short = false;
        events.retain(|event| {
            let before = std::mem::replace(&mut short, event.state == State::Start);
            !before && !short
        });
        Ok(events)
    }

    /// What the kernel has told since it was last asked.
    fn closed(&mut self) -> io::Result<Closings> {
        let mut closings = Closings::default();
        let Some(destroyed) = &mut self.destroyed else {
            return Ok(closings);
        };
        let time = now();
        loop {
            let notified = destroyed.receive(|socket| {
                if socket.info.was_established() || self.tracker.knows(&socket.flow) {
                    closings.flows.insert(socket.flow);
                    let local = |address: &_| self.local.contains(address);
                    let told = self.tracker.closed(&socket.into(), time, local);
                    closings.events.extend(told);
                }
            })?;
            match notified {
                Notified::Some | Notified::Nameless => {}
                Notified::Nothing => return Ok(closings),
                Notified::Overrun => {
                    self.counters.add(Outcome::Overrun);
                    closings.incomplete = true;
                }
            }
        }
    }

    fn send(&self, found: Vec<FlowEvent>, events: &EventSender) -> std::result::Result<(), Closed> {
        for event in found {
            self.counters.add(match event.state {
                State::End => Outcome::Ended,
                _ => Outcome::Started,
            });
            events.send(event)?;
        }
        Ok(())
    }
}

/// The connections of this host.
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
        let open = dispatcher::open_flows(&self.queries);
        let own = open
            .iter()
            .filter(|(_, open)| open.origin == Origin::Netlink);
        own.for_each(|(flow, _)| self.tracker.resume(*flow));
        let mut found = std::mem::take(&mut self.existing);
        found.extend(self.closed_before().context(sock_diag)?);
        if self.send(found, &events).is_err() {
            return Ok(());
        }
        let mut trouble = LogLimit::new(Level::Error, "netlink: failures");
        let mut due = Instant::now();
        while !stop.is_set() {
            let closings = self.closed().context(sock_diag)?;
            let mut found = closings.events;
            let began = Instant::now();
            if closings.incomplete || began >= due {
                due = began + self.config.period;
                match self.scan() {
                    Ok(more) => {
                        self.counters.add(Outcome::Scanned);
                        self.scans.observe(began.elapsed().as_secs_f64());
                        found.extend(more.events);
                        if more.incomplete {
                            due = began;
                        } else if self.tracker.misses_some() {
                            due = due.min(began + LATE.unsigned_abs());
                        }
                    }
                    Err(error) => {
                        self.counters.add(Outcome::ScanFailed);
                        trouble.log(began, || format!("netlink: sock_diag: {error}"));
                    }
                }
            }
            if self.send(found, &events).is_err() {
                break;
            }
            trouble.tick(began);
            let rest = due.saturating_duration_since(Instant::now());
            self.waiter.wait(Some(rest)).context(poll_loop)?;
        }
        // What has begun since the last scan is known to who comes after.
        if let Ok(found) = self.scan() {
            let _ = self.send(found.events, &events);
        }
        trouble.flush();
        Ok(())
    }
}
