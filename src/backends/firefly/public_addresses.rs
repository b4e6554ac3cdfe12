//! The public addresses behind which private ones of this host are seen: discovered by HTTP services and STUN servers
//! (RFC 8489), in the background.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use crossbeam_channel::{Receiver, Sender, TryRecvError, after, bounded, select};
use stun_types::attribute::XorMappedAddress;
use stun_types::message::{BINDING, Message, MessageWriteVec};
use stun_types::prelude::*;
use ureq::config::IpFamily;

use crate::config::Stun;
use crate::flow::special_networks::is_public;
use crate::sys::http_client::agent_for_family;
use crate::sys::{interfaces, privileges};

/// How long an HTTP service may take to answer.
const HTTP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for a STUN server's answer, for each of three requests: datagrams may be lost.
const STUN_TIMEOUTS: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
/// How often addresses are discovered again, if nothing changes on this host.
const REFRESH_INTERVAL: Duration = Duration::from_secs(3600);
/// The same, if no service has answered.
const RETRY_INTERVAL: Duration = Duration::from_secs(600);
/// Pause after a change of addresses: they change in groups.
const SETTLE_DELAY: Duration = Duration::from_secs(1);

/// Addresses of this host, and the public addresses that they map to.
pub type Mapping = BTreeMap<IpAddr, IpAddr>;

/// A step of the discovery, as text for people.
pub struct Step(String);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Discovers the public address of the default interface's private one, for each address family, until `stopped`
/// returns true. `report` receives each step. Returns the mapping, and whether no service has answered for an address;
/// such an address keeps its `known` mapping.
pub fn discover(
    settings: &Stun,
    known: &Mapping,
    stopped: &dyn Fn() -> bool,
    mut report: impl FnMut(Step),
) -> (Mapping, bool) {
    let (mut mapping, mut missing) = (settings.manual.clone(), false);
    for (address, public) in &mapping {
        report(Step(format!(
            "{address}: maps to {public} by manualMapping"
        )));
    }
    for (name, family) in [("IPv4", IpFamily::Ipv4Only), ("IPv6", IpFamily::Ipv6Only)] {
        let private = match default_address(family) {
            Ok(address) => address,
            Err(error) => {
                report(Step(format!("{name}: no default route: {error}")));
                continue;
            }
        };
        if mapping.contains_key(&private) {
            continue;
        }
        if is_public(private) {
            report(Step(format!("{name}: {private} is public")));
            continue;
        }
        report(Step(format!(
            "{name}: {private} is not publicly routable; looking up its public address"
        )));
        let found = look_up(settings, private, family, stopped, &mut report);
        missing |= found.is_none();
        let public = found.or_else(|| known.get(&private).copied());
        mapping.extend(public.map(|public| (private, public)));
    }
    (mapping, missing)
}

/// The source address of packets to the Internet.
fn default_address(family: IpFamily) -> io::Result<IpAddr> {
    // Nothing is sent: the kernel only looks up the route.
    let (any, remote): (IpAddr, IpAddr) = match family {
        IpFamily::Ipv6Only => (
            Ipv6Addr::UNSPECIFIED.into(),
            Ipv6Addr::new(0x2606, 0x4700, 0x4700, 0, 0, 0, 0, 0x1111).into(),
        ),
        _ => (
            Ipv4Addr::UNSPECIFIED.into(),
            Ipv4Addr::new(1, 1, 1, 1).into(),
        ),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((remote, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// Queries the services in turn until one returns a possible public address.
fn look_up(
    settings: &Stun,
    private: IpAddr,
    family: IpFamily,
    stopped: &dyn Fn() -> bool,
    report: &mut impl FnMut(Step),
) -> Option<IpAddr> {
    let http = settings
        .http_services
        .iter()
        .map(|url| (url.clone(), Service::Http(url)));
    let stun = settings.stun_servers.iter();
    let stun = stun.map(|(host, port)| {
        (
            format!("STUN {host} port {port}"),
            Service::Stun(host, *port),
        )
    });
    for (name, service) in http.chain(stun).take_while(|_| !stopped()) {
        let answer = match service {
            Service::Http(url) => over_http(url, family),
            Service::Stun(host, port) => over_stun(host, port, private),
        };
        let is_possible = |a: &IpAddr| {
            let is_special = a.is_unspecified() || a.is_loopback() || a.is_multicast();
            a.is_ipv4() == private.is_ipv4() && !is_special && *a != private
        };
        let answer = answer.and_then(|address| match Some(address).filter(is_possible) {
            Some(address) => Ok(address),
            None => Err(format!(
                "{address} is not a possible public address of {private}"
            )),
        });
        match answer {
            Ok(public) => {
                report(Step(format!("{name}: {private} maps to {public}")));
                return Some(public);
            }
            Err(error) => report(Step(format!("{name}: {error}"))),
        }
    }
    None
}

enum Service<'a> {
    Http(&'a str),
    Stun(&'a str, u16),
}

/// Asks a service that answers with the address of its client, in one line.
fn over_http(url: &str, family: IpFamily) -> Result<IpAddr, String> {
    let response = agent_for_family(HTTP_TIMEOUT, family).get(url).call();
    let mut response = response.map_err(|e| e.to_string())?;
    let status = response.status().as_u16();
    if status != 200 {
        return Err(format!("expected status 200, got {status}"));
    }
    let body = response
        .body_mut()
        .with_config()
        .limit(256)
        .read_to_string();
    let body = body.map_err(|e| e.to_string())?;
    let address = body.trim().parse::<IpAddr>();
    address.map(|a| a.to_canonical()).map_err(|_| {
        let shown: String = body.chars().take(60).collect();
        format!("expected an IP address, got \"{}\"", shown.escape_debug())
    })
}

fn over_stun(host: &str, port: u16, private: IpAddr) -> Result<IpAddr, String> {
    let addresses = (host, port).to_socket_addrs().map_err(|e| e.to_string())?;
    let server = addresses
        .into_iter()
        .find(|a| a.is_ipv4() == private.is_ipv4());
    let Some(server) = server else {
        return Err("the name has no address of this family".to_owned());
    };
    let socket = UdpSocket::bind((private, 0)).and_then(|socket| {
        socket.connect(server)?;
        Ok(socket)
    });
    let socket = socket.map_err(|e| e.to_string())?;
    let request = Message::builder_request(BINDING, MessageWriteVec::new());
    let transaction = request.transaction_id();
    let request = request.finish();
    let mut buffer = [0; 1500];
    for timeout in STUN_TIMEOUTS {
        socket.send(&request).map_err(|e| e.to_string())?;
        let deadline = Instant::now() + timeout;
        loop {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                break;
            }
            socket
                .set_read_timeout(Some(rest))
                .map_err(|e| e.to_string())?;
            let length = match socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.to_string()),
            };
            // Ignore everything but the answer to this request.
            let Ok(message) = Message::from_bytes(&buffer[..length]) else {
                continue;
            };
            if message.transaction_id() != transaction || !message.is_response() {
                continue;
            }
            return mapped(&message).ok_or_else(|| "the answer has no address".to_owned());
        }
    }
    Err("no answer".to_owned())
}

fn mapped(message: &Message<'_>) -> Option<IpAddr> {
    let attribute = message.attribute::<XorMappedAddress>().ok()?;
    let address: SocketAddr = attribute.addr(message.transaction_id());
    Some(address.ip().to_canonical())
}

/// A mapping that a thread keeps up to date.
type Shared = Arc<ArcSwap<Mapping>>;

/// The public addresses last found, by the settings they were found with.
#[derive(Clone, Default)]
pub struct AddressCache(Arc<ArcSwap<Vec<(Stun, Shared)>>>);

/// For how many settings addresses are kept: a reload that fails returns to the former settings.
const MAX_CACHED_SETTINGS: usize = 2;

impl AddressCache {
    /// The mapping of these settings; at first their manual mapping.
    fn for_settings(&self, settings: &Stun) -> Shared {
        let cached = self.0.load();
        let found = cached.iter().find(|(cached, _)| cached == settings);
        let found = found.map(|(_, mapping)| Arc::clone(mapping));
        let found =
            found.unwrap_or_else(|| Arc::new(ArcSwap::from_pointee(settings.manual.clone())));
        let others = cached.iter().filter(|(cached, _)| cached != settings);
        let this = (settings.clone(), Arc::clone(&found));
        let kept = std::iter::once(this).chain(others.take(MAX_CACHED_SETTINGS - 1).cloned());
        self.0.store(Arc::new(kept.collect()));
        found
    }
}

/// The mapping, kept up to date by a thread that ends when this value is dropped.
pub struct PublicAddresses {
    mapping: Shared,
    _stop: Sender<()>,
}

impl PublicAddresses {
    /// Starts the thread. Until an address is found, the mapping is what `known` has for these settings.
    pub fn start(settings: Stun, known: &AddressCache) -> io::Result<PublicAddresses> {
        let (stop, stopped) = bounded(0);
        let changes = interfaces::watch()?;
        let mapping = known.for_settings(&settings);
        let found = Arc::clone(&mapping);
        thread::Builder::new()
            .name("addresses".to_owned())
            .spawn(move || {
                privileges::drop_all();
                keep_up_to_date(&settings, &found, &stopped, &changes);
            })?;
        Ok(PublicAddresses {
            mapping,
            _stop: stop,
        })
    }

    /// The public address that `address` maps to now. Never blocks.
    pub fn public_of(&self, address: &IpAddr) -> Option<IpAddr> {
        self.mapping.load().get(address).copied()
    }
}

fn keep_up_to_date(
    settings: &Stun,
    found: &Shared,
    stopped: &Receiver<()>,
    changes: &interfaces::Changes,
) {
    let mut failing = false;
    let is_stopped = || stopped.try_recv() == Err(TryRecvError::Disconnected);
    loop {
        let known = found.load_full();
        let report = |step| log::debug!("public address: {step}");
        let (mapping, missing) = discover(settings, &known, &is_stopped, report);
        if is_stopped() {
            return;
        }
        if missing && !failing {
            log::warn!(
                "public address: no service returned one for this host's private address; fireflies report the same address as before (flowd-rs stun sample shows the steps)"
            );
        }
        failing = missing;
        if mapping != *known {
            for (private, public) in &mapping {
                log::info!("public address: {private} maps to {public}");
            }
            found.store(Arc::new(mapping));
        }
        let wait = if missing {
            RETRY_INTERVAL
        } else {
            REFRESH_INTERVAL
        };
        select! {
            recv(stopped) -> _ => return,
            recv(changes.receiver()) -> change => if change.is_err() {
                // Changes are no longer reported: retry periodically.
                select! { recv(stopped) -> _ => return, recv(after(RETRY_INTERVAL)) -> _ => {} }
            },
            recv(after(wait)) -> _ => {}
        }
        select! { recv(stopped) -> _ => return, recv(after(SETTLE_DELAY)) -> _ => {} }
        changes.receiver().try_iter().for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A STUN server that replies to a request with the result of `answer`.
    fn server(answer: fn(&[u8], SocketAddr) -> Vec<u8>) -> u16 {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&answer(&buffer[..length], from), from);
            }
        });
        port
    }

    fn xor(request: &[u8], _: SocketAddr) -> Vec<u8> {
        let request = Message::from_bytes(request).unwrap();
        let mut answer = Message::builder_success(&request, MessageWriteVec::new());
        let public = SocketAddr::from(([9, 8, 7, 6], 5));
        let attribute = XorMappedAddress::new(public, request.transaction_id());
        answer.add_attribute(&attribute).unwrap();
        answer.finish()
    }

    #[test]
    fn the_address_is_read_from_a_stun_answer_and_other_datagrams_are_ignored() {
        let ask = |port| over_stun("127.0.0.1", port, Ipv4Addr::LOCALHOST.into());
        assert_eq!(ask(server(xor)), Ok(Ipv4Addr::new(9, 8, 7, 6).into()));
        assert_eq!(
            ask(server(|_, _| b"nonsense".to_vec())),
            Err("no answer".to_owned())
        );
        let empty = |request: &[u8], _| {
            let request = Message::from_bytes(request).unwrap();
            Message::builder_success(&request, MessageWriteVec::new()).finish()
        };
        assert_eq!(
            ask(server(empty)),
            Err("the answer has no address".to_owned())
        );
        assert_eq!(
            ask(server(|request, _| request.to_vec())),
            Err("no answer".to_owned())
        );
    }
}
