//! The netlink enricher: ends flows whose TCP socket on this host has closed, with the final counts, and reports the
//! `sock_diag(7)` statistics of the open sockets every period.
//!
//! The kernel notifies the enricher of closed sockets. Scans replace the notifications if the kernel does not send
//! them, and after some were lost. The scans are those of [`crate::sys::scanner`], which the netlink plugin shares.

use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;
use log::Level;
use prometheus::{Histogram, IntCounter};

use crate::config::{Config, NetlinkEnricher};
use crate::context::DaemonContext;
use crate::dispatcher::{self, Query};
use crate::error::{Context, Result};
use crate::event::{FlowEvent, Origin, State};
use crate::flow::{Flow, Protocol};
use crate::logging::LogLimit;
use crate::metrics::{Outcomes, outcomes};
use crate::plugins::{Closed, EventSender, Plugin, now};
use crate::socket::{CONNECTED, Socket};
use crate::sys::scanner::{Scan, Subscriber, Wanted};
use crate::sys::sock_diag::{Answer, DestroyNotifications, Dump, Received};
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

/// The name in the configuration and in metrics.
pub const NAME: &str = "netlink";
/// The interval of scans without `enrichers.netlink`, if the kernel notifies of closed sockets.
const SCAN_INTERVAL_NOTIFIED: Duration = Duration::from_secs(10);
/// The interval of scans while some closed sockets may have gone unnoticed.
const SCAN_INTERVAL_POLLING: Duration = Duration::from_secs(1);

/// How many sockets the dispatcher learns of in one query, so that no event waits for long.
const MAX_SOCKETS_PER_QUERY: usize = 1024;

outcomes! {
    enum Outcome {
        Closed = "closed": "{socket|sockets} closed",
        Ongoing = "ongoing": "{report|reports} on open sockets",
        Scanned = "scanned": "{scan|scans} done",
        ScanFailed = "scan_failed": "{scan|scans} failed",
        Overrun = "overrun": "lost kernel notifications {time|times}",
    }
}

/// What was read of notifications.
#[derive(Default)]
struct Closings {
    /// The cookies of the closed sockets.
    sockets: HashSet<u64>,
    /// Whether some notifications were lost: only a new scan shows which sockets have closed.
    overrun: bool,
}

/// The enricher, with its netlink sockets open.
pub struct Netlink {
    /// Whether flows end with their sockets (`flows.endOnSocketClose`).
    ends_flows: bool,
    /// Which sockets `ongoing` events report on, if any (`enrichers.netlink`).
    reported: Option<NetlinkEnricher>,
    scanner: Subscriber,
    /// For reports on UDP sockets, which nobody else scans.
    udp: Option<(Dump, Answer)>,
    notifications: Option<DestroyNotifications>,
    waiter: Waiter,
    /// Since when a socket may have closed without a notification that identifies it: the last such notification.
    missed_close: Option<Instant>,
    /// The connections that the last scan showed, less those closed since.
    seen: HashSet<Flow>,
    queries: Sender<Query>,
    counters: Outcomes<Outcome>,
    dumps: IntCounter,
    scans: Histogram,
}

impl Netlink {
    /// Opens the netlink sockets. `None` if neither `enrichers.netlink` nor `flows.endOnSocketClose` is set, or if only
    /// the latter is set and the kernel has no `sock_diag`.
    pub fn new(config: &Config, context: &DaemonContext) -> Result<Option<Netlink>> {
        let ends_flows = config.flows.end_on_socket_close;
        let reported = &config.netlink_enricher;
        if !ends_flows && reported.is_none() {
            return Ok(None);
        }
        let waiter = Waiter::new().context(poll_loop)?;
        let subscribe = || {
            let notifications = DestroyNotifications::subscribe()?;
            waiter.watch(&notifications)?;
            Ok::<_, io::Error>(notifications)
        };
        let notifications = if ends_flows {
            subscribe().map(Some)
        } else {
            Ok(None)
        };
        let notifications = notifications.unwrap_or_else(|error| {
            log::warn!("netlink enricher: the kernel does not send notifications of closed sockets ({error}): flows end up to a second late");
            None
        });
        let default_period = if notifications.is_some() {
            SCAN_INTERVAL_NOTIFIED
        } else {
            SCAN_INTERVAL_POLLING
        };
        let period = reported
            .as_ref()
            .map_or(default_period, |reported| reported.period);
        let tcp = reported
            .as_ref()
            .filter(|reported| reported.protocol == Protocol::Tcp);
        let (states, extensions) = tcp.map_or((0, 0), |tcp| (tcp.states, tcp.extensions));
        let wanted = Wanted {
            states: states | CONNECTED,
            extensions,
        };
        let scanner = context.scanner.subscribe(period, wanted);
        if let Err(error) = scanner.scan_now() {
            if reported.is_none() {
                log::warn!(
                    "netlink enricher: sock_diag: {error}; flows do not end with their sockets"
                );
                return Ok(None);
            }
            return Err(error).context(sock_diag);
        }
        let reports_udp = reported.is_some() && tcp.is_none();
        let udp = reports_udp
            .then(Dump::open)
            .transpose()
            .context(sock_diag)?;
        Ok(Some(Netlink {
            ends_flows,
            reported: reported.clone(),
            scanner,
            udp: udp.map(|dump| (dump, Answer::default())),
            notifications,
            waiter,
            // Sockets of restored flows may have closed while no daemon ran.
            missed_close: Some(Instant::now()),
            seen: HashSet::new(),
            queries: context.queries.clone(),
            counters: context.metrics.enricher(NAME),
            dumps: context.metrics.socket_dumps.clone(),
            scans: context.metrics.scans("enricher netlink"),
        }))
    }

    /// Reads the notifications that wait, and sends the ends.
    fn send_closed(
        &mut self,
        events: &EventSender,
    ) -> io::Result<std::result::Result<Closings, Closed>> {
        let mut closings = Closings::default();
        let Some(notifications) = &mut self.notifications else {
            return Ok(Ok(closings));
        };
        let time = now();
        loop {
            let mut sent = Ok(());
            let (counters, seen) = (&self.counters, &mut self.seen);
            let received = notifications.receive(|socket| {
                // Sockets without counts, too: their flows may be open.
                if sent.is_ok() {
                    counters.add(Outcome::Closed);
                    seen.remove(&socket.flow);
                    closings.sockets.insert(socket.info.cookie);
                    sent = events.send(event(State::End, socket, time));
                }
            })?;
            if sent.is_err() {
                return Ok(Err(Closed));
            }
            match received {
                Received::Sockets => {}
                Received::Unidentified => self.missed_close = Some(Instant::now()),
                Received::Nothing => return Ok(Ok(closings)),
                Received::Overrun => {
                    self.counters.add(Outcome::Overrun);
                    self.missed_close = Some(Instant::now());
                    closings.overrun = true;
                }
            }
        }
    }

    /// Scans all sockets, after the notifications that `closings` holds were read. A periodic scan, which is due at `now`,
    /// reports on the open ones. If closes may have been missed, the scan ends the flows of the sockets that are no longer
    /// there.
    fn scan(
        &mut self,
        events: &EventSender,
        now: Instant,
        is_periodic: bool,
        closings: &Closings,
    ) -> io::Result<std::result::Result<(), Closed>> {
        let scan = match is_periodic {
            true => self.scanner.scan_due(now, closings.overrun)?,
            false => self.scanner.scan_now()?,
        };
        let mut sent = self.send_scanned(events, &scan, is_periodic, &closings.sockets);
        if is_periodic && sent.is_ok() {
            sent = self.report_udp(events)?;
        }
        // Without notifications, any socket may have closed.
        if !self.ends_flows || self.notifications.is_some() {
            self.missed_close.take_if(|missed| scan.began > *missed);
        }
        self.counters.add(Outcome::Scanned);
        Ok(sent)
    }

    /// Sends what a scan showed. It may show sockets that have closed meanwhile: their cookies are in `closed`.
    fn send_scanned(
        &mut self,
        events: &EventSender,
        scan: &Scan,
        send_ongoing: bool,
        closed: &HashSet<u64>,
    ) -> std::result::Result<(), Closed> {
        let reported = self.reported.as_ref().filter(|_| send_ongoing);
        let tcp = reported.filter(|reported| reported.protocol == Protocol::Tcp);
        let states = tcp.map_or(0, |tcp| tcp.states);
        let time = now();
        let report = |socket: Arc<Socket>| {
            self.counters.add(Outcome::Ongoing);
            events.send_blocking(event(State::Ongoing, socket, time))
        };
        let mut now_seen = HashSet::with_capacity(self.seen.len());
        let mut cookies = Vec::new();
        for socket in scan.sockets().filter(|s| !closed.contains(&s.cookie)) {
            let is_known = self.ends_flows && socket.is_connected();
            if is_known {
                now_seen.insert(socket.flow);
            }
            // A report has the cookie, too.
            if socket.is_alive_in(states) {
                report(socket.parse())?;
            } else if is_known {
                cookies.push((socket.flow, socket.cookie));
            }
        }
        if !self.ends_flows {
            return Ok(());
        }
        for chunk in cookies.chunks(MAX_SOCKETS_PER_QUERY) {
            // The dispatcher is gone when the daemon stops.
            let _ = self.queries.send(Query::Sockets(chunk.to_vec()));
        }
        if self.missed_close.is_none() {
            // Keep the missing connections: their notification may come yet, and may not identify them.
            self.seen.extend(now_seen);
            return Ok(());
        }
        for flow in self.seen.difference(&now_seen) {
            self.counters.add(Outcome::Closed);
            events.send(FlowEvent::new(State::End, *flow, time, Origin::Socket))?;
        }
        self.seen = now_seen;
        Ok(())
    }

    /// Reports on the UDP sockets, if they are reported.
    fn report_udp(&mut self, events: &EventSender) -> io::Result<std::result::Result<(), Closed>> {
        let (Some((dump, answer)), Some(reported)) = (&mut self.udp, &self.reported) else {
            return Ok(Ok(()));
        };
        self.dumps.inc();
        dump.sockets(Protocol::Udp, reported.states, reported.extensions, answer)?;
        let time = now();
        for socket in answer.sockets().filter(|s| s.is_alive_in(u32::MAX)) {
            self.counters.add(Outcome::Ongoing);
            let report = event(State::Ongoing, socket.parse(), time);
            if let Err(closed) = events.send_blocking(report) {
                return Ok(Err(closed));
            }
        }
        Ok(Ok(()))
    }

    /// Counts the restored flows whose sockets were known as seen, so that the next scan ends those whose
    /// socket has closed meanwhile.
    fn restore_seen(&mut self) {
        let Some(open) = dispatcher::open_flows(&self.queries) else {
            log::warn!(
                "netlink enricher: the dispatcher does not answer; flows whose socket closed meanwhile stay open"
            );
            return;
        };
        for (flow, open) in open {
            if let Some(socket) = open.socket {
                self.seen.insert(socket.direction(&flow));
            } else if open.origin.is_socket() {
                self.seen.insert(flow);
            }
        }
    }
}

fn event(state: State, socket: Arc<Socket>, time: Timestamp) -> FlowEvent {
    let event = FlowEvent::new(state, socket.flow, time, Origin::Socket);
    FlowEvent {
        usage: socket.info.usage(),
        netlink: (state != State::End || socket.info.was_established()).then_some(socket),
        ..event
    }
}

fn poll_loop() -> String {
    "poll loop of the netlink enricher".to_owned()
}

fn sock_diag() -> String {
    "sock_diag of the netlink enricher".to_owned()
}

impl Plugin for Netlink {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        self.waiter.watch(&stop).context(poll_loop)?;
        if self.ends_flows {
            self.restore_seen();
        }
        let mut failures = LogLimit::new(Level::Error, "netlink enricher: failures");
        let mut last_scan = Instant::now();
        while !stop.is_set() {
            let Ok(closings) = self.send_closed(&events).context(sock_diag)? else {
                break;
            };
            let began = Instant::now();
            let is_due = self.scanner.is_due(began);
            let polls = self.missed_close.is_some() && began >= last_scan + SCAN_INTERVAL_POLLING;
            if closings.overrun || is_due || polls {
                last_scan = began;
                match self.scan(&events, began, is_due, &closings) {
                    Ok(Ok(())) => self.scans.observe(began.elapsed().as_secs_f64()),
                    Ok(Err(Closed)) => break,
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                        return Err(error).context(sock_diag);
                    }
                    Err(error) => {
                        self.counters.add(Outcome::ScanFailed);
                        failures.log(began, || format!("netlink enricher: sock_diag: {error}"));
                    }
                }
            }
            failures.tick(began);
            let next_scan = match self.missed_close {
                Some(_) => self
                    .scanner
                    .next_due()
                    .min(last_scan + SCAN_INTERVAL_POLLING),
                None => self.scanner.next_due(),
            };
            let timeout = next_scan.saturating_duration_since(Instant::now());
            self.waiter.wait(Some(timeout)).context(poll_loop)?;
        }
        failures.flush();
        Ok(())
    }
}
