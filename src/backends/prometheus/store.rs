//! The data behind a scrape: open flows with their socket statistics, and sums by tag that outlive them. No I/O, no
//! clock.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;

use super::families::counters;
use super::sums::{Sums, SumsByTag};
use crate::event::{Effect, EndReason, FlowEvent, State};
use crate::flow::{Flow, Tag};
use crate::registry::SharedRegistry;
use crate::socket::{Field, Skops, Socket, SocketInfo};

/// Limit of remembered flows that ended while their socket stayed open: another flow may follow on the same socket.
const MAX_CARRIED: usize = 1 << 16;

/// An open flow with a socket on this host.
#[derive(Clone)]
pub struct Series {
    /// Experiment and activity.
    pub tag: Tag,
    /// Whether it has series of its own. If not, it is only part of the sums of its tag.
    pub shown: bool,
    /// The latest report by `sock_diag(7)`.
    pub socket: Option<Arc<Socket>>,
    /// The latest report by the sockops program.
    pub skops: Option<Arc<Skops>>,
    counted: Counted,
}

/// The counts of a socket that are already in the sums.
#[derive(Clone, Copy, Default)]
struct Counted {
    inode: u32,
    counts: Counts,
}

/// The counts of a socket, as seen by this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Payload bytes sent; retransmitted bytes count once.
    pub sent_bytes: u64,
    /// Payload bytes received.
    pub received_bytes: u64,
    /// Segments sent.
    pub sent_packets: u64,
    /// Segments received.
    pub received_packets: u64,
    /// Segments retransmitted.
    pub retransmitted: u64,
}

impl Counts {
    /// The kernel's counts in an event, or those of `before` where it has none. Usage reported by a producer is not
    /// counted: it may be the view of the remote end, or of other hosts.
    fn of(event: &FlowEvent, before: Counts) -> Counts {
        let mut counts = before;
        let info = event.netlink.as_ref().map(|socket| &socket.info);
        if let Some(tcp) = info.and_then(|info| info.tcp.as_ref()) {
            let usage = info.and_then(SocketInfo::usage).unwrap_or_default();
            counts.sent_bytes = usage.sent.unwrap_or(before.sent_bytes);
            counts.received_bytes = usage.received.unwrap_or(before.received_bytes);
            let get = |field, before| tcp.get(field).unwrap_or(before);
            counts.sent_packets = get(Field::SegsOut, before.sent_packets);
            counts.received_packets = get(Field::SegsIn, before.received_packets);
            counts.retransmitted = get(Field::TotalRetrans, before.retransmitted);
        } else if let Some(skops) = &event.skops {
            counts.sent_bytes = skops.bytes_acked.saturating_sub(1);
            counts.received_bytes = skops.bytes_received;
            counts.sent_packets = skops.numbers[11].into();
            counts.received_packets = skops.numbers[10].into();
            counts.retransmitted = skops.numbers[9].into();
        }
        counts
    }

    fn combine(&self, other: &Counts, f: impl Fn(u64, u64) -> u64) -> Counts {
        Counts {
            sent_bytes: f(self.sent_bytes, other.sent_bytes),
            received_bytes: f(self.received_bytes, other.received_bytes),
            sent_packets: f(self.sent_packets, other.sent_packets),
            received_packets: f(self.received_packets, other.received_packets),
            retransmitted: f(self.retransmitted, other.retransmitted),
        }
    }
}

/// A cheap copy of the store's data.
pub struct Snapshot {
    /// Flows with a socket.
    pub flows: Vec<(Flow, Series)>,
    /// Every tag seen so far.
    pub sums: Vec<(Tag, Sums)>,
}

/// The data that scrapes show.
pub struct Store {
    /// How many flows may have series of their own.
    max_shown: usize,
    shown: usize,
    /// When the store was created: earlier counts of a flow that began before are not part of the sums.
    since: Timestamp,
    flows: HashMap<Flow, Series>,
    sums: SumsByTag,
    carried: HashMap<Flow, Counted>,
}

impl Store {
    /// A store without flows. At most `max_shown` flows get series of their own; `since` is the current time. Every tag of
    /// `registry` has sums of its own.
    pub fn new(max_shown: usize, since: Timestamp, registry: SharedRegistry) -> Store {
        Store {
            max_shown,
            shown: 0,
            since,
            flows: HashMap::new(),
            sums: SumsByTag::new(registry),
            carried: HashMap::new(),
        }
    }

    /// Adds a flow that is already open.
    pub fn restore(&mut self, tag: Tag) {
        self.sums.get(tag).open += 1;
    }

    /// A copy of all flows and sums.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            flows: self
                .flows
                .iter()
                .map(|(flow, s)| (*flow, s.clone()))
                .collect(),
            sums: self.sums.snapshot(),
        }
    }

    /// Applies an event.
    pub fn apply(&mut self, event: &FlowEvent) {
        let tag = event.tag();
        if event.effect == Effect::Counted && self.has_another_socket(event) {
            return;
        }
        if event.netlink.is_some() || event.skops.is_some() {
            self.account(event);
        }
        match event.effect {
            Effect::Nothing | Effect::Counted => {}
            Effect::Opened => {
                let sums = self.sums.get(tag);
                sums.started += 1;
                sums.open += 1;
            }
            Effect::Retagged(former) => {
                self.count_end(former, EndReason::Retagged);
                let sums = self.sums.get(tag);
                sums.started += 1;
                sums.open += 1;
                if let Some(series) = self.flows.get_mut(&event.flow) {
                    series.tag = tag;
                }
            }
            Effect::Closed(reason) => self.count_end(tag, reason),
        }
        if event.state == State::End {
            let is_last = matches!(
                event.effect,
                Effect::Closed(EndReason::SocketClosed) | Effect::Counted
            );
            self.close(&event.flow, is_last);
        }
    }

    /// Whether the flow of an event is open again, on another socket than that of the event.
    fn has_another_socket(&self, event: &FlowEvent) -> bool {
        let series = self.flows.get(&event.flow);
        let open = series.and_then(|series| series.socket.as_ref());
        let cookies = open.zip(event.netlink.as_ref());
        cookies.is_some_and(|(open, ended)| open.info.cookie != ended.info.cookie)
    }

    fn count_end(&mut self, tag: Tag, reason: EndReason) {
        let sums = self.sums.get_open(tag);
        sums.open = sums.open.saturating_sub(1);
        sums.ended[reason as usize] += 1;
    }

    /// Removes a flow. Unless `is_last`, its socket may be reported again: the next flow of the same connection, or the end
    /// of the socket, then counts only the growth.
    fn close(&mut self, flow: &Flow, is_last: bool) {
        let Some(series) = self.flows.remove(flow) else {
            return;
        };
        self.shown -= usize::from(series.shown);
        // A socket that its owner has closed has no inode.
        let is_open = |socket: Arc<Socket>| socket.info.inode != 0 || !is_last;
        if series.socket.is_some_and(is_open) {
            if self.carried.len() >= MAX_CARRIED {
                self.carried.clear();
            }
            self.carried.insert(*flow, series.counted);
        }
    }

    /// Adds the growth of the counts of a flow's socket to the sums of its tag.
    fn account(&mut self, event: &FlowEvent) {
        let (carried, max_shown, since) = (&mut self.carried, self.max_shown, self.since);
        let shown = &mut self.shown;
        let mut resumed = false;
        let series = self.flows.entry(event.flow).or_insert_with(|| {
            let show = *shown < max_shown;
            *shown += usize::from(show);
            let former = carried.remove(&event.flow);
            resumed = former.is_some();
            let mut counted = former.unwrap_or_default();
            if event.start_time() < since && !resumed {
                counted.counts = Counts::of(event, Counts::default());
            }
            Series {
                tag: event.tag(),
                shown: show,
                socket: None,
                skops: None,
                counted,
            }
        });
        // With both ends on this host there are two sockets: the source's takes precedence.
        if let (Some(new), Some(old)) = (&event.netlink, &series.socket)
            && new.flow != old.flow
        {
            if old.flow == event.flow {
                return;
            }
            series.counted = Counted {
                inode: new.info.inode,
                counts: Counts::of(event, Counts::default()),
            };
        }
        let sums = self.sums.get(series.tag);
        let inode = event.netlink.as_ref().map_or(0, |socket| socket.info.inode);
        if inode != 0 && inode != std::mem::replace(&mut series.counted.inode, inode) {
            // A new socket of the same flow counts from 0; so does the first one, unless the flow began before
            // the store was created.
            if series.socket.is_some() || event.start_time() >= since {
                series.counted.counts = Counts::default();
            }
        }
        let before = series.counted.counts;
        let now = Counts::of(event, before).combine(&before, u64::max);
        let new = now.combine(&before, |now, before| now - before);
        sums.counts = sums.counts.combine(&new, |sum, new| sum + new);
        series.counted.counts = now;
        if let Some(micros) = rtt(event) {
            sums.rtt.0 += micros as f64 / 1e6;
            sums.rtt.1 += 1;
        }
        // The first report of a reused socket includes counts of the former flow, which are already in the sums.
        if !series.shown && !resumed {
            for (index, family) in counters().enumerate() {
                let socket = |s: &Option<Arc<Socket>>| s.as_ref().and_then(|s| family.of_socket(s));
                let skops = |s: &Option<Arc<Skops>>| s.as_ref().and_then(|s| family.of_skops(s));
                let grown = |new: Option<f64>, old: Option<f64>| {
                    new.map_or(0.0, |new| (new - old.unwrap_or(0.0)).max(0.0))
                };
                sums.hidden[0][index] += grown(socket(&event.netlink), socket(&series.socket));
                sums.hidden[1][index] += grown(skops(&event.skops), skops(&series.skops));
            }
        }
        if event.netlink.is_some() {
            series.socket.clone_from(&event.netlink);
        }
        if event.skops.is_some() {
            series.skops.clone_from(&event.skops);
        }
    }
}

/// The smoothed round-trip time, in µs.
fn rtt(event: &FlowEvent) -> Option<u64> {
    let of_socket = |socket: &Arc<Socket>| socket.info.tcp.as_ref()?.get(Field::Rtt);
    let rtt = event.netlink.as_ref().and_then(of_socket);
    let of_skops = || {
        event
            .skops
            .as_ref()
            .map(|skops| u64::from(skops.numbers[0] / 8))
    };
    rtt.or_else(of_skops).filter(|rtt| *rtt > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Origin;
    use crate::flow::{Protocol, Usage};
    use crate::registry::Registry;
    use crate::socket::TcpInfo;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn flow(port: u16) -> Flow {
        let end = |n: u8| ([192, 0, 2, n].into(), port);
        Flow::new(Protocol::Tcp, end(1), end(2)).unwrap()
    }

    const TAG: Tag = Tag {
        experiment: 2,
        activity: 9,
    };

    fn event(state: State, port: u16, effect: Effect) -> FlowEvent {
        FlowEvent {
            tag: Some(TAG),
            start_time: Some(at(10)),
            effect,
            ..FlowEvent::new(state, flow(port), at(20), Origin::NamedPipe)
        }
    }

    /// With a socket that has received and sent these bytes.
    fn with_socket(event: FlowEvent, inode: u32, received: u64, sent: u64) -> FlowEvent {
        let mut tcp = [0; 232];
        tcp[68..72].copy_from_slice(&500u32.to_ne_bytes());
        tcp[128..136].copy_from_slice(&received.to_ne_bytes());
        tcp[200..208].copy_from_slice(&sent.to_ne_bytes());
        let info = SocketInfo {
            state: 1,
            inode,
            tcp: Some(TcpInfo::parse(&tcp)),
            ..SocketInfo::default()
        };
        FlowEvent {
            usage: info.usage(),
            netlink: Some(Arc::new(Socket {
                flow: event.flow,
                info,
            })),
            ..event
        }
    }

    fn store(max_shown: usize, since: Timestamp) -> Store {
        Store::new(max_shown, since, SharedRegistry::new(Registry::builtin()))
    }

    fn bytes(store: &mut Store) -> (u64, u64) {
        let counts = store.sums.get(TAG).counts;
        (counts.received_bytes, counts.sent_bytes)
    }

    #[test]
    fn sums_count_only_growth_and_outlive_the_flow() {
        let mut store = store(10, at(0));
        store.apply(&event(State::Start, 1, Effect::Opened));
        for (received, sent) in [(10, 100), (10, 100), (30, 400)] {
            store.apply(&with_socket(
                event(State::Ongoing, 1, Effect::Nothing),
                7,
                received,
                sent,
            ));
        }
        assert_eq!(bytes(&mut store), (30, 400));
        let end = event(State::End, 1, Effect::Closed(EndReason::SocketClosed));
        store.apply(&with_socket(end, 0, 31, 500));
        assert_eq!(bytes(&mut store), (31, 500));
        assert!(store.flows.is_empty() && store.carried.is_empty() && store.shown == 0);
        let sums = &store.sums.get(TAG);
        assert_eq!(
            (sums.started, sums.open, sums.ended),
            (1, 0, [0, 1, 0, 0, 0])
        );
        assert_eq!(sums.rtt.1, 4);
    }

    #[test]
    fn successive_flows_on_one_socket_count_each_byte_once() {
        let mut store = store(10, at(0));
        let end = || event(State::End, 1, Effect::Closed(EndReason::Producer));
        store.apply(&with_socket(
            event(State::Ongoing, 1, Effect::Nothing),
            7,
            0,
            100,
        ));
        store.apply(&with_socket(end(), 7, 0, 150));
        store.apply(&with_socket(
            event(State::Ongoing, 1, Effect::Nothing),
            7,
            0,
            180,
        ));
        assert_eq!(bytes(&mut store), (0, 180));
        store.apply(&with_socket(end(), 7, 0, 180));
        // Another socket of the same flow has its own bytes.
        store.apply(&with_socket(
            event(State::Ongoing, 1, Effect::Nothing),
            8,
            0,
            20,
        ));
        store.apply(&with_socket(
            event(State::Ongoing, 1, Effect::Nothing),
            9,
            0,
            5,
        ));
        assert_eq!(bytes(&mut store), (0, 205));
    }

    #[test]
    fn the_end_of_a_socket_after_that_of_its_flow_counts_only_the_growth() {
        let mut store = store(10, at(0));
        store.apply(&event(State::Start, 1, Effect::Opened));
        // The service has closed the socket just before its report of the end was handled.
        let end = event(State::End, 1, Effect::Closed(EndReason::Producer));
        store.apply(&with_socket(end, 0, 0, 1000));
        let counted = event(State::End, 1, Effect::Counted);
        store.apply(&with_socket(counted, 0, 0, 1010));
        assert_eq!(bytes(&mut store), (0, 1010));
    }

    #[test]
    fn late_counts_of_a_former_socket_are_not_those_of_the_next_flow_on_its_ports() {
        let with_cookie = |event: FlowEvent, cookie, inode, sent| {
            let mut event = with_socket(event, inode, 0, sent);
            let socket = Arc::make_mut(event.netlink.as_mut().unwrap());
            socket.info.cookie = cookie;
            event
        };
        let mut store = store(10, at(0));
        store.apply(&event(State::Start, 1, Effect::Opened));
        let open = event(State::Ongoing, 1, Effect::Nothing);
        store.apply(&with_cookie(open.clone(), 2, 8, 10));
        let late = event(State::End, 1, Effect::Counted);
        store.apply(&with_cookie(late, 1, 0, 1000));
        assert_eq!(bytes(&mut store), (0, 10));
        // The series of the flow that is open is still there.
        assert_eq!(store.snapshot().flows.len(), 1);
        store.apply(&with_cookie(open, 2, 8, 30));
        assert_eq!(bytes(&mut store), (0, 30));
    }

    #[test]
    fn bytes_sent_before_the_daemon_started_are_not_counted() {
        let mut store = store(10, at(15));
        store.restore(TAG);
        store.apply(&with_socket(
            event(State::Ongoing, 1, Effect::Nothing),
            7,
            0,
            100,
        ));
        store.apply(&with_socket(
            event(State::Ongoing, 1, Effect::Nothing),
            7,
            0,
            130,
        ));
        assert_eq!((bytes(&mut store), store.sums.get(TAG).open), ((0, 30), 1));
    }

    #[test]
    fn usage_alone_does_not_count_and_a_retag_moves_the_flow() {
        let mut store = store(10, at(0));
        let other = Tag {
            experiment: 3,
            activity: 3,
        };
        store.apply(&event(State::Start, 1, Effect::Opened));
        let retag = event(State::Start, 1, Effect::Retagged(TAG));
        store.apply(&FlowEvent {
            tag: Some(other),
            ..retag
        });
        let usage = Some(Usage {
            received: Some(5),
            sent: None,
        });
        let end = event(State::End, 1, Effect::Closed(EndReason::Producer));
        store.apply(&FlowEvent {
            tag: Some(other),
            usage,
            ..end
        });
        assert_eq!(
            (store.sums.get(TAG).open, store.sums.get(TAG).ended),
            (0, [0, 0, 0, 1, 0])
        );
        assert_eq!(
            (
                store.sums.get(other).open,
                store.sums.get(other).counts.received_bytes
            ),
            // Usage reported by producers is not counted.
            (0, 0)
        );
    }

    #[test]
    fn a_flow_within_this_host_is_counted_once() {
        let mut store = store(10, at(0));
        let of = |reversed: bool, inode, received, sent| {
            let mut event = with_socket(
                event(State::Ongoing, 1, Effect::Nothing),
                inode,
                received,
                sent,
            );
            if reversed {
                let socket = event.netlink.take().unwrap();
                let (flow, info) = (socket.flow.reversed(), socket.info.clone());
                event.netlink = Some(Arc::new(Socket { flow, info }));
            }
            event
        };
        for sent in [100, 200, 300] {
            store.apply(&of(false, 7, 0, sent));
            store.apply(&of(true, 8, sent, 0));
        }
        assert_eq!(bytes(&mut store), (0, 300));
    }

    #[test]
    fn flows_beyond_the_limit_are_summed_and_their_counters_never_go_down() {
        let mut store = store(1, at(0));
        let sent = counters()
            .position(|f| f.name == "flow_tcp_bytes_sent_total")
            .unwrap();
        for port in 1..=3 {
            store.apply(&with_socket(
                event(State::Ongoing, port, Effect::Nothing),
                7,
                0,
                100,
            ));
        }
        assert_eq!(
            store
                .snapshot()
                .flows
                .iter()
                .filter(|(_, s)| s.shown)
                .count(),
            1
        );
        assert_eq!(store.sums.get(TAG).hidden[0][sent], 200.0);
        store.apply(&with_socket(
            event(State::End, 2, Effect::Closed(EndReason::SocketClosed)),
            0,
            0,
            120,
        ));
        assert_eq!(store.sums.get(TAG).hidden[0][sent], 220.0);
        store.apply(&event(State::End, 1, Effect::Closed(EndReason::Producer)));
        store.apply(&with_socket(
            event(State::Ongoing, 9, Effect::Nothing),
            8,
            0,
            1,
        ));
        assert_eq!(
            store
                .snapshot()
                .flows
                .iter()
                .filter(|(_, s)| s.shown)
                .count(),
            1
        );
    }
}
