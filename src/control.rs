//! The control socket, which `flowd-rs flows` and `flowd-rs status` query.

mod end;
pub mod routes;

use std::path::Path;

use self::routes::{ROUTES, Routes};
use crate::config;
use crate::error::{Context, Result};
use crate::http::{Handler, Listener, Request, Response, Server, problem};
use crate::sys::stop::Stop;

/// The owner and the group of the socket may connect. The group may only read.
const SOCKET_MODE: u32 = 0o660;

/// The control socket, bound.
pub struct Control {
    server: Server,
    routes: Routes,
}

impl Control {
    /// Binds the socket; see [`listen`].
    pub fn new(config: &config::ControlSocket, routes: Routes) -> Result<Option<Control>> {
        let Some(listener) = listen(config)? else {
            return Ok(None);
        };
        let server = Server::new(vec![listener]).context(|| socket_name(&config.path))?;
        Ok(Some(Control { server, routes }))
    }

    /// Answers requests until `stop` is set.
    pub fn run(mut self, stop: Stop) -> Result<()> {
        self.server
            .run(&mut ControlHandler(&mut self.routes), stop)
            .context(|| "control socket".to_owned())
    }
}

/// Binds the socket. A failure is only logged if the path is the default one: a daemon can run without the socket.
pub fn listen(config: &config::ControlSocket) -> Result<Option<Listener>> {
    match Listener::unix(&config.path, SOCKET_MODE) {
        Ok(listener) => Ok(Some(listener)),
        Err(error) if !config.given => {
            log::info!("{}: {error}; running without it", socket_name(&config.path));
            Ok(None)
        }
        Err(error) => Err(error).context(|| socket_name(&config.path)),
    }
}

fn socket_name(path: &Path) -> String {
    format!("control socket {} (controlSocket)", path.display())
}

struct ControlHandler<'a>(&'a mut Routes);

impl Handler for ControlHandler<'_> {
    fn handle(&mut self, request: &Request) -> Response {
        if request.path == end::PATH {
            return end::answer(self.0, request);
        }
        let answer = self
            .0
            .answer(request, &[&ROUTES[..], &[end::ROUTE]].concat());
        answer.unwrap_or_else(|| problem(404, "no such route: GET / lists them"))
    }
}
