//! Sums over flows, by tag. A producer may report made-up tags: how many have sums of their own is bounded, and those of
//! the registry always do. No I/O, no clock.

use std::collections::HashMap;

use super::families::COUNTERS;
use super::store::Counts;
use crate::event::EndReason;
use crate::flow::Tag;
use crate::registry::SharedRegistry;

/// How many tags that are not in the registry may have sums of their own.
const MAX_UNREGISTERED: usize = 4096;

/// Sums over the open and ended flows of a tag.
#[derive(Clone, Default)]
pub struct Sums {
    /// Flows open now.
    pub open: u64,
    /// Flows started.
    pub started: u64,
    /// Flows ended, in the order of [`EndReason::ALL`].
    pub ended: [u64; EndReason::ALL.len()],
    /// Bytes and packets.
    pub counts: Counts,
    /// Sum of the observed round-trip times, in seconds, and their number.
    pub rtt: (f64, u64),
    /// Counters of flows that have no series of their own, by `sock_diag` and by sockops.
    pub hidden: [[f64; COUNTERS]; 2],
}

/// The sums of each tag.
pub struct SumsByTag {
    registry: SharedRegistry,
    registered: HashMap<Tag, Sums>,
    /// With the number of the last use.
    unregistered: HashMap<Tag, (u64, Sums)>,
    uses: u64,
}

impl SumsByTag {
    /// No sums.
    pub fn new(registry: SharedRegistry) -> SumsByTag {
        SumsByTag {
            registry,
            registered: HashMap::new(),
            unregistered: HashMap::new(),
            uses: 0,
        }
    }

    /// The sums of a tag, to add to. If there are too many tags that are not in the registry, those without open
    /// flows that were used least recently are dropped. If all have open flows, further ones share the sums of 0/0.
    pub fn get(&mut self, tag: Tag) -> &mut Sums {
        self.uses += 1;
        if self.registered.contains_key(&tag) {
            return self.registered.entry(tag).or_default();
        }
        if !self.unregistered.contains_key(&tag) {
            if self.is_registered(tag) {
                return self.registered.entry(tag).or_default();
            }
            if self.unregistered.len() >= MAX_UNREGISTERED {
                self.drop_idle();
            }
            if self.unregistered.len() >= MAX_UNREGISTERED {
                return self.registered.entry(Tag::default()).or_default();
            }
        }
        let (used, sums) = self.unregistered.entry(tag).or_default();
        *used = self.uses;
        sums
    }

    /// Makes room. Dropping many at once keeps the cost of a made-up tag small.
    fn drop_idle(&mut self) {
        let idle = self
            .unregistered
            .iter()
            .filter(|(_, (_, sums))| sums.open == 0);
        let mut idle: Vec<(u64, Tag)> = idle.map(|(tag, (used, _))| (*used, *tag)).collect();
        idle.sort_unstable();
        for (_, tag) in idle.into_iter().take(MAX_UNREGISTERED / 4) {
            self.unregistered.remove(&tag);
        }
    }

    /// The sums in which an open flow of a tag is counted: those of 0/0 if the tag shared them.
    pub fn get_open(&mut self, tag: Tag) -> &mut Sums {
        let registered = self.registered.get(&tag);
        let sums = registered.or_else(|| Some(&self.unregistered.get(&tag)?.1));
        match sums.is_some_and(|sums| sums.open > 0) {
            true => self.get(tag),
            false => self.get(Tag::default()),
        }
    }

    /// A copy of all sums.
    pub fn snapshot(&self) -> Vec<(Tag, Sums)> {
        let registered = self.registered.iter();
        let unregistered = self.unregistered.iter();
        let unregistered = unregistered.map(|(tag, (_, sums))| (tag, sums));
        let all = registered.chain(unregistered);
        all.map(|(tag, sums)| (*tag, sums.clone())).collect()
    }

    /// 0/0 counts as registered: it is there for those that share it.
    fn is_registered(&self, tag: Tag) -> bool {
        let registry = self.registry.load();
        let experiment = registry.experiment(tag.experiment);
        tag == Tag::default()
            || experiment.is_some_and(|e| e.activities.iter().any(|a| a.id == tag.activity))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    fn sums() -> SumsByTag {
        SumsByTag::new(SharedRegistry::new(Registry::builtin()))
    }

    fn tag(experiment: u16, activity: u16) -> Tag {
        Tag {
            experiment,
            activity,
        }
    }

    #[test]
    fn made_up_tags_neither_take_the_place_of_registered_ones_nor_grow_without_bound() {
        let mut sums = sums();
        for n in 0..20_000 {
            let made_up = tag(1000 + n, 1);
            sums.get(made_up).open += 1;
            let open = sums.get_open(made_up);
            open.open -= 1;
            open.ended[0] += 1;
        }
        assert!(sums.snapshot().len() <= MAX_UNREGISTERED);
        sums.get(tag(2, 9)).started += 1;
        let snapshot = sums.snapshot();
        assert!(
            snapshot
                .iter()
                .any(|(t, s)| *t == tag(2, 9) && s.started == 1)
        );
        // The latest are there, the oldest are not.
        assert!(snapshot.iter().any(|(t, _)| *t == tag(20_999, 1)));
        assert!(!snapshot.iter().any(|(t, _)| *t == tag(1000, 1)));
    }

    #[test]
    fn a_tag_with_an_open_flow_is_not_dropped_and_those_beyond_the_limit_share_their_sums() {
        let mut sums = sums();
        let beyond = MAX_UNREGISTERED as u16 + 10;
        (0..beyond).for_each(|n| sums.get(tag(1000 + n, 1)).open += 1);
        assert_eq!(sums.get(Tag::default()).open, 10);
        let tags: Vec<Tag> = sums.snapshot().iter().map(|(tag, _)| *tag).collect();
        let distinct: std::collections::HashSet<&Tag> = tags.iter().collect();
        assert_eq!(distinct.len(), tags.len());
        (0..beyond).for_each(|n| sums.get_open(tag(1000 + n, 1)).open -= 1);
        assert!(sums.snapshot().iter().all(|(_, sums)| sums.open == 0));
    }
}
