//! How many flows each source has opened, so that one source cannot fill the table for all. No I/O, no clock.

use std::collections::HashMap;
use std::fmt;

use crate::event::{FlowEvent, Origin, Sender};

/// Who opened a flow: the pipe as a whole, since a FIFO does not tell who writes; the sender of a firefly; the client of
/// the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowSource {
    origin: Origin,
    /// `None` for the pipe, and for flows from before a restart.
    sender: Option<Sender>,
}

impl FlowSource {
    /// The source of an event.
    pub fn of(event: &FlowEvent) -> FlowSource {
        FlowSource {
            origin: event.origin,
            sender: event.sender,
        }
    }

    /// The source of a flow from before a restart.
    pub fn restored(origin: Origin) -> FlowSource {
        FlowSource {
            origin,
            sender: None,
        }
    }
}

impl fmt::Display for FlowSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = self.origin.as_str();
        match self.sender {
            Some(Sender::Address(address)) => write!(f, "{origin} from {address}"),
            Some(Sender::User(uid)) => write!(f, "{origin} from user id {uid}"),
            None => f.write_str(origin),
        }
    }
}

/// A source in [`Sources`]: small, as each open flow keeps one.
#[derive(Clone, Copy, Debug)]
pub struct SourceId(u32);

/// The sources of the open flows, each with its number of flows. A source without flows is forgotten.
#[derive(Default)]
pub struct Sources {
    ids: HashMap<FlowSource, u32>,
    /// By id.
    counts: Vec<(FlowSource, usize)>,
    unused: Vec<u32>,
}

impl Sources {
    /// How many open flows a source has.
    pub fn count(&self, source: FlowSource) -> usize {
        let id = self.ids.get(&source);
        id.map_or(0, |&id| self.counts[id as usize].1)
    }

    /// Counts a flow that a source opens.
    pub fn add(&mut self, source: FlowSource) -> SourceId {
        let (unused, counts) = (&mut self.unused, &mut self.counts);
        let id = *self
            .ids
            .entry(source)
            .or_insert_with(|| match unused.pop() {
                Some(id) => {
                    counts[id as usize] = (source, 0);
                    id
                }
                None => {
                    counts.push((source, 0));
                    counts.len() as u32 - 1
                }
            });
        self.counts[id as usize].1 += 1;
        SourceId(id)
    }

    /// A flow of a source has ended.
    pub fn remove(&mut self, SourceId(id): SourceId) {
        let (source, count) = &mut self.counts[id as usize];
        *count -= 1;
        if *count == 0 {
            self.ids.remove(source);
            self.unused.push(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_without_flows_are_forgotten() {
        let mut sources = Sources::default();
        let by = |uid| FlowSource {
            origin: Origin::Api,
            sender: Some(Sender::User(uid)),
        };
        for round in 0..3 {
            let ids = [1, 2, 2].map(|uid| sources.add(by(uid + round * 10)));
            assert_eq!(sources.count(by(2 + round * 10)), 2);
            ids.into_iter().for_each(|id| sources.remove(id));
            assert_eq!(sources.count(by(2 + round * 10)), 0);
        }
        assert_eq!((sources.ids.len(), sources.counts.len()), (0, 2));
    }
}
