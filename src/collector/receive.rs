//! The sockets of the workers: bound, or taken over from the previous process.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use crate::collector::config::{CollectorConfig, Listen, MulticastGroup};
use crate::error::{Context, Result};
use crate::sys::udp_receiver::{Options, Receiver};

/// A socket of a worker.
pub struct Socket {
    /// Where it listens.
    pub listen: Listen,
    /// The socket.
    pub receiver: Receiver,
}

/// The name of a socket in systemd's file descriptor store.
pub fn descriptor_name(worker: usize, address: SocketAddr) -> String {
    // systemd refuses colons in names.
    format!("collector-{worker}-{address}").replace(':', "_")
}

/// Opens the sockets of a worker: one per address. A socket of `inherited`, by [`descriptor_name`], or of `kept` is taken
/// over with the datagrams that wait in it.
pub fn open(
    worker: usize,
    config: &CollectorConfig,
    inherited: &mut HashMap<String, OwnedFd>,
    kept: &mut Vec<Socket>,
) -> Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for listen in &config.listen {
        let is_same = |socket: &Socket| socket.listen.address == listen.address;
        let receiver = match kept.iter().position(is_same) {
            Some(at) => {
                let receiver = kept.swap_remove(at).receiver;
                receiver.set_receive_buffer_size(listen.receive_buffer);
                receiver
            }
            None => {
                adopt(worker, config, listen, inherited).map_or_else(|| bind(config, listen), Ok)?
            }
        };
        if worker == 0 {
            warn_of_small_buffer(&receiver, listen);
            join(&receiver, listen.address, &config.multicast_groups)?;
        }
        sockets.push(Socket {
            listen: listen.clone(),
            receiver,
        });
    }
    Ok(sockets)
}

/// Whether the multicast groups can be joined, tried with sockets of their own.
pub fn check_groups(config: &CollectorConfig) -> Result<()> {
    for address in ["0.0.0.0:0", "[::]:0"] {
        let address: SocketAddr = address.parse().unwrap_or(([0; 4], 0).into());
        let is_of_family = |group: &&MulticastGroup| group.group.is_ipv4() == address.is_ipv4();
        let groups: Vec<_> = config
            .multicast_groups
            .iter()
            .filter(is_of_family)
            .cloned()
            .collect();
        if !groups.is_empty() {
            let socket = Receiver::bind(address).context(|| format!("UDP {address}"))?;
            join(&socket, address, &groups)?;
        }
    }
    Ok(())
}

/// Binds the addresses of `config` that `previous` does not have.
pub fn open_new(config: &CollectorConfig, previous: &CollectorConfig) -> Result<Vec<Socket>> {
    let is_new = |listen: &&Listen| {
        let mut previous = previous.listen.iter();
        previous.all(|previous| previous.address != listen.address)
    };
    let bind = |listen: &Listen| {
        let receiver = bind(config, listen)?;
        Ok(Socket {
            listen: listen.clone(),
            receiver,
        })
    };
    config.listen.iter().filter(is_new).map(bind).collect()
}

fn bind(config: &CollectorConfig, listen: &Listen) -> Result<Receiver> {
    let options = Options {
        receive_buffer: listen.receive_buffer,
        reuse_port: config.workers > 1,
    };
    let bound = Receiver::bind_with(listen.address, options);
    bound.context(|| format!("UDP {} (listen)", listen.address))
}

fn adopt(
    worker: usize,
    config: &CollectorConfig,
    listen: &Listen,
    inherited: &mut HashMap<String, OwnedFd>,
) -> Option<Receiver> {
    let descriptor = inherited.remove(&descriptor_name(worker, listen.address))?;
    let receiver = Receiver::adopt(descriptor, listen.address)?;
    (receiver.shares_port() == (config.workers > 1)).then_some(receiver)
}

/// Every socket of a group receives each datagram of it: only the first worker joins.
fn join(receiver: &Receiver, address: SocketAddr, groups: &[MulticastGroup]) -> Result<()> {
    let is_dual = address.is_ipv6() && address.ip().is_unspecified();
    for group in groups {
        if group.group.is_ipv4() == address.is_ipv4() || is_dual {
            let interface = group.interface.as_deref();
            receiver.join(group.group, interface).context(|| {
                let on = interface.map_or_else(String::new, |name| format!(" on {name}"));
                format!("{}{on} (multicastGroups)", group.group)
            })?;
        }
    }
    Ok(())
}

fn warn_of_small_buffer(receiver: &Receiver, listen: &Listen) {
    if let Ok(size) = receiver.receive_buffer_size()
        && size < listen.receive_buffer
    {
        log::warn!(
            "UDP {}: the receive buffer has {} KiB, expected {} KiB (listen.receiveBuffer): the system's limit is too low; set sysctl net.core.rmem_max to {}",
            listen.address,
            size >> 10,
            listen.receive_buffer >> 10,
            listen.receive_buffer
        );
    }
}
