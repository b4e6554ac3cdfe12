//! The skops enricher: what an eBPF program sees of the TCP connections of a cgroup, while they run
//! (`poll`) or whenever their state changes (`transition`).

use std::sync::Arc;

use crate::config;
use crate::error::Result;
use crate::flow::{FlowEvent, Origin, State};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::plugins::{EventSender, Plugin};
use crate::sys::sockops::{Event, Kind, Sockops};
use crate::sys::stop::Stop;

const NAME: &str = "skops";
const SECTION: &str = "enrichers.skops";

outcomes! {
    enum Outcome {
        News = "news",
        Lost = "lost",
    }
}

/// The enricher, with its program attached.
pub struct SkopsEnricher {
    sockops: Sockops,
    counters: Outcomes<Outcome>,
}

impl SkopsEnricher {
    /// Loads and attaches the program.
    pub fn new(settings: &config::Sockops, metrics: &Metrics) -> Result<SkopsEnricher> {
        Ok(SkopsEnricher {
            sockops: Sockops::attach(settings, SECTION)?,
            counters: metrics.plugin(NAME),
        })
    }
}

impl Plugin for SkopsEnricher {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let take = |told: Event| {
            if told.kind == Kind::Closed {
                return Ok(());
            }
            self.counters.add(Outcome::News);
            events.send_patiently(event(told))
        };
        let lost = |count| self.counters.add_many(Outcome::Lost, count);
        self.sockops.follow(NAME, &stop, take, lost)
    }
}

fn event(told: Event) -> FlowEvent {
    FlowEvent {
        skops: Some(Arc::new(told.skops)),
        ..FlowEvent::new(State::Ongoing, told.flow, told.time, Origin::Socket)
    }
}
