//! Which parts a configuration asks for, and how each is built.

use std::os::fd::OwnedFd;

use crate::backends::firefly::public_addresses::AddressCache;
use crate::backends::{self, Backend, BackendContext};
use crate::config::Config;
use crate::context::{ActiveParts, DaemonContext};
use crate::enrichers;
use crate::error::Result;
use crate::plugins::{self, Plugin};
use crate::scitag::Labeller;
use crate::sys::handover::{self, Handover};
use crate::sys::state_dir;

/// What a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Plugin,
    Enricher,
    Backend,
}

/// A part of the daemon, with all the settings that it depends on. If they change, a reload replaces it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub kind: Kind,
    pub name: &'static str,
    settings: String,
}

impl Part {
    /// The name of its thread.
    pub fn thread_name(&self) -> String {
        let kind = match self.kind {
            Kind::Plugin => "plugin",
            Kind::Enricher => "enricher",
            Kind::Backend => "backend",
        };
        format!("{kind} {}", self.name)
    }

    /// Whether both have the same kind and name, whatever their settings.
    pub fn is_same_part(&self, other: &Part) -> bool {
        (self.kind, self.name) == (other.kind, other.name)
    }
}

/// The parts that a configuration asks for.
pub fn wanted(config: &Config) -> Vec<Part> {
    let settings = |kind, name: &str| match (kind, name) {
        (Kind::Plugin, "namedPipe") => format!("{:?}", config.named_pipe),
        (Kind::Plugin, "firefly") => format!("{:?}", config.firefly_plugin),
        (Kind::Plugin, "api") => format!("{:?}", config.api),
        (Kind::Plugin, "perfsonar") => format!("{:?}", config.perfsonar),
        (Kind::Plugin, "netlink") => format!("{:?}", config.netlink),
        (Kind::Plugin, "netstat") => format!("{:?}", config.netstat),
        (Kind::Plugin, _) => format!("{:?}", config.iperf3),
        (Kind::Enricher, "netlink") => {
            format!(
                "{:?} {:?}",
                config.flows.end_on_socket_close, config.netlink_enricher
            )
        }
        (Kind::Enricher, _) => format!("{:?}", config.skops_enricher),
        (Kind::Backend, "firefly") => {
            let listener = config.firefly_plugin.as_ref().map(|plugin| plugin.bind);
            format!("{:?} {listener:?}", config.firefly)
        }
        (Kind::Backend, "marker") => {
            format!("{:?} {:?}", config.marker, config.flows.max_flows)
        }
        (Kind::Backend, _) => {
            let marker = config.marker.as_ref().map(|marker| &marker.bpf_fs_path);
            format!("{:?} {marker:?}", config.prometheus)
        }
    };
    let part = |kind, name| Part {
        kind,
        name,
        settings: settings(kind, name),
    };
    let plugins = config
        .plugin_names()
        .into_iter()
        .map(|name| part(Kind::Plugin, name));
    let enrichers = config
        .enricher_names()
        .into_iter()
        .map(|name| part(Kind::Enricher, name));
    let backends = config
        .backend_names()
        .into_iter()
        .map(|name| part(Kind::Backend, name));
    // flowd's backend `dummy` does nothing.
    let backends = backends.filter(|part| part.name != "dummy");
    backends.chain(plugins).chain(enrichers).collect()
}

/// The parts that a configuration enables, for the HTTP routes.
pub fn active(config: &Config) -> Result<ActiveParts> {
    let labeller = labeller(config)?;
    Ok(ActiveParts {
        labeller: labeller.filter(|_| config.labels_packets()),
        plugins: config.plugin_names(),
        enrichers: config.enricher_names(),
        backends: config.backend_names(),
    })
}

fn labeller(config: &Config) -> Result<Option<Labeller>> {
    match &config.marker {
        Some(_) => Ok(Some(Labeller::new(state_dir::label_key(
            &config.state_dir,
        )?))),
        None => Ok(None),
    }
}

/// Parts that have acquired every resource, and do not run yet.
#[derive(Default)]
pub struct BuiltParts {
    pub backends: Vec<BuiltBackend>,
    pub plugins: Vec<BuiltPlugin>,
}

/// A backend that does not run yet.
pub struct BuiltBackend(pub Part, pub Handover, pub Box<dyn Backend>);
/// A plugin or an enricher that does not run yet.
pub struct BuiltPlugin(pub Part, pub Handover, pub Box<dyn Plugin>);

/// Builds all parts of a configuration, the backends first.
pub fn build_all(
    config: &Config,
    context: &DaemonContext,
    addresses: &AddressCache,
) -> Result<BuiltParts> {
    let mut built = BuiltParts::default();
    let mut inherited = handover::inherited();
    for part in wanted(config) {
        match part.kind {
            Kind::Backend => built
                .backends
                .extend(build_backend(part, config, context, addresses)?),
            _ => {
                let inherited = inherited.remove(part.name);
                built
                    .plugins
                    .extend(build_plugin(part, config, context, inherited)?);
            }
        }
    }
    Ok(built)
}

pub fn build_backend(
    part: Part,
    config: &Config,
    context: &DaemonContext,
    addresses: &AddressCache,
) -> Result<Option<BuiltBackend>> {
    let handover = Handover::default();
    let labeller = labeller(config)?;
    let context = BackendContext {
        config,
        labeller: labeller.as_ref(),
        registry: &context.registry,
        addresses,
        metrics: &context.metrics,
        handover: handover.clone(),
    };
    let backend = backends::build(part.name, context)?;
    Ok(backend.map(|backend| BuiltBackend(part, handover, backend)))
}

pub fn build_plugin(
    part: Part,
    config: &Config,
    context: &DaemonContext,
    inherited: Option<OwnedFd>,
) -> Result<Option<BuiltPlugin>> {
    let handover = Handover::default();
    let plugin = match part.kind {
        Kind::Plugin => plugins::build(part.name, config, context, handover.clone(), inherited),
        _ => enrichers::build(part.name, config, context),
    };
    Ok(plugin?.map(|plugin| BuiltPlugin(part, handover, plugin)))
}
