//! The netstat plugin: the TCP connections of this host are flows, as `/proc/net/tcp` and
//! `/proc/net/tcp6` show them. It needs no privileges, and sees what is there when it looks: a
//! connection shorter than a period may be missed, and an end is as late as the next scan.

use std::time::Instant;

use jiff::SignedDuration;
use log::Level;
use procfs::net::{TcpNetEntry, TcpState};
use procfs::process::Process;
use prometheus::Histogram;

use super::{Closed, EventSender, Plugin, now};
use crate::config;
use crate::connections::{Connection, Tracker};
use crate::error::{Context, Error, Result};
use crate::flow::{Flow, Origin, Protocol};
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::connection_rules;
use crate::sys::interfaces::LocalAddresses;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

const NAME: &str = "netstat";

outcomes! {
    enum Outcome {
        Started = "started",
        Ended = "ended",
        Scanned = "scanned",
        ScanFailed = "scan_failed",
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
    /// Looks once, so that an unreadable `/proc` is an error now.
    pub fn new(config: &config::Connections, metrics: &Metrics) -> Result<Netstat> {
        let rules = connection_rules::build(&config.rules)?;
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
            scans: metrics.scans(NAME),
        })
    }

    fn scan(&mut self, events: &EventSender) -> Result<std::result::Result<(), Closed>> {
        let found = connections()?;
        self.local.refresh();
        let time = now();
        self.tracker.begin_scan();
        for connection in &found {
            let local = |address: &_| self.local.contains(address);
            if let Some(start) = self.tracker.open(connection, time, local) {
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

/// The connections of both families that are established, also those that are half closed.
fn connections() -> Result<Vec<Connection>> {
    // Of this process: the unit's /proc has nothing but processes.
    let failed = |error| Error::Failed(format!("/proc/self/net: {error}"));
    let process = Process::myself().map_err(failed)?;
    let mut entries = process.tcp().map_err(failed)?;
    match process.tcp6() {
        // A host without IPv6.
        Err(procfs::ProcError::NotFound(_)) => {}
        found => entries.extend(found.map_err(failed)?),
    }
    Ok(entries.iter().filter_map(connection).collect())
}

fn connection(entry: &TcpNetEntry) -> Option<Connection> {
    let open = matches!(
        entry.state,
        TcpState::Established
            | TcpState::FinWait1
            | TcpState::FinWait2
            | TcpState::CloseWait
            | TcpState::LastAck
            | TcpState::Closing
    );
    // One without an owner waits for the other end's FIN alone: it is closed here.
    let orphaned = entry.inode == 0 && entry.state == TcpState::FinWait2;
    if !open || orphaned {
        return None;
    }
    let end = |address: &std::net::SocketAddr| (address.ip(), address.port());
    let (local, remote) = (end(&entry.local_address), end(&entry.remote_address));
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
        let mut trouble = LogLimit::new(Level::Error, "netstat: failures");
        while !stop.is_set() {
            let began = Instant::now();
            match self.scan(&events) {
                Ok(Ok(())) => self.scans.observe(began.elapsed().as_secs_f64()),
                Ok(Err(Closed)) => break,
                Err(error) => {
                    self.counters.add(Outcome::ScanFailed);
                    trouble.log(began, || format!("netstat: {error}"));
                }
            }
            trouble.tick(began);
            let rest = self.config.period.saturating_sub(began.elapsed());
            self.waiter.wait(Some(rest)).context(poll_loop)?;
        }
        trouble.flush();
        Ok(())
    }
}
