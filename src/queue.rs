//! Putting flow events into a bounded channel: a start or an end waits for room, news that finds none
//! is dropped.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};

use crate::flow::State;

/// How long to wait when a channel is full. Its reader has thousands of events to go, so that being
/// woken for every single place that gets free, as a blocking send is, would only burn time: half of
/// all user time under full load, as `make bench` showed.
const FULL: Duration = Duration::from_micros(500);

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the channel.
    Done,
    /// The channel was full, and the event was of the kind that does not wait.
    Dropped,
    /// Nobody reads the channel any more.
    Closed,
}

/// Puts an event of `state` into `channel`.
pub fn push<T>(channel: &Sender<T>, state: State, mut event: T) -> Pushed {
    loop {
        event = match channel.try_send(event) {
            Ok(()) => return Pushed::Done,
            Err(TrySendError::Disconnected(_)) => return Pushed::Closed,
            Err(TrySendError::Full(_)) if state == State::Ongoing => return Pushed::Dropped,
            Err(TrySendError::Full(event)) => event,
        };
        thread::sleep(FULL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_is_dropped_when_there_is_no_room_and_an_end_waits() {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        assert_eq!(push(&sender, State::Ongoing, 1), Pushed::Done);
        assert_eq!(push(&sender, State::Ongoing, 2), Pushed::Dropped);
        thread::scope(|scope| {
            let end = scope.spawn(|| push(&sender, State::End, 3));
            assert_eq!(receiver.recv(), Ok(1));
            assert_eq!(end.join().unwrap(), Pushed::Done);
        });
        assert_eq!(receiver.recv(), Ok(3));
        drop(receiver);
        assert_eq!(push(&sender, State::End, 4), Pushed::Closed);
    }
}
