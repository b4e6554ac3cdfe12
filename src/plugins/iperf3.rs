//! The iperf3 plugin: reports each TCP connection of a cgroup as a flow, from its establishment to its close, with a
//! tag from a list. The test traffic looks like that of many experiments.

use std::hash::{BuildHasher, RandomState};

use ipnet::IpNet;

use super::{EventSender, Plugin};
use crate::config;
use crate::error::Result;
use crate::event::{FlowEvent, Origin, State};
use crate::flow::Tag;
use crate::flow::special_networks::is_public;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::sockops::{Kind, Report, Sockops};
use crate::sys::stop::Stop;

const NAME: &str = "iperf3";
const SECTION: &str = "plugins.iperf3";

outcomes! {
    enum Outcome {
        Started = "started": "{connection|connections} started",
        Ended = "ended": "{connection|connections} ended",
        Lost = "lost": "{report|reports} lost in the kernel",
    }
}

/// The plugin, with its program attached.
pub struct Iperf3 {
    sockops: Sockops,
    tagger: Tagger,
}

/// Turns the reports of the program into flow events.
struct Tagger {
    tags: Tags,
    /// If set, connections to these networks and to special-purpose addresses are left out.
    internal: Option<Vec<IpNet>>,
    counters: Outcomes<Outcome>,
}

impl Iperf3 {
    /// Loads and attaches the program.
    pub fn new(config: &config::Iperf3, metrics: &Metrics) -> Result<Iperf3> {
        Ok(Iperf3 {
            sockops: Sockops::attach(&config.sockops.program_settings(), SECTION)?,
            tagger: Tagger {
                tags: Tags {
                    tags: config.tags.clone(),
                    random: config.random.then(RandomState::new),
                    assigned: 0,
                },
                internal: config.internal_networks.clone(),
                counters: metrics.plugin(NAME),
            },
        })
    }
}

/// Assigns the tags of a list, in order or at random.
struct Tags {
    tags: Vec<Tag>,
    random: Option<RandomState>,
    /// The number of tags assigned so far.
    assigned: usize,
}

impl Tags {
    fn next(&mut self) -> Tag {
        let n = match &self.random {
            // A keyed hash of a counter is random enough for test traffic.
            Some(random) => random.hash_one(self.assigned) as usize,
            None => self.assigned,
        };
        self.assigned += 1;
        self.tags[n % self.tags.len()]
    }
}

impl Plugin for Iperf3 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let mut tagger = self.tagger;
        let counters = tagger.counters.clone();
        let handle = |report| {
            tagger
                .flow_event(report)
                .map_or(Ok(()), |event| events.send(event))
        };
        let count_lost = |count| counters.add_many(Outcome::Lost, count);
        self.sockops.follow(NAME, &stop, handle, count_lost)
    }
}

impl Tagger {
    /// An end carries no byte counts: `sock_diag` reports exact ones at the same moment.
    fn flow_event(&mut self, report: Report) -> Option<FlowEvent> {
        let remote = report.flow.destination.address;
        let is_left_out = |internal: &Vec<IpNet>| {
            !is_public(remote) || internal.iter().any(|net| net.contains(&remote))
        };
        if self.internal.as_ref().is_some_and(is_left_out) {
            return None;
        }
        let event = |state| FlowEvent::new(state, report.flow, report.time, Origin::Iperf3);
        match report.kind {
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
            Kind::Ongoing => None,
        }
    }
}
