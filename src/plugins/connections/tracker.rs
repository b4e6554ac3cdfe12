//! Turns the connections of this host into flow events: decides which connections are flows and which tag they get, and
//! detects which have opened and closed since the last scan. No I/O, no clock.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};

use super::Connection;
use super::rules::Rule;
use crate::event::{FlowEvent, Origin, State};
use crate::flow::recent::RecentFlows;
use crate::flow::special_networks::is_public;
use crate::flow::{Flow, Tag};

/// How long to remember a connection that a scan has ended: its owner may keep the socket open, and the late
/// notification must not end the connection again. Limited to [`MAX_ENDED`] connections.
const ENDED_TTL: Duration = Duration::from_secs(600);
const MAX_ENDED: usize = 1 << 14;

/// The state of a connection.
struct Tracked {
    /// Whether its start was sent.
    announced: bool,
    /// The number of the last scan that showed it.
    last_scan: u64,
    /// The time of the first scan that no longer showed it.
    missing_since: Option<Timestamp>,
}

/// Tracks the open connections of this host.
pub struct Tracker {
    origin: Origin,
    /// The first rule that matches a connection gives it its tag.
    pub rules: Vec<Rule>,
    internal: Vec<IpNet>,
    announce_existing: bool,
    /// How long to wait for the notification of a connection that a scan no longer shows.
    notification_grace: SignedDuration,
    tracked: HashMap<Flow, Tracked>,
    /// Connections that were ended without a notification.
    ended: RecentFlows<()>,
    /// The number of scans so far.
    scans: u64,
}

impl Tracker {
    /// Connections to `internal` networks and to special-purpose addresses are not flows. Connections that the first
    /// scan shows are announced only if `announce_existing`. A connection that the scans no longer show is ended after
    /// `notification_grace`, unless [`Tracker::observe_closed`] has ended it before; without notifications the grace is
    /// zero.
    pub fn new(
        origin: Origin,
        rules: Vec<Rule>,
        internal: Vec<IpNet>,
        announce_existing: bool,
        notification_grace: SignedDuration,
    ) -> Tracker {
        Tracker {
            origin,
            rules,
            internal,
            announce_existing,
            notification_grace,
            tracked: HashMap::new(),
            ended: RecentFlows::new(ENDED_TTL, MAX_ENDED),
            scans: 0,
        }
    }

    /// Tracks a connection whose start was sent before, by a predecessor.
    pub fn resume(&mut self, flow: Flow) {
        let tracked = Tracked {
            announced: true,
            last_scan: self.scans,
            missing_since: None,
        };
        self.tracked.insert(flow, tracked);
    }

    /// Begins a scan. Call [`Tracker::observe_open`] for each connection next, then [`Tracker::end_scan`].
    pub fn begin_scan(&mut self) {
        self.scans += 1;
    }

    /// Records that a connection is still open. Returns whether it is tracked.
    pub fn observe_again(&mut self, flow: &Flow) -> bool {
        let tracked = self.tracked.get_mut(flow);
        tracked.is_some_and(|tracked| {
            tracked.last_scan = self.scans;
            tracked.missing_since = None;
            true
        })
    }

    /// Records an open connection. Returns its start if it is new. `is_local` recognizes the addresses of this host.
    pub fn observe_open(
        &mut self,
        connection: &Connection,
        now: Timestamp,
        is_local: impl Fn(&IpAddr) -> bool,
    ) -> Option<FlowEvent> {
        if self.observe_again(&connection.flow) {
            return None;
        }
        let scan = self.scans;
        self.ended.remove(&connection.flow);
        let tag = self.tag(connection, is_local)?;
        let announced = self.announce_existing || scan > 1;
        let tracked = Tracked {
            announced,
            last_scan: scan,
            missing_since: None,
        };
        self.tracked.insert(connection.flow, tracked);
        announced.then(|| self.event(State::Start, connection, tag, now))
    }

    /// Ends a scan. Returns the ends of the connections whose grace period is over.
    pub fn end_scan(&mut self, now: Timestamp) -> Vec<FlowEvent> {
        let (scan, grace, origin) = (self.scans, self.notification_grace, self.origin);
        let gone = self.tracked.extract_if(|_, tracked| {
            // `abs`: the clock may have been set back.
            tracked.last_scan != scan
                && now
                    .duration_since(*tracked.missing_since.get_or_insert(now))
                    .abs()
                    >= grace
        });
        let mut ends = Vec::new();
        for (flow, tracked) in gone {
            if !grace.is_zero() {
                self.ended.insert(flow, ());
            }
            if tracked.announced {
                ends.push(FlowEvent::new(
                    State::End,
                    flow,
                    tracked.missing_since.unwrap_or(now),
                    origin,
                ));
            }
        }
        self.ended.expire_old(now.as_duration().unsigned_abs());
        ends
    }

    /// Whether this connection is tracked.
    pub fn is_tracked(&self, flow: &Flow) -> bool {
        self.tracked.contains_key(flow)
    }

    /// Whether the last scan no longer showed some connections that are still in their grace period.
    pub fn has_missing(&self) -> bool {
        self.tracked
            .values()
            .any(|tracked| tracked.missing_since.is_some())
    }

    /// Records that a connection was closed at `now`. Returns its end unless it was ended before, and first its start
    /// if no scan has shown it. Do not call this for a connection that no scan has shown and that was never
    /// established.
    pub fn observe_closed(
        &mut self,
        connection: &Connection,
        now: Timestamp,
        is_local: impl Fn(&IpAddr) -> bool,
    ) -> Vec<FlowEvent> {
        let end = |tracker: &Tracker| FlowEvent {
            tag: None,
            ..tracker.event(State::End, connection, Tag::default(), now)
        };
        if let Entry::Occupied(entry) = self.tracked.entry(connection.flow) {
            let tracked = entry.remove();
            return match tracked.announced {
                true => vec![end(self)],
                false => Vec::new(),
            };
        }
        if self.ended.remove(&connection.flow).is_some() {
            return Vec::new();
        }
        // Before the first scan, every connection counts as an existing one.
        let tag = (self.scans > 0).then(|| self.tag(connection, is_local));
        match tag.flatten() {
            Some(tag) => {
                vec![self.event(State::Start, connection, tag, now), end(self)]
            }
            None => Vec::new(),
        }
    }

    fn event(&self, state: State, connection: &Connection, tag: Tag, now: Timestamp) -> FlowEvent {
        FlowEvent {
            tag: Some(tag),
            usage: match state {
                State::Start => None,
                _ => connection.usage,
            },
            netlink: connection.socket.clone(),
            ..FlowEvent::new(state, connection.flow, now, self.origin)
        }
    }

    /// Whether a connection is a flow if a rule matches: it goes to a remote host, and not to an internal network.
    pub fn may_be_flow(&self, flow: &Flow, is_local: impl Fn(&IpAddr) -> bool) -> bool {
        let remote = flow.destination.address;
        let is_internal = self.internal.iter().any(|net| net.contains(&remote));
        !is_internal && is_public(remote) && !is_local(&remote)
    }

    fn tag(&self, connection: &Connection, is_local: impl Fn(&IpAddr) -> bool) -> Option<Tag> {
        if !self.may_be_flow(&connection.flow, is_local) {
            return None;
        }
        let rule = self.rules.iter().find(|rule| rule.matches(connection))?;
        Some(rule.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::{Protocol, Usage};

    const TAG: Tag = Tag {
        experiment: 2,
        activity: 9,
    };

    fn connection(remote: &str, port: u16) -> Connection {
        let local = "2a00::1".parse().unwrap();
        let remote: IpAddr = remote.parse().unwrap();
        let local = if remote.is_ipv4() {
            "1.0.0.1".parse().unwrap()
        } else {
            local
        };
        Connection {
            flow: Flow::new(Protocol::Tcp, (local, port), (remote, 443)).unwrap(),
            uid: Some(1000),
            cgroup: Some(7),
            usage: Some(Usage {
                received: Some(1),
                sent: Some(2),
            }),
            socket: None,
        }
    }

    fn tracker(announce_existing: bool) -> Tracker {
        let rules = vec![Rule {
            tag: TAG,
            ..Rule::default()
        }];
        let internal = vec!["2a01::/16".parse().unwrap()];
        let grace = SignedDuration::ZERO;
        Tracker::new(Origin::Netlink, rules, internal, announce_existing, grace)
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn scan(tracker: &mut Tracker, second: i64, connections: &[Connection]) -> Vec<(State, u16)> {
        tracker.begin_scan();
        let opened = |c| tracker.observe_open(c, at(second), |_| false);
        let mut events: Vec<FlowEvent> = connections.iter().filter_map(opened).collect();
        events.extend(tracker.end_scan(at(second)));
        events
            .iter()
            .map(|e| (e.state, e.flow.source.port))
            .collect()
    }

    #[test]
    fn scans_find_starts_and_ends() {
        let mut tracker = tracker(false);
        let [a, b, c] = [1, 2, 3].map(|port| connection("2a02::1", port));
        assert_eq!(scan(&mut tracker, 0, std::slice::from_ref(&a)), []);
        assert_eq!(
            scan(&mut tracker, 2, &[a.clone(), b.clone()]),
            [(State::Start, 2)]
        );
        assert_eq!(scan(&mut tracker, 4, &[b.clone(), c]), [(State::Start, 3)]);
        // The first connection was not announced, so its end is not reported.
        assert_eq!(scan(&mut tracker, 6, &[b]), [(State::End, 3)]);
        assert_eq!(scan(&mut tracker, 8, &[]), [(State::End, 2)]);
        assert!(tracker.tracked.is_empty());
    }

    #[test]
    fn existing_connections_are_announced_on_request() {
        let a = connection("2a02::1", 1);
        assert_eq!(scan(&mut tracker(true), 0, &[a]), [(State::Start, 1)]);
    }

    #[test]
    fn a_notification_gives_the_exact_end_and_reports_short_connections() {
        let mut tracker = tracker(false);
        let [a, b] = [1, 2].map(|port| connection("2a02::1", port));
        assert_eq!(tracker.observe_closed(&a, at(0), |_| false), []);
        scan(&mut tracker, 0, &[]);
        scan(&mut tracker, 2, std::slice::from_ref(&a));
        let end = tracker.observe_closed(&a, at(3), |_| false).remove(0);
        assert_eq!(
            (end.state, end.time, end.usage),
            (State::End, at(3), a.usage)
        );
        assert_eq!(scan(&mut tracker, 4, &[]), []);
        let both = tracker.observe_closed(&b, at(5), |_| false);
        assert_eq!(
            both.iter().map(|e| e.state).collect::<Vec<_>>(),
            [State::Start, State::End]
        );
        assert_eq!((both[0].tag, both[0].usage), (Some(TAG), None));
    }

    #[test]
    fn a_late_notification_does_not_end_a_connection_again() {
        let mut tracker = tracker(false);
        tracker.notification_grace = SignedDuration::from_secs(1);
        let [a, b, c] = [1, 2, 3].map(|port| connection("2a02::1", port));
        scan(&mut tracker, 0, std::slice::from_ref(&c));
        let all = [a.clone(), b.clone(), c.clone()];
        assert_eq!(scan(&mut tracker, 2, &all).len(), 2);
        assert!(!tracker.has_missing());
        assert_eq!(scan(&mut tracker, 4, &[]), []);
        assert!(tracker.has_missing());
        // A notification within the grace period, as from a busy kernel, still delivers the counts.
        let end = tracker.observe_closed(&a, at(4), |_| false);
        assert_eq!((end.len(), end[0].usage), (1, a.usage));
        tracker.begin_scan();
        let end = tracker.end_scan(at(5));
        assert_eq!((end.len(), end[0].time), (1, at(4)));
        assert!(!tracker.has_missing());
        // The socket of a reset connection is destroyed only when its owner closes it.
        for late in [&b, &c] {
            assert_eq!(tracker.observe_closed(late, at(60), |_| false), []);
        }
        assert!(tracker.tracked.is_empty());
    }

    #[test]
    fn the_same_5_tuple_may_be_reused_before_the_notification_of_the_old_socket() {
        let mut tracker = tracker(false);
        tracker.notification_grace = SignedDuration::from_secs(1);
        let a = connection("2a02::1", 1);
        scan(&mut tracker, 0, &[]);
        scan(&mut tracker, 2, std::slice::from_ref(&a));
        scan(&mut tracker, 4, &[]);
        assert_eq!(scan(&mut tracker, 6, &[]), [(State::End, 1)]);
        assert_eq!(scan(&mut tracker, 8, &[a]), [(State::Start, 1)]);
        assert_eq!(tracker.tracked.len(), 1);
    }

    #[test]
    fn private_internal_and_own_addresses_are_left_out() {
        let mut tracker = tracker(true);
        tracker.begin_scan();
        for (remote, expected) in [
            ("2a02::1", true),
            ("2a01::1", false),
            ("fd00::1", false),
            ("10.0.0.1", false),
            ("8.8.8.8", true),
        ] {
            let event = tracker.observe_open(&connection(remote, 1), at(0), |_| false);
            assert_eq!(event.is_some(), expected, "{remote}");
        }
        let own = tracker.observe_open(&connection("2a02::2", 1), at(0), |_| true);
        assert_eq!(own, None);
    }

    #[test]
    fn the_first_rule_that_matches_gives_the_tag() {
        let other = |activity| Tag {
            experiment: 3,
            activity,
        };
        let rules = vec![
            Rule {
                remote_networks: vec!["2a02::/32".parse().unwrap()],
                tag: other(1),
                ..Rule::default()
            },
            Rule {
                local_ports: vec![1..=9, 50..=50],
                tag: other(2),
                ..Rule::default()
            },
            Rule {
                remote_ports: vec![80..=80],
                tag: other(3),
                ..Rule::default()
            },
            Rule {
                uid: Some(1000),
                cgroups: Some([8].into()),
                tag: other(4),
                ..Rule::default()
            },
            Rule {
                uid: Some(1000),
                cgroups: Some([6, 7].into()),
                tag: other(5),
                ..Rule::default()
            },
        ];
        let mut tracker = Tracker::new(
            Origin::Netlink,
            rules,
            Vec::new(),
            true,
            SignedDuration::ZERO,
        );
        tracker.begin_scan();
        for (remote, port, activity) in [
            ("2a02::1", 1, Some(1)),
            ("2a03::1", 9, Some(2)),
            ("2a03::1", 50, Some(2)),
            ("2a03::1", 51, Some(5)),
        ] {
            let event = tracker.observe_open(&connection(remote, port), at(0), |_| false);
            assert_eq!(
                event.and_then(|e| e.tag),
                activity.map(other),
                "{remote} {port}"
            );
        }
        let mut foreign = connection("2a03::1", 52);
        foreign.uid = Some(0);
        assert_eq!(tracker.observe_open(&foreign, at(0), |_| false), None);
        foreign.uid = None;
        assert_eq!(tracker.observe_open(&foreign, at(0), |_| false), None);
    }
}
