//! The sockets enricher: ends flows whose TCP socket on this host has gone, with the last counts, and
//! tells every period what `sock_diag(7)` knows of the others.
//!
//! The kernel says which sockets go. Scans make up for what it does not say: where it has no such
//! notifications, and where some were lost.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;
use log::Level;
use prometheus::Histogram;

use crate::config::{Config, NetlinkEnricher};
use crate::dispatcher::{self, Query};
use crate::error::{Context, Result};
use crate::flow::{Flow, FlowEvent, Origin, Protocol, State};
use crate::log_limit::LogLimit;
use crate::metrics::{Outcomes, outcomes};
use crate::plugins::{Closed, EventSender, Plugin, now};
use crate::routes::Sources;
use crate::socket::{CONNECTED, Socket};
use crate::sys::sock_diag::{Destroyed, Dump, Notified};
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

/// The name in metrics; the netlink plugin has that of the protocol.
pub const NAME: &str = "sockets";
/// How often sockets are looked at if nobody wants news of them: the kernel tells of those that go.
const WITH_NOTIFICATIONS: Duration = Duration::from_secs(10);
/// The same, if the kernel does not.
const WITHOUT: Duration = Duration::from_secs(1);

outcomes! {
    enum Outcome {
        Closed = "closed",
        News = "news",
        Scanned = "scanned",
        ScanFailed = "scan_failed",
        Overrun = "overrun",
    }
}

/// The enricher, with its netlink sockets open.
pub struct Sockets {
    /// Whether flows end with their sockets.
    end: bool,
    news: Option<NetlinkEnricher>,
    period: Duration,
    dump: Dump,
    destroyed: Option<Destroyed>,
    waiter: Waiter,
    /// Whether a socket may have gone without word of whose it was.
    in_doubt: bool,
    /// The connections that the last scan showed.
    seen: HashSet<Flow>,
    queries: Sender<Query>,
    counters: Outcomes<Outcome>,
    scans: Histogram,
}

impl Sockets {
    /// Opens the netlink sockets; `None` if nobody wants to know, or if only `flows.endOnSocketClose`
    /// does and this kernel has no `sock_diag`.
    pub fn new(config: &Config, sources: &Sources) -> Result<Option<Sockets>> {
        let (end, news) = (config.flows.end_on_socket_close, &config.netlink_enricher);
        if !end && news.is_none() {
            return Ok(None);
        }
        let dump = Dump::open().and_then(|mut dump| {
            dump.sockets(Protocol::Tcp, CONNECTED, 0, |_| {})?;
            Ok(dump)
        });
        let dump = match dump {
            Ok(dump) => dump,
            Err(error) if news.is_none() => {
                log::warn!("sockets: sock_diag: {error}: flows do not end with their sockets");
                return Ok(None);
            }
            Err(error) => return Err(error).context(sock_diag),
        };
        let waiter = Waiter::new().context(poll_loop)?;
        let subscribe = || {
            let destroyed = Destroyed::subscribe()?;
            waiter.watch(&destroyed)?;
            Ok::<_, io::Error>(destroyed)
        };
        let destroyed = if end { subscribe().map(Some) } else { Ok(None) };
        let destroyed = destroyed.unwrap_or_else(|error| {
            log::warn!("sockets: the kernel does not tell which sockets go ({error}): ends are late by up to a second");
            None
        });
        let without = if destroyed.is_some() {
            WITH_NOTIFICATIONS
        } else {
            WITHOUT
        };
        Ok(Some(Sockets {
            end,
            period: news.as_ref().map_or(without, |news| news.period),
            news: news.clone(),
            dump,
            destroyed,
            waiter,
            // What was open before the daemon was started may have gone.
            in_doubt: true,
            seen: HashSet::new(),
            queries: sources.queries.clone(),
            counters: sources.metrics.plugin(NAME),
            scans: sources.metrics.scans(NAME),
        }))
    }

    /// Sends what the kernel has told since it was last asked; whether some was lost.
    fn closed(&mut self, events: &EventSender) -> io::Result<std::result::Result<bool, Closed>> {
        let Some(destroyed) = &mut self.destroyed else {
            return Ok(Ok(false));
        };
        let (time, mut overrun) = (now(), false);
        loop {
            let mut sent = Ok(());
            let (counters, seen) = (&self.counters, &mut self.seen);
            let notified = destroyed.receive(|socket| {
                // Also one that has lost its counts: its flow may be open.
                if sent.is_ok() {
                    counters.add(Outcome::Closed);
                    seen.remove(&socket.flow);
                    sent = events.send(event(State::End, socket, time));
                }
            })?;
            if sent.is_err() {
                return Ok(Err(Closed));
            }
            match notified {
                Notified::Some => {}
                Notified::Nameless => self.in_doubt = true,
                Notified::Nothing => return Ok(Ok(overrun)),
                Notified::Overrun => {
                    self.counters.add(Outcome::Overrun);
                    overrun = true;
                }
            }
        }
    }

    /// Looks at all sockets; sends news of them, and with `ends` the ends of those that are there no
    /// more.
    fn scan(
        &mut self,
        events: &EventSender,
        news: bool,
        ends: bool,
    ) -> io::Result<std::result::Result<(), Closed>> {
        let news = self.news.as_ref().filter(|_| news);
        let of_tcp = news.filter(|news| news.protocol == Protocol::Tcp);
        let (states, extensions) = of_tcp.map_or((0, 0), |news| (news.states, news.extensions));
        let (counters, time) = (&self.counters, now());
        let mut now_seen = HashSet::with_capacity(self.seen.len());
        let mut sent = Ok(());
        let mut tell = |socket: Arc<Socket>| {
            if sent.is_ok() {
                counters.add(Outcome::News);
                sent = events.send_patiently(event(State::Ongoing, socket, time));
            }
        };
        let wanted = states | CONNECTED;
        self.dump
            .sockets(Protocol::Tcp, wanted, extensions, |socket| {
                let state = 1u32.checked_shl(socket.info.state.into()).unwrap_or(0);
                if socket.info.is_connected() {
                    now_seen.insert(socket.flow);
                }
                // What only waits for its time to be over is no news.
                if states & state != 0 && !socket.info.only_waits() {
                    tell(socket);
                }
            })?;
        if let Some(udp) = news.filter(|news| news.protocol == Protocol::Udp) {
            self.dump
                .sockets(Protocol::Udp, udp.states, udp.extensions, &mut tell)?;
        }
        if ends && self.end {
            for flow in self.seen.difference(&now_seen) {
                self.counters.add(Outcome::Closed);
                if sent.is_ok() {
                    sent = events.send(FlowEvent::new(State::End, *flow, time, Origin::Socket));
                }
            }
        }
        match ends || !self.end {
            true => self.seen = now_seen,
            // The word of those that are missing may be one that does not say whose it is.
            false => self.seen.extend(now_seen),
        }
        self.counters.add(Outcome::Scanned);
        Ok(sent)
    }

    /// Flows from before the daemon was started that came by their sockets are looked at as if they had
    /// been seen: the socket may have gone meanwhile.
    fn remember(&mut self) {
        let open = dispatcher::open_flows(&self.queries);
        let by_socket = open.iter().filter(|(_, open)| open.origin.is_socket());
        self.seen.extend(by_socket.map(|(flow, _)| *flow));
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
    "poll loop of the sockets enricher".to_owned()
}

fn sock_diag() -> String {
    "sock_diag of the sockets enricher".to_owned()
}

impl Plugin for Sockets {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        self.waiter.watch(&stop).context(poll_loop)?;
        if self.end {
            self.remember();
        }
        let mut trouble = LogLimit::new(Level::Error, "sockets: failures");
        let mut due = Instant::now();
        let mut scanned = due;
        while !stop.is_set() {
            let Ok(overrun) = self.closed(&events).context(sock_diag)? else {
                break;
            };
            self.in_doubt |= overrun;
            let began = Instant::now();
            let news = began >= due;
            if overrun || news || (self.in_doubt && began >= scanned + WITHOUT) {
                scanned = began;
                if news {
                    due = began + self.period;
                }
                match self.scan(&events, news, self.in_doubt) {
                    Ok(Ok(())) => {
                        self.in_doubt = self.end && self.destroyed.is_none();
                        self.scans.observe(began.elapsed().as_secs_f64());
                    }
                    Ok(Err(Closed)) => break,
                    Err(error) => {
                        self.counters.add(Outcome::ScanFailed);
                        trouble.log(began, || format!("sockets: sock_diag: {error}"));
                    }
                }
            }
            trouble.tick(began);
            let next = match self.in_doubt {
                true => due.min(scanned + WITHOUT),
                false => due,
            };
            let rest = next.saturating_duration_since(Instant::now());
            self.waiter.wait(Some(rest)).context(poll_loop)?;
        }
        trouble.flush();
        Ok(())
    }
}
