//! A UDP socket that receives fireflies and checks them against the schema.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use flowd_rs::event::FlowEvent;
use flowd_rs::firefly;
use flowd_rs::flow::Flow;
use jiff::Timestamp;
use jsonschema::Validator;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::Value;

use super::net::NetNs;
use super::{DEADLINE, wait_for};

/// A received firefly.
pub struct Received {
    pub header: String,
    pub json: Value,
    pub event: FlowEvent,
}

pub struct Sink {
    socket: UdpSocket,
}

impl Sink {
    /// Binds in a namespace, with a buffer for half a million fireflies.
    pub fn bind(ns: &NetNs, address: &str) -> Sink {
        let address: SocketAddr = address.parse().unwrap();
        ns.enter(move || Sink::bind_here(address))
    }

    pub fn bind_here(address: SocketAddr) -> Sink {
        // A child that another test has forked holds the previous socket until it calls exec.
        let socket = wait_for("the port of a sink", || match UdpSocket::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => None,
            bound => Some(bound.unwrap()),
        });
        // Fails without privileges; the default size is used then.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &(512 << 20));
        Sink { socket }
    }

    pub fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// The next datagram, if one arrives within `timeout`.
    pub fn datagram(&self, timeout: Duration) -> Option<Vec<u8>> {
        self.socket.set_read_timeout(Some(timeout)).unwrap();
        let mut buffer = [0; 65536];
        loop {
            match self.socket.recv(&mut buffer) {
                Ok(length) => return Some(buffer[..length].to_vec()),
                // The process was stopped and continued.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) => panic!("sink: {error}"),
            }
        }
    }

    /// The next firefly, checked. Panics if none arrives.
    pub fn firefly(&self) -> Received {
        let datagram = self
            .datagram(DEADLINE)
            .expect("a firefly within the deadline");
        check(&datagram)
    }

    /// Receives until `count` flows had a firefly of `state`. Panics if a flow has two of them.
    pub fn collect(&self, state: &str, count: usize) -> HashMap<Flow, FlowEvent> {
        let mut events = HashMap::new();
        let deadline = Instant::now() + DEADLINE;
        while events.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(datagram) = self.datagram(left.max(Duration::from_millis(1))) else {
                panic!(
                    "received {} of {count} fireflies of state {state}",
                    events.len()
                );
            };
            let event = firefly::decode(&datagram, Timestamp::now()).unwrap();
            if event.state.as_str() == state {
                let duplicate = events.insert(event.flow, event);
                assert!(duplicate.is_none(), "received twice: {duplicate:?}");
            }
        }
        events
    }

    /// All fireflies, until none arrives for `timeout`.
    pub fn drain(&self, timeout: Duration) -> Vec<FlowEvent> {
        let read = || self.datagram(timeout);
        std::iter::from_fn(read)
            .map(|datagram| firefly::decode(&datagram, Timestamp::now()).unwrap())
            .collect()
    }

    pub fn assert_silent(&self) {
        let datagram = self.datagram(Duration::from_millis(200));
        assert!(
            datagram.is_none(),
            "{}",
            String::from_utf8_lossy(&datagram.unwrap())
        );
    }
}

/// Checks size and schema of a firefly, and decodes it.
pub fn check(datagram: &[u8]) -> Received {
    static SCHEMA: OnceLock<Validator> = OnceLock::new();
    let schema = SCHEMA.get_or_init(|| {
        let schema = include_str!("../data/firefly.schema.json");
        let schema: Value = serde_json::from_str(schema).unwrap();
        jsonschema::options()
            .should_validate_formats(true)
            .build(&schema)
            .unwrap()
    });
    assert!(datagram.len() <= 1452, "{} bytes", datagram.len());
    let text = std::str::from_utf8(datagram).unwrap();
    let (header, json) = text.split_at(text.find('{').unwrap());
    let json: Value = serde_json::from_str(json).unwrap();
    let errors: Vec<String> = schema.iter_errors(&json).map(|e| e.to_string()).collect();
    assert!(errors.is_empty(), "{errors:?} in {json}");
    Received {
        header: header.to_owned(),
        event: firefly::decode(datagram, Timestamp::now()).unwrap(),
        json,
    }
}
