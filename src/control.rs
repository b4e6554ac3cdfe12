//! The control socket: what `flowd-rs flows` and `flowd-rs status` ask.

use std::path::Path;

use crate::config;
use crate::error::{Context, Result};
use crate::http::{Handler, Listener, Request, Response, Server, problem};
use crate::routes::{ROUTES, Routes};
use crate::sys::stop::Stop;

/// Its owner and its group may ask.
const MODE: u32 = 0o660;

/// The control socket, bound.
pub struct Control {
    server: Server,
    routes: Routes,
}

impl Control {
    /// Binds the socket. At the default path a failure is only logged: the daemon works without.
    pub fn new(config: &config::ControlSocket, routes: Routes) -> Result<Option<Control>> {
        let server = Listener::unix(&config.path, MODE).and_then(|l| Server::new(vec![l]));
        match server {
            Ok(server) => Ok(Some(Control { server, routes })),
            Err(error) if !config.given => {
                log::info!(
                    "{}: {error}; running without a control socket (controlSocket)",
                    config.path.display()
                );
                Ok(None)
            }
            Err(error) => Err(error).context(|| what(&config.path)),
        }
    }

    /// Answers until it is time to stop.
    pub fn run(mut self, stop: Stop) -> Result<()> {
        self.server
            .run(&mut ReadOnly(&mut self.routes), stop)
            .context(|| "control socket".to_owned())
    }
}

fn what(path: &Path) -> String {
    format!("control socket {} (controlSocket)", path.display())
}

struct ReadOnly<'a>(&'a mut Routes);

impl Handler for ReadOnly<'_> {
    fn handle(&mut self, request: &Request) -> Response {
        let answer = self.0.answer(request, &ROUTES);
        answer.unwrap_or_else(|| problem(404, "no such route: GET / lists them"))
    }
}
