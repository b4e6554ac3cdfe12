//! The public addresses that stand for private ones of this host: asked of HTTP services, and of STUN
//! servers (RFC 8489), in the background.

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
use crate::special_networks::is_public;
use crate::sys::http_client::agent_of;
use crate::sys::{interfaces, privileges};

/// How long an HTTP service may take.
const HTTP_PATIENCE: Duration = Duration::from_secs(5);
/// How long a STUN server's answer is waited for: three requests, as some are lost.
const STUN_PATIENCE: [Duration; 3] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
/// How often it is asked again, though nothing has changed here.
const REFRESH: Duration = Duration::from_secs(3600);
/// The same, if nobody has answered.
const RETRY: Duration = Duration::from_secs(600);
/// How long addresses have to be unchanged.
const SETTLED: Duration = Duration::from_secs(1);

/// Addresses of this host, and what stands for them.
pub type Mapping = BTreeMap<IpAddr, IpAddr>;

/// A step of the discovery, for people.
pub struct Step(String);

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Looks for the public addresses of the default interface's private ones, per address family, until it is
/// `stopped`. What it does is told; whether nobody has answered for an address comes with the result. Such a
/// one keeps what was `known` of it.
pub fn discover(
    settings: &Stun,
    known: &Mapping,
    stopped: &dyn Fn() -> bool,
    mut tell: impl FnMut(Step),
) -> (Mapping, bool) {
    let (mut mapping, mut missing) = (settings.manual.clone(), false);
    for (address, public) in &mapping {
        tell(Step(format!(
            "{address}: stands for {public} by manualMapping"
        )));
    }
    for (name, family) in [("IPv4", IpFamily::Ipv4Only), ("IPv6", IpFamily::Ipv6Only)] {
        let private = match default_address(family) {
            Ok(address) => address,
            Err(error) => {
                tell(Step(format!("{name}: no default route: {error}")));
                continue;
            }
        };
        if mapping.contains_key(&private) {
            continue;
        }
        if is_public(private) {
            tell(Step(format!("{name}: {private} is public")));
            continue;
        }
        tell(Step(format!(
            "{name}: {private} is private, looking for what stands for it"
        )));
        let found = ask(settings, private, family, stopped, &mut tell);
        missing |= found.is_none();
        let public = found.or_else(|| known.get(&private).copied());
        mapping.extend(public.map(|public| (private, public)));
    }
    (mapping, missing)
}

/// The address from which packets to the Internet would go.
fn default_address(family: IpFamily) -> io::Result<IpAddr> {
    // Nothing is sent there: the kernel only looks up the route.
    let (any, far): (IpAddr, IpAddr) = match family {
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
    socket.connect((far, 9))?;
    Ok(socket.local_addr()?.ip())
}

fn ask(
    settings: &Stun,
    private: IpAddr,
    family: IpFamily,
    stopped: &dyn Fn() -> bool,
    tell: &mut impl FnMut(Step),
) -> Option<IpAddr> {
    let http = settings
        .http_services
        .iter()
        .map(|url| (url.clone(), Ask::Http(url)));
    let stun = settings.stun_servers.iter();
    let stun =
        stun.map(|(host, port)| (format!("STUN {host} port {port}"), Ask::Stun(host, *port)));
    for (who, how) in http.chain(stun).take_while(|_| !stopped()) {
        let answer = match how {
            Ask::Http(url) => over_http(url, family),
            Ask::Stun(host, port) => over_stun(host, port, private),
        };
        let could_be = |a: &IpAddr| {
            let nobodys = a.is_unspecified() || a.is_loopback() || a.is_multicast();
            a.is_ipv4() == private.is_ipv4() && !nobodys && *a != private
        };
        let answer = answer.and_then(|address| match Some(address).filter(could_be) {
            Some(address) => Ok(address),
            None => Err(format!(
                "{address} is no address that could stand for {private}"
            )),
        });
        match answer {
            Ok(public) => {
                tell(Step(format!("{who}: {private} goes out as {public}")));
                return Some(public);
            }
            Err(error) => tell(Step(format!("{who}: {error}"))),
        }
    }
    None
}

enum Ask<'a> {
    Http(&'a str),
    Stun(&'a str, u16),
}

/// A service that answers with the address of who asks, in a line.
fn over_http(url: &str, family: IpFamily) -> Result<IpAddr, String> {
    let response = agent_of(HTTP_PATIENCE, family).get(url).call();
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
        format!("\"{}\" is no address", shown.escape_debug())
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
    for patience in STUN_PATIENCE {
        socket.send(&request).map_err(|e| e.to_string())?;
        let deadline = Instant::now() + patience;
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
            // What is no answer to this request is not for us.
            let Ok(message) = Message::from_bytes(&buffer[..length]) else {
                continue;
            };
            if message.transaction_id() != transaction || !message.is_response() {
                continue;
            }
            return mapped(&message).ok_or_else(|| "an answer without an address".to_owned());
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

/// What was found last, and by which settings.
#[derive(Clone, Default)]
pub struct Known(Arc<ArcSwap<Vec<(Stun, Shared)>>>);

/// Settings whose addresses are kept: a reload that is refused goes back to those before.
const KEPT: usize = 2;

impl Known {
    /// What is known by these settings: at first the manual mapping.
    fn by(&self, settings: &Stun) -> Shared {
        let known = self.0.load();
        let found = known.iter().find(|(known, _)| known == settings);
        let found = found.map(|(_, mapping)| Arc::clone(mapping));
        let found =
            found.unwrap_or_else(|| Arc::new(ArcSwap::from_pointee(settings.manual.clone())));
        let others = known.iter().filter(|(known, _)| known != settings);
        let this = (settings.clone(), Arc::clone(&found));
        let kept = std::iter::once(this).chain(others.take(KEPT - 1).cloned());
        self.0.store(Arc::new(kept.collect()));
        found
    }
}

/// The mapping, kept up to date by a thread that ends with the value.
pub struct PublicAddresses {
    mapping: Shared,
    _stop: Sender<()>,
}

impl PublicAddresses {
    /// Starts looking; until something is found there is the manual mapping, or what is `known` by the same
    /// settings.
    pub fn start(settings: Stun, known: &Known) -> io::Result<PublicAddresses> {
        let (stop, stopped) = bounded(0);
        let changes = interfaces::watch()?;
        let mapping = known.by(&settings);
        let found = Arc::clone(&mapping);
        thread::Builder::new()
            .name("addresses".to_owned())
            .spawn(move || {
                privileges::keep_none();
                keep(&settings, &found, &stopped, &changes);
            })?;
        Ok(PublicAddresses {
            mapping,
            _stop: stop,
        })
    }

    /// What stands for an address now. Never waits.
    pub fn public_of(&self, address: &IpAddr) -> Option<IpAddr> {
        self.mapping.load().get(address).copied()
    }
}

fn keep(settings: &Stun, found: &Shared, stopped: &Receiver<()>, changes: &interfaces::Changes) {
    let mut failing = false;
    let is_stopped = || stopped.try_recv() == Err(TryRecvError::Disconnected);
    loop {
        let known = found.load_full();
        let tell = |step| log::debug!("public address: {step}");
        let (mapping, missing) = discover(settings, &known, &is_stopped, tell);
        if is_stopped() {
            return;
        }
        if missing && !failing {
            log::warn!(
                "public address: nobody tells it of this host's private one; fireflies go on to say what they said (flowd-rs stun sample shows the steps)"
            );
        }
        failing = missing;
        if mapping != *known {
            for (private, public) in &mapping {
                log::info!("public address: {public} stands for {private}");
            }
            found.store(Arc::new(mapping));
        }
        let wait = if missing { RETRY } else { REFRESH };
        select! {
            recv(stopped) -> _ => return,
            recv(changes.receiver()) -> change => if change.is_err() {
                // No more word of changes: the clock is left.
                select! { recv(stopped) -> _ => return, recv(after(RETRY)) -> _ => {} }
            },
            recv(after(wait)) -> _ => {}
        }
        // Addresses come and go in groups.
        select! { recv(stopped) -> _ => return, recv(after(SETTLED)) -> _ => {} }
        changes.receiver().try_iter().for_each(drop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A STUN server that answers as `answer` says.
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
    fn a_stun_server_tells_the_address_and_nonsense_is_no_answer() {
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
            Err("an answer without an address".to_owned())
        );
        assert_eq!(
            ask(server(|request, _| request.to_vec())),
            Err("no answer".to_owned())
        );
    }
}
