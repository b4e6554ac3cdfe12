//! The prometheus backend: `/metrics`, with socket statistics of open flows, sums by experiment and activity, and
//! the daemon's own counters.
//!
//! One thread applies events to the store. Each endpoint has its own thread, which requests a snapshot of the store for
//! each scrape: neither a slow client nor a long page delays events or other endpoints.

mod families;
mod page;
mod store;
mod sums;

use std::collections::HashMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select, tick};
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use log::Level;

use super::{Backend, with_socket};
use crate::config;
use crate::control::routes::method_not_allowed;
use crate::dispatcher::flow_table::FlowTable;
use crate::error::{Context, Error, Result};
use crate::event::{Effect, FlowEvent, State};
use crate::flow::Tag;
use crate::http::{Body, Handler, Listener, Request, Response, Server, problem};
use crate::logging::LogLimit;
use crate::metrics::Metrics;
use crate::metrics::exposition::Format;
use crate::registry::SharedRegistry;
use crate::sys::interfaces::LocalAddresses;
use crate::sys::sock_diag::Dump;
use crate::sys::stop::{Stop, stop};

pub use families::FAMILIES;
pub use page::{Page, Source};
pub use store::{Snapshot, Store};

const NAME: &str = "prometheus";
/// How many pages of an endpoint may be sent at once: each holds a snapshot in memory.
const MAX_SCRAPES: usize = 8;
/// How long clients that accept gzip get the same page.
const SHARED_FOR: Duration = Duration::from_secs(1);
/// How long a request for a snapshot, and its answer, may take.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_millis(900);
const TICK_INTERVAL: Duration = Duration::from_secs(1);
/// Events handled in a row before requests for snapshots are answered.
const MAX_EVENTS_PER_TURN: usize = 512;

/// The marker's counters.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// By tag, over open and ended flows.
    pub by_tag: Vec<(Tag, Marked)>,
    /// Packets of known flows that were sent unmarked, by reason.
    pub unmarked: Vec<(&'static str, u64)>,
    /// Number of entries in the map.
    pub entries: usize,
    /// Maximum number of entries of the map.
    pub capacity: usize,
}

/// Marked packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marked {
    /// Packets as sent over the wire.
    pub packets: u64,
    /// Bytes of frames.
    pub bytes: u64,
}

/// Reads the marker's maps; `None` if they do not exist.
pub type ReadMarks = Arc<dyn Fn() -> Option<Marks> + Send + Sync>;

/// The backend, with its sockets bound.
pub struct Prometheus {
    endpoints: Vec<(SocketAddr, Source, Server)>,
    store: Store,
    registry: SharedRegistry,
    metrics: Metrics,
    marks: Option<ReadMarks>,
    local: LocalAddresses,
    /// `None` on a kernel without `sock_diag`.
    sockets: Option<Dump>,
    lookup_failure_log: LogLimit,
}

impl Prometheus {
    /// Binds the endpoints.
    pub fn new(
        config: &config::Prometheus,
        registry: &SharedRegistry,
        marks: Option<ReadMarks>,
        metrics: &Metrics,
    ) -> Result<Prometheus> {
        let mut endpoints = Vec::new();
        for (key, port, source) in [
            ("port", config.port, Source::Any),
            ("netlinkPort", config.netlink_port, Source::Netlink),
            ("skopsPort", config.skops_port, Source::Skops),
        ] {
            let Some(port) = port else { continue };
            let address = SocketAddr::new(config.address, port);
            let server = Listener::tcp(address).and_then(|listener| Server::new(vec![listener]));
            let server = server
                .context(|| format!("TCP {address} (backends.prometheus.bindAddress, {key})"))?;
            endpoints.push((address, source, server));
        }
        let max_shown = match config.per_flow {
            true => config.max_series / FAMILIES.len(),
            false => 0,
        };
        Ok(Prometheus {
            endpoints,
            store: Store::new(max_shown, Timestamp::now(), registry.clone()),
            registry: registry.clone(),
            metrics: metrics.clone(),
            marks,
            local: LocalAddresses::watch().context(|| "addresses of this host".to_owned())?,
            sockets: Dump::open().ok(),
            lookup_failure_log: LogLimit::new(Level::Warn, "prometheus: socket lookups failed"),
        })
    }

    fn apply(&mut self, event: &FlowEvent) {
        match self.with_final_counts(event) {
            Some(event) => self.store.apply(&event),
            None => self.store.apply(event),
        }
    }

    /// Adds the socket's final counts to an end that lacks them: otherwise the counts since the last report would be
    /// missing.
    fn with_final_counts(&mut self, event: &FlowEvent) -> Option<FlowEvent> {
        let closed = event.state == State::End && event.effect != Effect::Nothing;
        if !closed || event.netlink.is_some() {
            return None;
        }
        with_socket(
            event,
            self.local.outgoing(&event.flow),
            self.sockets.as_mut()?,
        )
        .unwrap_or_else(|error| {
            let message = || format!("prometheus: sock_diag: {error}");
            self.lookup_failure_log.log(Instant::now(), message);
            None
        })
    }

    /// Starts a thread for every endpoint; the last one to end closes the channel of requests.
    fn serve(&mut self, stop: &Stop, requests: Sender<Ask>) -> Result<Vec<JoinHandle<Result<()>>>> {
        let start = |(address, source, server): (SocketAddr, Source, Server)| {
            let mut scrapes = Scrapes {
                source,
                requests: requests.clone(),
                registry: self.registry.clone(),
                metrics: self.metrics.clone(),
                marks: self.marks.clone(),
                shown_marks: HashMap::new(),
                shared: Vec::new(),
                in_progress: Vec::new(),
            };
            let stop = stop.clone();
            let serve = move || {
                let result = server.run(&mut scrapes, stop);
                result.context(|| format!("poll loop of {address}"))
            };
            std::thread::Builder::new()
                .name("metrics".to_owned())
                .spawn(serve)
                .context(|| "thread metrics (backends.prometheus)".to_owned())
        };
        self.endpoints.drain(..).map(start).collect()
    }
}

impl Backend for Prometheus {
    fn name(&self) -> &'static str {
        NAME
    }

    fn restore(&mut self, table: &FlowTable) -> Result<()> {
        table
            .iter()
            .for_each(|(_, open)| self.store.restore(open.tag));
        Ok(())
    }

    fn run(mut self: Box<Self>, events: Receiver<Arc<FlowEvent>>) -> Result<()> {
        let (mut switch, stop) = stop().context(|| "pipe of the stop switch".to_owned())?;
        let (requests, inbox) = bounded::<Ask>(MAX_SCRAPES);
        let threads = self.serve(&stop, requests)?;
        let ticks = tick(TICK_INTERVAL);
        loop {
            select! {
                recv(events) -> event => {
                    let Ok(event) = event else { break };
                    self.local.refresh();
                    self.apply(&event);
                    for event in events.try_iter().take(MAX_EVENTS_PER_TURN) {
                        self.apply(&event);
                    }
                }
                // The scraper may have timed out: a failed reply is ignored.
                recv(inbox) -> ask => match ask {
                    Ok(Ask::Snapshot(reply)) => drop(reply.send(self.store.snapshot())),
                    Ok(Ask::Health(reply)) => drop(reply.send(())),
                    Err(_) => {}
                },
                recv(ticks) -> _ => {
                    self.lookup_failure_log.tick(Instant::now());
                    if threads.iter().any(JoinHandle::is_finished) {
                        break;
                    }
                }
            }
        }
        switch.set();
        self.lookup_failure_log.flush();
        for thread in threads {
            let ended = thread.join();
            ended.map_err(|_| Error::Failed("the thread of an endpoint panicked".to_owned()))??;
        }
        Ok(())
    }
}

/// What an endpoint asks the thread that applies events.
enum Ask {
    Snapshot(Sender<Snapshot>),
    /// Whether it works.
    Health(Sender<()>),
}

/// Answers the requests to one endpoint.
struct Scrapes {
    source: Source,
    requests: Sender<Ask>,
    registry: SharedRegistry,
    metrics: Metrics,
    marks: Option<ReadMarks>,
    /// The highest counts shown so far: a flow that ends while the maps are read must not decrease them.
    shown_marks: HashMap<Tag, Marked>,
    /// The latest compressed page of each format.
    shared: Vec<(Instant, Format, Arc<Mutex<SharedPage>>)>,
    /// One entry per page that is kept, or still being sent.
    in_progress: Vec<Weak<()>>,
}

impl Handler for Scrapes {
    fn handle(&mut self, request: &Request) -> Response {
        match (request.path.as_str(), request.method.as_str()) {
            ("/metrics" | "/healthz" | "/", method) if method != "GET" => {
                method_not_allowed("GET, HEAD")
            }
            ("/metrics", _) => self.metrics(request, Instant::now()),
            ("/healthz", _) => match self.ask(Ask::Health) {
                Some(_) => Response::json(200, &serde_json::json!({"status": "ok"})),
                None => busy(),
            },
            ("/", _) => Response {
                status: 200,
                content_type: "text/html; charset=utf-8",
                headers: Vec::new(),
                body: Body::Whole(
                    b"<!DOCTYPE html><title>flowd-rs</title><p>flowd-rs: <a href=\"/metrics\">metrics</a></p>\n".to_vec(),
                ),
            },
            _ => problem(404, "no such route, expected /metrics or /healthz"),
        }
    }
}

fn busy() -> Response {
    problem(503, "the daemon is busy or stopping")
}

impl Scrapes {
    fn ask<T>(&self, ask: impl FnOnce(Sender<T>) -> Ask) -> Option<T> {
        let (reply, answer) = bounded(1);
        self.requests
            .send_timeout(ask(reply), SNAPSHOT_TIMEOUT)
            .ok()?;
        answer.recv_timeout(SNAPSHOT_TIMEOUT).ok()
    }

    fn metrics(&mut self, request: &Request, now: Instant) -> Response {
        let format = Format::negotiate(request.accept.as_deref().unwrap_or_default());
        let is_recent = |made: Instant| now.saturating_duration_since(made) < SHARED_FOR;
        self.shared.retain(|(made, ..)| is_recent(*made));
        let mut response = Response {
            status: 200,
            content_type: format.content_type(),
            headers: vec![("Vary", "Accept, Accept-Encoding".to_owned())],
            body: Body::Whole(Vec::new()),
        };
        if !request.accepts_gzip {
            match self.page(format) {
                Ok((page, in_progress)) => {
                    let page = page.inspect(move |_| {
                        let _ = &in_progress;
                    });
                    response.body = Body::Parts(Box::new(page));
                }
                Err(refusal) => return refusal,
            }
            return response;
        }
        let shared = self.shared.iter().find(|(_, other, _)| *other == format);
        let page = match shared {
            Some((.., page)) => page.clone(),
            None => match self.page(format) {
                Ok((page, in_progress)) => {
                    let page = Arc::new(Mutex::new(SharedPage::new(page, in_progress)));
                    self.shared.push((now, format, page.clone()));
                    page
                }
                Err(refusal) => return refusal,
            },
        };
        response
            .headers
            .push(("Content-Encoding", "gzip".to_owned()));
        response.body = Body::Parts(Box::new(SharedReader { page, next: 0 }));
        response
    }

    /// A new page, and what counts it as in progress until it is dropped.
    fn page(&mut self, format: Format) -> std::result::Result<(Page, Arc<()>), Response> {
        self.in_progress.retain(|scrape| scrape.strong_count() > 0);
        if self.in_progress.len() >= MAX_SCRAPES {
            return Err(problem(503, "8 scrapes are already in progress"));
        }
        let snapshot = self.ask(Ask::Snapshot).ok_or_else(busy)?;
        let marks = self.read_marks();
        let page = Page::new(
            format,
            self.source,
            &self.registry.load(),
            snapshot,
            marks.as_ref(),
            &self.metrics.gather(),
        );
        let in_progress = Arc::new(());
        self.in_progress.push(Arc::downgrade(&in_progress));
        Ok((page, in_progress))
    }

    fn read_marks(&mut self) -> Option<Marks> {
        let mut marks = self.marks.as_ref()?()?;
        for (tag, marked) in &marks.by_tag {
            let shown = self.shown_marks.entry(*tag).or_default();
            shown.packets = shown.packets.max(marked.packets);
            shown.bytes = shown.bytes.max(marked.bytes);
        }
        marks.by_tag = self
            .shown_marks
            .iter()
            .map(|(tag, marked)| (*tag, *marked))
            .collect();
        Some(marks)
    }
}

/// A compressed page that several clients read. It is compressed as far as the fastest of them has read.
struct SharedPage {
    parts: Vec<Arc<[u8]>>,
    rest: Box<dyn Iterator<Item = Vec<u8>> + Send>,
    _in_progress: Arc<()>,
}

impl SharedPage {
    fn new(page: Page, in_progress: Arc<()>) -> SharedPage {
        // Parts that are still in the compressor are empty.
        let parts = Compressed::new(page).filter(|part| !part.is_empty());
        SharedPage {
            parts: Vec::new(),
            rest: Box::new(parts.fuse()),
            _in_progress: in_progress,
        }
    }
}

/// One client's way through a shared page.
struct SharedReader {
    page: Arc<Mutex<SharedPage>>,
    next: usize,
}

impl Iterator for SharedReader {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        // All readers are on the thread of the endpoint: nobody waits.
        let mut page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        if page.parts.len() == self.next {
            let part = page.rest.next()?;
            page.parts.push(part.into());
        }
        let part = page.parts.get(self.next)?.to_vec();
        self.next += 1;
        Some(part)
    }
}

/// The parts of a page, compressed.
struct Compressed<I> {
    page: I,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl<I> Compressed<I> {
    fn new(page: I) -> Compressed<I> {
        Compressed {
            page,
            encoder: Some(GzEncoder::new(Vec::new(), Compression::fast())),
        }
    }
}

impl<I: Iterator<Item = Vec<u8>>> Iterator for Compressed<I> {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        // Writing to a Vec cannot fail.
        match self.page.next() {
            Some(part) => {
                let encoder = self.encoder.as_mut()?;
                encoder.write_all(&part).ok()?;
                Some(std::mem::take(encoder.get_mut()))
            }
            None => self.encoder.take()?.finish().ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Registry;

    /// A handler, and a thread that counts the snapshots which it asks for.
    fn scrapes() -> (Scrapes, JoinHandle<usize>) {
        let (requests, inbox) = bounded(MAX_SCRAPES);
        let registry = SharedRegistry::new(Registry::builtin());
        let store = Store::new(10, Timestamp::UNIX_EPOCH, registry.clone());
        let counter = std::thread::spawn(move || {
            let mut snapshots = 0;
            for ask in inbox {
                match ask {
                    Ask::Snapshot(reply) => {
                        snapshots += 1;
                        reply.send(store.snapshot()).unwrap();
                    }
                    Ask::Health(reply) => reply.send(()).unwrap(),
                }
            }
            snapshots
        });
        let scrapes = Scrapes {
            source: Source::Any,
            requests,
            registry,
            metrics: Metrics::new(),
            marks: None,
            shown_marks: HashMap::new(),
            shared: Vec::new(),
            in_progress: Vec::new(),
        };
        (scrapes, counter)
    }

    fn request(path: &str, accepts_gzip: bool) -> Request {
        Request {
            method: "GET".to_owned(),
            path: path.to_owned(),
            accepts_gzip,
            ..Request::default()
        }
    }

    fn parts(response: Response) -> Box<dyn Iterator<Item = Vec<u8>> + Send> {
        match response.body {
            Body::Parts(parts) => parts,
            Body::Whole(body) => panic!("{}", String::from_utf8_lossy(&body)),
        }
    }

    #[test]
    fn a_compressed_page_is_made_once_for_all_who_ask_within_a_second() {
        let (mut scrapes, counter) = scrapes();
        let start = Instant::now();
        let gzip = request("/metrics", true);
        // More than may be in progress with pages of their own; the first has read a part before the others ask.
        let mut first = parts(scrapes.metrics(&gzip, start));
        let mut begin = first.next().unwrap();
        let others: Vec<_> = (0..256)
            .map(|_| parts(scrapes.metrics(&gzip, start + SHARED_FOR / 2)))
            .collect();
        begin.extend(first.flatten());
        let mut text = String::new();
        let mut decoder = flate2::read::GzDecoder::new(begin.as_slice());
        std::io::Read::read_to_string(&mut decoder, &mut text).unwrap();
        assert!(text.contains("# TYPE process_cpu_seconds_total counter"));
        for other in others {
            assert_eq!(other.flatten().collect::<Vec<u8>>(), begin);
        }
        // Another second, a client without gzip, and a format of its own have other pages.
        drop(scrapes.metrics(&gzip, start + SHARED_FOR));
        drop(scrapes.metrics(&request("/metrics", false), start + SHARED_FOR));
        let mut open_metrics = request("/metrics", true);
        open_metrics.accept = Some("application/openmetrics-text; version=1.0.0".to_owned());
        drop(scrapes.metrics(&open_metrics, start + SHARED_FOR));
        // The health is no reason to copy all series.
        assert_eq!(scrapes.handle(&request("/healthz", false)).status, 200);
        drop(scrapes);
        assert_eq!(counter.join().unwrap(), 4);
    }
}
