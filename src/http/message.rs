//! Parses requests and encodes responses. No I/O.

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use serde_json::json;

use crate::event::Sender;

/// The longest request line with headers, in bytes.
pub const MAX_HEAD_BYTES: usize = 16 << 10;
/// The longest body of a request, in bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;
const MAX_HEADERS: usize = 64;

/// A complete request.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// `GET`, `POST`, …; `GET` for `HEAD`, whose body is not sent.
    pub method: String,
    /// The path as sent, still percent-encoded, without the query.
    pub path: String,
    /// The query: the text after `?`.
    pub query: String,
    /// Whether the client has connected to a Unix socket, which no browser can.
    pub is_unix: bool,
    /// The client, where the kernel tells.
    pub peer: Option<Sender>,
    /// The value of `Host`.
    pub host: Option<String>,
    /// The value of `Origin`: the site of the page that made a browser send the request.
    pub origin: Option<String>,
    /// The value of `Content-Type`.
    pub content_type: Option<String>,
    /// The value of `Authorization`.
    pub authorization: Option<String>,
    /// The value of `Accept`.
    pub accept: Option<String>,
    /// Whether `Accept-Encoding` allows gzip.
    pub accepts_gzip: bool,
    /// The body.
    pub body: Vec<u8>,
}

/// The body of a response.
pub enum Body {
    /// The complete body.
    Whole(Vec<u8>),
    /// Parts, each produced once the previous one has been sent.
    Parts(Box<dyn Iterator<Item = Vec<u8>> + Send>),
}

/// A response.
pub struct Response {
    /// The status code.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: &'static str,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: Body,
}

impl Response {
    /// A JSON document.
    pub fn json(status: u16, document: &serde_json::Value) -> Response {
        Response {
            status,
            content_type: "application/json",
            headers: Vec::new(),
            body: Body::Whole(format!("{document}\n").into_bytes()),
        }
    }
}

/// An error as a JSON object: what was wrong and what was expected.
pub fn problem(status: u16, error: &str) -> Response {
    Response::json(status, &json!({ "error": error }))
}

/// Why a request is refused before a handler sees it. The connection is closed after the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub status: u16,
    pub error: &'static str,
}

pub(super) const fn refusal(status: u16, error: &'static str) -> Refusal {
    Refusal { status, error }
}

/// Request line and headers.
pub struct Head {
    pub request: Request,
    /// In bytes, including the empty line.
    pub length: usize,
    pub framing: Framing,
    pub expects_continue: bool,
    /// Whether the connection stays open for another request.
    pub keep_alive: bool,
    pub http_1_1: bool,
    /// Whether the method is HEAD, so that the response has no body.
    pub head_only: bool,
}

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// In bytes.
    Length(usize),
    Chunked,
}

/// Parses request line and headers; `None` if they are incomplete.
pub fn head(input: &[u8]) -> Result<Option<Head>, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let length = match parsed.parse(input) {
        Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD_BYTES => length,
        Ok(httparse::Status::Partial) if input.len() < MAX_HEAD_BYTES => return Ok(None),
        Ok(_) => {
            return Err(refusal(
                431,
                "the request line and headers exceed 16384 bytes",
            ));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Err(refusal(431, "the request has more than 64 headers"));
        }
        Err(httparse::Error::Version) => {
            return Err(refusal(505, "expected HTTP/1.1 or HTTP/1.0"));
        }
        Err(_) => return Err(refusal(400, "not an HTTP request")),
    };
    let method = parsed.method.unwrap_or_default();
    let target = parsed.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let http_1_1 = parsed.version == Some(1);
    let mut head = Head {
        request: Request {
            method: if method == "HEAD" { "GET" } else { method }.to_owned(),
            path: path.to_owned(),
            query: query.to_owned(),
            ..Request::default()
        },
        length,
        framing: Framing::Length(0),
        expects_continue: false,
        keep_alive: http_1_1,
        http_1_1,
        head_only: method == "HEAD",
    };
    let (mut lengths, mut chunked, mut hosts) = (Vec::new(), false, 0);
    for header in parsed.headers.iter() {
        let value = String::from_utf8_lossy(header.value);
        let value = value.trim();
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => lengths.push(value.to_owned()),
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") && !chunked => {
                chunked = true;
            }
            "transfer-encoding" => {
                return Err(refusal(
                    501,
                    "unsupported transfer encoding, expected chunked",
                ));
            }
            "connection" => {
                for word in value.split(',').map(str::trim) {
                    if word.eq_ignore_ascii_case("close") {
                        head.keep_alive = false;
                    } else if word.eq_ignore_ascii_case("keep-alive") {
                        head.keep_alive = true;
                    }
                }
            }
            "expect" if value.eq_ignore_ascii_case("100-continue") => {
                head.expects_continue = http_1_1;
            }
            "origin" => head.request.origin = Some(value.to_owned()),
            "content-type" => head.request.content_type = Some(value.to_owned()),
            "authorization" => head.request.authorization = Some(value.to_owned()),
            "accept" => head.request.accept = Some(value.to_owned()),
            "accept-encoding" => head.request.accepts_gzip |= value.split(',').any(is_gzip),
            "host" => {
                hosts += 1;
                head.request.host = Some(value.to_owned());
            }
            _ => {}
        }
    }
    if hosts != 1 && http_1_1 {
        return Err(refusal(400, "expected one Host header"));
    }
    head.framing = match (chunked, lengths.as_slice()) {
        (true, []) => Framing::Chunked,
        (true, _) => {
            return Err(refusal(
                400,
                "expected Content-Length or Transfer-Encoding, not both",
            ));
        }
        (false, []) => Framing::Length(0),
        (false, [length, others @ ..]) => {
            let digits = length.bytes().all(|b| b.is_ascii_digit()) && !length.is_empty();
            if !digits || others.iter().any(|other| other != length) {
                return Err(refusal(400, "Content-Length is not a single number"));
            }
            // A number that does not fit in a usize is too large as well.
            match length.parse() {
                Ok(length) if length <= MAX_BODY_BYTES => Framing::Length(length),
                _ => return Err(TOO_LARGE),
            }
        }
    };
    Ok(Some(head))
}

/// `gzip`, with a quality that is not 0 (RFC 9110, section 12.5.3).
fn is_gzip(coding: &str) -> bool {
    let mut parts = coding.split(';').map(str::trim);
    let is_gzip = parts.next().is_some_and(|c| c.eq_ignore_ascii_case("gzip"));
    let mut qualities = parts.filter_map(|p| p.strip_prefix("q="));
    is_gzip && qualities.all(|q| q.parse::<f32>().is_ok_and(|q| q > 0.0))
}

pub(super) const TOO_LARGE: Refusal = refusal(413, "the body exceeds 1048576 bytes");

/// Appends status line and headers, for a body of a known length or in chunks.
pub fn put_head(out: &mut Vec<u8>, response: &Response, length: Option<usize>, close: bool) {
    let (status, reason) = (response.status, reason(response.status));
    let mut head = format!("HTTP/1.1 {status} {reason}\r\n");
    // Fails only for years that RFC 9110 cannot express.
    if let Ok(date) = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now()) {
        head += &format!("Date: {date}\r\n");
    }
    head += &format!("Content-Type: {}\r\n", response.content_type);
    for (name, value) in &response.headers {
        head += &format!("{name}: {value}\r\n");
    }
    match length {
        Some(length) => head += &format!("Content-Length: {length}\r\n"),
        None if !close => head += "Transfer-Encoding: chunked\r\n",
        None => {}
    }
    head += match close {
        true => "Connection: close\r\n",
        false => "Connection: keep-alive\r\n",
    };
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        421 => "Misdirected Request",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(text: &str) -> Head {
        head(text.as_bytes()).ok().flatten().unwrap()
    }

    fn status(text: &str) -> u16 {
        head(text.as_bytes()).err().unwrap().status
    }

    #[test]
    fn a_request_line_and_headers() {
        let text = "POST /flow?a=b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nAuthorization: Bearer t\r\n\r\nhello";
        let head = parsed(text);
        assert_eq!(
            (head.request.path.as_str(), head.request.query.as_str()),
            ("/flow", "a=b")
        );
        assert_eq!(head.request.authorization.as_deref(), Some("Bearer t"));
        assert!(head.keep_alive);
        assert_eq!(head.request.host.as_deref(), Some("x"));
        assert_eq!(head.framing, Framing::Length(5));
        for cut in 0..head.length {
            assert!(super::head(&text.as_bytes()[..cut]).is_ok_and(|head| head.is_none()));
        }
    }

    #[test]
    fn gzip_is_used_only_if_accepted() {
        let accepts = |value: &str| {
            let text = format!("GET / HTTP/1.1\r\nHost: x\r\nAccept-Encoding: {value}\r\n\r\n");
            parsed(&text).request.accepts_gzip
        };
        assert!(accepts("gzip") && accepts("br, gzip;q=0.5") && accepts("deflate,GZip"));
        assert!(!accepts("identity") && !accepts("gzip;q=0") && !accepts("xgzip"));
    }

    #[test]
    fn keep_alive_depends_on_version_and_header() {
        assert!(!parsed("GET / HTTP/1.0\r\n\r\n").keep_alive);
        assert!(parsed("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive);
        assert!(!parsed("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").keep_alive);
    }

    #[test]
    fn bad_requests_are_refused_with_their_status() {
        let with = |header: &str| format!("POST / HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n");
        assert_eq!(status("GET / HTTP/2.0\r\n\r\n"), 505);
        assert_eq!(status("\x16\x03\x01\r\n\r\n"), 400);
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), 400);
        assert_eq!(status(&with("Content-Length: 1073741824")), 413);
        assert_eq!(
            status(&with("Content-Length: 99999999999999999999999")),
            413
        );
        assert_eq!(status(&with("Content-Length: -1")), 400);
        assert_eq!(status(&with("Content-Length: 1\r\nContent-Length: 2")), 400);
        assert_eq!(
            status(&with("Content-Length: 1\r\nTransfer-Encoding: chunked")),
            400
        );
        assert_eq!(status(&with("Transfer-Encoding: gzip")), 501);
        assert_eq!(
            status(&with(&format!("X: {}", "x".repeat(MAX_HEAD_BYTES)))),
            431
        );
        assert_eq!(status(&"GET ".repeat(MAX_HEAD_BYTES)), 505);
        assert_eq!(status(&format!("GET /{}", "x".repeat(MAX_HEAD_BYTES))), 431);
    }

    proptest! {
        #[test]
        fn no_input_causes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = head(&bytes);
        }
    }
}
