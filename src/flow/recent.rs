//! A bounded map of recent flows. No I/O, no clock.

use std::collections::HashMap;
use std::time::Duration;

use crate::flow::Flow;

/// A bounded map of recent entries. An entry lives for at least `ttl` and at most about twice that, unless more than
/// `max_entries` newer entries push it out. The map holds at most twice `max_entries`.
pub struct RecentFlows<V> {
    ttl: Duration,
    max_entries: usize,
    newer: HashMap<Flow, V>,
    older: HashMap<Flow, V>,
    rotated_at: Duration,
}

impl<V> RecentFlows<V> {
    /// An empty map.
    pub fn new(ttl: Duration, max_entries: usize) -> RecentFlows<V> {
        RecentFlows {
            ttl,
            max_entries,
            newer: HashMap::new(),
            older: HashMap::new(),
            rotated_at: Duration::ZERO,
        }
    }

    /// Adds an entry, or replaces it.
    pub fn insert(&mut self, flow: Flow, value: V) {
        if self.newer.len() >= self.max_entries {
            self.rotate_generations();
        }
        self.older.remove(&flow);
        self.newer.insert(flow, value);
    }

    /// Removes an entry.
    pub fn remove(&mut self, flow: &Flow) -> Option<V> {
        let found = self.newer.remove(flow);
        found.or_else(|| self.older.remove(flow))
    }

    /// An entry.
    pub fn get(&self, flow: &Flow) -> Option<&V> {
        self.newer.get(flow).or_else(|| self.older.get(flow))
    }

    /// Removes an entry if it satisfies `condition`.
    pub fn remove_if(&mut self, flow: &Flow, condition: impl Fn(&V) -> bool) -> Option<V> {
        self.get(flow)
            .is_some_and(condition)
            .then(|| self.remove(flow))?
    }

    /// Drops expired entries; to be called about once per `ttl` or more often. `now` is the time on any clock; a step of
    /// that clock expires entries early.
    pub fn expire_old(&mut self, now: Duration) {
        if now.abs_diff(self.rotated_at) >= self.ttl {
            self.rotated_at = now;
            self.rotate_generations();
        }
    }

    fn rotate_generations(&mut self) {
        std::mem::swap(&mut self.newer, &mut self.older);
        self.newer.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;

    fn flow(port: u16) -> Flow {
        let end = |n: u8| ([192, 0, 2, n].into(), port);
        Flow::new(Protocol::Tcp, end(1), end(2)).unwrap()
    }

    #[test]
    fn entries_expire_by_age_and_by_number() {
        let at = Duration::from_secs;
        let mut recent = RecentFlows::new(Duration::from_secs(10), 3);
        recent.expire_old(at(100));
        (1..=2).for_each(|n| recent.insert(flow(n), n));
        recent.expire_old(at(109));
        assert_eq!(recent.remove(&flow(1)), Some(1));
        assert_eq!(recent.remove(&flow(1)), None);
        recent.expire_old(at(110));
        recent.insert(flow(3), 3);
        assert_eq!(recent.remove(&flow(2)), Some(2));
        recent.insert(flow(2), 2);
        recent.expire_old(at(120));
        recent.expire_old(at(130));
        assert_eq!([2, 3].map(|n| recent.remove(&flow(n))), [None, None]);
        (1..=7).for_each(|n| recent.insert(flow(n), n));
        let left = (1..=7).filter(|n| recent.remove(&flow(*n)).is_some());
        assert_eq!(left.collect::<Vec<u16>>(), [4, 5, 6, 7]);
    }
}
