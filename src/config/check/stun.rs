//! Checks of `backends.firefly.stun`.

use std::collections::BTreeMap;

use super::{Result, error};
use crate::config::{Stun, raw};
use crate::flow::parse_address;

/// Services of several operators, asked in this order until one answers.
const HTTP_SERVICES: [&str; 4] = [
    "https://api64.ipify.org",
    "https://icanhazip.com",
    "https://ifconfig.co/ip",
    "https://ident.me",
];
/// The default of flowd-go.
const STUN_SERVERS: [&str; 5] = [
    "stun.l.google.com:3478",
    "stun1.l.google.com:3478",
    "stun2.l.google.com:3478",
    "stun3.l.google.com:3478",
    "stun4.l.google.com:3478",
];
/// The default port of STUN (RFC 8489).
const STUN_PORT: u16 = 3478;

pub fn check(raw: raw::Stun) -> Result<Stun> {
    let texts = |given: Option<Vec<String>>, default: &[&str]| {
        given.unwrap_or_else(|| default.iter().map(|text| (*text).to_owned()).collect())
    };
    let http_services = texts(raw.http_services, &HTTP_SERVICES);
    let is_url = |url: &String| url.starts_with("https://") || url.starts_with("http://");
    if let Some(wrong) = http_services.iter().find(|url| !is_url(url)) {
        let message = format!(
            "\"{}\" is not a valid URL, expected https://… or http://…",
            wrong.escape_debug()
        );
        return error(&key("httpServices"), message);
    }
    let servers = texts(raw.stun_servers, &STUN_SERVERS);
    Ok(Stun {
        manual: manual(raw.manual_mapping.unwrap_or_default())?,
        http_services,
        stun_servers: servers.iter().map(|s| server(s)).collect::<Result<_>>()?,
    })
}

fn key(key: &str) -> String {
    format!("backends.firefly.stun.{key}")
}

fn manual(texts: BTreeMap<String, String>) -> Result<BTreeMap<std::net::IpAddr, std::net::IpAddr>> {
    let mut manual = BTreeMap::new();
    for (from, to) in texts {
        let address = |text: &str| match parse_address(text) {
            Some(address) => Ok(address.to_canonical()),
            None => {
                let message = format!(
                    "\"{}\" is not a valid IPv4 or IPv6 address",
                    text.escape_debug()
                );
                error(&key("manualMapping"), message)
            }
        };
        let (from, to) = (address(&from)?, address(&to)?);
        if from.is_ipv4() != to.is_ipv4() {
            let message =
                format!("{from} and {to} have different address families, expected the same");
            return error(&key("manualMapping"), message);
        }
        manual.insert(from, to);
    }
    Ok(manual)
}

fn server(text: &str) -> Result<(String, u16)> {
    // An IPv6 address has colons, and is in brackets if a port follows.
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if host.ends_with(']') || !host.contains(':') => {
            (host, port.parse().ok())
        }
        _ => (text, Some(STUN_PORT)),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    match port {
        Some(port @ 1..) if !host.is_empty() && !host.contains(char::is_whitespace) => {
            Ok((host.to_owned(), port))
        }
        _ => {
            let message = format!(
                "\"{}\" is not a valid server, expected HOST or HOST:PORT",
                text.escape_debug()
            );
            error(&key("stunServers"), message)
        }
    }
}
