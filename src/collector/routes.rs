//! The routes of the collector: its control socket answers all of them, the metrics endpoint only some.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::collector::accounts::{Account, Counts};
use crate::collector::exporters::{Exporters, Known};
use crate::collector::metrics_page;
use crate::collector::record::ExporterKey;
use crate::collector::recorder::{Message, Snapshot};
use crate::control::routes::{method_not_allowed, warnings};
use crate::http::{Body, Handler, Request, Response, problem};
use crate::metrics::count_text;
use crate::metrics::exposition::Format;

/// How long the recorder may take to answer.
const RECORDER_TIMEOUT: Duration = Duration::from_millis(900);

/// Method, path and description of the routes, for `GET /`.
const ROUTES: [(&str, &str); 6] = [
    ("/", "this list"),
    ("/status", "what became of every record"),
    (
        "/exporters",
        "the exporters, with their counts and templates",
    ),
    ("/filter", "the rules, with what they did"),
    ("/metrics", "the same for Prometheus"),
    ("/healthz", "whether the collector works"),
];

/// Answers requests.
pub struct Routes {
    recorder: Sender<Message>,
    exporters: Arc<Exporters>,
    started: Timestamp,
    /// For the uptime, which must not jump with the clock.
    started_at: Instant,
}

impl Routes {
    /// The routes of a collector that starts now.
    pub fn new(recorder: Sender<Message>, exporters: Arc<Exporters>) -> Routes {
        Routes {
            recorder,
            exporters,
            started: Timestamp::now(),
            started_at: Instant::now(),
        }
    }

    fn snapshot(&self) -> Result<Snapshot, Response> {
        let (reply, answer) = bounded(1);
        let busy = || problem(503, "the recorder did not answer in time");
        self.recorder
            .send(Message::Snapshot(reply))
            .map_err(|_| busy())?;
        answer.recv_timeout(RECORDER_TIMEOUT).map_err(|_| busy())
    }

    fn answer(&self, request: &Request) -> Result<Response, Response> {
        let is_public = matches!(request.path.as_str(), "/" | "/metrics" | "/healthz");
        if !request.is_unix && !is_public {
            return Err(problem(404, "no such route, expected /metrics or /healthz"));
        }
        let is_known = ROUTES.iter().any(|(path, _)| *path == request.path);
        if !is_known {
            return Err(problem(404, "no such route: GET / lists them"));
        }
        if request.method != "GET" {
            return Err(method_not_allowed("GET, HEAD"));
        }
        let document = match request.path.as_str() {
            "/status" => self.status(&self.snapshot()?),
            "/exporters" => self.exporters(&self.snapshot()?),
            "/filter" => filter(&self.snapshot()?),
            "/healthz" => {
                self.snapshot()?;
                json!({"status": "ok"})
            }
            "/metrics" => return Ok(self.metrics(request, &self.snapshot()?)),
            _ => {
                let route = |(path, description): &(&str, &str)| {
                    let is_here = request.is_unix || matches!(*path, "/" | "/metrics" | "/healthz");
                    is_here
                        .then(|| json!({"method": "GET", "path": path, "description": description}))
                };
                json!({"routes": ROUTES.iter().filter_map(route).collect::<Vec<_>>()})
            }
        };
        Ok(Response::json(200, &document))
    }

    fn metrics(&self, request: &Request, snapshot: &Snapshot) -> Response {
        let format = Format::negotiate(request.accept.as_deref().unwrap_or_default());
        Response {
            status: 200,
            content_type: format.content_type(),
            headers: vec![("Vary", "Accept".to_owned())],
            body: Body::Whole(metrics_page::page(format, snapshot, &self.exporters).into_bytes()),
        }
    }

    fn status(&self, snapshot: &Snapshot) -> Value {
        let mut status = counts(&snapshot.total);
        let of_the_daemon = json!({
            "service": "collector",
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started": format!("{:.3}", self.started),
            "uptime": self.started_at.elapsed().as_secs(),
            "exporters": snapshot.exporters.len(),
            "kernel-dropped": snapshot.kernel_dropped,
            "forwarded": snapshot.forwarded.sent,
            "forward-failed": snapshot.forwarded.failed,
            "waiting": snapshot.waiting_records,
            "waiting-bytes": snapshot.waiting_bytes,
            "written-bytes": snapshot.written_bytes,
            "store-error": snapshot.store_error,
            "log-socket": snapshot.log_socket.map(|socket| json!({"sent": socket.sent, "dropped": socket.dropped})),
            "warnings": warnings(),
        });
        if let Value::Object(fields) = of_the_daemon {
            status.extend(fields);
        }
        Value::Object(status)
    }

    fn exporters(&self, snapshot: &Snapshot) -> Value {
        let known = self.exporters.templates().into_iter();
        let templates: BTreeMap<ExporterKey, Known> = known.map(|k| (k.key, k)).collect();
        let mut keys: Vec<&ExporterKey> = snapshot.exporters.keys().collect();
        // Exporters that have sent nothing since the start, but whose templates were kept.
        keys.extend(
            templates
                .keys()
                .filter(|key| !snapshot.exporters.contains_key(key)),
        );
        keys.sort_unstable();
        let describe = |key: &&ExporterKey| {
            let mut exporter = Map::new();
            exporter.insert("address".to_owned(), json!(key.address));
            exporter.insert("domain".to_owned(), json!(key.domain));
            exporter.insert("protocol".to_owned(), json!(protocol(key.version)));
            let listed = templates.get(key);
            exporter.insert(
                "templates".to_owned(),
                json!(listed.map_or(0, |listed| listed.templates)),
            );
            let empty = Counts::default();
            let account = snapshot.exporters.get(key);
            exporter.extend(counts(account.map_or(&empty, |account| &account.counts)));
            let age = |account: &Account| {
                snapshot
                    .taken
                    .saturating_duration_since(account.last_seen)
                    .as_millis() as f64
                    / 1e3
            };
            exporter.insert("rate".to_owned(), json!(account.map_or(0.0, |a| a.rate)));
            exporter.insert(
                "clock-offset".to_owned(),
                json!(
                    account
                        .and_then(|a| a.clock_offset_ms)
                        .map(|ms| ms as f64 / 1e3)
                ),
            );
            exporter.insert("last-seen".to_owned(), json!(account.map(age)));
            Value::Object(exporter)
        };
        let mut others = counts(&snapshot.others);
        others.remove("summary");
        json!({"exporters": keys.iter().map(describe).collect::<Vec<_>>(), "others": others})
    }
}

impl Handler for Routes {
    fn handle(&mut self, request: &Request) -> Response {
        self.answer(request).unwrap_or_else(|refusal| refusal)
    }
}

/// The name of a protocol.
pub fn protocol(version: u16) -> String {
    match version {
        10 => "ipfix".to_owned(),
        version => format!("v{version}"),
    }
}

/// Numbers as JSON, and those that are not zero as English text.
fn counts(counts: &Counts) -> Map<String, Value> {
    let rejected = counts.rejections().filter(|(_, _, count)| *count > 0);
    let (mut words, mut summary) = (Map::new(), Vec::new());
    for (word, text, count) in rejected {
        let word = word.strip_prefix("rejected_").unwrap_or(word);
        words.insert(word.to_owned(), count.into());
        summary.push(count_text(text, count));
    }
    let document = json!({
        "datagrams": counts.datagrams,
        "received": counts.received,
        "stored": counts.stored,
        "filtered": counts.filtered,
        "rejected": counts.rejected_total(),
        "reasons": words,
        "summary": summary,
        "lost": counts.lost,
    });
    match document {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn filter(snapshot: &Snapshot) -> Value {
    let rules = snapshot.rules.iter().map(|(rule, counts)| {
        json!({
            "rule": rule,
            "evaluations": counts.evaluations,
            "matches": counts.matches,
            "wins": counts.wins,
        })
    });
    json!({ "rules": rules.collect::<Vec<_>>(), "unmatched": snapshot.unmatched })
}
