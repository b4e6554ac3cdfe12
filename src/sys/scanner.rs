//! Scans of all TCP sockets of this host. One thread dumps the sockets, and one dump serves everybody whose scan is due.
//!
//! Periodic scans are due at the multiples of their period since the scanner was started. So scans whose periods are
//! equal, or multiples of each other, are due at the same instants. A dump serves a scan if it began when that scan was
//! due, or later.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use prometheus::IntCounter;

use super::sock_diag::{Answer, Dump};
use crate::flow::Protocol;
use crate::socket::{CONNECTED, SocketMessage};

/// How many requests may wait: more than there are subscribers.
const QUEUE: usize = 16;

/// What a scan asks of a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The states of the sockets, a bit mask of the kernel's numbers.
    pub states: u32,
    /// The attributes, a bit mask of `INET_DIAG_*` minus one.
    pub extensions: u8,
}

impl Wanted {
    /// The connections alone, without attributes.
    pub const CONNECTIONS: Wanted = Wanted {
        states: CONNECTED,
        extensions: 0,
    };

    fn covers(self, other: Wanted) -> bool {
        self.with(other) == self
    }

    fn with(self, other: Wanted) -> Wanted {
        Wanted {
            states: self.states | other.states,
            extensions: self.extensions | other.extensions,
        }
    }
}

/// The sockets that a dump showed.
pub struct Scan {
    /// When the dump began: what happened before is in it.
    pub began: Instant,
    wanted: Wanted,
    answer: Answer,
}

impl Scan {
    /// The sockets that have a remote end, perhaps in more states than were asked for.
    pub fn sockets(&self) -> impl Iterator<Item = SocketMessage<'_>> {
        self.answer.sockets()
    }
}

/// Periodic scans of a subscriber.
struct Periodic {
    period: Duration,
    wanted: Wanted,
}

enum Request {
    Subscribe(Weak<Periodic>),
    Scan {
        due: Instant,
        wanted: Wanted,
        reply: Sender<io::Result<Arc<Scan>>>,
    },
}

/// Where subscribers ask for scans. Clones ask the same scanner.
#[derive(Clone)]
pub struct Scanner {
    epoch: Instant,
    requests: Sender<Request>,
}

impl Scanner {
    /// A scanner, and its work, which needs a thread. The work is done when all clones and subscribers are gone. `dumps`
    /// counts the dumps.
    pub fn new(dumps: IntCounter) -> (Scanner, impl FnOnce() + Send) {
        let (requests, received) = bounded(QUEUE);
        let epoch = Instant::now();
        let mut work = Work {
            epoch,
            dumps,
            dump: None,
            latest: None,
            subscribers: Vec::new(),
        };
        let work = move || work.run(&received);
        (Scanner { epoch, requests }, work)
    }

    /// Subscribes to scans of every `period`, which ask for `wanted`. The first is due at once.
    pub fn subscribe(&self, period: Duration, wanted: Wanted) -> Subscriber {
        let periodic = Arc::new(Periodic { period, wanted });
        let request = Request::Subscribe(Arc::downgrade(&periodic));
        // If the scanner has ended, the first scan is an error.
        let _ = self.requests.send(request);
        Subscriber {
            scanner: self.clone(),
            periodic,
            next_due: None,
        }
    }
}

/// A subscription to scans.
///
/// A scan is an error if the kernel refuses it. [`io::ErrorKind::BrokenPipe`] means that the scanner has ended.
pub struct Subscriber {
    scanner: Scanner,
    periodic: Arc<Periodic>,
    /// `None` before the first periodic scan.
    next_due: Option<Instant>,
}

impl Subscriber {
    /// When the next periodic scan is due.
    pub fn next_due(&self) -> Instant {
        self.next_due.unwrap_or(self.scanner.epoch)
    }

    /// Whether a periodic scan is due at `now`. A dump that serves it may have begun already.
    pub fn is_due(&self, now: Instant) -> bool {
        now >= self.next_due()
    }

    /// Does the periodic scan that is due at `now`, with a dump that begins after `now` if `anew`. The next one is due at
    /// the first multiple of the period after `now`.
    pub fn scan_due(&mut self, now: Instant, anew: bool) -> io::Result<Arc<Scan>> {
        let Periodic { period, wanted } = *self.periodic;
        let last = now - since_due(self.scanner.epoch, period, now);
        let is_first = self.next_due.replace(last + period).is_none();
        let due = if is_first || anew { now } else { last };
        self.ask(due, wanted)
    }

    /// Scans the connections now, without attributes.
    pub fn scan_now(&self) -> io::Result<Arc<Scan>> {
        self.ask(Instant::now(), Wanted::CONNECTIONS)
    }

    fn ask(&self, due: Instant, wanted: Wanted) -> io::Result<Arc<Scan>> {
        let (reply, scan) = bounded(1);
        let ended = || io::Error::new(io::ErrorKind::BrokenPipe, "the scanner has ended");
        let request = Request::Scan { due, wanted, reply };
        self.scanner.requests.send(request).map_err(|_| ended())?;
        scan.recv().unwrap_or_else(|_| Err(ended()))
    }
}

/// The time since the last multiple of `period`, counted from `epoch`.
fn since_due(epoch: Instant, period: Duration, now: Instant) -> Duration {
    let since = now.saturating_duration_since(epoch).as_nanos() % period.as_nanos().max(1);
    // Less than a period.
    Duration::from_nanos(u64::try_from(since).unwrap_or(0))
}

/// The work of the scanner's thread.
struct Work {
    epoch: Instant,
    dumps: IntCounter,
    /// `None` before the first dump, and after one that failed.
    dump: Option<Dump>,
    latest: Option<Arc<Scan>>,
    subscribers: Vec<Weak<Periodic>>,
}

impl Work {
    fn run(&mut self, requests: &Receiver<Request>) {
        for request in requests {
            match request {
                Request::Subscribe(periodic) => {
                    self.subscribers
                        .retain(|periodic| periodic.strong_count() > 0);
                    self.subscribers.push(periodic);
                }
                // The requester waits for the answer.
                Request::Scan { due, wanted, reply } => drop(reply.send(self.scan(due, wanted))),
            }
        }
    }

    fn scan(&mut self, due: Instant, wanted: Wanted) -> io::Result<Arc<Scan>> {
        let serves = |scan: &&Arc<Scan>| scan.began >= due && scan.wanted.covers(wanted);
        if let Some(latest) = self.latest.as_ref().filter(serves) {
            return Ok(Arc::clone(latest));
        }
        let latest = self.latest.take().and_then(Arc::into_inner);
        let mut answer = latest.map_or_else(Answer::default, |latest| latest.answer);
        let wanted = self.with_others(due, wanted);
        let mut dump = match self.dump.take() {
            Some(dump) => dump,
            None => Dump::open()?,
        };
        let began = Instant::now();
        self.dumps.inc();
        let Wanted { states, extensions } = wanted;
        dump.sockets(Protocol::Tcp, states, extensions, &mut answer)?;
        self.dump = Some(dump);
        let scan = Arc::new(Scan {
            began,
            wanted,
            answer,
        });
        self.latest = Some(Arc::clone(&scan));
        Ok(scan)
    }

    /// `wanted`, and what others want whose periodic scan is due at the same instant.
    fn with_others(&self, due: Instant, wanted: Wanted) -> Wanted {
        let others = self.subscribers.iter().filter_map(Weak::upgrade);
        let others = others.filter(|other| since_due(self.epoch, other.period, due).is_zero());
        others.fold(wanted, |wanted, other| wanted.with(other.wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    use crate::flow::Flow;

    const HOUR: Duration = Duration::from_secs(3600);
    const ALL: Wanted = Wanted {
        states: u32::MAX,
        extensions: u8::MAX,
    };

    fn scanner() -> (Scanner, IntCounter) {
        let dumps = IntCounter::new("dumps", "help").unwrap();
        let (scanner, work) = Scanner::new(dumps.clone());
        std::thread::spawn(work);
        (scanner, dumps)
    }

    #[test]
    fn a_dump_serves_the_scans_that_were_due_before_it_began() {
        let (scanner, dumps) = scanner();
        let mut plugin = scanner.subscribe(HOUR, Wanted::CONNECTIONS);
        let mut enricher = scanner.subscribe(HOUR, ALL);
        assert!(plugin.is_due(Instant::now()));
        // The first scan of each is one of the present.
        plugin.scan_due(Instant::now(), false).unwrap();
        let shared = enricher.scan_due(Instant::now(), false).unwrap();
        assert!(!plugin.is_due(Instant::now()) && dumps.get() == 2);
        // The next was due when the scanner was started.
        let same = plugin.scan_due(Instant::now(), false).unwrap();
        assert!(Arc::ptr_eq(&same, &shared) && dumps.get() == 2);
        let anew = plugin.scan_due(Instant::now(), true).unwrap();
        assert!(anew.began > shared.began && dumps.get() == 3);
        // It has no attributes.
        enricher.scan_due(Instant::now(), false).unwrap();
        assert_eq!(dumps.get(), 4);
        let now = plugin.scan_now().unwrap();
        assert!(now.began > anew.began && dumps.get() == 5);
    }

    #[test]
    fn a_dump_has_what_all_want_whose_scan_is_due() {
        let dumps = IntCounter::new("dumps", "help").unwrap();
        let epoch = Instant::now();
        let periodic = |hours, wanted| {
            let period = HOUR * hours;
            Arc::new(Periodic { period, wanted })
        };
        let plugin = periodic(1, Wanted::CONNECTIONS);
        let enricher = periodic(2, ALL);
        let work = Work {
            epoch,
            dumps,
            dump: None,
            latest: None,
            subscribers: [&plugin, &enricher].map(Arc::downgrade).into(),
        };
        let wanted = |hours| work.with_others(epoch + HOUR * hours, Wanted::CONNECTIONS);
        assert_eq!(
            [1, 2, 3].map(wanted),
            [Wanted::CONNECTIONS, ALL, Wanted::CONNECTIONS]
        );
        drop(enricher);
        assert_eq!(wanted(2), Wanted::CONNECTIONS);
    }

    #[test]
    fn a_scan_shows_a_connection() {
        let (scanner, _) = scanner();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let end = |address: std::net::SocketAddr| (address.ip(), address.port());
        let (from, to) = (near.local_addr().unwrap(), near.peer_addr().unwrap());
        let flow = Flow::new(Protocol::Tcp, end(from), end(to)).unwrap();
        let subscriber = scanner.subscribe(HOUR, ALL);
        let scan = subscriber.scan_now().unwrap();
        let found: Vec<_> = scan.sockets().filter(|s| s.flow == flow).collect();
        assert_eq!(found.len(), 1);
        assert!(found[0].is_connected() && found[0].cookie != 0);
    }

    #[test]
    fn a_scanner_that_has_ended_is_an_error() {
        let (scanner, work) = Scanner::new(IntCounter::new("dumps", "help").unwrap());
        drop(work);
        let error = scanner.subscribe(HOUR, ALL).scan_now().err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
