//! Where the registry comes from: fetched from its URL, kept in a file in `workDir`, known to all threads.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use nix::libc;
use serde::{Deserialize, Serialize};

use super::Registry;
use super::document::SIZE_MAX;
use crate::config;
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::sys::http_client::{Agent, agent};

/// The cached registry, in `workDir`.
const FILE: &str = "registry.json";
/// How often it is fetched.
const PERIOD: Duration = Duration::from_secs(24 * 3600);
/// How soon it is tried again at first; twice as long each time, up to [`PERIOD`].
const RETRY: Duration = Duration::from_secs(60);
/// How long a fetch may take.
const PATIENCE: Duration = Duration::from_secs(30);

outcomes! {
    /// What became of an update.
    pub enum Update {
        /// There is another registry.
        Updated = "updated",
        /// It is as it was.
        Unchanged = "unchanged",
        /// There is none to be had, or it is wrong.
        Failed = "failed",
    }
}

/// The registry in use, which may become another at any time.
#[derive(Clone)]
pub struct Handle(Arc<ArcSwap<Registry>>);

impl Handle {
    /// This one, until another is stored.
    pub fn new(registry: Registry) -> Handle {
        Handle(Arc::new(ArcSwap::from_pointee(registry)))
    }

    /// The one in use now. Never waits.
    pub fn load(&self) -> Arc<Registry> {
        self.0.load_full()
    }

    fn store(&self, registry: Registry) {
        self.0.store(Arc::new(registry));
    }
}

/// The file in `workDir`.
#[derive(Serialize, Deserialize)]
struct Cached {
    url: String,
    etag: Option<String>,
    registry: serde_json::Value,
}

impl Cached {
    fn load(settings: &config::Registry) -> Option<(Registry, Option<String>)> {
        let cached = read_at_most(&settings.cache.join(FILE), 2 * SIZE_MAX).ok()?;
        let cached: Cached = serde_json::from_slice(&cached).ok()?;
        let registry = Registry::from_json(cached.registry.to_string().as_bytes()).ok()?;
        (cached.url == settings.url).then_some((registry, cached.etag))
    }

    fn store(
        settings: &config::Registry,
        etag: Option<String>,
        registry: &Registry,
    ) -> io::Result<()> {
        let cached = Cached {
            url: settings.url.clone(),
            etag,
            registry: registry.to_json(),
        };
        fs::create_dir_all(&settings.cache)?;
        let new = settings.cache.join(format!("{FILE}.new"));
        fs::write(&new, serde_json::to_vec(&cached)?)?;
        fs::rename(new, settings.cache.join(FILE))
    }
}

/// What is known without asking anybody: a local file, the cached registry, or that of the program.
/// Returns where it comes from, too.
pub fn known(settings: &config::Registry) -> (Registry, String) {
    let builtin = || (Registry::builtin(), "built in".to_owned());
    if let Some(path) = file_of(&settings.url) {
        let read = read_at_most(&path, SIZE_MAX).ok();
        let registry = read.and_then(|document| Registry::from_json(&document).ok());
        return registry.map_or_else(builtin, |registry| (registry, settings.url.clone()));
    }
    match Cached::load(settings) {
        Some((registry, _)) if !settings.url.is_empty() => {
            (registry, format!("{} (cached)", settings.url))
        }
        _ => builtin(),
    }
}

/// Fetches the registry, and keeps it in the cache. Whether the server says that it is as it was comes with it.
pub fn fetch(settings: &config::Registry) -> Result<(Registry, bool), String> {
    Fetcher::default().fetch(settings)
}

fn file_of(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://").map(PathBuf::from)
}

fn read_at_most(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    // Nothing that could keep the reader waiting, as a FIFO would.
    let mut options = File::options();
    let file = options
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is no regular file"));
    }
    let mut content = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut content)?;
    Ok(content)
}

/// Fetches registries, one after the other.
#[derive(Default)]
struct Fetcher {
    agent: Option<Agent>,
    unwritable: bool,
}

impl Fetcher {
    fn fetch(&mut self, settings: &config::Registry) -> Result<(Registry, bool), String> {
        if let Some(path) = file_of(&settings.url) {
            let document = read_at_most(&path, SIZE_MAX).map_err(|e| e.to_string())?;
            return Ok((Registry::from_json(&document)?, false));
        }
        let known = Cached::load(settings);
        let agent = self.agent.get_or_insert_with(|| agent(PATIENCE));
        let mut request = agent.get(&settings.url);
        if let Some((_, Some(etag))) = &known {
            request = request.header("If-None-Match", etag);
        }
        let mut response = request.call().map_err(|e| e.to_string())?;
        match (response.status().as_u16(), known) {
            (200, _) => {}
            // Perhaps another process has fetched it.
            (304, Some((registry, _))) => return Ok((registry, true)),
            (status, _) => return Err(format!("expected status 200, got {status}")),
        }
        let etag = response.headers().get("ETag");
        let etag = etag.and_then(|etag| etag.to_str().ok()).map(str::to_owned);
        let body = response.body_mut().with_config().limit(SIZE_MAX as u64);
        let document = body.read_to_vec().map_err(|e| e.to_string())?;
        let registry = Registry::from_json(&document)?;
        let stored = Cached::store(settings, etag, &registry);
        if let Err(error) = stored
            && !std::mem::replace(&mut self.unwritable, true)
        {
            log::info!(
                "registry: not cached in {} (workDir): {error}",
                settings.cache.display()
            );
        }
        Ok((registry, false))
    }
}

/// Keeps `handle` up to date until `wishes` is closed. A wish is for an update at once, by these settings.
pub fn keep(handle: &Handle, wishes: &Receiver<config::Registry>, metrics: &Metrics) {
    let counters: Outcomes<Update> = metrics.registry_updates();
    let mut fetcher = Fetcher::default();
    let Ok(mut settings) = wishes.recv() else {
        return;
    };
    let mut failures = 0;
    loop {
        let mut wait = PERIOD;
        if !settings.url.is_empty() {
            match fetcher.fetch(&settings) {
                Ok((found, _)) => {
                    failures = 0;
                    let news = Some(found).filter(|found| *found != *handle.load());
                    counters.add(if news.is_some() {
                        Update::Updated
                    } else {
                        Update::Unchanged
                    });
                    if let Some(registry) = news {
                        let experiments = registry.experiments().len();
                        log::info!("registry: {experiments} experiments, from {}", settings.url);
                        handle.store(registry);
                    }
                }
                Err(error) => {
                    counters.add(Update::Failed);
                    let text = format!(
                        "registry: {}: {error}; going on with what is known",
                        settings.url
                    );
                    // Once, until it works again.
                    log::log!(
                        if failures == 0 {
                            log::Level::Warn
                        } else {
                            log::Level::Debug
                        },
                        "{text}"
                    );
                    wait = RETRY.saturating_mul(1 << failures.min(10)).min(PERIOD);
                    failures += 1;
                }
            }
        }
        match wishes.recv_timeout(wait) {
            Ok(new) => {
                if new.url != settings.url {
                    handle.store(known(&new).0);
                }
                settings = new;
                failures = 0;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
