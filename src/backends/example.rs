//! The worked example of CONTRIBUTING.md: a backend that appends a line of CSV for every flow that ends.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
use log::Level;

use super::Backend;
use crate::error::{Context, Result};
use crate::event::{FlowEvent, State};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::registry::SharedRegistry;

outcomes! {
    enum Outcome {
        Written = "written": "{line|lines} written",
        Failed = "failed": "{line|lines} that could not be written",
    }
}

/// The backend, with its file open.
pub struct Csv {
    file: File,
    registry: SharedRegistry,
    counters: Outcomes<Outcome>,
    failures: LogLimit,
}

impl Csv {
    /// Opens the file, so that a path that cannot be written is an error before the daemon is ready.
    pub fn new(path: &Path, registry: &SharedRegistry, metrics: &Metrics) -> Result<Csv> {
        let file = OpenOptions::new().append(true).create(true).open(path);
        Ok(Csv {
            file: file.context(|| format!("{} (backends.csv.path)", path.display()))?,
            registry: registry.clone(),
            counters: metrics.backend("csv"),
            failures: LogLimit::new(Level::Warn, "csv: failed writes"),
        })
    }

    fn line(&self, event: &FlowEvent) -> String {
        // Every event that reaches a backend has a tag and a start time.
        let (experiment, activity) = self.registry.load().names(event.tag());
        let seconds = event.time.duration_since(event.start_time()).as_secs_f64();
        let usage = event.usage.unwrap_or_default();
        let count = |bytes: Option<u64>| bytes.map_or_else(String::new, |bytes| bytes.to_string());
        format!(
            "{:.6},{},\"{experiment}\",\"{activity}\",{seconds:.3},{},{}\n",
            event.time,
            event.flow,
            count(usage.received),
            count(usage.sent),
        )
    }
}

impl Backend for Csv {
    fn name(&self) -> &'static str {
        "csv"
    }

    /// Ends when the dispatcher drops its sender and the channel is empty, so that no event is lost.
    fn run(mut self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()> {
        for event in events.iter().filter(|event| event.state == State::End) {
            let line = self.line(&event);
            match self.file.write_all(line.as_bytes()) {
                Ok(()) => self.counters.add(Outcome::Written),
                Err(error) => {
                    self.counters.add(Outcome::Failed);
                    let message = || format!("csv: {}: {error}", event.flow);
                    self.failures.log(Instant::now(), message);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Origin;
    use crate::flow::{Flow, Protocol, Tag, Usage};
    use crate::registry::Registry;
    use jiff::Timestamp;

    #[test]
    fn an_end_is_a_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("flows.csv");
        let registry = SharedRegistry::new(Registry::builtin());
        let backend = Csv::new(&path, &registry, &Metrics::new()).unwrap();
        let end = |n: u8| ([192, 0, 2, n].into(), u16::from(n));
        let flow = Flow::new(Protocol::Tcp, end(1), end(2)).unwrap();
        let time = Timestamp::from_second(3).unwrap();
        let end = FlowEvent {
            tag: Some(Tag {
                experiment: 2,
                activity: 9,
            }),
            start_time: Timestamp::from_second(1).ok(),
            usage: Some(Usage {
                received: None,
                sent: Some(7),
            }),
            ..FlowEvent::new(State::End, flow, time, Origin::NamedPipe)
        };
        let (sender, events) = crossbeam_channel::bounded(2);
        sender
            .send(Arc::new(FlowEvent::new(
                State::Start,
                flow,
                time,
                Origin::NamedPipe,
            )))
            .unwrap();
        sender.send(Arc::new(end)).unwrap();
        drop(sender);
        Box::new(backend).run(events).unwrap();
        let (experiment, activity) = registry.load().names(Tag {
            experiment: 2,
            activity: 9,
        });
        let expected = format!(
            "1970-01-01T00:00:03.000000Z,tcp 192.0.2.1:1 > 192.0.2.2:2,\"{experiment}\",\"{activity}\",2.000,,7\n"
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
    }
}
