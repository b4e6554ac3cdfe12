//! Sampling intervals of an exporter, as its options records tell them.

/// What a sampling interval applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Every flow that no other interval applies to.
    All,
    /// The flows of a sampler or selector.
    Sampler(u64),
    /// The flows that came in by an interface.
    Interface(u32),
}

/// The sampling intervals of an exporter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sampling {
    /// Sorted by scope.
    intervals: Vec<(Scope, u32)>,
    by_interface: bool,
}

impl Sampling {
    /// Sets an interval. Returns whether this is a change.
    pub fn set(&mut self, scope: Scope, interval: u32) -> bool {
        self.by_interface |= matches!(scope, Scope::Interface(_));
        match self.position(scope) {
            Ok(at) => std::mem::replace(&mut self.intervals[at].1, interval) != interval,
            Err(at) => {
                self.intervals.insert(at, (scope, interval));
                true
            }
        }
    }

    fn position(&self, scope: Scope) -> Result<usize, usize> {
        self.intervals
            .binary_search_by_key(&scope, |(scope, _)| *scope)
    }

    /// The interval that was set for a scope.
    pub fn get(&self, scope: Scope) -> Option<u32> {
        self.position(scope).ok().map(|at| self.intervals[at].1)
    }

    /// The interval of a flow of which neither sampler nor interface are known: the one for all, or the only one that there is;
    /// 0 if there is none.
    pub fn default_interval(&self) -> u32 {
        match self.intervals.as_slice() {
            [(Scope::All, interval), ..] | [(Scope::Sampler(_), interval)] => *interval,
            _ => 0,
        }
    }

    /// Whether there is an interval for an interface.
    pub fn by_interface(&self) -> bool {
        self.by_interface
    }

    /// Number of intervals.
    pub fn len(&self) -> usize {
        self.intervals.len()
    }

    /// Whether no interval is known.
    pub fn is_empty(&self) -> bool {
        self.intervals.is_empty()
    }

    /// Every interval.
    pub fn iter(&self) -> impl Iterator<Item = &(Scope, u32)> {
        self.intervals.iter()
    }

    /// Gives memory back that is not used.
    pub fn shrink_to_fit(&mut self) {
        self.intervals.shrink_to_fit();
    }

    /// Memory in use on the heap, in bytes.
    pub fn heap_bytes(&self) -> usize {
        self.intervals.capacity() * size_of::<(Scope, u32)>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_without_a_sampler_takes_the_interval_for_all_or_the_only_one() {
        let mut sampling = Sampling::default();
        assert_eq!(sampling.default_interval(), 0);
        assert!(sampling.set(Scope::Sampler(3), 100));
        assert!(!sampling.set(Scope::Sampler(3), 100));
        assert_eq!(sampling.default_interval(), 100);
        assert!(sampling.set(Scope::Sampler(1), 10));
        assert_eq!(sampling.default_interval(), 0);
        assert!(sampling.set(Scope::All, 1000));
        assert_eq!(sampling.default_interval(), 1000);
        assert_eq!(sampling.get(Scope::Sampler(1)), Some(10));
        assert_eq!(sampling.get(Scope::Sampler(2)), None);
        assert!(!sampling.by_interface());
        assert!(sampling.set(Scope::Interface(7), 5));
        assert!(sampling.by_interface());
    }
}
