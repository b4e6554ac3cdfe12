//! A worker: receives datagrams, decodes and filters them, and encodes the records that are to be stored.
//!
//! One thread with its own sockets and no lock. It sends what it has encoded in batches to the recorder.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Sender;
use ipnet::IpNet;
use log::Level;

use crate::collector::accounts::{Entry, Refusal};
use crate::collector::decode::Decoder;
use crate::collector::filter::Filter;
use crate::collector::forward::Forwarder;
use crate::collector::receive::{Socket, descriptor_name};
use crate::collector::record::{ExporterKey, FlowRecord};
use crate::collector::recorder::{Batch, Message, Waiting};
use crate::collector::store::fields::Fields;
use crate::collector::store::segment;
use crate::error::{Context, Result};
use crate::logging::LogLimit;
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;
use crate::sys::udp_receiver::{Datagram, ReceiveBuffer};
use crate::sys::waiter::Waiter;

/// The longest datagram of UDP, in bytes.
const MAX_DATAGRAM_SIZE: usize = 65_535;
/// How long datagrams gather in the socket before they are read, unless many arrive: one system call then reads them all.
/// A socket with a large receive buffer has room for those of a longer time.
const GATHER_TIME: Duration = Duration::from_millis(1);
const MAX_GATHER_TIME: Duration = Duration::from_millis(5);
const RECEIVE_BUFFER_PER_MILLISECOND: usize = 4 << 20;
/// From this many datagrams on, the next system call follows without waiting.
const MANY_DATAGRAMS: usize = 48;
/// System calls per socket before other work gets its turn.
const MAX_CALLS_PER_TURN: usize = 16;
/// A batch is sent at this size in bytes, or this long after its first datagram.
const BATCH_SIZE: usize = 256 << 10;
const BATCH_TIME: Duration = Duration::from_millis(50);
/// How often the kernel's count of dropped datagrams is read, and entries are sent although the store is full.
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a stop keeps reading while datagrams keep arriving.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// What a worker does with datagrams; a reload replaces it.
pub struct Rules {
    /// Networks that datagrams are accepted from; everybody's if `None`.
    pub sources: Option<Vec<IpNet>>,
    /// The filter.
    pub filter: Arc<Filter>,
    /// The fields that are stored.
    pub fields: Fields,
}

/// A worker that is ready to run.
pub struct Worker {
    /// Its number, from 0.
    pub number: usize,
    /// Its sockets.
    pub sockets: Vec<Socket>,
    /// Its decoder, with what it knows of its exporters.
    pub decoder: Decoder,
    /// What it does with datagrams.
    pub rules: Rules,
    /// Sends datagrams on.
    pub forwarder: Forwarder,
    /// To the recorder.
    pub recorder: Sender<Message>,
    /// The bytes that wait for the recorder.
    pub waiting: Waiting,
    /// Whether a successor takes over the sockets.
    pub handover: Handover,
    /// Where the worker leaves what its successor in this process goes on with.
    pub carried: Sender<Carried>,
    /// Counts up about once a second.
    pub beats: Arc<AtomicUsize>,
    /// Counts up with every change of a template.
    pub template_changes: Arc<AtomicUsize>,
}

/// What survives a reload.
pub struct Carried {
    /// The sockets, with the datagrams that wait in them.
    pub sockets: Vec<Socket>,
    /// The decoder.
    pub decoder: Decoder,
    /// The sockets of `forward`, which may need privileges that the collector has dropped.
    pub forwarder: Forwarder,
}

impl Worker {
    /// Receives until `stop` is set. What was received is then on its way to the recorder.
    pub fn run(self, stop: Stop) -> Result<()> {
        let Worker {
            number,
            mut sockets,
            decoder,
            rules,
            forwarder,
            recorder,
            waiting,
            handover,
            carried,
            beats,
            template_changes,
        } = self;
        let mut waiter = Waiter::new().context(poll_loop)?;
        waiter.watch(&stop).context(poll_loop)?;
        for socket in &sockets {
            waiter.watch(&socket.receiver).context(poll_loop)?;
        }
        let mut processor = Processor {
            decoder,
            batch: Batch::new(&rules.filter, Vec::new()),
            rules,
            forwarder,
            records: Vec::new(),
            index: HashMap::new(),
            last: None,
            since: None,
            recorder,
            waiting,
            last_sent: Instant::now(),
            template_changes,
            rejected_log: LogLimit::new(Level::Warn, "rejected flow records"),
            full_log: LogLimit::new(Level::Error, "batches of records that were dropped"),
        };
        let mut dropped_log = LogLimit::new(Level::Warn, "dropped datagrams");
        let mut buffer = ReceiveBuffer::new(MAX_DATAGRAM_SIZE);
        let (mut received_any, mut is_busy, mut last_tick) = (true, true, Instant::now());
        let gather_time = gather_time(&sockets);
        let mut stop_seen: Option<Instant> = None;
        loop {
            // After datagrams more are expected: they gather, and are then looked for without waiting.
            let timeout = match (received_any, processor.since) {
                (true, _) => None,
                (false, Some(since)) => Some(BATCH_TIME.saturating_sub(since.elapsed())),
                (false, None) => Some(TICK_INTERVAL),
            };
            if let Some(timeout) = timeout {
                waiter.wait(Some(timeout)).context(poll_loop)?;
            }
            if !is_busy && !stop.is_set() {
                thread::sleep(gather_time);
            }
            (received_any, is_busy) = (false, false);
            let received_at = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            let received_at = (
                received_at.as_secs().try_into().unwrap_or(u32::MAX),
                received_at.subsec_micros(),
            );
            for Socket { listen, receiver } in &sockets {
                let mut received = 0;
                for _ in 0..MAX_CALLS_PER_TURN {
                    received = receiver
                        .receive(&mut buffer, |datagram| {
                            processor.handle(&datagram, received_at);
                        })
                        .context(|| format!("UDP {}", listen.address))?;
                    // The waiter reports new datagrams only: before the next wait, the socket is read until it is empty.
                    received_any |= received > 0;
                    if received < MANY_DATAGRAMS {
                        break;
                    }
                }
                is_busy |= received >= MANY_DATAGRAMS;
            }
            let now = Instant::now();
            let mut is_done = false;
            if stop.is_set() {
                let since = *stop_seen.get_or_insert(now);
                is_done = !received_any || handover.is_begun() || now - since >= DRAIN_TIMEOUT;
            }
            if is_done || now - last_tick >= TICK_INTERVAL {
                last_tick = now;
                beats.fetch_add(1, Ordering::Relaxed);
                for socket in &mut sockets {
                    let dropped = u64::from(socket.receiver.take_dropped());
                    processor.batch.kernel_dropped += dropped;
                    if dropped > 0 {
                        let address = socket.listen.address;
                        dropped_log.log(now, || {
                            format!("UDP {address}: the kernel dropped {dropped} datagrams: the receive buffer was full")
                        });
                    }
                }
                dropped_log.tick(now);
                processor.rejected_log.tick(now);
                processor.full_log.tick(now);
                processor.forwarder.tick(now);
                processor.send(is_done);
            } else if processor
                .since
                .is_some_and(|since| now - since >= BATCH_TIME)
            {
                processor.send(false);
            }
            if is_done {
                break;
            }
        }
        processor.rejected_log.flush();
        for socket in &sockets {
            let name = descriptor_name(number, socket.listen.address);
            handover.leave(&name, socket.receiver.as_fd());
        }
        // Nobody receives it on a stop.
        let _ = carried.send(Carried {
            sockets,
            decoder: processor.decoder,
            forwarder: processor.forwarder,
        });
        Ok(())
    }
}

/// By the smallest receive buffer.
fn gather_time(sockets: &[Socket]) -> Duration {
    let sizes = sockets
        .iter()
        .map(|s| s.receiver.receive_buffer_size().unwrap_or_default());
    let milliseconds = sizes.min().unwrap_or_default() / RECEIVE_BUFFER_PER_MILLISECOND;
    Duration::from_millis(milliseconds as u64).clamp(GATHER_TIME, MAX_GATHER_TIME)
}

fn poll_loop() -> String {
    "poll loop of a worker".to_owned()
}

/// Turns datagrams into a batch.
struct Processor {
    decoder: Decoder,
    rules: Rules,
    forwarder: Forwarder,
    /// The records of one datagram.
    records: Vec<FlowRecord>,
    batch: Batch,
    /// Where the entry of an exporter stands in the batch.
    index: HashMap<Option<ExporterKey>, usize>,
    /// The exporter of the last datagram, and where its entry stands.
    last: Option<(Option<ExporterKey>, usize)>,
    /// When the first datagram of the batch arrived.
    since: Option<Instant>,
    recorder: Sender<Message>,
    waiting: Waiting,
    last_sent: Instant,
    template_changes: Arc<AtomicUsize>,
    rejected_log: LogLimit,
    full_log: LogLimit,
}

impl Processor {
    fn handle(&mut self, datagram: &Datagram<'_>, received_at: (u32, u32)) {
        let mut entry = Entry::default();
        entry.counts.datagrams = 1;
        let exporter = self.process(datagram, received_at, &mut entry);
        self.since.get_or_insert_with(Instant::now);
        self.batch.received_s.get_or_insert(received_at.0);
        let at = match self.last {
            Some((last, at)) if last == exporter => at,
            _ => {
                let entries = &mut self.batch.entries;
                let at = *self.index.entry(exporter).or_insert_with(|| {
                    entries.push((exporter, Entry::default()));
                    entries.len() - 1
                });
                self.last = Some((exporter, at));
                at
            }
        };
        self.batch.entries[at].1.add(&entry);
        // A datagram may have 65,000 records.
        self.send_if_large();
    }

    /// Fills in what a datagram brought. Returns its exporter, if it can be told.
    fn process(
        &mut self,
        datagram: &Datagram<'_>,
        received_at: (u32, u32),
        entry: &mut Entry,
    ) -> Option<ExporterKey> {
        let Some(from) = datagram.from() else {
            entry.counts.refuse(Refusal::Source, 1);
            return None;
        };
        if !self.is_allowed(from.ip()) {
            entry.counts.refuse(Refusal::Source, 1);
            self.log_rejected(from, || "the sender is not in sources".to_owned());
            return None;
        }
        if datagram.truncated {
            entry.counts.refuse(Refusal::TooLong, 1);
            self.log_rejected(from, || "the datagram was truncated".to_owned());
            return None;
        }
        let forwarded = self.forwarder.send(datagram.bytes, from);
        self.batch.forwarded.sent += forwarded.sent;
        self.batch.forwarded.failed += forwarded.failed;

        self.records.clear();
        let decoded = self
            .decoder
            .decode(datagram.bytes, from, received_at, &mut self.records);
        let exporter = decoded.exporter;
        if decoded.templates_changed {
            self.template_changes.fetch_add(1, Ordering::Relaxed);
        }
        for (reason, records) in decoded.rejected.iter() {
            entry.counts.reject(reason, records.into());
        }
        entry.counts.lost = decoded.lost_records;
        entry.clock_offset_ms = decoded.clock_offset_ms;
        if let Some(problem) = decoded.problem {
            self.log_rejected(from, || match exporter {
                Some(exporter) => format!("domain {}: {problem}", exporter.domain),
                None => problem.to_string(),
            });
        }
        for record in &mut self.records {
            let verdict = self
                .rules
                .filter
                .evaluate(record, &mut self.batch.rule_counts);
            if verdict.accept {
                record.rule_tag = verdict.tag;
                segment::encode(record, self.rules.fields, &mut self.batch.bytes);
                entry.accepted += 1;
            } else {
                entry.counts.received += 1;
                entry.counts.filtered += 1;
            }
        }
        exporter
    }

    fn is_allowed(&self, address: IpAddr) -> bool {
        let sources = self.rules.sources.as_ref();
        sources.is_none_or(|networks| networks.iter().any(|n| n.contains(&address)))
    }

    fn log_rejected(&mut self, from: SocketAddr, reason: impl FnOnce() -> String) {
        self.rejected_log
            .log(Instant::now(), || format!("rejected: {from}: {}", reason()));
    }

    fn send_if_large(&mut self) {
        if self.batch.bytes.len() >= BATCH_SIZE {
            self.send(false);
        }
    }

    /// Sends the batch to the recorder. While the store is full, its records are dropped, and its entries are sent once in
    /// a while only, unless `now_or_never`.
    fn send(&mut self, now_or_never: bool) {
        self.since = None;
        if !self.waiting.reserve(self.batch.bytes.len()) {
            self.batch.drop_records();
            self.full_log.log(Instant::now(), || {
                "the store cannot be written and limits.maxWaiting is reached: records are dropped"
                    .to_owned()
            });
            if !now_or_never && self.last_sent.elapsed() < TICK_INTERVAL {
                return;
            }
        }
        if self.batch.is_empty() {
            return;
        }
        self.last_sent = Instant::now();
        self.index.clear();
        self.last = None;
        let next = Batch::new(&self.rules.filter, self.waiting.empty_buffer());
        let batch = std::mem::replace(&mut self.batch, next);
        // The recorder ends after the workers.
        let _ = self.recorder.send(Message::Batch(batch));
    }
}
