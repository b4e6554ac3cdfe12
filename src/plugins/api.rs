//! The API plugin: flow events by HTTP, and a view of the open flows.

mod flow_json;
mod openapi;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};

use serde_json::{Value, json};

use super::{EventSender, Plugin, now};
use crate::config;
use crate::error::{Context, Error, Result};
use crate::flow::{Flow, FlowEvent, Origin, Protocol, State, Tag};
use crate::http::{Handler, Listener, Request, Response, Server, problem};
use crate::metrics::{Outcomes, outcomes};
use crate::routes::{ROUTES, Routes, Sources, method_not_allowed};
use crate::sys::handover::Handover;
use crate::sys::stop::Stop;

const NAME: &str = "api";

outcomes! {
    enum Outcome {
        Accepted = "accepted",
        Invalid = "invalid",
        Unauthorized = "unauthorized",
    }
}

/// The routes that the API has and the control socket has not.
const OWN_ROUTES: [(&str, &str, &str); 4] = [
    ("POST", "/flow", "a flow event, or an array of them"),
    (
        "GET",
        "/dummy/start",
        "starts the flow tcp [::1]:2345 > [::1]:5777 with the tag 1/2",
    ),
    ("GET", "/dummy/end", "ends it"),
    ("GET", "/openapi.json", "a description of this API"),
];

/// The plugin, with its sockets bound.
pub struct Api {
    server: Server,
    routes: Routes,
    token: Option<String>,
    counters: Outcomes<Outcome>,
    handover: Handover,
    /// The TCP socket, for whoever takes over.
    bound: Option<OwnedFd>,
}

impl Api {
    /// Binds the sockets, or takes over that of the API before this one with who waits there, and reads the
    /// token.
    pub fn new(
        config: &config::Api,
        sources: Sources,
        handover: Handover,
        inherited: Option<OwnedFd>,
    ) -> Result<Api> {
        let mut listeners = Vec::new();
        let mut bound = None;
        if let Some(address) = config.bind {
            let what = || format!("TCP {address} (plugins.api.bindAddress, bindPort)");
            let inherited = inherited.and_then(|fd| Listener::adopt_tcp(fd, address));
            let listener = inherited.map_or_else(|| Listener::tcp(address), Ok);
            let listener = listener.context(what)?;
            bound = Some(listener.try_clone_fd().context(what)?);
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
        let server = Server::new(listeners).context(|| "poll loop of the API".to_owned())?;
        Ok(Api {
            server,
            token: token(config)?,
            counters: sources.metrics.plugin(NAME),
            routes: Routes::new(sources),
            handover,
            bound,
        })
    }
}

/// The token that requests must bear.
fn token(config: &config::Api) -> Result<Option<String>> {
    let Some(path) = &config.token_file else {
        return Ok(config.token.clone());
    };
    let what = || format!("{} (plugins.api.tokenFile)", path.display());
    if config::is_writable_by_all(path) {
        return Err(Error::Failed(format!(
            "{}: {}",
            what(),
            config::WRITABLE_BY_ALL
        )));
    }
    let content = fs::read_to_string(path).context(what)?;
    match content.trim() {
        "" => Err(Error::Failed(format!(
            "{}: empty, expected a token",
            what()
        ))),
        token => Ok(Some(token.to_owned())),
    }
}

impl Plugin for Api {
    fn name(&self) -> &'static str {
        NAME
    }

    fn run(self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let mut answers = Answers {
            routes: self.routes,
            token: self.token,
            counters: self.counters,
            events,
        };
        let result = self.server.run(&mut answers, stop);
        if let Some(bound) = &self.bound {
            self.handover.leave(NAME, bound.as_fd());
        }
        result.context(|| "poll loop of the API".to_owned())
    }
}

struct Answers {
    routes: Routes,
    token: Option<String>,
    counters: Outcomes<Outcome>,
    events: EventSender,
}

impl Handler for Answers {
    fn handle(&mut self, request: &Request) -> Response {
        // Whether the daemon lives is no secret, and who asks may have none.
        if request.path != "/healthz" && !self.is_authorized(request) {
            self.counters.add(Outcome::Unauthorized);
            let mut response = problem(
                401,
                "expected the header Authorization: Bearer with the token of plugins.api",
            );
            response
                .headers
                .push(("WWW-Authenticate", "Bearer".to_owned()));
            return response;
        }
        match (request.path.as_str(), request.method.as_str()) {
            ("/flow", "POST") => self.take(&request.body),
            ("/flow", _) => method_not_allowed("POST"),
            ("/dummy/start", "GET") => self.dummy(State::Start),
            ("/dummy/end", "GET") => self.dummy(State::End),
            ("/openapi.json", "GET") => {
                Response::json(200, &openapi::document(&self.routes.registry()))
            }
            ("/dummy/start" | "/dummy/end" | "/openapi.json", _) => method_not_allowed("GET, HEAD"),
            _ => {
                let all = [&ROUTES[..], &OWN_ROUTES[..]].concat();
                let answer = self.routes.answer(request, &all);
                answer.unwrap_or_else(|| problem(404, "no such route: GET / lists them"))
            }
        }
    }
}

impl Answers {
    fn is_authorized(&self, request: &Request) -> bool {
        let Some(token) = &self.token else {
            return true;
        };
        let given = request.authorization.as_deref().unwrap_or_default();
        let given = match given.split_once(' ') {
            Some((scheme, given)) if scheme.eq_ignore_ascii_case("bearer") => given.trim(),
            _ => return false,
        };
        same(token.as_bytes(), given.as_bytes())
    }

    /// All events of a request, or none.
    fn take(&mut self, body: &[u8]) -> Response {
        let parsed = serde_json::from_slice::<Value>(body)
            .map_err(|error| format!("the body is no JSON: {error}"))
            .and_then(|document| flow_json::events(&document, &self.routes.registry(), now()));
        match parsed {
            Ok(events) => self.send(events),
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

    /// flowd-go's.
    fn dummy(&mut self, state: State) -> Response {
        let end = |port| ([0, 0, 0, 0, 0, 0, 0, 1].into(), port);
        let flow = Flow::new(Protocol::Tcp, end(2345), end(5777));
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

/// Compares in a time that does not tell how much of it is right.
fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    a.len() == b.len() && differences == 0
}
