//! The netstat plugin: reports the TCP connections of this host as flows, with `/proc/net/tcp` and `/proc/net/tcp6`. It
//! needs no privileges, but sees only the connections that are open during a scan: it may miss a connection shorter
//! than a period, and detects an end only with the next scan.

use std::time::Instant;

use jiff::SignedDuration;
use log::Level;
use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::Process;
use prometheus::Histogram;

use super::Connection;
use super::rules;
use super::tracker::Tracker;
use crate::config;
use crate::error::{Context, Error, Result};
use crate::event::Origin;
use crate::flow::{Flow, Protocol};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::plugins::{Closed, EventSender, Plugin, now};
use crate::sys::interfaces::LocalAddresses;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "netstat";

outcomes! {
    enum Outcome {
        Started = "started": "{connection|connections} started",
        Ended = "ended": "{connection|connections} ended",
        Scanned = "scanned": "{scan|scans} done",
        ScanFailed = "scan_failed": "{scan|scans} failed",
    }
}

/// The plugin.
pub struct Netstat {
    config: config::Connections,
    tracker: Tracker,
    local: LocalAddresses,
    waiter: Waiter,
    counters: Outcomes<Outcome>,
    scans: Histogram,
}

impl Netstat {
    /// Scans once, so that an unreadable `/proc` is an error at the start.
    pub fn new(config: &config::Connections, metrics: &Metrics) -> Result<Netstat> {
        let rules = rules::build(&config.rules)?;
        let networks = config.internal_networks.clone();
        connections()?;
        Ok(Netstat {
            config: config.clone(),
            tracker: Tracker::new(
                Origin::Netstat,
                rules,
                networks,
                config.announce_existing,
                SignedDuration::ZERO,
            ),
            local: LocalAddresses::watch().context(|| "addresses of this host".to_owned())?,
            waiter: Waiter::new().context(poll_loop)?,
            counters: metrics.plugin(NAME),
            scans: metrics.scans("plugin netstat"),
        })
    }

    fn scan(&mut self, events: &EventSender) -> Result<std::result::Result<(), Closed>> {
        let found = connections()?;
        self.local.refresh();
        let time = now();
        self.tracker.begin_scan();
        for connection in &found {
            let local = |address: &_| self.local.contains(address);
            if let Some(start) = self.tracker.observe_open(connection, time, local) {
                self.counters.add(Outcome::Started);
                if events.send(start).is_err() {
                    return Ok(Err(Closed));
                }
            }
        }
        for end in self.tracker.end_scan(time) {
            self.counters.add(Outcome::Ended);
            if events.send(end).is_err() {
                return Ok(Err(Closed));
            }
        }
        self.counters.add(Outcome::Scanned);
        Ok(Ok(()))
    }
}

fn poll_loop() -> String {
    "poll loop of the netstat plugin".to_owned()
}

/// Lists the connections of both families that are established or half closed.
fn connections() -> Result<Vec<Connection>> {
    // /proc/self/net rather than /proc/net: the systemd unit hides everything in /proc but processes.
    let failed = |error| Error::Failed(format!("/proc/self/net: {error}"));
    let process = Process::myself().map_err(failed)?;
    let mut entries = process.tcp().map_err(failed)?;
    match process.tcp6() {
        // The host has no IPv6.
        Err(procfs::ProcError::NotFound(_)) => {}
        found => entries.extend(found.map_err(failed)?),
    }
    Ok(entries.iter().filter_map(connection).collect())
}

fn connection(entry: &TcpNetEntry) -> Option<Connection> {
    let is_open = matches!(
        entry.state,
        TcpState::Established
            | TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::CloseWait
            | TcpState::LastAck
            | TcpState::Closing
    );
    // A socket without an owner only waits for the FIN of the remote end: the local end has closed it.
    let is_orphaned = entry.inode == 0 && entry.state == TcpState::FinWait2;
    if !is_open || is_orphaned {
        return None;
    }
    let endpoint = |address: &std::net::SocketAddr| (address.ip(), address.port());
    let (local, remote) = (
        endpoint(&entry.local_address),
        endpoint(&entry.remote_address),
    );
    Some(Connection {
        flow: Flow::new(Protocol::Tcp, local, remote).ok()?,
        uid: (entry.inode != 0).then_some(entry.uid),
        cgroup: None,
        usage: None,
        socket: None,
    })
}

impl Plugin for Netstat {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        self.waiter.watch(&stop).context(poll_loop)?;
        let mut failures = LogLimit::new(Level::Error, "netstat: failures");
        while !stop.is_set() {
            let began = Instant::now();
            match self.scan(&events) {
                Ok(Ok(())) => self.scans.observe(began.elapsed().as_secs_f64()),
                Ok(Err(Closed)) => break,
                Err(error) => {
                    self.counters.add(Outcome::ScanFailed);
                    failures.log(began, || format!("netstat: {error}"));
                }
            }
            failures.tick(began);
            let timeout = self.config.period.saturating_sub(began.elapsed());
            self.waiter.wait(Some(timeout)).context(poll_loop)?;
        }
        failures.flush();
        Ok(())
    }
}
