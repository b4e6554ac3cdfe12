//! The table of open flows: what each flow event means, given what is known of its flow. No I/O, no clock.
//!
//! One connection is one flow, whichever end a report names first. A flow is in one of four phases:
//!
//! - *unknown*: the table has not heard of it, or has forgotten it;
//! - *open*: it was started and has not ended;
//! - *closing*: it is open, but its socket on this host has closed, and its producer has [`PRODUCER_GRACE`] to
//!   report the end itself, since it may know more of the transfer than the kernel;
//! - *closed*: it ended a short while ago, so that late reports about it are recognised.
//!
//! | event | unknown | open | closing | closed |
//! | --- | --- | --- | --- | --- |
//! | start | `Started`, now open; `Refused` if the table is full, `RefusedSource` if its source has too many | `Duplicate`; `Retagged` with another tag | first `SocketClosed`, then as unknown; as open if it tells of a start before the socket closed | as unknown |
//! | ongoing | `OpenedByOngoing` with a tag, now open; `OngoingUnknown` without | `Ongoing` | as open | as unknown |
//! | end, from a producer | `EndedUnmatched` | `Ended`, now closed | `Ended` with the socket's byte counts, now closed | `EndedAlready` |
//! | end, from a socket | `SocketUnknown` | `SocketClosing`, now closing; `SocketClosed`, now closed, if the flow was reported by its socket and the byte counts are known | as open; the better counts are kept | `CountedLate` if it lacks byte counts; else as unknown |
//! | [`PRODUCER_GRACE`] is over | | | `SocketClosed`, now closed | |
//! | older than `flows.maxAge` | | `Expired`, now closed | as open, with the socket's byte counts | |
//! | an operator ends it | | `EndedByOperator`, now closed | as open, with the socket's byte counts | |
//!
//! flowd-rs(8) has the same table for operators, under FLOWS. Three rules stand before it:
//!
//! - A start with another tag, and an end, of a flow that a more trusted source opened are `LessTrusted`, and dropped;
//!   see [`Origin::trust`]. Sockets are the exception: nothing knows better when a socket closed.
//! - The end of a socket that is not the flow's is handled as if the flow were not open. Sockets of the same 5-tuple
//!   that follow each other differ in their cookies. As long as one of the two is not known, `live_socket` says
//!   which socket the 5-tuple has now.
//! - Ages and holds count on a clock that nobody sets; a flow never ends before it starts.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::shards::{SHARDS, Shards};
use super::sources::{FlowSource, SourceId, Sources};
use crate::event::{Effect, EndReason, FlowEvent, Origin, State};
use crate::flow::recent::RecentFlows;
use crate::flow::{Flow, Protocol, Tag};
use crate::metrics::outcomes;
use crate::socket::Socket;

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
        /// A producer's end of a flow that had ended a short while ago: dropped.
        EndedAlready = "ended_already": "dropped: {end|ends} of flows that had just ended",
        /// A start or an end from a source that is trusted less than the one that opened the flow: dropped.
        LessTrusted = "less_trusted": "dropped: {report|reports} on flows of a more trusted source",
        /// The daemon ended a flow older than `flows.maxAge`.
        Expired = "ended_expired": "ended for their age: {flow|flows}",
        /// An operator ended a flow.
        EndedByOperator = "ended_operator": "ended by an operator: {flow|flows}",
        /// A start beyond `flows.maxFlows`: dropped.
        Refused = "refused_table_full": "refused because the table is full: {flow|flows}",
        /// A start beyond `flows.maxPerSource`: dropped.
        RefusedSource = "refused_source_share": "refused because their source has too many: {flow|flows}",
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
                | Transition::RefusedSource
                | Transition::Echo
                | Transition::SocketClosing
                | Transition::SocketUnknown
                | Transition::EndedAlready
                | Transition::LessTrusted
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
            Transition::Ended
                | Transition::Expired
                | Transition::SocketClosed
                | Transition::EndedByOperator
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
    /// When the flow was entered here, in seconds since the host started. Its age counts from here, since the start
    /// time is what a producer says.
    pub entered: u32,
    /// The number of this start or retag: of two flows, the one with the higher number was started later.
    pub sequence: u64,
    /// When it began, in microseconds since 1970.
    start_micros: i64,
    /// The flow's socket on this host, once known.
    pub socket: Option<SocketId>,
    /// Name and version of the program that moves the data.
    pub application: Option<Arc<str>>,
}

impl OpenFlow {
    /// A flow that began at `start` and was entered at `entered`, in seconds since the host started.
    pub fn new(
        tag: Tag,
        origin: Origin,
        start: Timestamp,
        entered: u32,
        application: Option<Arc<str>>,
    ) -> OpenFlow {
        OpenFlow {
            state: State::Start,
            tag,
            origin,
            entered,
            sequence: 0,
            start_micros: start.as_microsecond(),
            socket: None,
            application,
        }
    }

    /// When the flow began.
    pub fn start_time(&self) -> Timestamp {
        Timestamp::from_microsecond(self.start_micros).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

/// What identifies a TCP socket: sockets of the same 5-tuple that follow each other have different cookies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketId {
    /// The kernel's cookie, `idiag_cookie` of sock_diag(7).
    pub cookie: NonZeroU64,
    /// Whether the socket's local end is the destination of the canonical flow. If both ends of a flow are on this host,
    /// this tells their sockets apart.
    reversed: bool,
}

impl SocketId {
    /// `flow` is in the direction of the socket, with its local end as the source. `None` if `cookie` is 0.
    pub fn new(flow: &Flow, cookie: u64) -> Option<SocketId> {
        let reversed = flow.canonical().1;
        let cookie = NonZeroU64::new(cookie)?;
        Some(SocketId { cookie, reversed })
    }

    /// The direction of the socket, with its local end as the source. `flow` may be either direction.
    pub fn direction(self, flow: &Flow) -> Flow {
        let canonical = flow.canonical().0;
        match self.reversed {
            true => canonical.reversed(),
            false => canonical,
        }
    }
}

/// The socket that reported an event.
fn reporting_socket(event: &FlowEvent) -> Option<SocketId> {
    let socket = event.netlink.as_ref()?;
    SocketId::new(&socket.flow, socket.info.cookie)
}

/// The present, on the two clocks that the table needs.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// The time of day, for what is reported.
    pub wall: Timestamp,
    /// Time since the host started, for ages and holds.
    pub boot: Duration,
}

/// Whole seconds, as [`OpenFlow::entered`] counts them.
fn seconds(boot: Duration) -> u32 {
    u32::try_from(boot.as_secs()).unwrap_or(u32::MAX)
}

/// How long a producer may take to report the end of a flow whose socket has closed.
const PRODUCER_GRACE: Duration = Duration::from_secs(1);
/// How long, and how many, closed flows are remembered.
const CLOSED_TTL: Duration = Duration::from_secs(300);
const CLOSED_MAX: usize = 1 << 16;
/// How long after the end of a flow its socket's byte counts complete it.
const LATE_COUNTS_GRACE: Duration = Duration::from_secs(1);
/// How long, and how many, ends of sockets are kept for flows whose start is late.
const CLOSED_SOCKET_TTL: Duration = Duration::from_secs(1);
const CLOSED_SOCKET_MAX: usize = 1 << 12;

/// An open flow, which way round it was first reported, and whether it is closing.
struct TableEntry {
    flow: OpenFlow,
    /// Whether the flow is the reverse of its canonical flow.
    reversed: bool,
    closing: Option<Closing>,
    /// Who opened it; a retag does not change that.
    source: SourceId,
}

impl TableEntry {
    fn direction(&self, canonical: &Flow) -> Flow {
        match self.reversed {
            true => canonical.reversed(),
            false => *canonical,
        }
    }
}

impl TableEntry {
    /// Learns a socket that a scan showed; `flow` is in its direction. A flow whose socket was replaced begins closing.
    fn learn_socket(&mut self, flow: Flow, cookie: u64, now: Now) -> Learned {
        let Some(socket) = SocketId::new(&flow, cookie).filter(|_| self.closing.is_none()) else {
            return Learned::Nothing;
        };
        let Some(known) = self.flow.socket else {
            self.flow.socket = Some(socket);
            return Learned::New;
        };
        // If both ends are on this host, the flow has two sockets; the first that was seen is the flow's.
        if socket == known || socket.reversed != known.reversed {
            return Learned::Nothing;
        }
        let end = FlowEvent::new(State::End, flow, now.wall, Origin::Socket);
        self.closing = Some(Closing {
            since: now.boot,
            end: Box::new(end),
        });
        Learned::Replaced
    }
}

/// What a socket that a scan showed means for the flow of its 5-tuple.
enum Learned {
    /// It is the flow's, and was not known.
    New,
    /// It is another one than the flow's, which must have closed.
    Replaced,
    Nothing,
}

/// Why an open flow is in the phase *closing*.
struct Closing {
    since: Duration,
    /// The end of the flow's socket.
    end: Box<FlowEvent>,
}

/// A flow that its producer ended before its socket's byte counts were known.
struct WithoutCounts {
    ended: Duration,
    direction: Flow,
    flow: OpenFlow,
}

/// The open flows, at most `max_flows` of them, and those that closed a short while ago. All maps are keyed by canonical
/// flows.
pub struct FlowTable {
    flows: Shards<TableEntry>,
    max_flows: usize,
    sources: Sources,
    max_per_source: usize,
    /// The number of the next start or retag.
    next_sequence: u64,
    /// When each flow began closing, the earliest first. Some of these flows have ended since.
    closing: VecDeque<(Duration, Flow)>,
    /// Sockets of open flows that became known: see [`FlowTable::take_learned_sockets`].
    learned: Vec<(Flow, u64)>,
    /// Where the search for expired flows stopped.
    next_shard: usize,
    closed: RecentFlows<Option<Box<WithoutCounts>>>,
    /// Ends of sockets without an open flow, whose byte counts a late start may need.
    closed_sockets: RecentFlows<FlowEvent>,
}

impl FlowTable {
    /// An empty table.
    pub fn new(max_flows: usize) -> FlowTable {
        FlowTable {
            flows: Shards::new(),
            max_flows,
            sources: Sources::default(),
            max_per_source: usize::MAX,
            next_sequence: 1,
            closing: VecDeque::new(),
            learned: Vec::new(),
            next_shard: 0,
            closed: RecentFlows::new(CLOSED_TTL, CLOSED_MAX),
            closed_sockets: RecentFlows::new(CLOSED_SOCKET_TTL, CLOSED_SOCKET_MAX),
        }
    }

    /// Changes the limits, of all flows and of those of one source. Flows that are open beyond them stay open.
    pub fn set_limits(&mut self, max_flows: usize, max_per_source: usize) {
        (self.max_flows, self.max_per_source) = (max_flows, max_per_source);
    }

    /// Removes a flow, which no longer counts for its source.
    fn remove(&mut self, canonical: &Flow) -> Option<TableEntry> {
        let entry = self.flows.remove(canonical)?;
        self.sources.remove(entry.source);
        Some(entry)
    }

    /// Enters a flow that was open when the daemon last ran, beyond `max_flows` if need be. Without a sequence number,
    /// it counts as started after those that were restored before.
    pub fn restore(&mut self, flow: Flow, mut open: OpenFlow) {
        let (canonical, reversed) = flow.canonical();
        if open.sequence == 0 {
            open.sequence = self.next_sequence;
        }
        self.next_sequence = self.next_sequence.max(open.sequence + 1);
        // A later line of the journal replaces an earlier one.
        self.remove(&canonical);
        let source = self.sources.add(FlowSource::restored(open.origin));
        let entry = TableEntry {
            flow: open,
            reversed,
            closing: None,
            source,
        };
        self.flows.insert(canonical, entry);
    }

    /// Sets the socket of a restored flow; `flow` is in the direction of the socket.
    pub fn restore_socket(&mut self, flow: &Flow, cookie: u64) {
        if let Some(entry) = self.flows.get_mut(&flow.canonical().0) {
            entry.flow.socket = SocketId::new(flow, cookie);
        }
    }

    /// Removes a restored flow that a later line of the journal closes.
    pub fn forget(&mut self, flow: &Flow) {
        self.remove(&flow.canonical().0);
    }

    /// The number of open flows.
    pub fn len(&self) -> usize {
        self.flows.len()
    }

    /// Whether no flow is open.
    pub fn is_empty(&self) -> bool {
        self.flows.len() == 0
    }

    /// An open flow, in the direction in which it was first reported. `flow` may be either direction.
    pub fn get(&self, flow: &Flow) -> Option<(Flow, &OpenFlow)> {
        let canonical = flow.canonical().0;
        let entry = self.flows.get(&canonical)?;
        Some((entry.direction(&canonical), &entry.flow))
    }

    /// All open flows, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Flow, &OpenFlow)> {
        let flows = self.flows.iter();
        flows.map(|(canonical, entry)| (entry.direction(canonical), &entry.flow))
    }

    /// The open flows of one shard, in no order. `index` is less than [`SHARDS`].
    pub fn shard(&self, index: usize) -> impl Iterator<Item = (Flow, &OpenFlow)> {
        let flows = self.flows.shard(index);
        flows.map(|(canonical, entry)| (entry.direction(canonical), &entry.flow))
    }

    /// Applies an event, and completes it with what the table knows of its flow: direction, tag, start time,
    /// application. `live_socket` looks up the cookie of the socket that a TCP flow has now.
    ///
    /// A start may end the connection that had its 5-tuple before: call [`FlowTable::end_replaced`] first.
    pub fn apply(
        &mut self,
        event: &mut FlowEvent,
        now: Now,
        live_socket: impl FnOnce(&Flow) -> Option<u64>,
    ) -> Transition {
        match event.state {
            State::Start => self.start(event, now),
            State::Ongoing => self.ongoing(event, now),
            State::End if event.origin.is_socket() => self.socket_end(event, now, live_socket),
            State::End => self.producer_end(event, now),
        }
    }

    /// The end of the flow that a start replaces: the flow's socket has closed, and the start comes from a new connection
    /// with the same 5-tuple.
    pub fn end_replaced(&mut self, event: &FlowEvent) -> Option<FlowEvent> {
        if event.state != State::Start {
            return None;
        }
        let canonical = event.flow.canonical().0;
        let entry = self.flows.get_mut(&canonical)?;
        let is_later = |closing: &mut Closing| event.start_time() > closing.end.time;
        let mut end = *entry.closing.take_if(is_later)?.end;
        self.close(&canonical, &mut end, EndReason::SocketClosed);
        Some(end)
    }

    fn start(&mut self, event: &mut FlowEvent, now: Now) -> Transition {
        let full = self.flows.len() >= self.max_flows;
        let (canonical, reversed) = event.flow.canonical();
        if let Some(entry) = self.flows.get_mut(&canonical) {
            let (direction, open) = (entry.direction(&canonical), &mut entry.flow);
            if open.tag == event.tag() {
                return Transition::Duplicate;
            }
            if event.origin.trust() < open.origin.trust() {
                return Transition::LessTrusted;
            }
            event.effect = Effect::Retagged(open.tag);
            open.tag = event.tag();
            open.origin = event.origin;
            open.sequence = self.next_sequence;
            self.next_sequence += 1;
            if event.application.is_some() {
                open.application.clone_from(&event.application);
            }
            complete(event, direction, open);
            return Transition::Retagged;
        }
        if full {
            return Transition::Refused;
        }
        let source = FlowSource::of(event);
        if !event.origin.is_socket() && self.sources.count(source) >= self.max_per_source {
            return Transition::RefusedSource;
        }
        let start_time = event.start_time();
        let application = event.application.clone();
        let entered = seconds(now.boot);
        let mut flow = OpenFlow::new(event.tag(), event.origin, start_time, entered, application);
        flow.sequence = self.take_sequence();
        flow.socket = reporting_socket(event);
        let entry = TableEntry {
            flow,
            reversed,
            closing: None,
            source: self.sources.add(source),
        };
        self.flows.insert(canonical, entry);
        event.start_time = Some(start_time);
        event.tag = Some(event.tag());
        event.effect = Effect::Opened;
        Transition::Started
    }

    fn take_sequence(&mut self) -> u64 {
        self.next_sequence += 1;
        self.next_sequence - 1
    }

    fn ongoing(&mut self, event: &mut FlowEvent, now: Now) -> Transition {
        let canonical = event.flow.canonical().0;
        if let Some(entry) = self.flows.get_mut(&canonical) {
            let socket = event.netlink.as_ref();
            let scanned = |socket: &&Arc<Socket>| {
                event.origin == Origin::Socket && socket.info.is_connected()
            };
            if let Some(socket) = socket.filter(scanned) {
                let (flow, cookie) = (socket.flow, socket.info.cookie);
                match entry.learn_socket(flow, cookie, now) {
                    Learned::New => self.learned.push((flow, cookie)),
                    Learned::Replaced => self.closing.push_back((now.boot, canonical)),
                    Learned::Nothing => {}
                }
            }
            entry.flow.state = State::Ongoing;
            complete(event, entry.direction(&canonical), &entry.flow);
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

    fn producer_end(&mut self, event: &mut FlowEvent, now: Now) -> Transition {
        let canonical = event.flow.canonical().0;
        let Some(entry) = self.flows.get(&canonical) else {
            if self.closed.get(&canonical).is_some() {
                return Transition::EndedAlready;
            }
            event.tag = Some(event.tag());
            event.start_time = Some(event.start_time());
            return Transition::EndedUnmatched;
        };
        if event.origin.trust() < entry.flow.origin.trust() {
            return Transition::LessTrusted;
        }
        let direction = entry.direction(&canonical);
        if let Some(Closing { end, .. }) = &entry.closing {
            event.usage = event.usage.or(end.usage);
            event.netlink = event.netlink.take().or_else(|| end.netlink.clone());
        }
        let start_time = entry.flow.start_time();
        self.add_counts_of_closed_socket(event, start_time);
        let Some(TableEntry { flow, .. }) = self.remove(&canonical) else {
            return Transition::EndedUnmatched;
        };
        complete(event, direction, &flow);
        event.effect = Effect::Closed(EndReason::Producer);
        let lacks_counts = event.netlink.is_none() && event.flow.protocol == Protocol::Tcp;
        let without_counts = lacks_counts.then_some(WithoutCounts {
            ended: now.boot,
            direction,
            flow,
        });
        self.closed.insert(canonical, without_counts.map(Box::new));
        Transition::Ended
    }

    fn socket_end(
        &mut self,
        event: &mut FlowEvent,
        now: Now,
        live_socket: impl FnOnce(&Flow) -> Option<u64>,
    ) -> Transition {
        let canonical = event.flow.canonical().0;
        let ended = reporting_socket(event);
        let Some(entry) = self.flows.get_mut(&canonical) else {
            return self.end_of_other_socket(event, now);
        };
        let of_this_flow = match (ended, entry.flow.socket) {
            (Some(ended), Some(known)) => ended == known,
            // One of the two is not known. The flow's socket is alive if the 5-tuple has one that may be the flow's.
            (ended, known) => {
                let live = live_socket(&event.flow);
                let live = live.and_then(|cookie| SocketId::new(&event.flow, cookie));
                let is_flows = |live: &SocketId| {
                    Some(*live) != ended && known.is_none_or(|known| known == *live)
                };
                let alive = live.filter(is_flows);
                if let (Some(alive), None) = (alive, known) {
                    entry.flow.socket = Some(alive);
                    self.learned.push((event.flow, alive.cookie.get()));
                }
                alive.is_none()
            }
        };
        if !of_this_flow {
            return self.end_of_other_socket(event, now);
        }
        let direction = entry.direction(&canonical);
        let started = entry.flow.start_time();
        self.add_counts_of_closed_socket(event, started);
        let Some(entry) = self.flows.get_mut(&canonical) else {
            return Transition::SocketUnknown;
        };
        // A plugin that watches sockets reports no end of its own, so that there is nothing to wait for.
        if entry.flow.origin.is_socket() && event.usage.is_some() {
            self.close(&canonical, event, EndReason::SocketClosed);
            return Transition::SocketClosed;
        }
        // If both ends are on this host, the socket of the source speaks for the flow.
        let is_source = |end: &FlowEvent| {
            let socket = end.netlink.as_ref();
            socket.is_some_and(|socket| socket.flow == direction)
        };
        match &mut entry.closing {
            None => {
                let end = Box::new(event.clone());
                entry.closing = Some(Closing {
                    since: now.boot,
                    end,
                });
                self.closing.push_back((now.boot, canonical));
            }
            Some(Closing { end, .. })
                if end.usage.is_none() || (is_source(event) && !is_source(end)) =>
            {
                end.usage = event.usage;
                end.netlink.clone_from(&event.netlink);
            }
            Some(_) => {}
        }
        Transition::SocketClosing
    }

    /// The end of a socket that is not that of an open flow: completes a flow that its producer ended a moment ago, or
    /// keeps the counts for a late start.
    fn end_of_other_socket(&mut self, event: &mut FlowEvent, now: Now) -> Transition {
        if event.usage.is_none() {
            return Transition::SocketUnknown;
        }
        let canonical = event.flow.canonical().0;
        let in_time = |closed: &Option<Box<WithoutCounts>>| {
            let closed = closed.as_ref();
            closed.is_some_and(|closed| now.boot.abs_diff(closed.ended) <= LATE_COUNTS_GRACE)
        };
        if let Some(Some(closed)) = self.closed.remove_if(&canonical, in_time) {
            self.closed.insert(canonical, None);
            event.origin = closed.flow.origin;
            event.effect = Effect::Counted;
            complete(event, closed.direction, &closed.flow);
            return Transition::CountedLate;
        }
        if self.flows.get(&canonical).is_none() {
            self.closed_sockets.insert(canonical, event.clone());
        }
        Transition::SocketUnknown
    }

    /// Adds the byte counts of a socket that closed before the start of its flow was known.
    fn add_counts_of_closed_socket(&mut self, event: &mut FlowEvent, began: Timestamp) {
        if event.usage.is_some() || event.flow.protocol != Protocol::Tcp {
            return;
        }
        let end = self.closed_sockets.remove(&event.flow.canonical().0);
        // An end before the start is that of an earlier connection with the same 5-tuple.
        if let Some(end) = end.filter(|end| end.time >= began) {
            event.usage = end.usage;
            event.netlink = event.netlink.take().or(end.netlink);
        }
    }

    fn close(&mut self, canonical: &Flow, event: &mut FlowEvent, reason: EndReason) {
        if let Some(entry) = self.remove(canonical) {
            complete(event, entry.direction(canonical), &entry.flow);
            event.origin = entry.flow.origin;
            event.effect = Effect::Closed(reason);
            self.closed.insert(*canonical, None);
        }
    }

    /// The sockets of open flows that became known since the last call, each with its cookie and its flow in the
    /// direction of the socket. The journal records them.
    pub fn take_learned_sockets(&mut self) -> Vec<(Flow, u64)> {
        std::mem::take(&mut self.learned)
    }

    /// Learns the sockets that a scan showed, each with its cookie and its flow in the direction of the socket. A flow
    /// whose socket was replaced begins closing.
    pub fn learn_sockets(&mut self, sockets: &[(Flow, u64)], now: Now) {
        for &(flow, cookie) in sockets {
            let canonical = flow.canonical().0;
            let Some(entry) = self.flows.get_mut(&canonical) else {
                continue;
            };
            match entry.learn_socket(flow, cookie, now) {
                Learned::New => self.learned.push((flow, cookie)),
                Learned::Replaced => self.closing.push_back((now.boot, canonical)),
                Learned::Nothing => {}
            }
        }
    }

    /// Ends up to `max` flows that have been closing for [`PRODUCER_GRACE`].
    pub fn end_closing(&mut self, now: Now, max: usize) -> Vec<FlowEvent> {
        self.closed.expire_old(now.boot);
        self.closed_sockets.expire_old(now.boot);
        let mut ends = Vec::new();
        while let Some(&(since, canonical)) = self.closing.front()
            && now.boot.saturating_sub(since) >= PRODUCER_GRACE
            && ends.len() < max
        {
            self.closing.pop_front();
            let entry = self.flows.get_mut(&canonical);
            let closing = entry.and_then(|entry| entry.closing.take_if(|c| c.since == since));
            if let Some(Closing { mut end, .. }) = closing {
                self.close(&canonical, &mut end, EndReason::SocketClosed);
                ends.push(*end);
            }
        }
        ends
    }

    /// Looks for flows that were entered more than `max_age` ago, in at least `least` flows from where it stopped the
    /// last time. Returns their canonical flows.
    pub fn find_expired(&mut self, now: Now, max_age: Duration, least: usize) -> Vec<Flow> {
        let mut expired = Vec::new();
        let Some(limit) = now.boot.checked_sub(max_age).map(seconds) else {
            return expired;
        };
        let mut looked_at = 0;
        for _ in 0..SHARDS {
            self.next_shard = (self.next_shard + 1) % SHARDS;
            for (canonical, entry) in self.flows.shard(self.next_shard) {
                looked_at += 1;
                if entry.flow.entered < limit {
                    expired.push(*canonical);
                }
            }
            if looked_at >= least {
                break;
            }
        }
        expired
    }

    /// Ends a flow for a reason that no event reports, if it is still open. `flow` may be either direction.
    pub fn end(&mut self, flow: &Flow, reason: EndReason, now: Now) -> Option<FlowEvent> {
        let canonical = flow.canonical().0;
        let entry = self.flows.get_mut(&canonical)?;
        let start_time = entry.flow.start_time();
        // If its socket has closed, that is when the flow ended.
        let mut end = match entry.closing.take() {
            Some(closing) => *closing.end,
            None => FlowEvent::new(State::End, canonical, now.wall, entry.flow.origin),
        };
        self.add_counts_of_closed_socket(&mut end, start_time);
        self.close(&canonical, &mut end, reason);
        Some(end)
    }
}

/// Completes an event from the table. Direction, tag and first start time are the table's; an application that the event
/// brings is newer than the table's.
fn complete(event: &mut FlowEvent, direction: Flow, open: &OpenFlow) {
    event.flow = direction;
    event.tag = Some(open.tag);
    event.start_time = Some(open.start_time());
    // The clock may have been set back since the start.
    event.time = event.time.max(open.start_time());
    if event.application.is_none() {
        event.application.clone_from(&open.application);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Usage;
    use crate::socket::{Socket, SocketInfo};
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

    /// Both clocks at this second.
    fn now(second: i64) -> Now {
        Now {
            wall: at(second),
            boot: Duration::from_secs(second.unsigned_abs()),
        }
    }

    fn apply(table: &mut FlowTable, event: FlowEvent) -> (Transition, FlowEvent) {
        apply_with(table, event, None)
    }

    /// `live` is the cookie of the socket that the flow has now.
    fn apply_with(
        table: &mut FlowTable,
        mut event: FlowEvent,
        live: Option<u64>,
    ) -> (Transition, FlowEvent) {
        let now = now(event.time.as_second());
        (table.apply(&mut event, now, |_| live), event)
    }

    fn end_closing(table: &mut FlowTable, second: i64) -> Vec<FlowEvent> {
        table.end_closing(now(second), usize::MAX)
    }

    fn expire(table: &mut FlowTable, second: i64, max_age: Duration) -> Vec<FlowEvent> {
        let expired = table.find_expired(now(second), max_age, usize::MAX);
        let end = |flow: &Flow| table.end(flow, EndReason::Expired, now(second));
        expired.iter().filter_map(end).collect()
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
    fn a_flow_ends_a_second_after_its_socket_and_the_late_end_of_its_producer_is_dropped() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.flow = gone.flow.reversed();
        gone.usage = usage();
        assert_eq!(apply(&mut table, gone.clone()).0, Transition::SocketClosing);
        assert_eq!(end_closing(&mut table, 7), []);
        let end = end_closing(&mut table, 8).remove(0);
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
        assert!(table.is_empty() && end_closing(&mut table, 9).is_empty());
        let late = event(State::End, 1, None, 9);
        assert_eq!(apply(&mut table, late.clone()).0, Transition::EndedAlready);
        assert_eq!(apply(&mut table, late).0, Transition::EndedAlready);
        assert_eq!(apply(&mut table, gone).0, Transition::SocketUnknown);
    }

    #[test]
    fn counts_of_a_socket_that_closes_before_the_start_of_its_flow_is_known_are_kept() {
        let mut table = FlowTable::new(10);
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        for (start, expected) in [(5, usage()), (8, None)] {
            assert_eq!(apply(&mut table, gone.clone()).0, Transition::SocketUnknown);
            let start = event(State::Start, 1, Some((2, 9)), start);
            apply(&mut table, of(Origin::Iperf3, start));
            let end = of(Origin::Iperf3, event(State::End, 1, None, 9));
            let (transition, end) = apply(&mut table, end);
            assert_eq!(end.usage, expected);
            if transition == Transition::SocketClosing {
                end_closing(&mut table, 60);
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
        assert_eq!(end_closing(&mut table, 8)[0].usage, usage());
    }

    #[test]
    fn counts_of_a_socket_that_closes_just_after_the_end_of_its_flow_complete_it() {
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
        let (transition, late) = apply(&mut table, gone.clone());
        assert_eq!(
            (transition, late.effect),
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
    fn a_producer_that_reports_the_end_in_time_gets_the_counts_of_the_kernel() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let mut gone = of(Origin::Socket, event(State::End, 1, None, 7));
        gone.usage = usage();
        apply(&mut table, gone);
        let (transition, end) = apply(&mut table, event(State::End, 1, None, 8));
        assert_eq!(
            (transition, end.time, end.usage),
            (Transition::Ended, at(8), usage())
        );
        assert_eq!(end_closing(&mut table, 20), []);
    }

    #[test]
    fn a_producer_retags_a_flow_of_a_socket_and_not_the_other_way_round() {
        let mut table = FlowTable::new(10);
        let start = |origin, tag| of(origin, event(State::Start, 1, Some(tag), 5));
        apply(&mut table, start(Origin::Netlink, (2, 9)));
        let retagged = apply(&mut table, start(Origin::NamedPipe, (3, 4))).0;
        let kept = apply(&mut table, start(Origin::Netlink, (2, 9))).0;
        assert_eq!(
            (retagged, kept),
            (Transition::Retagged, Transition::LessTrusted)
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
        let (transition, end) = apply(&mut table, gone);
        assert_eq!(
            (transition, end.origin),
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
        let (transition, retag) = apply(&mut table, event(State::Start, 1, Some((2, 10)), 7));
        assert_eq!(
            (transition, retag.start_time()),
            (Transition::Retagged, at(5))
        );
        let (transition, end) = apply(&mut table, event(State::End, 1, Some((10, 2)), 8));
        assert_eq!(transition, Transition::Ended);
        assert_eq!(
            (end.tag(), end.start_time(), end.time),
            (retag.tag(), at(5), at(8))
        );
        assert!(table.is_empty());
    }

    #[test]
    fn an_end_of_an_unknown_flow_is_forwarded_with_its_own_time_as_start() {
        let mut table = FlowTable::new(10);
        let (transition, end) = apply(&mut table, event(State::End, 1, None, 8));
        assert_eq!(
            (transition, end.start_time),
            (Transition::EndedUnmatched, Some(at(8)))
        );
        assert_eq!(end.tag, Some(Tag::default()));
    }

    #[test]
    fn an_ongoing_event_is_completed_opens_with_a_tag_and_is_dropped_without() {
        let mut table = FlowTable::new(10);
        assert_eq!(
            apply(&mut table, event(State::Ongoing, 1, None, 1)).0,
            Transition::OngoingUnknown
        );
        let (transition, _) = apply(&mut table, event(State::Ongoing, 1, Some((3, 3)), 2));
        assert_eq!(transition, Transition::OpenedByOngoing);
        let (transition, report) = apply(&mut table, event(State::Ongoing, 1, None, 3));
        assert_eq!(
            (transition, report.start_time()),
            (Transition::Ongoing, at(2))
        );
        assert_eq!(
            report.tag(),
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
        let ended = expire(&mut table, 161, Duration::from_secs(60));
        assert_eq!(ended.len(), 1);
        assert_eq!(
            (ended[0].state, ended[0].start_time()),
            (State::End, at(100))
        );
        assert_eq!(table.len(), 1);
        assert!(expire(&mut table, 161, Duration::MAX).is_empty());
    }

    fn from_socket(mut event: FlowEvent, cookie: u64) -> FlowEvent {
        let info = SocketInfo {
            cookie,
            ..SocketInfo::default()
        };
        let flow = event.flow;
        event.netlink = Some(Arc::new(Socket { flow, info }));
        event.usage = usage();
        of(Origin::Socket, event)
    }

    #[test]
    fn both_directions_of_a_connection_are_one_flow() {
        let mut table = FlowTable::new(10);
        let start = event(State::Start, 1, Some((2, 9)), 5);
        apply(&mut table, start.clone());
        let reverse = |event: FlowEvent| FlowEvent {
            flow: event.flow.reversed(),
            ..event
        };
        let again = reverse(start.clone());
        assert_eq!(apply(&mut table, again).0, Transition::Duplicate);
        let (transition, retag) =
            apply(&mut table, reverse(event(State::Start, 1, Some((3, 4)), 6)));
        // It is reported in the direction in which it was started.
        assert_eq!((transition, retag.flow), (Transition::Retagged, start.flow));
        let end = reverse(event(State::End, 1, None, 7));
        let (transition, end) = apply(&mut table, end);
        assert_eq!((transition, end.flow), (Transition::Ended, start.flow));
        assert_eq!(end.tag().experiment, 3);
        assert!(table.is_empty());
    }

    #[test]
    fn a_start_after_the_socket_has_closed_is_another_flow() {
        let mut table = FlowTable::new(10);
        let start = event(State::Start, 1, Some((2, 9)), 5);
        apply(&mut table, start.clone());
        apply(&mut table, from_socket(event(State::End, 1, None, 7), 1));
        // Another producer reports the old connection.
        assert_eq!(table.end_replaced(&start), None);
        let next = event(State::Start, 1, Some((2, 9)), 8);
        let end = table.end_replaced(&next).unwrap();
        assert_eq!(
            (end.start_time(), end.time, end.usage),
            (at(5), at(7), usage())
        );
        assert_eq!(end.effect, Effect::Closed(EndReason::SocketClosed));
        assert_eq!(apply(&mut table, next).0, Transition::Started);
        // It is not taken for closing when the grace of the one before is over.
        assert_eq!(end_closing(&mut table, 20), []);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_late_notification_of_a_former_socket_does_not_end_the_flow() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        apply(&mut table, event(State::End, 1, None, 6));
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 6));
        let former = from_socket(event(State::End, 1, None, 6), 1);
        let socket = former.flow;
        // The counts are those of the flow before.
        let (transition, counted) = apply_with(&mut table, former.clone(), Some(2));
        assert_eq!(transition, Transition::CountedLate);
        assert_eq!(counted.start_time(), at(5));
        assert_eq!(end_closing(&mut table, 20), []);
        // From now on the socket is known, also to the journal, and nothing needs to be looked up.
        assert_eq!(table.take_learned_sockets(), [(socket, 2)]);
        let other = from_socket(event(State::End, 1, None, 21), 3);
        assert_eq!(apply(&mut table, other).0, Transition::SocketUnknown);
        let own = from_socket(event(State::End, 1, None, 21), 2);
        assert_eq!(apply(&mut table, own).0, Transition::SocketClosing);
        assert_eq!(end_closing(&mut table, 23).len(), 1);
    }

    #[test]
    fn a_scan_that_missed_a_socket_does_not_end_the_flow_of_the_next_on_the_same_ports() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let missed = of(Origin::Socket, event(State::End, 1, None, 6));
        // First the flow's socket is not known, then it is.
        for _ in 0..2 {
            let (transition, _) = apply_with(&mut table, missed.clone(), Some(2));
            assert_eq!(transition, Transition::SocketUnknown);
        }
        // The flow's socket has been replaced, or there is none.
        for live in [Some(3), None] {
            let (transition, _) = apply_with(&mut table, missed.clone(), live);
            assert_eq!(transition, Transition::SocketClosing);
        }
    }

    #[test]
    fn sockets_of_a_scan_are_learned_and_one_that_was_replaced_ends_its_flow() {
        let by_list: fn(&mut FlowTable, &[(Flow, u64)], i64) =
            |table, sockets, second| table.learn_sockets(sockets, now(second));
        let by_reports: fn(&mut FlowTable, &[(Flow, u64)], i64) = |table, sockets, second| {
            for &(flow, cookie) in sockets {
                let report = event(State::Ongoing, 1, None, second);
                let mut report = from_socket(FlowEvent { flow, ..report }, cookie);
                let socket = Arc::make_mut(report.netlink.as_mut().unwrap());
                // ESTABLISHED
                socket.info.state = 1;
                apply(table, report);
            }
        };
        for learn in [by_list, by_reports] {
            let mut table = FlowTable::new(10);
            let start = event(State::Start, 1, Some((2, 9)), 5);
            apply(&mut table, start.clone());
            let (socket, other_end) = (start.flow.reversed(), start.flow);
            let unknown = event(State::Start, 2, None, 5).flow;
            let sockets = [(unknown, 8), (socket, 7), (other_end, 9)];
            learn(&mut table, &sockets, 6);
            assert_eq!(table.take_learned_sockets(), [(socket, 7)]);
            learn(&mut table, &sockets[1..], 7);
            assert_eq!(end_closing(&mut table, 20), []);
            learn(&mut table, &[(socket, 10)], 21);
            assert_eq!(table.take_learned_sockets(), []);
            let ends = end_closing(&mut table, 22);
            assert_eq!((ends.len(), ends[0].flow), (1, start.flow));
        }
    }

    #[test]
    fn an_operator_ends_flows_of_any_source_and_late_ends_of_their_producers_are_dropped() {
        let mut table = FlowTable::new(10);
        table.set_limits(10, 1);
        let tag = Some((2, 9));
        for (port, origin) in [(1, Origin::NamedPipe), (2, Origin::Api)] {
            apply(&mut table, of(origin, event(State::Start, port, tag, 5)));
        }
        let next = || event(State::Start, 3, tag, 6);
        assert_eq!(apply(&mut table, next()).0, Transition::RefusedSource);
        let flow = |port| event(State::Start, port, None, 0).flow;
        let end = |table: &mut FlowTable, flow: &Flow| table.end(flow, EndReason::Operator, now(7));
        // In the direction in which the flow was reported, whichever way round it is asked for.
        let ended = end(&mut table, &flow(1).reversed()).unwrap();
        assert_eq!((ended.flow, ended.origin), (flow(1), Origin::NamedPipe));
        assert_eq!((ended.time, ended.start_time()), (at(7), at(5)));
        assert_eq!(ended.effect, Effect::Closed(EndReason::Operator));
        assert_eq!(end(&mut table, &flow(1)), None);
        // The share of its source is free again.
        assert_eq!(apply(&mut table, next()).0, Transition::Started);
        for _ in 0..2 {
            let late = event(State::End, 1, None, 8);
            assert_eq!(apply(&mut table, late).0, Transition::EndedAlready);
        }

        // A flow that is closing has ended with its socket.
        let gone = from_socket(event(State::End, 2, None, 6), 1);
        assert_eq!(apply(&mut table, gone).0, Transition::SocketClosing);
        let ended = end(&mut table, &flow(2)).unwrap();
        assert_eq!((ended.time, ended.usage), (at(6), usage()));
        assert_eq!(ended.effect, Effect::Closed(EndReason::Operator));
        assert_eq!((end_closing(&mut table, 9), table.len()), (vec![], 1));
    }

    #[test]
    fn a_less_trusted_source_neither_retags_nor_ends_a_flow() {
        let mut table = FlowTable::new(10);
        apply(&mut table, event(State::Start, 1, Some((2, 9)), 5));
        let firefly = |event| of(Origin::Firefly, event);
        for event in [
            firefly(event(State::Start, 1, Some((3, 4)), 6)),
            firefly(event(State::Start, 1, Some((0, 0)), 6)),
            firefly(event(State::End, 1, None, 6)),
        ] {
            assert_eq!(apply(&mut table, event).0, Transition::LessTrusted);
        }
        let api = of(Origin::Api, event(State::End, 1, None, 7));
        assert_eq!(apply(&mut table, api).0, Transition::Ended);
    }

    #[test]
    fn a_step_of_the_wall_clock_neither_ends_flows_nor_lets_one_end_before_it_starts() {
        let mut table = FlowTable::new(10);
        let mut start = event(State::Start, 1, Some((2, 9)), 1_000_000);
        let present = |wall, boot| Now {
            wall: at(wall),
            boot: Duration::from_secs(boot),
        };
        table.apply(&mut start, present(1_000_000, 10), |_| None);
        let week = Duration::from_secs(604_800);
        assert_eq!(
            table.find_expired(present(9_000_000, 11), week, usize::MAX),
            []
        );
        let mut gone = from_socket(event(State::End, 1, None, 9_000_000), 1);
        table.apply(&mut gone, present(9_000_000, 12), |_| None);
        // The grace is over although the clock was set back.
        let ends = table.end_closing(present(500_000, 13), usize::MAX);
        assert_eq!(ends.len(), 1);
        let mut start = event(State::Start, 2, Some((2, 9)), 1_000_000);
        table.apply(&mut start, present(1_000_000, 10), |_| None);
        let mut end = event(State::End, 2, None, 400_000);
        table.apply(&mut end, present(400_000, 14), |_| None);
        assert_eq!((end.time, end.start_time()), (at(1_000_000), at(1_000_000)));
    }

    /// What happens to one flow, in the words of the table at the top of this file.
    #[derive(Clone, Copy, Debug)]
    enum Input {
        Start(Origin, u16),
        Ongoing(Option<u16>),
        ProducerEnd(Origin),
        SocketEnd {
            with_counts: bool,
        },
        OperatorEnd,
        /// A second passes.
        Tick,
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Phase {
        Unknown,
        Open,
        Closing { at: i64, with_counts: bool },
        Closed { without_counts_since: Option<i64> },
    }

    const CLOSED: Phase = Phase::Closed {
        without_counts_since: None,
    };

    /// One flow, by the table at the top of this file.
    #[derive(Clone, Copy, Debug)]
    struct Model {
        phase: Phase,
        tag: u16,
        origin: Origin,
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

        /// Whether a start ends the flow first.
        fn is_replaced(&mut self, input: Input, now: i64) -> bool {
            match (input, self.phase) {
                (Input::Start(..), Phase::Closing { at, .. }) if now > at => {
                    self.phase = CLOSED;
                    true
                }
                _ => false,
            }
        }

        fn start(&mut self, origin: Origin, tag: u16, now: i64, full: bool) -> Transition {
            if self.is_open() {
                if self.tag == tag {
                    return Transition::Duplicate;
                }
                if origin.trust() < self.origin.trust() {
                    return Transition::LessTrusted;
                }
                (self.tag, self.origin) = (tag, origin);
                return Transition::Retagged;
            }
            if full {
                return Transition::Refused;
            }
            (self.phase, self.tag, self.origin) = (Phase::Open, tag, origin);
            self.opened = now;
            Transition::Started
        }

        fn takes_kept_counts(&mut self) -> bool {
            let kept = self.kept_counts.take();
            kept.is_some_and(|(time, _)| time >= self.opened)
        }

        /// An end without the counts of the socket takes those that were kept.
        fn completes_end(&mut self) {
            let has_counts = matches!(
                self.phase,
                Phase::Closing {
                    with_counts: true,
                    ..
                }
            );
            if !has_counts {
                self.takes_kept_counts();
            }
        }

        fn apply(&mut self, input: Input, now: i64, full: bool) -> Transition {
            match (input, self.phase) {
                (Input::Start(origin, tag), _) => self.start(origin, tag, now, full),
                (Input::Ongoing(_), _) if self.is_open() => Transition::Ongoing,
                (Input::Ongoing(None), _) => Transition::OngoingUnknown,
                (Input::Ongoing(Some(tag)), _) => {
                    match self.start(Origin::NamedPipe, tag, now, full) {
                        Transition::Started => Transition::OpenedByOngoing,
                        other => other,
                    }
                }
                (Input::ProducerEnd(origin), Phase::Open | Phase::Closing { .. }) => {
                    if origin.trust() < self.origin.trust() {
                        return Transition::LessTrusted;
                    }
                    self.completes_end();
                    self.phase = Phase::Closed {
                        without_counts_since: Some(now),
                    };
                    Transition::Ended
                }
                (Input::ProducerEnd(_), Phase::Closed { .. }) => Transition::EndedAlready,
                (Input::ProducerEnd(_), Phase::Unknown) => Transition::EndedUnmatched,
                (Input::SocketEnd { with_counts }, Phase::Open | Phase::Closing { .. }) => {
                    let with_counts = with_counts || self.takes_kept_counts();
                    if self.origin.is_socket() && with_counts {
                        self.phase = CLOSED;
                        return Transition::SocketClosed;
                    }
                    self.phase = match self.phase {
                        Phase::Closing {
                            at,
                            with_counts: had,
                        } => Phase::Closing {
                            at,
                            with_counts: with_counts || had,
                        },
                        _ => Phase::Closing {
                            at: now,
                            with_counts,
                        },
                    };
                    Transition::SocketClosing
                }
                (
                    Input::SocketEnd { with_counts: true },
                    Phase::Closed {
                        without_counts_since: Some(at),
                    },
                ) if now - at <= 1 => {
                    self.phase = CLOSED;
                    Transition::CountedLate
                }
                (Input::SocketEnd { with_counts }, _) => {
                    if with_counts {
                        self.kept_counts = Some((now, 2));
                    }
                    Transition::SocketUnknown
                }
                (Input::OperatorEnd, _) => {
                    self.completes_end();
                    self.phase = CLOSED;
                    Transition::EndedByOperator
                }
                (Input::Tick, _) => unreachable!("a second passes for all flows"),
            }
        }

        /// Whether the flow ended with its socket, and whether it expired.
        fn tick(&mut self, now: i64) -> (bool, bool) {
            let kept = self.kept_counts.filter(|(_, seconds)| *seconds > 1);
            self.kept_counts = kept.map(|(time, seconds)| (time, seconds - 1));
            if matches!(self.phase, Phase::Closing { .. }) {
                self.phase = CLOSED;
                return (true, false);
            }
            if self.phase == Phase::Open && self.opened < now - MODEL_MAX_AGE {
                self.phase = CLOSED;
                return (false, true);
            }
            (false, false)
        }
    }

    fn inputs() -> impl Strategy<Value = Vec<(u16, bool, Input)>> {
        let tag = || 1u16..3;
        let origins = vec![Origin::NamedPipe, Origin::Firefly, Origin::Netlink];
        let producers = vec![Origin::NamedPipe, Origin::Firefly];
        let input = prop_oneof![
            5 => (proptest::sample::select(origins), tag()).prop_map(|(o, t)| Input::Start(o, t)),
            2 => proptest::option::of(tag()).prop_map(Input::Ongoing),
            3 => proptest::sample::select(producers).prop_map(Input::ProducerEnd),
            3 => any::<bool>().prop_map(|with_counts| Input::SocketEnd { with_counts }),
            1 => Just(Input::OperatorEnd),
            2 => Just(Input::Tick),
        ];
        proptest::collection::vec((1u16..6, any::<bool>(), input), 0..120)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_table_of_transitions_holds(inputs in inputs()) {
            let mut table = FlowTable::new(MODEL_MAX_FLOWS);
            let unknown = Model {
                phase: Phase::Unknown, tag: 0, origin: Origin::NamedPipe, opened: 0, kept_counts: None,
            };
            let mut flows = [unknown; 6];
            let mut now = 1;
            end_closing(&mut table, now);
            for (port, reversed, input) in inputs {
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
                    prop_assert_eq!(ports(end_closing(&mut table, now)), expected(|tick| tick.0));
                    let expired = expire(&mut table, now, Duration::from_secs(MODEL_MAX_AGE as u64));
                    prop_assert_eq!(ports(expired), expected(|tick| tick.1));
                    continue;
                }
                if matches!(input, Input::OperatorEnd) {
                    let flow = super::tests::event(State::Start, port, None, 0).flow;
                    let model = &mut flows[usize::from(port)];
                    let end = table.end(&flow, EndReason::Operator, super::tests::now(now));
                    prop_assert_eq!(end.is_some(), model.is_open());
                    if let Some(end) = end {
                        model.apply(input, now, false);
                        prop_assert_eq!((end.start_time(), end.tag().experiment), (at(model.opened), model.tag));
                    }
                    continue;
                }
                let both = |tag| Some((tag, tag));
                let (state, tag, origin) = match input {
                    Input::Start(origin, tag) => (State::Start, both(tag), origin),
                    Input::Ongoing(tag) => (State::Ongoing, tag.and_then(both), Origin::NamedPipe),
                    Input::ProducerEnd(origin) => (State::End, None, origin),
                    _ => (State::End, None, Origin::Socket),
                };
                let mut event = of(origin, event(state, port, tag, now));
                if let Input::SocketEnd { with_counts } = input {
                    event.usage = with_counts.then(usage).flatten();
                }
                if reversed {
                    event.flow = event.flow.reversed();
                }
                let replaced = flows[usize::from(port)].is_replaced(input, now);
                prop_assert_eq!(table.end_replaced(&event).is_some(), replaced);
                let full = flows.iter().filter(|flow| flow.is_open()).count() >= MODEL_MAX_FLOWS;
                let expected = flows[usize::from(port)].apply(input, now, full);
                let (transition, out) = apply(&mut table, event);
                prop_assert_eq!(transition, expected, "{:?} of {}", input, port);
                if transition.is_forwarded_to_backends() {
                    prop_assert!(out.tag.is_some() && out.start_time.is_some());
                }
                for (port, model) in flows.iter().enumerate().skip(1) {
                    let flow = super::tests::event(State::Start, port as u16, None, 0).flow;
                    let open = table.get(&flow).map(|(_, open)| (open.tag.experiment, open.start_time()));
                    prop_assert_eq!(open, model.is_open().then(|| (model.tag, at(model.opened))));
                }
            }
        }
    }
}
