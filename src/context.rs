//! What the daemon shares with its parts: plugins, enrichers and the control socket are built with it.

use std::sync::Arc;

use arc_swap::ArcSwap;
use crossbeam_channel::Sender;
use jiff::Timestamp;

use crate::dispatcher::Query;
use crate::metrics::Metrics;
use crate::registry::SharedRegistry;
use crate::scitag::Labeller;
use crate::sys::scanner::Scanner;

/// What the daemon shares with its parts. Clones share the same state.
#[derive(Clone)]
pub struct DaemonContext {
    /// Requests to the dispatcher.
    pub queries: Sender<Query>,
    /// Names of experiments and activities.
    pub registry: SharedRegistry,
    /// Counters.
    pub metrics: Metrics,
    /// Scans of all TCP sockets, which the parts share.
    pub scanner: Scanner,
    /// The parts that run now; a reload replaces it.
    pub active: Arc<ArcSwap<ActiveParts>>,
    /// When the daemon was started.
    pub started: Timestamp,
}

/// The parts that run, by their names.
#[derive(Clone, Default)]
pub struct ActiveParts {
    /// Computes flow labels, if packets are marked with flow labels.
    pub labeller: Option<Labeller>,
    /// Names of the plugins.
    pub plugins: Vec<&'static str>,
    /// Names of the enrichers.
    pub enrichers: Vec<&'static str>,
    /// Names of the backends.
    pub backends: Vec<&'static str>,
}
