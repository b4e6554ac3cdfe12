//! The daemon's own counters: every part adds to them, `/metrics` and the status line read them.
//!
//! They are the `prometheus` crate's, so that there is one set of numbers. A counter is looked up by
//! its labels once, when its part of the daemon is built; adding to it is one atomic instruction.

use std::fmt::Write as _;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// Bounds of the buckets of scan durations, in seconds.
const SCAN_BUCKETS: [f64; 8] = [0.0001, 0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0];

/// What can become of something that is counted: a fixed set of words, used as a label's values.
pub trait Outcome: Copy + 'static {
    /// Every outcome, in the order of [`Outcome::index`].
    const ALL: &'static [Self];
    /// The word in metrics and in the status line.
    fn word(self) -> &'static str;
    /// Position in [`Outcome::ALL`].
    fn index(self) -> usize;
}

/// Declares an enum of outcomes and the word of each.
macro_rules! outcomes {
    ($(#[$meta:meta])* $visibility:vis enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name { $($(#[$doc])* $variant,)+ }
        impl $crate::metrics::Outcome for $name {
            const ALL: &'static [Self] = &[$($name::$variant,)+];
            fn word(self) -> &'static str {
                match self { $($name::$variant => $word,)+ }
            }
            fn index(self) -> usize { self as usize }
        }
    };
}
pub(crate) use outcomes;

/// A counter for every outcome of `O`.
#[derive(Clone)]
pub struct Outcomes<O> {
    counters: Vec<IntCounter>,
    outcome: std::marker::PhantomData<O>,
}

impl<O: Outcome> Outcomes<O> {
    fn new(family: &IntCounterVec, part: Option<&str>) -> Outcomes<O> {
        let counter = |outcome: &O| match part {
            Some(part) => family.with_label_values(&[part, outcome.word()]),
            None => family.with_label_values(&[outcome.word()]),
        };
        Outcomes {
            counters: O::ALL.iter().map(counter).collect(),
            outcome: std::marker::PhantomData,
        }
    }

    /// Counts one.
    pub fn add(&self, outcome: O) {
        self.add_many(outcome, 1);
    }

    /// Counts `n`.
    pub fn add_many(&self, outcome: O, n: u64) {
        self.counters[outcome.index()].inc_by(n);
    }

    /// How many so far.
    pub fn get(&self, outcome: O) -> u64 {
        self.counters[outcome.index()].get()
    }
}

/// All families of the daemon's own counters.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// What the operating system and the build say, for `/metrics` alone.
    process: Registry,
    scans: HistogramVec,
    plugin_events: IntCounterVec,
    backend_events: IntCounterVec,
    dispatcher_events: IntCounterVec,
    journal_writes: IntCounterVec,
    registry_updates: IntCounterVec,
    queue_depth: IntGaugeVec,
    queue_high_water: IntGaugeVec,
    /// Flows that are open now.
    pub flows_open: IntGauge,
    /// `ongoing` events that found the dispatcher's queue full.
    pub ongoing_dropped: IntCounter,
    /// Interfaces that the marker is attached to.
    pub marker_interfaces: IntGauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// Every family, with nothing counted yet.
    pub fn new() -> Metrics {
        let (registry, process) = (Registry::new(), Registry::new());
        let registered = process.register(Box::new(ProcessCollector::for_self()));
        registered.expect("the names of a process' metrics are unique");
        let build = Opts::new(
            "flowd_build_info",
            "The version of the daemon, in the label version; always 1.",
        );
        let build = IntGaugeVec::new(build, &["version"]);
        let build = register(&process, build);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauges = |name: &str, help: &str| {
            register(
                &registry,
                IntGaugeVec::new(Opts::new(name, help), &["queue"]),
            )
        };
        Metrics {
            plugin_events: counters(
                "flowd_plugin_events_total",
                "What each plugin was given, by what became of it (flow events and rejected input).",
                &["plugin", "outcome"],
            ),
            backend_events: counters(
                "flowd_backend_events_total",
                "What each backend did, by outcome (for the firefly backend: datagrams).",
                &["backend", "outcome"],
            ),
            dispatcher_events: counters(
                "flowd_dispatcher_events_total",
                "Flow events that reached the dispatcher, by what the table of open flows made of them.",
                &["outcome"],
            ),
            journal_writes: counters(
                "flowd_journal_writes_total",
                "Writes to the journal of open flows, by outcome; a write carries a batch of events.",
                &["outcome"],
            ),
            registry_updates: counters(
                "flowd_registry_updates_total",
                "Updates of the SciTags registry, by outcome.",
                &["outcome"],
            ),
            queue_depth: gauges("flowd_queue_depth", "Flow events waiting in a queue."),
            queue_high_water: gauges(
                "flowd_queue_high_water",
                "The most flow events that have waited in a queue at once.",
            ),
            flows_open: register(
                &registry,
                IntGauge::new("flowd_flows_open", "Flows that are open now."),
            ),
            ongoing_dropped: register(
                &registry,
                IntCounter::new(
                    "flowd_ongoing_dropped_total",
                    "Ongoing events dropped because a queue was full.",
                ),
            ),
            marker_interfaces: register(
                &registry,
                IntGauge::new(
                    "flowd_marker_interfaces",
                    "Interfaces that the marker is attached to.",
                ),
            ),
            scans: register(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "flowd_scan_duration_seconds",
                        "Time that a scan of all sockets took, in seconds, by who scanned.",
                    )
                    .buckets(SCAN_BUCKETS.to_vec()),
                    &["scanner"],
                ),
            ),
            process,
            registry,
        }
    }

    /// The counters of a plugin.
    pub fn plugin<O: Outcome>(&self, plugin: &str) -> Outcomes<O> {
        Outcomes::new(&self.plugin_events, Some(plugin))
    }

    /// The counters of a backend.
    pub fn backend<O: Outcome>(&self, backend: &str) -> Outcomes<O> {
        Outcomes::new(&self.backend_events, Some(backend))
    }

    /// The counters of the dispatcher.
    pub fn dispatcher<O: Outcome>(&self) -> Outcomes<O> {
        Outcomes::new(&self.dispatcher_events, None)
    }

    /// The counters of the journal.
    pub fn journal<O: Outcome>(&self) -> Outcomes<O> {
        Outcomes::new(&self.journal_writes, None)
    }

    /// The durations of the scans of a plugin or enricher, in seconds.
    pub fn scans(&self, scanner: &str) -> Histogram {
        self.scans.with_label_values(&[scanner])
    }

    /// Every family as it is now, for `/metrics`; but not the open flows, which are shown by tag.
    pub fn gather(&self) -> Vec<MetricFamily> {
        let mut families = self.registry.gather();
        families.retain(|family| family.name() != "flowd_flows_open");
        families.extend(self.process.gather());
        families
    }

    /// The counters of updates of the registry.
    pub fn registry_updates<O: Outcome>(&self) -> Outcomes<O> {
        Outcomes::new(&self.registry_updates, None)
    }

    /// Depth and high-water mark of a queue.
    pub fn queue(&self, queue: &str) -> Queue {
        Queue {
            depth: self.queue_depth.with_label_values(&[queue]),
            high_water: self.queue_high_water.with_label_values(&[queue]),
        }
    }

    /// All values, in the order of their names.
    pub fn samples(&self) -> Vec<Sample> {
        let mut samples = Vec::new();
        let families = self.registry.gather().into_iter();
        let is_histogram = |family: &MetricFamily| {
            family.get_field_type() == prometheus::proto::MetricType::HISTOGRAM
        };
        for family in families.filter(|family| !is_histogram(family)) {
            for metric in family.get_metric() {
                let value = match family.get_field_type() {
                    prometheus::proto::MetricType::COUNTER => metric.get_counter().get_value(),
                    _ => metric.get_gauge().get_value(),
                };
                let label =
                    |l: &prometheus::proto::LabelPair| (l.name().to_owned(), l.value().to_owned());
                samples.push(Sample {
                    name: family.name().to_owned(),
                    labels: metric.get_label().iter().map(label).collect(),
                    value: value as i64,
                });
            }
        }
        samples
    }

    /// All values that are not zero, in one line: `family label values value`, by commas.
    pub fn summary(&self) -> String {
        let mut line = String::new();
        for sample in self.samples().iter().filter(|sample| sample.value != 0) {
            let name = sample.name.strip_prefix("flowd_").unwrap_or(&sample.name);
            let name = name.strip_suffix("_total").unwrap_or(name);
            line += if line.is_empty() { "" } else { ", " };
            line += name;
            for (_, value) in &sample.labels {
                line += " ";
                line += value;
            }
            // Writing to a String cannot fail.
            let _ = write!(line, " {}", sample.value);
        }
        line
    }
}

/// A value of a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The name of the family.
    pub name: String,
    /// Names and values, in the order of the names.
    pub labels: Vec<(String, String)>,
    /// All of the daemon's own are whole numbers.
    pub value: i64,
}

impl Sample {
    /// The value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        let found = self.labels.iter().find(|(label, _)| label == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Depth and high-water mark of a queue, set by the thread that reads it.
#[derive(Clone)]
pub struct Queue {
    depth: IntGauge,
    high_water: IntGauge,
}

impl Queue {
    /// Notes that `waiting` events wait.
    pub fn observe(&self, waiting: usize) {
        let waiting = waiting as i64;
        self.depth.set(waiting);
        if waiting > self.high_water.get() {
            self.high_water.set(waiting);
        }
    }
}

/// Names and labels are constants of this file: that they are well-formed and distinct is what the
/// test below shows.
fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    family: prometheus::Result<C>,
) -> C {
    let family = family.expect("the name of a metric is well-formed");
    registry
        .register(Box::new(family.clone()))
        .expect("the name of a metric is unique");
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    outcomes! {
        enum Sample { Good = "good", Bad = "bad", }
    }

    #[test]
    fn the_summary_names_what_was_counted_and_nothing_else() {
        let metrics = Metrics::new();
        let counters = metrics.plugin::<Sample>("named_pipe");
        counters.add_many(Sample::Bad, 3);
        metrics.flows_open.set(7);
        assert_eq!(
            metrics.summary(),
            "flows_open 7, plugin_events bad named_pipe 3"
        );
        assert_eq!(counters.get(Sample::Bad), 3);
        assert_eq!(counters.get(Sample::Good), 0);
    }

    #[test]
    fn a_queue_remembers_its_highest_level() {
        let metrics = Metrics::new();
        let queue = metrics.queue("dispatcher");
        queue.observe(9);
        queue.observe(2);
        assert_eq!(
            metrics.summary(),
            "queue_depth dispatcher 2, queue_high_water dispatcher 9"
        );
    }
}
