//! The table of open flows: what each flow event means, given what is known of its flow. No I/O, no clock.
//!
//! A flow is in one of four phases:
//!
//! - *unknown*: the table has not heard of it, or has forgotten it;
//! - *open*: it was started and has not ended;
//! - *closing*: it is open, but its socket on this host has closed, and its producer has [`PRODUCER_GRACE`] to
//!   report the end itself, since it may know more of the transfer than the kernel;
//! - *closed*: it ended a short while ago, so that late reports about it are recognised.
//!
//! | event | unknown | open | closing | closed |
//! | --- | --- | --- | --- | --- |
//! | start | `Started`, now open; `Refused` if the table is full | `Duplicate`; `Retagged` with another tag | as open | as unknown |
//! | ongoing | `OpenedByOngoing` with a tag, now open; `OngoingUnknown` without | `Ongoing` | as open | as unknown |
//! | end, from a producer | `EndedUnmatched` | `Ended`, now closed | `Ended` with the socket's byte counts, now closed | `EndedAlready` if it ended with its socket, now unknown; else as unknown |
//! | end, from a socket | `SocketUnknown` | `SocketClosing`, now closing; `SocketClosed`, now closed, if the flow was reported by its socket and the byte counts are known | as open; the better counts are kept | `CountedLate` if it lacks byte counts, now unknown; else as unknown |
//! | [`PRODUCER_GRACE`] is over | | | `SocketClosed`, now closed | |
//! | older than `flows.maxAge` | | `Expired`, now unknown | as open | |
//!
//! flowd-rs(8) has the same table for operators, under FLOWS. A socket reports with its local end first; its flow
//! may be open in either direction.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::event::{Effect, EndReason, FlowEvent, Origin, State};
use crate::flow::recent::RecentFlows;
use crate::flow::{Flow, Protocol, Tag};
use crate::metrics::outcomes;

outcomes! {
    /// What an event did to the table.
    pub enum Transition {
        /// A start of a flow that was not open.
        Started = "started": "started: {flow|flows}",
        /// A start of an open flow with another tag.
        Retagged = "retagged": "retagged: {flow|flows}",
        /// A start of an open flow with the same tag: dropped.
        Duplicate = "duplicate": "dropped: {start|starts} of open flows",
        /// An `ongoing` event of an open flow.
        Ongoing = "ongoing": "passed on: {report|reports} on open flows",
        /// An `ongoing` event with a tag opened a flow that was not open.
        OpenedByOngoing = "opened_by_ongoing": "started by an ongoing event: {flow|flows}",
        /// An `ongoing` event without a tag of a flow that is not open: dropped.
        OngoingUnknown = "ongoing_unknown": "dropped: {report|reports} on flows that are not open",
        /// An end of an open flow.
        Ended = "ended": "ended: {flow|flows}",
        /// An end of a flow that was not open.
        EndedUnmatched = "ended_unmatched": "passed on: {end|ends} of flows that were not open",
        /// The daemon ended a flow whose socket on this host has closed.
        SocketClosed = "ended_socket_closed": "ended with their socket: {flow|flows}",
        /// The socket of an open flow has closed; its producer may still report the end: held back.
        SocketClosing = "socket_closing": "held back: {end|ends} of sockets of open flows",
        /// The socket's end completed a flow that had just ended with the byte counts it lacked.
        CountedLate = "counted_late": "completed: byte counts of {flow|flows} after the end",
        /// The end of a socket that belongs to no open flow: dropped.
        SocketUnknown = "socket_unknown": "dropped: {end|ends} of sockets without an open flow",
        /// A producer's end of a flow that had ended with its socket: dropped.
        EndedAlready = "ended_already": "dropped: {end|ends} of flows that had ended with their socket",
        /// The daemon ended a flow older than `flows.maxAge`.
        Expired = "ended_expired": "ended for their age: {flow|flows}",
        /// A start beyond `flows.maxFlows`: dropped.
        Refused = "refused_table_full": "refused because the table is full: {flow|flows}",
        /// A firefly that the daemon has seen before: dropped.
        Echo = "echo": "dropped: {firefly|fireflies} seen before",
    }
}

impl Transition {
    /// Whether the backends receive the event.
    pub fn is_forwarded_to_backends(self) -> bool {
        !matches!(
            self,
            Transition::Duplicate
                | Transition::OngoingUnknown
                | Transition::Refused
                | Transition::Echo
                | Transition::SocketClosing
                | Transition::SocketUnknown
                | Transition::EndedAlready
        )
    }

    /// Whether the flow is open with a new tag, which the journal records.
    pub fn opens(self) -> bool {
        matches!(
            self,
            Transition::Started | Transition::Retagged | Transition::OpenedByOngoing
        )
    }

    /// Whether an open flow was closed, which the journal records.
    pub fn closes(self) -> bool {
        matches!(
            self,
            Transition::Ended | Transition::Expired | Transition::SocketClosed
        )
    }
}

/// What the table keeps of an open flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFlow {
    /// Start, or ongoing after the first `ongoing` event.
    pub state: State,
    /// Experiment and activity.
    pub tag: Tag,
    /// Which plugin reported the flow.
    pub origin: Origin,
    /// When the flow was entered here, in seconds since 1970. Its age counts from here, since the start time is
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

/// How long a producer may take to report the end of a flow whose socket has closed.
const PRODUCER_GRACE: SignedDuration = SignedDuration::from_secs(1);
/// How long, and how many, closed flows are remembered.
const CLOSED_TTL: Duration = Duration::from_secs(300);
const CLOSED_MAX: usize = 1 << 16;
/// How long after the end of a flow its socket's byte counts complete it.
const LATE_COUNTS_GRACE: SignedDuration = SignedDuration::from_secs(1);
/// How long, and how many, ends of sockets are kept for flows whose start is late.
const CLOSED_SOCKET_TTL: Duration = Duration::from_secs(1);
const CLOSED_SOCKET_MAX: usize = 1 << 12;

/// An open flow, and whether it is closing.
struct TableEntry {
    flow: OpenFlow,
    closing: Option<Closing>,
}

/// Why an open flow is in the phase *closing*.
struct Closing {
    since: Timestamp,
    /// The end of the flow's socket.
    end: Box<FlowEvent>,
}

/// A flow in the phase *closed*.
enum ClosedFlow {
    /// It ended with its socket; its producer may still report the end.
    WithSocket,
    /// Its producer ended it at this time, before its socket's byte counts were known.
    WithoutCounts(Timestamp, OpenFlow),
}

/// The open flows, at most `max_flows` of them, and those that closed a short while ago.
pub struct FlowTable {
    flows: HashMap<Flow, TableEntry>,
    max_flows: usize,
    /// When each flow began closing, the earliest first. Some of these flows have ended since.
    closing: VecDeque<(Timestamp, Flow)>,
    closed: RecentFlows<ClosedFlow>,
    /// Ends of sockets without an open flow, whose byte counts a late start may need.
    closed_sockets: RecentFlows<FlowEvent>,
}

impl FlowTable {
    /// An empty table.
    pub fn new(max_flows: usize) -> FlowTable {
        FlowTable {
            flows: HashMap::new(),
            max_flows,
            closing: VecDeque::new(),
            closed: RecentFlows::new(CLOSED_TTL, CLOSED_MAX),
            closed_sockets: RecentFlows::new(CLOSED_SOCKET_TTL, CLOSED_SOCKET_MAX),
        }
    }

    /// Changes the limit. Flows that are open beyond it stay open.
    pub fn set_max_flows(&mut self, max_flows: usize) {
        self.max_flows = max_flows;
    }

    /// Enters a flow that was open when the daemon last ran, beyond `max_flows` if need be.
    pub fn restore(&mut self, flow: Flow, open: OpenFlow) {
        let entry = TableEntry {
            flow: open,
            closing: None,
        };
        self.flows.insert(flow, entry);
    }

    /// Removes a restored flow that a later line of the journal closes.
    pub fn forget(&mut self, flow: &Flow) {
        self.flows.remove(flow);
    }

    /// The number of open flows.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether no flow is open.
    pub fn is_empty(&self) -> bool {
        self.flows.is_empty()
    }

    /// An open flow.
    pub fn get(&self, flow: &Flow) -> Option<&OpenFlow> {
        self.flows.get(flow).map(|entry| &entry.flow)
    }

    /// All open flows, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Flow, &OpenFlow)> {
        self.flows.iter().map(|(flow, entry)| (flow, &entry.flow))
    }

    /// Applies an event, and completes it with what the table knows of its flow: tag, start time, application.
    pub fn apply(&mut self, event: &mut FlowEvent, now: Timestamp) -> Transition {
        match event.state {
            State::Start => self.start(event, now),
            State::Ongoing => self.ongoing(event, now),
            State::End if event.origin.is_socket() => self.socket_end(event, now),
            State::End => self.producer_end(event, now),
        }
    }

    fn start(&mut self, event: &mut FlowEvent, now: Timestamp) -> Transition {
        let full = self.flows.len() >= self.max_flows;
        match self.flows.entry(event.flow) {
            Entry::Occupied(mut entry) => {
                let open = &mut entry.get_mut().flow;
                // The program that moves the data knows its tag better than a plugin that watches sockets.
                let keeps_tag = event.origin.is_socket() && !open.origin.is_socket();
                if open.tag == event.tag() || keeps_tag {
                    return Transition::Duplicate;
                }
                event.effect = Effect::Retagged(open.tag);
                open.tag = event.tag();
                open.origin = event.origin;
                if event.application.is_some() {
                    open.application.clone_from(&event.application);
                }
                complete(event, open);
                Transition::Retagged
            }
            Entry::Vacant(_) if full => Transition::Refused,
            Entry::Vacant(entry) => {
                self.closed.remove(&event.flow);
                entry.insert(TableEntry {
                    flow: OpenFlow::new(
                        event.tag(),
                        event.origin,
                        event.start_time(),
                        seconds(now),
                        event.application.clone(),
                    ),
                    closing: None,
                });
                event.start_time = Some(event.start_time());
                event.tag = Some(event.tag());
                event.effect = Effect::Opened;
                Transition::Started
            }
        }
    }

    fn ongoing(&mut self, event: &mut FlowEvent, now: Timestamp) -> Transition {
        if event.origin == Origin::Socket
            && let Some(flow) = self.flow_of_socket(&event.flow)
        {
            event.flow = flow;
        }
        if let Some(entry) = self.flows.get_mut(&event.flow) {
            entry.flow.state = State::Ongoing;
            complete(event, &entry.flow);
            return Transition::Ongoing;
        }
        if event.tag.is_none() {
            return Transition::OngoingUnknown;
        }
        match self.start(event, now) {
            Transition::Started => Transition::OpenedByOngoing,
            other => other,
        }
    }

    fn producer_end(&mut self, event: &mut FlowEvent, now: Timestamp) -> Transition {
        let Some(TableEntry { flow, closing }) = self.flows.remove(&event.flow) else {
            return self.end_of_unknown_flow(event);
        };
        if let Some(Closing { end, .. }) = closing {
            event.usage = event.usage.or(end.usage);
            event.netlink = event.netlink.take().or(end.netlink);
        }
        self.add_counts_of_closed_socket(event, flow.start_time());
        complete(event, &flow);
        event.effect = Effect::Closed(EndReason::Producer);
        if event.netlink.is_none() && event.flow.protocol == Protocol::Tcp {
            let closed = ClosedFlow::WithoutCounts(now, flow);
            self.closed.insert(event.flow, closed);
        }
        Transition::Ended
    }

    fn end_of_unknown_flow(&mut self, event: &mut FlowEvent) -> Transition {
        if let Some(ClosedFlow::WithSocket) = self.closed.remove(&event.flow) {
            return Transition::EndedAlready;
        }
        event.tag = Some(event.tag());
        event.start_time = Some(event.start_time());
        Transition::EndedUnmatched
    }

    /// The open flow of a socket, which has its local end first.
    fn flow_of_socket(&self, socket: &Flow) -> Option<Flow> {
        let directions = [*socket, socket.reversed()];
        directions
            .into_iter()
            .find(|flow| self.flows.contains_key(flow))
    }

    fn socket_end(&mut self, event: &mut FlowEvent, now: Timestamp) -> Transition {
        let Some(flow) = self.flow_of_socket(&event.flow) else {
            return self.end_of_unknown_socket(event, now);
        };
        event.flow = flow;
        self.add_counts_of_closed_socket(event, self.flows[&flow].flow.start_time());
        let entry = self.flows.get_mut(&flow).expect("the flow was just found");
        // A plugin that watches sockets reports no end of its own, so that there is nothing to wait for.
        if entry.flow.origin.is_socket() && event.usage.is_some() {
            self.close(event);
            return Transition::SocketClosed;
        }
        let Some(Closing { end, .. }) = &mut entry.closing else {
            let end = Box::new(event.clone());
            entry.closing = Some(Closing { since: now, end });
            self.closing.push_back((now, flow));
            return Transition::SocketClosing;
        };
        // If both ends are on this host, the socket of the source speaks for the flow.
        let is_source = |end: &FlowEvent| end.netlink.as_ref().is_some_and(|s| s.flow == flow);
        if end.usage.is_none() || (is_source(event) && !is_source(end)) {
            end.usage = event.usage;
            end.netlink.clone_from(&event.netlink);
        }
        Transition::SocketClosing
    }

    /// Completes a flow that its producer ended a moment ago; otherwise keeps the counts for a late start.
    fn end_of_unknown_socket(&mut self, event: &mut FlowEvent, now: Timestamp) -> Transition {
        if event.usage.is_none() {
            return Transition::SocketUnknown;
        }
        for flow in [event.flow, event.flow.reversed()] {
            let in_time = |closed: &ClosedFlow| matches!(closed, ClosedFlow::WithoutCounts(at, _) if now.duration_since(*at).abs() <= LATE_COUNTS_GRACE);
            if let Some(ClosedFlow::WithoutCounts(_, open)) = self.closed.remove_if(&flow, in_time)
            {
                event.flow = flow;
                event.origin = open.origin;
                event.effect = Effect::Counted;
                complete(event, &open);
                return Transition::CountedLate;
            }
        }
        self.closed_sockets.insert(event.flow, event.clone());
        Transition::SocketUnknown
    }

    /// Adds the byte counts of a socket that closed before the start of its flow was known.
    fn add_counts_of_closed_socket(&mut self, event: &mut FlowEvent, began: Timestamp) {
        if event.usage.is_some() || event.flow.protocol != Protocol::Tcp {
            return;
        }
        let directions = [event.flow, event.flow.reversed()];
        let end = directions
            .iter()
            .find_map(|flow| self.closed_sockets.remove(flow));
        // An end before the start is that of an earlier connection with the same 5-tuple.
        if let Some(end) = end.filter(|end| end.time >= began) {
            event.usage = end.usage;
            event.netlink = event.netlink.take().or(end.netlink);
        }
    }

    fn close(&mut self, event: &mut FlowEvent) {
        if let Some(TableEntry { flow, .. }) = self.flows.remove(&event.flow) {
            complete(event, &flow);
            event.origin = flow.origin;
            event.effect = Effect::Closed(EndReason::SocketClosed);
            self.closed.insert(event.flow, ClosedFlow::WithSocket);
        }
    }

    /// Ends the flows that have been closing for [`PRODUCER_GRACE`]; to be called about once a second.
    pub fn end_closing(&mut self, now: Timestamp) -> Vec<FlowEvent> {
        self.closed.expire_old(now);
        self.closed_sockets.expire_old(now);
        let mut ends = Vec::new();
        while let Some(&(since, flow)) = self.closing.front()
            && now.duration_since(since) >= PRODUCER_GRACE
        {
            self.closing.pop_front();
            let entry = self.flows.get_mut(&flow);
            let closing = entry.and_then(|entry| entry.closing.take_if(|c| c.since == since));
            if let Some(Closing { mut end, .. }) = closing {
                self.close(&mut end);
                ends.push(*end);
            }
        }
        ends
    }

    /// Ends every flow that was entered more than `max_age` ago.
    pub fn expire(&mut self, now: Timestamp, max_age: Duration) -> Vec<FlowEvent> {
        let limit = u64::from(seconds(now)).saturating_sub(max_age.as_secs());
        let is_old = |_: &Flow, entry: &mut TableEntry| u64::from(entry.flow.opened) < limit;
        let end = |(flow, TableEntry { flow: open, .. }): (Flow, TableEntry)| FlowEvent {
            tag: Some(open.tag),
            start_time: Some(open.start_time()),
            application: open.application,
            effect: Effect::Closed(EndReason::Expired),
            ..FlowEvent::new(State::End, flow, now, open.origin)
        };
        self.flows.extract_if(is_old).map(end).collect()
    }
}

/// Completes an event from the table. Tag and first start time are the table's; an application that the event
/// brings is newer than the table's.
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

    fn apply(table: &mut FlowTable, mut event: FlowEvent) -> (Transition, FlowEvent) {
        let now = event.time;
        (table.apply(&mut event, now), event)
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
        assert_eq!(apply(&mut table, gone.clone()).0, Transition::SocketClosing);
        assert_eq!(table.end_closing(at(7)), []);
        let end = table.end_closing(at(8)).remove(0);
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
        assert!(table.is_empty() && table.end_closing(at(9)).is_empty());
        let late = event(State::End, 1, None, 9);
        assert_eq!(apply(&mut table, late.clone()).0, Transition::EndedAlready);
        assert_eq!(apply(&mut table, late).0, Transition::EndedUnmatched);
        assert_eq!(apply(&mut table, gone).0, Transition::SocketUnknown);
    }

    #[test]
    fn the_counts_of_a_socket_that_goes_before_the_start_of_its_flow_is_known_are_not_lost() {
        let mut table = FlowTable::new(10);
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        for (start, expected) in [(5, usage()), (8, None)] {
            assert_eq!(apply(&mut table, gone.clone()).0, Transition::SocketUnknown);
            let start = event(State::Start, 1, Some((2, 9)), start);
            apply(&mut table, of(Origin::Iperf3, start));
            let end = of(Origin::Iperf3, event(State::End, 1, None, 9));
            let (step, end) = apply(&mut table, end);
            assert_eq!(end.usage, expected);
            if step == Transition::SocketClosing {
                table.end_closing(at(60));
            }
            assert!(table.is_empty());
        }
    }

    #[test]
    fn an_end_without_counts_waits_for_one_that_has_them() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let first = of(Origin::Iperf3, event(State::End, 1, None, 7));
        assert_eq!(
            apply(&mut table, first.clone()).0,
            Transition::SocketClosing
        );
        let counted = FlowEvent {
            usage: usage(),
            ..of(Origin::Socket, first)
        };
        assert_eq!(apply(&mut table, counted).0, Transition::SocketClosing);
        assert_eq!(table.end_closing(at(8))[0].usage, usage());
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
        assert_eq!(apply(&mut table, without).0, Transition::SocketUnknown);
        let (step, late) = apply(&mut table, gone.clone());
        assert_eq!(
            (step, late.effect),
            (Transition::CountedLate, Effect::Counted)
        );
        assert_eq!(
            (late.flow, late.start_time()),
            (gone.flow.reversed(), at(5))
        );
        assert_eq!(late.tag().experiment, 2);
        assert_eq!(apply(&mut table, gone.clone()).0, Transition::SocketUnknown);
        // Those of the next flow on a socket are its own.
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 8));
        apply(&mut table, event(State::End, 1, None, 8));
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 9));
        assert_eq!(apply(&mut table, gone.clone()).0, Transition::SocketClosing);
    }

    #[test]
    fn a_producer_that_is_quick_ends_its_flow_itself_with_the_kernels_counts() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        apply(&mut table, gone);
        let (step, end) = apply(&mut table, event(State::End, 1, None, 8));
        assert_eq!(
            (step, end.time, end.usage),
            (Transition::Ended, at(8), usage())
        );
        assert_eq!(table.end_closing(at(20)), []);
    }

    #[test]
    fn a_producer_retags_what_a_socket_told_and_not_the_other_way_round() {
        let mut table = FlowTable::new(10);
        let start = |origin, tag| of(origin, event(State::Start, 1, Some(tag), 5));
        apply(&mut table, start(Origin::Netlink, (2, 9)));
        let retagged = apply(&mut table, start(Origin::NamedPipe, (3, 4))).0;
        let kept = apply(&mut table, start(Origin::Netlink, (2, 9))).0;
        assert_eq!(
            (retagged, kept),
            (Transition::Retagged, Transition::Duplicate)
        );
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
        assert_eq!(
            (step, end.origin),
            (Transition::SocketClosed, Origin::Netlink)
        );
        let again = of(Origin::Netlink, event(State::End, 1, None, 7));
        assert_eq!(apply(&mut table, again).0, Transition::SocketUnknown);
    }

    #[test]
    fn a_repeated_start_is_dropped_and_another_tag_keeps_the_first_start_time() {
        let mut table = FlowTable::new(10);
        assert_eq!(
            apply(&mut table, event(State::Start, 1, Some((2, 9)), 5)).0,
            Transition::Started
        );
        assert_eq!(
            apply(&mut table, event(State::Start, 1, Some((2, 9)), 6)).0,
            Transition::Duplicate
        );
        let (step, retag) = apply(&mut table, event(State::Start, 1, Some((2, 10)), 7));
        assert_eq!((step, retag.start_time()), (Transition::Retagged, at(5)));
        let (step, end) = apply(&mut table, event(State::End, 1, Some((10, 2)), 8));
        assert_eq!(step, Transition::Ended);
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
        assert_eq!(
            (step, end.start_time),
            (Transition::EndedUnmatched, Some(at(8)))
        );
        assert_eq!(end.tag, Some(Tag::default()));
    }

    #[test]
    fn news_is_completed_opens_with_a_tag_and_is_dropped_without() {
        let mut table = FlowTable::new(10);
        assert_eq!(
            apply(&mut table, event(State::Ongoing, 1, None, 1)).0,
            Transition::OngoingUnknown
        );
        let (step, _) = apply(&mut table, event(State::Ongoing, 1, Some((3, 3)), 2));
        assert_eq!(step, Transition::OpenedByOngoing);
        let (step, news) = apply(&mut table, event(State::Ongoing, 1, None, 3));
        assert_eq!((step, news.start_time()), (Transition::Ongoing, at(2)));
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
            Transition::Refused
        );
        assert_eq!(
            apply(&mut table, event(State::Start, 1, Some((1, 2)), 1)).0,
            Transition::Retagged
        );
        assert_eq!(
            apply(&mut table, event(State::End, 1, None, 1)).0,
            Transition::Ended
        );
        assert_eq!(
            apply(&mut table, event(State::Start, 2, Some((1, 1)), 1)).0,
            Transition::Started
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

    /// What happens to one flow, in the words of the table at the top of this file.
    #[derive(Clone, Copy, Debug)]
    enum Input {
        Start(u16),
        StartFromSocket(u16),
        Ongoing(Option<u16>),
        ProducerEnd,
        SocketEnd {
            with_counts: bool,
        },
        /// A second passes.
        Tick,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Phase {
        Unknown,
        Open,
        Closing { with_counts: bool },
        ClosedWithSocket,
        ClosedWithoutCounts { at: i64 },
    }

    /// One flow, by the table at the top of this file.
    #[derive(Clone, Copy, Debug)]
    struct Model {
        phase: Phase,
        tag: u16,
        from_socket: bool,
        opened: i64,
        /// The counts of a socket that closed while the flow was not open: when, and how many seconds they stay.
        kept_counts: Option<(i64, u8)>,
    }

    const MODEL_MAX_FLOWS: usize = 4;
    const MODEL_MAX_AGE: i64 = 5;

    impl Model {
        fn is_open(&self) -> bool {
            matches!(self.phase, Phase::Open | Phase::Closing { .. })
        }

        fn start(&mut self, tag: u16, from_socket: bool, now: i64, full: bool) -> Transition {
            if self.is_open() {
                if self.tag == tag || (from_socket && !self.from_socket) {
                    return Transition::Duplicate;
                }
                (self.tag, self.from_socket) = (tag, from_socket);
                return Transition::Retagged;
            }
            if full {
                return Transition::Refused;
            }
            (self.phase, self.tag, self.from_socket) = (Phase::Open, tag, from_socket);
            self.opened = now;
            Transition::Started
        }

        fn takes_kept_counts(&mut self) -> bool {
            let kept = self.kept_counts.take();
            kept.is_some_and(|(time, _)| time >= self.opened)
        }

        fn apply(&mut self, input: Input, now: i64, full: bool) -> Transition {
            match (input, self.phase) {
                (Input::Start(tag), _) => self.start(tag, false, now, full),
                (Input::StartFromSocket(tag), _) => self.start(tag, true, now, full),
                (Input::Ongoing(_), _) if self.is_open() => Transition::Ongoing,
                (Input::Ongoing(None), _) => Transition::OngoingUnknown,
                (Input::Ongoing(Some(tag)), _) => match self.start(tag, false, now, full) {
                    Transition::Started => Transition::OpenedByOngoing,
                    other => other,
                },
                (Input::ProducerEnd, Phase::Open | Phase::Closing { .. }) => {
                    if self.phase != (Phase::Closing { with_counts: true }) {
                        self.takes_kept_counts();
                    }
                    self.phase = Phase::ClosedWithoutCounts { at: now };
                    Transition::Ended
                }
                (Input::ProducerEnd, phase) => {
                    self.phase = Phase::Unknown;
                    match phase {
                        Phase::ClosedWithSocket => Transition::EndedAlready,
                        _ => Transition::EndedUnmatched,
                    }
                }
                (Input::SocketEnd { with_counts }, Phase::Open | Phase::Closing { .. }) => {
                    let with_counts = with_counts || self.takes_kept_counts();
                    if self.from_socket && with_counts {
                        self.phase = Phase::ClosedWithSocket;
                        return Transition::SocketClosed;
                    }
                    let had = self.phase == (Phase::Closing { with_counts: true });
                    let with_counts = with_counts || had;
                    self.phase = Phase::Closing { with_counts };
                    Transition::SocketClosing
                }
                (Input::SocketEnd { with_counts: true }, Phase::ClosedWithoutCounts { at })
                    if now - at <= 1 =>
                {
                    self.phase = Phase::Unknown;
                    Transition::CountedLate
                }
                (Input::SocketEnd { with_counts }, _) => {
                    if with_counts {
                        self.kept_counts = Some((now, 2));
                    }
                    Transition::SocketUnknown
                }
                (Input::Tick, _) => unreachable!("a second passes for all flows"),
            }
        }

        /// Whether the flow ended with its socket, and whether it expired.
        fn tick(&mut self, now: i64) -> (bool, bool) {
            let kept = self.kept_counts.filter(|(_, seconds)| *seconds > 1);
            self.kept_counts = kept.map(|(time, seconds)| (time, seconds - 1));
            if matches!(self.phase, Phase::Closing { .. }) {
                self.phase = Phase::ClosedWithSocket;
                return (true, false);
            }
            if self.phase == Phase::Open && self.opened < now - MODEL_MAX_AGE {
                self.phase = Phase::Unknown;
                return (false, true);
            }
            (false, false)
        }
    }

    fn inputs() -> impl Strategy<Value = Vec<(u16, Input)>> {
        let tag = || 1u16..3;
        let input = prop_oneof![
            3 => tag().prop_map(Input::Start),
            2 => tag().prop_map(Input::StartFromSocket),
            2 => proptest::option::of(tag()).prop_map(Input::Ongoing),
            3 => Just(Input::ProducerEnd),
            3 => any::<bool>().prop_map(|with_counts| Input::SocketEnd { with_counts }),
            2 => Just(Input::Tick),
        ];
        proptest::collection::vec((1u16..6, input), 0..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_table_of_transitions_holds(inputs in inputs()) {
            let mut table = FlowTable::new(MODEL_MAX_FLOWS);
            let unknown = Model {
                phase: Phase::Unknown, tag: 0, from_socket: false, opened: 0, kept_counts: None,
            };
            let mut flows = [unknown; 6];
            let mut now = 1;
            table.end_closing(at(now));
            for (port, input) in inputs {
                if matches!(input, Input::Tick) {
                    now += 1;
                    let ticks = flows.each_mut().map(|flow| flow.tick(now));
                    let ports = |events: Vec<FlowEvent>| {
                        let mut ports: Vec<_> = events.iter().map(|e| usize::from(e.flow.source.port)).collect();
                        ports.sort_unstable();
                        ports
                    };
                    let expected = |expected: fn(&(bool, bool)) -> bool| {
                        let ports = ticks.iter().enumerate().filter(|(_, tick)| expected(tick));
                        ports.map(|(port, _)| port).collect::<Vec<_>>()
                    };
                    prop_assert_eq!(ports(table.end_closing(at(now))), expected(|tick| tick.0));
                    let expired = table.expire(at(now), Duration::from_secs(MODEL_MAX_AGE as u64));
                    prop_assert_eq!(ports(expired), expected(|tick| tick.1));
                    continue;
                }
                let both = |tag| Some((tag, tag));
                let (state, tag, origin) = match input {
                    Input::Start(tag) => (State::Start, both(tag), Origin::NamedPipe),
                    Input::StartFromSocket(tag) => (State::Start, both(tag), Origin::Netlink),
                    Input::Ongoing(tag) => (State::Ongoing, tag.and_then(both), Origin::NamedPipe),
                    Input::ProducerEnd => (State::End, None, Origin::NamedPipe),
                    _ => (State::End, None, Origin::Socket),
                };
                let mut event = of(origin, event(state, port, tag, now));
                if let Input::SocketEnd { with_counts } = input {
                    event.usage = with_counts.then(usage).flatten();
                    if port % 2 == 0 {
                        event.flow = event.flow.reversed();
                    }
                }
                let full = flows.iter().filter(|flow| flow.is_open()).count() >= MODEL_MAX_FLOWS;
                let expected = flows[usize::from(port)].apply(input, now, full);
                let (transition, out) = apply(&mut table, event);
                prop_assert_eq!(transition, expected, "{:?} of {}", input, port);
                if transition.is_forwarded_to_backends() {
                    prop_assert!(out.tag.is_some() && out.start_time.is_some());
                }
                for (port, model) in flows.iter().enumerate().skip(1) {
                    let flow = super::tests::event(State::Start, port as u16, None, 0).flow;
                    let open = table.get(&flow).map(|open| (open.tag.experiment, open.start_time()));
                    prop_assert_eq!(open, model.is_open().then(|| (model.tag, at(model.opened))));
                }
            }
        }
    }
}
