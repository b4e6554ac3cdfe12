//! Looks up the addresses of a collector by name, on a thread of its own.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::privileges;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// How long after a successful look-up to look up the name again.
const REFRESH_INTERVAL: Duration = Duration::from_secs(300);
/// How long after a failed look-up, or one whose address failed, to look up the name again.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);
/// How long the start of the daemon waits for the first answer.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// The addresses of a name, kept up to date.
pub struct Resolver {
    addresses: Vec<SocketAddr>,
    answers: Receiver<io::Result<Vec<SocketAddr>>>,
    requests: Sender<()>,
}

impl Resolver {
    /// Starts looking up `host`, and waits up to a second for the first answer.
    pub fn start(host: String, port: u16) -> io::Result<Resolver> {
        let (answer, answers) = bounded(1);
        let (requests, requested) = bounded(1);
        thread::Builder::new()
            .name("resolver".to_owned())
            .spawn(move || {
                privileges::drop_all();
                look_up(&host, port, &answer, &requested);
            })?;
        let mut resolver = Resolver {
            addresses: Vec::new(),
            answers,
            requests,
        };
        if let Ok(first) = resolver.answers.recv_timeout(FIRST_ANSWER_TIMEOUT) {
            resolver.apply(first);
        }
        Ok(resolver)
    }

    /// The address to send to, if one is known. Never waits.
    pub fn address(&mut self) -> Option<SocketAddr> {
        if let Ok(answer) = self.answers.try_recv() {
            self.apply(answer);
        }
        self.addresses.first().copied()
    }

    /// Reports that sending to the address failed: switches to the next address of the name, and requests a new
    /// look-up.
    pub fn report_failure(&mut self) {
        if !self.addresses.is_empty() {
            self.addresses.rotate_left(1);
        }
        let _ = self.requests.try_send(());
    }

    /// Applies the answer of a look-up. A failed one leaves the addresses unchanged.
    fn apply(&mut self, answer: io::Result<Vec<SocketAddr>>) {
        match answer {
            Ok(addresses) => self.addresses = addresses,
            Err(error) => log::warn!("collector: {error}"),
        }
    }
}

/// Looks up the name until the [`Resolver`] is dropped. Sends an answer only if it differs from the last one.
fn look_up(
    host: &str,
    port: u16,
    answer: &Sender<io::Result<Vec<SocketAddr>>>,
    requested: &Receiver<()>,
) {
    let mut known = Vec::new();
    let mut is_failing = false;
    loop {
        let began = Instant::now();
        let found = (host, port)
            .to_socket_addrs()
            .map(Iterator::collect::<Vec<_>>);
        let wait = if found.is_ok() {
            REFRESH_INTERVAL
        } else {
            RETRY_INTERVAL
        };
        // The order of the addresses may differ between answers: compare them sorted.
        let change = match found {
            Ok(addresses) => {
                is_failing = false;
                let mut sorted = addresses.clone();
                sorted.sort();
                let is_new = sorted != known;
                known = sorted;
                is_new.then_some(Ok(addresses))
            }
            Err(error) => {
                let message = format!("the name {host} cannot be resolved: {error}");
                let is_new = !std::mem::replace(&mut is_failing, true);
                is_new.then(|| Err(io::Error::new(error.kind(), message)))
            }
        };
        if change.is_some_and(|change| answer.send(change).is_err()) {
            return;
        }
        match requested.recv_timeout(wait) {
            Ok(()) => thread::sleep(RETRY_INTERVAL.saturating_sub(began.elapsed())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
