//! Tells requests that a browser sends for a page of another site from those that are meant. No I/O.
//!
//! A page may send a "simple" request to any address (no `application/json` among them), and may read the answers of a
//! name that it resolves to this host's address (DNS rebinding). It can neither change `Origin` and `Host`, nor connect
//! to a Unix socket, nor know a token.

use std::net::IpAddr;

use crate::http::{Request, Response, problem};

/// The names of this host besides `localhost`.
pub struct OwnNames(Vec<String>);

impl OwnNames {
    /// `hostname` as the kernel knows it, short or with its domain.
    pub fn new(hostname: &str) -> OwnNames {
        let short = hostname.split('.').next().unwrap_or_default();
        OwnNames(vec![hostname.to_owned(), short.to_owned()])
    }

    /// The refusal of a request that a foreign page has caused. The host is not checked if `has_token`.
    pub fn refuse(&self, request: &Request, has_token: bool) -> Option<Response> {
        let host = request.host.as_deref();
        if request.is_unix {
            return None;
        }
        if let Some(host) = host.filter(|host| !has_token && !self.contains(host)) {
            let error = format!(
                "Host is \"{}\", expected an address, localhost or the name of this host",
                host.escape_debug()
            );
            return Some(problem(421, &error));
        }
        let origin = request.origin.as_deref()?;
        let (_, site) = origin.split_once("://").unwrap_or_default();
        let is_same = host.is_some_and(|host| host.eq_ignore_ascii_case(site));
        (!is_same).then(|| {
            let error = format!(
                "Origin is \"{}\": requests of pages of other sites are refused",
                origin.escape_debug()
            );
            problem(403, &error)
        })
    }

    fn contains(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => rest.split_once(']').map_or(rest, |(address, _)| address),
            None => host.split_once(':').map_or(host, |(name, _)| name),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        let is = |own: &str| !own.is_empty() && own.eq_ignore_ascii_case(name);
        name.parse::<IpAddr>().is_ok() || is("localhost") || self.0.iter().any(|own| is(own))
    }
}

/// Whether the body is declared as JSON.
pub fn is_json(request: &Request) -> bool {
    let content_type = request.content_type.as_deref().unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default();
    media_type.trim().eq_ignore_ascii_case("application/json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(request: &Request, has_token: bool) -> Option<u16> {
        let refusal = OwnNames::new("se1.example.org").refuse(request, has_token);
        refusal.map(|response| response.status)
    }

    fn from(host: &str, origin: Option<&str>) -> Request {
        Request {
            host: Some(host.to_owned()),
            origin: origin.map(str::to_owned),
            ..Request::default()
        }
    }

    #[test]
    fn only_addresses_and_names_of_this_host_are_hosts() {
        for own in [
            "127.0.0.1:7777",
            "127.0.0.1",
            "[::1]:7777",
            "[2001:db8::1]",
            "localhost:7777",
            "LOCALHOST.",
            "se1",
            "SE1.example.org:7777",
        ] {
            assert_eq!(status(&from(own, None), false), None, "{own}");
        }
        for foreign in [
            "",
            ":7777",
            "example.com",
            "localhost.example.com:7777",
            "se1.example.com",
            "127.0.0.1.example.com",
            "[::1",
            "[]",
        ] {
            let expected = (foreign != "[::1").then_some(421);
            assert_eq!(status(&from(foreign, None), false), expected, "{foreign}");
            assert_eq!(status(&from(foreign, None), true), None, "{foreign}");
        }
        let unix = Request {
            is_unix: true,
            ..from("example.com", Some("null"))
        };
        assert_eq!(status(&unix, false), None);
        assert_eq!(status(&Request::default(), false), None);
    }

    #[test]
    fn requests_of_foreign_pages_are_refused() {
        let host = "localhost:7777";
        for origin in ["http://localhost:7777", "https://LOCALHOST:7777"] {
            assert_eq!(status(&from(host, Some(origin)), false), None, "{origin}");
        }
        for origin in ["null", "", "http://localhost", "https://example.com"] {
            for has_token in [false, true] {
                assert_eq!(status(&from(host, Some(origin)), has_token), Some(403));
            }
        }
    }

    #[test]
    fn json_is_declared_by_its_media_type() {
        let request = |content_type: &str| Request {
            content_type: Some(content_type.to_owned()),
            ..Request::default()
        };
        for json in ["application/json", "Application/JSON ; charset=utf-8"] {
            assert!(is_json(&request(json)), "{json}");
        }
        for other in [
            "",
            "text/plain",
            "text/plain;application/json",
            "application/jsonx",
        ] {
            assert!(!is_json(&request(other)), "{other}");
        }
        assert!(!is_json(&Request::default()));
    }
}
