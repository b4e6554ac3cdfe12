//! The skops enricher: reports the statistics that an eBPF program collects of the TCP connections of a cgroup,
//! periodically (`poll`) or whenever their TCP state changes (`transition`).

use std::sync::Arc;

use crate::config;
use crate::error::Result;
use crate::event::{FlowEvent, Origin, State};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::plugins::{EventSender, Plugin};
use crate::sys::sockops::{Kind, Report, Sockops};
use crate::sys::stop::Stop;

const NAME: &str = "skops";
const SECTION: &str = "enrichers.skops";

outcomes! {
    enum Outcome {
        Ongoing = "ongoing": "{report|reports} on open sockets",
        Lost = "lost": "{report|reports} lost in the kernel",
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
            sockops: Sockops::attach(&settings.program_settings(), SECTION)?,
            counters: metrics.enricher(NAME),
        })
    }
}

impl Plugin for SkopsEnricher {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let handle = |report: Report| {
            if report.kind == Kind::Closed {
                return Ok(());
            }
            self.counters.add(Outcome::Ongoing);
            events.send_blocking(flow_event(report))
        };
        let count_lost = |count| self.counters.add_many(Outcome::Lost, count);
        self.sockops.follow(NAME, &stop, handle, count_lost)
    }
}

fn flow_event(report: Report) -> FlowEvent {
    FlowEvent {
        skops: Some(Arc::new(report.skops)),
        ..FlowEvent::new(State::Ongoing, report.flow, report.time, Origin::Socket)
    }
}
