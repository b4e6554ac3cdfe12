//! The HTTP client of what is fetched now and then: the registry, public addresses.

use std::time::Duration;

pub use ureq::Agent;
use ureq::config::IpFamily;
use ureq::tls::{RootCerts, TlsConfig};

/// A client whose requests take `patience` at most, by the certificates that this host trusts.
pub fn agent(patience: Duration) -> Agent {
    agent_of(patience, IpFamily::Any)
}

/// The same, over one address family.
pub fn agent_of(patience: Duration, family: IpFamily) -> Agent {
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier);
    Agent::config_builder()
        .timeout_global(Some(patience))
        .http_status_as_error(false)
        .max_redirects(3)
        .ip_family(family)
        .tls_config(tls.build())
        .user_agent(concat!("flowd-rs/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}
