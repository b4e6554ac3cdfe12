//! Fetches the registry from its URL, caches it in `workDir`, and shares it among the threads.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use nix::libc;
use serde::{Deserialize, Serialize};

use super::Registry;
use super::document::{MAX_DOCUMENT_SIZE, TOO_LARGE};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::directory::Directory;
use crate::sys::http_client::{Agent, agent};

/// The file in `workDir` with the cached registry.
const CACHE_FILE: &str = "registry.json";
/// How often the registry is fetched.
const UPDATE_INTERVAL: Duration = Duration::from_secs(24 * 3600);
/// How soon a failed fetch is retried; the interval doubles with each failure, up to [`UPDATE_INTERVAL`].
const RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// How long a fetch may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);

/// Where the SciTags registry comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// `url`: http, https or file; empty for the built-in registry.
    pub url: String,
    /// `workDir`: the directory of the cache.
    pub cache_dir: PathBuf,
}

outcomes! {
    /// The outcome of an update.
    pub enum Update {
        /// The registry has changed.
        Updated = "updated": "{update|updates} with changes",
        /// The registry has not changed.
        Unchanged = "unchanged": "{update|updates} without changes",
        /// The registry could not be fetched, or is not valid.
        Failed = "failed": "{update|updates} failed",
    }
}

/// The registry in use, which an update can replace at any time.
#[derive(Clone)]
pub struct SharedRegistry(Arc<ArcSwap<Registry>>);

impl SharedRegistry {
    /// Shares `registry` until an update replaces it.
    pub fn new(registry: Registry) -> SharedRegistry {
        SharedRegistry(Arc::new(ArcSwap::from_pointee(registry)))
    }

    /// The registry in use now. Never blocks.
    pub fn load(&self) -> Arc<Registry> {
        self.0.load_full()
    }

    fn store(&self, registry: Registry) {
        self.0.store(Arc::new(registry));
    }
}

/// The content of [`CACHE_FILE`].
#[derive(Serialize, Deserialize)]
struct Cached {
    url: String,
    etag: Option<String>,
    registry: serde_json::Value,
}

impl Cached {
    fn load(settings: &Settings) -> Option<(Registry, Option<String>)> {
        let path = settings.cache_dir.join(CACHE_FILE);
        let cached = read_at_most(&path, 2 * MAX_DOCUMENT_SIZE).ok()?;
        let cached: Cached = serde_json::from_slice(&cached).ok()?;
        let registry = Registry::from_json(cached.registry.to_string().as_bytes()).ok()?;
        (cached.url == settings.url).then_some((registry, cached.etag))
    }

    fn store(settings: &Settings, etag: Option<String>, registry: &Registry) -> io::Result<()> {
        let cached = Cached {
            url: settings.url.clone(),
            etag,
            registry: registry.to_json(),
        };
        let directory = Directory::ensure(&settings.cache_dir, 0o755)?;
        let new = format!("{CACHE_FILE}.new");
        let mut file = directory.create_new(&new)?;
        file.write_all(&serde_json::to_vec(&cached)?)?;
        directory.rename(new, CACHE_FILE)
    }
}

/// The registry without a fetch: that of a `file:` URL, the cached one, or the built-in one. Returns also which.
pub fn load_cached_or_builtin(settings: &Settings) -> (Registry, String) {
    let builtin = || (Registry::builtin(), "built in".to_owned());
    if let Some(path) = file_of(&settings.url) {
        let document = read_at_most(&path, MAX_DOCUMENT_SIZE).ok();
        let registry = document.and_then(|document| Registry::from_json(&document).ok());
        return registry.map_or_else(builtin, |registry| (registry, settings.url.clone()));
    }
    match Cached::load(settings) {
        Some((registry, _)) if !settings.url.is_empty() => {
            (registry, format!("{} (cached)", settings.url))
        }
        _ => builtin(),
    }
}

/// Fetches the registry and caches it. Returns also whether the server answered that it has not changed.
pub fn fetch(settings: &Settings) -> Result<(Registry, bool), String> {
    Fetcher::default().fetch(settings)
}

fn file_of(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://").map(PathBuf::from)
}

/// Reads a regular file, up to one byte more than `max`.
fn read_at_most(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    // Opening a FIFO must not block.
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut content = Vec::new();
    file.take(max as u64 + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Fetches the registry repeatedly.
#[derive(Default)]
struct Fetcher {
    agent: Option<Agent>,
    cache_failure_logged: bool,
}

impl Fetcher {
    fn fetch(&mut self, settings: &Settings) -> Result<(Registry, bool), String> {
        if let Some(path) = file_of(&settings.url) {
            let document = read_at_most(&path, MAX_DOCUMENT_SIZE).map_err(|e| e.to_string())?;
            return Ok((Registry::from_json(&document)?, false));
        }
        let cached = Cached::load(settings);
        let agent = self.agent.get_or_insert_with(|| agent(FETCH_TIMEOUT));
        let mut request = agent.get(&settings.url);
        if let Some((_, Some(etag))) = &cached {
            request = request.header("If-None-Match", etag);
        }
        let mut response = request.call().map_err(|e| describe(&e))?;
        match (response.status().as_u16(), cached) {
            (200, _) => {}
            // The cached registry may be newer than the one in use: another process may have fetched it.
            (304, Some((registry, _))) => return Ok((registry, true)),
            (status, _) => return Err(format!("found HTTP status {status}, expected 200")),
        }
        let etag = response.headers().get("ETag");
        let etag = etag.and_then(|etag| etag.to_str().ok()).map(str::to_owned);
        let body = response
            .body_mut()
            .with_config()
            .limit(MAX_DOCUMENT_SIZE as u64);
        let document = body.read_to_vec().map_err(|e| describe(&e))?;
        let registry = Registry::from_json(&document)?;
        let stored = Cached::store(settings, etag, &registry);
        if let Err(error) = stored
            && !std::mem::replace(&mut self.cache_failure_logged, true)
        {
            log::info!(
                "registry: cannot write the cache in {} (workDir): {error}",
                settings.cache_dir.display()
            );
        }
        Ok((registry, false))
    }
}

/// The error in plain words.
fn describe(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "name resolution failed".to_owned(),
        ureq::Error::Timeout(_) => format!("no answer within {} s", FETCH_TIMEOUT.as_secs()),
        ureq::Error::BodyExceedsLimit(_) => TOO_LARGE.to_owned(),
        ureq::Error::Io(error) => error.to_string().replace(
            "failed to lookup address information",
            "name resolution failed",
        ),
        other => other.to_string(),
    }
}

/// Keeps `shared` up to date until `requests` is closed. Each request starts an update at once, with its settings.
pub fn keep_updated(shared: &SharedRegistry, requests: &Receiver<Settings>, metrics: &Metrics) {
    let counters: Outcomes<Update> = metrics.registry_updates();
    let mut fetcher = Fetcher::default();
    let Ok(mut settings) = requests.recv() else {
        return;
    };
    let mut failures = 0;
    loop {
        let mut wait = UPDATE_INTERVAL;
        if !settings.url.is_empty() {
            match fetcher.fetch(&settings) {
                Ok((fetched, _)) => {
                    failures = 0;
                    let changed = Some(fetched).filter(|fetched| *fetched != *shared.load());
                    counters.add(if changed.is_some() {
                        Update::Updated
                    } else {
                        Update::Unchanged
                    });
                    if let Some(registry) = changed {
                        let count = registry.experiments().len();
                        let plural = if count == 1 { "" } else { "s" };
                        log::info!(
                            "registry: {count} experiment{plural} fetched from {}",
                            settings.url
                        );
                        shared.store(registry);
                    }
                }
                Err(error) => {
                    counters.add(Update::Failed);
                    let text = format!(
                        "registry: cannot fetch {}: {error}; using the cached (or built-in) registry",
                        settings.url
                    );
                    // One warning until a fetch succeeds.
                    log::log!(
                        if failures == 0 {
                            log::Level::Warn
                        } else {
                            log::Level::Debug
                        },
                        "{text}"
                    );
                    let backoff = RETRY_INTERVAL.saturating_mul(1 << failures.min(10));
                    wait = backoff.min(UPDATE_INTERVAL);
                    failures += 1;
                }
            }
        }
        match requests.recv_timeout(wait) {
            Ok(new) => {
                if new.url != settings.url {
                    shared.store(load_cached_or_builtin(&new).0);
                }
                settings = new;
                failures = 0;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
