//! Flows of the last while. No I/O, no clock.

use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;

use crate::flow::Flow;

/// What was put in lately: for `memory` at least, unless `most` others follow, and for little more than
/// twice that.
pub struct Recent<V> {
    memory: Duration,
    most: usize,
    now: HashMap<Flow, V>,
    before: HashMap<Flow, V>,
    since: Timestamp,
}

impl<V> Recent<V> {
    /// Nothing was.
    pub fn new(memory: Duration, most: usize) -> Recent<V> {
        Recent {
            memory,
            most,
            now: HashMap::new(),
            before: HashMap::new(),
            since: Timestamp::UNIX_EPOCH,
        }
    }

    /// Puts one in.
    pub fn insert(&mut self, flow: Flow, value: V) {
        if self.now.len() >= self.most {
            self.turn();
        }
        self.now.insert(flow, value);
    }

    /// Takes one out.
    pub fn remove(&mut self, flow: &Flow) -> Option<V> {
        let found = self.now.remove(flow);
        found.or_else(|| self.before.remove(flow))
    }

    /// Forgets what is too old; to be called now and then.
    pub fn tend(&mut self, now: Timestamp) {
        if now.duration_since(self.since).unsigned_abs() >= self.memory {
            self.since = now;
            self.turn();
        }
    }

    fn turn(&mut self) {
        std::mem::swap(&mut self.now, &mut self.before);
        self.now.clear();
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
    fn it_remembers_for_a_while_and_so_many() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let mut recent = Recent::new(Duration::from_secs(10), 3);
        recent.tend(at(100));
        (1..=2).for_each(|n| recent.insert(flow(n), n));
        recent.tend(at(109));
        assert_eq!(recent.remove(&flow(1)), Some(1));
        assert_eq!(recent.remove(&flow(1)), None);
        recent.tend(at(110));
        recent.insert(flow(3), 3);
        assert_eq!(recent.remove(&flow(2)), Some(2));
        recent.insert(flow(2), 2);
        recent.tend(at(120));
        recent.tend(at(130));
        assert_eq!([2, 3].map(|n| recent.remove(&flow(n))), [None, None]);
        (1..=7).for_each(|n| recent.insert(flow(n), n));
        let left = (1..=7).filter(|n| recent.remove(&flow(*n)).is_some());
        assert_eq!(left.collect::<Vec<u16>>(), [4, 5, 6, 7]);
    }
}
