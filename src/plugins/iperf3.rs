//! The iperf3 plugin: each TCP connection of a cgroup, as the kernel establishes and closes it, is a
//! flow with a tag out of a list: test traffic that looks like that of many experiments.

use std::hash::{BuildHasher, RandomState};

use ipnet::IpNet;

use super::{EventSender, Plugin};
use crate::config;
use crate::error::Result;
use crate::flow::{FlowEvent, Origin, State, Tag};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::special_networks::is_public;
use crate::sys::sockops::{Event, Kind, Sockops};
use crate::sys::stop::Stop;

const NAME: &str = "iperf3";
const SECTION: &str = "plugins.iperf3";

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
    intake: Intake,
}

/// Makes flow events of what the program says.
struct Intake {
    tags: Tags,
    /// Connections to these, and to addresses that are nobody's on the Internet, are left out.
    internal: Option<Vec<IpNet>>,
    counters: Outcomes<Outcome>,
}

impl Iperf3 {
    /// Loads and attaches the program.
    pub fn new(config: &config::Iperf3, metrics: &Metrics) -> Result<Iperf3> {
        Ok(Iperf3 {
            sockops: Sockops::attach(&config.sockops, SECTION)?,
            intake: Intake {
                tags: Tags {
                    tags: config.tags.clone(),
                    random: config.random.then(RandomState::new),
                    given: 0,
                },
                internal: config.internal_networks.clone(),
                counters: metrics.plugin(NAME),
            },
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

impl Plugin for Iperf3 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let mut intake = self.intake;
        let counters = intake.counters.clone();
        let take = |told| {
            intake
                .event(told)
                .map_or(Ok(()), |event| events.send(event))
        };
        let lost = |count| counters.add_many(Outcome::Lost, count);
        self.sockops.follow(NAME, &stop, take, lost)
    }
}

impl Intake {
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
