//! Sends flow events into a bounded channel: a start or an end waits for room, an `ongoing` event that finds none
//! is dropped.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};

use crate::event::State;

/// How long to sleep when a channel is full. Its reader has thousands of events to process. A blocking send would be
/// woken for every slot that becomes free, which cost half of all user time under full load in `make bench`.
const FULL_CHANNEL_RETRY: Duration = Duration::from_micros(500);

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// The event is in the channel.
    Done,
    /// The channel was full, and an `ongoing` event does not wait.
    Dropped,
    /// The receiver is gone.
    Closed,
}

/// Sends an event of `state` into `channel`.
pub fn push<T>(channel: &Sender<T>, state: State, mut event: T) -> Pushed {
    loop {
        event = match channel.try_send(event) {
            Ok(()) => return Pushed::Done,
            Err(TrySendError::Disconnected(_)) => return Pushed::Closed,
            Err(TrySendError::Full(_)) if state == State::Ongoing => return Pushed::Dropped,
            Err(TrySendError::Full(event)) => event,
        };
        thread::sleep(FULL_CHANNEL_RETRY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ongoing_event_is_dropped_when_the_channel_is_full_and_an_end_waits() {
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
