//! The table of open flows: what each flow event means, given what is open. No I/O, no clock.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::flow::{Effect, EndReason, Flow, FlowEvent, Origin, Protocol, State, Tag};
use crate::metrics::outcomes;
use crate::recent::Recent;

outcomes! {
    /// What the table made of an event.
    pub enum Step {
        /// A start of a flow that was not open.
        Started = "started",
        /// A start of an open flow with another tag.
        Retagged = "retagged",
        /// A start of an open flow with the same tag: dropped.
        Duplicate = "duplicate",
        /// News of an open flow.
        Ongoing = "ongoing",
        /// News with a tag of a flow that was not open: it is now.
        OpenedByOngoing = "opened_by_ongoing",
        /// News without a tag of a flow that is not open: dropped.
        OngoingUnknown = "ongoing_unknown",
        /// The end of an open flow.
        Ended = "ended",
        /// The end of a flow that was not open.
        EndedUnmatched = "ended_unmatched",
        /// A flow whose socket on this host has gone, ended by the daemon.
        SocketClosed = "ended_socket_closed",
        /// The same, but the producer may still say so itself: not passed on yet.
        SocketClosing = "socket_closing",
        /// The end of the socket of a flow that was ended a moment before, with its counts.
        CountedLate = "counted_late",
        /// The end of a socket that is no open flow's: dropped.
        SocketUnknown = "socket_unknown",
        /// The end of a flow that was ended with its socket: dropped.
        EndedAlready = "ended_already",
        /// A flow older than `flows.maxAge`, ended by the daemon.
        Expired = "expired",
        /// A start beyond `flows.maxFlows`: dropped.
        Refused = "refused_table_full",
        /// A firefly that went by before: dropped.
        Echo = "echo",
    }
}

impl Step {
    /// Whether the backends get the event.
    pub fn passes(self) -> bool {
        !matches!(
            self,
            Step::Duplicate
                | Step::OngoingUnknown
                | Step::Refused
                | Step::Echo
                | Step::SocketClosing
                | Step::SocketUnknown
                | Step::EndedAlready
        )
    }

    /// Whether the flow is open with a new tag, so that the journal has to say it.
    pub fn opens(self) -> bool {
        matches!(self, Step::Started | Step::Retagged | Step::OpenedByOngoing)
    }

    /// Whether an open flow was closed.
    pub fn closes(self) -> bool {
        matches!(self, Step::Ended | Step::Expired | Step::SocketClosed)
    }
}

/// What is kept of an open flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFlow {
    /// Start, or ongoing once there was news.
    pub state: State,
    /// Experiment and activity.
    pub tag: Tag,
    /// Which way the flow came in.
    pub origin: Origin,
    /// When it was entered here, in seconds since 1970; its age counts from here, as the start time is
    /// what a producer says.
    pub opened: u32,
    /// When it began, in microseconds since 1970.
    start_micros: i64,
    /// Name and version of the program that moves the data.
    pub application: Option<Arc<str>>,
}

impl OpenFlow {
    /// A flow that began at `start` and was entered at `opened` seconds since 1970.
    pub fn new(
        tag: Tag,
        origin: Origin,
        start: Timestamp,
        opened: u32,
        application: Option<Arc<str>>,
    ) -> OpenFlow {
        OpenFlow {
            state: State::Start,
            tag,
            origin,
            opened,
            start_micros: start.as_microsecond(),
            application,
        }
    }

    /// When the flow began.
    pub fn start_time(&self) -> Timestamp {
        Timestamp::from_microsecond(self.start_micros).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

/// Seconds since 1970, as [`OpenFlow::opened`] counts them.
pub fn seconds(time: Timestamp) -> u32 {
    u32::try_from(time.as_second()).unwrap_or(0)
}

/// How long a producer may take to say itself that a flow has ended, once its socket has gone: it may
/// know more of the transfer than the kernel.
const GRACE: Duration = Duration::from_secs(1);
/// How long the end of a flow that was ended with its socket is no surprise, unless so many others end.
const ENDED_MEMORY: Duration = Duration::from_secs(300);
const ENDED_MOST: usize = 1 << 16;
/// How long the end of the socket of a flow that was ended still counts, unless so many others end.
const UNCOUNTED_MEMORY: Duration = Duration::from_secs(1);
const UNCOUNTED_MOST: usize = 1 << 14;
/// How long the end of a socket is kept for a flow whose start is late, unless so many others end.
const GONE_MEMORY: Duration = Duration::from_secs(1);
const GONE_MOST: usize = 1 << 12;

/// The open flows, at most `max_flows` of them.
pub struct FlowTable {
    flows: HashMap<Flow, OpenFlow>,
    max_flows: usize,
    /// Open flows whose socket has gone, with their end.
    closing: HashMap<Flow, FlowEvent>,
    /// Flows that were ended with their socket.
    ended: Recent<()>,
    /// Flows that their producer ended, without counts.
    uncounted: Recent<OpenFlow>,
    /// Ends of sockets that were no open flow's.
    gone: Recent<FlowEvent>,
}

impl FlowTable {
    /// An empty table.
    pub fn new(max_flows: usize) -> FlowTable {
        FlowTable {
            flows: HashMap::new(),
            max_flows,
            closing: HashMap::new(),
            ended: Recent::new(ENDED_MEMORY, ENDED_MOST),
            uncounted: Recent::new(UNCOUNTED_MEMORY, UNCOUNTED_MOST),
            gone: Recent::new(GONE_MEMORY, GONE_MOST),
        }
    }

    /// From now on at most so many; those that are open stay.
    pub fn set_max_flows(&mut self, max_flows: usize) {
        self.max_flows = max_flows;
    }

    /// Enters a flow that was open when the daemon last ran, beyond `max_flows` if need be.
    pub fn restore(&mut self, flow: Flow, open: OpenFlow) {
        self.flows.insert(flow, open);
    }

    /// Removes a restored flow that the journal closes again.
    pub fn forget(&mut self, flow: &Flow) {
        self.flows.remove(flow);
    }

    /// How many flows are open.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether no flow is open.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// What is known of an open flow.
    pub fn get(&self, flow: &Flow) -> Option<&OpenFlow> {
        self.flows.get(flow)
    }

    /// Every open flow, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Flow, &OpenFlow)> {
        self.flows.iter()
    }

    /// Applies an event and completes it with what is known of its flow: tag, start time,
    /// application.
    pub fn step(&mut self, event: &mut FlowEvent, now: Timestamp) -> Step {
        match event.state {
            State::Start => self.start(event, now),
            State::Ongoing => self.ongoing(event, now),
            State::End => self.end(event),
        }
    }

    fn start(&mut self, event: &mut FlowEvent, now: Timestamp) -> Step {
        let full = self.flows.len() >= self.max_flows;
        match self.flows.entry(event.flow) {
            Entry::Occupied(mut entry) => {
                let open = entry.get_mut();
                // Who moves the data knows its tag better than who looks at sockets.
                let better_known = event.origin.is_socket() && !open.origin.is_socket();
                if open.tag == event.tag() || better_known {
                    return Step::Duplicate;
                }
                event.effect = Effect::Retagged(open.tag);
                open.tag = event.tag();
                open.origin = event.origin;
                if event.application.is_some() {
                    open.application.clone_from(&event.application);
                }
                complete(event, open);
                Step::Retagged
            }
            Entry::Vacant(_) if full => Step::Refused,
            Entry::Vacant(entry) => {
                self.uncounted.remove(&event.flow);
                entry.insert(OpenFlow::new(
                    event.tag(),
                    event.origin,
                    event.start_time(),
                    seconds(now),
                    event.application.clone(),
                ));
                event.start_time = Some(event.start_time());
                event.tag = Some(event.tag());
                event.effect = Effect::Opened;
                Step::Started
            }
        }
    }

    fn ongoing(&mut self, event: &mut FlowEvent, now: Timestamp) -> Step {
        if event.origin == Origin::Socket
            && let Some(flow) = self.flow_of_socket(&event.flow)
        {
            event.flow = flow;
        }
        if let Some(open) = self.flows.get_mut(&event.flow) {
            open.state = State::Ongoing;
            complete(event, open);
            return Step::Ongoing;
        }
        if event.tag.is_none() {
            return Step::OngoingUnknown;
        }
        match self.start(event, now) {
            Step::Started => Step::OpenedByOngoing,
            other => other,
        }
    }

    fn end(&mut self, event: &mut FlowEvent) -> Step {
        if event.origin.is_socket() {
            return self.socket_end(event);
        }
        match self.flows.remove(&event.flow) {
            Some(open) => {
                if let Some(closed) = self.closing.remove(&event.flow) {
                    event.usage = event.usage.or(closed.usage);
                    event.netlink = event.netlink.take().or(closed.netlink);
                }
                self.complete_from_gone(event, open.start_time());
                complete(event, &open);
                event.effect = Effect::Closed(EndReason::Producer);
                if event.netlink.is_none() && event.flow.protocol == Protocol::Tcp {
                    self.uncounted.insert(event.flow, open);
                }
                Step::Ended
            }
            None if self.ended.remove(&event.flow).is_some() => Step::EndedAlready,
            None => {
                event.tag = Some(event.tag());
                event.start_time = Some(event.start_time());
                Step::EndedUnmatched
            }
        }
    }

    /// A socket has its local end first, its flow may have it last.
    fn flow_of_socket(&self, flow: &Flow) -> Option<Flow> {
        let ways = [*flow, flow.reversed()];
        ways.into_iter().find(|flow| self.flows.contains_key(flow))
    }

    fn socket_end(&mut self, event: &mut FlowEvent) -> Step {
        let Some(flow) = self.flow_of_socket(&event.flow) else {
            let step = self.count_late(event);
            if step == Step::SocketUnknown && event.usage.is_some() {
                self.gone.insert(event.flow, event.clone());
            }
            return step;
        };
        event.flow = flow;
        self.complete_from_gone(event, self.flows[&flow].start_time());
        // Who knows the counts, too, has the last word.
        if self.flows[&flow].origin.is_socket() && event.usage.is_some() {
            self.closing.remove(&flow);
            self.close(event);
            return Step::SocketClosed;
        }
        let closing = self.closing.entry(flow).or_insert_with(|| event.clone());
        // With both ends on this host that of the source speaks for the flow.
        let of_source = |end: &FlowEvent| end.netlink.as_ref().is_some_and(|s| s.flow == flow);
        if closing.usage.is_none() || (of_source(event) && !of_source(closing)) {
            closing.usage = event.usage;
            closing.netlink.clone_from(&event.netlink);
        }
        Step::SocketClosing
    }

    /// Of a flow whose socket went before its start was known, the counts are kept.
    fn complete_from_gone(&mut self, event: &mut FlowEvent, began: Timestamp) {
        if event.usage.is_some() || event.flow.protocol != Protocol::Tcp {
            return;
        }
        let ways = [event.flow, event.flow.reversed()];
        let gone = ways.iter().find_map(|flow| self.gone.remove(flow));
        // Not of another connection with the same ends.
        if let Some(gone) = gone.filter(|gone| gone.time >= began) {
            event.usage = gone.usage;
            event.netlink = event.netlink.take().or(gone.netlink);
        }
    }

    fn count_late(&mut self, event: &mut FlowEvent) -> Step {
        let ways = [event.flow, event.flow.reversed()];
        let mut ways = ways.into_iter().filter(|_| event.usage.is_some());
        let ended = ways.find_map(|flow| Some((flow, self.uncounted.remove(&flow)?)));
        let Some((flow, open)) = ended else {
            return Step::SocketUnknown;
        };
        event.flow = flow;
        event.origin = open.origin;
        event.effect = Effect::Counted;
        complete(event, &open);
        Step::CountedLate
    }

    fn close(&mut self, event: &mut FlowEvent) {
        if let Some(open) = self.flows.remove(&event.flow) {
            complete(event, &open);
            event.origin = open.origin;
            event.effect = Effect::Closed(EndReason::SocketClosed);
            self.ended.insert(event.flow, ());
        }
    }

    /// Ends the flows whose socket has been gone for a second and whose producer has said nothing.
    pub fn end_closed(&mut self, now: Timestamp) -> Vec<FlowEvent> {
        self.ended.tend(now);
        self.uncounted.tend(now);
        self.gone.tend(now);
        let due = |_: &Flow, end: &mut FlowEvent| {
            now.duration_since(end.time) >= GRACE.try_into().unwrap_or_default()
        };
        let due = self.closing.extract_if(due).map(|(_, end)| end);
        let mut ends: Vec<FlowEvent> = due.collect();
        ends.retain(|end| self.flows.contains_key(&end.flow));
        ends.iter_mut().for_each(|end| self.close(end));
        ends
    }

    /// Ends every flow that was entered more than `max_age` ago.
    pub fn expire(&mut self, now: Timestamp, max_age: Duration) -> Vec<FlowEvent> {
        let limit = u64::from(seconds(now)).saturating_sub(max_age.as_secs());
        let old = |_: &Flow, open: &mut OpenFlow| u64::from(open.opened) < limit;
        let end = |(flow, open): (Flow, OpenFlow)| FlowEvent {
            tag: Some(open.tag),
            start_time: Some(open.start_time()),
            application: open.application,
            effect: Effect::Closed(EndReason::Expired),
            ..FlowEvent::new(State::End, flow, now, open.origin)
        };
        self.flows.extract_if(old).map(end).collect()
    }
}

/// The tag and the first start time of the table hold; an application that the event brings is newer than the table's.
fn complete(event: &mut FlowEvent, open: &OpenFlow) {
    event.tag = Some(open.tag);
    event.start_time = Some(open.start_time());
    if event.application.is_none() {
        event.application.clone_from(&open.application);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Usage;
    use proptest::prelude::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn event(state: State, port: u16, tag: Option<(u16, u16)>, second: i64) -> FlowEvent {
        let end = |n: u8| ([192, 0, 2, n].into(), port);
        let flow = Flow::new(Protocol::Tcp, end(1), end(2)).unwrap();
        FlowEvent {
            tag: tag.map(|(experiment, activity)| Tag {
                experiment,
                activity,
            }),
            ..FlowEvent::new(state, flow, at(second), Origin::NamedPipe)
        }
    }

    fn apply(table: &mut FlowTable, mut event: FlowEvent) -> (Step, FlowEvent) {
        let now = event.time;
        (table.step(&mut event, now), event)
    }

    fn of(origin: Origin, event: FlowEvent) -> FlowEvent {
        FlowEvent { origin, ..event }
    }

    fn usage() -> Option<Usage> {
        Some(Usage {
            received: Some(1),
            sent: Some(2),
        })
    }

    #[test]
    fn a_flow_ends_a_second_after_its_socket_and_its_own_end_is_no_surprise() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.flow = gone.flow.reversed();
        gone.usage = usage();
        assert_eq!(apply(&mut table, gone.clone()).0, Step::SocketClosing);
        assert_eq!(table.end_closed(at(7)), []);
        let end = table.end_closed(at(8)).remove(0);
        assert_eq!(
            (end.time, end.start_time(), end.usage),
            (at(7), at(5), usage())
        );
        assert_eq!(
            (end.tag(), end.origin),
            (
                Tag {
                    experiment: 2,
                    activity: 9
                },
                Origin::NamedPipe
            )
        );
        assert!(table.is_empty() && table.end_closed(at(9)).is_empty());
        let late = event(State::End, 1, None, 9);
        assert_eq!(apply(&mut table, late.clone()).0, Step::EndedAlready);
        assert_eq!(apply(&mut table, late).0, Step::EndedUnmatched);
        assert_eq!(apply(&mut table, gone).0, Step::SocketUnknown);
    }

    #[test]
    fn the_counts_of_a_socket_that_goes_before_the_start_of_its_flow_is_known_are_not_lost() {
        let mut table = FlowTable::new(10);
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        for (start, expected) in [(5, usage()), (8, None)] {
            assert_eq!(apply(&mut table, gone.clone()).0, Step::SocketUnknown);
            let start = event(State::Start, 1, Some((2, 9)), start);
            apply(&mut table, of(Origin::Iperf3, start));
            let end = of(Origin::Iperf3, event(State::End, 1, None, 9));
            let (step, end) = apply(&mut table, end);
            assert_eq!(end.usage, expected);
            if step == Step::SocketClosing {
                table.end_closed(at(60));
            }
            assert!(table.is_empty());
        }
    }

    #[test]
    fn an_end_without_counts_waits_for_one_that_has_them() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let first = of(Origin::Iperf3, event(State::End, 1, None, 7));
        assert_eq!(apply(&mut table, first.clone()).0, Step::SocketClosing);
        let counted = FlowEvent {
            usage: usage(),
            ..of(Origin::Socket, first)
        };
        assert_eq!(apply(&mut table, counted).0, Step::SocketClosing);
        assert_eq!(table.end_closed(at(8))[0].usage, usage());
    }

    #[test]
    fn the_counts_of_a_socket_that_goes_just_after_the_end_of_its_flow_are_not_lost() {
        let mut table = FlowTable::new(10);
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.flow = gone.flow.reversed();
        gone.usage = usage();
        let without = FlowEvent {
            usage: None,
            ..gone.clone()
        };
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        apply(&mut table, event(State::End, 1, None, 7));
        assert_eq!(apply(&mut table, without).0, Step::SocketUnknown);
        let (step, late) = apply(&mut table, gone.clone());
        assert_eq!((step, late.effect), (Step::CountedLate, Effect::Counted));
        assert_eq!(
            (late.flow, late.start_time()),
            (gone.flow.reversed(), at(5))
        );
        assert_eq!(late.tag().experiment, 2);
        assert_eq!(apply(&mut table, gone.clone()).0, Step::SocketUnknown);
        // Those of the next flow on a socket are its own.
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 8));
        apply(&mut table, event(State::End, 1, None, 8));
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 9));
        assert_eq!(apply(&mut table, gone.clone()).0, Step::SocketClosing);
    }

    #[test]
    fn a_producer_that_is_quick_ends_its_flow_itself_with_the_kernels_counts() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        apply(&mut table, gone);
        let (step, end) = apply(&mut table, event(State::End, 1, None, 8));
        assert_eq!((step, end.time, end.usage), (Step::Ended, at(8), usage()));
        assert_eq!(table.end_closed(at(20)), []);
    }

    #[test]
    fn a_producer_retags_what_a_socket_told_and_not_the_other_way_round() {
        let mut table = FlowTable::new(10);
        let start = |origin, tag| of(origin, event(State::Start, 1, Some(tag), 5));
        apply(&mut table, start(Origin::Netlink, (2, 9)));
        let retagged = apply(&mut table, start(Origin::NamedPipe, (3, 4))).0;
        let kept = apply(&mut table, start(Origin::Netlink, (2, 9))).0;
        assert_eq!((retagged, kept), (Step::Retagged, Step::Duplicate));
    }

    #[test]
    fn a_flow_of_the_netlink_plugin_ends_with_its_socket_at_once() {
        let mut table = FlowTable::new(10);
        apply(
            &mut table,
            of(Origin::Netlink, event(State::Start, 1, Some((2, 9)), 5)),
        );
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        let (step, end) = apply(&mut table, gone);
        assert_eq!((step, end.origin), (Step::SocketClosed, Origin::Netlink));
        let again = of(Origin::Netlink, event(State::End, 1, None, 7));
        assert_eq!(apply(&mut table, again).0, Step::SocketUnknown);
    }

    #[test]
    fn a_repeated_start_is_dropped_and_another_tag_keeps_the_first_start_time() {
        let mut table = FlowTable::new(10);
        assert_eq!(
            apply(&mut table, event(State::Start, 1, Some((2, 9)), 5)).0,
            Step::Started
        );
        assert_eq!(
            apply(&mut table, event(State::Start, 1, Some((2, 9)), 6)).0,
            Step::Duplicate
        );
        let (step, retag) = apply(&mut table, event(State::Start, 1, Some((2, 10)), 7));
        assert_eq!((step, retag.start_time()), (Step::Retagged, at(5)));
        let (step, end) = apply(&mut table, event(State::End, 1, Some((10, 2)), 8));
        assert_eq!(step, Step::Ended);
        assert_eq!(
            (end.tag(), end.start_time(), end.time),
            (retag.tag(), at(5), at(8))
        );
        assert!(table.is_empty());
    }

    #[test]
    fn an_end_of_an_unknown_flow_passes_with_its_own_time_as_start() {
        let mut table = FlowTable::new(10);
        let (step, end) = apply(&mut table, event(State::End, 1, None, 8));
        assert_eq!((step, end.start_time), (Step::EndedUnmatched, Some(at(8))));
        assert_eq!(end.tag, Some(Tag::default()));
    }

    #[test]
    fn news_is_completed_opens_with_a_tag_and_is_dropped_without() {
        let mut table = FlowTable::new(10);
        assert_eq!(
            apply(&mut table, event(State::Ongoing, 1, None, 1)).0,
            Step::OngoingUnknown
        );
        let (step, _) = apply(&mut table, event(State::Ongoing, 1, Some((3, 3)), 2));
        assert_eq!(step, Step::OpenedByOngoing);
        let (step, news) = apply(&mut table, event(State::Ongoing, 1, None, 3));
        assert_eq!((step, news.start_time()), (Step::Ongoing, at(2)));
        assert_eq!(
            news.tag(),
            Tag {
                experiment: 3,
                activity: 3
            }
        );
    }

    #[test]
    fn a_full_table_refuses_starts_and_nothing_else() {
        let mut table = FlowTable::new(1);
        apply(&mut table, event(State::Start, 1, Some((1, 1)), 1));
        assert_eq!(
            apply(&mut table, event(State::Start, 2, Some((1, 1)), 1)).0,
            Step::Refused
        );
        assert_eq!(
            apply(&mut table, event(State::Start, 1, Some((1, 2)), 1)).0,
            Step::Retagged
        );
        assert_eq!(
            apply(&mut table, event(State::End, 1, None, 1)).0,
            Step::Ended
        );
        assert_eq!(
            apply(&mut table, event(State::Start, 2, Some((1, 1)), 1)).0,
            Step::Started
        );
    }

    #[test]
    fn only_flows_past_the_age_expire() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((1, 1)), 100));
        apply(&mut table, event(State::Start, 2, Some((1, 1)), 150));
        let ended = table.expire(at(161), Duration::from_secs(60));
        assert_eq!(ended.len(), 1);
        assert_eq!(
            (ended[0].state, ended[0].start_time()),
            (State::End, at(100))
        );
        assert_eq!(table.len(), 1);
        assert!(table.expire(at(161), Duration::MAX).is_empty());
    }

    proptest! {
        /// Whatever comes, the table holds exactly the flows whose last start was not followed by an
        /// end, and never more than it may.
        #[test]
        fn the_table_agrees_with_a_simple_model(
            events in proptest::collection::vec((0u8..3, 1u16..6, proptest::option::of(1u16..3)), 0..80)
        ) {
            let mut table = FlowTable::new(4);
            let mut model = std::collections::BTreeMap::new();
            for (second, (state, port, tag)) in events.into_iter().enumerate() {
                let state = [State::Start, State::Ongoing, State::End][usize::from(state)];
                let tag = tag.map(|t| (t, t));
                let (step, out) = apply(&mut table, event(state, port, tag, second as i64));
                match state {
                    State::End => { model.remove(&port); }
                    State::Ongoing if tag.is_none() => {}
                    _ if model.contains_key(&port) || model.len() < 4 => {
                        model.entry(port).or_insert(second as i64);
                    }
                    _ => prop_assert_eq!(step, Step::Refused),
                }
                if step.passes() {
                    prop_assert!(out.tag.is_some() && out.start_time.is_some());
                }
                prop_assert_eq!(table.len(), model.len());
            }
            for (flow, open) in table.iter() {
                prop_assert_eq!(at(model[&flow.source.port]), open.start_time());
            }
        }
    }
}
