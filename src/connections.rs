//! From the connections of this host to flow events: which connections are flows, with which tag, and
//! which have come and gone since they were last looked at. No I/O, no clock.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use jiff::{SignedDuration, Timestamp};

use crate::flow::{Flow, FlowEvent, Origin, State, Tag, Usage};
use crate::recent::Recent;
use crate::socket::Socket;
use crate::special_networks::is_public;

/// A TCP connection as the kernel shows it; its source is the local end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// From here to there.
    pub flow: Flow,
    /// The user who owns the socket, if it still has an owner.
    pub uid: Option<u32>,
    /// Id of the cgroup of the socket, where the kernel says it.
    pub cgroup: Option<u64>,
    /// Payload bytes so far, where the kernel says it.
    pub usage: Option<Usage>,
    /// What else the kernel says.
    pub socket: Option<Arc<Socket>>,
}

/// Which connections get a tag; what is empty or absent admits all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Networks of the remote end.
    pub remote_networks: Vec<IpNet>,
    /// Ports of the local end.
    pub local_ports: Vec<RangeInclusive<u16>>,
    /// Ports of the remote end.
    pub remote_ports: Vec<RangeInclusive<u16>>,
    /// Owner of the socket.
    pub uid: Option<u32>,
    /// Ids of the cgroup and of those below it.
    pub cgroups: Option<HashSet<u64>>,
    /// What they get.
    pub tag: Tag,
}

impl Rule {
    fn admits(&self, connection: &Connection) -> bool {
        let (local, remote) = (connection.flow.source, connection.flow.destination);
        let port = |ranges: &[RangeInclusive<u16>], port| {
            ranges.is_empty() || ranges.iter().any(|range| range.contains(&port))
        };
        let networks = &self.remote_networks;
        (networks.is_empty() || networks.iter().any(|net| net.contains(&remote.address)))
            && port(&self.local_ports, local.port)
            && port(&self.remote_ports, remote.port)
            && self.uid.is_none_or(|uid| connection.uid == Some(uid))
            && self.cgroups.as_ref().is_none_or(|ids| {
                connection
                    .cgroup
                    .is_some_and(|cgroup| ids.contains(&cgroup))
            })
    }
}

/// How long a connection that was ended without word of its socket, which its owner may keep, is known for the
/// sake of that word, unless so many others end.
const ENDED_MEMORY: Duration = Duration::from_secs(600);
const ENDED_MOST: usize = 1 << 14;

/// What is known of a connection.
struct Known {
    /// Whether a start was sent.
    announced: bool,
    /// The number of the last scan that showed it.
    scan: u64,
    /// When a scan first did not.
    missing: Option<Timestamp>,
}

/// Keeps the connections of one host apart: new, open, gone.
pub struct Tracker {
    origin: Origin,
    /// The first that admits a connection gives it its tag.
    pub rules: Vec<Rule>,
    internal: Vec<IpNet>,
    announce_existing: bool,
    /// How long word of a socket that has gone may take to come.
    patience: SignedDuration,
    known: HashMap<Flow, Known>,
    ended: Recent<()>,
    scans: u64,
}

impl Tracker {
    /// Connections to `internal` networks are no flows, nor are those to addresses that are nobody's on
    /// the Internet. Those that the first scan shows are announced only if `announce_existing`. What a
    /// scan does not show has ended, if [`Tracker::closed`] is not told of it within `patience`, which is
    /// zero if it never is.
    pub fn new(
        origin: Origin,
        rules: Vec<Rule>,
        internal: Vec<IpNet>,
        announce_existing: bool,
        patience: SignedDuration,
    ) -> Tracker {
        Tracker {
            origin,
            rules,
            internal,
            announce_existing,
            patience,
            known: HashMap::new(),
            ended: Recent::new(ENDED_MEMORY, ENDED_MOST),
            scans: 0,
        }
    }

    /// A connection whose start was sent before, by another.
    pub fn resume(&mut self, flow: Flow) {
        let known = Known {
            announced: true,
            scan: self.scans,
            missing: None,
        };
        self.known.insert(flow, known);
    }

    /// A scan begins: to be followed by [`Tracker::open`] for each connection, and
    /// [`Tracker::end_scan`].
    pub fn begin_scan(&mut self) {
        self.scans += 1;
    }

    /// A connection that is open; its start, if it is new. `is_local` knows the addresses of this host.
    pub fn open(
        &mut self,
        connection: &Connection,
        now: Timestamp,
        is_local: impl Fn(&IpAddr) -> bool,
    ) -> Option<FlowEvent> {
        let scan = self.scans;
        if let Some(known) = self.known.get_mut(&connection.flow) {
            known.scan = scan;
            known.missing = None;
            return None;
        }
        self.ended.remove(&connection.flow);
        let tag = self.tag(connection, is_local)?;
        let announced = self.announce_existing || scan > 1;
        let known = Known {
            announced,
            scan,
            missing: None,
        };
        self.known.insert(connection.flow, known);
        announced.then(|| self.event(State::Start, connection, tag, now))
    }

    /// The ends of what was not shown and not told of.
    pub fn end_scan(&mut self, now: Timestamp) -> Vec<FlowEvent> {
        let (scan, patience, origin) = (self.scans, self.patience, self.origin);
        let gone = self.known.extract_if(|_, known| {
            // The clock may have been set.
            known.scan != scan
                && now.duration_since(*known.missing.get_or_insert(now)).abs() >= patience
        });
        let mut ends = Vec::new();
        for (flow, known) in gone {
            if !patience.is_zero() {
                self.ended.insert(flow, ());
            }
            if known.announced {
                ends.push(FlowEvent::new(
                    State::End,
                    flow,
                    known.missing.unwrap_or(now),
                    origin,
                ));
            }
        }
        self.ended.tend(now);
        ends
    }

    /// Whether it is one of those that are followed.
    pub fn knows(&self, flow: &Flow) -> bool {
        self.known.contains_key(flow)
    }

    /// Whether a scan has missed connections that it may yet have to end.
    pub fn misses_some(&self) -> bool {
        self.known.values().any(|known| known.missing.is_some())
    }

    /// A connection that was closed at `now`: its end, if it was not ended before, and before that its
    /// start if no scan has shown it. Of those that no scan has shown, one that was never established is not
    /// to be told.
    pub fn closed(
        &mut self,
        connection: &Connection,
        now: Timestamp,
        is_local: impl Fn(&IpAddr) -> bool,
    ) -> Vec<FlowEvent> {
        let end = |tracker: &Tracker| FlowEvent {
            tag: None,
            ..tracker.event(State::End, connection, Tag::default(), now)
        };
        if let Entry::Occupied(entry) = self.known.entry(connection.flow) {
            let known = entry.remove();
            return match known.announced {
                true => vec![end(self)],
                false => Vec::new(),
            };
        }
        if self.ended.remove(&connection.flow).is_some() {
            return Vec::new();
        }
        // Before the first scan every connection is one that was there before.
        let short = (self.scans > 0).then(|| self.tag(connection, is_local));
        match short.flatten() {
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

    fn tag(&self, connection: &Connection, is_local: impl Fn(&IpAddr) -> bool) -> Option<Tag> {
        let remote = connection.flow.destination.address;
        let internal = self.internal.iter().any(|net| net.contains(&remote));
        if internal || !is_public(remote) || is_local(&remote) {
            return None;
        }
        let rule = self.rules.iter().find(|rule| rule.admits(connection))?;
        Some(rule.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Protocol;

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
        let patience = SignedDuration::ZERO;
        Tracker::new(
            Origin::Netlink,
            rules,
            internal,
            announce_existing,
            patience,
        )
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn scan(tracker: &mut Tracker, second: i64, connections: &[Connection]) -> Vec<(State, u16)> {
        tracker.begin_scan();
        let opened = |c| tracker.open(c, at(second), |_| false);
        let mut events: Vec<FlowEvent> = connections.iter().filter_map(opened).collect();
        events.extend(tracker.end_scan(at(second)));
        events
            .iter()
            .map(|e| (e.state, e.flow.source.port))
            .collect()
    }

    #[test]
    fn starts_and_ends_between_scans() {
        let mut tracker = tracker(false);
        let [a, b, c] = [1, 2, 3].map(|port| connection("2a02::1", port));
        assert_eq!(scan(&mut tracker, 0, std::slice::from_ref(&a)), []);
        assert_eq!(
            scan(&mut tracker, 2, &[a.clone(), b.clone()]),
            [(State::Start, 2)]
        );
        assert_eq!(scan(&mut tracker, 4, &[b.clone(), c]), [(State::Start, 3)]);
        // The first was there before: its end is nobody's business.
        assert_eq!(scan(&mut tracker, 6, &[b]), [(State::End, 3)]);
        assert_eq!(scan(&mut tracker, 8, &[]), [(State::End, 2)]);
        assert!(tracker.known.is_empty());
    }

    #[test]
    fn existing_connections_are_announced_on_request() {
        let a = connection("2a02::1", 1);
        assert_eq!(scan(&mut tracker(true), 0, &[a]), [(State::Start, 1)]);
    }

    #[test]
    fn a_notification_ends_exactly_and_tells_of_short_ones() {
        let mut tracker = tracker(false);
        let [a, b] = [1, 2].map(|port| connection("2a02::1", port));
        assert_eq!(tracker.closed(&a, at(0), |_| false), []);
        scan(&mut tracker, 0, &[]);
        scan(&mut tracker, 2, std::slice::from_ref(&a));
        let end = tracker.closed(&a, at(3), |_| false).remove(0);
        assert_eq!(
            (end.state, end.time, end.usage),
            (State::End, at(3), a.usage)
        );
        assert_eq!(scan(&mut tracker, 4, &[]), []);
        let both = tracker.closed(&b, at(5), |_| false);
        assert_eq!(
            both.iter().map(|e| e.state).collect::<Vec<_>>(),
            [State::Start, State::End]
        );
        assert_eq!((both[0].tag, both[0].usage), (Some(TAG), None));
    }

    #[test]
    fn what_was_ended_without_word_of_its_socket_is_not_ended_again_with_it() {
        let mut tracker = tracker(false);
        tracker.patience = SignedDuration::from_secs(1);
        let [a, b, c] = [1, 2, 3].map(|port| connection("2a02::1", port));
        scan(&mut tracker, 0, std::slice::from_ref(&c));
        let all = [a.clone(), b.clone(), c.clone()];
        assert_eq!(scan(&mut tracker, 2, &all).len(), 2);
        assert!(!tracker.misses_some());
        assert_eq!(scan(&mut tracker, 4, &[]), []);
        assert!(tracker.misses_some());
        // Word that is late, as it is from a busy kernel, has the counts all the same.
        let end = tracker.closed(&a, at(4), |_| false);
        assert_eq!((end.len(), end[0].usage), (1, a.usage));
        tracker.begin_scan();
        let end = tracker.end_scan(at(5));
        assert_eq!((end.len(), end[0].time), (1, at(4)));
        assert!(!tracker.misses_some());
        // The socket of a connection that was reset goes when its owner closes it.
        for late in [&b, &c] {
            assert_eq!(tracker.closed(late, at(60), |_| false), []);
        }
        assert!(tracker.known.is_empty());
    }

    #[test]
    fn the_same_ends_may_be_connected_anew_before_the_word_of_the_old_socket() {
        let mut tracker = tracker(false);
        tracker.patience = SignedDuration::from_secs(1);
        let a = connection("2a02::1", 1);
        scan(&mut tracker, 0, &[]);
        scan(&mut tracker, 2, std::slice::from_ref(&a));
        scan(&mut tracker, 4, &[]);
        assert_eq!(scan(&mut tracker, 6, &[]), [(State::End, 1)]);
        assert_eq!(scan(&mut tracker, 8, &[a]), [(State::Start, 1)]);
        assert_eq!(tracker.known.len(), 1);
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
            let event = tracker.open(&connection(remote, 1), at(0), |_| false);
            assert_eq!(event.is_some(), expected, "{remote}");
        }
        let own = tracker.open(&connection("2a02::2", 1), at(0), |_| true);
        assert_eq!(own, None);
    }

    #[test]
    fn the_first_rule_that_admits_gives_the_tag() {
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
            let event = tracker.open(&connection(remote, port), at(0), |_| false);
            assert_eq!(
                event.and_then(|e| e.tag),
                activity.map(other),
                "{remote} {port}"
            );
        }
        let mut foreign = connection("2a03::1", 52);
        foreign.uid = Some(0);
        assert_eq!(tracker.open(&foreign, at(0), |_| false), None);
        foreign.uid = None;
        assert_eq!(tracker.open(&foreign, at(0), |_| false), None);
    }
}
