//! The address of a collector given by name, looked up by a thread of its own.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

use super::privileges;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// How long a found address is good for.
const REFRESH: Duration = Duration::from_secs(300);
/// How soon a name that was not found, or whose address failed, is looked up again.
const RETRY: Duration = Duration::from_secs(10);
/// How long the start of the daemon waits for the first answer.
const FIRST: Duration = Duration::from_secs(1);

/// A name and the addresses it last had.
pub struct Resolver {
    addresses: Vec<SocketAddr>,
    answers: Receiver<io::Result<Vec<SocketAddr>>>,
    again: Sender<()>,
}

impl Resolver {
    /// Starts looking up `host`, and waits up to a second for the first answer.
    pub fn start(host: String, port: u16) -> io::Result<Resolver> {
        let (answer, answers) = bounded(1);
        let (again, asked) = bounded(1);
        thread::Builder::new()
            .name("resolver".to_owned())
            .spawn(move || {
                privileges::keep_none();
                look_up(&host, port, &answer, &asked);
            })?;
        let mut resolver = Resolver {
            addresses: Vec::new(),
            answers,
            again,
        };
        if let Ok(first) = resolver.answers.recv_timeout(FIRST) {
            resolver.take(first);
        }
        Ok(resolver)
    }

    /// The address to send to, if the name has any. Never waits.
    pub fn address(&mut self) -> Option<SocketAddr> {
        if let Ok(answer) = self.answers.try_recv() {
            self.take(answer);
        }
        self.addresses.first().copied()
    }

    /// Says that the address did not work: goes on to the name's next one, and asks again.
    pub fn failed(&mut self) {
        if !self.addresses.is_empty() {
            self.addresses.rotate_left(1);
        }
        let _ = self.again.try_send(());
    }

    /// A failed look-up leaves the addresses as they were.
    fn take(&mut self, answer: io::Result<Vec<SocketAddr>>) {
        match answer {
            Ok(addresses) => self.addresses = addresses,
            Err(error) => log::warn!("collector: {error}"),
        }
    }
}

/// Ends when the [`Resolver`] is dropped.
fn look_up(
    host: &str,
    port: u16,
    answer: &Sender<io::Result<Vec<SocketAddr>>>,
    asked: &Receiver<()>,
) {
    let mut known = Vec::new();
    let mut failing = false;
    loop {
        let began = Instant::now();
        let found = (host, port)
            .to_socket_addrs()
            .map(Iterator::collect::<Vec<_>>);
        let wait = if found.is_ok() { REFRESH } else { RETRY };
        // The order may change from answer to answer: only other addresses are news.
        let news = match found {
            Ok(addresses) => {
                failing = false;
                let mut sorted = addresses.clone();
                sorted.sort();
                let news = sorted != known;
                known = sorted;
                news.then_some(Ok(addresses))
            }
            Err(error) => {
                let message = format!("the name {host} cannot be resolved: {error}");
                let news = !std::mem::replace(&mut failing, true);
                news.then(|| Err(io::Error::new(error.kind(), message)))
            }
        };
        if news.is_some_and(|news| answer.send(news).is_err()) {
            return;
        }
        match asked.recv_timeout(wait) {
            Ok(()) => thread::sleep(RETRY.saturating_sub(began.elapsed())),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
