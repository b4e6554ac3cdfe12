//! The prometheus backend: `/metrics`, with what is known of the sockets of open flows, sums by experiment
//! and activity, and the daemon's own counters.
//!
//! One thread takes events into the store. Each endpoint has a thread of its own, which asks it for a
//! snapshot a scrape: a client that is slow, or a page that is long, holds up neither events nor the other
//! endpoints.

mod families;
mod page;
mod store;

use std::collections::HashMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select, tick};
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;
use log::Level;

use super::{Backend, with_socket};
use crate::config;
use crate::error::{Context, Error, Result};
use crate::exposition::Format;
use crate::flow::{Effect, FlowEvent, State, Tag};
use crate::flow_table::FlowTable;
use crate::http::{Body, Handler, Listener, Request, Response, Server, problem};
use crate::log_limit::LogLimit;
use crate::metrics::Metrics;
use crate::registry::Handle;
use crate::routes::method_not_allowed;
use crate::sys::interfaces::LocalAddresses;
use crate::sys::sock_diag::Dump;
use crate::sys::stop::{Stop, stop};

pub use families::FAMILIES;
pub use page::{Page, Source};
pub use store::{Snapshot, Store};

const NAME: &str = "prometheus";
/// Scrapes that may be on their way at once on an endpoint: each holds what it shows.
const SCRAPES: usize = 8;
/// How long the backend may take to answer a scrape.
const PATIENCE: Duration = Duration::from_millis(900);
const TICK: Duration = Duration::from_secs(1);
/// Events in a row before a scrape has its turn.
const BATCH: usize = 512;

/// What the marker has counted.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// By tag, of flows open or not.
    pub by_tag: Vec<(Tag, Marked)>,
    /// Packets that went out unmarked, with the reason.
    pub unmarked: Vec<(&'static str, u64)>,
    /// Entries of the map.
    pub entries: usize,
    /// Room in the map.
    pub capacity: usize,
}

/// Packets and bytes marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Marked {
    /// Packets as they go over the wire.
    pub packets: u64,
    /// Bytes of frames.
    pub bytes: u64,
}

/// Reads the marker's maps.
pub type ReadMarks = Arc<dyn Fn() -> Option<Marks> + Send + Sync>;

/// The backend, with its sockets bound.
pub struct Prometheus {
    endpoints: Vec<(SocketAddr, Source, Server)>,
    store: Store,
    registry: Handle,
    metrics: Metrics,
    marks: Option<ReadMarks>,
    local: LocalAddresses,
    /// `None` on a kernel without `sock_diag`.
    sockets: Option<Dump>,
    trouble: LogLimit,
}

impl Prometheus {
    /// Binds the endpoints.
    pub fn new(
        config: &config::Prometheus,
        registry: &Handle,
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
        let shown = match config.per_flow {
            true => config.max_series / FAMILIES.len(),
            false => 0,
        };
        Ok(Prometheus {
            endpoints,
            store: Store::new(shown, Timestamp::now()),
            registry: registry.clone(),
            metrics: metrics.clone(),
            marks,
            local: LocalAddresses::watch().context(|| "addresses of this host".to_owned())?,
            sockets: Dump::open().ok(),
            trouble: LogLimit::new(Level::Warn, "prometheus: failures"),
        })
    }

    fn take(&mut self, event: &FlowEvent) {
        match self.last_word(event) {
            Some(event) => self.store.take(&event),
            None => self.store.take(event),
        }
    }

    /// An end that nobody has looked at the socket for, with the last counts: those of the last period
    /// would be missing.
    fn last_word(&mut self, event: &FlowEvent) -> Option<FlowEvent> {
        let closed = event.state == State::End && event.effect != Effect::Nothing;
        if !closed || event.netlink.is_some() {
            return None;
        }
        with_socket(event, &self.local, self.sockets.as_mut()?).unwrap_or_else(|error| {
            let say = || format!("prometheus: sock_diag: {error}");
            self.trouble.log(Instant::now(), say);
            None
        })
    }

    /// Starts a thread for every endpoint; the last one to end closes the channel.
    fn serve(
        &mut self,
        stop: &Stop,
        ask: Sender<Sender<Snapshot>>,
    ) -> Result<Vec<JoinHandle<Result<()>>>> {
        let start = |(address, source, server): (SocketAddr, Source, Server)| {
            let mut scrapes = Scrapes {
                source,
                ask: ask.clone(),
                registry: self.registry.clone(),
                metrics: self.metrics.clone(),
                marks: self.marks.clone(),
                marked: HashMap::new(),
                scrapes: Vec::new(),
            };
            let stop = stop.clone();
            let serve = move || {
                let result = server.run(&mut scrapes, stop);
                result.context(|| format!("poll loop of {address}"))
            };
            std::thread::Builder::new()
                .name("metrics".to_owned())
                .spawn(serve)
                .context(|| "thread metrics".to_owned())
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
        let (ask, queries) = bounded::<Sender<Snapshot>>(SCRAPES);
        let threads = self.serve(&stop, ask)?;
        let ticks = tick(TICK);
        loop {
            select! {
                recv(events) -> event => {
                    let Ok(event) = event else { break };
                    self.local.refresh();
                    self.take(&event);
                    for event in events.try_iter().take(BATCH) {
                        self.take(&event);
                    }
                }
                // Who asked may have gone.
                recv(queries) -> reply => if let Ok(reply) = reply {
                    let _ = reply.send(self.store.snapshot());
                },
                recv(ticks) -> _ => {
                    self.trouble.tick(Instant::now());
                    if threads.iter().any(JoinHandle::is_finished) {
                        break;
                    }
                }
            }
        }
        switch.set();
        self.trouble.flush();
        for thread in threads {
            let ended = thread.join();
            ended.map_err(|_| Error::Failed("an endpoint's thread panicked".to_owned()))??;
        }
        Ok(())
    }
}

/// Answers the requests to one endpoint.
struct Scrapes {
    source: Source,
    ask: Sender<Sender<Snapshot>>,
    registry: Handle,
    metrics: Metrics,
    marks: Option<ReadMarks>,
    /// What was last shown: a flow that ends while the maps are read does not make it less.
    marked: HashMap<Tag, Marked>,
    /// Those on their way.
    scrapes: Vec<Weak<()>>,
}

impl Handler for Scrapes {
    fn handle(&mut self, request: &Request) -> Response {
        match (request.path.as_str(), request.method.as_str()) {
            ("/metrics" | "/healthz" | "/", method) if method != "GET" => {
                method_not_allowed("GET, HEAD")
            }
            ("/metrics", _) => self.metrics(request),
            ("/healthz", _) => match self.snapshot() {
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
            _ => problem(404, "no such route: there are /metrics and /healthz"),
        }
    }
}

fn busy() -> Response {
    problem(503, "the daemon is busy or stopping")
}

impl Scrapes {
    fn snapshot(&self) -> Option<Snapshot> {
        let (reply, answer) = bounded(1);
        self.ask.send_timeout(reply, PATIENCE).ok()?;
        answer.recv_timeout(PATIENCE).ok()
    }

    fn metrics(&mut self, request: &Request) -> Response {
        self.scrapes.retain(|scrape| scrape.strong_count() > 0);
        if self.scrapes.len() >= SCRAPES {
            return problem(503, "8 scrapes are on their way already");
        }
        let Some(snapshot) = self.snapshot() else {
            return busy();
        };
        let marks = self.read_marks();
        let format = Format::negotiate(request.accept.as_deref().unwrap_or_default());
        let page = Page::new(
            format,
            self.source,
            &self.registry.load(),
            snapshot,
            marks.as_ref(),
            &self.metrics.gather(),
        );
        let on_its_way = Arc::new(());
        self.scrapes.push(Arc::downgrade(&on_its_way));
        let page = page.inspect(move |_| {
            let _ = &on_its_way;
        });
        let mut headers = vec![("Vary", "Accept, Accept-Encoding".to_owned())];
        let body: Body = match request.accepts_gzip {
            true => {
                headers.push(("Content-Encoding", "gzip".to_owned()));
                Body::Parts(Box::new(Compressed::new(page)))
            }
            false => Body::Parts(Box::new(page)),
        };
        Response {
            status: 200,
            content_type: format.content_type(),
            headers,
            body,
        }
    }

    fn read_marks(&mut self) -> Option<Marks> {
        let mut marks = self.marks.as_ref()?()?;
        for (tag, marked) in &marks.by_tag {
            let most = self.marked.entry(*tag).or_default();
            most.packets = most.packets.max(marked.packets);
            most.bytes = most.bytes.max(marked.bytes);
        }
        marks.by_tag = self
            .marked
            .iter()
            .map(|(tag, marked)| (*tag, *marked))
            .collect();
        Some(marks)
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
