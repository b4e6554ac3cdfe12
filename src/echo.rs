//! Keeps fireflies from going round in circles: of daemons that relay to each other, each passes a
//! firefly on once. No I/O, no clock.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use crate::flow::{FlowEvent, Origin, State};

/// How long an event is remembered at least, unless [`MOST`] others come.
const MEMORY: Duration = Duration::from_secs(30);
/// How many events are remembered at least: one that goes round is back within milliseconds.
const MOST: usize = 1 << 18;

/// Remembers the events that went by, at up to 16 MiB.
#[derive(Default)]
pub struct EchoFilter {
    hasher: RandomState,
    current: HashSet<u64>,
    former: HashSet<u64>,
    since: Option<Instant>,
}

impl EchoFilter {
    /// Whether this is a firefly of an event that went by before, of whatever origin: same flow, state
    /// and time, and same tag of a start. If not, it is remembered.
    pub fn is_echo(&mut self, event: &FlowEvent, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        if self.current.len() >= MOST || now.duration_since(since) >= MEMORY {
            std::mem::swap(&mut self.current, &mut self.former);
            self.current.clear();
            self.since = Some(now);
        }
        let (time, tag) = match event.state {
            State::Start => (event.start_time(), event.tag),
            // An end may come in with any tag, and goes out with that of the flow.
            State::Ongoing | State::End => (event.time, None),
        };
        let what = (event.flow, event.state, time.as_microsecond(), tag);
        let mark = self.hasher.hash_one(what);
        let known = !self.current.insert(mark) || self.former.contains(&mark);
        known && event.origin == Origin::Firefly
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Flow, Protocol, Tag};
    use jiff::Timestamp;

    fn event(state: State, port: u16, origin: Origin) -> FlowEvent {
        let end = |n: u8| ([192, 0, 2, n].into(), port);
        let flow = Flow::new(Protocol::Tcp, end(1), end(2)).unwrap();
        FlowEvent::new(state, flow, Timestamp::UNIX_EPOCH, origin)
    }

    #[test]
    fn a_firefly_of_what_went_by_is_an_echo_and_a_line_never_is() {
        let (mut filter, now) = (EchoFilter::default(), Instant::now());
        for state in [State::Start, State::Ongoing, State::End] {
            let line = event(state, 1, Origin::NamedPipe);
            let firefly = event(state, 1, Origin::Firefly);
            assert!(!filter.is_echo(&line, now));
            assert!(filter.is_echo(&firefly, now));
            assert!(!filter.is_echo(&line, now));
            assert!(!filter.is_echo(&event(state, 2, Origin::Firefly), now));
        }
    }

    #[test]
    fn another_tag_of_a_start_or_another_time_is_no_echo() {
        let (mut filter, now) = (EchoFilter::default(), Instant::now());
        let mut start = event(State::Start, 1, Origin::Firefly);
        assert!(!filter.is_echo(&start, now));
        start.tag = Some(Tag {
            experiment: 2,
            activity: 9,
        });
        assert!(!filter.is_echo(&start, now));
        let mut end = event(State::End, 1, Origin::Firefly);
        assert!(!filter.is_echo(&end, now));
        end.tag = start.tag;
        assert!(filter.is_echo(&end, now));
        end.time = Timestamp::from_second(1).unwrap();
        assert!(!filter.is_echo(&end, now));
    }

    #[test]
    fn it_forgets_in_time_and_does_not_grow() {
        let (mut filter, now) = (EchoFilter::default(), Instant::now());
        let first = event(State::End, 1, Origin::Firefly);
        assert!(!filter.is_echo(&first, now));
        assert!(filter.is_echo(&first, now + MEMORY));
        let later = now + 3 * MEMORY;
        assert!(!filter.is_echo(&event(State::End, 2, Origin::Firefly), later));
        assert!(!filter.is_echo(&first, later + MEMORY));
        let mut many = first;
        for n in 0..3 * MOST as i64 {
            many.time = Timestamp::from_microsecond(n).unwrap();
            filter.is_echo(&many, later + MEMORY);
        }
        assert!(filter.current.len() + filter.former.len() <= 2 * MOST);
    }
}
