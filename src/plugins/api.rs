//! The api plugin: accepts flow events over HTTP, and lists the open flows.

mod browser;
mod flow_json;
mod openapi;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::unistd::gethostname;
use serde_json::{Value, json};

use super::{EventSender, Plugin, now};
use crate::config;
use crate::context::DaemonContext;
use crate::control::routes::{ROUTES, Routes, method_not_allowed};
use crate::error::{Context, Error, Result};
use crate::event::{FlowEvent, Origin, State};
use crate::flow::{Flow, Protocol, Tag};
use crate::http::{Handler, Listener, Request, Response, Server, problem};
use crate::metrics::{Outcomes, outcomes};
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;
use browser::OwnNames;

const NAME: &str = "api";

outcomes! {
    enum Outcome {
        Accepted = "accepted": "accepted: {event|events}",
        Invalid = "rejected_request": "rejected: invalid {request|requests}",
        Unauthorized = "rejected_token": "rejected: {request|requests} without a valid token",
        Foreign = "rejected_origin": "rejected: {request|requests} of foreign web pages",
    }
}

type Route = (&'static str, &'static str, &'static str);

/// The routes of the API that the control socket does not have.
const OWN_ROUTES: [Route; 2] = [
    ("POST", "/flow", "a flow event, or an array of them"),
    ("GET", "/openapi.json", "a description of this API"),
];

/// Those of flowd-go's test flow, with `dummyRoutes`.
const DUMMY_ROUTES: [Route; 2] = [
    (
        "GET",
        "/dummy/start",
        "starts the flow tcp [::1]:2345 > [::1]:5777 with the tag 1/2",
    ),
    ("GET", "/dummy/end", "ends that flow"),
];

/// The plugin, with its sockets bound.
pub struct Api {
    server: Server,
    routes: Routes,
    token: Option<String>,
    has_dummy_routes: bool,
    own_names: OwnNames,
    counters: Outcomes<Outcome>,
    handover: Handover,
    /// The TCP socket, for the successor.
    tcp_socket: Option<OwnedFd>,
}

impl Api {
    /// Binds the sockets and reads the token. Takes over the TCP socket `inherited` from the predecessor, with the
    /// connections that wait in its queue, if it has the configured address.
    pub fn new(
        config: &config::Api,
        context: DaemonContext,
        handover: Handover,
        inherited: Option<OwnedFd>,
    ) -> Result<Api> {
        let token = token(config)?;
        let mut listeners = Vec::new();
        let mut tcp_socket = None;
        if let Some(address) = config.bind {
            let resource = || format!("TCP {address} (plugins.api.bindAddress, bindPort)");
            let inherited = inherited.and_then(|fd| Listener::adopt_tcp(fd, address));
            let listener = inherited.map_or_else(|| Listener::tcp(address), Ok);
            let listener = listener.context(resource)?;
            tcp_socket = Some(listener.try_clone_fd().context(resource)?);
            listeners.push(listener);
        }
        if let Some((path, mode)) = &config.unix_socket {
            let listener = Listener::unix(path, *mode);
            listeners.push(
                listener.context(|| {
                    format!("Unix socket {} (plugins.api.unixSocket)", path.display())
                })?,
            );
        }
        let server = Server::new(listeners).context(|| "poll loop of the api plugin".to_owned())?;
        Ok(Api {
            server,
            token,
            has_dummy_routes: config.dummy_routes,
            own_names: OwnNames::new(&gethostname().unwrap_or_default().to_string_lossy()),
            counters: context.metrics.plugin(NAME),
            routes: Routes::new(context),
            handover,
            tcp_socket,
        })
    }
}

/// The token that requests must carry, if one is configured.
fn token(config: &config::Api) -> Result<Option<String>> {
    let Some(path) = &config.token_file else {
        return Ok(config.token.clone());
    };
    let resource = || format!("{} (plugins.api.tokenFile)", path.display());
    if config::is_writable_by_all(path) {
        return Err(Error::Failed(format!(
            "{}: {}",
            resource(),
            config::WRITABLE_BY_ALL
        )));
    }
    let content = fs::read_to_string(path).context(resource)?;
    if fs::metadata(path).is_ok_and(|found| found.mode() & 0o004 != 0) {
        log::warn!(
            "{}: every user can read the token, expected mode 0640 or stricter (chmod o-r)",
            resource()
        );
    }
    match content.trim() {
        "" => Err(Error::Failed(format!(
            "{}: empty, expected a token",
            resource()
        ))),
        token => Ok(Some(token.to_owned())),
    }
}

impl Plugin for Api {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let mut handler = ApiHandler {
            routes: self.routes,
            token: self.token,
            has_dummy_routes: self.has_dummy_routes,
            own_names: self.own_names,
            counters: self.counters,
            events,
        };
        let result = self.server.run(&mut handler, stop);
        if let Some(socket) = &self.tcp_socket {
            self.handover.leave(NAME, socket.as_fd());
        }
        result.context(|| "poll loop of the api plugin".to_owned())
    }
}

struct ApiHandler {
    routes: Routes,
    token: Option<String>,
    has_dummy_routes: bool,
    own_names: OwnNames,
    counters: Outcomes<Outcome>,
    events: EventSender,
}

impl Handler for ApiHandler {
    fn refuse(&mut self, request: &Request) -> Option<Response> {
        // The health of the daemon is not secret, and a health checker may not have the token.
        if request.path == "/healthz" {
            return None;
        }
        if let Some(refusal) = self.own_names.refuse(request, self.token.is_some()) {
            self.counters.add(Outcome::Foreign);
            return Some(refusal);
        }
        if !self.is_authorized(request) {
            self.counters.add(Outcome::Unauthorized);
            let mut response = problem(
                401,
                "expected the header Authorization: Bearer with the token of plugins.api",
            );
            response
                .headers
                .push(("WWW-Authenticate", "Bearer".to_owned()));
            return Some(response);
        }
        let is_flow = request.path == "/flow" && request.method == "POST";
        (is_flow && !browser::is_json(request)).then(|| {
            self.counters.add(Outcome::Invalid);
            problem(415, "expected the header Content-Type: application/json")
        })
    }

    fn handle(&mut self, request: &Request) -> Response {
        match (request.path.as_str(), request.method.as_str()) {
            ("/flow", "POST") => self.post_flow(request),
            ("/flow", _) => method_not_allowed("POST"),
            ("/dummy/start", "GET") if self.has_dummy_routes => self.dummy(State::Start),
            ("/dummy/end", "GET") if self.has_dummy_routes => self.dummy(State::End),
            ("/dummy/start" | "/dummy/end", _) if self.has_dummy_routes => {
                method_not_allowed("GET, HEAD")
            }
            ("/openapi.json", "GET") => {
                let registry = self.routes.registry();
                Response::json(200, &openapi::document(&registry, self.has_dummy_routes))
            }
            ("/openapi.json", _) => method_not_allowed("GET, HEAD"),
            _ => {
                let dummy: &[Route] = match self.has_dummy_routes {
                    true => &DUMMY_ROUTES,
                    false => &[],
                };
                let all = [&ROUTES[..], &OWN_ROUTES[..], dummy].concat();
                let answer = self.routes.answer(request, &all);
                answer.unwrap_or_else(|| problem(404, "no such route: GET / lists them"))
            }
        }
    }
}

impl ApiHandler {
    fn is_authorized(&self, request: &Request) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let given = request.authorization.as_deref().unwrap_or_default();
        let given = match given.split_once(' ') {
            Some((scheme, given)) if scheme.eq_ignore_ascii_case("bearer") => given.trim(),
            _ => return false,
        };
        equal_in_constant_time(token.as_bytes(), given.as_bytes())
    }

    /// Accepts all events of a request, or none.
    fn post_flow(&mut self, request: &Request) -> Response {
        let parsed = serde_json::from_slice::<Value>(&request.body)
            .map_err(|error| format!("the body is not valid JSON: {error}"))
            .and_then(|document| flow_json::events(&document, &self.routes.registry(), now()));
        match parsed {
            Ok(mut events) => {
                events
                    .iter_mut()
                    .for_each(|event| event.sender = request.peer);
                self.send(events)
            }
            Err(error) => {
                self.counters.add(Outcome::Invalid);
                problem(400, &error)
            }
        }
    }

    fn send(&mut self, events: Vec<FlowEvent>) -> Response {
        let count = events.len();
        for event in events {
            if self.events.send(event).is_err() {
                return problem(503, "the daemon is stopping");
            }
        }
        self.counters.add_many(Outcome::Accepted, count as u64);
        Response::json(200, &json!({ "accepted": count }))
    }

    /// The test flow of flowd-go's `/dummy/start` and `/dummy/end`.
    fn dummy(&mut self, state: State) -> Response {
        let endpoint = |port| ([0, 0, 0, 0, 0, 0, 0, 1].into(), port);
        let flow = Flow::new(Protocol::Tcp, endpoint(2345), endpoint(5777));
        let tag = Tag {
            experiment: 1,
            activity: 2,
        };
        match flow {
            Ok(flow) => self.send(vec![FlowEvent {
                tag: Some(tag),
                ..FlowEvent::new(state, flow, now(), Origin::Api)
            }]),
            Err(error) => problem(400, &error.to_string()),
        }
    }
}

/// Compares in a time that does not reveal how many bytes are right.
fn equal_in_constant_time(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && differences == 0
}
