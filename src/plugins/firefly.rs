//! The firefly plugin: receives the fireflies that storage services and other daemons send when a transfer starts and
//! when it ends.
//!
//! The content of a firefly is passed on unchanged: see [`crate::firefly`]. Datagrams that the kernel drops because the
//! receive buffer is full are counted, and rejected datagrams are counted by reason. A datagram is accepted only from the
//! networks of `allowedSources`, since anyone may put any address into it.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use jiff::Timestamp;
use log::Level;

use super::{Closed, EventSender, Plugin, now};
use crate::config;
use crate::error::{Context, Result};
use crate::event::Sender;
use crate::firefly::{self, Rejection};
use crate::logging::{LogLimit, quote};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::handover::Handover;
use crate::sys::interfaces::LocalAddresses;
use crate::sys::stop::Stop;
use crate::sys::udp_receiver::{Datagram, ReceiveBuffer, Receiver};
use crate::sys::waiter::Waiter;

const NAME: &str = "firefly";
/// How often the kernel's count of dropped datagrams is read.
const DROP_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stop keeps reading while datagrams keep arriving.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

outcomes! {
    enum Outcome {
        Accepted = "accepted": "accepted: {datagram|datagrams}",
        TooLong = "rejected_length": "rejected: {datagram|datagrams} over the length limit",
        Source = "rejected_source": "rejected: {datagram|datagrams} from addresses outside allowedSources",
        KernelDropped = "kernel_dropped": "dropped by the kernel: {datagram|datagrams}",
    }
}

/// The plugin, with its socket bound.
pub struct Firefly {
    config: config::FireflyPlugin,
    socket: Receiver,
    waiter: Waiter,
    counters: Outcomes<Outcome>,
    rejections: Outcomes<Rejection>,
    handover: Handover,
    allowed: AllowedSources,
}

/// Whose datagrams are accepted.
enum AllowedSources {
    /// Everybody's: the socket is bound to loopback, where only this host sends to.
    All,
    /// Those from networks that this host has an address in.
    OwnNetworks(LocalAddresses),
    /// Those from these networks.
    Networks(Vec<IpNet>),
}

impl AllowedSources {
    fn new(config: &config::FireflyPlugin) -> std::io::Result<AllowedSources> {
        Ok(match &config.allowed_sources {
            Some(networks) => AllowedSources::Networks(networks.clone()),
            None if config.bind.ip().is_loopback() => AllowedSources::All,
            None => AllowedSources::OwnNetworks(LocalAddresses::watch()?),
        })
    }

    fn refresh(&mut self) {
        if let AllowedSources::OwnNetworks(local) = self {
            local.refresh();
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match self {
            AllowedSources::All => true,
            AllowedSources::OwnNetworks(local) => local.is_in_own_network(&address),
            AllowedSources::Networks(networks) => networks.iter().any(|n| n.contains(&address)),
        }
    }
}

impl Firefly {
    /// Binds the socket. Takes over the socket `inherited` from the predecessor instead, with the datagrams that wait
    /// in it, if it has the configured address.
    pub fn new(
        config: &config::FireflyPlugin,
        metrics: &Metrics,
        handover: Handover,
        inherited: Option<OwnedFd>,
    ) -> Result<Firefly> {
        let inherited = inherited.and_then(|fd| Receiver::adopt(fd, config.bind));
        let socket = inherited.map_or_else(|| Receiver::bind(config.bind), Ok);
        let socket = socket.context(|| {
            format!(
                "UDP {} (plugins.firefly.bindAddress, bindPort)",
                config.bind
            )
        })?;
        let waiter = Waiter::new().context(poll_loop)?;
        waiter.watch(&socket).context(poll_loop)?;
        Ok(Firefly {
            config: config.clone(),
            socket,
            waiter,
            counters: metrics.plugin(NAME),
            rejections: metrics.plugin(NAME),
            handover,
            allowed: AllowedSources::new(config).context(|| "addresses of this host".to_owned())?,
        })
    }
}

fn poll_loop() -> String {
    "poll loop of the firefly plugin".to_owned()
}

impl Plugin for Firefly {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        self.waiter.watch(&stop).context(poll_loop)?;
        let mut handler = DatagramHandler {
            counters: &self.counters,
            rejections: &self.rejections,
            buffer_size: self.config.buffer_size,
            rejected_log: LogLimit::new(Level::Warn, "firefly: rejected datagrams"),
            allowed: &mut self.allowed,
            events,
        };
        let mut buffer = ReceiveBuffer::new(self.config.buffer_size);
        let mut dropped_log = LogLimit::new(Level::Warn, "firefly: dropped datagrams");
        let mut last_check = Instant::now();
        let mut more = false;
        let mut stop_seen: Option<Instant> = None;
        loop {
            let timeout = if more {
                Duration::ZERO
            } else {
                DROP_CHECK_INTERVAL
            };
            self.waiter.wait(Some(timeout)).context(poll_loop)?;
            handler.allowed.refresh();
            let time = now();
            let mut closed = Ok(());
            let received = self
                .socket
                .receive(&mut buffer, |datagram| {
                    if closed.is_ok() {
                        closed = handler.handle(&datagram, time);
                    }
                })
                .context(|| format!("UDP {}", self.config.bind))?;
            more = received > 0;
            let now = Instant::now();
            if stop.is_set() {
                let since = *stop_seen.get_or_insert(now);
                if !more || now.duration_since(since) >= DRAIN_TIMEOUT {
                    closed = Err(Closed);
                }
            }
            if closed.is_err() || now.duration_since(last_check) >= DROP_CHECK_INTERVAL {
                last_check = now;
                let dropped = self.socket.take_dropped();
                if dropped > 0 {
                    self.counters
                        .add_many(Outcome::KernelDropped, u64::from(dropped));
                    dropped_log.log(now, || {
                        let datagrams = if dropped == 1 { "datagram" } else { "datagrams" };
                        format!("firefly: the kernel dropped {dropped} {datagrams}: the receive buffer was full")
                    });
                }
                handler.rejected_log.tick(now);
                dropped_log.tick(now);
            }
            if closed.is_err() {
                break;
            }
        }
        // The successor reads the datagrams that arrive from now on.
        self.handover.leave(NAME, self.socket.as_fd());
        handler.rejected_log.flush();
        dropped_log.flush();
        Ok(())
    }
}

/// Decodes datagrams, sends their flow events, and counts and logs those that are rejected.
struct DatagramHandler<'a> {
    counters: &'a Outcomes<Outcome>,
    rejections: &'a Outcomes<Rejection>,
    buffer_size: usize,
    rejected_log: LogLimit,
    allowed: &'a mut AllowedSources,
    events: EventSender,
}

impl DatagramHandler<'_> {
    fn handle(
        &mut self,
        datagram: &Datagram<'_>,
        time: Timestamp,
    ) -> std::result::Result<(), Closed> {
        let sender = datagram.from().map(|from| from.ip());
        if !sender.is_some_and(|sender| self.allowed.contains(sender)) {
            self.counters.add(Outcome::Source);
            self.log_rejected(datagram, || {
                "the sender is not in plugins.firefly.allowedSources".to_owned()
            });
            return Ok(());
        }
        if datagram.truncated {
            self.counters.add(Outcome::TooLong);
            let size = self.buffer_size;
            self.log_rejected(datagram, || {
                format!("longer than {size} bytes (plugins.firefly.bufferSize)")
            });
            return Ok(());
        }
        match firefly::decode(datagram.bytes, time) {
            Ok(mut event) => {
                event.sender = sender.map(Sender::Address);
                self.counters.add(Outcome::Accepted);
                self.events.send(event)
            }
            Err(error) => {
                self.rejections.add(error.reason);
                self.log_rejected(datagram, || error.to_string());
                Ok(())
            }
        }
    }

    fn log_rejected(&mut self, datagram: &Datagram<'_>, reason: impl FnOnce() -> String) {
        self.rejected_log.log(Instant::now(), || {
            let from = datagram
                .from()
                .map_or_else(String::new, |from| format!(" from {from}"));
            let shown = quote(datagram.bytes);
            format!("firefly: rejected datagram{from}: {}: {shown}", reason())
        });
    }
}
