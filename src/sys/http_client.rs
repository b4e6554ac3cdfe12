//! The HTTP client for occasional requests: the registry, public addresses.

use std::time::Duration;

pub use ureq::Agent;
use ureq::config::IpFamily;
use ureq::tls::{RootCerts, TlsConfig};

/// A client that trusts the certificates that this host trusts. `timeout` limits a whole request.
pub fn agent(timeout: Duration) -> Agent {
    agent_for_family(timeout, IpFamily::Any)
}

/// Like [`agent`], over one address family.
pub fn agent_for_family(timeout: Duration, family: IpFamily) -> Agent {
    let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier);
    Agent::config_builder()
        .timeout_global(Some(timeout))
        .http_status_as_error(false)
        .max_redirects(3)
        .ip_family(family)
        .tls_config(tls.build())
        .user_agent(concat!("flowd-rs/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}
