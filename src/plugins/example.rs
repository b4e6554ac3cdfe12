//! The worked example of CONTRIBUTING.md: a plugin that takes lines of the pipe's grammar as datagrams on a Unix socket.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Instant;

use log::Level;

use super::named_pipe::line;
use super::{EventSender, Plugin, now};
use crate::error::{Context, Result};
use crate::logging::{LogLimit, quote};
use crate::metrics::{Metrics, Outcomes, outcomes};
use crate::registry::SharedRegistry;
use crate::sys::stop::Stop;
use crate::sys::waiter::Waiter;

outcomes! {
    enum Outcome {
        Accepted = "accepted": "accepted: {datagram|datagrams}",
        Rejected = "rejected_line": "rejected: {datagram|datagrams} without a valid line",
    }
}

/// The plugin, with its socket bound.
pub struct Datagrams {
    socket: UnixDatagram,
    waiter: Waiter,
    registry: SharedRegistry,
    counters: Outcomes<Outcome>,
    rejections: LogLimit,
}

impl Datagrams {
    /// Binds the socket, so that a path that is taken is an error before the daemon is ready.
    pub fn new(path: &Path, registry: &SharedRegistry, metrics: &Metrics) -> Result<Datagrams> {
        let what = || format!("socket {} (plugins.datagrams.path)", path.display());
        let socket = UnixDatagram::bind(path).context(what)?;
        socket.set_nonblocking(true).context(what)?;
        let waiter = Waiter::new().context(what)?;
        waiter.watch(&socket).context(what)?;
        Ok(Datagrams {
            socket,
            waiter,
            registry: registry.clone(),
            counters: metrics.plugin("datagrams"),
            rejections: LogLimit::new(Level::Warn, "datagrams: rejected lines"),
        })
    }
}

impl Plugin for Datagrams {
    fn name(&self) -> &'static str {
        "datagrams"
    }

    fn run(mut self: Box<Self>, events: EventSender, stop: Stop) -> Result<()> {
        let what = || "socket of the datagrams plugin".to_owned();
        self.waiter.watch(&stop).context(what)?;
        let mut buffer = [0; 1024];
        loop {
            // What had arrived before the stop is still taken.
            let stopping = stop.is_set();
            match self.socket.recv(&mut buffer) {
                Ok(length) => {
                    let text = &buffer[..length];
                    match line::parse(text, &self.registry.load(), now()) {
                        Ok(Some(event)) => {
                            self.counters.add(Outcome::Accepted);
                            // Waits while the queue is full; fails only when the dispatcher has ended.
                            if events.send(event).is_err() {
                                return Ok(());
                            }
                        }
                        Ok(None) => {}
                        Err(error) => {
                            self.counters.add(Outcome::Rejected);
                            let message = || format!("datagrams: {}: {error}", quote(text));
                            self.rejections.log(Instant::now(), message);
                        }
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock && stopping => return Ok(()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.waiter.wait(None).context(what)?;
                }
                Err(error) => return Err(error).context(what),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::State;
    use crate::registry::Registry;
    use crate::sys::stop::stop;

    #[test]
    fn datagrams_become_flow_events_and_bad_ones_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let registry = SharedRegistry::new(Registry::builtin());
        let metrics = Metrics::new();
        let plugin = Box::new(Datagrams::new(&path, &registry, &metrics).unwrap());
        assert!(Datagrams::new(&path, &registry, &metrics).is_err());
        let client = UnixDatagram::unbound().unwrap();
        let line = b"start tcp 192.0.2.1 1 192.0.2.2 2 atlas Staging\n";
        client.send_to(line, &path).unwrap();
        client.send_to(b"nonsense", &path).unwrap();
        let (mut switch, stop) = stop().unwrap();
        switch.set();
        let (sender, events) = crossbeam_channel::bounded(2);
        plugin
            .run(EventSender::new(sender, &metrics), stop)
            .unwrap();
        let events: Vec<_> = events.iter().collect();
        assert_eq!(events.len(), 1);
        assert_eq!(
            (events[0].state, events[0].tag().experiment),
            (State::Start, 2)
        );
        let counts = metrics.counts("plugin", "datagrams");
        let texts: Vec<&str> = counts.iter().map(|count| count.text.as_str()).collect();
        let expected = [
            "accepted: 1 datagram",
            "rejected: 1 datagram without a valid line",
        ];
        assert_eq!(texts, expected);
    }
}
