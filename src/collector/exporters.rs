//! What is known of each exporter from one datagram to the next: templates, sampling intervals, the time of its start.
//!
//! All workers share it. A reader takes no lock: it loads the current state of an exporter, which is never changed but replaced. The state
//! is bounded in bytes, for each address and in all: what was not used for the longest time goes first, and exporters that
//! were heard only once go before those that are known.

mod saved;

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;

use super::decode::options::News;
use super::decode::sampling::{Sampling, Scope};
use super::decode::template::{Kind, Template};
use super::record::ExporterKey;

pub use saved::{RestoreError, Restored};

/// A writer copies the map of one shard, so that there are many and each is small.
const SHARDS: usize = 1024;
/// An exporter that was heard again after so long is known.
const KNOWN_AFTER_US: u64 = 1_000_000;

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the state of all exporters with one address.
    pub exporter_bytes: usize,
    /// Bytes of the state of all exporters.
    pub total_bytes: usize,
    /// Seconds after its last use that a template or the state of an exporter is kept.
    pub lifetime_s: u64,
    /// Exporters' processes whose sequence numbers each worker follows.
    pub sequences: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            exporter_bytes: 512 << 10,
            total_bytes: 32 << 20,
            lifetime_s: 86_400,
            sequences: 16_384,
        }
    }
}

/// The state of one exporter: immutable, but for the times of use.
#[derive(Debug)]
pub struct Exporter {
    /// Sorted by id.
    templates: Vec<Arc<Template>>,
    sampling: Sampling,
    system_init_ms: u64,
    /// Memory in use, in bytes.
    bytes: usize,
    /// When it was first heard, UNIX microseconds.
    first_us: u64,
    used_us: AtomicU64,
}

/// A change to the state of an exporter.
#[derive(Debug)]
pub enum Change {
    /// A template is new, or has another layout.
    Learn(Template),
    /// A template is withdrawn.
    Withdraw(u16),
    /// All templates of a kind are withdrawn.
    WithdrawAll(Kind),
    /// An options record.
    News(News),
}

impl Exporter {
    fn new(now_us: u64) -> Exporter {
        Exporter {
            templates: Vec::new(),
            sampling: Sampling::default(),
            system_init_ms: 0,
            bytes: 0,
            first_us: now_us,
            used_us: AtomicU64::new(now_us),
        }
    }

    /// A copy, to be changed.
    fn copy(&self) -> Exporter {
        Exporter {
            templates: self.templates.clone(),
            sampling: self.sampling.clone(),
            used_us: AtomicU64::new(self.used_us()),
            ..*self
        }
    }

    fn position(&self, id: u16) -> Result<usize, usize> {
        self.templates
            .binary_search_by_key(&id, |template| template.id)
    }

    /// A template.
    pub fn template(&self, id: u16) -> Option<&Template> {
        self.position(id).ok().map(|at| &*self.templates[at])
    }

    /// The sampling intervals.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// When the exporter started, UNIX milliseconds; 0 if unknown.
    pub fn system_init_ms(&self) -> u64 {
        self.system_init_ms
    }

    /// Whether an options record tells nothing new.
    pub fn knows(&self, news: &News) -> bool {
        match *news {
            News::Interval(scope, interval) => self.sampling.get(scope) == Some(interval),
            News::SystemInit(ms) => self.system_init_ms == ms,
        }
    }

    /// Notes that a datagram came.
    pub fn touch(&self, now_us: u64) {
        self.used_us.store(now_us, Ordering::Relaxed);
    }

    fn used_us(&self) -> u64 {
        self.used_us.load(Ordering::Relaxed)
    }

    fn is_empty(&self) -> bool {
        self.templates.is_empty() && self.sampling.is_empty() && self.system_init_ms == 0
    }

    fn apply(&mut self, change: Change, limits: &Limits) {
        match change {
            Change::Learn(template) => match self.position(template.id) {
                Ok(at) => self.templates[at] = Arc::new(template),
                Err(at) => self.templates.insert(at, Arc::new(template)),
            },
            Change::Withdraw(id) => self.templates.retain(|template| template.id != id),
            Change::WithdrawAll(kind) => self.templates.retain(|template| template.kind() != kind),
            Change::News(News::Interval(scope, interval)) => {
                // Templates need most of the bytes, and every change copies all intervals.
                let most = limits.exporter_bytes / 16 / size_of::<(Scope, u32)>();
                if self.sampling.len() < most || self.sampling.get(scope).is_some() {
                    self.sampling.set(scope, interval);
                }
            }
            Change::News(News::SystemInit(ms)) => self.system_init_ms = ms,
        }
    }

    /// Counts the bytes anew, after a change.
    fn measure(&mut self) {
        // An entry of the map, with the room that maps leave free, and two allocations.
        const ENTRY: usize = 2 * size_of::<(ExporterKey, Arc<Exporter>)>() + 32;
        self.templates.shrink_to_fit();
        self.sampling.shrink_to_fit();
        let templates: usize = self.templates.iter().map(|template| template.bytes()).sum();
        self.bytes = ENTRY
            + size_of::<Exporter>()
            + self.templates.len() * size_of::<Arc<Template>>()
            + templates
            + self.sampling.heap_bytes();
    }
}

type Map = HashMap<ExporterKey, Arc<Exporter>>;

#[derive(Default)]
struct Shard {
    map: ArcSwapOption<Map>,
    /// Bytes of all exporters in the map. Held while the map is replaced; readers do not look at it.
    writer: Mutex<usize>,
}

impl Shard {
    /// Every exporter.
    fn all(&self) -> Vec<(ExporterKey, Arc<Exporter>)> {
        let map = self.map.load();
        let all = map.iter().flat_map(|map| map.iter());
        all.map(|(key, exporter)| (*key, exporter.clone()))
            .collect()
    }
}

/// What is known of an exporter, for listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Who it is.
    pub key: ExporterKey,
    /// Number of templates.
    pub templates: usize,
    /// Number of sampling intervals.
    pub intervals: usize,
    /// The sampling interval of flows that no other applies to; 0 if unknown.
    pub sampling_interval: u32,
    /// Memory in use, in bytes.
    pub bytes: usize,
    /// When it was last heard, UNIX microseconds.
    pub used_us: u64,
}

/// What is known of all exporters; shared by all workers.
pub struct Exporters {
    limits: Limits,
    shards: Box<[Shard]>,
    hasher: RandomState,
    bytes: AtomicUsize,
    /// The shard that has to give way next when its neighbours need room.
    next_victim: AtomicUsize,
}

impl Exporters {
    /// Nothing is known yet.
    pub fn new(limits: Limits) -> Exporters {
        Exporters {
            limits,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            hasher: RandomState::new(),
            bytes: AtomicUsize::new(0),
            next_victim: AtomicUsize::new(0),
        }
    }

    /// How much is kept.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Memory in use for all exporters, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// All of an address are in one shard; nobody can aim at a shard.
    fn shard(&self, address: IpAddr) -> usize {
        self.hasher.hash_one(address) as usize % SHARDS
    }

    /// The current state of an exporter.
    pub fn get(&self, key: &ExporterKey) -> Option<Arc<Exporter>> {
        let map = self.shards[self.shard(key.address)].map.load();
        map.as_ref()?.get(key).cloned()
    }

    /// Changes the state of an exporter. Returns the new state, `None` if nothing is left of it.
    pub fn change(
        &self,
        key: &ExporterKey,
        changes: impl IntoIterator<Item = Change>,
        now_us: u64,
    ) -> Option<Arc<Exporter>> {
        self.change_since(key, changes, now_us, now_us)
    }

    /// As [`Exporters::change`], for an exporter that was first heard at `first_us`, if it is not known.
    fn change_since(
        &self,
        key: &ExporterKey,
        changes: impl IntoIterator<Item = Change>,
        first_us: u64,
        now_us: u64,
    ) -> Option<Arc<Exporter>> {
        let index = self.shard(key.address);
        let new = self.replace(index, |map| {
            let known = map.remove(key);
            let mut exporter = known.map_or_else(|| Exporter::new(first_us), |known| known.copy());
            for change in changes {
                exporter.apply(change, &self.limits);
            }
            exporter.touch(now_us);
            if !exporter.is_empty() {
                exporter.measure();
                map.insert(*key, Arc::new(exporter));
                self.bound_address(map, key);
            }
            map.get(key).cloned()
        });
        self.bound_total(index, key);
        new
    }

    /// Replaces the map of a shard by one that `change` makes of it.
    fn replace<T>(&self, index: usize, change: impl FnOnce(&mut Map) -> T) -> T {
        let shard = &self.shards[index];
        let mut before = shard.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let map = shard.map.load_full();
        let mut map = map.map_or_else(Map::default, |map| Map::clone(&map));
        let result = change(&mut map);
        let after = map.values().map(|exporter| exporter.bytes).sum();
        shard.map.store((!map.is_empty()).then(|| Arc::new(map)));
        self.bytes.fetch_add(after, Ordering::Relaxed);
        self.bytes.fetch_sub(*before, Ordering::Relaxed);
        *before = after;
        result
    }

    /// Forgets templates of an address, those first that were not used for the longest time, until its limit is kept; those of
    /// `changed` last.
    fn bound_address(&self, map: &mut Map, changed: &ExporterKey) {
        let address = changed.address;
        loop {
            let mut bytes = 0;
            let mut oldest: Option<((u64, bool), ExporterKey, Option<u16>)> = None;
            for (key, exporter) in map.iter().filter(|(key, _)| key.address == address) {
                bytes += exporter.bytes;
                let mut candidate = |used_us, id| {
                    let age = (used_us, key == changed);
                    if oldest.is_none_or(|(other, ..)| age < other) {
                        oldest = Some((age, *key, id));
                    }
                };
                if exporter.templates.is_empty() {
                    candidate(exporter.used_us(), None);
                }
                for template in &exporter.templates {
                    candidate(template.used_us(), Some(template.id));
                }
            }
            let Some((_, key, id)) = oldest.filter(|_| bytes > self.limits.exporter_bytes) else {
                return;
            };
            if let (Some(id), Some(exporter)) = (id, map.remove(&key)) {
                let mut exporter = exporter.copy();
                exporter.apply(Change::Withdraw(id), &self.limits);
                if !exporter.is_empty() {
                    exporter.measure();
                    map.insert(key, Arc::new(exporter));
                }
            }
        }
    }

    /// Forgets exporters until the limit of all is kept: of the shard that has grown, or of the next one that has any others.
    fn bound_total(&self, grown: usize, keep: &ExporterKey) {
        let mut index = grown;
        // Every shard is asked once at most: then other workers make room, too.
        for _ in 0..=SHARDS {
            if self.bytes() > self.limits.total_bytes {
                self.replace(index, |map| {
                    let mut excess = self.bytes().saturating_sub(self.limits.total_bytes);
                    let mut others: Vec<_> = map
                        .iter()
                        .filter(|(key, _)| *key != keep)
                        .map(|(key, exporter)| {
                            let used_us = exporter.used_us();
                            // Those that were heard only once are the first to go.
                            let known = used_us.saturating_sub(exporter.first_us) >= KNOWN_AFTER_US;
                            (known, used_us, *key, exporter.bytes)
                        })
                        .collect();
                    others.sort_unstable();
                    // A few more than need be, so that the map is not copied again for the next one.
                    excess += others.iter().map(|(.., bytes)| bytes).sum::<usize>() / 8;
                    for (.., key, bytes) in others {
                        if excess == 0 {
                            break;
                        }
                        map.remove(&key);
                        excess = excess.saturating_sub(bytes);
                    }
                });
            }
            if self.bytes() <= self.limits.total_bytes {
                return;
            }
            index = self.next_victim.fetch_add(1, Ordering::Relaxed) % SHARDS;
        }
    }

    /// Forgets templates and exporters that were not used within their lifetime; to be called about once a minute.
    pub fn expire(&self, now_s: u64) {
        let oldest_us = now_s
            .saturating_sub(self.limits.lifetime_s)
            .saturating_mul(1_000_000);
        for (index, shard) in self.shards.iter().enumerate() {
            let is_old = |template: &Template| template.used_us() < oldest_us;
            let has_old = |exporter: &Arc<Exporter>| {
                exporter.used_us() < oldest_us
                    || exporter.templates.iter().any(|template| is_old(template))
            };
            if !shard.all().iter().any(|(_, exporter)| has_old(exporter)) {
                continue;
            }
            self.replace(index, |map| {
                map.retain(|_, exporter| {
                    if exporter.used_us() < oldest_us {
                        return false;
                    }
                    if has_old(exporter) {
                        let mut changed = exporter.copy();
                        changed.templates.retain(|template| !is_old(template));
                        changed.measure();
                        *exporter = Arc::new(changed);
                    }
                    !exporter.is_empty()
                });
            });
        }
    }

    /// Every exporter of which something is kept, sorted.
    pub fn templates(&self) -> Vec<Known> {
        let mut all = Vec::new();
        for shard in &self.shards {
            all.extend(shard.all().into_iter().map(|(key, exporter)| Known {
                key,
                templates: exporter.templates.len(),
                intervals: exporter.sampling.len(),
                sampling_interval: exporter.sampling.default_interval(),
                bytes: exporter.bytes,
                used_us: exporter.used_us(),
            }));
        }
        all.sort_unstable_by_key(|known| known.key);
        all
    }
}
