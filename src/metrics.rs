//! The daemon's own counters: each part adds to them; `/metrics`, `status` and the status line read them.
//!
//! They are counters of the `prometheus` crate, so that there is one set of numbers. A counter is looked up by its
//! labels once, when its part of the daemon is built. Adding to it is one atomic instruction.

pub mod exposition;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

/// Bounds of the buckets of scan durations, in seconds.
const SCAN_BUCKETS: [f64; 8] = [0.0001, 0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0];

/// The possible outcomes of something that is counted.
pub trait Outcome: Copy + 'static {
    /// Every outcome, in the order of [`Outcome::index`].
    const ALL: &'static [Self];
    /// The value of the label `outcome`.
    fn word(self) -> &'static str;
    /// The template of the English text for `flowd-rs status`: see [`Count::text`].
    fn text(self) -> &'static str;
    /// Position in [`Outcome::ALL`].
    fn index(self) -> usize;
}

/// Declares an enum of outcomes, each with its label value and its text.
macro_rules! outcomes {
    ($(#[$meta:meta])* $visibility:vis enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal: $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        $visibility enum $name { $($(#[$doc])* $variant,)+ }
        impl $crate::metrics::Outcome for $name {
            const ALL: &'static [Self] = &[$($name::$variant,)+];
            fn word(self) -> &'static str {
                match self { $($name::$variant => $word,)+ }
            }
            fn text(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
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
    /// Counts one.
    pub fn add(&self, outcome: O) {
        self.add_many(outcome, 1);
    }

    /// Counts `n`.
    pub fn add_many(&self, outcome: O, n: u64) {
        self.counters[outcome.index()].inc_by(n);
    }

    /// The count so far.
    pub fn get(&self, outcome: O) -> u64 {
        self.counters[outcome.index()].get()
    }
}

/// An outcome and how often it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The value of the label `outcome`.
    pub outcome: &'static str,
    /// How often.
    pub count: u64,
    /// What happened, in English: `rejected: 2 lines with the wrong number of fields`.
    pub text: String,
}

/// Fills in the count of a template: a group `{one|many}` becomes the count and the matching word. A second
/// group becomes the matching word alone.
pub fn count_text(template: &str, count: u64) -> String {
    let mut text = String::new();
    let mut groups = template.split(['{', '}']);
    text += groups.next().unwrap_or_default();
    let mut number = format!("{count} ");
    while let (Some(group), Some(rest)) = (groups.next(), groups.next()) {
        let (one, many) = group.split_once('|').unwrap_or((group, group));
        text += &std::mem::take(&mut number);
        text += if count == 1 { one } else { many };
        text += rest;
    }
    text
}

/// The part of the daemon that counts: the kind and the name, which is empty where there is only one.
type CountedPart = (&'static str, String);
/// The counters of each part, with the value of the label `outcome` and the template of the text.
type CountersByPart = BTreeMap<CountedPart, Vec<(&'static str, &'static str, IntCounter)>>;

/// All families of the daemon's own counters.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    /// Metrics of the process and the build, for `/metrics` alone.
    process: Registry,
    /// Locked when a part of the daemon is built and when `status` is asked, never to count.
    counted: Arc<Mutex<CountersByPart>>,
    scans: HistogramVec,
    plugin_events: IntCounterVec,
    enricher_events: IntCounterVec,
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
    /// Dumps of all sockets, each of which may serve several scans.
    pub socket_dumps: IntCounter,
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
            "Version of the daemon, in the label version; always 1.",
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
                "Flow events and rejected input of each plugin, by outcome.",
                &["plugin", "outcome"],
            ),
            enricher_events: counters(
                "flowd_enricher_events_total",
                "Socket reports and scans of each enricher, by outcome.",
                &["enricher", "outcome"],
            ),
            backend_events: counters(
                "flowd_backend_events_total",
                "Actions of each backend, by outcome (for the firefly backend: datagrams).",
                &["backend", "outcome"],
            ),
            dispatcher_events: counters(
                "flowd_dispatcher_events_total",
                "Flow events processed by the dispatcher, by their effect on the table of open flows.",
                &["outcome"],
            ),
            journal_writes: counters(
                "flowd_journal_writes_total",
                "Writes to the journal of open flows, by outcome; one write carries a batch of events.",
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
                "Highest number of flow events that have waited in a queue.",
            ),
            flows_open: register(&registry, IntGauge::new("flowd_flows_open", "Open flows.")),
            ongoing_dropped: register(
                &registry,
                IntCounter::new(
                    "flowd_ongoing_dropped_total",
                    "Ongoing events dropped because a queue was full.",
                ),
            ),
            socket_dumps: register(
                &registry,
                IntCounter::new(
                    "flowd_socket_dumps_total",
                    "Dumps of all sockets by the kernel (sock_diag); one may serve several scans.",
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
                        "Duration of a scan of all sockets, in seconds, by scanner.",
                    )
                    .buckets(SCAN_BUCKETS.to_vec()),
                    &["scanner"],
                ),
            ),
            counted: Arc::default(),
            process,
            registry,
        }
    }

    fn outcomes<O: Outcome>(
        &self,
        family: &IntCounterVec,
        kind: &'static str,
        name: &str,
    ) -> Outcomes<O> {
        let counter = |outcome: &O| match name {
            "" => family.with_label_values(&[outcome.word()]),
            name => family.with_label_values(&[name, outcome.word()]),
        };
        let counters: Vec<IntCounter> = O::ALL.iter().map(counter).collect();
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let part = counted.entry((kind, name.to_owned())).or_default();
        for (outcome, counter) in O::ALL.iter().zip(&counters) {
            // A part that a reload replaces goes on with the counters of the one before.
            if part.iter().all(|(word, ..)| *word != outcome.word()) {
                part.push((outcome.word(), outcome.text(), counter.clone()));
            }
        }
        Outcomes {
            counters,
            outcome: std::marker::PhantomData,
        }
    }

    /// The counts of a part of the daemon that are not zero. `kind` is `plugin`, `enricher` or `backend`; or
    /// `dispatcher`, `journal` or `registry`, which have no `name`.
    pub fn counts(&self, kind: &'static str, name: &str) -> Vec<Count> {
        let counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let part = counted.get(&(kind, name.to_owned()));
        let count = |(outcome, text, counter): &(&'static str, &str, IntCounter)| Count {
            outcome,
            count: counter.get(),
            text: count_text(text, counter.get()),
        };
        let counts = part.into_iter().flatten().map(count);
        counts.filter(|count| count.count != 0).collect()
    }

    /// The counters of a plugin.
    pub fn plugin<O: Outcome>(&self, plugin: &str) -> Outcomes<O> {
        self.outcomes(&self.plugin_events, "plugin", plugin)
    }

    /// The counters of an enricher.
    pub fn enricher<O: Outcome>(&self, enricher: &str) -> Outcomes<O> {
        self.outcomes(&self.enricher_events, "enricher", enricher)
    }

    /// The counters of a backend.
    pub fn backend<O: Outcome>(&self, backend: &str) -> Outcomes<O> {
        self.outcomes(&self.backend_events, "backend", backend)
    }

    /// The counters of the dispatcher.
    pub fn dispatcher<O: Outcome>(&self) -> Outcomes<O> {
        self.outcomes(&self.dispatcher_events, "dispatcher", "")
    }

    /// The counters of the journal.
    pub fn journal<O: Outcome>(&self) -> Outcomes<O> {
        self.outcomes(&self.journal_writes, "journal", "")
    }

    /// The durations of scans, in seconds. `scanner` is the kind and name of a part: `plugin netlink`.
    pub fn scans(&self, scanner: &str) -> Histogram {
        self.scans.with_label_values(&[scanner])
    }

    /// Every family as it is now, for `/metrics`, except the number of open flows, which is shown by tag.
    pub fn gather(&self) -> Vec<MetricFamily> {
        let mut families = self.registry.gather();
        families.retain(|family| family.name() != "flowd_flows_open");
        families.extend(self.process.gather());
        families
    }

    /// The counters of updates of the registry.
    pub fn registry_updates<O: Outcome>(&self) -> Outcomes<O> {
        self.outcomes(&self.registry_updates, "registry", "")
    }

    /// Forgets a queue that no longer exists.
    pub fn remove_queue(&self, queue: &str) {
        for gauges in [&self.queue_depth, &self.queue_high_water] {
            // Fails if the queue was never observed.
            let _ = gauges.remove_label_values(&[queue]);
        }
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

    /// The status line: all values that are not zero, as `family labels value`, separated by commas.
    pub fn summary(&self) -> String {
        let mut line = String::new();
        for sample in self.samples().iter().filter(|sample| sample.value != 0) {
            let name = sample.name.strip_prefix("flowd_").unwrap_or(&sample.name);
            let name = name.strip_suffix("_total").unwrap_or(name);
            line += if line.is_empty() { "" } else { ", " };
            line += name;
            // The outcome is what the others are counted by: it comes last.
            let is_outcome = |(label, _): &&(String, String)| label == "outcome";
            let (outcome, others): (Vec<_>, Vec<_>) = sample.labels.iter().partition(is_outcome);
            for (_, value) in others.into_iter().chain(outcome) {
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
    /// Names and values, sorted by name.
    pub labels: Vec<(String, String)>,
    /// The value. All of the daemon's own metrics are whole numbers.
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
    /// Records that `waiting` events wait.
    pub fn observe(&self, waiting: usize) {
        let waiting = waiting as i64;
        self.depth.set(waiting);
        if waiting > self.high_water.get() {
            self.high_water.set(waiting);
        }
    }
}

/// Registers a family. Names and labels are constants of this file; the tests below show that they are well-formed and
/// distinct.
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
        enum Sample { Good = "good": "accepted: {line|lines}", Bad = "bad": "rejected: {line|lines}", }
    }

    #[test]
    fn the_summary_names_what_was_counted_and_nothing_else() {
        let metrics = Metrics::new();
        let counters = metrics.plugin::<Sample>("namedPipe");
        counters.add_many(Sample::Bad, 3);
        metrics.flows_open.set(7);
        assert_eq!(
            metrics.summary(),
            "flows_open 7, plugin_events namedPipe bad 3"
        );
        assert_eq!(counters.get(Sample::Bad), 3);
        assert_eq!(counters.get(Sample::Good), 0);
        let text = "rejected: 3 lines".to_owned();
        let count = Count {
            outcome: "bad",
            count: 3,
            text,
        };
        assert_eq!(metrics.counts("plugin", "namedPipe"), [count]);
    }

    #[test]
    fn the_text_of_a_count_is_english() {
        let template = "rejected: {line|lines} that {is|are} not text";
        let texts = [0, 1, 2].map(|count| count_text(template, count));
        assert_eq!(
            texts,
            [
                "rejected: 0 lines that are not text",
                "rejected: 1 line that is not text",
                "rejected: 2 lines that are not text",
            ]
        );
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
