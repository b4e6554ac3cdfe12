//! The accounts: what became of every record, in all and by exporter. No I/O; the time is an argument.
//!
//! A record is counted when its fate is known: stored, filtered or rejected. All of these numbers change together, so that
//! received = stored + filtered + rejected whenever they are read.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::collector::decode::Rejection;
use crate::collector::record::ExporterKey;
use crate::metrics::{Outcome, outcomes};

/// The time that a rate is averaged over.
const RATE_PERIOD: Duration = Duration::from_secs(60);
/// How large a part of the exporters is forgotten when there are too many: one in this many.
const EVICTED_PART: usize = 10;

outcomes! {
    /// Why records were rejected for other reasons than their content.
    pub enum Refusal {
        /// The sender is not among the allowed sources.
        Source = "rejected_source": "rejected: {datagram|datagrams} from addresses outside sources",
        /// The datagram is longer than any that can be received.
        TooLong = "rejected_too_long": "rejected: {datagram|datagrams} that {was|were} truncated",
        /// Writing fails, and no more records may wait.
        StoreFull = "rejected_store_full": "rejected: {record|records} while the store could not be written",
    }
}

/// Numbers of datagrams and records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Datagrams that arrived.
    pub datagrams: u64,
    /// Records that arrived; a datagram or a set that cannot be read counts as one.
    pub received: u64,
    /// Records that were written.
    pub stored: u64,
    /// Records that a rule of the filter discarded.
    pub filtered: u64,
    /// Records rejected for their content, in the order of [`Rejection`].
    pub rejected: [u64; Rejection::ALL.len()],
    /// Records rejected for other reasons, in the order of [`Refusal`].
    pub refused: [u64; Refusal::ALL.len()],
    /// Records that never arrived, by the gaps in the sequence numbers.
    pub lost: u64,
}

impl Counts {
    /// Adds other numbers.
    pub fn add(&mut self, other: &Counts) {
        self.datagrams += other.datagrams;
        self.received += other.received;
        self.stored += other.stored;
        self.filtered += other.filtered;
        for (sum, count) in self.rejected.iter_mut().zip(other.rejected) {
            *sum += count;
        }
        for (sum, count) in self.refused.iter_mut().zip(other.refused) {
            *sum += count;
        }
        self.lost += other.lost;
    }

    /// Counts records that were rejected for their content.
    pub fn reject(&mut self, reason: Rejection, records: u64) {
        self.received += records;
        self.rejected[reason.index()] += records;
    }

    /// Counts records that were rejected for another reason than their content.
    pub fn refuse(&mut self, refusal: Refusal, records: u64) {
        self.received += records;
        self.refused[refusal.index()] += records;
    }

    /// Records rejected for any reason.
    pub fn rejected_total(&self) -> u64 {
        self.rejections().map(|(_, _, count)| count).sum()
    }

    /// Every reason, with the template of its text and its number of records.
    pub fn rejections(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let content = Rejection::ALL
            .iter()
            .map(|&reason| (reason.word(), reason.text(), self.rejected[reason.index()]));
        let refused = Refusal::ALL
            .iter()
            .map(|&reason| (reason.word(), reason.text(), self.refused[reason.index()]));
        content.chain(refused)
    }
}

/// What a batch of datagrams of one exporter brought.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Entry {
    /// The numbers. Records that are to be written stand in `accepted`, not in `received` and `stored`.
    pub counts: Counts,
    /// Records that are to be written.
    pub accepted: u64,
    /// The exporter's clock minus that of this host, in milliseconds.
    pub clock_offset_ms: Option<i64>,
}

impl Entry {
    /// Adds what later datagrams of the exporter brought.
    pub fn add(&mut self, later: &Entry) {
        self.counts.add(&later.counts);
        self.accepted += later.accepted;
        self.clock_offset_ms = later.clock_offset_ms.or(self.clock_offset_ms);
    }

    /// Counts the accepted records as rejected because the store is full.
    pub fn drop_accepted(&mut self) {
        let dropped = std::mem::take(&mut self.accepted);
        self.counts.refuse(Refusal::StoreFull, dropped);
    }

    /// Counts the accepted records as stored, or as rejected because the store is full.
    fn settle(mut self, is_stored: bool) -> Counts {
        match is_stored {
            true => {
                self.counts.received += self.accepted;
                self.counts.stored += self.accepted;
            }
            false => self.counts.refuse(Refusal::StoreFull, self.accepted),
        }
        self.counts
    }
}

/// The account of one exporter.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// Its numbers.
    pub counts: Counts,
    /// Records per second, over about a minute.
    pub rate: f64,
    /// Its clock minus that of this host, in milliseconds, when that was last known.
    pub clock_offset_ms: Option<i64>,
    /// When its last datagram arrived.
    pub last_seen: Instant,
    /// Received records when the rate was last computed.
    counted: u64,
}

/// All accounts. The thread that writes the store owns them.
pub struct Ledger {
    exporters: HashMap<ExporterKey, Account>,
    /// Datagrams of unknown protocols, and exporters that were forgotten.
    others: Counts,
    max_exporters: usize,
    last_tick: Instant,
}

impl Ledger {
    /// Empty accounts of at most `max_exporters` exporters; more are counted together.
    pub fn new(max_exporters: usize, now: Instant) -> Ledger {
        Ledger {
            exporters: HashMap::new(),
            others: Counts::default(),
            max_exporters,
            last_tick: now,
        }
    }

    /// Changes the limit.
    pub fn set_max_exporters(&mut self, max_exporters: usize) {
        self.max_exporters = max_exporters;
    }

    /// Enters what a batch brought, once its records are written (`is_stored`) or dropped.
    pub fn enter(
        &mut self,
        entries: &[(Option<ExporterKey>, Entry)],
        is_stored: bool,
        now: Instant,
    ) {
        for (key, entry) in entries {
            let counts = entry.settle(is_stored);
            let is_full = self.exporters.len() >= self.max_exporters;
            let known = |key: &ExporterKey| !is_full || self.exporters.contains_key(key);
            let Some(key) = key.filter(known) else {
                self.others.add(&counts);
                continue;
            };
            let account = self.exporters.entry(key).or_insert_with(|| Account {
                counts: Counts::default(),
                rate: 0.0,
                clock_offset_ms: None,
                last_seen: now,
                counted: 0,
            });
            account.counts.add(&counts);
            account.clock_offset_ms = entry.clock_offset_ms.or(account.clock_offset_ms);
            account.last_seen = now;
        }
    }

    /// Computes the rates, and forgets exporters if there are too many: those that sent nothing for longest. Call about
    /// once a second.
    pub fn tick(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.last_tick).as_secs_f64();
        if elapsed < 0.5 {
            return;
        }
        self.last_tick = now;
        let weight = 1.0 - (-elapsed / RATE_PERIOD.as_secs_f64()).exp();
        for account in self.exporters.values_mut() {
            let records = account.counts.received - account.counted;
            account.counted = account.counts.received;
            account.rate += weight * (records as f64 / elapsed - account.rate);
        }
        if self.exporters.len() >= self.max_exporters {
            let mut oldest: Vec<(Instant, ExporterKey)> = self
                .exporters
                .iter()
                .map(|(key, account)| (account.last_seen, *key))
                .collect();
            oldest.sort_unstable();
            let kept = self.max_exporters - self.max_exporters / EVICTED_PART;
            let evicted = oldest.len().saturating_sub(kept);
            for (_, key) in &oldest[..evicted] {
                if let Some(account) = self.exporters.remove(key) {
                    self.others.add(&account.counts);
                }
            }
        }
    }

    /// The accounts by exporter, and of all others together.
    pub fn accounts(&self) -> (&HashMap<ExporterKey, Account>, &Counts) {
        (&self.exporters, &self.others)
    }

    /// The numbers of all exporters together.
    pub fn total(&self) -> Counts {
        let mut total = self.others;
        let accounts = self.exporters.values();
        accounts.for_each(|account| total.add(&account.counts));
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> ExporterKey {
        ExporterKey {
            address: std::net::Ipv4Addr::from(n).into(),
            version: 9,
            domain: 0,
        }
    }

    fn assert_balanced(counts: &Counts) {
        let fates = counts.stored + counts.filtered + counts.rejected_total();
        assert_eq!(counts.received, fates, "{counts:?}");
    }

    #[test]
    fn received_is_stored_plus_filtered_plus_rejected_whatever_happens() {
        let start = Instant::now();
        let mut ledger = Ledger::new(20, start);
        for n in 0..1000_u32 {
            let mut entry = Entry {
                accepted: u64::from(n % 7),
                ..Entry::default()
            };
            entry.counts.received = 3;
            entry.counts.filtered = 3;
            entry.counts.refuse(Refusal::Source, 2);
            let exporter = (n % 5 != 0).then(|| key(n));
            ledger.enter(&[(exporter, entry)], n % 3 == 0, start);
            ledger.tick(start + Duration::from_secs(u64::from(n)));
            assert_balanced(&ledger.total());
        }
        let (exporters, others) = ledger.accounts();
        assert!(exporters.len() <= 20);
        exporters
            .values()
            .for_each(|account| assert_balanced(&account.counts));
        assert_balanced(others);
        let accepted: u64 = (0..1000).map(|n| n % 7).sum();
        assert_eq!(ledger.total().received, 1000 * 5 + accepted);
    }

    #[test]
    fn an_exporter_that_sends_is_kept_and_the_silent_are_forgotten() {
        let start = Instant::now();
        let mut ledger = Ledger::new(10, start);
        let entry = Entry {
            accepted: 1,
            ..Entry::default()
        };
        for second in 1..100 {
            let now = start + Duration::from_secs(second);
            ledger.enter(&[(Some(key(1_000_000)), entry)], true, now);
            ledger.enter(&[(Some(key(second as u32)), entry)], true, now);
            ledger.tick(now);
        }
        let account = ledger.accounts().0[&key(1_000_000)];
        assert_eq!(account.counts.stored, 99);
        assert!((0.7..1.0).contains(&account.rate), "{}", account.rate);
        assert_eq!(ledger.total().stored, 198);
    }
}
