//! The iperf3 plugin: each TCP connection of a cgroup, as the kernel establishes and closes it, is a
//! flow with a tag out of a list: test traffic that looks like that of many experiments.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use log::Level;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::{EventSender, Plugin};
use crate::config;
use crate::error::{Context, Result};
use crate::flow::{FlowEvent, Origin, State, Tag};
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::special_networks::is_public;
use crate::sys::sockops::{Event, Kind, Sockops};
use crate::sys::stop::Stop;

const NAME: &str = "iperf3";
const SECTION: &str = "plugins.iperf3";
/// How often the buffer is looked at in any case.
const TICK: Duration = Duration::from_millis(250);

outcomes! {
    enum Outcome {
        Started = "started",
        Ended = "ended",
        Lost = "lost",
    }
}

/// The plugin, with its program attached.
pub struct Iperf3 {
    sockops: Sockops,
    tags: Tags,
    /// Connections to these, and to addresses that are nobody's on the Internet, are left out.
    internal: Option<Vec<IpNet>>,
    poll: Poll,
    counters: Outcomes<Outcome>,
}

impl Iperf3 {
    /// Loads and attaches the program.
    pub fn new(config: &config::Iperf3, metrics: &Metrics) -> Result<Iperf3> {
        Ok(Iperf3 {
            sockops: Sockops::attach(&config.sockops, SECTION)?,
            tags: Tags {
                tags: config.tags.clone(),
                random: config.random.then(RandomState::new),
                given: 0,
            },
            internal: config.internal_networks.clone(),
            poll: Poll::new().context(poll_loop)?,
            counters: metrics.plugin(NAME),
        })
    }
}

/// The list of tags, and where in it we are.
struct Tags {
    tags: Vec<Tag>,
    random: Option<RandomState>,
    given: usize,
}

impl Tags {
    fn next(&mut self) -> Tag {
        let n = match &self.random {
            // A keyed hash of a counter is random enough for test traffic.
            Some(random) => random.hash_one(self.given) as usize,
            None => self.given,
        };
        self.given += 1;
        self.tags[n % self.tags.len()]
    }
}

fn poll_loop() -> String {
    "poll loop of the iperf3 plugin".to_owned()
}

impl Plugin for Iperf3 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(mut self: Box<Self>, events: EventSender, mut stop: Stop) -> Result<()> {
        let buffer = || "buffer of the sockops program".to_owned();
        let mut reader = self.sockops.reader().context(buffer)?;
        let registry = self.poll.registry();
        registry
            .register(&mut SourceFd(&reader.fd()), Token(0), Interest::READABLE)
            .and_then(|()| registry.register(&mut stop, Token(1), Interest::READABLE))
            .context(poll_loop)?;
        let mut losses = LogLimit::new(Level::Warn, "iperf3: losses");
        let mut wakeups = Events::with_capacity(2);
        let mut lost = 0;
        while !stop.is_set() {
            match self.poll.poll(&mut wakeups, Some(TICK)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error).context(poll_loop);
                }
                _ => {}
            }
            for told in reader.events().context(buffer)? {
                let Some(event) = self.event(told) else {
                    continue;
                };
                if events.send(event).is_err() {
                    return Ok(());
                }
            }
            let more = self.sockops.lost() - lost;
            if more > 0 {
                lost += more;
                self.counters.add_many(Outcome::Lost, more);
                losses.log(Instant::now(), || {
                    format!("iperf3: {more} connections were not heard of: the buffer was full")
                });
            }
            losses.tick(Instant::now());
        }
        Ok(())
    }
}

impl Iperf3 {
    /// The end has no counts: those of `sock_diag` are exact, and come in the same moment.
    fn event(&mut self, told: Event) -> Option<FlowEvent> {
        let remote = told.flow.destination.address;
        let left_out = |internal: &Vec<IpNet>| {
            !is_public(remote) || internal.iter().any(|net| net.contains(&remote))
        };
        if self.internal.as_ref().is_some_and(left_out) {
            return None;
        }
        let event = |state| FlowEvent::new(state, told.flow, told.time, Origin::Iperf3);
        match told.kind {
            Kind::Connected | Kind::Accepted => {
                self.counters.add(Outcome::Started);
                Some(FlowEvent {
                    tag: Some(self.tags.next()),
                    ..event(State::Start)
                })
            }
            Kind::Closed => {
                self.counters.add(Outcome::Ended);
                Some(event(State::End))
            }
            Kind::News => None,
        }
    }
}
