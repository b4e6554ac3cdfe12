//! The skops enricher: what an eBPF program sees of the TCP connections of a cgroup, while they run
//! (`poll`) or whenever their state changes (`transition`).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::Level;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::config;
use crate::error::{Context, Result};
use crate::flow::{FlowEvent, Origin, State};
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::plugins::{EventSender, Plugin};
use crate::sys::sockops::{Event, Kind, Sockops};
use crate::sys::stop::Stop;

const NAME: &str = "skops";
const SECTION: &str = "enrichers.skops";
/// How often the buffer is looked at in any case.
const TICK: Duration = Duration::from_millis(250);

outcomes! {
    enum Outcome {
        News = "news",
        Lost = "lost",
    }
}

/// The enricher, with its program attached.
pub struct SkopsEnricher {
    sockops: Sockops,
    poll: Poll,
    counters: Outcomes<Outcome>,
}

impl SkopsEnricher {
    /// Loads and attaches the program.
    pub fn new(settings: &config::Sockops, metrics: &Metrics) -> Result<SkopsEnricher> {
        Ok(SkopsEnricher {
            sockops: Sockops::attach(settings, SECTION)?,
            poll: Poll::new().context(poll_loop)?,
            counters: metrics.plugin(NAME),
        })
    }
}

fn poll_loop() -> String {
    "poll loop of the skops enricher".to_owned()
}

impl Plugin for SkopsEnricher {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, mut stop: Stop) -> Result<()> {
        let buffer = || "buffer of the sockops program".to_owned();
        let mut poll = self.poll;
        let mut reader = self.sockops.reader().context(buffer)?;
        let registry = poll.registry();
        registry
            .register(&mut SourceFd(&reader.fd()), Token(0), Interest::READABLE)
            .and_then(|()| registry.register(&mut stop, Token(1), Interest::READABLE))
            .context(poll_loop)?;
        let mut losses = LogLimit::new(Level::Warn, "skops: losses");
        let mut wakeups = Events::with_capacity(2);
        let mut lost = 0;
        while !stop.is_set() {
            match poll.poll(&mut wakeups, Some(TICK)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error).context(poll_loop);
                }
                _ => {}
            }
            for told in reader.events().context(buffer)? {
                if told.kind == Kind::Closed {
                    continue;
                }
                self.counters.add(Outcome::News);
                if events.send_patiently(event(told)).is_err() {
                    return Ok(());
                }
            }
            let more = self.sockops.lost() - lost;
            if more > 0 {
                lost += more;
                self.counters.add_many(Outcome::Lost, more);
                losses.log(Instant::now(), || {
                    format!("skops: {more} events were lost: the buffer was full")
                });
            }
            losses.tick(Instant::now());
        }
        Ok(())
    }
}

fn event(told: Event) -> FlowEvent {
    FlowEvent {
        skops: Some(Arc::new(told.skops)),
        ..FlowEvent::new(State::Ongoing, told.flow, told.time, Origin::Socket)
    }
}
