//! The network interfaces and addresses of this host, and notifications of their changes.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use ipnet::{IpNet, Ipv4Net};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::privileges;
use super::stop::{StopSwitch, stop};
use super::waiter::Waiter;
use crate::flow::Flow;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name, as in ip-link(8).
    pub name: String,
    /// Its index, which changes if the interface is deleted and recreated.
    pub index: u32,
    /// Whether its packets begin with an Ethernet header.
    pub ethernet: bool,
    /// Whether it has a global unicast IPv6 address (2000::/3).
    pub global_ipv6: bool,
}

/// Lists the interfaces, and all of their addresses.
pub fn list() -> io::Result<(Vec<Interface>, HashSet<IpAddr>)> {
    let mut interfaces: Vec<Interface> = Vec::new();
    let mut addresses = HashSet::new();
    let mut with_global_ipv6 = HashSet::new();
    for entry in getifaddrs()? {
        let name = entry.interface_name;
        if !interfaces.iter().any(|known| known.name == name) {
            // The interface may have been deleted meanwhile.
            let Ok(index) = if_nametoindex(name.as_str()) else {
                continue;
            };
            interfaces.push(Interface {
                name: name.clone(),
                index,
                ethernet: false,
                global_ipv6: false,
            });
        }
        let Some(address) = entry.address else {
            continue;
        };
        if let Some(link) = address.as_link_addr() {
            let ethernet = matches!(
                link.hatype(),
                libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK | libc::ARPHRD_IEEE802
            );
            let known = interfaces.iter_mut().find(|known| known.name == name);
            known
                .into_iter()
                .for_each(|known| known.ethernet = ethernet);
        } else if let Some(ipv4) = address.as_sockaddr_in() {
            addresses.insert(IpAddr::V4(ipv4.ip()));
        } else if let Some(ipv6) = address.as_sockaddr_in6() {
            addresses.insert(IpAddr::V6(ipv6.ip()));
            if is_global(ipv6.ip()) {
                with_global_ipv6.insert(name);
            }
        }
    }
    for interface in &mut interfaces {
        interface.global_ipv6 = with_global_ipv6.contains(&interface.name);
    }
    Ok((interfaces, addresses))
}

/// The networks that the addresses of this host belong to.
fn networks() -> io::Result<Vec<IpNet>> {
    let mut networks = Vec::new();
    for entry in getifaddrs()? {
        let (Some(address), Some(mask)) = (entry.address, entry.netmask) else {
            continue;
        };
        let (address, mask): (IpAddr, IpAddr) =
            match (address.as_sockaddr_in(), mask.as_sockaddr_in()) {
                (Some(address), Some(mask)) => (address.ip().into(), mask.ip().into()),
                _ => match (address.as_sockaddr_in6(), mask.as_sockaddr_in6()) {
                    (Some(address), Some(mask)) => (address.ip().into(), mask.ip().into()),
                    _ => continue,
                },
            };
        networks.extend(IpNet::with_netmask(address, mask).map(|network| network.trunc()));
    }
    Ok(networks)
}

fn is_global(address: Ipv6Addr) -> bool {
    address.segments()[0] & 0xe000 == 0x2000
}

/// The addresses of this host, kept up to date.
pub struct LocalAddresses {
    addresses: HashSet<IpAddr>,
    networks: Vec<IpNet>,
    changes: Changes,
}

impl LocalAddresses {
    /// Reads the addresses, and watches for changes.
    pub fn watch() -> io::Result<LocalAddresses> {
        let changes = watch()?;
        let (_, addresses) = list()?;
        Ok(LocalAddresses {
            addresses,
            networks: networks()?,
            changes,
        })
    }

    /// Reads the addresses again if they may have changed. Call this regularly.
    pub fn refresh(&mut self) {
        if self.changes.receiver.try_recv().is_ok()
            && let (Ok((_, addresses)), Ok(networks)) = (list(), networks())
        {
            (self.addresses, self.networks) = (addresses, networks);
        }
    }

    /// Whether packets to this address stay on this host.
    pub fn contains(&self, address: &IpAddr) -> bool {
        address.is_loopback() || self.addresses.contains(address)
    }

    /// Whether the address is in a network that this host has an address in.
    pub fn is_in_own_network(&self, address: &IpAddr) -> bool {
        address.is_loopback() || self.networks.iter().any(|n| n.contains(address))
    }

    /// Whether a datagram to this address may reach more than one host: multicast, or a broadcast address of a network
    /// of this host. Also true for the unspecified address.
    pub fn is_for_many(&self, address: &IpAddr) -> bool {
        let is_broadcast = |address: Ipv4Addr| {
            let of = |network: &Ipv4Net| {
                let ends = [network.network(), network.broadcast()];
                network.prefix_len() < 31 && ends.contains(&address)
            };
            address.is_broadcast()
                || self.networks.iter().any(|network| match network {
                    IpNet::V4(network) => of(network),
                    IpNet::V6(_) => false,
                })
        };
        address.is_multicast()
            || address.is_unspecified()
            || matches!(address, IpAddr::V4(v4) if is_broadcast(*v4))
    }

    /// The flow as the socket on this host sees it, with the local end as its source. `None` if neither end is on this
    /// host.
    pub fn outgoing(&self, flow: &Flow) -> Option<Flow> {
        match () {
            () if self.contains(&flow.source.address) => Some(*flow),
            () if self.contains(&flow.destination.address) => Some(flow.reversed()),
            () => None,
        }
    }
}

/// The flow in the direction of the packets that leave this host: an incoming flow is reversed.
pub fn outgoing(flow: &Flow, local: &HashSet<IpAddr>) -> Flow {
    let is_local = |address| local.contains(&address);
    if is_local(flow.destination.address) && !is_local(flow.source.address) {
        return flow.reversed();
    }
    *flow
}

/// Notifications of changes of links, addresses and tc filters. Dropping the value ends the thread that reads them.
pub struct Changes {
    receiver: Receiver<()>,
    _stop: StopSwitch,
}

impl Changes {
    /// Receives a message if there was a change since the last one was received. The message does not say what changed.
    pub fn receiver(&self) -> &Receiver<()> {
        &self.receiver
    }
}

/// Starts watching for changes of links, addresses and tc filters.
pub fn watch() -> io::Result<Changes> {
    const GROUPS: u32 =
        (libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR | libc::RTMGRP_TC)
            as u32;
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkRoute,
    )?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, GROUPS))?;
    let (stop_switch, stop) = stop()?;
    let mut waiter = Waiter::new()?;
    waiter.watch(&netlink)?;
    waiter.watch(&stop)?;
    let (changed, receiver) = bounded(1);
    let watch = move || {
        privileges::drop_all();
        let mut message = [0; 8192];
        while !stop.is_set() {
            if let Err(error) = waiter.wait(None) {
                log::error!("rtnetlink: {error}; changes of interfaces are no longer detected");
                return;
            }
            loop {
                match recv(netlink.as_raw_fd(), &mut message, MsgFlags::empty()) {
                    // Lost notifications count as a change, too.
                    Ok(_) | Err(Errno::ENOBUFS) => {}
                    Err(Errno::EINTR) => continue,
                    Err(Errno::EAGAIN) => break,
                    Err(error) => {
                        let error = io::Error::from(error);
                        log::error!(
                            "rtnetlink: {error}; changes of interfaces are no longer detected"
                        );
                        return;
                    }
                }
                let _ = changed.try_send(());
            }
        }
    };
    thread::Builder::new()
        .name("interfaces".to_owned())
        .spawn(watch)?;
    Ok(Changes {
        receiver,
        _stop: stop_switch,
    })
}
