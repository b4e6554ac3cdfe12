//! The netlink enricher: ends flows whose TCP socket on this host has closed, with the final counts, and reports the
//! `sock_diag(7)` statistics of the open sockets every period.
//!
//! The kernel notifies the enricher of closed sockets. Scans replace the notifications if the kernel does not send
//! them, and after some were lost.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;
use log::Level;
use prometheus::Histogram;

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
use crate::sys::sock_diag::{DestroyNotifications, Dump, Received};
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

/// The enricher, with its netlink sockets open.
pub struct Netlink {
    /// Whether flows end with their sockets (`flows.endOnSocketClose`).
    ends_flows: bool,
    /// Which sockets `ongoing` events report on, if any (`enrichers.netlink`).
    reported: Option<NetlinkEnricher>,
    period: Duration,
    dump: Dump,
    notifications: Option<DestroyNotifications>,
    waiter: Waiter,
    /// Whether a socket may have closed without a notification that identifies it.
    may_have_missed_close: bool,
    /// The connections that the last scan showed, less those closed since.
    seen: HashSet<Flow>,
    queries: Sender<Query>,
    counters: Outcomes<Outcome>,
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
        let dump = Dump::open().and_then(|mut dump| {
            dump.sockets(Protocol::Tcp, CONNECTED, 0, |_| {})?;
            Ok(dump)
        });
        let dump = match dump {
            Ok(dump) => dump,
            Err(error) if reported.is_none() => {
                log::warn!(
                    "netlink enricher: sock_diag: {error}; flows do not end with their sockets"
                );
                return Ok(None);
            }
            Err(error) => return Err(error).context(sock_diag),
        };
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
        Ok(Some(Netlink {
            ends_flows,
            period: reported
                .as_ref()
                .map_or(default_period, |reported| reported.period),
            reported: reported.clone(),
            dump,
            notifications,
            waiter,
            // Sockets of restored flows may have closed while no daemon ran.
            may_have_missed_close: true,
            seen: HashSet::new(),
            queries: context.queries.clone(),
            counters: context.metrics.enricher(NAME),
            scans: context.metrics.scans("enricher netlink"),
        }))
    }

    /// Reads the notifications that wait, and sends the ends. Returns whether notifications were lost.
    fn send_closed(
        &mut self,
        events: &EventSender,
    ) -> io::Result<std::result::Result<bool, Closed>> {
        let Some(notifications) = &mut self.notifications else {
            return Ok(Ok(false));
        };
        let (time, mut overrun) = (now(), false);
        loop {
            let mut sent = Ok(());
            let (counters, seen) = (&self.counters, &mut self.seen);
            let received = notifications.receive(|socket| {
                // Sockets without counts, too: their flows may be open.
                if sent.is_ok() {
                    counters.add(Outcome::Closed);
                    seen.remove(&socket.flow);
                    sent = events.send(event(State::End, socket, time));
                }
            })?;
            if sent.is_err() {
                return Ok(Err(Closed));
            }
            match received {
                Received::Sockets => {}
                Received::Unidentified => self.may_have_missed_close = true,
                Received::Nothing => return Ok(Ok(overrun)),
                Received::Overrun => {
                    self.counters.add(Outcome::Overrun);
                    overrun = true;
                }
            }
        }
    }

    /// Scans all sockets. With `send_ongoing` it reports on the open ones, and with `send_ends` it ends the flows of
    /// those that are no longer there.
    fn scan(
        &mut self,
        events: &EventSender,
        send_ongoing: bool,
        send_ends: bool,
    ) -> io::Result<std::result::Result<(), Closed>> {
        let reported = self.reported.as_ref().filter(|_| send_ongoing);
        let tcp = reported.filter(|reported| reported.protocol == Protocol::Tcp);
        let (states, extensions) = tcp.map_or((0, 0), |tcp| (tcp.states, tcp.extensions));
        let (counters, time) = (&self.counters, now());
        let mut now_seen = HashSet::with_capacity(self.seen.len());
        let mut sent = Ok(());
        let mut cookies = Vec::new();
        let mut report = |socket: Arc<Socket>| {
            if sent.is_ok() {
                counters.add(Outcome::Ongoing);
                sent = events.send_blocking(event(State::Ongoing, socket, time));
            }
        };
        let requested_states = states | CONNECTED;
        self.dump
            .sockets(Protocol::Tcp, requested_states, extensions, |socket| {
                let state = 1u32.checked_shl(socket.info.state.into()).unwrap_or(0);
                if socket.info.is_connected() {
                    now_seen.insert(socket.flow);
                    cookies.push((socket.flow, socket.info.cookie));
                }
                // A time-wait entry has nothing new to report.
                if states & state != 0 && !socket.info.is_time_wait() {
                    report(socket);
                }
            })?;
        if let Some(udp) = reported.filter(|reported| reported.protocol == Protocol::Udp) {
            self.dump
                .sockets(Protocol::Udp, udp.states, udp.extensions, &mut report)?;
        }
        if self.ends_flows {
            for chunk in cookies.chunks(MAX_SOCKETS_PER_QUERY) {
                // The dispatcher is gone when the daemon stops.
                let _ = self.queries.send(Query::Sockets(chunk.to_vec()));
            }
        }
        if send_ends && self.ends_flows {
            for flow in self.seen.difference(&now_seen) {
                self.counters.add(Outcome::Closed);
                if sent.is_ok() {
                    sent = events.send(FlowEvent::new(State::End, *flow, time, Origin::Socket));
                }
            }
        }
        match send_ends || !self.ends_flows {
            true => self.seen = now_seen,
            // Keep the missing connections: their notification may come yet, and may not identify them.
            false => self.seen.extend(now_seen),
        }
        self.counters.add(Outcome::Scanned);
        Ok(sent)
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
        let mut next_period = Instant::now();
        let mut last_scan = next_period;
        while !stop.is_set() {
            let Ok(overrun) = self.send_closed(&events).context(sock_diag)? else {
                break;
            };
            self.may_have_missed_close |= overrun;
            let began = Instant::now();
            let is_due = began >= next_period;
            let polls = self.may_have_missed_close && began >= last_scan + SCAN_INTERVAL_POLLING;
            if overrun || is_due || polls {
                last_scan = began;
                if is_due {
                    next_period = began + self.period;
                }
                match self.scan(&events, is_due, self.may_have_missed_close) {
                    Ok(Ok(())) => {
                        self.may_have_missed_close =
                            self.ends_flows && self.notifications.is_none();
                        self.scans.observe(began.elapsed().as_secs_f64());
                    }
                    Ok(Err(Closed)) => break,
                    Err(error) => {
                        self.counters.add(Outcome::ScanFailed);
                        failures.log(began, || format!("netlink enricher: sock_diag: {error}"));
                    }
                }
            }
            failures.tick(began);
            let next_scan = match self.may_have_missed_close {
                true => next_period.min(last_scan + SCAN_INTERVAL_POLLING),
                false => next_period,
            };
            let timeout = next_scan.saturating_duration_since(Instant::now());
            self.waiter.wait(Some(timeout)).context(poll_loop)?;
        }
        failures.flush();
        Ok(())
    }
}
