//! The read-only HTTP routes of the control socket and the API: open flows, registry, status and health.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use form_urlencoded as query;
use ipnet::IpNet;
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};

use crate::context::DaemonContext;
use crate::dispatcher::flow_table::OpenFlow;
use crate::dispatcher::{self, Filter, Position, Query};
use crate::flow::{Endpoint, Flow, Protocol, Tag, parse_address};
use crate::http::{Body, Request, Response, problem};
use crate::logging;
use crate::metrics::Count;
use crate::registry::Registry;
use crate::scitag::{self, Labeller};
use crate::sys::interfaces;

/// How long to wait for an answer of the dispatcher.
pub(super) const DISPATCHER_TIMEOUT: Duration = Duration::from_millis(900);
/// The parts of a listing, except the last, have at least this many bytes.
const LISTING_CHUNK_SIZE: usize = 64 << 10;

/// Method, path and description of the routes, for `GET /`.
pub const ROUTES: [(&str, &str, &str); 6] = [
    ("GET", "/", "this list"),
    (
        "GET",
        "/flows",
        "the open flows, filtered by ?experiment= and ?address=",
    ),
    ("GET", "/flows/{id}", "one open flow"),
    ("GET", "/registry", "the SciTags registry in use"),
    ("GET", "/status", "the daemon's counters"),
    ("GET", "/healthz", "whether the daemon works"),
];

/// Answers requests for the [`ROUTES`].
pub struct Routes {
    context: DaemonContext,
    /// For the uptime, which must not jump with the clock.
    started: Instant,
}

impl Routes {
    /// The routes of a daemon that starts now.
    pub fn new(context: DaemonContext) -> Routes {
        Routes {
            context,
            started: Instant::now(),
        }
    }

    /// The registry in use.
    pub fn registry(&self) -> Arc<Registry> {
        self.context.registry.load()
    }

    /// Requests to the dispatcher.
    pub(super) fn queries(&self) -> Sender<Query> {
        self.context.queries.clone()
    }

    /// The answer to a request for one of the [`ROUTES`]; `None` if the path is not among them.
    pub fn answer(&mut self, request: &Request, routes: &[(&str, &str, &str)]) -> Option<Response> {
        type Answer = fn(&mut Routes, &Request) -> Response;
        let answer: Answer = match request.path.as_str() {
            "/" => {
                let list = |(method, path, description): &(&str, &str, &str)| json!({"method": method, "path": path, "description": description});
                let list: Vec<Value> = routes.iter().map(list).collect();
                return Some(get(request, || {
                    Response::json(200, &json!({ "routes": list }))
                }));
            }
            "/flows" => Routes::flows,
            "/registry" => |routes, _| Response::json(200, &routes.registry().to_json()),
            "/status" => |routes, _| Response::json(200, &routes.status()),
            "/healthz" => |routes, _| routes.health(),
            path if path.starts_with("/flows/") => Routes::flow,
            _ => return None,
        };
        Some(get(request, || answer(self, request)))
    }

    fn ask<T>(&self, query: impl FnOnce(Sender<T>) -> Query) -> Option<T> {
        dispatcher::ask(&self.context.queries, DISPATCHER_TIMEOUT, query)
    }

    fn health(&self) -> Response {
        let nobody = Flow {
            protocol: Protocol::Tcp,
            source: Endpoint {
                address: [127, 0, 0, 1].into(),
                port: 0,
            },
            destination: Endpoint {
                address: [127, 0, 0, 1].into(),
                port: 0,
            },
        };
        match self.ask(|reply| Query::Flow(nobody, reply)) {
            Some(_) => Response::json(200, &json!({"status": "ok"})),
            None => busy(),
        }
    }

    fn flow(&mut self, request: &Request) -> Response {
        let id = request.path.strip_prefix("/flows/").unwrap_or_default();
        let id = percent_decode_str(id).decode_utf8_lossy();
        let Some(flow) = flow_of_id(&id) else {
            return problem(
                404,
                "no such flow: an id is protocol,source,port,destination,port as in GET /flows",
            );
        };
        match self.ask(|reply| Query::Flow(flow, reply)) {
            None => busy(),
            Some(None) => problem(404, "no such flow is open"),
            Some(Some((flow, open))) => {
                let mut body = Vec::new();
                self.describer().describe(&mut body, &flow, &open);
                body.push(b'\n');
                Response {
                    status: 200,
                    content_type: "application/json",
                    headers: Vec::new(),
                    body: Body::Whole(body),
                }
            }
        }
    }

    fn flows(&mut self, request: &Request) -> Response {
        let filter = match parse_filter(&request.query, &self.registry()) {
            Ok(filter) => filter,
            Err(error) => return problem(400, &error),
        };
        let Some(first) = self.ask(|reply| Query::Flows(Position::default(), filter, reply)) else {
            return busy();
        };
        let listing = Listing {
            queries: self.context.queries.clone(),
            describer: self.describer(),
            filter,
            flows: first.flows.into_iter(),
            next: first.next,
            state: ListingState::Begin,
        };
        Response {
            status: 200,
            content_type: "application/json",
            headers: Vec::new(),
            body: Body::Parts(Box::new(listing)),
        }
    }

    /// With the current addresses of this host: a label depends on which end of the flow is local.
    fn describer(&self) -> Describer {
        let addresses = interfaces::list().map(|(_, addresses)| addresses);
        Describer {
            registry: self.registry(),
            labeller: self.context.active.load().labeller.clone(),
            local: addresses.unwrap_or_default(),
            now: Timestamp::now(),
            names: HashMap::new(),
        }
    }

    fn status(&self) -> Value {
        let samples = self.context.metrics.samples();
        let counts = |kind, name: &str| counts(self.context.metrics.counts(kind, name));
        let parts = |kind: &'static str, names: &[&str]| -> Vec<Value> {
            let part = |name: &&str| {
                let (events, summary) = counts(kind, name);
                json!({"name": name, "events": events, "summary": summary})
            };
            names.iter().map(part).collect()
        };
        let value = |name: &str| samples.iter().find(|s| s.name == name).map(|s| s.value);
        let queues: Vec<Value> = samples
            .iter()
            .filter(|s| s.name == "flowd_queue_depth")
            .map(|depth| {
                let high = samples
                    .iter()
                    .find(|s| s.name == "flowd_queue_high_water" && s.labels == depth.labels);
                json!({
                    "name": depth.label("queue"), "depth": depth.value, "high-water": high.map(|s| s.value),
                })
            })
            .collect();
        let [dispatcher, journal, registry] =
            ["dispatcher", "journal", "registry"].map(|kind| counts(kind, ""));
        let active = self.context.active.load();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "started": format!("{:.3}", self.context.started),
            "uptime": self.started.elapsed().as_secs(),
            "flows-open": value("flowd_flows_open"),
            "plugins": parts("plugin", &active.plugins),
            "backends": parts("backend", &active.backends),
            "enrichers": parts("enricher", &active.enrichers),
            "dispatcher": {"events": dispatcher.0, "summary": dispatcher.1},
            "journal": {"events": journal.0, "summary": journal.1},
            "registry": {"events": registry.0, "summary": registry.1},
            "queues": queues,
            "ongoing-dropped": value("flowd_ongoing_dropped_total"),
            "warnings": warnings(),
        })
    }
}

/// The last warnings and errors of the log.
pub fn warnings() -> Vec<Value> {
    let warning = |warning: &logging::LoggedWarning| {
        json!({
            "time": format!("{:.3}", warning.time),
            "level": warning.level.as_str().to_lowercase(),
            "message": warning.message,
        })
    };
    logging::warnings().iter().map(warning).collect()
}

/// The counts by outcome, and the same as English text.
fn counts(counts: Vec<Count>) -> (Map<String, Value>, Vec<String>) {
    let count = |count: Count| ((count.outcome.to_owned(), count.count.into()), count.text);
    counts.into_iter().map(count).unzip()
}

/// Answers GET (and HEAD, see [`Request::method`]) only.
fn get(request: &Request, answer: impl FnOnce() -> Response) -> Response {
    match request.method.as_str() {
        "GET" => answer(),
        _ => method_not_allowed("GET, HEAD"),
    }
}

/// 405, with the methods that are allowed: `GET, HEAD`.
pub fn method_not_allowed(allowed: &str) -> Response {
    let mut response = problem(405, &format!("expected {allowed}"));
    response.headers.push(("Allow", allowed.to_owned()));
    response
}

pub(super) fn busy() -> Response {
    problem(503, "the dispatcher did not answer in time")
}

/// Reads the parameters of a listing.
pub(super) fn parse_filter(text: &str, registry: &Registry) -> Result<Filter, String> {
    let mut filter = Filter::default();
    for (key, value) in query::parse(text.as_bytes()) {
        match &*key {
            "experiment" => {
                let id = registry
                    .experiment_id(&value)
                    .or_else(|| value.parse().ok());
                let id = id.ok_or_else(|| {
                        format!("experiment: \"{}\" is neither an id of 0 to 65535 nor a name of the registry", value.escape_debug())
                    })?;
                filter.experiment = Some(id);
            }
            "address" => {
                let whole = parse_address(&value).map(|a| IpNet::from(a.to_canonical()));
                let net = whole.or_else(|| value.parse().ok()).ok_or_else(|| {
                    format!(
                        "address: \"{}\" is neither an address nor a prefix",
                        value.escape_debug()
                    )
                })?;
                filter.address = Some(net);
            }
            _ => {
                return Err(format!(
                    "unknown parameter \"{}\", expected experiment or address",
                    key.escape_debug()
                ));
            }
        }
    }
    Ok(filter)
}

/// Describes flows as JSON.
struct Describer {
    registry: Arc<Registry>,
    labeller: Option<Labeller>,
    local: HashSet<IpAddr>,
    now: Timestamp,
    /// The names of tags that were described before.
    names: HashMap<Tag, (String, String)>,
}

impl Describer {
    /// Appends the JSON of a flow to `out`.
    fn describe(&mut self, out: &mut Vec<u8>, flow: &Flow, open: &OpenFlow) {
        let outgoing = interfaces::outgoing(flow, &self.local);
        let marked = outgoing.source.address.is_ipv6() && scitag::fits(open.tag);
        let label = self.labeller.as_ref().filter(|_| marked);
        let registry = &self.registry;
        let names = self.names.entry(open.tag);
        let (experiment, activity) = names.or_insert_with(|| registry.names(open.tag));
        let age = self.now.duration_since(open.start_time()).as_millis();
        let described = Described {
            id: Id(flow),
            state: open.state.as_str(),
            protocol: flow.protocol.as_str(),
            src_ip: flow.source.address,
            src_port: flow.source.port,
            dst_ip: flow.destination.address,
            dst_port: flow.destination.port,
            experiment_id: open.tag.experiment,
            activity_id: open.tag.activity,
            experiment,
            activity,
            start_time: Rfc3339(open.start_time()),
            age: age.max(0) as f64 / 1000.0,
            origin: open.origin.as_str(),
            application: open.application.as_deref(),
            label: label.map(|labeller| labeller.label(&outgoing, open.tag)),
        };
        // Writing to a Vec cannot fail, and all keys are strings.
        let _ = serde_json::to_writer(out, &described);
    }
}

/// A flow as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Described<'a> {
    #[serde(serialize_with = "as_text")]
    id: Id<'a>,
    state: &'a str,
    protocol: &'a str,
    src_ip: IpAddr,
    src_port: u16,
    dst_ip: IpAddr,
    dst_port: u16,
    experiment_id: u16,
    activity_id: u16,
    experiment: &'a str,
    activity: &'a str,
    #[serde(serialize_with = "as_text")]
    start_time: Rfc3339,
    age: f64,
    origin: &'a str,
    application: Option<&'a str>,
    label: Option<u32>,
}

fn as_text<S: Serializer>(value: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// A time as in RFC 3339, to the microsecond.
struct Rfc3339(Timestamp);

impl Display for Rfc3339 {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}", self.0)
    }
}

/// The id of a flow in a path: its 5-tuple, separated by commas.
struct Id<'a>(&'a Flow);

impl Display for Id<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (source, destination) = (self.0.source, self.0.destination);
        write!(
            f,
            "{},{},{},{},{}",
            self.0.protocol.as_str(),
            source.address,
            source.port,
            destination.address,
            destination.port
        )
    }
}

fn flow_of_id(id: &str) -> Option<Flow> {
    let mut fields = id.split(',');
    let protocol = Protocol::from_word(fields.next()?)?;
    let mut end = || Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?));
    let (source, destination) = (end()?, end()?);
    fields.next().is_none().then_some(())?;
    Flow::new(protocol, source, destination).ok()
}

enum ListingState {
    Begin,
    First,
    Later,
    Done,
}

/// The body of `GET /flows`, produced in parts. It asks the dispatcher for one shard after the other, so that neither
/// holds a copy of the whole table, and a slow client costs nothing.
struct Listing {
    queries: Sender<Query>,
    describer: Describer,
    filter: Filter,
    flows: std::vec::IntoIter<(Flow, OpenFlow)>,
    /// The rest of the list; `None` if there is none.
    next: Option<Position>,
    state: ListingState,
}

impl Listing {
    /// The next flow, of this page or a later one. An error if the dispatcher does not answer.
    fn next_flow(&mut self) -> Result<Option<(Flow, OpenFlow)>, ()> {
        loop {
            if let Some(flow) = self.flows.next() {
                return Ok(Some(flow));
            }
            let Some(position) = self.next else {
                return Ok(None);
            };
            let query = |reply| Query::Flows(position, self.filter, reply);
            let page = dispatcher::ask(&self.queries, DISPATCHER_TIMEOUT, query).ok_or(())?;
            self.flows = page.flows.into_iter();
            self.next = page.next;
        }
    }
}

impl Iterator for Listing {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut part = Vec::with_capacity(2 * LISTING_CHUNK_SIZE);
        match self.state {
            ListingState::Begin => {
                part.extend_from_slice(b"{\"flows\":[");
                self.state = ListingState::First;
            }
            ListingState::Done => return None,
            _ => {}
        }
        while part.len() < LISTING_CHUNK_SIZE {
            match self.next_flow() {
                Ok(Some((flow, open))) => {
                    let is_first = matches!(self.state, ListingState::First);
                    self.state = ListingState::Later;
                    part.extend_from_slice(if is_first { b"\n" } else { b",\n" });
                    self.describer.describe(&mut part, &flow, &open);
                }
                Ok(None) => {
                    self.state = ListingState::Done;
                    part.extend_from_slice(b"\n]}\n");
                    break;
                }
                Err(()) => {
                    // The status line is sent: what is left is a document that no client takes for complete.
                    log::warn!("GET /flows: the dispatcher does not answer; the list is cut off");
                    self.state = ListingState::Done;
                    break;
                }
            }
        }
        Some(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_of_a_flow_is_parsed_back() {
        for text in [
            "tcp,2001:db8::1,40001,2001:db8::2,443",
            "udp,192.0.2.1,0,192.0.2.2,65535",
        ] {
            assert_eq!(Id(&flow_of_id(text).unwrap()).to_string(), text);
        }
        for text in [
            "",
            "tcp",
            "tcp,192.0.2.1,1,192.0.2.2",
            "tcp,192.0.2.1,1,192.0.2.2,2,3",
            "tcp,192.0.2.1,1,::1,2",
        ] {
            assert_eq!(flow_of_id(text), None, "{text}");
        }
    }

    #[test]
    fn filters() {
        let registry = Registry::builtin();
        let admits = |query: &str| {
            let flow = flow_of_id("tcp,2001:db8::1,1,2001:db8::2,2").unwrap();
            let tag = Tag {
                experiment: 2,
                activity: 9,
            };
            parse_filter(query, &registry).map(|filter| filter.admits(&flow, tag))
        };
        for good in [
            "",
            "experiment=2",
            "experiment=ATLAS",
            "address=2001:db8::2",
            "address=2001%3Adb8::/32&experiment=atlas",
        ] {
            assert_eq!(admits(good), Ok(true), "{good}");
        }
        for other in [
            "experiment=cms",
            "address=192.0.2.1",
            "address=2001:db8:1::/48",
        ] {
            assert_eq!(admits(other), Ok(false), "{other}");
        }
        for wrong in ["experiment=nobody", "address=host", "address=", "limit=3"] {
            assert!(admits(wrong).is_err(), "{wrong}");
        }
    }
}
