//! Plugins that report the TCP connections of this host as flows, and what they share.

pub mod netlink;
pub mod netstat;
mod rules;
mod tracker;

use std::sync::Arc;

use crate::flow::{Flow, Usage};
use crate::socket::Socket;

/// A TCP connection as the kernel reports it. The source of its flow is the local end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The flow, from the local to the remote end.
    pub flow: Flow,
    /// The user who owns the socket, unless the socket no longer has an owner.
    pub uid: Option<u32>,
    /// The id of the socket's cgroup, if the kernel reports it.
    pub cgroup: Option<u64>,
    /// Payload bytes so far, if the kernel reports them.
    pub usage: Option<Usage>,
    /// The statistics of the socket, if the kernel reports them.
    pub socket: Option<Arc<Socket>>,
}
