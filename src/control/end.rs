//! `POST /flows/end`: ends open flows. Only the control socket has this route, and not all who may use the socket may
//! use the route.

use crossbeam_channel::Sender;
use nix::unistd::Uid;
use serde_json::json;

use super::routes::{DISPATCHER_TIMEOUT, Routes, busy, method_not_allowed, parse_filter};
use crate::dispatcher::{self, Filter, Query, SHARDS};
use crate::event;
use crate::http::{Body, Request, Response, problem};

/// The path of the route.
pub const PATH: &str = "/flows/end";

/// The route for `GET /`.
pub const ROUTE: (&str, &str, &str) = (
    "POST",
    PATH,
    "ends the open flows, filtered by ?experiment= and ?address=; for root and the daemon's user",
);

/// Ends the flows that the request selects.
pub fn answer(routes: &Routes, request: &Request) -> Response {
    if request.method != "POST" {
        return method_not_allowed("POST");
    }
    let Some(user) = permitted(request.peer, Uid::effective()) else {
        return problem(403, "expected root or the user that the daemon runs as");
    };
    let filter = match parse_filter(&request.query, &routes.registry()) {
        Ok(filter) => filter,
        Err(error) => return problem(400, &error),
    };
    let mut progress = Progress {
        queries: routes.queries(),
        filter,
        user,
        shard: 0,
        ended: 0,
        is_done: false,
    };
    // The dispatcher answers now, or the request fails before its response begins.
    if progress.step().is_err() {
        return busy();
    }
    Response {
        status: 200,
        content_type: "application/json",
        headers: Vec::new(),
        body: Body::Parts(Box::new(progress)),
    }
}

/// The user of the client, if it may end flows: root, or the user of the daemon.
fn permitted(peer: Option<event::Sender>, daemon: Uid) -> Option<Uid> {
    match peer {
        Some(event::Sender::User(user)) => {
            Some(Uid::from_raw(user)).filter(|user| user.is_root() || *user == daemon)
        }
        _ => None,
    }
}

/// The body of the response. Each part ends some flows, so that the dispatcher and this thread do other work in between.
/// If the client goes away, the rest stay open.
struct Progress {
    queries: Sender<Query>,
    filter: Filter,
    user: Uid,
    shard: usize,
    ended: usize,
    is_done: bool,
}

impl Progress {
    /// Ends some flows of the shard. An error if the dispatcher does not answer.
    fn step(&mut self) -> Result<(), ()> {
        let query = |reply| Query::End(self.shard, self.filter, reply);
        let ended = dispatcher::ask(&self.queries, DISPATCHER_TIMEOUT, query).ok_or(())?;
        self.ended += ended;
        self.shard += usize::from(ended == 0);
        Ok(())
    }
}

impl Iterator for Progress {
    type Item = Vec<u8>;

    /// A space, which shows the client that flows are being ended, then the JSON document.
    fn next(&mut self) -> Option<Vec<u8>> {
        if self.is_done {
            return None;
        }
        let mut document = json!({});
        if self.shard < SHARDS {
            if self.step().is_ok() {
                return Some(b" ".to_vec());
            }
            document["error"] = "the dispatcher did not answer in time; flows are left".into();
        }
        self.is_done = true;
        document["ended"] = self.ended.into();
        Some(format!("{document}\n").into_bytes())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let (user, ended) = (self.user, self.ended);
        log::info!("flows ended by user id {user} (flowd-rs flows end): {ended}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Sender::{Address, User};

    #[test]
    fn only_root_and_the_user_of_the_daemon_end_flows() {
        let daemon = Uid::from_raw(990);
        for (peer, expected) in [
            (Some(User(0)), Some(0)),
            (Some(User(990)), Some(990)),
            (Some(User(1000)), None),
            (Some(Address([127, 0, 0, 1].into())), None),
            (None, None),
        ] {
            let permitted = permitted(peer, daemon);
            assert_eq!(permitted, expected.map(Uid::from_raw), "{peer:?}");
        }
    }
}
