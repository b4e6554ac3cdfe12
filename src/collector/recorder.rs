//! The recorder: the one thread that writes batches to the store. It owns the accounts.
//!
//! While writing fails, batches wait in memory, up to a limit. Beyond it their records are dropped, and counted.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use jiff::Timestamp;
use log::Level;

use crate::collector::accounts::{Account, Counts, Entry, Ledger};
use crate::collector::filter::{self, Filter};
use crate::collector::forward::Forwarded;
use crate::collector::record::ExporterKey;
use crate::collector::store::log_socket::{LogSocket, LogSocketCounts};
use crate::collector::store::{self, writer::Store};
use crate::logging::LogLimit;

/// How long after a failed write the next is tried.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How often rates are computed and segments rotated.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// How often a worker looks whether the disk has made room.
const ROOM_POLL_INTERVAL: Duration = Duration::from_millis(1);
/// How long a stop tries to write what waits.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Buffers that are kept for the next batches.
const SPARE_BUFFERS: usize = 8;

/// A message to the recorder.
pub enum Message {
    /// Records and what is to be counted with them.
    Batch(Batch),
    /// A question for the state.
    Snapshot(Sender<Snapshot>),
    /// Reopen the file of the store.
    Reopen,
    /// A reload.
    Settings {
        /// Those of the store, if they have changed.
        store: Option<store::Settings>,
        /// The filter.
        filter: Arc<Filter>,
        /// The texts of its rules.
        rules: Vec<String>,
        /// How many exporters have accounts of their own.
        max_exporters: usize,
        /// Whether the store could be opened; if not, the former settings stay in effect.
        reply: Sender<Result<(), String>>,
    },
}

/// What a worker has received since its last batch.
pub struct Batch {
    /// Encoded records.
    pub bytes: Vec<u8>,
    /// When the first datagram was received, UNIX seconds: its segment is that of this time, however long it waits.
    pub received_s: Option<u32>,
    /// What each exporter sent.
    pub entries: Vec<(Option<ExporterKey>, Entry)>,
    /// The filter that the records passed.
    pub filter: Arc<Filter>,
    /// What its rules did.
    pub rule_counts: filter::Counts,
    /// Datagrams that were sent on.
    pub forwarded: Forwarded,
    /// Datagrams that the kernel dropped.
    pub kernel_dropped: u64,
}

impl Batch {
    /// An empty batch that uses the memory of `bytes`.
    pub fn new(filter: &Arc<Filter>, bytes: Vec<u8>) -> Batch {
        Batch {
            bytes,
            received_s: None,
            entries: Vec::new(),
            filter: Arc::clone(filter),
            rule_counts: filter::Counts::new(filter),
            forwarded: Forwarded::default(),
            kernel_dropped: 0,
        }
    }

    /// Whether there is nothing to write or to count.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.kernel_dropped == 0
    }

    /// Drops the records, and counts them as rejected.
    pub fn drop_records(&mut self) {
        self.bytes.clear();
        self.received_s = None;
        for (_, entry) in &mut self.entries {
            entry.drop_accepted();
        }
    }

    fn records(&self) -> u64 {
        self.entries.iter().map(|(_, entry)| entry.accepted).sum()
    }
}

/// The bytes that are on their way from the workers to the disk, and the buffers that come back.
#[derive(Clone)]
pub struct Waiting {
    bytes: Arc<AtomicUsize>,
    /// Whether writing fails.
    is_failing: Arc<AtomicBool>,
    limit: usize,
    buffers: (Sender<Vec<u8>>, Receiver<Vec<u8>>),
}

impl Waiting {
    /// At most `limit` bytes may wait.
    pub fn new(limit: usize) -> Waiting {
        Waiting {
            bytes: Arc::default(),
            is_failing: Arc::default(),
            limit,
            buffers: bounded(SPARE_BUFFERS),
        }
    }

    /// The same with another limit.
    pub fn with_limit(&self, limit: usize) -> Waiting {
        Waiting {
            limit,
            ..self.clone()
        }
    }

    /// Reserves room for a batch. While there is none, it waits for the disk, and datagrams wait in their sockets; if
    /// writing fails, it returns `false` instead.
    pub fn reserve(&self, bytes: usize) -> bool {
        loop {
            let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
            if before == 0 || before + bytes <= self.limit {
                return true;
            }
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            if self.is_failing.load(Ordering::Relaxed) {
                return false;
            }
            std::thread::sleep(ROOM_POLL_INTERVAL);
        }
    }

    /// An empty buffer, which may have memory from an earlier batch.
    pub fn empty_buffer(&self) -> Vec<u8> {
        self.buffers.1.try_recv().unwrap_or_default()
    }

    fn release(&self, mut buffer: Vec<u8>) {
        self.bytes.fetch_sub(buffer.len(), Ordering::Relaxed);
        buffer.clear();
        // A buffer too many is freed.
        let _ = self.buffers.0.try_send(buffer);
    }
}

/// The state, at one moment.
pub struct Snapshot {
    /// The numbers of all exporters together.
    pub total: Counts,
    /// The accounts by exporter.
    pub exporters: HashMap<ExporterKey, Account>,
    /// The numbers of what belongs to no exporter, and of exporters that were forgotten.
    pub others: Counts,
    /// When the snapshot was taken.
    pub taken: Instant,
    /// Datagrams that the kernel dropped.
    pub kernel_dropped: u64,
    /// Datagrams that were sent on.
    pub forwarded: Forwarded,
    /// Records that wait to be written. They are not in the other numbers yet.
    pub waiting_records: u64,
    /// Their bytes.
    pub waiting_bytes: usize,
    /// Why the last write failed, if nothing was written since.
    pub store_error: Option<String>,
    /// Bytes that were written.
    pub written_bytes: u64,
    /// Records that were sent to the log socket.
    pub log_socket: Option<LogSocketCounts>,
    /// The texts of the rules, and what each did.
    pub rules: Vec<(String, filter::RuleCounts)>,
    /// Records that no rule matched.
    pub unmatched: u64,
}

impl Snapshot {
    /// What became of the records, for the log.
    pub fn summary(&self) -> String {
        let total = &self.total;
        format!(
            "received {} records = stored {} + filtered {} + rejected {}; lost on the way {}; datagrams {}, dropped by the kernel {}; {} exporters; {} records wait",
            total.received,
            total.stored,
            total.filtered,
            total.rejected_total(),
            total.lost,
            total.datagrams,
            self.kernel_dropped,
            self.exporters.len(),
            self.waiting_records
        )
    }
}

/// The recorder.
pub struct Recorder {
    store: Box<Store>,
    log_socket: Option<LogSocket>,
    ledger: Ledger,
    waiting: Waiting,
    unwritten: VecDeque<Batch>,
    retry_at: Option<Instant>,
    store_error: Option<String>,
    failures: LogLimit,
    filter: Arc<Filter>,
    rules: Vec<String>,
    rule_counts: filter::Counts,
    kernel_dropped: u64,
    forwarded: Forwarded,
    written_bytes: u64,
}

impl Recorder {
    /// A recorder for this store, with empty accounts.
    pub fn new(
        store: Box<Store>,
        log_socket: Option<LogSocket>,
        filter: Arc<Filter>,
        rules: Vec<String>,
        max_exporters: usize,
        waiting: Waiting,
    ) -> Recorder {
        Recorder {
            store,
            log_socket,
            ledger: Ledger::new(max_exporters, Instant::now()),
            waiting,
            unwritten: VecDeque::new(),
            retry_at: None,
            store_error: None,
            failures: LogLimit::new(Level::Error, "store: failed writes"),
            rule_counts: filter::Counts::new(&filter),
            filter,
            rules,
            kernel_dropped: 0,
            forwarded: Forwarded::default(),
            written_bytes: 0,
        }
    }

    /// Records until every sender of messages is gone, and writes all that was received.
    pub fn run(mut self, inbox: &Receiver<Message>) {
        let mut last_tick = Instant::now();
        loop {
            let now = Instant::now();
            let tick_due = (last_tick + TICK_INTERVAL).saturating_duration_since(now);
            let retry_due = self.retry_at.map(|at| at.saturating_duration_since(now));
            let timeout = retry_due.map_or(tick_due, |due| due.min(tick_due));
            match inbox.recv_timeout(timeout) {
                Ok(message) => self.handle(message),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let now = Instant::now();
            if self.retry_at.is_some_and(|at| now >= at) {
                self.write_waiting();
            }
            if now - last_tick >= TICK_INTERVAL {
                last_tick = now;
                self.ledger.tick(now);
                self.failures.tick(now);
                self.store.tick(Timestamp::now());
            }
        }
        self.finish();
    }

    fn handle(&mut self, message: Message) {
        match message {
            // Nothing is to be written: its records were filtered, rejected or dropped.
            Message::Batch(batch) if batch.bytes.is_empty() => self.enter(batch, true),
            Message::Batch(batch) => {
                self.unwritten.push_back(batch);
                if self.retry_at.is_none() {
                    self.write_waiting();
                }
            }
            // The client may have gone.
            Message::Snapshot(reply) => drop(reply.send(self.snapshot())),
            Message::Reopen => {
                if let Err(error) = self.store.reopen() {
                    self.note_failure(&error);
                }
            }
            Message::Settings {
                store,
                filter,
                rules,
                max_exporters,
                reply,
            } => {
                let opened = store.map_or(Ok(()), |settings| self.replace_store(&settings));
                if opened.is_ok() {
                    if rules != self.rules {
                        self.rule_counts = filter::Counts::new(&filter);
                    }
                    (self.filter, self.rules) = (filter, rules);
                    self.ledger.set_max_exporters(max_exporters);
                }
                // The main thread may have given up.
                let _ = reply.send(opened);
            }
        }
    }

    /// Opens a store with other settings. If that fails, the present one is used further.
    fn replace_store(&mut self, settings: &store::Settings) -> Result<(), String> {
        if self.retry_at.is_none() {
            self.write_waiting();
        }
        let store = Store::open(settings, Timestamp::now()).map_err(|error| error.to_string())?;
        let socket = settings.log_socket.as_ref().map(LogSocket::start);
        self.log_socket = socket.transpose().map_err(|error| error.to_string())?;
        let former = std::mem::replace(&mut self.store, Box::new(store));
        if let Err(error) = former.close() {
            log::error!("store: {error}");
        }
        Ok(())
    }

    /// Writes the batches that wait, until one fails.
    fn write_waiting(&mut self) {
        self.retry_at = None;
        self.write_until_failure();
        let is_failing = self.retry_at.is_some();
        self.waiting.is_failing.store(is_failing, Ordering::Relaxed);
    }

    fn write_until_failure(&mut self) {
        while let Some(batch) = self.unwritten.pop_front() {
            let received = batch.received_s.map(|s| Timestamp::from_second(s.into()));
            let received = received
                .and_then(|time| time.ok())
                .unwrap_or_else(Timestamp::now);
            match self.store.append(&batch.bytes, received) {
                Ok(()) => {
                    if self.store_error.take().is_some() {
                        log::info!("store: writing works again");
                    }
                    if let Some(socket) = &self.log_socket {
                        socket.send(&batch.bytes);
                    }
                    self.written_bytes += batch.bytes.len() as u64;
                    self.enter(batch, true);
                }
                Err(error) => {
                    self.note_failure(&error);
                    self.unwritten.push_front(batch);
                    self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
                    return;
                }
            }
        }
    }

    fn note_failure(&mut self, error: &std::io::Error) {
        let text = error.to_string();
        self.failures
            .log(Instant::now(), || format!("store: {text}"));
        self.store_error = Some(text);
    }

    /// Counts what a batch brought. What rules did before a reload is not counted any more.
    fn enter(&mut self, batch: Batch, is_stored: bool) {
        self.ledger.enter(&batch.entries, is_stored, Instant::now());
        if Arc::ptr_eq(&self.filter, &batch.filter) {
            self.rule_counts += &batch.rule_counts;
        }
        self.kernel_dropped += batch.kernel_dropped;
        self.forwarded.sent += batch.forwarded.sent;
        self.forwarded.failed += batch.forwarded.failed;
        self.waiting.release(batch.bytes);
    }

    fn snapshot(&self) -> Snapshot {
        let (exporters, others) = self.ledger.accounts();
        Snapshot {
            total: self.ledger.total(),
            exporters: exporters.clone(),
            others: *others,
            taken: Instant::now(),
            kernel_dropped: self.kernel_dropped,
            forwarded: self.forwarded,
            waiting_records: self.unwritten.iter().map(Batch::records).sum(),
            waiting_bytes: self.unwritten.iter().map(|batch| batch.bytes.len()).sum(),
            store_error: self.store_error.clone(),
            written_bytes: self.written_bytes,
            log_socket: self.log_socket.as_ref().map(LogSocket::counts),
            rules: {
                let counts = self.rule_counts.rules(&self.filter);
                self.rules.iter().cloned().zip(counts).collect()
            },
            unmatched: self.rule_counts.unmatched(),
        }
    }

    fn finish(mut self) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        self.write_waiting();
        while !self.unwritten.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(100));
            self.write_waiting();
        }
        let lost: u64 = self.unwritten.iter().map(Batch::records).sum();
        if lost > 0 {
            log::error!("store: {lost} records could not be written before the stop, and are lost");
        }
        for batch in std::mem::take(&mut self.unwritten) {
            self.enter(batch, false);
        }
        let summary = self.snapshot().summary();
        if let Err(error) = self.store.close() {
            log::error!("store: {error}");
        }
        log::info!("{summary}");
    }
}
