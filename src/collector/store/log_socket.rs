//! Sends records to a Unix datagram socket of another program as they are stored: one record per datagram.
//!
//! A thread of its own sends them, so that a burst waits for a receiver that takes a few datagrams at a time, and the store
//! waits for none. Records that the receiver does not take in time are dropped and counted.

use std::io::{self, ErrorKind};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use log::Level;
use nix::sys::socket::{setsockopt, sockopt};

use super::LogSocketSettings;
use super::segment::HEADER_LENGTH;
use crate::error::{Context, Result};
use crate::logging::LogLimit;

/// The batches that wait for the receiver, and the bytes in them.
const MAX_WAITING_BATCHES: usize = 1024;
const MAX_WAITING: usize = 4 << 20;
/// How long to wait for a receiver that is full. After that it must take a record before another one waits for it.
const SEND_TIMEOUT: Duration = Duration::from_millis(100);
/// How long after a failed connection to try again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stop waits for the receiver.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);

/// The sender of records. When it is dropped, what waits is sent if the receiver takes it within half a second.
pub struct LogSocket {
    /// `None` when it stops.
    queue: Option<Sender<Vec<u8>>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    waiting: AtomicUsize,
    sent: AtomicU64,
    dropped: AtomicU64,
    /// Until when to wait for the receiver; set when it stops.
    stop_at: OnceLock<Instant>,
}

/// What became of the records so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogSocketCounts {
    /// Records that the receiver took.
    pub sent: u64,
    /// Records that there was no receiver for, or no room.
    pub dropped: u64,
}

impl LogSocket {
    /// Starts the thread. It is no error if there is no receiver yet.
    pub fn start(settings: &LogSocketSettings) -> Result<LogSocket> {
        let (queue, batches) = bounded(MAX_WAITING_BATCHES);
        let shared = Arc::new(Shared::default());
        let mut connection = Connection::new(settings.clone());
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("log-socket".to_owned())
            .spawn(move || run(&mut connection, &batches, &of_thread))
            .context(|| "thread of the log socket".to_owned())?;
        Ok(LogSocket {
            queue: Some(queue),
            shared,
            thread: Some(thread),
        })
    }

    /// Sends the records of a batch. Never waits.
    pub fn send(&self, batch: &[u8]) {
        let waiting = &self.shared.waiting;
        let fits = waiting.load(Ordering::Relaxed) + batch.len() <= MAX_WAITING;
        if fits && let Some(queue) = &self.queue {
            waiting.fetch_add(batch.len(), Ordering::Relaxed);
            if queue.try_send(batch.to_vec()).is_ok() {
                return;
            }
            waiting.fetch_sub(batch.len(), Ordering::Relaxed);
        }
        let count = records(batch).count() as u64;
        self.shared.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// The counts so far; those of records that wait come later.
    pub fn counts(&self) -> LogSocketCounts {
        LogSocketCounts {
            sent: self.shared.sent.load(Ordering::Relaxed),
            dropped: self.shared.dropped.load(Ordering::Relaxed),
        }
    }
}

impl Drop for LogSocket {
    fn drop(&mut self) {
        let _ = self.shared.stop_at.set(Instant::now() + STOP_TIMEOUT);
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The records of a batch, by the lengths in their headers.
fn records(mut batch: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let words = *batch.get(1)?;
        let length = HEADER_LENGTH + 4 * usize::from(words);
        let (record, rest) = batch.split_at_checked(length)?;
        batch = rest;
        Some(record)
    })
}

fn run(connection: &mut Connection, batches: &Receiver<Vec<u8>>, shared: &Shared) {
    connection.connect(Instant::now());
    loop {
        match batches.recv_timeout(RETRY_INTERVAL) {
            Ok(batch) => {
                for record in records(&batch) {
                    let stopping = shared.stop_at.get();
                    let in_time = stopping.is_none_or(|at| Instant::now() < *at);
                    let counter = match connection.send(record, in_time) {
                        true => &shared.sent,
                        false => &shared.dropped,
                    };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                shared.waiting.fetch_sub(batch.len(), Ordering::Release);
            }
            Err(RecvTimeoutError::Timeout) => connection.failures.tick(Instant::now()),
            Err(RecvTimeoutError::Disconnected) => {
                connection.failures.flush();
                return;
            }
        }
    }
}

/// The connection to the receiver, if there is one.
struct Connection {
    settings: LogSocketSettings,
    socket: Option<UnixDatagram>,
    /// Whether to wait for the receiver: it took the last record.
    waits: bool,
    tried: Option<Instant>,
    failures: LogLimit,
}

impl Connection {
    fn new(settings: LogSocketSettings) -> Connection {
        Connection {
            settings,
            socket: None,
            waits: true,
            tried: None,
            failures: LogLimit::new(Level::Warn, "log socket: failures"),
        }
    }

    /// Sends a record, and waits for the receiver if `may_wait`. Returns whether the receiver took it.
    fn send(&mut self, record: &[u8], may_wait: bool) -> bool {
        // The second attempt is for a receiver that was started anew.
        for _ in 0..2 {
            if self.socket.is_none() {
                self.connect(Instant::now());
            }
            let Some(socket) = &self.socket else {
                return false;
            };
            if self.waits && !may_wait {
                self.set_waiting(false);
                continue;
            }
            match socket.send(record) {
                Ok(_) => {
                    if !self.waits && may_wait {
                        self.set_waiting(true);
                    }
                    return true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.waits {
                        self.log("the receiver is full; records are dropped");
                        self.set_waiting(false);
                    }
                    return false;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.log(&format!("{error}; records are dropped"));
                    self.socket = None;
                }
            }
        }
        false
    }

    fn connect(&mut self, now: Instant) {
        if self
            .tried
            .is_some_and(|tried| now.duration_since(tried) < RETRY_INTERVAL)
        {
            return;
        }
        self.tried = Some(now);
        match self.open() {
            Ok(socket) => {
                log::info!("log socket {}: connected", self.settings.path.display());
                self.socket = Some(socket);
                self.waits = true;
            }
            Err(error) => self.log(&format!(
                "{error}; records are dropped until it can be used"
            )),
        }
    }

    fn open(&self) -> io::Result<UnixDatagram> {
        let socket = UnixDatagram::unbound()?;
        if let Some(size) = self.settings.buffer_size {
            setsockopt(&socket, sockopt::SndBuf, &size)?;
        }
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        socket.connect(&self.settings.path)?;
        Ok(socket)
    }

    fn set_waiting(&mut self, waits: bool) {
        self.waits = waits;
        if let Some(socket) = &self.socket
            && let Err(error) = socket.set_nonblocking(!waits)
        {
            self.log(&format!("{error}"));
            self.socket = None;
        }
    }

    fn log(&mut self, what: &str) {
        let path = self.settings.path.display();
        self.failures
            .log(Instant::now(), || format!("log socket {path}: {what}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collector::record::FlowRecord;
    use crate::collector::store::fields::Fields;
    use crate::collector::store::segment::{decode, encode};
    use std::path::PathBuf;
    use tempfile::TempDir;

    fn batch(tags: std::ops::Range<u32>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for tag in tags {
            let record = FlowRecord {
                rule_tag: Some(tag),
                ..FlowRecord::default()
            };
            encode(&record, Fields::TAG, &mut bytes);
        }
        bytes
    }

    fn start() -> (TempDir, PathBuf, LogSocket) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let settings = LogSocketSettings {
            path: path.clone(),
            buffer_size: Some(65536),
        };
        (dir, path, LogSocket::start(&settings).unwrap())
    }

    fn bind(path: &PathBuf) -> UnixDatagram {
        let socket = UnixDatagram::bind(path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        socket
    }

    fn tag(socket: &UnixDatagram) -> u32 {
        let mut buffer = [0; 2000];
        let length = socket.recv(&mut buffer).unwrap();
        let (record, _, whole) = decode(&buffer[..length]).unwrap();
        assert_eq!(whole, length);
        record.rule_tag.unwrap()
    }

    /// Sends records until one of them arrives.
    fn expect_one(log_socket: &LogSocket, receiver: &UnixDatagram) {
        receiver.set_nonblocking(true).unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while receiver.recv(&mut [0; 100]).is_err() {
            assert!(Instant::now() < deadline, "{:?}", log_socket.counts());
            log_socket.send(&batch(0..1));
            thread::sleep(Duration::from_millis(20));
        }
        receiver.set_nonblocking(false).unwrap();
    }

    /// Waits until every record was sent or dropped.
    fn settled(log_socket: &LogSocket) -> LogSocketCounts {
        let deadline = Instant::now() + Duration::from_secs(20);
        while log_socket.shared.waiting.load(Ordering::Acquire) > 0 {
            assert!(Instant::now() < deadline, "{:?}", log_socket.counts());
            thread::sleep(Duration::from_millis(5));
        }
        log_socket.counts()
    }

    #[test]
    fn a_burst_arrives_whole_and_in_order_at_a_receiver_with_a_short_queue() {
        const COUNT: u32 = 5000;
        let (dir, path, early) = start();
        drop(early);
        let receiver = bind(&path);
        let settings = LogSocketSettings {
            path,
            buffer_size: None,
        };
        let log_socket = LogSocket::start(&settings).unwrap();
        log_socket.send(&batch(0..COUNT));
        for expected in 0..COUNT {
            assert_eq!(tag(&receiver), expected);
        }
        let counts = settled(&log_socket);
        assert_eq!((counts.sent, counts.dropped), (COUNT.into(), 0));
        drop(dir);
    }

    #[test]
    fn records_without_a_receiver_are_dropped_and_counted_until_there_is_one() {
        let (_dir, path, log_socket) = start();
        log_socket.send(&batch(0..100));
        assert_eq!(settled(&log_socket).dropped, 100);
        let receiver = bind(&path);
        expect_one(&log_socket, &receiver);
        // It goes, and comes back.
        drop(receiver);
        std::fs::remove_file(&path).unwrap();
        // What was sent since is in the queue of the receiver that is gone, or dropped.
        let before = settled(&log_socket);
        log_socket.send(&batch(0..100));
        assert_eq!(settled(&log_socket).dropped, before.dropped + 100);
        let receiver = bind(&path);
        expect_one(&log_socket, &receiver);
    }

    #[test]
    fn a_receiver_that_reads_nothing_holds_up_neither_the_store_nor_a_stop() {
        let (_dir, path, log_socket) = start();
        let receiver = bind(&path);
        expect_one(&log_socket, &receiver);
        let before = settled(&log_socket);
        let one = batch(0..10_000);
        // More than may wait, in a moment: what does not fit is dropped here.
        for _ in 0..100 {
            log_socket.send(&one);
        }
        assert!(log_socket.counts().dropped > before.dropped);
        let counts = settled(&log_socket);
        let sent = counts.sent - before.sent;
        assert_eq!(sent + counts.dropped - before.dropped, 1_000_000);
        assert!((1..100_000).contains(&sent), "{sent}");
        // The receiver reads again: records wait for it again.
        receiver.set_nonblocking(true).unwrap();
        while receiver.recv(&mut [0; 100]).is_ok() {}
        expect_one(&log_socket, &receiver);
        log_socket.send(&one);
        let shared = Arc::clone(&log_socket.shared);
        drop(log_socket);
        assert_eq!(shared.waiting.load(Ordering::Relaxed), 0);
    }
}
