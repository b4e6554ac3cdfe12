//! The firefly plugin: storage services, and other daemons, send a firefly when a transfer starts and
//! when it ends.
//!
//! What a firefly carries is passed on as it came: see [`crate::firefly`]. Datagrams that the kernel
//! drops for want of room are counted, and so are those that are no fireflies, by reason.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use log::Level;

use super::{Closed, EventSender, Plugin, now};
use crate::config;
use crate::error::{Context, Result};
use crate::firefly::{self, Rejection};
use crate::log_limit::{LogLimit, quote};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;
use crate::sys::udp_receiver::{Datagram, Receiver, Room};
use crate::sys::waiter::Waiter;

const NAME: &str = "firefly";
/// How often the kernel is asked what it dropped.
const TICK: Duration = Duration::from_secs(1);
/// How long a stop goes on reading while more keeps coming.
const DRAIN: Duration = Duration::from_millis(500);

outcomes! {
    enum Taken {
        Accepted = "accepted",
        TooLong = "too_long",
        KernelDropped = "kernel_dropped",
    }
}

/// The plugin, with its socket bound.
pub struct Firefly {
    config: config::FireflyPlugin,
    socket: Receiver,
    waiter: Waiter,
    taken: Outcomes<Taken>,
    rejected: Outcomes<Rejection>,
    handover: Handover,
}

impl Firefly {
    /// Binds the socket, or takes over that of the former process, with what waits in it.
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
            taken: metrics.plugin(NAME),
            rejected: metrics.plugin(NAME),
            handover,
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
        let mut intake = Intake {
            taken: &self.taken,
            rejected: &self.rejected,
            buffer_size: self.config.buffer_size,
            complaints: LogLimit::new(Level::Warn, "firefly: rejected datagrams"),
            events,
        };
        let mut room = Room::new(self.config.buffer_size);
        let mut losses = LogLimit::new(Level::Warn, "firefly: losses");
        let mut asked = Instant::now();
        let mut more = false;
        let mut stopping: Option<Instant> = None;
        loop {
            let patience = if more { Duration::ZERO } else { TICK };
            self.waiter.wait(Some(patience)).context(poll_loop)?;
            let time = now();
            let mut closed = Ok(());
            let received = self
                .socket
                .receive(&mut room, |datagram| {
                    if closed.is_ok() {
                        closed = intake.take(&datagram, time);
                    }
                })
                .context(|| format!("UDP {}", self.config.bind))?;
            more = received > 0;
            let now = Instant::now();
            if stop.is_set() {
                let since = *stopping.get_or_insert(now);
                if !more || now.duration_since(since) >= DRAIN {
                    closed = Err(Closed);
                }
            }
            if closed.is_err() || now.duration_since(asked) >= TICK {
                asked = now;
                let dropped = self.socket.dropped();
                if dropped > 0 {
                    self.taken
                        .add_many(Taken::KernelDropped, u64::from(dropped));
                    losses.log(now, || {
                        format!("firefly: the kernel dropped {dropped} datagrams: the receive buffer was full")
                    });
                }
                intake.complaints.tick(now);
                losses.tick(now);
            }
            if closed.is_err() {
                break;
            }
        }
        // With what comes from now on.
        self.handover.leave(NAME, self.socket.as_fd());
        intake.complaints.flush();
        losses.flush();
        Ok(())
    }
}

/// What becomes of a datagram.
struct Intake<'a> {
    taken: &'a Outcomes<Taken>,
    rejected: &'a Outcomes<Rejection>,
    buffer_size: usize,
    complaints: LogLimit,
    events: EventSender,
}

impl Intake<'_> {
    fn take(
        &mut self,
        datagram: &Datagram<'_>,
        time: Timestamp,
    ) -> std::result::Result<(), Closed> {
        if datagram.cut {
            self.taken.add(Taken::TooLong);
            let size = self.buffer_size;
            self.complain(datagram, || {
                format!("longer than {size} bytes (plugins.firefly.bufferSize)")
            });
            return Ok(());
        }
        match firefly::decode(datagram.bytes, time) {
            Ok(event) => {
                self.taken.add(Taken::Accepted);
                self.events.send(event)
            }
            Err(error) => {
                self.rejected.add(error.reason);
                self.complain(datagram, || error.to_string());
                Ok(())
            }
        }
    }

    fn complain(&mut self, datagram: &Datagram<'_>, why: impl FnOnce() -> String) {
        self.complaints.log(Instant::now(), || {
            let from = datagram
                .from()
                .map_or_else(String::new, |from| format!(" from {from}"));
            let shown = quote(datagram.bytes);
            format!("firefly: rejected datagram{from}: {}: {shown}", why())
        });
    }
}
