//! Stops fireflies from looping between daemons that relay to each other: each passes a firefly on once.
//! No I/O, no clock.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use crate::event::{FlowEvent, Origin, State};

/// How long an event is remembered at least, unless [`MAX_EVENTS`] newer ones push it out.
const TTL: Duration = Duration::from_secs(30);
/// How many events a generation remembers: a firefly that loops is back within milliseconds.
const MAX_EVENTS: usize = 1 << 18;

/// Remembers recent events, in at most 16 MiB.
#[derive(Default)]
pub struct EchoFilter {
    hasher: RandomState,
    current: HashSet<u64>,
    previous: HashSet<u64>,
    since: Option<Instant>,
}

impl EchoFilter {
    /// Whether this is a firefly about an event that was seen before, whatever its origin: same flow, state and time,
    /// and for a start the same tag. Remembers the event.
    pub fn is_echo(&mut self, event: &FlowEvent, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        if self.current.len() >= MAX_EVENTS || now.duration_since(since) >= TTL {
            std::mem::swap(&mut self.current, &mut self.previous);
            self.current.clear();
            self.since = Some(now);
        }
        let (time, tag) = match event.state {
            State::Start => (event.start_time(), event.tag),
            // An end may arrive with any tag, and leaves with the tag of its flow.
            State::Ongoing | State::End => (event.time, None),
        };
        let identity = (event.flow, event.state, time.as_microsecond(), tag);
        let hash = self.hasher.hash_one(identity);
        let known = !self.current.insert(hash) || self.previous.contains(&hash);
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
    fn a_repeated_firefly_is_an_echo_and_a_line_never_is() {
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
    fn events_expire_and_memory_is_bounded() {
        let (mut filter, now) = (EchoFilter::default(), Instant::now());
        let first = event(State::End, 1, Origin::Firefly);
        assert!(!filter.is_echo(&first, now));
        assert!(filter.is_echo(&first, now + TTL));
        let later = now + 3 * TTL;
        assert!(!filter.is_echo(&event(State::End, 2, Origin::Firefly), later));
        assert!(!filter.is_echo(&first, later + TTL));
        let mut many = first;
        for n in 0..3 * MAX_EVENTS as i64 {
            many.time = Timestamp::from_microsecond(n).unwrap();
            filter.is_echo(&many, later + TTL);
        }
        assert!(filter.current.len() + filter.previous.len() <= 2 * MAX_EVENTS);
    }
}
